"""Inductor: its settings, its passes over a joint graph, and its compiler for parts of a graph, without kernels too."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import torch
import torch.fx as fx

from dspass.runtime.compat.fake import fake_mode
from dspass.runtime.compat.graphs import traced
from dspass.runtime.compat.sizes import unknown_size


def inductor_hash(patches: Mapping[str, Any]) -> str:
    """Equal where all of Inductor's settings are, ``patches`` among them; takes a microsecond while none changes."""
    from torch._inductor import config

    with config.patch(dict(patches)):
        return config.get_hash().hex()


def inductor_decompositions(patches: Mapping[str, Any]) -> Any:
    from torch._inductor import config
    from torch._inductor.decomposition import select_decomp_table

    with config.patch(dict(patches)):
        return select_decomp_table()


def joint_graph_passes(gm: fx.GraphModule, patches: Mapping[str, Any]) -> fx.GraphModule:
    """Inductor's own joint passes: attention patterns, constant folding, random number replacement."""
    from torch._guards import detect_fake_mode
    from torch._inductor import config
    from torch._inductor.compile_fx import _recursive_joint_graph_passes
    from torch._inductor.virtualized import V

    values = [node.meta.get("val") for node in gm.graph.find_nodes(op="placeholder")]
    with config.patch(dict(patches)), V.set_fake_mode(detect_fake_mode(values)):  # dropout's seeds are made under it
        return _recursive_joint_graph_passes(gm) or gm


def compile_segment(
    gm: fx.GraphModule, inputs: Sequence[Any], *, is_backward: bool, is_inference: bool, patches: Mapping[str, Any]
) -> Callable[[list[Any]], Sequence[Any]]:
    """Compile one pure compute graph with Inductor; the answer takes a list, empties it, and returns a tuple.

    Every output keeps the strides that its fake value has: the next segment was traced with them.
    """
    from torch._guards import detect_fake_mode
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner

    output = gm.graph.find_nodes(op="output")[0]
    output.meta["user_visible_output_idxs"] = [i for i, n in enumerate(output.args[0]) if isinstance(n, fx.Node)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(config.patch(dict(patches)))
        stack.enter_context(_even_loop_splits())
        # A context of its own: the whole graph's says which inputs may be overwritten (donated) by their index in the whole
        # graph, and collects the strides of one whole graph's outputs. A segment's inputs and outputs are others.
        mode = detect_fake_mode(list(inputs))
        stack.enter_context(torch._guards.tracing(torch._guards.TracingContext(mode)))
        return compile_fx_inner(gm, list(inputs), is_backward=is_backward, is_inference=is_inference)


def compile_for_rows(function: Callable[..., None], examples: Sequence[torch.Tensor]) -> Callable[..., None]:
    """``function``, which writes to its arguments, compiled by Inductor for tensors like ``examples`` whose first dimension is
    any number, one for all of them; those without dimensions are as they are.

    Unlike what ``torch.compile`` makes it has no guards, and so nothing to be compiled again for: neither another kind of view,
    nor grad mode, nor a size that was 1. Calls have to be alike; nothing checks that."""

    def without_results(*tensors: torch.Tensor) -> tuple[()]:
        function(*tensors)
        return ()

    def compiled_here() -> Callable[[list[Any]], Sequence[Any]]:
        with fake_mode() as mode, mode.shape_env.ignore_fresh_unbacked_symbols():  # it is an input's
            rows = unknown_size(mode.from_tensor(examples[0]), 4096)
            shapes = [(rows, *t.shape[1:]) if t.dim() else () for t in examples]
            fakes = [torch.empty(s, dtype=t.dtype, device=t.device) for s, t in zip(shapes, examples, strict=True)]
        gm = traced(without_results, fakes, inductor_decompositions({}))
        return compile_segment(gm, fakes, is_backward=False, is_inference=True, patches={})

    # A thread of its own has none of the caller's modes and dispatch keys: who calls an operator may be inside of some.
    with ThreadPoolExecutor(1) as thread:
        compiled = thread.submit(compiled_here).result()

    run: Callable[..., Any] = compiled.current_callable  # type: ignore[attr-defined]  # what is around it is for graphs of a model

    def call(*tensors: torch.Tensor) -> None:
        run(list(tensors))

    return call


def _even_loop_splits() -> contextlib.AbstractContextManager[Any]:
    """While it lasts Inductor divides a loop on the CPU by a divisor that occurs in an index only where that leaves no rest.

    Otherwise it forgets the rest: a loop over 65 values that share a factor by 64s computes 64 of them (torch 2.11 to 2.13,
    ``CppScheduling.try_loop_split``)."""
    from torch._inductor.codegen.cpp import CppScheduling
    from torch.utils._sympy.functions import FloorDiv

    split = CppScheduling.try_loop_split

    def leaves_a_rest(node: Any) -> bool:
        _, body, _ = node.node.get_default_sizes_body()
        return any(
            division.args[0] in body.var_ranges and body.var_ranges[division.args[0]] % division.args[1] != 0
            for expression in body.indexing_exprs.values()
            if hasattr(expression, "find")
            for division in expression.find(FloorDiv)
        )

    def split_evenly(scheduling: Any, nodes: Any) -> Any:
        return nodes if any(map(leaves_a_rest, nodes)) else split(scheduling, nodes)

    return mock.patch.object(CppScheduling, "try_loop_split", split_evenly)


def generate_segment(
    gm: fx.GraphModule, inputs: Sequence[Any], *, is_backward: bool, is_inference: bool, patches: Mapping[str, Any]
) -> Callable[[list[Any]], Sequence[Any]]:
    """As :func:`compile_segment`, for fake tensors on the CPU: Inductor's code runs, its kernels are never built."""
    from torch._inductor.async_compile import AsyncCompile

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    def no_kernel(*args: Any, **kwargs: Any) -> Callable[..., None]:
        return nothing

    settings = {**patches, "fx_graph_cache": False, "fx_graph_remote_cache": False, "cpp.enable_kernel_profile": False}
    # Without vectors a kernel is generated once, not also for tiles and tails: what it allocates is decided by the first.
    settings["cpp.simdlen"] = 1
    with mock.patch.object(AsyncCompile, "cpp_pybinding", no_kernel):
        compiled = compile_segment(gm, inputs, is_backward=is_backward, is_inference=is_inference, patches=settings)
    call = compiled.current_callable  # type: ignore[attr-defined]
    call = getattr(call, "__func__", call)
    names = call.__globals__
    # The generated module allocates past the dispatcher, where no fake mode sees it.
    for name in ("empty_strided_cpu", "empty_strided"):
        if name in names:
            names[name] = _empty_strided
    names["reinterpret_tensor"] = _reinterpret
    for name in ("assert_size_stride", "assert_alignment"):
        if name in names:
            names[name] = nothing
    run = compiled.current_callable  # type: ignore[attr-defined]

    def fake_results(args: list[Any]) -> Sequence[Any]:
        return [_fake(value) for value in run(args)]

    return fake_results


def _fake(value: Any) -> Any:
    """The state that an operator leaves behind for a random number to be drawn again is real also under a fake mode."""
    from torch._guards import detect_fake_mode
    from torch._subclasses.fake_tensor import FakeTensor

    mode = detect_fake_mode()
    real = isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor)
    return mode.from_tensor(value, static_shapes=True) if real and mode is not None else value


def _empty_strided(size: Any, stride: Any, dtype: torch.dtype, device: Any = "cpu") -> torch.Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device=device)


def _reinterpret(base: torch.Tensor, size: Any, stride: Any, offset: int = 0) -> torch.Tensor:
    return torch.as_strided(base, size, stride, base.storage_offset() + offset)
