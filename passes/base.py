"""What a pass is, and the runner that checks, times and records each one.

A pass is a frozen dataclass: its fields are its options, its docstring is its contract, ``run`` rewrites a graph. The
runner holds what every pass must leave behind: a graph that lints, whose nodes carry ``meta["val"]``. Passes themselves
neither lint nor recompile.

Adding one takes three steps: the file, its line in :data:`dspass.passes.pipeline.DEFAULT`, its golden test
(``docs/write-a-pass.md``).
"""

from __future__ import annotations

import functools
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

import torch.fx as fx

from dspass.passes.devices import Device
from dspass.passes.text import print_graph
from dspass.runtime import compat

log = logging.getLogger(__name__)

#: ``captured``: as Dynamo hands it over, torch functions and methods on whatever the model calls; ``joint``: forward and
#: backward together, in ATen operators; then each of the two.
Where = Literal["captured", "joint", "forward", "backward"]


class PassError(RuntimeError):
    """A pass broke its contract, or the list of passes cannot work in that order."""


@dataclass(kw_only=True)
class PassContext:
    """What a pass may know: where in the step its graph stands, and what it wants to tell the report.

    ``target`` is the kind of device that a prediction is for; None where a graph runs on the devices of its own tensors.
    ``trains``: a backward follows this forward.
    """

    graph: str = "graph 0"
    where: Where = "forward"
    target: str | None = None
    trains: bool = True
    said: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        """One line for the report: what was done, or why there was nothing to do."""
        self.said.append(text)


@dataclass(frozen=True, kw_only=True)
class Holding:
    """What it takes to hold a value from the forward to the backward in a pass's way: ``bytes`` on the device and
    ``host_bytes`` on the host, ``seconds`` beyond those of reading it, and ``link_seconds`` of copying to and from the host,
    which compute may hide."""

    bytes: int
    host_bytes: int = 0
    seconds: float = 0.0
    link_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Pass(ABC):
    """Graph to graph.

    ``provides`` are facts that hold after it, ``requires`` those that must hold before, ``conflicts`` names of passes
    that cannot stand in the same list. ``where`` are the graphs that it works on.
    """

    name: ClassVar[str]
    provides: ClassVar[frozenset[str]] = frozenset()
    requires: ClassVar[frozenset[str]] = frozenset()
    conflicts: ClassVar[frozenset[str]] = frozenset()
    where: ClassVar[frozenset[Where]] = frozenset({"forward", "backward"})
    keeps_numbers: ClassVar[bool] = True

    @abstractmethod
    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        """Rewrite ``graph`` in place or answer another one."""

    def hold(self, node: fx.Node, on: Device) -> Holding | None:
        """A lever of the planner: what this pass takes to hold the value of ``node``, which is saved for the backward; None
        where it has no way of its own to hold it. Where the planner chooses that way, the node that is saved carries this
        pass's name under :data:`dspass.passes.nodes.HELD`, in the forward graph and in the backward graph."""
        return None

    @property
    def holds_all(self) -> bool:
        """Whether all that this pass can hold is held in its way where no planner chooses."""
        return False

    def options(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(kw_only=True)
class PassResult:
    """What one pass did to one graph. Texts are made when they are read: printing a large graph takes seconds."""

    name: str
    where: Where
    graph: str
    summary: str
    changed: bool
    seconds: float
    ops_before: int
    ops_after: int
    keeps_numbers: bool
    before: str = ""
    after: str = ""


def check_order(passes: Sequence[Pass]) -> None:
    """Raise :class:`PassError` unless each pass finds what it requires among those before it."""
    have: set[str] = set()
    names: list[str] = []
    for item in passes:
        missing = item.requires - have
        if missing:
            makers = sorted(p.name for p in passes if p.provides & missing)
            way_out = (
                f"put {' and '.join(makers)} before it" if makers else "add a pass that provides it, or drop this one"
            )
            raise PassError(
                f"pass {item.name!r} requires {sorted(missing)}, which no pass before it provides: {way_out}."
            )
        clash = item.conflicts & set(names)
        if clash:
            raise PassError(f"pass {item.name!r} cannot stand in one list with {sorted(clash)}: drop one of them.")
        have |= item.provides
        names.append(item.name)


def run_passes(
    gm: fx.GraphModule, passes: Sequence[Pass], ctx: PassContext, record: Callable[[PassResult], None] | None = None
) -> fx.GraphModule:
    """Run those of ``passes`` that work on ``ctx.where``, in order, and check the graph after each."""
    text = print_graph(gm.graph) if record is not None else ""
    for item in passes:
        if ctx.where not in item.where:
            continue
        ctx.said.clear()
        before, start, ops = text, time.perf_counter(), _ops(gm.graph)
        graph = item.run(gm.graph, ctx)
        if graph is not gm.graph:
            gm.graph = graph
        seconds = time.perf_counter() - start
        _check(item, gm, ctx.where)
        if record is not None:
            text = print_graph(gm.graph)
            summary = "; ".join(ctx.said) or ("changed the graph" if text != before else "nothing to do")
            record(
                PassResult(
                    name=item.name,
                    where=ctx.where,
                    graph=ctx.graph,
                    summary=summary,
                    changed=text != before,
                    seconds=seconds,
                    ops_before=ops,
                    ops_after=_ops(gm.graph),
                    keeps_numbers=item.keeps_numbers or text == before,
                    before=before,
                    after=text,
                )
            )
            log.debug("%s %s: %s (%s, %.1f ms)", ctx.graph, ctx.where, item.name, summary, seconds * 1e3)
            if text != before:
                compat.trace_artifact(f"dspass_{ctx.where}_{item.name}", functools.partial(str, text))
    gm.recompile()
    return gm


def _ops(graph: fx.Graph) -> int:
    return sum(node.op in ("call_function", "call_module", "call_method") for node in graph.nodes)


def _check(item: Pass, gm: fx.GraphModule, where: Where) -> None:
    try:
        gm.graph.lint()
    except Exception as error:
        raise PassError(f"pass {item.name!r} left a graph that does not lint: {error}") from error
    if where == "captured":
        return  # values come with AOTAutograd
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "call_function") and "val" not in node.meta and not _answers_nothing(node):
            raise PassError(f"pass {item.name!r} left node {node.name!r} without meta['val'].")


def _answers_nothing(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and not schema.returns
