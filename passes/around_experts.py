"""What stands around the inside of a layer of experts whose weights are divided over ranks: three ways in and out.

- :class:`Dropless`, of rows in the order of experts: as many as there are for each go to the ranks that hold them::

      counts of arriving rows -> dispatch -> order of experts -> [inside] -> order of arrival -> combine

  and where a layer is computed in chunks, some of each rank's experts each, all but the first for each of them, between
  ``split_chunks`` and ``join_chunks``

- :class:`Limited`, of the same rows where experts have a capacity: the first of each expert, in fixed sizes, padded with
  zeros::

      pad -> even exchange -> rows [experts here * ranks * capacity] -> [inside] -> even exchange -> unpad

- :class:`Batched`, of rows that the model itself has in ``[experts, capacity, ...]``: the same without its ends::

      even exchange -> [experts here, ranks * capacity, ...] -> [inside] -> even exchange

Each inserts its nodes where the graph stands, and holds what they share. Dropped: to leave rows of a capacity in the model's
own order and send zeros in between, which needs no padding operator, and tells nobody where an expert's rows begin.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from dspass.passes.experts import value_of
from dspass.runtime.capacity import capacity_of, even_ends
from dspass.runtime.params import ParamSpec

_ops = torch.ops.dspass


@dataclass(frozen=True, kw_only=True)
class Limit:
    """Most rows that an expert takes of a rank's: ``factor`` times its even share, and no fewer than ``least``."""

    factor: float
    least: int

    def node(self, graph: fx.Graph, rows: fx.Node, experts: int) -> Any:
        """The capacity for ``rows``: a number where theirs is known."""
        size = rows_of(graph, rows)
        if isinstance(size, int):
            return capacity_of(size, experts, self.factor, self.least)
        return graph.call_function(capacity_of, (size, experts, self.factor, self.least))


def rows_of(graph: fx.Graph, node: fx.Node) -> Any:
    """The number of rows, an integer where it is known."""
    size = value_of(node).shape[0]
    return size if isinstance(size, int) else graph.call_method("size", (node, 0))


@dataclass(kw_only=True)
class Dropless:
    """``ends`` are those of all experts on this rank, ``scores`` the router's; ``first`` has the rows. Of the experts of each
    rank the first ``sizes[0]`` are chunk 0, the next ``sizes[1]`` chunk 1. The graph computes the layer for so many ``parts``
    of the batch."""

    graph: fx.Graph
    spec: ParamSpec
    first: fx.Node
    ends: fx.Node
    scores: fx.Node | None
    sizes: Sequence[int]
    parts: int = 1
    _arriving: list[Any] = field(default_factory=list)
    _splits: list[Any] = field(default_factory=list)
    _positions: list[Any] = field(default_factory=list)
    _counts: list[Any] = field(default_factory=list)
    _left: list[fx.Node] = field(default_factory=list)

    def open(self) -> list[fx.Node]:
        """Of each chunk the ends of the rows of its experts here."""
        graph, chunks = self.graph, len(self.sizes)
        told = graph.call_function(_ops.exchange_counts, (self.ends, self.scores, chunks, self.parts, self.spec.key))
        arriving, *self._splits = (graph.call_function(operator.getitem, (told, i)) for i in range(1 + chunks))
        self._arriving = [arriving] if chunks == 1 else items(graph, torch.split, arriving, list(self.sizes), 1)
        here = [graph.call_method("sum", (one, 0)) for one in self._arriving]
        return [graph.call_function(torch.cumsum, (one,), {"dim": 0, "dtype": torch.int32}) for one in here]

    def enter(self, node: fx.Node, readers: Sequence[fx.Node]) -> list[fx.Node]:
        """Of each chunk the rows of its experts here from all ranks, in the order of experts, before its reader."""
        graph, key = self.graph, self.spec.key
        leaving = [node]
        if len(self.sizes) > 1:
            leaving = items(graph, _ops.split_chunks, node, self._splits, None, key)
        sent = [
            graph.call_function(_ops.dispatch_rows, (rows, splits, None, key))
            for rows, splits in zip(leaving, self._splits, strict=True)
        ]
        self._left = leaving
        return [self._arrive(rows, i, reader) for i, (rows, reader) in enumerate(zip(sent, readers, strict=True))]

    def _arrive(self, rows: fx.Node, chunk: int, reader: fx.Node) -> fx.Node:
        graph = self.graph
        with graph.inserting_before(reader):
            if chunk == len(self._positions):
                self._counts.append(graph.call_method("size", (rows, 0)))
                positions = graph.call_function(_ops.arrival_positions, (self._arriving[chunk], self._counts[chunk]))
                self._positions.append(positions)
            return graph.call_function(_ops.spread_experts, (rows, self._positions[chunk]))

    def count(self, chunk: int) -> Any:
        """How many there are; known once the first have entered."""
        return self._counts[chunk]

    def leave(self, node: fx.Node, chunk: int) -> fx.Node:
        """Back to where a chunk's rows came from; of all in one chunk, zeros behind the last end."""
        graph = self.graph
        back = graph.call_function(_ops.unpermute_experts, (node, self._positions[chunk]))
        size = rows_of(graph, self.first) if len(self.sizes) == 1 else graph.call_method("size", (self._left[chunk], 0))
        return graph.call_function(_ops.combine_rows, (back, self._splits[chunk], size, self.spec.key))

    def join(self, chunks: list[fx.Node]) -> fx.Node:
        """Rows of all chunks, which have left, in the order of experts; zeros behind the last end."""
        if len(chunks) == 1:
            return chunks[0]
        size = rows_of(self.graph, self.first)
        return self.graph.call_function(_ops.join_chunks, (chunks, self._splits, size, self.spec.key))


@dataclass(kw_only=True)
class Limited:
    """As :class:`Dropless`, of no more than ``limit`` rows for each expert; rows behind it become zeros."""

    graph: fx.Graph
    spec: ParamSpec
    first: fx.Node
    ends: fx.Node
    scores: fx.Node | None
    sizes: Sequence[int]
    limit: Limit
    _capacity: Any = None
    _is_open: bool = False

    def open(self) -> list[fx.Node]:
        graph, ranks = self.graph, self.spec.divided_over.size
        self._capacity = self.limit.node(graph, self.first, self.spec.shape[0] * ranks)
        return [graph.call_function(even_ends, (self.ends, here, self._times(ranks))) for here in self.sizes]

    def enter(self, node: fx.Node, readers: Sequence[fx.Node]) -> list[fx.Node]:
        graph = self.graph
        padded = graph.call_function(_ops.pad_experts, (node, self.ends, self._capacity))
        sent, entered = [], []
        for part in self._apart(padded):
            told = () if self._is_open else (self.ends, self.scores)
            self._is_open = True
            sent.append(even_in(graph, part, self.spec, *told))
        for part, reader in zip(sent, readers, strict=True):
            with graph.inserting_before(reader):
                entered.append(graph.call_method("flatten", (by_expert(graph, part), 0, 1)))
        return entered

    def _apart(self, padded: fx.Node) -> list[fx.Node]:
        """``[experts, capacity, ...]`` of each chunk."""
        apart = by_rank(self.graph, padded, self.spec)
        return [apart] if len(self.sizes) == 1 else items(self.graph, torch.split, apart, list(self.sizes), 1)

    def count(self, chunk: int) -> Any:
        return self._times(self.sizes[chunk] * self.spec.divided_over.size)

    def _times(self, number: int) -> Any:
        if isinstance(self._capacity, int):
            return self._capacity * number
        return self.graph.call_function(operator.mul, (self._capacity, number))

    def leave(self, node: fx.Node, chunk: int) -> fx.Node:
        apart = self.graph.call_method("unflatten", (node, 0, (self.sizes[chunk], -1)))
        return even_out(self.graph, apart, self.spec)

    def join(self, chunks: list[fx.Node]) -> fx.Node:
        graph = self.graph
        whole = chunks[0] if len(chunks) == 1 else graph.call_function(torch.cat, (chunks, 1))
        padded = graph.call_method("flatten", (whole, 0, 1))
        return graph.call_function(_ops.unpad_experts, (padded, self.ends, rows_of(graph, self.first)))


@dataclass(kw_only=True)
class Batched:
    """Rows as the model has them."""

    graph: fx.Graph
    spec: ParamSpec
    _is_open: bool = False

    def enter(self, node: fx.Node) -> fx.Node:
        told = () if self._is_open else (None, None)
        self._is_open = True
        return by_expert(self.graph, even_in(self.graph, by_rank(self.graph, node, self.spec), self.spec, *told))

    def leave(self, node: fx.Node) -> fx.Node:
        return self.graph.call_method("flatten", (even_out(self.graph, node, self.spec), 0, 1))


def by_rank(graph: fx.Graph, node: fx.Node, spec: ParamSpec) -> fx.Node:
    """``[experts, capacity, ...]`` as ``[ranks, experts of a rank, capacity, ...]``."""
    return graph.call_method("unflatten", (node, 0, (spec.divided_over.size, spec.shape[0])))


def even_in(graph: fx.Graph, apart: fx.Node, spec: ParamSpec, *told: fx.Node | None) -> fx.Node:
    """``[ranks, experts here, capacity, ...]``, for each rank, to the same from each. With what is ``told``, ends and scores,
    the exchange opens the layer's."""
    ends, scores = told or (None, None)
    return graph.call_function(_ops.exchange_even, (apart, ends, scores, bool(told), spec.key))


def by_expert(graph: fx.Graph, arrived: fx.Node) -> fx.Node:
    """``[ranks, experts here, capacity, ...]`` as ``[experts here, ranks * capacity, ...]``."""
    return graph.call_method("flatten", (graph.call_method("transpose", (arrived, 0, 1)), 1, 2))


def even_out(graph: fx.Graph, node: fx.Node, spec: ParamSpec) -> fx.Node:
    """The way back of :func:`even_in` and :func:`by_expert`."""
    apart = graph.call_method("unflatten", (node, 1, (spec.divided_over.size, -1)))
    by_source = graph.call_method("transpose", (apart, 0, 1))
    return graph.call_function(_ops.exchange_even, (by_source, None, None, False, spec.key))


def items(graph: fx.Graph, function: Any, *args: Any) -> list[fx.Node]:
    """What ``function`` answers, one by one: as many as its second argument is long."""
    made = graph.call_function(function, args)
    return [graph.call_function(operator.getitem, (made, i)) for i in range(len(args[1]))]
