"""Expert parallelism: each rank computes its own experts for all ranks' tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx

from dspass.passes.base import Pass, PassContext, Where
from dspass.passes.experts import Layer, chain_of, find_experts, value_of
from dspass.runtime import exchange, experts, grouped  # noqa: F401  (their operators)
from dspass.runtime.params import ParamSpec, lookup

_ops = torch.ops.dspass


@dataclass(frozen=True, kw_only=True)
class DivideExperts(Pass):
    """Rows on their way into a layer of experts are sent to the ranks that hold them, and what comes out is sent back.

    Around the inside of each layer (:mod:`dspass.passes.experts`) whose weights are divided over an expert axis::

        counts of arriving rows -> dispatch -> order of experts -> [inside] -> order of arrival -> combine

    and inside, the weights are those of this rank, ``unshard_experts``. It works on the graph as Dynamo captured it, before it
    is differentiated: the backward's two exchanges are the derivatives of these. A weight that is read in any other way is
    gathered from all ranks first.

    Dropped: to rewrite forward and backward in the joint graph. Each way to differentiate a grouped product would have to be
    recognised too, and sizes of rows are written into the joint graph, where they are no longer true.
    """

    name: ClassVar[str] = "divide_experts"
    where: ClassVar[frozenset[Where]] = frozenset({"captured"})

    enabled: bool = True

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        if not self.enabled:
            ctx.say("expert_parallel is not enabled")
            return graph
        layers, said = find_experts(graph, _is_parameter)
        told: dict[str, list[str]] = {}
        for layer in layers:
            specs = [spec_of(layer.weights[p]) for p in layer.products]
            kind = f"of {layer.experts} experts, "
            if any(spec.expert_axis is not specs[0].expert_axis for spec in specs) or specs[0].expert_axis is None:
                kind += "whole on each rank"
            else:
                kind += f"{specs[0].shape[0]} on each of {specs[0].divided_over.size} ranks"
                _divide(graph, layer)
            told.setdefault(kind, []).append(specs[0].layer)
        for kind, names in told.items():
            ctx.say(f"{len(names)} layer{'s' * (len(names) > 1)} {kind}: {', '.join(names)}")
        for text in said:
            ctx.say(text)
            ctx.note(f"{text}.")
        for marker in _markers(graph):
            if spec_of(marker).expert_axis is not None:
                _gather_all(graph, marker)
        if not ctx.said:
            ctx.say("no experts are divided over ranks")
        return graph


def _markers(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op == "call_function" and n.target in (_ops.unshard, _ops.unshard.default)]


def spec_of(marker: fx.Node) -> ParamSpec:
    key: Any = marker.args[1]
    return lookup(key)


def _is_parameter(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in (_ops.unshard, _ops.unshard.default)


def _divide(graph: fx.Graph, layer: Layer) -> None:
    spec = spec_of(layer.weights[layer.products[0]])
    key, axis, held = spec.key, spec.divided_over, set(layer.inside)
    entering, leaving = layer.entering(), layer.leaving()

    first = layer.products[0].args[0]
    assert isinstance(first, fx.Node)
    with graph.inserting_before(layer.inside[0]):
        scores, size = layer.scores, _rows_of(graph, first)
        arriving = graph.call_function(_ops.exchange_counts, (layer.ends, scores, key))
        here = graph.call_method("sum", (arriving, 0))
        ends = graph.call_function(torch.cumsum, (here,), {"dim": 0, "dtype": torch.int32})
    order: dict[str, fx.Node] = {}

    def enter(node: fx.Node) -> fx.Node:
        sent = graph.call_function(_ops.dispatch_rows, (node, layer.ends, arriving, None, key))
        if not order:
            order["count"] = graph.call_method("size", (sent, 0))
            order["positions"] = graph.call_function(_ops.arrival_positions, (arriving, order["count"]))
        return graph.call_function(_ops.spread_experts, (sent, order["positions"]))

    inner: dict[fx.Node, fx.Node] = {}
    for node in [first, *(n for n in entering if n is not first)]:
        reader = next(n for n in layer.inside if node in n.all_input_nodes)
        with graph.inserting_before(reader):
            if layer.names_expert(node):
                experts = graph.call_function(_ops.experts_of_rows, (ends, order["count"], axis.rank * spec.shape[0]))
                inner[node] = graph.node_copy(
                    node, lambda n, node=node, experts=experts: experts if n is node.args[1] else n
                )
                inner[node].meta.clear()
            else:
                inner[node] = enter(node)

    weights: dict[fx.Node, fx.Node] = {}
    for product in layer.products:
        source, between = chain_of(product.args[1])
        assert source is not None
        if source not in weights:
            with graph.inserting_after(source):
                weights[source] = graph.call_function(_ops.unshard_experts, source.args)
        with graph.inserting_before(product):
            value = weights[source]
            copies: dict[fx.Node, fx.Node] = {source: value}
            for node in between:
                value = copies[node] = graph.node_copy(node, lambda n, known=copies: known.get(n, n))
                value.meta.clear()
        rows: Any = product.args[0]
        product.target, product.args, product.kwargs = _ops.grouped_product, (inner.get(rows, rows), value, ends), {}
        for node in reversed(between):
            if not node.users:
                graph.erase_node(node)

    for node in layer.inside:
        node.args = fx.map_arg(node.args, lambda n: inner.get(n, n))
        node.kwargs = fx.map_arg(node.kwargs, lambda n: inner.get(n, n))
        node.meta.pop("example_value", None)

    for node in leaving:
        with graph.inserting_after(node):
            back = graph.call_function(_ops.unpermute_experts, (node, order["positions"]))
        with graph.inserting_after(back):
            result = graph.call_function(_ops.combine_rows, (back, layer.ends, arriving, size, key))
        node.replace_all_uses_with(result, delete_user_cb=lambda user, back=back: user is not back and user not in held)


def _rows_of(graph: fx.Graph, node: fx.Node) -> Any:
    """The number of rows, an integer where it is known."""
    size = value_of(node).shape[0]
    return size if isinstance(size, int) else graph.call_method("size", (node, 0))


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
