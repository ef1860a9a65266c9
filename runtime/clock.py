"""How long runs of a program take, watched from outside at no cost, and when parts of one did what: what a cost model's
prediction is held against."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable

import torch

#: Runs that are left out, for they compile or warm up, and those whose median counts from then on.
_WARM_UP, _KEPT = 2, 9


class Clock:
    """Seconds of the last runs. On a GPU between two events of the stream, which are asked when the next run begins: nothing
    waits for them. ``then`` is called once, when there are enough."""

    def __init__(self) -> None:
        self.then: Callable[[], None] | None = None
        self._runs = 0
        self._seconds: deque[float] = deque(maxlen=_KEPT)
        self._began: float | torch.cuda.Event = 0.0
        self._pending: tuple[torch.cuda.Event, torch.cuda.Event] | None = None

    def start(self, on_gpu: bool) -> None:
        if not on_gpu:
            self._began = time.perf_counter()
            return
        if self._pending is not None and self._pending[1].query():
            self._note(self._pending[0].elapsed_time(self._pending[1]) / 1e3)
        self._pending = None
        self._began = torch.cuda.Event(enable_timing=True)
        self._began.record()

    def stop(self) -> None:
        if isinstance(self._began, float):
            self._note(time.perf_counter() - self._began)
            return
        end = torch.cuda.Event(enable_timing=True)
        end.record()
        self._pending = (self._began, end)

    def _note(self, seconds: float) -> None:
        self._runs += 1
        if self._runs > _WARM_UP:
            self._seconds.append(seconds)
        if self.then is not None and self.seconds is not None:
            then, self.then = self.then, None
            then()

    @property
    def seconds(self) -> float | None:
        """The median; None until there are enough runs."""
        return statistics.median(self._seconds) if len(self._seconds) == _KEPT else None


class Moments:
    """Moments of one run, of this process's ``time.perf_counter``. On a GPU, where launches return at once, they are events of
    the current stream: what stands between two is the stream's time, its waits for messages too. Those have seconds only after
    :meth:`settle`, which waits for the device, as making this does."""

    def __init__(self, on_gpu: bool) -> None:
        self._first: torch.cuda.Event | None = None
        if on_gpu:
            torch.cuda.synchronize()
            self._first = self._event()
        self._began = time.perf_counter()

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def now(self) -> float | torch.cuda.Event:
        return time.perf_counter() if self._first is None else self._event()

    def settle(self) -> None:
        """Call once, before :meth:`seconds`."""
        if self._first is not None:
            torch.cuda.synchronize()

    def seconds(self, moment: float | torch.cuda.Event) -> float:
        """A moment as ``time.perf_counter`` would have it."""
        if isinstance(moment, float):
            return moment
        assert self._first is not None
        return self._began + self._first.elapsed_time(moment) / 1e3
