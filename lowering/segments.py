"""Cut a graph at the runtime's nodes and compile what lies between with Inductor.

The answer is a :class:`Program`: a list of instructions in the graph's own order. That order is the schedule which the
passes made, so nothing below may change it, and a tensor is released where its last reader in the graph is.

Dropped: handing the whole graph to Inductor with ``_c10d_functional`` nodes in it, as SimpleFSDP and vLLM do. Inductor
moves collectives (its overlap pass fills whatever memory it is given), pools their buffers with others, and cannot
compile identical layers once. Here a segment that occurs again, as a model's layers do, is compiled once; the order of
collectives is ours on every back end; and the price, no fusion across a point where a bucket arrives, is one pass over
an activation a bucket.
"""

from __future__ import annotations

import hashlib
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.fx as fx

from dspass.lowering.expand import expand
from dspass.passes.kernels import REDUCTIONS, fuses, is_view, size_of
from dspass.passes.packed import DEQUANTISE, SUM
from dspass.passes.text import print_value
from dspass.runtime import compat
from dspass.runtime.collectives import (
    RUNTIME_FUNCTIONS,
    gather_start,
    gather_wait,
    keep_in_node,
    reduce_start,
    reduce_wait,
    rounding_errors,
)
from dspass.runtime.host import offload_start, offload_wait, reload_start, reload_wait
from dspass.runtime.ledger import HOST
from dspass.runtime.program import Instruction, Probe, Program

Compiled = Callable[[list[Any]], Sequence[Any]]


@dataclass(kw_only=True)
class SegmentCompiler:
    """Compiles segments with Inductor, each distinct one once.

    ``patches`` are Inductor settings. They travel with each compilation since the backward graph is compiled long after
    any context manager around the forward has ended.
    """

    patches: Mapping[str, Any] = field(default_factory=dict)
    share: bool = True
    compiled: int = 0
    reused: int = 0
    _cache: dict[str, Compiled] = field(default_factory=dict)

    def __call__(self, gm: fx.GraphModule, *, is_backward: bool, is_inference: bool) -> Compiled:
        inputs = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
        same = segment_key(gm.graph) if self.share and not _has_constants(gm.graph) else None
        key = None if same is None else f"{compat.inductor_hash(self.patches)} {same}"
        if key is not None and key in self._cache:
            self.reused += 1
            return self._cache[key]
        self.compiled += 1
        result = compat.compile_segment(
            expand(gm, self.patches), inputs, is_backward=is_backward, is_inference=is_inference, patches=self.patches
        )
        if key is not None:
            self._cache[key] = result
        return result


def lower(
    gm: fx.GraphModule,
    compiler: Callable[..., Compiled],
    *,
    is_backward: bool,
    is_inference: bool,
    probe: Probe | None = None,
    order: Callable[[int], Iterable[int]] = range,
) -> Program:
    """Compile ``gm`` into a :class:`Program` that takes a list of the graph's inputs and answers its outputs.

    ``order`` says in which order so many segments are compiled; see :func:`shared_order`.
    """
    graph = gm.graph
    placeholders = graph.find_nodes(op="placeholder")
    symbols = [n for n in placeholders if isinstance(n.meta.get("val"), torch.SymInt)]
    output = graph.find_nodes(op="output")[0]
    pieces = cut(graph)
    owner = {node: i for i, piece in enumerate(pieces) for node in piece}
    instructions: list[Instruction] = []
    segments: dict[int, fx.GraphModule] = {}  # by the place of their instruction
    for i, piece in enumerate(pieces):
        node = piece[0]
        if _is_runtime(node):
            instructions.append(_runtime_instruction(node))
            continue
        if all(_is_host(n) for n in piece):
            instructions += [_host_instruction(n) for n in piece]
            continue
        sources = dict.fromkeys([*symbols, *(a for n in piece for a in n.all_input_nodes if owner.get(a) != i)])
        inputs = [n for n in sources if n.op != "get_attr"]
        results = [n for n in piece if n.op != "get_attr" and any(owner.get(u, -1) != i for u in n.users)]
        mutates = any(_mutates(n) for n in piece)
        if not results and not mutates:
            continue
        segments[len(instructions)] = build_segment(gm, piece, inputs, results)
        instructions.append(
            Instruction(
                label=f"segment_{i}",
                run=_not_compiled,
                inputs=tuple(n.name for n in inputs),
                outputs=tuple(n.name for n in results),
                boxed=True,
            )
        )
    places = list(segments)
    for place in (places[i] for i in order(len(places))):
        run = compiler(segments[place], is_backward=is_backward, is_inference=is_inference)
        instructions[place] = replace(instructions[place], run=run)
    outputs = output.args[0] if isinstance(output.args[0], (list, tuple)) else (output.args[0],)
    return Program.build(
        inputs=[n.name for n in placeholders],
        instructions=instructions,
        outputs=[n.name if isinstance(n, fx.Node) else n for n in outputs],
        literal=[not isinstance(n, fx.Node) for n in outputs],
        categories=memory_categories(graph, is_backward),
        is_backward=is_backward,
        probe=probe,
    )


def shared_order(rank: int, ranks: int) -> Callable[[int], list[int]]:
    """An order of compilation for each of ``ranks`` processes that share Inductor's cache on disk.

    All compile the same segments. In the same order they would wait for one another's locks; so each begins elsewhere, every
    other one goes backwards, and what it comes to later it finds in the cache. Two ranks take half of the time.
    """

    def order(count: int) -> list[int]:
        first = rank // 2 * 2 * count // max(ranks, 1)
        turned = [*range(first, count), *range(first)]
        return turned[::-1] if rank % 2 else turned

    return order


def _not_compiled(args: list[Any]) -> Sequence[Any]:
    raise AssertionError("a segment ran before it was compiled")


def memory_categories(graph: fx.Graph, is_backward: bool) -> dict[str, str]:
    """What kind of memory the graph's values are, beyond temporaries: what a gather fills, what the backward graph will
    read, and gradients, whole or reduced."""
    found: dict[str, str] = {}
    for node in graph.nodes:
        if node.target in (gather_start, gather_wait, keep_in_node):
            found[node.name] = "gathered"
        elif node.target is reduce_start:
            found |= dict.fromkeys((n.name for n in node.args[0]), "gradients")
            found[node.name] = "gradients"
        elif node.target in (reduce_wait, rounding_errors):
            found[node.name] = "gradients"
        elif node.target in (offload_start, offload_wait):
            found[node.name] = HOST
        elif node.target in (reload_start, reload_wait):
            found[node.name] = "saved"
        elif node.target is DEQUANTISE:
            found[node.name] = "gathered"
        elif node.target is SUM:
            found[node.name] = "gradients"
        elif _is_part(node) and found.get(node.all_input_nodes[0].name) in ("gathered", "saved", HOST):
            found[node.name] = found[node.all_input_nodes[0].name]  # also a copy that is kept for the backward graph
        elif node.op == "output":
            kind = "gradients" if is_backward else "saved"
            found |= {n.name: kind for n in node.all_input_nodes if n.op != "placeholder" and n.name not in found}
    return found


def cut(graph: fx.Graph) -> list[list[fx.Node]]:
    """The graph's nodes in order, in pieces: one runtime node (or item of one), or a run of compute nodes.

    Symbolic arithmetic, items of runtime results and views that only one later piece reads do not begin a segment of
    their own; see :func:`sink_views`. What only later pieces read, and is made of less, is made there; see
    :func:`sink_enlarged`.
    """
    hoist_items(graph)
    sink_views(graph)
    sink_enlarged(graph)
    pieces: list[list[fx.Node]] = []
    compute: list[fx.Node] | None = None
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if _is_runtime(node):
            pieces.append([node])
            compute = None
            continue
        if compute is None:
            compute = []
            pieces.append(compute)
        compute.append(node)
    return pieces


def hoist_items(graph: fx.Graph) -> None:
    """Move each item of an operator with several results right behind it: a segment answers tensors, never a tuple."""
    for node in graph.find_nodes(op="call_function", target=operator.getitem):
        source = node.args[0]
        if not _is_runtime(node) and source.op == "call_function" and source.target is not operator.getitem:
            source.append(node)


def sink_views(graph: fx.Graph) -> None:
    """Move each node whose every reader comes later behind as many runtime nodes as it can cross, if it is a view.

    A view that ends one segment would make it a segment's output, and a piece of views alone a segment of nothing.
    """
    for node in reversed(list(graph.nodes)):
        if node.users and is_view(node):
            first = min(node.users)
            if first.op != "output" and first.prev is not node:
                first.prepend(node)


def sink_enlarged(graph: fx.Graph) -> None:
    """Make a pointwise value where a later piece reads it first, if nothing reads it before and what it is made of is smaller.

    In one piece it would be fused into its reader and take no memory. Where a runtime node stands between them it is written,
    and held until then: the gradient of a loss is there before the product that it goes into has its weight, as large as the
    logits, and made of the targets and a number. Reductions stay: what else is in their loop decides how they add. Nothing
    crosses what writes in place, which could be what it reads. In a graph with symbolic sizes everything stays: to compare
    them would add guards.
    """
    if _has_symbols(graph):
        return
    writes = [node for node in graph.nodes if _mutates(node)]
    pieces: dict[fx.Node, int] = {}
    for i, node in enumerate(graph.nodes):
        pieces[node] = i if not pieces or _is_runtime(node) or _is_runtime(node.prev) else pieces[node.prev]
    for node in reversed(list(graph.nodes)):
        if not _is_pointwise(node) or not node.users:
            continue
        first = min(node.users)
        if first.op == "output" or pieces[first] == pieces[node]:
            continue
        chain, leaves = _made_there(node, pieces)
        more = sum(_held_by(leaf) for leaf in leaves if max(leaf.users) < first)
        if more < size_of(node) and not any(chain[0] < write < first for write in writes):
            for one in chain:
                first.prepend(one)
                pieces[one] = pieces[first]


def _made_there(node: fx.Node, pieces: Mapping[fx.Node, int]) -> tuple[list[fx.Node], set[fx.Node]]:
    """``node`` with those before it in its piece that only these read and that are no smaller than what they are made of, in
    order; and what all of them are made of."""
    chain, leaves = {node}, set(node.all_input_nodes)
    while True:
        found = next(
            (
                leaf
                for leaf in leaves
                if pieces[leaf] == pieces[node]
                and (_is_pointwise(leaf) or is_view(leaf))
                and chain.issuperset(leaf.users)
                and sum(map(_held_by, set(leaf.all_input_nodes) - leaves)) <= _held_by(leaf)
            ),
            None,
        )
        if found is None:
            return sorted(chain), leaves
        chain.add(found)
        leaves = leaves - {found} | set(found.all_input_nodes)


def _held_by(node: fx.Node) -> int:
    """Bytes of memory that are alive with a value: a view's are those of what it is a view of."""
    while is_view(node):
        node = node.all_input_nodes[0]
    return size_of(node)


def _is_pointwise(node: fx.Node) -> bool:
    return node.op == "call_function" and fuses(node) and node.target not in REDUCTIONS and not _mutates(node)


def build_segment(
    gm: fx.GraphModule, piece: Sequence[fx.Node], inputs: Sequence[fx.Node], results: Sequence[fx.Node]
) -> fx.GraphModule:
    """A graph of its own of ``piece``, from ``inputs`` to ``results``."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = {"val": node.meta["val"]}
    for node in piece:
        for source in node.all_input_nodes:
            if source.op == "get_attr" and source not in copies:
                copies[source] = graph.node_copy(source)
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[n] for n in results))
    return compat.graph_module(gm, graph)


def segment_key(graph: fx.Graph) -> str | None:
    """Equal for graphs that compute the same: names do not count, shapes, strides, types and devices do. Nor do names of sizes
    that only a run tells, as each layer of experts has its own; None where others are symbols, which have guards."""
    unknown = compat.unknown_sizes(leaf for node in graph.nodes for leaf in _leaves(node))
    if unknown is None:
        return None
    number = {node: i for i, node in enumerate(graph.nodes)}

    def argument(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return f"%{number[value]}"
        if isinstance(value, (list, tuple)):
            return [argument(v) for v in value]
        if isinstance(value, dict):
            return {k: argument(v) for k, v in value.items()}
        return repr(value)

    lines = []
    for node in graph.nodes:
        layout = [
            (print_value(v), tuple(v.stride()), str(v.device), v.storage_offset())
            if isinstance(v, torch.Tensor)
            else repr(v)
            for v in _leaves(node)
        ]
        target = "" if node.op == "placeholder" else str(node.target)
        rounds = node.meta.get("low_precision_pointwise_barrier", False)  # of Inductor's emulate_precision_casts
        lines.append(f"{node.op} {target} {argument(node.args)} {argument(dict(node.kwargs))} {layout} {rounds}")
    lines += unknown.values()
    text = "\n".join(lines)
    if unknown:
        place = {name: f"size{i}" for i, name in enumerate(unknown)}
        text = re.sub(r"\bu\d+\b", lambda found: place.get(found[0], found[0]), text)
    return hashlib.sha256(text.encode()).hexdigest()


def _leaves(node: fx.Node) -> Sequence[Any]:
    value = node.meta.get("val")
    return value if isinstance(value, (list, tuple)) else [value]


def _is_runtime(node: fx.Node) -> bool:
    if node.target in RUNTIME_FUNCTIONS:
        return True
    source = node.args[0] if node.args else None
    return node.target is operator.getitem and isinstance(source, fx.Node) and source.target in RUNTIME_FUNCTIONS


def _is_part(node: fx.Node) -> bool:
    """An item or a view: memory of what it is made of."""
    return node.target is operator.getitem or (node.op == "call_function" and is_view(node))


def _is_host(node: fx.Node) -> bool:
    """Sizes: computed by Python, not worth a segment."""
    return node.op == "call_function" and isinstance(
        node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool, int)
    )


def _mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _has_symbols(graph: fx.Graph) -> bool:
    return any(
        isinstance(s, torch.SymInt)
        for n in graph.nodes
        for v in _leaves(n)
        for s in ([*v.shape, *v.stride(), v.storage_offset()] if isinstance(v, torch.Tensor) else [v])
    )


def _has_constants(graph: fx.Graph) -> bool:
    """Constants are told apart by name only; segments with any are not shared."""
    return any(n.op == "get_attr" for n in graph.nodes)


def _runtime_instruction(node: fx.Node) -> Instruction:
    return Instruction(
        label=node.name,
        run=_caller(node),
        inputs=tuple(n.name for n in node.all_input_nodes),
        outputs=(node.name,),
        boxed=False,
        is_runtime=True,
        makes_host_memory=node.target is offload_start,
    )


def _host_instruction(node: fx.Node) -> Instruction:
    names = tuple(n.name for n in node.all_input_nodes)
    return Instruction(label=node.name, run=_caller(node), inputs=names, outputs=(node.name,), boxed=False)


def _caller(node: fx.Node) -> Callable[[list[Any]], Sequence[Any]]:
    """What calls the node's own function with the values of its inputs, in their order."""
    target: Any = node.target
    places = {n: i for i, n in enumerate(node.all_input_nodes)}

    def run(values: list[Any]) -> tuple[Any]:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[places[n]])
        return (target(*args, **kwargs),)

    return run
