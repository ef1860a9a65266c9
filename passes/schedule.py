"""When transfers on one link start and arrive, beside a sequence of compute: as soon as can be, or as late as hides them.

A sequence is given by the moment at which each of its positions begins if nothing waits (:func:`clock_of`). Transfers go one
after another, in the order of the positions that they belong to. Their nodes stand where a kernel ends in any case
(:func:`kernel_ends`): elsewhere they would divide what is fused.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch.fx as fx

from dspass.passes.cost import compute_seconds
from dspass.passes.devices import Device
from dspass.passes.kernels import Stretch, ends_kernel


def clock_of(part: Stretch, on: Device, operations: Callable[[fx.Node], float] | None = None) -> list[float]:
    """When each node of ``part`` begins if nothing waits, and when the last has ended; ``operations`` as for the cost model's
    :func:`~dspass.passes.cost.compute_seconds`."""
    seconds = compute_seconds(part, on, operations)
    return [0.0, *itertools.accumulate(seconds.get(node, 0.0) for node in part.nodes)]


def kernel_ends(nodes: Sequence[fx.Node]) -> list[int]:
    """Positions in a graph's ``nodes`` that divide no kernel: its first operator, and what follows the end of a kernel."""
    first = next(i for i, node in enumerate(nodes) if node.op != "placeholder")
    return [first, *(i + 1 for i in range(first, len(nodes) - 1) if ends_kernel(nodes[i]))]


def last_before(clock: Sequence[float], positions: Sequence[int], moment: float) -> int:
    """The last of the ascending ``positions`` that begins no later than ``moment``, else the first."""
    return positions[max(bisect.bisect_right(positions, moment, key=clock.__getitem__) - 1, 0)]


def first_after(clock: Sequence[float], positions: Sequence[int], moment: float) -> int:
    """The first of the ascending ``positions`` that begins no earlier than ``moment``, else the last."""
    return positions[min(bisect.bisect_left(positions, moment, key=clock.__getitem__), len(positions) - 1)]


def as_soon(clock: Sequence[float], ready: Sequence[int], seconds: Sequence[float]) -> list[float]:
    """Moments at which transfers arrive that each may start at position ``ready``."""
    arrive: list[float] = []
    free = 0.0
    for position, lasts in zip(ready, seconds, strict=True):
        free = max(free, clock[position]) + lasts
        arrive.append(free)
    return arrive


@dataclass(frozen=True)
class Late:
    """``starts``: the latest moments at which transfers start that are waited for no longer than if all started at once;
    ``clock``: the moments at which positions begin with these waits, the waits' own before they are over; ``exposed``: all
    waits together."""

    starts: list[float]
    clock: list[float]
    exposed: float


def as_late(clock: Sequence[float], needed: Sequence[int], seconds: Sequence[float]) -> Late:
    """Transfers that are each waited for at position ``needed``: as late as possible scheduling, from the last to the first.

    Where the link is what takes long, none can begin before the one before it has arrived, and to start it earlier would only
    hold memory: waits that no start avoids move every later deadline.
    """
    waited = 0.0  # up to here
    free = 0.0
    deadlines: list[float] = []
    moments: list[float] = []
    for position, lasts in zip(needed, seconds, strict=True):
        moments += [moment + waited for moment in clock[len(moments) : position + 1]]
        free += lasts
        moment = clock[position] + waited
        waited += max(0.0, free - moment)
        deadlines.append(max(free, moment))
    moments += [moment + waited for moment in clock[len(moments) :]]
    starts: list[float] = []
    latest = float("inf")
    for deadline, lasts in zip(reversed(deadlines), reversed(seconds), strict=True):
        latest = min(deadline, latest) - lasts
        starts.append(latest)
    return Late(starts[::-1], moments, waited)
