"""Operators that add to a tensor what is made: a product of matrices, and rows. Gradients of several micro-batches gather so.

Made first and added then, a weight's gradient is written, read, and its sum read and written: on a CPU, where a micro-batch
has few rows, that takes longer than the product itself, and all gradients of a backward are there beside their sums.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

torch.library.define("dspass::add_product_", "(Tensor(a!) total, Tensor left, Tensor right) -> ()")
torch.library.define("dspass::add_rows_", "(Tensor(a!) total, Tensor mask, Tensor index, Tensor values) -> ()")


@torch.library.impl("dspass::add_product_", "CompositeExplicitAutograd")
def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """``total`` (m, n) += ``left`` (m, k) @ ``right`` (k, n), in the BLAS itself."""
    total.addmm_(left, right)


@torch.library.impl("dspass::add_rows_", "CompositeExplicitAutograd")
def _add_rows(total: torch.Tensor, mask: torch.Tensor, index: torch.Tensor, values: torch.Tensor) -> None:
    """``total[index[...]] += values[...]`` where ``mask`` is true; elsewhere the index may be any. A row that occurs again is
    added to again. ``total`` is (n, ...), ``values`` have the shape of ``index`` and behind it that of a row, and ``mask``
    broadcasts to it."""
    rows = total.shape[0]
    total.index_put_((index.clamp(-rows, rows - 1),), torch.where(mask, values, 0), accumulate=True)


@torch.library.register_fake("dspass::add_product_")
def _(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    torch._check(tuple(total.shape) == (left.shape[0], right.shape[1]), lambda: f"{left.shape} @ {right.shape}")


@torch.library.register_fake("dspass::add_rows_")
def _(total: torch.Tensor, mask: torch.Tensor, index: torch.Tensor, values: torch.Tensor) -> None:
    torch._check(values.shape == index.shape + total.shape[1:], lambda: f"{values.shape} for {index.shape}")


ADD_PRODUCT = torch.ops.dspass.add_product_.default
ADD_ROWS = torch.ops.dspass.add_rows_.default


@register_flop_formula(torch.ops.dspass.add_product_)
def _operations(total: Any, left: Any, right: Any, *, out_shape: Any = None, **_: Any) -> int:
    return int(2 * left[0] * left[1] * right[1])


__all__ = ["ADD_PRODUCT", "ADD_ROWS"]
