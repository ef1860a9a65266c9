"""Gradient clipping over parameters that lie on several meshes, as weights of experts do beside all others.

``torch.nn.utils.clip_grad_norm_`` stacks the norms of all gradients, which DTensors on two meshes cannot: it raises. Here
each mesh's gradients have a norm, whole on every rank, and the norm of these is that of all.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor


@torch.no_grad()
def clip_grad_norm_(
    model: nn.Module | Iterable[torch.Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> torch.Tensor:
    """Scale the gradients of ``model``, or of parameters, so that their norm together is at most ``max_norm``; answers what it
    was, a plain 0-dim tensor, the same on all ranks, which call this together. Arguments as ``torch.nn.utils``' own has.

    Raises ``RuntimeError`` with ``error_if_nonfinite`` where the norm is not finite.
    """
    params = list(model.parameters() if isinstance(model, nn.Module) else model)
    by_mesh: dict[Any, list[torch.Tensor]] = {}
    for param in params:
        if param.grad is not None:
            by_mesh.setdefault(param.device_mesh if isinstance(param, DTensor) else None, []).append(param)
    if not by_mesh:
        return torch.tensor(0.0)
    norms = [
        _whole(nn.utils.get_total_norm([p.grad for p in some if p.grad is not None], norm_type, False, foreach))
        for some in by_mesh.values()
    ]
    total = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]), norm_type)
    if error_if_nonfinite and not torch.isfinite(total):
        raise RuntimeError(
            f"the {norm_type}-norm of the gradients is {total.item()}: they cannot be clipped to {max_norm}."
        )
    for some in by_mesh.values():
        nn.utils.clip_grads_with_norm_(some, max_norm, total, foreach)
    return total


def _whole(norm: torch.Tensor) -> torch.Tensor:
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
