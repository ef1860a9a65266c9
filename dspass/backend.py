"""The Dynamo backend ``deepspeed``: what ``torch.compile(model, backend="deepspeed", options=...)`` calls.

Dynamo calls the backend inside of its own tracing, where neither a collective nor a change of the model is safe (a gloo
collective there can deadlock; parameters that are replaced fail the guards of the frame at hand). So the backend only ever
answers a callable, and that one, when it runs after the guards are built,

- for a model that is not yet sharded: lets the ranks agree, puts DTensors into the modules, runs the captured graph once
  with gathers in front, and leaves; the next call traces once more and sees the sharded model;
- at stage 0: lets the ranks agree, hands out rank 0's parameters, and is the compiled graph from then on;
- for a sharded model: is the compiled graph.

Dropped: raising to have Dynamo trace again at once. It diverges.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.fx as fx
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from dspass import steps
from dspass.batch_parts import in_parts
from dspass.casts import cast_inputs, half, inputs_to_cast
from dspass.compilation import Compilation, compile_graph
from dspass.config import Config
from dspass.engines import new_engine
from dspass.expert_weights import alike, weights_in
from dspass.explain import report_at_exit
from dspass.fake_quantising import choose, round_layers
from dspass.owners import Heap
from dspass.passes.base import Pass
from dspass.passes.divide_experts import DivideExperts
from dspass.pipeline import build
from dspass.pipeline_outputs import PipelineUseError
from dspass.pipelined import pipelined
from dspass.runtime import compat, kernels
from dspass.runtime.engine import Engine
from dspass.runtime.params import ParamSpec
from dspass.shard import agree, axes_of, hand_out, mesh_for, place, precision, refuse_wrapped
from dspass.sharded import ENGINE
from dspass.weights import quantise, refuse_to_freeze, stored_of

log = logging.getLogger(__name__)

Options = None | str | os.PathLike[str] | Mapping[str, Any]


def deepspeed(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: Options = None, **kwargs: Any
) -> Callable[..., Any]:
    """Compile one captured graph. See :func:`torch.compile`; ``options`` is DeepSpeed's configuration."""
    compat.check_torch()
    compat.allow_compilations(1)  # this one: there is as much room for the next as there was
    if torch.cuda.is_available():
        kernels.serve_once()
    config = Config.load(options).resolve_stage(dist.is_initialized())
    if config.pipeline.enabled:
        return torch._dynamo.disable(
            _FirstOfPipeline(gm, example_inputs, config), reason="runs once, before stages are cut"
        )
    config = config.resolve_batch(dist.get_world_size() if dist.is_initialized() else 1)
    passes = build(config)
    params = [p for p in example_inputs if isinstance(p, nn.Parameter)]
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True):
        if isinstance(value, nn.Parameter):
            compat.guard_identity(node)
            break
    if config.dspass.memory_budget is not None or config.dspass.plan is not None:
        compat.keep_shapes_static()
    stage = config.engine_stage
    if stage and not dist.is_initialized():
        mesh_for(config, "cpu")  # raises: a stage without a process group
    heap = Heap.scan()
    root = _root(heap, params)
    compat.refuse_uncompiled(functools.partial(_too_many, type(root).__name__ if root is not None else "the function"))
    if root is not None:
        refuse_wrapped(root)
    chosen = None
    if config.trains_rounded and params:
        if root is None:
            log.warning(
                "compression_training has no effect: a function was compiled, and not a module whose layers have names."
            )
        else:
            chosen = choose(root, config)  # refuses what cannot be, before anything is shared or sharded
    if root is None and config.layers.format is not None and params:
        log.warning(
            "dspass.quantise.layers has no effect: a function was compiled, and not a module whose layers have names."
        )
    if root is not None and config.layers.format is not None and not stored_of(root):
        refuse_to_freeze(root)
        first = _FirstStored(gm, example_inputs, root, config)
        return torch._dynamo.disable(first, reason="runs once, before weights are stored")
    if stage and any(not isinstance(p, DTensor) for p in params):
        return torch._dynamo.disable(
            _FirstCall(gm, example_inputs, root, config, passes), reason="runs once, before sharding"
        )
    if stage:
        engine = _engine_of(heap, params) or Engine(stage=stage, accumulation_steps=config.gradient_accumulation_steps)
        begin(engine, root, config)

        def prepare(gm: fx.GraphModule) -> None:
            cast_inputs(gm, config)
            if chosen is not None:
                round_layers(gm, {}, chosen, engine)

        prepare(gm)
        run = in_parts(gm, example_inputs, engine, config, passes, prepare)
        return run or compile_graph(gm, example_inputs, engine, config, passes)
    cast_inputs(gm, config)
    engine = new_engine(root, config)
    if root is None:
        engine.loose = {f"parameter_{i}": weakref.ref(p) for i, p in enumerate(params)}
    specs = _plain_specs(engine, root, params, config)
    engine.deferred |= compat.in_resumed_frame() or _used_outside(heap, root, params)
    mark_plain(gm, example_inputs, specs)
    if chosen is not None:
        round_layers(gm, {}, chosen, engine)
    run = compile_graph(gm, example_inputs, engine, config, passes)
    return torch._dynamo.disable(_Stage0(run, engine, root, config, params), reason="agrees with other ranks first")


def _too_many(model: str) -> RuntimeError:
    return RuntimeError(
        f"{model} was compiled as often as Dynamo allows, and would run uncompiled from here on, without what dspass does for "
        "it: no gradients would be averaged. A graph is compiled for each shape of its inputs under dspass.memory_budget, and "
        "for each value that the code depends on: pad batches to fewer sizes. TORCH_LOGS=recompiles says what differs each "
        "time; if all of it is wanted, raise torch._dynamo.config.recompile_limit and accumulated_recompile_limit."
    )


class _ByHand:
    """A graph that was captured before the model's parameters were what they will be, which is run once."""

    def __init__(self, gm: fx.GraphModule, inputs: Sequence[Any], root: nn.Module | None, config: Config) -> None:
        self.gm, self.root, self.config = gm, root, config
        self.casts = set(inputs_to_cast(gm, config))
        self.is_cast = bool(config.bf16 or config.fp16) and self._runs_in_precision(inputs)

    def _runs_in_precision(self, inputs: Sequence[Any]) -> bool:
        """Whether the graph can be run in the options' precision. It was captured in the parameters' own, and a model that
        casts to the precision of its inputs, as most norms do, has that written in it: so it is run, with rounded values."""
        mode, values = compat.as_fake(inputs)
        with torch.no_grad(), mode, _ProductsOfOneKind():
            try:
                self.gm(*(self._own(i, self._param(v, p)) for i, (v, p) in enumerate(zip(values, inputs, strict=True))))
            except Exception as error:
                log.info("the first call computes in the parameters' own precision: %s", error)
                return False
        return True

    def _param(self, value: Any, param: Any) -> Any:
        return value.to(precision(self.config, value.dtype)) if isinstance(param, nn.Parameter) else value

    def _own(self, i: int, value: Any) -> Any:
        """An input of the graph, cast as the compiled graph's will be."""
        return value.to(half(self.config)) if i in self.casts else value

    def run(self, inputs: Sequence[Any], whole: Callable[[Any], Any]) -> Any:
        """Run the graph; ``whole`` answers what takes an input's place: of a parameter its values in the options' precision."""
        values = []
        for i, value in enumerate(inputs):
            given = whole(value)
            if self.is_cast:
                given = self._own(i, given)
            elif isinstance(value, nn.Parameter):
                given = given.to(value.dtype)
            values.append(given)
        return self.gm(*values)


class _ProductsOfOneKind(TorchDispatchMode):
    """Refuses products of two precisions, which those of fake tensors let pass."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket in flop_registry or func.namespace not in ("aten", "prims"):
            kinds = {
                t.dtype for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.is_floating_point()
            }
            if len(kinds) > 1:
                raise TypeError(f"{func} of {' and '.join(sorted(map(str, kinds)))}")
        return func(*args, **kwargs)


class _FirstCall(_ByHand):
    """Shards the model, then runs the captured graph by hand, once."""

    def __init__(
        self, gm: fx.GraphModule, inputs: Sequence[Any], root: nn.Module | None, config: Config, passes: Sequence[Pass]
    ) -> None:
        super().__init__(gm, inputs, root, config)
        self.experts = weights_in(gm.graph, inputs) if config.expert_parallel.enabled else []
        for item in passes:
            if isinstance(item, DivideExperts):
                item.limit(gm.graph)
        gm.recompile()

    def __call__(self, *inputs: Any) -> Any:
        params = [p for p in inputs if isinstance(p, nn.Parameter)]
        plain = [p for p in params if not isinstance(p, DTensor)]
        kinds = {p.device.type for p in plain}
        if len(kinds) > 1 or "meta" in kinds:
            raise RuntimeError(
                f"parameters lie on {sorted(kinds)}: move the whole model to one device, or fill a model on the meta device "
                "with dspass.shard(model, config, fill=...) first."
            )
        heap = Heap.scan()
        mesh = mesh_for(self.config, plain[0].device.type)
        engine = _engine_of(heap, params) or new_engine(self.root, self.config)
        agree(self.root, self.config, mesh, _kinds(inputs, params))
        todo = (
            dict(self.root.named_parameters())
            if self.root is not None
            else {f"parameter_{len(engine.specs)}_{i}": p for i, p in enumerate(plain)}
        )
        if self.root is not None:
            hand_out(list(self.root.buffers()))
        ledger = engine.probe.ledger
        with ledger.watching() if ledger is not None else contextlib.nullcontext():
            return self._run(engine, heap, mesh, todo, inputs)

    def _run(
        self, engine: Engine, heap: Heap, mesh: Any, todo: Mapping[str, nn.Parameter], inputs: Sequence[Any]
    ) -> Any:
        with torch.inference_mode(False):  # parameters that are made in it could never be trained
            weights = [inputs[i] for i in self.experts]
            specs = place(engine, heap, todo, self.config, mesh, experts=alike(self.root, weights))
        begin(engine, self.root, self.config)

        def spec_of(value: Any) -> ParamSpec | None:
            if isinstance(value, DTensor):
                return next(s for s in engine.specs.values() if s.param() is value)
            return specs.get(id(value))

        def whole(value: Any) -> Any:
            spec = spec_of(value)
            param: Any = spec.param() if spec is not None else None
            return value if spec is None else torch.ops.dspass.unshard(param.to_local(), spec.key)

        if self.root is not None and self.config.trains_rounded:
            nodes = self.gm.graph.find_nodes(op="placeholder")
            keys = {node: spec.key for node, v in zip(nodes, inputs, strict=True) if (spec := spec_of(v)) is not None}
            round_layers(self.gm, keys, choose(self.root, self.config), engine)
        return self.run(inputs, whole)


class _FirstOfPipeline:
    """Runs a model as a pipeline from inside of its own forward, once; from then on it has a forward that does."""

    def __init__(self, gm: fx.GraphModule, inputs: Sequence[Any], config: Config) -> None:
        params = [p for p in inputs if isinstance(p, nn.Parameter)]
        root = _root(Heap.scan(), params)
        if root is None:
            raise PipelineUseError(
                "a function was compiled, and a pipeline divides the layers of a module: call torch.compile on the module "
                "whose forward answers the loss."
            )
        self.root, self.config = root, config
        (output,) = gm.graph.find_nodes(op="output")
        self.outputs = len(output.args[0])
        self.broken = compat.broken_graph()

    def __call__(self, *inputs: Any) -> Any:
        args, kwargs = compat.call_of(self.root)
        return pipelined(self.root, self.config).first_call(args, kwargs, self.outputs, self.broken)


class _FirstStored(_ByHand):
    """Stores weights in few bits, then runs the captured graph by hand, once, with what they stand for."""

    root: nn.Module

    def __call__(self, *inputs: Any) -> Any:
        params = list(self.root.parameters())
        agree(self.root, self.config, None, _kinds(inputs, params))
        hand_out([*params, *self.root.buffers()])
        modules = {id(w): m for m in self.root.modules() if (w := m._parameters.get("weight")) is not None}
        quantise(self.root, self.config)
        stored = {key: module for key, module in modules.items() if "weight" not in module._parameters}

        def whole(value: Any) -> Any:
            return stored[id(value)].weight if id(value) in stored else self._param(value, value)

        return self.run(inputs, whole)


class _Stage0:
    """The compiled graph, preceded once by what every rank must do together."""

    def __init__(
        self,
        run: Callable[..., Any],
        engine: Engine,
        root: nn.Module | None,
        config: Config,
        params: Sequence[nn.Parameter],
    ) -> None:
        self.run, self.engine, self.root, self.config = run, engine, root, config
        self.params = [weakref.ref(p) for p in params]

    def __call__(self, *inputs: Any) -> Any:
        if not self.engine.started:
            if dist.is_initialized():
                params = [p for ref in self.params if (p := ref()) is not None]
                agree(self.root, self.config, None, _kinds(inputs, params))
                hand_out(params if self.root is None else [*self.root.parameters(), *self.root.buffers()])
            begin(self.engine, self.root, self.config)
        return self.run(*inputs)


def begin(engine: Engine, root: nn.Module | None, config: Config) -> None:
    """What starts with a model's first call: its optimiser's steps are followed, its report promised, once."""
    steps.watch(engine, config)
    if engine.started:
        return
    engine.started = True
    if config.dspass.report is not None and root is not None and (not dist.is_initialized() or dist.get_rank() == 0):
        report_at_exit(root, config.dspass.report)


def _root(heap: Heap, params: Sequence[nn.Parameter]) -> nn.Module | None:
    for module, _ in heap.owners(params[:1]):
        root = heap.compiled_root(module)
        if root is not None:
            return root
    return None


def _engine_of(heap: Heap, params: Sequence[nn.Parameter]) -> Engine | None:
    for module, _ in heap.owners(params):
        if ENGINE in module.__dict__:
            return module.__dict__[ENGINE]
    return None


def _used_outside(heap: Heap, root: nn.Module | None, params: Sequence[nn.Parameter]) -> bool:
    """Whether a module outside of the compiled one holds some of ``params`` too."""
    if root is None:
        return False
    inside = {id(module) for module in root.modules()}
    return any(id(module) not in inside for module, _ in heap.owners(params))


def _plain_specs(
    engine: Engine, root: nn.Module | None, params: Sequence[nn.Parameter], config: Config
) -> dict[int, ParamSpec]:
    """Specs of whole parameters that are reduced, cast or rounded; none where nothing of it is the case."""
    grouped = dist.is_initialized() and dist.get_world_size() > 1
    if not grouped and not config.bf16 and not config.fp16 and not config.trains_rounded:
        return {}
    axis = axes_of(mesh_for(config, params[0].device.type))[0] if grouped and params else None
    names = {id(p): n for n, p in root.named_parameters()} if root is not None else {}
    known = {id(s.param()): s for s in engine.specs.values()}
    found = {}
    graphs = {id(p) for p in params}
    others = [p for p in root.parameters() if id(p) not in graphs and p.requires_grad] if root is not None else []
    for i, param in enumerate([*params, *others]):
        spec = known.get(id(param))
        if spec is None:
            name = names.get(id(param), f"parameter_{len(engine.specs)}_{i}")
            dtype = param.dtype
            spec = engine.add(
                ParamSpec(
                    key=f"{engine.name}/{name}",
                    name=name,
                    shape=tuple(param.shape),
                    dtype=dtype,
                    compute_dtype=precision(config, dtype),
                    reduce_dtype=torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype,
                    layout="plain",
                    shard_axis=axis,
                    replicate_axis=None,
                    trains=param.requires_grad,
                    engine=engine,
                    param=weakref.ref(param),
                )
            )
        found[id(param)] = spec
    return found


def mark_plain(gm: fx.GraphModule, inputs: Sequence[Any], specs: Mapping[int, ParamSpec]) -> None:
    """Put the marker behind each whole parameter's placeholder, as the property does for a sharded one."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    last = placeholders[-1] if placeholders else None
    for node, value in zip(placeholders, inputs, strict=True):
        spec = specs.get(id(value))
        if spec is None or last is None:
            continue
        with gm.graph.inserting_after(last):
            marker = gm.graph.call_function(torch.ops.dspass.unshard, (node, spec.key))
        if "example_value" in node.meta:
            marker.meta["example_value"] = node.meta["example_value"].to(spec.compute_dtype)
        node.replace_all_uses_with(marker, delete_user_cb=lambda user, marker=marker: user is not marker)
    gm.recompile()


def _kinds(inputs: Sequence[Any], params: Sequence[nn.Parameter]) -> list[tuple[str, int]]:
    """What must be alike on all ranks of a graph's inputs: their types and numbers of dimensions, not their sizes."""
    known = {id(p) for p in params}
    return [
        (str(v.dtype), v.dim()) if isinstance(v, torch.Tensor) else (type(v).__name__, 0)
        for v in inputs
        if id(v) not in known and not isinstance(v, int)  # sizes: how many there are depends on which are equal
    ]


__all__ = ["Compilation", "deepspeed"]
