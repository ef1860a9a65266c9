"""Make each whole parameter an input of the graph, used by name, so that what follows sees an unsharded model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.fx as fx

from dspass.passes.base import Pass, PassContext, Where
from dspass.passes.nodes import GATHERED, REDUCE_GRAD, UNSHARD, UNSHARD_EXPERTS, calls

_ALIASES = {
    torch.ops.aten.alias.default,
    torch.ops.aten.view.default,
    torch.ops.aten.detach.default,
    torch.ops.aten.view_as.default,
    torch.ops.aten._unsafe_view.default,
    torch.ops.aten.reshape.default,
}


@dataclass(frozen=True, kw_only=True)
class ExposeParameters(Pass):
    """``unshard(%shard, key)`` becomes a placeholder of the full shape, one a parameter however often it is used.

    The partitioner then decides what to save exactly as for a model that was never sharded: a parameter costs nothing to
    save, and is no collective that it would refuse to recompute. :class:`ZeroGather` puts the gathers in afterwards, in
    both halves. Gradients of a parameter with several uses (tied weights) are summed before they are reduced, which is
    the same by linearity and sends them once.

    Dropped: tagging each gather as must-recompute. The partitioner refuses to recompute collectives, treats views of
    them as saved values, and the tags differ between torch releases.
    """

    name: ClassVar[str] = "expose_parameters"
    provides: ClassVar[frozenset[str]] = frozenset({"exposed parameters"})
    where: ClassVar[frozenset[Where]] = frozenset({"joint", "forward"})

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        markers = sorted([*calls(graph, UNSHARD), *calls(graph, UNSHARD_EXPERTS)])
        if not markers:
            ctx.say("no sharded parameter is read here")
            return graph
        last_input = [n for n in graph.nodes if n.op == "placeholder"][-1]
        exposed: dict[str, fx.Node] = {}
        for marker in markers:
            local, key = marker.args
            assert isinstance(local, fx.Node)
            if key not in exposed:
                with graph.inserting_after(last_input):
                    whole = graph.placeholder(f"gathered_{len(exposed)}")
                whole.meta["val"] = marker.meta["val"]
                whole.meta[GATHERED] = (key, _input_of(local).name)
                exposed[key] = last_input = whole
            marker.replace_all_uses_with(exposed[key])
            graph.erase_node(marker)
        merged = _merge_reductions(graph)
        ctx.say(
            f"{len(markers)} uses of {len(exposed)} parameters"
            + (f", {merged} sums before reductions" if merged else "")
        )
        graph.eliminate_dead_code()
        return graph


def _input_of(node: fx.Node) -> fx.Node:
    """The placeholder that ``node`` is a plain alias of."""
    while node.op != "placeholder":
        assert node.target in _ALIASES, f"a shard reaches unshard through {node.format_node()}"
        node = node.args[0]
    return node


def _merge_reductions(graph: fx.Graph) -> int:
    """Rewrite ``add(reduce(a), reduce(b))`` of one parameter to ``reduce(add(a, b))`` until none is left."""
    merged = 0
    for node in list(graph.nodes):
        if node.target is not torch.ops.aten.add.Tensor or node.kwargs:
            continue
        left, right = node.args
        if not (
            isinstance(left, fx.Node)
            and isinstance(right, fx.Node)
            and left.target is REDUCE_GRAD
            and right.target is REDUCE_GRAD
            and left.args[1] == right.args[1]
            and len(left.users) == len(right.users) == 1
        ):
            continue
        with graph.inserting_before(node):
            total = graph.call_function(torch.ops.aten.add.Tensor, (left.args[0], right.args[0]))
            total.meta["val"] = left.args[0].meta["val"]
            reduced = graph.call_function(REDUCE_GRAD, (total, left.args[1]))
            reduced.meta["val"] = node.meta["val"]
            for new in (total, reduced):
                new.meta.update({k: v for k, v in node.meta.items() if k not in new.meta})
        node.replace_all_uses_with(reduced)
        for old in (node, left, right):
            graph.erase_node(old)
        merged += 1
    return merged
