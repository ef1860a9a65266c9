"""Whose optimiser states wait on the host, when a configuration says so without a budget; with one the planner decides."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from dspass.config import Config
from dspass.optimizers import Optimizers
from dspass.runtime.engine import Engine
from dspass.runtime.host import is_on_host
from dspass.runtime.host_states import LEAST_BYTES, local_bytes, local_of


def host_all(engine: Engine, config: Config) -> None:
    """``offload_optimizer``: the share ``ratio`` of the parameters; ``offload_param``: those that wait on the host too."""
    engine.host_states.part_elements = config.zero.sub_group_size
    params = engine.params()
    engine.host_states.add(p for p in params.values() if is_on_host(local_of(p)))
    if config.offload_optimizer == "cpu" and config.dspass.memory_budget is None and config.dspass.plan is None:
        host(engine, list(shares(params, config.offload_optimizer_ratio, 1)[-1]))


def host(engine: Engine, names: list[str] | tuple[str, ...]) -> None:
    """From the next step on the states of the named parameters wait on the host."""
    params = engine.params()
    engine.host_states.add(params[name] for name in names)


def move_out(engine: Engine) -> None:
    """Send to the host what was made on the device before a plan was, as in the first step of the one-line way."""
    if engine.supposed_optimizer is None and engine.host_states:
        for optimizer in Optimizers(engine).alive:
            engine.host_states.leave(optimizer)


def shares(params: Mapping[str, torch.Tensor], ratio: float, count: int) -> list[tuple[str, ...]]:
    """``count`` growing lists of names up to ``ratio`` of the bytes of trained ``params``, in their order; those of less than
    :data:`~dspass.runtime.host_states.LEAST_BYTES` are in none."""
    sizes = {n: local_bytes(p) for n, p in params.items() if p.requires_grad}
    worth = [n for n, size in sizes.items() if size >= LEAST_BYTES]
    most = ratio * sum(sizes.values())
    lists: list[tuple[str, ...]] = []
    before = 0
    for step in range(1, count + 1):
        taken, held = [], 0
        for name in worth:
            if held + sizes[name] > most * step / count * (1 + 1e-9):
                continue
            taken.append(name)
            held += sizes[name]
        if held > before:
            lists.append(tuple(taken))
            before = held
    return lists or [()]
