"""With bf16 or fp16, a model's own inputs in fp32 are cast as its parameters are."""

from __future__ import annotations

import torch
import torch.fx as fx
from torch import nn

from dspass.config import Config
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
    """Cast :func:`inputs_to_cast` in the graph."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    for node in (placeholders[i] for i in inputs_to_cast(gm, config)):
        with gm.graph.inserting_after(placeholders[-1]):
            cast = gm.graph.call_method("to", (node, half(config)))
        cast.meta["example_value"] = node.meta["example_value"].to(half(config))
        node.replace_all_uses_with(cast, delete_user_cb=lambda user, cast=cast: user is not cast)
    gm.recompile()


def half(config: Config) -> torch.dtype:
    """What fp32 is computed as."""
    return precision(config, torch.float32)
