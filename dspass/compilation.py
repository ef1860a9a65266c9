"""One captured graph on its way: AOTAutograd, the passes, the partition, the lowering, and what each of them did."""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from dspass.between_ranks import together
from dspass.config import Config
from dspass.hosting import bring_in, move_out
from dspass.lowering.segments import SegmentCompiler, lower, shared_order
from dspass.lowering.stage_backward import StageBackward
from dspass.passes import devices
from dspass.passes.agreed_order import keep_order
from dspass.passes.base import Pass, PassContext, PassResult, Where, run_passes
from dspass.passes.held import mark_all, mark_static
from dspass.passes.partition import partition
from dspass.passes.text import print_graph
from dspass.planner.calls import Place
from dspass.planner.record import Plan
from dspass.planner.saved import MadeFor
from dspass.planning import Planning, in_buckets, refine, scheduled
from dspass.runtime import compat
from dspass.runtime.engine import Engine
from dspass.runtime.frames import with_room
from dspass.runtime.program import Program
from dspass.settings import kind_of

log = logging.getLogger(__name__)

#: A function that is compiled so often is compiled for more shapes than a person may know of.
_MANY = 8


@dataclass(kw_only=True, eq=False)
class Compilation:
    """What became of one captured graph. Graph modules are kept: reports print them and simulate their memory."""

    name: str
    passes: list[PassResult] = field(default_factory=list)
    texts: dict[str, tuple[str, str]] = field(default_factory=dict)
    graphs: dict[str, fx.GraphModule] = field(default_factory=dict)
    programs: dict[str, Program] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    stage_backward: StageBackward | None = None
    """A pipeline's; where it is in two halves ``programs`` are "forward", "input" and "weight"."""
    plan: Plan | None = None
    made_for: MadeFor | None = None
    frame: int = -1
    """Which of the model's functions was captured: others than one stand behind graph breaks."""

    @property
    def measured_seconds(self) -> float | None:
        """Of a forward and a backward, the medians of the last; None until there are enough."""
        if "forward" not in self.programs or len(self.programs) == 1:
            return None
        parts = [program.clock.seconds for program in self.programs.values()]
        return sum(s for s in parts if s is not None) if None not in parts else None


@with_room
def compile_graph(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    engine: Engine,
    config: Config,
    passes: Sequence[Pass],
    compiler: Callable[..., Any] | None = None,
    stage_backward: StageBackward | None = None,
    place: Place | None = None,
    frame: int | None = None,
) -> Callable[..., Any]:
    """Compile ``gm``, in which sharded parameters are read through ``dspass::unshard``; inference and training alike.

    ``stage_backward``, of a stage of a pipeline, is what its backward becomes; ``place`` is that for which it is planned.
    ``frame`` is Dynamo's number of the captured one, where that is not being compiled now.
    """
    frame = compat.compiled_frame() if frame is None else frame
    done = Compilation(name=f"graph {len(engine.compilations)}", frame=frame, stage_backward=stage_backward)
    engine.compilations.append(done)
    _warn_of_many(engine, done)
    patches = inductor_settings(config)
    engine.compiler, engine.config = compiler or _known_compiler(engine, config, patches), config
    # A number may be a tensor on the host wherever the others are.
    engine.inputs_on = next(
        (v.device.type for v in inputs if isinstance(v, torch.Tensor) and v.device.type != "cpu"), "cpu"
    )
    engine.expected_imbalance = config.experts.expected_imbalance
    way = _Way(
        done=done,
        engine=engine,
        config=config,
        passes=scheduled(passes, engine) if _is_planned(config) else passes,
        patches=patches,
        place=place,
        order=shared_order(int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))),
    )
    if any("captured" in item.where for item in passes):
        gm = way.prepare(gm, "captured")
    backend = compat.aot_backend(
        fw_compiler=functools.partial(way.compile, where="forward"),
        bw_compiler=functools.partial(way.compile, where="backward"),
        inference_compiler=functools.partial(way.compile, where="forward", is_inference=True),
        partition_fn=way.partition,
        decompositions=compat.inductor_decompositions(patches),
        keep_inference_input_mutations=True,
    )
    run: Callable[..., Any] = backend(gm, list(inputs))
    if done.plan is None or not (done.plan.decision.states_on_host or engine.placing):
        return run
    return torch._dynamo.disable(_AfterMoving(run, engine), reason="moves what a plan says to the host or back first")


@dataclass(kw_only=True, eq=False)
class _Way:
    """What AOTAutograd asks for on the way of one graph, in its order: the joint graph cut in two, and code for each half.
    ``order`` is that of graphs that ranks of one machine compile for each other."""

    done: Compilation
    engine: Engine
    config: Config
    passes: Sequence[Pass]
    patches: dict[str, Any]
    place: Place | None
    order: Callable[[int], list[int]]
    _agreed: dict[str, tuple[str, ...]] = field(default_factory=dict)  # collectives of each half, in order

    def prepare(self, graph: fx.GraphModule, where: Where, trains: bool = True) -> fx.GraphModule:
        """``graph`` behind the passes."""
        before = print_graph(graph.graph)
        context = PassContext(graph=self.done.name, where=where, target=self.engine.target, trains=trains)
        graph = run_passes(graph, self.passes, context, self.done.passes.append)
        if where in self._agreed:
            keep_order(graph.graph, self._agreed[where])
        self.done.texts[where] = (before, print_graph(graph.graph))
        if where != "captured":  # AOTAutograd makes another graph of that one
            self.done.graphs[where] = graph
        return graph

    def partition(
        self,
        joint: fx.GraphModule,
        joint_inputs: Any,
        *,
        num_fwd_outputs: int,
        static_lifetime_input_indices: Sequence[int] | None = None,
        **_: Any,
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Forward and backward of ``joint``, behind the passes: as a plan says, where there is one."""
        joint = self.prepare(compat.joint_graph_passes(joint, self.patches), "joint")
        free = static_lifetime_input_indices or ()
        mark_static(joint.graph, free)
        if _is_planned(self.config):
            forward, backward = self._planned(joint, joint_inputs, num_fwd_outputs, free)
        else:
            forward, backward = partition(
                joint, joint_inputs, num_fwd_outputs, free, recompute_pointwise=self.engine.lifetimes == 3
            )
            on = devices.tabled(kind_of(self.engine))
            mark_all(forward.graph, backward.graph, num_fwd_outputs, self.passes, on)
        return self.prepare(forward, "forward"), self.prepare(backward, "backward")

    def _planned(
        self, joint: fx.GraphModule, joint_inputs: Any, num_fwd_outputs: int, free: Sequence[int]
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        done, compilations = self.done, self.engine.compilations
        before = _before(self.engine, done)
        forward, backward, done.plan, done.made_for = Planning(
            joint=joint,
            inputs=joint_inputs,
            num_fwd_outputs=num_fwd_outputs,
            free=free,
            engine=self.engine,
            config=self.config,
            passes=self.passes,
            name=done.name,
            patches=self.patches,
            held=sum(plan.between for plan in before),
            apart=sum(plan.parameters for plan in before),
            earlier=[(c.made_for, c.plan) for c in compilations if c.made_for is not None and c.plan is not None],
            place=self.place,
            stage_backward=done.stage_backward,
        ).planned()
        self.passes = in_buckets(self.passes, done.plan.decision.bucket_bytes)
        if together(self.engine):
            self._agreed = dict(zip(("forward", "backward"), done.plan.collectives, strict=False))
        return forward, backward

    def compile(
        self, graph: fx.GraphModule, _: Sequence[Any], *, where: Where, is_inference: bool = False
    ) -> Callable[..., Any]:
        """What runs a half of the graph, or a graph without a backward, which no pass has seen yet."""
        start = time.perf_counter()
        if is_inference:
            graph = self.prepare(compat.joint_graph_passes(graph, self.patches), "forward", trains=False)
        done, chosen, probe = self.done, self.engine.compiler, self.engine.probe
        is_backward = where == "backward"
        run: Program | StageBackward
        if is_backward and done.stage_backward is not None:
            run = done.stage_backward
            run.lower(graph, chosen, probe=probe, order=self.order)
            done.programs |= run.programs
        else:
            run = done.programs[where] = lower(
                graph, chosen, is_backward=is_backward, is_inference=is_inference, probe=probe, order=self.order
            )
        if is_backward:
            last = list(done.programs.values())[-1]
            last.clock.then = functools.partial(_refine, done)
        done.seconds[where] = time.perf_counter() - start
        return run.boxed()


def _is_planned(config: Config) -> bool:
    return config.dspass.memory_budget is not None or config.dspass.plan is not None


def _warn_of_many(engine: Engine, done: Compilation) -> None:
    if done.frame >= 0 and sum(c.frame == done.frame for c in engine.compilations) == _MANY:
        log.warning(
            "%s was compiled %d times, which takes its time and memory each time: under dspass.memory_budget it is for each "
            "shape of its inputs, so pad batches to fewer sizes. TORCH_LOGS=recompiles says what differs.",
            engine.model or "a function",
            _MANY,
        )


def _known_compiler(engine: Engine, config: Config, patches: dict[str, Any]) -> Callable[..., Any]:
    """That of the model's other graphs, which has their segments, unless it is compiled again with other options."""
    known: Any = engine.compiler
    if isinstance(known, SegmentCompiler) and (known.patches, known.share) != (patches, config.dspass.segment_cache):
        known = None
    return known or segment_compiler(config)


class _AfterMoving:
    """A planned graph, preceded once by the way of parameters from the host, for which the plan has room, and of states to
    it, which it counts there."""

    def __init__(self, run: Callable[..., Any], engine: Engine) -> None:
        self.run, self.engine, self.is_moved = run, engine, False

    def __call__(self, *inputs: Any) -> Any:
        if not self.is_moved:
            self.is_moved = True
            bring_in(self.engine)
            move_out(self.engine)
        return self.run(*inputs)


def _refine(done: Compilation) -> None:
    """Hold the prediction for a planned graph against what its steps took."""
    if done.plan is not None and done.made_for is not None and done.measured_seconds is not None:
        refine(done.made_for, done.plan, done.measured_seconds)


def _before(engine: Engine, done: Compilation) -> list[Plan]:
    """The plans of the model's earlier graphs, which hold values for their backwards while this one runs: those that come
    before it in a call, whichever shapes are compiled when."""
    order = list(dict.fromkeys(c.frame for c in engine.compilations))
    earlier = order[: order.index(done.frame)]
    frames = {c.frame: c.plan for c in engine.compilations if c.plan is not None and c.frame in earlier}
    return list(frames.values())


def segment_compiler(config: Config) -> SegmentCompiler:
    return SegmentCompiler(patches=inductor_settings(config), share=config.dspass.segment_cache)


def inductor_settings(config: Config) -> dict[str, Any]:
    """Inductor's own settings that ``config`` asks for, for its decompositions, its joint passes and its code alike.

    Under a budget no buffer outlives its last use: by default Inductor keeps one until a later buffer of its size takes it, as
    long as that does not raise the peak that it estimates, which counts an output beside the input that it overwrites. The
    allocator hands freed memory on as fast.
    """
    settings = {"fallback_random": True} if config.dspass.fallback_random else {}
    if _is_planned(config):
        settings["allow_buffer_reuse"] = False
    return settings


__all__ = ["Compilation", "compile_graph", "segment_compiler"]
