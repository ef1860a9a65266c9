"""Gradients that are added to sums where they are made: what is taken, what is left, and the numbers of both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.fx as fx
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from dspass.lowering.add_gradients import add_gradients
from dspass.lowering.segments import SegmentCompiler, lower
from dspass.lowering.simulate import GraphSimulator
from dspass.runtime.sums import ADD_PRODUCT, ADD_ROWS

aten = torch.ops.aten
Tensors = Sequence[torch.Tensor]
Graph = Callable[..., tuple[Any, ...]]


def rows(size: int, index: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The gradient of an embedding of so many rows, as AOTAutograd writes it."""
    base = torch.ops.aten.full.default([size, values.shape[-1]], 0, dtype=values.dtype)
    return aten._unsafe_masked_index_put_accumulate(base, mask.unsqueeze(-1), [index], values)


def linear(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return aten.mm(aten.permute(dy, [1, 0]), x)


def turned(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return aten.permute(aten.mm(aten.permute(x, [1, 0]), dy), [1, 0])


DY, X = torch.randn(6, 5), torch.randn(6, 4)
INDEX = torch.tensor([[0, 2, 2], [4, -1, 9]])
VALUES = torch.randn(2, 3, 4)
MASK = (INDEX >= 0) & (INDEX < 5)

CASES: dict[str, tuple[Graph, Tensors, list[bool]]] = {
    "product": (lambda dy, x: (linear(dy, x),), (DY, X), [True]),
    "turned": (lambda dy, x: (turned(dy, x),), (DY, X), [True]),
    "of itself": (
        lambda x: (aten.mm(aten.permute(x, [1, 0]), x), aten.mm(x, aten.permute(x, [1, 0]))),
        (X,),
        [True, True],
    ),
    "two products": (lambda dy, x: (aten.add(linear(dy, x), linear(2 * dy, x)),), (DY, X), [True]),
    "rows": (lambda i, v, m: (rows(5, i, v, m),), (INDEX, VALUES, MASK), [True]),
    "rows and product": (
        lambda i, v, m, dy, x: (aten.add(rows(5, i, v, m), linear(dy, x)), linear(x, dy)),
        (INDEX, VALUES, MASK, DY, X),
        [True, True],
    ),
    "a vector": (lambda dy, x: (dy.sum(0), linear(dy, x)), (DY, X), [False, True]),
    "read elsewhere": (lambda dy, x: (linear(dy, x), linear(dy, x).sum()), (DY, X), [True, False]),
    "scaled": (lambda dy, x: (linear(dy, x) * 2,), (DY, X), [False]),
    "scaled in a sum": (lambda dy, x: (aten.add(linear(dy, x), linear(dy, x), alpha=2),), (DY, X), [False]),
    "a product and what is none": (lambda dy, x: (aten.add(linear(dy, x), x[:5]),), (DY, X), [False]),
}


def shared(dy: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    product = linear(dy, x)
    return product, product.sum(), product


CASES["shared"] = (shared, (DY, X), [False, False, False])


def _changed(of: Graph, inputs: Tensors) -> tuple[fx.GraphModule, dict[int, str]]:
    gm = make_fx(of, tracing_mode="fake")(*inputs)
    count = len(gm.graph.find_nodes(op="output")[0].args[0])
    added = add_gradients(gm.graph, range(count))
    gm.graph.lint()
    gm.recompile()
    return gm, added


#: AOTAutograd's decompositions leave no such sum, and Inductor's code would leave out the factor.
NOT_FOR_INDUCTOR = "scaled in a sum"


@pytest.mark.parametrize(
    ("name", "compiler"),
    [(name, how) for name in CASES for how in ("graph", "inductor") if (name, how) != (NOT_FOR_INDUCTOR, "inductor")],
)
def test_what_is_made_for_a_sum_is_added_to_it(name: str, compiler: str) -> None:
    of, inputs, expected = CASES[name]
    gm, added = _changed(of, inputs)
    wanted = of(*inputs)
    assert [i in added for i in range(len(wanted))] == expected
    placeholders = [n.name for n in gm.graph.find_nodes(op="placeholder")]
    assert placeholders[len(inputs) :] == list(added.values()), "sums are the last inputs"
    before = {i: torch.randn(wanted[i].shape) for i in added}
    inductor = lower(gm, SegmentCompiler(), is_backward=True, is_inference=False) if compiler == "inductor" else None
    for times in (1, 2):  # as with several micro-batches
        totals = {i: total.clone() for i, total in before.items()}
        for _ in range(times):
            given = [*inputs, *totals.values()]
            answers = inductor(given) if inductor is not None else gm(*given)
        for i, value in enumerate(wanted):
            if i in added:
                assert answers[i] is None
                torch.testing.assert_close(totals[i], before[i] + times * value)
            else:
                torch.testing.assert_close(answers[i], value)


def test_nothing_is_made_that_is_added() -> None:
    gm, added = _changed(*CASES["rows and product"][:2])
    assert set(added) == {0, 1}
    targets = [n.target for n in gm.graph.nodes if n.op == "call_function"]
    assert targets.count(ADD_PRODUCT) == 2
    assert targets.count(ADD_ROWS) == 1
    assert not {aten.mm.default, aten.add.Tensor, aten.full.default} & set(targets)
    lower(gm, GraphSimulator(), is_backward=True, is_inference=False)  # and a dry run knows the operators


def _effect(x: torch.Tensor) -> None:
    raise AssertionError("it is not run here")


def test_what_nobody_reads_for_other_reasons_stays() -> None:
    of, inputs, _ = CASES["product"]
    gm = make_fx(of, tracing_mode="fake")(*inputs)
    with gm.graph.inserting_after(gm.graph.find_nodes(op="placeholder")[-1]):
        gm.graph.call_function(_effect, (gm.graph.find_nodes(op="placeholder")[0],))
    assert add_gradients(gm.graph, [0])
    assert _effect in [n.target for n in gm.graph.nodes]
    assert aten.mm.default not in [n.target for n in gm.graph.nodes]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(-4, 12), min_size=1, max_size=12),
    st.integers(1, 8),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_rows_are_added_wherever_the_mask_is_true(index: list[int], size: int, dtype: torch.dtype) -> None:
    at, values = torch.tensor(index), torch.randn(len(index), 3, dtype=dtype)
    mask = (at >= -size) & (at < size)
    total = torch.randn(size, 3, dtype=dtype)
    wanted = total.clone()
    for i, value in zip(index, values, strict=True):
        if -size <= i < size:
            wanted[i] += value
    torch.ops.dspass.add_rows_(total, mask.unsqueeze(-1), at, values)
    torch.testing.assert_close(total, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_are_well_behaved(dtype: torch.dtype) -> None:
    total = torch.randn(5, 4, dtype=dtype)
    torch.library.opcheck(ADD_PRODUCT, (total, torch.randn(5, 3, dtype=dtype), torch.randn(3, 4, dtype=dtype)))
    arguments = (total, MASK.unsqueeze(-1), INDEX, VALUES.to(dtype))
    torch.library.opcheck(ADD_ROWS, arguments)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        torch.ops.dspass.add_product_(total, torch.randn(5, 3, dtype=dtype), torch.randn(2, 4, dtype=dtype))
