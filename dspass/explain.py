"""``dspass.explain``: what the passes do to a model, what peaks where, what is sent, before or after it runs.

Here is what can be asked for: a saved report, that of a model that has run, and one when the process ends. What a model would
do that has not run is :mod:`dspass.prediction`'s. Both fill their reports by :mod:`dspass.reporting`.
"""

from __future__ import annotations

import atexit
import os
import sys
import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch import nn

from dspass.config import Config
from dspass.engines import engine_of
from dspass.owners import unwrap
from dspass.passes import devices
from dspass.prediction import Question, predicted_report, with_unplanned
from dspass.report import Memory, Report
from dspass.reporting import host_copies_of, memory_timeline, pipeline_of, pipeline_record, report_of, traffic_of
from dspass.runtime.stepping import OPTIMIZERS
from dspass.settings import kind_of


def explain(
    model: nn.Module | str | os.PathLike[str],
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    config: Config | str | Mapping[str, Any] | None = None,
    world_size: int | None = None,
    device: str | None = None,
    memory_budget: int | str | None = None,
    optimizer: str = "adamw",
    train: bool = True,
) -> Report:
    """Report on a model that has run, predict one that has not, or read a saved report.

    - ``explain(model)`` after steps under the backend: what was counted, and memory where :func:`dspass.measure` watched.
    - ``explain(model, *args, kwargs=..., config=..., world_size=64, device="h100")``: predicted, without a launcher, a GPU or
      the memory: ``model`` may be on the meta device. ``args`` and ``kwargs`` are one rank's batch.
    - ``explain("report.json")``: a saved report.

    ``memory_budget`` (bytes, ``"60GB"``, ``"75%"`` of the device or ``"auto"``) has the planner fit the step into it, and the
    report show what that costs, and the memory of the step without the plan. Raises :class:`dspass.BudgetError` where nothing
    fits, and ``ValueError`` where it is more than ``device`` has. ``optimizer`` names whose states are counted (one of
    :data:`OPTIMIZERS`); ``train=False`` predicts the forward only, for which nothing is planned: its peak is held against the
    budget.
    """
    if not args and not kwargs:
        given = {"config": config, "world_size": world_size, "device": device, "memory_budget": memory_budget}
        _refuse_without_batch(model, [name for name, value in given.items() if value is not None])
    if isinstance(model, (str, os.PathLike)):
        return Report.load(model)
    if device is not None:
        devices.device(device)  # an unknown one is refused before any work
    if not args and not kwargs:
        return _measured(model)
    if world_size is not None and world_size < 1:
        raise ValueError(f"world_size={world_size} is no number of ranks: give 1 or more.")
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer={optimizer!r} is not known; use one of {sorted(OPTIMIZERS)}.")
    asked = Question(
        model=unwrap(model),
        args=args,
        kwargs=dict(kwargs or {}),
        config=_with_budget(Config.load(config), memory_budget),
        world=world_size or settings_world(),
        device=device or "cpu",
        optimizer=optimizer,
        train=train,
    )
    return with_unplanned(predicted_report(asked), asked)


def _refuse_without_batch(model: object, asked: list[str]) -> None:
    if asked:
        shown = ", ".join(f"{name}=..." for name in asked)
        what = (
            "a saved report is as it was saved"
            if isinstance(model, (str, os.PathLike))
            else "it reports on steps that ran"
        )
        raise ValueError(
            f"dspass.explain: {shown} asks for a prediction, which needs a batch, and without one {what}. Give the model and "
            f"a batch, dspass.explain(model, *batch, {shown}), or leave {'it' if len(asked) == 1 else 'them'} out."
        )


def _with_budget(config: Config, budget: int | str | None) -> Config:
    """``budget`` goes before what ``config`` says."""
    if budget is None:
        return config
    checked = Config.load({"dspass": {"memory_budget": budget}}).dspass.memory_budget
    return replace(config, dspass=replace(config.dspass, memory_budget=checked))


def settings_world() -> int:
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def report_at_exit(model: nn.Module, path: str) -> None:
    """Write the report when the process ends, as ``dspass.report`` asks; a failure is said, and ends nothing."""
    weak = weakref.ref(model)

    def write() -> None:
        alive = weak()
        try:
            if alive is not None:
                explain(alive).save(path)
        except Exception as error:
            print(f"dspass: the report could not be written to {path}: {error}", file=sys.stderr)

    atexit.register(write)


def _measured(model: nn.Module) -> Report:
    engine = engine_of(model)
    if engine is None or not engine.compilations:
        raise RuntimeError(
            "dspass.explain(model) reports on a model that has run under torch.compile(model, backend='deepspeed'), and this "
            "one has not. Run a step first, or pass a batch to predict: dspass.explain(model, *batch, world_size=8)."
        )
    notes = []
    measurement = engine.measurement
    first_call = engine.first_call_peak_bytes
    memory = Memory(time_unit="seconds", first_call_peak_bytes=first_call)
    if measurement is None:
        notes.append("Memory was not measured: wrap a step in `with dspass.measure(model):`.")
    else:
        timeline = memory_timeline(measurement.points)
        memory = Memory(timeline=timeline, time_unit="seconds", first_call_peak_bytes=first_call)
    copies = host_copies_of(engine, 2 * engine.host_states.bytes)
    world = dist.get_world_size() if dist.is_initialized() else 1
    pipeline = pipeline_of(unwrap(model))
    record = None
    if pipeline is not None:
        record = pipeline_record(pipeline, pipeline.predicted(True), pipeline.measured)
        if pipeline.measured is None:
            notes.append(
                "Times of the pipeline's ranks were not gathered yet: that is done in the 3rd call that trains, the 10th, the "
                "30th, the 100th and so on."
            )
    return report_of(
        engine,
        unwrap(model),
        kind="measured",
        memory=memory,
        traffic=traffic_of(engine),
        host_copies=copies,
        seconds=engine.step_seconds,
        world=world,
        device=kind_of(engine),
        notes=notes,
        config=engine.config,
        pipeline=record,
    )


__all__ = ["OPTIMIZERS", "explain"]
