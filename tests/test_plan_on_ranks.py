"""One plan for all ranks: what they agree on, and what one of them plans alone."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import dspass
from dspass import between_ranks, planning
from dspass.config import Config, ConfigError
from dspass.engines import engine_of
from dspass.lowering.simulate import GraphSimulator
from dspass.passes.agreed_order import collectives_of, keep_order
from dspass.passes.bucket_gathers import BucketGathers
from dspass.passes.bucket_reductions import BucketReductions
from dspass.passes.nodes import gather_start, reduce_start, wait_of
from dspass.passes.prefetch_gathers import PrefetchGathers
from dspass.pipeline import build
from dspass.runtime.engine import Engine
from dspass.stage_plans import gathered
from tests.graphs import run_pipeline
from tests.models import Block, Mlp, points
from tests.ranks import run
from tests.test_passes import toy_of
from tests.training import as_they_are, whole, zero


def _predicts_alone(path: str) -> float:
    rank = dist.get_rank()
    dist.destroy_process_group()
    batch = points(torch.Generator().manual_seed(0), 0, 0)
    if rank == 0:
        dspass.explain(Mlp(), *batch, config=zero(0, dspass={"memory_budget": 10**9}), world_size=2)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    torch.manual_seed(0)
    compiled = torch.compile(Mlp(), backend="deepspeed", options=zero(0, dspass={"memory_budget": 10**9}))
    with mock.patch.object(between_ranks, "WAIT", timedelta(seconds=20)):
        loss = compiled(*batch)
    loss.backward()
    dist.destroy_process_group()
    return loss.item()


def test_one_rank_may_predict_alone_before_all_train(tmp_path: Any) -> None:
    first, second = run(2, _predicts_alone, str(tmp_path / "store"))
    assert first == second


def _layers() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(*(layer for _ in range(6) for layer in (torch.nn.Linear(64, 64), torch.nn.GELU())))


def _compiled(model: torch.nn.Module, stage: int, budget: int) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="deepspeed", options=zero(stage, dspass={"memory_budget": budget}))


@contextlib.contextmanager
def _quick() -> Any:
    with (
        mock.patch("dspass.compilation.segment_compiler", return_value=as_they_are),
        mock.patch("dspass.planning.InductorSimulator", return_value=GraphSimulator()),
        mock.patch.object(between_ranks, "WAIT", timedelta(seconds=20)),
    ):
        yield


def _largest_difference(
    model: torch.nn.Module, reference: torch.nn.Module, stage: int, batches_rows: Sequence[tuple[int, int]], *row: int
) -> float:
    """To the mean of two ranks' gradients, over batches of so many rows of shape ``row`` on each."""
    compiled, worst = _compiled(model, stage, 10**9), 0.0
    with _quick():
        for rows in batches_rows:
            torch.manual_seed(sum(rows))
            batches = [torch.randn(count, *row) for count in rows]
            compiled(batches[dist.get_rank()]).square().mean().backward()
            sum(reference(b).square().mean() for b in batches).div(2).backward()  # type: ignore[union-attr]
            for mine, other in zip(model.parameters(), reference.parameters(), strict=True):
                worst = max(worst, (whole(mine.grad) - other.grad).abs().max().item())
            model.zero_grad()
            reference.zero_grad()
    return worst


def _uneven(stage: int) -> float:
    """The largest difference to the mean of the ranks' gradients: in a first batch of two sizes, in a shape that is new to one
    rank, or to the other, or to both."""
    return _largest_difference(_layers(), _layers(), stage, [(4, 6), (4, 6), (4, 9), (5, 9), (7, 8), (4, 4)], 64)


@pytest.mark.parametrize("stage", [0, 3])
def test_batches_of_ranks_may_differ_in_size(stage: int) -> None:
    assert max(run(2, _uneven, stage)) < 1e-6


def _larger() -> tuple[list[bool], str]:
    """What holds of the plan for a batch that is larger than the first; and of one that is much larger what is said."""
    model = _layers()
    x = torch.randn(512, 64)
    with _quick():
        _compiled(model, 0, 10**9)(x).square().mean().backward()
        (first,) = (c.plan for c in engine_of(model).compilations if c.plan is not None)
        model = _layers()
        compiled = _compiled(model, 0, first.peak)
        for rows in (512, 512 + 16 * dist.get_rank()):
            compiled(torch.randn(rows, 64)).square().mean().backward()
        plans = [c.plan for c in engine_of(model).compilations if c.plan is not None]
        if dist.get_rank() == 0:
            return [len(plans) == 1], ""
        holds = [
            len(plans) == 2,
            len(plans[0].decision.recomputed) < len(plans[1].decision.recomputed),
            plans[0].collectives == plans[1].collectives != ((), ()),
            plans[1].peak <= plans[1].budget,
        ]
        try:
            compiled(torch.randn(5000, 64))  # a forward alone, in which stage 0 sends nothing
        except Exception as error:
            return holds, str(getattr(error, "inner_exception", error))
    return holds, "nothing was refused"


def test_a_rank_alone_chooses_what_is_saved_and_leaves_collectives_as_they_are() -> None:
    (first, _), (second, said) = run(2, _larger)
    assert all(first)
    assert all(second), second
    assert "on rank 1 with inputs of f32[5000,64]" in said
    assert "make the first batch the largest, pad batches to one size" in said


class _OneByOne(torch.nn.Module):
    """Layers that are compiled one by one: all have one graph, each of its own parameters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(Block(12) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            torch._dynamo.graph_break()
            x = layer(x)
        return x


def _one_by_one(stage: int) -> tuple[int, float]:
    """How many graphs were planned, and the largest difference to the mean of the ranks' gradients."""
    model = _OneByOne()
    worst = _largest_difference(model, _OneByOne(), stage, [(4, 4), (4, 4), (4, 6)], 3, 12)
    return len([c for c in engine_of(model).compilations if c.plan is not None]), worst


@pytest.mark.parametrize("stage", [0, 3])
def test_layers_that_are_alike_agree_each_on_their_own_collectives(stage: int) -> None:
    results = run(2, _one_by_one, stage)
    assert [count for count, _ in results] == [3, 6]
    assert max(worst for _, worst in results) < 1e-5


def _shares() -> tuple[list[int], str]:
    """A budget that is a share, where ranks have devices of unlike sizes; and what is said of one that the smallest has not."""
    mine = mock.patch.object(planning.devices, "capacity", return_value=(4 - dist.get_rank()) * 10**9)
    with mine, mock.patch.object(planning, "kind_of", return_value="cuda"):
        engine = Engine(stage=0, model="m")
        found = [planning.budget_bytes(share, engine, between_ranks.all_ranks()) for share in ("50%", "75%")]
        try:
            planning.budget_bytes(35 * 10**8, engine, between_ranks.all_ranks())
        except ConfigError as error:
            return found, str(error)
    return found, "nothing was said"


def test_a_budget_that_is_a_share_is_of_the_smallest_device() -> None:
    for found, said in run(2, _shares):
        assert found == [15 * 10**8, 225 * 10**7]
        assert "3.5 GB is more than the 3 GB of the device" in said


def _gathered(seconds: dict[bool, tuple[float, float]], again: tuple[float, float]) -> tuple[list[bool], bool | None]:
    """Ranks of one stage whose batches differ; the ways that were planned, and the one that is gone."""
    rank, ways = dist.get_rank(), []
    engine: Any = SimpleNamespace(
        stage=3,
        stages=SimpleNamespace(data=SimpleNamespace(size=2, ranks=(0, 1))),
        model="m",
        compilations=[],
        agreed_gather=None,
        keeps_for_call=False,
    )

    def plan() -> dict[int, Any]:
        way = engine.keeps_for_call
        ways.append(way)
        made = SimpleNamespace(seconds=seconds[way][rank], again_seconds=again[rank], held_bytes=0)
        engine.compilations.append(SimpleNamespace(plan=made))
        return {}

    with mock.patch.object(between_ranks, "WAIT", timedelta(seconds=20)):
        gathered(engine, None, plan)
        assert engine.agreed_gather is engine.keeps_for_call
        ways.append(engine.keeps_for_call)
        gathered(engine, None, plan)  # for a batch that is new to this rank, in the way that was agreed
    return ways, engine.agreed_gather


def test_ranks_of_a_stage_gather_as_often_as_the_first_finds_fastest() -> None:
    one, other = (2.0, 1.0), (1.0, 2.0)  # of rank 0 and of rank 1
    assert run(2, _gathered, {True: one, False: other}, (1.0, 0.0)) == [([True, False, False, False], False)] * 2
    assert run(2, _gathered, {True: one, False: other}, (0.0, 1.0)) == [([True, True, True], True)] * 2


def _alone() -> str:
    """What a rank says that compiles what the others do not."""
    model = _layers()
    compiled = _compiled(model, 0, 10**9)
    with _quick(), mock.patch.object(between_ranks, "WAIT", timedelta(seconds=2)):
        compiled(torch.randn(4, 64)).square().mean().backward()
        if dist.get_rank() == 0:
            return ""
        for layer in model:
            if isinstance(layer, torch.nn.GELU):
                layer.approximate = "tanh"
        try:
            compiled(torch.randn(4, 64))
        except Exception as error:
            return str(getattr(error, "inner_exception", error))
    return "nothing was said"


def test_who_waits_for_a_plan_in_vain_says_for_what() -> None:
    _, said = run(2, _alone)
    assert "rank 0 has made no plan in 0:00:02 for what rank 1 compiles, graph " in said
    assert "of Sequential of 12 parameters" in said
    assert "with inputs of f32[4,64]" in said


def test_collectives_start_in_the_agreed_order() -> None:
    """Gathers move to where they stand in another graph, earlier and later, but not behind where they are waited for."""
    graphs = []
    for distance in (0, 100):
        kinds = (BucketGathers, BucketReductions)
        passes = [replace(p, bucket_bytes=1) if isinstance(p, kinds) else p for p in build(Config())]
        own = PrefetchGathers(distance=distance)
        step = run_pipeline(toy_of("uneven"), [own if isinstance(p, PrefetchGathers) else p for p in passes])
        graphs.append(step.backward)
    orders = [collectives_of(graph) for graph in graphs]
    assert len(set(orders)) == len(orders)
    for order in (*orders, *reversed(orders)):
        for graph in graphs:
            keep_order(graph, order)
            graph.lint()
            assert collectives_of(graph) == order
    starts = [n for n in graphs[0].nodes if n.target in (gather_start, reduce_start)]
    names = list(collectives_of(graphs[0]))
    gather = next(n for n in starts if n.target is gather_start)
    names.append(names.pop(starts.index(gather)))
    keep_order(graphs[0], names)
    graphs[0].lint()
    assert gather < wait_of(gather)
