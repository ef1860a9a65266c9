"""What routers do, counted where experts are divided over ranks: tokens for each expert, and how even they are."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from dspass.runtime.params import ParamSpec


@dataclass
class Routing:
    """Counts of the step at hand, and those of the last whole one: by the name of a weight of a layer's experts, the rows that
    arrived for each expert of this rank, and those that were dropped on their way to it, being beyond its capacity."""

    current: dict[str, torch.Tensor] = field(default_factory=dict)
    last: dict[str, list[int]] = field(default_factory=dict)
    current_drops: dict[str, torch.Tensor] = field(default_factory=dict)
    last_drops: dict[str, list[int]] = field(default_factory=dict)

    def arrived(self, spec: ParamSpec, counts: torch.Tensor, capacity: int | None = None) -> None:
        """``counts[ranks, experts here]`` rows of one call, of which no expert takes more than ``capacity`` from a rank."""
        taken = counts if capacity is None else counts.clamp_max(capacity)
        _add(self.current, spec.name, taken.sum(0))
        _add(self.current_drops, spec.name, (counts - taken).sum(0))

    def end_step(self) -> None:
        if self.current:
            self.last = {name: total.tolist() for name, total in self.current.items()}
            self.last_drops = {name: total.tolist() for name, total in self.current_drops.items()}
        self.current, self.current_drops = {}, {}


def _add(totals: dict[str, torch.Tensor], name: str, more: torch.Tensor) -> None:
    totals[name] = more if name not in totals else totals[name] + more
