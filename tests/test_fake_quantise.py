"""Training with what layers read rounded to few bits: the operator, its schedule, who is chosen, and the numbers beside a
reference that rounds by hand."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy

import dspass
from dspass.config import Config, ConfigError
from dspass.engines import engine_of
from dspass.fake_quantising import choose
from dspass.passes.nodes import calls
from dspass.runtime.fake_quantise import FAKE_QUANTISE, Schedule, fake_quantise
from dspass.runtime.few_bits import dequantise_rows, quantise_rows
from tests.graphs import run_pipeline, straight_through
from tests.models import MODELS, Gpt, points
from tests.ranks import run
from tests.test_architectures import TOKENS, gpt2
from tests.test_passes import toy_of
from tests.test_quantise import compiled
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


def test_opcheck_and_inductor_s_code_is_the_reference_to_the_last_bit() -> None:
    x, levels = torch.randn(7, 65, requires_grad=True), torch.tensor(7.0)
    for symmetric in (True, False):
        torch.library.opcheck(FAKE_QUANTISE, (x, levels, [1], symmetric))
        run_code, tensors = compiled(FAKE_QUANTISE, (x.detach(), levels, [1], symmetric))
        (found,) = run_code(list(tensors))
        assert torch.equal(found, fake_quantise(x.detach(), levels, [1], symmetric))


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
    build: Callable[[], nn.Module], batches: Callable[..., Any], config: dict[str, Any], begin: int = 0, end: int = 10
) -> tuple[float, float, int]:
    """The largest relative differences of losses and parameters, and how many graphs were compiled, in steps ``begin`` to
    ``end`` of the schedule."""
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    torch.manual_seed(0)
    reference = build()
    torch.manual_seed(0)
    model = build()
    compiled = torch.compile(model, backend="deepspeed", options=config)
    ours, theirs = (torch.optim.SGD(m.parameters(), lr=0.05) for m in (model, reference))
    draw, off = torch.Generator().manual_seed(1), 0.0
    for step in range(begin, end):
        data = [batches(draw, r, 0) for r in range(ranks)]
        loss = call(compiled, data[rank])
        loss.backward()
        with by_hand(WEIGHT_BITS[step], INPUT_BITS[step]):
            wanted = [call(reference, batch) for batch in data]
            (sum(wanted) / ranks).backward()
        off = max(off, abs(loss.item() / wanted[rank].item() - 1))
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    pairs = zip(model.parameters(), reference.parameters(), strict=True)
    params_off = max(((whole(a) - b).norm() / b.norm().clamp_min(1e-3)).item() for a, b in pairs)
    engine = engine_of(model)
    assert engine is not None
    return off, params_off, len(engine.compilations)


def equal(found: tuple[float, float, int]) -> None:
    loss_off, params_off, graphs = found
    assert loss_off < 1e-5
    assert params_off < 1e-4
    assert graphs == 1, "bits fall without another graph"


def sentences(draw: torch.Generator, rank: int, step: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, TOKENS, (2, 12), generator=draw)
    return {"input_ids": ids, "labels": ids}


def test_convolutions_train_as_rounding_by_hand() -> None:
    equal(beside_by_hand(*MODELS["batchnorm"], rounding()))


def test_a_hugging_face_model_trains_as_rounding_by_hand() -> None:
    """Its ``Conv1D`` has output channels for columns."""
    equal(beside_by_hand(gpt2, sentences, rounding()))


@pytest.mark.parametrize(("name", "stage", "begin"), [("gpt", 0, 0), ("checkpointed_attention", 3, 2)])
def test_ranks_train_as_rounding_by_hand(name: str, stage: int, begin: int) -> None:
    """At stage 3 the first call, which runs before the model is sharded, rounds already."""
    config = zero(stage) | rounding({"schedule_offset": 2 - begin}, {"schedule_offset": 3 - begin})
    for found in run(2, beside_by_hand, *MODELS[name], config, begin):
        equal(found)


def test_inductor_s_code_trains_as_rounding_by_hand() -> None:
    equal(beside_by_hand(Small, points, rounding({"schedule_offset": 1}, {"schedule_offset": 2}), 1, 5, inductor=True))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.head = nn.Linear(10, 17), nn.Linear(17, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.head(torch.tanh(self.into(x))), y)


@without_inductor
def test_scales_divide_a_weight_and_what_is_read_is_asymmetric() -> None:
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(nn.Linear(6, 8), Conv1D(4, 8))
    section = {"schedule_offset": 0, "quantize_groups": 4, "quantization_type": "asymmetric"}
    config = rounding(section, {"enabled": False})
    x = torch.randn(3, 6)
    found = torch.compile(model, backend="deepspeed", options=config)(x)

    def rounded(weight: torch.Tensor) -> torch.Tensor:
        return fake_quantise(weight.reshape(4, -1), torch.tensor(31.0), [1], False).view(weight.shape)

    wanted = F.linear(x, rounded(model[0].weight), model[0].bias)
    wanted = F.linear(wanted, rounded(model[1].weight.t()), model[1].bias)
    torch.testing.assert_close(found, wanted)
    assert not torch.allclose(found, model(x), rtol=1e-3)


@without_inductor
def test_stored_weights_read_as_they_were_trained() -> None:
    torch.manual_seed(0)
    model, config = Small(), rounding({"schedule_offset": 0}, {"enabled": False})
    group = config["compression_training"][WEIGHTS]["different_groups"]["all"]
    group["params"] = {"start_bits": 8, "target_bits": 8}
    compiled_model = torch.compile(model, backend="deepspeed", options=config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    draw = torch.Generator().manual_seed(1)
    for _ in range(3):
        compiled_model(*points(draw, 0, 0)).backward()
        optimizer.step()
        optimizer.zero_grad()
    batch = points(draw, 0, 0)
    with torch.no_grad():
        trained, whole_loss = compiled_model(*batch), model(*batch)
        stored = dspass.quantise(copy.deepcopy(model))(*batch)
    torch.testing.assert_close(stored, trained, rtol=1e-6, atol=0)
    assert not torch.allclose(whole_loss, trained, rtol=1e-6)


def test_no_rounded_parameter_is_saved() -> None:
    step = run_pipeline(toy_of("rounded"))
    tagged = {n for n in calls(step.joint, FAKE_QUANTISE) if n.meta.get("recompute") is CheckpointPolicy.MUST_RECOMPUTE}
    assert {tuple(n.args[2]) for n in tagged} == {(1,)}
    assert len(tagged) == 3
    saved = {n.name for n in step.forward.find_nodes(op="output")[0].all_input_nodes}
    assert saved.isdisjoint(n.name for n in tagged)
    assert (
        len([n for n in calls(step.backward, FAKE_QUANTISE) if n.args[2] == [1]]) == 1
    )  # the left one's, for its input


@without_inductor
def test_a_report_says_how_many_bits_there_are_now() -> None:
    model = Small()
    compiled_model = torch.compile(model, backend="deepspeed", options=rounding({"schedule_offset": 1}))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    draw, seen = torch.Generator().manual_seed(1), []
    for _ in range(4):
        compiled_model(*points(draw, 0, 0)).backward()
        found = {(one.kind, one.name): one.bits for one in dspass.explain(model).rounded}
        seen.append((found["weight", "into.weight"], found["activation", "head"]))
        optimizer.step()
        optimizer.zero_grad()
    assert len(found) == 4
    dspass.resume_at(model, 7)
    assert {one.bits for one in dspass.explain(model).rounded} == {4, 6}
    assert seen == [(None, None), (6, None), (6, None), (5, 6)]


@without_inductor
def test_a_resumed_run_goes_on_where_the_schedule_was() -> None:
    model = Small()
    dspass.resume_at(model, 4)  # before there is anything to count steps
    torch.compile(model, backend="deepspeed", options=rounding())(*points(torch.Generator(), 0, 0))
    assert {one.bits for one in dspass.explain(model).rounded} == {5, 6}
    with pytest.raises(ValueError, match="step=-1 is no number of steps"):
        dspass.resume_at(model, -1)


class ByMatmul(Small):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.head(torch.tanh(x @ self.into.weight.t())), y)


@without_inductor
def test_what_stays_whole_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model, batch = ByMatmul(), points(torch.Generator().manual_seed(1), 0, 0)
    torch.compile(model, backend="deepspeed", options=rounding())(*batch)
    assert [r.getMessage() for r in caplog.records] == [
        "What into multiplies stays whole: its weight is read by no product that is known."
    ]
    caplog.clear()
    torch.compile(lambda x: model.into(x).sum(), backend="deepspeed", options=rounding())(batch[0])
    assert "compression_training has no effect: a function was compiled" in caplog.text
