"""The batch in parts that take turns around layers of experts: how many, and the graph of one.

A graph of the whole batch has its sizes written into it, so what one part takes is captured a second time
(:mod:`dspass.passes.split_batch` says how the two become one). The first call of the compiled graph does that, from inside of
the function that was captured: there are its arguments, and the compiler is done with it. Where the cost model chooses, all
ranks are in it together, and rank 0 says how many parts there are, since every exchange is one of all of them.

Each size of the batch is compiled by itself. A batch that parts do not divide goes in fewer, which is an error that names both
ranks where another rank's goes in more. What cannot be split is in one part, and the report says why.

Dropped: a choice by itself where nothing is written. Batches of another length each step are compiled once with symbols for
their sizes, and would now be compiled once each.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.fx as fx
from torch.utils._pytree import tree_leaves

from dspass.batches import batch_size, divided
from dspass.compilation import compile_graph
from dspass.config import Config
from dspass.passes import devices
from dspass.passes.base import Pass
from dspass.passes.expert_parts import COUNTS, WITHIN, chunks_save, seconds, turns_of
from dspass.passes.split_batch import SplitBatch, divided_layers
from dspass.runtime import compat
from dspass.runtime.engine import Engine
from dspass.settings import kind_of

log = logging.getLogger(__name__)


def in_parts(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    engine: Engine,
    config: Config,
    passes: Sequence[Pass],
    prepare: Callable[[fx.GraphModule], None],
) -> Callable[..., Any] | None:
    """What Dynamo gets for a captured graph whose batch may go in parts; None where it goes in one. ``prepare`` does to the
    graph of a part what was done to ``gm``."""
    wanted = config.experts.batch_parts
    if not config.expert_parallel.enabled or wanted in (None, 1) or not divided_layers(gm.graph):
        return None
    broken, why = compat.broken_graph(), None
    if wanted == "auto" and not devices.tabled(kind_of(engine)).overlaps:
        passes = _in_one(passes, "the device does not compute while it sends")
        return compile_graph(gm, inputs, engine, config, passes)
    if config.experts.limits:
        why = "which rows are beyond a capacity depends on all of it"
    elif broken is not None:
        why = f"the model's forward was captured in pieces, the first of which ends at {broken}"
    elif any(map(_has_symbols, inputs)):
        why = "its sizes are symbols: compile with dynamic=False"
    if why is not None:
        return compile_graph(gm, inputs, engine, config, _in_one(passes, why, warns=True))
    compat.keep_shapes_static()
    return torch._dynamo.disable(
        _InParts(gm, engine, config, passes, prepare), reason="captures a part of the batch first"
    )


def _in_one(passes: Sequence[Pass], why: str, warns: bool = False) -> Sequence[Pass]:
    """The passes, of which that of the parts says why there is one."""
    if warns:
        log.warning("dspass.experts.batch_parts has no effect, the batch is in one part: %s", why)
    return _with(passes, why=f"the batch is in one part: {why}")


def _with(passes: Sequence[Pass], **options: Any) -> tuple[Pass, ...]:
    return tuple(dataclasses.replace(p, **options) if isinstance(p, SplitBatch) else p for p in passes)


class _Captured(Exception):
    """Carries a part's graph out of the compiled function."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__()
        self.gm = gm


class _InParts:
    """The compiled graph, which is compiled in its first run."""

    def __init__(
        self,
        gm: fx.GraphModule,
        engine: Engine,
        config: Config,
        passes: Sequence[Pass],
        prepare: Callable[[fx.GraphModule], None],
    ) -> None:
        self.gm, self.engine, self.config, self.passes, self.prepare = gm, engine, config, passes, prepare
        self.frame, self.code = compat.compiled_frame(), compat.captured_code()
        self.run: Callable[..., Any] | None = None

    def __call__(self, *inputs: Any) -> Any:
        if self.run is None:
            passes = self._choose()
            with compat.own_tracing():
                self.run = compile_graph(self.gm, inputs, self.engine, self.config, passes, frame=self.frame)
        return self.run(*inputs)

    def _choose(self) -> Sequence[Pass]:
        """The passes, that of the parts among them with the graph of one."""
        call = compat.call_at(self.code)
        given = (call.args, call.kwargs, call.cells)
        size = batch_size(tree_leaves(given))
        if size is None:
            return _in_one(self.passes, "no argument of the model has a dimension")
        captured = functools.cache(lambda count: self._capture(call, *divided(given, size, count)))
        if self.engine.batch_parts is None:
            wanted = self.config.experts.batch_parts
            self.engine.batch_parts = _told(self._fastest(size, captured)) if wanted == "auto" else wanted
        asked = self.engine.batch_parts
        assert asked is not None
        if asked == 1:
            return _in_one(self.passes, "the cost model finds no other number faster")
        count = max(d for d in range(1, asked + 1) if size % d == 0)
        if count == 1:
            return _in_one(self.passes, f"{asked} do not divide its {size} rows", warns=True)
        try:
            return _with(self.passes, part=captured(count), count=count)
        except compat.capture_error() as error:
            return _in_one(self.passes, f"a part could not be captured: {str(error).splitlines()[0]}", warns=True)

    def _fastest(self, size: int, captured: Callable[[int], fx.GraphModule]) -> int:
        """What the cost model chooses; 1 where no part can be captured."""
        on, trains = devices.tabled(kind_of(self.engine)), torch.is_grad_enabled()
        self.engine.expected_imbalance = self.config.experts.expected_imbalance
        layers = divided_layers(self.gm.graph)
        best, fastest = 1, seconds(turns_of(self.gm, layers, on, trains), 1)
        fastest -= chunks_save(self.gm.graph, layers, on, trains)
        for count in (n for n in COUNTS if size % n == 0):
            try:
                gm = captured(count)
            except compat.capture_error():
                break
            found = seconds(turns_of(gm, divided_layers(gm.graph), on, trains), count)
            if found > fastest * WITHIN:
                break
            best, fastest = count, found
        return best

    def _capture(
        self, call: compat.RunningCall, args: Sequence[Any], kwargs: Mapping[str, Any], cells: Sequence[Any]
    ) -> fx.GraphModule:
        """The graph of a function for a part's arguments."""

        def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            compat.allow_compilations(1)
            self.prepare(gm)

            def stop(*_: Any) -> Any:
                raise _Captured(gm)

            return torch._dynamo.disable(stop, reason="gives up its graph")

        function = call.function(cells)
        try:
            with compat.ignoring_logs():
                torch.compile(function, backend=backend, fullgraph=True, dynamic=False)(*args, **kwargs)
        except _Captured as found:
            return found.gm
        raise AssertionError("a graph with layers of experts was captured of the whole batch, and none of a part")


def _has_symbols(value: Any) -> bool:
    sizes = value.shape if isinstance(value, torch.Tensor) else (value,)
    return any(isinstance(size, torch.SymInt) for size in sizes)


def _told(count: int) -> int:
    """What rank 0 says."""
    if not dist.is_initialized() or dist.get_world_size() == 1 or dist.get_backend() == "fake":
        return count
    told = [count]
    dist.broadcast_object_list(told, 0)
    return int(told[0])


__all__ = ["in_parts"]
