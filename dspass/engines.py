"""Which engine belongs to which model, ``dspass.no_sync`` and ``dspass.resume_at``.

The table is weak: an engine lives as long as its model. It is the one place where a module leads to what was made for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import weakref
from collections.abc import Iterator

from torch import nn

from dspass.config import Config
from dspass.owners import unwrap
from dspass.runtime.axis import StageMesh
from dspass.runtime.engine import Engine

_engines: weakref.WeakKeyDictionary[nn.Module, Engine] = weakref.WeakKeyDictionary()
_no_sync: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
_steps: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
_staged: weakref.WeakKeyDictionary[Engine, int] = weakref.WeakKeyDictionary()
_numbers = itertools.count()


def engine_of(model: nn.Module) -> Engine | None:
    """The engine of a model that was sharded or run, else None."""
    return _engines.get(unwrap(model))


def new_engine(root: nn.Module | None, config: Config) -> Engine:
    """The engine of ``root``, made now if there is none. Without a root (a compiled function) it belongs to nobody."""
    if root is not None and root in _engines:
        return _engines[root]
    engine = Engine(stage=config.engine_stage, accumulation_steps=config.gradient_accumulation_steps, config=config)
    if root is not None:
        engine.model = _described(root)
        adopt(root, engine)
    return engine


def _described(root: nn.Module) -> str:
    """A model's type and size, and a hash of its parameters' names and shapes: equal for equal models in other runs."""
    shapes = [(name, tuple(p.shape)) for name, p in root.named_parameters()]
    elements = sum(p.numel() for p in root.parameters())
    known = hashlib.sha256(repr(shapes).encode()).hexdigest()[:8]
    return f"{type(root).__name__} of {len(shapes)} parameters, {elements} elements ({known})"


def adopt(root: nn.Module, engine: Engine) -> None:
    """Let ``engine`` be that of ``root``."""
    _engines[root] = engine
    engine.root = weakref.ref(root)
    engine.no_sync_depth = _no_sync.get(root, 0)
    engine.steps = _steps.get(root, engine.steps)


def join(engine: Engine, stages: StageMesh) -> None:
    """Let ``engine`` be that of a model whose pipeline stages lie on ``stages``."""
    engine.stages = stages
    _staged[engine] = next(_numbers)


def staged_engines() -> list[Engine]:
    """The engines of all live models that are divided into pipeline stages, in the order in which they were."""
    return sorted(_staged, key=_staged.__getitem__)


@contextlib.contextmanager
def no_sync(model: nn.Module) -> Iterator[None]:
    """Inside, backwards of ``model`` add up on each rank; the first one outside reduces the sum, as under DDP's.

    It replaces the counting of ``gradient_accumulation_steps`` for the step at hand. Stages 2 and 3 hold no whole gradients
    between calls, so there each backward is reduced all the same: the numbers are right and nothing is saved. May be entered
    before the first forward, when there is no engine yet.
    """
    root = unwrap(model)
    _shift(root, 1)
    try:
        yield
    finally:
        _shift(root, -1)


def resume_at(model: nn.Module, step: int) -> None:
    """Count the optimiser steps of ``model`` on from ``step``, those that earlier processes have taken.

    What goes by the step goes on there: the bits of quantisation-aware training. May be called before the first forward, and
    on every rank with the same number. Raises ``ValueError`` for a negative one.
    """
    if step < 0:
        raise ValueError(f"step={step} is no number of steps: give those taken so far, 0 or more.")
    root = unwrap(model)
    _steps[root] = step
    if root in _engines:
        _engines[root].steps = step


def _shift(root: nn.Module, by: int) -> None:
    _no_sync[root] = _no_sync.get(root, 0) + by
    engine = _engines.get(root)
    if engine is not None:
        engine.no_sync_depth = _no_sync[root]
