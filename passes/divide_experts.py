"""Expert parallelism: each rank computes its own experts for all ranks' tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx

from dspass.passes.around_experts import Batched, Dropless, Limit, Limited, items, rows_of
from dspass.passes.base import Pass, PassContext, Where
from dspass.passes.batched_experts import Batch, find_batches, is_of_parameters, weight_of
from dspass.passes.expert_chunks import fastest
from dspass.passes.experts import Layer, chain_of, find_experts, value_of
from dspass.runtime import capacity, exchange, experts, grouped  # noqa: F401  (their operators)
from dspass.runtime.params import ParamSpec, lookup
from dspass.runtime.traffic import even_parts

_ops = torch.ops.dspass


@dataclass(frozen=True, kw_only=True)
class DivideExperts(Pass):
    """Rows on their way into a layer of experts are sent to the ranks that hold them, and what comes out is sent back.

    Around the inside of each layer (:mod:`dspass.passes.experts`, :mod:`dspass.passes.batched_experts`) whose weights are
    divided over an expert axis stands what :mod:`dspass.passes.around_experts` has for it, and inside the weights are those of
    this rank, ``unshard_experts``. It works on the graph as Dynamo captured it, before it is differentiated: the backward's two
    exchanges are the derivatives of these. A weight that is read in any other way is gathered from all ranks first.

    A layer may be computed in ``chunks``, some of each rank's experts each, so that rows of one are on their way while those
    of another are computed (as Tutel's and FasterMoE's pipelines do it with parts of the tokens); without a number as many as
    :mod:`dspass.passes.expert_chunks` finds fastest. By experts, each matrix is read once, and its gradient is written by one
    product; parts of the batch, which need each weight twice, are :mod:`dspass.passes.split_batch`'s, and a layer that is
    computed for several has one chunk without a number.

    With a ``capacity_factor`` each expert takes that many times its even share of a rank's rows, and ``min_capacity`` at least;
    what is beyond becomes zeros, where experts are not divided too.

    Dropped: to rewrite forward and backward in the joint graph. Each way to differentiate a grouped product would have to be
    recognised too, and sizes of rows are written into the joint graph, where they are no longer true.
    """

    name: ClassVar[str] = "divide_experts"
    where: ClassVar[frozenset[Where]] = frozenset({"captured"})

    enabled: bool = True
    capacity_factor: float | None = None
    min_capacity: int = 4
    chunks: int | None = None

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        limit = self._limit
        if not self.enabled and limit is None:
            ctx.say("expert_parallel is not enabled")
            return graph
        layers, said = find_experts(graph, is_parameter)
        batches, more = find_batches(graph, is_divided, is_parameter)
        told: dict[str, list[str]] = {}
        calls = Counter(_weight(layer) for layer in layers)
        for layer in layers:
            if share_axis(layer):
                parts = calls[_weight(layer)]
                chunks = self._chunks(graph, layer, parts, ctx)
                told.setdefault(_told(layer, chunks), []).append(_name(layer))
                _divide(graph, layer, limit, chunks, parts)
            else:
                told.setdefault(f"of {layer.experts} experts, whole on each rank", []).append(_name(layer))
                if limit is not None:
                    _limit_rows(graph, layer, limit)
        for batch in batches:
            if share_axis(batch):
                told.setdefault(_told(batch), []).append(_name(batch))
                _divide_batch(graph, batch)
                if self.chunks is not None and self.chunks > 1:
                    ctx.note(f"{_name(batch)} is in one chunk: its rows are batched by the model itself.")
        for kind, each in told.items():
            names = list(dict.fromkeys(each))
            ctx.say(f"{len(names)} layer{'s' * (len(names) > 1)} {kind}: {', '.join(names)}")
        if layers and limit is not None:
            ctx.say("rows beyond a capacity are dropped")
        for text in [*said, *more]:
            ctx.say(text)
            ctx.note(f"{text}.")
        for marker in _markers(graph):
            if spec_of(marker).expert_axis is not None:
                _gather_all(graph, marker)
        if not ctx.said:
            ctx.say("no experts are divided over ranks")
        return graph

    def _chunks(self, graph: fx.Graph, layer: Layer, parts: int, ctx: PassContext) -> int:
        """How many chunks a layer is computed in: no more than there are experts on a rank."""
        spec = spec_of(_weight(layer))
        if _is_read_between(layer):
            return 1
        if self.chunks is not None:
            return min(self.chunks, spec.shape[0])
        return 1 if parts > 1 else fastest(graph, layer, spec, ctx)

    @property
    def _limit(self) -> Limit | None:
        return None if self.capacity_factor is None else Limit(factor=self.capacity_factor, least=self.min_capacity)

    def limit(self, graph: fx.Graph) -> None:
        """Drop rows beyond the capacity in a graph that runs before anything is divided."""
        if self._limit is not None:
            for layer in find_experts(graph, is_parameter)[0]:
                _limit_rows(graph, layer, self._limit)


def _weight(layer: Layer | Batch) -> fx.Node:
    return layer.weights[layer.products[0]]


def _name(layer: Layer | Batch) -> str:
    """Of the layer's module."""
    source = _weight(layer)
    return source.name if source.op == "placeholder" else spec_of(source).layer


def _told(layer: Layer | Batch, chunks: int = 1) -> str:
    spec = spec_of(_weight(layer))
    text = f"of {layer.experts} experts, {spec.shape[0]} on each of {spec.divided_over.size} ranks"
    return text if chunks == 1 else f"{text} in {chunks} chunks"


def _is_read_between(layer: Layer) -> bool:
    """Whether something outside reads what is made inside before all of it is."""
    held, last = set(layer.inside), layer.inside[-1]
    return any(user not in held and user < last for node in layer.inside for user in node.users)


_UNSHARD = (_ops.unshard, _ops.unshard.default)


def _markers(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op == "call_function" and n.target in _UNSHARD]


def spec_of(marker: fx.Node) -> ParamSpec:
    key: Any = marker.args[1]
    return lookup(key)


def is_parameter(node: fx.Node) -> bool:
    """Whether a node of a captured graph is a whole parameter, a sharded one's marker or a plain one's placeholder."""
    if node.op == "placeholder":
        return isinstance(value_of(node), torch.nn.Parameter)
    return node.op == "call_function" and node.target in _UNSHARD


def is_divided(node: fx.Node) -> bool:
    is_marker = node.op == "call_function" and node.target in _UNSHARD
    return is_marker and spec_of(node).expert_axis is not None


def share_axis(layer: Layer | Batch) -> bool:
    """Whether all weights of a layer are divided, over one axis."""
    sources = list(layer.weights.values())
    return all(is_divided(n) for n in sources) and len({id(spec_of(n).expert_axis) for n in sources}) == 1


# -- rows in the order of experts ----------------------------------------------------------------------------------------


def _divide(graph: fx.Graph, layer: Layer, limit: Limit | None, chunks: int, batch_parts: int) -> None:
    spec = spec_of(_weight(layer))
    entering, leaving = layer.entering(), layer.leaving()
    first = layer.products[0].args[0]
    assert isinstance(first, fx.Node)
    sizes = even_parts(spec.shape[0], chunks)
    given: dict[str, Any] = {
        "graph": graph, "spec": spec, "first": first, "ends": layer.ends, "scores": layer.scores, "sizes": sizes
    }  # fmt: skip
    way = Dropless(**given, parts=batch_parts) if limit is None else Limited(**given, limit=limit)
    parts = _copies(graph, layer, chunks) if chunks > 1 else [{node: node for node in layer.inside}]
    begin = parts[0][layer.inside[0]]
    with graph.inserting_before(begin):
        ends = way.open()

    inner: list[dict[fx.Node, fx.Node]] = [{} for _ in parts]
    for node in [first, *(n for n in entering if n is not first)]:
        # All chunks' rows leave before one of them is computed, and each is waited for where it is.
        readers = [part[layer.inside[0]] for part in parts] if chunks > 1 else [_reader(layer, node)]
        with graph.inserting_before(readers[0]):
            entered = (
                _rows_of_experts(way, node, ends, readers) if layer.names_expert(node) else way.enter(node, readers)
            )
        for known, its in zip(inner, entered, strict=True):
            known[node] = its

    weights = _weights_here(graph, layer, sizes)
    between = [node for product in layer.products for node in chain_of(product.args[1])[1]]
    for i, part in enumerate(parts):
        for product in layer.products:
            copy = part[product]
            rows: Any = copy.args[0]
            copy.target, copy.args, copy.kwargs = _ops.grouped_product, (rows, weights[product][i], ends[i]), {}
        _read(part.values(), inner[i])

    def leave(node: fx.Node) -> fx.Node:
        back = []
        for i, part in enumerate(parts):
            with graph.inserting_before(part[node].next):
                back.append(way.leave(part[node], i))
        with graph.inserting_before(back[-1].next):
            return way.join(back)

    _leave(layer, leaving, leave)
    if chunks > 1:
        _erase_unread(graph, layer.inside)
    _erase_unread(graph, between)


def _copies(graph: fx.Graph, layer: Layer, chunks: int) -> list[dict[fx.Node, fx.Node]]:
    """The inside once more for each chunk, one behind the other: what each of its nodes has become."""
    made: list[dict[fx.Node, fx.Node]] = []
    with graph.inserting_before(layer.inside[-1].next):
        for _ in range(chunks):
            known: dict[fx.Node, fx.Node] = {}
            for node in layer.inside:
                known[node] = graph.node_copy(node, lambda n, known=known: known.get(n, n))
            made.append(known)
    return made


def _rows_of_experts(
    way: Dropless | Limited, node: fx.Node, ends: Sequence[fx.Node], readers: Sequence[fx.Node]
) -> list[fx.Node]:
    """Of each chunk what ``node`` has for each row's expert, made anew of the rows here, before its reader."""
    made, before = [], way.spec.divided_over.rank * way.spec.shape[0]
    for i, size in enumerate(way.sizes):
        with way.graph.inserting_before(readers[i]):
            ids = way.graph.call_function(_ops.experts_of_rows, (ends[i], way.count(i), before))
            made.append(way.graph.node_copy(node, lambda n, ids=ids: ids if n is node.args[1] else n))
            made[-1].meta.clear()
        before += size
    return made


def _limit_rows(graph: fx.Graph, layer: Layer, limit: Limit) -> None:
    """Rows beyond the capacity become zeros where they leave a layer whose experts are all here."""

    def kept(node: fx.Node) -> fx.Node:
        with graph.inserting_before(node.next):
            padded = graph.call_function(_ops.pad_experts, (node, layer.ends, limit.node(graph, node, layer.experts)))
            return graph.call_function(_ops.unpad_experts, (padded, layer.ends, rows_of(graph, node)))

    _leave(layer, layer.leaving(), kept)


# -- batched -------------------------------------------------------------------------------------------------------------


def _divide_batch(graph: fx.Graph, batch: Batch) -> None:
    spec = spec_of(_weight(batch))
    entering, constants, leaving = batch.entering(), batch.constants(), batch.leaving()
    way = Batched(graph=graph, spec=spec)
    inner: dict[fx.Node, fx.Node] = {}
    for node in [*entering, *constants]:
        with graph.inserting_before(_reader(batch, node)):
            if node in entering:
                inner[node] = way.enter(node)
            elif is_divided(node) and spec_of(node).expert_axis is spec.expert_axis:
                inner[node] = graph.call_function(_ops.unshard_experts, node.args)
            elif is_of_parameters(node, is_parameter):
                inner[node] = graph.call_method(
                    "narrow", (node, 0, spec.divided_over.rank * spec.shape[0], spec.shape[0])
                )
            else:  # each rank's own, which goes with its rows
                whole = graph.call_function(_for_each_row, (node, entering[0]))
                inner[node] = way.enter(whole)
    for product, (weight,) in _weights_here(graph, batch, [spec.shape[0]]).items():
        old = weight_of(product)
        between = chain_of(old)[1]
        product.replace_input_with(old, weight)
        _erase_unread(graph, between)
    _read(batch.inside, inner)

    def leave(node: fx.Node) -> fx.Node:
        with graph.inserting_before(node.next):
            return way.leave(node)

    _leave(batch, leaving, leave)


def _for_each_row(value: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return value.expand(-1, rows.shape[1], *value.shape[2:])


# -- both ----------------------------------------------------------------------------------------------------------------


def _reader(layer: Layer | Batch, node: fx.Node) -> fx.Node:
    return next(n for n in layer.inside if node in n.all_input_nodes)


def _weights_here(graph: fx.Graph, layer: Layer | Batch, sizes: Sequence[int]) -> dict[fx.Node, list[fx.Node]]:
    """For each product the matrices of each chunk's experts here, laid out as it had all of them."""
    found: dict[fx.Node, list[fx.Node]] = {}
    here: dict[fx.Node, list[fx.Node]] = {}
    for product in layer.products:
        source, between = chain_of(product.args[1] if isinstance(layer, Layer) else weight_of(product))
        assert source is not None
        if source not in here:
            with graph.inserting_before(source.next):
                whole = graph.call_function(_ops.unshard_experts, source.args)
                here[source] = [whole]
                if len(sizes) > 1:  # not sliced, whose gradient would be as large as the whole for each chunk
                    here[source] = items(graph, torch.split, whole, list(sizes))
        found[product] = []
        with graph.inserting_before(product):
            for value in here[source]:
                copies: dict[fx.Node, fx.Node] = {source: value}
                made = value
                for node in between:
                    made = copies[node] = graph.node_copy(node, lambda n, known=copies: known.get(n, n))
                    made.meta.clear()
                found[product].append(made)
    return found


def _erase_unread(graph: fx.Graph, nodes: Sequence[fx.Node]) -> None:
    for node in reversed(nodes):
        if not node.users:
            graph.erase_node(node)


def _read(inside: Iterable[fx.Node], entered: Mapping[fx.Node, fx.Node]) -> None:
    """The inside reads what has entered."""
    for node in inside:
        node.args = fx.map_arg(node.args, lambda n: entered.get(n, n))
        node.kwargs = fx.map_arg(node.kwargs, lambda n: entered.get(n, n))
        node.meta.pop("example_value", None)


def _leave(layer: Layer | Batch, leaving: Sequence[fx.Node], leave: Callable[[fx.Node], fx.Node]) -> None:
    """Who stands outside reads what has left."""
    held = set(layer.inside)
    for node in leaving:
        outside = [user for user in node.users if user not in held]
        result = leave(node)
        for user in outside:
            user.replace_input_with(node, result)


def _gather_all(graph: fx.Graph, marker: fx.Node) -> None:
    """A weight that is read otherwise: all experts on each rank."""
    if not marker.users:
        graph.erase_node(marker)
        return
    with graph.inserting_before(marker):
        here = graph.call_function(_ops.unshard_experts, marker.args)
        whole = graph.call_function(_ops.gather_experts, (here, marker.args[1]))
    whole.meta = dict(marker.meta)
    marker.replace_all_uses_with(whole)
    graph.erase_node(marker)
