"""What a schedule takes in time and memory, from what one micro-batch costs on each stage.

Each rank does its actions in order (:mod:`dspass.runtime.schedule`). With ``end(a)`` for when an action has ended, and
``link(a, b)`` for the seconds of what ``a`` sends to ``b``, which are none on one rank::

    start(b) = max(end(the action before b on its rank), end(a) + link(a, b) for each a that b needs)     simulate
    peak(r)  = max over r's actions of (static bytes + bytes held while it runs)                          peak_bytes

Messages from one rank to another go one after another. The peak depends on the order alone.

Dropped: formulas of bubbles, ``(p - 1) / (m + p - 1)`` and the like. They hold for equal stages, and stages are not equal: one
has the loss, one the embedding. Dropped: a queue of events in order of time. Orders are fixed, of messages too, so each start
follows from others that are known before it.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass

from dspass.runtime.schedule import Action, Direction, Kind, Receive, Schedule, ScheduleError, Span, Step, Timeline


@dataclass(frozen=True)
class StageCost:
    """What one micro-batch costs on one stage, and what the stage holds all the time."""

    forward: float
    """Seconds."""
    backward: float
    """Seconds of the whole backward."""
    input: float = 0.0
    """Seconds of the gradients of inputs, where a backward is split."""
    weight: float = 0.0
    """Seconds of the gradients of weights, where a backward is split."""
    saved_bytes: int = 0
    """Held from a forward, its inputs among them, until the whole backward or the gradients of inputs are done."""
    held_bytes: int = 0
    """What is left of them, with gradients that came in, until those of weights are done."""
    working_bytes: int = 0
    """The most that an action takes beside while it runs."""
    static_bytes: int = 0
    """Parameters, gradients, states of the optimiser."""

    def seconds(self, kind: Kind) -> float:
        """Of an action."""
        match kind:
            case Kind.FORWARD:
                return self.forward
            case Kind.BACKWARD:
                return self.backward
            case Kind.INPUT:
                return self.input
            case Kind.WEIGHT:
                return self.weight


@dataclass(frozen=True)
class Link:
    """What crosses the cut between a stage and the next one, for one micro-batch, where these lie on two ranks."""

    forward: float = 0.0
    """Seconds of the activations."""
    backward: float = 0.0
    """Seconds of their gradients."""
    forward_bytes: int = 0
    """Of the activations as stages make and read them."""
    backward_bytes: int = 0
    forward_sent: int | None = None
    """What of ``forward_bytes`` travels between two ranks; None: all."""
    backward_sent: int | None = None

    def whole(self, direction: Direction) -> int:
        """Bytes of a message as stages make and read it."""
        return self.forward_bytes if direction is Direction.FORWARD else self.backward_bytes

    def sent(self, direction: Direction) -> int:
        """Bytes of a message between two ranks."""
        sent = self.forward_sent if direction is Direction.FORWARD else self.backward_sent
        return self.whole(direction) if sent is None else sent


def simulate(
    schedule: Schedule, costs: Sequence[StageCost], links: Sequence[Link] = (), *, overlaps: bool = True
) -> Timeline:
    """When each rank does what, and the most memory it takes, if micro-batches cost ``costs`` (by stage) and what crosses the
    cut after stage ``s`` costs ``links[s]``; () for cuts that cost nothing.

    ``overlaps`` says whether transfers run beside compute. If not, a send keeps its rank busy right after the action that it is
    of, and a receive keeps the other busy in front of the action that reads it, not before the send begins.

    :class:`ScheduleError`: the actions wait for one another.
    """
    links = _checked(schedule, costs, links)
    free = [0.0] * schedule.ranks
    spans: list[list[Span]] = [[] for _ in range(schedule.ranks)]
    ended: dict[Action, float] = {}
    there: dict[Action, float] = {}  # what came to another rank; if transfers keep it busy, what set out to it
    link_free: dict[tuple[int, int], float] = defaultdict(float)
    waiting: dict[Action, list[int]] = defaultdict(list)
    runnable = deque(range(schedule.ranks))
    while runnable:
        rank = runnable.popleft()
        for action in schedule.actions[rank][len(spans[rank]) :]:
            needs = schedule.needs(action)
            if missing := next((need for need in needs if need not in ended), None):
                waiting[missing].append(rank)
                break
            for need in needs:
                if schedule.rank_of[need.stage] == rank:
                    continue
                if overlaps:
                    free[rank] = max(free[rank], there[need])
                else:
                    free[rank] = max(free[rank], there[need]) + _seconds(links, need, action)
            start = free[rank]
            end = start + costs[action.stage].seconds(action.kind)
            spans[rank].append(Span(action, start, end))
            free[rank] = ended[action] = end
            reader = schedule.reader(action)
            if reader is not None and (other := schedule.rank_of[reader.stage]) != rank:
                lasts = _seconds(links, action, reader)
                if overlaps:
                    there[action] = link_free[rank, other] = max(end, link_free[rank, other]) + lasts
                else:
                    there[action] = end
                    free[rank] += lasts
            runnable.extend(waiting.pop(action, ()))
    if waiting:
        need, ranks = next(iter(waiting.items()))
        rank = ranks[0]
        action = schedule.actions[rank][len(spans[rank])]
        cause = f"rank {rank} of {schedule.name} waits for {need} in front of {action}, and it never comes"
        raise ScheduleError("schedule", cause, "Give each rank an order in which what an action needs comes before it.")
    return Timeline(schedule, tuple(map(tuple, spans)), peak_bytes(schedule, costs, links))


def peak_bytes(schedule: Schedule, costs: Sequence[StageCost], links: Sequence[Link] = ()) -> tuple[int, ...]:
    """The most memory of each rank.

    A receive takes its memory from where it is posted until it is read, in few bits where it travels so: activations are then
    part of what a forward saves, and gradients are gone after the backward. What an action makes for another stage is held
    whole while it runs, and if that stage is on the same rank, until it is read; what is sent is taken to be away when the next
    action begins.
    """
    return tuple(peak_of_rank(schedule, costs, links, rank) for rank in range(schedule.ranks))


def peak_of_rank(schedule: Schedule, costs: Sequence[StageCost], links: Sequence[Link], rank: int) -> int:
    """That of one rank, as :func:`peak_bytes`; of stages on other ranks the costs are not read."""
    links = _checked(schedule, costs, links)
    # Without messages these need not be placed.
    is_sent = any(link.forward_bytes or link.backward_bytes for link in links)
    steps: Sequence[Step] = schedule.steps(rank) if is_sent else schedule.actions[rank]
    held = peak = sum(costs[stage].static_bytes for stage in schedule.stages_of(rank))
    for step in steps:
        if isinstance(step, Receive):
            held += links[min(step.source, step.destination)].sent(step.direction)
            peak = max(peak, held)
        if not isinstance(step, Action):
            continue
        cost, kind = costs[step.stage], step.kind
        direction = Direction.FORWARD if kind is Kind.FORWARD else Direction.BACKWARD
        come = 0
        source = step.stage + (-1 if kind is Kind.FORWARD else 1)
        if kind is not Kind.WEIGHT and 0 <= source < schedule.stages:
            link = links[min(step.stage, source)]
            come, sent = link.whole(direction), link.sent(direction)
            if schedule.rank_of[source] != rank and sent != come:  # whole beside what has come
                peak = max(peak, held + come)
                held += come - sent
        if kind is Kind.FORWARD:
            held += cost.saved_bytes - come
        reader = schedule.reader(step)
        made = links[min(step.stage, reader.stage)].whole(direction) if reader is not None else 0
        peak = max(peak, held + made + cost.working_bytes)
        if reader is not None and schedule.rank_of[reader.stage] == rank:
            held += made
        if kind is Kind.BACKWARD:
            held -= cost.saved_bytes + come
        elif kind is Kind.INPUT:
            held -= cost.saved_bytes + come - cost.held_bytes
        elif kind is Kind.WEIGHT:
            held -= cost.held_bytes
    return peak


def _seconds(links: Sequence[Link], source: Action, reader: Action) -> float:
    link = links[min(source.stage, reader.stage)]
    return link.forward if source.stage < reader.stage else link.backward


def _checked(schedule: Schedule, costs: Sequence[StageCost], links: Sequence[Link]) -> Sequence[Link]:
    cuts = schedule.stages - 1
    links = links or [Link()] * cuts
    if len(costs) != schedule.stages or len(links) != cuts:
        raise ValueError(
            f"{schedule.name} has {schedule.stages} stages and {cuts} cuts, and was given costs of {len(costs)} stages and "
            f"{len(links)} cuts: give one cost for each stage and one link for each cut."
        )
    return links
