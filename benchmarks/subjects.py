"""The ways to train one model on several ranks, each wrapped as its own documentation says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

Wrapped = Callable[..., torch.Tensor]


def _dspass(stage: int) -> Callable[[nn.Module, str], Wrapped]:
    def wrap(model: nn.Module, device: str) -> Wrapped:
        import dspass  # noqa: F401  (registers the backend from a checkout)

        return torch.compile(model, backend="deepspeed", options={"zero_optimization": {"stage": stage}})

    return wrap


def _inductor(model: nn.Module, device: str) -> Wrapped:
    return torch.compile(model)


def _ddp_inductor(model: nn.Module, device: str) -> Wrapped:
    return torch.compile(nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True))


def _fsdp2(compiled: bool) -> Callable[[nn.Module, str], Wrapped]:
    def wrap(model: Any, device: str) -> Wrapped:
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device, (dist.get_world_size(),))
        for block in model.blocks:
            if compiled:
                block.compile(fullgraph=True)
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model

    return wrap


SUBJECTS: dict[str, tuple[Callable[[nn.Module, str], Wrapped], str]] = {
    "inductor": (_inductor, "one process, torch.compile(model); the reference for compile time"),
    "ddp-inductor": (_ddp_inductor, "torch.compile(DistributedDataParallel(model, gradient_as_bucket_view=True))"),
    "fsdp2": (_fsdp2(False), "fully_shard on each block and the root, eager"),
    "fsdp2-compile": (_fsdp2(True), "block.compile(fullgraph=True), then fully_shard on each block and the root"),
    "dspass-0": (_dspass(0), "torch.compile(model, backend='deepspeed'), stage 0"),
    "dspass-1": (_dspass(1), "torch.compile(model, backend='deepspeed'), stage 1"),
    "dspass-2": (_dspass(2), "torch.compile(model, backend='deepspeed'), stage 2"),
    "dspass-3": (_dspass(3), "torch.compile(model, backend='deepspeed'), stage 3"),
}
