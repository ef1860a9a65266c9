"""The report of a model that has not run: what its steps would hold and send, and how long they would take.

A prediction runs whole training steps, by the same code as real ones: the same capture, passes, partition, engine and
program, on fake tensors in a fake process group of any size (:mod:`dspass.fake_steps`). Only the compute segments are
exchanged for ones that allocate and free without computing (:mod:`dspass.lowering.simulate`), and a ledger writes down every
storage's life. Fake steps take no meaningful time: seconds are the cost model's (:mod:`dspass.passes.cost`), of their graphs.

Dropped: predicting from a liveness analysis of the graphs. Autograd's own hand-over of gradients, the first-use order of
gathers and the engine's copies would each need a model of its own, and each would drift.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn

from dspass.compilation import inductor_settings
from dspass.config import Config, ConfigError
from dspass.engines import new_engine
from dspass.fake_steps import Steps, fake_group, fake_inputs, faked
from dspass.lowering.simulate import GraphSimulator, InductorSimulator
from dspass.passes import cost, devices
from dspass.pipelined import Pipelined
from dspass.planner.record import BudgetError, rounded_up, size_text
from dspass.planner.saved import PlanError
from dspass.planning import budget_bytes, refuse_beyond
from dspass.report import Memory, MemoryPoint, PipelineRecord, Report, format_bytes
from dspass.reporting import (
    graphs_of,
    host_copies_of,
    last_graphs,
    memory_timeline,
    pipeline_of,
    pipeline_record,
    report_of,
    traffic_of,
)
from dspass.runtime import compat
from dspass.runtime.engine import Engine
from dspass.runtime.frames import with_room
from dspass.runtime.host_states import local_bytes
from dspass.runtime.ledger import Ledger, Point
from dspass.runtime.stepping import OPTIMIZERS

#: Above this many parameters the graph is walked instead of having Inductor generate code for it.
GENERATE_UP_TO = 500_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """Whose step is to be predicted: a model's with ``args`` and ``kwargs`` as one rank's batch, on ``world`` ranks."""

    model: nn.Module
    args: Sequence[Any]
    kwargs: dict[str, Any]
    config: Config
    world: int
    device: str
    optimizer: str
    train: bool = True


@with_room
def predicted_report(asked: Question) -> Report:
    """One rank's, as :func:`dspass.explain` was asked for it."""
    world, device, optimizer, train = asked.world, asked.device, asked.optimizer, asked.train
    refuse_beyond(asked.config.dspass.memory_budget, device)
    began = time.perf_counter()
    with _pretended(asked.config, world, device) as config:
        ran = _run(asked, config)
        engine, fake, pipeline = ran.engine, ran.model, ran.pipeline
        exposed, seconds = _seconds(engine, fake, device, optimizer, train, pipeline)
        memory = Memory(timeline=ran.timeline, time_unit="events", first_call_peak_bytes=ran.first_call)
        notes: list[str] = []
        warnings: list[str] = []
        if ran.is_estimated:
            notes.append(
                "Temporaries inside of a segment are estimated from its graph: pointwise chains are taken as fused."
            )
        if not train and config.dspass.memory_budget is not None:
            _hold_inference(memory.peak_bytes, budget_bytes(config.dspass.memory_budget, engine))
            notes.append("Nothing is planned for inference, which saves nothing: its peak was held against the budget.")
        notes.append(
            f"Predicted in {time.perf_counter() - began:.1f} s from fake tensors. The time is a roofline's, with rates "
            f"{_rates(device)}."
        )
        on = devices.tabled(device)
        copies = host_copies_of(engine, 2 * _states_away(engine, fake), exposed)
        record = None
        if pipeline is not None:
            record = _predicted_pipeline(pipeline, memory.peak_bytes, train)
            notes.append(_OF_ONE_RANK)
            warnings += _other_ranks_notes(record, pipeline.pipe.rank, engine)
        return report_of(
            engine,
            fake,
            kind="predicted",
            memory=memory,
            traffic=traffic_of(engine, exposed),
            host_copies=copies,
            seconds=seconds,
            world=world,
            device=device,
            warnings=[
                *warnings,
                *_too_large_notes(memory.peak_bytes, on, may_plan=train and config.dspass.memory_budget is None),
                *_over_budget_notes(memory.peak_bytes, engine),
                *_first_call_notes(ran.first_call, on, engine.stage),
            ],
            notes=notes,
            config=config,
            pipeline=record,
        )


@with_room
def with_unplanned(report: Report, asked: Question) -> Report:
    """A report that was predicted of what is ``asked``, with the memory of the step as the passes do it by themselves, where a
    plan was made: another prediction, for a plan changes the whole step."""
    if not report.plans:
        return report
    own = dataclasses.replace(asked.config.dspass, memory_budget=None, plan=None)
    with _pretended(dataclasses.replace(asked.config, dspass=own), asked.world, asked.device) as config:
        ran = _run(asked, config)
    return dataclasses.replace(report, memory=dataclasses.replace(report.memory, unplanned=ran.timeline))


def _hold_inference(peak: int, budget: int) -> None:
    if peak > budget:
        smallest = rounded_up(peak)
        raise BudgetError(
            f"dspass.memory_budget of {size_text(budget)} is too small: inference takes {size_text(smallest)} on each rank, "
            "and saves nothing that could be computed again. Give that much, or use more ranks at stage 3 or a smaller batch.",
            smallest,
        )


@contextlib.contextmanager
def _pretended(config: Config, world: int, device: str) -> Iterator[Config]:
    """A group of ``world`` ranks and tensors that are none; answers ``config`` as it is on so many."""
    with (
        _rare_collections(),
        compat.compiling_apart(),
        fake_group(world, "gloo" if device == "cpu" else "modelled nccl", config.pipeline.enabled),
        compat.fake_mode(),
    ):
        # All ranks of a pipeline see the same batch. Ranks that are no multiple of its stages are refused below.
        yield config.resolve_stage(dist.is_initialized()).resolve_batch(max(world // (config.pipeline.stages or 1), 1))


@dataclasses.dataclass(kw_only=True)
class _Ran:
    """What has run a step, of which ``timeline`` is the memory. ``is_estimated``: temporaries inside of segments are."""

    engine: Engine
    model: nn.Module
    pipeline: Pipelined | None
    timeline: list[MemoryPoint]
    first_call: int
    is_estimated: bool


def _run(asked: Question, config: Config) -> _Ran:
    """Steps of a fake copy of the model with ``config``, until they are as all later ones."""
    model, device, train = asked.model, asked.device, asked.train
    fake = faked(model)
    fake.train(train)
    batch, named = fake_inputs(asked.args), fake_inputs(asked.kwargs)
    engine = new_engine(fake, config)
    engine.target = device
    engine.supposed_optimizer = supposed = OPTIMIZERS[asked.optimizer if train else "none"]
    generates = device == "cpu" and sum(p.numel() for p in model.parameters()) <= GENERATE_UP_TO
    engine.compiler = InductorSimulator(patches=inductor_settings(config)) if generates else GraphSimulator()
    compiled = cast(Any, torch.compile)(fake, backend="deepspeed", options=config)  # typed for Inductor's
    ledger = Ledger(watches=True)
    steps = Steps(compiled, fake, engine, batch, named, supposed, train, ledger)
    engine.probe.ledger = ledger
    with _unwrapped():
        steps.run()  # the one-line way holds the whole model once; makes the optimiser's states
        first_call = max(p.total for p in ledger.points)
        for _ in range(bool(config.zero.stage) + (config.layers.format is not None)):
            steps.run()  # what the first ones do by hand, as weights are stored and sharded, the last one compiles
    if config.pipeline.enabled:
        gc.collect()  # what Dynamo has left of the whole model's fake tensors; real ones are freed by hand
    ledger.points.clear()
    steps.run()
    return _Ran(
        engine=engine,
        model=fake,
        pipeline=pipeline_of(fake),
        timeline=memory_timeline(_ordered(ledger.points)),
        first_call=first_call,
        is_estimated=not generates,
    )


@contextlib.contextmanager
def _unwrapped() -> Iterator[None]:
    """A refusal as it was raised: Dynamo wraps what its backend raises."""
    try:
        yield
    except RuntimeError as error:
        inner = getattr(error, "inner_exception", None)
        if isinstance(inner, (BudgetError, PlanError, ConfigError)):
            raise inner from None
        raise


@contextlib.contextmanager
def _rare_collections() -> Iterator[None]:
    """Graphs are many small objects that live long: looking through them again and again takes a sixth of the time. What the
    caller has frozen stays so."""
    thresholds, is_frozen = gc.get_threshold(), gc.get_freeze_count() > 0
    if not is_frozen:
        gc.freeze()
    gc.set_threshold(200_000, 50, 50)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        if not is_frozen:
            gc.unfreeze()


def _ordered(points: Sequence[Point]) -> list[Point]:
    """Points numbered by event: fake steps take no meaningful time."""
    return [Point(float(i), p.label, p.phase, p.bytes) for i, p in enumerate(points)]


def _too_large_notes(peak: int, on: devices.Device, may_plan: bool) -> list[str]:
    """That a step does not fit, and what may be done about it."""
    if not on.memory_bytes or peak <= on.memory_bytes:
        return []
    plan = 'memory_budget="auto" has a step planned that does, where there is one; ' if may_plan else ""
    return [
        f"Does not fit: a step takes {format_bytes(peak)}, and the {on.name} has {format_bytes(on.memory_bytes)}. Ways out: "
        f"{plan}more ranks at a higher ZeRO stage; a smaller batch."
    ]


#: Share by which a step's peak may exceed its budget before it is said: a loss and its gradient are in no plan.
_BEYOND = 0.01


def _over_budget_notes(peak: int, engine: Engine) -> list[str]:
    """Graphs are planned one by one, and a step is all of them."""
    budgets = [c.plan.budget for c in engine.compilations if c.plan is not None]
    if not budgets or peak <= (1 + _BEYOND) * min(budgets):
        return []
    return [
        f"The budget does not hold: a step takes {format_bytes(peak)}, and was planned for {format_bytes(min(budgets))}. "
        f"Give a budget that is {format_bytes(peak - min(budgets))} smaller."
    ]


def _other_ranks_notes(record: PipelineRecord, own: int, engine: Engine) -> list[str]:
    """That a rank of the pipeline that was not run would not keep the budget, by its model."""
    budgets = [c.plan.budget for c in engine.compilations if c.plan is not None]
    peaks = record.predicted.peak_bytes if record.predicted is not None else []
    over = [rank for rank, peak in enumerate(peaks) if budgets and rank != own and peak > (1 + _BEYOND) * min(budgets)]
    if not over:
        return []
    fullest = max(over, key=peaks.__getitem__)
    return [
        f"The budget may not hold on rank {fullest} of the pipeline, which is modelled and was not run: it takes "
        f"{format_bytes(peaks[fullest])} of {format_bytes(min(budgets))} with its states on the device and the least that its "
        "cut can save. Use more stages, a higher ZeRO stage or smaller micro-batches."
    ]


def _first_call_notes(peak: int, on: devices.Device, stage: int) -> list[str]:
    """That the first call does not fit, where the model is sharded after it: at stage 0 it is a step as any other. A CPU's
    memory is not known: the machine that predicts is seldom the one that trains."""
    if not stage or not on.memory_bytes or peak <= on.memory_bytes:
        return []
    return [
        f"The first call takes {format_bytes(peak)}, and the {on.name} has {format_bytes(on.memory_bytes)}: until then the "
        'model is whole on each rank. Build it under torch.device("meta") and call dspass.shard(model, config, fill=...) '
        "before torch.compile."
    ]


_OF_ONE_RANK = (
    "Memory, traffic and passes are those of the pipeline's first rank, as it would run. Times of the pipeline, what crosses "
    "its cuts, and the peaks of its other ranks are modelled from the captured graph: parameters with gradients and two "
    "states, saved values of the micro-batches in flight, no temporaries."
)


def _predicted_pipeline(pipeline: Pipelined, peak_bytes: int, train: bool) -> PipelineRecord:
    """With the peak of the rank that has been run on fake tensors."""
    timeline = pipeline.predicted(train)
    peaks = list(timeline.peak_bytes)
    peaks[pipeline.pipe.rank] = peak_bytes
    predicted = dataclasses.replace(timeline, peak_bytes=tuple(peaks))
    return pipeline_record(pipeline, predicted, None)


def _rates(device: str) -> str:
    with compat.without_fake_mode():
        source = devices.device(device).source
    return source if source.startswith("measured") else f"of {devices.ACHIEVED:.0%} of {source}"


def _seconds(
    engine: Engine, model: nn.Module, device: str, optimizer: str, train: bool, pipeline: Pipelined | None
) -> tuple[dict[tuple[str, str, str], float], float]:
    """Exposed seconds of collectives, by kind, direction and group, and of copies to and from the host, which have no group;
    and the whole step's."""
    with compat.without_fake_mode():
        on = devices.device(device)
    exposed: dict[tuple[str, str, str], float] = {}
    total = 0.0
    if pipeline is not None:
        exposed = _exposed_of_stages(engine, pipeline, on)
        total = pipeline.predicted(train).seconds * (engine.accumulation_steps if train else 1) + sum(exposed.values())
    # What measured steps took over what was predicted for them, where this model was planned for here before.
    learned = next((c.plan.scale for c in reversed(engine.compilations) if c.plan is not None), 1.0)
    for where, graph in last_graphs(engine) if pipeline is None else ():
        one = cost.estimate(graph, on)
        total += learned * one.seconds * engine.accumulation_steps
        if where == "forward" and train:
            total += learned * cost.holding_seconds(graph, on) * engine.accumulation_steps
        for (kind, group), seconds in one.exposed.items():
            exposed[kind, where, group] = exposed.get((kind, where, group), 0.0) + seconds * engine.accumulation_steps
    if train:
        trained = [p for p in model.parameters() if p.requires_grad]
        states = sum(map(OPTIMIZERS[optimizer].state_bytes, trained))
        total += cost.optimizer_seconds(sum(map(local_bytes, trained)), states, on)
        exposed["optimizer states", "step", ""] = cost.states_seconds(_states_away(engine, model), on)
        total += exposed["optimizer states", "step", ""]
    return exposed, total


def _exposed_of_stages(engine: Engine, pipeline: Pipelined, on: devices.Device) -> dict[tuple[str, str, str], float]:
    """Exposed seconds in one step of this rank's collectives over its data axis. A stage's graph runs once a micro-batch, and
    not each time with all of its collectives: what was counted says how often. Sums of tied weights' gradients stand in no
    graph, and nothing runs beside them."""
    seconds: Counter[tuple[str, str, str]] = Counter()
    calls: Counter[tuple[str, str, str]] = Counter()
    assert pipeline.last is not None
    for compilation in pipeline.last.compilations:
        for where, graph in graphs_of(compilation):
            one = cost.estimate(graph, on)
            for (kind, group), spent in one.exposed.items():
                seconds[kind, where, group] += spent  # type: ignore[assignment]
            for (kind, group), count in one.calls.items():
                calls[kind, where, group] += count
    found: dict[tuple[str, str, str], float] = {}
    for (kind, direction, group, _), (count, sent, _) in engine.traffic.last.items():
        key = kind, direction, group
        if calls[key]:
            found[key] = seconds[key] * count / calls[key]
        else:
            span = max((s.tied_axis.span for s in engine.specs.values() if s.tied_axis is not None), default=1)
            found[key] = count * on.latency + sent / on.link_of(span)
    return found


def _states_away(engine: Engine, model: nn.Module) -> int:
    """Bytes of a supposed optimiser's states that wait on the host."""
    if engine.supposed_optimizer is None:
        return 0
    away = [p for p in model.parameters() if p.requires_grad and p in engine.host_states]
    return sum(map(engine.supposed_optimizer.state_bytes, away))
