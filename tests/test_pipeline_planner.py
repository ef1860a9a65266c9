"""The planner inside of pipelines: a budget holds on every rank, whatever the schedule has in flight, or all ranks refuse it."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

import dspass
from dspass.engines import engine_of
from dspass.lowering.simulate import GraphSimulator
from tests.models import Block
from tests.training import without_inductor, zero


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


def _options(schedule: str, budget: int | None, stage: int = 0, micro_batches: int = 4, **more: Any) -> dict[str, Any]:
    own = {} if budget is None else {"memory_budget": budget}
    section = {"stages": 2, "schedule": schedule, "micro_batches": micro_batches, "loss_reduction": "mean"}
    return zero(stage, pipeline=section, dspass={"fallback_random": True, **own}, **more)


def _measured(options: dict[str, Any]) -> tuple[int, list[float], list[int], list[int]]:
    """The peak of a rank in its third step, losses, and of each plan its peak and what it saves."""
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
    with dspass.measure(model) as measurement:
        step()
    engine = engine_of(model)
    assert engine is not None
    plans = [c.plan for c in engine.compilations if c.plan is not None]
    return measurement.peak_bytes, losses, [p.peak for p in plans], [p.saved_bytes for p in plans]


@without_inductor
def _budgets(schedule: str, shares: list[float], **more: Any) -> list[Any]:
    # Where operators run one by one, so do those of dry runs.
    with mock.patch("dspass.planning.InductorSimulator", return_value=GraphSimulator()):
        free = _measured(_options(schedule, None, **more))
        peaks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(peaks, free[0])
        return [free, *(_measured(_options(schedule, round(share * max(peaks)), **more)) for share in shares)]
