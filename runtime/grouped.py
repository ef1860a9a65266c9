"""The products of a mixture of experts: rows in the order of experts, each expert's rows times its own matrix.

:func:`grouped_product` is the forward and the gradient of its rows, :func:`grouped_outer` the gradient of its matrices; the two
are each other's gradients, so that those of any order are made of them. ``ends`` are those of
:func:`dspass.runtime.experts.permute_experts`. They are values, not shapes: a graph with these operators serves every routing.

**On a CPU** each expert is a product of its own, by the library that is fast at it. In fp32 that is oneDNN where experts have
:func:`dspass.runtime.linear.least_operations` on average, and MKL elsewhere; bf16 and fp16 are oneDNN's as they are, or through
fp32 where the CPU has no product of theirs. oneDNN generates code for each number of rows, which takes 0.3 to 1 ms for a small
product, and keeps 1024 of them. Routing brings new numbers in each step, few where experts have few rows. Where they have many,
rows are rounded up to seven significant bits: a product reads a few rows of the next expert too, what it makes of them is
dropped or written over by that expert, and an octave of rows is 64 shapes. A gradient of matrices, where rows are what is
summed over, has zeros there instead. Where no expert wants any of this, ``torch._grouped_mm`` is the loop: it is C++, and calls
from Python are 3 to 4 % of products of 32 rows. ``benchmarks/results/grouped-cpu.md`` has the figures.

**On a GPU** bf16 goes to ``torch._grouped_mm`` where matrices lie as it wants them, and it and fp16 else to CUTLASS where its
library is built and takes them (:mod:`dspass.runtime.cutlass`); neither waits for the device. The rest is the loop over
experts, which reads ``ends`` first. No GPU has run this yet; should CUTLASS's be the faster one there, it goes first.

Dropped: ``torch._grouped_mm`` for all of a CPU: it takes MKL for fp32 and does not round. Dropped: a library for each expert by
its own rows: a skewed routing's one large expert gained less than the loop in Python cost. Dropped: oneDNN's product turned
over (``w @ x.T``), which need not rearrange the larger matrix: a quarter faster at 16, 32 or 48 rows, slower between them.
Dropped: experts of equal counts as one batched product: counts are equal by accident only. Dropped: weights gathered
for each row, or for each tile of rows, which reads them as many times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

from dspass.runtime import compat, cutlass, linear
from dspass.runtime.operators import differentiable, implement, operator
from dspass.runtime.quantise import DTYPES


def _product_fake(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    _check_product(x, weight, ends)
    return x.new_empty((x.shape[0], weight.shape[2]))


@operator("grouped_product(Tensor x, Tensor weight, Tensor ends) -> Tensor", fake=_product_fake)
def grouped_product(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """``[rows, out]``: the rows of each expert in ``x[rows, in]`` times its matrix of ``weight[experts, in, out]``.

    ``ends``, ``int32[experts]``, has the row behind each expert's last and does not decrease; rows behind the last expert's
    become zeros, whatever they hold. ``x`` and ``weight`` have one dtype, fp32, fp16 or bf16, and any strides.

    Raises ``ValueError`` for shapes and dtypes that cannot be, and, where ``ends`` are read, for those that decrease or exceed
    the rows. This reference multiplies all rows by every matrix: it reads no ``ends`` on the host.
    """
    _check_product(x, weight, ends)
    out = x.new_zeros((x.shape[0], weight.shape[2]))
    for expert, its in enumerate(_whose(x.shape[0], ends)):
        out = torch.where(its, x @ weight[expert], out)
    return out


def _outer_fake(x: torch.Tensor, grad: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    _check_outer(x, grad, ends)
    return x.new_empty((ends.shape[0], x.shape[1], grad.shape[1]))


@operator("grouped_outer(Tensor x, Tensor grad, Tensor ends) -> Tensor", fake=_outer_fake)
def grouped_outer(x: torch.Tensor, grad: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """``[experts, in, out]``: of each expert its rows of ``x[rows, in]``, transposed, times those of ``grad[rows, out]``.

    An expert without rows has zeros. Otherwise as :func:`grouped_product`, whose ``weight`` this is the gradient of.
    """
    _check_outer(x, grad, ends)
    whose = _whose(x.shape[0], ends)
    return torch.stack([torch.where(its, x, 0.0).t() @ torch.where(its, grad, 0.0) for its in whose])


def _whose(rows: int, ends: torch.Tensor) -> list[torch.Tensor]:
    """Of each expert which rows are its, ``bool[rows, 1]``."""
    row = torch.arange(rows, device=ends.device)[:, None]
    begins = F.pad(ends[:-1], (1, 0))
    return [(row >= begin) & (row < end) for begin, end in zip(begins.unbind(), ends.unbind(), strict=True)]


# -- a loop over experts -------------------------------------------------------------------------------------------------

#: Rows of an expert, on average, of which there would be more numbers than oneDNN keeps code for.
_MANY_ROWS = 256


def _product_by_expert(
    x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor, *, by_onednn: bool, is_rounded: bool
) -> torch.Tensor:
    rows = x.shape[0]
    if not x.numel() or not weight.numel():
        return x.new_zeros((rows, weight.shape[2]))
    spans, widths = _spans(ends, rows, is_rounded)
    if not by_onednn and _are_exact(spans, widths) and compat.multiplies_grouped(x, weight):
        out = compat.grouped_product(x, weight, ends)
    else:
        out = x.new_empty((rows, weight.shape[2]))
        for matrix, (begin, end), width in zip(weight.unbind(), spans, widths, strict=True):
            if begin == end:
                continue
            first = min(begin, rows - width)  # the last experts read rows before theirs instead
            some = x[first : first + width]
            if not by_onednn and first == begin:
                torch.mm(some, matrix, out=out[begin : begin + width])  # those to come write over what is not its
            else:
                found = _by_onednn(some, matrix) if by_onednn else torch.mm(some, matrix)
                out[begin:end] = found[begin - first : end - first]
    if spans[-1][1] < rows:
        out[spans[-1][1] :].zero_()
    return out


def _outer_by_expert(
    x: torch.Tensor, grad: torch.Tensor, ends: torch.Tensor, *, by_onednn: bool, is_rounded: bool
) -> torch.Tensor:
    if not x.numel() or not grad.numel():
        return x.new_zeros((ends.shape[0], x.shape[1], grad.shape[1]))
    spans, widths = _spans(ends, x.shape[0], is_rounded)
    if not by_onednn and _are_exact(spans, widths) and compat.multiplies_grouped(x.t(), grad):
        return compat.grouped_product(x.t(), grad, ends)
    out = x.new_empty((ends.shape[0], x.shape[1], grad.shape[1]))
    rooms = [part.new_empty((max(widths), part.shape[1])) for part in (x, grad)] if is_rounded else []
    for its, (begin, end), width in zip(out.unbind(), spans, widths, strict=True):
        if begin == end:
            its.zero_()
            continue
        left, right = x[begin:end], grad[begin:end]
        if width > end - begin:
            left, right = (_filled(part, room[:width]) for part, room in zip((left, right), rooms, strict=True))
        if by_onednn:
            its.copy_(_by_onednn(left.t(), right))
        else:
            torch.mm(left.t(), right, out=its)
    return out


def _spans(ends: torch.Tensor, rows: int, is_rounded: bool) -> tuple[list[tuple[int, int]], list[int]]:
    """Each expert's first row and the one behind its last, and how many rows are multiplied for it."""
    spans = list(pairwise([0, *ends.tolist()]))
    for expert, (begin, end) in enumerate(spans):
        if not begin <= end <= rows:
            raise ValueError(
                f"expert {expert} ends at row {end} behind {begin}, of {rows} rows: take ends that do not decrease."
            )
    return spans, [min(_rounded(end - begin), rows) if is_rounded else end - begin for begin, end in spans]


def _are_exact(spans: Sequence[tuple[int, int]], widths: Sequence[int]) -> bool:
    return all(end - begin == width for (begin, end), width in zip(spans, widths, strict=True))


def _rounded(rows: int) -> int:
    """Up to seven significant bits: at most a 64th more."""
    step = 1 << max(rows.bit_length() - 7, 0)
    return -(-rows // step) * step


def _filled(part: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
    """``room`` with ``part``, and zeros behind it."""
    room[: part.shape[0]] = part
    room[part.shape[0] :].zero_()
    return room


# -- devices -------------------------------------------------------------------------------------------------------------


def least_operations(dtype: torch.dtype, *, is_outer: bool = False) -> float:
    """From how many operations on the product of one expert is given to oneDNN, where torch itself would not: maybe none."""
    if compat.multiplies_by_onednn(dtype):  # torch.mm is oneDNN's
        return math.inf
    if dtype is not torch.float32:
        return 0 if linear.pays() else math.inf
    return linear.least_outer_operations() if is_outer else linear.least_operations()


def _way_of(dtype: torch.dtype, rows: float, operations: int, *, is_outer: bool = False) -> dict[str, Any]:
    """How this CPU multiplies, where experts have so many rows on average, each of so many operations."""
    by_onednn = rows * operations >= least_operations(dtype, is_outer=is_outer)
    return {
        "by_onednn": by_onednn,
        "is_rounded": by_onednn or (rows >= _MANY_ROWS and compat.multiplies_by_onednn(dtype)),
    }


def _by_onednn(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return compat.onednn_linear(left.float(), right.t().float(), None)


_PLAIN = {"by_onednn": False, "is_rounded": False}


@implement("grouped_product", "CPU")
def _product_on_cpu(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    _check_product(x, weight, ends)
    way = _way_of(x.dtype, x.shape[0] / ends.shape[0], 2 * weight[0].numel())
    return _product_by_expert(x, weight, ends, **way)


@implement("grouped_outer", "CPU")
def _outer_on_cpu(x: torch.Tensor, grad: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    _check_outer(x, grad, ends)
    way = _way_of(x.dtype, x.shape[0] / ends.shape[0], 2 * x.shape[1] * grad.shape[1], is_outer=True)
    return _outer_by_expert(x, grad, ends, **way)


@implement("grouped_product", "CUDA")
def _product_on_cuda(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    _check_product(x, weight, ends)
    if x.numel() and weight.numel() and compat.multiplies_grouped(x, weight):
        behind = torch.arange(x.shape[0], device=x.device)[:, None] >= ends[-1]
        return compat.grouped_product(x, weight, ends).masked_fill_(behind, 0)
    found = cutlass.product(x, weight, ends)
    return _product_by_expert(x, weight, ends, **_PLAIN) if found is None else found


@implement("grouped_outer", "CUDA")
def _outer_on_cuda(x: torch.Tensor, grad: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    _check_outer(x, grad, ends)
    if x.numel() and grad.numel() and compat.multiplies_grouped(x.t(), grad):
        return compat.grouped_product(x.t(), grad, ends)
    found = cutlass.outer(x, grad, ends)
    return _outer_by_expert(x, grad, ends, **_PLAIN) if found is None else found


# -- gradients, and what they cost ---------------------------------------------------------------------------------------


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    first, second, ends = inputs
    needs = ctx.needs_input_grad
    ctx.save_for_backward(first if needs[1] else None, second if needs[0] else None, ends)


def _product_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
    x, weight, ends = ctx.saved_tensors
    ops = torch.ops.dspass
    to_x = ops.grouped_product(grad, weight.transpose(1, 2), ends) if ctx.needs_input_grad[0] else None
    to_weight = None
    if ctx.needs_input_grad[1]:
        # As the weight lies, which autograd would otherwise copy the gradient to.
        to_weight = (
            ops.grouped_outer(grad, x, ends).transpose(1, 2) if ctx.is_transposed else ops.grouped_outer(x, grad, ends)
        )
    return to_x, to_weight, None


def _keep_for_product(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _keep(ctx, inputs, output)
    ctx.is_transposed = inputs[1].stride(1) == 1


def _outer_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
    x, other, ends = ctx.saved_tensors
    product = torch.ops.dspass.grouped_product
    to_x = product(other, grad.transpose(1, 2), ends) if ctx.needs_input_grad[0] else None
    return to_x, product(x, grad, ends) if ctx.needs_input_grad[1] else None, None


differentiable("grouped_product", backward=_product_backward, keep=_keep_for_product)
differentiable("grouped_outer", backward=_outer_backward, keep=_keep)


@register_flop_formula(torch.ops.dspass.grouped_product)
def _product_operations(x: Any, weight: Any, ends: Any, *, out_shape: Any = None, **_: Any) -> Any:
    return 2 * x[0] * x[1] * weight[2]


@register_flop_formula(torch.ops.dspass.grouped_outer)
def _outer_operations(x: Any, grad: Any, ends: Any, *, out_shape: Any = None, **_: Any) -> Any:
    return 2 * x[0] * x[1] * grad[1]


# -- checks --------------------------------------------------------------------------------------------------------------
#
# Of sizes by torch._check_value: one that is not known while a graph is traced is checked when it runs.


def _check_product(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> None:
    if x.dim() != 2 or weight.dim() != 3:
        raise ValueError(
            f"a grouped product of {x.dim()} and {weight.dim()} dimensions cannot be: take rows [rows, in] and "
            "matrices [experts, in, out]."
        )
    torch._check_value(
        x.shape[1] == weight.shape[1],
        lambda: f"rows of {x.shape[1]} values do not go with matrices of {weight.shape[1]} rows: take as many.",
    )
    _check_rest(x, weight, ends)
    torch._check_value(
        ends.shape[0] == weight.shape[0],
        lambda: f"{ends.shape[0]} ends do not go with {weight.shape[0]} matrices: take one for each expert.",
    )


def _check_outer(x: torch.Tensor, grad: torch.Tensor, ends: torch.Tensor) -> None:
    if x.dim() != 2 or grad.dim() != 2:
        raise ValueError(
            f"a grouped outer product of {x.dim()} and {grad.dim()} dimensions cannot be: take rows [rows, in] and "
            "[rows, out]."
        )
    torch._check_value(
        x.shape[0] == grad.shape[0],
        lambda: f"{x.shape[0]} and {grad.shape[0]} rows do not go together: take as many.",
    )
    _check_rest(x, grad, ends)


def _check_rest(x: torch.Tensor, other: torch.Tensor, ends: torch.Tensor) -> None:
    if x.dtype not in DTYPES or other.dtype != x.dtype:
        found = ", ".join(str(t.dtype).removeprefix("torch.") for t in (x, other))
        raise ValueError(f"{found} are not multiplied by experts: take one of fp32, fp16 and bf16 for both.")
    if ends.dim() != 1 or ends.dtype != torch.int32:
        raise ValueError(
            f"ends of {str(ends.dtype).removeprefix('torch.')} and {ends.dim()} dimensions cannot be: take those of "
            "permute_experts, int32[experts]."
        )
    torch._check_value(ends.shape[0] >= 1, lambda: "no expert cannot be: take one at least.")
