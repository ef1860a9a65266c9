"""Experts of a capacity: the first rows of each, in a tensor that has as many for every expert.

A router without limits gives experts as many rows as it likes, and sizes that are known only when it has. With a capacity each
expert takes that many of a rank's rows at most, and every size is known while the graph is compiled: :func:`pad_experts` makes
``[experts, capacity, ...]`` of rows in the order of experts, zeros where an expert has fewer, and drops what is beyond;
:func:`unpad_experts` is the way back, zeros for what was dropped. The two are each other's adjoint. Capacities are DeepSpeed's
(Rajbhandari et al., DeepSpeed-MoE, 2022; Lepikhin et al., GShard, 2020); what is dropped comes last in the order of tokens, its
``drop_policy="position"``.

Dropped: a one-hot mask of tokens, experts and places, by which GShard dispatches and combines: tokens times experts times
capacity values, and as many products, for what is an index. Dropped: to drop the rows of the lowest scores, DeepSpeed's
``"probs"``: rows have lost their scores once they are in the order of experts.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F

from dspass.runtime.operators import differentiable, operator


def capacity_of(rows: Any, experts: int, factor: float, least: int) -> Any:
    """Rows that an expert takes of a rank's ``rows``, tokens times experts a token: ``factor`` times its even share rounded up,
    and no fewer than ``least``. ``rows`` may be a symbol."""
    share = Fraction(str(factor)) / experts  # decimals as they are written: 1.1 of 20 rows are 22
    return torch.sym_max(least, (rows * share.numerator + share.denominator - 1) // share.denominator)


def even_ends(like: torch.Tensor, experts: int, rows: Any) -> torch.Tensor:
    """``int32[experts]``: where the rows of each end, ``rows`` of every one; ``like`` says on which device."""
    return torch.arange(1, experts + 1, dtype=torch.int32, device=like.device) * rows


def _pad_fake(rows: torch.Tensor, ends: torch.Tensor, capacity: Any) -> torch.Tensor:
    return rows.new_empty((ends.shape[0], capacity, *rows.shape[1:]))


@operator("pad_experts(Tensor rows, Tensor ends, SymInt capacity) -> Tensor", fake=_pad_fake)
def pad_experts(rows: torch.Tensor, ends: torch.Tensor, capacity: int) -> torch.Tensor:
    """``[experts, capacity, ...]``: the first rows of each expert in ``rows[rows, ...]``, which ``end`` at ``int32[experts]``,
    and zeros behind them."""
    slots = torch.arange(capacity, dtype=ends.dtype, device=ends.device)
    places = F.pad(ends[:-1], (1, 0))[:, None] + slots
    taken = _beside(places < ends[:, None], rows.dim() + 1)
    if not rows.shape[0]:
        return rows.new_zeros((ends.shape[0], capacity, *rows.shape[1:]))
    return torch.where(taken, rows[places.clamp_max(rows.shape[0] - 1)], rows.new_zeros(()))


def _unpad_fake(padded: torch.Tensor, ends: torch.Tensor, size: Any) -> torch.Tensor:
    return padded.new_empty((size, *padded.shape[2:]))


@operator("unpad_experts(Tensor padded, Tensor ends, SymInt size) -> Tensor", fake=_unpad_fake)
def unpad_experts(padded: torch.Tensor, ends: torch.Tensor, size: int) -> torch.Tensor:
    """``[size, ...]``: of ``padded[experts, capacity, ...]`` the rows where :func:`pad_experts` took them, and zeros for those
    that it dropped and for those behind the last end."""
    experts, capacity = padded.shape[:2]
    if not capacity:
        return padded.new_zeros((size, *padded.shape[2:]))
    numbers = torch.arange(size, dtype=ends.dtype, device=ends.device)
    expert = torch.bucketize(numbers, ends, right=True).clamp_max(experts - 1)
    slot = numbers - F.pad(ends[:-1], (1, 0))[expert]
    taken = _beside((numbers < ends[-1]) & (slot < capacity), padded.dim() - 1)
    rows = padded.flatten(0, 1)[expert * capacity + slot.clamp_max(capacity - 1)]
    return torch.where(taken, rows, rows.new_zeros(()))


def _beside(mask: torch.Tensor, dims: int) -> torch.Tensor:
    return mask.view(*mask.shape, *[1] * (dims - mask.dim()))


def _keep_pad(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    rows, ends, _ = inputs
    ctx.size = rows.shape[0]
    ctx.save_for_backward(ends)


def _pad_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    (ends,) = ctx.saved_tensors
    return torch.ops.dspass.unpad_experts(grad, ends, ctx.size), None, None


def _keep_unpad(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    padded, ends, _ = inputs
    ctx.capacity = padded.shape[1]
    ctx.save_for_backward(ends)


def _unpad_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    (ends,) = ctx.saved_tensors
    return torch.ops.dspass.pad_experts(grad, ends, ctx.capacity), None, None


differentiable("pad_experts", backward=_pad_backward, keep=_keep_pad)
differentiable("unpad_experts", backward=_unpad_backward, keep=_keep_unpad)
