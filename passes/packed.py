"""What the passes that quantise collectives share: which they take, and the sizes of what is packed."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Literal

import torch
import torch.fx as fx

from dspass.passes import devices
from dspass.passes.base import Pass, PassContext
from dspass.passes.cost import estimate
from dspass.passes.nodes import ROWS_EXPECTED
from dspass.runtime import compat
from dspass.runtime.formats import check_block, format_of
from dspass.runtime.params import ParamSpec
from dspass.runtime.quantise import DTYPES, blocks_of

Buckets = Literal["exposed", "all"]

QUANTISE = torch.ops.dspass.quantise_bucket.default
COMPENSATE = torch.ops.dspass.compensated_bucket.default
DEQUANTISE = torch.ops.dspass.dequantise_bucket.default
SUM = torch.ops.dspass.dequantise_sum.default


@dataclass(frozen=True, kw_only=True)
class QuantisingPass(Pass):
    """``format`` None switches it off. Blocks are of ``block`` values. With ``buckets`` "exposed" only those are quantised that
    compute does not hide, by the cost model; on a device that computes or sends, as a CPU, these are all."""

    keeps_numbers: ClassVar[bool] = False

    format: str | None = None
    block: int = 256
    buckets: Buckets = "exposed"

    def __post_init__(self) -> None:
        if self.format is not None:
            format_of(self.format)
        check_block(self.block)

    def taken(
        self,
        graph: fx.Graph,
        starts: Sequence[fx.Node],
        ctx: PassContext,
        why_not: Callable[[fx.Node], str | None],
    ) -> tuple[list[fx.Node], list[str]]:
        """Those of ``starts`` that are to be quantised, and in words how many others are not, and why."""
        exposed = _exposed(graph, ctx) if self.buckets == "exposed" else None
        taken: list[fx.Node] = []
        left: dict[str, int] = {}
        for start in starts:
            reason = why_not(start)
            if reason is None and exposed is not None and start not in exposed:
                reason = "compute hides them"
            if reason is None:
                taken.append(start)
            else:
                left[reason] = left.get(reason, 0) + 1
        return taken, [f"{count} not: {reason}" for reason, count in left.items()]

    def told(self, sent: Sequence[tuple[int, int]], count: int, what: str, left: Sequence[str]) -> str:
        """For the report: how many of ``count`` were taken, with the bytes of one rank's buffers before and now, and who was
        ``left``."""
        done = f"{len(sent)} of {count} {what}"
        if sent:
            before, after = (sum(column) for column in zip(*sent, strict=True))
            done += f" as {self.format} in blocks of {self.block}, {after / before:.2f} of their bytes"
        return "; ".join([done, *left])

    def packed(
        self,
        graph: fx.Graph,
        tensors: Sequence[fx.Node],
        sizes: Sequence[int],
        rows: Sequence[torch.Tensor],
        nodes: int = 1,
        compensation: tuple[list[fx.Node], float] | None = None,
    ) -> list[fx.Node]:
        """Nodes of the codes and of the scales of ``tensors``, which are ``rows``, at the graph's insertion point; with
        ``compensation``, of their errors and the share of these that stays."""
        swizzle = (nodes,) if nodes > 1 else ()
        args = (list(tensors), list(sizes), rows[0].shape[0], self.format, self.block, *(compensation or ()), *swizzle)
        packed = graph.call_function(QUANTISE if compensation is None else COMPENSATE, args)
        packed.meta["val"] = tuple(rows)
        return [item_of(graph, packed, i, value) for i, value in enumerate(rows)]


def sizes_of(specs: Sequence[ParamSpec]) -> list[int]:
    """Of each parameter of a bucket the elements that one rank holds, where rows are filled up to be even."""
    found = []
    for spec in specs:
        assert spec.shard_axis is not None
        found.append(spec.shard_axis.padded_rows(spec.shape[0]) // spec.shard_axis.size * prod(spec.shape[1:]))
    return found


def packed_values(like: torch.Tensor, rows: int, sizes: Sequence[int], format: str, block: int) -> list[torch.Tensor]:
    """Codes and scales of ``rows`` ranks, as fake as ``like``."""
    count = sum(blocks_of(size, block) for size in sizes)
    return [
        like.new_empty((rows, count * format_of(format).code_bytes(block)), dtype=torch.uint8),
        like.new_empty((rows, count), dtype=torch.float32),
    ]


def item_of(graph: fx.Graph, source: fx.Node, index: int, value: torch.Tensor) -> fx.Node:
    """Result ``index`` of ``source``, at the graph's insertion point."""
    item = graph.call_function(operator.getitem, (source, index))
    item.meta["val"] = value
    return item


def view_of(graph: fx.Graph, source: fx.Node, value: torch.Tensor) -> fx.Node:
    """``source`` as a view that has the shape of ``value``, a matrix."""
    view = graph.call_function(torch.ops.aten.view.default, (source, [value.shape[0], -1]))
    view.meta["val"] = value
    return view


def shaped(graph: fx.Graph, source: fx.Node, index: int, shape: Sequence[int], meta: dict[str, Any]) -> fx.Node:
    """The tensor of ``shape``, described by ``meta``, that result ``index`` of ``source`` begins with. Ranks fill their rows in
    order, so that what was filled up to be even stands at the end."""
    node = item_of(graph, source, index, source.meta["val"][index])
    flat, count, chain = node.meta["val"].view(-1), prod(shape), []
    if count != flat.shape[0]:
        chain = [
            (torch.ops.aten.view.default, ([-1],), flat),
            (torch.ops.aten.slice.Tensor, (0, 0, count), flat[:count]),
        ]
    chain.append((torch.ops.aten.view.default, (list(shape),), meta["val"]))
    for target, args, value in chain:
        node = graph.call_function(target, (node, *args))
        node.meta["val"] = value
    node.meta = dict(meta)
    return node


def nbytes(values: Sequence[Any]) -> int:
    return sum(v.numel() * v.element_size() for v in values)


def impossible(specs: Sequence[ParamSpec]) -> str | None:
    """Why a bucket cannot travel quantised; None where it can."""
    first = specs[0]
    if first.layout != "shard" or first.shard_axis is None or first.shard_axis.size == 1:
        return "they are held whole"
    if any(dtype not in DTYPES for spec in specs for dtype in (spec.dtype, spec.compute_dtype)):
        return "they are not all fp32, fp16 or bf16"
    if first.engine.stage != 3:
        return f"ZeRO stage {first.engine.stage} keeps whole copies"
    return None


def _exposed(graph: fx.Graph, ctx: PassContext) -> set[fx.Node] | None:
    """Nodes that start what is waited for; None where that is everything, or cannot be known. Rows of experts are supposed to
    be as many as are expected."""
    on = devices.of_graph(graph, ctx.target)
    if not on.overlaps:
        return None
    owner = graph.owning_module
    sized = compat.as_expected(owner, ROWS_EXPECTED) if owner is not None and owner.graph is graph else None
    known = graph if sized is None else sized.graph
    if any(isinstance(n.meta.get("val"), torch.SymInt) for n in known.nodes):
        return None
    waits = {node.name for node, seconds in estimate(known, on).waits.items() if seconds > 0}
    return {node for node in graph.nodes if node.name in waits}
