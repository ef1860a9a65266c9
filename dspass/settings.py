"""What a plan may set for the whole step, and what a rank holds at every moment of it: parameters, and optimiser states by
parameter, as they are or as they will be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.fx as fx

from dspass.config import Config
from dspass.hosting import shares
from dspass.optimizers import Optimizers
from dspass.passes import cost, devices
from dspass.passes.base import Pass
from dspass.passes.bucket_gathers import BucketGathers
from dspass.passes.bucket_reductions import BucketReductions
from dspass.passes.buckets import Item, own_bytes, pack
from dspass.passes.nodes import GATHERED
from dspass.planner.dry_run import State
from dspass.planner.record import Setting
from dspass.runtime.engine import Engine
from dspass.runtime.host_states import HostStates, local_bytes
from dspass.runtime.params import ParamSpec, lookup
from dspass.runtime.stepping import Moment, moments

#: How often in a step each parameter's bucket travels, by stage.
_TRIPS = {0: 1, 1: 2, 2: 2, 3: 3}

#: Buckets that are tried are so many times smaller than the passes' own, and no smaller than that.
_SMALLER, _LEAST_BUCKET = (2, 4), 500_000

#: The share of a collective's latency that is taken to count where compute hides it.
_HIDDEN_LATENCY = 0.05

#: In how many steps the states go to the host.
_SHARES = 8


def settings_of(
    joint: fx.Graph,
    engine: Engine,
    config: Config,
    passes: Sequence[Pass],
    states: Mapping[str, int],
    optimizers: Optimizers,
    on: devices.Device,
    exposed: float,
) -> tuple[Setting, ...]:
    """Sizes of buckets times shares of the ``states`` (bytes by parameter) that may wait on the host.

    Those that wait there by plans for other shapes do in all of them: their graphs run beside this one. Smaller buckets than
    the passes' own hold less, and take more latencies: all of them where nothing overlaps, else the ``exposed`` share. A size
    that a person wrote is not changed.
    """
    sizes: list[tuple[int | None, float]] = [(None, 0.0)]
    items = [_item(lookup(n.meta[GATHERED][0])) for n in joint.find_nodes(op="placeholder") if GATHERED in n.meta]
    items = [item for item in items if item.kind is not None]
    written = any(p.bucket_bytes is not None for p in passes if isinstance(p, (BucketGathers, BucketReductions)))
    if items and not written:
        own, calls = own_bytes(items), _TRIPS[engine.stage]
        first = len(pack(items))
        for divisor in _SMALLER:
            count = len(pack(items, own // divisor))
            more = calls * (count - first) * on.latency
            if count > first and own // divisor >= _LEAST_BUCKET:
                sizes.append((own // divisor, more if not on.overlaps else more * max(exposed, _HIDDEN_LATENCY)))
    there = tuple(name for name in states if name in engine.planned_states)
    away: list[tuple[str, ...]] = [there]
    allowed = config.offload_optimizer == "cpu" or (config.offload_optimizer is None and on.has_own_memory)
    if allowed and states:
        params = engine.params()
        growing = shares({n: params[n] for n in states}, config.offload_optimizer_ratio, _SHARES)
        away += [(*there, *(n for n in names if n not in there)) for names in growing]
    found = []
    trained = [p for p in engine.params().values() if p.requires_grad]
    at_first = step_bytes(engine, optimizers, trained)
    for names in dict.fromkeys(away):
        total = sum(states[n] for n in names)
        seconds = cost.states_seconds(total, on)
        for size, more in sizes:
            found.append(
                Setting(
                    bucket_bytes=size,
                    seconds=more,
                    states=names,
                    states_bytes=total,
                    part_bytes=step_bytes(engine, optimizers, trained, names) - at_first,
                    copy_seconds=seconds,
                )
            )
    return tuple(found)


def _item(spec: ParamSpec) -> Item:
    grouped = spec.shard_axis is not None and spec.shard_axis.size > 1
    return Item((spec.name,), (spec.gathered_bytes,), spec.numel, spec.shard_axis if grouped else None)


def step_moments(
    engine: Engine, optimizers: Optimizers, trained: Sequence[torch.Tensor], away: Sequence[str] = ()
) -> Iterator[Moment]:
    """What the optimiser's step of the ``trained`` parameters holds, where the states of those named ``away`` wait on the host
    beside those that already do, on the device that is the target."""
    params = engine.params()
    waiting = HostStates(part_elements=engine.host_states.part_elements)
    waiting.add(engine.host_states)
    waiting.add(params[name] for name in away)
    on = devices.tabled(kind_of(engine))
    return moments(
        trained,
        waiting,
        optimizers.planned,
        together=on.has_own_memory,
        overlaps=on.overlaps,
        hosted=frozenset(id(spec.param()) for spec in engine.specs.values() if spec.on_host),
    )


def step_bytes(
    engine: Engine, optimizers: Optimizers, trained: Sequence[torch.Tensor], away: Sequence[str] = ()
) -> int:
    """The most of :func:`step_moments`."""
    return max((moment.bytes for moment in step_moments(engine, optimizers, trained, away)), default=0)


def kind_of(engine: Engine) -> str:
    """The kind of device that the model runs on, or that a prediction is for."""
    if engine.target is not None:
        return engine.target
    if engine.stages is not None:
        return engine.stages.device.type
    return next((p.device.type for p in engine.params().values()), engine.inputs_on)


def state_of(engine: Engine, optimizers: Optimizers) -> State:
    """Shards, buffers, and the states of the optimiser that holds them: as they are, or as they will be.
    What waits on the host is not counted, but for what of it comes while the optimiser steps."""
    root = engine.root() if engine.root is not None else None
    hosted = {id(spec.param()) for spec in engine.specs.values() if spec.on_host}
    sizes = {id(p): local_bytes(p) for p in engine.params().values() if id(p) not in hosted}
    buffers = sum(map(local_bytes, root.buffers())) if root is not None else 0
    trained = [p for p in engine.params().values() if p.requires_grad]
    return State(
        parameters=sum(sizes.values()) + buffers,
        states=sum(states_bytes(engine, optimizers).values()),
        optimizer=step_bytes(engine, optimizers, trained),
        trained=sum(sizes.get(id(p), 0) for p in trained),
    )


def waiting_bytes(engine: Engine) -> int:
    """Whole gradients of earlier micro-batches that wait for the last one's, as they do at stage 1."""
    if engine.lifetimes != 1:
        return 0
    return sum(spec.numel * spec.reduce_dtype.itemsize for spec in engine.specs.values() if spec.trains)


def states_bytes(engine: Engine, optimizers: Optimizers) -> dict[str, int]:
    """Bytes of the optimiser's states on the device by parameter: as they are, or as they will be."""
    on_host = {id(spec.param()) for spec in engine.specs.values() if spec.on_host}
    return {
        name: optimizers.state_bytes(p)
        for name, p in engine.params().items()
        if p.requires_grad and id(p) not in on_host and p not in engine.host_states
    }
