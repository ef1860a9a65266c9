"""The whole configuration: its sections together, what holds between them, what depends on the ranks, and its form as JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dspass.config.entries import Ignored
from dspass.config.errors import ConfigError
from dspass.config.keys import ACTIVATIONS, BY_PATH, KEYS, NESTED, WEIGHTS, Key, stages_text
from dspass.config.reading import read_file, walk
from dspass.config.sections import (
    DspassConfig,
    ExpertParallelConfig,
    ExpertsConfig,
    LayersConfig,
    PipelineConfig,
    QuantiseConfig,
    QuantizedInitialization,
    RoundedActivations,
    RoundedWeights,
    ZeroConfig,
)
from dspass.config.values import check_fields, described

ENVIRONMENT = "DSPASS_CONFIG"


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole configuration. Two are equal when they have the same effect; ``ignored`` does not count.

    Raises:
        ConfigError: a field has a wrong type or is out of its range.
    """

    zero: ZeroConfig = field(default_factory=ZeroConfig)
    """``zero_optimization``."""
    bf16: bool = False
    """Gather and compute in bf16; parameters and reductions in fp32."""
    fp16: bool = False
    """Gather and compute in fp16; parameters and reductions in fp32. Never with ``bf16``."""
    gradient_accumulation_steps: int = 1
    """Calls of forward and backward in one optimiser step."""
    gradient_clipping: float = 0.0
    """Largest 2-norm of all gradients together; 0 does not clip."""
    offload_activation: bool | None = None
    """Whether saved activations may wait on the host; None: where the device has memory of its own."""
    offload_optimizer: str | None = None
    """``"cpu"``: optimiser states may wait on the host; ``"none"``: never; None: where the device has memory of its own."""
    offload_optimizer_ratio: float = 1.0
    """Most of the parameters, by bytes, whose states may wait on the host."""
    offload_param: str | None = None
    """``"cpu"``: shards wait on the host, with their gradients and states."""
    loco_err_beta: float | None = None
    """Share of a gradient's error that stays when a new one comes; None is 0."""
    loco_reset_steps: int | None = None
    """Steps after which errors of gradients begin at zero again; None: never."""
    train_micro_batch_size_per_gpu: int | None = None
    """Samples of one rank in one call."""
    train_batch_size: int | None = None
    """Samples of all ranks in one optimiser step."""
    dspass: DspassConfig = field(default_factory=DspassConfig)
    """The keys that are ours."""
    quantise: QuantiseConfig = field(default_factory=QuantiseConfig)
    """``dspass.quantise``."""
    expert_parallel: ExpertParallelConfig = field(default_factory=ExpertParallelConfig)
    """``expert_parallel``."""
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    """``pipeline``."""
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    """``dspass.experts``."""
    own_layers: LayersConfig = field(default_factory=LayersConfig)
    """``dspass.quantise.layers``; see :attr:`layers`."""
    quantized_initialization: QuantizedInitialization = field(default_factory=QuantizedInitialization)
    """``weight_quantization.quantized_initialization``; see :attr:`layers`."""
    rounded_weights: RoundedWeights = field(default_factory=RoundedWeights)
    """``compression_training.weight_quantization``."""
    rounded_activations: RoundedActivations = field(default_factory=RoundedActivations)
    """``compression_training.activation_quantization``."""
    accumulation_open: bool = False
    """True while ``resolve_batch`` has still to derive the accumulation steps from both batch sizes."""
    ignored: tuple[Ignored, ...] = field(default=(), compare=False)
    """Keys that were written and do nothing, in the order of writing, with the reason."""

    def __post_init__(self) -> None:
        check_fields(self, "")
        if self.offload_param == "cpu" and self.zero.stage not in (None, 3):
            raise ConfigError(
                "zero_optimization.offload_param.device",
                f'"cpu" needs stage 3, where a parameter is gathered for each use, and the stage is {self.zero.stage}.',
                "Set zero_optimization.stage to 3, or offload the optimiser's states only.",
            )
        if self.zero.zero_hpz_partition_size > 1 and self.zero.mics_shard_size is not None:
            raise ConfigError(
                "zero_optimization.zero_hpz_partition_size",
                "a second shard in the node has no use where mics_shard_size already shards inside of a group.",
                "Remove one of the two.",
            )
        if self.zero.zero_hpz_partition_size > 1 and self.offload_param == "cpu":
            raise ConfigError(
                "zero_optimization.zero_hpz_partition_size",
                "a second shard on the device has no use where parameters wait on the host.",
                "Set it to 1, or do not offload parameters.",
            )
        if self.expert_parallel.enabled:
            for key, asked in {
                "zero_optimization.mics_shard_size": self.zero.mics_shard_size is not None,
                "zero_optimization.offload_param.device": self.offload_param == "cpu",
            }.items():
                if asked:
                    raise ConfigError(
                        key, "it does not go together with expert_parallel yet.", "Remove one of the two."
                    )
        if self.bf16 and self.fp16:
            raise ConfigError("fp16.enabled", "fp16 and bf16 are both enabled.", "Set one of them to false.")
        if self.trains_rounded and self.layers.format is not None:
            raise ConfigError(
                "dspass.quantise.layers.format",
                "weights that are stored in few bits do not train, and compression_training is enabled.",
                "Remove one of the two: first train, then call dspass.quantise(model).",
            )

    @property
    def trains_rounded(self) -> bool:
        """Whether some layers train with what they read rounded to few bits."""
        return self.rounded_weights.enabled or self.rounded_activations.enabled

    @property
    def engine_stage(self) -> int:
        """The stage whose lifetimes hold. Experts that are divided over ranks are never plain tensors, nor is what pipeline
        stages hold, so no parameter is: at stage 0 the others are whole on every rank, and everything is reduced as at stage
        1."""
        assert self.zero.stage is not None, "the stage is not resolved"
        return max(self.zero.stage, int(self.expert_parallel.enabled or self.pipeline.enabled))

    @property
    def layers(self) -> LayersConfig:
        """Which weights are stored in few bits, by our section or, where that says nothing, by DeepSpeed's."""
        asked = self.quantized_initialization
        if self.own_layers.format is not None or asked.num_bits is None:
            return self.own_layers
        return replace(self.own_layers, format=f"int{asked.num_bits}", group_size=asked.group_size)

    @classmethod
    def load(cls, source: Config | str | os.PathLike[str] | Mapping[str, Any] | None = None) -> Config:
        """Read a configuration.

        Args:
            source: the options themselves; or the path of a JSON file; or None for the file that
                ``$DSPASS_CONFIG`` names or, where that is unset or empty, the defaults, whose stage is still
                open (None). Options without ``zero_optimization.stage``, ``{}`` too, mean stage 0, as in
                DeepSpeed.

        Raises:
            ConfigError: a missing or malformed file; an unknown, mistyped or refused key; ``"auto"``.
        """
        if isinstance(source, Config):
            return source
        if source is None:
            source = os.environ.get(ENVIRONMENT) or None
            if source is None:
                return cls()
            return cls._parse(read_file(source, f"${ENVIRONMENT} names it. "))
        if isinstance(source, Mapping):
            return cls._parse(source)
        if isinstance(source, (str, os.PathLike)):
            return cls._parse(read_file(source, ""))
        raise ConfigError("", f"The options are {described(source)}.", "Give a mapping or the path of a JSON file.")

    @classmethod
    def _parse(cls, options: Mapping[Any, Any]) -> Config:
        taken: dict[str, Any] = {"zero_optimization.stage": 0}
        ignored: list[Ignored] = []
        walk(options, None, taken, ignored)
        held = {section: {key.field: taken[key.path] for key in KEYS if key.field and key.path in taken
                          and (key.section if key.section in NESTED else "") == section}
                for section in ("", *NESTED)}  # fmt: skip
        top = held[""]
        if top.get("gradient_accumulation_steps", 0) is None:  # null is for us what absent is
            del top["gradient_accumulation_steps"]
        top["accumulation_open"] = (
            "gradient_accumulation_steps" not in top
            and top.get("train_batch_size") is not None
            and top.get("train_micro_batch_size_per_gpu") is not None
        )
        config = cls(zero=ZeroConfig(**held["zero_optimization"]), dspass=DspassConfig(**held["dspass"]),
                     quantise=QuantiseConfig(**held["dspass.quantise"]),
                     experts=ExpertsConfig(**held["dspass.experts"]),
                     pipeline=PipelineConfig(**held["pipeline"]),
                     expert_parallel=ExpertParallelConfig(**held["expert_parallel"]),
                     own_layers=LayersConfig(**held["dspass.quantise.layers"]),
                     quantized_initialization=QuantizedInitialization(
                         **held["weight_quantization.quantized_initialization"]),
                     rounded_weights=RoundedWeights(**held[WEIGHTS], **held[f"{WEIGHTS}.shared_parameters"]),
                     rounded_activations=RoundedActivations(
                         **held[ACTIVATIONS], **held[f"{ACTIVATIONS}.shared_parameters"]),
                     ignored=tuple(ignored), **top)  # fmt: skip
        return config._note_stage()

    def resolve_stage(self, process_group: bool) -> Config:
        """The same with ``zero.stage`` decided: as written, else 3 in a process group and 0 without one."""
        if self.zero.stage is not None:
            return self
        return replace(self, zero=replace(self.zero, stage=3 if process_group else 0))._note_stage()

    def _note_stage(self) -> Config:
        """Note the keys that were set and do nothing at this stage."""
        stage = self.zero.stage
        if stage is None:
            return self
        notes = tuple(
            Ignored(key=key.path, value=self._value(key),
            reason=f"{stages_text(key)}, and the stage is {stage}")
            for key in KEYS
            if key.field and stage not in key.stages and (value := self._value(key)) not in (None, key.default)
            and value is not False
        )  # fmt: skip
        return replace(self, ignored=self.ignored + notes + self._notes_of_feedback() + self._notes_of_travel())

    def _notes_of_travel(self) -> tuple[Ignored, ...]:
        """Note what asks for rows of experts or messages of stages to travel in another way, where none travel."""
        own = self.quantise
        found = []
        if own.exchanges is not None and not self.expert_parallel.enabled:
            reason = "no rows travel; it acts with expert_parallel"
            found.append(Ignored(key="dspass.quantise.exchanges", value=own.exchanges, reason=reason))
        if own.sends is not None and (self.pipeline.stages or 1) == 1:
            reason = "no stages send each other anything; it acts with pipeline.stages of 2 or more"
            found.append(Ignored(key="dspass.quantise.sends", value=own.sends, reason=reason))
        for name in ("chunks", "batch_parts"):
            value = getattr(self.experts, name)
            if value is not None and not self.expert_parallel.enabled:
                reason = "no rows travel; it acts with expert_parallel"
                found.append(Ignored(key=f"dspass.experts.{name}", value=value, reason=reason))
            elif name == "batch_parts" and value is not None and self.pipeline.enabled:
                reason = "a pipeline's micro-batches are parts of the batch already; see pipeline.micro_batches"
                found.append(Ignored(key=f"dspass.experts.{name}", value=value, reason=reason))
        return tuple(found)

    def _notes_of_feedback(self) -> tuple[Ignored, ...]:
        """Note what asks for error feedback where it has no use, or is switched off."""
        if self.zero.stage != 3:
            return ()
        keys = [BY_PATH[f"zero_optimization.zeropp_loco_param.{name}"] for name in ("err_beta", "reset_T")]
        if self.quantise.error_feedback is not False:
            reason = "gradients are reduced whole; it acts with zero_optimization.zero_quantized_gradients"
            keys.append(BY_PATH["dspass.quantise.error_feedback"])
            if self.zero.zero_quantized_gradients or (
                self.zero.zero_quantized_gradients is None and self.quantise.gradients is not None
            ):
                return ()
        else:
            reason = "dspass.quantise.error_feedback is false"
        values = {key.path: self._value(key) for key in keys}
        return tuple(Ignored(key=path, value=v, reason=reason) for path, v in values.items() if v is not None)

    @property
    def feeds_errors_back(self) -> bool:
        """Whether what rounding a gradient loses is added to the next one."""
        asked = self.loco_err_beta is not None or self.loco_reset_steps is not None
        return asked if self.quantise.error_feedback is None else self.quantise.error_feedback

    def resolve_batch(self, world_size: int) -> Config:
        """The same with the batch sizes checked and the absent one derived, by DeepSpeed's rule.

        Args:
            world_size: ranks that see different data.

        Raises:
            ConfigError: ``train_batch_size`` is not micro-batch times accumulation steps times ranks.
        """
        if world_size < 1:
            raise ConfigError("", f"There are {world_size} ranks.", "A job has at least one.")
        total, micro, steps = (
            self.train_batch_size,
            self.train_micro_batch_size_per_gpu,
            self.gradient_accumulation_steps,
        )
        if total is None and micro is None:
            return self
        if total is None:
            assert micro is not None
            total = micro * steps * world_size
        elif micro is None:
            micro = total // (steps * world_size)
        elif self.accumulation_open:
            steps = total // (micro * world_size)
        if micro * steps * world_size != total or micro == 0:
            known = [f"{steps} gradient_accumulation_steps"] if not self.accumulation_open else []
            if self.train_micro_batch_size_per_gpu is not None:
                known.insert(0, f"{micro} train_micro_batch_size_per_gpu")
            known.append(f"{world_size} ranks")
            product = math.prod(int(part.split()[0]) for part in known)
            whole = len(known) == 3
            raise ConfigError(
                "train_batch_size",
                f"{total} is not {'' if whole else 'a multiple of '}{' x '.join(known)} = {product}.",
                f"Write {'' if whole else 'a multiple of '}{product}, or remove one of the three keys.",
            )
        return replace(self, train_batch_size=total, train_micro_batch_size_per_gpu=micro,
                       gradient_accumulation_steps=steps, accumulation_open=False)  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Every key that acts with its value, in DeepSpeed's form; JSON holds it, ``load`` reads it back."""
        tree: dict[str, Any] = {}
        for key in KEYS:
            if key.field:
                inside = tree.setdefault(key.section, {}) if key.section else tree
                inside[key.name] = self._value(key)
        return tree

    def _value(self, key: Key) -> Any:
        if key.field == "gradient_accumulation_steps" and self.accumulation_open:
            return None
        holder = getattr(self, NESTED[key.section]) if key.section in NESTED else self
        value = getattr(holder, key.field)
        if key.kind == "groups" and value is not None:
            return {group.name: group.to_json(key.section == WEIGHTS) for group in value}
        return [entry.to_json() for entry in value] if key.kind == "passes" and value is not None else value

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """What differs from another rank's ``to_dict()``, one line a key.

        Such as ``zero_optimization.stage: 3 here, 2 there``. Keys that may differ from rank to rank are left out.
        """
        here, there = dict(_flat(self.to_dict())), dict(_flat(other))
        return [
            f"{path}: {_said(here, path)} here, {_said(there, path)} there"
            for path in sorted(here.keys() | there.keys())
            if _said(here, path) != _said(there, path)
        ]


def _flat(tree: Mapping[str, Any], section: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        path = f"{section}.{name}" if section else name
        if isinstance(value, Mapping):
            yield from _flat(value, path)
        elif path not in BY_PATH or not BY_PATH[path].local:
            yield path, value


def _said(flat: Mapping[str, Any], path: str) -> str:
    return "unset" if flat.get(path) is None else json.dumps(flat[path], sort_keys=True)
