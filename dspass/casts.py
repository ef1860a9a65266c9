"""With bf16 or fp16, a model's own inputs in fp32 are cast as its parameters are."""

from __future__ import annotations

import contextlib
import operator
from typing import Any

import torch
import torch.fx as fx
from torch import nn

from dspass.config import Config
from dspass.passes.captured_cost import call
from dspass.runtime import compat
from dspass.shard import precision


def inputs_to_cast(gm: fx.GraphModule, config: Config) -> list[int]:
    """With bf16 or fp16: which inputs are the model's own, in fp32; they are cast as its parameters are."""
    if not (config.bf16 or config.fp16) or compat.in_resumed_frame():
        return []
    found = []
    for i, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        source, value = compat.placeholder_source(node), node.meta.get("example_value")
        if source is None or "_parameters[" in source or "_buffers[" in source:
            continue
        if isinstance(value, torch.Tensor) and value.dtype == torch.float32 and not isinstance(value, nn.Parameter):
            found.append(i)
    return found


def cast_inputs(gm: fx.GraphModule, config: Config) -> None:
    """Cast :func:`inputs_to_cast` in the graph, where values are told anew: products of two precisions, which have none on a
    device, had the wrong one."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    changed = set()
    for node in (placeholders[i] for i in inputs_to_cast(gm, config)):
        with gm.graph.inserting_after(placeholders[-1]):
            cast = gm.graph.call_method("to", (node, half(config)))
        cast.meta["example_value"] = node.meta["example_value"].to(half(config))
        node.replace_all_uses_with(cast, delete_user_cb=lambda user, cast=cast: user is not cast)
        changed.add(cast)
    if changed:
        _evaluate_readers(gm, changed)
    gm.recompile()


def _evaluate_readers(gm: fx.GraphModule, changed: set[fx.Node]) -> None:
    def value_of(node: fx.Node) -> Any:
        value = node.meta.get("example_value")
        return operator.attrgetter(str(node.target))(gm) if value is None and node.op == "get_attr" else value

    with compat.apart([value_of(node) for node in changed]):
        for node in gm.graph.nodes:
            if node.op in ("call_function", "call_method") and any(n in changed for n in node.all_input_nodes):
                args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), value_of)
                with contextlib.suppress(Exception):  # one without a fake, which makes what it made
                    node.meta["example_value"] = call(node, args, kwargs)
                    changed.add(node)


def half(config: Config) -> torch.dtype:
    """What fp32 is computed as."""
    return precision(config, torch.float32)
