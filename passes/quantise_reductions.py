"""Gradient reductions in few bits: ZeRO++'s qgZ (Wang et al., ZeRO++, 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.fx as fx

from dspass.passes.base import PassContext, Where
from dspass.passes.nodes import items_of, open_starts, reduce_start, specs_of, wait_of
from dspass.passes.packed import QUANTISE, SUM, QuantisingPass, item_of, nbytes, packed_values, shaped, sizes_of
from dspass.runtime.params import lookup


@dataclass(frozen=True, kw_only=True)
class QuantiseReductions(QuantisingPass):
    """A bucket's gradients become codes and scales before ``reduce_start``, which exchanges them, each rank's rows to that
    rank; behind ``reduce_wait`` the graph makes values of them, adds them in fp32 in the order of ranks, and divides by their
    number.

    So a value is rounded to few bits once, however many ranks there are; quantising around a ring would do so at each of them.
    A NaN or an infinity of any rank is a NaN in its whole block behind the sum, where loss scaling sees it.
    """

    name: ClassVar[str] = "quantise_reductions"
    requires: ClassVar[frozenset[str]] = frozenset({"reductions"})
    where: ClassVar[frozenset[Where]] = frozenset({"backward"})

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        starts = open_starts(graph, reduce_start)
        if self.format is None or not starts:
            ctx.say("switched off" if self.format is None else "no reductions here")
            return graph
        taken, left = self.taken(graph, starts, ctx, _has_replicas)
        sent = [self._quantise(graph, start, self.format) for start in taken]
        done = f"{len(taken)} of {len(starts)} reductions" + (f" as {self.smaller(sent)}" if sent else "")
        ctx.say("; ".join([done, *left]))
        return graph

    def _quantise(self, graph: fx.Graph, start: fx.Node, format: str) -> tuple[int, int]:
        """Rewrite one bucket; answers the bytes of what was sent before, and is now."""
        grads, keys, wait = start.args[0], start.args[1], wait_of(start)
        specs, items = specs_of(start), items_of(wait)
        sizes, axis = sizes_of(specs), specs[0].shard_axis
        assert axis is not None
        like = start.meta["val"][0]
        rows = packed_values(like, axis.size, sizes, format, self.block)
        with graph.inserting_before(start):
            packed = graph.call_function(QUANTISE, (list(grads), sizes, axis.size, format, self.block))
            packed.meta["val"] = tuple(rows)
            sent = [item_of(graph, packed, i, value) for i, value in enumerate(rows)]
        start.args = (sent, keys, format)
        start.meta["val"] = wait.meta["val"] = rows
        dtype = specs[0].dtype
        with graph.inserting_before(wait.next):
            arrived = [item_of(graph, wait, i, value) for i, value in enumerate(rows)]
            mean = graph.call_function(SUM, (*arrived, sizes, format, self.block, 1 / axis.size, dtype))
            mean.meta["val"] = [like.new_empty((size,), dtype=dtype) for size in sizes]
            for i, (key, item) in enumerate(zip(keys, items, strict=True)):
                if item is not None:
                    item.replace_all_uses_with(shaped(graph, mean, i, lookup(key).local_shape, item.meta))
        for item in items:
            if item is not None:
                graph.erase_node(item)
        return sum(size * axis.size * specs[0].reduce_dtype.itemsize for size in sizes), nbytes(rows)


def _has_replicas(start: fx.Node) -> str | None:
    axis = specs_of(start)[0].replicate_axis
    return "they are summed over replicas as well" if axis is not None and axis.size > 1 else None
