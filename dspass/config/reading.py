"""From a JSON file or a mapping to what acts and what is ignored, or to the refusal of the first key that cannot be used.

Nothing is dropped in silence, and an unknown name is an error that says the nearest known one.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from typing import Any

from dspass.config.entries import Ignored
from dspass.config.errors import ConfigError
from dspass.config.keys import BY_PATH, BY_SPELLING, KEYS, Key
from dspass.config.values import checked, described, refuse_auto, same


def read_file(path: str | os.PathLike[str], who: str) -> Mapping[Any, Any]:
    """The top-level object of a JSON file."""
    name = os.fspath(path)

    def no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [key for key, _ in pairs]
            twin = next(key for key in names if names.count(key) > 1)
            raise ConfigError(name, f'"{twin}" is written twice in one section.', f"{who}Remove one of them.")
        return found

    def no_constant(text: str) -> None:
        raise ConfigError(name, f"{text} is not JSON.", f"{who}Write a finite number.")

    if name.lstrip().startswith("{"):
        raise ConfigError("", "The options are JSON text.", "Give a mapping (json.loads(...)) or the path of a file.")
    try:
        with open(name, encoding="utf-8-sig") as file:
            found = json.load(file, object_pairs_hook=no_twins, parse_constant=no_constant)
    except FileNotFoundError:
        raise ConfigError(name, "there is no such file.", f"{who}Looked from {os.getcwd()}.") from None
    except OSError as error:
        raise ConfigError(name, f"cannot be read: {error.strerror}.", f"{who}Give a JSON file.") from None
    except UnicodeDecodeError:
        raise ConfigError(name, "is not text in UTF-8.", f"{who}Give a JSON file.") from None
    except json.JSONDecodeError as error:
        raise ConfigError(
            name,
            f"is not JSON: line {error.lineno}, column {error.colno}: {error.msg}.",
            f"{who}JSON has no comments and no comma before a closing brace.",
        ) from None
    except RecursionError:
        raise ConfigError(name, "is nested too deeply.", f"{who}A configuration has three levels.") from None
    if not isinstance(found, dict):
        raise ConfigError(name, f"holds {described(found)}.", f"{who}Put the keys into one pair of braces.")
    return found


def walk(options: Mapping[Any, Any], parent: Key | None, taken: dict[str, Any], ignored: list[Ignored]) -> None:
    """Sort what was written in one section into what acts and what is ignored; raise for the rest."""
    section = parent.path if parent else ""
    written: dict[str, str] = {}
    for name, value in options.items():
        if not isinstance(name, str):
            raise ConfigError(section, f"{described(name)} is not the name of a key.", "Names are text.")
        path = f"{section}.{name}" if section else name
        key = BY_SPELLING.get(path)
        if key is None:
            if parent is None or not parent.open:
                raise _unknown(path, section, name)
            refuse_auto(path, value)
            continue
        if key.path in written:
            raise ConfigError(path, f"is the same key as {written[key.path]}.", "Remove one of them.")
        written[key.path] = path
        if key.kind == "section":
            _walk_section(key, path, value, taken, ignored)
        elif key.field:
            taken[key.path] = value
        else:
            value = checked(key, value)
            if key.refused and _asks(key, value):
                raise _refusal(key, value)
            if key.ignored or key.refused:
                ignored.append(Ignored(key=key.path, value=value, reason=key.ignored or _noted(key)))


def _walk_section(key: Key, path: str, value: Any, taken: dict[str, Any], ignored: list[Ignored]) -> None:
    if value is None:
        return
    if not isinstance(value, Mapping):
        hint = '{"stage": 1}' if path == "zero_optimization" else '{"enabled": ...}'
        raise ConfigError(path, f"{described(value)} is not a section.", f"Write a section in braces, such as {hint}.")
    walk(value, key, taken, ignored)
    if key.refused and _asks(key, value):
        raise _refusal(key, value)
    if key.ignored or key.refused:
        shown = {name: "(hidden)" if name == "api_key" else inner for name, inner in value.items()}
        ignored.append(Ignored(key=key.path, value=shown, reason=key.ignored or _noted(key)))


def _asks(key: Key, value: object) -> bool:
    if key.asks == "present":
        return bool(value)
    if key.asks == "value":
        return not any(same(value, off) for off in key.off)
    if isinstance(value, Mapping):
        return any((name == "enabled" and inner is True) or _asks(key, inner) for name, inner in value.items())
    return False


def _noted(key: Key) -> str:
    return f"off as written; {key.refused} is not in this version"


def _refusal(key: Key, value: object) -> ConfigError:
    path = f"{key.path}.enabled" if key.asks == "enabled" and f"{key.path}.enabled" in BY_PATH else key.path
    shown = "" if isinstance(value, Mapping) else f"{json.dumps(value, default=repr)} "
    cause = f"{shown}asks for {key.refused}, which this version does not do."
    off = " or ".join(json.dumps(value) for value in key.off if value is not None)
    return ConfigError(path, cause, key.instead.format(off=off))


def _unknown(path: str, section: str, name: str) -> ConfigError:
    prefix = f"{section}." if section else ""
    names = [spelling[len(prefix):] for spelling in BY_SPELLING if spelling.startswith(prefix)]  # fmt: skip
    near = difflib.get_close_matches(name, [other for other in names if "." not in other], n=1)
    elsewhere = [key.path for key in KEYS if name in (key.name, key.also) and key.section != section]
    best = difflib.get_close_matches(path, list(BY_PATH), n=1)
    if name in BY_PATH and section:
        hint = f"It stands at the top level, not in {section}."
    elif near:
        hint = f"Did you mean {prefix}{near[0]}?"
    elif elsewhere:
        hint = f"Did you mean {elsewhere[0]}?"
    elif best:
        hint = f"Did you mean {best[0]}?"
    else:
        hint = "Remove it."
    return ConfigError(path, "is not a known key.", hint)
