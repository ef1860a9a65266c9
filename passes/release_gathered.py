"""Keep a gathered parameter only while it is computed with: no view of one is made before it is needed."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch.fx as fx

from dspass.passes.base import Pass, PassContext
from dspass.passes.nodes import GATHERED


@dataclass(frozen=True, kw_only=True)
class ReleaseGathered(Pass):
    """Every use of a view of a whole parameter gets its own copy of that view, right before it.

    :class:`ZeroGather` gathers a parameter at its first use, and the runtime frees it after its last. A
    view (a transposed weight) that is made at the top of the graph and used at its end would be both: the
    parameter would be gathered at the top and live until the end. Views cost nothing to make again, so this
    pass stands before the gathers.
    """

    name: ClassVar[str] = "release_gathered"
    requires: ClassVar[frozenset[str]] = frozenset({"exposed parameters"})

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        copies = 0
        # From the last to the first: a view of a view moves before the one that it is made of can follow it.
        for view in reversed(_views_of_parameters(graph)):
            if view.users and not (len(view.users) == 1 and view.next in view.users):
                _make_at_uses(graph, view)
                copies += 1
        ctx.say(
            f"{copies} views made where they are used" if copies else "each view of a parameter stands where it is used"
        )
        return graph


def _views_of_parameters(graph: fx.Graph) -> list[fx.Node]:
    found: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if (
            node.op == "call_function"
            and len(node.all_input_nodes) == 1
            and (getattr(node.target, "is_view", False) is True or node.target is operator.getitem)
        ):
            (source,) = node.all_input_nodes
            if GATHERED in source.meta or source in found:
                found[node] = None
    return list(found)


def _make_at_uses(graph: fx.Graph, view: fx.Node) -> None:
    for user in list(view.users):
        with graph.inserting_before(user):
            copy = graph.node_copy(view)
        user.replace_input_with(view, copy)
    graph.erase_node(view)
