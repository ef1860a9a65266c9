"""A device as it was measured: the file, the curves, and what the planner makes of them."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dspass import calibrate
from dspass.__main__ import main
from dspass.engines import engine_of
from dspass.passes import calibration, devices
from dspass.passes.calibration import Calibration, CalibrationError, Curve
from dspass.planning import _model_key
from tests.training import without_inductor

POINTS = st.dictionaries(st.floats(1, 1e12), st.floats(1e-9, 1e3), min_size=1, max_size=12)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DSPASS_DEVICES", str(tmp_path))
    return tmp_path


@settings(max_examples=200)
@given(points=POINTS, amounts=st.lists(st.floats(0, 1e13), min_size=2, max_size=2))
def test_more_work_never_takes_less_time(points: dict[float, float], amounts: list[float]) -> None:
    curve = Curve.through(points)
    less, more = sorted(amounts)
    assert curve.seconds(less) <= curve.seconds(more) * (1 + 1e-12)
    for amount, seconds in points.items():
        assert curve.seconds(amount) >= seconds * (1 - 1e-12)


def test_a_curve_goes_through_what_was_measured_and_on_at_the_last_rate() -> None:
    curve = Curve.through({10.0: 2.0, 20.0: 3.0})
    assert [curve.seconds(a) for a in (0, 1, 10, 15, 20, 40)] == [0, 2, 2, 2.5, 3, 6]
    with pytest.raises(ValueError, match="not a curve"):
        Curve((2.0, 1.0), (1.0, 2.0))


def _made(**other: Any) -> Calibration:
    flat = Curve.through({1e3: 1e-6, 1e6: 1e-3})
    of_this = {"product": devices.product_of("cpu"), "threads": torch.get_num_threads(), "kind": "cpu"}
    return Calibration(
        **{
            **of_this,
            "torch": torch.__version__,
            "made": "2020-01-01",
            "curves": {"generated": flat, "product float32": flat},
            "functions": {"exp": 1e-9},
            "host_link": 1e10,
            **other,
        }
    )


def test_a_file_is_read_where_it_was_made_for_what_is_here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    made = _made(latency=1e-3, link=5e8, ranks=2)
    assert calibration.find("cpu", made.product)[0] is None
    path = made.save(folder)
    assert Calibration.load(path) == made
    here = devices.device("cpu")
    assert here == devices.planned_for("cpu")
    assert (here.link_of(2), here.latency, here.moving(1e6)) == (5e8, 1e-3, 1e-3)
    assert devices.tabled("cpu") == devices.CPU

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    found, why = calibration.find("cpu", made.product)
    assert found == made
    assert "by 2 of 4 ranks: python -m dspass calibrate --ranks 4" in why
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert calibration.find("cpu", made.product) == (None, "not calibrated: python -m dspass calibrate")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")

    dataclasses.replace(made, product="another").save(folder)
    found, why = calibration.find("cpu", made.product)
    assert found is None
    assert "it was made on another" in why
    assert devices.planned_for("cpu") == devices.CPU


@pytest.mark.parametrize(
    "change",
    [
        lambda said: "{",
        lambda said: "[]",
        lambda said: json.dumps(said | {"version": 99}),
        lambda said: json.dumps(said | {"curves": {}}),
        lambda said: json.dumps(said | {"host_link": -1}),
        lambda said: json.dumps(said | {"more": 1}),
        lambda said: json.dumps(said | {"curves": {**said["curves"], "x": {"amounts": [2, 1], "times": [1, 1]}}}),
    ],
)
def test_a_spoilt_file_is_named(folder: Path, change: Any) -> None:
    path = _made().save(folder)
    path.write_text(change(json.loads(path.read_text())))
    with pytest.raises(
        CalibrationError, match=rf"{re.escape(str(path))} is no calibration of a device: .*python -m dspass"
    ):
        devices.device("cpu")


def test_calibrate_measures_and_stores(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a few small figures; between two processes, too."""
    monkeypatch.setattr(
        calibrate,
        "AMOUNTS",
        calibrate.Amounts(
            squares=(32, 256),
            tokens=(32, 128),
            moved=(3 * 2**12, 3 * 2**22),
            functions=("exp",),
            reductions=("sum",),
            sweeps=1,
        ),
    )
    assert main(["calibrate"]) == 0
    said = capsys.readouterr().out
    alone, beside = sorted(folder.iterdir())
    for path in (alone, beside):
        assert re.search(rf"written in \d+ s: {re.escape(str(path))}$", said, re.MULTILINE)
    assert devices.device("cpu").latency == devices.CPU.latency, "one rank has no collectives"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    found = devices.device("cpu")
    assert "measured by python -m dspass calibrate" in found.source
    assert set(found.functions) == {*devices.CPU.functions, "exp", "sum rows", "sum columns"}
    assert found.functions["exp"] != devices.CPU.functions["exp"]
    assert found.functions["erf"] == devices.CPU.functions["erf"], "what was not measured is the table's"
    assert found.moving(3 * 2**22) > found.moving(3 * 2**12) > 0
    assert found.computing("attention backward", torch.float32, 1e6) > 0
    assert found.link_of(2) > 0
    assert found.latency > 0


@without_inductor
def _train(steps: int) -> torch.nn.Module:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 8))
    options = {"zero_optimization": {"stage": 0}, "dspass": {"memory_budget": "1GB"}}
    compiled = torch.compile(model, backend="deepspeed", options=options)
    optimizer = torch.optim.SGD(compiled.parameters())
    x = torch.randn(256, 64)
    for _ in range(steps):
        compiled(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_measured_steps_make_the_next_prediction_better(folder: Path) -> None:
    path = _made(curves={k: Curve.through({1e3: 1e-5, 1e9: 1.0}) for k in ("generated", "product float32")}).save(
        folder
    )
    model = _train(12)
    (one,) = engine_of(model).compilations
    assert one.plan is not None
    assert one.made_for is not None
    took = one.measured_seconds
    assert took is not None
    assert one.plan.scale == 1.0
    low, high = calibration.RATIO
    ratio = min(max(took / one.plan.seconds, low), high)
    kept = Calibration.load(path).steps
    assert set(kept) == {_model_key(one.made_for)}
    assert low <= kept[_model_key(one.made_for)] <= high
    later = _train(1)
    (two,) = engine_of(later).compilations
    assert two.plan is not None
    assert two.plan.scale == kept[_model_key(one.made_for)]
    assert two.plan.seconds == pytest.approx(one.plan.seconds * two.plan.scale)
    assert two.plan.decision == one.plan.decision
    assert two.plan.scale == pytest.approx(ratio, rel=0.5), "another median, of nearly the same runs"


def test_a_step_that_cannot_be_kept_ends_nothing(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = _made(curves={k: Curve.through({1e3: 1e-5, 1e9: 1.0}) for k in ("generated", "product float32")}).save(
        folder
    )
    path.with_suffix(f".{os.getpid()}").mkdir()  # where it is written at first; root may write into any folder
    _train(12)
    calibration.note_step("cpu", devices.product_of("cpu"), "another", 1.0)
    assert not Calibration.load(path).steps
    (said,) = [r.getMessage() for r in caplog.records if r.name == calibration.__name__]
    assert str(folder) in said
    assert "Set $DSPASS_DEVICES to a folder that can be written" in said


def test_without_a_calibration_nothing_is_kept(folder: Path) -> None:
    model = _train(12)
    (one,) = engine_of(model).compilations
    assert one.measured_seconds is not None
    assert not list(folder.iterdir())


def test_memory_that_is_held_has_its_price(folder: Path) -> None:
    """Where the allocator takes memory anew in each step, a fastest plan saves less, and what it saves counts as time."""
    plans = []
    for fresh in (0.0, 1e-6):
        _made(
            fresh=fresh, curves={k: Curve.through({1e3: 1e-6, 1e9: 1.0}) for k in ("generated", "product float32")}
        ).save(folder)
        assert devices.device("cpu").fresh == fresh
        (one,) = engine_of(_train(1)).compilations
        assert one.plan is not None
        plans.append(one.plan)
    free, dear = plans
    assert dear.saved_bytes < free.saved_bytes
    assert dear.seconds > free.seconds
