"""Products read weights that are stored in few bits as they are, where that is faster (Dettmers et al., LLM.int8(), 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx
from torch.utils.checkpoint import CheckpointPolicy

from dspass.passes.base import Pass, PassContext, Where
from dspass.passes.nodes import calls
from dspass.runtime import few_bits
from dspass.runtime.few_bits import DEQUANTISE_ROWS, QUANTISED_LINEAR

_MM, _ADDMM = torch.ops.aten.mm.default, torch.ops.aten.addmm.default
_PERMUTE = torch.ops.aten.permute.default
_INDEX = torch.ops.aten.index.Tensor


@dataclass(frozen=True, kw_only=True)
class QuantisedProducts(Pass):
    """``x @ dequantise_rows(codes, scales).T`` becomes ``quantised_linear(x, codes, scales)``, and an embedding writes out only
    the rows that it is asked for.

    A weight that is written out is tagged to be written out again in the backward: codes are inputs of the step, and a saved
    weight would take what they save. It stands before the partition, so that a product which is computed again is the same
    one; gradients, ``dy @ w``, are computed with weights that are written out.

    A product is taken where somebody computes it from codes: a kernel that is registered for the device, on CPUs torch's
    own for a few rows of 16 bits with int8 weights, and ``dynamic`` ones, whose left side is rounded to int8 as well, anywhere.
    Elsewhere the weight is written out and multiplied, and the graph shows what memory that takes.

    Dropped: to take every product and let its lowering write out the weight. What is not in the graph no plan counts.
    """

    name: ClassVar[str] = "quantised_products"
    where: ClassVar[frozenset[Where]] = frozenset({"joint", "forward"})
    keeps_numbers: ClassVar[bool] = False

    dynamic: bool = False

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        weights = sorted(calls(graph, DEQUANTISE_ROWS))
        if not weights:
            ctx.say("no weight is stored in few bits")
            return graph
        gradients = _made_of_tangents(graph)
        products = embeddings = 0
        for weight in weights:
            for transposed in _transposed(weight):
                for product in [u for u in transposed.users if u not in gradients]:
                    if self._takes(product, transposed, weight, ctx):
                        _join(graph, product, weight, self.dynamic)
                        products += 1
                if not transposed.users:
                    graph.erase_node(transposed)
            for user in [u for u in weight.users if u.target is torch.ops.aten.embedding.default]:
                _look_up(graph, user, weight)
                embeddings += 1
            for node in (weight, *_transposed(weight)):
                node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
            if not weight.users:
                graph.erase_node(weight)
        left = sum(1 for weight in weights if weight.users)
        ctx.say(f"{products} products and {embeddings} embeddings read codes; weights that are written out: {left}")
        return graph

    def _takes(self, product: fx.Node, transposed: fx.Node, weight: fx.Node, ctx: PassContext) -> bool:
        if product.target not in (_MM, _ADDMM) or product.args[-1] is not transposed or product.kwargs:
            return False
        _, scales, _, format, dtype = weight.args
        x: torch.Tensor = product.args[-2].meta["val"]
        if x.dtype != dtype:
            return False
        by_row = format == "int8" and scales.meta["val"].shape[1] == 1
        device = ctx.target or x.device.type
        return (by_row and self.dynamic) or few_bits.reads_codes(x, device, by_row)


def _made_of_tangents(graph: fx.Graph) -> set[fx.Node]:
    """What a joint graph computes for the backward."""
    found = {n for n in graph.find_nodes(op="placeholder") if n.name.startswith("tangents")}
    for node in graph.nodes:
        if not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _transposed(weight: fx.Node) -> list[fx.Node]:
    return [u for u in weight.users if u.target is _PERMUTE and list(u.args[1]) == [1, 0]]


def _join(graph: fx.Graph, product: fx.Node, weight: fx.Node, dynamic: bool) -> None:
    codes, scales, columns, format, _ = weight.args
    *bias, x, _ = product.args
    with graph.inserting_before(product):
        new = graph.call_function(
            QUANTISED_LINEAR, (x, codes, scales, bias[0] if bias else None, columns, format, dynamic)
        )
    _replace(graph, product, new)


def _look_up(graph: fx.Graph, embedding: fx.Node, weight: fx.Node) -> None:
    codes, scales, columns, format, dtype = weight.args
    ids = embedding.args[1]
    with graph.inserting_before(embedding):
        found: list[fx.Node] = []
        for table in (codes, scales):
            assert isinstance(table, fx.Node)
            assert isinstance(ids, fx.Node)
            rows = graph.call_function(_INDEX, (table, [ids]))
            rows.meta["val"] = _new(table.meta["val"], (*ids.meta["val"].shape, table.meta["val"].shape[1]))
            found.append(rows)
        new = graph.call_function(DEQUANTISE_ROWS, (*found, columns, format, dtype))
    _replace(graph, embedding, new)


def _new(like: torch.Tensor, shape: tuple[Any, ...]) -> torch.Tensor:
    return like.new_empty(shape)


def _replace(graph: fx.Graph, old: fx.Node, new: fx.Node) -> None:
    new.meta = {key: old.meta[key] for key in ("val", "recompute") if key in old.meta}
    old.replace_all_uses_with(new)
    graph.erase_node(old)
