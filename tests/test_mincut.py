"""What to save: the solver against all choices of small graphs."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.fx as fx
from hypothesis import given, settings
from hypothesis import strategies as st

from dspass.planner.mincut import Choice, Value, Way, contract, exhaustive, hull, solve
from dspass.planner.values import can_recompute


@st.composite
def problems(draw: st.DrawFn, most: int = 10, ways: int = 0) -> list[Value]:
    """Random graphs of up to ``most`` values: inputs, views that cannot be saved, random numbers that cannot be made again;
    some in up to ``ways`` other ways than as they are."""
    count = draw(st.integers(1, most))
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
                ways=tuple(
                    Way(bytes=draw(st.integers(0, 9)), seconds=float(draw(st.integers(0, 9))))
                    for _ in range(draw(st.integers(0, ways)) if savable else 0)
                ),
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
        and {i for i, _ in choice.ways} <= choice.saved
        and len({i for i, _ in choice.ways}) == len(choice.ways)
    )


@given(problems())
@settings(max_examples=150, deadline=None)
def test_every_corner_is_the_fastest_of_its_size(values: list[Value]) -> None:
    for choice in hull(values):
        assert holds(values, choice)
        best = exhaustive(values, choice.bytes)
        assert best is not None
        assert best.seconds == pytest.approx(choice.seconds, abs=1e-9)


@given(problems(most=6, ways=2))
@settings(max_examples=150, deadline=None)
def test_every_corner_is_the_fastest_of_its_size_in_several_ways(values: list[Value]) -> None:
    """Values may also be held elsewhere, or in fewer bytes; the solver's corners stay exact."""
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


@given(problems(most=8, ways=2), st.floats(0, 5))
@settings(max_examples=150, deadline=None)
def test_at_any_price_a_corner_is_the_cheapest(values: list[Value], price: float) -> None:
    """None is missing, though a group is only asked again where its neighbours differ."""
    found = solve(values, price)
    least = min(choice.seconds + price * choice.bytes for choice in hull(values, most=1000))
    assert least == pytest.approx(found.seconds + price * found.bytes, abs=1e-9)


def test_equal_layers_change_sides_one_after_another() -> None:
    """Weights set layers apart that cost the same, so a budget between all and nothing is used."""
    layers = 6
    values = [Value(bytes=0, seconds=0.0, recomputable=False)]
    for i in range(layers):
        values.append(Value(bytes=10, seconds=1.0, inputs=(i,), needed=True, weight=1 + 0.01 * (layers - i)))
    corners = hull(values)
    assert [c.bytes for c in corners] == [10 * k for k in range(layers, -1, -1)]
    assert all(max(c.recomputed) < min(c.saved - {0}) for c in corners[1:-1]), "the early ones are computed again first"


def test_contraction_leaves_little_to_cut() -> None:
    """Layers part at what the backward reads, however many there are, and a chain of fused operators is one value."""
    values = [Value(bytes=0, seconds=0.0, recomputable=False)]
    for _ in range(200):
        x = len(values) - 1
        values.append(Value(bytes=8, seconds=0.1, inputs=(x,)))
        values.append(Value(bytes=8, seconds=0.1, inputs=(x + 1,)))
        values.append(Value(bytes=4, seconds=0.0, inputs=(x + 2,), savable=False))
        values.append(Value(bytes=4, seconds=5.0, inputs=(x + 3,), needed=True))
    assert len(contract(dict(enumerate(values)))) == 200  # a layer is one: its product, with the chain before it
    assert not contract(contract(dict(enumerate(values))), 1e-3)


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
