"""The fastest step that fits: choices from the solver, their seconds and peaks from models, the budget held by dry runs.

:func:`dspass.planner.mincut.hull` orders what could be saved and kept from the fastest to the smallest, by sums over values.
A step is more than these sums. What a choice takes depends on what its values are fused with, and its peak is not what it
saves: computing again takes memory of its own. So each choice, and what Inductor's own min-cut would save, gets the seconds of
its step from :mod:`dspass.planner.timing` and its peak from :class:`~dspass.planner.liveness.Liveness`, both from the joint
graph. Then (:meth:`Planner.plan`):

1. the fastest choice and the one with the least peak are split, passed, lowered, and a step of them runs on fake tensors
   (:mod:`dspass.planner.dry_run`). What the model missed there, it is taken to miss in between, in proportion to what is saved;
2. of the choices whose corrected peak fits, or nearly (:data:`NEARLY`), the fastest is run in the same way, and is the plan if
   that fits; else the next one is tried.

Beside the values there are settings of the whole step (:class:`Setting`): how large buckets of collectives are, and whose
optimiser states wait on the host. What a setting costs adds to what a choice costs, and what it saves is known for the states
and modelled for buckets, so candidates are all pairs of a choice and a setting, in the order of their time; of equal ones the
smaller comes first.

Nothing in this depends on the budget but where it stops, so a larger budget never gives a slower plan by the model's seconds.
The cost model's estimate of the graphs that come of a choice, which the report shows, differs from these by what passes change:
a collective that ends a kernel early, a bucket of copies that waits to be full.

Passes declare levers of their own (:meth:`dspass.passes.base.Pass.hold`): other ways to hold a saved value, such as on the
host. Copies to and from the host cost nothing while compute hides them and their whole time beyond that, which is no sum over
values. But it is convex in the time ``T`` of all copies, so its optimum is one where a second of them costs some share of a
second: that of a hidden one, that of an exposed one, and one in between where ``T`` is just what compute hides, found by
bisection. The solver is asked at these three (:meth:`Planner._shares`), and its answers are weighed by what is exposed of all
their copies together.

Dropped: states on the host as values of the cut. They are there at every moment, so bytes of them are worth the same whatever
is saved, and a pair of a corner of the hull and a share of the states is the optimum of both up to the steps of that share.

Dropped: to order choices by the solver's own sums. For Llama-3-8B on H100s they put first a step that saves a third more than
Inductor does and takes a twentieth longer.

Dropped: to search by halving with a margin that grows with each miss. Its plan depended on the way to it: a larger budget
could end at a slower plan.
"""

from __future__ import annotations

import copy
import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.fx as fx

from dspass.passes.base import Pass
from dspass.passes.cost import compute_seconds
from dspass.passes.devices import Device
from dspass.passes.nodes import GATHERED, HELD, KEPT
from dspass.passes.text import print_value
from dspass.planner.dry_run import Peak
from dspass.planner.halves import Halves
from dspass.planner.liveness import Liveness
from dspass.planner.mincut import Choice, Value, completed, hull, smallest
from dspass.planner.record import BudgetError, Decision, Option, Plan, Setting, Tensors, size_text
from dspass.planner.timing import Times, times_of
from dspass.planner.values import Held, in_ways, values_of
from dspass.runtime import compat
from dspass.runtime.params import lookup

log = logging.getLogger(__name__)

Split = tuple[fx.GraphModule, fx.GraphModule]
Chooser = Callable[[fx.Graph, Sequence[fx.Node], frozenset[fx.Node], compat.Unplanned], list[fx.Node]]

#: Share by which a corrected peak may exceed the budget and the choice is still run. Between the two that correct it, the model
#: was off by less on GPT and Llama; more would only cost runs.
NEARLY = 0.05

#: The share of its time that a hidden copy to or from the host is taken to cost: the link may be busy otherwise.
_HIDDEN = 0.05

#: How many choices the solver is asked for at a time, and how often it is to take a value as read again that several read
#: (:func:`~dspass.planner.values.values_of`): each gives choices that the models find best somewhere.
_CHOICES, _REPEATS = 24, (1.0, 2.0)

#: A point of the frontier has a peak that is smaller by this share than those before it.
_WORTH_SHOWING = 0.005

#: Single values that a plan names.
_LARGEST = 12

#: So many choices with the least corrected peaks are run in any case, before a budget is refused.
_LAST_TRIES = 3


@dataclass(kw_only=True)
class Planner:
    """``split`` cuts the joint graph by a function that chooses what is saved, ``passes`` runs the pipeline on both halves with
    buckets of so many bytes, ``run`` answers the peak of a step of them, which it may change, and ``seconds`` their time.

    ``gathers``: the backward gathers anew what is not kept (ZeRO stage 3), and ``regather`` is the share of it that compute
    does not hide. The first of ``settings`` costs nothing. ``levers`` are passes that hold saved values in ways of their own.
    ``scale``: what measured steps of the model took, over what the cost model said; it makes predictions better. ``prior`` is
    what was decided for the same graph with inputs of other shapes: it is taken where the fastest candidate does not fit and
    it does."""

    budget: int
    on: Device
    num_fwd_outputs: int
    gathers: bool
    regather: float
    split: Callable[[Chooser], Split]
    passes: Callable[[fx.GraphModule, fx.GraphModule, int | None], Split]
    run: Callable[[fx.GraphModule, fx.GraphModule], Peak]
    seconds: Callable[[fx.GraphModule, fx.GraphModule], float]
    settings: tuple[Setting, ...] = (Setting(),)
    levers: tuple[Pass, ...] = ()
    scale: float = 1.0
    prior: Decision | None = None
    choices: list[Choice] = field(default_factory=list)
    _values: list[Value] = field(default_factory=list)
    _nodes: list[str] = field(default_factory=list)
    _others: list[tuple[Held, ...]] = field(default_factory=list)
    _labels: dict[str, str] = field(default_factory=dict)
    _whole: set[str] = field(default_factory=set)  # parameters whose copies may be kept
    _kept_bytes: list[int] = field(default_factory=list)
    _candidates: list[tuple[int, int]] = field(default_factory=list)  # a choice and a setting, the fastest first
    _forward: list[fx.Node] = field(default_factory=list)
    _halves: Halves | None = None
    _model: Liveness | None = None
    _times: dict[Any, Times] = field(default_factory=dict)  # by what a choice saves, and how
    _hides: tuple[float, float] = (0.0, 0.0)  # seconds of copies that the forward hides, and the backward
    _modelled: dict[Any, int] = field(default_factory=dict)  # and bytes of a bucket
    _measured: dict[tuple[int, int | None], Peak] = field(default_factory=dict)
    _graphs: dict[int, Split] = field(default_factory=dict)
    _base_seconds: float = 0.0

    def plan(self) -> tuple[Split, Plan]:
        """The two graphs of the fastest candidate that fits, before the passes; raises :class:`BudgetError` where none does."""
        self._graphs[0] = self.split(self._find)
        first = self._candidates[0]
        if self._fits(first):
            return self._made(first)
        if (prior := self._prior()) is not None:
            choice = self.choices.index(prior)
            assert self.prior is not None
            for k, setting in enumerate(self.settings):
                if setting.bucket_bytes == self.prior.bucket_bytes and self._fits((choice, k)):
                    return self._made((choice, k))
        self._run(*self._least)
        smallest = set(sorted(self._candidates, key=self._peak)[:_LAST_TRIES])
        for candidate in self._candidates:
            # A setting that is not the first has others beside it: no need to try what will hardly fit.
            near = 1 + NEARLY if candidate[1] == 0 else 1
            if (candidate in smallest or self._peak(candidate) <= self.budget * near) and self._fits(candidate):
                return self._made(candidate)
        raise self._refusal()

    def _fits(self, candidate: tuple[int, int]) -> bool:
        choice, k = candidate
        _, peak = self._run(choice, self.settings[k].bucket_bytes)
        size = self.settings[k].bytes(peak)
        log.debug("choice %d, setting %d: peak %d, budget %d", choice, k, size, self.budget)
        return size <= self.budget

    def decision(self, candidate: tuple[int, int]) -> Decision:
        choice, setting = self.choices[candidate[0]], self.settings[candidate[1]]
        names = [self._nodes[i] for i in sorted(choice.saved)]
        # A whole parameter is an input of the graph until gathers are placed: the partition is told that all are saved.
        again = [self._nodes[i] for i in sorted(choice.recomputed)]
        return Decision(
            saved=(*names, *(n for n in again if n in self._whole)),
            recomputed=tuple(n for n in again if n not in self._whole),
            kept=tuple(n for n in names if n in self._whole),
            held=tuple((self._nodes[i], self._others[i][k].by) for i, k in sorted(choice.ways)),
            bucket_bytes=setting.bucket_bytes,
            states_on_host=setting.states,
        )

    def _find(
        self, graph: fx.Graph, forward: Sequence[fx.Node], free: frozenset[fx.Node], unplanned: compat.Unplanned
    ) -> list[fx.Node]:
        problems = []
        for repeats in _REPEATS:
            plain, nodes, self._others = values_of(
                graph, forward, self.num_fwd_outputs, free, self.on, self.regather, self.levers, repeats
            )
            problems.append(plain)
        self._values = values = in_ways(problems[0], self._others, 0.0)
        self._forward = nodes
        self._nodes = [n.name for n in nodes]
        self._labels = {n.name: _label(n) for n in nodes}
        self._whole = {n.name for n, v in zip(nodes, values, strict=True) if GATHERED in n.meta and v.bytes}
        self._halves = Halves(graph, nodes, self.num_fwd_outputs)
        self._model = Liveness(joint=graph, gathers=self.gathers)
        if any(self._others):
            self._hides = _hides(graph, set(nodes), self.on)
        self.choices = self._choices(problems, unplanned)
        for choice in self.choices:
            self._kept_bytes.append(sum(values[i].bytes for i in choice.saved if nodes[i].name in self._whole))
        pairs = [(i, k) for i in range(len(self.choices)) for k in range(len(self.settings))]
        self._candidates = sorted(pairs, key=lambda c: (self._added(c), *c))
        return chooser(self.decision((0, 0)))(graph, forward, free, unplanned)

    def _choices(self, problems: Sequence[Sequence[Value]], unplanned: compat.Unplanned) -> list[Choice]:
        """What could be chosen, the fastest first; of equally fast ones, the smallest."""
        found: dict[Any, Choice] = {}
        for plain in problems:
            shares = self._shares(plain) if any(self._others) else [0.0]
            for share in shares:
                most = _CHOICES if len(shares) == 1 else _CHOICES // 2
                for c in hull(in_ways(plain, self._others, share), most):
                    choice = Choice.of(self._values, c.saved, c.recomputed, c.ways)
                    if self._fits_host(choice):
                        found[choice.saved, choice.ways] = choice
        theirs = completed(self._values, self._saved_by(unplanned()))
        more = [theirs, self._prior()]
        found |= {(choice.saved, choice.ways): choice for choice in more if choice is not None}
        for choice in found.values():
            self._model_of(choice)
        return sorted(found.values(), key=lambda c: (self._seconds_of(c), c.bytes))

    def _saved_by(self, nodes: Sequence[fx.Node]) -> set[int]:
        """The values that are saved with ``nodes``, some of which are views of them."""
        number = {node: i for i, node in enumerate(self._forward)}
        found = set()
        for node in nodes:
            while not self._values[number[node]].savable:
                node = node.all_input_nodes[0]
            found.add(number[node])
        return found

    def _model_of(self, choice: Choice, bucket_bytes: int | None = None) -> int:
        """The modelled peak of ``choice`` in such buckets, and its times."""
        assert self._halves is not None
        assert self._model is not None
        key, saved = (choice.saved, choice.ways), {self._forward[i] for i in choice.saved}
        if (*key, bucket_bytes) not in self._modelled:
            halves = self._halves.of(saved)
            if key not in self._times:
                self._times[key] = times_of(halves, self._copied(choice), self.on)
            peak = self._model.peak(halves, saved, self._times[key].absent, bucket_bytes)
            self._modelled[*key, bucket_bytes] = peak
        return self._modelled[*key, bucket_bytes]

    def _copied(self, choice: Choice) -> dict[fx.Node, tuple[int, float]]:
        """Of values that passes hold: bytes on the device meanwhile, and seconds of copies."""
        found = {}
        for i, k in choice.ways:
            holding = self._others[i][k].holding
            found[self._forward[i]] = (holding.bytes, holding.link_seconds)
        return found

    def _prior(self) -> Choice | None:
        """What :attr:`prior` chose; None where it speaks of other values."""
        if self.prior is None:
            return None
        number = {name: i for i, name in enumerate(self._nodes)}
        saved, again, kept = self.prior.saved, self.prior.recomputed, self.prior.kept
        if not {*saved, *again} <= number.keys():
            return None
        dropped = {name for name in saved if name in self._whole and name not in kept}
        ways = set()
        for name, by in self.prior.held:
            way = next((k for k, other in enumerate(self._others[number[name]]) if other.by == by), None)
            if way is None:
                return None
            ways.add((number[name], way))
        return Choice.of(
            self._values,
            frozenset(number[n] for n in saved if n not in dropped),
            frozenset(number[n] for n in (*again, *dropped)),
            frozenset(ways),
        )

    def _shares(self, plain: Sequence[Value]) -> list[float]:
        """What a second of host copies costs where none is hidden, where as many are as can be, and where all are."""
        hides = 2 * min(self._hides) if self.on.overlaps else 0.0  # a value goes out in the forward, and back after it
        low, high = _HIDDEN, 1.0

        @functools.cache
        def copies(share: float) -> float:
            return self._copies(smallest(in_ways(plain, self._others, share)))

        if not hides or copies(high) > hides:
            return [high]
        if copies(low) <= hides:
            return [low]
        while high > 1.01 * low:
            middle = math.sqrt(low * high)
            low, high = (middle, high) if copies(middle) > hides else (low, middle)
            if copies(high) > 0.9 * hides:
                break
        return [1.0, high, _HIDDEN]

    def _copies(self, choice: Choice) -> float:
        """Seconds of a choice's copies to and from the host."""
        return math.fsum(self._others[i][k].holding.link_seconds for i, k in choice.ways)

    def _fits_host(self, choice: Choice) -> bool:
        away = sum(self._values[i].bytes - self._values[i].saved_by(k).bytes for i, k in choice.ways)
        return not self.on.host_memory_bytes or away <= self.on.host_memory_bytes

    def _seconds_of(self, choice: Choice) -> float:
        """What the model says that a step of ``choice`` takes, without the collectives that every one has."""
        gathers = (v.seconds if i in choice.recomputed else v.save_seconds for i, v in self._whole_values(choice))
        held = (self._others[i][k].holding.seconds for i, k in choice.ways)
        return self._times[choice.saved, choice.ways].seconds + math.fsum(gathers) + math.fsum(held)

    def _whole_values(self, choice: Choice) -> list[tuple[int, Value]]:
        decided = choice.saved | choice.recomputed
        return [(i, self._values[i]) for i in sorted(decided) if self._nodes[i] in self._whole]

    def _added(self, candidate: tuple[int, int]) -> float:
        """Seconds of a step that a candidate takes beyond what every one does."""
        setting = self.settings[candidate[1]]
        graphs = self._seconds_of(self.choices[candidate[0]]) + setting.seconds
        return self.scale * graphs + setting.copy_seconds

    def _step_seconds(self, candidate: tuple[int, int]) -> float:
        return self.scale * self._base_seconds + self._added(candidate)

    def _run(self, choice: int, bucket_bytes: int | None) -> tuple[Split, Peak]:
        if choice not in self._graphs:
            self._graphs[choice] = self.split(chooser(self.decision((choice, 0))))
        graphs = self._graphs[choice]
        if (choice, bucket_bytes) not in self._measured:
            forward, backward = (compat.graph_module(gm, copy.deepcopy(gm.graph)) for gm in graphs)
            passed = self.passes(forward, backward, bucket_bytes)
            if not self._measured:
                self._base_seconds = self.seconds(*passed) - self._seconds_of(self.choices[choice])
            self._measured[choice, bucket_bytes] = self.run(*passed)
        return graphs, self._measured[choice, bucket_bytes]

    def _peak(self, candidate: tuple[int, int]) -> int:
        """The measured peak, or the model's, corrected by what it missed where it was measured."""
        choice, setting = candidate[0], self.settings[candidate[1]]
        if (choice, setting.bucket_bytes) in self._measured:
            return setting.bytes(self._measured[choice, setting.bucket_bytes])
        first = (0, self.settings[0].bucket_bytes)
        least = self._least if self._least in self._measured else first
        missed = [self._measured[at].graph - self._modelled_peak(*at) for at in (first, least)]
        most, fewest = (self.choices[at[0]].bytes for at in (first, least))
        share = min((most - self.choices[choice].bytes) / max(most - fewest, 1), 1.0)
        modelled = self._modelled_peak(choice, setting.bucket_bytes)
        graph = modelled + round(missed[0] + (missed[1] - missed[0]) * share)
        return setting.bytes(replace(self._measured[first], graph=graph))

    def _modelled_peak(self, choice: int, bucket_bytes: int | None) -> int:
        return self._model_of(self.choices[choice], bucket_bytes)

    @functools.cached_property
    def _least(self) -> tuple[int, int | None]:
        """The choice with the least modelled peak, in buckets of the first setting."""
        first = self.settings[0].bucket_bytes
        return min(((i, first) for i in range(len(self.choices))), key=lambda at: self._modelled_peak(*at))

    def _made(self, candidate: tuple[int, int]) -> tuple[Split, Plan]:
        choice, setting = self.choices[candidate[0]], self.settings[candidate[1]]
        graphs, peak = self._run(candidate[0], setting.bucket_bytes)
        frontier: list[Option] = []
        chosen = 0
        for c in self._candidates:
            size = self._peak(c)
            if c == candidate:
                chosen = len(frontier)
            elif frontier and size >= min(option.peak for option in frontier) * (1 - _WORTH_SHOWING):
                continue  # slower and no smaller
            measured = (c[0], self.settings[c[1]].bucket_bytes) in self._measured
            seconds = self._step_seconds(c)
            frontier.append(
                Option(peak=size, seconds=seconds, saved_bytes=self.choices[c[0]].bytes, is_measured=measured)
            )
        return graphs, Plan(
            decision=self.decision(candidate),
            saved_bytes=choice.bytes,
            kept_bytes=self._kept_bytes[candidate[0]],
            held_bytes=sum(self._values[i].bytes for i, _ in choice.ways),
            seconds=self._step_seconds(candidate) - setting.copy_seconds,
            scale=self.scale,
            again_seconds=math.fsum(self._values[i].seconds for i in choice.recomputed),
            states_bytes=setting.states_bytes,
            states_seconds=setting.copy_seconds,
            peak=setting.bytes(peak),
            between=peak.between,
            budget=self.budget,
            frontier=tuple(frontier),
            chosen=chosen,
            classes=(*_states_of(setting), *self._classes(choice)),
            largest=tuple(self._tensors(i, choice, dict(choice.ways)) for i in self._by_size(choice)[:_LARGEST]),
        )

    def _by_size(self, choice: Choice) -> list[int]:
        """What was decided of a choice's values, the largest first: not what costs nothing to keep or must be made anew."""
        decided = [i for i in (*choice.saved, *choice.recomputed) if self._values[i].bytes and self._values[i].savable]
        return sorted(decided, key=lambda i: (-self._values[i].bytes, i))

    def _tensors(self, i: int, choice: Choice, ways: Mapping[int, int]) -> Tensors:
        value, node = self._values[i], self._nodes[i]
        way = ways.get(i)
        kept = i in choice.saved and way is None
        # What is taken from a tuple costs what the tuple does.
        seconds = value.seconds or max((self._values[u].seconds for u in value.inputs), default=0.0)
        return Tensors(
            name=self._labels[node],
            count=1,
            kept=value.bytes if kept else 0,
            dropped=0 if i in choice.saved else value.bytes,
            again_seconds=seconds if value.recomputable else None,
            held=0 if way is None else value.bytes,
            held_by="" if way is None else self._others[i][way].by,
        )

    def _classes(self, choice: Choice) -> tuple[Tensors, ...]:
        found: dict[str, list[Tensors]] = {}
        ways = dict(choice.ways)
        for i in self._by_size(choice):
            one = self._tensors(i, choice, ways)
            found.setdefault(one.name.partition(" ")[0], []).append(one)
        classes = [
            Tensors(
                name=name,
                count=len(ones),
                kept=sum(o.kept for o in ones),
                dropped=sum(o.dropped for o in ones),
                again_seconds=math.fsum(o.again_seconds or 0.0 for o in ones if o.dropped),
                held=sum(o.held for o in ones),
                held_by=", ".join(sorted({o.held_by for o in ones} - {""})),
            )
            for name, ones in found.items()
        ]
        return tuple(sorted(classes, key=lambda c: -(c.kept + c.dropped + c.held)))

    def _refusal(self) -> BudgetError:
        tried = [
            setting.bytes(peak)
            for (_, bucket_bytes), peak in self._measured.items()
            for setting in self.settings
            if setting.bucket_bytes == bucket_bytes
        ]
        smallest = _rounded_up(min(tried))
        host = "" if any(setting.states for setting in self.settings) else ", optimiser states on the host"
        return BudgetError(
            f"dspass.memory_budget of {size_text(self.budget)} is too small: the smallest plan of {len(self._candidates)} "
            f"takes {size_text(smallest)} on each rank. Give that much, or use more ranks, a higher ZeRO stage{host} or a "
            "smaller batch.",
            smallest,
        )


def _hides(joint: fx.Graph, inside: Set[fx.Node], on: Device) -> tuple[float, float]:
    """Seconds of compute of the forward and of the rest."""
    seconds = compute_seconds(joint, on)
    forward = math.fsum(s for node, s in seconds.items() if node in inside)
    return forward, math.fsum(seconds.values()) - forward


def _states_of(setting: Setting) -> tuple[Tensors, ...]:
    """Optimiser states that wait on the host, as a class of tensors."""
    if not setting.states:
        return ()
    return (
        Tensors(
            name="optimizer-states",
            count=len(setting.states),
            kept=0,
            dropped=0,
            again_seconds=None,
            held=setting.states_bytes,
            held_by="host_states",
        ),
    )


def _label(node: fx.Node) -> str:
    """The kind of a value, then the value: ``mm f32[512,1024] mm_3``, ``gathered-parameter f32[96,96] blocks.0.up.weight``."""
    value = node.meta.get("val")
    shape = print_value(value) if isinstance(value, torch.Tensor) else ""
    if GATHERED in node.meta:
        return f"gathered-parameter {shape} {lookup(node.meta[GATHERED][0]).name}"
    packet = getattr(node.target, "overloadpacket", None)
    kind = (
        "input"
        if node.op == "placeholder"
        else getattr(packet, "__name__", None) or getattr(node.target, "__name__", "")
    )
    if kind == "getitem" and isinstance(node.args[0], fx.Node):
        kind = _label(node.args[0]).partition(" ")[0]
    return f"{kind} {shape} {node.name}"


def chooser(decision: Decision) -> Chooser:
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


def _rounded_up(count: int) -> int:
    """To four digits, as :func:`size_text` says it: a person who gives what an error says must not be refused again."""
    unit = 10 ** max(len(str(count)) - 4, 0)
    return -(-count // unit) * unit
