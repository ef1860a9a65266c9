"""Values that are rounded while they train are rounded once, however many layers ask for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.fx as fx
from torch.utils.checkpoint import CheckpointPolicy

from dspass.passes.base import Pass, PassContext, Where
from dspass.passes.nodes import calls
from dspass.passes.partition import made_of_parameters
from dspass.runtime.fake_quantise import FAKE_QUANTISE, LEVELS
from dspass.runtime.params import lookup


@dataclass(frozen=True, kw_only=True)
class ShareRoundings(Pass):
    """Equal ``fake_quantise(%x, %levels, ...)`` become the first of them, and ``levels`` of one schedule one at the top.

    A captured graph rounds what each layer reads, for each layer (:mod:`dspass.fake_quantising`): a query, a key and a value
    projection round one input three times, and tied layers one weight twice. At the top ``levels`` lies in no block of the
    model, so that equal blocks stay equal to whoever compiles them.

    A rounded parameter is tagged to be rounded again in the backward, where it is gathered anyway: to save it would take what
    ZeRO frees. A rounded activation is a value as any other, for the partitioner to save or not.
    """

    name: ClassVar[str] = "share_roundings"
    requires: ClassVar[frozenset[str]] = frozenset({"exposed parameters"})
    where: ClassVar[frozenset[Where]] = frozenset({"joint", "forward"})

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        all_levels, roundings = sorted(calls(graph, LEVELS)), sorted(calls(graph, FAKE_QUANTISE))
        if not roundings:
            ctx.say("nothing is rounded while it trains")
            return graph
        last_input = graph.find_nodes(op="placeholder")[-1]
        schedules: dict[Any, fx.Node] = {}
        for levels in all_levels:
            key, *schedule = levels.args
            assert isinstance(key, str)
            first = schedules.setdefault((lookup(key).engine, *schedule), levels)
            if first is not levels:
                _replace(graph, levels, first)
        for levels in reversed(schedules.values()):
            last_input.append(levels)
        seen: dict[Any, fx.Node] = {}
        for rounding in roundings:
            x, levels, over, *symmetric = rounding.args
            first = seen.setdefault((x, levels, tuple(over), *symmetric), rounding)
            if first is not rounding:
                _replace(graph, rounding, first)
        parameters = [rounding for rounding in seen.values() if made_of_parameters(rounding)]
        for rounding in parameters:
            rounding.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
        ctx.say(
            f"{len(parameters)} parameters and {len(seen) - len(parameters)} activations are rounded, "
            f"each once instead of {len(roundings)} times in all"
            if len(seen) < len(roundings)
            else f"{len(parameters)} parameters and {len(seen) - len(parameters)} activations are rounded"
        )
        return graph


def _replace(graph: fx.Graph, old: fx.Node, new: fx.Node) -> None:
    old.replace_all_uses_with(new)
    graph.erase_node(old)
