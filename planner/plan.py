"""The fastest step that fits: candidates from the solver, each measured by a dry run, the budget held by a closed loop.

:func:`dspass.planner.mincut.hull` orders what could be saved from the fastest to the smallest. The peak of a candidate is not
what it saves: computing again takes memory of its own, and the least saved is not the least peak. So a candidate is split,
passed and lowered, and a step of it runs on fake tensors (:mod:`dspass.planner.dry_run`), first by a rough simulation of each
segment. The one that is chosen runs once more with the code that Inductor would run; where that is larger, the difference is
taken from the budget and the search goes on. Candidates and their order do not depend on the budget.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch.fx as fx

from dspass.passes.cost import Device
from dspass.planner.mincut import Choice, hull
from dspass.planner.values import values_of

log = logging.getLogger(__name__)

Split = tuple[fx.GraphModule, fx.GraphModule]


class BudgetError(RuntimeError):
    """No plan fits into the memory budget. ``smallest`` is the least peak of all candidates, in bytes."""

    def __init__(self, message: str, smallest: int) -> None:
        super().__init__(message)
        self.smallest = smallest


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What was decided for one graph: names of saved values, what they and computing the others again cost, and the peak."""

    saved: tuple[str, ...]
    recomputed: tuple[str, ...]
    saved_bytes: int
    seconds: float
    peak: int
    budget: int

    def __str__(self) -> str:
        return (
            f"{size_text(self.saved_bytes)} saved in {len(self.saved)} values, {len(self.recomputed)} computed again "
            f"(saving and computing again: {self.seconds * 1e3:.1f} ms by the cost model); peak {size_text(self.peak)} of "
            f"{size_text(self.budget)}"
        )


@dataclass(kw_only=True)
class Planner:
    """``split`` cuts the joint graph by a function that chooses what is saved, ``passes`` runs the pipeline on both halves,
    ``rough`` and ``exact`` answer the peak of a step of them. Where there is no ``exact``, the rough peak is believed."""

    budget: int
    on: Device
    num_fwd_outputs: int
    split: Callable[[Callable[..., list[fx.Node]]], Split]
    passes: Callable[[fx.GraphModule, fx.GraphModule], Split]
    rough: Callable[[fx.GraphModule, fx.GraphModule], int]
    exact: Callable[[fx.GraphModule, fx.GraphModule], int] | None
    candidates: list[tuple[Choice, list[str]]] = field(default_factory=list)
    _peaks: dict[int, int] = field(default_factory=dict)
    _exact: dict[int, int] = field(default_factory=dict)
    _graphs: dict[int, Split] = field(default_factory=dict)

    def plan(self) -> tuple[Split, Plan]:
        """The two graphs of the fastest candidate that fits; raises :class:`BudgetError` where none does."""
        self._candidate(0)  # finds the others
        best: int | None = None
        tried: set[int] = set()
        margin = 0
        while True:
            index = self._first(self.budget - margin, tried)
            if index is None or (best is not None and index >= best):
                break
            tried.add(index)
            exact = self._measured(index)
            log.debug("candidate %d of %d: peak %d, budget %d", index, len(self.candidates), exact, self.budget)
            if exact <= self.budget:
                best = index
            margin = exact - self._peak(index)  # the rough run was off by this much; the same is expected of the next
        if best is None:
            raise self._refusal()
        choice, names = self.candidates[best]
        made = Plan(
            saved=tuple(names[i] for i in sorted(choice.saved)),
            recomputed=tuple(names[i] for i in sorted(choice.recomputed)),
            saved_bytes=choice.bytes,
            seconds=choice.seconds,
            peak=self._measured(best),
            budget=self.budget,
        )
        return self._candidate(best), made

    def _first(self, budget: int, tried: set[int]) -> int | None:
        """The first candidate, of those not ``tried``, whose rough peak fits; where none does, a few with the least one.

        By halving, since peaks fall along the list; one by one where that finds none.
        """
        low, high = -1, len(self.candidates) - 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._peak(middle) <= budget else (middle, high)
        found = next((i for i in range(high, len(self.candidates)) if i not in tried and self._peak(i) <= budget), None)
        if found is not None:
            return found
        left = sorted((self._peak(i), i) for i in range(len(self.candidates)) if i not in tried)
        if left and (left[0][0] <= budget or len(tried) < 4):
            return left[0][1]
        return None

    def _peak(self, index: int) -> int:
        if index not in self._peaks:
            self._peaks[index] = self.rough(*self._passed(index))
        return self._peaks[index]

    def _measured(self, index: int) -> int:
        if self.exact is None:
            return self._peak(index)
        if index not in self._exact:
            self._exact[index] = self.exact(*self._passed(index))
        return self._exact[index]

    def _passed(self, index: int) -> Split:
        if index not in self._graphs:
            self._graphs[index] = self.passes(*self._candidate(index))
        return self._graphs[index]

    def _candidate(self, index: int) -> Split:
        return self.split(lambda *args: self._choose(index, *args))

    def _choose(
        self, index: int, graph: fx.Graph, forward: Sequence[fx.Node], free: frozenset[fx.Node]
    ) -> list[fx.Node]:
        if not self.candidates:
            values, nodes = values_of(graph, forward, self.num_fwd_outputs, free, self.on)
            names = [n.name for n in nodes]
            self.candidates = [(choice, names) for choice in hull(values)]
        choice, names = self.candidates[index]
        nodes_by_name = {n.name: n for n in forward}
        return [nodes_by_name[names[i]] for i in sorted(choice.saved)]

    def _refusal(self) -> BudgetError:
        smallest = min(self._measured(i) for i in sorted(self._peaks, key=self._peaks.__getitem__)[:3])
        return BudgetError(
            f"dspass.memory_budget of {size_text(self.budget)} is too small: the smallest plan of {len(self.candidates)} takes "
            f"{size_text(smallest)} on each rank. Give that much, or use more ranks, a higher ZeRO stage or a smaller batch.",
            smallest,
        )


def size_text(count: float) -> str:
    """``1.23 GB``: powers of 1000, as budgets are written."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= factor:
            return f"{count / factor:.4g} {unit}"
    return f"{count:.0f} B"
