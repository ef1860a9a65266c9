"""The ways to train one model on several ranks, each wrapped as its own documentation says."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh


@dataclass
class Training:
    """A wrapped model: ``forward(x, y)`` gives the loss. DeepSpeed replaces ``backward`` and ``step`` by its engine's."""

    forward: Callable[..., torch.Tensor]
    model: nn.Module
    optimizer: torch.optim.Optimizer

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """The same for all; built after the wrapping, as FSDP2 asks (dspass exchanges the parameters at its first call)."""
    return torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)


def _dspass(
    stage: int,
    *passes: str,
    node: int = 1,
    experts: dict[str, Any] | None = None,
    batch_parts: int | None = None,
    **quantise: str | None,
) -> Callable[[nn.Module, str], Training]:
    def wrap(model: nn.Module, device: str) -> Training:
        import dspass  # noqa: F401  (registers the backend from a checkout)

        options: dict[str, Any] = {"zero_optimization": {"stage": stage, "zero_hpz_partition_size": node}}
        if experts is not None:
            options["expert_parallel"] = {"enabled": True, **experts}
        if passes:
            options["dspass"] = {"passes": list(passes)}
        if quantise:
            options["dspass"] = {"quantise": quantise}
        if batch_parts is not None:
            options["dspass"] = {"experts": {"batch_parts": batch_parts}}
        return Training(torch.compile(model, backend="deepspeed", options=options), model, adamw(model))

    return wrap


def _inductor(model: nn.Module, device: str) -> Training:
    return Training(torch.compile(model), model, adamw(model))


def _ddp_inductor(model: nn.Module, device: str) -> Training:
    wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    return Training(torch.compile(wrapped), wrapped, adamw(model))


def _fsdp2(compiled: bool, all_to_all: bool = False, whole: bool = True) -> Callable[[nn.Module, str], Training]:
    def wrap(model: Any, device: str) -> Training:
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device, (dist.get_world_size(),))
        for block in model.blocks:
            if compiled:
                block.compile(fullgraph=whole)
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
        fully_shard(model, mesh=mesh, reshard_after_forward=True)
        if all_to_all:
            for part in (*model.blocks, model):
                part.set_custom_reduce_scatter(_all_to_all_reduce_scatter())
        return Training(model, model, adamw(model))

    return wrap


def _all_to_all_reduce_scatter() -> Any:
    """gloo's own reduce-scatter is an all-reduce and sends twice as much; this one is fair to FSDP2 beside dspass's."""
    from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter

    class AllToAll(ReduceScatter):
        def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
            return torch.empty(*size, dtype=dtype, device=device)

        def __call__(
            self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, op: Any, async_op: bool = False
        ) -> None:
            ranks = dist.get_world_size(group)
            received = torch.empty_like(input_tensor)
            dist.all_to_all_single(received, input_tensor, group=group)
            torch.sum(received.view(ranks, -1), 0, out=output_tensor.view(-1))
            if op == dist.ReduceOp.AVG:
                output_tensor.div_(ranks)
            elif op != dist.ReduceOp.SUM:
                raise NotImplementedError(f"reduce-scatter by all-to-all knows SUM and AVG, not {op}")

    return AllToAll()


def _deepspeed(compiled: bool, experts: bool = False) -> Callable[[nn.Module, str], Training]:
    def wrap(model: Any, device: str) -> Training:
        import deepspeed

        bucket = 5_000_000  # elements; the default, 5e8, alone keeps a buffer of 2 GB
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,  # for its own throughput line only: we feed the batches
            "gradient_clipping": 0.0,  # its default is 1.0, and nobody else clips here
            "zero_optimization": {
                "stage": 3,
                "reduce_bucket_size": bucket,
                "stage3_prefetch_bucket_size": bucket,
                "stage3_param_persistence_threshold": 0,
                "stage3_max_live_parameters": bucket,
                "stage3_max_reuse_distance": 0,  # gather again for the backward, as all others do
            },
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
        }
        if experts:
            config["expert_parallel"] = {
                "enabled": True,
                "autoep_size": dist.get_world_size(),
                "preset_model": model.config.model_type,
            }
        engine, *_ = deepspeed.initialize(model=model, optimizer=adamw(model), config=config)
        if compiled:
            engine.compile()

        class Engine(Training):
            def backward(self, loss: torch.Tensor) -> None:
                engine.backward(loss)

            def step(self) -> None:
                engine.step()

        return Engine(engine, model, engine.optimizer.optimizer)

    return wrap


@dataclass(frozen=True)
class Subject:
    """``how`` is printed; a subject that is not ``usual`` runs where ``--only`` or its own option asks for it."""

    wrap: Callable[[nn.Module, str], Training]
    how: str
    usual: bool = True


_FSDP2 = "fully_shard(reshard_after_forward=True) on each block and the root"
_A2A = "; reduce-scatter by all-to-all (set_custom_reduce_scatter)"
_DS = (
    "deepspeed.initialize(AdamW(fused=True)), stage 3, buckets and live parameters of 5e6 elements, "
    "stage3_param_persistence_threshold 0, stage3_max_reuse_distance 0"
)

#: Formats of gathers and of reductions, and the ranks of a node that hold a second shard.
QUANTISED: dict[str, tuple[str | None, str | None, int]] = {
    "dspass-3-qwz": ("int8", None, 1),
    "dspass-3-qgz": (None, "int4", 1),
    "dspass-3-qwz-qgz": ("int8", "int4", 1),
    "dspass-3-hpz": (None, None, 2),
    "dspass-3-qwz-qgz-hpz": ("int8", "int4", 2),
}

SUBJECTS: dict[str, Subject] = {
    "inductor": Subject(
        _inductor, "torch.compile(model) in as many processes, without a group: for the compile time only, no turns"
    ),
    "ddp-inductor": Subject(
        _ddp_inductor, "torch.compile(DistributedDataParallel(model, gradient_as_bucket_view=True))"
    ),
    "fsdp2": Subject(_fsdp2(False), f"{_FSDP2}; eager"),
    "fsdp2-compile": Subject(_fsdp2(True), f"block.compile(fullgraph=True), then {_FSDP2}"),
    **{
        f"dspass-{stage}": Subject(
            _dspass(stage),
            f'torch.compile(model, backend="deepspeed", options={{"zero_optimization": {{"stage": {stage}}}}})',
        )
        for stage in range(4)
    },
    "dspass-3-mkl": Subject(
        _dspass(3, "...", "-onednn_products"),
        'as dspass-3, with "dspass": {"passes": ["...", "-onednn_products"]}: products by MKL, as the peers have them',
        usual=False,
    ),
    **{
        name: Subject(
            _dspass(3, weights=weights, gradients=gradients, node=node),
            f'as dspass-3, with "zero_hpz_partition_size": {node} and "dspass": {{"quantise": {{"weights": '
            f'{json.dumps(weights)}, "gradients": {json.dumps(gradients)}}}}}',
            usual=False,
        )
        for name, (weights, gradients, node) in QUANTISED.items()
    },
    "dspass-3-experts": Subject(
        _dspass(3, experts={}), 'as dspass-3, with "expert_parallel": {"enabled": true}', usual=False
    ),
    "dspass-3-experts-parts": Subject(
        _dspass(3, experts={}, batch_parts=2),
        'as dspass-3-experts, with "dspass": {"experts": {"batch_parts": 2}}: halves of the batch take turns',
        usual=False,
    ),
    "dspass-3-products": Subject(
        _dspass(3, experts={"autoep_size": 1}),
        'as dspass-3, with "expert_parallel": {"enabled": true, "autoep_size": 1}: every rank gathers all experts for its own '
        "tokens; the products are dspass's, as where experts are divided",
        usual=False,
    ),
    "fsdp2-compile-parts": Subject(
        _fsdp2(True, whole=False),
        f"block.compile(), in parts where a module has a hook that Dynamo cannot trace, then {_FSDP2}",
        usual=False,
    ),
    "fsdp2-a2a": Subject(_fsdp2(False, True), f"{_FSDP2}; eager{_A2A}", usual=False),
    "fsdp2-compile-a2a": Subject(
        _fsdp2(True, True), f"block.compile(fullgraph=True), then {_FSDP2}{_A2A}", usual=False
    ),
    "deepspeed-zero3": Subject(_deepspeed(False), f"{_DS}; eager", usual=False),
    "deepspeed-zero3-compile": Subject(_deepspeed(True), f"{_DS}; engine.compile()", usual=False),
    "deepspeed-autoep": Subject(
        _deepspeed(False, experts=True),
        f'{_DS}; "expert_parallel": {{"enabled": true, "autoep_size": ranks, "preset_model": the model\'s type}}; eager',
        usual=False,
    ),
}

REFERENCES = ("ddp-inductor", "fsdp2", "fsdp2-compile")
"""Kept alive for all turns where not all subjects fit into memory at once."""
