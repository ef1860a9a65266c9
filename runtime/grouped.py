"""The products of a mixture of experts: rows in the order of experts, each expert's rows times its own matrix.

:func:`grouped_product` is the forward and the gradient of its rows, :func:`grouped_outer` the gradient of its matrices; the two
are each other's gradients, so that those of any order are made of them. ``ends`` are those of
:func:`dspass.runtime.experts.permute_experts`. They are values, not shapes: a graph with these operators serves every routing.

**On a CPU** experts take turns, and what remains is to give the library products that it is fast at. fp32 goes to oneDNN where
:func:`dspass.runtime.linear.pays`, bf16 and fp16 as well, through fp32 where the CPU has no product of theirs. oneDNN generates
code for each number of rows, most of a millisecond for products that take a tenth of that, and routing brings new numbers in
each step. So rows are rounded up to five significant bits: a product reads a few rows of the next expert too, what it makes of
them is dropped or written over by that expert, and an octave of rows is 16 shapes, of which oneDNN keeps 1024. A gradient of
matrices, where rows are what is summed over, has zeros there instead. ``benchmarks/results/grouped-cpu.md`` has the figures.

**On a GPU** bf16 goes to ``torch._grouped_mm`` where matrices lie as it wants them, without waiting for the device; the rest is
the loop over experts, which reads ``ends`` first. No GPU has run this yet.

Dropped: ``torch._grouped_mm`` on a CPU. It is the same loop over ``mm``, in C++, 1 to 2 % faster than in Python, but by MKL in
fp32 and without rounded rows; it wants strides of 16 bytes, leaves rows behind the last end as they were, and its meta function
takes bf16 alone. Dropped: experts of equal counts as one batched product: counts are equal by accident only. Dropped: weights
gathered for each row, or for each tile of rows, which reads them as many times.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

from dspass.runtime import compat, linear
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


def _product_by_expert(
    x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor, *, by_onednn: bool, is_rounded: bool
) -> torch.Tensor:
    rows = x.shape[0]
    out = x.new_empty((rows, weight.shape[2]))
    if not x.numel() or not out.numel():
        return out.zero_()
    end = 0
    for expert, begin, end in _spans(ends, rows):
        if begin == end:
            continue
        width = min(_rounded(end - begin), rows) if is_rounded else end - begin
        first = min(begin, rows - width)  # the last experts read rows before theirs instead
        some = x[first : first + width]
        if by_onednn:
            found = compat.onednn_linear(some.float(), weight[expert].t().float(), None)
        elif first == begin:
            torch.mm(some, weight[expert], out=out[begin : begin + width])  # those to come write over what is not its
            continue
        else:
            found = torch.mm(some, weight[expert])
        out[begin:end] = found[begin - first : end - first]
    out[end:].zero_()
    return out


def _outer_by_expert(
    x: torch.Tensor, grad: torch.Tensor, ends: torch.Tensor, *, by_onednn: bool, is_rounded: bool
) -> torch.Tensor:
    out = x.new_empty((ends.shape[0], x.shape[1], grad.shape[1]))
    if not out.numel():
        return out
    spans = list(_spans(ends, x.shape[0]))
    most = max(_rounded(end - begin) for _, begin, end in spans)
    rooms = [part.new_empty((most, part.shape[1])) for part in (x, grad)] if is_rounded else []
    for expert, begin, end in spans:
        if begin == end:
            out[expert].zero_()
            continue
        left, right = x[begin:end], grad[begin:end]
        if is_rounded and (width := _rounded(end - begin)) > end - begin:
            left, right = (_filled(part, room[:width]) for part, room in zip((left, right), rooms, strict=True))
        if by_onednn:
            out[expert] = compat.onednn_linear(left.t().float(), right.t().float(), None)
        else:
            torch.mm(left.t(), right, out=out[expert])
    return out


def _spans(ends: torch.Tensor, rows: int) -> Iterator[tuple[int, int, int]]:
    """Each expert with its first row and the one behind its last."""
    begin = 0
    for expert, end in enumerate(ends.tolist()):
        if not begin <= end <= rows:
            raise ValueError(
                f"expert {expert} ends at row {end} behind {begin}, of {rows} rows: take ends that do not decrease."
            )
        yield expert, begin, end
        begin = end


def _rounded(rows: int) -> int:
    """Up to five significant bits: at most a sixteenth more, some 2 % on average."""
    step = 1 << max(rows.bit_length() - 5, 0)
    return -(-rows // step) * step


def _filled(part: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
    """``room`` with ``part``, and zeros behind it."""
    room[: part.shape[0]] = part
    room[part.shape[0] :].zero_()
    return room


# -- devices -------------------------------------------------------------------------------------------------------------


def _ways_of(dtype: torch.dtype) -> dict[str, bool]:
    """How this CPU multiplies matrices of ``dtype`` best."""
    is_own = compat.multiplies_by_onednn(dtype)  # torch.mm is oneDNN's
    by_onednn = not is_own and linear.pays()
    return {"by_onednn": by_onednn, "is_rounded": is_own or by_onednn}


def by_onednn(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies them by oneDNN, which torch itself would not."""
    return _ways_of(dtype)["by_onednn"]


_PLAIN = {"by_onednn": False, "is_rounded": False}


@implement("grouped_product", "CPU")
def _product_on_cpu(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    _check_product(x, weight, ends)
    return _product_by_expert(x, weight, ends, **_ways_of(x.dtype))


@implement("grouped_outer", "CPU")
def _outer_on_cpu(x: torch.Tensor, grad: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    _check_outer(x, grad, ends)
    return _outer_by_expert(x, grad, ends, **_ways_of(x.dtype))


@implement("grouped_product", "CUDA")
def _product_on_cuda(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    _check_product(x, weight, ends)
    if not x.numel() or not weight.numel() or not compat.multiplies_grouped(x, weight):
        return _product_by_expert(x, weight, ends, **_PLAIN)
    behind = torch.arange(x.shape[0], device=x.device)[:, None] >= ends[-1]
    return compat.grouped_product(x, weight, ends).masked_fill_(behind, 0)


@implement("grouped_outer", "CUDA")
def _outer_on_cuda(x: torch.Tensor, grad: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    _check_outer(x, grad, ends)
    if not x.numel() or not grad.numel() or not compat.multiplies_grouped(x.t(), grad):
        return _outer_by_expert(x, grad, ends, **_PLAIN)
    return compat.grouped_product(x.t(), grad, ends)


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
