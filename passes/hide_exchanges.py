"""Compute that does not wait for rows runs while they are on their way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.fx as fx

from dspass.passes import devices
from dspass.passes.base import Pass, PassContext
from dspass.passes.cost import collective_seconds, seconds_again
from dspass.passes.kernels import fuses, is_view
from dspass.passes.nodes import REDUCE_GRAD, ROWS, exchange_wait
from dspass.runtime.collectives import RUNTIME_FUNCTIONS
from dspass.runtime.exchange import CHUNKS


@dataclass(frozen=True, kw_only=True)
class HideExchanges(Pass):
    """Between the start and the wait of an all-to-all of rows come products that it does not need, from right before it, and
    then products that do not need it, from further down, until the cost model takes it to be hidden by these and by what stands
    there in any case, other chunks: shared experts in the forward; in the backward theirs, and gradients of weights.

    Only where the device computes while it sends. ``anywhere``: also where it does not, as much as there is.

    It stands before the gathers of parameters, which come to where their first reader is then. What is moved up is made earlier
    and lives longer, by a layer at most: what comes behind the next layer's rows waits for them.

    Dropped: to move waits down instead. Everything between one layer's rows and the next waits for them, so there would be an
    order among what is behind the wait to choose all the same.
    """

    name: ClassVar[str] = "hide_exchanges"

    anywhere: bool = False

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        starts = [n for n in graph.nodes if n.target in ROWS]
        if not starts:
            ctx.say("no rows go to experts on other ranks")
            return graph
        on = devices.of_graph(graph, ctx.target)
        if not on.overlaps and not self.anywhere:
            ctx.say("the device does not compute while it sends")
            return graph
        moved = 0
        for start in starts:
            (wait,) = start.users
            needed = float("inf") if self.anywhere else collective_seconds(start, on) - _between(start, wait, on)
            for put, at in ((_delay, start), (_advance, wait)):
                count, seconds = put(at, needed, on)
                moved += count
                needed -= seconds
        products = "1 product runs" if moved == 1 else f"{moved} products run"
        ctx.say(f"{products} while rows of {len(starts)} all-to-all{'s' * (len(starts) > 1)} travel")
        return graph


def _between(start: fx.Node, wait: fx.Node, on: devices.Device) -> float:
    """Seconds of the products that stand between a start and its wait as it is."""
    total, node = 0.0, start.next
    while node is not wait:
        total += 0.0 if fuses(node) or is_view(node) else seconds_again(node, on)
        node = node.next
    return total


def _delay(start: fx.Node, needed: float, on: devices.Device) -> tuple[int, float]:
    """Move products from before ``start``, which it is not made of, right behind it; answers how many, and their seconds."""
    behind = start.next
    earlier: list[fx.Node] = []
    node = start.prev
    while node.op == "call_function" and not _is_exchange(node):
        earlier.insert(0, node)
        node = node.prev
    made_of = set(_made_of(start, set(earlier)))
    free = [node for node in earlier if node not in made_of]
    count, total = 0, 0.0
    for node in list(free):
        if total >= needed:
            break
        if node not in free or fuses(node) or is_view(node):
            continue
        readers = _made_from(node, free)
        seconds = seconds_again(node, on)
        if seconds and not any(_keeps_order(one) for one in readers):
            for one in readers:
                behind.prepend(one)
            free = [one for one in free if one not in readers]
            count, total = count + 1, total + seconds
    return count, total


def _advance(wait: fx.Node, needed: float, on: devices.Device) -> tuple[int, float]:
    """Move products from behind ``wait``, which do not need it, before it; answers how many, and their seconds."""
    later: list[fx.Node] = []
    node = wait.next
    while node.op != "output":
        later.append(node)
        node = node.next
    stay = {wait}
    for node in later:
        is_mark = node.target is REDUCE_GRAD
        if is_mark or _is_exchange(node) or _keeps_order(node) or not stay.isdisjoint(node.all_input_nodes):
            stay.add(node)
    left = set(later) - stay
    count, total = 0, 0.0
    for node in later:
        if total >= needed:
            break
        if node not in left or fuses(node) or is_view(node):
            continue
        chain = _made_of(node, left)
        seconds = sum(seconds_again(one, on) for one in chain)
        if seconds:
            for one in chain:
                wait.prepend(one)
            left -= set(chain)
            count, total = count + 1, total + seconds
    return count, total


def _made_of(node: fx.Node, among: set[fx.Node]) -> list[fx.Node]:
    """``node`` behind those of ``among`` that it is made of."""
    found, todo = {node}, [node]
    while todo:
        for source in todo.pop().all_input_nodes:
            if source in among and source not in found:
                found.add(source)
                todo.append(source)
    return sorted(found)


def _made_from(node: fx.Node, among: list[fx.Node]) -> list[fx.Node]:
    """``node``, and behind it those of ``among``, which are in order, that are made of it."""
    found = {node}
    for one in among:
        if not found.isdisjoint(one.all_input_nodes):
            found.add(one)
    return sorted(found)


def _is_exchange(node: fx.Node) -> bool:
    if node.target in CHUNKS:
        return False
    source = node.args[0] if node.args else None
    return node.target in RUNTIME_FUNCTIONS or (isinstance(source, fx.Node) and source.target is exchange_wait)


def _keeps_order(node: fx.Node) -> bool:
    """Random numbers are drawn in the order of the graph, and what writes in place may change what others read."""
    schema = getattr(node.target, "_schema", None)
    tags = getattr(node.target, "tags", ())
    return (schema is not None and schema.is_mutable) or torch.Tag.nondeterministic_seeded in tags
