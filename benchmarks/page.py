"""A benchmark's tables as a page of ``benchmarks/results``: what it is, the command that makes it again, where it was run."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write(
    options: argparse.Namespace, name: str, *, title: str, benchmark: str, keys: Sequence[str], facts: str, text: str
) -> None:
    """Write ``name`` into the folder ``options.out``: the command has the ``keys`` of ``options``, and ``facts`` follow the
    date."""
    words = " ".join(f"--{key.replace('_', '-')} {_word(getattr(options, key))}".rstrip() for key in keys)
    path = Path(options.out) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    command = f"`python -m benchmarks {benchmark} {words}`"
    path.write_text(f"# {title}\n\n{command}\n\n{time.strftime('%Y-%m-%d')}, {facts}\n\n{text}\n")
    print(f"written: {path}")


def _word(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else "" if value is True else str(value)
