"""What a collective is charged with, in one place, so that what is predicted and what is counted cannot differ.

Logical bytes are what the best algorithm must send from one rank: ``(N-1)/N`` of the padded tensor for an all-gather or
a reduce-scatter, twice that for an all-reduce (Rabenseifner 2004; the same count as in the ZeRO paper, section 7). A bucket
that travels quantised is charged with its codes and scales: all but a rank's own go, in an all-gather from each rank to all
others, in an all-to-all, which takes the place of the reduce-scatter, to one each.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Literal

from dspass.runtime import compat
from dspass.runtime.axis import Axis
from dspass.runtime.levels import Levels, Table, hops
from dspass.runtime.params import Over, ParamSpec

Kind = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all"]
Direction = Literal["forward", "backward"]


CollectiveKey = tuple[Kind, Direction, str, int]
"""Kind, direction, group and its size."""


def direction_now() -> Direction:
    """That of the graph which runs."""
    return "forward" if compat.backward_run() == -1 else "backward"


@dataclass(frozen=True)
class Collective:
    """One operation on one bucket: ``bytes`` is what one rank sends, ``span`` the :attr:`Axis.span` of its group."""

    kind: Kind
    direction: Direction
    group: str
    group_size: int
    span: int
    bytes: int

    @classmethod
    def on(cls, axis: Axis, kind: Kind, direction: Direction, sent: int) -> Collective:
        return cls(kind, direction, axis.name, axis.size, axis.span, sent)


def gather_cost(specs: Sequence[ParamSpec], direction: Direction, over: Over = None) -> Collective | None:
    """The all-gather of a bucket of sharded parameters; None where one rank holds everything."""
    axis = specs[0].shard_axis if over is None else specs[0].axis(over)
    if axis is None or axis.size == 1:
        return None
    padded = sum(axis.padded_rows(s.shape[0]) * prod(s.shape[1:]) * s.compute_dtype.itemsize for s in specs)
    return Collective.on(axis, "all-gather", direction, padded * (axis.size - 1) // axis.size)


def reduce_cost(specs: Sequence[ParamSpec], direction: Direction = "backward") -> list[Collective]:
    """The reductions of a bucket: over the shard axis, then over the replicas."""
    found: list[Collective] = []
    for axis, kind, size in reduction_steps(specs):
        factor = 2 if kind == "all-reduce" else 1
        found.append(Collective.on(axis, kind, direction, factor * size * (axis.size - 1) // axis.size))
    return found


def packed_gather_cost(specs: Sequence[ParamSpec], sent: int, direction: Direction) -> Collective:
    """The all-gather of a quantised bucket, of which this rank has ``sent`` bytes."""
    axis = specs[0].axis(None)
    return Collective.on(axis, "all-gather", direction, sent * (axis.size - 1))


def packed_reduce_cost(specs: Sequence[ParamSpec], sent: int, over: Over = None) -> Collective:
    """The all-to-all of a quantised bucket of gradients, of ``sent`` bytes."""
    axis = specs[0].axis(over)
    return Collective.on(axis, "all-to-all", "backward", sent * (axis.size - 1) // axis.size)


def rows_cost(axis: Axis, sent: int, direction: Direction) -> Collective:
    """An all-to-all of rows to experts or back, of which this rank sends ``sent`` bytes to others."""
    return Collective.on(axis, "all-to-all", direction, sent)


def level_costs(levels: Levels, rank: int, table: Table, row_bytes: int, direction: Direction) -> list[Collective]:
    """The two exchanges of rows that go inside of the node first, and then across nodes."""
    return [
        rows_cost(axis, (sum(hop.sent) - hop.sent[axis.rank]) * row_bytes, direction)
        for axis, hop in zip((levels.node, levels.across), hops(table, rank, levels.node.size), strict=True)
    ]


def counts_cost(axis: Axis, experts: int, direction: Direction) -> Collective:
    """The exchange of how many rows each rank has for each of the ``experts``, and of a word more."""
    return rows_cost(axis, (axis.size - 1) * (experts + 1) * 4, direction)


def even_cost(axis: Axis, size: int, direction: Direction) -> Collective:
    """An all-to-all of ``size`` bytes, as many for each rank."""
    return rows_cost(axis, size // axis.size * (axis.size - 1), direction)


def mean_cost(axis: Axis, size: int, direction: Direction) -> Collective:
    """The all-reduce of ``size`` bytes that are averaged."""
    return Collective.on(axis, "all-reduce", direction, 2 * size * (axis.size - 1) // axis.size)


def expected_splits(axis: Axis, size: int, received: int) -> tuple[list[int], list[int]]:
    """How many of ``size`` rows go to each rank, and how many of the ``received`` ones come from each, on the rank that gets
    the most: from all alike, itself one of them, and what it does not keep goes to the others alike."""
    coming = even_parts(received, axis.size)
    own = coming[axis.rank]
    going = even_parts(size - own, axis.size - 1)
    going.insert(axis.rank, own)
    return going, coming


def expected_table(axis: Axis, size: int, received: int) -> list[list[int]]:
    """How many of ``size`` rows each rank has for each other one, where the one at hand gets the most, as
    :func:`expected_splits` has it, and all others get alike."""
    going, coming = expected_splits(axis, size, received)
    table = []
    for source in range(axis.size):
        row = going
        if source != axis.rank:
            row = even_parts(max(size - coming[source], 0), axis.size - 1)
            row.insert(axis.rank, coming[source])
        table.append(row)
    return table


def turned(table: Table) -> list[list[int]]:
    """Of what each rank has for each other one the way back."""
    return [list(column) for column in zip(*table, strict=True)]


def even_parts(total: int, parts: int) -> list[int]:
    """``total`` as so many whole numbers that differ by one at most, the larger ones first."""
    return [total // parts + (i < total % parts) for i in range(parts)]


def reduction_steps(specs: Sequence[ParamSpec]) -> list[tuple[Axis, Kind, int]]:
    """Axis, kind and bytes of the buffer of each step that reduces a bucket."""
    steps: list[tuple[Axis, Kind, int]] = []
    first, sharded = specs[0], specs[0].layout == "shard"
    size = sum((s.padded_numel if sharded else s.numel) * s.reduce_dtype.itemsize for s in specs)
    if first.shard_axis is not None and first.shard_axis.size > 1:
        steps.append((first.shard_axis, "reduce-scatter" if sharded else "all-reduce", size))
    if first.replicate_axis is not None and first.replicate_axis.size > 1:
        divisor = first.shard_axis.size if sharded and first.shard_axis is not None else 1
        steps.append((first.replicate_axis, "all-reduce", size // divisor))
    return steps


@dataclass
class TrafficCounter:
    """Counts collectives of the current optimiser step and keeps the last whole one."""

    current: Counter[CollectiveKey] = field(default_factory=Counter)
    current_bytes: Counter[CollectiveKey] = field(default_factory=Counter)
    exposed: dict[CollectiveKey, float] = field(default_factory=lambda: defaultdict(float))
    last: dict[CollectiveKey, tuple[int, int, float]] = field(default_factory=dict)

    def add(self, collective: Collective) -> CollectiveKey:
        key: CollectiveKey = (collective.kind, collective.direction, collective.group, collective.group_size)
        self.current[key] += 1
        self.current_bytes[key] += collective.bytes
        return key

    def end_step(self) -> None:
        if self.current:
            self.last = {k: (n, self.current_bytes[k], self.exposed[k]) for k, n in self.current.items()}
        self.current, self.current_bytes, self.exposed = Counter(), Counter(), defaultdict(float)
