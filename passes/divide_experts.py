"""Expert parallelism: each rank computes its own experts for all ranks' tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx

from dspass.passes.around_experts import Batched, Dropless, Limit, Limited, rows_of
from dspass.passes.base import Pass, PassContext, Where
from dspass.passes.batched_experts import Batch, find_batches, is_of_parameters, weight_of
from dspass.passes.experts import Layer, chain_of, find_experts, value_of
from dspass.runtime import capacity, exchange, experts, grouped  # noqa: F401  (their operators)
from dspass.runtime.params import ParamSpec, lookup

_ops = torch.ops.dspass


@dataclass(frozen=True, kw_only=True)
class DivideExperts(Pass):
    """Rows on their way into a layer of experts are sent to the ranks that hold them, and what comes out is sent back.

    Around the inside of each layer (:mod:`dspass.passes.experts`, :mod:`dspass.passes.batched_experts`) whose weights are
    divided over an expert axis stands what :mod:`dspass.passes.around_experts` has for it, and inside the weights are those of
    this rank, ``unshard_experts``. It works on the graph as Dynamo captured it, before it is differentiated: the backward's two
    exchanges are the derivatives of these. A weight that is read in any other way is gathered from all ranks first.

    With a ``capacity_factor`` each expert takes that many times its even share of a rank's rows, and ``min_capacity`` at least;
    what is beyond becomes zeros, where experts are not divided too.

    Dropped: to rewrite forward and backward in the joint graph. Each way to differentiate a grouped product would have to be
    recognised too, and sizes of rows are written into the joint graph, where they are no longer true.
    """

    name: ClassVar[str] = "divide_experts"
    where: ClassVar[frozenset[Where]] = frozenset({"captured"})

    capacity_factor: float | None = None
    min_capacity: int = 4

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        limit = self._limit
        layers, said = find_experts(graph, _is_divided if limit is None else is_parameter)
        batches, more = find_batches(graph, _is_divided, is_parameter)
        for layer in layers:
            if _share_axis(layer):
                _divide(graph, layer, limit)
                _say(ctx, layer)
            elif limit is not None:
                _limit_rows(graph, layer, limit)
                ctx.say(
                    f"{layer.products[0].name} and {len(layer.products) - 1} more: rows beyond a capacity are dropped"
                )
        for batch in batches:
            if _share_axis(batch):
                _divide_batch(graph, batch)
                _say(ctx, batch)
        for text in [*said, *more]:
            ctx.say(text)
        for marker in _markers(graph):
            if spec_of(marker).expert_axis is not None:
                _gather_all(graph, marker)
        if not ctx.said:
            ctx.say("no experts are divided over ranks")
        return graph

    @property
    def _limit(self) -> Limit | None:
        return None if self.capacity_factor is None else Limit(factor=self.capacity_factor, least=self.min_capacity)

    def limit(self, graph: fx.Graph) -> None:
        """Drop rows beyond the capacity in a graph that runs before anything is divided."""
        if self._limit is not None:
            for layer in find_experts(graph, is_parameter)[0]:
                _limit_rows(graph, layer, self._limit)


def _say(ctx: PassContext, layer: Layer | Batch) -> None:
    spec = spec_of(layer.weights[layer.products[0]])
    ctx.say(
        f"{spec.name} and {len(layer.products) - 1} more: {spec.shape[0]} of {layer.experts} experts on each of "
        f"{spec.divided_over.size} ranks"
    )


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


def _is_divided(node: fx.Node) -> bool:
    is_marker = node.op == "call_function" and node.target in _UNSHARD
    return is_marker and spec_of(node).expert_axis is not None


def _share_axis(layer: Layer | Batch) -> bool:
    """Whether all weights of a layer are divided, over one axis."""
    sources = list(layer.weights.values())
    return all(_is_divided(n) for n in sources) and len({id(spec_of(n).expert_axis) for n in sources}) == 1


# -- rows in the order of experts ----------------------------------------------------------------------------------------


def _divide(graph: fx.Graph, layer: Layer, limit: Limit | None) -> None:
    spec = spec_of(layer.weights[layer.products[0]])
    entering, leaving = layer.entering(), layer.leaving()
    first = layer.products[0].args[0]
    assert isinstance(first, fx.Node)
    given: dict[str, Any] = {
        "graph": graph, "spec": spec, "first": first, "ends": layer.ends, "scores": layer.scores
    }  # fmt: skip
    way = Dropless(**given) if limit is None else Limited(**given, limit=limit)
    with graph.inserting_before(layer.inside[0]):
        ends = way.open()

    inner: dict[fx.Node, fx.Node] = {}
    for node in [first, *(n for n in entering if n is not first)]:
        with graph.inserting_before(_reader(layer, node)):
            if layer.names_expert(node):
                ids = graph.call_function(
                    _ops.experts_of_rows, (ends, way.count(), spec.divided_over.rank * spec.shape[0])
                )
                inner[node] = graph.node_copy(node, lambda n, node=node, ids=ids: ids if n is node.args[1] else n)
                inner[node].meta.clear()
            else:
                inner[node] = way.enter(node)

    for product, weight in _weights_here(graph, layer).items():
        rows: Any = product.args[0]
        between = chain_of(product.args[1])[1]
        product.target, product.args, product.kwargs = _ops.grouped_product, (rows, weight, ends), {}
        _erase_unread(graph, between)
    _redirect(layer, inner, leaving, way.leave)


def _limit_rows(graph: fx.Graph, layer: Layer, limit: Limit) -> None:
    """Rows beyond the capacity become zeros where they leave a layer whose experts are all here."""

    def kept(node: fx.Node) -> fx.Node:
        padded = graph.call_function(_ops.pad_experts, (node, layer.ends, limit.node(graph, node, layer.experts)))
        return graph.call_function(_ops.unpad_experts, (padded, layer.ends, rows_of(graph, node)))

    _leave(layer, layer.leaving(), kept)


# -- batched -------------------------------------------------------------------------------------------------------------


def _divide_batch(graph: fx.Graph, batch: Batch) -> None:
    spec = spec_of(batch.weights[batch.products[0]])
    entering, constants, leaving = batch.entering(), batch.constants(), batch.leaving()
    way = Batched(graph=graph, spec=spec)
    inner: dict[fx.Node, fx.Node] = {}
    for node in [*entering, *constants]:
        with graph.inserting_before(_reader(batch, node)):
            if node in entering:
                inner[node] = way.enter(node)
            elif _is_divided(node) and spec_of(node).expert_axis is spec.expert_axis:
                inner[node] = graph.call_function(_ops.unshard_experts, node.args)
            elif is_of_parameters(node, is_parameter):
                inner[node] = graph.call_method(
                    "narrow", (node, 0, spec.divided_over.rank * spec.shape[0], spec.shape[0])
                )
            else:  # each rank's own, which goes with its rows
                whole = graph.call_function(_for_each_row, (node, entering[0]))
                inner[node] = way.enter(whole)
    for product, weight in _weights_here(graph, batch).items():
        old = weight_of(product)
        between = chain_of(old)[1]
        product.replace_input_with(old, weight)
        _erase_unread(graph, between)
    _redirect(batch, inner, leaving, way.leave)


def _for_each_row(value: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return value.expand(-1, rows.shape[1], *value.shape[2:])


# -- both ----------------------------------------------------------------------------------------------------------------


def _reader(layer: Layer | Batch, node: fx.Node) -> fx.Node:
    return next(n for n in layer.inside if node in n.all_input_nodes)


def _weights_here(graph: fx.Graph, layer: Layer | Batch) -> dict[fx.Node, fx.Node]:
    """For each product its matrices of the experts here, laid out as it had all of them."""
    found: dict[fx.Node, fx.Node] = {}
    here: dict[fx.Node, fx.Node] = {}
    for product in layer.products:
        source, between = chain_of(product.args[1] if isinstance(layer, Layer) else weight_of(product))
        assert source is not None
        if source not in here:
            with graph.inserting_after(source):
                here[source] = graph.call_function(_ops.unshard_experts, source.args)
        with graph.inserting_before(product):
            value = here[source]
            copies: dict[fx.Node, fx.Node] = {source: value}
            for node in between:
                value = copies[node] = graph.node_copy(node, lambda n, known=copies: known.get(n, n))
                value.meta.clear()
        found[product] = value
    return found


def _erase_unread(graph: fx.Graph, nodes: Sequence[fx.Node]) -> None:
    for node in reversed(nodes):
        if not node.users:
            graph.erase_node(node)


def _redirect(
    layer: Layer | Batch,
    inner: Mapping[fx.Node, fx.Node],
    leaving: Sequence[fx.Node],
    leave: Callable[[fx.Node], fx.Node],
) -> None:
    """The inside reads what has entered, and who stands outside what has left."""
    for node in layer.inside:
        node.args = fx.map_arg(node.args, lambda n: inner.get(n, n))
        node.kwargs = fx.map_arg(node.kwargs, lambda n: inner.get(n, n))
        node.meta.pop("example_value", None)
    _leave(layer, leaving, leave)


def _leave(layer: Layer | Batch, leaving: Sequence[fx.Node], leave: Callable[[fx.Node], fx.Node]) -> None:
    held = set(layer.inside)
    for node in leaving:
        outside = [user for user in node.users if user not in held]
        with node.graph.inserting_before(node.next):
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
