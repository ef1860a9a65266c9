"""``python -m benchmarks zero``: dspass stages 0 to 3 beside DDP, FSDP2 and plain Inductor, in turns, in one call."""

from __future__ import annotations

import json
import platform
import random
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.subjects import SUBJECTS
from benchmarks.workers import Group, SubjectFailed
from examples.gpt import GPT, PRESETS

REFERENCES = {
    "dspass-3": ("fsdp2", "fsdp2-compile"),
    "dspass-0": ("ddp-inductor",),
    "dspass-1": ("fsdp2", "fsdp2-compile"),
    "dspass-2": ("fsdp2", "fsdp2-compile"),
}


def run(options: Any) -> int:
    settings = {"preset": options.preset, "batch": options.batch, "context": options.context, "device": options.device}
    names = options.only.split(",") if options.only else list(SUBJECTS)
    unknown = [n for n in names if n not in SUBJECTS]
    if unknown:
        print(f"no subject {unknown[0]!r}; there are {', '.join(SUBJECTS)}", file=sys.stderr)
        return 2
    results: dict[str, dict[str, Any]] = {}
    groups: dict[str, Group] = {}
    try:
        for name in tqdm(names, desc="start and compile", unit="subject", ncols=90):
            _attempt(results, name, lambda name=name: _start(name, options, settings, groups, results))
        for _ in tqdm(range(options.rounds), desc="interleaved rounds", unit="round", ncols=90):
            order = [n for n in names if n in groups]
            random.Random(len(results.get(order[0], {}).get("seconds", []))).shuffle(order)
            for name in order:
                _attempt(
                    results, name, lambda name=name: _round(name, groups[name], results[name], options.steps), groups
                )
        for name in tqdm(list(groups), desc="memory and traffic", unit="subject", ncols=90):
            _attempt(results, name, lambda name=name: _measure(groups[name], results[name]), groups)
    finally:
        for group in groups.values():
            group.close()
    text = report(results, options, settings)
    print(text)
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"zero-{options.preset}-{options.device}-b{options.batch}"
    stem.with_suffix(".md").write_text(text + "\n")
    stem.with_suffix(".json").write_text(json.dumps({"settings": settings, "results": results}, indent=1) + "\n")
    print(f"\nwritten: {stem}.md and {stem}.json")
    return int(any("error" in r for r in results.values()))


def _attempt(results: dict[str, dict[str, Any]], name: str, work: Any, groups: dict[str, Group] | None = None) -> None:
    try:
        work()
    except SubjectFailed as error:
        results.setdefault(name, {})["error"] = str(error)
        tqdm.write(f"{name} failed: {str(error).strip().splitlines()[-1]}")
        if groups is not None and name in groups:
            groups.pop(name).close()


def _start(
    name: str, options: Any, settings: dict[str, Any], groups: dict[str, Group], results: dict[str, Any]
) -> None:
    ranks = 1 if name == "inductor" else options.ranks
    group = Group(name, ranks, settings)
    groups[name] = group
    try:
        begin = time.perf_counter()
        first = group.ask("steps", 1, timeout=900)
        second = group.ask("steps", 1, timeout=900)
        group.ask("steps", 1, timeout=900)
    except SubjectFailed:
        groups.pop(name).close()
        raise
    results[name] = {
        "wrapped": SUBJECTS[name][1],
        "compile_seconds": max(f[0] for f in first) + max(s[0] for s in second),
        "start_seconds": time.perf_counter() - begin,
        "losses": [f[1][0] for f in (first[0], second[0])],
        "seconds": [],
    }


def _round(name: str, group: Group, result: dict[str, Any], count: int) -> None:
    answers = group.ask("steps", count, timeout=600)
    result["seconds"].append(max(a[0] for a in answers))
    result["losses"] += answers[0][1]


def _measure(group: Group, result: dict[str, Any]) -> None:
    peaks, kept = group.ask("peak", 2), group.ask("persistent")
    result["peak_bytes"] = max(peaks)
    result["persistent_bytes"] = max(sum(k.values()) for k in kept)
    result["collectives"] = group.ask("collectives", 1)[0]
    result["interface_bytes"] = max(group.ask("interface_bytes", 2)) / len(group.pipes)


def ratio(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """The median of ratios of one round's steps, and its bootstrap 95 % interval."""
    pairs = [a / b for a, b in zip(ours, theirs, strict=False)]
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(pairs, k=len(pairs))) for _ in range(2000))
    return statistics.median(pairs), medians[50], medians[1949]


def report(results: dict[str, dict[str, Any]], options: Any, settings: dict[str, Any]) -> str:
    count = sum(p.numel() for p in _meta(settings["preset"]).parameters())
    lines = [
        f"# ZeRO beside its peers: GPT, {count / 1e6:.1f} M parameters, "
        f"batch {settings['batch']} x {settings['context']} a rank",
        "",
        f"`{shlex.join(['python', '-m', 'benchmarks', *sys.argv[1:]])}` on {options.ranks} ranks of {_device(options.device)}, "
        f"torch {torch.__version__}, Python {platform.python_version()}; AdamW(fused=True) for all, {options.rounds} rounds of "
        f"{options.steps} steps, subjects in random order within a round.",
        "",
        "| subject | step, median | peak | beyond persistent | collectives | bytes sent | interface | first 2 steps | loss |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, r in results.items():
        if not r.get("seconds"):
            lines.append(f"| {name} | failed: {r.get('error', '').strip().splitlines()[-1][:80]} | | | | | | | |")
            continue
        lines.append(
            " | ".join(
                [
                    f"| {name}",
                    f"{statistics.median(r['seconds']) * 1e3:.0f} ms",
                    _mb(r.get("peak_bytes")),
                    _mb(r["peak_bytes"] - r["persistent_bytes"]) if "peak_bytes" in r else "-",
                    f"{sum(c for c, _ in r.get('collectives', {}).values()):.0f}",
                    _mb(sum(b for _, b in r.get("collectives", {}).values()) or None),
                    _mb(r.get("interface_bytes")),
                    f"{r['compile_seconds']:.0f} s",
                    f"{r['losses'][-1]:.5f} |",
                ]
            )
        )
    lines += [
        "",
        "| compared | with | step time, median of paired ratios (95 %) | peak | beyond persistent |",
        "|---|---|---|---|---|",
    ]
    for name, peers in REFERENCES.items():
        for peer in peers:
            a, b = results.get(name, {}), results.get(peer, {})
            if a.get("seconds") and b.get("seconds"):
                middle, low, high = ratio(a["seconds"], b["seconds"])
                peak = f"{a['peak_bytes'] / b['peak_bytes']:.3f}" if "peak_bytes" in a and "peak_bytes" in b else "-"
                beyond = (
                    f"{(a['peak_bytes'] - a['persistent_bytes']) / (b['peak_bytes'] - b['persistent_bytes']):.3f}"
                    if peak != "-"
                    else "-"
                )
                lines.append(f"| {name} | {peer} | {middle:.3f} ({low:.3f} to {high:.3f}) | {peak} | {beyond} |")
    lines += ["", *_losses(results), *_bounds(results, count, options), "", "How each was wrapped:", ""]
    lines += [f"- {name}: {r['wrapped']}" for name, r in results.items() if "wrapped" in r]
    return "\n".join(lines)


def _losses(results: dict[str, dict[str, Any]]) -> list[str]:
    base = results.get("ddp-inductor", {}).get("losses")
    if not base:
        return []
    worst = {
        name: max((abs(a - b) / abs(b) for a, b in zip(r["losses"], base, strict=False)), default=0.0)
        for name, r in results.items()
        if r.get("seconds") and name not in ("ddp-inductor", "inductor")
    }
    said = ", ".join(f"{n} {w:.1e}" for n, w in worst.items())
    return [f"Losses of {len(base)} steps against ddp-inductor, largest relative difference: {said}."]


def _bounds(results: dict[str, dict[str, Any]], count: int, options: Any) -> list[str]:
    share = (options.ranks - 1) / options.ranks
    lines = [
        f"Bound of bytes sent a step: {_mb(3 * 4 * count * share)} where all parameters are sharded (stage 3), "
        f"{_mb(2 * 4 * count * share)} at stages 0 to 2; parameters held whole cost 2 instead of 3."
    ]
    ours, plain = results.get("dspass-3", {}), results.get("inductor", {})
    if "compile_seconds" in ours and "compile_seconds" in plain:
        lines.append(
            f"First two steps, dspass-3 over one process of plain Inductor: "
            f"{ours['compile_seconds'] / plain['compile_seconds']:.2f} (both ranks compile, each on its own core)."
        )
    return lines


def _meta(preset: str) -> torch.nn.Module:
    with torch.device("meta"):
        return GPT(PRESETS[preset])


def _device(kind: str) -> str:
    if kind != "cpu":
        return torch.cuda.get_device_name(0)
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return f"{model}, one core each"


def _mb(count: float | None) -> str:
    return "-" if count is None else f"{count / 1e6:.1f} MB"
