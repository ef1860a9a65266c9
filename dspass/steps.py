"""What happens around ``optimizer.step()``: gathered copies are dropped, gradients clipped, a step's counters closed.

``torch.optim`` calls global hooks around every optimiser's step. They are the only place where a plain training loop says
that its parameters change.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from dspass.config import Config
from dspass.owners import shard_states
from dspass.runtime import compat
from dspass.runtime.engine import Engine

_watched: weakref.WeakKeyDictionary[Engine, float] = weakref.WeakKeyDictionary()
_registered: list[Any] = []


def watch(engine: Engine, config: Config) -> None:
    """Have ``engine`` told of the steps of optimisers that hold its parameters."""
    _watched[engine] = config.gradient_clipping
    if not _registered:
        _registered.append(register_optimizer_step_pre_hook(_before))
        _registered.append(register_optimizer_step_post_hook(_after))
        compat.reduce_overflow_of_mixed_placements()


def _theirs(optimizer: torch.optim.Optimizer) -> list[tuple[Engine, float]]:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [
        (engine, clip)
        for engine, clip in _watched.items()
        if any(id(spec.param()) in held for spec in engine.specs.values())
    ]


#: What torch 2.13's DTensor cannot divide over ranks (FSDP2 has the same limits), and what to use in its place.
_UNSHARDED = {
    torch.optim.LBFGS: "its history is one flat vector of all parameters; use AdamW, or SGD with momentum",
    torch.optim.Rprop: "it selects elements by a mask; use AdamW, or SGD with momentum",
    torch.optim.Adafactor: "its column means would be partial sums on each rank; use AdamW, whose state is divided anyway",
}


def _refuse_unsharded(optimizer: torch.optim.Optimizer) -> None:
    """Raise ``TypeError`` before a step that would fail half-way, somewhere inside of DTensor."""
    reason = next((why for kind, why in _UNSHARDED.items() if isinstance(optimizer, kind)), None)
    if isinstance(optimizer, torch.optim.SGD) and any(group.get("fused") for group in optimizer.param_groups):
        reason = "its fused kernel is unknown to DTensor; use foreach=True (Adam, AdamW and Adagrad may be fused)"
    held = (p for group in optimizer.param_groups for p in group["params"])
    if reason is not None and any(isinstance(p, DTensor) and p.device_mesh.size() > 1 for p in held):
        raise TypeError(f"{type(optimizer).__name__} has no sharded form in torch {torch.__version__}: {reason}.")


def _before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for engine, clip in _theirs(optimizer):
        _refuse_unsharded(optimizer)
        shard_states(optimizer)
        if clip:
            params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            torch.nn.utils.clip_grad_norm_(params, clip)
        engine.before_step()


def _after(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for engine, _ in _theirs(optimizer):
        engine.after_step()
