"""A joint graph as the solver sees it: what each value of the forward weighs, and what it costs to make it again."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx as fx
from torch.utils.checkpoint import CheckpointPolicy

from dspass.passes.base import Holding, Pass
from dspass.passes.cost import seconds_again
from dspass.passes.devices import Device
from dspass.passes.kernels import Stretch, fuses, is_tuple, is_view, size_of
from dspass.passes.nodes import GATHERED
from dspass.planner.mincut import Value, Way
from dspass.runtime.exchange import MARKERS
from dspass.runtime.params import ParamSpec, lookup
from dspass.runtime.traffic import gather_cost

#: A collective is not run again: what it brought is kept.
_COLLECTIVES = MARKERS | {
    torch.ops.dspass.gather_experts.default,
    torch.ops.dspass.reduce_experts.default,
}

#: How much dearer an early value is to save than a late one: equal layers then change sides one after another, the first first.
#: What is computed again early in the forward is needed late in the backward, when other saved values are gone.
EARLY = 0.02


@dataclass(frozen=True)
class Held:
    """A way in which the pass ``by`` holds a value."""

    by: str
    holding: Holding


def values_of(
    joint: fx.Graph,
    forward: Sequence[fx.Node],
    num_fwd_outputs: int,
    free: frozenset[fx.Node],
    on: Device,
    regather: float = 0.0,
    levers: Sequence[Pass] = (),
    repeats: float = 1.0,
) -> tuple[list[Value], list[tuple[Held, ...]]]:
    """The values of ``forward``, the nodes in order that depend on no gradient, and the ways in which ``levers`` hold each
    (:func:`in_ways`).

    The forward's own outputs do not need all of them: not a dropout's mask, which has to be saved all the same.

    ``free`` are placeholders that take no memory to keep, such as parameters. A whole parameter's copy is a value like any
    other where the backward gathers it anew (ZeRO stage 3): kept it takes its bytes, dropped ``regather`` of the time of its
    all-gather, the share that compute does not hide. With it everything between stages 2 and 3 can be chosen. A person's
    own wishes stand in the nodes: ``torch.utils.checkpoint`` and its policies mark what must be saved and what must be
    computed again.

    Time is that of what goes through memory, as :mod:`dspass.passes.kernels` sees it. To save a value that the forward would
    fuse writes it there, and what is fused in the backward reads it there, where a product would read it in any case. To
    compute a fused value again costs its functions, and to write it where a product reads it. One that is read in several
    places is computed in each of them, and reads all it is made of there, where the value itself would be one read:
    ``repeats`` more times, which is no sum over values but how many of its readers are in one kernel.

    Where a lever rounds, places that were found among numbers (:func:`_is_place`) are saved: they would be found among rounded
    ones.
    """
    inside = set(forward)
    number = {node: i for i, node in enumerate(forward)}
    output = joint.find_nodes(op="output")[0]
    gradients = {a for a in output.args[0][num_fwd_outputs:] if isinstance(a, fx.Node)}
    results = {a for a in output.args[0][:num_fwd_outputs] if isinstance(a, fx.Node)}
    written = Stretch(forward, free, results).materialised
    by_products, by_fused = _read_behind(joint, inside)
    rounding = [p for p in levers if not p.keeps_numbers]
    may_round = any(p.hold(node, on) is not None for p in rounding for node in forward)
    found, others = [], []
    for i, node in enumerate(forward):
        needed = node in gradients or any(u.op != "output" and u not in inside for u in node.users)
        wish = node.meta.get("recompute")
        again = wish in (CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE)
        # A tuple is never saved itself: what is taken from it decides.
        recomputable = again or is_tuple(node) or (wish is not CheckpointPolicy.MUST_SAVE and can_recompute(node))
        if may_round and recomputable and not again and _is_place(node):
            recomputable = False
        size = size_of(node)
        gather = regather * _gather_seconds(node, on)
        passes = (node not in written) + (node in by_fused or node not in by_products)
        computing = seconds_again(node, on) + _passes_again(node, node in by_products, repeats) * size / on.memory
        found.append(
            Value(
                bytes=0 if node in free and not gather else size,
                seconds=gather or computing,
                save_seconds=on.fresh * size * bool(gather)
                if node.op == "placeholder"
                else passes * size / on.memory + on.fresh * size,
                inputs=tuple(number[a] for a in node.all_input_nodes if a in number),
                needed=needed,
                savable=not recomputable or not (again or is_view(node) or is_tuple(node)),
                recomputable=recomputable or gather > 0,
                weight=1 + EARLY * (1 - i / len(forward)),
            )
        )
        # What the caller holds stays where it is. What must be saved may be in any way that brings it back as it was: a pass
        # that rounds leaves alone what a person wants.
        movable = found[-1].savable and found[-1].bytes and node.op == "call_function" and node not in results
        holdings = [(p.name, p.hold(node, on)) for p in levers] if movable else []
        others.append(tuple(Held(name, holding) for name, holding in holdings if holding is not None))
    return found, others


def in_ways(values: Sequence[Value], others: Sequence[tuple[Held, ...]], share: float) -> list[Value]:
    """``values`` with the ways of ``others``, when ``share`` of the time of copies to and from the host is not hidden.

    Of equal layers the first is copied first: its values wait longest (:data:`EARLY`).
    """
    return [
        replace(
            value,
            ways=tuple(
                Way(
                    bytes=held.holding.bytes,
                    seconds=value.save_seconds
                    + held.holding.seconds
                    + share * (1 + EARLY * i / len(values)) * held.holding.link_seconds,
                )
                for held in theirs
            ),
        )
        if theirs
        else value
        for i, (value, theirs) in enumerate(zip(values, others, strict=True))
    ]


def _passes_again(node: fx.Node, is_written: bool, repeats: float) -> float:
    """How often computing a fused value again goes through as much memory as it takes, beyond reading one of its inputs."""
    if not fuses(node):
        return 0.0
    as_large = sum(size_of(source) >= size_of(node) for source in node.all_input_nodes)
    return is_written + (repeats * max(as_large - 1, 0) if len(node.users) > 1 else 0.0)


def _read_behind(joint: fx.Graph, inside: set[fx.Node]) -> tuple[set[fx.Node], set[fx.Node]]:
    """Nodes of ``inside`` that the rest of ``joint`` reads, also through views: those that operators do which do not fuse, and
    those that others do."""
    products: set[fx.Node] = set()
    fused: set[fx.Node] = set()
    for node in reversed(joint.nodes):
        if node.op == "output" or (node in inside and not is_view(node)):
            continue
        for readers in (products, fused):
            if node in readers if is_view(node) else (node not in inside and fuses(node) is (readers is fused)):
                readers.update(node.all_input_nodes)
    return products, fused


def can_recompute(node: fx.Node) -> bool:
    """Not an input, a random number (its state is not kept), a collective, something that writes, or a size known only at run
    time."""
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return can_recompute(node.args[0])
    schema = getattr(node.target, "_schema", None)
    if node.target in _COLLECTIVES or getattr(node.target, "namespace", "") == "_c10d_functional":
        return False
    if schema is None or schema.is_mutable:
        return False
    if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) and _dropout(node) != 0:
        return False
    return all(isinstance(leaf, torch.Tensor) for leaf in _leaves(node.meta.get("val")))


def _is_place(node: fx.Node) -> bool:
    """Whether a value is integers that depend on numbers with a fraction, as the place of the largest does: made of rounded
    ones it may be another, and the gradient would go to another row."""
    if not _is(node, lambda d: not (d.is_floating_point or d.is_complex or d is torch.bool)):
        return False
    source = node.args[0] if node.target is operator.getitem else node
    assert isinstance(source, fx.Node)
    masks = [a for a in source.all_input_nodes if _is(a, lambda d: d is torch.bool)]
    made_of = [*source.all_input_nodes, *(a for mask in masks for a in mask.all_input_nodes)]
    return any(_is(a, lambda d: d.is_floating_point) for a in made_of)


def _is(node: fx.Node, kind: Callable[[torch.dtype], bool]) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and kind(value.dtype)


def _dropout(node: fx.Node) -> Any:
    """The share that an attention drops; None for operators without that argument."""
    for i, argument in enumerate(node.target._schema.arguments):
        if argument.name == "dropout_p":
            return node.args[i] if i < len(node.args) else node.kwargs.get("dropout_p", argument.default_value)
    return None


def _leaves(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _gather_seconds(node: fx.Node, on: Device) -> float:
    """Of a whole parameter alone; its part of a bucket's latency is not counted."""
    if GATHERED not in node.meta or not is_gathered(spec := lookup(node.meta[GATHERED][0])):
        return 0.0
    cost = gather_cost([spec], "backward", "node" if spec.node_axis is not None else None)
    return cost.bytes / on.link_of(cost.span) if cost is not None else 0.0


def is_gathered(spec: ParamSpec) -> bool:
    """Whether whole copies of a parameter are made from shards of several ranks."""
    return spec.layout == "shard" and spec.shard_axis is not None and spec.shard_axis.size > 1
