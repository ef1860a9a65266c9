"""The report as the lines that ``print(report)`` shows: at most :data:`WIDTH` wide, and few of each kind.

Labels come from models, and a terminal obeys escape codes: every text is made one line without control characters.
"""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from dspass.report.records import ExpertLayer, HostCopy, PassRecord, PlanRecord, QuantisedTensor, RoundedLayer, Traffic
from dspass.report.words import counted, format_bytes, format_seconds, one_line

if TYPE_CHECKING:
    from dspass.report.report import Report

WIDTH = 100
_PASS_ROWS, _TRAFFIC_ROWS, _NOTE_ROWS = 12, 5, 3
_PLAN_CLASSES, _PLAN_REASONS, _PLAN_TENSORS, _PLAN_POINTS = 6, 3, 4, 8


def report_text(report: Report) -> str:
    """All lines; those that are too wide end in an ellipsis."""
    return "\n".join(_clip(line) for line in _lines(report))


def _lines(report: Report) -> Iterator[str]:
    ranks = f"{report.world_size} rank" + ("" if report.world_size == 1 else "s")
    yield f"dspass report, {report.kind}: {one_line(report.model)} on {ranks}, {one_line(report.device)}"
    if report.versions:
        yield "  " + ", ".join(f"{one_line(k)} {one_line(v)}" for k, v in report.versions.items())
    yield ""
    yield from _pass_lines(report)
    yield ""
    yield from _memory_lines(report)
    yield ""
    yield from _traffic_lines(report)
    yield ""
    if report.host_copies:
        yield from _host_lines(report)
        yield ""
    if report.quantised:
        yield from _quantised_lines(report)
        yield ""
    if report.rounded:
        yield from _rounded_lines(report)
    if report.experts:
        yield from _expert_lines(report.experts)
        yield ""
    for plan in report.plans:
        yield from _plan_lines(plan)
        yield ""
    if report.pipeline is not None:
        from dspass.report.pipeline import lines

        yield from lines(report.pipeline, WIDTH)
        yield ""
    step = report.step_seconds
    yield f"Step time: {report.missing if step is None else format_seconds(step)}"
    notes = [*report.notes, *(f"ignored {key}: {reason}" for key, reason in report.ignored.items())]
    for note in notes[:_NOTE_ROWS]:
        yield from _wrapped(f"- {note}", "  ")
    if len(notes) > _NOTE_ROWS:
        yield f"  - and {len(notes) - _NOTE_ROWS} more in .notes and .ignored"


def _pass_lines(report: Report) -> Iterator[str]:
    passes = report.passes
    if not passes:
        yield "Passes: none ran"
        return
    changed = sum(p.changed for p in passes)
    seconds = format_seconds(sum(p.seconds for p in passes))
    star = "" if all(p.keeps_numbers for p in passes) else " (* changes numbers)"
    yield f"Passes: {len(passes)} runs, {changed} changed a graph, {seconds} in all{star}"
    shown = passes
    if len(passes) > _PASS_ROWS:
        shown = [p for p in passes if p.changed]
    several = len({p.graph for p in passes}) > 1
    rows = []
    for p in shown[:_PASS_ROWS]:
        name = one_line(p.name) + ("" if p.keeps_numbers else "*")
        where = f"{one_line(p.graph)} {p.stage}" if several else p.stage
        rows.append((name, where, ops_text(p), format_seconds(p.seconds), one_line(p.summary)))
    yield from _table(rows, "<<>><")
    if len(shown) > _PASS_ROWS:
        yield f"  and {len(shown) - _PASS_ROWS} more that changed a graph"
    if len(shown) < len(passes):
        idle = dict.fromkeys(f"{one_line(p.name)} ({p.stage})" for p in passes if not p.changed)
        if idle:
            yield f"  nothing to do for {', '.join(idle)}"


def ops_text(record: PassRecord) -> str:
    """``9 → 12 ops``: the graph's size before and after the pass."""
    before, after = record.ops_before, record.ops_after
    return f"{after} ops" if before == after else f"{before} → {after} ops"


def _memory_lines(report: Report) -> Iterator[str]:
    memory = report.memory
    first = memory.first_call_peak_bytes
    first_call = f" (first call {report.missing if first is None else format_bytes(first)})"
    peak = memory.peak
    if peak is None:
        yield f"Peak memory of one rank: {report.missing}{'' if first is None else first_call}"
        return
    at = f"in {peak.phase}, at {one_line(peak.label)}"
    yield f"Peak memory of one rank: {format_bytes(peak.total)}{first_call}, {at}"
    largest = max(*peak.bytes.values(), 1)
    for category, count in peak.bytes.items():
        if count:
            bar = "█" * max(1, round(44 * count / largest))
            yield f"  {category:<11} {format_bytes(count):>10} {100 * count / peak.total:4.0f} %  {bar}"
    if (unplanned := memory.unplanned_peak) is not None:
        budget = f"; the budget is {format_bytes(report.plans[0].budget_bytes)}" if report.plans else ""
        at = f"in {unplanned.phase}, at {one_line(unplanned.label)}"
        yield f"  without the plan the peak would be {format_bytes(unplanned.total)}, {at}{budget}"


def _traffic_lines(report: Report) -> Iterator[str]:
    if not report.traffic:
        yield "Traffic of one step: none"
        return
    calls, sent = sum(t.calls for t in report.traffic), format_bytes(report.traffic_bytes)
    yield f"Traffic of one step: one rank sends {sent} in {counted(calls, 'call')}"
    rows = []
    for t in sorted(report.traffic, key=lambda t: -t.bytes)[:_TRAFFIC_ROWS]:
        group, sent = f"{one_line(t.group)}, {counted(t.group_size, 'rank')}", format_bytes(t.bytes)
        exposed = f"exposed {exposed_text(t)}"
        rows.append((t.kind, t.direction, group, counted(t.calls, "call"), sent, exposed))
    yield from _table(rows, "<<<>><")
    if len(report.traffic) > _TRAFFIC_ROWS:
        yield f"  and {len(report.traffic) - _TRAFFIC_ROWS} more in .traffic"


def _host_lines(report: Report) -> Iterator[str]:
    yield f"Copies to and from the host in one step: {format_bytes(sum(c.bytes for c in report.host_copies))}"
    copies = report.host_copies[:_TRAFFIC_ROWS]
    yield from _table(
        [(c.kind, c.direction, format_bytes(c.bytes), f"exposed {exposed_text(c)}") for c in copies], "<<><"
    )


def _quantised_lines(report: Report) -> Iterator[str]:
    sizes = [sum(t.whole_bytes for t in report.quantised), sum(t.sent_bytes for t in report.quantised)]
    yield f"In few bits, on one rank: {format_bytes(sizes[1])} instead of {format_bytes(sizes[0])}"
    yield from _table(quantised_rows(report)[:_TRAFFIC_ROWS], "<<<><<")


def quantised_rows(report: Report) -> list[tuple[str, ...]]:
    """A row for each way that tensors of one kind and direction travel: what, which way, as what, how many, from and to how
    many bytes, and the median and the largest error."""
    groups: dict[tuple[str, str, str | None], list[QuantisedTensor]] = {}
    for one in report.quantised:
        groups.setdefault((one.kind, one.direction, one.format), []).append(one)
    rows: list[tuple[str, ...]] = []
    for (kind, direction, kept), some in groups.items():
        whole, sent = sum(t.whole_bytes for t in some), sum(t.sent_bytes for t in some)
        size = format_bytes(whole) + (f" → {format_bytes(sent)}" if kept else "")
        rows.append((kind, direction, one_line(kept or "whole"), counted(len(some), "tensor"), size, _errors(some)))
    return rows


def _errors(some: Sequence[QuantisedTensor]) -> str:
    known = [t.relative_error for t in some if t.relative_error is not None]
    if not known:
        return "error not measured" if some[0].format else ""
    return f"error {100 * statistics.median(known):.2g} %, {100 * max(known):.2g} % at most"


def _rounded_lines(report: Report) -> Iterator[str]:
    yield f"Rounded while it trains: {counted(len(report.rounded), 'value')}"
    rows = rounded_rows(report)
    yield from _table(rows[:_TRAFFIC_ROWS], "<<<<")
    if len(rows) > _TRAFFIC_ROWS:
        yield f"  and {len(rows) - _TRAFFIC_ROWS} more in .rounded"


def rounded_rows(report: Report) -> list[tuple[str, ...]]:
    """A row for all that is rounded alike: what, its bits now and in the end, how many, and the first's name."""
    groups: dict[tuple[str, str], list[RoundedLayer]] = {}
    for one in report.rounded:
        groups.setdefault((one.kind, bits_text(one)), []).append(one)
    return [
        (kind, bits, f"{len(some)} of them", one_line(some[0].name) + (" and on" if len(some) > 1 else ""))
        for (kind, bits), some in groups.items()
    ]


def bits_text(one: RoundedLayer) -> str:
    """``8 bits now, 4 in the end``; whole ones say when it begins."""
    if one.bits is None:
        falls = f" to {one.target_bits}" if one.target_bits != one.start_bits else ""
        return f"whole until step {one.begins}, then {one.start_bits}{falls} bits"
    return f"{one.bits} bits now" + (f", {one.target_bits} in the end" if one.bits != one.target_bits else "")


def _expert_lines(layers: Sequence[ExpertLayer]) -> Iterator[str]:
    """The layers whose ranks are least even, with a bar for each expert, or for several neighbours where there are many."""
    dropped = sum(layer.dropped for layer in layers)
    said = f"; this rank dropped {counted(dropped, 'row')}" if dropped else ""
    yield f"Experts of {counted(len(layers), 'layer')} in one step, busiest over mean, rows by expert{said}"
    rows = []
    for layer in sorted(layers, key=lambda one: -one.rank_imbalance)[:_TRAFFIC_ROWS]:
        on = f"{len(layer.rows)} on {counted(layer.ranks, 'rank')}"
        uneven = f"rank {layer.rank_imbalance:.2f}", f"expert {layer.expert_imbalance:.2f}"
        rows.append((_end_of(one_line(layer.name)), on, *uneven, _bars(layer.rows)))
    yield from _table(rows, "<<<<<")
    if len(layers) > _TRAFFIC_ROWS:
        yield f"  and {len(layers) - _TRAFFIC_ROWS} more in .experts"


def _end_of(name: str, most: int = 28) -> str:
    """Names of modules differ at their ends, and in the numbers before."""
    return name if len(name) <= most else f"…{name[1 - most :]}"


def _bars(counts: Sequence[int], most: int = 24) -> str:
    """A character for each, or for as many neighbours as leave ``most``, as high as its share of the largest."""
    several = -(-len(counts) // most) or 1
    sums = [sum(counts[i : i + several]) for i in range(0, len(counts), several)]
    return "".join("▁▂▃▄▅▆▇█"[round(7 * count / max(*sums, 1))] for count in sums)


def exposed_text(moved: Traffic | HostCopy) -> str:
    """``-`` where it was not measured."""
    return "-" if moved.exposed_seconds is None else format_seconds(moved.exposed_seconds)


def _plan_lines(plan: PlanRecord) -> Iterator[str]:
    """The plan as text, at most some thirty lines."""
    yield from _wrapped(f"Plan of {plan.graph} for {format_bytes(plan.budget_bytes)}: {plan.summary}", "")
    yield f"  {plan.next_step}"
    rows = [("", "peak", "step", "saved")]
    for i in _some(len(plan.frontier), _PLAN_POINTS, plan.here):
        point = plan.frontier[i]
        mark = "→" if i == plan.here else ""
        about = "" if point.is_measured else "about "
        rows.append(
            (
                mark,
                about + format_bytes(point.peak_bytes),
                format_seconds(point.seconds),
                format_bytes(point.saved_bytes),
            )
        )
    yield from _plan_table(rows)
    classes: list[tuple[str, ...]] = [("", "kept", "held otherwise", "dropped", "again in")]
    for one in plan.classes[:_PLAN_CLASSES]:
        held = f"{format_bytes(one.held_bytes)} {one.held_by}" if one.held_bytes else "-"
        name = f"{one.name} ({one.count})"
        classes.append((name, format_bytes(one.kept_bytes), held, format_bytes(one.dropped_bytes), one.again))
    yield from _plan_table(classes)
    for one in (*plan.classes[:_PLAN_REASONS], *plan.largest[:_PLAN_TENSORS]):
        yield from _wrapped(f"{one.name}: {one.reason}", "  ")


def _some(count: int, most: int, always: int) -> list[int]:
    """At most ``most`` of ``count`` indices, the ends and ``always`` among them."""
    if count <= most:
        return list(range(count))
    return sorted({*(round(i * (count - 1) / (most - 2)) for i in range(most - 1)), always})


def _plan_table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for first, *others in rows:
        yield (
            "  " + first.ljust(widths[0]) + "".join("  " + c.rjust(w) for c, w in zip(others, widths[1:], strict=True))
        ).rstrip()


def _table(rows: Sequence[tuple[str, ...]], align: str) -> Iterator[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(align))] if rows else []
    for row in rows:
        cells = [f"{cell:{a}{min(w, 40)}}" for cell, a, w in zip(row, align, widths, strict=True)]
        yield ("  " + "  ".join(cells)).rstrip()


def _wrapped(text: str, indent: str) -> list[str]:
    """Sentences, which say nothing where they are cut short, in lines of :data:`WIDTH`."""
    return textwrap.wrap(
        one_line(text), WIDTH, initial_indent=indent, subsequent_indent=indent + "  ", break_on_hyphens=False
    )


def _clip(line: str) -> str:
    return line if len(line) <= WIDTH else line[: WIDTH - 1].rstrip() + "…"
