"""What each value of a micro-batch's graph is to the whole batch's: the same model captured twice, with few rows and with all.

Node by node, the two captures differ in sizes and in numbers that Python made of sizes (``loss.sum() / x.shape[0]`` stands in
a graph as ``sum / 4``), and the difference says what no single graph does: a dimension that grows with the batch holds its
rows; a value that should depend on rows, and none of whose dimensions grows, has been made of all of them together.

Interiors of models are taken at their word: what a layer makes of a matrix of weights counts as each row's own, though a batch
norm or a mixture's capacity looks at other rows. Such models train otherwise in smaller batches whoever splits them. What comes
behind the last layer, the loss, is looked at closely.

Dropped: one capture with a symbolic batch size, as models that compute with sizes in Python specialise on it or refuse it.
Dropped: running nodes again with more rows, since sizes are written into them.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx
from torch import nn

from dspass.passes.experts import name_of, value_of
from dspass.runtime import compat

_MARKERS = {"unshard", "unshard_experts"}

#: Operators on values whose numbers may be counts of rows.
ARITHMETIC = {
    "add", "iadd", "add_", "sub", "isub", "sub_", "mul", "imul", "mul_", "multiply", "truediv", "itruediv", "div", "div_",
    "divide", "true_divide", "pow",
}  # fmt: skip

#: Operators whose numbers are sizes and places.
_SIZED = {
    "view", "reshape", "expand", "unflatten", "repeat", "tile", "broadcast_to", "repeat_interleave", "getitem", "narrow",
    "select", "slice", "split", "chunk", "as_strided", "unfold", "zeros", "ones", "empty", "new_zeros", "new_ones", "new_empty",
    "one_hot", "arange", "rand", "randn", "pad", "index_select",
}  # fmt: skip

#: What mixes values along a dimension and answers as many: the position of ``dim`` among the arguments, and its default.
_ALONG = {
    "softmax": (1, None), "log_softmax": (1, None), "cumsum": (1, None), "cumprod": (1, None), "logcumsumexp": (1, None),
    "sort": (1, -1), "argsort": (1, -1), "normalize": (2, 1),
}  # fmt: skip

#: Attention, and the dimension along which its first three arguments meet.
_ATTENTION = {"scaled_dot_product_attention": -2, "multi_head_attention_forward": 0}

#: Of one argument these read the shape, the dtype and the device, and no values: the first, or the second.
_LIKE = {f"{kind}_like" for kind in ("zeros", "ones", "empty", "full", "rand", "randn", "randint")} | {
    f"new_{kind}" for kind in ("zeros", "ones", "empty", "full", "tensor")
}
_AS = {"type_as", "expand_as", "view_as", "reshape_as", "to"}

_RANDOM = {
    "bernoulli", "multinomial", "normal", "uniform", "poisson", "rrelu", "gumbel_softmax", "exponential", "geometric",
    "cauchy",
}  # fmt: skip


@dataclass(kw_only=True, eq=False)
class Compared:
    """The nodes of a micro-batch's graph, each with its ``twin`` in the whole batch's.

    ``varies``: its value is not the same in each micro-batch. ``rows``: one of its dimensions grows with the batch.
    ``blends``: what it holds of a row depends on other rows, in a way that cannot be undone; ``inherits``: only since it reads
    something that does, or a number that is the micro-batch's size; ``scaled``: there is such a number. ``of_parameters`` and
    ``random``: it depends on a parameter, on random numbers.
    """

    twin: dict[fx.Node, fx.Node] = field(default_factory=dict)
    varies: set[fx.Node] = field(default_factory=set)
    rows: set[fx.Node] = field(default_factory=set)
    blends: set[fx.Node] = field(default_factory=set)
    inherits: set[fx.Node] = field(default_factory=set)
    scaled: set[fx.Node] = field(default_factory=set)
    of_parameters: set[fx.Node] = field(default_factory=set)
    random: set[fx.Node] = field(default_factory=set)

    def each_row(self, node: fx.Node) -> bool:
        """Whether the value is the whole batch's for the rows of this micro-batch."""
        return node in self.rows and node not in self.blends and node not in self.inherits


def compare(graph: fx.Graph, whole: fx.Graph, micro_batches: int) -> Compared:
    """Hold the capture of one of ``micro_batches`` against that of the whole batch.

    Raises ``ValueError`` where the two are not made of the same nodes."""
    found = Compared()
    sharing: defaultdict[int, list[fx.Node]] = defaultdict(list)
    for node, other in _pairs(graph, whole):
        found.twin[node] = other
        _judge(node, other, micro_batches, found)
        for storage in _storages(node):
            sharing[storage].append(node)
        if writes(node):
            for storage in _storages(node.args[0]):
                _spread(node, sharing[storage], found)
    return found


def broadcast_alike(graph: fx.Graph, whole: fx.Graph, micro_batches: int) -> None:
    """Give ``graph`` the ``expand`` that ``whole`` has of a value with one row, where a model leaves it out for a batch of one.

    Models of ``transformers`` do so with positions. Readers then read the same in both, and it changes no value."""
    twin: dict[fx.Node, fx.Node] = {}
    added: dict[fx.Node, fx.Node] = {}
    rest = iter(list(graph.nodes))
    node = next(rest, None)
    for other in whole.nodes:
        if node is None:
            return
        if _is_called_alike(node, other):
            pairs = list(zip(_arguments(node), _arguments(other), strict=False))
            news = iter([added[b] if b in added and added[b].args[0] is a else a for a, b in pairs])
            if any(b in added for _, b in pairs):
                node.args, node.kwargs = fx.map_arg((node.args, node.kwargs), lambda n, news=news: next(news, n))
            twin[other], node = node, next(rest, None)
            continue
        source = twin.get(other.args[0]) if name_of(other) == "expand" and isinstance(other.args[0], fx.Node) else None
        if source is None or not _is_one_row(value_of(source), value_of(other), micro_batches):
            return  # :func:`compare` says where they differ
        value: torch.Tensor = value_of(source)
        with graph.inserting_before(node):
            twin[other] = added[other] = graph.call_method("expand", (source, *value.shape))
        added[other].meta = {**other.meta, "example_value": value.expand(value.shape)}


def _is_one_row(value: Any, other: Any, micro_batches: int) -> bool:
    """Whether ``value`` is what ``other`` of the whole batch would be with one row."""
    if not isinstance(value, torch.Tensor) or not isinstance(other, torch.Tensor):
        return False
    dims = grown(value, other, micro_batches)
    return dims is not None and len(dims) == 1 and value.shape[dims[0]] == 1


def _arguments(node: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return found


def _is_called_alike(node: fx.Node, other: fx.Node) -> bool:
    return node.op == other.op and name_of(node) == name_of(other)


def _pairs(graph: fx.Graph, whole: fx.Graph) -> Iterable[tuple[fx.Node, fx.Node]]:
    few, all_ = list(graph.nodes), list(whole.nodes)
    for node, other in zip(few, all_, strict=False):
        if not _is_called_alike(node, other):
            raise ValueError(f"%{node.name} ({name_of(node)}) with a micro-batch is %{other.name} ({name_of(other)})")
    if len(few) != len(all_):
        raise ValueError(f"it has {len(few)} operations with a micro-batch and {len(all_)}")
    return zip(few, all_, strict=True)


def _judge(node: fx.Node, other: fx.Node, micro_batches: int, found: Compared) -> None:
    inputs = reads(node)
    grows = [grown(a, b, micro_batches) for a, b in zip(_tensors(node), _tensors(other), strict=False)]
    has_other_numbers = node.op != "output" and _numbers(node) != _numbers(other)
    if is_parameter(node) or any(n in found.of_parameters for n in inputs):
        found.of_parameters.add(node)
    if _draws(node) or any(n in found.random for n in inputs):
        found.random.add(node)
    if not (has_other_numbers or any(dims != () for dims in grows) or any(n in found.varies for n in inputs)):
        return
    found.varies.add(node)
    is_rows = any(dims is not None and len(dims) == 1 for dims in grows)
    if is_rows:
        found.rows.add(node)
    if (grows and not is_rows) or _goes_along(node, grows):
        found.blends.add(node)
    is_scaled = has_other_numbers and name_of(node) not in _SIZED and _is_float(node)
    if is_scaled:
        found.scaled.add(node)
        if name_of(node) not in ARITHMETIC:
            found.blends.add(node)
    is_layer = is_rows and any(n in found.of_parameters and n not in found.varies and _is_matrix(n) for n in inputs)
    if not is_layer and (is_scaled or any(n in found.blends or n in found.inherits for n in inputs)):
        found.inherits.add(node)


def _spread(write: fx.Node, nodes: list[fx.Node], found: Compared) -> None:
    """What is written in place is read under the names of all that share its memory."""
    for facts in (found.varies, found.of_parameters, found.random):
        if write in facts:
            facts.update(nodes)
    if write in found.blends or write in found.inherits:
        found.blends.update(nodes)


def mixes_rows(graph: fx.Graph, whole: fx.Graph, micro_batches: int) -> fx.Node | None:
    """The first node that computes with pairs of rows of the batch, of which a micro-batch has only those of its own rows.

    Its result has two dimensions that grow with the batch, and none of the several values that it reads has: a product of rows
    with rows, or attention among them. Also a table, looked up by indices, that has as many rows as the batch. None where there
    is none, or where the two captures are not made of the same nodes. A one-hot place among a capacity's is made of one value,
    and is none of these.
    """
    dims: dict[fx.Node, tuple[int, ...]] = {}
    for node, other in zip(graph.nodes, whole.nodes, strict=False):
        if not _is_called_alike(node, other):
            return None
        value, of_whole = value_of(node), value_of(other)
        are_tensors = isinstance(value, torch.Tensor) and isinstance(of_whole, torch.Tensor)
        dims[node] = (grown(value, of_whole, micro_batches) or ()) if are_tensors else ()
        arguments = _arguments(node)
        if name_of(node) in _ATTENTION:
            is_mixed = any(range(value_of(n).dim())[_ATTENTION[name_of(node)]] in dims[n] for n in arguments[:3])
        elif name_of(node) == "embedding":
            is_mixed = bool(dims[arguments[0 if node.target is torch.embedding else 1]])  # the table
        else:
            is_mixed = len(dims[node]) > 1 and _is_float(node) and all(len(dims[n]) < 2 for n in arguments)
            is_mixed = is_mixed and sum(bool(dims[n]) for n in arguments) > 1
        if is_mixed:
            return node
    return None


def share_memory(a: Any, b: Any) -> bool:
    """Whether two nodes have values that do."""
    return bool(set(_storages(a)) & set(_storages(b)))


def is_parameter(node: fx.Node) -> bool:
    """A whole parameter: what its marker answers, or the parameter itself."""
    if node.op == "placeholder":
        return isinstance(value_of(node), nn.Parameter)
    return name_of(node) in _MARKERS


def writes(node: fx.Node) -> bool:
    """Whether a node changes its first argument in place."""
    if node.op not in ("call_function", "call_method") or not node.args:
        return False
    name = name_of(node)
    by_operator = node.target is operator.setitem or (
        getattr(operator, name, None) is node.target and name.startswith("i") and hasattr(operator, name[1:])
    )
    return by_operator or (name.endswith("_") and not name.startswith("_")) or node.kwargs.get("inplace") is True


def reads(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values it depends on, and not only on what they are like."""
    name, args = name_of(node), node.args
    if name in _LIKE:
        args = args[1:]
    elif name in _AS:
        args = args[:1] + args[2:]
    found: dict[fx.Node, None] = {}
    fx.map_arg((args, node.kwargs), found.setdefault)
    return list(found)


def needed(graph: fx.Graph, nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """All nodes that the values of ``nodes`` depend on (:func:`reads`), themselves and what is written in place among them."""
    writers = [(n, set(_storages(n.args[0]))) for n in graph.nodes if writes(n)]
    found: set[fx.Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node in found:
            continue
        found.add(node)
        todo.extend(reads(node))
        mine = set(_storages(node))
        todo.extend(writer for writer, written in writers if mine & written)
    return found


def _draws(node: fx.Node) -> bool:
    name = name_of(node).strip("_")
    return node.op != "placeholder" and (name in _RANDOM or name.startswith("rand") or "dropout" in name)


def _tensors(node: fx.Node) -> list[torch.Tensor]:
    value = value_of(node)
    return [v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, torch.Tensor)]


def grown(few: torch.Tensor, all_: torch.Tensor, micro_batches: int) -> tuple[int, ...] | None:
    """The dimensions that differ; None where one does not as the number of rows does, or a size is not known."""
    sizes = [*few.shape, *all_.shape]
    if few.dim() != all_.dim() or not all(type(size) is int for size in sizes):
        return None
    dims = tuple(d for d in range(few.dim()) if few.shape[d] != all_.shape[d])
    return dims if all(all_.shape[d] == few.shape[d] * micro_batches for d in dims) else None


def _goes_along(node: fx.Node, grows: list[tuple[int, ...] | None]) -> bool:
    if name_of(node) not in _ALONG:
        return False
    position, default = _ALONG[name_of(node)]
    dim = node.kwargs.get("dim", node.args[position] if len(node.args) > position else default)
    value = _tensors(node)
    return isinstance(dim, int) and bool(value) and grows[0] == (dim % max(value[0].dim(), 1),)


def _numbers(node: fx.Node) -> str:
    return repr(fx.map_arg((node.args, node.kwargs), lambda _: None))


def _is_matrix(node: fx.Node) -> bool:
    return any(value.dim() > 1 for value in _tensors(node))


def _is_float(node: fx.Node) -> bool:
    return any(value.is_floating_point() for value in _tensors(node))


def _storages(node: Any) -> list[int]:
    found = (compat.storage_of(value) for value in _tensors(node)) if isinstance(node, fx.Node) else ()
    return [storage for storage in found if storage is not None]
