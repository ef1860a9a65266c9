"""Pipelines where something is unusual or goes wrong: models with little to train, calls that are not a training step."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from hypothesis import Phase, assume, given, reject, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.utils.checkpoint import checkpoint

import dspass
from dspass.engines import engine_of
from dspass.pipeline_outputs import PipelineUseError
from dspass.planner.stages import CutError
from dspass.runtime import compat
from tests.ranks import run
from tests.training import adamw, sgd, whole, without_inductor, zero

Batch = tuple[torch.Tensor, ...]


def pipeline(stages: int = 2, micro_batches: int = 4, schedule: str = "1f1b", **section: Any) -> dict[str, Any]:
    return {"stages": stages, "schedule": schedule, "micro_batches": micro_batches, **section}


class Net(nn.Module):
    """Mixes tokens by a mask and turns them by a table, both buffers; dropout and checkpointed regions where asked for."""

    def __init__(self, depth: int = 4, width: int = 16, dropout: float = 0.0, checkpoints: bool = False) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(31, width), nn.LayerNorm(width), nn.Linear(width, 31)
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(depth)])
        self.dropout, self.checkpoints = dropout, checkpoints
        self.register_buffer("mask", torch.tril(torch.ones(16, 16)), persistent=False)
        self.register_buffer("turns", torch.linspace(-1, 1, 16 * width).view(16, width))
        self.mask: torch.Tensor
        self.turns: torch.Tensor

    def layer(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        n = x.shape[1]
        mix = (self.mask[:n, :n] / self.mask[:n, :n].sum(-1, keepdim=True)).to(x.dtype)
        return x + F.dropout(torch.tanh(layer(mix @ x) * self.turns[:n].to(x.dtype)), self.dropout, self.training)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        x = self.embed(ids)
        for i, layer in enumerate(self.layers):
            x = self.before(i, x)
            x = checkpoint(self.layer, layer, x, use_reentrant=False) if self.checkpoints else self.layer(layer, x)
        logits = self.head(self.norm(x))
        if labels is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten()), logits

    def before(self, i: int, x: torch.Tensor) -> torch.Tensor:
        return x


class Marked(Net):
    def before(self, i: int, x: torch.Tensor) -> torch.Tensor:
        return dspass.stage_boundary(x) if i == 1 else x


LOG = logging.getLogger(__name__)


class Logs(Net):
    """Dynamo cannot capture what logs."""

    def before(self, i: int, x: torch.Tensor) -> torch.Tensor:
        if i == 1:
            LOG.warning("layer %s", i)
        return x


class Floats(nn.Module):
    """Its inputs are fp32, whatever it computes in."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])

    def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return (x.float() * weight).square().mean()


def tokens(seed: int, rows: int = 8, length: int = 8) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 31, (rows, length), generator=draw), torch.randint(0, 31, (rows, length), generator=draw)


def floats(seed: int) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(8, 8, generator=draw), torch.randn(8, 8, generator=draw)


def loss_of(answer: Any) -> torch.Tensor:
    return answer if isinstance(answer, torch.Tensor) else answer[0]


def near(ours: torch.Tensor, theirs: torch.Tensor, within: float = 1e-5) -> None:
    ours, theirs = ours.detach().float(), theirs.detach().float()
    assert (ours - theirs).norm() <= within * theirs.norm().clamp(min=1e-6), (ours, theirs)


class Pair:
    """A model in stages beside one that is whole, of the same values; both are called alike."""

    def __init__(
        self, build: Callable[[], nn.Module], section: dict[str, Any], how: str = "shard", **more: Any
    ) -> None:
        config = zero(0, pipeline=section, **more)
        torch.manual_seed(0)
        self.reference = build()
        torch.manual_seed(0)
        self.model = build()
        if how == "shard":
            dspass.shard(self.model, config)
        self.compiled: Any = torch.compile(self.model, backend="deepspeed", options=config)
        self.both: tuple[Any, Any] = (self.compiled, self.reference)

    def backward(self, of: Callable[[Any], torch.Tensor], within: float = 1e-5) -> None:
        """Losses that ``of`` computes with a model, and gradients, are equal."""
        ours, theirs = map(of, self.both)
        near(ours, theirs, within)
        ours.backward()
        theirs.backward()
        self.gradients(within)
        for model in self.both:
            model.zero_grad()

    def gradients(self, within: float = 1e-5) -> None:
        for (name, ours), theirs in zip(self.model.named_parameters(), self.reference.parameters(), strict=True):
            if ours.is_meta:
                assert ours.grad is None, name
            elif theirs.grad is not None:
                assert ours.grad is not None, name
                near(whole(ours.grad), theirs.grad, 10 * within)
            else:
                assert ours.grad is None, name

    def train(self, batches: Callable[[int], Batch] = tokens, steps: int = 3, within: float = 1e-5) -> None:
        optimizers = [sgd(model.parameters()) for model in self.both]
        for i in range(steps):
            losses = [loss_of(model(*batches(i))) for model in self.both]
            near(losses[0], losses[1], within)
            for loss in losses:
                loss.backward()
            self.gradients(within)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

    @property
    def here(self) -> set[str]:
        return {name for name, param in self.model.named_parameters() if not param.is_meta}


# -- models --------------------------------------------------------------------------------------------------------


@without_inductor
def _models() -> None:
    Pair(lambda: Net(checkpoints=True, depth=3), pipeline(schedule="zbh1")).train()
    marked = Pair(Marked, pipeline())
    marked.train()
    named = Pair(Net, pipeline(boundaries=["layers.3"]))
    named.train()
    if dist.get_rank() == 0:
        assert marked.here == {"embed.weight", "layers.0.weight", "layers.0.bias"}
    else:
        assert {name.split(".")[0] for name in named.here} == {"layers", "norm", "head"}
        assert "layers.2.weight" not in named.here


def test_regions_and_boundaries() -> None:
    run(2, _models)


@without_inductor
def _halves() -> None:
    Pair(Net, pipeline(), bf16={"enabled": True}).train(within=3e-2)
    Pair(Floats, pipeline(), bf16={"enabled": True}).train(floats, within=3e-2)


def test_stages_in_few_bits() -> None:
    run(2, _halves)


@without_inductor
def _frozen(trains: str, schedule: str) -> None:
    def build() -> nn.Module:
        model = Net()
        for name, param in model.named_parameters():
            param.requires_grad_(trains in name)
        return model

    pair = Pair(build, pipeline(schedule=schedule, boundaries=["layers.2"]))
    pair.train()
    for model in pair.both:  # an optimiser of what is trained, which on one rank is nothing
        of = [param for param in model.parameters() if param.requires_grad]
        assert of or model is pair.compiled


@pytest.mark.parametrize("schedule", ["1f1b", "zbh1"])
def test_a_stage_may_train_nothing(schedule: str) -> None:
    for trains in ("head", "layers.0"):
        run(2, _frozen, trains, schedule)


@without_inductor
def _dropout(schedule: str) -> None:
    pair = Pair(lambda: Net(dropout=0.5), pipeline(schedule=schedule))
    ran = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        loss = loss_of(pair.compiled(*tokens(0)))
        loss.backward()
        ran.append((loss.item(), [whole(p.grad).clone() for p in pair.model.parameters() if p.grad is not None]))
        pair.model.zero_grad()
    assert ran[0][0] == ran[1][0] != ran[2][0]
    for first, second in zip(ran[0][1], ran[1][1], strict=True):
        assert torch.equal(first, second)
    for model in pair.both:
        model.eval()
    with torch.no_grad():
        near(loss_of(pair.compiled(*tokens(1))), loss_of(pair.reference(*tokens(1))))
    loss, logits = pair.compiled(*tokens(2))  # gradients are enabled, and not computed
    expected = pair.reference(*tokens(2))
    near(loss, expected[0])
    near(logits, expected[1])
    with pytest.raises(PipelineUseError, match=r"Call train\(\)"):
        loss.backward()
    pair.model.train()
    torch.manual_seed(2)
    assert loss_of(pair.compiled(*tokens(0))).item() == ran[2][0]


@pytest.mark.parametrize("schedule", ["1f1b", "zbh1"])
def test_dropout_comes_from_the_seed(schedule: str) -> None:
    run(2, _dropout, schedule)


@without_inductor
def _from_meta() -> None:
    torch.manual_seed(0)
    reference = Net()
    with torch.device("meta"):
        model = Net()
    values, asked = {**reference.state_dict(), "mask": reference.mask}, []

    def fill(name: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        asked.append(name)
        return values[name]

    config = zero(0, pipeline=pipeline())
    dspass.shard(model, config, fill=fill)
    pair = Pair.__new__(Pair)
    pair.model, pair.reference = model, reference
    pair.compiled = torch.compile(model, backend="deepspeed", options=config)
    pair.both = (pair.compiled, reference)
    pair.train()
    assert len(asked) == len(set(asked))
    assert set(asked) - {"mask", "turns"} == pair.here
    assert 0 < len(pair.here) < len(list(model.parameters()))


def test_from_the_meta_device_each_rank_asks_for_its_own() -> None:
    run(2, _from_meta)


@without_inductor
def _one_line() -> None:
    pair = Pair(Net, pipeline(), how="compile")
    optimizers = [adamw(model.parameters()) for model in pair.both]  # before stages are known
    for i in range(3):
        for model, optimizer in zip(pair.both, optimizers, strict=True):
            _steps(model, optimizer, i, 1)
    values = dspass.full_state_dict(pair.model)
    for name, expected in pair.reference.state_dict().items():
        near(values[name], expected)
    assert len([s for s in optimizers[0].state.values() if s]) == len(pair.here)
    logs = Pair(Logs, pipeline(), how="compile")
    with pytest.raises(PipelineUseError, match=r"capture.*dspass\.shard\(model, config\)"):
        logs.compiled(*tokens(0))
    Pair(Logs, pipeline()).train()


def test_the_optimiser_may_be_there_first() -> None:
    run(2, _one_line)


# -- graphs --------------------------------------------------------------------------------------------------------


class Graph(nn.Module):
    """Operators by kind and the values that they read; ``shared`` has the layer that each linear one uses."""

    def __init__(self, operators: list[tuple[str, int, int]]) -> None:
        super().__init__()
        self.operators = operators
        self.layers = nn.ModuleDict(
            {str(i): nn.Linear(6, 6) for i, (kind, *_) in enumerate(operators) if kind == "linear"}
        )

    @property
    def called(self) -> list[str]:
        """The layers by their first call."""
        layers = list(self.layers)
        of = {"linear": lambda i, b: str(i), "again": lambda i, b: layers[b % len(layers)]}
        calls = (of[kind](i, b) for i, (kind, _, b) in enumerate(self.operators) if kind in of)
        return [f"layers.{name}" for name in dict.fromkeys(calls)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values, unread = [x], {0}
        for i, (kind, a, b) in enumerate(self.operators):
            first, second = values[a % len(values)], values[b % len(values)]
            unread -= {a % len(values)} if kind in ("linear", "tanh", "again") else {a % len(values), b % len(values)}
            if kind == "linear":
                made = self.layers[str(i)](first)
            elif kind == "again":
                made = self.layers[list(self.layers)[b % len(self.layers)]](first)
            elif kind == "tanh":
                made = torch.tanh(first)
            elif kind == "add":
                made = first + 0.5 * second
            elif kind == "turned":
                made = (first.t().contiguous() * 0.5).t() + second
            else:
                made = torch.sigmoid(first) * second
            unread.add(len(values))
            values.append(made)
        return torch.stack([values[i].square().mean() for i in sorted(unread)]).sum()


KINDS = st.sampled_from(["linear", "linear", "linear", "again", "tanh", "add", "mul", "turned"])
OPERATORS = st.lists(st.tuples(KINDS, st.integers(0, 20), st.integers(0, 20)), min_size=4, max_size=12)
#: Schedules of one stage a rank, and of several.
ONE, SEVERAL = ["1f1b", "zbh1"], ["interleaved1f1b", "interleavedzerobubble"]
#: What is said of the one reason for which a layer may begin no stage: a value lies in memory as none is received, and whoever
#: reads it stays with it, and what lies between them.
NO_PLACE = re.compile("is no place for a cut: .*(than a tensor that is received|joined by others)")


@without_inductor
def _any_graph(examples: int) -> tuple[int, int]:
    """Train a step of ``examples`` random graphs, each cut at random layers; answers how many ran, and how many were drawn."""
    ranks, drawn, ran = dist.get_world_size(), 0, 0

    @settings(max_examples=examples, derandomize=True, database=None, deadline=None, phases=[Phase.generate])
    @given(OPERATORS, st.sampled_from([2, 3, 4] if ranks == 1 else [1, 2]), st.integers(0, 1), st.randoms())
    def check(operators: list[tuple[str, int, int]], virtual: int, which: int, draw: Any) -> None:
        nonlocal drawn, ran
        drawn += 1
        operators = [("linear", 0, 0), *operators]
        stages, names = ranks * virtual, Graph(operators).called
        assume(len(names) >= stages)
        boundaries = sorted(draw.sample(names[1:], stages - 1), key=names.index)
        section = pipeline(
            ranks, 4, (ONE if virtual == 1 else SEVERAL)[which], virtual_stages=virtual, boundaries=boundaries
        )
        pair = Pair(lambda: Graph(operators), section)
        batch = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
        try:
            pair.backward(lambda model: model(batch))
        except CutError as error:  # on all ranks alike
            if not (NO_PLACE.search(str(error)) and any(kind == "turned" for kind, *_ in operators)):
                raise
            reject()
        finally:
            torch._dynamo.reset()
        executor = pair.model.__dict__["forward"].last_trained.executor
        assert executor.schedule.stages == stages
        assert len(executor.stages) == virtual
        for s, stage in executor.stages.items():  # each begins where it was to begin
            begins = ["layers.0", *boundaries][s]
            assert any(key.endswith(f"/{begins}.weight") for key in stage.keys)
        ran += 1

    check()
    return ran, drawn


@pytest.mark.parametrize(("ranks", "examples"), [(1, 12), (2, 8)])
def test_any_graph_computes_the_same_in_stages(ranks: int, examples: int) -> None:
    """Of the layers of any graph each may begin a stage, but for one before which a value lies as none is received."""
    for ran, drawn in run(ranks, _any_graph, examples):
        assert ran == examples
        assert 2 * ran >= drawn


# -- calls ---------------------------------------------------------------------------------------------------------


def _scaled(model: Any) -> torch.Tensor:
    loss = loss_of(model(*tokens(0)))
    return loss * 2 + loss.detach()


def _added(model: Any) -> torch.Tensor:
    return loss_of(model(*tokens(0))) + 3 * loss_of(model(*tokens(1)))


def _curved(model: Any) -> torch.Tensor:
    return torch.log(loss_of(model(*tokens(0)))) + loss_of(model(*tokens(2))) ** 2


@without_inductor
def _expressions() -> None:
    pair = Pair(Net, pipeline())
    for of in (_scaled, _added, _curved):
        pair.backward(of)
    pair.compiled(*tokens(0))  # and nothing of it
    pair.backward(_scaled)
    optimizers = [sgd(model.parameters()) for model in pair.both]
    for i in range(3):  # gradients that are zeros, and not None
        for model in pair.both:
            loss_of(model(*tokens(i))).backward()
            loss_of(model(*tokens(i + 1))).backward()
        pair.gradients()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    first, second = (loss_of(pair.compiled(*tokens(i))) for i in (0, 1))
    second.backward()
    first.backward()
    for i in (0, 1):
        loss_of(pair.reference(*tokens(i))).backward()
    pair.gradients()


def test_losses_in_expressions() -> None:
    run(2, _expressions)


@without_inductor
def _symbols() -> list[str]:
    pair = Pair(Net, pipeline())
    pair.backward(_scaled)
    engine = engine_of(pair.model)
    assert engine is not None
    graphs = [graph for compilation in engine.compilations for graph in compilation.graphs.values()]
    assert graphs
    sizes = [(n.name, size) for gm in graphs for n in gm.graph.nodes for size in compat.sizes_of(n.meta.get("val"))]
    return [f"{name}: {size}" for name, size in sizes if isinstance(size, torch.SymInt)]


def test_stages_are_compiled_for_the_sizes_that_they_get() -> None:
    assert run(2, _symbols) == [[], []], "symbols cost kernels their constants, and planners their bytes"


def _loss(model: Any, **sizes: int) -> torch.Tensor:
    return loss_of(model(*tokens(4, **sizes)))


@without_inductor
def _sizes_and_modes() -> None:
    pair = Pair(Net, pipeline())
    with torch.no_grad():  # before anything is trained, and without a loss
        near(pair.compiled(tokens(0)[0]), pair.reference(tokens(0)[0]))
    for length in (8, 5, 8):
        pair.backward(functools.partial(_loss, length=length))
    for rows in (12, 8):
        pair.backward(functools.partial(_loss, rows=rows))
    for mode, sizes in ((torch.no_grad, (8, 6)), (torch.inference_mode, (5, 8))):
        for rows in sizes:
            for model in pair.both:
                model.eval()
            with mode():
                ours, theirs = (model(*tokens(1, rows)) for model in pair.both)
            near(ours[0], theirs[0])
            near(ours[1], theirs[1])
            for model in pair.both:
                model.train()
            pair.backward(lambda model: loss_of(model(*tokens(0))))
    with torch.inference_mode():  # a batch that is made in it
        ids, labels = (part.clone() for part in tokens(3))
        near(*(loss_of(model(ids, labels)) for model in pair.both))


def test_sizes_and_modes() -> None:
    run(2, _sizes_and_modes)


@without_inductor
def _has_outputs(schedule: str, outputs: str, owner: int) -> None:
    pair = Pair(Net, pipeline(schedule=schedule, outputs=outputs))
    with torch.no_grad():
        loss, logits = pair.compiled(*tokens(0))
        expected = pair.reference(*tokens(0))
    near(loss, expected[0])
    assert logits.shape == expected[1].shape
    if outputs == "all" or dist.get_rank() == owner:
        near(logits, expected[1])
    else:
        with pytest.raises(PipelineUseError, match=r"only the last stage answers outputs, as pipeline\.outputs says"):
            logits.sum()


@pytest.mark.parametrize(("schedule", "outputs", "owner"), [("1f1b", "last", 1), ("zbv", "last", 0), ("zbv", "all", 0)])
def test_the_last_stage_has_outputs(schedule: str, outputs: str, owner: int) -> None:
    """In a V it lies on the first rank."""
    run(2, _has_outputs, schedule, outputs, owner)


@without_inductor
def _grad_scaler() -> None:
    pair = Pair(Net, pipeline())
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**10) for _ in pair.both]
    optimizers = [sgd(model.parameters()) for model in pair.both]
    for i in range(4):
        for model, scaler, optimizer in zip(pair.both, scalers, optimizers, strict=True):
            loss = loss_of(model(*tokens(i))) * (torch.inf if i == 2 else 1)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert scalers[0].get_scale() == scalers[1].get_scale() == 2.0 ** (10 if i < 2 else 9)
    values = dspass.full_state_dict(pair.model)
    for name, expected in pair.reference.state_dict().items():
        near(values[name], expected)


def test_a_grad_scaler_skips_a_step_on_all_stages() -> None:
    run(2, _grad_scaler)


@without_inductor
def _autocast() -> None:
    pair = Pair(Net, pipeline(schedule="zbh1"))

    def of(model: Any) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(model(*tokens(0)))

    pair.backward(of, within=1e-2)
    pair.backward(lambda model: loss_of(model(*tokens(0))))


def test_autocast_around_the_call() -> None:
    run(2, _autocast)


# -- states --------------------------------------------------------------------------------------------------------


def _steps(model: Any, optimizer: torch.optim.Optimizer, first: int, count: int) -> None:
    for i in range(first, first + count):
        loss_of(model(*tokens(i))).backward()
        optimizer.step()
        optimizer.zero_grad()


def _states(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}


@without_inductor
def _goes_on(folder: str) -> None:
    saved = Pair(Net, pipeline(2))
    optimizers = [adamw(model.parameters()) for model in saved.both]
    for model, optimizer in zip(saved.both, optimizers, strict=True):
        _steps(model, optimizer, 0, 3)
    dcp.save(_states(saved.model, optimizers[0]), checkpoint_id=folder)
    _steps(saved.reference, optimizers[1], 3, 2)
    for stages, is_called in ((1, False), (4, True)):
        pair = Pair(Net, pipeline(stages))
        optimizer = adamw(pair.model.parameters())
        if is_called:
            _steps(pair.compiled, optimizer, 9, 1)
        state = _states(pair.model, optimizer)
        dcp.load(state, checkpoint_id=folder)
        set_model_state_dict(pair.model, state["model"])
        set_optimizer_state_dict(pair.model, optimizer, state["optimizer"])
        _steps(pair.compiled, optimizer, 3, 2)
        values = dspass.full_state_dict(pair.model)
        for name, expected in saved.reference.state_dict().items():
            near(values[name], expected)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_other_numbers_of_stages_go_on(tmp_path: Path) -> None:
    run(4, _goes_on, str(tmp_path))
