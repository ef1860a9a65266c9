"""The minimum cut of a network against networkx's: equal in value, and on the same side."""

from __future__ import annotations

import math

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspass.planner.flow import Network

#: Tail, head and capacity.
Edges = list[tuple[int, int, float]]


@st.composite
def networks(draw: st.DrawFn, most: int = 8) -> tuple[int, Edges]:
    """How many nodes, of which the first is the source and the last the sink, and edges: some twice, some there and back, some
    of no capacity, some that cannot be cut."""
    count = draw(st.integers(2, most))
    node = st.integers(0, count - 1)
    capacity = st.one_of(st.integers(0, 5), st.integers(2**40, 2**80), st.just(math.inf))
    edges = draw(st.lists(st.tuples(node, node, capacity).filter(lambda e: e[0] != e[1]), max_size=4 * count))
    return count, edges


def cut(count: int, edges: Edges) -> set[int]:
    network = Network(count)
    for edge in edges:
        network.add_edge(*edge)
    return network.minimum_cut(0, count - 1)


def reference(count: int, edges: Edges) -> tuple[int, set[int]]:
    """Value and side of networkx's cut. It knows no parallel edges; an edge without a capacity cannot be cut."""
    graph = nx.DiGraph()
    graph.add_nodes_from(range(count))
    for tail, head, capacity in edges:
        whole = capacity + graph.get_edge_data(tail, head, {"capacity": 0}).get("capacity", math.inf)
        graph.add_edge(tail, head, capacity=whole)
    for _, _, data in graph.edges(data=True):
        if data["capacity"] == math.inf:
            del data["capacity"]
    value, (_, side) = nx.minimum_cut(graph, 0, count - 1)
    return value, side


@given(networks())
@settings(max_examples=500, deadline=None)
def test_a_cut_is_networkxs(network: tuple[int, Edges]) -> None:
    try:
        value, side = reference(*network)
    except nx.NetworkXUnbounded:
        with pytest.raises(ValueError, match="cannot be cut"):
            cut(*network)
        return
    found = cut(*network)
    assert sum(capacity for tail, head, capacity in network[1] if tail not in found and head in found) == value
    assert found == side, "of several minimum cuts, the one with the fewest nodes beside the sink"


def test_a_capacity_is_exact_beyond_what_a_float_holds() -> None:
    large = 2**70
    assert cut(3, [(0, 1, large), (1, 2, large + 1)]) == {1, 2}
    assert cut(3, [(0, 1, large + 1), (1, 2, large)]) == {2}


def test_a_cut_goes_around_what_cannot_be_cut() -> None:
    edges: Edges = [(0, 1, math.inf), (1, 2, 9), (1, 3, 1), (3, 2, math.inf), (2, 4, math.inf)]
    assert cut(5, edges) == {2, 3, 4}
    with pytest.raises(ValueError, match="cannot be cut"):
        cut(5, [*edges, (1, 4, math.inf)])


def test_without_a_path_nothing_is_cut() -> None:
    assert cut(3, [(0, 1, 5), (2, 1, 5)]) == {2}


def test_a_deep_network_needs_no_recursion() -> None:
    count = 5000
    assert cut(count, [(i, i + 1, count - i) for i in range(count - 1)]) == {count - 1}
