"""Start a gather early enough to hide it behind the compute before it, and no earlier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.fx as fx

from dspass.passes.base import Pass, PassContext
from dspass.passes.cost import collective_seconds
from dspass.passes.devices import Device
from dspass.passes.kernels import Stretch
from dspass.passes.nodes import REDUCE_GRAD, calls, gather_start, open_starts, positions, specs_of, wait_of
from dspass.passes.schedule import as_late, clock_of, kernel_ends, last_before


@dataclass(frozen=True, kw_only=True)
class PrefetchGathers(Pass):
    """Move each ``gather_start`` to where the gather ``distance`` before it has just arrived.

    One bucket is then on its way while the one before it is used. ``max_live_elements`` is DeepSpeed's
    ``stage3_max_live_parameters``: a gather is not started early when it and those it would overtake hold more.

    With ``hidden_by``, a device that computes while it sends, ``distance`` does not count: each gather starts at the latest
    moment from which it, and all behind it on the same link, arrive in time by the cost model (:mod:`dspass.passes.schedule`).
    No gather is exposed that would not be with the longest lookahead, and no smaller distance would do. In a backward graph
    the link carries the gradients as well, so a gather is taken to last as much longer as these are larger.
    """

    name: ClassVar[str] = "prefetch_gathers"
    requires: ClassVar[frozenset[str]] = frozenset({"bucketed gathers"})

    distance: int = 1
    max_live_elements: int | None = None
    hidden_by: Device | None = None

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        starts = open_starts(graph, gather_start)
        if starts and self.hidden_by is not None and self.hidden_by.overlaps:
            moved, refused = _start_as_late_as_hides(graph, starts, self.hidden_by, self.max_live_elements)
            ctx.say(
                f"{moved} of {len(starts)} gathers start early, each as late as {self.hidden_by.name} hides it"
                + (f", {refused} later than that, to keep live parameters under the limit" if refused else "")
            )
            return graph
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


def _start_as_late_as_hides(
    graph: fx.Graph, starts: list[fx.Node], on: Device, max_live_elements: int | None
) -> tuple[int, int]:
    """How many gathers start early, and how many of all start later than would hide them, as the limit has it."""
    reduced = sum(_bytes(node.args[0]) for node in calls(graph, REDUCE_GRAD))
    gathered = sum(spec.gathered_bytes for start in starts for spec in specs_of(start))
    lasts = [(1 + reduced / max(gathered, 1)) * collective_seconds(start, on) for start in starts]
    nodes, order = list(graph.nodes), positions(graph)
    late = as_late(clock_of(Stretch.of(graph), on), [order[wait_of(start)] for start in starts], lasts)
    places = kernel_ends(nodes)
    sizes = [sum(s.numel for s in specs_of(start)) for start in starts]
    arrivals = [order[wait_of(start)] for start in starts]
    moved, refused, previous = 0, 0, None
    for i, (start, moment) in enumerate(zip(starts, late.starts, strict=True)):
        place = last_before(late.clock, places, moment)
        if max_live_elements is not None:
            # Alive with this one are those that are on their way when it starts, and the one in use.
            first = next((j for j in range(i) if sum(sizes[j : i + 1]) <= max_live_elements), i)
            if first and place <= arrivals[first]:
                place = next((p for p in places if p > arrivals[first]), order[start]) if first < i else order[start]
                refused += 1
        if place < order[start]:
            # Behind the gather before it, where both begin at the same moment: their order must not change.
            if previous is not None and place <= order[previous]:
                previous.append(start)
            else:
                nodes[place].prepend(start)
            moved += 1
        order[start] = min(place, order[start])
        previous = start
    return moved, refused


def _bytes(value: fx.Node) -> int:
    tensor = value.meta["val"]
    return tensor.numel() * tensor.element_size()
