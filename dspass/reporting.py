"""A report's records, from what is known when steps have run: the engine, its plans and graphs, a ledger, a pipeline.

The steps were real (:mod:`dspass.explain`) or on fake tensors (:mod:`dspass.prediction`): what differs, each of the two hands
over. What a report shows and how it is saved is :mod:`dspass.report`, which knows no engine.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import nn

from dspass.compilation import Compilation
from dspass.config import Config
from dspass.fake_quantising import rounded_layers
from dspass.pipeline_times import Measured
from dspass.pipelined import Pipelined
from dspass.planner.record import Plan, Tensors
from dspass.quantising import notes_of_errors, quantised_tensors
from dspass.report import (
    Direction,
    ExpertLayer,
    GraphRecord,
    HostCopy,
    HostCopyKind,
    Kind,
    Memory,
    MemoryPoint,
    PassRecord,
    PipelineRecord,
    PlanPoint,
    PlanRecord,
    PlanTensors,
    Report,
    Traffic,
    format_bytes,
    format_seconds,
)
from dspass.report.pipeline import notes_of_messages, record_of
from dspass.runtime.engine import Engine
from dspass.runtime.host import offload_start, reload_start
from dspass.runtime.ledger import CATEGORIES, Point
from dspass.runtime.schedule import Timeline
from dspass.weights import stored_tensors


def report_of(
    engine: Engine,
    model: nn.Module,
    *,
    kind: Kind,
    memory: Memory,
    traffic: list[Traffic],
    host_copies: list[HostCopy],
    seconds: float | None,
    world: int,
    device: str,
    notes: list[str],
    config: Config | None,
    pipeline: PipelineRecord | None,
    warnings: Sequence[str] = (),
) -> Report:
    """``warnings`` are notes that stand before all others."""
    passes, graphs = [], []
    for compilation in engine.compilations:
        passes += [
            PassRecord(
                name=p.name,
                stage=p.where,
                summary=p.summary,
                changed=p.changed,
                seconds=p.seconds,
                ops_before=p.ops_before,
                ops_after=p.ops_after,
                keeps_numbers=p.keeps_numbers,
                graph=p.graph,
                before=p.before,
                after=p.after,
            )
            for p in compilation.passes
        ]
        graphs += [
            GraphRecord(name=f"{compilation.name} {where}", before=before, after=after)
            for where, (before, after) in compilation.texts.items()
        ]
    ignored = {i.key: i.reason for i in config.ignored} if config is not None else {}
    quantised = quantised_tensors(last_graphs(engine), engine)
    limit = config.quantise.max_relative_error if config is not None else None
    times = pipeline.predicted if pipeline is not None else None
    runs = engine.accumulation_steps * (times.micro_batches if times is not None else 1)
    last = set(map(id, _last_compilations(engine)))  # the step's seconds say nothing of plans for other shapes
    return Report(
        kind=kind,
        model=type(model).__name__,
        device=device,
        world_size=world,
        passes=passes,
        graphs=graphs,
        memory=memory,
        traffic=sorted(traffic, key=lambda t: (t.direction, t.kind)),
        host_copies=host_copies,
        quantised=[*stored_tensors(model), *quantised],
        rounded=rounded_layers(engine),
        experts=_experts(engine),
        step_seconds=seconds,
        pipeline=pipeline,
        plans=[
            _plan_record(c.name, c.plan, seconds if id(c) in last else None, runs)
            for c in engine.compilations
            if c.plan is not None
        ],
        config=config.to_dict() if config is not None else {},
        ignored=ignored,
        notes=[
            *warnings,
            *dict.fromkeys(n for c in engine.compilations for p in c.passes for n in p.notes),
            *_routing_notes(kind, engine),
            *notes_of_errors(quantised, limit),
            *(notes_of_messages(pipeline, limit) if pipeline is not None else ()),
            *notes,
        ],
        versions={"torch": torch.__version__, "python": platform.python_version(), "dspass": _version()},
    )


def memory_timeline(points: Sequence[Point]) -> list[MemoryPoint]:
    start = points[0].seconds if points else 0.0
    return [
        MemoryPoint(
            t=p.seconds - start,
            label=p.label,
            phase=p.phase,
            bytes={c: max(b, 0) for c, b in zip(CATEGORIES, p.bytes, strict=True)},
        )
        for p in points
    ]


def traffic_of(engine: Engine, exposed: Mapping[tuple[str, str, str], float] | None = None) -> list[Traffic]:
    """What collectives sent in the last step; ``exposed`` seconds are by kind, direction and group, or else as measured."""
    return [
        Traffic(
            kind=kind,
            direction=direction,
            group=group,
            group_size=size,
            calls=calls,
            bytes=sent,
            exposed_seconds=waited if exposed is None else exposed.get((kind, direction, group), 0.0),
        )
        for (kind, direction, group, size), (calls, sent, waited) in engine.traffic.last.items()
    ]


def host_copies_of(
    engine: Engine, states_bytes: int, exposed: Mapping[tuple[str, str, str], float] | None = None
) -> list[HostCopy]:
    """What the graphs copy to the host and back, and ``states_bytes`` of the optimiser's; ``exposed`` None: not measured."""
    moved: Counter[tuple[HostCopyKind, Direction]] = Counter()
    starts: dict[Any, HostCopyKind] = {offload_start: "offload", reload_start: "reload"}
    for where, graph in last_graphs(engine):
        for target, kind in starts.items():
            for node in graph.find_nodes(op="call_function", target=target):
                moved[kind, where] += engine.accumulation_steps * sum(v.nbytes for v in node.meta["val"])
    moved["optimizer states", "step"] = states_bytes
    return [
        HostCopy(
            kind=kind,
            direction=direction,
            bytes=count,
            exposed_seconds=None if exposed is None else exposed.get((kind, direction, ""), 0.0),
        )
        for (kind, direction), count in moved.items()
        if count
    ]


def graphs_of(compilation: Compilation) -> Iterator[tuple[Direction, fx.Graph]]:
    directions: tuple[Direction, ...] = ("forward", "backward")
    for where in directions:
        if where in compilation.graphs:
            yield where, compilation.graphs[where].graph


def last_graphs(engine: Engine) -> Iterator[tuple[Direction, fx.Graph]]:
    """Those of a step: :func:`_last_compilations`."""
    for compilation in _last_compilations(engine):
        yield from graphs_of(compilation)


def _last_compilations(engine: Engine) -> list[Compilation]:
    """Of a function that was compiled again, as for a batch of another size, the last counts; of a pipeline the stages that ran
    last."""
    root = engine.root() if engine.root is not None else None
    pipeline = pipeline_of(root) if root is not None else None
    built = pipeline.last_trained or pipeline.last if pipeline is not None else None
    return list(built.compilations if built is not None else {c.frame: c for c in engine.compilations}.values())


def pipeline_of(model: nn.Module) -> Pipelined | None:
    """What runs a model as a pipeline, if it has run so."""
    forward = model.__dict__.get("forward")
    return forward if isinstance(forward, Pipelined) and forward.last is not None else None


def pipeline_record(pipeline: Pipelined, predicted: Timeline, measured: Measured | None) -> PipelineRecord:
    """What this rank knows of a pipeline that has run."""
    assert pipeline.staging is not None
    sends = pipeline.config.quantise.sends
    return record_of(pipeline.staging, pipeline.pipe.rank, predicted, measured, sends, pipeline.said)


def _routing_notes(kind: Kind, engine: Engine) -> list[str]:
    """What figures suppose of routers, which nobody knows before the step."""
    is_planned = any(c.plan is not None for c in engine.compilations)
    if not any(spec.expert_axis is not None for spec in engine.specs.values()) or (
        kind == "measured" and not is_planned
    ):
        return []
    return [
        f"{'Figures are' if kind == 'predicted' else 'The plan is'} for {engine.expected_imbalance:g} times the mean of rows "
        "at the experts of the busiest rank (dspass.experts.expected_imbalance). Less even routing takes more memory and time."
    ]


def _experts(engine: Engine) -> list[ExpertLayer]:
    """What the routers of the last step did; here, and not in the step, it waits for a GPU to say so."""
    specs = {spec.name: spec for spec in engine.specs.values()}
    return [
        ExpertLayer(
            name=specs[name].layer,
            ranks=specs[name].divided_over.size,
            rows=routed.counts.sum(0).tolist(),
            dropped=int(routed.dropped),
        )
        for name, routed in engine.routing.last.items()
    ]


#: How the names of whole parameters' copies begin in a plan.
_GATHERED = "gathered-parameter"


def _plan_record(graph: str, plan: Plan, step_seconds: float | None, runs: int) -> PlanRecord:
    """A plan's own seconds are of its graph's forward and backward, of which a step has so many ``runs``; here they are the
    whole step's. A plan for more than the whole step took is by other rates than the step (a CPU's rough ones, if it was not
    calibrated): its seconds are scaled."""
    planned = runs * plan.frontier[plan.chosen].seconds
    step = planned if step_seconds is None else step_seconds
    scale = min(step / planned, 1.0) if planned else 1.0
    rest = step - scale * planned
    kept = f"{format_bytes(plan.kept_bytes)} of gathered copies kept, " if plan.kept_bytes else ""
    decision = plan.decision
    held = f"{format_bytes(plan.held_bytes)} in {decision.holders}, " if plan.held_bytes else ""
    states = f", {format_bytes(plan.states_bytes)} of optimiser states on the host" if plan.states_bytes else ""
    hosted = sum(c.held for c in plan.classes if c.name == "parameters")
    parameters = f", {format_bytes(hosted)} of parameters on the host" if hosted else ""
    buckets = f", buckets of {format_bytes(decision.bucket_bytes)}" if decision.bucket_bytes else ""
    return PlanRecord(
        graph=graph,
        summary=f"{format_bytes(plan.saved_bytes - plan.kept_bytes)} saved, {held}{kept}{len(decision.recomputed)} values "
        f"computed again in {format_seconds(plan.again_seconds)}{states}{parameters}{buckets}; peak {format_bytes(plan.peak)}",
        budget_bytes=plan.budget,
        peak_bytes=plan.peak,
        frontier=[
            PlanPoint(
                peak_bytes=o.peak,
                seconds=scale * runs * o.seconds + rest,
                saved_bytes=o.saved_bytes,
                is_measured=o.is_measured,
            )
            for o in plan.frontier
        ],
        here=plan.chosen,
        classes=[_plan_tensors(t, _reason_of_class(t, plan)) for t in plan.classes],
        largest=[_plan_tensors(t, _reason(t)) for t in plan.largest],
    )


def _plan_tensors(tensors: Tensors, reason: str) -> PlanTensors:
    return PlanTensors(
        name=tensors.name,
        count=tensors.count,
        kept_bytes=tensors.kept,
        dropped_bytes=tensors.dropped,
        held_bytes=tensors.held,
        held_by=tensors.held_by,
        again_seconds=tensors.again_seconds,
        reason=reason,
    )


def _reason(one: Tensors) -> str:
    """Why a value was kept, or not."""
    if one.held:
        done = f"held by {one.held_by}, {format_bytes(one.held)}"
    elif one.kept:
        kept = "kept" if one.name.startswith(_GATHERED) else "saved"
        done = f"{kept}, {format_bytes(one.kept)}"
    else:
        done = f"dropped, which frees {format_bytes(one.dropped)}"
    return f"{done}: {_again(one)}{_otherwise(one)}"


def _reason_of_class(those: Tensors, plan: Plan) -> str:
    """What the values of a class that are there take against those that are not: seconds for a byte decide."""
    if those.name == "parameters":
        return "the budget leaves no room for them, their gradients and their states; they come for each gather"
    if those.again_seconds is None:  # optimiser states
        return f"the budget leaves no room for them; copies take {format_seconds(plan.states_seconds)} of a step"
    again = "gathered again" if those.name.startswith(_GATHERED) else "computed again"
    there = those.kept + those.held - those.fixed
    parts = []
    if there > 0:
        parts.append(f"what is kept would be {again} in {_for_bytes(those.kept_again_seconds, there)}")
    if those.fixed:
        parts.append(f"{format_bytes(those.fixed) if there > 0 else 'what is kept'} cannot be {again}")
    if those.dropped:
        parts.append(f"what is dropped is {again} in {_for_bytes(those.again_seconds, those.dropped)}")
    return ", ".join(parts) + _otherwise(those)


def _for_bytes(seconds: float, count: int) -> str:
    if not seconds:
        return "no time, as what reads it is computed"
    return f"{format_seconds(seconds)}, {format_seconds(seconds / count * 1e9)} a GB"


def _otherwise(those: Tensors) -> str:
    """What passes would take that hold values in ways of their own, with all that compute may hide of it."""
    ways = [f"by {by} in up to {format_seconds(seconds)}" for by, seconds in sorted(those.otherwise.items())]
    return f"; or held {', '.join(ways)}" if ways else ""


def _again(one: Tensors) -> str:
    if one.again_seconds is None:
        return "it cannot be computed again"
    if one.name.startswith(_GATHERED):
        return f"gathering it again takes {format_seconds(one.again_seconds)}"
    if not one.again_seconds:
        return "computed again it is fused into what reads it"
    return f"computing it again takes {format_seconds(one.again_seconds)}"


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("dspass")
    except PackageNotFoundError:
        return "checkout"
