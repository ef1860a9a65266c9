"""Values that are saved for the backward wait for it on the host (Rhu et al., vDNN, 2016), those that the planner chose."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx

from dspass.passes.base import Holding, Pass, PassContext
from dspass.passes.devices import Device
from dspass.passes.held import bytes_of, flat, is_dense, last_read
from dspass.passes.kernels import Stretch, ends_kernel
from dspass.passes.nodes import HELD, positions
from dspass.passes.schedule import as_late, as_soon, clock_of, first_after, kernel_ends, last_before
from dspass.runtime.host import empty_on_host, offload_start, offload_wait, reload_start, reload_wait


@dataclass(frozen=True, kw_only=True)
class OffloadSaved(Pass):
    """A saved value that is marked becomes a tensor on the host.

    The forward copies it out behind its last reader there (``offload_start``, ``offload_wait``), the backward copies it back
    before its first (``reload_start``, ``reload_wait``). Values go together until they are ``bucket_bytes``, and their nodes
    stand right behind an operator that Inductor does not fuse: the graph is cut where it is cut in any case. On a device that
    computes while it copies, one bucket is on its way at a time: it is waited for where the next one starts, and a reload
    starts when the one before it has arrived.

    With ``hidden_by``, such a device, copies wait for each other on the link and compute waits for none of them: one out is
    waited for where it has arrived by the cost model, at the latest at the end, and one back starts as late as hides it
    (:mod:`dspass.passes.schedule`). What is on its way is on the device meanwhile, which the planner counts.

    ``enabled`` is DeepSpeed's ``compile.offload_activation``; None: where the device has memory of its own and a link to the
    host. Values of less than ``min_bytes`` stay: a copy of them costs more to begin than to make.

    Dropped: ``torch.autograd.graph.save_on_cpu`` and its hooks. They see tensors one by one while the graph runs; which ones
    are worth a copy, and when, needs the graph. Dropped: to let Inductor place the copies as operators of its own. It orders
    them as it fuses, and where memory is free again would be its secret.
    """

    name: ClassVar[str] = "offload_saved"

    enabled: bool | None = None
    bucket_bytes: int = 64_000_000
    min_bytes: int = 1_000_000
    hidden_by: Device | None = None

    def hold(self, node: fx.Node, on: Device) -> Holding | None:
        value: Any = node.meta.get("val")
        link = on.host_link or on.memory / 2
        enabled = on.has_own_memory if self.enabled is None else self.enabled
        if not enabled or not is_dense(node) or bytes_of(value) < self.min_bytes:
            return None
        size = bytes_of(value)
        return Holding(bytes=0, host_bytes=size, link_seconds=2 * size / link)

    @property
    def holds_all(self) -> bool:
        return bool(self.enabled)

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        overlaps = (ctx.target or _device_type(graph)) != "cpu"
        if ctx.where == "forward":
            count, buckets = self._offload(graph, overlaps)
        else:
            count, buckets = self._reload(graph, overlaps)
        ctx.say(f"{count} values in {buckets} copies" if count else "every saved value stays on the device")
        return graph

    def _offload(self, graph: fx.Graph, overlaps: bool) -> tuple[int, int]:
        output = graph.find_nodes(op="output")[0]
        marked = [n for n in dict.fromkeys(flat(output.args[0])) if n.meta.get(HELD) == self.name and is_dense(n)]
        order = positions(graph)
        ready: dict[int, list[fx.Node]] = {}  # by the place of the last reader
        for node in marked:
            ready.setdefault(last_read(node, order), []).append(node)
        buckets: list[tuple[fx.Node, list[fx.Node]]] = []
        waiting: list[fx.Node] = []
        for node in list(graph.nodes):
            if node is output:
                break
            waiting += ready.pop(order[node], [])
            if waiting and ends_kernel(node) and (not ready or _size(waiting) >= self.bucket_bytes):
                buckets.append((node.next, waiting))
                waiting = []
        if waiting:
            buckets.append((output, waiting))
        arrived = self._arrivals(graph, buckets) if overlaps and self.hidden_by is not None else None
        waits: list[fx.Node] = []
        for i, (at, values) in enumerate(buckets):
            with graph.inserting_before(at):
                start = graph.call_function(offload_start, (values,))
            place = output if overlaps else at
            if arrived is not None:
                place = arrived[i]
            elif overlaps and waits:
                for moved in (waits[-1], *sorted(waits[-1].users)):
                    start.prepend(moved)
            hosts = [empty_on_host(value.meta["val"]) for value in values]
            wait = _arrive(graph, place, start, offload_wait, hosts, values, _only(output))
            waits.append(wait)
        return len(marked), len(buckets)

    def _arrivals(self, graph: fx.Graph, buckets: Sequence[tuple[fx.Node, list[fx.Node]]]) -> list[fx.Node]:
        """The node before which each bucket has arrived."""
        assert self.hidden_by is not None
        nodes, order = list(graph.nodes), positions(graph)
        clock = clock_of(Stretch.of(graph), self.hidden_by)
        lasts = [self._copy_seconds(values, self.hidden_by) for _, values in buckets]
        ready = [order[at] for at, _ in buckets]
        places = [*kernel_ends(nodes), len(nodes) - 1]
        moments = as_soon(clock, ready, lasts)
        return [nodes[max(p, first_after(clock, places, at))] for p, at in zip(ready, moments, strict=True)]

    def _copy_seconds(self, values: Sequence[fx.Node], on: Device) -> float:
        return _size(values) / (on.host_link or on.memory / 2)

    def _reload(self, graph: fx.Graph, overlaps: bool) -> tuple[int, int]:
        order = positions(graph)
        nodes = list(graph.nodes)
        body = next(n for n in nodes if n.op != "placeholder")
        marked = [n for n in nodes if n.op == "placeholder" and n.meta.get(HELD) == self.name and n.users]
        marked.sort(key=lambda n: min(order[u] for u in n.users))
        buckets: list[list[fx.Node]] = []
        for node in marked:
            if not buckets or _size(buckets[-1]) >= self.bucket_bytes:
                buckets.append([])
            buckets[-1].append(node)
        places = []
        for bucket in buckets:
            place = min(order[u] for n in bucket for u in n.users)
            while nodes[place - 1].op != "placeholder" and not ends_kernel(nodes[place - 1]):
                place -= 1
            places.append(place)
        begins = self._departures(graph, buckets, places) if overlaps and self.hidden_by is not None else None
        free = body  # from here on the next reload may start
        for i, (bucket, place) in enumerate(zip(buckets, places, strict=True)):
            at = nodes[place]
            values = [n.meta["val"] for n in bucket]
            with graph.inserting_before(begins[i] if begins is not None else free if overlaps else at):
                start = graph.call_function(reload_start, (bucket, str(values[0].device)))
            wait = _arrive(graph, at, start, reload_wait, values, bucket, _all_but(start))
            free = max(wait, *wait.users).next
            for node, value in zip(bucket, values, strict=True):
                node.meta = {**{k: v for k, v in node.meta.items() if k != HELD}, "val": empty_on_host(value)}
        return len(marked), len(buckets)

    def _departures(self, graph: fx.Graph, buckets: Sequence[list[fx.Node]], needed: Sequence[int]) -> list[fx.Node]:
        """The node before which each bucket starts, as late as hides it."""
        assert self.hidden_by is not None
        nodes = list(graph.nodes)
        lasts = [self._copy_seconds(values, self.hidden_by) for values in buckets]
        late = as_late(clock_of(Stretch.of(graph), self.hidden_by), needed, lasts)
        places = kernel_ends(nodes)
        return [nodes[min(p, last_before(late.clock, places, at))] for p, at in zip(needed, late.starts, strict=True)]


def _arrive(
    graph: fx.Graph,
    at: fx.Node,
    start: fx.Node,
    end: Callable[..., Any],
    values: list[torch.Tensor],
    replaced: Sequence[fx.Node],
    where: Callable[[fx.Node], bool],
) -> fx.Node:
    """The wait of ``start`` before ``at``, and its items, which users of ``replaced`` read from there on."""
    with graph.inserting_before(at):
        wait = graph.call_function(end, (start,))
        start.meta["val"] = wait.meta["val"] = values
        for i, (node, value) in enumerate(zip(replaced, values, strict=True)):
            item = graph.call_function(operator.getitem, (wait, i))
            item.meta["val"] = value
            node.replace_all_uses_with(item, delete_user_cb=where)
    return wait


def _only(node: fx.Node) -> Callable[[fx.Node], bool]:
    return lambda user: user is node


def _all_but(node: fx.Node) -> Callable[[fx.Node], bool]:
    return lambda user: user is not node


def _size(nodes: Sequence[fx.Node]) -> int:
    return sum(bytes_of(node.meta["val"]) for node in nodes)


def _device_type(graph: fx.Graph) -> str:
    values = (n.meta.get("val") for n in graph.nodes)
    return next((v.device.type for v in values if isinstance(v, torch.Tensor)), "cpu")
