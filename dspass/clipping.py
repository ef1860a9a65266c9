"""Norms of gradients that lie on several meshes: those of experts beside all others, and those of pipeline stages.

``torch.nn.utils.clip_grad_norm_`` stacks the norms of all gradients. DTensors on two meshes it cannot stack, and raises; of
pipeline stages it would see those of this rank only, and scale each stage by another factor. Here each mesh's gradients have a
norm, whole on every rank, those of stages are gathered over the pipe axis, and the norm of all these is that of all gradients.
With stages torch's own functions are taught the same (:func:`span_stages`), so that a plain training loop stays as it is.

Dropped: gradients as DTensors on a mesh of both axes, partial over the pipe. Every other operator would then see a shape of
which it has no part.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from dspass.engines import staged_engines
from dspass.runtime import compat
from dspass.runtime.axis import StageMesh
from dspass.runtime.stopped import waiting_for


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
    grads = [p.grad for p in params if p.grad is not None]
    total = norm_of(grads, norm_type, foreach, stages_of(grads, params))
    if error_if_nonfinite:
        _refuse_nonfinite(total, norm_type)
    for some in _by_mesh(params).values():
        nn.utils.clip_grads_with_norm_(some, max_norm, total, foreach)
    return total


def span_stages() -> None:
    """Have torch's own norms of gradients, and its ``GradScaler``, go over all pipeline stages."""
    compat.extend_total_norm(_total_norm)
    compat.extend_found_inf(_found_inf)


def _total_norm(
    theirs: Callable[..., torch.Tensor],
    tensors: Sequence[torch.Tensor],
    norm_type: float,
    error_if_nonfinite: bool,
    foreach: bool | None,
    params: Sequence[torch.Tensor] | None,
) -> torch.Tensor:
    stages = stages_of(tensors, params)
    if not stages:
        return theirs(tensors, norm_type, error_if_nonfinite, foreach)
    total = norm_of(tensors, norm_type, foreach, stages)
    if error_if_nonfinite:
        _refuse_nonfinite(total, norm_type)
    return total


def _found_inf(
    optimizer: torch.optim.Optimizer, found: dict[torch.device, torch.Tensor], none: torch.Tensor
) -> dict[torch.device, torch.Tensor]:
    """An overflow that one stage has seen is one of all: every rank skips the step. One without gradients has to hear of it."""
    pipelines = stages_of([], [p for group in optimizer.param_groups for p in group["params"]])
    if pipelines and not found:
        found = {none.device: none}
    for stages in pipelines:
        any_of_them = torch.stack([one.to(stages.device) for one in found.values()]).amax()
        with waiting_for(stages.pipe, "agree on an overflow"):
            dist.all_reduce(any_of_them, dist.ReduceOp.MAX, group=stages.pipe.group)
        for one in found.values():
            one.copy_(any_of_them)
    return found


def stages_of(grads: Collection[torch.Tensor], params: Collection[torch.Tensor] | None) -> list[StageMesh]:
    """The pipelines of more than one rank that a norm of ``grads`` goes over, in the same order on all of their ranks.

    A rank whose stages have no gradient has to know, too: by the parameters, among which are the stand-ins of those of other
    stages. Where these are not known either, the model that was divided last is meant: that is one thing on all ranks, while
    which older ones are still alive is each rank's own.
    """
    engines = [(e, e.stages) for e in staged_engines() if e.stages is not None and e.stages.pipe.size > 1]
    if not engines:
        return []
    meshes = {grad.device_mesh for grad in grads if isinstance(grad, DTensor)}
    ids = {id(p) for p in params or ()}
    if not params and not grads:
        return [engines[-1][1]]
    found = {
        id(stages.pipe): stages
        for engine, stages in engines
        if meshes.intersection(stages.meshes) or any(id(spec.param()) in ids for spec in engine.specs.values())
    }
    return sorted(found.values(), key=lambda stages: stages.pipe.size)


def norm_of(
    grads: Sequence[torch.Tensor], norm_type: float, foreach: bool | None, pipelines: Sequence[StageMesh]
) -> torch.Tensor:
    """The norm of ``grads`` together with those of the other stages of ``pipelines``: a plain 0-dim tensor, 0 without any."""
    norm_type = float(norm_type)
    elsewhere = _counted_elsewhere() if pipelines else frozenset()
    by_mesh = _by_mesh([g for g in grads if not (isinstance(g, DTensor) and _place(g) in elsewhere)])
    norms = {mesh: _whole(compat.total_norm(some, norm_type, foreach)) for mesh, some in by_mesh.items()}
    of_stages = [(stages, [norms.pop(mesh) for mesh in stages.meshes if mesh in norms]) for stages in pipelines]
    totals = [
        *norms.values(),
        *(_over_stages(_joined(mine, norm_type), norm_type, stages) for stages, mine in of_stages),
    ]
    found = _joined(totals, norm_type)
    return found if found is not None else torch.tensor(0.0)


def _over_stages(norm: torch.Tensor | None, norm_type: float, stages: StageMesh) -> torch.Tensor:
    """The norm of the norms of all stages; ``norm`` is None on a rank that has no gradient."""
    none = torch.zeros(2, dtype=torch.float64, device=stages.device)
    mine = none if norm is None else torch.stack([norm.to(none), torch.ones_like(none[0])])
    told = [torch.empty_like(mine) for _ in range(stages.pipe.size)]
    with waiting_for(stages.pipe, "exchange norms of gradients"):
        dist.all_gather(told, mine, group=stages.pipe.group)
    values, present = torch.stack(told).unbind(1)
    # What has no gradient must not change the norm, and which do is not read on the host: it would wait for the device.
    values = torch.where(present > 0, values, 0.0 if norm_type >= 0 else float("inf"))
    total = torch.where(present.any(), _norm_of_norms(values, norm_type), 0.0)
    return total.to(_precision(stages))


def _precision(stages: StageMesh) -> torch.dtype:
    """Of a norm over ``stages``: one for all ranks, whose gradients may be of different ones, so that they scale alike."""
    engines = (engine for engine in staged_engines() if engine.stages is not None and engine.stages.pipe is stages.pipe)
    kinds = (spec.dtype for engine in engines for spec in engine.specs.values() if spec.dtype.is_floating_point)
    return functools.reduce(torch.promote_types, kinds, torch.float32)


def _joined(norms: Sequence[torch.Tensor], norm_type: float) -> torch.Tensor | None:
    """Of norms of parts that of all; None of none. torch's 0-norm of gradients is how many of them are not zero."""
    if len(norms) < 2:
        return norms[0] if norms else None
    return _norm_of_norms(torch.stack([norm.to(norms[0]) for norm in norms]), norm_type)


def _norm_of_norms(norms: torch.Tensor, norm_type: float) -> torch.Tensor:
    return norms.sum() if norm_type == 0 else torch.linalg.vector_norm(norms, norm_type)


def _counted_elsewhere() -> frozenset[int]:
    """Where the gradients of tied parameters lie that another stage's rank speaks for: each counts once."""
    params = (
        spec.param()
        for engine in staged_engines()
        for spec in engine.specs.values()
        if spec.tied_axis is not None and not spec.counts_here
    )
    grads = (param.grad for param in params if param is not None)
    return frozenset(_place(grad) for grad in grads if isinstance(grad, DTensor) and grad.to_local().numel())


def _place(grad: DTensor) -> int:
    return grad.to_local().data_ptr()


def _by_mesh(tensors: Iterable[torch.Tensor]) -> dict[Any, list[torch.Tensor]]:
    found: dict[Any, list[torch.Tensor]] = {}
    for tensor in tensors:
        found.setdefault(tensor.device_mesh if isinstance(tensor, DTensor) else None, []).append(tensor)
    return found


def _refuse_nonfinite(total: torch.Tensor, norm_type: float) -> None:
    if not torch.isfinite(total):
        raise RuntimeError(
            f"the {norm_type}-norm of the gradients is {total.item()}: they cannot be clipped. Look for a loss that is not "
            "finite, or scale by it all the same with error_if_nonfinite=False."
        )


def _whole(norm: torch.Tensor) -> torch.Tensor:
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
