"""What waits on the host: optimiser states, where a configuration says so without a budget, and parameters. Under a budget the
planner decides of how many. Parameters were sent there as the model was sharded (``offload_param``), for nothing is known of
its graphs then; those that a plan has room for come back before its graph runs."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch.distributed.tensor import DTensor

from dspass.config import Config
from dspass.optimizers import Optimizers
from dspass.runtime import compat
from dspass.runtime.engine import Engine
from dspass.runtime.host import is_on_host, release_unused
from dspass.runtime.host_states import LEAST_BYTES, local_bytes, local_of
from dspass.runtime.params import ParamSpec

#: Of several graphs one with this share of the parameters is taken for the whole model.
_NEARLY_ALL = 0.9


def host_all(engine: Engine, config: Config) -> None:
    """``offload_optimizer``: the share ``ratio`` of the parameters; ``offload_param``: those that wait on the host too."""
    engine.host_states.part_elements = config.zero.sub_group_size
    params = engine.params()
    engine.host_states.add(p for p in params.values() if is_on_host(local_of(p)))
    if config.offload_optimizer == "cpu" and config.dspass.memory_budget is None and config.dspass.plan is None:
        host(engine, list(shares(params, config.offload_optimizer_ratio, 1)[-1]))


def host(engine: Engine, names: list[str] | tuple[str, ...]) -> None:
    """From the next step on the states of the named parameters wait on the host."""
    params = engine.params()
    engine.host_states.add(params[name] for name in names)


def move_out(engine: Engine) -> None:
    """Send to the host what was made on the device before a plan was, as in the first step of the one-line way."""
    if engine.supposed_optimizer is None and engine.host_states:
        for optimizer in Optimizers(engine).alive:
            engine.host_states.leave(optimizer)


def undecided(engine: Engine, specs: Sequence[ParamSpec]) -> list[ParamSpec]:
    """Those of ``specs`` that wait on the host, and may come back for a plan. None where they are not nearly all that do: the
    graphs of a model that breaks would each fill the room that the others are planned beside."""
    sent = [spec for spec in engine.specs.values() if spec.on_host or spec.name in engine.placed]
    mine = [spec for spec in specs if spec in sent]
    if sum(spec.numel for spec in mine) < _NEARLY_ALL * sum(spec.numel for spec in sent):
        return []
    return [spec for spec in mine if spec.name not in engine.placed and spec.param() is not None]


@contextlib.contextmanager
def supposing(engine: Engine, those: Sequence[ParamSpec], away: Collection[str]) -> Iterator[None]:
    """As if of ``those`` parameters that wait on the host only the ones named in ``away`` did, and no states by earlier plans:
    a plan says of all states on the host that they are there."""
    back = [spec for spec in those if spec.on_host and spec.name not in away]
    held = engine.params()
    params = [p for spec in back if (p := spec.param()) is not None and p in engine.host_states]
    params += [p for name in engine.planned_states if (p := held.get(name)) is not None and p in engine.host_states]
    engine.host_states.discard(params)
    for spec in back:
        spec.on_host = False
    try:
        yield
    finally:
        engine.host_states.add(params)
        for spec in back:
            spec.on_host = True


def place(engine: Engine, those: Sequence[ParamSpec], away: Collection[str]) -> None:
    """When the next graph first runs only the ones named in ``away`` wait on the host: :func:`bring_in` has the others come."""
    for spec in those:
        engine.placing[spec.name] = spec.name in away
        if spec.name not in away:
            spec.on_host = False
            if (param := spec.param()) is not None:
                engine.host_states.discard([param])


def withdraw(engine: Engine) -> None:
    """Nothing has moved that was to, as when what had been planned could not be compiled: it may be planned anew."""
    for spec in engine.specs.values():
        if engine.placing.get(spec.name, True):
            continue
        spec.on_host = True
        if (param := spec.param()) is not None:
            engine.host_states.add([param])
    engine.placing.clear()


def bring_in(engine: Engine) -> None:
    """Have parameters on the device that a plan has room for, with their gradients, and states that are to be there."""
    params = engine.params()
    came = [params[name] for name, waits in engine.placing.items() if not waits and name in params]
    engine.placed.update(engine.placing)
    engine.placing.clear()
    for param in came:
        for tensor in (param, param.grad):
            if isinstance(tensor, DTensor):
                # A copy in any case: where a CPU's memory stands for the host's, both are of one device.
                compat.set_local(tensor, local_of(tensor).to(tensor.device_mesh.device_type, copy=True))
    if came:
        engine.host_states.come_back(Optimizers(engine).alive, came)
        release_unused()


def shares(params: Mapping[str, torch.Tensor], ratio: float, count: int) -> list[tuple[str, ...]]:
    """``count`` growing lists of names up to ``ratio`` of the bytes of trained ``params``, in their order; those of less than
    :data:`~dspass.runtime.host_states.LEAST_BYTES` are in none."""
    sizes = {n: local_bytes(p) for n, p in params.items() if p.requires_grad}
    worth = [n for n, size in sizes.items() if size >= LEAST_BYTES]
    most = ratio * sum(sizes.values())
    lists: list[tuple[str, ...]] = []
    before = 0
    for step in range(1, count + 1):
        taken, held = [], 0
        for name in worth:
            if held + sizes[name] > most * step / count * (1 + 1e-9):
                continue
            taken.append(name)
            held += sizes[name]
        if held > before:
            lists.append(tuple(taken))
            before = held
    return lists or [()]
