"""Plans in a file, so that a later run needs no planning, and refuses one that was made for something else.

A file is JSON: each graph's plan, and what it was made for. A plan holds names of values, which mean nothing in another graph
or under other wishes, and a peak, which means nothing on other ranks, shapes or passes; so all of these are compared, and what
differs is said. A graph that the file does not know yet, such as one of another batch or model, is planned and added.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

import torch
import torch.fx as fx

from dspass.passes.text import print_target, print_value
from dspass.planner.record import Decision, Plan, size_text

log = logging.getLogger(__name__)

_VERSION = 5

#: Of :class:`MadeFor`, what another batch of the same model has otherwise.
OF_BATCH = ("inputs", "constants")

#: What a rank may have otherwise that runs the same graph: its shards are uneven, and so may its devices be.
OF_RANK = (*OF_BATCH, "product")

#: What graphs of one model have otherwise.
OF_GRAPH = ("part", "parameters", *OF_BATCH, "operators", "wishes", "graph")

#: What a hash has to say, where nothing else is said of the graph.
_HASHES = {
    "parameters": "it has collectives for other parameters here.",
    "graph": "other values go into its operators here.",
    "constants": "an argument of its operators that is no tensor, such as the share of a dropout, is another one here.",
}


class PlanError(ValueError):
    """A plan that was saved does not serve this run."""


@dataclass(frozen=True, kw_only=True)
class MadeFor:
    """What a plan depends on. ``part`` says which stage of which schedule a graph is, in a pipeline, and ``parameters`` is a
    hash of the names of those that it has collectives for; the fields behind these are the joint graph's (:func:`described`),
    and the others are the same for all graphs of a run."""

    model: str
    ranks: int
    stage: int
    device: str
    product: str
    passes: tuple[str, ...]
    options: str
    torch: str
    part: str = ""
    parameters: str = ""
    inputs: tuple[str, ...]
    operators: tuple[str, ...]
    wishes: tuple[str, ...]
    graph: str
    constants: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> Self:
        lists = {k: tuple(v) for k, v in said.items() if isinstance(v, list)}
        return cls(**{**said, **lists})

    def differences(self, plans: MadeFor, but: Iterable[str] = ()) -> list[str]:
        """A sentence for each thing, ``but`` some, that a plan was made for and that is otherwise here."""
        found, of_graph = [], False
        for field in fields(self):
            here, there = getattr(self, field.name), getattr(plans, field.name)
            if here == there or field.name in but:
                continue
            if field.name not in _HASHES:
                both = (_only(there, here), _only(here, there)) if isinstance(here, tuple) else (there, here)
                found.append(f"{field.name}: {both[0]} in the plan, {both[1]} here.")
            elif not of_graph:
                found.append(f"{field.name}: {_HASHES[field.name]}")
            of_graph |= field.name in OF_GRAPH and field.name != "part"
        return found


def described(joint: fx.Graph) -> dict[str, Any]:
    """What :class:`MadeFor` holds of a joint graph: types and shapes of its ``inputs``, how many of which ``operators``, what a
    person ``wishes`` to be saved and computed again, and hashes: ``graph`` of what goes into which operator, ``constants`` of
    their other arguments. Some of these are sizes of the batch, so that they have a hash of their own."""
    nodes = [node for node in joint.nodes if node.op != "placeholder"]
    values = [node.meta.get("val") for node in joint.find_nodes(op="placeholder")]
    counts = Counter(print_target(node) for node in nodes if node.op != "output")
    return {
        "inputs": tuple(print_value(value) for value in values if isinstance(value, torch.Tensor)),
        "operators": tuple(f"{count} {target}" for target, count in sorted(counts.items())),
        "wishes": _wishes(nodes),
        "graph": _hash(f"{n.name}={print_target(n)}{[source.name for source in n.all_input_nodes]}" for n in nodes),
        "constants": _hash(
            _constant((n.args, n.kwargs), getattr(n.target, "namespace", "") == "dspass") for n in nodes
        ),
    }


def _wishes(nodes: Iterable[fx.Node]) -> tuple[str, ...]:
    """Where one checkpoint ends and another begins a value is saved, so it counts which ones they are."""
    tagged = [node for node in nodes if "recompute" in node.meta]
    numbers = sorted({node.meta["ac_graph_id"] for node in tagged if "ac_graph_id" in node.meta})
    at = {number: f" in checkpoint {i}" for i, number in enumerate(numbers)}  # torch counts on from graph to graph
    return tuple(
        f"{node.meta['recompute'].name.lower()} {node.name}{at.get(node.meta.get('ac_graph_id'), '')}"
        for node in tagged
    )


def _constant(value: Any, ours: bool) -> str:
    """An argument in words that are the same in every run. Text that operators of ``ours`` take is none: it is the key of a
    parameter that is alive."""
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_constant(v, ours) for v in value)}]"
    if isinstance(value, Mapping):
        return f"[{', '.join(f'{k}={_constant(v, ours)}' for k, v in value.items())}]"
    if isinstance(value, slice):
        return _constant((value.start, value.stop, value.step), ours)
    if isinstance(value, torch.device):
        return value.type
    plain = (bool, int, float, complex, torch.dtype, torch.layout, torch.memory_format)
    if value is None or isinstance(value, plain) or (isinstance(value, str) and not ours):
        return str(value)
    return type(value).__name__


def _hash(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _only(values: tuple[str, ...], others: tuple[str, ...]) -> str:
    """The first of ``values`` that are not among ``others``."""
    own = [v for v in values if v not in others] or [f"{len(values)} of them" if values else "none"]
    return ", ".join(own[:3]) + (", ..." if len(own) > 3 else "")


@dataclass(frozen=True)
class PlanFile:
    """``dspass.plan``."""

    path: str

    def find(
        self,
        wanted: MadeFor,
        budget: int | None,
        outside: Callable[[Decision], tuple[int, int]] | None = None,
        goes_with: Callable[[Plan], bool] = lambda _: True,
    ) -> Plan | None:
        """The plan of a graph; None where the file holds none that ``goes_with`` what is settled already. ``outside`` answers
        what is there beside a graph under a decision, :attr:`Plan.base`, and the most that the optimiser's step takes with it.
        Raises :class:`PlanError` where the file is of another run of this model, where its plan is too large, and where there
        is none and no budget to make one for. Plans of other models may stand beside."""
        entries = self._read()
        for made_for, plan in entries:
            if made_for == wanted and goes_with(plan):
                return self._checked(plan, budget, outside)
        if budget is None and any(made_for == wanted for made_for, _ in entries):
            raise PlanError(
                f"dspass.plan: the plan in {self.path} for these inputs does not go with the one for earlier inputs: other "
                "parameters wait on the host, or its collectives are others. Give dspass.memory_budget to have it "
                "planned anew, or begin with inputs as the run did that wrote the file."
            )
        for made_for, _ in entries:
            different = wanted.differences(made_for, but=OF_GRAPH)
            if different and made_for.model == wanted.model:
                raise self._other(different)
        if budget is None and entries:
            raise self._other(min((wanted.differences(m) for m, _ in entries), key=len))
        if budget is None:
            raise PlanError(
                f"dspass.plan: {self.path} holds no plan, and there is no dspass.memory_budget to make one for. Give a "
                "budget, or the file of an earlier run."
            )
        return None

    def _checked(self, plan: Plan, budget: int | None, outside: Callable[[Decision], tuple[int, int]] | None) -> Plan:
        """``plan`` beside what is there today."""
        made = plan
        if outside is not None:
            base, least = outside(plan.decision)
            plan = replace(plan, base=base, peak=max(plan.peak - plan.base + base, least))
        if budget is None:
            return plan
        if plan.peak > budget:
            beside = (
                f", as {size_text(plan.base)} of parameters, optimiser states and other graphs' values lie beside it, where "
                f"these were {size_text(made.base)} (or the optimiser's step takes more)"
                if made.peak <= budget
                else ""
            )
            raise PlanError(
                f"dspass.plan: the plan in {self.path} takes {size_text(plan.peak)}{beside}, and dspass.memory_budget is "
                f"{size_text(budget)}. Raise the budget, or delete the file to have it planned anew."
            )
        if plan.budget < budget and plan.chosen:
            log.warning(
                "dspass.plan: the plan in %s was made for %s, and dspass.memory_budget is %s now, for which there may be a "
                "faster one. Delete the file to have it planned anew.",
                self.path, size_text(plan.budget), size_text(budget),
            )  # fmt: skip
        return plan

    def _other(self, different: list[str]) -> PlanError:
        return PlanError(
            f"dspass.plan: {self.path} was made for something else. {' '.join(different)} Delete the file, or name another, "
            "and give dspass.memory_budget to have it planned anew."
        )

    def add(self, made_for: MadeFor, plan: Plan) -> None:
        """Write a plan beside the others; the file is replaced at once. One that cannot be written is said in the log: the plan
        serves this run all the same."""
        entries = [{"made_for": m.to_json(), "plan": p.to_json()} for m, p in (*self._read(), (made_for, plan))]
        half = f"{self.path}.{os.getpid()}"
        try:
            os.makedirs(os.path.dirname(os.path.abspath(self.path)), exist_ok=True)
            with open(half, "w", encoding="utf-8") as file:
                json.dump({"version": _VERSION, "graphs": entries}, file, indent=1)
            os.replace(half, self.path)
        except OSError as error:
            log.warning(
                "dspass.plan: %s cannot be written (%s), so that a later run plans anew. Name a file in a folder that this "
                "process may write to, on a disk with room.",
                self.path, error,
            )  # fmt: skip
            with contextlib.suppress(OSError):
                os.remove(half)

    def _read(self) -> list[tuple[MadeFor, Plan]]:
        try:
            with open(self.path, encoding="utf-8") as file:
                said = json.load(file)
            if said["version"] != _VERSION:
                raise ValueError(f"version {said['version']}, where {_VERSION} is read")
            return [(MadeFor.from_json(entry["made_for"]), Plan.from_json(entry["plan"])) for entry in said["graphs"]]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise PlanError(
                f"dspass.plan: {self.path} cannot be read: {error!r}. Delete it, or name another, and give "
                "dspass.memory_budget to have it planned anew."
            ) from error
