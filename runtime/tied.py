"""Gradients of parameters that several pipeline stages use, such as an embedding that is also the head.

Each rank whose stages use one holds it, so that no stage waits for another one's weights, and computes the part of its
gradient that its own uses make. Their sum is the gradient, the same on all of them, and so are their optimiser steps.

Dropped: one holder, to which the others send gradients and from which they get weights at each step. It sends the same bytes,
and a step has to be waited for.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from itertools import groupby

import torch

from dspass.runtime.engine import Engine
from dspass.runtime.params import ParamSpec
from dspass.runtime.traffic import Collective
from dspass.runtime.transport import transport_for


@torch.no_grad()
def sum_tied(engine: Engine, held: MutableMapping[str, torch.Tensor]) -> None:
    """Sum, in place, the gradients among ``held`` whose parameters ranks of several stages hold.

    ``held`` maps keys to gradients as this rank holds the parameter (its rows where that is divided over the data axis). All
    ranks call this together, once a step. A rank whose own stages gave a trained one no gradient adds zeros, and has the sum in
    ``held`` like the others.
    """

    def axis_ranks(spec: ParamSpec) -> tuple[int, ...]:
        assert spec.tied_axis is not None
        return spec.tied_axis.ranks

    tied = [s for s in engine.specs.values() if s.tied_axis is not None and s.trains and not s.is_elsewhere]
    # In one order on all ranks of an axis, whatever else each of them holds; a reduction takes one precision.
    tied.sort(key=lambda spec: (axis_ranks(spec), str(spec.dtype), spec.name))
    for _, group in groupby(tied, key=lambda spec: (axis_ranks(spec), spec.dtype)):
        specs = list(group)
        axis = specs[0].tied_axis
        assert axis is not None
        for spec in specs:
            if spec.key not in held:
                assert engine.stages is not None
                held[spec.key] = torch.zeros(spec.local_shape, dtype=spec.dtype, device=engine.stages.device)
        grads = [held[spec.key] for spec in specs]
        flight = transport_for(axis, engine.dry).all_reduce(axis, grads)
        sent = 2 * sum(grad.nbytes for grad in grads) * (axis.size - 1) // axis.size
        counted = engine.traffic.add(Collective.on(axis, "all-reduce", "backward", sent))
        for grad, total in zip(grads, flight.wait(), strict=True):
            grad.copy_(total)
        engine.traffic.exposed[counted] += flight.exposed_seconds
