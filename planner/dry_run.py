"""The peak of one step of a graph, before it runs: the lowered programs on fake tensors, by the code that runs real ones.

Segments allocate as :mod:`dspass.lowering.simulate` says, gathers and reductions as the runtime's own transports do, which
send nothing for a dry engine, and the ledger counts. Dropped: adding up sizes from the graph. It would say a second time, and
one day differently, what a bucket's buffers are, when a copy is dropped and what stays resident at stages 1 and 2.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from dspass.lowering.segments import lower
from dspass.passes.nodes import ON_HOST, calls, rounding_errors
from dspass.passes.partition import received_by
from dspass.planner.schedule_times import StageCost
from dspass.runtime import compat
from dspass.runtime.engine import Engine
from dspass.runtime.ledger import HOST, Ledger
from dspass.runtime.program import Probe


@dataclass(frozen=True)
class State:
    """Bytes that are there in every moment of the step, and those that the ``optimizer`` adds to them and to the gradients.

    ``elsewhere`` are those of the model's other graphs, behind and before a graph break, while this one runs: what earlier
    ones hold for their backwards, and gradients of later ones. ``here`` are the parameters and buffers of this one.
    ``trained`` are the bytes of all gradients. ``accumulated`` are those of this graph that earlier micro-batches of the step
    leave (of a pipeline: earlier calls), to which the last one's are added before the optimiser steps.
    """

    parameters: int
    states: int
    optimizer: int = 0
    elsewhere: int = 0
    here: int = 0
    trained: int = 0
    accumulated: int = 0

    @property
    def bytes(self) -> int:
        return self.parameters + self.states + self.elsewhere


@dataclass(frozen=True)
class Peak:
    """Of one step: ``graph`` is what forward and backward add to ``base``, the bytes that are always there, ``floor`` what the
    optimiser adds to it after them, and ``between`` what is held from the forward to the backward. Of a pipeline's stage they
    are a whole call's (:mod:`dspass.planner.calls`), and ``stage`` has what a micro-batch takes."""

    base: int
    graph: int
    floor: int
    between: int = 0
    stage: StageCost | None = None

    @property
    def bytes(self) -> int:
        return self.base + max(self.graph, self.floor)


def peak_of_step(
    forward: fx.GraphModule,
    backward: fx.GraphModule,
    num_fwd_outputs: int,
    engine: Engine,
    state: State,
    simulator: Callable[..., Any],
) -> Peak:
    """The peak of forward, backward and optimiser together. Lowering may move views in the graphs."""
    values = [n.meta.get("val") for n in forward.graph.find_nodes(op="placeholder")]
    ledger = Ledger(watches=True)
    probe = Probe(ledger)
    with dry(engine), compat.mode_of(values):
        programs = [
            lower(gm, simulator, is_backward=is_backward, is_inference=False, probe=probe)
            for gm, is_backward in ((forward, False), (backward, True))
        ]
        inputs = [fresh(v) for v in values]
        hosted = [ON_HOST in n.meta for n in forward.graph.find_nodes(op="placeholder")]
        for value, is_hosted in zip(inputs, hosted, strict=True):
            ledger.note(value, HOST if is_hosted else "parameters")
        for node in calls(backward.graph, rounding_errors):  # there from the second step on
            args: Any = node.args
            ledger.note(rounding_errors(*args), "gradients")
        there = ledger.total  # shards, errors of gradients, and the batch
        batch = max(there - state.here, 0)
        outputs = programs[0](list(inputs))
        between = ledger.total - there
        saved = outputs[num_fwd_outputs:]
        asked = forward.graph.find_nodes(op="output")[0].args[0][num_fwd_outputs:]
        places = {node.name: value for node, value in zip(received_by(backward.graph, asked), saved, strict=True)}
        kept = outputs[:num_fwd_outputs]
        arguments = [
            places.pop(n.name) if n.name in places else fresh(n.meta.get("val"))
            for n in backward.graph.find_nodes(op="placeholder")
        ]
        del outputs, saved, places
        ledger.mark("backward", "backward")
        gradients = programs[1](arguments)
        end = ledger.total - there
        del kept, gradients
    graph = max(point.total for point in ledger.points) - there + state.accumulated
    return Peak(state.bytes + batch, graph, end + state.optimizer, between)


@contextlib.contextmanager
def dry(engine: Engine) -> Iterator[Engine]:
    """In place of ``engine`` one without its state, that sends nothing and averages at once."""
    found = copy.copy(engine)
    found.forget()
    found.dry, found.accumulation_steps, found.no_sync_depth = True, 1, 0
    for spec in engine.specs.values():
        spec.engine = found
    try:
        yield found
    finally:
        for spec in engine.specs.values():
            spec.engine = engine


def fresh(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
