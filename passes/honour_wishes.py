"""Hand a person's wishes about single values to whoever splits the graph."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch.fx as fx
from torch.utils.checkpoint import CheckpointPolicy

from dspass.passes.base import Pass, PassContext, Where
from dspass.passes.kernels import is_view
from dspass.passes.nodes import GATHERED, calls
from dspass.passes.text import place_of
from dspass.runtime.wish import KEEP, STAGE_BOUNDARY, WISH


@dataclass(frozen=True, kw_only=True)
class HonourWishes(Pass):
    """``wish(%x, kind)`` becomes a tag on the operator that makes ``x``; no mark is left.

    The tags are those that ``torch.utils.checkpoint`` and its policies leave, and a mark overrules them: the planner and
    Inductor's partitioner read both alike. Where an operator makes several values its tag is for all of them, as it is run
    once more or not at all. Marks on one value that contradict each other raise ``ValueError``. A wish that cannot be
    honoured is left alone with a warning and not an error: a graph break is enough to make an input of a value. Where stages
    of a pipeline begin is marked too, and taken out without a word.
    """

    name: ClassVar[str] = "honour_wishes"
    where: ClassVar[frozenset[Where]] = frozenset({"joint", "forward"})

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        marks = calls(graph, WISH)
        if not marks:
            ctx.say("no value is marked")
        elif ctx.where == "forward":
            ctx.say(f"{len(marks)} marks without effect: no backward follows")
        else:
            _honour(marks, ctx)
        for mark in (*marks, *calls(graph, STAGE_BOUNDARY)):  # stages are cut before, where there are some
            graph.erase_node(mark)
        return graph


def _honour(marks: list[fx.Node], ctx: PassContext) -> None:
    wishes: dict[fx.Node, fx.Node] = {}  # the operator that makes the value -> its first mark
    kept: set[fx.Node] = set()
    again: set[fx.Node] = set()
    refused = 0
    for mark in marks:
        value = _under_views(mark.args[0])
        maker = value.args[0] if value.target is operator.getitem else value
        assert isinstance(maker, fx.Node)
        keep = mark.args[1] == KEEP
        first = wishes.setdefault(maker, mark)
        if first.args[1] != mark.args[1]:
            keeper, other = (mark, first) if keep else (first, mark)
            raise ValueError(
                f"one value cannot be both kept and computed again: dspass.keep {place_of(keeper)} and dspass.recompute "
                f"{place_of(other)} mark the value {value.name!r} (a view counts as the value under it). Drop one of them."
            )
        problem = _problem(value, keep)
        if problem is not None:
            refused += 1
            warnings.warn(f"dspass.{mark.args[1]} {place_of(mark)} has no effect: {problem}", stacklevel=2)
            continue
        (kept if keep else again).add(value)
        if keep:
            maker.meta["recompute"] = value.meta["recompute"] = CheckpointPolicy.MUST_SAVE
        else:
            # A view that is saved would save the value.
            for node in (maker, value, *_views_of(value)):
                node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
                # By this number the partitioner sees where one checkpointed region ends at another, and saves what lies there.
                node.meta.pop("ac_graph_id", None)
    ctx.say(
        f"{len(kept)} values kept, {len(again)} computed again"
        + (f", {refused} marks without effect" if refused else "")
    )


def _under_views(value: fx.Node) -> fx.Node:
    """The value whose memory ``value`` shares."""
    while is_view(value) or (value.target is operator.getitem and is_view(value.args[0])):
        value = value.args[0]
    return value


def _views_of(value: fx.Node) -> Iterator[fx.Node]:
    for user in value.users:
        if is_view(user) or (user.target is operator.getitem and is_view(value)):
            yield user
            yield from _views_of(user)


def _problem(value: fx.Node, keep: bool) -> str | None:
    """Why a wish cannot be honoured, and the way out."""
    if GATHERED in value.meta:
        return "it is a parameter, of which each rank saves its own part and nothing else. Drop the mark."
    if value.op != "call_function":
        if keep:
            return "it is an input of the compiled graph, which is there in the backward anyway. Drop the mark."
        return (
            "it is an input of the compiled graph, and what it is made of is not in there. Mark a value that the compiled "
            "model computes, or where a graph break lies between (TORCH_LOGS=graph_breaks shows them), remove that."
        )
    if keep and _made_of_parameters(value):
        return (
            "it is made of parameters only, and made again of them, since each rank saves its own part. Drop the mark."
        )
    return None


def _made_of_parameters(value: fx.Node) -> bool:
    seen: set[fx.Node] = set()
    stack, leaves = [value], 0
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op == "placeholder":
            if GATHERED not in node.meta:
                return False
            leaves += 1
        stack.extend(node.all_input_nodes)
    return leaves > 0
