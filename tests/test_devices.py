"""The table of devices, the device that is here, and what fits on how many of them."""

from __future__ import annotations

import sys
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dspass
from dspass.config import ConfigError
from dspass.fake_steps import fake_group
from dspass.passes import devices
from dspass.passes.calibration import Calibration, Curve
from dspass.passes.devices import DEVICES, capacity, device, machine_memory, share_of, tabled
from dspass.planner.record import BudgetError
from dspass.planning import refuse_beyond
from dspass.runtime.engine import Engine
from dspass.settings import kind_of
from examples.gpt import GPT, GPTConfig
from tests.test_explain import gpt


@pytest.mark.parametrize("row", DEVICES.values(), ids=lambda row: row.name)
def test_rows_are_plausible_and_say_their_source(row: devices.Device) -> None:
    assert 1e13 < row.rates[torch.float32] < row.rates[torch.bfloat16] < 1e16
    assert row.rate(torch.float64) == row.rates[torch.float32]
    assert row.memory_bytes / row.memory < 1, "all memory is read in less than a second"
    assert row.link < row.node_link < row.memory
    assert row.host_link < row.memory
    assert row.memory_bytes <= row.host_memory_bytes
    assert row.overlaps
    assert row.source
    assert device(row.name.upper()) is row


def test_the_devices_that_people_rent_have_rows() -> None:
    assert DEVICES.keys() >= {"a100", "h100", "h200", "b200", "mi250x", "mi300x"}


def test_a_group_inside_of_a_node_uses_its_links() -> None:
    h100 = device("h100")
    assert [h100.link_of(n) for n in (2, 8)] == [h100.node_link] * 2
    assert [h100.link_of(n) for n in (9, 64)] == [h100.link] * 2
    assert device("cpu").link_of(2) == device("cpu").link


def test_an_unknown_device_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"device='tpu' has no figures here; use 'cpu', 'cuda' .*'h100'"):
        device("tpu")


class _Nvml:
    """The part of pynvml that is used, with one device."""

    def __init__(self, name: str) -> None:
        self.name, self.open = name, 0

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        assert uuid == "GPU-1234"
        return uuid

    def nvmlDeviceGetName(self, handle: str) -> str:
        return self.name

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        return SimpleNamespace(total=79 * 10**9)


def _pretend(monkeypatch: pytest.MonkeyPatch, name: str) -> _Nvml:
    """A device that is not here: this is what torch and NVML would say of one."""
    nvml = _Nvml(name)
    devices._after_nearest.cache_clear()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="1234", name=name))
    return nvml


def test_the_real_device_is_read_from_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = _pretend(monkeypatch, "NVIDIA H100 80GB HBM3")
    assert tabled("cuda") is DEVICES["h100"]
    assert device("cuda").rates == DEVICES["h100"].rates
    assert capacity("cuda") == 79 * 10**9
    assert nvml.open == 0


@pytest.mark.parametrize(
    ("product", "near"),
    [
        ("NVIDIA L40S", "a100"),
        ("NVIDIA GeForce RTX 4090", "a100"),
        ("NVIDIA GH200 480GB", "h200"),
        ("Tesla T4", "a100"),
    ],
)
def test_a_device_without_a_row_has_the_nearest_one_s_figures(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path, product: str, near: str
) -> None:
    """Who has it must be able to train, and it is said once whose figures these are; a calibration goes before them."""
    monkeypatch.setenv("DSPASS_DEVICES", str(tmp_path))
    _pretend(monkeypatch, product)
    row = tabled("cuda")
    assert (row.name, row.memory_bytes, row.rates) == (product, 79 * 10**9, DEVICES[near].rates)
    assert row.node_link <= row.host_link, "NVLink is not taken for granted"
    assert row.host_memory_bytes == machine_memory() // 2
    assert row.has_own_memory
    assert row.source == f"those of the {near.upper()}, as there are none for {product}"
    assert tabled("cuda") is row
    assert "python -m dspass calibrate" in device("cuda").source
    (said,) = [r.getMessage() for r in caplog.records]
    assert said.startswith(f"There are no figures for {product}: those of the {near.upper()} are taken.")
    with pytest.raises(ValueError, match=r"device='l40s' has no figures here; use 'cpu', 'cuda' .*'h100'"):
        device("l40s")


def test_a_device_without_a_row_is_calibrated(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("DSPASS_DEVICES", str(tmp_path))
    _pretend(monkeypatch, "NVIDIA L40S")
    moved = Curve.through({1e6: 1e-6, 1e9: 2e-3})
    Calibration(
        kind="cuda",
        product="NVIDIA L40S",
        threads=1,
        torch=torch.__version__,
        made="2020-01-01",
        curves={"generated": moved, "product float32": moved},
        functions={},
        host_link=2e10,
    ).save(tmp_path)
    found = devices.planned_for("cuda")
    assert (found.name, found.memory_bytes, found.memory, found.host_link) == ("NVIDIA L40S", 79 * 10**9, 5e11, 2e10)
    assert "measured by python -m dspass calibrate" in found.source
    assert tabled("cuda").rates == DEVICES["a100"].rates, "passes use the table's, calibrated or not"
    assert not caplog.records


def test_the_device_of_a_model_without_specs_is_its_parameters() -> None:
    """One process without mixed precision marks nothing."""
    model = torch.nn.Linear(2, 2, device="meta")
    engine = Engine(stage=0, inputs_on="cuda")
    assert kind_of(engine) == "cuda", "a compiled function has no model: its inputs'"
    engine.root = weakref.ref(model)
    assert kind_of(engine) == "meta"
    engine.target = "h100"
    assert kind_of(engine) == "h100"


def test_other_kinds_of_device_train_without_a_share_of_their_memory() -> None:
    assert tabled("xpu") is devices.CPU
    with pytest.raises(ValueError, match=r"the memory of device 'xpu' is not known here\. Give memory_budget in bytes"):
        capacity("xpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device here")
def test_without_a_device_that_is_said() -> None:
    with pytest.raises(ValueError, match="torch sees none here"):
        device("cuda")


def test_a_predicted_rank_has_its_share_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a run without a launcher would: nobody says that some of the ranks are elsewhere."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    model = torch.nn.Linear(4, 4)
    report = dspass.explain(model, torch.ones(2, 4), world_size=8, device="cpu", memory_budget="auto")
    assert report.plans[0].budget_bytes == share_of("auto", machine_memory() // 8)


def test_a_rank_s_share_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = machine_memory()
    assert capacity("cpu", 1) == whole
    assert capacity("cpu", 4) == whole // 4
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert capacity("cpu") == whole
    with fake_group(8, "gloo", True):
        assert capacity("cpu") == whole // 8, "mp.spawn, srun and mpirun do not say how many are here: all"
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        assert capacity("cpu") == whole // 2
    for path, text, wanted in (
        ("sys/fs/cgroup/memory.max", "1000000\n", 10**6),
        ("sys/fs/cgroup/memory.max", "max\n", machine_memory(tmp_path / "nothing")),
        ("sys/fs/cgroup/memory/memory.limit_in_bytes", "2000000\n", 2 * 10**6),
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
        assert machine_memory(tmp_path) == wanted
    assert share_of("75%", 1000) == 750
    assert share_of("auto", 1000) == 900


def test_no_more_is_refused_than_what_a_device_is_known_not_to_have() -> None:
    with pytest.raises(ConfigError, match=r"100 GB is more than the 80 GB of the device, h100"):
        refuse_beyond(100 * 10**9, "h100")
    for device_name in ("cpu", "xpu"):  # of a machine that predicts nothing is known of those that train
        refuse_beyond(10**15, device_name)


def test_a_large_model_is_planned_as_it_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above some size no code is generated to know its buffers, neither for the plan nor for the report."""
    monkeypatch.setattr("dspass.prediction.GENERATE_UP_TO", 0)
    monkeypatch.setattr("dspass.planning.InductorSimulator", None)
    model, args, kwargs = gpt(layers=1)
    report = dspass.explain(model, *args, kwargs=kwargs, device="cpu", memory_budget="1GB")
    assert report.plans
    assert any("are estimated" in note for note in report.notes)


def test_what_measured_steps_took_over_the_prediction_multiplies_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    class Twice(dict[str, float]):
        def get(self, *_: Any) -> float:  # type: ignore[override]
            return 2.0

    model, args, kwargs = gpt(layers=1)
    found = []
    for steps in (Twice(), {}):
        row = replace(tabled("h100"), steps=steps)
        monkeypatch.setattr(devices, "planned_for", lambda _, row=row: row)
        report = dspass.explain(model, *args, kwargs=kwargs, device="h100", memory_budget="1GB", optimizer="none")
        found.append(report.step_seconds)
        assert report.plans[0].frontier[report.plans[0].here].seconds == pytest.approx(report.step_seconds)
    assert 1.8 * found[1] < found[0] < 2 * found[1], "but for the optimiser's launch"


def test_the_fewest_ranks_that_fit() -> None:
    """On one the states alone are too many, on two what is saved and computed is, by the planner's smallest plan; four do, and
    so do three."""
    model, args, kwargs = gpt(layers=3)  # what two ranks hold beside the states is more than fits
    states = sum(4 * p.numel() * p.element_size() for p in model.parameters())
    alone: dict[str, Any] = {"offload_optimizer": {"device": "none"}}
    on_device = {"zero_optimization": alone}
    budget = int(0.98 * states)
    found = dspass.fit(model, *args, kwargs=kwargs, config=on_device, device="h100", memory_budget=budget)
    assert found.world_size == 3
    assert found.refused[1] == states
    assert 0.98 * states < found.refused[2] < 1.5 * states
    assert found.report.memory.peak_bytes <= 0.98 * states
    assert found.config["zero_optimization"] == {"stage": 3, **alone}
    assert str(found).startswith("fits on 3 x h100")
    with pytest.raises(BudgetError, match=r"does not fit into 1 MB on up to 4 ranks of h100") as refused:
        dspass.fit(model, *args, kwargs=kwargs, config=on_device, device="h100", memory_budget="1MB", most=4)
    assert refused.value.smallest == states // 4


def test_states_on_the_host_need_fewer_ranks() -> None:
    with torch.device("meta"):
        model = GPT(GPTConfig(context=64, layers=4, heads=4, width=512))
    tokens = torch.zeros(1, 64, dtype=torch.long)
    budget = int(0.75 * sum(4 * p.numel() * p.element_size() for p in model.parameters()))
    found = dspass.fit(model, tokens, tokens, device="h100", memory_budget=budget)
    assert found.world_size == 1
    assert "of optimiser states on the host" in found.report.plans[0].summary
    on_device = {"zero_optimization": {"offload_optimizer": {"device": "none"}}}
    assert dspass.fit(model, tokens, tokens, config=on_device, device="h100", memory_budget=budget).world_size == 2
