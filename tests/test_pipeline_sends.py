"""Messages between pipeline stages in few bits: what travels, what is rounded, and what is counted."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dspass
from dspass import pipeline_times
from dspass.config import Config
from dspass.engines import engine_of
from dspass.planner.schedule_times import Link, StageCost, peak_bytes, simulate
from dspass.planner.schedules import make
from dspass.report import PipelineMessage, Report
from dspass.runtime import sends
from dspass.runtime.axis import Axis
from dspass.runtime.formats import FORMATS
from dspass.runtime.pipeline import Executor, Value
from dspass.runtime.quantise import DTYPES, row_block, row_bytes
from dspass.runtime.schedule import Direction
from dspass.runtime.sends import Packing
from tests import test_pipeline_edges as edges
from tests.models import Block
from tests.ranks import run
from tests.test_pipeline_edges import Pair, pipeline
from tests.test_report_pipeline import a_record, a_report
from tests.training import sgd, without_inductor, zero

WIDTH, BLOCK = 40, 32  # two blocks of 32 for 40 values: 20 of each hold some
INT8 = Packing(format="int8", block=BLOCK)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hop(value: Value, tensor: torch.Tensor) -> torch.Tensor:
    """What the next rank has of ``tensor``."""
    return value.unpack(value.pack(tensor))


# -- one value -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", sorted(FORMATS))
def test_values_arrive_as_they_lie(format: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Off by no more than half a step of a row's block, however many parts are quantised one after another."""
    tensor = normal(3, 5, 100).to(dtype)
    value = Value.like("x", tensor, True, Packing(format=format, block=64))
    packed = value.pack(tensor)
    assert value.sent_bytes == packed.nbytes == value.buffer("cpu").nbytes == 15 * row_bytes(100, format, 64)
    found = value.unpack(packed)
    assert (found.dtype, found.shape, found.stride()) == (dtype, tensor.shape, tensor.stride())
    codes, scales = torch.ops.dspass.quantise_bucket([tensor], [100], 15, format, row_block(100, 64))
    (by_hand,) = torch.ops.dspass.dequantise_bucket(codes, scales, [100], format, row_block(100, 64), dtype)
    assert torch.equal(found, by_hand.view(3, 5, 100))
    lost = value.squares(tensor, packed)
    assert lost[0] == pytest.approx((found.double() - tensor.double()).square().sum().item())
    assert lost[1] == pytest.approx(tensor.double().square().sum().item())
    monkeypatch.setattr(sends, "_AT_A_TIME", 250)
    assert torch.equal(value.pack(tensor), packed)
    assert torch.equal(value.unpack(packed), found)
    torch.testing.assert_close(value.squares(tensor, packed), lost)


def test_blocks_are_of_one_row_and_rows_are_of_what_lies_side_by_side() -> None:
    """A large value spoils its own pixel of a tensor that lies channels last, and none beside it."""
    tensor = normal(2, 48, 3, 4).to(memory_format=torch.channels_last)
    tensor[1, 7, 2, 3] = 1e6
    value = Value.like("x", tensor, True, Packing(format="int8", block=256))
    assert value.dims == (0, 2, 3, 1)
    assert value.sent_bytes == 2 * 3 * 4 * (48 + 4)
    found = hop(value, tensor)
    assert found.stride() == tensor.stride()
    off = (found - tensor).abs()
    assert off[1, :, 2, 3].max() > 1
    off[1, :, 2, 3] = 0
    assert 0 < off.max() < 0.03
    gradient = normal(2, 48, 3, 4)  # lies otherwise than the value
    assert hop(value, gradient).stride() == tensor.stride()
    torch.testing.assert_close(hop(value, gradient), gradient, atol=0.03, rtol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen_at_the_other_end(bad: float) -> None:
    tensor = normal(4, 64)
    tensor[2, 40] = bad
    found = hop(Value.like("x", tensor, True, INT8), tensor)
    assert found[2, 32:].isnan().all()
    assert found.isnan().sum() == 32
    zeros = torch.zeros(4, 64)
    assert torch.equal(hop(Value.like("x", zeros, True, INT8), zeros), zeros)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(64),
        torch.ones(4, 64, dtype=torch.bool),
        normal(4, 64).double(),
        torch.tensor(2.5),
        normal(512, 5),  # 16 codes and a scale for each row of five
        torch.empty(0, 64),
        torch.empty(64, 0),
    ],
    ids=["integers", "booleans", "fp64", "a number", "narrow rows", "no rows", "empty rows"],
)
def test_what_cannot_be_smaller_travels_whole(tensor: torch.Tensor) -> None:
    value = Value.like("x", tensor, True, INT8)
    assert value.packing is None
    assert value.sent_bytes == value.nbytes == tensor.nbytes
    assert torch.equal(hop(value, tensor), tensor)


@settings(max_examples=60, deadline=None)
@given(
    format=st.sampled_from(sorted(FORMATS)),
    dtype=st.sampled_from(DTYPES),
    block=st.integers(1, 8).map(lambda n: 16 * n),
    width=st.integers(30, 200),
    scale=st.sampled_from([1e-6, 1.0, 1e4]),
    seed=st.integers(0, 100),
)
def test_a_carried_value_is_rounded_once(
    format: str, dtype: torch.dtype, block: int, width: int, scale: float, seed: int
) -> None:
    """Half precision comes back exactly, since a block's largest does; of fp32 each scale may change by its last bits."""
    tensor = (normal(6, width, seed=seed) * scale).to(dtype)
    value = Value.like("x", tensor, True, Packing(format=format, block=block))
    once = hop(value, tensor)
    again = hop(value, once)
    if dtype is torch.float32:
        torch.testing.assert_close(again, once, rtol=2**-21, atol=0)
    else:
        assert torch.equal(again, once)
    far = functools.reduce(lambda t, _: hop(value, t), range(10), again)
    torch.testing.assert_close(far, once, rtol=2**-18, atol=0)


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"there is no format 'int7'.*nearest"):
        Packing(format="int7", block=64)
    with pytest.raises(ValueError, match=r"a block of 20 values cannot be"):
        Packing(format="int8", block=20)


# -- on two ranks --------------------------------------------------------------------------------------------------------


class Rounded(torch.autograd.Function):
    """A tensor, and its gradient, as they arrive."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, format: str) -> torch.Tensor:
        ctx.value = Value.like("x", tensor, True, Packing(format=format, block=BLOCK))
        return hop(ctx.value, tensor)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return hop(ctx.value, grads[0]), None


class Net(nn.Module):
    """Four blocks, each a stage or two of them; the last one reads what the first has made too. ``rounds`` are the blocks in
    front of which one process rounds as messages do, to ``format``."""

    def __init__(self, rounds: tuple[int, ...] = (), format: str = "int8") -> None:
        super().__init__()
        self.rounds, self.format = rounds, format
        self.embed, self.head = nn.Embedding(61, WIDTH), nn.Linear(WIDTH, 61, bias=False)
        self.blocks, self.norm = nn.ModuleList([Block(WIDTH) for _ in range(4)]), nn.LayerNorm(WIDTH)

    def travel(self, i: int, x: torch.Tensor) -> torch.Tensor:
        return Rounded.apply(x, self.format) if i in self.rounds else x  # type: ignore[no-any-return]

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = early = self.travel(1, self.blocks[0](self.embed(ids)))
        x = self.travel(2, self.blocks[1](x))
        x = self.travel(3, self.blocks[2](x))
        x = self.blocks[3](x) + self.travel(3, early)  # for its gradient, however far that is carried
        return nn.functional.cross_entropy(self.head(self.norm(x)).flatten(0, 1), labels.flatten())


def tokens(seed: int, rows: int = 8, length: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 61, (rows, length), generator=draw)
    return ids, ids.roll(-1, 1)


@without_inductor
def _beside_rounding_by_hand(schedule: str, rounds: tuple[int, ...], format: str) -> None:
    builds = iter([Net(rounds, format), Net()])  # the reference's comes first

    def build() -> nn.Module:
        model = next(builds)
        torch.manual_seed(3)
        for param in model.parameters():
            nn.init.normal_(param, std=0.15)
        return model

    section = pipeline(schedule=schedule, boundaries=[f"blocks.{i}" for i in (1, 2, 3)])
    # A value near the middle of two codes may be rounded to the other one, in a sum of another order.
    Pair(build, section, dspass={"quantise": {"sends": format, "block": BLOCK}}).train(tokens, within=1e-4)


@pytest.mark.parametrize(
    ("schedule", "rounds", "format"),
    [
        ("interleaved1f1b", (1, 2, 3), "int8"),
        ("zbv", (1, 3), "int8"),  # stages 1 and 2 lie on one rank
    ],
)
def test_the_numbers_are_those_of_rounding_by_hand(schedule: str, rounds: tuple[int, ...], format: str) -> None:
    """Activations and gradients of four stages, one value of which is carried through two of them, and not rounded more."""
    run(2, _beside_rounding_by_hand, schedule, rounds, format)


def options(sends: str | None = "int8", **quantise: Any) -> dict[str, Any]:
    own = {"quantise": {"sends": sends, "block": BLOCK, **quantise}} if sends else None
    return zero(0, pipeline=pipeline(boundaries=["blocks.2"]), dspass=own)


@without_inductor
def _trained(configs: list[dict[str, Any]]) -> list[tuple[list[float], str]]:
    """Losses of some steps, and the report, with each of ``configs``."""
    found = []
    for config in configs:
        torch.manual_seed(0)
        model = dspass.shard(Net(), config)
        compiled: Any = torch.compile(model, backend="deepspeed", options=config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        for _ in range(10):
            loss = compiled(*tokens(0))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        found.append((losses, json.dumps(dspass.explain(model).to_dict())))
    return found


@functools.cache
def trained() -> list[list[tuple[list[float], Report]]]:
    """By rank, of whole messages and of such in few bits."""
    results = run(2, _trained, [options(None), options(max_relative_error=1e-4)])
    return [[(losses, Report.from_dict(json.loads(text))) for losses, text in found] for found in results]


def test_it_trains_as_with_whole_messages() -> None:
    """Errors of one message have either sign, and a loss is a mean over 64 tokens: it is off by some eighth of what a message
    is, and by no more than twice that while steps by such gradients add up."""
    first, second = trained()
    assert [losses for losses, _ in first] == [losses for losses, _ in second], "ranks are told one loss"
    (whole, _), (few, report) = first
    assert report.pipeline is not None
    off = max(m.relative_error or 0.0 for m in report.pipeline.messages)
    assert few != whole
    assert few == pytest.approx(whole, rel=off / 4)
    assert few[-1] < 0.8 * few[0]


def test_bytes_are_predicted_as_they_are_sent() -> None:
    """Of two values, ``WIDTH`` numbers of a token each: codes in two blocks and their scales."""
    for rank, ((_, before), (_, after)) in enumerate(trained()):
        old, new = before.pipeline, after.pipeline
        assert old is not None
        assert new is not None
        for record, size in ((old, 4 * WIDTH), (new, 2 * (BLOCK + 4))):
            assert record.measured is not None
            assert record.predicted is not None
            assert record.measured.sent_bytes == record.predicted.sent_bytes == [2 * 8 * 8 * size] * 2
        assert old.rank == new.rank == rank
        assert not old.messages
        assert [(m.cut, m.direction, m.format) for m in new.messages] == [
            (0, "forward", "int8"),
            (0, "backward", "int8"),
        ]
        assert {(m.whole_bytes, m.sent_bytes) for m in new.messages} == {
            (2 * 2 * 8 * 4 * WIDTH, 2 * 2 * 8 * 2 * (BLOCK + 4))
        }
        assert all(m.relative_error is not None and 1e-3 < m.relative_error < 1e-2 for m in new.messages)
        assert any("in few bits)" in line for line in new.why)
        assert any(
            note.startswith("Messages over cut 0 forward, cut 0 backward are off by up to") for note in after.notes
        )
        assert "messages travel as int8: 10.2 KB" in str(after)


def test_a_prediction_has_the_same_bytes() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    predicted = dspass.explain(Net(), *tokens(0), config=options(), world_size=2).pipeline
    measured = trained()[0][1][1].pipeline
    assert predicted is not None
    assert predicted.predicted is not None
    assert measured is not None
    assert measured.measured is not None
    assert predicted.predicted.sent_bytes == measured.measured.sent_bytes
    assert predicted.messages == [dataclasses.replace(m, relative_error=None) for m in measured.messages]


# -- what is counted -----------------------------------------------------------------------------------------------------


def test_a_receive_takes_what_comes_and_what_reads_it_the_whole() -> None:
    """Of 10 bytes there 4 travel, of 7 back 3; by hand."""
    schedule, link = make("1f1b", 2, 2), Link(0, 0, 10, 7, 4, 3)
    cost = StageCost(1, 2, saved_bytes=100, working_bytes=3, static_bytes=1000)
    # Rank 0, its second forward: two micro-batches, what it makes, what it works in.
    # Rank 1, its first backward: one micro-batch, the next's input as it comes, the gradient that it makes, what it works in.
    assert peak_bytes(schedule, [cost] * 2, [link]) == (1000 + 200 + 10 + 3, 1000 + 100 + 4 + 7 + 3)
    wide = StageCost(0, 0, saved_bytes=10)  # saves what it reads: while that is unpacked both are there
    one = make("gpipe", 2, 1)
    assert peak_bytes(one, [wide] * 2, [Link(0, 0, 10, 0, 4, 0)])[1] == 14
    assert peak_bytes(one, [wide] * 2, [Link(0, 0, 10, 0)])[1] == 10
    bent = make("zbv", 1, 1)  # on one rank nothing travels
    held = [StageCost(1, 2, saved_bytes=100, held_bytes=40)] * 2
    assert peak_bytes(bent, held, [link]) == peak_bytes(bent, held, [Link(0, 0, 10, 7)]) == (207,)


# -- reports -------------------------------------------------------------------------------------------------------------

MESSAGES = [
    PipelineMessage(cut=0, direction="forward", format="int8", whole_bytes=4000, sent_bytes=1100, relative_error=0.005),
    PipelineMessage(
        cut=0, direction="backward", format="int8", whole_bytes=4000, sent_bytes=1100, relative_error=0.0062
    ),
    PipelineMessage(cut=1, direction="forward", format=None, whole_bytes=80, sent_bytes=80),
]


def test_reports_say_how_messages_travel() -> None:
    report = a_report(a_record(messages=MESSAGES))
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    said = (
        "messages travel as int8: 8.08 KB → 2.28 KB a micro-batch over all cuts; the first were off by 0.62 % at most"
    )
    assert said in " ".join(str(report).split())
    unknown = [dataclasses.replace(m, relative_error=None) for m in MESSAGES]
    assert "errors not measured" in " ".join(str(a_report(a_record(messages=unknown))).split())
    assert "no smaller" in " ".join(str(a_report(a_record(messages=MESSAGES[2:]))).split())
    page = report.to_html()
    assert "Messages of a micro-batch" in page
    assert "0.62 %" in page
    assert "Messages of a micro-batch" not in a_report(a_record()).to_html()
    assert "messages travel whole → messages travel as int8" in a_report(a_record()).diff(report)


def test_of_a_message_that_is_not_finite_the_next_one_is_measured() -> None:
    schedule = make("gpipe", 1, 2)
    timeline = simulate(schedule, [StageCost(1.0, 2.0)])
    alone = Axis(name="pipe", size=1, rank=0, ranks=(0,), group=cast(Any, None), backend="gloo")
    executor = Executor(
        schedule=schedule, axis=None, stages={}, device=torch.device("cpu"), loss=0, spans=list(timeline.spans[0])
    )
    wrong = torch.tensor([float("nan"), float("inf")], dtype=torch.float64)
    executor.rounding |= {(0, Direction.FORWARD): torch.tensor([1.0, 4.0]), (0, Direction.BACKWARD): wrong}
    assert pipeline_times.gather(executor, alone, 3, None).errors == {(0, Direction.FORWARD): 0.5}
    assert set(executor.rounding) == {(0, Direction.FORWARD)}


# -- configuration -------------------------------------------------------------------------------------------------------


def test_where_nothing_is_sent_the_key_is_noted() -> None:
    assert not Config.load(options()).ignored
    for section in ({}, {"stages": 1, "micro_batches": 4}):
        (note,) = Config.load({**options(), "pipeline": section}).ignored
        assert (note.key, note.value) == ("dspass.quantise.sends", "int8")
        assert "pipeline.stages" in note.reason


# -- the data axis in few bits -------------------------------------------------------------------------------------------


@without_inductor
def _data_axis_in_few_bits(gather: str) -> tuple[list[list[float]], list[dict[str, tuple[int, int]]], str]:
    """Losses, and the number and bytes of a step's collectives by kind, of parameters and gradients that travel whole, and in
    few bits; and what is said of the latter."""
    losses, sent, said = [], [], ""
    for few in (False, True):
        config = zero(3, pipeline=pipeline(gather=gather), dspass={"quantise": {"block": 64}})
        config["zero_optimization"] |= {"zero_quantized_weights": few, "zero_quantized_gradients": few}
        torch.manual_seed(0)
        model = edges.Net(width=64)
        dspass.shard(model, config)
        compiled: Any = torch.compile(model, backend="deepspeed", options=config)
        optimizer = sgd(model.parameters())
        losses.append([])
        for _ in range(6):
            loss = compiled(*edges.tokens(dist.get_rank() % 2))[0]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
        engine = engine_of(model)
        assert engine is not None
        sent.append({})
        for (kind, _, group, _), (count, size, _) in engine.traffic.last.items():
            assert group == "data"
            before = sent[-1].get(kind, (0, 0))
            sent[-1][kind] = before[0] + count, before[1] + size
        said = "; ".join(each.summary for c in engine.compilations for each in c.passes)
    return losses, sent, said


def test_stages_gather_and_reduce_in_few_bits() -> None:
    for losses, (whole, few), said in run(4, _data_axis_in_few_bits, "micro_batch"):
        assert losses[1] != losses[0]
        assert losses[1][-1] < losses[1][0] - 0.01
        torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=0.01, atol=0)
        assert few["all-gather"][0] == whole["all-gather"][0]
        assert few["all-gather"][1] < 0.35 * whole["all-gather"][1]
        assert few["all-to-all"][1] < 0.25 * whole["reduce-scatter"][1]
        assert "1 of 1 gathers as int8" in said


def test_codes_live_for_a_call_and_what_is_reduced_once_travels_whole() -> None:
    for losses, (whole, few), said in run(4, _data_axis_in_few_bits, "call"):
        assert losses[1] != losses[0]
        torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=0.01, atol=0)
        assert few["all-gather"][0] == 2 * whole["all-gather"][0]  # buckets of the backward have another order
        assert few["all-gather"][1] < 0.7 * whole["all-gather"][1]
        assert few["reduce-scatter"] == whole["reduce-scatter"]
        assert "1 of 1 gathers as int8" in said
        assert "reduced once for all micro-batches of a call" in said
