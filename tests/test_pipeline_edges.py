"""Pipelines where something goes wrong, or is unusual: ranks that stop, models with little to train, calls that are not a
training step's."""

from __future__ import annotations

import os
import tempfile
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import dspass
from dspass.runtime.pipeline import PipelineError
from tests.ranks import RankError, run
from tests.training import without_inductor, zero


def _pipeline(stages: int, micro_batches: int = 4, **more: Any) -> dict[str, Any]:
    section = {"stages": stages, "schedule": "1f1b", "micro_batches": micro_batches, **more}
    return zero(0, pipeline=section)


class Chain(nn.Module):
    """Its stages are as many as asked for."""

    def __init__(self, width: int = 8, depth: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(depth)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.square().mean()


# -- ranks that stop -----------------------------------------------------------------------------------------------


def _wait_at_most(seconds: float) -> None:
    """From here on ranks wait so long for each other, whatever the group."""
    for group in [None, *dist.distributed_c10d._world.pg_map]:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


@without_inductor
def _stops(how: str) -> None:
    """Raises what a rank finds when rank 1 stops. That one answers."""
    model: Any = dspass.shard(Chain(), _pipeline(dist.get_world_size()))
    compiled = torch.compile(model, backend="deepspeed", options=_pipeline(dist.get_world_size()))
    compiled(torch.randn(8, 8)).backward()
    _wait_at_most(3)
    if dist.get_rank() == 1:
        if how == "raises":
            raise ValueError("a bad file")
        if how == "called less":
            time.sleep(8)  # busy with something else, and alive
            return
        stage = model.forward.last.executor.stages[1]
        inner, calls = stage.run, iter(range(9))

        def run_or_die(*args: Any) -> Any:
            if next(calls) == 1:
                os._exit(3)
            return inner(*args)

        stage.run = run_or_die
    begin = time.monotonic()
    try:
        compiled(torch.randn(8, 8)).backward()
    except PipelineError as error:
        raise AssertionError(f"after {time.monotonic() - begin:.0f} s: {error}") from error


@pytest.mark.parametrize("how", ["raises", "called less", "dies"])
def test_a_rank_that_stops_ends_the_others_by_name(how: str) -> None:
    with pytest.raises(RankError, match=r"after [0-7] s: rank 1, stage 1 of the pipeline") as caught:
        run(2, _stops, how)
    print(caught.value)
