"""``dspass::wish``: what a person wants done with one value, as a node of the graph beside that value; and
``dspass::stage_boundary``, behind which a pipeline's next stage begins.

Each operator takes the value and answers nothing, so the value itself goes on as if nothing stood there: it keeps its name,
its views, its gradient, and what is written into it. It has a side effect by declaration only, so that no tracer drops it.
A pass takes it out (``passes/honour_wishes.py``); where that pass is dropped, or another backend compiles, it runs and does
nothing.

Dropped: an operator that answers its input. It needs a derivative, its result may not alias the input, so that a write into
what ``keep`` answers would be lost, and its removal has to prove that nothing was written. Dropped:
``torch.fx.traceback.annotate`` around a view. Functionalisation makes views anew, joint passes take those without effect
away, and nodes of the backward inherit the annotation.
"""

from __future__ import annotations

import torch
from torch.fx.node import has_side_effect

torch.library.define("dspass::wish", "(Tensor value, str kind) -> ()")


@torch.library.impl("dspass::wish", "CompositeExplicitAutograd")
def _nothing(value: torch.Tensor, kind: str) -> None:
    """Any value on any device."""


@torch.library.register_fake("dspass::wish")
def _(value: torch.Tensor, kind: str) -> None:
    return None


torch.library.define("dspass::stage_boundary", "(Tensor value) -> ()")


@torch.library.impl("dspass::stage_boundary", "CompositeExplicitAutograd")
def _no_cut(value: torch.Tensor) -> None:
    """Without a pipeline there is none."""


@torch.library.register_fake("dspass::stage_boundary")
def _(value: torch.Tensor) -> None:
    return None


WISH = torch.ops.dspass.wish.default
STAGE_BOUNDARY = torch.ops.dspass.stage_boundary.default
has_side_effect(WISH)
has_side_effect(STAGE_BOUNDARY)

#: The kinds: never computed again, and never saved.
KEEP = "keep"
RECOMPUTE = "recompute"
