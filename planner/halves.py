"""A joint graph and a choice of what is saved, as the two stretches of nodes that a step runs.

The forward is what its results and the saved values are made of, in order. The backward is what reads a gradient, with each
value that is computed again right before its first reader, as the partitioner orders it. Nothing is copied: a value that is
computed again stands in both.

Dropped: to split the graph for each choice. The partitioner takes seconds for a large one, where this takes milliseconds, and
the planner asks for every choice.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, field

import torch.fx as fx

from dspass.passes.kernels import Stretch, TraitsOf


@dataclass(frozen=True)
class Halves:
    """What ``joint`` runs in the forward and in the backward. ``inside`` are its nodes that no gradient is needed for, in
    order."""

    joint: fx.Graph
    inside: Sequence[fx.Node]
    num_fwd_outputs: int
    _traits: TraitsOf = field(default_factory=TraitsOf)

    @property
    def results(self) -> list[fx.Node]:
        """What the forward answers."""
        return [n for n in self._outputs[: self.num_fwd_outputs] if isinstance(n, fx.Node)]

    @property
    def gradients(self) -> list[fx.Node]:
        return [n for n in self._outputs[self.num_fwd_outputs :] if isinstance(n, fx.Node)]

    @property
    def _outputs(self) -> Sequence[object]:
        return self.joint.find_nodes(op="output")[0].args[0]

    def of(self, saved: Set[fx.Node]) -> tuple[Stretch, Stretch]:
        """Forward and backward where ``saved`` are kept between them."""
        given = set(self.joint.find_nodes(op="placeholder"))
        results = self.results
        return (
            Stretch(self._needed(results, saved), given, {*results, *saved} - given, self._traits),
            Stretch(self._backward(saved), given | saved, set(self.gradients), self._traits),
        )

    def _needed(self, results: Sequence[fx.Node], saved: Set[fx.Node]) -> list[fx.Node]:
        found: set[fx.Node] = set()
        stack = [*results, *saved]
        while stack:
            node = stack.pop()
            if node not in found:
                found.add(node)
                stack += self._traits[node].sources
        return [n for n in self.inside if n in found and n.op != "placeholder"]

    def _backward(self, saved: Set[fx.Node]) -> list[fx.Node]:
        inside = set(self.inside)
        order: list[fx.Node] = []
        made: set[fx.Node] = set()

        def make(node: fx.Node) -> None:
            stack = [(node, False)]
            while stack:
                one, is_ready = stack.pop()
                if is_ready:
                    order.append(one)
                    continue
                if one in made or one in saved or one not in inside or one.op == "placeholder":
                    continue
                made.add(one)
                stack.append((one, True))
                stack += ((source, False) for source in reversed(self._traits[one].sources))

        for node in self.joint.nodes:
            if node in inside or node.op in ("placeholder", "output"):
                continue
            for source in self._traits[node].sources:
                make(source)
            order.append(node)
        for node in self.gradients:
            make(node)
        return order
