"""Cut a captured graph into the graphs of pipeline stages.

Which nodes a stage runs and which values cross to the next is decided elsewhere (:mod:`dspass.planner.stages`); here the graph
is taken apart. A stage's graph takes, in this order, values of earlier stages, inputs of the captured graph, and this rank's
part of each parameter that it reads; it answers values for later stages, then outputs of the captured graph.

A value that is read behind the next stage is *carried*: it is part of each message that it passes, so messages go to
neighbours alone, which is what schedules order.

Dropped: ``fx.passes.split_module``, which makes one module of all stages, has every value that two stages share computed once,
and hands those that skip a stage over in a call of all of them. Dropped: to send a value straight to the stage that reads it
behind others, which is as many bytes, and an order of messages that no schedule knows of.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from dspass.runtime.params import lookup
from dspass.runtime.pipeline import Ends, Value
from dspass.runtime.sends import Packing

UNSHARD = (torch.ops.dspass.unshard, torch.ops.dspass.unshard.default)


@dataclass(kw_only=True, eq=False)
class StageGraph(Ends):
    """The graph of one stage."""

    gm: fx.GraphModule


def is_marker(node: fx.Node) -> bool:
    """Whether a node reads a parameter."""
    return node.op == "call_function" and node.target in UNSHARD


def key_of(marker: fx.Node) -> str:
    key: Any = marker.args[1]
    return key


def read_parameters(graph: fx.Graph) -> None:
    """Have markers read parameters themselves, and not the local part of a DTensor: shards become inputs of their own."""
    for marker in filter(is_marker, list(graph.nodes)):
        source: Any = marker.args[0]
        while source.op != "placeholder":
            source, made = source.all_input_nodes[0], source
            made.replace_all_uses_with(source, delete_user_cb=lambda user, marker=marker: user is marker)
            if not made.users:
                graph.erase_node(made)


def keep_outputs(gm: fx.GraphModule, positions: Collection[int]) -> None:
    """Have the others be None; positions stay."""
    (output,) = gm.graph.find_nodes(op="output")
    answers: Any = output.args[0]
    output.args = (tuple(a if i in positions else None for i, a in enumerate(answers)),)


def split_stages(
    gm: fx.GraphModule,
    nodes: Sequence[Sequence[fx.Node]],
    crossing: Sequence[Sequence[fx.Node]],
    stage_of: Mapping[fx.Node, int],
    packing: Packing | None = None,
) -> list[StageGraph]:
    """The graphs of all stages: of the ``nodes`` that each of them runs, in order, and the values ``crossing`` from each to the
    next. ``stage_of`` has the stage that makes a value, of those that one alone makes; the last stage makes the other outputs.
    With a ``packing`` values travel in few bits.

    Outputs that are no tensors of their own (an input, a constant) belong to nobody and are in no ``results``.
    """
    graph = gm.graph
    order = {node: i for i, node in enumerate(graph.nodes)}
    position = {node: i for i, node in enumerate(graph.find_nodes(op="placeholder"))}
    (output,) = graph.find_nodes(op="output")
    answers: Sequence[Any] = output.args[0]
    stages = len(nodes)
    results: list[list[int]] = [[] for _ in range(stages)]
    for i, answer in enumerate(answers):
        if isinstance(answer, fx.Node) and answer.op != "placeholder":
            results[stage_of.get(answer, stages - 1)].append(i)
    trains = _with_gradients(graph)
    values = {n: _value(n, n in trains, packing) for message in crossing for n in message}
    found = []
    for s in range(stages):
        before = crossing[s - 1] if s else ()
        after = crossing[s] if s < stages - 1 else ()
        made = [n for n in after if stage_of[n] == s]
        targets = [*made, *(answers[i] for i in results[s])]
        mine = sorted({*nodes[s], *_missing(targets, {*nodes[s], *before})}, key=order.__getitem__)
        reads = [
            n for n in before if any(n in node.all_input_nodes for node in mine if not is_marker(node)) or n in targets
        ]
        extracted, inputs, keys = _extract(gm, mine, reads, targets)
        found.append(
            StageGraph(
                index=s,
                gm=extracted,
                received=tuple(values[n] for n in before),
                sent=tuple(values[n] for n in after),
                reads=tuple(n.name for n in reads),
                makes=tuple(n.name for n in made),
                inputs=tuple(position[n] for n in inputs),
                keys=tuple(keys),
                results=tuple(results[s]),
            )
        )
    return found


def _missing(targets: Sequence[fx.Node], have: set[fx.Node]) -> set[fx.Node]:
    """What ``targets`` are made of beside what is there: of outputs that are made of inputs alone."""
    found: set[fx.Node] = set()
    todo = list(targets)
    while todo:
        node = todo.pop()
        if node not in have and node not in found:
            found.add(node)
            todo += node.all_input_nodes
    return found


def _extract(
    gm: fx.GraphModule, nodes: Sequence[fx.Node], reads: Sequence[fx.Node], targets: Sequence[fx.Node]
) -> tuple[fx.GraphModule, list[fx.Node], list[str]]:
    """A graph of its own of ``nodes``, with the captured graph's inputs and the keys of parameters that it takes."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    markers = [n for n in nodes if is_marker(n)]
    used = {s for n in nodes if not is_marker(n) for s in n.all_input_nodes}
    inputs = [n for n in nodes if n.op == "placeholder" and (n in used or n in targets)]
    keys = list(dict.fromkeys(map(key_of, markers)))
    for node in (*reads, *inputs):
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    shards = {key: graph.placeholder(f"shard_{i}") for i, key in enumerate(keys)}
    for node in nodes:
        if is_marker(node):
            copies[node] = graph.call_function(torch.ops.dspass.unshard.default, (shards[key_of(node)], key_of(node)))
            copies[node].meta = dict(node.meta)
        elif node not in copies and node.op != "placeholder":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[n] for n in targets))
    return fx.GraphModule(gm, graph), inputs, keys


def _with_gradients(graph: fx.Graph) -> set[fx.Node]:
    """Values that the gradient of a loss passes through: floating, and made of a parameter that trains."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        value = node.meta.get("example_value")
        if isinstance(value, torch.Tensor) and not value.dtype.is_floating_point:
            continue
        if is_marker(node):
            if lookup(key_of(node)).trains:
                found.add(node)
        elif any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def _value(node: fx.Node, has_gradient: bool, packing: Packing | None) -> Value:
    return Value.like(node.name, node.meta["example_value"], has_gradient, packing)


__all__ = ["StageGraph", "is_marker", "keep_outputs", "key_of", "read_parameters", "split_stages"]
