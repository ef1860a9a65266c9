"""What a plan may set for the whole step, and what a rank holds at every moment of it: parameters, and optimiser states by
parameter, as they are or as they will be."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence

import torch
import torch.fx as fx

from dspass.config import Config
from dspass.hosting import shares
from dspass.passes import cost, devices
from dspass.passes.base import Pass
from dspass.passes.bucket_gathers import BucketGathers
from dspass.passes.bucket_reductions import BucketReductions
from dspass.passes.buckets import Item, own_bytes, pack
from dspass.passes.nodes import GATHERED
from dspass.planner.dry_run import State
from dspass.planner.record import Setting
from dspass.runtime.engine import Engine
from dspass.runtime.host_states import local_bytes, local_of, parts_of
from dspass.runtime.params import ParamSpec, lookup

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
    on: devices.Device,
    exposed: float,
) -> tuple[Setting, ...]:
    """Sizes of buckets times shares of the ``states`` (bytes by parameter) that may wait on the host.

    Smaller buckets than the passes' own hold less, and take more latencies: all of them where nothing overlaps, else the
    ``exposed`` share. A size that a person wrote is not changed.
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
    away: list[tuple[str, ...]] = [()]
    allowed = config.offload_optimizer == "cpu" or (config.offload_optimizer is None and on.has_own_memory)
    if allowed and states:
        params = engine.params()
        away += shares({n: params[n] for n in states}, config.offload_optimizer_ratio, _SHARES)
    found = []
    for names in away:
        total = sum(states[n] for n in names)
        if on.host_memory_bytes and total > on.host_memory_bytes:
            continue
        part = part_bytes(engine, names, on)
        seconds = cost.states_seconds(total, on)
        for size, more in sizes:
            found.append(
                Setting(
                    bucket_bytes=size,
                    seconds=more,
                    states=names,
                    states_bytes=total,
                    part_bytes=part,
                    copy_seconds=seconds,
                )
            )
    return tuple(found)


def _item(spec: ParamSpec) -> Item:
    grouped = spec.shard_axis is not None and spec.shard_axis.size > 1
    return Item((spec.name,), (spec.gathered_bytes,), spec.numel, spec.shard_axis if grouped else None)


def part_bytes(engine: Engine, names: Sequence[str], on: devices.Device) -> int:
    """Bytes of the largest part of the named parameters' states that is on the device while the optimiser steps, and of those
    before and after it, which leave and come at the same time where the device can."""
    params, bytes_of = engine.params(), states_bytes(engine, hosted=True)
    parts = parts_of([local_of(params[n]) for n in names], engine.host_states.part_elements)
    largest = max((sum(bytes_of[names[i]] for i in part) for part in parts), default=0)
    return largest * (min(len(parts), 3) if on.overlaps else 1)


def kind_of(engine: Engine) -> str:
    return engine.target or next((p.device.type for s in engine.specs.values() if (p := s.param()) is not None), "cpu")


def state_of(engine: Engine) -> State:
    """Shards, buffers, and the states of the optimiser that holds them: as they are, or as AdamW makes them if none exist.
    What waits on the host is not counted, but for the part of it that the optimiser steps."""
    root = engine.root() if engine.root is not None else None
    hosted = {id(spec.param()) for spec in engine.specs.values() if spec.on_host}
    params = [p for p in engine.params().values() if id(p) not in hosted]
    sizes = {id(p): local_bytes(p) for p in params}
    buffers = sum(map(local_bytes, root.buffers())) if root is not None else 0
    trained = [p for p in params if p.requires_grad]
    _, temporaries = engine.supposed_optimizer or (2, 2)
    away = [name for name, p in engine.params().items() if p in engine.host_states and id(p) not in hosted]
    held = _temporaries(trained, sizes, temporaries)
    if away:
        held += part_bytes(engine, away, devices.tabled(kind_of(engine)))
    states = states_bytes(engine)
    return State(sum(sizes.values()) + buffers, sum(states.values()), held, trained=sum(sizes[id(p)] for p in trained))


def states_bytes(engine: Engine, hosted: bool = False) -> dict[str, int]:
    """Bytes of the optimiser's states on the device by parameter, those on the host only if ``hosted``: as they are, or as
    AdamW makes them, or as a prediction supposes."""
    on_host = {id(spec.param()) for spec in engine.specs.values() if spec.on_host}
    trained = {
        name: p
        for name, p in engine.params().items()
        if p.requires_grad and id(p) not in on_host and (hosted or p not in engine.host_states)
    }
    if engine.supposed_optimizer is None:
        for found in gc.get_objects():
            if not issubclass(type(found), torch.optim.Optimizer):
                continue
            state = getattr(found, "state", {})
            made = {
                name: sum(local_bytes(t) for t in state.get(p, {}).values() if isinstance(t, torch.Tensor))
                for name, p in trained.items()
            }
            if any(made.values()):
                return made
    states, _ = engine.supposed_optimizer or (2, 2)
    return {name: states * local_bytes(p) for name, p in trained.items()}


def _temporaries(trained: Sequence[torch.Tensor], sizes: dict[int, int], count: int) -> int:
    """Of one parameter at a time on a CPU, of all where the optimiser steps them together."""
    largest = max((sizes[id(p)] for p in trained), default=0)
    together = any(p.device.type == "cuda" for p in trained)
    return count * (sum(sizes[id(p)] for p in trained) if together else largest)
