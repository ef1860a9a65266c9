"""Step time over peak memory, as an SVG that is written by hand: no library for one figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from benchmarks.memory_points import Point, megabytes

#: Colours of Okabe and Ito, which most people can tell apart, and a mark of its own for who cannot.
_SYSTEMS = {
    "dspass": ("#0072b2", "circle"),
    "inductor dp": ("#e69f00", "square"),
    "inductor greedy": ("#009e73", "diamond"),
    "inductor ilp": ("#cc79a7", "triangle"),
    "inductor + checkpoint": ("#d55e00", "cross"),
    "eager": ("#000000", "square"),
    "eager + checkpoint": ("#888888", "diamond"),
    "FSDP2": ("#e69f00", "square"),
    "FSDP2 + checkpoint": ("#009e73", "diamond"),
    "FSDP2 + compile": ("#cc79a7", "triangle"),
    "FSDP2 + compile + checkpoint": ("#d55e00", "cross"),
}

_WIDTH, _HEIGHT = 860, 540
_LEFT, _RIGHT, _TOP, _BOTTOM = 84, 24, 44, 116  # of the field of points; below it the axis and the legend


def plot(title: str, points: Sequence[Point]) -> str:
    """A mark for every point, its figures on hover; down and to the left is better. The line joins dspass's plans by their
    budgets; its run without a budget is hollow."""
    points = [p for p in points if p.error is None]
    if not points:
        return _svg([_text(_WIDTH / 2, 24, f"{title}: no point was measured", "middle", 15)])
    peaks, steps = [p.peak / 1e6 for p in points], [p.step * 1e3 for p in points]
    x0, x1 = 0.95 * min(peaks), 1.03 * max(peaks)
    y0, y1 = 0.97 * min(steps), 1.03 * max(steps)

    def x(megabytes: float) -> float:
        return _LEFT + (megabytes - x0) / (x1 - x0) * (_WIDTH - _LEFT - _RIGHT)

    def y(milliseconds: float) -> float:
        return _HEIGHT - _BOTTOM - (milliseconds - y0) / (y1 - y0) * (_HEIGHT - _TOP - _BOTTOM)

    low = _HEIGHT - _BOTTOM
    parts = [_text(_WIDTH / 2, 24, title, "middle", 15)]
    for a in ticks(x0, x1):
        parts.append(f'<line x1="{x(a):.1f}" x2="{x(a):.1f}" y1="{_TOP}" y2="{low}" stroke="#eeeeee"/>')
        parts.append(_text(x(a), low + 18, f"{a:g}", "middle"))
    for b in ticks(y0, y1):
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(b):.1f}" y2="{y(b):.1f}" stroke="#dddddd"/>')
        parts.append(_text(_LEFT - 8, y(b) + 4, f"{b:g}", "end"))
    parts.append(f'<path d="M{_LEFT},{_TOP} V{low} H{_WIDTH - _RIGHT}" fill="none" stroke="#888888"/>')
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, low + 38, "measured peak of one rank (MB)", "middle", 13))
    middle = (_TOP + low) / 2
    turned = f' transform="rotate(-90 20 {middle:.0f})"'
    parts.append(_text(20, middle, "step time, median (ms)", "middle", 13, turned))
    frontier = sorted((p for p in points if p.is_planned), key=lambda p: p.budget or 0)
    path = " ".join(f"{x(p.peak / 1e6):.1f},{y(p.step * 1e3):.1f}" for p in frontier)
    parts.append(f'<polyline points="{path}" fill="none" stroke="{_SYSTEMS["dspass"][0]}" stroke-width="1.5"/>')
    for p in sorted(points, key=lambda p: p.is_planned):  # dspass's plans on top
        colour, kind = _SYSTEMS[p.system]
        hollow = p.system == "dspass" and not p.is_planned
        name = f"{p.name}: {megabytes(p.peak)}, {p.step * 1e3:.4g} ms"
        parts.append(_mark(kind, x(p.peak / 1e6), y(p.step * 1e3), colour, hollow, name))
    return _svg([*parts, *_legend(points)])


def _legend(points: Sequence[Point]) -> list[str]:
    """Below, in rows of four."""
    shown = [(system, *look, False) for system, look in _SYSTEMS.items() if any(p.system == system for p in points)]
    if any(p.system == "dspass" and not p.is_planned for p in points):
        shown.insert(1, ("dspass without a budget", *_SYSTEMS["dspass"], True))
    parts = []
    for n, (name, colour, kind, hollow) in enumerate(shown):
        across, down = _LEFT + n % 4 * 192, _HEIGHT - 50 + n // 4 * 22
        parts += [_mark(kind, across, down, colour, hollow), _text(across + 12, down + 4, name, "start")]
    return parts


def _mark(kind: str, x: float, y: float, colour: str, hollow: bool = False, name: str = "") -> str:
    r = 5.0
    corners = {
        "square": ((-r, -r), (r, -r), (r, r), (-r, r)),
        "diamond": ((0, -1.4 * r), (1.4 * r, 0), (0, 1.4 * r), (-1.4 * r, 0)),
        "triangle": ((0, -1.3 * r), (1.2 * r, r), (-1.2 * r, r)),
    }
    fill, stroke, thick = ("white", colour, 2) if hollow else (colour, "white", 1)
    look = f'fill="{fill}" stroke="{stroke}" stroke-width="{thick}"'
    title = f"<title>{escape(name)}</title>" if name else ""
    if kind == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}" {look}>{title}</circle>'
    if kind == "cross":
        lines = f"M{x - r:.1f},{y - r:.1f} L{x + r:.1f},{y + r:.1f} M{x - r:.1f},{y + r:.1f} L{x + r:.1f},{y - r:.1f}"
        return f'<path d="{lines}" stroke="{colour}" stroke-width="3">{title}</path>'
    path = " ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in corners[kind])
    return f'<polygon points="{path}" {look}>{title}</polygon>'


def ticks(low: float, high: float) -> list[float]:
    """Round numbers between the two, three to nine of them."""
    power = 10.0 ** math.floor(math.log10(high - low))
    step = next(s * power for s in (0.1, 0.2, 0.5, 1.0, 2.0) if (high - low) / (s * power) < 9)
    return [round(i * step, 9) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _text(x: float, y: float, said: str, anchor: str, size: int = 12, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"{more}>{escape(said)}</text>'


def _svg(parts: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif">'
    return "\n".join([head, f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>', *parts, "</svg>\n"])
