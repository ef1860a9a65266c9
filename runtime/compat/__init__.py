"""Every private name of torch that dspass uses, behind one door. Not counted is what torch's own documentation has people use:
``torch._check``, ``torch._foreach_*``, ``torch._ops.OpOverload``, ``torch.utils._pytree`` and ``_python_dispatch``, wrapper
subclasses, and ``torch._dynamo``'s ``disable`` and registry. ``tests/test_layers.py`` reads the source for others.

Tried with torch 2.11 to 2.13 (2.13 by the whole test suite on the CPU). Another version is refused by
:func:`check_torch` with an error that says so, rather than failing later inside a graph.

All is called as ``compat.name``, so that a test can put something in a name's place; what the modules here call of one another
it puts into the one that calls. What is where:

================== ==============================================================================================
``versions.py``    the versions of torch that were tried
``dynamo.py``      what Dynamo is capturing, where inputs come from, when it compiles again
``aot.py``         AOTAutograd: its backend, tracing as it does, gradients among its outputs, the cut of a joint graph
``inductor.py``    Inductor: settings, its passes over a joint graph, its compiler for parts of a graph
``graphs.py``      graphs of torch.fx: made, traced from functions, completed with values
``fake.py``        fake tensors and their modes
``dispatch.py``    torch's dispatcher: who serves an operator
``sizes.py``       sizes that only a run tells, and what is expected of them
``calls.py``       what this thread is in the middle of: an autograd run, a compiled call, a checkpoint
``products.py``    matrix products: oneDNN's, grouped ones, those of int8
``optim.py``       around an optimiser's step: hooks, the norm of gradients, overflows
``distributed.py`` process groups, and the orders of ``torch.distributed.pipelining``
``logs.py``        ``TORCH_LOGS``, ``TORCH_TRACE``, loggers in what is captured
================== ==============================================================================================
"""

from __future__ import annotations

from dspass.runtime.compat.aot import (
    Chooser,
    Gradient,
    Unplanned,
    aot_backend,
    gradient,
    min_cut_partition,
    own_tracing,
    without_autocast,
)
from dspass.runtime.compat.calls import (
    RunningCall,
    asked_for_full_state,
    at_end_of_backward,
    backward_run,
    call_at,
    call_of,
    in_compiled_call,
    in_state_initialisation,
)
from dspass.runtime.compat.dispatch import behind_versions, has_kernel
from dspass.runtime.compat.distributed import (
    init_fake_group,
    local_of,
    pipeline_order,
    set_local,
    store,
    with_transfers,
)
from dspass.runtime.compat.dynamo import (
    allow_compilations,
    broken_graph,
    capture_error,
    captured_code,
    compiled_frame,
    compiling_apart,
    guard_identity,
    in_one_piece,
    in_resumed_frame,
    keep_shapes_static,
    placeholder_source,
    refuse_uncompiled,
)
from dspass.runtime.compat.fake import apart, as_fake, fake_mode, is_fake, mode_of, storage_of, without_fake_mode
from dspass.runtime.compat.graphs import (
    ENTERS_AUTOCAST,
    EXITS_AUTOCAST,
    SETS_GRADIENTS,
    fill_values,
    graph_module,
    traced,
)
from dspass.runtime.compat.inductor import (
    compile_for_rows,
    compile_segment,
    generate_segment,
    inductor_decompositions,
    inductor_hash,
    joint_graph_passes,
)
from dspass.runtime.compat.logs import ignoring_logs, register_log, trace_artifact
from dspass.runtime.compat.optim import (
    FoundInf,
    TotalNorm,
    around_step,
    bare_step,
    extend_found_inf,
    extend_total_norm,
    reduce_overflow_of_mixed_placements,
    total_norm,
)
from dspass.runtime.compat.products import (
    grouped_product,
    has_int8_product,
    has_onednn,
    int8_product,
    integer_product,
    multiplies_by_onednn,
    multiplies_grouped,
    multiplies_integers,
    onednn_linear,
)
from dspass.runtime.compat.sizes import (
    as_expected,
    expected,
    expected_elements,
    is_unbacked,
    sizes_of,
    unknown_size,
    unknown_sizes,
)
from dspass.runtime.compat.versions import SUPPORTED, UnsupportedTorchError, check_torch

__all__ = [
    "ENTERS_AUTOCAST",
    "EXITS_AUTOCAST",
    "SETS_GRADIENTS",
    "SUPPORTED",
    "Chooser",
    "FoundInf",
    "Gradient",
    "RunningCall",
    "TotalNorm",
    "Unplanned",
    "UnsupportedTorchError",
    "allow_compilations",
    "aot_backend",
    "apart",
    "around_step",
    "as_expected",
    "as_fake",
    "asked_for_full_state",
    "at_end_of_backward",
    "backward_run",
    "bare_step",
    "behind_versions",
    "broken_graph",
    "call_at",
    "call_of",
    "capture_error",
    "captured_code",
    "check_torch",
    "compile_for_rows",
    "compile_segment",
    "compiled_frame",
    "compiling_apart",
    "expected",
    "expected_elements",
    "extend_found_inf",
    "extend_total_norm",
    "fake_mode",
    "fill_values",
    "generate_segment",
    "gradient",
    "graph_module",
    "grouped_product",
    "guard_identity",
    "has_int8_product",
    "has_kernel",
    "has_onednn",
    "ignoring_logs",
    "in_compiled_call",
    "in_one_piece",
    "in_resumed_frame",
    "in_state_initialisation",
    "inductor_decompositions",
    "inductor_hash",
    "init_fake_group",
    "int8_product",
    "integer_product",
    "is_fake",
    "is_unbacked",
    "joint_graph_passes",
    "keep_shapes_static",
    "local_of",
    "min_cut_partition",
    "mode_of",
    "multiplies_by_onednn",
    "multiplies_grouped",
    "multiplies_integers",
    "onednn_linear",
    "own_tracing",
    "pipeline_order",
    "placeholder_source",
    "reduce_overflow_of_mixed_placements",
    "refuse_uncompiled",
    "register_log",
    "set_local",
    "sizes_of",
    "storage_of",
    "store",
    "total_norm",
    "trace_artifact",
    "traced",
    "unknown_size",
    "unknown_sizes",
    "with_transfers",
    "without_autocast",
    "without_fake_mode",
]
