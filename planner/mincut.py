"""What to save for the backward: a minimum cut that weighs seconds against bytes.

For a value ``v`` that the forward computes, ``y(v)`` says whether the backward needs it, and ``x(v)`` whether the backward
computes it again; what is needed and not computed again is saved. ``t(v)`` are the seconds to compute ``v``, ``s(v)`` those
to read it from memory in the backward, ``b(v)`` the bytes that saving it takes, and a byte has a price of ``λ`` seconds::

    (1)  minimise   Σ t(v) x(v)  +  Σ (s(v) + λ b(v)) (y(v) - x(v))
    (2)             y(v) = 1            where the backward reads v
    (3)             y(u) >= x(v)        for each input u of v
    (4)             y(v) >= x(v)

The second sum is a penalty on pairs with ``y = 1, x = 0``, and (3) and (4) forbid pairs, so the problem is a minimum cut
between a source (1) and a sink (0), solved exactly (Kolmogorov and Zabih, What energy functions can be minimized via graph
cuts, 2004): an edge ``y(v) -> x(v)`` of ``s(v) + λ b(v)``, one ``x(v) -> sink`` of ``t(v)``, and edges ``x(v) -> y(u)`` and
``source -> y(v)`` that cannot be cut. :func:`solve` is that cut. As ``λ`` grows from 0 the answers are the corners of the
lower convex hull of (bytes, seconds) over all choices, and :func:`hull` finds them by asking for the price at which two
neighbours cost the same (Eisner and Severance, 1976). Equal layers would change sides at one price; :attr:`Value.weight` sets
them apart, so that a budget between the corners is used too.

:func:`exhaustive` tries all choices under a budget of bytes. It is the oracle of the tests, for up to some twenty values.

Dropped: the cut that Inductor makes. It counts bytes only, so what is dear to compute again has to be banned beforehand by a
list of operators, and its ``activation_memory_budget`` then chooses among the banned ones by a knapsack, for which computing
``v`` again never makes an input of ``v`` needed. Dropped: an integer program over all moments of the step (Jain et al.,
Checkmate, 2020). It sees the peak, which here a dry run measures (:mod:`dspass.planner.dry_run`), and takes minutes for
graphs of some hundred values, where these have thousands.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import networkx as nx


@dataclass(frozen=True, kw_only=True)
class Value:
    """One value of the forward: ``bytes`` and ``save_seconds`` to save it, ``seconds`` to compute it from its ``inputs``
    (indices of values before it).

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

    def __post_init__(self) -> None:
        if not self.savable and not self.recomputable:
            raise ValueError("a value that can neither be saved nor computed again")


@dataclass(frozen=True)
class Choice:
    """Indices of the values that are saved and of those that are computed again, and what that costs in all.

    ``priced`` are the bytes by their values' weights.
    """

    saved: frozenset[int]
    recomputed: frozenset[int]
    bytes: int
    priced: float
    seconds: float

    @classmethod
    def of(cls, values: Sequence[Value], saved: frozenset[int], recomputed: frozenset[int]) -> Choice:
        return cls(
            saved,
            recomputed,
            sum(values[i].bytes for i in saved),
            math.fsum(values[i].weight * values[i].bytes for i in saved),
            math.fsum([*(values[i].seconds for i in recomputed), *(values[i].save_seconds for i in saved)]),
        )


def solve(values: Sequence[Value], price: float) -> Choice:
    """The cheapest choice where a byte costs ``price`` seconds (equations 1 to 4)."""
    graph = nx.DiGraph()
    graph.add_node("source")
    graph.add_node("sink")
    reach = _reachable(values)
    for i in reach:
        value = values[i]
        y, x = 2 * i, 2 * i + 1
        if value.needed:
            graph.add_edge("source", y)
        if value.savable:
            graph.add_edge(y, x, capacity=_whole(value.save_seconds + price * value.weight * value.bytes))
        else:
            graph.add_edge(y, x)
        if value.recomputable:
            graph.add_edge(x, "sink", capacity=_whole(value.seconds))
        else:
            graph.add_edge(x, "sink")
        for u in value.inputs:
            graph.add_edge(x, 2 * u)
    # Without a capacity an edge cannot be cut.
    _, (ones, _) = nx.minimum_cut(graph, "source", "sink", flow_func=nx.algorithms.flow.boykov_kolmogorov)
    recomputed = frozenset(i for i in reach if 2 * i + 1 in ones)
    saved = frozenset(i for i in reach if 2 * i in ones) - recomputed
    return _tidy(values, saved, recomputed)


def _whole(seconds: float) -> int:
    """Picoseconds: the flow is then found without rounding."""
    return round(seconds * 1e12)


def _reachable(values: Sequence[Value]) -> list[int]:
    """Values that the backward could need: those it reads, and what these could be computed from."""
    seen: set[int] = set()
    stack = [i for i, value in enumerate(values) if value.needed]
    while stack:
        i = stack.pop()
        if i not in seen:
            seen.add(i)
            if values[i].recomputable:
                stack.extend(values[i].inputs)
    return sorted(seen)


def _tidy(values: Sequence[Value], saved: frozenset[int], recomputed: frozenset[int]) -> Choice:
    """Only what is really needed: a cut may put a value of no bytes or no seconds on either side."""
    needed: set[int] = set()
    stack = [i for i, value in enumerate(values) if value.needed]
    while stack:
        i = stack.pop()
        if i not in needed:
            needed.add(i)
            if i in recomputed:
                stack.extend(values[i].inputs)
    return Choice.of(values, saved & needed, recomputed & needed)


def hull(values: Sequence[Value], most: int = 24) -> list[Choice]:
    """Corners of the hull of (bytes, seconds), the fastest first; about ``most`` of them, spread over the bytes.

    The first saves what is worth saving even if bytes cost nothing; the last saves as little as can be.
    """
    dearest = (
        1e6 * (sum(v.seconds for v in values) + 1.0) / max(min((v.bytes for v in values if v.bytes), default=1), 1)
    )
    ends = [solve(values, 0.0), solve(values, dearest)]
    found = {c.saved: c for c in ends}
    gaps = [(ends[0], ends[1])]
    while gaps and len(found) < most:
        gaps.sort(key=lambda gap: gap[0].bytes - gap[1].bytes)
        fast, small = gaps.pop()
        if fast.priced <= small.priced:
            continue
        middle = solve(values, max(small.seconds - fast.seconds, 1e-15) / (fast.priced - small.priced))
        if middle.saved in found:
            continue
        found[middle.saved] = middle
        gaps += [(fast, middle), (middle, small)]
    return sorted(found.values(), key=lambda c: (-c.bytes, c.seconds))


def exhaustive(values: Sequence[Value], budget: int) -> Choice | None:
    """The fastest of all choices whose saved bytes fit into ``budget``; None where none does. For small graphs."""
    reach = _reachable(values)
    free = [i for i in reach if values[i].savable and values[i].recomputable]
    fixed = frozenset(i for i in reach if not values[i].recomputable)
    best: Choice | None = None
    for count in range(len(free) + 1):
        for kept in itertools.combinations(free, count):
            saved = fixed | frozenset(kept)
            choice = _tidy(values, saved, frozenset(reach) - saved)
            if choice.bytes <= budget and (best is None or (choice.seconds, choice.bytes) < (best.seconds, best.bytes)):
                best = choice
    return best
