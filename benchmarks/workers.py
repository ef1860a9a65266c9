"""Groups of processes that hold one subject each and run steps when told, so that subjects can take turns within one minute.

All groups stay alive; one steps while the others wait on a pipe and use no CPU. What drifts on a shared machine then drifts
for all of them, and the ratio of two subjects' steps of one round is a fair one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.connection import Pipe as make_pipe
from pathlib import Path
from typing import Any


class SubjectFailed(RuntimeError):
    """A rank of a subject raised, died, or did not answer in time."""

    @staticmethod
    def short(text: str) -> str:
        """What failed, and the last line of why."""
        lines = text.strip().splitlines()
        return " ".join(dict.fromkeys((lines[0], lines[-1])))


def serve(make: Callable[[dict[str, Any]], Any], told: Callable[[BaseException], str] = lambda _: "") -> None:
    """What a rank's process does: read a setting from the pipe that the command line names, ``make`` what answers requests at
    the first, and send each answer, or the traceback of what was raised with what is ``told`` of it."""
    pipe = Connection(int(sys.argv[1]))
    setting = pipe.recv()
    if setting.get("core") is not None:
        os.sched_setaffinity(0, {setting["core"]})  # before torch starts a thread
    answers: Any = None
    while True:
        try:
            request, args = pipe.recv()
        except EOFError:
            os._exit(0)  # whoever asked is gone; a collective's thread must not keep us
        try:
            if answers is None:
                answers = make(setting)
            pipe.send((True, getattr(answers, request)(*args)))
        except BaseException as error:
            pipe.send((False, "\n".join(filter(None, (traceback.format_exc(), told(error))))))


class Group:
    """The ranks of one subject, each a process of ``python -m module``, by another ``python`` where one is named."""

    def __init__(
        self,
        subject: str,
        ranks: int,
        settings: dict[str, Any],
        python: str | None = None,
        module: str = "benchmarks.rank",
    ) -> None:
        self.subject = subject
        self.folder = Path(tempfile.mkdtemp(prefix="dspass-bench-"))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        cores = sorted(os.sched_getaffinity(0))
        pin = settings["device"] == "cpu" and ranks <= len(cores)
        self.pipes: list[Connection] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        for rank in range(ranks):
            ours, theirs = make_pipe()
            with (self.folder / f"rank{rank}.log").open("wb") as log:
                process = subprocess.Popen(
                    [python or sys.executable, "-m", module, str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    env=os.environ | self._environment(rank, ranks, port, settings["device"]),
                    cwd=Path(__file__).parent.parent,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # so that a rank's own children end with it
                )
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
            core = cores[rank] if pin else None
            ours.send(settings | {"subject": subject, "rank": rank, "ranks": ranks, "port": port, "core": core})

    def _environment(self, rank: int, ranks: int, port: int, device: str) -> dict[str, str]:
        """The caches are cold for each subject, and shared by its ranks."""
        return {
            "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "inductor"),
            "TRITON_CACHE_DIR": str(self.folder / "triton"),
            "OMP_NUM_THREADS": "1",
            "RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "KINETO_LOG_LEVEL": "99",
            "DS_ACCELERATOR": device,  # DeepSpeed's
        }

    def ask(self, request: str, *args: Any, timeout: float = 600) -> list[Any]:
        """One answer of each rank; raises :class:`SubjectFailed`, after which the group is of no more use."""
        deadline = time.monotonic() + timeout
        answers: dict[int, Any] = {}
        try:
            for pipe in self.pipes:
                pipe.send((request, args))
            while len(answers) < len(self.pipes):
                waiting = [p for rank, p in enumerate(self.pipes) if rank not in answers]
                heard = wait(waiting, max(deadline - time.monotonic(), 0.0))
                ready = [p for p in waiting if p in heard]
                if not ready:
                    raise SubjectFailed(f"{self.subject}: no answer to {request!r} within {timeout:.0f} s{self._log()}")
                for pipe in ready:  # whichever fails first is heard first
                    rank = self.pipes.index(pipe)
                    good, answers[rank] = pipe.recv()
                    if not good:
                        raise SubjectFailed(f"{self.subject}: rank {rank} failed in {request!r}:\n{answers[rank]}")
        except (EOFError, OSError):
            raise SubjectFailed(f"{self.subject}: a rank died in {request!r}{self._log()}") from None
        return [answers[rank] for rank in range(len(self.pipes))]

    def _log(self) -> str:
        texts = [p.read_text(errors="replace")[-1500:].strip() for p in sorted(self.folder.glob("rank*.log"))]
        return "".join(f"\nrank {rank} said last:\n{text}" for rank, text in enumerate(texts) if text)

    def memory(self) -> tuple[int, int]:
        """Bytes of the machine's memory that the ranks hold now, and that they held at most, shared files left out."""
        now = most = 0
        for process in self.processes:
            with contextlib.suppress(OSError):
                table = Path(f"/proc/{process.pid}/status").read_text()
                said = {key: rest.split() for key, _, rest in (line.partition(":") for line in table.splitlines())}
                now += int(said["RssAnon"][0]) * 1024
                most += (int(said["VmHWM"][0]) - int(said["RssFile"][0])) * 1024
        return now, most

    def close(self) -> None:
        for process, pipe in zip(self.processes, self.pipes, strict=True):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)
            pipe.close()
        shutil.rmtree(self.folder, ignore_errors=True)
