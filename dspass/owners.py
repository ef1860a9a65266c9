"""Who holds a parameter: modules, the compiled root above them, optimisers and lists.

Dynamo hands a backend tensors, not modules. The garbage collector knows every module alive, so one scan at the first call
finds all owners of a parameter, tied ones included. Dropped: following Dynamo's sources (``L['self']._modules...``), which
name one owner of a tied parameter only, and none of an optimiser.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass(kw_only=True)
class Heap:
    """One scan of every live module and optimiser."""

    modules: list[nn.Module] = field(default_factory=list)
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)
    parents: dict[int, list[nn.Module]] = field(default_factory=dict)

    @classmethod
    def scan(cls) -> Heap:
        heap = cls()
        for thing in gc.get_objects():
            kind = type(thing)  # isinstance would ask proxies for their __class__
            if issubclass(kind, nn.Module):
                heap.modules.append(thing)
            elif issubclass(kind, torch.optim.Optimizer):
                heap.optimizers.append(thing)
        for module in heap.modules:
            for child in (module.__dict__.get("_modules") or {}).values():
                if child is not None:
                    heap.parents.setdefault(id(child), []).append(module)
        return heap

    def owners(self, params: Iterable[torch.Tensor]) -> list[tuple[nn.Module, str]]:
        wanted = {id(p) for p in params}
        return [
            (module, name)
            for module in self.modules
            for name, value in (module.__dict__.get("_parameters") or {}).items()
            if id(value) in wanted
        ]

    def compiled_root(self, module: nn.Module) -> nn.Module | None:
        """The nearest module at or above ``module`` that ``torch.compile`` was called on."""
        frontier, seen = [module], {id(module)}
        while frontier:
            above: list[nn.Module] = []
            for current in frontier:
                parents = self.parents.get(id(current), [])
                if current.__dict__.get("_compiled_call_impl") is not None or any(
                    isinstance(p, torch._dynamo.OptimizedModule) for p in parents
                ):
                    return current
                above += [p for p in parents if id(p) not in seen]
                seen.update(id(p) for p in parents)
            frontier = above
        return None


def unwrap(model: nn.Module) -> nn.Module:
    """The person's own module under ``torch.compile``."""
    while isinstance(model, torch._dynamo.OptimizedModule):
        model = model._orig_mod
    return model


def exchange(heap: Heap, replaced: dict[int, tuple[nn.Parameter, nn.Parameter, Any]]) -> None:
    """Let optimisers and plain lists hold the new parameters where they held the old ones.

    ``replaced`` maps the id of an old parameter to it, the new one, and a function that shards a state tensor alike.
    """
    for optimizer in heap.optimizers:
        for group in optimizer.param_groups:
            if isinstance(group["params"], list):
                group["params"][:] = [replaced[id(p)][1] if id(p) in replaced else p for p in group["params"]]
        for old in [p for p in optimizer.state if id(p) in replaced]:
            _, new, shard_like = replaced[id(old)]
            state = optimizer.state.pop(old)
            optimizer.state[new] = {
                k: shard_like(v) if isinstance(v, torch.Tensor) and v.shape == old.shape and v.dim() else v
                for k, v in state.items()
            }
    olds = [old for old, _, _ in replaced.values()]
    for holder in gc.get_referrers(*olds):
        if type(holder) is list and holder is not olds:
            for i, value in enumerate(holder):
                if id(value) in replaced and isinstance(value, nn.Parameter):
                    holder[i] = replaced[id(value)][1]
