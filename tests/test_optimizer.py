"""``dspass.AdamW``: torch's numbers, states of 8 bits that leave it in fp32, random bits that do not depend on who draws."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import DTensor

import dspass
from dspass.runtime.host_states import HostStates, local_of
from tests.emulated import same
from tests.ranks import run
from tests.test_ecosystem import Pair, batches, difference

SHAPES = [(37, 10), (), (300,), (70, 256), (0, 4)]


def parameters(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=draw).to(dtype)) for shape in SHAPES]


def give_gradients(params: list[nn.Parameter], seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=draw).to(param.dtype)


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        give_gradients(params, 100 + step)
        optimizer.step()


def near(mine: list[nn.Parameter], others: list[nn.Parameter], tolerance: float = 1e-5) -> bool:
    return all(torch.allclose(a, b, rtol=tolerance, atol=tolerance) for a, b in zip(mine, others, strict=True))


# -- torch's numbers -----------------------------------------------------------------------------------------------------


def test_groups_closures_and_parameters_without_a_gradient() -> None:
    ours, theirs = parameters(), parameters()

    def trained(kind: Any, params: list[nn.Parameter]) -> tuple[list[nn.Parameter], float]:
        groups = [{"params": params[:2], "lr": 0.1, "betas": (0.8, 0.9)}, {"params": params[2:], "weight_decay": 0.5}]
        optimizer = kind(groups, lr=torch.tensor(1e-2))
        answer = 0.0
        for step in range(5):
            give_gradients(params, step)
            if step < 2:
                params[1].grad = params[3].grad = None  # so they are two steps behind the others
            answer = optimizer.step(lambda: 7.0)
        return params, answer

    (mine, said), (others, _) = trained(dspass.AdamW, ours), trained(torch.optim.AdamW, theirs)
    assert near(mine, others)
    assert not near(mine, parameters())
    assert said == 7.0


def test_memory_in_another_order() -> None:
    ours, theirs = (nn.Parameter(torch.randn(8, 4, 5, 6).to(memory_format=torch.channels_last)) for _ in range(2))
    with torch.no_grad():
        theirs.copy_(ours)
    train(dspass.AdamW([ours], lr=0.1), [ours], range(3))
    train(torch.optim.AdamW([theirs], lr=0.1), [theirs], range(3))
    assert near([ours], [theirs])
    assert ours.is_contiguous(memory_format=torch.channels_last)


def test_schedules_and_scalers_know_it() -> None:
    params = parameters()
    optimizer = dspass.AdamW(params, lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = copy.deepcopy(params)
    give_gradients(params, 0)
    params[0].grad[0, 0] = torch.inf  # type: ignore[index]
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    scaler.update()
    assert all(same(a, b) for a, b in zip(params, before, strict=True))
    give_gradients(params, 0)
    scaler.step(optimizer)
    assert not near(params, before)
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.05


# -- states of 8 bits ----------------------------------------------------------------------------------------------------


def test_states_of_8_bits_are_a_quarter_and_train_as_well() -> None:
    """A regression whose loss falls by a factor of a thousand, with gradients over many orders of magnitude."""

    def loss_of(bits: int) -> tuple[float, int]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 8))
        x, w = torch.randn(512, 64), torch.randn(64, 8)
        optimizer = dspass.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0, state_bits=bits)
        for _ in range(300):
            loss = (model(x) - (x @ w).tanh()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        kept = sum(v.nbytes for s in optimizer.state.values() for v in s.values() if v.dim())
        assert kept == sum(map(optimizer.as_planned().state_bytes, model.parameters()))
        return loss.item(), kept

    (wanted, whole), (found, few) = loss_of(32), loss_of(8)
    first = 0.6  # about what a model of nothing has
    assert wanted < first / 50
    assert found < first / 50
    assert few == pytest.approx(whole * (1 + 4 / 256) / 4, rel=0.05)  # the last blocks of small parameters are not full


@given(
    shapes=st.lists(st.lists(st.integers(0, 40), max_size=3), min_size=1, max_size=4),
    seed=st.integers(0, 2**16),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
)
@settings(max_examples=30, deadline=None)
def test_codes_survive_a_state_dict(shapes: list[list[int]], seed: int, dtype: torch.dtype, scale: float) -> None:
    draw = torch.Generator().manual_seed(seed)

    def some() -> list[nn.Parameter]:
        return [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]

    params, others = some(), some()
    optimizer, other = (dspass.AdamW(p, state_bits=8) for p in (params, others))
    for param in params:
        param.grad = (torch.randn(param.shape, generator=draw) * scale).to(dtype)
    optimizer.step()
    saved = optimizer.state_dict()
    assert all(
        saved["state"][i][key].dtype is torch.float32 for i in range(len(params)) for key in ("exp_avg", "exp_avg_sq")
    )
    assert all(saved["state"][i]["exp_avg"].shape == param.shape for i, param in enumerate(params))
    other.load_state_dict(saved)
    for param, group in ((p, other.param_groups[0]) for p in others):
        other._state_of(param, group)
    for param, another in zip(params, others, strict=True):
        for key, value in optimizer.state[param].items():
            found = other.state[another][key]
            assert torch.equal(found, value) if value.dtype is torch.uint8 else torch.allclose(found, value, rtol=3e-7)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "file"])
def test_training_goes_on_from_a_state(bits: int, how: str) -> None:
    """States of a bf16 parameter stay fp32, which torch's loading would not leave them."""
    params = parameters(torch.bfloat16)
    optimizer = dspass.AdamW(params, lr=0.01, state_bits=bits, stochastic_rounding=True, seed=-5)
    train(optimizer, params, range(3))
    if how == "deepcopy":
        params2, again = copy.deepcopy((params, optimizer))
    else:
        params2 = copy.deepcopy(params)
        again = dspass.AdamW(params2, lr=0.5, state_bits=bits)
        state = optimizer.state_dict()
        if how == "file":
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file)
        again.load_state_dict(copy.deepcopy(state))
    train(optimizer, params, range(3, 5))
    train(again, params2, range(3, 5))
    # Scales that come back to their last two bits move hardly any parameter across a rounding to bf16.
    off = [(a != b).double().mean().item() for a, b in zip(params, params2, strict=True) if a.numel()]
    assert max(off) == 0 if bits == 32 or how == "deepcopy" else sum(off) / len(off) < 1e-2


@pytest.mark.parametrize("bits", [32, 8])
def test_states_go_to_torch_s_own_and_come_back(bits: int) -> None:
    ours, theirs = parameters(), parameters()
    mine = dspass.AdamW(ours, lr=0.01, state_bits=bits)
    train(mine, ours, range(2))
    other = torch.optim.AdamW(theirs, lr=0.01)
    other.load_state_dict(copy.deepcopy(mine.state_dict()))
    with torch.no_grad():
        for a, b in zip(theirs, ours, strict=True):
            a.copy_(b)
    train(mine, ours, range(2, 4))
    train(other, theirs, range(2, 4))
    assert near(ours, theirs, 1e-5 if bits == 32 else 4e-3)  # lr times the error of a step in 8 bits
    mine.load_state_dict(copy.deepcopy(other.state_dict()))
    assert mine.param_groups[0]["state_bits"] == bits
    train(mine, ours, range(4, 5))
    train(other, theirs, range(4, 5))
    assert near(ours, theirs, 1e-5 if bits == 32 else 8e-3)


def test_bits_are_those_of_who_loads_and_may_change() -> None:
    params = parameters()
    wide, narrow = dspass.AdamW(params, lr=0.5), dspass.AdamW(params, state_bits=8)
    train(wide, params, range(2))
    narrow.load_state_dict(copy.deepcopy(wide.state_dict()))
    assert narrow.param_groups[0]["lr"] == 0.5
    train(narrow, params, range(2, 3))
    assert "exp_avg_codes" in narrow.state[params[0]]
    narrow.param_groups[0]["state_bits"] = 32
    train(narrow, params, range(3, 4))
    assert set(narrow.state[params[0]]) == {"step", "exp_avg", "exp_avg_sq"}


# -- random bits ---------------------------------------------------------------------------------------------------------


def test_stochastic_rounding_moves_what_the_nearest_leaves() -> None:
    """Ten steps of 2e-4 from 1 down, where the next value of bf16 is 2**-8 below."""

    def stepped(**more: Any) -> torch.Tensor:
        param = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        optimizer = dspass.AdamW([param], lr=2e-4, weight_decay=0.0, **more)
        for _ in range(10):
            param.grad = torch.ones_like(param)
            optimizer.step()
        return param.detach().double()

    assert (stepped() == 1).all()
    found = stepped(stochastic_rounding=True)
    assert abs(found.mean() - (1 - 10 * 2e-4)) < 5 * found.std() / 4096**0.5  # five standard deviations
    assert found.std() > 0


@pytest.mark.parametrize("bits", [32, 8])
def test_numbers_depend_neither_on_parts_nor_on_parameters_of_others(bits: int) -> None:
    def trained(run_step: Callable[[dspass.AdamW, list[nn.Parameter]], None], lacking: int | None = None) -> list[Any]:
        params = parameters(torch.bfloat16)
        optimizer = dspass.AdamW(params, lr=0.01, state_bits=bits, stochastic_rounding=True)
        for step in range(3):
            give_gradients(params, step)
            if lacking is not None:
                params[lacking].grad = None
            run_step(optimizer, params)
        return params

    away = HostStates(part_elements=400)

    def by_parts(optimizer: dspass.AdamW, params: list[nn.Parameter]) -> None:
        away.add(params[2:4])
        dspass.adamw._number(optimizer)  # as a hook of the whole step does, inside of which the runtime steps parts
        away.step(optimizer)
        away.end()

    wanted = trained(lambda optimizer, _: optimizer.step())
    assert all(same(a, b) for a, b in zip(wanted, trained(by_parts), strict=True))
    without = trained(lambda optimizer, _: optimizer.step(), lacking=0)
    assert all(same(a, b) for a, b in zip(wanted[1:], without[1:], strict=True))
    assert not same(wanted[0], without[0])


# -- on ranks ------------------------------------------------------------------------------------------------------------


def _on_ranks(stage: int, bits: int, folder: str) -> dict[str, Any]:
    """Trained beside the whole model on each rank, saved, and loaded again into fresh optimisers."""
    pair = Pair(stage)
    pair.shard()
    ours = dspass.AdamW(pair.compiled.parameters(), lr=0.01, state_bits=bits)
    theirs = dspass.AdamW(pair.reference.parameters(), lr=0.01, state_bits=32)
    losses = []

    def step(batch: Any, optimizer: torch.optim.Optimizer) -> None:
        losses.append(difference(pair.backward(batch), pair.expected(batch)))
        for one in (optimizer, theirs):
            one.step()
            one.zero_grad()

    for batch in batches(3, pair.ranks):
        step(batch, ours)
    state = get_optimizer_state_dict(pair.model, ours)
    placed = all(
        isinstance(state["state"][name][key], DTensor) and state["state"][name][key].placements == param.placements
        for name, param in pair.model.named_parameters()
        for key in ("exp_avg", "exp_avg_sq")
        if isinstance(param, DTensor)
    )
    dcp.save({"optimizer": state}, checkpoint_id=folder)
    again = dspass.AdamW(pair.compiled.parameters(), lr=0.01, state_bits=bits)
    read = {"optimizer": get_optimizer_state_dict(pair.model, again)}
    dcp.load(read, checkpoint_id=folder)
    set_optimizer_state_dict(pair.model, again, read["optimizer"])
    for param, group in ((p, g) for g in again.param_groups for p in g["params"]):
        again._state_of(param, group)
    equal = all(
        torch.allclose(local_of(again.state[p][key]).double(), local_of(value).double(), rtol=3e-7, atol=0)
        for p, values in ours.state.items()
        for key, value in values.items()
    )
    for batch in batches(2, pair.ranks, seed=7):
        step(batch, again)
    return {"losses": losses, "placed": placed, "equal": equal}


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("stage", [1, 3])
def test_shards_train_as_the_whole_model_and_are_saved_in_fp32(stage: int, bits: int, tmp_path: Path) -> None:
    for found in run(2, _on_ranks, stage, bits, str(tmp_path)):
        assert max(found["losses"]) <= (1e-5 if bits == 32 else 5e-2)
        assert found["placed"]
        assert found["equal"]


def _loaded(stage: int, folder: str, bits: int) -> float:
    """A checkpoint of other ranks: the largest difference of a state in 8 bits to what was saved, by its block's largest."""
    pair = Pair(stage)
    pair.shard()
    optimizer = dspass.AdamW(pair.compiled.parameters(), lr=0.01, state_bits=bits)
    read = {"optimizer": get_optimizer_state_dict(pair.model, optimizer)}
    dcp.load(read, checkpoint_id=folder)
    set_optimizer_state_dict(pair.model, optimizer, read["optimizer"])
    saved = read["optimizer"]["state"]
    for param, group in ((p, g) for g in optimizer.param_groups for p in g["params"]):
        optimizer._state_of(param, group)
    found = get_optimizer_state_dict(pair.model, optimizer)["state"]
    worst = 0.0
    for name in saved:
        for key in ("exp_avg", "exp_avg_sq"):
            wanted, mine = local_of(saved[name][key]), local_of(found[name][key])
            if wanted.numel():
                worst = max(worst, ((mine - wanted).abs().max() / wanted.abs().max()).item())
    return worst


def test_a_checkpoint_goes_to_another_number_of_ranks(tmp_path: Path) -> None:
    """Other shards have other blocks: codes of fp8_e4m3 are off by up to a sixteenth of a value."""
    run(2, _on_ranks, 3, 8, str(tmp_path))
    assert 0 < run(1, _loaded, 0, str(tmp_path), 8)[0] <= 1 / 16
    assert run(1, _loaded, 0, str(tmp_path), 32)[0] == 0


# -- what cannot be ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"state_bits": 4}, "state_bits=4 cannot be: take 32 or 8"),
        ({"lr": -1.0}, r"lr=-1\.0 cannot be"),
        ({"betas": (0.9, 1.0)}, "betas=.* cannot be: take two"),
        ({"eps": float("nan")}, "eps=nan cannot be"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        dspass.AdamW(parameters(), **settings)


def test_tensors_that_cannot_be() -> None:
    half = nn.Parameter(torch.ones(3, dtype=torch.float16))
    half.grad = torch.ones_like(half)
    sound = nn.Parameter(torch.ones(3))
    sound.grad = torch.ones_like(sound)
    optimizer = dspass.AdamW([sound, half])
    with pytest.raises(ValueError, match=r"shape \[3\] is float16: dspass\.AdamW steps float32 and bfloat16"):
        optimizer.step()
    assert same(sound, torch.ones(3))
    assert not optimizer.state
    table = nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"gradient in layout torch\.sparse_coo: take torch\.optim\.SparseAdam"):
        dspass.AdamW(table.parameters()).step()
    params = parameters()
    other = torch.optim.AdamW(params, amsgrad=True)
    with pytest.raises(ValueError, match="amsgrad=True is not known"):
        dspass.AdamW(params).load_state_dict(other.state_dict())
