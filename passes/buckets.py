"""How parameters are divided into buckets, in one place for gathers and reductions.

Buckets follow a model's repeated blocks: a boundary lies between two blocks, and every bucket holds as many. FSDP has a person
wrap blocks for this; here the number in a parameter's name says it (``model.layers.7.mlp.up.weight`` belongs to block 7 of
``model.layers``). Where buckets repeat, so do the segments between them, and a segment that repeats is compiled once.

Dropped: filling buckets by bytes alone, as DDP does. Blocks then meet boundaries each at another place: of 17 segments of a
GPT of 6 layers 16 were distinct.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

#: Own choice of a bucket's bytes: an eighth of all, so that few are on their way while many are not, but a whole block where
#: that is larger. The least is where latency stops to matter (two gloo ranks of one machine reach full rate from some 8 MB).
FEWEST_BYTES, MOST_BYTES, SHARE = 12_000_000, 512_000_000, 8

_BLOCK = re.compile(r"^(?P<stack>.*?)\.?(?<![^.])(?P<index>\d+)(?:\.|$)")


@dataclass(frozen=True)
class Item:
    """What may share a bucket with others of its ``kind``: parameters (one, before there are buckets) by their names, bytes,
    and elements in all (DeepSpeed's unit)."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    elements: int
    kind: Hashable = None

    @property
    def bytes(self) -> int:
        return sum(self.sizes)


def pack(items: Sequence[Item], bucket_bytes: int | None = None, max_elements: int | None = None) -> list[list[int]]:
    """Indices of neighbouring ``items`` that travel together.

    A written ``bucket_bytes`` and ``max_elements`` are upper limits; a larger item travels alone. Without ``bucket_bytes``
    the choice is ours.
    """
    largest = _largest_blocks(items)
    if bucket_bytes is None:
        bucket_bytes = own_bytes(items)

    def group_of(name: str) -> tuple[str, int] | None:
        """Which blocks this parameter's travel with: as many as fit."""
        block = block_of(name)
        return block and (block[0], block[1] // max(bucket_bytes // max(largest[block[0]], 1), 1))

    groups = [[g for name in item.names if (g := group_of(name)) is not None] for item in items]
    sizes: Counter[tuple[str, int]] = Counter()
    for item, theirs in zip(items, groups, strict=True):
        if theirs:
            sizes[theirs[0]] += item.bytes
    buckets: list[list[int]] = []
    current: tuple[str, int] | None = None  # the group that the last bucket holds
    for i, (item, theirs) in enumerate(zip(items, groups, strict=True)):
        last = [items[j] for j in buckets[-1]] if buckets else []
        held = sum(j.bytes for j in last)
        begins = bool(theirs) and theirs[0] != current
        if (
            not last
            or last[0].kind != item.kind
            or (begins and current is not None)
            or held + (sizes[theirs[0]] if begins else item.bytes) > bucket_bytes
            or (max_elements is not None and sum(j.elements for j in last) + item.elements > max_elements)
        ):
            buckets.append([])
            current = None
        buckets[-1].append(i)
        current = theirs[-1] if theirs else current
    return buckets


def own_bytes(items: Sequence[Item]) -> int:
    """The bytes of a bucket of ``items`` where nobody wrote any."""
    share = max(sum(item.bytes for item in items) // SHARE, *_largest_blocks(items).values(), FEWEST_BYTES, 0)
    return min(share, MOST_BYTES)


def _largest_blocks(items: Sequence[Item]) -> dict[str, int]:
    """Bytes of the largest block of each stack."""
    blocks: Counter[tuple[str, int]] = Counter()
    for item in items:
        for name, size in zip(item.names, item.sizes, strict=True):
            block = block_of(name)
            if block is not None:
                blocks[block] += size
    return {stack: max(size for (s, _), size in blocks.items() if s == stack) for stack, _ in blocks}


def block_of(name: str) -> tuple[str, int] | None:
    """The stack and the number of the repeated block that a parameter belongs to, by the first number in its name."""
    found = _BLOCK.match(name)
    return (found["stack"], int(found["index"])) if found else None
