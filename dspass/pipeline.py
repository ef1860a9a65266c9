"""From a configuration to the list of passes: defaults, options, and the person's own additions, order and drops."""

from __future__ import annotations

import difflib
import importlib
from dataclasses import fields
from typing import Any

from dspass.config import Config, ConfigError, PassEntry
from dspass.passes.base import Pass, check_order
from dspass.passes.bucket_gathers import BucketGathers
from dspass.passes.bucket_reductions import BucketReductions
from dspass.passes.divide_experts import DivideExperts
from dspass.passes.global_aux_loss import GlobalAuxLoss
from dspass.passes.offload_saved import OffloadSaved
from dspass.passes.packed import QuantisingPass
from dspass.passes.pipeline import DEFAULT
from dspass.passes.prefetch_gathers import PrefetchGathers
from dspass.passes.quantise_exchanges import QuantiseExchanges
from dspass.passes.quantise_gathers import QuantiseGathers
from dspass.passes.quantise_reductions import QuantiseReductions
from dspass.passes.quantise_saved import QuantiseSaved
from dspass.passes.quantised_products import QuantisedProducts


def build(config: Config) -> tuple[Pass, ...]:
    """The passes of ``config`` in order, checked; ``ConfigError`` or ``PassError`` name what is wrong."""
    known = {cls.name: cls for cls in DEFAULT}
    defaults = [cls(**_options(cls, config)) for cls in DEFAULT]
    entries = config.dspass.passes
    if entries is None:
        return tuple(defaults)
    dropped = {entry.name for entry in entries if entry.drop}
    listed = {entry.name for entry in entries if not entry.drop}
    result: list[Pass] = []
    for entry in entries:
        if entry.drop:
            _find(entry, known)
        elif entry.name == "...":
            result += [p for p in defaults if p.name not in dropped | listed]
        else:
            cls = _find(entry, known)
            names = {f.name for f in fields(cls)}
            for option in entry.options:
                if option not in names:
                    raise ConfigError(
                        f"dspass.passes.{entry.name}.{option}",
                        "the pass has no such option",
                        f"it has {sorted(names) or 'none'}",
                    )
            result.append(cls(**{**_options(cls, config), **entry.options}))
    check_order(result)
    return tuple(result)


def _options(cls: type[Pass], config: Config) -> dict[str, Any]:
    """What the configuration's own keys say about a pass. Absent keys leave the pass's defaults."""
    zero = config.zero
    options: dict[str, Any] = {}
    if cls is DivideExperts:
        options |= {"enabled": config.expert_parallel.enabled, "chunks": config.experts.chunks}
    if cls is DivideExperts and config.experts.limits:
        options["capacity_factor"] = config.experts.capacity_factor
        if config.experts.min_capacity is not None:
            options["min_capacity"] = config.experts.min_capacity
    if cls is BucketGathers:
        options["max_elements"] = zero.stage3_prefetch_bucket_size if zero.stage == 3 else zero.allgather_bucket_size
    if cls is BucketReductions:
        options["max_elements"] = zero.reduce_bucket_size
        if zero.overlap_comm is False:
            options["in_flight"] = 0
    if cls is PrefetchGathers:
        options["max_live_elements"] = zero.stage3_max_live_parameters
        if zero.overlap_comm is False:
            options["distance"] = 0
    if issubclass(cls, QuantisingPass):
        options |= {"block": config.quantise.block, "buckets": config.quantise.buckets}
    if cls is QuantiseGathers:
        options["format"] = _format(zero.zero_quantized_weights, config.quantise.weights, "int8")
        options["max_relative_error"] = config.quantise.max_relative_error
    if cls is QuantiseReductions:
        options["format"] = _format(zero.zero_quantized_gradients, config.quantise.gradients, "int4")
        if config.feeds_errors_back:
            options |= {"error_beta": config.loco_err_beta or 0.0, "error_reset": config.loco_reset_steps}
    if cls is QuantiseExchanges:
        options["format"] = config.quantise.exchanges
    if cls is GlobalAuxLoss:
        options["enabled"] = config.experts.global_aux_loss
    if cls is QuantisedProducts:
        options["dynamic"] = config.layers.activations is not None
    if cls is QuantiseSaved:
        options |= {"format": config.quantise.activations, "block": config.quantise.block}
    if cls is OffloadSaved:
        options["enabled"] = config.offload_activation
    if cls in (BucketGathers, BucketReductions) and config.dspass.bucket_bytes is not None:
        options["bucket_bytes"] = config.dspass.bucket_bytes
    return options


def _format(switch: bool | None, written: str | None, usual: str) -> str | None:
    """DeepSpeed's key switches on and off, ours says how, and switches on where the other is absent."""
    if switch is None:
        return written
    return written or usual if switch else None


def _find(entry: PassEntry, known: dict[str, type[Pass]]) -> type[Pass]:
    if entry.name in known:
        return known[entry.name]
    if ":" in entry.name:
        module, _, attribute = entry.name.partition(":")
        try:
            cls = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                "dspass.passes",
                f"{entry.name!r} cannot be imported: {error}",
                "write it as package.module:Class, importable on every rank",
            ) from error
        if not (isinstance(cls, type) and issubclass(cls, Pass)):
            raise ConfigError(
                "dspass.passes", f"{entry.name!r} is not a pass", "derive it from dspass.passes.base.Pass"
            )
        return cls
    near = difflib.get_close_matches(entry.name, known, n=1)
    raise ConfigError(
        "dspass.passes",
        f"there is no pass {entry.name!r}",
        f"did you mean {near[0]!r}?" if near else f"there are {sorted(known)}",
    )
