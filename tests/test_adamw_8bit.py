"""AdamW with states of 8 bits: beside the step with states of fp32, what rounding may and may not do to either state, training,
values that are not finite, refusals, and what torch has to know of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from dspass.runtime import adamw as reference
from dspass.runtime.adamw import BLOCK, FIRST, SECOND, states_of_8_bits
from dspass.runtime.operators import OPERATORS
from dspass.runtime.quantise import decode, encode
from tests.emulated import numbers, same

ops = torch.ops.dspass
op = ops.adamw_8bit_
LR = torch.tensor(1e-2, dtype=torch.float64)
REST = (0.9, 0.99, 1e-8, 0.1)
Lists = tuple[list[torch.Tensor], ...]


def with_states(params: list[torch.Tensor], grads: list[torch.Tensor]) -> Lists:
    return params, grads, *map(list, zip(*map(states_of_8_bits, params), strict=True))


def lists(dtype: torch.dtype = torch.float32) -> Lists:
    """Whole blocks, none, one value, more than some blocks."""
    shapes = [(3, 5), (0,), (), (70, 31), (2, 256)]
    params = [numbers(torch.Size(s).numel(), dtype, seed=1).view(s) for s in shapes]
    return with_states(params, [numbers(p.numel(), torch.float32, seed=2).view(p.shape) for p in params])


def stored(args: Lists) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Both states of each parameter in fp32."""
    params, _, *states = args
    first, second = (
        [
            (decode(c, format) * s[:, None]).view(-1)[: p.numel()].view(p.shape)
            for p, c, s in zip(params, codes, scales, strict=True)
        ]
        for codes, scales, format in ((*states[:2], FIRST), (*states[2:], SECOND))
    )
    return first, second


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_is_that_of_fp32_from_what_is_stored(dtype: torch.dtype) -> None:
    """Parameters to the last bit; a state that is stored is within a step of its format from what fp32 would keep."""
    ours = lists(dtype)
    for step in range(1, 4):
        wide = ([p.clone() for p in ours[0]], ours[1], *stored(ours))
        ops.adamw_(*wide, step, LR, *REST, seed=7)
        op(*ours, step, LR, *REST, seed=7)
        assert all(map(same, ours[0], wide[0]))
        for kept, exact, share in zip(stored(ours), wide[2:], (1 / 8, 1 / 16), strict=True):
            for one, other in zip(kept, exact, strict=True):
                smallest = other.abs().max() * 2.0**-17 if other.numel() else 0.0
                assert ((one - other).abs() <= other.abs() * share * 1.00001 + smallest).all()
                assert one.abs().sum() > 0 or not other.numel()
        assert all((one > 0).equal(other > 0) for one, other in zip(stored(ours)[1], wide[3], strict=True))
        ours[1][:] = [g.flip(0) if g.dim() else -g for g in ours[1]]


def test_states_take_a_quarter_of_those_in_fp32() -> None:
    states = states_of_8_bits(torch.empty(100, 256))
    assert sum(t.nbytes for t in states) == 2 * 25600 * (1 + 4 / 256)
    assert [tuple(t.shape) for t in states_of_8_bits(torch.empty(257))] == [(2, 256), (2,)] * 2


# -- what rounding does --------------------------------------------------------------------------------------------------


def one_block_and_a_leader(others: float, blocks: int = 16) -> tuple[Lists, torch.Tensor]:
    """First moments of ``others`` beside one of 448 in each block, whose gradient keeps it there; and where they are."""
    values = torch.full((blocks, BLOCK), others)
    values[:, 0] = 448.0
    args = with_states([torch.zeros(blocks * BLOCK)], [torch.zeros(blocks * BLOCK)])
    for state, made in zip(args[2:4], encode(values, FIRST), strict=True):
        state[0].copy_(made)
    args[1][0][::BLOCK] = 448.0
    return args, torch.arange(blocks * BLOCK) % BLOCK != 0


def test_a_first_moment_is_rounded_without_a_bias_and_ends_with_its_gradients() -> None:
    """1.125, times 0.95, is nearer to itself than to the value below."""
    args, others = one_block_and_a_leader(1.125)
    op(*args, 1, LR, 0.95, 0.99, 1e-8, 0.0)
    found = stored(args)[0][0][others]
    assert set(found.tolist()) == {1.0, 1.125}
    share, wanted = (found > 1).double().mean().item(), (1.125 * 0.95 - 1) / 0.125
    assert abs(share - wanted) < 5 * (wanted * (1 - wanted) / found.numel()) ** 0.5  # five standard deviations
    for step in range(2, 500):
        op(*args, step, LR, 0.95, 0.99, 1e-8, 0.0)
    assert not stored(args)[0][0][others].any()


def test_bits_of_states_follow_from_seed_step_and_place() -> None:
    def found(seed: int | None, step: int = 1) -> torch.Tensor:
        args, others = one_block_and_a_leader(1.125)
        op(*args, step, LR, 0.95, 0.99, 1e-8, 0.0, seed)
        return stored(args)[0][0][others]

    assert same(found(None), found(0))
    assert same(found(5), found(5))
    assert not any(same(found(0), other) for other in (found(5), found(-5), found(0, 2)))


def test_a_small_second_moment_beside_a_large_one_does_not_blow_up() -> None:
    """Gradients over nine powers of ten, squares over eighteen, and then none."""
    grad = 10 ** -torch.linspace(0, 9, BLOCK)
    args = with_states([torch.zeros(BLOCK)], [grad])
    for step in range(1, 30):
        before = args[0][0].clone()
        op(*args, step, LR, 0.9, 0.999, 0.0, 0.0)
        assert ((args[0][0] - before).abs() <= 2 * LR).all()
        assert (stored(args)[1][0] > 0).all()
        if step == 10:
            args[1][0].zero_()


def test_a_step_is_a_tenth_off_whatever_the_range_of_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    for powers in (0, 1, 3):
        scale = 10 ** (torch.rand((4096,), generator=generator) * powers)
        ours = with_states([torch.zeros(4096)], [torch.zeros(4096)])
        wide: Lists = ([torch.zeros(4096)], ours[1], [torch.zeros(4096)], [torch.zeros(4096)])
        off, size = 0.0, 0.0
        for step in range(1, 200):
            ours[1][0].copy_(torch.randn((4096,), generator=generator) * scale)
            for args, by in ((ours, op), (wide, ops.adamw_)):
                args[0][0].zero_()
                by(*args, step, LR, 0.9, 0.999, 1e-8, 0.0)
            off += (ours[0][0] - wide[0][0]).square().sum().item()
            size += wide[0][0].square().sum().item()
        assert (off / size) ** 0.5 < 0.12, powers


def test_a_small_model_trains_as_with_states_of_fp32() -> None:
    """Three hundred steps: the loss at their end within 2 %, parameters where they would be within an eighth of their way."""

    def trained(step_by: Any, states_of: Callable[[list[torch.Tensor]], Lists]) -> tuple[float, torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64))
        params, follows = list(model.parameters()), torch.randint(64, (64,))
        begin = nn.utils.parameters_to_vector(params).detach()
        states, losses = states_of(params), []
        for step in range(1, 301):
            x = torch.randint(64, (128,))
            y = torch.where(torch.rand(128) < 0.8, follows[x], x)
            loss = nn.functional.cross_entropy(model(x), y)
            grads = torch.autograd.grad(loss, params)
            with torch.no_grad():
                step_by(params, grads, *states, step, LR, 0.9, 0.999, 1e-8, 0.01)
            losses.append(loss.item())
        return sum(losses[-50:]) / 50, nn.utils.parameters_to_vector(params).detach() - begin

    wanted, way = trained(ops.adamw_, lambda params: tuple([torch.zeros_like(p) for p in params] for _ in range(2)))
    found, other = trained(op, lambda params: with_states(params, [])[2:])
    assert wanted < 0.7  # from 4.2; 0.5 is the entropy of the task
    assert abs(found / wanted - 1) < 0.02
    assert (other - way).norm() < way.norm() / 8


# -- what is not finite, and what cannot be ------------------------------------------------------------------------------


def test_what_is_not_finite_is_seen_in_its_block_and_in_no_other() -> None:
    for odd in (float("nan"), float("inf")):
        args = with_states([torch.ones(3 * BLOCK)], [torch.ones(3 * BLOCK)])
        args[1][0][BLOCK + 3] = odd
        op(*args, 1, LR, *REST)
        assert args[0][0].isfinite().sum() == 3 * BLOCK - 1  # a step from finite states: the value's own alone
        for state in stored(args):
            assert state[0].isnan().view(3, BLOCK).all(1).tolist() == [False, True, False]
            assert state[0].isnan().sum() == BLOCK
        args[1][0].fill_(1.0)
        op(*args, 2, LR, *REST)
        assert args[0][0].isnan().view(3, BLOCK).sum(1).tolist() == [0, BLOCK, 0]


def change(which: int, to: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Lists], None]:
    def changed(args: Lists) -> None:
        args[which][0] = to(args[which][0])

    return changed


REFUSALS: list[tuple[Callable[[Lists], Any], dict[str, Any], str]] = [
    (lambda a: a[3].pop(), {}, "lists of [5, 5, 5, 4, 5, 5] tensors do not go together: take a gradient and codes and"),
    (lambda a: None, {"step": 0}, "step 0 cannot be: the first one is 1"),
    (lambda a: None, {"beta1": -0.1}, "betas of -0.1 and 0.99 cannot be"),
    (lambda a: None, {"lr": LR.half()}, "lr of float16 and 0 dimensions on cpu cannot be: take one number"),
    (change(0, torch.Tensor.half), {}, "float16, float32 cannot be stepped: take fp32 or bf16, gradients too"),
    (change(1, torch.Tensor.t), {}, "shapes [3, 5], [5, 3] differ"),
    (change(2, lambda t: t[:, 1:]), {}, "states uint8[1, 255], float32[1], uint8[1, 256], float32[1] do not go with"),
    (
        change(5, torch.Tensor.double),
        {},
        "uint8[1, 256], float64[1] do not go with a parameter of 15 values: take those",
    ),
    (change(0, lambda t: t.t().contiguous().t()), {}, "of shape [3, 5], or a state of it, is not contiguous"),
]


@pytest.mark.parametrize(("changed", "numbers", "message"), REFUSALS, ids=[message[:20] for *_, message in REFUSALS])
def test_what_cannot_be_is_refused(changed: Callable[[Lists], Any], numbers: dict[str, Any], message: str) -> None:
    args = lists()
    changed(args)
    rest = {"step": 1, "lr": LR, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, **numbers}
    with pytest.raises(ValueError, match=re.escape(message)):
        op(*args, **rest)
    with FakeTensorMode() as mode, pytest.raises(ValueError, match=re.escape(message)):
        op(*([mode.from_tensor(t) for t in one] for one in args), **{**rest, "lr": mode.from_tensor(rest["lr"])})


# -- the operator --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [None, 5])
def test_opcheck(seed: int | None) -> None:
    torch.library.opcheck(op.default, (*lists(torch.bfloat16), 2, LR, *REST, seed))


def test_in_a_compiled_function_it_writes_what_it_writes_outside() -> None:
    def step_of(args: Lists, step: int, lr: torch.Tensor) -> list[torch.Tensor]:
        op(*args, step, lr, *REST, seed=1)
        return [p * 2 for p in args[0]]

    function = torch.compile(step_of, fullgraph=True, backend="aot_eager")
    ours, others = lists(torch.bfloat16), lists(torch.bfloat16)
    with torch.no_grad():
        for step in (3, 4):
            assert all(map(same, function(ours, step, LR), step_of(others, step, LR)))
    assert all(all(map(same, one, other)) for one, other in zip(ours, others, strict=True))


def test_every_operator_of_adamw_is_checked() -> None:
    mine = {o.name for o in OPERATORS.values() if o.reference.__module__ == reference.__name__}
    assert mine == {"adamw_", "adamw_8bit_"}
