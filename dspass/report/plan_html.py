"""A memory budget's plan as a section of the report's page: the frontier as a plot, and what was decided as tables.

The frontier is the list of plans that nothing beats: each is slower than the one before it and takes less memory. It is drawn
here and not by the page's script, so that it can be read without JavaScript.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from dspass.report.records import PlanRecord
from dspass.report.words import format_bytes, format_seconds


def plan_html(plan: PlanRecord) -> str:
    """A section of the page: the frontier as a plot, and what was decided as tables. Needs no JavaScript."""
    name = escape(plan.graph)
    classes = [
        (
            f"{c.name} ({c.count})",
            format_bytes(c.kept_bytes),
            f"{format_bytes(c.held_bytes)} {c.held_by}" if c.held_bytes else "-",
            format_bytes(c.dropped_bytes),
            c.again,
            c.reason,
        )
        for c in plan.classes
    ]
    largest = [(c.name, format_bytes(c.kept_bytes + c.held_bytes + c.dropped_bytes), c.reason) for c in plan.largest]
    return f"""
  <section class="card" aria-label="Plan of {name}">
    <div class="card-head">
      <h2>Plan of {name} for {format_bytes(plan.budget_bytes)}</h2>
      <p class="muted">{escape(plan.next_step)}</p>
    </div>
    <p>{escape(plan.summary)}</p>
    {_plot(plan)}
    {_table(("Values", "Kept", "Held otherwise", "Dropped", "Again in", "Why"), classes, 1, last=1)}
    {_table(("Largest", "Size", "Why"), largest, 1, last=1)}
  </section>
"""


_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 760, 260, 78, 24, 26, 40


def _plot(plan: PlanRecord) -> str:
    """Step time over peak memory: smaller and faster is down and to the left."""
    points = plan.frontier
    peaks = [*(p.peak_bytes for p in points), plan.budget_bytes if plan.here else points[0].peak_bytes]
    low, high = 0.95 * min(peaks), 1.03 * max(peaks)
    fast, slow = min(p.seconds for p in points), max(p.seconds for p in points)
    room = max(slow - fast, 1e-3 * slow, 1e-9)
    fast, slow = fast - 0.12 * room, slow + 0.12 * room

    def x(peak: float) -> float:
        return _LEFT + (peak - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def y(seconds: float) -> float:
        return _HEIGHT - _BOTTOM - (seconds - fast) / (slow - fast) * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for i in range(5):
        peak, seconds = low + (high - low) * i / 4, fast + (slow - fast) * i / 4
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(seconds):.1f}" y2="{y(seconds):.1f}"/>'
        )
        parts.append(
            f'<text x="{_LEFT - 8}" y="{y(seconds) + 4:.1f}" text-anchor="end">{format_seconds(seconds)}</text>'
        )
        parts.append(
            f'<text x="{x(peak):.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{format_bytes(round(peak))}</text>'
        )
    if low <= plan.budget_bytes <= high:
        at = x(plan.budget_bytes)
        parts.append(f'<line class="budget" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>')
        parts.append(f'<text x="{at:.1f}" y="{_TOP - 8}" text-anchor="middle">budget</text>')
    line = " ".join(f"{x(p.peak_bytes):.1f},{y(p.seconds):.1f}" for p in points)
    parts.append(f'<polyline class="frontier" points="{line}"/>')
    for i, p in enumerate(points):
        kind = "here" if i == plan.here else "measured" if p.is_measured else "modelled"
        about = "" if p.is_measured else "about "
        title = f"{about}{format_bytes(p.peak_bytes)}, {format_seconds(p.seconds)}, {format_bytes(p.saved_bytes)} saved"
        centre = f'cx="{x(p.peak_bytes):.1f}" cy="{y(p.seconds):.1f}"'
        parts.append(
            f'<circle class="{kind}" {centre} r="{6 if i == plan.here else 4}"><title>{escape(title)}</title></circle>'
        )
    here = points[plan.here]
    right = x(here.peak_bytes) > _WIDTH - 150
    parts.append(
        f'<text class="peak-label" x="{x(here.peak_bytes) + (-10 if right else 10):.1f}" y="{y(here.seconds) - 9:.1f}" '
        f'text-anchor="{"end" if right else "start"}">you are here</text>'
    )
    parts.append(
        f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2:.0f}" y="{_HEIGHT - 6}" text-anchor="middle">peak memory of one rank</text>'
    )
    label = f"Step time over peak memory: {len(points)} plans, the chosen one is number {plan.here + 1}"
    return (
        f'<div class="chart"><svg class="plan-plot" role="img" aria-label="{label}" viewBox="0 0 {_WIDTH} {_HEIGHT}">'
        + "".join(parts)
        + "</svg></div>"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: int, last: int = 0) -> str:
    """``numbers`` is the first column of figures, ``last`` how many columns at the end are text again."""

    def kind(i: int) -> str:
        return ' class="number"' if numbers <= i < len(head) - last else ""

    header = "".join(f'<th scope="col"{kind(i)}>{escape(h)}</th>' for i, h in enumerate(head))
    body = "".join(
        "<tr>" + "".join(f"<td{kind(i)}>{escape(c)}</td>" for i, c in enumerate(row)) + "</tr>" for row in rows
    )
    return f'<div class="table-box"><table class="figures"><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>'
