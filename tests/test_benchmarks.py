"""The parts of the benchmarks that compute: comparisons and tables. What they measure is not timed here."""

from __future__ import annotations

import pytest

from benchmarks.memory import Point, build, compare, plot, table


def point(system: str, setting: str, peak: int, milliseconds: float, budget: int | None = None) -> Point:
    made = Point(system, setting, budget=budget, predicted=budget and peak, peak=peak * 10**6, losses=[1.0, 0.5, 0.25])
    made.predicted = made.peak if budget else None
    made.seconds = [milliseconds / 1e3] * 3
    return made


def points() -> list[Point]:
    return [
        point("dspass", "unplanned", 100, 10),
        point("dspass", "fastest", 90, 10, 10**15),
        point("dspass", "60 MB", 60, 12, 60_000_000),
        point("inductor", "dp 1.00", 100, 11),
        point("inductor", "dp 0.00", 60, 16),
        point("checkpoint", "", 50, 15),
    ]


def test_peers_are_compared_with_the_best_at_no_more_memory_and_at_no_more_time() -> None:
    found = {c.peer.name: (c.time, c.memory) for c in compare(points())}
    assert found["inductor dp 1.00"] == (pytest.approx(10 / 11), 0.9)
    assert found["inductor dp 0.00"] == (pytest.approx(12 / 16), 1.0)
    assert found["checkpoint"] == (None, pytest.approx(60 / 50)), "a point of the peer's that needs less memory is said"


def test_the_table_says_what_was_missed() -> None:
    measured = points()
    text = table("gpt", measured)
    assert "- met: measured peak within the budget (1 % grace): 2 of 2" in text
    assert "1 peers' points take less memory than all of ours" in text
    assert "- missed: at equal time the median peak is at most 0.9 of a peer's: 1.00 of 3" in text
    assert "| checkpoint | none | 1.200 |" in text
    measured.append(Point("dspass", "1 MB", budget=10**6, error="refused: too small"))
    assert "- failed: dspass 1 MB: refused: too small" in table("gpt", measured)
    measured[2].peak = 70_000_000
    measured[2].losses[1] = 0.4
    text = table("gpt", measured)
    assert "- missed: measured peak within the budget (1 % grace): 1 of 2" in text
    assert "- missed: losses bitwise those of the unplanned run" in text
    assert "2.0e-01" in text


def test_the_plot_has_a_mark_for_every_point() -> None:
    assert plot("gpt & more", points()).count("<title>") == 6
    assert "gpt &amp; more" in plot("gpt & more", points())


@pytest.mark.parametrize("name", ["gpt", "llama", "vit"])
def test_models_answer_a_loss(name: str) -> None:
    model, args, kwargs, blocks = build(name, "tiny")
    answer = model(*args, **kwargs)
    loss = getattr(answer, "loss", answer)
    assert loss.dim() == 0
    assert len(blocks) == 2
