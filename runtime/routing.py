"""What routers do, counted where experts are divided over ranks: rows for each expert, of all ranks that share a layer.

The counts that are exchanged before rows are (:meth:`dspass.runtime.expert_rows.start_counts`) say it, so that it costs no
collective of its own, and a report can be made on one rank alone. They stay where they are until somebody asks: on a GPU to
read them would wait for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from dspass.runtime.params import ParamSpec


@dataclass
class Routed:
    """One layer in one step: ``counts``, ``int32[ranks, experts]``, are the rows that each rank of its expert axis has for each
    expert; ``dropped`` those of this rank that go to none."""

    counts: torch.Tensor
    dropped: int | torch.Tensor = 0
    is_dispatched: bool = False
    """Whether the rows of the last call have gone: they go forward and backward, and each value that experts read of them."""


@dataclass
class Routing:
    """Layers of the step at hand, and those of the last whole one, by the name of a weight of their experts."""

    current: dict[str, Routed] = field(default_factory=dict)
    last: dict[str, Routed] = field(default_factory=dict)

    def counted(self, spec: ParamSpec, counts: torch.Tensor, capacity: int | None = None) -> None:
        """The ``counts`` of one call, of which no expert takes more than ``capacity`` from a rank."""
        taken = counts if capacity is None else counts.clamp_max(capacity)
        known = self.current.get(spec.name)
        if known is None:
            known = self.current[spec.name] = Routed(taken)
        else:
            known.counts, known.is_dispatched = known.counts + taken, False
        if capacity is not None:
            known.dropped = known.dropped + (counts - taken)[spec.divided_over.rank].sum()

    def dispatched(self, spec: ParamSpec, dropped: int) -> None:
        """So many rows of a dispatch go nowhere."""
        known = self.current.get(spec.name)
        if known is not None and not known.is_dispatched:
            known.dropped, known.is_dispatched = known.dropped + dropped, True

    def end_step(self) -> None:
        if self.current:
            self.last = self.current
        self.current = {}
