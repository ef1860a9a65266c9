"""AdamW over many tensors at once, in one pass over their memory (Loshchilov and Hutter, Decoupled weight decay, 2019).

A step reads a parameter, its gradient and two states and writes three of them, so that it is bound by memory: one kernel for
many tensors reads and writes each once. States are fp32. Parameters and gradients are fp32 or bf16, each as it likes.

**Stochastic rounding.** A parameter in bf16 loses an update below half of its last bit, every time. With ``seed`` it is rounded
up with the probability of what would be cut off, so that its expectation is exact (Gupta et al., Deep learning with limited
numerical precision, 2015): 16 random bits are added to the fp32 value, whose upper half is kept. They are a hash of the seed,
the step, the number of the tensor in its list and that of the value in its tensor: no state, the same in whatever order values
are computed, another one for each step. The hash is ``lowbias32`` (Wellons, Prospecting for hash functions, 2018), applied to
32 bits after another. Copies of one parameter on several ranks stay equal with one seed; shards of one should have a seed each.
Values that are not finite are converted as usual.

All arithmetic is fp32, each operation rounded once, with coefficients that are computed in fp64 and rounded once, so that the
kernel (``cuda_src/portable/adamw.cuh``) and this reference agree to the last bit. ``torch.optim.AdamW`` differs by roundings:
it divides by the root of the second bias correction, where here its inverse is a factor.

Dropped: a step as a tensor on the device, whose powers of beta a kernel would round otherwise than the host: so a step that is
captured in a CUDA graph repeats its number. Dropped: Philox, some ten times the arithmetic for bits that only have to be
unbiased. Dropped: parameters that are not contiguous: values are numbered as they lie in memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch

from dspass.runtime.operators import operator

DTYPES = (torch.float32, torch.bfloat16)

_Bits = TypeVar("_Bits", int, torch.Tensor)
_LOW = 0xFFFFFFFF


def _fake(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    seed: int | None = None,
) -> None:
    _check(params, grads, exp_avgs, exp_avg_sqs, step, beta1, beta2)


@operator(
    "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, SymInt step, "
    "float lr, float beta1, float beta2, float eps, float weight_decay, SymInt? seed=None) -> ()",
    fake=_fake,
)
def adamw_(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    seed: int | None = None,
) -> None:
    """Step number ``step``, from 1, of all ``params``, in place; ``exp_avgs`` and ``exp_avg_sqs`` begin as zeros.

    Parameters and states are contiguous, one shape a parameter. ``seed``, of 64 bits, rounds bf16 parameters stochastically;
    without it they are rounded to nearest. To be called under ``torch.no_grad()``.
    Raises ``ValueError`` for lists, shapes, dtypes and numbers that cannot be.
    """
    _check(params, grads, exp_avgs, exp_avg_sqs, step, beta1, beta2)
    size = lr / (1 - beta1**step)
    over = 1 / math.sqrt(1 - beta2**step)
    for number, (param, given, exp_avg, exp_avg_sq) in enumerate(
        zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)
    ):
        grad = given.float()
        exp_avg.copy_(exp_avg + (grad - exp_avg) * (1 - beta1))
        exp_avg_sq.copy_(exp_avg_sq * beta2 + grad * grad * (1 - beta2))
        # A square root that is rounded once. On a CPU torch's, of fp32, is MKL's, which is not; in fp64 none is near a tie.
        root = exp_avg_sq.double().sqrt().float()
        whole = param.float() * (1 - lr * weight_decay) - exp_avg * size / (root * over + eps)
        if seed is not None and param.dtype is torch.bfloat16:
            index = torch.arange(param.numel(), device=param.device).view(param.shape)
            whole = rounded(whole, key_of(seed, step, number), index)
        param.copy_(whole)


# -- random bits ---------------------------------------------------------------------------------------------------------


def _mix(bits: _Bits) -> _Bits:
    """``lowbias32`` of 32 bits, or of a tensor of them in ``int64``."""
    bits = (bits ^ bits >> 16) * 0x7FEB352D & _LOW
    bits = (bits ^ bits >> 15) * 0x846CA68B & _LOW
    return bits ^ bits >> 16


def key_of(seed: int, step: int, number: int) -> int:
    """32 bits for one tensor in one step."""
    key = 0
    for part in (number, step, seed >> 32, seed):
        key = _mix(part & _LOW ^ key)
    return key


def rounded(values: torch.Tensor, key: int, index: torch.Tensor) -> torch.Tensor:
    """fp32 ``values`` as bf16, stochastically, of which ``index``, ``int64``, says what number each has in its tensor."""
    random = _mix(index & _LOW ^ _mix(index >> 32 ^ key)) & 0xFFFF
    # A carry goes on into the exponent, as it has to.
    bits = (values.view(torch.int32).long() & _LOW) + random & 0xFFFF0000
    whole = (bits - (bits >> 31 << 32)).to(torch.int32).view(torch.float32)
    return torch.where(values.isfinite(), whole, values).to(torch.bfloat16)


# -- what cannot be ------------------------------------------------------------------------------------------------------


def _check(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    step: int,
    beta1: float,
    beta2: float,
) -> None:
    counts = [len(tensors) for tensors in (params, grads, exp_avgs, exp_avg_sqs)]
    if len(set(counts)) != 1:
        raise ValueError(f"lists of {counts} tensors do not go together: take a gradient and two states a parameter.")
    if step < 1:
        raise ValueError(f"step {step} cannot be: the first one is 1.")
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"betas of {beta1} and {beta2} cannot be: each is at least 0 and below 1.")
    for param, grad, *states in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        if param.dtype not in DTYPES or grad.dtype not in DTYPES or any(s.dtype is not torch.float32 for s in states):
            found = ", ".join(str(t.dtype).removeprefix("torch.") for t in (param, grad, *states))
            raise ValueError(f"{found} cannot be stepped: take fp32 or bf16, gradients too, and states of fp32.")
        if any(t.shape != param.shape for t in (grad, *states)):
            found = ", ".join(str(list(t.shape)) for t in (param, grad, *states))
            raise ValueError(f"shapes {found} differ: a parameter, its gradient and its states have one.")
        if not all(t.is_contiguous() for t in (param, *states)):
            raise ValueError(
                f"a parameter of shape {list(param.shape)}, or a state of it, is not contiguous: make it so first."
            )
