"""Train on this rank beside the reference: one process that runs the N ranks' batches one after another.

``train`` runs on every rank of :func:`tests.ranks.run`. Each rank computes the reference for itself, from the same seeds, so
that nothing has to be sent and a rank that differs fails by itself.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

import dspass
from dspass.engines import engine_of
from dspass.lowering.simulate import GraphSimulator

#: Shards parameters that would stay whole otherwise: those of the tests are small.
SMALL = {"stage3_param_persistence_threshold": 20}

Batch = tuple[Any, ...] | dict[str, Any]


def zero(stage: int, *, dspass: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """A configuration of ``stage`` in which parameters of 20 elements are already divided."""
    own = {"dspass": dspass} if dspass else {}
    return {"zero_optimization": {"stage": stage, **(SMALL if stage == 3 else {})}, **own, **more}


def as_they_are(gm: torch.fx.GraphModule, *, is_backward: bool, is_inference: bool) -> Callable[[list[Any]], Any]:
    """Segments run operator by operator: what passes and runtime do, without Inductor's seconds of compiling."""

    def run_segment(args: list[Any]) -> Any:
        taken = list(args)
        args.clear()
        return gm(*taken)

    return run_segment


@contextlib.contextmanager
def operators() -> Iterator[None]:
    """Inside, segments run so, and plans and predictions walk their graphs in place of Inductor's code."""
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch("dspass.compilation.segment_compiler", return_value=as_they_are))
        for module in ("planning", "prediction"):
            patches.enter_context(mock.patch(f"dspass.{module}.InductorSimulator", return_value=GraphSimulator()))
        yield


def without_inductor(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function(..., inductor=True)`` leaves Inductor on; by default segments run operator by operator."""

    @functools.wraps(function)
    def wrapped(*args: Any, inductor: bool = False, **kwargs: Any) -> Any:
        with contextlib.nullcontext() if inductor else operators():
            return function(*args, **kwargs)

    return wrapped


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor; a collective where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def call(model: Callable[..., Any], batch: Batch) -> torch.Tensor:
    """The model's loss on a batch: what it answers, or that answer's ``loss``."""
    answer = model(**batch) if isinstance(batch, dict) else model(*batch)
    return answer if isinstance(answer, torch.Tensor) else answer.loss


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2)


@contextlib.contextmanager
def seeded(seed: int | None) -> Any:
    """With a seed, random numbers inside begin there and those outside go on as if nothing had been drawn."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@without_inductor
def train(
    build: Callable[[], nn.Module],
    batches: Callable[[torch.Generator, int, int], Batch],
    config: dict[str, Any],
    *,
    steps: int = 20,
    calls: int = 1,
    optimizer: Callable[[Any], torch.optim.Optimizer] = sgd,
    optimizer_when: str = "after compile",
    eager_steps: int = 0,
    how: str = "compile",
    clip: float | None = None,
    inside: Callable[[], Any] = contextlib.nullcontext,
    between: Callable[[Any, Batch], None] | None = None,
    losses_per_backward: int = 1,
    no_sync: bool = False,
    random: bool = False,
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train ``steps`` steps of ``calls`` calls; answers the largest differences, a digest, and what was sent.

    ``how``: ``compile`` (torch.compile), ``method`` (model.compile) or ``shard`` (dspass.shard, then torch.compile).
    ``optimizer_when``: ``before compile``, ``after compile`` or ``after call``; ``eager_steps`` are trained before the
    model is compiled. ``inside`` makes a context around each forward, of both; ``between`` runs before each step's calls.
    ``random``: seed each rank's call as one process would seed it (dropout).
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    reference = build()
    torch.manual_seed(0)
    model = build()  # no copy: some modules refuse that
    plain = list(model.parameters())  # a person's own list, from before anything was sharded
    ours = optimizer(model.parameters()) if optimizer_when == "before compile" else None
    theirs = optimizer(reference.parameters())
    draw = torch.Generator().manual_seed(1)
    data = [[[batches(draw, r, c) for r in range(ranks)] for c in range(calls)] for _ in range(eager_steps + steps)]

    for step in data[:eager_steps]:  # on one process, as a warm-up before torch.compile would be
        assert ours is not None
        for net, opt in ((model, ours), (reference, theirs)):
            call(net, step[0][0]).backward()
            opt.step()
            opt.zero_grad()

    if how == "shard":
        dspass.shard(model, config)
    compiled: Any
    if how == "method":
        model.compile(backend="deepspeed", options=config, **(options or {}))
        compiled = model
    else:
        compiled = torch.compile(model, backend="deepspeed", options=config, **(options or {}))
    if optimizer_when == "after compile":
        ours = optimizer(compiled.parameters())

    worst, seed = 0.0, 100
    for step in data[eager_steps:]:
        if between is not None:
            between(compiled, step[0][rank])
        for first in range(0, calls, losses_per_backward):
            group = step[first : first + losses_per_backward]
            last = first + losses_per_backward >= calls
            total = []
            with dspass.no_sync(compiled) if no_sync and not last else contextlib.nullcontext():
                for i, one in enumerate(group):
                    with inside(), seeded(seed + i * ranks + rank if random else None):
                        total.append(call(compiled, one[rank]))
                sum(total).backward()  # type: ignore[union-attr]
            for i, one in enumerate(group):
                for r in range(ranks):
                    with inside(), seeded(seed + i * ranks + r if random else None):
                        expected = call(reference, one[r])
                    (expected / ranks).backward()
                    if r == rank:
                        worst = max(worst, abs(total[i].item() - expected.item()) / abs(expected.item()))
            seed += len(group) * ranks
        ours = ours or optimizer(compiled.parameters())
        for p in model.parameters():
            if isinstance(p, DTensor) and p.grad is not None:
                assert isinstance(p.grad, DTensor)
                assert p.grad.placements == p.placements
        if clip is not None:
            norm = torch.nn.utils.clip_grad_norm_(plain, clip)
            expected_norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), clip)
            torch.testing.assert_close(whole(norm), expected_norm, rtol=1e-4, atol=0)
        if config.get("gradient_clipping"):
            torch.nn.utils.clip_grad_norm_(reference.parameters(), config["gradient_clipping"])
        ours.step()
        ours.zero_grad()
        theirs.step()
        theirs.zero_grad()

    mine = [whole(p.detach()) for p in model.parameters()]
    apart = max(
        (p - q).norm().item() / max(q.norm().item(), 1e-12) for p, q in zip(mine, reference.parameters(), strict=True)
    )
    engine = engine_of(model)
    assert engine is not None
    counts: dict[str, int] = {}
    for (kind, *_), (number, _, _) in engine.traffic.last.items():
        counts[kind] = counts.get(kind, 0) + number
    digest = hashlib.sha256(b"".join(p.float().contiguous().numpy().tobytes() for p in mine)).hexdigest()
    return {
        "loss": worst,
        "params": apart,
        "counts": counts,
        "layouts": {s.name: s.layout for s in engine.specs.values()},
        "graphs": len(engine.compilations),
        "digest": digest,
    }


def close(results: Sequence[dict[str, Any]], *, params: bool = True, within: float = 1e-5) -> None:
    """Every rank's losses agree with the reference's, its parameters too, and ranks hold the same model."""
    for result in results:
        assert result["loss"] <= within
        if params:
            assert result["params"] <= within
    assert len({result["digest"] for result in results}) == 1
