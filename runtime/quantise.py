"""Blockwise quantisation: each block of a tensor's values becomes codes of few bits and one fp32 scale.

The scale of a block is its largest magnitude over the format's (``absmax`` scaling; Dettmers et al., 8-bit optimizers via
block-wise quantization, 2022). So the error of a value is at most half a step of its block's largest, and one outlier spoils
one block alone. Defined for every input:

- A block with a NaN or an infinity has a NaN for its scale and zeros for codes, and comes back as NaNs: a sum over ranks shows
  it, and so does a check for finite gradients.
- A block's largest magnitude is taken for ``2**-100`` at least: what is less than half a step of that is a zero, and a block
  of zeros comes back as zeros.
- The last block of a tensor is filled up with zeros. An empty tensor has no blocks. Sizes are 64 bit throughout.

All arithmetic is fp32 without fused multiply-adds, each operation rounded to nearest, ties to even, so that kernels
(``cuda_src/portable/quantise.cuh``) and this reference agree to the last bit: a scale is the block's largest magnitude times
``1 / largest``, rounded once to fp32, and a value is multiplied by ``(1 / magnitude) * largest``. Nothing is divided by a
constant, which CUDA's eager kernels turn into a product and a CPU's do not.

The operators for buckets do in one pass over memory what a collective needs: many tensors into one buffer and back, each tensor
beginning a block of its own. ``chunks`` are the parts that go to, or come from, the ranks of a group.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from dspass.runtime.formats import GRAIN, Format, check_block, format_of
from dspass.runtime.operators import operator

#: What can be quantised.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

#: A block's largest magnitude is taken for no less: its inverse stays finite.
SMALLEST = 2.0**-100


def blocks_of(values: int, block: int) -> int:
    """Blocks that so many values take."""
    return -(-values // block)


def row_block(width: int, block: int) -> int:
    """The block for a row of ``width`` values that is quantised by itself: no larger than ``block``, and as even as blocks can
    be, so that little is filled up."""
    share = -(-width // max(blocks_of(width, block), 1))
    return max(-(-share // GRAIN), 1) * GRAIN


def row_bytes(width: int, format: str, block: int) -> int:
    """Of the codes and scales of such a row."""
    even = row_block(width, block)
    count = blocks_of(width, even)
    return format_of(format).code_bytes(count * even) + 4 * count


# -- one tensor ----------------------------------------------------------------------------------------------------------


def _quantise_fake(x: torch.Tensor, format: str, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    _check(x, block)
    count = blocks_of(x.numel(), block)
    codes = x.new_empty((count, format_of(format).code_bytes(block)), dtype=torch.uint8)
    return codes, x.new_empty((count,), dtype=torch.float32)


@operator("quantise(Tensor x, str format, int block) -> (Tensor, Tensor)", fake=_quantise_fake)
def quantise(x: torch.Tensor, format: str, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of ``x``, fp32, fp16 or bf16 of any shape: codes, ``uint8[blocks, bytes of a block]``, and scales, ``float32[blocks]``.

    Raises ``ValueError`` for a format or a block that cannot be, and for values that are not real floating numbers.
    """
    _check(x, block)
    return encode(_filled(x.reshape(-1), blocks_of(x.numel(), block) * block).view(-1, block), format_of(format))


def _dequantise_fake(
    codes: torch.Tensor, scales: torch.Tensor, shape: Sequence[int], format: str, dtype: torch.dtype
) -> torch.Tensor:
    return codes.new_empty(shape, dtype=dtype)


@operator(
    "dequantise(Tensor codes, Tensor scales, SymInt[] shape, str format, ScalarType dtype) -> Tensor",
    fake=_dequantise_fake,
)
def dequantise(
    codes: torch.Tensor, scales: torch.Tensor, shape: Sequence[int], format: str, dtype: torch.dtype
) -> torch.Tensor:
    """The tensor of ``shape`` that :func:`quantise` answered ``codes`` and ``scales`` for, in ``dtype``."""
    values = decode(codes, format_of(format)) * scales[:, None]
    return values.reshape(-1)[: torch.Size(shape).numel()].reshape(shape).to(dtype)


# -- buckets -------------------------------------------------------------------------------------------------------------


def _quantise_bucket_fake(
    tensors: Sequence[torch.Tensor], sizes: Sequence[int], chunks: int, format: str, block: int, nodes: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    for tensor, size in zip(tensors, sizes, strict=True):
        _check(tensor, block)
        _check_room(tensor, chunks, size)
    first = tensors[0]
    count = sum(blocks_of(size, block) for size in sizes)
    codes = first.new_empty((chunks, count * format_of(format).code_bytes(block)), dtype=torch.uint8)
    return codes, first.new_empty((chunks, count), dtype=torch.float32)


@operator(
    "quantise_bucket(Tensor[] tensors, SymInt[] sizes, SymInt chunks, str format, int block, SymInt nodes=1) "
    "-> (Tensor, Tensor)",
    fake=_quantise_bucket_fake,
)
def quantise_bucket(
    tensors: Sequence[torch.Tensor], sizes: Sequence[int], chunks: int, format: str, block: int, nodes: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes ``uint8[chunks, bytes]`` and scales ``float32[chunks, blocks]`` of several tensors.

    Chunk ``c`` holds of each tensor, flattened, the ``sizes[i]`` values from ``c * sizes[i]``; beyond its end there are zeros.
    With ``nodes`` above 1 chunks stand in the order that an exchange inside of each node, and then across nodes, wants
    (ZeRO++'s swizzle; Wang et al., 2023): that of rank ``d`` of node ``n`` stands at ``d * nodes + n``.
    """
    for tensor, size in zip(tensors, sizes, strict=True):
        _check(tensor, block)
        _check_room(tensor, chunks, size)
    parts = [
        encode(blocks, format_of(format))
        for tensor, size in zip(tensors, sizes, strict=True)
        for blocks in _blocks(_rows(tensor, size, chunks), block)
    ]
    return _bucket(parts, chunks, nodes)


def _compensated_bucket_fake(
    tensors: Sequence[torch.Tensor],
    sizes: Sequence[int],
    chunks: int,
    format: str,
    block: int,
    errors: Sequence[torch.Tensor],
    beta: float,
    nodes: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    for size, error in zip(sizes, errors, strict=True):
        _check_error(error, chunks, size)
    return _quantise_bucket_fake(tensors, sizes, chunks, format, block, nodes)


@operator(
    "compensated_bucket(Tensor[] tensors, SymInt[] sizes, SymInt chunks, str format, int block, Tensor(a!)[] errors, "
    "float beta, SymInt nodes=1) -> (Tensor, Tensor)",
    fake=_compensated_bucket_fake,
)
def compensated_bucket(
    tensors: Sequence[torch.Tensor],
    sizes: Sequence[int],
    chunks: int,
    format: str,
    block: int,
    errors: Sequence[torch.Tensor],
    beta: float,
    nodes: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`quantise_bucket` of the sums of ``tensors`` and ``errors``, which are as tensors are divided, ``[chunks,
    sizes[i]]`` of any floating dtype. In them it leaves what is to be added the next time: of error ``e`` and sum ``s``, which
    arrives as ``q``, ``beta * e + (1 - beta) * (s - q)``.

    With ``beta`` 0 that is all that this rounding has lost (error feedback; Seide et al., 1-bit stochastic gradient descent,
    2014; Karimireddy et al., Error feedback fixes SignSGD, 2019), above it a moving average (LoCo; Xie et al., 2024). A block
    with a NaN or an infinity leaves zeros: a step that is given up must not spoil those after it.
    """
    parts = []
    for tensor, size, error in zip(tensors, sizes, errors, strict=True):
        _check(tensor, block)
        _check_room(tensor, chunks, size)
        _check_error(error, chunks, size)
        whole = size // block * block
        homes = [error[:, :whole].unflatten(1, (size // block, block)), error[:, whole:, None].transpose(1, 2)]
        new, before = (_blocks(rows, block) for rows in (_rows(tensor, size, chunks), error))
        for values, old, home in zip(new, before, homes[: len(new)], strict=True):
            sums = values.float() + old.float()
            codes, scales = _rounded(sums, format_of(format))
            parts.append((_packed(codes, format_of(format)), scales))
            # Of codes that are not packed yet: it needs no second pass over what is sent.
            lost = sums - _values(codes, format_of(format)) * scales[..., None]
            kept = torch.where(scales.isfinite()[..., None], beta * old.float() + (1 - beta) * lost, 0.0)
            home.copy_(kept[..., : home.shape[2]])
    return _bucket(parts, chunks, nodes)


def _dequantise_bucket_fake(
    codes: torch.Tensor, scales: torch.Tensor, sizes: Sequence[int], format: str, block: int, dtype: torch.dtype
) -> list[torch.Tensor]:
    return [codes.new_empty((codes.shape[0], size), dtype=dtype) for size in sizes]


@operator(
    "dequantise_bucket(Tensor codes, Tensor scales, SymInt[] sizes, str format, int block, ScalarType dtype) -> Tensor[]",
    fake=_dequantise_bucket_fake,
)
def dequantise_bucket(
    codes: torch.Tensor, scales: torch.Tensor, sizes: Sequence[int], format: str, block: int, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Of each tensor of a bucket all chunks, ``dtype[chunks, sizes[i]]``: flattened, the tensor that was divided."""
    return [values.to(dtype).contiguous() for values in _decoded(codes, scales, sizes, format, block)]


def _dequantise_sum_fake(
    codes: torch.Tensor,
    scales: torch.Tensor,
    sizes: Sequence[int],
    format: str,
    block: int,
    factor: float,
    dtype: torch.dtype,
) -> list[torch.Tensor]:
    return [codes.new_empty((size,), dtype=dtype) for size in sizes]


@operator(
    "dequantise_sum(Tensor codes, Tensor scales, SymInt[] sizes, str format, int block, float factor, ScalarType dtype) "
    "-> Tensor[]",
    fake=_dequantise_sum_fake,
)
def dequantise_sum(
    codes: torch.Tensor,
    scales: torch.Tensor,
    sizes: Sequence[int],
    format: str,
    block: int,
    factor: float,
    dtype: torch.dtype,
) -> list[torch.Tensor]:
    """Of each tensor of a bucket the sum over chunks, in their order and in fp32, times ``factor``: ``dtype[sizes[i]]``."""
    found = []
    for values in _decoded(codes, scales, sizes, format, block):
        total = values[0]
        for i in range(1, values.shape[0]):
            total = total + values[i]
        found.append((total * factor).to(dtype))
    return found


# -- what rounding changes -----------------------------------------------------------------------------------------------

#: Values whose rounding is looked at together: what that takes is little beside a tensor.
_AT_A_TIME = 2**20


def squares(values: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """The sums of squares, in fp64, of what rounding has changed and of ``values``: ``float64[2]``."""
    return torch.stack([t.double().square().sum() for t in (rounded - values.float(), values)])


def rounding_squares(codes: torch.Tensor, scales: torch.Tensor, format: str, width: int) -> torch.Tensor:
    """Of rows of ``width`` values, each quantised by itself: sums of squares, ``float64[2]``, of what rounding is taken to have
    changed and of the values as they arrive.

    ``codes`` are ``uint8[rows, bytes]``, ``scales`` ``float32[rows, blocks]``. What was rounded is not there any more; a value
    lay anywhere within half a step of its code, whose square is on average a twelfth of the step's.
    """
    how, blocks = format_of(format), scales.shape[1]
    sums = torch.zeros(2, dtype=torch.float64, device=codes.device)
    size = codes.shape[1] // max(blocks, 1)  # of a block's codes
    block = size * 8 // how.bits
    for part, scale in zip(*(t.split(max(_AT_A_TIME // max(width, 1), 1)) for t in (codes, scales)), strict=True):
        at = 0
        for some in (
            scale.split(max(_AT_A_TIME // max(block, 1), 1), dim=1) if blocks else ()
        ):  # a row may be a large shard
            its = part[:, at * size : (at + some.shape[1]) * size]
            numbers = _unpacked(its.unflatten(1, (some.shape[1], -1)), how)
            for i, of_codes in enumerate((_steps(numbers, how), _values(numbers, how))):
                found = (of_codes * some[..., None]).flatten(1)[:, : width - at * block]
                sums[i] += found.double().square().sum()
            at += some.shape[1]
    return sums / sums.new_tensor([12.0, 1.0])


def _steps(codes: torch.Tensor, format: Format) -> torch.Tensor:
    """The distance between neighbours at each of ``int32`` codes, before values are scaled. Below a power of two it is half as
    long: there, that of even steps with the same mean square."""
    if format.is_integer:
        return torch.ones_like(codes, dtype=torch.float32)
    exponent = (codes & (1 << format.exponent + format.mantissa) - 1) >> format.mantissa
    steps = _power_of_two(exponent.clamp_min(1) - format.bias - format.mantissa)
    is_power_of_two = ((codes & (1 << format.mantissa) - 1) == 0) & (exponent > 1)
    # Over [-1/4, 1/2] of a step squares have a mean of 1/16, and over [-1/2, 1/2] one of 1/12.
    return torch.where(is_power_of_two, steps * 0.75**0.5, steps)


# -- codes ---------------------------------------------------------------------------------------------------------------


def _check(x: torch.Tensor, block: int) -> None:
    check_block(block)
    if x.dtype not in DTYPES:
        raise ValueError(
            f"a tensor of {str(x.dtype).removeprefix('torch.')} cannot be quantised: fp32, fp16 and bf16 can."
        )


def _check_room(tensor: torch.Tensor, chunks: int, size: int) -> None:
    if tensor.numel() > chunks * size:
        raise ValueError(
            f"a tensor of {tensor.numel()} values does not go into {chunks} chunks of {size}: make them larger."
        )


def _check_error(error: torch.Tensor, chunks: int, size: int) -> None:
    if tuple(error.shape) != (chunks, size):
        raise ValueError(
            f"an error of {list(error.shape)} is none of {chunks} chunks of {size} values: give one of [{chunks}, {size}]."
        )


def _rows(tensor: torch.Tensor, size: int, chunks: int) -> torch.Tensor:
    return _filled(tensor.reshape(-1), chunks * size).view(chunks, size)


def _blocks(rows: torch.Tensor, block: int) -> list[torch.Tensor]:
    """Blocks, the last dim, of each row of a matrix: whole ones, and apart from them what fills none.

    With both in one tensor, generated loops would ask of each value which it is.
    """
    size = rows.shape[1]
    whole = size // block * block
    found = [rows[:, :whole].unflatten(1, (size // block, block))]
    if whole < size:
        found.append(F.pad(rows[:, whole:], (0, block - size + whole))[:, None])
    return found


def _bucket(
    parts: Sequence[tuple[torch.Tensor, torch.Tensor]], chunks: int, nodes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of all ``parts`` side by side, chunks in the order that ``nodes`` ask for."""
    codes = torch.cat([codes.flatten(1) for codes, _ in parts], dim=1)
    scales = torch.cat([scales for _, scales in parts], dim=1)
    if nodes > 1:
        codes, scales = (
            t.view(nodes, chunks // nodes, -1).transpose(0, 1).reshape(chunks, -1) for t in (codes, scales)
        )
    return codes, scales


def _filled(flat: torch.Tensor, size: int) -> torch.Tensor:
    missing = size - flat.shape[0]
    return F.pad(flat, (0, missing)) if missing else flat


def encode(
    blocks: torch.Tensor, format: Format, noise: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of blocks, which are the last dim.

    With ``noise``, fp32 of the shape of ``blocks``, at least 0 and below 1, values of a format of floating point are rounded
    stochastically: up where what would be cut off, and it, are 1 or more.
    """
    codes, scales = _rounded(blocks, format, noise)
    return _packed(codes, format), scales


def _rounded(
    blocks: torch.Tensor, format: Format, noise: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`encode`, one ``int32`` a code."""
    blocks = blocks.float()
    most = blocks.abs().amax(-1)
    is_finite = most.isfinite()
    most = most.clamp_min(SMALLEST)
    scales = torch.where(is_finite, most * (1 / format.largest), float("nan"))
    values = torch.where(is_finite[..., None], blocks * (most.reciprocal() * format.largest)[..., None], 0.0)
    if format.is_integer:
        return values.round().to(torch.int32) & (1 << format.bits) - 1, scales
    # Of value v = m * 2**e, 1 <= m < 2: steps of 2**(e - mantissa), e no less than the smallest normal's; a mantissa that is
    # rounded up to 2 carries into the exponent by itself.
    bits = values.view(torch.int32)
    exponent = ((bits >> 23 & 0xFF) - 127).clamp_min(1 - format.bias)
    exact = values.abs() * _power_of_two(format.mantissa - exponent)
    steps = (exact.round() if noise is None else exact + noise).to(torch.int32)
    codes = (exponent + (format.bias - 1) << format.mantissa) + steps
    sign = bits >> 31 & 1
    return codes | sign << format.exponent + format.mantissa, scales


def decode(codes: torch.Tensor, format: Format) -> torch.Tensor:
    """Codes of blocks, which are the last dim, as fp32 values, before they are scaled."""
    if format.name == "int8":
        return codes.view(torch.int8).float()
    return _values(_unpacked(codes, format), format)


def _values(codes: torch.Tensor, format: Format) -> torch.Tensor:
    """As :func:`decode`, of one ``int32`` a code."""
    if format.is_integer:
        half = 1 << format.bits - 1
        return ((codes ^ half) - half).float()  # the sign bit extended
    magnitude = codes & (1 << format.exponent + format.mantissa) - 1
    exponent = magnitude >> format.mantissa
    one = 1 << format.mantissa
    steps = (magnitude & one - 1) + torch.where(exponent > 0, one, 0)
    value = steps.float() * _power_of_two(exponent.clamp_min(1) - format.bias - format.mantissa)
    return torch.where(codes > magnitude, -value, value)


def _power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    return (exponent + 127 << 23).view(torch.float32)


def _packed(codes: torch.Tensor, format: Format) -> torch.Tensor:
    """``int32`` codes of blocks, which are the last dim, as bytes."""
    if format.bits == 8:
        return codes.to(torch.uint8)
    if format.bits == 4:
        return _joined(codes, 4)
    return torch.cat([_joined(codes >> 2, 4), _joined(codes & 3, 2)], dim=-1)


def _unpacked(codes: torch.Tensor, format: Format) -> torch.Tensor:
    """Bytes of blocks, which are the last dim, as ``int32`` codes."""
    if format.bits == 8:
        return codes.to(torch.int32)
    if format.bits == 4:
        return _divided(codes, 4)
    high = codes.shape[-1] * 2 // 3
    return _divided(codes[..., :high], 4) << 2 | _divided(codes[..., high:], 2)


def _joined(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Neighbours in one byte, the first in the lowest bits."""
    each = 8 // bits
    parts = codes.unflatten(-1, (-1, each))
    joined = parts[..., 0]
    for i in range(1, each):
        joined = joined | parts[..., i] << i * bits
    return joined.to(torch.uint8)


def _divided(codes: torch.Tensor, bits: int) -> torch.Tensor:
    codes = codes.to(torch.int32)
    parts = [codes >> i * bits & (1 << bits) - 1 for i in range(8 // bits)]
    return torch.stack(parts, dim=-1).flatten(-2)


def _decoded(
    codes: torch.Tensor, scales: torch.Tensor, sizes: Sequence[int], format: str, block: int
) -> list[torch.Tensor]:
    """Of each tensor of a bucket ``float32[chunks, sizes[i]]``."""
    counts = [blocks_of(size, block) for size in sizes]
    of_block = format_of(format).code_bytes(block)
    found = []
    for part, scale, size in zip(
        codes.split([count * of_block for count in counts], dim=1), scales.split(counts, dim=1), sizes, strict=True
    ):
        values = decode(part.unflatten(1, (blocks_of(size, block), of_block)), format_of(format)) * scale[..., None]
        found.append(values.flatten(1)[:, :size])
    return found
