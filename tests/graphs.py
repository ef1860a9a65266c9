"""Toy models captured by the real path, and simulated ranks to run their graphs.

No launcher: the process group is torch's fake one, so one process captures what rank 0 of any world would.
Numbers come from :func:`simulate`, which walks a graph once and holds every value once a rank, so that a
gather really joins what the ranks have and a reduction really averages. It needs none of the runtime, and
so shares none of its mistakes.

The checks raise :class:`CheckError`, and ``tests/test_broken_passes.py`` shows that each of them can fail.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar
from unittest import mock

import torch
import torch.distributed as dist
import torch.fx as fx
import torch.nn.functional as F
from torch import nn

from dspass.compilation import compile_graph
from dspass.config import Config
from dspass.engines import new_engine
from dspass.fake_quantising import choose, round_layers
from dspass.passes import devices
from dspass.passes.base import Pass, PassContext, PassResult, Where, run_passes
from dspass.passes.held import mark_all
from dspass.passes.nodes import (
    GATHERED,
    REDUCE_GRAD,
    UNSHARD,
    UNSHARD_EXPERTS,
    calls,
    combine_start,
    counts_start,
    dispatch_start,
    exchange_wait,
    gather_start,
    gather_wait,
    is_packed,
    keep_in_node,
    mean_start,
    over_of,
    reduce_start,
    reduce_wait,
    rounding_errors,
    wait_of,
)
from dspass.passes.packed import COMPENSATE, DEQUANTISE, QUANTISE, SUM
from dspass.passes.partition import partition
from dspass.passes.quantise_saved import DEQUANTISE as DEQUANTISE_SAVED
from dspass.passes.quantise_saved import QUANTISE as QUANTISE_SAVED
from dspass.passes.split_batch import SplitBatch
from dspass.pipeline import build
from dspass.runtime import compat
from dspass.runtime.collectives import RUNTIME_FUNCTIONS
from dspass.runtime.engine import Engine
from dspass.runtime.exchange import CHUNKS, COMBINE, COUNTS, DISPATCH, JOIN, MEAN, SPLIT
from dspass.runtime.few_bits import QUANTISED_LINEAR, quantise_rows
from dspass.runtime.params import Over, ParamSpec, lookup
from dspass.runtime.traffic import reduction_steps
from dspass.runtime.wish import WISH
from dspass.shard import shard
from dspass.wishes import keep, recompute


class CheckError(AssertionError):
    """A graph breaks what every pipeline must keep."""


# -- toys ----------------------------------------------------------------------------------------------------


class Mlp(nn.Module):
    """Four layers; the last bias is small enough to stay whole on every rank."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 8)
        self.down = nn.Linear(8, 4, bias=False)
        self.tail = nn.Linear(4, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.down(torch.relu(self.up(x))))
        return self.head(torch.relu(self.tail(x))).square().sum()


class Tied(nn.Module):
    """One weight with two uses."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.mix = nn.Linear(4, 4, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(torch.tanh(self.mix(self.embed(tokens))), self.embed.weight).square().sum()


class EarlyViews(nn.Module):
    """Transposed weights that are made at the top and used one after another further down."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        views = [layer.weight.t() for layer in self.layers]
        for view in views:
            x = torch.tanh(x @ view)
        return x.square().sum()


class MadeOfParameters(nn.Module):
    """Weights that are products of parameters, which the partitioner wants to save for the backward graph."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.ParameterList(torch.randn(4, 4) / 2 for _ in range(4))
        self.right = nn.ParameterList(torch.randn(4, 4) / 2 for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for left, right in zip(self.left, self.right, strict=True):
            x = torch.tanh(x @ (left @ right))
        return x.square().sum()


class Uneven(nn.Module):
    """Rows that two ranks cannot share evenly, and a 0-dim parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.second = nn.Linear(5, 3)
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.second(torch.tanh(self.first(x))) * self.scale).square().sum()


class Wished(nn.Module):
    """Each value is marked to be treated as the partitioner would not treat it by itself, two of them through views."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 6, bias=False)
        self.down = nn.Linear(6, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = recompute(self.up(x).view(-1)).view(3, 6)
        x = x.square().exp()
        keep(x.t())
        return keep(self.down(x).sin()).cos().square().sum()


class Stored(nn.Module):
    """A table that is stored in few bits and is multiplied with, on both sides, and looked up in."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.head = nn.Linear(4, 7, bias=False)

    def forward(self, codes: torch.Tensor, scales: torch.Tensor, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        table = torch.ops.dspass.dequantise_rows(codes, scales, 4, "int8", torch.float32)
        x = torch.tanh(self.first(x) @ table.t()) @ table
        return self.head(x + nn.functional.embedding(ids, table)).square().sum()


class Routed(nn.Module):
    """Four experts of two products each, two for each token, and a shared one."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.into = nn.Linear(5, width, bias=False)
        self.shared = nn.Linear(width, width, bias=False)
        self.router = nn.Linear(width, 4, bias=False)
        self.up = nn.Parameter(torch.randn(4, width, 6) / 2)
        self.down = nn.Parameter(torch.randn(4, 6, width) / 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.into(x))
        scores, chosen = torch.softmax(self.router(x), -1).topk(2)
        rows, positions, ends = torch.ops.dspass.permute_experts(x, chosen, 4)
        rows = torch.ops.dspass.grouped_product(rows, self.up, ends)
        rows = torch.ops.dspass.grouped_product(torch.tanh(rows), self.down, ends)
        return (torch.ops.dspass.unpermute_experts(rows, positions, scores) + torch.sin(self.shared(x))).square().sum()


class Balanced(nn.Module):
    """A router with a loss for its balance."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(6, 3, bias=False)
        self.mix = nn.Linear(6, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = torch.softmax(self.router(x), -1)
        chosen = scores.topk(1)[1]
        shares = nn.functional.one_hot(chosen, 3).float().mean((0, 1))
        return (self.mix(x) * scores).square().sum() + 3 * (shares * scores.mean(0)).sum()


class Rounded(nn.Module):
    """Three layers that read one input, in two ways; one of them reads another one too."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(4, 11, bias=False)
        self.right = nn.Linear(4, 11, bias=False)
        self.fine = nn.Linear(4, 12, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.left(x) + self.right(x))
        return self.left(y[:, :4]).square().sum() + self.fine(x).square().sum()


TOYS: Mapping[str, Callable[[], nn.Module]] = {
    "rounded": Rounded,
    "hosted": Mlp,
    "offloaded": Mlp,
    "few_bits": Mlp,
    "in_node": Mlp,
    "quantised": Mlp,
    "quantised_uneven": Uneven,
    "quantised_early": EarlyViews,
    "quantised_fed_back": Uneven,
    "in_nodes": Mlp,
    "mlp": Mlp,
    "stored": Stored,
    "routed": Routed,
    "chunks_routed": Routed,
    "parts_routed": Routed,
    "quantised_routed": functools.partial(Routed, 20),
    "balanced": Balanced,
    "tied": Tied,
    "early_views": EarlyViews,
    "made": MadeOfParameters,
    "uneven": Uneven,
    "wished": Wished,
}


# -- capture -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Keep(Pass):
    """Keeps a copy of each graph as it was before the pass behind it."""

    name: ClassVar[str] = "keep"
    where: ClassVar[frozenset[Where]] = frozenset({"captured", "joint", "forward", "backward"})

    into: dict[str, fx.Graph] = field(default_factory=dict)

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        self.into[ctx.where] = copy_graph(graph)
        return graph


@dataclass(kw_only=True, eq=False)
class Toy:
    """A captured model. ``joint`` is the graph that AOTAutograd made, ``raw`` the others that passes saw: what Dynamo captured
    before it, and behind it one or two."""

    joint: fx.Graph
    raw: dict[str, fx.Graph]
    engine: Engine
    config: Config
    whole: dict[str, torch.Tensor]
    batches: list[tuple[torch.Tensor, ...]]
    losses: list[torch.Tensor]
    grads: dict[str, torch.Tensor]
    world: int
    part: fx.GraphModule | None = None
    """The same captured with half a batch, of a toy that is computed in parts."""

    @property
    def passes(self) -> tuple[Pass, ...]:
        return with_part(build(self.config), self.part)


def with_part(passes: Sequence[Pass], part: fx.GraphModule | None) -> tuple[Pass, ...]:
    return tuple(replace(p, count=2, part=part) if isinstance(p, SplitBatch) and part else p for p in passes)


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy whose nodes have the same names and metadata of their own."""
    if any(n.op == "call_method" for n in graph.nodes):  # Dynamo's metadata cannot be copied in depth
        same = fx.Graph()
        same.graph_copy(graph, copies := {})
        same.output(fx.map_arg(graph.find_nodes(op="output")[0].args[0], copies.__getitem__))
        return same
    return copy.deepcopy(graph)


@contextlib.contextmanager
def fake_world(size: int) -> Iterator[None]:
    compat.init_fake_group(size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def options(stage: int = 3, threshold: int = 4, **dspass: Any) -> dict[str, Any]:
    return {
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": threshold},
        "dspass": dspass,
    }


#: All that the forward saves is marked, to wait on the host.
OFFLOADED = {
    **options(passes=["...", {"name": "offload_saved", "min_bytes": 0}]),
    "compile": {"offload_activation": True},
}


#: All that the forward saves is marked, to wait in few bits.
FEW_BITS = options(passes=["...", {"name": "quantise_saved", "min_bytes": 0}], quantise={"activations": "int8"})

#: Shards wait on the host.
HOSTED = options()
HOSTED["zero_optimization"]["offload_param"] = {"device": "cpu"}

#: Nodes of two ranks, which divide what was gathered a second time.
IN_NODE = options()
IN_NODE["zero_optimization"]["zero_hpz_partition_size"] = 2

#: Weights are rounded to 4 bits while they train, and what they multiply to 5, but for one.
ROUNDED = options() | {
    "compression_training": {
        "weight_quantization": {
            "shared_parameters": {"enabled": True},
            "different_groups": {"all": {"params": {"start_bits": 4, "target_bits": 4}}},
        },
        "activation_quantization": {
            "shared_parameters": {"enabled": True, "schedule_offset": 0},
            "different_groups": {
                "coarse": {"params": {"bits": 3}, "modules": ["left", "right"]},
                "fine": {"params": {"bits": 5}, "modules": ["fine"]},
            },
        },
    }
}

#: Experts are divided over all ranks.
ROUTED = {**options(), "expert_parallel": {"enabled": True}}

#: Shares of tokens are averaged over ranks.
BALANCED = options(experts={"global_aux_loss": True})

#: The configuration that a toy needs, where it is not :func:`options`.
CONFIGS = {
    "offloaded": OFFLOADED,
    "few_bits": FEW_BITS,
    "hosted": HOSTED,
    "in_node": IN_NODE,
    "in_nodes": IN_NODE,
    "routed": ROUTED,
    "chunks_routed": options(experts={"chunks": 2}) | {"expert_parallel": {"enabled": True}},
    "parts_routed": ROUTED,
    "quantised_routed": ROUTED,
    "balanced": BALANCED,
    "rounded": ROUNDED,
}


def capture(
    name: str, world: int = 2, config: Config | Mapping[str, Any] | None = None, passes: Sequence[Pass] | None = None
) -> Toy:
    """Trace a toy on rank 0 of ``world`` ranks, and run the plain model once a rank as the reference. ``passes``: other ones
    than those of ``config``."""
    torch.manual_seed(0)
    model = TOYS[name]()
    batches = [_batch(name) for _ in range(world)]
    if name == "balanced":  # with the same shares of tokens on each rank, and other probabilities
        batches = [(batches[0][0] * (1 + rank),) for rank in range(world)]
    with mock.patch.object(F, "linear", _rounded_linear) if name == "rounded" else contextlib.nullcontext():
        losses, grads = _reference(model, batches)
    whole = {n: p.detach().clone() for n, p in model.named_parameters()}
    settings = Config.load(config or CONFIGS.get(name, options()))
    kept: dict[str, fx.Graph] = {}
    torch._dynamo.reset()
    with fake_world(world):
        shard(model, settings)
        engine = new_engine(model, settings)
        part = _captured_part(model, batches[0]) if name == "parts_routed" else None
        chosen = with_part(passes or build(settings), part)

        def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
            if settings.trains_rounded:
                round_layers(gm, {}, choose(model, settings), engine)
            compile_graph(gm, inputs, engine, settings, [Keep(into=kept), *chosen], as_written)
            return stop  # what no rank sent would be computed with

        with contextlib.suppress(StopCaptureError):
            torch.compile(model, backend=backend)(*batches[0])
    torch._dynamo.reset()
    toy = Toy(
        joint=kept.pop("joint"),
        raw=kept,
        engine=engine,
        config=settings,
        batches=batches,
        world=world,
        part=part,
        whole={f"{engine.name}/{n}": p for n, p in whole.items()},
        losses=losses,
        grads={f"{engine.name}/{n}": g for n, g in grads.items()},
    )
    return toy


def _captured_part(model: nn.Module, batch: Sequence[torch.Tensor]) -> fx.GraphModule:
    """What Dynamo captures of the first half of a batch."""
    found: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        found.append(gm)
        return stop

    with contextlib.suppress(StopCaptureError):
        torch.compile(model, backend=backend, dynamic=False)(*(t[: len(t) // 2] for t in batch))
    torch._dynamo.reset()
    return found[0]


class StopCaptureError(Exception):
    """A graph was captured, and is not run."""


def stop(*_: Any) -> Any:
    raise StopCaptureError


def _rounded_linear(x: torch.Tensor, weight: torch.Tensor, bias: None) -> torch.Tensor:
    """By hand what "rounded" asks for: the finer layer is the one with 12 rows."""
    x = straight_through(x, 5 if len(weight) == 12 else 3)
    return x @ straight_through(weight, 4).t()


def straight_through(x: torch.Tensor, bits: int | None, over: Any = -1) -> torch.Tensor:
    """By hand: to ``2**bits - 1`` values around zero, whose gradient is ``x``'s; as it is without bits."""
    if bits is None:
        return x
    largest, steps = x.detach().abs().amax(over, keepdim=True), 2 ** (bits - 1) - 1
    rounded = (x.detach() * (1 / largest * steps)).round() * (largest * (1 / steps))
    return RoundedByHand.apply(x, rounded)  # type: ignore[no-any-return]


class RoundedByHand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None


def as_written(gm: fx.GraphModule, **_: Any) -> Any:
    """A compiler that compiles nothing."""

    def run(arguments: list[Any]) -> Sequence[Any]:
        values = list(arguments)
        arguments.clear()
        return gm(*values)

    return run


def _batch(name: str) -> tuple[torch.Tensor, ...]:
    if name == "stored":
        return *quantise_rows(torch.randn(8, 4), "int8"), torch.randn(3, 4), torch.randint(8, (3,))
    if name.endswith("routed"):
        return (torch.randn(4 if name == "parts_routed" else 3, 5),)
    if name == "balanced":
        return (torch.randn(4, 6),)
    return (torch.randint(8, (3,)),) if name == "tied" else (torch.randn(3, 4),)


def _reference(model: nn.Module, batches: Sequence[Any]) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    losses, sums = [], {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for batch in batches:
        loss = model(*batch)
        for name, grad in zip(sums, torch.autograd.grad(loss, list(model.parameters())), strict=True):
            sums[name] += grad
        losses.append(loss.detach())
    return losses, {n: s / len(batches) for n, s in sums.items()}


# -- simulated ranks -----------------------------------------------------------------------------------------


class PerRank(list[Any]):
    """One value for each rank."""


class Flight:
    """What a start answers: nothing can be read from it but by its wait."""

    def __init__(self, kind: str, values: list[PerRank]) -> None:
        self.kind, self.values, self.waited = kind, values, 0


@dataclass
class Trace:
    """What a simulated run sent."""

    gathered: Counter[str] = field(default_factory=Counter)
    reduced: Counter[str] = field(default_factory=Counter)


def _pack(
    tensors: Sequence[torch.Tensor], sizes: Sequence[int], chunks: int, format: str, block: int, nodes: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``quantise_bucket``, but nothing is rounded: passes are tested for where values go, formats on their own
    (``tests/test_quantise.py``)."""
    rows = []
    for tensor, size in zip(tensors, sizes, strict=True):
        flat = torch.zeros(chunks * size)
        flat[: tensor.numel()] = tensor.reshape(-1)
        rows.append(flat.view(chunks, size))
    codes = torch.cat(rows, dim=1)
    order = [n * (chunks // nodes) + d for d in range(chunks // nodes) for n in range(nodes)]
    return codes[order], torch.ones(chunks, 1)


def _unpack(codes: torch.Tensor, scales: torch.Tensor, sizes: Sequence[int], *rest: Any) -> list[torch.Tensor]:
    return [part.contiguous().to(rest[-1]) for part in codes.split(list(sizes), dim=1)]


def _sum(codes: torch.Tensor, scales: torch.Tensor, sizes: Sequence[int], *rest: Any) -> list[torch.Tensor]:
    factor, dtype = rest[-2:]
    return [(part.sum(0) * factor).to(dtype) for part in codes.split(list(sizes), dim=1)]


def _multiply(*args: Any) -> Any:
    """As ``quantised_linear``, but only weights are rounded."""
    return QUANTISED_LINEAR(*args[:6])


def _pack_one(tensor: torch.Tensor, format: str, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    return tensor, torch.ones(1)


def _unpack_one(codes: torch.Tensor, scales: torch.Tensor, shape: Sequence[int], *rest: Any) -> torch.Tensor:
    return codes.reshape(shape)


def _compensate(
    tensors: Sequence[torch.Tensor],
    sizes: Sequence[int],
    chunks: int,
    format: str,
    block: int,
    errors: Sequence[torch.Tensor],
    beta: float,
    nodes: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As nothing is rounded, errors are zeros: whether each goes to its own gradient is all that is looked at."""
    for tensor, size, error in zip(tensors, sizes, errors, strict=True):
        if tuple(error.shape) != (chunks, size):
            raise CheckError(f"the error of another gradient than {tuple(tensor.shape)} is added to it")
    return _pack(tensors, sizes, chunks, format, block, nodes)


#: What stands in for the operators that round.
PACKING: dict[Any, Any] = {
    COMPENSATE: _compensate,
    QUANTISE: _pack,
    DEQUANTISE: _unpack,
    SUM: _sum,
    QUANTISE_SAVED: _pack_one,
    DEQUANTISE_SAVED: _unpack_one,
    QUANTISED_LINEAR: _multiply,
}


def _together(spec: ParamSpec, over: Over, world: int) -> list[list[int]]:
    """For each rank those that it exchanges with, in order, itself among them."""
    if over is None:
        return [list(range(world))] * world
    node = spec.axis("node").size
    if over == "node":
        return [list(range(r // node * node, r // node * node + node)) for r in range(world)]
    return [list(range(r % node, world, node)) for r in range(world)]


def _rows(given: PerRank, gathers: bool, ranks: Sequence[Sequence[int]]) -> PerRank:
    """Every rank's row on each rank, or each rank's rows for it, of those that are together."""
    if gathers:
        return PerRank(torch.cat([given[r] for r in mine]) for mine in ranks)
    return PerRank(torch.stack([given[r][mine.index(rank)] for r in mine]) for rank, mine in enumerate(ranks))


def rows_of(spec: ParamSpec, full: torch.Tensor, rank: int) -> torch.Tensor:
    if spec.expert_axis is not None:
        return full.narrow(0, rank * spec.shape[0], spec.shape[0])
    if spec.layout != "shard":
        return full
    assert spec.shard_axis is not None
    start, count = spec.shard_axis.rows(spec.shape[0], rank)
    return full.narrow(0, start, count)


def rows_in_node(spec: ParamSpec, full: torch.Tensor, rank: int) -> torch.Tensor:
    assert spec.node_axis is not None
    if tuple(full.shape) != spec.shape:
        raise CheckError(f"{spec.key} is kept from something else than its whole: {tuple(full.shape)}")
    return full.narrow(0, *spec.node_axis.rows(spec.shape[0], rank % spec.node_axis.size))


def _whole(key: str, shards: PerRank) -> PerRank:
    spec = lookup(key)
    if spec.expert_axis is not None:
        return shards  # each rank's own experts are all that it wants
    full = torch.cat(list(shards)) if spec.layout == "shard" else shards[0]
    if tuple(full.shape) != spec.shape:
        raise CheckError(f"{key} is gathered from something else than its shards: {tuple(full.shape)}")
    return PerRank(full.to(spec.compute_dtype) for _ in shards)


def _mean(key: str, grads: PerRank) -> PerRank:
    spec = lookup(key)
    if tuple(grads[0].shape) != spec.shape:
        raise CheckError(f"{key} is reduced from something else than its whole gradient: {tuple(grads[0].shape)}")
    if spec.expert_axis is not None:
        return grads  # of all ranks' tokens
    mean = sum(g.to(spec.reduce_dtype) for g in grads) / len(grads)
    return PerRank(rows_of(spec, mean, r).to(spec.dtype) for r in range(len(grads)))


def _counts(ends: PerRank, world: int, chunks: int) -> PerRank:
    """Of each rank the rows that arrive for each expert here, and for each chunk of experts those of every rank for every
    other one."""
    counts = torch.stack([e.diff(prepend=e.new_zeros(1)).int().view(world, -1) for e in ends])
    splits = [part.sum(2, dtype=torch.int32) for part in counts.tensor_split(chunks, dim=2)]
    return PerRank([counts[:, rank], *splits] for rank in range(world))


def _chunked(rows: PerRank, splits: PerRank) -> PerRank:
    """Of each rank's rows those of each chunk, which stand one behind the other for each rank that they go to."""
    found = []
    for rank, its in enumerate(rows):
        counts = torch.stack([table[rank] for table in splits[rank]]).t()
        pieces = its[: counts.sum()].split(counts.flatten().tolist())
        found.append([torch.cat(pieces[i :: counts.shape[1]]) for i in range(counts.shape[1])])
    return PerRank(found)


def _joined(chunks: PerRank, splits: PerRank, sizes: PerRank) -> PerRank:
    numbers = PerRank(torch.arange(size) for size in sizes)
    places = _chunked(numbers, splits)
    found = []
    for rank, its in enumerate(chunks):
        result = its[0].new_zeros((sizes[rank], *its[0].shape[1:]))
        result[torch.cat(places[rank])] = torch.cat(list(its))
        found.append(result)
    return PerRank(found)


def _sent(splits: torch.Tensor, source: int, rank: int) -> slice:
    """The rows of ``source`` for ``rank``."""
    begin = int(splits[source][:rank].sum())
    return slice(begin, begin + int(splits[source][rank]))


def _dispatched(rows: PerRank, splits: PerRank) -> PerRank:
    ranks = range(len(rows))
    return PerRank(torch.cat([rows[source][_sent(splits[0], source, rank)] for source in ranks]) for rank in ranks)


def _combined(rows: PerRank, splits: PerRank, sizes: PerRank) -> PerRank:
    ranks, found = range(len(rows)), []
    for rank in ranks:
        result = rows[rank].new_zeros((sizes[rank], *rows[rank].shape[1:]))
        for holder in ranks:
            begin = int(splits[0][:rank, holder].sum())
            mine = _sent(splits[0], rank, holder)
            result[mine] = rows[holder][begin : begin + mine.stop - mine.start]
        found.append(result)
    return PerRank(found)


def _averaged(values: PerRank) -> PerRank:
    return PerRank([sum(values) / len(values)] * len(values))


#: Exchanges, as markers and as starts, by what they answer of their arguments' values on all ranks.
EXCHANGES: dict[Any, Any] = {
    COUNTS: lambda ends, _, chunks, *__: _counts(ends, len(ends), chunks[0]),
    counts_start: lambda ends, _, chunks, *__: _counts(ends, len(ends), chunks[0]),
    DISPATCH: lambda rows, splits, *_: _dispatched(rows, splits),
    COMBINE: lambda rows, splits, sizes, *_: _combined(rows, splits, sizes),
    SPLIT: lambda rows, splits, *_: _chunked(rows, splits),
    JOIN: lambda rows, splits, sizes, *_: _joined(rows, splits, sizes),
    MEAN: lambda values, _: _averaged(values),
    mean_start: lambda values, _: _averaged(values),
}

#: What begins an exchange of rows, by its marker: of one tensor, or of codes and scales.
OF_ROWS: dict[Any, Any] = {dispatch_start: DISPATCH, combine_start: COMBINE}


def simulate(graph: fx.Graph, inputs: Mapping[str, PerRank], world: int, trace: Trace | None = None) -> list[Any]:
    """Run ``graph`` on ``world`` ranks at once; ``inputs`` by the names of placeholders. Answers its
    outputs."""
    trace = trace or Trace()
    values: dict[fx.Node, Any] = {}
    flights: dict[fx.Node, Flight] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = _input(node, inputs, world)
        elif node.op == "output":
            for start, flight in flights.items():
                if flight.waited != 1:
                    raise CheckError(f"{start.name} is waited for {flight.waited} times")
            return [PerRank(_of_rank(a, values, r) for r in range(world)) for a in node.args[0]]
        elif node.op == "call_method":
            values[node] = PerRank(_method(node, _of_rank(node.args, values, r)) for r in range(world))
        elif node.op == "call_function":
            values[node] = _call(node, values, world, trace)
            if isinstance(values[node], Flight):
                flights[node] = values[node]
        else:
            raise AssertionError(node.format_node())
    raise AssertionError("no output")


def _method(node: fx.Node, values: Sequence[Any]) -> Any:
    """Of a graph as Dynamo captured it; its parameters are their shards here."""
    return values[0] if node.target == "to_local" else getattr(values[0], str(node.target))(*values[1:])


def _input(node: fx.Node, inputs: Mapping[str, PerRank], world: int) -> PerRank:
    if GATHERED in node.meta:
        key, local = node.meta[GATHERED]
        return _whole(key, inputs[local])
    return inputs.get(node.name, PerRank([None] * world))


def _of_rank(argument: Any, values: Mapping[fx.Node, Any], rank: int) -> Any:
    def pick(node: fx.Node) -> Any:
        value = values[node]
        if isinstance(value, Flight):
            raise CheckError(f"{node.name} is read before it has arrived")
        return value[rank]

    return fx.map_arg(argument, pick)


def _call(node: fx.Node, values: Mapping[fx.Node, Any], world: int, trace: Trace) -> Any:
    first = node.args[0] if node.args else None
    if node.target in (gather_start, reduce_start):
        assert isinstance(first, (list, tuple))
        gathers = node.target is gather_start
        if over_of(node) != "across":  # the second step of what is reduced inside of nodes first
            (trace.gathered if gathers else trace.reduced).update(node.args[1])
        given = [PerRank(_of_rank(n, values, r) for r in range(world)) for n in first]
        if is_packed(node):
            ranks = _together(lookup(node.args[1][0]), over_of(node), world)
            return Flight("gather" if gathers else "reduce", [_rows(g, gathers, ranks) for g in given])
        work = _whole if gathers else _mean
        return Flight("gather" if gathers else "reduce", [work(k, g) for k, g in zip(node.args[1], given, strict=True)])
    if node.target is keep_in_node:
        keys = node.args[1]
        whole = [_of_rank(first[: len(keys)], values, r) for r in range(world)]
        return PerRank(
            [rows_in_node(lookup(k), v, r) for k, v in zip(keys, whole[r], strict=True)] for r in range(world)
        )
    if node.target is rounding_errors:
        specs = [lookup(key) for key in node.args[1]]
        return PerRank([torch.zeros(world, spec.padded_numel // world) for spec in specs] for _ in range(world))
    if node.target in OF_ROWS:
        assert isinstance(first, (list, tuple))
        others = [PerRank(_of_rank(a, values, r) for r in range(world)) for a in node.args[1:]]
        given = [PerRank(_of_rank(n, values, r) for r in range(world)) for n in first]
        return Flight("exchange", [EXCHANGES[OF_ROWS[node.target]](one, *others) for one in given])
    if (exchange := EXCHANGES.get(_overload(node.target))) is not None:
        given = [PerRank(_of_rank(a, values, r) for r in range(world)) for a in node.args]
        answer = exchange(*given)
        if node.target not in RUNTIME_FUNCTIONS or node.target in CHUNKS:
            return answer
        is_of_counts = isinstance(answer[0], list)
        parts = [PerRank(one) for one in zip(*answer, strict=True)] if is_of_counts else [answer]
        return Flight("exchange", parts)
    if node.target in (gather_wait, reduce_wait, exchange_wait):
        flight = values[first]
        kind = {gather_wait: "gather", reduce_wait: "reduce", exchange_wait: "exchange"}[node.target]
        if not isinstance(flight, Flight) or flight.kind != kind:
            raise CheckError(f"{node.name} waits for {first}, which is no {kind}")
        flight.waited += 1
        return PerRank([v[r] for v in flight.values] for r in range(world))
    if _overload(node.target) is UNSHARD and lookup(node.args[1]).expert_axis is not None:
        return PerRank([torch.cat(list(values[first]))] * world)
    if _overload(node.target) in (UNSHARD, UNSHARD_EXPERTS):
        return _whole(node.args[1], values[first])
    if node.target is REDUCE_GRAD:
        trace.reduced[node.args[1]] += 1
        return _mean(node.args[1], values[first])
    if getattr(node.target, "__name__", "") == "prim_to_local":  # what torch 2.11 makes of the method
        return values[first]
    target = PACKING.get(node.target, node.target)
    return PerRank(target(*_of_rank(node.args, values, r), **_of_rank(node.kwargs, values, r)) for r in range(world))


def _overload(target: Any) -> Any:
    """As it stands behind AOTAutograd: Dynamo captures the name of an operator, which has but one overload."""
    return target.default if isinstance(target, torch._ops.OpOverloadPacket) else target


def inputs_of(toy: Toy) -> dict[str, PerRank]:
    """The values of the joint graph's placeholders, and of the captured one's, on every rank."""
    return _inputs_of(toy, toy.joint) | _inputs_of(toy, toy.raw["captured"])


def markers(graph: fx.Graph) -> dict[fx.Node, str]:
    """The key of each parameter, by the placeholder of its shard."""
    found = [n for n in graph.nodes if n.op == "call_function" and _overload(n.target) in (UNSHARD, UNSHARD_EXPERTS)]
    return {_root(marker.args[0]): marker.args[1] for marker in found}


def _inputs_of(toy: Toy, graph: fx.Graph) -> dict[str, PerRank]:
    shards = markers(graph)
    found: dict[str, PerRank] = {}
    batch = 0
    for node in graph.find_nodes(op="placeholder"):
        if node in shards:
            spec = lookup(shards[node])
            found[node.name] = PerRank(rows_of(spec, toy.whole[spec.key], r) for r in range(toy.world))
        elif node.name.startswith("tangents"):
            found[node.name] = PerRank(torch.ones(()) for _ in range(toy.world))
        elif isinstance(node.meta.get("val", node.meta.get("example_value")), torch.Tensor):
            found[node.name] = PerRank(values[batch] for values in toy.batches)
            batch += 1
    return found


def saved_of(backward: fx.Graph, outputs: Sequence[Any]) -> dict[str, Any]:
    """What the forward graph answered behind its loss, by the names that the backward graph gives it."""
    names = [n.name for n in backward.find_nodes(op="placeholder") if GATHERED not in n.meta]
    saved = outputs[1:]
    saved = [*(v for v in saved if isinstance(v[0], int)), *(v for v in saved if not isinstance(v[0], int))]
    return dict(
        zip(
            names[: next(i for i, n in enumerate(names) if n.startswith("tangents"))],
            saved,
            strict=False,
        )
    )


def without_scales(graph: fx.Graph, outputs: Sequence[Any]) -> list[Any]:
    """What a forward graph answers, without the scales of saved values in few bits, which it does not without them."""
    answers = graph.find_nodes(op="output")[0].args[0]
    scales = {item for both in calls(graph, QUANTISE_SAVED) for item in both.users if item.args[1] == 1}
    return [value for node, value in zip(answers, outputs, strict=True) if node not in scales]


def _root(node: fx.Node) -> fx.Node:
    while node.op != "placeholder":
        node = node.args[0]  # type: ignore[assignment]
    return node


# -- checks --------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Step:
    """The graphs of one step after its passes."""

    joint: fx.Graph
    forward: fx.Graph
    backward: fx.Graph
    results: list[PassResult]


def run_pipeline(toy: Toy, passes: Sequence[Pass] | None = None, target: str | None = None) -> Step:
    """The passes on both halves, the partition between them, as ``dspass.compilation`` does it; predicted for ``target``."""
    passes = toy.passes if passes is None else passes
    results: list[PassResult] = []

    def apply(gm: fx.GraphModule, where: Where) -> fx.GraphModule:
        return run_passes(gm, passes, PassContext(where=where, target=target), results.append)

    joint = apply(fx.GraphModule(nn.Module(), copy_graph(toy.joint)), "joint")
    kept = copy_graph(joint.graph)
    forward, backward = partition(joint, [n.meta["val"] for n in joint.graph.find_nodes(op="placeholder")], 1)
    mark_all(forward.graph, backward.graph, 1, passes, devices.CPU)
    return Step(
        joint=kept,
        forward=apply(forward, "forward").graph,
        backward=apply(backward, "backward").graph,
        results=results,
    )


def check_step(toy: Toy, passes: Sequence[Pass] | None = None, ahead: int = 1) -> Step:
    """What the suite asks of any pipeline: it lints, each thing is sent as often as it should be, the
    numbers are those of the plain model, wishes are honoured, nothing gathered lives longer than it must,
    and gathers overlap compute."""
    step = run_pipeline(toy, passes)
    check_numbers(toy, step)
    check_wishes(toy, step)
    for graph in (step.forward, step.backward):
        check_liveness(graph, ahead)
    check_overlap(step.forward)
    check_overlap(step.backward)
    return step


def check_numbers(toy: Toy, step: Step) -> None:
    """Losses and gradients of each rank equal the plain model's, averaged over the ranks' batches."""
    inputs = inputs_of(toy)
    trace, backward_trace = Trace(), Trace()
    with torch.no_grad():
        outputs = simulate(step.forward, inputs, toy.world, trace)
        results = simulate(step.backward, inputs | saved_of(step.backward, outputs), toy.world, backward_trace)
    for name, sent in (("forward", trace.gathered), ("backward", backward_trace.gathered)):
        if too_many := {k: n for k, n in sent.items() if n > 1}:
            raise CheckError(f"gathered more than once in one {name}: {too_many}")
    trained = {key for key, spec in toy.engine.specs.items() if spec.trains and reduction_steps([spec])}
    counted = dict(backward_trace.reduced)
    if counted != dict.fromkeys(trained, 1):
        raise CheckError(f"each gradient is reduced once, and these are not: {counted} of {sorted(trained)}")
    for rank in range(toy.world):
        _close(outputs[0][rank], toy.losses[rank], f"the loss on rank {rank}")
    shards = markers(toy.joint)
    primals = [n for n in toy.joint.find_nodes(op="placeholder") if not n.name.startswith("tangents")]
    for node, grad in zip(primals, results, strict=True):
        if node in shards:
            spec = lookup(shards[node])
            for rank in range(toy.world):
                wanted = rows_of(spec, toy.grads[spec.key], rank)
                _close(
                    own_rows(grad[rank], wanted, rank),
                    wanted,
                    f"the gradient of {spec.name} on rank {rank}",
                )


def own_rows(found: Any, wanted: Any, rank: int) -> Any:
    """A graph is rank 0's, which holds the most rows: where it names that number, another rank's are the first of them."""
    is_longer = rank and isinstance(found, torch.Tensor) and found.dim() and found.shape[0] > wanted.shape[0]
    return found[: wanted.shape[0]] if is_longer else found


def check_wishes(toy: Toy, step: Step) -> None:
    """What is marked to be kept is handed to the backward, what is to be computed again is not; no mark is left."""
    for graph in (step.joint, step.forward, step.backward):
        if calls(graph, WISH):
            raise CheckError("marks are left in the graph")
    saved = {node.name for node in step.forward.find_nodes(op="output")[0].args[0][1:]}
    for mark in calls(toy.joint, WISH):
        value, kind = mark.args
        assert isinstance(value, fx.Node)
        while getattr(value.target, "is_view", False) is True:
            value = value.args[0]  # type: ignore[assignment]
        if (value.name in saved) != (kind == "keep"):
            raise CheckError(f"{kind} of {value.name} is not honoured: saved are {sorted(saved)}")


def _close(found: Any, wanted: torch.Tensor, what: str) -> None:
    try:
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    except AssertionError as error:
        raise CheckError(f"{what} differs: {error}") from error


def aliases(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Every node that shares memory with a gathered parameter, to the ``gather_start`` that filled it."""
    found: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.target is gather_start or node.op != "call_function":
            continue
        first = node.args[0] if node.args else None
        if node.target is gather_wait:
            found[node] = first
        elif (
            isinstance(first, fx.Node)
            and first in found
            and (node.target in (operator.getitem, DEQUANTISE) or getattr(node.target, "is_view", False) is True)
        ):
            found[node] = found[first]
    return found


def first_uses(graph: fx.Graph) -> dict[fx.Node, int]:
    """Each ``gather_start`` to the position of the first computation that reads what it brings."""
    shared = aliases(graph)
    found: dict[fx.Node, int] = {}
    for i, node in enumerate(graph.nodes):
        if node not in shared:
            for source in node.all_input_nodes:
                if source in shared:
                    found.setdefault(shared[source], i)
    return found


def check_liveness(graph: fx.Graph, ahead: int = 1) -> None:
    """Beside the buckets that the next computation reads, no more than ``ahead`` are whole or on their way
    at any time before their first use; and no output shares a gathered parameter's memory, which would keep
    it past its release."""
    shared, use = aliases(graph), first_uses(graph)
    for result in graph.find_nodes(op="output")[0].all_input_nodes:
        if result in shared:
            raise CheckError(f"{result.name} leaves the graph and keeps a gathered parameter alive")
    begun: list[fx.Node] = []
    for i, node in enumerate(graph.nodes):
        if node.target is gather_start:
            begun.append(node)
        waiting = [start for start in begun if use[start] >= i]
        later = [start.name for start in waiting if use[start] > min(use[s] for s in waiting)]
        if len(later) > ahead:
            raise CheckError(f"at {node.name} {len(later)} buckets are gathered that are not used soon: {later}")


def check_overlap(graph: fx.Graph) -> None:
    """Between the start and the wait of each bucket something is computed, but for what the graph begins
    with."""
    shared, use = aliases(graph), first_uses(graph)
    order = list(graph.nodes)
    starts = sorted(calls(graph, gather_start))
    for previous, start in itertools.pairwise(starts):
        if use[start] == use[previous]:
            continue
        between = order[order.index(start) + 1 : order.index(wait_of(start))]
        packs = {n for n in between if n.target is QUANTISE}
        packs |= {user for n in packs for user in n.users}
        if all(n in shared or n in packs or n.target is gather_start for n in between):
            raise CheckError(f"{start.name} starts too late: nothing is computed until its wait")
