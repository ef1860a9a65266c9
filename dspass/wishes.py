"""What a person wants saved for the backward, or computed again in it, and where stages of a pipeline begin, said in the
model's own code.

The first two are constraints for whoever splits the graph: for the planner under ``dspass.memory_budget``, and without a
budget for Inductor's min-cut. ``torch.utils.checkpoint`` and its policies reach both by the same road, tags on the nodes of
the graph, so :func:`recompute` of a function is ``torch.utils.checkpoint`` and no code of ours. A single value has no such
road in torch; it gets a node beside it (:mod:`dspass.runtime.wish`, which says what was dropped), which a pass turns into
the same tag.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, overload

import torch
from torch.utils.checkpoint import checkpoint

from dspass.runtime.wish import KEEP, RECOMPUTE, STAGE_BOUNDARY, WISH

P = ParamSpec("P")
T = TypeVar("T")


def keep(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` itself, which the backward is never to compute again.

    Where the backward needs it, it is saved, on the device or on the host, but never in fewer bits; where it needs only what
    is made of it, that may be saved in its stead. A view stands for the value under it. In a function that :func:`recompute` or
    ``torch.utils.checkpoint`` runs, it excepts this one value. In code that is not compiled autograd decides, and this does
    nothing.

    Raises ``TypeError`` for anything but a tensor, and ``ValueError``, when the model is compiled, for a value that is
    marked to be computed again too.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"dspass.keep takes a tensor, not a {type(tensor).__name__}: call it on each value to be kept.")
    if torch.compiler.is_compiling():
        WISH(tensor, KEEP)
    return tensor


@overload
def recompute(value: torch.Tensor, /) -> torch.Tensor: ...
@overload
def recompute(value: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T: ...
def recompute(value: Any, /, *args: Any, **kwargs: Any) -> Any:
    """``recompute(tensor)``: ``tensor`` itself, which is not saved for the backward but computed again.

    That is its last operator; what it is made of is saved or computed again as it pays, and under a memory budget what is
    made of it may be saved. A view stands for the value under it. In code that is not compiled this does nothing, as autograd
    alone knows what it saves.

    ``recompute(function, *args, **kwargs)``: what ``function(*args, **kwargs)`` answers, and all that is computed inside of
    it is computed again in the backward, random numbers the same; the answer too, unless another such call takes it as it is.
    This is ``torch.utils.checkpoint.checkpoint(..., use_reentrant=False)``, which takes some keywords for itself, such as
    ``context_fn`` for a policy; it saves memory in code that is not compiled as well.

    Raises ``TypeError`` for anything else, and ``ValueError``, when the model is compiled, for a value that is to be kept too.
    A value that cannot be computed again, an input of the graph, is left as it is, with a warning.
    """
    if isinstance(value, torch.Tensor):
        if args or kwargs:
            raise TypeError("dspass.recompute takes one tensor, or a function and its arguments.")
        if torch.compiler.is_compiling():
            WISH(value, RECOMPUTE)
        return value
    if not callable(value):
        raise TypeError(
            f"dspass.recompute takes a tensor, or a function and its arguments, not a {type(value).__name__}: call it on each "
            "value to be computed again, or on the function that makes them."
        )
    return checkpoint(value, *args, use_reentrant=False, **kwargs)


def stage_boundary(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` itself, behind which the next stage of a pipeline begins: what the model computes after this call.

    There has to be one call less than there are stages, or none, and ``"pipeline": {"boundaries": ...}`` overrules them all.
    Without a pipeline, and in code that is not compiled, this does nothing.

    Raises ``TypeError`` for anything but a tensor.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(
            f"dspass.stage_boundary takes a tensor, not a {type(tensor).__name__}: call it on what the next stage reads."
        )
    if torch.compiler.is_compiling():
        STAGE_BOUNDARY(tensor)
    return tensor
