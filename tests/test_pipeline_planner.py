"""The planner inside of pipelines: a budget holds on every rank, whatever a schedule has in flight, or all ranks refuse it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dspass
from dspass.config import Config
from dspass.engines import engine_of
from dspass.passes import devices
from dspass.passes.captured_cost import costs_of
from dspass.planner.record import BudgetError, Plan
from dspass.planner.schedule_times import Link, StageCost, simulate
from dspass.planner.schedules import choose
from dspass.planner.stages import cut
from dspass.runtime.axis import Axis
from dspass.runtime.engine import Engine
from dspass.runtime.schedule import Kind, ScheduleError
from dspass.runtime.stopped import RankStopped
from dspass.stage_plans import together
from dspass.staging import Staging, plan_stages, stage_costs
from tests.captured import capture
from tests.models import Block
from tests.ranks import run
from tests.training import zero


class Layers(nn.Module):
    """Blocks between an embedding and a head, whose saved values are most of a step's memory."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(61, 32), nn.Linear(32, 61, bias=False)
        self.blocks = nn.ModuleList([Block(32) for _ in range(2)])

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def _freeing(gm: torch.fx.GraphModule, *, is_backward: bool, is_inference: bool) -> Callable[[list[Any]], Any]:
    """Segments operator by operator, each value freed behind its last reader: the same for real steps and for dry runs."""

    def run_segment(args: list[Any]) -> Any:
        return torch.fx.Interpreter(gm).boxed_run(args)

    return run_segment


@contextlib.contextmanager
def _operators() -> Iterator[None]:
    with (
        mock.patch("dspass.compilation.segment_compiler", return_value=_freeing),
        mock.patch("dspass.planning.InductorSimulator", return_value=_freeing),
    ):
        yield


def _options(schedule: str, stage: int = 0, micro_batches: int = 4, stages: int = 2, **own: Any) -> dict[str, Any]:
    section = {"stages": stages, "schedule": schedule, "micro_batches": micro_batches, "loss_reduction": "mean"}
    return zero(stage, pipeline=section, dspass={"fallback_random": True, **own})


def _trained(options: dict[str, Any], watched: bool = True) -> tuple[int, list[float], list[Plan]]:
    """The peak of a rank in its third step, losses, and its plans."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Layers()
    dspass.shard(model, options)
    compiled: Any = torch.compile(model, backend="deepspeed", options=options)
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(0, 61, (8, 64), generator=torch.Generator().manual_seed(1))
    losses = []

    def step() -> None:
        loss = compiled(ids, ids)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):
        step()
    peak = 0
    if watched:
        with dspass.measure(model) as measurement:
            step()
        peak = measurement.peak_bytes + ids.nbytes  # the batch was there before
    engine = engine_of(model)
    assert engine is not None
    _kept.append(engine.keeps_for_call)
    return peak, losses, [c.plan for c in engine.compilations if c.plan is not None]


_kept: list[bool] = []
"""Of the models that were trained, whether what is gathered stays for a call."""


def _refusal(options: dict[str, Any]) -> BudgetError:
    with pytest.raises(BudgetError) as refused:
        _trained(options, watched=False)
    return refused.value


@_operators()
def _from_the_smallest(schedule: str) -> tuple[str, int, list[tuple[int, list[float], list[Plan]]]]:
    """What is said of a budget of nothing, the smallest that it names, and training with that, and with more than enough."""
    refused = _refusal(_options(schedule, memory_budget=1))
    budgets = (refused.smallest, 10**9)
    return str(refused), refused.smallest, [_trained(_options(schedule, memory_budget=b)) for b in budgets]


@pytest.mark.parametrize("schedule", ["1f1b", "zbvzerobubble"])
def test_the_smallest_budget_holds_on_every_rank(schedule: str) -> None:
    """Halves of backwards, and several stages on a rank, are counted as they run."""
    results = run(2, _from_the_smallest, schedule)
    assert len({(said, smallest) for said, smallest, _ in results}) == 1, "all ranks are told the same"
    said, smallest, _ = results[0]
    assert "dspass.memory_budget of 1 B is too small" in said
    assert f"of {2 if schedule == '1f1b' else 4}, {schedule} of 4 micro-batches" in said
    assert "more stages" in said
    for _, _, (small, large) in results:
        assert small[1] == large[1], "a plan changes no number"
        for peak, _, plans in (small, large):
            # Of several stages on a rank the last that was planned speaks for all.
            assert peak <= plans[-1].peak * 1.01
            assert peak >= plans[-1].peak * 0.9  # one message each way is counted that may have gone
        assert small[2][-1].peak <= smallest
    assert max(small[0] for _, _, (small, _) in results) < max(large[0] for _, _, (_, large) in results)


@_operators()
def _on_two_axes(folder: str) -> list[tuple[int, list[float], list[Plan]]]:
    """Without a budget, with one, and with the plans of that alone."""
    path = f"{folder}/plan.json"
    unplanned = _trained(_options("zbh1", 3), watched=False)
    planned = _trained(_options("zbh1", 3, memory_budget=1_150_000, plan=path), watched=False)
    dist.barrier()
    with mock.patch("dspass.planning.Planner.plan", side_effect=AssertionError("the file has plans")):
        return [unplanned, planned, _trained(_options("zbh1", 3, plan=path), watched=False)]


def test_each_stage_has_a_plan_for_its_data_axis(tmp_path: Path) -> None:
    results = run(4, _on_two_axes, str(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.stage0.json", "plan.stage1.json"]
    for unplanned, planned, again in results:
        assert unplanned[1] == pytest.approx(planned[1], rel=1e-6)
        assert planned[1] == again[1]
        assert planned[2] == again[2]
    decisions = [planned[2][0].decision for _, planned, _ in results]
    assert decisions[0] == decisions[1] != decisions[2] == decisions[3]


@_operators()
def _gathers(in_few_bits: bool) -> tuple[int, list[tuple[bool, int, list[float], list[Plan]]]]:
    def options(budget: int) -> dict[str, Any]:
        made = _options("1f1b", 3, stages=1, memory_budget=budget)
        made["zero_optimization"]["zero_quantized_weights"] = in_few_bits
        return made

    smallest = _refusal(options(1)).smallest
    found = []
    for budget in (10**9, smallest):
        trained = _trained(options(budget))
        found.append((_kept[-1], *trained))
    return smallest, found


@pytest.mark.parametrize("in_few_bits", [False, True])
def test_parameters_stay_for_a_call_where_that_fits_and_costs_nothing(in_few_bits: bool) -> None:
    for smallest, (large, small) in run(2, _gathers, in_few_bits):
        assert (large[0], small[0]) == (True, False)
        assert large[2] == pytest.approx(small[2], rel=1e-6)
        for _, peak, _, plans in (large, small):
            assert 0.9 * plans[-1].peak <= peak <= 1.01 * plans[-1].peak
        assert small[3][-1].peak <= smallest < large[3][-1].peak


def _one_fails() -> str:
    group = dist.group.WORLD
    assert group is not None

    def compiles() -> dict[int, Any]:
        if dist.get_rank() == 1:
            raise ValueError("no such kernel")
        return {}

    with pytest.raises((RankStopped, ValueError)) as failed:
        together(Axis.of("pipe", group), compiles)
    return f"{type(failed.value).__name__}: {failed.value}"


def test_all_ranks_hear_of_a_stage_that_cannot_be_compiled() -> None:
    first, second = run(2, _one_fails)
    assert first.startswith("RankStopped: rank 1 of the pipeline could not compile")
    assert "no such kernel" in first
    assert second == "ValueError: no such kernel"


# -- schedules under a budget ----------------------------------------------------------------------------------


def _stages(rank_of: tuple[int, ...], count: int, less: float = 1.0) -> tuple[list[StageCost], list[Link]]:
    """With a part ``less`` of what can be saved; the first quarter costs little to compute again."""
    stages = len(rank_of)
    work, saved = 24 / stages / count, 2400 // stages // count
    kept = int(less * saved)
    more = work * (0.04 * (1 - less) if less >= 0.75 else 1 - less)
    one = StageCost(
        work, 2 * work + more, work + more, work,
        saved_bytes=kept, held_bytes=saved, working_bytes=saved - kept, static_bytes=100,
    )  # fmt: skip
    return [one] * stages, [Link()] * (stages - 1)


@given(st.lists(st.integers(1, 4000), min_size=2, max_size=6))
@settings(max_examples=30, deadline=None)
def test_what_does_not_fit_is_computed_again_and_more_memory_is_never_slower(budgets: list[int]) -> None:
    def seconds(budget: int) -> float:
        choose_within = functools.partial(
            choose, 2, _stages, batch=8, again=[functools.partial(_stages, less=less) for less in (0.75, 0.0)]
        )
        try:
            choice = choose_within(budget_bytes=budget)
        except ScheduleError as error:
            smallest = error.smallest or 0
            return float("inf") if smallest > budget else 0.0
        assert max(choice.timeline.peak_bytes) <= budget
        return choice.timeline.seconds

    found = [seconds(budget) for budget in sorted(budgets)]
    assert all(more <= less * (1 + 1e-6) for less, more in pairwise(found))


def test_a_rank_computes_again_what_is_too_much() -> None:
    whole = choose(2, _stages, batch=8, micro_batches=8, names=["1f1b"])
    most = max(whole.timeline.peak_bytes)
    with pytest.raises(ScheduleError):
        choose(2, _stages, batch=8, micro_batches=8, names=["1f1b"], budget_bytes=most - 1)
    less = choose(
        2, _stages, batch=8, micro_batches=8, names=["1f1b"],
        budget_bytes=most - 1, again=[lambda s, m: _stages(s, m, less=0.0)],
    )  # fmt: skip
    assert max(less.timeline.peak_bytes) < most
    assert less.timeline.seconds > whole.timeline.seconds


def test_what_costs_little_is_computed_again_first() -> None:
    whole = choose(2, _stages, batch=8, micro_batches=8, names=["1f1b"]).timeline
    in_flight = 2 * 2400 // 2 // 8
    budget = max(whole.peak_bytes) - in_flight // 16
    points = [functools.partial(_stages, less=less) for less in (0.75, 0.0)]
    found = [
        choose(2, _stages, batch=8, micro_batches=8, names=["1f1b"], budget_bytes=budget, again=again).timeline.seconds
        for again in (points[1:], points)
    ]
    assert found[1] - whole.seconds < (found[0] - whole.seconds) / 4


# -- stages on their ranks -------------------------------------------------------------------------------------


class Chain(nn.Module):
    """Products, each as wide as it is said, behind an embedding."""

    def __init__(self, widths: Sequence[int], vocabulary: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, widths[0])
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in pairwise(widths))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = nn.functional.gelu(layer(x))
        return x.sum()


def _captured(model: nn.Module) -> tuple[torch.fx.GraphModule, Engine]:
    return capture(model.train(), [torch.arange(64).view(1, 64) % 8])


def _planned(
    captured: tuple[torch.fx.GraphModule, Engine],
    schedule: str,
    budget: int | None = None,
    on: devices.Device = devices.CPU,
    **more: Any,
) -> Staging:
    """Stages on two ranks."""
    gm, engine = captured
    own = {"stages": 2, "schedule": schedule, "micro_batches": 4, "loss_reduction": "mean", **more}
    pipe = Axis(name="pipe", group=cast(Any, None), size=2, rank=0, ranks=(0, 1), backend="fake")
    with mock.patch("dspass.staging.devices.tabled", return_value=on):
        return plan_stages(gm, Config.load({"pipeline": own}), engine, pipe, 4, 4, True, budget)


@pytest.mark.parametrize("share", [1.0, 0.8, 0.4])
def test_a_first_stage_computes_again_with_its_weight_gradients(share: float) -> None:
    """Its inputs have no gradient: the first half of its backward takes no time, and frees nothing."""
    model = Chain([64] * 9)
    captured = _captured(model)
    free = _planned(captured, "zbh1", boundaries=["layers.6"])
    assert free.predicted is not None
    fixed, most = free.costs[0].static_bytes, free.predicted.peak_bytes[0]
    found = _planned(captured, "zbh1", int(fixed + share * (most - fixed)), boundaries=["layers.6"])
    first, last = found.costs
    assert (first.input, first.weight) == (0.0, first.backward)
    assert first.held_bytes == first.saved_bytes + found.links[0].backward_bytes
    assert 0 < last.input < last.backward
    assert found.predicted is not None
    spans = {(s.action.stage, s.action.kind): s.end - s.start for row in found.predicted.spans for s in row}
    assert spans[0, Kind.INPUT] == 0.0
    assert (found.costs[0].backward > free.costs[0].backward) == (share < 1), "what does not fit is computed again"


def test_a_link_within_a_rank_costs_nothing() -> None:
    """Where a V turns both stages lie on one rank: the cut between them may be wide, and what lies on both sides is even."""
    narrow, wide = 8, 256
    model = Chain([narrow, *[wide] * 3, narrow, *[wide] * 3, narrow, *[wide] * 9, narrow, *[wide] * 5, narrow])
    on = replace(devices.CPU, link=1e8, latency=0.0, overlaps=False)
    captured = _captured(model)
    found = _planned(captured, "zbvzerobubble", on=on)
    assert found.schedule.rank_of == (0, 1, 1, 0)
    assert found.links[1].forward_bytes == wide / narrow * found.links[0].forward_bytes
    assert found.predicted is not None
    gm, _ = captured
    apart = stage_costs(cut(gm, 4, costs_of(gm, on), on, micro_batches=4), on, 1.0, 1)
    assert found.predicted.seconds < 0.95 * simulate(found.schedule, *apart, overlaps=False).seconds


def test_stages_of_a_rank_have_its_memory_together() -> None:
    """A large embedding leaves its rank little for the other stage, and is more than an even share."""
    model = Chain([64] * 17, vocabulary=2048)
    captured = _captured(model)

    def first_rank(staging: Staging) -> int:
        """Bytes with one micro-batch."""
        return sum(c.static_bytes + c.saved_bytes for c in (staging.costs[0], staging.costs[-1]))

    budget = int(4 * model.embed.weight.nbytes * 1.1)
    assert first_rank(_planned(captured, "zbvzerobubble")) > budget
    found = _planned(captured, "zbvzerobubble", budget)
    assert first_rank(found) <= budget
    assert found.costs[0].static_bytes > budget / 2
