"""From the joint graph to forward and backward: Inductor's min-cut, then shards saved in place of whole parameters.

This is no pass: it makes two graphs of one. After :class:`ExposeParameters` the min-cut sees whole parameters as inputs,
free to save. What it wants to save of them, the parameter itself or a view, a cast or any value made of parameters only,
is made anew in the backward graph from the shards, which are inputs of the step and take no memory to keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx

from dspass.passes.nodes import GATHERED, first_user, positions
from dspass.runtime import compat


def partition(
    joint: fx.GraphModule,
    inputs: Any,
    num_fwd_outputs: int,
    free_inputs: Sequence[int] = (),
    *,
    recompute_pointwise: bool = False,
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Split ``joint``. The first ``num_fwd_outputs`` outputs are the forward's own; ``free_inputs`` cost nothing to save."""
    placeholders = joint.graph.find_nodes(op="placeholder")
    exposed = [i for i, node in enumerate(placeholders) if GATHERED in node.meta]
    forward, backward = compat.min_cut_partition(
        joint, inputs, num_fwd_outputs, sorted({*free_inputs, *exposed}), recompute_pointwise
    )
    save_shards(forward.graph, backward.graph, num_fwd_outputs)
    forward.recompile()
    backward.recompile()
    return forward, backward


def save_shards(forward: fx.Graph, backward: fx.Graph, num_fwd_outputs: int) -> None:
    """Hand shards, not whole parameters or what was made of them, from the forward to the backward graph."""
    output = forward.find_nodes(op="output")[0]
    outputs = list(output.args[0])
    saved = outputs[num_fwd_outputs:]
    received = backward.find_nodes(op="placeholder")[: len(saved)]
    inputs = {node.name: node for node in forward.find_nodes(op="placeholder")}

    kept: list[tuple[fx.Node, fx.Node]] = []
    remade: dict[fx.Node, fx.Node] = {}  # value in the forward graph -> placeholder in the backward graph
    for value, placeholder in zip(saved, received, strict=True):
        if isinstance(value, fx.Node) and _made_of_parameters(value):
            remade[value] = placeholder
        else:
            kept.append((value, placeholder))
    if not remade:
        return

    # The shards that the backward graph needs, saved once each, behind the other tensors.
    copies: dict[fx.Node, fx.Node] = {}
    # AOTAutograd's order: tensors, then opaque objects (a DTensor's mesh, from torch 2.13), then symbolic sizes.
    end = next((i for i, (v, _) in enumerate(kept) if not isinstance(v.meta.get("val"), torch.Tensor)), len(kept))
    held = {value.name: placeholder for value, placeholder in kept if isinstance(value, fx.Node)}
    first_other = (
        backward.find_nodes(op="placeholder")[len(saved)]
        if len(backward.find_nodes(op="placeholder")) > len(saved)
        else next(n for n in backward.nodes if n.op != "placeholder")
    )
    anchor = kept[end][1] if end < len(kept) else first_other
    body = next(n for n in backward.nodes if n.op != "placeholder")
    for value in remade:
        for leaf in _leaves(value):
            if leaf in copies:
                continue
            local = inputs[leaf.meta[GATHERED][1]]
            if local.name not in held:
                with backward.inserting_before(anchor):
                    shard = backward.placeholder(local.name)
                shard.meta = dict(local.meta)
                held[local.name] = shard
                kept.insert(end, (local, shard))
                end += 1
            with backward.inserting_before(body):
                whole = backward.placeholder(f"{leaf.name}_again")
            whole.meta = dict(leaf.meta)
            whole.meta[GATHERED] = (leaf.meta[GATHERED][0], held[local.name].name)
            copies[leaf] = whole

    # Right before the first use, in the order of these: at the top every parameter would be gathered there.
    order = positions(backward)
    uses = {p: first_user(p, order) if p.users else body for p in remade.values()}
    for value, placeholder in sorted(remade.items(), key=lambda pair: order[uses[pair[1]]]):
        with backward.inserting_before(uses[placeholder]):
            copy = _copy_into(backward, value, copies)
        placeholder.replace_all_uses_with(copy)
        backward.erase_node(placeholder)
    output.args = (tuple(outputs[:num_fwd_outputs]) + tuple(value for value, _ in kept),)
    forward.eliminate_dead_code()


def _leaves(value: fx.Node) -> list[fx.Node]:
    seen: dict[fx.Node, None] = {}
    found: dict[fx.Node, None] = {}
    stack = [value]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen[node] = None
        if node.op == "placeholder":
            found[node] = None
        stack.extend(node.all_input_nodes)
    return list(found)


def _made_of_parameters(value: fx.Node) -> bool:
    """Whether ``value`` depends on whole parameters and on nothing else, through operators that always answer alike."""
    leaves = _leaves(value)
    if not leaves or not all(GATHERED in leaf.meta for leaf in leaves):
        return False
    stack = [value]
    while stack:
        node = stack.pop()
        if node.op == "placeholder":
            continue
        if node.op != "call_function" or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            return False
        stack.extend(node.all_input_nodes)
    return True


def _copy_into(graph: fx.Graph, value: fx.Node, copies: dict[fx.Node, fx.Node]) -> fx.Node:
    if value not in copies:
        for source in value.all_input_nodes:
            _copy_into(graph, source, copies)
        copies[value] = graph.node_copy(value, copies.__getitem__)
    return copies[value]
