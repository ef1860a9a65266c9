"""A pipeline as a section of the report's page: the picture of what each rank does when, ranks and schedules as tables.

Drawn here and not by the page's script, so that it can be read without JavaScript.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from dspass.report.pipeline import heading, timelines_of
from dspass.report.records import PipelineMessage, PipelineRecord, PipelineTimeline
from dspass.report.words import format_bytes, format_seconds
from dspass.timeline import timeline_svg

#: Actions that a picture holds: a browser draws so many at once. With more, some of the ranks are shown.
_DRAWN = 12_000


def pipeline_html(record: PipelineRecord | None) -> str:
    """The section, or nothing where there is no pipeline."""
    if record is None:
        return ""
    drawn = timelines_of(record)
    busiest = max((len(row) for timeline in drawn.values() for row in timeline.spans), default=0)
    most = max(_DRAWN // max(busiest * len(drawn), 1), 2)
    cut = f", {most} of {record.ranks} ranks" if drawn and most < record.ranks else ""
    picture = f'<div class="chart">{_inline(timeline_svg(drawn, most))}</div>' if drawn else ""
    why = "".join(f"<li>{escape(one)}</li>" for one in record.why)
    return f"""
  <section class="card" aria-labelledby="pipeline-title">
    <div class="card-head">
      <h2 id="pipeline-title">Pipeline</h2>
      <p class="muted">{escape(heading(record))}: one call that trains{cut}</p>
    </div>
    {picture}
    {_ranks(record)}
    {f'<h3 class="sub">Where it is cut</h3><ul class="notes">{why}</ul>' if why else ""}
    {_messages(record.messages)}
    {_candidates(record.candidates)}
  </section>
"""


_NUMBER = ' class="number"'


def _inline(svg: str) -> str:
    """A picture inside of a page needs no name space, and the page no address, not even one that nobody asks for."""
    return svg.replace(' xmlns="http://www.w3.org/2000/svg"', "")


def _ranks(record: PipelineRecord) -> str:
    """A row a rank: its stages, and what each timeline says of it."""
    head, columns = ["Rank", "Stages"], []
    for name, timeline in record.timelines.items():
        for title, cells in _columns(timeline):
            head.append(f"{title}, {name}")
            columns.append(cells)
    if not columns:
        return ""
    rows = []
    for rank in range(record.ranks):
        stages = ", ".join(str(stage) for stage, at in enumerate(record.rank_of) if at == rank)
        mark = " (here)" if rank == record.rank else ""
        rows.append((f"{rank}{mark}", stages, *(cells[rank] if rank < len(cells) else "-" for cells in columns)))
    return _table(head, rows, range(2, len(head)))


def _columns(timeline: PipelineTimeline) -> list[tuple[str, list[str]]]:
    found: list[tuple[str, Sequence[Any], Any]] = [
        ("Bubble", timeline.bubbles, lambda share: f"{100 * share:.1f} %"),
        ("Peak", timeline.peak_bytes, format_bytes),
        ("Waits for messages", timeline.wait_seconds, format_seconds),
        ("Sends to neighbours", timeline.sent_bytes, format_bytes),
    ]
    return [(title, [show(value) for value in values]) for title, values, show in found if values]


def _messages(messages: Sequence[PipelineMessage]) -> str:
    """A row for each way over each cut."""
    if not messages:
        return ""
    rows = [
        (
            str(m.cut),
            m.direction,
            m.format or "whole",
            format_bytes(m.whole_bytes),
            format_bytes(m.sent_bytes),
            "-" if m.relative_error is None else f"{100 * m.relative_error:.2g} %",
        )
        for m in messages
    ]
    head = ("Cut", "Direction", "Travels as", "Whole", "Sent", "Error of the first")
    return f'<h3 class="sub">Messages of a micro-batch</h3>{_table(head, rows, range(3, 6))}'


def _candidates(table: Sequence[str]) -> str:
    """The schedules that were compared, as they stand in the record."""
    if not table:
        return ""
    return (
        f'<h3 class="sub">Schedules that were compared</h3><div class="table-box"><pre class="small">'
        f"{escape(chr(10).join(table))}</pre></div>"
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: range) -> str:
    def kind(column: int) -> str:
        return _NUMBER if column in numbers else ""

    header = "".join(f'<th scope="col"{kind(i)}>{escape(cell)}</th>' for i, cell in enumerate(head))
    body = "".join(
        "<tr>" + "".join(f"<td{kind(i)}>{escape(cell)}</td>" for i, cell in enumerate(row)) + "</tr>" for row in rows
    )
    return f'<div class="table-box"><table class="figures"><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>'


__all__ = ["pipeline_html"]
