"""Line diffs of printed graphs, which have many thousand lines: opcodes, hunks and unified diffs.

Dropped: difflib alone, whose time is quadratic in the worst case. It is asked about the gaps between lines that stand once in
both texts.
"""

from __future__ import annotations

import bisect
import difflib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

Opcode = tuple[str, int, int, int, int]
"""Tag, and the ranges of lines before and after, as in :mod:`difflib`."""


def opcodes(before: Sequence[str], after: Sequence[str]) -> list[Opcode]:
    """What :meth:`difflib.SequenceMatcher.get_opcodes` answers, in near-linear time for printed graphs.

    Lines that stand once in both texts (nearly all: names of nodes are unique) are matched first, in their
    longest common order; only the gaps between them go to difflib. This is Bram Cohen's patience diff.
    """
    blocks: list[tuple[int, int]] = []  # matched pairs of lines, ascending

    def match(a0: int, a1: int, b0: int, b1: int) -> None:
        head = 0
        while a0 + head < a1 and b0 + head < b1 and before[a0 + head] == after[b0 + head]:
            head += 1
        blocks.extend((a0 + i, b0 + i) for i in range(head))
        a0, b0 = a0 + head, b0 + head
        tail = 0
        while a1 - tail > a0 and b1 - tail > b0 and before[a1 - tail - 1] == after[b1 - tail - 1]:
            tail += 1
        a1, b1 = a1 - tail, b1 - tail
        if a0 < a1 and b0 < b1:
            anchors = _anchors(before, after, a0, a1, b0, b1)
            if not anchors:
                matcher = difflib.SequenceMatcher(None, before[a0:a1], after[b0:b1], autojunk=True)
                for block in matcher.get_matching_blocks():
                    blocks.extend((a0 + block.a + i, b0 + block.b + i) for i in range(block.size))
            for i, j in anchors:
                if i >= a0 and j >= b0:
                    match(a0, i + 1, b0, j + 1)
                    a0, b0 = i + 1, j + 1
            if anchors:
                match(a0, a1, b0, b1)
        blocks.extend((a1 + i, b1 + i) for i in range(tail))

    match(0, len(before), 0, len(after))
    return list(_from_blocks(blocks, len(before), len(after)))


def _anchors(before: Sequence[str], after: Sequence[str], a0: int, a1: int, b0: int, b1: int) -> list[tuple[int, int]]:
    """Lines that stand once in both ranges, as the longest chain of pairs that ascends in both."""
    in_a, in_b = Counter(before[a0:a1]), Counter(after[b0:b1])
    where = {after[j]: j for j in range(b0, b1)}
    pairs = [(i, where[before[i]]) for i in range(a0, a1) if in_a[before[i]] == 1 == in_b[before[i]]]
    ends: list[int] = []  # the smallest last j of a chain of each length
    last: list[int] = []  # and which pair it is
    back: list[int] = []
    for index, (_, j) in enumerate(pairs):
        at = bisect.bisect_left(ends, j)
        back.append(last[at - 1] if at else -1)
        ends[at : at + 1], last[at : at + 1] = [j], [index]
    chain: list[tuple[int, int]] = []
    index = last[-1] if last else -1
    while index >= 0:
        chain.append(pairs[index])
        index = back[index]
    return chain[::-1]


def _from_blocks(pairs: Iterable[tuple[int, int]], a_end: int, b_end: int) -> Iterator[Opcode]:
    a = b = equal = 0  # the lines before a and b are told, but for the last ``equal`` ones
    for i, j in [*pairs, (a_end, b_end)]:
        gap = i > a or j > b
        if equal and (gap or i == a_end):
            yield "equal", a - equal, a, b - equal, b
            equal = 0
        if gap:
            yield ("insert" if i == a else "delete" if j == b else "replace"), a, i, b, j
        a, b, equal = i + 1, j + 1, equal + 1


def split_lines(text: str) -> list[str]:
    """Lines by ``\\n`` alone, so that equal lines mean equal texts."""
    return text.split("\n") if text else []


def unified_diff(before: str, after: str, before_name: str, after_name: str, context: int = 3) -> str:
    """:func:`difflib.unified_diff`, fast on graphs of many thousand lines; empty where nothing differs."""
    a, b = split_lines(before), split_lines(after)
    lines: list[str] = []
    for group in hunks(opcodes(a, b), context):
        (_, i0, _, j0, _), (_, _, i1, _, j1) = group[0], group[-1]
        lines.append(f"@@ -{_span(i0, i1)} +{_span(j0, j1)} @@")
        for tag, a0, a1, b0, b1 in group:
            if tag == "equal":
                lines += [" " + line for line in a[a0:a1]]
            else:
                lines += ["-" + line for line in a[a0:a1]] + ["+" + line for line in b[b0:b1]]
    return "\n".join([f"--- {before_name}", f"+++ {after_name}", *lines]) if lines else ""


def hunks(ops: Sequence[Opcode], context: int) -> Iterator[list[Opcode]]:
    """The changes with ``context`` equal lines around them, near ones together."""
    hunk: list[Opcode] = []
    for at, (tag, i0, i1, j0, j1) in enumerate(ops):
        if tag != "equal":
            hunk.append((tag, i0, i1, j0, j1))
            continue
        last = at == len(ops) - 1
        if hunk and (last or i1 - i0 > 2 * context):
            keep = min(context, i1 - i0)
            if keep:
                hunk.append(("equal", i0, i0 + keep, j0, j0 + keep))
            yield hunk
            hunk = []
        if not last:
            keep = i1 - i0 if hunk else min(context, i1 - i0)
            if keep:
                hunk.append(("equal", i1 - keep, i1, j1 - keep, j1))
    if hunk:
        yield hunk


def _span(start: int, stop: int) -> str:
    length = stop - start
    return f"{start + 1 if length else start}" + ("" if length == 1 else f",{length}")
