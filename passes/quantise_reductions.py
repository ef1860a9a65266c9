"""Gradient reductions in few bits: ZeRO++'s qgZ (Wang et al., ZeRO++, 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.fx as fx

from dspass.passes.base import PassContext, Where
from dspass.passes.nodes import items_of, open_starts, reduce_start, reduce_wait, rounding_errors, specs_of, wait_of
from dspass.passes.packed import (
    SUM,
    QuantisingPass,
    impossible,
    item_of,
    nbytes,
    packed_values,
    shaped,
    sizes_of,
    view_of,
)
from dspass.runtime.params import lookup


@dataclass(frozen=True, kw_only=True)
class QuantiseReductions(QuantisingPass):
    """A bucket's gradients become codes and scales before ``reduce_start``, which exchanges them, each rank's rows to that
    rank; behind ``reduce_wait`` the graph makes values of them, adds them in fp32 in the order of ranks, and divides by their
    number.

    So a value is rounded to few bits once, however many ranks there are; quantising around a ring would do so at each of them.
    Where there are nodes (``zero_hpz_partition_size``) it is rounded twice: gradients are summed inside of the node first, and
    only their sums, divided over its ranks, go across. Chunks stand in the order that this needs from the start, which is
    ZeRO++'s swizzle.
    A NaN or an infinity of any rank is a NaN in its whole block behind the sum, where loss scaling sees it.

    With ``error_beta`` each rank keeps what rounding its own gradients loses, two bytes a value of whole parameters, and adds
    it to them the next time, so that it arrives later (``dspass::compensated_bucket``). The graph reads the errors at its
    begin, which costs nothing, and the operator that rounds replaces them in place. ``error_reset`` steps apart they become
    zeros. Of the sums of nodes the second rounding is not compensated. A plan for a model with graph breaks counts only the
    errors of the graph that it is for.

    Dropped: errors as inputs and outputs of the graph, which AOTAutograd has fixed when passes run. Dropped: to add the error
    in front of ``quantise_bucket`` and to dequantise its codes behind it, which goes over the bucket three times.
    """

    name: ClassVar[str] = "quantise_reductions"
    requires: ClassVar[frozenset[str]] = frozenset({"reductions"})
    where: ClassVar[frozenset[Where]] = frozenset({"backward"})

    error_beta: float | None = None
    error_reset: int | None = None

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        starts = open_starts(graph, reduce_start)
        if self.format is None or not starts:
            ctx.say("switched off" if self.format is None else "no reductions here")
            return graph
        taken, left = self.taken(graph, starts, ctx, _why_not)
        ends = [wait_of(start) for start in taken[1:]] + graph.find_nodes(op="output")
        sent = [self._quantise(graph, start, self.format, end) for start, end in zip(taken, ends, strict=False)]
        ctx.say(self.told(sent, len(starts), "reductions", left) + self._told_of_errors(taken))
        return graph

    def _told_of_errors(self, taken: Sequence[fx.Node]) -> str:
        if self.error_beta is None or not taken:
            return ""
        return f"; {sum(spec.padded_numel for start in taken for spec in specs_of(start)):,} errors kept, as bf16"

    def _quantise(self, graph: fx.Graph, start: fx.Node, format: str, later: fx.Node) -> tuple[int, int]:
        """Rewrite one bucket, whose second step, if there is one, ends before ``later``; answers the bytes of what was sent
        before, and is now."""
        grads, keys, wait = start.args[0], start.args[1], wait_of(start)
        specs, items, like = specs_of(start), items_of(wait), start.meta["val"][0]
        sizes, world = sizes_of(specs), specs[0].axis(None).size
        node, across = specs[0].node_axis, specs[0].across_axis
        nodes = across.size if node is not None and across is not None and node.size > 1 else 1
        rows = packed_values(like, world, sizes, format, self.block)
        with graph.inserting_before(start):
            sent = self.packed(graph, grads, sizes, rows, nodes, self._compensation(graph, keys, sizes, rows[0]))
            if nodes > 1:
                rows = [value.view(world // nodes, -1) for value in rows]
                sent = [view_of(graph, one, value) for one, value in zip(sent, rows, strict=True)]
        start.args = (sent, keys, format, *(["node"] if nodes > 1 else []))
        start.meta["val"] = wait.meta["val"] = rows
        place, count = wait.next, nbytes(rows)
        if nodes > 1:
            with graph.inserting_before(place):
                sums = self._sum(graph, wait, sizes * nodes, format, 1.0, torch.float32)
                parts = [item_of(graph, sums, i, value) for i, value in enumerate(sums.meta["val"])]
                joined = [_joined(graph, parts[i :: len(sizes)]) for i in range(len(sizes))]
                rows = packed_values(like, nodes, sizes, format, self.block)
                sent = self.packed(graph, joined, sizes, rows)
                second = graph.call_function(reduce_start, (sent, keys, format, "across"))
            # Before the next bucket's: nothing is waited for right behind its start.
            is_free = all(user.op == "output" for item in items if item is not None for user in item.users)
            with graph.inserting_before(later if is_free else place):
                wait = graph.call_function(reduce_wait, (second,))
            second.meta["val"] = wait.meta["val"] = rows
            place, count = wait.next, count + nbytes(rows)
        with graph.inserting_before(place):
            mean = self._sum(graph, wait, sizes, format, 1 / world, specs[0].dtype)
            for i, (key, item) in enumerate(zip(keys, items, strict=True)):
                if item is not None:
                    item.replace_all_uses_with(shaped(graph, mean, i, lookup(key).local_shape, item.meta))
        for item in items:
            if item is not None:
                graph.erase_node(item)
        return sum(size * world * specs[0].reduce_dtype.itemsize for size in sizes), count

    def _compensation(
        self, graph: fx.Graph, keys: Sequence[str], sizes: Sequence[int], codes: torch.Tensor
    ) -> tuple[list[fx.Node], float] | None:
        """The errors of a bucket's gradients, read in front of all that is computed, where no segment is cut for them."""
        if self.error_beta is None:
            return None
        with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
            reset = () if self.error_reset is None else (self.error_reset,)
            found = graph.call_function(rounding_errors, ([], list(keys), *reset))
            found.meta["val"] = [codes.new_empty((codes.shape[0], size), dtype=torch.bfloat16) for size in sizes]
            return [item_of(graph, found, i, value) for i, value in enumerate(found.meta["val"])], self.error_beta

    def _sum(
        self, graph: fx.Graph, wait: fx.Node, sizes: list[int], format: str, factor: float, dtype: torch.dtype
    ) -> fx.Node:
        """Of what has arrived the sums over ranks, times ``factor``."""
        values = wait.meta["val"]
        arrived = [item_of(graph, wait, i, value) for i, value in enumerate(values)]
        sums = graph.call_function(SUM, (*arrived, sizes, format, self.block, factor, dtype))
        sums.meta["val"] = [values[1].new_empty((size,), dtype=dtype) for size in sizes]
        return sums


def _joined(graph: fx.Graph, parts: list[fx.Node]) -> fx.Node:
    """Of one gradient what goes to each node, one after another."""
    joined = graph.call_function(torch.ops.aten.cat.default, (parts,))
    joined.meta["val"] = torch.cat([part.meta["val"] for part in parts])
    return joined


def _why_not(start: fx.Node) -> str | None:
    axis = specs_of(start)[0].replicate_axis
    has_replicas = axis is not None and axis.size > 1
    if specs_of(start)[0].engine.keeps_for_call:
        return "they are reduced once for all micro-batches of a call"
    return impossible(specs_of(start)) or ("they are summed over replicas as well" if has_replicas else None)
