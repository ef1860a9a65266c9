"""Graphs of torch.fx: made with little work, traced from functions, and completed with values."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx

from dspass.runtime.compat.fake import is_fake, without_fake_mode

#: What stands in a captured graph for ``torch.set_grad_enabled``, and where autocast begins and ends.
SETS_GRADIENTS = torch._C._set_grad_enabled
ENTERS_AUTOCAST, EXITS_AUTOCAST = torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast


def graph_module(root: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    """A graph module whose Python code is made when it is first called: of most of ours only the graph is read."""
    from torch.fx._lazy_graph_module import _LazyGraphModule

    return _LazyGraphModule(root, graph)


def fill_values(graph: fx.Graph) -> None:
    """Give nodes without ``meta["val"]`` theirs: the partitioner leaves what saves and restores the random state bare."""
    from torch._guards import detect_fake_mode
    from torch.utils._pytree import tree_map_only

    mode = detect_fake_mode([node.meta.get("val") for node in graph.find_nodes(op="placeholder")])
    for node in graph.nodes:
        if node.op != "call_function" or "val" in node.meta or mode is None:
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        with mode:
            value = node.target(*args, **kwargs)
        node.meta["val"] = tree_map_only(
            torch.Tensor, lambda t: t if detect_fake_mode([t]) is mode else mode.from_tensor(t), value
        )


def traced(
    function: Callable[..., Any], values: Sequence[Any], decompositions: Mapping[Any, Any] | None = None
) -> fx.GraphModule:
    """``function`` in ATen operators that write nothing in place, for fake ``values`` of another trace than the one at hand; no
    guard comes of it."""
    from torch.fx.experimental.proxy_tensor import make_fx

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch._guards.tracing(None))
        stack.enter_context(without_fake_mode())
        stack.enter_context(torch.no_grad())
        mode = next((v.fake_mode for v in values if is_fake(v)), None)
        if mode is not None:
            stack.enter_context(mode)
            if mode.shape_env is not None:
                stack.enter_context(mode.shape_env.suppress_guards())
        bare = [v.detach() if isinstance(v, torch.Tensor) else v for v in values]
        return make_fx(torch.func.functionalize(function), decomposition_table=decompositions)(*bare)
