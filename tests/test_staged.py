"""Parameters of pipeline stages: who holds them, what is freed, how they are saved, clipped and scaled.

No schedule runs here: parameters are dealt out by a table, and gradients are set by hand, drawn by the parameter's name, so
that one process knows them all.
"""

from __future__ import annotations

import copy
import gc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import clip_grad_norm_, get_total_norm  # before anything is placed, as scripts do

import dspass
from dspass.config import Config, ConfigError
from dspass.engines import new_engine
from dspass.full_states import full_state_dict
from dspass.runtime.engine import Engine
from dspass.runtime.tied import sum_tied
from dspass.staged import pipeline_mesh, place_stages, prepare
from tests.ranks import run

FULL = StateDictOptions(full_state_dict=True)
Values = dict[str, torch.Tensor]


class Net(nn.Module):
    """Odd sizes, a weight tied at both ends, a 0-dim and a frozen parameter, one of another precision, one without use."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 7)
        self.layers = nn.ModuleList(nn.Linear(7, 7) for _ in range(4))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.low = nn.Parameter(torch.randn(5, 7, dtype=torch.bfloat16))
        self.unused = nn.Parameter(torch.randn(3))
        self.head = nn.Linear(7, 13, bias=False)
        self.head.weight = self.embed.weight
        self.layers[1].bias.requires_grad_(False)
        self.register_buffer("calls", torch.randn(2))

    def forward(self, ids: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = torch.tanh(layer(x)) * self.scale
        x = x + self.low.float().sum(0)
        return F.cross_entropy(self.head(x), target)


#: Stages of four that use a parameter; of two, half of the number.
USES = {"embed.weight": {0, 3}, "layers.0": {0}, "layers.1": {1}, "layers.2": {2}, "layers.3": {3}, "scale": {0, 1, 2, 3},
        "low": {3}}  # fmt: skip


def uses(name: str, stages: int) -> frozenset[int]:
    found = next((at for start, at in USES.items() if name.startswith(start)), set())
    return frozenset(stage * stages // 4 for stage in found)


def options(stages: int, zero: int = 3, **more: Any) -> dict[str, Any]:
    zeros = {"stage": zero, **({"stage3_param_persistence_threshold": 8} if zero == 3 else {})}
    return {"zero_optimization": zeros, "pipeline": {"stages": stages, "micro_batches": 2}, **more}


def prepared(model: nn.Module, stages: int, **more: Any) -> tuple[Engine, Config, Any]:
    config = Config.load(options(stages, **more)).resolve_stage(True)
    mesh = pipeline_mesh(stages, "cpu")
    engine = new_engine(model, config)
    prepare(model, engine, config, mesh)
    return engine, config, mesh


def placed(model: nn.Module, stages: int, used: Callable[[str, int], frozenset[int]] = uses, **more: Any) -> Engine:
    """``model`` divided into so many stages, one a rank of a pipeline."""
    given = {key: more.pop(key) for key in ("fill",) if key in more}
    engine, config, mesh = prepared(model, stages, **more)
    table = {spec.key: used(spec.name, stages) for spec in engine.specs.values()}
    place_stages(model, engine, config, mesh, table, range(stages), **given)
    from dspass import steps

    steps.watch(engine, config)
    return engine


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def reference() -> Net:
    torch.manual_seed(0)
    return Net()


def different() -> Net:
    torch.manual_seed(dist.get_rank())
    return Net()


def gradient(name: str, like: torch.Tensor, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
    return torch.randn(like.shape, generator=draw).to(like.dtype)


def give_gradients(model: nn.Module, seed: int = 0, without: frozenset[str] = frozenset()) -> None:
    """The same whole gradients, however the model is divided; none for some names, and frozen ones."""
    for name, param in model.named_parameters():
        param.grad = None
        if name in without or not param.requires_grad:
            continue
        grad = gradient(name, param, seed)
        if isinstance(param, DTensor):
            grad = distribute_tensor(grad, param.device_mesh, param.placements, src_data_rank=None)
        param.grad = grad


def said(function: Callable[[], Any]) -> str:
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


# -- the mesh, and the capture -----------------------------------------------------------------------------------------


def test_a_mesh_needs_a_process_group() -> None:
    with pytest.raises(RuntimeError, match=r"pipeline\.stages is 2.*torchrun"):
        pipeline_mesh(2, "cpu")


def _meshes() -> None:
    mesh = pipeline_mesh(2, "cpu")
    assert mesh is pipeline_mesh(2, "cpu")
    assert mesh.mesh_dim_names == ("pipe", "data")
    assert tuple(mesh.get_coordinate() or ()) == (dist.get_rank() // 2, dist.get_rank() % 2)
    with pytest.raises(ConfigError, match=r"pipeline\.stages: 3 does not divide the 4 ranks.*\[1, 2, 4\]"):
        pipeline_mesh(3, "cpu")
    config = Config.load({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}).resolve_stage(True)
    with pytest.raises(ConfigError, match="mics_shard_size"):
        prepare(Net(), new_engine(None, config), config, mesh)


def test_meshes() -> None:
    run(4, _meshes)


def captured(model: nn.Module) -> list[tuple[str, str]]:
    """The markers of the graph that Dynamo captures from ``model``: the key's name, and what stands for its value."""
    found: list[tuple[str, str]] = []

    class Seen(Exception):
        pass

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        for node in gm.graph.find_nodes(op="call_function", target=torch.ops.dspass.unshard):
            value = node.meta["example_value"]
            found.append((node.args[1].partition("/")[2], f"{value.device} {value.dtype} {list(value.shape)}"))
        raise Seen

    ids = torch.zeros(3, dtype=torch.long)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with pytest.raises(Exception, match="Seen"):
        compiled(ids, ids)
    return found


def _capture() -> list[Any]:
    results = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            model = Net()
        engine, config, mesh = prepared(model, 2, bf16={"enabled": True})
        assert len(engine.specs) == len(list(model.parameters()))
        assert model.embed.weight is model._parameters.get("embed", model.head.weight)  # an eager read is the parameter
        results.append(captured(model))
        table = {spec.key: uses(spec.name, 2) for spec in engine.specs.values()}
        place_stages(model, engine, config, mesh, table, range(2), fill=reference().state_dict())
        results.append(captured(model))
    return results


def test_the_capture_reads_every_parameter_by_its_key_wherever_it_is() -> None:
    first, *others = [graph for results in run(2, _capture) for graph in results]
    names = [name for name, _ in reference().named_parameters() if name != "unused"]
    assert {name for name, _ in first} == set(names)
    assert dict(first)["low"] == "cpu torch.bfloat16 [5, 7]"
    assert dict(first)["embed.weight"] == "cpu torch.bfloat16 [13, 7]"
    assert all(other == first for other in others)


# -- placing -----------------------------------------------------------------------------------------------------------


def _placed(stages: int, zero: int) -> None:
    model, truth = different(), reference()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    give_gradients(model)
    optimizer.step()
    for state, param in zip(
        optimizer.state.values(), [p for p in model.parameters() if p in optimizer.state], strict=True
    ):
        state["exp_avg"].copy_(torch.ones_like(param))
    model.load_state_dict(truth.state_dict()) if dist.get_rank() == 0 else None
    held = list(model.parameters())
    first: Any = model.layers[0]
    first.weight.mark = "kept"
    hoard = tuple(model.parameters())  # the old objects are alive, their memory is not
    storages = {n: StorageWeakRef(p.untyped_storage()) for n, p in model.named_parameters()}
    sizes = {n: p.nbytes for n, p in model.named_parameters()}
    engine = placed(model, stages, zero=zero)
    del hoard
    gc.collect()
    mine = engine.stages.pipe.rank  # type: ignore[union-attr]
    own = {n for n in sizes if mine in uses(n, stages)} | ({"unused"} if mine == 0 else set())
    left = sum(sizes[n] for n, storage in storages.items() if not storage.expired())
    layouts = {spec.name: spec.layout for spec in engine.specs.values()}
    alone = engine.stages.data.size == 1  # type: ignore[union-attr]  # then what a rank keeps is the memory it had
    assert left <= sum(sizes[n] for n in own if alone or layouts[n] == "replicate")
    for (name, param), listed in zip(model.named_parameters(), held, strict=True):
        assert param is listed
        spec = engine.specs[f"{engine.name}/{name}"]
        assert spec.param() is param
        assert spec.is_elsewhere == (name not in own)
        assert spec.trains == (name != "layers.1.bias")
        if name in own:
            assert isinstance(param, DTensor)
            assert param.device_mesh.mesh_dim_names == ("data",)
            assert param.requires_grad == spec.trains
            assert param.to_local().shape == spec.local_shape
            assert torch.equal(whole(param.detach()), truth.get_parameter(name))
            assert spec.layout == ("shard" if zero and param.numel() > 8 and name != "layers.1.bias" else "replicate")
            if spec.trains:
                assert torch.equal(whole(optimizer.state[param]["exp_avg"]), torch.ones_like(truth.get_parameter(name)))
        else:
            assert param.is_meta
            assert not param.requires_grad
            assert param not in optimizer.state
        ranks = spec.tied_axis.ranks if spec.tied_axis is not None else ()
        places = sorted(uses(name, stages))
        data = dist.get_world_size() // stages
        shared = tuple(place * data + dist.get_rank() % data for place in places)
        assert ranks == (shared if len(places) > 1 and mine in places else ())
    assert model.head.weight is model.embed.weight
    assert first.weight.mark == "kept"
    assert torch.equal(model.get_buffer("calls"), truth.get_buffer("calls"))
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
    assert set(engine.params()) == own
    copied = copy.deepcopy(model)
    assert [p.is_meta for p in copied.parameters()] == [p.is_meta for p in model.parameters()]
    assert list(copied.state_dict()) == list(model.state_dict())
    before = [None if p.is_meta else whole(p.detach()).clone() for p in model.parameters()]
    give_gradients(model)
    optimizer.step()
    moved = [
        b is not None and not torch.equal(whole(p.detach()), b) for p, b in zip(model.parameters(), before, strict=True)
    ]
    assert moved == [n in own and n != "layers.1.bias" for n, _ in model.named_parameters()]


@pytest.mark.parametrize(("ranks", "stages", "zero"), [(2, 2, 3), (2, 1, 3), (4, 2, 3), (4, 4, 0), (4, 2, 1)])
def test_a_rank_holds_its_own_stages_and_nothing_else(ranks: int, stages: int, zero: int) -> None:
    """Later stages' moved parameters are those of rank 0, whose model alone had the values that all have now."""
    if zero == 1:  # stages 1 and 2 divide small ones as well, except 0-dim and frozen ones: only that they train
        run(ranks, _trains_at, stages, zero)
    else:
        run(ranks, _placed, stages, zero)


def _trains_at(stages: int, zero: int) -> None:
    model = different()
    engine = placed(model, stages, zero=zero)
    layouts = {spec.name: spec.layout for spec in engine.specs.values() if not spec.is_elsewhere}
    assert {layout for name, layout in layouts.items() if name not in ("layers.1.bias", "scale")} == {"shard"}
    assert all(torch.equal(v, reference().state_dict()[n]) for n, v in full_state_dict(model).items())


def _filled() -> None:
    state = reference().state_dict()
    with torch.device("meta"):
        model, other, third = Net(), Net(), Net()
    asked: list[str] = []

    def fill(name: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        asked.append(name)
        return state[name]

    engine = placed(model, 2, fill=fill)
    own = [spec.name for spec in engine.specs.values() if not spec.is_elsewhere]
    assert sorted(asked) == sorted([*own, "calls"])
    for name, value in model.state_dict().items():
        assert torch.equal(whole(value), state[name])
    assert "KeyError" in said(lambda: placed(other, 2, fill={n: v for n, v in state.items() if n != "scale"}))
    assert "meta device" in said(lambda: placed(third, 2))


def test_of_a_model_on_the_meta_device_only_own_parameters_are_made() -> None:
    run(2, _filled)


def _disagreeing(what: str) -> str:
    engine, config, mesh = prepared(model := different(), 2)
    rank = dist.get_rank()
    table = {spec.key: uses(spec.name, 2) for spec in engine.specs.values()}
    places = {"places": [rank, 1 - rank], "lost": [0]}.get(what, [0, 1])
    if what == "uses" and rank == 1:
        table[f"{engine.name}/low"] = frozenset({0})
    return said(lambda: place_stages(model, engine, config, mesh, table, places))


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("uses", r"stages that use low: [1] and [0]"),
        ("places", "ranks 0 and 1 differ in the places of stages on the pipe axis: [0, 1] and [1, 0]"),
        ("lost", "stages [1] use parameters, and are on no rank"),
    ],
)
def test_ranks_that_disagree_say_so(what: str, says: str) -> None:
    for text in run(2, _disagreeing, what):
        assert says in text


# -- states ------------------------------------------------------------------------------------------------------------


def _states(stages: int) -> None:
    model, truth = different(), reference()
    engine = placed(model, stages)
    first = truth.state_dict()
    here = [n for n, s in model.state_dict(keep_vars=True).items()]
    own = {spec.name for spec in engine.specs.values() if not spec.is_elsewhere}
    assert here == [n for n in first if n == "calls" or n in own or (n == "head.weight" and "embed.weight" in own)]

    def same(values: Values) -> bool:
        state = full_state_dict(model)
        return list(state) == list(values) and all(torch.equal(state[n], v) for n, v in values.items())

    assert same(first)
    assert list(full_state_dict(model, rank0_only=True)) == (list(first) if dist.get_rank() == 0 else [])
    twice = {n: v * 2 for n, v in first.items()}
    params = list(model.parameters())
    assert not any(model.load_state_dict(twice))
    assert same(twice)
    model.load_state_dict(first, assign=True)  # copied all the same: nobody else would know of other parameters
    assert same(first)
    assert all(a is b for a, b in zip(params, model.parameters(), strict=True))
    model.load_state_dict({n: v * 2 for n, v in model.state_dict().items()})
    assert same(twice)
    for name in ("layers.0.weight", "layers.3.weight"):
        missing = said(lambda name=name: model.load_state_dict({n: v for n, v in first.items() if n != name}))
        assert (f'Missing key(s) in state_dict: "{name}"' in missing) == (name in own)
    assert "Unexpected" in said(lambda: model.load_state_dict({**first, "no": first["scale"]}))
    for name in ("layers.0.bias", "layers.3.bias"):  # seen on every rank
        assert f"size mismatch for {name}" in said(
            lambda name=name: model.load_state_dict({**first, name: torch.zeros(3)})
        )
    set_model_state_dict(model, dict(first), options=FULL)
    assert same(first)
    assert all(a is b for a, b in zip(params, model.parameters(), strict=True))
    from_rank0 = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, dict(twice) if dist.get_rank() == 0 else {}, options=from_rank0)
    assert same(twice)
    full: Any = get_model_state_dict(model, options=FULL)
    assert list(full) == list(first)
    assert all(torch.equal(full[n], v) for n, v in twice.items())
    on_rank0 = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    assert sorted(on_rank0) == (sorted(first) if dist.get_rank() == 0 else [])
    sharded: Any = get_model_state_dict(model)
    set_model_state_dict(model, {n: v / 2 for n, v in sharded.items()})
    assert same(first)


@pytest.mark.parametrize(("ranks", "stages"), [(2, 2), (4, 2), (4, 4)])
def test_states_are_those_of_one_process(ranks: int, stages: int) -> None:
    run(ranks, _states, stages)


def test_whole_states_without_ranks() -> None:
    model = reference()
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in full_state_dict(model).items())


def stepped(model: nn.Module, steps: int = 2, first: int = 0) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(first, first + steps):
        give_gradients(model, step)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def _saved(stages: int, path: str) -> None:
    model = different()
    placed(model, stages)
    optimizer = stepped(model)
    dcp.save(
        {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)},
        checkpoint_id=path,
    )


def loaded(model: nn.Module, path: str) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=path)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    return optimizer


def _loaded(stages: int, path: str) -> Values:
    model = Net()
    if stages:
        placed(model, stages)
    optimizer = loaded(model, path)
    give_gradients(model, 2)
    optimizer.step()
    return full_state_dict(model)


def trained() -> Values:
    model = reference()
    stepped(model, 3)
    return model.state_dict()


def as_trained(values: Values) -> None:
    for name, expected in trained().items():
        torch.testing.assert_close(values[name], expected)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(("ranks", "stages"), [(2, 2), (4, 2)])
def test_a_checkpoint_is_loaded_by_another_number_of_stages(ranks: int, stages: int, tmp_path: Path) -> None:
    run(ranks, _saved, stages, str(tmp_path))
    for values in [*run(4, _loaded, 4, str(tmp_path)), *run(2, _loaded, 1, str(tmp_path))]:
        as_trained(values)
    as_trained(_loaded(0, str(tmp_path)))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_of_one_process_is_loaded_by_stages(tmp_path: Path) -> None:
    model = reference()
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, stepped(model))}
    dcp.save({**state, "model": get_model_state_dict(model)}, checkpoint_id=tmp_path)
    for values in run(2, _loaded, 2, str(tmp_path)):
        as_trained(values)


def _whole_optimizer_state() -> Values:
    one = reference()
    optimizer = stepped(one)
    full = get_optimizer_state_dict(one, optimizer)
    plain = copy.deepcopy(optimizer.state_dict())
    model = Net()
    placed(model, 2)
    model.load_state_dict(one.state_dict())
    ours = torch.optim.AdamW(model.parameters(), lr=0.01)
    set_optimizer_state_dict(model, ours, full, options=FULL)
    give_gradients(model, 2)
    ours.step()
    values = full_state_dict(model)
    ours.load_state_dict(copy.deepcopy(plain))  # torch.optim's own, of one process
    ours.state_dict()
    assert {id(p) for p in ours.state} == {id(p) for p in model.parameters() if p.requires_grad}
    other = torch.optim.AdamW(model.parameters(), lr=0.01)  # which has not stepped yet
    other.load_state_dict(plain)
    model.load_state_dict(one.state_dict())
    give_gradients(model, 2)
    other.step()
    assert {id(p) for p in other.state} == {id(p) for p in model.parameters() if p.requires_grad}
    assert all(torch.equal(value, values[name]) for name, value in full_state_dict(model).items())
    return values


def _whole_of_an_optimizer(stages: int, frozen: bool) -> None:
    model, one = different(), reference()
    for net in (model, one):
        net.layers[2].requires_grad_(not frozen)
    table = {True: lambda name, stages: frozenset({int(name.startswith("layers.2"))}), False: uses}
    placed(model, stages, used=table[frozen])  # one stage may have nothing to train
    ours, theirs = stepped(model), stepped(one)
    whole_states: Any = get_optimizer_state_dict(model, ours, options=FULL)
    expected: Any = get_optimizer_state_dict(one, theirs)
    assert whole_states["param_groups"] == expected["param_groups"]
    assert whole_states["state"].keys() == expected["state"].keys()
    torch.testing.assert_close(whole_states["state"], expected["state"])
    on_rank0 = StateDictOptions(full_state_dict=True, cpu_offload=True)
    assert bool(get_optimizer_state_dict(model, ours, options=on_rank0)) == (dist.get_rank() == 0)
    sharded: Any = get_optimizer_state_dict(model, ours)
    assert {id(p) for p in ours.state} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(sharded["state"]) == len(ours.state)


@pytest.mark.parametrize(("ranks", "stages", "frozen"), [(2, 2, True), (4, 2, False), (4, 4, False)])
def test_the_whole_state_of_an_optimizer_is_that_of_one_process(ranks: int, stages: int, frozen: bool) -> None:
    run(ranks, _whole_of_an_optimizer, stages, frozen)


def test_whole_states_of_an_optimizer_are_taken() -> None:
    for values in run(4, _whole_optimizer_state):
        as_trained(values)


# -- norms -------------------------------------------------------------------------------------------------------------

NORMS = [2.0, 1.0, 3.0, float("inf"), float("-inf"), 0.0]
NAMES = [name for name, _ in Net().named_parameters()]
Case = tuple[frozenset[str], float, bool | None]


def grads_of(model: nn.Module) -> list[torch.Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def _norms(stages: int, cases: list[Case]) -> None:
    model, truth = different(), reference()
    placed(model, stages)
    for without, norm_type, foreach in cases:
        give_gradients(truth, 0, without)
        expected = get_total_norm(grads_of(truth), norm_type)
        answers = {}
        for name, clip in {"torch": clip_grad_norm_, "torch.nn": nn.utils.clip_grad_norm_}.items():
            give_gradients(model, 0, without)
            answers[name] = clip(model.parameters(), 0.5, norm_type, foreach=foreach)
        for name, params in {"ours": model, "ours, a list": list(model.parameters())}.items():
            give_gradients(model, 0, without)
            answers[name] = dspass.clip_grad_norm_(params, 0.5, norm_type, foreach=foreach)
        clip_grad_norm_(truth.parameters(), 0.5, norm_type)
        for param, one in zip(model.parameters(), truth.parameters(), strict=True):
            if param.grad is not None:
                assert one.grad is not None
                within = 1e-2 if param.dtype == torch.bfloat16 else 3e-3  # norms of its shards are rounded, too
                torch.testing.assert_close(whole(param.grad), one.grad, rtol=within, atol=1e-5)
        give_gradients(model, 0, without)
        answers["of gradients"] = get_total_norm(grads_of(model), norm_type)
        answers["of copies"] = nn.utils.get_total_norm([g.detach() for g in grads_of(model)], norm_type)
        for name, norm in answers.items():
            assert type(norm) is torch.Tensor, name  # a plain one
            torch.testing.assert_close(
                norm, expected.float(), rtol=3e-3, atol=1e-5, msg=f"{name}, {norm_type}: {norm} {expected}"
            )


def _older() -> float:
    older, model = different(), different()
    placed(older, 4)
    placed(model, 2)
    if dist.get_rank():
        del older  # rank 0 still has it, as one that an exception holds
        gc.collect()
    return float(get_total_norm([]))


def test_a_norm_of_nothing_asks_the_model_that_was_divided_last() -> None:
    assert run(4, _older) == [0.0] * 4


@pytest.mark.parametrize(("ranks", "stages"), [(2, 2), (4, 2), (4, 4)])
def test_norms_go_over_all_stages(ranks: int, stages: int) -> None:
    lonely = frozenset(name for name in NAMES if 0 not in uses(name, 4) or name in ("scale", "embed.weight"))
    cases = [(frozenset[str](), norm, foreach) for norm in NORMS for foreach in (None, False)]
    cases += [(lonely, norm, None) for norm in NORMS]  # other stages have no gradient at all
    cases += [(frozenset(NAMES), 2.0, None), (frozenset(NAMES), float("-inf"), None)]
    run(ranks, _norms, stages, cases)


@settings(max_examples=10, deadline=None)
@given(
    cases=st.lists(
        st.tuples(st.frozensets(st.sampled_from(NAMES)), st.sampled_from(NORMS), st.none()), min_size=1, max_size=4
    )
)
def test_norms_of_any_gradients(cases: list[Case]) -> None:
    run(2, _norms, 2, cases)


def _nonfinite() -> list[str]:
    model = different()
    placed(model, 2)
    give_gradients(model)
    if dist.get_rank() == 1:
        model.low.grad.to_local().fill_(float("inf"))  # type: ignore[union-attr]
    return [
        said(lambda: clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)),
        said(lambda: dspass.clip_grad_norm_(model, 1.0, error_if_nonfinite=True)),
    ]


def test_a_norm_that_is_not_finite_is_an_error_on_all_ranks() -> None:
    for texts in run(2, _nonfinite):
        for text in texts:
            assert "RuntimeError" in text
            assert "inf" in text


def _clips_at_a_step(config: dict[str, Any]) -> None:
    """The last stage has frozen parameters only: it has no gradient, no state, and takes part."""
    model, truth = different(), reference()
    for one in (model, truth):
        one.layers[2].requires_grad_(False)
    placed(model, 2, used=lambda name, stages: frozenset({int(name.startswith("layers.2"))}), **config)
    ours, theirs = (torch.optim.SGD(one.parameters(), lr=0.1, momentum=0.9) for one in (model, truth))
    for step in range(2):
        give_gradients(model, step)
        give_gradients(truth, step)
        clip_grad_norm_(truth.parameters(), 0.5)
        ours.step()
        theirs.step()
        get_optimizer_state_dict(model, ours)  # one rank has states, the other one takes a step of nothing to make some
    for name, value in full_state_dict(model).items():
        torch.testing.assert_close(value, truth.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_gradients_are_clipped_at_a_step() -> None:
    run(2, _clips_at_a_step, {"gradient_clipping": 0.5})


def _two_models() -> list[float]:
    """A model without a pipeline beside one: norms of it are its own, also those of both together."""
    pipelined, plain = different(), reference()
    placed(pipelined, 2)
    give_gradients(pipelined)
    give_gradients(plain, 1)
    both = [*pipelined.parameters(), *plain.parameters()]
    return [clip_grad_norm_(plain.parameters(), 1e9).item(), dspass.clip_grad_norm_(both, 1e9).item()]


def test_norms_of_other_models_stay_theirs() -> None:
    one, two = reference(), reference()
    give_gradients(one)
    give_gradients(two, 1)
    alone = get_total_norm(grads_of(two)).item()
    for answers in run(2, _two_models):
        assert answers == pytest.approx([alone, get_total_norm([*grads_of(one), *grads_of(two)]).item()], rel=1e-3)


def test_another_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from dspass.runtime import compat

    monkeypatch.setattr(nn.utils, "get_total_norm", len)
    with pytest.raises(compat.UnsupportedTorchError, match="get_total_norm"):
        compat.extend_total_norm(lambda *args: torch.zeros(()))


# -- loss scales -------------------------------------------------------------------------------------------------------


def _scaled(fused: bool) -> list[Any]:
    """An overflow on one stage, then one while other stages have no gradients, then none."""
    model = different()
    placed(model, dist.get_world_size())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=100)
    answers: list[Any] = []
    for broken, without in ((True, frozenset()), (True, frozenset(NAMES) - {"layers.0.weight"}), (False, frozenset())):
        scaler.scale(torch.ones(1))
        give_gradients(model, 0, without)
        grad = model.get_parameter("layers.0.weight").grad
        if broken and isinstance(grad, DTensor):
            grad.to_local()[0, 0] = float("inf")
        before = full_state_dict(model)
        scaler.step(optimizer)
        scaler.update()
        after = full_state_dict(model)
        answers.append((scaler.get_scale(), {n for n in before if not torch.equal(before[n], after[n])}))
        optimizer.zero_grad()
    return answers


@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_on_one_stage_skips_the_step_on_all(fused: bool) -> None:
    trained = {n for n, p in reference().named_parameters() if p.requires_grad} | {"head.weight"}
    for answers in run(2, _scaled, fused):
        assert answers == [(4.0, set()), (2.0, set()), (2.0, trained)]


# -- tied parameters ---------------------------------------------------------------------------------------------------


def _summed(stages: int) -> None:
    model = different()
    engine = placed(model, stages)
    mine = engine.stages.pipe.rank  # type: ignore[union-attr]
    held: Values = {}
    for spec in engine.specs.values():
        param = spec.param()
        if isinstance(param, DTensor) and spec.trains:
            part = gradient(spec.name, param, 10 + mine)
            held[spec.key] = distribute_tensor(part, param.device_mesh, param.placements, src_data_rank=None).to_local()
    if mine == 0:
        del held[f"{engine.name}/embed.weight"]  # its stage has given it no gradient
    before = dict(held)
    sum_tied(engine, held)
    for key, grad in held.items():
        spec = engine.specs[key]
        assert key not in before or grad is before[key]
        param = spec.param()
        assert isinstance(param, DTensor)
        places = [p for p in (spec.held_by or (mine,)) if not (p == 0 and spec.name == "embed.weight")]
        expected = torch.stack([gradient(spec.name, param, 10 + place) for place in places]).sum(0)
        total = DTensor.from_local(grad, param.device_mesh, param.placements, shape=param.shape, stride=param.stride())
        torch.testing.assert_close(total.full_tensor(), expected)
    tied = {key for key, spec in engine.specs.items() if spec.tied_axis is not None}
    assert tied <= held.keys()
    kinds = {kind for kind, *_ in engine.traffic.current}
    assert kinds == ({"all-reduce"} if tied else set())


@pytest.mark.parametrize(("ranks", "stages"), [(2, 2), (4, 4), (4, 2)])
def test_gradients_of_tied_parameters_are_summed(ranks: int, stages: int) -> None:
    run(ranks, _summed, stages)
