"""Bytes alive over a step, from the joint graph and a choice of what is saved: quick enough to ask for every choice.

The step is a list of moments: the forward's nodes, then the backward's with what is computed again right before its first
reader. A value takes its bytes from the moment that makes it to the last that reads it, one that is fused into its readers
takes none (:func:`dspass.passes.kernels.materialised` says which), and what is fused reads its inputs when its readers run::

    peak = max over moments m of  Σ bytes(v)  over values v with  made(v) <= m <= read(v)

Gathered copies live from the moment the bucket before theirs is used to their last reader, or from the forward to the backward
where they are kept; whole gradients until the bucket after theirs is full; their shards to the end.

It is a model, and leaves out what the allocator and Inductor's code do: the planner corrects it by dry runs of some choices
(:mod:`dspass.planner.dry_run`), which answer for the budget. Dropped: a dry run of each choice. It takes seconds where this
takes milliseconds, and a frontier of 24 choices would cost more than compiling.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch.fx as fx

from dspass.passes.buckets import Item, pack
from dspass.passes.kernels import fuses, is_view, size_of
from dspass.passes.nodes import GATHERED, REDUCE_GRAD
from dspass.planner.values import is_gathered
from dspass.runtime.params import ParamSpec, lookup


@dataclass(kw_only=True)
class Liveness:
    """The step of one joint graph. ``forward`` are its nodes that no gradient is needed for, in order.

    ``distance`` says how many buckets ahead gathers start, and ``gathers`` whether the backward gathers anew (ZeRO stage 3).
    """

    joint: fx.Graph
    forward: Sequence[fx.Node]
    num_fwd_outputs: int
    gathers: bool
    distance: int = 1
    _nodes: list[fx.Node] = field(default_factory=list)
    _sizes: list[int] = field(default_factory=list)
    _inputs: list[tuple[int, ...]] = field(default_factory=list)
    _alias: list[bool] = field(default_factory=list)
    _fuses: list[bool] = field(default_factory=list)
    _number: dict[fx.Node, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._nodes = [n for n in self.joint.nodes if n.op != "output"]
        self._number = {n: i for i, n in enumerate(self._nodes)}
        for node in self._nodes:
            alias = node.op == "call_function" and (is_view(node) or node.target is operator.getitem)
            self._alias.append(alias)
            self._fuses.append(fuses(node))
            self._sizes.append(0 if alias or node.op != "call_function" else size_of(node))
            self._inputs.append(tuple(self._number[a] for a in node.all_input_nodes))
        output = self.joint.find_nodes(op="output")[0]
        results = [self._number[n] if isinstance(n, fx.Node) else None for n in output.args[0]]
        self._outputs = [n for n in results[: self.num_fwd_outputs] if n is not None]
        self._gradients = [n for n in results[self.num_fwd_outputs :] if n is not None]
        inside = {self._number[n] for n in self.forward}
        self._first = sorted(inside)
        self._second = [i for i in range(len(self._nodes)) if i not in inside and self._inputs[i]]
        self._inside = inside
        self._whole = {
            i: spec
            for i, node in enumerate(self._nodes)
            if GATHERED in node.meta and is_gathered(spec := lookup(node.meta[GATHERED][0]))
        }

    def peak(
        self,
        saved: Collection[fx.Node],
        shrunk: Mapping[fx.Node, int] | None = None,
        bucket_bytes: int | None = None,
    ) -> int:
        """Bytes at the peak of forward and backward, beyond shards, states and the batch, when ``saved`` are kept, those that
        are ``shrunk`` as so many bytes between their last reader in the forward and their first in the backward, and
        collectives go in buckets of ``bucket_bytes``."""
        kept = {self._number[n] for n in saved}
        held = {self._number[n]: size for n, size in (shrunk or {}).items()}
        first = self._needed(self._outputs, kept)
        second = self._backward(kept)
        events: list[tuple[int, int, int]] = []  # from, to, bytes
        end = len(first) + len(second)
        reads_first = self._lifetimes(first, 0, {*self._outputs, *kept}, events, end, kept)
        reads_second = self._lifetimes(second, len(first), set(self._gradients), events, end, set())
        for i in kept:  # until the backward has read it
            if self._sizes[i] and i in reads_first.made:
                last = reads_second.last.get(i, len(first))
                if i not in held:
                    events.append((reads_first.made[i], last, self._sizes[i]))
                    continue
                away, back = reads_first.last.get(i, reads_first.made[i]), reads_second.first.get(i, last)
                events += [(reads_first.made[i], away, self._sizes[i]), (back, last, self._sizes[i])]
                if held[i] and back - away > 1:
                    events.append((away + 1, back - 1, held[i]))
        self._parameters(reads_first, reads_second, kept, len(first), bucket_bytes, events)
        self._reductions(second, len(first), end, bucket_bytes, events)
        return _highest(events)

    def _needed(self, outputs: Sequence[int], kept: set[int]) -> list[int]:
        """Forward nodes that run in the forward, in order."""
        found: set[int] = set()
        stack = [*outputs, *kept]
        while stack:
            i = stack.pop()
            if i not in found:
                found.add(i)
                stack.extend(self._inputs[i])
        return [i for i in self._first if i in found and self._inputs[i]]

    def _backward(self, kept: set[int]) -> list[int]:
        """Nodes that run in the backward, in order: each value computed again right before its first reader."""
        order: list[int] = []
        again: set[int] = set()

        def make(i: int) -> None:
            stack = [(i, False)]
            while stack:
                j, ready = stack.pop()
                if ready:
                    order.append(j)
                    continue
                if j in again or j in kept or j not in self._inside or not self._inputs[j]:
                    continue
                again.add(j)
                stack.append((j, True))
                stack.extend((u, False) for u in reversed(self._inputs[j]))

        for i in self._second:
            for u in self._inputs[i]:
                make(u)
            order.append(i)
        for i in self._gradients:
            make(i)
        return order

    def _lifetimes(
        self,
        sequence: Sequence[int],
        start: int,
        results: set[int],
        events: list[tuple[int, int, int]],
        end: int,
        elsewhere: set[int],
    ) -> _Reads:
        """Enter what ``sequence`` allocates, but for ``elsewhere``; answers when each value is made and last read."""
        made = {i: start + p for p, i in enumerate(sequence)}
        last: dict[int, int] = {}
        first: dict[int, int] = {}  # a view is made where it is read
        demanded: set[int] = set(results)  # in memory, for a reader that does not fuse
        for i in reversed(sequence):
            at = made[i]
            solid = not self._alias[i] and (not self._fuses[i] or i in demanded)
            reads_at = at if solid else max(last.get(i, at), at)
            for u in self._inputs[i]:
                if (
                    self._nodes[i].target is not REDUCE_GRAD
                ):  # it stands at the end; what it reads goes into a bucket before
                    last[u] = max(last.get(u, 0), reads_at)
                first[u] = min(first.get(u, at), first.get(i, at) if self._alias[i] else at)
                if i in demanded if self._alias[i] else not self._fuses[i]:
                    demanded.add(u)
        for i in sequence:
            if self._alias[i]:
                continue
            if (
                (not self._fuses[i] or i in demanded)
                and i not in elsewhere
                and self._nodes[i].target is not REDUCE_GRAD
            ):
                events.append((made[i], end if i in results else last.get(i, made[i]), self._sizes[i]))
        return _Reads(made, first, last)

    def _parameters(
        self,
        forward: _Reads,
        backward: _Reads,
        kept: set[int],
        middle: int,
        bucket_bytes: int | None,
        events: list[tuple[int, int, int]],
    ) -> None:
        """Gathered copies, by buckets, in each half; one that is kept is not gathered again."""
        again = [i for i in self._whole if i not in kept]
        for reads, whole in ((forward, list(self._whole)), (backward, again if self.gathers else [])):
            used = sorted((i for i in whole if i in reads.first), key=lambda i: reads.first[i])
            if not used:
                continue
            specs = [self._whole[i] for i in used]
            buckets = pack([_item(spec) for spec in specs], bucket_bytes)
            begins = [reads.first[used[bucket[0]]] for bucket in buckets]
            for b, bucket in enumerate(buckets):
                start = begins[b - self.distance] if b >= self.distance else min(begins)
                staged = sum(specs[j].gathered_bytes // max(_ranks(specs[j]), 1) for j in bucket if specs[j].on_host)
                events.append((start, begins[b], staged))
                for j in bucket:
                    i = used[j]
                    stays = reads is forward and (not self.gathers or i in kept)
                    until = max(backward.last.get(i, middle), reads.last[i]) if stays else reads.last[i]
                    events.append((start, until, specs[j].gathered_bytes))

    def _reductions(
        self,
        sequence: Sequence[int],
        start: int,
        end: int,
        bucket_bytes: int | None,
        events: list[tuple[int, int, int]],
    ) -> None:
        """Whole gradients wait for their bucket and for the one after it; their shards stay, or go to the host."""
        found: list[tuple[int, ParamSpec]] = []
        position = {i: start + p for p, i in enumerate(sequence)}
        for i in sequence:
            if self._nodes[i].target is REDUCE_GRAD:
                found.append((position.get(self._inputs[i][0], position[i]), lookup(str(self._nodes[i].args[1]))))
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
class _Reads:
    """Moments of one half by node: when it is made, first read and last read."""

    made: dict[int, int]
    first: dict[int, int]
    last: dict[int, int]


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
