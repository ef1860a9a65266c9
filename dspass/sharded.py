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
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from dspass.runtime import compat
from dspass.runtime.params import ParamSpec

KEYS = "_dspass_keys"
ENGINE = "_dspass_engine"


class PickleShardedError(TypeError):
    """A whole sharded module was pickled; only its state can be saved."""


@functools.cache
def sharded_class(cls: type[nn.Module], names: frozenset[str]) -> type[nn.Module]:
    """The subclass of ``cls`` in which ``names`` are read through :func:`_read`."""
    body: dict[str, Any] = {name: property(_getter(name), _setter(name)) for name in names}
    body |= {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "_load_from_state_dict": _load,
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
    object.__setattr__(module, KEYS, known)
    object.__setattr__(module, ENGINE, next(iter(specs.values())).engine)
    module.__class__ = sharded_class(base, frozenset(known))


def _getter(name: str) -> Any:
    # A closure: with a default argument Dynamo fails.
    def get(self: Any) -> Any:
        param = self._parameters[name]
        # torch.func.functional_call puts plain tensors here for the length of a call.
        if isinstance(param, DTensor) and (torch.compiler.is_compiling() or compat.in_compiled_call()):
            return torch.ops.dspass.unshard(param.to_local(), self._dspass_keys[name])
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


def _load(self: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """``load_state_dict`` with whole tensors, the same on every rank: each keeps its rows, and nothing is sent."""
    for name in self.__dict__[KEYS]:
        param: Any = self._parameters[name]
        value: Any = state_dict.get(prefix + name)
        if not isinstance(param, DTensor) or not isinstance(value, torch.Tensor) or isinstance(value, DTensor):
            continue
        if value.shape == param.shape:
            value = value.detach().to(param.device, param.dtype)
            state_dict[prefix + name] = distribute_tensor(
                value, param.device_mesh, param.placements, src_data_rank=None
            )
    type(self)._dspass_base._load_from_state_dict(self, state_dict, prefix, *args)


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
