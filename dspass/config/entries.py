"""What stands in lists of a configuration: a pass, a group of layers, an ignored key. Plain data; ``values.py`` checks it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Ignored:
    """A key that was written and does nothing."""

    key: str
    """Dotted path."""
    value: object
    """What was written."""
    reason: str
    """Why it does nothing."""


@dataclass(frozen=True, kw_only=True)
class PassEntry:
    """One entry of ``dspass.passes``; the pass pipeline finds the pass that it names."""

    name: str
    """A pass's name, ``package.module:Class``, or ``...`` for the default list."""
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """The pass's options by name."""
    drop: bool = False
    """Take the pass out of the default list; an entry of the same name adds it back at its own place."""

    def to_json(self) -> str | dict[str, Any]:
        """The entry as it stands in a JSON file."""
        if self.options:
            return {"name": self.name, **self.options}
        return f"-{self.name}" if self.drop else self.name


@dataclass(frozen=True, kw_only=True)
class RoundedGroup:
    """One of ``different_groups``: layers whose weights, or inputs, are rounded alike while they train."""

    name: str
    """As it was written."""
    start_bits: int
    """Bits of the first rounding."""
    target_bits: int
    """Bits of the last one; of activations the same."""
    period: int = 1
    """Steps after which bits fall by one; then twice, four times as many."""
    modules: tuple[str, ...] = ("*",)
    """Regular expressions, found anywhere in a layer's name; ``"*"`` takes all."""

    def to_json(self, weights: bool) -> dict[str, Any]:
        """The group as it stands in a JSON file."""
        if not weights:
            return {"params": {"bits": self.target_bits}, "modules": list(self.modules)}
        params = {"start_bits": self.start_bits, "target_bits": self.target_bits, "quantization_period": self.period}
        return {"params": params, "modules": list(self.modules)}
