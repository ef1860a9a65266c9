"""What ``python -m dspass calibrate`` measured of a device, in a file: read only where it was made for what is here.

A file holds seconds, not peaks: a :class:`Curve` over operations or bytes, since small products and kernels do not reach the
rates of large ones, and what fits into a cache moves faster than what does not. On a CPU it is of one number of threads, and
of the ranks that share it: another number of ranks takes the nearest file of fewer.

Dropped: a rate and its half-performance length (Hockney and Jesshope, 1981) in place of a curve. Two numbers describe a launch
and a peak, but not the two or three levels of a CPU's caches.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist

log = logging.getLogger(__name__)

_VERSION = 2

#: What a measured step may say of a prediction: beyond, something else than the device is at work, such as loading of data.
RATIO = (0.5, 2.0)


class CalibrationError(ValueError):
    """A calibration's file that cannot be read."""


@dataclass(frozen=True)
class Curve:
    """Seconds by amount of work, both ascending; in between on a straight line. Less work than was measured takes as long as
    the least, more goes on at the rate of the most. More work never takes less time."""

    amounts: tuple[float, ...]
    times: tuple[float, ...]

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.amounts, self.amounts[1:], strict=False))
        longer = all(a <= b for a, b in zip(self.times, self.times[1:], strict=False))
        positive = all(0 < v < math.inf for v in (*self.amounts, *self.times))
        if not self.amounts or len(self.amounts) != len(self.times) or not (rising and longer and positive):
            raise ValueError(f"not a curve: amounts {self.amounts}, times {self.times}")

    @classmethod
    def through(cls, points: Mapping[float, float]) -> Self:
        """Through measured points, noise and all: none is below an earlier one."""
        amounts = sorted(points)
        times, longest = [], 0.0
        for amount in amounts:
            longest = max(longest, points[amount])
            times.append(longest)
        return cls(tuple(map(float, amounts)), tuple(times))

    def seconds(self, amount: float) -> float:
        if amount <= 0:
            return 0.0
        i = bisect_right(self.amounts, amount)
        if i == 0:
            return self.times[0]
        if i == len(self.amounts):
            return self.times[-1] * amount / self.amounts[-1]
        a, b, s, t = self.amounts[i - 1], self.amounts[i], self.times[i - 1], self.times[i]
        return s + (t - s) * (amount - a) / (b - a)

    @property
    def rate(self) -> float:
        """Of the most work."""
        return self.amounts[-1] / self.times[-1]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """``curves`` by kind and precision (``"product float32"``) over operations, those of attentions over the operations of one
    head, and ``"generated"`` over bytes moved; ``functions``: seconds an element of a function or reduction beyond moving it;
    ``host_link``: bytes a second between a device and main memory; ``fresh``: seconds a byte to take memory from the operating
    system that was given back to it; ``latency`` and ``link`` of collectives over ``ranks``, which on a CPU measured all else
    beside each other (0: there was one, and no collective). ``steps``: measured over predicted time of a step, by model."""

    kind: str
    product: str
    threads: int
    torch: str
    made: str
    curves: Mapping[str, Curve]
    functions: Mapping[str, float]
    host_link: float
    fresh: float = 0.0
    latency: float = 0.0
    link: float = 0.0
    ranks: int = 0
    steps: Mapping[str, float] = field(default_factory=dict)

    def why_not(self, product: str, threads: int) -> str | None:
        """Why this does not serve the device that is here; None where it does."""
        if self.product != product:
            return f"it was made on {self.product}, and this is {product}"
        if self.kind == "cpu" and self.threads != threads:
            return f"it was made with {self.threads} threads, and there are {threads}"
        return None

    def save(self, folder: Path) -> Path:
        """Write the file of this kind of device; it is replaced at once."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / _file(self.kind, self.product, self.threads, self.ranks)
        half = path.with_suffix(f".{os.getpid()}")
        half.write_text(json.dumps({"version": _VERSION, **asdict(self)}, indent=1) + "\n")
        half.replace(path)
        return path

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises :class:`CalibrationError` for a file of another form, ``FileNotFoundError`` for none."""
        try:
            said: dict[str, Any] = json.loads(path.read_text())
            if said.pop("version") != _VERSION:
                raise ValueError(f"not version {_VERSION}")
            curves = {k: Curve(tuple(c["amounts"]), tuple(c["times"])) for k, c in said.pop("curves").items()}
            found = cls(**said, curves=curves)
            scalars = (
                found.host_link,
                found.fresh,
                found.latency,
                found.link,
                *found.functions.values(),
                *found.steps.values(),
            )
            if "generated" not in curves or "product float32" not in curves:
                raise ValueError("curves are missing")
            if not all(0 <= s < math.inf for s in scalars):
                raise ValueError("a figure is negative or not a number")
            return found
        except FileNotFoundError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CalibrationError(
                f"{path} is no calibration of a device: {error!r}. Delete it, or make it anew: python -m dspass calibrate."
            ) from error


def folder() -> Path:
    """Where calibrations are kept: ``$DSPASS_DEVICES``, else ``dspass/devices`` in the user's cache."""
    if "DSPASS_DEVICES" in os.environ:
        return Path(os.environ["DSPASS_DEVICES"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dspass" / "devices"


def find(kind: str, product: str) -> tuple[Calibration | None, str]:
    """The stored calibration of the device that is here, and where it is from; otherwise why there is none."""
    ranks = ranks_here() if kind == "cpu" else 1
    names = dict.fromkeys(_file(kind, product, torch.get_num_threads(), count) for count in range(ranks, 0, -1))
    path = next((path for name in names if (path := folder() / name).is_file()), None)
    if path is None:
        return None, "not calibrated: python -m dspass calibrate"
    found = Calibration.load(path)
    reason = found.why_not(product, torch.get_num_threads())
    if reason is not None:
        return None, f"{path} is not used: {reason}; python -m dspass calibrate makes it anew"
    told = f"measured by python -m dspass calibrate on {found.made}, {path}"
    if kind == "cpu" and (measured := max(found.ranks, 1)) < ranks:
        told += (
            f", by {measured} of {ranks} ranks: python -m dspass calibrate --ranks {ranks} for all beside each other"
        )
    return found, told


def is_there(kind: str, product: str) -> bool:
    """Whether a GPU was calibrated, however old that is."""
    return (folder() / _file(kind, product, 0, 0)).is_file()


def ranks_here() -> int:
    """Ranks that share this machine: as a launcher says (``$LOCAL_WORLD_SIZE``), otherwise all of the group, for which of them
    are elsewhere is not known."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        return int(os.environ["LOCAL_WORLD_SIZE"])
    return dist.get_world_size() if dist.is_initialized() else 1


def note_step(kind: str, product: str, model: str, ratio: float) -> None:
    """Keep a model's measured over predicted time of a step with its device's calibration, where there is one. It is called in
    a backward: what cannot be kept is said once, and ends nothing."""
    try:
        found, _ = find(kind, product)
        if found is not None:
            low, high = RATIO
            replace(found, steps={**found.steps, model: min(max(ratio, low), high)}).save(folder())
    except (OSError, CalibrationError) as error:
        _say_unkept(folder(), str(error))


@functools.cache
def _say_unkept(where: Path, why: str) -> None:
    log.warning(
        "The time of a step could not be kept in %s, where it would make later predictions better: %s. Set $DSPASS_DEVICES to "
        "a folder that can be written and has the calibration.",
        where,
        why,
    )


def _file(kind: str, product: str, threads: int, ranks: int) -> str:
    """``cpu-1-threads.json``, of several ranks ``cpu-1-threads-2-ranks.json``, or a GPU's name: machines may share a home."""
    if kind != "cpu":
        return f"{'-'.join(product.lower().split())}.json"
    return f"cpu-{threads}-threads{f'-{ranks}-ranks' if ranks > 1 else ''}.json"
