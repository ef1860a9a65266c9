"""Messages between pipeline stages in few bits: a value becomes codes and scales in front of its send, and a value again before
the first reader, activations and gradients alike.

A value is taken for rows of its last dimension in memory, which for channels last is that of the channels. Each row is
quantised by itself (:func:`dspass.runtime.quantise.row_block`), so what is out of line in one token spoils no other. Codes and
scales lie side by side in one buffer: as many messages as whole values take, and no more memory for a receive than comes. Sizes
follow from the value's shape, so that nothing is told.

Values are rounded once. What was dequantised gets the same codes when it is quantised again, and scales within its precision,
since the largest of a block lies on its last code: a value that is carried through stages loses what its first hop takes, and
at each further one less than a rounding to its own dtype. Gradients are different, each stage that reads a value adds its own
part: there are new numbers to round.

Dropped: operators in the graphs of stages, which Inductor would fuse with what makes a value and what reads it. Gradients enter
a compiled stage and leave it through autograd, which takes them whole and of the value's dtype, and a value whose gradient
comes back is answered whole anyway, so that one of four ends would be fused; and plans and dry runs would see graphs that
depend on where a stage lies. It costs a pass over a message at each end: a kernel where there is one, elsewhere torch, in parts
that take little memory. Dropped: to hand on the codes of a carried value. It would save that pass, not the error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch

from dspass.runtime.formats import check_block, format_of
from dspass.runtime.operators import OPERATORS
from dspass.runtime.quantise import DTYPES, blocks_of, row_block, row_bytes, squares

#: Values that the reference quantises together: it takes several times their memory meanwhile.
_AT_A_TIME = 2**17


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How messages are quantised: as ``format``, each row in blocks of at most ``block`` values.

    Raises ``ValueError`` for a format or a block that cannot be."""

    format: str
    block: int

    def __post_init__(self) -> None:
        format_of(self.format)
        check_block(self.block)

    def bytes_of(self, shape: tuple[int, ...]) -> int:
        """Of codes and scales of a tensor whose last dimension has the rows."""
        rows, width = _rows(shape)
        return rows * row_bytes(width, self.format, self.block)

    def shrinks(self, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        """Whether such a tensor can be quantised, and is smaller then."""
        return dtype in DTYPES and self.bytes_of(shape) < prod(shape) * dtype.itemsize

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """Codes and scales of a contiguous ``tensor``, ``uint8[bytes]``."""
        width = tensor.shape[-1]
        rows = tensor.view(-1, width)
        buffer = tensor.new_empty((self.bytes_of(tuple(tensor.shape)),), dtype=torch.uint8)
        for part, codes, scales in self._parts(rows, buffer):
            found = torch.ops.dspass.quantise_bucket(
                [part], [width], part.shape[0], self.format, row_block(width, self.block)
            )
            codes.copy_(found[0])
            scales.copy_(found[1])
        return buffer

    def unpack(self, buffer: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The contiguous tensor of ``shape`` and ``dtype`` that :meth:`pack` answered ``buffer`` for."""
        found = buffer.new_empty(shape, dtype=dtype)
        for part, codes, scales in self._parts(found.view(-1, shape[-1]), buffer):
            part.copy_(self._decoded(codes, scales, shape[-1], dtype))
        return found

    def squares(self, tensor: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
        """Of ``tensor`` that has become ``buffer`` the sums of squares, ``float64[2]``, of what rounding has changed and of its
        values."""
        sums = torch.zeros(2, dtype=torch.float64, device=tensor.device)
        for part, codes, scales in self._parts(tensor.view(-1, tensor.shape[-1]), buffer):
            sums += squares(part, self._decoded(codes, scales, part.shape[1], tensor.dtype))
        return sums

    def _decoded(self, codes: torch.Tensor, scales: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
        (rows,) = torch.ops.dspass.dequantise_bucket(
            codes, scales, [width], self.format, row_block(width, self.block), dtype
        )
        return rows

    def _parts(
        self, rows: torch.Tensor, buffer: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Rows, and where their codes and their scales lie in ``buffer``: all at once where a kernel takes them."""
        count, width = rows.shape
        blocks = blocks_of(width, row_block(width, self.block))
        codes = buffer[: buffer.shape[0] - 4 * count * blocks].view(count, -1)
        scales = buffer[codes.numel() :].view(torch.float32).view(count, blocks)
        has_kernel = OPERATORS["quantise_bucket"].server(rows.device.type) == "kernel"
        step = count if has_kernel else max(_AT_A_TIME // width, 1)
        return zip(rows.split(step), codes.split(step), scales.split(step), strict=True)


def _rows(shape: tuple[int, ...]) -> tuple[int, int]:
    """How many rows, and of how many values."""
    return prod(shape[:-1]), shape[-1] if shape else 1


__all__ = ["Packing"]
