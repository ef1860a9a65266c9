"""A mesh axis as the runtime sees it: a process group, its size, this rank's place, and how rows are divided."""

from __future__ import annotations

import weakref
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

#: What a fake process group, in which nothing is sent, stands for: the transport whose buffers are modelled.
MODELLED: ContextVar[str] = ContextVar("modelled back end", default="modelled nccl")


@dataclass(frozen=True, kw_only=True, eq=False)
class Axis:
    """One axis of the device mesh.

    ``name`` is what reports call it; ``ranks`` are the global ranks in group order.
    """

    name: str
    group: dist.ProcessGroup
    size: int
    rank: int
    ranks: tuple[int, ...]
    backend: str

    @classmethod
    def of(cls, name: str, group: dist.ProcessGroup) -> Axis:
        backend = str(dist.get_backend(group))
        return cls(
            name=name,
            group=group,
            size=dist.get_world_size(group),
            rank=dist.get_rank(group),
            ranks=tuple(dist.get_process_group_ranks(group)),
            backend=MODELLED.get() if backend == "fake" else backend,
        )

    @classmethod
    def world(cls) -> Axis:
        """All ranks there are."""
        assert dist.group.WORLD is not None
        return cls.of("world", dist.group.WORLD)

    def rows(self, total: int, rank: int | None = None) -> tuple[int, int]:
        """First row and row count of ``rank``'s shard of ``total`` rows, as ``DTensor``'s ``Shard(0)`` divides them:
        every rank takes ``ceil(total / size)`` until none are left."""
        rank = self.rank if rank is None else rank
        step = -(-total // self.size)
        start = min(rank * step, total)
        return start, min(step, total - start)

    def padded_rows(self, total: int) -> int:
        return -(-total // self.size) * self.size

    @property
    def span(self) -> int:
        """How many consecutive ranks its own lie among: what tells whether it leaves a node."""
        return max(self.ranks) - min(self.ranks) + 1


_axes: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[str, Axis]] = weakref.WeakKeyDictionary()


def axis_of(name: str, mesh: DeviceMesh, dim: int) -> Axis:
    """The axis that dimension ``dim`` of ``mesh`` is, called ``name``: one for each group and name."""
    group = mesh.get_group(dim)
    known = _axes.setdefault(group, {})
    if name not in known:
        known[name] = Axis.of(name, group)
    return known[name]


@dataclass(frozen=True, kw_only=True, eq=False)
class StageMesh:
    """Where the stages of a model lie. ``pipe`` are the ranks of this rank's pipeline, which hold different stages; ``data``,
    and ``mesh`` of one dimension, those that hold the same stages and divide their parameters. ``experts`` is the mesh of the
    same ranks that weights of experts lie on, where that is another. Tensors are on ``device``."""

    pipe: Axis
    data: Axis
    mesh: DeviceMesh
    device: torch.device
    experts: DeviceMesh | None = None

    @property
    def meshes(self) -> tuple[DeviceMesh, ...]:
        return (self.mesh,) if self.experts is None else (self.mesh, self.experts)

    @classmethod
    def of(cls, mesh: DeviceMesh) -> StageMesh:
        """Of a mesh of the dimensions "pipe" and "data"."""
        data = mesh["data"]
        device = torch.empty(0, device=mesh.device_type).device  # with the number of the one at hand
        return cls(pipe=axis_of("pipe", mesh, 0), data=axis_of("data", data, 0), mesh=data, device=device)
