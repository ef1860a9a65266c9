"""What the process that ranks are forked from has imported, so that each rank begins with it: torch, Inductor, transformers.

It starts no thread, which a fork would not bring along, and compiles nothing. What Inductor asks of the compiler in each
process that generates C++, which vector instructions work, is asked once."""

from __future__ import annotations

import contextlib
import gc
import importlib


def _import_all() -> None:
    import torch

    for name in ("torch._inductor.compile_fx", "dspass.backend", "dspass.explain", "dspass.pipelined"):
        importlib.import_module(name)
    with contextlib.suppress(ImportError):
        importlib.import_module("transformers.models.llama.modeling_llama")
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    torch.set_num_threads(1)
    pick_vec_isa()


gc.disable()  # nothing of what is imported goes, and each collection would look through all of it
_import_all()
gc.collect()
gc.freeze()
gc.enable()
