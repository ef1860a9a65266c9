"""The minimum cut of a network with whole capacities, by Dinic's algorithm (1970) on lists of integers.

The networks of :mod:`dspass.planner.mincut` are many and small: a hull of a model of 19,000 values cuts 7,000 of some eight
nodes each, and one of 20,000 random values 13,000 of up to some thousand. A network as deep as it is large is the worst, for
every length of a path takes a phase: where each of 4,000 values reads the two before it and only the last is needed, a cut
takes up to 6 s.

Dropped: networkx. The same cuts, with the building of its graphs, took 8 times as long by its ``boykov_kolmogorov``, and 10 to
14 times by its ``preflow_push``; it is the reference of the tests. Dropped: igraph. It took 1.2 to 0.4 times as long, but would
be a dependency of its own under the GPL, and its capacities are floats. Dropped: scipy's ``maximum_flow``. Its capacities have
32 bits, which would leave nanoseconds of a step of seconds; 1.17 takes ``2 ** 40 + 7`` for 7, and says nothing. Dropped:
rustworkx. 0.18 has no cut between a source and a sink.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass
class Network:
    """Nodes are the integers below ``nodes``. Edges are numbered too, and ``edge ^ 1`` is the reverse of ``edge``."""

    nodes: int
    _heads: list[int] = field(init=False, default_factory=list)
    _residual: list[float] = field(init=False, default_factory=list)  # what each edge still takes
    _leaving: list[list[int]] = field(init=False)  # the edges that leave each node, reverse ones among them

    def __post_init__(self) -> None:
        self._leaving = [[] for _ in range(self.nodes)]

    def add_edge(self, tail: int, head: int, capacity: float) -> None:
        """Of a whole ``capacity``, which is exact however large it is, or of ``math.inf``: it cannot be cut."""
        self._leaving[tail].append(len(self._heads))
        self._leaving[head].append(len(self._heads) + 1)
        self._heads += (head, tail)
        self._residual += (capacity, 0)

    def minimum_cut(self, source: int, sink: int) -> set[int]:
        """The sink's side of a minimum cut, and of these the smallest: the nodes from which more could flow to the sink.

        ``ValueError`` where a path of edges that cannot be cut leads there from the source.
        """
        while levels := self._levels(source, sink):
            self._block(levels, source, sink)
        heads, residual = self._heads, self._residual
        side, stack = {sink}, [sink]
        while stack:
            for edge in self._leaving[stack.pop()]:
                if residual[edge ^ 1] and heads[edge] not in side:
                    side.add(heads[edge])
                    stack.append(heads[edge])
        return side

    def _levels(self, source: int, sink: int) -> list[int]:
        """How many edges with residual capacity lead from the source to each node, -1 where it is farther than the sink; empty
        where none lead to the sink."""
        heads, residual = self._heads, self._residual
        levels = [-1] * self.nodes
        levels[source], level, last = 0, 0, [source]
        while last and levels[sink] < 0:
            level += 1
            found = []
            for node in last:
                for edge in self._leaving[node]:
                    head = heads[edge]
                    if levels[head] < 0 and residual[edge]:
                        levels[head] = level
                        found.append(head)
            last = found
        return levels if levels[sink] > 0 else []

    def _block(self, levels: list[int], source: int, sink: int) -> None:
        """A blocking flow: fill paths of ascending levels until none is left."""
        heads, residual = self._heads, self._residual
        tried = [0] * self.nodes  # so many edges of a node lead nowhere
        path: list[int] = []
        node = source
        while True:
            if node == sink:
                flow = min([residual[edge] for edge in path])
                if flow == math.inf:
                    raise ValueError("a path of edges that cannot be cut leads from the source to the sink")
                for edge in path:
                    residual[edge] -= flow
                    residual[edge ^ 1] += flow
                full = next(k for k, edge in enumerate(path) if not residual[edge])
                node = heads[path[full] ^ 1]
                del path[full:]
            edges = self._leaving[node]
            while tried[node] < len(edges):
                edge = edges[tried[node]]
                if residual[edge] and levels[heads[edge]] == levels[node] + 1:
                    path.append(edge)
                    node = heads[edge]
                    break
                tried[node] += 1
            else:
                if not path:
                    return
                node = heads[path.pop() ^ 1]
                tried[node] += 1
