"""One rank of one point of ``python -m benchmarks memory``, a process of its own: it waits on a pipe, steps and answers.

Started by :class:`benchmarks.memory_points.Ranks` as ``python -m benchmarks.memory_rank FD``.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from benchmarks import measure
from benchmarks.memory_points import PATIENCE, PRESETS, Started
from benchmarks.subjects import SUBJECTS, Training, adamw
from benchmarks.workers import serve


def build(name: str, preset: str, rank: int = 0) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A model with random weights, equal on all ranks, its list of blocks in ``model.blocks``, where
    :mod:`benchmarks.subjects` looks for it; and one rank's batch of random numbers."""
    width, layers, heads, length, batch = PRESETS[preset]
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(rank)
    tokens = torch.randint(0, 256, (batch, length), generator=draw)
    if name == "gpt":
        from examples.gpt import GPT, GPTConfig

        gpt = GPT(GPTConfig(context=length, layers=layers, heads=heads, width=width, dropout=0.0))
        return gpt, (tokens, tokens), {}
    if name == "llama":
        from transformers import LlamaConfig, LlamaForCausalLM

        llama: Any = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=256,
                hidden_size=width,
                intermediate_size=width * 8 // 3,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=heads,
                max_position_embeddings=length,
                use_cache=False,
            )
        )
        llama.blocks = _blocks(llama, layers)
        return llama, (), {"input_ids": tokens, "labels": tokens}
    from transformers import ViTConfig, ViTForImageClassification

    side = round(length**0.5) * 8
    vit: Any = ViTForImageClassification(
        ViTConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            image_size=side,
            patch_size=8,
            num_labels=10,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    vit.blocks = _blocks(vit, layers)
    labels = torch.randint(0, 10, (batch,), generator=draw)
    return vit, (), {"pixel_values": torch.randn(batch, 3, side, side, generator=draw), "labels": labels}


def _blocks(model: nn.Module, layers: int) -> list[nn.Module]:
    """The list of equal modules that is as long as the model is deep; a plain list, so that no parameter has two names."""
    return next(list(m) for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == layers)


def under_checkpoint(blocks: Sequence[nn.Module]) -> None:
    """``torch.utils.checkpoint`` over each block's forward, inside of what is compiled and of FSDP2's hooks."""
    for block in blocks:
        block.forward = lambda *a, f=block.forward, **k: checkpoint(f, *a, use_reentrant=False, **k)


class Trainer:
    """Every public method is a request."""

    def __init__(self, setting: dict[str, Any]) -> None:
        torch.set_num_threads(1)
        self.ranks, self.system = setting["ranks"], setting["system"]
        if self.ranks > 1:
            dist.init_process_group("gloo", timeout=timedelta(seconds=PATIENCE))
        model, self.args, self.kwargs = build(setting["model"], setting["preset"], setting["rank"])
        self.training = self._wrapped(model, setting["setting"], setting["budget"])

    def _wrapped(self, model: nn.Module, setting: str, budget: int | None) -> Training:
        base, *extras = self.system.split(" + ")
        if base == "dspass":
            import dspass  # noqa: F401  (registers the backend from a checkout)

            own = {} if budget is None else {"memory_budget": budget}
            offloads = {extra: {"device": "cpu"} for extra in extras}
            options: Any = {"zero_optimization": {"stage": 0 if self.ranks == 1 else 3, **offloads}, "dspass": own}
            return Training(torch.compile(model, backend="deepspeed", options=options), model, adamw(model))
        if "checkpoint" in extras:
            under_checkpoint(list(model.blocks))
        if base == "FSDP2":
            return SUBJECTS["fsdp2-compile" if "compile" in extras else "fsdp2"].wrap(model, "cpu")
        if base == "eager":
            return Training(model, model, adamw(model))
        name, *solver = base.split()
        assert name == "inductor", f"no system {self.system!r}"
        if solver:
            from torch._functorch import config

            config.activation_memory_budget, config.activation_memory_budget_solver = float(setting), solver[0]
        return Training(torch.compile(model), model, adamw(model))

    def start(self, count: int) -> Started:
        """The first steps, which compile; a budget's refusal is an answer, not a failure."""
        if not self.system.startswith("dspass"):
            return Started(self.steps(count)[1])
        from dspass.planner.record import BudgetError

        try:
            return self._planned(self.steps(count)[1])
        except Exception as error:
            inner = _inner(error)
            if not isinstance(inner, BudgetError):
                raise
            return Started([], smallest=inner.smallest, why=str(inner))

    def _planned(self, losses: list[float]) -> Started:
        from dspass.engines import engine_of

        engine = engine_of(self.training.model)
        last = {c.frame: c for c in engine.compilations} if engine is not None else {}  # some models are compiled again
        plans = [c.plan for c in last.values() if c.plan is not None]
        if not plans:
            return Started(losses)
        from dspass.passes import cost, devices

        on = devices.planned_for("cpu")
        shards = measure.persistent(self.training.model, self.training.optimizer)["gradients"]
        return Started(
            losses,
            peak=max(p.peak for p in plans),
            seconds=sum(p.seconds / p.scale for p in plans),
            optimizer_seconds=cost.optimizer_seconds(shards, 2 * shards, on) + sum(p.states_seconds for p in plans),
            scale=statistics.median(p.scale for p in plans),
            is_calibrated=bool(on.curves),
            decision=hashlib.sha256(repr([p.decision for p in plans]).encode()).hexdigest()[:12],
        )

    def steps(self, count: int) -> tuple[float, list[float]]:
        """Seconds a step, and the losses of ``count`` steps."""
        losses = []
        begin = time.perf_counter()
        for _ in range(count):
            answer = self.training.forward(*self.args, **self.kwargs)
            loss = answer if isinstance(answer, torch.Tensor) else answer.loss
            del answer
            self.training.backward(loss)
            self.training.step()
            losses.append(loss.item())
        return (time.perf_counter() - begin) / count, losses

    def held(self) -> tuple[int, int, int]:
        """Bytes of this rank's parameters, gradients and states, of states that wait on the host, and of such parameters."""
        from dspass.runtime.host import is_on_host
        from dspass.runtime.host_states import local_of

        states = [v for s in self.training.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
        params = [local_of(p) for p in self.training.model.parameters()]
        whole = sum(measure.persistent(self.training.model, self.training.optimizer).values())
        away = [sum(t.nbytes for t in found if is_on_host(t)) for found in (map(local_of, states), params)]
        return whole, away[0], away[1]

    def peak(self) -> int:
        """The allocator's peak over two steps."""
        found = measure.watch(lambda: self.steps(2), self.training, "cpu", torch.empty(0), 2, self.ranks)
        return int(found["peak"])


def _inner(error: BaseException) -> BaseException:
    """What a backend raised, which Dynamo's own exception holds."""
    return getattr(error, "inner_exception", error)


def _cause(error: BaseException) -> str:
    """One line, where the last ones of Dynamo's exceptions are advice."""
    inner = _inner(error)
    return " ".join(f"{type(inner).__name__}: {inner}".split())[:300]


if __name__ == "__main__":
    serve(Trainer, _cause)
