"""What a report holds: a frozen dataclass for each kind of thing that was done, measured or predicted.

Plain data. A figure that nobody measured is ``None`` and shown as such, never made up. What is derived from figures, such as a
peak or an imbalance, is a property and is not saved.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from dspass.report.diff import unified_diff
from dspass.report.words import format_bytes, format_seconds, nearest

CATEGORIES = ("parameters", "gradients", "optimizer", "gathered", "saved", "temporary", "staging")
PHASES = ("forward", "backward", "optimizer")

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
            raise ValueError(f"{unknown[0]!r} is not a category of memory{nearest(unknown[0], CATEGORIES)}")
        if self.phase not in PHASES:
            raise ValueError(f"{self.phase!r} is not a phase of a step{nearest(self.phase, PHASES)}")
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
    unplanned: list[MemoryPoint] = field(default_factory=list)
    """The same step as the passes do it by themselves; empty where a budget planned nothing, and in what was measured."""

    @property
    def peak(self) -> MemoryPoint | None:
        """The first point with the most bytes; None without a timeline."""
        return max(self.timeline, key=lambda p: p.total, default=None)

    @property
    def unplanned_peak(self) -> MemoryPoint | None:
        """As :attr:`peak`, of the step without the plan."""
        return max(self.unplanned, key=lambda p: p.total, default=None)

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
    again_seconds: float | None
    """None where it cannot be computed again."""
    held_bytes: int = 0
    held_by: str = ""
    reason: str = ""
    """Why it was not decided otherwise."""

    @property
    def again(self) -> str:
        """What computing again takes, as text; ``-`` where nothing is."""
        return format_seconds(self.again_seconds) if self.dropped_bytes and self.again_seconds is not None else "-"


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
        worth = [p for p in reversed(self.frontier[: self.here]) if at - p.seconds >= _WORTH_BUYING * at]
        for faster in worth:
            if faster.peak_bytes > self.budget_bytes:
                more = format_bytes(faster.peak_bytes - self.budget_bytes)
                return f"+{more} buys {format_seconds(at - faster.seconds)}"
        if worth:  # the budget is not what refused it
            gained = format_seconds(at - worth[-1].seconds)
            return f"{gained} less would fit by itself: the model's other graphs, or what an earlier batch has, decide"
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
