"""What hides the all-to-alls of experts on absent GPUs: whole steps as ``dspass.explain`` predicts them, with layers in one
chunk, in as many as the cost model chooses, and with the batch in as many parts as it chooses.

Nothing of this is measured. Models have the widths, experts and routing of published ones and few layers, on the meta device.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import dspass
from dspass.report import Report

RANKS = (8, 16, 64)
LAYERS, SEQUENCES, TOKENS = 2, 4, 2048

#: ``model_type`` and what differs from the defaults of its configuration in transformers, which are the published model's.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Mixtral 8x7B": ("mixtral", {}),
    "Qwen3-MoE 30B-A3B": ("qwen3_moe", {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}),
    "DeepSeek-V3": ("deepseek_v3", {"first_k_dense_replace": 0}),
}

#: Of a layer; no more ranks can hold them.
EXPERTS = {"Mixtral 8x7B": 8, "Qwen3-MoE 30B-A3B": 128, "DeepSeek-V3": 256}


@dataclass(frozen=True, kw_only=True)
class Point:
    """A prediction; ``exposed`` are the seconds of a step in which rows travel and nothing is computed."""

    model: str
    ranks: int
    chunks: int
    parts: int
    step: float
    exposed: float


def build(kind: str, own: dict[str, Any]) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, num_hidden_layers=LAYERS, use_cache=False, **own)
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model.train()


def predict(kind: str, own: dict[str, Any], ranks: int, imbalance: float, **experts: Any) -> Report:
    torch._dynamo.reset()
    ids = torch.zeros((SEQUENCES, TOKENS), dtype=torch.int64, device="meta")
    experts["expected_imbalance"] = imbalance
    config = {
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": True},
        "expert_parallel": {"enabled": True},
        "dspass": {"experts": experts},
    }
    call = {"input_ids": ids, "labels": ids}
    return dspass.explain(build(kind, own), kwargs=call, config=config, world_size=ranks, device="h100")


def points(names: Sequence[str], imbalance: float) -> list[tuple[Point, Point, Point]]:
    """Of each model on each number of ranks: in one chunk, in as many as are chosen, and in parts of the batch."""
    found = []
    todo = [(name, ranks) for name in names for ranks in RANKS if EXPERTS[name] >= ranks]
    for name, ranks in tqdm(todo, desc="predict", unit="model", ncols=90):
        one, chunks, parts = (
            _point(name, ranks, predict(*MODELS[name], ranks, imbalance, **asked))
            for asked in ({"chunks": 1}, {}, {"batch_parts": "auto"})
        )
        found.append((one, chunks, parts))
    return found


def _point(name: str, ranks: int, report: Report) -> Point:
    assert report.step_seconds is not None
    exposed = sum(t.exposed_seconds or 0.0 for t in report.traffic if t.group == "expert" and t.kind == "all-to-all")
    chunks, parts = _number(report, "divide_experts", " chunks"), _number(report, "split_batch", " parts of")
    return Point(model=name, ranks=ranks, chunks=chunks, parts=parts, step=report.step_seconds, exposed=exposed)


def _number(report: Report, name: str, of: str) -> int:
    """How many chunks or parts a pass says that there are."""
    said = next(p.summary for p in report.passes if p.name == name)
    return int(said.split(of)[0].split()[-1]) if of in said else 1


def table(found: Sequence[tuple[Point, Point, Point]]) -> str:
    lines = [
        "| model | ranks | step in 1 chunk, 1 part | rows, exposed | chunks chosen | step | rows, exposed | of that in 1 | "
        "parts chosen | step | rows, exposed | of that in 1 |",
        "|---" * 12 + "|",
    ]
    for one, *others in found:
        cells = [one.model, str(one.ranks), _ms(one.step), _ms(one.exposed)]
        for number, other in zip((others[0].chunks, others[1].parts), others, strict=True):
            cells += [str(number), _ms(other.step), _ms(other.exposed), f"{other.step / one.step:.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def page_of(imbalance: float) -> tuple[str, str]:
    """The table, and what it is of."""
    begin = time.time()
    text = table(points(list(MODELS), imbalance))
    facts = (
        f"predicted, not measured: {LAYERS} layers of each model's published width, {SEQUENCES} sequences of {TOKENS} tokens a "
        f"rank in bf16, ZeRO-3, H100s in nodes of 8 at 0.6 of datasheet rates, {imbalance:g} times the mean of rows at the "
        f"busiest rank; torch {torch.__version__}; {(time.time() - begin) / 60:.1f} minutes."
    )
    return text, facts
