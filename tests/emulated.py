"""The kernels of ``cuda_src/`` as functions of torch tensors, run by the emulator."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from dspass.runtime import kernels
from dspass.runtime.formats import format_of
from dspass.runtime.kernels import DTYPE_CODES, FORMAT_CODES
from dspass.runtime.quantise import blocks_of


@contextmanager
def setting(**values: object) -> Iterator[None]:
    """Of the emulator, which reads them at each launch; None takes one away."""
    before = {name: os.environ.get(name) for name in values}
    try:
        for name, value in values.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = str(value)
        yield
    finally:
        for name, was in before.items():
            os.environ.pop(name, None)
            if was is not None:
                os.environ[name] = was


@dataclass(frozen=True)
class Emulator:
    """``order`` is "in order", or "random" for threads that run in a random one."""

    warp: int
    order: str = "in order"
    sanitized: bool = False

    def call(self, name: str, *args: object) -> None:
        with setting(DSP_EMU_SHUFFLE=7 if self.order == "random" else None):
            error = getattr(kernels.load(self.target), name)(*args, None)
        assert error == 0, f"{name} answered {error}"

    @property
    def target(self) -> str:
        return f"emulator-{self.warp}" + ("-sanitized" if self.sanitized else "")

    def quantise(self, x: torch.Tensor, format: str, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        count = blocks_of(x.numel(), block)
        codes = garbage(count, format_of(format).code_bytes(block), dtype=torch.uint8)
        scales = garbage(count)
        self.call(
            "dsp_quantise",
            *(x.data_ptr(), x.numel(), DTYPE_CODES[x.dtype]),
            *(codes.data_ptr(), scales.data_ptr(), block, FORMAT_CODES[format]),
        )
        return codes, scales

    def dequantise(
        self, codes: torch.Tensor, scales: torch.Tensor, shape: Sequence[int], format: str, dtype: torch.dtype
    ) -> torch.Tensor:
        values = garbage(*shape, dtype=dtype)
        block = codes.shape[1] * 8 // format_of(format).bits
        self.call(
            "dsp_dequantise",
            *(codes.data_ptr(), scales.data_ptr(), values.data_ptr()),
            *(values.numel(), DTYPE_CODES[dtype], block, FORMAT_CODES[format]),
        )
        return values

    def quantise_bucket(
        self,
        tensors: Sequence[torch.Tensor],
        sizes: Sequence[int],
        chunks: int,
        format: str,
        block: int,
        nodes: int = 1,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        count = sum(blocks_of(size, block) for size in sizes)
        codes = garbage(chunks, count * format_of(format).code_bytes(block), dtype=torch.uint8)
        scales = garbage(chunks, count)
        self.call(
            "dsp_quantise_bucket",
            *(pointers(tensors), int64s([t.numel() for t in tensors]), int64s(sizes)),
            dtypes(tensors),
            *(len(tensors), chunks, nodes),
            *(codes.data_ptr(), scales.data_ptr(), block, FORMAT_CODES[format]),
        )
        return codes, scales

    def dequantise_bucket(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        sizes: Sequence[int],
        format: str,
        block: int,
        dtype: torch.dtype,
    ) -> list[torch.Tensor]:
        values = [garbage(codes.shape[0], size, dtype=dtype) for size in sizes]
        self.call(
            "dsp_dequantise_bucket",
            *(codes.data_ptr(), scales.data_ptr(), pointers(values), int64s(sizes), len(sizes), codes.shape[0]),
            *(DTYPE_CODES[dtype], block, FORMAT_CODES[format]),
        )
        return values

    def dequantise_sum(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        sizes: Sequence[int],
        format: str,
        block: int,
        factor: float,
        dtype: torch.dtype,
    ) -> list[torch.Tensor]:
        values = [garbage(size, dtype=dtype) for size in sizes]
        self.call(
            "dsp_dequantise_sum",
            *(codes.data_ptr(), scales.data_ptr(), pointers(values), int64s(sizes), len(sizes), codes.shape[0]),
            *(factor, DTYPE_CODES[dtype], block, FORMAT_CODES[format]),
        )
        return values

    def dequantise_rows(
        self, codes: torch.Tensor, scales: torch.Tensor, columns: int, format: str, dtype: torch.dtype
    ) -> torch.Tensor:
        """As the binding calls it: each row is a chunk of one tensor."""
        block = codes.shape[1] * 8 // format_of(format).bits // scales.shape[1]
        return self.dequantise_bucket(codes, scales, [columns], format, block, dtype)[0]

    def few_rows_linear(
        self,
        x: torch.Tensor,
        codes: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None,
        format: str,
    ) -> torch.Tensor:
        """``x`` filled up with zeros, as the binding does."""
        (rows, columns), outputs = x.shape, codes.shape[0]
        block = codes.shape[1] * 8 // format_of(format).bits // scales.shape[1]
        filled = torch.nn.functional.pad(x, (0, -columns % 16)).contiguous()
        out = garbage(rows, outputs, dtype=x.dtype)
        self.call(
            "dsp_quantised_linear",
            *(filled.data_ptr(), codes.data_ptr(), scales.data_ptr(), None if bias is None else bias.data_ptr()),
            *(out.data_ptr(), rows, outputs, columns, block, DTYPE_CODES[x.dtype], FORMAT_CODES[format]),
        )
        return out

    def sort_experts(self, experts: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions and ends."""
        space = ctypes.c_int64()
        found = kernels.load(self.target).dsp_sort_experts_space(experts.numel(), num_experts, ctypes.byref(space))
        assert found == 0, f"dsp_sort_experts_space answered {found}"
        counts = garbage(space.value, dtype=torch.int32)
        positions = garbage(*experts.shape, dtype=torch.int32)
        ends = garbage(num_experts, dtype=torch.int32)
        self.call(
            "dsp_sort_experts",
            *(experts.data_ptr(), experts.dtype == torch.int64, experts.numel(), num_experts),
            *(counts.data_ptr(), positions.data_ptr(), ends.data_ptr()),
        )
        return positions, ends

    def spread_experts(
        self, x: torch.Tensor, positions: torch.Tensor, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        rows = garbage(positions.numel(), x.shape[1], dtype=x.dtype)
        self._move_rows("dsp_spread_experts", x, positions, weights, rows)
        return rows

    def unpermute_experts(
        self, rows: torch.Tensor, positions: torch.Tensor, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        x = garbage(positions.shape[0], rows.shape[1], dtype=rows.dtype)
        self._move_rows("dsp_unpermute_experts", rows, positions, weights, x)
        return x

    def _move_rows(
        self, name: str, values: torch.Tensor, positions: torch.Tensor, weights: torch.Tensor | None, to: torch.Tensor
    ) -> None:
        by = (None, 0) if weights is None else (weights.data_ptr(), DTYPE_CODES[weights.dtype])
        shape = (*positions.shape, values.shape[1])
        self.call(name, values.data_ptr(), positions.data_ptr(), *by, to.data_ptr(), *shape, DTYPE_CODES[values.dtype])

    def adamw_(
        self,
        params: Sequence[torch.Tensor],
        grads: Sequence[torch.Tensor],
        exp_avgs: Sequence[torch.Tensor],
        exp_avg_sqs: Sequence[torch.Tensor],
        step: int,
        *numbers: torch.Tensor | float,
        seed: int | None = None,
    ) -> None:
        self._adamw("dsp_adamw", params, grads, (exp_avgs, exp_avg_sqs), step, numbers, seed)

    def adamw_8bit_(
        self,
        params: Sequence[torch.Tensor],
        grads: Sequence[torch.Tensor],
        exp_avgs: Sequence[torch.Tensor],
        exp_avg_scales: Sequence[torch.Tensor],
        exp_avg_sqs: Sequence[torch.Tensor],
        exp_avg_sq_scales: Sequence[torch.Tensor],
        step: int,
        *numbers: torch.Tensor | float,
        seed: int | None = None,
    ) -> None:
        states = (exp_avgs, exp_avg_scales, exp_avg_sqs, exp_avg_sq_scales)
        self._adamw("dsp_adamw_8bit", params, grads, states, step, numbers, seed)

    def _adamw(
        self,
        name: str,
        params: Sequence[torch.Tensor],
        grads: Sequence[torch.Tensor],
        states: Sequence[Sequence[torch.Tensor]],
        step: int,
        numbers: Sequence[torch.Tensor | float],
        seed: int | None,
    ) -> None:
        self.call(
            name,
            *(pointers(params), pointers(grads), *map(pointers, states)),
            *(int64s([t.numel() for t in params]), dtypes(params), dtypes(grads), len(params), step),
            *(*map(float, numbers), seed is not None, seed or 0),
        )


def garbage(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What a kernel has to write over: each byte the same odd one."""
    size = torch.Size(shape).numel() * dtype.itemsize
    return torch.full((size,), 0xA5, dtype=torch.uint8).view(dtype).reshape(shape)


def pointers(tensors: Sequence[torch.Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))


def dtypes(tensors: Sequence[torch.Tensor]) -> ctypes.Array[ctypes.c_int]:
    return (ctypes.c_int * len(tensors))(*(DTYPE_CODES[t.dtype] for t in tensors))


def int64s(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


def bits(x: torch.Tensor) -> torch.Tensor:
    """As integers, every NaN the same one: devices differ in which they make, and kernels make one."""
    one = torch.full_like(x, float("nan")) if x.is_floating_point() else x
    kept = torch.where(x.isnan(), one, x) if x.is_floating_point() else x
    return kept.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """To the last bit, and in shape and dtype."""
    return found.dtype == expected.dtype and torch.equal(bits(found), bits(expected))


def numbers(count: int, dtype: torch.dtype, *, seed: int = 0) -> torch.Tensor:
    """Normal ones over some twenty powers of ten, with halves between them, so that ties are rounded."""
    generator = torch.Generator().manual_seed(seed * 1000003 + count)
    spread = torch.pow(10, torch.rand((count,), generator=generator) * 4 - 2)
    values = torch.randn((count,), generator=generator) * spread
    halves = torch.randint(-254, 255, (count,), generator=generator) / 2
    return torch.where(torch.rand((count,), generator=generator) < 0.3, halves, values).to(dtype)


def odd_blocks(block: int, dtype: torch.dtype) -> torch.Tensor:
    """Eleven blocks and a bit: zeros of either sign, NaNs, infinities, tiny and huge values, ties, ordinary ones."""
    rows = numbers(11 * block, dtype, seed=block).view(11, block)
    info = torch.finfo(dtype)
    rows[0] = 0
    rows[1] = -0.0
    rows[2, block // 2] = float("nan")
    rows[3, block - 1] = -float("inf")
    rows[4, 0], rows[4, 1] = -float("nan"), float("inf")
    rows[5] = torch.linspace(-1, 1, block).to(dtype) * info.smallest_normal / 8  # denormal
    rows[6] = info.max * torch.linspace(-1, 1, block).to(dtype)
    rows[7] = torch.linspace(-127, 127, block).mul(2).round().div(2).to(dtype)  # ties of int8 where the largest is 127
    rows[7, 0] = 127
    rows[8] = torch.linspace(0, 7, block).mul(2).round().div(2).to(dtype)  # ties of int4
    if dtype != torch.float16:
        rows[9] = torch.linspace(-1, 1, block).to(dtype) * 2.0**-99  # about the smallest magnitude that counts
    return torch.cat([rows.reshape(-1), numbers(5, dtype)])
