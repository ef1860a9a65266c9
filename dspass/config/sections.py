"""The sections of a configuration: a frozen dataclass each, whose fields the rows of :data:`dspass.config.keys.KEYS` name.

A section made by hand is checked as one that is read. Checks of several sections together are in
:class:`dspass.config.config.Config`.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import ClassVar, Literal

from dspass.config.entries import PassEntry, RoundedGroup
from dspass.config.errors import ConfigError
from dspass.config.keys import ACTIVATIONS, WEIGHTS
from dspass.config.values import check_fields, checked_names


@dataclass(frozen=True, kw_only=True)
class ZeroConfig:
    """``zero_optimization``. Sizes are in elements; a written one is an upper limit, None our own choice."""

    stage: int | None = None
    """0 to 3; None is 3 in a process group and 0 without one, see ``Config.resolve_stage``."""
    reduce_bucket_size: int | None = None
    """Most elements in one reduction of gradients."""
    allgather_bucket_size: int | None = None
    """Most elements in one all-gather of parameters."""
    overlap_comm: bool | None = None
    """False waits for every collective where it starts; None and True overlap it with compute."""
    stage3_prefetch_bucket_size: int | None = None
    """Most elements being gathered ahead of their use."""
    stage3_param_persistence_threshold: int | None = None
    """Parameters with fewer elements stay whole on every rank."""
    stage3_max_live_parameters: int | None = None
    """Most gathered elements held at one time."""
    mics_shard_size: int | None = None
    """Shard inside groups of this many ranks, replicate across them; None shards over all ranks."""
    sub_group_size: int | None = None
    """Most elements that the optimiser steps at a time where its states wait on the host."""
    zero_hpz_partition_size: int = 1
    """Ranks of a node that hold a second shard for the backward's gathers; 1 makes none."""
    zero_quantized_weights: bool | None = None
    """Gather parameters in few bits, see :class:`QuantiseConfig`; None is as that says."""
    zero_quantized_gradients: bool | None = None
    """Reduce gradients in few bits, see :class:`QuantiseConfig`; None is as that says."""

    def __post_init__(self) -> None:
        check_fields(self, "zero_optimization")


@dataclass(frozen=True, kw_only=True)
class DspassConfig:
    """``dspass``: the keys that are ours."""

    passes: tuple[PassEntry, ...] | None = None
    """The passes in order; None is the default list."""
    bucket_bytes: int | None = None
    """Bytes that one bucket of a collective aims at; None is the planner's choice."""
    memory_budget: int | str | None = None
    """Most bytes of tensors on one rank, a share of the device such as ``"75%"``, or ``"auto"``; None plans nothing."""
    plan: str | None = None
    """Where plans are read from and written to; None keeps none."""
    fallback_random: bool = False
    """Draw random numbers as eager torch does."""
    segment_cache: bool = True
    """Compile segments of the graph that are equal once."""
    report: str | None = None
    """Where rank 0 writes the report at exit, an ``.html`` or ``.json`` file; None writes none."""

    def __post_init__(self) -> None:
        check_fields(self, "dspass")


@dataclass(frozen=True, kw_only=True)
class QuantiseConfig:
    """``dspass.quantise``: what travels, or is saved, in few bits."""

    weights: str | None = None
    """Format of gathers; None leaves it to ``zero_quantized_weights``."""
    gradients: str | None = None
    """Format of reductions; None leaves it to ``zero_quantized_gradients``."""
    exchanges: str | None = None
    """Format of rows that go to experts and back; None sends them whole."""
    sends: str | None = None
    """Format of messages between pipeline stages; None sends them whole."""
    activations: str | None = None
    """Format of saved activations; None saves them whole."""
    block: int = 256
    """Values that share a scale."""
    buckets: str = "exposed"
    """``"exposed"`` or ``"all"``."""
    error_feedback: bool | None = None
    """Add what rounding a gradient lost to the next one; None: where ``zeropp_loco_param`` holds something."""
    max_relative_error: float | None = None
    """A bucket with a parameter that is rounded by more is gathered whole; None takes all."""

    def __post_init__(self) -> None:
        check_fields(self, "dspass.quantise")
        if self.block % 16:
            raise ConfigError(
                "dspass.quantise.block",
                f"{self.block} is no multiple of 16.",
                f"Write {max(round(self.block / 16), 1) * 16}.",
            )


@dataclass(frozen=True, kw_only=True)
class LayersConfig:
    """``dspass.quantise.layers``: weights that are stored in few bits."""

    format: str | None = None
    """Format; None stores none."""
    group_size: int | None = None
    """Columns that share a scale; None: all of a row."""
    activations: str | None = None
    """``"int8"`` rounds what is multiplied with them too; None does not."""
    modules: tuple[str, ...] | None = None
    """Names or patterns of the layers; None takes all."""
    exclude: tuple[str, ...] | None = None
    """Names or patterns of layers that stay whole."""
    max_relative_error: float | None = None
    """A weight that would be off by more stays whole; None takes all."""

    def __post_init__(self) -> None:
        section = "dspass.quantise.layers"
        check_fields(self, section)
        for name in ("modules", "exclude"):
            names = getattr(self, name)
            if names is not None:
                object.__setattr__(self, name, checked_names(f"{section}.{name}", names))
        if self.group_size is not None and self.group_size % 16:
            raise ConfigError(
                f"{section}.group_size",
                f"{self.group_size} is no multiple of 16.",
                f"Write {max(round(self.group_size / 16), 1) * 16}.",
            )
        if self.activations is not None and (self.format not in (None, "int8") or self.group_size is not None):
            raise ConfigError(
                f"{section}.activations",
                "activations are rounded for int8 weights with one scale an output channel alone.",
                'Set format to "int8" and remove group_size, or remove it.',
            )

    def takes(self, name: str) -> bool:
        """Whether the layer called ``name`` is among them."""

        def among(patterns: tuple[str, ...]) -> bool:
            return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

        return (self.modules is None or among(self.modules)) and not among(self.exclude or ())


@dataclass(frozen=True, kw_only=True)
class ExpertParallelConfig:
    """``expert_parallel``: experts divided over ranks."""

    enabled: bool = False
    """Whether they are."""
    autoep_size: int | None = None
    """Ranks that a layer's experts are divided over; None: the most that divide them."""

    def __post_init__(self) -> None:
        check_fields(self, "expert_parallel")


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """``pipeline``: layers divided over ranks, and the batch over time."""

    stages: int | None = None
    """Ranks of one pipeline; None: there is none."""
    micro_batches: int | None = None
    """Parts of a call's batch; None: as many as are fastest."""
    schedule: str = "auto"
    """Order of forwards and backwards, in lower case."""
    virtual_stages: int | None = None
    """Stages of one rank; None: the schedule's usual number."""
    boundaries: tuple[str, ...] | None = None
    """Names of modules that each begin a stage."""
    loss_reduction: str | None = None
    """``"mean"``: the loss is the micro-batches' mean."""
    outputs: str = "all"
    """Who gets outputs without gradients: ``"all"`` or ``"last"``."""
    gather: Literal["call", "micro_batch"] | None = None
    """How often stage 3 gathers a parameter; None: once a call, where that fits a budget."""

    @property
    def enabled(self) -> bool:
        """Whether a call's batch is split, over ranks or on one."""
        return self.stages is not None and (self.stages > 1 or (self.micro_batches or 1) > 1)

    def __post_init__(self) -> None:
        if self.stages == "auto":
            object.__setattr__(self, "stages", None)
        if self.micro_batches == "auto":
            object.__setattr__(self, "micro_batches", None)
        check_fields(self, "pipeline")
        if self.boundaries is not None:
            object.__setattr__(self, "boundaries", checked_names("pipeline.boundaries", self.boundaries))
        if self.stages is None:
            for name in ("micro_batches", "virtual_stages", "boundaries", "loss_reduction"):
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"pipeline.{name}", "there are no stages.", "Write pipeline.stages too, or remove it."
                    )


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """``dspass.experts``: how mixtures of experts run, and what is supposed of them."""

    global_aux_loss: bool = False
    """Whether an auxiliary loss is of all ranks' tokens."""
    expected_imbalance: float = 1.0
    """Tokens at the busiest rank over the mean."""
    capacity_factor: float | None = None
    """Most rows of an expert, in even shares; None: all."""
    drop_tokens: bool | None = None
    """False drops none in spite of a factor."""
    min_capacity: int | None = None
    """Least capacity; None is 4."""
    chunks: int | None = None
    """Parts of a layer whose rows travel one by one; None: as many as pay."""
    batch_parts: int | Literal["auto"] | None = None
    """Parts of the batch that take turns; "auto": as many as pay, None: 1."""
    hierarchical: bool | None = None
    """Whether rows go inside of the node first; None: where it pays."""

    @property
    def limits(self) -> bool:
        """Whether rows may be dropped."""
        return self.capacity_factor is not None and self.drop_tokens is not False

    def __post_init__(self) -> None:
        section = "dspass.experts"
        check_fields(self, section)
        if self.capacity_factor is None:
            for name, asked in {"drop_tokens": self.drop_tokens, "min_capacity": self.min_capacity is not None}.items():
                if asked:
                    raise ConfigError(
                        f"{section}.{name}",
                        "without a capacity no row is dropped.",
                        f"Write {section}.capacity_factor too, 1.25 for one, or remove it.",
                    )
        if self.limits and self.capacity_factor == 0 and self.min_capacity == 0:
            raise ConfigError(
                f"{section}.capacity_factor",
                "0 with a min_capacity of 0 drops every row.",
                "Write a factor above 0, 1.25 for one, or drop_tokens: false.",
            )


@dataclass(frozen=True, kw_only=True)
class QuantizedInitialization:
    """``weight_quantization.quantized_initialization``: the same as DeepSpeed says it."""

    num_bits: int | None = None
    """8 or 4; None asks for nothing."""
    group_size: int | None = None
    """Columns that share a scale; None: all of a row."""
    group_dim: int = 1
    """Always 1."""
    symmetric: bool = True
    """Always true."""

    def __post_init__(self) -> None:
        section = "weight_quantization.quantized_initialization"
        check_fields(self, section)
        if self.num_bits not in (None, 4, 8):
            raise ConfigError(
                f"{section}.num_bits", f"there is no integer format of {self.num_bits} bits.", "Write 8 or 4."
            )
        if self.group_dim != 1:
            raise ConfigError(f"{section}.group_dim", "groups of rows cannot be.", "Write 1, groups of columns.")
        if not self.symmetric:
            raise ConfigError(f"{section}.symmetric", "values are rounded around zero only.", "Write true.")


@dataclass(frozen=True, kw_only=True)
class RoundedActivations:
    """``compression_training.activation_quantization``: inputs of layers that are rounded while these train."""

    enabled: bool = False
    """Whether any is."""
    schedule_offset: int = 1000
    """Optimiser steps before the first rounding."""
    quantization_type: str = "symmetric"
    """``"symmetric"`` or ``"asymmetric"``."""
    groups: tuple[RoundedGroup, ...] | None = None
    """``different_groups``."""

    section: ClassVar[str] = ACTIVATIONS
    """Where it stands."""

    def __post_init__(self) -> None:
        check_fields(self, self.section)
        check_fields(self, f"{self.section}.shared_parameters")
        if self.enabled and not self.groups:
            raise ConfigError(
                f"{self.section}.different_groups",
                "it is enabled, and no group of layers is there.",
                "Write one, or set shared_parameters.enabled to false.",
            )


@dataclass(frozen=True, kw_only=True)
class RoundedWeights(RoundedActivations):
    """``compression_training.weight_quantization``: weights that are rounded while they train."""

    schedule_offset: int = 0
    """Optimiser steps before the first rounding."""
    quantize_groups: int | None = None
    """Scales of a weight; None: one an output channel."""

    section: ClassVar[str] = WEIGHTS
    """Where it stands."""
