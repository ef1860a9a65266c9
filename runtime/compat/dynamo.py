"""Dynamo: what it is capturing, where a graph's inputs come from, and when it compiles again."""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any
from unittest import mock

import torch.fx as fx

#: Of what Dynamo says to a graph break, lines that help its developers.
_UNASKED = ("Developer debug context", "Please report an issue")

#: What each call of a compiled function sets, by torch's record of the function.
_in_calls: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def in_one_piece(say: Callable[[str], Exception]) -> Iterator[None]:
    """Raise what ``say`` makes of Dynamo's reason, and of the place, where what is called inside cannot be captured in one
    piece."""
    from torch._dynamo.exc import Unsupported

    try:
        yield
    except Unsupported as error:
        reason, _, rest = str(error).partition("\n\n")
        place = rest.partition("from user code:\n")[2].partition("\n\n")[0]
        lines = [line for line in place.splitlines() if line.strip(" ^")][-2:]  # the innermost
        lines = [*(line for line in reason.splitlines() if not any(word in line for word in _UNASKED)), *lines]
        raise say("; ".join(line.strip().removesuffix(".") for line in lines)) from error


def captured_code() -> CodeType:
    """Of the function that Dynamo is capturing, which :func:`call_at` finds when it runs."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    return InstructionTranslator.current_tx().output.root_tx.f_code


def compiled_frame() -> int:
    """The number of the frame that Dynamo is compiling: the same for recompilations of one, another behind a graph break."""
    from torch._guards import CompileContext

    compile_id = CompileContext.current_compile_id()
    return -1 if compile_id is None or compile_id.frame_id is None else compile_id.frame_id


def in_resumed_frame() -> bool:
    """Whether Dynamo is at a piece behind a graph break, whose inputs are the model's intermediate values."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        current = InstructionTranslator.current_tx()
    except AttributeError:  # not inside of a trace
        return False
    return current.f_code.co_name.startswith("torch_dynamo_resume_in_")


def broken_graph() -> str | None:
    """Why Dynamo hands over the graph at hand before the function has ended; None where it has all of it."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        reason = InstructionTranslator.current_tx().output.compile_subgraph_reason
    except AttributeError:  # not inside of a trace
        return None
    if reason is None or not reason.graph_break:
        return None
    frame = reason.user_stack[-1] if reason.user_stack else None
    where = f"{frame.filename}:{frame.lineno}: {frame.line}: " if frame is not None else ""
    return f"{where}{reason.reason.splitlines()[0]}."


def capture_error() -> type[Exception]:
    """What Dynamo raises where it cannot capture a function."""
    from torch._dynamo.exc import TorchDynamoException

    return TorchDynamoException


def placeholder_source(node: fx.Node) -> str | None:
    """Where Dynamo got a graph input from, such as ``L['self']._modules['0']._parameters['weight']``."""
    argument = node.meta.get("grapharg")
    if argument is None:
        return None
    name = argument.source.name
    return name if isinstance(name, str) else name()  # a method until torch 2.11


def guard_identity(node: fx.Node) -> None:
    """Have Dynamo use the graph being compiled only for the very object that graph input ``node`` stands for.

    Dynamo's guards on modules and parameters ask for types and shapes, so a second model of one class would be given the
    graph, and with it the engine, of the first.
    """
    from torch._dynamo.guards import GuardBuilder, install_guard

    argument = node.meta.get("grapharg")
    if argument is not None:
        install_guard(argument.source.make_guard(GuardBuilder.ID_MATCH))


def allow_compilations(more: int) -> None:
    """Let Dynamo compile one function so many times more: it counts those of all models of a class together, and runs what
    exceeds its limit uncompiled, which here would be unsharded."""
    from torch._dynamo import config

    config.recompile_limit += more
    config.accumulated_recompile_limit += more


def keep_shapes_static() -> None:
    """Have Dynamo compile the function at hand for each shape by itself, as ``torch.compile(dynamic=False)`` does: by default
    it makes a size symbolic that was another one before. Other compiled functions are as they were."""
    from torch._dynamo import config
    from torch._dynamo.pgo import get_code_state

    patch = config._make_closure_patcher(automatic_dynamic_shapes=False)
    _in_each_call("static shapes", patch)
    code, seen = captured_code(), get_code_state()
    place = (code.co_name, code.co_filename, code.co_firstlineno)
    for key in [k for k in seen if (k.name, k.filename, k.firstlineno) == place]:
        del seen[key]  # else the first capture of the next model of the class would have symbols


def refuse_uncompiled(say: Callable[[], Exception]) -> None:
    """Raise what ``say`` answers where Dynamo has compiled a function of the model at hand as often as it may: by default it
    runs it uncompiled from then on."""
    from torch._dynamo import config
    from torch._dynamo.exc import FailOnRecompileLimitHit

    patch = config._make_closure_patcher(fail_on_recompile_limit_hit=True)

    def enter() -> Callable[[], None]:
        if config.suppress_errors:  # a person asked for just that
            return lambda: None
        revert = patch()

        def leave() -> None:
            revert()
            error = sys.exc_info()[1]
            if isinstance(error, FailOnRecompileLimitHit):
                raise say() from error

        return leave

    _in_each_call("no recompile limit", enter)


def _in_each_call(name: str, enter: Callable[[], Callable[[], None]]) -> None:
    """Have every call of the compiled function at hand, this one too, begin with ``enter`` and end with what that answers,
    where it does nothing of that ``name`` yet."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not is_compiled_call(frame):
        frame = frame.f_back
    if frame is None:
        return
    record = frame.f_locals["self"]
    names = _in_calls.setdefault(record, set())
    if name not in names:
        names.add(name)
        record.enter_exit_hooks.append(enter)
        frame.f_locals["cleanups"].append(enter())


def is_compiled_call(frame: FrameType) -> bool:
    """Whether a frame is that which ``torch.compile`` puts around a function."""
    return frame.f_code.co_name == "compile_wrapper" and frame.f_code.co_filename.endswith("eval_frame.py")


@contextlib.contextmanager
def compiling_apart() -> Iterator[None]:
    """Compilations inside leave nothing behind: neither limits that :func:`allow_compilations` raises, nor shapes for which
    Dynamo would make others symbolic. None of them is refused for those before."""
    from torch._dynamo import config, pgo

    with (
        config.patch(recompile_limit=10_000, accumulated_recompile_limit=10_000),
        mock.patch.object(pgo, "_CODE_STATE", defaultdict(pgo.CodeState)),
    ):
        yield
