"""Stages of a pipeline: which nodes of a captured graph each of them runs, and what crosses the cuts between them.

:func:`cut` makes the graph a :class:`~dspass.planner.stage_cuts.Work` and has that module choose, or follows what a person
said. Nodes of the graph are of three kinds:

- *assigned* to one stage: all that is made of parameters or random numbers, and what takes a product to compute;
- *free*: what is made of the batch and of constants alone, such as masks and positions, and views and casts of parameters. A
  stage computes again what it reads of these, for all ranks of a pipeline have the whole batch. So it does with a parameter's
  marker: a weight that two stages read is on both;
- calls without a tensor that change what comes behind them (:data:`~dspass.passes.captured_cost.CONTEXTS`), which each stage
  runs. What nothing needs is run by none.

Assigned nodes that no cut may part are one unit: what makes something other than one tensor of known sizes, and who reads
it; what lies in memory transposed or with gaps, such as a view, and who reads that; what writes in place, what makes the
memory that is written, and who reads that before; a layer of experts, whose rows are exchanged as a whole. What is left of
cycles among these joins too.

Other graphs of a model whose parameters lie on stages already (:func:`follow`), with other sizes or without its loss, are cut
where the first one was: nodes go by their names, and what is new by the parameters that it reads.

A value that skips stages is carried through those between. What the graph answers beside its loss stays where it is made.

Dropped: to cut between modules. What crosses there is not less for it, a graph need not be made of them, and where they are a
chain the least bytes cross between them anyway. Dropped: to send masks. They are often larger than what must be sent, and
have to wait for a message.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace

import networkx as nx
import torch
import torch.fx as fx

from dspass.passes.captured_cost import CONTEXTS, NodeCost, parameter_of
from dspass.passes.devices import Device
from dspass.passes.experts import find_experts
from dspass.passes.text import place_of
from dspass.planner.stage_cuts import Outcome, Shared, Unit, Value, Work, outcome, solve
from dspass.runtime import compat
from dspass.runtime.pipeline import Value as Message
from dspass.runtime.sends import Packing
from dspass.runtime.wish import STAGE_BOUNDARY

#: How a tensor that is received may lie in memory, by its dimensions.
_FORMATS = {
    0: (torch.contiguous_format,),
    4: (torch.contiguous_format, torch.channels_last),
    5: (torch.contiguous_format, torch.channels_last_3d),
}


class CutError(ValueError):
    """A graph cannot be cut as it was asked for."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that a rank has for its stages; ``states`` are those that a byte of a parameter takes, with its gradient and the
    optimiser's: 4 for Adam, divided by the ranks that share them."""

    limit: float
    states: float = 4.0


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage. ``nodes`` are all that it runs, in the graph's order: its own, what it computes again, its parameters' markers
    and their placeholders. Seconds and saved bytes are a micro-batch's, ``parameter_bytes`` in the parameters' own
    precision. ``light_bytes`` of what is saved can be made again in ``light`` seconds without a product
    (:class:`~dspass.passes.captured_cost.NodeCost`); ``most_light_bytes`` is a node's most.

    ``input_gradient`` and ``weight_gradient`` are the halves of a backward: what is asked for first are the gradients of what
    arrives, and what these are not made of waits with those of weights. So the first stage, where nothing arrives, has the
    second half alone. ``held_bytes`` are what the second half is made of, where it comes later."""

    index: int
    nodes: tuple[fx.Node, ...]
    forward: float
    input_gradient: float
    weight_gradient: float
    parameters: tuple[str, ...]
    parameter_bytes: int
    saved_bytes: int
    light: float = 0.0
    light_bytes: int = 0
    most_light_bytes: int = 0
    held_bytes: int = 0

    @property
    def seconds(self) -> float:
        return self.forward + self.input_gradient + self.weight_gradient


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Between stage ``index`` and the next: all ``values`` that are made at or before it and read behind it, by position in the
    graph, carried ones among them; their bytes a micro-batch, and those of their gradients, whole and as they travel; seconds
    of the link for both."""

    index: int
    values: tuple[fx.Node, ...]
    bytes: int
    gradient_bytes: int
    sent_bytes: int
    sent_gradient_bytes: int
    seconds: float

    @property
    def is_packed(self) -> bool:
        """Whether anything travels in few bits."""
        return self.sent_bytes < self.bytes


@dataclass(frozen=True, kw_only=True)
class Cuts:
    """``stage_of`` has the assigned nodes. ``bottleneck`` are a micro-batch's seconds on the slowest stage, with its links.
    ``why`` are lines for a report."""

    stage_of: Mapping[fx.Node, int]
    stages: tuple[Stage, ...]
    cuts: tuple[Cut, ...]
    bottleneck: float
    why: tuple[str, ...]


def cut(
    gm: fx.GraphModule,
    stages: int,
    costs: Mapping[fx.Node, NodeCost],
    on: Device,
    *,
    micro_batches: int,
    rank_of: Sequence[int] | None = None,
    boundaries: Sequence[str] | None = None,
    memory: Memory | None = None,
    in_flight: Sequence[int] | None = None,
    link: float | None = None,
    packing: Packing | None = None,
) -> Cuts:
    """Cut a captured graph into ``stages``, which ``costs`` (:func:`dspass.passes.captured_cost.costs_of`) say what they take.

    ``rank_of`` is the rank of each stage (its own), whose ``memory`` its stages share; ``in_flight`` the micro-batches that
    each has saved at a time (as in 1F1B: ``min(stages - s, micro_batches)``); ``link`` the bytes a second between neighbours
    (the device's, between nodes). ``boundaries`` are names of modules, the first nodes of which begin the second stage and so
    on; without them, calls of :func:`dspass.stage_boundary` in the graph are; without either, costs decide. What
    crosses costs its bytes as it travels, which ``packing`` makes fewer.

    Raises :class:`CutError`, a ``ValueError``, where there are fewer places to cut than asked for, where boundaries are not one
    less than stages, have no such name or no place, and where no cut found fits into the memory.
    """
    if stages < 1:
        raise CutError(f"a pipeline of {stages} stages: use 1 or more.")
    ranks = tuple(range(stages)) if rank_of is None else tuple(rank_of)
    flying = tuple(min(stages - s, micro_batches) for s in range(stages)) if in_flight is None else tuple(in_flight)
    if len(ranks) != stages or len(flying) != stages:
        raise CutError(f"rank_of and in_flight need one number for each of {stages} stages: {ranks}, {flying}.")
    parts = _Parts(gm.graph, costs)
    work = Work(
        units=parts.units,
        values=[
            Value(
                source=parts.unit_of[n],
                readers=tuple({parts.unit_of[r] for r in readers}),
                bytes=_sent_bytes(n, packing),
                gradient=_sent_bytes(n, packing) if costs[n].has_gradient else 0,
            )
            for n, readers in parts.readers.items()
            if any(parts.unit_of[r] != parts.unit_of[n] for r in readers)
        ],
        shared=parts.shared(),
        edges=frozenset(parts.edges),
        stages=stages,
        micro_batches=micro_batches,
        latency=on.latency,
        link=link or on.link,
        overlaps=on.overlaps,
        flying=flying,
        rank_of=ranks,
        states=memory.states if memory is not None else 1.0,
        limit=memory.limit if memory is not None else float("inf"),
        last=parts.loss,
        each_has_parameters=boundaries is None and not parts.marks,
    )
    stage_of_unit, how = _assign(parts, work, boundaries)
    work = replace(work, each_has_parameters=False)
    result = outcome(work, stage_of_unit)
    assert result is not None
    if result.over:
        _refuse_memory(work, result, how)
    stage_of = {n: stage_of_unit[u] for n, u in parts.unit_of.items()}
    found = tuple(_stage(parts, stage_of, s) for s in range(stages))
    seconds = [
        work.link_seconds(result.crossing[s], result.gradients[s]) if work.is_sent(s) else 0.0
        for s in range(stages - 1)
    ]
    crossings = tuple(_cut(parts, stage_of, s, packing, seconds[s]) for s in range(stages - 1))
    return Cuts(
        stage_of=stage_of,
        stages=found,
        cuts=crossings,
        bottleneck=result.bottleneck,
        why=(how, *_said(found, crossings, stage_of)),
    )


def follow(
    gm: fx.GraphModule,
    stages: int,
    costs: Mapping[fx.Node, NodeCost],
    stages_of: Mapping[str, Collection[int]],
    known: Mapping[str, int],
    packing: Packing | None = None,
) -> Cuts:
    """Cut ``gm`` so that each stage reads only parameters that lie on it, of which ``stages_of`` has the stages by name, and
    runs the nodes that it ran in the graph that was cut first (``known``, by name).

    What is new goes to the first stage that has what it reads. Raises :class:`CutError` where a parameter is read by what comes
    too late for it.
    """
    parts = _Parts(gm.graph, costs)
    reads: dict[int, set[str]] = defaultdict(set)
    for unit, nodes in enumerate(parts.nodes_of):
        reads[unit] = {named[0] for n in parts.needed(nodes) if (named := parts.parameter(n)) is not None}
    before: dict[int, set[int]] = defaultdict(set)
    for u, v in parts.edges:
        before[v].add(u)
    stage_of_unit: list[int] = []
    for unit, nodes in enumerate(parts.nodes_of):
        stage = max([0, *(stage_of_unit[u] for u in before[unit]), *(known.get(n.name, 0) for n in nodes)])
        while unmet := [name for name in reads[unit] if stage not in stages_of.get(name, ())]:
            later = [s for s in sorted(stages_of.get(unmet[0], ())) if s > stage]
            if not later:
                raise CutError(
                    f"%{nodes[0].name} reads {unmet[0]} on stage {stage}, and that parameter lies on stages "
                    f"{sorted(stages_of.get(unmet[0], ()))}: the model uses its parameters in another order than in its first "
                    "call, by which it was divided. Let the first call be one that is typical."
                )
            stage = later[0]
        stage_of_unit.append(stage)
    stage_of = {n: stage_of_unit[u] for n, u in parts.unit_of.items()}
    found = tuple(_stage(parts, stage_of, s) for s in range(stages))
    crossing = tuple(_cut(parts, stage_of, s, packing) for s in range(stages - 1))
    return Cuts(stage_of=stage_of, stages=found, cuts=crossing, bottleneck=max(s.seconds for s in found), why=())


def _assign(parts: _Parts, work: Work, boundaries: Sequence[str] | None) -> tuple[list[int], str]:
    marks = parts.marks
    if boundaries is not None:
        return _as_told(parts, work, [(f"module {b!r}", parts.first_of(b)) for b in boundaries]), (
            f"cut at {len(boundaries)} modules, as boundaries say"
        )
    if marks:
        told = [(f"dspass.stage_boundary {place_of(m)}", m) for m in marks]
        return _as_told(parts, work, told), f"cut at {len(marks)} calls of dspass.stage_boundary"
    found = solve(work)
    if found is None:
        raise CutError(
            f"{work.stages} stages, but the graph has only {len(parts.units)} parts that can be cut from each other: "
            f"set pipeline.stages to {len(parts.units)} or less."
        )
    way = "refined by single moves and minimum cuts" if found.refined else "by dynamic programming"
    return found.stage_of, f"cut {way} over {len(parts.units)} parts of {len(parts.unit_of)} nodes"


def _as_told(parts: _Parts, work: Work, told: Sequence[tuple[str, fx.Node]]) -> list[int]:
    """Units behind each boundary, in the graph's order, are of the next stage."""
    if len(told) != work.stages - 1:
        raise CutError(
            f"{work.stages} stages have {work.stages - 1} boundaries between them, and {len(told)} are given "
            f"({', '.join(name for name, _ in told) or 'none'}): give {work.stages - 1}, or set pipeline.stages to "
            f"{len(told) + 1}."
        )
    if list(told) != sorted(told, key=lambda item: parts.position[item[1]]):
        raise CutError(f"boundaries come in the order in which the model runs: {', '.join(name for name, _ in told)}.")
    stage_of = [0] * len(parts.units)
    for s, (name, node) in enumerate(told, start=1):
        for u, nodes in enumerate(parts.nodes_of):
            is_behind = [parts.position[n] >= parts.position[node] for n in nodes]
            if any(is_behind) and not all(is_behind):
                last, first = nodes[is_behind.index(True) - 1], nodes[is_behind.index(True)]
                raise CutError(
                    f"{name} is no place for a cut: %{last.name} before it and %{first.name} behind it cannot be parted "
                    f"({parts.joined.get(frozenset((last, first)), 'they are joined by others')}). Move it by some operators."
                )
            if all(is_behind):
                stage_of[u] = s
    empty = sorted(set(range(work.stages)) - set(stage_of))
    if empty:
        where = told[max(empty[0] - 1, 0)][0]
        raise CutError(f"stage {empty[0]} would compute nothing that needs a parameter: move the boundary at {where}.")
    if outcome(work, stage_of) is None:
        raise CutError(f"behind the last boundary, {told[-1][0]}, the loss has to be computed: move it to the front.")
    return stage_of


def _refuse_memory(work: Work, result: Outcome, how: str) -> None:
    ranks: dict[int, float] = defaultdict(float)
    for s, r in enumerate(work.rank_of):
        ranks[r] += result.memory[s]
    rank, need = max(ranks.items(), key=lambda item: item[1])
    raise CutError(
        f"rank {rank} of the pipeline needs {_size(need)} and has {_size(work.limit)}, in the best cut found ({how}): use more "
        "stages, smaller micro-batches, or a larger dspass.memory_budget."
    )


# -- the graph -----------------------------------------------------------------------------------------------


@dataclass
class _Parts:
    """A captured graph as units of nodes that no cut may part.

    ``nodes_of`` each unit in the graph's order; ``unit_of`` assigned nodes; ``readers`` of each assigned value, assigned nodes;
    ``edges`` between units; ``joined`` why two nodes are in one unit.
    """

    graph: fx.Graph
    costs: Mapping[fx.Node, NodeCost]
    position: dict[fx.Node, int] = field(init=False)
    assigned: dict[fx.Node, None] = field(init=False)
    joined: dict[frozenset[fx.Node], str] = field(init=False, default_factory=dict)
    nodes_of: list[list[fx.Node]] = field(init=False)
    unit_of: dict[fx.Node, int] = field(init=False)
    readers: dict[fx.Node, list[fx.Node]] = field(init=False)
    edges: set[tuple[int, int]] = field(init=False)

    def __post_init__(self) -> None:
        self.position = {n: i for i, n in enumerate(self.graph.nodes)}
        self.assigned = self._assigned()
        self._join()
        order = nx.Graph()
        order.add_nodes_from(self.assigned)
        for one, other in self.joined:
            order.add_edge(one, other)
        group_of = {n: k for k, group in enumerate(nx.connected_components(order)) for n in group}
        quotient = nx.DiGraph()
        quotient.add_nodes_from(group_of.values())
        quotient.add_edges_from((group_of[u], group_of[v]) for u, v in self._flow() if group_of[u] != group_of[v])
        whole = nx.condensation(quotient)  # what joins may have closed to cycles
        members: dict[int, list[fx.Node]] = defaultdict(list)
        for n in self.assigned:
            members[whole.graph["mapping"][group_of[n]]].append(n)
        sequence = nx.lexicographical_topological_sort(whole, key=lambda c: self.position[members[c][0]])
        self.nodes_of = [members[c] for c in sequence]
        self.unit_of = {n: u for u, nodes in enumerate(self.nodes_of) for n in nodes}
        self.readers = {n: [r for r in n.users if r in self.unit_of] for n in self.assigned if self._is_sent(n)}
        self.edges = {(self.unit_of[u], self.unit_of[v]) for u, v in self._flow()}
        self.edges = {(u, v) for u, v in self.edges if u != v}

    @property
    def units(self) -> list[Unit]:
        return [
            Unit(seconds=sum(self.costs[n].seconds for n in nodes), saved=sum(self.costs[n].saved_bytes for n in nodes))
            for nodes in self.nodes_of
        ]

    @functools.cached_property
    def marks(self) -> list[fx.Node]:
        return [n for n in self.graph.nodes if _is_mark(n)]

    @property
    def loss(self) -> int | None:
        """The unit of the one number that is answered and has a gradient."""
        found = [
            n
            for n in self.graph.find_nodes(op="output")[0].all_input_nodes
            if n in self.unit_of
            and self.costs[n].has_gradient
            and (value := _value(n)) is not None
            and value.dim() == 0
        ]
        return self.unit_of[found[0]] if len(found) == 1 else None

    def _assigned(self) -> dict[fx.Node, None]:
        """Nodes whose memory one that is assigned writes are assigned too, and so on: a stage could not compute them again."""
        given = set().union(*(self.costs[n].memory for n in self.graph.find_nodes(op="placeholder") if n in self.costs))
        written = given.intersection(*[set().union(*(c.writes for c in self.costs.values()))])
        while True:
            found = self._made(written)
            more = set().union(*(self.costs[n].writes for n in found if n in self.costs)) - written
            if not more:
                return found
            written |= more

    def _made(self, written: Set[int]) -> dict[fx.Node, None]:
        """What is made of parameters or random numbers, by products, or lies in memory that is ``written``."""
        found: dict[fx.Node, None] = {}
        of_parameters: set[fx.Node] = set()  # markers and parameters that are captured whole, their views and casts
        for node in self.graph.nodes:
            cost = self.costs.get(node, NodeCost())
            if node.op in ("placeholder", "get_attr"):
                if isinstance(_value(node), torch.nn.Parameter):
                    of_parameters.add(node)
                continue
            if node.op == "output" or node.target in CONTEXTS or _is_mark(node):
                continue
            if parameter_of(node) is not None:
                of_parameters.add(node)
                continue
            inputs = node.all_input_nodes
            if inputs and all(n in of_parameters for n in inputs) and (cost.is_view or _is_cast(node)):
                of_parameters.add(node)
                continue
            touched = cost.memory.union(*(self.costs[n].memory for n in inputs if n in self.costs))
            is_made = any(n in found or n in of_parameters for n in inputs)
            if is_made or cost.is_random or cost.has_product or touched & written:
                found[node] = None
        return found

    def _flow(self) -> Iterator[tuple[fx.Node, fx.Node]]:
        """What is assigned, and what of that it reads. What is free reads nothing of it."""
        return ((source, n) for n in self.assigned for source in n.all_input_nodes if source in self.assigned)

    def _join(self) -> None:
        for node in self.assigned:
            sources = [n for n in node.all_input_nodes if n in self.assigned]
            if not self.costs[node].memory and not node.users:  # a mark beside a value, or a write
                for n in sources[:1]:
                    self.joined[frozenset((n, node))] = f"%{node.name} stands beside %{n.name}"
            problem = self._unsendable(node)
            if problem is not None:
                for user in node.users:
                    if user in self.assigned:
                        self.joined[frozenset((node, user))] = f"%{node.name} {problem}"
        for layer in find_experts(self.graph, lambda n: parameter_of(n) is not None)[0]:
            together = [n for n in (*layer.entering(), *layer.inside) if n in self.assigned]
            for one, other in itertools.pairwise(together):
                self.joined[frozenset((one, other))] = "they are of one layer of experts"
        self._join_writes()

    def _unsendable(self, node: fx.Node) -> str | None:
        """Why a value cannot go from one stage to the next."""
        value = node.meta.get("example_value")
        if not isinstance(value, torch.Tensor):
            return "is no tensor"
        if compat.expected(value.numel()) is None or any(compat.is_unbacked(n) for n in value.shape):
            return "has a size that only a run tells"
        if not any(value.is_contiguous(memory_format=f) for f in _FORMATS.get(value.dim(), _FORMATS[0])):
            return "lies in memory in another order than a tensor that is received"
        return None

    def _join_writes(self) -> None:
        """What writes into memory stays with what made it, and with who read it before; with all who read it, where it
        outlives the graph."""
        writers = [(n, s) for n in self.assigned for s in self.costs[n].writes]
        if not writers:
            return
        touches: dict[int, list[fx.Node]] = defaultdict(list)
        given: set[int] = set()
        for node in self.graph.nodes:
            cost = self.costs.get(node)
            if cost is None:
                continue
            if node.op == "placeholder":
                given |= cost.memory
            for storage in cost.memory.union(*(self.costs[n].memory for n in node.all_input_nodes if n in self.costs)):
                if node in self.assigned:
                    touches[storage].append(node)
        for writer, storage in writers:
            for node in touches[storage]:
                if node is not writer and (storage in given or self.position[node] < self.position[writer]):
                    self.joined[frozenset((node, writer))] = f"%{writer.name} writes in place"

    def _is_sent(self, node: fx.Node) -> bool:
        return self._unsendable(node) is None and any(r in self.assigned for r in node.users)

    def crossing(self, stage_of: Mapping[fx.Node, int], s: int) -> tuple[fx.Node, ...]:
        """The values that stage ``s`` or one before it makes, and a later one reads."""
        return tuple(n for n, rs in self.readers.items() if stage_of[n] <= s < max(stage_of[r] for r in rs))

    # -- what stages have of their own

    @functools.cached_property
    def _hidden(self) -> dict[fx.Node, list[fx.Node]]:
        """Free nodes that write what another free node has made, by who reads that behind them."""
        found: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        writers: dict[int, list[fx.Node]] = defaultdict(list)
        for node in self.graph.nodes:
            cost = self.costs.get(node)
            if cost is None or node.op == "placeholder":
                continue
            for n in node.all_input_nodes:
                for storage in self.costs[n].memory if n in self.costs else ():
                    found[node] += (w for w in writers[storage] if w not in found[node])
            if node not in self.assigned:
                for storage in cost.writes:
                    writers[storage].append(node)
        return found

    def needed(self, nodes: Iterable[fx.Node]) -> set[fx.Node]:
        """What is free and has to be computed for ``nodes``, placeholders among it."""
        found: set[fx.Node] = set()
        stack = [s for n in nodes for s in self._sources(n)]
        while stack:
            node = stack.pop()
            if node not in found and node not in self.assigned:
                found.add(node)
                stack += self._sources(node)
        return found

    def _sources(self, node: fx.Node) -> list[fx.Node]:
        return [*node.all_input_nodes, *self._hidden.get(node, ())]

    def shared(self) -> list[Shared]:
        """Parameters, and what is computed again, by the units that need them."""
        readers: dict[fx.Node, set[int]] = defaultdict(set)
        for node in reversed(self.graph.nodes):
            here = {self.unit_of[node]} if node in self.unit_of else readers.get(node, set())
            for source in self._sources(node) if node.op != "output" and here else ():
                if source not in self.assigned:
                    readers[source] |= here
        parameters: dict[str, tuple[int, set[int]]] = {}
        found = []
        for node, units in readers.items():
            named = self.parameter(node)
            if named is not None:
                name, size = named
                parameters.setdefault(name, (size, set()))[1].update(units)
            elif node in self.costs and self.costs[node].seconds:
                found.append(Shared(readers=tuple(sorted(units)), seconds=self.costs[node].seconds))
        return found + [Shared(readers=tuple(sorted(units)), bytes=size) for size, units in parameters.values()]

    def parameter(self, node: fx.Node) -> tuple[str, int] | None:
        """Name and bytes."""
        spec = parameter_of(node)
        if spec is not None:
            return spec.name, spec.numel * spec.dtype.itemsize
        value = _value(node)
        if node.op == "placeholder" and isinstance(value, torch.nn.Parameter) and not self._is_marked(node):
            return node.name, _bytes(node)
        return None

    def _is_marked(self, node: fx.Node) -> bool:
        return any(parameter_of(user) is not None for user in node.users)

    def first_of(self, module: str) -> fx.Node:
        """The first assigned node that a module computes."""
        names: dict[str, fx.Node] = {}
        for node in self.assigned:
            for name in _modules_of(node):
                names.setdefault(name, node)
        if module in names:
            return names[module]
        near = difflib.get_close_matches(module, names, n=3)
        raise CutError(
            f"no module {module!r} computes anything with a parameter in the captured graph"
            + (
                f"; did you mean {' or '.join(map(repr, near))}?"
                if near
                else f". Those that do: {', '.join(sorted(names)[:20])}."
            )
        )


def _is_mark(node: fx.Node) -> bool:
    return (
        node.op == "call_function"
        and getattr(node.target, "overloadpacket", node.target) is STAGE_BOUNDARY.overloadpacket
    )


def _is_cast(node: fx.Node) -> bool:
    return node.op == "call_method" and node.target in ("to", "float", "half", "bfloat16", "type", "double")


def _modules_of(node: fx.Node) -> list[str]:
    """The names of the modules whose forward a node is in, from the root's."""
    stack = node.meta.get("nn_module_stack") or {}
    return [name for path, *_ in stack.values() if (name := module_name(str(path)))]


def module_name(path: str) -> str:
    """``model.layers.0`` of ``L['self'].model.layers.0``, or of ``L['self']._modules['model']._modules['layers'][0]``."""
    path = re.sub(r"\._modules\['([^']+)'\]", r".\1", path)
    path = re.sub(r"\[(?:'([^']+)'|(\d+))\]", lambda m: f".{m[1] or m[2]}", path)
    parts = path.split(".")
    return ".".join(parts[2:] if parts[:1] == ["L"] or parts[:1] == ["G"] else parts[1:])


def _value(node: fx.Node) -> torch.Tensor | None:
    value = node.meta.get("example_value")
    return value if isinstance(value, torch.Tensor) else None


def _bytes(node: fx.Node) -> int:
    value = _value(node)
    return 0 if value is None else compat.expected_elements(value) * value.element_size()


def _sent_bytes(node: fx.Node, packing: Packing | None) -> int:
    """As a value travels."""
    value = _value(node)
    if packing is None or value is None:
        return _bytes(node)
    return Message.like(node.name, value, True, packing).sent_bytes


# -- what was found ------------------------------------------------------------------------------------------


def _stage(parts: _Parts, stage_of: Mapping[fx.Node, int], s: int) -> Stage:
    own = [n for n, stage in stage_of.items() if stage == s]
    made = _made_of_arrivals(parts, stage_of, s)
    first, late = [n for n in own if n in made], [n for n in own if n not in made]
    come = [  # whose gradients come while the second half waits
        n
        for n in late
        if parts.costs[n].has_gradient and any(r in made or stage_of[r] != s for r in parts.readers.get(n, ()))
    ]
    again = parts.needed(own)
    markers = {n for n in again if parts.parameter(n) is not None}
    named = dict(filter(None, (parts.parameter(n) for n in sorted(markers, key=parts.position.__getitem__))))
    run = {*own, *again, *(n for n in parts.graph.nodes if n.target in CONTEXTS)}
    costs = {n: parts.costs[n] for n in run if n in parts.costs}
    return Stage(
        index=s,
        nodes=tuple(n for n in parts.graph.nodes if n in run),
        forward=sum(c.forward for c in costs.values()),
        input_gradient=sum(parts.costs[n].input_gradient for n in first),
        weight_gradient=sum(c.weight_gradient + (c.input_gradient if n not in made else 0.0) for n, c in costs.items()),
        parameters=tuple(named),
        parameter_bytes=sum(named.values()),
        saved_bytes=sum(parts.costs[n].saved_bytes for n in own),
        light=sum(parts.costs[n].light for n in own),
        light_bytes=sum(parts.costs[n].light_bytes for n in own),
        most_light_bytes=max((parts.costs[n].light_bytes for n in own), default=0),
        held_bytes=sum(parts.costs[n].held_bytes for n in first)
        + sum(parts.costs[n].saved_bytes for n in late)
        + sum(map(_bytes, come)),
    )


def _made_of_arrivals(parts: _Parts, stage_of: Mapping[fx.Node, int], s: int) -> set[fx.Node]:
    """The stage's own nodes through which gradients go back to what arrives: those that read it, or what was made of it."""
    before = parts.crossing(stage_of, s - 1) if s else ()
    memory = set().union(*(parts.costs[n].memory for n in before if parts.costs[n].has_gradient))
    found = set()
    for node in parts.graph.nodes:
        if stage_of.get(node) != s:
            continue
        read = [cost for n in node.all_input_nodes if (cost := parts.costs.get(n)) is not None]
        if any(cost.has_gradient and cost.memory & memory for cost in read):
            found.add(node)
            memory |= parts.costs[node].memory | parts.costs[node].writes
    return found


def _cut(parts: _Parts, stage_of: Mapping[fx.Node, int], s: int, packing: Packing | None, seconds: float = 0.0) -> Cut:
    values = parts.crossing(stage_of, s)
    back = [n for n in values if parts.costs[n].has_gradient]
    return Cut(
        index=s,
        values=values,
        bytes=sum(map(_bytes, values)),
        gradient_bytes=sum(map(_bytes, back)),
        sent_bytes=sum(_sent_bytes(n, packing) for n in values),
        sent_gradient_bytes=sum(_sent_bytes(n, packing) for n in back),
        seconds=seconds,
    )


def _said(stages: Sequence[Stage], cuts: Sequence[Cut], stage_of: Mapping[fx.Node, int]) -> list[str]:
    lines = []
    for stage, behind in itertools.zip_longest(stages, cuts):
        names = [_modules_of(n)[-1] for n in stage.nodes if n in stage_of and _modules_of(n)]
        where = f", {names[0]} to {names[-1]}" if names else ""
        lines.append(
            f"stage {stage.index}: {_time(stage.forward)} forward, {_time(stage.input_gradient)} and "
            f"{_time(stage.weight_gradient)} for gradients of inputs and weights; {_size(stage.parameter_bytes)} of "
            f"{len(stage.parameters)} parameters, {_size(stage.saved_bytes)} saved a micro-batch{where}"
        )
        if behind is not None:
            sent = ", ".join(f"%{n.name}" for n in behind.values)
            few = f" ({_size(behind.sent_bytes)} and {_size(behind.sent_gradient_bytes)} in few bits)"
            lines.append(
                f"cut {behind.index}: {_size(behind.bytes)} there and {_size(behind.gradient_bytes)} back a micro-batch"
                f"{few if behind.is_packed else ''}, {_time(behind.seconds)}: {sent or 'nothing'}"
            )
    return lines


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"
