"""A model whose layers are divided over ranks, from a plain training loop.

The model gets a forward of ours. It splits the batch that it is called with into micro-batches, and where the captured graph
ends in a loss, it runs the whole schedule, forward and backward of each, holds the gradients, and answers the loss;
``loss.backward()`` then delivers them, times what arrives: so a loss that is scaled, added to others or called several times a
step does what it does without a pipeline. Without gradients it runs forward only and answers the outputs.

The person's own forward is still what Dynamo captures, at the size of a micro-batch and in one piece. Its guards say when it
has to be captured anew, it takes arguments apart into the graph's inputs, and puts outputs together again: the compiled
function is called with each micro-batch, and its graph gives up as soon as it has its inputs; at the end it is called once
more, and its graph answers what the schedule has made.

Dropped: to rewrite the graph that was captured with the whole batch. Its sizes are written into it as numbers, and which of
them are the batch's nobody can say. Dropped: ``torch.export``, which wants the model without its training loop, and has no
guards.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.fx as fx
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from dspass import pipeline_checks as checks
from dspass import pipeline_times as times
from dspass import stage_plans as plans
from dspass import steps
from dspass.batches import batch_size, part_of
from dspass.between_ranks import all_ranks
from dspass.casts import cast_inputs
from dspass.compilation import Compilation, compile_graph
from dspass.config import Config, ConfigError
from dspass.engines import new_engine
from dspass.expert_weights import alike, keys_in
from dspass.lowering.stage_backward import StageBackward
from dspass.owners import unwrap
from dspass.passes import devices
from dspass.passes.captured_cost import costs_of
from dspass.passes.combine_losses import Combination, combine_losses, find_loss, loss_of
from dspass.passes.regions import read_in_front
from dspass.passes.split_stages import StageGraph, keep_outputs, read_parameters, split_stages
from dspass.passes.whole_batch import broadcast_alike
from dspass.pipeline import build
from dspass.pipeline_outputs import LossScale, Output, PipelineUseError, delivered, evaluated, on_stages, outputs_of
from dspass.pipeline_times import Measured
from dspass.planner.calls import Place
from dspass.planner.stages import follow
from dspass.planning import budget_bytes
from dspass.runtime import compat
from dspass.runtime.axis import Axis, axis_of
from dspass.runtime.engine import Engine
from dspass.runtime.pipeline import Executor, Stage
from dspass.runtime.randomness import drawing_apart
from dspass.runtime.schedule import Kind, ScheduleError, Timeline
from dspass.runtime.stopped import waiting_for
from dspass.runtime.tied import sum_tied
from dspass.settings import kind_of
from dspass.shard import Fill, agree, materialise_buffers, refuse_wrapped
from dspass.staged import pipeline_mesh, place_stages, prepare, wanting_gradients
from dspass.staging import Staging, forward_only, packing_of, plan_stages


def pipelined(
    model: nn.Module, config: Config, *, fill: Fill | None = None, device: torch.device | str | None = None
) -> Pipelined:
    """Give ``model`` a forward that runs as a pipeline. Its parameters are placed in the first call, by its graph."""
    root = unwrap(model)
    known = root.__dict__.get("forward")
    if isinstance(known, Pipelined):
        return known
    refuse_wrapped(root)
    found = Pipelined(root, config, fill, device)
    root.forward = found
    return found


@dataclass(kw_only=True, eq=False)
class Built:
    """A captured graph in stages, as it runs."""

    executor: Executor
    combination: Combination | None
    loss: int | None
    """Position of the output whose gradients are held, where there are any."""
    trains: bool
    graphs: list[StageGraph]
    outputs: list[Output]
    compilations: list[Compilation]
    """Of this rank's stages."""
    keeps_for_call: bool
    """See :attr:`dspass.runtime.engine.Engine.keeps_for_call`."""
    has_answered: bool = False

    @property
    def needs_batch(self) -> bool:
        """Whether each micro-batch is told something of the whole batch."""
        return self.combination is not None and bool(self.combination.totals)


@dataclass(kw_only=True, eq=False)
class Capture:
    """What Dynamo captured for one kind of micro-batch, and what was made of it by the number of micro-batches."""

    gm: fx.GraphModule
    built: dict[int, Built] = field(default_factory=dict)


class _Collected(Exception):
    """Carries a micro-batch's graph inputs out of the compiled function."""

    def __init__(self, capture: Capture, inputs: Sequence[Any]) -> None:
        super().__init__()
        self.capture, self.inputs = capture, inputs


@dataclass(kw_only=True, eq=False)
class _Batches:
    """A call's micro-batches: as arguments, as inputs of the captured graph, and which of those are split (``split``)."""

    calls: list[Any]
    inputs: list[Sequence[Any]]
    capture: Capture
    split: set[int]
    whole: Sequence[Any] | None = None
    """The whole batch's inputs of the graph that was captured with it."""
    whole_graph: fx.Graph | None = None


class Pipelined:
    """The forward of a model that runs as a pipeline."""

    def __init__(self, root: nn.Module, config: Config, fill: Fill | None, device: torch.device | str | None) -> None:
        self.root, self.config, self.fill, self.device = root, config, fill, device
        self.passes = build(config)
        self.engine: Engine | None = None
        self.staging: Staging | None = None
        self.last: Built | None = None
        """What ran last, for the report."""
        self.last_trained: Built | None = None
        self.measured: Measured | None = None
        """Of a call that trained, not always the last."""
        self.loss_scale: LossScale | None = None
        self._trainings = 0
        self._answer: Sequence[Any] | None = None
        self._keeps_answers = False
        self._answers_kept: Sequence[Any] | None = None
        original = type(root).forward

        def whole_forward(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return original(model, *args, **kwargs)

        self._captured = torch.compile(whole_forward, backend=self._capture, fullgraph=True, dynamic=False)

    def __deepcopy__(self, memo: Any) -> Any:
        raise PipelineUseError(
            "a model whose layers are divided over ranks cannot be copied: no rank has all of it. Copy it before its first "
            "call, or build another and load dspass.full_state_dict(model)."
        )

    @torch._dynamo.disable(reason="runs a pipeline's schedule")
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Without gradients is enough: what is made in inference mode has no versions, and could not be captured or trained.
        wanted = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(wanted and self.root.training):
            return self._call(args, kwargs, wanted)

    def _call(self, args: Any, kwargs: Any, wants_gradients: bool) -> Any:
        leaves, structure = tree_flatten((args, kwargs))
        if self.engine is None:
            self._begin(args, kwargs)
            if not is_in_prediction():
                checks.same_batch(self.pipe, leaves)
        size, trains = batch_size(leaves), torch.is_grad_enabled()
        if size is None:
            raise PipelineUseError(
                "a call without tensors that have a dimension has no batch to split into micro-batches: pass the batch as "
                "tensors."
            )
        if trains:
            checks.refuse_gradients(leaves)
        if self.staging is None:
            guess = self._micro_batches(size, trains)
            self._stage(self._collect(leaves, structure, size, guess).capture.gm, size, guess, trains)
        count = self._micro_batches(size, trains)
        batches = self._collect(leaves, structure, size, count)
        built = batches.capture.built.get(count)
        if count > 1 and (built is None or built.needs_batch):
            whole = self._collect(leaves, structure, size, 1)
            batches.whole, batches.whole_graph = whole.inputs[0], whole.capture.gm.graph
        if built is None:
            built = batches.capture.built[count] = self._build(batches, size, count, trains)
        self.last = built
        if built.trains:
            self.last_trained = built
        return self._run(built, batches, wants_gradients and not trains)

    def first_call(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], outputs: int, broken: str | None
    ) -> Sequence[Any]:
        """The first call of a model that was compiled and not prepared by ``dspass.shard``: its own forward is running, as a
        graph with so many ``outputs``, or as the first piece of a ``broken`` one; answers them for the whole batch."""
        way_out = (
            "Call dspass.shard(model, config) before the optimiser is built: then the model is captured in one piece."
        )
        if broken is not None:
            raise PipelineUseError(
                f"the model's forward was captured in pieces, which cannot be stages. The first ends at {broken} {way_out}"
            )
        self._keeps_answers = True
        try:
            self(*args, **kwargs)
            answers, self._answers_kept = self._answers_kept, None
        finally:
            self._keeps_answers = False
        assert answers is not None
        if len(answers) != outputs:
            raise PipelineUseError(
                f"the model's forward gave {outputs} outputs to its first capture and {len(answers)} to the second. {way_out}"
            )
        return answers

    def predicted(self, trains: bool) -> Timeline:
        """What its schedule takes by the cost model, with or without the backwards."""
        staging = self.staging
        assert staging is not None
        schedule = staging.schedule
        return staging.timeline(schedule if trains else forward_only(schedule, schedule.micro_batches))

    @property
    def said(self) -> list[str]:
        """How the stages of this rank run, for the report."""
        built = self.last_trained or self.last
        if self.engine is None or self.engine.stage != 3 or built is None:
            return []
        often = "call" if built.keeps_for_call else "micro-batch, in each direction"
        return [f"parameters are gathered once a {often}"]

    # -- before the first call -------------------------------------------------------------------------------------

    def _begin(self, args: Any, kwargs: Any) -> None:
        compat.check_torch()
        root, stages = self.root, self.config.pipeline.stages or 1
        self.kind = torch.device(self.device).type if self.device is not None else _device_of(root, args, kwargs)
        self.mesh = pipeline_mesh(stages, self.kind)
        self.config = config = self.config.resolve_batch(dist.get_world_size() // stages)
        self.pipe: Axis = axis_of("pipe", self.mesh, 0)
        agree(root, config, self.mesh)
        self.engine = new_engine(root, config)
        prepare(root, self.engine, config, self.mesh)
        if self.fill is not None:  # parameters are captured from the meta device, buffers are computed with
            materialise_buffers(root, self.fill, self.device or self.kind)

    def _micro_batches(self, size: int, trains: bool) -> int:
        """How many parts a batch is split into."""
        written = self.config.pipeline.micro_batches
        asked = self.staging.micro_batches if self.staging is not None and written is None else written
        if asked is None:  # a first guess, which the planner replaces
            asked = 2 * (self.config.pipeline.stages or 1)
        elif trains and written is not None and size % written:
            divisors = [d for d in range(1, size + 1) if size % d == 0]
            near = sorted(divisors, key=lambda d: abs(d - written))[:2]
            raise PipelineUseError(
                f"pipeline.micro_batches: {written} does not divide this call's batch of {size}. Write one of {sorted(near)}, "
                "or drop or pad a last, smaller batch (DataLoader(drop_last=True))."
            )
        return max(d for d in range(1, size + 1) if size % d == 0 and d <= asked)

    def _stage(self, gm: fx.GraphModule, size: int, count: int, trains: bool) -> None:
        """Decide on stages, as rank 0 finds, and place the parameters."""
        assert self.engine is not None
        try:
            wanted = self.config.dspass.memory_budget
            budget = budget_bytes(wanted, self.engine, all_ranks()) if wanted is not None and trains else None
            with compat.without_fake_mode():
                self.staging = plan_stages(gm, self.config, self.engine, self.pipe, size, count, trains, budget)
        except ScheduleError as error:
            raise ConfigError(
                f"pipeline.{error.setting}", f"{error.cause.removesuffix('.')}.", error.way_out
            ) from error
        if dist.get_world_size() > 1 and not is_in_prediction():
            told = [self.staging]
            with waiting_for(Axis.world(), "agree on stages"):
                dist.broadcast_object_list(told, 0)
            self.staging = told[0]
        experts = self._experts(gm) if self.config.expert_parallel.enabled else ()
        place_stages(
            self.root,
            self.engine,
            self.config,
            self.mesh,
            self.staging.keys(self.engine),
            self.staging.schedule.rank_of,
            fill=self.fill,
            device=self.device,
            experts=experts,
        )
        self.fill = None
        steps.watch(self.engine, self.config)
        if self.config.dspass.report is not None and dist.get_rank() == 0 and not is_in_prediction():
            from dspass.explain import report_at_exit  # which reads what is here

            report_at_exit(self.root, self.config.dspass.report)

    def _experts(self, gm: fx.GraphModule) -> set[str]:
        """The keys of weights of experts, those of other modules of the same kind among them."""
        assert self.engine is not None
        params = dict(self.root.named_parameters())
        weights = alike(self.root, (params[self.engine.specs[key].name] for key in keys_in(gm.graph)))
        known = {id(weight) for weight in weights}
        return {f"{self.engine.name}/{name}" for name, param in params.items() if id(param) in known}

    # -- capture ---------------------------------------------------------------------------------------------------

    def _capture(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Dynamo's backend: the graph answers what was put there for it, or gives up its inputs."""
        for node, value in zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True):
            if isinstance(value, nn.Parameter):
                compat.guard_identity(node)
                break
        compat.allow_compilations(1)
        read_in_front(gm)
        read_parameters(gm.graph)
        cast_inputs(gm, self.config)
        capture = Capture(gm=gm)

        def run(*inputs: Any) -> Any:
            if self._answer is not None:
                return self._answer
            raise _Collected(capture, inputs)

        return torch._dynamo.disable(run, reason="gives up its inputs")

    def _collect(self, leaves: Sequence[Any], structure: Any, size: int, count: int) -> _Batches:
        assert self.engine is not None
        calls, inputs, captures, split = [], [], [], set()
        with wanting_gradients(self.engine):
            for i in range(count):
                part = part_of(leaves, size, count, i)
                args, kwargs = call = tree_unflatten(part, structure)
                try:
                    with compat.ignoring_logs(), compat.in_one_piece(_broken):
                        self._captured(self.root, *args, **kwargs)
                except _Collected as found:
                    captures.append(found.capture)
                    inputs.append(found.inputs)
                    calls.append(call)
                else:
                    raise PipelineUseError("the model's forward computes nothing that could be divided over ranks.")
                if i == 0:
                    parts = {id(t) for t, whole in zip(part, leaves, strict=True) if t is not whole}
                    split = {j for j, value in enumerate(inputs[0]) if id(value) in parts}
        if any(capture is not captures[0] for capture in captures):
            raise PipelineUseError(
                "micro-batches of one call were captured as different graphs: the model's forward depends on values of its "
                "arguments, or counts its calls. Take that out of it, or set pipeline.micro_batches to 1."
            )
        return _Batches(calls=calls, inputs=inputs, capture=captures[0], split=split)

    # -- stages ----------------------------------------------------------------------------------------------------

    def _build(self, batches: _Batches, size: int, count: int, trains: bool) -> Built:
        """Cut a captured graph as the parameters lie, and compile this rank's stages."""
        assert self.engine is not None
        assert self.staging is not None
        staging = self.staging
        with compat.without_fake_mode():  # a prediction's: what was captured has Dynamo's
            gm = _copied(batches.capture.gm)
            graph = gm.graph
            placeholders = graph.find_nodes(op="placeholder")
            split = {placeholders[i] for i in batches.split}
            checks.refuse_state(graph, split, count, trains)
            if batches.whole_graph is not None:
                broadcast_alike(graph, batches.whole_graph, count)
                checks.refuse_mixed_rows(graph, batches.whole_graph, count, self.root, batches.calls[0], size // count)
            combination = self._combined(graph, batches.whole_graph, count, trains)
            described = outputs_of(graph, batches.whole_graph, count, split, combination)
            position = next((i for i, output in enumerate(described) if output.is_loss), None)
            if trains:
                keep_outputs(gm, [i for i, output in enumerate(described) if output.adds])
            costs = costs_of(gm, devices.tabled(kind_of(self.engine)), trains)
            cuts = follow(gm, staging.schedule.stages, costs, staging.stages_of, staging.known)
            crossing = [c.values for c in cuts.cuts]
            graphs = split_stages(gm, [s.nodes for s in cuts.stages], crossing, cuts.stage_of, packing_of(self.config))
        try:
            schedule = staging.schedule_of(count) if trains else forward_only(staging.schedule, count)
        except ScheduleError as error:
            raise PipelineUseError(
                f"this call's batch of {size} is split into {count} micro-batches, where {staging.micro_batches} were planned: "
                f"{error.cause.removesuffix('.')}. Drop or pad a last, smaller batch (DataLoader(drop_last=True))."
            ) from error
        inputs = [*batches.inputs[0], *_totals(combination, batches)]
        parts = {action.stage for row in schedule.actions for action in row if action.kind is Kind.INPUT}
        adds = schedule.micro_batches > 1
        before = len(self.engine.compilations)
        mine = schedule.stages_of(self.pipe.rank)

        def compiled(stage: StageGraph, place: Place | None = None) -> Stage:
            return self._compile(stage, inputs, trains, stage.index in parts, adds, place)

        def planned() -> dict[int, Stage]:
            assert self.engine is not None
            engine, own = self.engine, self.config.dspass
            gather = self.config.pipeline.gather
            if not trains or (own.memory_budget is None and own.plan is None):
                gather = gather or ("call" if own.memory_budget is None else "micro_batch")
                return plans.gathered(engine, gather, lambda: {s: compiled(graphs[s]) for s in mine})
            order = sorted(mine, key=lambda s: -cuts.stages[s].saved_bytes)
            links, size = plans.links_of(graphs), plans.bytes_of(batches.calls)
            in_budget = functools.partial(
                plans.in_budget, graphs, order, schedule, self.pipe.rank, links, size, engine, compiled
            )
            return plans.gathered(engine, gather, in_budget)

        if not is_in_prediction():
            checks.same_cuts(self.pipe, graphs)
        stages = plans.together(self.pipe, planned)
        executor = Executor(
            schedule=schedule,
            axis=self.pipe if self.pipe.size > 1 else None,
            stages=stages,
            device=torch.device(self.kind),
            loss=position if trains else None,
            on_last=self.engine.backward_of_call,
        )
        return Built(
            executor=executor,
            combination=combination,
            loss=position,
            trains=trains,
            graphs=graphs,
            outputs=on_stages(described, graphs),
            compilations=self.engine.compilations[before:],
            keeps_for_call=self.engine.keeps_for_call,
        )

    def _combined(self, graph: fx.Graph, whole: fx.Graph | None, count: int, trains: bool) -> Combination | None:
        """The loss and other scalars, rewritten so that micro-batches' add up to the batch's. Without gradients there may be no
        loss, or one that does not."""
        reduction: Literal["mean"] | None = "mean" if self.config.pipeline.loss_reduction == "mean" else None
        try:
            return combine_losses(graph, loss_of(graph) if trains else find_loss(graph), whole, count, reduction)
        except ValueError as error:
            if trains:
                raise PipelineUseError(str(error)) from error
            return None

    def _compile(
        self, graph: StageGraph, inputs: Sequence[Any], trains: bool, in_parts: bool, adds: bool, place: Place | None
    ) -> Stage:
        """``in_parts``: gradients of activations may be asked for before the others; ``adds``: the others of several
        micro-batches are added up."""
        assert self.engine is not None
        values = {v.name: v for v in graph.received}
        examples = []
        for name in graph.reads:
            examples.append(values[name].empty(self.kind).zero_().requires_grad_(trains and values[name].has_gradient))
        examples += [inputs[i] for i in graph.inputs]
        examples += [shard_of(self.engine, key, trains) for key in graph.keys]
        backward = None
        if trains:
            activations, keys = range(len(graph.reads)), range(len(examples) - len(graph.keys), len(examples))
            backward = StageBackward(len(examples), activations if in_parts else None, keys if adds else ())
        with torch.set_grad_enabled(trains), compat.own_tracing():
            run = compile_graph(
                graph.gm,
                examples,
                self.engine,
                self.config,
                self.passes,
                stage_backward=backward,
                place=place,
            )
        return Stage.of(graph, run, backward)

    # -- run -------------------------------------------------------------------------------------------------------

    def _run(self, built: Built, batches: _Batches, evaluates: bool) -> Any:
        """``evaluates``: gradients are not asked for since the model is in evaluation, and may be missed."""
        assert self.engine is not None
        engine, inputs, trains = self.engine, batches.inputs, built.trains
        totals = _totals(built.combination, batches)
        inputs = [[*batch, *totals] for batch in inputs]
        keys = dict.fromkeys(key for stage in built.executor.stages.values() for key in stage.keys)
        shards = {key: shard_of(engine, key, trains) for key in keys}
        self._trainings += trains
        is_due = trains and times.is_due(self._trainings)
        built.executor.watched = is_due or self.kind != "cuda"
        built.executor.scale = scale = self._scale(built)
        engine.keeps_for_call = built.keeps_for_call
        apart = contextlib.nullcontext() if is_in_prediction() else drawing_apart(self.pipe, torch.device(self.kind))
        with engine.one_call(), apart:
            results = built.executor(inputs, shards)
        if is_due and not is_in_prediction():
            known = engine.measurement
            peak = known.peak_bytes if known is not None else None
            self.measured = times.gather(built.executor, self.pipe, self._trainings, peak)
        answers = self._answers(built, results, inputs, trains)
        if trains:
            assert built.loss is not None
            gradients = {key: shard.grad for key, shard in shards.items() if shard.grad is not None}
            with waiting_for(self.pipe, "sum gradients of tied weights"):
                sum_tied(engine, gradients)
            answers[built.loss] = delivered(engine, answers[built.loss], gradients, scale, self.loss_scale)
        elif evaluates and built.loss is not None:
            answers[built.loss] = evaluated(answers[built.loss])
        self._answer = answers
        self._answers_kept = answers if self._keeps_answers else None
        try:
            args, kwargs = batches.calls[0]
            kept = contextlib.nullcontext() if built.has_answered else checks.keeping_buffers(self.root)
            with compat.ignoring_logs(), kept, wanting_gradients(engine):
                answer = self._captured(self.root, *args, **kwargs)
            built.has_answered = True
            return answer
        finally:
            self._answer = None

    def _scale(self, built: Built) -> torch.Tensor | None:
        """What backwards begin with, where that is not 1."""
        stage = built.outputs[built.loss].stage if built.trains and built.loss is not None else None
        if not self.config.fp16 or stage is None:
            return None
        if self.loss_scale is None:
            self.loss_scale = LossScale(self.kind)
        with waiting_for(self.pipe, "exchange the scale of the loss"):
            return self.loss_scale.begin(self.pipe, built.executor.schedule.rank_of[stage])

    def _answers(
        self, built: Built, results: Mapping[int, list[Any]], inputs: Sequence[Sequence[Any]], trains: bool
    ) -> list[Any]:
        """The captured graph's outputs for the whole batch, where they are asked for."""
        answers: list[Any] = []
        rank_of, count = built.executor.schedule.rank_of, len(inputs)
        for position, output in enumerate(built.outputs):
            if output.input is not None:
                answers.append(output.whole([batch[output.input] for batch in inputs]))
            elif not output.is_made:
                answers.append(output.literal)
            elif output.stage is None or output.apart:
                answers.append(output.stand_in(count, trains))
            else:
                owner = rank_of[output.stage]
                mine = output.whole(results[position]) if owner == self.pipe.rank else None
                if self.config.pipeline.outputs == "all" or output.is_loss:
                    mine = self._from(owner, mine, output, count)
                answers.append(mine if mine is not None else output.stand_in(count, trains))
        return answers

    def _from(self, owner: int, value: torch.Tensor | None, output: Output, count: int) -> torch.Tensor:
        """The value that rank ``owner`` of the pipeline has, on all of its ranks."""
        if value is None:
            value = torch.empty(output.whole_shape(count), dtype=output.dtype, device=self.kind)
        if self.pipe.size > 1:
            value = value.contiguous()
            with waiting_for(self.pipe, f"exchange {'the loss' if output.is_loss else 'an output'}"):
                dist.broadcast(value, self.pipe.ranks[owner], self.pipe.group)
        return value


def is_in_prediction() -> bool:
    """Whether there are no other ranks, whatever the process group says: in ``dspass.explain``."""
    return dist.get_backend() == "fake"


def shard_of(engine: Engine, key: str, trains: bool) -> torch.Tensor:
    """This rank's part of a parameter as a leaf of its own, in whose ``.grad`` a call's gradients gather."""
    spec = engine.specs[key]
    param: Any = spec.param()
    return param.to_local().detach().requires_grad_(trains and spec.trains)


def _broken(why: str) -> PipelineUseError:
    return PipelineUseError(
        f"the model's forward cannot be captured in one piece, which stages are cut from: {why}. Take that out of the forward."
    )


def _totals(combination: Combination | None, batches: _Batches) -> list[torch.Tensor]:
    """What each micro-batch is told of the whole batch, such as how many labels it has."""
    return combination.values(batches.whole) if combination is not None and batches.whole is not None else []


def _copied(gm: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    made = fx.GraphModule(gm, graph)
    (old,), (new,) = gm.graph.find_nodes(op="output"), graph.find_nodes(op="output")
    new.meta = dict(old.meta)
    return made


def _device_of(root: nn.Module, args: Any, kwargs: Any) -> str:
    for tensor in (*root.parameters(), *tree_flatten((args, kwargs))[0]):
        if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
            return tensor.device.type
    return "cpu"


__all__ = ["Built", "Capture", "Pipelined", "pipelined", "shard_of"]
