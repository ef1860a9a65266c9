"""Random numbers of ranks that compute parts of one model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from dspass.runtime.axis import Axis


@contextlib.contextmanager
def drawing_apart(axis: Axis, device: torch.device) -> Iterator[None]:
    """Inside, each rank of ``axis`` draws random numbers of its own, which come from the seed all the same.

    Scripts give all ranks one seed. Stages that draw one after another in one process would then draw the same numbers on all
    ranks, and layers at equal places of their stages would drop the same units (Megatron-LM offsets a pipeline's seeds by rank
    for that). The generator that scripts know moves on by one draw, alike on all ranks.
    """
    if axis.size == 1:
        yield
        return
    seed = int(torch.randint(2**62, ()))
    is_cuda = device.type == "cuda"
    with torch.random.fork_rng([torch.cuda.current_device()] if is_cuda else []):
        torch.default_generator.manual_seed(seed + axis.rank)
        if is_cuda:
            torch.cuda.manual_seed(seed + axis.rank)
        yield


__all__ = ["drawing_apart"]
