"""What differs from one report to another, a line a difference, under the name of the part that it is in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from dspass.report.diff import opcodes, split_lines
from dspass.report.records import CATEGORIES, ExpertLayer, HostCopy, PassRecord
from dspass.report.text import bits_text, exposed_text, ops_text, quantised_rows
from dspass.report.words import counted, format_bytes, format_seconds, one_line

if TYPE_CHECKING:
    from dspass.report.report import Report


def differences(old: Report, new: Report) -> Iterator[str]:
    """The lines, none where nothing differs that they show."""
    for name in ("kind", "model", "device", "world_size"):
        if getattr(old, name) != getattr(new, name):
            yield f"{name}: {one_line(str(getattr(old, name)))} → {one_line(str(getattr(new, name)))}"
    yield from _section("Versions", _changes(old.versions, new.versions))
    yield from _section("Passes", _pass_changes(old, new))
    yield from _section("Graphs", _graph_changes(old, new))
    yield from _section("Memory of one rank", _memory_changes(old, new))
    yield from _section("Traffic of one step", _traffic_changes(old, new))
    copies = ({f"{c.kind} {c.direction}": _copied(c) for c in r.host_copies} for r in (old, new))
    yield from _section("Copies to and from the host", _changes(*copies))
    packed = ({" ".join(row[:3]): ", ".join(row[3:]) for row in quantised_rows(r)} for r in (old, new))
    yield from _section("In few bits", _changes(*packed))
    rounded = ({f"{one.kind} {one_line(one.name)}": bits_text(one) for one in r.rounded} for r in (old, new))
    yield from _section("Rounded while it trains", _changes(*rounded))
    routed = ({e.name: _routed(e) for e in r.experts} for r in (old, new))
    yield from _section("Experts", _changes(*routed))
    if old.step_seconds != new.step_seconds:
        figures = _figures(old.step_seconds, new.step_seconds, format_seconds, old.missing, new.missing)
        yield f"Step time: {figures}"
    if old.pipeline != new.pipeline:
        from dspass.report.pipeline import changes

        yield from _section("Pipeline", changes(old.pipeline, new.pipeline))
    yield from _section("Plans", _changes(*({p.graph: p.summary for p in r.plans} for r in (old, new))))
    yield from _section("Configuration", _changes(flat_config(old.config), flat_config(new.config)))
    yield from _section("Ignored keys", _changes(old.ignored, new.ignored))
    gone, come = Counter(old.notes) - Counter(new.notes), Counter(new.notes) - Counter(old.notes)
    yield from _section("Notes", [f"- {one_line(n)}" for n in gone] + [f"+ {one_line(n)}" for n in come])


def _section(title: str, lines: Iterable[str]) -> Iterator[str]:
    found = [f"  {line}" for line in lines]
    if found:
        yield f"{title}:"
        yield from found


def _changes(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    for key in dict.fromkeys([*old, *new]):
        if key not in new:
            yield f"- {one_line(key)}: {one_line(str(old[key]))}"
        elif key not in old:
            yield f"+ {one_line(key)}: {one_line(str(new[key]))}"
        elif old[key] != new[key]:
            yield f"{one_line(key)}: {one_line(str(old[key]))} → {one_line(str(new[key]))}"


def _numbered(keys: Iterable[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
    """The same key a second time becomes another one."""
    seen: Counter[tuple[Any, ...]] = Counter()
    for key in keys:
        yield (*key, seen[key])
        seen[key] += 1


def _pass_changes(old: Report, new: Report) -> Iterator[str]:
    def keyed(report: Report) -> dict[tuple[Any, ...], PassRecord]:
        keys = _numbered((p.graph, p.stage, p.name) for p in report.passes)
        return dict(zip(keys, report.passes, strict=True))

    a, b = keyed(old), keyed(new)
    for key in dict.fromkeys([*a, *b]):
        name = f"{one_line(key[2])} ({one_line(key[0])} {key[1]})"
        if key not in b or key not in a:
            yield f"{'-' if key in a else '+'} {name}: {one_line((a.get(key) or b[key]).summary)}"
            continue
        was, now = a[key], b[key]
        said = []
        if (was.ops_before, was.ops_after) != (now.ops_before, now.ops_after):
            said.append(f"{ops_text(was)} ⇒ {ops_text(now)}")
        if was.summary != now.summary:
            said.append(f"{one_line(was.summary)} ⇒ {one_line(now.summary)}")
        for name_of in ("changed", "keeps_numbers"):
            if getattr(was, name_of) != getattr(now, name_of):
                said.append(f"{name_of} {getattr(was, name_of)} ⇒ {getattr(now, name_of)}")
        if not said and (was.before, was.after) != (now.before, now.after):
            said.append("another graph")
        if said:
            yield f"{name}: {'; '.join(said)}"
    common = [k for k in a if k in b]
    if common != [k for k in b if k in a]:
        yield "in another order"


def _graph_changes(old: Report, new: Report) -> Iterator[str]:
    a, b = ({g.name: g for g in r.graphs} for r in (old, new))
    for name in dict.fromkeys([*a, *b]):
        if name not in a or name not in b:
            yield f"{'-' if name in a else '+'} {one_line(name)}"
        elif a[name] != b[name]:
            ops = opcodes(split_lines(a[name].after), split_lines(b[name].after))
            gone = sum(i1 - i0 for tag, i0, i1, _, _ in ops if tag != "equal")
            come = sum(j1 - j0 for tag, _, _, j0, j1 in ops if tag != "equal")
            yield f"{one_line(name)}: -{gone} +{come} lines after the passes"


def _memory_changes(old: Report, new: Report) -> Iterator[str]:
    missing = old.missing, new.missing
    a, b = old.memory, new.memory
    old_peak, new_peak = a.peak, b.peak
    was, now = (None if p is None else p.total for p in (old_peak, new_peak))
    if was != now:
        yield f"peak: {_figures(was, now, format_bytes, *missing)}"
    for category in CATEGORIES:
        was, now = (None if p is None else p.bytes[category] for p in (old_peak, new_peak))
        if was != now:
            yield f"{category} at the peak: {_figures(was, now, format_bytes, *missing)}"
    was, now = (None if p is None else p.total for p in (a.unplanned_peak, b.unplanned_peak))
    if was != now:
        yield f"peak without the plan: {_figures(was, now, format_bytes, *missing)}"
    if a.first_call_peak_bytes != b.first_call_peak_bytes:
        was, now = a.first_call_peak_bytes, b.first_call_peak_bytes
        yield f"first call: {_figures(was, now, format_bytes, *missing)}"


def _traffic_changes(old: Report, new: Report) -> Iterator[str]:
    def keyed(report: Report) -> dict[tuple[Any, ...], tuple[int, int, float | None]]:
        totals: dict[tuple[Any, ...], tuple[int, int, float | None]] = {}
        for t in report.traffic:
            key = (t.kind, t.direction, t.group, t.group_size)
            calls, count, exposed = totals.get(key, (0, 0, 0.0))
            exposed = None if exposed is None or t.exposed_seconds is None else exposed + t.exposed_seconds
            totals[key] = (calls + t.calls, count + t.bytes, exposed)
        return totals

    a, b = keyed(old), keyed(new)
    for key in dict.fromkeys([*a, *b]):
        kind, direction, group, size = key
        name = f"{kind} {direction} {one_line(group)}, {counted(size, 'rank')}"
        if key not in a or key not in b:
            calls, count, _ = a.get(key) or b[key]
            yield f"{'-' if key in a else '+'} {name}: {counted(calls, 'call')}, {format_bytes(count)}"
            continue
        was, now = a[key], b[key]
        said = []
        if was[0] != now[0]:
            said.append(f"{was[0]} → {counted(now[0], 'call')}")
        if was[1] != now[1]:
            said.append(_figures(was[1], now[1], format_bytes, "", ""))
        if was[2] != now[2]:
            said.append(f"exposed {_figures(was[2], now[2], format_seconds, old.missing, new.missing)}")
        if said:
            yield f"{name}: {', '.join(said)}"


def _routed(layer: ExpertLayer) -> str:
    uneven = f"rank {layer.rank_imbalance:.2f}, expert {layer.expert_imbalance:.2f}"
    return f"{sum(layer.rows)} rows, {uneven}, {layer.dropped} dropped, on {counted(layer.ranks, 'rank')}"


def _copied(copy: HostCopy) -> str:
    return f"{format_bytes(copy.bytes)}, exposed {exposed_text(copy)}"


def _figures(was: Any, now: Any, show: Any, was_missing: str, now_missing: str) -> str:
    text = f"{was_missing if was is None else show(was)} → {now_missing if now is None else show(now)}"
    return f"{text} ({100 * (now - was) / was:+.1f} %)" if was and now is not None else text


def flat_config(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as ``a.b``; empty sections stay visible."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict) and item:
            flat.update(flat_config(item, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = item
    return flat
