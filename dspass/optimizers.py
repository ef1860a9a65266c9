"""What a plan counts of a model's optimisers: those that are alive, by the parameters that each of them steps.

An optimiser is usually made before the model is compiled, and makes its states in its first step: until then its class and its
groups' settings say what they will be. Where none is there yet it will be AdamW. What torch's hold while they step was measured
(``tests/test_stepping.py`` does it again): one parameter after another, or all of them. Dropped: to step a copy of the
optimiser on meta tensors. It would also run what its owner has added to its step.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from dspass.adamw import AdamW
from dspass.runtime.engine import Engine
from dspass.runtime.host_states import local_bytes
from dspass.runtime.stepping import ADAMW, Optimizer

log = logging.getLogger(__name__)

#: What torch's hold by themselves, and where they make a copy of gradients first. AdamW is an Adam.
_KNOWN: dict[type, tuple[Optimizer, Optimizer]] = {
    torch.optim.SGD: (Optimizer(0), Optimizer(0, 1, 1)),
    torch.optim.Adam: (ADAMW, Optimizer(2, 3, 1)),
    torch.optim.NAdam: (ADAMW, Optimizer(2, 3, 1, foreach=2)),
    torch.optim.RAdam: (Optimizer(2, 2, foreach=1), Optimizer(2, 3, foreach=1)),
    torch.optim.Adamax: (Optimizer(2, 1, foreach=1), Optimizer(2, 2, foreach=1)),
    torch.optim.Adagrad: (Optimizer(1, 1, 1, foreach=2), Optimizer(1, 2, 1, foreach=2)),
    torch.optim.Adadelta: (Optimizer(2, 2, 1, foreach=2), Optimizer(2, 3, 1, foreach=3)),
    torch.optim.ASGD: (Optimizer(1, foreach=1), Optimizer(1, 1, foreach=1)),
    torch.optim.RMSprop: (Optimizer(1, 1, 1), Optimizer(1, 2, 1, foreach=2)),
}

_said: set[type] = set()


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
            max(kind.of_all for kind in kinds),
            any(kind.together for kind in kinds) or None,
            max((kind.element for kind in kinds if kind.element is not None), default=None),
            bytes_of_states=self.state_bytes,
        )


def _planned(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> Optimizer:
    """By its class and its settings; one that is not known is taken for torch's AdamW."""
    if isinstance(optimizer, AdamW):
        return optimizer.as_planned()
    known = next((both for kind, both in _KNOWN.items() if isinstance(optimizer, kind)), None)
    if known is None:
        if type(optimizer) not in _said:
            _said.add(type(optimizer))
            log.warning(
                "What %s holds while it steps, and in its first step makes, is not known: under dspass.memory_budget it is "
                "counted as torch.optim.AdamW.",
                type(optimizer).__name__,
            )
        return ADAMW
    decays = group.get("weight_decay") and not group.get("decoupled_weight_decay")
    found = known[bool(decays or group.get("maximize"))]
    more = [key for key in ("momentum", "amsgrad", "centered") if group.get(key)]
    found = replace(found, states=found.states + len(more), together=group.get("foreach"))
    if group.get("nesterov"):
        found = replace(found, temporaries=found.temporaries + 1, foreach=found.of_all)
    return replace(found, temporaries=0, results=0, foreach=0) if group.get("fused") else found
