"""``python -m dspass calibrate``: how fast the device that is here really is, measured and stored for the planner.

Each figure is that of the code which a step runs: products as torch calls them, attention forward and backward, and generated
kernels from Inductor, which write into memory that exists. Of several runs at several times the median counts. Under
``torchrun`` all-gathers over the group are measured, too.

On a CPU everything is measured with as many threads as torch has now: set ``OMP_NUM_THREADS`` as the training will have it. The
ranks of a machine share its memory and caches, and so a core beside a busy one is slower than alone. So a calibration is of a
number of ranks, which measure the same figure at the same time, as they run the same step; each figure is their mean. Dropped:
one factor for a busy neighbour: what is bound by memory shares it, and what is bound by a core's arithmetic does not.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm

from dspass.passes import devices
from dspass.passes.calibration import Calibration, Curve, folder
from dspass.runtime import linear
from dspass.runtime.axis import Axis
from dspass.runtime.transport import transport_for

#: Dimension of an attention's head.
_HEAD = 64

#: Elements that functions and reductions work on, and those of a row.
_ELEMENTS, _WIDTH = 2**19, 512

#: Bytes that generated kernels work on in turn: more than a cache holds, as in a step.
_COLD = 2**26

#: Functions that are measured by what they take beyond an addition, by the name of their operator.
_FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "exp": torch.exp,
    "erf": torch.erf,
    "log": torch.log,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "sin": torch.sin,
    "cos": torch.cos,
    "rsqrt": torch.rsqrt,
    "sqrt": torch.sqrt,
    "div": lambda x: 1.5 / x,
}

#: Reductions, by what they take beyond reading.
_REDUCTIONS: dict[str, Callable[[torch.Tensor, int], Any]] = {
    "sum": lambda x, dim: x.sum(dim),
    "mean": lambda x, dim: x.mean(dim),
    "amax": lambda x, dim: x.amax(dim),
    "var_mean": lambda x, dim: torch.var_mean(x, dim, correction=0)[0],
}

#: Of a figure, each time that it is measured: seconds for which it runs, and how often it does at least.
_PATIENCE, _RUNS = 0.05, 5

#: Bytes of a rank's share of the all-gathers that are measured.
_GATHERS = (1 << 10, 1 << 16, 1 << 20, 1 << 22, 1 << 24)


@dataclass(frozen=True)
class Amounts:
    """What is measured: sizes of square products, tokens of an attention, bytes that a generated kernel moves, and names of
    functions and reductions; and how often all of that is."""

    squares: tuple[int, ...] = (32, 64, 128, 256, 384, 512, 768, 1024, 1536)
    tokens: tuple[int, ...] = (32, 64, 128, 256, 512, 1024)
    moved: tuple[int, ...] = tuple(3 * 4**i for i in range(6, 13))
    functions: tuple[str, ...] = tuple(_FUNCTIONS)
    reductions: tuple[str, ...] = tuple(_REDUCTIONS)
    sweeps: int = 3


AMOUNTS = Amounts()


def calibrate(ranks: int = 1, amounts: Amounts = AMOUNTS) -> Calibration:
    """Measure the device that is here. Takes about a minute, most of it to compile; shows a progress bar.

    Args:
        ranks: processes of this CPU that measure beside each other, and all-gathers between them; 1: this one alone. Where
            ``torchrun`` has started this process, its ranks do, and this is not read.

    Raises:
        RuntimeError: the processes failed.
    """
    if ranks > 1 and "RANK" not in os.environ and not torch.cuda.is_available():
        return _by_processes(ranks, amounts)
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if "RANK" not in os.environ or dist.is_initialized():
        return _measured(kind, amounts)
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        return _measured(kind, amounts)
    finally:
        dist.destroy_process_group()


def _measured(kind: str, amounts: Amounts) -> Calibration:
    """By the ranks of the group, if there is one."""
    figures = list(_figures(kind, amounts))
    found: dict[tuple[str, float], list[float]] = {}
    title = f"calibrate, {dist.get_world_size()} ranks" if dist.is_initialized() else "calibrate"
    with tqdm(total=amounts.sweeps * len(figures), desc=title, unit="figure", ncols=100, disable=_rank() > 0) as bar:
        for _ in range(amounts.sweeps):  # a machine that others use is slow for a while: each figure at several times
            for name, amount, measured in figures:
                found.setdefault((name, amount), []).append(_of_all(measured, kind))
                bar.update()
    curves: dict[str, dict[float, float]] = {}
    functions: dict[str, float] = {}
    for (name, amount), seconds in found.items():
        if amount:
            curves.setdefault(name, {})[amount] = statistics.median(seconds)
        else:
            functions[name] = statistics.median(seconds)
    group, latency, link = _links(kind) if dist.is_initialized() else (0, 0.0, 0.0)
    return Calibration(
        kind=kind,
        product=devices.product_of(kind),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        made=time.strftime("%Y-%m-%d"),
        curves={name: Curve.through(points) for name, points in curves.items()},
        functions=functions,
        host_link=_of_all(partial(_host_link, kind), kind),
        fresh=_of_all(partial(_fresh, kind), kind),
        latency=latency,
        link=link,
        ranks=group,
    )


def _of_all(measured: Callable[[], float], kind: str) -> float:
    """The mean over the ranks, which measure at the same time."""
    if not dist.is_initialized():
        return measured()
    dist.barrier()
    mine = torch.tensor(measured(), dtype=torch.float64, device=kind)
    dist.all_reduce(mine)
    return float(mine) / dist.get_world_size()


def _by_processes(ranks: int, amounts: Amounts) -> Calibration:
    """What ``ranks`` new processes measure."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    with tempfile.TemporaryDirectory() as there:
        try:
            subprocess.run(
                [*command, "dspass.calibrate", json.dumps(asdict(amounts)), there],
                stderr=None if sys.stderr.isatty() else subprocess.PIPE,  # its progress bar
                text=True,
                timeout=600,
                check=True,
                env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
            )
        except (subprocess.SubprocessError, OSError) as error:
            told = getattr(error, "stderr", "") or ""
            raise RuntimeError(
                f"{ranks} processes could not measure this CPU: {error}. Measure one alone: --ranks 1. {told[-400:]}"
            ) from error
        (path,) = Path(there).iterdir()
        return Calibration.load(path)


def _figures(kind: str, amounts: Amounts) -> Iterator[tuple[str, float, Callable[[], float]]]:
    """What is measured: a curve's name and an amount of work, or a function's name and 0; and how."""
    dtypes = devices.DTYPES if kind == "cuda" else (torch.float32,)
    larger = 8 if kind == "cuda" else 1
    for dtype in dtypes:
        for size in amounts.squares:
            size *= larger
            yield f"product {devices.text_of(dtype)}", 2.0 * size**3, partial(_product, size, dtype, kind)
            if kind == "cpu" and linear.pays():
                yield f"linear {devices.text_of(dtype)}", 2.0 * size**3, partial(_linear, size, dtype)
        for tokens in amounts.tokens:
            heads = max(4096 * larger // tokens, 4)
            for backward in (False, True):
                name = "attention backward" if backward else "attention"
                operations = (5 if backward else 2) * 2.0 * tokens**2 * _HEAD

                yield (
                    f"{name} {devices.text_of(dtype)}",
                    operations,
                    partial(_attention, tokens, heads, dtype, kind, backward),
                )
    for count in amounts.moved:
        yield "generated", float(count * larger), partial(_moving, count * larger, kind)
    for name in amounts.functions:
        yield name, 0.0, partial(_function, _FUNCTIONS[name], kind)
    for name in amounts.reductions:
        for direction, dim in (("rows", 1), ("columns", 0)):
            yield f"{name} {direction}", 0.0, partial(_reduction, _REDUCTIONS[name], dim, kind)


def _seconds(work: Callable[[], object], kind: str) -> float:
    """The median time of ``work``; on a GPU, of as many as keep it busy."""
    if kind == "cuda":
        return _seconds_on_gpu(work)
    times: list[float] = []
    for _ in range(2):
        work()
    began = time.perf_counter()
    while len(times) < _RUNS or time.perf_counter() - began < _PATIENCE:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _seconds_on_gpu(work: Callable[[], object], calls: int = 20) -> float:
    times = []
    for _ in range(_RUNS):
        work()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / calls)
    return statistics.median(times)


def _used_a_while_ago(size: int, dtype: torch.dtype, kind: str) -> Iterator[list[torch.Tensor]]:
    """Three square matrices, always others until a cache has been filled: a step's product finds its operands in memory."""
    count = max(1, _COLD // (3 * size * size * dtype.itemsize)) if kind == "cpu" else 1
    count = min(count, 64)
    return itertools.cycle(
        [[torch.randn(size, size, dtype=dtype, device=kind) for _ in range(3)] for _ in range(count)]
    )


def _product(size: int, dtype: torch.dtype, kind: str) -> float:
    sets = _used_a_while_ago(size, dtype, kind)

    def work() -> None:
        a, b, out = next(sets)
        torch.mm(a, b, out=out)

    return _seconds(work, kind)


def _linear(size: int, dtype: torch.dtype) -> float:
    sets = _used_a_while_ago(size, dtype, "cpu")

    def work() -> None:
        a, b, _ = next(sets)
        linear.LINEAR(a, b, None)

    return _seconds(work, "cpu")


def _fresh(kind: str) -> float:
    """Seconds a byte that memory costs which an allocator took anew from the operating system, on the average of what a step
    holds at its peak; a GPU's allocator keeps what it has."""
    if kind != "cpu":
        return 0.0
    count, size = 32, 2**20  # of 4 MB

    def held() -> None:
        _ = [torch.empty(size).fill_(1.0) for _ in range(count)]

    there = [torch.ones(size) for _ in range(count)]

    def again() -> None:
        for tensor in there:
            tensor.fill_(1.0)

    return max(_seconds(held, kind) - _seconds(again, kind), 0.0) / (4 * size * count)


def _attention(tokens: int, heads: int, dtype: torch.dtype, kind: str, backward: bool) -> float:
    """Of one head among as many as keep all cores busy."""
    q, k, v = (torch.randn(1, heads, tokens, _HEAD, dtype=dtype, device=kind, requires_grad=backward) for _ in range(3))
    if not backward:
        return _seconds(lambda: scaled_dot_product_attention(q, k, v, is_causal=True), kind) / heads
    out = scaled_dot_product_attention(q, k, v, is_causal=True)
    gradient = torch.ones_like(out)
    return _seconds(lambda: torch.autograd.grad(out, (q, k, v), gradient, retain_graph=True), kind) / heads


def _compiled(work: Callable[..., object]) -> Callable[..., object]:
    torch._dynamo.reset()
    return torch.no_grad()(torch.compile(work, backend="inductor", dynamic=False, fullgraph=True))


def _moving(count: int, kind: str) -> float:
    """One kernel that reads two tensors and writes a third, ``count`` bytes together, which were used a while ago.

    A call of compiled code costs more than a small kernel: several run in one call, on tensors of their own.
    """
    several = max(1, min(16, _COLD // count))
    sets = [[torch.ones(count // 12, device=kind) for _ in range(3)] for _ in range(max(several, _COLD // count))]

    def work(*tensors: torch.Tensor) -> None:
        for a, b, out in zip(tensors[::3], tensors[1::3], tensors[2::3], strict=True):
            out.copy_(a + b)

    calls = itertools.cycle([[t for one in sets[i : i + several] for t in one] for i in range(0, len(sets), several)])
    compiled = _compiled(work)
    empty = _compiled(lambda x: x.add_(1))
    one = torch.ones(1, device=kind)
    overhead = _seconds(lambda: empty(one), kind)
    return max(_seconds(lambda: compiled(*next(calls)), kind) - overhead, 1e-9) / several


def _function(function: Callable[[torch.Tensor], torch.Tensor], kind: str) -> float:
    x, out = (torch.full((_ELEMENTS,), 0.5, device=kind) for _ in range(2))
    compiled = _compiled(lambda x, out: out.copy_(function(x)))
    with_it = _seconds(lambda: compiled(x, out), kind)
    added = _compiled(lambda x, out: out.copy_(x + 1.5))
    return max(with_it - _seconds(lambda: added(x, out), kind), 0.0) / _ELEMENTS


def _reduction(reduction: Callable[[torch.Tensor, int], Any], dim: int, kind: str) -> float:
    x = torch.ones(_ELEMENTS // _WIDTH, _WIDTH, device=kind)
    out = torch.ones(_ELEMENTS // x.shape[dim], device=kind)
    compiled = _compiled(lambda x, out: out.copy_(reduction(x, dim)))
    took = _seconds(lambda: compiled(x, out), kind)
    doubled = _compiled(lambda x: x.mul_(1.0001))  # reads as much, and writes it where it was
    return max(took - _seconds(lambda: doubled(x), kind), 0.0) / _ELEMENTS


def _host_link(kind: str) -> float:
    """Bytes a second between the device and main memory; on a CPU those of a copy."""
    there = torch.empty(2**26, dtype=torch.uint8, pin_memory=kind == "cuda")
    here = torch.empty(2**26, dtype=torch.uint8, device=kind)
    return float(there.nbytes / _seconds(lambda: here.copy_(there, non_blocking=True), kind))


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def _links(kind: str) -> tuple[int, float, float]:
    """Ranks of the group, seconds that an all-gather takes however small it is, and bytes a second that one rank receives."""
    group = dist.group.WORLD
    assert group is not None
    axis = Axis.of("data", group)
    transport, size = transport_for(axis), axis.size
    points: dict[float, float] = {}
    for count in _GATHERS:
        mine = torch.ones(count, dtype=torch.uint8, device=kind)
        times = []
        for _ in range(_RUNS):
            dist.barrier()
            start = time.perf_counter()
            transport.all_gather(axis, [mine], [count * size]).wait()
            if kind == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        slowest = torch.tensor(statistics.median(times), dtype=torch.float64, device=kind)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        points[count * (size - 1)] = float(slowest)
    return size, *_line(points)


def _line(points: dict[float, float]) -> tuple[float, float]:
    """Latency and rate through the smallest and largest amounts (Hockney's two parameters)."""
    (few, soon), (much, late) = min(points.items()), max(points.items())
    rate = (much - few) / max(late - soon, 1e-12)
    return max(soon - few / rate, 1e-9), rate


def main(ranks: int | None) -> None:
    """The command: measure, store, and say what was found; of a CPU, unless told otherwise, one rank and two."""
    alone = "RANK" not in os.environ and not torch.cuda.is_available()
    for count in (1, 2) if ranks is None and alone else (ranks or 1,):
        began = time.perf_counter()
        found = calibrate(count, AMOUNTS)
        if _rank() == 0:
            path = found.save(folder())
            print(_text(found))
            print(f"written in {time.perf_counter() - began:.0f} s: {path}")


def _text(found: Calibration) -> str:
    beside = f", {found.ranks} ranks" if found.ranks else ""
    lines = [f"{found.product}, {found.threads} threads{beside}, torch {found.torch}"]
    for name, curve in found.curves.items():
        unit = "GB/s" if name == "generated" else "GFLOP/s"
        rates = [a / t / 1e9 for a, t in zip(curve.amounts, curve.times, strict=True)]
        lines.append(f"  {name:<28} {rates[-1]:9.1f} {unit} of the largest, {max(rates):.1f} at best")
    for name, seconds in found.functions.items():
        lines.append(f"  {name:<28} {seconds * 1e9:9.3f} ns an element more than moving it")
    lines.append(f"  {'host link':<28} {found.host_link / 1e9:9.1f} GB/s")
    if found.fresh:
        held = "memory that is held"
        lines.append(f"  {held:<28} {found.fresh * 1e9:9.3f} ns a byte: the allocator takes it anew in each step")
    if found.ranks:
        gather = f"all-gather, {found.ranks} ranks"
        lines.append(f"  {gather:<28} {found.link / 1e9:9.2f} GB/s, {found.latency * 1e6:.0f} us at least")
    elif found.kind != "cpu":
        lines.append("  all-gathers were not measured: start it with torchrun for that; the table's figures stand")
    return "\n".join(lines)


if __name__ == "__main__":
    if "RANK" not in os.environ:
        raise SystemExit("started by python -m dspass calibrate")
    _made = calibrate(amounts=Amounts(**json.loads(sys.argv[1])))
    if _rank() == 0:
        _made.save(Path(sys.argv[2]))
