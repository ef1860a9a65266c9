"""Layers divided over ranks, beside torch.distributed.pipelining and DeepSpeed's engine: step time, peak, waits and losses.

Every row is a group of processes of its own that trains one model from the same weights on the same batches; all ranks of a row
have the same batch. First all rows start, compile, take some steps alone and have their memory watched; of the peers the few
that are fastest stay, so that each has its best schedule there. These take turns with dspass, one step at a time, in an order
drawn anew for each round. Waits are seconds of a step in which a rank waits for a message, counted alike for all, where they
wait for torch's work. The bubble is the share of time in which ranks do not compute.

Ranks that are more than the machine's cores share them: while one waits another computes, so that a step is seldom shorter by a
better schedule, and the bubble is not that of a machine with a core for each. Waits are then the figure to compare.

``--predict`` runs no ranks: it holds the automatic cut against all others in the simulator, and prints what the simulator says
of many stages on H100.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import page, pipeline_predicted
from benchmarks.peers import deepspeed_python
from benchmarks.pipeline_models import MODELS, SHAPES, Shape, resized
from benchmarks.pipeline_rank import BUDGET_OF_PEER, GRACE, PEAK_GOAL, STEP_GOAL, WAYS
from benchmarks.table import cpu
from benchmarks.workers import Group, SubjectFailed
from dspass.planner.schedule_times import StageCost, simulate
from dspass.runtime.schedule import Kind, Timeline
from dspass.timeline import timeline_text

#: What runs in a process of a row.
RANK = "benchmarks.pipeline_rank"

_OURS = "dspass"
_STARTING, _STEP = 1800.0, 600.0
_ALONE = 3


@dataclass
class Row:
    """``seconds`` of steps by round, and of those before it was decided who stays (``alone``); ``waits`` of each rank by step;
    ``peaks`` and ``parameters`` by rank; of dspass its ``budget``, what ran in each round (``runs``) and what was
    ``predicted``. Peaks and budgets are bytes."""

    name: str
    seconds: dict[int, float] = field(default_factory=dict)
    alone: list[float] = field(default_factory=list)
    waits: list[list[float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)
    budget: int | None = None
    parameters: list[int] = field(default_factory=list)
    runs: list[Timeline] = field(default_factory=list)
    predicted: Timeline | None = None
    sent: list[int] = field(default_factory=list)
    why: tuple[str, ...] = ()
    is_out: bool = False
    """Slower than others of the peers when all ran alone."""
    error: str | None = None

    @property
    def step(self) -> float:
        return statistics.median(self.seconds.values() if self.seconds else self.alone)

    @property
    def is_ours(self) -> bool:
        return self.name.startswith(_OURS)

    def hear(self, answers: Sequence[Mapping[str, Any]]) -> float:
        """Keep what the ranks say of a step; answers its seconds, those of the slowest."""
        self.losses.append(next(a["loss"] for a in answers if a["loss"] is not None))
        self.waits.append([a["waited"] for a in answers])
        if "schedule" in answers[0]:
            first = answers[0]
            self.runs.append(Timeline(first["schedule"], tuple(a["spans"] for a in answers)))
            self.predicted, self.why = first["predicted"], first["why"]
            self.sent = [a["sent"] for a in answers]
        return max(a["seconds"] for a in answers)


def measure(names: Sequence[str], model: str, options: argparse.Namespace, python: str | None = None) -> list[Row]:
    """``python`` is the one that has DeepSpeed. A row that fails says why, and the others go on."""
    rows = [Row(name) for name in sorted(names, key=lambda name: WAYS[name].below is not None)]
    settings = {
        "model": model,
        "device": "cpu",
        **{key: getattr(options, key) for key in ("size", "batch", "context", "micro_batches", "schedule")},
    }
    with contextlib.ExitStack() as stack:
        groups: dict[str, Group] = {}

        def attempt(row: Row, work: Callable[[Row], None]) -> None:
            if row.error is not None or row.is_out:
                return
            try:
                work(row)
            except SubjectFailed as error:
                row.error = SubjectFailed.short(str(error))
                tqdm.write(f"failed: {error}")
                if row.name in groups:
                    groups[row.name].close()

        def start(row: Row) -> None:
            here = python if row.name.startswith("deepspeed") else None
            if (below := WAYS[row.name].below) is not None:
                peers = [other for other in rows if not other.is_ours and other.peaks]
                if not peers:
                    raise SubjectFailed(f"{row.name}: no peer has run whose peak its budget could be below")
                one = min(peers, key=lambda peer: peer.step if below == "fastest" else max(peer.peaks))
                row.budget = int(BUDGET_OF_PEER * max(one.peaks))
            given = {**settings, "memory_budget": row.budget}
            group = groups[row.name] = Group(row.name, options.ranks, given, here, module=RANK)
            stack.callback(group.close)
            for _ in range(3):  # they compile
                row.hear(group.ask("step", timeout=_STARTING))
            row.alone = [row.hear(group.ask("step", timeout=_STEP)) for _ in range(_ALONE)]
            row.peaks = group.ask("watch", 2, timeout=_STEP)
            row.parameters = group.ask("parameters")
            row.waits, row.runs = row.waits[-_ALONE:], row.runs[-_ALONE:]

        def thin_out() -> None:
            """Keep the fastest peers; others give back their memory before the next one starts."""
            peers = [row for row in rows if not row.is_ours and row.alone and row.error is None and not row.is_out]
            for row in sorted(peers, key=lambda row: row.step)[options.finalists :]:
                row.is_out = True
                groups[row.name].close()

        for row in tqdm(rows, desc=f"{model}: start, compile, alone", unit="row", ncols=90):
            attempt(row, start)
            thin_out()
        for row in rows:
            if not row.is_out:
                row.waits, row.runs = [], []

        def step(row: Row, number: int) -> None:
            row.seconds[number] = row.hear(groups[row.name].ask("step", timeout=_STEP))

        for number in tqdm(range(options.rounds), desc=f"{model}: rounds", unit="round", ncols=90):
            order = list(rows)
            random.Random(number).shuffle(order)
            for row in order:
                attempt(row, lambda row, number=number: step(row, number))  # type: ignore[misc]
    return rows


def table(rows: Sequence[Row], cores: int | None = None) -> str:
    """Markdown of what was measured of one model, on a machine with so many cores."""
    good = [row for row in rows if row.error is None and (row.seconds or row.is_out)]
    peers = [row for row in good if not row.is_ours]
    running = [row for row in peers if not row.is_out]
    best = min(running, key=lambda row: row.step, default=None)
    base = next((row for row in good if row.name == _OURS), good[0] if good else None)
    lines = [
        "| | step, median | of the fastest peer, paired | peak, the fullest rank | of that peer's | waits a step, ranks "
        "| parameters, ranks | first loss | last loss | differs from the first row by at most |",
        "|---" * 10 + "|",
    ]
    for row in good:
        waits = [statistics.median(waits) for waits in zip(*row.waits, strict=True)]
        cells = [
            row.name,
            _milliseconds(row.step) + (" alone" if row.is_out else ""),
            "",
            f"{max(row.peaks) / 1e6:.1f} MB",
            "",
            ", ".join(_milliseconds(seconds) for seconds in waits),
            ", ".join(f"{count / 1e6:.1f} M" for count in row.parameters),
            f"{row.losses[0]:.5f}",
            f"{row.losses[-1]:.5f}",
            f"{_apart(row, base):.1e}" if base is not None else "",
        ]
        if best is not None:
            cells[2] = "-" if row.is_out else f"{_paired(row, best):.3f}"
            cells[4] = f"{max(row.peaks) / max(best.peaks):.3f}"
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    ours = next((row for row in good if row.name == _OURS), None)
    if best is None or ours is None:
        lines.append(f"- missed: there are no figures of {_OURS} beside a peer")
    else:
        lines += _goals(ours, best, peers, good)
        lines += [_of_budget(row, row.budget, best, peers) for row in good if row.budget is not None]
    lines += [f"- failed: {row.name}: {row.error}" for row in rows if row.error is not None]
    for row in good:
        if row.is_ours and row.runs:
            lines += ["", *_bubble(row, cores or os.cpu_count() or 1)]
    return "\n".join(lines)


def _goals(ours: Row, best: Row, peers: Sequence[Row], good: Sequence[Row]) -> list[str]:
    step, peak = _paired(ours, best), max(ours.peaks) / max(best.peaks)
    smallest = min(peers, key=lambda row: max(row.peaks))
    least = max(ours.peaks) / max(smallest.peaks)
    apart = max(_apart(row, ours) for row in good)
    return [
        f"- {_met(step <= STEP_GOAL)}: a step takes at most {STEP_GOAL} of {best.name}'s, the fastest peer: {step:.3f}",
        f"- {_met(peak <= PEAK_GOAL)}: the peak is at most {PEAK_GOAL} of {best.name}'s: {peak:.3f}",
        f"- {_met(least <= PEAK_GOAL)}: the peak is at most {PEAK_GOAL} of {smallest.name}'s, the smallest of a peer: "
        f"{least:.3f}",
        f"- {_met(apart <= 1e-4)}: losses of {len(ours.losses)} steps agree to 1e-4: at most {apart:.1e} apart",
        f"- limits: with {best.name}'s kernels, its work divided evenly and no waits, a step takes {_least_step(best):.3f} of "
        f"its own; parameters, gradients and two states of AdamW, divided evenly, are {_least_peak(best):.3f} of its peak",
    ]


def _of_budget(row: Row, budget: int, best: Row, peers: Sequence[Row]) -> str:
    peak, step = max(row.peaks), _paired(row, best)
    least, other = min(max(peer.peaks) for peer in peers), max(best.peaks)
    reaches = step <= STEP_GOAL and peak <= PEAK_GOAL * other
    return (
        f"- {_met(peak <= GRACE * budget)}: {row.name} keeps its budget, {budget / 1e6:.1f} MB, within 1 %: its peak is "
        f"{peak / other:.3f} of {best.name}'s and {peak / least:.3f} of the smallest of a peer\n"
        f"- {_met(reaches)}: both at once, a step of at most {STEP_GOAL} and a peak of at most {PEAK_GOAL} of {best.name}'s: "
        f"{row.name} has {step:.3f} and {peak / other:.3f}"
    )


def _least_step(row: Row) -> float:
    """What cuts and schedules can reach, over the row's step: ranks compute, on average, while they do not wait."""
    waits = [statistics.median(waits) for waits in zip(*row.waits, strict=True)]
    return 1 - statistics.mean(waits) / row.step


def _least_peak(row: Row) -> float:
    """What a rank holds all the time in fp32 if no rank holds more, over the fullest's peak."""
    return 16 * statistics.mean(row.parameters) / max(row.peaks)


def _bubble(row: Row, cores: int) -> list[str]:
    """What the simulator said and what was seen."""
    measured = [run.bubble for run in row.runs]
    bubble = statistics.median(measured)
    shown = min(row.runs, key=lambda run: abs(run.bubble - bubble))
    schedule = shown.schedule
    again = simulate(schedule, _costs(row.runs))
    lines = [
        f"**{row.name}** ran {schedule.name}, {schedule.stages} stages on {schedule.ranks} ranks, {schedule.micro_batches} "
        f"micro-batches; ranks sent {', '.join(f'{count / 1e6:.2f} MB' for count in row.sent)} a step.",
        "",
    ]
    if row.predicted is not None:
        apart = abs(row.predicted.bubble - bubble)
        lines.append(
            f"- {_met(apart <= 0.05)}: the measured bubble is within 5 points of the simulated one: {_percent(bubble)} "
            f"measured ({_percent(min(measured))} to {_percent(max(measured))}), {_percent(row.predicted.bubble)} simulated "
            f"from the cost model, {100 * apart:.1f} points apart"
        )
    lines.append(
        f"- with the stages' measured times in place of the cost model's, and messages that cost nothing, the simulator "
        f"says {_percent(again.bubble)} of {_milliseconds(again.seconds)}; forwards and backwards took "
        f"{_milliseconds(statistics.median(run.seconds for run in row.runs))}"
    )
    if schedule.ranks > cores:
        lines.append(
            f"- {schedule.ranks} ranks share {cores} cores: what computes is stretched by what computes beside it, and the "
            "bubble is not that of ranks with a core each"
        )
    lines += [f"- {line}" for line in row.why]
    pictures = {"predicted": row.predicted, "measured": shown}  # each on a scale of its own
    texts = [timeline_text({name: p}, width=96).plain for name, p in pictures.items() if p is not None and p.seconds]
    return [*lines, "", "```", *texts, "```"]


def _costs(runs: Sequence[Timeline]) -> list[StageCost]:
    """Of each stage, as its actions were seen: medians."""
    seen: dict[tuple[int, Kind], list[float]] = defaultdict(list)
    for span in (span for run in runs for row in run.spans for span in row):
        seen[span.action.stage, span.action.kind].append(span.end - span.start)
    times = {key: statistics.median(values) for key, values in seen.items()}

    def of(stage: int, kind: Kind) -> float:
        return times.get((stage, kind), 0.0)

    return [
        StageCost(
            forward=of(stage, Kind.FORWARD),
            backward=of(stage, Kind.BACKWARD),
            input=of(stage, Kind.INPUT),
            weight=of(stage, Kind.WEIGHT),
        )
        for stage in range(runs[0].schedule.stages)
    ]


def _met(is_met: bool) -> str:
    return "met" if is_met else "missed"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _paired(row: Row, other: Row) -> float:
    """Of the rounds that both have."""
    return statistics.median(row.seconds[i] / other.seconds[i] for i in row.seconds if i in other.seconds)


def _apart(row: Row, other: Row) -> float:
    return max(abs(a - b) for a, b in zip(row.losses, other.losses, strict=False))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", default=",".join(MODELS), help="with commas between")
    parser.add_argument("--size", choices=SHAPES, default="full", help="of the models")
    parser.add_argument("--ranks", type=int, default=2, help="processes of a row; they divide the layers")
    parser.add_argument("--micro-batches", type=int, default=8, help="parts of a batch, for dspass and peers alike")
    parser.add_argument("--schedule", default="auto", help="dspass's; peers have theirs")
    parser.add_argument("--batch", type=int, help="samples of a step, in place of the model's")
    parser.add_argument("--context", type=int, help="tokens of a sample, in place of the model's; at most as many")
    parser.add_argument("--rounds", type=int, default=11, help="interleaved rounds of one step")
    parser.add_argument("--finalists", type=int, default=3, help="peers that take part in the rounds, the fastest ones")
    parser.add_argument(
        "--with-deepspeed", action="store_true", help="make .venv-deepspeed with DeepSpeed 0.19, and run it"
    )
    parser.add_argument(
        "--deepspeed-python", metavar="PATH", help="a Python that has DeepSpeed, torch and transformers"
    )
    parser.add_argument("--only", default="", help=f"rows, with commas between: {', '.join(WAYS)}")
    parser.add_argument("--predict", action="store_true", help="the simulator's part, which runs no ranks")
    parser.add_argument("--layers", type=int, default=80, help="of the Llama that is predicted for many stages")
    parser.add_argument("--length", type=int, default=4096, help="tokens of its samples")
    parser.add_argument("--out", default="benchmarks/results", help="where the table is written")


def run(options: argparse.Namespace) -> int:
    begin = time.time()
    if options.predict:
        text = pipeline_predicted.text(options.size, options.layers, options.length)
        page.write(
            options,
            "pipeline-predicted.md" if options.size == "full" else f"pipeline-predicted-{options.size}.md",
            title="Pipelines in the simulator",
            benchmark="pipeline --predict",
            keys=("size", "layers", "length"),
            facts=f"predictions: nothing of this page was run. torch {torch.__version__}, transformers "
            f"{version('transformers')}, Python {platform.python_version()}.",
            text=text,
        )
        return 0
    models, names = options.models.split(","), [n for n in options.only.split(",") if n]
    wrong = _refused(options, models, names)
    if wrong:
        print(f"error: {wrong}", file=sys.stderr)
        return 2
    python, said = deepspeed_python(options.deepspeed_python, options.with_deepspeed)
    asked = names or [name for name, way in WAYS.items() if way.usual]
    names = [name for name in asked if not name.startswith("deepspeed") or python is not None]
    texts, failed = [], False
    for model in models:
        shape = _shape(model, options)
        fit = [name for name in names if options.ranks * WAYS[name].virtual <= shape.layers]
        rows = measure(fit, model, options, python)
        texts.append(
            "\n".join(
                [
                    f"## {model}",
                    "",
                    f"{shape}",
                    "",
                    table(rows),
                    *(f"- left out: {name}: more stages than layers" for name in names if name not in fit),
                ]
            )
        )
        print("\n" + texts[-1] + "\n", flush=True)
        failed |= any(row.error for row in rows)
    ways = [f"- {name}: {WAYS[name].how}" for name in names]
    page.write(
        options,
        f"pipeline-{options.size}-{options.ranks}r-cpu.md",
        title="Layers divided over ranks",
        benchmark="pipeline" + " --with-deepspeed" * any(name.startswith("deepspeed") for name in names),
        keys=(
            *("models", "size", "ranks", "micro_batches", "schedule", "rounds", "finalists"),
            *(key for key in ("batch", "context", "only") if getattr(options, key)),
        ),
        facts=f"{options.ranks} gloo ranks of one thread on {cpu()}, torch {torch.__version__}, transformers "
        f"{version('transformers')}, Python {platform.python_version()}; fp32, AdamW(fused=True), Python sources as text; "
        f'rows "alone" were slower than {options.finalists} other peers before the rounds; '
        f"{(time.time() - begin) / 60:.1f} minutes.",
        text="\n\n".join([*texts, "\n".join([*ways, f"- DeepSpeed: {said}"])]),
    )
    return int(failed)


def _shape(model: str, options: argparse.Namespace) -> Shape:
    return resized(SHAPES[options.size][model], options.batch, options.context)


def _refused(options: argparse.Namespace, models: Sequence[str], names: Sequence[str]) -> str | None:
    """What of the command line cannot be, and the way out."""
    for kind, given, known in (("model", models, MODELS), ("row", names, tuple(WAYS))):
        for name in given:
            if name not in known:
                return f"no {kind} {name!r}; there are {', '.join(known)}"
    for model in models:
        shape, most = _shape(model, options), SHAPES[options.size][model].context
        if shape.batch % options.micro_batches:
            return f"--micro-batches {options.micro_batches} does not divide the batch of {model}, {shape.batch}: set --batch"
        if shape.context > most:
            return f"--context {shape.context}: {model} takes {most} at most"
        if not 2 <= options.ranks <= shape.layers:
            return f"--ranks {options.ranks}: {model} has {shape.layers} layers; use 2 to as many"
    return None
