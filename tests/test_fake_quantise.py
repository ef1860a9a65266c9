"""Training with what layers read rounded to few bits: the operator, its schedule, who is chosen, and the numbers beside a
reference that rounds by hand."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from dspass.config import Config, ConfigError
from dspass.engines import engine_of
from dspass.fake_quantising import choose
from dspass.runtime.fake_quantise import Schedule, fake_quantise
from dspass.runtime.few_bits import dequantise_rows, quantise_rows
from tests.graphs import straight_through
from tests.models import MODELS, Gpt
from tests.ranks import run
from tests.training import call, whole, without_inductor, zero

WEIGHTS, INPUTS = "weight_quantization", "activation_quantization"


def rounding(
    weights: dict[str, Any] | None = None, inputs: dict[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    """A configuration in which weights fall from 6 bits to 4, and inputs are rounded to 6, both within ten steps."""
    return {
        "compression_training": {
            WEIGHTS: {
                "shared_parameters": {"enabled": True, "schedule_offset": 2, **(weights or {})},
                "different_groups": {
                    "all": {"params": {"start_bits": 6, "target_bits": 4, "quantization_period": 2}, "modules": ["*"]}
                },
            },
            INPUTS: {
                "shared_parameters": {"enabled": True, "schedule_offset": 3, **(inputs or {})},
                "different_groups": {"all": {"params": {"bits": 6}, "modules": ["*"]}},
            },
        },
        **more,
    }


#: Of the ten steps of :func:`rounding`.
WEIGHT_BITS = [None, None, 6, 6, 5, 5, 4, 4, 4, 4]
INPUT_BITS = [None, None, None, 6, 6, 6, 6, 6, 6, 6]


# -- the operator --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_without_levels_values_are_as_they_are_to_the_last_bit(dtype: torch.dtype, symmetric: bool) -> None:
    x = torch.randn(5, 33).to(dtype)
    x[0, :4] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-7])
    kind = torch.int32 if dtype.itemsize == 4 else torch.int16
    found = fake_quantise(x, torch.tensor(0.0), [-1], symmetric)
    assert torch.equal(found.view(kind), x.view(kind))


@pytest.mark.parametrize(("bits", "format"), [(8, "int8"), (4, "int4")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_training_reads_is_what_is_stored_to_the_last_bit(bits: int, format: str, dtype: torch.dtype) -> None:
    weight = (torch.randn(37, 53) * torch.logspace(-3, 3, 37)[:, None]).to(dtype)
    weight[3] = 0
    weight[5, 7] = float("inf")
    codes, scales = quantise_rows(weight, format)
    stored = dequantise_rows(codes, scales, 53, format, dtype)
    found = fake_quantise(weight, torch.tensor(2.0 ** (bits - 1) - 1), [1])
    torch.testing.assert_close(found, stored, rtol=0, atol=0, equal_nan=True)
    assert found[5].isnan().all()


@pytest.mark.parametrize("bits", [2, 3, 8, 12])
def test_asymmetric_values_lie_between_the_smallest_and_the_largest(bits: int) -> None:
    x = torch.rand(6, 4000) * 3 - torch.tensor([0.0, 1.0, 3.0, -2.0, 5.0, 0.5])[:, None]
    found = fake_quantise(x, torch.tensor(2.0 ** (bits - 1) - 1), [1], False)
    low, high = x.amin(1).clamp_max(0), x.amax(1).clamp_min(0)
    step = (high - low) / (2**bits - 1)
    assert ((found - x).abs() <= 1.001 * step[:, None]).all()
    for row, size in zip(found, step, strict=True):
        multiples = (row / size).round()
        assert len(multiples.unique()) <= 2**bits
        torch.testing.assert_close(row, multiples * size)
    inside = (x > (low + step)[:, None]) & (x < (high - step)[:, None])
    assert ((found - x).abs() <= 0.501 * step[:, None])[inside].all()


def test_gradients_go_straight_through() -> None:
    x = torch.randn(4, 5, requires_grad=True)
    grad = torch.randn(4, 5)
    fake_op = torch.ops.dspass.fake_quantise
    for symmetric in (True, False):
        (found,) = torch.autograd.grad(fake_op(x, torch.tensor(1.0), [0, 1], symmetric), x, grad)
        assert torch.equal(found, grad)


def test_what_cannot_be_rounded_is_refused() -> None:
    with pytest.raises(ValueError, match="a tensor of int64 cannot be rounded"):
        torch.ops.dspass.fake_quantise(torch.arange(3), torch.tensor(7.0), [0])
    with pytest.raises(ValueError, match="no dims share a scale"):
        torch.ops.dspass.fake_quantise(torch.ones(3), torch.tensor(7.0), [])


def test_bits_fall_slower_and_slower() -> None:
    schedule = Schedule(offset=3, start_bits=8, target_bits=4, period=2)
    assert [schedule.bits(step) for step in range(22)] == [None] * 3 + [8] * 2 + [7] * 2 + [6] * 4 + [5] * 8 + [4] * 3
    assert {Schedule(offset=0, start_bits=4, target_bits=4).bits(step) for step in range(9)} == {4}


# -- who is chosen -------------------------------------------------------------------------------------------------------


def chosen(
    model: nn.Module, kind: str = WEIGHTS, groups: dict[str, Any] | None = None, **shared: Any
) -> dict[str, Any]:
    said = rounding(**{"weights" if kind == WEIGHTS else "inputs": shared})
    if groups is not None:
        said["compression_training"][kind]["different_groups"] = groups
    found = choose(model, Config.load(said))
    both = found.weights if kind == WEIGHTS else found.inputs
    return {how.name: how.schedule.target_bits for how in both.values()}


def test_patterns_are_found_anywhere_in_a_name() -> None:
    weights = {
        "coarse": {"params": {"start_bits": 8, "target_bits": 3}, "modules": [r"blocks\.\d\.(up|down)"]},
        "fine": {"params": {"start_bits": 8, "target_bits": 8}, "modules": ["head"]},
    }
    found = chosen(Gpt(), groups=weights)
    assert found == {f"blocks.{i}.{name}.weight": 3 for i in range(2) for name in ("up", "down")} | {"head.weight": 8}
    assert set(chosen(Gpt(), INPUTS)) == {f"blocks.{i}.{n}" for i in range(2) for n in ("qkv", "out", "up", "down")} | {
        "head"
    }


@pytest.mark.parametrize(
    ("groups", "shared", "says"),
    [
        (
            {"a": {"params": {"start_bits": 8, "target_bits": 8}, "modules": ["atention"]}},
            {},
            r"different_groups\.a\.modules: 'atention' finds no layer; there are 11, 'embed' the first",
        ),
        (
            {
                "a": {"params": {"start_bits": 8, "target_bits": 8}, "modules": ["embed"]},
                "b": {"params": {"start_bits": 8, "target_bits": 4}, "modules": ["up", "head"]},
            },
            {},
            r"different_groups\.b\.modules: head is in two groups, as embed is in 'a', whose weight it shares",
        ),
        (None, {"quantize_groups": 7}, r"quantize_groups: 7 scales do not divide the 1952 values of embed\.weight"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(groups: Any, shared: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        chosen(Gpt(), groups=groups, **shared)


# -- numbers -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def by_hand(weight_bits: int | None, input_bits: int | None, over: Any = -1) -> Iterator[None]:
    """Inside, layers read what is rounded by hand."""
    linear, embedding, addmm, conv1d = F.linear, F.embedding, torch.addmm, torch.conv1d

    def rounded_linear(x: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
        return linear(straight_through(x, input_bits), straight_through(weight, weight_bits), bias)

    def rounded_addmm(bias: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return addmm(bias, straight_through(x, input_bits), straight_through(weight, weight_bits, 0))

    def rounded_embedding(ids: torch.Tensor, weight: torch.Tensor, *args: Any) -> torch.Tensor:
        return embedding(ids, straight_through(weight, weight_bits), *args)

    def rounded_conv1d(x: torch.Tensor, weight: torch.Tensor, *args: Any) -> torch.Tensor:
        return conv1d(straight_through(x, input_bits, (-1, -2)), straight_through(weight, weight_bits, (1, 2)), *args)

    with (
        mock.patch.object(F, "linear", rounded_linear),
        mock.patch.object(F, "embedding", rounded_embedding),
        mock.patch.object(F, "conv1d", rounded_conv1d),
        mock.patch.object(torch, "addmm", rounded_addmm),
    ):
        yield


@without_inductor
def beside_by_hand(
    build: Callable[[], nn.Module], batches: Callable[..., Any], config: dict[str, Any], steps: int = 10
) -> tuple[float, float, int, list[float]]:
    """The largest relative differences of losses and parameters, how many graphs were compiled, and the losses."""
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    torch.manual_seed(0)
    reference = build()
    torch.manual_seed(0)
    model = build()
    compiled = torch.compile(model, backend="deepspeed", options=config)
    ours, theirs = (torch.optim.SGD(m.parameters(), lr=0.05) for m in (model, reference))
    draw, off, losses = torch.Generator().manual_seed(1), 0.0, []
    for step in range(steps):
        data = [batches(draw, r, 0) for r in range(ranks)]
        loss = call(compiled, data[rank])
        loss.backward()
        with by_hand(WEIGHT_BITS[step], INPUT_BITS[step]):
            wanted = [call(reference, batch) for batch in data]
            (sum(wanted) / ranks).backward()
        off = max(off, float((loss - wanted[rank]).abs() / wanted[rank].abs()))
        losses.append(loss.item())
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    pairs = zip(model.parameters(), reference.parameters(), strict=True)
    params_off = max(float((whole(a.detach()) - b).norm() / b.norm().clamp_min(1e-3)) for a, b in pairs)
    engine = engine_of(model)
    assert engine is not None
    return off, params_off, len(engine.compilations), losses


@pytest.mark.parametrize("name", ["gpt", "checkpointed_attention", "batchnorm"])
def test_one_process_trains_as_rounding_by_hand(name: str) -> None:
    loss_off, params_off, graphs, _ = beside_by_hand(*MODELS[name], rounding())
    assert loss_off < 1e-5
    assert params_off < 1e-4
    assert graphs == 1, "bits fall without another graph"


@pytest.mark.parametrize("stage", [0, 3])
def test_ranks_train_as_rounding_by_hand(stage: int) -> None:
    config = zero(stage) | rounding()
    for loss_off, params_off, graphs, _ in run(2, beside_by_hand, *MODELS["gpt"], config):
        assert loss_off < 1e-5
        assert params_off < 1e-4
        assert graphs == 1
