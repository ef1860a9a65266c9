"""Operators of the project that no kernel serves become their references, for Inductor to fuse.

It happens to each segment right before it is compiled: passes, the cost model and a reader of the graph see one operator, and
Inductor sees plain ones. Where a kernel is registered for the device the operator stays, and is called.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.fx as fx
from torch.fx.experimental.proxy_tensor import make_fx

from dspass.runtime import compat
from dspass.runtime.operators import operator_of


def expand(gm: fx.GraphModule, patches: Mapping[str, Any]) -> fx.GraphModule:
    """``gm``, in which each of our operators that is not served otherwise is written out. ``patches`` are Inductor settings."""
    graph = gm.graph
    for node, written in zip(_ours(graph), written_out(graph), strict=True):
        if written:
            found = operator_of(node.target)
            assert found is not None
            _write_out(graph, node, found.reference, patches)
    return gm


def written_out(graph: fx.Graph) -> tuple[bool, ...]:
    """Of each of our operators in ``graph``, whether :func:`expand` replaces it: kernels are registered at any time."""
    servers = (operator_of(n.target).server(_device_of(n)) for n in _ours(graph))  # type: ignore[union-attr]
    return tuple(server == "torch reference" for server in servers)


def _ours(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op == "call_function" and operator_of(n.target) is not None]


def _device_of(node: fx.Node) -> str:
    values = node.meta["val"]
    first = values[0] if isinstance(values, (list, tuple)) else values
    return str(first.device.type)


def _write_out(graph: fx.Graph, node: fx.Node, reference: Any, patches: Mapping[str, Any]) -> None:
    inputs = list(node.all_input_nodes)
    place = {n: i for i, n in enumerate(inputs)}

    def call(*tensors: torch.Tensor) -> Any:
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: tensors[place[n]])
        return reference(*args, **kwargs)

    values = [n.meta["val"] for n in inputs]
    with compat.mode_of(values):  # also constants are made in it
        traced = make_fx(call, decomposition_table=compat.inductor_decompositions(patches))(*values)
    with graph.inserting_before(node):
        copies: dict[fx.Node, fx.Node] = dict(zip(traced.graph.find_nodes(op="placeholder"), inputs, strict=True))
        results = graph.graph_copy(traced.graph, copies)
    if isinstance(results, fx.Node):
        node.replace_all_uses_with(results)
    else:
        for item in list(node.users):
            assert item.target is operator.getitem, f"{node.name} is read by {item.format_node()}"
            item.replace_all_uses_with(results[item.args[1]])
            graph.erase_node(item)
    graph.erase_node(node)
