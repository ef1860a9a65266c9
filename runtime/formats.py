"""Formats of quantised values: how many bits a value takes, and what it is rounded to.

``int8`` and ``int4`` are symmetric integers. ``fp8_e4m3`` and ``fp8_e5m2`` are those of the OCP's 8-bit specification
(Micikevicius et al., FP8 formats for deep learning, 2022), ``fp6_e3m2`` that of its microscaling formats, which FP6-LLM (Xia et
al., 2024) packs as four bits and two. A value is stored relative to the scale of its block: the largest of a block becomes
:attr:`Format.largest`, so that no format needs an infinity.

How the codes of one block of ``n`` values lie in its ``n * bits / 8`` bytes:

======== =====================================================================================================
bits     bytes
======== =====================================================================================================
8        one a value
4        two values a byte, the first in the low half
6        sign and exponent of all values as if of 4 bits, then their mantissas, four a byte, the first in the lowest bits
======== =====================================================================================================
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

#: Blocks are this many values, or a multiple: kernels read 16 bytes at a time.
GRAIN = 16


@dataclass(frozen=True, kw_only=True)
class Format:
    """``largest`` is the largest magnitude; ``exponent`` and ``mantissa`` are bits, 0 where values are integers."""

    name: str
    bits: int
    largest: float
    exponent: int = 0
    mantissa: int = 0

    @property
    def is_integer(self) -> bool:
        return not self.exponent

    @property
    def bias(self) -> int:
        return (1 << (self.exponent - 1)) - 1

    def code_bytes(self, values: int) -> int:
        """Of the codes of so many values, which are whole blocks."""
        return values * self.bits // 8


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format(name="int8", bits=8, largest=127),
        Format(name="int4", bits=4, largest=7),
        Format(name="fp8_e4m3", bits=8, largest=448, exponent=4, mantissa=3),
        Format(name="fp8_e5m2", bits=8, largest=57344, exponent=5, mantissa=2),
        Format(name="fp6_e3m2", bits=6, largest=28, exponent=3, mantissa=2),
    )
}


def format_of(name: str) -> Format:
    """Raises ``ValueError``, with the nearest name, where there is no such format."""
    if name not in FORMATS:
        near = difflib.get_close_matches(name, FORMATS, 1)
        raise ValueError(
            f"there is no format {name!r}: take one of {', '.join(FORMATS)}"
            + (f" ({near[0]!r} is nearest)." if near else ".")
        )
    return FORMATS[name]


def check_block(block: int) -> None:
    """Raises ``ValueError`` where ``block`` is no number of values that a block can have."""
    if block < GRAIN or block % GRAIN:
        raise ValueError(f"a block of {block} values cannot be: take a multiple of {GRAIN}, such as 256.")
