"""A module whose parameters are sharded, and what reading one of them means.

Inside a compiled forward ``self.weight`` is the whole parameter, through the marker ``dspass::unshard`` that the passes
rewrite. Everywhere else it is the ``DTensor`` itself, and reading it is no collective: one rank's log line never hangs the
others. The class of the module is exchanged for a subclass with one property a parameter; the parameters stay in
``_parameters``, so ``named_parameters``, ``state_dict`` and ``to`` work as they are.

Dropped: ``torch.nn.utils.parametrize``. It renames the parameters in ``state_dict``, and computes on eager reads too.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from dspass.runtime import compat
from dspass.runtime.params import ParamSpec
from dspass.runtime.stopped import waiting_for

KEYS = "_dspass_keys"
ENGINE = "_dspass_engine"


#: What makes whole parameters for a ``state_dict()`` that is to have all of them.
COLLECTING: ContextVar[Callable[[ParamSpec], torch.Tensor] | None] = ContextVar("collecting", default=None)


class PickleShardedError(TypeError):
    """A whole sharded module was pickled; only its state can be saved."""


@functools.cache
def sharded_class(cls: type[nn.Module], names: frozenset[str], staged: bool = False) -> type[nn.Module]:
    """The subclass of ``cls`` in which ``names`` are read through :func:`_getter`. ``staged``: pipeline stages divide it, so
    that a graph captured from it reads the marker of each parameter, also of those that are not on this rank."""
    body: dict[str, Any] = {name: property(_getter(name, staged), _setter(name)) for name in names}
    body |= {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "_load_from_state_dict": _load,
        "_save_to_state_dict": _save,
        "__deepcopy__": _deepcopy,
        "__reduce_ex__": _refuse_pickle,
        "_dspass_base": cls,
    }
    if issubclass(cls, nn.RNNBase):
        body["_flat_weights"] = property(_flat_weights, lambda self, value: None)
    return cast(type[nn.Module], type(cls.__name__, (cls,), body))


def attach(module: nn.Module, specs: Mapping[str, ParamSpec]) -> None:
    """Have ``module`` read the parameters ``specs`` (by name) as sharded ones; may be called again with more.

    The module keeps the engine alive, and with it the entries that the keys stand for.
    """
    known: dict[str, str] = {**module.__dict__.get(KEYS, {}), **{name: spec.key for name, spec in specs.items()}}
    base = type(module).__dict__.get("_dspass_base", type(module))
    engine = next(iter(specs.values())).engine
    object.__setattr__(module, KEYS, known)
    object.__setattr__(module, ENGINE, engine)
    module.__class__ = sharded_class(base, frozenset(known), engine.stages is not None)


def _getter(name: str, staged: bool) -> Any:
    # A closure: with a default argument Dynamo fails.
    def get(self: Any) -> Any:
        param = self._parameters[name]
        # torch.func.functional_call puts plain tensors here for the length of a call.
        if isinstance(param, DTensor) and (torch.compiler.is_compiling() or compat.in_compiled_call()):
            return torch.ops.dspass.unshard(param.to_local(), self._dspass_keys[name])
        if staged and torch.compiler.is_compiling():  # not placed yet, or another pipeline stage's
            return torch.ops.dspass.unshard(param, self._dspass_keys[name])
        return param

    return get


def _flat_weights(self: Any) -> list[Any]:
    """A recurrent layer keeps a list of its own of its parameters, and its forward reads nothing else."""
    return [getattr(self, name, None) for name in self._flat_weights_names]


def _setter(name: str) -> Any:
    # Without one, nn.Module.__setattr__ cannot be told from an assignment to a read-only property.
    def put(self: nn.Module, value: Any) -> None:
        self._parameters[name] = value

    return put


def _load(self: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any) -> None:
    """``load_state_dict`` with whole tensors, the same on every rank: each keeps its rows, and nothing is sent.

    Values are copied also with ``assign``, which would give the module parameters that nothing else knows of. Of another
    pipeline stage's parameter only the shape is looked at, where the state has it.
    """
    for name, key in self.__dict__[KEYS].items():
        param: Any = self._parameters[name]
        value: Any = state_dict.get(prefix + name)
        if self.__dict__[ENGINE].specs[key].is_elsewhere:
            if value is None or (isinstance(value, torch.Tensor) and value.shape == param.shape):
                state_dict[prefix + name] = param
            continue
        if not isinstance(param, DTensor) or not isinstance(value, torch.Tensor) or isinstance(value, DTensor):
            continue
        if value.shape == param.shape:
            value = value.detach().to(param.device, param.dtype)
            state_dict[prefix + name] = distribute_tensor(
                value, param.device_mesh, param.placements, src_data_rank=None
            )
    local_metadata = {**local_metadata, "assign_to_params_buffers": False}
    type(self)._dspass_base._load_from_state_dict(self, state_dict, prefix, local_metadata, *args)


def _save(self: nn.Module, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
    """``state_dict``: of pipeline stages' parameters those that this rank holds, or, inside of :data:`COLLECTING` and
    ``get_model_state_dict`` with ``full_state_dict``, which all ranks call together, all of them whole."""
    type(self)._dspass_base._save_to_state_dict(self, destination, prefix, keep_vars)
    engine = self.__dict__[ENGINE]
    if engine.stages is None:
        return
    collect = COLLECTING.get()
    if collect is None and engine.stages.pipe.size > 1 and compat.asked_for_full_state():
        collect = collected
    for name, key in self.__dict__[KEYS].items():
        spec = engine.specs[key]
        if collect is not None:
            destination[prefix + name] = collect(spec)
        elif spec.is_elsewhere:
            del destination[prefix + name]


@torch.no_grad()
def collected(spec: ParamSpec) -> torch.Tensor:
    """The whole parameter, on this rank's device, of a model that is divided into pipeline stages. All ranks call this."""
    param: Any = spec.param()
    stages = spec.engine.stages
    assert param is not None
    assert stages is not None
    if spec.is_elsewhere:
        whole = torch.empty(spec.full_shape, dtype=spec.dtype, device=stages.device)
    else:
        whole = (param.full_tensor() if isinstance(param, DTensor) else param).detach().clone()
    if 0 < len(spec.held_by) < stages.pipe.size:
        with waiting_for(stages.pipe, f"collect {spec.name}"):
            dist.broadcast(whole, stages.pipe.ranks[spec.held_by[0]], group=stages.pipe.group)
    return whole


def _deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    from dspass.shard import adopt_copy

    base = type(self)._dspass_base
    new = base.__new__(base)
    memo[id(self)] = new
    state = {k: v for k, v in self.__dict__.items() if k not in (KEYS, ENGINE)}
    new.__dict__.update(copy.deepcopy(state, memo))
    adopt_copy(self, new, memo)
    return new


def _refuse_pickle(self: nn.Module, protocol: Any) -> Any:
    raise PickleShardedError(
        f"a sharded {type(self).__name__} cannot be pickled whole (torch.save(model), pickle.dumps): each rank holds only "
        "its part. Save model.state_dict() with torch.distributed.checkpoint, or the full state with "
        "torch.distributed.checkpoint.state_dict.get_model_state_dict(model, options=StateDictOptions("
        "full_state_dict=True))."
    )
