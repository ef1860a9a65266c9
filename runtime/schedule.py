"""Schedules of pipelines, and what became of one in time, as plain data.

A schedule says what each rank computes, in order: forwards, and backwards that are whole or split in two, for the gradients of
a stage's inputs, which the stage before it waits for, and for those of its weights, which nothing waits for until the step (Qi
et al., Zero Bubble Pipeline Parallelism, 2023). It says nothing of time: a rank does the next thing as soon as what that needs
is there. What happened when, or will, is a :class:`Timeline`.

Dropped: to hand torch's schedule objects to the executor. They are made from stages with modules and process groups, so nothing
could be said of a schedule before it runs, nor in another process; their orders are torch's here too, read once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from dspass.runtime import compat


class ScheduleError(ValueError):
    """A schedule that does not exist for these settings: the setting, the cause, and the nearest ones that do."""

    def __init__(self, setting: str, cause: str, way_out: str, smallest: int | None = None) -> None:
        self.setting, self.cause, self.way_out, self.smallest = setting, cause, way_out, smallest
        """The setting is "schedule", "stages", "micro_batches", "virtual_stages" or "memory"; of that, ``smallest`` bytes are
        enough."""
        super().__init__(f"{setting}: {cause}. {way_out}")


class Kind(StrEnum):
    """What is computed for one micro-batch on one stage."""

    FORWARD = "F"
    BACKWARD = "B"
    """Gradients of inputs and of weights at once."""
    INPUT = "I"
    """Gradients of inputs alone."""
    WEIGHT = "W"
    """Gradients of weights alone, after those of inputs."""


class Direction(StrEnum):
    """Activations go forward, their gradients backward."""

    FORWARD = "forward"
    BACKWARD = "backward"


@dataclass(frozen=True)
class Action:
    """One piece of compute."""

    kind: Kind
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.kind.value}{self.micro_batch} of stage {self.stage}"


@dataclass(frozen=True)
class _Transfer:
    """Values of one micro-batch that cross a cut."""

    direction: Direction
    source: int
    """The stage that sends."""
    destination: int
    """The stage that receives."""
    micro_batch: int
    peer: int
    """The rank at the other end, along the pipeline."""


class Send(_Transfer):
    """What its source computed last goes to rank ``peer``."""


class Receive(_Transfer):
    """Comes from rank ``peer``. Posted where it stands, and waited for by the compute of its destination that reads it."""


Step = Action | Send | Receive


@dataclass(frozen=True)
class Schedule:
    """What each rank of a pipeline computes, in order.

    ``rank_of`` has the rank of each stage. ``actions`` are by rank; every stage has one forward and either one backward or one
    of each half for every micro-batch.
    """

    name: str
    ranks: int
    stages: int
    micro_batches: int
    rank_of: tuple[int, ...]
    actions: tuple[tuple[Action, ...], ...]

    @property
    def virtual_stages(self) -> int:
        """Stages of one rank."""
        return self.stages // self.ranks

    @property
    def splits(self) -> bool:
        """Whether some backwards are in two parts."""
        return bool(self.split_backwards)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages that lie on a rank, in order."""
        return tuple(stage for stage, at in enumerate(self.rank_of) if at == rank)

    def steps(self, rank: int) -> tuple[Step, ...]:
        """Its actions with sends and receives between, in an order in which no rank waits in a circle, even if each send and
        each receive blocks until its other end is there. Between stages on one rank nothing is sent.

        ``ValueError``: the actions wait for one another, so that no order of transfers runs them.
        """
        return self._steps[rank]

    @cached_property
    def _steps(self) -> tuple[tuple[Step, ...], ...]:
        order = [[(a.kind.value, a.stage, a.micro_batch) for a in actions] for actions in self.actions]
        return tuple(tuple(map(self._step, steps)) for steps in compat.with_transfers(order, self.rank_of))

    def _step(self, raw: tuple[str, int, int]) -> Step:
        kind, stage, batch = raw
        if kind in ("F", "B", "I", "W"):
            return Action(Kind(kind), stage, batch)
        way, letter = kind.split("_")
        direction, ahead = (Direction.FORWARD, 1) if letter == "F" else (Direction.BACKWARD, -1)
        if way == "SEND":
            return Send(direction, stage, stage + ahead, batch, self.rank_of[stage + ahead])
        return Receive(direction, stage - ahead, stage, batch, self.rank_of[stage - ahead])

    @cached_property
    def split_backwards(self) -> frozenset[tuple[int, int]]:
        """Stage and micro-batch of each backward that is in two parts."""
        return frozenset((a.stage, a.micro_batch) for row in self.actions for a in row if a.kind is Kind.INPUT)

    def in_flight(self, rank: int, stage: int | None = None) -> int:
        """The most micro-batches of which a rank holds saved values at a time, from a forward to the end of its backward; those
        of several stages on the rank count by themselves, unless one ``stage`` is asked for. Order alone decides it, not time.
        """
        held = most = 0
        for action in self.actions[rank]:
            if stage is not None and action.stage != stage:
                continue
            held += action.kind is Kind.FORWARD
            most = max(most, held)
            held -= action.kind in (Kind.BACKWARD, Kind.WEIGHT)
        return most

    def needs(self, action: Action) -> tuple[Action, ...]:
        """What must have ended, on whatever rank, before an action begins."""
        kind, stage, batch = action.kind, action.stage, action.micro_batch
        if kind is Kind.WEIGHT:
            return (Action(Kind.INPUT, stage, batch),)
        if kind is Kind.FORWARD:
            return (Action(Kind.FORWARD, stage - 1, batch),) if stage > 0 else ()
        own = Action(Kind.FORWARD, stage, batch)
        if stage == self.stages - 1:
            return (own,)
        return own, Action(
            Kind.INPUT if (stage + 1, batch) in self.split_backwards else Kind.BACKWARD, stage + 1, batch
        )

    def reader(self, action: Action) -> Action | None:
        """The action of a neighbouring stage that reads what an action makes for it."""
        kind, stage, batch = action.kind, action.stage, action.micro_batch
        if kind is Kind.FORWARD:
            return Action(kind, stage + 1, batch) if stage < self.stages - 1 else None
        if kind is Kind.WEIGHT or stage == 0:
            return None
        return Action(Kind.INPUT if (stage - 1, batch) in self.split_backwards else Kind.BACKWARD, stage - 1, batch)


@dataclass(frozen=True)
class Span:
    """An action and when it ran, in seconds."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """When each rank did what, predicted or measured.

    Times are in seconds on one clock of all ranks, whose zero means nothing.
    """

    schedule: Schedule
    spans: tuple[tuple[Span, ...], ...]
    """By rank, in order."""
    peak_bytes: tuple[int, ...] = ()
    """The most memory of each rank; empty where nobody looked."""

    @property
    def begin(self) -> float:
        """When the first action began."""
        return min((row[0].start for row in self.spans if row), default=0.0)

    @property
    def seconds(self) -> float:
        """From the begin of the first to the end of the last action."""
        return max((row[-1].end for row in self.spans if row), default=0.0) - self.begin

    def bubble_of(self, rank: int) -> float:
        """The share of the whole time in which a rank does not compute."""
        busy = math.fsum(span.end - span.start for span in self.spans[rank])
        return max(0.0, 1 - busy / self.seconds) if self.seconds > 0 else 0.0

    @property
    def bubble(self) -> float:
        """The share of all ranks' time in which they do not compute."""
        return math.fsum(map(self.bubble_of, range(len(self.spans)))) / len(self.spans)

    @property
    def in_flight(self) -> tuple[int, ...]:
        """By rank, as :meth:`Schedule.in_flight`."""
        return tuple(map(self.schedule.in_flight, range(self.schedule.ranks)))
