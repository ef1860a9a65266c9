"""``dspass.fit``: the fewest devices on which a model trains, and the configuration for it, found without any of them.

Numbers of ranks are tried in powers of two from the first that could hold the parameters, gradients and optimiser states alone
(states only where they may not wait on the host);
each is a prediction under the budget by the planner, so gathered copies, recomputation and all temporaries count. Dropped: a
formula for the number. Activations do not divide by the ranks, and what the planner can do about them is no formula.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from tqdm import tqdm

from dspass.config import Config
from dspass.explain import explain
from dspass.owners import unwrap
from dspass.passes import devices
from dspass.planner.record import BudgetError, size_text
from dspass.report import Report
from dspass.runtime.stepping import OPTIMIZERS


@dataclass(frozen=True, kw_only=True)
class Fit:
    """``config`` are the options for ``torch.compile`` on ``world_size`` ranks, and ``report`` predicts their step. ``refused``
    are the numbers of ranks that were tried before, with the least bytes that a rank would take."""

    world_size: int
    config: dict[str, Any]
    report: Report
    refused: dict[int, int]

    def __str__(self) -> str:
        before = "".join(f"\n  {n} ranks would take {size_text(b)} on each" for n, b in self.refused.items())
        return f"fits on {self.world_size} x {self.report.device} with {self.config}{before}\n\n{self.report}"


def fit(
    model: nn.Module,
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    device: str = "h100",
    memory_budget: int | str | None = None,
    optimizer: str = "adamw",
    most: int = 4096,
) -> Fit:
    """The smallest number of ranks, a power of two up to ``most``, on which ``model`` trains within ``memory_budget`` a rank.

    ``args`` and ``kwargs`` are one rank's batch and ``model`` may be on the meta device, as for :func:`dspass.explain`.
    ``config`` are further options, such as ``{"bf16": {"enabled": True}}``. Without a budget it is ``"auto"``: nine tenths of
    the device. One rank trains unsharded, more at stage 3, whose gathered copies the planner keeps where there is room.

    Raises:
        BudgetError: not even ``most`` ranks do.
        ValueError: for an unknown device or optimiser.
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer={optimizer!r} is not known; use one of {sorted(OPTIMIZERS)}.")
    budget = memory_budget if memory_budget is not None else "auto"
    whole = Config.load(config or {})
    loaded = Config.load({"dspass": {"memory_budget": budget}}).dspass.memory_budget
    limit = loaded if isinstance(loaded, int) else devices.share_of(str(loaded), devices.capacity(device))
    params = list(unwrap(model).parameters())
    trained = [p for p in params if p.requires_grad]
    always = sum(p.nbytes for p in params) + sum(p.nbytes for p in trained)
    if whole.offload_optimizer != "cpu" and (whole.offload_optimizer is not None or device == "cpu"):
        always += sum(map(OPTIMIZERS[optimizer].state_bytes, trained))  # elsewhere they may wait on the host
    refused: dict[int, int] = {}
    ranks = 1
    with tqdm(desc="ranks tried", unit="try", disable=None) as progress:
        while ranks <= most:
            progress.set_postfix_str(f"{ranks} x {device}")
            if always // ranks > limit:
                refused[ranks] = always // ranks
                ranks *= 2
                continue
            options = {
                **(config or {}),
                "zero_optimization": {**(config or {}).get("zero_optimization", {}), "stage": 3 if ranks > 1 else 0},
                "dspass": {**(config or {}).get("dspass", {}), "memory_budget": limit},
            }
            try:
                report = explain(
                    model, *args, kwargs=kwargs, config=options, world_size=ranks, device=device, optimizer=optimizer
                )
            except BudgetError as error:
                refused[ranks] = error.smallest
                ranks *= 2
                progress.update()
                continue
            progress.update()
            return Fit(world_size=ranks, config=options, report=report, refused=refused)
    least = min(refused.values())
    raise BudgetError(
        f"the model does not fit into {size_text(limit)} on up to {most} ranks of {device}: the least that one takes is "
        f"{size_text(least)}. Give a smaller batch, a larger budget, or raise most=.",
        least,
    )
