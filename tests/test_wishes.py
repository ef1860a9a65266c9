"""``dspass.keep`` and ``dspass.recompute``: what is saved follows them, the numbers do not, and what cannot be is said."""

from __future__ import annotations

import contextlib
import functools
import io
import operator
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from dspass import keep, recompute
from dspass.engines import engine_of
from dspass.passes.base import PassContext
from dspass.passes.honour_wishes import HonourWishes
from dspass.passes.nodes import GATHERED, calls
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


def several(wish: Wish) -> Callable[[torch.Tensor], torch.Tensor]:
    """Of an operator that answers several values."""

    def body(x: torch.Tensor) -> torch.Tensor:
        x = wish(x.sort(dim=-1).values)
        return x * x

    return body


def pieces(wish: Wish) -> Callable[[torch.Tensor], torch.Tensor]:
    """Of a piece of a value."""

    def body(x: torch.Tensor) -> torch.Tensor:
        a, b, c = x.tanh().split(4, -1)
        return torch.cat([wish(a) * b, b * c, c * a], -1)

    return body


def noise(wish: Wish) -> Callable[[torch.Tensor], torch.Tensor]:
    """Of a random number: it is drawn again from the same state."""

    def body(x: torch.Tensor) -> torch.Tensor:
        drawn = wish(torch.rand_like(x))
        return (x * drawn).sin() * drawn

    return body


def attention(wish: Wish) -> Callable[[torch.Tensor], torch.Tensor]:
    def body(x: torch.Tensor) -> torch.Tensor:
        x = x.view(1, 2, 6, 6)
        return wish(F.scaled_dot_product_attention(x, x, x)).reshape(6, 12)

    return body


def written(wish: Wish) -> Callable[[torch.Tensor], torch.Tensor]:
    """What is written into the answer of a mark is written into the value."""

    def body(x: torch.Tensor) -> torch.Tensor:
        x = x.sin()
        wish(x).add_(1)
        return x * x

    return body


@BUDGETS
@pytest.mark.parametrize(
    ("body", "kept", "again"),
    [
        (several, lambda found: found["getitem"] > 0, lambda found: found["getitem"] == 0),
        (pieces, lambda found: found["aten.tanh.default"] == 1, lambda found: not found["aten.tanh.default"]),
        (noise, lambda found: any("rand" in name for name in found), lambda found: not any("rand" in n for n in found)),
        (attention, lambda found: found["getitem"] == 2, lambda found: found["getitem"] == 1),  # the random state
        (written, lambda found: True, lambda found: not found["aten.sin.default"]),
    ],
)
def test_kinds_of_values(body: Any, kept: Any, again: Any, budget: str | None) -> None:
    for wish, holds in ((keep, kept), (recompute, again)):
        model, found = step(body(wish), options(budget))
        names = Counter({"getitem" if t is operator.getitem else str(t): n for t, n in saved(model).items()})
        assert holds(names), names
        assert equal(found, step(body(nothing), options(budget))[1])


@pytest.mark.parametrize("own_random", [True, False])
def test_compiled_numbers_are_the_same_to_the_bit(own_random: bool) -> None:
    """By Inductor's kernels, and with its random numbers or torch's."""

    def body(wish: Any, inside: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: inside(lambda h: F.dropout(wish(h.tanh()), 0.5).exp(), noise(wish)(x))

    config = options(fallback_random=not own_random)
    _, wanted = step(body(nothing, lambda function, x: function(x)), config, inductor=True)
    for wish in (keep, recompute):
        assert equal(step(body(wish, recompute), config, inductor=True)[1], wanted)


def test_wishes_hold_on_several_ranks_at_stage_3() -> None:
    first, second = run(2, _ranks, "wished"), run(2, _ranks, "nothing")
    assert first == second
    assert first[0] == first[1]


def twice(wish: Wish) -> Wish:
    """A random value that the backward reads, and that could be drawn once more."""

    def body(x: torch.Tensor) -> torch.Tensor:
        drawn = wish(torch.rand_like(x))
        return (x * drawn).sin() * drawn

    return body


def checkpointed(function: Wish) -> Wish:
    return lambda x: recompute(function, x)


@BUDGETS
def test_a_policy_says_what_a_checkpoint_saves(budget: str | None) -> None:
    def policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op is aten.exp.default else CheckpointPolicy.MUST_RECOMPUTE

    def inside(x: torch.Tensor) -> torch.Tensor:
        return F.dropout(torch.exp(torch.sin(x).tanh()).sigmoid(), 0.5)

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    _, wanted = step(inside, options(budget))
    model, found = step(lambda x: recompute(inside, x, context_fn=contexts), options(budget))
    assert equal(found, wanted)
    names = saved(model)
    assert names[aten.exp.default] == 1
    assert not names[aten.tanh.default] + names[aten.sigmoid.default] + names[aten.sin.default]


@pytest.mark.parametrize("body", [twice, square])
def test_a_plan_in_a_file_is_for_the_wishes_that_it_was_made_for(tmp_path: Path, body: Any) -> None:
    """By the plan of other wishes the backward would draw anew, or save what is to be computed again."""
    path = str(tmp_path / "plan.json")
    _, wanted = step(body(nothing), options())
    for one in (body(recompute), body(nothing), body(keep), checkpointed(body(nothing))):
        alone, _ = step(one, options("10MB"))
        for budget in ("10MB", None):  # made, then read
            model, found = step(one, options(budget, plan=path))
            assert equal(found, wanted)
            assert saved(model) == saved(alone)
    with pytest.raises(
        Exception, match=r"wishes: \w+ \w+ in the plan, must_save \w+ here|wishes: none in the plan, must_save"
    ):
        step(lambda x: keep(body(nothing)(x)), options(plan=path))


@without_inductor
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


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_other_backends_pass_marks_by(backend: str) -> None:
    torch._dynamo.reset()
    model, x = Net(lambda x: recompute(keep(x.tanh())).square()), torch.randn(6, 8)
    for call in (model, torch.compile(model, backend=backend)):
        call(x).backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model(x).backward()
    for both, p in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(both, 2 * p.grad)


def test_without_the_pass_marks_do_nothing() -> None:
    config = options(passes=["...", "-honour_wishes"])
    _, wanted = step(square(nothing), config, inductor=True)
    for wish in (keep, recompute):
        assert equal(step(square(wish), config, inductor=True)[1], wanted)


def test_the_operator() -> None:
    torch.library.opcheck(WISH, (torch.randn(3, requires_grad=True), "keep"))


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


def test_a_kept_parameter_is_no_wish() -> None:
    for value, why in (("weight", "is a parameter"), ("made", "is made of parameters only")):
        with pytest.warns(UserWarning, match=rf"dspass\.keep .*test_wishes\.py:\d+ has no effect: it {why}"):
            mark_kept(value)


def mark_kept(value: str) -> None:
    graph = fx.Graph()
    weight, tangent = graph.placeholder("weight"), graph.placeholder("tangents_1")
    weight.meta[GATHERED] = ("m/w", "local")
    made = graph.call_function(aten.mm.default, (weight, weight))
    for node in (weight, tangent, made):
        node.meta["val"] = torch.empty(4, 4)
    mark = graph.call_function(WISH, ({"weight": weight, "made": made}[value], "keep"))
    mark.meta["stack_trace"] = f'  File "{__file__}", line 7, in forward\n  File "wishes.py", line 36, in keep\n'
    graph.output((made, tangent))
    context = PassContext(where="joint")
    HonourWishes().run(graph, context)
    assert context.said == ["0 values kept, 0 computed again, 1 marks without effect"]
    assert not calls(graph, WISH)
    assert "recompute" not in made.meta


def test_the_recipe_prints_what_it_says() -> None:
    page = (
        (Path(__file__).parent.parent / "docs" / "recipes.md").read_text().partition("## Keep or recompute by hand")[2]
    ).partition("\n## ")[0]
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    (text,) = re.findall(r"^```text\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    torch._dynamo.reset()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        without_inductor(exec)(compile(code, "recipe.py", "exec"), {"__name__": "recipe"})
    assert printed.getvalue() == text
