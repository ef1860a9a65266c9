"""Mixtures of experts in reports, predictions and plans: what routers did, what is sent, what a budget holds."""

from __future__ import annotations

import functools
import json
import operator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import dspass
from dspass.lowering.simulate import GraphSimulator
from dspass.passes.devices import device
from dspass.passes.exchange_rows import _STARTS
from dspass.passes.nodes import EXCHANGES
from dspass.report import Report
from dspass.runtime import compat, grouped  # noqa: F401  (declares operators)
from dspass.runtime.axis import Axis
from dspass.runtime.exchange import CHUNKS, MARKERS
from dspass.runtime.traffic import rows_cost
from tests.ranks import run
from tests.training import close, train, without_inductor, zero

TOP_K = 2


class Mixture(nn.Module):
    """Each token to two experts, sorted by them. Of ``skipped`` tokens, the first ones, rows stand behind the last end."""

    def __init__(self, hidden: int, inner: int, experts: int, skipped: int = 0) -> None:
        super().__init__()
        self.router = nn.Linear(hidden, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, hidden, inner) / hidden**0.5)
        self.down = nn.Parameter(torch.randn(experts, inner, hidden) / inner**0.5)
        self.skipped = skipped

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = self.router(x).softmax(-1).topk(TOP_K)
        if self.skipped:
            is_first = torch.arange(x.shape[0])[:, None] < self.skipped
            weights, ids = weights.masked_fill(is_first, 0.0), ids.masked_fill(is_first, self.up.shape[0])
        return weights, ids

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        experts = self.up.shape[0]
        weights, ids = self.route(x)
        sorted_ids, order = ids.reshape(-1).sort()
        ends = torch.histc(sorted_ids.float(), bins=experts, min=0, max=experts - 1).cumsum(0, dtype=torch.int32)
        inner = F.gelu(torch.ops.dspass.grouped_product(x[order // TOP_K], self.up, ends))
        rows = torch.ops.dspass.grouped_product(inner, self.down, ends)
        return (rows[order.argsort()].view(*ids.shape, -1) * weights[..., None]).sum(1)


class Net(nn.Module):
    def __init__(self, layers: int = 2, hidden: int = 16, inner: int = 24, experts: int = 8, skipped: int = 0) -> None:
        super().__init__()
        self.embed = nn.Embedding(61, hidden)
        self.mixtures = nn.ModuleList(Mixture(hidden, inner, experts, skipped) for _ in range(layers))
        self.head = nn.Linear(hidden, 61)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for mixture in self.mixtures:
            x = x + mixture(F.layer_norm(x, x.shape[-1:]))
        return F.cross_entropy(self.head(x), tokens)


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 61, (count,), generator=torch.Generator().manual_seed(seed))


def experts_on(stage: int, size: int | None = None, **own: Any) -> dict[str, Any]:
    return zero(stage, expert_parallel={"enabled": True, **({"autoep_size": size} if size else {})}, dspass=own or None)


def sent_to_experts(report: Report) -> int:
    return sum(t.bytes for t in report.traffic if t.kind == "all-to-all" and t.group == "expert")


def counts_bytes(layers: int, experts: int, ranks: int) -> int:
    return layers * (ranks - 1) * (experts + 1) * 4


# -- predictions ---------------------------------------------------------------------------------------------------------


def predicted(world: int, *, size: int | None = None, count: int = 64, **own: Any) -> Report:
    torch._dynamo.reset()
    torch.manual_seed(0)
    return dspass.explain(Net(), tokens(count), config=experts_on(3, size, **own), world_size=world, device="h100")


@pytest.mark.parametrize(("world", "size", "imbalance"), [(4, None, 1.0), (16, 8, 2.0)])
def test_predicted_bytes_are_those_of_the_formula(world: int, size: int | None, imbalance: float) -> None:
    """Evenly routed, 4 * tokens * k * hidden * (N - 1) / N, forward plus backward. The busiest rank gets ``imbalance`` times as
    many rows and sends them back, and keeps as many more of its own."""
    ranks, layers, hidden = size or world, 2, 16
    report = predicted(world, size=size, experts={"expected_imbalance": imbalance})
    rows = 64 * TOP_K
    dispatched = rows * (1 - imbalance / ranks)
    combined = rows * imbalance * (ranks - 1) / ranks
    formula = layers * 2 * (dispatched + combined) * hidden * 4
    if imbalance == 1:
        assert formula == layers * 4 * 64 * TOP_K * hidden * 4 * (ranks - 1) / ranks
    assert sent_to_experts(report) - counts_bytes(layers, 8, ranks) == pytest.approx(formula, rel=1e-12)
    assert not report.experts, "nobody knows what routers will do"
    assert any(f"{imbalance:g} times the mean" in note for note in report.notes)


def test_uneven_routing_takes_more_time_and_memory() -> None:
    waits = ["...", "-hide_exchanges"]
    even, uneven = (predicted(4, count=4096, experts={"expected_imbalance": f}, passes=waits) for f in (1.0, 3.0))
    seconds = [sum(t.exposed_seconds or 0.0 for t in r.traffic if t.group == "expert") for r in (even, uneven)]
    # In a dispatch it is what the busiest rank gets, in a combine what it sends; latencies stay. Nothing is moved to hide them,
    # and what stands between start and wait in any case takes tens of nanoseconds.
    row, arriving = 16 * 4, 4096 * TOP_K * 3 / 4
    more = 2 * 4 * 2 * arriving * row / device("h100").link_of(4)
    assert 0 <= more - (seconds[1] - seconds[0]) < 1e-7
    assert even.step_seconds is not None
    assert uneven.step_seconds is not None
    assert uneven.step_seconds - even.step_seconds > 2 * more, "experts compute more"
    assert uneven.memory.peak_bytes > even.memory.peak_bytes


def test_even_exchanges_take_their_time_too() -> None:
    """Those of a capacity: bytes as counted, at the link's rate, and a latency for each, the counts' too that open a layer."""
    report = predicted(4, count=4096, experts={"capacity_factor": 1.0}, passes=["...", "-hide_exchanges"])
    found = [t for t in report.traffic if t.kind == "all-to-all" and t.group == "expert"]
    h100 = device("h100")
    wanted = sum(t.calls * h100.latency + t.bytes / h100.link_of(4) for t in found)
    assert sum(t.exposed_seconds or 0.0 for t in found) == pytest.approx(wanted, rel=1e-6)
    assert sum(t.calls for t in found) == 2 * 5  # of each layer two there, two back, and one that tells of them


def test_whatever_is_started_has_a_cost() -> None:
    assert {begin for begin, _ in _STARTS.values()} == set(EXCHANGES)
    assert set(_STARTS) == MARKERS - set(CHUNKS), "those two send nothing"


def test_ranks_of_one_place_in_each_node_are_joined_by_the_slower_link() -> None:
    group: Any = None
    inside, across = (
        Axis(name="a", group=group, size=2, rank=0, ranks=ranks, backend="gloo") for ranks in ((6, 7), (0, 8))
    )
    h100 = device("h100")
    assert [h100.link_of(rows_cost(axis, 1, "forward").span) for axis in (inside, across)] == [
        h100.node_link,
        h100.link,
    ]


# -- what ran ------------------------------------------------------------------------------------------------------------


@without_inductor
def routed(skipped: int, calls: int) -> tuple[dict[str, list[int]], Report]:
    """Rows of this rank for each expert as the model itself counts them, and the report of one step."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = Net(skipped=skipped)
    config = experts_on(2) | {"gradient_accumulation_steps": calls}
    compiled: Any = torch.compile(model, backend="deepspeed", options=config)
    optimizer = torch.optim.SGD(compiled.parameters(), lr=0.1)
    torch.manual_seed(0)
    plain = Net(skipped=skipped)
    expected: dict[str, list[int]] = {}

    def count(module: Any, args: Any, name: str) -> None:
        _, ids = module.route(args[0])
        here = expected.setdefault(name, [0] * 8)
        for one in ids[ids < 8].tolist():
            here[one] += 1

    for name, module in plain.named_modules():
        if isinstance(module, Mixture):
            module.register_forward_pre_hook(functools.partial(count, name=name))
    compiled(tokens(3)).backward()  # whole, and counts nothing; another number of tokens makes what follows dynamic
    optimizer.zero_grad()
    for call in range(calls):
        batch = tokens(20 + 13 * rank, seed=10 * rank + call)
        compiled(batch).backward()
        plain(batch)
    optimizer.step()
    return expected, dspass.explain(model)


def test_the_report_counts_what_routers_did_on_all_ranks() -> None:
    skipped, calls = 5, 2
    results = run(2, routed, skipped, calls)
    for rank, (mine, report) in enumerate(results):
        assert [layer.name for layer in report.experts] == ["mixtures.0", "mixtures.1"]
        sent = 0
        for layer in report.experts:
            by_rank = [expected[layer.name] for expected, _ in results]
            assert layer.rows == [a + b for a, b in zip(*by_rank, strict=True)]
            assert (layer.ranks, layer.dropped) == (2, skipped * TOP_K * calls)
            others = slice(4 - 4 * rank, 8 - 4 * rank)
            leave = sum(mine[layer.name][others])
            arrive = sum(by_rank[1 - rank][4 * rank : 4 * rank + 4])
            sent += 2 * (leave + arrive) * 16 * 4  # forward and backward
        assert sent_to_experts(report) == sent + calls * counts_bytes(2, 8, 2)
        captured = next(p for p in report.passes if p.name == "divide_experts")
        assert captured.summary == "2 layers of 8 experts, 4 on each of 2 ranks: mixtures.0, mixtures.1"
        assert Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report
        assert "Experts of 2 layers" in str(report)


class Mixing(Mixture):
    """Its experts look at other rows between their products."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, ids = self.route(x)
        sorted_ids, order = ids.reshape(-1).sort()
        ends = torch.histc(sorted_ids.float(), bins=8, min=0, max=7).cumsum(0, dtype=torch.int32)
        inner = torch.ops.dspass.grouped_product(x[order // TOP_K], self.up, ends)
        inner = inner - inner.mean(0)
        rows = torch.ops.dspass.grouped_product(inner, self.down, ends)
        return rows[order.argsort()].view(*ids.shape, -1).sum(1)


def test_what_looks_like_experts_and_is_none_stands_in_the_notes() -> None:
    torch._dynamo.reset()
    model = Net()
    model.mixtures[1] = Mixing(16, 24, 8)
    report = dspass.explain(model, tokens(16), config=experts_on(3), world_size=2)
    said = next(p.summary for p in report.passes if p.name == "divide_experts")
    assert said.startswith("1 layer of 8 experts, 4 on each of 2 ranks: mixtures.0; ")
    (note,) = [n for n in report.notes if "none" in n]
    assert "look like a layer of experts and are none: mean works across rows" in note
    assert note[:-1] in said
    assert note[:40] in str(report)


# -- sizes that are not known --------------------------------------------------------------------------------------------


def test_an_unknown_size_is_added_up_as_it_is_expected() -> None:
    with compat.fake_mode() as mode:
        rows = torch.empty(6, 4)
        size = compat.unknown_size(rows, 9)
        other = mode.shape_env.create_unbacked_symint()
        assert [compat.expected(n) for n in (5, size, 2 * size + 1, size * other)] == [5, 9, 19, None]
        assert compat.expected_elements(rows.new_empty((size, 4))) == 36


def test_a_graph_is_planned_with_expected_numbers_and_the_same_names() -> None:
    aten, graph = torch.ops.aten, torch.fx.Graph()
    with compat.fake_mode():
        size = compat.unknown_size(torch.empty(6), 9)
        values = [torch.empty(6, 4), torch.empty(size, 4), size, size * 2 > 5, None, torch.empty(size * 2)]
    x = graph.placeholder("x")
    arrived = graph.call_function(aten.clone.default, (x,))
    count = graph.call_function(aten.sym_size.int, (arrived, 0))
    check = graph.call_function(operator.gt, (count, 2))
    checked = graph.call_function(aten._assert_scalar.default, (check, "too few"))
    wide = graph.call_function(aten.new_zeros.default, (x, [count]))
    graph.output((wide,))
    for node, value in zip((x, arrived, count, check, checked, wide), values, strict=True):
        node.meta["val"] = value
    gm = torch.fx.GraphModule(nn.Module(), graph)
    sized = compat.as_expected(gm, "mark")
    assert sized is not None
    found = {node.name: node for node in sized.graph.nodes}
    assert list(found) == ["x", arrived.name, wide.name, "output"]
    assert found[wide.name].args == (found["x"], [9])
    assert [tuple(found[n.name].meta["val"].shape) for n in (x, arrived, wide)] == [(6, 4), (9, 4), (18,)]
    assert ["mark" in found[n.name].meta for n in (x, arrived, wide)] == [False, True, True]
    assert "mark" not in arrived.meta, "the graph itself stays as it is"
    assert compat.as_expected(sized, "mark") is None


# -- plans ---------------------------------------------------------------------------------------------------------------


def net() -> nn.Module:
    return Net(layers=1, hidden=32, inner=64)


def batch(draw: torch.Generator, rank: int, call: int) -> tuple[torch.Tensor]:
    return (torch.randint(0, 61, (40 + 24 * rank,), generator=draw),)


def planned(budget: int) -> dict[str, Any]:
    # Its dry runs walk the graph, which is quick: what a plan holds is asked below.
    with mock.patch("dspass.planning.InductorSimulator", return_value=GraphSimulator()):
        return train(net, batch, experts_on(3, memory_budget=budget), steps=4)


def test_a_planned_model_trains_to_the_numbers_of_one_process() -> None:
    close(run(2, planned, 420_000))


def peaks(budget: int, imbalance: float) -> tuple[int, Report]:
    """What a step took, with what Inductor makes."""
    torch.manual_seed(0)
    model = net()
    config = experts_on(3, memory_budget=budget, experts={"expected_imbalance": imbalance})
    compiled: Any = torch.compile(model, backend="deepspeed", options=config)
    optimizer = torch.optim.AdamW(compiled.parameters(), lr=1e-3)
    mine = tokens(2048, seed=dist.get_rank())

    def step() -> None:
        compiled(mine).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    step()
    with dspass.measure(model) as measured:
        step()
    return measured.peak_bytes, dspass.explain(model)


def test_a_budget_holds_where_routing_is_no_less_even_than_expected() -> None:
    budget, imbalance = 5_600_000, 1.1
    results = run(2, peaks, budget, imbalance)
    for measured, report in results:
        (layer,), (plan,) = report.experts, report.plans
        assert 1 < layer.rank_imbalance <= imbalance
        assert measured <= plan.peak_bytes <= budget
        assert any("The plan is for 1.1 times the mean of rows" in note for note in report.notes)
    busiest = max(measured for measured, _ in results)
    assert busiest > 0.9 * results[0][1].plans[0].peak_bytes, "and it is no guess from far above"


# -- on the meta device --------------------------------------------------------------------------------------------------


@without_inductor
def from_meta() -> tuple[float, float, list[tuple[int, ...]]]:
    torch.manual_seed(0)
    whole = Net()
    state = whole.state_dict()
    with torch.device("meta"):
        model = Net()

    dspass.shard(model, experts_on(3), fill=state)
    compiled: Any = torch.compile(model, backend="deepspeed", options=experts_on(3))
    mine = tokens(30, seed=dist.get_rank())
    with torch.no_grad():
        found, wanted = compiled(mine).item(), whole(mine).item()
    local = [tuple(p.to_local().shape) for n, p in model.named_parameters() if n.endswith("up")]
    return found, wanted, local


def test_a_model_on_the_meta_device_is_filled_with_its_own_experts() -> None:
    for found, wanted, local in run(2, from_meta):
        assert found == pytest.approx(wanted, rel=1e-6)
        assert local == [(4, 16, 24)] * 2
