"""Step time against measured peak memory: dspass under budgets beside its peers' own ways to save memory, interleaved.

Every point is one process a rank, of one thread, that trains one model from the same random weights on the same batches:
dspass under a budget in bytes, on one rank beside Inductor with ``activation_memory_budget`` as a ratio, Inductor over
``torch.utils.checkpoint`` of each block and plain eager, on two (ZeRO stage 3) beside FSDP2 with and without checkpoints, eager
and compiled. Points start a few at a time; then they take turns, one step of one point at a time, in an order drawn anew each
round. A step takes as long as its slowest rank; the peak is that of all tensors of the largest rank, by the profiler's memory
events (:mod:`benchmarks.measure`).

Where not all points fit into memory, they run in waves, each beside the same reference, dspass's fastest plan: a point's times
are multiplied by the reference's median over all waves, and divided by its median in the point's wave.

The device is measured first (``python -m dspass calibrate``), into a folder that is gone afterwards. Predictions are the cost
model's alone: the factor that dspass learns from eleven steps of a model, and multiplies later predictions by, is taken out,
as which points have it would depend on the wave.

A peer's point is compared with the best that dspass has at no more memory, and at no more time: points are not interpolated.
Dropped: FSDP2 on one rank, which shards nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from benchmarks import zero
from benchmarks.memory_bench import Bench
from benchmarks.memory_plot import plot
from benchmarks.memory_points import Point, Ranks, peers
from benchmarks.memory_table import table
from benchmarks.table import device

#: By default glibc hands memory back to the kernel where more than some threshold is free, and a step that crosses it takes all
#: of it anew: a few more saved bytes can cost a tenth of a step, of any system alike.
_KEPT = {"MALLOC_TRIM_THRESHOLD_": "4000000000", "MALLOC_MMAP_THRESHOLD_": "4000000000"}


def run(options: argparse.Namespace) -> int:
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    solvers = [s for s in options.solvers.split(",") if s != "ilp" or find_spec("scipy")]
    notes = []
    if options.ranks == 1 and len(solvers) < len(options.solvers.split(",")):
        notes.append("Inductor's solver ilp is left out: it needs scipy, which is not installed.")
    scratch = Path(tempfile.mkdtemp(prefix="dspass-bench-memory-"))
    environment = _environment(scratch)
    if options.keep_memory:
        environment |= _KEPT
        notes.append(f"In every process {' '.join(f'{k}={v}' for k, v in _KEPT.items())}.")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all processes are ended then, too
    written: list[Path] = []
    failures = 0
    try:
        if options.calibrate:
            notes.append(f"The device was measured first: {_calibrate(options.ranks, environment)}")
        else:
            environment.pop("DSPASS_DEVICES")
        for model in options.models.split(","):
            begin = time.time()

            def make(point: Point, model: str = model) -> Ranks:
                return Ranks(point, model, options.preset, options.ranks, environment)

            bench = Bench(model, options, make)
            try:
                points = bench.measure(peers(options.ranks, options.ratios, solvers))
            finally:
                bench.close()
            failures += sum(p.error is not None for p in points)
            told = list(notes)
            if not options.calibrate and any(p.predicted_seconds for p in points):
                source = (
                    "an earlier calibration" if any(p.is_calibrated for p in points) else "rough figures of a CPU core"
                )
                told.append(f"The device was not measured for this run; predictions are from {source}.")
            if bench.waves > 1:
                told.append(
                    f"Not all points fit into {bench.limit / zero.GIB:.0f} GiB: {bench.waves} waves, each beside dspass "
                    "fastest; times are multiplied by its median over all waves, over its median in the point's wave."
                )
            # After each model: a run that is cut short keeps what it has.
            written.append(_write(folder, model, options, points, told, time.time() - begin))
    except KeyboardInterrupt:
        print(f"stopped by hand; written: {', '.join(map(str, written)) or 'nothing'}", file=sys.stderr)
        return 130
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"written, with .json and a plot beside each: {', '.join(map(str, written))}")
    return int(failures > 0)


def _write(
    folder: Path, model: str, options: argparse.Namespace, points: Sequence[Point], notes: Sequence[str], seconds: float
) -> Path:
    """One model's page, its plot and all figures behind it; the page is printed, too."""
    page = folder / f"memory-{options.preset}-{options.ranks}r-cpu-{model}.md"
    found = table(points)
    print(f"\n{found}\n")
    page.with_suffix(".svg").write_text(plot(_title(model, options), points))
    page.write_text("\n\n".join([*_head(model, options, seconds, notes), found, f"![{model}]({page.stem}.svg)"]) + "\n")
    figures = {"command": _command(), "seconds": seconds, "notes": notes, "points": [asdict(p) for p in points]}
    page.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n")
    return page


def _environment(scratch: Path) -> dict[str, str]:
    """Of all processes. They share a cache of compiled code, cold at the start; and compile in themselves, without helpers."""
    return {
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "DSPASS_DEVICES": str(scratch / "devices"),
        "KINETO_LOG_LEVEL": "99",
    }


def _calibrate(ranks: int, environment: dict[str, str]) -> str:
    """Measure the device in a process of its own, for one thread; answers how long it took and what it says of the links."""
    command = [sys.executable, "-m", "dspass", "calibrate", "--ranks", str(ranks)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        env=os.environ | environment,
        cwd=Path(__file__).parent.parent,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            told, _ = process.communicate(timeout=900)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)  # with the processes between which links are measured
            raise
    if process.returncode:
        raise RuntimeError(
            f"{shlex.join(command)} failed with status {process.returncode}; --no-calibrate does without"
        )
    links = [" ".join(line.split()) for line in told.splitlines() if line.strip().startswith("all-gather,")]
    took = told.strip().splitlines()[-1].partition(":")[0].removeprefix("written ")
    return "; ".join([f"python -m dspass calibrate --ranks {ranks}, {took}", *links]) + "."


def _command() -> str:
    return shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]])


def _title(model: str, options: argparse.Namespace) -> str:
    return f"{model}, preset {options.preset}, {options.ranks} rank{'s' if options.ranks > 1 else ''}"


def _head(model: str, options: argparse.Namespace, seconds: float, notes: Sequence[str]) -> list[str]:
    ranks = "1 rank, no process group" if options.ranks == 1 else f"{options.ranks} ranks (gloo), ZeRO stage 3"
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers"))
    return [
        f"# Step time against peak memory: {_title(model, options)}",
        f"`{_command()}`",
        f"{time.strftime('%Y-%m-%d')}, {ranks}, on {device('cpu')}; {versions}, Python {platform.python_version()}; "
        f"AdamW(fused=True), fp32, one thread a rank; {options.rounds} rounds of one step, one point at a time, in an order "
        f"drawn anew for each; {seconds / 60:.1f} minutes in all. Peaks and times are of the largest and of the slowest rank.",
        *notes,
    ]
