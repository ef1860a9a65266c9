"""What a step takes, counted in the process that runs it: the allocator's peak, collectives and their bytes.

CPU peak: the running sum of the profiler's memory events, plus the bytes alive at the start, which are the distinct storages
of every tensor that Python knows (parameters, gradients, optimiser states, staging that is kept) and DDP's buckets, which live
in C++. A block that was allocated before and freed within is not reported by the profiler, so the watched steps are two: in
the second everything that comes and goes is known.

Logical bytes of one rank, as a ring sends them, B being the whole buffer: all-gather, reduce-scatter, all-to-all
``B (N-1)/N``, all-reduce ``2 B (N-1)/N``, broadcast ``B (N-1)/N`` on average. What gloo really sends is read at the interface.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

_WHOLE = {  # operator: (kind, the recorded argument that is the whole buffer, or None for the transport's own record)
    "c10d::_allgather_base_": ("all-gather", 0),
    "c10d::_reduce_scatter_base_": ("reduce-scatter", 1),
    "c10d::alltoall_base_": ("all-to-all", 0),
    "c10d::allreduce_": ("all-reduce", None),
    "c10d::broadcast_": ("broadcast", None),
    "c10d::allgather_": ("all-gather", None),
    "c10d::allgather_into_tensor_coalesced_": ("all-gather", None),
    "c10d::reduce_scatter_": ("reduce-scatter", None),
    "c10d::reduce_scatter_tensor_coalesced_": ("reduce-scatter", None),
    "c10d::allreduce_coalesced_": ("all-reduce", None),
}
_ITEM = {"float": 4, "double": 8, "long int": 8, "int": 4, "c10::BFloat16": 2, "c10::Half": 2, "bool": 1}


def persistent(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of shards, of their gradients (as large as the trained shards) and of the optimiser's states."""

    def local(tensor: Any) -> int:
        tensor = getattr(tensor, "ds_tensor", tensor)  # DeepSpeed leaves an empty parameter and keeps the shard there
        tensor = getattr(tensor, "_local_tensor", tensor)
        return tensor.numel() * tensor.element_size()

    states = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    return {
        "parameters": sum(local(p) for p in model.parameters()),
        "gradients": sum(local(p) for p in model.parameters() if p.requires_grad),
        "optimizer": sum(local(v) for v in states),
    }


def watch(
    run: Callable[[], Any], training: Any, device: str, corpus: torch.Tensor, count: int, ranks: int
) -> dict[str, Any]:
    """``{"peak": bytes, "live": bytes at the start, "collectives": {kind: (calls, bytes)} a step}``."""
    os.environ["KINETO_LOG_LEVEL"] = "99"  # its progress lines
    live = 0
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        live = _live(corpus) + _buckets(training.model)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds, profile_memory=device == "cpu", record_shapes=True) as profiler:
        run()
    events = list(profiler.profiler.kineto_results.events())
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else _peak(live, events)
    return {"peak": peak, "live": live, "collectives": _collectives(events, count, ranks)}


def _peak(total: int, events: list[Any]) -> int:
    top = total
    for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        total += size
        top = max(top, total)
    return top


def _live(corpus: torch.Tensor) -> int:
    """Bytes of distinct CPU storages of all tensors that Python knows, but for the text, which no training step holds."""
    gc.collect()
    known = {corpus.untyped_storage().data_ptr()}
    total = 0
    for found in gc.get_objects():
        if not issubclass(type(found), torch.Tensor):
            continue
        tensor = found._local_tensor if isinstance(found, torch.distributed.tensor.DTensor) else found
        if _on_host(tensor):
            continue
        if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.device.type != "cpu":
            continue  # fake and meta tensors hold nothing
        try:
            storage = tensor.untyped_storage()
            pointer, size = storage.data_ptr(), storage.nbytes()
        except (RuntimeError, NotImplementedError):
            continue  # sparse, or a functional wrapper
        if pointer and pointer not in known:
            known.add(pointer)
            total += size
    return total


def _on_host(tensor: torch.Tensor) -> bool:
    """Whether dspass holds it outside of the allocator, which on a CPU stands for a device's memory."""
    if "dspass.runtime.host" not in sys.modules or type(tensor) not in (torch.Tensor, nn.Parameter):
        return False
    return tensor.device.type == "cpu" and sys.modules["dspass.runtime.host"].is_on_host(tensor)


def _buckets(model: nn.Module) -> int:
    """DDP keeps its buckets when the gradients, views of them, are let go."""
    if not isinstance(model, nn.parallel.DistributedDataParallel):
        return 0
    said = model._get_ddp_logging_data()
    return sum(int(size) for size in (said.get("rebuilt_bucket_sizes") or said["bucket_sizes"]).split(","))


def _collectives(events: list[Any], count: int, ranks: int) -> dict[str, tuple[float, float]]:
    """The operators of c10d; a list of tensors is recorded without its sizes, then the transport's next record has them."""
    share = (ranks - 1) / ranks
    totals: dict[str, list[float]] = {}
    waiting: str | None = None
    for event in sorted((e for e in events if e.name().startswith(("c10d::", "gloo:", "nccl:"))), key=_begin):
        if event.name() in _WHOLE:
            kind, which = _WHOLE[event.name()]
            entry = totals.setdefault(kind, [0.0, 0.0])
            entry[0] += 1 / count
            waiting = None if which is not None else kind
            if which is not None:
                entry[1] += _bytes(event, which) * share / count
        elif waiting is not None and not event.name().startswith("c10d::"):
            size = sum(_bytes(event, i) for i in range(len(event.shapes())))
            factor = {"all-reduce": 2 * share, "all-gather": ranks * share}.get(
                waiting, share
            )  # a gather's input is one part
            totals[waiting][1] += size * factor / count
            waiting = None
    return {k: (v[0], v[1]) for k, v in totals.items()}


def _begin(event: Any) -> tuple[int, int]:
    return event.start_ns(), -event.duration_ns()


def _bytes(event: Any, which: int) -> int:
    count = 1
    for size in event.shapes()[which]:
        count *= size
    return count * _ITEM.get(event.dtypes()[which], 4) if event.shapes()[which] else 0


def saved(loss: torch.Tensor, model: nn.Module) -> int | None:
    """Bytes of distinct storages, parameters left out, that a compiled forward saved for its backward."""
    kept = getattr(loss.grad_fn, "saved_tensors", None)
    if kept is None:
        return None
    mine = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept if t is not None}
    return sum(size for pointer, size in sizes.items() if pointer not in mine)


def loopback_bytes() -> int:
    """Bytes that the loopback interface has sent, for all processes of the machine; 0 where /proc does not say."""
    table = Path("/proc/net/dev")
    for line in table.read_text().splitlines() if table.exists() else ():
        if line.strip().startswith("lo:"):
            return int(line.split(":")[1].split()[8])
    return 0
