"""Products read weights that are stored in few bits as they are, where that is faster (Dettmers et al., LLM.int8(), 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

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

    A product is taken where somebody computes it from codes: up to 16 rows by a kernel that is registered for the device, on
    CPUs torch's own for a few rows of 16 bits with int8 weights, and ``dynamic`` ones, whose left side is rounded to int8 as
    well, where torch multiplies integers of these sizes. Elsewhere the weight is written out and multiplied, and the graph
    shows what memory that takes.

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
                    products += self._join(graph, product, transposed, weight, ctx)
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

    def _join(self, graph: fx.Graph, product: fx.Node, transposed: fx.Node, weight: fx.Node, ctx: PassContext) -> bool:
        """Whether ``product``, a user of ``transposed``, reads codes from now on."""
        if product.target not in (_MM, _ADDMM) or product.args[-1] is not transposed or product.kwargs:
            return False
        codes, scales, columns, format, dtype = weight.args
        *bias, x, _ = product.args
        value, all_codes, all_scales = (n.meta["val"] for n in (x, codes, scales))
        device = ctx.target or value.device.type
        dynamic = self.dynamic and few_bits.rounds_both(value, all_codes, all_scales, device, format)
        if value.dtype != dtype or not (dynamic or few_bits.reads_codes(value, all_scales, device, format)):
            return False
        with graph.inserting_before(product):
            args = (x, codes, scales, bias[0] if bias else None, columns, format, dynamic)
            _replace(graph, product, graph.call_function(QUANTISED_LINEAR, args))
        return True


def _made_of_tangents(graph: fx.Graph) -> set[fx.Node]:
    """What a joint graph computes for the backward."""
    found = {n for n in graph.find_nodes(op="placeholder") if n.name.startswith("tangents")}
    for node in graph.nodes:
        if not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _transposed(weight: fx.Node) -> list[fx.Node]:
    return [u for u in weight.users if u.target is _PERMUTE and list(u.args[1]) == [1, 0]]


def _look_up(graph: fx.Graph, embedding: fx.Node, weight: fx.Node) -> None:
    codes, scales, columns, format, dtype = weight.args
    ids = embedding.args[1]
    with graph.inserting_before(embedding):
        found: list[fx.Node] = []
        for table in (codes, scales):
            assert isinstance(table, fx.Node)
            assert isinstance(ids, fx.Node)
            rows = graph.call_function(_INDEX, (table, [ids]))
            value = table.meta["val"]
            rows.meta["val"] = value.new_empty((*ids.meta["val"].shape, value.shape[1]))
            found.append(rows)
        new = graph.call_function(DEQUANTISE_ROWS, (*found, columns, format, dtype))
    _replace(graph, embedding, new)


def _replace(graph: fx.Graph, old: fx.Node, new: fx.Node) -> None:
    new.meta = {key: old.meta[key] for key in ("val", "recompute") if key in old.meta}
    old.replace_all_uses_with(new)
    graph.erase_node(old)
