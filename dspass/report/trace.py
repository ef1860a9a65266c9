"""The report as a trace for https://ui.perfetto.dev, which reads the Trace Event Format of Chrome."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dspass.report.records import MemoryPoint

if TYPE_CHECKING:
    from dspass.report.report import Report

_STEP, _COMPILE = 1, 2  # process ids: they only make groups of tracks
_PHASE_TRACK, _NODE_TRACK = 1, 2


def trace_of(report: Report) -> dict[str, Any]:
    """Memory by category, the nodes, the phases and the passes, as JSON values."""
    return {"displayTimeUnit": "ms", "otherData": _header(report), "traceEvents": list(_events(report))}


def _header(report: Report) -> dict[str, Any]:
    unit = "one microsecond is one event" if report.memory.time_unit == "events" else "seconds of the step"
    return {
        "model": report.model,
        "kind": report.kind,
        "world_size": report.world_size,
        "device": report.device,
        "timeline": unit,
    }


def _events(report: Report) -> Iterator[dict[str, Any]]:
    yield _name("process_name", _STEP, 0, f"one step, {report.kind}")
    yield _name("process_name", _COMPILE, 0, "passes at compile time")
    yield _name("thread_name", _STEP, _PHASE_TRACK, "phases")
    yield _name("thread_name", _STEP, _NODE_TRACK, "nodes")
    scale = 1.0 if report.memory.time_unit == "events" else 1e6
    points = report.memory.timeline
    times = [p.t * scale for p in points]
    for point, at in zip(points, times, strict=True):
        yield {"name": "memory", "ph": "C", "pid": _STEP, "tid": 0, "ts": at, "args": dict(point.bytes)}
    for start, stop in phase_runs(points):
        end = times[stop] if stop < len(points) else times[-1]
        yield _span_event(points[start].phase, _STEP, _PHASE_TRACK, times[start], end, {})
    for i, point in enumerate(points):
        # A point tells what is live after its node ran: the node stands before it.
        begin = times[i - 1] if i else times[0]
        args: dict[str, Any] = {"phase": point.phase, "bytes": point.total}
        yield _span_event(point.label, _STEP, _NODE_TRACK, begin, times[i], args)
    tracks: dict[tuple[str, str], int] = {}
    clock = 0.0
    for p in report.passes:
        key = (p.graph, p.stage)
        if key not in tracks:
            tracks[key] = len(tracks) + 1
            yield _name("thread_name", _COMPILE, tracks[key], f"{p.graph} {p.stage}")
        end = clock + p.seconds * 1e6
        args = {
            "summary": p.summary,
            "changed": p.changed,
            "ops_before": p.ops_before,
            "ops_after": p.ops_after,
        }
        yield _span_event(p.name, _COMPILE, tracks[key], clock, end, args)
        clock = end


def _name(kind: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": pid, "tid": tid, "ts": 0, "args": {"name": name}}


def _span_event(name: str, pid: int, tid: int, start: float, end: float, args: dict[str, Any]) -> dict[str, Any]:
    duration = max(0.0, end - start)
    return {"name": name, "ph": "X", "pid": pid, "tid": tid, "ts": start, "dur": duration, "args": args}


def phase_runs(points: Sequence[MemoryPoint]) -> Iterator[tuple[int, int]]:
    """First and one past the last index of each run of points in one phase."""
    start = 0
    for i in range(1, len(points) + 1):
        if i == len(points) or points[i].phase != points[start].phase:
            yield start, i
            start = i
