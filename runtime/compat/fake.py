"""Fake tensors, which have shapes and no values: their modes, and what leaves no trace in them; and memory of real ones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch


@contextlib.contextmanager
def fake_mode() -> Iterator[Any]:
    """Tensors made inside have shapes and storages of the right size, and no bytes."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True) as mode:
        yield mode


def without_fake_mode() -> contextlib.AbstractContextManager[Any]:
    """Inside, tensors are real again: a device mesh computes with its own."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    return unset_fake_temporarily()


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
