"""The planner at work on one joint graph, and one plan for all ranks that run it.

The first of them plans, for it holds the largest shards, and puts its plan into the process group's store, where the others
wait for it. All ranks run one graph, but for a pipeline, where each stage has a plan of its own for the ranks of its data axis.
Dropped: each rank plans and the results are compared. It costs the same work once more on each, and measured or uneven sizes
make ranks differ at the edge of a budget, where different buckets would leave them waiting for each other.

Batches of ranks may differ in their sizes, and a size that is new to one rank is not new to the others, which do not compile
then and could not answer. So ranks agree once on each graph of a model, and what they agree on is which collectives they start
in which order (:mod:`dspass.passes.agreed_order`). With them fixed, a rank plans by itself for every other shape of its inputs:
it runs what was decided dry, takes it where it fits, and else chooses anew what is saved, computed again, held, and which
optimiser states wait on the host, among the choices that leave the collectives as they are. Where none fits, the rank refuses,
and names the shapes: the first batch should be the largest.
Parameters that wait on the host (``offload_param``) are all there when a graph is planned first. A step is planned for several
numbers of them that stay, from none on, each with all other levers, and the fastest that fits is taken; the others come back
before the graph runs, and later plans leave all where they are. The graphs of a model that breaks, and pipeline stages, leave
theirs on the host: what came back for one would take the room that the others were planned in. Dropped: parameters on the host
as a setting of one planner. Copies of shards and gradients change the graphs, their peaks and what hides them.

Dropped: ranks plan together again for the larger shape. The others would have to change what they have compiled in the same
call, which they cannot know without a collective in every call.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.fx as fx

from dspass.between_ranks import everyone_says, key_of, together, wait_for
from dspass.config import Config, ConfigError
from dspass.hosting import host, place, shares, supposing, undecided, withdraw
from dspass.lowering.simulate import GraphSimulator, InductorSimulator
from dspass.lowering.stage_backward import StageBackward
from dspass.optimizers import Optimizers
from dspass.passes import calibration, cost, devices
from dspass.passes.agreed_order import collectives_of, keep_order
from dspass.passes.base import Pass, PassContext, run_passes
from dspass.passes.bucket_gathers import BucketGathers
from dspass.passes.bucket_reductions import BucketReductions
from dspass.passes.kernels import size_of
from dspass.passes.nodes import GATHERED, ROWS_EXPECTED, gather_start, reduce_start
from dspass.passes.offload_saved import OffloadSaved
from dspass.passes.partition import partition
from dspass.passes.prefetch_gathers import PrefetchGathers
from dspass.passes.text import print_value
from dspass.planner.calls import Place, cost_of_stage
from dspass.planner.choices import Choices
from dspass.planner.dry_run import Peak, State, peak_of_step
from dspass.planner.plan import Planner, Split, chooser
from dspass.planner.record import BudgetError, Decision, Plan, Setting, size_text
from dspass.planner.saved import OF_BATCH, OF_RANK, MadeFor, PlanError, PlanFile, described
from dspass.planner.summary import parameters_of
from dspass.planner.values import is_gathered
from dspass.runtime import compat
from dspass.runtime.engine import Engine
from dspass.runtime.params import ParamSpec, lookup
from dspass.runtime.traffic import gather_cost, reduce_cost
from dspass.settings import kind_of, settings_of, state_of, states_bytes, step_bytes, waiting_bytes

#: A graph that reads this share of the parameters that no earlier one does is taken for the last one.
_ALONE = 0.9

#: In how many steps parameters go to the host, or rather come back from it: each is planned for.
_PLACEMENTS = 4


@dataclass(kw_only=True)
class Planning:
    """The planner at work on ``joint``. ``passes`` are those that will run on its two graphs (:func:`scheduled`). The model's
    other graphs hold ``held`` bytes while this one runs, and have ``apart`` bytes of parameters. Of ``earlier`` plans that of
    the same graph for inputs of other shapes is tried first, and several ranks keep to its collectives. ``place`` is that of a
    pipeline's stage, and ``stage_backward`` what its backward will become."""

    joint: fx.GraphModule
    inputs: Any
    num_fwd_outputs: int
    free: Sequence[int]
    engine: Engine
    config: Config
    passes: Sequence[Pass]
    name: str
    patches: Mapping[str, Any]
    held: int = 0
    apart: int = 0
    earlier: Sequence[tuple[MadeFor, Plan]] = ()
    place: Place | None = None
    stage_backward: StageBackward | None = None
    _movable: Sequence[ParamSpec] = field(init=False, default=())  # parameters that a plan may have back from the host
    _agreed: Plan | None = field(init=False, default=None)  # what ranks have agreed on for other shapes
    _prior: Decision | None = field(init=False, default=None)

    def planned(self) -> tuple[fx.GraphModule, fx.GraphModule, Plan, MadeFor]:
        """``joint`` split as a plan says, the plan, and what it is for: one that is read from ``dspass.plan``, or one made for
        ``dspass.memory_budget``. Raises :class:`BudgetError` or :class:`PlanError` on every rank that runs the graph alike, but
        for a graph that ranks have agreed on, where a rank is alone with its shapes."""
        if any(_unknown(n.meta.get("val")) for n in self._sized.graph.nodes):
            raise ConfigError(
                "dspass.memory_budget",
                "it needs sizes that are known when the model is compiled, and here they are dynamic.",
                "Do not compile with dynamic=True, mark no size as dynamic, or pad batches to one size.",
            )
        wanted, ranks = self.config.dspass.memory_budget, together(self.engine)
        budget = budget_bytes(wanted, self.engine, ranks) if wanted is not None else None
        same = [(m, p) for m, p in self.earlier if _serves(m, p, self._made_for, budget)]
        agreed = (p for m, p in same if ranks and m.parameters == self._made_for.parameters)
        self._agreed, self._prior = next(agreed, None), same[-1][1].decision if same else None
        withdraw(self.engine)
        self._movable = undecided(self.engine, self._parameters) if self.place is None else []
        if self._agreed is not None or not ranks:
            graphs, plan = self._made(budget)
        else:
            graphs, plan, theirs = _shared(self._made_for, self._batch, lambda: self._made(budget), ranks)
            if theirs != self._batch:
                place(self.engine, self._movable, plan.decision.parameters_on_host)
                self._movable, self._agreed = [], plan
                graphs, plan = self._made(budget)
        place(self.engine, self._movable, plan.decision.parameters_on_host)
        host(self.engine, plan.decision.states_on_host)
        self.engine.planned_states.update(plan.decision.states_on_host)
        if graphs is None or self._sized is not self.joint:
            graphs = self._cut(chooser(plan.decision), self.joint)
        return *graphs, plan, self._made_for

    @functools.cached_property
    def _sized(self) -> fx.GraphModule:
        """The joint graph with as many rows at experts as are expected. A plan goes by names of nodes, and serves both."""
        return compat.as_expected(self.joint, ROWS_EXPECTED) or self.joint

    @functools.cached_property
    def _made_for(self) -> MadeFor:
        return _made_for(self.joint.graph, self.engine, self.config, self.passes, self.place)

    @functools.cached_property
    def _batch(self) -> list[str]:
        return _batch(self.joint.graph, self.free)

    @functools.cached_property
    def _parameters(self) -> list[ParamSpec]:
        """Those that the graph gathers, each once."""
        placeholders = self.joint.graph.find_nodes(op="placeholder")
        return list(dict.fromkeys(lookup(n.meta[GATHERED][0]) for n in placeholders if GATHERED in n.meta))

    @property
    def _on_host(self) -> tuple[str, ...]:
        """The parameters that wait on the host by a plan. Where none may say so (graph breaks, pipelines) these are none."""
        decided = {*self.engine.placed, *self.engine.placing, *(spec.name for spec in self._movable)}
        return tuple(spec.name for spec in self._parameters if spec.on_host and spec.name in decided)

    def _made(self, budget: int | None) -> tuple[Split | None, Plan]:
        """The plan of the file, or a new one with its graphs, which is added to the file."""
        path = self.config.dspass.plan
        file = PlanFile(_file_of(path, self.place)) if path is not None else None
        if self._agreed is not None:
            budget = self._agreed.budget
        read = self._read(file, budget) if file is not None else None
        if read is not None:
            return None, read
        assert budget is not None
        graphs, plan = self._fastest_placement(budget)
        ranks = together(self.engine)
        is_first = not ranks or dist.get_rank() == ranks[0]
        if file is not None and is_first and self.engine.target is None:  # not a prediction
            file.add(self._made_for, plan)
        return graphs, plan

    def _read(self, file: PlanFile, budget: int | None) -> Plan | None:
        try:
            return file.find(self._made_for, budget, self._outside, self._goes_with)
        except PlanError:
            if self.engine.target is None or budget is None:
                raise
            return None  # a prediction may be for other ranks and devices than the run that has the file

    def _goes_with(self, read: Plan) -> bool:
        """Whether a plan of the file goes with what is settled: collectives, and where parameters are."""
        away = set(read.decision.parameters_on_host)
        is_there = away <= {s.name for s in self._movable} if self._movable else away == set(self._on_host)
        return is_there and (self._agreed is None or read.collectives == self._agreed.collectives)

    def _fastest_placement(self, budget: int) -> tuple[Split, Plan]:
        found: list[tuple[Split, Plan]] = []
        refusals: list[BudgetError] = []
        for away in _growing(self._movable):
            with supposing(self.engine, self._movable, away):
                try:
                    found.append(self._fastest(budget))
                except BudgetError as error:
                    refusals.append(error)
                    continue
            if found[-1][1].chosen == 0:
                break  # with more on the host no step is faster than the fastest with these
        if not found:
            raise min(refusals, key=lambda refusal: refusal.smallest)
        return min(found, key=lambda one: one[1].frontier[one[1].chosen].seconds)

    def _fastest(self, budget: int) -> tuple[Split, Plan]:
        """The fastest step that fits, with parameters on the host as they are, or are supposed to be."""
        engine, on = self.engine, devices.planned_for(kind_of(self.engine))
        optimizers = Optimizers(engine)
        state, states, here, gradients = self._beside(optimizers)
        exposed = _exposed_share(self._sized.graph, on)
        settings = settings_of(
            self._sized.graph, engine, self.config, self.passes, states, optimizers, on, exposed
        )  # fmt: skip
        graphs, plan = Planner(
            budget=budget,
            find=functools.partial(self._choices, on, exposed),
            split=self._cut,
            passes=self._run_passes,
            run=functools.partial(self._peak, _simulator(engine, self.patches), state, gradients),
            seconds=functools.partial(self._seconds, on),
            settings=_with_buckets(settings, self._agreed),
            collectives=_collectives if together(engine) else None,
            agreed=self._agreed.collectives if self._agreed is not None else None,
            share=self._share(state, here),
            scale=on.steps.get(_model_key(self._made_for), 1.0),
            runs=engine.accumulation_steps * (self.place.schedule.micro_batches if self.place is not None else 1),
            **(_words(self.place, engine) | (_words_alone(self._batch) if self._agreed is not None else {})),
        ).plan()
        decision = replace(plan.decision, parameters_on_host=self._on_host)
        return graphs, replace(
            plan,
            decision=decision,
            parameters=here,
            base=self._outside(decision)[0],
            classes=(*parameters_of([s for s in self._parameters if s.on_host]), *plan.classes),
        )

    def _choices(
        self,
        on: devices.Device,
        exposed: float,
        graph: fx.Graph,
        inside: Sequence[fx.Node],
        at_hand: frozenset[fx.Node],
        unplanned: compat.Unplanned,
    ) -> Choices:
        gathers = self.engine.lifetimes == 3
        return Choices(
            joint=graph,
            inside=inside,
            free=at_hand,
            unplanned=unplanned,
            num_fwd_outputs=self.num_fwd_outputs,
            on=on,
            gathers=gathers,
            regather=exposed if gathers else 0.0,
            levers=tuple(self.passes),
            prior=self._agreed.decision if self._agreed is not None else self._prior,
            in_flight=self.place.in_flight if self.place is not None else 1,
        )

    def _peak(
        self, simulator: Any, state: State, gradients: int, forward: fx.GraphModule, backward: fx.GraphModule
    ) -> Peak:
        """Of a step of both, run dry."""
        if self.place is None:
            return peak_of_step(forward, backward, self.num_fwd_outputs, self.engine, state, simulator)
        cost_of = cost_of_stage(
            forward, backward, self.num_fwd_outputs, self.engine, simulator,
            activations=self.place.activations,
            micro_batches=self.place.schedule.micro_batches,
            stage_backward=self.stage_backward.anew() if self.stage_backward is not None else None,
        )  # fmt: skip
        return self.place.peak(cost_of, state, gradients)

    def _seconds(self, on: devices.Device, forward: fx.GraphModule, backward: fx.GraphModule) -> float:
        halves = [_seconds(cost.estimate(half.graph, on), self.engine, self.place) for half in (forward, backward)]
        return sum(halves) + cost.holding_seconds(forward.graph, on)

    def _share(self, state: State, here: int) -> float:
        """Of what the budget leaves: that of this graph's ``here`` bytes of parameters in those of the graphs that are not
        planned yet."""
        planned = self.place.planned_bytes if self.place is not None else self.apart
        share = here / max(state.parameters - planned, here) if here else 1.0
        return share if share < _ALONE else 1.0

    def _cut(self, choose: compat.Chooser, of: fx.GraphModule | None = None) -> Split:
        of = of or self._sized
        fresh = compat.graph_module(of, copy.deepcopy(of.graph))
        return partition(fresh, self.inputs, self.num_fwd_outputs, self.free, choose=choose)

    def _run_passes(self, forward: fx.GraphModule, backward: fx.GraphModule, bucket_bytes: int | None) -> Split:
        chosen, target = in_buckets(self.passes, bucket_bytes), self.engine.target
        halves = (
            run_passes(forward, chosen, PassContext(graph=self.name, where="forward", target=target)),
            run_passes(backward, chosen, PassContext(graph=self.name, where="backward", target=target)),
        )
        if self._agreed is not None:
            for half, order in zip(halves, self._agreed.collectives, strict=True):
                keep_order(half.graph, order)
        return halves

    def _beside(self, optimizers: Optimizers) -> tuple[State, dict[str, int], int, int]:
        """What lies beside this graph, and states by parameter; bytes of its own parameters, and of gradients."""
        engine = self.engine
        state, states = state_of(engine, optimizers), states_bytes(engine, optimizers)
        here, gradients = _of_this_graph(self._sized.graph, self.num_fwd_outputs, self.free)
        if self.place is None:
            state = replace(state, elsewhere=self.held + max(state.trained - gradients, 0), here=here)
        if engine.accumulation_steps > 1:
            own = state.trained if self.place is not None else gradients + waiting_bytes(engine)
            state = replace(state, accumulated=own)
        return state, states, here, gradients

    def _outside(self, decision: Decision) -> tuple[int, int]:
        """What is there beside the graph under a decision, and the most that the optimiser's step takes with it."""
        with supposing(self.engine, self._movable, decision.parameters_on_host):
            optimizers = Optimizers(self.engine)
            state, states, _, gradients = self._beside(optimizers)
            away = decision.states_on_host
            base = state.bytes - sum(states.get(name, 0) for name in away)
            trained = [p for p in self.engine.params().values() if p.requires_grad]
            return base + state.accumulated, base + gradients + step_bytes(self.engine, optimizers, trained, away)


def _seconds(found: cost.Estimate, engine: Engine, place: Place | None) -> float:
    """Of one run of a graph; what a pipeline's call waits for once is shared by its micro-batches."""
    if place is None:
        return found.seconds
    once: set[Any] = {gather_start} if engine.lifetimes < 3 else set()
    once |= {reduce_start} if engine.lifetimes < 2 else set()
    shared = sum(seconds for node, seconds in found.waits.items() if node.target in once)
    return found.seconds - shared * (1 - 1 / place.schedule.micro_batches)


def in_buckets(passes: Sequence[Pass], bucket_bytes: int | None) -> tuple[Pass, ...]:
    """``passes`` with buckets of so many bytes, where a plan says how many."""
    if bucket_bytes is None:
        return tuple(passes)
    buckets = (BucketGathers, BucketReductions)
    return tuple(replace(p, bucket_bytes=bucket_bytes) if isinstance(p, buckets) else p for p in passes)


def refine(made_for: MadeFor, plan: Plan, measured_seconds: float) -> None:
    """Keep with the calibration of this device what a plan's steps took over what was predicted: later predictions for the
    model are multiplied by it. Without a calibration, and on other ranks than the one that plans, nothing is kept."""
    if made_for.device in ("cpu", "cuda") and (not dist.is_initialized() or dist.get_rank() == 0):
        ratio = measured_seconds * plan.scale / plan.seconds
        calibration.note_step(made_for.device, devices.product_of(made_for.device), _model_key(made_for), ratio)


def _model_key(made_for: MadeFor) -> str:
    return f"{made_for.model} {made_for.graph}, {made_for.ranks} ranks"


def scheduled(passes: Sequence[Pass], engine: Engine) -> tuple[Pass, ...]:
    """``passes`` under a budget: gathers and copies start as late as the device hides them, where it computes meanwhile."""
    on = devices.tabled(kind_of(engine))  # the same on all ranks, whatever was measured where
    if not on.overlaps:
        return tuple(passes)
    return tuple(
        replace(p, hidden_by=on)
        if isinstance(p, OffloadSaved) or (isinstance(p, PrefetchGathers) and p.distance)
        else p
        for p in passes
    )


def budget_bytes(budget: int | str, engine: Engine, ranks: Sequence[int] = ()) -> int:
    """``dspass.memory_budget`` in bytes: a share (``"75%"``) is of the device, ``"auto"`` leaves a tenth of it. Of several
    ``ranks``, which run one plan, it is of the smallest of their devices.

    Raises :class:`ConfigError` on all of them for more than that has."""
    device = kind_of(engine)
    if isinstance(budget, int) and (not _has_limit(device) or engine.target is not None):
        return budget
    there = engine.capacity
    if there is None:
        mine = devices.capacity(device)
        there = engine.capacity = min(map(int, everyone_says("capacity", engine, ranks, mine))) if ranks else mine
    refuse_beyond(budget, device, there)
    return budget if isinstance(budget, int) else devices.share_of(budget, there)


def refuse_beyond(budget: int | str | None, device: str, there: int | None = None) -> None:
    """Raises :class:`ConfigError` for a budget that the device does not have: what is planned for it would fit nowhere. A
    CPU's memory is not asked for: that of a machine that predicts says nothing of those that will train."""
    if not isinstance(budget, int) or not _has_limit(device):
        return
    there = devices.capacity(device) if there is None else there
    if budget > there:
        raise ConfigError(
            "dspass.memory_budget",
            f"{size_text(budget)} is more than the {size_text(there)} of the device, {device}.",
            'Give at most that, or "auto", which leaves a tenth of it.',
        )


def _has_limit(device: str) -> bool:
    """Whether it is known how much memory a device has, and is its own."""
    return device == "cuda" or devices.tabled(device).memory_bytes > 0


def _of_this_graph(joint: fx.Graph, num_fwd_outputs: int, free: Sequence[int]) -> tuple[int, int]:
    """Bytes of its parameters and buffers as this rank holds them, and of the gradients that it leaves of them.

    ``free`` counts the inputs before a DTensor became its shard and its mesh, which is no tensor."""
    placeholders, mine = joint.find_nodes(op="placeholder"), _held_here(joint, free)
    gradients = joint.find_nodes(op="output")[0].args[0][num_fwd_outputs:]
    away = {n.meta[GATHERED][1] for n in placeholders if GATHERED in n.meta and lookup(n.meta[GATHERED][0]).on_host}
    here = [i for i in mine if placeholders[i].name not in away]
    left = [gradients[i] for i in here if i < len(gradients) and isinstance(gradients[i], fx.Node)]
    return sum(size_of(placeholders[i]) for i in here), sum(map(size_of, left))


def _growing(movable: Sequence[ParamSpec]) -> list[tuple[str, ...]]:
    """What may wait on the host of ``movable``: nothing, then more and more of it, in the end all."""
    params = {spec.name: p for spec in movable if (p := spec.param()) is not None}
    lists = [tuple[str, ...](), *shares(params, 1.0, _PLACEMENTS), tuple(params)]
    return list(dict.fromkeys(lists))


def _held_here(joint: fx.Graph, free: Sequence[int]) -> list[int]:
    """Which placeholders are the rank's parameters and buffers."""
    placeholders = joint.find_nodes(op="placeholder")
    shards = {n.meta[GATHERED][1] for n in placeholders if GATHERED in n.meta}
    tensors = [i for i, n in enumerate(placeholders) if _is_tensor(n) and GATHERED not in n.meta]
    return sorted({*(tensors[i] for i in free), *(i for i, n in enumerate(placeholders) if n.name in shards)})


def _batch(joint: fx.Graph, free: Sequence[int]) -> list[str]:
    """Types and shapes of what is no parameter and no buffer."""
    held = set(_held_here(joint, free))
    return [
        print_value(n.meta["val"])
        for i, n in enumerate(joint.find_nodes(op="placeholder"))
        if i not in held and GATHERED not in n.meta and _is_tensor(n) and not n.name.startswith("tangents")
    ]


def _exposed_share(joint: fx.Graph, on: devices.Device) -> float:
    """The share of the backward's collectives that its compute, two thirds of the step's, does not hide."""
    if not on.overlaps:
        return 1.0
    specs = [lookup(n.meta[GATHERED][0]) for n in joint.find_nodes(op="placeholder") if GATHERED in n.meta]
    gathers = [
        gather_cost([s], "backward", "node" if s.node_axis is not None else None) for s in specs if is_gathered(s)
    ]
    costs = [*(c for c in gathers if c is not None), *(c for s in specs if s.trains for c in reduce_cost([s]))]
    sent = sum(c.bytes / on.link_of(c.span) for c in costs)
    return max(0.0, 1.0 - cost.estimate(joint, on).compute * 2 / 3 / sent) if sent else 0.0


def _words(place: Place | None, engine: Engine) -> dict[str, Any]:
    """How a stage of a pipeline is planned and refused, where a graph is one."""
    if place is None:
        return {}
    assert engine.stages is not None
    others = f" beside {_listed(place.others)}" if place.others else ""
    smaller = "more or smaller micro-batches" if place.schedule.micro_batches > 1 else "micro-batches"
    fewer = ", a schedule with fewer of them in flight (1f1b)" if place.in_flight > place.schedule.ranks else ""
    return {
        "fewest": place.fewest,
        "where": f"on ranks {list(engine.stages.data.ranks)}, as {place}{others} with {place.in_flight} in flight",
        "ways_out": f"use more stages, {smaller}{fewer}, more ranks a stage with a higher ZeRO stage",
    }


def _listed(stages: Mapping[int, Any]) -> str:
    return f"stage{'s' * (len(stages) > 1)} {' and '.join(map(str, sorted(stages)))}"


def _file_of(path: str, place: Place | None) -> str:
    """Stages of a pipeline are planned by processes of their own, each of which writes a file."""
    if place is None:
        return path
    root, extension = os.path.splitext(path)
    return f"{root}.stage{place.stage}{extension}"


def _made_for(joint: fx.Graph, engine: Engine, config: Config, passes: Sequence[Pass], place: Place | None) -> MadeFor:
    placeholders = joint.find_nodes(op="placeholder")
    device = engine.target or next((n.meta["val"].device.type for n in placeholders if _is_tensor(n)), "cpu")
    return MadeFor(
        model=engine.model,
        ranks=dist.get_world_size() if dist.is_initialized() else 1,
        stage=engine.stage,
        device=device,
        product=devices.product_of(device) if device == "cuda" and engine.target is None else "",
        passes=tuple(map(str, passes)),
        options=f"offload_optimizer {config.offload_optimizer} {config.offload_optimizer_ratio:g}, "
        f"offload_param {config.offload_param}, zero_hpz_partition_size {config.zero.zero_hpz_partition_size}, "
        f"expected_imbalance {config.experts.expected_imbalance:g}",
        torch=torch.__version__.split("+")[0],
        part=_part(place, engine, config),
        parameters=_hashed(sorted(lookup(n.meta[GATHERED][0]).name for n in placeholders if GATHERED in n.meta))
        if together(engine)
        else "",
        **described(joint),
    )


def _hashed(said: Sequence[str]) -> str:
    return hashlib.sha256(" ".join(said).encode()).hexdigest()[:16]


def _part(place: Place | None, engine: Engine, config: Config) -> str:
    """Which stage of a pipeline is planned, and how it runs."""
    if place is None:
        return ""
    gathers = ", gathered once a call" if engine.keeps_for_call else ""
    sends = f", {config.quantise.sends} messages" if config.quantise.sends else ""
    return f"{place}{gathers}{sends}"


def _serves(made_for: MadeFor, plan: Plan, wanted: MadeFor, budget: int | None) -> bool:
    """Whether a plan is of the same graph and budget, if for inputs of other shapes, or for a layer that is alike."""
    return budget in (None, plan.budget) and not made_for.differences(wanted, but=(*OF_BATCH, "parameters"))


def _with_buckets(settings: tuple[Setting, ...], agreed: Plan | None) -> tuple[Setting, ...]:
    """The settings with buckets of the agreed size."""
    if agreed is None:
        return settings
    size = agreed.decision.bucket_bytes
    return tuple(s for s in settings if s.bucket_bytes == size) or (Setting(bucket_bytes=size),)


def _collectives(forward: fx.GraphModule, backward: fx.GraphModule) -> tuple[tuple[str, ...], ...]:
    return collectives_of(forward.graph), collectives_of(backward.graph)


def _words_alone(batch: Sequence[str]) -> dict[str, Any]:
    """How a rank is refused that cannot have others plan anew."""
    return {
        "where": f"on rank {dist.get_rank()} with inputs of {', '.join(batch)}, where the collectives stay as all ranks have "
        "agreed on them with their first batch",
        "ways_out": "make the first batch the largest, pad batches to one size, use more ranks, a higher ZeRO stage",
    }


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _shared(
    made_for: MadeFor, batch: list[str], make: Callable[[], tuple[Split | None, Plan]], ranks: Sequence[int]
) -> tuple[Split | None, Plan, list[str]]:
    """The plan of the first of ``ranks``, which ``make`` makes there with its graphs, through the store of the process group,
    and the batch that it was made for; what it raises is raised on all of them."""
    first, rank, store = ranks[0], dist.get_rank(), compat.store()
    key = key_of("plan", first, made_for.model, made_for.part, made_for.graph, made_for.parameters)
    if rank == first:
        told: dict[str, Any] = {"made_for": made_for.to_json(), "batch": batch}
        try:
            graphs, plan = make()
        except Exception as error:
            known = isinstance(error, (BudgetError, PlanError))
            said = {"error": str(error) if known else repr(error), "smallest": getattr(error, "smallest", None)}
            store.set(key, json.dumps({**told, **said, "is_known": known}))
            raise
        store.set(key, json.dumps({**told, "plan": plan.to_json()}))
        return graphs, plan, batch
    here = f"graph {made_for.graph} of {made_for.model} with inputs of {', '.join(batch)}"
    told = wait_for(
        key,
        f"rank {first} has made no plan",
        f"for what rank {rank} compiles, {here}: it compiles another graph, or it failed; see what it said. Where batches of "
        "some sizes alone make another graph, pad them.",
    )
    if "error" in told:
        if not told["is_known"]:
            raise RuntimeError(f"rank {first} could make no plan for {here}: {told['error']}")
        raise PlanError(told["error"]) if told["smallest"] is None else BudgetError(told["error"], told["smallest"])
    differences = made_for.differences(MadeFor.from_json(told["made_for"]), but=OF_RANK)
    if differences:
        raise RuntimeError(
            f"rank {rank} compiles {here} otherwise than rank {first}: all ranks must run one model. {' '.join(differences)}"
        )
    return None, Plan.from_json(told["plan"]), told["batch"]


def _simulator(engine: Engine, patches: Mapping[str, Any]) -> Callable[..., Any]:
    if kind_of(engine) != "cpu" or isinstance(engine.compiler, GraphSimulator):  # as a prediction measures
        return GraphSimulator()
    key = repr(sorted(patches.items()))
    if key not in engine.simulators:
        engine.simulators[key] = InductorSimulator(patches=patches)
    simulator: Callable[..., Any] = engine.simulators[key]
    return simulator


def _unknown(value: Any) -> bool:
    leaves = value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(v, torch.SymInt) for v in leaves) or any(
        isinstance(s, torch.SymInt) for v in leaves if isinstance(v, torch.Tensor) for s in v.shape
    )
