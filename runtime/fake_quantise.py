"""Values that are rounded to few bits and kept in their own precision, for training that learns to live with it.

A value ``x`` becomes the nearest multiple of its scale, and its gradient goes past the rounding as if it were not there: the
straight-through estimator (Bengio et al., Estimating or propagating gradients through stochastic neurons, 2013; Jacob et al.,
Quantization and training of neural networks for integer-arithmetic-only inference, 2018). With scales from the largest
magnitude nothing is clipped, so there is no value whose gradient would have to stop.

The arithmetic is that of :mod:`dspass.runtime.quantise`, operation by operation: with 8 or 4 bits, symmetric, what training
reads is to the last bit what :func:`dspass.runtime.few_bits.dequantise_rows` reads of the same values once they are stored.
Like there, what shares its scale with a NaN or an infinity comes back as NaNs.

How many bits is a matter of the step, and a graph is compiled once: :func:`levels` answers the largest multiple, a number, in
each call, from the optimiser steps that the engine has counted; 0 leaves values as they are, to the last bit. It is the whole
state of the schedule: nothing is set between steps, and nothing has to be saved beside the number of the step.

Dropped: a buffer of the graph that a hook sets. AOTAutograd wants to know where each input of a graph comes from, and the
hook would have to know all graphs. Dropped: bits as an integer argument, which would compile the model anew for each.
Dropped: DeepSpeed's scale, ``2 * largest / 2**bits``, which clips the largest value by a step, and its third rule for 2 bits
(Li et al., Ternary weight networks, 2016): no stored format is rounded so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dspass.runtime.operators import differentiable, operator
from dspass.runtime.params import lookup
from dspass.runtime.quantise import DTYPES, SMALLEST


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Whole for ``offset`` optimiser steps, then ``start_bits``, and one bit less after ``period`` steps, twice, four times as
    many, down to ``target_bits``: the schedule of DeepSpeed's Mixture of Quantization."""

    offset: int
    start_bits: int
    target_bits: int
    period: int = 1

    def bits(self, step: int) -> int | None:
        """Of the forward behind ``step`` optimiser steps; None where values are whole."""
        if step < self.offset:
            return None
        fallen = ((step - self.offset) // self.period).bit_length()
        return max(self.start_bits - fallen, self.target_bits)


# Opaque to Inductor, which must not take it for a constant.
torch.library.define(
    "dspass::levels", "(str key, int offset, int start_bits, int target_bits, int period, Device device) -> Tensor"
)


@torch.library.impl("dspass::levels", "CompositeExplicitAutograd")
def levels(key: str, offset: int, start_bits: int, target_bits: int, period: int, device: torch.device) -> torch.Tensor:
    """The largest integer that values are rounded to now, ``float32[]``, and 0 while they are whole: 127 for 8 bits. ``key``
    is that of a parameter, whose engine counts the steps of a :class:`Schedule`."""
    schedule = Schedule(offset=offset, start_bits=start_bits, target_bits=target_bits, period=period)
    bits = schedule.bits(lookup(key).engine.steps)
    return torch.full((), 0.0 if bits is None else 2.0 ** (bits - 1) - 1, device=device)


@torch.library.register_fake("dspass::levels")
def _(key: str, offset: int, start_bits: int, target_bits: int, period: int, device: torch.device) -> torch.Tensor:
    return torch.empty((), device=device)


def _fake_quantise_fake(
    x: torch.Tensor, levels: torch.Tensor, over: Sequence[int], symmetric: bool = True
) -> torch.Tensor:
    _check(x, over)
    return torch.empty_like(x)


@operator("fake_quantise(Tensor x, Tensor levels, int[] over, bool symmetric=True) -> Tensor", fake=_fake_quantise_fake)
def fake_quantise(x: torch.Tensor, levels: torch.Tensor, over: Sequence[int], symmetric: bool = True) -> torch.Tensor:
    """``x``, fp32, fp16 or bf16, rounded to multiples of scales, which values share ``over`` these dims, from ``-levels`` to
    ``levels`` times; in ``x``'s precision. ``levels`` is ``float32[]``; with 0 it is ``x`` as it is.

    Not ``symmetric``: ``2 * levels + 2`` multiples, from the smallest value, or zero, to the largest, or zero.

    Raises ``ValueError`` for values that are not real floating numbers, and where no dim is given.
    """
    _check(x, over)
    values = x.float()
    if symmetric:
        most = values.abs().amax(over, keepdim=True).clamp_min(SMALLEST)
        rounded = (values * (most.reciprocal() * levels)).round() * (most * levels.reciprocal())
    else:
        low, high = values.amin(over, keepdim=True).clamp_max(0), values.amax(over, keepdim=True).clamp_min(0)
        most, steps = (high - low).clamp_min(SMALLEST), 2 * levels + 1
        inverse = most.reciprocal() * steps
        zero = (low * inverse).round()
        rounded = (values * inverse).round().clamp(zero, zero + steps) * (most * steps.reciprocal())
    return torch.where(levels > 0, rounded.to(x.dtype), x)


def _check(x: torch.Tensor, over: Sequence[int]) -> None:
    if x.dtype not in DTYPES:
        raise ValueError(
            f"a tensor of {str(x.dtype).removeprefix('torch.')} cannot be rounded to few bits: fp32, fp16 and bf16 can."
        )
    if not over:
        raise ValueError("no dims share a scale: name those that do, such as [-1] for rows.")


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    pass


def _straight_through(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
    return grad, None, None, None


differentiable("fake_quantise", backward=_straight_through, keep=_keep_nothing)

LEVELS = torch.ops.dspass.levels.default
FAKE_QUANTISE = torch.ops.dspass.fake_quantise.default
