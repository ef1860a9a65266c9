"""A backward graph in two parts: input gradients now, weight gradients later.

A zero-bubble schedule (Qi et al., Zero Bubble Pipeline Parallelism, 2023) has the stage before wait for the gradients of
activations alone, the part I of a backward, and fills its bubbles with the gradients of parameters, the part W. :func:`split`
cuts the graph that the passes left. I has what the wanted gradients are made of, in the graph's order, runtime nodes among
it; W has the rest, such as the products that make weights' gradients and the reductions of these.

Values that both need are handed over, and held from I to W, as few bytes as can be: what is pointwise may be made again in
W of values that are handed over in its place. That is a minimum cut between what cannot be made again and W, each value with
its bytes. Of several minimum cuts the one next to W is taken, which makes the least again. What was brought from elsewhere, a
gathered parameter or a value from the host, counts with its bytes too; but where W needs a large one it is brought again, for
a weight gradient that needs a weight is rare, and between I and W lies most of a step.

What has side effects or draws random numbers runs once and in the graph's order, and stays on its side of what reads the
memory that it writes.

Dropped: the split of ``torch.distributed.pipelining``, which walks the tape of eager autograd for the nodes where the paths
from inputs and parameters meet. A compiled stage is one node of that tape, and its zero-bubble schedules refuse it. Dropped:
two backward graphs from AOTAutograd, one for each set of inputs. Each would be partitioned by itself, and W would compute all
of I again.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
import torch.fx as fx

from dspass.passes.kernels import REDUCTIONS, fuses, is_view, size_of
from dspass.passes.nodes import STATIC, calls, is_packed, items_of, wait_of
from dspass.passes.packed import DEQUANTISE
from dspass.passes.quantise_saved import DEQUANTISE as DEQUANTISE_SAVED
from dspass.runtime import compat
from dspass.runtime.collectives import gather_start, gather_wait
from dspass.runtime.host import reload_start, reload_wait

#: What was brought from other ranks or from the host is brought again rather than held where it takes more bytes.
HELD_BYTES = 2**20

CONVOLUTION_BACKWARD = torch.ops.aten.convolution_backward.default


@dataclass(frozen=True, kw_only=True)
class Halves:
    """A backward graph in two: ``input`` is None where no wanted output has to be computed, as in the first stage, and
    ``weight`` where no other has.

    ``first`` and ``rest`` are the positions of the outputs of each, ascending. ``input`` answers those of ``first`` and
    behind them ``carried``, values by name, which ``weight`` has as its first placeholders. Their other placeholders are
    inputs of the whole graph, by name. ``given`` are outputs that nothing is computed for: the input, by name, that is
    answered, or a :class:`Literal`.
    """

    input: fx.GraphModule | None
    weight: fx.GraphModule | None
    first: tuple[int, ...]
    rest: tuple[int, ...]
    given: Mapping[int, str | Literal]
    carried: tuple[str, ...]
    outputs: int

    def held_bytes(self) -> int:
        """Bytes that ``weight`` reads of what is alive from one half to the other, parameters and buffers not among them."""
        if self.weight is None:
            return 0
        placeholders = self.weight.graph.find_nodes(op="placeholder")
        return sum(_bytes_held(n) for n in placeholders)


@dataclass(frozen=True)
class Literal:
    """An output that is no value of the graph, such as None for an input without a gradient."""

    value: Any


def split(gm: fx.GraphModule, first: Collection[int]) -> Halves:
    """Cut the backward graph ``gm``, which stays as it is; ``first`` are the positions of the outputs that are wanted first."""
    graph = _with_products_apart(gm.graph)
    outputs = outputs_of(graph)
    given: dict[int, str | Literal] = {}
    for i, output in enumerate(outputs):
        if not isinstance(output, fx.Node):
            given[i] = Literal(output)
        elif i in first and output.op == "placeholder":
            given[i] = output.name
    wanted = [i for i in range(len(outputs)) if i in first and i not in given]
    rest = [i for i in range(len(outputs)) if i not in first and i not in given]
    written = {n: memory for n in graph.nodes if (memory := _written(n))}
    needed = _needed(graph, [outputs[i] for i in wanted], written)
    at_hand = needed | {n for n in graph.nodes if n.target is operator.getitem and n.args[0] in needed}
    later = _later(graph, at_hand, [outputs[i] for i in rest])
    read = {n for node in later for n in node.all_input_nodes} | {outputs[i] for i in rest}
    held = _cheapest({n for n in read if n in at_hand or n.op == "placeholder"}, set().union(*written.values()))
    handed = {n for n in held if n in at_hand and not _is_brought_again(n)}
    carried = [n for n in graph.nodes if n in handed]
    inside = [n for n in graph.nodes if n in needed or n in handed]
    return Halves(
        input=_half(gm, graph, [], inside, [*(outputs[i] for i in wanted), *carried]) if wanted else None,
        weight=_half(gm, graph, carried, later, [outputs[i] for i in rest]) if later or rest else None,
        first=tuple(wanted),
        rest=tuple(rest),
        given=given,
        carried=tuple(n.name for n in carried),
        outputs=len(outputs),
    )


def whole(gm: fx.GraphModule) -> Halves:
    """The backward graph ``gm``, which stays as it is, in one piece: all of it is the second half."""
    outputs = outputs_of(gm.graph)
    given: dict[int, str | Literal] = {i: Literal(o) for i, o in enumerate(outputs) if not isinstance(o, fx.Node)}
    rest = [i for i in range(len(outputs)) if i not in given]
    nodes = [n for n in gm.graph.nodes if n.op == "call_function"]
    return Halves(
        input=None,
        weight=_half(gm, gm.graph, [], nodes, [outputs[i] for i in rest]),
        first=(),
        rest=tuple(rest),
        given=given,
        carried=(),
        outputs=len(outputs),
    )


def outputs_of(graph: fx.Graph) -> Sequence[Any]:
    outputs = graph.find_nodes(op="output")[0].args[0]
    return outputs if isinstance(outputs, (list, tuple)) else (outputs,)


def _with_products_apart(graph: fx.Graph) -> fx.Graph:
    """``graph``, or a copy in which no operator answers gradients of an activation and of a parameter at once: those of a
    convolution are asked for one by one, as its kernels compute them in any case."""
    convolutions = calls(graph, CONVOLUTION_BACKWARD)
    if not convolutions:
        return graph
    found = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    outputs = found.graph_copy(graph, copies)
    found.output(outputs)
    for both in (copies[n] for n in convolutions):
        *rest, mask = both.args
        assert isinstance(mask, (list, tuple))
        for which in ((0,), (1, 2)):
            items = [item for item in both.users if item.args[1] in which]
            if not items:
                continue
            only = [asked and i in which for i, asked in enumerate(mask)]
            with found.inserting_before(both):
                one = found.call_function(CONVOLUTION_BACKWARD, (*rest, only))
            values = both.meta["val"]
            one.meta = {**both.meta, "val": tuple(v if asked else None for v, asked in zip(values, only, strict=True))}
            for item in items:
                item.replace_input_with(both, one)
        found.erase_node(both)
    return found


# -- which node stands in which half -------------------------------------------------------------------------------


def _needed(graph: fx.Graph, wanted: Sequence[fx.Node], written: Mapping[fx.Node, set[fx.Node]]) -> set[fx.Node]:
    """The nodes of I: what ``wanted`` is made of, and what may not come behind it. ``written``: whose memory a node writes."""
    inside: set[fx.Node] = set()
    effects = [n for n in graph.nodes if n.op == "call_function" and n.is_impure()]
    missing: Iterable[fx.Node] = wanted
    while missing:
        stack = list(missing)
        while stack:
            node = stack.pop()
            if node in inside or node.op in ("placeholder", "get_attr"):
                continue
            inside.add(node)
            stack += node.all_input_nodes
        missing = _out_of_order(graph, inside, effects, written)
    return inside


def _out_of_order(
    graph: fx.Graph,
    inside: set[fx.Node],
    effects: Sequence[fx.Node],
    written: Mapping[fx.Node, set[fx.Node]],
) -> set[fx.Node]:
    """What would run behind ``inside`` and has to run before some of it: effects in their order, and a reader before or behind
    what is written as it stands."""
    last = max((n for n in effects if n in inside), default=None)
    found = {n for n in effects if last is not None and n < last}
    for write, memory in written.items():
        for node in graph.nodes:
            if node.op == "output" or node is write or memory.isdisjoint(map(_memory, node.all_input_nodes)):
                continue
            if node in inside and write < node:
                found.add(write)
            if write in inside and node < write:
                found.add(node)
    return found - inside


def _written(node: fx.Node) -> set[fx.Node]:
    """Whose memory an operator writes in place."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return set()
    names = [argument.name for argument in schema.arguments]
    arguments = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    found: list[fx.Node] = []
    for argument in schema.arguments:
        if argument.is_write:
            fx.map_arg(arguments.get(argument.name), found.append)
    return {_memory(n) for n in found}


def _memory(node: fx.Node) -> fx.Node:
    """The node whose memory that of ``node`` is, where it is a view or an item."""
    while is_view(node) or node.target is operator.getitem:
        node = node.all_input_nodes[0]
    return node


def _later(graph: fx.Graph, at_hand: set[fx.Node], rest: Sequence[fx.Node]) -> list[fx.Node]:
    """The nodes of W, in order: what ``rest`` is made of beside ``at_hand``, and effects that nobody reads."""
    found: set[fx.Node] = set()
    stack = [*rest, *(n for n in graph.nodes if n.op == "call_function" and n.is_impure())]
    while stack:
        node = stack.pop()
        if node not in found and node not in at_hand and node.op == "call_function":
            found.add(node)
            stack += node.all_input_nodes
    return [n for n in graph.nodes if n in found]


# -- what is handed over -------------------------------------------------------------------------------------------


def _cheapest(read: Collection[fx.Node], written: Set[fx.Node]) -> set[fx.Node]:
    """The values of fewest bytes, inputs of the graph among them, of which all that W reads can be made. What reads memory that
    is ``written`` in place is not made again: it could be too late."""
    network = nx.DiGraph()
    network.add_nodes_from(["source", "sink"])
    stack, seen = list(read), set(read)
    for node in read:
        network.add_edge((node, "made"), "sink")
    while stack:
        node = stack.pop()
        capacity = {} if _is_alias(node) else {"capacity": _bytes_held(node)}
        network.add_edge((node, "inputs"), (node, "made"), **capacity)
        too_late = not _is_alias(node) and any(_memory(n) in written for n in node.all_input_nodes)
        if too_late or not _is_cheap(node):
            network.add_edge("source", (node, "inputs"))
            continue
        for source in node.all_input_nodes:
            network.add_edge((source, "made"), (node, "inputs"))
            if source not in seen:
                seen.add(source)
                stack.append(source)
    _, (_, side) = nx.minimum_cut(network, "source", "sink")  # the sink's smallest side
    return {node for node in seen if (node, "made") in side and (node, "inputs") not in side}


def _is_cheap(node: fx.Node) -> bool:
    """Whether a value is made again at next to no cost: Inductor fuses it into what reads it."""
    if node.op == "get_attr" or _is_alias(node):
        return True
    if node.op != "call_function" or node.is_impure() or node.target in REDUCTIONS:
        return False
    return fuses(node) or node.target is DEQUANTISE_SAVED


def _is_alias(node: fx.Node) -> bool:
    """Whether a value is a view, or one of several: what holds it holds what it is a view of."""
    return is_view(node) or (node.target is operator.getitem and is_view(node.all_input_nodes[0]))


def _bytes_held(node: fx.Node) -> int:
    """Bytes of device memory that are held with a value; none for parameters and buffers, which are there in any case, and for
    what lies on the host."""
    is_free = STATIC in node.meta or (node.users and all(user.target is reload_start for user in node.users))
    return 0 if is_free else size_of(node)


def _is_brought_again(node: fx.Node) -> bool:
    """Whether a value that both halves read is a large one that was brought from elsewhere: an item of a wait, or of what a
    packed bucket becomes, that is made of inputs of the graph by what answers the same each time."""
    if node.target is not operator.getitem or size_of(node) <= HELD_BYTES:
        return False
    source = node.all_input_nodes[0]
    if source.target not in (DEQUANTISE, gather_wait, reload_wait):
        return False
    stack, seen = [source], {source}
    while stack:
        made_of = set(stack.pop().all_input_nodes) - seen
        seen |= made_of
        stack += made_of
    return not any(n.op == "call_function" and n.is_impure() for n in seen)


# -- the halves as graphs ------------------------------------------------------------------------------------------


def _half(
    gm: fx.GraphModule,
    whole: fx.Graph,
    carried: Sequence[fx.Node],
    nodes: Sequence[fx.Node],
    outputs: Sequence[fx.Node],
) -> fx.GraphModule:
    """A graph from ``carried`` and those inputs of ``whole`` that it reads to ``outputs``. It has ``nodes`` in order, and what
    else they are made of right before its first reader."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in [*carried, *whole.find_nodes(op="placeholder")]:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta) if node.op == "placeholder" else {"val": node.meta["val"]}
    for node in [*nodes, *outputs]:
        stack = [node]
        while stack:
            made = stack.pop()
            if made in copies:
                continue
            missing = [source for source in made.all_input_nodes if source not in copies]
            if missing:
                stack += [made, *missing]
            else:
                copies[made] = graph.node_copy(made, copies.__getitem__)
    graph.output(tuple(copies[n] for n in outputs))
    _bring_less(graph)
    for node in reversed(graph.find_nodes(op="placeholder")):
        if not node.users and not isinstance(node.meta.get("val"), torch.SymInt):  # shapes have sizes that nobody reads
            graph.erase_node(node)
    return compat.graph_module(gm, graph)


def _bring_less(graph: fx.Graph) -> None:
    """Take out of buckets that are gathered or reloaded what only the other half reads. What is packed stays whole."""
    for start in [*calls(graph, gather_start), *calls(graph, reload_start)]:
        if start.target is gather_start and is_packed(start):
            continue
        wait = wait_of(start)
        items = items_of(wait)
        used = [i for i, item in enumerate(items) if item is not None]
        if len(used) == len(items):
            continue
        for place, i in enumerate(used):
            item = items[i]
            assert item is not None
            item.args = (wait, place)
        listed = 2 if start.target is gather_start else 1  # the shards and their keys, or the values
        arguments: list[Any] = list(start.args)
        start.args = (*([argument[i] for i in used] for argument in arguments[:listed]), *arguments[listed:])
        start.meta = {**start.meta, "val": [start.meta["val"][i] for i in used]}
        wait.meta = {**wait.meta, "val": start.meta["val"]}
