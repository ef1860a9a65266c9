"""ZeRO-3 with collectives in few bits beside itself without: bytes and time of a step, and the loss on real text.

Every row is a group of processes of its own that trains one GPT from the same weights on the same batches; rows take turns,
some steps at a time. Bytes are those that one rank sends in a step, as counted; their bound is what the plain row sends, with
each value as many bits as its format has and a share of one fp32 scale: what fills no whole block makes the difference. A loss
is the mean over ranks and over the last tenth of the steps, beside the plain row's over the same ones. Losses do not depend on
who takes turns: where all rows would take too long, ``--long`` ones go on alone to ``--long-steps`` when all were timed. Runs
that differ in their last bits part, and how far apart they are at the end is chance: ``--control`` is one plain row more, from
weights that are each off by a thousandth at random.

On more than two ranks nodes of two are supposed. What crosses nodes is counted for one node: of a collective over all ranks the
share of its bytes that other nodes hold, of one across nodes what all ranks of a node send, of one inside of a node nothing. It
is held against what ZeRO-3 sends in bf16: three times the parameters.
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
CONTROL = "dspass-3, first weights off by 0.1 %"


@dataclass
class Row:
    """One of :data:`benchmarks.subjects.SUBJECTS`, the ``subject``. ``gathers`` and ``reductions`` are formats, None where they
    travel whole; ``node`` ranks hold a second shard; the first weights are ``shaken`` by a share of each; ``sent`` are bytes of
    a step by kind of collective and group."""

    name: str
    subject: str
    gathers: str | None = None
    reductions: str | None = None
    node: int = 1
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    sent: dict[tuple[str, str], int] = field(default_factory=dict)
    peak: float = 0.0
    shaken: float = 0.0

    @property
    def bytes(self) -> int:
        return sum(self.sent.values())

    def loss(self, steps: int) -> float:
        """After so many steps."""
        return statistics.fmean(self.losses[steps - max(steps // 10, 1) : steps])

    def bound(self, plain: Mapping[tuple[str, str], int], ranks: int) -> float:
        """Bytes of a step, from those of the row that sends all whole, in fp32.

        With nodes the backward gathers whole values inside of them; gradients in few bits are reduced there first, and each
        rank's part of them across.
        """
        gathers, reductions = _share(self.gathers), _share(self.reductions)
        inside, across = (self.node - 1) / self.node, (ranks / self.node - 1) / ranks
        total = 0.0
        for (kind, _), count in plain.items():
            whole = count * ranks / (ranks - 1)  # of all ranks' parts; a rank sends all but its own
            if kind == "all-gather" and self.node > 1:
                total += count / 2 * gathers + whole / 2 * inside
            elif kind == "reduce-scatter" and self.node > 1 and self.reductions is not None:
                total += whole * (inside + across) * reductions
            else:
                total += count * {"all-gather": gathers, "reduce-scatter": reductions}.get(kind, 1.0)
        return total

    def across(self, ranks: int, node: int) -> float:
        """Bytes of a step that leave one node of ``node`` ranks."""
        nodes = ranks // node
        shares = {"data": ranks / (ranks - 1) * (nodes - 1) / nodes, "across": node, "node": 0}
        return sum(count * shares[group] for (_, group), count in self.sent.items())


def _share(format: str | None) -> float:
    """What a value and its part of a scale take, over an fp32 value."""
    return 1.0 if format is None else (FORMATS[format].bits + 32 / QuantiseConfig().block) / 32


def measure(options: argparse.Namespace) -> tuple[list[Row], int]:
    """The rows, and how many parameters the model has."""
    rows = [
        Row("dspass-3", "dspass-3"),
        *(
            Row(name, name, *how)
            for name, how in QUANTISED.items()
            if (how[2] == 1 or options.ranks > how[2]) and (not options.only or name in options.only)
        ),
    ]
    if options.control:
        rows.insert(1, Row(CONTROL, "dspass-3", shaken=1e-3))
    settings = {"preset": options.preset, "batch": options.batch, "context": options.context, "device": "cpu"}
    settings |= {"lr": options.lr}
    if options.schedule == "cosine":
        settings |= {"cosine_steps": options.long_steps if options.long else options.rounds * options.steps}
    with contextlib.ExitStack() as stack:
        groups = []
        for row in tqdm(rows, desc="start and compile", unit="row", ncols=90):
            group = Group(row.subject, options.ranks, settings | {"shaken": row.shaken})
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
            row.peak = max(w["peak"] for w in group.ask("watch", 1, timeout=_STEP))
            row.sent = group.ask("traffic", timeout=_STEP)[0]
        count = groups[0].ask("count", timeout=_STEP)[0]
        for row, group in zip(rows, groups, strict=True):
            if (row.subject == rows[0].name and options.long) or row.name in options.long:
                left = range(len(row.losses), options.long_steps, options.steps)
                for _ in tqdm(left, desc=f"{row.name} alone", unit="round", ncols=90):
                    _note(row, group, options.steps, _STEP)
                    row.seconds.pop()  # not in turns
            group.close()
        return rows, count


def _note(row: Row, group: Group, steps: int, timeout: float) -> None:
    answers = group.ask("steps", steps, timeout=timeout)
    row.seconds.append(max(seconds for seconds, _ in answers))
    row.losses += [statistics.fmean(step) for step in zip(*(losses for _, losses in answers), strict=True)]


def table(rows: Sequence[Row], ranks: int, parameters: int) -> str:
    """Markdown of what was measured."""
    plain = rows[0]
    lines = [
        "| | gathers | reductions | sent a step | of plain | of bound | step, median | of plain, paired | peak "
        "| steps | loss | of plain |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratios = [a / b for a, b in zip(row.seconds, plain.seconds, strict=True)]
        steps = len(row.losses)
        cells = [
            row.name,
            row.gathers or "whole",
            row.reductions or "whole",
            f"{row.bytes / 1e6:.2f} MB",
            f"{row.bytes / plain.bytes:.3f}",
            f"{row.bytes / row.bound(plain.sent, ranks):.3f}",
            f"{statistics.median(row.seconds) * 1e3:.0f} ms",
            f"{statistics.median(ratios):.3f}",
            f"{row.peak / 1e6:.1f} MB",
            str(steps),
            f"{row.loss(steps):.4f}",
            f"{row.loss(steps) / plain.loss(steps) - 1:+.2%}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    few = [row for row in rows[1:] if not row.shaken]
    for steps in sorted({len(row.losses) for row in few}, reverse=True):
        trained = [row for row in few if len(row.losses) == steps]
        within = [row for row in trained if row.loss(steps) <= plain.loss(steps) * 1.005]
        goal = f"the loss after {steps} steps is within 0.5 % of the plain row's"
        lines.append(f"- {'met' if len(within) == len(trained) else 'missed'}: {goal}: {len(within)} of {len(trained)}")
    if (node := max(row.node for row in rows)) > 1:
        lines += _across(rows, ranks, node, parameters)
    return "\n".join(lines)


def _across(rows: Sequence[Row], ranks: int, node: int, parameters: int) -> list[str]:
    nodes = ranks // node
    reference = 3 * 2 * parameters * (nodes - 1) / nodes
    shares = {row.name: row.across(ranks, node) / reference for row in rows}
    last = rows[-1].name
    return [
        f"- {'met' if shares[last] <= 0.26 else 'missed'}: {last} sends at most 0.26 of three times the parameters in bf16 "
        f"from a node of {node} to the others: {shares[last]:.3f} ({reference / 1e6:.1f} MB are one)",
        "",
        "| | crosses nodes, of one node | of three times the parameters in bf16 |",
        "|---|---|---|",
        *(f"| {row.name} | {row.across(ranks, node) / 1e6:.2f} MB | {shares[row.name]:.3f} |" for row in rows),
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=PRESETS, default="12m", help="model size")
    parser.add_argument("--ranks", type=int, default=2, help="processes of a row")
    parser.add_argument("--batch", type=int, default=2, help="samples of one rank")
    parser.add_argument("--context", type=int, default=128, help="bytes of a sample")
    parser.add_argument("--rounds", type=int, default=50, help="interleaved rounds")
    parser.add_argument("--steps", type=int, default=10, help="steps of a row in one round")
    parser.add_argument(
        "--only", nargs="*", choices=QUANTISED, default=[], help="rows beside the plain one (default all)"
    )
    parser.add_argument(
        "--control", action="store_true", help="a plain row from weights that are off by a thousandth: what chance does"
    )
    parser.add_argument("--lr", type=float, default=3e-4, help="the largest learning rate (default 3e-4)")
    parser.add_argument(
        "--schedule",
        choices=("constant", "cosine"),
        default="constant",
        help="cosine: up for a tenth, then down to nothing",
    )
    parser.add_argument(
        "--long", nargs="*", choices=QUANTISED, default=[], help="rows that go on alone behind the rounds"
    )
    parser.add_argument("--long-steps", type=int, default=500, help="steps of each of these in all (default 500)")
    parser.add_argument("--out", default="benchmarks/results", help="where the table is written")


def run(options: argparse.Namespace) -> int:
    begin = time.time()
    rows, parameters = measure(options)
    text = (
        table(rows, options.ranks, parameters)
        + "\n\n"
        + "\n".join(f"- {row.name}: {SUBJECTS[row.subject].how}" for row in rows)
    )
    print("\n" + text + "\n")
    page.write(
        options,
        f"quantise-{options.preset}-{options.ranks}r-cpu.md",
        title="Collectives in few bits",
        benchmark="quantise",
        keys=(
            *("preset", "ranks", "batch", "context", "rounds", "steps", "lr", "schedule"),
            *(("long", "long_steps") if options.long else ()),
            *(name for name in ("only", "control") if getattr(options, name)),
        ),
        facts=f"{options.ranks} gloo ranks of one thread on {device('cpu')}, torch {torch.__version__}, Python "
        f"{platform.python_version()}; GPT {options.preset}, fp32, AdamW(fused=True), Python sources as text; "
        f"{(time.time() - begin) / 60:.1f} minutes.",
        text=text,
    )
    return 0
