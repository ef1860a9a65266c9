"""What fuses, as it is seen in the graph, beside what Inductor makes of it."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.fx as fx
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._functorch.aot_autograd import aot_module_simplified
from torch._inductor import config as inductor
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch.nn import functional as F

from dspass.passes.kernels import READS, REUSED_READS, Stretch, fuses, is_view, kernels, materialised, size_of

aten = torch.ops.aten


def _graphs(function: Callable[..., torch.Tensor], *args: torch.Tensor) -> list[tuple[fx.Graph, int]]:
    """The forward and the backward of ``function``, each with the number of kernels that Inductor generates for it."""
    found: list[tuple[fx.Graph, int]] = []

    def compiler(gm: fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        compiled = compile_fx_inner(gm, inputs, is_backward=bool(found))
        found.append((gm.graph, len(re.findall(r"^ +cpp_fused\w*\(", compiled.source_code, re.MULTILINE))))
        return compiled

    def backend(gm: fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        return aot_module_simplified(gm, inputs, fw_compiler=compiler, decompositions=select_decomp_table())

    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        torch.compile(function, backend=backend, dynamic=False)(*args).sum().backward()
    return found


def _mlp(x: torch.Tensor, w: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return x + F.gelu(F.layer_norm(x, (64,)) @ w) @ v


def _numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, requires_grad=True)


@pytest.mark.parametrize(
    ("function", "args"),
    [
        (lambda x: x.sin() * x.cos() + x, [_numbers(32, 64)]),
        (lambda x: F.layer_norm(x, (64,)), [_numbers(32, 64)]),
        (lambda x: x.softmax(-1), [_numbers(32, 64)]),
        (lambda x, b: F.gelu(x + b), [_numbers(32, 64), _numbers(64)]),
        (_mlp, [_numbers(32, 64), _numbers(64, 256), _numbers(256, 64)]),
    ],
    ids=["pointwise", "layer norm", "softmax", "bias and gelu", "mlp"],
)
def test_as_many_kernels_as_inductor_generates(function: Callable[..., torch.Tensor], args: list[torch.Tensor]) -> None:
    for graph, generated in _graphs(function, *args):
        assert sum(k.is_generated for k in kernels(graph)) == generated


def test_a_kernel_reads_each_tensor_once_and_what_it_wrote_not_at_all() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(8, 16, device="meta")
    one = _call(graph, aten.add.Tensor, x, 1)
    two = _call(graph, aten.mul.Tensor, one, x)
    graph.output((one, two))
    (kernel,) = kernels(graph)
    assert kernel.writes == [one, two]
    assert kernel.reads == {x: 8 * 16 * 4}


def test_rows_and_columns_are_different_loops() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(8, 16, device="meta")
    rows, columns = (_call(graph, aten.sum.dim_IntList, x, [dim]) for dim in (1, 0))
    graph.output((rows, columns))
    assert [k.writes for k in kernels(graph)] == [[rows], [columns]]


def test_of_a_table_only_the_rows_that_are_looked_up_are_read() -> None:
    graph = fx.Graph()
    table, which = graph.placeholder("table"), graph.placeholder("which")
    table.meta["val"] = torch.empty(1000, 16, device="meta")
    which.meta["val"] = torch.empty(4, dtype=torch.int64, device="meta")
    rows = _call(graph, aten.embedding.default, table, which)
    graph.output((rows,))
    (kernel,) = kernels(graph)
    assert kernel.reads == {table: 4 * 16 * 4, which: 4 * 8}


def _call(graph: fx.Graph, target: Callable[..., object], *args: object) -> fx.Node:
    node = graph.call_function(target, args)
    node.meta["val"] = target(*fx.map_arg(args, lambda n: n.meta["val"]))
    return node


#: How a random graph goes on: an operation, and the two values that it takes.
STEPS = st.lists(
    st.tuples(
        st.sampled_from([aten.add.Tensor, aten.exp.default, aten.mm.default, aten.t.default, "rows", "columns"]),
        st.integers(0, 30),
        st.integers(0, 30),
    ),
    min_size=1,
    max_size=25,
)


@settings(max_examples=150, deadline=None)
@given(steps=STEPS, results=st.lists(st.integers(0, 30), min_size=1, max_size=4))
def test_every_value_in_memory_is_written_once_and_after_what_it_is_made_of(
    steps: list[tuple[object, int, int]], results: list[int]
) -> None:
    graph = fx.Graph()
    values = [graph.placeholder(f"x{i}") for i in range(2)]
    for x in values:
        x.meta["val"] = torch.empty(16, 16, device="meta")
    for target, i, j in steps:
        a, b = values[i % len(values)], values[j % len(values)]
        if target in ("rows", "columns"):
            reduced = _call(graph, aten.sum.dim_IntList, a, [1 if target == "rows" else 0], True)
            values.append(_call(graph, aten.expand.default, reduced, [16, 16]))
        elif target in (aten.add.Tensor, aten.mm.default):
            values.append(_call(graph, target, a, b))
        else:
            values.append(_call(graph, target, a))
    graph.output(tuple(values[i % len(values)] for i in results))
    graph.eliminate_dead_code()

    found = kernels(graph)
    written = [node for kernel in found for node in kernel.writes]
    assert sorted(written) == sorted(materialised(graph))
    at = {node: i for i, kernel in enumerate(found) for node in kernel.writes}
    for i, kernel in enumerate(found):
        assert all(at[source] < i for source in kernel.reads if source in at), "two kernels wait for each other"
        assert all(0 < size <= size_of(source) for source, size in kernel.reads.items())
        assert kernel.is_generated == all(map(fuses, kernel.writes))
        for node in kernel.writes:
            assert _sources(node, at) <= {*kernel.reads, *kernel.writes}, (
                "what a value is made of is read, or made beside it"
            )


def _sources(node: fx.Node, at: dict[fx.Node, int]) -> set[fx.Node]:
    """The values in memory that ``node`` is computed from."""
    found: set[fx.Node] = set()
    for source in node.all_input_nodes:
        found |= {source} if source.op == "placeholder" or source in at else _sources(source, at)
    return found


def test_views_are_no_kernels() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(8, 16, device="meta")
    view = _call(graph, aten.t.default, x)
    graph.output((view,))
    assert is_view(view)
    assert not kernels(graph)


def test_a_residual_stream_goes_to_memory_before_it_reads_everything() -> None:
    """A fused value that several read is written once it is made of more than four tensors."""
    graph = fx.Graph()
    inputs = [graph.placeholder(f"x{i}") for i in range(12)]
    for x in inputs:
        x.meta["val"] = torch.empty(8, 16, device="meta")
    stream, results = inputs[0], []
    for x in inputs[1:]:
        stream = _call(graph, aten.add.Tensor, stream, x)
        results.append(_call(graph, aten.exp.default, stream))
    graph.output(tuple(results))
    written = materialised(graph) - set(results)
    assert written == {s.args[0] for s in (results[3], results[7])}


def test_inductor_s_own_limits_are_ours() -> None:
    assert inductor.realize_reads_threshold == REUSED_READS
    assert getattr(inductor, "_realize_acc_reads_threshold_default", inductor.realize_acc_reads_threshold) == READS


def test_a_stretch_is_looked_at_alone() -> None:
    """What reads a value outside of the stretch does not count there, and what is given is not made."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(16, 16, device="meta")
    one = _call(graph, aten.exp.default, x)
    two = _call(graph, aten.sin.default, one)
    three = _call(graph, aten.mm.default, one, two)
    graph.output((three,))
    assert Stretch([one, two], {x}, {two}).materialised == {two}
    assert Stretch([two, three], {x, one}, {three}).materialised == {two, three}
    first, second = kernels(Stretch([two, three], {x, one}, {three}))
    assert (first.reads, second.reads) == ({one: 16 * 16 * 4}, {one: 16 * 16 * 4, two: 16 * 16 * 4})
