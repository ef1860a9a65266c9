"""Modules that treat their parameters in ways of their own, and what bad input gets: one error that names the way out."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.tensor import DTensor

import dspass
from dspass.engines import engine_of
from tests.models import Mlp, points
from tests.ranks import free_port, run
from tests.training import close, train, without_inductor, zero


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return points(torch.Generator().manual_seed(1), 0, 0)


class WeightNorm(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.utils.parametrizations.weight_norm(self.first)


class OldWeightNorm(Mlp):
    """The older form: a hook that assigns the weight before each forward."""

    def __init__(self) -> None:
        super().__init__()
        with pytest.warns(FutureWarning):
            self.second = torch.nn.utils.weight_norm(self.second)


class Lists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ParameterList(torch.randn(10, 10) / 3 for _ in range(3))
        self.heads = nn.ParameterDict({"a": torch.randn(10, 3), "b": torch.randn(10, 3)})

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(x @ layer)
        return F.cross_entropy(x @ self.heads["a"] + x @ self.heads["b"], y)


class Recurrent(nn.Module):
    """Dynamo leaves recurrent layers to eager code, which reads a list of weights that the layer keeps for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.gru, self.head = nn.Linear(10, 16), nn.GRU(16, 16, 2, batch_first=True), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        inside = self.into(x)[None]
        outside, _ = self.gru(inside)
        return F.cross_entropy(self.head(outside[0]), y)


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("build", [WeightNorm, OldWeightNorm, Lists, Recurrent])
def test_modules_with_ways_of_their_own(build: Any, stage: int) -> None:
    close(run(2, train, build, points, zero(stage), steps=4))


@without_inductor
def _functional() -> float:
    """A sharded model called with other weights, and afterwards with its own again."""
    torch.manual_seed(0)
    model, other = Mlp(), Mlp()
    compiled = torch.compile(model, backend="deepspeed", options=zero(3))
    first = compiled(*batch())
    replaced = torch.func.functional_call(model, dict(other.named_parameters()), batch())
    torch.testing.assert_close(replaced, other(*batch()))
    replaced.backward()
    assert other.first.weight.grad is not None
    return abs(compiled(*batch()).item() - first.item())


def test_functional_call() -> None:
    assert max(run(2, _functional)) < 1e-6


class Hoarder(torch.optim.SGD):
    """Keeps the parameters in a tuple as well, as optimisers with flat buffers do."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.flat = tuple(self.param_groups[0]["params"])


@without_inductor
def _holders() -> list[str]:
    """A person's own list and dictionary follow the exchange; an optimiser that cannot is refused before any of it."""
    model = Mlp()
    mine, named = list(model.parameters()), dict(model.named_parameters())
    hoarder = Hoarder(model.parameters())
    compiled = torch.compile(model, backend="deepspeed", options=zero(3))
    try:
        compiled(*batch())
        said = "nothing was refused"
    except Exception as error:
        said = str(error)
    assert not isinstance(model.first.weight, torch.distributed.tensor.DTensor)
    del hoarder
    compiled(*batch()).backward()
    assert isinstance(model.first.weight, torch.distributed.tensor.DTensor)
    assert mine[1] is named["first.weight"] is model.first.weight
    assert mine[1].grad is not None
    return [said]


def test_an_optimizer_that_holds_stale_parameters_is_refused() -> None:
    for (said,) in run(2, _holders):
        assert "Hoarder.flat" in said
        assert "dspass.shard" in said


class AnyRank(nn.Linear):
    """Takes inputs of any number of dimensions."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x).mean() + y.float().mean()


def _refused(what: str) -> str:
    model: nn.Module = AnyRank(10, 3) if what in ("inputs", "fsdp") else Mlp()
    x, y = batch()
    options: Any = zero(3)
    if what == "inputs" and dist.get_rank() == 1:
        x = x[None]
    late: Any = contextlib.nullcontext()
    if what == "late":  # as a rank sees it whose peer stopped before
        late = mock.patch("torch.distributed.all_gather_object", side_effect=RuntimeError("Timed out waiting 60000ms"))
    if what == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    if what == "meta":
        model, x, y = model.to("meta"), x.to("meta"), y.to("meta")
    if what == "devices":
        model.head.to("meta")  # type: ignore[operator,union-attr]
    if what == "missing":
        options = "no/such/file.json"
    if what == "mistyped":
        options = {"zero_optimization": {"stage": "three"}}
    if what == "configuration":
        options = {"zero_optimization": {"stage": 3, "overlap_comm": dist.get_rank() == 0}}
    if what == "unknown":
        options = {"zero_optimisation": {"stage": 3}}
    try:
        with late:
            torch.compile(model, backend="deepspeed", options=options)(x, y)
    except Exception as error:
        return str(error)
    return "nothing was refused"


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("inputs", ["inputs", "ranks 0 and 1"]),
        ("configuration", ["zero_optimization.overlap_comm", "true", "false", "the same file"]),
        ("late", ["not every rank reached", "stopped before"]),
        ("fsdp", ["FSDP2", "plain module"]),
        ("meta", ["meta", "fill"]),
        ("devices", ["meta", "device"]),
        ("missing", ["no/such/file.json"]),
        ("mistyped", ["zero_optimization.stage", "three"]),
        ("unknown", ["zero_optimisation", "zero_optimization"]),
    ],
)
def test_refused_on_all_ranks(what: str, says: list[str]) -> None:
    for text in run(2, _refused, what):
        for word in says:
            assert word in text


def _reports(path: str) -> float:
    own = {"report": path} if dist.get_rank() == 0 else None
    return torch.compile(Mlp(), backend="deepspeed", options=zero(3, dspass=own))(*batch()).item()


def test_keys_that_may_differ_from_rank_to_rank_may(tmp_path: Path) -> None:
    assert all(loss > 0 for loss in run(2, _reports, str(tmp_path / "report.html")))


class Counting(nn.Module):
    """A buffer that each rank makes for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer("offset", torch.full((8,), float(dist.get_rank())))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.layer(x) + self.offset).square().mean()


@without_inductor
def _begun(how: str, stage: int) -> tuple[int, float, int]:
    """How often a report is promised, the buffer, and steps that are counted before and after the first."""
    torch._dynamo.reset()
    model, options = Counting(), zero(stage, dspass={"report": "report.html"})
    if how == "shard":
        dspass.shard(model, options)
    compiled = torch.compile(model, backend="deepspeed", options=options)
    with mock.patch("dspass.backend.report_at_exit") as promised:
        for _ in range(3):
            compiled(torch.ones(2, 8)).backward()
    optimizer = torch.optim.AdamW(model.parameters())
    model.zero_grad()
    get_optimizer_state_dict(model, optimizer)  # makes the states by a step of its own
    engine = engine_of(model)
    assert engine is not None
    return promised.call_count, model.offset.mean().item(), engine.steps  # type: ignore[operator,union-attr]


@pytest.mark.parametrize(("how", "stage"), [("compile", 0), ("compile", 3), ("shard", 1), ("shard", 3)])
def test_a_report_is_promised_once_and_buffers_are_those_of_rank_0(how: str, stage: int) -> None:
    assert run(2, _begun, how, stage) == [(1, 0.0, 0), (0, 0.0, 0)]


def test_a_malformed_file_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "ds_config.json"
    path.write_text('{\n  "zero_optimization": {"stage": 3,}\n}\n')
    with pytest.raises(Exception, match=r"ds_config\.json.*line 2"):
        torch.compile(Mlp(), backend="deepspeed", options=str(path))(*batch())


SCRIPT = """
import sys, torch, torch.distributed as dist, dspass
sys.path.insert(0, sys.argv[1])
from dspass.engines import engine_of
from tests.models import Mlp, points
dist.init_process_group("gloo")
model = Mlp()
compiled = torch.compile(model, backend="deepspeed")
optimizer = torch.optim.AdamW(model.parameters())
for step in range(3):
    compiled(*points(torch.Generator().manual_seed(step), 0, 0)).backward()
    optimizer.step()
    optimizer.zero_grad()
dist.destroy_process_group()
"""


def test_a_configuration_from_the_environment_and_a_report_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    report = tmp_path / "report.json"
    config = tmp_path / "ds_config.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": 1}, "dspass": {"report": str(report)}}))
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port()),
            str(tmp_path / "script.py"), str(root),
        ],
        env=os.environ | {"DSPASS_CONFIG": str(config), "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    saved = dspass.explain(report)
    assert saved.config["zero_optimization"]["stage"] == 1
    assert {t.kind for t in saved.traffic} == {
        "all-gather",
        "reduce-scatter",
        "all-reduce",
    }  # the last: a 0-dim parameter's


def test_max_live_parameters_is_a_limit() -> None:
    """Without it a bucket is gathered while the one before is used; with it none is early where both hold more."""
    from examples.gpt import GPT, GPTConfig

    tokens = torch.randint(0, 256, (2, 32))
    model = GPT(GPTConfig(context=32, layers=4, heads=4, width=64))
    held = {}
    for limit in (None, 60_000):
        zero_keys: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": 0}
        if limit is not None:
            zero_keys["stage3_max_live_parameters"] = limit
        config = {"zero_optimization": zero_keys, "dspass": {"bucket_bytes": 210_000}}
        report = dspass.explain(model, tokens, tokens, config=config, world_size=2)
        held[limit] = max(point.bytes["gathered"] for point in report.memory.timeline)
    assert held[60_000] <= 60_000 * 4 < held[None]


@without_inductor
def _several_of_one_class(stage: int, count: int) -> list[list[float]]:
    """Each model's parameters, whole, after two steps; each rank makes models of its own random numbers."""
    torch.manual_seed(dist.get_rank())
    torch._dynamo.reset()
    found, models = [], []
    for _ in range(count):
        model = Mlp()
        models.append(model)  # all live on
        compiled = torch.compile(model, backend="deepspeed", options=zero(stage))
        optimizer = torch.optim.SGD(compiled.parameters(), lr=0.1)
        for step in range(2):
            compiled(*points(torch.Generator().manual_seed(step), 0, 0)).backward()
            optimizer.step()
            optimizer.zero_grad()
        engine = engine_of(model)
        assert engine is not None
        assert len(engine.compilations) == 1
        whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
        found.append([round(p.double().sum().item(), 9) for p in whole])
    return found


@pytest.mark.parametrize("stage", [0, 3])
def test_several_models_of_one_class_are_each_sharded(stage: int) -> None:
    """Dynamo would give a second one the first one's graph, and run those beyond its limit of 8 compilations uncompiled:
    ranks would train apart, and nobody would say so."""
    first, second = run(2, _several_of_one_class, stage, 6)
    assert first == second
    assert len({tuple(values) for values in first}) == 6
