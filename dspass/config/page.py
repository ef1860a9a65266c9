"""The page of all keys, from the table; ``python -m dspass.config > docs/config.md`` writes it anew."""

from __future__ import annotations

import json
from typing import Literal

from dspass.config.keys import BY_PATH, KEYS, Key, range_text, stages_text


def _effect(key: Key) -> str:
    if key.field:
        return key.meaning + (f" ({stages_text(key)}.)".replace("(acts", "(Acts") if len(key.stages) < 4 else "")
    if key.ignored:
        return f"ignored: {key.ignored}."
    if key.refused:
        when = {
            "value": "refused unless " + " or ".join(f"`{json.dumps(off)}`" for off in key.off),
            "present": "refused when it holds anything",
            "enabled": "refused when enabled",
        }[key.asks]
        off = " or ".join(json.dumps(value) for value in key.off if value is not None)
        return f"{when}: {key.refused}. {key.instead.format(off=off)}"
    return f"as `{key.section}`." if key.section and not BY_PATH[key.section].field else ""


def markdown_table(which: Literal["acts", "ignored", "refused"]) -> str:
    """The rows of the keys that act, are ignored, or are refused, as Markdown, in the order of ``KEYS``."""
    rows = ["| key | value | unit | default | effect |", "|---|---|---|---|---|"]
    for key in KEYS:
        if _fate(key) == which:
            kind: str = "section" if key.kind in ("section", "object", "groups") else key.kind
            if key.choices:
                kind = " or ".join(f"`{json.dumps(choice)}`" for choice in key.choices)
            default = "absent" if key.default is None else f"`{json.dumps(key.default)}`"
            cells = [f"`{key.path}`", kind + range_text(key), key.unit or "-", default, _effect(key)]
            rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(rows)


def _fate(key: Key) -> str:
    if key.field:
        return "acts"
    if key.ignored or key.refused:
        return "ignored" if key.ignored else "refused"
    parent = BY_PATH.get(key.section)
    return _fate(parent) if parent is not None else "section"


def _exceptions() -> str:
    *first, last = [f"`{key.path}`" for key in KEYS if key.field and "auto" in key.off]
    return f'Exceptions are {", ".join(first)} and {last}, and where DeepSpeed\'s default is `"auto"`.'


def page() -> str:
    """The text of ``docs/config.md``."""
    return f"""# Configuration

`torch.compile(model, backend="deepspeed", options=...)` and `dspass.shard(model, config)` take the options as
a mapping or as the path of a JSON file. The keys are DeepSpeed's; ours stand under `dspass`. With no options,
`$DSPASS_CONFIG` names the file; where it is unset or empty, the stage is 3 in a process group and 0 without
one. Options without `zero_optimization.stage` mean stage 0, as in DeepSpeed; `{{}}` does for `dspass.shard` and
`dspass.explain`, while `torch.compile` takes empty options for none.

- A key that is not on this page is an error, which names the nearest known one.
- Types are strict: `true` is not 1, `"3"` is not 3. A *count* may be written as `5e8`, an *integer* may not.
- `null` means the same as absent where the default is absent, and for sections.
- `"auto"` is refused, because nothing fills it in: write the value or remove the key.
  {_exceptions()}
- Keys that are ignored are listed in the report with the reason given here.
- A written size is an upper limit, in DeepSpeed's unit.
- All ranks must have the same configuration, except where a key says otherwise.
- `bfloat16` is another spelling of `bf16`; the `stage3_` keys that DeepSpeed takes without `stage3_` are
  taken so here.

This page is written by `python -m dspass.config > docs/config.md` from the table in `dspass/config/keys.py`;
a test compares the two.

## Keys that act

{markdown_table("acts")}

## Keys that are ignored

DeepSpeed's keys that have no meaning in a graph, or whose work is done elsewhere. Their names and types are
checked all the same.

{markdown_table("ignored")}

## Keys that are refused

Keys that would change what is trained or where it is held, in ways this version does not offer. Written
with a value that asks for nothing, they are accepted and noted as ignored.

{markdown_table("refused")}
"""
