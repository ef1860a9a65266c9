"""The report as JSON and in files: records to JSON values, values back to checked records, and writing whole or not at all.

Reading is strict: what is missing, unknown or of another type is named with the place where it stands.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import types
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from dspass.report.records import MemoryPoint
from dspass.report.words import nearest

if TYPE_CHECKING:
    from dspass.report.report import Report

R = TypeVar("R", bound="Report")

FORMAT = "dspass.report"
VERSION = 6
_BEFORE = 5  # is read too


def encode_report(report: Report) -> dict[str, Any]:
    """JSON values. Each different graph text stands once, in ``texts``, and records hold its index."""
    texts: dict[str, int] = {}
    data = _encode(report)
    for record in (*data["passes"], *data["graphs"]):
        for key in ("before", "after"):
            record[key] = texts.setdefault(record[key], len(texts))
    return {"format": FORMAT, "version": VERSION, **data, "texts": list(texts)}


def decode_report(cls: type[R], data: Any) -> R:
    """The report that :func:`encode_report` was given.

    Raises:
        ValueError: where it is none; see :meth:`dspass.report.report.Report.from_dict`.
    """
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"not a dspass report: the key 'format' must say {FORMAT!r}")
    if data.get("version") not in (VERSION, _BEFORE) or isinstance(data["version"], bool):
        raise ValueError(
            f"the report has format version {data.get('version')!r}, this dspass reads {VERSION}: "
            "load it with the version of dspass that wrote it, or make the report again"
        )
    if data["version"] == _BEFORE and isinstance(data.get("memory"), dict):
        data = {**data, "memory": {"unplanned": [], **data["memory"]}}
    data = {k: v for k, v in data.items() if k not in ("format", "version")}
    texts = _decode(list[str], data.pop("texts", None), "texts")
    for part in ("passes", "graphs"):
        records = _list(data.get(part), part)
        data[part] = [_with_texts(r, texts, f"{part}[{i}]") for i, r in enumerate(records)]
    return typing.cast(R, _decode(cls, data, ""))


def write(path: str | os.PathLike[str], text: str) -> None:
    """Whole or not at all: a reader, or a crash in between, never sees half a file. Makes missing folders."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        # Lone surrogates can stand in names of files and labels; they must not lose the report.
        with open(part, "w", encoding="utf-8", errors="replace", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def dumps(value: Any) -> str:
    """JSON text, or a ValueError where a figure is NaN or infinite."""
    try:
        return json.dumps(value, allow_nan=False)  # ASCII: any text survives, lone surrogates too
    except ValueError as error:
        raise ValueError(f"the report holds a figure that JSON cannot: {error}") from error


def is_page(path: str | os.PathLike[str]) -> bool:
    """Whether the name is that of a page, which holds no report that can be read back."""
    return Path(path).suffix.lower() in (".html", ".htm")


def _encode(value: Any) -> Any:
    if isinstance(value, MemoryPoint):  # by far the most of them: zeros are left out
        return {
            "t": value.t,
            "label": value.label,
            "phase": value.phase,
            "bytes": {c: n for c, n in value.bytes.items() if n},
        }
    if dataclasses.is_dataclass(value):
        return {f.name: _encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {k: _encode(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_encode(v) for v in value]
    return value


def json_value(value: Any, where: str) -> Any:
    """The value as JSON gives it back (tuples become lists), or a ValueError that says where it cannot."""
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"{where}: the key {key!r} is of type {type(key).__name__}, not a string")
        return {k: json_value(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_value(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if value is None or isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise ValueError(f"{where}: {value!r} of type {type(value).__name__} is no JSON value")


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{where}: expected a list, found {_shown(value)}")
    return value


def _with_texts(record: Any, texts: list[str], where: str) -> Any:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object, found {_shown(record)}")
    found = dict(record)
    for key in ("before", "after"):
        index = found.get(key)
        if type(index) is not int or not 0 <= index < len(texts):
            raise ValueError(f"{where}.{key}: expected an index into texts, found {_shown(index)}")
        found[key] = texts[index]
    return found


def _decode(hint: Any, value: Any, where: str) -> Any:
    """``value`` as the type that ``hint`` names, or a ValueError that says where it is something else."""
    if dataclasses.is_dataclass(hint):
        return _decode_record(typing.cast(type, hint), value, where)
    if hint is Any:
        return value
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if isinstance(value, str) and value in args:
            return value
        raise ValueError(f"{where}: expected one of {', '.join(args)}; found {_shown(value)}")
    if origin is types.UnionType:
        return None if value is None else _decode(args[0], value, where)
    if origin is list:
        return [_decode(args[0], item, f"{where}[{i}]") for i, item in enumerate(_list(value, where))]
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected an object, found {_shown(value)}")
        return {k: _decode(args[1], item, f"{where}.{k}") for k, item in value.items()}
    accepted: tuple[type, ...] = (int, float) if hint is float else (hint,)
    if type(value) not in accepted or (hint is float and not math.isfinite(value)):
        raise ValueError(f"{where}: expected {hint.__name__}, found {_shown(value)}")
    return value


@functools.cache
def _hints(record: type) -> dict[str, Any]:
    return typing.get_type_hints(record)


def _decode_record(record: type, value: Any, where: str) -> Any:
    name = where or "the report"
    if not isinstance(value, dict):
        raise ValueError(f"{name}: expected an object, found {_shown(value)}")
    hints = _hints(record)
    known = [f.name for f in dataclasses.fields(record)]
    for key in value:
        if key not in known:
            raise ValueError(f"{name}: the key {key!r} is not known{nearest(str(key), known)}")
    for key in known:
        if key not in value:
            raise ValueError(f"{name}: the key {key!r} is missing")
    found = {key: _decode(hints[key], value[key], f"{where}.{key}" if where else key) for key in known}
    try:
        return record(**found)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:59] + '…'}"
