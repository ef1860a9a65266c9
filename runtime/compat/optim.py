"""What happens around an optimiser's step: its hooks, the norm that gradients are clipped to, and overflows."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dspass.runtime.compat.versions import UnsupportedTorchError


def bare_step(optimizer: torch.optim.Optimizer) -> None:
    """``optimizer.step()`` without the hooks around it, which a person sees once a step."""
    step = type(optimizer).step
    if not getattr(step, "hooked", False) or not hasattr(step, "__wrapped__"):
        raise RuntimeError(
            f"{type(optimizer).__name__}.step is not wrapped as torch.optim wraps it, so its states cannot wait on the host: "
            'derive it from torch.optim.Optimizer, or set zero_optimization.offload_optimizer.device to "none".'
        )
    step.__wrapped__(optimizer)


def around_step(
    optimizer: torch.optim.Optimizer, before: Callable[..., None], after: Callable[..., None]
) -> Callable[[], None]:
    """Call ``before`` as the last and ``after`` as the first thing around the optimiser's own step, whatever hooks a person
    registered; answers what undoes it."""
    first = optimizer.register_step_pre_hook(before)
    last = optimizer.register_step_post_hook(after)
    optimizer._optimizer_step_post_hooks.move_to_end(last.id, last=False)

    def undo() -> None:
        first.remove()
        last.remove()

    return undo


def reduce_overflow_of_mixed_placements() -> None:
    """Have every rank hear of an overflow (``GradScaler``) that one rank sees, also beside replicated gradients.

    DTensor reduces ``found_inf`` as the first gradient of a list is placed, so a ``Replicate`` one in front of sharded ones
    leaves each rank with its own answer, and ranks step apart. Sharded ones are put first; the order means nothing else.
    """
    from torch.distributed.tensor import DTensor

    handlers = DTensor._op_dispatcher._custom_op_handlers
    operator = torch.ops.aten._amp_foreach_non_finite_check_and_unscale_.default
    theirs = handlers[operator]
    if theirs.__module__ == __name__:
        return

    def ours(op_call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        grads = sorted(args[0], key=lambda grad: all(p.is_replicate() for p in grad.placements))
        return theirs(op_call, (grads, *args[1:]), kwargs)

    handlers[operator] = ours


#: Answers the norm of ``tensors`` in place of torch's function, which is its first argument. Behind the arguments of that stand
#: the parameters that the tensors are gradients of, or None where those are not known.
TotalNorm = Callable[
    [Callable[..., torch.Tensor], Sequence[torch.Tensor], float, bool, bool | None, Sequence[torch.Tensor] | None],
    torch.Tensor,
]


def extend_total_norm(extended: TotalNorm) -> None:
    """Have ``torch.nn.utils.get_total_norm``, and ``clip_grad_norm_`` that calls it, answer what ``extended`` does.

    The function is exchanged inside of its wrapper (``no_grad``), so that scripts which imported the name before get it too.
    Raises :class:`UnsupportedTorchError` where torch has no such function.
    """
    from torch.nn.utils import clip_grad

    cell = _total_norm_cell()
    theirs = cell.cell_contents
    if hasattr(theirs, "__wrapped__"):
        return

    @functools.wraps(theirs)
    def ours(
        tensors: Any, norm_type: float = 2.0, error_if_nonfinite: bool = False, foreach: bool | None = None
    ) -> torch.Tensor:
        tensors = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
        caller = sys._getframe(2)  # above the wrapper
        clips = caller.f_code.co_name == "clip_grad_norm_" and caller.f_code.co_filename == clip_grad.__file__
        params = caller.f_locals.get("parameters") if clips else None
        return extended(theirs, tensors, norm_type, error_if_nonfinite, foreach, params)

    cell.cell_contents = ours


def total_norm(tensors: Sequence[torch.Tensor], norm_type: float, foreach: bool | None) -> torch.Tensor:
    """torch's own norm of gradients that lie alike, whatever :func:`extend_total_norm` has made of it for others."""
    function = _total_norm_cell().cell_contents
    with torch.no_grad():
        return getattr(function, "__wrapped__", function)(tensors, norm_type, False, foreach)


def _total_norm_cell() -> Any:
    wrapper = torch.nn.utils.get_total_norm
    names = getattr(getattr(wrapper, "__code__", None), "co_freevars", ())
    if "func" not in names:
        raise UnsupportedTorchError(
            f"torch {torch.__version__} defines torch.nn.utils.get_total_norm in another way than torch 2.11 to 2.13, so norms "
            "over pipeline stages cannot be had from it: install one of those."
        )
    closure: Any = wrapper.__closure__
    return closure[names.index("func")]


#: Answers, by device, what is not 0 where a gradient of the optimiser was not finite, from what this rank has found; that is
#: nothing where there are no gradients. The last argument is the 0 that a search begins with.
FoundInf = Callable[
    [torch.optim.Optimizer, dict[torch.device, torch.Tensor], torch.Tensor], dict[torch.device, torch.Tensor]
]


def extend_found_inf(extended: FoundInf) -> None:
    """Have a ``GradScaler`` go by what ``extended`` answers.

    Raises :class:`UnsupportedTorchError` where torch looks for overflows in another way.
    """
    from torch.amp.grad_scaler import GradScaler

    theirs = getattr(GradScaler, "_unscale_grads_", None)
    if theirs is None:
        raise UnsupportedTorchError(
            f"GradScaler of torch {torch.__version__} works in another way than that of torch 2.11 to 2.13, so one pipeline "
            "stage would not hear of another one's overflow: install one of those."
        )
    if hasattr(theirs, "__wrapped__"):
        return

    @functools.wraps(theirs)
    def ours(
        self: Any, optimizer: torch.optim.Optimizer, inv_scale: torch.Tensor, found_inf: torch.Tensor, allow_fp16: bool
    ) -> dict[torch.device, torch.Tensor]:
        return extended(optimizer, theirs(self, optimizer, inv_scale, found_inf, allow_fp16), found_inf)

    GradScaler._unscale_grads_ = ours
