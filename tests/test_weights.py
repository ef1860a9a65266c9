"""Weights in few bits: how they are stored, saved and read, alone and beside what trains."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dspass
from dspass.engines import engine_of
from dspass.passes.nodes import calls
from dspass.runtime import few_bits
from dspass.runtime.few_bits import DEQUANTISE_ROWS, QUANTISED_LINEAR, dequantise_rows, quantise_rows, quantised_linear
from dspass.runtime.formats import FORMATS
from dspass.weights import stored_of
from tests import ranks as workers
from tests.training import operators, without_inductor


def layers(**keys: Any) -> dict[str, Any]:
    return {"dspass": {"quantise": {"layers": keys}}}


class Small(nn.Module):
    """An embedding that is the head's weight too, between them odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 40)
        self.up = nn.Linear(40, 72)
        self.down = nn.Linear(72, 40, bias=False)
        self.norm = nn.LayerNorm(40)
        self.head = nn.Linear(40, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        return self.head(self.norm(x + self.down(torch.relu(self.up(x)))))


def small(dtype: torch.dtype = torch.float32) -> Small:
    torch.manual_seed(0)
    return Small().to(dtype).eval()


def compiled(model: nn.Module, options: dict[str, Any]) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="deepspeed", options=options)


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


# -- operators -----------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 70),
    group=st.sampled_from([None, 16, 32]),
    format=st.sampled_from(sorted(FORMATS)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_each_group_of_a_row_is_rounded_by_itself(
    rows: int, columns: int, group: int | None, format: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(rows * columns)
    x = (torch.randn(rows, columns) * torch.logspace(-2, 2, rows)[:, None]).to(dtype)
    codes, scales = quantise_rows(x, format, group)
    found = dequantise_rows(codes, scales, columns, format, torch.float32)
    wanted = torch.empty_like(found)
    block = few_bits.group_of(columns, group)
    for row in range(rows):
        for at in range(0, columns, block):
            part = x[row, at : at + block]
            one, scale = torch.ops.dspass.quantise(part, format, block)
            wanted[row, at : at + block] = torch.ops.dspass.dequantise(one, scale, part.shape, format, torch.float32)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 5])
def test_a_product_of_sixteen_bits_with_int8_is_that_with_the_weight_written_out(rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    x, b = torch.randn(rows, 40, dtype=torch.bfloat16), torch.randn(24, dtype=torch.bfloat16) if bias else None
    codes, scales = quantise_rows(torch.randn(24, 40), "int8")
    weight = dequantise_rows(codes, scales, 40, "int8", torch.float32)
    wanted = nn.functional.linear(x.float(), weight, b.float() if b is not None else None)
    # bf16 rounds the scale, or the weight, and the sum: three times 2**-9.
    assert off(quantised_linear(x, codes, scales, b, 40, "int8"), wanted) < 3 * 2**-9


def test_a_dynamic_product_is_exact_in_integers() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(5, 40), torch.randn(24, 40), torch.randn(24)
    codes, scales = quantise_rows(weight, "int8")
    left, of_left = quantise_rows(x, "int8")
    sums = left.view(torch.int8)[:, :40].double() @ codes.view(torch.int8)[:, :40].double().t()
    wanted = sums * of_left.double() * scales[:, 0].double() + bias.double()
    found = quantised_linear(x, codes, scales, bias, 40, "int8", True)
    torch.testing.assert_close(found, wanted.float(), rtol=1e-6, atol=1e-6)


def test_a_row_that_is_not_finite_comes_out_so_and_others_as_they_are() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 32)
    codes, scales = quantise_rows(torch.randn(8, 32), "int8")
    clean = quantised_linear(x, codes, scales, None, 32, "int8", True)
    x[1, 3] = float("inf")
    found = quantised_linear(x, codes, scales, None, 32, "int8", True)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], clean[[0, 2]])


# -- models --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["int4", "fp6_e3m2"])
@torch.no_grad()
def test_a_stored_model_computes_with_what_its_weights_came_to(format: str) -> None:
    model, by_hand = small(), small()
    dspass.quantise(model, layers(format=format, group_size=16))
    for module in (by_hand.up, by_hand.down, by_hand.head):
        rows = module.weight
        rows.copy_(dequantise_rows(*quantise_rows(rows, format, 16), rows.shape[1], format, torch.float32))
    ids = torch.randint(50, (2, 7))
    torch.testing.assert_close(model(ids), by_hand(ids))
    found = compiled(model, layers(format=format, group_size=16))(ids)
    torch.testing.assert_close(found, by_hand(ids))
    assert set(stored_of(model)) == {"embed", "up", "down", "head"}
    assert model.embed.weight_codes is model.head.weight_codes
    assert "weight" not in model.up._parameters


@torch.no_grad()
def test_products_and_embeddings_read_codes() -> None:
    model = small(torch.bfloat16)
    whole = copy.deepcopy(model)
    run = compiled(dspass.quantise(model), {})
    ids = torch.randint(50, (1, 3))
    assert off(run(ids), whole(ids)) < 0.03
    graph = _graph(model)
    assert len(calls(graph, QUANTISED_LINEAR)) == 3
    (rows,) = calls(graph, DEQUANTISE_ROWS)
    assert tuple(rows.meta["val"].shape) == (1, 3, 40)


def _graph(model: nn.Module) -> torch.fx.Graph:
    engine = engine_of(model)
    assert engine is not None
    return engine.compilations[-1].graphs["forward"].graph


@torch.no_grad()
def test_activations_are_rounded_where_the_options_say_so() -> None:
    options = layers(format="int8", activations="int8")
    model = dspass.quantise(small(), options)
    ids = torch.randint(50, (2, 30))
    eager = model(ids)
    run = compiled(model, options)
    assert 1e-4 < off(run(ids), eager) < 0.03
    assert all(node.args[-1] is True for node in calls(_graph(model), QUANTISED_LINEAR))


@torch.no_grad()
def test_the_first_call_stores_the_weights() -> None:
    options = layers(format="int8", exclude=["head"])
    model, other = small(), dspass.quantise(small(), options)
    run, ids = compiled(model, options), torch.randint(50, (2, 7))
    first, second = run(ids), run(ids)
    torch.testing.assert_close(first, other(ids))
    torch.testing.assert_close(second, other(ids))
    assert set(stored_of(model)) == {"up", "down"}
    (kind,) = {(t.kind, t.format) for t in dspass.explain(model).quantised}
    assert kind == ("weight", "int8")


@torch.no_grad()
def test_the_first_call_computes_in_the_precision_of_the_options() -> None:
    options = {**layers(format="int8"), "bf16": {"enabled": True}}
    model, ids = small(), torch.randint(50, (2, 7))
    run = compiled(model, options)
    first, second = run(ids), run(ids)
    assert first.dtype == second.dtype == torch.bfloat16
    assert off(second, first) < 0.02


def test_a_function_has_no_layers_to_store(caplog: pytest.LogCaptureFixture) -> None:
    weight = nn.Parameter(torch.randn(4, 4))
    torch._dynamo.reset()
    run = torch.compile(lambda x: x @ weight, backend="deepspeed", options=layers(format="int8"))
    run(torch.randn(2, 4))
    assert "dspass.quantise.layers has no effect" in caplog.text


def test_products_that_cannot_be_are_refused() -> None:
    codes, scales = quantise_rows(torch.randn(8, 40), "int8", 16)
    with pytest.raises(ValueError, match="one scale a row alone"):
        quantised_linear(torch.randn(2, 40), codes, scales, None, 40, "int8", True)
    with pytest.raises(ValueError, match=r"x of 48 columns .* a weight of 40"):
        quantised_linear(torch.randn(2, 48), codes, scales, None, 40, "int8")


def test_deepspeed_s_keys_mean_the_same() -> None:
    said = {"weight_quantization": {"quantized_initialization": {"num_bits": 4, "group_size": 32}}}
    stored = stored_of(dspass.quantise(small(), said))["up"]
    assert (stored.format, stored.group) == ("int4", 32)
    for key, value in (("num_bits", 6), ("group_dim", 0), ("symmetric", False)):
        with pytest.raises(dspass.ConfigError, match=f"quantized_initialization.{key}"):
            dspass.Config.load({"weight_quantization": {"quantized_initialization": {key: value}}})


@torch.no_grad()
def test_state_comes_back_from_codes_and_from_whole_weights() -> None:
    model, ids = dspass.quantise(small()), torch.randint(50, (2, 7))
    wanted = model(ids)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    with torch.device("meta"):
        fresh = dspass.quantise(Small().eval())
    fresh.load_state_dict(torch.load(file), assign=True)
    assert torch.equal(fresh(ids), wanted)
    again = dspass.quantise(Small().eval())
    again.load_state_dict(small().state_dict())
    assert torch.equal(again(ids), wanted)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(ids), wanted)


@torch.no_grad()
def test_another_precision_leaves_codes_and_scales() -> None:
    model = dspass.quantise(small())
    scales = model.up.weight_scales.clone()
    model.bfloat16()
    assert model.up.weight.dtype == torch.bfloat16
    assert torch.equal(model.up.weight_scales, scales)
    assert model(torch.zeros(1, 1, dtype=torch.long)).dtype == torch.bfloat16


def test_a_weight_that_would_be_off_too_far_stays_whole(caplog: pytest.LogCaptureFixture) -> None:
    model = small()
    with torch.no_grad():
        model.up.weight[0, 0] = 50.0  # an outlier, which spoils its row
    errors = {name: s.relative_error for name, s in stored_of(dspass.quantise(copy.deepcopy(model))).items()}
    limit = sorted(errors.values())[-2]
    dspass.quantise(model, layers(format="int8", max_relative_error=limit))
    assert set(stored_of(model)) == set(errors) - {max(errors, key=lambda name: errors[name])}
    assert "1 of 3 weights stay whole" in caplog.text


NO_LINEAR = nn.Sequential(nn.LayerNorm(4))


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: NO_LINEAR, {}, "no linear layer with a floating-point weight"),
        (lambda: small(), layers(format="int8", modules=["mlp.*"]), "no linear layer is named so; there are 3, 'up'"),
        (lambda: dspass.quantise(small()), {}, "stored in few bits already"),
        (lambda: _frozen(small(), "norm"), {}, "trains, while other parameters are frozen"),
        (small, layers(format="int7"), "format"),
        (small, layers(format="int8", group_size=24), "no multiple of 16"),
        (small, layers(format="int4", activations="int8"), "int8 weights with one scale an output channel alone"),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], nn.Module], options: dict[str, Any], message: str) -> None:
    with pytest.raises(dspass.ConfigError, match=message):
        dspass.quantise(make(), options)


def test_a_model_that_trains_whole_is_not_frozen_unseen() -> None:
    run = compiled(small(), layers(format="int8"))
    with pytest.raises(Exception, match="every parameter of the model trains"):
        run(torch.zeros(1, 1, dtype=torch.long))


def _frozen(model: nn.Module, *names: str) -> nn.Module:
    for name, param in model.named_parameters():
        param.requires_grad_(not name.startswith(names))
    return model


class Adapted(nn.Module):
    """A frozen layer beside two small ones that train (LoRA; Hu et al., 2021)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs)
        self.base.requires_grad_(False)
        self.down = nn.Linear(inputs, 4, bias=False)
        self.up = nn.Linear(4, outputs, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def adapted() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Adapted(32, 64), nn.GELU(), Adapted(64, 32))


def adapter_losses(model: nn.Module, run: Any, rank: int = 0, ranks: int = 1) -> list[float]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    torch.manual_seed(1)
    losses = []
    for _ in range(3):
        x = torch.randn(8, 32).chunk(ranks)[rank]
        loss = (run(x) - x.sin()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_adapters_train_beside_stored_weights() -> None:
    eager = dspass.quantise(adapted())
    model = adapted()
    found = adapter_losses(model, compiled(model, layers(format="int8")))
    torch.testing.assert_close(found, adapter_losses(eager, eager))
    saved = next(p for p in dspass.explain(model).passes if p.name == "quantised_products" and p.stage == "joint")
    assert saved.summary.endswith("written out: 2")


@without_inductor
def _adapters(ranks: int) -> tuple[list[float], list[str]]:
    rank = dist.get_rank()
    model = dspass.quantise(adapted())
    options = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    return adapter_losses(model, compiled(model, options), rank, ranks), sorted(model.state_dict())


def test_adapters_are_sharded_and_stored_weights_are_not() -> None:
    results = workers.run(2, _adapters, 2)
    eager = dspass.quantise(adapted())
    wanted = adapter_losses(eager, eager)
    means = [sum(losses) / 2 for losses in zip(*(losses for losses, _ in results), strict=True)]
    torch.testing.assert_close(means, wanted, rtol=1e-4, atol=1e-5)
    assert "0.base.weight_codes" in results[0][1]


@operators()
def test_a_prediction_stores_weights_first() -> None:
    config = {**layers(format="int8"), "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    report = dspass.explain(adapted(), torch.randn(8, 32), config=config, world_size=2)
    assert {t.kind for t in report.quantised} == {"weight"}
    summaries = {p.summary for p in report.passes if p.name == "quantised_products" and p.stage == "joint"}
    assert any(summary.endswith("written out: 2") for summary in summaries)
    assert report.memory.peak_bytes > 0


def test_linear_layers_that_are_tied_are_stored_once() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight = model[0].weight
    with torch.inference_mode():
        dspass.quantise(model)
    assert model[0].weight_codes is model[1].weight_codes
    assert not model[0].weight_codes.is_inference()


@torch.no_grad()
def test_hugging_face_s_models_are_stored() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    gpt = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64, n_positions=16)).eval()
    llama = LlamaForCausalLM(
        LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    ).eval()
    ids = torch.randint(64, (1, 5))
    for model in (gpt, llama):
        whole = copy.deepcopy(model)
        run = compiled(dspass.quantise(model), {})
        assert off(run(ids).logits, whole(ids).logits) < 0.03
    assert stored_of(gpt)["transformer.h.0.attn.c_attn"].transposed
    assert "lm_head" in stored_of(gpt)
