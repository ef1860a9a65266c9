"""Pipelines in reports: what ranks did and when, what is predicted of it without them, and how both are shown."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dspass
from dspass.pipeline_times import is_due
from dspass.planner.schedule_times import Link, StageCost, simulate
from dspass.planner.schedules import make
from dspass.report import PipelineRecord, PipelineTimeline, Report
from dspass.report.pipeline import _times, timelines_of
from dspass.runtime import clock
from dspass.runtime.schedule import Kind
from tests.models import Block
from tests.ranks import run


class Net(nn.Module):
    """Blocks between an embedding and a head; the activations of a few are more than their parameters."""

    def __init__(self, width: int = 32, blocks: int = 4) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(61, width), nn.Linear(width, 61, bias=False)
        self.blocks, self.norm = nn.ModuleList([Block(width) for _ in range(blocks)]), nn.LayerNorm(width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(self.norm(x)).flatten(0, 1), tokens.flatten())


def tokens(rows: int = 8) -> torch.Tensor:
    return torch.randint(0, 61, (rows, 16), generator=torch.Generator().manual_seed(0))


def options(stage: int = 0, **pipeline: Any) -> dict[str, Any]:
    asked = {"stages": 2, "micro_batches": 4, "schedule": "1f1b", **pipeline}
    return {"zero_optimization": {"stage": stage}, "pipeline": asked}


# -- what ranks did ----------------------------------------------------------------------------------------------------


def _trained(config: dict[str, Any]) -> list[str]:
    """Four calls of the model on this rank, the second one watched; its report before and after the ranks have gathered."""
    torch.manual_seed(0)
    model = dspass.shard(Net(), config)
    compiled: Any = torch.compile(model, backend="deepspeed", options=config)
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        loss = compiled(tokens())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with dspass.measure(model):
        step()
    before = dspass.explain(model)
    for _ in range(2):
        step()
    return [json.dumps(report.to_dict()) for report in (before, dspass.explain(model))]


@functools.cache
def trained() -> tuple[list[Report], list[Report]]:
    """Reports of both ranks before and after they have gathered."""
    results = run(2, _trained, options())
    before, after = ([Report.from_dict(json.loads(both[i])) for both in results] for i in range(2))
    return before, after


def test_all_ranks_know_what_each_of_them_did() -> None:
    _, reports = trained()
    first, second = (report.pipeline for report in reports)
    assert first is not None
    assert second is not None
    assert (first.rank, second.rank) == (0, 1)
    assert first == dataclasses.replace(second, rank=0)
    measured, predicted = first.measured, first.predicted
    assert measured is not None
    assert predicted is not None
    assert len(first.why) >= 3
    assert first.candidates[1].startswith("1f1b")
    for rank, row in enumerate(measured.spans):
        assert [(s.kind, s.stage, s.micro_batch) for s in row] == [
            (s.kind, s.stage, s.micro_batch) for s in predicted.spans[rank]
        ]
        assert all(0 <= a.start <= a.end <= b.start for a, b in itertools.pairwise(row))
    # One host has one clock: what is sent is computed before it is read.
    forwards = [{s.micro_batch: s for s in row if s.kind == "forward"} for row in measured.spans]
    assert all(forwards[0][i].end <= forwards[1][i].start for i in range(4))
    assert measured.sent_bytes == predicted.sent_bytes
    assert measured.peak_bytes == [report.memory.peak_bytes for report in reports]
    assert all(seconds > 0 for seconds in measured.wait_seconds)
    assert all(0 < share < 1 for share in measured.bubbles)
    assert [report.device for report in reports] == ["cpu", "cpu"]  # the last rank's first parameter is a stand-in
    shown = str(reports[1])
    assert "Pipeline: 1f1b, 2 stages on 2 ranks" in shown
    assert "measured: 1f1b, 2 stages on 2 ranks, 4 micro-batches" in shown
    assert "waits longest for messages" in shown


def test_until_ranks_have_gathered_the_report_says_when() -> None:
    report = trained()[0][0]
    assert report.pipeline is not None
    assert report.pipeline.measured is None
    assert any("3rd call that trains" in note for note in report.notes)


def test_ranks_gather_ever_less_often() -> None:
    assert [call for call in range(1, 3500) if is_due(call)] == [3, 10, 30, 100, 300, 1000, 3000]


class _Event:
    """Of a stream that is a second behind."""

    at = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        _Event.at += 0.25
        self.moment = _Event.at

    def elapsed_time(self, other: _Event) -> float:
        return 1e3 * (other.moment - self.moment)


def test_on_a_gpu_moments_are_the_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = []
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append("device"))
    monkeypatch.setattr(clock.time, "perf_counter", lambda: 100.0)
    moments = clock.Moments(on_gpu=True)
    taken = [moments.now() for _ in range(3)]
    moments.settle()
    assert [moments.seconds(moment) for moment in taken] == [100.25, 100.5, 100.75]
    assert len(waits) == 2
    assert clock.Moments(on_gpu=False).now() == 100.0


# -- predicted without ranks -------------------------------------------------------------------------------------------


def test_a_prediction_is_what_the_first_rank_takes() -> None:
    predicted = dspass.explain(Net(), tokens(), config=options(), world_size=2)
    torch._dynamo.reset()
    measured = trained()[1][0]
    assert predicted.memory.peak_bytes == pytest.approx(measured.memory.peak_bytes, rel=0.01)
    for category in ("parameters", "gradients", "saved"):
        assert predicted.memory.by_category[category] == measured.memory.by_category[category]
    one, other = predicted.pipeline, measured.pipeline
    assert one is not None
    assert one.predicted is not None
    assert other is not None
    assert other.predicted is not None
    assert (one.why, one.rank_of, one.candidates) == (other.why, other.rank_of, other.candidates)
    assert one.predicted.seconds == pytest.approx(other.predicted.seconds)
    assert one.predicted.bubbles == pytest.approx(other.predicted.bubbles)
    assert one.predicted.sent_bytes == other.predicted.sent_bytes
    assert one.predicted.peak_bytes[0] == predicted.memory.peak_bytes
    assert predicted.traffic == [dataclasses.replace(t, exposed_seconds=p.exposed_seconds) for t, p in
                                 zip(measured.traffic, predicted.traffic, strict=True)]  # fmt: skip


@pytest.mark.parametrize("schedule", ["auto", "zbvzerobubble"])
def test_a_model_without_values_is_predicted_on_ranks_that_are_not_there(schedule: str) -> None:
    with torch.device("meta"):
        model = Net(width=256)
    config = {**options(2, stages=4, schedule=schedule), "gradient_accumulation_steps": 3}
    if schedule == "auto":
        del config["pipeline"]["micro_batches"]
    report = dspass.explain(model, tokens(32), config=config, world_size=16, device="h100")
    record = report.pipeline
    assert record is not None
    assert record.predicted is not None
    assert record.ranks == 4
    assert len(record.predicted.spans) == len(record.predicted.peak_bytes) == 4
    assert report.step_seconds is not None
    assert report.step_seconds > 3 * record.predicted.seconds  # calls, and an optimiser's step
    assert {t.group_size for t in report.traffic if t.group == "data"} == {4}
    assert any("the pipeline's first rank" in note for note in report.notes)
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("schedule", ["interleaved1f1b", "zbvzerobubble"])
def test_a_prediction_holds_the_parameters_of_its_own_stages(schedule: str) -> None:
    """Wherever the schedule places them: the first and the last, of a V."""
    names = {"interleaved1f1b": ("embed", "blocks.2", "blocks.3"), "zbvzerobubble": ("embed", "norm", "head")}[schedule]
    model = Net()
    config = options(schedule=schedule, virtual_stages=2, boundaries=["blocks.0", "blocks.2", "norm"])
    report = dspass.explain(model, tokens(), config=config, world_size=2)
    own = [p for n, p in model.named_parameters() if n.startswith(names)]
    assert report.memory.by_category["parameters"] == sum(p.nbytes for p in own)


def test_a_forward_alone_has_no_backwards() -> None:
    report = dspass.explain(Net(), tokens(), config=options(), world_size=2, device="h100", train=False)
    assert report.pipeline is not None
    assert report.pipeline.predicted is not None
    spans = [span for row in report.pipeline.predicted.spans for span in row]
    assert {span.kind for span in spans} == {"forward"}
    assert len(spans) == 8


def test_one_rank_that_splits_its_batch() -> None:
    report = dspass.explain(Net(), tokens(), config=options(stages=1), world_size=1, device="h100")
    assert report.pipeline is not None
    assert report.pipeline.predicted is not None
    assert report.pipeline.predicted.bubble == pytest.approx(0, abs=1e-6)


def test_what_does_not_divide_is_refused_as_it_would_be_with_ranks() -> None:
    with pytest.raises(ValueError, match=r"3 does not divide the 4 ranks"):
        dspass.explain(Net(), tokens(), config=options(stages=3), world_size=4)


# -- how it is shown ---------------------------------------------------------------------------------------------------


def a_record(ranks: int = 2, micro_batches: int = 3, schedule: str = "1f1b", **changes: Any) -> PipelineRecord:
    order = make(schedule, ranks, micro_batches)
    costs = [StageCost(1.0 + stage, 2.0, 1.0, 1.0, saved_bytes=10**6) for stage in range(order.stages)]
    found = simulate(order, costs, [Link(0.1, 0.1)] * (order.stages - 1))
    record = PipelineRecord(
        schedule=order.name,
        rank_of=list(order.rank_of),
        rank=0,
        why=[f"cut {i}: at blocks.{i}" for i in range(order.stages - 1)],
        candidates=["schedule  time", f"{order.name}  1 ms", "gpipe  2 ms"],
        predicted=_times(found),
        measured=_times(found, [0.5] * ranks, [10**6] * ranks),
    )
    return dataclasses.replace(record, **changes)


def a_report(pipeline: PipelineRecord | None) -> Report:
    return Report(kind="measured", model="m", device="cpu", world_size=4, pipeline=pipeline)


def test_times_are_kept_whole() -> None:
    record = a_record(schedule="zbvzerobubble")
    drawn = timelines_of(record)
    assert list(drawn) == ["predicted", "measured"]
    for name, timeline in drawn.items():
        one = record.timelines[name]
        assert timeline.seconds == pytest.approx(one.seconds)
        assert timeline.bubble == pytest.approx(one.bubble)
        assert [timeline.bubble_of(rank) for rank in range(2)] == pytest.approx(one.bubbles)
        assert {span.action.kind for row in timeline.spans for span in row} <= set(Kind)
    report = a_report(record)
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_text_has_the_picture_and_what_it_does_not_show() -> None:
    lines = str(a_report(a_record())).split("\n")
    at = lines.index("Pipeline: 1f1b, 2 stages on 2 ranks")
    assert lines[at + 1] == "  cut 0: at blocks.0"
    rows = [line for line in lines if line.startswith("  rank ")]
    assert len(rows) == 4
    assert all("F0" in row and "B2" in row and "bubble" in row for row in rows)
    assert any(
        line == "  measured: rank 0 waits longest for messages, 500 ms; ranks send 2.00 MB to neighbours in a call"
        for line in lines
    )
    assert "  gpipe  2 ms" in lines


def test_text_of_many_ranks_stays_short() -> None:
    record = a_record(40, 48)
    shown = str(a_report(record))
    assert len(shown.split("\n")) < 60
    assert max(map(len, shown.split("\n"))) <= 100
    assert [line.split()[1] for line in shown.split("\n") if line.startswith("  rank ")][:8] == [
        "0", "6", "11", "17", "22", "28", "33", "39"
    ]  # fmt: skip
    assert "and 35 more cuts in .pipeline.why" in shown


def test_the_page_draws_it_without_a_script() -> None:
    page = a_report(a_record()).to_html()
    assert page.count("<title>forward of micro-batch 0, stage 1") == 2
    assert "Waits for messages, measured" in page
    assert "0 (here)" in page
    assert "http://" not in page
    hostile = "</div><script>alert(1)</script>"
    page = a_report(a_record(why=[hostile], candidates=[hostile, hostile], schedule="1f1b")).to_html()
    assert hostile not in page
    assert page.count("&lt;script&gt;alert(1)") == 3
    assert hostile not in a_report(dataclasses.replace(a_record(), schedule=hostile)).to_html()
    assert "Pipeline" not in a_report(None).to_html()


def test_a_page_of_many_actions_draws_some_ranks() -> None:
    page = a_report(a_record(16, 512, measured=None)).to_html()
    assert "one call that trains, 11 of 16 ranks" in page
    assert page.count("<rect") < 13_000


def test_what_differs_is_named() -> None:
    old, new = a_report(a_record()), a_report(a_record(schedule="gpipe", rank=1))
    said = old.diff(new).split("\n")
    assert "  1f1b, 2 stages on 2 ranks → gpipe, 2 stages on 2 ranks" in said
    assert any(line.startswith("  predicted: 3 micro-batches, ") and " → 3 micro-batches, " in line for line in said)
    assert "  rank of the pipeline: 0 → 1" in said
    assert old.diff(a_report(None)).split("\n")[-1] == "  - 1f1b, 2 stages on 2 ranks"
    slower = dataclasses.replace(a_record(), measured=None)
    assert "measured: " in old.diff(a_report(slower))
    assert " → nothing" in old.diff(a_report(slower))


def test_files(tmp_path: Path) -> None:
    report = a_report(a_record())
    report.save(tmp_path / "r.json")
    assert Report.load(tmp_path / "r.json") == report


def test_nothing_is_drawn_of_nothing() -> None:
    empty = PipelineRecord(
        schedule="s", rank_of=[0, 1], rank=0, predicted=PipelineTimeline(micro_batches=0, spans=[[], []])
    )
    assert "Pipeline: s, 2 stages on 2 ranks" in str(a_report(empty))
    assert "Pipeline" in a_report(empty).to_html()
