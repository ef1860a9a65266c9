"""What sharding does to a model: the collectives of a step, what a parameter is outside of a forward, and refusals."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn

import dspass
from tests.models import MODELS, Mlp, points
from tests.ranks import run
from tests.training import close, train, whole, zero


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return points(torch.Generator().manual_seed(1), 0, 0)


@pytest.mark.parametrize("calls", [1, 3])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_collectives_of_a_step(stage: int, calls: int) -> None:
    """The table of the four stages, with everything in one bucket of each kind."""
    config = zero(stage, gradient_accumulation_steps=calls, dspass={"bucket_bytes": "1GB"})
    results = run(2, train, *MODELS["gpt"], config, steps=4, calls=calls)
    close(results)
    counts = results[0]["counts"]
    replicated = any(layout == "replicate" for layout in results[0]["layouts"].values())
    expected = {
        0: {"all-reduce": 1},
        1: {"all-gather": 1, "reduce-scatter": 1},
        2: {"all-gather": 1, "reduce-scatter": calls},
        3: {"all-gather": 2 * calls, "reduce-scatter": calls},
    }[stage]
    if stage == 3 and replicated:
        expected["all-reduce"] = calls  # biases, which every rank holds whole
    assert counts == expected


def _eager_read() -> str:
    model = Mlp()
    compiled = torch.compile(model, backend="deepspeed", options=zero(3))
    x, y = batch()
    compiled(x, y).backward()
    kind = type(model.first.weight).__name__ if dist.get_rank() == 0 else "DTensor"  # one rank alone: no collective
    with torch.no_grad():
        model.first.weight.fill_(0.5)
        before = compiled(x, y)
    assert torch.all(whole(model.first.weight) == 0.5)
    copied = copy.deepcopy(model)
    torch.compile(copied, backend="deepspeed", options=zero(3))(x, y).backward()
    assert copied.first.weight.grad is not None
    assert copied.first.weight is not model.first.weight
    with pytest.raises(TypeError, match="state_dict"):
        pickle.dumps(model)
    model.eval()
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x, y), before)
    return kind


def test_outside_a_forward_a_parameter_is_a_parameter() -> None:
    assert run(2, _eager_read) == ["DTensor", "DTensor"]


def _fill() -> float:
    torch.manual_seed(0)
    original = Mlp()
    state = original.state_dict()
    with torch.device("meta"):
        empty = Mlp()
    dspass.shard(empty, zero(3), fill=state)
    for name, param in empty.named_parameters():
        torch.testing.assert_close(whole(param), state[name])
    with torch.device("meta"):
        other = Mlp()
    dspass.shard(other, zero(3), fill=lambda name, shape, dtype: state[name])
    x, y = batch()
    loss = torch.compile(other, backend="deepspeed", options=zero(3))(x, y)
    with torch.device("meta"):
        third = Mlp()
    with pytest.raises(KeyError, match="scale"):
        dspass.shard(third, zero(3), fill={k: v for k, v in state.items() if k != "scale"})
    return abs(loss.item() - original(x, y).item())


def test_shard_fills_a_model_from_the_meta_device() -> None:
    assert max(run(2, _fill)) < 1e-5


def _refused(what: str) -> str:
    model: nn.Module = Mlp()
    x, y = batch()
    options = zero(3)
    if what == "configuration" and dist.get_rank() == 1:
        options = zero(3, gradient_accumulation_steps=2)
    if what == "parameters" and dist.get_rank() == 1:
        model.second = nn.Linear(37, 30, bias=False)
    if what == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    try:
        torch.compile(model, backend="deepspeed", options=options)(x, y)
    except Exception as error:
        return str(error)
    return "nothing was refused"


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("configuration", "gradient_accumulation_steps"),
        ("parameters", "parameters"),
        ("ddp", "DistributedDataParallel"),
    ],
)
def test_refusals_on_all_ranks(what: str, says: str) -> None:
    for text in run(2, _refused, what):
        assert says in text


def test_a_stage_without_a_process_group_is_refused() -> None:
    x, y = batch()
    with pytest.raises(Exception, match="torchrun"):
        torch.compile(Mlp(), backend="deepspeed", options=zero(3))(x, y)


def test_other_torch_versions_are_refused() -> None:
    from dspass.runtime import compat

    with pytest.raises(compat.UnsupportedTorchError, match=r"2\.13"):
        compat.check_torch("2.10.0")
