"""A router's auxiliary loss over the tokens of all ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx

from dspass.passes.base import Pass, PassContext, Where
from dspass.passes.experts import name_of
from dspass.runtime.params import lookup

_ops = torch.ops.dspass

#: What counts tokens of each expert: from their numbers, or from a mask with a place for each.
_COUNTS = {"histc", "bincount"}
_MASKS = {"one_hot"}
_SUMS = {"sum", "mean"}
#: What counts may go through and still be counts: shares of them, those of several layers together.
_KEEPS = {
    "add", "iadd", "add_", "truediv", "itruediv", "div", "div_", "mul_", "unsqueeze", "to", "float", "type", "reshape", "view",
    "flatten", "permute", "transpose", "stack", "cat", "sum", "mean",
}  # fmt: skip
_TIMES = {"mul", "imul", "mul_", "matmul", "dot", "einsum"}


@dataclass(frozen=True, kw_only=True)
class GlobalAuxLoss(Pass):
    """The shares of tokens that go to each expert, where a loss multiplies them with the router's probabilities, become their
    mean over ranks: with as many tokens on each rank the loss is that of the whole batch (Switch Transformer's balance loss is
    ``sum(share * probability)``, and only the product of sums over all tokens asks for balance over all of them; Qiu et al.,
    Demons in the Detail, 2025). Probabilities stay a rank's own: gradients are averaged over ranks anyway.

    It works on the graph as Dynamo captured it, where counts are still a histogram or a one-hot mask.
    """

    name: ClassVar[str] = "global_aux_loss"
    where: ClassVar[frozenset[Where]] = frozenset({"captured"})
    keeps_numbers: ClassVar[bool] = False

    enabled: bool = False

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        if not self.enabled:
            ctx.say("each rank's auxiliary loss is of its own tokens")
            return graph
        shares = dict.fromkeys(last for node in graph.nodes if _counts(node) for last in _shares_of(node))
        key = next((k for k in _keys(graph) if lookup(k).expert_axis is None), None)
        if not shares or key is None:
            ctx.say("no auxiliary loss of counted tokens is here")
            return graph
        for share in shares:
            readers = [user for user in share.users if name_of(user) in _TIMES]
            with graph.inserting_before(min(readers)):
                mean = graph.call_function(_ops.mean_over_ranks, (share, key))
            for reader in readers:
                reader.replace_input_with(share, mean)
        ctx.say(f"{len(shares)} shares of tokens are averaged over ranks")
        return graph


def _counts(node: fx.Node) -> bool:
    if name_of(node) in _COUNTS:
        return True
    source: Any = node.args[0] if node.args else None
    while isinstance(source, fx.Node) and name_of(source) in ("to", "float", "type"):
        source = source.args[0]
    return name_of(node) in _SUMS and isinstance(source, fx.Node) and name_of(source) in _MASKS


def _shares_of(counts: fx.Node) -> list[fx.Node]:
    """Where the counts, or what is made of them alone, meet something in a product."""
    found, todo, seen = [], [counts], {counts}
    while todo:
        node = todo.pop()
        for user in node.users:
            name = name_of(user)
            others = [a for a in user.args if isinstance(a, fx.Node) and a is not node]
            if name in _TIMES and others:
                found.append(node)
            elif (name in _KEEPS or name in _TIMES) and user not in seen:
                seen.add(user)
                todo.append(user)
    return found


def _keys(graph: fx.Graph) -> list[str]:
    return [n.args[1] for n in graph.nodes if n.target in (_ops.unshard, _ops.unshard.default)]
