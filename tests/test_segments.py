"""Lowering keeps a graph's meaning: random graphs run in segments as they run whole.

The compiler here compiles nothing, it runs the segment's graph; what Inductor makes of a segment is
Inductor's to test. Parameters live on an axis of one rank, so that the runtime's own nodes run without a
process group.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.fx as fx
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.multiprocessing.reductions import StorageWeakRef

from dspass.engines import engine_of
from dspass.lowering.segments import SegmentCompiler, lower, segment_key, sink_enlarged, sink_views
from dspass.passes.kernels import is_view, size_of
from dspass.runtime import compat
from dspass.runtime.axis import Axis
from dspass.runtime.collectives import RUNTIME_FUNCTIONS, gather_start, gather_wait, reduce_start, reduce_wait
from dspass.runtime.engine import Engine
from dspass.runtime.params import ParamSpec
from dspass.runtime.program import Probe, Program
from tests.graphs import as_written, copy_graph

aten = torch.ops.aten
PARAMETERS = 3


def new_engine() -> Engine:
    engine = Engine(stage=3)
    axis = Axis(name="data", group=None, size=1, rank=0, ranks=(0,), backend="none")  # type: ignore[arg-type]
    for i in range(PARAMETERS):
        # Another precision on the way: else one rank's reduced gradient is the gradient, and lives as long.
        engine.add(
            ParamSpec(
                key=f"{engine.name}/{i}",
                name=str(i),
                shape=(4, 4),
                dtype=torch.float32,
                compute_dtype=torch.float32,
                reduce_dtype=torch.float64,
                layout="shard",
                shard_axis=axis,
                replicate_axis=None,
                trains=True,
                engine=engine,
            )
        )
    return engine


class Builder:
    """Writes a graph node by node; every tensor in it is 4 by 4."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.graph = engine, fx.Graph()
        self.inputs = [self._typed(self.graph.placeholder(f"x{i}")) for i in range(2)]
        self.shards = [self._typed(self.graph.placeholder(f"shard{i}")) for i in range(PARAMETERS)]

    @staticmethod
    def _typed(node: fx.Node) -> fx.Node:
        node.meta["val"] = torch.empty(4, 4)
        return node

    def call(self, target: Callable[..., Any], *args: Any) -> fx.Node:
        node = self.graph.call_function(target, args)
        if target in RUNTIME_FUNCTIONS:
            node.meta["val"] = [torch.empty(4, 4)]
        else:
            node.meta["val"] = target(*fx.map_arg(args, lambda n: n.meta["val"]))
        return node

    def start(self, begin: Callable[..., Any], tensor: fx.Node, which: int) -> fx.Node:
        return self.call(begin, [tensor], [f"{self.engine.name}/{which}"])

    def end(self, start: fx.Node) -> fx.Node:
        wait = self.call(gather_wait if start.target is gather_start else reduce_wait, start)
        return self.call(operator.getitem, wait, 0)

    def module(self, *outputs: Any) -> fx.GraphModule:
        self.graph.output(outputs)
        return fx.GraphModule(nn.Module(), self.graph)


#: How a random graph goes on: an operation and which of the values at hand it takes.
STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["add", "mm", "relu", "permute", "alias", "split", "enlarge", "gather", "reduce", "wait", "wait"]
        ),
        st.integers(0, 30),
        st.integers(0, 30),
    ),
    min_size=1,
    max_size=20,
)


def random_graph(engine: Engine, steps: Sequence[tuple[str, int, int]], outputs: Sequence[int]) -> fx.GraphModule:
    build = Builder(engine)
    values, pending = list(build.inputs), []
    for operation, i, j in steps:
        a, b = values[i % len(values)], values[j % len(values)]
        if operation in ("gather", "reduce"):
            which = j % PARAMETERS
            pending.append(
                build.start(gather_start, build.shards[which], which)
                if operation == "gather"
                else build.start(reduce_start, a, which)
            )
        elif operation == "wait":
            if pending:
                values.append(build.end(pending.pop(i % len(pending))))
        elif operation == "enlarge":
            rows = build.call(aten.sum.dim_IntList, a, [1], True)
            values.append(build.call(aten.sin.default, build.call(aten.expand.default, rows, [4, 4])))
        elif operation == "split":
            parts = build.call(aten.split.Tensor, a, 2)
            values.append(build.call(aten.cat.default, [build.call(operator.getitem, parts, k) for k in (1, 0)]))
        else:
            values.append(
                {
                    "add": lambda a=a, b=b: build.call(aten.add.Tensor, a, b),
                    "mm": lambda a=a, b=b: build.call(aten.mm.default, a, b),
                    "relu": lambda a=a: build.call(aten.relu.default, a),
                    "permute": lambda a=a: build.call(aten.permute.default, a, [1, 0]),
                    "alias": lambda a=a: build.call(aten.alias.default, a),
                }[operation]()
            )
    values += [build.end(start) for start in pending]
    return build.module(*(values[i % len(values)] for i in outputs), None, 3)


def inputs() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(4, 4) / 4 for _ in range(2 + PARAMETERS)]


class Registers:
    """Stands where a ledger does, and sees that no storage is alive that no later instruction reads."""

    def __init__(self, program: Program, held: Sequence[torch.Tensor]) -> None:
        self.last: dict[str, int] = {}
        for i, instruction in enumerate(program.instructions):
            for name in (*instruction.inputs, *instruction.outputs):
                self.last[name] = i
        count = len(program.instructions)
        numbers = {n: name for name, n in self._numbers(program).items()}
        self.last |= {numbers[o]: count for literal, o in program.outputs if not literal and o in numbers}
        self.names: dict[int, tuple[StorageWeakRef, set[str]]] = {}
        self.held = {t.untyped_storage()._cdata for t in held}
        self.now = -1

    @staticmethod
    def _numbers(program: Program) -> dict[str, int]:
        return {
            name: number
            for instruction, writes in zip(program.instructions, program.writes, strict=True)
            for name, number in zip(instruction.outputs, writes, strict=True)
        }

    def before(self, label: str, is_runtime: bool, makes_host_memory: bool) -> None:
        self.now += 1
        for storage, names in self.names.values():
            if not storage.expired():
                assert any(self.last[name] >= self.now for name in names), f"{names} are alive at {label}"

    def after(self, results: dict[str, Any], categories: object) -> None:
        for name, value in results.items():
            for tensor in value if isinstance(value, list) else [value]:
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.held:
                    storage = tensor.untyped_storage()
                    known = self.names.get(storage._cdata)
                    if known is None or known[0].expired():
                        known = self.names[storage._cdata] = (StorageWeakRef(storage), set())
                    known[1].add(name)


@settings(max_examples=60, deadline=None)
@given(steps=STEPS, outputs=st.lists(st.integers(0, 30), min_size=1, max_size=4))
def test_lowered_is_what_was_written(steps: list[tuple[str, int, int]], outputs: list[int]) -> None:
    engine = new_engine()
    gm = random_graph(engine, steps, outputs)
    wanted = fx.Interpreter(fx.GraphModule(gm, copy_graph(gm.graph))).run(*inputs())
    probe = Probe()
    program = lower(gm, as_written, is_backward=False, is_inference=True, probe=probe)
    given = inputs()
    probe.ledger = Registers(program, given)  # type: ignore[assignment]
    arguments = list(given)
    found = program(arguments)
    assert not arguments, "the program must empty the list of its inputs"
    assert len(found) == len(wanted)
    for new, old in zip(found, wanted, strict=True):
        assert torch.equal(new, old) if isinstance(old, torch.Tensor) else new == old


@settings(max_examples=60, deadline=None)
@given(steps=STEPS, outputs=st.lists(st.integers(0, 30), min_size=1, max_size=4))
def test_views_are_made_in_the_segment_that_reads_them(steps: list[tuple[str, int, int]], outputs: list[int]) -> None:
    gm = random_graph(new_engine(), steps, outputs)
    graph = copy_graph(gm.graph)
    sink_views(graph)
    graph.lint()
    for node in graph.nodes:
        if getattr(node.target, "is_view", False) is True and node.users:
            first = min(node.users)
            between, n = [], node.next
            while n is not first and n.op != "output":
                between.append(n)
                n = n.next
            assert first.op == "output" or not any(b.target in RUNTIME_FUNCTIONS for b in between)


@settings(max_examples=60, deadline=None)
@given(steps=STEPS, outputs=st.lists(st.integers(0, 30), min_size=1, max_size=4))
def test_no_more_is_held_between_segments_for_what_is_made_later(
    steps: list[tuple[str, int, int]], outputs: list[int]
) -> None:
    gm = random_graph(new_engine(), steps, outputs)
    graph = copy_graph(gm.graph)
    sink_views(graph)
    before = _between(graph)
    sink_enlarged(graph)
    graph.lint()
    assert _between(graph) <= before


def _between(graph: fx.Graph) -> int:
    """Over all runtime nodes, bytes of compute's values that were made before and are read after."""
    total = 0
    for node in graph.nodes:
        if node.target not in RUNTIME_FUNCTIONS:
            continue
        alive = [n for n in graph.nodes if n < node and any(u > node and not is_view(n) for u in n.users)]
        total += sum(size_of(n) for n in alive if n.target not in RUNTIME_FUNCTIONS)
    return total


def test_what_is_made_of_less_is_made_where_it_is_read() -> None:
    """A bucket arrives between the rows' sum and its reader: rows wait for it, not what is as large as the matrix."""
    build = Builder(new_engine())
    x, y = build.inputs
    rows = build.call(aten.sum.dim_IntList, x, [1], True)
    large = build.call(aten.sin.default, build.call(aten.expand.default, rows, [4, 4]))
    held = build.call(aten.cos.default, y)  # as large as what it is made of, which is read again
    weight = build.end(build.start(gather_start, build.shards[0], 0))
    build.graph.output((build.call(aten.mm.default, build.call(aten.mul.Tensor, large, held), weight), y))
    program = lower(fx.GraphModule(nn.Module(), build.graph), as_written, is_backward=False, is_inference=True)
    first, *_, last = program.instructions
    assert first.outputs == (rows.name,)
    assert {rows.name, y.name} <= set(last.inputs)


def test_nothing_is_made_later_than_what_it_reads_is_written() -> None:
    build = Builder(new_engine())
    x, y = build.inputs
    rows = build.call(aten.select.int, x, 0, 0)
    large = build.call(aten.sin.default, build.call(aten.expand.default, rows, [4, 4]))
    weight = build.end(build.start(gather_start, build.shards[0], 0))
    build.call(aten.copy_.default, x, build.call(aten.mul.Tensor, y, 2.0))
    gm = build.module(build.call(aten.mm.default, large, weight))
    wanted, given = inputs(), inputs()
    fx.Interpreter(fx.GraphModule(gm, copy_graph(gm.graph))).run(*wanted)
    expected = torch.sin(inputs()[0][0].expand(4, 4)) @ inputs()[2]
    (found,) = lower(gm, as_written, is_backward=False, is_inference=True)(given[:])
    assert torch.equal(found, expected)
    assert torch.equal(given[0], wanted[0])


def test_sizes_that_are_not_known_are_not_compared() -> None:
    """To compare symbolic sizes would add guards, by which a model is compiled again."""
    traced = make_fx(lambda a, b: (a + b.t()).cos(), tracing_mode="symbolic")(torch.empty(5, 1), torch.empty(7, 1))
    graph = traced.graph
    (large,) = graph.find_nodes(op="call_function", target=aten.add.Tensor)
    long = large.args[0]
    with graph.inserting_after(large):
        start = graph.call_function(gather_start, ([long], ["long"]))
    start.meta["val"] = [long.meta["val"]]
    shapes = large.meta["val"].fake_mode.shape_env
    before = len(shapes.guards)
    sink_enlarged(graph)
    assert len(shapes.guards) == before


def test_what_is_written_in_place_runs_though_nobody_reads_it() -> None:
    build = Builder(new_engine())
    x, y = build.inputs
    more = build.call(aten.add.Tensor, x, 1.0)
    weight = build.end(build.start(gather_start, build.shards[0], 0))
    build.call(aten.copy_.default, x, more)
    program = lower(build.module(weight, y), as_written, is_backward=False, is_inference=True)
    given = inputs()
    before = given[0].clone()
    program(list(given))
    assert torch.equal(given[0], before + 1)


# -- segments that occur again -------------------------------------------------------------------------------


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[fx.GraphModule]:
    """What the compiler was given."""
    seen: list[fx.GraphModule] = []

    def compile_segment(gm: fx.GraphModule, inputs: Any, **_: Any) -> Any:
        seen.append(gm)
        return as_written(gm)

    monkeypatch.setattr(compat, "compile_segment", compile_segment)
    return seen


def layers(engine: Engine, *kinds: Callable[[Builder, fx.Node, fx.Node], fx.Node]) -> fx.GraphModule:
    """One layer a parameter, each behind its gather."""
    build = Builder(engine)
    x = build.inputs[0]
    for i, kind in enumerate(kinds):
        x = kind(build, x, build.end(build.start(gather_start, build.shards[i], i)))
    return build.module(x)


def linear(build: Builder, x: fx.Node, weight: fx.Node) -> fx.Node:
    return build.call(
        aten.relu.default, build.call(aten.mm.default, x, build.call(aten.permute.default, weight, [1, 0]))
    )


def scaled(factor: float) -> Callable[[Builder, fx.Node, fx.Node], fx.Node]:
    return lambda build, x, weight: build.call(aten.mul.Tensor, build.call(aten.mm.default, x, weight), factor)


@pytest.mark.parametrize(
    ("kinds", "distinct"),
    [
        ((linear, linear, linear), 1),
        ((linear, scaled(2.0), linear), 2),
        ((scaled(2.0), scaled(3.0), scaled(2.0)), 2),
    ],
)
def test_equal_segments_are_compiled_once(compiled: list[fx.GraphModule], kinds: Any, distinct: int) -> None:
    engine = new_engine()
    gm = layers(engine, *kinds)
    wanted = fx.Interpreter(fx.GraphModule(gm, copy_graph(gm.graph))).run(*inputs())
    compiler = SegmentCompiler()
    program = lower(gm, compiler, is_backward=False, is_inference=True)
    assert (len(compiled), compiler.compiled, compiler.reused) == (distinct, distinct, 3 - distinct)
    assert torch.equal(program(inputs())[0], wanted[0])
    assert len({segment_key(segment.graph) for segment in compiled}) == distinct


def test_strides_tell_segments_apart(compiled: list[fx.GraphModule]) -> None:
    """A segment compiled for a transposed input must not serve a contiguous one."""
    build = Builder(new_engine())
    x = build.inputs[0]
    first = build.call(aten.relu.default, x)
    weight = build.end(build.start(gather_start, build.shards[0], 0))
    turned = build.call(aten.add.Tensor, build.call(aten.permute.default, first, [1, 0]), weight)
    build.end(build.start(gather_start, build.shards[1], 1))
    gm = build.module(build.call(aten.relu.default, build.call(aten.permute.default, turned, [1, 0])))
    lower(gm, SegmentCompiler(), is_backward=False, is_inference=True)
    keys = [segment_key(segment.graph) for segment in compiled]
    assert len(keys) == len(set(keys)) == 3


def test_a_piece_that_nobody_reads_is_not_compiled(compiled: list[fx.GraphModule]) -> None:
    build = Builder(new_engine())
    build.call(aten.relu.default, build.inputs[0])
    weight = build.end(build.start(gather_start, build.shards[0], 0))
    program = lower(build.module(weight), SegmentCompiler(), is_backward=False, is_inference=True)
    assert not compiled
    given = inputs()
    assert torch.equal(program(list(given))[0], given[2])


def test_inductor_s_settings_tell_segments_apart(compiled: list[fx.GraphModule]) -> None:
    """Code that was generated under another setting, which a person may change for the same model, must not be used again."""
    compiler = SegmentCompiler()
    for casts in (False, True, False):
        with torch._inductor.config.patch(emulate_precision_casts=casts):
            lower(layers(new_engine(), linear), compiler, is_backward=False, is_inference=True)
    assert (compiler.compiled, compiler.reused) == (2, 1)


def of_unknown_rows(mode: Any, most: int | None = None) -> fx.GraphModule:
    """A segment that reads rows of a number which only a run tells, ``most`` at most."""
    graph = fx.Graph()
    rows = graph.placeholder("rows")
    double = graph.call_function(aten.mul.Tensor, (rows, 2.0))
    graph.output((double,))
    with mode:
        size = compat.unknown_size(torch.empty(1), 1)
        if most is not None:
            torch._check(size <= most)
        rows.meta["val"], double.meta["val"] = torch.empty(size, 4), torch.empty(size, 4)
    return fx.GraphModule(torch.nn.Module(), graph)


def test_sizes_that_only_a_run_tells_have_no_names(compiled: list[fx.GraphModule]) -> None:
    """Each layer of experts has such a size of its own; what is known of it counts."""
    compiler = SegmentCompiler()
    with compat.fake_mode() as mode:
        segments = [of_unknown_rows(mode), of_unknown_rows(mode), of_unknown_rows(mode, most=8)]
    first, second, _ = (compiler(segment, is_backward=False, is_inference=True) for segment in segments)
    assert second is first
    assert (compiler.compiled, compiler.reused) == (2, 1)
    for size in (0, 1, 5):
        rows = torch.randn(size, 4)
        assert torch.equal(second([rows])[0], rows * 2)


def test_sizes_that_guards_have_looked_at_are_not_shared() -> None:
    """Their values may be in the code that was made for them."""
    traced = make_fx(torch.relu, tracing_mode="symbolic")(torch.empty(6, 4))
    assert segment_key(traced.graph) is None


def test_a_model_that_is_compiled_again_has_the_options_of_that_time() -> None:
    model = nn.Linear(4, 4)
    used = []
    for random in (False, True):
        torch._dynamo.reset()
        options = {"zero_optimization": {"stage": 0}, "dspass": {"fallback_random": random}}
        torch.compile(model, backend="deepspeed", options=options)(torch.ones(2, 4))
        engine = engine_of(model)
        assert engine is not None
        used.append(dict(engine.compiler.patches))
    assert used == [{}, {"fallback_random": True}]
