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
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch.fx as fx

from dspass.passes.cost import compute_seconds
from dspass.passes.devices import Device
from dspass.passes.kernels import Stretch, size_of
from dspass.passes.schedule import as_late, as_soon
from dspass.planner.liveness import Absence, reads_of


@dataclass(frozen=True)
class Times:
    """``compute`` of both halves, ``exposed`` copies, ``holding`` what is saved where an allocator takes memory for it anew;
    and when each value that is copied is away."""

    compute: float
    exposed: float
    holding: float
    absent: Mapping[fx.Node, Absence]

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed + self.holding


def times_of(halves: tuple[Stretch, Stretch], copied: Mapping[fx.Node, tuple[int, float]], on: Device) -> Times:
    """``copied``: of values that a pass holds, bytes that stay on the device and seconds of copies, half of them out."""
    forward = halves[0]
    clocks = [_clock(half, on) for half in halves]
    results = [n for n in forward.results if n.op == "call_function"]
    holding = on.fresh * sum(map(size_of, results)) if on.fresh else 0.0
    absent, exposed = _absences(halves, clocks, copied, on.overlaps) if copied else ({}, 0.0)
    return Times(clocks[0][-1] + clocks[1][-1], exposed, holding, absent)


def _clock(half: Stretch, on: Device) -> list[float]:
    """When each node of ``half`` begins, and when the last has ended."""
    seconds = compute_seconds(half, on)
    return [0.0, *itertools.accumulate(seconds.get(node, 0.0) for node in half.nodes)]


def _absences(
    halves: tuple[Stretch, Stretch],
    clocks: list[list[float]],
    copied: Mapping[fx.Node, tuple[int, float]],
    overlaps: bool,
) -> tuple[dict[fx.Node, Absence], float]:
    forward, backward = halves
    middle = len(forward.nodes)
    first, second = reads_of(forward), reads_of(backward)
    out = sorted(copied, key=lambda n: first.last.get(n, first.made[n]))
    ready = [first.last.get(n, first.made[n]) for n in out]
    back = sorted(copied, key=lambda n: second.first.get(n, len(backward.nodes)))
    needed = [min(second.first.get(n, len(backward.nodes)), len(backward.nodes) - 1) for n in back]
    if not overlaps:
        there = zip(back, needed, strict=True)
        away = dict(zip(out, ready, strict=True))
        absent = {n: Absence(copied[n][0], away[n], middle + p) for n, p in there}
        return absent, math.fsum(seconds for _, seconds in copied.values())
    arrive = as_soon(clocks[0], [p + 1 for p in ready], [copied[n][1] / 2 for n in out])
    away = {
        n: min(max(bisect.bisect_left(clocks[0], at) - 1, p), middle)
        for n, p, at in zip(out, ready, arrive, strict=True)
    }
    late = as_late(clocks[1], needed, [copied[n][1] / 2 for n in back])
    absent = {}
    for n, p, start in zip(back, needed, late.starts, strict=True):
        place = min(max(bisect.bisect_right(late.clock, start) - 1, 0), p)
        absent[n] = Absence(copied[n][0], away[n], middle + place)
    return absent, max(0.0, arrive[-1] - clocks[0][-1]) + late.exposed
