"""What passes share that hold saved values in ways of their own (:meth:`dspass.passes.base.Pass.hold`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx

from dspass.passes.base import Pass
from dspass.passes.devices import Device
from dspass.passes.kernels import is_view
from dspass.passes.nodes import GATHERED, HELD, ROWS_EXPECTED, STATIC
from dspass.passes.partition import received_by
from dspass.runtime.host import extent


def mark_all(forward: fx.Graph, backward: fx.Graph, num_fwd_outputs: int, passes: Sequence[Pass], on: Device) -> None:
    """Without a planner: all that one of ``passes`` holds whatever it costs is held, by the first that can. What the model
    answers, the first ``num_fwd_outputs`` outputs, stays as it is."""
    outputs = forward.find_nodes(op="output")[0].args[0]
    own, saved = set(flat(outputs[:num_fwd_outputs])), outputs[num_fwd_outputs:]
    levers = [p for p in passes if p.holds_all]
    for node, placeholder in zip(saved, received_by(backward, saved), strict=True):
        if isinstance(node, fx.Node) and node not in own:
            by = next((p.name for p in levers if p.hold(node, on) is not None), None)
            if by is not None:
                node.meta = {**node.meta, HELD: by}
                placeholder.meta = {**placeholder.meta, HELD: by}


def mark_static(joint: fx.Graph, free: Sequence[int]) -> None:
    """Mark the placeholders of parameters and buffers. ``free`` counts the inputs before a DTensor became its shard and its
    mesh, which is no tensor, and before whole parameters became inputs."""
    placeholders = joint.find_nodes(op="placeholder")
    tensors = [n for n in placeholders if isinstance(n.meta.get("val"), torch.Tensor) and GATHERED not in n.meta]
    for i in free:
        tensors[i].meta[STATIC] = True


def is_of_parameter(node: fx.Node) -> bool:
    """Whether a value is made of one parameter or buffer and nothing else, such as its copy in another type."""
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return STATIC in node.meta or GATHERED in node.meta


def flat(outputs: Any) -> list[fx.Node]:
    return [n for n in outputs if isinstance(n, fx.Node)]


def last_read(node: fx.Node, order: dict[fx.Node, int]) -> int:
    """Where the last reader of a value, or of a view of it, stands; the graph's output does not count."""
    last, readers = order[node], [node]
    while readers:
        for user in readers.pop().users:
            if user.op != "output":
                last = max(last, order[user])
                if is_view(user):
                    readers.append(user)
    return last


def is_dense(node: fx.Node) -> bool:
    """Whether a value is a tensor of its own, of a size that is known, whose elements lie without gaps, which a copy keeps as
    they are."""
    value = node.meta.get("val")
    if node.op != "call_function" or GATHERED in node.meta or not isinstance(value, torch.Tensor) or is_view(node):
        return False
    if ROWS_EXPECTED in node.meta:
        return False
    return all(isinstance(size, int) for size in value.shape) and extent(value) == bytes_of(value)


def bytes_of(value: torch.Tensor) -> int:
    return value.numel() * value.element_size()
