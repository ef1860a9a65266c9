"""Segments that run on fake tensors: what they allocate and free, and when, without computing anything.

Two ways, both usable where :class:`~dspass.lowering.segments.SegmentCompiler` is:

- :class:`InductorSimulator` has Inductor generate its code for the segment, C++ kernels left out, and runs that code's
  own allocations on fake tensors. What it says is what Inductor does, buffer reuse and fusion included. CPU only.
- :class:`GraphSimulator` walks the graph and takes a pointwise value that only other fusible operators of the segment read
  as fused away. It needs no code generation, so it serves models of any size and devices that are not here.

Dropped: a liveness model over Inductor's scheduler nodes. It would repeat the wrapper's reuse rules and drift from them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx
from torch.utils._pytree import tree_map_only

from dspass.lowering.expand import expand, written_out
from dspass.lowering.segments import Compiled, _has_constants, _has_symbols, segment_key
from dspass.passes.kernels import is_view, materialised
from dspass.runtime import compat

#: What Inductor generated for a segment, by all that it depends on. Kept from one model to the next, the latest last: plans and
#: predictions of one model under several settings have most of their segments in common.
_GENERATED: OrderedDict[tuple[Any, ...], Compiled] = OrderedDict()
KEPT = 1000


@dataclass(kw_only=True)
class InductorSimulator:
    patches: Mapping[str, Any] = field(default_factory=dict)
    compiled: int = 0
    reused: int = 0

    def __call__(self, gm: fx.GraphModule, *, is_backward: bool, is_inference: bool) -> Compiled:
        key = None
        if not _has_symbols(gm.graph) and not _has_constants(gm.graph) and (same := segment_key(gm.graph)) is not None:
            settings = (compat.inductor_hash(self.patches), torch.get_num_threads(), is_backward, is_inference)
            key = (same, settings, written_out(gm.graph))
            if key in _GENERATED:
                self.reused += 1
                _GENERATED.move_to_end(key)
                return _GENERATED[key]
        self.compiled += 1
        inputs = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
        run = compat.generate_segment(
            expand(gm, self.patches), inputs, is_backward=is_backward, is_inference=is_inference, patches=self.patches
        )
        if key is not None:
            _GENERATED[key] = run
            if len(_GENERATED) > KEPT:
                _GENERATED.popitem(last=False)
        return run


@dataclass(kw_only=True)
class GraphSimulator:
    compiled: int = 0
    reused: int = 0

    def __call__(self, gm: fx.GraphModule, *, is_backward: bool, is_inference: bool) -> Compiled:
        self.compiled += 1
        return walk(gm.graph)


def walk(graph: fx.Graph) -> Callable[[list[Any]], Sequence[Any]]:
    """A function that allocates and frees as running ``graph`` would, pointwise chains fused."""
    solid = materialised(graph)
    nodes = list(graph.nodes)
    placeholders = [n for n in nodes if n.op == "placeholder"]
    output = nodes[-1]
    results = output.args[0]
    # A value is held by the node that allocates it; views and fused nodes hold what they are made of.
    holds: dict[fx.Node, set[fx.Node]] = {}
    for node in nodes:
        if node in solid or node.op == "placeholder":
            holds[node] = {node}
        elif is_view(node) or (node.op == "call_function" and node not in solid):
            holds[node] = (
                set().union(*(holds.get(a, set()) for a in node.all_input_nodes)) if node.all_input_nodes else set()
            )
    last: dict[fx.Node, int] = {}
    for i, node in enumerate(nodes):
        for held in holds.get(node, set()) | set().union(*(holds.get(a, set()) for a in node.all_input_nodes), set()):
            last[held] = i
    frees: dict[int, list[fx.Node]] = {}
    for node, i in last.items():
        frees.setdefault(i, []).append(node)

    def run(args: list[Any]) -> Sequence[Any]:
        values: dict[fx.Node, Any] = dict(zip(placeholders, args, strict=True))
        args.clear()
        made: dict[fx.Node, Any] = {}
        for i, node in enumerate(nodes[:-1]):
            if node in solid:
                values[node] = tree_map_only(torch.Tensor, _fresh, node.meta["val"])
            if i in frees:
                for gone in frees[i]:
                    values.pop(gone, None)
        for node in results:
            if not isinstance(node, fx.Node):
                continue
            made[node] = (
                values[node] if node in values else _view_of(node, [values.get(h) for h in holds.get(node, ())])
            )
        return tuple(made[n] if isinstance(n, fx.Node) else n for n in results)

    return run


def _view_of(node: fx.Node, bases: Sequence[Any]) -> Any:
    """The value of a result that allocates nothing itself: a view of something alive, or a size."""
    like = node.meta.get("val")
    if not isinstance(like, torch.Tensor):
        return like
    for base in (leaf for b in bases for leaf in (b if isinstance(b, (list, tuple)) else [b])):
        if isinstance(base, torch.Tensor) and base.dtype == like.dtype and base.numel() >= like.numel():
            return base.as_strided(like.shape, like.stride(), 0)
    return _fresh(like)


def _fresh(like: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
