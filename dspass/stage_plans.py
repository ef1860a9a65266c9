"""One rank's stages of a pipeline under a memory budget, and errors that all ranks of the pipeline hear of.

A rank's stages share its budget and are planned one after another, the one that saves most first: each holds no more than its
share of what is left (:attr:`dspass.planner.plan.Planner.share`), and the last has the rest. Where that one does not fit, all
but the last are planned again, as small as they can be.

Dropped: one plan for all stages of a rank. Their choices are independent but for the sum of what they hold, so that it would
be the product of their frontiers, each point of which takes a dry run of every stage; with one stage a rank, as most schedules
have, there is nothing to gain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves

from dspass.between_ranks import first_says
from dspass.passes.split_stages import StageGraph
from dspass.planner.calls import Place
from dspass.planner.record import BudgetError
from dspass.planner.saved import PlanError
from dspass.planner.schedule_times import Link, StageCost
from dspass.runtime import compat
from dspass.runtime.axis import Axis
from dspass.runtime.engine import Engine
from dspass.runtime.pipeline import Stage
from dspass.runtime.schedule import Schedule
from dspass.runtime.stopped import RankStopped, waiting_for

Compile = Callable[[StageGraph, Place | None], Stage]


def in_budget(
    graphs: Sequence[StageGraph],
    order: Sequence[int],
    schedule: Schedule,
    rank: int,
    links: Sequence[Link],
    batch_bytes: int,
    engine: Engine,
    compile_stage: Compile,
) -> dict[int, Stage]:
    """The stages ``order`` of ``rank``, each compiled at its place in ``schedule``.

    Raises :class:`BudgetError`, with the smallest budget for all of them, on every rank that has these stages.
    """
    refusals: list[BudgetError] = []
    for fewest in (False, True):
        before, refusals = len(engine.compilations), []
        found: dict[int, Stage] = {}
        others: dict[int, StageCost] = {}
        planned_bytes = 0
        for stage in order:
            place = Place(
                stage=stage,
                rank=rank,
                schedule=schedule,
                links=tuple(links),
                activations=len(graphs[stage].reads),
                batch_bytes=batch_bytes,
                others=dict(others),
                planned_bytes=planned_bytes,
                fewest=fewest and stage != order[-1],
            )
            try:
                found[stage] = compile_stage(graphs[stage], place)
            except BudgetError as refusal:
                if refusal.alone:  # whose other ranks would not plan the stages before once more
                    raise
                refusals.append(refusal)
                if refusal.stage is not None:  # what the others would have to fit beside
                    others[stage] = refusal.stage
                if not fewest:
                    break
                continue
            plan = engine.compilations[-1].plan
            if plan is not None and plan.stage is not None:
                others[stage] = plan.stage
                planned_bytes += plan.parameters
        if not refusals:
            return found
        del engine.compilations[before:]
        if len(order) == 1:
            break
    raise max(refusals, key=lambda refusal: refusal.smallest)


def gathered(engine: Engine, asked: str | None, plan: Callable[[], dict[int, Stage]]) -> dict[int, Stage]:
    """The stages that ``plan`` makes where parameters are gathered as ``asked`` (``pipeline.gather``), or where nothing is,
    once a call, unless that takes so much memory that a micro-batch is slower than with a gather of its own.

    Ranks of one stage go the way that is fastest on the first of them, whatever their own batches would have, and keep to it.
    Raises what ``plan`` does where no way fits: of both, what is refused of the one that holds less.
    """
    ways = (True, False) if engine.stage == 3 and asked is None else (asked == "call",)
    agrees = asked is None and engine.stages is not None and engine.stages.data.size > 1
    if agrees and engine.agreed_gather is not None:
        ways, agrees = (engine.agreed_gather,), False
    before = len(engine.compilations)
    made: list[tuple[float, bool, dict[int, Stage], list[Any]]] = []
    refusals: list[Exception] = []
    for keeps in ways:
        engine.keeps_for_call = keeps
        try:
            stages = plan()
        except (BudgetError, PlanError) as refusal:
            if isinstance(refusal, BudgetError) and refusal.alone:
                raise
            refusals.append(refusal)
            del engine.compilations[before:]
            continue
        compilations = engine.compilations[before:]
        del engine.compilations[before:]
        planned = [c.plan for c in compilations if c.plan is not None]
        seconds = math.fsum(p.seconds for p in planned)
        may_gain = any(p.again_seconds or p.held_bytes for p in planned)
        if agrees:
            seconds, may_gain = first_says("gather", engine, [seconds, may_gain])
        made.append((seconds, keeps, stages, compilations))
        if not may_gain:
            break  # memory costs nothing as it is
    if not made:
        raise refusals[-1]
    _, engine.keeps_for_call, stages, compilations = min(made, key=lambda way: way[0])
    if agrees:
        engine.agreed_gather = engine.keeps_for_call
    engine.compilations += compilations
    return stages


def links_of(graphs: Sequence[StageGraph]) -> list[Link]:
    """The bytes of a micro-batch that cross the cut behind each of ``graphs`` but the last."""
    return [
        Link(
            forward_bytes=sum(v.nbytes for v in graph.sent),
            backward_bytes=sum(v.nbytes for v in graph.sent if v.has_gradient),
            forward_sent=sum(v.sent_bytes for v in graph.sent),
            backward_sent=sum(v.sent_bytes for v in graph.sent if v.has_gradient),
        )
        for graph in graphs[:-1]
    ]


def bytes_of(calls: Sequence[Any]) -> int:
    """Of all tensors among arguments; those of several micro-batches are views of one batch, and some are the same."""
    found = {
        (compat.storage_of(t), t.storage_offset()): t.nbytes for t in tree_leaves(calls) if isinstance(t, torch.Tensor)
    }
    return sum(found.values())


def together(axis: Axis, run: Callable[[], dict[int, Stage]]) -> dict[int, Stage]:
    """What ``run`` answers; but where it raises on one rank of a pipeline, all of its ranks raise, and nobody waits for a
    message of one that has stopped. Of several budgets that are too small all hear of what the worst needs."""
    found: dict[int, Stage] = {}
    mine: Exception | None = None
    try:
        found = run()
    except Exception as error:  # whatever it is, others hear of it first
        mine = error
    said: list[tuple[str, str, int] | None] = [_said(mine) if mine is not None else None]
    if axis.size > 1 and dist.get_backend() != "fake":
        everyone: list[Any] = [None] * axis.size
        with waiting_for(axis, "hear whether stages were compiled"):
            dist.all_gather_object(everyone, said[0], group=axis.group)
        said = everyone
    heard = {rank: one for rank, one in zip(axis.ranks, said, strict=False) if one is not None}
    if mine is not None and not isinstance(mine, (BudgetError, PlanError)):
        raise mine
    for rank, (kind, text, _) in heard.items():
        if kind == "other":
            raise RankStopped(
                f"rank {rank} of the pipeline could not compile its stages, so that this one has nobody to run with: {text}"
            ) from mine
        if kind == "plan":
            raise PlanError(text) from mine
    if heard:
        _, text, smallest = max(heard.values(), key=lambda one: one[2])
        raise BudgetError(text, smallest) from mine
    return found


def _said(error: Exception) -> tuple[str, str, int]:
    """The kind of an error, its words, and the smallest budget that it names."""
    if isinstance(error, BudgetError):
        return "budget", str(error), error.smallest
    return ("plan", str(error), 0) if isinstance(error, PlanError) else ("other", repr(error), 0)


__all__ = ["bytes_of", "gathered", "in_budget", "links_of", "together"]
