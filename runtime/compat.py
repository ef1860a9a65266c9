"""Every private name of torch that dspass uses, behind one door.

Tried with torch 2.11 to 2.13 (2.13 by the whole test suite on the CPU). Another version is refused by
:func:`check_torch` with an error that says so, rather than failing later inside a graph.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import itertools
import logging
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import CellType, CodeType, FrameType, FunctionType
from typing import Any
from unittest import mock

import torch
import torch.fx as fx

SUPPORTED = ((2, 11), (2, 13))


class UnsupportedTorchError(RuntimeError):
    """The installed torch lies outside the range that dspass was tried with."""


def check_torch(version: str = torch.__version__) -> None:
    """Raise :class:`UnsupportedTorchError` unless ``version`` is one that was tried."""
    major, minor = (int(part) for part in version.split("+")[0].split(".")[:2])
    if not SUPPORTED[0] <= (major, minor) <= SUPPORTED[1]:
        low, high = (".".join(map(str, v)) for v in SUPPORTED)
        raise UnsupportedTorchError(
            f"dspass works with torch {low} to {high}, and this is torch {version}: its passes stand on private "
            f"interfaces that other versions change. Install one of those, for instance pip install 'torch=={high}.*'."
        )


def backward_run() -> int:
    """The number of the autograd run (one ``loss.backward()``) this thread is in, or -1 outside of one."""
    return torch._C._current_graph_task_id()


def at_end_of_backward(function: Callable[[], None]) -> None:
    """Call ``function`` when the autograd run at hand has put every gradient into its ``.grad``, as DDP and FSDP do."""
    torch.autograd.Variable._execution_engine.queue_callback(function)


def in_compiled_call() -> bool:
    """Whether a function wrapped by ``torch.compile`` is on this thread's stack, or a backward runs.

    Read from the stack and not from a flag: a flag set by a hook would be traced by Dynamo, and one left
    behind by an exception would make every later eager read a collective.
    """
    if backward_run() != -1:
        return True
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "compile_wrapper" and frame.f_code.co_filename.endswith("eval_frame.py"):
            return True
        frame = frame.f_back
    return False


def in_resumed_frame() -> bool:
    """Whether Dynamo is at a piece behind a graph break, whose inputs are the model's intermediate values."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        current = InstructionTranslator.current_tx()
    except AttributeError:  # not inside of a trace
        return False
    return current.f_code.co_name.startswith("torch_dynamo_resume_in_")


def broken_graph() -> str | None:
    """Why Dynamo hands over the graph at hand before the function has ended; None where it has all of it."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        reason = InstructionTranslator.current_tx().output.compile_subgraph_reason
    except AttributeError:  # not inside of a trace
        return None
    if reason is None or not reason.graph_break:
        return None
    frame = reason.user_stack[-1] if reason.user_stack else None
    where = f"{frame.filename}:{frame.lineno}: {frame.line}: " if frame is not None else ""
    return f"{where}{reason.reason.splitlines()[0]}."


def call_of(module: torch.nn.Module) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """What the call of ``module`` that is on this thread's stack was given.

    Dynamo hands a graph its inputs, and not the call's arguments; ``nn.Module``'s own frame has them.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "_call_impl" and frame.f_locals.get("self") is module:
            return frame.f_locals["args"], frame.f_locals["kwargs"]
        frame = frame.f_back
    raise RuntimeError(
        f"{type(module).__name__} was not called as a module: call the model itself, and not its forward, or call "
        "dspass.shard(model, config) first."
    )


def capture_error() -> type[Exception]:
    """What Dynamo raises where it cannot capture a function."""
    from torch._dynamo.exc import TorchDynamoException

    return TorchDynamoException


def captured_code() -> CodeType:
    """Of the function that Dynamo is capturing, which :func:`call_at` finds when it runs."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    return InstructionTranslator.current_tx().output.root_tx.f_code


@dataclass(frozen=True)
class RunningCall:
    """A function that is running, compiled, by its ``code``, and what it was called with: ``args``, ``kwargs`` and what its
    closure's ``cells`` hold."""

    code: CodeType
    globals: dict[str, Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    cells: Sequence[Any]

    def function(self, cells: Sequence[Any]) -> Callable[..., Any]:
        """The function with other ``cells``, which Dynamo captures apart from the one that runs."""
        closure = tuple(map(CellType, cells))
        return FunctionType(self.code.replace(), self.globals, self.code.co_name, None, closure)


def call_at(code: CodeType) -> RunningCall:
    """The call of ``code`` that is on this thread's stack."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not _is_same_code(frame.f_code, code):
        frame = frame.f_back
    if frame is None:
        raise RuntimeError(f"{code.co_qualname} is not running.")
    held, names, count = frame.f_locals, code.co_varnames, code.co_argcount
    args = [held[name] for name in names[:count]]
    end = count + code.co_kwonlyargcount
    kwargs = {name: held[name] for name in names[count:end]}
    if code.co_flags & inspect.CO_VARARGS:
        args += held[names[end]]
        end += 1
    if code.co_flags & inspect.CO_VARKEYWORDS:
        kwargs |= held[names[end]]
    return RunningCall(code, frame.f_globals, args, kwargs, [held[name] for name in code.co_freevars])


def _is_same_code(one: CodeType, other: CodeType) -> bool:
    """Dynamo runs another code under the same name, from the same place."""
    return (one.co_name, one.co_filename, one.co_firstlineno) == (
        other.co_name,
        other.co_filename,
        other.co_firstlineno,
    )


def inductor_decompositions(patches: Mapping[str, Any]) -> Any:
    from torch._inductor import config
    from torch._inductor.decomposition import select_decomp_table

    with config.patch(dict(patches)):
        return select_decomp_table()


def aot_backend(**options: Any) -> Callable[..., Any]:
    """AOTAutograd as a Dynamo backend (``torch._dynamo.backends.common.aot_autograd``)."""
    from torch._dynamo.backends.common import aot_autograd

    return aot_autograd(**options)


@dataclass(frozen=True)
class Gradient:
    """What an output of a backward graph is: the gradient ``of`` an input of the compiled graph, by its place there;
    ``is_part`` of it where the input is a tensor subclass, such as a DTensor, and this belongs inside of its gradient."""

    of: int
    is_part: bool


def gradient(desc: Any) -> Gradient | None:
    """Read AOTAutograd's description of an output of a backward graph; None where it describes another thing than a gradient
    of an input."""
    from torch._functorch._aot_autograd import descriptors

    is_part = False
    while isinstance(desc, descriptors.SubclassGetAttrAOTOutput):
        desc, is_part = desc.base, True
    if not isinstance(desc, descriptors.GradAOTOutput):
        return None
    source: Any = desc.grad_of
    while isinstance(source, (descriptors.ViewBaseAOTInput, descriptors.SyntheticBaseAOTInput)):
        source = source.base_of  # several inputs of one memory
    return Gradient(source.idx, is_part) if isinstance(source, descriptors.PlainAOTInput) else None


def without_autocast() -> contextlib.AbstractContextManager[Any]:
    """Inside, operators compute in the precision of their inputs, whatever ``torch.autocast`` says outside."""
    return torch._C._DisableAutocast()


def joint_graph_passes(gm: fx.GraphModule, patches: Mapping[str, Any]) -> fx.GraphModule:
    """Inductor's own joint passes: attention patterns, constant folding, random number replacement."""
    from torch._guards import detect_fake_mode
    from torch._inductor import config
    from torch._inductor.compile_fx import _recursive_joint_graph_passes
    from torch._inductor.virtualized import V

    values = [node.meta.get("val") for node in gm.graph.find_nodes(op="placeholder")]
    with config.patch(dict(patches)), V.set_fake_mode(detect_fake_mode(values)):  # dropout's seeds are made under it
        return _recursive_joint_graph_passes(gm) or gm


def graph_module(root: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    """A graph module whose Python code is made when it is first called: of most of ours only the graph is read."""
    from torch.fx._lazy_graph_module import _LazyGraphModule

    return _LazyGraphModule(root, graph)


#: What Inductor's own min-cut saves.
Unplanned = Callable[[], list[fx.Node]]

#: Answers the nodes to save in place of Inductor's min-cut. It is given the joint graph as it will be split, the nodes in order
#: that do not depend on the gradients that come in, those placeholders that cost nothing, and what Inductor would save.
Chooser = Callable[[fx.Graph, Sequence[fx.Node], frozenset[fx.Node], Unplanned], list[fx.Node]]


def min_cut_partition(
    joint: fx.GraphModule,
    inputs: Any,
    num_fwd_outputs: int,
    free_inputs: Sequence[int],
    recompute_pointwise: bool = False,
    choose: Chooser | None = None,
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Split a joint graph by min-cut, or as ``choose`` says; ``free_inputs`` are the indices of placeholders that cost nothing
    to save.

    ``recompute_pointwise`` also recomputes a value that the backward graph has to write to memory again, such as the
    activation function in front of a matrix product.
    """
    from torch._functorch import config, partitioners
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch.fx._lazy_graph_module import _use_lazy_graph_module

    theirs = partitioners.choose_saved_values_set

    def chosen(graph: fx.Graph, info: Any, *args: Any, **kwargs: Any) -> list[fx.Node]:
        assert choose is not None
        backward = getattr(info, "tangents_closure", info.required_bw_nodes)  # one set until torch 2.12
        forward = [node for node in graph.nodes if node.op != "output" and node not in backward]
        free = frozenset(info.static_lifetime_input_nodes)
        return choose(graph, forward, free, lambda: theirs(graph, info, *args, **kwargs))

    ours = mock.patch.object(partitioners, "choose_saved_values_set", chosen) if choose else contextlib.nullcontext()
    settings = {
        "treat_parameters_as_free_to_save": True,
        "ban_recompute_materialized_backward": not recompute_pointwise,
    }
    with config.patch(settings), ours, _use_lazy_graph_module(True):
        return min_cut_rematerialization_partition(
            joint,
            inputs,
            compiler="inductor",
            num_fwd_outputs=num_fwd_outputs,
            static_lifetime_input_indices=list(free_inputs),
        )


def fill_values(graph: fx.Graph) -> None:
    """Give nodes without ``meta["val"]`` theirs: the partitioner leaves what saves and restores the random state bare."""
    from torch._guards import detect_fake_mode
    from torch.utils._pytree import tree_map_only

    mode = detect_fake_mode([node.meta.get("val") for node in graph.find_nodes(op="placeholder")])
    for node in graph.nodes:
        if node.op != "call_function" or "val" in node.meta or mode is None:
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        with mode:
            value = node.target(*args, **kwargs)
        node.meta["val"] = tree_map_only(
            torch.Tensor, lambda t: t if detect_fake_mode([t]) is mode else mode.from_tensor(t), value
        )


def inductor_hash(patches: Mapping[str, Any]) -> str:
    """Equal where all of Inductor's settings are, ``patches`` among them; takes a microsecond while none changes."""
    from torch._inductor import config

    with config.patch(dict(patches)):
        return config.get_hash().hex()


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


@functools.cache
def has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``x @ weight.T + bias`` by oneDNN; ``weight`` may have any strides."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@functools.cache
def multiplies_by_onednn(dtype: torch.dtype) -> bool:
    """Whether ``torch.mm`` of 16-bit ``dtype`` on this CPU is oneDNN's; torch's own is some ten times slower."""
    if not has_onednn():
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype is torch.float16 and bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def multiplies_grouped(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether :func:`grouped_product` takes these as they lie, on a GPU bf16 alone, and answers without gaps: one of the last
    two dimensions has none, all else is at multiples of 16 bytes, as rows of the result are laid."""

    def lies_well(matrix: torch.Tensor) -> bool:
        *rest, row, column = matrix.stride()
        others = [*rest, column if row == 1 else row]
        aligned = all(stride * matrix.itemsize % 16 == 0 for stride in others) and matrix.data_ptr() % 16 == 0
        return 1 in (row, column) and aligned and others[-1] >= max(matrix.shape[-1 if column == 1 else -2], 1)

    dtypes = {torch.bfloat16} if left.is_cuda else {torch.float32, torch.float16, torch.bfloat16}
    fits = left.dtype in dtypes and right.shape[-1] * right.itemsize % 16 == 0
    return fits and all(map(lies_well, (left, right)))


def grouped_product(left: torch.Tensor, right: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Of rows ``left`` by matrices ``right``, or, both 2-D, of columns by rows: an expert's each. What no expert has is not
    written."""
    return torch._grouped_mm(left, right, offs=ends)


def has_int8_product(dtype: torch.dtype) -> bool:
    """Whether torch brings a kernel for products of ``dtype`` with int8 weights on CPUs. Its fp32 one is slow: not counted."""
    return dtype in (torch.bfloat16, torch.float16)


def int8_product(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """``x`` (m, k) times int8 ``weight`` (n, k), transposed, times ``scales`` (n) of ``x``'s dtype: (m, n)."""
    return torch.ops.aten._weight_int8pack_mm(x, weight, scales)


def multiplies_integers(device: str, rows: Any, inner: int, columns: int) -> bool:
    """Whether :func:`integer_product` takes int8 matrices of these sizes on ``device``. CUDA's kernels want more than 16 rows
    and multiples of 8; an unknown number of rows may be less."""
    if device == "cpu":
        return True
    return isinstance(rows, int) and rows > 16 and inner % 8 == 0 and columns % 8 == 0


def integer_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """int8 ``x`` (m, k) times int8 ``weight`` (n, k), transposed: ``int32`` (m, n), exact."""
    return torch._int_mm(x, weight.t())


def placeholder_source(node: fx.Node) -> str | None:
    """Where Dynamo got a graph input from, such as ``L['self']._modules['0']._parameters['weight']``."""
    argument = node.meta.get("grapharg")
    if argument is None:
        return None
    name = argument.source.name
    return name if isinstance(name, str) else name()  # a method until torch 2.11


def guard_identity(node: fx.Node) -> None:
    """Have Dynamo use the graph being compiled only for the very object that graph input ``node`` stands for.

    Dynamo's guards on modules and parameters ask for types and shapes, so a second model of one class would be given the
    graph, and with it the engine, of the first.
    """
    from torch._dynamo.guards import GuardBuilder, install_guard

    argument = node.meta.get("grapharg")
    if argument is not None:
        install_guard(argument.source.make_guard(GuardBuilder.ID_MATCH))


def compiled_frame() -> int:
    """The number of the frame that Dynamo is compiling: the same for recompilations of one, another behind a graph break."""
    from torch._guards import CompileContext

    compile_id = CompileContext.current_compile_id()
    return -1 if compile_id is None or compile_id.frame_id is None else compile_id.frame_id


def allow_compilations(more: int) -> None:
    """Let Dynamo compile one function so many times more: it counts those of all models of a class together, and runs what
    exceeds its limit uncompiled, which here would be unsharded."""
    from torch._dynamo import config

    config.recompile_limit += more
    config.accumulated_recompile_limit += more


def keep_shapes_static() -> None:
    """Have Dynamo compile for each shape by itself: by default it makes a size symbolic that was another one before."""
    from torch._dynamo import config

    config.automatic_dynamic_shapes = False


def restored_limits() -> contextlib.AbstractContextManager[Any]:
    """What :func:`allow_compilations` does inside ends with it; no prediction is refused for those before it."""
    from torch._dynamo import config

    return config.patch(recompile_limit=10_000, accumulated_recompile_limit=10_000)


@contextlib.contextmanager
def fake_mode() -> Iterator[Any]:
    """Tensors made inside have shapes and storages of the right size, and no bytes."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True) as mode:
        yield mode


@contextlib.contextmanager
def own_tracing() -> Iterator[None]:
    """Have AOTAutograd trace as it does inside of Dynamo: sizes of inputs are numbers, those that data decides are symbols."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    class OfNumbers(FakeTensorMode):
        """ShapeEnv's ``assume_static_by_default`` serves Dynamo, which says so of each tensor: here all would be symbols."""

        def from_tensor(self, tensor: torch.Tensor, *, static_shapes: bool | None = None, **options: Any) -> FakeTensor:
            return super().from_tensor(tensor, static_shapes=True, **options)

    mode = OfNumbers(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    with torch._guards.tracing(torch._guards.TracingContext(mode)):
        yield


def mode_of(values: Sequence[Any]) -> contextlib.AbstractContextManager[Any]:
    """The fake mode of the fake tensors among ``values``."""
    from torch._guards import detect_fake_mode

    return detect_fake_mode(list(values)) or contextlib.nullcontext()


@contextlib.contextmanager
def apart(values: Sequence[Any]) -> Iterator[None]:
    """Computing with the fake tensors among ``values`` inside leaves no trace: no guard, no gradient, no node in the trace at
    hand."""
    from torch._guards import detect_fake_mode

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch._guards.tracing(None))  # whose mode, inside of a backend, is another than the graph's
        stack.enter_context(without_fake_mode())
        stack.enter_context(torch.no_grad())
        mode = detect_fake_mode(list(values))
        if mode is not None:
            stack.enter_context(mode)
            if mode.shape_env is not None:
                stack.enter_context(mode.shape_env.suppress_guards())
        yield


def ignoring_logs() -> contextlib.AbstractContextManager[Any]:
    """Have Dynamo leave out calls of loggers while it captures: each would break the graph."""
    from torch._dynamo import config

    methods = vars(logging.Logger).values()  # those that other libraries have added are among them
    return config.patch(ignore_logger_methods={m for m in methods if callable(m)})


def without_fake_mode() -> contextlib.AbstractContextManager[Any]:
    """Inside, tensors are real again: a device mesh computes with its own."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    return unset_fake_temporarily()


def init_fake_group(size: int) -> None:
    """The default process group, of ``size`` ranks of which only this one exists; nothing is ever sent."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=size, store=FakeStore())


def bare_step(optimizer: torch.optim.Optimizer) -> None:
    """``optimizer.step()`` without the hooks around it, which a person sees once a step."""
    step = type(optimizer).step
    if not getattr(step, "hooked", False) or not hasattr(step, "__wrapped__"):
        raise RuntimeError(
            f"{type(optimizer).__name__}.step is not wrapped as torch.optim wraps it, so its states cannot wait on the host: "
            'derive it from torch.optim.Optimizer, or set zero_optimization.offload_optimizer.device to "none".'
        )
    step.__wrapped__(optimizer)


def around_step(
    optimizer: torch.optim.Optimizer, before: Callable[..., None], after: Callable[..., None]
) -> Callable[[], None]:
    """Call ``before`` as the last and ``after`` as the first thing around the optimiser's own step, whatever hooks a person
    registered; answers what undoes it."""
    first = optimizer.register_step_pre_hook(before)
    last = optimizer.register_step_post_hook(after)
    optimizer._optimizer_step_post_hooks.move_to_end(last.id, last=False)

    def undo() -> None:
        first.remove()
        last.remove()

    return undo


def store() -> Any:
    """The key-value store of the default process group: safe inside of a compilation, where a collective is not."""
    return torch.distributed.distributed_c10d._get_default_store()


def trace_artifact(name: str, text: Callable[[], str]) -> None:
    """Hand a text to ``TORCH_TRACE`` (read by tlparse); free when no trace is written."""
    from torch._logging import trace_structured

    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=text)


def register_log(name: str, qualified: str) -> None:
    """Let ``TORCH_LOGS="+dspass"`` reach our loggers."""
    from torch._logging._internal import log_registry, register_log

    if name not in log_registry.log_alias_to_log_qnames:
        register_log(name, qualified)


def reduce_overflow_of_mixed_placements() -> None:
    """Have every rank hear of an overflow (``GradScaler``) that one rank sees, also beside replicated gradients.

    DTensor reduces ``found_inf`` as the first gradient of a list is placed, so a ``Replicate`` one in front of sharded ones
    leaves each rank with its own answer, and ranks step apart. Sharded ones are put first; the order means nothing else.
    """
    from torch.distributed.tensor import DTensor

    handlers = DTensor._op_dispatcher._custom_op_handlers
    operator = torch.ops.aten._amp_foreach_non_finite_check_and_unscale_.default
    theirs = handlers[operator]
    if theirs.__module__ == __name__:
        return

    def ours(op_call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        grads = sorted(args[0], key=lambda grad: all(p.is_replicate() for p in grad.placements))
        return theirs(op_call, (grads, *args[1:]), kwargs)

    handlers[operator] = ours


#: Answers the norm of ``tensors`` in place of torch's function, which is its first argument. Behind the arguments of that stand
#: the parameters that the tensors are gradients of, or None where those are not known.
TotalNorm = Callable[
    [Callable[..., torch.Tensor], Sequence[torch.Tensor], float, bool, bool | None, Sequence[torch.Tensor] | None],
    torch.Tensor,
]


def extend_total_norm(extended: TotalNorm) -> None:
    """Have ``torch.nn.utils.get_total_norm``, and ``clip_grad_norm_`` that calls it, answer what ``extended`` does.

    The function is exchanged inside of its wrapper (``no_grad``), so that scripts which imported the name before get it too.
    Raises :class:`UnsupportedTorchError` where torch has no such function.
    """
    from torch.nn.utils import clip_grad

    cell = _total_norm_cell()
    theirs = cell.cell_contents
    if hasattr(theirs, "__wrapped__"):
        return

    @functools.wraps(theirs)
    def ours(
        tensors: Any, norm_type: float = 2.0, error_if_nonfinite: bool = False, foreach: bool | None = None
    ) -> torch.Tensor:
        tensors = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
        caller = sys._getframe(2)  # above the wrapper
        clips = caller.f_code.co_name == "clip_grad_norm_" and caller.f_code.co_filename == clip_grad.__file__
        params = caller.f_locals.get("parameters") if clips else None
        return extended(theirs, tensors, norm_type, error_if_nonfinite, foreach, params)

    cell.cell_contents = ours


def total_norm(tensors: Sequence[torch.Tensor], norm_type: float, foreach: bool | None) -> torch.Tensor:
    """torch's own norm of gradients that lie alike, whatever :func:`extend_total_norm` has made of it for others."""
    function = _total_norm_cell().cell_contents
    with torch.no_grad():
        return getattr(function, "__wrapped__", function)(tensors, norm_type, False, foreach)


def _total_norm_cell() -> Any:
    wrapper = torch.nn.utils.get_total_norm
    names = getattr(getattr(wrapper, "__code__", None), "co_freevars", ())
    if "func" not in names:
        raise UnsupportedTorchError(
            f"torch {torch.__version__} defines torch.nn.utils.get_total_norm in another way than torch 2.11 to 2.13, so norms "
            "over pipeline stages cannot be had from it: install one of those."
        )
    closure: Any = wrapper.__closure__
    return closure[names.index("func")]


#: Answers, by device, what is not 0 where a gradient of the optimiser was not finite, from what this rank has found; that is
#: nothing where there are no gradients. The last argument is the 0 that a search begins with.
FoundInf = Callable[
    [torch.optim.Optimizer, dict[torch.device, torch.Tensor], torch.Tensor], dict[torch.device, torch.Tensor]
]


def extend_found_inf(extended: FoundInf) -> None:
    """Have a ``GradScaler`` go by what ``extended`` answers.

    Raises :class:`UnsupportedTorchError` where torch looks for overflows in another way.
    """
    from torch.amp.grad_scaler import GradScaler

    theirs = getattr(GradScaler, "_unscale_grads_", None)
    if theirs is None:
        raise UnsupportedTorchError(
            f"GradScaler of torch {torch.__version__} works in another way than that of torch 2.11 to 2.13, so one pipeline "
            "stage would not hear of another one's overflow: install one of those."
        )
    if hasattr(theirs, "__wrapped__"):
        return

    @functools.wraps(theirs)
    def ours(
        self: Any, optimizer: torch.optim.Optimizer, inv_scale: torch.Tensor, found_inf: torch.Tensor, allow_fp16: bool
    ) -> dict[torch.device, torch.Tensor]:
        return extended(optimizer, theirs(self, optimizer, inv_scale, found_inf, allow_fp16), found_inf)

    GradScaler._unscale_grads_ = ours


def asked_for_full_state() -> bool:
    """Whether torch.distributed.checkpoint asks with the option ``full_state_dict``, of which ``state_dict()`` is not told."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name in ("_get_model_state_dict", "_get_optim_state_dict") and code.co_filename.endswith(
            "state_dict.py"
        ):
            return bool(frame.f_locals["info"].full_state_dict)
        frame = frame.f_back
    return False


def in_state_initialisation() -> bool:
    """Whether torch.distributed.checkpoint has an optimiser make its states, with a step of zero gradients that moves nothing.
    A rank whose optimiser has states already takes no such step."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "_init_optim_state" and frame.f_code.co_filename.endswith("state_dict.py"):
            return True
        frame = frame.f_back
    return False


def unknown_size(like: torch.Tensor, likely: Any) -> Any:
    """A size that is known only when the graph runs, and is ``likely`` so large; for the fake of an operator.

    Dynamo's ``capture_scalar_outputs`` and ``capture_dynamic_output_shape_ops`` say whether a graph that it captures may have
    such sizes; what is inserted behind it needs neither.
    """
    mode = getattr(like, "fake_mode", None)
    if mode is None or mode.shape_env is None:  # tensors without values and without symbols
        return likely
    size = mode.shape_env.create_unbacked_symint()
    torch._check(size >= 0)
    _expectations.setdefault(mode.shape_env, {})[size.node.expr] = likely
    hints = mode.shape_env.__dict__.get(
        "var_to_hint_override"
    )  # which Inductor orders and tiles by, where torch has it
    if hints is not None and (number := expected(likely)) is not None:
        hints[size.node.expr] = number
    return size


#: What is expected of the sizes that :func:`unknown_size` has made, by their symbols. torch's own place for it takes numbers
#: only, and is not in all versions.
_expectations: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()


def expected(size: Any) -> Any:
    """A size as a number, without a guard: a dynamic one as it is for the inputs at hand, an unknown one as it is expected.
    None where nothing is: the model's own operators made it."""
    if not isinstance(size, torch.SymInt):
        return size
    env, expression = size.node.shape_env, size.node.expr
    expectations = _expectations.get(env, {})
    # The second is its name until torch 2.11; from then on that warns.
    known = env.__dict__.get("backed_var_to_val") or env.__dict__.get("var_to_val") or {}
    values = {s: expected(expectations[s]) if s in expectations else known.get(s) for s in expression.free_symbols}
    return None if None in values.values() else int(expression.xreplace(values))


def expected_elements(tensor: torch.Tensor) -> int:
    """Of a tensor some sizes of which may be unknown; those of which nothing is expected count as nothing."""
    count = 1
    for size in tensor.shape:
        count *= expected(size) or 0
    return count


def as_expected(gm: fx.GraphModule, mark: str) -> fx.GraphModule | None:
    """A copy of a graph that computes sizes which :func:`unknown_size` has made, with the numbers that are expected in their
    place; nodes have the same names, and those whose size was unknown have ``mark`` in their ``meta``. None where no size is
    unknown."""
    if not any(_is_unknown(size) for node in gm.graph.nodes for size in sizes_of(node.meta.get("val"))):
        return None
    graph = copy.deepcopy(gm.graph)
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if isinstance(value, (torch.SymInt, torch.SymBool)) and node.op == "call_function":
            number: Any = (
                expected(value) if isinstance(value, torch.SymInt) else True
            )  # a check, which the real graph makes
            if number is not None:
                for user in list(node.users):
                    user.args, user.kwargs = fx.map_arg(
                        (user.args, user.kwargs), lambda n, node=node, number=number: number if n is node else n
                    )
                graph.erase_node(node)
        elif any(_is_unknown(size) for size in sizes_of(value)):
            node.meta = {
                **node.meta,
                "val": torch.utils._pytree.tree_map_only(torch.Tensor, _as_expected, value),
                mark: True,
            }
        elif not node.all_input_nodes and not node.users and node.op == "call_function":
            graph.erase_node(node)  # a check of what is now a number
    return graph_module(gm, graph)


def sizes_of(value: Any) -> Iterator[Any]:
    """All numbers in a node's value that may be symbols: sizes and strides of its tensors, and what is a size itself."""
    for leaf in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(leaf, torch.Tensor):
            yield from (*leaf.shape, *leaf.stride(), leaf.storage_offset())
        else:
            yield leaf


def is_unbacked(size: Any) -> bool:
    """Whether only a run tells it."""
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    return isinstance(size, torch.SymInt) and bool(free_unbacked_symbols(size))


def _is_unknown(size: Any) -> bool:
    """Whether it is made of what :func:`unknown_size` has made."""
    return isinstance(size, torch.SymInt) and not _expectations.get(size.node.shape_env, {}).keys().isdisjoint(
        size.node.expr.free_symbols
    )


def _as_expected(tensor: torch.Tensor) -> torch.Tensor:
    shape, stride = ([expected(s) for s in sizes] for sizes in (tensor.shape, tensor.stride()))
    if None in shape or None in stride:
        return tensor
    with mode_of([tensor]):
        return torch.empty_strided(shape, stride, dtype=tensor.dtype, device=tensor.device)


def unknown_sizes(values: Iterable[Any]) -> dict[str, str] | None:
    """The sizes that only a run tells in the shapes, strides and offsets of ``values``, tensors and numbers: by name, in order,
    what is known of each. None where another size is a symbol, whose value guards have looked at."""
    from torch.fx.experimental.symbolic_shapes import free_symbols, free_unbacked_symbols

    found: dict[str, str] = {}
    for value in values:
        parts = [*value.shape, *value.stride(), value.storage_offset()] if isinstance(value, torch.Tensor) else [value]
        for size in (part for part in parts if isinstance(part, torch.SymInt)):
            unknown = free_unbacked_symbols(size)
            if len(free_symbols(size)) != len(unknown):
                return None
            env = size.node.shape_env
            for symbol in unknown:
                checks = [str(check.expr) for check in env.deferred_runtime_asserts.get(symbol, ())]
                found[str(symbol)] = f"{env.var_to_range[symbol]} {checks}"
    return found


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether it has a shape and no values."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)


def storage_of(tensor: torch.Tensor) -> int | None:
    """What is the same for a tensor and its views; None for what has no memory of its own, as a tensor inside of ``vmap``."""
    try:
        return tensor.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):
        return None


def traced(
    function: Callable[..., Any], values: Sequence[Any], decompositions: Mapping[Any, Any] | None = None
) -> fx.GraphModule:
    """``function`` in ATen operators that write nothing in place, for fake ``values`` of another trace than the one at hand; no
    guard comes of it."""
    from torch.fx.experimental.proxy_tensor import make_fx

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch._guards.tracing(None))
        stack.enter_context(without_fake_mode())
        stack.enter_context(torch.no_grad())
        mode = next((v.fake_mode for v in values if is_fake(v)), None)
        if mode is not None:
            stack.enter_context(mode)
            if mode.shape_env is not None:
                stack.enter_context(mode.shape_env.suppress_guards())
        bare = [v.detach() if isinstance(v, torch.Tensor) else v for v in values]
        return make_fx(torch.func.functionalize(function), decomposition_table=decompositions)(*bare)


def as_fake(values: Sequence[Any]) -> tuple[Any, list[Any]]:
    """Copies of tensors without values, and the fake mode that they are of: that of the trace at hand."""
    from torch._guards import detect_fake_mode
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = detect_fake_mode(list(values)) or FakeTensorMode()

    def copied(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)

    with mode:
        return mode, [copied(value) for value in values]


def pipeline_order(name: str, ranks: int, virtual_stages: int, micro_batches: int) -> list[list[tuple[str, int, int]]]:
    """What each rank of a pipeline computes, in order, by the schedule class ``name`` of ``torch.distributed.pipelining``.

    Each is the letter of torch's kind of action ("F", "B", "I" or "W"), the stage and the micro-batch; pairs that torch means
    to overlap come one after the other, and bubbles are left out. ``virtual_stages`` is how many stages a rank has. The classes
    read nothing of a stage but its numbers, so neither processes nor modules are needed. ``ValueError`` as torch raises it.
    """
    from torch.distributed.pipelining import schedules

    # Sends and receives are added later, to what is kept: torch would add its own to an order that is only read.
    cls = schedules.get_schedule_class(name)
    cls = type(cls.__name__, (cls,), {"_prepare_schedule_with_comms": lambda *_, **__: None})
    stages = [_NumberedStage(ranks, ranks * virtual_stages) for _ in range(virtual_stages)]
    single = issubclass(cls, schedules.PipelineScheduleSingle)
    order = cls(stages[0] if single else stages, micro_batches).pipeline_order
    answer: list[list[tuple[str, int, int]]] = []
    for rank in range(ranks):
        flat = [part for action in order[rank] if action is not None for part in action.sub_actions or (action,)]
        answer.append(
            [
                (action.computation_type.value, action.stage_index, action.microbatch_index)
                for action in flat
                if action.computation_type.value in ("F", "B", "I", "W")
            ]
        )
    if single:  # torch 2.13 counts the forwards of 1F1B's last rank from 1
        for actions in answer:
            forward = itertools.count()
            actions[:] = [(k, stage, next(forward) if k == "F" else batch) for k, stage, batch in actions]
    return answer


class _NumberedStage:
    """As much of a stage as a schedule reads to make its order."""

    is_last = False
    submod = None
    group_rank = 0

    def __init__(self, group_size: int, num_stages: int) -> None:
        self.group_size = group_size
        self.num_stages = num_stages
        self.stage_index_to_group_rank: dict[int, int] = {}


def with_transfers(
    order: Sequence[Sequence[tuple[str, int, int]]], rank_of: Sequence[int]
) -> list[list[tuple[str, int, int]]]:
    """``order`` as :func:`pipeline_order` answers it, with "SEND_F", "RECV_F", "SEND_B" and "RECV_B" between, each by the
    stage that does it; ``rank_of`` has the rank of each stage. Both ends of a transfer stand at one moment of an order of all
    ranks, so none waits in a circle, even where both ends block. ``ValueError`` for an order that cannot be run at all."""
    from torch.distributed.pipelining import schedules

    def action(kind: str, stage: int, batch: int) -> Any:
        return schedules._Action(stage, schedules._ComputationType(kind), batch)

    actions = {rank: [action(*one) for one in ones] for rank, ones in enumerate(order) if ones}
    try:
        done = schedules._add_send_recv(actions, rank_of.__getitem__, len(rank_of))
    except AssertionError as error:
        raise ValueError(str(error)) from None
    return [
        [(a.computation_type.value, a.stage_index, a.microbatch_index) for a in done.get(rank, ())]
        for rank in range(len(order))
    ]
