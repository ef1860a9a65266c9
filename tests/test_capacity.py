"""Experts of a capacity, batched by the model or limited by a key, on ranks and beside plain torch."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.distributed.tensor import DTensor

from dspass.config import Config, ConfigError
from dspass.engines import engine_of
from dspass.passes.batched_experts import Batch, find_batches
from dspass.passes.nodes import calls, gather_start
from dspass.runtime import capacity
from dspass.runtime.params import lookup
from tests import training
from tests.mixtures import VOCABULARY, WIDTH, Grouped, GShard, Model
from tests.ranks import run

ops = torch.ops.dspass
EXPERTS = 8


# -- what is batched experts, and what is none ---------------------------------------------------------------------------


def found_in(model: nn.Module, *inputs: torch.Tensor) -> tuple[list[Batch], list[str]]:
    """In the graph as Dynamo captures it."""
    graphs: list[tuple[fx.Graph, set[fx.Node]]] = []

    def keep(gm: fx.GraphModule, values: list[Any]) -> Callable[..., Any]:
        nodes = zip(gm.graph.find_nodes(op="placeholder"), values, strict=True)
        graphs.append((gm.graph, {n for n, value in nodes if isinstance(value, nn.Parameter)}))
        return gm

    torch.compile(model, backend=keep, fullgraph=True)(*inputs)
    (graph, params), *_ = graphs
    return find_batches(graph, params.__contains__, params.__contains__)


@pytest.mark.parametrize(("form", "constants", "leaving"), [("einsum", 1, 1), ("bmm", 1, 1), ("index", 0, 2)])
def test_layers_of_batched_experts_are_recognised(form: str, constants: int, leaving: int) -> None:
    """Two of them, of two products each, apart although one reads the other's result."""
    batches, said = found_in(nn.Sequential(GShard(EXPERTS, 2, form), GShard(EXPERTS, 1, form)), torch.randn(16, WIDTH))
    assert not said
    assert [len(b.products) for b in batches] == [2, 2]
    for batch in batches:
        assert batch.experts == EXPERTS
        assert len(batch.entering()) == 1
        assert len(batch.constants()) == constants
        assert len(batch.leaving()) == leaving
    assert len({n for b in batches for n in b.weights.values()}) == 4


class Other(nn.Module):
    """Batched products of a parameter, and a way of what they read to a choice."""

    def __init__(self, function: Callable[..., torch.Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList(torch.randn(shape) for shape in shapes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = F.one_hot(x.argmax(-1), x.shape[-1])[:, :4, None].to(x.dtype)  # [tokens, experts, capacity]
        return self.function(torch.einsum("sec,sm->ecm", mask.expand(-1, -1, 5), x), x, *self.weights)


NONE: dict[str, tuple[Other, str]] = {
    "heads": (
        Other(lambda _, x, w: x.view(-1, 4, 3).transpose(0, 1) @ w, (4, 3, 2)),
        "nothing chooses which rows go to which of them",
    ),
    "across rows": (
        Other(lambda c, _, w, v: (c @ w).softmax(1) @ v, (4, WIDTH, 6), (4, 6, 3)),
        "_softmax works across experts or their rows",
    ),
    "across experts": (
        Other(lambda c, _, w, v: (c @ w).flip(0) @ v, (4, WIDTH, 6), (4, 6, 3)),
        "flip works across experts or their rows",
    ),
    "a bias of places": (
        Other(lambda c, _, w, v, b: (c @ w + b) @ v, (4, WIDTH, 6), (4, 6, 3), (5, 1)),
        "add works across experts or their rows",
    ),
    "rows second": (
        Other(lambda c, _, w: torch.bmm(w, c.transpose(1, 2)), (4, 6, WIDTH)),
        "its rows come second",
    ),
    "experts in the middle": (
        Other(lambda c, _, w: torch.einsum("cem,emf->cef", c.transpose(0, 1), w), (4, WIDTH, 6)),
        "it is not of as many rows for each of its matrices",
    ),
    "experts summed": (
        Other(lambda c, _, w: torch.einsum("ecm,emf->cf", c, w), (4, WIDTH, 6)),
        "its equation does not keep experts first and their rows second",
    ),
    "one matrix": (
        Other(lambda c, _, w: c @ w, (1, WIDTH, 6)),
        "it is not of as many rows for each of its matrices",
    ),
}


@pytest.mark.parametrize("name", NONE)
def test_what_is_no_layer_of_experts_is_said(name: str) -> None:
    model, reason = NONE[name]
    torch._dynamo.reset()
    batches, said = found_in(model, torch.randn(7, WIDTH))
    assert not batches
    assert len(said) == 1
    assert reason in said[0]


def test_attention_is_not_looked_at() -> None:
    """Its batched products have no parameter among their operands."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(WIDTH, 3 * WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.project(x).view(3, 7, 4, WIDTH // 4, 3).permute(4, 0, 2, 1, 3).flatten(1, 2).unbind()
            return torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)

    assert found_in(Attention(), torch.randn(3, 7, WIDTH)) == ([], [])


# -- on ranks ------------------------------------------------------------------------------------------------------------


def ids(draw: torch.Generator, rank: int, call: int) -> tuple[torch.Tensor]:
    return (torch.randint(0, VOCABULARY, (17,), generator=draw),)


def longer(draw: torch.Generator, rank: int, call: int) -> tuple[torch.Tensor]:
    """16 tokens, and 24 in the second call of a step."""
    return (torch.randint(0, VOCABULARY, (17 + 8 * call,), generator=draw),)


def ep(stage: int, size: int | None = None, **own: Any) -> dict[str, Any]:
    asked = {"enabled": True, **({} if size is None else {"autoep_size": size})}
    return training.zero(stage, expert_parallel=asked, dspass={"experts": own} if own else None)


def trained(build: Callable[[], nn.Module], config: dict[str, Any], **more: Any) -> dict[str, Any]:
    """As :func:`tests.training.train`, with what became of the experts."""
    models: list[nn.Module] = []

    def remembered() -> nn.Module:
        models.append(build())
        return models[-1]

    found = training.train(remembered, more.pop("batches", ids), config, steps=3, **more)
    engine = engine_of(models[1])
    assert engine is not None
    specs = {s.name: s for s in engine.specs.values() if s.expert_axis is not None}
    held = {}
    for name, spec in specs.items():
        param = spec.param()
        assert isinstance(param, DTensor)
        held[name] = param.to_local().shape[0]
    gathered = []
    for graph in [
        g.graph for c in engine.compilations for where, g in c.graphs.items() if where in ("forward", "backward")
    ]:
        gathered += [lookup(k).name for start in calls(graph, gather_start) for k in start.args[1]]  # type: ignore[union-attr]
        assert not calls(graph, ops.gather_experts.default)
    found |= {"held": held, "gathered": [n for n in gathered if n in specs]}
    routed = engine.routing.last
    found["rows"] = {
        name: layer.counts.sum(0).view(specs[name].divided_over.size, -1)[specs[name].divided_over.rank].tolist()
        for name, layer in routed.items()
    }
    found["drops"] = {name: [int(layer.dropped)] for name, layer in routed.items()}
    return found


def gshard(form: str, top_k: int) -> Model:
    return Model(GShard(EXPERTS, top_k, form), GShard(EXPERTS, top_k, form))


FORMS = ((1, "einsum"), (2, "bmm"), (2, "index"))


def in_forms(forms: Sequence[tuple[int, str]]) -> Model:
    return Model(*(GShard(EXPERTS, top_k, form) for top_k, form in forms))


@pytest.mark.parametrize(
    ("forms", "ranks", "stage", "size"), [(FORMS, 2, 3, None), (FORMS[2:], 4, 1, 2), (FORMS[:1], 4, 3, None)]
)
def test_batched_experts_train_as_on_one_process(
    forms: Sequence[tuple[int, str]], ranks: int, stage: int, size: int | None
) -> None:
    """Each rank has its share of the experts, and where the axis has all ranks nobody gathers any."""
    results = run(ranks, trained, functools.partial(in_forms, forms), ep(stage, size), timeout=120)
    training.close(results)
    for result in results:
        weights = {f"layers.{i}.{name}" for i in range(len(forms)) for name in ("up", "down")}
        assert result["held"] == dict.fromkeys(weights, EXPERTS // ranks)
        assert bool(result["gathered"]) == (size is not None)
        # Of a layer what is told, what goes and what comes back, and the latter two's backwards; "index" has two to come back.
        assert result["counts"]["all-to-all"] == sum(7 if form == "index" else 5 for _, form in forms)


@training.without_inductor
def different(build: Callable[[], nn.Module], config: dict[str, Any], fill: float | None) -> str:
    """What two ranks say of another number of tokens, or of a router that answers ``fill``."""
    rank = torch.distributed.get_rank()
    torch.manual_seed(0)
    model = build()
    compiled: Any = torch.compile(model, backend="deepspeed", options=config)
    compiled(torch.arange(17)).backward()
    if fill is not None:
        with torch.no_grad():
            model.layers[0].router.weight.to_local().fill_(fill)  # type: ignore[union-attr,operator,index]
    with pytest.raises(RuntimeError) as refused:
        compiled(torch.arange(17 if fill is not None else 17 + 8 * rank) % 7)
    return str(refused.value)


def test_ranks_with_other_capacities_are_told_so() -> None:
    """Each of them, and none waits."""
    for said in run(2, different, functools.partial(gshard, "einsum", 1), ep(3), None, timeout=120):  # 16 and 24 tokens
        assert "take [2, 3] rows each from ranks [0, 1]: fixed sizes want the same number everywhere" in said
        assert "pad the batch" in said


# -- dropped by a key ----------------------------------------------------------------------------------------------------


def grouped(factor: float | None = None, least: int = 0) -> Model:
    most = None if factor is None else lambda rows: max(least, -(-int(rows * factor) // EXPERTS))
    return Model(Grouped(EXPERTS, 2, biases=True, capacity=most), Grouped(EXPERTS, 1, capacity=most))


@pytest.mark.parametrize(
    ("ranks", "stage", "size", "least", "own"),
    [(2, 3, None, 0, {}), (2, 3, None, 0, {"chunks": 2}), (1, 0, None, 3, {})],
    ids=["2 ranks", "in chunks", "1 rank"],
)
def test_rows_beyond_a_capacity_are_dropped(
    ranks: int, stage: int, size: int | None, least: int, own: dict[str, int]
) -> None:
    """As a loop drops them that takes the first of each expert; on one process nothing is divided. Calls of other lengths
    share a graph, and each has its capacity."""
    config = ep(stage, size, capacity_factor=1.0, min_capacity=least, **own)
    if ranks == 1:
        del config["expert_parallel"]
    config["gradient_accumulation_steps"] = 2
    results = run(ranks, trained, functools.partial(grouped, 1.0, least), config, batches=longer, calls=2, timeout=120)
    training.close(results)
    if ranks > 1:
        drops = [n for r in results for layer in r["drops"].values() for n in layer]
        kept = [n for r in results for layer in r["rows"].values() for n in layer]
        assert sum(drops) > 0
        assert max(kept) <= ranks * (max(4, least) + 6)
        assert sum(drops) + sum(kept) == ranks * (16 + 24) * (2 + 1)


def test_a_factor_without_drops_is_dropless() -> None:
    """Ranks may have other numbers of tokens, and no row is missing."""
    config = ep(3, capacity_factor=0.5, drop_tokens=False)
    results = run(2, trained, grouped, config, batches=of_other_sizes, timeout=120)
    training.close(results)
    assert not any(n for r in results for layer in r["drops"].values() for n in layer)


def of_other_sizes(draw: torch.Generator, rank: int, call: int) -> tuple[torch.Tensor]:
    return (torch.randint(0, VOCABULARY, (2 + 9 * rank,), generator=draw),)


def test_a_router_that_answers_nan_is_told_on_all_ranks() -> None:
    config = ep(3, capacity_factor=1.0)
    for said in run(2, different, grouped, config, float("nan"), timeout=120):
        assert "the router of layers.0.up answers NaN on rank 0" in said


@pytest.mark.parametrize(
    ("own", "key", "way_out"),
    [
        ({"capacity_factor": 0, "min_capacity": 0}, "capacity_factor", "Write a factor above 0"),
        ({"capacity_factor": -1.0}, "capacity_factor", "0"),
        ({"min_capacity": 8}, "min_capacity", "Write dspass.experts.capacity_factor too"),
        ({"drop_tokens": True}, "drop_tokens", "Write dspass.experts.capacity_factor too"),
    ],
)
def test_capacities_that_cannot_be(own: dict[str, Any], key: str, way_out: str) -> None:
    with pytest.raises(ConfigError, match=way_out) as refused:
        Config.load({"dspass": {"experts": own}})
    assert refused.value.key == f"dspass.experts.{key}"


def test_a_capacity_is_deepspeed_s() -> None:
    """max(min_capacity, ceil(tokens * k / experts * factor)), of the factor as it is written."""
    assert capacity.capacity_of(2 * 16, 8, 1.0, 0) == 4
    assert capacity.capacity_of(33, 8, 1.0, 4) == 5
    assert capacity.capacity_of(8, 8, 1.25, 4) == 4
    assert capacity.capacity_of(20, 2, 1.1, 0) == 11  # 11.000000000000002 in floating point
    assert capacity.capacity_of(0, 2, 1.1, 0) == 0


def test_operators_are_what_their_schemas_say() -> None:
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    torch.library.opcheck(ops.pad_experts.default, (torch.randn(6, 4, requires_grad=True), ends, 2))
    torch.library.opcheck(ops.unpad_experts.default, (torch.randn(3, 2, 4, requires_grad=True), ends, 6))


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    behind=st.integers(0, 2),
    most=st.integers(0, 6),
    trailing=st.sampled_from([(), (3,), (2, 2)]),
)
def test_padded_rows_are_those_of_a_list(counts: list[int], behind: int, most: int, trailing: tuple[int, ...]) -> None:
    size = sum(counts) + behind
    ends = torch.tensor(list(itertools.accumulate(counts)), dtype=torch.int32)
    rows = torch.randn(size, *trailing, requires_grad=True)
    padded = ops.pad_experts(rows, ends, most)
    back = ops.unpad_experts(padded, ends, size)
    assert padded.shape == (len(counts), most, *trailing)
    expected, kept, begin = torch.zeros_like(padded), torch.zeros_like(rows), 0
    for e, count in enumerate(counts):
        some = min(count, most)
        expected[e, :some] = rows[begin : begin + some]
        kept[begin : begin + some] = rows[begin : begin + some]
        begin += count
    assert torch.equal(padded, expected)
    assert torch.equal(back, kept)
    # The two are each other's adjoint.
    other = torch.randn_like(padded)
    (grad,) = torch.autograd.grad(padded, rows, other, create_graph=True)
    assert torch.equal(grad, ops.unpad_experts(other, ends, size))
    last = padded.detach().requires_grad_()
    (again,) = torch.autograd.grad(ops.unpad_experts(last, ends, size), last, rows.detach())
    assert torch.equal(again, padded)
