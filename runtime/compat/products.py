"""Matrix products that torch has under private names only: oneDNN's, grouped ones, and those of int8."""

from __future__ import annotations

import functools
from typing import Any

import torch


@functools.cache
def has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``x @ weight.T + bias`` by oneDNN; ``weight`` may have any strides."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@functools.cache
def multiplies_by_onednn(dtype: torch.dtype) -> bool:
    """Whether ``torch.mm`` of 16-bit ``dtype`` on this CPU is oneDNN's; torch's own is some ten times slower."""
    if not has_onednn():
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype is torch.float16 and bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def multiplies_grouped(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether :func:`grouped_product` takes these as they lie, on a GPU bf16 alone, and answers without gaps: one of the last
    two dimensions has none, all else is at multiples of 16 bytes, as rows of the result are laid."""

    def lies_well(matrix: torch.Tensor) -> bool:
        *rest, row, column = matrix.stride()
        others = [*rest, column if row == 1 else row]
        aligned = all(stride * matrix.itemsize % 16 == 0 for stride in others) and matrix.data_ptr() % 16 == 0
        return 1 in (row, column) and aligned and others[-1] >= max(matrix.shape[-1 if column == 1 else -2], 1)

    dtypes = {torch.bfloat16} if left.is_cuda else {torch.float32, torch.float16, torch.bfloat16}
    fits = left.dtype in dtypes and right.shape[-1] * right.itemsize % 16 == 0
    return fits and all(map(lies_well, (left, right)))


def grouped_product(left: torch.Tensor, right: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Of rows ``left`` by matrices ``right``, or, both 2-D, of columns by rows: an expert's each. What no expert has is not
    written."""
    return torch._grouped_mm(left, right, offs=ends)


def has_int8_product(dtype: torch.dtype) -> bool:
    """Whether torch brings a kernel for products of ``dtype`` with int8 weights on CPUs. Its fp32 one is slow: not counted."""
    return dtype in (torch.bfloat16, torch.float16)


def int8_product(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """``x`` (m, k) times int8 ``weight`` (n, k), transposed, times ``scales`` (n) of ``x``'s dtype: (m, n)."""
    return torch.ops.aten._weight_int8pack_mm(x, weight, scales)


def multiplies_integers(device: str, rows: Any, inner: int, columns: int) -> bool:
    """Whether :func:`integer_product` takes int8 matrices of these sizes on ``device``. CUDA's kernels want more than 16 rows
    and multiples of 8; an unknown number of rows may be less."""
    if device == "cpu":
        return True
    return isinstance(rows, int) and rows > 16 and inner % 8 == 0 and columns % 8 == 0


def integer_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """int8 ``x`` (m, k) times int8 ``weight`` (n, k), transposed: ``int32`` (m, n), exact."""
    return torch._int_mm(x, weight.t())
