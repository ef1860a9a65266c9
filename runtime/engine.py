"""What one sharded model's run knows: its parameters, gathered copies, waiting gradients, and counters.

The graph holds four kinds of node that end here: ``gather_start``, ``gather_wait``, ``reduce_start`` and ``reduce_wait``
(:mod:`dspass.runtime.collectives`). A ZeRO stage is only a rule about two lifetimes:

===== ============================================== ===================================
stage a gathered copy lives                           gradients are reduced
===== ============================================== ===================================
0     (parameters are whole)                          at the last backward of the step
1     until the optimiser changes the shard           at the last backward of the step
2     the same                                        at each backward
3     until its last use in the graph                 at each backward
===== ============================================== ===================================

The backward graph asks for its gathers at every stage; at stages 1 and 2 the answer is the copy at hand. That keeps one
graph for all stages. Dropped: giving stages 1 and 2 a graph input with the gathered copy. It needs a second kind of
graph, and the copy's life would be decided outside of the pass pipeline.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dspass.runtime import compat
from dspass.runtime.params import ParamSpec, register
from dspass.runtime.program import Probe
from dspass.runtime.traffic import CollectiveKey, Direction, TrafficCounter, gather_cost, reduce_cost, reduction_steps
from dspass.runtime.transport import InFlight, transport_for

_numbers = itertools.count()


@dataclass(kw_only=True, eq=False)
class Engine:
    """The state of one model under one configuration on this rank."""

    stage: int
    accumulation_steps: int = 1
    name: str = field(default_factory=lambda: f"m{next(_numbers)}")
    specs: dict[str, ParamSpec] = field(default_factory=dict)
    traffic: TrafficCounter = field(default_factory=TrafficCounter)
    no_sync_depth: int = 0
    started: bool = False
    #: What the compiler keeps with the model: its segments and a record of each graph. The runtime reads neither.
    compiler: Any = None
    compilations: list[Any] = field(default_factory=list)
    probe: Probe = field(default_factory=Probe)
    measurement: Any = None
    config: Any = None
    steps: int = 0
    step_seconds: float | None = None
    _step_began: float | None = None
    _resident: dict[str, tuple[tuple[int, int], torch.Tensor]] = field(default_factory=dict)
    _waiting: dict[str, tuple[int, torch.Tensor]] = field(default_factory=dict)  # with the run that began it
    _local: set[str] = field(default_factory=set)
    _run: int = -1
    _calls: int = 0
    _within_no_sync: bool = False
    _last: bool = True

    def add(self, spec: ParamSpec) -> ParamSpec:
        register(spec)
        self.specs[spec.key] = spec
        return spec

    # -- gathers ---------------------------------------------------------------------------------------------------

    def start_gather(self, specs: Sequence[ParamSpec], shards: Sequence[torch.Tensor]) -> Gather:
        """Begin to make whole copies, in compute precision, of parameters that share an axis."""
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
                flight = transport_for(axis).all_gather(axis, sent, [spec.shape[0] for spec, _ in missing])
                cost = gather_cost([spec for spec, _ in missing], _direction())
                counted = self.traffic.add(cost) if cost is not None else None
        return Gather(self, [s.key for s in specs], ready, missing, flight, counted)

    # -- reductions ------------------------------------------------------------------------------------------------

    def start_reduce(self, specs: Sequence[ParamSpec], grads: Sequence[torch.Tensor]) -> Reduction:
        """Begin to average gradients over ranks. Yields, for each, a gradient of the parameter's own local shape."""
        last = self._is_last_backward()
        if self.stage >= 2 or last:
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
        transport = transport_for(axis)
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
        run = compat.backward_run()
        if run != self._run or run == -1:
            self._run = run
            self._calls += 1
            if self.no_sync_depth:
                self._within_no_sync, self._last = True, False
            else:
                self._last = self._within_no_sync or self._calls >= self.accumulation_steps
                if self._last:
                    self._within_no_sync, self._calls = False, 0
        return self._last

    # -- the optimiser's step --------------------------------------------------------------------------------------

    def before_step(self) -> None:
        """The shards are about to change: gathered copies of them have no further use."""
        self._resident.clear()
        if self.probe.ledger is not None:
            self.probe.ledger.mark("optimizer.step", "optimizer")

    def after_step(self) -> None:
        """A step has ended: its counters become those of the last whole step."""
        self.traffic.end_step()
        self.steps += 1
        now = time.perf_counter()
        if self._step_began is not None:
            self.step_seconds = now - self._step_began
        self._step_began = now
        if self.probe.ledger is not None:
            self.probe.ledger.mark("between steps", "forward")

    def resident_copies(self) -> list[torch.Tensor]:
        """Gathered copies that outlive their graph (stages 1 and 2)."""
        return [copy for _, copy in self._resident.values()]

    def waiting_gradients(self) -> list[torch.Tensor]:
        """Whole gradients of earlier calls that wait to be reduced (stage 1)."""
        return [waiting for _, waiting in self._waiting.values()]


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
                if self._engine.stage in (1, 2):
                    self._engine._resident[spec.key] = (_state(shard), full)
        ready, self._ready, self._missing, self._flight = self._ready, {}, [], None
        return [ready[key] for key in self._keys]


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
            second = transport_for(axis).all_reduce(axis, summed)
            summed = second.wait()
            self._engine.traffic.exposed[counted] += second.exposed_seconds
        torch._foreach_div_(summed, self._world)
        return [s.to(spec.dtype) for s, spec in zip(summed, self._specs, strict=True)]


def _state(shard: torch.Tensor) -> tuple[int, int]:
    """Changes whenever the shard's values may have: every in-place operation raises the version."""
    return shard.untyped_storage()._cdata, shard._version


def _direction() -> Direction:
    return "forward" if compat.backward_run() == -1 else "backward"
