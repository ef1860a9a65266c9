"""The cuts of another graph of a model whose parameters already lie on stages: other sizes, or without its loss."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping

import torch.fx as fx

from dspass.passes.captured_cost import NodeCost
from dspass.planner.stages import Cut, CutError, Cuts, _bytes, _Parts, _stage


def follow(
    gm: fx.GraphModule,
    stages: int,
    costs: Mapping[fx.Node, NodeCost],
    stages_of: Mapping[str, Collection[int]],
    known: Mapping[str, int],
) -> Cuts:
    """Cut ``gm`` so that each stage reads only parameters that lie on it, of which ``stages_of`` has the stages by name, and
    runs the nodes that it ran in the graph that was cut first (``known``, by name).

    What is new goes to the first stage that has what it reads. Raises :class:`CutError` where a parameter is read by what comes
    too late for it.
    """
    parts = _Parts(gm.graph, costs)
    reads: dict[int, set[str]] = defaultdict(set)
    for unit, nodes in enumerate(parts.nodes_of):
        reads[unit] = {named[0] for n in parts.needed(nodes) if (named := parts.parameter(n)) is not None}
    before: dict[int, set[int]] = defaultdict(set)
    for u, v in parts.edges:
        before[v].add(u)
    stage_of_unit: list[int] = []
    for unit, nodes in enumerate(parts.nodes_of):
        stage = max([0, *(stage_of_unit[u] for u in before[unit]), *(known.get(n.name, 0) for n in nodes)])
        while unmet := [name for name in reads[unit] if stage not in stages_of.get(name, ())]:
            later = [s for s in sorted(stages_of.get(unmet[0], ())) if s > stage]
            if not later:
                raise CutError(
                    f"%{nodes[0].name} reads {unmet[0]} on stage {stage}, and that parameter lies on stages "
                    f"{sorted(stages_of.get(unmet[0], ()))}: the model uses its parameters in another order than in its first "
                    "call, by which it was divided. Let the first call be one that is typical."
                )
            stage = later[0]
        stage_of_unit.append(stage)
    stage_of = {n: stage_of_unit[u] for n, u in parts.unit_of.items()}
    found = tuple(_stage(parts, stage_of, s) for s in range(stages))
    crossing = []
    for s in range(stages - 1):
        values = [n for n, readers in parts.readers.items() if stage_of[n] <= s < max(stage_of[r] for r in readers)]
        sent, back = sum(map(_bytes, values)), sum(_bytes(n) for n in values if costs[n].has_gradient)
        crossing.append(Cut(index=s, values=tuple(values), bytes=sent, gradient_bytes=back, seconds=0.0))
    return Cuts(stage_of=stage_of, stages=found, cuts=tuple(crossing), bottleneck=max(s.seconds for s in found), why=())
