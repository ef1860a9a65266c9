"""The planner's search among choices: what it takes where the models are right about them, and where they are wrong."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspass.passes import devices
from dspass.passes.base import Holding
from dspass.planner.choices import Choices
from dspass.planner.mincut import Value
from dspass.planner.record import BudgetError, Decision, Setting
from dspass.planner.values import Held
from tests.told import ToldPlanner, told


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), min_size=1, max_size=8),
    st.lists(st.tuples(st.floats(0.01, 9), st.integers(0, 20), st.integers(0, 5)), max_size=3),
)
@settings(max_examples=200, deadline=None)
def test_a_larger_budget_never_plans_a_slower_step_or_exceeds_itself(
    peaks: list[tuple[int, int]], away: list[tuple[float, int, int]]
) -> None:
    """Whatever the model believes of the peaks, and whatever states may wait on the host."""
    fastest = float("inf")
    more = [Setting(states=("x",), states_bytes=b, part_bytes=p, copy_seconds=s) for s, b, p in away]
    given = (Setting(), *more)
    for budget in range(80, 152):
        try:
            _, plan = told(budget, [m for m, _ in peaks], [r for _, r in peaks], given).plan()
        except BudgetError as error:
            assert fastest == float("inf"), "a larger budget was refused"
            assert error.smallest > budget  # noqa: PT017
            told(error.smallest, [m for m, _ in peaks], [r for _, r in peaks], given).plan()
            continue
        assert plan.peak <= budget
        assert plan.seconds + plan.states_seconds <= fastest * (1 + 1e-9)
        assert plan.frontier[plan.chosen].seconds == pytest.approx(plan.seconds + plan.states_seconds)
        assert all(a.peak > b.peak or b == plan.frontier[plan.chosen] for a, b in itertools.pairwise(plan.frontier))
        fastest = plan.seconds + plan.states_seconds


def test_a_choice_that_runs_for_one_setting_is_known_for_others() -> None:
    """The model took it to be too large beside states on the host."""
    given = (Setting(), Setting(states=("x",), states_bytes=1, part_bytes=3, copy_seconds=1.0))
    with pytest.raises(BudgetError) as refused:
        told(80, [1, 2], [2, 1], given).plan()
    told(refused.value.smallest, [1, 2], [2, 1], given).plan()


def test_the_host_has_room_for_saved_values_and_states_together() -> None:
    """The faster choice holds 60 bytes there, and the states are 80: with room for 100 each fits alone, and not both."""

    def planner(budget: int, host: int) -> ToldPlanner:
        made = told(budget, [10, 15], [10, 15], (Setting(), Setting(states=("x",), states_bytes=80, copy_seconds=1.0)))
        choices: Any = made.choices
        choices.on = replace(devices.CPU, host_memory_bytes=host)
        choices.ways = [(Held("offload_saved", Holding(bytes=0, host_bytes=60)),)]
        choices.values = [SimpleNamespace(bytes=60)]
        choices.found[0] = replace(choices.found[0], ways=frozenset({(0, 0)}))
        return made

    assert planner(40, 0)._fastest(1.0) == planner(40, 140)._fastest(1.0) == (0, 1)
    assert planner(40, 100)._fastest(1.0) == (1, 1)
    with pytest.raises(BudgetError) as refused:
        planner(31, 100).plan()
    assert refused.value.smallest == 35


class _Before(Choices):
    """Choices of two values, the second made of the first, where the first was computed again before."""

    def __init__(self, *values: Value) -> None:
        self.values, self.ways, self._whole = list(values), [(), ()], set()
        self._number = {"x": 0, "y": 1}
        self.on, self.in_flight = devices.CPU, 1
        self.prior = Decision(saved=("y",), recomputed=("x",))


def test_what_was_decided_before_is_no_choice_where_it_cannot_be_done() -> None:
    """Operators of another batch may be the same and drop a share of their values now."""
    x, y = Value(bytes=1, seconds=1.0), Value(bytes=1, seconds=1.0, inputs=(0,), needed=True)
    assert _Before(x, y)._before is not None
    assert _Before(replace(x, recomputable=False), y)._before is None
    assert _Before(x, replace(y, savable=False))._before is None


def test_what_an_error_says_is_enough() -> None:
    with pytest.raises(BudgetError, match=r"takes 82\.86 MB on each rank") as refused:
        told(1, [1], [82_854_308]).plan()
    assert refused.value.smallest == 82_860_000
