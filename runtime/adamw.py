"""AdamW over many tensors at once, in one pass over their memory (Loshchilov and Hutter, Decoupled weight decay, 2019).

A step reads a parameter, its gradient and two states and writes three of them, so that it is bound by memory: one kernel for
many tensors reads and writes each once. Parameters and gradients are fp32 or bf16, each as it likes; states are fp32
(:func:`adamw_`) or of 8 bits (:func:`adamw_8bit_`).

**Stochastic rounding.** A parameter in bf16 loses an update below half of its last bit, every time. With ``seed`` it is rounded
up with the probability of what would be cut off, so that its expectation is exact (Gupta et al., Deep learning with limited
numerical precision, 2015): 16 random bits are added to the fp32 value, whose upper half is kept. They are a hash of the seed,
the step, the number of the tensor in its list and that of the value in its tensor: no state, the same in whatever order values
are computed, another one for each step. The hash is ``lowbias32`` (Wellons, Prospecting for hash functions, 2018), applied to
32 bits after another. Copies of one parameter on several ranks stay equal with one seed; shards of one should have a seed each.
Values that are not finite are converted as usual.

**States of 8 bits** are codes with an fp32 scale for each block of 256 values, as they follow each other in memory (Dettmers et
al., 8-bit optimizers via block-wise quantization, 2022), in two formats that keep precision relative to the value, over the
range that parameters of one block have:

- The first moment is ``fp8_e4m3``, always rounded stochastically, by the other half of the hash's bits. To nearest, a moment
  whose gradients have stopped decays by less than half a step from some ``beta1`` on, and moves its parameter for ever.
- The second is an unsigned float of 5 bits of exponent and 3 of mantissa, rounded to nearest, and never to zero unless it is
  one: its smallest is ``2**-34`` of the block's largest. What became zero would leave an update divided by ``eps``. It is not
  rounded stochastically: in the thousand steps that it remembers, noise would add up to more than the error of half a step.

So a step is off by some 10 % of its length, in no direction of its own, whatever the range of gradients in a block. A NaN or an
infinity in a block of states makes the whole block NaN at its next step: leave out steps whose gradients are not finite, as
loss scaling does.

All arithmetic is fp32, each operation rounded once, with coefficients that are computed in fp64 and rounded once, so that
kernels (``cuda_src/portable/adamw.cuh``) and these references agree to the last bit. ``torch.optim.AdamW`` differs by
roundings: it divides by the root of the second bias correction, where here its inverse is a factor. ``lr`` is a tensor on the
host: a schedule compiles nothing anew.

**On a CPU** whole blocks of 256 values are stepped by what Inductor makes of the reference for any number of them, in one pass
over memory; it is compiled at the first step, for each pair of dtypes. Nothing else would: an operator that writes to its
arguments is called where it stands, and by torch's operators the reference passes over memory some thirty times. The values
behind the last whole block are left to it.

Dropped: a step as a tensor on the device, whose powers of beta a kernel would round otherwise than the host: so a step that is
captured in a CUDA graph repeats its number and its ``lr``. Dropped: Philox, some ten times the arithmetic for bits that only
have to be unbiased. Dropped: parameters that are not contiguous: values are numbered as they lie in memory. Dropped for 8 bits:
linear codes, by which second moments become zeros and updates blow up, or, kept from zero, all but vanish beside large ones;
the paper's dynamic codes, a table to be searched, finer for the largest values of a block, and two to three times as far off
where gradients of one block range over three powers of ten.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F

from dspass.runtime import compat
from dspass.runtime.formats import Format, format_of
from dspass.runtime.operators import implement, operator
from dspass.runtime.quantise import blocks_of, decode, encode

DTYPES = (torch.float32, torch.bfloat16)

#: Values that share a scale in states of 8 bits.
BLOCK = 256
FIRST = format_of("fp8_e4m3")
SECOND = Format(name="unsigned_e5m3", bits=8, largest=122880, exponent=5, mantissa=3)

_Bits = TypeVar("_Bits", int, torch.Tensor)
_LOW = 0xFFFFFFFF

#: Has one tensor stepped: by a step, the tensors it takes, factors, and a key of random bits where it takes one.
_Run = Callable[..., None]


def _as_it_is(step: Callable[..., None], tensors: Sequence[torch.Tensor], *more: Any) -> None:
    step(*tensors, *more)


# -- states of fp32 ------------------------------------------------------------------------------------------------------


def _fake(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    step: int,
    lr: torch.Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    seed: int | None = None,
) -> None:
    _check(params, grads, exp_avgs, exp_avg_sqs)
    _check_numbers(step, lr, beta1, beta2)


@operator(
    "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, SymInt step, "
    "Tensor lr, float beta1, float beta2, float eps, float weight_decay, SymInt? seed=None) -> ()",
    fake=_fake,
)
def adamw_(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    step: int,
    lr: torch.Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    seed: int | None = None,
    *,
    run: _Run = _as_it_is,
) -> None:
    """Step number ``step``, from 1, of all ``params``, in place; ``exp_avgs`` and ``exp_avg_sqs`` begin as zeros.

    Parameters and states are contiguous, one shape a parameter. ``lr`` is one number, fp32 or fp64, on the CPU. ``seed``, of 64
    bits, rounds bf16 parameters stochastically; without it they are rounded to nearest. To be called under ``torch.no_grad()``.
    Raises ``ValueError`` for lists, shapes, dtypes and numbers that cannot be.
    """
    lists = (params, grads, exp_avgs, exp_avg_sqs)
    _fake(*lists, step, lr, beta1, beta2, eps, weight_decay)
    factors = _factors(step, lr, beta1, beta2, eps, weight_decay)
    for number, tensors in enumerate(zip(*lists, strict=True)):
        is_stochastic = seed is not None and tensors[0].dtype is torch.bfloat16
        run(_step, tensors, factors, _key(seed or 0, step, number) if is_stochastic else None)


# -- states of 8 bits ----------------------------------------------------------------------------------------------------


def states_of_8_bits(param: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Those of ``param`` before its first step: ``exp_avg`` as codes ``uint8[blocks, 256]`` and scales ``float32[blocks]``,
    then ``exp_avg_sq``."""
    blocks = blocks_of(param.numel(), BLOCK)

    def state() -> tuple[torch.Tensor, torch.Tensor]:
        codes = torch.zeros((blocks, BLOCK), dtype=torch.uint8, device=param.device)
        return codes, torch.zeros((blocks,), device=param.device)

    return *state(), *state()


def _8bit_fake(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_scales: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    exp_avg_sq_scales: Sequence[torch.Tensor],
    step: int,
    lr: torch.Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    seed: int | None = None,
) -> None:
    _check_8bit(params, grads, exp_avgs, exp_avg_scales, exp_avg_sqs, exp_avg_sq_scales)
    _check_numbers(step, lr, beta1, beta2)


@operator(
    "adamw_8bit_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_scales, "
    "Tensor(d!)[] exp_avg_sqs, Tensor(e!)[] exp_avg_sq_scales, SymInt step, "
    "Tensor lr, float beta1, float beta2, float eps, float weight_decay, SymInt? seed=None) -> ()",
    fake=_8bit_fake,
)
def adamw_8bit_(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_scales: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    exp_avg_sq_scales: Sequence[torch.Tensor],
    step: int,
    lr: torch.Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    seed: int | None = None,
    *,
    run: _Run = _as_it_is,
) -> None:
    """As :func:`adamw_`, with states that :func:`states_of_8_bits` makes.

    A step is computed in fp32, from states as they are stored to states that are rounded behind it. The first moment is rounded
    stochastically without a ``seed`` too, as if it were 0; parameters in bf16 are with one alone.
    Raises ``ValueError`` for lists, shapes, dtypes and numbers that cannot be.
    """
    lists = (params, grads, exp_avgs, exp_avg_scales, exp_avg_sqs, exp_avg_sq_scales)
    _8bit_fake(*lists, step, lr, beta1, beta2, eps, weight_decay)
    factors = _factors(step, lr, beta1, beta2, eps, weight_decay)
    for number, tensors in enumerate(zip(*lists, strict=True)):
        is_stochastic = seed is not None and tensors[0].dtype is torch.bfloat16
        if tensors[0].numel():
            step_one = _step_8bit_stochastic if is_stochastic else _step_8bit
            run(step_one, tensors, factors, _key(seed or 0, step, number))


def _loaded(codes: torch.Tensor, scales: torch.Tensor, format: Format, param: torch.Tensor) -> torch.Tensor:
    values = decode(codes, format) * scales[:, None]
    return values if _is_in_blocks(param) else values.view(-1)[: param.numel()].view(param.shape)


def stored(
    first: torch.Tensor, second: torch.Tensor, random: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes and scales of two states in fp32, by the upper half of the ``random`` bits of each value."""
    noise = (random >> 16).float() * 2.0**-16
    squares = _blocks(second)
    codes, scales = encode(squares, SECOND)
    is_lost = (codes == 0) & (squares > 0) & scales.isfinite()[:, None]
    return *encode(_blocks(first), FIRST, _blocks(noise)), torch.where(is_lost, 1, codes), scales


def packed(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """States in fp32, of one parameter, as those of 8 bits, to nearest: as :func:`states_of_8_bits` has them."""
    return stored(first, second, torch.full_like(first, 1 << 31, dtype=torch.int64))


def unpacked(states: Sequence[torch.Tensor], param: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """States of 8 bits in fp32, of the shape of ``param``."""
    codes1, scales1, codes2, scales2 = states
    return _loaded(codes1, scales1, FIRST, param), _loaded(codes2, scales2, SECOND, param)


def _is_in_blocks(values: torch.Tensor) -> bool:
    """Whether nothing is missing to its last block, whatever the number of rows is."""
    return values.dim() == 2 and values.shape[1] == BLOCK


def _blocks(values: torch.Tensor) -> torch.Tensor:
    if _is_in_blocks(values):
        return values
    flat = values.reshape(-1)
    return F.pad(flat, (0, -flat.shape[0] % BLOCK)).view(-1, BLOCK)


# -- one step of one tensor ----------------------------------------------------------------------------------------------


class _Factors(NamedTuple):
    """What a step multiplies by, each computed in fp64 and rounded once: ``float32[]`` on the CPU."""

    decay: torch.Tensor
    size: torch.Tensor
    over: torch.Tensor
    eps: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor
    rest: torch.Tensor


def _factors(step: int, lr: torch.Tensor, beta1: float, beta2: float, eps: float, weight_decay: float) -> _Factors:
    rate = lr.double()
    more = [1 / math.sqrt(1 - beta2**step), eps, 1 - beta1, beta2, 1 - beta2]
    both = [1 - rate * weight_decay, rate / (1 - beta1**step)]
    return _Factors(*(t.float() for t in both), *torch.tensor(more, dtype=torch.float64).float().unbind())


def _root(squares: torch.Tensor) -> torch.Tensor:
    """A square root that is rounded once. On a CPU torch's, of fp32, is MKL's, which is not; in fp64 none is near a tie."""
    return squares.double().sqrt().float()


def _stepped(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    by: _Factors,
    root: Callable[[torch.Tensor], torch.Tensor] = _root,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The parameter and its two states behind a step, in fp32."""
    grad = grad.float()
    exp_avg = exp_avg + (grad - exp_avg) * by.first
    exp_avg_sq = exp_avg_sq * by.second + grad * grad * by.rest
    step = exp_avg * by.size / (root(exp_avg_sq) * by.over + by.eps)
    return param.float() * by.decay - step, exp_avg, exp_avg_sq


def _step(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    factors: _Factors,
    key: torch.Tensor | None,
    begin: int = 0,
    root: Callable[[torch.Tensor], torch.Tensor] = _root,
) -> None:
    """In place; with a ``key``, ``int64[]``, parameters in bf16 are rounded stochastically. Values are a tensor's from number
    ``begin`` on."""
    whole, first, second = _stepped(param, grad, exp_avg, exp_avg_sq, factors, root)
    exp_avg.copy_(first)
    exp_avg_sq.copy_(second)
    param.copy_(whole if key is None else rounded(whole, _random(param, key, begin)))


def _step_8bit(
    param: torch.Tensor,
    grad: torch.Tensor,
    codes1: torch.Tensor,
    scales1: torch.Tensor,
    codes2: torch.Tensor,
    scales2: torch.Tensor,
    factors: _Factors,
    key: torch.Tensor,
    begin: int = 0,
    root: Callable[[torch.Tensor], torch.Tensor] = _root,
    *,
    is_stochastic: bool = False,
) -> None:
    first, second = _loaded(codes1, scales1, FIRST, param), _loaded(codes2, scales2, SECOND, param)
    whole, first, second = _stepped(param, grad, first, second, factors, root)
    random = _random(param, key, begin)
    for state, made in zip((codes1, scales1, codes2, scales2), stored(first, second, random), strict=True):
        state.copy_(made)
    param.copy_(rounded(whole, random) if is_stochastic else whole)


_step_8bit_stochastic = functools.partial(_step_8bit, is_stochastic=True)


# -- on a CPU ------------------------------------------------------------------------------------------------------------

_compiled: dict[Any, Callable[..., None]] = {}


def _by_blocks(
    step: Callable[..., None], tensors: Sequence[torch.Tensor], factors: _Factors, key: torch.Tensor | None
) -> None:
    """``step`` of a parameter, its gradient and states: whole blocks by compiled code, which knows no other values, and the
    rest by the reference."""
    param, grad, *states = (t.detach() for t in tensors)
    own = [
        s.view(-1) if s.is_floating_point() and s.shape == param.shape else s for s in states
    ]  # those of 8 bits are flat
    tensors = [param.view(-1), grad.reshape(-1), *own]
    count = param.numel()
    blocks, given = count // BLOCK, [*factors, *([] if key is None else [key])]

    def with_lists(*args: torch.Tensor, begin: int = 0, root: Callable[[torch.Tensor], torch.Tensor] = _root) -> None:
        some, more = args[: len(tensors)], args[len(tensors) :]
        keys = more[len(factors) :]
        step(*some, _Factors(*more[: len(factors)]), keys[0] if keys else None, begin, root)

    # One block alone is not worth a call of compiled code.
    whole = blocks * BLOCK if blocks > 1 else 0
    if whole:
        values = tensors if whole == count else [t[:whole] if t.shape[0] == count else t[:blocks] for t in tensors]
        parts = [t.view(blocks, BLOCK) if t.shape[0] == whole else t for t in values]
        name = (step, tensors[0].dtype, tensors[1].dtype, key is not None)
        if name not in _compiled:
            # In compiled code a square root of fp32 is the processor's own, which is rounded once.
            rooted = functools.partial(with_lists, root=torch.sqrt)
            _compiled[name] = compat.compile_for_rows(rooted, [*parts, *given])
        _compiled[name](*parts, *given)
    if whole < count:
        rest = [t[whole // BLOCK :] if t.shape[0] != count else t[whole:] for t in tensors]
        with_lists(*rest, *given, begin=whole)


@implement("adamw_", "CPU")
def _adamw_on_cpu(*args: Any, **more: Any) -> None:
    adamw_(*args, **more, run=_by_blocks)


@implement("adamw_8bit_", "CPU")
def _adamw_8bit_on_cpu(*args: Any, **more: Any) -> None:
    adamw_8bit_(*args, **more, run=_by_blocks)


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


def random_of(key: int | torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """32 bits, in ``int64``, for each value that ``index``, ``int64``, says the number of in its tensor."""
    return _mix(index & _LOW ^ _mix(index >> 32 ^ key))


def _key(seed: int, step: int, number: int) -> torch.Tensor:
    """:func:`key_of`, as a tensor: another one compiles nothing anew."""
    return torch.tensor(key_of(seed, step, number))


def _random(param: torch.Tensor, key: torch.Tensor, begin: int) -> torch.Tensor:
    return random_of(key, torch.arange(begin, begin + param.numel(), device=param.device).view(param.shape))


def rounded(values: torch.Tensor, random: torch.Tensor) -> torch.Tensor:
    """fp32 ``values`` as bf16, stochastically, by the lower half of the ``random`` bits of each."""
    # A carry goes on into the exponent, as it has to.
    bits = (values.view(torch.int32).long() & _LOW) + (random & 0xFFFF) & 0xFFFF0000
    whole = (bits - (bits >> 31 << 32)).to(torch.int32).view(torch.float32)
    return torch.where(values.isfinite(), whole, values).to(torch.bfloat16)


# -- what cannot be ------------------------------------------------------------------------------------------------------


def _check(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
) -> None:
    _check_counts(params, grads, exp_avgs, exp_avg_sqs, states="two states")
    for param, grad, *states in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        if param.dtype not in DTYPES or grad.dtype not in DTYPES or any(s.dtype is not torch.float32 for s in states):
            found = ", ".join(_name(t.dtype) for t in (param, grad, *states))
            raise ValueError(f"{found} cannot be stepped: take fp32 or bf16, gradients too, and states of fp32.")
        if any(t.shape != param.shape for t in (grad, *states)):
            found = ", ".join(str(list(t.shape)) for t in (param, grad, *states))
            raise ValueError(f"shapes {found} differ: a parameter, its gradient and its states have one.")
        _check_contiguous(param, *states)


def _check_8bit(params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor], *lists: Sequence[torch.Tensor]) -> None:
    _check_counts(params, grads, *lists, states="codes and scales of two states")
    for param, grad, *states in zip(params, grads, *lists, strict=True):
        if param.dtype not in DTYPES or grad.dtype not in DTYPES:
            raise ValueError(
                f"{_name(param.dtype)}, {_name(grad.dtype)} cannot be stepped: take fp32 or bf16, gradients too."
            )
        if grad.shape != param.shape:
            raise ValueError(
                f"shapes {list(param.shape)}, {list(grad.shape)} differ: a parameter and its gradient have one."
            )
        blocks = blocks_of(param.numel(), BLOCK)
        wanted = [(torch.uint8, (blocks, BLOCK)), (torch.float32, (blocks,))] * 2
        if any((state.dtype, tuple(state.shape)) != one for state, one in zip(states, wanted, strict=True)):
            found = ", ".join(f"{_name(state.dtype)}{list(state.shape)}" for state in states)
            raise ValueError(
                f"states {found} do not go with a parameter of {param.numel()} values: take those of states_of_8_bits."
            )
        _check_contiguous(param, *states)


def _check_counts(*lists: Sequence[torch.Tensor], states: str) -> None:
    counts = [len(tensors) for tensors in lists]
    if len(set(counts)) != 1:
        raise ValueError(f"lists of {counts} tensors do not go together: take a gradient and {states} a parameter.")


def _check_contiguous(param: torch.Tensor, *states: torch.Tensor) -> None:
    if not all(t.is_contiguous() for t in (param, *states)):
        raise ValueError(
            f"a parameter of shape {list(param.shape)}, or a state of it, is not contiguous: make it so first."
        )


def _check_numbers(step: int, lr: torch.Tensor, beta1: float, beta2: float) -> None:
    if step < 1:
        raise ValueError(f"step {step} cannot be: the first one is 1.")
    if lr.dim() or lr.dtype not in (torch.float32, torch.float64) or lr.device.type != "cpu":
        raise ValueError(
            f"lr of {_name(lr.dtype)} and {lr.dim()} dimensions on {lr.device} cannot be: take one number, fp32 or fp64, "
            "on the CPU, such as torch.tensor(1e-3)."
        )
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"betas of {beta1} and {beta2} cannot be: each is at least 0 and below 1.")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
