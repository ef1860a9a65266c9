"""What to save for the backward: a minimum cut that weighs seconds against bytes.

For a value ``v`` that the forward computes, ``y(v)`` says whether the backward needs it, and ``x(v)`` whether the backward
computes it again; what is needed and not computed again is saved. ``t(v)`` are the seconds to compute ``v``, ``s(v)`` those
to read it from memory in the backward, ``b(v)`` the bytes that saving it takes, and a byte has a price of ``λ`` seconds::

    (1)  minimise   Σ t(v) x(v)  +  Σ (s(v) + λ b(v)) (y(v) - x(v))
    (2)             y(v) = 1            where the backward reads v
    (3)             y(u) >= x(v)        for each input u of v
    (4)             y(v) >= x(v)

A value can be saved in several ways (:class:`Way`): as it is, or as a pass holds it, on the host or in fewer bits. They differ
in ``s`` and ``b`` only, so at one price each value has a cheapest way, and ``s(v) + λ b(v)`` is that one's: a minimum over
straight lines in ``λ``, and the problem stays a cut.

The second sum is a penalty on pairs with ``y = 1, x = 0``, and (3) and (4) forbid pairs, so the problem is a minimum cut
between a source (1) and a sink (0), solved exactly (Kolmogorov and Zabih, What energy functions can be minimized via graph
cuts, 2004): an edge ``y(v) -> x(v)`` of ``s(v) + λ b(v)``, one ``x(v) -> sink`` of ``t(v)``, and edges ``x(v) -> y(u)`` and
``source -> y(v)`` that cannot be cut. :func:`solve` is that cut. As ``λ`` grows from 0 the answers are the corners of the
lower convex hull of (bytes, seconds) over all choices, and :func:`hull` finds them by asking for the price at which two
neighbours cost the same (Eisner and Severance, 1976). Equal layers would change sides at one price; :attr:`Value.weight` sets
them apart, so that a budget between the corners is used too. What a group of values costs that has nothing to do with the
others is a straight line for each choice of it, so one that is cheapest at two prices is so between them: :func:`hull` asks
only of groups that choose differently at both.

Most values of a real graph are decided without a cut, and :func:`contract` leaves them out, at any price by the first three
rules, at one by the others:

- a view costs nothing and is never saved: who reads it reads what it is made of;
- what the backward reads is at hand whether it was saved or not, and so is what costs nothing to keep, such as an input of
  the graph: (3) holds for them. Values part here into groups that have nothing to do with one another;
- a value that one other reads, which is no larger, is never saved: saving the other one is at least as good. It is computed
  together with it, as a chain of pointwise operators is;
- where ``s + λ b <= t`` a value is not computed again: only (3) of its inputs hangs on it, and is relaxed;
- where ``t <= s + λ b`` and all inputs are at hand, it is not saved; what the backward reads and is not saved makes its
  inputs needed.

What no value that is left reads, and the backward does not need, is left out too. The rules are applied once at any price and
once at one.

:func:`exhaustive` tries all choices under a budget of bytes. It is the oracle of the tests, for up to some twenty values.

Dropped: the cut that Inductor makes. It counts bytes only, so what is dear to compute again has to be banned beforehand by a
list of operators, and its ``activation_memory_budget`` then chooses among the banned ones by a knapsack, for which computing
``v`` again never makes an input of ``v`` needed. Dropped: an integer program over all moments of the step (Jain et al.,
Checkmate, 2020). It sees the peak, which here a dry run measures (:mod:`dspass.planner.dry_run`), and takes minutes for
graphs of some hundred values, where these have thousands. Dropped: to apply the rules at a price until they leave out nothing
more. A hull of 20,000 random values took twice as long, for after the first time they leave out some hundredths.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace

import networkx as nx

from dspass.planner.flow import Network


@dataclass(frozen=True, kw_only=True)
class Way:
    """Another way to save a value than as it is: what it takes and costs then."""

    bytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Value:
    """One value of the forward: ``bytes`` and ``save_seconds`` to save it as it is, or one of ``ways``; ``seconds`` to compute
    it from its ``inputs`` (indices of values before it).

    ``needed``: the backward reads it. What is not ``savable`` has to be made again when it is needed, such as a view; what is
    not ``recomputable`` has to be saved, such as an input of the graph or a random number. ``weight`` scales its price.
    """

    bytes: int
    seconds: float
    save_seconds: float = 0.0
    inputs: tuple[int, ...] = ()
    needed: bool = False
    savable: bool = True
    recomputable: bool = True
    weight: float = 1.0
    ways: tuple[Way, ...] = ()

    def __post_init__(self) -> None:
        if not self.savable and not self.recomputable:
            raise ValueError("a value that can neither be saved nor computed again")

    @property
    def as_it_is(self) -> Way:
        return Way(bytes=self.bytes, seconds=self.save_seconds)

    def cheapest(self, price: float) -> int | None:
        """Of its ways, the one that costs least where a byte costs ``price`` seconds; None as it is, also where that costs the
        same."""
        best, least = None, self.as_it_is.seconds + price * self.weight * self.bytes
        for k, way in enumerate(self.ways):
            cost = way.seconds + price * self.weight * way.bytes
            if cost < least:
                best, least = k, cost
        return best

    def saved_by(self, way: int | None) -> Way:
        return self.as_it_is if way is None else self.ways[way]


@dataclass(frozen=True)
class Choice:
    """Indices of the values that are saved and of those that are computed again, and what that costs in all.

    ``ways`` are pairs of a saved value and its way, where that is not as it is; ``priced`` the bytes by their values' weights.
    """

    saved: frozenset[int]
    recomputed: frozenset[int]
    ways: frozenset[tuple[int, int]]
    bytes: int
    priced: float
    seconds: float

    @classmethod
    def of(
        cls,
        values: Sequence[Value],
        saved: frozenset[int],
        recomputed: frozenset[int],
        ways: frozenset[tuple[int, int]] = frozenset(),
    ) -> Choice:
        by = dict(ways)
        found = {i: values[i].saved_by(by.get(i)) for i in saved}
        return cls(
            saved,
            recomputed,
            ways,
            sum(way.bytes for way in found.values()),
            math.fsum(values[i].weight * way.bytes for i, way in found.items()),
            math.fsum([*(values[i].seconds for i in recomputed), *(way.seconds for way in found.values())]),
        )


def solve(values: Sequence[Value], price: float) -> Choice:
    """The cheapest choice where a byte costs ``price`` seconds (equations 1 to 4)."""
    return completed(values, _saved(_reachable(values), price), price)


def _saved(problem: Mapping[int, Value], price: float) -> set[int]:
    """Those of ``problem``, which are values or what is left of them at any price, that are saved at one."""
    left = contract(problem, price)
    saved = {i for i, value in problem.items() if i not in left and _is_saved(value, price)}
    for group in _groups(left):
        saved |= _cut(group, price)
    return saved


def _groups(values: Mapping[int, Value]) -> list[dict[int, Value]]:
    """The parts that have nothing to do with one another, each in order."""
    together = nx.Graph()
    together.add_nodes_from(values)
    together.add_edges_from((i, u) for i, value in values.items() for u in value.inputs)
    return [{i: values[i] for i in sorted(group)} for group in nx.connected_components(together)]


def _cut(left: Mapping[int, Value], price: float) -> set[int]:
    """Those of ``left`` that are saved."""
    y_of = {i: 2 * k for k, i in enumerate(left)}
    source, sink = 2 * len(left), 2 * len(left) + 1
    network = Network(2 * len(left) + 2)
    for i, value in left.items():
        y, x = y_of[i], y_of[i] + 1
        if value.needed:
            network.add_edge(source, y, math.inf)
        network.add_edge(y, x, _whole(_save_cost(value, price)) if value.savable else math.inf)
        network.add_edge(x, sink, _whole(value.seconds) if value.recomputable else math.inf)
        for u in value.inputs:
            network.add_edge(x, y_of[u], math.inf)
    zeros = network.minimum_cut(source, sink)
    return {i for i, y in y_of.items() if y not in zeros and y + 1 in zeros}


def contract(values: Mapping[int, Value], price: float | None = None) -> dict[int, Value]:
    """What is left to decide, at any price or at one, by index; the time of a value includes that of those computed with it.

    ``values`` come after their inputs. An optimum of what is left, with what :func:`completed` adds, is one of all.
    """
    needed: set[int] = set()
    for i, value in reversed(list(values.items())):
        if value.needed or i in needed:
            needed.add(i)
            if not value.savable:
                needed.update(value.inputs)
    left: dict[int, Value] = {}
    stands_for: dict[int, tuple[int, ...]] = {}  # what (3) asks for where a value is read; nothing of one at hand
    for i, value in values.items():
        inputs = tuple(dict.fromkeys([w for u in value.inputs for w in stands_for.get(u, ())]))
        savable, recomputable, is_needed = value.savable, value.recomputable, i in needed
        if price is not None and savable and recomputable:
            if _save_cost(value, price) <= value.seconds:
                recomputable = False
            elif not inputs:
                savable = False
        if not recomputable:
            inputs = ()
        is_view = not savable and value.seconds == 0.0
        is_free = _is_free(value)
        stands_for[i] = inputs if is_view else () if is_needed or is_free else (i,)
        is_decided = is_needed and not inputs and not (savable and recomputable)
        if not (is_view or is_free or is_decided):
            now = inputs, is_needed, savable, recomputable
            if now != (value.inputs, value.needed, value.savable, value.recomputable):
                value = replace(value, inputs=inputs, needed=is_needed, savable=savable, recomputable=recomputable)
            left[i] = value
    readers = dict.fromkeys(left, 0)
    sums = dict.fromkeys(left, 0)  # of the readers' indices: where there is one reader, this is it
    for i, value in left.items():
        for u in value.inputs:
            readers[u] += 1
            sums[u] += i
    for i in reversed(list(left)):  # the last first: a chain joins from its end
        value = left[i]
        if value.needed or readers[i] > 1:
            continue
        if readers[i]:
            r = sums[i]
            reader = left[r]
            if not value.recomputable or (value.savable and not (reader.savable and _never_dearer(reader, value))):
                continue
            new = [u for u in value.inputs if u not in reader.inputs]
            inputs = (*(u for u in reader.inputs if u != i), *new)
            left[r] = replace(reader, seconds=reader.seconds + value.seconds, inputs=inputs)
            for u in new:
                readers[u] += 1
                sums[u] += r
        for u in value.inputs:
            readers[u] -= 1
            sums[u] -= i
        del left[i]
    return left


def _is_saved(value: Value, price: float) -> bool:
    return value.savable and (not value.recomputable or _save_cost(value, price) <= value.seconds)


def _save_cost(value: Value, price: float) -> float:
    rate = price * value.weight
    plain = value.save_seconds + rate * value.bytes
    return min(plain, *[way.seconds + rate * way.bytes for way in value.ways]) if value.ways else plain


def _never_dearer(one: Value, other: Value) -> bool:
    """Whether ``one`` is saved for no more than ``other`` at any price."""
    return all(
        any(
            mine.seconds <= its.seconds and one.weight * mine.bytes <= other.weight * its.bytes
            for mine in _all_ways(one)
        )
        for its in _all_ways(other)
    )


def _all_ways(value: Value) -> tuple[Way, ...]:
    return (value.as_it_is, *value.ways)


def _is_free(value: Value) -> bool:
    return value.savable and value.bytes == 0 and value.save_seconds == 0.0


def _whole(seconds: float) -> int:
    """Picoseconds: the flow is then found without rounding."""
    return round(seconds * 1e12)


def _reachable(values: Sequence[Value]) -> dict[int, Value]:
    """Values that the backward could need: those it reads, and what these could be computed from."""
    seen: set[int] = set()
    stack = [i for i, value in enumerate(values) if value.needed]
    while stack:
        i = stack.pop()
        if i not in seen:
            seen.add(i)
            if values[i].recomputable:
                stack.extend(values[i].inputs)
    return {i: values[i] for i in sorted(seen)}


def completed(values: Sequence[Value], saved: Set[int], price: float = 0.0) -> Choice:
    """All values of a choice, from those of ``saved`` among which there is one: what the backward needs, followed back to
    what is saved or has to be, each in the way that is cheapest at ``price``."""
    kept: set[int] = set()
    again: set[int] = set()
    stack = [i for i, value in enumerate(values) if value.needed]
    while stack:
        i = stack.pop()
        if i in kept or i in again:
            continue
        if i in saved or _is_free(values[i]) or not values[i].recomputable:
            kept.add(i)
        else:
            again.add(i)
            stack.extend(values[i].inputs)
    ways = ((i, values[i].cheapest(price)) for i in kept)
    return Choice.of(values, frozenset(kept), frozenset(again), frozenset((i, k) for i, k in ways if k is not None))


def hull(values: Sequence[Value], most: int = 24) -> list[Choice]:
    """Corners of the hull of (bytes, seconds), the fastest first; about ``most`` of them, spread over the bytes.

    The first saves what is worth saving even if bytes cost nothing; the last saves as little as can be.
    """
    problem = contract(_reachable(values))
    group_of = {i: group for group in _groups(problem) for i in group}
    ends = [completed(values, _saved(problem, price), price) for price in (0.0, _dearest(values))]
    found = {(c.saved, c.ways): c for c in ends}
    gaps = [(ends[0], ends[1])]
    while gaps and len(found) < most:
        gaps.sort(key=lambda gap: gap[0].bytes - gap[1].bytes)
        fast, small = gaps.pop()
        if fast.priced <= small.priced:
            continue
        price = max(small.seconds - fast.seconds, 1e-15) / (fast.priced - small.priced)
        asked: dict[int, Value] = {}
        for i in (fast.saved ^ small.saved) | {i for i, _ in fast.ways ^ small.ways}:
            if i in group_of and i not in asked:
                asked.update(group_of[i])
        middle = completed(values, (fast.saved - asked.keys()) | _saved(asked, price), price)
        if (middle.saved, middle.ways) in found:
            continue
        found[middle.saved, middle.ways] = middle
        gaps += [(fast, middle), (middle, small)]
    return sorted(found.values(), key=lambda c: (-c.bytes, c.seconds))


def smallest(values: Sequence[Value]) -> Choice:
    """The choice that saves as little as can be."""
    return solve(values, _dearest(values))


def _dearest(values: Sequence[Value]) -> float:
    """A price at which no time is worth a byte."""
    seconds = sum(v.seconds + v.save_seconds + sum(way.seconds for way in v.ways) for v in values)
    sizes = [size for v in values for size in (v.bytes, *(way.bytes for way in v.ways)) if size]
    return 1e6 * (seconds + 1.0) / max(min(sizes, default=1), 1)


def exhaustive(values: Sequence[Value], budget: int) -> Choice | None:
    """The fastest of all choices whose saved bytes fit into ``budget``; None where none does. For small graphs."""
    reach = _reachable(values)
    free = [i for i in reach if values[i].savable and values[i].recomputable]
    fixed = frozenset(i for i in reach if not values[i].recomputable)
    best: Choice | None = None
    for count in range(len(free) + 1):
        for kept in itertools.combinations(free, count):
            plain = completed(values, fixed | frozenset(kept), 0.0)
            order = sorted(plain.saved)
            for ways in itertools.product(*((None, *range(len(values[i].ways))) for i in order)):
                said = frozenset((i, k) for i, k in zip(order, ways, strict=True) if k is not None)
                choice = Choice.of(values, plain.saved, plain.recomputed, said)
                if choice.bytes <= budget and (
                    best is None or (choice.seconds, choice.bytes) < (best.seconds, best.bytes)
                ):
                    best = choice
    return best
