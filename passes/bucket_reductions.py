"""Fewer, larger reductions: gradients travel together, as soon as a bucket is full."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import torch.fx as fx

from dspass.passes.base import Pass, PassContext, Where
from dspass.passes.buckets import Item, pack
from dspass.passes.nodes import merge_pairs, open_starts, positions, reduce_start, reduce_wait, specs_of, wait_of


@dataclass(frozen=True, kw_only=True)
class BucketReductions(Pass):
    """Join ``reduce_start`` of one kind into buckets of whole blocks, of at most ``bucket_bytes``, in the order in which
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
        starts = open_starts(graph, reduce_start)
        if not starts:
            ctx.say("no reductions here")
            return graph
        output = graph.find_nodes(op="output")[0]
        buckets: list[list[fx.Node]] = []
        kinds: dict[Hashable, list[fx.Node]] = {}
        for start in starts:
            if any(user is not output for item in wait_of(start).users for user in item.users):
                buckets.append([start])
            else:
                kinds.setdefault(_item(start).kind, []).append(start)
        for alike in kinds.values():
            packed = pack([_item(start) for start in alike], self.bucket_bytes, self.max_elements)
            buckets += [[alike[i] for i in bucket] for bucket in packed]
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


def _item(start: fx.Node) -> Item:
    specs = specs_of(start)
    first = specs[0]
    kind = (first.engine, first.layout == "shard", first.shard_axis, first.replicate_axis, first.reduce_dtype)
    return Item(tuple(s.name for s in specs), tuple(s.reduced_bytes for s in specs), sum(s.numel for s in specs), kind)
