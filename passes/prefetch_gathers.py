"""Start a gather early enough to hide it behind the compute before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.fx as fx

from dspass.passes.base import Pass, PassContext
from dspass.passes.nodes import calls, gather_start, specs_of, wait_of


@dataclass(frozen=True, kw_only=True)
class PrefetchGathers(Pass):
    """Move each ``gather_start`` to where the gather ``distance`` before it has just arrived.

    One bucket is then on its way while the one before it is used. ``max_live_elements`` is DeepSpeed's
    ``stage3_max_live_parameters``: a gather is not started early when it and those it would overtake hold more. A
    distance that hides the gather by the cost model and no more is the planner's to choose.
    """

    name: ClassVar[str] = "prefetch_gathers"
    requires: ClassVar[frozenset[str]] = frozenset({"bucketed gathers"})

    distance: int = 1
    max_live_elements: int | None = None

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        starts = sorted(calls(graph, gather_start))
        if not starts or self.distance < 1:
            ctx.say("no gathers here" if not starts else "switched off by distance 0")
            return graph
        moved = refused = 0
        sizes = [sum(s.numel for s in specs_of(start)) for start in starts]
        body = next(n for n in graph.nodes if n.op != "placeholder")
        for i, start in enumerate(starts):
            if (
                self.max_live_elements is not None
                and sum(sizes[max(i - self.distance, 0) : i + 1]) > self.max_live_elements
            ):
                refused += 1
            elif i < self.distance:  # from the top of the graph, in order
                if i:
                    starts[i - 1].append(start)
                elif start is not body:
                    body.prepend(start)
                moved += 1
            else:
                # Behind the arrival of the one that far before it; the order of gathers must not change.
                arrived = wait_of(starts[i - self.distance])
                max(arrived, *arrived.users, starts[i - 1]).append(start)
                moved += 1
        ctx.say(
            f"{moved} gathers start {self.distance} bucket{'s' * (self.distance > 1)} early"
            + (f", {refused} not, to keep live parameters under the limit" if refused else "")
        )
        return graph
