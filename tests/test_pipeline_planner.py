"""The planner inside of pipelines: a budget holds on every rank, whatever the schedule has in flight, or all ranks refuse it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

import dspass
from dspass.engines import engine_of
from dspass.planner.record import BudgetError
from tests.ranks import run
from tests.test_pipeline import SUBJECTS
from tests.training import call, sgd, without_inductor, zero


def _gpt2() -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": 4, "n_embd": 64, "n_head": 2, "n_positions": 64, "vocab_size": 211}
    drops = dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(**sizes, **drops, use_cache=False))


def _options(schedule: str, budget: int | None, stage: int = 0, micro_batches: int = 4, **more: Any) -> dict[str, Any]:
    own = {} if budget is None else {"memory_budget": budget}
    section = {"stages": 2, "schedule": schedule, "micro_batches": micro_batches}
    return zero(stage, pipeline=section, dspass={"fallback_random": True, **own}, **more)


def _measured(options: dict[str, Any]) -> tuple[int, list[float], list[int], list[int]]:
    """The peak of a rank in its third step, losses, and of each plan its peak and what it saves."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = _gpt2()
    dspass.shard(model, options)
    compiled: Any = torch.compile(model, backend="deepspeed", options=options)
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(0, 211, (8, 64), generator=torch.Generator().manual_seed(1))
    losses = []

    def step() -> None:
        loss = call(compiled, {"input_ids": ids, "labels": ids})
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):
        step()
    with dspass.measure(model) as measurement:
        step()
    engine = engine_of(model)
    assert engine is not None
    plans = [c.plan for c in engine.compilations if c.plan is not None]
    return measurement.peak_bytes, losses, [p.peak for p in plans], [p.saved_bytes for p in plans]


@without_inductor
def _budgets(schedule: str, shares: list[float], **more: Any) -> list[Any]:
    free = _measured(_options(schedule, None, **more))
    peaks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(peaks, free[0])
    return [free, *(_measured(_options(schedule, round(share * max(peaks)), **more)) for share in shares)]
