"""ZeRO-3 with collectives in few bits beside itself without: bytes and time of a step, and the loss on real text.

Every row is a group of processes of its own that trains one GPT from the same weights on the same batches; rows take turns,
some steps at a time. Bytes are those that one rank sends in a step, as counted; their bound is what the plain row sends, with
each value as many bits as its format has and a share of one fp32 scale: what fills no whole block makes the difference. A loss
is the mean over ranks and over the last tenth of the steps.
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from benchmarks import page
from benchmarks.subjects import QUANTISED, SUBJECTS
from benchmarks.table import device
from benchmarks.workers import Group
from dspass.config import QuantiseConfig
from dspass.runtime.formats import FORMATS
from examples.gpt import PRESETS

_STARTING, _STEP = 1800.0, 600.0


@dataclass
class Row:
    """``gathers`` and ``reductions`` are formats, None where they travel whole; ``sent`` are bytes of a step by kind of
    collective."""

    name: str
    gathers: str | None = None
    reductions: str | None = None
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    sent: dict[str, float] = field(default_factory=dict)
    peak: float = 0.0

    @property
    def bytes(self) -> float:
        return sum(self.sent.values())

    @property
    def loss(self) -> float:
        return statistics.fmean(self.losses[-max(len(self.losses) // 10, 1) :])

    def bound(self, plain: Mapping[str, float]) -> float:
        """Bytes of a step, from those of the row that sends all whole, in fp32."""
        shares = {"all-gather": _share(self.gathers), "reduce-scatter": _share(self.reductions)}
        return sum(count * shares.get(kind, 1.0) for kind, count in plain.items())


def _share(format: str | None) -> float:
    """What a value and its part of a scale take, over an fp32 value."""
    return 1.0 if format is None else (FORMATS[format].bits + 32 / QuantiseConfig().block) / 32


def measure(options: argparse.Namespace) -> list[Row]:
    rows = [Row("dspass-3"), *(Row(name, *formats) for name, formats in QUANTISED.items())]
    settings = {"preset": options.preset, "batch": options.batch, "context": options.context, "device": "cpu"}
    with contextlib.ExitStack() as stack:
        groups = []
        for row in tqdm(rows, desc="start and compile", unit="row", ncols=90):
            group = Group(row.name, options.ranks, settings)
            stack.callback(group.close)
            groups.append(group)
            _note(row, group, options.steps, _STARTING)
            row.seconds.clear()  # they compile
        for number in tqdm(range(1, options.rounds), desc="rounds", unit="round", ncols=90):
            order = list(range(len(rows)))
            random.Random(number).shuffle(order)
            for i in order:
                _note(rows[i], groups[i], options.steps, _STEP)
        for row, group in zip(rows, groups, strict=True):
            watched = group.ask("watch", 1, timeout=_STEP)
            row.sent = {kind: sent for kind, (_, sent) in watched[0]["collectives"].items()}
            row.peak = max(w["peak"] for w in watched)
    return rows


def _note(row: Row, group: Group, steps: int, timeout: float) -> None:
    answers = group.ask("steps", steps, timeout=timeout)
    row.seconds.append(max(seconds for seconds, _ in answers))
    row.losses += [statistics.fmean(step) for step in zip(*(losses for _, losses in answers), strict=True)]


def table(rows: Sequence[Row]) -> str:
    """Markdown of what was measured."""
    plain = rows[0]
    lines = [
        "| | gathers | reductions | sent a step | of plain | bound | of bound | step, median | of plain, paired | peak "
        "| loss at the end | of plain |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratios = [a / b for a, b in zip(row.seconds, plain.seconds, strict=True)]
        bound = row.bound(plain.sent)
        cells = [
            row.name,
            row.gathers or "whole",
            row.reductions or "whole",
            f"{row.bytes / 1e6:.2f} MB",
            f"{row.bytes / plain.bytes:.3f}",
            f"{bound / 1e6:.2f} MB",
            f"{row.bytes / bound:.3f}",
            f"{statistics.median(row.seconds) * 1e3:.0f} ms",
            f"{statistics.median(ratios):.3f}",
            f"{row.peak / 1e6:.1f} MB",
            f"{row.loss:.4f}",
            f"{row.loss / plain.loss - 1:+.2%}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    steps = len(plain.losses)
    within = [row for row in rows[1:] if row.loss <= plain.loss * 1.005]
    lines += [
        "",
        f"- {'met' if len(within) == len(rows) - 1 else 'missed'}: the loss after {steps} steps is within 0.5 % of the plain "
        f"row's: {len(within)} of {len(rows) - 1}",
    ]
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=PRESETS, default="12m", help="model size")
    parser.add_argument("--ranks", type=int, default=2, help="processes of a row")
    parser.add_argument("--batch", type=int, default=2, help="samples of one rank")
    parser.add_argument("--context", type=int, default=128, help="bytes of a sample")
    parser.add_argument("--rounds", type=int, default=50, help="interleaved rounds")
    parser.add_argument("--steps", type=int, default=10, help="steps of a row in one round")
    parser.add_argument("--out", default="benchmarks/results", help="where the table is written")


def run(options: argparse.Namespace) -> int:
    begin = time.time()
    rows = measure(options)
    text = table(rows) + "\n\n" + "\n".join(f"- {row.name}: {SUBJECTS[row.name].how}" for row in rows)
    print("\n" + text + "\n")
    page.write(
        options,
        f"quantise-{options.preset}-{options.ranks}r-cpu.md",
        title="Collectives in few bits",
        benchmark="quantise",
        keys=("preset", "ranks", "batch", "context", "rounds", "steps"),
        facts=f"{options.ranks} gloo ranks of one thread on {device('cpu')}, torch {torch.__version__}, Python "
        f"{platform.python_version()}; GPT {options.preset}, fp32, AdamW(fused=True), Python sources as text; "
        f"{(time.time() - begin) / 60:.1f} minutes.",
        text=text,
    )
    return 0
