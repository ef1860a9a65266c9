"""Which stages a pipeline has, where they lie and in which order they run: decided once, by rank 0, and told to all.

Costs of the captured graph's nodes are those of one micro-batch. Those of other sizes are taken to be in proportion to their
rows: the planner compares numbers of micro-batches without capturing each. What a rank holds all the time is its parameters, as
the ZeRO stage divides them, with a gradient and two states of an optimiser that trains them.

Under a memory budget the cut sees to it that what is always there fits, with one micro-batch, where a cut does; and a schedule
that is over the budget with all saved is taken to compute again what is too much, first what takes no product, which makes it
slower: so one that holds less is chosen where that is faster in the end. Nothing is refused for its memory here, where sizes
are what eager code saves and the optimiser is a guess: what is smallest is tried, and the planner, which runs each stage on
fake tensors, has the last word.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch.fx as fx

from dspass.config import Config
from dspass.passes import devices
from dspass.passes.captured_cost import NodeCost, costs_of
from dspass.passes.devices import Device
from dspass.planner.schedule_times import Link, StageCost, simulate
from dspass.planner.schedules import NAMES, Choice, choose, make
from dspass.planner.stages import CutError, Cuts, Memory, Stage, cut
from dspass.runtime.axis import Axis
from dspass.runtime.engine import Engine
from dspass.runtime.schedule import Action, Kind, Schedule, ScheduleError, Send, Timeline
from dspass.runtime.sends import Packing
from dspass.settings import kind_of

#: Bytes that a byte of a parameter takes, with its gradient and the states of Adam.
_STATES = 4


@dataclass(frozen=True, kw_only=True)
class Staging:
    """``stages_of`` are the stages that read each parameter, by the model's names; ``known`` has the stage of each node of the
    graph that was cut, by name. The rest is for the report."""

    schedule: Schedule
    micro_batches: int
    stages_of: Mapping[str, frozenset[int]]
    known: Mapping[str, int]
    predicted: Timeline | None = None
    costs: tuple[StageCost, ...] = ()
    """Of each stage, for one of ``micro_batches``."""
    links: tuple[Link, ...] = ()
    """Of each cut."""
    overlaps: bool = True
    """Whether messages run beside compute."""
    why: tuple[str, ...] = ()
    table: str = ""

    def schedule_of(self, count: int) -> Schedule:
        """The same schedule for another number of micro-batches."""
        if count == self.schedule.micro_batches:
            return self.schedule
        return make(self.schedule.name, self.schedule.ranks, count, self.schedule.virtual_stages)

    def timeline(self, schedule: Schedule) -> Timeline:
        """When each rank does what in another schedule of these stages, for micro-batches of the same size."""
        return simulate(schedule, self.costs, self.links, overlaps=self.overlaps)

    def sent_bytes(self, schedule: Schedule) -> tuple[int, ...]:
        """What each rank sends to its neighbours in :meth:`timeline`."""
        sent = [0] * schedule.ranks
        for rank in range(schedule.ranks):
            for step in schedule.steps(rank):
                if isinstance(step, Send):
                    sent[rank] += self.links[min(step.source, step.destination)].sent(step.direction)
        return tuple(sent)

    def keys(self, engine: Engine) -> dict[str, frozenset[int]]:
        """``stages_of`` by the keys of this rank's engine."""
        return {f"{engine.name}/{name}": stages for name, stages in self.stages_of.items()}


def packing_of(config: Config) -> Packing | None:
    """How messages between stages are quantised, if they are."""
    own = config.quantise
    return Packing(format=own.sends, block=own.block) if own.sends is not None else None


def forward_only(schedule: Schedule, count: int) -> Schedule:
    """Forwards alone on the same stages: on each rank in rounds of as many micro-batches as there are ranks."""
    rows = []
    for rank in range(schedule.ranks):
        actions = [Action(Kind.FORWARD, s, i) for s in schedule.stages_of(rank) for i in range(count)]
        rows.append(tuple(sorted(actions, key=lambda a: (a.micro_batch // schedule.ranks, a.stage, a.micro_batch))))
    return Schedule("forward only", schedule.ranks, schedule.stages, count, schedule.rank_of, tuple(rows))


@dataclass(kw_only=True, eq=False)
class Prices:
    """What stages of ``gm`` cost, captured with one of ``count`` micro-batches, wherever they lie: each method is one of
    :func:`dspass.planner.schedules.choose`'s costs. ``costs`` are those of its nodes ``on`` a device, ``divided`` the ranks of
    the data axis that parameters and states are divided over. Cuts go by ``boundaries`` and by ``budget_bytes`` of each rank,
    where there are any."""

    gm: fx.GraphModule
    costs: Mapping[fx.Node, NodeCost]
    on: Device
    count: int
    divided: int = 1
    packing: Packing | None = None
    boundaries: Sequence[str] | None = None
    budget_bytes: int | None = None
    _cuts: dict[tuple[int, ...], Cuts] = field(default_factory=dict)

    def cut(self, rank_of: tuple[int, ...]) -> Cuts:
        """Raises ``CutError``, which is a ``ValueError``."""
        if rank_of not in self._cuts:
            self._cuts[rank_of] = self._cut(rank_of)
        return self._cuts[rank_of]

    def _cut(self, rank_of: tuple[int, ...]) -> Cuts:
        cut_within = functools.partial(
            cut, self.gm, len(rank_of), self.costs, self.on,
            micro_batches=self.count, rank_of=rank_of, boundaries=self.boundaries, packing=self.packing,
        )  # fmt: skip
        if self.budget_bytes is not None:
            memory = Memory(limit=self.budget_bytes, states=_STATES / self.divided)
            with contextlib.suppress(CutError):  # of what may not fit, the best is tried
                return cut_within(memory=memory, in_flight=[1] * len(rank_of))
        return cut_within()

    def saving(self, rank_of: tuple[int, ...], micro_batches: int) -> tuple[list[StageCost], list[Link]]:
        """Of stages that save all that their backwards read."""
        return stage_costs(self.cut(rank_of), self.on, self.count / micro_batches, self.divided)

    def light_again(self, rank_of: tuple[int, ...], micro_batches: int) -> tuple[list[StageCost], list[Link]]:
        """Of stages that compute again what takes no product."""
        found, links = self.saving(rank_of, micro_batches)
        made = zip(found, self.cut(rank_of).stages, strict=True)
        return [_light_again(cost, stage, self.count / micro_batches) for cost, stage in made], links

    def all_again(self, rank_of: tuple[int, ...], micro_batches: int) -> tuple[list[StageCost], list[Link]]:
        """Of stages that save what arrives alone."""
        found, links = self.light_again(rank_of, micro_batches)
        return [_all_again(cost, links[s - 1] if s else None) for s, cost in enumerate(found)], links


def plan_stages(
    gm: fx.GraphModule,
    config: Config,
    engine: Engine,
    pipe: Axis,
    batch: int,
    count: int,
    trains: bool,
    budget_bytes: int | None = None,
) -> Staging:
    """Cut ``gm``, captured with one of ``count`` micro-batches of a ``batch``, and choose the schedule.

    Raises ``CutError`` where it cannot be cut so, ``ScheduleError`` where there is no such schedule. ``budget_bytes`` of each
    rank decides what is fastest, and refuses nothing.
    """
    pipeline = config.pipeline
    on = devices.tabled(kind_of(engine))
    costs = costs_of(gm, on)  # of a step that trains, also where the first call does not
    divided = max(engine.stages.data.size, 1) if engine.stages is not None and engine.stage else 1

    prices = Prices(
        gm=gm, costs=costs, on=on, count=count, divided=divided, packing=packing_of(config), boundaries=pipeline.boundaries,
        budget_bytes=budget_bytes,
    )  # fmt: skip
    virtual = pipeline.virtual_stages
    if virtual is None and pipeline.boundaries is not None and (len(pipeline.boundaries) + 1) % pipe.size == 0:
        virtual = (len(pipeline.boundaries) + 1) // pipe.size
    named = pipeline.schedule != "auto"
    if named and virtual is None:
        virtual = make(pipeline.schedule, pipe.size, pipeline.micro_batches or 2 * pipe.size).virtual_stages
    if named and pipeline.micro_batches is not None:
        make(pipeline.schedule, pipe.size, pipeline.micro_batches, virtual)  # its own words for why not
    if pipeline.boundaries is not None:
        prices.cut(tuple(range(pipe.size)) * (virtual or 1))  # whose own words name the boundary, wherever stages lie
    chosen = functools.partial(
        choose,
        pipe.size,
        prices.saving,
        batch=batch,
        micro_batches=pipeline.micro_batches,
        names=(pipeline.schedule,) if named else NAMES,
        virtual_stages=virtual,
        again=(prices.light_again, prices.all_again) if trains else (),
        overlaps=on.overlaps,
    )
    try:
        choice = chosen(budget_bytes=budget_bytes)
    except ScheduleError as error:
        if error.smallest is None:
            raise
        choice = chosen(budget_bytes=error.smallest)
    _, links = prices.saving(choice.schedule.rank_of, choice.schedule.micro_batches)
    return _staging(prices.cut(choice.schedule.rank_of), choice, choice.costs, links, on.overlaps)


def _staging(cuts: Cuts, choice: Choice, costs: Sequence[StageCost], links: Sequence[Link], overlaps: bool) -> Staging:
    stages_of: dict[str, frozenset[int]] = {}
    for stage in cuts.stages:
        for name in stage.parameters:
            stages_of[name] = stages_of.get(name, frozenset()) | {stage.index}
    return Staging(
        schedule=choice.schedule,
        micro_batches=choice.schedule.micro_batches,
        stages_of=stages_of,
        known={node.name: stage for node, stage in cuts.stage_of.items()},
        predicted=choice.timeline,
        costs=tuple(costs),
        links=tuple(links),
        overlaps=overlaps,
        why=cuts.why,
        table=choice.table(),
    )


def _light_again(cost: StageCost, stage: Stage, rows: float) -> StageCost:
    """A stage that saves nothing that it can make again without products."""
    working = int(rows * stage.most_light_bytes)
    return _again(cost, rows * stage.light, int(rows * stage.light_bytes), working)


def _all_again(light: StageCost, arrives: Link | None) -> StageCost:
    """A stage that saves what arrives alone, where something does, and runs its forward once more in its backward. ``light``
    saves nothing light."""
    freed = light.saved_bytes - (min(light.saved_bytes, arrives.forward_bytes) if arrives is not None else 0)
    return _again(light, light.forward, freed, freed)


def _again(cost: StageCost, seconds: float, freed: int, working: int) -> StageCost:
    """A stage that saves ``freed`` bytes less, and in its backward takes ``seconds`` and ``working`` bytes more for them. Of a
    backward that is split the first half that does anything computes again. That is the second where no gradients are wanted
    of what arrives, as in the first stage, which then need not hold what it computes again; others hold gradients and operands
    of products all the same."""
    is_first = cost.input > 0
    return replace(
        cost,
        backward=cost.backward + seconds,
        input=cost.input + (seconds if is_first else 0.0),
        weight=cost.weight + (0.0 if is_first else seconds),
        saved_bytes=cost.saved_bytes - freed,
        held_bytes=cost.held_bytes - (0 if is_first else freed),
        working_bytes=cost.working_bytes + working,
    )


def stage_costs(cuts: Cuts, on: Device, rows: float, divided: int) -> tuple[list[StageCost], list[Link]]:
    """Of stages and cuts, for micro-batches of ``rows`` times those that were captured. What travels in few bits takes a pass
    over memory as well, of which each end has one."""
    stages = [
        StageCost(
            forward=rows * s.forward,
            backward=rows * (s.input_gradient + s.weight_gradient),
            input=rows * s.input_gradient,
            weight=rows * s.weight_gradient,
            saved_bytes=int(rows * s.saved_bytes),
            held_bytes=int(rows * s.held_bytes),
            static_bytes=_STATES * s.parameter_bytes // divided,
        )
        for s in cuts.stages
    ]
    links = []
    for c in cuts.cuts:
        forward, backward = (
            on.latency + rows * sent / on.link + (on.moving(rows * (whole + sent)) if sent < whole else 0.0)
            for whole, sent in ((c.bytes, c.sent_bytes), (c.gradient_bytes, c.sent_gradient_bytes))
        )
        links.append(
            Link(
                forward=forward,
                backward=backward,
                forward_bytes=int(rows * c.bytes),
                backward_bytes=int(rows * c.gradient_bytes),
                forward_sent=int(rows * c.sent_bytes),
                backward_sent=int(rows * c.sent_gradient_bytes),
            )
        )
    return stages, links


__all__ = ["Prices", "Staging", "forward_only", "packing_of", "plan_stages", "stage_costs"]
