"""What ``torch.optim``'s optimisers hold while they step, beside parameters, gradients and the states that are on the device.

``torch.optim`` steps one parameter after another on a CPU, and all of them together (``foreach``) on a GPU, unless a group says
otherwise; those that are ``DTensor``s too: ``torch.distributed.tensor`` puts these among the types that
``_default_to_fused_or_foreach`` accepts. States that wait on the host come and go part by part, and each part is a step
of its own (:mod:`dspass.runtime.host_states`).

Dropped: to run the optimiser itself on fake tensors. Its choice between the two is by the device of what it steps, and a
prediction for a GPU has tensors of a CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from dspass.runtime.adamw import states_of_8_bits
from dspass.runtime.host_states import HostStates, local_bytes, local_of


@dataclass(frozen=True)
class Optimizer:
    """An optimiser by the tensors of a parameter's shape that it holds: ``states`` from step to step, and ``temporaries`` while
    it steps that parameter, of which ``results`` are still there when it comes to the next one. Where all are stepped together,
    it holds ``foreach`` of all (None: the results), and no more; ``together`` says whether they are (None: as the device has
    it). A value of theirs has as many bytes as one of the parameter, or ``element`` ones; states that are no such tensors are
    counted by ``bytes_of_states``."""

    states: int
    temporaries: int = 0
    results: int = 0
    foreach: int | None = None
    together: bool | None = None
    element: int | None = None
    bytes_of_states: Callable[[torch.Tensor], int] | None = None

    @property
    def of_all(self) -> int:
        """Tensors of each parameter that are there where all are stepped together."""
        return self.results if self.foreach is None else self.foreach

    def tensor_bytes(self, param: torch.Tensor) -> int:
        """Of one tensor of the shape of what this rank holds of ``param``."""
        return local_bytes(param) if self.element is None else self.element * local_of(param).numel()

    def state_bytes(self, param: torch.Tensor) -> int:
        """Of all states of what this rank holds of ``param``."""
        return self.states * self.tensor_bytes(param) if self.bytes_of_states is None else self.bytes_of_states(param)


def bytes_of_adamw(param: torch.Tensor, bits: int) -> int:
    """Of what ``dspass.AdamW`` keeps of this rank's share of ``param``, in fp32 or 8 bits, whatever dtype that has."""
    count = local_of(param).numel()
    return 8 * count if bits == 32 else sum(s.nbytes for s in states_of_8_bits(torch.empty(count, device="meta")))


def own_adamw(bits: int, bytes_of_states: Callable[[torch.Tensor], int] | None = None) -> Optimizer:
    """``dspass.AdamW``. For states of 8 bits what Inductor generates for a CPU keeps one of them in fp32, until its blocks'
    largest values are known; a kernel keeps them in registers."""
    count = bytes_of_states or functools.partial(bytes_of_adamw, bits=bits)
    return Optimizer(2, 0 if bits == 32 else 1, element=4, bytes_of_states=count)


#: Adam's denominator is a square root and then what that is divided to, which lives until the next one takes its name.
ADAMW = Optimizer(2, 2, 1)

OPTIMIZERS = {
    "adamw": ADAMW,
    "adam": ADAMW,
    "sgd": Optimizer(0),
    "momentum": Optimizer(1),
    "adamw-fused": Optimizer(2),
    "dspass-adamw": own_adamw(32),
    "dspass-adamw-8bit": own_adamw(8),
    "none": Optimizer(0),
}


@dataclass(frozen=True)
class Moment:
    """Bytes on the device while one parameter, or one part that is stepped together, is stepped: of ``states`` that came from
    the host, and of ``temporaries``."""

    states: int
    temporaries: int

    @property
    def bytes(self) -> int:
        return self.states + self.temporaries


def moments(
    params: Sequence[torch.Tensor],
    away: HostStates,
    optimizer: Optimizer,
    *,
    together: bool,
    overlaps: bool,
    hosted: frozenset[int] = frozenset(),
) -> Iterator[Moment]:
    """A step of ``params``. ``together``: as on a GPU; ``overlaps``: while a part is stepped, the states of that before it
    leave and those of that after it come. Parameters whose ``id`` is ``hosted`` are stepped on the host, where nothing comes;
    their temporaries count, for such parameters are of a CPU, and these are made by torch's allocator there."""
    parts = away.parts(params)
    came = [sum(optimizer.state_bytes(p) for p in part if p in away and id(p) not in hosted) for part in parts]
    for i, part in enumerate(parts):
        states = sum(came[max(i - 1, 0) : i + 2]) if overlaps else came[i]
        sizes = [optimizer.tensor_bytes(p) for p in part]
        if together if optimizer.together is None else optimizer.together:
            yield Moment(states, optimizer.of_all * sum(sizes))
            continue
        for before, size in zip([0, *sizes], sizes, strict=False):
            yield Moment(states, optimizer.results * before + optimizer.temporaries * size)


__all__ = ["ADAMW", "OPTIMIZERS", "Moment", "Optimizer", "bytes_of_adamw", "moments", "own_adamw"]
