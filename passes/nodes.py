"""Small helpers that several passes share: finding and making the runtime's nodes in a graph."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx

from dspass.runtime.collectives import (
    combine_start,
    counts_start,
    dispatch_start,
    even_start,
    exchange_wait,
    gather_start,
    gather_wait,
    keep_in_node,
    mean_start,
    reduce_start,
    reduce_wait,
    rounding_errors,
)
from dspass.runtime.params import Over, ParamSpec, lookup

#: What begins an all-to-all of rows, whose first argument is a list: one tensor, or codes and scales.
ROWS = (dispatch_start, combine_start, even_start)

#: What begins an exchange that is waited for by ``exchange_wait``.
EXCHANGES = (counts_start, *ROWS, mean_start)

UNSHARD = torch.ops.dspass.unshard.default
UNSHARD_EXPERTS = torch.ops.dspass.unshard_experts.default
REDUCE_GRAD = torch.ops.dspass.reduce_grad.default

#: On a placeholder that stands for a whole parameter: its key and the name of the placeholder of its shard.
GATHERED = "dspass_gathered"

#: On such a placeholder of the joint graph: the planner has the forward hand the whole copy to the backward.
KEPT = "dspass_kept"

#: On a placeholder of a parameter's shard: it lies on the host.
ON_HOST = "dspass_on_host"

#: On a placeholder of the joint graph that outlives the step: a parameter or a buffer.
STATIC = "dspass_static"

#: On a node of a graph that is planned with as many rows at its experts as are expected: how many come is known at run time.
ROWS_EXPECTED = "dspass_rows_expected"

#: On a value that a person, or a policy, wants to be saved, in the joint graph that is split and in what comes of it. The tag
#: does not tell: torch gives it to what lies between two checkpoints, too.
WANTED = "dspass_wanted"

#: On a value that is saved for the backward, in both graphs: the name of the pass that holds it in its own way.
HELD = "dspass_held"


def calls(graph: fx.Graph, target: Any) -> list[fx.Node]:
    return graph.find_nodes(op="call_function", target=target)


def positions(graph: fx.Graph) -> dict[fx.Node, int]:
    return {node: i for i, node in enumerate(graph.nodes)}


def first_user(node: fx.Node, order: dict[fx.Node, int]) -> fx.Node:
    return min(node.users, key=order.__getitem__)


def specs_of(start: fx.Node) -> list[ParamSpec]:
    """The parameters of a ``gather_start`` or ``reduce_start`` node."""
    return [lookup(key) for key in start.args[1]]


def spec_of(start: fx.Node) -> ParamSpec:
    """Of an exchange of experts the weight by which it is known, its only argument that is text."""
    return lookup(next(argument for argument in start.args if isinstance(argument, str)))


def is_packed(start: fx.Node) -> bool:
    """Whether what starts is of a bucket, or of rows, that the graph has quantised."""
    if start.target in ROWS:
        return isinstance(start.args[-1], tuple)
    return len(start.args) > 2 and start.args[2] is not None


def over_of(start: fx.Node) -> Over:
    """Which ranks a ``gather_start`` or ``reduce_start`` goes over, where that is a part of its axis."""
    return start.args[3] if len(start.args) > 3 else None


def open_starts(graph: fx.Graph, target: Any) -> list[fx.Node]:
    """Each ``gather_start``, or ``reduce_start``, in order, that passes may still join, move or feed otherwise: what it sends
    is whole, and is not kept in the node."""
    return [start for start in sorted(calls(graph, target)) if not is_packed(start) and over_of(start) is None]


def wait_of(start: fx.Node) -> fx.Node:
    (wait,) = start.users
    return wait


def insert_pair(
    graph: fx.Graph,
    begin: Callable[..., Any],
    end: Callable[..., Any],
    inputs: Sequence[fx.Node],
    keys: Sequence[str],
    values: Sequence[torch.Tensor],
) -> tuple[fx.Node, fx.Node, list[fx.Node]]:
    """Start, wait and one item node a parameter, at the graph's insertion point."""
    start = graph.call_function(begin, (list(inputs), list(keys)))
    wait = graph.call_function(end, (start,))
    start.meta["val"] = wait.meta["val"] = list(values)
    items = []
    for i, value in enumerate(values):
        item = graph.call_function(operator.getitem, (wait, i))
        item.meta["val"] = value
        items.append(item)
    return start, wait, items


def items_of(wait: fx.Node) -> list[fx.Node | None]:
    """The item nodes of a wait, by index; None where an item is not used."""
    found: list[fx.Node | None] = [None] * len(wait.meta["val"])
    for user in wait.users:
        assert user.target is operator.getitem, f"{wait.name} is read by {user.format_node()}"
        found[user.args[1]] = user
    return found


def merge_pairs(graph: fx.Graph, starts: Sequence[fx.Node], begin: Any, end: Any, at: fx.Node) -> fx.Node:
    """Replace several start/wait pairs by one that stands before ``at``; answers the new start."""
    inputs = [n for s in starts for n in s.args[0]]
    keys = [k for s in starts for k in s.args[1]]
    old = [item for s in starts for item in items_of(wait_of(s))]
    values = [v for s in starts for v in s.meta["val"]]
    with graph.inserting_before(at):
        start, _, items = insert_pair(graph, begin, end, inputs, keys, values)
    for previous, item in zip(old, items, strict=True):
        if previous is None:
            graph.erase_node(item)
        else:
            previous.replace_all_uses_with(item)
            graph.erase_node(previous)
    for s in starts:
        graph.erase_node(wait_of(s))
        graph.erase_node(s)
    return start


__all__ = [
    "EXCHANGES",
    "GATHERED",
    "HELD",
    "KEPT",
    "ON_HOST",
    "REDUCE_GRAD",
    "ROWS",
    "ROWS_EXPECTED",
    "STATIC",
    "UNSHARD",
    "UNSHARD_EXPERTS",
    "WANTED",
    "calls",
    "combine_start",
    "counts_start",
    "dispatch_start",
    "even_start",
    "exchange_wait",
    "first_user",
    "gather_start",
    "gather_wait",
    "insert_pair",
    "is_packed",
    "items_of",
    "keep_in_node",
    "mean_start",
    "merge_pairs",
    "open_starts",
    "over_of",
    "positions",
    "reduce_start",
    "reduce_wait",
    "rounding_errors",
    "spec_of",
    "specs_of",
    "wait_of",
]
