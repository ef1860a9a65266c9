"""Losses of micro-batches that add up to the loss of the whole batch.

Averaging micro-batches' losses is the whole batch's loss only where each counts as many rows: labels that are ignored, masks
and ``loss.sum() / n`` break it. So the loss is followed from its end, through everything that is linear, to the sums and means
over rows that it is made of. With ``i`` for micro-batches of ``m``:

- a sum over rows stays as it is: ``sum_i s_i`` is the whole batch's;
- a mean over a fixed number of values is divided by ``m``, and so is what each micro-batch has alike (a penalty on weights);
- what a sum is divided or multiplied by, a count of labels or of a mask, becomes the *whole batch's*: it depends on no
  parameter, all ranks of a pipeline have the whole batch, and so it is an input, computed once in front of all micro-batches
  from the batch itself. A cross entropy's mean is its sum over that count, so a micro-batch without labels is no 0 / 0.

The whole batch's graph says which is which (:mod:`dspass.passes.whole_batch`): ``loss.sum() / x.shape[0]`` is captured as a
division by a number, and only a second capture tells that number from a constant.

What is not linear in rows (the logarithm of a mean, a contrastive loss, the balance loss of mixtures of experts, which
multiplies two means) has no such parts and is an error, unless a person asks for the mean of the micro-batches' values.

Dropped: a weight ``count_i / sum count`` for each micro-batch's loss, as the loss of a micro-batch that counts nothing is NaN
and stays that whatever it is multiplied by, and as ``sum / clamp(count, min=1)`` does not add up like that.
"""

from __future__ import annotations

import inspect
import operator
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

from dspass.passes.experts import name_of, value_of
from dspass.passes.whole_batch import (
    ARITHMETIC,
    Compared,
    broadcast_alike,
    compare,
    grown,
    is_parameter,
    needed,
    writes,
)
from dspass.runtime import compat

_SUMS = {"add", "iadd", "add_", "sub", "isub", "sub_", "subtract"}
_PRODUCTS = {"mul", "imul", "mul_", "multiply"}
_RATIOS = {"truediv", "itruediv", "div", "div_", "divide", "true_divide"}
#: Linear in their first argument, where no row is left in it.
_LINEAR = {
    "neg", "negative", "to", "type", "type_as", "float", "double", "half", "bfloat16", "view", "reshape", "flatten", "squeeze",
    "unsqueeze", "contiguous", "clone", "detach", "getitem", "select", "sum", "mean", "expand", "cpu", "cuda",
}  # fmt: skip
_IN_PLACE = {
    operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul,
    operator.itruediv: operator.truediv, "add_": "add", "sub_": "sub", "mul_": "mul", "div_": "div",
}  # fmt: skip

#: Losses of each row, whose ``reduction="mean"`` is over a number of values that the batch's size alone says.
_EVEN = {
    F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.binary_cross_entropy, F.binary_cross_entropy_with_logits,
    F.kl_div, F.poisson_nll_loss, F.gaussian_nll_loss, F.hinge_embedding_loss, F.cosine_embedding_loss,
    F.margin_ranking_loss, F.soft_margin_loss, F.multilabel_margin_loss, F.multilabel_soft_margin_loss, F.multi_margin_loss,
    F.triplet_margin_loss, F.triplet_margin_with_distance_loss, F.ctc_loss,
}  # fmt: skip
#: Those that divide by the sum of weights, where they are given any.
_WEIGHTED = {F.mse_loss, F.l1_loss, F.huber_loss}
_COUNTED = {F.cross_entropy, F.nll_loss}

_AVERAGE = '"pipeline": {"loss_reduction": "mean"}'


class CombinationError(ValueError):
    """The losses of micro-batches do not add up to the batch's."""


class _NotLinear(Exception):
    def __init__(self, node: fx.Node, why: str) -> None:
        self.node, self.why = node, why


@dataclass(frozen=True, kw_only=True)
class Combination:
    """What :func:`combine_losses` made of a graph.

    ``loss``: the node whose values sum to the whole batch's loss. ``totals``: new placeholders, behind the others, for values
    that each micro-batch is given alike. ``of_batch`` computes them from the inputs of the whole batch's graph; None where
    there are none. ``said``: for the report, what was done with each part of the loss. ``adds``: the outputs whose values sum
    to the whole batch's, the loss and what is answered beside it.
    """

    loss: fx.Node | None
    adds: frozenset[fx.Node] = frozenset()
    totals: tuple[fx.Node, ...] = ()
    of_batch: fx.GraphModule | None = None
    said: tuple[str, ...] = ()

    def values(self, inputs: Sequence[Any]) -> list[torch.Tensor]:
        """A tensor for each of ``totals``. ``inputs`` are the whole batch's, in the order of its graph's placeholders; those
        that are parameters are not read, and may be anything.

        A batch that counts nothing has the loss that the model itself would answer: NaN for a mean of no labels."""
        if self.of_batch is None:
            return []
        if any(writes(node) for node in self.of_batch.graph.nodes):  # into copies, then
            placeholders = self.of_batch.graph.find_nodes(op="placeholder")
            are_read = [bool(node.users) for node in placeholders]
            inputs = [v.clone() if read else v for v, read in zip(inputs, are_read, strict=True)]
        with torch.no_grad():
            return list(self.of_batch(*inputs))


def combine_losses(
    graph: fx.Graph,
    loss: fx.Node | None,
    whole: fx.Graph | None,
    micro_batches: int,
    reduction: Literal["mean"] | None = None,
) -> Combination:
    """Rewrite ``graph`` so that the values of ``loss`` of all micro-batches sum to that of the whole batch, and those of other
    0-dim outputs too where they can: parts of the loss and figures that are looked at, which have no gradient any more.

    ``graph`` is the model as Dynamo captured it with one micro-batch, ``whole`` with the whole batch (not changed, and needed
    unless ``reduction`` is given or there is one micro-batch), both in static shapes; all micro-batches have as many rows.
    ``loss`` is a 0-dim floating value among the outputs; shapes and dtypes stay. With ``reduction`` "mean" each is the mean of
    the micro-batches' values, whatever it is.

    Raises :class:`CombinationError` where the loss is not made of sums and means over rows.
    """
    others = [node for node in scalars_of(graph) if node is not loss]
    if micro_batches == 1:
        adds = [_looked_at(graph, node, node) for node in others] + ([loss] if loss is not None else [])
        return Combination(loss=loss, adds=frozenset(adds), said=("one micro-batch has the whole batch's loss",))
    rewriter: _Rewriter | _Averager
    if reduction == "mean":
        rewriter = _Averager(graph, micro_batches)
    else:
        assert whole is not None, "losses are compared with the whole batch's graph"
        rewriter = _Rewriter(graph, _compared(graph, whole, micro_batches), micro_batches)
    combined = None
    if loss is not None:
        try:
            combined = rewriter.additive(loss)
        except _NotLinear as refusal:
            rewriter.undo()
            raise CombinationError(
                f"The losses of {micro_batches} micro-batches do not add up to the batch's loss %{loss.name}: "
                f"%{refusal.node.name} = {name_of(refusal.node)}(...){_line_of(refusal.node)} {refusal.why}. Make the loss of "
                f"sums and means over rows, or average the micro-batches' losses, which is another loss, with {_AVERAGE}."
            ) from None
    said = tuple(rewriter.said)
    sums = {node: rewriter.attempt(node) for node in others}
    if loss is not None and combined is not None:
        _put(graph, loss, combined)
    adds = [] if combined is None else [combined]
    adds += [_looked_at(graph, node, found) for node, found in sums.items() if found is not None]
    return Combination(
        loss=combined,
        adds=frozenset(adds),
        totals=tuple(rewriter.totals.values()),
        of_batch=_of_batch(whole, rewriter.recipes) if rewriter.totals and whole is not None else None,
        said=said,
    )


def _compared(graph: fx.Graph, whole: fx.Graph, micro_batches: int) -> Compared:
    broadcast_alike(graph, whole, micro_batches)
    try:
        return compare(graph, whole, micro_batches)
    except ValueError as error:
        raise CombinationError(
            f"The losses of {micro_batches} micro-batches cannot be added up: the model computes otherwise with the whole "
            f"batch, where {error}. Write it so that no branch depends on the batch's size, or average the micro-batches' "
            f"losses with {_AVERAGE}."
        ) from error


def _looked_at(graph: fx.Graph, node: fx.Node, combined: fx.Node) -> fx.Node:
    """Answer ``combined`` in place of ``node``, without a gradient."""
    detached = _emit(graph, combined, combined, "detach", (combined,), {})
    _put(graph, node, detached)
    return detached


def scalars_of(graph: fx.Graph) -> list[fx.Node]:
    """The 0-dim tensors that a graph makes among its outputs."""
    outputs = [leaf for leaf in tree_leaves(graph.output_node().args) if isinstance(leaf, fx.Node)]
    return [node for node in dict.fromkeys(outputs) if node.op != "placeholder" and _is_scalar(value_of(node))]


def loss_of(graph: fx.Graph) -> fx.Node:
    """The loss: the one 0-dim floating output that depends on a parameter and has a gradient, or the one that the others are
    parts of.

    Raises :class:`CombinationError` where there is none, or several."""
    losses, last = _losses(graph)
    if len(last) == 1:
        return last[0]
    outputs = [leaf for leaf in tree_leaves(graph.output_node().args) if isinstance(leaf, fx.Node)]
    way_out = (
        "Have it answer their sum, and detach() those that are only looked at."
        if losses
        else "Call it with its labels, or compute the loss in its forward."
    )
    named = ", ".join(f"%{node.name} {_described(value_of(node))}" for node in outputs) or "nothing"
    raise CombinationError(
        f"A pipeline's model answers one loss, a 0-dim floating tensor that depends on its parameters, and this one has "
        f"{len(losses) or 'none'}: it answers {named}. {way_out}"
    )


def find_loss(graph: fx.Graph) -> fx.Node | None:
    """:func:`loss_of`, or None."""
    _, last = _losses(graph)
    return last[0] if len(last) == 1 else None


def _losses(graph: fx.Graph) -> tuple[list[fx.Node], list[fx.Node]]:
    """What may be the loss, and those of them that all others are parts of."""
    scalars = [node for node in scalars_of(graph) if value_of(node).is_floating_point()]
    of = {node: needed(graph, [node]) for node in scalars}
    losses = [node for node in scalars if any(is_parameter(part) for part in of[node])]
    losses = [
        node for node in losses if value_of(node).requires_grad
    ] or losses  # others are looked at, not trained with
    return losses, [node for node in losses if all(other in of[node] for other in losses)]


class _Averager:
    """Makes the mean of micro-batches' values of each."""

    def __init__(self, graph: fx.Graph, micro_batches: int) -> None:
        self.graph, self.micro_batches = graph, micro_batches
        self.totals: dict[Any, fx.Node] = {}
        self.recipes: list[Any] = []
        self.said: list[str] = []

    def additive(self, node: fx.Node) -> fx.Node:
        self.said.append(f"%{node.name}: the mean of {self.micro_batches} micro-batches' values")
        return _emit(self.graph, node, node, operator.truediv, (node, self.micro_batches), {})

    def attempt(self, node: fx.Node) -> fx.Node | None:
        return self.additive(node) if value_of(node).is_floating_point() else None

    def undo(self) -> None:
        pass


class _Rewriter:
    """Builds the loss a second time, next to the first, whose parts may be read elsewhere."""

    def __init__(self, graph: fx.Graph, found: Compared, micro_batches: int) -> None:
        self.graph, self.found, self.micro_batches = graph, found, micro_batches
        self.before = set(graph.nodes)
        self.last: dict[fx.Node, fx.Node] = {}  # what was put behind a node
        self.done: dict[tuple[str, fx.Node], Any] = {}
        self.totals: dict[Any, fx.Node] = {}
        self.recipes: list[tuple[Callable[..., Any] | None, tuple[Any, ...]]] = []
        self.said: list[str] = []

    def undo(self) -> None:
        self._keep(self.before)

    def _keep(self, nodes: set[fx.Node]) -> None:
        for node in reversed(self.graph.nodes):
            if node not in nodes:
                self.graph.erase_node(node)

    def attempt(self, node: fx.Node) -> fx.Node | None:
        """:meth:`additive`, or None and no trace of it where there is none of the same type."""
        nodes, known = set(self.graph.nodes), (self.last, self.done, self.totals, self.recipes, self.said)
        self.last, self.done, self.totals = dict(self.last), dict(self.done), dict(self.totals)
        self.recipes, self.said = list(self.recipes), list(self.said)
        try:
            made = self.additive(node)
        except _NotLinear:
            made = None
        if made is None or value_of(made).dtype != value_of(node).dtype:
            self._keep(nodes)
            self.last, self.done, self.totals, self.recipes, self.said = known
            return None
        return made

    def additive(self, node: fx.Node) -> fx.Node:
        """A node whose values sum to the value of ``node`` with the whole batch."""
        key = ("additive", node)
        if key not in self.done:
            self.done[key] = self._additive(node)
        return self.done[key]

    def _additive(self, node: fx.Node) -> fx.Node:
        if node not in self.found.varies:
            return self._divided(node, node, "the same in each")
        if node in self.found.rows:
            raise _NotLinear(node, "has rows where their sum is expected")
        name = name_of(node)
        if writes(node) and len(node.args[0].users) > 1:
            raise _NotLinear(node, "changes in place what is read elsewhere, too")
        if len(node.args) >= 2 and name in _SUMS:
            return self._copy(node, [self._term(node, 0), self._term(node, 1), *node.args[2:]])
        if len(node.args) == 2 and name in _RATIOS and node.kwargs.get("rounding_mode") is None:
            return self._copy(node, [self._term(node, 0), self._factor(node, 1)])
        if len(node.args) == 2 and name in _PRODUCTS:
            if self._is_factor(node.args[0]):
                return self._copy(node, [self._factor(node, 0), self._term(node, 1)])
            if not self._is_factor(node.args[1]):
                raise _NotLinear(node, "multiplies two values of the batch that depend on parameters")
            return self._copy(node, [self._term(node, 0), self._factor(node, 1)])
        if name in ("stack", "cat", "concat") and node.args:
            terms = [self.additive(part) for part in node.args[0]]
            return self._copy(node, [terms, *node.args[1:]])
        if name == "where" and len(node.args) == 3:
            return self._copy(node, [self._factor(node, 0), self._term(node, 1), self._term(node, 2)])
        if name in ("sum", "mean") and node.args and node.args[0] in self.found.rows:
            reduced = self._copy(node, [self._row_wise(node.args[0]), *node.args[1:]])
            if name == "mean":
                return self._divided(node, reduced, "a mean over rows")
            self.said.append(f"%{node.name}: a sum over rows")
            return reduced
        if name in _LINEAR and node.args:
            if node.args[0] in self.found.rows:
                raise _NotLinear(node, "takes a row and leaves others")
            return self._copy(node, [self._term(node, 0), *node.args[1:]])
        if node.target in _EVEN | _COUNTED:
            return self._loss(node)
        if node not in self.found.of_parameters and node not in self.found.random:
            return self._divided(node, self._total(node), "of no parameter, the whole batch's")
        raise _NotLinear(node, "is not linear in its parts")

    def _term(self, node: fx.Node, i: int) -> Any:
        """An operand, as :meth:`additive`."""
        value = node.args[i]
        if isinstance(value, fx.Node):
            return self.additive(value)
        number = self.found.twin[node].args[i]  # as it is with the whole batch
        return number / self.micro_batches if number else number

    def _is_factor(self, value: Any) -> bool:
        return not isinstance(value, fx.Node) or not {value} & self.found.varies & self.found.of_parameters

    def _factor(self, node: fx.Node, i: int) -> Any:
        """An operand that is the whole batch's."""
        value = node.args[i]
        return self._whole(value) if isinstance(value, fx.Node) else self.found.twin[node].args[i]

    def _whole(self, node: fx.Node) -> fx.Node:
        if node not in self.found.varies:
            return node
        if node in self.found.rows:
            raise _NotLinear(node, "has rows, and multiplies or divides what has none")
        return self._total(node)

    def _row_wise(self, node: fx.Node) -> fx.Node:
        """A node whose rows are the whole batch's."""
        if node not in self.found.varies or self.found.each_row(node):
            return node
        if node not in self.found.rows:
            return self._whole(node)
        if node in self.found.blends or writes(node):
            raise _NotLinear(node, "makes rows of other rows")
        key = ("rows", node)
        if key not in self.done:
            source = self.found.twin[node] if name_of(node) in ARITHMETIC else node
            numbers = zip(node.args, source.args, strict=True)
            args = [b if _is_number(a) else fx.map_arg(a, self._row_wise) for a, b in numbers]
            self.done[key] = self._copy(node, args, fx.map_arg(self._named(node), self._row_wise))
        return self.done[key]

    def _loss(self, node: fx.Node) -> fx.Node:
        """One of torch's losses, which is a loss of each row and a reduction."""
        target: Any = node.target
        given = inspect.signature(target).bind(*node.args, **node.kwargs)
        given.apply_defaults()
        arguments = {name: fx.map_arg(value, self._row_wise) for name, value in given.arguments.items()}
        reduction = arguments["reduction"]
        if arguments.get("size_average") is not None or arguments.get("reduce") is not None:
            raise _NotLinear(node, "has the old size_average or reduce in place of reduction")
        if not self._is_of_rows(node, given.arguments):
            raise _NotLinear(node, "compares rows with other rows")
        if reduction == "sum":
            self.said.append(f"%{node.name}: a sum over rows")
            return self._loss_with(node, arguments)
        if target in _COUNTED and not self._has_probabilities(arguments):
            return self._counted(node, given.arguments, arguments)
        if target in _WEIGHTED and arguments.get("weight") is not None:
            raise _NotLinear(node, "is divided by the sum of weights")
        few, all_ = value_of(given.args[0]), value_of(self.found.twin[given.args[0]])
        if reduction == "batchmean" and grown(few, all_, self.micro_batches) != (0,):
            raise _NotLinear(node, "is divided by a dimension that is not the batch")
        return self._divided(node, self._loss_with(node, arguments), "a mean over rows")

    def _is_of_rows(self, node: fx.Node, given: dict[str, Any]) -> bool:
        """Whether the loss has rows before its reduction: shapes that are broadcast may make a table of pairs."""
        target: Any = node.target
        arguments = {**given, "reduction": "none"}
        each = []
        for inputs in (arguments, fx.map_arg(arguments, self.found.twin.__getitem__)):
            values = fx.map_arg(inputs, value_of)
            with compat.mode_of(tree_leaves(values)), warnings.catch_warnings(action="ignore"):
                each.append(target(**values))
        dims = grown(each[0], each[1], self.micro_batches)
        return dims is not None and len(dims) == 1

    def _loss_with(self, node: fx.Node, arguments: dict[str, Any]) -> fx.Node:
        given = {name: value for name, value in arguments.items() if value is not None}
        compared = [given.pop(name) for name in list(given)[:2]]
        return self._put(node, node.target, tuple(compared), given)

    def _has_probabilities(self, arguments: dict[str, Any]) -> bool:
        return value_of(arguments["input"]).shape == value_of(arguments["target"]).shape

    def _counted(self, node: fx.Node, given: dict[str, Any], arguments: dict[str, Any]) -> fx.Node:
        """The mean over targets that are not ignored: the sum over the whole batch's count. Sums are of each row's loss in fp32
        at the least, as a sum of many losses is too large for fp16."""
        value = value_of(node)
        dtype = torch.promote_types(value.dtype, torch.float32)
        target, weight = given["target"], given["weight"]
        for part in (target, weight):
            if isinstance(part, fx.Node):
                self._must_be_of_batch(part)
        twins = fx.map_arg((target, weight), self.found.twin.__getitem__)
        key = (*twins, given["ignore_index"], dtype)
        like = value.detach().new_empty((), dtype=dtype)
        total = self._placeholder(key, like, count_targets, key)
        each = self._loss_with(node, {**arguments, "reduction": "none"})
        summed = self._put(node, torch.sum, (each,), {"dtype": dtype})
        mean = self._put(node, operator.truediv, (summed, total), {})
        self.said.append(f"%{node.name}: a sum over the batch's count of targets")
        return mean if dtype == value.dtype else self._put(node, "to", (mean, value.dtype), {})

    def _total(self, node: fx.Node) -> fx.Node:
        """The value of ``node`` with the whole batch, as an input."""
        self._must_be_of_batch(node)
        value = value_of(node)
        self.said.append(f"%{node.name}: the whole batch's")
        with compat.mode_of([value]):
            like = torch.empty_like(value)
        return self._placeholder(node, like, None, (self.found.twin[node],))

    def _must_be_of_batch(self, node: fx.Node) -> None:
        if node in self.found.of_parameters:
            raise _NotLinear(
                node, "counts what depends on parameters, as its rows are known only when they are computed"
            )
        if node in self.found.random:
            raise _NotLinear(node, "counts what is drawn at random, for each micro-batch anew")

    def _placeholder(
        self, key: Any, like: torch.Tensor, made_by: Callable[..., Any] | None, parts: tuple[Any, ...]
    ) -> fx.Node:
        if key not in self.totals:
            behind = self.graph.find_nodes(op="placeholder")[-1]
            with self.graph.inserting_after(behind):
                self.totals[key] = self.graph.placeholder(f"whole_batch_{len(self.totals)}")
            self.totals[key].meta["example_value"] = like
            self.recipes.append((made_by, parts))
        return self.totals[key]

    def _divided(self, node: fx.Node, value: fx.Node, why: str) -> fx.Node:
        self.said.append(f"%{node.name}: {why}, divided by {self.micro_batches}")
        return self._put(node, operator.truediv, (value, self.micro_batches), {})

    def _copy(self, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any] | None = None) -> fx.Node:
        if kwargs is None:
            kwargs = self._named(node)
        if writes(node):  # in front of it, where its operand is still what it was
            self.last[node] = node.prev
        elif tuple(args) == node.args and kwargs == node.kwargs:
            return node
        return self._put(node, _IN_PLACE.get(node.target, node.target), tuple(args), kwargs)

    def _named(self, node: fx.Node) -> dict[str, Any]:
        """Its keyword arguments, numbers as they are with the whole batch."""
        numbers = self.found.twin[node].kwargs if name_of(node) in ARITHMETIC else node.kwargs
        return {name: numbers[name] if _is_number(value) else value for name, value in node.kwargs.items()}

    def _put(self, behind: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        made = _emit(self.graph, behind, self.last.get(behind, behind), target, args, kwargs)
        self.last[behind] = made
        return made


def count_targets(
    target: torch.Tensor, weight: torch.Tensor | None, ignore_index: int, dtype: torch.dtype
) -> torch.Tensor:
    """What the mean of a cross entropy divides by: targets that are not ignored, or the sum of their classes' weights."""
    counts = target != ignore_index
    if weight is None:
        return counts.sum().to(dtype)
    return (weight[target.masked_fill(~counts, 0)] * counts).sum(dtype=dtype)


def _of_batch(whole: fx.Graph, recipes: Sequence[tuple[Callable[..., Any] | None, tuple[Any, ...]]]) -> fx.GraphModule:
    """From the whole batch's inputs to the totals, and nothing else of the model."""
    parts = [part for _, given in recipes for part in given if isinstance(part, fx.Node)]
    kept = needed(whole, parts)
    made = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}

    def copy(node: fx.Node) -> fx.Node:
        if node not in copies:  # only what it is like is read
            like = value_of(node)
            one = made.call_function(torch.empty, ((),), {"dtype": like.dtype, "device": like.device})
            copies[node] = made.call_method("expand", (one, tuple(like.shape)))
        return copies[node]

    for node in whole.nodes:
        if node.op == "placeholder" or node in kept:
            copies[node] = made.node_copy(node, copy)
    results = []
    for function, given in recipes:
        inputs = fx.map_arg(given, copies.__getitem__)
        results.append(inputs[0] if function is None else made.call_function(function, inputs))
    made.output(tuple(results))
    return fx.GraphModule(whole.owning_module or {}, made)


def _emit(
    graph: fx.Graph, like: fx.Node, behind: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> fx.Node:
    """A node behind another, with its value and with the marks of the one that it is ``like``."""
    with graph.inserting_after(behind):
        call = graph.call_method if isinstance(target, str) else graph.call_function
        node = call(target, args, kwargs)
    node.meta = {key: value for key, value in like.meta.items() if key != "example_value"}
    values, named = fx.map_arg((args, kwargs), value_of)
    function = getattr(torch.Tensor, target) if isinstance(target, str) else target
    with compat.mode_of(tree_leaves((values, named))), warnings.catch_warnings(action="ignore"):
        node.meta["example_value"] = function(*values, **named)
    return node


def _put(graph: fx.Graph, loss: fx.Node, combined: fx.Node) -> None:
    """Answer ``combined`` in place of ``loss``, and drop what nobody reads any more."""
    graph.output_node().replace_input_with(loss, combined)
    todo = [loss]
    while todo:
        node = todo.pop()
        changes_others = writes(node) and len(node.args[0].users) > 1
        if not node.users and node.op in ("call_function", "call_method") and not changes_others:
            inputs = node.all_input_nodes
            graph.erase_node(node)
            todo.extend(inputs)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_scalar(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 0


def _described(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__


def _line_of(node: fx.Node) -> str:
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip(" ~^")]
    at = next((i for i in reversed(range(len(lines))) if lines[i].startswith("File ")), None)
    return "" if at is None else f" ({': '.join(lines[at : at + 2])})"
