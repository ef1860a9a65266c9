"""Fewer, larger gathers: neighbours in order of first use travel together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.fx as fx

from dspass.passes.base import Pass, PassContext
from dspass.passes.nodes import calls, gather_start, gather_wait, merge_pairs, specs_of


@dataclass(frozen=True, kw_only=True)
class BucketGathers(Pass):
    """Join consecutive ``gather_start`` of one axis until a bucket holds ``bucket_bytes`` of whole parameters.

    ``max_elements`` is DeepSpeed's ``stage3_prefetch_bucket_size``, an upper limit in elements. A parameter larger than a
    limit travels alone. The bucket stands where its first parameter is needed, so that none is late.
    """

    name: ClassVar[str] = "bucket_gathers"
    requires: ClassVar[frozenset[str]] = frozenset({"gathers"})
    provides: ClassVar[frozenset[str]] = frozenset({"bucketed gathers"})

    bucket_bytes: int = 16_000_000
    max_elements: int | None = None

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        starts = sorted(calls(graph, gather_start))
        if len(starts) < 2:
            ctx.say(f"{len(starts)} gathers: nothing to join")
            return graph
        buckets: list[list[fx.Node]] = []
        for start in starts:
            if buckets and self._fits(buckets[-1], start):
                buckets[-1].append(start)
            else:
                buckets.append([start])
        for bucket in buckets:
            if len(bucket) > 1:
                merge_pairs(graph, bucket, gather_start, gather_wait, at=bucket[0])
        ctx.say(f"{len(starts)} gathers in {len(buckets)} buckets")
        return graph

    def _fits(self, bucket: list[fx.Node], start: fx.Node) -> bool:
        specs = [s for node in (*bucket, start) for s in specs_of(node)]
        if specs[-1].shard_axis is not specs[0].shard_axis:
            return False
        if self.max_elements is not None and sum(s.numel for s in specs) > self.max_elements:
            return False
        return sum(s.gathered_bytes for s in specs) <= self.bucket_bytes


