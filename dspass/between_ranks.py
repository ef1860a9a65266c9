"""What ranks that plan tell one another, through the process group's key-value store: a collective would not be safe inside
of a compilation, which ranks come to at different times. Each waits :data:`WAIT` at most, and says for what."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from dspass.runtime import compat
from dspass.runtime.engine import Engine

#: How long a rank waits for what another says.
WAIT = timedelta(minutes=10)

#: How often something was said under a name, by models that are alike: ranks share each of them.
_said_under: Counter[str] = Counter()


def together(engine: Engine) -> Sequence[int]:
    """The ranks that run the same graphs as this one, where there are others; the first plans."""
    ranks = engine.stages.data.ranks if engine.stages is not None and all_ranks() else all_ranks()
    return ranks if len(ranks) > 1 else ()


def all_ranks() -> Sequence[int]:
    """Those of a group that sends what it is given, as that of a prediction does not."""
    return range(dist.get_world_size()) if dist.is_initialized() and dist.get_backend() != "fake" else ()


def first_says(what: str, engine: Engine, said: Any) -> Any:
    """On each of the ranks that run the same graphs, what the first of them has ``said``."""
    ranks = together(engine)
    if not ranks:
        return said
    key = key_of(what, ranks[0], engine.model)
    if dist.get_rank() == ranks[0]:
        compat.store().set(key, json.dumps(said))
        return said
    return _heard(key, ranks[0])


def everyone_says(what: str, engine: Engine, ranks: Sequence[int], said: Any) -> list[Any]:
    """What each of ``ranks`` has ``said``."""
    key = key_of(what, ranks[0], engine.model)
    compat.store().set(f"{key}/{dist.get_rank()}", json.dumps(said))
    return [_heard(f"{key}/{rank}", rank) for rank in ranks]


def key_of(what: str, *name: str | int) -> str:
    """A key in the store, the same on all ranks, and another one each time."""
    key = "/".join(("dspass", what, *map(str, name)))
    _said_under[key] += 1
    return f"{key}/{_said_under[key]}"


def wait_for(key: str, missing: str, where: str) -> Any:
    """What another rank has put into the store. Raises ``RuntimeError`` that says what is ``missing``, after how long, and
    ``where``, in case that it does not."""
    store = compat.store()
    try:
        store.wait([key], WAIT)
    except RuntimeError as error:
        raise RuntimeError(f"{missing} in {WAIT} {where}") from error
    return json.loads(store.get(key))


def _heard(key: str, by: int) -> Any:
    where = "where all ranks plan: it compiles another model, or it failed; see what it said."
    return wait_for(key, f"rank {by} has said nothing", where)
