"""Room for Python's frames, without which deep recursions take a quarter of their time to map memory and unmap it.

CPython keeps the frames of a thread in chunks of 16 KiB, takes a new one where a call does not fit into the last, and gives it
back as soon as that call returns. A loop that happens to stand at the end of a chunk then maps memory and unmaps it for each
call that it makes (python/cpython#142183; later releases of 3.13 and 3.14 keep one chunk). Dynamo, AOTAutograd and what they
call nest hundreds of frames deep, and compilers are loops over graphs.

Dropped: a thread of its own, whose stack begins empty. Modes and contexts, such as that of fake tensors, are a thread's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

#: Values of the stack that the frame in front asks for. A chunk is a power of two that holds it and a little more, so about as
#: much again is left: a megabyte, which thousands of frames fit into.
_VALUES = 1 << 17


def with_room(function: Callable[P, R]) -> Callable[P, R]:
    """``function`` behind a frame so large that it gets a chunk of its own, in which what it calls has room, too."""

    def roomy(*args: P.args, **kwargs: P.kwargs) -> R:
        return function(*args, **kwargs)

    roomy.__code__ = roomy.__code__.replace(co_stacksize=_VALUES)
    return functools.wraps(function)(roomy)
