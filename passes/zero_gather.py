"""ZeRO's parameter gathers (Rajbhandari et al., ZeRO, 2020): each whole parameter is gathered where it is first used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.fx as fx

from dspass.passes.base import Pass, PassContext
from dspass.passes.nodes import GATHERED, first_user, gather_start, gather_wait, insert_pair, positions
from dspass.runtime.params import lookup


@dataclass(frozen=True, kw_only=True)
class ZeroGather(Pass):
    """A placeholder of a whole parameter becomes ``gather_start`` and ``gather_wait`` right before its first use.

    A parameter that every rank holds whole is read as it is, cast to compute precision where that differs. One that is
    not used in this graph costs nothing.
    """

    name: ClassVar[str] = "zero_gather"
    requires: ClassVar[frozenset[str]] = frozenset({"exposed parameters"})
    provides: ClassVar[frozenset[str]] = frozenset({"gathers"})

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        gathered = whole = 0
        order = positions(graph)
        inputs = {node.name: node for node in graph.find_nodes(op="placeholder")}
        for placeholder in [n for n in inputs.values() if GATHERED in n.meta]:
            key, local_name = placeholder.meta[GATHERED]
            spec, local, value = lookup(key), inputs[local_name], placeholder.meta["val"]
            if placeholder.users:
                with graph.inserting_before(first_user(placeholder, order)):
                    if spec.on_host or (
                        spec.shard_axis is not None and spec.shard_axis.size > 1 and spec.layout == "shard"
                    ):
                        _, _, (item,) = insert_pair(graph, gather_start, gather_wait, [local], [key], [value])
                        gathered += 1
                    elif spec.compute_dtype != spec.dtype:
                        item = graph.call_function(
                            torch.ops.prims.convert_element_type.default, (local, spec.compute_dtype)
                        )
                        item.meta["val"] = value
                        whole += 1
                    else:
                        item = local
                        whole += 1
                placeholder.replace_all_uses_with(item)
            graph.erase_node(placeholder)
        ctx.say(
            f"{gathered} gathers, {whole} parameters held whole" if gathered or whole else "no parameter is read here"
        )
        return graph
