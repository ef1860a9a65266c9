"""Rows to experts on other ranks and back, as the runtime starts them: who is told what, and how it is sent and counted.

The graph's operators and nodes (:mod:`dspass.runtime.exchange`, :mod:`dspass.runtime.collectives`) end here. ``spec`` is a
weight of the layer's experts, whose engine counts the traffic, the routing and what rounding changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, Literal

import torch

from dspass.runtime import compat
from dspass.runtime.levels import Levels, Table, exchange_by_levels
from dspass.runtime.params import Packed, ParamSpec
from dspass.runtime.pending import Pending
from dspass.runtime.quantise import rounding_squares
from dspass.runtime.traffic import (
    Collective,
    counts_cost,
    direction_now,
    even_cost,
    even_parts,
    expected_table,
    level_costs,
    mean_cost,
    rows_cost,
    turned,
)
from dspass.runtime.transport import transport_for

#: What rows are sent for: to their experts, back from them, or one of the two in fixed sizes.
RowsKind = Literal["dispatch", "combine", "even"]

#: More chunks than this no rank can tell the others of.
_MOST_CHUNKS = 2**14


def start_counts(spec: ParamSpec, ends: torch.Tensor, scores: torch.Tensor | None, chunks: int, parts: int) -> Pending:
    """Begin to tell each rank how many rows come for each of its experts, which are computed in so many ``chunks``, for
    one of so many ``parts`` of the batch.

    It is told of all experts, a few hundred numbers, for the report. Megatron-LM's dispatcher gathers as much. The host
    reads them, once for all that is sent by them: on a GPU each time would wait for all that it has begun.
    """
    engine, axis = spec.engine, spec.divided_over
    counts = ends.diff(prepend=ends.new_zeros(1)).to(torch.int32)
    bad = counts.new_zeros(1) if scores is None else scores.isnan().any().to(torch.int32)[None]
    way = chunks + _MOST_CHUNKS * parts
    told = torch.cat([counts, bad + 2 * way]).expand(axis.size, -1)
    flight = transport_for(axis, engine.dry).all_to_all(axis, [told])
    counted = engine.traffic.add(counts_cost(axis, ends.shape[0], direction_now()))

    def arrived(results: list[torch.Tensor]) -> list[torch.Tensor]:
        (all_told,) = results
        on_host = all_told.cpu()
        if not compat.is_fake(all_told):
            _refuse_nan(spec, on_host[:, -1] % 2)
            _refuse_other_ways(spec, (on_host[:, -1] // 2).tolist())
            engine.routing.counted(spec, all_told[:, :-1])
        here = ends.shape[0] // axis.size
        by_rank = on_host[:, :-1].reshape(axis.size, axis.size, here)
        splits = [part.sum(2, dtype=torch.int32) for part in by_rank.split(even_parts(here, chunks), dim=2)]
        return [all_told[:, axis.rank * here : (axis.rank + 1) * here].contiguous(), *splits]

    return Pending(engine.traffic, flight, counted, arrived)


def start_mean(spec: ParamSpec, values: torch.Tensor) -> Pending:
    """Begin to average small values over the data axis."""
    engine = spec.engine
    axis = spec.shard_axis
    assert axis is not None, f"{spec.name} is not on the data axis"
    flight = transport_for(axis, engine.dry).all_reduce(axis, [values])
    counted = engine.traffic.add(mean_cost(axis, values.nbytes, direction_now()))
    return Pending(engine.traffic, flight, counted, lambda sums: [sums[0] / axis.size])


def start_even(
    spec: ParamSpec,
    rows: Sequence[torch.Tensor],
    ends: torch.Tensor | None,
    scores: torch.Tensor | None,
    opens: bool,
    packed: Packed = None,
) -> Pending:
    """Begin to send row ``r`` of each of ``rows[ranks, experts here, capacity, ...]`` to rank ``r``."""
    engine, axis = spec.engine, spec.divided_over
    if opens:
        _compare_capacities(spec, rows[0], ends, scores)
    _note_rounding(spec, "even", rows, packed)
    size, table = sum(t.nbytes for t in rows), [[1] * axis.size] * axis.size
    if spec.expert_levels is not None and spec.expert_levels.pay(table, size // axis.size):
        return _start_by_levels(spec, spec.expert_levels, rows, table)
    flight = transport_for(axis, engine.dry).all_to_all(axis, rows)
    return Pending(engine.traffic, flight, engine.traffic.add(even_cost(axis, size, direction_now())))


def _compare_capacities(
    spec: ParamSpec, x: torch.Tensor, ends: torch.Tensor | None, scores: torch.Tensor | None
) -> None:
    """Wait until each rank has told what it is about to send: how many rows it has for each expert, where it drops some,
    its capacity, and whether its router answers NaN."""
    engine, axis, capacity = spec.engine, spec.divided_over, x.shape[2]
    experts = spec.full_shape[0]
    told = torch.zeros(experts + 2, dtype=torch.int32, device=x.device)
    told[-2] = capacity
    if scores is not None:
        told[-1] = scores.isnan().any()
    if ends is not None:
        told[:-2] = ends.diff(prepend=ends.new_zeros(1))
    flight = transport_for(axis, engine.dry).all_to_all(axis, [told.expand(axis.size, -1)])
    counted = engine.traffic.add(counts_cost(axis, experts + 1, direction_now()))
    (all_told,) = flight.wait()
    engine.traffic.exposed[counted] += flight.exposed_seconds
    if compat.is_fake(all_told):
        return
    _refuse_nan(spec, all_told[:, -1])
    capacities = all_told[:, -2].tolist()
    if any(c != capacity for c in capacities):
        raise RuntimeError(
            f"the experts of {spec.name} take {capacities} rows each from ranks {list(axis.ranks)}: fixed sizes want the "
            "same number everywhere. Give every rank as many tokens (pad the batch), or do without a capacity: drop "
            "dspass.experts.capacity_factor or, where the model has its own, write its experts with dspass.experts(...)."
        )
    if ends is not None:
        engine.routing.counted(spec, all_told[:, :-2], capacity)


def gather_experts(spec: ParamSpec, here: torch.Tensor) -> torch.Tensor:
    """All experts' weights, of those of this rank's place."""
    engine, axis = spec.engine, spec.divided_over
    (full,) = transport_for(axis, engine.dry).all_gather(axis, [here], [spec.full_shape[0]]).wait()
    engine.traffic.add(Collective.on(axis, "all-gather", direction_now(), here.nbytes * (axis.size - 1)))
    return full


def reduce_experts(spec: ParamSpec, grad: torch.Tensor) -> torch.Tensor:
    """The sum over ranks of gradients of all experts' weights, those of this rank's place."""
    engine, axis = spec.engine, spec.divided_over
    (here,) = transport_for(axis, engine.dry).reduce_scatter(axis, [grad.to(spec.reduce_dtype)]).wait()
    engine.traffic.add(Collective.on(axis, "reduce-scatter", "backward", here.nbytes * (axis.size - 1)))
    return here.to(grad.dtype)


def start_dispatch(
    spec: ParamSpec,
    rows: Sequence[torch.Tensor],
    splits: torch.Tensor,
    packed: Packed = None,
) -> Pending:
    """Begin to send rows, in the order of experts, to the ranks that hold them; tensors of one call have as many."""
    size = rows[0].shape[0]
    arrivals = expected_arrivals(spec, size) if compat.is_fake(rows[0]) else None
    table = _table(spec, size, splits, arrivals)
    spec.engine.routing.dispatched(spec, size - sum(table[spec.divided_over.rank]))
    _note_rounding(spec, "dispatch", rows, packed)
    return _start_rows(spec, rows, table)


def start_combine(
    spec: ParamSpec,
    rows: Sequence[torch.Tensor],
    splits: torch.Tensor,
    size: int,
    packed: Packed = None,
) -> Pending:
    """Begin to send rows back; ``size`` is how many there were."""
    table = _table(spec, size, splits, rows[0].shape[0])
    lost = size - sum(table[spec.divided_over.rank])
    _note_rounding(spec, "combine", rows, packed)
    back = _start_rows(spec, rows, turned(table))
    return back.then(lambda found: [torch.cat([t, t.new_zeros((lost, *t.shape[1:]))]) for t in found]) if lost else back


def _start_rows(spec: ParamSpec, rows: Sequence[torch.Tensor], table: Table) -> Pending:
    engine = spec.engine
    axis, row_bytes = spec.divided_over, sum(prod(t.shape[1:]) * t.dtype.itemsize for t in rows)
    if spec.expert_levels is not None and spec.expert_levels.pay(table, row_bytes):
        return _start_by_levels(spec, spec.expert_levels, rows, table)
    sent, received = table[axis.rank], [row[axis.rank] for row in table]
    flight = transport_for(axis, engine.dry).exchange(axis, rows, sent, received)
    cost = rows_cost(axis, (sum(sent) - sent[axis.rank]) * row_bytes, direction_now())
    return Pending(engine.traffic, flight, engine.traffic.add(cost))


def _start_by_levels(spec: ParamSpec, levels: Levels, rows: Sequence[torch.Tensor], table: Table) -> Pending:
    engine = spec.engine
    rank, row_bytes = spec.divided_over.rank, sum(prod(t.shape[1:]) * t.dtype.itemsize for t in rows)
    inside, across = map(engine.traffic.add, level_costs(levels, rank, table, row_bytes, direction_now()))
    waited, flight = exchange_by_levels(levels, rank, rows, table, engine.dry)
    engine.traffic.exposed[inside] += waited
    return Pending(engine.traffic, flight, across)


def _note_rounding(spec: ParamSpec, kind: RowsKind, rows: Sequence[torch.Tensor], packed: Packed) -> None:
    """What rounding has changed of the first rows of their kind that this rank sends in few bits."""
    engine = spec.engine
    if packed is None or compat.is_fake(rows[0]) or not rows[0].numel():
        return
    key = (spec.key, direction_now(), kind, packed[1])
    if key not in engine.row_errors:
        codes, scales = (t.flatten(0, -2) for t in rows)
        engine.row_errors[key] = rounding_squares(codes, scales, *packed)


def expected_arrivals(spec: ParamSpec, size: Any) -> Any:
    """How many rows come to the busiest rank where each sends ``size``, which may be a symbol."""
    axis = spec.divided_over
    thousandths = round(1000 * min(spec.engine.expected_imbalance, axis.size))
    return -(-size * thousandths // 1000)


def _table(spec: ParamSpec, size: int, splits: torch.Tensor, arrivals: int | None) -> Table:
    """How many rows each rank has for each other one; of fake tensors so that there are ``arrivals``."""
    if compat.is_fake(splits):
        assert arrivals is not None
        return expected_table(spec.divided_over, size, arrivals)
    table: Table = splits.tolist()
    return table


def _refuse_other_ways(spec: ParamSpec, ways: Sequence[int]) -> None:
    """Raise where ranks exchange a layer's rows in other numbers of chunks or of parts of the batch."""
    for place, way in enumerate(ways):
        if way != ways[0]:
            (one, first), (other, its) = (divmod(w, _MOST_CHUNKS) for w in (ways[0], way))
            ranks = spec.divided_over.ranks
            raise RuntimeError(
                f"rank {ranks[0]} sends rows to the experts of {spec.layer} for {one} parts of the batch in {first} chunks, "
                f"rank {ranks[place]} for {other} in {its}. Give every rank a batch of the same first dimension "
                "(drop_last=True), or write dspass.experts.batch_parts: 1 and a number for dspass.experts.chunks."
            )


def _refuse_nan(spec: ParamSpec, bad: torch.Tensor) -> None:
    """Raise where a rank has told that its router answers NaN: ``bad[ranks]`` is not 0."""
    lost = bad.nonzero().flatten().tolist()
    if lost:
        raise RuntimeError(
            f"the router of {spec.name} answers NaN on rank {spec.divided_over.ranks[lost[0]]}: its tokens have no experts. "
            "Look for a loss or a gradient that was not finite in the step before (a lower learning rate, gradient_clipping, "
            "bf16 in place of fp16)."
        )
