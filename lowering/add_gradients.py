"""Weight gradients that are added up where they are made: ``total += dy.T @ x`` is one product.

A pipeline runs a stage's backward once for each micro-batch. A backward that answers its gradients has all of them in memory at
once, beside the sums of those before, and each is written, read again and added. Here a gradient that is a product, or rows of
an embedding, is added to its sum by the operator that makes it (:mod:`dspass.runtime.sums`), and the graph answers None for it.
Such are nearly all of a transformer's; the others, vectors and what a collective has reduced, are answered as before.

Dropped: a pass over the backward graph. Operators that write stand in the order of all effects, so that the part of a split
backward that has a gather in it would have all products before that too; here the graph is cut already.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
import torch.fx as fx

from dspass.runtime.sums import ADD_PRODUCT, ADD_ROWS

_ADD = torch.ops.aten.add.Tensor
_FULL = torch.ops.aten.full.default
_MM = torch.ops.aten.mm.default
_PERMUTE = torch.ops.aten.permute.default
_PUT = torch.ops.aten._unsafe_masked_index_put_accumulate.default

#: Puts into a graph, at the place that it has, what adds something to a sum.
Adds = Callable[[fx.Graph, fx.Node], None]


def add_gradients(graph: fx.Graph, outputs: Collection[int]) -> dict[int, str]:
    """Have ``graph`` add those of its outputs, by position, that are made for it alone by operators which can add. Answers the
    names of new placeholders by position: contiguous tensors of the outputs' shapes, which are added to. The outputs are None
    from then on."""
    (output,) = graph.find_nodes(op="output")
    results = list(output.args[0])
    last = graph.find_nodes(op="placeholder")[-1]
    found: dict[int, str] = {}
    for position in outputs:
        gradient = results[position]
        if not isinstance(gradient, fx.Node) or results.count(gradient) > 1:
            continue
        adds = _addends(gradient)
        if adds is None:
            continue
        with graph.inserting_after(last):
            last = total = graph.placeholder(f"total_{position}")
        value = gradient.meta["val"]
        total.meta["val"] = value.new_empty(value.shape)
        found[position] = total.name
        results[position] = None
        for add in adds:
            add(graph, total)
    made = [n for n in output.all_input_nodes if n not in results]
    output.args = (tuple(results),)
    for node in made:
        _erase(graph, node)
    return found


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """Take out ``node``, which nobody reads any more, and what it alone was made of. Others without a reader stay: they may
    be there for what they do."""
    if node.op != "call_function" or node.users:
        return
    sources = node.all_input_nodes
    graph.erase_node(node)
    for source in sources:
        _erase(graph, source)


def _addends(node: fx.Node, is_turned: bool = False) -> list[Adds] | None:
    """What can add ``node``, or its transpose, to a sum; None where something else reads it, or is in it."""
    if len(node.users) != 1:
        return None
    if node.target is _MM:
        return [_product(node, is_turned)]
    if node.target is _PERMUTE and list(node.args[1]) == [1, 0]:
        return _addends(node.all_input_nodes[0], not is_turned)
    if node.target is _ADD and len(node.all_input_nodes) == 2 and not node.kwargs:
        shape = node.meta["val"].shape
        parts = [_addends(n, is_turned) if n.meta["val"].shape == shape else None for n in node.all_input_nodes]
        return None if parts[0] is None or parts[1] is None else [*parts[0], *parts[1]]
    if node.target is _PUT and not is_turned and _is_zeros(node.args[0]) and len(node.args[2]) == 1:
        return [_rows(node)]
    return None


def _is_zeros(value: object) -> bool:
    return isinstance(value, fx.Node) and value.target is _FULL and value.args[1] == 0


def _product(node: fx.Node, is_turned: bool) -> Adds:
    def add(graph: fx.Graph, total: fx.Node) -> None:
        left, right = node.all_input_nodes if len(node.all_input_nodes) == 2 else node.all_input_nodes * 2
        with graph.inserting_before(node):
            if is_turned:
                left, right = _turned(graph, right), _turned(graph, left)
            graph.call_function(ADD_PRODUCT, (total, left, right)).meta["val"] = None

    return add


def _turned(graph: fx.Graph, node: fx.Node) -> fx.Node:
    turned = graph.call_function(_PERMUTE, (node, [1, 0]))
    turned.meta["val"] = node.meta["val"].t()
    return turned


def _rows(node: fx.Node) -> Adds:
    def add(graph: fx.Graph, total: fx.Node) -> None:
        _, mask, (index,), values = node.args
        with graph.inserting_before(node):
            graph.call_function(ADD_ROWS, (total, mask, index, values)).meta["val"] = None

    return add


__all__ = ["add_gradients"]
