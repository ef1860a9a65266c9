"""What the benchmark found, as markdown: subjects, ratios, losses, bounds, and how each was wrapped."""

from __future__ import annotations

import os
import random
import statistics
from typing import Any

import torch

from benchmarks.workers import SubjectFailed
from dspass.runtime import cpu as processor
from examples.gpt import GPT, PRESETS

SHARDED_PEERS = (
    "fsdp2",
    "fsdp2-compile",
    "fsdp2-a2a",
    "fsdp2-compile-a2a",
    "deepspeed-zero3",
    "deepspeed-zero3-compile",
)
PEERS = {
    "dspass-3": SHARDED_PEERS,
    "dspass-3-mkl": ("dspass-3", "fsdp2", "fsdp2-compile"),
    "dspass-0": ("ddp-inductor",),
    "dspass-1": ("ddp-inductor", "fsdp2", "fsdp2-compile"),
    "dspass-2": ("ddp-inductor", "fsdp2", "fsdp2-compile"),
}

Results = dict[str, dict[str, Any]]


def ratio(ours: dict[int, float], theirs: dict[int, float]) -> tuple[float, float, float]:
    """The median of ratios of the steps of each round that both had, and its bootstrap 95 % interval."""
    pairs = [ours[r] / theirs[r] for r in ours if r in theirs]
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(pairs, k=len(pairs))) for _ in range(2000))
    return statistics.median(pairs), medians[50], medians[1949]


def report(found: dict[str, Any]) -> str:
    results: Results = found["results"]
    setting = found["settings"]
    count = sum(p.numel() for p in _meta(setting["preset"]).parameters())
    turns = "step" if setting["steps"] == 1 else "steps"
    lines = [
        f"# ZeRO beside its peers: GPT, {count / 1e6:.1f} M parameters, "
        f"batch {setting['batch']} x {setting['context']} a rank",
        "",
        f"`{found['command']}`",
        "",
        f"{found['date']}, {setting['ranks']} ranks on {found['device']}, torch {found['versions']['torch']}, Python "
        f"{found['versions']['python']}; AdamW(fused=True) for all; {setting['rounds']} rounds of {setting['steps']} {turns}, "
        f"in an order drawn anew for each round; {found['minutes']:.1f} minutes in all.",
        "",
        "| subject | step, median | peak | beyond persistent | collectives | bytes sent | interface | compile | last loss |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_row(name, r) for name, r in results.items()),
        "",
        "Bytes are of one rank and one step. *Persistent* is the parameters, gradients and optimiser states that a rank owns; "
        "*bytes sent* are logical, as a ring sends them; *interface* is the least that the loopback interface counted in a "
        "round, an upper bound where other processes use it; *compile* is the first two steps less two plain ones, from a cold "
        "cache.",
        "",
        "| compared | with | step time, median of paired ratios (95 %) | peak | beyond persistent |",
        "|---|---|---|---|---|",
        *_ratios(results),
        "",
        *_goals(results),
        "",
        *_losses(results),
        "",
        *_bounds(results, setting),
        "",
        *(f"- {note}" for note in found["notes"]),
        *([""] if found["notes"] else []),
        "How each was wrapped:",
        "",
        *(f"- {name}: `{r['wrapped']}`" for name, r in results.items() if "wrapped" in r),
    ]
    return "\n".join(lines)


def _row(name: str, r: dict[str, Any]) -> str:
    if "error" in r:
        why = SubjectFailed.short(r["error"])[:200].replace("|", "/")
        return f"| {name} | failed: {why} | | | | | | | |"
    calls = r.get("collectives")
    cells = [
        name,
        f"{statistics.median(r['seconds'].values()) * 1e3:.0f} ms" if r["seconds"] else "-",
        _mb(r.get("peak_bytes")),
        _mb(_beyond(r)),
        f"{sum(c for c, _ in calls.values()):.0f}" if calls is not None else "-",
        _mb(sum(b for _, b in calls.values())) if calls is not None else "-",
        _mb(r.get("interface_bytes")),
        f"{r['compile_seconds']:.1f} s",
        f"{r['losses'][-1]:.5f}",
    ]
    return f"| {' | '.join(cells)} |"


def _beyond(r: dict[str, Any]) -> int | None:
    return r["peak_bytes"] - r["persistent_bytes"] if "peak_bytes" in r else None


def _compared(results: Results, name: str, peer: str) -> bool:
    a, b = results.get(name, {}), results.get(peer, {})
    return "error" not in a and "error" not in b and bool(set(a.get("seconds", ())) & set(b.get("seconds", ())))


def _ratios(results: Results) -> list[str]:
    lines = []
    for name, peers in PEERS.items():
        for peer in peers:
            if _compared(results, name, peer):
                a, b = results[name], results[peer]
                middle, low, high = ratio(a["seconds"], b["seconds"])
                peak, beyond = _over(a.get("peak_bytes"), b.get("peak_bytes")), _over(_beyond(a), _beyond(b))
                lines.append(f"| {name} | {peer} | {middle:.3f} ({low:.3f} to {high:.3f}) | {peak} | {beyond} |")
    return lines


def _goals(results: Results) -> list[str]:
    """The goals, each with what was measured; met or missed is computed, never said beforehand."""
    lines = []

    def goal(text: str, value: float, most: float, more: str = "") -> None:
        lines.append(f"- {'met' if value <= most else 'missed'}: {text}: {value:.3f}, at most {most}{more}")

    def median(name: str) -> float:
        return statistics.median(results[name]["seconds"].values())

    sharded = [p for p in SHARDED_PEERS if _compared(results, "dspass-3", p)]
    if sharded:
        best = min(sharded, key=median)
        middle, low, high = ratio(results["dspass-3"]["seconds"], results[best]["seconds"])
        goal(f"stage 3 step time over {best}, the fastest", middle, 0.95, f" ({low:.3f} to {high:.3f})")
    if _compared(results, "dspass-0", "ddp-inductor"):
        middle, low, high = ratio(results["dspass-0"]["seconds"], results["ddp-inductor"]["seconds"])
        goal("stage 0 step time over ddp-inductor", middle, 1.0, f" ({low:.3f} to {high:.3f})")
    ours = results.get("dspass-3", {})
    thrifty = [p for p in ("fsdp2", "fsdp2-compile") if p in sharded and "peak_bytes" in results[p]]
    if thrifty and "peak_bytes" in ours:
        best = min(thrifty, key=lambda p: _beyond(results[p]) or 0)
        goal(f"stage 3 peak beyond persistent over {best}, the better", _beyond(ours) / _beyond(results[best]), 0.85)  # type: ignore[operator]
        calls = {n: sum(c for c, _ in results[n]["collectives"].values()) for n in ("dspass-3", *thrifty)}
        fewest = min(calls[p] for p in thrifty)
        lines.append(
            f"- {'met' if calls['dspass-3'] < fewest else 'missed'}: stage 3 collectives fewer than FSDP2's: "
            f"{calls['dspass-3']:.0f} and {fewest:.0f}"
        )
    plain = results.get("inductor", {}).get("compile_seconds")
    for name in ("dspass-0", "dspass-3"):
        if plain and "compile_seconds" in results.get(name, {}):
            text = f"{name} compile time over plain Inductor's in as many processes"
            goal(text, results[name]["compile_seconds"] / plain, 1.3)
    return lines


def _losses(results: Results) -> list[str]:
    base = results.get("ddp-inductor", {}).get("losses")
    if not base:
        return ["Losses are not compared: ddp-inductor did not run."]
    worst, steps = {}, len(base)
    for name, r in results.items():
        if r["losses"] and name not in ("ddp-inductor", "inductor"):
            pairs = list(zip(r["losses"], base, strict=False))
            worst[name], steps = max(abs(a - b) / abs(b) for a, b in pairs), min(steps, len(pairs))
    said = ", ".join(f"{n} {w:.1e}{' (DIFFERS)' if w > 1e-5 else ''}" for n, w in worst.items())
    return [
        f"Losses of {steps} steps or more against ddp-inductor, largest relative difference (1e-5 is allowed): {said}."
    ]


def _bounds(results: Results, setting: dict[str, Any]) -> list[str]:
    """Lower bounds that need no run: what must be sent, and what must be alive."""
    ranks, size = setting["ranks"], 4
    model: Any = _meta(setting["preset"])
    whole = [p.numel() for p in model.parameters()]
    padded = [_padded(p, ranks) for p in model.parameters()]
    unit = max(sum(_padded(p, ranks) for p in block.parameters()) for block in model.blocks)
    share = (ranks - 1) / ranks
    states = 4 * size * sum(padded) // ranks  # parameter, gradient, and AdamW's two
    lines = [
        f"Bytes sent, bound: {_mb(3 * size * sum(padded) * share)} where all parameters are sharded (stage 3), "
        f"{_mb(2 * size * sum(whole) * share)} at stages 0 to 2; a parameter held whole costs 2 instead of 3.",
        f"Memory, bound without activations: {_mb(states)} of shards, their gradients and AdamW's states, and "
        f"{_mb(unit * size)} of one gathered block: {_mb(states + unit * size)}.",
    ]
    kept = results.get("inductor", {}).get("saved_bytes")
    if kept:
        bound = states + unit * size + kept
        lines.append(
            f"Inductor saves {_mb(kept)} of activations for this batch, {kept / states:.2f} times the sharded persistent state "
            f"(2 are wanted); a peak that keeps the same would be {_mb(bound)}."
        )
    ours = results.get("dspass-3", {})
    if ours.get("saved_bytes") and "peak_bytes" in ours:
        # A bucket in use and the next one on its way, beside what stage 3 itself saves (it recomputes more than Inductor).
        bound = states + 2 * unit * size + ours["saved_bytes"]
        lines.append(
            f"Stage 3 saves {_mb(ours['saved_bytes'])}; with the shards and two live buckets its bound is {_mb(bound)}, and "
            f"its peak is {ours['peak_bytes'] / bound:.3f} of that (1.1 is wanted)."
        )
    return lines


def _padded(p: torch.Tensor, ranks: int) -> int:
    rows = p.shape[0]
    return -(-rows // ranks) * ranks * (p.numel() // rows)


def _over(a: float | None, b: float | None) -> str:
    return f"{a / b:.3f}" if a and b else "-"


def _meta(preset: str) -> torch.nn.Module:
    with torch.device("meta"):
        return GPT(PRESETS[preset])


def device(kind: str) -> str:
    if kind != "cpu":
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return f"{cpu()}, one for each rank"


def cpu() -> str:
    """The model of this machine's processor, and how many cores it has."""
    return f"{processor.name()}, {os.cpu_count()} cores"


def _mb(count: float | None) -> str:
    return "-" if count is None else f"{count / 1e6:.1f} MB"
