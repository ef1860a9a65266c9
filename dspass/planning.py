"""The planner at work on one joint graph, and one plan for all ranks.

Rank 0 plans, for it holds the largest shards, and puts its plan into the process group's store, where the others wait for it.
Dropped: each rank plans and the results are compared. It costs the same work once more on each, and measured or uneven sizes
make ranks differ at the edge of a budget, where different buckets would leave them waiting for each other.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.fx as fx
from torch.distributed.tensor import DTensor

from dspass.lowering.simulate import GraphSimulator, InductorSimulator
from dspass.passes import cost
from dspass.passes.base import Pass, PassContext, run_passes
from dspass.passes.partition import partition
from dspass.planner.dry_run import State, peak_of_step
from dspass.planner.plan import BudgetError, Planner
from dspass.runtime import compat
from dspass.runtime.engine import Engine

#: How long the other ranks wait for rank 0's plan.
WAIT = timedelta(minutes=10)

#: Rough rates of a CPU core for planning: ratios count, and measured ones would make plans differ from run to run.
_CPU = cost.Device(name="cpu", rates={torch.float32: 8e10}, memory=8e9, link=1e9, latency=2e-4, overlaps=False)


#: All ranks plan the same graphs in the same order.
_plans = itertools.count()


def planned(
    joint: fx.GraphModule,
    inputs: Any,
    num_fwd_outputs: int,
    free: Sequence[int],
    engine: Engine,
    budget: int,
    passes: Sequence[Pass],
    name: str,
    patches: Mapping[str, Any],
) -> tuple[fx.GraphModule, fx.GraphModule, str]:
    """``joint`` split as the plan says, and the plan in words; raises :class:`BudgetError` on every rank."""

    def split(choose: Callable[..., list[fx.Node]]) -> tuple[fx.GraphModule, fx.GraphModule]:
        fresh = fx.GraphModule(joint, copy.deepcopy(joint.graph))
        return partition(fresh, inputs, num_fwd_outputs, free, choose=choose)

    def pipeline(forward: fx.GraphModule, backward: fx.GraphModule) -> tuple[fx.GraphModule, fx.GraphModule]:
        return (
            run_passes(forward, passes, PassContext(graph=name, where="forward", target=engine.target)),
            run_passes(backward, passes, PassContext(graph=name, where="backward", target=engine.target)),
        )

    def peak(simulator: Any) -> Callable[[fx.GraphModule, fx.GraphModule], int]:
        state = state_of(engine)
        return lambda forward, backward: peak_of_step(forward, backward, num_fwd_outputs, engine, state, simulator)

    if any(_unknown(n.meta.get("val")) for n in joint.graph.nodes):
        raise BudgetError(
            "dspass.memory_budget needs sizes that are known when the model is compiled, and here they are dynamic. Compile "
            "with torch.compile(..., dynamic=False), or pad batches to one size.",
            0,
        )
    shared = _Shared(joint.graph)
    told = shared.read()
    if told is None:
        on_cpu = (engine.target or "cpu") == "cpu"
        planner = Planner(
            budget=budget,
            on=_CPU if on_cpu else cost.device(engine.target or "h100"),
            num_fwd_outputs=num_fwd_outputs,
            split=split,
            passes=pipeline,
            rough=peak(GraphSimulator()),
            exact=peak(InductorSimulator(patches=patches)) if on_cpu else None,
        )
        try:
            (forward, backward), plan = planner.plan()
        except BudgetError as error:
            shared.write({"error": str(error), "smallest": error.smallest})
            raise
        shared.write({"saved": plan.saved, "text": str(plan)})
        return forward, backward, str(plan)
    if "error" in told:
        raise BudgetError(told["error"], told["smallest"])
    saved = set(told["saved"])
    forward, backward = split(lambda graph, nodes, free: [n for n in nodes if n.name in saved])
    return forward, backward, told["text"]


class _Shared:
    """The plan of one graph in the process group's store."""

    def __init__(self, graph: fx.Graph) -> None:
        self.ranks = dist.get_world_size() if dist.is_initialized() and dist.get_backend() != "fake" else 1
        self.key = f"dspass/plan/{next(_plans)}"
        self.graph = hashlib.sha256(" ".join(f"{n.name}={n.target}" for n in graph.nodes).encode()).hexdigest()

    def read(self) -> dict[str, Any] | None:
        """Rank 0's plan, waited for; None on rank 0 itself."""
        if self.ranks == 1 or dist.get_rank() == 0:
            return None
        store = compat.store()
        try:
            store.wait([self.key], WAIT)
        except RuntimeError as error:
            raise RuntimeError(
                f"rank 0 has made no plan for {self.key} in {WAIT}: it compiles another graph than rank {dist.get_rank()}, or "
                "it failed; see what it said."
            ) from error
        told = json.loads(store.get(self.key))
        if told["graph"] != self.graph:
            raise RuntimeError(
                f"rank {dist.get_rank()} compiles another graph as {self.key} than rank 0: all ranks must run one model."
            )
        return dict(told)

    def write(self, plan: dict[str, Any]) -> None:
        if self.ranks > 1:
            compat.store().set(self.key, json.dumps({**plan, "graph": self.graph}))


def state_of(engine: Engine) -> State:
    """Shards, and the states of the optimiser that holds them: as they are, or as AdamW makes them where none exist yet."""
    params = [p for spec in engine.specs.values() if (p := spec.param()) is not None]
    sizes = {id(p): _local_bytes(p) for p in params}
    trained = [p for p in params if p.requires_grad]
    states, temporaries = engine.supposed_optimizer or (2, 2)
    if engine.supposed_optimizer is None:
        for found in gc.get_objects():
            if not issubclass(type(found), torch.optim.Optimizer):
                continue
            made = [
                t
                for p in trained
                for t in getattr(found, "state", {}).get(p, {}).values()
                if isinstance(t, torch.Tensor)
            ]
            if made:
                return State(
                    sum(sizes.values()), sum(map(_local_bytes, made)), _temporaries(trained, sizes, temporaries)
                )
    total = sum(sizes[id(p)] for p in trained)
    return State(sum(sizes.values()), states * total, _temporaries(trained, sizes, temporaries))


def _temporaries(trained: Sequence[torch.Tensor], sizes: dict[int, int], count: int) -> int:
    """Of one parameter at a time on a CPU, of all where the optimiser steps them together."""
    largest = max((sizes[id(p)] for p in trained), default=0)
    together = any(p.device.type == "cuda" for p in trained)
    return count * (sum(sizes[id(p)] for p in trained) if together else largest)


def _local_bytes(tensor: torch.Tensor) -> int:
    local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    return local.numel() * local.element_size()


def _unknown(value: Any) -> bool:
    leaves = value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(v, torch.SymInt) for v in leaves) or any(
        isinstance(s, torch.SymInt) for v in leaves if isinstance(v, torch.Tensor) for s in v.shape
    )
