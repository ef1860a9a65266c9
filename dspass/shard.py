"""From whole parameters to shards: ``dspass.shard``, which is also what the backend does at its first call.

Every parameter becomes a ``DTensor`` on one mesh: ``Shard(0)`` where that saves something, ``Replicate`` for 0-dim and
small persistent ones. (Plain tensors beside DTensors break clipping and foreach optimisers.) Rank 0's values are handed
out, as DDP and DeepSpeed do, so ranks may be initialised differently. Buffers: rank 0's at the start, then each its own.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from dspass import steps
from dspass.config import Config, ConfigError
from dspass.engines import adopt, engine_of, join, new_engine
from dspass.expert_weights import ExpertMesh, likely_weights
from dspass.owners import Heap, Replaced, exchange, refuse_stale, unwrap
from dspass.quantising import measure_errors
from dspass.runtime import compat
from dspass.runtime.axis import Axis, axis_of
from dspass.runtime.engine import Engine
from dspass.runtime.host import empty_on_host
from dspass.runtime.params import Layout, ParamSpec
from dspass.sharded import KEYS, attach

Fill = Callable[[str, torch.Size, torch.dtype], torch.Tensor] | Mapping[str, torch.Tensor]

#: Parameters of fewer elements than this stay whole on every rank unless the configuration says otherwise: below it a
#: gather costs more in latency than it saves in bytes.
DEFAULT_PERSISTENCE_THRESHOLD = 10_000


def shard(
    model: nn.Module,
    config: Config | str | os.PathLike[str] | Mapping[str, Any] | None = None,
    *,
    fill: Fill | None = None,
    device: torch.device | str | None = None,
) -> nn.Module:
    """Shard ``model`` in place before the optimiser is built, and answer it.

    For models too large to build whole: with the model on the meta device, ``fill`` provides each parameter and buffer,
    as a function of name, full shape and dtype, or as a mapping such as a (memory-mapped) state dict. One full tensor is
    alive at a time; ``device`` is where shards are put (default: the accelerator, else the CPU).

    Raises ``ConfigError`` for an unusable configuration, ``RuntimeError`` without a process group or where the model is
    already wrapped, ``KeyError`` where ``fill`` lacks a name.
    """
    compat.check_torch()
    config = Config.load(config)
    config = config.resolve_stage(dist.is_initialized())
    root = unwrap(model)
    refuse_wrapped(root)
    if config.pipeline.enabled:
        from dspass.pipelined import pipelined  # which places parameters with what is here

        pipelined(root, config, fill=fill, device=device)
        return model
    if config.engine_stage == 0:
        if fill is not None:
            _materialise(root, fill, device)
        return model
    mesh = mesh_for(config, _device_type(root, device))
    if fill is not None:
        materialise_buffers(root, fill, device)
    meta = [n for n, p in root.named_parameters() if p.is_meta]
    if meta and fill is None:
        raise RuntimeError(
            f"{len(meta)} parameters are on the meta device, {meta[0]!r} for one, and have no values to shard: give "
            "dspass.shard(model, config, fill=...) a function (name, shape, dtype) -> tensor or a state dict."
        )
    engine = new_engine(root, config)
    agree(root, config, mesh)
    heap = Heap.scan()
    with torch.inference_mode(False):  # parameters that are made in it could never be trained
        experts = likely_weights(root) if config.expert_parallel.enabled else ()
        place(engine, heap, dict(root.named_parameters()), config, mesh, fill=fill, device=device, experts=experts)
    hand_out(buffer for buffer in root.buffers() if not buffer.is_meta)
    steps.watch(engine, config)
    return model


def refuse_wrapped(model: nn.Module) -> None:
    """Raise ``RuntimeError`` where another framework already manages the parameters."""
    for name, module in model.named_modules():
        kind = type(module)
        origin = f"{kind.__module__}.{kind.__qualname__}"
        by = next(
            (
                who
                for mark, who in _WRAPPERS.items()
                if any(mark in f"{c.__module__}.{c.__qualname__}" for c in kind.__mro__)
            ),
            None,
        )
        if by is not None:
            raise RuntimeError(
                f"the model is already wrapped by {by} ({name or 'the model itself'} is a {origin}): two owners of the "
                f"same parameters would each reduce gradients. Give torch.compile the plain module instead of the {by} one."
            )


_WRAPPERS = {
    "torch.nn.parallel.distributed.DistributedDataParallel": "DistributedDataParallel",
    "torch.distributed.fsdp.fully_sharded_data_parallel": "FullyShardedDataParallel",
    "FSDPModule": "FSDP2 (fully_shard)",  # under torch.distributed, in another module from version to version
    "deepspeed.runtime.engine.DeepSpeedEngine": "DeepSpeed",
    "torch.nn.parallel.data_parallel.DataParallel": "DataParallel",
}


def mesh_for(config: Config, device_type: str) -> DeviceMesh:
    """The data mesh: one axis, or two where ``mics_shard_size`` shards inside groups and replicates across them."""
    if not dist.is_initialized():
        raise RuntimeError(
            f"ZeRO stage {config.zero.stage} divides parameters over ranks, and there is no process group. Start the script "
            "with torchrun and call torch.distributed.init_process_group() before the first forward, or set "
            "zero_optimization.stage to 0."
        )
    world, group = dist.get_world_size(), config.zero.mics_shard_size if config.zero.stage else None
    if group is None or group == world:
        with compat.without_fake_mode():
            return init_device_mesh(device_type, (world,), mesh_dim_names=("data",))
    if world % group:
        divisors = [d for d in range(1, world + 1) if world % d == 0]
        raise ConfigError(
            "zero_optimization.mics_shard_size", f"{group} does not divide the {world} ranks", f"use one of {divisors}"
        )
    with compat.without_fake_mode():
        return init_device_mesh(device_type, (world // group, group), mesh_dim_names=("replicate", "shard"))


def axes_of(mesh: DeviceMesh) -> tuple[Axis, Axis | None]:
    """The shard axis and, in hybrid sharding, the replicate axis."""
    if mesh.ndim == 1:
        return axis_of("data", mesh, 0), None
    return axis_of("shard", mesh, 1), axis_of("replicate", mesh, 0)


def node_axes_of(mesh: DeviceMesh, config: Config) -> tuple[Axis, Axis] | tuple[None, None]:
    """The ranks of this rank's node, which hold what was gathered a second time, and those of its place in all nodes."""
    size, world = config.zero.zero_hpz_partition_size, mesh.size()
    if size == 1 or config.zero.stage != 3:
        return None, None
    if world % size:
        divisors = [d for d in range(1, world + 1) if world % d == 0]
        raise ConfigError(
            "zero_optimization.zero_hpz_partition_size",
            f"{size} does not divide the {world} ranks",
            f"use one of {divisors}",
        )
    with compat.without_fake_mode():
        nodes = init_device_mesh(mesh.device_type, (world // size, size), mesh_dim_names=("across", "node"))
    return axis_of("node", nodes, 1), axis_of("across", nodes, 0)


def precision(config: Config, dtype: torch.dtype) -> torch.dtype:
    """What the graph computes in for a parameter of ``dtype``."""
    if not dtype.is_floating_point:
        return dtype
    if config.bf16:
        return torch.bfloat16
    return torch.float16 if config.fp16 else dtype


def place(
    engine: Engine,
    heap: Heap,
    params: Mapping[str, nn.Parameter],
    config: Config,
    mesh: DeviceMesh,
    *,
    fill: Fill | None = None,
    device: torch.device | str | None = None,
    experts: Collection[torch.Tensor] = (),
) -> dict[int, ParamSpec]:
    """Replace ``params`` (name to parameter) by DTensors wherever they are held. Answers id of the old to its spec.

    ``experts`` are those of ``params`` that are weights of experts, which are divided over ranks by expert first."""
    if config.offload_param == "cpu" and (engine.target or mesh.device_type) != "cpu":
        raise ConfigError(
            "zero_optimization.offload_param.device",
            f"parameters on the host of a {engine.target or mesh.device_type} device are not built yet.",
            "Offload the optimiser's states (offload_optimizer), or use more ranks.",
        )
    refuse_stale(heap, params.values())
    shard_axis, replicate_axis = axes_of(mesh)
    node_axis, across_axis = node_axes_of(mesh, config)
    divided = {id(p) for p in experts}
    weights = {n: p for n, p in params.items() if id(p) in divided}
    among = ExpertMesh.over(mesh, config, weights, engine.target) if divided else None
    replaced: Replaced = {}
    specs: dict[int, ParamSpec] = {}
    for name, param in params.items():
        if isinstance(param, DTensor) or id(param) in specs:
            continue
        mine = among if among is not None and id(param) in divided else None
        layout = layout_of(param, config, config.zero.stage or 0) if mine is None else mine.layout(config)
        placements = [Shard(0)] if layout == "shard" else [Replicate()]
        its_mesh, shape = mesh, tuple(param.shape)
        its_axis: Axis | None = shard_axis
        if mine is not None:
            its_mesh, its_axis, placements = mine.mesh, mine.shard_axis, mine.placements(layout)
            shape = (shape[0] // mine.axis.size, *shape[1:])
        elif replicate_axis is not None:
            placements = [Replicate(), *placements]
        on_host = config.offload_param == "cpu" and layout == "shard"
        rows = rows_of(param.shape, layout, its_axis, mine)
        new = distribute(name, param, its_mesh, rows, placements, fill, device, on_host)
        key = f"{engine.name}/{name}"
        spec = ParamSpec(
            key=key,
            name=name,
            shape=shape,
            dtype=param.dtype,
            compute_dtype=precision(config, param.dtype),
            reduce_dtype=reduction_dtype(param.dtype),
            layout=layout,
            shard_axis=its_axis,
            replicate_axis=None if mine else replicate_axis,
            trains=param.requires_grad,
            engine=engine,
            on_host=on_host,
            node_axis=node_axis if layout == "shard" and mine is None else None,
            across_axis=across_axis if layout == "shard" and mine is None else None,
            expert_axis=mine.axis if mine else None,
            expert_levels=mine.levels if mine else None,
            param=weakref.ref(new),
        )
        engine.add(spec)
        specs[id(param)] = spec

        def shard_like(state: torch.Tensor, mesh: Any = its_mesh, placements: Any = placements) -> torch.Tensor:
            return distribute_tensor(state, mesh, placements)

        replaced[id(param)] = (param, new, shard_like)
    install(heap, replaced, specs)
    measure_errors(engine, specs.values(), config)
    return specs


def install(heap: Heap, replaced: Replaced, specs: Mapping[int, ParamSpec]) -> None:
    """Put new parameters where the old ones of ``replaced`` are held, by the ids of the old ones."""
    for module, name in heap.owners(old for old, _, _ in replaced.values()):
        old = module._parameters[name]
        assert old is not None
        module._parameters[name] = replaced[id(old)][1]
        attach(module, {name: specs[id(old)]})
    exchange(heap, replaced)


def hand_out(tensors: Iterable[torch.Tensor]) -> None:
    """Rank 0's values become those of every rank."""
    if dist.is_initialized() and dist.get_world_size() > 1 and dist.get_backend() != "fake":
        with torch.no_grad():
            for tensor in tensors:
                dist.broadcast(tensor.data, 0)


def layout_of(param: torch.Tensor, config: Config, stage: int) -> Layout:
    threshold = config.zero.stage3_param_persistence_threshold
    threshold = DEFAULT_PERSISTENCE_THRESHOLD if threshold is None else threshold
    if param.dim() == 0 or param.numel() == 0:
        return "replicate"
    if stage == 3:
        return "replicate" if param.numel() < threshold else "shard"
    # Stages 1 and 2 keep a gathered copy anyway: sharding saves the optimiser's states, which a frozen one has not.
    if stage == 0:
        return "replicate"
    return "shard" if param.requires_grad else "replicate"


def reduction_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype


def rows_of(shape: torch.Size, layout: Layout, axis: Axis | None, experts: ExpertMesh | None) -> tuple[int, int] | None:
    """First row and count of those that this rank holds of a parameter; None where it has none, or all of them."""
    if experts is not None:
        here = shape[0] // experts.axis.size
        start, count = axis.rows(here) if layout == "shard" and axis is not None else (0, here)
        return experts.axis.rank * here + start, count
    return axis.rows(shape[0]) if layout == "shard" and axis is not None else None


def distribute(
    name: str,
    param: nn.Parameter,
    mesh: DeviceMesh,
    rows: tuple[int, int] | None,
    placements: Any,
    fill: Fill | None,
    device: torch.device | str | None,
    on_host: bool = False,
) -> nn.Parameter:
    """What this rank holds of ``param``: its ``rows`` of what ``fill`` answers, or what the mesh's first rank hands out."""
    if fill is None:
        value = distribute_tensor(param.data, mesh, placements)
    else:
        whole = filled(fill, name, param)
        local = whole.narrow(0, *rows) if rows is not None else whole
        local = local.detach().to(device or mesh.device_type).clone()
        value = DTensor.from_local(
            local, mesh, placements, run_check=False, shape=param.shape, stride=_contiguous(param.shape)
        )
    if on_host:
        local = compat.local_of(value)
        local = empty_on_host(local).copy_(local)
        value = DTensor.from_local(local, mesh, placements, run_check=False, shape=value.shape, stride=value.stride())
    new = nn.Parameter(value, requires_grad=param.requires_grad)
    for attribute, content in param.__dict__.items():
        setattr(new, attribute, content)
    return new


def _contiguous(shape: torch.Size) -> tuple[int, ...]:
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))


def filled(fill: Fill, name: str, like: torch.Tensor) -> torch.Tensor:
    """The full tensor for ``name``, checked against the model's shape and dtype."""
    if isinstance(fill, Mapping):
        if name not in fill:
            raise KeyError(
                f"fill has no {name!r}, which the model needs. It has {len(fill)} names, {next(iter(fill), None)!r} for one."
            )
        value = fill[name]
    else:
        value = fill(name, like.shape, like.dtype)
    if value.shape != like.shape:
        raise ValueError(f"fill gave {name!r} with shape {tuple(value.shape)}, and the model has {tuple(like.shape)}.")
    return value.to(like.dtype)


def _materialise(root: nn.Module, fill: Fill, device: torch.device | str | None) -> None:
    for module_name, module in root.named_modules():
        for name, param in list(module._parameters.items()):
            if param is not None and param.is_meta:
                whole = filled(fill, f"{module_name}.{name}".lstrip("."), param).to(device or "cpu")
                module._parameters[name] = nn.Parameter(whole.detach().clone(), requires_grad=param.requires_grad)
    materialise_buffers(root, fill, device)


def materialise_buffers(root: nn.Module, fill: Fill, device: torch.device | str | None) -> None:
    for module_name, module in root.named_modules():
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.is_meta:
                whole = filled(fill, f"{module_name}.{name}".lstrip("."), buffer)
                module._buffers[name] = whole.to(device or "cpu")


def _device_type(root: nn.Module, device: torch.device | str | None) -> str:
    if device is not None:
        return torch.device(device).type
    kinds = {p.device.type for p in root.parameters()} - {"meta"}
    if len(kinds) > 1:
        where = {kind: next(n for n, p in root.named_parameters() if p.device.type == kind) for kind in sorted(kinds)}
        raise RuntimeError(
            f"parameters lie on several kinds of device ({where}): move the model to one with model.to(device)."
        )
    if kinds:
        return kinds.pop()
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator.type if accelerator is not None else "cpu"


def agree(root: nn.Module | None, config: Config, mesh: DeviceMesh | None, inputs: Any = None) -> None:
    """Compare what every rank is about to do, and raise on all of them where it differs, naming the difference."""
    if not dist.is_initialized() or dist.get_world_size() == 1 or dist.get_backend() == "fake":
        return
    mine = {
        "configuration": config.to_dict(),
        "parameters": [(n, tuple(p.shape), str(p.dtype), p.requires_grad) for n, p in root.named_parameters()]
        if root is not None
        else [],
        "inputs": inputs,
        "torch": torch.__version__,
    }
    everyone: list[Any] = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(everyone, mine)
    except RuntimeError as error:  # the group's time-out, or a connection that closed
        raise RuntimeError(
            "not every rank reached the first call of its compiled model, where all of them agree on what to do: look for a "
            "rank that stopped before it with an error of its own, or that calls a model which is not compiled."
        ) from error
    for rank, other in enumerate(everyone):
        if what := config.differences(other["configuration"]):
            raise RuntimeError(
                f"rank {rank} has another configuration than rank {dist.get_rank()}: {'; '.join(what)}. Give every rank the "
                "same file."
            )
        for subject in ("torch", "parameters", "inputs"):
            if other[subject] != everyone[0][subject]:
                raise RuntimeError(
                    f"ranks 0 and {rank} differ in their {subject}: {_first_difference(everyone[0][subject], other[subject])}. "
                    "Every rank must build the same model and pass inputs of the same kind; only their values, and sizes "
                    "marked dynamic, may differ."
                )


def _first_difference(a: Any, b: Any) -> str:
    if isinstance(a, list) and isinstance(b, list):
        for i, (x, y) in enumerate(zip(a, b, strict=False)):
            if x != y:
                return f"entry {i} is {x} and {y}"
        return f"{len(a)} and {len(b)} entries"
    return f"{a} and {b}"


def adopt_copy(original: nn.Module, new: nn.Module, memo: dict[int, Any]) -> None:
    """Give a deep copy of a sharded module parameters of its own in the table."""
    from dspass.runtime.params import lookup

    engines: dict[Engine, Engine] = memo.setdefault("dspass engines", {})  # type: ignore[call-overload]
    specs = {}
    for name, key in original.__dict__[KEYS].items():
        old = lookup(key)
        if old.engine not in engines:
            engines[old.engine] = Engine(
                stage=old.engine.stage, accumulation_steps=old.engine.accumulation_steps, steps=old.engine.steps
            )
            if old.engine.stages is not None:
                join(engines[old.engine], old.engine.stages)
        engine, param = engines[old.engine], new._parameters[name]
        assert param is not None
        fresh = f"{engine.name}/{old.name}"
        if fresh not in engine.specs:  # a tied parameter has one spec, whichever module is copied first
            engine.add(replace(old, key=fresh, engine=engine, param=weakref.ref(param)))
        specs[name] = engine.specs[fresh]
    attach(new, specs)
    theirs = engine_of(original)
    if theirs is not None and theirs in engines:
        adopt(new, engines[theirs])


__all__ = ["agree", "axes_of", "layout_of", "mesh_for", "place", "precision", "shard"]
