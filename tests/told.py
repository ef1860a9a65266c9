"""A planner that is told the peaks of its choices, by its model and as they run."""

from __future__ import annotations

from typing import Any

from dspass.passes import devices
from dspass.planner.choices import Choices
from dspass.planner.dry_run import Peak
from dspass.planner.mincut import Choice
from dspass.planner.plan import Planner
from dspass.planner.record import Setting


class Told(Choices):
    """Choices that take a second more each, with the peaks that the model was told."""

    def __init__(self, modelled: list[int]) -> None:
        self.inside, self.values, self.ways, self.prior, self._before, self._whole = [], [], [], None, None, set()
        count = len(modelled)
        self.found = [Choice(frozenset(), frozenset(), frozenset(), count - i, count - i, 0.0) for i in range(count)]
        self.on = devices.CPU
        self._modelled = modelled

    def seconds(self, i: int) -> float:
        return float(i + 1)

    def peak(self, i: int, bucket_bytes: int | None) -> int:
        return self._modelled[i]


class ToldPlanner(Planner):
    """A planner whose runs have the peaks that it was told."""

    real: list[int]

    def _run(self, choice: int, bucket_bytes: int | None) -> Any:
        self._measured[choice, bucket_bytes] = Peak(100, self.real[choice], 0)
        return (None, None), self._measured[choice, bucket_bytes]


def told(
    budget: int, modelled: list[int], real: list[int], settings: tuple[Setting, ...] = (Setting(),)
) -> ToldPlanner:
    nothing: Any = lambda *_: None  # noqa: E731
    planner = ToldPlanner(
        budget=budget, find=nothing, split=nothing, passes=nothing, run=nothing, seconds=nothing, settings=settings
    )
    planner.choices, planner.real = Told(modelled), real
    return planner
