"""Batched experts, recognised in a captured graph: one product over a dimension of experts, each with as many rows.

GShard's form (Lepikhin et al., 2020), which DeepSpeed's MoE layer took over: tokens are dispatched to ``x[experts, capacity,
in]``, by a product with a one-hot mask or by an index, multiplied with ``weight[experts, in, out]`` by ``bmm``, ``matmul``,
``einsum`` or ``baddbmm``, and combined. Products of one layer are those between which both first dimensions stay as they are;
the inside is as in :mod:`dspass.passes.experts`, and has to treat each row of each expert by itself: rows of other ranks come
to stand beside them.

The same product also multiplies what is no mixture: heads that each have a matrix, say. What tells them apart is a *choice*:
from what enters a layer of experts, and not past anything that reads a parameter, a way leads back to an operator that picks
among scores. Attention's own batched products have no parameter among their operands, and are not looked at.

Dropped: the einsums of dispatch and combine as what is recognised. They are written in as many ways as there are libraries, and
with an index there are none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from dspass.passes.experts import chain_of, inside_of, mixes, name_of, same_lead, value_of

Predicate = Callable[[fx.Node], bool]

#: Operators that pick among scores, by name.
_CHOICES = {
    "topk",
    "argmax",
    "argmin",
    "argsort",
    "sort",
    "max",
    "min",
    "kthvalue",
    "multinomial",
    "one_hot",
    "nonzero",
}


@dataclass(kw_only=True, eq=False)
class Batch:
    """One layer of batched experts in a graph. ``weights`` leads from each of its ``products`` to the parameter that it reads;
    ``like`` is a value of its rows, whose first two dimensions all have."""

    products: list[fx.Node]
    weights: dict[fx.Node, fx.Node]
    like: torch.Tensor
    inside: list[fx.Node] = field(default_factory=list)

    @property
    def experts(self) -> int:
        return self.like.shape[0]

    def entering(self) -> list[fx.Node]:
        """What the inside reads of each row of each expert, in order of its first reader."""
        return [n for n in self._read() if same_lead(value_of(n), self.like, 2)]

    def constants(self) -> list[fx.Node]:
        """What it reads of each expert, the same for all its rows: biases ``[experts, 1, ...]``."""
        found = [n for n in self._read() if not same_lead(value_of(n), self.like, 2)]
        return [n for n in found if same_lead(value_of(n), self.like, 1) and value_of(n).shape[1:2] == (1,)]

    def leaving(self) -> list[fx.Node]:
        """What is read outside."""
        held = set(self.inside)
        return [node for node in self.inside if any(user not in held for user in node.users)]

    def _read(self) -> list[fx.Node]:
        held = set(self.inside)
        weights = {product: weight_of(product) for product in self.products}
        found = dict.fromkeys(
            s for n in self.inside for s in n.all_input_nodes if s not in held and s is not weights.get(n)
        )
        return [n for n in found if isinstance(value_of(n), torch.Tensor)]


def find_batches(graph: fx.Graph, weight: Predicate, parameter: Predicate) -> tuple[list[Batch], list[str]]:
    """The layers of batched experts in a graph as Dynamo captured it, and in words what looked like one and is none. ``weight``
    says whether a node is a parameter that may be one of experts, ``parameter`` whether it is any."""
    batches: list[Batch] = []
    said: list[str] = []
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method") or name_of(node) not in _OPERANDS:
            continue
        operands = _operands(node)
        sources = [chain_of(n)[0] for n in operands]
        if len(operands) != 2 or not any(s is not None and weight(s) for s in sources):
            continue
        reason = _refuses(node, *operands) if sources[1] is not None and weight(sources[1]) else "its rows come second"
        if reason is not None:
            said.append(f"{node.name} multiplies a stack of matrices and is no layer of experts: {reason}")
            continue
        source, rows = sources[1], operands[0]
        assert source is not None
        joined = [b for b in batches if _reaches(rows, b)]
        ours = Batch(products=[], weights={}, like=value_of(rows))
        for batch in joined:
            ours.products += batch.products
            ours.weights |= batch.weights
            batches.remove(batch)
        ours.products.append(node)
        ours.weights[node] = source
        batches.append(ours)
    found = []
    for batch in batches:
        batch.products.sort(key=list(graph.nodes).index)
        batch.inside = inside_of(batch.products)
        reason = _no_mixture(batch, parameter)
        if reason is None:
            found.append(batch)
        else:
            said.append(f"{batch.products[0].name} and others look like a layer of experts and are none: {reason}")
    return found, said


def weight_of(product: fx.Node) -> fx.Node:
    """The operand of a product that holds its matrices."""
    return _operands(product)[1]


# -- products ------------------------------------------------------------------------------------------------------------

#: Where the operands of a batched product stand among its arguments, or by which names.
_OPERANDS: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
    "bmm": ((0, 1), ("input", "mat2")),
    "matmul": ((0, 1), ("input", "other")),
    "baddbmm": ((1, 2), ("batch1", "batch2")),
    "einsum": ((1, 2), ()),
}


def _operands(node: fx.Node) -> list[Any]:
    """The two operands, an einsum's with the one that has fewer free letters, the matrices, second."""
    places, names = _OPERANDS[name_of(node)]
    args: Any = node.args
    if name_of(node) != "einsum":
        found = [args[i] if i < len(args) else node.kwargs.get(name) for i, name in zip(places, names, strict=True)]
        return [n for n in found if isinstance(n, fx.Node)]
    given = list(args[1]) if isinstance(args[1], (list, tuple)) else list(args[1:])
    if len(given) != 2:
        return given
    return given[::-1] if _first_is_stack(node) else given


def _first_is_stack(node: fx.Node) -> bool:
    """Whether the first operand of an einsum has what the second one has not in its last place: ``emf,ecm->ecf``."""
    sides, _, out = _equation(node).partition("->")
    first, _, second = sides.partition(",")
    return len(first) > 2 and len(second) > 1 and second[1:2] == out[1:2] and second[1:2] not in first


def _equation(node: fx.Node) -> str:
    return str(node.args[0]).replace(" ", "")


def _refuses(node: fx.Node, rows: Any, weight: Any) -> str | None:
    x, w = value_of(rows), value_of(weight)
    if not isinstance(x, torch.Tensor) or not isinstance(w, torch.Tensor) or not isinstance(x.shape[0], int):
        return "its shapes are not known"
    if w.dim() < 3 or x.dim() < 3 or x.shape[0] != w.shape[0] or x.shape[0] < 2:
        return "it is not of as many rows for each of its matrices"
    if name_of(node) == "einsum":
        return _refuses_equation(node)
    if w.dim() != x.dim() or any(size != 1 for size in w.shape[1:-2]):
        return "it has more than one dimension of matrices"
    return None


def _refuses_equation(node: fx.Node) -> str | None:
    sides, _, out = _equation(node).partition("->")
    x, w = sides.split(",")
    if _first_is_stack(node):
        x, w = w, x
    if not out or "." in sides or any(len(set(term)) != len(term) for term in (x, w, out)):
        return "its equation is not of letters that stand once in each term"
    if x[0] != w[0] or out[:2] != x[:2] or x[1] in w or w[0] in x[1:]:
        return "its equation does not keep experts first and their rows second"
    return None


# -- layers --------------------------------------------------------------------------------------------------------------


def _reaches(node: Any, batch: Batch) -> bool:
    """Whether a way back over values of as many experts and rows leads to a product of ``batch``."""
    products, seen, left = set(batch.products), set(), [node]
    while left:
        one = left.pop()
        if one in products:
            return True
        value = value_of(one)
        parts = value if isinstance(value, (list, tuple)) else [value]
        if one in seen or not all(isinstance(v, torch.Tensor) and same_lead(v, batch.like, 2) for v in parts):
            continue
        seen.add(one)
        left += one.all_input_nodes
    return False


def _no_mixture(batch: Batch, parameter: Predicate) -> str | None:
    entering = batch.entering()
    if not any(_is_chosen(node, parameter) for node in entering):
        return "nothing chooses which rows go to which of them"
    return mixes(batch.inside, entering, batch.leaving(), lead=2, products=batch.products, constants=batch.constants())


def _is_chosen(node: fx.Node, parameter: Predicate) -> bool:
    """Whether a way back from ``node``, not past what reads a parameter, leads to a choice."""
    seen, left = set(), [node]
    while left:
        one = left.pop()
        if one in seen or one.op not in ("call_function", "call_method"):
            continue
        seen.add(one)
        if name_of(one) in _CHOICES:
            return True
        sources = [chain_of(n)[0] for n in one.all_input_nodes]
        if not any(s is not None and parameter(s) for s in sources):
            left += one.all_input_nodes
    return False


def is_of_parameters(node: fx.Node, parameter: Predicate) -> bool:
    """Whether a value is made of parameters alone, and so the same on all ranks."""
    if parameter(node):
        return True
    return (
        node.op in ("call_function", "call_method")
        and bool(node.all_input_nodes)
        and all(is_of_parameters(n, parameter) for n in node.all_input_nodes)
    )
