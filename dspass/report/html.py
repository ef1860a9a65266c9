"""The report as one page that needs nothing else, and as a few lines for notebooks.

Figures and tables are made here, so that they can be read without JavaScript; graphs and the memory timeline
travel as JSON that ``report.js`` draws. Every string of the report is escaped: labels come from models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from dspass.report.changes import flat_config
from dspass.report.diff import opcodes, split_lines
from dspass.report.experts_html import experts_html
from dspass.report.pipeline_html import pipeline_html
from dspass.report.plan_html import plan_html
from dspass.report.records import CATEGORIES, MemoryPoint, PassRecord
from dspass.report.report import Report
from dspass.report.text import bits_text, exposed_text
from dspass.report.words import format_bytes, format_seconds

MAX_POINTS = 2000
"""Points of the timeline that the page holds: more than a screen has columns."""

_EQUAL, _RENAMED, _REPLACED = 0, 1, 2  # the same numbers stand in report.js


def render_page(report: Report) -> str:
    """The whole page as text."""
    parts = {
        "title": escape(f"dspass: {report.model}"),
        "model": escape(report.model),
        "subtitle": escape(_subtitle(report)),
        "tiles": _tiles(report),
        "categories": _categories(report),
        "passes_note": escape(_passes_note(report)),
        "passes": _pass_table(report.passes),
        "traffic": _traffic_table(report) + _host_table(report) + _quantised_table(report) + _rounded_table(report),
        "plans": "\n".join(map(plan_html, report.plans)),
        "pipeline": pipeline_html(report.pipeline),
        "experts": experts_html(report.experts),
        "notes": _notes(report),
        "config": _config(report),
        "footer": escape("Written by dspass. " + ", ".join(f"{k} {v}" for k, v in report.versions.items())),
        "style": _asset("report.css"),
        "script": _asset("report.js"),
        "data": embed_json(_page_data(report)),
    }
    # One pass over the template: what is filled in is never searched again.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _asset("report.html"))


def render_summary(report: Report) -> str:
    """A few lines of HTML with the styles inside, for a notebook that may be light or dark."""
    cell = 'style="text-align:left;padding:2px 12px 2px 0"'
    figures = [(label, f"{value} ({hint})" if hint else value) for label, value, hint in _figures(report)]
    rows = "".join(f"<tr><th {cell}>{escape(k)}</th><td {cell}>{escape(v)}</td></tr>" for k, v in figures)
    peak = report.memory.peak
    bars = ""
    if peak is not None:
        for category, count in peak.bytes.items():
            width = 100 * count / max(1, *peak.bytes.values())
            bar = f'<div style="background:currentColor;opacity:.55;height:9px;width:{width:.1f}%"></div>'
            bars += (
                f"<tr><td {cell}>{category}</td><td {cell}>{format_bytes(count)}</td>"
                f'<td style="width:260px">{bar}</td></tr>'
            )
        bars = f"<table><caption {cell}>Memory at the peak</caption><tbody>{bars}</tbody></table>"
    passes = "".join(
        f"<li><b>{escape(p.name)}</b> ({escape(p.graph)}, {p.stage}): {escape(p.summary)}</li>" for p in report.passes
    )
    passes = f"<details><summary>{escape(_passes_note(report))}</summary><ol>{passes}</ol></details>"
    head = f"<p><b>{escape(report.model)}</b>: {escape(_subtitle(report))}</p>"
    return f'<div class="dspass-report">{head}<table><tbody>{rows}</tbody></table>{bars}{passes}</div>'


def embed_json(value: Any) -> str:
    """JSON that can stand inside a ``<script>`` element: no ``<``, so neither its end nor a comment."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8").rstrip("\n")


# Figures and tables


def _subtitle(report: Report) -> str:
    ranks = f"{report.world_size} rank" + ("" if report.world_size == 1 else "s")
    how = "Measured on" if report.kind == "measured" else "Predicted for"
    return f"{how} {ranks}, {report.device}"


def _passes_note(report: Report) -> str:
    if not report.passes:
        return "None ran"
    changed = sum(p.changed for p in report.passes)
    seconds = format_seconds(sum(p.seconds for p in report.passes))
    return f"{len(report.passes)} passes ran in {seconds}, {changed} changed a graph"


def _figures(report: Report) -> list[tuple[str, str, str]]:
    """Label, value and a hint below it."""
    memory, peak, unplanned = report.memory, report.memory.peak, report.memory.unplanned_peak
    without = "" if unplanned is None else f"; {format_bytes(unplanned.total)} without the plan"
    step, first = report.step_seconds, memory.first_call_peak_bytes
    calls = sum(t.calls for t in report.traffic)
    return [
        ("Step time", report.missing if step is None else format_seconds(step), ""),
        (
            "Peak memory of one rank",
            report.missing if peak is None else format_bytes(peak.total),
            "" if peak is None else f"in {peak.phase}{without}",
        ),
        ("Peak of the first call", report.missing if first is None else format_bytes(first), ""),
        (
            "Sent by one rank in a step",
            format_bytes(report.traffic_bytes),
            f"{calls} collective{'' if calls == 1 else 's'}",
        ),
    ]


def _tiles(report: Report) -> str:
    tiles = []
    for label, value, hint in _figures(report):
        kind = "absent" if value == report.missing else "figure"
        below = f"<dd>{escape(hint)}</dd>" if hint else ""
        tiles.append(f'<div><dt>{escape(label)}</dt><dd class="{kind}">{escape(value)}</dd>{below}</div>')
    return "\n".join(tiles)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = (), foot: str = "") -> str:
    def kind(column: int) -> str:
        return ' class="number"' if column in numbers else ""

    header = "".join(f'<th scope="col"{kind(i)}>{escape(cell)}</th>' for i, cell in enumerate(head))
    body = "".join(
        "<tr>" + "".join(f"<td{kind(i)}>{escape(cell)}</td>" for i, cell in enumerate(row)) + "</tr>" for row in rows
    )
    return (
        f'<div class="table-box"><table class="figures"><thead><tr>{header}</tr></thead>'
        f"<tbody>{body}</tbody>{foot}</table></div>"
    )


def _categories(report: Report) -> str:
    peak = report.memory.peak
    if peak is None:
        return f"<p>The timeline was {report.missing}.</p>"
    head, columns = ["At the peak", "Memory"], [peak]
    if (unplanned := report.memory.unplanned_peak) is not None:
        head, columns = ["At the peak", "With the plan", "Without it"], [peak, unplanned]
    rows = [(category, *(format_bytes(point.bytes[category]) for point in columns)) for category in CATEGORIES]
    return _table(head, rows, numbers=range(1, len(head)))


def _pass_table(passes: Sequence[PassRecord]) -> str:
    rows = [
        (p.name, p.graph, p.stage, f"{p.ops_before} → {p.ops_after}", format_seconds(p.seconds), p.summary)
        for p in passes
    ]
    return _table(("Pass", "Graph", "Stage", "Operators", "Time", "What it did"), rows, numbers=[3, 4])


def _traffic_table(report: Report) -> str:
    if not report.traffic:
        return '<p class="muted">No collective runs in a step.</p>'
    rows = [
        (t.kind, t.direction, t.group, str(t.group_size), str(t.calls), format_bytes(t.bytes), exposed_text(t))
        for t in report.traffic
    ]
    times = [t.exposed_seconds for t in report.traffic]
    known = [t for t in times if t is not None]
    in_all = format_seconds(sum(known)) if len(known) == len(times) else "-"
    calls = sum(t.calls for t in report.traffic)
    totals = (str(calls), format_bytes(report.traffic_bytes), in_all)
    cells = "".join(f'<td class="number">{total}</td>' for total in totals)
    foot = f'<tfoot><tr><th scope="row" colspan="4">Total</th>{cells}</tr></tfoot>'
    head = ("Collective", "Direction", "Group", "Ranks", "Calls", "Sent", "Exposed")
    return _table(head, rows, numbers=[3, 4, 5, 6], foot=foot)


def _host_table(report: Report) -> str:
    rows = [(c.kind, c.direction, format_bytes(c.bytes), exposed_text(c)) for c in report.host_copies]
    if not rows:
        return ""
    table = _table(("Copied", "Direction", "Size", "Exposed"), rows, numbers=[2, 3])
    return f'<h3 class="sub">Copies to and from the host</h3>{table}'


def _quantised_table(report: Report) -> str:
    rows = [
        (
            t.name,
            t.kind,
            t.direction,
            t.format or "whole",
            format_bytes(t.whole_bytes),
            format_bytes(t.sent_bytes),
            "-" if t.relative_error is None else f"{100 * t.relative_error:.2g} %",
        )
        for t in report.quantised
    ]
    if not rows:
        return ""
    head = ("Tensor", "Use", "Direction", "Format", "Whole", "In few bits", "Relative error")
    return f'<h3 class="sub">In few bits, one call</h3>{_table(head, rows, numbers=[4, 5, 6])}'


def _rounded_table(report: Report) -> str:
    rows = [(one.name, one.kind, bits_text(one)) for one in report.rounded]
    if not rows:
        return ""
    table = _table(("Name", "What", "Rounded to"), rows, numbers=[])
    return f'<h3 class="sub">Rounded while it trains</h3>{table}'


def _keyed(head: Sequence[str], rows: Iterable[tuple[str, str]], kind: str) -> str:
    header = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row" class="key">{escape(key)}</th><td class="{kind}">{escape(value)}</td></tr>'
        for key, value in rows
    )
    return f'<table class="figures"><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table>'


def _notes(report: Report) -> str:
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    return f'<ul class="notes">{notes}</ul>' if notes else '<p class="muted">None.</p>'


def _config(report: Report) -> str:
    rows = [(key, json.dumps(value, ensure_ascii=False)) for key, value in flat_config(report.config).items()]
    text = _keyed(("Key", "Value"), rows, "value") if rows else '<p class="muted">No key is set.</p>'
    if report.ignored:
        text += '<h3 class="sub">Ignored keys</h3>' + _keyed(("Key", "Why it does nothing"), report.ignored.items(), "")
    return text


# What report.js draws


def _page_data(report: Report) -> dict[str, Any]:
    texts = _Texts()
    entries = [_pass_entry(p, texts) for p in report.passes]
    for graph in report.graphs:
        entries.append(
            {
                "pass": False,
                "title": graph.name,
                "group": "From first to last",
                "summary": "The graph before the first pass and after the last.",
                "facts": "",
                "ops": "",
                "meta": "all passes",
                "changed": graph.before != graph.after,
                "keeps": True,
                "diff": texts.diff(graph.before, graph.after),
            }
        )
    memory = report.memory
    return {
        "missing": report.missing,
        "categories": CATEGORIES,
        "unit": memory.time_unit,
        **_series(memory.timeline),
        "unplanned": _series(memory.unplanned) if memory.unplanned else None,
        "budget": report.plans[0].budget_bytes if report.plans else None,
        "entries": entries,
        "diffs": texts.diffs,
        "texts": texts.texts,
        "lines": list(texts.lines),
    }


def _series(timeline: Sequence[MemoryPoint]) -> dict[str, Any]:
    """One timeline, as it is drawn."""
    points = sorted(timeline, key=lambda p: p.t)
    kept = downsample(points)
    peak = max(range(len(kept)), key=lambda i: kept[i].total, default=0)
    return {
        "pointCount": len(points),
        "peak": peak,
        "peakText": f"peak {format_bytes(kept[peak].total)} in {kept[peak].phase}" if kept else "",
        "points": {
            "t": [p.t for p in kept],
            "label": [p.label for p in kept],
            "phase": [p.phase for p in kept],
            "bytes": [[p.bytes[c] for p in kept] for c in CATEGORIES],
        },
    }


def _pass_entry(record: PassRecord, texts: _Texts) -> dict[str, Any]:
    delta = record.ops_after - record.ops_before
    numbers = "keeps the numbers" if record.keeps_numbers else "changes numbers"
    return {
        "pass": True,
        "title": record.name,
        "group": f"{record.graph}, {record.stage}",
        "summary": record.summary,
        "facts": f"{record.graph}, {record.stage}; {record.ops_before} → {record.ops_after} operators; "
        f"{format_seconds(record.seconds)}; {numbers}",
        "ops": f"{delta:+d} ops" if delta else "",
        "meta": format_seconds(record.seconds) + ("" if record.changed else ", no change"),
        "changed": record.changed,
        "keeps": record.keeps_numbers,
        "diff": texts.diff(record.before, record.after),
    }


class _Texts:
    """Graph texts as lists of line numbers: consecutive passes share nearly all their lines."""

    def __init__(self) -> None:
        self.lines: dict[str, int] = {}
        self.texts: list[list[int]] = []
        self.diffs: list[dict[str, Any]] = []
        self._text_ids: dict[str, int] = {}
        self._diff_ids: dict[tuple[str, str], int] = {}

    def diff(self, before: str, after: str) -> int:
        """The index in :attr:`diffs`."""
        if (before, after) not in self._diff_ids:
            self._diff_ids[before, after] = len(self.diffs)
            a, b = split_lines(before), split_lines(after)
            ops = [number for op in paired(a, b) for number in op]
            ids = self._text(before, a), self._text(after, b)
            self.diffs.append({"before": ids[0], "after": ids[1], "ops": ops, "empty": not (a or b)})
        return self._diff_ids[before, after]

    def _text(self, text: str, lines: Sequence[str]) -> int:
        if text not in self._text_ids:
            self._text_ids[text] = len(self.texts)
            self.texts.append([self.lines.setdefault(line, len(self.lines)) for line in lines])
        return self._text_ids[text]


def paired(before: Sequence[str], after: Sequence[str]) -> list[tuple[int, int, int, int, int]]:
    """The line diff as ``(tag, i0, i1, j0, j1)``: 0 equal, 1 lines of the same names, 2 the rest.

    A changed line stands beside the line that defines the same node, not beside the one that happens to be as
    far from the start of the change.
    """
    found: list[tuple[int, int, int, int, int]] = []
    for tag, i0, i1, j0, j1 in opcodes(before, after):
        if tag != "replace":
            found.append((_EQUAL if tag == "equal" else _REPLACED, i0, i1, j0, j1))
            continue
        names = [[line.split(" ", 1)[0] for line in lines] for lines in (before[i0:i1], after[j0:j1])]
        for inner, a0, a1, b0, b1 in opcodes(*names):
            found.append((_RENAMED if inner == "equal" else _REPLACED, i0 + a0, i0 + a1, j0 + b0, j0 + b1))
    return found


def downsample(points: Sequence[MemoryPoint], most: int = MAX_POINTS) -> list[MemoryPoint]:
    """At most ``most`` points: of each interval its first, lowest, highest and last (M4: Jugel et al. 2014).

    The first point with the highest total of all is always among them.
    """
    if len(points) <= most:
        return list(points)
    intervals = max(1, most // 4)
    totals = [p.total for p in points]
    keep: set[int] = set()
    for n in range(intervals):
        indices = range(n * len(points) // intervals, (n + 1) * len(points) // intervals)
        lowest, highest = min(indices, key=totals.__getitem__), max(indices, key=totals.__getitem__)
        keep.update((indices[0], lowest, highest, indices[-1]))
    return [points[i] for i in sorted(keep)]
