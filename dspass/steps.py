"""What happens around ``optimizer.step()``: gathered copies are dropped, gradients clipped, a step's counters closed.

``torch.optim`` calls global hooks around every optimiser's step. They are the only place where a plain training loop says
that its parameters change.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from dspass.config import Config
from dspass.runtime.engine import Engine

_watched: weakref.WeakKeyDictionary[Engine, float] = weakref.WeakKeyDictionary()
_registered: list[Any] = []


def watch(engine: Engine, config: Config) -> None:
    """Have ``engine`` told of the steps of optimisers that hold its parameters."""
    _watched[engine] = config.gradient_clipping
    if not _registered:
        _registered.append(register_optimizer_step_pre_hook(_before))
        _registered.append(register_optimizer_step_post_hook(_after))


def _theirs(optimizer: torch.optim.Optimizer) -> list[tuple[Engine, float]]:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [
        (engine, clip)
        for engine, clip in _watched.items()
        if any(id(spec.param()) in held for spec in engine.specs.values())
    ]


def _before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for engine, clip in _theirs(optimizer):
        if clip:
            params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            torch.nn.utils.clip_grad_norm_(params, clip)
        engine.before_step()


def _after(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for engine, _ in _theirs(optimizer):
        engine.after_step()
