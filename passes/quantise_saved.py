"""Values that are saved for the backward wait for it in few bits.

Training with activations that are rounded where they are saved: Chakrabarti and Moseley, Backprop with approximate activations
for memory-efficient network training, 2019; blockwise, Chen et al., ActNN, 2021. The forward computes with whole values, so the
loss does not change, and gradients do: each is computed from rounded values. Rounding here is to nearest, as
:mod:`dspass.runtime.quantise` says, where ActNN's is stochastic, so errors are not unbiased. That needs random numbers for each
value, and is another format.

Dropped: the partitioner's own activation quantisation (``activation_quantization_aten_pass`` in
``torch/_functorch/partitioners.py``). It takes what the min-cut has saved, all tensors above a size of the types it is told,
and casts them to fp8 with a scale for each row. No planner can weigh a value in few bits against computing it again or copying
it away: the cut has counted whole bytes by then. It has no integers, its scales are as many as the last dimension is short, and
its arithmetic is written into the graph, where the cost model, a kernel of our own and the report do not find it again.

Dropped: codes and scales in one buffer, so that the forward answers as many tensors as before. To join them Inductor writes
both and copies both.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx

from dspass.passes.base import Holding, Pass, PassContext
from dspass.passes.devices import Device
from dspass.passes.held import bytes_of, flat, is_dense, is_of_parameter, last_read
from dspass.passes.kernels import is_view
from dspass.passes.nodes import HELD, WANTED, positions
from dspass.passes.packed import item_of
from dspass.runtime.formats import check_block, format_of
from dspass.runtime.quantise import DTYPES, blocks_of

QUANTISE = torch.ops.dspass.quantise.default
DEQUANTISE = torch.ops.dspass.dequantise.default


@dataclass(frozen=True, kw_only=True)
class QuantiseSaved(Pass):
    """A saved value that is marked goes to the backward as two tensors, its codes and its scales.

    The forward quantises it right behind its last reader there, so that whole and in few bits it takes memory together for no
    longer than one kernel; what Inductor fuses that reader with, it may fuse this with. The backward dequantises before the
    first reader, once for all. A value whose elements lie in another order than its dims is quantised in the order of memory,
    and comes back with the strides that it had.

    ``format`` None switches it off; blocks are of ``block`` values. Taken are fp32, fp16 and bf16 tensors of at least
    ``min_bytes`` and of sizes known when the graph is compiled, without gaps. Never taken are what the model answers, views,
    copies of parameters, what a person wants to be kept (``dspass.keep``, or a checkpoint's policy), and what an operator
    answers beside its first result, such as an attention's log-sum-exp: the backward exponentiates it.

    What the backward reads as a mask is rounded as well: where a ReLU's result was above zero by less than half a step of its
    block, it comes back as zero, and passes no gradient. A block with a NaN or an infinity comes back as NaNs.
    """

    name: ClassVar[str] = "quantise_saved"
    keeps_numbers: ClassVar[bool] = False

    format: str | None = None
    block: int = 256
    min_bytes: int = 100_000

    def __post_init__(self) -> None:
        if self.format is not None:
            format_of(self.format)
        check_block(self.block)

    def hold(self, node: fx.Node, on: Device) -> Holding | None:
        if self.format is None or not self._takes(node):
            return None
        value = node.meta["val"]
        few = sum(map(bytes_of, self._packed(value)))
        # Read and written once in the forward, and once in the backward.
        return Holding(bytes=few, seconds=2 * on.moving(bytes_of(value) + few))

    @property
    def holds_all(self) -> bool:
        return self.format is not None

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        if self.format is None:
            ctx.say("switched off")
            return graph
        found = self._quantise(graph, self.format) if ctx.where == "forward" else self._dequantise(graph, self.format)
        if not found:
            ctx.say("every saved value is whole")
            return graph
        whole, few = (sum(column) for column in zip(*found, strict=True))
        share = few / whole if whole else 1.0
        ctx.say(f"{len(found)} values as {self.format} in blocks of {self.block}, {share:.2f} of their bytes")
        return graph

    def _takes(self, node: fx.Node) -> bool:
        value: Any = node.meta.get("val")
        return (
            is_dense(node)
            and value.dtype in DTYPES
            and bytes_of(value) >= self.min_bytes
            and not (node.target is operator.getitem and node.args[1] != 0)
            and WANTED not in node.meta
            and not is_of_parameter(node)
        )

    def _packed(self, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales of ``value``, as fake as it is."""
        assert self.format is not None
        count = blocks_of(value.numel(), self.block)
        codes = value.new_empty((count, format_of(self.format).code_bytes(self.block)), dtype=torch.uint8)
        return codes, value.new_empty((count,), dtype=torch.float32)

    def _quantise(self, graph: fx.Graph, format: str) -> list[tuple[int, int]]:
        """Answers the bytes of each value, before and after."""
        output = graph.find_nodes(op="output")[0]
        nodes, order = list(graph.nodes), positions(graph)
        marked = [n for n in dict.fromkeys(flat(output.args[0])) if n.meta.get(HELD) == self.name]
        pairs: dict[fx.Node, list[fx.Node]] = {}
        for node in marked:
            value = node.meta["val"]
            packed = self._packed(value)
            with graph.inserting_before(nodes[last_read(node, order)].next):
                both = graph.call_function(QUANTISE, (_permuted(graph, node, _in_memory(value)), format, self.block))
                both.meta["val"] = packed
                pairs[node] = [item_of(graph, both, i, part) for i, part in enumerate(packed)]
        said = output.meta.get("desc") or [None] * len(output.args[0])
        answers = [(new, desc) for n, desc in zip(output.args[0], said, strict=True) for new in pairs.get(n, [n])]
        output.args = (tuple(new for new, _ in answers),)
        if "desc" in output.meta:
            output.meta["desc"] = [desc for _, desc in answers]
        return [_sizes(node, pairs[node]) for node in marked]

    def _dequantise(self, graph: fx.Graph, format: str) -> list[tuple[int, int]]:
        found = []
        for codes in [n for n in graph.find_nodes(op="placeholder") if n.meta.get(HELD) == self.name]:
            value = codes.meta["val"]
            packed = self._packed(value)
            meta = {k: v for k, v in codes.meta.items() if k not in (HELD, "tensor_meta")}
            with graph.inserting_after(codes):
                scales = graph.placeholder(f"{codes.name}_scales")
            if codes.users:
                axes = _in_memory(value)
                with graph.inserting_before(_first_reader(codes)):
                    shape = [value.shape[axis] for axis in axes]
                    flat_value = graph.call_function(DEQUANTISE, (codes, scales, shape, format, value.dtype))
                    flat_value.meta["val"] = value.new_empty(shape)
                    whole = _permuted(graph, flat_value, [axes.index(axis) for axis in range(len(axes))])
                codes.replace_all_uses_with(whole, delete_user_cb=lambda user, new=flat_value: user is not new)
            for node, part in zip((codes, scales), packed, strict=True):
                node.meta = {**meta, "val": part}
            found.append((bytes_of(value), sum(map(bytes_of, packed))))
        return found


def _in_memory(value: torch.Tensor) -> list[int]:
    """The dims of a tensor without gaps, from the one with the longest way between elements to that with the shortest."""
    return sorted(range(value.dim()), key=lambda axis: (-value.stride(axis), axis))


def _permuted(graph: fx.Graph, node: fx.Node, axes: list[int]) -> fx.Node:
    """``node`` with its dims in the order of ``axes``, at the graph's insertion point."""
    if axes == sorted(axes):
        return node
    view = graph.call_function(torch.ops.aten.permute.default, (node, axes))
    view.meta["val"] = node.meta["val"].permute(axes)
    return view


def _first_reader(node: fx.Node) -> fx.Node:
    """Views of ``node`` are moved to where they are read: they would have it made before."""
    for user in list(node.users):
        if is_view(user) and user.users:
            _first_reader(user).prepend(user)
    return min(node.users)


def _sizes(node: fx.Node, packed: list[fx.Node]) -> tuple[int, int]:
    return bytes_of(node.meta["val"]), sum(bytes_of(part.meta["val"]) for part in packed)
