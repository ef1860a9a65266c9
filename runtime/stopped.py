"""Which rank stopped first, where a message or a collective does not come.

A rank that stops is seen by those alone that wait for it. Who waits for one of these sees another one stop, which had to. So
each rank that cannot go on leaves word in the store of the default process group before it raises: which ranks it lost, or the
error of its own that it stops with. Who notices later follows these words from rank to rank, to an error, or to a rank that has
left none. In a step that goes well nothing is told and nothing is asked.

The store may be gone, as where rank 0 served it and has died; then a rank names what it has seen itself. Nobody asks for
longer than a few seconds, by a thread of its own: towards a machine that vanished the store's client has no time-out.

Dropped: to believe the word that was left first. gloo closes all connections of a rank that has waited too long, and its
neighbours, who see that before it says why, would name it. Dropped: signs of life in each step. They are traffic, or a thread
that takes turns with the one that computes.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from dspass.runtime import compat
from dspass.runtime.axis import Axis

#: Seconds in which a rank whose connections have closed says why, if it still lives.
PATIENCE = 1.0
#: Seconds for which rank 0, which may serve the store, stays for those that notice later.
STAYS = 3.0
#: No message of a step has it.
_TAG = 0x57099


class RankStopped(RuntimeError):
    """Another rank has stopped: ``where`` this one waited meanwhile, and the ``cause``."""

    def __init__(self, where: str, cause: str = "") -> None:
        super().__init__(where, cause)
        self.where, self.cause = where, cause

    def __str__(self) -> str:
        return f"{self.where}: {self.cause}" if self.cause else self.where


def others(axis: Axis) -> list[int]:
    """The global ranks of ``axis`` but this one's."""
    return [rank for place, rank in enumerate(axis.ranks) if place != axis.rank]


@contextlib.contextmanager
def waiting_for(axis: Axis, what: str) -> Iterator[None]:
    """Say of a collective over ``axis`` that fails inside which rank has stopped; ``what`` it was to do."""
    try:
        yield
    except RankStopped as error:
        raise RankStopped(_where(axis, f"{what} with ranks {others(axis)}"), error.cause) from error
    except RuntimeError as error:
        raise lost(axis, f"{what} with ranks {others(axis)}", others(axis)) from error


def lost(axis: Axis, what: str, peers: Sequence[int]) -> RankStopped:
    """What to raise where this rank could not do ``what``, for which it waited for the global ranks ``peers`` of ``axis``. It
    names the one that stopped first, and from now on all others can hear of it."""
    return RankStopped(_where(axis, what), _cause(axis, peers))


def _where(axis: Axis, what: str) -> str:
    return f"rank {axis.ranks[axis.rank]} could not {what}"


def _cause(axis: Axis, suspects: Sequence[int]) -> str:
    found: tuple[Sequence[int], str | None] = suspects, None

    def ask() -> None:
        nonlocal found
        seen = [rank for rank in suspects if _is_closed(axis, rank)] or suspects
        words = _Words(axis.ranks[axis.rank])
        words.leave(lost=seen)
        first = words.first(seen, {words.me})
        found = first if first[0] else (seen, None)
        words.end(found[0])

    _within_limit(ask)
    ranks, error = found
    named = f"rank {ranks[0]}" if len(ranks) == 1 else f"one of ranks {sorted(ranks)}"
    if error is not None:
        return f"{named} has stopped with an error of its own, which came first: {error}"
    return (
        f"{named} has stopped, or was not called with a batch of its own within the process group's time-out. Look for its "
        "error: that came first."
    )


def tell(axis: Axis, error: Exception) -> None:
    """Let all others hear that this rank stops with an ``error`` of its own."""

    def say() -> None:
        words = _Words(axis.ranks[axis.rank])
        words.leave(error=f"{type(error).__name__}: {error}"[:1000])
        words.end([])

    _within_limit(say)


class _Words:
    """What ranks that cannot go on have left in the store, by global rank."""

    def __init__(self, me: int) -> None:
        self.me, self._store, self._until = me, compat.store(), time.monotonic() + PATIENCE

    def leave(self, **word: Any) -> None:
        self._store.set(self._key(self.me), json.dumps(word))

    def first(self, suspects: Sequence[int], passed: set[int]) -> tuple[list[int], str | None]:
        """Of ``suspects``, and of those that they have lost, the ranks that may have stopped first, and with which error. None
        where all of them have only lost each other, or ``passed`` ones."""
        silent = []
        for rank in suspects:
            if rank in passed:
                continue
            passed.add(rank)
            word = self._read(self._key(rank))
            if word is None:
                silent.append(rank)
            elif "error" in word:
                return [rank], word["error"]
            elif (deeper := self.first(word["lost"], passed))[0]:
                return deeper
        return silent, None

    def end(self, stopped: Sequence[int]) -> None:
        """Read no more. A store that this rank may serve stays until all but the ``stopped`` ones say so, or for a while."""
        self._store.set(f"{self._key(self.me)}/ended", "true")
        self._until = time.monotonic() + STAYS
        for rank in range(dist.get_world_size()) if self.me == 0 else ():
            if rank not in stopped:
                self._read(f"{self._key(rank)}/ended")

    def _read(self, key: str) -> Any:
        """What stands there; None where nothing comes in time, or where the store is gone."""
        try:
            while not self._store.check([key]):  # its own wait logs that it was in vain
                if time.monotonic() > self._until:
                    return None
                time.sleep(0.05)
            return json.loads(self._store.get(key))
        except RuntimeError:
            return None

    def _key(self, rank: int) -> str:
        return f"dspass/stopped/{rank}"


def _is_closed(axis: Axis, rank: int) -> bool:
    """Whether ``rank`` is known to have closed its connection: gloo then refuses a message at once, which nobody reads
    otherwise. Connections that it has closed itself, as it does after a time-out, it refuses with another reason."""
    if axis.backend != "gloo":
        return False
    try:
        dist.isend(torch.zeros(1), rank, axis.group, _TAG)
    except RuntimeError as error:
        return "timeout" not in str(error)
    return False


def _within_limit(do: Callable[[], None]) -> None:
    def run() -> None:
        with contextlib.suppress(RuntimeError, ValueError):  # without a store
            do()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE + STAYS + 1)


__all__ = ["RankStopped", "lost", "others", "tell", "waiting_for"]
