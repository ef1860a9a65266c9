"""``dspass.fit``: the fewest devices on which a model trains, and the configuration for it, found without any of them.

Each number of ranks that is tried is a prediction under the budget by the planner, so gathered copies, recomputation and all
temporaries count; those that could not hold the parameters, gradients and optimiser states alone, as far as these may not wait
on the host, need none. Numbers are doubled until one fits, and then halved between it and the last that did not.

Dropped: a formula for the number. Activations do not divide by the ranks, and what the planner can do about them is no formula.
"""

from __future__ import annotations

import bisect
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from tqdm import tqdm

from dspass.config import ENVIRONMENT, Config, ConfigError
from dspass.config.reading import read_file
from dspass.owners import unwrap
from dspass.passes import devices
from dspass.planner.record import BudgetError, size_text
from dspass.planning import refuse_beyond
from dspass.prediction import Question, predicted_report, with_unplanned
from dspass.report import Report
from dspass.report.words import counted
from dspass.runtime.stepping import OPTIMIZERS

#: Devices of a node. Fewer are had in any number, more in whole nodes.
_NODE = 8


@dataclass(frozen=True, kw_only=True)
class Fit:
    """``config`` are the options for ``torch.compile`` on ``world_size`` ranks, and ``report`` predicts their step. ``refused``
    are the numbers of ranks that were tried and are too few, with bytes that a rank would take at least, and ``skipped`` those
    that the configuration does not go with, with the reason."""

    world_size: int
    config: dict[str, Any]
    report: Report
    refused: dict[int, int]
    skipped: dict[int, str] = field(default_factory=dict)

    def __str__(self) -> str:
        before = "".join(
            f"\n  {_ranks(n)} would take at least {size_text(b)} on each" for n, b in sorted(self.refused.items())
        )
        not_with = "".join(f"\n  {_ranks(n)}: {why}" for n, why in sorted(self.skipped.items()) if n < self.world_size)
        return f"fits on {self.world_size} x {self.report.device} with {self.config}{before}{not_with}\n\n{self.report}"


def fit(
    model: nn.Module,
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    config: Config | str | os.PathLike[str] | Mapping[str, Any] | None = None,
    device: str = "h100",
    memory_budget: int | str | None = None,
    optimizer: str = "adamw",
    most: int = 4096,
) -> Fit:
    """The smallest number of ranks, up to ``most``, on which ``model`` trains within ``memory_budget`` a rank.

    Devices come by nodes of eight: up to eight any number of ranks is tried, beyond that multiples of eight. Where the
    configuration goes with none of these, as a batch that twelve ranks divide, all numbers are.

    ``args`` and ``kwargs`` are one rank's batch and ``model`` may be on the meta device, as for :func:`dspass.explain`.
    ``config`` are further options, such as ``{"bf16": {"enabled": True}}``, or a file of them. The budget is that of
    ``config``, if not given here, and ``"auto"`` without either: nine tenths of the device. A ZeRO stage that ``config`` has is
    kept for more than one rank; without one it is 3, whose gathered copies the planner keeps where there is room. One rank
    trains unsharded.

    Raises:
        BudgetError: not even ``most`` ranks do; ``smallest`` is the least that any number of them was seen to take.
        ConfigError: the configuration goes with no number of ranks, or the budget is more than the device has.
        ValueError: for an unknown device or optimiser.
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer={optimizer!r} is not known; use one of {sorted(OPTIMIZERS)}.")
    if not args and not kwargs:
        raise ValueError("dspass.fit predicts a step, and needs one rank's batch for it: dspass.fit(model, *batch).")
    search = _Search.of(unwrap(model), args, dict(kwargs or {}), config, device, memory_budget, optimizer)
    with tqdm(desc="ranks tried", unit="try", disable=None) as search.progress:
        return search.found(most)


@dataclass(kw_only=True)
class _Search:
    """What is asked, and what was found of each number of ranks that was tried."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    written: dict[str, Any]
    stage: int
    """Of more than one rank."""
    device: str
    asked: int | str
    """The budget of a rank."""
    optimizer: str
    refused: dict[int, int] = field(default_factory=dict)
    skipped: dict[int, str] = field(default_factory=dict)
    why: ConfigError | None = None
    """The last one was skipped."""
    progress: tqdm[Any] = field(init=False)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        config: Config | str | os.PathLike[str] | Mapping[str, Any] | None,
        device: str,
        budget: int | str | None,
        optimizer: str,
    ) -> _Search:
        written = _written(config)
        stage = (written.get("zero_optimization") or {}).get("stage")
        if budget is None:
            budget = (written.get("dspass") or {}).get("memory_budget")
        asked = Config.load({"dspass": {"memory_budget": budget}}).dspass.memory_budget or "auto"
        refuse_beyond(asked, device)
        return cls(
            model=model,
            args=args,
            kwargs=kwargs,
            written=written,
            stage=3 if stage is None else stage,
            device=device,
            asked=asked,
            optimizer=optimizer,
        )

    def found(self, most: int) -> Fit:
        """Doubles until a number fits, then halves down to the last that did not."""
        numbers = self._usable(most)
        few, fits, report, i = 0, 0, None, 0
        while report is None and i < len(numbers):
            fits = numbers[i]
            report = self._tried(fits)
            # Of one that is skipped nothing is known but that: in a node its neighbour is tried.
            ahead = i + 1 if fits in self.skipped and fits < _NODE else bisect.bisect_left(numbers, 2 * fits)
            few = fits if fits in self.refused else few
            i = min(ahead, len(numbers) - 1) if i < len(numbers) - 1 else ahead
            if fits in self.refused and self._is_whole(fits):
                break
        if report is None:
            raise self._refusal(most)
        while between := [n for n in numbers if few < n < fits and n not in self.skipped]:
            middle = between[len(between) // 2]
            if (fewer := self._tried(middle)) is not None:
                fits, report = middle, fewer
            elif middle in self.refused:
                few = middle
        skipped = {n: why for n, why in self.skipped.items() if n < fits}
        report = with_unplanned(report, self._asked(fits))
        return Fit(world_size=fits, config=self._options(fits), report=report, refused=self.refused, skipped=skipped)

    def _usable(self, most: int) -> list[int]:
        """The numbers that the configuration goes with, as far as it says so by itself."""
        nodes = [n for n in (*range(1, _NODE), *range(_NODE, most + 1, _NODE)) if n <= most]
        kept = [n for n in nodes if self._goes(n)]
        return kept or [n for n in range(1, most + 1) if n not in self.skipped and self._goes(n)]

    def _goes(self, ranks: int) -> bool:
        try:
            config = self._config(ranks)
            stages, zero, experts = config.pipeline.stages or 1, config.zero, config.expert_parallel
            if experts.enabled and ranks == 1:
                raise ConfigError("expert_parallel.enabled", "one rank has no others to divide experts over.")
            groups = {
                "pipeline.stages": stages,
                "zero_optimization.mics_shard_size": zero.mics_shard_size if zero.stage else None,
                "zero_optimization.zero_hpz_partition_size": zero.zero_hpz_partition_size if zero.stage == 3 else None,
                "expert_parallel.autoep_size": experts.autoep_size if experts.enabled else None,
            }
            for key, size in groups.items():
                if size and ranks % size:
                    raise ConfigError(key, f"{size} does not divide {ranks} ranks.")
            config.resolve_batch(ranks // stages)
        except ConfigError as error:
            self._skip(ranks, error)
            return False
        return True

    def _skip(self, ranks: int, error: ConfigError) -> None:
        if str(error) in self.skipped.values():
            raise error  # the same for two numbers: it is not about them
        self.skipped[ranks], self.why = str(error), error

    def _tried(self, ranks: int) -> Report | None:
        """The prediction; None where that number is refused, or skipped."""
        self.progress.set_postfix_str(f"{ranks} x {self.device}")
        always = self._always(ranks)
        if always > self._limit(ranks):
            self.refused[ranks] = always
            return None
        self.progress.update()
        try:
            return predicted_report(self._asked(ranks))
        except BudgetError as error:
            self.refused[ranks] = error.smallest
        except ConfigError as error:
            self._skip(ranks, error)
        return None

    def _asked(self, ranks: int) -> Question:
        return Question(
            model=self.model,
            args=self.args,
            kwargs=self.kwargs,
            config=self._config(ranks),
            world=ranks,
            device=self.device,
            optimizer=self.optimizer,
        )

    def _options(self, ranks: int) -> dict[str, Any]:
        zero, own = (self.written.get(section) or {} for section in ("zero_optimization", "dspass"))
        return {
            **self.written,
            "zero_optimization": {**zero, "stage": self.stage if ranks > 1 else 0},
            "dspass": {**own, "memory_budget": self._limit(ranks)},
        }

    def _limit(self, ranks: int) -> int:
        """The budget in bytes. Ranks on CPUs share the memory of the machine, if no launcher says otherwise."""
        if isinstance(self.asked, int):
            return self.asked
        share = None if "LOCAL_WORLD_SIZE" in os.environ else ranks
        return devices.share_of(self.asked, devices.capacity(self.device, share))

    def _config(self, ranks: int) -> Config:
        return Config.load(self._options(ranks))

    def _always(self, ranks: int) -> int:
        """Bytes that one of so many ranks holds at least: parameters, gradients, and states that may not wait on the host.
        Where stages or experts are divided too, nothing is taken to be whole."""
        config = self._config(ranks)
        params = list(self.model.parameters())
        trained = [p for p in params if p.requires_grad]
        waits = config.offload_optimizer == "cpu" or (config.offload_optimizer is None and self.device != "cpu")
        stage = 3 if config.pipeline.enabled or config.expert_parallel.enabled else config.zero.stage or 0
        item = 2 if config.bf16 or config.fp16 else None  # bytes of what is computed with
        states = 0 if waits else sum(map(OPTIMIZERS[self.optimizer].state_bytes, trained))
        divided = sum(p.nbytes for p in (*params, *trained)) + states
        if stage == 0:
            return divided
        if config.offload_param == "cpu":  # stage 3
            divided = 0
        copies = sum(p.numel() * min(item or p.itemsize, p.itemsize) for p in params) if stage < 3 else 0
        return copies + divided // min(ranks, config.zero.mics_shard_size or ranks)

    def _is_whole(self, ranks: int) -> bool:
        """Whether more ranks hold no less."""
        config = self._config(ranks)
        shares = config.pipeline.enabled or config.expert_parallel.enabled
        return ranks > 1 and config.zero.stage == 0 and not shares

    def _refusal(self, most: int) -> Exception:
        if not self.refused:
            return self.why or ValueError(f"most={most}: there is at least one rank.")
        ranks, least = min(self.refused.items(), key=lambda found: found[1])
        way_out = "raise most="
        if self._is_whole(max(self.refused)):
            way_out = "leave zero_optimization.stage out: at 0 more ranks hold no less"
        return BudgetError(
            f"the model does not fit into {size_text(self._limit(ranks))} on up to {most} ranks of {self.device}: the least "
            f"that one takes is {size_text(least)}, of {_ranks(ranks)}. Give a smaller batch, a larger budget, or {way_out}.",
            least,
        )


def _written(config: Config | str | os.PathLike[str] | Mapping[str, Any] | None) -> dict[str, Any]:
    """Options as they were written: what they leave open is for the number of ranks to say."""
    if config is None:
        config = os.environ.get(ENVIRONMENT) or {}
    if isinstance(config, Config):
        return config.to_dict()
    written = dict(read_file(config, "") if isinstance(config, (str, os.PathLike)) else config)
    if any(not isinstance(written.get(section) or {}, Mapping) for section in ("zero_optimization", "dspass")):
        Config.load(written)  # says so
    return written


def _ranks(count: int) -> str:
    return counted(count, "rank")
