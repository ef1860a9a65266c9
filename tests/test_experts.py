"""The operators around a mixture's grouped product: where rows go, what is dropped, gradients, and that what Inductor makes of
the reference is the reference, to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from dspass.runtime import experts as reference
from dspass.runtime.operators import OPERATORS
from tests.emulated import same
from tests.test_quantise import compiled

ops = torch.ops.dspass
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def routing(tokens: int, top_k: int, num_experts: int, *, seed: int = 0) -> torch.Tensor:
    """Experts of which some are none: -2, -1, and beyond the last."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, num_experts + 2, (tokens, top_k), generator=generator)


def is_kept(experts: torch.Tensor, num_experts: int) -> torch.Tensor:
    return (experts >= 0) & (experts < num_experts)


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(0, 40),
    top_k=st.integers(0, 4),
    num_experts=st.integers(1, 9),
    hidden=st.integers(0, 5),
    dtype=st.sampled_from(DTYPES),
    index=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(0, 2**16),
)
def test_rows_are_those_of_a_sorted_list(
    tokens: int, top_k: int, num_experts: int, hidden: int, dtype: torch.dtype, index: torch.dtype, seed: int
) -> None:
    experts = routing(tokens, top_k, num_experts, seed=seed)
    x = torch.randn(tokens, hidden).to(dtype)
    rows, positions, ends = ops.permute_experts(x, experts.to(index), num_experts)
    listed = [(e, t, k) for t, its in enumerate(experts.tolist()) for k, e in enumerate(its)]
    kept = sorted(entry for entry in listed if 0 <= entry[0] < num_experts)
    dropped = [entry for entry in listed if not 0 <= entry[0] < num_experts]
    assert rows.shape == (len(listed), hidden)
    assert rows.dtype is dtype
    for row, (_, t, k) in enumerate(kept):
        assert positions[t, k] == row
        assert torch.equal(rows[row], x[t])
    for row, (_, t, k) in enumerate(dropped, len(kept)):
        assert positions[t, k] == -1 - row
        assert not rows[row].any()
    assert ends.tolist() == [sum(e <= end for e, _, _ in kept) for end in range(num_experts)]
    assert positions.dtype is ends.dtype is torch.int32


def test_a_dropped_assignment_adds_nothing_whatever_its_row_holds() -> None:
    """A grouped product leaves rows beyond its last end as they were."""
    experts = torch.tensor([[0, -1], [7, 8], [1, 0]])
    rows, positions, _ = ops.permute_experts(torch.ones(3, 4), experts, 2)
    rows[3:] = float("nan")
    weights = torch.tensor([[0.5, float("nan")], [float("inf"), 1.0], [0.25, 2.0]])
    assert ops.unpermute_experts(rows, positions, weights)[:, 0].tolist() == [0.5, 0.0, 2.25]
    assert ops.unpermute_experts(rows, positions)[:, 0].tolist() == [1.0, 0.0, 2.0]
    assert ops.spread_experts(torch.ones(3, 4), positions, weights)[:, 0].tolist() == [0.5, 2.0, 0.25, 0.0, 0.0, 0.0]


def test_sums_are_in_fp32_and_in_the_order_of_a_token_s_experts() -> None:
    rows = torch.tensor([[256.0], [1.0], [1.0]]).bfloat16()
    positions = torch.tensor([[0, 1, 2]], dtype=torch.int32)
    assert ops.unpermute_experts(rows, positions).item() == 258  # in bf16 each 1 would be lost
    rows, positions = torch.tensor([[1.0], [2.0**24], [-(2.0**24)]]), positions
    assert ops.unpermute_experts(rows, positions).item() == 0
    assert ops.unpermute_experts(rows, positions.flip(1).contiguous()).item() == 1


def torch_s(rows: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return torch._grouped_mm(rows, matrices, offs=ends)


def written_out(rows: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """The grouped product where torch.compile refuses torch's own: in fp32."""
    expert = torch.searchsorted(ends, torch.arange(rows.shape[0]), right=True).clamp_max(matrices.shape[0] - 1)
    return (rows[:, None] @ matrices[expert])[:, 0]


def mixture(
    x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, matrices: torch.Tensor, product: Any
) -> torch.Tensor:
    rows, positions, ends = ops.permute_experts(x, experts, matrices.shape[0])
    return ops.unpermute_experts(product(rows, matrices, ends), positions, weights)


def plain_mixture(
    x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, matrices: torch.Tensor, product: Any
) -> torch.Tensor:
    """Every token by every expert, in the order of a token's experts."""
    every = torch.einsum("th,ehf->tef", x, matrices)
    kept = is_kept(experts, matrices.shape[0])
    chosen = every.gather(1, experts.where(kept, 0)[..., None].expand(-1, -1, every.shape[2]))
    return (chosen * (weights * kept)[..., None]).sum(1)


@pytest.mark.parametrize(("is_compiled", "product"), [(False, torch_s), (True, written_out)], ids=["eager", "compiled"])
def test_a_mixture_of_experts_and_its_gradients(is_compiled: bool, product: Any) -> None:
    """Beside one without a permutation. fp32 sums in another order: 1e-5 is some eighty of its steps."""
    torch.manual_seed(0)
    experts = routing(33, 3, 5)
    inputs = [torch.randn(33, 16), torch.rand(33, 3), torch.randn(5, 16, 8)]
    ours, others = ([t.clone().requires_grad_() for t in inputs] for _ in range(2))
    function = torch.compile(mixture, fullgraph=True, backend="aot_eager") if is_compiled else mixture
    for run, (x, weights, matrices) in ((function, ours), (plain_mixture, others)):
        run(x, experts, weights, matrices, product).square().mean().backward()
    for one, other in zip(ours, others, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.allclose(one.grad, other.grad, rtol=1e-5, atol=1e-5)
        assert one.grad.abs().sum() > 0


def test_gradients_of_what_is_spread_and_of_gradients() -> None:
    """Second order: the two operators are each other's adjoint."""
    torch.manual_seed(0)
    experts = routing(6, 2, 3)
    _, positions, _ = ops.permute_experts(torch.zeros(6, 1), experts, 3)
    kept = is_kept(experts, 3)[..., None]
    where = torch.where(positions < 0, -1 - positions, positions).long()
    x, weights = torch.randn(6, 4, requires_grad=True), torch.rand(6, 2, requires_grad=True)

    def plain(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return (x[:, None] * (weights[..., None] * kept)).flatten(0, 1)[torch.argsort(where.view(-1))]

    found = []
    for function in (lambda x, w: ops.spread_experts(x, positions, w), plain):
        first = torch.autograd.grad(function(x, weights).sin().sum(), (x, weights), create_graph=True)
        found.append([*first, *torch.autograd.grad(first[0].square().sum() + first[1].square().sum(), (x, weights))])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)


# -- what cannot be ------------------------------------------------------------------------------------------------------


def refusals() -> list[tuple[str, tuple[Any, ...], str]]:
    x, experts, positions = torch.ones(4, 8), torch.zeros(4, 2, dtype=torch.int64), torch.zeros(4, 2, dtype=torch.int32)
    return [
        ("permute_experts", (x.double(), experts, 2), "rows of float64 do not go to experts: fp32, fp16 and bf16 do"),
        ("permute_experts", (x[0], experts, 2), r"values of shape \[8\] are not rows: take \[rows, hidden\]"),
        ("permute_experts", (x, experts[1:], 2), r"tokens of shape \[4, 8\] have no routing of shape \[3, 2\]"),
        ("permute_experts", (x, experts.float(), 2), "experts of float32 cannot be: take .* int32 or int64"),
        ("permute_experts", (x, experts, 0), "0 experts cannot be: take 1 to 8192"),
        ("permute_experts", (x, experts, 8193), "8193 experts cannot be: take 1 to 8192"),
        ("spread_experts", (x, experts), "positions of int64 cannot be: take those of permute_experts, int32"),
        ("unpermute_experts", (x, positions), r"rows of shape \[4, 8\] .* positions of shape \[4, 2\]: take a row for"),
        ("spread_experts", (x, positions, torch.ones(4)), r"weights of float32 and shape \[4\] do not go with"),
        ("spread_experts", (x, positions, positions), "weights of int32 and shape .* in fp32, fp16 or bf16"),
    ]


@pytest.mark.parametrize(("name", "args", "message"), refusals())
def test_what_cannot_be_is_refused(name: str, args: tuple[Any, ...], message: str) -> None:
    op = getattr(ops, name)
    with pytest.raises(ValueError, match=message):
        op(*args)
    with FakeTensorMode() as mode, pytest.raises(ValueError, match=message):
        op(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args))


def test_more_rows_than_32_bits_count_are_refused() -> None:
    with (
        FakeTensorMode(),
        pytest.raises(ValueError, match=r"4294967296 assignments are more than the 2\*\*31 - 1 rows"),
    ):
        ops.permute_experts(torch.empty(2**30, 1), torch.empty(2**30, 4, dtype=torch.int64), 8)


# -- operators -----------------------------------------------------------------------------------------------------------


def cases() -> list[tuple[str, tuple[Any, ...]]]:
    torch.manual_seed(0)
    x, experts, weights = torch.randn(65, 33), routing(65, 3, 7), torch.rand(65, 3)
    rows, positions, _ = ops.permute_experts(x, experts, 7)
    return [
        ("permute_experts", (x, experts, 7)),
        ("spread_experts", (x, positions)),
        ("spread_experts", (x.bfloat16(), positions, weights)),
        ("unpermute_experts", (rows, positions)),
        ("unpermute_experts", (rows.bfloat16(), positions, weights.bfloat16())),
    ]


@pytest.mark.parametrize(("name", "args"), cases())
def test_opcheck(name: str, args: tuple[Any, ...]) -> None:
    is_real = [isinstance(a, torch.Tensor) and a.is_floating_point() for a in args]
    leaves = tuple(a.clone().requires_grad_() if real else a for a, real in zip(args, is_real, strict=True))
    torch.library.opcheck(OPERATORS[name].overload, leaves)


@pytest.mark.parametrize(
    ("name", "args"), [case for case in cases() if case[0] == "permute_experts" or len(case[1]) > 2]
)
def test_inductor_s_code_is_the_reference_to_the_last_bit(name: str, args: tuple[Any, ...]) -> None:
    overload = OPERATORS[name].overload
    run, tensors = compiled(overload, args)
    found, wanted = run(list(tensors)), overload(*args)
    for one, other in zip(found, [wanted] if isinstance(wanted, torch.Tensor) else wanted, strict=True):
        assert same(one, other)


def test_every_operator_is_checked_here() -> None:
    assert {o.name for o in OPERATORS.values() if o.reference.__module__ == reference.__name__} == {
        n for n, _ in cases()
    }
