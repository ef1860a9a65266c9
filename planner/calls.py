"""The peak of a pipeline's call on one rank, before it runs, from dry runs of its stages with one micro-batch each.

A rank holds what was saved of as many micro-batches as its schedule has between their forwards and their backwards, of each of
its stages, beside what one action takes while it runs. What a micro-batch saves, leaves for its weight gradients and takes
meanwhile is measured as :mod:`dspass.planner.dry_run` measures a step; the schedule's order says how these add up
(:func:`dspass.planner.schedule_times.peak_of_rank`). So a byte that is saved counts as often as it is there.

The dry run has two rounds where there are several micro-batches: after the first, gradients are there to be added to, and what
a ZeRO stage keeps from one micro-batch to the next (gathered copies at stages 1 and 2, whole gradients at stage 1).

Dropped: a dry run of the whole schedule, of all stages. It would say the same, takes as many times as long as there are
micro-batches, and has to be done for each candidate of a plan.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
import torch.fx as fx

from dspass.lowering.segments import lower
from dspass.lowering.stage_backward import StageBackward
from dspass.passes.nodes import ON_HOST, calls, rounding_errors
from dspass.passes.partition import received_by
from dspass.planner.dry_run import Peak, State, dry, fresh
from dspass.planner.schedule_times import Link, StageCost, peak_of_rank
from dspass.runtime import compat
from dspass.runtime.engine import Engine
from dspass.runtime.ledger import HOST, Ledger
from dspass.runtime.program import Probe
from dspass.runtime.schedule import Direction, Schedule

_Answer = TypeVar("_Answer")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a graph stands in a pipeline's calls: it is ``stage`` of those that ``rank`` has in ``schedule``. The first
    ``activations`` of its inputs come from the stage before. ``links`` has the bytes of each cut, ``batch_bytes`` are the whole
    batch's, which is there all the time.

    ``others`` are the rank's stages that are planned already. With ``fewest`` a stage takes as little as it can, since the rest
    did not fit beside what was fastest."""

    stage: int
    rank: int
    schedule: Schedule
    links: tuple[Link, ...]
    activations: int
    batch_bytes: int
    others: Mapping[int, StageCost] = field(default_factory=dict)
    planned_bytes: int = 0
    """Of the parameters of ``others``."""
    fewest: bool = False

    @property
    def in_flight(self) -> int:
        """The most micro-batches of which the stage holds saved values at a time."""
        return self.schedule.in_flight(self.rank, self.stage)

    def peak(self, cost: StageCost, state: State, gradients: int) -> Peak:
        """Of this rank in a call, where one micro-batch takes ``cost`` on this stage. ``state`` is the whole rank's, and
        ``gradients`` are the bytes of this stage's."""
        several = self.schedule.micro_batches > 1
        costs = [{**self.others, self.stage: cost}.get(s, StageCost(0.0, 0.0)) for s in range(self.schedule.stages)]
        # Of one micro-batch they are what its backward makes, and counted there.
        held = state.trained if several else max(state.trained - gradients, 0)
        return Peak(
            base=state.bytes + self.batch_bytes + held + self._sent_bytes,
            graph=peak_of_rank(self.schedule, costs, self.links, self.rank) + state.accumulated,
            floor=state.optimizer + state.trained - held,
            between=self.in_flight * cost.saved_bytes,
            stage=cost,
        )

    @property
    def _sent_bytes(self) -> int:
        """Of messages that are on their way while the rank computes what comes next: one in each direction."""
        schedule, sent = self.schedule, 0
        for cut, link in enumerate(self.links):
            source, reader = (schedule.rank_of[s] == self.rank for s in (cut, cut + 1))
            if source != reader:
                sent += link.sent(Direction.FORWARD if source else Direction.BACKWARD)
        return sent

    def __str__(self) -> str:
        schedule = self.schedule
        return f"stage {self.stage} of {schedule.stages}, {schedule.name} of {schedule.micro_batches} micro-batches"


def cost_of_stage(
    forward: fx.GraphModule,
    backward: fx.GraphModule,
    num_fwd_outputs: int,
    engine: Engine,
    simulator: Callable[..., Any],
    *,
    activations: int,
    micro_batches: int,
    stage_backward: StageBackward | None = None,
) -> StageCost:
    """What a micro-batch takes on a stage, in bytes; there are no seconds in it. ``stage_backward`` is one that has not been
    lowered. Lowering may move views in the graphs."""
    values = [n.meta.get("val") for n in forward.graph.find_nodes(op="placeholder")]
    ledger = Ledger(watches=True)
    with dry(engine) as other, compat.mode_of(values), other.one_call():
        run = _Rounds(forward, backward, num_fwd_outputs, other, ledger, simulator, activations, stage_backward)
        rest = ledger.total
        for _ in range(min(micro_batches, 2) - 1):
            other.backward_of_call(False)
            run.once()
        other.backward_of_call(True)
        kept = ledger.total - rest - sum(g.nbytes for g in run.gradients)
        return replace(run.once(), static_bytes=max(kept, 0))


class _Rounds:
    """Forwards and backwards of micro-batches, one after another, on fake tensors."""

    def __init__(
        self,
        forward: fx.GraphModule,
        backward: fx.GraphModule,
        num_fwd_outputs: int,
        engine: Engine,
        ledger: Ledger,
        simulator: Callable[..., Any],
        activations: int,
        stage_backward: StageBackward | None,
    ) -> None:
        self.outputs, self.engine, self.ledger, self.activations = num_fwd_outputs, engine, ledger, activations
        probe = Probe(ledger)
        self.forward = lower(forward, simulator, is_backward=False, is_inference=False, probe=probe)
        self.backward = stage_backward or StageBackward(len(forward.graph.find_nodes(op="placeholder")), None)
        self.backward.lower(backward, simulator, probe=probe)
        placeholders = forward.graph.find_nodes(op="placeholder")
        self.received = [n.meta.get("val") for n in placeholders[:activations]]
        self.others = [fresh(n.meta.get("val")) for n in placeholders[activations:]]
        for node, value in zip(placeholders[activations:], self.others, strict=True):
            ledger.note(value, HOST if ON_HOST in node.meta else "parameters")
        for node in calls(backward.graph, rounding_errors):  # there from the second step on
            arguments: Any = node.args
            ledger.note(rounding_errors(*arguments), "gradients")
        inputs = [*self.received, *self.others]
        self.totals = {
            i: torch.empty(inputs[i].shape, dtype=inputs[i].dtype, device=inputs[i].device) for i in self.backward.added
        }
        ledger.note(list(self.totals.values()), "gradients")
        asked = forward.graph.find_nodes(op="output")[0].args[0][num_fwd_outputs:]
        self.saved = [node.name for node in received_by(backward.graph, asked)]
        self.needs = [(n.name, n.meta.get("val")) for n in backward.graph.find_nodes(op="placeholder")]
        self.gradients: list[torch.Tensor] = []

    def once(self) -> StageCost:
        """One forward and one backward. The gradients of the first stay, and those of later ones are added to them."""
        ledger, start = self.ledger, self.ledger.total
        received = [fresh(v) for v in self.received]
        ledger.note(received, "saved")
        most, outputs = self._watched(self.forward, [*received, *self.others])
        working = most - ledger.total
        places = dict(zip(self.saved, outputs[self.outputs :], strict=True))
        del outputs  # what was made for another stage goes there
        saved = ledger.total - start
        arguments = [places.pop(name) if name in places else fresh(value) for name, value in self.needs]
        ledger.note(arguments)
        message = [a for a, (name, _) in zip(arguments, self.needs, strict=True) if name not in self.saved]
        arrived = ledger.total - start - saved
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.backward.adding(self.totals.__getitem__))
            if self.backward.is_split:
                stack.enter_context(self.backward.deferred(self))
            most, answers = self._watched(self.backward, arguments)
        made = sum(a.nbytes for a in answers[: self.activations] if isinstance(a, torch.Tensor))
        working = max(working, most - start - saved - arrived - made)
        gradients = [g for g in answers[self.activations :] if isinstance(g, torch.Tensor)]
        del answers, received, message
        held = 0
        if self.backward.is_split:
            held = ledger.total - start
            with self.backward.adding(self.totals.__getitem__):
                most, found = self._watched(self.backward.weights, self)
            working = max(working, most - start - held)
            gradients = [g for g in found[self.activations :] if g is not None]
        self.gradients = self.gradients or gradients
        return StageCost(0.0, 0.0, saved_bytes=saved, held_bytes=held, working_bytes=max(working, 0))

    def _watched(self, run: Callable[[Any], _Answer], argument: Any) -> tuple[int, _Answer]:
        """The most bytes that are alive while something runs, and what it answers."""
        points = len(self.ledger.points)
        before = self.ledger.total
        answer = run(argument)
        return max([before, *(point.total for point in self.ledger.points[points:])]), answer


__all__ = ["Place", "cost_of_stage"]
