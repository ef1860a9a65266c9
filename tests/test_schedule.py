"""When transfers start and arrive beside compute, against a clock that is run."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspass.passes.schedule import as_late, as_soon

TRANSFERS = st.lists(st.tuples(st.integers(0, 9), st.floats(0.01, 5)), min_size=1, max_size=6)
COMPUTE = st.lists(st.floats(0, 2), min_size=10, max_size=10)


def _waited(clock: list[float], needed: list[int], seconds: list[float], starts: list[float]) -> float:
    """Run it: what compute waits in all when transfers start at these moments, or when the link is free."""
    free = waited = 0.0
    for position, lasts, start in zip(needed, seconds, starts, strict=True):
        free = max(free, start) + lasts
        waited += max(0.0, free - clock[position] - waited)
    return waited


@given(COMPUTE, TRANSFERS)
def test_as_late_as_can_be_waits_no_longer_than_all_at_once(
    compute: list[float], transfers: list[tuple[int, float]]
) -> None:
    clock = [0.0, *itertools.accumulate(compute)]
    needed, seconds = zip(*sorted(transfers), strict=True)
    late = as_late(clock, needed, seconds)
    at_once = _waited(clock, list(needed), list(seconds), [0.0] * len(needed))
    assert late.exposed == pytest.approx(at_once)
    assert _waited(clock, list(needed), list(seconds), late.starts) == pytest.approx(at_once)
    for i in range(len(needed)):  # none could start later
        later = [start + (0.1 if k == i else 0.0) for k, start in enumerate(late.starts)]
        assert _waited(clock, list(needed), list(seconds), later) > at_once + 1e-6
    assert late.clock[-1] == pytest.approx(clock[-1] + late.exposed)


def test_as_soon_as_can_be_is_one_after_another() -> None:
    assert as_soon([0.0, 1.0, 2.0, 9.0], [1, 1, 3], [2.0, 3.0, 1.0]) == [3.0, 6.0, 10.0]
