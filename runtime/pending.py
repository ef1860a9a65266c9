"""What is under way between a start and a wait of the graph."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dspass.runtime.traffic import CollectiveKey, TrafficCounter
from dspass.runtime.transport import InFlight

Arrived = Callable[[list[torch.Tensor]], list[torch.Tensor]]


class Pending:
    """Parameters, gradients or rows that a collective brings, and what the graph wants of them: ``then`` makes it of what has
    arrived. How long is waited for them counts as exposed, beside what the collective sent (``counted``)."""

    def __init__(
        self, traffic: TrafficCounter, flight: InFlight, counted: CollectiveKey | None, then: Arrived | None = None
    ) -> None:
        self._traffic, self._flight, self._counted, self._then = traffic, flight, counted, then

    def then(self, more: Arrived) -> Pending:
        """The same, made into something else when it has arrived."""
        first = self._then
        both = more if first is None else lambda arrived: more(first(arrived))
        return Pending(self._traffic, self._flight, self._counted, both)

    def tensors(self) -> list[torch.Tensor]:
        """What is being filled."""
        return self._flight.results

    def wait(self) -> list[torch.Tensor]:
        """What the graph wants, in the order that it asked in. May be called once: nothing is kept afterwards."""
        arrived = self._flight.wait()
        if self._counted is not None:
            self._traffic.exposed[self._counted] += self._flight.exposed_seconds
        then, self._then = self._then, None
        return arrived if then is None else then(arrived)
