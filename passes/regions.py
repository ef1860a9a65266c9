"""Parameters that a region of a captured graph reads, such as one under ``torch.utils.checkpoint``, are read in front of it.

Dynamo keeps a region as a graph of its own, which a node of the graph around it calls, and in which the markers of its
parameters stand. Who divides the outer graph looks for markers there. What a checkpointed region computes again is then the
compute alone; when a gathered parameter is gathered again is decided for all of them elsewhere.

Dropped: to look into regions wherever a graph's parameters are asked for. Each of those places would have to rewrite the
region too, and a region that two nodes call would be rewritten twice.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx as fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from dspass.passes.split_stages import is_marker


def read_in_front(gm: fx.GraphModule) -> None:
    """Move the markers of parameters that are inputs of regions, at any depth, into ``gm``'s own graph."""
    callers: dict[fx.GraphModule, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        for source in node.all_input_nodes:
            region = operator.attrgetter(str(source.target))(gm) if source.op == "get_attr" else None
            if isinstance(region, fx.GraphModule):
                callers.setdefault(region, []).append(node)
    for region, nodes in callers.items():
        read_in_front(region)
        inputs = region.graph.find_nodes(op="placeholder")
        for marker in [n for n in region.graph.nodes if _is_marker(n)]:
            way = [marker]  # through the local part of a DTensor
            while way[-1].op != "placeholder" and way[-1].all_input_nodes:
                way.append(way[-1].all_input_nodes[0])
            source = way.pop()
            if source not in inputs:
                continue
            for node in nodes:
                _read_for(node, inputs.index(source) - len(inputs), marker)
            source.meta = dict(marker.meta)
            marker.replace_all_uses_with(source)
            for passed in way:
                if not passed.users:
                    region.graph.erase_node(passed)
        region.recompile()
    gm.recompile()


def _read_for(caller: fx.Node, place: int, marker: fx.Node) -> None:
    """Give the region that ``caller`` calls the parameter in place of the input at ``place``, which counts from the end: a
    region's inputs are the last arguments of who calls it."""
    leaves, structure = tree_flatten(caller.args)
    if _is_marker(leaves[place]):  # two markers of one parameter
        return
    with caller.graph.inserting_before(caller):
        made = caller.graph.call_function(torch.ops.dspass.unshard, (leaves[place], marker.args[1]))
    made.meta = dict(marker.meta)
    leaves[place] = made
    caller.args = tree_unflatten(leaves, structure)


def _is_marker(node: Any) -> bool:
    return isinstance(node, fx.Node) and is_marker(node)


__all__ = ["read_in_front"]
