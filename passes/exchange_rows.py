"""Expert parallelism's exchanges as starts and waits."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx

from dspass.passes.base import Pass, PassContext
from dspass.passes.nodes import (
    ROWS,
    combine_start,
    counts_start,
    dispatch_start,
    even_start,
    exchange_wait,
    mean_start,
)
from dspass.runtime.exchange import COMBINE, COUNTS, DISPATCH, EVEN, MEAN

#: Of each marker what begins it, and which of its arguments that takes: the first of rows in a list, for a pass may divide it
#: into codes and scales.
_STARTS: dict[Any, tuple[Callable[..., Any], tuple[int, ...]]] = {
    COUNTS: (counts_start, (0, 1, 2, 3, 4)),
    DISPATCH: (dispatch_start, (0, 1, 3)),
    COMBINE: (combine_start, (0, 1, 2, 3)),
    MEAN: (mean_start, (0, 1)),
    EVEN: (even_start, (0, 1, 2, 3, 4)),
}


@dataclass(frozen=True, kw_only=True)
class ExchangeRows(Pass):
    """``exchange_counts``, ``dispatch_rows``, ``combine_rows``, ``exchange_even`` and ``mean_over_ranks`` become a start,
    behind what it sends, and a wait and its items before their first reader: what stands between runs meanwhile, other chunks
    for one. Ranks start theirs in one order, that of the graph that they share."""

    name: ClassVar[str] = "exchange_rows"
    provides: ClassVar[frozenset[str]] = frozenset({"exchanges"})

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        markers = [n for n in graph.nodes if n.op == "call_function" and n.target in _STARTS]
        for marker in markers:
            begin, places = _STARTS[marker.target]
            value = marker.meta["val"]
            last = max(marker.all_input_nodes)
            with graph.inserting_before(last.next if last.op != "placeholder" else _first_call(graph)):
                first, *others = (marker.args[i] for i in places)
                start = graph.call_function(begin, ([first] if begin in ROWS else first, *others))
            with graph.inserting_before(_first_use(marker, start)):
                wait = graph.call_function(exchange_wait, (start,))
            if isinstance(value, torch.Tensor):
                start.meta["val"] = wait.meta["val"] = [value]
                with graph.inserting_before(wait.next):
                    item = graph.call_function(operator.getitem, (wait, 0))
                item.meta.update(marker.meta)
                marker.replace_all_uses_with(item)
            else:  # its own items are the wait's
                start.meta["val"] = wait.meta["val"] = list(value)
                for item in reversed(list(marker.users)):
                    wait.append(item)
                marker.replace_all_uses_with(wait)
            graph.erase_node(marker)
        rows = sum(m.target in (DISPATCH, COMBINE) for m in markers)
        ctx.say(f"{rows} all-to-all{'s' * (rows != 1)} of rows" if markers else "no rows go to experts on other ranks")
        return graph


def _first_use(marker: fx.Node, start: fx.Node) -> fx.Node:
    """Before which node the wait stands: the first reader, and of what comes in items the first of these or, where rows are
    sent by them, what is behind those rows, for that exchange starts there."""
    if isinstance(marker.meta["val"], torch.Tensor):
        return min(marker.users, default=marker.next)
    items = list(marker.users)
    uses = []
    for user in {user for item in items for user in item.users}:
        others = [n for n in user.all_input_nodes if n not in items]
        uses.append(max([start, *others]).next if user.target in _STARTS else user)
    return min(uses, default=marker.next)


def _first_call(graph: fx.Graph) -> fx.Node:
    return next(node for node in graph.nodes if node.op != "placeholder")
