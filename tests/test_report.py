"""The report as data and text: round trips, totals, refusals, the trace, what differs."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dspass
from dspass.report import (
    CATEGORIES,
    PHASES,
    VERSION,
    ExpertLayer,
    GraphRecord,
    HostCopy,
    Memory,
    MemoryPoint,
    PassRecord,
    PipelineRecord,
    PipelineSpan,
    PipelineTimeline,
    PlanPoint,
    PlanRecord,
    PlanTensors,
    QuantisedTensor,
    Report,
    RoundedLayer,
    Traffic,
    format_bytes,
    format_seconds,
    opcodes,
    unified_diff,
)
from dspass.report.text import WIDTH

MB = 10**6

BEFORE = "%p : f32[8,4] = input\n%t : f32[4,8] = aten.t(%p)\nreturn [%t]"
AFTER = "%p : f32[8,4] = input\n%full : f32[16,4] = dspass.gather(%p)\n%t : f32[4,16] = aten.t(%full)\nreturn [%t]"


def a_pass(**changes: Any) -> PassRecord:
    record = PassRecord(
        name="zero_gather",
        stage="forward",
        summary="1 parameter gathered",
        changed=True,
        seconds=0.0125,
        ops_before=1,
        ops_after=2,
        keeps_numbers=True,
        before=BEFORE,
        after=AFTER,
    )
    return dataclasses.replace(record, **changes)


def a_report(**changes: Any) -> Report:
    points = [
        MemoryPoint(t=0.0, label="%t", phase="forward", bytes={"parameters": 4 * MB, "saved": MB}),
        MemoryPoint(t=1.0, label="%mm", phase="forward", bytes={"parameters": 4 * MB, "saved": 3 * MB}),
        MemoryPoint(t=2.0, label="%grad", phase="backward", bytes={"parameters": 4 * MB, "gradients": 2 * MB}),
        MemoryPoint(t=3.0, label="adamw", phase="optimizer", bytes={"parameters": 4 * MB, "staging": MB}),
    ]
    idle = a_pass(name="bucket_gathers", summary="nothing to do: one gather", changed=False, before=AFTER, ops_before=2)
    report = Report(
        kind="measured",
        model="GPT",
        device="cpu",
        world_size=2,
        passes=[a_pass(), idle],
        graphs=[GraphRecord(name="graph 0 forward", before=BEFORE, after=AFTER)],
        memory=Memory(timeline=points, first_call_peak_bytes=16 * MB),
        traffic=[
            Traffic(kind="all-gather", direction="forward", group="data", group_size=2, calls=3, bytes=MB),
            Traffic(
                kind="reduce-scatter",
                direction="backward",
                group="data",
                group_size=2,
                calls=1,
                bytes=2 * MB,
                exposed_seconds=0.004,
            ),
        ],
        step_seconds=0.25,
        config={"zero_optimization": {"stage": 3}},
        ignored={"scheduler": "build it in the training loop"},
        notes=["a note"],
        versions={"torch": "2.13.0"},
    )
    return dataclasses.replace(report, **changes)


# Strategies

text = st.text(max_size=30)
number = st.integers(0, 1 << 50)
real = st.floats(0, 1e6)
json_value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
passes = st.builds(
    PassRecord,
    name=text,
    stage=st.sampled_from(["captured", "joint", "forward", "backward"]),
    summary=text,
    changed=st.booleans(),
    seconds=real,
    ops_before=number,
    ops_after=number,
    keeps_numbers=st.booleans(),
    graph=text,
    before=text,
    after=text,
)
points = st.builds(
    MemoryPoint,
    t=real,
    label=text,
    phase=st.sampled_from(PHASES),
    bytes=st.dictionaries(st.sampled_from(CATEGORIES), number),
)
traffic = st.builds(
    Traffic,
    kind=st.sampled_from(["all-gather", "reduce-scatter", "all-reduce", "all-to-all"]),
    direction=st.sampled_from(["forward", "backward", "step"]),
    group=text,
    group_size=number,
    calls=number,
    bytes=number,
    exposed_seconds=st.none() | real,
)
host_copies = st.builds(
    HostCopy,
    kind=st.sampled_from(["offload", "reload", "optimizer states"]),
    direction=st.sampled_from(["forward", "backward", "step"]),
    bytes=number,
    exposed_seconds=st.none() | real,
)
quantised = st.builds(
    QuantisedTensor,
    name=text,
    kind=st.sampled_from(["gather", "reduction", "rows", "saved"]),
    direction=st.sampled_from(["forward", "backward"]),
    format=st.none() | text,
    whole_bytes=number,
    sent_bytes=number,
    relative_error=st.none() | real,
)
timelines = st.builds(
    PipelineTimeline,
    micro_batches=number,
    spans=st.lists(
        st.lists(
            st.builds(
                PipelineSpan,
                kind=st.sampled_from(["forward", "backward", "backward of inputs", "backward of weights"]),
                stage=st.integers(0, 3),
                micro_batch=number,
                start=real,
                end=real,
            ),
            max_size=3,
        ),
        max_size=3,
    ),
    peak_bytes=st.lists(number, max_size=3),
    wait_seconds=st.lists(real, max_size=3),
    sent_bytes=st.lists(number, max_size=3),
)
pipelines = st.builds(
    PipelineRecord,
    schedule=text,
    rank_of=st.lists(st.integers(0, 2), max_size=4),
    rank=st.integers(0, 2),
    why=st.lists(text, max_size=6),
    candidates=st.lists(text, max_size=7),
    predicted=st.none() | timelines,
    measured=st.none() | timelines,
)
experts = st.builds(ExpertLayer, name=text, ranks=st.integers(1, 4), rows=st.lists(number, max_size=70), dropped=number)
reports = st.builds(
    Report,
    kind=st.sampled_from(["measured", "predicted"]),
    model=text,
    device=text,
    world_size=number,
    passes=st.lists(passes, max_size=3),
    graphs=st.lists(st.builds(GraphRecord, name=text, before=text, after=text), max_size=2),
    memory=st.builds(
        Memory,
        timeline=st.lists(points, max_size=4),
        unplanned=st.lists(points, max_size=2),
        first_call_peak_bytes=st.none() | number,
        time_unit=st.sampled_from(["seconds", "events"]),
    ),
    traffic=st.lists(traffic, max_size=3),
    host_copies=st.lists(host_copies, max_size=3),
    quantised=st.lists(quantised, max_size=3),
    rounded=st.lists(
        st.builds(
            RoundedLayer,
            name=text,
            kind=st.sampled_from(["weight", "activation"]),
            bits=st.none() | number,
            start_bits=number,
            target_bits=number,
            begins=number,
        ),
        max_size=3,
    ),
    experts=st.lists(experts, max_size=3),
    pipeline=st.none() | pipelines,
    step_seconds=st.none() | real,
    config=st.dictionaries(text, json_value, max_size=3),
    ignored=st.dictionaries(text, text, max_size=2),
    notes=st.lists(text, max_size=3),
    versions=st.dictionaries(text, text, max_size=2),
)


# Data


@settings(max_examples=40, deadline=None)
@given(reports, reports)
def test_any_report_round_trips_and_can_be_shown(report: Report, other: Report) -> None:
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    lines = str(report).split("\n")
    assert len(lines) <= 45 + (30 if report.pipeline is not None else 0)
    assert all(len(line) <= 100 and (line.isprintable() or not line) for line in lines)
    assert all(line.isprintable() for line in report.diff(other).split("\n"))
    assert report.diff(report).startswith("The same passes")


def test_totals() -> None:
    report = a_report()
    assert report.memory.peak_bytes == 7 * MB
    assert report.memory.peak is report.memory.timeline[1]
    assert report.memory.by_category == {**dict.fromkeys(CATEGORIES, 0), "parameters": 4 * MB, "saved": 3 * MB}
    assert report.traffic_bytes == 3 * MB
    assert list(report.memory.timeline[0].bytes) == list(CATEGORIES)


def test_the_first_of_equal_peaks_counts() -> None:
    same = [MemoryPoint(t=t, label=str(t), phase="forward", bytes={"saved": 5}) for t in (0, 1)]
    peak = Memory(timeline=same).peak
    assert peak is not None
    assert peak.label == "0"


def test_nothing_measured_is_nothing_shown() -> None:
    report = Report(kind="measured", model="m", device="cpu", world_size=1)
    assert report.memory.peak is None
    assert report.memory.peak_bytes == 0
    assert report.memory.by_category == {}
    shown = str(report)
    assert "Peak memory of one rank: not measured" in shown
    assert "Step time: not measured" in shown
    assert "0 B" not in shown
    assert "Step time: not predicted" in str(dataclasses.replace(report, kind="predicted"))
    assert "exposed -" in str(a_report())


def test_each_text_is_stored_once() -> None:
    data = a_report().to_dict()
    assert sorted(data["texts"]) == sorted([BEFORE, AFTER])
    assert [(p["before"], p["after"]) for p in data["passes"]] == [(0, 1), (1, 1)]


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ({"bytes": {"parameter": 1}, "phase": "forward"}, "did you mean 'parameters'"),
        ({"bytes": {}, "phase": "backwards"}, "did you mean 'backward'"),
    ],
)
def test_a_point_refuses_unknown_names(what: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        MemoryPoint(t=0, label="", **what)


def test_config_holds_json_values() -> None:
    assert a_report(config={"a": (1, 2)}).config == {"a": [1, 2]}
    with pytest.raises(ValueError, match=r"config\.a\.b: .* of type set"):
        a_report(config={"a": {"b": {1}}})
    with pytest.raises(ValueError, match="the key 1 is of type int"):
        a_report(config={1: 2})
    with pytest.raises(ValueError, match="no JSON value"):
        a_report(config={"a": float("nan")})


def change(path: str, value: Any) -> Callable[[Any], None]:
    """``path`` as keys and indices with dots; ``...`` removes."""

    def apply(data: Any) -> None:
        *way, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        for part in way:
            data = data[part]
        if value is ...:
            del data[last]
        else:
            data[last] = value

    return apply


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (change("format", "other"), "not a dspass report"),
        (change("version", VERSION + 1), f"format version {VERSION + 1}, this dspass reads {VERSION}"),
        (change("version", ...), "format version None"),
        (change("version", True), "format version True"),
        (change("model", ...), "'model' is missing"),
        (change("modle", "x"), "'modle' is not known; did you mean 'model'"),
        (change("world_size", "2"), "world_size: expected int, found str '2'"),
        (change("world_size", True), "world_size: expected int, found bool"),
        (change("step_seconds", "fast"), "step_seconds: expected float"),
        (change("step_seconds", float("inf")), "step_seconds: expected float"),
        (change("kind", "guessed"), "kind: expected one of measured, predicted; found str 'guessed'"),
        (change("passes", None), "passes: expected a list"),
        (change("passes.0", "x"), r"passes\[0\]: expected an object"),
        (change("passes.1.before", 7), r"passes\[1\]\.before: expected an index into texts, found int 7"),
        (change("passes.1.after", -1), r"passes\[1\]\.after"),
        (change("passes.0.stage", "sideways"), r"passes\[0\]\.stage"),
        (change("texts", [1]), r"texts\[0\]: expected str"),
        (change("memory", []), "memory: expected an object"),
        (change("memory.timeline.2.bytes", {"saves": 1}), r"memory\.timeline\[2\]: 'saves' is not a category"),
        (change("memory.timeline.2.bytes.saved", 1.5), r"timeline\[2\]\.bytes\.saved: expected int, found float"),
        (change("traffic.0.exposed_seconds", []), r"traffic\[0\]\.exposed_seconds"),
        (change("notes", "a"), "notes: expected a list"),
        (change("config", 3), "config: expected an object"),
    ],
)
def test_malformed_data_is_refused_by_name(damage: Callable[[Any], None], says: str) -> None:
    data = a_report().to_dict()
    damage(data)
    with pytest.raises(ValueError, match=says):
        Report.from_dict(data)


def test_the_version_before_is_read() -> None:
    data = a_report().to_dict()
    del data["memory"]["unplanned"]
    assert Report.from_dict({**data, "version": VERSION - 1}) == a_report()
    with pytest.raises(ValueError, match="'unplanned' is missing"):
        Report.from_dict(data)
    with pytest.raises(ValueError, match=f"format version {VERSION - 2}"):
        Report.from_dict({**data, "version": VERSION - 2})


# Files


def test_save_and_load(tmp_path: Path) -> None:
    report = a_report(notes=["lone surrogate \ud800, naïve 模型"])
    report.save(tmp_path / "made" / "x.json")
    assert Report.load(tmp_path / "made" / "x.json") == report
    report.save(str(tmp_path / "x.HTML"))
    assert (tmp_path / "x.HTML").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["made", "x.HTML", "x.json"]


def test_save_refuses_other_suffixes(tmp_path: Path) -> None:
    for name in ("x.txt", "x", ".json.gz"):
        with pytest.raises(ValueError, match=r"must end in \.html or \.json"):
            a_report().save(tmp_path / name)
    with pytest.raises(ValueError, match=r"must end in \.json"):
        a_report().trace(tmp_path / "x.html")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    a_report().save(path)
    with pytest.raises(ValueError, match="figure that JSON cannot"):
        a_report(step_seconds=float("nan")).save(path)

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        a_report(model="other").save(path)
    assert Report.load(path) == a_report()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000])
def test_load_names_the_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.json: "):
        Report.load(path)


def test_load_tells_the_page_from_the_data(tmp_path: Path) -> None:
    a_report().save(tmp_path / "x.html")
    with pytest.raises(ValueError, match="not from the page"):
        Report.load(tmp_path / "x.html")
    with pytest.raises(FileNotFoundError):
        Report.load(tmp_path / "none.json")


# Text


def test_text_shows_the_main_figures() -> None:
    shown = str(a_report())
    for part in ("GPT on 2 ranks, cpu", "zero_gather", "1 → 2 ops", "7.00 MB", "3.00 MB in 4 calls", "250 ms"):
        assert part in shown
    assert "ignored scheduler: build it in the training loop" in shown


def test_copies_to_and_from_the_host_are_shown_beside_collectives() -> None:
    copies = [
        HostCopy(kind="offload", direction="forward", bytes=5 * MB, exposed_seconds=0.0021),
        HostCopy(kind="optimizer states", direction="step", bytes=3 * MB),
    ]
    report = a_report(host_copies=copies)
    said = str(report).split("\n")
    assert f"Copies to and from the host in one step: {format_bytes(8 * MB)}" in said
    assert f"  offload           forward  {format_bytes(5 * MB)}  exposed 2.10 ms" in said
    assert f"  optimizer states  step     {format_bytes(3 * MB)}  exposed -" in said
    assert "Copies to and from the host" not in str(a_report())
    assert "Copies to and from the host" in report.to_html()
    assert f"- offload forward: {format_bytes(5 * MB)}, exposed 2.10 ms" in report.diff(a_report())


def test_what_travels_in_few_bits_is_shown_by_kind_and_format() -> None:
    gather = {"kind": "gather", "direction": "forward", "whole_bytes": 4 * MB}
    found = [
        QuantisedTensor(name="a", format="int8", sent_bytes=MB, relative_error=0.004, **gather),
        QuantisedTensor(name="b", format="int8", sent_bytes=MB, relative_error=0.008, **gather),
        QuantisedTensor(name="c", format=None, sent_bytes=4 * MB, relative_error=0.5, **gather),
        QuantisedTensor(
            name="a", kind="reduction", direction="backward", format="int4", whole_bytes=8 * MB, sent_bytes=MB
        ),
        QuantisedTensor(name="mm", kind="saved", direction="forward", format="int8", whole_bytes=4 * MB, sent_bytes=MB),
    ]
    report = a_report(quantised=found)
    said = str(report)
    assert "In few bits, on one rank: 8.00 MB instead of 24.0 MB" in said
    assert "gather     forward   int8   2 tensors  8.00 MB → 2.00 MB  error 0.6 %, 0.8 % at most" in said
    assert "gather     forward   whole   1 tensor  4.00 MB            error 50 %, 50 % at most" in said
    assert "reduction  backward  int4    1 tensor  8.00 MB → 1.00 MB  error not measured" in said
    assert "saved      forward   int8    1 tensor  4.00 MB → 1.00 MB  error not measured" in said
    assert "In few bits" in report.to_html()
    assert "0.8 %" in report.to_html()
    assert "In few bits" not in str(a_report())
    assert "- gather forward int8: 2 tensors" in report.diff(a_report())


def test_what_is_rounded_while_it_trains_is_shown_with_its_bits() -> None:
    falls = {"kind": "weight", "start_bits": 8, "target_bits": 4, "begins": 100}
    rounded = [
        RoundedLayer(name="up.weight", bits=6, **falls),
        RoundedLayer(name="down.weight", bits=6, **falls),
        RoundedLayer(name="head.weight", bits=None, **falls),
        RoundedLayer(name="up", kind="activation", bits=8, start_bits=8, target_bits=8, begins=0),
    ]
    report = a_report(rounded=rounded)
    said = str(report)
    assert "Rounded while it trains: 4 values" in said
    assert "weight      6 bits now, 4 in the end                2 of them  up.weight and on" in said
    assert "weight      whole until step 100, then 8 to 4 bits  1 of them  head.weight" in said
    assert "activation  8 bits now                              1 of them  up" in said
    assert "Rounded while it trains" not in str(a_report())
    assert "down.weight" in report.to_html()
    assert "- weight up.weight: 6 bits now, 4 in the end" in report.diff(a_report())


def test_what_routers_did_is_shown_from_the_least_even_layer_on() -> None:
    even = ExpertLayer(name="model.layers.0.experts", ranks=2, rows=[10] * 8, dropped=0)
    odd = ExpertLayer(name="model.layers.1.experts", ranks=2, rows=[40, 0, 0, 20, 10, 10, 0, 0], dropped=3)
    assert odd.by_rank == [60, 20]
    assert (odd.rank_imbalance, odd.expert_imbalance) == (1.5, 4.0)
    assert (even.rank_imbalance, even.expert_imbalance) == (1.0, 1.0)
    report = a_report(experts=[even, odd])
    lines = str(report).split("\n")
    at = next(i for i, line in enumerate(lines) if line.startswith("Experts of 2 layers in one step"))
    assert lines[at].endswith("; this rank dropped 3 rows")
    assert lines[at + 1].split()[-6:] == ["ranks", "rank", "1.50", "expert", "4.00", "█▁▁▅▃▃▁▁"]
    assert lines[at + 2].split()[-6:] == ["ranks", "rank", "1.00", "expert", "1.00", "████████"]
    assert "model.layers.1.experts: 80 rows, rank 1.50" in report.diff(a_report(experts=[even]))
    many = ExpertLayer(name="e", ranks=4, rows=[1, 3] * 64, dropped=0)
    assert str(a_report(experts=[many])).count("█") - str(a_report()).count("█") == 21  # 128 by six, the last two alone


def test_no_rows_are_even() -> None:
    assert ExpertLayer(name="e", ranks=2, rows=[0, 0], dropped=0).rank_imbalance == 1.0


def test_text_of_many_passes_stays_short() -> None:
    many = [a_pass(name=f"p{i}", changed=i % 2 == 0, keeps_numbers=i != 0) for i in range(60)]
    shown = str(a_report(passes=many, notes=["n"] * 50, traffic=a_report().traffic * 20))
    assert len(shown.split("\n")) <= 42
    assert "18 more that changed a graph" in shown
    assert "nothing to do for p1 (forward), p3 (forward)" in shown
    assert "in all (* changes numbers)" in shown
    assert "  p0* " in shown


def test_text_obeys_no_escape_codes() -> None:
    shown = str(a_report(model="\x1b[31mred\nline\r", notes=["\x07bell"]))
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert "[31mred line on 2 ranks" in shown


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 KB"), (10 * MB, "10.0 MB"), (999_499_999, "999 MB"),
     (999_500_000, "1.00 GB"), (72 * 10**9, "72.0 GB"), (3 * 10**12, "3.00 TB")],
)  # fmt: skip
def test_bytes(count: int, shown: str) -> None:
    assert format_bytes(count) == shown


@pytest.mark.parametrize(("value", "shown"), [(0, "0.00 µs"), (2e-6, "2.00 µs"), (0.0123, "12.3 ms"), (90, "90.0 s")])
def test_seconds(value: float, shown: str) -> None:
    assert format_seconds(value) == shown


def a_plan(steps: list[tuple[int, float]], here: int, **changes: Any) -> PlanRecord:
    """Of the peaks in MB and the seconds of its frontier."""
    frontier = [PlanPoint(peak_bytes=p * MB, seconds=s, saved_bytes=MB, is_measured=True) for p, s in steps]
    plan = PlanRecord(graph="graph 0", summary="1 value saved", budget_bytes=12 * MB, peak_bytes=0, frontier=frontier)
    return dataclasses.replace(plan, here=here, peak_bytes=frontier[here].peak_bytes, **changes)


@pytest.mark.parametrize(
    ("steps", "here", "says"),
    [
        ([(10, 1.0)], 0, "no more memory makes it faster"),
        ([(20, 0.9), (10, 1.0)], 1, f"+{format_bytes(8 * MB)} buys 100 ms"),
        ([(40, 0.9), (20, 1.0), (10, 1.0)], 2, f"+{format_bytes(28 * MB)} buys 100 ms"),
        ([(40, 0.99), (30, 0.994), (20, 0.996), (10, 1.0)], 3, f"+{format_bytes(18 * MB)} buys 6.00 ms"),
        ([(20, 0.998), (10, 1.0)], 1, "more memory buys less than 0.5 % of the step"),
        ([(20, 1.0), (10, 1.0)], 1, "more memory buys less than 0.5 % of the step"),
        # What fits the budget and was not taken costs no memory.
        ([(20, 0.8), (11, 0.9), (10, 1.0)], 2, f"+{format_bytes(8 * MB)} buys 200 ms"),
        (
            [(12, 0.8), (11, 0.9), (10, 1.0)],
            2,
            "200 ms less would fit by itself: the model's other graphs, or what an earlier batch has, decide",
        ),
    ],
)
def test_more_memory_is_offered_where_it_buys_something(steps: list[tuple[int, float]], here: int, says: str) -> None:
    assert a_plan(steps, here).next_step == says


def test_what_a_plan_and_notes_say_is_wrapped_and_not_cut() -> None:
    said = " ".join(f"word{i}" for i in range(40))
    largest = [PlanTensors(name="mm", count=1, kept_bytes=1, dropped_bytes=0, again_seconds=0.1, reason=said)]
    plan = a_plan([(10, 1.0)], 0, summary=said, largest=largest)
    shown = str(a_report(plans=[plan], notes=[said]))
    assert all(len(line) <= WIDTH for line in shown.split("\n"))
    assert " ".join(shown.split()).count(said) == 3
    assert "\n  word" in shown  # indented below its first line
    assert "…" not in shown


def test_a_step_is_shown_with_its_plan_and_without_it() -> None:
    point = MemoryPoint(t=0.0, label="%mm", phase="backward", bytes={"parameters": 4 * MB, "saved": 16 * MB})
    memory = dataclasses.replace(a_report().memory, unplanned=[point])
    report = a_report(memory=memory, plans=[a_plan([(10, 1.0)], 0)])
    said = "without the plan the peak would be 20.0 MB, in backward, at %mm; the budget is 12.0 MB"
    assert f"  {said}" in str(report).split("\n")
    assert "; 20.0 MB without the plan" in report.to_html()
    assert "without the plan" not in str(a_report())
    assert "  peak without the plan: not measured → 20.0 MB" in a_report().diff(report).split("\n")


def test_what_cannot_be_computed_again_takes_no_time_to() -> None:
    values = {"kept_bytes": 4 * MB, "dropped_bytes": 0, "count": 1}
    classes = [
        PlanTensors(name="dropout", again_seconds=None, reason="what is kept cannot be computed again", **values),
        PlanTensors(name="exp", again_seconds=0.0, reason="in no time", **{**values, "dropped_bytes": 1}),
    ]
    report = a_report(plans=[a_plan([(10, 1.0)], 0, classes=classes)])
    page = report.to_html()
    assert page.count('<td class="number">0.00 µs</td>') == 1
    for shown in (str(report), page):
        assert "what is kept cannot be computed again" in shown
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report


# What differs


def test_diff_names_what_differs() -> None:
    old = a_report()
    point = MemoryPoint(t=0, label="x", phase="forward", bytes={"parameters": 8 * MB})
    new = a_report(
        passes=[a_pass(ops_after=5, summary="4 parameters gathered"), a_pass(name="quantise")],
        memory=Memory(timeline=[point]),
        traffic=[dataclasses.replace(old.traffic[0], calls=6, bytes=2 * MB)],
        step_seconds=0.2,
        config={"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}},
        notes=["another"],
    )
    said = old.diff(new).split("\n")
    for line in (
        "  zero_gather (graph 0 forward): 1 → 2 ops ⇒ 1 → 5 ops; 1 parameter gathered ⇒ 4 parameters gathered",
        "  - bucket_gathers (graph 0 forward): nothing to do: one gather",
        "  + quantise (graph 0 forward): 1 parameter gathered",
        "  peak: 7.00 MB → 8.00 MB (+14.3 %)",
        "  saved at the peak: 3.00 MB → 0 B (-100.0 %)",
        "  first call: 16.0 MB → not measured",
        "  all-gather forward data, 2 ranks: 3 → 6 calls, 1.00 MB → 2.00 MB (+100.0 %)",
        "  - reduce-scatter backward data, 2 ranks: 1 call, 2.00 MB",
        "Step time: 250 ms → 200 ms (-20.0 %)",
        "  zero_optimization.stage: 3 → 2",
        "  + bf16.enabled: True",
        "  - a note",
        "  + another",
    ):
        assert line in said


def test_diff_sees_another_order_and_another_graph() -> None:
    old = a_report()
    assert "in another order" in old.diff(a_report(passes=old.passes[::-1]))
    other = a_report(passes=[a_pass(after=AFTER + "\n"), old.passes[1]])
    assert "zero_gather (graph 0 forward): another graph" in old.diff(other)
    graph = GraphRecord(name="graph 0 forward", before=BEFORE, after=BEFORE)
    assert "graph 0 forward: -2 +1 lines after the passes" in old.diff(a_report(graphs=[graph]))


# Line diffs

lines = st.lists(st.sampled_from(["a", "b", "c", "%x = 1", "%y = 2", "%z = 3", ""]), max_size=14)


@settings(max_examples=100, deadline=None)
@given(lines, lines)
def test_opcodes_turn_one_text_into_the_other(a: list[str], b: list[str]) -> None:
    ops = opcodes(a, b)
    made: list[str] = []
    at = (0, 0)
    for (tag, i0, i1, j0, j1), previous in zip(ops, [None, *ops], strict=False):
        assert (i0, j0) == at
        assert tag == ("replace" if i0 < i1 and j0 < j1 else "delete" if i0 < i1 else "insert") or tag == "equal"
        assert previous is None or (tag == "equal") != (previous[0] == "equal")
        assert tag != "equal" or a[i0:i1] == b[j0:j1] != []
        made += a[i0:i1] if tag == "equal" else b[j0:j1]
        at = (i1, j1)
    assert made == b
    assert at == (len(a), len(b))


@settings(max_examples=100, deadline=None)
@given(st.permutations([f"%{i}" for i in range(12)]), st.integers(0, 12))
def test_unified_diff_has_the_form_of_difflibs(after: list[str], cut: int) -> None:
    before = [f"%{i}" for i in range(12)]
    after = after[:cut] + before[cut:]
    ours = unified_diff("\n".join(before), "\n".join(after), "a", "b", context=1)
    assert (ours == "") == (before == after)
    headers = [line for line in ours.split("\n") if line.startswith("@@")]
    hunks = [line for line in ours.split("\n")[2:] if not line.startswith("@@")]
    assert sum(line[0] != "+" for line in hunks) == sum(_length(h.split()[1]) for h in headers)
    assert sum(line[0] != "-" for line in hunks) == sum(_length(h.split()[2]) for h in headers)


def _length(span: str) -> int:
    return int(span.split(",")[1]) if "," in span else 1


def test_unified_diff_equals_difflibs_on_a_graph() -> None:
    expected = "\n".join(
        difflib.unified_diff(BEFORE.split("\n"), AFTER.split("\n"), "g before", "g after", lineterm="")
    )
    assert GraphRecord(name="g", before=BEFORE, after=AFTER).diff() == expected
    assert "+++ graph 0 after zero_gather" in a_pass().diff()
    assert a_pass(after=BEFORE).diff() == ""


def test_large_graphs_are_quick() -> None:
    before = [f"%n{i} : f32[4] = aten.relu(%n{i - 1})" for i in range(20_000)]
    after = [line for i, node in enumerate(before) for line in ([f"%g{i} = gather", node] if i % 40 == 0 else [node])]
    ops = opcodes(before, after)
    assert sum(tag == "insert" for tag, *_ in ops) == 500
    assert {tag for tag, *_ in ops} == {"insert", "equal"}


# The trace


def test_trace_is_what_perfetto_reads(tmp_path: Path) -> None:
    a_report().trace(tmp_path / "t.json")
    trace = json.loads((tmp_path / "t.json").read_text())
    events = trace["traceEvents"]
    for event in events:
        assert {"name", "ph", "pid", "tid", "ts"} <= event.keys()
        assert event["ph"] in "CXM"
        assert event["ph"] != "X" or event["dur"] >= 0
    counters = [e for e in events if e["ph"] == "C"]
    assert [e["ts"] for e in counters] == [0, 1, 2, 3]
    assert all(list(e["args"]) == list(CATEGORIES) for e in counters)
    spans = [(e["name"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"]
    assert [s for s in spans if s[0] in PHASES] == [("forward", 0, 2), ("backward", 2, 1), ("optimizer", 3, 0)]
    assert ("zero_gather", 0, 12500) in spans
    assert ("bucket_gathers", 12500, 12500) in spans
    assert ("%grad", 1, 1) in spans


def test_trace_keeps_seconds(tmp_path: Path) -> None:
    memory = dataclasses.replace(a_report().memory, time_unit="seconds")
    a_report(memory=memory).trace(tmp_path / "t.json")
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert [e["ts"] for e in events if e["ph"] == "C"] == [0, 1e6, 2e6, 3e6]
    Report(kind="predicted", model="m", device="d", world_size=1).trace(tmp_path / "empty.json")


def test_reading_a_report_needs_no_torch(tmp_path: Path) -> None:
    """With a bare package in the place of ``dspass``, which imports torch for what else it has."""
    a_report().save(tmp_path / "x.json")
    code = (
        "import sys, types\n"
        "package = types.ModuleType('dspass'); package.__path__ = [sys.argv[1]]; sys.modules['dspass'] = package\n"
        "from dspass.report import Report\n"
        "report = Report.load(sys.argv[2])\n"
        "print(report); print(report.diff(report)); report.trace(sys.argv[3])\n"
        "assert 'torch' not in sys.modules\n"
        "assert all(name.startswith('dspass.report') for name in sys.modules if name.startswith('dspass.'))"
    )
    files = str(tmp_path / "x.json"), str(tmp_path / "trace.json")
    subprocess.run([sys.executable, "-c", code, str(Path(dspass.__file__).parent), *files], check=True, timeout=60)
