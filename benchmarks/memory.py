"""Step time against measured peak memory: dspass under budgets beside Inductor's own budget and checkpoints, interleaved.

Every point is a process of its own, of one thread, that trains one model from the same random weights on the same batch:
dspass under a budget in bytes, Inductor with ``activation_memory_budget`` as a ratio, Inductor over ``torch.utils.checkpoint``
of each block. The peak is that of all of the process's tensors, by the profiler's memory events (:mod:`benchmarks.measure`).

A peer's point is compared with the best that dspass has at no more memory, and at no more time: points are not interpolated.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import random
import statistics
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

#: Width, layers, heads, tokens a sample and samples: activations are several times the states.
PRESETS = {"tiny": (64, 2, 2, 32, 4), "small": (256, 4, 4, 128, 16), "85m": (768, 12, 12, 256, 8)}
MODELS = ("gpt", "llama", "vit")
_WAIT = 900.0


@dataclass
class Point:
    """One process: how it trains, and what was measured of it. ``predicted`` is the plan's own peak."""

    system: str
    setting: str
    budget: int | None = None
    predicted: int | None = None
    predicted_seconds: float | None = None
    peak: int = 0
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    error: str | None = None

    @property
    def step(self) -> float:
        return statistics.median(self.seconds)

    @property
    def name(self) -> str:
        return f"{self.system} {self.setting}".strip()


def build(name: str, preset: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any], Sequence[nn.Module]]:
    """A model with random weights, one batch of random numbers, and its blocks."""
    width, layers, heads, length, batch = PRESETS[preset]
    torch.manual_seed(0)
    tokens = torch.randint(0, 256, (batch, length))
    if name == "gpt":
        from examples.gpt import GPT, GPTConfig

        gpt = GPT(GPTConfig(context=length, layers=layers, heads=heads, width=width, dropout=0.0))
        return gpt, (tokens, tokens), {}, list(gpt.blocks)
    if name == "llama":
        from transformers import LlamaConfig, LlamaForCausalLM

        llama = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=256,
                hidden_size=width,
                intermediate_size=width * 8 // 3,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=heads,
                max_position_embeddings=length,
                use_cache=False,
            )
        )
        return llama, (), {"input_ids": tokens, "labels": tokens}, list(llama.model.layers)
    from transformers import ViTConfig, ViTForImageClassification

    side = round(length**0.5) * 8
    vit = ViTForImageClassification(
        ViTConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            image_size=side,
            patch_size=8,
            num_labels=10,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    labels = torch.randint(0, 10, (batch,))
    return vit, (), {"pixel_values": torch.randn(batch, 3, side, side), "labels": labels}, _blocks(vit, layers)


def _blocks(model: nn.Module, layers: int) -> list[nn.Module]:
    """The list of equal modules that is as long as the model is deep."""
    return next(list(m) for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == layers)


# -- the process of one point ---------------------------------------------------------------------------------------


class Trainer:
    """Every public method is a request."""

    def __init__(self, model: str, preset: str, system: str, setting: str, budget: int | None) -> None:
        torch.set_num_threads(1)
        self.model, self.args, self.kwargs, blocks = build(model, preset)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4, fused=True)
        self.system = system
        if system == "dspass":
            import dspass  # noqa: F401  (registers the backend from a checkout)

            own = {} if budget is None else {"memory_budget": budget}
            options: Any = {"zero_optimization": {"stage": 0}, "dspass": own}
            self.compiled = torch.compile(self.model, backend="deepspeed", options=options)
            return
        if system == "inductor":
            from torch._functorch import config

            solver, ratio = setting.split()
            config.activation_memory_budget, config.activation_memory_budget_solver = float(ratio), solver
        if system == "checkpoint":
            from torch.utils.checkpoint import checkpoint

            for block in blocks:
                forward = block.forward
                block.forward = lambda *a, f=forward, **k: checkpoint(f, *a, use_reentrant=False, **k)
        self.compiled = torch.compile(self.model)

    def steps(self, count: int) -> tuple[float, list[float]]:
        losses = []
        begin = time.perf_counter()
        for _ in range(count):
            answer = self.compiled(*self.args, **self.kwargs)
            loss = answer if isinstance(answer, torch.Tensor) else answer.loss
            del answer
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.item())
        return (time.perf_counter() - begin) / count, losses

    def plan(self) -> tuple[int, float] | None:
        """Bytes and seconds that dspass's plan predicts."""
        from dspass.engines import engine_of

        engine = engine_of(self.model)
        plan = engine.compilations[-1].plan if engine is not None else None
        return (plan.peak, plan.seconds) if plan is not None else None

    def peak(self) -> int:
        from benchmarks import measure

        self.training = argparse.Namespace(model=self.model)
        found = measure.watch(lambda: self.steps(2), self.training, "cpu", torch.empty(0), 2, 1)
        return int(found["peak"])


def _serve(pipe: Any, setting: tuple[Any, ...]) -> None:
    trainer = None
    while True:
        try:
            request, *args = pipe.recv()
        except EOFError:
            return
        try:
            if trainer is None:
                trainer = Trainer(*setting)
            pipe.send((True, getattr(trainer, request)(*args)))
        except BaseException as error:
            inner = getattr(error, "inner_exception", error)
            smallest = getattr(inner, "smallest", None)
            pipe.send((False, (str(inner) if smallest else traceback.format_exc()[-600:], smallest)))


class Process:
    def __init__(self, *setting: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, setting), daemon=True)
        self.process.start()

    def ask(self, request: str, *args: Any) -> Any:
        self.pipe.send((request, *args))
        if not self.pipe.poll(_WAIT):
            self.close()
            raise RuntimeError(f"no answer to {request!r} in {_WAIT:.0f} s")
        good, answer = self.pipe.recv()
        if not good:
            raise Refused(*answer)
        return answer

    def close(self) -> None:
        self.pipe.close()
        self.process.kill()
        self.process.join()


class Refused(RuntimeError):
    def __init__(self, message: str, smallest: int | None = None) -> None:
        super().__init__(message)
        self.smallest = smallest


# -- one model ------------------------------------------------------------------------------------------------------


def measure_model(model: str, options: argparse.Namespace) -> list[Point]:
    """All points of one model, alive at the same time, a step of each in turn."""
    started: dict[int, Process] = {}
    points: list[Point] = []
    failed: list[Point] = []

    def start(point: Point) -> Point:
        process = Process(model, options.preset, point.system, point.setting, point.budget)
        try:
            for _ in range(3):
                point.losses += process.ask("steps", 1)[1]
            if point.system == "dspass" and (plan := process.ask("plan")) is not None:
                point.predicted, point.predicted_seconds = plan
        except Refused as error:
            point.error = str(error)
            process.close()
            if error.smallest is not None:
                point.predicted = error.smallest
            if point.budget != 1:  # which is to be refused
                failed.append(point)
            return point
        started[len(points)] = process
        points.append(point)
        return point

    ratios = [i / (options.ratios - 1) for i in range(options.ratios - 1, -1, -1)]
    peers = [Point("inductor", f"{solver} {ratio:.2f}") for solver in options.solvers.split(",") for ratio in ratios]
    peers.append(Point("checkpoint", ""))
    total = options.budgets + len(peers) + 2
    with tqdm(total=total, desc=f"{model}: start and compile", unit="point", ncols=90) as bar:
        refused = start(Point("dspass", "refused", budget=1))
        assert refused.predicted is not None, refused.error
        start(Point("dspass", "unplanned"))
        fastest = start(Point("dspass", "fastest", budget=10**15))
        bar.update(3)
        assert fastest.predicted is not None, fastest.error
        low, high = refused.predicted, fastest.predicted
        for i in range(options.budgets - 1):
            budget = round(low + (high - low) * i / (options.budgets - 1))
            start(Point("dspass", f"{budget / 1e6:.1f} MB", budget=budget))
            bar.update()
        for peer in peers:
            start(peer)
            bar.update()
    for _ in tqdm(range(options.rounds), desc=f"{model}: interleaved rounds", unit="round", ncols=90):
        order = list(started)
        random.Random(len(points[0].seconds)).shuffle(order)
        for i in order:
            seconds, losses = started[i].ask("steps", 1)
            points[i].seconds.append(seconds)
            points[i].losses += losses
    for i, process in tqdm(started.items(), desc=f"{model}: peaks", unit="point", ncols=90):
        points[i].peak = process.ask("peak")
        process.close()
    return points + failed


# -- comparisons ----------------------------------------------------------------------------------------------------


@dataclass
class Comparison:
    """Of a peer's point: dspass's best step time at no more memory, and least peak at no more time, as ratios."""

    peer: Point
    time: float | None
    memory: float | None


def compare(points: Sequence[Point], grace: float = 0.01) -> list[Comparison]:
    """None where dspass has no point at so little memory, or as fast. ``grace``: peaks that differ by less are equal."""
    points = [p for p in points if p.error is None]
    ours = [p for p in points if p.system == "dspass" and p.setting != "unplanned"]
    found = []
    for peer in (p for p in points if p.system != "dspass"):
        times = [p.step for p in ours if p.peak <= peer.peak * (1 + grace)]
        peaks = [p.peak for p in ours if p.step <= peer.step * (1 + grace)]
        found.append(
            Comparison(peer, min(times) / peer.step if times else None, min(peaks) / peer.peak if peaks else None)
        )
    return found


def table(model: str, points: Sequence[Point]) -> str:
    """Markdown of one model."""
    failed = [p for p in points if p.error is not None]
    points = [p for p in points if p.error is None]
    unplanned = next(p for p in points if p.setting == "unplanned")
    lines = [
        f"## {model}",
        "",
        "| system | budget | predicted peak | measured peak | of budget | of prediction | step, median | losses |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for p in sorted(points, key=lambda p: (p.system, -p.peak)):
        count = min(len(p.losses), len(unplanned.losses))
        worst = max(abs(a - b) / abs(b) for a, b in zip(p.losses[:count], unplanned.losses[:count], strict=True))
        cells = [
            p.name,
            "" if p.budget is None else "none needed" if p.budget >= 10**15 else f"{p.budget / 1e6:.1f} MB",
            "" if p.predicted is None else f"{p.predicted / 1e6:.1f} MB",
            f"{p.peak / 1e6:.1f} MB",
            "" if p.budget is None or p.budget >= 10**15 else f"{p.peak / p.budget:.3f}",
            "" if p.predicted is None else f"{p.peak / p.predicted:.3f}",
            f"{p.step * 1e3:.0f} ms",
            "equal" if worst == 0 else f"{worst:.1e}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *(f"- failed: {p.name}: {' '.join((p.error or '').split())[-200:]}" for p in failed)]
    planned = [p for p in points if p.budget is not None]
    held = [p for p in planned if p.peak <= (p.budget or 0) * 1.01]
    near = [p for p in planned if p.predicted and abs(p.peak / p.predicted - 1) <= 0.03]
    comparisons = compare(points)
    times = [c.time for c in comparisons if c.time is not None]
    peaks = [c.memory for c in comparisons if c.memory is not None]
    lines += [
        "",
        f"- {_said(len(held) == len(planned))}: measured peak within the budget (1 % grace): {len(held)} of {len(planned)}",
        f"- {_said(len(near) == len(planned))}: predicted peak within 3 % of the measured: {len(near)} of {len(planned)}",
        f"- {_said(all(p.losses[:3] == unplanned.losses[:3] for p in planned))}: losses bitwise those of the unplanned run",
        f"- distinct plans: {len({p.predicted for p in planned})} of {len(planned)} budgets",
    ]
    unmatched = len(comparisons) - len(times), len(comparisons) - len(peaks)
    if times:
        beaten = sum(t <= 1.0 for t in times)
        lines.append(
            f"- {_said(beaten == len(times))}: at equal peak no slower than a peer: {beaten} of {len(times)}, ratios "
            f"{min(times):.2f} to {max(times):.2f}; {unmatched[0]} peers' points take less memory than all of ours"
        )
    if peaks:
        lines.append(
            f"- {_said(statistics.median(peaks) <= 0.9)}: at equal time the median peak is at most 0.9 of a peer's: "
            f"{statistics.median(peaks):.2f} of {len(peaks)}; {unmatched[1]} peers' points are faster than all of ours"
        )
    lines += ["", "| peer | our step time at its peak | our peak at its step time |", "|---|---|---|"]
    lines += [f"| {c.peer.name} | {_ratio(c.time)} | {_ratio(c.memory)} |" for c in comparisons]
    return "\n".join(lines)


def _cpu() -> str:
    """The processor as the operating system names it."""
    table = Path("/proc/cpuinfo")
    lines = table.read_text().splitlines() if table.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _said(met: bool) -> str:
    return "met" if met else "missed"


def _ratio(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


_COLOURS = {"dspass": "#2457b0", "inductor": "#e39338", "checkpoint": "#cc4b5a"}


def plot(title: str, points: Sequence[Point]) -> str:
    """SVG: step time over peak, a mark a point; down and to the left is better."""
    points = [p for p in points if p.error is None]
    width, height, left, bottom, top = 720, 420, 80, 60, 40
    peaks, steps = [p.peak / 1e6 for p in points], [p.step * 1e3 for p in points]
    x0, x1 = 0.9 * min(peaks), 1.05 * max(peaks)
    y0, y1 = 0.95 * min(steps), 1.03 * max(steps)

    def x(v: float) -> float:
        return left + (v - x0) / (x1 - x0) * (width - left - 20)

    def y(v: float) -> float:
        return height - bottom - (v - y0) / (y1 - y0) * (height - top - bottom)

    parts = [f'<rect width="{width}" height="{height}" fill="white"/>']
    parts.append(f'<text x="{width / 2}" y="22" text-anchor="middle" font-size="15">{escape(title)}</text>')
    for i in range(6):
        a, b = x0 + (x1 - x0) * i / 5, y0 + (y1 - y0) * i / 5
        parts.append(f'<line x1="{left}" x2="{width - 20}" y1="{y(b):.1f}" y2="{y(b):.1f}" stroke="#dddddd"/>')
        parts.append(f'<text x="{left - 8}" y="{y(b) + 4:.1f}" text-anchor="end">{b:.0f} ms</text>')
        parts.append(f'<text x="{x(a):.1f}" y="{height - bottom + 18}" text-anchor="middle">{a:.0f} MB</text>')
    for n, (system, colour) in enumerate(_COLOURS.items()):
        mine = sorted((p for p in points if p.system == system), key=lambda p: p.peak)
        for p in mine:
            name = escape(f"{p.name}: {p.peak / 1e6:.1f} MB, {p.step * 1e3:.0f} ms")
            centre = f'cx="{x(p.peak / 1e6):.1f}" cy="{y(p.step * 1e3):.1f}"'
            parts.append(f'<circle {centre} r="5" fill="{colour}" fill-opacity="0.75"><title>{name}</title></circle>')
        at = left + 10 + 110 * n
        parts.append(f'<circle cx="{at}" cy="{height - 16}" r="5" fill="{colour}"/>')
        parts.append(f'<text x="{at + 10}" y="{height - 12}">{system}</text>')
    parts.append(f'<text x="{width - 20}" y="{height - 12}" text-anchor="end">measured peak of one rank</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">'
        + "".join(parts)
        + "</svg>\n"
    )


# -- the command ----------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=PRESETS, default="small", help="width, layers and batch")
    parser.add_argument("--models", default=",".join(MODELS), help="with commas between")
    parser.add_argument(
        "--budgets", type=int, default=8, help="points of dspass between the smallest plan and the fastest"
    )
    parser.add_argument("--ratios", type=int, default=5, help="points of activation_memory_budget from 1 to 0")
    parser.add_argument(
        "--solvers", default="dp", help="of activation_memory_budget: dp, greedy, ilp, with commas between"
    )
    parser.add_argument("--rounds", type=int, default=11, help="interleaved rounds")
    parser.add_argument("--out", default="benchmarks/results", help="where tables, figures and plots are written")


def run(options: argparse.Namespace) -> int:
    begin = time.time()
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    words = " ".join(
        f"--{k} {getattr(options, k)}" for k in ("preset", "models", "budgets", "ratios", "solvers", "rounds")
    )
    stem = f"memory-{options.preset}-cpu"
    parts: list[str] = []
    data: dict[str, Any] = {}
    for model in options.models.split(","):
        points = measure_model(model, options)
        (folder / f"{stem}-{model}.svg").write_text(plot(f"{model}, preset {options.preset}", points))
        parts.append(table(model, points) + f"\n\n![{model}]({stem}-{model}.svg)")
        print("\n" + parts[-1] + "\n")
        data[model] = [asdict(p) for p in points]
        head = [
            f"# Step time against peak memory, preset {options.preset}",
            "",
            f"`python -m benchmarks memory {words}`",
            "",
            f"{time.strftime('%Y-%m-%d')}, one rank on one core of {_cpu()}, torch {torch.__version__}, Python "
            f"{platform.python_version()}; AdamW(fused=True), fp32, one thread; {options.rounds} rounds of one step, in an "
            f"order drawn anew for each; {(time.time() - begin) / 60:.1f} minutes in all. Not compared: 2 ranks, FSDP2.",
        ]
        # After each model: a run that is cut short keeps what it has.
        (folder / f"{stem}.md").write_text("\n".join(head) + "\n\n" + "\n\n".join(parts) + "\n")
        (folder / f"{stem}.json").write_text(json.dumps(data, indent=1) + "\n")
    print(f"written: {folder / stem}.md, .json and a plot of each model")
    return 0
