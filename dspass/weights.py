"""Weights stored in few bits: ``dspass.quantise``, for inference and for what is frozen while adapters train.

The weight of each chosen layer leaves the module's parameters and becomes two buffers, ``weight_codes`` and
``weight_scales``; ``state_dict`` saves them and ``load_state_dict`` brings them back, and quantises a whole ``weight`` where it
finds one. The module's class is exchanged for a subclass with a property: reading ``weight`` writes the weight out, in code
that is not compiled too, so every use of it works. In a compiled graph the read is one node, ``dspass::dequantise_rows``,
which :mod:`dspass.passes.quantised_products` joins with the product behind it.

Dropped: a tensor subclass, as torchao's. Each operator would need a rule of its own, and each optimiser, checkpoint and
``DTensor`` a look at what it does there; a graph needs one node. Dropped: ``torch.nn.utils.parametrize``, whose originals are
parameters with gradients, under other names.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from dspass.config import Config, ConfigError, LayersConfig
from dspass.owners import unwrap
from dspass.quantising import relative
from dspass.report import QuantisedTensor
from dspass.runtime import compat
from dspass.runtime.few_bits import dequantise_rows, quantise_rows
from dspass.runtime.quantise import DTYPES, squares
from dspass.shard import precision

log = logging.getLogger(__name__)

Module = TypeVar("Module", bound=nn.Module)

_STORED = "_dspass_stored"
_SECTION = "dspass.quantise.layers"


@dataclass(frozen=True, kw_only=True)
class Stored:
    """How a module's weight is stored. ``shape`` and ``dtype`` are those of the weight that it answers for; ``transposed``
    where its columns, not its rows, are the output channels."""

    format: str
    group: int | None
    shape: tuple[int, int]
    dtype: torch.dtype
    transposed: bool
    relative_error: float | None
    """``|stored - weight| / |weight|`` when it was quantised; None where there were no values, as on the meta device."""

    @property
    def columns(self) -> int:
        return self.shape[0] if self.transposed else self.shape[1]


def quantise(
    model: Module, config: Config | str | os.PathLike[str] | Mapping[str, Any] | None = None, *, progress: bool = False
) -> Module:
    """Store the weights of ``model``'s linear layers in few bits, in place, and answer it.

    ``config`` is the whole configuration or a path; ``dspass.quantise.layers`` in it, or DeepSpeed's ``weight_quantization``,
    says which format, how many columns share a scale, and which layers, by name. Absent: int8, one scale an output channel,
    all of ``nn.Linear`` and Hugging Face's ``Conv1D``, with the embeddings that are tied to them. Where a part of the
    parameters is frozen, as beside LoRA's adapters, only frozen weights are taken; where none is, all are, and none of them
    trains any more. ``progress`` shows a bar. A layer that is stored already stays as it is.

    Works on the meta device, to be filled by ``load_state_dict(..., assign=True)``. Raises ``ConfigError`` where the
    configuration cannot be, or no layer is found, ``RuntimeError`` where the parameters are sharded already.
    """
    compat.check_torch()
    loaded = Config.load(config)
    settings = loaded.layers if loaded.layers.format is not None else replace(loaded.layers, format="int8")
    root = unwrap(model)
    owners: dict[int, list[nn.Module]] = {}
    for module in root.modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(id(weight), []).append(module)
    chosen = dict(_chosen(root, settings))
    if not chosen:
        raise ConfigError(_SECTION, *_nothing_found(root, settings))
    whole = []
    for name, module in tqdm(chosen.items(), desc="quantise", unit="layer", disable=not progress):
        weight = module._parameters.get("weight")
        if weight is None:
            continue  # it was tied to one before it
        with torch.inference_mode(False), torch.no_grad():  # buffers that are made in it could be used in no training
            stored = _store(name, weight, module, owners[id(weight)], settings, precision(loaded, weight.dtype))
        if not stored:
            whole.append(name)
    if whole:
        log.warning(
            "%d of %d weights stay whole, as they would be off by more than %s: %s",
            len(whole),
            len(chosen),
            settings.max_relative_error,
            ", ".join(whole),
        )
    return model


def stored_of(model: nn.Module) -> dict[str, Stored]:
    """By the module's name, how each weight of ``model`` that is stored in few bits is stored."""
    found = ((name, module.__dict__.get(_STORED)) for name, module in unwrap(model).named_modules())
    return {name: stored for name, stored in found if stored is not None}


def refuse_to_freeze(model: nn.Module) -> None:
    """Raise ``ConfigError`` where all of a model would train: its weights would stop to, and nobody would know."""
    if torch.is_grad_enabled() and all(p.requires_grad for p in unwrap(model).parameters()):
        raise ConfigError(
            f"{_SECTION}.format",
            "every parameter of the model trains, and a weight in few bits does not.",
            "Call the model under torch.no_grad(), freeze what is to be stored with requires_grad_(False), or call "
            "dspass.quantise(model, config) to freeze all of them.",
        )


def stored_tensors(model: nn.Module) -> list[QuantisedTensor]:
    """Of each weight in few bits what a report shows; one that several modules hold is there once."""
    found: dict[int, QuantisedTensor] = {}
    for name, module in unwrap(model).named_modules():
        stored = module.__dict__.get(_STORED)
        if stored is None:
            continue
        codes, scales = module._buffers["weight_codes"], module._buffers["weight_scales"]
        assert codes is not None
        assert scales is not None
        found.setdefault(
            id(codes),
            QuantisedTensor(
                name=f"{name}.weight",
                kind="weight",
                direction="forward",
                format=stored.format,
                whole_bytes=prod(stored.shape) * stored.dtype.itemsize,
                sent_bytes=codes.nbytes + scales.nbytes,
                relative_error=stored.relative_error,
            ),
        )
    return list(found.values())


def is_conv1d(module: nn.Module) -> bool:
    """Hugging Face's linear layer of GPT-2, whose weight is (inputs, outputs)."""
    return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__)


def _linears(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in root.named_modules():
        if isinstance(module, nn.Linear) or is_conv1d(module):
            yield name, module


def _chosen(root: nn.Module, settings: LayersConfig) -> Iterator[tuple[str, nn.Module]]:
    some_frozen = any(not p.requires_grad for p in root.parameters())
    for name, module in _linears(root):
        weight = module._parameters.get("weight")
        if weight is None or weight.dtype not in DTYPES or weight.dim() != 2 or not weight.numel():
            continue
        if settings.takes(name) and not (some_frozen and weight.requires_grad):
            yield name, module


def _nothing_found(root: nn.Module, settings: LayersConfig) -> tuple[str, str]:
    names = [name for name, module in _linears(root) if isinstance(module._parameters.get("weight"), nn.Parameter)]
    if stored_of(root) and not names:
        return "every linear layer is stored in few bits already.", "Quantise the whole model anew for another format."
    if not names:
        return "the model has no linear layer with a floating-point weight.", "Remove the section."
    taken = [name for name in names if settings.takes(name)]
    if not taken:
        return (
            f"no linear layer is named so; there are {len(names)}, {names[0]!r} the first.",
            'Patterns are those of fnmatch, such as "model.layers.*.mlp.*".',
        )
    return (
        "every linear layer that is named so trains, while other parameters are frozen.",
        "Freeze those to be stored with requires_grad_(False) first.",
    )


def _store(
    name: str,
    weight: nn.Parameter,
    module: nn.Module,
    owners: list[nn.Module],
    settings: LayersConfig,
    dtype: torch.dtype,
) -> bool:
    """Whether it is stored; False where it would be off by more than is allowed."""
    if isinstance(weight, DTensor):
        raise RuntimeError(f"{name}.weight is sharded already: call dspass.quantise before dspass.shard.")
    others = [o for o in owners if not (isinstance(o, (nn.Linear, nn.Embedding)) or is_conv1d(o))]
    if others:
        raise RuntimeError(
            f"{name}.weight is tied to a {type(others[0]).__name__}, which is not known to read it alone: put "
            f"{name!r} under {_SECTION}.exclude."
        )
    transposed = is_conv1d(module)
    if transposed and len(owners) > 1:
        raise RuntimeError(
            f"{name}.weight, a Conv1D's, is tied to another module: put {name!r} under {_SECTION}.exclude."
        )
    assert settings.format is not None
    rows = weight.t().contiguous() if transposed else weight
    codes, scales = quantise_rows(rows, settings.format, settings.group_size)
    stored = Stored(
        format=settings.format,
        group=settings.group_size,
        shape=(weight.shape[0], weight.shape[1]),
        dtype=dtype,
        transposed=transposed,
        relative_error=None
        if weight.is_meta or compat.is_fake(weight)
        else _error(rows, codes, scales, settings.format),
    )
    limit = settings.max_relative_error
    if limit is not None and stored.relative_error is not None and stored.relative_error > limit:
        return False
    for owner in owners:
        _attach(owner, stored, codes, scales)
    return True


def _error(rows: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, format: str) -> float:
    """Part by part: no second whole copy is made."""
    parts = zip(rows.split(1024), codes.split(1024), scales.split(1024), strict=True)
    sums = [
        squares(some, dequantise_rows(code, scale, rows.shape[1], format, torch.float32)) for some, code, scale in parts
    ]
    return relative(torch.stack(sums).sum(0))


def _attach(module: nn.Module, stored: Stored, codes: torch.Tensor, scales: torch.Tensor) -> None:
    del module._parameters["weight"]
    module.register_buffer("weight_codes", codes)
    module.register_buffer("weight_scales", scales)
    object.__setattr__(module, _STORED, stored)
    whole: Any = type(module)
    module.__class__ = stored_class(whole)


@functools.cache
def stored_class(cls: Any) -> type[nn.Module]:
    body = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "weight": property(_read),
        "_apply": _apply,
        "_load_from_state_dict": _load,
        "__reduce_ex__": _reduce,
        "_dspass_whole": cls,
    }
    return cast(type[nn.Module], type(cls.__name__, (cls,), body))


def _read(self: Any) -> torch.Tensor:
    stored = self._dspass_stored
    rows = torch.ops.dspass.dequantise_rows(
        self.weight_codes, self.weight_scales, stored.columns, stored.format, stored.dtype
    )
    return cast(torch.Tensor, rows.t() if stored.transposed else rows)


def _apply(self: Any, fn: Any, recurse: bool = True) -> nn.Module:
    """``model.half()`` and ``model.to(dtype)`` change what is computed with; scales stay fp32."""
    scales = self._buffers["weight_scales"]
    type(self)._dspass_whole._apply(self, fn, recurse)
    moved = self._buffers["weight_scales"]
    if moved.dtype != scales.dtype and moved.dtype in DTYPES:
        self._buffers["weight_scales"] = scales.to(moved.device)
        object.__setattr__(self, _STORED, replace(self.__dict__[_STORED], dtype=moved.dtype))
    return cast(nn.Module, self)


def _load(self: Any, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """A whole ``weight`` is quantised as it comes in."""
    stored = self.__dict__[_STORED]
    if f"{prefix}weight" in state_dict and f"{prefix}weight_codes" not in state_dict:
        whole = state_dict.pop(f"{prefix}weight")
        rows = whole.t().contiguous() if stored.transposed else whole
        codes, scales = quantise_rows(rows.to(self.weight_scales.device), stored.format, stored.group)
        state_dict |= {f"{prefix}weight_codes": codes, f"{prefix}weight_scales": scales}
    type(self)._dspass_whole._load_from_state_dict(self, state_dict, prefix, *args)


def _reduce(self: Any, protocol: Any) -> Any:
    """Pickled by what it was made of: the class is made anew where it is read."""
    return _restore, (type(self)._dspass_whole, self.__dict__)


def _restore(cls: Any, state: dict[str, Any]) -> nn.Module:
    made: Any = stored_class(cls)
    module: nn.Module = made.__new__(made)
    module.__dict__.update(state)
    return module


__all__ = ["Stored", "quantise", "stored_of"]
