"""Rows that go to experts and back in few bits, on real ranks: the numbers are those of rounding by hand, and bytes are counted
as they are sent."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dspass
from dspass.config import Config
from dspass.engines import engine_of
from dspass.passes.base import PassContext
from dspass.passes.devices import device
from dspass.passes.nodes import ROWS
from dspass.passes.quantise_exchanges import QuantiseExchanges
from dspass.passes.text import print_graph
from dspass.quantising import relative
from dspass.report import Report
from dspass.runtime import quantise
from dspass.runtime.formats import FORMATS, Format
from dspass.runtime.quantise import rounding_squares, row_block, squares
from tests.ranks import run
from tests.test_expert_reports import Net, counts_bytes, sent_to_experts, tokens
from tests.test_passes import apply, around, toy_of
from tests.training import Batch, close, train, without_inductor, zero

EXPERTS, WIDTH, BLOCK = 4, 40, 32  # two blocks of 32 for 40 values: 20 of each hold some


class RoundedRows(torch.autograd.Function):
    """Each row of a matrix, and of its gradient, as it arrives."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, format: str) -> torch.Tensor:
        ctx.format = format
        return by_hand(rows, format)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return by_hand(grads[0], ctx.format), None


def by_hand(rows: torch.Tensor, format: str) -> torch.Tensor:
    """Two blocks to each row, of which the second ends with what is filled up."""
    codes, scales = torch.ops.dspass.quantise_bucket([rows.contiguous()], [WIDTH], rows.shape[0], format, BLOCK)
    (found,) = torch.ops.dspass.dequantise_bucket(codes, scales, [WIDTH], format, BLOCK, rows.dtype)
    return found


class Routed(nn.Module):
    """Experts whose tokens choose them: the batch says how. ``format``: what its rows are rounded to on their ways."""

    def __init__(self, format: str | None = None) -> None:
        super().__init__()
        self.format = format
        self.into = nn.Linear(6, WIDTH)
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, 7) / 6)
        self.down = nn.Parameter(torch.randn(EXPERTS, 7, WIDTH) / 3)

    def travel(self, rows: torch.Tensor) -> torch.Tensor:
        return rows if self.format is None else RoundedRows.apply(rows, self.format)  # type: ignore[no-any-return]

    def forward(self, x: torch.Tensor, scores: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        weights, chosen = torch.softmax(scores, -1).topk(2)
        rows, positions, ends = torch.ops.dspass.permute_experts(self.into(x), chosen, EXPERTS)
        rows = torch.tanh(torch.ops.dspass.grouped_product(self.travel(rows), self.up, ends))
        rows = self.travel(torch.ops.dspass.grouped_product(rows, self.down, ends))
        return (torch.ops.dspass.unpermute_experts(rows, positions, weights) - y).square().mean()


def batch(draw: torch.Generator, rank: int, call: int, even: bool = False) -> Batch:
    """Unless ``even``, each rank another number of tokens, of which none of rank 1's goes to rank 0."""
    count = 9 if even else 9 + 4 * rank
    scores = torch.randn(count, EXPERTS, generator=draw)
    if rank and not even:
        scores[:, :2] = -9.0
    return torch.randn(count, 6, generator=draw), scores, torch.randn(count, WIDTH, generator=draw)


def few_bits(format: str | None, *, experts: dict[str, Any] | None = None, **quantise: Any) -> dict[str, Any]:
    own: dict[str, Any] = {"quantise": {"exchanges": format, "block": BLOCK, **quantise}} if format else {}
    return zero(3, expert_parallel={"enabled": True}, dspass=own | ({"experts": experts} if experts else {}))


def _beside_rounding_by_hand(format: str, even: bool, inductor: bool) -> dict[str, Any]:
    builds = iter([Routed(format), Routed()])  # the reference's comes first
    experts = {"capacity_factor": float(EXPERTS)} if even else None
    torch.manual_seed(0)

    def build() -> nn.Module:
        found = next(builds)
        torch.manual_seed(3)
        for param in found.parameters():
            nn.init.normal_(param, std=0.3)
        return found

    data = functools.partial(batch, even=even)
    # Sharded first: a model that is not yet runs its first call whole.
    config = few_bits(format, experts=experts)
    return train(build, data, config, steps=3, how="shard", inductor=inductor)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("format", "even", "inductor"),
    [
        ("int8", False, False),
        ("fp6_e3m2", True, False),
        ("int4", False, True),
    ],
)
def test_the_numbers_are_those_of_rounding_by_hand(format: str, even: bool, inductor: bool) -> None:
    """Also where sizes are known only at run time, and Inductor compiles for all of them."""
    results = run(2, _beside_rounding_by_hand, format, even, inductor)
    close(results, within=1e-4)  # a value near the middle of two codes may be rounded to the other one


@without_inductor
def _trained(config: dict[str, Any]) -> tuple[Report, dict[Any, Any]]:
    torch.manual_seed(0)
    model: Any = Routed()
    compiled: Any = torch.compile(model, backend="deepspeed", options=config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    draw = torch.Generator().manual_seed(1)
    for _ in range(2):
        data = [batch(draw, r, 0) for r in range(dist.get_world_size())][dist.get_rank()]
        compiled(*data).backward()
        optimizer.step()
        optimizer.zero_grad()
    engine = engine_of(model)
    assert engine is not None
    return dspass.explain(model), engine.row_errors


def test_bytes_are_counted_as_they_are_sent_and_errors_told() -> None:
    """The batch says where rows go, so that as many go whole."""
    whole, few = (run(2, _trained, config) for config in (few_bits(None), few_bits("int8", max_relative_error=1e-4)))
    for (before, nothing), (after, sums) in zip(whole, few, strict=True):
        told = counts_bytes(1, EXPERTS, 2)
        rows, rest = divmod(sent_to_experts(before) - told, 4 * WIDTH)
        assert rows
        assert not rest
        assert sent_to_experts(after) - told == rows * 2 * (BLOCK + 4)
        found = [t for t in after.quantised if t.kind == "rows"]
        ways = ("forward", "forward", "backward", "backward")
        assert [(t.name, t.format, t.direction) for t in found] == [("up", "int8", way) for way in ways]
        said = [p.summary for p in after.passes if p.name == "quantise_exchanges"]
        assert said == ["2 of 2 all-to-alls of rows as int8 in blocks of 32, 0.45 of their bytes"] * 2
        assert "rows" in str(after).split("In few bits")[1]
        assert len(sums) == 4
        assert all(t.relative_error is not None and 1e-3 < t.relative_error < 1e-2 for t in found)
        assert [note.split(" by up to")[0] for note in after.notes if "in few bits" in note] == ["Rows of up are off"]
        assert not nothing
        assert not [t for t in before.quantised if t.kind == "rows"]


@pytest.mark.parametrize(
    ("name", "dtype", "reason"),
    [
        ("routed", torch.float32, "codes and scales are no smaller"),  # five values of four bytes, and a scale
        ("quantised_routed", torch.float64, "they are not fp32, fp16 or bf16"),
    ],
)
def test_rows_that_cannot_be_smaller_travel_whole(name: str, dtype: torch.dtype, reason: str) -> None:
    graph, _ = around(toy_of(name), QuantiseExchanges, "forward")
    for start in (n for n in graph.nodes if n.target in ROWS):
        start.args[0][0].meta["val"] = start.args[0][0].meta["val"].to(dtype)
    after, said = apply(QuantiseExchanges(format="int8"), graph, "forward")
    assert said == f"0 of 2 all-to-alls of rows; 2 not: {reason}"
    assert print_graph(after) == print_graph(graph)


# -- predictions ---------------------------------------------------------------------------------------------------------


def predicted(hidden: int, count: int = 64, **quantise: Any) -> Report:
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = few_bits(quantise.pop("format", "int8"), **quantise)
    return dspass.explain(Net(hidden=hidden), tokens(count), config=config, world_size=4, device="h100")


def test_predicted_bytes_are_those_of_the_formula() -> None:
    """Evenly routed, codes and scales for 4 * tokens * k * (N - 1) / N rows, forward and backward."""
    report = predicted(100, buckets="all")
    rows = 2 * 4 * 64 * 2 * 3 // 4
    assert sent_to_experts(report) - counts_bytes(2, 8, 4) == rows * 4 * (32 + 4)  # 100 values in four blocks of 32


def test_what_compute_hides_stays_whole() -> None:
    """On a device that computes while it sends: the shared expert's product runs between the first's start and its wait. Rows
    are as many as are expected."""
    graph, item = around(toy_of("quantised_routed"), QuantiseExchanges, "forward")
    gm = torch.fx.GraphModule(nn.Module(), graph)
    there, back = (n for n in gm.graph.nodes if n.target in ROWS)
    rates = {"latency": 0.0, "link": 1e6, "node_link": 1e6}
    for rate, taken, left in ((1e3, [back], ["1 not: compute hides them"]), (1e15, [there, back], [])):
        on = replace(device("h100"), **rates, memory=1e15, rates={torch.float32: rate})
        with mock.patch("dspass.passes.devices.of_graph", return_value=on):
            found = item.taken(gm.graph, [there, back], PassContext(), lambda start: None)  # type: ignore[attr-defined]
        assert found == (taken, left)


# -- what rounding changes -----------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    format=st.sampled_from(sorted(FORMATS)),
    rows=st.integers(10, 40),
    width=st.integers(100, 300),
    seed=st.integers(0, 100),
    scale=st.sampled_from([1e-6, 1.0, 1e4]),
)
def test_errors_are_near_what_rounding_does(format: str, rows: int, width: int, seed: int, scale: float) -> None:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * scale
    block = row_block(width, 64)
    codes, scales = torch.ops.dspass.quantise_bucket([x], [width], rows, format, block)
    (back,) = torch.ops.dspass.dequantise_bucket(codes, scales, [width], format, block, torch.float32)
    taken, true = relative(rounding_squares(codes, scales, format, width)), relative(squares(x, back))
    assert taken == pytest.approx(true, rel=0.15)


def test_errors_of_a_large_row_are_taken_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a shard of a parameter: what is unpacked at a time is little."""
    x = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
    codes, scales = torch.ops.dspass.quantise_bucket([x], [1000], 2, "int4", 64)
    whole = rounding_squares(codes, scales, "int4", 1000)
    unpacked, most = quantise._unpacked, []

    def watched(codes: torch.Tensor, format: Format) -> torch.Tensor:
        numbers = unpacked(codes, format)
        most.append(numbers.numel())
        return numbers

    monkeypatch.setattr(quantise, "_unpacked", watched)
    monkeypatch.setattr(quantise, "_AT_A_TIME", 200)
    torch.testing.assert_close(rounding_squares(codes, scales, "int4", 1000), whole)
    assert max(most) <= 200
    assert not rounding_squares(codes[:, :0], scales[:, :0], "int4", 0).any()


@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 5000), block=st.integers(1, 64).map(lambda n: 16 * n))
def test_blocks_of_a_row_are_even(width: int, block: int) -> None:
    """As many as were asked for, none larger, and less is filled up than with those that were."""
    found = row_block(width, block)
    assert found <= block
    assert found % 16 == 0
    count = -(-width // block)
    assert -(-width // found) == count
    assert count * found - width < 16 * count


def test_no_rows_have_no_blocks() -> None:
    codes, scales = torch.ops.dspass.quantise_bucket([torch.empty(0, WIDTH)], [WIDTH], 0, "int8", BLOCK)
    assert (tuple(codes.shape), tuple(scales.shape)) == ((0, 2 * BLOCK), (0, 2))
    (back,) = torch.ops.dspass.dequantise_bucket(codes, scales, [WIDTH], "int8", BLOCK, torch.float32)
    assert tuple(back.shape) == (0, WIDTH)


def test_where_no_rows_travel_the_key_is_noted() -> None:
    config = few_bits("int8")
    assert not Config.load(config).ignored
    (note,) = Config.load({**config, "expert_parallel": {"enabled": False}}).ignored
    assert (note.key, note.value) == ("dspass.quantise.exchanges", "int8")
    assert "it acts with expert_parallel" in note.reason
