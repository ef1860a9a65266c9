"""How far ahead gathers start: what is exposed and what is held, predicted for a device that computes while it sends.

A Llama on the meta device is traced for many ranks at ZeRO stage 3 and its step's clock run by the cost model, once for each
lookahead: gathers that start 0, 1, 2 or 4 buckets early, all at once, or as late as compute hides them, which is what a memory
budget asks for. Nothing is measured here: no figure of this page was seen on a device.
"""

from __future__ import annotations

import argparse
import platform
import time
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from tqdm import tqdm

import dspass
from benchmarks import page
from dspass.passes.base import PassContext
from dspass.passes.devices import DEVICES
from dspass.passes.pipeline import DEFAULT
from dspass.passes.prefetch_gathers import PrefetchGathers

#: Lookahead in buckets by name; None: as late as hides.
LOOKAHEADS: dict[str, int | None] = {
    "waits at once": 0,
    "1 bucket early": 1,
    "2 buckets early": 2,
    "4 buckets early": 4,
    "all at once": 10_000,
    "as late as hides": None,
}


@dataclass(frozen=True, kw_only=True)
class Lookahead(PrefetchGathers):
    """:class:`PrefetchGathers` for the device that the prediction is for, as a budget would have it."""

    name: ClassVar[str] = "lookahead"
    provides: ClassVar[frozenset[str]] = PrefetchGathers.provides

    def run(self, graph: Any, ctx: PassContext) -> Any:
        on = DEVICES[ctx.target or "h100"]
        return PrefetchGathers(hidden_by=on).run(graph, ctx)


@dataclass
class Row:
    """One lookahead: seconds of a step, exposed gathers by direction, and bytes at the peak and of it gathered."""

    name: str
    seconds: float
    peak: int
    gathered: int
    exposed: dict[str, float] = field(default_factory=dict)

    @property
    def waits(self) -> float:
        return sum(self.exposed.values())


def predict(name: str, model: torch.nn.Module, tokens: torch.Tensor, ranks: int, device: str) -> Row:
    ahead = LOOKAHEADS[name]
    chosen: Any = "benchmarks.prefetch:Lookahead" if ahead is None else {"name": "prefetch_gathers", "distance": ahead}
    passes = [chosen if cls is PrefetchGathers else cls.name for cls in DEFAULT]
    config = {"zero_optimization": {"stage": 3}, "dspass": {"passes": passes}}
    report = dspass.explain(
        model, kwargs={"input_ids": tokens, "labels": tokens}, config=config, world_size=ranks, device=device
    )
    exposed = {t.direction: t.exposed_seconds or 0.0 for t in report.traffic if t.kind == "all-gather"}
    assert report.step_seconds is not None
    most = max(point.bytes.get("gathered", 0) for point in report.memory.timeline)
    return Row(name, report.step_seconds, report.memory.peak_bytes, most, exposed)


def table(rows: list[Row]) -> str:
    """Markdown, and whether the last row meets what it is for."""
    late, one, longest = rows[-1], rows[1], next(r for r in rows if r.name == "all at once")
    lines = [
        "| lookahead | step | exposed gathers, forward | backward | most gathered at a time | peak of a rank |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        exposed = [f"{row.exposed.get(d, 0.0) * 1e3:.2f} ms" for d in ("forward", "backward")]
        cells = [
            row.name,
            f"{row.seconds * 1e3:.1f} ms",
            *exposed,
            f"{row.gathered / 1e9:.3f} GB",
            f"{row.peak / 1e9:.3f} GB",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    hides = late.waits <= longest.waits * (1 + 1e-6)
    small = late.gathered <= one.gathered * (1 + 1e-6)
    lines += [
        "",
        f"- {'met' if hides else 'missed'}: as late as hides exposes no more than all at once: {late.waits * 1e3:.2f} ms of "
        f"{longest.waits * 1e3:.2f} ms",
        f"- {'met' if small else 'missed'}: and holds no more than 1 bucket early: {late.gathered / 1e9:.3f} GB of "
        f"{one.gathered / 1e9:.3f} GB ({late.gathered / longest.gathered:.2f} of all at once)",
    ]
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, default=8, help="of Llama-3-8B's 32")
    parser.add_argument("--length", type=int, default=4096, help="tokens of one rank's sample")
    parser.add_argument("--ranks", default="8,64", help="numbers of ranks, with commas between")
    parser.add_argument("--device", choices=sorted(DEVICES), default="h100", help="whose figures are taken")
    parser.add_argument("--out", default="benchmarks/results", help="where the table is written")


def run(options: argparse.Namespace) -> int:
    from transformers import LlamaConfig, LlamaForCausalLM

    begin = time.time()
    with torch.device("meta"):
        config = LlamaConfig(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=options.layers,
            num_attention_heads=32,
            num_key_value_heads=8,
            use_cache=False,
        )
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    tokens = torch.zeros(1, options.length, dtype=torch.long)
    parts = []
    for ranks in map(int, options.ranks.split(",")):
        rows = [
            predict(name, model, tokens, ranks, options.device)
            for name in tqdm(LOOKAHEADS, desc=f"{ranks} ranks", unit="prediction", ncols=90)
        ]
        parts.append(f"## {ranks} ranks\n\n{table(rows)}")
        print("\n" + parts[-1] + "\n")
    page.write(
        options,
        f"prefetch-{options.device}-predicted.md",
        title="How far ahead gathers start, predicted",
        benchmark="prefetch",
        keys=("layers", "length", "ranks", "device"),
        facts=f"torch {torch.__version__}, Python {platform.python_version()}; Llama of {options.layers} layers as wide as "
        f"Llama-3-8B, bf16, stage 3, one sample of {options.length} tokens a rank; the cost model's figures for "
        f"{options.device}, nothing was run there; {time.time() - begin:.0f} s.",
        text="\n\n".join(parts),
    )
    return 0
