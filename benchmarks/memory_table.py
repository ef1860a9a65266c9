"""What ``python -m benchmarks memory`` found, as markdown: points, checks of dspass's own, comparisons with peers' points.

Met or missed is computed, never said beforehand.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.memory_points import PLENTY, Point, megabytes

#: Peaks within this share of each other, or of a budget, are equal.
GRACE = 0.01

#: By so much a later budget's step may be slower than an earlier one's before it is said to be.
NOISE = 0.05

#: By so much a prediction may miss: a peak, a step's time.
PEAK_MISS, TIME_MISS = 0.03, 0.15

#: Budgets strictly between the smallest and that which saves everything, and distinct plans among them.
BETWEEN, PLANS = 8, 6


@dataclass
class Comparison:
    """Of a peer's point: dspass's best step time at no more memory, and least peak at no more time, as ratios to the point's,
    and to those of the best that any peer has there."""

    peer: Point
    time: float | None
    memory: float | None
    best_time: float | None
    best_memory: float | None


def compare(points: Sequence[Point], grace: float = GRACE) -> list[Comparison]:
    """None where dspass has no point at so little memory, or as fast. Points are not interpolated."""
    points = [p for p in points if p.error is None]
    ours, peers = [p for p in points if p.is_planned], [p for p in points if p.system != "dspass"]
    found = []
    for peer in peers:
        time = min((p.step for p in ours if p.peak <= peer.peak * (1 + grace)), default=None)
        peak = min((p.peak for p in ours if p.step <= peer.step * (1 + grace)), default=None)
        fastest = min(p.step for p in peers if p.peak <= peer.peak)
        smallest = min(p.peak for p in peers if p.step <= peer.step)
        found.append(
            Comparison(
                peer,
                time and time / peer.step,
                peak and peak / peer.peak,
                time and time / fastest,
                peak and peak / smallest,
            )
        )
    return found


def table(points: Sequence[Point]) -> str:
    """Markdown of one model's points."""
    failed = [p for p in points if p.error is not None]
    points = sorted((p for p in points if p.error is None), key=lambda p: (p.system, -p.peak, -(p.budget or 0)))
    unplanned = next((p for p in points if p.system == "dspass" and p.budget is None), None)
    smallest = min((p.budget for p in (*points, *failed) if p.system == "dspass" and p.budget is not None), default=0)
    lines = [
        "| system | budget | predicted peak | measured peak | of budget | of prediction | step, median | predicted step "
        "| of measured | losses |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(_row(p, unplanned) for p in points),
        "",
        *(f"- failed: {p.name}: {' '.join((p.error or '').split())[-300:]}" for p in failed),
        *([""] if failed else []),
        *_checks(points, unplanned, smallest, sum(p.is_planned for p in failed)),
    ]
    comparisons = compare(points)
    lines += [
        *_against(comparisons),
        *_unplanned(unplanned, comparisons),
        "",
        "| peer | our step time at its peak | our peak at its step time |",
        "|---|---|---|",
    ]
    lines += [f"| {c.peer.name} | {_ratio(c.time)} | {_ratio(c.memory)} |" for c in comparisons]
    return "\n".join(lines)


def _row(p: Point, unplanned: Point | None) -> str:
    bounded = p.budget is not None and p.budget < PLENTY
    cells = [
        p.name,
        "" if p.budget is None else megabytes(p.budget) if bounded else "none needed",
        "" if p.predicted is None else megabytes(p.predicted),
        megabytes(p.peak),
        f"{p.peak / p.budget:.3f}" if p.budget is not None and bounded else "",
        "" if p.predicted is None else f"{p.peak / p.predicted:.3f}",
        _ms(p.step),
        "" if p.predicted_seconds is None else _ms(p.predicted_seconds),
        "" if p.predicted_seconds is None else f"{p.predicted_seconds / p.step:.3f}",
        "" if unplanned is None else _losses(p.losses, unplanned.losses),
    ]
    return f"| {' | '.join(cells)} |"


def _losses(ours: Sequence[float], base: Sequence[float]) -> str:
    """The largest relative difference, over the steps that both took."""
    pairs = list(zip(ours, base, strict=False))
    if not all(math.isfinite(loss) for pair in pairs for loss in pair):
        return "not finite"
    worst = max((abs(a - b) / abs(b) for a, b in pairs), default=0.0)
    return "equal" if worst == 0 else f"{worst:.1e}"


def _checks(points: Sequence[Point], unplanned: Point | None, smallest: int, lost: int) -> list[str]:
    """Of dspass's points, by rising budget; ``lost`` are those that failed."""
    planned = sorted((p for p in points if p.is_planned), key=lambda p: p.budget or 0)
    if not planned:
        return ["- missed: no budget of dspass's was measured"]
    held = [p for p in planned if p.peak <= (p.budget or 0) * (1 + GRACE)]
    near = [p for p in planned if p.predicted and abs(p.peak / p.predicted - 1) <= PEAK_MISS]
    lines = [
        f"- {said(not lost)}: every budget was measured: {len(planned)} of {len(planned) + lost}",
        f"- {said(len(held) == len(planned))}: measured peak within the budget (1 % grace): {len(held)} of {len(planned)}, "
        f"at most {max(p.peak / (p.budget or 1) for p in planned):.3f} of it",
        f"- {said(len(near) == len(planned))}: predicted peak within 3 % of the measured: {len(near)} of {len(planned)}",
    ]
    if unplanned is not None:
        equal = [p for p in planned if _losses(p.losses, unplanned.losses) == "equal"]
        lines.append(
            f"- {said(len(equal) == len(planned))}: losses bitwise those of the unplanned run: {len(equal)} of {len(planned)}"
        )
    lines += [*_predictions(planned), *_sweep(planned)]
    between = [p for p in planned if smallest < (p.budget or 0) < PLENTY]
    plans = len({p.decision for p in between})
    if len(planned) + lost < BETWEEN + 2:
        return [
            *lines,
            f"- no sweep: {len(planned) + lost} budgets, where {BETWEEN} strictly between need {BETWEEN + 2}",
        ]
    lines += [
        f"- {said(len(between) >= BETWEEN)}: at least {BETWEEN} budgets strictly between the smallest and save-everything: "
        f"{len(between)}",
        f"- {said(plans >= PLANS)}: at least {PLANS} distinct plans among these: {plans}",
    ]
    return lines


def _predictions(planned: Sequence[Point]) -> list[str]:
    """As they are, and with the one factor for the model that dspass keeps with the device's calibration after eleven steps."""
    ratios = {p.name: p.predicted_seconds / p.step for p in planned if p.predicted_seconds}
    if not ratios:
        return ["- missed: no step's time was predicted"]

    def far(ratio: float) -> float:
        return max(ratio, 1 / ratio)

    factor = statistics.median(ratios.values())
    good = sum(abs(r - 1) <= TIME_MISS for r in ratios.values())
    scaled = sum(abs(r / factor - 1) <= TIME_MISS for r in ratios.values())
    name, worst = max(ratios.items(), key=lambda item: far(item[1]))
    furthest = max((r / factor for r in ratios.values()), key=far)
    return [
        f"- {said(good == len(ratios))}: predicted step time within 15 % of the measured: {good} of {len(ratios)}, worst ratio "
        f"{worst:.3f} ({name})",
        f"- with one factor for the model (1/{factor:.3f}), as dspass keeps after eleven steps: {scaled} of {len(ratios)}, "
        f"worst ratio {furthest:.3f}",
    ]


def _sweep(planned: Sequence[Point]) -> list[str]:
    """More memory never costs time: by prediction, and as measured."""
    pairs = [(small, large) for i, small in enumerate(planned) for large in planned[i + 1 :]]
    lines = []
    told = [(a, b) for a, b in pairs if a.predicted_seconds and b.predicted_seconds]
    for what, grace, chosen, of in (
        ("predicted step time never rises as the budget grows", 0.0, told, lambda p: p.predicted_seconds),
        ("measured step time never rises by more than 5 % as the budget grows", NOISE, pairs, lambda p: p.step),
    ):
        if chosen:
            small, large = max(chosen, key=lambda pair: of(pair[1]) / of(pair[0]))
            worst = of(large) / of(small)
            rising = f", worst {worst:.3f}, from {small.name} ({_ms(of(small))}) to {large.name} ({_ms(of(large))})"
            lines.append(f"- {said(worst <= 1 + grace)}: {what}: {len(chosen)} pairs{rising}")
    return lines


def _against(comparisons: Sequence[Comparison]) -> list[str]:
    """With what the best peer has at each peer's peak, and at each peer's time."""
    times = [c.best_time for c in comparisons if c.best_time is not None]
    peaks = [c.best_memory for c in comparisons if c.best_memory is not None]
    beaten = sum(t <= 1.0 for t in times)
    ratios = f", ratios {min(times):.2f} to {max(times):.2f}" if times else ""
    median = statistics.median(peaks) if peaks else math.inf
    return [
        f"- {said(bool(times) and beaten == len(times))}: at equal peak no slower than the best peer: {beaten} of "
        f"{len(times)}{ratios}; {len(comparisons) - len(times)} peers' points take less memory than all of ours",
        f"- {said(median <= 0.9)}: at equal time the median peak is at most 0.9 of the best peer's: "
        f"{f'{median:.2f} of {len(peaks)}' if peaks else 'none in common'}; {len(comparisons) - len(peaks)} peers' points are "
        "faster than all of ours",
    ]


def _unplanned(unplanned: Point | None, comparisons: Sequence[Comparison]) -> list[str]:
    """How much of the lead in time is not a plan's."""
    if unplanned is None or not comparisons:
        return []
    fastest = min((c.peer for c in comparisons), key=lambda peer: peer.step)
    return [f"- without a plan a step takes {unplanned.step / fastest.step:.2f} of the fastest peer's, {fastest.name}"]


def said(met: bool) -> str:
    return "met" if met else "missed"


def _ms(seconds: float) -> str:
    """Three digits at least: steps of the smallest model take a few milliseconds."""
    return f"{seconds * 1e3:.0f} ms" if seconds >= 0.1 else f"{seconds * 1e3:.2f} ms"


def _ratio(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"
