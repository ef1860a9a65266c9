"""Shards wait on the host, and so do their gradients (Rajbhandari et al., ZeRO-Infinity, 2021)."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx

from dspass.passes.base import Pass, PassContext
from dspass.passes.nodes import ON_HOST, calls, gather_start, is_packed, items_of, open_starts, reduce_wait, specs_of
from dspass.runtime.host import empty_on_host, offload_start, offload_wait, reload_start, reload_wait


@dataclass(frozen=True, kw_only=True)
class OffloadParameters(Pass):
    """What a ``gather_start`` reads from the host is copied to the device first, and averaged gradients go to the host.

    Which parameters lie there was decided when they were sharded (DeepSpeed's ``offload_param``) or by a plan. Copies go by the
    buckets of gathers and reductions: ``reload_start`` and ``reload_wait`` before the gather, ``offload_start`` and
    ``offload_wait`` behind the reduction. On a device that computes while it copies, a bucket's reload starts where the gather
    before it does, and a gradient's copy is waited for where the next one starts.

    Dropped: copies inside of ``gather_start``. The schedule, the cost model and the report would not see them.
    """

    name: ClassVar[str] = "offload_parameters"
    requires: ClassVar[frozenset[str]] = frozenset({"gathers", "reductions"})

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        overlaps = ctx.target not in (None, "cpu")
        starts = open_starts(graph, gather_start)
        reloaded = [_reload(graph, start, starts[i - 1] if i and overlaps else start) for i, start in enumerate(starts)]
        waits = [wait for wait in sorted(calls(graph, reduce_wait)) if not is_packed(wait.args[0])]
        output = graph.find_nodes(op="output")[0]
        sent = [
            _offload(graph, wait, (waits[i + 1] if i + 1 < len(waits) else output) if overlaps else None)
            for i, wait in enumerate(waits)
        ]
        if not any(reloaded) and not any(sent):
            ctx.say("no shard waits on the host")
            return graph
        gradients = f", {sum(sent)} gradients go there" if any(sent) else ""
        ctx.say(f"{sum(reloaded)} shards come from the host in {sum(map(bool, reloaded))} copies{gradients}")
        return graph


def _reload(graph: fx.Graph, start: fx.Node, at: fx.Node) -> int:
    """Have ``start`` read copies of its shards that lie on the host; they are begun before ``at``. Answers how many."""
    shards = [n for n, spec in zip(start.args[0], specs_of(start), strict=True) if spec.on_host]
    shards = [n for n in shards if n.op == "placeholder"]
    if not shards:
        return 0
    values = [shard.meta["val"] for shard in shards]
    copies = dict(
        zip(
            shards,
            _pair(graph, reload_start, reload_wait, shards, values, at, start, str(values[0].device)),
            strict=True,
        )
    )
    start.args = ([copies.get(n, n) for n in start.args[0]], *start.args[1:])
    for shard, value in zip(shards, values, strict=True):
        shard.meta = {**shard.meta, "val": empty_on_host(value), ON_HOST: True}
    return len(shards)


def _offload(graph: fx.Graph, wait: fx.Node, end: fx.Node | None) -> int:
    """Have the gradients of ``wait`` whose parameters lie on the host go there; the copy has ended at ``end``, or at once."""
    start = wait.args[0]
    items = [
        item
        for item, spec in zip(items_of(wait), specs_of(start), strict=True)
        if spec.on_host and item is not None and all(u.target is not offload_start for u in item.users)
    ]
    if not items:
        return 0
    readers = {item: list(item.users) for item in items}
    behind = max(wait, *items).next
    hosts = [empty_on_host(item.meta["val"]) for item in items]
    copies = _pair(graph, offload_start, offload_wait, items, hosts, behind, end or behind)
    for item, copy in zip(items, copies, strict=True):
        for reader in readers[item]:
            reader.replace_input_with(item, copy)
    return len(items)


def _pair(
    graph: fx.Graph,
    begin: Callable[..., Any],
    finish: Callable[..., Any],
    values: Sequence[fx.Node],
    results: Sequence[torch.Tensor],
    at: fx.Node,
    end: fx.Node,
    *rest: Any,
) -> list[fx.Node]:
    """A copy of ``values`` that begins before ``at`` and is waited for before ``end``; answers its items."""
    with graph.inserting_before(at):
        start = graph.call_function(begin, (list(values), *rest))
    with graph.inserting_before(end):
        wait = graph.call_function(finish, (start,))
        start.meta["val"] = wait.meta["val"] = list(results)
        items = [graph.call_function(operator.getitem, (wait, i)) for i in range(len(results))]
    for item, value in zip(items, results, strict=True):
        item.meta["val"] = value
    return items
