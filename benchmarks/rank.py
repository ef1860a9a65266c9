"""One rank of one subject, a process of its own: waits on a pipe, does what it is asked, answers.

Started by :mod:`benchmarks.workers` as ``python -m benchmarks.rank FD``, perhaps by another Python.
"""

from __future__ import annotations

import functools
import math
import sys
import time
from datetime import timedelta
from typing import Any

from benchmarks.workers import serve


def _share_of_lr(step: int, steps: int) -> float:
    """Of a rise over the first tenth of ``steps``, and a half cosine down to nothing at their end."""
    return min((step + 1) / (steps / 10), 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0))))


class Rank:
    """Every public method is a request."""

    def __init__(self, setting: dict[str, Any]) -> None:
        import torch
        import torch.distributed as dist

        from benchmarks.subjects import SUBJECTS
        from examples.gpt import batches, text_corpus

        rank, ranks, self.device = setting["rank"], setting["ranks"], setting["device"]
        torch.set_num_threads(1)
        if self.device == "cuda":
            torch.cuda.set_device(rank)
        # "inductor" is as many processes that know nothing of each other; everything else wants a group, also of one rank.
        if setting["subject"] != "inductor":
            dist.init_process_group(
                "gloo" if self.device == "cpu" else "nccl",
                init_method=f"tcp://127.0.0.1:{setting['port']}",
                rank=rank,
                world_size=ranks,
                timeout=timedelta(seconds=300),
            )
        self.ranks, self.name = ranks, setting["subject"]
        self.corpus = text_corpus()
        self.batches = batches(self.corpus, setting["batch"], setting["context"], seed=0, rank=rank)
        torch.manual_seed(0)
        model = self._build(setting["preset"]).to(self.device)
        if setting.get("shaken"):
            draw = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for param in model.parameters():
                    param *= 1 + setting["shaken"] * torch.randn(param.shape, generator=draw)
        self.parameters = list(model.parameters())
        self.model = model
        self.training = SUBJECTS[self.name].wrap(model, self.device)
        for group in self.training.optimizer.param_groups:
            group["lr"] = setting.get("lr", group["lr"])
        self.schedule = None
        if "cosine_steps" in setting:
            share = functools.partial(_share_of_lr, steps=setting["cosine_steps"])
            self.schedule = torch.optim.lr_scheduler.LambdaLR(self.training.optimizer, share)

    def _build(self, preset: str) -> Any:
        """The model, its blocks in ``blocks``, where :mod:`benchmarks.subjects` looks for them."""
        from examples.gpt import GPT, PRESETS

        return GPT(PRESETS[preset])

    def _loss(self, x: Any, y: Any) -> Any:
        return self.training.forward(x, y)

    def versions(self) -> dict[str, str]:
        import torch

        found = {"python": sys.version.split()[0], "torch": torch.__version__}
        if "deepspeed" in sys.modules:
            found["deepspeed"] = sys.modules["deepspeed"].__version__
        return found

    def steps(self, count: int) -> tuple[float, list[float]]:
        """Seconds a step and the losses of ``count`` whole optimiser steps, on this rank's batches."""
        losses = []
        begin = time.perf_counter()
        for _ in range(count):
            x, y = next(self.batches)
            loss = self._loss(x.to(self.device), y.to(self.device))
            self.training.backward(loss)
            self.training.step()
            if self.schedule is not None:
                self.schedule.step()
            losses.append(loss.detach())
        values = [loss.item() for loss in losses]  # waits for a GPU as well
        return (time.perf_counter() - begin) / count, values

    def persistent(self) -> dict[str, int]:
        from benchmarks import measure

        return measure.persistent(self.model, self.training.optimizer)

    def watch(self, count: int) -> dict[str, Any]:
        """Allocator's peak in bytes, and calls and logical bytes by kind of collective, over ``count`` steps."""
        from benchmarks import measure

        watched = measure.watch(lambda: self.steps(count), self.training, self.device, self.corpus, count, self.ranks)
        if self.name.startswith("dspass"):
            import dspass
            from dspass.runtime.ledger import CATEGORIES

            found: dict[str, tuple[float, float]] = {}
            for entry in dspass.explain(self.model).traffic:
                calls, sent = found.get(entry.kind, (0.0, 0.0))
                found[entry.kind] = (calls + entry.calls, sent + entry.bytes)
            watched["counted_outside"], watched["collectives"] = watched["collectives"], found
            if self.device == "cpu":
                with dspass.measure(self.model) as measured:
                    self.steps(1)
                watched["saved"] = max(p.bytes[CATEGORIES.index("saved")] for p in measured.points)
        return watched

    def traffic(self) -> dict[tuple[str, str], int]:
        """Bytes that this rank sent in the last step, by kind of collective and group, as dspass counts them."""
        import dspass

        found: dict[tuple[str, str], int] = {}
        for entry in dspass.explain(self.model).traffic:
            found[entry.kind, entry.group] = found.get((entry.kind, entry.group), 0) + entry.bytes
        return found

    def count(self) -> int:
        """Parameters of the whole model."""
        return sum(p.numel() for p in self.model.parameters())

    def saved(self) -> int | None:
        """Bytes that Inductor's forward keeps for its backward; None where the graph did not end in one function."""
        from benchmarks import measure

        x, y = next(self.batches)
        loss = self.training.forward(x.to(self.device), y.to(self.device))
        return measure.saved(loss, self.model)


if __name__ == "__main__":
    serve(Rank)
