"""Rows that go to experts and back in few bits."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
import torch.fx as fx

from dspass.passes.base import PassContext
from dspass.passes.nodes import ROWS, even_start, is_packed, wait_of
from dspass.passes.packed import DEQUANTISE, QUANTISE, QuantisingPass, item_of, packed_values
from dspass.runtime import compat
from dspass.runtime.quantise import DTYPES, row_block, row_bytes

_aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class QuantiseExchanges(QuantisingPass):
    """Rows become codes and scales before an all-to-all of experts starts, and rows again where their first reader stands: to
    experts and back, forward and backward, dropless and of a capacity.

    Each row is quantised by itself, so that rows part at any place: a block never holds values of two. A row has as many blocks
    as ``block`` asks for, all as large as one another, and little is filled up. Whoever makes rows and whoever reads them is in
    the graph with both operators, where Inductor fuses them. Gradients are rounded as rows are: what a rank sends back for a
    row's gradient is that of the row as it arrived, and no error of the forward is differentiated.

    What rounds to more bytes than it takes whole, as one number of each row does, travels whole.

    Dropped: a limit on the error, as parameters have. A row is known only when it travels, and a graph cannot ask; the report
    says by how much the first that were sent were off. Dropped: codes and scales in one buffer, one message in place of two
    between two ranks. To join them both are written and copied once more.
    """

    name: ClassVar[str] = "quantise_exchanges"
    requires: ClassVar[frozenset[str]] = frozenset({"exchanges"})

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        starts = [n for n in graph.nodes if n.target in ROWS and not is_packed(n)]
        if self.format is None or not starts:
            ctx.say("switched off" if self.format is None else "no rows go to experts on other ranks")
            return graph
        taken, left = self.taken(graph, starts, ctx, self._why_not)
        sent = [self._quantise(graph, start, self.format) for start in taken]
        ctx.say(self.told(sent, len(starts), "all-to-alls of rows", left))
        return graph

    def _why_not(self, start: fx.Node) -> str | None:
        value, width = _rows(start).meta["val"], _width(start)
        if value.dtype not in DTYPES:
            return "they are not fp32, fp16 or bf16"
        if not isinstance(width, int):
            return "the width of a row is not known"
        if not wait_of(start).users:
            return "nobody reads them"
        if row_bytes(width, self.format or "", self.block) >= width * value.element_size():
            return "codes and scales are no smaller"
        return None

    def _quantise(self, graph: fx.Graph, start: fx.Node, format: str) -> tuple[int, int]:
        """Rewrite one exchange; answers the bytes that this rank has for it before, and now."""
        rows, wait, lead, width = _rows(start), wait_of(start), _lead(start), _width(start)
        block, before = row_block(width, self.block), rows.meta["val"]
        (item,) = wait.users
        after, meta = item.meta["val"], item.meta

        def packed(like: torch.Tensor) -> tuple[list[Any], list[torch.Tensor]]:
            """What numbers the rows of ``like``, and their codes and scales."""
            numbers = list(like.shape[:lead])
            return numbers, packed_values(like, prod(numbers), [width], format, block)

        with graph.inserting_before(start):
            numbers, values = packed(before)
            count = _times(graph, [_size(graph, rows, dim) for dim in range(lead)])
            quantised = graph.call_function(QUANTISE, ([rows], [width], count, format, block))
            quantised.meta["val"] = tuple(values)
            sent = [
                _shaped(graph, item_of(graph, quantised, i, value), [*numbers, value.shape[1]])
                for i, value in enumerate(values)
            ]
        start.args = (sent, *start.args[1:], (format, width))
        with graph.inserting_before(min(item.users)):
            numbers, values = packed(after)
            start.meta["val"] = wait.meta["val"] = [v.new_empty((*numbers, v.shape[1])) for v in values]
            arrived = [item_of(graph, wait, i, value) for i, value in enumerate(wait.meta["val"])]
            flat = [_shaped(graph, n, list(value.shape)) for n, value in zip(arrived, values, strict=True)]
            whole = graph.call_function(DEQUANTISE, (*flat, [width], format, block, after.dtype))
            whole.meta["val"] = [after.new_empty((values[0].shape[0], width))]
            result = _shaped(graph, item_of(graph, whole, 0, whole.meta["val"][0]), list(after.shape))
        result.meta = meta
        item.replace_all_uses_with(result)
        graph.erase_node(item)
        elements = compat.expected_elements(before)
        return elements * before.element_size(), elements // width * row_bytes(width, format, self.block)


def _rows(start: fx.Node) -> fx.Node:
    first: Any = start.args[0]
    (rows,) = first
    assert isinstance(rows, fx.Node)
    return rows


def _width(start: fx.Node) -> Any:
    return prod(_rows(start).meta["val"].shape[_lead(start) :])


def _lead(start: fx.Node) -> int:
    """How many dimensions number the rows: of a capacity there are those of rank, of expert and of place."""
    return 3 if start.target is even_start else 1


def _size(graph: fx.Graph, node: fx.Node, dim: int) -> Any:
    """A size of a tensor, a node where it is no number."""
    size = node.meta["val"].shape[dim]
    if isinstance(size, int):
        return size
    found = graph.call_function(_aten.sym_size.int, (node, dim))
    found.meta["val"] = size
    return found


def _times(graph: fx.Graph, sizes: list[Any]) -> Any:
    """The product of sizes, a node where one of them is."""
    product = sizes[0]
    for size in sizes[1:]:
        if isinstance(product, int) and isinstance(size, int):
            product *= size
            continue
        value = prod(s if isinstance(s, int) else s.meta["val"] for s in (product, size))
        product = graph.call_function(operator.mul, (product, size))
        product.meta["val"] = value
    return product


def _shaped(graph: fx.Graph, node: fx.Node, shape: list[Any]) -> fx.Node:
    """A contiguous value with other dimensions, of which one at most is no number."""
    value = node.meta["val"]
    if len(shape) == value.dim():
        return node
    view = graph.call_function(_aten.view.default, (node, [size if isinstance(size, int) else -1 for size in shape]))
    view.meta["val"] = value.new_empty(shape)
    return view
