"""Which bytes are alive, by category, while programs run: the same bookkeeping for real steps and for fake ones.

Memory of the host is counted apart: what a category of :data:`HOST` names is no part of the device's.

A storage enters when an instruction ends with it or, where the ledger ``watches``, when any operator inside of an
instruction makes it, and leaves when the last tensor on it dies. Fake tensors have storages of the right size and none
of the bytes, so a step under a fake mode yields the timeline of a real one, by the same code.
"""

from __future__ import annotations

import contextlib
import itertools
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dspass.runtime import compat

HOST = "host"
CATEGORIES = ("parameters", "gradients", "optimizer", "gathered", "saved", "temporary", "staging")
Phase = Literal["forward", "backward", "optimizer"]


@dataclass(frozen=True)
class Point:
    """Bytes alive by category right after ``label`` took or freed some."""

    seconds: float
    label: str
    phase: Phase
    bytes: tuple[int, ...]

    @property
    def total(self) -> int:
        return sum(self.bytes)


@dataclass(eq=False)
class Ledger:
    """Live storages. ``points`` grows with each change."""

    watches: bool = False  # enter what any operator makes while an instruction runs; for fake tensors
    points: list[Point] = field(default_factory=list)
    label: str = "start"
    phase: Phase = "forward"
    _live: dict[int, tuple[int, str]] = field(default_factory=dict)  # storage number -> bytes, category
    _numbers: weakref.WeakKeyDictionary[torch.UntypedStorage, int] = field(default_factory=weakref.WeakKeyDictionary)
    _totals: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CATEGORIES, 0))
    _next: Iterator[int] = field(default_factory=itertools.count)
    host_bytes: int = 0
    _default: str = "temporary"
    _watch: _Watch | None = None

    # -- storages --------------------------------------------------------------------------------------------------

    def note(self, values: Any, category: str | None = None) -> None:
        """Enter the storages of all tensors in ``values``; with ``category``, move those that are known there."""
        for tensor in _tensors(values):
            storage = tensor.untyped_storage()
            number = self._numbers.get(storage)
            if category == HOST and (number is None or number in self._live):
                if number is not None:  # entered where it was made
                    self._free(number)
                self._numbers[storage] = next(self._next)
                self.host_bytes += storage.nbytes()
                weakref.finalize(storage, self._free_host, storage.nbytes()).atexit = False
            elif number is None:
                number = next(self._next)
                self._numbers[storage] = number
                self._live[number] = (storage.nbytes(), category or self._default)
                self._totals[category or self._default] += storage.nbytes()
                weakref.finalize(storage, self._free, number).atexit = False
                self._point()
            elif category is not None:
                self._move(number, category)

    def _move(self, number: int, category: str) -> None:
        if number in self._live:
            size, old = self._live[number]
            if old != category:
                self._totals[old] -= size
                self._totals[category] += size
                self._live[number] = (size, category)

    @torch.compiler.disable  # storages die anywhere, also while Dynamo compiles whatever Python calls
    def _free(self, number: int) -> None:
        size, category = self._live.pop(number, (0, "temporary"))
        self._totals[category] -= size
        self._point()

    @torch.compiler.disable
    def _free_host(self, size: int) -> None:
        self.host_bytes -= size

    def _point(self) -> None:
        phase: Phase = "backward" if self.phase == "forward" and compat.backward_run() != -1 else self.phase
        self.points.append(Point(time.time_ns() / 1e9, self.label, phase, tuple(self._totals[c] for c in CATEGORIES)))

    @property
    def total(self) -> int:
        return sum(self._totals.values())

    def totals(self) -> dict[str, int]:
        return dict(self._totals)

    # -- what runs -------------------------------------------------------------------------------------------------

    def mark(self, label: str, phase: Phase) -> None:
        """What runs from here on, outside of programs."""
        self.label, self.phase = label, phase
        self._point()

    def before(self, label: str, is_runtime: bool, makes_host_memory: bool = False) -> None:
        """A program is about to run an instruction; what ``makes_host_memory`` is entered by its results alone."""
        self.label = label
        self._default = "staging" if is_runtime else "temporary"
        if self.watches and not makes_host_memory:
            self._watch = _Watch(self)
            self._watch.__enter__()

    def after(self, results: Mapping[str, Any], categories: Mapping[str, str]) -> None:
        """It has run: its results belong to the categories that the program gave them."""
        if self._watch is not None:
            self._watch.__exit__(None, None, None)
            self._watch = None
        for name, value in results.items():
            in_flight = getattr(value, "tensors", None)
            self.note(in_flight() if callable(in_flight) else value, categories.get(name))
        self._default = "temporary"
        self._point()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Enter what any operator makes inside, for code that runs eagerly; nothing where the ledger does not watch."""
        if not self.watches:
            yield
            return
        with _Watch(self):
            yield


class _Watch(TorchDispatchMode):
    #: Such as what runs an operator beside its random state, where a random number is computed again.
    supports_higher_order_operators = True

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.ledger.note(result)
        return result


def _tensors(values: Any) -> Iterable[torch.Tensor]:
    """Those that have memory: on the meta device stand what other pipeline stages hold."""
    for leaf in tree_leaves(values):
        if isinstance(leaf, torch.Tensor) and (local := compat.local_of(leaf)).device.type != "meta":
            yield local
