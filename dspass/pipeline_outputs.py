"""What a call of a pipeline answers: micro-batches' outputs put together, the loss with its gradients, and what stands for the
rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.fx as fx

from dspass.passes.combine_losses import Combination
from dspass.passes.experts import value_of
from dspass.passes.split_stages import StageGraph
from dspass.passes.whole_batch import grown
from dspass.runtime.axis import Axis
from dspass.runtime.engine import Engine


class PipelineUseError(RuntimeError):
    """A model, or a use of it, that cannot be run as a pipeline: why, and the way out."""


class NotComputed(torch.Tensor):
    """Stands for an output that no stage keeps, or that another rank has; whatever reads its values raises."""

    _why: str

    @staticmethod
    def __new__(cls, shape: Sequence[int], dtype: torch.dtype, why: str) -> NotComputed:
        made = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=torch.device("meta"))
        made._why = why
        return made

    def __repr__(self, **_: Any) -> str:
        return f"NotComputed(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = next(a for a in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(a, NotComputed))
        raise PipelineUseError(f"{func.name()} reads an output that is not here: {found._why}")


_DROPPED = (
    "a pipeline that trains answers the loss, and scalars that add up over micro-batches; other outputs of these are gone when "
    "their backwards have run. "
    "Compute what you need of them inside of the model's forward, as a part of the loss, or call the model under "
    "torch.no_grad()."
)
_ELSEWHERE = 'only the last stage answers outputs, as pipeline.outputs says; write "all" for every rank to have them.'


_APART = (
    "it is of the whole batch, and what micro-batches have of it does not add up to that. Compute it from outputs that have a "
    "row a sample, or set pipeline.micro_batches to 1."
)


@dataclass(frozen=True, kw_only=True)
class Output:
    """One output of the captured graph: of ``shape`` and ``dtype`` for a micro-batch, and made by the graph (``is_made``), on
    ``stage`` if any keeps it; or equal to an ``input`` by position, or a ``literal``.

    Each micro-batch has its own ``rows``, along this dimension, or a value that ``adds`` up to the batch's, or one that is
    ``apart`` and cannot be put together; else all have the same.
    """

    stage: int | None = None
    input: int | None = None
    literal: Any = None
    is_made: bool = False
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    rows: int | None = None
    adds: bool = False
    apart: bool = False
    is_loss: bool = False

    def whole(self, values: Sequence[Any]) -> Any:
        """Of all micro-batches' ``values`` the batch's."""
        first = values[0]
        if not isinstance(first, torch.Tensor):
            return first
        if self.adds:
            values = [value.double() if value.is_floating_point() else value for value in values]
            return torch.stack(values).sum(0).to(first.dtype)
        return first if self.rows is None else torch.cat(list(values), self.rows)

    def whole_shape(self, count: int) -> tuple[int, ...]:
        return tuple(size * count if dim == self.rows else size for dim, size in enumerate(self.shape))

    def stand_in(self, count: int, trains: bool) -> NotComputed:
        why = _DROPPED if trains and not self.adds else _APART if self.apart else _ELSEWHERE
        return NotComputed(self.whole_shape(count), self.dtype, why)


def outputs_of(
    graph: fx.Graph,
    whole: fx.Graph | None,
    micro_batches: int,
    of_batch: set[fx.Node],
    combination: Combination | None,
) -> list[Output]:
    """Each output of a captured graph and of the ``whole`` batch's, where there are several micro-batches; ``of_batch`` are its
    inputs that were split into them."""
    loss, adds = (combination.loss, combination.adds) if combination is not None else (None, frozenset[fx.Node]())
    answers: Any = graph.output_node().args[0]
    of_whole: Any = answers if whole is None else whole.output_node().args[0]
    places = {node: i for i, node in enumerate(graph.find_nodes(op="placeholder"))}
    split = set(of_batch)
    for node in graph.nodes:
        if any(source in split for source in node.all_input_nodes):
            split.add(node)
    found = []
    for answer, twin in zip(answers, of_whole, strict=True):
        value = value_of(answer) if isinstance(answer, fx.Node) else answer
        if not isinstance(value, torch.Tensor):
            found.append(Output(input=places.get(answer) if isinstance(answer, fx.Node) else None, literal=value))
            continue
        dims = () if whole is None or answer not in split else grown(value, value_of(twin), micro_batches)
        rows = dims[0] if dims is not None and len(dims) == 1 else None
        found.append(
            Output(
                input=places.get(answer),
                is_made=answer not in places,
                shape=tuple(int(s) for s in value.shape),
                dtype=value.dtype,
                rows=rows,
                adds=answer in adds,
                apart=whole is not None and answer in split and rows is None and answer not in adds,
                is_loss=loss is not None and answer is loss,
            )
        )
    return found


def on_stages(outputs: Sequence[Output], graphs: Sequence[StageGraph]) -> list[Output]:
    """``outputs`` with the stages that make them."""
    stage_of = {position: graph.index for graph in graphs for position in graph.results}
    return [replace(output, stage=stage_of.get(position)) for position, output in enumerate(outputs)]


class _Evaluated(torch.autograd.Function):
    """Answers a loss that has no gradients, and says so where they are asked for."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        raise PipelineUseError(
            "backward() of a loss that was computed in evaluation: after eval() a pipeline runs forward only. Call train() "
            "before the model; to train without dropout, set its p to 0 or call eval() on the dropout modules alone."
        )


def evaluated(loss: torch.Tensor) -> torch.Tensor:
    """A ``loss`` of a model that is in evaluation, though gradients are enabled."""
    with torch.enable_grad():
        return _Evaluated.apply(loss, torch.zeros((), requires_grad=True))


class LossScale:
    """What backwards of micro-batches begin with where they compute in fp16.

    They run in the call of the model, before the loss's own backward says what it is scaled by. Begun with 1, gradients that a
    ``GradScaler`` is there to save would vanish, unseen by it. So they begin with what has arrived last, at first with 2**15,
    and what is delivered is divided by that again.
    """

    def __init__(self, device: str) -> None:
        self.value = torch.full((), 2.0**15, device=device)

    def begin(self, pipe: Axis, owner: int) -> torch.Tensor:
        """That of rank ``owner`` of the pipeline, which has the loss, on all of its ranks."""
        scale = self.value.clone()
        if pipe.size > 1:
            dist.broadcast(scale, pipe.ranks[owner], pipe.group)
        return scale

    def arrived(self, gradient: torch.Tensor) -> None:
        good = gradient.isfinite() & (gradient != 0)
        self.value = torch.where(good, gradient.detach().float(), self.value)


class _Deliver(torch.autograd.Function):
    """Answers a loss whose gradients are known, and hands them out, times what arrives."""

    @staticmethod
    def forward(
        ctx: Any,
        loss: torch.Tensor,
        gradients: list[torch.Tensor | None],
        scale: torch.Tensor | None,
        told: LossScale | None,
        *shards: torch.Tensor,
    ) -> torch.Tensor:
        ctx.gradients, ctx.scale, ctx.told = gradients, scale, told
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        held, ctx.gradients = ctx.gradients, None
        if held is None:
            raise PipelineUseError(
                "the gradients of this loss have been delivered: a pipeline runs all backwards in the call of the model, and "
                "keeps them once. Call the model again instead of backward() a second time."
            )
        if ctx.told is not None:
            ctx.told.arrived(gradient)
        factor = gradient if ctx.scale is None else gradient.float() / ctx.scale
        for one in held:
            if one is not None:
                one.mul_(factor.to(one.device))
        return None, None, None, None, *held


def delivered(
    engine: Engine,
    loss: torch.Tensor,
    gradients: Mapping[str, torch.Tensor],
    scale: torch.Tensor | None = None,
    told: LossScale | None = None,
) -> torch.Tensor:
    """``loss`` as the model's own would be: its backward gives each parameter that lies here its gradient, of ``gradients``
    that are ``scale`` times too large, and tells ``told`` what it was scaled by."""
    keys = list(gradients)
    shards = []
    for key in keys:
        param: Any = engine.specs[key].param()
        shards.append(param.to_local())
    anchor = torch.zeros((), requires_grad=True)  # a loss has a backward on every rank, whatever is frozen there
    return _Deliver.apply(loss, [*(gradients[key] for key in keys), None], scale, told, *shards, anchor)


__all__ = [
    "LossScale",
    "NotComputed",
    "Output",
    "PipelineUseError",
    "delivered",
    "evaluated",
    "on_stages",
    "outputs_of",
]
