"""Single values: each is checked against its row of the table and brought into its one form, or refused by its name.

Types are strict: nothing is converted that a person would have to guess, and an error shows what was written, with its kind.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from decimal import Decimal
from typing import Any

from dspass.config.entries import PassEntry, RoundedGroup
from dspass.config.errors import ConfigError
from dspass.config.keys import ACTIVATIONS, INTO, WEIGHTS, Key, Kind, range_text

_KIND_TEXT: dict[Kind, str] = {
    "section": "a section in braces",
    "flag": "true or false",
    "integer": "a whole number",
    "count": "a whole number (5e8 is one)",
    "number": "a number",
    "text": "text in quotes",
    "list": "a list",
    "object": "a section in braces",
    "any": "a value",
    "bytes": 'a whole number of bytes or text such as "25MB" or "24MiB"',
    "budget": 'a whole number of bytes, text such as "60GB" or "75%", or "auto"',
    "passes": "a list of passes",
    "groups": 'a section of groups by name, each as {"params": {...}, "modules": [...]}',
}

_UNITS = {f"{letter}{suffix}": base**power
          for suffix, base in (("B", 1000), ("iB", 1024))
          for power, letter in enumerate(("K", "M", "G", "T"), start=1)} | {"B": 1}  # fmt: skip


def check_fields(instance: object, section: str) -> None:
    """Check every field of a dataclass that has a key, and bring its value into its one form."""
    for item in fields(instance):  # type: ignore[arg-type]
        key = INTO.get((section, item.name))
        if key is not None:
            object.__setattr__(instance, item.name, checked(key, getattr(instance, item.name)))


def checked(key: Key, value: Any) -> Any:
    """The value in its one form, or an error that names the key."""
    if value == "auto" and isinstance(value, str) and "auto" not in key.off:
        if key.section == "" and key.field and key.unit in ("samples", "calls"):
            raise ConfigError(key.path, '"auto" has no meaning here: no trainer fills it in.',
                              "Write a number, or remove the key.")  # fmt: skip
        refuse_auto(key.path, value)
    if value == "auto" and "auto" in key.off:
        return value
    if value is None and (key.default is None or None in key.off or key.field == "stage"):
        return None
    if key.field == "mics_shard_size" and same(value, -1):
        return None
    return _KINDS[key.kind](key, value)


def _wrong(key: Key, value: object, way_out: str = "") -> ConfigError:
    return ConfigError(key.path, f"{described(value)} is not {_KIND_TEXT[key.kind]}{range_text(key)}.", way_out)


def described(value: object) -> str:
    """A value as a person wrote it, with its kind."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"{str(value).lower()} (a flag)"
    if isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, str):
        return f"{json.dumps(value)} (text)"
    if isinstance(value, (list, tuple)):
        return "a list"
    return "a section" if isinstance(value, Mapping) else f"a {type(value).__name__}"


def checked_names(path: str, names: Any) -> tuple[str, ...]:
    """The names as a tuple, or an error where one is no text."""
    if not all(isinstance(n, str) for n in names):
        raise ConfigError(path, f"{described(list(names))} are not all names.", "Write texts.")
    return tuple(names)


def refuse_auto(path: str, value: object) -> None:
    """Refuse ``"auto"`` wherever it stands in ``value``: nothing would fill it in."""
    if value == "auto" and isinstance(value, str):
        raise ConfigError(path, '"auto" has no meaning here: nothing fills it in.',
                          "Write the value, or remove the key for the default.")  # fmt: skip
    if isinstance(value, Mapping):
        for name, inner in value.items():
            refuse_auto(f"{path}.{name}", inner)
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            refuse_auto(f"{path}[{index}]", inner)


def same(one: object, other: object) -> bool:
    """Equal and of one type: ``True`` is not 1."""
    return type(one) is type(other) and one == other


def _numeric(key: Key, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        try:
            number = "" if not isinstance(value, str) else f"{float(value):g}"
        except ValueError:
            number = ""
        raise _wrong(key, value, f"Write {number} without quotes." if number else "")
    if not math.isfinite(value):
        raise _wrong(key, value)
    if key.kind != "number" and isinstance(value, float):
        if key.kind == "integer" or not value.is_integer():
            near = f"Write {int(value)}." if value.is_integer() else ""
            raise _wrong(key, value, near)
        value = int(value)
    if (key.low is not None and value < key.low) or (key.high is not None and value > key.high):
        raise _wrong(key, value)
    return float(value) if key.kind == "number" and key.field else value


def _simple(*types: type) -> Callable[[Key, Any], Any]:
    def check(key: Key, value: Any) -> Any:
        if not isinstance(value, types):
            example = f"Write {value.lower()} without quotes." if str(value).lower() in ("true", "false") else ""
            raise _wrong(key, value, example if isinstance(value, str) and bool in types else "")
        refuse_auto(key.path, value)
        return value

    return check


def _text(key: Key, value: Any) -> str:
    if not isinstance(value, str):
        raise _wrong(key, value)
    if key.any_case:
        value = value.lower()
    if key.choices and value not in key.choices:
        raise ConfigError(key.path, f"{described(value)} is not one of {', '.join(map(json.dumps, key.choices))}.",
                          "Nothing is offloaded to a disk." if value == "nvme" else "")  # fmt: skip
    if key.field == "plan" and not value.endswith(".json"):
        raise ConfigError(key.path, f"{described(value)} does not end in .json.", "Name a .json file.")
    if key.field == "report" and not value.endswith((".html", ".json")):
        raise ConfigError(key.path, f"{described(value)} ends neither in .html nor in .json.", "Choose one of them.")
    return value


def _bytes(key: Key, value: Any) -> int:
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
        if match is None or match[2] not in _UNITS:
            raise _wrong(key, value, f"The units are {', '.join(sorted(_UNITS, key=lambda unit: _UNITS[unit]))}.")
        value = int(Decimal(match[1]) * _UNITS[match[2]])  # rounded down; as floats 4.1 * 10**9 is no whole number
    return _numeric(replace(key, kind="count"), value)


def _budget(key: Key, value: Any) -> int | str:
    if not isinstance(value, str):
        return _numeric(replace(key, kind="count"), value)
    if value.strip() == "auto":
        return "auto"
    share = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", value)
    if share is None:
        return _bytes(key, value)
    if not 0 < float(share[1]) <= 100:
        raise _wrong(key, value, "A share is above 0 and at most 100 %.")
    return f"{float(share[1]):g}%"


_PASS_NAME = re.compile(r"[A-Za-z_][\w-]*|[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def _passes(key: Key, value: Any) -> tuple[PassEntry, ...]:
    if not isinstance(value, (list, tuple)):
        raise _wrong(key, value, 'Write ["...", "name"] to add a pass to the default list.')
    entries = tuple(_pass(f"{key.path}[{index}]", item) for index, item in enumerate(value))
    defaults = [entry for entry in entries if entry.name == "..."]
    if len(defaults) > 1:
        raise ConfigError(key.path, '"..." is written twice.', "Keep one of them.")
    drops = [entry.name for entry in entries if entry.drop]
    if drops and not defaults:
        raise ConfigError(key.path, f'"-{drops[0]}" drops from the default list, which is not in the list.',
                          f'Write ["...", "-{drops[0]}"].')  # fmt: skip
    return entries


def _pass(path: str, item: Any) -> PassEntry:
    if isinstance(item, PassEntry):
        item = item.to_json()
    options: dict[str, Any] = {}
    if isinstance(item, Mapping):
        options = {name: inner for name, inner in item.items() if name != "name"}
        if "name" not in item:
            raise ConfigError(path, "has no name.", 'Write {"name": "...", "option": value}.')
        item = item["name"]
    if not isinstance(item, str):
        raise ConfigError(path, f"{described(item)} is not the name of a pass.", "Names are text.")
    drop = item.startswith("-")
    name = item.removeprefix("-")
    if (name == "..." and drop) or (name != "..." and not _PASS_NAME.fullmatch(name)):
        raise ConfigError(path, f"{described(item)} is not the name of a pass.",
                          'Write "name", "-name", "package.module:Class" or "...".')  # fmt: skip
    if options and (drop or name == "..."):
        raise ConfigError(path, f"{described(item)} takes no options.", "Give them to a pass that is named.")
    for option, inner in options.items():
        try:
            json.dumps(inner, allow_nan=False)
        except (TypeError, ValueError):
            raise ConfigError(f"{path}.{option}", f"{described(inner)} is not JSON.",
                              "Options are numbers, flags, text, lists and sections.") from None  # fmt: skip
        if not (isinstance(option, str) and option.isidentifier()):
            raise ConfigError(path, f"{described(option)} is not the name of an option.", "Use a Python name.")
    return PassEntry(name=name, options=options, drop=drop)


#: What ``params`` of a group holds, and what is taken where it is absent; None: it has to be there.
_PARAMS: dict[str, dict[str, int | None]] = {
    WEIGHTS: {"start_bits": None, "target_bits": None, "quantization_period": 1},
    ACTIVATIONS: {"bits": None},
}


def _groups(key: Key, value: Any) -> tuple[RoundedGroup, ...]:
    if isinstance(value, tuple) and all(isinstance(item, RoundedGroup) for item in value):
        value = {item.name: item.to_json(key.section == WEIGHTS) for item in value}
    if not isinstance(value, Mapping):
        raise _wrong(key, value)
    return tuple(_group(f"{key.path}.{name}", name, item, _PARAMS[key.section]) for name, item in value.items())


def _group(path: str, name: Any, item: Any, wanted: Mapping[str, int | None]) -> RoundedGroup:
    example = f"Write {json.dumps({'params': dict.fromkeys(wanted, 8), 'modules': ['*']})}."
    if not isinstance(name, str) or not isinstance(item, Mapping):
        raise ConfigError(path, f"{described(item)} is not a group of layers.", example)
    _refuse_unknown(path, item, ("params", "modules", "related_modules"))
    params = item.get("params")
    if not isinstance(params, Mapping):
        raise ConfigError(f"{path}.params", f"{described(params)} is not a section.", example)
    _refuse_unknown(f"{path}.params", params, tuple(wanted))
    numbers = {}
    for of, default in wanted.items():
        range_ = (1, None) if of == "quantization_period" else (2, 16)
        inner = Key(path=f"{path}.params.{of}", kind="integer", low=range_[0], high=range_[1])
        if params.get(of, default) is None:
            raise ConfigError(inner.path, "is not written.", example)
        numbers[of] = _numeric(inner, params.get(of, default))
    if item.get("related_modules") is not None:
        raise ConfigError(
            f"{path}.related_modules", "only concerns pruning, which this version does not do.", "Remove it."
        )
    target = numbers["target_bits"] if "target_bits" in numbers else numbers["bits"]
    start = numbers.get("start_bits", target)
    if start < target:
        raise ConfigError(
            f"{path}.params.start_bits", f"{start} bits cannot fall to {target}.", f"Write {target} or more."
        )
    return RoundedGroup(name=name, start_bits=start, target_bits=target, period=numbers.get("quantization_period", 1),
                        modules=_patterns(f"{path}.modules", item.get("modules", ["*"])))  # fmt: skip


def _patterns(path: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(one, str) for one in value):
        raise ConfigError(path, f"{described(value)} is not a list of names.", 'Write ["*"] for all layers.')
    for one in value:
        try:
            re.compile("" if one == "*" else one)
        except re.error as error:
            raise ConfigError(
                path, f"{described(one)} is not a regular expression: {error}.", 'Only "*" alone takes all layers.'
            ) from None
    return tuple(value)


def _refuse_unknown(path: str, section: Mapping[Any, Any], known: tuple[str, ...]) -> None:
    for name in section:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            raise ConfigError(
                f"{path}.{name}", "is not a known key.", f"Did you mean {path}.{near[0]}?" if near else "Remove it."
            )


_KINDS: dict[Kind, Callable[[Key, Any], Any]] = {
    "section": _simple(Mapping),
    "flag": _simple(bool),
    "integer": _numeric,
    "count": _numeric,
    "number": _numeric,
    "text": _text,
    "list": _simple(list, tuple),
    "object": _simple(Mapping),
    "any": _simple(object),
    "bytes": _bytes,
    "budget": _budget,
    "passes": _passes,
    "groups": _groups,
}
