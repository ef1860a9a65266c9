"""What a plan counts of a model's optimisers: those that are alive, by the parameters that each of them steps.

An optimiser is usually made before the model is compiled, and makes its states in its first step: until then its class and its
groups' settings say what they will be. Where none is there yet it will be AdamW. Dropped: to step a copy of the optimiser on
meta tensors. It would also run what its owner has added to its step.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any

import torch

from dspass.adamw import AdamW
from dspass.runtime.engine import Engine
from dspass.runtime.host_states import local_bytes
from dspass.runtime.stepping import ADAMW, OPTIMIZERS, Optimizer

_ADAMS = (torch.optim.Adam, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax)  # AdamW is an Adam


#: Their largest second moments are a third state.
_AMSGRAD, _AMSGRAD_FUSED = Optimizer(3, 2, 1), Optimizer(3)


class Optimizers:
    """Those that step some of ``engine``'s parameters, as they are now; or the one that a prediction supposes."""

    def __init__(self, engine: Engine) -> None:
        self._supposed = engine.supposed_optimizer
        self._of: dict[int, tuple[torch.optim.Optimizer, Optimizer]] = {}
        if self._supposed is not None:
            return
        params = {id(p) for p in engine.params().values()}
        for found in gc.get_objects():
            if not issubclass(type(found), torch.optim.Optimizer):
                continue
            for group in getattr(found, "param_groups", ()):
                planned = _planned(found, group)
                self._of |= {id(p): (found, planned) for p in group["params"] if id(p) in params}

    @property
    def alive(self) -> list[torch.optim.Optimizer]:
        return list({id(optimizer): optimizer for optimizer, _ in self._of.values()}.values())

    def state_bytes(self, param: torch.Tensor) -> int:
        """Of ``param``'s states as they are, or as they will be. A parameter that no optimiser steps, while one steps others of
        the model, has none."""
        if self._supposed is not None or not self._of:
            return self.planned.state_bytes(param)
        if id(param) not in self._of:
            return 0
        optimizer, planned = self._of[id(param)]
        made = sum(local_bytes(t) for t in optimizer.state.get(param, {}).values() if isinstance(t, torch.Tensor))
        return made or planned.state_bytes(param)

    @property
    def planned(self) -> Optimizer:
        """What one parameter's step is taken to hold; of several optimisers the most of each."""
        if self._supposed is not None:
            return self._supposed
        kinds = list({id(kind): kind for _, kind in self._of.values()}.values())
        if len(kinds) < 2:
            return kinds[0] if kinds else ADAMW
        return Optimizer(
            max(kind.states for kind in kinds),
            max(kind.temporaries for kind in kinds),
            max(kind.results for kind in kinds),
            max((kind.element for kind in kinds if kind.element is not None), default=None),
            bytes_of_states=self.state_bytes,
        )


def _planned(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> Optimizer:
    """By its class and its settings; one that is not known is taken for torch's AdamW."""
    if isinstance(optimizer, AdamW):
        return optimizer.as_planned()
    if isinstance(optimizer, torch.optim.SGD):
        return OPTIMIZERS["momentum" if group.get("momentum") else "sgd"]
    if isinstance(optimizer, _ADAMS):
        if group.get("amsgrad"):
            return _AMSGRAD_FUSED if group.get("fused") else _AMSGRAD
        return OPTIMIZERS["adamw-fused"] if group.get("fused") else ADAMW
    return ADAMW
