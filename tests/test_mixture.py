"""``dspass.experts``: a loop over experts in eager code, compiled, and on ranks that divide them."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import dspass
from tests import training
from tests.mixtures import VOCABULARY, Grouped, Model, looped
from tests.ranks import run
from tests.test_capacity import EXPERTS, ep, gshard, ids, trained

HIDDEN, INNER = 10, 14


def expert(
    rows: torch.Tensor, product: dspass.mixture.Product, up: torch.Tensor, down: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    return product(F.silu(product(rows, up, bias)), down)


def weights(experts: int, dtype: torch.dtype) -> list[torch.Tensor]:
    shapes = [(experts, HIDDEN, INNER), (experts, INNER, HIDDEN), (experts, INNER)]
    return [(torch.randn(shape) / 3).to(dtype).requires_grad_() for shape in shapes]


ROUTES: dict[str, Callable[[], torch.Tensor]] = {
    **{f"top {k}": functools.partial(lambda k: torch.rand(2, 9, 8).topk(k).indices, k) for k in range(1, 9)},
    "some without tokens": lambda: torch.randint(0, 2, (2, 9, 2)) * 5,
    "all of one": lambda: torch.full((2, 9, 1), 3),
    "some dropped": lambda: torch.randint(-1, 10, (2, 9, 3)),
    "all dropped": lambda: torch.full((2, 9, 2), -1),
    "one token": lambda: torch.tensor([[[2, 7]]]),
    "none": lambda: torch.zeros(2, 0, 2, dtype=torch.int32),
}


@pytest.mark.parametrize("name", ROUTES)
def test_it_is_a_loop_over_experts(name: str) -> None:
    """Values and gradients; in fp32 up to the order of sums."""
    torch.manual_seed(0)
    choices = ROUTES[name]()
    x, scores = (
        torch.randn(*choices.shape[:-1], HIDDEN, requires_grad=True),
        torch.rand(choices.shape, requires_grad=True),
    )
    inputs = [x, scores, *weights(8, torch.float32)]
    found = []
    for function in (dspass.experts, looped):
        y = function(x, choices, scores, expert, *inputs[2:])
        assert y.shape == x.shape
        grads = torch.autograd.grad(y.square().sum() + 0 * sum(t.sum() for t in inputs), inputs)
        found.append([y, *grads])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_it_is_a_loop_over_experts_in_bf16() -> None:
    """Products are rounded to bf16, 2**-8 of a value each time: four times of that for the rows' three."""
    torch.manual_seed(0)
    choices, x = ROUTES["top 3"](), torch.randn(2, 9, HIDDEN).bfloat16()
    scores, given = torch.rand(choices.shape), weights(8, torch.bfloat16)
    one, other = (f(x, choices, scores, expert, *given) for f in (dspass.experts, looped))
    assert one.dtype is torch.bfloat16
    torch.testing.assert_close(one, other, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"function": None}, TypeError, "a function .* not a NoneType"),
        ({"weights": ()}, ValueError, "weights of dspass.experts are none: give one at least"),
        ({"weights": (torch.ones(3, 4, 4), torch.ones(2, 4, 4))}, ValueError, "each .* of as many experts"),
        ({"weights": (torch.ones(0, 4, 4),)}, ValueError, "0 experts cannot be: take 1 to 8192"),
        (
            {"choices": torch.zeros(5, 2, dtype=torch.int64)},
            ValueError,
            r"choices of shape \[5, 2\] do not go with scores",
        ),
        ({"x": torch.ones(5, 4)}, ValueError, r"do not go with tokens of shape \[5, 4\]: give tokens"),
        ({"choices": torch.zeros(6, 2)}, ValueError, "experts of float32 cannot be"),
        (
            {"function": lambda rows, product, w: product(rows, w)[1:]},
            ValueError,
            r"answers shape \[11, 4\] for 12 rows",
        ),
        ({"function": lambda rows, product, w: 3}, ValueError, "answers a int for 12 rows"),
        ({"x": torch.ones(6, 3)}, ValueError, "rows of 3 values do not go with matrices of 4 rows"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {
        "x": torch.ones(6, 4),
        "choices": torch.zeros(6, 2, dtype=torch.int64),
        "scores": torch.ones(6, 2),
        "function": lambda rows, product, w: product(rows, w),
        "weights": (torch.ones(3, 4, 4),),
    } | change
    with pytest.raises(error, match=message):
        dspass.experts(given["x"], given["choices"], given["scores"], given["function"], *given["weights"])


# -- on ranks ------------------------------------------------------------------------------------------------------------


def build() -> Model:
    """All tokens on one expert, a few of many, all of them; with biases and without."""
    return Model(
        Grouped(EXPERTS, 1, lean=50.0), Grouped(EXPERTS, 2, biases=True), Grouped(EXPERTS, EXPERTS), Grouped(EXPERTS, 3)
    )


def few_or_many(draw: torch.Generator, rank: int, call: int) -> tuple[torch.Tensor]:
    """One token on rank 0, and so experts without any."""
    return (torch.randint(0, VOCABULARY, (2 + 9 * rank,), generator=draw),)


def test_it_trains_as_a_loop_on_one_process() -> None:
    results = run(2, trained, build, ep(3), batches=few_or_many, timeout=120)
    training.close(results)
    for result in results:
        assert set(result["held"].values()) == {EXPERTS // 2}
        assert len(result["held"]) == 8
        assert not result["gathered"]
    rows = [[n for r in results for n in r["rows"][f"layers.{i}.up"]] for i in range(4)]
    assert rows[0] == [1 + 10, *[0] * (EXPERTS - 1)]
    assert rows[2] == [1 + 10] * EXPERTS
    assert sum(rows[3]) == 3 * (1 + 10)


def both() -> Model:
    return Model(
        *gshard("bmm", 2).layers[:1], Grouped(EXPERTS, 2, biases=True, capacity=lambda rows: -(-rows // EXPERTS))
    )


def test_what_inductor_makes_of_it() -> None:
    """Batched experts, and such as have a capacity."""
    results = run(2, trained, both, ep(3, capacity_factor=1.0, min_capacity=0), inductor=True, timeout=300)
    training.close(results)
    assert sum(n for r in results for n in r["drops"]["layers.1.up"]) > 0


@training.without_inductor
def losses(config: dict[str, Any]) -> list[float]:
    torch.manual_seed(0)
    model = Model(*gshard("bmm", 2).layers, Grouped(EXPERTS, 2, biases=True))
    dspass.shard(model, config)  # x.dtype in its code is bf16 from the first call on
    compiled: Any = torch.compile(model, backend="deepspeed", options=config)
    optimizer, draw, found = training.sgd(model.parameters()), torch.Generator().manual_seed(1), []
    for _ in range(4):
        loss = compiled(ids(draw, 0, 0)[0])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def test_bf16() -> None:
    """Beside the same model whose experts are whole on every rank: rounding differs where a sum is taken in another order, by a
    2**-8 of a value, and more where that moves a token to another expert."""
    whole = training.zero(3, bf16={"enabled": True})
    (divided, *_), (others, *_) = (run(2, losses, c, timeout=120) for c in (ep(3) | {"bf16": {"enabled": True}}, whole))
    assert divided == pytest.approx(others, rel=2**-6)
    assert divided[-1] != divided[0]


def test_the_recipe_runs() -> None:
    text = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text()
    (block,) = [
        b for b in re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE) if "dspass.experts(" in b
    ]
    names: dict[str, Any] = {}
    exec(block, names)
    layer, x = names["Mixture"](16, 24, experts=4, top_k=2), torch.randn(3, 5, 16)
    choices, scores = layer.route(x)
    torch.testing.assert_close(layer(x), looped(x, choices, scores, layer.expert, layer.up, layer.down))
