"""Rows to experts and back: what surrounds the grouped matrix product of a mixture of experts.

A router gives each token ``top_k`` experts. A grouped product (``torch._grouped_mm``) wants the rows of one expert next to
each other, and where each expert's end: :func:`permute_experts` makes them, and :func:`unpermute_experts` brings the products
back, as each token's sum over its experts, weighted (dropless routing; Gale et al., MegaBlocks, 2023). :func:`spread_experts`
is the first's second half alone, and what the second's gradient is made of: the two are each other's adjoint, so gradients of
any order are made of the same three operators.

``positions`` say which row each token has with each of its experts. Rows are in the order of experts, and those of one expert
in the order of tokens, always: sorting is stable, and nothing depends on which thread comes first. An expert that is none,
below 0 or not below ``num_experts``, is a dropped assignment, as capacity limits and expert parallelism need: its row comes
behind those of all experts, is of zeros, and stands in ``positions`` as ``-1 - row``. So every row is some assignment's, and
shapes do not depend on values. What a dropped row holds later is never read, which is just as well: a grouped product leaves
it as it was.

Sums are in fp32, over a token's experts in their order, each operation rounded once, so that kernels
(``cuda_src/portable/moe.cuh``) and this reference agree to the last bit. Tensors may have any number of values; there may be
``2**31 - 1`` rows, because a grouped product's ends are 32 bit.

Dropped: tokens and experts as a one-hot mask, as capacity-bound routers have it, which costs tokens times experts times
capacity. Dropped: rows of a number that depends on the routing, which would break the graph. Dropped: a second list, of the
assignment of each row: kernels write rows where they belong, from a token that is read once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dspass.runtime.operators import differentiable, operator
from dspass.runtime.quantise import DTYPES

#: Of them the kernels keep counts for a warp at once.
MOST_EXPERTS = 8192
MOST_ROWS = 2**31 - 1


# -- rows in the order of experts ----------------------------------------------------------------------------------------


def _permute_fake(
    x: torch.Tensor, experts: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_tokens(x, experts)
    _check_experts(experts, num_experts)
    return (
        x.new_empty((experts.numel(), x.shape[1])),
        experts.new_empty(experts.shape, dtype=torch.int32),
        experts.new_empty((num_experts,), dtype=torch.int32),
    )


@operator("permute_experts(Tensor x, Tensor experts, int num_experts) -> (Tensor, Tensor, Tensor)", fake=_permute_fake)
def permute_experts(
    x: torch.Tensor, experts: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of tokens ``x[tokens, hidden]``, fp32, fp16 or bf16, and their ``experts[tokens, top_k]``, ``int32`` or ``int64``:

    - rows, ``[tokens * top_k, hidden]`` of the dtype of ``x``, sorted by expert and then by token;
    - positions, ``int32[tokens, top_k]``: the row of each assignment, or ``-1 - row`` of one that is dropped;
    - ends, ``int32[num_experts]``: the row behind each expert's last, ``offs`` of ``torch._grouped_mm``.

    Raises ``ValueError`` for shapes, dtypes and counts that cannot be.
    """
    _check_tokens(x, experts)
    _check_experts(experts, num_experts)
    flat = experts.reshape(-1)
    keys = torch.where((flat >= 0) & (flat < num_experts), flat, num_experts)  # what is dropped comes last
    in_order, assignments = torch.sort(keys, stable=True)
    rows = _inverse(assignments)
    positions = torch.where(keys < num_experts, rows, -1 - rows).to(torch.int32).view(experts.shape)
    every = torch.arange(num_experts, dtype=in_order.dtype, device=in_order.device)
    ends = torch.searchsorted(in_order, every, right=True, out_int32=True)
    return spread_experts(x, positions), positions, ends


def _spread_fake(x: torch.Tensor, positions: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    _check_tokens(x, positions)
    _check_positions(positions, weights)
    return x.new_empty((positions.numel(), x.shape[1]))


@operator("spread_experts(Tensor x, Tensor positions, Tensor? weights=None) -> Tensor", fake=_spread_fake)
def spread_experts(x: torch.Tensor, positions: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Rows as :func:`permute_experts` makes them, of ``positions`` that it answered, each times its ``weights[tokens, top_k]``,
    fp32, fp16 or bf16, where there are any."""
    _check_tokens(x, positions)
    _check_positions(positions, weights)
    assignments = _inverse(_rows_of(positions).view(-1))
    rows = x[assignments // max(positions.shape[1], 1)]
    if weights is not None:
        rows = (rows.float() * weights.reshape(-1)[assignments].float()[:, None]).to(x.dtype)
    return torch.where((positions.reshape(-1)[assignments] < 0)[:, None], 0.0, rows)


# -- and back ------------------------------------------------------------------------------------------------------------


def _unpermute_fake(rows: torch.Tensor, positions: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    _check_rows(rows, positions)
    _check_positions(positions, weights)
    return rows.new_empty((positions.shape[0], rows.shape[1]))


@operator("unpermute_experts(Tensor rows, Tensor positions, Tensor? weights=None) -> Tensor", fake=_unpermute_fake)
def unpermute_experts(rows: torch.Tensor, positions: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """``[tokens, hidden]``: of each token the sum of its rows, times ``weights[tokens, top_k]`` where there are any.

    ``rows`` are ``[tokens * top_k, hidden]``, fp32, fp16 or bf16, in the order of ``positions``, which
    :func:`permute_experts` answered. A token all of whose assignments are dropped becomes zeros.
    """
    _check_rows(rows, positions)
    _check_positions(positions, weights)
    total = rows.new_zeros((positions.shape[0], rows.shape[1]), dtype=torch.float32)
    places = _rows_of(positions)
    for k in range(positions.shape[1]):
        one = rows[places[:, k]].float()
        if weights is not None:
            one = one * weights[:, k, None].float()
        total = total + torch.where(positions[:, k, None] < 0, 0.0, one)
    return total.to(rows.dtype)


# -- gradients -----------------------------------------------------------------------------------------------------------


def _weight_gradients(
    x: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Of each assignment the product of its token in ``x`` and its row, in fp32; 0 for one that is dropped."""
    its = torch.where(positions[..., None] < 0, 0.0, rows[_rows_of(positions)])
    return (x.float()[:, None] * its.float()).sum(-1).to(weights.dtype)


def _keep_for_permute(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(output[1])


def _permute_backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, None, None]:
    (positions,) = ctx.saved_tensors
    return torch.ops.dspass.unpermute_experts(grad, positions), None, None


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    values, positions, weights = inputs
    ctx.save_for_backward(values if ctx.needs_input_grad[2] else None, positions, weights)


def _spread_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, None, torch.Tensor | None]:
    x, positions, weights = ctx.saved_tensors
    to_x = torch.ops.dspass.unpermute_experts(grad, positions, weights) if ctx.needs_input_grad[0] else None
    return to_x, None, None if x is None else _weight_gradients(x, grad, positions, weights)


def _unpermute_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, None, torch.Tensor | None]:
    rows, positions, weights = ctx.saved_tensors
    to_rows = torch.ops.dspass.spread_experts(grad, positions, weights) if ctx.needs_input_grad[0] else None
    return to_rows, None, None if rows is None else _weight_gradients(grad, rows, positions, weights)


differentiable("permute_experts", backward=_permute_backward, keep=_keep_for_permute)
differentiable("spread_experts", backward=_spread_backward, keep=_keep)
differentiable("unpermute_experts", backward=_unpermute_backward, keep=_keep)


# -- positions and checks ------------------------------------------------------------------------------------------------


def _rows_of(positions: torch.Tensor) -> torch.Tensor:
    """Of every assignment, dropped or not, ``int64``."""
    return torch.where(positions < 0, -1 - positions, positions).long()


def _inverse(permutation: torch.Tensor) -> torch.Tensor:
    numbers = torch.arange(permutation.shape[0], dtype=permutation.dtype, device=permutation.device)
    return torch.zeros_like(permutation).scatter(0, permutation, numbers)


def _check_tokens(x: torch.Tensor, each: torch.Tensor) -> None:
    _check_values(x)
    if each.dim() != 2 or x.shape[0] != each.shape[0]:
        raise ValueError(
            f"tokens of shape {_text(x.shape)} have no routing of shape {_text(each.shape)}: take [tokens, top_k]."
        )


def _check_rows(rows: torch.Tensor, positions: torch.Tensor) -> None:
    _check_values(rows)
    if positions.dim() != 2 or rows.shape[0] != positions.numel():
        raise ValueError(
            f"rows of shape {_text(rows.shape)} do not go with positions of shape {_text(positions.shape)}: "
            "take a row for each position."
        )


def _check_values(values: torch.Tensor) -> None:
    if values.dim() != 2:
        raise ValueError(f"values of shape {_text(values.shape)} are not rows: take [rows, hidden].")
    if values.dtype not in DTYPES:
        raise ValueError(f"rows of {_text(values.dtype)} do not go to experts: fp32, fp16 and bf16 do.")


def _check_experts(experts: torch.Tensor, num_experts: int) -> None:
    if experts.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"experts of {_text(experts.dtype)} cannot be: take their numbers as int32 or int64.")
    if not 1 <= num_experts <= MOST_EXPERTS:
        raise ValueError(f"{num_experts} experts cannot be: take 1 to {MOST_EXPERTS}.")
    if experts.numel() > MOST_ROWS:
        raise ValueError(
            f"{experts.numel()} assignments are more than the 2**31 - 1 rows of a grouped product: divide the tokens."
        )


def _check_positions(positions: torch.Tensor, weights: torch.Tensor | None) -> None:
    if positions.dtype != torch.int32:
        raise ValueError(f"positions of {_text(positions.dtype)} cannot be: take those of permute_experts, int32.")
    if weights is not None and (weights.shape != positions.shape or weights.dtype not in DTYPES):
        raise ValueError(
            f"weights of {_text(weights.dtype)} and shape {_text(weights.shape)} do not go with positions of shape "
            f"{_text(positions.shape)}: take one for each, in fp32, fp16 or bf16."
        )


def _text(what: torch.dtype | Sequence[int]) -> str:
    return str(what).removeprefix("torch.") if isinstance(what, torch.dtype) else str(list(what))
