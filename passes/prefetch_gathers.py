"""Start a gather early enough to hide it behind the compute before it, and no earlier."""

from __future__ import annotations

import itertools
import operator
from dataclasses import dataclass
from typing import ClassVar

import torch.fx as fx

from dspass.passes.base import Pass, PassContext
from dspass.passes.cost import collective_seconds, compute_seconds
from dspass.passes.devices import Device
from dspass.passes.kernels import fuses, is_view
from dspass.passes.nodes import REDUCE_GRAD, calls, gather_start, positions, specs_of, wait_of


@dataclass(frozen=True, kw_only=True)
class PrefetchGathers(Pass):
    """Move each ``gather_start`` to where the gather ``distance`` before it has just arrived.

    One bucket is then on its way while the one before it is used. ``max_live_elements`` is DeepSpeed's
    ``stage3_max_live_parameters``: a gather is not started early when it and those it would overtake hold more.

    With ``hidden_by``, a device that computes while it sends, ``distance`` does not count: each gather starts at the latest
    moment from which it, and all behind it on the same link, arrive in time by the cost model (as late as possible scheduling,
    from the last gather to the first). No gather is exposed that would not be with the longest lookahead, and no smaller
    distance would do. In a backward graph the link carries the gradients as well, so a gather is taken to last as much longer
    as these are larger.
    """

    name: ClassVar[str] = "prefetch_gathers"
    requires: ClassVar[frozenset[str]] = frozenset({"bucketed gathers"})

    distance: int = 1
    max_live_elements: int | None = None
    hidden_by: Device | None = None

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        starts = sorted(calls(graph, gather_start))
        if starts and self.hidden_by is not None and self.hidden_by.overlaps:
            moved = _start_as_late_as_hides(graph, starts, self.hidden_by)
            ctx.say(f"{moved} of {len(starts)} gathers start early, each as late as {self.hidden_by.name} hides it")
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


def _start_as_late_as_hides(graph: fx.Graph, starts: list[fx.Node], on: Device) -> int:
    reduced = sum(_bytes(node.args[0]) for node in calls(graph, REDUCE_GRAD))
    gathered = sum(spec.gathered_bytes for start in starts for spec in specs_of(start))
    lasts = {start: (1 + reduced / max(gathered, 1)) * collective_seconds(start, on) for start in starts}
    # The moment at which each node runs if all gathers start at once, waits included: where the link is what takes long, no
    # gather can begin before the one before it has arrived, and to start it earlier would only hold memory.
    arrives, link_free = {}, 0.0
    for start in starts:
        link_free += lasts[start]
        arrives[wait_of(start)] = link_free
    clock: dict[fx.Node, float] = {}
    needed: dict[fx.Node, float] = {}
    now = 0.0
    lasting = compute_seconds(graph, on)
    for node in graph.nodes:
        clock[node] = now
        if node in arrives:
            needed[node] = now = max(now, arrives[node])
        now += lasting.get(node, 0.0)
    deadline = float("inf")
    latest: list[float] = []
    for start in reversed(starts):
        deadline = min(needed[wait_of(start)], deadline) - lasts[start]
        latest.append(deadline)
    order = positions(graph)
    # Where a kernel ends in any case: a start elsewhere would divide what is fused.
    body = [node for node in graph.nodes if node.op != "placeholder"]
    body = body[:1] + [node for before, node in itertools.pairwise(body) if _ends_kernel(before)]
    place, moved, previous = 0, 0, None
    for start, moment in zip(starts, reversed(latest), strict=True):
        while place + 1 < len(body) and clock[body[place + 1]] <= moment:
            place += 1
        target = body[place]
        if order[target] < order[start]:
            # Behind the gather before it, where both begin at the same moment: their order must not change.
            if previous is not None and order[target] <= order[previous]:
                previous.append(start)
            else:
                target.prepend(start)
            moved += 1
        order[start] = min(order[target], order[start])
        previous = start
    return moved


def _ends_kernel(node: fx.Node) -> bool:
    return not fuses(node) and not is_view(node) and node.target is not operator.getitem


def _bytes(value: fx.Node) -> int:
    tensor = value.meta["val"]
    return tensor.numel() * tensor.element_size()
