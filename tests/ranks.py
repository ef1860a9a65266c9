"""Real ranks for tests: worker processes over gloo that are kept from test to test.

``run(n, function, *args)`` calls an importable function on ``n`` ranks and answers their results, rank 0 first. A world of
each size is started once and reused; one in which a rank failed, died, did not answer in time or gave up its process group is
killed, never reused. Importing torch and the rest costs seconds a process, so ranks are forked from one that has done it
(:mod:`tests.preloaded`). No rank outlives pytest.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

#: Thresholds for the garbage collector: tracing makes many objects that live long, and each collection looks through them.
RARE_COLLECTIONS = (100_000, 50, 50)


class RankError(AssertionError):
    """A rank raised, died, or did not answer in time."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _worker(rank: int, size: int, port: int, pipe: Connection) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "LOCAL_WORLD_SIZE": str(size),
    }
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    gc.set_threshold(*RARE_COLLECTIONS)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        function, args, kwargs = task
        try:
            pipe.send((True, function(*args, **kwargs), dist.is_initialized()))
        except BaseException:
            pipe.send((False, traceback.format_exc(), False))
        torch._dynamo.reset()
        gc.collect()
        gc.freeze()  # what is still there stays


class World:
    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.preloaded"])
        port = free_port()
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_worker, args=(rank, size, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def call(self, function: Callable[..., Any], args: Any, kwargs: Any, timeout: float, moment: float) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function, args, kwargs))
        results: dict[int, tuple[bool, Any, bool]] = {}
        deadline = time.monotonic() + timeout
        failed_at = None
        while len(results) < len(self.pipes):
            # A rank that failed leaves its peers in a collective: give them a moment to say more, no longer.
            limit = deadline if failed_at is None else min(deadline, failed_at + moment)
            left = limit - time.monotonic()
            open_pipes = [p for r, p in enumerate(self.pipes) if r not in results]
            ready = wait(open_pipes, timeout=max(left, 0))
            if not ready:
                break
            for pipe in ready:
                rank = self.pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    results[rank] = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    results[rank] = (False, f"the process of rank {rank} died", False)
                if not results[rank][0] and failed_at is None:
                    failed_at = time.monotonic()
        bad = {r: text for r, (good, text, _) in results.items() if not good}
        missing = [r for r in range(len(self.pipes)) if r not in results]
        if bad or missing:
            self.kill()
            said = "\n".join(f"--- rank {r}\n{text}" for r, text in sorted(bad.items()))
            raise RankError((f"ranks {missing} did not answer within {timeout} s\n" if missing else "") + said)
        if not all(grouped for _, _, grouped in results.values()):  # a script that ends as scripts do
            self.kill()
        return [results[r][1] for r in range(len(self.pipes))]

    def kill(self) -> None:
        _worlds.pop(len(self.pipes), None)
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join(5)
        for pipe in self.pipes:
            with contextlib.suppress(OSError):
                pipe.close()


_worlds: dict[int, World] = {}


def run(
    size: int, function: Callable[..., Any], *args: Any, timeout: float = 240, moment: float = 5, **kwargs: Any
) -> list[Any]:
    """Call ``function(*args, **kwargs)`` on ``size`` ranks; raises :class:`RankError` with every rank's traceback, ``moment``
    seconds after the first one's at the latest."""
    if size not in _worlds:  # an idle world takes memory and no time
        _worlds[size] = World(size)
    return _worlds[size].call(function, args, kwargs, timeout, moment)


def close_all() -> None:
    while _worlds:
        next(iter(_worlds.values())).kill()


atexit.register(close_all)
