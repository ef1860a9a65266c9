"""The whole state of a model on one rank, also where pipeline stages' parameters lie on others.

:func:`full_state_dict` is for one file that any process reads. ``get_model_state_dict`` and ``get_optimizer_state_dict`` of
torch.distributed.checkpoint with ``full_state_dict`` answer as much: with stages they would have those of this rank only, and
what was saved from rank 0 would lack all others. They call ``state_dict()`` of model and optimiser, which here know who asks.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from dspass.engines import staged_engines
from dspass.owners import shard_states, unwrap
from dspass.runtime import compat
from dspass.runtime.params import ParamSpec
from dspass.runtime.stopped import waiting_for
from dspass.sharded import COLLECTING, collected

_followed: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


def full_state_dict(model: nn.Module, *, rank0_only: bool = False) -> dict[str, Any]:
    """What one process would get of ``model.state_dict()``: whole tensors on the CPU, under the model's own names.

    All ranks call this together, whatever their stages hold; with ``rank0_only`` the others get ``{}``. One whole parameter at
    a time is on the device. ``model.load_state_dict`` takes the result, on any number of ranks and stages.
    """
    keeps = not rank0_only or not dist.is_initialized() or dist.get_rank() == 0
    made: dict[str, torch.Tensor] = {}

    def on_cpu(whole: torch.Tensor) -> torch.Tensor:
        return whole.detach().to("cpu", copy=True) if keeps else torch.empty(0)

    def collect(spec: ParamSpec) -> torch.Tensor:
        if spec.key not in made:  # a tied one has several names
            made[spec.key] = on_cpu(collected(spec))
        return made[spec.key]

    token = COLLECTING.set(collect)
    try:
        state = unwrap(model).state_dict()
    finally:
        COLLECTING.reset(token)
    stored = set(map(id, made.values()))
    for name, value in state.items():
        if isinstance(value, torch.Tensor) and id(value) not in stored:
            state[name] = on_cpu(value.full_tensor() if isinstance(value, DTensor) else value)
    return state if keeps else {}


def follow(optimizer: torch.optim.Optimizer) -> None:
    """Have ``optimizer`` answer the states of all stages where its full state is asked for, which all ranks do together, and
    keep those of this rank's of what it loads."""
    if optimizer not in _followed:
        _followed.add(optimizer)
        optimizer.register_state_dict_post_hook(_complete)
        optimizer.register_load_state_dict_post_hook(shard_states)


@torch.no_grad()
def _complete(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any] | None:
    if not compat.asked_for_full_state():
        return None
    specs = {id(spec.param()): spec for engine in staged_engines() for spec in engine.specs.values()}
    states = dict(state["state"])
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for number, param in enumerate(params):
        spec = specs.get(id(param))
        if spec is not None and spec.trains and (whole := _whole(states.get(number, {}), spec)):
            states[number] = whole
    return {**state, "state": states}


def _whole(mine: dict[str, Any], spec: ParamSpec) -> dict[str, Any]:
    """A parameter's states from the first rank of the pipeline that holds it. Numbers travel in the list of what there is."""
    stages = spec.engine.stages
    assert stages is not None
    here = {key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in mine.items()}
    if not 0 < len(spec.held_by) < stages.pipe.size:
        return here
    tensors = {k: (v.shape, v.dtype) for k, v in here.items() if isinstance(mine[k], DTensor)}
    told: list[Any] = [(list(here), tensors, {k: v for k, v in here.items() if k not in tensors})]
    source = stages.pipe.ranks[spec.held_by[0]]
    with waiting_for(stages.pipe, f"collect the states of {spec.name}"):
        dist.broadcast_object_list(told, source, group=stages.pipe.group)
    names, tensors, others = told[0]
    for key, (shape, dtype) in tensors.items():
        value = here[key].contiguous() if key in here else torch.empty(shape, dtype=dtype, device=stages.device)
        with waiting_for(stages.pipe, f"collect the states of {spec.name}"):
            dist.broadcast(value, source, group=stages.pipe.group)
        others[key] = value
    return {key: others[key] for key in names}


__all__ = ["follow", "full_state_dict"]
