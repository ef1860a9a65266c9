"""How long a graph takes: a roofline for compute, latency plus bytes over bandwidth for links.

A segment's time is the larger of its operations over the rate and its bytes over the memory's bandwidth (Williams et al.,
Roofline, 2009), summed over what Inductor would make one kernel of: a value that takes memory, with everything that is fused
into it. A collective takes ``latency + bytes / link`` (Hockney, 1994), and runs beside compute where the device can.

Rates are those of :mod:`dspass.passes.devices`.
"""

from __future__ import annotations

import functools
import math
import operator
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from dspass.passes.devices import Device
from dspass.passes.kernels import (
    REDUCTIONS,
    Kernel,
    Stretch,
    direction_of,
    elements_of,
    fuses,
    is_view,
    kernels,
    leaves,
    size_of,
)
from dspass.passes.nodes import (
    EXCHANGES,
    ROWS,
    combine_start,
    counts_start,
    even_start,
    exchange_wait,
    gather_start,
    gather_wait,
    is_packed,
    mean_start,
    over_of,
    reduce_start,
    reduce_wait,
    spec_of,
    specs_of,
)
from dspass.passes.onednn_products import fits
from dspass.runtime import compat, grouped
from dspass.runtime.host import offload_start, offload_wait, reload_start, reload_wait
from dspass.runtime.linear import LINEAR
from dspass.runtime.params import ParamSpec
from dspass.runtime.traffic import (
    Collective,
    counts_cost,
    even_cost,
    expected_splits,
    expected_table,
    gather_cost,
    level_costs,
    mean_cost,
    packed_gather_cost,
    packed_reduce_cost,
    reduce_cost,
    rows_cost,
    turned,
)

_STARTS = {gather_start, reduce_start, *EXCHANGES}
_OUTER = torch.ops.dspass.grouped_outer.default
_GROUPED = {torch.ops.dspass.grouped_product.default, _OUTER}


@dataclass
class Estimate:
    """Seconds of compute, and of waiting for collectives by kind and group and for copies by kind, of one run of a graph."""

    compute: float
    exposed: dict[tuple[str, str], float]
    waits: dict[fx.Node, float]  # the same, by the node that starts what is waited for
    calls: dict[tuple[str, str], int] = field(default_factory=dict)  # of collectives, by kind and group

    @property
    def seconds(self) -> float:
        return self.compute + sum(self.exposed.values())


def estimate(graph: fx.Graph, on: Device) -> Estimate:
    """Run the graph's clock: compute in order, collectives one after another beside it."""
    compute_at = compute_seconds(graph, on)
    now = link_free = host_free = 0.0
    arrives: dict[fx.Node, tuple[float, tuple[str, str]]] = {}
    exposed: dict[tuple[str, str], float] = defaultdict(float)
    waits: dict[fx.Node, float] = defaultdict(float)
    calls: Counter[tuple[str, str]] = Counter()
    compute = 0.0
    for node in graph.nodes:
        if node.target in _STARTS:
            begun = _collectives(node, on)
            for i, (kind, group, seconds) in enumerate(begun):
                calls[kind, group] += 1
                link_free = max(now, link_free) + seconds
                arrives[node] = (link_free, (kind, group))
                # Counts, and what goes inside of a node first, are there before rows go on.
                if not on.overlaps or (node.target in ROWS and i < len(begun) - 1):
                    exposed[kind, group] += link_free - now
                    waits[node] += link_free - now
                    now = link_free
        elif node.target in (offload_start, reload_start):
            kind = "offload" if node.target is offload_start else "reload"
            begin = max(now, host_free)
            host_free = begin + sum(v.nbytes for v in node.meta["val"]) / (on.host_link or on.memory / 2)
            arrives[node] = (host_free, (kind, ""))
        elif node.target in (gather_wait, reduce_wait, exchange_wait, offload_wait, reload_wait):
            moment, key = arrives.get(node.args[0], (now, ("", "")))
            if moment > now:
                exposed[key] += moment - now
                waits[node.args[0]] += moment - now
                now = moment
        elif node in compute_at:
            compute += compute_at[node]
            now += compute_at[node]
    return Estimate(compute, dict(exposed), dict(waits), dict(calls))


def _collectives(start: fx.Node, on: Device) -> list[tuple[str, str, float]]:
    """Kind, group and seconds of each collective that ``start`` begins."""
    costs = _exchanged(start) if start.target in EXCHANGES else _of_parameters(start)
    return [(c.kind, c.group, on.latency + c.bytes / on.link_of(c.span)) for c in costs]


def _of_parameters(start: fx.Node) -> list[Collective]:
    specs: Sequence[ParamSpec] = specs_of(start)
    if is_packed(start):
        sent = sum(map(size_of, start.args[0]))
        reduces = start.target is reduce_start
        return [
            packed_reduce_cost(specs, sent, over_of(start)) if reduces else packed_gather_cost(specs, sent, "forward")
        ]
    if start.target is reduce_start:
        return reduce_cost(specs)
    cost = gather_cost(specs, "forward", over_of(start))
    return [cost] if cost is not None else []


def _exchanged(start: fx.Node) -> list[Collective]:
    """An all-to-all of expert parallelism, as the rank that gets the most has it: charged with what it sends or gets, whichever
    is more, for links go both ways at once; or the mean of shares."""
    spec = spec_of(start)
    first: Any = start.args[0]
    if start.target is mean_start:
        assert spec.shard_axis is not None
        return [mean_cost(spec.shard_axis, size_of(first), "forward")]
    axis = spec.divided_over
    if start.target is counts_start:
        return [counts_cost(axis, leaves(first.meta["val"])[0].shape[0], "forward")]
    if start.target is even_start:
        told = [counts_cost(axis, spec.full_shape[0] + 1, "forward")] if start.args[3] else []
        size, alike = sum(map(size_of, first)), [[1] * axis.size] * axis.size
        if spec.expert_levels is not None and spec.expert_levels.pay(alike, size // axis.size):
            return [*told, *level_costs(spec.expert_levels, axis.rank, alike, size // axis.size, "forward")]
        return [*told, even_cost(axis, size, "forward")]
    sent, got = [n.meta["val"] for n in first], start.meta["val"]
    if start.target is combine_start:
        sent, got = got, sent
    counts = [compat.expected(tensors[0].shape[0]) or 0 for tensors in (sent, got)]
    return rows_costs(spec, counts[0], counts[1], sum(math.prod(t.shape[1:]) * t.element_size() for t in got))


def rows_costs(spec: ParamSpec, sent: int, received: int, row_bytes: int) -> list[Collective]:
    """Of rows to experts, and just so of their way back: ``sent`` by the rank that gets the most, ``received``."""
    axis = spec.divided_over
    going, coming = expected_splits(axis, sent, received)
    others = max(sent - going[axis.rank], received - coming[axis.rank])
    if spec.expert_levels is not None:
        table = expected_table(axis, sent, received)
        if spec.expert_levels.pay(table, row_bytes):
            ways = (level_costs(spec.expert_levels, axis.rank, t, row_bytes, "forward") for t in (table, turned(table)))
            return [max(both, key=lambda cost: cost.bytes) for both in zip(*ways, strict=True)]
    return [rows_cost(axis, others * row_bytes, "forward")]


def rows_seconds(spec: ParamSpec, sent: int, received: int, row_bytes: int, on: Device) -> float:
    """Seconds of :func:`rows_costs`, alone on the link."""
    return sum(on.latency + c.bytes / on.link_of(c.span) for c in rows_costs(spec, sent, received, row_bytes))


def collective_seconds(start: fx.Node, on: Device) -> float:
    """Of all that a collective's start begins, alone on its link."""
    return sum(seconds for _, _, seconds in _collectives(start, on))


def holding_seconds(forward: fx.Graph, on: Device) -> float:
    """Of taking memory for what ``forward`` makes and hands on, where an allocator does so in each step."""
    results = {n for n in forward.find_nodes(op="output")[0].all_input_nodes if n.op == "call_function"}
    return on.fresh * sum(map(size_of, results)) if on.fresh else 0.0


def optimizer_seconds(count: int, states: int, on: Device) -> float:
    """Of stepping parameters and ``states`` of so many bytes: they and gradients are read, all but gradients written."""
    return (3 * count + 2 * states) / on.memory


def states_seconds(count: int, on: Device) -> float:
    """Of copying so many bytes of states to the device and back, on one stream."""
    return 2 * count / (on.host_link or on.memory / 2)


def compute_seconds(
    part: fx.Graph | Stretch, on: Device, operations: Callable[[fx.Node], float] | None = None
) -> dict[fx.Node, float]:
    """How long the kernels of ``part`` take, each by the last node that it writes. ``operations`` is :func:`operation_seconds`,
    which a caller that asks for many stretches of one graph may remember."""
    known = operations or functools.partial(operation_seconds, on=on)
    return {kernel.writes[-1]: kernel_seconds(kernel, on, known) for kernel in kernels(part)}


def kernel_seconds(kernel: Kernel, on: Device, operations: Callable[[fx.Node], float]) -> float:
    """One kernel: the larger of operations over rate and bytes over bandwidth, and what its functions take beyond that."""
    moved = sum(kernel.reads.values()) + sum(map(size_of, kernel.writes))
    if not kernel.is_generated:
        return max(operations(kernel.writes[0]), on.moving(moved))
    return on.moving(moved) + sum(function_seconds(n, on) for n in kernel.computes)


def seconds_again(node: fx.Node, on: Device) -> float:
    """Seconds to compute a value from its inputs: a kernel of its own, or its functions in a fused one. What that reads is
    counted with those values."""
    if node.op != "call_function" or is_view(node) or node.target is operator.getitem:
        return 0.0
    if not fuses(node):
        alone = Kernel(False, [node], {a: size_of(a) for a in node.all_input_nodes}, {})
        return kernel_seconds(alone, on, functools.partial(operation_seconds, on=on))
    return function_seconds(node, on)


def function_seconds(node: fx.Node, on: Device) -> float:
    """What a fused operator takes beyond moving its operands, where that was measured: a transcendental function by element of
    what it answers, a reduction by element of what it reads."""
    seconds = on.functions.get(function_of(node), 0.0) if on.functions else 0.0
    return seconds * (elements_of(node.args[0]) if node.target in REDUCTIONS else elements_of(node)) if seconds else 0.0


def function_of(node: fx.Node) -> str:
    """``exp``, ``sum rows``."""
    return (
        f"{operator_name(node.target)} {direction_of(node)}"
        if node.target in REDUCTIONS
        else operator_name(node.target)
    )


def operation_seconds(node: fx.Node, on: Device) -> float:
    """The arithmetic of a product or an attention; an attention's rate depends on the size of one of its heads."""
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta.get("val"))
    kind = "linear" if node.target is LINEAR or (on.name == "cpu" and fits(node)) else "product"
    return arithmetic_seconds(node.target, args, kwargs, node.meta.get("val"), on, kind)


def arithmetic_seconds(
    target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any, on: Device, kind: str = "product"
) -> float:
    """:func:`operation_seconds` of an operator that was called with such values, and answered ``result``."""
    value = next(iter(leaves(result)), None)
    if value is None:
        return 0.0
    name = operator_name(target)
    if is_attention(target):
        backward = "backward" in name
        shapes = [t.shape for t in args[: 4 if backward else 3]]
        operations, heads = (
            (sdpa_backward_flop_count if backward else sdpa_flop_count)(*shapes),
            math.prod(shapes[0][:2]),
        )
        return heads * on.computing("attention backward" if backward else "attention", value.dtype, operations / heads)
    counter = flop_registry.get(getattr(target, "overloadpacket", None))
    if counter is None:
        return 0.0
    operations = float(compat.expected(counter(*args, **kwargs, out_val=result)) or 0)
    if target in _GROUPED:  # a product for each expert
        experts = max(args[-1].shape[0], 1)
        operations /= experts
        least = grouped.least_operations(value.dtype, is_outer=target is _OUTER) if on.name == "cpu" else math.inf
        kind = "linear" if operations >= least else "product"
        return experts * on.computing(kind, value.dtype, operations)
    return on.computing(kind, value.dtype, operations)


def is_attention(target: Any) -> bool:
    return operator_name(target).startswith("_scaled_dot_product")


def is_product(target: Any) -> bool:
    """Whether an operator's arithmetic is counted: products, convolutions and attentions."""
    return is_attention(target) or getattr(target, "overloadpacket", None) in flop_registry


def operator_name(target: Any) -> str:
    """Of an operator, without its namespace and overload; empty for other functions."""
    return getattr(getattr(target, "overloadpacket", None), "__name__", "")
