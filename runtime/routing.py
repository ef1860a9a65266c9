"""What routers do, counted where experts are divided over ranks: tokens for each expert, and how even they are."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from dspass.runtime.params import ParamSpec


@dataclass
class Routing:
    """Counts of the step at hand, and those of the last whole one: by the name of a weight of a layer's experts, the rows that
    arrived for each expert of this rank."""

    current: dict[str, torch.Tensor] = field(default_factory=dict)
    last: dict[str, list[int]] = field(default_factory=dict)

    def arrived(self, spec: ParamSpec, counts: torch.Tensor) -> None:
        """``counts[ranks, experts here]`` rows of one call."""
        total = counts.sum(0)
        self.current[spec.name] = total if spec.name not in self.current else self.current[spec.name] + total

    def end_step(self) -> None:
        if self.current:
            self.last = {name: total.tolist() for name, total in self.current.items()}
        self.current = {}
