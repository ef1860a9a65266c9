"""Processes that hold one subject each and run steps when told, so that subjects can take turns within one minute.

All groups stay alive; one steps while the others wait on a pipe and use no CPU. What drifts on a shared machine then drifts
for all of them, and the ratio of two subjects' steps of one round is a fair one.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import socket
import tempfile
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch


class SubjectFailed(RuntimeError):
    """A rank of a subject raised, died, or did not answer in time."""


class Group:
    """The ranks of one subject."""

    def __init__(self, subject: str, ranks: int, settings: dict[str, Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self.subject = subject
        self.cache = tempfile.mkdtemp(prefix="dspass-bench-")  # cold for each subject, shared by its ranks
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, subject, rank, ranks, port, self.cache, settings), daemon=True
            )
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def ask(self, request: str, *args: Any, timeout: float = 600) -> list[Any]:
        """One answer of each rank; raises :class:`SubjectFailed`."""
        for pipe in self.pipes:
            pipe.send((request, args))
        answers = []
        deadline = time.monotonic() + timeout
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(max(deadline - time.monotonic(), 0.1)):
                raise SubjectFailed(f"{self.subject}: rank {rank} did not answer {request!r} within {timeout:.0f} s")
            try:
                good, answer = pipe.recv()
            except EOFError:
                raise SubjectFailed(f"{self.subject}: rank {rank} died in {request!r}") from None
            if not good:
                raise SubjectFailed(f"{self.subject}: rank {rank} failed in {request!r}:\n{answer}")
            answers.append(answer)
        return answers

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join(10)
        shutil.rmtree(self.cache, ignore_errors=True)


def _serve(
    pipe: Connection, subject: str, rank: int, ranks: int, port: int, cache: str, settings: dict[str, Any]
) -> None:
    os.environ |= {
        "TORCHINDUCTOR_CACHE_DIR": cache,
        "OMP_NUM_THREADS": "1",
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "KINETO_LOG_LEVEL": "99",
    }
    try:
        subject_here = Subject(subject, rank, ranks, port, settings)
    except BaseException:
        pipe.recv()
        pipe.send((False, traceback.format_exc()))
        return
    while True:
        try:
            request, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, getattr(subject_here, request)(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


class Subject:
    """One rank of one subject. Every public method is a request."""

    def __init__(self, name: str, rank: int, ranks: int, port: int, settings: dict[str, Any]) -> None:
        import torch.distributed as dist

        from benchmarks.subjects import SUBJECTS
        from examples.gpt import GPT, PRESETS, batches, text_corpus

        cores = os.cpu_count() or 1
        self.device = settings["device"]
        if self.device == "cpu":
            if ranks <= cores:
                os.sched_setaffinity(0, {rank % cores})
            torch.set_num_threads(1)
        else:
            torch.cuda.set_device(rank % torch.cuda.device_count())
        if ranks > 1:
            dist.init_process_group(
                "gloo" if self.device == "cpu" else "nccl",
                init_method=f"tcp://127.0.0.1:{port}",
                rank=rank,
                world_size=ranks,
                timeout=timedelta(seconds=300),
            )
        self.name, self.rank = name, rank
        self.batches = batches(text_corpus(), settings["batch"], settings["context"], seed=0, rank=rank)
        torch.manual_seed(0)
        self.model = GPT(PRESETS[settings["preset"]]).to(self.device)
        self.call = SUBJECTS[name][0](self.model, self.device)
        # After the wrapping, as FSDP2 asks; dspass exchanges the parameters at its first call.
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4, fused=True)

    def steps(self, count: int) -> tuple[float, list[float]]:
        """Seconds a step and the losses of ``count`` whole optimiser steps."""
        losses = []
        begin = time.perf_counter()
        for _ in range(count):
            x, y = next(self.batches)
            loss = self.call(x.to(self.device), y.to(self.device))
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.detach())
        values = [loss.item() for loss in losses]  # waits for a GPU as well
        return (time.perf_counter() - begin) / count, values

    def persistent(self) -> dict[str, int]:
        """Bytes of shards, of their gradients (as large as the trained shards) and of the optimiser's states."""

        def local(tensor: torch.Tensor) -> int:
            tensor = getattr(tensor, "_local_tensor", tensor)
            return tensor.numel() * tensor.element_size()

        params = sum(local(p) for p in self.model.parameters())
        states = sum(local(v) for s in self.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor))
        return {"parameters": params, "gradients": params, "optimizer": states}

    def peak(self, count: int) -> int:
        """The allocator's peak in bytes over ``count`` steps."""
        if self.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
            self.steps(count)
            return torch.cuda.max_memory_allocated()
        kept = self.persistent()
        total = top = kept["parameters"] + kept["optimizer"]  # gradients are None between steps
        events = self._profiled(count, profile_memory=True)
        for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
            total += size
            top = max(top, total)
        return top

    def collectives(self, count: int) -> dict[str, tuple[float, float]]:
        """Calls and logical bytes a step by kind, from the profiler's record of c10d operators or dspass's own counters."""
        if self.name.startswith("dspass"):
            from dspass.engines import engine_of

            engine = engine_of(self.model)
            assert engine is not None
            found: dict[str, tuple[float, float]] = {}
            for (kind, *_), (calls, sent, _) in engine.traffic.last.items():
                before = found.get(kind, (0.0, 0.0))
                found[kind] = (before[0] + calls, before[1] + sent)
            return found
        ranks = int(os.environ["WORLD_SIZE"])
        share = (ranks - 1) / ranks
        kinds = {
            "c10d::_allgather_base_": ("all-gather", 0, share),
            "c10d::allreduce_": ("all-reduce", 0, 2 * share),
            "c10d::_reduce_scatter_base_": ("reduce-scatter", 1, share),
        }
        totals: dict[str, list[float]] = {}
        for event in self._profiled(count, record_shapes=True):
            if event.name() in kinds:
                kind, which, factor = kinds[event.name()]
                shapes = event.shapes()
                size = _elements(shapes[which]) * 4
                entry = totals.setdefault(kind, [0.0, 0.0])
                entry[0] += 1 / count
                entry[1] += size * factor / count
        return {k: (v[0], v[1]) for k, v in totals.items()}

    def interface_bytes(self, count: int) -> float:
        """Bytes that the loopback interface sent a step, for all ranks together."""
        before = _loopback()
        self.steps(count)
        return (_loopback() - before) / count

    def _profiled(self, count: int, **options: Any) -> list[Any]:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], **options) as profiler:
            self.steps(count)
        return list(profiler.profiler.kineto_results.events())  # type: ignore[union-attr]


def _elements(shape: Any) -> int:
    """Elements of one recorded argument; a list of tensors is recorded as a list of shapes."""
    if shape and isinstance(shape[0], (list, tuple)):
        return sum(_elements(s) for s in shape)
    count = 1
    for size in shape:
        count *= size
    return count if shape else 0


def _loopback() -> int:
    for line in Path("/proc/net/dev").read_text().splitlines():
        if line.strip().startswith("lo:"):
            return int(line.split(":")[1].split()[8])
    return 0
