"""``python -m dspass calibrate``: how fast the device that is here really is, measured and stored for the planner.

Each figure is that of the code which a step runs: products as torch calls them, attention forward and backward, and generated
kernels from Inductor, which write into memory that exists. Of several runs at several times the median counts. Under
``torchrun`` all-gathers over the group are measured, too; alone, two processes of this machine are started for that on a CPU.

On a CPU everything is measured with as many threads as torch has now: set ``OMP_NUM_THREADS`` as the training will have it.
"""

from __future__ import annotations

import itertools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
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

#: Sizes of square products, tokens of an attention, bytes that a generated kernel moves.
_SQUARES = (32, 64, 128, 256, 384, 512, 768, 1024, 1536)
_TOKENS = (32, 64, 128, 256, 512, 1024)
_MOVED = tuple(3 * 4**i for i in range(6, 13))

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

#: How often all figures are measured, seconds for which one is each time, and how many runs there are at least.
_SWEEPS, _PATIENCE, _RUNS = 3, 0.05, 5

#: Bytes of a rank's share of the all-gathers that are measured.
_GATHERS = (1 << 10, 1 << 16, 1 << 20, 1 << 22, 1 << 24)


def calibrate(ranks: int | None = None) -> Calibration:
    """Measure the device that is here. Takes about a minute, most of it to compile; shows a progress bar.

    Args:
        ranks: processes between which all-gathers are measured, where none are started already; 1: not measured.

    Raises:
        RuntimeError: the processes for the all-gathers failed.
    """
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    figures = list(_figures(kind))
    found: dict[tuple[str, float], list[float]] = {}
    with tqdm(total=_SWEEPS * len(figures), desc="calibrate", unit="figure", ncols=100, disable=_rank() > 0) as bar:
        for _ in range(
            _SWEEPS
        ):  # a machine that others use is slow for a while, and each figure is measured at several times
            for name, amount, measured in figures:
                found.setdefault((name, amount), []).append(measured())
                bar.update()
    curves: dict[str, dict[float, float]] = {}
    functions: dict[str, float] = {}
    for (name, amount), seconds in found.items():
        if amount:
            curves.setdefault(name, {})[amount] = statistics.median(seconds)
        else:
            functions[name] = statistics.median(seconds)
    group, latency, link = _links(kind, 2 if ranks is None else ranks)
    return Calibration(
        kind=kind,
        product=devices.product_of(kind),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        made=time.strftime("%Y-%m-%d"),
        curves={name: Curve.through(points) for name, points in curves.items()},
        functions=functions,
        host_link=_host_link(kind),
        fresh=_fresh(kind),
        latency=latency,
        link=link,
        ranks=group,
    )


def _figures(kind: str) -> Iterator[tuple[str, float, Callable[[], float]]]:
    """What is measured: a curve's name and an amount of work, or a function's name and 0; and how."""
    dtypes = devices.DTYPES if kind == "cuda" else (torch.float32,)
    larger = 8 if kind == "cuda" else 1
    for dtype in dtypes:
        for size in _SQUARES:
            size *= larger
            yield f"product {devices.text_of(dtype)}", 2.0 * size**3, partial(_product, size, dtype, kind)
            if kind == "cpu" and linear.pays():
                yield f"linear {devices.text_of(dtype)}", 2.0 * size**3, partial(_linear, size, dtype)
        for tokens in _TOKENS:
            heads = max(4096 * larger // tokens, 4)
            for backward in (False, True):
                name = "attention backward" if backward else "attention"
                operations = (5 if backward else 2) * 2.0 * tokens**2 * _HEAD

                yield (
                    f"{name} {devices.text_of(dtype)}",
                    operations,
                    partial(_attention, tokens, heads, dtype, kind, backward),
                )
    for count in _MOVED:
        yield "generated", float(count * larger), partial(_moving, count * larger, kind)
    for name, function in _FUNCTIONS.items():
        yield name, 0.0, partial(_function, function, kind)
    for name, reduction in _REDUCTIONS.items():
        for direction, dim in (("rows", 1), ("columns", 0)):
            yield f"{name} {direction}", 0.0, partial(_reduction, reduction, dim, kind)


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


def _links(kind: str, ranks: int) -> tuple[int, float, float]:
    """Ranks of the group, seconds that an all-gather takes however small it is, and bytes a second that one rank receives.

    Over the group that is here, or one of ``ranks`` new processes on a CPU; zeros without either.
    """
    if "RANK" in os.environ:
        return _measured_links(kind)
    if kind == "cuda" or ranks < 2:
        return 0, 0.0, 0.0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    try:
        said = subprocess.run(
            [*command, "dspass.calibrate"],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        )
    except (subprocess.SubprocessError, OSError) as error:
        told = getattr(error, "stderr", "") or ""
        raise RuntimeError(
            f"all-gathers between {ranks} processes could not be measured: {error}. Leave them out: --ranks 1. {told[-400:]}"
        ) from error
    latency, link = map(float, said.stdout.split()[-2:])
    return ranks, latency, link


def _measured_links(kind: str) -> tuple[int, float, float]:
    if not dist.is_initialized():
        if kind == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
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
    """The command: measure, store, and say what was found."""
    began = time.perf_counter()
    found = calibrate(ranks)
    if _rank() > 0:
        return
    path = found.save(folder())
    print(f"{found.product}, {found.threads} threads, torch {found.torch}")
    for name, curve in found.curves.items():
        unit = "GB/s" if name == "generated" else "GFLOP/s"
        rates = [a / t / 1e9 for a, t in zip(curve.amounts, curve.times, strict=True)]
        print(f"  {name:<28} {rates[-1]:9.1f} {unit} of the largest, {max(rates):.1f} at best")
    for name, seconds in found.functions.items():
        print(f"  {name:<28} {seconds * 1e9:9.3f} ns an element more than moving it")
    print(f"  {'host link':<28} {found.host_link / 1e9:9.1f} GB/s")
    if found.fresh:
        print(
            f"  {'memory that is held':<28} {found.fresh * 1e9:9.3f} ns a byte: the allocator takes it anew in each step"
        )
    if found.ranks:
        print(
            f"  {f'all-gather, {found.ranks} ranks':<28} {found.link / 1e9:9.2f} GB/s, {found.latency * 1e6:.0f} us at least"
        )
    else:
        print("  all-gathers were not measured: start it with torchrun for that; the table's figures stand")
    print(f"written in {time.perf_counter() - began:.0f} s: {path}")


if __name__ == "__main__":
    if "RANK" not in os.environ:
        raise SystemExit("started by python -m dspass calibrate")
    _, latency, link = _measured_links("cuda" if torch.cuda.is_available() else "cpu")
    if _rank() == 0:
        print(latency, link)
    dist.destroy_process_group()
