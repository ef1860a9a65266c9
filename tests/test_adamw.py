"""AdamW over many tensors: beside torch's own, stochastic rounding, refusals, and what torch has to know of an operator that
writes to its arguments."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from dspass.runtime import adamw as reference
from dspass.runtime.adamw import key_of
from tests.emulated import same

op = torch.ops.dspass.adamw_
Lists = tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]
LR = torch.tensor(1e-2, dtype=torch.float64)
NUMBERS = {"lr": LR, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}


def lists(dtype: torch.dtype = torch.float32, grad_dtype: torch.dtype = torch.float32, *, seed: int = 0) -> Lists:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 5), (0,), (), (70, 31)]
    return (
        [torch.randn(shape, generator=generator).to(dtype) for shape in shapes],
        [torch.randn(shape, generator=generator).to(grad_dtype) for shape in shapes],
        [torch.zeros(shape) for shape in shapes],
        [torch.zeros(shape) for shape in shapes],
    )


def test_it_is_torch_s_within_rounding() -> None:
    """Ten steps of some ten operations, each rounded by 6e-8 at most: 1e-5 leaves what gradients of either sign cancel."""
    ours = lists()
    others = [torch.nn.Parameter(p.clone()) for p in ours[0]]
    optimizer = torch.optim.AdamW(others, lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, foreach=False)
    for step in range(1, 11):
        grads = lists(seed=step)[1]
        op(ours[0], grads, ours[2], ours[3], step, **NUMBERS)
        for param, grad in zip(others, grads, strict=True):
            param.grad = grad
        optimizer.step()
    for param, exp_avg, exp_avg_sq, other in zip(ours[0], ours[2], ours[3], others, strict=True):
        state = optimizer.state[other]
        assert torch.allclose(param, other, rtol=1e-5, atol=1e-6)
        assert torch.allclose(exp_avg, state["exp_avg"], rtol=1e-5, atol=1e-6)
        assert torch.allclose(exp_avg_sq, state["exp_avg_sq"], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(ours[0][0], lists()[0][0], atol=1e-2)


def test_a_parameter_in_bf16_is_that_in_fp32_rounded() -> None:
    ours, others = lists(torch.bfloat16, torch.bfloat16), lists(torch.bfloat16, torch.bfloat16)
    wide = ([p.float() for p in others[0]], *others[1:])
    op(*ours, 1, **NUMBERS)
    op(*wide, 1, **NUMBERS)
    for one, other in zip(ours[0], wide[0], strict=True):
        assert same(one, other.bfloat16())
    for one, other in zip(ours[2] + ours[3], wide[2] + wide[3], strict=True):
        assert same(one, other)


# -- stochastic rounding -------------------------------------------------------------------------------------------------


def stepped(seed: int | None, *, step: int = 1, count: int = 4096, number: int = 0) -> torch.Tensor:
    """Ones in bf16, from which an eighth of the distance to the next value below, 2**-8, is taken."""
    params = [torch.ones(count, dtype=torch.bfloat16) for _ in range(number + 1)]
    grads, exp_avgs, exp_avg_sqs = ([torch.full((count,), v) for _ in params] for v in (1.0, 1.0, 1.0))
    over = (1 - 0.9**step) / (1 - 0.99**step) ** 0.5  # what the bias corrections amount to
    lr = torch.tensor(2**-11 * over, dtype=torch.float64)
    op(params, grads, exp_avgs, exp_avg_sqs, step, lr, 0.9, 0.99, 0.0, 0.0, seed)
    return params[number]


def test_rounding_is_unbiased_where_the_nearest_loses_the_update() -> None:
    assert (stepped(None) == 1).all()
    found = stepped(0)
    assert set(found.tolist()) == {1.0, 1 - 2**-8}
    share = (found < 1).double().mean().item()
    assert abs(share - 1 / 8) < 5 * (1 / 8 * 7 / 8 / 4096) ** 0.5  # five standard deviations


def test_bits_follow_from_seed_step_and_place_alone() -> None:
    assert same(stepped(7), stepped(7))
    assert same(stepped(7), stepped(7, count=9000)[:4096])
    same_share = (7 / 8) ** 2 + (1 / 8) ** 2  # of two that know nothing of each other
    for other in (stepped(8), stepped(7 + (1 << 32)), stepped(-7), stepped(7, step=2), stepped(7, number=1)):
        assert (
            abs((stepped(7) == other).double().mean() - same_share) < 5 * (same_share * (1 - same_share) / 4096) ** 0.5
        )


def test_the_hash_tells_numbers_apart_and_changes_half_of_the_bits() -> None:
    assert key_of(0, 0, 0) == 0
    some = [reference._mix(i) for i in range(1 << 12)]
    assert len(set(some)) == len(some)
    flips = [bin(reference._mix(i) ^ reference._mix(i ^ 1 << bit)).count("1") for i in range(256) for bit in range(32)]
    assert 15.8 < sum(flips) / len(flips) < 16.2
    tensor = reference._mix(torch.arange(1 << 12))
    assert tensor.tolist() == some


def test_values_that_are_not_finite_stay_what_they_are() -> None:
    params = [torch.tensor([float("nan"), float("inf"), -float("inf"), 3.38e38], dtype=torch.bfloat16)]
    op(params, [torch.zeros(4)], [torch.zeros(4)], [torch.zeros(4)], 1, **NUMBERS, seed=3)
    assert params[0][0].isnan()
    assert params[0][1:3].tolist() == [float("inf"), -float("inf")]
    assert params[0][3].isfinite()


# -- what cannot be ------------------------------------------------------------------------------------------------------


def changed(change: Callable[[Lists], Any]) -> Lists:
    found = lists()
    change(found)
    return found


REFUSALS = [
    (lambda a: a[1].pop(), {}, "lists of [4, 3, 4, 4] tensors do not go together"),
    (lambda a: None, {"step": 0}, "step 0 cannot be: the first one is 1"),
    (lambda a: None, {"beta2": 1.0}, "betas of 0.9 and 1.0 cannot be"),
    (lambda a: None, {"lr": LR.half()}, "lr of float16 and 0 dimensions on cpu cannot be: take one number"),
    (lambda a: None, {"lr": LR[None]}, "lr of float64 and 1 dimensions on cpu cannot be: take one number"),
    (lambda a: a[0].__setitem__(0, a[0][0].half()), {}, "float16, float32, float32, float32 cannot be stepped"),
    (lambda a: a[2].__setitem__(0, a[2][0].bfloat16()), {}, "float32, float32, bfloat16, float32 cannot be stepped"),
    (lambda a: a[1].__setitem__(0, a[1][0].t()), {}, "shapes [3, 5], [5, 3], [3, 5], [3, 5] differ"),
    (lambda a: a[0].__setitem__(0, torch.ones(5, 3).t()), {}, "of shape [3, 5], or a state of it, is not contiguous"),
]


@pytest.mark.parametrize(("change", "numbers", "message"), REFUSALS, ids=[message[:20] for *_, message in REFUSALS])
def test_what_cannot_be_is_refused(change: Callable[[Lists], Any], numbers: dict[str, Any], message: str) -> None:
    args, rest = changed(change), {"step": 1, **NUMBERS, **numbers}
    before = [t.clone() for t in args[0]]
    with pytest.raises(ValueError, match=re.escape(message)):
        op(*args, **rest)
    assert all(same(one, other) for one, other in zip(args[0], before, strict=True))
    with FakeTensorMode() as mode, pytest.raises(ValueError, match=re.escape(message)):
        op(*([mode.from_tensor(t) for t in one] for one in args), **{**rest, "lr": mode.from_tensor(rest["lr"])})


# -- the operator --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [None, 5])
def test_opcheck(seed: int | None) -> None:
    torch.library.opcheck(op.default, (*lists(torch.bfloat16), 2, LR, 0.9, 0.99, 1e-8, 0.1, seed))


def test_in_a_compiled_function_it_writes_what_it_writes_outside() -> None:
    """Steps are a size to the compiler, and ``lr`` is a tensor: from the second number on it compiles no more."""
    compiled_for, behind_each = [], []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        compiled_for.append(inputs)
        return torch._dynamo.backends.debugging.aot_eager(gm, inputs)

    def step_of(args: Lists, step: int, lr: torch.Tensor) -> list[torch.Tensor]:
        op(*args, step, lr, 0.9, 0.99, 1e-8, 0.1, seed=1)
        return [p * 2 for p in args[0]]

    function = torch.compile(step_of, fullgraph=True, backend=backend)
    ours, others = lists(torch.bfloat16), lists(torch.bfloat16)
    with torch.no_grad():
        for step in range(3, 8):
            found, expected = function(ours, step, LR / step), step_of(others, step, LR / step)
            assert all(same(one, other) for one, other in zip(found, expected, strict=True))
            behind_each.append(len(compiled_for))
    for one, other in zip(ours, others, strict=True):
        assert all(same(a, b) for a, b in zip(one, other, strict=True))
    assert behind_each[1:] == behind_each[1:2] * 4


def test_a_gradient_that_needs_what_was_there_before_is_refused() -> None:
    """Also where a kernel writes, of which torch sees nothing: here one that writes nothing."""
    x = torch.ones(3, requires_grad=True)
    library = torch.library.Library("dspass", "IMPL")
    library.impl("adamw_", lambda *args, **kwargs: None, "CPU")
    try:
        for kept in range(4):
            args = [[torch.ones(3)] for _ in range(4)]
            out = (x * args[kept][0]).sum()
            op(*args, 1, **NUMBERS)
            if kept == 1:  # gradients are read
                out.backward()
                continue
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                out.backward()
    finally:
        library._destroy()


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_cpu_compiled_blocks_and_the_rest_are_the_reference_to_the_last_bit(
    dtype: torch.dtype, seed: int | None
) -> None:
    """Of any number of whole blocks, and with or without values behind them; nothing is compiled for another number."""
    compiled_for: list[int] = []
    for count in (2 * reference.BLOCK, 5 * reference.BLOCK + 7, 255, reference.BLOCK, 1, 0):
        param, grad = (torch.randn(count, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(2))
        ours, others = ([[t.clone()] for t in (param, grad, *[torch.zeros(count)] * 2)] for _ in range(2))
        for step in (1, 2):
            op(*ours, step, **NUMBERS, seed=seed)
            reference.adamw_(*others, step, **NUMBERS, seed=seed)
        assert all(same(one, other) for (one,), (other,) in zip(ours, others, strict=True))
        compiled_for.append(len(reference._compiled))
    assert len(set(compiled_for)) == 1
