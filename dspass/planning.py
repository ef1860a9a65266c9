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

from dspass.config import Config
from dspass.hosting import host, shares
from dspass.lowering.simulate import GraphSimulator, InductorSimulator
from dspass.passes import calibration, cost, devices
from dspass.passes.base import Pass, PassContext, run_passes
from dspass.passes.bucket_gathers import BucketGathers
from dspass.passes.bucket_reductions import BucketReductions
from dspass.passes.buckets import Item, own_bytes, pack
from dspass.passes.kernels import size_of
from dspass.passes.nodes import GATHERED
from dspass.passes.partition import partition
from dspass.passes.prefetch_gathers import PrefetchGathers
from dspass.passes.text import print_value
from dspass.planner.dry_run import Peak, State, peak_of_step
from dspass.planner.plan import BudgetError, Chooser, Plan, Planner, Setting, Split, chooser
from dspass.planner.saved import MadeFor, PlanError, PlanFile
from dspass.planner.values import is_gathered
from dspass.runtime import compat
from dspass.runtime.engine import Engine
from dspass.runtime.host_states import local_of, parts_of
from dspass.runtime.params import ParamSpec, lookup
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

    def pipeline(forward: fx.GraphModule, backward: fx.GraphModule, bucket_bytes: int | None) -> Split:
        chosen = in_buckets(passes, bucket_bytes)
        return (
            run_passes(forward, chosen, PassContext(graph=name, where="forward", target=engine.target)),
            run_passes(backward, chosen, PassContext(graph=name, where="backward", target=engine.target)),
        )

    if any(_unknown(n.meta.get("val")) for n in joint.graph.nodes):
        raise BudgetError(
            "dspass.memory_budget needs sizes that are known when the model is compiled, and here they are dynamic. Do not "
            "compile with dynamic=True, mark no size as dynamic, or pad batches to one size.",
            0,
        )
    made_for = _made_for(joint.graph, engine, config, passes)
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
        state, states = state_of(engine), states_bytes(engine)
        here, gradients = _of_this_graph(joint.graph, num_fwd_outputs, free)
        state = replace(state, elsewhere=held + max(state.trained - gradients, 0), here=here)
        simulator = InductorSimulator(patches=patches) if _kind(engine) == "cpu" else GraphSimulator()

        def run(forward: fx.GraphModule, backward: fx.GraphModule) -> Peak:
            return peak_of_step(forward, backward, num_fwd_outputs, engine, state, simulator)

        exposed = _exposed_share(joint.graph, on)
        graphs, plan = Planner(
            budget=budget,
            on=on,
            num_fwd_outputs=num_fwd_outputs,
            gathers=engine.stage == 3,
            regather=exposed if engine.stage == 3 else 0.0,
            split=split,
            passes=pipeline,
            run=run,
            seconds=lambda forward, backward: (
                cost.estimate(forward.graph, on).seconds
                + cost.estimate(backward.graph, on).seconds
                + cost.holding_seconds(forward.graph, on)
            ),
            settings=settings_of(joint.graph, engine, config, passes, states, on, exposed),
            levers=tuple(passes),
            scale=on.steps.get(_model_key(made_for), 1.0),
            prior=next((p.decision for m, p in reversed(earlier) if _serves(m, p, made_for, budget)), None),
        ).plan()
        if file is not None and engine.target is None:  # not a prediction
            file.add(made_for, plan)
        return plan

    plan = _shared(made_for, make)
    host(engine, plan.decision.states_on_host)
    forward, backward = graphs or split(chooser(plan.decision))
    return forward, backward, plan, made_for


def in_buckets(passes: Sequence[Pass], bucket_bytes: int | None) -> tuple[Pass, ...]:
    """``passes`` with buckets of so many bytes, where a plan says how many."""
    if bucket_bytes is None:
        return tuple(passes)
    buckets = (BucketGathers, BucketReductions)
    return tuple(replace(p, bucket_bytes=bucket_bytes) if isinstance(p, buckets) else p for p in passes)


def settings_of(
    joint: fx.Graph,
    engine: Engine,
    config: Config,
    passes: Sequence[Pass],
    states: Mapping[str, int],
    on: devices.Device,
    exposed: float,
) -> tuple[Setting, ...]:
    """Sizes of buckets times shares of the ``states`` (bytes by parameter) that may wait on the host.

    Smaller buckets than the passes' own hold less, and take more latencies: all of them where nothing overlaps, else the
    ``exposed`` share. A size that a person wrote is not changed.
    """
    sizes: list[tuple[int | None, float]] = [(None, 0.0)]
    items = [_item(lookup(n.meta[GATHERED][0])) for n in joint.find_nodes(op="placeholder") if GATHERED in n.meta]
    items = [item for item in items if item.kind is not None]
    written = any(p.bucket_bytes is not None for p in passes if isinstance(p, (BucketGathers, BucketReductions)))
    if items and not written:
        own, calls = own_bytes(items), _TRIPS[engine.stage]
        first = len(pack(items))
        for divisor in _SMALLER:
            count = len(pack(items, own // divisor))
            more = calls * (count - first) * on.latency
            if count > first and own // divisor >= _LEAST_BUCKET:
                sizes.append((own // divisor, more if not on.overlaps else more * max(exposed, _HIDDEN_LATENCY)))
    away: list[tuple[str, ...]] = [()]
    allowed = config.offload_optimizer == "cpu" or (config.offload_optimizer is None and on.has_own_memory)
    if allowed and states:
        params = engine.params()
        away += shares({n: params[n] for n in states}, config.offload_optimizer_ratio, _SHARES)
    found = []
    for names in away:
        total = sum(states[n] for n in names)
        if on.host_memory_bytes and total > on.host_memory_bytes:
            continue
        part = part_bytes(engine, names, on)
        seconds = cost.states_seconds(total, on)
        for size, more in sizes:
            found.append(
                Setting(
                    bucket_bytes=size,
                    seconds=more,
                    states=names,
                    states_bytes=total,
                    part_bytes=part,
                    copy_seconds=seconds,
                )
            )
    return tuple(found)


#: How often in a step each parameter's bucket travels, by stage.
_TRIPS = {0: 1, 1: 2, 2: 2, 3: 3}

#: Buckets that are tried are so many times smaller than the passes' own, and no smaller than that.
_SMALLER, _LEAST_BUCKET = (2, 4), 500_000

#: The share of a collective's latency that is taken to count where compute hides it.
_HIDDEN_LATENCY = 0.05

#: In how many steps the states go to the host.
_SHARES = 8


def _item(spec: ParamSpec) -> Item:
    grouped = spec.shard_axis is not None and spec.shard_axis.size > 1
    return Item((spec.name,), (spec.gathered_bytes,), spec.numel, spec.shard_axis if grouped else None)


def part_bytes(engine: Engine, names: Sequence[str], on: devices.Device) -> int:
    """Bytes of the largest part of the named parameters' states that is on the device while the optimiser steps, and of those
    before and after it, which leave and come at the same time where the device can."""
    params, bytes_of = engine.params(), states_bytes(engine, hosted=True)
    parts = parts_of([local_of(params[n]) for n in names], engine.host_states.part_elements)
    largest = max((sum(bytes_of[names[i]] for i in part) for part in parts), default=0)
    return largest * (min(len(parts), 3) if on.overlaps else 1)


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
    away = {n.meta[GATHERED][1] for n in placeholders if GATHERED in n.meta and lookup(n.meta[GATHERED][0]).on_host}
    here = [i for i in mine if placeholders[i].name not in away]
    left = [gradients[i] for i in here if i < len(gradients) and isinstance(gradients[i], fx.Node)]
    return sum(size_of(placeholders[i]) for i in here), sum(map(size_of, left))


def _exposed_share(joint: fx.Graph, on: devices.Device) -> float:
    """The share of the backward's collectives that its compute, two thirds of the step's, does not hide."""
    if not on.overlaps:
        return 1.0
    specs = [lookup(n.meta[GATHERED][0]) for n in joint.find_nodes(op="placeholder") if GATHERED in n.meta]
    gathers = [gather_cost([spec], "backward") for spec in specs if is_gathered(spec)]
    costs = [*(c for c in gathers if c is not None), *(c for s in specs if s.trains for c in reduce_cost([s]))]
    sent = sum(c.bytes / on.link_of(c.group_size) for c in costs)
    return max(0.0, 1.0 - cost.estimate(joint, on).compute * 2 / 3 / sent) if sent else 0.0


def _made_for(joint: fx.Graph, engine: Engine, config: Config, passes: Sequence[Pass]) -> MadeFor:
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
        offload=f"optimizer {config.offload_optimizer} {config.offload_optimizer_ratio:g}, param {config.offload_param}",
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
    """Shards, buffers, and the states of the optimiser that holds them: as they are, or as AdamW makes them if none exist.
    What waits on the host is not counted, but for the part of it that the optimiser steps."""
    root = engine.root() if engine.root is not None else None
    hosted = {id(spec.param()) for spec in engine.specs.values() if spec.on_host}
    params = [p for p in engine.params().values() if id(p) not in hosted]
    sizes = {id(p): _local_bytes(p) for p in params}
    buffers = sum(map(_local_bytes, root.buffers())) if root is not None else 0
    trained = [p for p in params if p.requires_grad]
    _, temporaries = engine.supposed_optimizer or (2, 2)
    away = [name for name, p in engine.params().items() if p in engine.host_states and id(p) not in hosted]
    held = _temporaries(trained, sizes, temporaries)
    if away:
        held += part_bytes(engine, away, devices.tabled(_kind(engine)))
    states = states_bytes(engine)
    return State(sum(sizes.values()) + buffers, sum(states.values()), held, trained=sum(sizes[id(p)] for p in trained))


def states_bytes(engine: Engine, hosted: bool = False) -> dict[str, int]:
    """Bytes of the optimiser's states on the device by parameter, those on the host only if ``hosted``: as they are, or as
    AdamW makes them, or as a prediction supposes."""
    on_host = {id(spec.param()) for spec in engine.specs.values() if spec.on_host}
    trained = {
        name: p
        for name, p in engine.params().items()
        if p.requires_grad and id(p) not in on_host and (hosted or p not in engine.host_states)
    }
    if engine.supposed_optimizer is None:
        for found in gc.get_objects():
            if not issubclass(type(found), torch.optim.Optimizer):
                continue
            state = getattr(found, "state", {})
            made = {
                name: sum(_local_bytes(t) for t in state.get(p, {}).values() if isinstance(t, torch.Tensor))
                for name, p in trained.items()
            }
            if any(made.values()):
                return made
    states, _ = engine.supposed_optimizer or (2, 2)
    return {name: states * _local_bytes(p) for name, p in trained.items()}


def _temporaries(trained: Sequence[torch.Tensor], sizes: dict[int, int], count: int) -> int:
    """Of one parameter at a time on a CPU, of all where the optimiser steps them together."""
    largest = max((sizes[id(p)] for p in trained), default=0)
    together = any(p.device.type == "cuda" for p in trained)
    return count * (sum(sizes[id(p)] for p in trained) if together else largest)


def _local_bytes(tensor: torch.Tensor) -> int:
    local = local_of(tensor)
    return local.numel() * local.element_size()


def _unknown(value: Any) -> bool:
    leaves = value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(v, torch.SymInt) for v in leaves) or any(
        isinstance(s, torch.SymInt) for v in leaves if isinstance(v, torch.Tensor) for s in v.shape
    )
