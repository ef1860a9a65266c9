"""How large a bucket of a collective is, in one place for gathers and reductions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

#: Own choice of a bucket's bytes: an eighth of all, so that few are on their way while many are not, within bounds between
#: where latency stops to matter (two gloo ranks of one machine reach full rate from some 8 MB) and where more gains nothing.
FEWEST_BYTES, MOST_BYTES, SHARE = 12_000_000, 128_000_000, 8


@dataclass(frozen=True)
class BucketLimit:
    """``bytes`` and ``elements`` (DeepSpeed's unit) that a bucket may hold; a single larger tensor travels alone."""

    bytes: int
    elements: int | None

    @classmethod
    def choose(cls, sizes: Sequence[int], bucket_bytes: int | None, elements: int | None) -> BucketLimit:
        """A written ``bucket_bytes`` holds; otherwise it follows from the ``sizes`` in bytes of all tensors at hand."""
        if bucket_bytes is None:
            bucket_bytes = min(max(sum(sizes) // SHARE, FEWEST_BYTES), MOST_BYTES)
        return cls(bucket_bytes, elements)

    def holds(self, sizes: Sequence[int], elements: Sequence[int]) -> bool:
        return sum(sizes) <= self.bytes and (self.elements is None or sum(elements) <= self.elements)
