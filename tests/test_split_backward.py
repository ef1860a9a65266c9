"""A backward in two halves is the backward: what both answer, what each of them computes, and what lies between.

Numbers come from three places. Random graphs of plain operators and of runtime nodes run as they are written, cut at random.
The toys' backwards, with all passes behind them, run on simulated ranks. Real modules are compiled by Inductor on this process.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import flop_registry

from dspass.compilation import Compilation, compile_graph
from dspass.config import Config
from dspass.engines import new_engine
from dspass.lowering import split_backward
from dspass.lowering.split_backward import Halves, Literal, split
from dspass.lowering.stage_backward import StageBackward, gradients_of
from dspass.passes.kernels import is_view, size_of
from dspass.passes.nodes import calls, items_of, wait_of
from dspass.pipeline import build
from dspass.runtime.collectives import RUNTIME_FUNCTIONS, gather_start, gather_wait, reduce_start
from dspass.runtime.ledger import Ledger
from dspass.shard import shard
from tests.graphs import (
    PerRank,
    as_written,
    copy_graph,
    fake_world,
    inputs_of,
    options,
    run_pipeline,
    saved_of,
    simulate,
)
from tests.test_passes import toy_of
from tests.test_segments import STEPS, Builder, inputs, random_graph
from tests.test_segments import new_engine as engine_of_one

aten = torch.ops.aten


def run_halves(halves: Halves, values: dict[str, Any], run: Any) -> list[Any]:
    """The outputs of the whole graph, for the values of its inputs by name; ``run`` runs one graph."""
    found: dict[int, Any] = {i: o.value if isinstance(o, Literal) else values[o] for i, o in halves.given.items()}
    if halves.input is not None:
        results = run(halves.input.graph, values)
        found |= zip(halves.first, results, strict=False)
        values = values | dict(zip(halves.carried, results[len(halves.first) :], strict=True))
    if halves.weight is not None:
        found |= zip(halves.rest, run(halves.weight.graph, values), strict=True)
    return [found[i] for i in range(halves.outputs)]


def interpreted(graph: fx.Graph, values: dict[str, Any]) -> Sequence[Any]:
    given = [values[n.name] for n in graph.find_nodes(op="placeholder")]
    return fx.Interpreter(fx.GraphModule(nn.Module(), graph)).run(*given)


def named(gm: fx.GraphModule) -> dict[str, torch.Tensor]:
    """Fresh values for the inputs of a built graph."""
    return dict(zip([n.name for n in gm.graph.find_nodes(op="placeholder")], inputs(), strict=True))


def check_graphs(gm: fx.GraphModule, halves: Halves) -> None:
    """What holds of any two halves: they lint, pairs are whole, and what is no view and does not fuse runs once."""
    seen: dict[str, int] = {}
    for half in (halves.input, halves.weight):
        if half is None:
            continue
        half.graph.lint()
        for node in half.graph.nodes:
            if node.op in ("placeholder", "call_function"):
                assert "val" in node.meta
            if node.target in RUNTIME_FUNCTIONS and node.target.__name__.endswith("_start"):
                wait = wait_of(node)
                assert wait.target.__name__.endswith("_wait")
                if isinstance(node.args[0], list):  # a bucket
                    assert len(node.args[0]) == len(wait.meta["val"])
                items_of(wait)
            if node.op == "call_function":
                seen[node.name] = seen.get(node.name, 0) + 1
    for node in gm.graph.nodes:
        if node.name in seen and (node.target in (aten.mm.default, reduce_start) or node.is_impure()):
            assert seen[node.name] == 1, f"{node.name} runs twice"


# -- random graphs -----------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    steps=STEPS,
    outputs=st.lists(st.integers(0, 30), min_size=1, max_size=5),
    first=st.sets(st.integers(0, 6), max_size=4),
    limit=st.sampled_from([0, 2**20]),
)
def test_halves_answer_what_the_whole_does(
    steps: list[tuple[str, int, int]], outputs: list[int], first: set[int], limit: int
) -> None:
    """Bit for bit, with what is gathered held or gathered again."""
    engine = engine_of_one()
    gm = random_graph(engine, steps, outputs)
    wanted = fx.Interpreter(fx.GraphModule(gm, copy_graph(gm.graph))).run(*inputs())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split_backward, "HELD_BYTES", limit)
        before = gm.print_readable(print_output=False)
        halves = split(gm, first)
        assert gm.print_readable(print_output=False) == before
    check_graphs(gm, halves)
    found = run_halves(halves, named(gm), interpreted)
    for new, old in zip(found, wanted, strict=True):
        assert torch.equal(new, old) if isinstance(old, torch.Tensor) else new == old


KINDS = st.lists(
    st.tuples(st.sampled_from(["mm", "sin", "add", "sum", "half", "view"]), st.integers(0, 30), st.integers(0, 30)),
    min_size=1,
    max_size=10,
)


def compute_graph(steps: list[tuple[str, int, int]]) -> tuple[fx.GraphModule, list[fx.Node]]:
    """Products, which are made once, and what fuses, in several sizes; and its values."""
    build = Builder(engine_of_one())
    values = list(build.inputs)
    for kind, i, j in steps:
        a, b = values[i % len(values)], values[j % len(values)]
        if kind == "mm":
            values.append(build.call(aten.mm.default, build.call(aten.expand.default, a, [4, 4]), b))
        elif kind == "sin":
            values.append(build.call(aten.sin.default, a))
        elif kind == "add":
            values.append(build.call(aten.add.Tensor, a, b))
        elif kind == "sum":
            values.append(build.call(aten.expand.default, build.call(aten.sum.dim_IntList, a, [0], True), [4, 4]))
        elif kind == "half":
            half = build.call(torch.ops.prims.convert_element_type.default, a, torch.float16)
            values.append(build.call(torch.ops.prims.convert_element_type.default, half, torch.float32))
        else:
            values.append(build.call(aten.permute.default, a, [1, 0]))
    return build.module(*values), values


@settings(max_examples=60, deadline=None)
@given(steps=KINDS, first=st.integers(0, 30), later=st.integers(0, 30))
def test_the_fewest_bytes_are_held(steps: list[tuple[str, int, int]], first: int, later: int) -> None:
    """No set of values that W could be made of is smaller: all of them are tried."""
    gm, values = compute_graph(steps)
    graph = gm.graph
    chosen = [values[first % len(values)], values[later % len(values)]]
    graph.find_nodes(op="output")[0].args = (tuple(chosen),)
    halves = split(gm, [0])
    if halves.input is None or halves.weight is None:
        return
    names = {n.name for n in halves.input.graph.nodes if n.op == "call_function"}
    inside = [n for n in graph.nodes if n.name in names or n.op == "placeholder"]
    savable = [n for n in inside if not is_view(n)]
    made_once = {n for n in inside if n.op == "placeholder" or n.target in (aten.mm.default, aten.sum.dim_IntList)}

    def suffices(held: set[fx.Node]) -> bool:
        stack, seen = [chosen[1]], set()
        while stack:
            node = stack.pop()
            if node in held or node in seen:
                continue
            seen.add(node)
            if node in made_once:
                return False
            stack += node.all_input_nodes
        return True

    sizes = (
        sum(map(size_of, held))
        for count in range(len(savable) + 1)
        for held in itertools.combinations(savable, count)
        if suffices(set(held))
    )
    assert halves.held_bytes() == min(sizes)


def test_a_pointwise_value_is_made_again_of_what_is_held_anyway() -> None:
    build = Builder(engine_of_one())
    x, y = build.inputs
    product = build.call(aten.mm.default, x, y)
    gate = build.call(aten.sigmoid.default, product)
    wanted = build.call(aten.mm.default, gate, y)
    later = build.call(aten.mm.default, build.call(aten.mul.Tensor, gate, product), x)
    halves = split(build.module(wanted, later), [0])
    assert halves.carried == (product.name,)
    assert halves.weight is not None
    assert calls(halves.weight.graph, aten.sigmoid.default)


def test_a_view_holds_nothing_of_its_own() -> None:
    build = Builder(engine_of_one())
    x, y = build.inputs
    product = build.call(aten.mm.default, x, y)
    turned = build.call(aten.permute.default, product, [1, 0])
    wanted = build.call(aten.mm.default, turned, y)
    halves = split(build.module(wanted, build.call(aten.mm.default, turned, x)), [0])
    assert halves.carried == (product.name,)


def test_random_numbers_are_drawn_once_and_in_order() -> None:
    build = Builder(engine_of_one())
    x, y = build.inputs
    drawn = [build.call(aten.rand_like.default, x) for _ in range(3)]
    wanted = build.call(aten.mul.Tensor, drawn[1], y)
    later = [build.call(aten.mul.Tensor, d, x) for d in drawn]
    gm = build.module(wanted, *later)
    halves = split(gm, [0])
    assert halves.input is not None
    assert halves.weight is not None
    assert (
        len(calls(halves.input.graph, aten.rand_like.default)) == 2
    )  # the second, and the first which comes before it
    assert len(calls(halves.weight.graph, aten.rand_like.default)) == 1
    values = named(gm)
    torch.manual_seed(1)
    expected = interpreted(gm.graph, values)
    torch.manual_seed(1)
    found = run_halves(halves, values, interpreted)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("first", [[0], [1], [2], [0, 2], [1, 2]])
def test_what_is_written_in_place_is_read_before_and_behind_as_it_stands(first: list[int]) -> None:
    build = Builder(engine_of_one())
    x, y = build.inputs
    rows = build.call(aten.select.int, x, 0, 0)
    before = build.call(aten.sin.default, rows)
    build.call(aten.copy_.default, x, y)
    behind = build.call(aten.cos.default, rows)
    gm = build.module(before, build.call(aten.mul.Tensor, behind, before), build.call(aten.sin.default, y))
    expected = interpreted(gm.graph, named(gm))
    halves = split(gm, first)
    check_graphs(gm, halves)
    values = named(gm)
    found = run_halves(halves, values, interpreted)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(values["x0"], values["x1"])


def gathered_twice(limit: int, monkeypatch: pytest.MonkeyPatch) -> Halves:
    """Of three parameters in one bucket both halves need the first, I the second and W the third."""
    monkeypatch.setattr(split_backward, "HELD_BYTES", limit)
    build = Builder(engine_of_one())
    x = build.inputs[0]
    keys = [f"{build.engine.name}/{i}" for i in range(3)]
    start = build.call(gather_start, build.shards, keys)
    wait = build.call(gather_wait, start)
    start.meta["val"] = wait.meta["val"] = [torch.empty(4, 4)] * 3
    both, input_only, weight_only = (build.call(operator.getitem, wait, i) for i in range(3))
    wanted = build.call(aten.mm.default, build.call(aten.mm.default, x, both), input_only)
    later = build.call(aten.mm.default, build.call(aten.mm.default, x, both), weight_only)
    return split(build.module(wanted, later), [0])


def test_a_small_parameter_that_weight_gradients_need_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    halves = gathered_twice(2**20, monkeypatch)
    assert halves.weight is not None
    assert not calls(halves.weight.graph, gather_start)


def test_a_large_one_is_gathered_again_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    halves = gathered_twice(0, monkeypatch)
    assert halves.input is not None
    assert halves.weight is not None
    keys = {}
    for name, half in (("input", halves.input), ("weight", halves.weight)):
        (start,) = calls(half.graph, gather_start)
        keys[name] = [key[-1] for key in start.args[1]]
        assert len(start.args[0]) == len(start.meta["val"]) == len(keys[name])
        assert len({n.name for n in start.args[0]}) == len(keys[name])
    assert keys == {"input": ["0", "1"], "weight": ["0", "2"]}
    assert not any("getitem" in name for name in halves.carried)


def test_nothing_wanted_first_leaves_no_first_half() -> None:
    build = Builder(engine_of_one())
    x, y = build.inputs
    gm = build.module(build.call(aten.mm.default, x, y), None, x)
    none = split(gm, [1, 2])
    assert none.input is None
    assert none.weight is not None
    assert none.given == {1: Literal(None), 2: x.name}
    everything = split(gm, [0, 1, 2])
    assert everything.input is not None
    assert everything.weight is None
    assert (everything.held_bytes(), everything.carried) == (0, ())


# -- the toys, on simulated ranks --------------------------------------------------------------------------------


@functools.cache
def stepped(name: str) -> tuple[fx.GraphModule, dict[str, PerRank], int, list[Any], object]:
    """A toy's backward behind all passes, what it is given on each rank, and what it answers."""
    toy = toy_of(name)
    step = run_pipeline(toy)
    values = inputs_of(toy)
    outputs = simulate(step.forward, values, toy.world)
    values |= saved_of(step.backward, outputs)
    gm = fx.GraphModule(nn.Module(), step.backward)
    return gm, values, toy.world, simulate(copy_graph(step.backward), values, toy.world), toy


@pytest.mark.parametrize(
    "name", ["made", "routed", "balanced", "offloaded", "few_bits", "hosted", "in_nodes", "quantised_fed_back"]
)
def test_halves_of_a_toy_answer_what_its_backward_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever gradients are wanted first: buckets of gathers, reductions, copies and exchanges end up in either half."""
    gm, values, world, wanted, _ = stepped(name)
    gradients = [i for i, g in enumerate(wanted) if isinstance(g[0], torch.Tensor)]
    for limit, first in itertools.product((0, 2**20), ([], gradients[:1], gradients[-1:], gradients[::2], gradients)):
        monkeypatch.setattr(split_backward, "HELD_BYTES", limit)
        halves = split(gm, first)
        check_graphs(gm, halves)
        found = run_halves(halves, dict(values), lambda graph, given: simulate(graph, given, world))
        for i in gradients:
            for mine, whole in zip(found[i], wanted[i], strict=True):
                torch.testing.assert_close(mine, whole, rtol=0, atol=0, msg=f"output {i} of {first}")


# -- real backwards ----------------------------------------------------------------------------------------------


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """A transformer's, with everything that such a block may have; all weight products are those of linear layers."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.norm_in, self.norm_out = nn.LayerNorm(16), nn.RMSNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16, bias=False)
        self.up, self.gate, self.down = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)
        self.dropout = dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (t.view(batch, length, 2, 8).transpose(1, 2) for t in self.qkv(self.norm_in(x)).split(width, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x + F.dropout(self.out(mixed), self.dropout, self.training)
        y = self.norm_out(x)
        return x + F.dropout(self.down(F.silu(self.gate(y)) * self.up(y)), self.dropout, self.training)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3, bias=False)
        self.norm = nn.GroupNorm(2, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(F.relu(self.norm(self.first(x))))


class Stage:
    """A module and its input, compiled with a whole backward, and with one in halves."""

    def __init__(self, model: nn.Module, x: torch.Tensor, compiler: Any = None, sharded: bool = False) -> None:
        self.model, self.x = model, x.requires_grad_()
        config = Config.load(options(3 if sharded else 0))
        if sharded:
            shard(model, config)
        self.engine = new_engine(model, config)
        self.parameters: list[nn.Parameter] = []

        def backend(gm: fx.GraphModule, inputs: Sequence[Any], split: bool) -> Any:
            places = [i for i, value in enumerate(inputs) if not isinstance(value, nn.Parameter)]
            self.parameters = list(inputs)
            made = StageBackward(len(inputs), places) if split else None
            return compile_graph(gm, inputs, self.engine, config, build(config), compiler, made)

        torch._dynamo.reset()
        self.whole = torch.compile(model, backend=functools.partial(backend, split=False))
        self.halves = torch.compile(model, backend=functools.partial(backend, split=True))

    @property
    def done(self) -> Compilation:
        return next(c for c in reversed(self.engine.compilations) if c.stage_backward is not None)

    @property
    def split(self) -> StageBackward:
        assert self.done.stage_backward is not None
        return self.done.stage_backward

    def gradients(self, run: Any) -> dict[str, torch.Tensor]:
        """By ``loss.backward()``."""
        torch.manual_seed(0)
        self.model.zero_grad()
        self.x.grad = None
        run(self.x).square().sum().backward()
        found = {name: p.grad for name, p in self.model.named_parameters()} | {"x": self.x.grad}
        assert all(g is not None for g in found.values())
        return {name: g.clone() for name, g in found.items() if g is not None}

    def input_gradient(self, token: Any = None, seed: int = 0) -> torch.Tensor:
        torch.manual_seed(seed)
        loss = self.halves(self.x).square().sum()
        with self.split.deferred(token):
            (found,) = torch.autograd.grad(loss, [self.x])
        return found

    def weight_gradients(self, token: Any = None) -> dict[str, torch.Tensor]:
        names = {id(p): name for name, p in self.model.named_parameters()}
        found = self.split.weights(token)
        assert len(found) == len(self.parameters)
        return {names[id(p)]: g for p, g in zip(self.parameters, found, strict=True) if g is not None}


def flops(gm: fx.GraphModule | None) -> int:
    """Of all products in a graph."""
    if gm is None:
        return 0
    total = 0
    for node in gm.graph.nodes:
        count = flop_registry.get(getattr(node.target, "overloadpacket", None))
        if count is not None:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            total += count(*args, **kwargs, out_val=node.meta["val"])
    return total


def weight_product_flops(model: nn.Module, x: torch.Tensor) -> int:
    """Of the products that make the gradients of weights: each as many as its layer's forward."""
    total = 0

    def add(module: nn.Module, args: Any, result: torch.Tensor) -> None:
        nonlocal total
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        total += 2 * weight.numel() * (result.numel() // weight.shape[0])

    hooks = [m.register_forward_hook(add) for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return total


@pytest.mark.parametrize(
    ("model", "shape", "compiler"),
    [(Mlp, (5, 6), as_written), (Convolutions, (2, 3, 8, 8), as_written), (Block, (2, 6, 16), None)],
    ids=["mlp", "convolutions", "block"],
)
def test_input_and_weight_gradients_are_the_backward_s(model: Any, shape: Sequence[int], compiler: Any) -> None:
    torch.manual_seed(0)
    stage = Stage(model(), torch.randn(shape), compiler)
    wanted = stage.gradients(stage.whole)
    together = stage.gradients(stage.halves)
    apart = {"x": stage.input_gradient()} | stage.weight_gradients()
    for name, gradient in wanted.items():
        torch.testing.assert_close(together[name], gradient, rtol=0, atol=0)
        torch.testing.assert_close(apart[name], gradient, rtol=0, atol=0)
    assert apart.keys() == wanted.keys()
    halves = stage.split.halves
    assert halves is not None
    products = weight_product_flops(stage.model, stage.x)
    outputs = stage.done.graphs["backward"].graph.find_nodes(op="output")[0].args[0]
    assert not {outputs[i].name for i in halves.rest} & set(halves.carried), "I has made a parameter's gradient"
    assert flops(halves.weight) == products, "W has the weight products and nothing else"
    assert flops(halves.input) + products == flops(stage.engine.compilations[0].graphs["backward"])


# -- together, apart, in any order -------------------------------------------------------------------------------


def stage_of(sharded: bool = False) -> Stage:
    torch.manual_seed(0)
    stage = Stage(Mlp(), torch.randn(5, 6), as_written, sharded)
    stage.gradients(stage.halves)  # compiles the backward
    return stage


def test_weight_gradients_come_oldest_first_or_by_token() -> None:
    stage = stage_of()
    batches = [torch.full((5, 6), i + 1.0, requires_grad=True) for i in range(4)]
    wanted = []
    for stage.x in batches:
        wanted.append(stage.gradients(stage.halves))
    tokens: list[Any] = [("micro-batch", 0), ("micro-batch", 1), ("micro-batch", 2), None]
    for i, stage.x in enumerate(batches):
        assert torch.equal(stage.input_gradient(tokens[i]), wanted[i]["x"])
    assert stage.split.waiting[:3] == tuple(tokens[:3])
    for token, i in ((tokens[1], 1), (None, 0), (None, 2), (None, 3)):
        for name, gradient in stage.weight_gradients(token).items():
            assert torch.equal(gradient, wanted[i][name])
    assert stage.split.waiting == ()


def test_what_does_not_wait_cannot_be_asked_for() -> None:
    stage = stage_of()
    with pytest.raises(LookupError, match=r"no weight gradients wait under None, none do: run the backward inside of"):
        stage.split.weights()
    stage.input_gradient(token=1)
    with pytest.raises(LookupError, match=r"under 2, those of \[1\] do"):
        stage.split.weights(2)
    with pytest.raises(RuntimeError, match=r"wait under 1: take them with weights\(1\) first, or give each backward"):
        stage.input_gradient(token=1)
    stage.split.drop()
    assert stage.split.waiting == ()
    stage.input_gradient(token=1)


def test_what_changes_in_place_meanwhile_is_refused() -> None:
    stage = stage_of()
    stage.input_gradient()
    with torch.no_grad():
        stage.x.zero_()
    with pytest.raises(RuntimeError, match=r"^\['primals_3'\] of the backward graph changed in place between"):
        stage.split.weights()


def test_meanwhile_parameters_have_no_gradient() -> None:
    """AOTAutograd takes None for it, and autograd then leaves what is there."""
    stage = stage_of()
    stage.model.zero_grad()
    with stage.split.deferred():
        stage.halves(stage.x).sum().backward()
    assert all(p.grad is None for p in stage.model.parameters())
    stage.split.drop()
    stage.halves(stage.x).sum().backward()
    assert all(p.grad is not None for p in stage.model.parameters())


def test_sharded_parameters_have_zeros_of_no_memory_meanwhile() -> None:
    with fake_world(1):
        stage = stage_of(sharded=True)
        wanted = stage.gradients(stage.whole)
        assert torch.equal(stage.input_gradient(), wanted["x"])
        found = stage.weight_gradients()
        assert found.keys() | {"x"} == wanted.keys()
        for name, gradient in found.items():
            assert torch.equal(gradient, wanted[name].to_local())  # type: ignore[operator]
        stage.model.zero_grad()
        with stage.split.deferred():
            stage.halves(stage.x).sum().backward()
        assert all(p.grad is not None and not p.grad.any() for p in stage.model.parameters())
    torch._dynamo.reset()


def test_between_the_halves_lives_what_was_said_and_no_more() -> None:
    """Saved values that only input gradients need are free behind them."""
    stage = stage_of()
    ledger = Ledger()
    ledger.note(list(stage.model.parameters()), "parameters")
    ledger.note(stage.x, "parameters")
    stage.engine.probe.ledger = ledger
    before = ledger.totals()
    gradient = stage.input_gradient()
    halves = stage.split.halves
    assert halves is not None
    held = ledger.total - sum(before.values()) - gradient.nbytes
    assert 0 < held <= halves.held_bytes()
    stage.split.weights()
    del gradient
    assert ledger.total == sum(before.values())
    weight = [p for p in ledger.points if p.label == "weight gradients"]
    assert {p.phase for p in weight} == {"backward"}
    assert ledger.phase == "forward"


def test_autocast_outside_does_not_reach_the_weight_products() -> None:
    """Autograd runs a compiled backward without it."""
    stage = stage_of()
    wanted = stage.gradients(stage.halves)
    stage.input_gradient()
    with torch.autocast("cpu", torch.bfloat16):
        found = stage.weight_gradients()
    for name, gradient in found.items():
        assert torch.equal(gradient, wanted[name])


def test_the_first_stage_has_weight_gradients_only() -> None:
    """No input of it has a gradient: its I does nothing but keep what W needs."""
    torch.manual_seed(0)
    stage = Stage(nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3)), torch.empty(0), as_written)
    stage.x = torch.randint(7, (5,))
    stage.halves(stage.x).square().sum().backward()
    wanted = {name: p.grad.clone() for name, p in stage.model.named_parameters() if p.grad is not None}
    assert len(wanted) == 3
    halves = stage.split.halves
    assert halves is not None
    assert halves.input is None
    some = next(stage.model.parameters())
    loss = stage.halves(stage.x).square().sum()
    with stage.split.deferred():
        (nothing,) = torch.autograd.grad(loss, [some], allow_unused=True)
    assert nothing is None
    found = stage.weight_gradients()
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert torch.equal(gradient, wanted[name])


def test_a_stage_without_parameters_has_nothing_to_wait_for() -> None:
    stage = Stage(nn.Sequential(nn.GELU(), nn.Softmax(-1)), torch.randn(3, 4), as_written)
    wanted = stage.gradients(stage.whole)
    assert torch.equal(stage.gradients(stage.halves)["x"], wanted["x"])
    assert stage.split.halves is not None
    assert stage.split.halves.weight is None
    assert torch.equal(stage.input_gradient(), wanted["x"])
    assert stage.split.weights() == [None]


def test_times_of_both_halves_are_the_backward_s() -> None:
    stage = stage_of()
    assert set(stage.done.programs) == {"forward", "input", "weight"}
    assert stage.done.measured_seconds is None
    for _ in range(12):
        stage.input_gradient()
        stage.split.weights()
    assert stage.done.measured_seconds is not None


def test_gradients_are_known_by_their_inputs() -> None:
    stage = stage_of()
    backward = stage.done.graphs["backward"].graph
    places = [g.of for g in gradients_of(backward) if g is not None]
    assert places == list(range(len(stage.parameters)))
