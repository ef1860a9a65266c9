"""``dspass.fit``: which numbers of ranks are tried, and which are not; what it predicts is in ``test_devices.py``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import dspass
from dspass.config import Config, ConfigError
from dspass.planner.record import BudgetError
from dspass.prediction import Question


def tried(monkeypatch: pytest.MonkeyPatch, fewest: int, *, but: Any = (), **options: Any) -> tuple[Any, list[int]]:
    """What is found where ``fewest`` ranks and more fit, and the numbers that were predicted for it."""
    numbers: list[int] = []

    def predicted(asked: Question) -> Any:
        config, world = asked.config, asked.world
        numbers.append(world)
        if world in but:
            raise ConfigError("", f"not on {world} ranks")
        if config.offload_param == "cpu":
            raise ConfigError("zero_optimization.offload_param.device", "not built yet")
        if world < fewest or (world > 1 and config.zero.stage == 0):
            raise BudgetError("", 10**9)
        return dspass.Report(kind="predicted", model="m", device="h100", world_size=world)

    monkeypatch.setattr(sys.modules["dspass.fit"], "predicted_report", predicted)
    with torch.device("meta"):
        model = torch.nn.Linear(2, 2)
    return dspass.fit(model, torch.zeros(1, 2), **options), numbers


@pytest.mark.parametrize(
    ("fewest", "asked"),
    [
        (1, [1]),
        (2, [1, 2]),
        (3, [1, 2, 4, 3]),
        (5, [1, 2, 4, 8, 6, 5]),
        (9, [1, 2, 4, 8, 16]),
        (100, [1, 2, 4, 8, 16, 32, 64, 128, 96, 112, 104]),
    ],
)
def test_ranks_are_doubled_and_then_halved(monkeypatch: pytest.MonkeyPatch, fewest: int, asked: list[int]) -> None:
    """In a node any number is tried, and beyond it whole nodes."""
    found, numbers = tried(monkeypatch, fewest)
    assert numbers == asked
    assert found.world_size == next(n for n in (*range(1, 8), *range(8, 200, 8)) if n >= fewest)
    assert sorted(found.refused) == sorted(n for n in numbers if n < fewest)


def test_the_most_ranks_are_tried_where_they_are_no_power_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tried(monkeypatch, 23, most=24)[0].world_size == 24
    with pytest.raises(BudgetError, match="on up to 24 ranks of h100: the least that one takes is 1 GB"):
        tried(monkeypatch, 25, most=24)


@pytest.mark.parametrize(
    ("config", "fewest", "world"),
    [
        ({"pipeline": {"stages": 3}}, 2, 3),
        ({"train_batch_size": 64, "train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 1}, 1, 8),
        ({"train_batch_size": 96, "train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 1}, 1, 12),
        ({"zero_optimization": {"mics_shard_size": 4}}, 2, 4),
    ],
)
def test_numbers_that_the_configuration_does_not_go_with_are_skipped(
    monkeypatch: pytest.MonkeyPatch, config: Any, fewest: int, world: int
) -> None:
    found, numbers = tried(monkeypatch, fewest, config=config)
    assert found.world_size == world
    assert set(numbers) <= {1, 3, 4, 6, 8, 12}
    assert all(n < world for n in found.skipped)
    assert world == 4 or f"\n  2 ranks: {found.skipped[2]}" in str(found)


def test_what_only_a_prediction_refuses_is_skipped_too(monkeypatch: pytest.MonkeyPatch) -> None:
    found, numbers = tried(monkeypatch, 1, but=(1, 2, 3))
    assert (found.world_size, numbers) == (4, [1, 2, 3, 4])
    assert found.skipped[3].startswith("not on 3 ranks")
    with pytest.raises(ConfigError, match="not on 16 ranks"):
        tried(monkeypatch, 1, but=range(1, 17), most=16)
    with pytest.raises(ConfigError, match="not built yet"):  # of two and of three alike: it is not for their number
        tried(monkeypatch, 1, config={"zero_optimization": {"offload_param": {"device": "cpu"}}})


def test_options_are_kept_and_read_from_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A stage that is written counts, and so does a budget."""
    path = tmp_path / "options.json"
    path.write_text(
        '{"zero_optimization": {"stage": 2}, "bf16": {"enabled": true}, "dspass": {"memory_budget": "70GB"}}'
    )
    for config in (str(path), path, Config.load(path)):
        found = tried(monkeypatch, 2, config=config)[0]
        loaded = Config.load(found.config)
        assert (found.world_size, loaded.zero.stage, loaded.bf16) == (2, 2, True)
        assert loaded.dspass.memory_budget == 70 * 10**9
        assert Config.load(tried(monkeypatch, 1, config=config)[0].config).zero.stage == 0
    assert (
        Config.load(tried(monkeypatch, 2, config=path, memory_budget="auto")[0].config).dspass.memory_budget
        == 72 * 10**9
    )


def test_ranks_that_hold_no_less_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BudgetError, match=r"leave zero_optimization\.stage out"):
        tried(monkeypatch, 10**6, config={"zero_optimization": {"stage": 0}})


def test_no_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="most=0"):
        tried(monkeypatch, 1, most=0)
    with pytest.raises(ValueError, match="needs one rank's batch"):
        dspass.fit(torch.nn.Linear(2, 2))


def test_ranks_on_cpus_share_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dspass.passes.devices.machine_memory", lambda: 8 * 10**9)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    found, _ = tried(monkeypatch, 4, device="cpu")
    assert found.config["dspass"]["memory_budget"] == 18 * 10**8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    found, _ = tried(monkeypatch, 4, device="cpu")
    assert found.config["dspass"]["memory_budget"] == 36 * 10**8


@pytest.mark.parametrize(
    ("config", "least"),
    [
        # 16 GB of fp32 on eight ranks: whole copies in bf16, and an eighth of parameters and gradients.
        ({"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}, 8 + 2 + 2),
        ({"zero_optimization": {"stage": 1}}, 16 + 2 + 2),
        ({"zero_optimization": {"stage": 3}}, 2 + 2),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none"}}}, 2 + 2 + 4),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, 0),
        ({"zero_optimization": {"stage": 0}}, 16 + 16),
    ],
)
def test_numbers_are_only_refused_untried_for_what_has_to_be_there(config: dict[str, Any], least: int) -> None:
    with torch.device("meta"):
        model = torch.nn.Linear(64_000, 62_500, bias=False)
    x = torch.zeros(1, 64_000, device="meta")
    search = sys.modules["dspass.fit"]._Search.of(model, (x,), {}, config, "h100", "15GB", "adamw")
    assert search._always(8) == least * 10**9
