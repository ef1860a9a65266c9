"""A pipeline in the report: from what the planner and the ranks know to a record, and from a record to text.

The record is plain data, which :mod:`dspass.report.records` needs no torch for; here it becomes a picture of what each rank
does when (:mod:`dspass.timeline`).

Dropped: a record of the picture's lines. What is saved would be as wide as one terminal was, and nothing could be compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from textwrap import wrap

from dspass.pipeline_times import Measured
from dspass.report.records import (
    PipelineKind,
    PipelineMessage,
    PipelineRecord,
    PipelineSpan,
    PipelineTimeline,
)
from dspass.report.words import format_bytes, format_seconds
from dspass.runtime.schedule import Action, Direction, Kind, Schedule, Send, Span, Timeline
from dspass.staging import Staging
from dspass.timeline import timeline_text

_NAMES: dict[Kind, PipelineKind] = {
    Kind.FORWARD: "forward",
    Kind.BACKWARD: "backward",
    Kind.INPUT: "backward of inputs",
    Kind.WEIGHT: "backward of weights",
}
_KINDS = {name: kind for kind, name in _NAMES.items()}

#: In text: ranks of a picture, cuts, schedules beside the chosen one.
_RANKS, _CUTS, _OTHERS = 8, 4, 3

#: Columns that stand beside a row of the picture: its rank, and what its note says.
_BESIDE = 44


def record_of(
    staging: Staging,
    rank: int,
    predicted: Timeline,
    measured: Measured | None,
    sends: str | None,
    more: Sequence[str] = (),
) -> PipelineRecord:
    """What is known of a pipeline, on its ``rank``. ``predicted`` is of a schedule of ``staging``'s own stages, ``sends`` the
    format of its messages, and ``more`` says how its stages run."""
    return PipelineRecord(
        schedule=staging.schedule.name,
        rank_of=list(staging.schedule.rank_of),
        rank=rank,
        why=[*staging.why[:1], *more, *staging.why[1:]],
        candidates=staging.table.splitlines(),
        predicted=_times(predicted, sent_bytes=staging.sent_bytes(predicted.schedule)),
        measured=None if measured is None else _times(measured.timeline, measured.wait_seconds, measured.sent_bytes),
        messages=[] if sends is None else list(_messages(staging, predicted.schedule, measured, sends)),
    )


def _messages(
    staging: Staging, schedule: Schedule, measured: Measured | None, format: str
) -> Iterator[PipelineMessage]:
    steps = (step for rank in range(schedule.ranks) for step in schedule.steps(rank) if isinstance(step, Send))
    for cut, direction in sorted({(min(s.source, s.destination), s.direction) for s in steps}, key=_there_and_back):
        link = staging.links[cut]
        yield PipelineMessage(
            cut=cut,
            direction="forward" if direction is Direction.FORWARD else "backward",
            format=format if link.sent(direction) < link.whole(direction) else None,
            whole_bytes=link.whole(direction),
            sent_bytes=link.sent(direction),
            relative_error=measured.errors.get((cut, direction)) if measured is not None else None,
        )


def _there_and_back(place: tuple[int, Direction]) -> tuple[int, bool]:
    return place[0], place[1] is Direction.BACKWARD


def notes_of_messages(record: PipelineRecord, limit: float | None) -> list[str]:
    """A sentence on messages that are off by more than ``limit``, which is known only once they have been sent."""
    errors = [(m.relative_error, f"cut {m.cut} {m.direction}") for m in record.messages if m.relative_error is not None]
    wrong = [(error, name) for error, name in errors if limit is not None and error > limit]
    if not wrong:
        return []
    return [
        f"Messages over {', '.join(name for _, name in wrong)} are off by up to {max(wrong)[0]:.2g} in few bits, beyond "
        f"dspass.quantise.max_relative_error ({limit:g}): take a finer dspass.quantise.sends, or a smaller block."
    ]


def _times(timeline: Timeline, wait_seconds: Sequence[float] = (), sent_bytes: Sequence[int] = ()) -> PipelineTimeline:
    begin = timeline.begin
    return PipelineTimeline(
        micro_batches=timeline.schedule.micro_batches,
        spans=[
            [
                PipelineSpan(
                    kind=_NAMES[span.action.kind],
                    stage=span.action.stage,
                    micro_batch=span.action.micro_batch,
                    start=span.start - begin,
                    end=span.end - begin,
                )
                for span in row
            ]
            for row in timeline.spans
        ],
        peak_bytes=list(timeline.peak_bytes),
        wait_seconds=list(wait_seconds),
        sent_bytes=list(sent_bytes),
    )


def timelines_of(record: PipelineRecord) -> dict[str, Timeline]:
    """What :mod:`dspass.timeline` draws, as far as it lasts any time; of ranks that compute something."""
    found = {}
    for name, one in record.timelines.items():
        spans = tuple(
            tuple(Span(Action(_KINDS[s.kind], s.stage, s.micro_batch), s.start, s.end) for s in row)
            for row in one.spans
        )
        if len(spans) == record.ranks == len(set(record.rank_of)):
            schedule = Schedule(
                _line(record.schedule),
                record.ranks,
                record.stages,
                one.micro_batches,
                tuple(record.rank_of),
                tuple(tuple(span.action for span in row) for row in spans),
            )
            peaks = tuple(one.peak_bytes) if len(one.peak_bytes) == record.ranks else ()
            timeline = Timeline(schedule, spans, peaks)
            if timeline.seconds > 0:
                found[name] = timeline
    return found


def lines(record: PipelineRecord, width: int) -> Iterator[str]:
    """The record as text of ``width`` columns, some thirty lines at most."""
    yield f"Pipeline: {heading(record)}"
    for why in record.why[:_CUTS]:
        yield from _wrapped(_line(why), width)
    if len(record.why) > _CUTS:
        yield f"  and {len(record.why) - _CUTS} more cuts in .pipeline.why"
    drawn = timelines_of(record)
    if drawn:
        *picture, legend = timeline_text(drawn, width - _BESIDE, _RANKS).plain.splitlines()
        yield from (f"  {line}" for line in picture)
        yield from _wrapped(legend, width)
    for name, timeline in record.timelines.items():
        if said := beside(timeline):
            yield f"  {name}: {said}"
    if record.messages:
        yield from _wrapped(travel(record.messages), width)
    for line in record.candidates[: 2 + _OTHERS]:
        yield f"  {_line(line, keep_spaces=True)}"
    if len(record.candidates) > 2 + _OTHERS:
        yield f"  and {len(record.candidates) - 2 - _OTHERS} more in .pipeline.candidates"


def _wrapped(text: str, width: int) -> list[str]:
    return wrap(text, width, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)


def heading(record: PipelineRecord) -> str:
    """``1f1b, 4 stages on 4 ranks``."""
    stages, ranks = ("" if n == 1 else "s" for n in (record.stages, record.ranks))
    return f"{_line(record.schedule)}, {record.stages} stage{stages} on {record.ranks} rank{ranks}"


def beside(timeline: PipelineTimeline) -> str:
    """What a timeline knows that its picture does not show; empty where it is nothing."""
    parts = []
    if timeline.wait_seconds:
        longest = max(timeline.wait_seconds)
        parts.append(
            f"rank {timeline.wait_seconds.index(longest)} waits longest for messages, {format_seconds(longest)}"
        )
    if timeline.sent_bytes:
        parts.append(f"ranks send {format_bytes(sum(timeline.sent_bytes))} to neighbours in a call")
    return "; ".join(parts)


def travel(messages: Sequence[PipelineMessage]) -> str:
    """How messages travel: ``messages travel as int8: 1.05 MB → 279 kB a micro-batch over all cuts, ...``."""
    whole, sent = sum(m.whole_bytes for m in messages), sum(m.sent_bytes for m in messages)
    format = next((m.format for m in messages if m.format is not None), None)
    if format is None:
        return "messages travel whole: in few bits they are no smaller"
    size = f"{format_bytes(whole)} → {format_bytes(sent)} a micro-batch over all cuts"
    errors = [(m.relative_error, m) for m in messages if m.relative_error is not None]
    if not errors:
        return f"messages travel as {_line(format)}: {size}; errors not measured"
    error, most = max(errors, key=lambda one: one[0])
    return (
        f"messages travel as {_line(format)}: {size}; the first were off by {100 * error:.2g} % at most (cut {most.cut}, "
        f"{most.direction})"
    )


def changes(old: PipelineRecord | None, new: PipelineRecord | None) -> Iterator[str]:
    """What differs, as text."""
    if old is None or new is None:
        if old is not None:
            yield f"- {heading(old)}"
        if new is not None:
            yield f"+ {heading(new)}"
        return
    if heading(old) != heading(new) or old.rank_of != new.rank_of:
        yield f"{heading(old)} → {heading(new)}"
    if old.why != new.why:
        yield f"cuts: {'; '.join(map(_line, old.why)) or 'none'} → {'; '.join(map(_line, new.why)) or 'none'}"
    for name in ("predicted", "measured"):
        was, now = old.timelines.get(name), new.timelines.get(name)
        if was != now:
            yield f"{name}: {_figures(was)} → {_figures(now)}"
    if old.messages != new.messages:
        yield f"{_travelling(old.messages)} → {_travelling(new.messages)}"
    if old.candidates != new.candidates:
        yield "other schedules were compared, or with other results"
    if old.rank != new.rank:
        yield f"rank of the pipeline: {old.rank} → {new.rank}"


def _travelling(messages: Sequence[PipelineMessage]) -> str:
    return travel(messages) if messages else "messages travel whole"


def _figures(timeline: PipelineTimeline | None) -> str:
    if timeline is None:
        return "nothing"
    parts = [f"{timeline.micro_batches} micro-batches", format_seconds(timeline.seconds)]
    parts.append(f"bubble {100 * timeline.bubble:.1f} %")
    if timeline.peak_bytes:
        parts.append(f"peak {format_bytes(max(timeline.peak_bytes))}")
    if timeline.wait_seconds:
        parts.append(f"waits {format_seconds(max(timeline.wait_seconds))}")
    if timeline.sent_bytes:
        parts.append(f"sends {format_bytes(sum(timeline.sent_bytes))}")
    return ", ".join(parts)


def _line(text: str, keep_spaces: bool = False) -> str:
    """One line without control characters."""
    shown = "".join(c if c.isprintable() else " " for c in text)
    return shown if keep_spaces else " ".join(shown.split())


__all__ = ["beside", "changes", "heading", "lines", "notes_of_messages", "record_of", "timelines_of", "travel"]
