"""When each rank of a pipeline did what in a call that trained: gathered from all of them, now and then.

The calls are the same on all ranks, for each counts the ones it takes part in: the third, when compiling is over, then the
10th, 30th, 100th and so on. So a gather costs nothing in the long run, and nobody is waited for who does not come.

Ranks have clocks of their own. ``time.perf_counter`` of each is told with what it is behind ``time.time``, which makes them one
clock as far as the machines' own agree: on one host they are the same, and between several NTP or PTP leaves a difference. If
that is longer than a message takes, one seems to arrive before it was sent; lengths of spans, and waits, are each rank's own
and right all the same.

Dropped: to gather whenever the report is asked for. One rank may ask, and the others would not come.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from dspass.quantising import relative
from dspass.runtime.axis import Axis
from dspass.runtime.pipeline import Executor
from dspass.runtime.schedule import Direction, Span, Timeline
from dspass.runtime.stopped import waiting_for


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What all ranks of a pipeline did in its ``call``-th call that trained; what stands by rank is in the pipeline's order."""

    call: int
    timeline: Timeline
    wait_seconds: tuple[float, ...]
    """In which a rank waited for messages."""
    sent_bytes: tuple[int, ...]
    """To neighbours, in this call."""
    errors: Mapping[tuple[int, Direction], float] = field(default_factory=dict)
    """By how much the first message in few bits was off over each cut, numbered by the stage before it: a norm over that of its
    values."""


def is_due(call: int) -> bool:
    """Whether all ranks gather what they did in this call, the first being 1."""
    return call >= 3 and str(call).rstrip("0") in ("1", "3")


def gather(executor: Executor, axis: Axis, call: int, peak_bytes: int | None) -> Measured:
    """What the last call of ``executor``, which was watched, did on all ranks of ``axis``; all of them call this.

    ``peak_bytes`` is the most memory that this rank has been seen to take; None where nobody looked. A message that was not
    finite, as the first with a scaled loss may be, is forgotten, so that the next one counts.
    """
    behind = time.time() - time.perf_counter()
    times = [(span.start + behind, span.end + behind) for span in executor.spans]
    off = {place: relative(sums) for place, sums in executor.rounding.items()}
    executor.rounding = {place: sums for place, sums in executor.rounding.items() if math.isfinite(off[place])}
    mine = times, peak_bytes, executor.wait_seconds, executor.sent_bytes, off
    everyone: list[Any] = [mine] * axis.size
    if axis.size > 1:
        with waiting_for(axis, "exchange the times of a call"):
            dist.all_gather_object(everyone, mine, axis.group)
    schedule = executor.schedule
    spans = [
        tuple(Span(action, *at) for action, at in zip(actions, one[0], strict=True))
        for actions, one in zip(schedule.actions, everyone, strict=True)
    ]
    peaks = tuple(one[1] for one in everyone)
    return Measured(
        call=call,
        timeline=Timeline(schedule, tuple(spans), () if None in peaks else peaks),
        wait_seconds=tuple(one[2] for one in everyone),
        sent_bytes=tuple(one[3] for one in everyone),
        errors={place: error for one in everyone for place, error in one[4].items() if math.isfinite(error)},
    )


__all__ = ["Measured", "gather", "is_due"]
