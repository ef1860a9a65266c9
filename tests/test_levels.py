"""All-to-alls inside of nodes and then across: a flat one's rows, in a flat one's order, on lists and on real ranks."""

from __future__ import annotations

import functools
import os
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dspass
from dspass.config import ConfigError
from dspass.engines import engine_of
from dspass.passes.devices import device
from dspass.report import Report
from dspass.runtime.levels import Hop, hops
from tests.ranks import run
from tests.test_expert_parallel import Routed
from tests.test_expert_reports import Net, tokens
from tests.training import Batch, close, train, zero

TABLES = st.tuples(st.integers(1, 4), st.integers(1, 4)).flatmap(
    lambda sizes: st.lists(
        st.lists(st.integers(0, 3), min_size=sizes[0] * sizes[1], max_size=sizes[0] * sizes[1]),
        min_size=sizes[0] * sizes[1],
        max_size=sizes[0] * sizes[1],
    ).map(lambda table: (sizes[1], table))
)


def exchanged(rows: list[list[Any]], all_hops: list[Hop], peers: list[list[int]]) -> list[list[Any]]:
    """What each rank has behind one hop, whose axis on rank ``r`` are ``peers[r]``; sizes that ranks tell agree."""
    sent: list[list[list[Any]]] = []
    for mine, hop in zip(rows, all_hops, strict=True):
        begins = [sum(hop.parts[:i]) for i in range(len(hop.parts))]
        flat = [row for i in hop.order for row in mine[begins[i] : begins[i] + hop.parts[i]]]
        ends = [sum(hop.sent[: i + 1]) for i in range(len(hop.sent))]
        assert ends[-1] == len(flat)
        sent.append([flat[end - count : end] for end, count in zip(ends, hop.sent, strict=True)])
    found = []
    for rank, among in enumerate(peers):
        parts = [sent[source][peers[source].index(rank)] for source in among]
        assert [len(part) for part in parts] == all_hops[rank].received
        found.append([row for part in parts for row in part])
    return found


@settings(max_examples=150, deadline=None)
@given(TABLES)
def test_two_hops_are_a_flat_exchange(drawn: tuple[int, list[list[int]]]) -> None:
    local, table = drawn
    ranks = range(len(table))
    rows = [[(s, d, i) for d in ranks for i in range(table[s][d])] for s in ranks]
    inside, across = zip(*(hops(table, rank, local) for rank in ranks), strict=True)
    in_node = [list(range(r // local * local, r // local * local + local)) for r in ranks]
    of_place = [list(range(r % local, len(table), local)) for r in ranks]
    middle = exchanged(rows, list(inside), in_node)
    found = exchanged(middle, list(across), of_place)
    assert found == [[(s, d, i) for s in ranks for i in range(table[s][d])] for d in ranks]


# -- on ranks ------------------------------------------------------------------------------------------------------------


def batch(draw: torch.Generator, rank: int, call: int) -> Batch:
    """Ranks with other numbers of tokens; rank 0 has none for the other node's, and nobody has any for rank 2's."""
    count = 2 + 3 * rank
    scores = torch.randn(count, 4, generator=draw)
    scores[:, 2] = -9.0
    if rank == 0:
        scores[:, 3] = -8.0
    return torch.randn(count, 6, generator=draw), scores, 1, torch.randn(count, 10, generator=draw)


def even_batch(draw: torch.Generator, rank: int, call: int) -> Batch:
    return torch.randn(8, 6, generator=draw), torch.randn(8, 4, generator=draw), 1, torch.randn(8, 10, generator=draw)


def in_nodes(hierarchical: bool | None, **more: Any) -> dict[str, Any]:
    own: dict[str, Any] = {"experts": {"hierarchical": hierarchical, **more.pop("experts", {})}, **more}
    return zero(3, expert_parallel={"enabled": True}, dspass=own)


def trained(config: dict[str, Any], data: Any) -> dict[str, Any]:
    """On nodes of two ranks; with what was sent, by group."""
    engines: list[Any] = []

    def look(model: Any, one: Batch) -> None:
        engines.append(engine_of(model))

    with mock.patch.dict(os.environ, {"LOCAL_WORLD_SIZE": "2"}):
        torch._dynamo.reset()
        found: dict[str, Any] = train(Routed, data, config, steps=3, between=look)
    last = engines[-1].traffic.last
    return found | {"sent": {group: n for (kind, _, group, _), (n, _, _) in last.items() if kind == "all-to-all"}}


@pytest.mark.parametrize("experts", [{}, {"capacity_factor": 4.0}], ids=["dropless", "capacity"])
def test_the_numbers_are_a_flat_exchange_s(experts: dict[str, Any]) -> None:
    """Bit for bit: rows stand where they would, and nothing is added on the way."""
    data = even_batch if experts else batch
    flat, nodes = (run(4, trained, in_nodes(way, experts=experts), data) for way in (False, True))
    close(nodes)
    assert [r["digest"] for r in nodes] == [r["digest"] for r in flat]
    assert all(set(r["sent"]) == {"expert"} for r in flat)
    assert all(r["sent"].keys() == {"expert", "expert_node", "expert_across"} for r in nodes)
    assert all(r["sent"]["expert_node"] == r["sent"]["expert_across"] == 2 for r in nodes)  # of one direction


def test_rows_in_few_bits_go_over_both_levels() -> None:
    config = in_nodes(True, quantise={"exchanges": "int8", "block": 16})
    close(run(4, trained, config, batch), within=0.05)


def refused(size: int) -> str:
    config = in_nodes(True) | {"expert_parallel": {"enabled": True, "autoep_size": size}}
    with mock.patch.dict(os.environ, {"LOCAL_WORLD_SIZE": "4"}):
        try:
            dspass.shard(Routed(), config)
        except ConfigError as error:
            return str(error)
    return ""


def test_levels_that_are_not_there_are_refused() -> None:
    for said in run(4, refused, 4):
        assert "dspass.experts.hierarchical: nodes of 4 ranks do not divide the 4 ranks" in said
        assert "zero_hpz_partition_size" in said


# -- the choice ----------------------------------------------------------------------------------------------------------


def predicted(count: int, hierarchical: bool | None = None, world: int = 16) -> Report:
    torch._dynamo.reset()
    torch.manual_seed(0)
    build = functools.partial(Net, experts=world, layers=1)
    config = in_nodes(hierarchical, passes=["...", "-hide_exchanges"])
    return dspass.explain(build(), tokens(count), config=config, world_size=world, device="h100")


def groups(report: Report) -> dict[str, int]:
    return {t.group: t.bytes for t in report.traffic if t.kind == "all-to-all" and t.direction == "forward"}


def test_few_rows_go_over_both_levels_and_their_bytes_are_those_of_the_formula() -> None:
    """Sixteen ranks are two nodes; to rows of each rank's place goes an eighth, and half of all stays in the node."""
    report = predicted(64)
    rows, told = 2 * 64 * 2 * 16 * 4, 15 * (16 + 1) * 4
    assert groups(report) == {"expert": told, "expert_node": rows * 7 // 8, "expert_across": rows // 2}
    assert groups(predicted(64, False)) == {"expert": told + rows * 15 // 16}
    h100 = device("h100")
    (inside,) = (t for t in report.traffic if (t.group, t.direction) == ("expert_node", "forward"))
    assert inside.exposed_seconds == pytest.approx(2 * h100.latency + inside.bytes / h100.node_link, rel=1e-6)


def test_many_rows_go_flat_where_nobody_says_otherwise() -> None:
    """Their bytes take longer inside of a node than messages would take to begin."""
    assert set(groups(predicted(400_000))) == {"expert"}
    assert set(groups(predicted(400_000, True))) == {"expert", "expert_node", "expert_across"}
