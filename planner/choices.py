"""What could be saved of a joint graph, from the fastest to the smallest, and what each choice takes by the models.

The solver minimises sums over values, and a step is more than these. What a choice takes depends on what its values are fused
with, and its peak is not what it saves: computing again takes memory of its own. So the solver proposes: the corners of its
hull (:func:`dspass.planner.mincut.hull`) under a few prices that no sum gets right, and beside them what Inductor's own min-cut
saves and what was decided before. The models judge: each choice gets the seconds of its step from :mod:`dspass.planner.timing`
and its peak from :class:`~dspass.planner.liveness.Liveness`, both from the joint graph.

Passes declare levers of their own (:meth:`dspass.passes.base.Pass.hold`): other ways to hold a saved value, such as on the
host. Copies to and from the host cost nothing while compute hides them and their whole time beyond that, which is no sum over
values. But it is convex in the time ``T`` of all copies, so its optimum is one where a second of them costs some share of a
second: that of a hidden one, that of an exposed one, and one in between where ``T`` is just what compute hides, found by
bisection. The solver is asked at these three (:meth:`Choices._shares`), and once without such ways: what fits so must be found
where they are there, too.

Dropped: to order choices by the solver's own sums. For Llama-3-8B on H100s they put first a step that saves a third more than
Inductor does and takes a twentieth longer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.fx as fx

from dspass.passes.base import Pass
from dspass.passes.cost import compute_seconds, operation_seconds
from dspass.passes.devices import Device
from dspass.passes.nodes import GATHERED
from dspass.planner.halves import Halves
from dspass.planner.liveness import Liveness, Moments
from dspass.planner.mincut import Choice, Value, completed, hull, smallest
from dspass.planner.record import Decision, Setting
from dspass.planner.timing import Times, times_of
from dspass.planner.values import Held, in_ways, values_of
from dspass.runtime import compat

#: The share of its time that a hidden copy to or from the host is taken to cost: the link may be busy otherwise.
_HIDDEN = 0.05

#: How many choices the solver is asked for at a time, and how often it is to take a value as read again that several read
#: (:func:`~dspass.planner.values.values_of`): each gives choices that the models find best somewhere.
_CHOICES, _REPEATS = 24, (1.0, 2.0)


@dataclass(kw_only=True)
class Choices:
    """The choices of one joint graph, the fastest first; of equally fast ones, the smallest.

    ``inside`` are its nodes in order that need no gradient, ``free`` placeholders that take no memory to keep, and
    ``unplanned`` answers what Inductor would save. ``gathers``: the backward gathers anew what is not kept (ZeRO stage 3), and
    ``regather`` is the share of it that compute does not hide. ``levers`` are passes that hold saved values in ways of their
    own; ``prior`` is what was decided for the same graph with inputs of other shapes. What is saved is there ``in_flight``
    times at once, in a pipeline.
    """

    joint: fx.Graph
    inside: Sequence[fx.Node]
    free: frozenset[fx.Node]
    unplanned: compat.Unplanned
    num_fwd_outputs: int
    on: Device
    gathers: bool
    regather: float
    levers: tuple[Pass, ...] = ()
    prior: Decision | None = None
    in_flight: int = 1
    values: list[Value] = field(init=False)
    ways: list[tuple[Held, ...]] = field(init=False)
    found: list[Choice] = field(init=False)
    _number: dict[str, int] = field(init=False)
    _whole: set[int] = field(init=False)  # parameters whose copies may be kept
    _halves: Halves = field(init=False)
    _liveness: Liveness = field(init=False)
    _times: dict[Any, Times] = field(default_factory=dict)  # by what a choice saves, and how
    _moments: dict[Any, Moments] = field(default_factory=dict)
    _peaks: dict[Any, int] = field(default_factory=dict)  # and bytes of a bucket

    def __post_init__(self) -> None:
        problems = []
        for repeats in _REPEATS:
            plain, self.ways = values_of(
                self.joint,
                self.inside,
                self.num_fwd_outputs,
                self.free,
                self.on,
                self.regather,
                self.levers,
                repeats,
            )
            problems.append(plain)
        self.values = in_ways(problems[0], self.ways, 0.0)
        self._number = {n.name: i for i, n in enumerate(self.inside)}
        self._whole = {i for i, n in enumerate(self.inside) if GATHERED in n.meta and self.values[i].bytes}
        self._halves = Halves(self.joint, self.inside, self.num_fwd_outputs)
        self._liveness = Liveness(joint=self.joint, gathers=self.gathers)
        found = [choice for plain in problems for choice in self._corners(plain)]
        found.append(completed(self.values, self._saved_with(self.unplanned())))
        if self._before is not None:
            found.append(self._before)
        distinct = {(c.saved, c.ways): c for c in found}
        for choice in distinct.values():
            self._peak(choice)
        self.found = sorted(distinct.values(), key=lambda c: (self._seconds(c), c.bytes))

    def __len__(self) -> int:
        return len(self.found)

    def bytes(self, i: int) -> int:
        """Bytes that choice ``i`` saves."""
        return self.found[i].bytes

    def kept_bytes(self, i: int) -> int:
        """Those of whole parameters among them."""
        return sum(self.values[k].bytes for k in self.found[i].saved & self._whole)

    def held_bytes(self, i: int) -> int:
        """Those of values that passes hold in their ways."""
        return sum(self.values[k].bytes for k, _ in self.found[i].ways)

    def seconds(self, i: int) -> float:
        """What the model says that a step of choice ``i`` takes, without the collectives that every one has."""
        return self._seconds(self.found[i])

    def again_seconds(self, i: int) -> float:
        """What computing and gathering again takes, value by value."""
        return math.fsum(self.values[k].seconds for k in self.found[i].recomputed)

    def peak(self, i: int, bucket_bytes: int | None) -> int:
        """The modelled peak of choice ``i`` in such buckets, beyond what is there in every moment."""
        return self._peak(self.found[i], bucket_bytes) + (self.in_flight - 1) * self.found[i].bytes

    def fits_host(self, i: int, states_bytes: int) -> bool:
        """Whether what choice ``i`` holds on the host has room there, beside so much of the optimiser's states."""
        return self._fits_host(self.found[i], states_bytes)

    def of_prior(self) -> tuple[int, int | None] | None:
        """The choice that :attr:`prior` made, and its bytes of a bucket; None where it speaks of other values."""
        if self.prior is None or self._before is None:
            return None
        return self.found.index(self._before), self.prior.bucket_bytes

    def decision(self, i: int, setting: Setting) -> Decision:
        choice = self.found[i]
        names = [self.inside[k].name for k in sorted(choice.saved)]
        kept = {self.inside[k].name for k in choice.saved & self._whole}
        dropped = [self.inside[k].name for k in sorted(choice.recomputed & self._whole)]
        return Decision(
            # A whole parameter is an input of the graph until gathers are placed: the partition is told that all are saved.
            saved=(*names, *dropped),
            recomputed=tuple(self.inside[k].name for k in sorted(choice.recomputed - self._whole)),
            kept=tuple(name for name in names if name in kept),
            held=tuple((self.inside[k].name, self.ways[k][way].by) for k, way in sorted(choice.ways)),
            bucket_bytes=setting.bucket_bytes,
            states_on_host=setting.states,
        )

    def _corners(self, plain: Sequence[Value]) -> list[Choice]:
        """What the solver proposes."""
        shares = self._shares(plain) if any(self.ways) else [0.0]
        most = _CHOICES if len(shares) == 1 else _CHOICES // 2
        corners = [c for share in shares for c in hull(in_ways(plain, self.ways, share), most)]
        if any(self.ways):
            corners += hull(plain, most)
            # What lies between checkpoints waits in some way, all else is computed again: copies of what is made behind the
            # forward, such as derivatives, are cheap and come too late.
            has_to_wait = [() if value.recomputable else ways for value, ways in zip(plain, self.ways, strict=True)]
            corners.append(smallest(in_ways(plain, has_to_wait, shares[0])))
        found = [Choice.of(self.values, c.saved, c.recomputed, c.ways) for c in corners]
        return [choice for choice in found if self._fits_host(choice)]

    def _saved_with(self, nodes: Sequence[fx.Node]) -> set[int]:
        """The values that are saved with ``nodes``, some of which are views of them."""
        found = set()
        for node in nodes:
            while not self.values[self._number[node.name]].savable and node.all_input_nodes:
                node = node.all_input_nodes[0]
            found.add(self._number[node.name])
        return found

    @functools.cached_property
    def _before(self) -> Choice | None:
        if self.prior is None:
            return None
        saved, again, kept = self.prior.saved, self.prior.recomputed, self.prior.kept
        if not {*saved, *again} <= self._number.keys():
            return None
        dropped = {name for name in saved if self._number[name] in self._whole and name not in kept}
        # Sizes, and arguments such as the share of a dropout, may be others now.
        savable = all(self.values[self._number[name]].savable for name in saved if name not in dropped)
        if not savable or not all(self.values[self._number[name]].recomputable for name in (*again, *dropped)):
            return None
        ways = set()
        for name, by in self.prior.held:
            i = self._number[name]
            way = next((k for k, other in enumerate(self.ways[i]) if other.by == by), None)
            if way is None:
                return None
            ways.add((i, way))
        choice = Choice.of(
            self.values,
            frozenset(self._number[n] for n in saved if n not in dropped),
            frozenset(self._number[n] for n in (*again, *dropped)),
            frozenset(ways),
        )
        return choice if self._fits_host(choice) else None

    def _shares(self, plain: Sequence[Value]) -> list[float]:
        """What a second of host copies costs where none is hidden, where as many are as can be, and where all are."""
        hides = 2 * min(self._hides) if self.on.overlaps else 0.0  # a value goes out in the forward, and back after it
        low, high = _HIDDEN, 1.0

        @functools.cache
        def copies(share: float) -> float:
            return self._copies(smallest(in_ways(plain, self.ways, share)))

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

    @functools.cached_property
    def _operations(self) -> Callable[[fx.Node], float]:
        """Seconds of an operator's arithmetic, worked out once for all choices."""
        return functools.cache(functools.partial(operation_seconds, on=self.on))

    @functools.cached_property
    def _hides(self) -> tuple[float, float]:
        """Seconds of compute of the forward and of the rest: of copies out that the one hides, and copies back the other."""
        seconds, inside = compute_seconds(self.joint, self.on), set(self.inside)
        forward = math.fsum(s for node, s in seconds.items() if node in inside)
        return forward, math.fsum(seconds.values()) - forward

    def _copies(self, choice: Choice) -> float:
        """Seconds of a choice's copies to and from the host."""
        return math.fsum(self.ways[i][k].holding.link_seconds for i, k in choice.ways)

    def _fits_host(self, choice: Choice, states_bytes: int = 0) -> bool:
        away = self.in_flight * sum(self.ways[i][k].holding.host_bytes for i, k in choice.ways) + states_bytes
        return not self.on.host_memory_bytes or away <= self.on.host_memory_bytes

    def _peak(self, choice: Choice, bucket_bytes: int | None = None) -> int:
        """The modelled peak, and with it the times."""
        key = (choice.saved, choice.ways)
        if (*key, bucket_bytes) not in self._peaks:
            if key not in self._times:
                saved = {self.inside[k] for k in choice.saved}
                halves = self._halves.of(saved)
                held = {self.inside[k]: self.ways[k][way].holding for k, way in choice.ways}
                self._times[key] = times_of(halves, held, self.on, self._operations)
                self._moments[key] = self._liveness.moments(halves, saved, self._times[key].absent)
            self._peaks[*key, bucket_bytes] = self._liveness.peak(self._moments[key], bucket_bytes)
        return self._peaks[*key, bucket_bytes]

    def _seconds(self, choice: Choice) -> float:
        gathers = [self.values[k].seconds for k in choice.recomputed & self._whole]
        keeps = [self.values[k].save_seconds for k in choice.saved & self._whole]
        return math.fsum([self._times[choice.saved, choice.ways].seconds, *sorted(gathers), *sorted(keeps)])
