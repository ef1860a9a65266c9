"""The grouped product of a mixture of experts on a CPU, beside transformers' fallback, torch's own and a loop over experts.

Each is the first product of an expert, its gate and its up projection, with weights ``[experts, out, in]`` read transposed, as
transformers holds them; forward alone, and forward and backward, which computes gradients of rows and of weights. Models are
Mixtral 8x7B, OLMoE 1B-7B and Qwen3 30B-A3B with widths divided by 8, 4 and 4. Routing is drawn anew for every call, as in
training: uniform, or skewed by Zipf's law. All take turns, in an order drawn anew for each round. The limit is the same number
of operations as one dense product: one matrix, which all rows share, by the faster of ``torch.mm`` and our operator with one
expert. With one thread seconds are those that the process had a core for, with more those of the clock. The process keeps its
memory: what a result's pages cost, a seventh of a backward, would otherwise be each contender's by accident.
"""

from __future__ import annotations

import argparse
import ctypes
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version

import torch
from tqdm import tqdm

from benchmarks import page
from benchmarks.table import cpu
from dspass.runtime import grouped  # noqa: F401  (declares operators)

#: Experts, hidden and inner size, and experts of a token.
MODELS = {"mixtral": (8, 512, 1792, 2), "olmoe": (64, 512, 256, 8), "qwen3": (128, 512, 192, 8)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROUTINGS = ("uniform", "skewed")
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h
_OURS, _FALLBACK, _TORCH, _LOOP, _LIMITS = "dspass", "fallback", "torch._grouped_mm", "loop", ("mm", "one expert")

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class Row:
    """``forward`` and ``both`` are seconds of calls, by contender and round; ``operations`` are those of a forward."""

    model: str
    dtype: str
    routing: str
    operations: float
    forward: dict[str, list[float]] = field(default_factory=dict)
    both: dict[str, list[float]] = field(default_factory=dict)


def loop(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    counts = ends.diff(prepend=ends.new_zeros(1)).tolist()
    parts = zip(x.split(counts), weight.unbind(), strict=True)
    return torch.cat([some @ matrix for some, matrix in parts if some.shape[0]])


def products() -> dict[str, Product]:
    import transformers.integrations.moe  # noqa: F401  (declares the fallback)

    def torch_s(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        return torch._grouped_mm(x, weight, offs=ends)

    return {
        _OURS: torch.ops.dspass.grouped_product,
        _FALLBACK: torch.ops.transformers.grouped_mm_fallback,
        _TORCH: torch_s,
        _LOOP: loop,
        "mm": lambda x, weight, ends: x @ weight[0],
        "one expert": lambda x, weight, ends: torch.ops.dspass.grouped_product(x, weight[:1], ends[-1:]),
    }


def routed(tokens: int, experts: int, top_k: int, routing: str, generator: torch.Generator) -> torch.Tensor:
    """Ends of experts, where each token has ``top_k`` different ones."""
    chances = torch.ones(experts) if routing == "uniform" else 1 / torch.arange(1.0, experts + 1)
    chosen = torch.multinomial(chances.expand(tokens, -1), top_k, generator=generator)
    return chosen.flatten().bincount(minlength=experts).cumsum(0).to(torch.int32)


def measure(
    row: Row, tokens: int, rounds: int, tick: Callable[[], object], clock: Callable[[], float] = time.process_time
) -> None:
    """Fill in the seconds of ``row``, behind three rounds that are not counted."""
    experts, hidden, inner, top_k = MODELS[row.model]
    torch.manual_seed(0)
    x = torch.randn(tokens * top_k, hidden, dtype=DTYPES[row.dtype], requires_grad=True)
    held = torch.randn(experts, 2 * inner, hidden, dtype=x.dtype, requires_grad=True)
    single = held.detach()[:1].clone().requires_grad_()
    grad = torch.randn(x.shape[0], 2 * inner, dtype=x.dtype)
    row.operations = 2.0 * x.shape[0] * hidden * 2 * inner
    contenders = products()
    draws = {
        name: torch.Generator().manual_seed(i) for i, name in enumerate(contenders)
    }  # else one warms caches for the next
    row.forward, row.both = ({name: [] for name in contenders} for _ in range(2))
    for number in range(-3, rounds):
        order = list(contenders)
        random.Random(number).shuffle(order)
        for name in order:
            ends = routed(tokens, experts, top_k, row.routing, draws[name])
            own = single if name in _LIMITS else held
            begin = clock()
            out = contenders[name](x, own.transpose(1, 2), ends)
            middle = clock()
            torch.autograd.grad(out, (x, own), grad)
            end = clock()
            if number >= 0:
                row.forward[name].append(middle - begin)
                row.both[name].append(end - begin)
        tick()


def table(rows: Sequence[Row]) -> str:
    """Markdown of what was measured."""
    lines = [
        "| model | experts | dtype | routing | | dspass, median | of the fallback, paired | of torch._grouped_mm | of a loop "
        "| GFLOP/s | dense |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    worst = {_FALLBACK: 0.0, _LOOP: 0.0}
    for row in rows:
        for what, seconds, times in (("forward", row.forward, 1), ("and backward", row.both, 3)):
            ours = statistics.median(seconds[_OURS])
            ratios = {name: _paired(seconds[_OURS], seconds[name]) for name in (_FALLBACK, _TORCH, _LOOP)}
            worst = {name: max(most, ratios[name]) for name, most in worst.items()}
            dense = min(statistics.median(seconds[name]) for name in _LIMITS)
            cells = [
                *(row.model, str(MODELS[row.model][0]), row.dtype, row.routing, what, f"{ours * 1e3:.1f} ms"),
                *(f"{ratio:.3f}" for ratio in ratios.values()),
                *(f"{times * row.operations / each / 1e9:.0f}" for each in (ours, dense)),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    for name, most in worst.items():
        lines.append(f"- {'met' if most <= 1 else 'missed'}: at most the time of the {name}: at most {most:.3f} of it")
    return "\n".join(lines)


def _paired(some: Sequence[float], others: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(some, others, strict=True))


def keep_memory() -> None:
    """Have glibc give nothing back to the operating system, which would have to clear it again."""
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1)):
            set_option(option, value)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=512, help="of a call, each to as many experts as its model says")
    parser.add_argument("--rounds", type=int, default=21, help="interleaved rounds")
    parser.add_argument("--threads", type=int, default=1, help="threads of the process")
    parser.add_argument("--out", default="benchmarks/results", help="where the table is written")


def run(options: argparse.Namespace) -> int:
    begin = time.time()
    keep_memory()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    rows = [Row(model, dtype, routing, 0.0) for model in MODELS for dtype in DTYPES for routing in ROUTINGS]
    with tqdm(total=(options.rounds + 3) * len(rows), unit="round", ncols=90) as bar:
        for row in rows:
            bar.set_description(f"{row.model} {row.dtype} {row.routing}")
            measure(row, options.tokens, options.rounds, bar.update, clock)
    text = table(rows)
    print("\n" + text + "\n")
    page.write(
        options,
        "grouped-cpu.md",
        title="The grouped product of a mixture of experts",
        benchmark="grouped",
        keys=("tokens", "rounds", "threads"),
        facts=f"{cpu()}, {options.threads} thread{'s' * (options.threads > 1)}, torch {torch.__version__}, transformers "
        f"{version('transformers')}, Python {platform.python_version()}; medians of {options.rounds} rounds; "
        f"{(time.time() - begin) / 60:.1f} minutes.",
        text=text,
    )
    return 0
