"""``dspass.keep`` and ``dspass.recompute``: what is saved follows them, the numbers do not, and what cannot be is said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dspass import keep, recompute
from dspass.engines import engine_of
from dspass.passes.nodes import calls
from dspass.runtime.wish import WISH
from tests.ranks import run
from tests.training import without_inductor, zero

Wish = Callable[[torch.Tensor], torch.Tensor]
aten = torch.ops.aten

BUDGETS = pytest.mark.parametrize("budget", [None, "10MB"])


def nothing(value: torch.Tensor) -> torch.Tensor:
    return value


def viewed(wish: Wish) -> Wish:
    """The same wish, said of a view."""
    return lambda value: wish(value.flatten().view(value.shape).t()).t()


class Net(nn.Module):
    """The backward reads what ``body`` answers, and the inputs of both products."""

    def __init__(self, body: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 4)
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.body(self.up(x))).square().mean()


def options(budget: str | None = None, **own: Any) -> dict[str, Any]:
    own |= {} if budget is None else {"memory_budget": budget}
    return zero(0, dspass={"fallback_random": True, **own})


@without_inductor
def step(body: Callable[[torch.Tensor], torch.Tensor], config: dict[str, Any]) -> tuple[Net, list[torch.Tensor]]:
    """The model behind one step, its loss and its gradients."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Net(body)
    x = torch.randn(6, 8)
    loss = torch.compile(model, backend="deepspeed", options=config)(x)
    loss.backward()
    return model, [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def saved(model: nn.Module) -> Counter[Any]:
    """What the forward hands to the backward, by the operators that make it."""
    graphs = engine_of(model).compilations[-1].graphs
    assert not any(calls(gm.graph, WISH) for gm in graphs.values())
    (output,) = graphs["forward"].graph.find_nodes(op="output")
    return Counter(node.target for node in output.args[0][1:] if node.op == "call_function")


def said(model: nn.Module) -> list[str]:
    """What the pass did to the joint graph."""
    passes = engine_of(model).compilations[-1].passes
    return [done.summary for done in passes if done.name == "honour_wishes" and done.where == "joint"]


def equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


# -- what is saved, and the numbers ----------------------------------------------------------------------------


def square(wish: Wish) -> Callable[[torch.Tensor], torch.Tensor]:
    """Of the product and its tanh, the backward reads the latter."""

    def body(x: torch.Tensor) -> torch.Tensor:
        x = wish(x.tanh())
        return x * x

    return body


@BUDGETS
@pytest.mark.parametrize("through", [nothing, viewed])
def test_a_kept_value_is_saved_and_a_recomputed_one_is_not(budget: str | None, through: Any) -> None:
    for wish, tanh in ((keep, 1), (recompute, 0)):
        model, found = step(square(through(wish)), options(budget))
        assert saved(model)[aten.tanh.default] == tanh
        assert said(model) == [f"{tanh} values kept, {1 - tanh} computed again"]
        assert equal(found, step(square(nothing), options(budget))[1])


@BUDGETS
def test_all_that_a_function_computes_is_computed_again(budget: str | None) -> None:
    """A checkpoint: what is inside is not saved, dropout draws the same numbers, and a kept value is the exception."""

    def inside(x: torch.Tensor) -> torch.Tensor:
        return F.dropout(torch.exp(torch.sin(x).tanh()), 0.5)

    def excepted(x: torch.Tensor) -> torch.Tensor:
        return F.dropout(torch.exp(keep(torch.sin(x).tanh())), 0.5)

    _, wanted = step(inside, options(budget))
    again, found = step(lambda x: recompute(inside, x), options(budget))
    but, other = step(lambda x: recompute(excepted, x), options(budget))
    assert equal(found, wanted)
    assert equal(other, wanted)
    assert saved(again)[aten.tanh.default] == 0 == saved(again)[aten.exp.default]
    assert saved(but)[aten.tanh.default] == 1


def test_wishes_hold_on_several_ranks_at_stage_3() -> None:
    first, second = run(2, _ranks, "wished"), run(2, _ranks, "nothing")
    assert first == second
    assert first[0] == first[1]


def _ranks(body: str) -> list[float]:
    torch.manual_seed(0)
    wish: Any = {"wished": lambda x: keep(recompute(x.tanh()).square()), "nothing": lambda x: x.tanh().square()}[body]
    model = Net(wish)
    compiled = torch.compile(model, backend="deepspeed", options=zero(3, dspass={"memory_budget": "10MB"}))
    optimizer = torch.optim.SGD(compiled.parameters(), lr=0.1)
    losses = []
    for _ in range(4):
        loss = compiled(torch.ones(6, 8))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# -- what does nothing, and what is refused ------------------------------------------------------------------------


def test_without_a_backward_or_a_compiler_marks_do_nothing() -> None:
    torch._dynamo.reset()
    model = Net(square(keep))
    x = torch.randn(6, 8)
    with torch.no_grad():
        compiled = torch.compile(model, backend="deepspeed", options=options())
        torch.testing.assert_close(compiled(x), model(x))
    value = torch.randn(3, requires_grad=True)
    assert keep(value) is value
    assert recompute(value) is value
    assert torch.equal(recompute(torch.sin, value), value.sin())
    (gradient,) = torch.autograd.grad(recompute(torch.sin, value).sum(), value)
    assert torch.equal(gradient, value.cos())


def test_contradictions_and_mistakes_are_refused() -> None:
    with pytest.raises(Exception, match=r"cannot be both kept and computed again: dspass\.keep at .*test_wishes\.py"):
        step(lambda x: recompute(keep(x.tanh())).square(), options())
    for wrong in (lambda: keep(3), lambda: recompute(3), lambda: recompute(torch.ones(1), 2)):
        with pytest.raises(TypeError, match=r"dspass\.(keep|recompute) takes"):
            wrong()


def test_what_cannot_be_computed_again_is_said() -> None:
    torch._dynamo.reset()
    model = Net(nothing)
    compiled = torch.compile(lambda x: model(recompute(x) * 2), backend="deepspeed", options=options())
    with pytest.warns(UserWarning, match=r"dspass\.recompute .*has no effect: it is an input of the compiled graph"):
        compiled(torch.randn(6, 8)).backward()
