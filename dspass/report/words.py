"""How single things are written wherever a report is text: figures, counts, names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def format_bytes(count: int) -> str:
    """``1.50 GB``: powers of 1000, as budgets are written and devices are sold, so that figures can be compared with these."""
    value, unit = float(count), "B"
    for larger in ("KB", "MB", "GB", "TB", "PB"):
        if abs(value) < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{count} B" if unit == "B" else f"{_three_digits(value)} {unit}"


def format_seconds(seconds: float) -> str:
    """``12.3 ms``; an hour is ``3600 s`` too."""
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "µs")):
        value = seconds * factor
        if abs(value) >= 0.9995 or unit == "µs":
            break
    return f"{_three_digits(value)} {unit}"


def _three_digits(value: float) -> str:
    return f"{value:.{2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0}f}"


def counted(count: int, what: str) -> str:
    """``1 rank``, ``2 ranks``."""
    return f"{count} {what}" + ("" if count == 1 else "s")


def one_line(text: str) -> str:
    """One line without control characters: labels come from models, and a terminal obeys escape codes."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error about a name: which known one is near, or which there are."""
    choices = list(known)
    close = difflib.get_close_matches(name, choices, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(choices)}"
