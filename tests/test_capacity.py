"""Experts of a capacity."""
from __future__ import annotations
import functools
from typing import Any
import pytest
import torch
from tests import training
from tests.mixtures import GShard, Model, VOCABULARY
from tests.ranks import run
from dspass.engines import engine_of


def build(experts: int, top_k: int, form: str) -> Model:
    return Model(GShard(experts, top_k, form), GShard(experts, top_k, form))


def batch(draw: torch.Generator, rank: int, call: int) -> tuple[torch.Tensor]:
    return (torch.randint(0, VOCABULARY, (17,), generator=draw),)


def train(form: str, top_k: int, stage: int, size: int | None, steps: int = 4, how="compile", **more: Any) -> dict[str, Any]:
    config = training.zero(stage, expert_parallel={"enabled": True, **({"autoep_size": size} if size else {})}, **more)
    return training.train(functools.partial(build, 8, top_k, form), batch, config, steps=steps, how=how)

if __name__ == "__main__":
    import sys
    for f in sys.argv[2:]:
      for r in run(int(sys.argv[1]), train, f, 2, 3, None, timeout=100): print(f, {k:v for k,v in r.items() if k!='layouts'})
