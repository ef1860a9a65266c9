"""What the runtime knows of each parameter, found by the key that stands in the graph.

Graphs hold strings, not Python objects, so that they print, hash and compare between ranks; this table is where a
string becomes a parameter again. Entries live as long as the engine that made them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Literal

import torch

from dspass.runtime.axis import Axis

if TYPE_CHECKING:
    from dspass.runtime.engine import Engine
    from dspass.runtime.levels import Levels

#: All ranks of a group, those of this rank's node, or those of its place in all nodes.
Over = Literal["node", "across"] | None

#: Of rows of experts that travel in few bits: their format, and how many values a row has.
Packed = tuple[str, int] | None

Layout = Literal["plain", "replicate", "shard"]


@dataclass(kw_only=True, eq=False)
class ParamSpec:
    """One parameter.

    ``shape`` is the full shape; ``layout`` says how ranks hold it: ``shard`` (rows divided over ``shard_axis``),
    ``replicate`` (a whole copy as a ``Replicate`` DTensor) or ``plain`` (a whole plain tensor). The graph computes in
    ``compute_dtype``, which is also what gathers send; gradients are reduced in ``reduce_dtype`` over ``shard_axis``
    and, in hybrid sharding, over ``replicate_axis`` as well. ``node_axis``: whole copies are divided a second time over
    the ranks of a node, a part of ``shard_axis``, for the backward's gathers; ``across_axis`` are the ranks of the same place
    in all nodes. ``on_host``: its shard waits on the host, with its gradient and its optimiser's states.

    Weights of experts that are divided over ranks have an ``expert_axis`` (:mod:`dspass.passes.divide_experts`). Then ``shape``
    is that of the experts of this rank's place on it, ``shard_axis`` the ranks that share that place, and what is said of a
    whole parameter holds of those experts; :attr:`full_shape` is that of all. ``expert_levels`` are those of that axis, where
    it spans nodes and rows may go over both.

    Where a model is divided into pipeline stages, ``held_by`` are the places on the pipe axis whose ranks hold the parameter,
    in order, and ``param`` is a stand-in without values on all other ranks. One that stages of several ranks use, as tied
    weights are, has a ``tied_axis``: those ranks, over which its gradients are summed.
    """

    key: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    compute_dtype: torch.dtype
    reduce_dtype: torch.dtype
    layout: Layout
    shard_axis: Axis | None
    replicate_axis: Axis | None
    trains: bool
    engine: Engine
    on_host: bool = False
    node_axis: Axis | None = None
    across_axis: Axis | None = None
    expert_axis: Axis | None = None
    held_by: tuple[int, ...] = ()
    tied_axis: Axis | None = None
    expert_levels: Levels | None = None
    param: Callable[[], torch.nn.Parameter | None] = field(default=lambda: None)

    def axis(self, over: Over) -> Axis:
        """The axis that a collective of a sharded parameter goes over."""
        found = {None: self.shard_axis, "node": self.node_axis, "across": self.across_axis}[over]
        assert found is not None, f"{self.name} is not divided over {over or 'any axis'}"
        return found

    @property
    def divided_over(self) -> Axis:
        """The axis that experts are divided over, of a weight of experts."""
        assert self.expert_axis is not None, f"{self.name} is no weight of experts that are divided"
        return self.expert_axis

    @property
    def is_elsewhere(self) -> bool:
        """Whether only other pipeline stages' ranks hold it."""
        stages = self.engine.stages
        return stages is not None and bool(self.held_by) and stages.pipe.rank not in self.held_by

    @property
    def counts_here(self) -> bool:
        """Whether this rank is the one of its pipeline that speaks for it, where several hold it."""
        stages = self.engine.stages
        return stages is None or not self.held_by or stages.pipe.rank == self.held_by[0]

    @property
    def layer(self) -> str:
        """The name of the module that has it."""
        return self.name.rpartition(".")[0] or self.name

    @property
    def full_shape(self) -> tuple[int, ...]:
        """Of the parameter as the model has it."""
        return self.shape if self.expert_axis is None else (self.shape[0] * self.expert_axis.size, *self.shape[1:])

    @property
    def local_shape(self) -> tuple[int, ...]:
        if self.layout != "shard":
            return self.shape
        assert self.shard_axis is not None
        return (self.shard_axis.rows(self.shape[0])[1], *self.shape[1:])

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def padded_numel(self) -> int:
        """Elements of the gathered copy, rows padded to a multiple of the axis: what a collective is charged with."""
        if self.layout != "shard":
            return self.numel
        assert self.shard_axis is not None
        return self.shard_axis.padded_rows(self.shape[0]) * prod(self.shape[1:])

    @property
    def gathered_bytes(self) -> int:
        return self.numel * self.compute_dtype.itemsize

    @property
    def reduced_bytes(self) -> int:
        return self.numel * self.reduce_dtype.itemsize


_table: weakref.WeakValueDictionary[str, ParamSpec] = weakref.WeakValueDictionary()


def register(spec: ParamSpec) -> ParamSpec:
    assert spec.key not in _table, f"two parameters with the key {spec.key}"
    _table[spec.key] = spec
    return spec


def lookup(key: str) -> ParamSpec:
    try:
        return _table[key]
    except KeyError:
        raise KeyError(
            f"no live parameter {key!r}: the sharded model that this graph was compiled for is gone. "
            "Keep a reference to it, or call torch.compile again on the model in use."
        ) from None
