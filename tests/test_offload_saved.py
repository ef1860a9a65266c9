"""Saved values on the host: the planner's choice, the same numbers, less memory on the device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import dspass
from dspass.planner.record import BudgetError
from dspass.runtime.host import empty_on_host, extent, offload_start, offload_wait, reload_start, reload_wait
from examples.gpt import GPT, GPTConfig
from tests.ranks import run
from tests.test_explain import MODELS
from tests.training import without_inductor

SMALL: dict[str, Any] = {"name": "offload_saved", "min_bytes": 1000, "bucket_bytes": 100_000}


def _options(stage: int, budget: int | None, offload: bool | None) -> dict[str, Any]:
    own: dict[str, Any] = {"bucket_bytes": 400_000, "passes": ["...", SMALL, "onednn_products"]}
    if budget is not None:
        own["memory_budget"] = budget
    return {"zero_optimization": {"stage": stage}, "compile": {"offload_activation": offload}, "dspass": own}


def _train(name: str, stage: int, budget: int | None, offload: bool | None) -> tuple[int, list[float], dspass.Report]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, args, kwargs = MODELS[name]()
    compiled = torch.compile(model, backend="deepspeed", options=_options(stage, budget, offload))
    optimizer = torch.optim.AdamW(compiled.parameters())
    losses = []

    def step() -> None:
        answer = compiled(*args, **kwargs)
        loss = answer if isinstance(answer, torch.Tensor) else answer.loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    for _ in range(2):
        step()
    with dspass.measure(model):
        step()
    report = dspass.explain(model)
    return report.memory.peak_bytes, losses, report


@functools.cache
def _smallest(name: str, stage: int) -> int:
    """The least budget that works with everything on the device."""
    with pytest.raises(Exception) as refused:
        _train(name, stage, 1000, False)
    inner = getattr(refused.value, "inner_exception", refused.value)
    assert isinstance(inner, BudgetError)
    return inner.smallest


def _below_the_smallest(name: str, stage: int) -> tuple[int, int, list[float], list[float], list[str]]:
    _, wanted, _ = _train(name, stage, None, False)
    budget = _smallest(name, stage) * 98 // 100
    peak, losses, report = _train(name, stage, budget, True)
    (plan,) = report.plans
    return budget, peak, losses, wanted, [t.held_by for t in plan.classes if t.held_bytes] + [plan.summary]


def test_a_budget_below_what_the_device_alone_can_holds_with_the_host() -> None:
    budget, peak, losses, wanted, said = _below_the_smallest("llama", 0)
    assert peak <= budget * 1.01
    assert losses == wanted
    assert set(said[:-1]) == {"offload_saved"}
    assert "by offload_saved" in said[-1]


def test_two_ranks_at_stage_3_use_the_host_too() -> None:
    for budget, peak, losses, wanted, said in run(2, _below_the_smallest, "gpt", 3):
        assert peak <= budget * 1.01
        assert losses == wanted
        assert "by offload_saved" in said[-1]


def test_without_a_budget_all_is_offloaded_where_a_person_says_so() -> None:
    plain, wanted, _ = _train("gpt", 0, None, None)
    peak, losses, report = _train("gpt", 0, None, True)
    assert losses == wanted
    assert peak < plain
    said = [p.summary for p in report.passes if p.name == "offload_saved"]
    assert len(said) == 2
    assert all("copies" in line for line in said)
    there, back = report.host_copies
    assert (there.kind, back.kind) == ("offload", "reload")
    assert there.bytes == back.bytes > plain - peak
    assert there.exposed_seconds is back.exposed_seconds is None  # not measured


def test_a_cpu_offloads_nothing_of_its_own_accord() -> None:
    """Its host memory is its own: a budget would be met on paper only."""
    _, _, report = _train("gpt", 0, _smallest("gpt", 0), None)
    assert all(not t.held_bytes for t in report.plans[0].classes)


class Checkpointed(nn.Module):
    """Blocks each of which is a checkpoint: what lies between two is saved, and nothing else is."""

    def __init__(self, between: Callable[[torch.Tensor], torch.Tensor] = lambda x: x) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(6))
        self.between = between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = self.between(checkpoint(block, x, use_reentrant=False))
        return x.square().mean()


def _smallest_of(model: nn.Module, offload: bool, format: str | None = None) -> int:
    torch._dynamo.reset()
    small: list[Any] = [
        "...", SMALL, {"name": "quantise_saved", "format": format, "min_bytes": 1000}, "onednn_products"
    ]  # fmt: skip
    own = {"memory_budget": 1000, "passes": small}
    config = {"zero_optimization": {"stage": 0}, "compile": {"offload_activation": offload}, "dspass": own}
    with pytest.raises(Exception, match="too small") as refused:
        torch.compile(model, backend="deepspeed", options=config)(torch.randn(1024, 64))
    return refused.value.inner_exception.smallest


def test_what_lies_between_checkpoints_waits_on_the_host() -> None:
    """It has to be saved, and may be in any way; what a person wants saved in any that brings it back as it was."""
    between, value = [], 1024 * 64 * 4
    for offload, format in ((False, None), (True, None), (False, "int8")):
        between.append(_smallest_of(Checkpointed(), offload, format))
    assert between[1] < between[0] - 3 * value
    assert between[2] < between[0] - 2 * value
    kept = [_smallest_of(Checkpointed(lambda x: dspass.keep(x.sin())), *ways) for ways in ((False, None), (True, None))]
    assert kept[1] < kept[0] - 3 * value


def test_a_gpu_offloads_where_it_pays() -> None:
    """With room for all nothing is copied; what fits without copies fits with them, and copies that compute hides are faster
    than computing again."""
    with torch.device("meta"):
        model = GPT(GPTConfig(context=1024, layers=2, heads=8, width=2048))
    tokens = torch.zeros(8, 1024, dtype=torch.long)

    def plan(budget: int, offload: bool | None = None) -> Any:
        config = {"zero_optimization": {"stage": 3}, "compile": {"offload_activation": offload}}
        report = dspass.explain(model, tokens, tokens, config=config, world_size=2, device="h100", memory_budget=budget)
        return report.plans[0]

    assert all(not t.held_bytes for t in plan(8 * 10**10).classes)
    with pytest.raises(BudgetError) as refused:
        plan(1000, offload=False)
    smallest = refused.value.smallest
    assert plan(smallest).peak_bytes <= smallest
    more = smallest * 11 // 10
    alone, helped = plan(more, offload=False), plan(more)
    assert sum(t.held_bytes for t in helped.classes) > 0
    assert helped.peak_bytes <= more
    assert helped.frontier[helped.here].seconds < alone.frontier[alone.here].seconds
    assert "held by offload_saved" in str(helped.largest)
    assert all(c.reason for c in helped.classes)
    product = next(c for c in helped.classes if c.name == "addmm")
    assert "would be computed again in" in product.reason
    assert any(t.dropped_bytes and "or held by offload_saved in up to" in t.reason for t in helped.largest)
    assert not any("or held" in t.reason for t in alone.largest)


@pytest.mark.parametrize(
    "value",
    [
        torch.randn(3, 4),
        torch.randn(4, 3).t(),
        torch.randn(2, 5, 3).permute(2, 0, 1),
        torch.arange(7),
        torch.randn(()),
        torch.randn(0, 3),
        torch.rand(5, 5).bool(),
        torch.randn(6, dtype=torch.complex64),
        torch.randn(8, dtype=torch.bfloat16),
    ],
    ids=lambda v: f"{v.dtype}{list(v.shape)}",
)
def test_a_value_comes_back_as_it_went(value: torch.Tensor) -> None:
    (host,) = offload_wait(offload_start([value]))
    assert host.data_ptr() != value.data_ptr() or not value.numel()
    (back,) = reload_wait(reload_start([host], "cpu"))
    assert (back.dtype, back.shape, back.stride()) == (value.dtype, value.shape, value.stride())
    assert torch.equal(back, value)


def test_host_memory_is_used_again_and_is_not_the_allocator_s() -> None:
    value = torch.randn(1000, 1000)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as watched:
        host = empty_on_host(value)
        first = host.data_ptr()
        del host
        assert empty_on_host(value).data_ptr() == first
    assert extent(value) == 4_000_000
    assert all(abs(event.self_cpu_memory_usage) < 4_000_000 for event in watched.key_averages())


class Outputs(nn.Module):
    """Saved values that are also outputs, are views, or are read again after everything else."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first = self.one(x).sin()
        second = nn.functional.dropout(self.two(first), 0.5).cos()
        view = second.view(-1, 8, 8).transpose(1, 2)
        return first, (self.three(view.reshape(-1, 64) * first).exp() * second).sum()


@without_inductor
def _of_outputs() -> tuple[list[float], list[float]]:
    def losses(options: dict[str, Any]) -> list[float]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Outputs()
        compiled = torch.compile(model, backend="deepspeed", options=options)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        found = []
        for _ in range(3):
            torch.manual_seed(3)
            first, loss = compiled(torch.linspace(-1, 1, 256 * 64).view(256, 64))
            (loss + first.square().sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    return losses(_options(0, None, True)), losses({})


def test_outputs_views_and_random_numbers() -> None:
    """Operator by operator: Inductor may sum in another order where a copy divides what it would fuse."""
    offloaded, plain = _of_outputs()
    assert offloaded == plain
