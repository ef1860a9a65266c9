"""``dspass.experts``: a mixture of experts in a form that the compiler knows, in a model's own code.

Mixtures in the forms that :mod:`dspass.passes.experts` and :mod:`dspass.passes.batched_experts` recognise need none of it. It
is for anything else, above all for a loop over experts: how many tokens each of them has is known only at run time, so such a
loop breaks the graph or computes all tokens by all experts. What it is made of are the operators that expert parallelism is
made of (:mod:`dspass.runtime.experts`, :mod:`dspass.runtime.grouped`), so it is the same in eager code, on one process, and
compiled.

Dropped: a module with an activation and shapes of its own. There are as many kinds of experts as models, and their layouts are
in checkpoints. Dropped: a function of one expert, called for each: the loop again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from dspass.runtime import exchange, grouped  # noqa: F401  (their operators)
from dspass.runtime import experts as _experts  # noqa: F401


class Product(Protocol):
    """What a function of :func:`experts` multiplies with."""

    def __call__(self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``[rows, out]``: each row of ``rows[rows, in]`` times its expert's matrix of ``weight[experts, in, out]``, plus its
        expert's row of ``bias[experts, out]``."""
        ...


def experts(
    x: torch.Tensor,
    choices: torch.Tensor,
    scores: torch.Tensor,
    function: Callable[..., torch.Tensor],
    *weights: torch.Tensor,
) -> torch.Tensor:
    """Of each token the sum of what its experts make of it, times their scores::

        def expert(rows, product, up, down):
            return product(F.silu(product(rows, up)), down)

        y = dspass.experts(x, choices, scores, expert, self.up, self.down)

    ``x[..., hidden]`` are tokens in fp32, fp16 or bf16, ``choices[..., top_k]``, int32 or int64, the experts of each, and
    ``scores[..., top_k]`` their weights; a choice below 0, or not below the number of experts, is dropped. ``weights`` have
    experts in their first dimension. ``function(rows, product, *weights)`` is called once, for the rows of all experts,
    ``[rows, hidden]``, and answers ``[rows, out]``. It has to treat each row by itself, and reads what is one expert's by
    ``product`` alone (see :class:`Product`): then experts may be divided over ranks (``expert_parallel``), where a weight is
    that of the experts of one. The result is ``[..., out]``, in the dtype of what the function answers; sums are in fp32.

    Raises ``TypeError`` for a function that is none, and ``ValueError`` for shapes and dtypes that cannot be.
    """
    if not callable(function):
        raise TypeError(
            "dspass.experts takes a function (rows, product, *weights) as its fourth argument, not a "
            f"{type(function).__name__}."
        )
    _check(x, choices, scores, weights)
    top_k, number = choices.shape[-1], weights[0].shape[0]
    routing = choices.reshape(-1, top_k)
    rows, positions, ends = torch.ops.dspass.permute_experts(x.reshape(-1, x.shape[-1]), routing, number)

    def product(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        result = torch.ops.dspass.grouped_product(rows, weight, ends)
        if bias is None:
            return result
        return result + bias[torch.ops.dspass.experts_of_rows(ends, rows.shape[0], 0)]

    answer = function(rows, product, *weights)
    if not isinstance(answer, torch.Tensor) or answer.dim() != 2 or answer.shape[0] != rows.shape[0]:
        found = f"shape {list(answer.shape)}" if isinstance(answer, torch.Tensor) else f"a {type(answer).__name__}"
        raise ValueError(
            f"the function of dspass.experts answers {found} for {rows.shape[0]} rows: answer [rows, out]."
        )
    combined = torch.ops.dspass.unpermute_experts(answer, positions, scores.reshape(-1, top_k))
    return combined.view(*x.shape[:-1], answer.shape[1])


def _check(x: torch.Tensor, choices: torch.Tensor, scores: torch.Tensor, weights: tuple[torch.Tensor, ...]) -> None:
    if not weights or any(w.dim() < 2 for w in weights) or len({w.shape[0] for w in weights}) > 1:
        shapes = ", ".join(str(list(w.shape)) for w in weights) or "none"
        raise ValueError(
            f"weights of dspass.experts are {shapes}: give one at least, each [experts, ...] of as many experts."
        )
    if choices.shape != scores.shape:
        raise ValueError(
            f"choices of shape {list(choices.shape)} do not go with scores of shape {list(scores.shape)}: give both "
            "[..., top_k], a score for each choice."
        )
    if x.dim() < 2 or choices.dim() != x.dim() or choices.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"choices of shape {list(choices.shape)} do not go with tokens of shape {list(x.shape)}: give tokens "
            "[..., hidden] their choices [..., top_k]."
        )
