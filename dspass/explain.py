"""``dspass.explain``: what the passes do to a model, what peaks where, what is sent, before or after it runs.

A prediction runs whole training steps, by the same code as real ones: the same capture, passes, partition, engine and
program, on fake tensors in a fake process group of any size. Only the compute segments are exchanged for ones that allocate
and free without computing (:mod:`dspass.lowering.simulate`), and a ledger writes down every storage's life.

Dropped: predicting from a liveness analysis of the graphs. Autograd's own hand-over of gradients, the first-use order of
gathers and the engine's copies would each need a model of its own, and each would drift.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import dataclasses
import gc
import os
import platform
import sys
import time
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.fx as fx
from torch import nn

from dspass.compilation import Compilation, inductor_settings
from dspass.config import Config
from dspass.engines import engine_of, new_engine
from dspass.fake_quantising import rounded_layers
from dspass.lowering.simulate import GraphSimulator, InductorSimulator
from dspass.owners import unwrap
from dspass.passes import cost, devices
from dspass.pipelined import Pipelined
from dspass.planner.record import BudgetError, Plan, Tensors
from dspass.planner.saved import PlanError
from dspass.quantising import notes_of_errors, quantised_tensors
from dspass.report import (
    Direction,
    ExpertLayer,
    GraphRecord,
    HostCopy,
    HostCopyKind,
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
from dspass.runtime import compat
from dspass.runtime.axis import MODELLED
from dspass.runtime.engine import Engine
from dspass.runtime.host import offload_start, reload_start
from dspass.runtime.host_states import local_bytes
from dspass.runtime.ledger import CATEGORIES, HOST, Ledger, Point
from dspass.runtime.stepping import OPTIMIZERS, Optimizer
from dspass.settings import kind_of, step_moments
from dspass.weights import stored_tensors

#: Above this many parameters the graph is walked instead of having Inductor generate code for it.
GENERATE_UP_TO = 500_000_000


def explain(
    model: nn.Module | str | os.PathLike[str],
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    config: Config | str | Mapping[str, Any] | None = None,
    world_size: int | None = None,
    device: str | None = None,
    memory_budget: int | str | None = None,
    optimizer: str = "adamw",
    train: bool = True,
) -> Report:
    """Report on a model that has run, predict one that has not, or read a saved report.

    - ``explain(model)`` after steps under the backend: what was counted, and memory where :func:`dspass.measure` watched.
    - ``explain(model, *args, kwargs=..., config=..., world_size=64, device="h100")``: predicted, without a launcher, a GPU or
      the memory: ``model`` may be on the meta device. ``args`` and ``kwargs`` are one rank's batch.
    - ``explain("report.json")``: a saved report.

    ``memory_budget`` (bytes, ``"60GB"``, ``"75%"`` of the device or ``"auto"``) has the planner fit the step into it, and the
    report show what that costs; raises :class:`dspass.BudgetError` where nothing fits. ``optimizer`` names
    whose states are counted (one of :data:`OPTIMIZERS`); ``train=False`` predicts the forward only.
    """
    if isinstance(model, (str, os.PathLike)):
        return Report.load(model)
    if device is not None:
        devices.device(device)  # an unknown one is refused before any work
    if not args and not kwargs:
        return _measured(model)
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer={optimizer!r} is not known; use one of {sorted(OPTIMIZERS)}.")
    settings = Config.load(config)
    return _predicted(
        unwrap(model),
        args,
        dict(kwargs or {}),
        settings,
        world_size or settings_world(),
        device or "cpu",
        memory_budget,
        optimizer,
        train,
    )


def settings_world() -> int:
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def report_at_exit(model: nn.Module, path: str) -> None:
    """Write the report when the process ends, as ``dspass.report`` asks; a failure is said, and ends nothing."""
    weak = weakref.ref(model)

    def write() -> None:
        alive = weak()
        try:
            if alive is not None:
                explain(alive).save(path)
        except Exception as error:
            print(f"dspass: the report could not be written to {path}: {error}", file=sys.stderr)

    atexit.register(write)


# -- a model that has run ------------------------------------------------------------------------------------------------


def _measured(model: nn.Module) -> Report:
    engine = engine_of(model)
    if engine is None or not engine.compilations:
        raise RuntimeError(
            "dspass.explain(model) reports on a model that has run under torch.compile(model, backend='deepspeed'), and this "
            "one has not. Run a step first, or pass a batch to predict: dspass.explain(model, *batch, world_size=8)."
        )
    notes = []
    measurement = engine.measurement
    first_call = engine.first_call_peak_bytes
    memory = Memory(time_unit="seconds", first_call_peak_bytes=first_call)
    if measurement is None:
        notes.append("Memory was not measured: wrap a step in `with dspass.measure(model):`.")
    else:
        timeline = _timeline(measurement.points)
        memory = Memory(timeline=timeline, time_unit="seconds", first_call_peak_bytes=first_call)
    traffic = [
        Traffic(kind=kind, direction=direction, group=group, group_size=size, calls=n, bytes=b, exposed_seconds=exposed)
        for (kind, direction, group, size), (n, b, exposed) in engine.traffic.last.items()
    ]
    copies = _host_copies(engine, 2 * engine.host_states.bytes)
    world = dist.get_world_size() if dist.is_initialized() else 1
    pipeline = _pipelined(unwrap(model))
    record = None
    if pipeline is not None:
        assert pipeline.staging is not None
        record = record_of(
            pipeline.staging,
            pipeline.pipe.rank,
            pipeline.predicted(True),
            pipeline.measured,
            _sends(pipeline),
            pipeline.said,
        )
        if pipeline.measured is None:
            notes.append(
                "Times of the pipeline's ranks were not gathered yet: that is done in the 3rd call that trains, the 10th, the "
                "30th, the 100th and so on."
            )
    return _report(
        "measured",
        engine,
        unwrap(model),
        memory,
        traffic,
        copies,
        engine.step_seconds,
        world,
        kind_of(engine),
        notes,
        engine.config,
        record,
    )


# -- a model that has not --------------------------------------------------------------------------------------------------


def _predicted(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    config: Config,
    world: int,
    device: str,
    budget: int | str | None,
    optimizer: str,
    train: bool,
) -> Report:
    if budget is not None:
        config = dataclasses.replace(
            config,
            dspass=dataclasses.replace(
                config.dspass, memory_budget=Config.load({"dspass": {"memory_budget": budget}}).dspass.memory_budget
            ),
        )
    began = time.perf_counter()
    notes = []
    on_cpu = device == "cpu"
    with (
        _rare_collections(),
        compat.restored_limits(),
        _fake_group(world, "gloo" if on_cpu else "modelled nccl", config.pipeline.enabled),
        compat.fake_mode() as mode,
    ):
        # All ranks of a pipeline see the same batch. Ranks that are no multiple of its stages are refused below.
        config = config.resolve_stage(dist.is_initialized()).resolve_batch(
            max(world // (config.pipeline.stages or 1), 1)
        )
        fake = _faked(model, mode)
        fake.train(train)
        batch, named = _fake_inputs(args, mode), _fake_inputs(kwargs, mode)
        engine = new_engine(fake, config)
        engine.target = device
        engine.supposed_optimizer = supposed = OPTIMIZERS[optimizer if train else "none"]
        small = sum(p.numel() for p in model.parameters()) <= GENERATE_UP_TO
        engine.compiler = InductorSimulator(patches=inductor_settings(config)) if on_cpu and small else GraphSimulator()
        if not (on_cpu and small):
            notes.append(
                "Temporaries inside of a segment are estimated from its graph: pointwise chains are taken as fused."
            )
        compiled = cast(Any, torch.compile)(fake, backend="deepspeed", options=config)  # typed for Inductor's
        ledger = Ledger(watches=True)
        steps = _Steps(compiled, fake, engine, batch, named, supposed, train, ledger)
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
        pipeline = _pipelined(fake)
        exposed, seconds = _seconds(engine, fake, device, optimizer, train, pipeline)
        traffic = [
            Traffic(
                kind=kind,
                direction=direction,
                group=group,
                group_size=size,
                calls=n,
                bytes=b,
                exposed_seconds=exposed.get((kind, direction, group), 0.0),
            )
            for (kind, direction, group, size), (n, b, _) in engine.traffic.last.items()
        ]
        timeline = _timeline(_ordered(ledger.points))
        memory = Memory(timeline=timeline, time_unit="events", first_call_peak_bytes=first_call)
        notes[:0] = _first_call_notes(first_call, devices.tabled(device), engine.stage)
        notes.append(
            f"Predicted in {time.perf_counter() - began:.1f} s from fake tensors. The time is a roofline's, with rates "
            f"{_rates(device)}."
        )
        copies = _host_copies(engine, 2 * _states_away(engine, fake), exposed)
        record = None
        if pipeline is not None:
            record = _predicted_pipeline(pipeline, memory.peak_bytes, train)
            notes.append(_OF_ONE_RANK)
        return _report(
            "predicted", engine, fake, memory, traffic, copies, seconds, world, device, notes, config, record
        )


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


def _pipelined(model: nn.Module) -> Pipelined | None:
    """What runs a model as a pipeline, if it has run so."""
    forward = model.__dict__.get("forward")
    return forward if isinstance(forward, Pipelined) and forward.last is not None else None


def _predicted_pipeline(pipeline: Pipelined, peak_bytes: int, train: bool) -> PipelineRecord:
    """With the peak of the rank that has been run on fake tensors."""
    assert pipeline.staging is not None
    timeline = pipeline.predicted(train)
    peaks = list(timeline.peak_bytes)
    peaks[pipeline.pipe.rank] = peak_bytes
    predicted = dataclasses.replace(timeline, peak_bytes=tuple(peaks))
    return record_of(pipeline.staging, pipeline.pipe.rank, predicted, None, _sends(pipeline), pipeline.said)


def _sends(pipeline: Pipelined) -> str | None:
    return pipeline.config.quantise.sends


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
    for where, graph in _graphs(engine) if pipeline is None else ():
        one = cost.estimate(graph, on)
        total += one.seconds * engine.accumulation_steps
        if where == "forward" and train:
            total += cost.holding_seconds(graph, on) * engine.accumulation_steps
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
        for where, graph in _graphs_of(compilation):
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


def _graphs_of(compilation: Compilation) -> Iterator[tuple[Direction, fx.Graph]]:
    directions: tuple[Direction, ...] = ("forward", "backward")
    for where in directions:
        if where in compilation.graphs:
            yield where, compilation.graphs[where].graph


def _graphs(engine: Engine) -> Iterator[tuple[Direction, fx.Graph]]:
    """Of a function that was compiled again, as when a model sets something in its first call, the last counts; of a pipeline
    the stages that ran last."""
    root = engine.root() if engine.root is not None else None
    pipeline = _pipelined(root) if root is not None else None
    built = pipeline.last_trained or pipeline.last if pipeline is not None else None
    known = built.compilations if built is not None else {c.frame: c for c in engine.compilations}.values()
    for compilation in known:
        yield from _graphs_of(compilation)


def _states_away(engine: Engine, model: nn.Module) -> int:
    """Bytes of a supposed optimiser's states that wait on the host."""
    if engine.supposed_optimizer is None:
        return 0
    away = [p for p in model.parameters() if p.requires_grad and p in engine.host_states]
    return sum(map(engine.supposed_optimizer.state_bytes, away))


def _host_copies(
    engine: Engine, states_bytes: int, exposed: Mapping[tuple[str, str, str], float] | None = None
) -> list[HostCopy]:
    """What the graphs copy to the host and back, and ``states_bytes`` of the optimiser's; ``exposed`` None: not measured."""
    moved: Counter[tuple[HostCopyKind, Direction]] = Counter()
    starts: dict[Any, HostCopyKind] = {offload_start: "offload", reload_start: "reload"}
    for where, graph in _graphs(engine):
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


class _Steps:
    """Training steps on fake tensors, the optimiser's by what it holds (:func:`dspass.settings.step_moments`).

    What the model answers is held to the end of the step, as a variable of the training loop holds it (``out = model(x)``) and
    as a plan supposes (:mod:`dspass.planner.dry_run`): a budget must hold for that loop, too. One that says ``model(x).loss``
    lets go of the logits before its backward, and takes as many bytes less, unless the backward reads them.
    """

    def __init__(
        self,
        compiled: Any,
        model: nn.Module,
        engine: Engine,
        batch: Sequence[Any],
        named: dict[str, Any],
        optimizer: Optimizer,
        train: bool,
        ledger: Ledger,
    ) -> None:
        self.compiled, self.model, self.engine = compiled, model, engine
        self.batch, self.named, self.optimizer, self.train, self.ledger = batch, named, optimizer, train, ledger
        self.kept: dict[int, torch.Tensor] = {}
        """The optimiser's states, by the parameter that they are of."""

    def run(self) -> None:
        self.ledger.phase = "forward"
        hosted = {id(spec.param()) for spec in self.engine.specs.values() if spec.on_host}
        for param in self.model.parameters():
            self.ledger.note(param.data, HOST if id(param) in hosted else "parameters")
        self.ledger.note(list(self.model.buffers()), "parameters")
        self.ledger.note([self.batch, self.named])  # the loop holds them, whether the backward reads them or not
        for _ in range(self.engine.accumulation_steps if self.train else 1):
            if not self.train:
                with torch.no_grad():
                    self.compiled(*self.batch, **self.named)
                continue
            answer = self.compiled(*self.batch, **self.named)
            loss = _loss(answer)
            self.ledger.phase = "backward"
            # The first backward of a model that is being sharded is autograd's own.
            with contextlib.nullcontext() if self.engine.compilations else self.ledger.watching():
                loss.backward()
            self.ledger.phase = "forward"
        if self.train:
            self._optimizer_step()

    def _optimizer_step(self) -> None:
        self.engine.before_step()
        self.ledger.phase, self.ledger.label = "optimizer", "optimizer.step"
        trained = [p for p in self.model.parameters() if p.grad is not None]
        away = self.engine.host_states
        hosted = {id(spec.param()) for spec in self.engine.specs.values() if spec.on_host}
        for param in trained:
            self.ledger.note(param.grad, HOST if id(param) in hosted else "gradients")
            if id(param) not in self.kept:
                self.kept[id(param)] = torch.empty(self.optimizer.state_bytes(param), dtype=torch.uint8)
            # Where they wait was decided behind the step that made them, if a plan did.
            waits = param in away or id(param) in hosted
            self.ledger.note(self.kept[id(param)], HOST if waits else "optimizer")
        for moment in step_moments(self.engine, trained):
            came, made = (torch.empty(count, dtype=torch.uint8) for count in (moment.states, moment.temporaries))
            self.ledger.note(came, "optimizer")
            self.ledger.note(made)
            del came, made
        self.engine.after_step()
        for param in trained:
            param.grad = None
        self.ledger.phase = "forward"


def _loss(result: Any) -> torch.Tensor:
    if isinstance(result, torch.Tensor):
        loss = result
    elif getattr(result, "loss", None) is not None:
        loss = result.loss
    else:
        leaves = [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor) and t.requires_grad]
        if not leaves:
            raise ValueError(
                "the model's output holds no tensor with a gradient: pass labels so that it answers a loss, or "
                "use train=False."
            )
        loss = leaves[0]
    return loss if loss.dim() == 0 else loss.float().sum()


@contextlib.contextmanager
def _unwrapped() -> Iterator[None]:
    """A refusal as it was raised: Dynamo wraps what its backend raises."""
    try:
        yield
    except RuntimeError as error:
        inner = getattr(error, "inner_exception", None)
        if isinstance(inner, (BudgetError, PlanError)):
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


@contextlib.contextmanager
def _fake_group(world: int, backend: str, always: bool) -> Iterator[None]:
    """A process group of ``world`` ranks in which nothing is sent; modelled as ``backend``. One rank has none, unless
    ``always``."""
    if dist.is_initialized():
        raise RuntimeError(
            "dspass.explain predicts in a fake process group, and this process is in a real one: predict before "
            "init_process_group(), or in a process of its own (python -m dspass explain --help)."
        )
    if world == 1 and not always:
        yield
        return
    compat.init_fake_group(world)
    modelled = MODELLED.set(backend)
    try:
        yield
    finally:
        MODELLED.reset(modelled)
        dist.destroy_process_group()


def _faked(model: nn.Module, mode: Any) -> nn.Module:
    """A copy of ``model`` with fake parameters and buffers; meta ones become fake ones on the CPU. Ties are kept."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        if id(tensor) in memo:
            continue
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        memo[id(tensor)] = (
            nn.Parameter(fake, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
        )
    return copy.deepcopy(model, memo)


def _fake_inputs(values: Any, mode: Any) -> Any:
    return torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype), values
    )


# -- reports ---------------------------------------------------------------------------------------------------------------


def _ordered(points: Sequence[Point]) -> list[Point]:
    """Points numbered by event: fake steps take no meaningful time."""
    return [Point(float(i), p.label, p.phase, p.bytes) for i, p in enumerate(points)]


def _timeline(points: Sequence[Point]) -> list[MemoryPoint]:
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


def _report(
    kind: Any,
    engine: Engine,
    model: nn.Module,
    memory: Memory,
    traffic: list[Traffic],
    host_copies: list[HostCopy],
    seconds: float | None,
    world: int,
    device: str,
    notes: list[str],
    config: Config | None,
    pipeline: PipelineRecord | None,
) -> Report:
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
    quantised = quantised_tensors(_graphs(engine), engine)
    limit = config.quantise.max_relative_error if config is not None else None
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
        plans=[_plan_record(c.name, c.plan, seconds) for c in engine.compilations if c.plan is not None],
        config=config.to_dict() if config is not None else {},
        ignored=ignored,
        notes=[
            *dict.fromkeys(n for c in engine.compilations for p in c.passes for n in p.notes),
            *_routing_notes(kind, engine),
            *notes_of_errors(quantised, limit),
            *(notes_of_messages(pipeline, limit) if pipeline is not None else ()),
            *notes,
        ],
        versions={"torch": torch.__version__, "python": platform.python_version(), "dspass": _version()},
    )


def _routing_notes(kind: str, engine: Engine) -> list[str]:
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


def _plan_record(graph: str, plan: Plan, step_seconds: float | None) -> PlanRecord:
    """A plan's own seconds are of its graph's forward and backward; here they are the whole step's."""
    rest = step_seconds - plan.seconds - plan.states_seconds if step_seconds is not None else 0.0
    kept = f"{format_bytes(plan.kept_bytes)} of gathered copies kept, " if plan.kept_bytes else ""
    decision = plan.decision
    held = f"{format_bytes(plan.held_bytes)} in {decision.holders}, " if plan.held_bytes else ""
    states = f", {format_bytes(plan.states_bytes)} of optimiser states on the host" if plan.states_bytes else ""
    buckets = f", buckets of {format_bytes(decision.bucket_bytes)}" if decision.bucket_bytes else ""
    return PlanRecord(
        graph=graph,
        summary=f"{format_bytes(plan.saved_bytes - plan.kept_bytes)} saved, {held}{kept}{len(decision.recomputed)} values "
        f"computed again in {format_seconds(plan.again_seconds)}{states}{buckets}; peak {format_bytes(plan.peak)}",
        budget_bytes=plan.budget,
        peak_bytes=plan.peak,
        frontier=[
            PlanPoint(peak_bytes=o.peak, seconds=o.seconds + rest, saved_bytes=o.saved_bytes, is_measured=o.is_measured)
            for o in plan.frontier
        ],
        here=plan.chosen,
        classes=[_plan_tensors(t, "") for t in plan.classes],
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
        again_seconds=tensors.again_seconds or 0.0,
        reason=reason,
    )


def _reason(one: Tensors) -> str:
    """Why a value was kept, or not."""
    if one.held:
        return f"held by {one.held_by}, {format_bytes(one.held)}: {_again(one)}"
    if one.kept:
        kept = "kept" if one.name.startswith("gathered-parameter") else "saved"
        return f"{kept}, {format_bytes(one.kept)}: {_again(one)}"
    return f"dropped, which frees {format_bytes(one.dropped)}: {_again(one)}"


def _again(one: Tensors) -> str:
    if one.again_seconds is None:
        return "it cannot be computed again"
    if one.name.startswith("gathered-parameter"):
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


__all__ = ["OPTIMIZERS", "explain"]
