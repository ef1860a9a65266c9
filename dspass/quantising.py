"""How far quantised parameters are off, measured where they are sharded, and what a report says of what travels in few bits.

Errors are measured once, on the values that are there then, each rank its own shard, and added over ranks, so that all ranks
know the same and quantise the same buckets. Dropped: to measure at each step, which would go over all parameters once more.

Gradients and rows of experts are measured when the first of them are sent (:func:`dspass.runtime.quantise.rounding_squares`),
each rank its own, from their codes and scales: what was rounded is in no memory then.

Errors of saved activations are not measured: a value is whole no more when its codes are read, and to look at both in the
forward would make code that is compiled answer more, and hold what is to be free.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import prod
from typing import Any

import torch
import torch.distributed as dist
import torch.fx as fx

from dspass.config import Config
from dspass.passes.kernels import is_view, size_of
from dspass.passes.nodes import ROWS, calls, gather_start, is_packed, over_of, reduce_start, spec_of, specs_of
from dspass.passes.packed import COMPENSATE, QUANTISE, sizes_of
from dspass.passes.quantise_gathers import QuantiseGathers
from dspass.passes.quantise_saved import QUANTISE as QUANTISE_SAVED
from dspass.pipeline import build
from dspass.report import Direction, QuantisedTensor
from dspass.runtime import compat
from dspass.runtime.engine import Engine
from dspass.runtime.formats import format_of
from dspass.runtime.params import ParamSpec
from dspass.runtime.quantise import DTYPES, blocks_of, squares
from dspass.runtime.stopped import waiting_for

#: Values whose rounding is looked at together: what that takes is little beside a shard.
_AT_A_TIME = 2**20

#: So many tensors a sentence names.
_NAMED = 4


def measure_errors(engine: Engine, specs: Iterable[ParamSpec], config: Config) -> None:
    """Fill ``engine.quantised_errors`` for those of ``specs`` that may be gathered in few bits: ``|dequantised - p| / |p|``.

    All ranks call it together. Nothing is measured where there are no values, as in a prediction.
    """
    found = next((p for p in build(config) if isinstance(p, QuantiseGathers)), None)
    if found is None or found.format is None or engine.stage != 3:
        return
    sharded = [s for s in specs if s.layout == "shard" and s.dtype in DTYPES and _local(s) is not None]
    if not sharded or dist.get_backend() == "fake":
        return
    axis = sharded[0].shard_axis
    assert axis is not None
    sums = torch.stack([_squares(spec, found.format, found.block) for spec in sharded])
    with waiting_for(axis, "compare what quantising has changed"):
        dist.all_reduce(sums, group=axis.group)
    for spec, both in zip(sharded, sums, strict=True):
        engine.quantised_errors[spec.key] = relative(both)


def _local(spec: ParamSpec) -> torch.Tensor | None:
    param = spec.param()
    local = param.to_local() if param is not None else None
    return None if local is None or compat.is_fake(local) or local.is_meta else local


@torch.no_grad()
def _squares(spec: ParamSpec, format: str, block: int) -> torch.Tensor:
    """Of this rank's shard the sum of squares of what rounding changes, and of the values, in fp64."""
    local = _local(spec)
    assert local is not None
    sums = torch.zeros(2, dtype=torch.float64, device=local.device)
    for part in local.reshape(-1).split(_AT_A_TIME // block * block):
        codes, scales = torch.ops.dspass.quantise(part, format, block)
        sums += squares(part, torch.ops.dspass.dequantise(codes, scales, part.shape, format, torch.float32))
    return sums.to(_collective_device(spec, local))


def relative(sums: torch.Tensor) -> float:
    """An error as a norm over that of the values, from added :func:`squares <dspass.runtime.quantise.squares>`; 0
    where there are but zeros."""
    off, all_of_it = sums.tolist()
    return float((off / all_of_it) ** 0.5) if all_of_it else 0.0


def _collective_device(spec: ParamSpec, local: torch.Tensor) -> torch.device:
    """Shards that wait on the host are on the CPU; what a collective sends lies where its back end wants it."""
    assert spec.shard_axis is not None
    return torch.device("cuda") if spec.shard_axis.backend == "nccl" else local.device


def quantised_tensors(graphs: Iterable[tuple[Direction, fx.Graph]], engine: Engine) -> list[QuantisedTensor]:
    """Each parameter, and each gradient, of the buckets that ``graphs`` send, where any of them travels in few bits; the rows
    of experts, where any do; and the values that they save in few bits."""
    both = list(graphs)
    found = [one for direction, graph in both for one in _of_graph(direction, graph, engine)]
    rows = [one for direction, graph in both for one in _of_rows(direction, graph, engine)]
    saved = [one for direction, graph in both if direction == "forward" for one in _saved(graph)]
    return [
        *(found if any(one.format for one in found) or engine.quantised_errors else []),
        *(rows if any(one.format for one in rows) else []),
        *saved,
    ]


#: What is rounded before anybody can know by how much: words for it, and the key that says to what.
_KNOWN_LATER = {"reduction": ("Gradients of", "gradients"), "rows": ("Rows of", "exchanges")}


def notes_of_errors(tensors: Sequence[QuantisedTensor], limit: float | None) -> list[str]:
    """Sentences on gradients and rows of experts that are off by more than ``limit``, which is known once they have been
    sent."""
    said = []
    for kind, (words, key) in _KNOWN_LATER.items():
        errors = [(t.relative_error, t.name) for t in tensors if t.kind == kind and t.relative_error is not None]
        wrong = sorted(((error, name) for error, name in errors if limit is not None and error > limit), reverse=True)
        names = list(dict.fromkeys(name for _, name in wrong))
        if not names:
            continue
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        said.append(
            f"{words} {', '.join(names[:_NAMED])}{more} are off by up to {wrong[0][0]:.2g} in few bits, beyond "
            f"dspass.quantise.max_relative_error ({limit:g}): take a finer dspass.quantise.{key}, or a smaller block."
        )
    return said


def _saved(forward: fx.Graph) -> Iterator[QuantisedTensor]:
    answers = set(forward.find_nodes(op="output")[0].all_input_nodes)
    for quantised in sorted(calls(forward, QUANTISE_SAVED)):
        if answers.isdisjoint(quantised.users):
            continue  # the model's own
        value: Any = quantised.args[0]
        format: Any = quantised.args[1]
        source = value
        while is_view(source):  # in the order of memory
            source = source.args[0]
        yield QuantisedTensor(
            name=source.name,
            kind="saved",
            direction="forward",
            format=format,
            whole_bytes=size_of(value),
            sent_bytes=size_of(quantised),
        )


def _of_graph(direction: Direction, graph: fx.Graph, engine: Engine) -> Iterator[QuantisedTensor]:
    for start in [*sorted(calls(graph, gather_start)), *sorted(calls(graph, reduce_start))]:
        gathers, specs = start.target is gather_start, specs_of(start)
        if specs[0].engine is not engine or specs[0].layout != "shard":
            continue
        axis = specs[0].axis(over_of(start))
        format: Any = start.args[2] if is_packed(start) else None
        sizes = (
            [axis.padded_rows(s.shape[0]) // axis.size * prod(s.shape[1:]) for s in specs]
            if gathers
            else sizes_of(specs)
        )
        for spec, size in zip(specs, sizes, strict=True):
            chunks = 1 if gathers else axis.size
            whole = chunks * size * (spec.compute_dtype if gathers else spec.reduce_dtype).itemsize
            yield QuantisedTensor(
                name=spec.name,
                kind="gather" if gathers else "reduction",
                direction=direction,
                format=format,
                whole_bytes=whole,
                sent_bytes=whole if format is None else chunks * _packed_bytes(start, size),
                relative_error=_error_of(engine, spec, gathers, format),
            )


def _error_of(engine: Engine, spec: ParamSpec, gathers: bool, format: str | None) -> float | None:
    """Of a parameter, or of its gradient where that travels in few bits; None where it was not measured."""
    if gathers:
        return engine.quantised_errors.get(spec.key)
    sums = engine.gradient_errors.get(spec.key) if format is not None else None
    return None if sums is None else relative(sums)


def _of_rows(direction: Direction, graph: fx.Graph, engine: Engine) -> Iterator[QuantisedTensor]:
    for start in (n for n in graph.nodes if n.target in ROWS):
        spec, sent = spec_of(start), start.args[0]
        if spec.engine is not engine:
            continue
        size = sum(map(size_of, sent))
        packed = start.args[-1] if is_packed(start) else None
        error = None
        if packed is not None:
            kind = start.target.__name__.removesuffix("_start")
            sums = engine.row_errors.get((spec.key, direction, kind, packed[1]))
            error = None if sums is None else relative(sums)
        yield QuantisedTensor(
            name=spec.layer,
            kind="rows",
            direction=direction,
            format=None if packed is None else packed[0],
            whole_bytes=size if packed is None else size_of(_quantising(start).args[0][0]),
            sent_bytes=size,
            relative_error=error,
        )


def _quantising(start: Any) -> Any:
    """What has quantised that which ``start`` sends."""
    packed = start.args[0][0]
    while packed.target not in (QUANTISE, COMPENSATE):
        packed = packed.args[0]
    return packed


def _packed_bytes(start: Any, size: int) -> int:
    """Of ``size`` values of a bucket with their scales."""
    format, block = _quantising(start).args[3:5]
    count = blocks_of(size, block)
    return format_of(format).code_bytes(count * block) + 4 * count
