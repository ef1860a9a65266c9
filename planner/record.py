"""What a plan is: a decision, what it takes, and between what it was made; and how it is refused. Plans are saved as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from dspass.planner.dry_run import Peak
from dspass.planner.schedule_times import StageCost


class BudgetError(RuntimeError):
    """No plan fits into the memory budget. ``smallest`` is one that works, in bytes: the least peak, rounded up. Of a
    pipeline's stage ``stage`` has what a micro-batch takes in that, on the rank that planned. ``alone``: other ranks do not
    plan meanwhile, and hear nothing of it."""

    def __init__(self, message: str, smallest: int, stage: StageCost | None = None, alone: bool = False) -> None:
        super().__init__(message)
        self.smallest, self.stage, self.alone = smallest, stage, alone


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is chosen for the whole step: ``bucket_bytes`` of collectives (None: the passes' own choice), which lasts
    ``seconds`` longer than the first setting's; and the parameters whose ``states`` wait on the host, of ``states_bytes``,
    which come and go in ``copy_seconds`` of a step. By them the optimiser's step holds ``part_bytes`` more: a part comes, but
    where it is stepped in place of all together, its temporaries are fewer, so the sum may be negative."""

    bucket_bytes: int | None = None
    seconds: float = 0.0
    states: tuple[str, ...] = ()
    states_bytes: int = 0
    part_bytes: int = 0
    copy_seconds: float = 0.0

    def bytes(self, peak: Peak) -> int:
        """A rank's peak, where ``peak`` is that of a step with all states on the device."""
        return peak.base - self.states_bytes + max(peak.graph, peak.floor + self.part_bytes)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What a candidate says, by names of the joint graph's nodes: what is saved, what is computed again, and, of what is saved,
    the whole parameters whose copies are kept from the forward to the backward, and pairs of a value and the pass that holds
    it in its way; bytes of a bucket, the parameters whose optimiser states wait on the host, and those that do themselves."""

    saved: tuple[str, ...]
    recomputed: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    held: tuple[tuple[str, str], ...] = ()
    bucket_bytes: int | None = None
    states_on_host: tuple[str, ...] = ()
    parameters_on_host: tuple[str, ...] = ()

    @property
    def holders(self) -> str:
        """How many values passes hold, and which: ``5 values by offload_saved``, ``9 values, 5 by offload_saved and 4 by
        quantise_saved``."""
        counts = sorted(Counter(by for _, by in self.held).items())
        values = f"{len(self.held)} value{'s' * (len(self.held) != 1)}"
        if len(counts) == 1:
            return f"{values} by {counts[0][0]}"
        return f"{values}, {' and '.join(f'{count} by {name}' for name, count in counts)}"

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> Self:
        lists = {k: tuple(v) for k, v in said.items() if isinstance(v, list)}
        return cls(**{**said, **lists, "held": tuple((name, by) for name, by in said["held"])})


@dataclass(frozen=True, kw_only=True)
class Option:
    """A point of the frontier: the peak of a step, seconds of a forward and backward with their share of what a step has to
    copy (all of it where there is no accumulation), and bytes from the forward to the backward. ``is_measured``: the
    peak is a dry run's, not the corrected model's."""

    peak: int
    seconds: float
    saved_bytes: int
    is_measured: bool


@dataclass(frozen=True, kw_only=True)
class Tensors:
    """The values of one operator, or one value: how many, bytes that are saved or kept, bytes that are not, and bytes of those
    that a pass holds in its way, such as on the host; the seconds that computing or gathering again takes (of a class, what is
    not kept; None of a value that has to be saved), and those that what is not decided so would take: ``kept_again_seconds``
    of what is saved or held, but for ``fixed`` bytes that have to be, and by pass those of values that could be held in its
    way, if compute hid none of its copies."""

    name: str
    count: int
    kept: int
    dropped: int
    again_seconds: float | None
    held: int = 0
    held_by: str = ""
    kept_again_seconds: float = 0.0
    fixed: int = 0
    otherwise: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What was decided for one graph, and between what. ``held_bytes`` are those of values that passes hold in their ways, and
    ``between`` the bytes on the device from its forward to its backward; ``seconds`` are the cost model's for both with their
    collectives, times ``scale``, which measured steps gave; ``states_bytes`` of optimiser states wait on the host, and take
    ``states_seconds`` of a step to come and go; ``frontier`` is ordered from the fastest to the smallest, its seconds hold all
    of this but the optimiser's own, and ``chosen`` is its index. ``parameters`` are the bytes that the graph reads of them,
    and ``base`` those that the peak counts of what lies beside the graph: all parameters, states and what other graphs hold.
    Of a pipeline's stage the bytes that are saved, kept and held are a micro-batch's, as ``stage`` has them; the peak is the
    rank's, with its stages that were planned before, in a whole call. ``collectives`` are those of forward and backward, in
    order."""

    decision: Decision
    saved_bytes: int
    kept_bytes: int
    held_bytes: int
    seconds: float
    again_seconds: float
    peak: int
    between: int
    budget: int
    frontier: tuple[Option, ...]
    chosen: int
    classes: tuple[Tensors, ...]
    largest: tuple[Tensors, ...]
    scale: float = 1.0
    states_bytes: int = 0
    states_seconds: float = 0.0
    parameters: int = 0
    base: int = 0
    stage: StageCost | None = None
    collectives: tuple[tuple[str, ...], ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> Self:
        """Raises ``KeyError`` or ``TypeError`` where ``said`` has another form."""
        decision = Decision.from_json(said["decision"])
        stage = StageCost(**said["stage"]) if said.get("stage") is not None else None
        records = {"frontier": Option, "classes": Tensors, "largest": Tensors}
        return cls(
            **{
                **said,
                "decision": decision,
                "stage": stage,
                "collectives": tuple(map(tuple, said["collectives"])),
                **{k: tuple(kind(**o) for o in said[k]) for k, kind in records.items()},
            }
        )

    def __str__(self) -> str:
        decision = self.decision
        kept = f", {size_text(self.kept_bytes)} of gathered copies kept" if self.kept_bytes else ""
        again = f", {len(decision.recomputed)} computed again in {self.again_seconds * 1e3:.3g} ms"
        held = f", {size_text(self.held_bytes)} in {decision.holders}" if decision.held else ""
        states = (
            f", {size_text(self.states_bytes)} of optimiser states on the host in {self.states_seconds * 1e3:.3g} ms a step"
            if self.states_bytes
            else ""
        )
        buckets = f", buckets of {size_text(decision.bucket_bytes)}" if decision.bucket_bytes else ""
        return (
            f"{size_text(self.saved_bytes - self.kept_bytes)} saved in {len(decision.saved)} values{held}{again}{kept}{states}"
            f"{buckets}; peak {size_text(self.peak)} of {size_text(self.budget)}"
        )


def size_text(count: float) -> str:
    """``1.23 GB``: powers of 1000, as budgets are written."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= factor:
            return f"{count / factor:.4g} {unit}"
    return f"{count:.0f} B"


def rounded_up(count: int) -> int:
    """To four digits, as :func:`size_text` says it: a person who gives what an error says must not be refused again."""
    unit = 10 ** max(len(str(count)) - 4, 0)
    return -(-count // unit) * unit
