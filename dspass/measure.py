"""What a step of a model that runs here really takes, byte by byte and second by second.

``with dspass.measure(model): ...one or more steps...`` watches them under torch's profiler, which reports every allocation
of the CPU allocator; on CUDA the allocator's own peak is read. :func:`dspass.explain` shows the last measurement.
"""

from __future__ import annotations

import bisect
import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from dspass.engines import engine_of
from dspass.owners import Heap, unwrap
from dspass.runtime.engine import Engine
from dspass.runtime.host import is_on_host
from dspass.runtime.host_states import local_of
from dspass.runtime.ledger import CATEGORIES, HOST, Ledger, Phase, Point


@dataclass(kw_only=True)
class Measurement:
    """``points`` is the running sum of allocator bytes over the watched steps, by category; ``seconds`` their time."""

    points: list[Point] = field(default_factory=list)
    start_bytes: int = 0
    peak_bytes: int = 0
    seconds: float = 0.0
    steps: int = 0


def persistent(engine: Engine | None, model: nn.Module, ledger: Ledger) -> None:
    """Enter what is alive between steps: parameters, buffers, gradients and optimisers' states."""

    def note(values: Any, category: str) -> None:
        for tensor in tree_leaves(values):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:  # another pipeline stage's has no bytes here
                ledger.note(tensor, HOST if is_on_host(local_of(tensor)) else category)

    params = list(model.parameters())
    note([p.data for p in params], "parameters")
    note(list(model.buffers()), "parameters")
    note([p.grad for p in params if p.grad is not None], "gradients")
    known = {id(p) for p in params}
    for optimizer in Heap.scan().optimizers:
        note([state for p, state in optimizer.state.items() if id(p) in known], "optimizer")
    if engine is not None:
        ledger.note(engine.resident_copies(), "gathered")
        ledger.note([engine.waiting_gradients(), engine.kept_errors()], "gradients")


@contextlib.contextmanager
def measure(model: nn.Module) -> Iterator[Measurement]:
    """Watch whole optimiser steps. Slows them down: read seconds elsewhere.

    Around a model's first step it measures what that takes once: the one-line way holds the whole model until its first call
    has divided it. Raises ``RuntimeError`` for a model that does not run under the backend, or where a profiler is active.
    """
    root = unwrap(model)
    engine = engine_of(root)
    result, ledger = Measurement(), Ledger()
    persistent(engine, root, ledger)
    result.start_bytes = ledger.total
    if engine is not None:
        engine.probe.ledger = ledger
    steps, begin = engine.steps if engine is not None else 0, time.perf_counter()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its progress lines are not for the person at the terminal
    cuda = any(p.device.type == "cuda" for p in root.parameters())
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    try:
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=not cuda
        ) as profiler:
            yield result
    finally:
        if engine is not None:
            engine.probe.ledger = None
    first_call, engine = engine is None, engine_of(root)
    if engine is None:
        raise RuntimeError(
            "dspass.measure watched a model that did not run under torch.compile(model, backend='deepspeed'): run a step of "
            "the compiled model inside of it."
        )
    result.seconds = time.perf_counter() - begin
    result.steps = engine.steps - steps
    if cuda:
        result.points, result.peak_bytes = list(ledger.points), torch.cuda.max_memory_allocated()
    else:
        result.points = _combine(ledger, result.start_bytes, _allocations(profiler))
        result.peak_bytes = max((p.total for p in result.points), default=result.start_bytes)
    if first_call:
        engine.first_call_peak_bytes = result.peak_bytes
    else:
        engine.measurement = result


def _allocations(profiler: torch.profiler.profile) -> list[tuple[float, int]]:
    """Time in seconds since the epoch and signed bytes of each event of the CPU allocator."""
    events = cast(Any, profiler.profiler).kineto_results.events()
    found = [
        (e.start_ns() / 1e9, e.nbytes()) for e in events if e.name() == "[memory]" and e.device_type().name == "CPU"
    ]
    return sorted(found)


def _combine(ledger: Ledger, start: int, events: list[tuple[float, int]]) -> list[Point]:
    """The allocator's running sum, divided among categories as the ledger knew them at that time.

    What the ledger does not know of lives inside of one instruction or in eager code: temporary.
    """
    times = [p.seconds for p in ledger.points]
    temporary = CATEGORIES.index("temporary")
    points, total = [], start
    for seconds, size in events:
        total += size
        i = max(bisect.bisect_right(times, seconds) - 1, 0)
        known = ledger.points[i]
        split = list(known.bytes)
        split[temporary] += total - known.total
        if split[temporary] < 0:  # the ledger hears of a free a moment late
            for j in sorted(range(len(split)), key=split.__getitem__, reverse=True):
                taken = min(split[j], -split[temporary]) if j != temporary else 0
                split[j] -= taken
                split[temporary] += taken
        phase: Phase = known.phase
        points.append(Point(seconds, known.label, phase, tuple(split)))
    return points
