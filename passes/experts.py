"""Mixtures of experts, recognised in a captured graph: grouped products of sorted rows, and what lies between them.

However a model routes, sorts and weighs its tokens, its experts themselves are grouped products: ``rows[rows, in]``, sorted by
expert, ``weight[experts, in, out]`` and the ``ends`` of each expert's rows. Products with the same ends are one layer. Its
*inside* is all that lies on a way from one of its products to another, and has to treat each row by itself: then each row may
be computed wherever its expert is. That is looked at in the operators that the inside is made of, not in its names.

A layer needs nothing else: rows come in with whatever values the inside reads of each, and go out where they are read outside.
A value that is only a parameter's row for each row's expert (a bias) is made anew.

Dropped: patterns of nodes for each library's way to write routing, which is what changes from release to release. Dropped:
names of modules, as DeepSpeed's AutoEP presets have them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from dspass.runtime import compat

#: Grouped products by the name of what is called: ``(rows, weight, ends)``. ``transformers`` brings the second for what torch's
#: own does not take.
_PRODUCTS = ("_grouped_mm", "grouped_mm", "grouped_mm_fallback", "grouped_product")

#: What may stand between a parameter and a product, by name; transpositions have to leave the first dimension alone.
_MOVES = {"transpose", "permute", "swapaxes", "unsqueeze"}
_OF_WEIGHTS = {"to", "type", "type_as", "float", "half", "bfloat16", "contiguous", "clone", "detach", *_MOVES}

_COUNTS = {"histc", "bincount"}
_CASTS = {"to", "float", "int", "long", "type", "reshape", "view", "flatten", "contiguous", "clone", "detach"}


@dataclass(kw_only=True, eq=False)
class Layer:
    """One layer of experts in a graph. ``weights`` leads from each of its ``products`` to the parameter that it reads, a
    placeholder or a marker; ``inside`` holds the products too, in order."""

    products: list[fx.Node]
    weights: dict[fx.Node, fx.Node]
    ends: fx.Node
    experts: int
    inside: list[fx.Node] = field(default_factory=list)

    @property
    def rows(self) -> Any:
        return value_of(self.products[0].args[0]).shape[0]

    def entering(self) -> list[fx.Node]:
        """What the inside reads of each row, in order of its first reader."""
        held = set(self.inside)
        found = dict.fromkeys(source for node in self.inside for source in node.all_input_nodes if source not in held)
        return [n for n in found if n is not self.ends and _is_rows(value_of(n), self.rows) and n not in self._chains()]

    def leaving(self) -> list[fx.Node]:
        """What is read outside."""
        held = set(self.inside)
        return [node for node in self.inside if any(user not in held for user in node.users)]

    def _chains(self) -> set[fx.Node]:
        # A weight of as many experts as there are rows is no rows.
        read: set[Any] = {product.args[1] for product in self.products}
        return read.union(node for product in self.products for node in chain_of(product.args[1])[1])

    @property
    def ids(self) -> fx.Node | None:
        """The expert of each row, where the ends are counted from it."""
        node: Any = self.ends
        while isinstance(node, fx.Node) and name_of(node) in {"cumsum", *_COUNTS, *_CASTS}:
            node = node.args[0]
        source = node.args[0] if isinstance(node, fx.Node) and node.target is operator.getitem else None
        is_sorted = isinstance(source, fx.Node) and name_of(source) == "sort" and node.args[1] == 0
        return node if is_sorted and _is_rows(value_of(node), self.rows) else None

    @property
    def _unsorted(self) -> Any:
        """What the ends, or the expert of each row, were sorted from."""
        source: Any = self.ids if self.ids is not None else self.ends
        source = source.args[0] if source.target is operator.getitem else None
        if not isinstance(source, fx.Node):
            return None
        return {"sort": source.args[0], "permute_experts": source.args[1:2] and source.args[1]}.get(name_of(source))

    @property
    def scores(self) -> fx.Node | None:
        """What the router's ``topk`` chose among."""
        node: Any = self._unsorted
        while isinstance(node, fx.Node) and name_of(node) in _CASTS:
            node = node.args[0]
        if isinstance(node, fx.Node) and node.target is operator.getitem:
            node = node.args[0]
        if isinstance(node, fx.Node) and name_of(node) == "topk" and isinstance(node.args[0], fx.Node):
            return node.args[0]
        return None

    def names_expert(self, node: fx.Node) -> bool:
        """Whether a value of each row is a row of something for the row's expert, a bias for one."""
        if node.target is not operator.getitem or not isinstance(node.args[1], fx.Node):
            return False
        ids, by = self.ids, node.args[1]
        if name_of(by) == "experts_of_rows":
            return by.args[0] is self.ends and by.args[2] == 0
        return ids is not None and by is ids and node.args[0] is not ids


def find_experts(graph: fx.Graph, parameter: Callable[[fx.Node], bool]) -> tuple[list[Layer], list[str]]:
    """The layers of experts in a graph as Dynamo captured it, and in words what looked like one and is none. ``parameter`` says
    whether a node is a whole parameter."""
    layers: dict[fx.Node, Layer] = {}
    said: list[str] = []
    for node in graph.nodes:
        if not is_product(node):
            continue
        rows, weight, ends = _arguments(node)
        reason = _refuses(rows, weight, ends)
        source = chain_of(weight)[0] if reason is None else None
        if reason is None and (source is None or not parameter(source)):
            reason = "its weight is no parameter"
        if reason is not None:
            said.append(f"{node.name} is a grouped product and no layer of experts: {reason}")
            continue
        assert source is not None
        layer = layers.setdefault(ends, Layer(products=[], weights={}, ends=ends, experts=value_of(weight).shape[0]))
        layer.products.append(node)
        layer.weights[node] = source
    found = []
    for layer in layers.values():
        layer.inside = inside_of(layer.products)
        _reach_biases(layer)
        reason = mixes_rows(layer)
        if reason is None:
            found.append(layer)
        else:
            said.append(f"{layer.products[0].name} and others look like a layer of experts and are none: {reason}")
    return found, said


def is_product(node: fx.Node) -> bool:
    return node.op == "call_function" and name_of(node) in _PRODUCTS


def name_of(node: fx.Node) -> str:
    """The bare name of what a node calls, function, method or operator."""
    target: Any = node.target
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        target = target.overloadpacket
    return getattr(target, "__name__", str(target))


def value_of(node: Any) -> Any:
    """The fake value that Dynamo, or AOTAutograd, gave a node."""
    return node.meta.get("example_value", node.meta.get("val")) if isinstance(node, fx.Node) else node


def chain_of(node: Any) -> tuple[fx.Node | None, list[fx.Node]]:
    """What a weight is made of, and the nodes between, the source's reader first; None where more than its layout changes."""
    between: list[fx.Node] = []
    while isinstance(node, fx.Node) and node.op in ("call_function", "call_method") and name_of(node) in _OF_WEIGHTS:
        if name_of(node) in _MOVES and not _keeps_first(node):
            return None, []
        between.insert(0, node)
        node = node.args[0]
    return (node, between) if isinstance(node, fx.Node) else (None, [])


def _keeps_first(node: fx.Node) -> bool:
    value = value_of(node.args[0])
    if value is None:
        return False
    moved = node.args[1] if isinstance(node.args[1], (list, tuple)) else node.args[1:]
    dims = [d % (value.dim() + (name_of(node) == "unsqueeze")) for d in moved if isinstance(d, int)]
    return dims[0] == 0 if name_of(node) == "permute" else 0 not in dims


def _arguments(node: fx.Node) -> tuple[Any, Any, Any]:
    rest = dict(zip(("rows", "weight", "ends"), node.args, strict=False))
    named = node.kwargs
    return (
        rest.get("rows", named.get("input", named.get("mat_a", named.get("self")))),
        rest.get("weight", named.get("weight", named.get("mat_b", named.get("mat2")))),
        rest.get("ends", named.get("offs", named.get("ends"))),
    )


def _refuses(rows: Any, weight: Any, ends: Any) -> str | None:
    if not isinstance(ends, fx.Node):
        return "it has no ends of rows"
    if any(not isinstance(value_of(n), torch.Tensor) for n in (rows, weight, ends)):
        return "its shapes are not known"
    if value_of(rows).dim() != 2 or value_of(weight).dim() != 3:
        return "it is not of rows and one matrix for each expert"
    return None


def _is_rows(value: Any, rows: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0 and _same(value.shape[0], rows)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return str(a) == str(b)  # equal symbols, without a guard


def inside_of(products: Sequence[fx.Node]) -> list[fx.Node]:
    """All on a way from one of ``products``, which are in order, to another, and what writes in place into it before the
    last."""
    nodes = list(products[0].graph.nodes)
    place = {node: i for i, node in enumerate(nodes)}
    stretch = nodes[place[products[0]] : place[products[-1]] + 1]
    below, above = set(products), set(products)
    for node in stretch:
        if any(source in below for source in node.all_input_nodes):
            below.add(node)
    for node in reversed(stretch):
        writes = _writes(node) and node.args[0] in below
        if writes or any(user in above for user in node.users):
            above.add(node)
    return [node for node in stretch if node in below and node in above]


def _reach_biases(layer: Layer) -> None:
    """The inside ends behind what its experts add to their rows last: a row that is dropped has no bias either."""
    for node in layer.leaving():
        last = node
        while len(last.users) == 1:
            (user,) = last.users
            others = [n for n in user.all_input_nodes if n is not last]
            if not others or not all(layer.names_expert(n) for n in others) or not _is_rows(value_of(user), layer.rows):
                break
            layer.inside.append(user)
            last = user


def _writes(node: fx.Node) -> bool:
    """Whether a node changes its first argument."""
    name = name_of(node)
    if node.op == "call_method":
        return name.endswith("_") and not name.endswith("__")
    return node.target in (operator.setitem, operator.iadd, operator.imul, operator.isub, operator.itruediv)


# -- each row by itself --------------------------------------------------------------------------------------------------

_aten = torch.ops.aten
#: Where the dimension that an operator works along stands among its arguments.
_ALONG: Mapping[Any, int] = {
    _aten.slice: 1, _aten.select: 1, _aten.split: 2, _aten.split_with_sizes: 2, _aten.unsqueeze: 1, _aten._softmax: 1,
    _aten._log_softmax: 1, _aten.cat: 1, _aten.sum: 1, _aten.mean: 1, _aten.amax: 1, _aten.amin: 1, _aten.glu: 1,
    _aten.cumsum: 1, _aten.sort: 1, _aten.topk: 2, _aten.squeeze: 1, _aten.var_mean: 1, _aten.flip: 1,
}  # fmt: skip
_LAYOUT = {_aten.view, _aten._unsafe_view, _aten.reshape, _aten.expand}
_SAME = {_aten.alias, _aten.detach, _aten.clone, _aten._to_copy, _aten.contiguous, _aten.lift_fresh_copy}


def mixes_rows(layer: Layer) -> str | None:
    """Why rows of the layer's inside depend on each other, or cannot be sent; None where each is computed by itself."""
    for node in layer.entering():
        value = value_of(node)
        if not layer.names_expert(node) and (value.dim() != 2 or not value.is_floating_point()):
            kind = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape[1:])}"
            return f"it reads {node.name}, {kind} of each row, and only vectors of floating-point numbers are sent"
    return mixes(layer.inside, layer.entering(), layer.leaving())


def mixes(
    inside: Sequence[fx.Node],
    entering: Collection[fx.Node],
    leaving: Collection[fx.Node],
    *,
    lead: int = 1,
    products: Collection[fx.Node] = (),
    constants: Collection[fx.Node] = (),
) -> str | None:
    """Why values of ``inside`` that differ in their first ``lead`` dimensions, as those ``entering`` do, depend on each other.

    ``products``, of the nodes inside, are known to keep them apart, and not looked into; ``constants``, of what is read inside,
    have the first of these dimensions only, and 1 in place of the second.
    """
    held, known = set(inside), set(products)
    looked = [node for node in inside if node not in known]
    if not looked:
        return None
    inputs = list(dict.fromkeys(s for n in looked for s in n.all_input_nodes if s not in held or s in known))
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {n: graph.placeholder(n.name) for n in inputs}
    for node in looked:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    read = [s for n in inside if n in known for s in n.all_input_nodes if s in held]
    graph.output(tuple(copies[n] for n in dict.fromkeys([*leaving, *read]) if n not in known))
    values = [value_of(n) for n in inputs]
    if any(value is None for value in values):
        return "a value in it is not known"
    module = fx.GraphModule(inside[0].graph.owning_module or torch.nn.Module(), graph)
    traced = compat.traced(module, values)
    sources = dict(zip(traced.graph.find_nodes(op="placeholder"), inputs, strict=True))
    rows = {p for p, n in sources.items() if n in entering or n in known}
    each = {p for p, n in sources.items() if n in constants}
    for node in traced.graph.nodes:
        if node.op != "call_function":
            continue
        if rows.intersection(node.all_input_nodes):
            if not _by_row(node, rows, lead) or (lead > 1 and not _aligned(node, rows, each, lead)):
                return f"{name_of(node)} works across {'rows' if lead == 1 else 'experts or their rows'}"
            rows.add(node)
        elif each.intersection(node.all_input_nodes):
            if not _by_row(node, each, 1):
                return f"{name_of(node)} works across experts"
            each.add(node)
    return None


def _by_row(node: fx.Node, rows: set[fx.Node], lead: int) -> bool:
    if node.target is operator.getitem or is_product(node):
        return True
    packet = getattr(node.target, "overloadpacket", None)
    inputs = [n for n in node.all_input_nodes if n in rows]
    value, first = node.meta.get("val"), inputs[0].meta["val"]
    leaves = value if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(v, torch.Tensor) and same_lead(v, first, lead) for v in leaves):
        return False
    if packet in _SAME:
        return True
    if packet in _ALONG:
        return _spares_first(node, packet, lead)
    if packet is _aten.permute:
        return [d % first.dim() for d in node.args[1][:lead]] == list(range(lead))
    if packet in (_aten.transpose, _aten.t):
        return packet is _aten.transpose and all(d % first.dim() >= lead for d in node.args[1:])
    if packet in _LAYOUT:
        return True  # the first dimensions have their sizes
    if packet in (_aten.mm, _aten.addmm):
        operands = node.args[-2:]
        return operands[0] in rows and operands[1] not in rows
    if packet is _aten.copy_ or torch.Tag.pointwise in getattr(node.target, "tags", ()):
        # Of what has as many dimensions the first is rows', or one for all; what has fewer is one for all.
        return all(n.meta["val"].dim() == leaves[0].dim() for n in inputs)
    return False


def same_lead(a: torch.Tensor, b: torch.Tensor, lead: int) -> bool:
    """Whether the first ``lead`` dimensions of two values are as large."""
    return a.dim() >= lead <= b.dim() and all(_same(m, n) for m, n in zip(a.shape[:lead], b.shape[:lead], strict=True))


def _aligned(node: fx.Node, rows: set[fx.Node], each: set[fx.Node], lead: int) -> bool:
    """Whether what else an operator reads is the same for all rows, and where it is not in ``each`` for all experts too."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return True
    for other in node.all_input_nodes:
        if other in rows or not isinstance(other.meta.get("val"), torch.Tensor):
            continue
        shape = other.meta["val"].shape
        ahead = list(shape[: max(len(shape) - value.dim() + lead, 0)])
        free = ahead[1:] if other in each and len(shape) == value.dim() else ahead
        if (other in each and len(shape) != value.dim()) or any(size != 1 for size in free):
            return False
    return True


def _spares_first(node: fx.Node, packet: Any, lead: int) -> bool:
    place = _ALONG[packet]
    given = node.args[place] if len(node.args) > place else node.kwargs.get("dim", 0)
    source: Any = node.args[0]
    dims = source[0].meta["val"].dim() if isinstance(source, (list, tuple)) else source.meta["val"].dim()
    along: Iterable[Any] = given if isinstance(given, (list, tuple)) else [given]
    every = [d for d in along if isinstance(d, int)]
    extra = packet is _aten.unsqueeze
    return bool(every) and all(d % (dims + extra) >= lead for d in every)
