"""The points of ``python -m benchmarks memory``: what each is and what was measured of it, and the processes that it runs in.

Nothing here imports torch: the process that asks stays small.
"""

from __future__ import annotations

import contextlib
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.connection import Pipe as make_pipe
from pathlib import Path

from benchmarks.workers import Group

#: Width, layers, heads, tokens a sample and samples of a rank: activations are several times the states, but for "states" and
#: "85m", which has 0.9 GB of them beside 1.4 GB.
PRESETS = {
    "states": (768, 8, 12, 64, 2),
    "tiny": (64, 2, 2, 32, 4),
    "small": (256, 4, 4, 128, 16),
    "medium": (512, 6, 8, 256, 8),
    "85m": (768, 12, 12, 256, 8),
}
MODELS = ("gpt", "llama", "vit")

#: Of ``activation_memory_budget_solver``; torch also ships one that finds what ``dp`` does in less memory of its own.
SOLVERS = ("dp", "greedy", "ilp")

#: A budget that every plan fits into: the planner's fastest.
PLENTY = 10**15

#: Seconds that ranks wait for each other: longer than any answer may take, so that who asks gives up first.
PATIENCE = 7200


@dataclass
class Started:
    """What a rank says of its first steps. ``smallest`` is that of a refusal, which ``why`` tells. The rest is of dspass's
    plan: its peak; by the cost model, the seconds of forward and backward, and of AdamW with what its states take to come from
    the host; what the plan itself multiplied its seconds by; whether the device was calibrated; a hash of what was decided."""

    losses: list[float]
    smallest: int | None = None
    why: str = ""
    peak: int | None = None
    seconds: float = 0.0
    optimizer_seconds: float = 0.0
    scale: float = 1.0
    is_calibrated: bool = False
    decision: str = ""


@dataclass
class Point:
    """One way to train one model. ``predicted`` and ``predicted_seconds`` are a step's as the plan and the cost model have
    them; ``seconds`` are measured, a step a round, by wave, and ``scale`` is what :func:`normalise` multiplies them by."""

    system: str
    setting: str = ""
    budget: int | None = None
    predicted: int | None = None
    predicted_seconds: float | None = None
    is_calibrated: bool = False
    decision: str = ""
    peak: int = 0
    resident: int = 0
    seconds: dict[int, list[float]] = field(default_factory=dict)
    scale: float = 1.0
    losses: list[float] = field(default_factory=list)
    error: str | None = None

    @property
    def step(self) -> float:
        return statistics.median(s for wave in self.seconds.values() for s in wave) * self.scale

    @property
    def name(self) -> str:
        return f"{self.system} {self.setting}".strip()

    @property
    def is_planned(self) -> bool:
        return self.system == "dspass" and self.budget is not None


def normalise(points: Sequence[Point], reference: Point) -> None:
    """Make the waves one: a point's times are multiplied by the reference's median over all waves, over that of its wave.

    What ran in one wave alone is left as it is, and so is a wave in which the reference was not measured.
    """
    overall = reference.step
    for point in points:
        if point is not reference and len(point.seconds) == 1:
            beside = reference.seconds.get(next(iter(point.seconds)))
            point.scale = overall / statistics.median(beside) if beside else 1.0


def peers(ranks: int, ratios: int, solvers: Sequence[str]) -> list[Point]:
    """What dspass is held against. At its ends ``activation_memory_budget`` does not ask the solver: the first has them."""
    if ranks > 1:
        return [Point(f"FSDP2{c}{k}") for c in ("", " + compile") for k in ("", " + checkpoint")]
    shares = [i / (ratios - 1) for i in range(ratios - 1, -1, -1)]
    budgets = [
        Point(f"inductor {solver}", f"{share:.2f}")
        for n, solver in enumerate(solvers)
        for share in (shares if n == 0 else shares[1:-1])
    ]
    return [*budgets, Point("inductor + checkpoint"), Point("eager"), Point("eager + checkpoint")]


def megabytes(count: float) -> str:
    """With enough digits to tell budgets of the smallest models apart."""
    return f"{count / 1e6:.1f} MB" if count >= 1e8 else f"{count / 1e6:.3f} MB"


class Ranks(Group):
    """The processes of one point: one without a process group, or several with one, each on a core of its own."""

    def __init__(self, point: Point, model: str, preset: str, ranks: int, environment: dict[str, str]) -> None:
        self.subject = point.name
        self.folder = Path(tempfile.mkdtemp(prefix="dspass-bench-"))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        cores = sorted(os.sched_getaffinity(0))
        self.pipes: list[Connection] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        setting = {"model": model, "preset": preset, "ranks": ranks}
        setting |= {"system": point.system, "setting": point.setting, "budget": point.budget}
        for rank in range(ranks):
            group = self._environment(rank, ranks, port, "cpu") if ranks > 1 else {}
            ours, theirs = make_pipe()
            with (self.folder / f"rank{rank}.log").open("wb") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "benchmarks.memory_rank", str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    env=os.environ | group | environment,
                    cwd=Path(__file__).parent.parent,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # so that a rank's own children end with it
                )
            theirs.close()
            if 1 < ranks <= len(cores):
                with contextlib.suppress(ProcessLookupError):
                    os.sched_setaffinity(process.pid, {cores[rank]})  # long before torch starts a thread
            self.pipes.append(ours)
            self.processes.append(process)
            ours.send(setting | {"rank": rank})

    def memory(self) -> tuple[int, int]:
        """See :meth:`Group.memory`; zeros where a rank has died, which is noticed when it is asked next."""
        try:
            return super().memory()
        except KeyError:
            return 0, 0
