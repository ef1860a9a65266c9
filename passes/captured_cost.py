"""What the nodes of a captured graph cost, forward and backward, before anything is lowered.

Dynamo captures calls of torch functions, so each is run once on fake tensors, and the operators that it makes are priced: a
product by the roofline of :mod:`dspass.passes.cost`, all else by the bytes that it moves, as if it were fused as far as it
can be. A value goes to memory where a kernel of its own reads it, where the backward does, or where it is answered; only then
is it counted, written once, and read once between two products. Derivatives follow from the forward:

- one of a product takes as long as the product, for each operand that has a gradient; it is the weight gradient's where that
  operand is a parameter, or a view or cast of some. An attention is one kernel, whose derivatives torch's formula counts;
- one of anything else moves twice as much, its gradients and what was saved. Reducing the gradient of a bias or a norm's
  weight reads what comes in once more, and an embedding's writes the whole weight.

What the backward needs is counted as eager code saves it: operands of products, and one value of each other operator that is
not linear, its result or its input. Each tensor counts once, with the node that saves it first, and parameters and inputs of
the graph never. Of a region under ``torch.utils.checkpoint`` its inputs are saved, and it runs once more in the backward.
What is made without products of what else is saved, such as a norm's result, need not be: the planner drops that first.

Dropped: the joint graph of AOTAutograd, whose kernels :mod:`dspass.passes.cost` prices more exactly. It takes a minute where
this takes seconds, and its nodes would have to be led back to captured ones, which the cut is of.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

from dspass.passes.cost import arithmetic_seconds, is_attention, is_product, operator_name
from dspass.passes.devices import Device
from dspass.passes.kernels import PICKS, is_fusible
from dspass.runtime import compat
from dspass.runtime.params import ParamSpec, lookup

#: Operators that Inductor takes apart and fuses, though each is one of ATen's kernels in eager code.
_TAKEN_APART = frozenset(
    {
        "_softmax", "_log_softmax", "native_layer_norm", "native_group_norm", "native_batch_norm",
        "_native_batch_norm_legit", "native_dropout", "nll_loss_forward", "_fused_rms_norm", "var_mean", "cumsum",
        "amin", "any", "all", "max", "min", "argmax", "constant_pad_nd", "stack", "new_zeros", "new_ones",
        "zeros_like", "ones_like", "full_like", "arange", "zeros", "ones", "full", "bernoulli", "rand", "rand_like",
        "copy", "fill", "masked_fill",
    }
)  # fmt: skip

#: Operators whose derivatives need neither inputs nor results.
_LINEAR = frozenset(
    {
        "add", "sub", "rsub", "neg", "clone", "contiguous", "_to_copy", "copy", "sum", "mean", "cat", "stack",
        "slice", "slice_scatter", "select", "select_scatter", "expand", "constant_pad_nd", "embedding", "gather",
        "index", "fill", "masked_fill", "where", "cumsum", "convert_element_type", "nll_loss_forward",
        "scatter_add", "index_put", "lerp", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones",
    }
)  # fmt: skip

#: Operators whose derivatives are made of their results.
_BY_RESULT = frozenset(
    {
        "_softmax", "_log_softmax", "exp", "expm1", "tanh", "sigmoid", "relu", "sqrt", "rsqrt", "reciprocal",
        "native_dropout",
    }
)  # fmt: skip

#: Operators whose derivative for one operand is made of the other.
_BILINEAR = frozenset(("mul", "div"))

_ALIASES = frozenset(("detach", "alias", "lift_fresh", "_unsafe_view", "_reshape_alias"))

_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention.default

_MARKERS = (torch.ops.dspass.unshard, torch.ops.dspass.unshard_experts)

_CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint

#: Calls that change what the nodes behind them do. They answer no tensor.
CONTEXTS = frozenset((compat.SETS_GRADIENTS, compat.ENTERS_AUTOCAST, compat.EXITS_AUTOCAST))


@dataclass(frozen=True, kw_only=True)
class NodeCost:
    """Of one run of one node: seconds of its ``forward``, and of its backward by what that makes, ``input_gradient`` and
    ``weight_gradient``; bytes that it has saved for the backward, and ``light_bytes``, those of them that follow from what else
    is saved without a product, which the backward may as well make again, in ``light`` seconds of forwards. ``held_bytes`` are
    what its weight gradients are made of, where these are made later than those of inputs: operands and gradients of products.

    ``memory`` are the storages that its tensors lie in, by numbers that mean something within one answer of :func:`costs_of`
    only, and ``writes`` those whose contents it changes; ``is_view`` where all its tensors lie in its inputs'."""

    forward: float = 0.0
    input_gradient: float = 0.0
    weight_gradient: float = 0.0
    saved_bytes: int = 0
    light: float = 0.0
    light_bytes: int = 0
    held_bytes: int = 0
    has_product: bool = False
    has_gradient: bool = False
    is_random: bool = False
    is_view: bool = False
    memory: frozenset[int] = frozenset()
    writes: frozenset[int] = frozenset()

    @property
    def seconds(self) -> float:
        return self.forward + self.input_gradient + self.weight_gradient


def parameter_of(node: fx.Node) -> ParamSpec | None:
    """Of a marker of :mod:`dspass.runtime.collectives`; None of other nodes."""
    target = getattr(node.target, "overloadpacket", node.target)
    return lookup(cast(str, node.args[1])) if node.op == "call_function" and target in _MARKERS else None


def costs_of(gm: fx.GraphModule, on: Device, trains: bool = True) -> dict[fx.Node, NodeCost]:
    """Of each node of a graph that Dynamo captured, on device ``on``, for tensors of the sizes that it was captured with
    (``meta["example_value"]``). Parameters are those that a marker stands for, and placeholders that are ``nn.Parameter``.
    Without ``trains`` nothing has a gradient. A node that cannot be run on fake tensors costs what moving its tensors does."""
    values = [n.meta["example_value"] for n in gm.graph.nodes if n.op == "placeholder" and "example_value" in n.meta]
    recorder = _Recorder(trains)
    with compat.apart(values):
        recorder.run(gm)
    return _price(gm.graph, recorder, on)


@dataclass(eq=False)
class _Operator:
    """One operator that ``node`` made. ``func`` is None where the whole node is meant."""

    node: fx.Node
    func: Any
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    result: Any
    has_gradient: bool
    reads: list[torch.Tensor] = field(init=False)
    writes: list[torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.reads, self.writes = _tensors((self.args, dict(self.kwargs))), _tensors(self.result)

    @property
    def name(self) -> str:
        """Of an operator that writes into its first argument that of the one that does not."""
        return operator_name(self.func).removesuffix("_") if self.func is not None else ""

    @property
    def is_fused(self) -> bool:
        return self.func is not None and (is_fusible(self.func) or self.name in _TAKEN_APART)


class _Recorder(TorchDispatchMode):
    """Runs a graph on fake tensors, and remembers the operators. Tensors are told apart as objects, which all stay alive."""

    def __init__(self, trains: bool) -> None:
        super().__init__()
        self.trains, self.records_gradients = trains, True
        self.values: dict[fx.Node, Any] = {}
        self.operators: list[_Operator] = []
        self.abandoned: list[_Operator] = []
        self.with_gradient: set[int] = set()
        self.memory_with_gradient: set[int] = set()  # what was written in place
        self.of_parameters: set[int] = set()
        self.random: set[fx.Node] = set()
        self.written: dict[fx.Node, list[torch.Tensor]] = {}
        self.node: fx.Node | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.namespace != "prim" and self.node is not None:
            self._record(func, args, kwargs, result)
        return result

    def _record(
        self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any, is_run: bool = True
    ) -> None:
        assert self.node is not None
        reads = _tensors((args, dict(kwargs)))
        differentiable = self.records_gradients and operator_name(func) != "detach"
        floating = [t for t in _tensors(result) if t.is_floating_point() or t.is_complex()]
        has_gradient = differentiable and bool(floating) and any(map(self.needs_gradient, reads))
        if has_gradient:
            self.with_gradient.update(map(id, floating))
        if reads and all(id(t) in self.of_parameters for t in reads):
            self.of_parameters.update(map(id, _tensors(result)))
        if func is not None and is_run:
            if torch.Tag.nondeterministic_seeded in func.tags:
                self.random.add(self.node)
            if func._schema.is_mutable:
                named = zip(func._schema.arguments, args, strict=False)
                changed = [v for a, v in named if a.alias_info is not None and a.alias_info.is_write]
                changed += [kwargs[a.name] for a in func._schema.arguments if a.name in kwargs and _is_written(a)]
                self.written.setdefault(self.node, []).extend(_tensors(changed))
                if has_gradient:
                    self.memory_with_gradient.update(map(_storage, _tensors(changed)))
        self.operators.append(_Operator(self.node, func, args, kwargs, result, has_gradient))

    def needs_gradient(self, tensor: torch.Tensor) -> bool:
        return id(tensor) in self.with_gradient or _storage(tensor) in self.memory_with_gradient

    def run(self, gm: fx.GraphModule) -> None:
        """The whole graph; called in the fake mode of its values."""
        for node in gm.graph.nodes:
            if node.op != "output":
                self.values[node] = self._value(gm, node)

    def _value(self, gm: fx.GraphModule, node: fx.Node) -> Any:
        example: Any = node.meta.get("example_value")
        if node.op == "get_attr" and example is None:
            example = operator.attrgetter(str(node.target))(gm)  # the graph of a region, or a constant
        spec = parameter_of(node)
        if node.op in ("placeholder", "get_attr") or (spec is not None and example is not None):
            if spec is not None or isinstance(example, torch.nn.Parameter):
                example = example.detach()
                self.of_parameters.add(id(example))
                if self.trains and (spec.trains if spec is not None else node.meta["example_value"].requires_grad):
                    self.with_gradient.add(id(example))
            return example
        if node.target is compat.SETS_GRADIENTS:
            self.records_gradients = bool(node.args[0])
            return None
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), self.values.__getitem__)
        before = len(self.operators)
        self.node = node
        if node.target is F.scaled_dot_product_attention and isinstance(example, torch.Tensor) and example.dim() == 4:
            return self._attention(args, kwargs, example)
        try:
            with self:
                return call(node, args, kwargs)
        except Exception:  # no values to compute with, or an operator without a fake
            self.abandoned += self.operators[before:]
            del self.operators[before:]
            self._record(None, args, kwargs, example)
            return example
        finally:
            self.node = None

    def _attention(self, args: Sequence[Any], kwargs: dict[str, Any], result: torch.Tensor) -> torch.Tensor:
        """By a fused kernel, as a device has it: which one torch would take for fake tensors is another matter."""
        given = dict(zip(("query", "key", "value", "attn_mask", "dropout_p"), args, strict=False)) | kwargs
        assert self.node is not None
        if given.get("dropout_p", 0.0):
            self.random.add(self.node)
        read = [given["query"], given["key"], given["value"]]
        if isinstance(given.get("attn_mask"), torch.Tensor):
            read.append(given["attn_mask"])
        self._record(_ATTENTION, read, {}, result, is_run=False)
        self.node = None
        return result


def call(node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What a node makes of these arguments; a region, such as one that is checkpointed, is run for what is in it."""
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if args and isinstance(args[0], fx.GraphModule):
        return args[0](*args[1:])
    function: Any = node.target
    return function(*args, **kwargs)


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _tensors(values: Any) -> list[torch.Tensor]:
    return [v for v in tree_leaves(values) if isinstance(v, torch.Tensor)]


def _bytes(tensor: torch.Tensor) -> int:
    """Of memory: an expanded tensor's is that of what it was expanded from."""
    shape = (compat.expected(n) or 0 for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0)
    return math.prod(shape) * tensor.element_size()


def _storage(tensor: torch.Tensor) -> int:
    return compat.storage_of(tensor) or 0


def _price(graph: fx.Graph, recorder: _Recorder, on: Device) -> dict[fx.Node, NodeCost]:
    given = {s for n, v in recorder.values.items() if n.op == "placeholder" for s in map(_storage, _tensors(v))}
    given |= {
        s
        for n, v in recorder.values.items()
        if n.op == "call_function" and parameter_of(n) is not None
        for s in map(_storage, _tensors(v))
    }
    work = [op for op in recorder.operators if not _is_alias(op)]
    saved = _saved(work, given, recorder)
    answered = [recorder.values[n] for n in graph.find_nodes(op="output")[0].all_input_nodes]
    in_memory = given | saved.keys() | set(map(_storage, _tensors(answered)))
    in_memory |= {_storage(t) for op in work if not op.is_fused for t in (*op.reads, *op.writes)}
    found = {node: _described(node, recorder) for node in recorder.values}
    light = _light(work, given, saved.keys())
    for place, (node, size) in saved.items():
        cost = found[node]
        less = size if place in light else 0
        found[node] = replace(cost, saved_bytes=cost.saved_bytes + size, light_bytes=cost.light_bytes + less)
    for node, size in _held(work, given, recorder):
        found[node] = replace(found[node], held_bytes=found[node].held_bytes + size)
    for op, forward in _forward_seconds(work, in_memory, on):
        derived = _derivatives(op, forward, recorder, on) if op.has_gradient else (0.0, 0.0)
        again = forward if op.has_gradient and op.node.target is _CHECKPOINT else 0.0
        cost = found[op.node]
        found[op.node] = replace(
            cost,
            forward=cost.forward + forward,
            light=cost.light + (forward if any(_storage(t) in light for t in op.writes) else 0.0),
            input_gradient=cost.input_gradient + derived[0] + again,
            weight_gradient=cost.weight_gradient + derived[1],
            has_product=cost.has_product or is_product(op.func),
        )
    return found


def _is_alias(op: _Operator) -> bool:
    """Whether nothing is computed."""
    if op.func is None:
        return False
    return op.func.is_view or op.name in _ALIASES or (not op.reads and not op.writes)


def _described(node: fx.Node, recorder: _Recorder) -> NodeCost:
    tensors = _tensors(recorder.values[node])
    memory = frozenset(map(_storage, tensors))
    sources = {_storage(t) for n in node.all_input_nodes for t in _tensors(recorder.values[n])}
    return NodeCost(
        has_gradient=any(recorder.needs_gradient(t) for t in tensors),
        is_random=node in recorder.random,
        is_view=bool(memory) and memory <= sources,
        memory=memory,
        writes=frozenset(map(_storage, recorder.written.get(node, ()))),
    )


# -- forward -------------------------------------------------------------------------------------------------


def _forward_seconds(work: Sequence[_Operator], in_memory: set[int], on: Device) -> Iterator[tuple[_Operator, float]]:
    stretch = 0  # products so far: what is fused between two of them reads a value once
    read: dict[int, int] = {}
    for op in work:
        if not op.is_fused:
            stretch += 1
            arithmetic = _arithmetic(op, on) if op.func is not None else 0.0
            yield op, max(arithmetic, sum(map(_bytes, (*op.reads, *op.writes))) / on.memory)
            continue
        moved = sum(_bytes(t) for t in op.writes if _storage(t) in in_memory)
        written = sum(map(_bytes, op.writes))
        for i, tensor in enumerate(op.reads):
            place = _storage(tensor)
            if place in in_memory and read.get(place) != stretch:
                read[place] = stretch
                moved += min(_bytes(tensor), written) if i == 0 and op.func in PICKS else _bytes(tensor)
        yield op, moved / on.memory + _function_seconds(op, on)


def _arithmetic(op: _Operator, on: Device) -> float:
    if not is_attention(op.func):
        return arithmetic_seconds(op.func, op.args, op.kwargs, op.result, on)
    query, key, value = _shapes(op)
    heads = math.prod(compat.expected(n) for n in query[:2])
    operations = float(compat.expected(sdpa_flop_count(query, key, value)))
    return heads * on.computing("attention", op.writes[0].dtype, operations / heads)


def _function_seconds(op: _Operator, on: Device) -> float:
    name = {"_softmax": "exp", "_log_softmax": "exp", "silu": "sigmoid", "gelu": "erf", "rsqrt": ""}.get(
        op.name, op.name
    )
    return on.functions.get(name, 0.0) * max(map(compat.expected_elements, op.writes), default=0)


# -- backward ------------------------------------------------------------------------------------------------


def _derivatives(op: _Operator, forward: float, recorder: _Recorder, on: Device) -> tuple[float, float]:
    """Seconds of an operator's gradients of activations, and of parameters."""
    derived = [t for t in op.reads if recorder.needs_gradient(t)]
    weights = [t for t in derived if id(t) in recorder.of_parameters]
    others = len(derived) - len(weights)
    if is_attention(op.func):
        return _attention_backward(op, forward, on), 0.0
    incoming = sum(map(_bytes, op.writes))
    if not op.is_fused:
        matrices = sum(t.dim() > 1 for t in weights)
        return forward * others, forward * matrices + (len(weights) - matrices) * incoming / on.memory
    of_inputs = 2 * forward if others else 0.0
    if not weights:
        return of_inputs, 0.0
    reduced = sum(map(_bytes, weights)) if op.func in PICKS else 0
    return of_inputs, (incoming + reduced) / on.memory


def _shapes(op: _Operator) -> list[Sequence[Any]]:
    """Of query, key and value; heads that several queries share count for each."""
    query, *others = (t.shape for t in op.reads[:3])
    return [query, *((*query[:2], *shape[2:]) for shape in others)]


def _attention_backward(op: _Operator, forward: float, on: Device) -> float:
    result, shapes = op.writes[0], _shapes(op)
    heads = math.prod(compat.expected(n) for n in result.shape[:2])
    operations = float(compat.expected(sdpa_backward_flop_count(result.shape, *shapes)))
    return max(2 * forward, heads * on.computing("attention backward", result.dtype, operations / heads))


# -- saved ---------------------------------------------------------------------------------------------------


def _saved(work: Sequence[_Operator], given: set[int], recorder: _Recorder) -> dict[int, tuple[fx.Node, int]]:
    """The storages that the backward needs: the node that saves each first, and its bytes."""
    found: dict[int, tuple[fx.Node, int]] = {}
    for op in work:
        if not op.has_gradient:
            continue
        is_checkpointed = op.node.target is _CHECKPOINT
        entering = [recorder.values[n] for n in op.node.all_input_nodes]
        for tensor in _tensors(entering) if is_checkpointed else _needed(op, recorder):
            if id(tensor) not in recorder.of_parameters and _storage(tensor) not in given:
                found.setdefault(_storage(tensor), (op.node, _bytes(tensor)))
    return found


def _light(work: Sequence[_Operator], given: set[int], saved: Set[int]) -> set[int]:
    """The storages that are made without products of ``given`` ones and of those of ``saved`` that are not themselves."""
    at_hand = set(given)
    found: set[int] = set()
    for op in work:
        follows = op.is_fused and op.reads and all(_storage(t) in at_hand for t in op.reads)
        for place in map(_storage, op.writes):
            if follows and place not in at_hand:
                found.add(place)
            if follows or place in saved:
                at_hand.add(place)
    return found


def _held(work: Sequence[_Operator], given: set[int], recorder: _Recorder) -> Iterator[tuple[fx.Node, int]]:
    """What products with parameters need for the gradients of these: the other operand, once, and as much as comes in."""
    known = set(given)
    for op in work:
        weights = [t for t in op.reads if id(t) in recorder.of_parameters and recorder.needs_gradient(t)]
        if op.is_fused or not weights:
            continue
        operands = {_storage(t): t for t in op.reads if id(t) not in recorder.of_parameters}
        new = [t for place, t in operands.items() if place not in known]
        known |= operands.keys()
        yield op.node, sum(map(_bytes, (*new, *op.writes[:1])))


def _needed(op: _Operator, recorder: _Recorder) -> list[torch.Tensor]:
    floating = [t for t in op.reads if t.is_floating_point() or t.is_complex()]
    if is_attention(op.func):
        return [*floating[:3], op.writes[0]]
    if is_product(op.func) or op.name in _BILINEAR:
        derived = [id(t) for t in floating if recorder.needs_gradient(t)]
        return [t for t in floating if any(other != id(t) for other in derived) or derived.count(id(t)) > 1]
    if op.name in _LINEAR:
        return []
    if op.name in _BY_RESULT:
        return op.writes[:1]
    return [t for t in floating if recorder.needs_gradient(t)][:1]
