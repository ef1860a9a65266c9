"""How long a graph takes: a roofline for compute, latency plus bytes over bandwidth for links.

A segment's time is the larger of its operations over the rate and its bytes over the memory's bandwidth (Williams et al.,
Roofline, 2009), summed over what Inductor would make one kernel of: a value that takes memory, with everything that is fused
into it. A collective takes ``latency + bytes / link`` (Hockney, 1994), and runs beside compute where the device can.

Rates are those of :mod:`dspass.passes.devices`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch.utils.flop_counter import flop_registry

from dspass.passes.devices import Device
from dspass.passes.nodes import gather_start, gather_wait, reduce_start, reduce_wait, specs_of
from dspass.runtime.host import offload_start, offload_wait, reload_start, reload_wait
from dspass.runtime.params import ParamSpec
from dspass.runtime.traffic import gather_cost, reduce_cost


@dataclass
class Estimate:
    """Seconds of compute and of waiting for collectives, by kind, of one run of a graph."""

    compute: float
    exposed: dict[tuple[str, str], float]

    @property
    def seconds(self) -> float:
        return self.compute + sum(self.exposed.values())


def estimate(graph: fx.Graph, on: Device) -> Estimate:
    """Run the graph's clock: compute in order, collectives one after another beside it."""
    from_memory = values_in_memory(graph)
    now = link_free = host_free = 0.0
    arrives: dict[fx.Node, tuple[float, tuple[str, str]]] = {}
    exposed: dict[tuple[str, str], float] = {}
    compute = 0.0
    for node in graph.nodes:
        if node.target in (gather_start, reduce_start):
            for kind, direction, seconds in _collectives(node, on):
                begin = max(now, link_free)
                link_free = begin + seconds
                arrives[node] = (link_free, (kind, direction))
                if not on.overlaps:
                    exposed[kind, direction] = exposed.get((kind, direction), 0.0) + seconds
                    now = link_free
        elif node.target in (offload_start, reload_start):
            kind = "offload" if node.target is offload_start else "reload"
            begin = max(now, host_free)
            host_free = begin + sum(map(_bytes, node.meta["val"])) / (on.host_link or on.memory / 2)
            arrives[node] = (host_free, (kind, "forward" if kind == "offload" else "backward"))
        elif node.target in (gather_wait, reduce_wait, offload_wait, reload_wait):
            moment, key = arrives.get(node.args[0], (now, ("", "")))
            if moment > now:
                exposed[key] = exposed.get(key, 0.0) + moment - now
                now = moment
        elif node in from_memory:
            seconds = kernel_seconds(node, from_memory[node], on)
            compute += seconds
            now += seconds
    return Estimate(compute, exposed)


def _collectives(start: fx.Node, on: Device) -> list[tuple[str, str, float]]:
    specs: Sequence[ParamSpec] = specs_of(start)
    if start.target is reduce_start:
        costs = reduce_cost(specs)
    else:
        cost = gather_cost(specs, "forward")
        costs = [cost] if cost is not None else []
    return [(c.kind, c.direction, on.latency + c.bytes / on.link_of(c.group_size)) for c in costs]


def collective_seconds(start: fx.Node, on: Device) -> float:
    """Of all that a ``gather_start`` or ``reduce_start`` begins, alone on its link."""
    return sum(seconds for _, _, seconds in _collectives(start, on))


def kernel_seconds(node: fx.Node, reads: Sequence[fx.Node], on: Device) -> float:
    """One kernel: the larger of operations over rate and bytes over bandwidth."""
    value = node.meta.get("val")
    first = next((v for v in _leaves(value)), None)
    if first is None:
        return 0.0
    moved = sum(_bytes(v) for v in _leaves(value)) + sum(_bytes(v) for n in reads for v in _leaves(n.meta.get("val")))
    return max(_operations(node) / on.rate(first.dtype), moved / on.memory)


def _operations(node: fx.Node) -> float:
    packet = getattr(node.target, "overloadpacket", None)
    counter = flop_registry.get(packet)
    if counter is None:
        return 0.0
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta.get("val"))
    return float(counter(*args, **kwargs, out_val=node.meta.get("val")))


def values_in_memory(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Each node that writes memory, and the nodes in memory that its kernel reads."""
    solid = materialised(graph)
    reads: dict[fx.Node, dict[fx.Node, None]] = {}
    for node in graph.nodes:
        found: dict[fx.Node, None] = {}
        for source in node.all_input_nodes:
            if source in solid or source.op == "placeholder":
                found[source] = None
            else:
                found.update(reads.get(source, {}))
        reads[node] = found
    return {node: list(reads[node]) for node in graph.nodes if node in solid}


_FUSIBLE = {
    torch.ops.aten.sum.dim_IntList,
    torch.ops.aten.mean.dim,
    torch.ops.aten.amax.default,
    torch.ops.aten.sum.default,
    torch.ops.aten.var_mean.correction,
    torch.ops.aten.mean.default,
    torch.ops.prims.convert_element_type.default,
    torch.ops.aten.embedding.default,
    torch.ops.aten.cat.default,
    torch.ops.aten.where.self,
}


def fuses(node: fx.Node) -> bool:
    """Whether Inductor makes this part of a generated kernel."""
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) or node.target in _FUSIBLE


def is_view(node: fx.Node) -> bool:
    return getattr(node.target, "is_view", False) is True


def materialised(graph: fx.Graph) -> set[fx.Node]:
    """Nodes whose value takes memory: results of the graph, and what an operator that does not fuse reads or writes."""
    output = graph.find_nodes(op="output")[0]
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "call_function" or is_view(node) or not _leaves(node.meta.get("val")):
            continue
        if not isinstance(node.meta["val"], torch.Tensor):
            if not fuses(node) and getattr(node.target, "namespace", None) is not None:
                found.add(node)
            continue
        if _picks_item(node):
            continue
        readers, seen = list(node.users), set()
        solid = not fuses(node)
        while readers and not solid:
            user = readers.pop()
            if user in seen:
                continue
            seen.add(user)
            if is_view(user):
                readers.extend(user.users)
            elif user is output or not fuses(user):
                solid = True
        if solid:
            found.add(node)
    return found


def _picks_item(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "") == "getitem"


def _leaves(value: Any) -> list[torch.Tensor]:
    return [v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, torch.Tensor)]


def _bytes(value: torch.Tensor) -> int:
    return value.numel() * value.element_size()
