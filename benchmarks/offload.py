"""Optimiser states and parameters on the host: what it frees on the device, and what a step pays for it.

Every row is a group of processes of its own that trains one model from the same weights on the same batch; rows take turns. A
CPU has no second memory: what dspass maps outside of torch's allocator stands for it, and copies between the two for those over
a link, at the rate of a copy in main memory, which is measured in the same run. The bound of a row is the bytes that it copies
in a step over that rate. The last row's budget is half of what parameters, gradients and states take.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

from benchmarks import page
from benchmarks.memory_points import PRESETS, Point, Ranks
from benchmarks.workers import Group

_STARTING, _STEP = 1800.0, 600.0


@dataclass
class Row:
    """One way to hold what persists: bytes of it in all, of states and of parameters on the host."""

    point: Point
    whole: int = 0
    states: int = 0
    parameters: int = 0

    @property
    def copied(self) -> int:
        """Bytes that cross the link in a step: states both ways, shards for both graphs' gathers and gradients once. States of
        parameters on the host stay there."""
        return 3 * self.parameters if self.parameters else 2 * self.states


def rate() -> float:
    """Bytes a second of a copy in main memory."""
    there, here = (torch.ones(2**26, dtype=torch.uint8) for _ in range(2))
    times = []
    for _ in range(15):
        begin = time.perf_counter()
        here.copy_(there)
        times.append(time.perf_counter() - begin)
    return here.nbytes / statistics.median(times)


def measure(options: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []
    with contextlib.ExitStack() as stack:
        groups: list[Group] = []

        def start(point: Point) -> Row:
            with tempfile.TemporaryDirectory() as none:
                made = Ranks(point, options.model, options.preset, options.ranks, {"DSPASS_DEVICES": none})
                stack.callback(made.close)
                answers = made.ask("start", 3, timeout=_STARTING)
            first = answers[0]
            if first.smallest is not None:
                raise SystemExit(f"{point.name}: {first.why}")
            point.predicted = max((a.peak for a in answers if a.peak is not None), default=None)
            point.losses = [sum(step) / len(step) for step in zip(*(a.losses for a in answers), strict=True)]
            held = made.ask("held", timeout=_STEP)
            row = Row(point, *(max(values) for values in zip(*held, strict=True)))
            groups.append(made)
            rows.append(row)
            return row

        names = ["dspass", "dspass + offload_optimizer"] + ["dspass + offload_param"] * (options.ranks > 1)
        with tqdm(total=len(names) + 1, desc="start and compile", unit="row", ncols=90) as bar:
            for name in names:
                start(Point(name, "no budget"))
                bar.update()
            budget = round(rows[0].whole * (0.5 if options.ranks > 1 else 0.7))
            start(Point(names[-1], f"{budget / 1e6:.1f} MB", budget=budget))
            bar.update()
        for number in tqdm(range(options.rounds), desc="rounds", unit="round", ncols=90):
            order = list(range(len(rows)))
            random.Random(number).shuffle(order)
            for i in order:
                answers = groups[i].ask("steps", 1, timeout=_STEP)
                rows[i].point.seconds.setdefault(0, []).append(max(seconds for seconds, _ in answers))
                rows[i].point.losses += [
                    sum(step) / len(step) for step in zip(*(losses for _, losses in answers), strict=True)
                ]
        for row, group in zip(rows, groups, strict=True):
            row.point.peak = max(group.ask("peak", timeout=_STEP))
    return rows


def table(rows: Sequence[Row], link: float) -> str:
    """Markdown of what was measured."""
    plain = rows[0]
    lines = [
        f"A copy in main memory: {link / 1e9:.1f} GB/s. Parameters, gradients and states: {plain.whole / 1e6:.1f} MB a rank.",
        "",
        "| | budget | measured peak | on the host | step, median | more than the first row | copied a step "
        "| bound of the copies | losses |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        point = row.point
        more = statistics.median(a - b for a, b in zip(point.seconds[0], plain.point.seconds[0], strict=True))
        cells = [
            point.system,
            point.setting,
            f"{point.peak / 1e6:.1f} MB",
            f"{(row.states + row.parameters) / 1e6:.1f} MB",
            f"{point.step * 1e3:.0f} ms",
            "" if row is plain else f"{more * 1e3:.0f} ms",
            f"{row.copied / 1e6:.1f} MB",
            f"{row.copied / link * 1e3:.1f} ms",
            "equal" if point.losses == plain.point.losses else "differ",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    last = rows[-1].point
    assert last.budget is not None
    held = last.peak <= last.budget * 1.01
    lines += [
        "",
        f"- {'met' if held else 'missed'}: the peak under a budget of {last.budget / plain.whole:.2f} of what persists is "
        f"within it (1 % grace): {last.peak / 1e6:.1f} MB of {last.budget / 1e6:.1f} MB",
        f"- {'met' if all(r.point.losses == plain.point.losses for r in rows) else 'missed'}: losses are bitwise those of the "
        "first row",
    ]
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=PRESETS, default="states", help="width, layers and batch")
    parser.add_argument("--model", default="gpt", help="gpt, llama or vit")
    parser.add_argument("--ranks", type=int, choices=(1, 2), default=2, help="processes of a row")
    parser.add_argument("--rounds", type=int, default=11, help="interleaved rounds of one step")
    parser.add_argument("--out", default="benchmarks/results", help="where the table is written")


def run(options: argparse.Namespace) -> int:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    begin = time.time()
    link = rate()
    text = table(measure(options), link)
    print("\n" + text + "\n")
    page.write(
        options,
        f"offload-{options.preset}-{options.ranks}r-cpu.md",
        title="Optimiser states and parameters on the host",
        benchmark="offload",
        keys=("preset", "model", "ranks", "rounds"),
        facts=f"{options.ranks} gloo ranks of one thread, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.machine()}; {options.model}, preset {options.preset}, AdamW(fused=True), fp32; {options.rounds} rounds; "
        f"{(time.time() - begin) / 60:.1f} minutes. The host is memory outside of torch's allocator.",
        text=text,
    )
    return 0
