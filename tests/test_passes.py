"""Each pass: golden text, equal numbers, when it declines, what it refuses, and running it twice.

``pytest tests/test_passes.py --golden-update`` rewrites ``tests/golden/<pass>.txt``; read the difference
before keeping it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.fx as fx
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dspass.config import Config, ConfigError
from dspass.passes import devices
from dspass.passes.base import Pass, PassContext, PassError, PassResult, Where, check_order, run_passes
from dspass.passes.bucket_gathers import BucketGathers
from dspass.passes.bucket_reductions import BucketReductions
from dspass.passes.cost import compute_seconds, estimate
from dspass.passes.devices import Device
from dspass.passes.divide_experts import DivideExperts
from dspass.passes.exchange_rows import ExchangeRows
from dspass.passes.expose_parameters import ExposeParameters
from dspass.passes.gather_in_node import GatherInNode
from dspass.passes.global_aux_loss import GlobalAuxLoss
from dspass.passes.hide_exchanges import HideExchanges
from dspass.passes.honour_wishes import HonourWishes
from dspass.passes.nodes import (
    calls,
    dispatch_start,
    exchange_wait,
    gather_start,
    reduce_start,
    reduce_wait,
    specs_of,
    wait_of,
)
from dspass.passes.offload_parameters import OffloadParameters
from dspass.passes.offload_saved import OffloadSaved
from dspass.passes.onednn_products import OnednnProducts
from dspass.passes.partition import save_shards
from dspass.passes.pipeline import DEFAULT
from dspass.passes.prefetch_gathers import PrefetchGathers
from dspass.passes.quantise_exchanges import QuantiseExchanges
from dspass.passes.quantise_gathers import QuantiseGathers
from dspass.passes.quantise_reductions import QuantiseReductions
from dspass.passes.quantise_saved import QuantiseSaved
from dspass.passes.quantised_products import QuantisedProducts
from dspass.passes.release_gathered import ReleaseGathered
from dspass.passes.share_roundings import ShareRoundings
from dspass.passes.split_batch import SplitBatch
from dspass.passes.text import print_graph
from dspass.passes.zero_gather import ZeroGather
from dspass.passes.zero_reduce import ZeroReduce
from dspass.pipeline import build
from dspass.runtime import linear
from dspass.runtime.engine import Engine
from tests import graphs
from tests.graphs import (
    TOYS,
    Toy,
    capture,
    check_numbers,
    check_step,
    copy_graph,
    inputs_of,
    options,
    own_rows,
    run_pipeline,
    saved_of,
    simulate,
    without_scales,
)

GOLDEN = Path(__file__).parent / "golden"

_captured = functools.cache(capture)


def toy_of(name: str, world: int = 0, bucket_bytes: int = 256) -> Toy:
    """Captured once. Unless said otherwise on two ranks, or on four of two nodes, and with buckets of about two of the toys'
    weights: there are several."""
    offload = {"name": "offload_saved", "min_bytes": 0, "bucket_bytes": 100}
    few_bits = {"name": "quantise_saved", "min_bytes": 0}
    passes = ["...", few_bits, offload, {"name": "onednn_products", "min_operations": 0}]
    if name.endswith("routed"):  # behind the exchanges, and before what comes with parameters
        first = [
            "split_batch",
            "divide_experts",
            "expose_parameters",
            "exchange_rows",
            {"name": "hide_exchanges", "anywhere": True},
        ]
        passes = [*first, *passes]
    said = options(bucket_bytes=bucket_bytes, passes=passes)
    if name == "offloaded":
        said["compile"] = {"offload_activation": True}
    if name == "few_bits":
        said["dspass"] |= {"quantise": {"activations": "int8", "block": 16}}
    if name == "quantised_routed":
        said["dspass"] |= {"quantise": {"exchanges": "int8", "block": 16}}
    elif name.startswith("quantised") or name == "in_nodes":
        said["zero_optimization"] |= {"zero_quantized_weights": True, "zero_quantized_gradients": True}
        said["dspass"] |= {"quantise": {"block": 16}}
    if name == "quantised_fed_back":
        said["zero_optimization"] |= {"zeropp_loco_param": {"err_beta": 0.25, "reset_T": 8}}
    if name.startswith("in_node"):
        said["zero_optimization"] |= {"zero_hpz_partition_size": 2}
    if name == "chunks_routed":
        said["dspass"] |= {"experts": {"chunks": 2}}
    if name == "balanced":
        said["dspass"] |= {"experts": {"global_aux_loss": True}}
    if name.endswith("routed"):
        said["expert_parallel"] = {"enabled": True}
    if name == "stored":
        said["dspass"] |= {"quantise": {"layers": {"activations": "int8"}}}
    if name == "rounded":
        said |= {"compression_training": graphs.ROUNDED["compression_training"]}
    if name == "hosted":
        said["zero_optimization"] |= {"offload_param": {"device": "cpu"}}
    return replace(_captured(name, world or (4 if name == "in_nodes" else 2)), config=Config.load(said))


def around(toy: Toy, cls: type[Pass], where: Where) -> tuple[fx.Graph, Pass]:
    """The graph as ``cls`` finds it in the pipeline, and the configured pass."""
    gm = fx.GraphModule(nn.Module(), copy_graph(toy.joint if where == "joint" else toy.raw[where]))
    for item in toy.passes:
        if type(item) is cls:
            return gm.graph, item
        run_passes(gm, [item], PassContext(where=where))
    raise AssertionError(cls)


def apply(item: Pass, graph: fx.Graph, where: Where) -> tuple[fx.Graph, str]:
    """A copy of ``graph`` behind ``item``, checked by the runner, and what the pass said."""
    results: list[PassResult] = []
    gm = run_passes(fx.GraphModule(nn.Module(), copy_graph(graph)), [item], PassContext(where=where), results.append)
    (result,) = results
    return gm.graph, result.summary


def shape_of(graph: fx.Graph) -> list[Any]:
    """The graph without the names of its nodes."""
    number = {node: i for i, node in enumerate(graph.nodes)}
    return [
        (
            node.op,
            str(node.target) if node.op == "call_function" else "",
            [number[a] for a in node.all_input_nodes],
        )
        for node in graph.nodes
    ]


def values(toy: Toy, where: Where) -> dict[str, Any]:
    inputs = inputs_of(toy)
    if where == "backward":
        outputs = simulate(toy.raw["forward"], inputs, toy.world)
        inputs |= saved_of(toy.raw["backward"], outputs)
    return inputs


@dataclass(frozen=True, kw_only=True)
class Case:
    """How one pass is tested: on which graphs it has golden text, and where it has nothing to do and says
    what."""

    golden: tuple[tuple[str, Where], ...]
    declines: tuple[str, Where, str]
    options: dict[str, Any] = field(default_factory=dict)


CASES: dict[type[Pass], Case] = {
    SplitBatch: Case(golden=(("parts_routed", "captured"),), declines=("mlp", "captured", "the batch is in one part")),
    DivideExperts: Case(
        golden=(("routed", "captured"), ("chunks_routed", "captured")),
        declines=("mlp", "captured", "expert_parallel is not enabled"),
    ),
    GlobalAuxLoss: Case(
        golden=(("balanced", "captured"),),
        declines=("mlp", "captured", "each rank's auxiliary loss is of its own tokens"),
    ),
    HideExchanges: Case(
        golden=(
            ("routed", "forward"),
            ("routed", "backward"),
            ("chunks_routed", "forward"),
            ("chunks_routed", "backward"),
        ),
        declines=("routed", "forward", "the device does not compute while it sends"),
        options={"anywhere": False},
    ),
    ExchangeRows: Case(
        golden=(
            ("routed", "forward"),
            ("routed", "backward"),
            ("parts_routed", "forward"),
            ("parts_routed", "backward"),
        ),
        declines=("mlp", "forward", "no rows go to experts on other ranks"),
    ),
    ExposeParameters: Case(
        golden=(("tied", "joint"),), declines=("mlp", "forward", "no sharded parameter is read here")
    ),
    HonourWishes: Case(golden=(("wished", "joint"),), declines=("mlp", "joint", "no value is marked")),
    ReleaseGathered: Case(
        golden=(("early_views", "forward"),),
        declines=("tied", "forward", "each view of a parameter stands where it is used"),
    ),
    ZeroGather: Case(
        golden=(("uneven", "forward"), ("tied", "backward")),
        declines=("mlp", "joint", "no parameter is read here"),
    ),
    BucketGathers: Case(golden=(("mlp", "forward"),), declines=("uneven", "backward", "1 gathers: nothing to join")),
    PrefetchGathers: Case(
        golden=(("mlp", "forward"),),
        declines=("mlp", "forward", "switched off by distance 0"),
        options={"distance": 0},
    ),
    ZeroReduce: Case(golden=(("tied", "backward"),), declines=("mlp", "forward", "no gradient of a parameter here")),
    BucketReductions: Case(golden=(("mlp", "backward"),), declines=("mlp", "forward", "no reductions here")),
    OffloadParameters: Case(
        golden=(("hosted", "forward"), ("hosted", "backward")),
        declines=("mlp", "forward", "no shard waits on the host"),
    ),
    GatherInNode: Case(
        golden=(("in_node", "forward"), ("in_node", "backward")),
        declines=("mlp", "forward", "no second shard in the node"),
    ),
    QuantiseGathers: Case(
        golden=(("quantised", "forward"), ("quantised_uneven", "backward")), declines=("mlp", "forward", "switched off")
    ),
    QuantiseReductions: Case(
        golden=(("quantised_uneven", "backward"), ("in_nodes", "backward"), ("quantised_fed_back", "backward")),
        declines=("mlp", "backward", "switched off"),
    ),
    QuantiseExchanges: Case(
        golden=(("quantised_routed", "forward"), ("quantised_routed", "backward")),
        declines=("routed", "forward", "switched off"),
    ),
    QuantiseSaved: Case(
        golden=(("few_bits", "forward"), ("few_bits", "backward")), declines=("mlp", "forward", "switched off")
    ),
    OffloadSaved: Case(
        golden=(("offloaded", "forward"), ("offloaded", "backward")),
        declines=("mlp", "forward", "every saved value stays on the device"),
    ),
    QuantisedProducts: Case(
        golden=(("stored", "joint"),),
        declines=("mlp", "forward", "no weight is stored in few bits"),
    ),
    ShareRoundings: Case(
        golden=(("rounded", "joint"),),
        declines=("mlp", "forward", "nothing is rounded while it trains"),
    ),
    OnednnProducts: Case(
        golden=(("mlp", "forward"), ("mlp", "backward")),
        declines=("mlp", "forward", "0 of 4 products by oneDNN"),
        options={"min_operations": 10**7},
    ),
}

PASSES = pytest.mark.parametrize("cls", DEFAULT, ids=lambda cls: cls.name)


@pytest.fixture(scope="module", autouse=True)
def _not_the_first_capture() -> None:
    """In a process's first graph DTensor's mesh is one object, and two equal ones from the second on: a golden text that
    depended on which test runs first would be of no use."""
    toy_of("tied")


@PASSES
def test_golden(cls: type[Pass], golden_update: bool) -> None:
    if torch.__version__.split(".")[:2] != ["2", "13"]:
        pytest.skip(f"golden texts are of torch 2.13, and this is {torch.__version__}")
    parts = []
    for name, where in CASES[cls].golden:
        toy = toy_of(name)
        before, item = around(toy, cls, where)
        after, said = apply(item, before, where)
        text = f"# {name}, {where}: {said}\n\n# before\n{print_graph(before)}\n\n# after\n{print_graph(after)}\n"
        parts.append(text.replace(f"{toy.engine.name}/", ""))
    text, path = "\n".join(parts), GOLDEN / f"{cls.name}.txt"
    if golden_update:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert path.exists(), f"{path} is missing: run pytest {__file__} --golden-update and read what it writes"
    assert text == path.read_text(), (
        f"{cls.name} writes another graph than {path}; if it should, run with --golden-update"
    )


@PASSES
def test_the_numbers_stay(cls: type[Pass]) -> None:
    seen = 0
    for name in (
        "mlp",
        "tied",
        "early_views",
        "uneven",
        "wished",
        "offloaded",
        "few_bits",
        "hosted",
        "in_node",
        "in_nodes",
        "quantised",
        "quantised_uneven",
        "stored",
        "routed",
        "chunks_routed",
        "parts_routed",
        "quantised_routed",
        "balanced",
        "rounded",
        "quantised_fed_back",
    ):
        toy = toy_of(name)
        for where in sorted(cls.where):
            before, item = around(toy, cls, where)
            after, _ = apply(item, before, where)
            seen += print_graph(after) != print_graph(before)
            inputs = values(toy, where)
            old, new = simulate(before, inputs, toy.world), simulate(after, inputs, toy.world)
            for one, other in zip(without_scales(after, new), without_scales(before, old), strict=True):
                ours = [own_rows(a, b, rank) for rank, (a, b) in enumerate(zip(one, other, strict=True))]
                torch.testing.assert_close(ours, list(other), rtol=2e-6, atol=5e-7)
    assert seen, "the toys give this pass nothing to do"


@PASSES
def test_declines(cls: type[Pass]) -> None:
    name, where, wanted = CASES[cls].declines
    toy = toy_of(name)
    if where in cls.where:
        graph, item = around(toy, cls, where)
    else:
        # Not its kind of graph, which the runner would not even show it: called by hand it leaves it alone.
        graph, item = copy_graph(toy.joint if where == "joint" else toy.raw[where]), cls()
        run_passes(fx.GraphModule(nn.Module(), graph), [i for i in toy.passes if where == "forward"], PassContext())
    item = replace(item, **CASES[cls].options)
    before, ctx = print_graph(graph), PassContext(where=where)
    item.run(graph, ctx)
    assert ctx.said == [wanted]
    assert print_graph(graph) == before


@PASSES
def test_twice_is_once(cls: type[Pass]) -> None:
    for name in TOYS:
        toy = toy_of(name)
        for where in sorted(cls.where):
            before, item = around(toy, cls, where)
            once, _ = apply(item, before, where)
            twice, _ = apply(item, once, where)
            assert shape_of(twice) == shape_of(once)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ([ZeroGather], r"'zero_gather' requires \['exposed parameters'\].*add a pass that provides it"),
        ([ZeroGather, ExposeParameters], r"'zero_gather' requires .*: put expose_parameters before it"),
        (
            [ReleaseGathered, ExposeParameters],
            r"'release_gathered' requires .*: put expose_parameters before it",
        ),
        (
            [ExposeParameters, BucketGathers, ZeroGather],
            r"'bucket_gathers' requires \['gathers'\].*put zero_gather before",
        ),
        (
            [ExposeParameters, ZeroGather, PrefetchGathers],
            r"'prefetch_gathers' requires \['bucketed gathers'\]",
        ),
        (
            [BucketReductions, ZeroReduce],
            r"'bucket_reductions' requires \['reductions'\].*put zero_reduce before it",
        ),
    ],
)
def test_refuses_an_order(order: list[type[Pass]], message: str) -> None:
    with pytest.raises(PassError, match=message):
        check_order([cls() for cls in order])


def test_every_pass_of_the_pipeline_has_a_case() -> None:
    assert set(CASES) == set(DEFAULT)


@pytest.mark.parametrize(
    ("name", "world"), [*((name, 0) for name in TOYS), ("uneven", 3), ("mlp", 3), ("tied", 4), ("uneven", 4)]
)
def test_the_pipeline_trains_as_one_process(name: str, world: int) -> None:
    check_step(toy_of(name, world))


@pytest.mark.parametrize("bucket_bytes", [1, 100_000])
@pytest.mark.parametrize("name", ["mlp", "early_views", "tied"])
def test_bucket_sizes_change_only_when_things_travel(name: str, bucket_bytes: int) -> None:
    check_step(toy_of(name, 2, bucket_bytes))


# -- options of passes ---------------------------------------------------------------------------------------


def test_a_bucket_holds_no_more_than_its_limits() -> None:
    toy = toy_of("mlp")
    graph, _ = around(toy, BucketGathers, "forward")
    for item, limit in (
        (BucketGathers(bucket_bytes=10**6, max_elements=40), 40),
        (BucketGathers(bucket_bytes=160), 40),
    ):
        after, _ = apply(item, graph, "forward")
        sizes = [[v.numel() for v in start.meta["val"]] for start in calls(after, gather_start)]
        assert any(len(s) > 1 for s in sizes)
        assert all(sum(s) <= limit or len(s) == 1 for s in sizes)
    after, said = apply(BucketGathers(bucket_bytes=1), graph, "forward")
    assert said == "6 gathers in 6 buckets"
    assert print_graph(after) == print_graph(graph)


def test_two_models_in_one_graph_share_no_bucket() -> None:
    """Each keeps its own gathered copies, waiting gradients and counters."""
    toy = toy_of("mlp")
    gathers, _ = around(toy, BucketGathers, "forward")
    reductions, _ = around(toy, BucketReductions, "backward")
    theirs = [spec for key, spec in toy.engine.specs.items() if "/tail." in key]
    other = Engine(stage=3)
    try:
        for spec in theirs:
            spec.engine = other
        for graph, item, where, start in (
            (gathers, BucketGathers(bucket_bytes=10**6), "forward", gather_start),
            (reductions, BucketReductions(bucket_bytes=10**6), "backward", reduce_start),
        ):
            after, _ = apply(item, graph, where)
            buckets = [set(node.args[1]) for node in calls(after, start)]
            assert {spec.key for spec in theirs} in buckets
    finally:
        for spec in theirs:
            spec.engine = toy.engine


def test_reductions_are_bounded_too() -> None:
    graph, _ = around(toy_of("mlp"), BucketReductions, "backward")
    after, _ = apply(BucketReductions(max_elements=40), graph, "backward")
    # The gradients are whole before they are reduced.
    sizes = [[n.meta["val"].numel() for n in start.args[0]] for start in calls(after, reduce_start)]
    assert any(len(s) > 1 for s in sizes)
    assert all(sum(s) <= 40 or len(s) == 1 for s in sizes)


@pytest.mark.parametrize("distance", [1, 2, 3, 10])
def test_prefetching_keeps_the_order_of_gathers(distance: int) -> None:
    toy = toy_of("mlp", 2, 1)
    graph, _ = around(toy, PrefetchGathers, "forward")
    after, said = apply(PrefetchGathers(distance=distance), graph, "forward")
    keys = [start.args[1] for start in sorted(calls(graph, gather_start))]
    assert [start.args[1] for start in sorted(calls(after, gather_start))] == keys
    assert said == f"6 gathers start {distance} bucket{'s' * (distance > 1)} early"
    graphs.check_liveness(after, distance)
    old, new = (simulate(g, inputs_of(toy), 2) for g in (graph, after))
    torch.testing.assert_close(new, old, rtol=0, atol=0)


def test_prefetching_obeys_the_limit_on_live_parameters() -> None:
    graph, _ = around(toy_of("mlp", 2, 1), PrefetchGathers, "forward")
    after, said = apply(PrefetchGathers(max_live_elements=1), graph, "forward")
    assert said == "0 gathers start 1 bucket early, 6 not, to keep live parameters under the limit"
    assert print_graph(after) == print_graph(graph)
    _, said = apply(PrefetchGathers(max_live_elements=40), graph, "forward")
    assert said == "5 gathers start 1 bucket early, 1 not, to keep live parameters under the limit"


@pytest.mark.parametrize("most", [1, 40, 60, 1000])
def test_gathers_that_start_as_late_as_hides_them_obey_the_limit_too(most: int) -> None:
    graph, _ = around(toy_of("mlp", 2, 1), PrefetchGathers, "forward")
    slow = dataclasses.replace(devices.DEVICES["h100"], link=1e6, node_link=1e6)
    after, said = apply(PrefetchGathers(max_live_elements=most, hidden_by=slow), graph, "forward")
    order = {node: i for i, node in enumerate(after.nodes)}
    starts = sorted(calls(after, gather_start))
    sizes = [sum(s.numel for s in specs_of(start)) for start in starts]
    arrivals = [order[wait_of(start)] for start in starts]
    for i, start in enumerate(starts):
        in_use = max((j for j in range(i) if arrivals[j] < order[start]), default=0)
        early = any(n.op == "call_function" and n not in starts for n in list(after.nodes)[order[start] : arrivals[i]])
        assert not early or sum(sizes[in_use : i + 1]) <= most
    assert ("to keep live parameters under the limit" in said) == (most < 1000)


def test_products_that_are_made_of_each_other_stay_in_order_while_rows_travel() -> None:
    graph = fx.Graph()
    x, splits = (graph.placeholder(name) for name in ("x", "splits"))

    def call(target: Any, *args: Any) -> fx.Node:
        node = graph.call_function(target, args)
        node.meta["val"] = torch.empty(4, 4)
        return node

    for node in (x, splits):
        node.meta["val"] = torch.empty(4, 4)
    first = call(torch.ops.aten.mm.default, x, x)
    second = call(torch.ops.aten.mm.default, first, x)
    third = call(torch.ops.aten.tanh.default, second)
    start = call(dispatch_start, [x], splits, "m/w")
    wait = call(exchange_wait, start)
    item = call(operator.getitem, wait, 0)
    graph.output((call(torch.ops.aten.add.Tensor, item, third),))
    after, said = apply(HideExchanges(anywhere=True), graph, "forward")
    assert [n.name for n in after.nodes if n.op == "call_function"] == [
        "dispatch_start", "mm_default", "mm_default_1", "tanh_default", "exchange_wait", "getitem", "add_tensor",
    ]  # fmt: skip
    assert said == "1 product runs while rows of 1 all-to-all travel"


def test_a_view_of_a_view_is_made_at_its_use() -> None:
    graph = fx.Graph()
    local, whole, x = (graph.placeholder(name) for name in ("local", "whole", "x"))
    for node, shape in ((local, (2, 4)), (whole, (4, 4)), (x, (4, 4))):
        node.meta["val"] = torch.empty(shape)
    whole.meta["dspass_gathered"] = ("m/w", "local")

    def call(target: Any, *args: Any) -> fx.Node:
        node = graph.call_function(target, args)
        node.meta["val"] = torch.empty(4, 4)
        return node

    view = call(torch.ops.aten.view.default, whole, [4, 4])
    turned = call(torch.ops.aten.permute.default, view, [1, 0])
    early = call(torch.ops.aten.mm.default, x, x)
    late = call(torch.ops.aten.mm.default, early, turned)
    graph.output((call(torch.ops.aten.mm.default, late, turned),))
    after, said = apply(ReleaseGathered(), graph, "forward")
    assert said == "2 views made where they are used"
    assert [n.target.__name__ for n in after.nodes if n.op == "call_function"] == [
        "mm.default",
        "view.default",
        "permute.default",
        "mm.default",
        "view.default",
        "permute.default",
        "mm.default",
    ]


def test_a_parameter_held_whole_is_cast_where_it_is_used() -> None:
    toy = toy_of("uneven")
    spec = toy.engine.specs[f"{toy.engine.name}/scale"]
    graph, item = around(toy, ZeroGather, "forward")
    try:
        spec.compute_dtype = torch.bfloat16
        after, said = apply(item, graph, "forward")
    finally:
        spec.compute_dtype = torch.float32
    (cast,) = calls(after, torch.ops.prims.convert_element_type.default)
    assert cast.args[1] is torch.bfloat16
    assert said == "3 gathers, 2 parameters held whole"


def test_no_overlap_waits_at_once() -> None:
    toy = toy_of("mlp")
    graph, _ = around(toy, BucketReductions, "backward")
    after, _ = apply(BucketReductions(bucket_bytes=128, in_flight=0), graph, "backward")
    assert len(calls(after, reduce_start)) > 2
    assert all(start.next is wait_of(start) for start in calls(after, reduce_start))
    old, new = (simulate(g, values(toy, "backward"), 2) for g in (graph, after))
    torch.testing.assert_close(new, old, rtol=0, atol=0)


@pytest.mark.parametrize("in_flight", [1, 2, 5])
def test_waits_stand_where_a_later_bucket_starts(in_flight: int) -> None:
    graph, _ = around(toy_of("mlp"), BucketReductions, "backward")
    after, _ = apply(BucketReductions(bucket_bytes=128, in_flight=in_flight), graph, "backward")
    flying = most = 0
    for node in after.nodes:
        flying += (node.target is reduce_start) - (node.target is reduce_wait)
        most = max(most, flying)
    assert most == min(in_flight, len(calls(after, reduce_start)))


def test_no_overlap_is_a_working_configuration() -> None:
    config = options(bucket_bytes=128)
    config["zero_optimization"]["overlap_comm"] = False
    toy = replace(toy_of("mlp"), config=Config.load(config))
    graphs.check_numbers(toy, graphs.run_pipeline(toy))


@pytest.mark.parametrize("target", [None, "cpu", "h100"])
def test_products_of_a_prediction_for_another_device_stay(target: str | None) -> None:
    graph, item = around(toy_of("mlp"), OnednnProducts, "forward")
    after = item.run(copy_graph(graph), PassContext(target=target))
    assert len(calls(after, linear.LINEAR)) == (0 if target == "h100" else 4)


@pytest.mark.parametrize(
    ("left", "right", "options", "taken"),
    [
        (torch.empty(8, 4), torch.empty(4, 6), {}, True),
        (torch.empty(8, 4), torch.empty(6, 4).t(), {}, True),
        (torch.empty(4, 8).t(), torch.empty(4, 6), {}, False),  # oneDNN would copy it
        (torch.empty(8, 4, dtype=torch.bfloat16), torch.empty(4, 6, dtype=torch.bfloat16), {}, False),
        (torch.empty(8, 4, device="meta"), torch.empty(4, 6, device="meta"), {}, False),
        (torch.empty(8, 4), torch.empty(4, 6), {"min_operations": 2 * 8 * 4 * 6}, True),
        (torch.empty(8, 4), torch.empty(4, 6), {"min_operations": 2 * 8 * 4 * 6 + 1}, False),
    ],
)
def test_which_products_are_taken(
    left: torch.Tensor, right: torch.Tensor, options: dict[str, int], taken: bool
) -> None:
    graph = fx.Graph()
    nodes = [graph.placeholder("left"), graph.placeholder("right")]
    nodes.append(graph.call_function(torch.ops.aten.mm.default, tuple(nodes)))
    for node, value in zip(nodes, (left, right, left @ right), strict=True):
        node.meta["val"] = value
    graph.output((nodes[-1],))
    OnednnProducts(**{"min_operations": 0, **options}).run(graph, PassContext())
    assert len(calls(graph, linear.LINEAR)) == taken


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("rows", "inner", "columns"), [(64, 40, 24), (1, 7, 3), (5, 1, 1), (0, 4, 4)])
def test_the_product_operator(rows: int, inner: int, columns: int, turned: bool, bias: bool) -> None:
    x, weight = torch.randn(rows, inner), torch.randn(inner, columns).t() if turned else torch.randn(columns, inner)
    arguments = (x, weight, torch.randn(columns) if bias else None)
    torch.testing.assert_close(linear.LINEAR(*arguments), torch.nn.functional.linear(*arguments))
    torch.library.opcheck(linear.LINEAR, arguments, test_utils=("test_schema", "test_faketensor"))


def test_operations_of_a_product_are_counted() -> None:
    with FlopCounterMode(display=False) as counter:
        linear.LINEAR(torch.randn(8, 4), torch.randn(6, 4), None)
    assert counter.get_total_flops() == 2 * 8 * 4 * 6


def test_a_gradient_that_is_used_in_the_graph_travels_alone() -> None:
    """Joined with later ones it would be read before its bucket is complete."""
    toy = toy_of("mlp")
    graph, _ = around(toy, BucketReductions, "backward")
    start = sorted(calls(graph, reduce_start))[2]
    (item,) = wait_of(start).users
    with graph.inserting_after(item):
        double = graph.call_function(torch.ops.aten.mul.Tensor, (item, 2.0))
    double.meta["val"] = item.meta["val"]
    item.replace_all_uses_with(double, delete_user_cb=lambda user: user is not double)
    after, said = apply(BucketReductions(bucket_bytes=10**6), graph, "backward")
    assert said == "7 reductions in 3 buckets"
    assert start.args[1] in [list(s.args[1]) for s in calls(after, reduce_start)]
    old, new = (simulate(g, values(toy, "backward"), 2) for g in (graph, after))
    torch.testing.assert_close(new, old, rtol=0, atol=0)


def test_what_is_made_of_parameters_is_made_again_where_the_backward_reads_it() -> None:
    """At the top of the backward graph every parameter of it would be gathered there."""
    forward, backward = fx.Graph(), fx.Graph()
    nodes = {}
    for name, shape in (("local", (2, 4)), ("x", (4, 4)), ("whole", (4, 4))):
        nodes[name] = forward.placeholder(name)
        nodes[name].meta["val"] = torch.empty(shape)
    nodes["whole"].meta["dspass_gathered"] = ("m/w", "local")
    made = forward.call_function(torch.ops.aten.tanh.default, (nodes["whole"],))
    result = forward.call_function(torch.ops.aten.mm.default, (nodes["x"], made))
    forward.output((result, made, nodes["x"]))
    saved, x, tangent = (backward.placeholder(n) for n in ("tanh", "x", "tangents_1"))
    for node in (made, result, saved, x, tangent):
        node.meta["val"] = torch.empty(4, 4)
    first = backward.call_function(torch.ops.aten.mm.default, (tangent, x))
    backward.output((backward.call_function(torch.ops.aten.mm.default, (first, saved)),))
    save_shards(forward, backward, 1)
    forward.lint()
    backward.lint()
    assert [n.name for n in forward.find_nodes(op="output")[0].args[0]] == ["mm_default", "x", "local"]
    assert [n.name for n in backward.nodes if n.op != "output"] == [
        "x",
        "local",
        "tangents_1",
        "whole_again",
        "mm_default",
        "tanh_default",
        "mm_default_1",
    ]


# -- the runner ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Doubler(Pass):
    """Somebody else's pass: counts, and doubles what the forward answers where ``factor`` says so."""

    name: ClassVar[str] = "doubler"
    where: ClassVar[frozenset[Where]] = frozenset({"forward"})
    keeps_numbers: ClassVar[bool] = False

    factor: float = 1.0

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        output = graph.find_nodes(op="output")[0]
        first = output.args[0][0]
        with graph.inserting_before(output):
            node = graph.call_function(torch.ops.aten.mul.Tensor, (first, self.factor))
        node.meta["val"] = first.meta["val"]
        output.args = ((node, *output.args[0][1:]),)
        ctx.say(f"times {self.factor}")
        return graph


@dataclass(frozen=True, kw_only=True)
class Alone(Doubler):
    name: ClassVar[str] = "alone"
    conflicts: ClassVar[frozenset[str]] = frozenset({"zero_reduce"})


@dataclass(frozen=True, kw_only=True)
class Forgetful(Pass):
    """Leaves what ``mistake`` says."""

    name: ClassVar[str] = "forgetful"
    mistake: Callable[[fx.Graph], object] = lambda graph: None

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        self.mistake(graph)
        return graph


def _no_value(graph: fx.Graph) -> None:
    with graph.inserting_before(graph.find_nodes(op="output")[0]):
        graph.call_function(torch.ops.aten.ones.default, ([2],))


def _too_late(graph: fx.Graph) -> None:
    sums = calls(graph, torch.ops.aten.sum.default)[0]
    sums.append(sums.all_input_nodes[0])


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (_no_value, r"'forgetful' left node 'ones_default' without meta\['val'\]"),
        (_too_late, r"'forgetful' left a graph that does not lint: .*used before it has been defined"),
    ],
)
def test_the_runner_names_the_pass_that_broke_a_graph(mistake: Callable[[fx.Graph], object], message: str) -> None:
    graph = copy_graph(toy_of("mlp").raw["forward"])
    with pytest.raises(PassError, match=message):
        run_passes(fx.GraphModule(nn.Module(), graph), [Forgetful(mistake=mistake)], PassContext())


def test_the_runner_records_what_each_pass_did() -> None:
    step = graphs.run_pipeline(toy_of("mlp"))
    assert [r.name for r in step.results if r.where == "joint"] == [p.name for p in DEFAULT if "joint" in p.where]
    assert [r.name for r in step.results if r.where == "forward"] == [p.name for p in DEFAULT if "forward" in p.where]
    assert [r.name for r in step.results if r.where == "backward"] == [p.name for p in DEFAULT if "backward" in p.where]
    for result in step.results:
        assert result.changed == (result.before != result.after)
        assert result.summary
        assert result.keeps_numbers  # no pass that changes them is on
        assert result.seconds >= 0
    chain = [r for r in step.results if r.where == "backward"]
    assert all(first.after == second.before for first, second in itertools.pairwise(chain))


def test_a_pass_that_conflicts_is_refused_by_name() -> None:
    with pytest.raises(PassError, match=r"'alone' cannot stand in one list with \['zero_reduce'\]: drop one of them"):
        check_order([ZeroReduce(), Alone()])


# -- the person's own list -----------------------------------------------------------------------------------


def listed(*entries: Any) -> list[str]:
    return [p.name for p in build(Config.load(options(passes=list(entries))))]


def test_passes_are_added_dropped_and_reordered() -> None:
    names = [p.name for p in DEFAULT]
    assert listed("...") == names
    assert listed("...", "-prefetch_gathers") == [n for n in names if n != "prefetch_gathers"]
    assert listed("zero_reduce", "...") == ["zero_reduce", *(n for n in names if n != "zero_reduce")]
    assert listed("...", "tests.test_passes:Doubler") == [*names, "doubler"]
    assert listed("expose_parameters", "zero_gather", "zero_reduce") == [
        "expose_parameters",
        "zero_gather",
        "zero_reduce",
    ]
    assert [p.name for p in build(Config.load(options()))] == names


def test_shards_that_wait_on_the_host_travel_in_few_bits_as_well() -> None:
    toy = toy_of("hosted", 2, 100_000)
    said = toy.config.to_dict()
    said["zero_optimization"] |= {"zero_quantized_weights": True, "zero_quantized_gradients": True}
    step = check_step(replace(toy, config=Config.load(said)))
    formats = [start.args[2] for graph in (step.forward, step.backward) for start in calls(graph, gather_start)]
    assert formats == ["int8"] * len(formats)


def test_a_quantised_bucket_is_joined_moved_and_fed_by_nobody() -> None:
    toy = toy_of("quantised")
    for where in ("forward", "backward"):
        graph, item = around(toy, QuantiseGathers, where)
        packed, _ = apply(item, graph, where)
        if where == "backward":
            packed, _ = apply(around(toy, QuantiseReductions, where)[1], packed, where)
        # A bias that is held whole is reduced as well, unquantised: its wait stays where it is with in_flight=0.
        for other in (BucketGathers(), PrefetchGathers(), BucketReductions(in_flight=0), OffloadParameters()):
            if where in other.where:
                after, _ = apply(other, packed, where)
                assert print_graph(after) == print_graph(packed)


def test_options_of_a_pass_overrule_the_configuration() -> None:
    config = options(passes=["...", {"name": "prefetch_gathers", "distance": 3}], bucket_bytes=77)
    passes = {p.name: p for p in build(Config.load(config))}
    assert passes["prefetch_gathers"] == PrefetchGathers(distance=3)
    assert passes["bucket_gathers"].options()["bucket_bytes"] == 77


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["zero_gahter"], "there is no pass 'zero_gahter'.*did you mean 'zero_gather'"),
        (["...", "-nothing"], "there is no pass 'nothing'"),
        (["...", "no.such.module:Pass"], "cannot be imported.*importable on every rank"),
        (["...", "tests.test_passes:NoSuchPass"], "cannot be imported"),
        (["...", "tests.test_passes:Case"], "is not a pass.*dspass.passes.base.Pass"),
        (["...", {"name": "zero_gather", "colour": 1}], "zero_gather.colour.*no such option"),
    ],
)
def test_a_wrong_list_says_what_is_wrong(entries: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        build(Config.load(options(passes=entries)))


def test_a_list_in_an_impossible_order_is_refused() -> None:
    with pytest.raises(PassError, match="put zero_gather before it"):
        build(Config.load(options(passes=["expose_parameters", "bucket_gathers", "zero_gather"])))


def test_a_third_party_pass_runs_through_torch_compile() -> None:
    """From the options of ``torch.compile`` to the number that comes out, on one rank and without a process
    group."""
    model, x = TOYS["mlp"](), torch.randn(3, 4)
    config = {
        "zero_optimization": {"stage": 0},
        "dspass": {"passes": ["...", {"name": "tests.test_passes:Doubler", "factor": 2.0}]},
    }
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=_backend(), options=config)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), 2 * model(x))
    torch._dynamo.reset()


def _backend() -> Any:
    import dspass

    return dspass.deepspeed


@pytest.mark.parametrize(
    "entries",
    [
        ["expose_parameters", "zero_gather", "zero_reduce"],
        ["...", "-bucket_gathers", "-prefetch_gathers"],
        ["...", "-bucket_reductions", "-release_gathered"],
        ["zero_reduce", "bucket_reductions", "..."],
    ],
)
def test_any_allowed_list_trains_alike(entries: list[str]) -> None:
    toy = toy_of("mlp")
    passes = build(Config.load(options(passes=entries, bucket_bytes=256)))
    graphs.check_numbers(toy, graphs.run_pipeline(toy, passes))


@pytest.mark.parametrize("host_link", [1e3, 3e4, 1e6, 3e7])
@pytest.mark.parametrize("bucket", [1, 121, 300])
def test_copies_that_are_hidden_expose_no_more_and_change_nothing(host_link: float, bucket: int) -> None:
    """Copies that are waited for where they have arrived, and that start as late as hides them, expose no more than one after
    another, but for what a wait that divides a kernel moves; and the numbers are the same."""
    rates = {"memory": 1e6, "link": 1e15, "latency": 0.0, "host_link": host_link}
    on = Device(name="x", rates={torch.float32: 1e6}, overlaps=True, **rates)
    toy, exposed, longest = toy_of("offloaded"), {}, 0.0
    for hidden_by in (None, on):
        offload = OffloadSaved(enabled=True, min_bytes=0, bucket_bytes=bucket, hidden_by=hidden_by)
        passes = [offload if isinstance(p, OffloadSaved) else p for p in toy.passes]
        step = run_pipeline(toy, passes, target="h100")
        check_numbers(toy, step)
        longest = max(longest, *(s for g in (step.forward, step.backward) for s in compute_seconds(g, on).values()))
        halves = (estimate(graph, on).exposed for graph in (step.forward, step.backward))
        exposed[hidden_by is on] = sum(
            seconds for half in halves for (kind, _), seconds in half.items() if kind in ("offload", "reload")
        )
    assert exposed[True] <= exposed[False] + longest
