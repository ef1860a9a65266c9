"""Sizes that only a run tells (unbacked symbols): made, with what is expected of them, and read."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.fx as fx

from dspass.runtime.compat.fake import mode_of
from dspass.runtime.compat.graphs import graph_module


def unknown_size(like: torch.Tensor, likely: Any) -> Any:
    """A size that is known only when the graph runs, and is ``likely`` so large; for the fake of an operator.

    Dynamo's ``capture_scalar_outputs`` and ``capture_dynamic_output_shape_ops`` say whether a graph that it captures may have
    such sizes; what is inserted behind it needs neither.
    """
    mode = getattr(like, "fake_mode", None)
    if mode is None or mode.shape_env is None:  # tensors without values and without symbols
        return likely
    size = mode.shape_env.create_unbacked_symint()
    torch._check(size >= 0)
    _expectations.setdefault(mode.shape_env, {})[size.node.expr] = likely
    hints = mode.shape_env.__dict__.get(
        "var_to_hint_override"
    )  # which Inductor orders and tiles by, where torch has it
    if hints is not None and (number := expected(likely)) is not None:
        hints[size.node.expr] = number
    return size


#: What is expected of the sizes that :func:`unknown_size` has made, by their symbols. torch's own place for it takes numbers
#: only, and is not in all versions.
_expectations: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()


def expected(size: Any) -> Any:
    """A size as a number, without a guard: a dynamic one as it is for the inputs at hand, an unknown one as it is expected.
    None where nothing is: the model's own operators made it."""
    if not isinstance(size, torch.SymInt):
        return size
    env, expression = size.node.shape_env, size.node.expr
    expectations = _expectations.get(env, {})
    # The second is its name until torch 2.11; from then on that warns.
    known = env.__dict__.get("backed_var_to_val") or env.__dict__.get("var_to_val") or {}
    values = {s: expected(expectations[s]) if s in expectations else known.get(s) for s in expression.free_symbols}
    return None if None in values.values() else int(expression.xreplace(values))


def expected_elements(tensor: torch.Tensor) -> int:
    """Of a tensor some sizes of which may be unknown; those of which nothing is expected count as nothing."""
    count = 1
    for size in tensor.shape:
        count *= expected(size) or 0
    return count


def as_expected(gm: fx.GraphModule, mark: str) -> fx.GraphModule | None:
    """A copy of a graph that computes sizes which :func:`unknown_size` has made, with the numbers that are expected in their
    place; nodes have the same names, and those whose size was unknown have ``mark`` in their ``meta``. None where no size is
    unknown."""
    if not any(_is_unknown(size) for node in gm.graph.nodes for size in sizes_of(node.meta.get("val"))):
        return None
    graph = copy.deepcopy(gm.graph)
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if isinstance(value, (torch.SymInt, torch.SymBool)) and node.op == "call_function":
            number: Any = (
                expected(value) if isinstance(value, torch.SymInt) else True
            )  # a check, which the real graph makes
            if number is not None:
                for user in list(node.users):
                    user.args, user.kwargs = fx.map_arg(
                        (user.args, user.kwargs), lambda n, node=node, number=number: number if n is node else n
                    )
                graph.erase_node(node)
        elif any(_is_unknown(size) for size in sizes_of(value)):
            node.meta = {
                **node.meta,
                "val": torch.utils._pytree.tree_map_only(torch.Tensor, _as_expected, value),
                mark: True,
            }
        elif not node.all_input_nodes and not node.users and node.op == "call_function":
            graph.erase_node(node)  # a check of what is now a number
    return graph_module(gm, graph)


def sizes_of(value: Any) -> Iterator[Any]:
    """All numbers in a node's value that may be symbols: sizes and strides of its tensors, and what is a size itself."""
    for leaf in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(leaf, torch.Tensor):
            yield from (*leaf.shape, *leaf.stride(), leaf.storage_offset())
        else:
            yield leaf


def is_unbacked(size: Any) -> bool:
    """Whether only a run tells it."""
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    return isinstance(size, torch.SymInt) and bool(free_unbacked_symbols(size))


def _is_unknown(size: Any) -> bool:
    """Whether it is made of what :func:`unknown_size` has made."""
    return isinstance(size, torch.SymInt) and not _expectations.get(size.node.shape_env, {}).keys().isdisjoint(
        size.node.expr.free_symbols
    )


def _as_expected(tensor: torch.Tensor) -> torch.Tensor:
    shape, stride = ([expected(s) for s in sizes] for sizes in (tensor.shape, tensor.stride()))
    if None in shape or None in stride:
        return tensor
    with mode_of([tensor]):
        return torch.empty_strided(shape, stride, dtype=tensor.dtype, device=tensor.device)


def unknown_sizes(values: Iterable[Any]) -> dict[str, str] | None:
    """The sizes that only a run tells in the shapes, strides and offsets of ``values``, tensors and numbers: by name, in order,
    what is known of each. None where another size is a symbol, whose value guards have looked at."""
    from torch.fx.experimental.symbolic_shapes import free_symbols, free_unbacked_symbols

    found: dict[str, str] = {}
    for value in values:
        parts = [*value.shape, *value.stride(), value.storage_offset()] if isinstance(value, torch.Tensor) else [value]
        for size in (part for part in parts if isinstance(part, torch.SymInt)):
            unknown = free_unbacked_symbols(size)
            if len(free_symbols(size)) != len(unknown):
                return None
            env = size.node.shape_env
            for symbol in unknown:
                checks = [str(check.expr) for check in env.deferred_runtime_asserts.get(symbol, ())]
                found[str(symbol)] = f"{env.var_to_range[symbol]} {checks}"
    return found
