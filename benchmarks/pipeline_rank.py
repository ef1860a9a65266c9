"""One rank of ``python -m benchmarks pipeline``: a model whose layers are divided over all ranks, in one of several ways.

Started by :mod:`benchmarks.workers` as ``python -m benchmarks.pipeline_rank FD``, perhaps by another Python. All ranks make the
same whole model and the same batches; a way keeps what its stages need.
"""

from __future__ import annotations

import gc
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.pipeline_models import SHAPES, Shape, build, inputs, loss_of, pieces, resized
from benchmarks.subjects import Training, adamw
from benchmarks.workers import serve

#: Of a peer's step and of its peak, the most that is wanted.
STEP_GOAL, PEAK_GOAL = 0.85, 0.9

#: By as much may a measured peak be over its budget, and half of it is left for that below a peer's peak.
GRACE = 1.01
BUDGET_OF_PEER = PEAK_GOAL * (1 - (GRACE - 1) / 2)


@dataclass(frozen=True)
class Setting:
    """What all ways of one run share. ``schedule`` and ``memory_budget``, in bytes, are dspass's alone."""

    shape: Shape
    micro_batches: int
    schedule: str
    memory_budget: int | None = None


class Trainer(ABC):
    """A model that is trained in some way; ``model`` holds what lies on this rank."""

    model: nn.Module
    optimizer: torch.optim.Optimizer

    @abstractmethod
    def step(self, x: torch.Tensor, y: torch.Tensor) -> float | None:
        """One whole step of the optimiser on a batch; the mean loss where this rank knows it."""

    def report(self) -> dict[str, Any]:
        """What ran and what had been predicted; empty where nothing is."""
        return {}


class Dspass(Trainer):
    """A plain training loop. ``automatic``: the planner also chooses the number of micro-batches."""

    def __init__(self, model: nn.Module, setting: Setting, automatic: bool) -> None:
        import dspass

        self.shape = setting.shape
        pipeline: dict[str, Any] = {"stages": dist.get_world_size(), "schedule": setting.schedule}
        if not automatic:
            pipeline["micro_batches"] = setting.micro_batches
        config: dict[str, Any] = {"pipeline": pipeline}
        if setting.memory_budget is not None:
            config["dspass"] = {"memory_budget": setting.memory_budget}
        self.model = dspass.shard(model, config)
        self.optimizer = adamw(model)
        self.compiled: Any = torch.compile(model, backend="deepspeed", options=config)

    def step(self, x: torch.Tensor, y: torch.Tensor) -> float | None:
        loss = loss_of(self.compiled(**inputs(self.shape, x, y)))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def report(self) -> dict[str, Any]:
        from dspass.pipelined import Pipelined

        found: Any = self.model.__dict__["forward"]
        assert isinstance(found, Pipelined)
        assert found.staging is not None
        assert found.last is not None
        executor, staging = found.last.executor, found.staging
        return {
            "schedule": executor.schedule,
            "spans": tuple(executor.spans),
            "predicted": staging.predicted,
            "sent": executor.sent_bytes,
            "why": staging.why,
        }


class Distributed(Trainer):
    """``torch.distributed.pipelining`` with as many layers on each stage, each stage made by hand."""

    def __init__(self, model: nn.Module, setting: Setting, schedule: str, virtual: int, compiled: bool) -> None:
        from torch.distributed.pipelining import PipelineStage
        from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

        rank, ranks = dist.get_rank(), dist.get_world_size()
        cut, stages = pieces(model), ranks * virtual
        # ZBV goes there and back over the ranks, others round and round.
        mine = [rank, stages - 1 - rank] if schedule == "ZBVZeroBubble" else list(range(rank, stages, ranks))
        shape, rows = setting.shape, setting.shape.batch // setting.micro_batches
        made = []
        self.model = nn.ModuleList(cut.stage(index, stages) for index in mine)
        for index, part in zip(mine, self.model, strict=True):
            tokens = torch.empty(rows, shape.context, dtype=torch.long, device="meta")
            hidden = torch.empty(rows, shape.context, shape.width, device="meta", requires_grad=True)
            logits = torch.empty(rows, shape.context, shape.vocab, device="meta", requires_grad=True)
            if compiled:
                part.compile()  # torch.compile(part) does the same, and zero-bubble schedules refuse it by its type
            made.append(
                PipelineStage(
                    part,
                    index,
                    stages,
                    torch.device("cpu"),
                    input_args=(tokens if index == 0 else hidden,),
                    output_args=(logits if index == stages - 1 else hidden,),
                )
            )
        self.first, self.last, self.target = 0 in mine, stages - 1 in mine, cut.target
        kind: Any = get_schedule_class(schedule)
        given = made[0] if issubclass(kind, PipelineScheduleSingle) else made
        self.schedule = kind(given, n_microbatches=setting.micro_batches, loss_fn=cut.loss)
        self.optimizer = adamw(self.model)

    def step(self, x: torch.Tensor, y: torch.Tensor) -> float | None:
        losses: list[torch.Tensor] = []
        more: dict[str, Any] = {"target": (x, y)[self.target], "losses": losses} if self.last else {}
        self.schedule.step(*([x] if self.first else []), **more)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return torch.stack([loss.detach() for loss in losses]).mean().item() if losses else None


class DeepSpeed(Trainer):
    """DeepSpeed's pipeline engine, whose schedule is 1F1B."""

    def __init__(self, model: nn.Module, setting: Setting, method: str, compiled: bool = False) -> None:
        import deepspeed
        from deepspeed.pipe import PipelineModule

        deepspeed.init_distributed("gloo")  # it finds the group that is there
        cut = pieces(model)
        self.target = cut.target
        self.model = PipelineModule(
            layers=cut.one_by_one(), num_stages=dist.get_world_size(), loss_fn=cut.loss, partition_method=method
        )
        rows = setting.shape.batch // setting.micro_batches
        config = {
            "train_micro_batch_size_per_gpu": rows,
            "gradient_accumulation_steps": setting.micro_batches,
            "gradient_clipping": 0.0,  # its default is 1.0, and nobody else clips here
            "zero_optimization": {"stage": 0},
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
        }
        self.engine, *_ = deepspeed.initialize(model=self.model, optimizer=adamw(self.model), config=config)
        if compiled:
            self.engine.compile()
        self.optimizer = self.engine.optimizer
        self.micro_batches = setting.micro_batches

    def step(self, x: torch.Tensor, y: torch.Tensor) -> float | None:
        pairs = zip(x.chunk(self.micro_batches), (x, y)[self.target].chunk(self.micro_batches), strict=True)
        return float(self.engine.train_batch(iter(pairs)))


@dataclass(frozen=True)
class Way:
    """``how`` is printed; ``fits`` says whether the schedule exists for so many ranks, layers and micro-batches. What is not
    ``usual`` runs where ``--only`` names it. What has its budget ``below`` the peak of the "fastest" or the "smallest" peer
    starts last."""

    make: Callable[[nn.Module, Setting], Trainer]
    how: str
    usual: bool = True
    virtual: int = 1
    below: str | None = None


def _ours(how: str, automatic: bool = False) -> Way:
    return Way(lambda model, setting: Dspass(model, setting, automatic), how, usual=not automatic)


def _budgeted(below: str) -> Way:
    way = _ours(f'as dspass, with "dspass": {{"memory_budget": {BUDGET_OF_PEER:.4f} of the peak of the {below} peer}}')
    return replace(way, below=below)


def _theirs(schedule: str, virtual: int = 1, compiled: bool = False) -> Way:
    kinds = f"{virtual} stages a rank" if virtual > 1 else "one stage a rank"
    how = f"torch.distributed.pipelining, {schedule}, {kinds} with as many layers each"
    return Way(
        lambda model, setting: Distributed(model, setting, schedule, virtual, compiled),
        f"{how}; {'stage.compile()' if compiled else 'eager'}",
        virtual=virtual,
    )


def _deepspeed(method: str, compiled: bool = False) -> Way:
    more = "; engine.compile()" if compiled else "; eager"
    return Way(
        lambda model, setting: DeepSpeed(model, setting, method, compiled),
        f"deepspeed.pipe.PipelineModule(partition_method={json.dumps(method)}), its 1F1B, ZeRO stage 0{more}",
    )


WAYS = {
    "dspass": _ours(
        'torch.compile(model, backend="deepspeed", options={"pipeline": {"stages": ranks, "micro_batches": ...}})'
    ),
    "dspass-automatic": _ours('as dspass, without "micro_batches": the planner chooses them too', automatic=True),
    "dspass-budget": _budgeted("fastest"),
    "dspass-least": _budgeted("smallest"),
    "torch-1f1b": _theirs("1F1B"),
    "torch-1f1b-compile": _theirs("1F1B", compiled=True),
    "torch-gpipe-compile": _theirs("GPipe", compiled=True),
    "torch-interleaved-compile": _theirs("Interleaved1F1B", 2, compiled=True),
    "torch-zb": _theirs("InterleavedZeroBubble"),
    "torch-zb-compile": _theirs("InterleavedZeroBubble", compiled=True),
    "torch-zbv": _theirs("ZBVZeroBubble", 2),
    "deepspeed-uniform": _deepspeed("uniform"),
    "deepspeed-parameters": _deepspeed("parameters"),
    "deepspeed-parameters-compile": _deepspeed("parameters", compiled=True),
}


class PipelineRank:
    """Every public method is a request."""

    def __init__(self, given: dict[str, Any]) -> None:
        from examples.gpt import batches, text_corpus

        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://127.0.0.1:{given['port']}",
            rank=given["rank"],
            world_size=given["ranks"],
            timeout=timedelta(seconds=300),
        )
        shape = resized(SHAPES[given["size"]][given["model"]], given["batch"], given["context"])
        self.ranks, self.waited = given["ranks"], 0.0
        self.corpus = text_corpus()
        self.batches = batches(self.corpus, shape.batch, shape.context, seed=0, rank=0)  # all ranks have one batch
        self._watch_waits()
        torch.manual_seed(0)
        setting = Setting(shape, given["micro_batches"], given["schedule"], given["memory_budget"])
        self.trainer = WAYS[given["subject"]].make(build(shape), setting)
        gc.collect()  # what of the model lies elsewhere

    def _watch_waits(self) -> None:
        """Count the seconds in which this process waits for a message; all ways wait here, none for a collective in a step."""
        plain = dist.Work.wait

        def wait(work: Any, *args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return plain(work, *args, **kwargs)
            finally:
                self.waited += time.perf_counter() - begin

        dist.Work.wait = wait

    def step(self) -> dict[str, Any]:
        """Seconds of one whole step of the optimiser, the loss where this rank knows it, seconds of waiting in it, and what
        ran."""
        x, y = next(self.batches)
        self.waited = 0.0
        begin = time.perf_counter()
        loss = self.trainer.step(x, y)
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "loss": loss, "waited": self.waited, **self.trainer.report()}

    def watch(self, count: int) -> int:
        """The allocator's peak in bytes over ``count`` steps."""
        from benchmarks import measure

        def steps() -> None:
            for _ in range(count):
                self.trainer.step(*next(self.batches))

        training = Training(self.trainer.model, self.trainer.model, self.trainer.optimizer)
        return int(measure.watch(steps, training, "cpu", self.corpus, count, self.ranks)["peak"])

    def parameters(self) -> int:
        """Those that lie on this rank."""
        found = {id(p): p for p in self.trainer.model.parameters() if not p.is_meta}
        return sum(p.numel() for p in found.values())


if __name__ == "__main__":
    serve(PipelineRank)
