"""How bytes move: one class for each way that a process group is best driven.

A transport starts an operation and answers an :class:`InFlight`; ``wait()`` on it ends the operation and yields its
tensors. Nothing here knows of parameters or graphs.

- :class:`PointToPoint`, for gloo. Each rank sends its shard straight into the place where its peer wants it. gloo's own
  all-gather and reduce-scatter go through a flat buffer of the full size, and its reduce-scatter sends as many bytes as
  an all-reduce; point to point, 24 MiB a rank on two ranks took 28 instead of 74 ms to gather and 29 instead of 93 ms
  to reduce (two cores of one machine, one thread a rank), and needs no full-size buffer.
- :class:`Coalesced`, for NCCL and everything else. All tensors of a bucket go in one group launch, so that a bucket
  costs one launch and needs no copy into and out of a flat buffer.

Dropped: packing a bucket into one flat tensor (FSDP2, DeepSpeed). It costs one more pass over memory on each side and a
full-size buffer while it lasts. Where a bucket is quantised, a pass has packed it in the graph
(:mod:`dspass.passes.quantise_gathers`): what comes here are its codes and its scales.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from dspass.runtime import stopped
from dspass.runtime.axis import Axis


class InFlight:
    """An operation that was started, over ``axis`` where anything is sent. ``wait`` may be called once; it keeps every tensor
    alive that is on its way."""

    def __init__(
        self,
        works: Sequence[Any],
        results: list[torch.Tensor],
        finish: Callable[[], None] | None = None,
        keep: Sequence[torch.Tensor] = (),
        axis: Axis | None = None,
    ) -> None:
        self._works, self._axis = list(works), axis
        self.results = results
        self._finish = finish
        self._keep = list(keep)
        self.exposed_seconds = 0.0

    def wait(self) -> list[torch.Tensor]:
        """Raises :class:`RankStopped` where another rank stops meanwhile."""
        start = time.perf_counter()
        try:
            for work in self._works:
                work.wait()
        except RuntimeError as error:
            raise _lost(self._axis) from error
        self.exposed_seconds = time.perf_counter() - start
        if self._finish is not None:
            self._finish()
        self._works, self._finish, self._keep = [], None, []
        results, self.results = self.results, []
        return results


class Transport(ABC):
    """Collectives over dim 0 of lists of tensors. Shards follow :meth:`Axis.rows`; ranks may hold none."""

    @abstractmethod
    def all_gather(self, axis: Axis, shards: Sequence[torch.Tensor], rows: Sequence[int]) -> InFlight:
        """From each rank's rows to all rows; ``rows`` are the full counts. Yields contiguous tensors."""

    @abstractmethod
    def reduce_scatter(self, axis: Axis, full: Sequence[torch.Tensor]) -> InFlight:
        """The sum over ranks, each rank its own rows."""

    @abstractmethod
    def all_to_all(self, axis: Axis, tensors: Sequence[torch.Tensor]) -> InFlight:
        """Row ``r`` of each tensor goes to rank ``r``; row ``r`` of a result came from there. One row a rank."""

    @abstractmethod
    def exchange(
        self, axis: Axis, tensors: Sequence[torch.Tensor], sent: Sequence[int], received: Sequence[int]
    ) -> InFlight:
        """The first ``sent[0]`` rows of each tensor go to rank 0, the next ``sent[1]`` to rank 1; ``received`` are the counts
        that come, in the same order. Ranks may send and receive none."""

    def all_reduce(self, axis: Axis, tensors: Sequence[torch.Tensor]) -> InFlight:
        """The sum over ranks. Tensors of one call travel as one flat buffer, and the results are its views."""
        if len(tensors) == 1:
            flat = tensors[0].clone(memory_format=torch.contiguous_format)
            return InFlight([self._sum(flat, axis)], [flat], axis=axis)
        flat = torch.cat([t.reshape(-1) for t in tensors])
        parts = flat.split([t.numel() for t in tensors])
        results = [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]
        return InFlight([self._sum(flat, axis)], results, axis=axis)

    def _sum(self, flat: torch.Tensor, axis: Axis) -> Any:
        return dist.all_reduce(flat, group=axis.group, async_op=True)


class PointToPoint(Transport):
    def _receive(self, buffer: torch.Tensor, axis: Axis, peer: int) -> Any:
        try:
            return dist.irecv(buffer, axis.ranks[peer], axis.group)
        except RuntimeError as error:
            raise _lost(axis, peer) from error

    def _send(self, tensor: torch.Tensor, axis: Axis, peer: int) -> Any:
        try:
            return dist.isend(tensor, axis.ranks[peer], axis.group)
        except RuntimeError as error:
            raise _lost(axis, peer) from error

    def all_gather(self, axis: Axis, shards: Sequence[torch.Tensor], rows: Sequence[int]) -> InFlight:
        results, works, keep = [], [], []
        for shard, total in zip(shards, rows, strict=True):
            shard = shard.contiguous()
            full = shard.new_empty((total, *shard.shape[1:]))
            results.append(full)
            keep.append(shard)
            for peer in range(axis.size):
                start, count = axis.rows(total, peer)
                if peer == axis.rank:
                    full.narrow(0, start, count).copy_(shard)
                elif count * full[:1].numel():
                    works.append(self._receive(full.narrow(0, start, count), axis, peer))
        for shard in keep:
            if shard.numel():
                works += [self._send(shard, axis, peer) for peer in _others(axis)]
        return InFlight(works, results, keep=keep, axis=axis)

    def reduce_scatter(self, axis: Axis, full: Sequence[torch.Tensor]) -> InFlight:
        works, keep, results, sums = [], [], [], []
        for tensor in full:
            tensor = tensor.contiguous()
            keep.append(tensor)
            start, count = axis.rows(tensor.shape[0])
            own = tensor.narrow(0, start, count)
            arriving = [torch.empty_like(own) for _ in range(axis.size - 1)]
            result = arriving[0] if arriving else own.clone()
            results.append(result)
            if own.numel():
                works += [
                    self._receive(buffer, axis, peer) for buffer, peer in zip(arriving, _others(axis), strict=True)
                ]
                sums.append((result, own, arriving[1:]))
        for tensor in keep:
            for peer in _others(axis):
                start, count = axis.rows(tensor.shape[0], peer)
                part = tensor.narrow(0, start, count)
                if part.numel():
                    works.append(self._send(part, axis, peer))

        def finish() -> None:
            for result, own, others in sums:
                if axis.size > 1:
                    result.add_(own)
                for other in others:
                    result.add_(other)

        return InFlight(works, results, finish, keep, axis)

    def all_to_all(self, axis: Axis, tensors: Sequence[torch.Tensor]) -> InFlight:
        results, works, keep = [], [], []
        for tensor in tensors:
            tensor = tensor.contiguous()
            keep.append(tensor)
            result = torch.empty_like(tensor)
            results.append(result)
            result[axis.rank].copy_(tensor[axis.rank])
            if tensor[0].numel():
                works += [self._receive(result[peer], axis, peer) for peer in _others(axis)]
        for tensor in keep:
            if tensor[0].numel():
                works += [self._send(tensor[peer], axis, peer) for peer in _others(axis)]
        return InFlight(works, results, keep=keep, axis=axis)

    def exchange(
        self, axis: Axis, tensors: Sequence[torch.Tensor], sent: Sequence[int], received: Sequence[int]
    ) -> InFlight:
        results, works, sends, keep = [], [], [], []
        for rows in tensors:
            rows = rows.contiguous()
            keep.append(rows)
            result = rows.new_empty((sum(received), *rows.shape[1:]))
            results.append(result)
            leaving, arriving = rows[: sum(sent)].split(list(sent)), result.split(list(received))
            arriving[axis.rank].copy_(leaving[axis.rank])
            works += [self._receive(arriving[p], axis, p) for p in _others(axis) if arriving[p].numel()]
            sends += [(leaving[p], p) for p in _others(axis) if leaving[p].numel()]
        works += [self._send(part, axis, peer) for part, peer in sends]
        return InFlight(works, results, keep=keep, axis=axis)


class Coalesced(Transport):
    def all_gather(self, axis: Axis, shards: Sequence[torch.Tensor], rows: Sequence[int]) -> InFlight:
        padded, outputs = [], []
        for shard, total in zip(shards, rows, strict=True):
            step = axis.padded_rows(total) // axis.size
            padded.append(_pad_rows(shard, step))
            outputs.append(shard.new_empty((step * axis.size, *shard.shape[1:])))
        works = self._launch(axis, dist.all_gather_into_tensor, outputs, padded)
        # Ranks fill their rows in order, so padding stands only at the end and a view drops it.
        results = [output.narrow(0, 0, total) for output, total in zip(outputs, rows, strict=True)]
        return InFlight(works, results, keep=padded, axis=axis)

    def reduce_scatter(self, axis: Axis, full: Sequence[torch.Tensor]) -> InFlight:
        padded, outputs, results = [], [], []
        for tensor in full:
            total = axis.padded_rows(tensor.shape[0])
            padded.append(_pad_rows(tensor, total))
            output = tensor.new_empty((total // axis.size, *tensor.shape[1:]))
            outputs.append(output)
            results.append(output.narrow(0, 0, axis.rows(tensor.shape[0])[1]))
        works = self._launch(axis, dist.reduce_scatter_tensor, outputs, padded)
        return InFlight(works, results, keep=padded, axis=axis)

    def all_to_all(self, axis: Axis, tensors: Sequence[torch.Tensor]) -> InFlight:
        sent = [tensor.contiguous() for tensor in tensors]
        results = [torch.empty_like(tensor) for tensor in sent]
        works = [self._exchange(result, tensor, axis) for result, tensor in zip(results, sent, strict=True)]
        return InFlight(works, results, keep=sent, axis=axis)

    def exchange(
        self, axis: Axis, tensors: Sequence[torch.Tensor], sent: Sequence[int], received: Sequence[int]
    ) -> InFlight:
        leaving = [rows.contiguous()[: sum(sent)] for rows in tensors]
        results = [rows.new_empty((sum(received), *rows.shape[1:])) for rows in tensors]
        works = [
            self._exchange(result, rows, axis, list(received), list(sent))
            for result, rows in zip(results, leaving, strict=True)
        ]
        return InFlight(works, results, keep=leaving, axis=axis)

    def _exchange(self, result: torch.Tensor, tensor: torch.Tensor, axis: Axis, *splits: list[int]) -> Any:
        return dist.all_to_all_single(result, tensor, *splits, group=axis.group, async_op=True)

    def _launch(
        self,
        axis: Axis,
        collective: Callable[..., Any],
        outputs: Sequence[torch.Tensor],
        inputs: Sequence[torch.Tensor],
    ) -> list[Any]:
        with dist._coalescing_manager(group=axis.group, async_ops=True) as works:
            for output, value in zip(outputs, inputs, strict=True):
                collective(output, value, group=axis.group)
        return [works]


class _Done:
    """The work of an operation that sends nothing."""

    def wait(self) -> None:
        pass


class DryPointToPoint(PointToPoint):
    """The buffers of :class:`PointToPoint` and no communication: a step on fake tensors."""

    def _receive(self, buffer: torch.Tensor, axis: Axis, peer: int) -> Any:
        return _Done()

    def _send(self, tensor: torch.Tensor, axis: Axis, peer: int) -> Any:
        return _Done()

    def _sum(self, flat: torch.Tensor, axis: Axis) -> Any:
        return _Done()


class DryCoalesced(Coalesced):
    """The buffers of :class:`Coalesced` and no communication: also what a fake process group stands in for."""

    def _launch(
        self,
        axis: Axis,
        collective: Callable[..., Any],
        outputs: Sequence[torch.Tensor],
        inputs: Sequence[torch.Tensor],
    ) -> list[Any]:
        return []

    def _exchange(self, result: torch.Tensor, tensor: torch.Tensor, axis: Axis, *splits: list[int]) -> Any:
        return _Done()

    def _sum(self, flat: torch.Tensor, axis: Axis) -> Any:
        return _Done()


def _lost(axis: Axis | None, peer: int | None = None) -> stopped.RankStopped:
    """What to raise where the rank at place ``peer`` of ``axis``, or any other of it, does not take part."""
    assert axis is not None
    ranks = stopped.others(axis) if peer is None else [axis.ranks[peer]]
    return stopped.lost(axis, f"exchange tensors with ranks {ranks} of the {axis.name} axis", ranks)


def _others(axis: Axis) -> list[int]:
    """The peers, each rank beginning after itself so that not all send to the same one first."""
    return [(axis.rank + i) % axis.size for i in range(1, axis.size)]


def _pad_rows(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    if tensor.shape[0] == rows:
        return tensor.contiguous()
    padded = tensor.new_zeros((rows, *tensor.shape[1:]))
    padded.narrow(0, 0, tensor.shape[0]).copy_(tensor)
    return padded


def transport_for(axis: Axis, dry: bool = False) -> Transport:
    if axis.backend == "gloo":
        return DryPointToPoint() if dry else PointToPoint()
    return DryCoalesced() if dry or axis.backend == "modelled nccl" else Coalesced()
