"""In how many chunks a layer of experts is computed.

In ``n`` chunks, each of an ``n``-th of a rank's experts, a rank sends all chunks' rows one after another, computes each chunk
when its rows are there, and sends it back while it computes the next (Hwang et al., Tutel, 2023; He et al., FasterMoE, 2022).
:func:`fastest` runs the clock of one layer, forward and backward, on the busiest rank, for each ``n`` up to :data:`MOST`:

- a chunk's rows take ``latency + bytes / link`` each way (:func:`dspass.passes.cost.rows_seconds`), one after another;
- a chunk's products start when its rows have arrived, and the way back when they are done. The link and compute each do one
  thing at a time (:func:`_clock`);
- while compute waits for rows it does what needs none: shared experts, and in the backward gradients of weights of chunks
  that are there, which take as long as those of rows;
- more than one chunk costs two copies of the rows, apart and together again, in both directions, and in the backward one of
  the gradients of weights, which are made apart too (:func:`layer_seconds`).

**Skew.** The busiest rank gets ``dspass.experts.expected_imbalance`` times the mean of rows, and among its chunks one is as
much larger: of ``s`` times the mean it has ``min(1, s / n)`` of the rows, first, in the middle or last alike. The more uneven
the routing, the less is hidden: at ``s >= n`` one chunk has it all.

Of the numbers that are within 1 % of the fastest, the smallest is taken: the cost of starting kernels is not counted. On a
device that does not compute while it sends it is 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.fx as fx

from dspass.passes import devices
from dspass.passes.base import PassContext
from dspass.passes.cost import rows_seconds
from dspass.passes.devices import Device
from dspass.passes.experts import Layer, name_of, value_of
from dspass.runtime import compat, expert_rows
from dspass.runtime.params import ParamSpec

#: More than these hide no more that is worth as many more exchanges.
MOST = 8

#: Of the number of chunks that is taken over the fastest.
_WITHIN = 1.01

_PRODUCTS = {"linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "einsum"}


@dataclass(frozen=True, kw_only=True)
class Times:
    """Of one layer on its busiest rank, in one chunk: seconds of the products in the ``forward``, of ``aside``, what needs none
    of its rows there; of ``copy``, the rows written once more, and ``weights``, so the gradients of the matrices. ``there`` and
    ``back`` answer the seconds of sending a share of the rows to experts and back."""

    forward: float
    aside: float
    copy: float
    weights: float
    there: Callable[[float], float]
    back: Callable[[float], float]


def fastest(graph: fx.Graph, layer: Layer, spec: ParamSpec, ctx: PassContext) -> int:
    """The number of chunks for a layer of a captured graph whose weights, ``spec`` one of them, are divided over ranks."""
    kind = next((v.device.type for v in map(value_of, layer.products) if isinstance(v, torch.Tensor)), "cpu")
    on = devices.tabled(ctx.target or ("cuda" if kind == "cuda" else "cpu"))
    rows = compat.expected(layer.rows)
    if not on.overlaps or not rows:
        return 1
    times = times_of(graph, layer, spec, rows, on)
    found = by_chunks(times, spec, ctx.trains)
    least = min(found.values())
    return next(n for n, seconds in found.items() if seconds <= least * _WITHIN)


def by_chunks(times: Times, spec: ParamSpec, trains: bool) -> dict[int, float]:
    """:func:`layer_seconds` of each number of chunks that may be chosen, 1 first."""
    imbalance = spec.engine.expected_imbalance
    return {n: layer_seconds(times, n, imbalance, trains=trains) for n in range(1, min(MOST, spec.shape[0]) + 1)}


def layer_seconds(times: Times, chunks: int, imbalance: float = 1.0, *, trains: bool = True) -> float:
    """Seconds of a layer in ``chunks``: the mean over places of the largest among them."""
    largest = min(1.0, imbalance / chunks)
    others = (1 - largest) / (chunks - 1) if chunks > 1 else 0.0
    total = 0.0
    for place in range(chunks):
        shares = [largest if i == place else others for i in range(chunks)]
        total += _clock(shares, times.there, times.back, times.forward, times.aside)
        if trains:
            total += _clock(shares, times.back, times.there, times.forward, 2 * times.aside, times.forward)
    extra = (2 * times.copy * (1 + trains) + times.weights * trains) if chunks > 1 else 0.0
    return total / chunks + extra


def _clock(
    shares: Sequence[float],
    there: Callable[[float], float],
    back: Callable[[float], float],
    products: float,
    aside: float,
    later: float = 0.0,
) -> float:
    """One direction: ``products`` of all chunks between their exchanges, ``aside`` at any time, ``later`` behind each chunk."""
    link = now = 0.0
    arrived = []
    for share in shares:
        link += there(share)
        arrived.append(link)
    for share, arrives in zip(shares, arrived, strict=True):
        meanwhile = min(aside, max(arrives - now, 0.0))
        aside -= meanwhile
        now = max(now, arrives) + products * share
        aside += later * share
        link = max(link, now) + back(share)
    return max(now + aside, link)


def times_of(graph: fx.Graph, layer: Layer, spec: ParamSpec, rows: int, on: Device) -> Times:
    """What :func:`layer_seconds` is made of, for ``rows`` on this rank."""
    arrivals = expert_rows.expected_arrivals(spec, rows)
    entering = [n for n in layer.entering() if not layer.names_expert(n)]

    def sends(nodes: Sequence[fx.Node]) -> Callable[[float], float]:
        width = sum(map(_row_bytes, nodes))
        return lambda share: rows_seconds(spec, round(rows * share), round(arrivals * share), width, on)

    here = spec.shape[0]
    seconds = weights = 0.0
    for product in layer.products:
        matrix = value_of(product.args[1])
        inputs, outputs = matrix.shape[1:]
        size, matrices = matrix.element_size(), here * inputs * outputs * matrix.element_size()
        arithmetic = here * on.computing("product", matrix.dtype, 2 * arrivals / here * inputs * outputs)
        seconds += max(arithmetic, on.moving(matrices + arrivals * (inputs + outputs) * size))
        weights += on.moving(2 * matrices)
    return Times(
        forward=seconds,
        aside=_aside(graph, layer, on),
        copy=on.moving(2 * rows * sum(map(_row_bytes, entering))),
        weights=weights,
        there=sends(entering),
        back=sends(layer.leaving()),
    )


def _row_bytes(node: fx.Node) -> int:
    value = value_of(node)
    return prod(value.shape[1:]) * value.element_size()


def _aside(graph: fx.Graph, layer: Layer, on: Device) -> float:
    """Seconds of products that neither need the layer nor are needed by it."""
    inside = set(layer.inside)
    below, above = set(inside), set(inside)
    for node in graph.nodes:
        if not below.isdisjoint(node.all_input_nodes):
            below.add(node)
    for node in reversed(graph.nodes):
        if not above.isdisjoint(node.users):
            above.add(node)
    total = 0.0
    for node in graph.nodes:
        value = value_of(node)
        if node in below or node in above or name_of(node) not in _PRODUCTS or not isinstance(value, torch.Tensor):
            continue
        first = value_of(node.args[0])
        if isinstance(first, torch.Tensor) and first.dim():
            operations = 2 * compat.expected_elements(value) * (compat.expected(first.shape[-1]) or 0)
            total += on.computing("product", value.dtype, operations)
    return total
