"""Bytes alive over a step, from the joint graph and a choice of what is saved: quick enough to ask for every choice.

The step is a list of moments: the nodes of its two halves (:mod:`dspass.planner.halves`). A value takes its bytes from the
moment that makes it to the last that reads it, one that is fused into its readers takes none
(:attr:`dspass.passes.kernels.Stretch.materialised` says which), and what is fused reads its inputs when its readers run::

    peak = max over moments m of  Σ bytes(v)  over values v with  made(v) <= m <= read(v)        (_highest)

Gathered copies live from the moment the bucket before theirs is used to their last reader, or from the forward to the backward
where they are kept; whole gradients until the bucket after theirs is full; their shards to the end.

It is a model, and leaves out what the allocator and Inductor's code do: the planner corrects it by dry runs of some choices
(:mod:`dspass.planner.dry_run`), which answer for the budget. Dropped: a dry run of each choice. It takes seconds where this
takes milliseconds, and a frontier of 24 choices would cost more than compiling.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

import torch.fx as fx

from dspass.passes.buckets import Item, pack
from dspass.passes.kernels import Stretch, is_item_in_memory, is_tuple, is_view, size_of
from dspass.passes.nodes import GATHERED, REDUCE_GRAD
from dspass.planner.values import is_gathered
from dspass.runtime.params import ParamSpec, lookup


@dataclass(frozen=True)
class Absence:
    """Of a saved value that a pass holds in its way: ``bytes`` on the device from moment ``last`` to ``back``, in both of which
    it is there whole as well."""

    bytes: int
    last: int
    back: int


@dataclass(kw_only=True)
class Liveness:
    """The step of one joint graph. ``distance`` says how many buckets ahead gathers start, and ``gathers`` whether the backward
    gathers anew (ZeRO stage 3)."""

    joint: fx.Graph
    gathers: bool
    distance: int = 1
    _sizes: dict[fx.Node, int] = field(default_factory=dict)
    _whole: dict[fx.Node, ParamSpec] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for node in self.joint.nodes:
            if is_item_in_memory(node) or (node.op == "call_function" and not is_view(node) and not is_tuple(node)):
                self._sizes[node] = size_of(node)
            elif GATHERED in node.meta and is_gathered(spec := lookup(node.meta[GATHERED][0])):
                self._whole[node] = spec

    def moments(
        self, halves: tuple[Stretch, Stretch], saved: Set[fx.Node], absent: Mapping[fx.Node, Absence]
    ) -> Moments:
        """The step when ``saved`` are kept between ``halves``, those that are ``absent`` on the device only in part: all that
        no bucket's size changes."""
        forward, backward = halves
        events: list[tuple[int, int, int]] = []  # from, to, bytes
        middle = len(forward.nodes)
        end = middle + len(backward.nodes)
        first = self._lifetimes(forward, 0, forward.results - saved, saved, end, events)
        second = self._lifetimes(backward, middle, backward.results, set(), end, events)
        for node in saved:  # until the backward has read it
            if (size := self._sizes.get(node, 0)) and node in first.made:
                last = second.last.get(node, middle)
                if node not in absent:
                    events.append((first.made[node], last, size))
                    continue
                away = absent[node]
                events += [(first.made[node], away.last, size), (away.back, last, size)]
                events.append((away.last, away.back, away.bytes))
        return Moments(first, second, saved, backward.nodes, middle, end, events)

    def peak(self, step: Moments, bucket_bytes: int | None = None) -> int:
        """Bytes at the peak of forward and backward, beyond shards, states and the batch, when collectives go in buckets of
        ``bucket_bytes``."""
        events = list(step.events)
        self._parameters(step.first, step.second, step.saved, step.middle, bucket_bytes, events)
        self._reductions(step.backward, step.middle, step.end, bucket_bytes, events)
        return _highest(events)

    def _lifetimes(
        self,
        stretch: Stretch,
        start: int,
        results: Set[fx.Node],
        elsewhere: Set[fx.Node],
        end: int,
        events: list[tuple[int, int, int]],
    ) -> Reads:
        """Enter what ``stretch`` allocates, but for ``elsewhere``; answers when each value is made and read."""
        reads = reads_of(stretch, start)
        for node in stretch.nodes:
            if node in elsewhere or node.target is REDUCE_GRAD:
                continue
            if node in stretch.materialised or stretch.traits[node].is_item_in_memory:
                made = reads.made[node]
                events.append((made, end if node in results else reads.last.get(node, made), self._sizes.get(node, 0)))
        return reads

    def _parameters(
        self,
        forward: Reads,
        backward: Reads,
        kept: Set[fx.Node],
        middle: int,
        bucket_bytes: int | None,
        events: list[tuple[int, int, int]],
    ) -> None:
        """Gathered copies, by buckets, in each half; one that is kept is not gathered again."""
        again = [n for n in self._whole if n not in kept]
        for reads, whole in ((forward, list(self._whole)), (backward, again if self.gathers else [])):
            used = sorted((n for n in whole if n in reads.first), key=lambda n: reads.first[n])
            if not used:
                continue
            specs = [self._whole[n] for n in used]
            buckets = pack([_item(spec) for spec in specs], bucket_bytes)
            begins = [reads.first[used[bucket[0]]] for bucket in buckets]
            for b, bucket in enumerate(buckets):
                start = begins[b - self.distance] if b >= self.distance else min(begins)
                staged = sum(specs[j].gathered_bytes // max(_ranks(specs[j]), 1) for j in bucket if specs[j].on_host)
                events.append((start, begins[b], staged))
                for j in bucket:
                    node = used[j]
                    stays = reads is forward and (not self.gathers or node in kept)
                    until = max(backward.last.get(node, middle), reads.last[node]) if stays else reads.last[node]
                    events.append((start, until, specs[j].gathered_bytes))

    def _reductions(
        self,
        nodes: Sequence[fx.Node],
        start: int,
        end: int,
        bucket_bytes: int | None,
        events: list[tuple[int, int, int]],
    ) -> None:
        """Whole gradients wait for their bucket and for the one after it; their shards stay, or go to the host."""
        found: list[tuple[int, ParamSpec]] = []
        position = {node: start + p for p, node in enumerate(nodes)}
        for node in nodes:
            if node.target is REDUCE_GRAD:
                found.append((position.get(node.all_input_nodes[0], position[node]), lookup(str(node.args[1]))))
        found.sort(key=lambda pair: pair[0])
        if not found:
            return
        buckets = pack([_item(spec) for _, spec in found], bucket_bytes)
        full = [max(found[j][0] for j in bucket) for bucket in buckets]
        for b, bucket in enumerate(buckets):
            arrives = full[b + 1] if b + 1 < len(full) else end
            for j in bucket:
                ready, spec = found[j]
                if _ranks(spec) > 1 or spec.on_host:
                    events.append((ready, arrives, spec.reduced_bytes))
                    events.append((full[b], arrives if spec.on_host else end, spec.reduced_bytes // _ranks(spec)))
                else:
                    events.append((ready, end, spec.reduced_bytes))


@dataclass(frozen=True)
class Reads:
    """Moments of one half by node: when it is made, first read and last read."""

    made: dict[fx.Node, int]
    first: dict[fx.Node, int]
    last: dict[fx.Node, int]


@dataclass(frozen=True)
class Moments:
    """A step without its collectives: reads of its halves, the values that are ``saved`` from one to the other, the nodes of
    the ``backward``, where that begins and the ``end``, and what is alive from when to when."""

    first: Reads
    second: Reads
    saved: Set[fx.Node]
    backward: Sequence[fx.Node]
    middle: int
    end: int
    events: Sequence[tuple[int, int, int]]


def reads_of(stretch: Stretch, start: int = 0) -> Reads:
    """Moments of ``stretch``, the first of which is ``start``. A view is made where it is read, and what is fused reads when
    its readers do."""
    made = {node: start + p for p, node in enumerate(stretch.nodes)}
    last: dict[fx.Node, int] = {}
    first: dict[fx.Node, int] = {}
    for node in reversed(stretch.nodes):
        at = made[node]
        reads_at = at if node in stretch.materialised else max(last.get(node, at), at)
        traits = stretch.traits[node]
        begins = first.get(node, at) if traits.is_view or node.target is operator.getitem else at
        for source in traits.sources:
            first[source] = min(first.get(source, begins), begins)
            if node.target is not REDUCE_GRAD:  # it stands at the end; what it reads goes into a bucket before
                last[source] = max(last.get(source, 0), reads_at)
    return Reads(made, first, last)


def _ranks(spec: ParamSpec) -> int:
    return spec.shard_axis.size if spec.shard_axis is not None else 1


def _item(spec: ParamSpec) -> Item:
    return Item((spec.name,), (spec.gathered_bytes,), spec.numel, spec.shard_axis)


def _highest(events: Sequence[tuple[int, int, int]]) -> int:
    changes: dict[int, int] = {}
    for start, last, size in events:
        changes[start] = changes.get(start, 0) + size
        changes[last + 1] = changes.get(last + 1, 0) - size
    now = most = 0
    for moment in sorted(changes):
        now += changes[moment]
        most = max(most, now)
    return most
