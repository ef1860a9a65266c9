"""Seconds of a step for a choice of what is saved, from the joint graph: what the cost model will say of the graphs, nearly.

Compute is that of the kernels of both halves (:mod:`dspass.planner.halves`, :mod:`dspass.passes.kernels`). Copies to and from
the host run beside it, on a link of their own: out as soon as a value is read for the last time, one after another, and back as
late as hides them. What no start hides is exposed. Gathers that a choice adds cost what the solver says
(:func:`dspass.planner.values.values_of`).

Dropped: the sum over values that the solver minimises. A value's part of a kernel depends on what else is in it, and sums over
a step were off by up to a twentieth, with either sign. Dropped: to estimate the graphs of each choice. They would have to be
split for it.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch.fx as fx

from dspass.passes.base import Holding
from dspass.passes.devices import Device
from dspass.passes.kernels import Stretch, size_of
from dspass.passes.schedule import as_late, as_soon, clock_of
from dspass.planner.liveness import Absence, reads_of


@dataclass(frozen=True)
class Times:
    """``compute`` of both halves, ``exposed`` copies, ``holding`` what is saved: the passes' own work, and taking memory where
    an allocator does so in each step; and when each value that a pass holds is away."""

    compute: float
    exposed: float
    holding: float
    absent: Mapping[fx.Node, Absence]

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed + self.holding


def times_of(
    halves: tuple[Stretch, Stretch],
    held: Mapping[fx.Node, Holding],
    on: Device,
    operations: Callable[[fx.Node], float] | None = None,
) -> Times:
    """``held`` are the values that passes hold in their ways; half of a copy is out, and half is back. ``operations`` as for
    the cost model's :func:`~dspass.passes.cost.compute_seconds`."""
    forward = halves[0]
    clocks = [clock_of(half, on, operations) for half in halves]
    results = [n for n in forward.results if n.op == "call_function"]
    holding = math.fsum([on.fresh * sum(map(size_of, results)), *(holding.seconds for holding in held.values())])
    absent, exposed = _absences(halves, clocks, held, on.overlaps) if held else ({}, 0.0)
    return Times(clocks[0][-1] + clocks[1][-1], exposed, holding, absent)


def _absences(
    halves: tuple[Stretch, Stretch],
    clocks: list[list[float]],
    held: Mapping[fx.Node, Holding],
    overlaps: bool,
) -> tuple[dict[fx.Node, Absence], float]:
    forward, backward = halves
    middle = len(forward.nodes)
    first, second = reads_of(forward), reads_of(backward)
    last = {n: first.last.get(n, first.made[n]) for n in held}
    reads = {n: min(second.first.get(n, len(backward.nodes)), len(backward.nodes) - 1) for n in held}
    absent = {n: Absence(holding.bytes, last[n], middle + reads[n]) for n, holding in held.items()}
    copied = [n for n, holding in held.items() if holding.link_seconds]  # the others wait for no link
    if not overlaps or not copied:
        return absent, math.fsum(held[n].link_seconds for n in copied)
    out, back = sorted(copied, key=last.__getitem__), sorted(copied, key=reads.__getitem__)
    ready, needed = [last[n] for n in out], [reads[n] for n in back]
    arrive = as_soon(clocks[0], [p + 1 for p in ready], [held[n].link_seconds / 2 for n in out])
    away = {
        n: min(max(bisect.bisect_left(clocks[0], at) - 1, p), middle)
        for n, p, at in zip(out, ready, arrive, strict=True)
    }
    late = as_late(clocks[1], needed, [held[n].link_seconds / 2 for n in back])
    for n, p, start in zip(back, needed, late.starts, strict=True):
        place = min(max(bisect.bisect_right(late.clock, start) - 1, 0), p)
        absent[n] = Absence(held[n].bytes, away[n], middle + place)
    return absent, max(0.0, arrive[-1] - clocks[0][-1]) + late.exposed
