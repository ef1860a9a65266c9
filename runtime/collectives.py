"""The nodes of a graph that the runtime executes, and the two markers that passes turn into them.

``dspass::unshard(local, key)`` and its derivative ``dspass::reduce_grad(grad, key)`` stand in the graph where a
parameter is used, so that Dynamo and AOTAutograd trace through them without knowing about ranks. Passes replace them by
start and wait; only code that runs eagerly (the first call of the one-line way, graph breaks) ever executes a marker.

``gather_start`` to ``rounding_errors`` are plain functions that stand in an ``fx`` graph as they are. They are no torch
operators since Inductor never sees them: :mod:`dspass.lowering` executes them between compiled segments.
"""

from __future__ import annotations

from typing import Any

import torch

from dspass.runtime import expert_rows
from dspass.runtime.exchange import CHUNKS
from dspass.runtime.host import offload_start, offload_wait, reload_start, reload_wait
from dspass.runtime.params import Over, Packed, lookup
from dspass.runtime.pending import Pending


@torch.library.custom_op("dspass::unshard", mutates_args=())
def unshard(local: torch.Tensor, key: str) -> torch.Tensor:
    """The whole parameter ``key``, of which this rank holds ``local``, in compute precision."""
    spec = lookup(key)
    (full,) = spec.engine.start_gather([spec], [local]).wait()
    if spec.expert_axis is not None:
        return expert_rows.gather_experts(spec, full)
    return _apart(full, local)


def _apart(whole: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """An operator's result may alias neither its input (one rank) nor a copy that stays (stages 1 and 2)."""
    return whole.clone() if whole.data_ptr() == local.data_ptr() else whole.view_as(whole)


@unshard.register_fake
def _(local: torch.Tensor, key: str) -> torch.Tensor:
    spec = lookup(key)
    # A parameter on the meta device waits for values, or is another pipeline stage's: what is computed with it is not there.
    device = spec.engine.stages.device if local.is_meta and spec.engine.stages is not None else local.device
    return local.new_empty(spec.full_shape, dtype=spec.compute_dtype, device=device)


@torch.library.custom_op("dspass::reduce_grad", mutates_args=())
def reduce_grad(grad: torch.Tensor, key: str) -> torch.Tensor:
    """The mean over ranks of the gradient of parameter ``key``: this rank's rows, in the parameter's precision."""
    spec = lookup(key)
    (local,) = spec.engine.start_reduce([spec], [grad]).wait()
    return local.clone() if local.data_ptr() == grad.data_ptr() else local


@reduce_grad.register_fake
def _(grad: torch.Tensor, key: str) -> torch.Tensor:
    spec = lookup(key)
    return grad.new_empty(spec.local_shape, dtype=spec.dtype)


def _save(ctx: Any, inputs: tuple[torch.Tensor, str], output: torch.Tensor) -> None:
    ctx.key = inputs[1]


def _unshard_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
    axis = lookup(ctx.key).expert_axis
    if axis is not None:  # of all experts, to those of this rank's place
        grad = torch.ops.dspass.reduce_experts(grad, ctx.key) / axis.size
    return torch.ops.dspass.reduce_grad(grad, ctx.key), None


torch.library.register_autograd("dspass::unshard", _unshard_backward, setup_context=_save)


@torch.library.custom_op("dspass::unshard_experts", mutates_args=())
def unshard_experts(local: torch.Tensor, key: str) -> torch.Tensor:
    """As :func:`unshard`, of a weight of experts only those of this rank's place on their axis. Its gradient has come from all
    ranks of that axis, each of which has a loss of its own: it is divided by their number."""
    spec = lookup(key)
    (here,) = spec.engine.start_gather([spec], [local]).wait()
    return _apart(here, local)


@unshard_experts.register_fake
def _(local: torch.Tensor, key: str) -> torch.Tensor:
    spec = lookup(key)
    return local.new_empty(spec.shape, dtype=spec.compute_dtype)


def _unshard_experts_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
    return torch.ops.dspass.reduce_grad(grad / lookup(ctx.key).divided_over.size, ctx.key), None


torch.library.register_autograd("dspass::unshard_experts", _unshard_experts_backward, setup_context=_save)


@torch.library.custom_op("dspass::gather_experts", mutates_args=())
def gather_experts(here: torch.Tensor, key: str) -> torch.Tensor:
    """All experts' weights, of which ``here`` are those of this rank's place: where they are read, and not by products."""
    spec = lookup(key)
    return expert_rows.gather_experts(spec, here)


@gather_experts.register_fake
def _(here: torch.Tensor, key: str) -> torch.Tensor:
    return here.new_empty(lookup(key).full_shape)


@torch.library.custom_op("dspass::reduce_experts", mutates_args=())
def reduce_experts(grad: torch.Tensor, key: str) -> torch.Tensor:
    """The sum over ranks of gradients of all experts' weights, those of this rank's place."""
    spec = lookup(key)
    return expert_rows.reduce_experts(spec, grad)


@reduce_experts.register_fake
def _(grad: torch.Tensor, key: str) -> torch.Tensor:
    return grad.new_empty(lookup(key).shape)


def _gather_experts_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
    return torch.ops.dspass.reduce_experts(grad, ctx.key), None


torch.library.register_autograd("dspass::gather_experts", _gather_experts_backward, setup_context=_save)


def gather_start(shards: list[torch.Tensor], keys: list[str], format: str | None = None, over: Over = None) -> Pending:
    """Begin the all-gather of a bucket. Nothing may read the result before :func:`gather_wait`. With ``format`` the bucket
    has been quantised: instead of shards there are its codes and its scales. ``over`` "node" it is made of what the ranks of
    this node kept (:func:`keep_in_node`)."""
    specs = [lookup(key) for key in keys]
    engine = specs[0].engine
    return engine.start_gather(specs, shards, over) if format is None else engine.start_packed_gather(specs, shards)


def gather_wait(gather: Pending) -> list[torch.Tensor]:
    """The whole parameters of a bucket; each is freed after its last use in the graph. Of a quantised one the codes and the
    scales, a row of each rank."""
    return gather.wait()


def keep_in_node(tensors: list[torch.Tensor], keys: list[str]) -> list[torch.Tensor]:
    """Keep this rank's rows of whole parameters, as they are divided inside of its node, until the optimiser steps. ``tensors``
    are the whole parameters, and behind them the shards that they were gathered from."""
    specs = [lookup(key) for key in keys]
    return specs[0].engine.keep_in_node(specs, tensors[: len(keys)], tensors[len(keys) :])


def reduce_start(grads: list[torch.Tensor], keys: list[str], format: str | None = None, over: Over = None) -> Pending:
    """Begin the reduction of a bucket of gradients. With ``format`` the bucket has been quantised: its codes and its scales,
    with a row for each rank ``over`` which they go, are exchanged, and the graph sums what arrives."""
    specs = [lookup(key) for key in keys]
    engine = specs[0].engine
    return (
        engine.start_reduce(specs, grads) if format is None else engine.start_packed_reduce(specs, grads, format, over)
    )


def reduce_wait(reduction: Pending) -> list[torch.Tensor]:
    """The averaged gradients of a bucket, each of its parameter's local shape. Of a quantised one the codes and the scales, a
    row from each rank."""
    return reduction.wait()


def rounding_errors(tensors: list[torch.Tensor], keys: list[str], reset: int | None = None) -> list[torch.Tensor]:
    """What rounding the last gradients of a bucket has lost, to be replaced in place; ``tensors`` are none."""
    specs = [lookup(key) for key in keys]
    return specs[0].engine.rounding_errors(specs, reset)


def counts_start(ends: torch.Tensor, scores: torch.Tensor | None, chunks: int, parts: int, key: str) -> Pending:
    """Begin :func:`dspass.runtime.exchange.exchange_counts`."""
    spec = lookup(key)
    return expert_rows.start_counts(spec, ends, scores, chunks, parts)


def dispatch_start(rows: list[torch.Tensor], splits: torch.Tensor, key: str, packed: Packed = None) -> Pending:
    """Begin :func:`dspass.runtime.exchange.dispatch_rows`. ``rows`` is one tensor; where it is ``packed``, the graph has
    quantised each of its rows by itself, and here are its codes and its scales."""
    spec = lookup(key)
    return expert_rows.start_dispatch(spec, rows, splits, packed)


def combine_start(
    rows: list[torch.Tensor], splits: torch.Tensor, size: int, key: str, packed: Packed = None
) -> Pending:
    """Begin :func:`dspass.runtime.exchange.combine_rows`, of rows as :func:`dispatch_start` takes them."""
    spec = lookup(key)
    return expert_rows.start_combine(spec, rows, splits, size, packed)


def mean_start(values: torch.Tensor, key: str) -> Pending:
    """Begin :func:`dspass.runtime.exchange.mean_over_ranks`."""
    spec = lookup(key)
    return expert_rows.start_mean(spec, values)


def even_start(
    rows: list[torch.Tensor],
    ends: torch.Tensor | None,
    scores: torch.Tensor | None,
    opens: bool,
    key: str,
    packed: Packed = None,
) -> Pending:
    """Begin :func:`dspass.runtime.exchange.exchange_even` of one tensor, or where it is ``packed`` of its codes and its scales,
    which have its first three dimensions."""
    spec = lookup(key)
    return expert_rows.start_even(spec, rows, ends, scores, opens, packed)


def exchange_wait(exchange: Pending) -> list[torch.Tensor]:
    """What the start of an exchange of counts, rows or shares asked for: one tensor, or codes and scales;
    of counts also what the host has of them."""
    return exchange.wait()


RUNTIME_FUNCTIONS = frozenset(
    {
        *CHUNKS,
        combine_start,
        counts_start,
        dispatch_start,
        even_start,
        exchange_wait,
        gather_start,
        gather_wait,
        keep_in_node,
        mean_start,
        reduce_start,
        reduce_wait,
        rounding_errors,
        offload_start,
        offload_wait,
        reload_start,
        reload_wait,
    }
)
