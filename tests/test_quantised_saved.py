"""Saved values in few bits: the gradients of rounding by hand, the planner's choice, less memory."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.fx as fx
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import dspass
from dspass.config import Config
from dspass.passes.base import Holding
from dspass.passes.devices import DEVICES
from dspass.passes.kernels import Stretch
from dspass.pipeline import build
from dspass.planner.liveness import Absence
from dspass.planner.record import BudgetError
from dspass.planner.timing import times_of
from dspass.planner.values import values_of
from examples.gpt import GPT, GPTConfig
from tests.training import without_inductor

SMALL: dict[str, Any] = {"name": "quantise_saved", "min_bytes": 1000}


def _options(format: str | None, budget: int | None = None, block: int = 64) -> dict[str, Any]:
    own: dict[str, Any] = {"passes": ["...", SMALL, "offload_saved", "onednn_products"]}
    own["quantise"] = {"activations": format, "block": block}
    if budget is not None:
        own["memory_budget"] = budget
    return {"zero_optimization": {"stage": 0}, "dspass": own}


def _mlp() -> tuple[nn.Module, torch.Tensor]:
    model = nn.Sequential(nn.Linear(48, 96), nn.ReLU(), nn.Linear(96, 80), nn.Tanh(), nn.Linear(80, 33))
    return model, torch.randn(37, 48)


def _images() -> tuple[nn.Module, torch.Tensor]:
    """Values whose channels lie next to each other, not in the order of their dims."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3), nn.Tanh(), nn.Conv2d(5, 4, 1))
    return model.to(memory_format=torch.channels_last), torch.randn(4, 3, 12, 12).to(memory_format=torch.channels_last)


def _by_hand(model: nn.Module, x: torch.Tensor, format: str, block: int) -> None:
    """Gradients where what autograd saves is rounded, but for inputs and parameters."""
    given = {t.untyped_storage().data_ptr() for t in (x, *model.parameters())}

    def pack(saved: torch.Tensor) -> torch.Tensor:
        if not saved.is_floating_point() or saved.untyped_storage().data_ptr() in given or saved.nbytes < 1000:
            return saved
        axes = sorted(range(saved.dim()), key=lambda axis: -saved.stride(axis))
        flat = saved.detach().permute(axes)
        codes, scales = torch.ops.dspass.quantise(flat, format, block)
        rounded = torch.ops.dspass.dequantise(codes, scales, flat.shape, format, saved.dtype)
        return rounded.permute([axes.index(axis) for axis in range(len(axes))])

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        loss = model(x).square().sum()
    loss.backward()


@without_inductor
def _gradients(build: Any, format: str | None) -> tuple[float, dict[str, torch.Tensor], dspass.Report]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, x = build()

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model(x).square().sum()

    compiled = torch.compile(Loss(), backend="deepspeed", options=_options(format))
    loss = compiled(x)
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters()}, dspass.explain(compiled)


@pytest.mark.parametrize(
    ("build", "format", "inductor"),
    [
        (_mlp, "int8", False),
        (_mlp, "fp8_e4m3", False),
        (_mlp, "int4", False),
        (_images, "fp8_e4m3", False),
        (_images, "int8", True),
    ],
)
def test_gradients_are_those_of_rounding_by_hand(build: Any, format: str, inductor: bool) -> None:
    loss, found, report = _gradients(build, format, inductor=inductor)
    whole_loss, whole, _ = _gradients(build, None)
    torch.manual_seed(0)
    model, x = build()
    _by_hand(model, x, format, 64)
    assert loss == pytest.approx(whole_loss, rel=1e-6)
    apart = 0.0
    for name, param in model.named_parameters():
        assert param.grad is not None
        torch.testing.assert_close(found[name], param.grad, rtol=1e-5, atol=1e-5 * param.grad.abs().max().item())
        apart = max(apart, ((found[name] - whole[name]).norm() / whole[name].norm()).item())
    assert apart > 1e-4  # something was rounded
    assert {(t.kind, t.format, t.relative_error) for t in report.quantised} == {("saved", format, None)}
    assert len(report.quantised) == 3
    assert all(3 < t.whole_bytes / t.sent_bytes < 8 for t in report.quantised)
    assert not next(p for p in report.passes if p.name == "quantise_saved").keeps_numbers


class Never(nn.Module):
    """Values that must stay whole: a result that is saved too, an integer, a copy of a parameter, a view of an input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64) / 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first = (x.t() @ self.weight.to(torch.bfloat16)).tanh()
        order = first.argsort(dim=1)
        return first, first.gather(1, order).float().sum()


@without_inductor
def _never() -> tuple[int, torch.Tensor, torch.Tensor]:
    found = []
    for format in ("int4", None):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = Never()
        compiled = torch.compile(model, backend="deepspeed", options=_options(format))
        first, loss = compiled(torch.randn(64, 128, dtype=torch.bfloat16))
        (loss + first.float().square().sum()).backward()
        assert model.weight.grad is not None
        found.append((len(dspass.explain(model).quantised), model.weight.grad))
    return found[0][0], found[0][1], found[1][1]


def test_what_must_stay_whole_does() -> None:
    quantised, found, whole = _never()
    assert not quantised
    assert torch.equal(found, whole)


@without_inductor
def test_what_lies_between_checkpoints_is_no_wish() -> None:
    """torch tags it as what ``dspass.keep`` marks, which stays whole."""
    for wish, count in ((lambda x: x, 2), (dspass.keep, 1)):
        torch._dynamo.reset()
        one, two, three = (nn.Linear(64, 64) for _ in range(3))

        def loss(x: torch.Tensor, wish: Any = wish, one: Any = one, two: Any = two, three: Any = three) -> torch.Tensor:
            x = checkpoint(lambda x: wish(one(x).tanh()), x, use_reentrant=False)
            x = checkpoint(lambda x: two(x).tanh(), x, use_reentrant=False)
            return checkpoint(lambda x: three(x).tanh(), x, use_reentrant=False).square().sum()

        model = nn.ModuleList([one, two, three])
        model.forward = loss
        compiled = torch.compile(model, backend="deepspeed", options=_options("int8"))
        compiled(torch.randn(32, 64)).backward()
        assert len(dspass.explain(compiled).quantised) == count


def test_off_unless_asked_for() -> None:
    _, _, report = _gradients(_mlp, None)
    assert not report.quantised
    assert {p.summary for p in report.passes if p.name == "quantise_saved"} == {"switched off"}


def _train(format: str | None, budget: int | None) -> tuple[list[float], dspass.Report | None]:
    """A model whose activations are most of its memory; without a budget by plain torch."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    layers = [layer for _ in range(5) for layer in (nn.Linear(128, 128), nn.Tanh())]
    model = nn.Sequential(nn.Linear(4, 128), *layers, nn.Linear(128, 1))
    options = _options(format, budget, 256)
    compiled = torch.compile(model, backend="deepspeed", options=options) if budget else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    draw = torch.Generator().manual_seed(1)
    x, losses = torch.randn(4096, 4, generator=draw), []

    def step() -> None:
        loss = compiled(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    for _ in range(2):
        step()
    if not budget:
        step()
        return losses, None
    with dspass.measure(model):
        step()
    return losses, dspass.explain(model)


@functools.cache
def _smallest(format: str | None) -> int:
    with pytest.raises(Exception) as refused:
        _train(format, 1000)
    inner = getattr(refused.value, "inner_exception", refused.value)
    assert isinstance(inner, BudgetError)
    return inner.smallest


def test_a_budget_that_nothing_else_reaches_holds_in_few_bits() -> None:
    budget = (_smallest(None) + _smallest("int8")) // 2
    assert budget < 0.99 * _smallest(None)
    wanted, _ = _train(None, None)
    losses, report = _train("int8", budget)
    assert report is not None
    (plan,) = report.plans
    assert "by quantise_saved" in plan.summary
    assert {t.held_by for t in plan.classes if t.held_bytes} == {"quantise_saved"}
    assert report.memory.peak_bytes <= budget * 1.01
    assert report.memory.peak_bytes == pytest.approx(plan.peak_bytes, rel=0.05)
    assert losses[0] == pytest.approx(wanted[0], rel=1e-5)
    assert losses == pytest.approx(wanted, rel=1e-3)


def test_a_prediction_for_a_gpu_weighs_few_bits_against_the_host() -> None:
    """Copies that compute hides cost nothing; where the link is full, few bits are faster than waiting for it."""
    with torch.device("meta"):
        model = GPT(GPTConfig(context=512, layers=2, heads=8, width=1024))
    tokens = torch.zeros(8, 512, dtype=torch.long)

    def plan(format: str | None, budget: int) -> dspass.Report:
        config = {"dspass": {"quantise": {"activations": format}}}
        return dspass.explain(model, tokens, tokens, config=config, device="h100", memory_budget=budget)

    with pytest.raises(BudgetError) as refused:
        plan(None, 1000)
    budget = int(
        1.6 * refused.value.smallest
    )  # near the smallest nearly everything is computed again, and nothing copied
    alone, helped = (plan(format, budget) for format in (None, "int8"))
    assert not alone.quantised
    assert "offload_saved" in alone.plans[0].summary
    assert helped.plans[0].peak_bytes <= budget
    assert "quantise_saved" in helped.plans[0].summary
    assert {t.kind for t in helped.quantised} == {"saved"}
    assert all(t.sent_bytes < 0.3 * t.whole_bytes for t in helped.quantised)
    assert alone.step_seconds is not None
    assert helped.step_seconds is not None
    assert helped.step_seconds < alone.step_seconds


def test_what_is_not_copied_waits_for_no_link() -> None:
    """The other copy takes 50 s each way: what stands behind it in the queue would be there as long."""
    graph = fx.Graph()

    def product(*of: fx.Node) -> fx.Node:
        node = graph.call_function(torch.ops.aten.mm.default, of) if of else graph.placeholder("x")
        node.meta["val"] = torch.empty(64, 64, device="meta")
        return node

    x = product()
    a = product(x, x)
    b = product(a, a)
    c = product(b, b)
    d = product(c, b)  # the backward
    e = product(d, a)
    halves = Stretch([a, b, c], {x}, {a, b, c}), Stretch([d, e], {x, a, b, c}, {e})
    held = {a: Holding(bytes=0, host_bytes=16384, link_seconds=100.0), b: Holding(bytes=10)}
    times = times_of(halves, held, DEVICES["h100"])
    assert times.absent[b] == Absence(10, 2, 3)
    assert times.absent[a].last == 3
    assert times.exposed > 99


@pytest.mark.parametrize("format", [None, "int8"])
def test_places_are_not_found_again_among_rounded_numbers(format: str | None) -> None:
    def places(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        h = x.tanh()
        return h, h.argmax(-1), (h > 0).sum(-1), h.topk(2).indices, torch.arange(9) + 1

    graph = make_fx(places, tracing_mode="fake")(torch.empty(512, 256)).graph
    nodes = [n for n in graph.nodes if n.op == "call_function"]
    passes = build(Config.load(_options(format)))
    found, _ = values_of(graph, nodes, 5, frozenset(), DEVICES["h100"], levers=passes)
    kept = {n.name for n, value in zip(nodes, found, strict=True) if not value.recomputable}
    assert kept == (set() if format is None else {"argmax", "sum_1", "getitem_1"})
    assert all(value.savable for value in found if not value.recomputable)
