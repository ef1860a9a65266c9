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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, Literal

import torch

from dspass.runtime import compat
from dspass.runtime.axis import StageMesh
from dspass.runtime.formats import format_of
from dspass.runtime.host_states import HostStates
from dspass.runtime.params import Over, ParamSpec, register
from dspass.runtime.pending import Arrived, Pending
from dspass.runtime.program import Probe
from dspass.runtime.quantise import blocks_of, rounding_squares
from dspass.runtime.routing import Routing
from dspass.runtime.stepping import Optimizer
from dspass.runtime.traffic import (
    CollectiveKey,
    TrafficCounter,
    direction_now,
    gather_cost,
    packed_gather_cost,
    packed_reduce_cost,
    reduce_cost,
    reduction_steps,
)
from dspass.runtime.transport import InFlight, transport_for

if TYPE_CHECKING:
    from dspass.runtime.fake_quantise import Schedule

_numbers = itertools.count()

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
    #: Parameters of a compiled function, which no module here holds.
    loose: dict[str, weakref.ref[torch.Tensor]] = field(default_factory=dict)
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
    #: The kind of device of the last graph's inputs: all that is known of a compiled function, which has no model.
    inputs_on: str = "cpu"
    #: Stage 3 in a pipeline: gathered copies live until the call ends, and gradients are reduced at its last backward.
    keeps_for_call: bool = False
    #: What ranks of one stage have agreed on of that, where several plan together.
    agreed_gather: bool | None = None
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
    #: Names of those of which plans have said so.
    planned_states: set[str] = field(default_factory=set)
    #: Bytes of the smallest device of the ranks that run one plan, once they have told one another.
    capacity: int | None = None
    #: Names of parameters that are on the device or the host as a plan has said; and of those that will be so when its graph
    #: first runs, whether they wait on the host.
    placed: set[str] = field(default_factory=set)
    placing: dict[str, bool] = field(default_factory=dict)
    compilations: list[Any] = field(default_factory=list)
    probe: Probe = field(default_factory=Probe)
    measurement: Any = None
    first_call_peak_bytes: int | None = None
    config: Any = None
    steps: int = 0
    step_seconds: float | None = None
    _step_began: float | None = None
    _resident: dict[str, tuple[tuple[int | None, int], torch.Tensor]] = field(default_factory=dict)
    _packed: dict[tuple[str, ...], list[torch.Tensor]] = field(default_factory=dict)  # by the keys of a bucket
    _in_node: dict[str, tuple[tuple[int | None, int], torch.Tensor]] = field(default_factory=dict)
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

    def start_gather(self, specs: Sequence[ParamSpec], shards: Sequence[torch.Tensor], over: Over = None) -> Pending:
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
        flight, counted = InFlight([], []), None
        if missing:
            axis = missing[0][0].shard_axis
            assert axis is not None
            sent = [shard.detach().to(spec.compute_dtype) for spec, shard in missing]
            if axis.size == 1:
                ready.update({spec.key: shard for (spec, _), shard in zip(missing, sent, strict=True)})
                missing = []
            else:
                flight = transport_for(axis, self.dry).all_gather(axis, sent, [spec.shape[0] for spec, _ in missing])
                cost = gather_cost([spec for spec, _ in missing], direction_now())
                counted = self.traffic.add(cost) if cost is not None else None

        def arrived(wholes: list[torch.Tensor]) -> list[torch.Tensor]:
            for (spec, shard), whole in zip(missing, wholes, strict=True):
                ready[spec.key] = whole
                if self.lifetimes in (1, 2):
                    self._resident[spec.key] = (_state(shard), whole)
            return [ready[spec.key] for spec in specs]

        return Pending(self.traffic, flight, counted, arrived)

    def _gather_kept(self, specs: Sequence[ParamSpec], kept: Sequence[torch.Tensor], over: Over) -> Pending:
        axis, cost = specs[0].axis(over), gather_cost(specs, direction_now(), over)
        assert cost is not None
        flight = transport_for(axis, self.dry).all_gather(axis, kept, [spec.shape[0] for spec in specs])
        return Pending(self.traffic, flight, self.traffic.add(cost))

    def keep_in_node(
        self, specs: Sequence[ParamSpec], whole: Sequence[torch.Tensor], shards: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Keep this rank's rows of whole copies of ``shards``, as they are divided over the ranks of a node."""
        for spec, full, shard in zip(specs, whole, shards, strict=True):
            known = self._in_node.get(spec.key)
            if known is None or known[0] != _state(shard):
                self._in_node[spec.key] = _state(shard), full.narrow(0, *spec.axis("node").rows(spec.shape[0])).clone()
        return [self._in_node[spec.key][1] for spec in specs]

    def start_packed_gather(self, specs: Sequence[ParamSpec], packed: Sequence[torch.Tensor]) -> Pending:
        """Begin the all-gather of a bucket that the graph has quantised: each of ``packed`` is this rank's row. What lives for
        a call are codes and scales, of which each graph makes whole copies of its own."""
        keys = tuple(spec.key for spec in specs)
        if keys in self._packed:
            return Pending(self.traffic, InFlight([], list(self._packed[keys])), None)
        axis = specs[0].axis(None)
        flight = transport_for(axis, self.dry).all_gather(axis, packed, [axis.size] * len(packed))
        cost = packed_gather_cost(specs, sum(p.nbytes for p in packed), direction_now())

        def arrived(rows: list[torch.Tensor]) -> list[torch.Tensor]:
            if self.keeps_for_call:
                self._packed[keys] = rows
            return rows

        return Pending(self.traffic, flight, self.traffic.add(cost), arrived)

    # -- reductions ------------------------------------------------------------------------------------------------

    def start_packed_reduce(
        self, specs: Sequence[ParamSpec], packed: Sequence[torch.Tensor], format: str, over: Over = None
    ) -> Pending:
        """Begin the all-to-all of a bucket of gradients that the graph has quantised, and sums once it has arrived: row ``r``
        of each of ``packed`` is for rank ``r``. Only at stage 3, where no gradient of an earlier call waits to be added."""
        assert self.lifetimes == 3
        self._is_last_backward()
        axis = specs[0].axis(over)
        if over != "across":  # what goes there has been rounded before
            self._note_gradients(specs, packed, format)
        flight = transport_for(axis, self.dry).all_to_all(axis, packed)
        return Pending(
            self.traffic, flight, self.traffic.add(packed_reduce_cost(specs, sum(p.nbytes for p in packed), over))
        )

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

    def start_reduce(self, specs: Sequence[ParamSpec], grads: Sequence[torch.Tensor]) -> Pending:
        """Begin to average gradients over ranks. Yields, for each, a gradient of the parameter's own local shape."""
        last = self._is_last_backward()
        nothing_to_send = self._last_of_call is not None and not reduction_steps(specs)
        if self.lifetimes >= 2 or (last and not self.deferred) or nothing_to_send:
            self._averaged.update(s.key for s in specs)
            return self._reduce_now(specs, grads)
        if self.stage == 0:  # plain parameters gather their own sum in .grad, as under DDP's no_sync
            self._local.update(s.key for s in specs)
            own = [grad.to(spec.dtype) for grad, spec in zip(grads, specs, strict=True)]
            return Pending(self.traffic, InFlight([], own), None)
        zeros = []
        for spec, grad in zip(specs, grads, strict=True):
            self._accumulate(spec, grad)
            zeros.append(grad.new_zeros(spec.local_shape, dtype=spec.dtype))
        return Pending(self.traffic, InFlight([], zeros), None)

    def _reduce_now(self, specs: Sequence[ParamSpec], grads: Sequence[torch.Tensor]) -> Pending:
        totals = [self._total(spec, grad).to(spec.reduce_dtype) for spec, grad in zip(specs, grads, strict=True)]
        steps = reduction_steps(specs)
        if not steps:
            return self._in_own_precision(specs, InFlight([], totals))
        counted = [self.traffic.add(cost) for cost in reduce_cost(specs)]
        axis, kind, _ = steps[0]
        transport = transport_for(axis, self.dry)
        operation = transport.reduce_scatter if kind == "reduce-scatter" else transport.all_reduce

        def arrived(sums: list[torch.Tensor]) -> list[torch.Tensor]:
            for (other, _, _), its in zip(steps[1:], counted[1:], strict=True):
                flight = transport_for(other, self.dry).all_reduce(other, sums)
                sums = flight.wait()
                self.traffic.exposed[its] += flight.exposed_seconds
            torch._foreach_div_(sums, prod(axis.size for axis, _, _ in steps))
            return sums

        return self._in_own_precision(specs, operation(axis, totals), counted[0], arrived)

    def _in_own_precision(
        self,
        specs: Sequence[ParamSpec],
        flight: InFlight,
        counted: CollectiveKey | None = None,
        then: Arrived | None = None,
    ) -> Pending:
        pending = Pending(self.traffic, flight, counted, then)
        return pending.then(lambda grads: [grad.to(spec.dtype) for grad, spec in zip(grads, specs, strict=True)])

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
                self._packed.clear()

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
        self._resident, self._packed, self._in_node, self._waiting, self._errors = {}, {}, {}, {}, {}
        self._local, self._averaged = set(), set()
        self._run, self._calls, self._within_no_sync, self._last = -1, 0, False, True

    def params(self) -> dict[str, torch.Tensor]:
        """The model's parameters that this rank has a part in by name, also those that no rank shares, which have no specs."""
        known = {spec: param for spec in self.specs.values() if (param := spec.param()) is not None}
        root = self.root() if self.root is not None else None
        names = {id(param) for param in known.values()}
        loose = ((name, p) for name, ref in self.loose.items() if (p := ref()) is not None)
        others = root.named_parameters() if root is not None else loose
        here = {spec.name: param for spec, param in known.items() if not spec.is_elsewhere}
        return {**here, **{n: p for n, p in others if id(p) not in names}}

    def resident_copies(self) -> list[torch.Tensor]:
        """Gathered copies that outlive their graph (stages 1 and 2, and codes of a call), and rows of them that are kept in the
        node."""
        copies = [copy for _, copy in (*self._resident.values(), *self._in_node.values())]
        return copies + [part for parts in self._packed.values() for part in parts]

    def waiting_gradients(self) -> list[torch.Tensor]:
        """Whole gradients of earlier calls that wait to be reduced (stage 1)."""
        return [waiting for _, waiting in self._waiting.values()]

    def kept_errors(self) -> list[torch.Tensor]:
        """What rounding has lost of gradients so far; see :meth:`rounding_errors`."""
        return [error for _, error in self._errors.values()]


def _alike(found: Sequence[tuple[ParamSpec, torch.Tensor]]) -> list[list[tuple[ParamSpec, torch.Tensor]]]:
    """In lists that one reduction can take: same layout and precision, not too large."""
    buckets: dict[Any, list[list[tuple[ParamSpec, torch.Tensor]]]] = {}
    for spec, grad in found:
        filled = buckets.setdefault((spec.layout, spec.reduce_dtype), [[]])
        if filled[-1] and sum(s.reduced_bytes for s, _ in filled[-1]) + spec.reduced_bytes > _LEFT_OVER_BYTES:
            filled.append([])
        filled[-1].append((spec, grad))
    return [bucket for filled in buckets.values() for bucket in filled]


def _state(shard: torch.Tensor) -> tuple[int | None, int]:
    """Changes whenever the shard's values may have: every in-place operation raises the version."""
    return compat.storage_of(shard), shard._version
