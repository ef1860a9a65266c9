"""Ranks that stop in the middle of a step: all others hear which one it was, and soon."""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import dspass
from dspass.engines import engine_of
from dspass.runtime import compat, stopped
from dspass.runtime.axis import Axis
from dspass.runtime.stopped import RankStopped
from tests.ranks import RankError, run
from tests.training import without_inductor, zero


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(6)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return F.mse_loss(x, torch.zeros_like(x))


def batch() -> torch.Tensor:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(0))


class Runs:
    """A model in ``stages`` whose stages are known, and whose groups wait for three seconds from now on."""

    def __init__(self, stages: int, stage: int = 0, trains: bool = True, fp16: bool = False) -> None:
        torch.manual_seed(0)
        section = {"stages": stages, "schedule": "1f1b", "micro_batches": 4, "gather": "micro_batch"}
        options = zero(stage, pipeline=section, fp16={"enabled": fp16})
        self.model = dspass.shard(Net(), options)
        self.compiled: Any = torch.compile(self.model, backend="deepspeed", options=options)
        self.trains = trains
        self()
        self.executor = self.model.__dict__["forward"].last.executor
        engine = engine_of(self.model)
        assert engine is not None
        assert engine.stages is not None
        pipe, data = engine.stages.pipe, engine.stages.data
        places = torch.arange(dist.get_world_size()).view(pipe.size, data.size)
        waits_shortly(pipe, places.t().tolist())
        waits_shortly(data, places.tolist())
        dist.barrier()  # groups are made by the store, which goes with the rank that serves it

    def __call__(self) -> None:
        with torch.set_grad_enabled(self.trains):
            loss = self.compiled(batch())
        if self.trains:
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)

    def before_second_micro_batch(self, what: Callable[[], Any]) -> None:
        """Have this rank do it in its stage's forward."""
        (stage,) = self.executor.stages.values()
        inner, calls = stage.run, iter(range(99))

        def run_or_stop(*args: Any) -> Any:
            if next(calls) == 1:
                what()
            return inner(*args)

        stage.run = run_or_stop


def waits_shortly(axis: Axis, places: list[list[int]]) -> None:
    group, _ = dist.new_subgroups_by_enumeration(places, timeout=timedelta(seconds=3))
    object.__setattr__(axis, "group", group)


def _raises() -> None:
    raise KeyError("no such row")


@without_inductor
def _stops(folder: str, how: str, who: int, stages: int, stays: bool = False, **more: Any) -> None:
    """Rank ``who`` stops, in the middle of a schedule or where it calls the function ``how``; what each other one is told, and
    after how many seconds, stands in a file. Its process ends then, as a program would, or with ``stays`` it does not, and
    others can but wait for their time-outs."""
    runs = Runs(stages, **more)
    rank = dist.get_rank()
    if how == TOGETHER:
        runs.trains = False  # other stages, to be compiled
    if rank == who and how.startswith("dspass."):
        mock.patch(how, side_effect=lambda *_: os._exit(3)).start()
    elif rank == who:
        runs.before_second_micro_batch(_raises if how == "raises" else functools.partial(os._exit, 3))
    begin = time.monotonic()
    try:
        runs()
        runs()  # the third call, whose times are exchanged
    except Exception as error:
        if not isinstance(error, KeyError):
            said = f"{type(error).__name__}: {error}\n{time.monotonic() - begin}"
            (Path(folder) / str(rank)).write_text(said)
        if not stays:
            os._exit(4)
        raise


def told(folder: Path, how: str, who: int, ranks: int, stages: int, **more: Any) -> list[str]:
    """What all other ranks raise where ``who`` stops, within their time-outs and a few seconds more."""
    with pytest.raises(RankError):
        run(ranks, _stops, str(folder), how, who, stages, moment=40, **more)
    others = [rank for rank in range(ranks) if rank != who]
    assert sorted(path.name for path in folder.iterdir()) == [str(rank) for rank in others]
    found = []
    for rank in others:
        text, seconds = (folder / str(rank)).read_text().rsplit("\n", 1)
        assert float(seconds) < 20
        assert text.startswith(f"RankStopped: rank {rank} could not ")
        found.append(text)
    return found


@pytest.mark.parametrize("more", [{}, {"stays": True}, {"trains": False}], ids=str)
def test_all_ranks_name_the_one_that_died(more: dict[str, Any], tmp_path: Path) -> None:
    first, second = told(tmp_path, "dies", 2, 3, 3, **more)
    waited_for = (
        "rank 1, stage 1 of the pipeline" if more.get("trains", True) else "exchange the loss with ranks [1, 2]"
    )
    assert f"{waited_for}: rank 2 has stopped" in first
    assert "rank 2, stage 2 of the pipeline: rank 2 has stopped" in second


@pytest.mark.parametrize("ranks", [3, 4])
def test_all_ranks_name_the_one_that_died_in_front_of_a_collective(ranks: int, tmp_path: Path) -> None:
    """It has the loss. Of four ranks not all get that from the one that has it."""
    for text in told(tmp_path, "dspass.pipelined.Pipelined._answers", ranks - 1, ranks, ranks):
        assert "could not exchange the loss with ranks [" in text
        assert f"]: rank {ranks - 1} has stopped" in text


TOGETHER = "dspass.stage_plans.together"


@pytest.mark.parametrize(
    ("function", "what"),
    [
        ("dspass.pipeline_outputs.LossScale.begin", "exchange the scale of the loss"),
        ("dspass.pipeline_times.gather", "exchange the times of a call"),
        ("dspass.clipping._over_stages", "exchange norms of gradients"),
        (TOGETHER, "hear whether stages were compiled"),
    ],
)
def test_what_it_did_not_come_to_is_named(function: str, what: str, tmp_path: Path) -> None:
    (text,) = told(tmp_path, function, 1, 2, 2, fp16="LossScale" in function)
    assert text.startswith(f"RankStopped: rank 0 could not {what} with ranks [1]: rank 1 has stopped")


@pytest.mark.parametrize("more", [{}, {"stays": True}], ids=str)
def test_all_ranks_hear_of_an_error_of_one(more: dict[str, Any], tmp_path: Path) -> None:
    for text in told(tmp_path, "raises", 2, 3, 3, **more):
        assert "rank 2 has stopped with an error of its own, which came first: KeyError: 'no such row'" in text


@pytest.mark.parametrize("more", [{}, {"stays": True}], ids=str)
def test_data_peers_name_the_one_that_died(more: dict[str, Any], tmp_path: Path) -> None:
    """Two stages, each on two ranks that divide its parameters."""
    peer, *others = told(tmp_path, "dies", 1, 4, 2, stage=3, **more)
    assert "could not exchange tensors with ranks [1] of the data axis: rank 1 has stopped" in peer
    for text in others:
        assert "rank 1 has stopped" in text


def test_without_a_store_each_names_whom_it_waited_for(tmp_path: Path) -> None:
    """Rank 0 serves it."""
    near, far = told(tmp_path, "dies", 0, 3, 3)
    assert "rank 0 has stopped" in near
    assert "rank 0 has stopped" in far or "rank 1 has stopped" in far


@without_inductor
def _is_called_less(trains: bool) -> str:
    runs = Runs(2, trains=trains)
    if dist.get_rank() == 1:
        time.sleep(5)
        return ""
    with pytest.raises(RankStopped) as caught:
        runs()
    dist.destroy_process_group()
    return str(caught.value)


@pytest.mark.parametrize("trains", [True, False])
def test_a_rank_that_is_called_less_is_named(trains: bool) -> None:
    said = run(2, _is_called_less, trains)[0]
    assert "rank 1, stage 1 of the pipeline: rank 1 has stopped, or was not called" in said


@pytest.mark.parametrize(
    ("words", "suspects", "first"),
    [
        ({}, [1], [1]),
        ({1: {"lost": [2]}}, [1], [2]),
        ({1: {"lost": [2]}, 2: {"lost": [3]}}, [1], [3]),
        ({1: {"lost": [2]}}, [1, 2, 3], [2]),
        ({1: {"lost": [2]}, 2: {"error": "is out"}}, [1], [2]),
        ({2: {"error": "is out"}}, [1, 2], [2]),
        ({1: {"lost": [0]}}, [1], [1]),
        ({1: {"lost": [2]}, 2: {"lost": [1]}}, [1], [1]),
        ({}, [1, 2], [1, 2]),
    ],
)
def test_words_lead_to_the_first(words: dict[int, Any], suspects: list[int], first: list[int]) -> None:
    store = dist.HashStore()
    for rank, said in words.items():
        store.set(f"dspass/stopped/{rank}", json.dumps(said))
    axis = Axis(name="pipe", group=None, size=4, rank=0, ranks=(0, 1, 2, 3), backend="none")  # type: ignore[arg-type]
    with (
        mock.patch.object(compat, "store", return_value=store),
        mock.patch.multiple(stopped, PATIENCE=0.05, STAYS=0.05),
    ):
        error = str(stopped.lost(axis, "do it", suspects))
    named = f"rank {first[0]}" if len(first) == 1 else f"one of ranks {first}"
    assert error.startswith(f"rank 0 could not do it: {named} has stopped")
    assert ("is out" in error) == any("error" in said for said in words.values())
    assert json.loads(store.get("dspass/stopped/0")) == {"lost": suspects}


def test_without_a_process_group_nothing_is_asked() -> None:
    axis = Axis(name="pipe", group=None, size=2, rank=0, ranks=(0, 1), backend="none")  # type: ignore[arg-type]
    assert "rank 1 has stopped" in str(stopped.lost(axis, "do it", [1]))
    stopped.tell(axis, ValueError())


def test_a_store_that_hangs_holds_nobody_up() -> None:
    store = mock.Mock()
    store.set.side_effect = lambda *_: time.sleep(60)
    axis = Axis(name="pipe", group=None, size=2, rank=0, ranks=(0, 1), backend="none")  # type: ignore[arg-type]
    begin = time.monotonic()
    with mock.patch.object(compat, "store", return_value=store), mock.patch.multiple(stopped, PATIENCE=0.1, STAYS=0.1):
        assert "rank 1 has stopped" in str(stopped.lost(axis, "do it", [1]))
    assert time.monotonic() - begin < 10
