"""Give fp32 products on the CPU to the library that is faster there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx

from dspass.passes.base import Pass, PassContext
from dspass.passes.nodes import HELD, calls
from dspass.runtime import linear

_PERMUTE = torch.ops.aten.permute.default


@dataclass(frozen=True, kw_only=True)
class OnednnProducts(Pass):
    """``mm`` and ``addmm`` of fp32 matrices on the CPU become ``dspass::linear``, which is oneDNN's.

    :mod:`dspass.runtime.linear` says on which CPUs that pays, and why. The left operand must lie row by row; products of
    less than ``min_operations``, where the call itself counts, and those of unknown size stay. A pass, and not a setting of
    the lowering, so that a report shows it and a person can drop it. It stands last: all others see plain products.
    """

    name: ClassVar[str] = "onednn_products"

    min_operations: int = 10**7

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        if ctx.target not in (None, "cpu"):
            ctx.say(f"nothing to do on {ctx.target}")
            return graph
        if not linear.pays():
            ctx.say("no CPU on which oneDNN is known to be faster")
            return graph
        products = [*calls(graph, torch.ops.aten.mm.default), *calls(graph, torch.ops.aten.addmm.default)]
        taken = [node for node in products if fits(node, self.min_operations)]
        for node in taken:
            _replace(graph, node)
        ctx.say(f"{len(taken)} of {len(products)} products by oneDNN")
        return graph


def fits(node: fx.Node, min_operations: int = OnednnProducts.min_operations) -> bool:
    """Whether it is a product that oneDNN is given, where that pays."""
    if node.target not in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
        return False
    *bias, left, right = (a.meta["val"] for a in node.args)
    if any(v.dtype is not torch.float32 or v.device.type != "cpu" for v in (*bias, left, right)):
        return False
    (rows, inner), columns = left.shape, right.shape[1]
    if not all(isinstance(size, int) for size in (rows, inner, columns)) or node.kwargs:
        return False
    plain = tuple(left.stride()) == (inner, 1) and all(tuple(b.shape) == (columns,) for b in bias)
    return plain and 2 * rows * inner * columns >= min_operations


def _replace(graph: fx.Graph, node: fx.Node) -> None:
    bias: list[Any]
    left: fx.Node
    right: Any
    *bias, left, right = node.args
    with graph.inserting_before(node):
        if right.target is _PERMUTE:  # of a matrix: x @ w.T, as a model's linear layer is written
            weight = right.args[0]
        else:
            weight = graph.call_function(_PERMUTE, (right, [1, 0]))
            weight.meta["val"] = right.meta["val"].t()
        new = graph.call_function(linear.LINEAR, (left, weight, bias[0] if bias else None))
    new.meta = {key: node.meta[key] for key in ("val", HELD) if key in node.meta}
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    if not right.users and right.op != "placeholder":
        graph.erase_node(right)
