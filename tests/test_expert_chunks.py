"""How many chunks a layer of experts is computed in: one layer's clock, and its choice beside predictions of whole steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dspass
from dspass.passes.expert_chunks import MOST, Times, layer_seconds
from dspass.report import Report
from tests.test_expert_reports import Net, experts_on, tokens

SECONDS = st.floats(0.0, 10.0, allow_subnormal=False)  # which a share of is nothing


def times(link: float, products: float, *, latency: float = 0.0, aside: float = 0.0, copy: float = 0.0) -> Times:
    def send(share: float) -> float:
        return latency + link * share

    return Times(forward=products, aside=aside, copy=copy, weights=copy, there=send, back=send)


def test_one_chunk_waits_for_all_its_rows() -> None:
    assert layer_seconds(times(3.0, 2.0), 1, trains=False) == 3 + 2 + 3
    assert layer_seconds(times(3.0, 2.0), 1) == (3 + 2 + 3) + (3 + 2 + 3), "gradients of weights run on the way back"
    assert layer_seconds(times(1.0, 2.0), 1) == (1 + 2 + 1) + (1 + 2 + 2)
    assert layer_seconds(times(3.0, 2.0, aside=1.0), 1, trains=False) == 3 + 2 + 3, "done while rows arrive"


def test_chunks_send_while_they_compute() -> None:
    assert layer_seconds(times(2.0, 2.0), 2, trains=False) == 1 + 2 + 1, "first rows, both products, last rows"
    assert layer_seconds(times(4.0, 0.0), 4, trains=False) == 8, "there is nothing to hide it"


def test_uneven_routing_leaves_less_to_hide() -> None:
    even, uneven, all_in_one = (layer_seconds(times(2.0, 2.0), 4, imbalance) for imbalance in (1.0, 2.0, 4.0))
    assert even < uneven < all_in_one
    assert all_in_one == layer_seconds(times(2.0, 2.0), 1)


@settings(max_examples=200, deadline=None)
@given(SECONDS, SECONDS, SECONDS, SECONDS, st.integers(1, MOST), st.floats(1.0, 4.0))
def test_no_resource_is_used_twice_at_a_time(
    link: float, products: float, latency: float, aside: float, chunks: int, imbalance: float
) -> None:
    known = times(link, products, latency=latency, aside=aside)
    sending = 4 * (link + chunks * latency)
    computing = 3 * products + 3 * aside
    found = layer_seconds(known, chunks, imbalance)
    assert found >= max(sending, computing) * (1 - 1e-9)
    assert found <= (sending + computing) * (1 + 1e-9)


def step(world: int, hidden: int, inner: int, count: int, **own: Any) -> tuple[Report, str]:
    torch._dynamo.reset()
    with torch.device("meta"):
        net = Net(2, hidden, inner, 64)
    config = experts_on(3, None, **own) | {"bf16": {"enabled": True}}
    report = dspass.explain(net, tokens(count), config=config, world_size=world, device="h100")
    return report, next(p.summary for p in report.passes if p.name == "divide_experts")


@pytest.mark.parametrize(
    ("world", "inner", "imbalance"),
    [(16, 1408, 1.0), (16, 8192, 1.0), (16, 8192, 2.0), (8, 1408, 1.0)],
    ids=["two nodes", "two nodes, wide", "two nodes, wide, uneven", "one node"],
)
def test_the_choice_is_about_as_fast_as_any(world: int, inner: int, imbalance: float) -> None:
    """One layer's clock beside the cost model's of the whole step, with each number written down: within 2 %."""

    def predicted(**own: Any) -> float:
        experts = {"expected_imbalance": imbalance, **own}
        return step(world, 2048, inner, 8192, experts=experts)[0].step_seconds

    written = {n: predicted(chunks=n) for n in (1, 2, 4)}
    assert predicted() <= min(written.values()) * 1.02
    if world == 16:
        assert predicted() < written[1] * 0.97


def test_one_chunk_where_nothing_overlaps_or_a_person_says_so() -> None:
    for own in ({"chunks": 1}, {"chunks": 3}):
        _, said = step(16, 64, 64, 64, experts=own)
        assert ("in 3 chunks" in said) == (own["chunks"] == 3)
    net = Net()
    report = dspass.explain(net, tokens(64), config=experts_on(3), world_size=2, device="cpu")
    assert "chunks" not in next(p.summary for p in report.passes if p.name == "divide_experts")
