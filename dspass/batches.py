"""The batch that a model is called with, and parts of it along the first dimension."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten


def batch_size(leaves: Sequence[Any]) -> int | None:
    """The length that most tensors have along their first dimension; None where none has a dimension."""
    tensors = [t for t in leaves if isinstance(t, torch.Tensor) and not isinstance(t, torch.nn.Parameter)]
    sizes = Counter(t.shape[0] for t in tensors if t.dim())
    return max(sizes, key=lambda size: sizes[size]) if sizes else None


def part_of(leaves: Sequence[Any], size: int, count: int, i: int) -> list[Any]:
    """Part ``i`` of ``count``: of each tensor that has the batch's ``size`` rows its own, of all else the whole; one given
    twice stays one."""
    rows = size // count
    known: dict[int, torch.Tensor] = {}
    found = []
    for leaf in leaves:
        if count > 1 and isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.shape[0] == size:
            found.append(known.setdefault(id(leaf), leaf.narrow(0, i * rows, rows)))
        elif isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.shape[0] == size:
            found.append(known.setdefault(id(leaf), leaf.view_as(leaf)))
        else:
            found.append(leaf)
    return found


def divided(value: Any, size: int, count: int) -> Any:
    """The first of ``count`` parts of arguments of a call: parameters stay whole, and containers in which nothing is divided
    are the same objects, for who else holds them."""
    known: dict[int, torch.Tensor] = {}

    def divide(leaf: Any) -> Any:
        if isinstance(leaf, torch.nn.Parameter) or not isinstance(leaf, torch.Tensor):
            return leaf
        if not leaf.dim() or leaf.shape[0] != size:
            return leaf
        return known.setdefault(id(leaf), leaf.narrow(0, 0, size // count))

    def walk(value: Any) -> Any:
        children, kind = ([], None) if isinstance(value, torch.Tensor) else _children(value)
        if kind is None:
            return divide(value)
        made = [walk(child) for child in children]
        return value if all(a is b for a, b in zip(made, children, strict=True)) else kind(made)

    return walk(value)


def _children(value: Any) -> tuple[list[Any], Callable[[list[Any]], Any] | None]:
    if type(value) in (list, tuple):
        return list(value), type(value)
    if type(value) is dict:
        return list(value.values()), lambda made: dict(zip(value, made, strict=True))
    leaves, structure = tree_flatten(value)
    if len(leaves) == 1 and leaves[0] is value:
        return [], None
    return leaves, lambda made: tree_unflatten(made, structure)


__all__ = ["batch_size", "divided", "part_of"]
