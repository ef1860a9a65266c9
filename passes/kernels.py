"""What Inductor will make one kernel of, seen in the graph before it is lowered.

An operator that does not fuse (a product, an attention) is a kernel of its own. All others become generated code: what is
fused into its readers takes no memory, and values that are computed over the same elements from the same tensors are written
by one kernel, which reads each of these tensors once. :func:`kernels` puts a value into the last generated kernel that

- comes no earlier than those that its inputs come from, so that no two kernels wait for each other,
- shares a tensor with it, or writes one that it reads,
- loops over as many elements, and reduces in the same direction, if both reduce: rows and columns are different loops,
- lies in the same segment: collectives and copies stand between kernels (:mod:`dspass.lowering.segments`).

What is fused into several readers is computed in each, and reads what it is made of again. Inductor ends that where a value
with several readers is made of more than :data:`REUSED_READS` tensors, and any where it is made of more than :data:`READS`: it
goes to memory too. A residual stream that nothing else needs is one.

Dropped: to lower the graph and ask Inductor's scheduler. That is exact, and takes minutes for a large model, where a planner
asks for many graphs and ``explain`` has no device to lower for.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from dspass.runtime import compat
from dspass.runtime.collectives import RUNTIME_FUNCTIONS

_aten = torch.ops.aten

#: Reductions that fuse.
REDUCTIONS = {
    _aten.sum.dim_IntList,
    _aten.mean.dim,
    _aten.amax.default,
    _aten.sum.default,
    _aten.var_mean.correction,
    _aten.mean.default,
}

_FUSIBLE = REDUCTIONS | {
    torch.ops.prims.convert_element_type.default,
    _aten.embedding.default,
    _aten.cat.default,
    _aten.where.self,
    _aten.full.default,
    _aten.scalar_tensor.default,
    torch.ops.prims.iota.default,
    _aten.gather.default,
    _aten.index.Tensor,
    _aten.slice_scatter.default,
    _aten.select_scatter.default,
    _aten.constant_pad_nd.default,
}

#: Those that read only a part of their first input, as large as what they answer.
PICKS = {_aten.embedding.default, _aten.gather.default, _aten.index.Tensor}


#: A fused value with several readers reads no more tensors than this, and none more than that (Inductor's
#: ``realize_reads_threshold`` and ``realize_acc_reads_threshold``, as they are set by default).
REUSED_READS, READS = 4, 8


@dataclass(frozen=True, slots=True)
class Traits:
    """What is true of a node wherever it stands: see the functions of these names."""

    sources: list[fx.Node]
    is_call: bool
    is_view: bool
    fuses: bool
    is_item_in_memory: bool
    size: int

    @classmethod
    def of(cls, node: fx.Node) -> Traits:
        is_call = node.op == "call_function"
        return cls(node.all_input_nodes, is_call, is_view(node), fuses(node), is_item_in_memory(node), size_of(node))


class TraitsOf(dict[fx.Node, Traits]):
    """Of the nodes of a graph that does not change. Looking them up takes a tenth of working them out."""

    def __missing__(self, node: fx.Node) -> Traits:
        found = self[node] = Traits.of(node)
        return found


@dataclass(frozen=True)
class Stretch:
    """Nodes that run one after another: a graph, or one half of a joint graph as the planner sees it. Values that are ``given``
    lie in memory before it, ``results`` behind it. What reads a node is looked for in the stretch alone. Stretches of one graph
    may share their ``traits``."""

    nodes: Sequence[fx.Node]
    given: Set[fx.Node]
    results: Set[fx.Node]
    traits: TraitsOf = field(default_factory=TraitsOf, compare=False, repr=False)

    @classmethod
    def of(cls, graph: fx.Graph) -> Stretch:
        nodes = list(graph.nodes)
        output = nodes.pop()
        return cls(nodes, {n for n in nodes if n.op == "placeholder"}, set(output.all_input_nodes))

    @functools.cached_property
    def materialised(self) -> set[fx.Node]:
        """Nodes whose value takes memory: results, what an operator that does not fuse reads or writes, and what would be read
        again and again otherwise."""
        demanded = set(self.results)  # in memory, for a reader that does not fuse
        readers: dict[fx.Node, int] = dict.fromkeys(self.results, 1)
        for node in reversed(self.nodes):
            if node in self.given:
                continue
            traits = self.traits[node]
            for source in traits.sources:
                readers[source] = readers.get(source, 0) + 1
            if node in demanded if traits.is_view else not traits.fuses:
                demanded.update(traits.sources)
        found: set[fx.Node] = set()
        reads: dict[fx.Node, set[fx.Node]] = {}  # of a value that is not in memory: what it is made of there
        for node in self.nodes:
            traits = self.traits[node]
            if node in self.given or not traits.is_call or traits.is_item_in_memory:
                continue
            made_of: set[fx.Node] = set()
            for source in traits.sources:
                made_of |= reads.get(source, {source})
            if _takes_memory(node, traits, node in demanded, len(made_of), readers.get(node, 0)):
                found.add(node)
            else:
                reads[node] = made_of
        return found


@dataclass
class Kernel:
    """``writes`` are the nodes whose values it puts into memory, the last of which says when it has run; ``reads`` bytes of
    each node in memory that it reads, and ``computes`` the nodes that are part of it. ``elements`` is how often its inner loop
    runs and ``direction`` that of its reductions; an operator that does not fuse ``is_generated`` not."""

    is_generated: bool
    writes: list[fx.Node]
    reads: dict[fx.Node, int]
    computes: dict[fx.Node, None]
    elements: int = 0
    direction: str = ""


@dataclass
class _Part:
    """What is fused into a node: its reads of memory, and the operators from there."""

    reads: dict[fx.Node, int] = field(default_factory=dict)
    computes: dict[fx.Node, None] = field(default_factory=dict)


def kernels(part: fx.Graph | Stretch) -> list[Kernel]:
    """The kernels of ``part`` in the order in which they can run."""
    stretch = part if isinstance(part, Stretch) else Stretch.of(part)
    solid = stretch.materialised
    traits = stretch.traits
    in_memory = {*solid, *stretch.given, *(n for n in stretch.nodes if traits[n].is_item_in_memory)}
    parts: dict[fx.Node, _Part] = {}
    found: list[Kernel] = []
    made: dict[fx.Node, int] = {}  # the kernel that writes a node
    segment = 0  # the first kernel of this one
    for node in stretch.nodes:
        if node.target in RUNTIME_FUNCTIONS:
            segment = len(found)
        inside = parts[node] = _part(node, traits, in_memory, parts)
        if traits[node].is_item_in_memory and node.args[0] in made:
            made[node] = made[node.args[0]]
        if node not in solid:
            continue
        if not traits[node].fuses:
            made[node] = len(found)
            found.append(Kernel(False, [node], inside.reads, {node: None}))
            continue
        elements, direction = _loop(node, inside)
        earliest = segment
        for source in inside.reads:
            if source in made:
                earliest = max(earliest, made[source] + (not found[made[source]].is_generated))
        place = next(
            (i for i in range(len(found) - 1, earliest - 1, -1) if _joins(found[i], inside, elements, direction)), None
        )
        if place is None:
            place = len(found)
            found.append(Kernel(True, [], {}, {}, elements, direction))
        kernel = found[place]
        kernel.writes.append(node)
        kernel.computes.update(inside.computes)
        kernel.direction = kernel.direction or direction
        for source, size in inside.reads.items():
            if made.get(source) != place:
                kernel.reads[source] = max(size, kernel.reads.get(source, 0))
        made[node] = place
    return found


def _part(node: fx.Node, traits: TraitsOf, in_memory: set[fx.Node], parts: dict[fx.Node, _Part]) -> _Part:
    """What ``node`` reads from memory, and computes on the way, if it is written where it stands."""
    part = _Part()
    mine = traits[node]
    for i, source in enumerate(mine.sources):
        picks = mine.is_view or (i == 0 and node.target in PICKS)
        for read, size in ({source: traits[source].size} if source in in_memory else parts[source].reads).items():
            part.reads[read] = max(min(size, mine.size) if picks else size, part.reads.get(read, 0))
        if source not in in_memory:
            part.computes |= parts[source].computes
    if mine.is_call and not mine.is_view:
        part.computes[node] = None
    return part


def _loop(node: fx.Node, part: _Part) -> tuple[int, str]:
    """How many elements a generated kernel for ``node`` loops over, and the direction in which it reduces."""
    elements, direction = elements_of(node), ""
    for inner in part.computes:
        if inner.target in REDUCTIONS:
            elements = max(elements, elements_of(inner.args[0]))
            direction = direction_of(inner)
    return elements, direction_of(node) if node.target in REDUCTIONS else direction


def direction_of(node: fx.Node) -> str:
    """Whether a reduction is over ``rows``, the last dimensions, or over ``columns``."""
    dims = node.args[1] if len(node.args) > 1 else None
    if not dims:
        return "rows"
    rank = node.args[0].meta["val"].dim()
    trailing = {rank - 1 - i for i in range(len(dims))}
    return "rows" if {d % rank for d in dims} == trailing else "columns"


def _joins(kernel: Kernel, part: _Part, elements: int, direction: str) -> bool:
    if not kernel.is_generated or kernel.elements != elements:
        return False
    if kernel.direction and direction and kernel.direction != direction:
        return False
    return any(source in kernel.reads for source in part.reads) or any(w in part.reads for w in kernel.writes)


def fuses(node: fx.Node) -> bool:
    """Whether Inductor makes this part of a generated kernel."""
    return is_fusible(node.target)


def is_fusible(target: Any) -> bool:
    """:func:`fuses` of an operator."""
    return torch.Tag.pointwise in getattr(target, "tags", ()) or target in _FUSIBLE


def is_view(node: fx.Node) -> bool:
    return getattr(node.target, "is_view", False) is True


def is_tuple(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (list, tuple))


def ends_kernel(node: fx.Node) -> bool:
    """Whether Inductor's kernels end here in any case, or a segment does."""
    return node.op == "call_function" and not fuses(node) and not is_view(node) and not _picks_item(node)


def materialised(graph: fx.Graph) -> set[fx.Node]:
    """:attr:`Stretch.materialised` of a whole graph."""
    return Stretch.of(graph).materialised


def _takes_memory(node: fx.Node, traits: Traits, is_demanded: bool, reads: int, readers: int) -> bool:
    value = node.meta.get("val")
    if traits.is_view or _picks_item(node) or not leaves(value):
        return False
    if not isinstance(value, torch.Tensor):
        return not traits.fuses and getattr(node.target, "namespace", None) is not None
    return is_demanded or not traits.fuses or reads > READS or (readers > 1 and reads > REUSED_READS)


def _picks_item(node: fx.Node) -> bool:
    return node.target is operator.getitem


def is_item_in_memory(node: fx.Node) -> bool:
    """One of the tensors that a kernel of its own, or a collective, answers."""
    return _picks_item(node) and not fuses(node.args[0])


def leaves(value: Any) -> list[torch.Tensor]:
    return [v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, torch.Tensor)]


def size_of(node: fx.Node) -> int:
    """Bytes of the tensors that a node answers, sizes that are not known as they are expected."""
    return sum(compat.expected_elements(v) * v.element_size() for v in leaves(node.meta.get("val")))


def elements_of(node: fx.Node) -> int:
    return max((compat.expected_elements(v) for v in leaves(node.meta.get("val"))), default=0)
