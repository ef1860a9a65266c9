"""Fewer, larger reductions: gradients travel together, as soon as a bucket is full."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.fx as fx

from dspass.passes.base import Pass, PassContext, Where
from dspass.passes.buckets import BucketLimit
from dspass.passes.nodes import calls, merge_pairs, positions, reduce_start, reduce_wait, specs_of, wait_of


@dataclass(frozen=True, kw_only=True)
class BucketReductions(Pass):
    """Join ``reduce_start`` of one kind until a bucket holds ``bucket_bytes`` of gradients, in the order in which
    gradients become complete.

    A bucket starts behind its last gradient. It is waited for when the one ``in_flight`` buckets later starts, or at
    the end, and at once where that is 0: a gradient's whole form is freed with the wait. One that this graph goes on
    computing with travels alone, at once.
    ``max_elements`` is DeepSpeed's ``reduce_bucket_size``; without ``bucket_bytes`` the choice is ours
    (:mod:`dspass.passes.buckets`).
    """

    name: ClassVar[str] = "bucket_reductions"
    requires: ClassVar[frozenset[str]] = frozenset({"reductions"})
    where: ClassVar[frozenset[Where]] = frozenset({"backward"})

    bucket_bytes: int | None = None
    max_elements: int | None = None
    in_flight: int = 1

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        starts = sorted(calls(graph, reduce_start))
        if not starts:
            ctx.say("no reductions here")
            return graph
        output = graph.find_nodes(op="output")[0]
        limit = BucketLimit.choose([_bytes(s) for s in starts], self.bucket_bytes, self.max_elements)
        open_buckets: dict[tuple, list[fx.Node]] = {}
        buckets: list[list[fx.Node]] = []
        for start in starts:
            if any(user is not output for item in wait_of(start).users for user in item.users):
                buckets.append([start])
                continue
            spec = specs_of(start)[0]
            kind = (spec.engine, spec.layout == "shard", spec.shard_axis, spec.replicate_axis, spec.reduce_dtype)
            bucket = open_buckets.get(kind)
            joined_by = [*(bucket or ()), start]
            if bucket is None or not limit.holds([_bytes(s) for s in joined_by], [_elements(s) for s in joined_by]):
                bucket = open_buckets[kind] = []
                buckets.append(bucket)
            bucket.append(start)
        order = positions(graph)
        buckets.sort(key=lambda bucket: order[bucket[-1]])
        joined = []
        for bucket in buckets:
            at = wait_of(bucket[-1])
            joined.append(
                merge_pairs(graph, bucket, reduce_start, reduce_wait, at=at) if len(bucket) > 1 else bucket[0]
            )
        self._place_waits(graph, joined)
        ctx.say(f"{len(starts)} reductions in {len(buckets)} buckets")
        return graph

    def _place_waits(self, graph: fx.Graph, starts: list[fx.Node]) -> None:
        if self.in_flight < 1:
            return  # each wait stands behind its start already
        output = graph.find_nodes(op="output")[0]
        for i, start in enumerate(starts):
            wait = wait_of(start)
            later = starts[i + self.in_flight] if i + self.in_flight < len(starts) else output
            group = [wait, *sorted(wait.users)]
            if any(user not in group and user is not output for item in group for user in item.users):
                continue  # a gradient is used further in this graph
            for node in group:
                later.prepend(node)


def _bytes(start: fx.Node) -> int:
    return sum(s.reduced_bytes for s in specs_of(start))


def _elements(start: fx.Node) -> int:
    return sum(s.numel for s in specs_of(start))
