"""The turns of one model's points: how they are started, one at a time asked, and ended, whatever happens.

Starting is most of the time, so a few start at once, in threads that wait for their processes. What is measured is measured
while nothing else runs. How much memory a point takes is known only once it runs: the next one starts if there is room for as
much as the largest so far took at most, beside what all hold at rest.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from tqdm import tqdm

from benchmarks import zero
from benchmarks.memory_points import PATIENCE, PLENTY, Point, Started, megabytes, normalise
from benchmarks.workers import Group, SubjectFailed

#: Seconds for the first steps of a point, which compile and plan, for one step, and for a step that is watched.
_STARTING, _STEP, _WATCHED = PATIENCE / 2, 600.0, 1200.0

#: Of the memory that is free, which points may take: the rest is for the profiler's events of a watched step, and for programs'
#: own pages, without which a machine that has no swap reads them from the disk again and again and all but stands still.
_SHARE = 0.75

#: Steps before the rounds: the first shards, the second compiles what is sharded.
_WARM_UP = 3


class Bench:
    """All points of one model. ``make`` starts the processes of one."""

    def __init__(self, model: str, options: argparse.Namespace, make: Callable[[Point], Group]) -> None:
        self.model, self.options, self.make = model, options, make
        self.limit = min(options.memory_gib * zero.GIB, int(zero._available() * _SHARE))
        self.points: list[Point] = []
        self.groups: dict[str, Group] = {}  # of points that are alive, by name
        self.waves = 0
        self.most = 0  # bytes that a point took at most so far
        self._fresh: list[Point] = []
        self._lock = threading.Lock()
        self._is_closed = False

    def measure(self, others: Sequence[Point]) -> list[Point]:
        """dspass without a budget, under budgets from the smallest plan to the fastest, and ``others``."""
        refused, fastest = Point("dspass", "refused", budget=1), Point("dspass", "fastest", budget=PLENTY)
        unplanned = Point("dspass", "unplanned")
        self._start_some([refused, fastest])
        waiting = [*self._budgets(refused.predicted, fastest.predicted), *others]
        random.Random(0).shuffle(waiting)  # so that no system sits in one wave alone
        waiting.insert(0, unplanned)
        reference = fastest if fastest.name in self.groups else unplanned
        while waiting or self._fresh:
            self._start_some(waiting)
            self._turns()
            self._peaks()
            for name in [n for n in self.groups if n != reference.name]:
                self.groups.pop(name).close()
            self._fresh = []
            self.waves += 1
        self.close()
        if reference.seconds:
            normalise([p for p in self.points if p.error is None], reference)
        return self.points

    def _budgets(self, low: int | None, high: int | None) -> list[Point]:
        """Equally far from each other, from the smallest that works to just below the peak of the fastest plan."""
        if low is None or high is None:
            return []
        count = self.options.budgets - 1
        budgets = {megabytes(b): b for b in (round(low + (high - low) * i / count) for i in range(count))}
        return [Point("dspass", name, budget=budget) for name, budget in budgets.items()]

    # -- starting ---------------------------------------------------------------------------------------------------

    def _start_some(self, waiting: list[Point]) -> None:
        """Start and compile points, a few at a time, while memory lasts; one at least. Takes them from ``waiting``."""
        with (
            ThreadPoolExecutor(self.options.jobs) as pool,
            tqdm(total=len(waiting), desc=f"{self.model}: start and compile", unit="point", ncols=90) as bar,
        ):
            running: set[Future[None]] = set()
            try:
                while waiting or running:
                    while waiting and len(running) < self.options.jobs and self._has_room(len(running)):
                        running.add(pool.submit(self._start, waiting.pop(0)))
                    if not running:
                        return
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        future.result()
                        bar.update()
            except BaseException:
                self.close()  # what the pool's threads wait for
                raise

    def _has_room(self, starting: int) -> bool:
        """Whether one more point fits beside those that are alive, while one of them takes a step or ``starting`` start."""
        if not self.most or not (self._fresh or starting):
            return True
        with self._lock:
            held = sum(self.groups[p.name].memory()[0] for p in self.points if p.name in self.groups)
        return held + (starting + 1) * self.most <= self.limit

    def _start(self, point: Point) -> None:
        """In a thread of its own. A point that fails is reported and ended; the others go on."""
        try:
            with self._lock:
                if self._is_closed:
                    return
                group = self.groups[point.name] = self.make(point)
            answers: list[Started] = group.ask("start", _WARM_UP, timeout=_STARTING)
        except (SubjectFailed, OSError) as error:
            self._failed(point, str(error) if isinstance(error, SubjectFailed) else f"{point.name}: {error}")
            return
        first = answers[0]
        if first.smallest is not None:
            point.predicted = first.smallest
            if point.budget == 1:  # which is to be refused
                with self._lock:
                    self.groups.pop(point.name).close()
            else:
                self._failed(point, f"{point.name}: {first.why}")
            return
        point.losses = _means([one.losses for one in answers])
        if first.peak is not None:
            point.predicted, point.decision = max(one.peak or 0 for one in answers), first.decision
            point.predicted_seconds = max(one.seconds + one.optimizer_seconds for one in answers)
            point.is_calibrated = first.is_calibrated
            if self.options.calibrate and not first.is_calibrated:
                self._failed(point, f"{point.name}: the plan was made without the calibration of this run")
                return
        point.resident, most = group.memory()
        with self._lock:
            self.most = max(self.most, most)
            self.points.append(point)
            self._fresh.append(point)

    def _failed(self, point: Point, error: str) -> None:
        point.error = SubjectFailed.short(error)
        if not self._is_closed:  # then it was ended, and has not failed
            tqdm.write(f"failed: {point.error}", file=sys.stderr)
        with self._lock:
            group = self.groups.pop(point.name, None)
            if point not in self.points:
                self.points.append(point)
        if group is not None:
            group.close()

    # -- measuring --------------------------------------------------------------------------------------------------

    def _turns(self) -> None:
        by_name = {p.name: p for p in self.points}
        with tqdm(
            total=self.options.rounds * len(self.groups), desc=f"{self.model}: rounds", unit="step", ncols=90
        ) as bar:
            for number in range(self.options.rounds):
                order = sorted(self.groups)
                random.Random(f"{self.waves} {number}").shuffle(order)
                for name in order:
                    point = by_name[name]
                    bar.update()
                    try:
                        answers = self.groups[name].ask("steps", 1, timeout=_STEP)
                    except SubjectFailed as error:
                        self._failed(point, str(error))
                        continue
                    point.seconds.setdefault(self.waves, []).append(max(seconds for seconds, _ in answers))
                    point.losses += _means([losses for _, losses in answers])

    def _peaks(self) -> None:
        """Of several ranks the median of three: peaks of eager peers vary with what a collective's thread allocates when."""
        times = 3 if self.options.ranks > 1 else 1
        alive = [p for p in self._fresh if p.name in self.groups]
        for point in tqdm(alive, desc=f"{self.model}: peaks", unit="point", ncols=90):
            group = self.groups[point.name]
            try:
                peaks = [max(group.ask("peak", timeout=_WATCHED)) for _ in range(times)]
            except SubjectFailed as error:
                self._failed(point, str(error))
                continue
            point.peak = int(statistics.median(peaks))

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            groups, self.groups = list(self.groups.values()), {}
        for group in groups:
            group.close()


def _means(losses: Sequence[Sequence[float]]) -> list[float]:
    """The ranks' mean loss of each step."""
    return [sum(step) / len(step) for step in zip(*losses, strict=True)]
