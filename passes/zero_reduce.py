"""ZeRO's gradient reductions: each gradient is averaged over ranks as soon as it is complete."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.fx as fx

from dspass.passes.base import Pass, PassContext, Where
from dspass.passes.nodes import REDUCE_GRAD, calls, insert_pair, reduce_start, reduce_wait
from dspass.runtime.params import lookup
from dspass.runtime.traffic import reduction_steps


@dataclass(frozen=True, kw_only=True)
class ZeroReduce(Pass):
    """``reduce_grad(%grad, key)`` becomes ``reduce_start`` and ``reduce_wait`` right behind the gradient.

    Where one rank holds everything the gradient is only cast to the parameter's precision.
    """

    name: ClassVar[str] = "zero_reduce"
    provides: ClassVar[frozenset[str]] = frozenset({"reductions"})
    where: ClassVar[frozenset[Where]] = frozenset({"backward"})

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        markers = calls(graph, REDUCE_GRAD)
        for marker in markers:
            grad, key = marker.args
            assert isinstance(grad, fx.Node)
            assert isinstance(key, str)
            spec, value = lookup(key), marker.meta["val"]
            item = grad
            # Right behind the gradient: the marker itself stands at the end, where autograd collected them.
            with graph.inserting_before(marker if grad.op == "placeholder" else grad.next):
                if reduction_steps([spec]) or spec.on_host:
                    _, _, (item,) = insert_pair(graph, reduce_start, reduce_wait, [grad], [key], [value])
                elif grad.meta["val"].dtype != spec.dtype:
                    item = graph.call_function(torch.ops.prims.convert_element_type.default, (grad, spec.dtype))
                    item.meta["val"] = value
            marker.replace_all_uses_with(item)
            graph.erase_node(marker)
        ctx.say(f"{len(markers)} gradients are averaged over ranks" if markers else "no gradient of a parameter here")
        return graph
