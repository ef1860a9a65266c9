"""What a choice does to a graph's values, for a person: by class, and one by one for the largest."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.fx as fx

from dspass.passes.nodes import GATHERED
from dspass.passes.text import print_value
from dspass.planner.choices import Choices
from dspass.planner.mincut import Choice
from dspass.planner.record import Setting, Tensors
from dspass.runtime.host_states import local_bytes
from dspass.runtime.params import ParamSpec, lookup

#: Single values that a plan names.
_LARGEST = 12


def classes_of(choices: Choices, i: int, setting: Setting) -> tuple[Tensors, ...]:
    """The values of choice ``i`` by their operator, the most bytes first, behind optimiser states that wait on the host."""
    found: dict[str, list[Tensors]] = {}
    choice = choices.found[i]
    for k in _by_size(choices, choice):
        one = _tensors(choices, k, choice, dict(choice.ways))
        found.setdefault(one.name.partition(" ")[0], []).append(one)
    classes = [_together(name, ones) for name, ones in found.items()]
    return (*_states_of(setting), *sorted(classes, key=lambda c: -(c.kept + c.dropped + c.held)))


def largest_of(choices: Choices, i: int) -> tuple[Tensors, ...]:
    choice = choices.found[i]
    largest = _by_size(choices, choice)[:_LARGEST]
    return tuple(_tensors(choices, k, choice, dict(choice.ways)) for k in largest)


def _together(name: str, ones: Sequence[Tensors]) -> Tensors:
    otherwise: dict[str, float] = {}
    for one in ones:
        for by, seconds in one.otherwise.items():
            otherwise[by] = otherwise.get(by, 0.0) + seconds
    return Tensors(
        name=name,
        count=len(ones),
        kept=sum(o.kept for o in ones),
        dropped=sum(o.dropped for o in ones),
        again_seconds=math.fsum(o.again_seconds or 0.0 for o in ones if o.dropped),
        held=sum(o.held for o in ones),
        held_by=", ".join(sorted({o.held_by for o in ones} - {""})),
        kept_again_seconds=math.fsum(o.kept_again_seconds for o in ones),
        fixed=sum(o.fixed for o in ones),
        otherwise=otherwise,
    )


def _by_size(choices: Choices, choice: Choice) -> list[int]:
    """What was decided of a choice's values, the largest first: not what costs nothing to keep or must be made anew."""
    values = choices.values
    decided = [k for k in (*choice.saved, *choice.recomputed) if values[k].bytes and values[k].savable]
    return sorted(decided, key=lambda k: (-values[k].bytes, k))


def _tensors(choices: Choices, k: int, choice: Choice, ways: Mapping[int, int]) -> Tensors:
    value = choices.values[k]
    way = ways.get(k)
    # What is taken from a tuple costs what the tuple does.
    seconds = value.seconds or max((choices.values[u].seconds for u in value.inputs), default=0.0)
    saved = k in choice.saved
    others = [held for w, held in enumerate(choices.ways[k]) if w != way]
    return Tensors(
        name=_label(choices.inside[k]),
        count=1,
        kept=value.bytes if saved and way is None else 0,
        dropped=0 if saved else value.bytes,
        again_seconds=seconds if value.recomputable else None,
        held=0 if way is None else value.bytes,
        held_by="" if way is None else choices.ways[k][way].by,
        kept_again_seconds=seconds if saved and value.recomputable else 0.0,
        fixed=value.bytes if saved and not value.recomputable else 0,
        otherwise={held.by: held.holding.seconds + held.holding.link_seconds for held in others},
    )


def _states_of(setting: Setting) -> tuple[Tensors, ...]:
    """Optimiser states that wait on the host, as a class of tensors."""
    return _hosted("optimizer-states", len(setting.states), setting.states_bytes, "host_states")


def parameters_of(hosted: Sequence[ParamSpec]) -> tuple[Tensors, ...]:
    """Parameters that wait on the host, as a class of tensors."""
    sizes = [local_bytes(p) for spec in hosted if (p := spec.param()) is not None]
    return _hosted("parameters", len(sizes), sum(sizes), "offload_parameters")


def _hosted(name: str, count: int, size: int, by: str) -> tuple[Tensors, ...]:
    """The class, where there is any of it."""
    one = Tensors(name=name, count=count, kept=0, dropped=0, again_seconds=None, held=size, held_by=by)
    return (one,) if count else ()


def _label(node: fx.Node) -> str:
    """The kind of a value, then the value: ``mm f32[512,1024] mm_3``, ``gathered-parameter f32[96,96] blocks.0.up.weight``."""
    value = node.meta.get("val")
    shape = print_value(value) if isinstance(value, torch.Tensor) else ""
    if GATHERED in node.meta:
        return f"gathered-parameter {shape} {lookup(node.meta[GATHERED][0]).name}"
    packet = getattr(node.target, "overloadpacket", None)
    kind = (
        "input"
        if node.op == "placeholder"
        else getattr(packet, "__name__", None) or getattr(node.target, "__name__", "")
    )
    if kind == "getitem" and isinstance(node.args[0], fx.Node):
        kind = _label(node.args[0]).partition(" ")[0]
    return f"{kind} {shape} {node.name}"
