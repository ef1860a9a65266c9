"""Plans in files: saved, used again, and refused for something else."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.fx as fx

import dspass
from dspass.planner.plan import Planner
from dspass.planner.saved import OF_BATCH, MadeFor, PlanError, PlanFile, described
from tests.ranks import run
from tests.told import told
from tests.training import without_inductor


@without_inductor
def _trained(path: Any, budget: str | None = None, rows: int = 4, width: int = 12) -> float:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(width, 32), torch.nn.GELU(), torch.nn.Linear(32, 1))
    own = {"plan": str(path), **({"memory_budget": budget} if budget else {})}
    compiled = torch.compile(model, backend="deepspeed", options={"zero_optimization": {"stage": 0}, "dspass": own})
    loss = compiled(torch.randn(rows, width)).square().mean()
    loss.backward()
    return loss.item()


def _why(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(Exception) as caught:
        _trained(*args, **kwargs)
    inner = getattr(caught.value, "inner_exception", caught.value)
    assert isinstance(inner, PlanError)
    return str(inner)


def test_a_plan_is_saved_used_again_and_refused_for_something_else(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plans" / "plan.json"
    assert "no dspass.memory_budget to make one for" in _why(path)
    first = _trained(path, "1GB")

    def planned(self: Planner) -> Any:
        raise AssertionError("planned anew")

    with monkeypatch.context() as no_planning:
        no_planning.setattr(Planner, "plan", planned)
        assert _trained(path) == first
        assert _trained(path, "1GB") == first
        assert "the plan in" in (small := _why(path, "100B"))
        assert "Raise the budget" in small
        assert "inputs: f32[4,12]" in (rows := _why(path, rows=8))
        assert "f32[8,12]" in rows
        assert "model: Sequential of" in _why(path, width=16)
    _trained(path, "1GB", rows=8)  # another batch of the same model is planned and added
    assert _trained(path, rows=8) is not None
    _trained(path, "1GB", width=16)  # and so is another model
    assert _trained(path, width=16) is not None
    assert _trained(path) == first
    for text in (
        "{}",
        '{"version": 5, "graphs": [{}]}',
        '{"version": 5, "graphs": [{"made_for": [], "plan": {}}]}',
        "[",
    ):
        path.write_text(text)
        assert "plan.json cannot be read" in (unread := _why(path))
        assert "Delete it, or name another" in unread


def test_a_prediction_is_not_held_to_the_file_of_a_run(tmp_path: Any) -> None:
    """Which is for this device: what another would need is planned, and the file stays as it is."""
    path = tmp_path / "plan.json"
    _trained(path, "1GB")
    before = path.read_text()
    model = torch.nn.Sequential(torch.nn.Linear(12, 32), torch.nn.GELU(), torch.nn.Linear(32, 1))
    own = {"plan": str(path), "memory_budget": "1GB"}
    (plan,) = dspass.explain(model, torch.randn(4, 12), config={"dspass": own}, device="h100").plans
    assert plan.budget_bytes == 10**9
    assert path.read_text() == before
    with pytest.raises(PlanError, match="device: cpu in the plan, h100 here"):
        dspass.explain(model, torch.randn(4, 12), config={"dspass": {"plan": str(path)}}, device="h100")


def _on_ranks(path: str) -> list[float]:
    first = _trained(path, "1GB")
    with mock.patch.object(Planner, "plan", side_effect=AssertionError("planned anew")):
        return [first, _trained(path), _trained(path, "2GB")]


def test_ranks_read_one_file(tmp_path: Any) -> None:
    for found in run(2, _on_ranks, str(tmp_path / "plan.json")):
        assert len(set(found)) == 1


RUN: dict[str, Any] = {
    "model": "m", "ranks": 1, "stage": 0, "device": "cpu", "product": "", "passes": (), "options": "", "torch": "2"
}  # fmt: skip


def _joint(first: str, share: float = 0.1, rows: int = 4) -> fx.Graph:
    """``x`` or ``y`` is scaled and added to ``x``."""
    graph = fx.Graph()
    nodes = {name: graph.placeholder(name) for name in "xy"}
    scaled = graph.call_function(torch.ops.aten.mul.Tensor, (nodes[first], share))
    view = graph.call_function(torch.ops.aten.view.default, (scaled, [rows, 2]))
    graph.output((graph.call_function(torch.ops.aten.add.Tensor, (view, nodes["x"])),))
    for name, node in nodes.items():
        node.meta["val"] = torch.empty(rows if name == "x" else 1, 2)
    return graph


def test_a_plan_that_cannot_be_written_serves_this_run(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    file, made_for = PlanFile(str(tmp_path / "plan.json")), MadeFor(**RUN, **described(_joint("x")))
    with monkeypatch.context() as patched:
        patched.setattr("os.replace", full)
        file.add(made_for, told(160, [50], [50]).plan()[1])
    assert f"{file.path} cannot be written ([Errno 28] No space left" in caplog.text
    assert "Name a file in a folder" in caplog.text
    assert not list(tmp_path.iterdir())
    with monkeypatch.context() as patched:
        patched.setattr("os.makedirs", full)
        file.add(made_for, told(160, [50], [50]).plan()[1])
    assert len(caplog.records) == 2


def test_a_plan_for_less_memory_is_used_and_said(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is said where no plan is faster, and where it was made for more."""
    file, wanted = PlanFile(str(tmp_path / "plan.json")), MadeFor(**RUN, **described(_joint("x")))
    _, plan = told(140, [50, 30], [50, 30]).plan()
    assert (plan.peak, plan.chosen) == (130, 1)
    file.add(wanted, plan)
    assert file.find(wanted, 135) == plan
    assert not caplog.records
    assert file.find(wanted, 200) == plan
    assert "was made for 140 B, and dspass.memory_budget is 200 B now" in caplog.text
    assert "Delete the file to have it planned anew" in caplog.text


def test_a_plan_that_does_not_go_with_what_is_settled_is_not_used(tmp_path: Any) -> None:
    file, wanted = PlanFile(str(tmp_path / "plan.json")), MadeFor(**RUN, **described(_joint("x")))
    file.add(wanted, told(160, [50], [50]).plan()[1])
    assert file.find(wanted, 160, goes_with=lambda _: False) is None
    with pytest.raises(PlanError, match=r"does not go with the one for earlier inputs: .* Give dspass\.memory_budget"):
        file.find(wanted, None, goes_with=lambda _: False)


def test_a_plan_counts_what_lies_beside_it_today(tmp_path: Any) -> None:
    """One that was made beside states of 8 bits may not fit beside those of 32."""
    file, wanted = PlanFile(str(tmp_path / "plan.json")), MadeFor(**RUN, **described(_joint("x")))
    _, plan = told(160, [50], [50]).plan()
    file.add(wanted, replace(plan, base=100))
    less, same = (file.find(wanted, 160, lambda _, beside=b: (beside, 0)) for b in (80, 110))
    assert less is not None
    assert same is not None
    assert (less.peak, less.base, same.peak) == (130, 80, 160)
    with pytest.raises(PlanError, match=r"takes 170 B, as 120 B of parameters, optimiser states .* were 100 B"):
        file.find(wanted, 160, lambda _: (120, 0))
    with pytest.raises(PlanError, match="takes 161 B"):
        file.find(wanted, 160, lambda _: (80, 161))


def test_a_plan_is_for_what_goes_into_which_operator() -> None:
    """Sizes of the batch stand among the operators' arguments, and so does what a model is made of."""
    wanted = MadeFor(**RUN, **described(_joint("x")))
    assert not MadeFor(**RUN, **described(_joint("x"))).differences(wanted)
    batch, skip, share = (
        MadeFor(**RUN, **described(graph)) for graph in (_joint("x", rows=8), _joint("y"), _joint("x", share=0.2))
    )
    assert wanted.differences(batch) == ["inputs: f32[8,2] in the plan, f32[4,2] here."]
    assert not wanted.differences(batch, but=OF_BATCH)
    assert wanted.differences(skip, but=OF_BATCH) == ["graph: other values go into its operators here."]
    (said,) = wanted.differences(share)
    assert "is another one here" in said
    one = _joint("x")
    next(n for n in one.nodes if n.name == "mul_tensor").target = torch.ops.aten.div.Tensor
    assert "operators: 1 aten.div.Tensor in the plan, 1 aten.mul.Tensor here." in wanted.differences(
        MadeFor(**RUN, **described(one))
    )
    assert MadeFor.from_json(json.loads(json.dumps(wanted.to_json()))) == wanted
