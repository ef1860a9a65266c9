"""The grouped products of a mixture: beside a loop over experts in fp64, however matrices lie and rows are shared out, their
gradients, and graphs that do not know how many rows there are."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dspass.runtime import grouped as reference
from dspass.runtime.operators import OPERATORS
from tests.emulated import same
from tests.test_quantise import compiled

ops = torch.ops.dspass
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WAYS = [{"by_onednn": by, "is_rounded": rounded} for by in (False, True) for rounded in (False, True)]
LAYOUTS = ("rows", "columns", "gaps", "repeated")


def ends_of(counts: Sequence[int]) -> torch.Tensor:
    return torch.tensor(counts).cumsum(0).to(torch.int32)


def laid(values: torch.Tensor, layout: str) -> torch.Tensor:
    """The same shape, and for all but "repeated" the same values, with other strides in the last two dimensions."""
    if layout == "columns":
        return values.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "gaps":
        wide = values.new_full((*values.shape[:-2], 2 * values.shape[-2], 2 * values.shape[-1]), float("nan"))
        wide[..., ::2, ::2] = values
        return wide[..., ::2, ::2]
    return values[..., :1, :].expand_as(values) if layout == "repeated" else values


def looped(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """In the dtype of ``x``."""
    begins = [0, *ends.tolist()]
    parts = [x[begin:end] @ weight[e] for e, (begin, end) in enumerate(pairwise(begins))]
    return torch.cat([*parts, x.new_zeros((x.shape[0] - begins[-1], weight.shape[2]))])


def looped_outer(x: torch.Tensor, grad: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return torch.stack([x[b:e].t() @ grad[b:e] for b, e in pairwise([0, *ends.tolist()])])


def check(found: torch.Tensor, loop: Any, left: torch.Tensor, right: torch.Tensor, ends: torch.Tensor) -> None:
    """Sums of fp32, rounded once more to the dtype: within what each of their roundings may amount to."""
    exact, size = loop(left.double(), right.double(), ends), loop(left.double().abs(), right.double().abs(), ends)
    terms = left.shape[1] if right.dim() == 3 else left.shape[0]
    bound = (terms + 1) * 2.0**-24 * size + torch.finfo(left.dtype).eps / 2 * exact.abs() * 1.001 + 1e-7
    assert found.shape == exact.shape
    assert found.dtype is left.dtype
    assert ((found.double() - exact).abs() <= bound).all()


def some(rows: int, inner: int, columns: int, experts: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(rows)
    shapes = ((rows, inner), (experts, inner, columns), (rows, columns))
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.one_of(st.just(0), st.integers(1, 80), st.integers(250, 270)), min_size=1, max_size=6),
    behind=st.integers(0, 9),
    inner=st.one_of(st.integers(0, 40), st.sampled_from((8, 16))),  # which torch's own loop takes
    columns=st.one_of(st.integers(0, 40), st.sampled_from((8, 16))),
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    way=st.sampled_from([None, *WAYS]),
)
def test_products_are_those_of_a_loop(
    counts: list[int],
    behind: int,
    inner: int,
    columns: int,
    dtype: torch.dtype,
    layouts: tuple[str, str, str],
    way: dict[str, bool] | None,
) -> None:
    """Of the operators, and of every way in which experts take turns, whichever this CPU's is."""
    ends = ends_of(counts)
    given_ones = some(sum(counts) + behind, inner, columns, len(counts), dtype)
    x, weight, grad = (laid(t, layout) if t.numel() else t for t, layout in zip(given_ones, layouts, strict=True))
    if way is None:
        product, outer = ops.grouped_product(x, weight, ends), ops.grouped_outer(x, grad, ends)
    else:
        product = reference._product_by_expert(x, weight, ends, **way)
        outer = reference._outer_by_expert(x, grad, ends, **way)
    assert product.is_contiguous()  # as fake ones are
    assert outer.is_contiguous()
    check(product, looped, x, weight, ends)
    check(outer, looped_outer, x, grad, ends)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", [(300, 0, 0), (0, 0, 300), (1, 0, 0), (0, 0, 0), (1, 1, 1), (0, 17, 0)], ids=str)
def test_odd_shares(counts: tuple[int, ...], dtype: torch.dtype) -> None:
    """All rows of one expert, one row, none; of the operators and of their references."""
    for behind in (0, 3):
        x, weight, grad = some(sum(counts) + behind, 24, 16, 3, dtype)
        ends = ends_of(counts)
        for product, outer in (
            (ops.grouped_product, ops.grouped_outer),
            (reference.grouped_product, reference.grouped_outer),
        ):
            check(product(x, weight, ends), looped, x, weight, ends)
            check(outer(x, grad, ends), looped_outer, x, grad, ends)


@pytest.mark.parametrize("way", [None, *WAYS], ids=str)
def test_an_expert_sees_nothing_of_its_neighbours(way: dict[str, bool] | None) -> None:
    """Its products read rows of theirs where numbers of rows are rounded up."""
    ends = ends_of((337, 0, 259, 290))
    x, weight, grad = some(891, 24, 16, 4, torch.float32)
    odd = [t.clone() for t in (x, grad)]
    for t in odd:
        t[337:596] = float("nan")
        t[886:] = float("inf")
    product, outer = (
        (ops.grouped_product, ops.grouped_outer)
        if way is None
        else (lambda *a: reference._product_by_expert(*a, **way), lambda *a: reference._outer_by_expert(*a, **way))
    )
    plain, found = product(x, weight, ends), product(odd[0], weight, ends)
    assert same(found[:337], plain[:337])
    assert found[337:596].isnan().all()
    assert same(found[596:], plain[596:])
    assert not found[886:].any()
    plain, found = outer(x, grad, ends), outer(*odd, ends)
    assert found[2].isnan().all()
    assert all(same(found[e], plain[e]) for e in (0, 1, 3))
    assert not found[1].any()


def test_numbers_of_rows_are_few() -> None:
    found = [reference._rounded(rows) for rows in range(1, 2049)]
    assert all(rows <= more <= rows * 65 / 64 for rows, more in enumerate(found, 1))
    assert len(set(found)) == 127 + 64 * 4 + 1
    assert found[:130] == [*range(1, 129), 130, 130]


def test_products_are_of_few_numbers_of_rows() -> None:
    """Also those of the last experts, behind whom there are no more rows."""
    ends = ends_of((301, 0, 519, 283))
    for operands, run in (
        (some(1103, 24, 16, 4, torch.bfloat16)[:2], reference._product_by_expert),
        (some(1103, 24, 16, 4, torch.bfloat16)[::2], reference._outer_by_expert),
    ):
        with _Calls("aten") as calls:
            run(*operands, ends, by_onednn=False, is_rounded=True)
        found = {rows for name, shape in calls.made if name == "mm" for rows in shape} - {24}
        assert found == {304, 520, 284}


@pytest.mark.parametrize("is_rounded", [False, True])
def test_products_of_few_rows_are_torch_s_own_loop(is_rounded: bool) -> None:
    ends, way = ends_of((37, 0, 127)), {"by_onednn": False, "is_rounded": is_rounded}
    x, weight, grad = some(300, 24, 16, 3, torch.bfloat16)
    with _Calls("aten") as calls:
        found, outer = (
            reference._product_by_expert(x, weight, ends, **way),
            reference._outer_by_expert(x, grad, ends, **way),
        )
    assert [name for name in calls.names if name.endswith("mm")] == ["_grouped_mm"] * 2
    check(found, looped, x, weight, ends)
    check(outer, looped_outer, x, grad, ends)


@pytest.mark.parametrize("family", ["25", "26"])
def test_onednn_is_for_large_experts_where_avx512_is_halved(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a Zen 4's fp32; a Zen 5 gives it all."""
    monkeypatch.setattr(reference.linear.cpu, "facts", lambda: {"vendor_id": "AuthenticAMD", "cpu family": family})
    halves = family == "25"
    x, weight, grad = some(40, 24, 16, 2, torch.float32)
    for inner, is_large in ((512, False), (4096, True)):
        operations = 2.0 * 128 * inner * 512
        assert (operations >= reference.least_operations(torch.float32)) == (is_large or not halves)
        assert (operations >= reference.least_operations(torch.float32, is_outer=True)) != halves
    with _Calls("mkldnn") as calls:
        reference._product_on_cpu(x, weight, ends_of((20, 20)))
        reference._outer_on_cpu(x, grad, ends_of((20, 20)))
    assert len(calls.made) == (0 if halves else 4)


def test_the_way_of_a_gpu() -> None:
    """With torch's grouped product, whose CPU kernel takes the same."""
    ends = ends_of((5, 0, 9))
    for dtype in DTYPES:
        x, weight, grad = some(17, 24, 16, 3, dtype)
        check(reference._product_on_cuda(x, weight, ends), looped, x, weight, ends)
        check(reference._outer_on_cuda(x, grad, ends), looped_outer, x, grad, ends)
    takes = reference.compat.multiplies_grouped
    assert takes(x, weight)
    assert takes(grad, weight.transpose(1, 2))
    assert takes(x.t(), grad)
    narrow = laid(weight[..., :12], "columns")  # torch's result would have gaps, which fake tensors do not
    assert not takes(x, narrow)
    assert reference._product_on_cuda(x, narrow, ends).is_contiguous()
    for odd in (x.double(), x[:, 1:], x[:, :23].contiguous(), x[:, ::2], laid(x, "gaps")):
        assert not takes(odd, weight)


# -- gradients -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
def test_gradients_are_those_of_a_loop(dtype: torch.dtype, is_compiled: bool) -> None:
    """And lie as the weight does, which here is a view of what a person would hold."""
    ends = ends_of((20, 0, 3, 40))
    x, weight, grad = some(70, 24, 16, 4, dtype)
    x.requires_grad_()
    held = weight.transpose(1, 2).contiguous().requires_grad_()

    def product(x: torch.Tensor, held: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        return ops.grouped_product(x, held.transpose(1, 2), ends)

    run = torch.compile(product, fullgraph=True, backend="aot_eager") if is_compiled else product
    to_x, to_held = torch.autograd.grad(run(x, held, ends), (x, held), grad)
    check(to_x, looped, grad, held.detach(), ends)
    check(to_held.transpose(1, 2), looped_outer, x.detach(), grad, ends)
    assert to_held.is_contiguous()
    for plain in (False, True):
        one = weight.clone().requires_grad_() if plain else held.detach().transpose(1, 2).requires_grad_()
        (found,) = torch.autograd.grad(ops.grouped_product(x, one, ends), one, grad)
        assert found.stride() == one.stride()


def test_gradients_of_gradients() -> None:
    """Each is made of the other. fp32 sums in another order: 1e-5 is some eighty of its steps."""
    ends = ends_of((5, 0, 7))
    inputs = some(14, 6, 5, 3, torch.float32)
    found = []
    for product, outer in ((ops.grouped_product, ops.grouped_outer), (looped, looped_outer)):
        x, weight, other = (t.clone().requires_grad_() for t in inputs)
        loss = product(x, weight, ends).sin().sum() + outer(x, other, ends).cos().sum()
        first = torch.autograd.grad(loss, (x, weight, other), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (x, weight, other))
        found.append([*first, *second])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)
        assert other.abs().sum() > 0


class _Calls(TorchDispatchMode):
    """Operators of one library as they are called, each with the shape of its first argument."""

    def __init__(self, library: str = "dspass") -> None:
        super().__init__()
        self.library, self.made = library, list[tuple[str, tuple[int, ...]]]()

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.made]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == self.library:
            self.made.append((func.overloadpacket.__name__, tuple(getattr(args[0], "shape", ()))))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("needed", [(True, False), (False, True), (True, True)], ids=str)
def test_only_gradients_that_are_needed_are_computed(needed: tuple[bool, bool]) -> None:
    x, weight, _ = some(12, 8, 4, 2, torch.float32)
    x.requires_grad_(needed[0])
    weight.requires_grad_(needed[1])
    with _Calls() as calls:
        ops.grouped_product(x, weight, ends_of((5, 7))).sum().backward()
    wanted = [name for name, its in zip(("grouped_product", "grouped_outer"), needed, strict=True) if its]
    assert calls.names == ["grouped_product", *wanted]
    assert [t.grad is not None for t in (x, weight)] == list(needed)


# -- what cannot be ------------------------------------------------------------------------------------------------------

_X, _WEIGHT, _ENDS = torch.ones(4, 8), torch.ones(2, 8, 3), torch.tensor([1, 4], dtype=torch.int32)
REFUSALS: list[tuple[str, tuple[torch.Tensor, ...], str]] = [
    ("grouped_product", (_X[0], _WEIGHT, _ENDS), r"of 1 and 3 dimensions cannot be: take rows \[rows, in\]"),
    ("grouped_product", (_X, _WEIGHT[0], _ENDS), "of 2 and 2 dimensions cannot be"),
    ("grouped_product", (_X[:, 1:], _WEIGHT, _ENDS), "rows of 7 values do not go with matrices of 8 rows"),
    ("grouped_product", (_X, _WEIGHT, _ENDS[1:]), "1 ends do not go with 2 matrices: take one for each expert"),
    ("grouped_product", (_X, _WEIGHT.half(), _ENDS), "float32, float16 are not multiplied by experts"),
    ("grouped_product", (_X.double(), _WEIGHT.double(), _ENDS), "float64, float64 .*: take one of fp32, fp16 and bf16"),
    ("grouped_product", (_X, _WEIGHT, _ENDS.long()), r"ends of int64 and 1 dimensions cannot be: take .*int32\[experts\]"),
    ("grouped_product", (_X, _WEIGHT[:0], _ENDS[:0]), "no expert cannot be: take one at least"),
    ("grouped_outer", (_X, _WEIGHT, _ENDS), r"of 2 and 3 dimensions cannot be: take rows \[rows, in\] and \[rows, out\]"),
    ("grouped_outer", (_X, _X[1:], _ENDS), "4 and 3 rows do not go together: take as many"),
    ("grouped_outer", (_X, _X, _ENDS[None]), "ends of int32 and 2 dimensions cannot be"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "args", "message"), REFUSALS)
def test_what_cannot_be_is_refused(name: str, args: tuple[torch.Tensor, ...], message: str) -> None:
    op = getattr(ops, name)
    with pytest.raises(ValueError, match=message):
        op(*args)
    with pytest.raises(ValueError, match=message):
        OPERATORS[name].reference(*args)
    with FakeTensorMode() as mode, pytest.raises(ValueError, match=message):
        op(*map(mode.from_tensor, args))


@pytest.mark.parametrize("ends", [[3, 2], [1, 5], [-1, 4]], ids=str)
def test_ends_that_decrease_or_exceed_the_rows_are_refused(ends: list[int]) -> None:
    at = torch.tensor(ends, dtype=torch.int32)
    for run in (lambda: ops.grouped_product(_X, _WEIGHT, at), lambda: ops.grouped_outer(_X, _X, at)):
        with pytest.raises(
            ValueError, match=r"expert [01] ends at row -?\d behind \d, of 4 rows: take ends that do not"
        ):
            run()


# -- operators and graphs ------------------------------------------------------------------------------------------------


def cases() -> dict[str, tuple[torch.Tensor, ...]]:
    x, weight, grad = some(65, 24, 16, 3, torch.float32)
    ends = ends_of((20, 0, 40))
    return {"grouped_product": (x, weight, ends), "grouped_outer": (x, grad, ends)}


@pytest.mark.parametrize("name", sorted(cases()))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    x, other, ends = cases()[name]
    torch.library.opcheck(OPERATORS[name].overload, (*(t.to(dtype).requires_grad_() for t in (x, other)), ends))


def test_every_operator_is_checked_here() -> None:
    assert {o.name for o in OPERATORS.values() if o.reference.__module__ == reference.__name__} == set(cases())


@pytest.mark.parametrize("name", sorted(cases()))
def test_it_stays_whole_in_a_graph(name: str) -> None:
    """Its CPU implementation is called from Inductor's code, and answers what it answers outside."""
    args, overload = cases()[name], OPERATORS[name].overload
    assert OPERATORS[name].server("cpu") == "kernel"
    run, tensors = compiled(overload, args)
    with _Calls() as calls:
        (found,) = run(list(tensors))
    assert calls.names == [name]
    assert same(found, overload(*args))


def test_a_graph_serves_any_number_of_rows() -> None:
    """By Inductor, with gradients: compiled once for sizes that it does not know, none among them."""
    compilations = []

    def backend(gm: Any, inputs: Any) -> Any:
        compilations.append(gm)
        return torch._inductor.compile(gm, inputs)

    def layer(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        return ops.grouped_product(x, weight.transpose(1, 2), ends)

    run = torch.compile(layer, fullgraph=True, backend=backend)
    weight = torch.randn(3, 16, 24, requires_grad=True)
    for counts in ((4, 0, 9), (0, 0, 0), (1, 0, 0), (30, 70, 1)):
        x = torch.randn(sum(counts), 24, requires_grad=True)
        torch._dynamo.decorators.mark_unbacked(x, 0)
        found, wanted = run(x, weight, ends_of(counts)), layer(x, weight, ends_of(counts))
        assert same(found, wanted)
        for one, other in zip(*(torch.autograd.grad(y.sum(), (x, weight)) for y in (found, wanted)), strict=True):
            assert same(one, other)
    assert len(compilations) == 1


def test_operations_are_counted() -> None:
    x, weight = (t.requires_grad_() for t in some(30, 8, 4, 2, torch.float32)[:2])
    with FlopCounterMode(display=False) as counter:
        ops.grouped_product(x, weight, ends_of((10, 20))).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 30 * 8 * 4
