"""A second shard inside of each node, from which backwards gather: ZeRO++'s hpZ (Wang et al., ZeRO++, 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.fx as fx

from dspass.passes.base import Pass, PassContext
from dspass.passes.nodes import gather_start, items_of, keep_in_node, open_starts, specs_of, wait_of
from dspass.runtime.params import lookup


@dataclass(frozen=True, kw_only=True)
class GatherInNode(Pass):
    """Behind each gather of the forward this rank keeps its rows of the whole parameters, as divided over its node; the
    backward's gathers join those, and nothing leaves the node.

    It costs each rank the model in compute precision, divided by the ranks of a node, from the forward to the optimiser's step,
    which makes what was kept stale. What is kept is what was gathered: forward and backward compute with the same values, also
    where the forward gathers in few bits. A bucket with a parameter that the forward did not gather comes from all ranks.
    ``zero_hpz_partition_size`` says how many ranks a node has (``ParamSpec.node_axis``).

    Dropped: the kept rows as saved values of the forward graph. The partitioner would have to be told that they are no
    activations, and calls of one step could not share them.
    """

    name: ClassVar[str] = "gather_in_node"
    requires: ClassVar[frozenset[str]] = frozenset({"gathers"})

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        starts = [start for start in open_starts(graph, gather_start) if specs_of(start)[0].node_axis is not None]
        if not starts:
            ctx.say("no second shard in the node")
        elif ctx.where == "backward":
            for start in starts:
                start.args = (*start.args[:2], None, "node")
            ctx.say(f"{len(starts)} gathers stay in the node")
        elif not ctx.trains:
            ctx.say("no backward follows")
        else:
            kept = sum(_keep(graph, start) for start in starts)
            ctx.say(f"rows of {kept} parameters are kept for the backward's gathers")
        return graph


def _keep(graph: fx.Graph, start: fx.Node) -> int:
    """Keep rows of what ``start`` brings, right behind its arrival; answers of how many parameters."""
    items = items_of(wait_of(start))
    arrived = {key: item for key, item in zip(start.args[1], items, strict=True) if item is not None}
    shards = [shard for shard, item in zip(start.args[0], items, strict=True) if item is not None]
    last = max(arrived.values(), default=None)
    if last is None or last.next.target is keep_in_node:
        return 0
    with graph.inserting_before(last.next):
        kept = graph.call_function(keep_in_node, ([*arrived.values(), *shards], list(arrived)))
    specs = [lookup(key) for key in arrived]
    kept.meta["val"] = [
        item.meta["val"].narrow(0, *spec.node_axis.rows(spec.shape[0]))
        for item, spec in zip(arrived.values(), specs, strict=True)
        if spec.node_axis is not None
    ]
    return len(arrived)
