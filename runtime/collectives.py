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

from dspass.runtime.engine import Exchange, Gather, Reduction
from dspass.runtime.host import offload_start, offload_wait, reload_start, reload_wait
from dspass.runtime.params import Over, lookup


@torch.library.custom_op("dspass::unshard", mutates_args=())
def unshard(local: torch.Tensor, key: str) -> torch.Tensor:
    """The whole parameter ``key``, of which this rank holds ``local``, in compute precision."""
    spec = lookup(key)
    (full,) = spec.engine.start_gather([spec], [local]).wait()
    # An operator's result may alias neither its input (one rank) nor a copy that stays (stages 1 and 2).
    return full.clone() if full.data_ptr() == local.data_ptr() else full.view_as(full)


@unshard.register_fake
def _(local: torch.Tensor, key: str) -> torch.Tensor:
    spec = lookup(key)
    return local.new_empty(spec.shape, dtype=spec.compute_dtype)


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
    return torch.ops.dspass.reduce_grad(grad, ctx.key), None


torch.library.register_autograd("dspass::unshard", _unshard_backward, setup_context=_save)


def gather_start(
    shards: list[torch.Tensor], keys: list[str], format: str | None = None, over: Over = None
) -> Gather | Exchange:
    """Begin the all-gather of a bucket. Nothing may read the result before :func:`gather_wait`. With ``format`` the bucket
    has been quantised: instead of shards there are its codes and its scales. ``over`` "node" it is made of what the ranks of
    this node kept (:func:`keep_in_node`)."""
    specs = [lookup(key) for key in keys]
    engine = specs[0].engine
    return engine.start_gather(specs, shards, over) if format is None else engine.start_packed_gather(specs, shards)


def gather_wait(gather: Gather | Exchange) -> list[torch.Tensor]:
    """The whole parameters of a bucket; each is freed after its last use in the graph. Of a quantised one the codes and the
    scales, a row of each rank."""
    return gather.wait()


def keep_in_node(tensors: list[torch.Tensor], keys: list[str]) -> list[torch.Tensor]:
    """Keep this rank's rows of whole parameters, as they are divided inside of its node, until the optimiser steps. ``tensors``
    are the whole parameters, and behind them the shards that they were gathered from."""
    specs = [lookup(key) for key in keys]
    return specs[0].engine.keep_in_node(specs, tensors[: len(keys)], tensors[len(keys) :])


def reduce_start(
    grads: list[torch.Tensor], keys: list[str], format: str | None = None, over: Over = None
) -> Reduction | Exchange:
    """Begin the reduction of a bucket of gradients. With ``format`` the bucket has been quantised: its codes and its scales,
    with a row for each rank ``over`` which they go, are exchanged, and the graph sums what arrives."""
    specs = [lookup(key) for key in keys]
    engine = specs[0].engine
    return engine.start_reduce(specs, grads) if format is None else engine.start_packed_reduce(specs, grads, over)


def reduce_wait(reduction: Reduction | Exchange) -> list[torch.Tensor]:
    """The averaged gradients of a bucket, each of its parameter's local shape. Of a quantised one the codes and the scales, a
    row from each rank."""
    return reduction.wait()


def rounding_errors(tensors: list[torch.Tensor], keys: list[str], reset: int | None = None) -> list[torch.Tensor]:
    """What rounding the last gradients of a bucket has lost, to be replaced in place; ``tensors`` are none."""
    specs = [lookup(key) for key in keys]
    return specs[0].engine.rounding_errors(specs, reset)


RUNTIME_FUNCTIONS = frozenset(
    {
        gather_start,
        gather_wait,
        keep_in_node,
        reduce_start,
        reduce_wait,
        rounding_errors,
        offload_start,
        offload_wait,
        reload_start,
        reload_wait,
    }
)
