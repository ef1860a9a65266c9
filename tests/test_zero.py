"""The numbers: N ranks train like one process that runs the N batches one after another and averages the gradients."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

import dspass
from dspass.engines import engine_of
from tests.ranks import run

SMALL = {"stage3_param_persistence_threshold": 20}


class Mlp(nn.Module):
    """Odd sizes: rows that no number of ranks divides, fewer rows than ranks, and a 0-dim parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(10, 37), nn.Linear(37, 30), nn.Linear(30, 3)
        self.norm, self.scale = nn.LayerNorm(37), nn.Parameter(torch.tensor(1.5))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = self.norm(F.gelu(self.first(x))) * self.scale
        return F.cross_entropy(self.head(torch.tanh(self.second(h))), y)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(20, 16), nn.Linear(16, 16), nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = self.mix(self.embed((x[:, 0].abs() * 3).long().clamp(max=19)))
        return F.cross_entropy(self.head(h), y)


class Frozen(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.second.weight.requires_grad_(False)


class Norm(nn.Module):
    """Convolution and batch norm, whose statistics are each rank's own: evaluated with the statistics fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv1d(1, 8, 3), nn.BatchNorm1d(8), nn.Linear(64, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.head(F.relu(self.norm(self.conv(x[:, None]))).flatten(1)), y)


class Broken(Mlp):
    """A graph break in the middle, and a part that runs eagerly and reads its weight there."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = F.gelu(self.first(x))
        torch._dynamo.graph_break()
        h = self.eager(self.norm(h) * self.scale)
        return F.cross_entropy(self.head(torch.tanh(h)), y)

    @torch._dynamo.disable
    def eager(self, h: torch.Tensor) -> torch.Tensor:
        return F.linear(h, self.second.weight, self.second.bias)


class Checkpointed(Mlp):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        from torch.utils.checkpoint import checkpoint

        h = checkpoint(lambda x: self.norm(F.gelu(self.first(x))) * self.scale, x, use_reentrant=False)
        return F.cross_entropy(self.head(torch.tanh(self.second(h))), y)


MODELS: dict[str, type[nn.Module]] = {
    "mlp": Mlp,
    "tied": Tied,
    "frozen": Frozen,
    "norm": Norm,
    "broken": Broken,
    "checkpointed": Checkpointed,
}


def data(steps: int, ranks: int, calls: int = 1, sizes: Callable[[int], int] = lambda step: 8) -> list[list[list[Any]]]:
    """``[step][call][rank]``, the same on every rank."""
    random = torch.Generator().manual_seed(1)
    return [
        [
            [
                (torch.randn(sizes(s), 10, generator=random), torch.randint(0, 3, (sizes(s),), generator=random))
                for _ in range(ranks)
            ]
            for _ in range(calls)
        ]
        for s in range(steps)
    ]


def as_they_are(gm: torch.fx.GraphModule, *, is_backward: bool, is_inference: bool) -> Callable[[list[Any]], Any]:
    """Segments run operator by operator: what passes and runtime do, without Inductor's seconds of compiling."""

    def run_segment(args: list[Any]) -> Any:
        taken = list(args)
        args.clear()
        return gm(*taken)

    return run_segment


def train(
    name: str,
    config: dict[str, Any],
    *,
    inductor: bool = False,
    steps: int = 20,
    calls: int = 1,
    explicit: bool = False,
    early: bool = False,
    no_sync: bool = False,
    sizes: Callable[[int], int] = lambda step: 8,
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train on this rank beside the one-process reference; answers the largest differences and what was sent."""
    if not inductor:
        with mock.patch("dspass.compilation.segment_compiler", return_value=as_they_are):
            return train(
                name, config, inductor=True, steps=steps, calls=calls, explicit=explicit, early=early, no_sync=no_sync,
                sizes=sizes, options=options,
            )  # fmt: skip
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    reference = MODELS[name]()
    model = copy.deepcopy(reference)
    if explicit:
        dspass.shard(model, config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if early else None
    compiled = torch.compile(model, backend="deepspeed", options=config, **(options or {}))
    optimizer = optimizer or torch.optim.SGD(compiled.parameters(), lr=0.1)
    theirs = torch.optim.SGD(reference.parameters(), lr=0.1)
    worst = 0.0
    for batch in data(steps, ranks, calls, sizes):
        for i, call in enumerate(batch):
            if no_sync and i + 1 < calls:
                with dspass.no_sync(compiled):
                    loss = compiled(*call[rank])
                    loss.backward()
            else:
                loss = compiled(*call[rank])
                loss.backward()
            for other, one in enumerate(call):
                expected = reference(*one)
                (expected / ranks).backward()
                if other == rank:
                    worst = max(worst, abs(loss.item() - expected.item()) / abs(expected.item()))
        for p in model.parameters():
            if p.grad is not None and isinstance(p, DTensor):
                assert p.grad.placements == p.placements
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        torch.testing.assert_close(
            _whole(norm), torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0), rtol=1e-4, atol=0
        )
        optimizer.step()
        optimizer.zero_grad()
        theirs.step()
        theirs.zero_grad()
    apart = max(
        (_whole(p.detach()) - q).norm().item() / max(q.norm().item(), 1e-12)
        for p, q in zip(model.parameters(), reference.parameters(), strict=True)
    )
    engine = engine_of(model)
    assert engine is not None
    counts: dict[str, int] = {}
    for (kind, *_), (number, _, _) in engine.traffic.last.items():
        counts[kind] = counts.get(kind, 0) + number
    layouts = {s.name: s.layout for s in engine.specs.values()}
    return {"loss": worst, "params": apart, "counts": counts, "layouts": layouts}


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def close(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["loss"] <= 1e-5
        assert result["params"] <= 1e-5


def zero(stage: int, **more: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **(SMALL if stage == 3 else {})}, **more}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_stages_on_ranks(stage: int, ranks: int) -> None:
    results = run(ranks, train, "mlp", zero(stage), inductor=ranks == 2)
    close(results)
    if stage == 3:
        assert results[0]["layouts"]["first.weight"] == "shard"
        assert results[0]["layouts"]["scale"] == "replicate"


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("name", ["tied", "frozen", "broken", "checkpointed"])
def test_models(name: str, stage: int) -> None:
    close(run(2, train, name, zero(stage), steps=6, inductor=stage == 3))


def test_explicit_shard_and_early_optimizer() -> None:
    close(run(2, train, "mlp", zero(3), explicit=True, steps=6))
    close(run(2, train, "mlp", zero(3), early=True, steps=6))


def _sizes(step: int) -> int:
    return 8 + step % 3


@pytest.mark.parametrize("stage", [0, 3])
def test_dynamic_shapes(stage: int) -> None:
    close(run(2, train, "mlp", zero(stage), steps=8, sizes=_sizes))
    close(run(2, train, "mlp", zero(stage), steps=8, sizes=_sizes, options={"dynamic": True}))


def test_hybrid() -> None:
    close(run(4, train, "mlp", {"zero_optimization": {"stage": 3, "mics_shard_size": 2, **SMALL}}, steps=6))


@pytest.mark.parametrize("calls", [1, 2, 3])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_collectives_of_a_step(stage: int, calls: int) -> None:
    """The table of the four stages, with everything in one bucket of each kind."""
    results = run(
        2,
        train,
        "tied",
        {**zero(stage, gradient_accumulation_steps=calls), "dspass": {"bucket_bytes": "1GB"}},
        steps=4,
        calls=calls,
    )
    close(results)
    counts = results[0]["counts"]
    replicated = any(layout == "replicate" for layout in results[0]["layouts"].values())
    expected = {
        0: {"all-reduce": 1},
        1: {"all-gather": 1, "reduce-scatter": 1},
        2: {"all-gather": 1, "reduce-scatter": calls},
        3: {"all-gather": 2 * calls, "reduce-scatter": calls},
    }[stage]
    if stage == 3 and replicated:
        expected["all-reduce"] = calls  # the bias, which every rank holds whole
    assert counts == expected


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_no_sync(stage: int) -> None:
    close(run(2, train, "mlp", zero(stage), steps=4, calls=3, no_sync=True))


def _precision(kind: str) -> tuple[float, str, str]:
    torch.manual_seed(0)
    model = Mlp()
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, backend="deepspeed", options=zero(3, **{kind: {"enabled": True}}))
    ((x, y), (_, _)) = data(1, 2)[0][0]
    for _ in range(2):
        loss = compiled(x, y)
        loss.backward()
    grad = model.first.weight.grad
    assert isinstance(grad, DTensor)
    return abs(loss.item() - reference(x, y).item()), str(model.first.weight.dtype), str(grad.dtype)


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_half_precision_keeps_shards_and_gradients_in_fp32(kind: str) -> None:
    for apart, param, grad in run(2, _precision, kind):
        assert 0 < apart < 0.03
        assert param == grad == "torch.float32"


def _eager_read() -> str:
    model = Mlp()
    compiled = torch.compile(model, backend="deepspeed", options=zero(3))
    x, y = data(1, 1)[0][0][0]
    compiled(x, y).backward()
    kind = type(model.first.weight).__name__ if dist.get_rank() == 0 else "DTensor"  # one rank alone: no collective
    with torch.no_grad():
        model.first.weight.fill_(0.5)
        before = compiled(x, y)
    assert torch.all(_whole(model.first.weight) == 0.5)
    copied = copy.deepcopy(model)
    torch.compile(copied, backend="deepspeed", options=zero(3))(x, y).backward()
    assert copied.first.weight.grad is not None
    assert copied.first.weight is not model.first.weight
    with pytest.raises(TypeError, match="state_dict"):
        pickle.dumps(model)
    model.eval()
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x, y), before)
    return kind


def test_outside_a_forward_a_parameter_is_a_parameter() -> None:
    assert run(2, _eager_read) == ["DTensor", "DTensor"]


def _fill() -> float:
    torch.manual_seed(0)
    whole = Mlp()
    state = whole.state_dict()
    with torch.device("meta"):
        empty = Mlp()
    dspass.shard(empty, zero(3), fill=state)
    for name, param in empty.named_parameters():
        torch.testing.assert_close(_whole(param), state[name])
    with torch.device("meta"):
        other = Mlp()
    dspass.shard(other, zero(3), fill=lambda name, shape, dtype: state[name])
    x, y = data(1, 1)[0][0][0]
    loss = torch.compile(other, backend="deepspeed", options=zero(3))(x, y)
    with torch.device("meta"):
        third = Mlp()
    with pytest.raises(KeyError, match="scale"):
        dspass.shard(third, zero(3), fill={k: v for k, v in state.items() if k != "scale"})
    return abs(loss.item() - whole(x, y).item())


def test_shard_fills_a_model_from_the_meta_device() -> None:
    assert max(run(2, _fill)) < 1e-5


def _refused(what: str) -> str:
    model: nn.Module = Mlp()
    x, y = data(1, 1)[0][0][0]
    options = zero(3)
    if what == "configuration" and dist.get_rank() == 1:
        options = zero(3, gradient_accumulation_steps=2)
    if what == "parameters" and dist.get_rank() == 1:
        model.second = nn.Linear(37, 30, bias=False)
    if what == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    try:
        torch.compile(model, backend="deepspeed", options=options)(x, y)
    except Exception as error:
        return str(error)
    return "nothing was refused"


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("configuration", "gradient_accumulation_steps"),
        ("parameters", "parameters"),
        ("ddp", "DistributedDataParallel"),
    ],
)
def test_refusals_on_all_ranks(what: str, says: str) -> None:
    for text in run(2, _refused, what):
        assert says in text


def test_a_stage_without_a_process_group_is_refused() -> None:
    x, y = data(1, 1)[0][0][0]
    with pytest.raises(Exception, match="torchrun"):
        torch.compile(Mlp(), backend="deepspeed", options=zero(3))(x, y)


def test_other_torch_versions_are_refused() -> None:
    from dspass.runtime import compat

    with pytest.raises(compat.UnsupportedTorchError, match=r"2\.13"):
        compat.check_torch("2.10.0")
