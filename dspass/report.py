"""What was done to a model, what memory and traffic it costs, how long a step takes: data, and text of it.

A :class:`Report` is plain data and needs no torch: it is filled by ``dspass.explain``, saved, loaded
elsewhere and compared. A figure that nobody measured is ``None`` and shown as such, never made up.
The page is in :mod:`dspass.report_html`.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import difflib
import functools
import json
import math
import os
import statistics
import textwrap
import types
import typing
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

CATEGORIES = ("parameters", "gradients", "optimizer", "gathered", "saved", "temporary", "staging")
PHASES = ("forward", "backward", "optimizer")

FORMAT = "dspass.report"
VERSION = 5

WIDTH = 100
_PASS_ROWS, _TRAFFIC_ROWS, _NOTE_ROWS = 12, 5, 3
_PLAN_CLASSES, _PLAN_TENSORS, _PLAN_POINTS = 6, 4, 8

#: The share of a step that more memory has to buy before it is offered: steps vary by as much from one to the next, and the
#: cost model is less exact.
_WORTH_BUYING = 0.005

Kind = Literal["measured", "predicted"]
Stage = Literal["captured", "joint", "forward", "backward"]
Phase = Literal["forward", "backward", "optimizer"]
CollectiveKind = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all"]
Direction = Literal["forward", "backward", "step"]
HostCopyKind = Literal["offload", "reload", "optimizer states"]
TimeUnit = Literal["seconds", "events"]
PipelineKind = Literal["forward", "backward", "backward of inputs", "backward of weights"]
Opcode = tuple[str, int, int, int, int]
"""Tag, and the ranges of lines before and after, as in :mod:`difflib`."""


@dataclass(frozen=True, kw_only=True)
class PassRecord:
    """What one pass did to one graph."""

    name: str
    stage: Stage
    summary: str
    """One line: what it did, or why it had nothing to do."""
    changed: bool
    seconds: float
    ops_before: int
    ops_after: int
    keeps_numbers: bool
    graph: str = "graph 0"
    before: str = ""
    """The graph as text, one line a node."""
    after: str = ""

    def diff(self) -> str:
        """A unified diff of the graph before and after the pass; empty where they are equal."""
        before, after = (f"{self.graph} {when} {self.name}" for when in ("before", "after"))
        return unified_diff(self.before, self.after, before, after)


@dataclass(frozen=True, kw_only=True)
class GraphRecord:
    """One captured graph, before the first pass and after the last."""

    name: str
    before: str
    after: str

    def diff(self) -> str:
        """A unified diff; empty where the texts are equal."""
        return unified_diff(self.before, self.after, f"{self.name} before", f"{self.name} after")


@dataclass(frozen=True, kw_only=True)
class MemoryPoint:
    """Live bytes of one rank just after ``label`` ran. Categories that ``bytes`` leaves out are 0.

    Raises:
        ValueError: for a category or a phase that is not known.
    """

    t: float
    """Seconds since the step began, or the index of the event: :attr:`Memory.time_unit` says which."""
    label: str
    phase: Phase
    bytes: dict[str, int]

    def __post_init__(self) -> None:
        if unknown := [c for c in self.bytes if c not in CATEGORIES]:
            raise ValueError(f"{unknown[0]!r} is not a category of memory{_nearest(unknown[0], CATEGORIES)}")
        if self.phase not in PHASES:
            raise ValueError(f"{self.phase!r} is not a phase of a step{_nearest(self.phase, PHASES)}")
        object.__setattr__(self, "bytes", {c: self.bytes.get(c, 0) for c in CATEGORIES})

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Live bytes of one rank over one optimiser step."""

    timeline: list[MemoryPoint] = field(default_factory=list)
    first_call_peak_bytes: int | None = None
    """Peak of the first call, where the one-line way holds the whole model once."""
    time_unit: TimeUnit = "events"

    @property
    def peak(self) -> MemoryPoint | None:
        """The first point with the most bytes; None without a timeline."""
        return max(self.timeline, key=lambda p: p.total, default=None)

    @property
    def peak_bytes(self) -> int:
        """Bytes at the peak; 0 without a timeline (``peak is None``, shown as not measured)."""
        return peak.total if (peak := self.peak) else 0

    @property
    def by_category(self) -> dict[str, int]:
        """Bytes of each category at the peak; empty without a timeline."""
        return dict(peak.bytes) if (peak := self.peak) else {}


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Collectives of one kind on one group in one optimiser step."""

    kind: CollectiveKind
    direction: Direction
    group: str
    group_size: int
    calls: int
    bytes: int
    """What one rank sends."""
    exposed_seconds: float | None = None
    """Time in which nothing else ran; None where it was not measured."""


@dataclass(frozen=True, kw_only=True)
class HostCopy:
    """Copies of one kind between the device and the host in one optimiser step: of values that go there (offload), of values
    that come back (reload), and of the optimiser's states, which come and go."""

    kind: HostCopyKind
    direction: Direction
    bytes: int
    exposed_seconds: float | None = None
    """Time in which nothing else ran; None where it was not measured."""


@dataclass(frozen=True, kw_only=True)
class QuantisedTensor:
    """How one parameter, or one gradient, travels: as ``format``, or whole (None). Bytes are those of one rank's buffer, of
    which ``(ranks - 1) / ranks`` go to others in a reduction, and all of them, to each, in a gather. Or how ``rows`` go to
    experts or back, as many as are expected, by their layer's name. Or how one value is ``saved`` for the backward, by its name
    in the graph; those that are saved whole are not among them. Or how a weight is stored."""

    name: str
    kind: Literal["gather", "reduction", "rows", "saved", "weight"]
    direction: Direction
    format: str | None
    whole_bytes: int
    sent_bytes: int
    relative_error: float | None = None
    """What rounding changes, as a norm over the tensor's; None where it was not measured."""


@dataclass(frozen=True, kw_only=True)
class RoundedLayer:
    """A weight, or what a layer multiplies with it, that is rounded while it trains: to ``bits`` now, and to ``target_bits`` in
    the end. ``begins``: optimiser steps before the first rounding."""

    name: str
    kind: Literal["weight", "activation"]
    bits: int | None
    """None: not yet rounded."""
    start_bits: int
    target_bits: int
    begins: int


@dataclass(frozen=True, kw_only=True)
class ExpertLayer:
    """What the router of one layer did in one optimiser step, for all ranks that its experts are divided over.

    ``rows`` are tokens times the experts that each goes to, by expert; equally many consecutive ones are each rank's."""

    name: str
    ranks: int
    rows: list[int]
    dropped: int
    """Rows that this rank had and sent to no expert."""

    @property
    def by_rank(self) -> list[int]:
        """Rows that arrive at each rank."""
        here = max(len(self.rows) // max(self.ranks, 1), 1)
        return [sum(self.rows[i : i + here]) for i in range(0, len(self.rows), here)]

    @property
    def expert_imbalance(self) -> float:
        """The busiest expert's rows over the mean; 1 where there are none."""
        return _over_mean(self.rows)

    @property
    def rank_imbalance(self) -> float:
        """The busiest rank's rows over the mean; 1 where there are none."""
        return _over_mean(self.by_rank)


def _over_mean(counts: Sequence[int]) -> float:
    total = sum(counts)
    return max(counts) * len(counts) / total if total else 1.0


@dataclass(frozen=True, kw_only=True)
class PlanPoint:
    """A plan that could be chosen. ``is_measured``: its peak is that of its code on fake tensors, not of the model."""

    peak_bytes: int
    seconds: float
    saved_bytes: int
    is_measured: bool


@dataclass(frozen=True, kw_only=True)
class PlanTensors:
    """What became of the values of one kind, or of one value: bytes from the forward to the backward, bytes of those that a
    pass holds in its way, such as on the host, and seconds to compute again what is not kept."""

    name: str
    count: int
    kept_bytes: int
    dropped_bytes: int
    again_seconds: float
    held_bytes: int = 0
    held_by: str = ""
    reason: str = ""
    """For a single value: why it was not decided otherwise."""


@dataclass(frozen=True, kw_only=True)
class PlanRecord:
    """The plan of one graph. ``frontier`` is ordered from the fastest to the smallest; ``here`` is the chosen one's index."""

    graph: str
    summary: str
    budget_bytes: int
    peak_bytes: int
    frontier: list[PlanPoint] = field(default_factory=list)
    here: int = 0
    classes: list[PlanTensors] = field(default_factory=list)
    largest: list[PlanTensors] = field(default_factory=list)

    @property
    def next_step(self) -> str:
        """``+2.00 GB buys 3.10 ms``: the least more memory that gives something; where none does, that."""
        if not self.here:
            return "no more memory makes it faster"
        at = self.frontier[self.here].seconds
        for faster in reversed(self.frontier[: self.here]):
            if at - faster.seconds >= _WORTH_BUYING * at:
                more = max(faster.peak_bytes - self.budget_bytes, 0)
                return f"+{format_bytes(more)} buys {format_seconds(at - faster.seconds)}"
        return f"more memory buys less than {100 * _WORTH_BUYING:.2g} % of the step"


@dataclass(frozen=True, kw_only=True)
class PipelineSpan:
    """What a rank computed of one micro-batch on one stage, in seconds since the pipeline's first action began."""

    kind: PipelineKind
    stage: int
    micro_batch: int
    start: float
    end: float


@dataclass(frozen=True, kw_only=True)
class PipelineTimeline:
    """One call that trains, forward and backward of all micro-batches. Lists are by rank of the pipeline; those that nobody
    knows are empty."""

    micro_batches: int
    spans: list[list[PipelineSpan]]
    peak_bytes: list[int] = field(default_factory=list)
    wait_seconds: list[float] = field(default_factory=list)
    """In which a rank waited for messages."""
    sent_bytes: list[int] = field(default_factory=list)
    """To neighbours."""

    @property
    def seconds(self) -> float:
        """From the begin of the first to the end of the last action."""
        every = [span for row in self.spans for span in row]
        return max((s.end for s in every), default=0.0) - min((s.start for s in every), default=0.0)

    @property
    def bubbles(self) -> list[float]:
        """The share of the whole time in which each rank does not compute."""
        whole = self.seconds
        busy = [math.fsum(span.end - span.start for span in row) for row in self.spans]
        return [max(0.0, 1 - one / whole) if whole > 0 else 0.0 for one in busy]

    @property
    def bubble(self) -> float:
        """The share of all ranks' time in which they do not compute."""
        return statistics.fmean(self.bubbles) if self.spans else 0.0


@dataclass(frozen=True, kw_only=True)
class PipelineMessage:
    """What goes one way over one ``cut``, numbered by the stage before it, for one micro-batch, where messages travel as
    ``format``; None where it is no smaller so, and goes whole."""

    cut: int
    direction: Direction
    format: str | None
    whole_bytes: int
    sent_bytes: int
    relative_error: float | None = None
    """What rounding has changed of the first one, as a norm over its values'; None where it was not measured."""


@dataclass(frozen=True, kw_only=True)
class PipelineRecord:
    """The stages of a model over ranks, and its batch over time."""

    schedule: str
    rank_of: list[int]
    """The rank of each stage, in the pipeline."""
    rank: int
    """The place in the pipeline of the rank that the rest of the report is of."""
    why: list[str] = field(default_factory=list)
    """Where the model is cut, and why there: a line a cut."""
    candidates: list[str] = field(default_factory=list)
    """A table of the schedules that were compared: its head, then the chosen one, then the others."""
    messages: list[PipelineMessage] = field(default_factory=list)
    """Between ranks, where they are to travel in few bits; empty where all go whole."""
    predicted: PipelineTimeline | None = None
    measured: PipelineTimeline | None = None

    @property
    def stages(self) -> int:
        return len(self.rank_of)

    @property
    def ranks(self) -> int:
        return max(self.rank_of, default=-1) + 1

    @property
    def timelines(self) -> dict[str, PipelineTimeline]:
        """Those that are known."""
        both = {"predicted": self.predicted, "measured": self.measured}
        return {name: timeline for name, timeline in both.items() if timeline is not None}


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything ``dspass.explain`` knows of a model.

    ``config`` holds JSON values only (tuples become lists).

    Raises:
        ValueError: where ``config`` holds something that JSON cannot.
    """

    kind: Kind
    model: str
    device: str
    world_size: int
    passes: list[PassRecord] = field(default_factory=list)
    graphs: list[GraphRecord] = field(default_factory=list)
    memory: Memory = field(default_factory=Memory)
    traffic: list[Traffic] = field(default_factory=list)
    """One rank's, in one optimiser step."""
    host_copies: list[HostCopy] = field(default_factory=list)
    """One rank's, in one optimiser step; empty where nothing waits on the host."""
    quantised: list[QuantisedTensor] = field(default_factory=list)
    """Of one call of the model; empty where all travel whole."""
    rounded: list[RoundedLayer] = field(default_factory=list)
    """What is rounded while it trains."""
    experts: list[ExpertLayer] = field(default_factory=list)
    """In one optimiser step; empty where no experts are divided over ranks, or nothing was measured."""
    step_seconds: float | None = None
    plans: list[PlanRecord] = field(default_factory=list)
    """What a memory budget decided, one a graph."""
    pipeline: PipelineRecord | None = None
    """None where the model's layers are not divided over ranks, nor its batch into micro-batches."""
    config: dict[str, Any] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    """Dotted keys of the configuration that do nothing here, each with the reason."""
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "config", _json_value(self.config, "config"))

    @property
    def traffic_bytes(self) -> int:
        """Bytes that one rank sends in one optimiser step."""
        return sum(t.bytes for t in self.traffic)

    @property
    def missing(self) -> str:
        """What stands in place of a figure that is not known."""
        return f"not {self.kind}"

    def __str__(self) -> str:
        return "\n".join(_clip(line) for line in _lines(self))

    def _repr_html_(self) -> str:
        from dspass.report_html import render_summary

        return render_summary(self)

    def to_html(self) -> str:
        """One self-contained page."""
        from dspass.report_html import render_page

        return render_page(self)

    def to_dict(self) -> dict[str, Any]:
        """JSON values. Each different graph text stands once, in ``texts``, and records hold its index."""
        texts: dict[str, int] = {}
        data = _encode(self)
        for record in (*data["passes"], *data["graphs"]):
            for key in ("before", "after"):
                record[key] = texts.setdefault(record[key], len(texts))
        return {"format": FORMAT, "version": VERSION, **data, "texts": list(texts)}

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """The report that :meth:`to_dict` was called on.

        Raises:
            ValueError: where ``data`` is no report, is of another format version, or a value is missing,
                unknown or of the wrong type; the message names where it stands.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"not a dspass report: the key 'format' must say {FORMAT!r}")
        if data.get("version") != VERSION or isinstance(data["version"], bool):
            raise ValueError(
                f"the report has format version {data.get('version')!r}, this dspass reads {VERSION}: "
                "load it with the version of dspass that wrote it, or make the report again"
            )
        data = {k: v for k, v in data.items() if k not in ("format", "version")}
        texts = _decode(list[str], data.pop("texts", None), "texts")
        for part in ("passes", "graphs"):
            records = _list(data.get(part), part)
            data[part] = [_with_texts(r, texts, f"{part}[{i}]") for i, r in enumerate(records)]
        return typing.cast(Self, _decode(cls, data, ""))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a page (``.html``) or data for :meth:`load` (``.json``), whole or not at all.

        Raises:
            ValueError: for another suffix, or a figure that JSON cannot hold (NaN, infinity).
        """
        suffix = Path(path).suffix.lower()
        if suffix == ".html":
            _write(path, self.to_html())
        elif suffix == ".json":
            _write(path, _dumps(self.to_dict()))
        else:
            name = os.fspath(path)
            raise ValueError(f"cannot save a report as {name!r}: the name must end in .html or .json")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what :meth:`save` wrote as ``.json``.

        Raises:
            ValueError: where the file is no report; OSError where it cannot be read.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except RecursionError:
            raise ValueError(f"{os.fspath(path)}: nested too deeply for a report") from None
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
            hint = "; a report is loaded from the .json file, not from the page" if _is_page(path) else ""
            raise ValueError(f"{os.fspath(path)}: {error}{hint}") from error

    def trace(self, path: str | os.PathLike[str]) -> None:
        """Write a trace for https://ui.perfetto.dev: memory by category, the nodes, the phases, the passes.

        One microsecond stands for one event where the timeline counts events.

        Raises:
            ValueError: where the name does not end in ``.json``.
        """
        if Path(path).suffix.lower() != ".json":
            raise ValueError(f"cannot save a trace as {os.fspath(path)!r}: the name must end in .json")
        events = list(_trace_events(self))
        _write(path, _dumps({"displayTimeUnit": "ms", "otherData": _trace_header(self), "traceEvents": events}))

    def diff(self, other: Report) -> str:
        """What differs from this report to ``other``, as text: ``this → other``."""
        nothing = "The same passes, graphs, memory at the peak, traffic, step time and configuration."
        return "\n".join(_diff_lines(self, other)) or nothing


# Text diff


def opcodes(before: Sequence[str], after: Sequence[str]) -> list[Opcode]:
    """What :meth:`difflib.SequenceMatcher.get_opcodes` answers, in near-linear time for printed graphs.

    Lines that stand once in both texts (nearly all: names of nodes are unique) are matched first, in their
    longest common order; only the gaps between them go to difflib. This is Bram Cohen's patience diff.
    """
    blocks: list[tuple[int, int]] = []  # matched pairs of lines, ascending

    def match(a0: int, a1: int, b0: int, b1: int) -> None:
        head = 0
        while a0 + head < a1 and b0 + head < b1 and before[a0 + head] == after[b0 + head]:
            head += 1
        blocks.extend((a0 + i, b0 + i) for i in range(head))
        a0, b0 = a0 + head, b0 + head
        tail = 0
        while a1 - tail > a0 and b1 - tail > b0 and before[a1 - tail - 1] == after[b1 - tail - 1]:
            tail += 1
        a1, b1 = a1 - tail, b1 - tail
        if a0 < a1 and b0 < b1:
            anchors = _anchors(before, after, a0, a1, b0, b1)
            if not anchors:
                matcher = difflib.SequenceMatcher(None, before[a0:a1], after[b0:b1], autojunk=True)
                for block in matcher.get_matching_blocks():
                    blocks.extend((a0 + block.a + i, b0 + block.b + i) for i in range(block.size))
            for i, j in anchors:
                if i >= a0 and j >= b0:
                    match(a0, i + 1, b0, j + 1)
                    a0, b0 = i + 1, j + 1
            if anchors:
                match(a0, a1, b0, b1)
        blocks.extend((a1 + i, b1 + i) for i in range(tail))

    match(0, len(before), 0, len(after))
    return list(_from_blocks(blocks, len(before), len(after)))


def _anchors(before: Sequence[str], after: Sequence[str], a0: int, a1: int, b0: int, b1: int) -> list[tuple[int, int]]:
    """Lines that stand once in both ranges, as the longest chain of pairs that ascends in both."""
    in_a, in_b = Counter(before[a0:a1]), Counter(after[b0:b1])
    where = {after[j]: j for j in range(b0, b1)}
    pairs = [(i, where[before[i]]) for i in range(a0, a1) if in_a[before[i]] == 1 == in_b[before[i]]]
    ends: list[int] = []  # the smallest last j of a chain of each length
    last: list[int] = []  # and which pair it is
    back: list[int] = []
    for index, (_, j) in enumerate(pairs):
        at = bisect.bisect_left(ends, j)
        back.append(last[at - 1] if at else -1)
        ends[at : at + 1], last[at : at + 1] = [j], [index]
    chain: list[tuple[int, int]] = []
    index = last[-1] if last else -1
    while index >= 0:
        chain.append(pairs[index])
        index = back[index]
    return chain[::-1]


def _from_blocks(pairs: Iterable[tuple[int, int]], a_end: int, b_end: int) -> Iterator[Opcode]:
    a = b = equal = 0  # the lines before a and b are told, but for the last ``equal`` ones
    for i, j in [*pairs, (a_end, b_end)]:
        gap = i > a or j > b
        if equal and (gap or i == a_end):
            yield "equal", a - equal, a, b - equal, b
            equal = 0
        if gap:
            yield ("insert" if i == a else "delete" if j == b else "replace"), a, i, b, j
        a, b, equal = i + 1, j + 1, equal + 1


def split_lines(text: str) -> list[str]:
    """Lines by ``\\n`` alone, so that equal lines mean equal texts."""
    return text.split("\n") if text else []


def unified_diff(before: str, after: str, before_name: str, after_name: str, context: int = 3) -> str:
    """:func:`difflib.unified_diff`, fast on graphs of many thousand lines; empty where nothing differs."""
    a, b = split_lines(before), split_lines(after)
    lines: list[str] = []
    for group in hunks(opcodes(a, b), context):
        (_, i0, _, j0, _), (_, _, i1, _, j1) = group[0], group[-1]
        lines.append(f"@@ -{_span(i0, i1)} +{_span(j0, j1)} @@")
        for tag, a0, a1, b0, b1 in group:
            if tag == "equal":
                lines += [" " + line for line in a[a0:a1]]
            else:
                lines += ["-" + line for line in a[a0:a1]] + ["+" + line for line in b[b0:b1]]
    return "\n".join([f"--- {before_name}", f"+++ {after_name}", *lines]) if lines else ""


def hunks(ops: Sequence[Opcode], context: int) -> Iterator[list[Opcode]]:
    """The changes with ``context`` equal lines around them, near ones together."""
    hunk: list[Opcode] = []
    for at, (tag, i0, i1, j0, j1) in enumerate(ops):
        if tag != "equal":
            hunk.append((tag, i0, i1, j0, j1))
            continue
        last = at == len(ops) - 1
        if hunk and (last or i1 - i0 > 2 * context):
            keep = min(context, i1 - i0)
            if keep:
                hunk.append(("equal", i0, i0 + keep, j0, j0 + keep))
            yield hunk
            hunk = []
        if not last:
            keep = i1 - i0 if hunk else min(context, i1 - i0)
            if keep:
                hunk.append(("equal", i1 - keep, i1, j1 - keep, j1))
    if hunk:
        yield hunk


def _span(start: int, stop: int) -> str:
    length = stop - start
    return f"{start + 1 if length else start}" + ("" if length == 1 else f",{length}")


# Figures


def format_bytes(count: int) -> str:
    """``1.50 GB``: powers of 1000, as budgets are written and devices are sold, so that figures can be compared with these."""
    value, unit = float(count), "B"
    for larger in ("KB", "MB", "GB", "TB", "PB"):
        if abs(value) < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{count} B" if unit == "B" else f"{_three_digits(value)} {unit}"


def format_seconds(seconds: float) -> str:
    """``12.3 ms``; an hour is ``3600 s`` too."""
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "µs")):
        value = seconds * factor
        if abs(value) >= 0.9995 or unit == "µs":
            break
    return f"{_three_digits(value)} {unit}"


def _three_digits(value: float) -> str:
    return f"{value:.{2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0}f}"


# The report as text


def _lines(report: Report) -> Iterator[str]:
    ranks = f"{report.world_size} rank" + ("" if report.world_size == 1 else "s")
    yield f"dspass report, {report.kind}: {_line(report.model)} on {ranks}, {_line(report.device)}"
    if report.versions:
        yield "  " + ", ".join(f"{_line(k)} {_line(v)}" for k, v in report.versions.items())
    yield ""
    yield from _pass_lines(report)
    yield ""
    yield from _memory_lines(report)
    yield ""
    yield from _traffic_lines(report)
    yield ""
    if report.host_copies:
        yield from _host_lines(report)
        yield ""
    if report.quantised:
        yield from _quantised_lines(report)
        yield ""
    if report.rounded:
        yield from _rounded_lines(report)
    if report.experts:
        yield from _expert_lines(report.experts)
        yield ""
    for plan in report.plans:
        yield from _plan_lines(plan)
        yield ""
    if report.pipeline is not None:
        from dspass.report_pipeline import lines

        yield from lines(report.pipeline, WIDTH)
        yield ""
    step = report.step_seconds
    yield f"Step time: {report.missing if step is None else format_seconds(step)}"
    notes = [*report.notes, *(f"ignored {key}: {reason}" for key, reason in report.ignored.items())]
    for note in notes[:_NOTE_ROWS]:
        yield from _wrapped(f"- {note}", "  ")
    if len(notes) > _NOTE_ROWS:
        yield f"  - and {len(notes) - _NOTE_ROWS} more in .notes and .ignored"


def _pass_lines(report: Report) -> Iterator[str]:
    passes = report.passes
    if not passes:
        yield "Passes: none ran"
        return
    changed = sum(p.changed for p in passes)
    seconds = format_seconds(sum(p.seconds for p in passes))
    star = "" if all(p.keeps_numbers for p in passes) else " (* changes numbers)"
    yield f"Passes: {len(passes)} runs, {changed} changed a graph, {seconds} in all{star}"
    shown = passes
    if len(passes) > _PASS_ROWS:
        shown = [p for p in passes if p.changed]
    several = len({p.graph for p in passes}) > 1
    rows = []
    for p in shown[:_PASS_ROWS]:
        name = _line(p.name) + ("" if p.keeps_numbers else "*")
        where = f"{_line(p.graph)} {p.stage}" if several else p.stage
        rows.append((name, where, _change(p), format_seconds(p.seconds), _line(p.summary)))
    yield from _table(rows, "<<>><")
    if len(shown) > _PASS_ROWS:
        yield f"  and {len(shown) - _PASS_ROWS} more that changed a graph"
    if len(shown) < len(passes):
        idle = dict.fromkeys(f"{_line(p.name)} ({p.stage})" for p in passes if not p.changed)
        if idle:
            yield f"  nothing to do for {', '.join(idle)}"


def _change(record: PassRecord) -> str:
    before, after = record.ops_before, record.ops_after
    return f"{after} ops" if before == after else f"{before} → {after} ops"


def _memory_lines(report: Report) -> Iterator[str]:
    memory = report.memory
    first = memory.first_call_peak_bytes
    first_call = f" (first call {report.missing if first is None else format_bytes(first)})"
    peak = memory.peak
    if peak is None:
        yield f"Peak memory of one rank: {report.missing}{'' if first is None else first_call}"
        return
    at = f"in {peak.phase}, at {_line(peak.label)}"
    yield f"Peak memory of one rank: {format_bytes(peak.total)}{first_call}, {at}"
    largest = max(*peak.bytes.values(), 1)
    for category, count in peak.bytes.items():
        if count:
            bar = "█" * max(1, round(44 * count / largest))
            yield f"  {category:<11} {format_bytes(count):>10} {100 * count / peak.total:4.0f} %  {bar}"


def _traffic_lines(report: Report) -> Iterator[str]:
    if not report.traffic:
        yield "Traffic of one step: none"
        return
    calls, sent = sum(t.calls for t in report.traffic), format_bytes(report.traffic_bytes)
    yield f"Traffic of one step: one rank sends {sent} in {_count(calls, 'call')}"
    rows = []
    for t in sorted(report.traffic, key=lambda t: -t.bytes)[:_TRAFFIC_ROWS]:
        group, sent = f"{_line(t.group)}, {_count(t.group_size, 'rank')}", format_bytes(t.bytes)
        exposed = f"exposed {exposed_text(t)}"
        rows.append((t.kind, t.direction, group, _count(t.calls, "call"), sent, exposed))
    yield from _table(rows, "<<<>><")
    if len(report.traffic) > _TRAFFIC_ROWS:
        yield f"  and {len(report.traffic) - _TRAFFIC_ROWS} more in .traffic"


def _host_lines(report: Report) -> Iterator[str]:
    yield f"Copies to and from the host in one step: {format_bytes(sum(c.bytes for c in report.host_copies))}"
    copies = report.host_copies[:_TRAFFIC_ROWS]
    yield from _table(
        [(c.kind, c.direction, format_bytes(c.bytes), f"exposed {exposed_text(c)}") for c in copies], "<<><"
    )


def _quantised_lines(report: Report) -> Iterator[str]:
    sizes = [sum(t.whole_bytes for t in report.quantised), sum(t.sent_bytes for t in report.quantised)]
    yield f"In few bits, on one rank: {format_bytes(sizes[1])} instead of {format_bytes(sizes[0])}"
    yield from _table(quantised_rows(report)[:_TRAFFIC_ROWS], "<<<><<")


def quantised_rows(report: Report) -> list[tuple[str, ...]]:
    """A row for each way that tensors of one kind and direction travel: what, which way, as what, how many, from and to how
    many bytes, and the median and the largest error."""
    groups: dict[tuple[str, str, str | None], list[QuantisedTensor]] = {}
    for one in report.quantised:
        groups.setdefault((one.kind, one.direction, one.format), []).append(one)
    rows: list[tuple[str, ...]] = []
    for (kind, direction, kept), some in groups.items():
        whole, sent = sum(t.whole_bytes for t in some), sum(t.sent_bytes for t in some)
        size = format_bytes(whole) + (f" → {format_bytes(sent)}" if kept else "")
        rows.append((kind, direction, _line(kept or "whole"), _count(len(some), "tensor"), size, _errors(some)))
    return rows


def _errors(some: Sequence[QuantisedTensor]) -> str:
    known = [t.relative_error for t in some if t.relative_error is not None]
    if not known:
        return "error not measured" if some[0].format else ""
    return f"error {100 * statistics.median(known):.2g} %, {100 * max(known):.2g} % at most"


def _rounded_lines(report: Report) -> Iterator[str]:
    yield f"Rounded while it trains: {_count(len(report.rounded), 'value')}"
    rows = rounded_rows(report)
    yield from _table(rows[:_TRAFFIC_ROWS], "<<<<")
    if len(rows) > _TRAFFIC_ROWS:
        yield f"  and {len(rows) - _TRAFFIC_ROWS} more in .rounded"


def rounded_rows(report: Report) -> list[tuple[str, ...]]:
    """A row for all that is rounded alike: what, its bits now and in the end, how many, and the first's name."""
    groups: dict[tuple[str, str], list[RoundedLayer]] = {}
    for one in report.rounded:
        groups.setdefault((one.kind, bits_text(one)), []).append(one)
    return [
        (kind, bits, f"{len(some)} of them", _line(some[0].name) + (" and on" if len(some) > 1 else ""))
        for (kind, bits), some in groups.items()
    ]


def bits_text(one: RoundedLayer) -> str:
    """``8 bits now, 4 in the end``; whole ones say when it begins."""
    if one.bits is None:
        falls = f" to {one.target_bits}" if one.target_bits != one.start_bits else ""
        return f"whole until step {one.begins}, then {one.start_bits}{falls} bits"
    return f"{one.bits} bits now" + (f", {one.target_bits} in the end" if one.bits != one.target_bits else "")


def _expert_lines(layers: Sequence[ExpertLayer]) -> Iterator[str]:
    """The layers whose ranks are least even, with a bar for each expert, or for several neighbours where there are many."""
    dropped = sum(layer.dropped for layer in layers)
    said = f"; this rank dropped {_count(dropped, 'row')}" if dropped else ""
    yield f"Experts of {_count(len(layers), 'layer')} in one step, busiest over mean, rows by expert{said}"
    rows = []
    for layer in sorted(layers, key=lambda one: -one.rank_imbalance)[:_TRAFFIC_ROWS]:
        on = f"{len(layer.rows)} on {_count(layer.ranks, 'rank')}"
        uneven = f"rank {layer.rank_imbalance:.2f}", f"expert {layer.expert_imbalance:.2f}"
        rows.append((_end_of(_line(layer.name)), on, *uneven, _bars(layer.rows)))
    yield from _table(rows, "<<<<<")
    if len(layers) > _TRAFFIC_ROWS:
        yield f"  and {len(layers) - _TRAFFIC_ROWS} more in .experts"


def _end_of(name: str, most: int = 28) -> str:
    """Names of modules differ at their ends, and in the numbers before."""
    return name if len(name) <= most else f"…{name[1 - most :]}"


def _bars(counts: Sequence[int], most: int = 24) -> str:
    """A character for each, or for as many neighbours as leave ``most``, as high as its share of the largest."""
    several = -(-len(counts) // most) or 1
    sums = [sum(counts[i : i + several]) for i in range(0, len(counts), several)]
    return "".join("▁▂▃▄▅▆▇█"[round(7 * count / max(*sums, 1))] for count in sums)


def exposed_text(moved: Traffic | HostCopy) -> str:
    """``-`` where it was not measured."""
    return "-" if moved.exposed_seconds is None else format_seconds(moved.exposed_seconds)


def _plan_lines(plan: PlanRecord) -> Iterator[str]:
    """The plan as text, at most some twenty lines."""
    yield from _wrapped(f"Plan of {plan.graph} for {format_bytes(plan.budget_bytes)}: {plan.summary}", "")
    yield f"  {plan.next_step}"
    rows = [("", "peak", "step", "saved")]
    for i in _some(len(plan.frontier), _PLAN_POINTS, plan.here):
        point = plan.frontier[i]
        mark = "→" if i == plan.here else ""
        about = "" if point.is_measured else "about "
        rows.append(
            (
                mark,
                about + format_bytes(point.peak_bytes),
                format_seconds(point.seconds),
                format_bytes(point.saved_bytes),
            )
        )
    yield from _plan_table(rows)
    classes: list[tuple[str, ...]] = [("", "kept", "held otherwise", "dropped", "again in")]
    for one in plan.classes[:_PLAN_CLASSES]:
        again = format_seconds(one.again_seconds) if one.dropped_bytes else "-"
        held = f"{format_bytes(one.held_bytes)} {one.held_by}" if one.held_bytes else "-"
        name = f"{one.name} ({one.count})"
        classes.append((name, format_bytes(one.kept_bytes), held, format_bytes(one.dropped_bytes), again))
    yield from _plan_table(classes)
    for one in plan.largest[:_PLAN_TENSORS]:
        yield from _wrapped(f"{one.name}: {one.reason}", "  ")


def _some(count: int, most: int, always: int) -> list[int]:
    """At most ``most`` of ``count`` indices, the ends and ``always`` among them."""
    if count <= most:
        return list(range(count))
    return sorted({*(round(i * (count - 1) / (most - 2)) for i in range(most - 1)), always})


def _plan_table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for first, *others in rows:
        yield (
            "  " + first.ljust(widths[0]) + "".join("  " + c.rjust(w) for c, w in zip(others, widths[1:], strict=True))
        ).rstrip()


def _table(rows: Sequence[tuple[str, ...]], align: str) -> Iterator[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(align))] if rows else []
    for row in rows:
        cells = [f"{cell:{a}{min(w, 40)}}" for cell, a, w in zip(row, align, widths, strict=True)]
        yield ("  " + "  ".join(cells)).rstrip()


def _count(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")


def _line(text: str) -> str:
    """One line without control characters: labels come from models, and a terminal obeys escape codes."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _wrapped(text: str, indent: str) -> list[str]:
    """Sentences, which say nothing where they are cut short, in lines of :data:`WIDTH`."""
    return textwrap.wrap(
        _line(text), WIDTH, initial_indent=indent, subsequent_indent=indent + "  ", break_on_hyphens=False
    )


def _clip(line: str) -> str:
    return line if len(line) <= WIDTH else line[: WIDTH - 1].rstrip() + "…"


# What differs


def _diff_lines(old: Report, new: Report) -> Iterator[str]:
    for name in ("kind", "model", "device", "world_size"):
        if getattr(old, name) != getattr(new, name):
            yield f"{name}: {_line(str(getattr(old, name)))} → {_line(str(getattr(new, name)))}"
    yield from _section("Versions", _changes(old.versions, new.versions))
    yield from _section("Passes", _pass_changes(old, new))
    yield from _section("Graphs", _graph_changes(old, new))
    yield from _section("Memory of one rank", _memory_changes(old, new))
    yield from _section("Traffic of one step", _traffic_changes(old, new))
    copies = ({f"{c.kind} {c.direction}": _copied(c) for c in r.host_copies} for r in (old, new))
    yield from _section("Copies to and from the host", _changes(*copies))
    packed = ({" ".join(row[:3]): ", ".join(row[3:]) for row in quantised_rows(r)} for r in (old, new))
    yield from _section("In few bits", _changes(*packed))
    rounded = ({f"{one.kind} {_line(one.name)}": bits_text(one) for one in r.rounded} for r in (old, new))
    yield from _section("Rounded while it trains", _changes(*rounded))
    routed = ({e.name: _routed(e) for e in r.experts} for r in (old, new))
    yield from _section("Experts", _changes(*routed))
    if old.step_seconds != new.step_seconds:
        figures = _figures(old.step_seconds, new.step_seconds, format_seconds, old.missing, new.missing)
        yield f"Step time: {figures}"
    if old.pipeline != new.pipeline:
        from dspass.report_pipeline import changes

        yield from _section("Pipeline", changes(old.pipeline, new.pipeline))
    yield from _section("Plans", _changes(*({p.graph: p.summary for p in r.plans} for r in (old, new))))
    yield from _section("Configuration", _changes(flat_config(old.config), flat_config(new.config)))
    yield from _section("Ignored keys", _changes(old.ignored, new.ignored))
    gone, come = Counter(old.notes) - Counter(new.notes), Counter(new.notes) - Counter(old.notes)
    yield from _section("Notes", [f"- {_line(n)}" for n in gone] + [f"+ {_line(n)}" for n in come])


def _section(title: str, lines: Iterable[str]) -> Iterator[str]:
    found = [f"  {line}" for line in lines]
    if found:
        yield f"{title}:"
        yield from found


def _changes(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    for key in dict.fromkeys([*old, *new]):
        if key not in new:
            yield f"- {_line(key)}: {_line(str(old[key]))}"
        elif key not in old:
            yield f"+ {_line(key)}: {_line(str(new[key]))}"
        elif old[key] != new[key]:
            yield f"{_line(key)}: {_line(str(old[key]))} → {_line(str(new[key]))}"


def _numbered(keys: Iterable[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
    """The same key a second time becomes another one."""
    seen: Counter[tuple[Any, ...]] = Counter()
    for key in keys:
        yield (*key, seen[key])
        seen[key] += 1


def _pass_changes(old: Report, new: Report) -> Iterator[str]:
    def keyed(report: Report) -> dict[tuple[Any, ...], PassRecord]:
        keys = _numbered((p.graph, p.stage, p.name) for p in report.passes)
        return dict(zip(keys, report.passes, strict=True))

    a, b = keyed(old), keyed(new)
    for key in dict.fromkeys([*a, *b]):
        name = f"{_line(key[2])} ({_line(key[0])} {key[1]})"
        if key not in b or key not in a:
            yield f"{'-' if key in a else '+'} {name}: {_line((a.get(key) or b[key]).summary)}"
            continue
        was, now = a[key], b[key]
        said = []
        if (was.ops_before, was.ops_after) != (now.ops_before, now.ops_after):
            said.append(f"{_change(was)} ⇒ {_change(now)}")
        if was.summary != now.summary:
            said.append(f"{_line(was.summary)} ⇒ {_line(now.summary)}")
        for name_of in ("changed", "keeps_numbers"):
            if getattr(was, name_of) != getattr(now, name_of):
                said.append(f"{name_of} {getattr(was, name_of)} ⇒ {getattr(now, name_of)}")
        if not said and (was.before, was.after) != (now.before, now.after):
            said.append("another graph")
        if said:
            yield f"{name}: {'; '.join(said)}"
    common = [k for k in a if k in b]
    if common != [k for k in b if k in a]:
        yield "in another order"


def _graph_changes(old: Report, new: Report) -> Iterator[str]:
    a, b = ({g.name: g for g in r.graphs} for r in (old, new))
    for name in dict.fromkeys([*a, *b]):
        if name not in a or name not in b:
            yield f"{'-' if name in a else '+'} {_line(name)}"
        elif a[name] != b[name]:
            ops = opcodes(split_lines(a[name].after), split_lines(b[name].after))
            gone = sum(i1 - i0 for tag, i0, i1, _, _ in ops if tag != "equal")
            come = sum(j1 - j0 for tag, _, _, j0, j1 in ops if tag != "equal")
            yield f"{_line(name)}: -{gone} +{come} lines after the passes"


def _memory_changes(old: Report, new: Report) -> Iterator[str]:
    missing = old.missing, new.missing
    a, b = old.memory, new.memory
    old_peak, new_peak = a.peak, b.peak
    was, now = (None if p is None else p.total for p in (old_peak, new_peak))
    if was != now:
        yield f"peak: {_figures(was, now, format_bytes, *missing)}"
    for category in CATEGORIES:
        was, now = (None if p is None else p.bytes[category] for p in (old_peak, new_peak))
        if was != now:
            yield f"{category} at the peak: {_figures(was, now, format_bytes, *missing)}"
    if a.first_call_peak_bytes != b.first_call_peak_bytes:
        was, now = a.first_call_peak_bytes, b.first_call_peak_bytes
        yield f"first call: {_figures(was, now, format_bytes, *missing)}"


def _traffic_changes(old: Report, new: Report) -> Iterator[str]:
    def keyed(report: Report) -> dict[tuple[Any, ...], tuple[int, int, float | None]]:
        totals: dict[tuple[Any, ...], tuple[int, int, float | None]] = {}
        for t in report.traffic:
            key = (t.kind, t.direction, t.group, t.group_size)
            calls, count, exposed = totals.get(key, (0, 0, 0.0))
            exposed = None if exposed is None or t.exposed_seconds is None else exposed + t.exposed_seconds
            totals[key] = (calls + t.calls, count + t.bytes, exposed)
        return totals

    a, b = keyed(old), keyed(new)
    for key in dict.fromkeys([*a, *b]):
        kind, direction, group, size = key
        name = f"{kind} {direction} {_line(group)}, {_count(size, 'rank')}"
        if key not in a or key not in b:
            calls, count, _ = a.get(key) or b[key]
            yield f"{'-' if key in a else '+'} {name}: {_count(calls, 'call')}, {format_bytes(count)}"
            continue
        was, now = a[key], b[key]
        said = []
        if was[0] != now[0]:
            said.append(f"{was[0]} → {_count(now[0], 'call')}")
        if was[1] != now[1]:
            said.append(_figures(was[1], now[1], format_bytes, "", ""))
        if was[2] != now[2]:
            said.append(f"exposed {_figures(was[2], now[2], format_seconds, old.missing, new.missing)}")
        if said:
            yield f"{name}: {', '.join(said)}"


def _routed(layer: ExpertLayer) -> str:
    uneven = f"rank {layer.rank_imbalance:.2f}, expert {layer.expert_imbalance:.2f}"
    return f"{sum(layer.rows)} rows, {uneven}, {layer.dropped} dropped, on {_count(layer.ranks, 'rank')}"


def _copied(copy: HostCopy) -> str:
    return f"{format_bytes(copy.bytes)}, exposed {exposed_text(copy)}"


def _figures(was: Any, now: Any, show: Any, was_missing: str, now_missing: str) -> str:
    text = f"{was_missing if was is None else show(was)} → {now_missing if now is None else show(now)}"
    return f"{text} ({100 * (now - was) / was:+.1f} %)" if was and now is not None else text


def flat_config(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as ``a.b``; empty sections stay visible."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict) and item:
            flat.update(flat_config(item, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = item
    return flat


# The trace: the Trace Event Format of Chrome, which Perfetto reads

_STEP, _COMPILE = 1, 2  # process ids: they only make groups of tracks
_PHASE_TRACK, _NODE_TRACK = 1, 2


def _trace_header(report: Report) -> dict[str, Any]:
    unit = "one microsecond is one event" if report.memory.time_unit == "events" else "seconds of the step"
    return {
        "model": report.model,
        "kind": report.kind,
        "world_size": report.world_size,
        "device": report.device,
        "timeline": unit,
    }


def _trace_events(report: Report) -> Iterator[dict[str, Any]]:
    yield _name("process_name", _STEP, 0, f"one step, {report.kind}")
    yield _name("process_name", _COMPILE, 0, "passes at compile time")
    yield _name("thread_name", _STEP, _PHASE_TRACK, "phases")
    yield _name("thread_name", _STEP, _NODE_TRACK, "nodes")
    scale = 1.0 if report.memory.time_unit == "events" else 1e6
    points = report.memory.timeline
    times = [p.t * scale for p in points]
    for point, at in zip(points, times, strict=True):
        yield {"name": "memory", "ph": "C", "pid": _STEP, "tid": 0, "ts": at, "args": dict(point.bytes)}
    for start, stop in phase_runs(points):
        end = times[stop] if stop < len(points) else times[-1]
        yield _span_event(points[start].phase, _STEP, _PHASE_TRACK, times[start], end, {})
    for i, point in enumerate(points):
        # A point tells what is live after its node ran: the node stands before it.
        begin = times[i - 1] if i else times[0]
        args: dict[str, Any] = {"phase": point.phase, "bytes": point.total}
        yield _span_event(point.label, _STEP, _NODE_TRACK, begin, times[i], args)
    tracks: dict[tuple[str, str], int] = {}
    clock = 0.0
    for p in report.passes:
        key = (p.graph, p.stage)
        if key not in tracks:
            tracks[key] = len(tracks) + 1
            yield _name("thread_name", _COMPILE, tracks[key], f"{p.graph} {p.stage}")
        end = clock + p.seconds * 1e6
        args = {
            "summary": p.summary,
            "changed": p.changed,
            "ops_before": p.ops_before,
            "ops_after": p.ops_after,
        }
        yield _span_event(p.name, _COMPILE, tracks[key], clock, end, args)
        clock = end


def _name(kind: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": pid, "tid": tid, "ts": 0, "args": {"name": name}}


def _span_event(name: str, pid: int, tid: int, start: float, end: float, args: dict[str, Any]) -> dict[str, Any]:
    duration = max(0.0, end - start)
    return {"name": name, "ph": "X", "pid": pid, "tid": tid, "ts": start, "dur": duration, "args": args}


def phase_runs(points: Sequence[MemoryPoint]) -> Iterator[tuple[int, int]]:
    """First and one past the last index of each run of points in one phase."""
    start = 0
    for i in range(1, len(points) + 1):
        if i == len(points) or points[i].phase != points[start].phase:
            yield start, i
            start = i


# Files and JSON


def _write(path: str | os.PathLike[str], text: str) -> None:
    """Whole or not at all: a reader, or a crash in between, never sees half a file. Makes missing folders."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        # Lone surrogates can stand in names of files and labels; they must not lose the report.
        with open(part, "w", encoding="utf-8", errors="replace", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def _dumps(value: Any) -> str:
    try:
        return json.dumps(value, allow_nan=False)  # ASCII: any text survives, lone surrogates too
    except ValueError as error:
        raise ValueError(f"the report holds a figure that JSON cannot: {error}") from error


def _is_page(path: str | os.PathLike[str]) -> bool:
    return Path(path).suffix.lower() in (".html", ".htm")


def _encode(value: Any) -> Any:
    if isinstance(value, MemoryPoint):  # by far the most of them: zeros are left out
        return {
            "t": value.t,
            "label": value.label,
            "phase": value.phase,
            "bytes": {c: n for c, n in value.bytes.items() if n},
        }
    if dataclasses.is_dataclass(value):
        return {f.name: _encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {k: _encode(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_encode(v) for v in value]
    return value


def _json_value(value: Any, where: str) -> Any:
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"{where}: the key {key!r} is of type {type(key).__name__}, not a string")
        return {k: _json_value(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if value is None or isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise ValueError(f"{where}: {value!r} of type {type(value).__name__} is no JSON value")


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{where}: expected a list, found {_shown(value)}")
    return value


def _with_texts(record: Any, texts: list[str], where: str) -> Any:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object, found {_shown(record)}")
    found = dict(record)
    for key in ("before", "after"):
        index = found.get(key)
        if type(index) is not int or not 0 <= index < len(texts):
            raise ValueError(f"{where}.{key}: expected an index into texts, found {_shown(index)}")
        found[key] = texts[index]
    return found


def _decode(hint: Any, value: Any, where: str) -> Any:
    """``value`` as the type that ``hint`` names, or a ValueError that says where it is something else."""
    if dataclasses.is_dataclass(hint):
        return _decode_record(typing.cast(type, hint), value, where)
    if hint is Any:
        return value
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if isinstance(value, str) and value in args:
            return value
        raise ValueError(f"{where}: expected one of {', '.join(args)}; found {_shown(value)}")
    if origin is types.UnionType:
        return None if value is None else _decode(args[0], value, where)
    if origin is list:
        return [_decode(args[0], item, f"{where}[{i}]") for i, item in enumerate(_list(value, where))]
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected an object, found {_shown(value)}")
        return {k: _decode(args[1], item, f"{where}.{k}") for k, item in value.items()}
    accepted: tuple[type, ...] = (int, float) if hint is float else (hint,)
    if type(value) not in accepted or (hint is float and not math.isfinite(value)):
        raise ValueError(f"{where}: expected {hint.__name__}, found {_shown(value)}")
    return value


@functools.cache
def _hints(record: type) -> dict[str, Any]:
    return typing.get_type_hints(record)


def _decode_record(record: type, value: Any, where: str) -> Any:
    name = where or "the report"
    if not isinstance(value, dict):
        raise ValueError(f"{name}: expected an object, found {_shown(value)}")
    hints = _hints(record)
    known = [f.name for f in dataclasses.fields(record)]
    for key in value:
        if key not in known:
            raise ValueError(f"{name}: the key {key!r} is not known{_nearest(str(key), known)}")
    for key in known:
        if key not in value:
            raise ValueError(f"{name}: the key {key!r} is missing")
    found = {key: _decode(hints[key], value[key], f"{where}.{key}" if where else key) for key in known}
    try:
        return record(**found)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _nearest(name: str, known: Iterable[str]) -> str:
    choices = list(known)
    close = difflib.get_close_matches(name, choices, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(choices)}"


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:59] + '…'}"
