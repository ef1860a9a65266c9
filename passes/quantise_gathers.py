"""Parameter gathers in few bits: ZeRO++'s qwZ (Wang et al., ZeRO++, 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.fx as fx

from dspass.passes.base import PassContext
from dspass.passes.nodes import gather_start, items_of, open_starts, specs_of, wait_of
from dspass.passes.packed import (
    DEQUANTISE,
    QuantisingPass,
    impossible,
    item_of,
    nbytes,
    packed_values,
    shaped,
    sizes_of,
)
from dspass.runtime.params import lookup


@dataclass(frozen=True, kw_only=True)
class QuantiseGathers(QuantisingPass):
    """A bucket's shards become codes and scales before ``gather_start``, and parameters again behind ``gather_wait``.

    Shards are quantised as they are, an fp32 one not through bf16. Both operators go over their bucket once: they pack it and
    unpack it in any case. The forward and the backward gather the same codes, so both compute with the same weights.
    A bucket of which one parameter's measured relative error, ``|dequantised - p| / |p|``, is above ``max_relative_error``
    travels as it is.

    Dropped: quantising inside of the collective's call, as DeepSpeed does. The cost model, the peak and the report would not
    see it, and Inductor could not fuse it.
    """

    name: ClassVar[str] = "quantise_gathers"
    requires: ClassVar[frozenset[str]] = frozenset({"gathers"})

    max_relative_error: float | None = None

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        starts = open_starts(graph, gather_start)
        if self.format is None or not starts:
            ctx.say("switched off" if self.format is None else "no gathers here")
            return graph
        taken, left = self.taken(graph, starts, ctx, self._why_not)
        sent = [self._quantise(graph, start, self.format) for start in taken]
        ctx.say(self.told(sent, len(starts), "gathers", left))
        return graph

    def _why_not(self, start: fx.Node) -> str | None:
        reason = impossible(specs_of(start))
        if self.max_relative_error is None or reason is not None:
            return reason
        errors = [spec.engine.quantised_errors.get(spec.key, 0.0) for spec in specs_of(start)]
        return "beyond max_relative_error" if max(errors) > self.max_relative_error else None

    def _quantise(self, graph: fx.Graph, start: fx.Node, format: str) -> tuple[int, int]:
        """Rewrite one bucket; answers what this rank sent to each other one before, and sends now."""
        shards, keys, wait = start.args[0], start.args[1], wait_of(start)
        specs, items = specs_of(start), items_of(wait)
        sizes, axis = sizes_of(specs), specs[0].shard_axis
        assert axis is not None
        like = start.meta["val"][0]
        one, all_ranks = (packed_values(like, rows, sizes, format, self.block) for rows in (1, axis.size))
        with graph.inserting_before(start):
            sent = self.packed(graph, shards, sizes, one)
        start.args = (sent, keys, format)
        start.meta["val"] = wait.meta["val"] = all_ranks
        dtype = specs[0].compute_dtype
        with graph.inserting_before(wait.next):
            arrived = [item_of(graph, wait, i, value) for i, value in enumerate(all_ranks)]
            whole = graph.call_function(DEQUANTISE, (*arrived, sizes, format, self.block, dtype))
            whole.meta["val"] = [like.new_empty((axis.size, size), dtype=dtype) for size in sizes]
            for i, (key, item) in enumerate(zip(keys, items, strict=True)):
                if item is not None:
                    item.replace_all_uses_with(shaped(graph, whole, i, lookup(key).shape, item.meta))
        for item in items:
            if item is not None:
                graph.erase_node(item)
        return sum(size * dtype.itemsize for size in sizes), nbytes(one)
