"""Pictures of a pipeline's schedule in time: ranks downwards, time to the right, for a terminal and for a page.

Several timelines, such as a predicted and a measured one, stand below one another on one scale. The terminal's picture is text
that says all without colour, and carries colours for where they can be shown. The page's is an SVG that brings its own style,
so that it stands in the report as well as in a file of its own, and needs no script.

Dropped: one text picture a kind of terminal. A rich ``Text`` is both: its ``plain`` is what a log gets.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape

from rich.console import Console
from rich.text import Text

from dspass.report import format_bytes, format_seconds
from dspass.runtime.schedule import Kind, Span, Timeline

_IDLE = "."

_NAMES = {
    Kind.FORWARD: "forward",
    Kind.BACKWARD: "backward",
    Kind.INPUT: "backward of inputs",
    Kind.WEIGHT: "backward of weights",
}

_STYLES = {Kind.FORWARD: "blue", Kind.BACKWARD: "yellow", Kind.INPUT: "magenta", Kind.WEIGHT: "green"}

#: Of a rank's first stage and of its others. White text on each has a contrast of 4.5 or more.
_COLOURS = {
    Kind.FORWARD: ("#3f6fb0", "#27487a"),
    Kind.BACKWARD: ("#a85f13", "#74400a"),
    Kind.INPUT: ("#a0487f", "#6d2c55"),
    Kind.WEIGHT: ("#2b7d4a", "#1a5430"),
}


def timeline_text(timelines: Mapping[str, Timeline], width: int = 100, most: int | None = None) -> Text:
    """Timelines by what they are, such as "predicted", as text of ``width`` columns for their rows.

    Each action is its letter, and its micro-batch where that fits; letters are small for all stages of a rank but the first.
    ``.plain`` is for a log, :func:`show_timelines` for a terminal. Of more ranks than ``most`` so many are shown, the first and
    the last among them. ``ValueError``: there is nothing to show.
    """
    scale = _longest(timelines)
    text = Text(no_wrap=True)
    for i, (name, timeline) in enumerate(timelines.items()):
        text.append(("\n" if i else "") + f"{name}: {_head(timeline)}\n")
        ranks = _ranks(timeline, most)
        labels = [f"rank {rank} " for rank in ranks]
        notes = [_note(timeline, rank) for rank in ranks]
        for rank, label, note in zip(ranks, labels, notes, strict=True):
            text.append(label.ljust(max(map(len, labels))) + "|")
            for shown, style in _cells(timeline, rank, width, scale):
                text.append(shown, style)
            text.append(f"|  {note}\n")
    text.append(_legend(timelines.values()))
    return text


def show_timelines(timelines: Mapping[str, Timeline], console: Console | None = None) -> None:
    """Print them as wide as the terminal is; elsewhere than on a terminal, without colours."""
    console = console or Console()
    beside = max(
        (
            len(f"rank {rank} ||  {_note(timeline, rank)}")
            for timeline in timelines.values()
            for rank in _ranks(timeline)
        ),
        default=0,
    )
    console.print(timeline_text(timelines, max(console.width - beside, 20)), crop=False, soft_wrap=True)


def _ranks(timeline: Timeline, most: int | None = None) -> Sequence[int]:
    """All of them, or ``most`` (two or more) at even distances."""
    count = len(timeline.spans)
    if most is None or count <= most:
        return range(count)
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def _cells(timeline: Timeline, rank: int, width: int, scale: float) -> Iterator[tuple[str, str]]:
    """Pieces of a row and their styles. A column shows what runs in its middle."""
    first = timeline.schedule.stages_of(rank)[0]
    spans = timeline.spans[rank]
    shown: list[int | None] = []  # the span of each column
    at = 0
    for column in range(width):
        moment = timeline.begin + (column + 0.5) * scale / width
        while at < len(spans) and spans[at].end <= moment:
            at += 1
        shown.append(at if at < len(spans) and spans[at].start <= moment else None)
    column = 0
    while column < width:
        which = shown[column]
        end = next((c for c in range(column + 1, width) if shown[c] != which), width)
        if which is None:
            yield _IDLE * (end - column), "dim"
        else:
            action = spans[which].action
            letter = action.kind.value if action.stage == first else action.kind.value.lower()
            label = f"{letter}{action.micro_batch}"
            fits = len(label) <= end - column
            style = ("" if action.stage == first else "bold ") + _STYLES[action.kind]
            yield (label if fits else letter).ljust(end - column, "-"), style
        column = end


def timeline_html(timelines: Mapping[str, Timeline], title: str = "Pipeline") -> str:
    """A section of the report's page with the picture. Needs no JavaScript. ``ValueError``: there is nothing to show."""
    ways = "; ".join(f"{name}: {_head(timeline)}" for name, timeline in timelines.items())
    return f"""
  <section class="card" aria-label="{escape(title)}">
    <div class="card-head">
      <h2>{escape(title)}</h2>
      <p class="muted">{escape(ways)}</p>
    </div>
    <div class="chart">{timeline_svg(timelines)}</div>
  </section>
"""


_WIDTH, _LEFT, _RIGHT, _ROW, _GAP, _HEAD, _LEGEND = 1000, 58, 176, 24, 4, 26, 26

#: A page may have colours of its own by these names; alone, the picture is dark on light.
_STYLE = (
    "svg.dspass-timeline{display:block;width:100%;height:auto;font:11px system-ui,sans-serif}"
    ".dspass-timeline text{fill:var(--text,#1a1e24);font-size:11px}"
    ".dspass-timeline .note{fill:var(--muted,#59636f)}"
    ".dspass-timeline .name{font-weight:600}"
    ".dspass-timeline .idle{fill:var(--raised,#f0f2f5)}"
    ".dspass-timeline .batch{fill:#fff;font-size:10px;text-anchor:middle;pointer-events:none}"
) + "".join(
    f".dspass-timeline .{kind.name.lower()}{'-later' if later else ''}{{fill:{colours[later]}}}"
    for kind, colours in _COLOURS.items()
    for later in (0, 1)
)


def timeline_svg(timelines: Mapping[str, Timeline], most: int | None = None) -> str:
    """The picture alone, as an element that is also a file. Each action has its times as a title. ``most`` ranks are shown, as
    in :func:`timeline_text`.

    ``ValueError``: there is nothing to show.
    """
    scale = _longest(timelines)
    parts: list[str] = []
    top = 0
    for name, timeline in timelines.items():
        parts.append(f'<text class="name" x="0" y="{top + 15}">{escape(name)}: {escape(_head(timeline))}</text>')
        top += _HEAD
        for rank in _ranks(timeline, most):
            parts.extend(_row(timeline, rank, top, scale))
            top += _ROW + _GAP
        top += _GAP
    parts.extend(_key(timelines.values(), top))
    height = top + _LEGEND
    label = escape(", ".join(f"{name}: {_head(timeline)}" for name, timeline in timelines.items()))
    return (
        f'<svg class="dspass-timeline" xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{label}" '
        f'viewBox="0 0 {_WIDTH} {height}"><style>{_STYLE}</style>{"".join(parts)}</svg>'
    )


def _row(timeline: Timeline, rank: int, top: int, scale: float) -> Iterator[str]:
    room = _WIDTH - _LEFT - _RIGHT
    middle = top + _ROW / 2 + 4
    yield f'<text x="0" y="{middle:.0f}">rank {rank}</text>'
    lasts = room * timeline.seconds / scale
    yield f'<rect class="idle" x="{_LEFT}" y="{top}" width="{lasts:.2f}" height="{_ROW}"/>'
    first = timeline.schedule.stages_of(rank)[0]
    for span in timeline.spans[rank]:
        x = _LEFT + room * (span.start - timeline.begin) / scale
        width = room * (span.end - span.start) / scale
        later = "" if span.action.stage == first else "-later"
        yield (
            f'<rect class="{span.action.kind.name.lower()}{later}" x="{x:.2f}" y="{top}" '
            f'width="{max(width - 0.6, 0.2):.2f}" height="{_ROW}"><title>{escape(_title(span, timeline))}</title></rect>'
        )
        batch = str(span.action.micro_batch)
        if width > 2 + 5.6 * len(batch):
            yield f'<text class="batch" x="{x + width / 2:.2f}" y="{middle:.0f}">{batch}</text>'
    yield f'<text class="note" x="{_WIDTH - _RIGHT + 8}" y="{middle:.0f}">{escape(_note(timeline, rank))}</text>'


def _title(span: Span, timeline: Timeline) -> str:
    action = span.action
    begin, lasts = format_seconds(span.start - timeline.begin), format_seconds(span.end - span.start)
    return f"{_NAMES[action.kind]} of micro-batch {action.micro_batch}, stage {action.stage}: at {begin}, {lasts}"


def _key(timelines: Iterable[Timeline], top: int) -> Iterator[str]:
    kinds = _kinds(timelines)
    entries = [(kind.name.lower(), _NAMES[kind]) for kind, later in kinds if not later]
    if any(later for _, later in kinds):
        entries.append(("forward-later", "darker on later stages of a rank"))
    x = float(_LEFT)
    for style, name in [*entries, ("idle", "idle")]:
        yield f'<rect class="{style}" x="{x:.0f}" y="{top + 7}" width="11" height="11"/>'
        yield f'<text x="{x + 16:.0f}" y="{top + 16}">{name}</text>'
        x += 34 + 5.6 * len(name)


def _legend(timelines: Iterable[Timeline]) -> str:
    kinds = _kinds(timelines)
    parts = [f"{kind.value} {_NAMES[kind]}" for kind, later in kinds if not later]
    if any(later for _, later in kinds):
        parts.append("small letters for later stages of a rank")
    return ", ".join([*parts, f"{_IDLE} idle"])


def _kinds(timelines: Iterable[Timeline]) -> list[tuple[Kind, bool]]:
    """What is seen: kinds, and whether on a later stage of a rank."""
    seen = {
        (span.action.kind, span.action.stage != timeline.schedule.stages_of(rank)[0])
        for timeline in timelines
        for rank, row in enumerate(timeline.spans)
        for span in row
    }
    return [(kind, later) for later in (False, True) for kind in Kind if (kind, later) in seen]


def _longest(timelines: Mapping[str, Timeline]) -> float:
    """Seconds that the whole width stands for."""
    longest = max((timeline.seconds for timeline in timelines.values()), default=0.0)
    if longest <= 0:
        raise ValueError("there is no timeline that lasts any time: give one that simulate or a run answered.")
    return longest


def _head(timeline: Timeline) -> str:
    schedule = timeline.schedule
    batches = f"{schedule.micro_batches} micro-batch" + ("" if schedule.micro_batches == 1 else "es")
    stages = f"{schedule.stages} stage" + ("" if schedule.stages == 1 else "s")
    ranks = f"{schedule.ranks} rank" + ("" if schedule.ranks == 1 else "s")
    took = f"{format_seconds(timeline.seconds)}, bubble {100 * timeline.bubble:.1f} %"
    return f"{schedule.name}, {stages} on {ranks}, {batches}: {took}"


def _note(timeline: Timeline, rank: int) -> str:
    bubble = f"bubble {100 * timeline.bubble_of(rank):.1f} %"
    return f"{bubble}, peak {format_bytes(timeline.peak_bytes[rank])}" if timeline.peak_bytes else bubble
