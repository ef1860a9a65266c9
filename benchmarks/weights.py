"""Weights in few bits at batch 1: time of a token and of a prompt, bytes, and perplexity, beside bf16 by Inductor.

A Llama is trained for a while on real text, byte by byte, so that its perplexity says something; each row is a copy of it in
bf16, compiled, in one process; rows take turns. A token is one call with one position and no cache: all weights are read, and
no history, which at a context of some hundred positions is little beside them. A prompt is one call with ``--context``
positions, and perplexity is of such calls on text that was not trained on. The limit of a token is its weights' bytes over the
rate at which this machine copied memory in the same run, counted as read and written.
"""

from __future__ import annotations

import argparse
import copy
import math
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import dspass
from benchmarks import page
from benchmarks.table import cpu
from examples.gpt import batches, text_corpus

#: Hidden size, inner size, layers and heads; the vocabulary is Llama's. "160m" is JackFram/llama-160m.
PRESETS = {"tiny": (64, 160, 2, 2), "160m": (768, 3072, 12, 12)}
_VOCABULARY = 32000

#: A row's name, and what ``dspass.quantise.layers`` says in it; None: not dspass.
ROWS: dict[str, dict[str, Any] | None] = {
    "bf16, Inductor": None,
    "bf16, Inductor, freezing": None,
    "bf16, dspass": {},
    "int8": {"format": "int8"},
    "int8, activations too": {"format": "int8", "activations": "int8"},
    "int8, groups of 128": {"format": "int8", "group_size": 128},
    "fp8_e4m3": {"format": "fp8_e4m3"},
    "fp8_e5m2": {"format": "fp8_e5m2"},
    "fp6_e3m2": {"format": "fp6_e3m2"},
    "int4, groups of 32": {"format": "int4", "group_size": 32},
}
_PLAIN, _FREEZING, _GOAL = "bf16, Inductor", "bf16, Inductor, freezing", 0.7


@dataclass
class Row:
    """``token`` and ``prompt`` are seconds of calls, by round."""

    name: str
    bytes: int = 0
    perplexity: float = math.nan
    token: list[float] = field(default_factory=list)
    prompt: list[float] = field(default_factory=list)


def trained(preset: str, steps: int, context: int, text: torch.Tensor) -> nn.Module:
    """A Llama in bf16 after so many steps, two samples each, from fp32 weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, inner, layers, heads = PRESETS[preset]
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            vocab_size=_VOCABULARY,
            use_cache=False,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    source = batches(text, 2, context, seed=0, rank=0)
    bar = tqdm(range(steps), desc="train", unit="step", ncols=90)
    for _ in bar:
        inputs, targets = next(source)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=inputs).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.2f}")
    return model.bfloat16().eval().requires_grad_(False)


def made(name: str, model: nn.Module) -> tuple[nn.Module, Callable[[torch.Tensor], torch.Tensor]]:
    """A row's own model, and what answers its logits."""
    layers, own = ROWS[name], copy.deepcopy(model)
    if layers is None:
        run: Any = torch.compile(own, dynamic=False, options={"freezing": True} if name == _FREEZING else None)
    else:
        options = {"dspass": {"quantise": {"layers": layers}}}
        if layers:
            dspass.quantise(own, options)
        run = torch.compile(own, backend="deepspeed", options=options, dynamic=False)
    return own, lambda ids: run(input_ids=ids).logits


@torch.no_grad()
def measure(options: argparse.Namespace) -> tuple[list[Row], int, float]:
    """The rows, how many parameters the model has, and bytes a second that a copy of memory reads and writes."""
    torch._dynamo.config.recompile_limit = 8 * len(
        ROWS
    )  # Dynamo counts the rows' models together, as they are of one class
    text = text_corpus()
    held_out = len(text) * 9 // 10
    with torch.enable_grad():
        model = trained(options.preset, options.train, options.context, text[:held_out])
    source = batches(text[held_out:], 1, options.context, seed=1, rank=0)
    windows = [next(source) for _ in range(options.windows)]
    token, prompt = windows[0][0][:, :1].contiguous(), windows[0][0]
    rows, runs = [], []
    for name in tqdm(ROWS, desc="compile", unit="row", ncols=90):
        own, run = made(name, model)
        for ids in (token, prompt):
            run(ids)
        row = Row(name, bytes=sum(t.nbytes for t in {id(t): t for t in (*own.parameters(), *own.buffers())}.values()))
        row.perplexity = _perplexity(run, windows)
        rows.append(row)
        runs.append(run)
    for number in tqdm(range(options.rounds), desc="rounds", unit="round", ncols=90):
        order = list(range(len(rows)))
        random.Random(number).shuffle(order)
        for i in order:
            rows[i].token.append(_seconds(runs[i], token, options.calls))
            rows[i].prompt.append(_seconds(runs[i], prompt, 1))
    return rows, sum(p.numel() for p in model.parameters()), _copy_rate()


def _perplexity(
    run: Callable[[torch.Tensor], torch.Tensor], windows: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> float:
    losses = [
        nn.functional.cross_entropy(run(inputs).flatten(0, 1).float(), targets.flatten()).item()
        for inputs, targets in windows
    ]
    return math.exp(statistics.fmean(losses))


def _seconds(run: Callable[[torch.Tensor], Any], ids: torch.Tensor, calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        run(ids)
    return (time.perf_counter() - begin) / calls


def _copy_rate(size: int = 256_000_000, times: int = 7) -> float:
    source, target = torch.zeros(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8)
    found = []
    for _ in range(times):
        begin = time.perf_counter()
        target.copy_(source)
        found.append(2 * size / (time.perf_counter() - begin))
    return max(found)


def table(rows: Sequence[Row], rate: float) -> str:
    """Markdown of what was measured."""
    plain = next(row for row in rows if row.name == _PLAIN)
    lines = [
        "| | weights | of bf16 | token, median | of bf16, paired | of the limit | prompt, median | of bf16, paired "
        "| perplexity | change |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        token, prompt = (_paired(getattr(row, kind), getattr(plain, kind)) for kind in ("token", "prompt"))
        cells = [
            row.name,
            f"{row.bytes / 1e6:.1f} MB",
            f"{row.bytes / plain.bytes:.3f}",
            f"{statistics.median(row.token) * 1e3:.1f} ms",
            f"{token:.3f}",
            f"{statistics.median(row.token) * rate / row.bytes:.2f}",
            f"{statistics.median(row.prompt) * 1e3:.0f} ms",
            f"{prompt:.3f}",
            f"{row.perplexity:.4f}",
            f"{row.perplexity / plain.perplexity - 1:+.2%}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    int8 = next(row for row in rows if row.name == "int8")
    share = _paired(int8.token, plain.token)
    lines += [
        "",
        f"- {'met' if share <= _GOAL else 'missed'}: a token with int8 weights takes at most {_GOAL} of bf16 by Inductor: "
        f"{share:.3f}",
        f"- memory was copied at {rate / 1e9:.1f} GB a second, read and written",
    ]
    return "\n".join(lines)


def _paired(some: Sequence[float], plain: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(some, plain, strict=True))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=PRESETS, default="160m", help="model size")
    parser.add_argument("--train", type=int, default=100, help="steps of training before")
    parser.add_argument("--context", type=int, default=256, help="positions of a prompt, and of a sample of training")
    parser.add_argument("--windows", type=int, default=40, help="samples that perplexity is the mean of")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds")
    parser.add_argument("--calls", type=int, default=5, help="tokens of a row in one round")
    parser.add_argument("--threads", type=int, default=1, help="threads of the process")
    parser.add_argument("--out", default="benchmarks/results", help="where the table is written")


def run(options: argparse.Namespace) -> int:
    begin = time.time()
    torch.set_num_threads(options.threads)
    rows, parameters, rate = measure(options)
    text = table(rows, rate)
    print("\n" + text + "\n")
    page.write(
        options,
        f"weights-{options.preset}-cpu.md",
        title="Weights in few bits",
        benchmark="weights",
        keys=("preset", "train", "context", "windows", "rounds", "calls", "threads"),
        facts=f"{cpu()}, {options.threads} thread{'s' * (options.threads > 1)}, torch {torch.__version__}, "
        f"Python {platform.python_version()}; Llama of "
        f"{parameters / 1e6:.1f} M parameters, Python sources as text; {(time.time() - begin) / 60:.1f} minutes.",
        text=text,
    )
    return 0
