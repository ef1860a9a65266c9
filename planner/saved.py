"""Plans in a file, so that a later run needs no planning, and refuses one that was made for something else.

A file is JSON: what its plans were made for, and each graph's plan. A plan holds names of values, which mean nothing in another
graph, and a peak, which means nothing on other ranks, shapes or passes; so all of these are compared, and what differs is said.
A graph of the same model that the file does not know yet, such as one of another batch, is planned and added.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from dspass.planner.record import Plan, size_text

_VERSION = 3


class PlanError(ValueError):
    """A plan that was saved does not serve this run."""


@dataclass(frozen=True, kw_only=True)
class MadeFor:
    """What a plan depends on. ``graph`` is a hash of the joint graph's operators, ``parameters`` one of the names of those that
    it has collectives for, ``inputs`` are its types and shapes, and ``part`` says which stage of which schedule it is, in a
    pipeline; the others are the same for all graphs of a run."""

    model: str
    ranks: int
    stage: int
    device: str
    passes: tuple[str, ...]
    offload: str
    torch: str
    graph: str
    inputs: tuple[str, ...]
    part: str = ""
    parameters: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> Self:
        return cls(**{**said, "passes": tuple(said["passes"]), "inputs": tuple(said["inputs"])})

    def differences(self, plans: MadeFor, but: tuple[str, ...] = ()) -> list[str]:
        """A sentence for each thing, ``but`` some, that a plan was made for and that is otherwise here."""
        found = []
        for field in fields(self):
            here, there = getattr(self, field.name), getattr(plans, field.name)
            if here == there or field.name in but:
                continue
            if isinstance(here, tuple) and isinstance(there, tuple):
                found.append(f"{field.name}: {_only(there, here)} in the plan, {_only(here, there)} here.")
                continue
            found.append(f"{field.name}: {there} in the plan, {here} here.")
        return found


def _only(values: tuple[str, ...], others: tuple[str, ...]) -> str:
    """The first of ``values`` that are not among ``others``."""
    own = [v for v in values if v not in others] or [f"{len(values)} of them"]
    return ", ".join(own[:3]) + (", ..." if len(own) > 3 else "")


@dataclass(frozen=True)
class PlanFile:
    """``dspass.plan``."""

    path: str

    def find(self, wanted: MadeFor, budget: int | None) -> Plan | None:
        """The plan of a graph; None where the file holds none. Raises :class:`PlanError` where it is of another run, where its
        plan is too large, and where there is none and no budget to make one for."""
        entries = [(MadeFor.from_json(e["made_for"]), e["plan"]) for e in self._read()]
        for made_for, said in entries:
            different = wanted.differences(made_for, but=("graph", "parameters", "inputs", "part"))
            if different:
                raise self._other(different)
            if made_for == wanted:
                plan = Plan.from_json(said)
                if budget is not None and plan.peak > budget:
                    raise PlanError(
                        f"dspass.plan: the plan in {self.path} takes {size_text(plan.peak)}, and dspass.memory_budget is "
                        f"{size_text(budget)}. Raise the budget, or delete the file to have it planned anew."
                    )
                return plan
        if budget is None and entries:
            raise self._other(min((wanted.differences(m) for m, _ in entries), key=len))
        if budget is None:
            raise PlanError(
                f"dspass.plan: {self.path} holds no plan, and there is no dspass.memory_budget to make one for. Give a "
                "budget, or the file of an earlier run."
            )
        return None

    def _other(self, different: list[str]) -> PlanError:
        return PlanError(
            f"dspass.plan: {self.path} was made for something else. {' '.join(different)} Delete the file, or name another, "
            "and give dspass.memory_budget to have it planned anew."
        )

    def add(self, made_for: MadeFor, plan: Plan) -> None:
        """Write a plan beside the others of its model; the file is replaced at once."""
        entries = [*self._read(), {"made_for": made_for.to_json(), "plan": plan.to_json()}]
        folder = os.path.dirname(os.path.abspath(self.path))
        os.makedirs(folder, exist_ok=True)
        half = f"{self.path}.{os.getpid()}"
        with open(half, "w", encoding="utf-8") as file:
            json.dump({"version": _VERSION, "graphs": entries}, file, indent=1)
        os.replace(half, self.path)

    def _read(self) -> list[dict[str, Any]]:
        try:
            with open(self.path, encoding="utf-8") as file:
                said = json.load(file)
            if said["version"] != _VERSION:
                raise ValueError(f"version {said['version']}, where {_VERSION} is read")
            return list(said["graphs"])
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PlanError(
                f"dspass.plan: {self.path} cannot be read: {error!r}. Delete it, or name another."
            ) from error
