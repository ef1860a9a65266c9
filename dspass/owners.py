"""Who holds a parameter: modules, the compiled root above them, optimisers and lists.

Dynamo hands a backend tensors, not modules. The garbage collector knows every module alive, so one scan at the first call
finds all owners of a parameter, tied ones included. Dropped: following Dynamo's sources (``L['self']._modules...``), which
name one owner of a tied parameter only, and none of an optimiser.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor


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


#: Entries of torch.optim's states that are one number each, whatever the parameter: never divided.
_NUMBERS = frozenset({"step", "mu_product", "eta", "mu"})


def _is_of_a_parameter(key: Any, value: Any, param: torch.Tensor) -> bool:
    """Whether a state's entry goes element by element with its parameter, and so lies as that does."""
    return isinstance(value, torch.Tensor) and value.shape == param.shape and bool(value.dim() or key not in _NUMBERS)


def shard_states(optimizer: torch.optim.Optimizer) -> None:
    """Cut whole states that were loaded for sharded parameters: those of one process's checkpoint, and 0-dim ones.

    ``set_optimizer_state_dict`` leaves 0-dim states plain, and ``Optimizer.load_state_dict`` takes what it is given; either
    would fail inside of DTensor. Every rank holds the same whole state, so nothing is sent. Those of what stands in for another
    pipeline stage's parameter are dropped: loading has put them on the meta device, and a checkpoint must not find them there.
    """
    for param in [p for p in optimizer.state if p.is_meta and not p.requires_grad]:
        del optimizer.state[param]
    for param, state in optimizer.state.items():
        if not isinstance(param, DTensor):
            continue
        for key, value in state.items():
            if not isinstance(value, DTensor) and _is_of_a_parameter(key, value, param):
                state[key] = distribute_tensor(value, param.device_mesh, param.placements, src_data_rank=None)


#: By the id of an old parameter: it, the new one, and what divides a state of the old one alike, or None to drop it.
Replaced = dict[int, tuple[nn.Parameter, nn.Parameter, Callable[[torch.Tensor], torch.Tensor] | None]]


def exchange(heap: Heap, replaced: Replaced) -> None:
    """Let optimisers, plain lists and dictionaries hold the new parameters where they held the old ones.

    States of a parameter of which this rank keeps nothing are dropped.
    """
    for optimizer in heap.optimizers:
        for group in optimizer.param_groups:
            group["params"] = [replaced[id(p)][1] if id(p) in replaced else p for p in group["params"]]
        for old in [p for p in optimizer.state if id(p) in replaced]:
            _, new, shard_like = replaced[id(old)]
            state = optimizer.state.pop(old)
            if shard_like is None:
                continue
            optimizer.state[new] = {k: shard_like(v) if _is_of_a_parameter(k, v, old) else v for k, v in state.items()}
    olds = [old for old, _, _ in replaced.values()]
    for holder in gc.get_referrers(*olds):
        if type(holder) not in (list, dict) or holder is olds:
            continue
        for key, value in list(holder.items() if type(holder) is dict else enumerate(holder)):
            if id(value) in replaced and isinstance(value, nn.Parameter):
                holder[key] = replaced[id(value)][1]


def refuse_stale(heap: Heap, params: Iterable[torch.Tensor]) -> None:
    """Raise ``RuntimeError`` where an optimiser holds ``params`` in a way that :func:`exchange` cannot mend."""
    ids = {id(p) for p in params}
    for optimizer in heap.optimizers:
        for name, value in optimizer.__dict__.items():
            if name not in ("param_groups", "state") and _holds_fast(value, ids):
                raise RuntimeError(
                    f"{type(optimizer).__name__}.{name} holds parameters in a form that cannot be exchanged (a tuple, a set or "
                    "a dictionary's keys), so it would go on with the whole ones that are about to be divided: build the "
                    "optimizer after the model's first forward, or call dspass.shard(model, config) before you build it."
                )


def _holds_fast(value: Any, ids: set[int], depth: int = 4) -> bool:
    if depth == 0 or not isinstance(value, (list, dict, tuple, set, frozenset)):
        return False
    inside = [*value, *value.values()] if isinstance(value, dict) else list(value)
    fixed = list(value) if not isinstance(value, list) else []  # of a dictionary: its keys
    return any(id(v) in ids for v in fixed) or any(_holds_fast(v, ids, depth - 1) for v in inside)
