"""Parts of the batch that take turns around layers of experts: rows of one travel while attention computes another."""

from __future__ import annotations

import operator
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, ClassVar

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch.utils._pytree import tree_map

from dspass.passes.base import Pass, PassContext, Where
from dspass.passes.batched_experts import find_batches
from dspass.passes.captured_cost import CONTEXTS
from dspass.passes.divide_experts import is_divided, is_parameter, share_axis
from dspass.passes.experts import Layer, find_experts, name_of, value_of
from dspass.passes.whole_batch import Compared, broadcast_alike, compare, grown, writes
from dspass.runtime import compat


class SplitError(ValueError):
    """A model does not compute each part of its batch by itself."""


@dataclass(frozen=True, kw_only=True)
class SplitBatch(Pass):
    """The layers of a model are computed once for each of ``count`` parts of the batch, in turns: what stands in front of a
    layer of experts for the first part, for the second, then the first part's experts, the second's, and so on. An exchange
    starts where its rows are made and is waited for where they are read (:mod:`dspass.passes.exchange_rows`), so that it runs
    beside the other parts' turn, attention or experts. The backward takes turns in the reverse order, as autograd walks back.

    The graph as Dynamo captured it with the whole batch tells what has to be computed, and ``part``, captured with one part,
    how: sizes are written into both (:mod:`dspass.passes.whole_batch`). The model is in parts up to the first place behind its
    last layer of experts where all that is read further on has the batch's rows in their order; there they are joined, and
    what follows, heads and losses, auxiliary ones too, is computed of the whole batch: the numbers of one part, whatever the
    loss is. What does not depend on the batch is computed once. A weight's gradient is the sum of the parts'.

    Parts are of the batch's first dimension: sequences, whose tokens do not attend to each other's. That a layer computes each
    of them by itself is looked at in what blends rows and reads them again, not in every operator. Dropped: parts of a
    sequence, which causal attention would allow in one order, and which no capture shows. Dropped: ranks' own choice of the
    number of parts: each exchange is one of all ranks, so that they agree on it (:mod:`dspass.batch_parts`).

    DeepSeek-V3's DualPipe (2024) overlaps experts of one micro-batch with attention of another by a schedule that is written
    for the model; SGLang's two-batch overlap does it in serving.
    """

    name: ClassVar[str] = "split_batch"
    where: ClassVar[frozenset[Where]] = frozenset({"captured"})

    count: int = 1
    part: fx.GraphModule | None = field(default=None, repr=False)
    why: str = "the batch is in one part"

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        if self.part is None:
            ctx.say(self.why)
            return graph
        try:
            layers = _in_turns(graph, self.part, self.count)
        except SplitError as refusal:
            ctx.say(f"the batch is in one part: {refusal}")
            ctx.note(f"The batch is in one part: {refusal}.")
            return graph
        ctx.say(f"{self.count} parts of the batch take turns around {layers} layer{'s' * (layers != 1)} of experts")
        return graph


def divided_layers(graph: fx.Graph) -> list[Layer]:
    """The layers of a captured graph whose experts are divided over ranks."""
    return [layer for layer in find_experts(graph, is_parameter)[0] if share_axis(layer)]


@dataclass(kw_only=True, eq=False)
class _Turns:
    """What of a graph is computed in parts: ``body``, in order, with the turn of each node, and what is read of it behind."""

    body: list[fx.Node]
    turn: Mapping[fx.Node, int]
    crossing: list[fx.Node]


def _in_turns(whole: fx.Graph, part: fx.GraphModule, count: int) -> int:
    """Put ``whole`` in ``count`` parts, and answer the number of its layers of experts.

    Raises :class:`SplitError`, and leaves ``whole`` as it is, where it cannot be."""
    layers = divided_layers(whole)
    if not layers:
        raise SplitError("no experts are divided over ranks")
    if find_batches(whole, is_divided, is_parameter)[0]:
        raise SplitError("rows of experts are batched by the model itself, over all of its tokens")
    broadcast_alike(part.graph, whole, count)
    try:
        found = compare(part.graph, whole, count)
    except ValueError as error:
        raise SplitError(f"the model computes otherwise with one part of it, where {error}") from error
    _Builder(whole, part, count, found, _turns(whole, found, layers, count)).build()
    return len(layers)


# -- what is in parts ----------------------------------------------------------------------------------------------------


def _turns(whole: fx.Graph, found: Compared, layers: Sequence[Layer], count: int) -> _Turns:
    nodes = list(whole.nodes)
    place = {node: i for i, node in enumerate(nodes)}
    of_part = {other: node for node, other in found.twin.items()}
    rows = _rows_of_part(whole, of_part, count)
    if any(value_of(of_part[layer.products[0]]).shape[0] == rows for layer in layers):
        raise SplitError("each sequence has one row for one expert, whose order cannot be told from the batch's")
    leaving = [node for layer in layers for node in layer.leaving()]
    last = max(place[node] for node in leaving)
    refused: fx.Node | None = None
    for end in nodes[last + 1 :]:
        if end.op == "output":
            break
        body = _made_of(nodes, [*leaving, end], place)
        crossing = [node for node in nodes if node in body and any(user not in body for user in node.users)]
        mixed = [node for node in crossing if not _joins(node, of_part, found, rows, count)]
        if not mixed:
            held = [node for node in nodes if node in body and node.op not in ("placeholder", "output")]
            _refuse_disorder(nodes, body, place)
            _refuse_blends(held, body, of_part, found)
            ends = sorted(i for layer in layers for i in (place[layer.inside[0]], place[layer.inside[-1]] + 1))
            turn = {node: bisect_right(ends, place[node]) for node in held}
            return _Turns(body=held, turn=turn, crossing=[n for n in crossing if n.op != "placeholder"])
        refused = mixed[0]
    named = f"%{refused.name} ({name_of(refused)})" if refused is not None else "nothing"
    raise SplitError(
        f"{named}, which is read behind the last layer of experts, has not the batch's rows in their order"
    )


def _rows_of_part(whole: fx.Graph, of_part: Mapping[fx.Node, fx.Node], count: int) -> int:
    """How many of the batch's rows a part has: the size that most inputs have."""
    sizes: Counter[int] = Counter()
    for node in whole.find_nodes(op="placeholder"):
        few, every = value_of(of_part[node]), value_of(node)
        if isinstance(few, torch.Tensor) and isinstance(every, torch.Tensor):
            sizes.update(few.shape[d] for d in grown(few, every, count) or ())
    if not sizes:
        raise SplitError("no input of the graph has its rows")
    return sizes.most_common(1)[0][0]


def _made_of(nodes: Sequence[fx.Node], roots: Iterable[fx.Node], place: Mapping[fx.Node, int]) -> set[fx.Node]:
    """``roots`` and all that they are made of, with what is written into it, and calls that change what others do."""
    writers = [(n, set(_storages(n.args[0]))) for n in nodes if writes(n)]
    body: set[fx.Node] = set()
    todo = list(roots)
    end = max(place[node] for node in todo)
    todo += [node for node in nodes[:end] if node.target in CONTEXTS]
    while todo:
        node = todo.pop()
        if node in body:
            continue
        body.add(node)
        todo.extend(node.all_input_nodes)
        mine = set(_storages(node))
        todo.extend(writer for writer, written in writers if mine & written)
    return body


def _refuse_disorder(nodes: Sequence[fx.Node], body: set[fx.Node], place: Mapping[fx.Node, int]) -> None:
    """What is not in the body is computed behind all of it: refuse what would then read or do something else."""
    held = [node for node in nodes if node in body]
    end = place[held[-1]]
    written = {storage for node in held if writes(node) for storage in _storages(node.args[0])}
    changed = False  # by calls such as set_grad_enabled, which come in pairs
    for node in nodes[:end]:
        if node.target in CONTEXTS:
            changed = _is_changed(node)
        if node in body or node.op == "placeholder":
            continue
        if changed:
            raise SplitError(
                f"%{node.name} is computed under another gradient mode or precision than what surrounds it"
            )
        if written.intersection(s for source in node.all_input_nodes for s in _storages(source)):
            raise SplitError(f"%{node.name} reads what is written into later")


def _refuse_blends(
    held: Sequence[fx.Node], body: set[fx.Node], of_part: Mapping[fx.Node, fx.Node], found: Compared
) -> None:
    """Refuse what would be another value with a part of the batch: numbers that are made of all of its rows and read with each
    of them. How many rows each expert gets, and where they stand, is each part's own."""
    for node in held:
        few = of_part[node]
        if few not in found.varies or not _is_float(value_of(few)):
            continue
        with_rows = [user for user in node.users if user in body and of_part[user] in found.rows]
        is_norm = node.target is F.batch_norm and _argument(node, 5, "training")
        across = few in found.blends if few in found.rows else bool(with_rows)
        if is_norm or across or few in found.scaled or _moves_rows(few, node):
            raise SplitError(
                f"%{node.name} ({name_of(node)}) is made of all of the batch's rows and read with each of them"
            )


#: What puts rows in the places of others, and where the dimensions stand among its arguments.
_MOVES = {"flip": 1, "flipud": 1, "roll": 2}


def _moves_rows(few: fx.Node, node: fx.Node) -> bool:
    """That an index does so is known from its values alone: a model is taken at its word."""
    value, every = value_of(few), value_of(node)
    if name_of(node) not in _MOVES or not isinstance(value, torch.Tensor):
        return False
    given = _argument(node, _MOVES[name_of(node)], "dims") or 0
    dims = given if isinstance(given, (list, tuple)) else [given]
    return any(value.shape[d] != every.shape[d] for d in dims)


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _argument(node: fx.Node, place: int, name: str) -> Any:
    """False where it is not given."""
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, False)


def _is_changed(node: fx.Node) -> bool:
    if node.target is compat.SETS_GRADIENTS:
        return node.args[0] is not True
    return node.target is compat.ENTERS_AUTOCAST


def _storages(node: Any) -> list[int]:
    values = value_of(node) if isinstance(node, fx.Node) else None
    leaves = values if isinstance(values, (list, tuple)) else [values]
    found = (compat.storage_of(value) for value in leaves if isinstance(value, torch.Tensor))
    return [storage for storage in found if storage is not None]


# -- where parts are joined ----------------------------------------------------------------------------------------------

#: What computes each row of its first argument by itself and leaves rows in their order, where the first dimension stays.
_BY_ROW = {
    "linear", "to", "float", "double", "half", "bfloat16", "type", "type_as", "contiguous", "detach", "clone", "softmax",
    "log_softmax", "sigmoid", "tanh", "silu", "gelu", "relu", "add", "sub", "mul", "truediv", "div", "neg", "layer_norm",
    "rms_norm", "dropout", "matmul", "pow", "sqrt", "rsqrt", "logsigmoid", "softplus",
}  # fmt: skip
_VIEWS = {"view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze"}


def _joins(node: fx.Node, of_part: Mapping[fx.Node, fx.Node], found: Compared, rows: int, count: int) -> bool:
    """Whether the parts' values one behind the other are the whole batch's."""
    few = of_part[node]
    if few not in found.varies:
        return True
    value = value_of(few)
    if not isinstance(value, torch.Tensor):
        return False
    dims = grown(value, value_of(node), count)
    return (
        dims is not None and len(dims) == 1 and (value.shape[dims[0]] == rows or _in_order(node, of_part, rows, count))
    )


def _in_order(node: fx.Node, of_part: Mapping[fx.Node, fx.Node], rows: int, count: int) -> bool:
    """Whether the first dimension has the batch's rows in their order, each perhaps as several, as tokens are."""
    while True:
        value = value_of(of_part.get(node))
        if not isinstance(value, torch.Tensor) or grown(value, value_of(node), count) != (0,):
            return False
        if value.shape[0] == rows:
            return True
        name, source = name_of(node), node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            return False
        before = value_of(of_part.get(source))
        if not isinstance(before, torch.Tensor) or before.dim() == 0:
            return False
        same = name in _BY_ROW and value.shape[0] == before.shape[0]
        flat = name in _VIEWS and value.shape[0] % before.shape[0] == 0 and prod(value.shape) == prod(before.shape)
        if not (same or flat):
            return False
        node = source


# -- building ------------------------------------------------------------------------------------------------------------


class _Builder:
    """Writes the new nodes behind the old ones, whose place they take. ``shared`` leads from an old node to its new one, where
    all parts have the same, and behind the join all do; ``own[i]`` to that of part ``i``."""

    def __init__(self, whole: fx.Graph, part: fx.GraphModule, count: int, found: Compared, turns: _Turns) -> None:
        self.graph, self.part, self.count, self.found, self.turns = whole, part, count, found, turns
        self.of_part = {other: node for node, other in found.twin.items()}
        self.inputs = whole.find_nodes(op="placeholder")
        self.shared: dict[fx.Node, fx.Node] = {node: node for node in self.inputs}
        self.own: list[dict[fx.Node, fx.Node]] = [{} for _ in range(count)]
        values = (value_of(node) for node in whole.nodes)
        # Not that of a trace at hand, which is another one.
        self.mode: Any = next((v.fake_mode for v in values if isinstance(v, torch.Tensor) and compat.is_fake(v)), None)
        self.modules: dict[str, str] = {}

    def build(self) -> None:
        divided = {node: self._dim_of_rows(node) for node in self.inputs if self._is_divided(node)}
        old = [node for node in self.graph.nodes if node.op not in ("placeholder", "output")]
        output = self.graph.output_node()
        with self.graph.inserting_before(output):
            for node, dim in divided.items():
                self._divide(node, dim)
            for turn in range(max(self.turns.turn.values()) + 1):
                mine = [node for node in self.turns.body if self.turns.turn[node] == turn]
                for i in range(self.count):
                    for node in mine:
                        self._compute(node, i)
            for node in self.turns.crossing:
                if node not in self.shared:
                    self._join(node)
            for node in old:
                if node not in self.turns.turn:
                    self.shared[node] = self.graph.node_copy(node, self.shared.__getitem__)
        output.args = fx.map_arg(output.args, self.shared.__getitem__)
        for node in reversed(old):
            self.graph.erase_node(node)

    def _is_divided(self, node: fx.Node) -> bool:
        return self.of_part[node] in self.found.varies and any(user in self.turns.turn for user in node.users)

    def _dim_of_rows(self, node: fx.Node) -> int:
        value, few = value_of(node), value_of(self.of_part[node])
        dims = grown(few, value, self.count) if isinstance(value, torch.Tensor) else None
        if dims is None or len(dims) != 1:
            raise SplitError(f"input {node.name} is another one for each part and has not its rows")
        return dims[0]

    def _divide(self, node: fx.Node, dim: int) -> None:
        value, rows = value_of(node), value_of(self.of_part[node]).shape[dim]
        for i in range(self.count):
            self.own[i][node] = self.graph.call_method("narrow", (node, dim, i * rows, rows))
            self.own[i][node].meta["example_value"] = value.narrow(dim, i * rows, rows)

    def _compute(self, node: fx.Node, i: int) -> None:
        few, own = self.of_part[node], self.own[i]
        is_context = node.target in CONTEXTS
        if node.op == "get_attr" and self._is_graph(few):
            own[node] = self._graph_of_part(few)
        elif few in self.found.varies or is_context:
            source = node if is_context else few
            own[node] = self.graph.node_copy(source, lambda n: self._read(n if is_context else self.found.twin[n], i))
            if "example_value" in own[node].meta:
                own[node].meta["example_value"] = tree_map(self._valued, own[node].meta["example_value"])
        elif node not in self.shared:
            self.shared[node] = self.graph.node_copy(node, lambda n: self._read(n, i))

    def _read(self, node: fx.Node, i: int) -> fx.Node:
        return self.own[i].get(node) or self.shared[node]

    def _valued(self, value: Any) -> Any:
        """The same value in the fake mode of the whole graph: passes compute with values of several nodes."""
        if not isinstance(value, torch.Tensor) or self.mode is None:
            return value
        with self.mode:
            return torch.empty_strided(
                value.shape, value.stride(), dtype=value.dtype, device=value.device, requires_grad=value.requires_grad
            )

    def _is_graph(self, node: fx.Node) -> bool:
        return isinstance(operator.attrgetter(str(node.target))(self.part), fx.GraphModule)

    def _graph_of_part(self, node: fx.Node) -> fx.Node:
        """A region, as of ``torch.utils.checkpoint``, with the sizes of a part."""
        name, owner = str(node.target), self.graph.owning_module
        assert owner is not None
        if name not in self.modules:
            self.modules[name] = f"{name}_of_part".replace(".", "_")
            owner.add_module(self.modules[name], operator.attrgetter(name)(self.part))
        return self.graph.get_attr(self.modules[name])

    def _join(self, node: fx.Node) -> None:
        (dim,) = grown(value_of(self.of_part[node]), value_of(node), self.count) or ()
        self.shared[node] = self.graph.call_function(torch.cat, ([own[node] for own in self.own], dim))
        self.shared[node].meta["example_value"] = value_of(node)
