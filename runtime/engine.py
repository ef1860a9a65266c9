"""What one sharded model's run knows: its parameters, gathered copies, waiting gradients, and counters.

The graph's nodes that end here are those of :mod:`dspass.runtime.collectives`, above all ``gather_start``, ``gather_wait``,
``reduce_start`` and ``reduce_wait``. A ZeRO stage is only a rule about two lifetimes:

===== ============================================== ===================================
stage a gathered copy lives                           gradients are reduced
===== ============================================== ===================================
0     (parameters are whole)                          at the last backward of the step
1     until the optimiser changes the shard           at the last backward of the step
2     the same                                        at each backward
3     until its last use in the graph                 at each backward
===== ============================================== ===================================

The backward graph asks for its gathers at every stage; at stages 1 and 2 the answer is the copy at hand. That keeps one
graph for all stages. So stage 3 can have the lifetimes of stage 1 while a pipeline runs the micro-batches of one call
(:attr:`Engine.keeps_for_call`): each parameter is gathered once a call and not once a micro-batch, and each gradient reduced
once. Dropped: giving stages 1 and 2 a graph input with the gathered copy. It needs a second kind of
graph, and the copy's life would be decided outside of the pass pipeline.

A step's last backward also averages what its own graphs did not: at stage 1 the gradients that an earlier call left for a
parameter which the last one does not use, at stage 0 those of parameters that are used in eager code. That is done when
autograd has filled every ``.grad``. An average of averages is the same average, so at stage 0 it is right for any mix.
"""

from __future__ import annotations

import contextlib
import itertools
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, Literal

import torch

from dspass.runtime import compat
from dspass.runtime.axis import StageMesh
from dspass.runtime.formats import format_of
from dspass.runtime.host_states import HostStates
from dspass.runtime.levels import Levels, Table, exchange_by_levels
from dspass.runtime.params import Over, Packed, ParamSpec, register
from dspass.runtime.program import Probe
from dspass.runtime.quantise import blocks_of, rounding_squares
from dspass.runtime.routing import Routing
from dspass.runtime.stepping import Optimizer
from dspass.runtime.traffic import (
    Collective,
    CollectiveKey,
    Direction,
    TrafficCounter,
    counts_cost,
    even_cost,
    even_parts,
    expected_table,
    gather_cost,
    level_costs,
    mean_cost,
    packed_gather_cost,
    packed_reduce_cost,
    reduce_cost,
    reduction_steps,
    rows_cost,
    turned,
)
from dspass.runtime.transport import InFlight, transport_for

if TYPE_CHECKING:
    from dspass.runtime.fake_quantise import Schedule

_numbers = itertools.count()

#: What rows are sent for: to their experts, back from them, or one of the two in fixed sizes.
RowsKind = Literal["dispatch", "combine", "even"]

#: Gradients averaged at the end of a backward travel in buffers of this size.
_LEFT_OVER_BYTES = 25 * 2**20


@dataclass(kw_only=True, eq=False)
class Engine:
    """The state of one model under one configuration on this rank."""

    stage: int
    accumulation_steps: int = 1
    name: str = field(default_factory=lambda: f"m{next(_numbers)}")
    #: The model: parameters that nothing has to be done for on one rank have no specs, and memory all the same.
    root: weakref.ref[torch.nn.Module] | None = None
    #: The model in words, the same in every run of it: plans that are saved are for one model.
    model: str = ""
    specs: dict[str, ParamSpec] = field(default_factory=dict)
    traffic: TrafficCounter = field(default_factory=TrafficCounter)
    #: What routers did in the last step, where experts are divided over ranks.
    routing: Routing = field(default_factory=Routing)
    no_sync_depth: int = 0
    started: bool = False
    #: Holds buffers as ever and sends nothing: the planner runs a step on fake tensors through it.
    dry: bool = False
    #: Stage 0: parameters may also be used in eager code, where no pass sees them (graph breaks, weights tied to a module
    #: outside of the compiled one), so all of ``.grad`` is averaged at the end of the backward, and nothing in the graph.
    deferred: bool = False
    #: What the compiler keeps with the model: its segments and a record of each graph. The runtime reads neither.
    compiler: Any = None
    #: What the planner has generated code with, by Inductor's settings: stages that are alike, and a stage that is planned
    #: again, have segments in common.
    simulators: dict[str, Any] = field(default_factory=dict)
    #: What a prediction supposes to step the parameters (``dspass.explain``); None where there is a real one.
    supposed_optimizer: Optimizer | None = None
    #: The kind of device that a prediction is for; None where the model runs on the devices of its own tensors.
    target: str | None = None
    #: Stage 3 in a pipeline: gathered copies live until the call ends, and gradients are reduced at its last backward.
    keeps_for_call: bool = False
    #: Where pipeline stages lie, if the model is divided into some.
    stages: StageMesh | None = None
    #: How many rows the busiest rank of an expert axis is expected to get, over the mean.
    expected_imbalance: float = 1.0
    #: Parts of the batch that take turns around layers of experts; None before ranks have agreed on it.
    batch_parts: int | None = None
    #: By parameter, what its rounding is off by where it is gathered in few bits; see :mod:`dspass.quantising`.
    quantised_errors: dict[str, float] = field(default_factory=dict)
    #: What rounding is taken to change of gradients that are reduced in few bits, as added squares of that and of the
    #: gradients, by parameter; of the first that were sent.
    gradient_errors: dict[str, torch.Tensor] = field(default_factory=dict)
    #: What rounding is taken to change of rows that go to experts in few bits, as added squares of that and of the rows, by
    #: their weight, direction, kind and width; of the first that were sent.
    row_errors: dict[tuple[str, str, str, int], torch.Tensor] = field(default_factory=dict)
    #: What is rounded while it trains, ("weight" or "activation", name); see :mod:`dspass.fake_quantising`.
    roundings: dict[tuple[Literal["weight", "activation"], str], Schedule] = field(default_factory=dict)
    #: Parameters whose optimiser states wait on the host between steps.
    host_states: HostStates = field(default_factory=HostStates)
    compilations: list[Any] = field(default_factory=list)
    probe: Probe = field(default_factory=Probe)
    measurement: Any = None
    first_call_peak_bytes: int | None = None
    config: Any = None
    steps: int = 0
    step_seconds: float | None = None
    _step_began: float | None = None
    _resident: dict[str, tuple[tuple[int, int], torch.Tensor]] = field(default_factory=dict)
    _in_node: dict[str, tuple[tuple[int, int], torch.Tensor]] = field(default_factory=dict)
    _waiting: dict[str, tuple[int, torch.Tensor]] = field(default_factory=dict)  # with the run that began it
    _errors: dict[str, tuple[int, torch.Tensor]] = field(default_factory=dict)  # with the step that they began in
    _local: set[str] = field(default_factory=set)
    _averaged: set[str] = field(default_factory=set)  # by the graphs of the run at hand
    _run: int = -1
    _calls: int = 0
    _within_no_sync: bool = False
    _last: bool = True
    _last_of_call: bool | None = None

    @property
    def lifetimes(self) -> int:
        """The stage whose lifetimes copies and gradients have."""
        return 1 if self.stage == 3 and self.keeps_for_call else self.stage

    def add(self, spec: ParamSpec) -> ParamSpec:
        register(spec)
        self.specs[spec.key] = spec
        return spec

    # -- gathers ---------------------------------------------------------------------------------------------------

    def start_gather(
        self, specs: Sequence[ParamSpec], shards: Sequence[torch.Tensor], over: Over = None
    ) -> Gather | Exchange:
        """Begin to make whole copies, in compute precision, of parameters that share an axis; ``over`` "node" of what the
        ranks of this node kept, where each of ``specs`` was, and since the optimiser last stepped."""
        if over is not None:
            kept = [self._in_node.get(spec.key) for spec in specs]
            fresh = [k[1] for k, shard in zip(kept, shards, strict=True) if k is not None and k[0] == _state(shard)]
            if len(fresh) == len(specs):
                return self._gather_kept(specs, fresh, over)
        ready: dict[str, torch.Tensor] = {}
        missing: list[tuple[ParamSpec, torch.Tensor]] = []
        for spec, shard in zip(specs, shards, strict=True):
            held = self._resident.get(spec.key)
            if spec.layout != "shard":
                ready[spec.key] = shard.to(spec.compute_dtype)
            elif held is not None and held[0] == _state(shard):
                ready[spec.key] = held[1]
            else:
                missing.append((spec, shard))
        flight = None
        counted = None
        if missing:
            axis = missing[0][0].shard_axis
            assert axis is not None
            sent = [shard.detach().to(spec.compute_dtype) for spec, shard in missing]
            if axis.size == 1:
                ready.update({spec.key: shard for (spec, _), shard in zip(missing, sent, strict=True)})
                missing = []
            else:
                flight = transport_for(axis, self.dry).all_gather(axis, sent, [spec.shape[0] for spec, _ in missing])
                cost = gather_cost([spec for spec, _ in missing], _direction())
                counted = self.traffic.add(cost) if cost is not None else None
        return Gather(self, [s.key for s in specs], ready, missing, flight, counted)

    def _gather_kept(self, specs: Sequence[ParamSpec], kept: Sequence[torch.Tensor], over: Over) -> Exchange:
        axis, cost = specs[0].axis(over), gather_cost(specs, _direction(), over)
        assert cost is not None
        flight = transport_for(axis, self.dry).all_gather(axis, kept, [spec.shape[0] for spec in specs])
        return Exchange(self, flight, self.traffic.add(cost))

    def keep_in_node(
        self, specs: Sequence[ParamSpec], whole: Sequence[torch.Tensor], shards: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Keep this rank's rows of whole copies of ``shards``, as they are divided over the ranks of a node."""
        for spec, full, shard in zip(specs, whole, shards, strict=True):
            known = self._in_node.get(spec.key)
            if known is None or known[0] != _state(shard):
                self._in_node[spec.key] = _state(shard), full.narrow(0, *spec.axis("node").rows(spec.shape[0])).clone()
        return [self._in_node[spec.key][1] for spec in specs]

    def start_packed_gather(self, specs: Sequence[ParamSpec], packed: Sequence[torch.Tensor]) -> Exchange:
        """Begin the all-gather of a bucket that the graph has quantised: each of ``packed`` is this rank's row."""
        axis = specs[0].axis(None)
        flight = transport_for(axis, self.dry).all_gather(axis, packed, [axis.size] * len(packed))
        cost = packed_gather_cost(specs, sum(p.nbytes for p in packed), _direction())
        return Exchange(self, flight, self.traffic.add(cost))

    # -- experts ---------------------------------------------------------------------------------------------------

    def start_counts(
        self, spec: ParamSpec, ends: torch.Tensor, scores: torch.Tensor | None, chunks: int, parts: int
    ) -> Exchange:
        """Begin to tell each rank how many rows come for each of its experts, which are computed in so many ``chunks``, for
        one of so many ``parts`` of the batch.

        It is told of all experts, a few hundred numbers, for the report. Megatron-LM's dispatcher gathers as much. The host
        reads them, once for all that is sent by them: on a GPU each time would wait for all that it has begun.
        """
        axis = spec.divided_over
        counts = ends.diff(prepend=ends.new_zeros(1)).to(torch.int32)
        bad = counts.new_zeros(1) if scores is None else scores.isnan().any().to(torch.int32)[None]
        way = chunks + _MOST_CHUNKS * parts
        told = torch.cat([counts, bad + 2 * way]).expand(axis.size, -1)
        flight = transport_for(axis, self.dry).all_to_all(axis, [told])
        counted = self.traffic.add(counts_cost(axis, ends.shape[0], _direction()))

        def arrived(results: list[torch.Tensor]) -> list[torch.Tensor]:
            (all_told,) = results
            on_host = all_told.cpu()
            if not compat.is_fake(all_told):
                _refuse_nan(spec, on_host[:, -1] % 2)
                _refuse_other_ways(spec, (on_host[:, -1] // 2).tolist())
                self.routing.counted(spec, all_told[:, :-1])
            here = ends.shape[0] // axis.size
            by_rank = on_host[:, :-1].reshape(axis.size, axis.size, here)
            splits = [part.sum(2, dtype=torch.int32) for part in by_rank.split(even_parts(here, chunks), dim=2)]
            return [all_told[:, axis.rank * here : (axis.rank + 1) * here].contiguous(), *splits]

        return Exchange(self, flight, counted, arrived)

    def start_mean(self, spec: ParamSpec, values: torch.Tensor) -> Exchange:
        """Begin to average small values over the data axis."""
        axis = spec.shard_axis
        assert axis is not None, f"{spec.name} is not on the data axis"
        flight = transport_for(axis, self.dry).all_reduce(axis, [values])
        counted = self.traffic.add(mean_cost(axis, values.nbytes, _direction()))
        return Exchange(self, flight, counted, lambda sums: [sums[0] / axis.size])

    def start_even(
        self,
        spec: ParamSpec,
        rows: Sequence[torch.Tensor],
        ends: torch.Tensor | None,
        scores: torch.Tensor | None,
        opens: bool,
        packed: Packed = None,
    ) -> Exchange:
        """Begin to send row ``r`` of each of ``rows[ranks, experts here, capacity, ...]`` to rank ``r``."""
        axis = spec.divided_over
        if opens:
            self._compare_capacities(spec, rows[0], ends, scores)
        self._note_rounding(spec, "even", rows, packed)
        size, table = sum(t.nbytes for t in rows), [[1] * axis.size] * axis.size
        if spec.expert_levels is not None and spec.expert_levels.pay(table, size // axis.size):
            return self._start_by_levels(spec, spec.expert_levels, rows, table)
        flight = transport_for(axis, self.dry).all_to_all(axis, rows)
        return Exchange(self, flight, self.traffic.add(even_cost(axis, size, _direction())))

    def _compare_capacities(
        self, spec: ParamSpec, x: torch.Tensor, ends: torch.Tensor | None, scores: torch.Tensor | None
    ) -> None:
        """Wait until each rank has told what it is about to send: how many rows it has for each expert, where it drops some,
        its capacity, and whether its router answers NaN."""
        axis, capacity = spec.divided_over, x.shape[2]
        experts = spec.full_shape[0]
        told = torch.zeros(experts + 2, dtype=torch.int32, device=x.device)
        told[-2] = capacity
        if scores is not None:
            told[-1] = scores.isnan().any()
        if ends is not None:
            told[:-2] = ends.diff(prepend=ends.new_zeros(1))
        flight = transport_for(axis, self.dry).all_to_all(axis, [told.expand(axis.size, -1)])
        counted = self.traffic.add(counts_cost(axis, experts + 1, _direction()))
        (all_told,) = flight.wait()
        self.traffic.exposed[counted] += flight.exposed_seconds
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
            self.routing.counted(spec, all_told[:, :-2], capacity)

    def gather_experts(self, spec: ParamSpec, here: torch.Tensor) -> torch.Tensor:
        """All experts' weights, of those of this rank's place."""
        axis = spec.divided_over
        (full,) = transport_for(axis, self.dry).all_gather(axis, [here], [spec.full_shape[0]]).wait()
        self.traffic.add(Collective.on(axis, "all-gather", _direction(), here.nbytes * (axis.size - 1)))
        return full

    def reduce_experts(self, spec: ParamSpec, grad: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of gradients of all experts' weights, those of this rank's place."""
        axis = spec.divided_over
        (here,) = transport_for(axis, self.dry).reduce_scatter(axis, [grad.to(spec.reduce_dtype)]).wait()
        self.traffic.add(Collective.on(axis, "reduce-scatter", "backward", here.nbytes * (axis.size - 1)))
        return here.to(grad.dtype)

    def start_dispatch(
        self,
        spec: ParamSpec,
        rows: Sequence[torch.Tensor],
        splits: torch.Tensor,
        packed: Packed = None,
    ) -> Exchange:
        """Begin to send rows, in the order of experts, to the ranks that hold them; tensors of one call have as many."""
        size = rows[0].shape[0]
        arrivals = self.expected_arrivals(spec, size) if compat.is_fake(rows[0]) else None
        table = self._table(spec, size, splits, arrivals)
        self.routing.dispatched(spec, size - sum(table[spec.divided_over.rank]))
        self._note_rounding(spec, "dispatch", rows, packed)
        return self._start_rows(spec, rows, table)

    def start_combine(
        self,
        spec: ParamSpec,
        rows: Sequence[torch.Tensor],
        splits: torch.Tensor,
        size: int,
        packed: Packed = None,
    ) -> Exchange:
        """Begin to send rows back; ``size`` is how many there were."""
        table = self._table(spec, size, splits, rows[0].shape[0])
        lost = size - sum(table[spec.divided_over.rank])
        self._note_rounding(spec, "combine", rows, packed)
        exchange = self._start_rows(spec, rows, turned(table))
        if lost:
            exchange.then = lambda results: [torch.cat([t, t.new_zeros((lost, *t.shape[1:]))]) for t in results]
        return exchange

    def _start_rows(self, spec: ParamSpec, rows: Sequence[torch.Tensor], table: Table) -> Exchange:
        axis, row_bytes = spec.divided_over, sum(prod(t.shape[1:]) * t.dtype.itemsize for t in rows)
        if spec.expert_levels is not None and spec.expert_levels.pay(table, row_bytes):
            return self._start_by_levels(spec, spec.expert_levels, rows, table)
        sent, received = table[axis.rank], [row[axis.rank] for row in table]
        flight = transport_for(axis, self.dry).exchange(axis, rows, sent, received)
        cost = rows_cost(axis, (sum(sent) - sent[axis.rank]) * row_bytes, _direction())
        return Exchange(self, flight, self.traffic.add(cost))

    def _start_by_levels(self, spec: ParamSpec, levels: Levels, rows: Sequence[torch.Tensor], table: Table) -> Exchange:
        rank, row_bytes = spec.divided_over.rank, sum(prod(t.shape[1:]) * t.dtype.itemsize for t in rows)
        inside, across = map(self.traffic.add, level_costs(levels, rank, table, row_bytes, _direction()))
        waited, flight = exchange_by_levels(levels, rank, rows, table, self.dry)
        self.traffic.exposed[inside] += waited
        return Exchange(self, flight, across)

    def _note_rounding(self, spec: ParamSpec, kind: RowsKind, rows: Sequence[torch.Tensor], packed: Packed) -> None:
        """What rounding has changed of the first rows of their kind that this rank sends in few bits."""
        if packed is None or compat.is_fake(rows[0]) or not rows[0].numel():
            return
        key = (spec.key, _direction(), kind, packed[1])
        if key not in self.row_errors:
            codes, scales = (t.flatten(0, -2) for t in rows)
            self.row_errors[key] = rounding_squares(codes, scales, *packed)

    def expected_arrivals(self, spec: ParamSpec, size: Any) -> Any:
        """How many rows come to the busiest rank where each sends ``size``, which may be a symbol."""
        axis = spec.divided_over
        thousandths = round(1000 * min(self.expected_imbalance, axis.size))
        return -(-size * thousandths // 1000)

    def _table(self, spec: ParamSpec, size: int, splits: torch.Tensor, arrivals: int | None) -> Table:
        """How many rows each rank has for each other one; of fake tensors so that there are ``arrivals``."""
        if compat.is_fake(splits):
            assert arrivals is not None
            return expected_table(spec.divided_over, size, arrivals)
        table: Table = splits.tolist()
        return table

    # -- reductions ------------------------------------------------------------------------------------------------

    def start_packed_reduce(
        self, specs: Sequence[ParamSpec], packed: Sequence[torch.Tensor], format: str, over: Over = None
    ) -> Exchange:
        """Begin the all-to-all of a bucket of gradients that the graph has quantised, and sums once it has arrived: row ``r``
        of each of ``packed`` is for rank ``r``. Only at stage 3, where no gradient of an earlier call waits to be added."""
        assert self.lifetimes == 3
        self._is_last_backward()
        axis = specs[0].axis(over)
        if over != "across":  # what goes there has been rounded before
            self._note_gradients(specs, packed, format)
        flight = transport_for(axis, self.dry).all_to_all(axis, packed)
        return Exchange(self, flight, self.traffic.add(packed_reduce_cost(specs, sum(p.nbytes for p in packed), over)))

    def _note_gradients(self, specs: Sequence[ParamSpec], packed: Sequence[torch.Tensor], format: str) -> None:
        """What rounding has changed of the first gradients that are finite, of each parameter of a bucket."""
        if compat.is_fake(packed[0]) or all(spec.key in self.gradient_errors for spec in specs):
            return
        ranks, how = specs[0].axis(None).size, format_of(format)
        codes, scales = (t.view(ranks, -1) for t in packed)
        block = codes.shape[1] // max(scales.shape[1], 1) * 8 // how.bits or 1  # of parameters without values
        at = 0
        for spec in specs:
            size = spec.padded_numel // ranks
            its = slice(at, at + blocks_of(size, block))
            bytes_of_it = slice(how.code_bytes(its.start * block), how.code_bytes(its.stop * block))
            sums = rounding_squares(codes[:, bytes_of_it], scales[:, its], format, size)
            if sums.isfinite().all():
                self.gradient_errors.setdefault(spec.key, sums)
            at = its.stop

    def rounding_errors(self, specs: Sequence[ParamSpec], reset: int | None) -> list[torch.Tensor]:
        """What rounding earlier gradients has lost on this rank, which the graph adds to the next ones and replaces in place:
        ``bfloat16[ranks, elements]`` of each whole parameter as it is divided. Zeros at first, and again every ``reset`` steps.

        bf16 as it takes half of what fp32 does and, unlike fp16, all that a loss scale may make of a gradient; what it rounds
        off is a 256th of what is lost otherwise. Dropped: LoCo's int8 with scales, half as large again: a scale is known when
        all of its block's errors are, so writing them takes a second pass.
        """
        for spec in specs:
            known = self._errors.get(spec.key)
            if known is None:
                param = spec.param()
                assert param is not None
                ranks = spec.axis(None).size
                shape = (ranks, spec.padded_numel // ranks)
                zeros = torch.zeros(shape, dtype=torch.bfloat16, device=param.device)
                self._errors[spec.key] = self.steps, zeros
            elif reset is not None and self.steps - known[0] >= reset:
                self._errors[spec.key] = self.steps, known[1].zero_()
        return [self._errors[spec.key][1] for spec in specs]

    def start_reduce(self, specs: Sequence[ParamSpec], grads: Sequence[torch.Tensor]) -> Reduction:
        """Begin to average gradients over ranks. Yields, for each, a gradient of the parameter's own local shape."""
        last = self._is_last_backward()
        nothing_to_send = self._last_of_call is not None and not reduction_steps(specs)
        if self.lifetimes >= 2 or (last and not self.deferred) or nothing_to_send:
            self._averaged.update(s.key for s in specs)
            return self._reduce_now(specs, grads)
        if self.stage == 0:  # plain parameters gather their own sum in .grad, as under DDP's no_sync
            self._local.update(s.key for s in specs)
            return Reduction(self, specs, [g.to(s.dtype) for s, g in zip(specs, grads, strict=True)], None, [], 1)
        zeros = []
        for spec, grad in zip(specs, grads, strict=True):
            self._accumulate(spec, grad)
            zeros.append(grad.new_zeros(spec.local_shape, dtype=spec.dtype))
        return Reduction(self, specs, zeros, None, [], 1)

    def _reduce_now(self, specs: Sequence[ParamSpec], grads: Sequence[torch.Tensor]) -> Reduction:
        totals = [self._total(spec, grad).to(spec.reduce_dtype) for spec, grad in zip(specs, grads, strict=True)]
        steps = reduction_steps(specs)
        world = 1
        for axis, _, _ in steps:
            world *= axis.size
        if not steps:
            return Reduction(self, specs, totals, None, [], 1)
        counted = [self.traffic.add(cost) for cost in reduce_cost(specs)]
        axis, kind, _ = steps[0]
        transport = transport_for(axis, self.dry)
        operation = transport.reduce_scatter if kind == "reduce-scatter" else transport.all_reduce
        return Reduction(self, specs, None, operation(axis, totals), counted, world, [a for a, _, _ in steps[1:]])

    def _total(self, spec: ParamSpec, grad: torch.Tensor) -> torch.Tensor:
        """``grad`` and whatever of earlier calls of this step waits to be reduced with it."""
        if spec.key in self._local:
            self._local.discard(spec.key)
            param = spec.param()
            if param is not None and param.grad is not None:
                grad = grad + param.grad
                param.grad = None
            return grad
        waiting = self._take_waiting(spec)
        return grad if waiting is None else waiting.add_(grad)

    def _accumulate(self, spec: ParamSpec, grad: torch.Tensor) -> None:
        waiting = self._take_waiting(spec)
        total = grad.to(spec.reduce_dtype, copy=True) if waiting is None else waiting.add_(grad)
        self._waiting[spec.key] = (self._run, total)

    def _take_waiting(self, spec: ParamSpec) -> torch.Tensor | None:
        """What earlier calls left; ``zero_grad()`` since then has dropped that too (its mark: no ``.grad``)."""
        began, waiting = self._waiting.pop(spec.key, (-1, None))
        param = spec.param()
        discarded = began != self._run and param is not None and param.grad is None
        return None if discarded else waiting

    def _is_last_backward(self) -> bool:
        """Count backwards, not graphs: several graphs of one ``loss.backward()`` share one autograd run."""
        if self._last_of_call is not None:
            return self._last_of_call
        run = compat.backward_run()
        if run != self._run or run == -1:
            self._run = run
            self._averaged.clear()
            if self._calls and self._begun_anew():
                self._forget_calls()
            self._calls += 1
            if self.no_sync_depth:
                self._within_no_sync, self._last = True, False
            else:
                self._last = self._within_no_sync or self._calls >= self.accumulation_steps
                if self._last:
                    self._within_no_sync, self._calls = False, 0
                    if self.stage < 2 and run != -1:
                        compat.at_end_of_backward(self._average_the_rest)
        return self._last

    @contextlib.contextmanager
    def one_call(self) -> Iterator[None]:
        """Inside, backwards are those of a pipeline's micro-batches: with the lifetimes of stages 0 and 1 their gradients add
        up until :meth:`backward_of_call` tells of the last. What is reduced then is the call's, not the step's: the loss that
        it belongs to may be scaled afterwards, and the next call's otherwise."""
        self._run = min(self._run, -1) - 1
        self._last_of_call = False
        try:
            yield
        finally:
            self._last_of_call = None
            self._waiting.clear()
            if self.keeps_for_call:
                self._resident.clear()

    def backward_of_call(self, last: bool) -> None:
        """The next backward is, or is not, the last of its stage's in :meth:`one_call`."""
        self._last_of_call = last

    def _begun_anew(self) -> bool:
        """Whether ``zero_grad()`` gave up a step half-way, as after a bad loss: it leaves no gradient at all."""
        params = (spec.param() for spec in self.specs.values() if spec.trains)
        return all(p is None or p.grad is None for p in params)

    def _forget_calls(self) -> None:
        self._calls, self._within_no_sync = 0, False
        self._waiting.clear()
        self._local.clear()

    @torch.no_grad()
    def _average_the_rest(self) -> None:
        """Average gradients of the step that no graph of its last backward has averaged."""
        left: list[tuple[ParamSpec, torch.Tensor]] = []
        for spec in self.specs.values():
            param = spec.param()
            if param is None or param.grad is None:
                self._waiting.pop(spec.key, None)
            elif self.stage == 0 and spec.trains and spec.key not in self._averaged and reduction_steps([spec]):
                self._local.discard(spec.key)
                left.append((spec, param.grad))
            elif spec.key in self._waiting:
                left.append((spec, self._waiting.pop(spec.key)[1]))
        for bucket in _alike(left):
            specs = [spec for spec, _ in bucket]
            for spec, mean in zip(specs, self._reduce_now(specs, [grad for _, grad in bucket]).wait(), strict=True):
                param = spec.param()
                assert param is not None
                assert param.grad is not None
                if self.stage == 0:
                    param.grad.copy_(mean)
                else:
                    param.grad.to_local().add_(mean)

    # -- the optimiser's step --------------------------------------------------------------------------------------

    def before_step(self) -> None:
        """The shards are about to change: gathered copies of them have no further use.

        Raises ``RuntimeError`` where gradients still wait to be averaged.
        """
        if self._calls and self.stage < 2 and not self._begun_anew():
            way_out = (
                "Its backwards so far ran inside of dspass.no_sync(model): run the step's last one outside of it."
                if self._within_no_sync
                else "Run all that gradient_accumulation_steps asks for, set it to the number that you run, or mark all "
                "but the last with dspass.no_sync(model)."
            )
            raise RuntimeError(
                f"optimizer.step() after call {self._calls} of {self.accumulation_steps}: at stage {self.stage} gradients "
                f"are averaged over ranks at the last call of a step, so these differ from rank to rank. {way_out}"
            )
        self._forget_calls()
        self._resident.clear()
        self._in_node.clear()
        if self.probe.ledger is not None:
            self.probe.ledger.mark("optimizer.step", "optimizer")

    def after_step(self) -> None:
        """A step has ended: its counters become those of the last whole step."""
        self.traffic.end_step()
        self.routing.end_step()
        self.steps += 1
        now = time.perf_counter()
        # A step that is watched takes longer: it counts only where no other is known.
        if self._step_began is not None and (self.probe.ledger is None or self.step_seconds is None):
            self.step_seconds = now - self._step_began
        self._step_began = now
        if self.probe.ledger is not None:
            self.probe.ledger.mark("between steps", "forward")

    def forget(self) -> None:
        """Begin as an engine that has not run yet: no copies, no gradients, no counts, nobody who watches."""
        self.traffic, self.routing, self.probe = TrafficCounter(), Routing(), Probe()
        self.gradient_errors, self.row_errors = {}, {}
        self._resident, self._in_node, self._waiting, self._errors = {}, {}, {}, {}
        self._local, self._averaged = set(), set()
        self._run, self._calls, self._within_no_sync, self._last = -1, 0, False, True

    def params(self) -> dict[str, torch.Tensor]:
        """The model's parameters that this rank has a part in by name, also those that no rank shares, which have no specs."""
        known = {spec: param for spec in self.specs.values() if (param := spec.param()) is not None}
        root = self.root() if self.root is not None else None
        names = {id(param) for param in known.values()}
        others = root.named_parameters() if root is not None else ()
        here = {spec.name: param for spec, param in known.items() if not spec.is_elsewhere}
        return {**here, **{n: p for n, p in others if id(p) not in names}}

    def resident_copies(self) -> list[torch.Tensor]:
        """Gathered copies that outlive their graph (stages 1 and 2), and rows of them that are kept in the node."""
        return [copy for _, copy in (*self._resident.values(), *self._in_node.values())]

    def waiting_gradients(self) -> list[torch.Tensor]:
        """Whole gradients of earlier calls that wait to be reduced (stage 1)."""
        return [waiting for _, waiting in self._waiting.values()]

    def kept_errors(self) -> list[torch.Tensor]:
        """What rounding has lost of gradients so far; see :meth:`rounding_errors`."""
        return [error for _, error in self._errors.values()]


#: More chunks than this no rank can tell the others of.
_MOST_CHUNKS = 2**14


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


def _alike(found: Sequence[tuple[ParamSpec, torch.Tensor]]) -> list[list[tuple[ParamSpec, torch.Tensor]]]:
    """In lists that one reduction can take: same layout and precision, not too large."""
    buckets: dict[Any, list[list[tuple[ParamSpec, torch.Tensor]]]] = {}
    for spec, grad in found:
        filled = buckets.setdefault((spec.layout, spec.reduce_dtype), [[]])
        if filled[-1] and sum(s.reduced_bytes for s, _ in filled[-1]) + spec.reduced_bytes > _LEFT_OVER_BYTES:
            filled.append([])
        filled[-1].append((spec, grad))
    return [bucket for filled in buckets.values() for bucket in filled]


class Gather:
    """A gather under way."""

    def __init__(
        self,
        engine: Engine,
        keys: list[str],
        ready: dict[str, torch.Tensor],
        missing: list[tuple[ParamSpec, torch.Tensor]],
        flight: InFlight | None,
        counted: CollectiveKey | None,
    ) -> None:
        self._engine, self._keys, self._ready = engine, keys, ready
        self._missing, self._flight, self._counted = missing, flight, counted

    def tensors(self) -> list[torch.Tensor]:
        """What is being filled."""
        return self._flight.results if self._flight is not None else []

    def wait(self) -> list[torch.Tensor]:
        """The whole parameters, in the order that was asked for."""
        if self._flight is not None:
            arrived = self._flight.wait()
            if self._counted is not None:
                self._engine.traffic.exposed[self._counted] += self._flight.exposed_seconds
            for (spec, shard), full in zip(self._missing, arrived, strict=True):
                self._ready[spec.key] = full
                if self._engine.lifetimes in (1, 2):
                    self._engine._resident[spec.key] = (_state(shard), full)
        ready, self._ready, self._missing, self._flight = self._ready, {}, [], None
        return [ready[key] for key in self._keys]


class Exchange:
    """What is under way and arrives as the graph wants it: a quantised bucket in either direction, one from this node, or rows
    for experts."""

    def __init__(
        self,
        engine: Engine,
        flight: InFlight,
        counted: CollectiveKey,
        then: Callable[[list[torch.Tensor]], list[torch.Tensor]] | None = None,
    ) -> None:
        self._engine, self._flight, self._counted, self.then = engine, flight, counted, then

    def tensors(self) -> list[torch.Tensor]:
        """What is being filled."""
        return self._flight.results

    def wait(self) -> list[torch.Tensor]:
        """Codes and scales, a row of each rank; or whole parameters; or rows of experts."""
        arrived = self._flight.wait()
        self._engine.traffic.exposed[self._counted] += self._flight.exposed_seconds
        return arrived if self.then is None else self.then(arrived)


class Reduction:
    """A reduction under way."""

    def __init__(
        self,
        engine: Engine,
        specs: Sequence[ParamSpec],
        results: list[torch.Tensor] | None,
        flight: InFlight | None,
        counted: list[CollectiveKey],
        world: int,
        then: Sequence = (),
    ) -> None:
        self._engine, self._specs, self._results = engine, specs, results
        self._flight, self._counted, self._world, self._then = flight, counted, world, then

    def tensors(self) -> list[torch.Tensor]:
        """What is being filled."""
        return self._flight.results if self._flight is not None else []

    def wait(self) -> list[torch.Tensor]:
        """The averaged gradients in the parameters' own precision and local shapes."""
        if self._flight is None:
            assert self._results is not None
            results, self._results = self._results, None
            return [r.to(s.dtype) for r, s in zip(results, self._specs, strict=True)]
        flight, self._flight = self._flight, None
        summed = flight.wait()
        self._engine.traffic.exposed[self._counted[0]] += flight.exposed_seconds
        for axis, counted in zip(self._then, self._counted[1:], strict=True):
            second = transport_for(axis, self._engine.dry).all_reduce(axis, summed)
            summed = second.wait()
            self._engine.traffic.exposed[counted] += second.exposed_seconds
        torch._foreach_div_(summed, self._world)
        return [s.to(spec.dtype) for s, spec in zip(summed, self._specs, strict=True)]


def _state(shard: torch.Tensor) -> tuple[int, int]:
    """Changes whenever the shard's values may have: every in-place operation raises the version."""
    return shard.untyped_storage()._cdata, shard._version


def _direction() -> Direction:
    return "forward" if compat.backward_run() == -1 else "backward"
