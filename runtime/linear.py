"""``dspass::linear``: a product of fp32 matrices on the CPU by oneDNN instead of the BLAS that torch was built with.

torch sends fp32 products to MKL. On an AMD EPYC with AVX-512 oneDNN was 8 to 10 % faster at a GPT's shapes (1536 rows, width
408, one thread), for the forward's ``x @ w.T`` and for the gradient ``dy @ w`` alike; the weight may be a view, and is not
copied. oneDNN would copy a transposed left operand, as in a weight's gradient ``dy.T @ x``, and loses by it what it wins: so
such products stay where they are.

Dropped: timing both at compile time and taking the faster. Ranks, and runs, would then differ in the last bits.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from dspass.runtime import compat, cpu

torch.library.define("dspass::linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


@torch.library.impl("dspass::linear", "CPU")
def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``x`` (m, k) times ``weight`` (n, k), transposed, plus ``bias`` (n): (m, n)."""
    return compat.onednn_linear(x, weight, bias)


@torch.library.register_fake("dspass::linear")
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


@register_flop_formula(torch.ops.dspass.linear)
def _operations(x: Any, weight: Any, bias: Any, *, out_shape: Any = None, **_: Any) -> int:
    return int(2 * x[0] * x[1] * weight[0])


LINEAR = torch.ops.dspass.linear.default


def pays() -> bool:
    """Whether this CPU is of the kind that was measured; on others torch's own choice stands."""
    return compat.has_onednn() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def least_operations() -> float:
    """From how many operations on a product pays that writes into a tensor of its own, which is copied."""
    if not pays():
        return math.inf
    return 2e8 if cpu.halves_avx512() else 0


def least_outer_operations() -> float:
    """The same of ``x.T @ y``, whose left operand is copied as well."""
    return math.inf if not pays() or cpu.halves_avx512() else 0
