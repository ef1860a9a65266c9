"""What an optimiser's step is taken to hold is what torch's holds, and both predictions of a step count it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

import dspass
from dspass.measure import _allocations
from dspass.optimizers import _planned
from dspass.runtime.host_states import HostStates
from dspass.runtime.stepping import OPTIMIZERS, Optimizer, moments
from tests.test_explain import gpt

REAL: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "momentum": lambda params, foreach: torch.optim.SGD(params, momentum=0.9, foreach=foreach),
    "adamw-fused": lambda params, foreach: torch.optim.AdamW(params, fused=True),
    "dspass-adamw": lambda params, foreach: dspass.AdamW(params),
    "dspass-adamw-8bit": lambda params, foreach: dspass.AdamW(params, state_bits=8),
}


def _measured(step: Callable[[], Any]) -> int:
    """The most bytes of torch's allocator that ``step`` adds to what is there."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    live = most = 0
    for _, count in _allocations(profiler):
        live += count
        most = max(most, live)
    return most


def _with_gradients(params: list[nn.Parameter]) -> None:
    for param in params:
        param.grad = torch.ones_like(param)


@pytest.mark.parametrize("rows", [[100, 100, 100], [100, 10, 10], [10, 100, 60, 10]])
@pytest.mark.parametrize("is_away", [False, True])
@pytest.mark.parametrize(
    ("name", "together"),
    # Our own has a kernel for all on a GPU, and on a CPU no other way than one after another.
    [(name, together) for name in REAL for together in (False, True) if not (together and name.startswith("dspass"))],
)
def test_what_a_step_holds(name: str, together: bool, is_away: bool, rows: list[int]) -> None:
    params = [nn.Parameter(torch.randn(n, 256)) for n in rows]
    optimizer = REAL[name](params, foreach=together)
    away = HostStates(part_elements=120 * 256)
    if is_away:
        away.add(params[1:])

    def step() -> None:
        away.step(optimizer)
        away.end()

    for _ in range(2):  # the first makes the states, and what waits on the host comes at the next
        _with_gradients(params)
        step()
    _with_gradients(params)
    expected = max(m.bytes for m in moments(params, away, OPTIMIZERS[name], together=together, overlaps=False))
    assert abs(_measured(step) - expected) <= 4096  # scalars


OWN: list[tuple[type, dict[str, Any]]] = [
    (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True}),
    (torch.optim.Adam, {"weight_decay": 0.1, "amsgrad": True}),
    (torch.optim.AdamW, {"maximize": True}),
    *(
        (kind, {"weight_decay": w})
        for kind in (torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax)
        for w in (0, 0.1)
    ),
    *(
        (kind, {"weight_decay": w})
        for kind in (torch.optim.Adagrad, torch.optim.Adadelta, torch.optim.ASGD)
        for w in (0, 0.1)
    ),
    (torch.optim.RMSprop, {"centered": True, "momentum": 0.9}),
    (torch.optim.RMSprop, {"weight_decay": 0.1}),
]


@pytest.mark.parametrize("foreach", [None, True])
@pytest.mark.parametrize(
    ("kind", "settings"), OWN, ids=lambda v: v.__name__ if isinstance(v, type) else "-".join(v) or "plain"
)
def test_torch_s_optimisers_are_known_by_their_settings(
    kind: type, settings: dict[str, Any], foreach: bool | None
) -> None:
    params = [nn.Parameter(torch.randn(100, 256)) for _ in range(3)]
    optimizer = kind(params, foreach=foreach, **settings)
    known = _planned(optimizer, optimizer.param_groups[0])
    for _ in range(2):
        _with_gradients(params)
        optimizer.step()
    _with_gradients(params)
    kept = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor) and t.dim()]
    assert sum(t.nbytes for t in kept) == sum(map(known.state_bytes, params))
    expected = max(m.bytes for m in moments(params, HostStates(), known, together=False, overlaps=False))
    # Copies of gradients that are left from one parameter to the next are not all, and a mask has bytes in place of floats.
    assert -4096 <= expected - _measured(optimizer.step) <= params[0].nbytes


def test_an_optimiser_that_is_not_known_is_said(caplog: pytest.LogCaptureFixture) -> None:
    class Own(torch.optim.Optimizer):
        pass

    with caplog.at_level("WARNING", logger="dspass"):
        for _ in range(2):
            own = Own([nn.Parameter(torch.zeros(4))], {})
            assert _planned(own, own.param_groups[0]) is OPTIMIZERS["adamw"]
    assert [r.getMessage() for r in caplog.records] == [
        "What Own holds while it steps, and in its first step makes, is not known: under dspass.memory_budget it is counted as "
        "torch.optim.AdamW."
    ]


def test_on_a_gpu_torch_steps_sharded_parameters_together_too() -> None:
    """What :func:`dspass.runtime.stepping.moments` is told on a GPU."""
    from torch.optim.optimizer import _foreach_supported_types

    assert {torch.Tensor, nn.Parameter, DTensor} <= set(_foreach_supported_types)
    assert "cuda" in torch.utils._foreach_utils._get_foreach_kernels_supported_devices()


def test_neighbouring_parts_are_on_the_device_where_copies_overlap() -> None:
    params = [nn.Parameter(torch.empty(n, 1024)) for n in (1, 2, 3, 4)]
    away = HostStates(part_elements=1024)
    away.add(params)
    found = list(moments(params, away, Optimizer(2, 2, 1), together=True, overlaps=True))
    assert [m.states // 8192 for m in found] == [3, 6, 9, 7]
    assert [m.temporaries // 4096 for m in found] == [1, 2, 3, 4]


class Layers(nn.Module):
    """Little beside parameters, gradients, states and what the optimiser makes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(4)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).square().mean()


SIZE = 4 * 512 * 512 * 4


@pytest.mark.parametrize(("device", "temporaries"), [("cpu", 3 * SIZE // 4), ("h100", SIZE)])
@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (1, 2), (3, 2)])
def test_a_predicted_step_and_its_plan_hold_what_the_optimiser_holds(
    device: str, temporaries: int, stage: int, ranks: int
) -> None:
    report = dspass.explain(
        Layers(),
        torch.zeros(1, 512),
        config={"zero_optimization": {"stage": stage, "offload_optimizer": {"device": "none"}}},
        world_size=ranks,
        device=device,
        memory_budget="1GB",
    )
    stepping = [p.bytes for p in report.memory.timeline if p.phase == "optimizer"]
    # The batch is there too.
    assert max(b["temporary"] for b in stepping) == pytest.approx(temporaries // ranks, abs=4096)
    if stage == 0:  # elsewhere gathered copies make the peak
        assert report.memory.peak is not None
        assert report.memory.peak.phase == "optimizer"
        assert report.plans[0].peak_bytes == pytest.approx(report.memory.peak_bytes, rel=1e-3)


def test_states_on_the_host_make_the_optimisers_temporaries_smaller() -> None:
    """Where it steps all together it steps part by part then: the planner counts on that."""
    model, args, _ = gpt()
    config = {"zero_optimization": {"stage": 0}}

    def explained(budget: int) -> dspass.Report:
        return dspass.explain(model, *args, config=config, device="h100", memory_budget=budget)

    size = sum(p.nbytes for p in model.parameters())
    whole = explained(8 * 10**10)
    assert whole.memory.peak_bytes >= 5 * size  # parameters, gradients, states, and temporaries of all
    helped = explained(round(4.5 * size))
    assert "of optimiser states on the host" in helped.plans[0].summary
    assert helped.memory.peak_bytes <= 4.5 * size
