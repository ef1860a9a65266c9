"""What happens around ``optimizer.step()``: gathered copies are dropped, gradients clipped, states fetched from the host and
sent back (:mod:`dspass.runtime.host_states`), a step's counters closed.

``torch.optim`` calls global hooks around every optimiser's step. They are the only place where a plain training loop says
that its parameters change.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from dspass import full_states
from dspass.clipping import clip_grad_norm_
from dspass.config import Config
from dspass.hosting import host_all
from dspass.owners import shard_states
from dspass.runtime import compat
from dspass.runtime.engine import Engine
from dspass.runtime.host_states import HostStates

_watched: weakref.WeakKeyDictionary[Engine, float] = weakref.WeakKeyDictionary()
_around: weakref.WeakKeyDictionary[torch.optim.Optimizer, _Around] = weakref.WeakKeyDictionary()
_registered: list[Any] = []


def watch(engine: Engine, config: Config) -> None:
    """Have ``engine`` told of the steps of optimisers that hold its parameters, and their states put where ``config`` says."""
    _watched[engine] = config.gradient_clipping
    host_all(engine, config)
    if not _registered:
        _registered.append(register_optimizer_step_pre_hook(_before))
        _registered.append(register_optimizer_step_post_hook(_after))
        compat.reduce_overflow_of_mixed_placements()


def _theirs(optimizer: torch.optim.Optimizer) -> list[tuple[Engine, float]]:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [
        (engine, clip)
        for engine, clip in _watched.items()
        if any(id(p) in held for p in (*(spec.param() for spec in engine.specs.values()), *engine.host_states))
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
    if _is_inside(optimizer):
        return
    for engine, clip in _theirs(optimizer):
        _refuse_unsharded(optimizer)
        if engine.stages is not None:
            full_states.follow(optimizer)
        shard_states(optimizer)
        if clip and not compat.in_state_initialisation():
            # Those without a gradient too: a pipeline stage that has none at all takes part in the norm of the others.
            clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
        engine.before_step()
    _fetch_states(optimizer, args, kwargs)


def _is_inside(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step of it calls another one: that of the class it is derived from, or of a part."""
    return optimizer in _around and _around[optimizer].states.is_stepping


def _fetch_states(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Where states wait on the host, have the step done part by part, when all other hooks have had their say."""
    if optimizer in _around:
        _around.pop(optimizer).undo()
    engines = [engine for engine, _ in _theirs(optimizer) if engine.host_states]
    if not engines:
        return
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError("LBFGS keeps one flat history of all parameters, which cannot wait on the host: " + _NO_OFFLOAD)
    if any(value is not None for value in (*args[1:], *kwargs.values())):
        raise ValueError(
            "optimizer.step(closure) computes gradients inside of the step, when states on the host have been stepped already: "
            "call closure().backward() before optimizer.step(), or " + _NO_OFFLOAD
        )
    states, *others = (engine.host_states for engine in engines)
    for engine, other in zip(engines[1:], others, strict=True):
        if other is not states:
            states.take(other)
            engine.host_states = states
    _around[optimizer] = _Around(states, optimizer)


class _Around:
    """The hooks of one step whose states are on the host. A step that is called inside of it goes past them."""

    def __init__(self, states: HostStates, optimizer: torch.optim.Optimizer) -> None:
        self.states, self.depth = states, 0
        self.undo = compat.around_step(optimizer, self._before, self._after)

    def _before(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self.depth += 1
        if self.depth == 1:
            self.states.step(optimizer)

    def _after(self, *_: Any) -> None:
        self.depth -= 1
        if self.depth == 0:
            self.states.end()


_NO_OFFLOAD = 'set zero_optimization.offload_optimizer.device to "none".'


def _after(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if _is_inside(optimizer) or compat.in_state_initialisation():  # which is no step of the training
        return
    for engine, _ in _theirs(optimizer):
        engine.after_step()
