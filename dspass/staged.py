"""Parameters of a model that is divided into pipeline stages: who holds them.

A rank of a pipeline holds the parameters that its own stages use, as DTensors on its data axis, as :mod:`dspass.shard` does
without a pipeline. Every other parameter is a stand-in: a meta tensor without gradient, in modules and optimisers, so that
``model.parameters()`` has the same length and names on all ranks, and no bytes that this rank has no use for. A parameter that
stages of several ranks use lives on all of them (:mod:`dspass.runtime.tied`); one that none uses on the first.

:func:`prepare` comes before the model is captured, when nobody knows yet which stage uses what; :func:`place_stages` after.

Dropped: taking other stages' modules out of the model, as stages written by hand do. Names in checkpoints, optimisers' groups
and what a script reaches through ``model.layers[3]`` would differ from rank to rank.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from dspass.clipping import span_stages
from dspass.config import Config, ConfigError
from dspass.engines import join
from dspass.expert_weights import ExpertMesh
from dspass.owners import Heap, Replaced, refuse_stale
from dspass.quantising import measure_errors
from dspass.runtime import compat
from dspass.runtime.axis import Axis, StageMesh
from dspass.runtime.engine import Engine
from dspass.runtime.params import ParamSpec
from dspass.runtime.stopped import waiting_for
from dspass.shard import (
    Fill,
    distribute,
    hand_out,
    install,
    layout_of,
    materialise_buffers,
    precision,
    reduction_dtype,
    rows_of,
)
from dspass.sharded import attach

_meshes: weakref.WeakKeyDictionary[Any, dict[tuple[str, int], DeviceMesh]] = weakref.WeakKeyDictionary()
_ties: weakref.WeakKeyDictionary[Any, dict[tuple[int, tuple[int, ...]], Axis | None]] = weakref.WeakKeyDictionary()


def pipeline_mesh(stages: int, device_type: str) -> DeviceMesh:
    """The mesh ("pipe", "data") of all ranks, ``stages`` of which make a pipeline: the same object for the same arguments.

    Rank ``r`` has the place ``r // (ranks // stages)`` on the pipe axis, so that ranks that reduce gradients together lie next
    to each other. Raises ``RuntimeError`` without a process group, ``ConfigError`` where the ranks cannot be divided so.
    """
    key = "pipeline.stages"
    if not dist.is_initialized():
        raise RuntimeError(
            f"{key} is {stages}, and there is no process group: start the script with torchrun and call "
            "torch.distributed.init_process_group() before the first forward, or remove the section pipeline."
        )
    world = dist.get_world_size()
    if stages < 1 or world % stages:
        divisors = [d for d in range(1, world + 1) if world % d == 0]
        raise ConfigError(key, f"{stages} does not divide the {world} ranks.", f"Use one of {divisors}.")
    known = _meshes.setdefault(dist.group.WORLD, {})
    if (device_type, stages) not in known:
        with compat.without_fake_mode():
            shape = (stages, world // stages)
            known[device_type, stages] = init_device_mesh(device_type, shape, mesh_dim_names=("pipe", "data"))
    return known[device_type, stages]


def prepare(root: nn.Module, engine: Engine, config: Config, mesh: DeviceMesh) -> None:
    """Have a capture of ``root`` read each parameter through ``dspass::unshard``, plain and meta ones too.

    Every parameter gets a :class:`ParamSpec` in ``engine``, tied ones one, with the key ``{engine.name}/{name}``. What is
    computed in a capture lies on the device of ``mesh``; see :func:`pipeline_mesh`. Until :func:`place_stages` parameters are
    what they were. Raises ``ConfigError`` for what cannot be divided into stages.
    """
    for key, asked in {
        "zero_optimization.mics_shard_size": config.zero.mics_shard_size is not None,
        "zero_optimization.zero_hpz_partition_size": config.zero.zero_hpz_partition_size > 1,
    }.items():
        if asked:
            raise ConfigError(key, "it does not go together with pipeline stages yet.", "Remove one of the two.")
    with compat.without_fake_mode():
        join(engine, StageMesh.of(mesh))
    assert engine.stages is not None
    specs: dict[int, ParamSpec] = {}
    for name, param in root.named_parameters():
        specs[id(param)] = engine.add(
            ParamSpec(
                key=f"{engine.name}/{name}",
                name=name,
                shape=tuple(param.shape),
                dtype=param.dtype,
                compute_dtype=precision(config, param.dtype),
                reduce_dtype=reduction_dtype(param.dtype),
                layout="replicate",
                shard_axis=engine.stages.data,
                replicate_axis=None,
                trains=param.requires_grad,
                engine=engine,
                param=weakref.ref(param),
            )
        )
    for module in root.modules():
        mine = {name: specs[id(param)] for name, param in module._parameters.items() if param is not None}
        if mine:
            attach(module, mine)


def place_stages(
    root: nn.Module,
    engine: Engine,
    config: Config,
    mesh: DeviceMesh,
    stages_of: Mapping[str, frozenset[int]],
    rank_of: Sequence[int],
    fill: Fill | None = None,
    device: torch.device | str | None = None,
    experts: Collection[str] = (),
) -> None:
    """Leave on this rank what its stages use of the parameters that :func:`prepare` has seen; all ranks call this.

    ``stages_of`` has the stages that use a parameter, by its key; one that is not in it is used by none. ``rank_of`` has each
    stage's place on the pipe axis (:attr:`dspass.runtime.schedule.Schedule.rank_of`). Rank 0's values are
    handed out, one parameter at a time, unless ``fill`` has them, as for :func:`dspass.shard`: then no rank asks for those of
    other stages. Layouts follow the ZeRO stage within the ranks of a stage, which divide weights of ``experts``, by key, by
    expert first. What this rank does not keep is freed, also in optimisers.

    Raises ``RuntimeError`` on all ranks where they do not agree on the stages, or the model is on the meta device and there is
    no ``fill``, or an optimiser holds parameters where they cannot be exchanged; ``KeyError`` where ``fill`` lacks a name;
    ``ConfigError`` where experts cannot be divided as asked.
    """
    stages = engine.stages
    assert stages is not None, "prepare comes first"
    params = dict(root.named_parameters())
    meta = [name for name, param in params.items() if param.is_meta]
    if meta and fill is None:
        raise RuntimeError(
            f"{len(meta)} parameters are on the meta device, {meta[0]!r} for one, and have no values to hand out: give "
            "dspass.shard(model, config, fill=...) a function (name, shape, dtype) -> tensor or a state dict."
        )
    specs = {id(param): engine.specs[f"{engine.name}/{name}"] for name, param in params.items()}
    uses = {spec.name: sorted(stages_of.get(spec.key, ())) for spec in specs.values()}
    _refuse_differences(stages, uses, rank_of)
    heap = Heap.scan()
    refuse_stale(heap, params.values())
    for spec in specs.values():
        spec.held_by = tuple(sorted({rank_of[stage] for stage in stages_of.get(spec.key, ())})) or (0,)
    for held_by in sorted({spec.held_by for spec in specs.values() if len(spec.held_by) > 1}):
        axis = _tied_axis(mesh, stages, held_by)  # groups are made by all ranks, those outside of them too
        for spec in specs.values():
            if spec.held_by == held_by and not spec.is_elsewhere:
                spec.tied_axis = axis
    among = _divide_experts(engine, config, [spec for spec in specs.values() if spec.key in experts])
    replaced: Replaced = {}
    with torch.inference_mode(False):  # parameters that are made in it could never be trained
        for param in params.values():
            spec = specs[id(param)]
            if fill is None:
                _receive(param, spec, stages)
            replaced[id(param)] = _left_of(param, spec, config, stages, among, fill, device)
            if not param.is_meta:  # an object that somebody still holds holds no memory
                param.data = param.data.new_empty(()).expand(param.shape)
                param.grad = None
    install(heap, replaced, specs)
    for old, new, _ in replaced.values():
        specs[id(old)].param = weakref.ref(new)
    if fill is None:
        hand_out(root.buffers())
    else:
        materialise_buffers(root, fill, device)
    span_stages()
    measure_errors(engine, [spec for spec in specs.values() if not spec.is_elsewhere], config)


def _divide_experts(engine: Engine, config: Config, specs: Sequence[ParamSpec]) -> ExpertMesh | None:
    """Have ``specs``, of weights of experts, say that the ranks of a stage divide them by expert; answers over which mesh."""
    stages = engine.stages
    assert stages is not None
    if not specs:
        return None
    weights = {spec.name: torch.empty(spec.shape, device="meta") for spec in specs}
    among = ExpertMesh.over(stages.mesh, config, weights, engine.target, stages.pipe.size)
    if among is None:
        return None
    if among.mesh is not stages.mesh:
        join(engine, replace(stages, experts=among.mesh))
    for spec in specs:
        spec.shape = (spec.shape[0] // among.axis.size, *spec.shape[1:])
        spec.shard_axis, spec.expert_axis, spec.expert_levels = among.shard_axis, among.axis, among.levels
    return among


def _refuse_differences(stages: StageMesh, uses: Mapping[str, list[int]], rank_of: Sequence[int]) -> None:
    """Have all ranks raise where some would place another stage, or another parameter, elsewhere."""
    everyone: list[Any] = [(tuple(rank_of), dict(uses))]
    if dist.get_backend() != "fake" and dist.get_world_size() > 1:
        everyone = [None] * dist.get_world_size()
        with waiting_for(Axis.world(), "compare the places of stages"):
            dist.all_gather_object(everyone, (tuple(rank_of), dict(uses)))
    places, used = everyone[0]
    for rank, (theirs, others) in enumerate(everyone):
        if theirs != places:
            raise RuntimeError(
                f"ranks 0 and {rank} differ in the places of stages on the pipe axis: {list(places)} and {list(theirs)}. Every "
                "rank must be given the same configuration."
            )
        if others != used:
            name = next(n for n in {**others, **used} if others.get(n) != used.get(n))
            raise RuntimeError(
                f"ranks 0 and {rank} differ in the stages that use {name}: {used.get(name)} and {others.get(name)}. "
                "Every rank must build the same model and be given inputs of the same sizes."
            )
    if lost := sorted({stage for of in used.values() for stage in of if not 0 <= stage < len(places)}):
        raise RuntimeError(f"stages {lost} use parameters, and are on no rank of the pipeline.")


def _tied_axis(mesh: DeviceMesh, stages: StageMesh, held_by: tuple[int, ...]) -> Axis | None:
    """The ranks of these places in this rank's pipeline, None where it is not among them."""
    if len(held_by) == stages.pipe.size:
        return stages.pipe
    known = _ties.setdefault(dist.group.WORLD, {})
    if (stages.pipe.size, held_by) not in known:
        known[stages.pipe.size, held_by] = None
        with compat.without_fake_mode():
            columns = mesh.mesh[list(held_by)].t().tolist()
        for ranks in columns:
            group = dist.new_group(ranks)
            if isinstance(group, dist.ProcessGroup) and dist.get_rank() in ranks:
                known[stages.pipe.size, held_by] = Axis.of("tied", group)
    return known[stages.pipe.size, held_by]


def _receive(param: nn.Parameter, spec: ParamSpec, stages: StageMesh) -> None:
    """Rank 0's value on the first rank of each stage that holds the parameter; that one divides it over its data axis."""
    if stages.data.rank or dist.get_backend() == "fake":
        return
    pipe = stages.pipe
    if pipe.rank == 0:
        for place in spec.held_by:
            if place:
                with waiting_for(pipe, f"send {spec.name}"):
                    dist.send(param.detach().contiguous(), pipe.ranks[place], group=pipe.group)
    elif not spec.is_elsewhere:
        value = param.data.contiguous()
        with waiting_for(pipe, f"receive {spec.name}"):
            dist.recv(value, pipe.ranks[0], group=pipe.group)
        param.data.copy_(value)  # nothing to do where it is the same memory


@contextlib.contextmanager
def wanting_gradients(engine: Engine) -> Iterator[None]:
    """Inside, stand-ins want gradients where what they stand for does. Captures are then the same on all ranks: how attention
    lies in memory, for one, goes by whether its mask wants a gradient."""
    specs = [spec for spec in engine.specs.values() if spec.is_elsewhere and spec.trains]
    stand_ins = [param for spec in specs if (param := spec.param()) is not None]
    for param in stand_ins:
        param.requires_grad_(True)
    try:
        yield
    finally:
        for param in stand_ins:
            param.requires_grad_(False)


def _left_of(
    param: nn.Parameter,
    spec: ParamSpec,
    config: Config,
    stages: StageMesh,
    among: ExpertMesh | None,
    fill: Fill | None,
    device: torch.device | str | None,
) -> tuple[nn.Parameter, nn.Parameter, Any]:
    """``param``, what takes its place on this rank, and what divides its optimiser's states alike, if it stays."""
    if spec.is_elsewhere:
        stand_in = nn.Parameter(torch.empty_like(param, device="meta"), requires_grad=False)
        for attribute, content in param.__dict__.items():
            if attribute not in stand_in.__dict__:  # a prediction's tensors have their device there
                setattr(stand_in, attribute, content)
        return param, stand_in, None
    mesh, axis = stages.mesh, spec.shard_axis
    placements: Sequence[Any]
    if spec.expert_axis is None:
        among = None
        spec.layout = layout_of(param, config, config.zero.stage or 0)
        placements = [Shard(0)] if spec.layout == "shard" else [Replicate()]
    else:
        assert among is not None
        spec.layout = among.layout(config)
        mesh, placements = among.mesh, among.placements(spec.layout)
    spec.on_host = config.offload_param == "cpu" and spec.layout == "shard"
    rows = rows_of(param.shape, spec.layout, axis, among)
    new = distribute(spec.name, param, mesh, rows, placements, fill, device, spec.on_host)
    return param, new, lambda state: distribute_tensor(state, mesh, placements)


__all__ = ["pipeline_mesh", "place_stages", "prepare"]
