"""Quantisation-aware training: which layers read what rounded, and the roundings put into a captured graph.

The graph that Dynamo captures still shows layers as a person wrote them: ``linear(x, weight, bias)``, with the parameter
itself for ``weight``. There each chosen weight is read through ``dspass::fake_quantise``
(:mod:`dspass.runtime.fake_quantise`), and so is what a chosen layer multiplies with it; autograd then makes the backward, with
gradients that go straight through and products that read what the forward read. A rounded weight is made of a parameter
alone, so that :mod:`dspass.passes.partition` saves none and rounds again in the backward, behind the gather.

Dropped: a pass on the joint graph. A product's input is there a value as any other, and which product of the backward reads
it for which weight is not said: a mistake would be a wrong gradient and no error. Dropped: modules that are replaced, as
DeepSpeed's, or hooks on them: they change the model that a person holds, its ``state_dict`` or what Dynamo guards.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import nn

from dspass.config import Config, ConfigError, RoundedActivations, RoundedGroup
from dspass.report import RoundedLayer
from dspass.runtime.engine import Engine
from dspass.runtime.fake_quantise import Schedule
from dspass.runtime.params import lookup
from dspass.runtime.quantise import DTYPES
from dspass.weights import is_conv1d

log = logging.getLogger(__name__)

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

#: Functions that multiply with a weight: the place of what they multiply, that of the weight, and of the former the last dims
#: that are multiplied with one value of the output.
_PRODUCTS: Mapping[Any, tuple[int, int, int]] = {
    F.linear: (0, 1, 1),
    torch.addmm: (1, 2, 1),
    torch.conv1d: (0, 1, 2),
    torch.conv2d: (0, 1, 3),
    torch.conv3d: (0, 1, 4),
}


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """How one layer's weight, or what it multiplies with it, is rounded. ``scales``: of a weight, how many divide its values;
    None: one an output channel. ``channels`` is the dim of these."""

    name: str
    schedule: Schedule
    symmetric: bool
    scales: int | None = None
    channels: int = 0


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """By the identity of a weight: how it is rounded, and how what it is multiplied with."""

    weights: Mapping[int, Rounding]
    inputs: Mapping[int, Rounding]


def choose(root: nn.Module, config: Config) -> Chosen:
    """The layers of ``root`` that ``compression_training`` names.

    Raises ``ConfigError`` for a pattern that finds no layer, a layer in two groups, and scales that do not divide a weight.
    """
    weights = dict(_weights(root, config)) if config.rounded_weights.enabled else {}
    inputs = dict(_inputs(root, config)) if config.rounded_activations.enabled else {}
    return Chosen(weights=weights, inputs=inputs)


def _weights(root: nn.Module, config: Config) -> Iterator[tuple[int, Rounding]]:
    section = config.rounded_weights
    kinds = (nn.Linear, nn.Embedding, *_CONVOLUTIONS)
    for weight, name, module, group in _layers(root, section, kinds):
        scales = section.quantize_groups
        if scales is not None and weight.numel() % scales:
            raise ConfigError(
                f"{section.section}.shared_parameters.quantize_groups",
                f"{scales} scales do not divide the {weight.numel()} values of {name}.weight.",
                "Remove it for one scale an output channel.",
            )
        schedule = Schedule(
            offset=section.schedule_offset,
            start_bits=group.start_bits,
            target_bits=group.target_bits,
            period=group.period,
        )
        how = Rounding(
            name=f"{name}.weight".lstrip("."),
            schedule=schedule,
            symmetric=section.quantization_type == "symmetric",
            scales=scales,
            channels=1 if is_conv1d(module) else 0,
        )
        yield id(weight), how


def _inputs(root: nn.Module, config: Config) -> Iterator[tuple[int, Rounding]]:
    section = config.rounded_activations
    for weight, name, _, group in _layers(root, section, (nn.Linear, *_CONVOLUTIONS)):
        bits = group.target_bits
        schedule = Schedule(offset=section.schedule_offset, start_bits=bits, target_bits=bits)
        yield id(weight), Rounding(name=name, schedule=schedule, symmetric=section.quantization_type == "symmetric")


def _layers(
    root: nn.Module, section: RoundedActivations, kinds: tuple[type[nn.Module], ...]
) -> Iterator[tuple[torch.Tensor, str, nn.Module, RoundedGroup]]:
    """Each weight that a group of ``section`` names, once, with the first layer that holds it."""
    held: list[tuple[torch.Tensor, str, nn.Module]] = []
    for name, module in root.named_modules():
        weight = module._parameters.get("weight")
        if (isinstance(module, kinds) or is_conv1d(module)) and weight is not None and weight.dtype in DTYPES:
            held.append((weight, name, module))
    taken: dict[int, tuple[str, RoundedGroup]] = {}
    for group in section.groups or ():
        path = f"{section.section}.different_groups.{group.name}.modules"
        for pattern in group.modules:
            found = [one for one in held if pattern == "*" or re.search(pattern, one[1])]
            if not found:
                raise ConfigError(path, *_nothing_found(pattern, [name for _, name, _ in held]))
            for weight, name, module in found:
                other, before = taken.setdefault(id(weight), (name, group))
                if before is not group:
                    raise ConfigError(
                        path,
                        f"{name} is in two groups, as {other} is in {before.name!r}"
                        + ("." if other == name else ", whose weight it shares."),
                        "Write patterns of which one alone finds it.",
                    )
                if other == name and weight.numel():
                    yield weight, name, module, group


def _nothing_found(pattern: str, names: list[str]) -> tuple[str, str]:
    if not names:
        return f"{pattern!r} finds no layer: none has a floating-point weight.", "Remove the section."
    return (
        f"{pattern!r} finds no layer; there are {len(names)}, {names[0]!r} the first.",
        'Patterns are regular expressions, found anywhere in a name, such as "layers.*mlp"; "*" alone takes all.',
    )


def round_layers(gm: fx.GraphModule, whole: Mapping[fx.Node, str], chosen: Chosen, engine: Engine) -> None:
    """Put the roundings of ``chosen`` into a captured graph. The markers in it are whole parameters; so is each node of
    ``whole``, with the key of its parameter."""
    for param in _round(gm, whole, chosen, engine):
        how = chosen.inputs.get(param)
        if how is not None and ("activation", how.name) not in engine.roundings:
            log.warning("What %s multiplies stays whole: its weight is read by no product that is known.", how.name)


def _round(gm: fx.GraphModule, whole: Mapping[fx.Node, str], chosen: Chosen, engine: Engine) -> set[int]:
    """Answers the identities of the parameters that are read."""
    whole = {**whole, **_markers(gm.graph)}
    found: set[int] = set()
    bodies = dict(_bodies(gm))
    for call, body in bodies.items():
        given = zip(body.graph.find_nodes(op="placeholder"), call.args[1:], strict=True)
        inside = {node: whole[value] for node, value in given if isinstance(value, fx.Node) and value in whole}
        found |= _round(body, inside, chosen, engine)
    read: dict[int, list[tuple[fx.Node, str]]] = {}
    for node, key in whole.items():
        read.setdefault(id(lookup(key).param()), []).append((node, key))
    for param, nodes in read.items():
        for node, key in nodes:
            users = [user for user in node.users if user not in bodies]
            # What is multiplied goes first: later the products read another node.
            if users and param in chosen.inputs:
                _round_inputs(gm.graph, node, key, chosen.inputs[param], engine)
            if users and param in chosen.weights:
                _round_weight(gm.graph, node, users, key, chosen.weights[param], engine)
    gm.recompile()
    return found | read.keys()


def _markers(graph: fx.Graph) -> dict[fx.Node, str]:
    targets = (torch.ops.dspass.unshard, torch.ops.dspass.unshard.default)
    found = [n for target in targets for n in graph.find_nodes(op="call_function", target=target)]
    return {node: cast(str, node.args[1]) for node in found}


def _bodies(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, fx.GraphModule]]:
    """Calls of graphs that stand in this one, as those of ``torch.utils.checkpoint``, which are given what these read. One that
    is called twice reads what is rounded outside."""
    calls: dict[str, list[fx.Node]] = {}
    for node in gm.graph.find_nodes(op="get_attr"):
        calls.setdefault(str(node.target), []).extend(node.users)
    for name, users in calls.items():
        body = getattr(gm, name, None)
        if isinstance(body, fx.GraphModule) and len(users) == 1:
            (call,) = users
            if len(body.graph.find_nodes(op="placeholder")) == len(call.args) - 1:
                yield call, body


def _round_inputs(graph: fx.Graph, weight: fx.Node, key: str, how: Rounding, engine: Engine) -> None:
    for product in [user for user in weight.users if user.target in _PRODUCTS]:
        x_place, weight_place, dims = _PRODUCTS[product.target]
        if len(product.args) <= weight_place or product.args[weight_place] is not weight:
            continue
        x: Any = product.args[x_place]
        with graph.inserting_before(product):
            product.update_arg(x_place, _rounded(graph, x, key, how, list(range(-dims, 0))))
        engine.roundings["activation", how.name] = how.schedule


def _round_weight(
    graph: fx.Graph, weight: fx.Node, users: list[fx.Node], key: str, how: Rounding, engine: Engine
) -> None:
    shape = lookup(key).shape
    with graph.inserting_before(min(users)):
        if how.scales is None:
            rounded = _rounded(graph, weight, key, how, [dim for dim in range(len(shape)) if dim != how.channels])
        else:
            shape = shape[::-1] if how.channels else shape
            turned = graph.call_method("t", (weight,)) if how.channels else weight
            rows = graph.call_method("reshape", (turned, how.scales, -1))
            rounded = graph.call_method("reshape", (_rounded(graph, rows, key, how, [1]), shape))
            rounded = graph.call_method("t", (rounded,)) if how.channels else rounded
    for user in users:
        user.replace_input_with(weight, rounded)
    engine.roundings["weight", how.name] = how.schedule


def _rounded(graph: fx.Graph, x: fx.Node, key: str, how: Rounding, over: list[int]) -> fx.Node:
    param, s = lookup(key).param(), how.schedule
    assert param is not None
    levels = graph.call_function(
        torch.ops.dspass.levels, (key, s.offset, s.start_bits, s.target_bits, s.period, param.device)
    )
    return graph.call_function(torch.ops.dspass.fake_quantise, (x, levels, over, how.symmetric))


def rounded_layers(engine: Engine) -> list[RoundedLayer]:
    """Of each rounding in the graphs of ``engine`` what a report shows."""
    return [
        RoundedLayer(
            name=name,
            kind=kind,
            bits=schedule.bits(engine.steps),
            start_bits=schedule.start_bits,
            target_bits=schedule.target_bits,
            begins=schedule.offset,
        )
        for (kind, name), schedule in sorted(
            engine.roundings.items(), key=lambda one: (one[0][0] != "weight", one[0][1])
        )
    ]
