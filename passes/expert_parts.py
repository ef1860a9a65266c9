"""In how many parts the batch takes turns around layers of experts (:mod:`dspass.passes.split_batch`).

:func:`seconds` runs the clock of all layers, forward and backward, on the busiest rank: what stands in front of a layer of
experts for each part, one after another, then the experts of each, and so on. A part's rows leave when they are made, one
exchange after another on the link, and its next turn begins when they are there and the part before it is done. What a turn
takes is told by the graph that was captured with a part (:mod:`dspass.passes.captured_cost`), experts by
:func:`dspass.passes.expert_chunks.times_of`: half the rows take more than half the time where weights are what is read.
The gradient of each weight is made once a part, and the sums read and write it again.

One part may have its experts in chunks, which is taken off: what :func:`dspass.passes.expert_chunks.layer_seconds` says that
they save. What stands behind the last layer is of the whole batch in any case, and not counted.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch.fx as fx

from dspass.passes.captured_cost import costs_of, parameter_of
from dspass.passes.devices import Device
from dspass.passes.divide_experts import spec_of
from dspass.passes.expert_chunks import Times, by_chunks, times_of
from dspass.passes.experts import Layer
from dspass.runtime import compat

#: Numbers of parts that are looked at; more are as many more exchanges, and products of fewer rows.
COUNTS = (2, 4)

#: Of the step that parts have to be below, to be worth another compilation.
WITHIN = 0.99


@dataclass(frozen=True, kw_only=True)
class Turns:
    """Seconds of one part: of each turn ``forward`` and ``backward``, and of the exchange behind each but the last,
    ``sends``. ``sums`` are those of adding a gradient to another, of all weights."""

    forward: Sequence[float]
    backward: Sequence[float]
    sends: Sequence[float]
    sums: float


def seconds(turns: Turns, parts: int) -> float:
    """Of the layers' forward and backward in so many parts."""
    total = _clock(turns.forward, turns.sends, parts)
    if any(turns.backward):
        total += _clock(turns.backward[::-1], turns.sends[::-1], parts) + (parts - 1) * turns.sums
    return total


def _clock(turns: Sequence[float], sends: Sequence[float], parts: int) -> float:
    link = now = 0.0
    arrives = [0.0] * parts
    for i, computing in enumerate(turns):
        for part in range(parts):
            now = max(now, arrives[part]) + computing
            if i < len(sends):
                link = arrives[part] = max(link, now) + sends[i]
    return now


def turns_of(gm: fx.GraphModule, layers: Sequence[Layer], on: Device, trains: bool) -> Turns:
    """Of a graph that was captured with one part, or with all of the batch."""
    costs = costs_of(gm, on, trains)
    place = {node: i for i, node in enumerate(gm.graph.nodes)}
    ordered = sorted(layers, key=lambda layer: place[layer.inside[0]])
    ends = [i for layer in ordered for i in (place[layer.inside[0]], place[layer.inside[-1]] + 1)]
    products = {product for layer in layers for product in layer.products}
    forward, backward = [0.0] * (len(ends) + 1), [0.0] * (len(ends) + 1)
    for node, cost in costs.items():
        if node not in products:
            turn = bisect_right(ends, place[node])
            forward[turn] += cost.forward
            backward[turn] += cost.input_gradient + cost.weight_gradient
    sends = []
    for i, layer in enumerate(ordered):
        times = _times(gm.graph, layer, on)
        forward[2 * i + 1] += times.forward
        backward[2 * i + 1] += 2 * times.forward * trains
        sends += [times.there(1.0), times.back(1.0)]
    forward[-1] = backward[-1] = 0.0
    return Turns(forward=forward, backward=backward, sends=sends, sums=_sums(gm.graph, ends, place, on))


def chunks_save(graph: fx.Graph, layers: Sequence[Layer], on: Device, trains: bool) -> float:
    """Seconds that chunks of experts save, of layers that are computed for the whole batch."""
    saved = 0.0
    for layer in layers:
        spec = spec_of(layer.weights[layer.products[0]])
        found = by_chunks(_times(graph, layer, on), spec, trains)
        saved += found[1] - min(found.values())
    return saved


def _times(graph: fx.Graph, layer: Layer, on: Device) -> Times:
    return times_of(graph, layer, spec_of(layer.weights[layer.products[0]]), compat.expected(layer.rows) or 0, on)


def _sums(graph: fx.Graph, ends: Sequence[int], place: Mapping[fx.Node, int], on: Device) -> float:
    size = 0
    for node in graph.nodes:
        spec = parameter_of(node)
        if spec is not None and spec.trains and any(place[user] < ends[-1] for user in node.users):
            size += prod(spec.shape) * spec.compute_dtype.itemsize
    return on.moving(3 * size)


__all__ = ["COUNTS", "WITHIN", "Turns", "chunks_save", "seconds", "turns_of"]
