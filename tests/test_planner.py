"""The planner: its solver against all choices, its peaks against real runs, its plans against unplanned numbers."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.fx as fx
from hypothesis import given, settings
from hypothesis import strategies as st

import dspass
from dspass.planner.mincut import Choice, Value, exhaustive, hull, solve
from dspass.planner.values import can_recompute
from tests.models import MODELS as DIFFICULT
from tests.models import Mlp, points
from tests.ranks import run
from tests.test_explain import MODELS
from tests.training import close, train, zero


@st.composite
def problems(draw: st.DrawFn) -> list[Value]:
    """Random graphs of up to ten values: inputs, views that cannot be saved, random numbers that cannot be made again."""
    count = draw(st.integers(1, 10))
    values = []
    for i in range(count):
        inputs = tuple(sorted(draw(st.sets(st.integers(0, i - 1), max_size=3)))) if i else ()
        savable = not inputs or draw(st.integers(0, 4)) > 0
        values.append(
            Value(
                bytes=draw(st.integers(0, 9)),
                seconds=float(draw(st.integers(0, 9))),
                save_seconds=float(draw(st.integers(0, 2))),
                inputs=inputs,
                needed=i == count - 1 or draw(st.booleans()),
                savable=savable,
                recomputable=bool(inputs) and (not savable or draw(st.integers(0, 5)) > 0),
            )
        )
    return values


def holds(values: list[Value], choice: Choice) -> bool:
    """Equations 2 to 4: what is needed is at hand, and so is all that it is computed from."""
    at_hand = choice.saved | choice.recomputed
    return (
        not choice.saved & choice.recomputed
        and all(i in at_hand for i, v in enumerate(values) if v.needed)
        and all(u in at_hand for i in choice.recomputed for u in values[i].inputs)
        and all(values[i].savable for i in choice.saved)
        and all(values[i].recomputable for i in choice.recomputed)
    )


@given(problems())
@settings(max_examples=150, deadline=None)
def test_every_corner_is_the_fastest_of_its_size(values: list[Value]) -> None:
    for choice in hull(values):
        assert holds(values, choice)
        best = exhaustive(values, choice.bytes)
        assert best is not None
        assert best.seconds == pytest.approx(choice.seconds, abs=1e-9)


@given(problems(), st.floats(0, 5))
@settings(max_examples=100, deadline=None)
def test_no_choice_is_cheaper_at_a_price(values: list[Value], price: float) -> None:
    found = solve(values, price)
    for choice in hull(values):
        assert found.seconds + price * found.bytes <= choice.seconds + price * choice.bytes + 1e-9


@given(problems())
@settings(max_examples=100, deadline=None)
def test_corners_trade_bytes_for_seconds(values: list[Value]) -> None:
    corners = hull(values)
    for a, b in itertools.pairwise(corners):
        assert a.bytes >= b.bytes
        assert a.seconds <= b.seconds + 1e-9


def test_equal_layers_change_sides_one_after_another() -> None:
    """Weights set layers apart that cost the same, so a budget between all and nothing is used."""
    layers = 6
    values = [Value(bytes=0, seconds=0.0, recomputable=False)]
    for i in range(layers):
        values.append(Value(bytes=10, seconds=1.0, inputs=(i,), needed=True, weight=1 + 0.01 * (layers - i)))
    corners = hull(values)
    assert [c.bytes for c in corners] == [10 * k for k in range(layers, -1, -1)]
    assert all(max(c.recomputed) < min(c.saved - {0}) for c in corners[1:-1]), "the early ones are computed again first"


def test_a_value_must_go_somewhere() -> None:
    with pytest.raises(ValueError, match="neither be saved nor computed again"):
        Value(bytes=1, seconds=1.0, savable=False, recomputable=False)


def test_what_can_be_computed_again() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    aten = torch.ops.aten
    again = [
        graph.call_function(aten.mm.default, (x, x)),
        graph.call_function(aten._scaled_dot_product_flash_attention_for_cpu.default, (x, x, x)),
    ]
    never = [
        x,
        graph.call_function(aten.rand_like.default, (x,)),
        graph.call_function(aten.native_dropout.default, (x, 0.1, True)),
        graph.call_function(aten._scaled_dot_product_flash_attention_for_cpu.default, (x, x, x, 0.1)),
        graph.call_function(aten.copy_.default, (x, x)),
    ]
    for node in [*again, *never]:
        node.meta["val"] = torch.empty(2, 2)
    assert [can_recompute(n) for n in again] == [True] * len(again)
    assert [can_recompute(n) for n in never] == [False] * len(never)


# -- plans on real runs ----------------------------------------------------------------------------------------


def _options(stage: int, budget: int | None) -> dict[str, Any]:
    own = {} if budget is None else {"memory_budget": budget}
    return {"zero_optimization": {"stage": stage}, "dspass": {"bucket_bytes": 400_000, **own}}


def _runs(name: str, stage: int, shares: list[float]) -> list[tuple[float, int, list[float], str]]:
    """Unplanned first, then under each share of its peak: budget, measured peak, losses, and what the report says."""
    found: list[tuple[float, int, list[float], str]] = []
    for share in [0.0, *shares]:
        torch.manual_seed(0)
        torch._dynamo.reset()
        model, args, kwargs = MODELS[name]()
        budget = round(share * found[0][1]) if share else None
        compiled = torch.compile(model, backend="deepspeed", options=_options(stage, budget))
        optimizer = torch.optim.AdamW(compiled.parameters())
        losses = []

        def step() -> None:
            answer = compiled(*args, **kwargs)  # noqa: B023
            loss = answer if isinstance(answer, torch.Tensor) else answer.loss
            loss.backward()
            optimizer.step()  # noqa: B023
            optimizer.zero_grad()  # noqa: B023
            losses.append(loss.item())  # noqa: B023

        for _ in range(2):
            step()
        with dspass.measure(model):
            for _ in range(2):
                step()
        report = dspass.explain(model)
        found.append((float(budget or 0), report.memory.peak_bytes, losses, str(report)))
    return found


@pytest.mark.parametrize(("name", "stage", "shares"), [("gpt", 3, [0.9, 0.75])])
def test_a_budget_holds_and_changes_no_number(name: str, stage: int, shares: list[float]) -> None:
    results = run(2, _runs, name, stage, shares)
    for one in results:
        (_, free, wanted, _), *planned = one
        for budget, peak, losses, text in planned:
            assert peak <= budget * 1.01
            assert losses == wanted
            assert "computed again" in text
        assert len({peak for _, peak, _, _ in planned}) == len(planned) < free


def _refused(stage: int) -> str:
    model = Mlp()
    compiled = torch.compile(model, backend="deepspeed", options=_options(stage, 1000))
    try:
        for _ in range(2):
            compiled(*points(torch.Generator().manual_seed(0), 0, 0)).backward()
    except Exception as error:
        inner = getattr(error, "inner_exception", error)
        return f"{type(inner).__name__}: {inner}"
    return "nothing was said"


def test_an_impossible_budget_is_refused_on_every_rank_with_the_smallest() -> None:
    first, second = run(2, _refused, 3)
    assert first == second
    assert first.startswith("BudgetError: dspass.memory_budget of 1 KB is too small: the smallest plan")
    assert "more ranks" in first


@pytest.mark.parametrize("name", ["checkpointed", "uneven", "broken", "dropout"])
def test_difficult_models_under_a_budget(name: str) -> None:
    build, batches = DIFFICULT[name]
    config = zero(3, dspass={"memory_budget": "10MB", "fallback_random": True})
    close(run(2, train, build, batches, config, steps=4, random=name == "dropout"))
