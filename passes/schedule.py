"""When transfers on one link start and arrive, beside a sequence of compute: as soon as can be, or as late as hides them.

A sequence is given by the moment at which each of its positions begins if nothing waits. Transfers go one after another, in the
order of the positions that they belong to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


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
    at = 0
    for position, lasts in zip(needed, seconds, strict=True):
        moments += [clock[p] + waited for p in range(at, position + 1)]
        at = max(at, position + 1)
        free += lasts
        moment = clock[position] + waited
        waited += max(0.0, free - moment)
        deadlines.append(max(free, moment))
    moments += [clock[p] + waited for p in range(at, len(clock))]
    starts: list[float] = []
    latest = float("inf")
    for deadline, lasts in zip(reversed(deadlines), reversed(seconds), strict=True):
        latest = min(deadline, latest) - lasts
        starts.append(latest)
    return Late(starts[::-1], moments, waited)
