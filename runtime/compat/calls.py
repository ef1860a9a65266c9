"""What this thread is in the middle of: an autograd run, a call of a model or of compiled code, a checkpoint.

torch says little of it; most is read from the stack.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import CellType, CodeType, FrameType, FunctionType
from typing import Any

import torch

from dspass.runtime.compat.dynamo import is_compiled_call


def backward_run() -> int:
    """The number of the autograd run (one ``loss.backward()``) this thread is in, or -1 outside of one."""
    return torch._C._current_graph_task_id()


def at_end_of_backward(function: Callable[[], None]) -> None:
    """Call ``function`` when the autograd run at hand has put every gradient into its ``.grad``, as DDP and FSDP do."""
    torch.autograd.Variable._execution_engine.queue_callback(function)


def in_compiled_call() -> bool:
    """Whether a function wrapped by ``torch.compile`` is on this thread's stack, or a backward runs.

    Read from the stack and not from a flag: a flag set by a hook would be traced by Dynamo, and one left
    behind by an exception would make every later eager read a collective.
    """
    if backward_run() != -1:
        return True
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if is_compiled_call(frame):
            return True
        frame = frame.f_back
    return False


def call_of(module: torch.nn.Module) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """What the call of ``module`` that is on this thread's stack was given.

    Dynamo hands a graph its inputs, and not the call's arguments; ``nn.Module``'s own frame has them.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "_call_impl" and frame.f_locals.get("self") is module:
            return frame.f_locals["args"], frame.f_locals["kwargs"]
        frame = frame.f_back
    raise RuntimeError(
        f"{type(module).__name__} was not called as a module: call the model itself, and not its forward, or call "
        "dspass.shard(model, config) first."
    )


@dataclass(frozen=True)
class RunningCall:
    """A function that is running, compiled, by its ``code``, and what it was called with: ``args``, ``kwargs`` and what its
    closure's ``cells`` hold."""

    code: CodeType
    globals: dict[str, Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    cells: Sequence[Any]

    def function(self, cells: Sequence[Any]) -> Callable[..., Any]:
        """The function with other ``cells``, which Dynamo captures apart from the one that runs."""
        closure = tuple(map(CellType, cells))
        return FunctionType(self.code.replace(), self.globals, self.code.co_name, None, closure)


def call_at(code: CodeType) -> RunningCall:
    """The call of ``code`` that is on this thread's stack."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not _is_same_code(frame.f_code, code):
        frame = frame.f_back
    if frame is None:
        raise RuntimeError(f"{code.co_qualname} is not running.")
    held, names, count = frame.f_locals, code.co_varnames, code.co_argcount
    args = [held[name] for name in names[:count]]
    end = count + code.co_kwonlyargcount
    kwargs = {name: held[name] for name in names[count:end]}
    if code.co_flags & inspect.CO_VARARGS:
        args += held[names[end]]
        end += 1
    if code.co_flags & inspect.CO_VARKEYWORDS:
        kwargs |= held[names[end]]
    return RunningCall(code, frame.f_globals, args, kwargs, [held[name] for name in code.co_freevars])


def _is_same_code(one: CodeType, other: CodeType) -> bool:
    """Dynamo runs another code under the same name, from the same place."""
    return (one.co_name, one.co_filename, one.co_firstlineno) == (
        other.co_name,
        other.co_filename,
        other.co_firstlineno,
    )


def asked_for_full_state() -> bool:
    """Whether torch.distributed.checkpoint asks with the option ``full_state_dict``, of which ``state_dict()`` is not told."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name in ("_get_model_state_dict", "_get_optim_state_dict") and code.co_filename.endswith(
            "state_dict.py"
        ):
            return bool(frame.f_locals["info"].full_state_dict)
        frame = frame.f_back
    return False


def in_state_initialisation() -> bool:
    """Whether torch.distributed.checkpoint has an optimiser make its states, with a step of zero gradients that moves nothing.
    A rank whose optimiser has states already takes no such step."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "_init_optim_state" and frame.f_code.co_filename.endswith("state_dict.py"):
            return True
        frame = frame.f_back
    return False
