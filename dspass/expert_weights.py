"""Which parameters are weights of experts, and where they lie when experts are divided over ranks.

The one-line way and pipelines know them from the graph that they captured, and take those that other modules of the same class
hold under the same name with them: another graph may read them, behind a graph break. :func:`dspass.shard` has no graph yet
without a pipeline and goes by shapes (:func:`likely_weights`); what turns out to be something else is gathered from all ranks
where it is read, which is right, and costs what ZeRO-3 costs.

Ranks are divided as DeepSpeed does: ``autoep_size`` consecutive ones hold the experts of a layer between them, so that tokens
travel inside of a node where it has as many; ranks of one place in each such group have the same experts, and divide those
further as the stage says. Where one group has all ranks, weights lie as ZeRO has them: rows of the first dimension.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
import torch.fx as fx
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard

from dspass.config import Config, ConfigError
from dspass.passes import devices
from dspass.passes.batched_experts import Batch, find_batches
from dspass.passes.captured_cost import parameter_of
from dspass.passes.divide_experts import is_parameter
from dspass.passes.experts import Layer, find_experts
from dspass.runtime import compat
from dspass.runtime.axis import Axis, axis_of
from dspass.runtime.levels import Levels
from dspass.runtime.params import Layout


@dataclass(frozen=True, kw_only=True)
class ExpertMesh:
    """``mesh`` of expert axis and, where ranks share experts, data axis; ``axis`` is the first, ``shard_axis`` the second.
    ``levels`` are the first's, where rows may go inside of a node before they go across."""

    mesh: DeviceMesh
    axis: Axis
    shard_axis: Axis | None
    levels: Levels | None = None

    @classmethod
    def over(
        cls,
        data: DeviceMesh,
        config: Config,
        weights: Mapping[str, torch.Tensor],
        target: str | None = None,
        stages: int = 1,
    ) -> ExpertMesh | None:
        """None where one rank has all experts anyway. ``target``: the kind of device that a prediction is for. With pipeline
        ``stages`` there are so many meshes like ``data``, each of consecutive ranks, and all ranks call this together.

        Raises ``ConfigError`` where ranks cannot be divided so, or experts not over them.
        """
        world = data.size()
        size = config.expert_parallel.autoep_size
        if size is None:
            size = gcd(world, *(w.shape[0] for w in weights.values()))
        key = "expert_parallel.autoep_size"
        if world % size:
            raise ConfigError(key, f"{size} does not divide the {world} ranks.", f"Use one of {_divisors(world)}.")
        for name, weight in weights.items():
            if weight.shape[0] % size:
                raise ConfigError(
                    key,
                    f"{size} does not divide the {weight.shape[0]} experts of {name}.",
                    f"Use one of {_divisors(gcd(world, weight.shape[0]))}.",
                )
        if size == 1:
            return None
        levels = _levels(data, config, size, target, stages)
        if size == world:
            return cls(mesh=data, axis=axis_of("expert", data, 0), shard_axis=None, levels=levels)
        with compat.without_fake_mode():
            ranks = torch.arange(stages * world).view(stages, world // size, size).transpose(1, 2).contiguous()
            every = DeviceMesh(data.device_type, ranks, mesh_dim_names=("stage", "expert", "expert_data"))
            mesh = every["expert", "expert_data"]
        axis, shard_axis = axis_of("expert", mesh, 0), axis_of("expert_data", mesh, 1)
        return cls(mesh=mesh, axis=axis, shard_axis=shard_axis, levels=levels)

    def layout(self, config: Config) -> Layout:
        """How ranks with the same experts hold them."""
        return "replicate" if self.shard_axis is None or config.zero.stage == 0 else "shard"

    def placements(self, layout: Layout) -> list[Any]:
        """Of the whole parameter on :attr:`mesh`."""
        if self.shard_axis is None:
            return [Shard(0)]
        return [Shard(0), Shard(0) if layout == "shard" else Replicate()]


#: Peers that a rank serves at once: so many messages of an all-to-all take one latency together. An assumption.
PEERS_AT_ONCE = 8


def _levels(data: DeviceMesh, config: Config, size: int, target: str | None, stages: int) -> Levels | None:
    """Nodes among ``size`` consecutive ranks; None where there are none to speak of, or they are not to be used.

    All ranks make the groups, or none: what decides is equal on all of them.
    """
    asked, kind = config.experts.hierarchical, target or data.device_type
    on = devices.tabled(kind) if asked is None or target is not None else None
    local = config.zero.zero_hpz_partition_size
    if local == 1:
        local = (
            on.node_devices if target is not None and on is not None else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        )
    if asked is False or not 1 < local < size or size % local:
        if asked:
            raise ConfigError(
                "dspass.experts.hierarchical",
                f"nodes of {local} ranks do not divide the {size} ranks that experts are divided over into two or more.",
                "Remove it, or say by zero_optimization.zero_hpz_partition_size how many ranks a node has.",
            )
        return None
    nodes, world = size // local, data.size() * stages
    most = math.inf
    if asked is None:
        assert on is not None
        messages = (size - 1) - (local - 1) - (nodes - 1)
        more = (local - 1) / local / (
            on.node_link or on.link
        ) + 4 / on.memory  # a byte's first way, and twice into order
        most = messages / PEERS_AT_ONCE * on.latency / more
    with compat.without_fake_mode():
        ranks = torch.arange(world).view(world // size, nodes, local)
        mesh = DeviceMesh(data.device_type, ranks, mesh_dim_names=("experts", "across", "node"))
    return Levels(node=axis_of("expert_node", mesh, 2), across=axis_of("expert_across", mesh, 1), most_bytes=most)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def weights_in(graph: fx.Graph, inputs: Sequence[Any]) -> list[int]:
    """Which of a captured graph's ``inputs`` are weights of experts."""
    placeholders = graph.find_nodes(op="placeholder")
    params = {n for n, value in zip(placeholders, inputs, strict=True) if isinstance(value, nn.Parameter)}
    found = _sources(graph, params.__contains__)
    return [i for i, node in enumerate(placeholders) if node in found]


def keys_in(graph: fx.Graph) -> set[str]:
    """The keys of parameters that are weights of experts, of a captured graph that reads them through their markers."""
    specs = map(parameter_of, _sources(graph, is_parameter))
    return {spec.key for spec in specs if spec is not None}


def _sources(graph: fx.Graph, is_weight: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """The nodes that are weights of experts, among those that are parameters."""
    layers: Sequence[Layer | Batch] = [
        *find_experts(graph, is_weight)[0],
        *find_batches(graph, is_weight, is_weight)[0],
    ]
    return {source for layer in layers for source in layer.weights.values()}


def alike(root: nn.Module | None, weights: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """``weights`` and what other modules of their modules' classes hold under the same names."""
    found = {id(w): w for w in weights}
    if root is None or not found:
        return list(found.values())
    kinds = {(type(m), name) for m in root.modules() for name, p in m._parameters.items() if id(p) in found}
    for module in root.modules():
        for name, param in module._parameters.items():
            if param is not None and (type(module), name) in kinds:
                found[id(param)] = param
    return list(found.values())


def likely_weights(root: nn.Module) -> list[torch.Tensor]:
    """By shape: matrices stacked along a first dimension, two or more of as many in one module that is not torch's own."""
    found: dict[int, torch.Tensor] = {}
    for module in root.modules():
        if type(module).__module__.startswith("torch.nn"):
            continue
        stacks = [p for p in module._parameters.values() if p is not None and p.dim() == 3 and p.is_floating_point()]
        for size in {p.shape[0] for p in stacks}:
            same = [p for p in stacks if p.shape[0] == size]
            if size > 1 and len(same) > 1:
                found |= {id(p): p for p in same}
    return list(found.values())
