"""The optimiser's states wait on the host between steps (ZeRO-Offload, Ren et al., 2021; ZeRO-Infinity, Rajbhandari et al.,
2021).

The step stays the person's own optimiser's, on the device, with its own kernels and numbers. It goes over the parameters in
parts: the states of a part are copied to the device, the part is stepped, and what it made goes back, while on a device that
computes as it copies the next part's are on their way. So the device holds the states of one part, or of three. Parameters
that wait on the host themselves (:mod:`dspass.passes.offload_parameters`) have their gradients and states there and are
stepped there.

Dropped: to step on the host what is computed with on the device, as ZeRO-Offload does. It copies half as many bytes, gradients
out and parameters back in place of states in and out, but reads and writes 28 bytes of the host's memory for each element of
AdamW, several times as slow as a GPU's link on common nodes, and needs an optimiser of its own, whose numbers are others.

An optimiser must treat each parameter by itself, as all of ``torch.optim`` but ``LBFGS`` do. Nothing here ran on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakIdKeyDictionary

from dspass.runtime import compat
from dspass.runtime.compat import local_of, set_local
from dspass.runtime.host import Copy, empty_on_host, is_on_host

#: States are on the device in so many parts, but no more than so many bytes at a time: a copy's latency does not matter then.
PARTS, PART_BYTES = 8, 64_000_000

#: Parameters of fewer bytes keep their states on the device: a copy would cost more to begin than to make.
LEAST_BYTES = 65_536


def local_bytes(tensor: torch.Tensor) -> int:
    """Bytes of what this rank holds of a tensor."""
    return local_of(tensor).nbytes


@dataclass(kw_only=True, eq=False)
class HostStates:
    """Whose states wait on the host, and their memory there. ``part_elements`` (DeepSpeed's ``sub_group_size``) limits a part,
    too."""

    part_elements: int | None = None
    _params: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)
    _homes: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)  # parameter -> key -> tensor on the host
    _groups: list[_Group] = field(default_factory=list)
    is_stepping: bool = False

    def add(self, params: Iterable[torch.Tensor]) -> None:
        """From the next step on the states of ``params`` wait on the host."""
        for param in params:
            self._params[param] = True

    def discard(self, params: Iterable[torch.Tensor]) -> None:
        """From the next step on the states of ``params`` stay on the device; :meth:`come_back` has them there."""
        for param in params:
            self._params.pop(param, None)

    def take(self, other: HostStates) -> None:
        """Have what ``other`` holds: the parameters of two models in one optimiser."""
        self._params.update(other._params)
        self._homes.update(other._homes)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self._params)

    def __contains__(self, param: torch.Tensor) -> bool:
        return param in self._params

    def __bool__(self) -> bool:
        return len(self._params) > 0

    @property
    def bytes(self) -> int:
        """Of the states that wait on the host now, but for those of parameters that do: these do not travel. None before the
        first step."""
        homes = [theirs for param, theirs in self._homes.items() if not is_on_host(local_of(param))]
        return sum(home.nbytes for theirs in homes for home in theirs.values())

    def leave(self, optimizer: torch.optim.Optimizer) -> None:
        """Send states to the host that were made before they were to wait there."""
        for part in self.parts([p for group in optimizer.param_groups for p in group["params"] if p in self._params]):
            if (leaving := self._leave(optimizer, part)) is not None:
                leaving.synchronize()
                leaving.wait()

    def come_back(self, optimizers: Iterable[torch.optim.Optimizer], params: Iterable[torch.Tensor]) -> None:
        """Have the states of ``params`` on the device, but for those that wait on the host nevertheless."""
        alive = list(optimizers)
        for param in params:
            if param in self._params:
                continue
            homes = self._homes.pop(param, {})
            for key, home in homes.items():
                for optimizer in alive:
                    value = optimizer.state.get(param, {}).get(key)
                    if isinstance(value, torch.Tensor) and local_of(value) is home:
                        _put(optimizer.state[param], key, home.to(local_of(param).device, copy=True))

    # -- one step ------------------------------------------------------------------------------------------------------

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Step every parameter of ``optimizer``, and leave none for its own ``step``, which comes next; :meth:`end` follows it.

        Raises whatever the optimiser raises, with its groups as they were.
        """
        self.is_stepping = True  # an optimiser's step may call that of the class it is derived from, hooks and all
        whole = [_Group(group) for group in optimizer.param_groups]
        parts = self.parts([p for group in optimizer.param_groups for p in group["params"] if p.grad is not None])
        leaving: Copy | None = None
        try:
            coming = self._fetch(optimizer, parts[0]) if parts else None
            for i, part in enumerate(parts):
                assert coming is not None
                self._arrive(optimizer, coming)
                coming = None
                following = parts[i + 1] if i + 1 < len(parts) else None
                overlaps = any(p.is_cuda for p in part)
                if following is not None and overlaps:
                    coming = self._fetch(optimizer, following)
                ids = {id(p) for p in part}
                for group in whole:
                    group.restrict(ids)
                compat.bare_step(optimizer)
                if leaving is not None:
                    leaving.wait()
                leaving = self._leave(optimizer, part)
                if following is not None and coming is None:
                    coming = self._fetch(optimizer, following)
        except BaseException:
            self._groups = whole
            self.end()
            raise
        finally:
            if leaving is not None:
                leaving.synchronize()
                leaving.wait()
        for group in whole:
            group.keep()
            group.restrict(set())
        self._groups = whole

    def end(self) -> None:
        """The optimiser's own step is over: its groups are whole again."""
        self.is_stepping = False
        for group in self._groups:
            group.restore()
        self._groups = []

    def parts(self, params: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
        """What is stepped together: what stays on the device in one, then what comes and goes in as many as it takes."""
        parts = [[p for p in params if p not in self._params]]
        held = [p for p in params if p in self._params]
        for indices in parts_of([local_of(p) for p in held], self.part_elements):
            parts.append([held[i] for i in indices])
        return [part for part in parts if part]

    def _fetch(self, optimizer: torch.optim.Optimizer, part: Sequence[torch.Tensor]) -> _Coming:
        """Begin to copy to the device what waits on the host for ``part``."""
        entries = [
            (param, key, home)
            for param in part
            if not is_on_host(local_of(param))  # else it is stepped there
            for key, value in optimizer.state.get(param, {}).items()
            if (home := self._homes.get(param, {}).get(key)) is not None and local_of(value) is home
        ]
        homes = [home for _, _, home in entries]
        devices = [local_of(param).device for param, _, _ in entries]
        places = [
            torch.empty_strided(h.shape, h.stride(), dtype=h.dtype, device=d)
            for h, d in zip(homes, devices, strict=True)
        ]
        return _Coming([(param, key) for param, key, _ in entries], places, Copy(homes, places))

    def _arrive(self, optimizer: torch.optim.Optimizer, coming: _Coming) -> None:
        coming.copy.wait()
        for (param, key), place in zip(coming.entries, coming.places, strict=True):
            _put(optimizer.state[param], key, place)

    def _leave(self, optimizer: torch.optim.Optimizer, part: Sequence[torch.Tensor]) -> Copy | None:
        """Begin to copy the states of ``part`` to the host, where they are read from now on."""
        sources, homes = [], []
        for param in part:
            if param not in self._params:
                continue
            theirs = self._homes.setdefault(param, {})
            for key, value in optimizer.state.get(param, {}).items():
                if not isinstance(value, torch.Tensor) or not value.dim():
                    continue
                local = local_of(value)
                home = theirs.get(key)
                if home is local:
                    continue  # stepped where it is
                if home is None or (home.shape, home.dtype) != (local.shape, local.dtype):
                    home = theirs[key] = empty_on_host(local)
                sources.append(local)
                homes.append(home)
                _put(optimizer.state[param], key, home)
        return Copy(sources, homes) if sources else None


class _Group:
    """An optimiser's group, of which several parts are stepped as one step: what the group counts for itself, as optimisers
    with one step number for all parameters do, is counted once."""

    def __init__(self, group: dict[str, Any]) -> None:
        self.group, self.params = group, group["params"]
        self.before = self.after = self._own

    @property
    def _own(self) -> dict[str, Any]:
        return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in self.group.items() if k != "params"}

    def restrict(self, ids: Set[int]) -> None:
        """Those parameters alone, and what the group counted before the step."""
        self._set(self.before)
        self.group["params"] = [p for p in self.params if id(p) in ids]

    def keep(self) -> None:
        """What the last part made of it is what the whole step makes."""
        self.after = self._own

    def restore(self) -> None:
        self._set(self.after)
        self.group["params"] = self.params

    def _set(self, own: Mapping[str, Any]) -> None:
        for key in self.group.keys() - own.keys() - {"params"}:
            del self.group[key]
        for key, value in own.items():
            there = self.group.get(key)
            if isinstance(there, torch.Tensor) and isinstance(value, torch.Tensor):
                there.copy_(value)  # a rate that is a tensor may be known to others
            else:
                self.group[key] = value


def parts_of(params: Sequence[torch.Tensor], most_elements: int | None = None) -> list[list[int]]:
    """Indices of the local ``params`` that are stepped together, when each has two states as large as itself."""
    limit = min(PART_BYTES, 2 * sum(p.nbytes for p in params) // PARTS)
    parts: list[list[int]] = []
    held = elements = 0
    for i, param in enumerate(params):
        size = 2 * param.nbytes
        full = most_elements is not None and elements + param.numel() > most_elements
        if not parts or held + size > limit or full:
            parts.append([])
            held = elements = 0
        parts[-1].append(i)
        held, elements = held + size, elements + param.numel()
    return parts


@dataclass
class _Coming:
    """States on their way to the device: of which parameters, where to, and the copy."""

    entries: list[tuple[torch.Tensor, Any]]
    places: list[torch.Tensor]
    copy: Copy


def _put(state: dict[Any, Any], key: Any, local: torch.Tensor) -> None:
    """``local`` in the place of what this rank holds of a state."""
    value = state[key]
    if isinstance(value, DTensor):
        set_local(value, local)
    else:
        state[key] = local


__all__ = ["LEAST_BYTES", "HostStates", "local_bytes", "local_of", "parts_of"]
