"""Graphs as text, one line a node, for golden tests, reports and logs.

``%mm : f32[4,16] = aten.mm(%x, %w)``. Names of nodes are kept: they are stable from run to run, and the report's
reader finds them again in Inductor's output.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.fx as fx

_SHORT = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "b8",
}


def _value(node: fx.Node) -> Any:
    return node.meta.get("val", node.meta.get("example_value"))


def print_graph(graph: fx.Graph) -> str:
    return "\n".join(print_node(node) for node in graph.nodes)


def print_node(node: fx.Node) -> str:
    if node.op == "placeholder":
        return f"%{node.name} : {print_value(_value(node))} = input"
    if node.op == "output":
        return f"return {_argument(node.args[0])}"
    if node.op == "get_attr":
        return f"%{node.name} : {print_value(_value(node))} = constant {node.target}"
    arguments = [_argument(a) for a in node.args] + [f"{k}={_argument(v)}" for k, v in node.kwargs.items()]
    return f"%{node.name} : {print_value(_value(node))} = {print_target(node)}({', '.join(arguments)})"


def print_target(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        name = str(target)
        return name.removesuffix(".default")
    if isinstance(target, str):
        return target
    return getattr(target, "__name__", str(target))


def print_value(value: Any) -> str:
    """Type and shape: ``f32[4,16]``; a list as ``[f32[4], f32[2]]``."""
    if isinstance(value, torch.Tensor):
        return f"{_SHORT.get(value.dtype, str(value.dtype))}[{','.join(str(s) for s in value.shape)}]"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(print_value(v) for v in value) + "]"
    if value is None:
        return "?"
    return str(value) if isinstance(value, (torch.SymInt, torch.SymFloat)) else type(value).__name__


def place_of(mark: fx.Node) -> str:
    """Where in the model's code a mark stands: the innermost frame but that of the function that sets it."""
    frames = re.findall(r'File "(.+?)", line (\d+)', mark.meta.get("stack_trace") or "")[:-1]
    return f"at {frames[-1][0]}:{frames[-1][1]}" if frames else f"on {mark.args[0]}"


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_argument(v) for v in value) + "]"
    return repr(value) if isinstance(value, str) else str(value)
