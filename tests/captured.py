"""Models as Dynamo captures them for a pipeline: one graph, each parameter read through its marker."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import nn

from dspass.backend import mark_plain
from dspass.config import Config
from dspass.engines import new_engine
from dspass.runtime import compat
from dspass.runtime.engine import Engine
from dspass.runtime.params import ParamSpec


def capture(model: nn.Module, batch: Mapping[str, Any] | Sequence[Any]) -> tuple[fx.GraphModule, Engine]:
    """The graph of a call, and the engine that its parameters' keys live as long as."""
    found: list[tuple[fx.GraphModule, Sequence[Any]]] = []

    def stop(*_: Any) -> Any:
        raise _Captured

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        found.append((gm, inputs))
        return stop

    torch._dynamo.reset()
    args, kwargs = ((), batch) if isinstance(batch, Mapping) else (batch, {})
    with compat.ignoring_logs(), contextlib.suppress(_Captured):
        torch.compile(model, backend=backend, fullgraph=True)(*args, **kwargs)
    ((gm, inputs),) = found
    engine = new_engine(model, Config.load({}))
    mark_plain(gm, inputs, specs_of(model, engine))
    return gm, engine


class _Captured(Exception):
    """The captured graph is not run."""


def specs_of(model: nn.Module, engine: Engine) -> dict[int, ParamSpec]:
    return {
        id(param): engine.add(
            ParamSpec(
                key=f"{engine.name}/{name}",
                name=name,
                shape=tuple(param.shape),
                dtype=param.dtype,
                compute_dtype=param.dtype,
                reduce_dtype=param.dtype,
                layout="plain",
                shard_axis=None,
                replicate_axis=None,
                trains=param.requires_grad,
                engine=engine,
                param=weakref.ref(param),
            )
        )
        for name, param in model.named_parameters()
    }
