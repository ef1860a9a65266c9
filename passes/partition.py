"""From the joint graph to forward and backward: Inductor's min-cut, then shards saved in place of whole parameters.

This is no pass: it makes two graphs of one. After :class:`ExposeParameters` the min-cut sees whole parameters as inputs,
free to save. What it wants to save of them, the parameter itself or a view, a cast or any value made of parameters only,
is made anew in the backward graph from the shards, which are inputs of the step and take no memory to keep. But where the
planner keeps a whole copy, that is handed over, and the backward gathers it no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx
from torch.utils.checkpoint import CheckpointPolicy

from dspass.passes.nodes import GATHERED, KEPT, WANTED, first_user, positions
from dspass.runtime import compat


def partition(
    joint: fx.GraphModule,
    inputs: Any,
    num_fwd_outputs: int,
    free_inputs: Sequence[int] = (),
    *,
    recompute_pointwise: bool = False,
    choose: compat.Chooser | None = None,
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Split ``joint``. The first ``num_fwd_outputs`` outputs are the forward's own; ``free_inputs`` cost nothing to save.

    ``choose``, the planner's, says which nodes are saved in place of Inductor's min-cut, and marks whole parameters whose
    copies are ``KEPT``.
    """
    placeholders = joint.graph.find_nodes(op="placeholder")
    for node in joint.graph.nodes:
        if node.meta.get("recompute") is CheckpointPolicy.MUST_SAVE:
            node.meta[WANTED] = True
    exposed = [i for i, node in enumerate(placeholders) if GATHERED in node.meta]
    forward, backward = compat.min_cut_partition(
        joint, inputs, num_fwd_outputs, sorted({*free_inputs, *exposed}), recompute_pointwise, choose
    )
    compat.fill_values(forward.graph)
    saved = forward.graph.find_nodes(op="output")[0].args[0][num_fwd_outputs:]
    for value, placeholder in zip(saved, received_by(backward.graph, saved), strict=True):
        if "val" not in placeholder.meta:
            placeholder.meta["val"] = value.meta["val"]
    compat.fill_values(backward.graph)
    order_saved(forward.graph, backward.graph, num_fwd_outputs)
    save_shards(forward.graph, backward.graph, num_fwd_outputs)
    forward.recompile()
    backward.recompile()
    return forward, backward


def order_saved(forward: fx.Graph, backward: fx.Graph, num_fwd_outputs: int) -> None:
    """Put saved values into the order that AOTAutograd counts on: tensors, then opaque objects, then symbolic sizes.

    The partitioner appends random states, which are tensors, behind everything else.
    """
    output = forward.find_nodes(op="output")[0]
    outputs = list(output.args[0])
    saved = outputs[num_fwd_outputs:]
    said = list(output.meta.get("desc") or [None] * len(outputs))[num_fwd_outputs:]
    received = received_by(backward, saved)

    def rank(i: int) -> int:
        if isinstance(saved[i].meta.get("val"), torch.Tensor):
            return 0 if _is_watched(saved[i], said[i]) else 1
        return 3 if _is_size(saved[i]) else 2

    order = sorted(range(len(saved)), key=rank)
    if order == list(range(len(saved))):
        return
    output.args = ((*outputs[:num_fwd_outputs], *(saved[i] for i in order)),)
    if "desc" in output.meta:
        output.meta["desc"] = [*output.meta["desc"][:num_fwd_outputs], *(said[i] for i in order)]
    sizes = [i for i in order if _is_size(saved[i])]
    anchor = max(received).next
    for i in [*sizes, *(i for i in order if i not in sizes)]:
        anchor.prepend(received[i])


def save_shards(forward: fx.Graph, backward: fx.Graph, num_fwd_outputs: int) -> None:
    """Hand shards, not whole parameters or what was made of them, from the forward to the backward graph; whole ones where
    they are ``KEPT``."""
    output = forward.find_nodes(op="output")[0]
    outputs = list(output.args[0])
    said = list(output.meta.get("desc") or [None] * len(outputs))
    saved, places = outputs[num_fwd_outputs:], received_by(backward, outputs[num_fwd_outputs:])
    inputs = {node.name: node for node in forward.find_nodes(op="placeholder")}

    kept: list[tuple[fx.Node, fx.Node]] = []
    kept_said: list[Any] = []
    remade: dict[fx.Node, fx.Node] = {}  # value in the forward graph -> placeholder in the backward graph
    for value, placeholder, desc in zip(saved, places, said[num_fwd_outputs:], strict=True):
        if isinstance(value, fx.Node) and made_of_parameters(value):
            remade[value] = placeholder
            said_of_tensor = desc
        else:
            kept.append((value, placeholder))
            kept_said.append(desc)
    if not remade:
        return

    # The shards that the backward graph needs, saved once each, behind the other tensors that autograd watches for in-place
    # changes: what follows them are tensors that it need not watch, opaque objects and symbolic sizes.
    copies: dict[fx.Node, fx.Node] = {}
    end = next(
        (i for i, ((v, _), d) in enumerate(zip(kept, kept_said, strict=True)) if not _is_watched(v, d)), len(kept)
    )
    held = {value.name: placeholder for value, placeholder in kept if isinstance(value, fx.Node)}
    placeholders = backward.find_nodes(op="placeholder")
    if end:
        anchor = kept[end - 1][1].next
    else:  # behind the symbolic sizes, which come first
        sizes = sum(_is_size(v) for v in saved)
        anchor = placeholders[sizes] if sizes < len(placeholders) else placeholders[-1].next
    body = next(n for n in backward.nodes if n.op != "placeholder")
    for value in remade:
        for leaf in _leaves(value):
            if leaf in copies:
                continue
            key, local_name = leaf.meta[GATHERED]
            given = leaf if KEPT in leaf.meta else inputs[local_name]
            if given.name not in held:
                with backward.inserting_before(anchor):
                    received = backward.placeholder(given.name)
                received.meta = {k: v for k, v in given.meta.items() if k != GATHERED}
                held[given.name] = received
                kept.insert(end, (given, received))
                kept_said.insert(end, said_of_tensor)
                end += 1
            if given is leaf:
                copies[leaf] = held[given.name]
                continue
            with backward.inserting_before(body):
                whole = backward.placeholder(f"{leaf.name}_again")
            whole.meta = dict(leaf.meta)
            whole.meta[GATHERED] = (key, held[local_name].name)
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
    if "desc" in output.meta:
        output.meta["desc"] = [*said[:num_fwd_outputs], *kept_said]
    forward.eliminate_dead_code()


def received_by(backward: fx.Graph, saved: Sequence[Any]) -> list[fx.Node]:
    """The backward graph's placeholders of ``saved``: its symbolic sizes come first there, and last in the forward's."""
    placeholders = backward.find_nodes(op="placeholder")[: len(saved)]
    sizes = sum(_is_size(value) for value in saved)
    return placeholders[sizes:] + placeholders[:sizes]


def _is_size(value: Any) -> bool:
    return isinstance(value, fx.Node) and isinstance(
        value.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool)
    )


def _is_watched(value: Any, desc: Any) -> bool:
    is_tensor = isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor)
    return is_tensor and "NoVcCheck" not in type(desc).__name__


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


def made_of_parameters(value: fx.Node) -> bool:
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
