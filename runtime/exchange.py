"""Tokens to the ranks that hold their experts, and back: the all-to-alls of expert parallelism.

A grouped product takes rows in the order of experts, and rank ``r`` of ``N`` holds experts ``r * L`` to ``(r + 1) * L``, so
rows in that order are also in the order of the ranks that they go to. What a pass inserts around the products of a layer
(:mod:`dspass.passes.divide_experts`) is therefore only

- :func:`exchange_counts`: from where each expert's rows end, how many arrive from each rank for each expert here, and on the
  host how many each rank has for each other one: read once for all exchanges of a layer, forward and backward;
- :func:`dispatch_rows`: the rows themselves, each rank's one after another as they arrive;
- :func:`arrival_positions`: where each of them stands in the order of experts (``spread_experts`` takes them there, and
  ``unpermute_experts`` back);
- :func:`combine_rows`: what the experts made of them, to where they came from.

The last is the second's adjoint, so the backward has its own two (Lepikhin et al., GShard, 2020; dropless as in Gale et al.,
MegaBlocks, 2023). Every rank may have another number of tokens, none too. How many rows arrive is known only when the counts
have: the size is an unbacked symbol of the graph, made here and not by ``item()``, which Dynamo allows with
``capture_scalar_outputs`` alone. A router that answers NaN says so in its counts, and every rank raises.

Where a layer is computed in *chunks*, so that the rows of one travel while those of another are computed, a chunk has some of
each rank's experts: :func:`split_chunks` and :func:`join_chunks`, each other's adjoint, stand outside of the exchanges, which
are then as many, each of fewer rows. They copy the rows once. Dropped: to send from, and receive into, pieces of one tensor,
which copies nothing where a transport takes lists of tensors, and makes one exchange of what should be several.

Where each expert takes the same number of rows from every rank, its *capacity*, sizes are fixed and :func:`exchange_even` is
all there is: one row of a tensor a rank, and its own adjoint. A rank whose capacity is another one than its peers', which has
another number of tokens, would leave them with less than they wait for: ranks tell each other before they send.

Markers stand in the graph while it is differentiated; :mod:`dspass.passes.exchange_rows` makes a start and a wait of each.

Dropped, where no capacity is asked for: rows padded to what each expert may hold at most, which needs no sizes, and sends and
computes zeros: with the balance of a router that is not yet trained two to four times as many rows. Dropped: one all-gather of
all tokens and a reduce-scatter of results, as tensor parallel servers do: N/k times the bytes.
"""

from __future__ import annotations

from typing import Any

import torch

from dspass.runtime import compat, expert_rows
from dspass.runtime.operators import differentiable, operator
from dspass.runtime.params import lookup

# -- counts --------------------------------------------------------------------------------------------------------------


def _counts_fake(
    ends: torch.Tensor, scores: torch.Tensor | None, chunks: int, parts: int, key: str
) -> list[torch.Tensor]:
    ranks = lookup(key).divided_over.size
    arriving = ends.new_empty((ranks, ends.shape[0] // ranks), dtype=torch.int32)
    splits = [ends.new_empty((ranks, ranks), dtype=torch.int32, device="cpu") for _ in range(chunks)]
    return [arriving, *splits]


@operator("exchange_counts(Tensor ends, Tensor? scores, int chunks, int parts, str key) -> Tensor[]", fake=_counts_fake)
def exchange_counts(
    ends: torch.Tensor, scores: torch.Tensor | None, chunks: int, parts: int, key: str
) -> list[torch.Tensor]:
    """``int32[ranks, experts here]``: the rows that each rank has for each expert here; then on the host, for each of the
    ``chunks`` of each rank's experts, which are as even as can be (:func:`dspass.runtime.traffic.even_parts`),
    ``int32[ranks, ranks]``, those that each rank has for each other one. ``ends[experts]``: the row behind each expert's last
    on this rank. ``scores``, the router's, are looked through for NaN. The layer is computed for so many ``parts`` of the
    batch, of which this is one. ``key``: a weight of the experts.

    Raises ``RuntimeError`` on all ranks where one has NaN among its scores, or other numbers of chunks or parts.
    """
    spec = lookup(key)
    return expert_rows.start_counts(spec, ends, scores, chunks, parts).wait()


# -- rows ----------------------------------------------------------------------------------------------------------------


def _dispatch_fake(rows: torch.Tensor, splits: torch.Tensor, received: Any, key: str) -> torch.Tensor:
    if received is None:
        received = expected_rows(rows, key)
    return rows.new_empty((received, *rows.shape[1:]))


def expected_rows(rows: torch.Tensor, key: str) -> Any:
    """How many rows arrive where ``rows`` are sent: a symbol, or in a prediction as many as are expected."""
    spec = lookup(key)
    expected = expert_rows.expected_arrivals(spec, rows.shape[0])
    return expected if spec.engine.target is not None else compat.unknown_size(rows, expected)


@operator("dispatch_rows(Tensor rows, Tensor splits, SymInt? received, str key) -> Tensor", fake=_dispatch_fake)
def dispatch_rows(rows: torch.Tensor, splits: torch.Tensor, received: int | None, key: str) -> torch.Tensor:
    """Of ``rows[rows, ...]``, in the order of all experts, those of the experts here from all ranks, those of rank 0 first:
    ``[received, ...]``, where that is known. ``splits[ranks, ranks]``, on the host, are the rows that each rank has for each
    other one; rows behind those go nowhere."""
    spec = lookup(key)
    (arrived,) = expert_rows.start_dispatch(spec, [rows], splits).wait()
    return arrived


def _combine_fake(rows: torch.Tensor, splits: torch.Tensor, size: Any, key: str) -> torch.Tensor:
    return rows.new_empty((size, *rows.shape[1:]))


@operator("combine_rows(Tensor rows, Tensor splits, SymInt size, str key) -> Tensor", fake=_combine_fake)
def combine_rows(rows: torch.Tensor, splits: torch.Tensor, size: int, key: str) -> torch.Tensor:
    """The way back: ``[size, ...]``, rows where :func:`dispatch_rows` took them, and zeros behind those."""
    spec = lookup(key)
    (arrived,) = expert_rows.start_combine(spec, [rows], splits, size).wait()
    return arrived


def _keep_dispatch(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    rows, splits, _, ctx.key = inputs
    ctx.size = rows.shape[0]
    ctx.save_for_backward(splits)


def _dispatch_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
    (splits,) = ctx.saved_tensors
    return torch.ops.dspass.combine_rows(grad, splits, ctx.size, ctx.key), None, None, None


def _keep_combine(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    rows, splits, _, ctx.key = inputs
    ctx.received = rows.shape[0]
    ctx.save_for_backward(splits)


def _combine_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
    (splits,) = ctx.saved_tensors
    return torch.ops.dspass.dispatch_rows(grad, splits, ctx.received, ctx.key), None, None, None


differentiable("dispatch_rows", backward=_dispatch_backward, keep=_keep_dispatch)
differentiable("combine_rows", backward=_combine_backward, keep=_keep_combine)


# -- chunks --------------------------------------------------------------------------------------------------------------


def _split_fake(rows: torch.Tensor, splits: list[torch.Tensor], sizes: Any, key: str) -> list[torch.Tensor]:
    if sizes is None:
        some, others = rows.shape[0] // len(splits), len(splits) - 1
        likely = [rows.shape[0] - some * others, *[some] * others]
        known = lookup(key).engine.target is not None
        sizes = likely if known else [compat.unknown_size(rows, size) for size in likely]
    return [rows.new_empty((size, *rows.shape[1:])) for size in sizes]


@operator("split_chunks(Tensor rows, Tensor[] splits, SymInt[]? sizes, str key) -> Tensor[]", fake=_split_fake)
def split_chunks(
    rows: torch.Tensor, splits: list[torch.Tensor], sizes: list[int] | None, key: str
) -> list[torch.Tensor]:
    """Of ``rows[rows, ...]``, in the order of all experts, those of each chunk: ``[sizes[i], ...]``, where these are known, in
    the order of experts. ``splits`` are those of :func:`exchange_counts`, one for each chunk."""
    spec = lookup(key)
    pieces = _pieces(rows, splits, spec.divided_over.rank)
    chunks = [torch.cat([of_rank[i] for of_rank in pieces]) for i in range(len(splits))]
    spec.engine.routing.dispatched(spec, rows.shape[0] - sum(chunk.shape[0] for chunk in chunks))
    return chunks


@operator(
    "join_chunks(Tensor[] rows, Tensor[] splits, SymInt size, str key) -> Tensor",
    fake=lambda rows, splits, size, key: rows[0].new_empty((size, *rows[0].shape[1:])),
)
def join_chunks(rows: list[torch.Tensor], splits: list[torch.Tensor], size: int, key: str) -> torch.Tensor:
    """``[size, ...]``: rows where :func:`split_chunks` took them, and zeros behind those."""
    result = rows[0].new_empty((size, *rows[0].shape[1:]))
    pieces = _pieces(result, splits, lookup(key).divided_over.rank)
    for i, chunk in enumerate(rows):
        places = [of_rank[i] for of_rank in pieces]
        for place, piece in zip(places, chunk.split([p.shape[0] for p in places]), strict=True):
            place.copy_(piece)
    result[sum(chunk.shape[0] for chunk in rows) :].zero_()
    return result


def _pieces(rows: torch.Tensor, splits: list[torch.Tensor], rank: int) -> list[tuple[torch.Tensor, ...]]:
    """Views of a rank's rows, for each rank that they go to those of each chunk."""
    counts = [[int(c) for c in of_rank] for of_rank in zip(*(table[rank].tolist() for table in splits), strict=True)]
    whole = rows[: sum(map(sum, counts))].split([sum(of_rank) for of_rank in counts])
    return [part.split(of_rank) for part, of_rank in zip(whole, counts, strict=True)]


def _keep_split(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    rows, splits, _, ctx.key = inputs
    ctx.size = rows.shape[0]
    ctx.save_for_backward(*splits)


def _split_backward(ctx: Any, grads: list[torch.Tensor]) -> tuple[torch.Tensor, list[None], None, None]:
    splits = list(ctx.saved_tensors)
    return torch.ops.dspass.join_chunks(grads, splits, ctx.size, ctx.key), [None] * len(splits), None, None


def _keep_join(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    rows, splits, _, ctx.key = inputs
    ctx.sizes = [chunk.shape[0] for chunk in rows]
    ctx.save_for_backward(*splits)


def _join_backward(ctx: Any, grad: torch.Tensor) -> tuple[list[torch.Tensor], list[None], None, None]:
    splits = list(ctx.saved_tensors)
    return torch.ops.dspass.split_chunks(grad, splits, ctx.sizes, ctx.key), [None] * len(splits), None, None


differentiable("split_chunks", backward=_split_backward, keep=_keep_split)
differentiable("join_chunks", backward=_join_backward, keep=_keep_join)


# -- the same number of rows for each expert -----------------------------------------------------------------------------


@operator(
    "exchange_even(Tensor x, Tensor? ends, Tensor? scores, bool opens, str key) -> Tensor",
    fake=lambda x, ends, scores, opens, key: x.new_empty(x.shape),
)
def exchange_even(
    x: torch.Tensor, ends: torch.Tensor | None, scores: torch.Tensor | None, opens: bool, key: str
) -> torch.Tensor:
    """Row ``r`` of ``x[ranks, experts here, capacity, ...]`` to rank ``r``; row ``r`` of the result came from there.

    The exchange that ``opens`` a layer's call compares capacities first, and tells what is known of routing: ``ends[experts]``,
    the row behind each expert's last before rows beyond the capacity were dropped, and the router's ``scores``. ``key``: a
    weight of the experts.

    Raises ``RuntimeError`` on all ranks where capacities differ, or one has NaN among its scores.
    """
    spec = lookup(key)
    (arrived,) = expert_rows.start_even(spec, [x], ends, scores, opens).wait()
    return arrived


def _keep_even(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.key = inputs[4]


def _even_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
    return torch.ops.dspass.exchange_even(grad, None, None, False, ctx.key), None, None, None, None


differentiable("exchange_even", backward=_even_backward, keep=_keep_even)


# -- the order of experts ------------------------------------------------------------------------------------------------


@operator(
    "arrival_positions(Tensor arriving, SymInt rows) -> Tensor",
    fake=lambda arriving, rows: arriving.new_empty((rows, 1), dtype=torch.int32),
)
def arrival_positions(arriving: torch.Tensor, rows: int) -> torch.Tensor:
    """``int32[rows, 1]``: where each row that arrived, ``arriving[ranks, experts]`` of them, stands in the order of experts,
    and with one expert in the order of ranks: positions as ``permute_experts`` answers them."""
    numbers = torch.arange(rows, dtype=torch.int32, device=arriving.device)
    counts = arriving.reshape(-1)
    arrived = counts.cumsum(0, dtype=torch.int32)
    by_expert = arriving.t().reshape(-1)
    starts = (by_expert.cumsum(0, dtype=torch.int32) - by_expert).view(arriving.shape[1], arriving.shape[0])
    shift = starts.t().reshape(-1) - (arrived - counts)
    group = torch.bucketize(numbers, arrived, right=True)
    return (numbers + shift[group])[:, None]


@operator(
    "experts_of_rows(Tensor ends, SymInt rows, int first) -> Tensor",
    fake=lambda ends, rows, first: ends.new_empty((rows,), dtype=torch.int64),
)
def experts_of_rows(ends: torch.Tensor, rows: int, first: int) -> torch.Tensor:
    """``int64[rows]``: the expert of each row, in the order of experts that ``end`` at ``int32[experts]``; the first is called
    ``first``. Rows behind the last end, which are dropped, count as the last expert's."""
    numbers = torch.arange(rows, dtype=ends.dtype, device=ends.device)
    return torch.bucketize(numbers, ends, right=True).clamp_max(ends.shape[0] - 1) + first


# -- shares of tokens ----------------------------------------------------------------------------------------------------


@operator("mean_over_ranks(Tensor values, str key) -> Tensor", fake=lambda values, key: torch.empty_like(values))
def mean_over_ranks(values: torch.Tensor, key: str) -> torch.Tensor:
    """The mean of ``values`` over the ranks of parameter ``key``'s data axis; it has no gradient."""
    spec = lookup(key)
    (mean,) = expert_rows.start_mean(spec, values).wait()
    return mean


differentiable("mean_over_ranks", backward=lambda ctx, grad: (None, None), keep=lambda ctx, inputs, output: None)


#: What stands in a graph.
COUNTS = torch.ops.dspass.exchange_counts.default
DISPATCH = torch.ops.dspass.dispatch_rows.default
COMBINE = torch.ops.dspass.combine_rows.default
MEAN = torch.ops.dspass.mean_over_ranks.default
EVEN = torch.ops.dspass.exchange_even.default
SPLIT = torch.ops.dspass.split_chunks.default
JOIN = torch.ops.dspass.join_chunks.default
#: What reads sizes on the host to copy rows.
CHUNKS = (SPLIT, JOIN)
#: Those that send, on all ranks, and the former: none runs again because somebody would rather compute a value than keep it.
MARKERS = frozenset({COUNTS, DISPATCH, COMBINE, EVEN, MEAN, *CHUNKS})
