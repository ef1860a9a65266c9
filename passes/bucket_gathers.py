"""Fewer, larger gathers: neighbours in order of first use travel together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.fx as fx

from dspass.passes.base import Pass, PassContext
from dspass.passes.buckets import BucketLimit
from dspass.passes.nodes import calls, gather_start, gather_wait, merge_pairs, specs_of
from dspass.runtime.axis import Axis
from dspass.runtime.engine import Engine


@dataclass(frozen=True, kw_only=True)
class BucketGathers(Pass):
    """Join consecutive ``gather_start`` of one axis until a bucket holds ``bucket_bytes`` of whole parameters.

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
        starts = sorted(calls(graph, gather_start))
        if len(starts) < 2:
            ctx.say(f"{len(starts)} gathers: nothing to join")
            return graph
        limit = BucketLimit.choose([_bytes(s) for s in starts], self.bucket_bytes, self.max_elements)
        buckets: list[list[fx.Node]] = []
        for start in starts:
            together = [*buckets[-1], start] if buckets else []
            if (
                together
                and _kind(together[0]) == _kind(start)
                and limit.holds([_bytes(s) for s in together], [_elements(s) for s in together])
            ):
                buckets[-1].append(start)
            else:
                buckets.append([start])
        for bucket in buckets:
            if len(bucket) > 1:
                merge_pairs(graph, bucket, gather_start, gather_wait, at=bucket[0])
        ctx.say(f"{len(starts)} gathers in {len(buckets)} buckets")
        return graph


def _kind(start: fx.Node) -> tuple[Engine, Axis | None]:
    """What a bucket has in common: two models called in one graph keep their copies and counters apart."""
    spec = specs_of(start)[0]
    return spec.engine, spec.shard_axis


def _bytes(start: fx.Node) -> int:
    return sum(s.gathered_bytes for s in specs_of(start))


def _elements(start: fx.Node) -> int:
    return sum(s.numel for s in specs_of(start))
