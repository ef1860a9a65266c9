"""Experts divided over ranks beside ZeRO-3, FSDP2 and DeepSpeed's AutoEP: step time, peak, bytes of a step, and losses.

Every row is a group of processes of its own that trains one mixture of experts of ``transformers``, with its auxiliary loss,
from the same weights on the same batches; rows take turns, one step at a time, in an order drawn anew for each round. Bytes are
those that one rank sends in a step, a mean over ranks: dspass's as it counts them, others' as the profiler saw them. The bound
of the exchanges is what even routing sends: rows there and back in the forward, and again in the backward,
``4 * tokens * top_k * hidden * (N - 1) / N`` values a layer. Imbalance is the most rows of an expert, or of a rank, over the
mean.

DeepSpeed has an environment of its own, with a release of ``transformers`` that its AutoEP knows. All processes are alive at a
time, 1 to 2 GB each; ``--only`` takes fewer rows.
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version

import torch
from tqdm import tqdm

from benchmarks import experts_predicted, page
from benchmarks.experts_rank import PRESETS, Shape
from benchmarks.peers import deepspeed_python
from benchmarks.subjects import SUBJECTS
from benchmarks.table import cpu
from benchmarks.workers import Group, SubjectFailed

#: The first is held against the second; the last is there where DeepSpeed is.
WAYS = (
    "dspass-3-experts",
    "dspass-3",
    "dspass-3-experts-parts",
    "dspass-3-products",
    "fsdp2-compile-parts",
    "deepspeed-autoep",
)
_OURS, _PLAIN, _DEEPSPEED = WAYS[0], WAYS[1], WAYS[-1]
_STARTING, _STEP = 1800.0, 600.0
#: What runs in a process of a row.
RANK = "benchmarks.experts_rank"
_KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all")


@dataclass
class Row:
    """``sent`` are bytes of a step by kind of collective; ``rows`` are those of the last step for each expert, by layer."""

    name: str
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    sent: dict[str, float] = field(default_factory=dict)
    peak: int = 0
    rows: list[list[int]] = field(default_factory=list)
    error: str | None = None

    @property
    def step(self) -> float:
        return statistics.median(self.seconds)


def measure(names: Sequence[str], options: argparse.Namespace, python: str | None = None) -> list[Row]:
    """``python`` is the one that has DeepSpeed. A row that fails says why, and the others go on."""
    rows = [Row(name) for name in names]
    settings = {"preset": options.preset, "batch": options.batch, "context": options.context, "device": "cpu"}
    with contextlib.ExitStack() as stack:
        groups: dict[str, Group] = {}

        def attempt(row: Row, work: Callable[[Row], None]) -> None:
            if row.error is not None:
                return
            try:
                work(row)
            except SubjectFailed as error:
                row.error = SubjectFailed.short(str(error))
                tqdm.write(f"failed: {error}")
                groups[row.name].close()

        def start(row: Row) -> None:
            here = python if row.name == _DEEPSPEED else None
            group = groups[row.name] = Group(row.name, options.ranks, settings, here, module=RANK)
            stack.callback(group.close)
            for _ in range(3):
                step(row, _STARTING)
            row.seconds.clear()  # they compile

        def step(row: Row, timeout: float = _STEP) -> None:
            answers = groups[row.name].ask("steps", 1, timeout=timeout)
            row.seconds.append(max(seconds for seconds, _ in answers))
            row.losses.append(statistics.fmean(losses[0] for _, losses in answers))

        def watch(row: Row) -> None:
            group = groups[row.name]
            watched = group.ask("watch", 2, timeout=_STEP)
            row.peak = max(w["peak"] for w in watched)
            found = [w["collectives"] for w in watched]
            row.sent = {
                kind: statistics.fmean(f.get(kind, (0, 0.0))[1] for f in found)
                for kind in sorted({kind for f in found for kind in f})
            }
            if row.name == _OURS:
                row.rows = group.ask("routing", timeout=_STEP)[0]  # every rank knows those of all

        for row in tqdm(rows, desc="start and compile", unit="row", ncols=90):
            attempt(row, start)
        for number in tqdm(range(options.rounds), desc="rounds", unit="round", ncols=90):
            order = list(rows)
            random.Random(number).shuffle(order)
            for row in order:
                attempt(row, step)
        for row in tqdm(rows, desc="memory and traffic", unit="row", ncols=90):
            attempt(row, watch)
    return rows


def bound(shape: Shape, tokens: int, ranks: int) -> float:
    """Bytes that a rank of ``tokens`` sends in a step to the experts of other ranks and back, forward and backward, in fp32."""
    return 4 * shape.layers * tokens * shape.top_k * shape.hidden * 4 * (ranks - 1) / ranks


def table(rows: Sequence[Row], shape: Shape, tokens: int, ranks: int) -> str:
    """Markdown of what was measured on ``ranks`` of ``tokens`` each."""
    good = {row.name: row for row in rows if row.error is None}
    timed = [row for row in rows if row.seconds]  # some may have failed later
    plain, ours = good.get(_PLAIN), good.get(_OURS)
    lines = [
        "| | step, median | of dspass-3, paired | peak of a rank | of dspass-3 | sent a step | of dspass-3 | first loss "
        "| last loss | differs from dspass-3 by at most |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in timed:
        sent = sum(row.sent.values())
        cells = [row.name, f"{row.step * 1e3:.0f} ms", "", _megabytes(row.peak), "", _megabytes(sent), ""]
        cells += [f"{row.losses[0]:.5f}", f"{row.losses[-1]:.5f}", ""]
        if plain is not None:
            cells[2] = f"{_paired(row, plain):.3f}"
            cells[4] = f"{row.peak / plain.peak:.3f}" if row.peak else "-"
            cells[6] = f"{sent / sum(plain.sent.values()):.3f}" if row.sent else "-"
            cells[9] = f"{_apart(row, plain):.1e}"
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    if plain is None or ours is None:
        lines.append(f"- missed: there are no figures of {_OURS} beside {_PLAIN}")
    else:
        time, peak = _paired(ours, plain), ours.peak / plain.peak
        apart = max(_apart(row, plain) for row in timed)
        lines += [
            f"- {_met(time <= 0.8)}: a step takes at most 0.8 of ZeRO-3's: {time:.3f}",
            f"- {_met(peak <= 0.8)}: the peak is at most 0.8 of ZeRO-3's: {peak:.3f}",
            f"- {_met(apart <= 1e-4)}: losses of {len(plain.losses)} steps agree to 1e-4: at most {apart:.1e} apart",
        ]
    lines += [f"- failed: {row.name}: {row.error}" for row in rows if row.error is not None]
    lines += ["", "| sent a step | " + " | ".join(_KINDS) + " |", "|---" * (len(_KINDS) + 1) + "|"]
    lines += [
        f"| {row.name} | " + " | ".join(f"{row.sent.get(kind, 0.0) / 1e6:.2f} MB" for kind in _KINDS) + " |"
        for row in good.values()
    ]
    if ours is not None:
        least = bound(shape, tokens, ranks)
        lines += [
            "",
            f"Rows to experts and back: {ours.sent['all-to-all'] / 1e6:.2f} MB of a rank, "
            f"{ours.sent['all-to-all'] / least:.3f} of the bound, {least / 1e6:.2f} MB.",
            "",
            *_routing(ours.rows, ranks),
        ]
    return "\n".join(lines)


def _routing(layers: Sequence[Sequence[int]], ranks: int) -> list[str]:
    lines = [
        "| layer | rows | of an expert, least | most | over the mean | of a rank, most over the mean |",
        "|---" * 6 + "|",
    ]
    for number, rows in enumerate(layers):
        here = len(rows) // ranks
        of_ranks = [sum(rows[rank * here : (rank + 1) * here]) for rank in range(ranks)]
        cells = [
            *(str(count) for count in (number, sum(rows), min(rows), max(rows))),
            *(f"{max(counts) * len(counts) / sum(counts):.2f}" for counts in (rows, of_ranks)),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _met(is_met: bool) -> str:
    return "met" if is_met else "missed"


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.1f} MB" if count else "-"


def _paired(row: Row, plain: Row) -> float:
    """Of the rounds that both have: the first ones."""
    return statistics.median(a / b for a, b in zip(row.seconds, plain.seconds, strict=False))


def _apart(row: Row, plain: Row) -> float:
    return max(abs(a - b) for a, b in zip(row.losses, plain.losses, strict=False))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=PRESETS, default="mixtral", help="model")
    parser.add_argument("--ranks", type=int, default=2, help="processes of a row; they divide the experts")
    parser.add_argument("--batch", type=int, default=2, help="samples of one rank")
    parser.add_argument("--context", type=int, default=256, help="bytes of a sample")
    parser.add_argument("--rounds", type=int, default=11, help="interleaved rounds of one step")
    parser.add_argument(
        "--with-deepspeed", action="store_true", help="make .venv-deepspeed with DeepSpeed 0.19, and run it"
    )
    parser.add_argument(
        "--deepspeed-python", metavar="PATH", help="a Python that has DeepSpeed, torch and transformers"
    )
    parser.add_argument("--only", default="", help=f"rows, with commas between: {', '.join(WAYS)}")
    parser.add_argument("--out", default="benchmarks/results", help="where the table is written")
    parser.add_argument("--predict", action="store_true", help="measure nothing: chunks and parts on H100s, predicted")
    parser.add_argument(
        "--imbalance", type=float, default=1.0, help="with --predict: rows of the busiest rank over the mean"
    )


def run(options: argparse.Namespace) -> int:
    begin = time.time()
    if options.predict:
        text, facts = experts_predicted.page_of(options.imbalance)
        print("\n" + text + "\n")
        page.write(
            options,
            "experts-predicted.md",
            title="Experts in chunks, batches in parts, predicted",
            benchmark="experts --predict",
            keys=("imbalance",),
            facts=facts,
            text=text,
        )
        return 0
    shape = PRESETS[options.preset]
    names = options.only.split(",") if options.only else list(WAYS)
    if wrong := next((name for name in names if name not in WAYS), None):
        print(f"no row {wrong!r}; there are {', '.join(WAYS)}", file=sys.stderr)
        return 2
    python, said = deepspeed_python(options.deepspeed_python, options.with_deepspeed)
    names = [name for name in names if name != _DEEPSPEED or python is not None]
    rows = measure(names, options, python)
    text = "\n".join(
        [
            table(rows, shape, options.batch * options.context, options.ranks),
            "",
            *(f"- {row.name}: {SUBJECTS[row.name].how}" for row in rows),
            f"- DeepSpeed: {said}",
        ]
    )
    print("\n" + text + "\n")
    page.write(
        options,
        f"experts-{options.preset}-{options.ranks}r-cpu.md",
        title="Experts divided over ranks",
        benchmark="experts" + " --with-deepspeed" * (_DEEPSPEED in names),
        keys=("preset", "ranks", "batch", "context", "rounds", *(["only"] if options.only else [])),
        facts=f"{options.ranks} gloo ranks of one thread on {cpu()}, torch {torch.__version__}, transformers "
        f"{version('transformers')}, Python {platform.python_version()}; {shape}, fp32, AdamW(fused=True), Python sources as "
        f"text; {(time.time() - begin) / 60:.1f} minutes.",
        text=text,
    )
    return int(any(row.error for row in rows))
