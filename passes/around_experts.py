"""What stands around the inside of a layer of experts whose weights are divided over ranks: three ways in and out.

- :class:`Dropless`, of rows in the order of experts: as many as there are for each go to the ranks that hold them::

      counts of arriving rows -> dispatch -> order of experts -> [inside] -> order of arrival -> combine

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
from dataclasses import dataclass
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
    """``ends`` are those of all experts on this rank, ``scores`` the router's; ``first`` has the rows."""

    graph: fx.Graph
    spec: ParamSpec
    first: fx.Node
    ends: fx.Node
    scores: fx.Node | None
    _arriving: Any = None
    _splits: Any = None
    _positions: Any = None
    _count: Any = None

    def open(self) -> fx.Node:
        """The ends of the rows of the experts here."""
        graph = self.graph
        told = graph.call_function(_ops.exchange_counts, (self.ends, self.scores, self.spec.key))
        self._arriving, self._splits = (graph.call_function(operator.getitem, (told, i)) for i in range(2))
        here = graph.call_method("sum", (self._arriving, 0))
        return graph.call_function(torch.cumsum, (here,), {"dim": 0, "dtype": torch.int32})

    def enter(self, node: fx.Node) -> fx.Node:
        """Rows of the experts here from all ranks, in the order of experts."""
        graph = self.graph
        sent = graph.call_function(_ops.dispatch_rows, (node, self._splits, None, self.spec.key))
        if self._positions is None:
            self._count = graph.call_method("size", (sent, 0))
            self._positions = graph.call_function(_ops.arrival_positions, (self._arriving, self._count))
        return graph.call_function(_ops.spread_experts, (sent, self._positions))

    def count(self) -> Any:
        """How many there are; known once the first have entered."""
        return self._count

    def leave(self, node: fx.Node) -> fx.Node:
        """Back to where rows came from; zeros behind the last end."""
        graph = self.graph
        back = graph.call_function(_ops.unpermute_experts, (node, self._positions))
        size = rows_of(graph, self.first)
        return graph.call_function(_ops.combine_rows, (back, self._splits, size, self.spec.key))


@dataclass(kw_only=True)
class Limited:
    """As :class:`Dropless`, of no more than ``limit`` rows for each expert; rows behind it become zeros."""

    graph: fx.Graph
    spec: ParamSpec
    first: fx.Node
    ends: fx.Node
    scores: fx.Node | None
    limit: Limit
    _capacity: Any = None
    _is_open: bool = False

    def open(self) -> fx.Node:
        graph, here, ranks = self.graph, self.spec.shape[0], self.spec.divided_over.size
        self._capacity = self.limit.node(graph, self.first, here * ranks)
        return graph.call_function(even_ends, (self.ends, here, self._times(ranks)))

    def enter(self, node: fx.Node) -> fx.Node:
        graph = self.graph
        padded = graph.call_function(_ops.pad_experts, (node, self.ends, self._capacity))
        told = () if self._is_open else (self.ends, self.scores)
        self._is_open = True
        return graph.call_method("flatten", (even_in(graph, padded, self.spec, *told), 0, 1))

    def count(self) -> Any:
        return self._times(self.spec.shape[0] * self.spec.divided_over.size)

    def _times(self, number: int) -> Any:
        if isinstance(self._capacity, int):
            return self._capacity * number
        return self.graph.call_function(operator.mul, (self._capacity, number))

    def leave(self, node: fx.Node) -> fx.Node:
        graph = self.graph
        apart = graph.call_method("unflatten", (node, 0, (self.spec.shape[0], -1)))
        padded = even_out(graph, apart, self.spec)
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
        return even_in(self.graph, node, self.spec, *told)

    def leave(self, node: fx.Node) -> fx.Node:
        return even_out(self.graph, node, self.spec)


def even_in(graph: fx.Graph, node: fx.Node, spec: ParamSpec, *told: fx.Node | None) -> fx.Node:
    """``[experts, capacity, ...]`` of this rank to ``[experts here, ranks * capacity, ...]`` of all. With what is ``told``,
    ends and scores, the exchange opens the layer's."""
    ranks, here = spec.divided_over.size, spec.shape[0]
    apart = graph.call_method("unflatten", (node, 0, (ranks, here)))
    ends, scores = told or (None, None)
    arrived = graph.call_function(_ops.exchange_even, (apart, ends, scores, bool(told), spec.key))
    return graph.call_method("flatten", (graph.call_method("transpose", (arrived, 0, 1)), 1, 2))


def even_out(graph: fx.Graph, node: fx.Node, spec: ParamSpec) -> fx.Node:
    """The way back of :func:`even_in`."""
    apart = graph.call_method("unflatten", (node, 1, (spec.divided_over.size, -1)))
    by_rank = graph.call_method("transpose", (apart, 0, 1))
    arrived = graph.call_function(_ops.exchange_even, (by_rank, None, None, False, spec.key))
    return graph.call_method("flatten", (arrived, 0, 1))
