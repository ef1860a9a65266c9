"""Saved values on the host: copied there after the forward has read them, and back before the backward does.

Host memory is what a memory budget does not count: pinned memory beside a GPU. A CPU rank has no second memory; there, memory
that is mapped outside of torch's allocator stands for it, so that what happens here is the same in tests as on a GPU.

Copies run on a stream of their own. What is being copied out is held until :func:`offload_wait`, where the computing stream
waits for the copy's end: its memory is free from there on, at a moment that the graph says. Dropped: ``record_stream``, by
which the allocator finds out itself when a copy has ended. A block is then free some time later, and the peak is another in
each run.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Sequence

import torch

from dspass.runtime import compat

_streams: dict[torch.device, torch.cuda.Stream] = {}
_mapped: dict[int, list[mmap.mmap]] = {}  # by size, not in use
_addresses: set[int] = set()  # of mapped memory that is in use


def empty_on_host(like: torch.Tensor) -> torch.Tensor:
    """Host memory of the shape, strides and type of ``like``."""
    if compat.is_fake(like):
        return like.new_empty_strided(like.shape, like.stride(), device="cpu")
    if like.is_cuda:
        return like.new_empty_strided(like.shape, like.stride(), device="cpu", pin_memory=True)
    return _map(extent(like)).view(like.dtype).as_strided(like.shape, like.stride())


def extent(like: torch.Tensor) -> int:
    """Bytes from the first element to the last."""
    if not like.numel():
        return 0
    steps = zip(like.shape, like.stride(), strict=True)
    return (1 + sum((size - 1) * stride for size, stride in steps)) * like.element_size()


def _map(size: int) -> torch.Tensor:
    """``size`` bytes outside of torch's allocator, used again once the tensor on them is gone."""
    unused = _mapped.setdefault(size, [])
    memory = unused.pop() if unused else mmap.mmap(-1, max(size, 1))
    found = torch.frombuffer(memory, dtype=torch.uint8)[:size]
    address = found.untyped_storage().data_ptr()
    _addresses.add(address)

    def give_back() -> None:
        _addresses.discard(address)
        unused.append(memory)

    weakref.finalize(found.untyped_storage(), give_back).atexit = False
    return found


def release_unused() -> None:
    """Give back memory that is kept for the next tensors of its size, where there will be fewer of them."""
    for unused in _mapped.values():
        unused.clear()


def is_on_host(tensor: torch.Tensor) -> bool:
    """Whether a tensor lies where a memory budget does not count: memory of :func:`empty_on_host`."""
    if compat.is_fake(tensor) or tensor.is_cuda:
        return False
    return tensor.is_pinned() if torch.cuda.is_available() else tensor.untyped_storage().data_ptr() in _addresses


def _stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]


class Copy:
    """Copies under way from ``sources`` to ``results``, which are held until they are waited for."""

    def __init__(self, sources: Sequence[torch.Tensor], results: Sequence[torch.Tensor]) -> None:
        self._sources, self._results = list(sources), list(results)
        self._done: torch.cuda.Event | None = None
        device = next((t.device for t in (*sources, *results) if t.is_cuda and not compat.is_fake(t)), None)
        if device is None:
            for source, result in zip(sources, results, strict=True):
                result.copy_(source)
            self._sources = []
            return
        stream = _stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))  # the sources are computed, the results' memory is free
        with torch.cuda.stream(stream):
            for source, result in zip(sources, results, strict=True):
                result.copy_(source, non_blocking=True)
            self._done = stream.record_event()

    def tensors(self) -> list[torch.Tensor]:
        """What is being filled."""
        return self._results

    def synchronize(self) -> None:
        """Have this thread wait for the copies' end, before a person reads on the host what they bring there."""
        if self._done is not None:
            self._done.synchronize()

    def wait(self) -> list[torch.Tensor]:
        if self._done is not None:
            torch.cuda.current_stream(self._done.device).wait_event(self._done)
        self._sources, results, self._results = [], self._results, []
        return results


def offload_start(values: list[torch.Tensor]) -> Copy:
    """Begin to copy values to the host."""
    return Copy(values, [empty_on_host(value) for value in values])


def offload_wait(copy: Copy) -> list[torch.Tensor]:
    """The values on the host; those on the device are free behind this."""
    return copy.wait()


def reload_start(values: list[torch.Tensor], device: str) -> Copy:
    """Begin to copy values back to ``device``."""
    return Copy(values, [v.new_empty_strided(v.shape, v.stride(), device=device) for v in values])


def reload_wait(copy: Copy) -> list[torch.Tensor]:
    """The values on the device."""
    return copy.wait()
