"""The collectives of a graph in their order, and how to have another graph start its own in that order.

Ranks must start the same collectives one after another. Where each starts depends on the seconds of what is computed meanwhile
(:mod:`dspass.passes.prefetch_gathers`), and so on the sizes of a batch, which ranks may differ in.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch.fx as fx

from dspass.passes.nodes import EXCHANGES, gather_start, reduce_start, wait_of
from dspass.runtime.params import lookup

_STARTS = {gather_start, reduce_start, *EXCHANGES}


def collectives_of(graph: fx.Graph) -> tuple[str, ...]:
    """A short name of each collective, in order: the same on all ranks, for a batch of any size."""
    return tuple(map(_name, _starts(graph)))


def keep_order(graph: fx.Graph, agreed: Sequence[str]) -> None:
    """Move gathers, which need nothing but shards, so that collectives start in the ``agreed`` order; where that is not enough
    they start in another."""
    starts, by_name = _starts(graph), defaultdict[str, list[fx.Node]](list)
    for node in starts:
        by_name[_name(node)].append(node)
    if sorted(map(_name, starts)) != sorted(agreed):
        return
    wanted = [by_name[name].pop(0) for name in agreed]
    for last, node in itertools.pairwise(wanted):
        if node.target is gather_start and node < last < wait_of(node):
            last.append(node)
    for node, following in reversed(list(itertools.pairwise(wanted))):
        if node.target is gather_start and following < node and all(n < following for n in node.all_input_nodes):
            following.prepend(node)


def _starts(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "call_function" and node.target in _STARTS]


def _name(start: fx.Node) -> str:
    said: list[Any] = [start.target.__name__]
    for argument in start.args:
        if isinstance(argument, (list, tuple)) and any(isinstance(a, fx.Node) for a in argument):
            said.append(len(argument))
        else:
            said.append(_without_sizes(argument))
    return hashlib.sha256(repr(said).encode()).hexdigest()[:8]


def _without_sizes(argument: Any) -> Any:
    """Numbers are of rows, of which each batch has its own. Keys name the engine, of which a rank may have made more than
    another."""
    if isinstance(argument, (list, tuple)):
        return [_without_sizes(a) for a in argument]
    if isinstance(argument, (fx.Node, int)):
        return None
    return lookup(argument).name if isinstance(argument, str) and "/" in argument else argument
