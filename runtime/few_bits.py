"""Matrices whose rows are stored in few bits, and products with them.

A weight ``(rows, columns)`` is stored row by row in groups of ``group`` columns, each with one fp32 scale, by
:func:`dspass.runtime.quantise.quantise`; what is missing to a row's last group is filled up with zeros. One group a row is
scaling per output channel (W8A16, as in LLM.int8; Dettmers et al., 2022), shorter ones per group (ZeroQuant; Yao et al., 2022).
Nothing but codes and scales is kept: a product reads a quarter to a half of bf16's bytes.

How a product is computed on a CPU depends on what is fastest there, and its docstring says which sums are rounded where.
Dropped: a product per format in C++ for CPUs. A CPU is where this project is tried and tested, and int8, the one format that
torch brings kernels for, is the one that is faster there than bf16; the others save memory and cost time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils.flop_counter import register_flop_formula

from dspass.runtime import compat, cutlass, quantise
from dspass.runtime.formats import GRAIN, format_of
from dspass.runtime.operators import OPERATORS, implement, operator

#: Rows of the other operand that a kernel of ``cuda_src/portable/linear.cuh`` takes at most.
MOST_ROWS = 16

#: Rows of the other operand up to which torch's int8 product was faster than one with the weight written out, on an AMD EPYC.
FEW_ROWS = 4


def group_of(columns: int, group: int | None) -> int:
    """Values that share a scale in rows of ``columns``: ``group``, or a whole row, as a multiple of what a block must be."""
    whole = -(-columns // GRAIN) * GRAIN
    return whole if group is None else min(group, whole)


def quantise_rows(x: torch.Tensor, format: str, group: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a matrix ``x``, fp32, fp16 or bf16, ``uint8[rows, bytes of a row]`` codes and ``float32[rows, groups]`` scales.

    Raises ``ValueError`` for a format or a group that cannot be, and for values that are not real floating numbers.
    """
    rows, columns = x.shape
    block = group_of(columns, group)
    groups = quantise.blocks_of(columns, block)
    filled = _widened(x, groups * block)
    codes, scales = torch.ops.dspass.quantise(filled, format, block)
    return codes.view(rows, -1), scales.view(rows, groups)


def _dequantise_rows_fake(
    codes: torch.Tensor, scales: torch.Tensor, columns: int, format: str, dtype: torch.dtype
) -> torch.Tensor:
    return codes.new_empty((*codes.shape[:-1], columns), dtype=dtype)


@operator(
    "dequantise_rows(Tensor codes, Tensor scales, SymInt columns, str format, ScalarType dtype) -> Tensor",
    fake=_dequantise_rows_fake,
)
def dequantise_rows(
    codes: torch.Tensor, scales: torch.Tensor, columns: int, format: str, dtype: torch.dtype
) -> torch.Tensor:
    """Rows ``(..., columns)`` of ``dtype`` from codes ``(..., bytes of a row)`` and scales ``(..., groups)``."""
    values = _groups(codes, scales, format) * scales[..., None]
    return values.flatten(-2)[..., :columns].to(dtype).contiguous()


def _few_rows_linear_fake(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, format: str
) -> torch.Tensor:
    _check_rows(x)
    return x.new_empty((x.shape[0], codes.shape[0]))


@operator(
    "few_rows_linear(Tensor x, Tensor codes, Tensor scales, Tensor? bias, str format) -> Tensor",
    fake=_few_rows_linear_fake,
)
def few_rows_linear(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, format: str
) -> torch.Tensor:
    """``x`` (m, columns), fp32, fp16 or bf16, of :data:`MOST_ROWS` rows at most, times the weight (n, columns) of ``codes`` and
    ``scales``, transposed, plus ``bias`` (n): (m, n). The weight is rounded to ``x``'s dtype and multiplied as any other.

    It is what a kernel computes from codes. Its weights are the same to the last bit, sums are fp32 and in another order than
    here: they differ by ``columns * 2**-23`` times the sum of magnitudes of the products at most.

    Raises ``ValueError`` for more rows.

    Dropped: a kernel for :func:`quantised_linear` itself, which would have to write the weight out and multiply where there
    are more rows: what is not in the graph no plan counts, and the stable ABI has no product with a bias.
    """
    _check_rows(x)
    return _with_weight_written_out(x, codes, scales, bias, x.shape[1], format)


def _mixed_product_fake(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, format: str) -> torch.Tensor:
    return x.new_empty((x.shape[0], codes.shape[0]))


@operator("mixed_product(Tensor x, Tensor codes, Tensor scales, str format) -> Tensor", fake=_mixed_product_fake)
def mixed_product(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, format: str) -> torch.Tensor:
    """``x`` (m, columns), fp32, fp16 or bf16, times the weight (n, columns) of ``codes`` and ``scales``, transposed: (m, n).
    The weight is rounded to ``x``'s dtype and multiplied as any other.

    On an NVIDIA GPU whose library of CUTLASS's products is built tensor cores read the codes, of int8 and int4, where it takes
    them (``cuda_src/cutlass/mixed.cu``); for sm_80 they scale the sums instead of the weight. :func:`quantised_linear` does not
    go here: a product that has never run must not be what a person gets unasked. ``python -m benchmarks kernels`` does.
    """
    return _with_weight_written_out(x, codes, scales, None, x.shape[1], format)


@implement("mixed_product", "CUDA")
def _mixed_product_on_cuda(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, format: str) -> torch.Tensor:
    found = cutlass.mixed(x, codes, scales, format)
    return mixed_product(x, codes, scales, format) if found is None else found


def _check_rows(x: torch.Tensor) -> None:
    if statically_known_true(x.shape[0] > MOST_ROWS):
        raise ValueError(
            f"x of {x.shape[0]} rows is not for few_rows_linear, which takes {MOST_ROWS}: call quantised_linear."
        )


def _quantised_linear_fake(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    columns: int,
    format: str,
    dynamic: bool = False,
) -> torch.Tensor:
    _check(x, scales, columns, format, dynamic)
    return x.new_empty((x.shape[0], codes.shape[0]))


@operator(
    "quantised_linear(Tensor x, Tensor codes, Tensor scales, Tensor? bias, SymInt columns, str format, bool dynamic=False) "
    "-> Tensor",
    fake=_quantised_linear_fake,
)
def quantised_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    columns: int,
    format: str,
    dynamic: bool = False,
) -> torch.Tensor:
    """``x`` (m, columns) times the weight (n, columns) of ``codes`` and ``scales``, transposed, plus ``bias`` (n): (m, n).

    The weight is rounded to ``x``'s dtype and multiplied as any other, up to :data:`MOST_ROWS` rows by a kernel where one is
    registered for :func:`few_rows_linear`. But up to :data:`FEW_ROWS` rows of bf16 or fp16 on a CPU are multiplied with int8
    codes as they are, and the sums scaled by the row's scale in ``x``'s dtype.

    ``dynamic``: the rows of ``x`` are rounded to int8 too, each by its largest magnitude, multiplied as integers, summed
    exactly, and scaled in fp32. A row of ``x`` with a NaN or an infinity becomes NaNs.

    Raises ``ValueError`` where ``x`` has other columns, and for ``dynamic`` products with weights that are not int8 with one
    scale a row.
    """
    _check(x, scales, columns, format, dynamic)
    if dynamic:
        return _integer_product(x, codes, scales, bias)
    if _has_kernel(x, x.device.type):
        found: torch.Tensor = torch.ops.dspass.few_rows_linear(x, codes, scales, bias, format)
        return found
    if reads_codes(x, scales, x.device.type, format):
        found = torch.ops.dspass.int8_product(_widened(x, codes.shape[1]), codes, scales[:, 0].to(x.dtype))
        return found if bias is None else found + bias
    return _with_weight_written_out(x, codes, scales, bias, columns, format)


def _with_weight_written_out(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, columns: int, format: str
) -> torch.Tensor:
    # A kernel is called; where there is none the reference is traced, and Inductor's to fuse.
    by_kernel = OPERATORS["dequantise_rows"].server(x.device.type) == "kernel"
    write_out = torch.ops.dspass.dequantise_rows if by_kernel else dequantise_rows
    weight = write_out(codes, scales, columns, format, x.dtype).t()
    return x @ weight if bias is None else torch.addmm(bias, x, weight)


# Opaque to Inductor: its own lowering of torch's operator (up to 2.13) takes no operand that it has yet to compute.
torch.library.define("dspass::int8_product", "(Tensor x, Tensor codes, Tensor scales) -> Tensor")


@torch.library.impl("dspass::int8_product", "CPU")
def _int8_product(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return compat.int8_product(x, codes.view(torch.int8), scales)


@torch.library.register_fake("dspass::int8_product")
def _(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return x.new_empty((x.shape[0], codes.shape[0]))


def _check(x: torch.Tensor, scales: torch.Tensor, columns: int, format: str, dynamic: bool) -> None:
    if x.shape[1] != columns:
        raise ValueError(
            f"x of {x.shape[1]} columns is not multiplied with a weight of {columns}: take one of as many."
        )
    if dynamic and not _is_int8_by_row(scales, format):
        raise ValueError(
            "activations are rounded for int8 weights with one scale a row alone: leave the group size out."
        )


def rounds_both(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, device: str, format: str) -> bool:
    """Whether a ``dynamic`` product of ``x`` with a weight can be computed on ``device``."""
    return _is_int8_by_row(scales, format) and compat.multiplies_integers(
        device, x.shape[0], codes.shape[1], codes.shape[0]
    )


def reads_codes(x: torch.Tensor, scales: torch.Tensor, device: str, format: str) -> bool:
    """Whether a product of ``x`` with a weight on ``device`` writes no weight out. Of a number of rows that is not known when a
    graph is compiled it says so only where its bounds do: to ask for more would add a guard."""
    if _has_kernel(x, device):
        return True
    by_row = device == "cpu" and _is_int8_by_row(scales, format) and compat.has_int8_product(x.dtype)
    return by_row and statically_known_true(x.shape[0] <= FEW_ROWS)


def _has_kernel(x: torch.Tensor, device: str) -> bool:
    few = statically_known_true(x.shape[0] <= MOST_ROWS)
    return few and x.dtype in quantise.DTYPES and OPERATORS["few_rows_linear"].server(device) == "kernel"


def _is_int8_by_row(scales: torch.Tensor, format: str) -> bool:
    return format == "int8" and scales.shape[-1] == 1


def _integer_product(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    left, of_left = quantise.encode(_widened(x, codes.shape[1]), format_of("int8"))
    sums = compat.integer_product(left.view(torch.int8), codes.view(torch.int8))
    found = sums.float() * of_left[:, None] * scales[:, 0]
    return (found if bias is None else found + bias.float()).to(x.dtype)


def _widened(x: torch.Tensor, columns: int) -> torch.Tensor:
    """With zeros to its right, as rows of codes have."""
    return F.pad(x, (0, columns - x.shape[1])) if columns != x.shape[1] else x


def _groups(codes: torch.Tensor, scales: torch.Tensor, format: str) -> torch.Tensor:
    """Codes as fp32 values, not yet scaled: ``(..., groups, group)``."""
    groups = scales.shape[-1]
    return quantise.decode(codes.unflatten(-1, (groups, codes.shape[-1] // groups)), format_of(format))


@register_flop_formula([torch.ops.dspass.quantised_linear, torch.ops.dspass.few_rows_linear])
def _operations(x: Sequence[int], codes: Sequence[int], *_: Any, **__: Any) -> int:
    return int(2 * x[0] * x[1] * codes[0])


DEQUANTISE_ROWS = torch.ops.dspass.dequantise_rows.default
QUANTISED_LINEAR = torch.ops.dspass.quantised_linear.default
