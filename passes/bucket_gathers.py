"""Fewer, larger gathers: neighbours in order of first use travel together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.fx as fx

from dspass.passes.base import Pass, PassContext
from dspass.passes.buckets import Item, pack
from dspass.passes.nodes import gather_start, gather_wait, merge_pairs, open_starts, specs_of


@dataclass(frozen=True, kw_only=True)
class BucketGathers(Pass):
    """Join consecutive ``gather_start`` of one axis into buckets of whole blocks, of at most ``bucket_bytes``.

    ``max_elements`` is DeepSpeed's ``stage3_prefetch_bucket_size``, an upper limit in elements. A parameter larger than a
    limit travels alone; without ``bucket_bytes`` the choice is ours (:mod:`dspass.passes.buckets`).
    The bucket stands where its first parameter is needed, so that none is late.
    """

    name: ClassVar[str] = "bucket_gathers"
    requires: ClassVar[frozenset[str]] = frozenset({"gathers"})
    provides: ClassVar[frozenset[str]] = frozenset({"bucketed gathers"})

    bucket_bytes: int | None = None
    max_elements: int | None = None

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        starts = open_starts(graph, gather_start)
        if len(starts) < 2:
            ctx.say(f"{len(starts)} gathers: nothing to join")
            return graph
        packed = pack([_item(start) for start in starts], self.bucket_bytes, self.max_elements)
        buckets = [[starts[i] for i in bucket] for bucket in packed]
        for bucket in buckets:
            if len(bucket) > 1:
                merge_pairs(graph, bucket, gather_start, gather_wait, at=bucket[0])
        ctx.say(f"{len(starts)} gathers in {len(buckets)} buckets")
        return graph


def _item(start: fx.Node) -> Item:
    specs = specs_of(start)
    # Two models called in one graph keep their copies and counters apart.
    kind = (specs[0].engine, specs[0].shard_axis)
    return Item(tuple(s.name for s in specs), tuple(s.gathered_bytes for s in specs), sum(s.numel for s in specs), kind)
