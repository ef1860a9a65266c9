"""Schedules of pipelines by name, and which one is best for what stages cost.

Orders are those of ``torch.distributed.pipelining``; which of them exist for so many ranks, stages and micro-batches is said
here, so that a refusal can name settings that work. The best is the one that ends first among those whose peak fits the budget
on every rank (:mod:`dspass.planner.schedule_times`); there are so few that all are tried.

Dropped: to search for an order of our own for the costs at hand, as zero-bubble schedulers do. It would be known to nobody by
name, and what it could win is what the table of a choice shows as the bubble of the best named one.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

from dspass.planner.record import size_text
from dspass.planner.schedule_times import Link, StageCost, peak_bytes, simulate
from dspass.runtime import compat
from dspass.runtime.schedule import Action, Kind, Schedule, ScheduleError, Timeline


@dataclass(frozen=True)
class _Rule:
    """When a schedule exists."""

    name: str
    order: str
    """torch's name of the order."""
    virtual: tuple[int, ...] = ()
    """The numbers of stages a rank that it takes; () for all."""
    tried: tuple[int, ...] = (1,)
    """Those that are tried when schedules are compared, the first of them unless one is asked for."""
    fewest: Callable[[int], int] = lambda ranks: 1
    """Micro-batches for so many ranks."""
    in_rounds: bool = False
    """Micro-batches go in ``max(1, micro_batches // ranks)`` equal rounds."""
    aliases: tuple[str, ...] = ()

    def refusal(self, ranks: int, micro_batches: int, virtual_stages: int) -> tuple[str, str] | None:
        """The setting that is at fault and why, or None."""
        if self.virtual and virtual_stages not in self.virtual:
            takes = " or ".join(map(str, self.virtual))
            return "virtual_stages", f"{self.name} has {_many(takes, 'stage')} on each rank"
        if micro_batches < (fewest := self.fewest(ranks)):
            least = f"at least {_many(fewest, 'micro-batch')} for {_many(ranks, 'rank')}"
            return "micro_batches", f"{self.name} needs {least}"
        if self.in_rounds and micro_batches % (rounds := max(1, micro_batches // ranks)):
            run = f"{self.name} runs {micro_batches} micro-batches on {ranks} ranks in {rounds} rounds"
            return "micro_batches", f"{run}, which do not come out even"
        return None


#: From the simplest to the most involved: of those that are as fast and as small, the first is chosen.
_RULES = (
    _Rule("1f1b", "1F1B", virtual=(1,), fewest=lambda ranks: ranks),
    _Rule("gpipe", "GPipe", virtual=(1,)),
    _Rule("interleaved1f1b", "Interleaved1F1B", tried=(2, 3, 4), in_rounds=True, aliases=("interleaved",)),
    _Rule("loopedbfs", "LoopedBFS", tried=(2, 3, 4), aliases=("bfs",)),
    _Rule("zbh1", "InterleavedZeroBubble", virtual=(1,), in_rounds=True),
    _Rule("interleavedzerobubble", "InterleavedZeroBubble", tried=(2, 3, 4), in_rounds=True),
    _Rule("zbvzerobubble", "ZBVZeroBubble", virtual=(2,), tried=(2,), aliases=("zbv",)),
    _Rule("dualpipev", "DualPipeV", virtual=(2,), tried=(2,), fewest=lambda ranks: 2 * ranks),
)

NAMES = tuple(rule.name for rule in _RULES)
"""Schedules by the names that :func:`make` takes, from the simplest to the most involved."""


def make(name: str, ranks: int, micro_batches: int, virtual_stages: int | None = None) -> Schedule:
    """The schedule of a name for a pipeline of ``ranks`` with ``virtual_stages`` stages on each.

    Names are those of :data:`NAMES`, in any case, also "zbv" and "interleaved"; hyphens, underscores and spaces say nothing.
    :class:`ScheduleError`: there is none of that name, or none for these settings.
    """
    rule = _rule(name)
    virtual = rule.tried[0] if virtual_stages is None else virtual_stages
    for setting, value in (("stages", ranks), ("micro_batches", micro_batches), ("virtual_stages", virtual)):
        if value < 1:
            raise ScheduleError(setting, f"a pipeline has at least one, not {value}", "Set 1 or more.")
    refusal = rule.refusal(ranks, micro_batches, virtual)
    if refusal is not None:
        setting, why = refusal
        value = micro_batches if setting == "micro_batches" else virtual
        near = ", ".join(_nearest(rule, ranks, micro_batches, virtual))
        raise ScheduleError(setting, f"{value} is not possible: {why}", f"Nearest that work: {near}.")
    return _made(rule, ranks, micro_batches, virtual)


@functools.lru_cache(maxsize=256)
def _made(rule: _Rule, ranks: int, micro_batches: int, virtual_stages: int) -> Schedule:
    order = compat.pipeline_order(rule.order, ranks, virtual_stages, micro_batches)
    actions = tuple(tuple(Action(Kind(kind), stage, batch) for kind, stage, batch in row) for row in order)
    rank_of = {action.stage: rank for rank, row in enumerate(actions) for action in row}
    stages = ranks * virtual_stages
    return Schedule(rule.name, ranks, stages, micro_batches, tuple(rank_of[s] for s in range(stages)), actions)


def _rule(name: str) -> _Rule:
    plain = name.lower().translate({ord(c): None for c in "-_ "})
    known = {known: rule for rule in _RULES for known in (rule.name, *rule.aliases)}
    if plain in known:
        return known[plain]
    near = difflib.get_close_matches(plain, known, n=1)
    way_out = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(NAMES)}."
    raise ScheduleError("schedule", f"{name!r} is none that is known", way_out)


def _nearest(rule: _Rule, ranks: int, micro_batches: int, virtual_stages: int) -> Iterator[str]:
    """Settings that work and differ from these in one thing, and in virtual stages where the schedule has others."""

    def near(value: int, works: Callable[[int], bool]) -> list[int]:
        """The nearest on each side; some are always found above, as all rules take a multiple of twice the ranks."""
        down = next((v for v in range(value - 1, 0, -1) if works(v)), None)
        up = next((v for v in range(value + 1, value + 2 * ranks + 1) if works(v)), None)
        return [v for v in (down, up) if v is not None]

    others = [r.name for r in _RULES if r is not rule and r.refusal(ranks, micro_batches, virtual_stages) is None]
    beside = ""
    if rule.virtual and virtual_stages not in rule.virtual:
        virtual_stages = min(rule.virtual, key=lambda v: abs(v - virtual_stages))
        if rule.refusal(ranks, micro_batches, virtual_stages) is None:
            yield f"virtual_stages {virtual_stages}"
            return
        beside = f"virtual_stages {virtual_stages} with "
    for value in near(micro_batches, lambda m: rule.refusal(ranks, m, virtual_stages) is None):
        yield f"{beside}micro_batches {value}"
    for value in near(ranks, lambda p: rule.refusal(p, micro_batches, virtual_stages) is None):
        yield f"{beside}stages {value}"
    if others:
        yield f"schedule {' or '.join(others[:3])}"


# Which is best


#: Costs of stages and of the cuts between them, for stages that lie on these ranks and so many micro-batches in a batch.
Costs = Callable[[tuple[int, ...], int], tuple[Sequence[StageCost], Sequence[Link]]]


@dataclass(frozen=True)
class Candidate:
    """A schedule that was looked at."""

    name: str
    virtual_stages: int
    micro_batches: int
    timeline: Timeline | None
    """None where there is no such schedule, or no such cut."""
    why: str
    """What spoke for it or against it."""
    costs: tuple[StageCost, ...] = ()
    """Of its stages, with what is computed again."""


@dataclass(frozen=True)
class Choice:
    """The best schedule, how it runs, and all that were looked at: the best, others that fit by time, what does not fit, what
    does not exist."""

    schedule: Schedule
    timeline: Timeline
    candidates: tuple[Candidate, ...]

    @property
    def costs(self) -> tuple[StageCost, ...]:
        """Of the stages of the best."""
        return self.candidates[0].costs

    def table(self) -> str:
        """One line for each that was simulated, and for each reason why others were not."""
        rows = [("schedule", "stages a rank", "micro-batches", "time", "bubble", "peak", "")]
        reasons: dict[tuple[str, int, str], list[int]] = {}
        for c in self.candidates:
            if c.timeline is None:
                reasons.setdefault((c.name, c.virtual_stages, c.why), []).append(c.micro_batches)
                continue
            figures = _time(c.timeline.seconds), f"{100 * c.timeline.bubble:.1f} %", size_text(_peak_of(c))
            rows.append((c.name, str(c.virtual_stages), str(c.micro_batches), *figures, c.why))
        for (name, virtual, why), counts in reasons.items():
            rows.append((name, str(virtual), ", ".join(map(str, counts)), "-", "-", "-", why))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def choose(
    ranks: int,
    costs: Costs,
    *,
    batch: int,
    micro_batches: int | None = None,
    names: Sequence[str] = NAMES,
    virtual_stages: int | None = None,
    budget_bytes: int | None = None,
    again: Sequence[Costs] = (),
    overlaps: bool = True,
) -> Choice:
    """The fastest schedule whose peak fits on every rank; of equally fast ones the smallest, then the simplest.

    ``batch`` is the size of the whole batch; unless ``micro_batches`` says how many to divide it into, all its divisors are
    tried. ``names`` and ``virtual_stages`` narrow down what is tried. ``costs`` is asked once for each way to place stages and
    each number of micro-batches, and raises ``ValueError`` where the model cannot be cut so. ``budget_bytes`` is for each
    rank; None for any. ``again`` are costs where stages save less and less and compute the rest again: a rank that is over
    the budget does that with as much as it must, and its time and bytes are taken to lie between those of two neighbours in
    proportion.

    :class:`ScheduleError`: nothing fits, with the smallest that was found, or nothing exists for these settings.
    """
    counts = [micro_batches] if micro_batches is not None else [m for m in range(1, batch + 1) if batch % m == 0]

    @functools.cache
    def ask(rank_of: tuple[int, ...], count: int) -> tuple[Sequence[StageCost], Sequence[Link]] | str:
        try:
            return costs(rank_of, count)
        except ValueError as error:
            return str(error)

    found: list[Candidate] = []
    absent: list[Candidate] = []
    for rule, count in itertools.product(map(_rule, names), counts):
        for virtual in rule.tried if virtual_stages is None else (virtual_stages,):
            candidate = Candidate(rule.name, virtual, count, None, "")
            if refusal := rule.refusal(ranks, count, virtual):
                absent.append(replace(candidate, why=refusal[1]))
                continue
            schedule = _made(rule, ranks, count, virtual)
            if isinstance(cost := ask(schedule.rank_of, count), str):
                absent.append(replace(candidate, why=cost))
            else:
                timeline = simulate(schedule, *cost, overlaps=overlaps)
                for less in again:
                    if budget_bytes is None or max(timeline.peak_bytes) <= budget_bytes:
                        break
                    cost = _between(timeline, *cost, less(schedule.rank_of, count)[0], budget_bytes), cost[1]
                    timeline = simulate(schedule, *cost, overlaps=overlaps)
                found.append(replace(candidate, timeline=timeline, costs=tuple(cost[0])))
    return _best(ranks, found, absent, budget_bytes)


def _between(
    timeline: Timeline, costs: Sequence[StageCost], links: Sequence[Link], least: Sequence[StageCost], budget: int
) -> list[StageCost]:
    """``costs`` that fit on each rank, if they can, by going as far as needed to the ``least``: a peak is the maximum of sums
    of bytes, so between two costs it is never above the line between theirs."""
    schedule = timeline.schedule
    lowest = peak_bytes(schedule, least, links)
    shares = [
        min((most - budget) / (most - low), 1.0) if most > budget and most > low else 0.0
        for most, low in zip(timeline.peak_bytes, lowest, strict=True)
    ]
    found = []
    for stage, (one, other) in enumerate(zip(costs, least, strict=True)):
        share = shares[schedule.rank_of[stage]]
        mixed = {}
        for field in fields(StageCost):
            a, b = getattr(one, field.name), getattr(other, field.name)
            value = a + share * (b - a)
            mixed[field.name] = math.floor(value) if isinstance(a, int) else value
        found.append(StageCost(**mixed))
    return found


def _best(ranks: int, found: list[Candidate], absent: list[Candidate], budget: int | None) -> Choice:
    if not found:
        reasons = "; ".join(dict.fromkeys(c.why for c in absent))
        raise ScheduleError(
            "schedule", f"none can be made for {_many(ranks, 'rank')}: {reasons}", "Change one of these."
        )
    fits = [c for c in found if budget is None or _peak_of(c) <= budget]
    if not fits:
        least = min(found, key=lambda c: (_peak_of(c), _seconds_of(c)))
        at = f"{least.name} with {_many(least.micro_batches, 'micro-batch')} and {_many(least.virtual_stages, 'stage')} a rank"
        raise ScheduleError(
            "memory",
            f"no schedule fits {size_text(budget or 0)} on each of {_many(ranks, 'rank')}: the smallest is {at}, which takes "
            f"{size_text(_peak_of(least))} ({_peak_of(least)} bytes)",
            "Allow that much, or use more stages, a higher ZeRO stage or smaller micro-batches.",
            smallest=_peak_of(least),
        )
    fits.sort(key=lambda c: (_seconds_of(c), _peak_of(c)))  # the sort is stable: the simpler one stays in front
    best = fits[0]
    over = sorted((c for c in found if c not in fits), key=_seconds_of)
    rows = [replace(best, why=_praise(fits, over)), *(replace(c, why=_loss(c, best)) for c in fits[1:])]
    for c in over:
        peaks = c.timeline.peak_bytes if c.timeline else ()
        rank = max(range(len(peaks)), key=peaks.__getitem__)
        rows.append(replace(c, why=f"{size_text(peaks[rank] - (budget or 0))} over the budget on rank {rank}"))
    assert best.timeline is not None
    return Choice(best.timeline.schedule, best.timeline, (*rows, *absent))


def _praise(fits: Sequence[Candidate], over: Sequence[Candidate]) -> str:
    if not over:
        return "the fastest" if len(fits) > 1 else "the only one"
    return "the fastest that fits" if len(fits) > 1 else "the only one that fits"


def _loss(candidate: Candidate, best: Candidate) -> str:
    slower, more = _seconds_of(candidate) - _seconds_of(best), _peak_of(candidate) - _peak_of(best)
    if slower > 0:
        return f"{max(100 * slower / _seconds_of(best), 0.1):.1f} % slower"
    return f"as fast, {size_text(more)} more" if more else "as fast and as small, less simple"


def _peak_of(candidate: Candidate) -> int:
    assert candidate.timeline is not None
    return max(candidate.timeline.peak_bytes)


def _seconds_of(candidate: Candidate) -> float:
    """Rounded, so that orders whose sums are taken in another order are as fast as one another."""
    assert candidate.timeline is not None
    return float(f"{candidate.timeline.seconds:.9g}")


def _many(count: int | str, what: str) -> str:
    return f"{count} {what}" + ("" if str(count) == "1" else "es" if what.endswith("ch") else "s")


def _time(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds >= 1 or seconds == 0 else f"{1e3 * seconds:.3f} ms"
