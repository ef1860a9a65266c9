"""What a pipeline would compute otherwise than the model alone, or not at all, and refuses with its reason and the way out.

They look at what is captured and at the first call of that, and cost later ones nothing. What one of its graphs cannot show,
such as a batch norm that is written out by hand, stays as it is: models that look at the rows of their batch in that way train
otherwise in smaller batches, whoever splits them.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.fx as fx
from torch import nn
from torch.utils._pytree import keystr, tree_flatten_with_path

from dspass.passes.experts import name_of
from dspass.passes.split_stages import StageGraph
from dspass.passes.whole_batch import mixes_rows, share_memory, writes
from dspass.pipeline_outputs import PipelineUseError
from dspass.runtime import compat
from dspass.runtime.axis import Axis
from dspass.runtime.stopped import waiting_for

#: Operators that normalise over a batch where ``training``, their argument of this position, is set.
_BATCH_NORMS, _TRAINING = ("batch_norm", "native_batch_norm"), 5


def refuse_gradients(leaves: Sequence[Any]) -> None:
    """Of arguments that want gradients."""
    if any(isinstance(t, torch.Tensor) and t.requires_grad for t in leaves):
        raise PipelineUseError(
            "an argument of the model wants a gradient: a pipeline delivers those of its parameters alone. Move what makes the "
            "argument into the model, or detach it."
        )


def refuse_state(graph: fx.Graph, split: Collection[fx.Node], micro_batches: int, trains: bool) -> None:
    """Of what a micro-batch would change for the next: buffers and arguments that the forward writes, as batch norm does.

    Without gradients a forward may write into an input that is ``split``, such as a cache: each micro-batch has its own rows.
    """
    if not trains and micro_batches == 1:
        return
    placeholders = [node for node in graph.find_nodes(op="placeholder") if trains or node not in split]
    for node in graph.nodes:
        if name_of(node) in _BATCH_NORMS and _argument(node, _TRAINING, "training"):
            raise PipelineUseError(
                f"{node.name} normalises over a batch and keeps its statistics: split into micro-batches it would compute "
                "something else. Call eval() on the batch norms, use group or layer norm, or do without a pipeline."
            )
    for node in filter(writes, graph.nodes):
        written = next((p for p in placeholders if share_memory(node.args[0], p)), None)
        if written is not None:
            raise PipelineUseError(
                f"{node.name} writes into {compat.placeholder_source(written) or written}, which each micro-batch would do "
                "again. Take it out of the forward."
            )


def _argument(node: fx.Node, place: int, name: str) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, False)


@contextlib.contextmanager
def keeping_buffers(root: nn.Module) -> Iterator[None]:
    """Raise where a forward that runs inside gives a module another buffer: micro-batches have made none."""
    before = list(_buffers(root))
    yield
    changed = [(name, module, key, old) for name, module, key, old in before if module._buffers.get(key) is not old]
    for _, module, key, old in changed:
        module._buffers[key] = old
    if changed:
        raise PipelineUseError(
            f"the model's forward assigns {', '.join(name for name, *_ in changed)}: a buffer that each micro-batch would "
            "assign anew. It has its old value. Update it outside of the forward, once a step."
        )


def _buffers(root: nn.Module) -> Iterator[tuple[str, nn.Module, str, torch.Tensor | None]]:
    for prefix, module in root.named_modules():
        for key, value in module._buffers.items():
            yield f"{prefix}.{key}" if prefix else key, module, key, value


def refuse_mixed_rows(
    graph: fx.Graph, whole: fx.Graph, micro_batches: int, root: nn.Module, call: tuple[Any, Any], rows: int
) -> None:
    """Of a product of rows with other rows of the batch, which micro-batches have not. ``call``: the arguments of ``root`` for
    a micro-batch of so many ``rows``."""
    node = mixes_rows(graph, whole, micro_batches)
    if node is None:
        return
    args, kwargs = call
    arguments = inspect.signature(type(root).forward).bind(root, *args, **kwargs).arguments
    split = [
        f"{path[0].key}{keystr(path[1:])} {list(value.shape)}"
        for path, value in tree_flatten_with_path(dict(list(arguments.items())[1:]))[0]
        if isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == rows
    ]
    raise PipelineUseError(
        f"%{node.name} ({name_of(node)}) computes with pairs of rows of a batch, and in micro-batches meets those of its own "
        f"alone. Arguments are split along their first dimension, here into {', '.join(split)}. Where another dimension is the "
        "batch's, put that one first; where an argument has no row a sample, such as a table that all samples read, pass it "
        "with a dimension of 1 in front, or as a buffer of the model; where rows are meant to meet, as in a contrastive loss, "
        "set pipeline.micro_batches to 1."
    )


def same_batch(pipe: Axis, leaves: Sequence[Any]) -> None:
    """Compare what the ranks of one pipeline are called with, and raise on all of them where it differs."""
    if pipe.size == 1:
        return
    everyone = _of_all(pipe, [digest(leaf) for leaf in leaves], "compare batches")
    for place, other in enumerate(everyone):
        if other != everyone[0]:
            raise PipelineUseError(
                f"ranks {pipe.ranks[0]} and {pipe.ranks[place]} were called with different batches, and are of one pipeline, "
                f"ranks {list(pipe.ranks)}: each passes the same batch, of which it uses what its stages need. With a "
                "DistributedSampler write num_replicas=world_size // stages and rank=rank % num_replicas."
            )


def same_cuts(pipe: Axis, graphs: Sequence[StageGraph]) -> None:
    """Compare what the ranks of one pipeline are to send each other, and raise on all of them where it differs."""
    if pipe.size == 1:
        return
    mine = [[(v.name, v.shape, str(v.dtype), v.dims, v.has_gradient) for v in graph.sent] for graph in graphs]
    everyone = _of_all(pipe, mine, "compare stages")
    for place, other in enumerate(everyone):
        if other != everyone[0]:
            stage = next(i for i, (a, b) in enumerate(zip(everyone[0], other, strict=True)) if a != b)
            raise PipelineUseError(
                f"ranks {pipe.ranks[0]} and {pipe.ranks[place]} captured different graphs: behind stage {stage} they expect "
                f"{[name for name, *_ in everyone[0][stage]]} and {[name for name, *_ in other[stage]]}, of shapes "
                f"{[shape for _, shape, *_ in everyone[0][stage]]} and {[shape for _, shape, *_ in other[stage]]}. Have the "
                "model's forward do the same on all ranks, whatever their number, and pass all of them the same batch."
            )


def _of_all(pipe: Axis, mine: Any, what: str) -> list[Any]:
    everyone: list[Any] = [None] * pipe.size
    with waiting_for(pipe, what):
        dist.all_gather_object(everyone, mine, pipe.group)
    return everyone


def digest(leaf: Any) -> Any:
    """What tells an argument of one rank from another rank's, in a few bytes a sample."""
    if not isinstance(leaf, torch.Tensor):
        return repr(leaf) if isinstance(leaf, (int, float, bool, str, type(None))) else type(leaf).__name__
    described = tuple(leaf.shape), str(leaf.dtype)
    if leaf.is_meta or compat.is_fake(leaf) or not leaf.numel():
        return described
    values = torch.view_as_real(leaf) if leaf.is_complex() else leaf
    values = values.view(torch.uint8) if values.dtype.itemsize == 1 else values  # floats of 8 bits have no hash
    rows = values.detach().reshape(leaf.shape[0] if leaf.dim() else 1, -1)
    return *described, torch.hash_tensor(rows, 1).tolist()


__all__ = [
    "digest",
    "keeping_buffers",
    "refuse_gradients",
    "refuse_mixed_rows",
    "refuse_state",
    "same_batch",
    "same_cuts",
]
