"""Where to cut a graph of work into stages of a pipeline, so that a batch of M micro-batches is through it soonest.

Units of work ``u`` with edges ``u -> v`` where ``v`` reads ``u`` are given a stage ``x(u)`` in ``0 .. S-1``:

    (1)  minimise   Σ t(s) + Σ l(s) + (M - 1) · max over s of (c(s), r(s))
    (2)  c(s) = t(s) + l(s-1) + l(s)                  or max(t(s), l(s-1) + l(s)) where links run beside compute
         r(s) = Σ over j >= s of (t(j) + l(j)) / min(S - s, M)
    (3)  t(s) = Σ t(u) over x(u) = s  +  Σ t(k) over what is shared (k) with a reader on s
    (4)  l(s) = latency · directions + (b(s) + g(s)) / link, or 0 where both stages are on one rank
    (5)  b(s) = Σ b(v) over values with x(source) <= s < x(a reader),  g(s) the same of those with a gradient
    (6)  m(s) = states · Σ p(k) over k with a reader on s  +  flying(s) · Σ saved(u) over x(u) = s
    (7)  Σ m(s) over the stages of each rank  <=  limit
    (8)  x(u) <= x(v) for each edge, no stage is empty or without a parameter, x(last) = S-1

(1) is one micro-batch's way through all stages and back, and for each other one what the slowest stage takes (Zheng et al.,
Alpa, 2022). A stage is also held up by those behind it: 1F1B has no more than ``S - s`` micro-batches on their way from stage
``s`` to the end and back, a round trip of ``r(s)`` for each of them, so links that run beside compute are not free.

:func:`outcome` is (1) to (7) of an assignment, and says which (7) and (8) it breaks. A parameter that several stages read is on
each of them, and a value that skips stages is carried, so it counts at each cut that it crosses.

*On a chain*, or on any graph whose units are put in an order, a stage is an interval, and :func:`cut_chain` finds by dynamic
programming over positions and stages, under a limit a stage, the cut with the fastest slowest stage (as PipeDream plans:
Narayanan et al., 2019), and the one that sends least with no stage slower than a bound::

    (9)   B(s, j) = min over i < j of max(B(s-1, i), c(i, j))
    (10)  X(s, j), P(s, j) = least over i < j of (X(s-1, i) + b(j), max(P(s-1, i), m(i, j)))
                             with c(i, j) <= bound, the first of the pair first

Both are exact: the first of the pair adds up and the second is a maximum. What is shared is counted once in an interval, by
taking off a reader's share where the reader before it is in the interval too. (1) trades a slower stage for fewer bytes, so
(10) is asked with several bounds above what (9) found (:data:`SLACK`), and (1) chooses. Times are predictions: what is within
:data:`TOLERANCE` by (1) counts as equal, and of equal cuts the one that sends least is taken, then the one whose fullest stage
is emptiest.

*On a graph without a chain*, such as two towers, every assignment that keeps (8) is a chain in some order, so the order is what
is searched. :func:`orders` gives two: the program's, and depth first from the end, which keeps branches together. From what
(9) finds on them :func:`refine` moves single units and halves of two neighbouring stages, while that makes the slowest stage
faster. Of two neighbours the half is a minimum cut (:func:`divide`): the units of both, source side the first one's,

    (11)  minimise  b(s) + λ · Σ t(u) over the source side    for a price λ of either sign

with edges that cannot be cut for (8), and for each value a node beside its source that its readers hang on, so that it counts
once. A bisection over λ balances the two. A limit for the stages of several on one rank together (7) couples intervals, and is
met by (9) with shares of the limit for each stage, then by refining.

:func:`refine` is not exact; the tests compare it with all assignments of small graphs.

Dropped: cutting at layers. Modules need not be a chain, and a head is no layer. Dropped: an integer program (Tarnawski et al.,
2021), which is exact on any graph of some hundred nodes in minutes, where captured ones have thousands. Dropped: to balance by
parameters or layers, which a large vocabulary makes wrong by half a stage. Dropped: to minimise the slowest stage alone. Where
links run beside compute it cuts inside of a layer, for a balance that is better by little than the messages are longer.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from dspass.planner.flow import Network

#: Times so close to each other count as equal.
TOLERANCE = 0.01

#: The slowest stage may be so much slower than it need be, for fewer bytes.
SLACK = (0.0, 0.01, 0.03, 0.06, 0.12, 0.25, 0.5)

#: So many places for a cut are tried on a chain, those that the least bytes cross: 0.1 s for 16 stages.
PLACES = 1000

#: So many of the best cuts are refined once more, by (1).
PROMISING = 3

#: So many changes of an assignment are tried, fewer of large graphs: together they look at so many units.
MOVES, LOOKS = 400, 100_000


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Work that stays together: ``seconds`` forward and backward, ``saved`` bytes a micro-batch."""

    seconds: float
    saved: int = 0


@dataclass(frozen=True, kw_only=True)
class Value:
    """What ``source`` makes and ``readers`` read, of ``bytes``, and ``gradient`` bytes that come back."""

    source: int
    readers: tuple[int, ...]
    bytes: int
    gradient: int = 0


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What each stage with one of ``readers`` has: a parameter of so many ``bytes``, or a value computed there again."""

    readers: tuple[int, ...]
    bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Work:
    """A graph to be cut into ``stages`` for ``micro_batches``. ``edges`` are ``u -> v``, of values or of order alone; units are
    numbered in an order that keeps them. ``flying`` are the micro-batches that each stage has saved at a time, ``rank_of`` the
    rank of each, ``states`` the bytes that a byte of parameters takes, ``limit`` bytes of a rank. ``last`` is a unit of the
    last stage; with ``each_has_parameters`` a stage without one is as bad as an empty one."""

    units: Sequence[Unit]
    values: Sequence[Value] = ()
    shared: Sequence[Shared] = ()
    edges: frozenset[tuple[int, int]] = frozenset()
    stages: int
    micro_batches: int
    latency: float = 0.0
    link: float = math.inf
    overlaps: bool = False
    flying: tuple[int, ...]
    rank_of: tuple[int, ...]
    states: float = 1.0
    limit: float = math.inf
    last: int | None = None
    each_has_parameters: bool = False

    def __post_init__(self) -> None:
        assert len(self.flying) == len(self.rank_of) == self.stages

    @functools.cached_property
    def before(self) -> list[set[int]]:
        """What each unit has to come behind."""
        found: list[set[int]] = [set() for _ in self.units]
        for u, v in self.pairs:
            found[v].add(u)
        return found

    @functools.cached_property
    def behind(self) -> list[set[int]]:
        found: list[set[int]] = [set() for _ in self.units]
        for u, v in self.pairs:
            found[u].add(v)
        return found

    @functools.cached_property
    def pairs(self) -> frozenset[tuple[int, int]]:
        read = ((v.source, r) for v in self.values for r in v.readers if r != v.source)
        return self.edges | frozenset(read)

    def is_sent(self, s: int) -> bool:
        """Whether a cut lies between ranks: behind the last stage and before the first is none."""
        return 0 <= s < self.stages - 1 and self.rank_of[s] != self.rank_of[s + 1]

    def link_seconds(self, count: float, gradient: float) -> float:
        """(4)"""
        directions = int(count > 0) + int(gradient > 0)
        return directions * self.latency + (count + gradient) / self.link

    def stage_seconds(self, compute: float, before: float, behind: float) -> float:
        """(2)"""
        return max(compute, before + behind) if self.overlaps else compute + before + behind


@dataclass(frozen=True)
class Outcome:
    """Of an assignment: seconds of the whole ``step`` (1), by stage seconds (2) and bytes (6), by cut bytes there and back;
    ``over`` the bytes that ranks lack in all."""

    step: float
    seconds: tuple[float, ...]
    memory: tuple[float, ...]
    crossing: tuple[int, ...]
    gradients: tuple[int, ...]
    over: float

    @property
    def bottleneck(self) -> float:
        return max(self.seconds)

    @property
    def key(self) -> tuple[float, float, float, float]:
        """The smaller the better: what does not fit, time, bytes sent, the fullest stage."""
        return self.over, self.step, self.sent, max(self.memory)

    @property
    def sent(self) -> int:
        return sum(self.crossing) + sum(self.gradients)

    @property
    def slope(self) -> tuple[float, ...]:
        """Whether it is over, and how fast all stages are from the slowest on: single moves seldom change the slowest."""
        return self.over, *sorted(self.seconds, reverse=True), *self.key[2:]


def outcome(work: Work, stage_of: Sequence[int]) -> Outcome | None:
    """What an assignment costs; None where it breaks (8)."""
    if any(stage_of[u] > stage_of[v] for u, v in work.pairs) or len(set(stage_of)) < work.stages:
        return None
    if work.last is not None and stage_of[work.last] != work.stages - 1:
        return None
    compute, memory, holders = [0.0] * work.stages, [0.0] * work.stages, set()
    for unit, s in zip(work.units, stage_of, strict=True):
        compute[s] += unit.seconds
        memory[s] += work.flying[s] * unit.saved
    for shared in work.shared:
        for s in {stage_of[r] for r in shared.readers}:
            compute[s] += shared.seconds
            memory[s] += work.states * shared.bytes
            holders |= {s} if shared.bytes else set()
    if work.each_has_parameters and len(holders) < work.stages:
        return None
    crossing, gradients = [0] * work.stages, [0] * work.stages  # behind each stage; nothing is behind the last
    for value in work.values:
        for s in range(stage_of[value.source], max((stage_of[r] for r in value.readers), default=0)):
            crossing[s] += value.bytes
            gradients[s] += value.gradient
    both = zip(crossing, gradients, strict=True)
    links = [work.link_seconds(b, g) if work.is_sent(s) else 0.0 for s, (b, g) in enumerate(both)]
    seconds = tuple(work.stage_seconds(t, links[s - 1] if s else 0.0, links[s]) for s, t in enumerate(compute))
    of_rank = [0.0] * (max(work.rank_of) + 1)
    for s, r in enumerate(work.rank_of):
        of_rank[r] += memory[s]
    over = math.fsum(max(0.0, m - work.limit) for m in of_rank) if math.isfinite(work.limit) else 0.0
    ways = [math.fsum(compute[s:]) + math.fsum(links[s:]) for s in range(work.stages)]
    rounds = (way / min(work.stages - s, work.micro_batches) for s, way in enumerate(ways))
    step = ways[0] + (work.micro_batches - 1) * max(*seconds, *rounds)
    return Outcome(step, seconds, tuple(memory), tuple(crossing[:-1]), tuple(gradients[:-1]), over)


# -- chains --------------------------------------------------------------------------------------------------


@dataclass
class _Chain:
    """``work`` in an ``order``: what lies before each position, what crosses it, and what would be counted twice in an
    interval: positions of two readers next to each other of something shared, its seconds and bytes."""

    work: Work
    order: Sequence[int]
    seconds: np.ndarray = field(init=False)
    saved: np.ndarray = field(init=False)
    params: np.ndarray = field(init=False)
    crossing: np.ndarray = field(init=False)
    links: np.ndarray = field(init=False)
    twice: list[tuple[int, int, float, float]] = field(init=False)

    def __post_init__(self) -> None:
        work, count = self.work, len(self.order)
        at = {u: i for i, u in enumerate(self.order)}
        seconds, saved, params = np.zeros(count), np.zeros(count), np.zeros(count)
        for i, u in enumerate(self.order):
            seconds[i], saved[i] = work.units[u].seconds, work.units[u].saved
        self.twice = []
        for shared in work.shared:
            places = sorted({at[r] for r in shared.readers})
            seconds[places] += shared.seconds
            params[places] += shared.bytes
            self.twice += [(a, b, shared.seconds, shared.bytes) for a, b in itertools.pairwise(places)]
        crossing, gradients = np.zeros(count + 1), np.zeros(count + 1)
        for value in work.values:
            first, last = at[value.source] + 1, max((at[r] for r in value.readers), default=0)
            crossing[first : last + 1] += value.bytes
            gradients[first : last + 1] += value.gradient
        self.seconds, self.saved, self.params = (
            np.concatenate([[0.0], np.cumsum(x)]) for x in (seconds, saved, params)
        )
        self.crossing = crossing + gradients
        self.links = np.array([work.link_seconds(b, g) for b, g in zip(crossing, gradients, strict=True)])

    @functools.cached_property
    def places(self) -> np.ndarray:
        """Positions where a cut is tried: all, or those that the least crosses. The last unit stays behind all of them."""
        count = len(self.order)
        inner = np.arange(1, count)
        if self.work.last is not None:
            inner = inner[: list(self.order).index(self.work.last)]
        if len(inner) > PLACES:
            inner = np.sort(inner[np.argsort(self.crossing[inner], kind="stable")[:PLACES]])
        return np.concatenate([[0], inner, [count]]).astype(int)

    def intervals(self) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
        """For each place but the first, by the places before it where an interval could begin: its seconds (3), bytes of
        parameters and saved bytes."""
        places = self.places
        twice = sorted(self.twice, key=lambda item: item[1])
        less_seconds, less_bytes = np.zeros(len(places)), np.zeros(len(places))
        done = 0
        for k in range(1, len(places)):
            end = places[k]
            while done < len(twice) and twice[done][1] < end:
                first, _, seconds, count = twice[done]
                inside = int(np.searchsorted(places, first, side="right"))  # places at or before it
                less_seconds[:inside] += seconds
                less_bytes[:inside] += count
                done += 1
            begin = places[:k]
            yield (
                k,
                self.seconds[end] - self.seconds[begin] - less_seconds[:k],
                self.params[end] - self.params[begin] - less_bytes[:k],
                self.saved[end] - self.saved[begin],
            )

    @functools.cached_property
    def _remote(self) -> np.ndarray:
        """(S + 1, 1): whether the cut before each stage, and the one behind the last, lies between ranks."""
        return np.array([[self.work.is_sent(s)] for s in range(-1, self.work.stages)])

    def stage_seconds(self, k: int, compute: np.ndarray) -> np.ndarray:
        """(S, k): (2) of intervals that end at place ``k``, as each stage."""
        links = self.links[self.places[:k]] * self._remote[:-1] + self.links[self.places[k]] * self._remote[1:]
        return np.maximum(compute, links) if self.work.overlaps else compute + links

    def memory(self, params: np.ndarray, saved: np.ndarray) -> np.ndarray:
        """(S, k): (6)"""
        return self.work.states * params + np.array(self.work.flying)[:, None] * saved


def cut_chain(
    work: Work, order: Sequence[int], bound: float | None = None, limits: Sequence[float] | None = None
) -> list[int] | None:
    """The best assignment of which each stage is an interval of ``order``, by (9), or by (10) where no stage may take longer
    than ``bound``. ``limits`` are bytes a stage (the rank's where None). None where no cut keeps them."""
    most = np.array([work.limit] * work.stages if limits is None else limits)[:, None]
    chain = _Chain(work, order)
    count = len(chain.places)
    rows = np.arange(work.stages)
    # Row s is of the first s stages: (9) or the bytes of (10), the fullest stage of (10), and the place before the last cut.
    first = np.full((work.stages + 1, count), math.inf)
    second = np.zeros((work.stages + 1, count))
    came = np.zeros((work.stages + 1, count), dtype=int)
    first[0, 0] = 0.0
    for k, compute, params, saved in chain.intervals():
        seconds, memory = chain.stage_seconds(k, compute), chain.memory(params, saved)
        fits = memory <= most
        if work.each_has_parameters:
            fits &= params > 0
        before = first[:-1, :k]
        if bound is None:
            best = np.where(fits, np.maximum(before, seconds), math.inf)
            chosen = best.argmin(axis=1)
            first[1:, k] = best[rows, chosen]
        else:
            sent = np.where(fits & (seconds <= bound), before, math.inf)
            least = sent.min(axis=1, keepdims=True)
            fullest = np.where(sent == least, np.maximum(second[:-1, :k], memory), math.inf)
            chosen = fullest.argmin(axis=1)
            first[1:, k] = least[:, 0] + chain.crossing[chain.places[k]]
            second[1:, k] = fullest[rows, chosen]
        came[1:, k] = chosen
    if first[-1, -1] == math.inf:
        return None
    stage_of = [0] * len(order)
    k = count - 1
    for s in reversed(range(work.stages)):
        i = came[s + 1, k]
        for u in order[int(chain.places[i]) : int(chain.places[k])]:
            stage_of[u] = s
        k = i
    return stage_of


# -- graphs --------------------------------------------------------------------------------------------------


def orders(work: Work) -> list[list[int]]:
    """Orders that keep the edges: the units' own, and depth first from the end, which finishes one branch before another."""
    own = list(range(len(work.units)))
    found: list[int] = []
    seen: set[int] = set()
    ends = [u for u in own if not work.behind[u]]
    if work.last is not None:
        ends = [work.last, *(u for u in ends if u != work.last)]
    for end in ends:
        stack = [(end, False)]
        while stack:
            u, is_ready = stack.pop()
            if is_ready:
                found.append(u)
            elif u not in seen:
                seen.add(u)
                stack.append((u, True))
                stack += ((v, False) for v in sorted(work.before[u], reverse=True) if v not in seen)
    return [own] if found == own else [own, found]


def order_of(work: Work, stage_of: Sequence[int]) -> list[int]:
    """An order in which each stage of an assignment is an interval."""
    waits = [len(b) for b in work.before]
    ready = [(stage_of[u], u) for u in range(len(work.units)) if not waits[u]]
    heapq.heapify(ready)
    found = []
    while ready:
        _, u = heapq.heappop(ready)
        found.append(u)
        for v in work.behind[u]:
            waits[v] -= 1
            if not waits[v]:
                heapq.heappush(ready, (stage_of[v], v))
    return found


def divide(work: Work, stage_of: Sequence[int], s: int, price: float) -> list[int]:
    """(11) for stages ``s`` and ``s + 1`` at a ``price`` in bytes a second."""
    inside = [u for u, stage in enumerate(stage_of) if stage in (s, s + 1)]
    index = {u: i for i, u in enumerate(inside)}
    touching = [
        v for v in work.values if (v.source in index or stage_of[v.source] < s) and any(r in index for r in v.readers)
    ]
    network = Network(len(inside) + len(touching) + 2)
    source, sink = len(inside) + len(touching), len(inside) + len(touching) + 1
    for v in inside:
        cost = round(price * work.units[v].seconds)
        if cost > 0:
            network.add_edge(index[v], sink, cost)
        elif cost < 0:
            network.add_edge(source, index[v], -cost)
        for u in work.before[v]:
            if u in index:
                network.add_edge(index[v], index[u], math.inf)
    if work.last in index:
        network.add_edge(index[work.last], sink, math.inf)
    for k, value in enumerate(touching, start=len(inside)):
        size = value.bytes + value.gradient
        is_read_later = any(stage_of[r] > s + 1 for r in value.readers)
        if value.source not in index:
            if is_read_later:
                continue  # it crosses in any case
            network.add_edge(source, k, size)
        else:
            network.add_edge(index[value.source], k, size)
            if is_read_later:
                network.add_edge(k, sink, math.inf)
        for r in value.readers:
            if r in index and r != value.source:
                network.add_edge(k, index[r], math.inf)
    second = network.minimum_cut(source, sink)
    found = list(stage_of)
    for u in inside:
        found[u] = s + 1 if index[u] in second else s
    return found


def refine(work: Work, stage_of: Sequence[int], better: Callable[[Outcome], tuple[float, ...]]) -> list[int]:
    """An assignment that is less by ``better``, found from one by moves of single units and by :func:`divide`."""
    best = list(stage_of)
    found = outcome(work, best)
    assert found is not None
    moves = min(MOVES, LOOKS // max(len(work.units), 1))
    improved = True
    while improved and moves > 0:
        improved = False
        for trial in _neighbours(work, best, found):
            moves -= 1
            now = outcome(work, trial)
            if now is not None and better(now) < better(found):
                best, found, improved = trial, now, True
                break
            if moves <= 0:
                break
    return best


def _neighbours(work: Work, stage_of: list[int], now: Outcome) -> Iterator[list[int]]:
    """First what changes the slowest stages, those that lack memory before them."""
    by_need = sorted(range(work.stages), key=lambda s: -(now.memory[s] if now.over else now.seconds[s]))
    for s in by_need:
        for u in (u for u, stage in enumerate(stage_of) if stage == s):
            low = max((stage_of[v] for v in work.before[u]), default=0)
            high = min((stage_of[v] for v in work.behind[u]), default=work.stages - 1)
            for _, other in sorted((abs(t - s), t) for t in range(low, high + 1) if t != s):
                yield [*stage_of[:u], other, *stage_of[u + 1 :]]
    for s in range(work.stages - 1):
        down = [u for u, t in enumerate(stage_of) if t == s + 1 and all(stage_of[v] <= s for v in work.before[u])]
        up = [
            u
            for u, t in enumerate(stage_of)
            if t == s and all(stage_of[v] > s for v in work.behind[u] if v not in down)
        ]
        for u, v in itertools.product(up, down):
            trial = list(stage_of)
            trial[u], trial[v] = s + 1, s
            yield trial
    for s in by_need:
        for first in (s - 1, s):
            if 0 <= first < work.stages - 1:
                yield from _halves(work, stage_of, first)


def _halves(work: Work, stage_of: list[int], s: int) -> Iterator[list[int]]:
    """Of two neighbours, cuts at prices that approach a balance."""
    inside = [u for u, stage in enumerate(stage_of) if stage in (s, s + 1)]
    total = math.fsum(work.units[u].seconds for u in inside)
    if not total:
        return
    size = sum(v.bytes + v.gradient for v in work.values) + 1
    low, high = -size * len(inside) / total * 2, size * len(inside) / total * 2
    for _ in range(10):
        price = (low + high) / 2
        trial = divide(work, stage_of, s, price)
        first = math.fsum(work.units[u].seconds for u in inside if trial[u] == s)
        yield trial
        low, high = (price, high) if first > total / 2 else (low, price)


# -- all together --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cutting:
    """An assignment, what it costs, and whether it is the best of its order or was refined."""

    stage_of: list[int]
    outcome: Outcome
    refined: bool


def solve(work: Work) -> Cutting | None:
    """The best assignment found: one with a stage without parameters only where there is no other, and where none keeps the
    limit the one that lacks least. None where there are fewer units than stages."""
    if len(work.units) < work.stages:
        return None
    tried: list[list[int]] = []
    programs = orders(work)
    for order in programs:
        for limits in _limits(work):
            found = cut_chain(work, order, limits=limits)
            if found is not None:
                tried.append(found)
                break
        found = cut_chain(work, order, limits=[math.inf] * work.stages)
        if found is not None:
            tried.append(found)
    if not tried:
        return solve(replace(work, each_has_parameters=False)) if work.each_has_parameters else None
    refined = [refine(work, a, lambda found: found.slope) for a in _distinct(tried)]
    sequences = [*programs, *(order_of(work, a) for a in refined)]
    choices = [*tried, *refined]
    least = min(_outcome(work, a).bottleneck for a in choices)
    for order, slack in itertools.product(_distinct(sequences), SLACK):
        for limits in _limits(work):
            found = cut_chain(work, order, least * (1 + slack), limits)
            if found is not None:
                choices.append(found)
    promising = sorted(_distinct(choices), key=lambda a: _outcome(work, a).key)[:PROMISING]
    choices += [refine(work, a, lambda found: found.key) for a in promising]
    best = min(choices, key=lambda a: _outcome(work, a).key)
    equal = _outcome(work, best).step * (1 + TOLERANCE)

    def rank(stage_of: list[int]) -> tuple[float, ...]:
        found = _outcome(work, stage_of)
        return found.over, max(found.step, equal), *found.key[2:]

    chosen = min(_distinct(choices), key=rank)
    return Cutting(chosen, _outcome(work, chosen), not any(_is_kept(order, chosen) for order in programs))


def _is_kept(order: Sequence[int], stage_of: Sequence[int]) -> bool:
    """Whether each stage is an interval of ``order``."""
    return all(stage_of[u] <= stage_of[v] for u, v in itertools.pairwise(order))


def _distinct(assignments: Sequence[list[int]]) -> list[list[int]]:
    return list(map(list, dict.fromkeys(map(tuple, assignments))))


def _limits(work: Work) -> list[list[float]]:
    """Bytes a stage: the rank's, and shares of it where several are on one rank."""
    found = [[work.limit] * work.stages]
    most = max(work.rank_of.count(r) for r in set(work.rank_of))
    if most > 1 and math.isfinite(work.limit):
        firsts = [s == work.rank_of.index(r) for s, r in enumerate(work.rank_of)]
        for share in (0.5, 0.6, 0.4, 0.7, 0.3, 0.8, 0.2):
            rest = (1 - share) / (most - 1)
            found.append([work.limit * (share if is_first else rest) for is_first in firsts])
    return found


def _outcome(work: Work, stage_of: Sequence[int]) -> Outcome:
    found = outcome(work, stage_of)
    assert found is not None, "an assignment that breaks the order"
    return found
