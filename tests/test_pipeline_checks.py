"""What a pipeline refuses since it would compute something else than the model alone, and what it must not refuse."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import dspass
from dspass.pipeline_checks import digest
from dspass.pipeline_outputs import NotComputed, PipelineUseError
from tests.ranks import run
from tests.test_pipeline_edges import Net, Pair, near, pipeline, tokens
from tests.training import without_inductor, zero


class Layer(nn.Module):
    """A linear layer, and ``of`` what it answers: the call's further arguments are its own."""

    def __init__(self, of: Callable[..., Any]) -> None:
        super().__init__()
        self.layer, self.of = nn.Linear(8, 8), of
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("means", torch.zeros(8))
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: torch.Tensor, *more: torch.Tensor) -> Any:
        return self.of(self, self.layer(x), *more)


def _drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@without_inductor
def _loss(of: Callable[..., Any], *batch: torch.Tensor, gradients: bool = True) -> None:
    """Train a step in micro-batches beside one of the whole batch."""
    pair = Pair(lambda: Layer(of), pipeline(1))
    with torch.set_grad_enabled(gradients):
        answers = pair.compiled(*batch)
        near(answers, pair.reference(*batch))
        if gradients:
            answers.backward()
            pair.reference.zero_grad()
            pair.reference(*batch).backward()
            pair.gradients()


@without_inductor
def _refused(of: Callable[..., Any], batch: tuple[torch.Tensor, ...], gradients: bool = True) -> str:
    pair = Pair(lambda: Layer(of), pipeline(1))
    before = {name: value.clone() for name, value in pair.model.named_buffers()}
    with pytest.raises(PipelineUseError) as caught, torch.set_grad_enabled(gradients):
        pair.compiled(*batch)
    for name, value in pair.model.named_buffers():
        assert torch.equal(value, before[name]), name
    return str(caught.value)


def assert_says(message: str, pattern: str) -> None:
    assert re.search(pattern, message, re.DOTALL), message


# -- rows that meet other rows ---------------------------------------------------------------------------------------


def _attends_to_keys(_: Layer, h: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return (torch.softmax(h @ keys.mT, -1) @ keys).square().mean()


def _contrasts(_: Layer, h: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(torch.einsum("bd,cd->bc", h, h), torch.arange(len(h)))


def _is_apart(_: Layer, h: torch.Tensor) -> torch.Tensor:
    return (h[:, None] - h[None]).abs().mean()


def _looks_up(_: Layer, h: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return (h + F.embedding((h > 0).long().sum(-1) % 2, table)).square().mean()


def _attends_in_time(_: Layer, h: torch.Tensor) -> torch.Tensor:
    heads = h.transpose(0, 1).unflatten(-1, (2, 4)).transpose(1, 2)  # of [time, batch, width]
    return F.scaled_dot_product_attention(heads, heads, heads).square().mean()


class Encoder(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=batch_first)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.layer(states).pow(3).mean()


@pytest.mark.parametrize(
    ("of", "more", "says"),
    [
        (_attends_to_keys, (8, 8), r"x \[2, 8\], more\[0\] \[2, 8\].*dimension of 1 in front"),
        (_contrasts, None, "pipeline.micro_batches to 1"),
        (_is_apart, None, "pairs of rows"),
        (_looks_up, (8, 8), r"more\[0\] \[2, 8\]"),
    ],
)
def test_rows_that_meet_others_are_refused(of: Callable[..., Any], more: tuple[int, ...] | None, says: str) -> None:
    batch = (_drawn(8, 8), *([_drawn(*more)] if more is not None else ()))
    (message,) = run(1, _refused, of, batch)
    assert_says(message, says)


def test_time_in_front_is_no_batch() -> None:
    (message,) = run(1, _refused, _attends_in_time, (_drawn(8, 4, 8),))
    assert_says(message, "Where another dimension is the batch's, put that one first")


@without_inductor
def _encodes(batch_first: bool) -> str:
    pair = Pair(lambda: Encoder(batch_first), pipeline(1))
    try:
        near(pair.compiled(_drawn(8, 4, 8)), pair.reference(_drawn(8, 4, 8)))
    except PipelineUseError as error:
        return str(error)
    return ""


def test_an_encoder_of_torch_takes_its_batch_first() -> None:
    assert run(1, _encodes, True) == [""]
    assert_says(run(1, _encodes, False)[0], r"multi_head_attention_forward.*states \[2, 4, 8\]")


def _of_one_table(_: Layer, h: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return (h @ table[0].mT).softmax(-1).square().mean()


def _by_torch_s_own_operator(m: Layer, h: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return (h * torch.embedding(m.means.view(4, 2), ids).sum(-1)).square().mean() + h.square().mean()


def test_a_table_that_comes_first_is_no_batch() -> None:
    run(1, _loss, _by_torch_s_own_operator, _drawn(8, 8), torch.arange(64).view(8, 8) % 4)


def test_a_table_with_a_dimension_in_front_stays_whole() -> None:
    run(1, _loss, _of_one_table, _drawn(8, 8), _drawn(1, 8, 8))


def _with_capacity(_: Layer, h: torch.Tensor) -> torch.Tensor:
    """Places of rows at two experts, one-hot, in as many as half of the rows: as mixtures with a capacity do."""
    chosen = F.one_hot((h.sum(-1) > 0).long(), 2)
    places = ((chosen.cumsum(0) - 1) * chosen).sum(-1).clamp(max=len(h) // 2 - 1)
    sent = torch.einsum("se,sc->sec", chosen.to(h.dtype), F.one_hot(places, len(h) // 2).to(h.dtype))
    return (torch.einsum("sec,sm->ecm", sent, h).sum(1) * 1e-9).sum() + h.square().mean()


@without_inductor
def _takes(of: Callable[..., Any], *batch: torch.Tensor) -> None:
    pair = Pair(lambda: Layer(of), pipeline(1, loss_reduction="mean"))
    pair.compiled(*batch).backward()


def test_places_in_a_capacity_are_no_pairs_of_rows() -> None:
    run(1, _takes, _with_capacity, _drawn(8, 8))


# -- buffers ---------------------------------------------------------------------------------------------------------


def _adds(m: Layer, h: torch.Tensor) -> torch.Tensor:
    m.count += 1
    return h.square().mean()


def _assigns(m: Layer, h: torch.Tensor) -> torch.Tensor:
    m.count = 0.9 * m.count + 0.1 * h.detach().mean()
    return h.square().mean()


def _writes_a_view(m: Layer, h: torch.Tensor) -> torch.Tensor:
    m.means.view(2, 4).add_(1)
    return h.square().mean()


def _copies(m: Layer, h: torch.Tensor) -> torch.Tensor:
    m.means.data.copy_(h.detach().mean(0))
    return h.square().mean()


def _sets_an_item(m: Layer, h: torch.Tensor) -> torch.Tensor:
    m.means[0] = 1
    return h.square().mean()


def _normalises(m: Layer, h: torch.Tensor) -> torch.Tensor:
    return torch.batch_norm(h, None, None, None, None, True, 0.1, 1e-5, False).abs().mean()


def _normalises_by_module(m: Layer, h: torch.Tensor) -> torch.Tensor:
    return m.norm(h).abs().mean()


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize(
    ("of", "says"),
    [
        (_adds, "count.*each micro-batch would do again"),
        (_assigns, "assigns count.*outside of the forward"),
        (_writes_a_view, "writes into .*means"),
        (_copies, "writes into .*means"),
        (_sets_an_item, "writes into .*means"),
        (_normalises, "normalises over a batch"),
        (_normalises_by_module, "normalises over a batch"),
    ],
)
def test_what_micro_batches_would_change_is_refused(of: Callable[..., Any], says: str, gradients: bool) -> None:
    (message,) = run(1, _refused, of, (_drawn(8, 8),), gradients)
    assert_says(message, says)


def _normalises_in_evaluation(m: Layer, h: torch.Tensor) -> torch.Tensor:
    m.norm.eval()
    return m.norm(h).square().mean()


def test_a_batch_norm_in_evaluation_is_none() -> None:
    run(1, _loss, _normalises_in_evaluation, _drawn(8, 8))


def _writes_its_rows(_: Layer, h: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
    cache.add_(h)
    return cache.square().mean()


@without_inductor
def _caches() -> None:
    pair = Pair(lambda: Layer(_writes_its_rows), pipeline(1))
    ours, theirs = torch.zeros(8, 8), torch.zeros(8, 8)
    with torch.no_grad():
        near(pair.compiled(_drawn(8, 8), ours), pair.reference(_drawn(8, 8), theirs))
    near(ours, theirs)


def test_rows_of_an_argument_may_be_written_without_gradients() -> None:
    run(1, _caches)


# -- outputs beside the loss -----------------------------------------------------------------------------------------


def _in_parts(_: Layer, h: torch.Tensor) -> dict[str, Any]:
    fit, size = h.square().mean(), h.abs().mean()
    return {
        "loss": fit + size,
        "fit": fit,
        "positive": (h > 0).sum(),
        "log": fit.detach().log(),
        "h": h,
        "turned": h.t(),
        "mean": h.mean(0),
        "depth": 3,
        "nothing": None,
    }


@without_inductor
def _answers() -> None:
    pair = Pair(lambda: Layer(_in_parts), pipeline(1))
    batch = _drawn(8, 8)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            ours, theirs = (model(batch) for model in pair.both)
        for name in ("loss", "fit", "positive") if gradients else ("loss", "fit", "positive", "h", "turned"):
            near(ours[name], theirs[name])
            assert ours[name].dtype == theirs[name].dtype
            assert ours[name].requires_grad == (gradients and name == "loss")
        assert ours["depth"] == 3
        assert ours["nothing"] is None
        dropped = {"log": "answers the loss", "h": "answers the loss", "mean": "answers the loss"}
        for name, why in (dropped if gradients else {"log": "does not add up", "mean": "does not add up"}).items():
            assert isinstance(ours[name], NotComputed)
            assert ours[name].shape == theirs[name].shape
            with pytest.raises(PipelineUseError, match=why):
                ours["loss"] + ours[name]
    pair.backward(lambda model: model(batch)["loss"])


def test_scalars_beside_the_loss_add_up_or_raise() -> None:
    run(1, _answers)


def _looked_at(_: Layer, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return h.square().mean(), (h > 0).float().mean()


def _two(_: Layer, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return h.square().mean(), h.abs().mean()


@without_inductor
def _with_a_metric() -> None:
    pair = Pair(lambda: Layer(_looked_at), pipeline(1))
    near(pair.compiled(_drawn(8, 8))[1], pair.reference(_drawn(8, 8))[1])
    pair.backward(lambda model: model(_drawn(8, 8))[0])


def test_the_loss_is_the_scalar_that_has_a_gradient() -> None:
    run(1, _with_a_metric)
    assert_says(run(1, _refused, _two, (_drawn(8, 8),))[0], r"this one has 2.*detach\(\)")


# -- ranks and batches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool, torch.complex64]
)
def test_values_of_any_type_are_told_apart(dtype: torch.dtype) -> None:
    first, second = (torch.tensor([[0.0, 1.0], [1.0, last]]).to(dtype) for last in (0.0, 1.0))
    assert digest(first) == digest(first.clone())
    assert digest(first) != digest(second)
    assert digest(first[0]) != digest(first[:1])
    assert digest(first[0, 1]) != digest(first[0, 0])


def test_what_is_no_tensor_is_told_apart() -> None:
    assert digest(True) != digest(1)
    assert digest("a") != digest("b")
    assert digest(torch.empty(2, device="meta")) == digest(torch.empty(2, device="meta"))


@without_inductor
def _batches_apart() -> str:
    pair = Pair(Net, pipeline())
    with pytest.raises(PipelineUseError) as caught:
        pair.compiled(*tokens(dist.get_rank()))
    return str(caught.value)


def test_ranks_of_one_pipeline_are_called_with_the_same_batch() -> None:
    for message in run(2, _batches_apart):
        assert_says(message, r"ranks 0 and 1 .*different batches.*DistributedSampler.*num_replicas")


@without_inductor
def _a_last_batch() -> str:
    model = Net(depth=6)
    config = zero(0, pipeline={"stages": 2, "schedule": "1f1b"})
    dspass.shard(model, config)
    compiled: Any = torch.compile(model, backend="deepspeed", options=config)
    compiled(*tokens(0, rows=16))[0].backward()
    with pytest.raises(PipelineUseError) as caught:
        compiled(*tokens(0, rows=1))
    return str(caught.value)


def test_a_last_batch_that_is_too_small_is_refused_with_a_way_out() -> None:
    for message in run(2, _a_last_batch):
        assert_says(message, r"batch of 1 is split into 1 micro-batches.*drop_last=True")


class Looks(Net):
    """Computes otherwise on another rank."""

    def before(self, i: int, x: torch.Tensor) -> torch.Tensor:
        return x * 1.0 if i == 2 and dist.get_rank() else x


@without_inductor
def _captures_apart() -> str:
    pair = Pair(Looks, pipeline(boundaries=["layers.2"]))
    with pytest.raises(PipelineUseError) as caught:
        pair.compiled(*tokens(0))
    return str(caught.value)


def test_ranks_that_capture_other_graphs_are_told_so() -> None:
    for message in run(2, _captures_apart):
        assert_says(message, "ranks 0 and 1 captured different graphs: behind stage 0 .*same on all ranks")


class Drops(nn.Module):
    """Two dropouts, of ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.ones(32)), nn.Parameter(torch.ones(32))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        first = F.dropout(torch.ones_like(x) * self.first, 0.5)
        h = dspass.stage_boundary(x * first)
        second = F.dropout(torch.ones_like(h) * self.second, 0.5)
        return (h * second).square().mean(), first, second


@without_inductor
def _masks(schedule: str) -> tuple[float, float, float]:
    """The share of entries of two stages' masks that are equal, a loss, and that of the same seed once more."""
    pair = Pair(Drops, pipeline(schedule=schedule))
    losses = []
    for _ in range(2):
        torch.manual_seed(7)
        losses.append(pair.compiled(torch.ones(8, 32))[0].item())
    torch.manual_seed(7)
    with torch.no_grad():
        _, first, second = pair.compiled(torch.ones(8, 32))
    return ((first == 0) == (second == 0)).float().mean().item(), losses[0], losses[1]


@pytest.mark.parametrize("schedule", ["1f1b", "zbh1"])
def test_stages_drop_other_units_though_ranks_have_one_seed(schedule: str) -> None:
    for alike, first, again in run(2, _masks, schedule):
        assert 0.3 < alike < 0.7
        assert first == again
