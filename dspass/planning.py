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
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.fx as fx
from torch.distributed.tensor import DTensor

from dspass.config import Config
from dspass.lowering.simulate import GraphSimulator, InductorSimulator
from dspass.passes import calibration, cost, devices
from dspass.passes.base import Pass, PassContext, run_passes
from dspass.passes.bucket_gathers import BucketGathers
from dspass.passes.kernels import size_of
from dspass.passes.nodes import GATHERED
from dspass.passes.partition import partition
from dspass.passes.prefetch_gathers import PrefetchGathers
from dspass.passes.text import print_value
from dspass.planner.dry_run import Peak, State, peak_of_step
from dspass.planner.plan import BudgetError, Chooser, Plan, Planner, Split, chooser
from dspass.planner.saved import MadeFor, PlanError, PlanFile
from dspass.planner.values import is_gathered
from dspass.runtime import compat
from dspass.runtime.engine import Engine
from dspass.runtime.params import lookup
from dspass.runtime.traffic import gather_cost, reduce_cost

#: How long the other ranks wait for rank 0's plan.
WAIT = timedelta(minutes=10)

#: All ranks plan the same graphs in the same order.
_plans = itertools.count()


def planned(
    joint: fx.GraphModule,
    inputs: Any,
    num_fwd_outputs: int,
    free: Sequence[int],
    engine: Engine,
    config: Config,
    passes: Sequence[Pass],
    name: str,
    patches: Mapping[str, Any],
    held: int = 0,
    earlier: Sequence[tuple[MadeFor, Plan]] = (),
) -> tuple[fx.GraphModule, fx.GraphModule, Plan, MadeFor]:
    """``joint`` split as a plan says, the plan, and what it is for: one that is read from ``dspass.plan``, or one made for
    ``dspass.memory_budget``. ``passes`` are those that will run on the two graphs (:func:`scheduled`), and ``held`` bytes of
    the model's other graphs while this one runs. Of ``earlier`` plans that of the same graph for inputs of other shapes is
    tried first. Raises :class:`BudgetError` or :class:`PlanError` on every rank alike."""

    def split(choose: Chooser) -> Split:
        fresh = compat.graph_module(joint, copy.deepcopy(joint.graph))
        return partition(fresh, inputs, num_fwd_outputs, free, choose=choose)

    def pipeline(forward: fx.GraphModule, backward: fx.GraphModule) -> Split:
        return (
            run_passes(forward, passes, PassContext(graph=name, where="forward", target=engine.target)),
            run_passes(backward, passes, PassContext(graph=name, where="backward", target=engine.target)),
        )

    if any(_unknown(n.meta.get("val")) for n in joint.graph.nodes):
        raise BudgetError(
            "dspass.memory_budget needs sizes that are known when the model is compiled, and here they are dynamic. Do not "
            "compile with dynamic=True, mark no size as dynamic, or pad batches to one size.",
            0,
        )
    made_for = _made_for(joint.graph, engine, passes)
    wanted = config.dspass.memory_budget
    budget = budget_bytes(wanted, engine) if wanted is not None else None
    graphs: Split | None = None

    def make() -> Plan:
        nonlocal graphs
        file = PlanFile(config.dspass.plan) if config.dspass.plan is not None else None
        if file is not None and (read := file.find(made_for, budget)) is not None:
            return read
        assert budget is not None
        on = devices.planned_for(_kind(engine))
        state = state_of(engine)
        here, gradients = _of_this_graph(joint.graph, num_fwd_outputs, free)
        state = replace(state, elsewhere=held + max(state.trained - gradients, 0), here=here)
        simulator = InductorSimulator(patches=patches) if _kind(engine) == "cpu" else GraphSimulator()

        def run(forward: fx.GraphModule, backward: fx.GraphModule) -> Peak:
            return peak_of_step(forward, backward, num_fwd_outputs, engine, state, simulator)

        graphs, plan = Planner(
            budget=budget,
            on=on,
            num_fwd_outputs=num_fwd_outputs,
            gathers=engine.stage == 3,
            regather=_exposed_share(joint.graph, on) if engine.stage == 3 else 0.0,
            split=split,
            passes=pipeline,
            run=run,
            seconds=lambda *graphs: sum(cost.estimate(gm.graph, on).seconds for gm in graphs),
            bucket_bytes=next((p.bucket_bytes for p in passes if isinstance(p, BucketGathers)), None),
            levers=tuple(passes),
            scale=on.steps.get(_model_key(made_for), 1.0),
            prior=next((p.decision for m, p in reversed(earlier) if _serves(m, p, made_for, budget)), None),
        ).plan()
        if file is not None and engine.target is None:  # not a prediction
            file.add(made_for, plan)
        return plan

    plan = _shared(made_for, make)
    forward, backward = graphs or split(chooser(plan.decision))
    return forward, backward, plan, made_for


def refine(made_for: MadeFor, plan: Plan, measured_seconds: float) -> None:
    """Keep with the calibration of this device what a plan's steps took over what was predicted: later predictions for the
    model are multiplied by it. Without a calibration, and on other ranks than the one that plans, nothing is kept."""
    if made_for.device in ("cpu", "cuda") and (not dist.is_initialized() or dist.get_rank() == 0):
        ratio = measured_seconds * plan.scale / plan.seconds
        calibration.note_step(made_for.device, devices.product_of(made_for.device), _model_key(made_for), ratio)


def _model_key(made_for: MadeFor) -> str:
    return f"{made_for.model} {made_for.graph}, {made_for.ranks} ranks"


def scheduled(passes: Sequence[Pass], engine: Engine) -> tuple[Pass, ...]:
    """``passes`` under a budget: gathers start as late as the device hides them, where it computes while it sends."""
    on = devices.tabled(_kind(engine))  # the same on all ranks, whatever was measured where
    return tuple(
        replace(p, hidden_by=on) if isinstance(p, PrefetchGathers) and p.distance and on.overlaps else p for p in passes
    )


def _kind(engine: Engine) -> str:
    return engine.target or next((p.device.type for s in engine.specs.values() if (p := s.param()) is not None), "cpu")


def budget_bytes(budget: int | str, engine: Engine) -> int:
    """``dspass.memory_budget`` in bytes: a share (``"75%"``) is of the device, ``"auto"`` leaves a tenth of it."""
    return budget if isinstance(budget, int) else devices.share_of(budget, devices.capacity(_kind(engine)))


def _of_this_graph(joint: fx.Graph, num_fwd_outputs: int, free: Sequence[int]) -> tuple[int, int]:
    """Bytes of its parameters and buffers as this rank holds them, and of the gradients that it leaves of them."""
    placeholders = joint.find_nodes(op="placeholder")
    shards = {n.meta[GATHERED][1] for n in placeholders if GATHERED in n.meta}
    mine = sorted({*free, *(i for i, n in enumerate(placeholders) if n.name in shards)})
    gradients = joint.find_nodes(op="output")[0].args[0][num_fwd_outputs:]
    left = [gradients[i] for i in mine if i < len(gradients) and isinstance(gradients[i], fx.Node)]
    return sum(size_of(placeholders[i]) for i in mine), sum(map(size_of, left))


def _exposed_share(joint: fx.Graph, on: devices.Device) -> float:
    """The share of the backward's collectives that its compute, two thirds of the step's, does not hide."""
    if not on.overlaps:
        return 1.0
    specs = [lookup(n.meta[GATHERED][0]) for n in joint.find_nodes(op="placeholder") if GATHERED in n.meta]
    gathers = [gather_cost([spec], "backward") for spec in specs if is_gathered(spec)]
    costs = [*(c for c in gathers if c is not None), *(c for s in specs if s.trains for c in reduce_cost([s]))]
    sent = sum(c.bytes / on.link_of(c.group_size) for c in costs)
    return max(0.0, 1.0 - cost.estimate(joint, on).compute * 2 / 3 / sent) if sent else 0.0


def _made_for(joint: fx.Graph, engine: Engine, passes: Sequence[Pass]) -> MadeFor:
    placeholders = joint.find_nodes(op="placeholder")
    nodes = " ".join(f"{n.name}={n.target}" for n in joint.nodes if n.op != "placeholder")
    return MadeFor(
        model=engine.model,
        graph=hashlib.sha256(nodes.encode()).hexdigest()[:16],
        inputs=tuple(print_value(n.meta["val"]) for n in placeholders if isinstance(n.meta.get("val"), torch.Tensor)),
        ranks=dist.get_world_size() if dist.is_initialized() else 1,
        stage=engine.stage,
        device=engine.target or next((n.meta["val"].device.type for n in placeholders if _is_tensor(n)), "cpu"),
        passes=tuple(map(str, passes)),
        torch=torch.__version__.split("+")[0],
    )


def _serves(made_for: MadeFor, plan: Plan, wanted: MadeFor, budget: int) -> bool:
    """Whether a plan is of the same graph and budget, if for inputs of other shapes."""
    return plan.budget == budget and not made_for.differences(wanted, but=("inputs",))


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _shared(made_for: MadeFor, make: Callable[[], Plan]) -> Plan:
    """Rank 0's plan, through the store of the process group; what it raises is raised on every rank."""
    key = f"dspass/plan/{next(_plans)}"
    ranks = dist.get_world_size() if dist.is_initialized() and dist.get_backend() != "fake" else 1
    if ranks == 1:
        return make()
    store = compat.store()
    if dist.get_rank() == 0:
        try:
            plan = make()
        except (BudgetError, PlanError) as error:
            told = {"error": str(error), "smallest": getattr(error, "smallest", None)}
            store.set(key, json.dumps({"made_for": made_for.to_json(), **told}))
            raise
        store.set(key, json.dumps({"made_for": made_for.to_json(), "plan": plan.to_json()}))
        return plan
    try:
        store.wait([key], WAIT)
    except RuntimeError as error:
        raise RuntimeError(
            f"rank 0 has made no plan for {key} in {WAIT}: it compiles another graph than rank {dist.get_rank()}, or "
            "it failed; see what it said."
        ) from error
    told = json.loads(store.get(key))
    if "error" in told:
        raise PlanError(told["error"]) if told["smallest"] is None else BudgetError(told["error"], told["smallest"])
    theirs = MadeFor.from_json(told["made_for"])
    differences = made_for.differences(theirs, but=("inputs",))  # shards are uneven
    if differences:
        raise RuntimeError(
            f"rank {dist.get_rank()} compiles another graph as {key} than rank 0: all ranks must run one model. "
            + " ".join(differences)
        )
    return Plan.from_json(told["plan"])


def state_of(engine: Engine) -> State:
    """Shards, buffers, and the states of the optimiser that holds them: as they are, or as AdamW makes them if none exist."""
    known = [p for spec in engine.specs.values() if (p := spec.param()) is not None]
    root = engine.root() if engine.root is not None else None
    params = list({id(p): p for p in [*known, *(root.parameters() if root is not None else ())]}.values())
    sizes = {id(p): _local_bytes(p) for p in params}
    buffers = sum(map(_local_bytes, root.buffers())) if root is not None else 0
    whole = sum(sizes.values()) + buffers
    trained = [p for p in params if p.requires_grad]
    total = sum(sizes[id(p)] for p in trained)
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
                held = _temporaries(trained, sizes, temporaries)
                return State(whole, sum(map(_local_bytes, made)), held, trained=total)
    return State(whole, states * total, _temporaries(trained, sizes, temporaries), trained=total)


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
