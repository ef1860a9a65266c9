"""Let go of gathered parameters after their last use: no view of one may outlive that."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch.fx as fx

from dspass.passes.base import Pass, PassContext
from dspass.passes.nodes import calls, gather_wait


@dataclass(frozen=True, kw_only=True)
class ReleaseGathered(Pass):
    """Every use of a view of a gathered parameter gets its own copy of that view, right before it.

    The runtime frees a tensor after its last use in the graph. A view (a transposed weight) that is made once at the top
    of the graph and used at its end would keep the whole parameter alive between; views cost nothing to make again.
    """

    name: ClassVar[str] = "release_gathered"
    requires: ClassVar[frozenset[str]] = frozenset({"gathers"})

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        copies = 0
        for wait in calls(graph, gather_wait):
            frontier = [n for n in wait.users if n.target is operator.getitem]
            while frontier:
                node = frontier.pop()
                for view in [u for u in node.users if _is_view(u)]:
                    frontier.extend(_own_copies(graph, view))
                    copies += 1
        ctx.say(f"{copies} views made where they are used" if copies else "no views of gathered parameters")
        return graph


def _is_view(node: fx.Node) -> bool:
    return getattr(node.target, "is_view", False) is True and len(node.all_input_nodes) == 1


def _own_copies(graph: fx.Graph, view: fx.Node) -> list[fx.Node]:
    made = []
    for user in list(view.users):
        with graph.inserting_before(user):
            copy = graph.node_copy(view)
        user.replace_input_with(view, copy)
        made.append(copy)
    if not view.users:
        graph.erase_node(view)
    return made
