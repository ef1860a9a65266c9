"""The fastest step that fits: choices by their models, the budget held by dry runs.

:class:`~dspass.planner.choices.Choices` has what could be saved and kept, from the fastest to the smallest, with the seconds
and the peak of each by a model of the step. The closed loop is (:meth:`Planner.plan`):

1. the fastest choice and the one with the least peak are split, passed, lowered, and a step of them runs on fake tensors
   (:mod:`dspass.planner.dry_run`). What the model missed there, it is taken to miss in between, in proportion to what is saved;
2. of the choices whose corrected peak fits, or nearly (:data:`NEARLY`), the fastest is run in the same way, and is the plan if
   that fits; else the next one is tried.

Beside the values there are settings of the whole step (:class:`Setting`): how large buckets of collectives are, and whose
optimiser states wait on the host. What a setting costs adds to what a choice costs, and what it saves is known for the states
and modelled for buckets, so candidates are all pairs of a choice and a setting, in the order of their time.

Nothing in this depends on the budget but where it stops, so a larger budget never gives a slower plan by the model's seconds.
The cost model's estimate of the graphs that come of a choice, which the report shows, differs from these by what passes change:
a collective that ends a kernel early, a bucket of copies that waits to be full.

The graphs of a model that breaks are planned one after another. One that others follow holds no more for its backward than its
share of what the budget leaves (:attr:`Planner.share`), where it can: else the first would take what the last one needs.

Dropped: states on the host as values of the cut. They are there at every moment, so bytes of them are worth the same whatever
is saved, and a pair of a corner of the hull and a share of the states is the optimum of both up to the steps of that share.

Dropped: to search by halving with a margin that grows with each miss. Its plan depended on the way to it: a larger budget
could end at a slower plan.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch.fx as fx

from dspass.passes.nodes import HELD, KEPT
from dspass.planner.choices import Choices
from dspass.planner.dry_run import Peak
from dspass.planner.record import BudgetError, Decision, Option, Plan, Setting, rounded_up, size_text
from dspass.planner.summary import classes_of, largest_of
from dspass.runtime import compat

log = logging.getLogger(__name__)

Split = tuple[fx.GraphModule, fx.GraphModule]

#: Names of collectives, in order: of the forward and of the backward.
Collectives = tuple[tuple[str, ...], ...]

#: Share by which a corrected peak may exceed the budget, at most, and the choice is still run. Between the two that correct it,
#: the model was off by less on GPT and Llama; more would only cost runs, and so would more than it missed of these two.
NEARLY = 0.05

#: A point of the frontier has a peak that is smaller by this share than those before it.
_WORTH_SHOWING = 0.005

#: So many choices with the least corrected peaks are run in any case, before a budget is refused.
_LAST_TRIES = 3


@dataclass(kw_only=True)
class Planner:
    """``find`` makes the choices of a joint graph, ``split`` cuts it by a function that chooses what is saved, ``passes`` runs
    the pipeline on both halves with buckets of so many bytes, ``run`` answers the peak of a step of them, which it may change,
    and ``seconds`` their time.

    The first of ``settings`` costs nothing. ``scale``: what measured steps of the model took, over what the cost model said; it
    makes predictions better. Forward and backward have so many ``runs`` in a step, which share what is copied once in it. What
    was decided for inputs of other shapes is taken where the fastest candidate does not fit and it does. ``share`` of what the
    budget leaves beside what is always there may be held from the forward to the backward, where other graphs run in between;
    where no candidate holds so little, that does not count. With ``fewest`` it is the smallest candidate that is taken, not the
    fastest. ``collectives`` answers those of both halves behind the passes; where they are ``agreed``, only candidates that
    have these count, what was decided before is tried first, and a refusal is this rank's alone. ``where`` and ``ways_out`` are
    a refusal's words."""

    budget: int
    find: Callable[[fx.Graph, Sequence[fx.Node], frozenset[fx.Node], compat.Unplanned], Choices]
    split: Callable[[compat.Chooser], Split]
    passes: Callable[[fx.GraphModule, fx.GraphModule, int | None], Split]
    run: Callable[[fx.GraphModule, fx.GraphModule], Peak]
    seconds: Callable[[fx.GraphModule, fx.GraphModule], float]
    settings: tuple[Setting, ...] = (Setting(),)
    scale: float = 1.0
    runs: int = 1
    share: float = 1.0
    fewest: bool = False
    collectives: Callable[[fx.GraphModule, fx.GraphModule], Collectives] | None = None
    agreed: Collectives | None = None
    where: str = "on each rank"
    ways_out: str = "use more ranks, a higher ZeRO stage"
    choices: Choices = field(init=False)
    _measured: dict[tuple[int, int | None], Peak] = field(default_factory=dict)  # by choice and bytes of a bucket
    _graphs: dict[int, Split] = field(default_factory=dict)
    _collectives: dict[tuple[int, int | None], Collectives] = field(default_factory=dict)
    _base_seconds: float = 0.0

    def plan(self) -> tuple[Split, Plan]:
        """The two graphs of the fastest candidate that fits, before the passes; raises :class:`BudgetError` where none does."""
        self._graphs[0] = self.split(self._find)
        found = self._smallest() if self.fewest else self._fastest(self.share)
        if found is None and self.share < 1.0 and not self.fewest:
            found = self._fastest(1.0)
        if found is None:
            raise self._refusal()
        return self._made(found)

    def _fastest(self, share: float) -> tuple[int, int] | None:
        """The fastest candidate that fits, and holds no more than its share."""
        first = self._candidates[:1]
        for candidate in [*first, *self._before] if self.agreed is None else [*self._before, *first]:
            if self._fits(candidate, share):
                return candidate
        self._run(*self._least)
        nearly = min(NEARLY * self.budget, self._most_missed)
        last = {(choice, self.settings[k].bucket_bytes) for choice, k in self._last}
        for choice, k in self._candidates:
            # A setting that is not the first has others beside it: no need to try what will hardly fit.
            most = self.budget + (nearly if k == 0 else 0)
            worth = (choice, self.settings[k].bucket_bytes) in last or self._peak((choice, k)) <= most
            if worth and self._fits((choice, k), share):
                return choice, k
        return None

    @property
    def _before(self) -> list[tuple[int, int]]:
        """What was decided for inputs of other shapes."""
        prior = self.choices.of_prior()
        return [(prior[0], k) for k, s in enumerate(self.settings) if prior is not None and s.bucket_bytes == prior[1]]

    @property
    def _last(self) -> list[tuple[int, int]]:
        """The candidates with the least peaks: of all, corrected, and of those that hold nothing in ways of passes, of which
        the models know more, as modelled: what they miss of a copy to the host says nothing of these."""
        order = sorted(self._candidates, key=self._peak)
        plain = sorted((c for c in order if not self.choices.held_bytes(c[0])), key=self._modelled)
        return list(dict.fromkeys([*order[:_LAST_TRIES], *plain[:_LAST_TRIES]]))

    def _smallest(self) -> tuple[int, int] | None:
        """The one that takes least, as it runs."""
        self._run(0, self.settings[0].bucket_bytes)
        self._run(*self._least)
        tried = [c for c in self._last if self._is_as_agreed(c[0], self.settings[c[1]].bucket_bytes)]
        for choice, k in tried:
            self._run(choice, self.settings[k].bucket_bytes)
        least = min(tried, key=self._peak, default=None)
        return least if least is not None and self._fits(least, 1.0) else None

    def _find(
        self, graph: fx.Graph, inside: Sequence[fx.Node], free: frozenset[fx.Node], unplanned: compat.Unplanned
    ) -> list[fx.Node]:
        self.choices = self.find(graph, inside, free, unplanned)
        return chooser(self.choices.decision(0, self.settings[0]))(graph, inside, free, unplanned)

    @functools.cached_property
    def _candidates(self) -> list[tuple[int, int]]:
        """Pairs of a choice and a setting that the host has room for, the fastest first."""
        pairs = [
            (i, k)
            for i in range(len(self.choices))
            for k, setting in enumerate(self.settings)
            if self.choices.fits_host(i, setting.states_bytes)
        ]
        return sorted(pairs, key=lambda c: (self._added(c), *c))

    def _fits(self, candidate: tuple[int, int], share: float) -> bool:
        choice, k = candidate
        if not self.choices.fits_host(choice, self.settings[k].states_bytes):
            return False
        if not self._is_as_agreed(choice, self.settings[k].bucket_bytes):
            return False
        _, peak = self._run(choice, self.settings[k].bucket_bytes)
        size = self.settings[k].bytes(peak)
        log.debug("choice %d, setting %d: peak %d, budget %d", choice, k, size, self.budget)
        left = self.budget - (peak.base - self.settings[k].states_bytes)
        return size <= self.budget and peak.between <= share * left

    def _added(self, candidate: tuple[int, int]) -> float:
        """Seconds of a run that a candidate takes beyond what every one does, with its share of what a step takes once."""
        setting = self.settings[candidate[1]]
        return self.scale * (self.choices.seconds(candidate[0]) + setting.seconds) + setting.copy_seconds / self.runs

    def _run_seconds(self, candidate: tuple[int, int]) -> float:
        return self.scale * self._base_seconds + self._added(candidate)

    def _split(self, choice: int) -> Split:
        if choice not in self._graphs:
            self._graphs[choice] = self.split(chooser(self.choices.decision(choice, self.settings[0])))
        return self._graphs[choice]

    def _passed(self, choice: int, bucket_bytes: int | None) -> Split:
        forward, backward = (compat.graph_module(gm, copy.deepcopy(gm.graph)) for gm in self._split(choice))
        return self.passes(forward, backward, bucket_bytes)

    def _collectives_of(self, choice: int, bucket_bytes: int | None) -> Collectives:
        if self.collectives is None:
            return ()
        if (choice, bucket_bytes) not in self._collectives:
            self._collectives[choice, bucket_bytes] = self.collectives(*self._passed(choice, bucket_bytes))
        return self._collectives[choice, bucket_bytes]

    def _is_as_agreed(self, choice: int, bucket_bytes: int | None) -> bool:
        return self.agreed is None or self._collectives_of(choice, bucket_bytes) == self.agreed

    def _run(self, choice: int, bucket_bytes: int | None) -> tuple[Split, Peak]:
        graphs = self._split(choice)
        if (choice, bucket_bytes) not in self._measured:
            passed = self._passed(choice, bucket_bytes)
            if not self._measured:
                self._base_seconds = self.seconds(*passed) - self.choices.seconds(choice)
            self._measured[choice, bucket_bytes] = self.run(*passed)
        return graphs, self._measured[choice, bucket_bytes]

    def _peak(self, candidate: tuple[int, int]) -> int:
        """The measured peak, or the model's, corrected by what it missed where it was measured."""
        choice, setting = candidate[0], self.settings[candidate[1]]
        if (choice, setting.bucket_bytes) in self._measured:
            return setting.bytes(self._measured[choice, setting.bucket_bytes])
        first, least = self._ends
        missed = self._missed
        most, fewest = (self.choices.bytes(at[0]) for at in (first, least))
        share = min((most - self.choices.bytes(choice)) / max(most - fewest, 1), 1.0)
        modelled = self.choices.peak(choice, setting.bucket_bytes)
        graph = modelled + round(missed[0] + (missed[1] - missed[0]) * share)
        return setting.bytes(replace(self._measured[first], graph=graph))

    def _modelled(self, candidate: tuple[int, int]) -> int:
        """The model's peak, as it is."""
        setting = self.settings[candidate[1]]
        graph = self.choices.peak(candidate[0], setting.bucket_bytes)
        return setting.bytes(replace(self._measured[self._ends[0]], graph=graph))

    @property
    def _ends(self) -> tuple[tuple[int, int | None], tuple[int, int | None]]:
        """The choices that correct the model, as they were run: the fastest, or that which was decided before, and the smallest
        where there was need."""
        fastest = (0, self.settings[0].bucket_bytes)
        first = fastest if fastest in self._measured else next(iter(self._measured))
        return first, self._least if self._least in self._measured else first

    @property
    def _missed(self) -> list[int]:
        """Bytes by which the model fell short of them."""
        return [self._measured[at].graph - self.choices.peak(*at) for at in self._ends]

    @property
    def _most_missed(self) -> int:
        return max(map(abs, self._missed))

    @functools.cached_property
    def _least(self) -> tuple[int, int | None]:
        """The choice with the least modelled peak, in buckets of the first setting."""
        first = self.settings[0].bucket_bytes
        return min(((i, first) for i in range(len(self.choices))), key=lambda at: self.choices.peak(*at))

    def _made(self, candidate: tuple[int, int]) -> tuple[Split, Plan]:
        choice, setting = candidate[0], self.settings[candidate[1]]
        graphs, peak = self._run(choice, setting.bucket_bytes)
        frontier: list[Option] = []
        chosen = 0
        for c in self._candidates:
            size = self._peak(c)
            if c == candidate:
                chosen = len(frontier)
            elif frontier and size >= min(option.peak for option in frontier) * (1 - _WORTH_SHOWING):
                continue  # slower and no smaller
            frontier.append(
                Option(
                    peak=size,
                    seconds=self._run_seconds(c),
                    saved_bytes=self.choices.bytes(c[0]),
                    is_measured=(c[0], self.settings[c[1]].bucket_bytes) in self._measured,
                )
            )
        return graphs, Plan(
            decision=self.choices.decision(choice, setting),
            saved_bytes=self.choices.bytes(choice),
            kept_bytes=self.choices.kept_bytes(choice),
            held_bytes=self.choices.held_bytes(choice),
            seconds=self._run_seconds(candidate) - setting.copy_seconds / self.runs,
            scale=self.scale,
            again_seconds=self.choices.again_seconds(choice),
            states_bytes=setting.states_bytes,
            states_seconds=setting.copy_seconds,
            peak=setting.bytes(peak),
            between=peak.between,
            stage=peak.stage,
            collectives=self._collectives_of(choice, setting.bucket_bytes),
            budget=self.budget,
            frontier=tuple(frontier),
            chosen=chosen,
            classes=classes_of(self.choices, choice, setting),
            largest=largest_of(self.choices, choice),
        )

    def _refusal(self) -> BudgetError:
        as_agreed = {at: peak for at, peak in self._measured.items() if self._is_as_agreed(*at)}
        tried = [
            (setting.bytes(peak), peak)
            for (choice, bucket_bytes), peak in (as_agreed or self._measured).items()
            for setting in self.settings
            if setting.bucket_bytes == bucket_bytes and self.choices.fits_host(choice, setting.states_bytes)
        ]
        least, peak = min(tried, key=lambda pair: pair[0])
        smallest = rounded_up(least)
        if not as_agreed:
            return BudgetError(
                f"dspass.memory_budget: none of {len(self._candidates)} plans serves {self.where}: each would have others. Pad "
                "batches to one size.",
                smallest,
                alone=True,
            )
        host = "" if any(setting.states for setting in self.settings) else ", optimiser states on the host"
        return BudgetError(
            f"dspass.memory_budget of {size_text(self.budget)} is too small: the smallest plan of {len(self._candidates)} "
            f"takes {size_text(smallest)} {self.where}. Give that much, or {self.ways_out}{host} or a smaller batch.",
            smallest,
            peak.stage,
            alone=self.agreed is not None,
        )


def chooser(decision: Decision) -> compat.Chooser:
    """For the partition: what ``decision`` says of a joint graph's nodes."""
    saved, kept, held = set(decision.saved), set(decision.kept), dict(decision.held)

    def choose(graph: fx.Graph, forward: Sequence[fx.Node], *_: object) -> list[fx.Node]:
        for node in forward:
            if node.name in kept:
                node.meta[KEPT] = True
            if node.name in held:
                node.meta[HELD] = held[node.name]
        return [node for node in forward if node.name in saved]

    return choose
