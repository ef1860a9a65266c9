"""The configuration: DeepSpeed's JSON keys, read strictly, into frozen dataclasses.

One table, ``KEYS``, drives everything: which names are known, which types and ranges they take, what each
does, why one is ignored, when one is refused, and the page ``docs/config.md``, which this refreshes::

    python -P dspass/config.py > docs/config.md

A key either *acts* (it fills a field of ``Config``), is *ignored* (it has no meaning in a graph; the reason
goes to ``Config.ignored`` and from there to the report), or is *refused* as soon as its value asks for
something this version does not do. Nothing is dropped in silence, and an unknown name is an error.
"""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal

PAGE = "docs/config.md"
ENVIRONMENT = "DSPASS_CONFIG"

#: As in :mod:`dspass.runtime.formats`, which this file, that makes its page by itself, does not import.
FORMATS = ("int8", "int4", "fp8_e4m3", "fp8_e5m2", "fp6_e3m2")

Kind = Literal[
    "section",
    "flag",
    "integer",
    "count",
    "number",
    "text",
    "list",
    "object",
    "any",
    "bytes",
    "budget",
    "passes",
    "groups",
]

_KIND_TEXT: dict[Kind, str] = {
    "section": "a section in braces",
    "flag": "true or false",
    "integer": "a whole number",
    "count": "a whole number (5e8 is one)",
    "number": "a number",
    "text": "text in quotes",
    "list": "a list",
    "object": "a section in braces",
    "any": "a value",
    "bytes": 'a whole number of bytes or text such as "25MB" or "24MiB"',
    "budget": 'a whole number of bytes, text such as "60GB" or "75%", or "auto"',
    "passes": "a list of passes",
    "groups": 'a section of groups by name, each as {"params": {...}, "modules": [...]}',
}

_UNITS = {f"{letter}{suffix}": base**power
          for suffix, base in (("B", 1000), ("iB", 1024))
          for power, letter in enumerate(("K", "M", "G", "T"), start=1)} | {"B": 1}  # fmt: skip


class ConfigError(ValueError):
    """A configuration that cannot be used: the key, the cause, the way out, the nearest name, the page."""

    def __init__(self, key: str, cause: str, way_out: str = "") -> None:
        self.key = key
        """Dotted path of the key, the file's name when the file itself is at fault, or ''."""
        parts = [f"{key}: {cause}" if key else cause, way_out, f"See {PAGE}."]
        super().__init__(" ".join(part for part in parts if part))


@dataclass(frozen=True, kw_only=True)
class Key:
    """One row of the table."""

    path: str
    """Dotted name, as in the JSON file."""
    kind: Kind
    """What its value must be."""
    default: object = None
    """What holds when it is absent; None also lets ``null`` be written."""
    field: str = ""
    """Name of the field it fills, if it acts."""
    unit: str = ""
    """Unit of its value."""
    meaning: str = ""
    """What it does, if it acts."""
    ignored: str = ""
    """Why it does nothing here."""
    refused: str = ""
    """What it asks for that this version does not do."""
    instead: str = ""
    """The way out, if it is refused."""
    off: tuple[object, ...] = ()
    """The values of a refused key that ask for nothing."""
    asks: Literal["value", "present", "enabled"] = "value"
    """When it is refused: by a value outside ``off``, by being there, or by any ``enabled: true`` inside."""
    low: float | None = None
    """Smallest value."""
    high: float | None = None
    """Largest value."""
    also: str = ""
    """Another spelling that DeepSpeed takes for the last part of the name."""
    stages: tuple[int, ...] = (0, 1, 2, 3)
    """The ZeRO stages at which it acts; at others it is noted as ignored."""
    open: bool = False
    """A section that takes any names beside those known."""
    local: bool = False
    """May differ from rank to rank."""
    choices: tuple[str, ...] = ()
    """The texts that it may be."""
    any_case: bool = False
    """Whether they may be written in any case."""

    @property
    def section(self) -> str:
        """Dotted path of the section it stands in, '' at the top."""
        return self.path.rpartition(".")[0]

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.path.rpartition(".")[2]


def _section(path: str, **more: Any) -> Key:
    return Key(path=path, kind="section", **more)


def _act(path: str, into: str, kind: Kind, default: object, unit: str, meaning: str, **more: Any) -> Key:
    return Key(path=path, field=into, kind=kind, default=default, unit=unit, meaning=meaning, **more)


def _skip(path: str, kind: Kind, default: object, ignored: str, **more: Any) -> Key:
    return Key(path=path, kind=kind, default=default, ignored=ignored, **more)


def _deny(path: str, kind: Kind, default: object, refused: str, instead: str, **more: Any) -> Key:
    more.setdefault("off", (default,))
    return Key(path=path, kind=kind, default=default, refused=refused, instead=instead, **more)


def _inner(section: str, kind: Kind, **defaults: object) -> tuple[Key, ...]:
    """Keys that share the fate of the section they stand in."""
    return tuple(Key(path=f"{section}.{name}", kind=kind, default=default) for name, default in defaults.items())


_OWN_OPTIMIZER = "the optimiser is built by the training script"
_OWN_SCALER = "scaling the loss is left to the training script's GradScaler"
_OWN_LOOP = "the training loop belongs to the script; what it prints or logs is decided there"
_REPORT = "the report of dspass.explain(model) shows it"
_OWN_BUFFERS = "buffers of offloaded tensors are the runtime's own, pinned beside a GPU"
_NO_DISK = "only concerns offloading to a disk, which this version does not do"
_OWN_CUTS = "stages are cut from the graph by their time, and checkpointing inside of them is planned"
_NO_TENSOR = "only concerns tensor parallelism, which this version does not do"
_NO_CHECKPOINTING = "tunes deepspeed.checkpointing; torch.utils.checkpoint in the model is honoured"
_NO_DEEPCOMPILE = "is a choice inside DeepCompile's own executor, which is not used"
_NO_ENGINE_SAVE = "there is no engine that saves; torch.distributed.checkpoint saves shards and reshards on load"
_NO_HOOKS = "gathers are nodes of the graph, not hooks on modules"
_NO_PRUNING = "Set every enabled in it to false, and prune the model before it is compiled."
_IN_GRAPH = "weights are rounded in the graph, at each forward and whatever the precision, as if it were true"
_PLAIN_GATHER = "the pass that packs gathers decides this for each bucket"
_OWN_ROUTING = "experts, their router and its scores stay as the model has them, recognised in its graph"
_FIT = "Remove it, or set it to {off}."

# Name, kind and default of keys that share one reason with their neighbours.
_OFFLOAD_PARAM: tuple[tuple[str, Kind, object], ...] = (
    ("nvme_path", "text", None), ("pin_memory", "flag", True), ("buffer_count", "count", 5),
    ("buffer_size", "count", 100_000_000), ("max_in_cpu", "count", 1_000_000_000),
)  # fmt: skip
_OFFLOAD_OPTIMIZER: tuple[tuple[str, Kind, object], ...] = (
    ("nvme_path", "text", None), ("pin_memory", "flag", True), ("buffer_count", "count", 4),
    ("pipeline_read", "flag", False), ("pipeline_write", "flag", False), ("fast_init", "flag", False),
    ("super_offload", "flag", False), ("convert_grad_on_cpu", "flag", True),
    ("cpuadam_cores_perc", "number", 0.8),
)  # fmt: skip
_PIPELINE: tuple[tuple[str, Kind, object], ...] = (
    ("partition", "text", "best"), ("seed_layers", "flag", False), ("activation_checkpoint_interval",
    "count", 0),
    ("pipe_partitioned", "flag", True), ("grad_partitioned", "flag", True), ("use_reentrant", "flag", True),
)  # fmt: skip
_TENSOR: tuple[tuple[str, Kind, object], ...] = (
    ("dtype", "text", None), ("tp_overlap_comm", "flag", False), ("tp", "object", None),
    ("tensor_parallel", "object", None), ("injection_policy_tuple", "list", None), ("preset_model", "text",
    None),
    ("partition_config", "object", None), ("vocab_parallel_lm_head", "flag", False),
    ("keep_module_on_host", "flag", False), ("kernel_inject", "flag", False),
    ("replace_with_kernel_inject", "flag", False),
)  # fmt: skip
_CHECKPOINTING: tuple[tuple[str, Kind, object], ...] = (
    ("contiguous_memory_optimization", "flag", False), ("number_checkpoints", "count", None),
    ("synchronize_checkpoint_boundary", "flag", False), ("profile", "flag", False),
)  # fmt: skip
_DEEPCOMPILE: tuple[tuple[str, bool], ...] = (
    ("double_buffer", True), ("symmetric_memory", False), ("sync_before_reduce", False),
    ("sync_after_reduce", False), ("sync_before_allgather", False), ("sync_after_allgather", False),
    ("keep_int_input_tensors", True), ("keep_all_input_tensors", False),
)  # fmt: skip

_EXPERT_PARALLEL: tuple[tuple[str, Kind, object], ...] = (
    ("async_split_plan", "flag", False), ("use_grouped_mm", "flag", True), ("disable_triton_grouped_mm", "flag", False),
    ("route_norm", "flag", None), ("has_shared_experts", "flag", None), ("num_expert_groups", "integer", None),
    ("num_limited_groups", "integer", None), ("preset_model", "text", None), ("moe_layer_pattern", "text", None),
    ("router_pattern", "text", None), ("expert_pattern", "text", None), ("expert_w1", "text", None),
    ("expert_w2", "text", None), ("expert_w3", "text", None), ("num_experts_attr", "text", None),
    ("top_k_attr", "text", None), ("shared_experts_pattern", "text", None), ("comm_backend", "text", None),
    ("route_scale", "number", 1.0), ("score_func", "any", "auto"), ("score_apply", "any", "auto"),
    ("combine_impl", "any", "auto"), ("top_k", "any", "auto"), ("routed_scaling_factor", "any", "auto"),
)  # fmt: skip
_SCHEDULES = (
    "auto", "gpipe", "1f1b", "interleaved1f1b", "loopedbfs", "interleavedzerobubble", "zbh1", "zbvzerobubble", "zbv",
    "dualpipev",
)  # fmt: skip
_WEIGHTS = "compression_training.weight_quantization"
_ACTIVATIONS = "compression_training.activation_quantization"

# Read from top to bottom: what acts, then DeepSpeed's other keys in the order of its documentation.
KEYS: tuple[Key, ...] = (
    # --- batch
    _act("train_batch_size", "train_batch_size", "integer", None, "samples",
         "Samples in one optimiser step over all ranks. Only checked: it must equal the micro-batch times "
         "the accumulation steps times the ranks; the one of the three that is absent is derived.", low=1),
    _act("train_micro_batch_size_per_gpu", "train_micro_batch_size_per_gpu", "integer", None, "samples",
         "Samples that one rank puts into one call. Only checked, as above; only `pipeline` splits a batch.", low=1),
    _act("gradient_accumulation_steps", "gradient_accumulation_steps", "integer", 1, "calls",
         "Calls of forward and backward in one optimiser step. Decides when gradients are reduced; it never "
         "splits a batch and never scales a loss.", low=1),
    _act("gradient_clipping", "gradient_clipping", "number", 0.0, "2-norm",
         "Largest norm of all gradients together; they are scaled down to it before the optimiser steps. 0 "
         "does not clip.", low=0),
    # --- precision
    _section("bf16", also="bfloat16"),
    _act("bf16.enabled", "bf16", "flag", False, "",
         "Parameters stay sharded in fp32, are gathered and computed with in bf16, gradients are reduced in "
         "fp32."),
    _section("fp16"),
    _act("fp16.enabled", "fp16", "flag", False, "",
         "The same in fp16. Scale the loss with a GradScaler. Not together with bf16."),
    # --- ZeRO
    _section("zero_optimization"),
    _act("zero_optimization.stage", "stage", "integer", 0, "",
         "0: gradients all-reduced. 1: parameters and optimiser states sharded, one all-gather and one "
         "reduce-scatter a step. 2: gradients are reduced in every backward. 3: parameters are gathered for "
         "use and dropped after. Without any configuration (or null): 3 in a process group, 0 without one.",
         low=0, high=3),
    _act("zero_optimization.reduce_bucket_size", "reduce_bucket_size", "count", None, "elements",
         "Most elements in one reduction of gradients. Absent: the planner's choice.", low=1),
    _act("zero_optimization.allgather_bucket_size", "allgather_bucket_size", "count", None, "elements",
         "Most elements in one all-gather of parameters. Absent: the planner's choice.", low=1,
         stages=(1, 2, 3)),
    _act("zero_optimization.overlap_comm", "overlap_comm", "flag", None, "",
         "false: every collective is waited for where it starts. Absent or true: it overlaps with compute."),
    _act("zero_optimization.stage3_prefetch_bucket_size", "stage3_prefetch_bucket_size", "count", None,
         "elements", "Most elements being gathered ahead of their use. Absent: the planner's choice.", low=0,
         also="prefetch_bucket_size", stages=(3,)),
    _act("zero_optimization.stage3_param_persistence_threshold", "stage3_param_persistence_threshold",
         "count", None, "elements",
         "Parameters with fewer elements stay whole on every rank (`Replicate`). Absent: the planner's "
         "choice.", low=0, also="param_persistence_threshold", stages=(3,)),
    _act("zero_optimization.stage3_max_live_parameters", "stage3_max_live_parameters", "count", None,
         "elements", "Most gathered elements held at one time. Absent: the planner's choice.", low=1,
         also="max_live_parameters", stages=(3,)),
    _act("zero_optimization.mics_shard_size", "mics_shard_size", "integer", None, "ranks",
         "Hybrid sharding: shard inside groups of this many ranks, replicate across the groups. Absent or "
         "-1: shard over all ranks.", low=1, stages=(1, 2, 3)),
    _act("zero_optimization.sub_group_size", "sub_group_size", "count", None, "elements",
         "Most elements that the optimiser steps at a time where its states wait on the host. Absent: an eighth of them, "
         "with 64 MB of states at most.", low=1),
    _section("zero_optimization.offload_optimizer"),
    _act("zero_optimization.offload_optimizer.device", "offload_optimizer", "text", None, "",
         '`"cpu"`: the optimiser\'s states wait on the host between steps, and come to the device part by part while it steps; '
         "under a memory budget only as many as it asks for. `\"none\"`: never. Absent: under a budget, on a device that has "
         "memory of its own.", choices=("none", "cpu")),
    _act("zero_optimization.offload_optimizer.ratio", "offload_optimizer_ratio", "number", 1.0, "share",
         "Most of the parameters, by bytes, whose states may wait on the host.", low=0, high=1),
    _section("zero_optimization.offload_param"),
    _act("zero_optimization.offload_param.device", "offload_param", "text", None, "",
         '`"cpu"`: shards wait on the host, with their gradients and optimiser states, are copied to the device where they are '
         "gathered, and are stepped on the host. Stage 3, ranks on CPUs: it has not run on a GPU and is refused there.",
         choices=("none", "cpu")),
    _act("zero_optimization.zero_hpz_partition_size", "zero_hpz_partition_size", "integer", 1, "ranks",
         "Ranks of a node, consecutive ones, that divide what the forward gathered a second time, and gather it from each "
         "other in the backward. It takes the model in compute precision, divided by these ranks, on each rank. 1: no second "
         "shard.",
         low=1, stages=(3,)),
    _act("zero_optimization.zero_quantized_weights", "zero_quantized_weights", "flag", None, "",
         "Gathers that compute does not hide travel as `dspass.quantise.weights`, which is `int8` unless written. Parameters "
         "are computed with as they arrive; shards and what the optimiser steps keep their precision.", stages=(3,)),
    _act("zero_optimization.zero_quantized_gradients", "zero_quantized_gradients", "flag", None, "",
         "Reductions that compute does not hide travel as `dspass.quantise.gradients`, which is `int4` unless written: "
         "exchanged once and summed in fp32.", stages=(3,)),
    _section("zero_optimization.zeropp_loco_param"),
    _act("zero_optimization.zeropp_loco_param.err_beta", "loco_err_beta", "number", None, "share",
         "Switches `dspass.quantise.error_feedback` on: the share of an error that stays when a new one comes, LoCo's moving "
         "average (DeepSpeed's usual 0.8). Absent: 0, all that the last rounding lost is added to the next gradient.",
         low=0, high=1, stages=(3,)),
    _act("zero_optimization.zeropp_loco_param.reset_T", "loco_reset_steps", "integer", None, "steps",
         "Switches `dspass.quantise.error_feedback` on: optimiser steps after which errors begin at zero again (usually 1024; "
         "DeepSpeed counts reduced gradients instead). Absent: never.", low=1, stages=(3,)),
    # --- ours
    _section("dspass"),
    _act("dspass.passes", "passes", "passes", None, "",
         'The passes, in order. An entry is a name or `{"name": "...", "option": value}`; `"..."` stands '
         'for the default list, `"-name"` drops one from it, `"package.module:Class"` is your own. Absent: '
         '`["..."]`.'),
    _act("dspass.bucket_bytes", "bucket_bytes", "bytes", None, "bytes",
         "Upper limit of one bucket of any collective. KB, MB, GB are powers of 1000; KiB, MiB, GiB of 1024. "
         "Absent: as many whole blocks as an eighth of the model, one at least, of 12 to 512 MB.", low=1),
    _act("dspass.memory_budget", "memory_budget", "budget", None, "bytes",
         "Most bytes of tensors that one rank holds at any time of a training step: what is saved for the backward, what is "
         "computed again and which gathered copies are kept is planned for it, and a budget that cannot be met is refused with "
         "the smallest that can. A share is of the device's memory (on a CPU the machine's, divided by its ranks), and "
         "`\"auto\"` is 90 % of it. Absent: Inductor's own choice.", low=1, off=("auto",)),
    _act("dspass.plan", "plan", "text", None, "path",
         "A .json file of plans: where it holds one for this model, ranks and shapes it is used, where it is not there it is "
         "written, and one that was made for something else is refused with what differs. Each stage of a pipeline has a file "
         "of its own, `plan.stage0.json` and so on.", local=True),
    _act("dspass.fallback_random", "fallback_random", "flag", False, "",
         "Draw random numbers as eager torch does, so that dropout equals an uncompiled run's (slower)."),
    _act("dspass.segment_cache", "segment_cache", "flag", True, "",
         "Compile segments of the graph that are equal, such as repeated blocks, once."),
    _act("dspass.report", "report", "text", None, "path",
         "Rank 0 writes the report to this .html or .json file at exit. May differ from rank to rank.",
         local=True),
    _section("dspass.experts"),
    _act("dspass.experts.global_aux_loss", "global_aux_loss", "flag", False, "",
         "A router's auxiliary loss weighs each expert by the tokens of all ranks, as if their batches were one. Otherwise "
         "each rank has that of its own tokens, and they are averaged. With ranks' parameters sharded, or experts divided."),
    _section("dspass.quantise"),
    _act("dspass.quantise.weights", "weights", "text", None, "",
         "What parameters are gathered as: a format of blocks with one fp32 scale each. Absent: whole, or `int8` with "
         "`zero_quantized_weights`.", choices=FORMATS),
    _act("dspass.quantise.gradients", "gradients", "text", None, "",
         "What gradients are reduced as. Absent: whole, or `int4` with `zero_quantized_gradients`.", choices=FORMATS),
    _act("dspass.quantise.exchanges", "exchanges", "text", None, "",
         "What rows go to experts on other ranks as, and come back as, forward and backward: each row in blocks of its own, of "
         "`block` values at most. Absent: whole. Its effect needs `expert_parallel`.", choices=FORMATS),
    _act("dspass.quantise.sends", "sends", "text", None, "",
         "What stages of a pipeline on different ranks send each other as, activations and their gradients, each row of a last "
         "dimension in blocks of its own, of `block` values at most; what would be no smaller, and what is no fp32, fp16 or "
         "bf16, travels whole. Absent: all does. Its effect needs `pipeline.stages`.", choices=FORMATS),
    _act("dspass.quantise.activations", "activations", "text", None, "",
         "What saved activations may wait for the backward as: under a `memory_budget` those that the planner chooses, without "
         "one all that can be. Absent: whole. Changes gradients, not the loss.", choices=FORMATS),
    _act("dspass.quantise.block", "block", "integer", 256, "values",
         "Values that share a scale, a multiple of 16. A smaller block is rounded less and sends more scales.", low=16),
    _act("dspass.quantise.buckets", "buckets", "text", "exposed", "",
         '`"exposed"`: only buckets that compute does not hide by the cost model, which on a CPU are all. `"all"`: all.',
         choices=("exposed", "all")),
    _act("dspass.quantise.error_feedback", "error_feedback", "flag", None, "",
         "Each rank keeps what rounding its gradients loses and adds it to the next ones. It takes two bytes of each value of "
         "whole parameters on each rank. Absent: where `zeropp_loco_param` holds something.", stages=(3,)),
    _act("dspass.quantise.max_relative_error", "max_relative_error", "number", None, "share",
         "A bucket of which one parameter's rounding error, as a norm over that of the parameter and measured when it is "
         "sharded, is larger, is gathered whole. Gradients, activations, rows of experts and messages of stages are not known "
         "when that is decided: it does not act on them. Of gradients, rows and messages the report says how far the first "
         "were off, and which by more.",
         low=0),
    _act("dspass.experts.capacity_factor", "capacity_factor", "number", None, "share",
         "Most rows that an expert takes of a rank's, in even shares: of `tokens * experts a token / experts` rows, rounded "
         "up. What is beyond, last in the order of tokens, becomes zeros; sizes are fixed, so every rank needs as many tokens. "
         "Absent: all rows, in sizes that ranks tell each other (dropless). Models keep a capacity of their own.", low=0),
    _act("dspass.experts.drop_tokens", "drop_tokens", "flag", None, "",
         "`false`: no rows are dropped, whatever the capacity. Absent: those beyond it are."),
    _act("dspass.experts.min_capacity", "min_capacity", "integer", None, "rows",
         "The least capacity of an expert, for few tokens. Absent: 4, with a capacity_factor.", low=0),
    _section("dspass.quantise.layers"),
    _act("dspass.quantise.layers.format", "format", "text", None, "",
         "What weights of linear layers are stored as, at the first call or by `dspass.quantise(model, config)`: for "
         "inference, and for frozen weights beside ones that train. Absent: as they are.", choices=FORMATS),
    _act("dspass.quantise.layers.group_size", "group_size", "integer", None, "columns",
         "Columns of a weight that share a scale, a multiple of 16. Absent: one scale an output channel.", low=16),
    _act("dspass.quantise.layers.activations", "activations", "text", None, "",
         '`"int8"`: what is multiplied with such a weight is rounded to int8 as well, row by row, in each call. Weights are '
         "int8 with one scale an output channel then. Absent: it stays as it is.", choices=("int8",)),
    _act("dspass.quantise.layers.modules", "modules", "list", None, "",
         "Names of the layers, or patterns of names such as `model.layers.*.mlp.*`. Absent: all."),
    _act("dspass.quantise.layers.exclude", "exclude", "list", None, "",
         "Names or patterns of layers whose weights stay as they are, such as `lm_head`."),
    _act("dspass.quantise.layers.max_relative_error", "max_relative_error", "number", None, "share",
         "A weight that would be off by more, as a norm over its own, stays as it is.", low=0),
    _section("weight_quantization"),
    _section("weight_quantization.quantized_initialization"),
    _act("weight_quantization.quantized_initialization.num_bits", "num_bits", "integer", None, "bits",
         "DeepSpeed's way to ask for `dspass.quantise.layers.format`: 8 is `int8`, 4 is `int4`. Takes effect where that is "
         "absent.", low=4, high=8),
    _act("weight_quantization.quantized_initialization.group_size", "group_size", "integer", None, "columns",
         "As `dspass.quantise.layers.group_size`.", low=16),
    _act("weight_quantization.quantized_initialization.group_dim", "group_dim", "integer", 1, "",
         "The dimension that groups divide. Only 1: columns.", low=0, high=1),
    _act("weight_quantization.quantized_initialization.symmetric", "symmetric", "flag", True, "",
         "Only true: values are rounded around zero."),
    _deny("weight_quantization.post_init_quant", "object", None, "other formats for single layers",
          "Name the layers in dspass.quantise.layers.modules."),
    # --- quantisation-aware training
    _section("compression_training"),
    _section(_WEIGHTS),
    _section(f"{_WEIGHTS}.shared_parameters"),
    _act(f"{_WEIGHTS}.shared_parameters.enabled", "enabled", "flag", False, "",
         "Quantisation-aware training: weights of layers among the groups are rounded to few bits wherever a graph reads them, "
         "and their gradient is that of the rounded ones. What the optimiser steps keeps its precision."),
    _act(f"{_WEIGHTS}.shared_parameters.schedule_offset", "schedule_offset", "count", 0, "steps",
         "Optimiser steps before the first rounding, counted from the start of the process, or on from `dspass.resume_at`.",
         low=0),
    _act(f"{_WEIGHTS}.shared_parameters.quantize_groups", "quantize_groups", "count", None, "groups",
         "Scales of a weight, which divide its values in their order; DeepSpeed's default is 1. Absent: one scale an output "
         "channel, as `dspass.quantise` stores it, and one a row of an embedding.", low=1),
    _act(f"{_WEIGHTS}.shared_parameters.quantization_type", "quantization_type", "text", "symmetric", "",
         '`"symmetric"`: `2**bits - 1` values around zero, as `dspass.quantise` stores them. `"asymmetric"`: `2**bits` values '
         "from the smallest to the largest, zero among them.", choices=("symmetric", "asymmetric")),
    _deny(f"{_WEIGHTS}.shared_parameters.rounding", "text", "nearest", "weights that are rounded at random",
          "Set it to {off}, which is what DeepSpeed does in the forward whatever is written."),
    _skip(f"{_WEIGHTS}.shared_parameters.quantizer_kernel", "flag", False, "rounding is fused by the compiler"),
    _skip(f"{_WEIGHTS}.shared_parameters.quantize_verbose", "flag", False, _REPORT),
    _skip(f"{_WEIGHTS}.shared_parameters.quantize_weight_in_forward", "flag", False, _IN_GRAPH),
    _section(f"{_WEIGHTS}.shared_parameters.fp16_mixed_quantize", refused="weights between whole and rounded",
             instead="Set its enabled to false; start_bits begins with little rounding.", asks="enabled"),
    *_inner(f"{_WEIGHTS}.shared_parameters.fp16_mixed_quantize", "flag", enabled=False),
    *_inner(f"{_WEIGHTS}.shared_parameters.fp16_mixed_quantize", "number", quantize_change_ratio=0.001),
    _act(f"{_WEIGHTS}.different_groups", "groups", "groups", None, "",
         "Groups of layers by a name of their own. `params`: `start_bits`, `target_bits` (2 to 16) and `quantization_period` "
         "(steps, 1): bits fall by one when that many steps have passed since the offset, and again when twice, four times as "
         "many have, until they are `target_bits`. `modules`: regular expressions, found anywhere in the name of an "
         '`nn.Linear`, `Conv1D`, `nn.Embedding` or convolution; absent, or `"*"`: all.'),
    _section(_ACTIVATIONS),
    _section(f"{_ACTIVATIONS}.shared_parameters"),
    _act(f"{_ACTIVATIONS}.shared_parameters.enabled", "enabled", "flag", False, "",
         "The same for what linear layers and convolutions are given: each row, or each sample of a convolution, is rounded by "
         "a scale of its own."),
    _act(f"{_ACTIVATIONS}.shared_parameters.schedule_offset", "schedule_offset", "count", 1000, "steps",
         "Optimiser steps before the first rounding.", low=0),
    _act(f"{_ACTIVATIONS}.shared_parameters.quantization_type", "quantization_type", "text", "symmetric", "",
         "As for weights.", choices=("symmetric", "asymmetric")),
    _deny(f"{_ACTIVATIONS}.shared_parameters.range_calibration", "text", "dynamic", "ranges that are kept from step to step",
          "Set it to {off}: each row is rounded by its own largest value, as `dspass.quantise.layers.activations` does it."),
    _act(f"{_ACTIVATIONS}.different_groups", "groups", "groups", None, "",
         "As for weights, with `bits` alone under `params`."),
    _section("compression_training.layer_reduction", refused="distillation into fewer layers",
             instead="Set its enabled to false, and build the smaller model in the script.", asks="enabled", open=True),
    *(_section(f"compression_training.{name}", refused="pruning", instead=_NO_PRUNING, asks="enabled", open=True)
      for name in ("sparse_pruning", "row_pruning", "head_pruning", "channel_pruning")),
    # --- the rest of DeepSpeed: batch, optimiser
    _deny("managed_gradient_accumulation", "flag", True,
          "accumulation boundaries that the script calls out itself",
          "Set it to true; for boundaries of your own use dspass.no_sync(model)."),
    _section("optimizer", ignored=_OWN_OPTIMIZER + "; build it from torch.optim"),
    *_inner("optimizer", "text", type=None), *_inner("optimizer", "object", params=None),
    *_inner("optimizer", "flag", legacy_fusion=False),
    _section("scheduler", ignored="the learning-rate scheduler is built and stepped by the training script"),
    *_inner("scheduler", "text", type=None), *_inner("scheduler", "object", params=None),
    _skip("zero_allow_untested_optimizer", "flag", False,
          "any torch.optim optimiser works on sharded parameters"),
    _skip("zero_force_ds_cpu_optimizer", "flag", True, _OWN_OPTIMIZER),
    # --- communication
    _deny("communication_data_type", "text", None, "gradients reduced in another type than fp32",
          "Gradients are reduced in fp32.", off=(None, "fp32")),
    _deny("gradient_allreduce_op", "text", "mean", "gradients that are summed over the ranks",
          "Gradients are averaged; multiply the loss by the number of ranks for a sum."),
    _skip("prescale_gradients", "flag", False,
          "the reduction itself averages, in fp32, so nothing can overflow"),
    _skip("gradient_predivide_factor", "number", 1.0,
          "the reduction itself averages, in fp32, so no factor is needed before it"),
    _skip("sparse_gradients", "flag", False,
          "gradients of embeddings are dense in the graph; the numbers are equal"),
    _skip("disable_allgather", "flag", False, "the stage decides which parameters are gathered"),
    _deny("sequence_parallel_size", "integer", 1, "sequence parallelism",
          "Remove it and train with data parallelism.", off=(None, 1)),
    _skip("seq_parallel_comm_data_type", "text", "fp32",
          "only concerns sequence parallelism, which this version does not do",
          also="seq_parallel_communication_data_type"),
    # --- precision
    _skip("bf16.immediate_grad_update", "flag", False,
          "gradients are in .grad as soon as backward has returned"),
    _deny("bf16.check_grad_overflow", "flag", False, "skipping the steps whose gradients overflow",
          "Set it to false and look at what clip_grad_norm_ returns."),
    _deny("bf16.bf16_master_weights_and_grads", "flag", False, "master weights in bf16",
          "Set it to false; to hold parameters in bf16, convert the model with model.to(torch.bfloat16) and "
          "leave bf16.enabled off."),
    _deny("bf16.bf16_optimizer_states", "flag", False, "optimiser states in bf16",
          "Set it to false and choose an optimiser that keeps its states so."),
    _deny("fp16.auto_cast", "flag", False, "casting the inputs to fp16",
          "Set it to false and cast them yourself."),
    _skip("fp16.loss_scale", "number", 0, _OWN_SCALER),
    _skip("fp16.initial_scale_power", "count", 16, _OWN_SCALER),
    _skip("fp16.loss_scale_window", "count", 1000, _OWN_SCALER),
    _skip("fp16.hysteresis", "count", 2, _OWN_SCALER),
    _skip("fp16.consecutive_hysteresis", "flag", False, _OWN_SCALER),
    _skip("fp16.min_loss_scale", "number", 1, _OWN_SCALER),
    _skip("fp16.fused_mode", "flag", True, _OWN_OPTIMIZER),
    _deny("fp16.fp16_master_weights_and_grads", "flag", False, "master weights in fp16",
          "Set it to false; parameters stay in fp32 between steps."),
    _section("torch_autocast", refused="an autocast region set up by the configuration",
             instead="Remove it and put torch.autocast around the call of the model.", asks="enabled"),
    *_inner("torch_autocast", "flag", enabled=False), *_inner("torch_autocast", "text", dtype="bfloat16"),
    *_inner("torch_autocast", "list", lower_precision_safe_modules=None),
    _section("amp", refused="Apex mixed precision", instead="Remove it and use bf16 or fp16.", asks="enabled",
             open=True),
    *_inner("amp", "flag", enabled=False),
    _section("data_types"),
    _deny("data_types.grad_accum_dtype", "text", None, "gradients that add up in another type than fp32",
          "They add up in .grad, in the type of the parameter.", off=(None, "fp32")),
    _deny("data_types.param_dtype", "text", None, "a type for the parameters",
          "Remove it and convert the model with model.to(dtype)."),
    _deny("data_types.buffer_dtype", "text", None, "a type for the buffers",
          "Remove it and convert the buffers in the script."),
    # --- ZeRO
    _skip("zero_optimization.allgather_partitions", "flag", True, "parameters are always all-gathered"),
    _skip("zero_optimization.reduce_scatter", "flag", True,
          "the stage decides: all-reduce at 0 and for parameters that are not sharded, reduce-scatter "
          "otherwise"),
    _skip("zero_optimization.contiguous_gradients", "flag", True, "buckets are packed by the graph"),
    _skip("zero_optimization.use_multi_rank_bucket_allreduce", "flag", True,
          "buckets are packed by the graph"),
    _skip("zero_optimization.compute_grad_norm", "flag", True,
          "clip_grad_norm_ computes the norm when it is called"),
    _skip("zero_optimization.load_from_fp32_weights", "flag", True, _NO_ENGINE_SAVE),
    _skip("zero_optimization.elastic_checkpoint", "flag", False, _NO_ENGINE_SAVE),
    _skip("zero_optimization.round_robin_gradients", "flag", False, _OWN_BUFFERS),
    _skip("zero_optimization.parameter_alignment", "flag", False,
          "every shard is a tensor of its own; there is no flat buffer to align"),
    _skip("zero_optimization.stage3_max_reuse_distance", "count", 1_000_000_000,
          "the graph knows every use, so the planner decides for each parameter; stage3_max_live_parameters "
          "is the limit", also="max_reuse_distance"),
    _skip("zero_optimization.stage3_model_persistence_threshold", "count", None,
          "each parameter is judged by stage3_param_persistence_threshold; their sum has no limit",
          also="model_persistence_threshold"),
    _skip("zero_optimization.stage3_gather_16bit_weights_on_model_save", "flag", False, _NO_ENGINE_SAVE,
          also="gather_16bit_weights_on_model_save"),
    _skip("zero_optimization.stage3_gather_fp16_weights_on_model_save", "flag", False, _NO_ENGINE_SAVE),
    _skip("zero_optimization.stage3_module_granularity_threshold", "count", 0, _NO_HOOKS,
          also="module_granularity_threshold"),
    _skip("zero_optimization.stage3_use_all_reduce_for_fetch_params", "flag", False, _PLAIN_GATHER,
          also="use_all_reduce_for_fetch_params"),
    _skip("zero_optimization.stage3_allgather_sequential", "flag", False, _PLAIN_GATHER,
          also="allgather_sequential"),
    _skip("zero_optimization.stage3_partition_stream_chunk_size", "count", 0,
          "dspass.shard fills each shard by itself and never holds the whole model",
          also="partition_stream_chunk_size"),
    _skip("zero_optimization.memory_efficient_linear", "flag", True,
          "the compiler decides what backward keeps"),
    _skip("zero_optimization.override_module_apply", "flag", True,
          "nn.Module.apply works on sharded parameters as it is"),
    _skip("zero_optimization.pipeline_loading_checkpoint", "flag", False, _NO_ENGINE_SAVE),
    _skip("zero_optimization.log_trace_cache_warnings", "flag", False,
          'the order of uses is read from the graph, not from a trace; TORCH_LOGS="recompiles" shows '
          "recompiles"),
    _skip("zero_optimization.enable_sanity_checks", "flag", False, "every pass's graph is checked always"),
    _skip("zero_optimization.save_muon_momentum_buffer_in_memory", "flag", False, _OWN_BUFFERS),
    _skip("zero_optimization.legacy_stage1", "flag", False, "there is one implementation of stage 1"),
    _skip("zero_optimization.leaf_module", "object", None, _NO_HOOKS),
    _skip("zero_optimization.mics_hierarchical_params_gather", "flag", False,
          "a parameter is gathered inside its own group only, which takes one hop"),
    _deny("zero_optimization.ignore_unused_parameters", "flag", True, "stopping when a parameter is unused",
          "Set it to true; a parameter outside the graph gets no gradient."),
    *(_skip(f"zero_optimization.offload_param.{name}", kind, default, _OWN_BUFFERS)
      for name, kind, default in _OFFLOAD_PARAM),
    *(_skip(f"zero_optimization.offload_optimizer.{name}", kind, default, _OWN_BUFFERS)
      for name, kind, default in _OFFLOAD_OPTIMIZER),
    _deny("zero_optimization.cpu_offload", "flag", None, "offloading by a key that DeepSpeed gave up",
          'Write "offload_optimizer": {{"device": "cpu"}}.', off=(None, False)),
    _deny("zero_optimization.cpu_offload_param", "flag", None, "offloading by a key that DeepSpeed gave up",
          'Write "offload_param": {{"device": "cpu"}}.', off=(None, False)),
    _skip("zero_optimization.cpu_offload_use_pin_memory", "flag", None, _OWN_BUFFERS),
    _deny("zero_optimization.zenflow", "object", None, "ZenFlow's offloaded optimiser steps", "Remove it.",
          off=(None,)),
    _deny("zero_optimization.zero_quantized_nontrainable_weights", "flag", False,
          "frozen parameters stored quantised", _FIT),
    # --- parallelism of other kinds
    # --- pipeline
    _section("pipeline"),
    _act("pipeline.stages", "stages", "integer", None, "ranks",
         "Ranks that the model's layers are divided over, a divisor of all ranks; what remains of the ranks is the data axis, "
         "which the stage says how to use. All ranks of one pipeline pass the same batch. 1 with micro-batches: each rank "
         "splits its batch. Absent or `\"auto\"`: no pipeline.", low=1, off=("auto",)),
    _act("pipeline.micro_batches", "micro_batches", "integer", None, "",
         "Equal parts, along its first dimension, that the batch of one call is split into. Absent: what a timed simulation "
         "finds fastest, of the batch's divisors.", low=1, off=("auto",)),
    _act("pipeline.schedule", "schedule", "text", "auto", "",
         "Order of forwards and backwards, a name of `torch.distributed.pipelining` in any case: `gpipe`, `1f1b`, "
         "`interleaved1f1b`, `loopedbfs`, `interleavedzerobubble` (with one stage a rank that is ZB-H1, `zbh1`), "
         "`zbvzerobubble` (`zbv`), `dualpipev`. `auto`: what a timed simulation finds fastest.",
         choices=_SCHEDULES, any_case=True, off=("auto",)),
    _act("pipeline.virtual_stages", "virtual_stages", "integer", None, "stages",
         "Stages of one rank. Absent: the schedule's usual number, 1 or 2.", low=1),
    _act("pipeline.boundaries", "boundaries", "list", None, "",
         "Modules, by name, that each begin a stage: one fewer than there are stages. Absent: cuts that balance the stages' "
         "times, or those that `dspass.stage_boundary` marks."),
    _act("pipeline.loss_reduction", "loss_reduction", "text", None, "",
         "`mean`: the loss is the mean of the micro-batches', whatever it is made of. Absent: they are combined as the batch's "
         "own loss would be, and a loss that does not show how is refused.", choices=("mean",)),
    _act("pipeline.outputs", "outputs", "text", "all", "",
         "Which ranks get the outputs of a call without gradients: `all`, or only the `last` stage's.",
         choices=("all", "last")),
    _act("pipeline.gather", "gather", "text", None, "",
         "How often stage 3 gathers a parameter and reduces its gradient: once a `call`, which holds the rank's own layers "
         "whole while it runs all micro-batches, or once a `micro_batch`, in each direction. Absent: once a call; under a "
         "`memory_budget` what is faster of that which fits.", choices=("call", "micro_batch")),
    *(_skip(f"pipeline.{name}", kind, default, _OWN_CUTS) for name, kind, default in _PIPELINE),
    _section("tensor_parallel"),
    _deny("tensor_parallel.autotp_size", "integer", 0, "tensor parallelism", "Remove it, or set it to 0.",
          off=(0, 1)),
    *(_skip(f"tensor_parallel.{name}", kind, default, _NO_TENSOR)
      for name, kind, default in _TENSOR),
    # --- experts
    _act("dspass.experts.expected_imbalance", "expected_imbalance", "number", 1.0, "times the mean",
         "How many tokens the busiest rank is expected to get for its experts, over the mean: a prediction and a memory budget "
         "suppose it, for how many come is known in each step alone. The report shows what it is.", low=1.0),
    _act("dspass.experts.chunks", "chunks", "integer", None, "chunks",
         "In how many parts, some of each rank's experts each, a layer of experts is computed, so that rows of one part travel "
         "while another is computed; no more than there are experts on a rank. Absent: what the cost model finds fastest, 1 on "
         "a device that does not compute while it sends.", low=1),
    _act("dspass.experts.batch_parts", "batch_parts", "integer", None, "",
         "In how many equal parts, along its first dimension, the batch goes through the layers, in turns, so that rows of one "
         "are on their way to experts while attention or experts compute another. Heads and losses are of the whole batch. "
         "`\"auto\"`: 1, 2 or 4, what the cost model finds fastest in the first call, for all ranks. Each size of the batch is "
         "then compiled by itself. Absent: 1.", low=1, off=("auto",)),
    _act("dspass.experts.hierarchical", "hierarchical", "flag", None, "",
         "Rows on their way to experts, and back, go inside of the node first, to the rank whose place is that of the one that "
         "they are for, and then across nodes: fewer and larger messages, the same numbers. Nodes have "
         "`zero_hpz_partition_size` ranks where that is above 1, else as many as were started on this one; a prediction's as "
         "many as the device's. Absent: where the experts' ranks span nodes, and by the device's figures the latency of "
         "messages is more than what the first way takes."),
    _section("expert_parallel"),
    _act("expert_parallel.enabled", "enabled", "flag", False, "",
         "Divide the experts of mixtures of experts over ranks, and send tokens to them. What they are is recognised in the "
         "graph: no preset and no names are needed."),
    _act("expert_parallel.autoep_size", "autoep_size", "integer", None, "ranks",
         "Consecutive ranks that the experts of a layer are divided over, a divisor of all ranks and of the experts; what "
         "remains of the ranks divides each expert further, as the stage says, or holds it again. Absent: the largest number "
         "that divides both.", low=1),
    *(_skip(f"expert_parallel.{name}", kind, default, _OWN_ROUTING) for name, kind, default in _EXPERT_PARALLEL),
    _deny("expert_parallel.expert_tensor_parallel_size", "integer", 1, "tensor parallelism of experts", _FIT),
    _deny("expert_parallel.load_balance_coeff", "number", None, "a bias that balances the load of experts",
          "Remove it; the model's own auxiliary loss or bias works as it does without it."),
    _deny("use_data_before_expert_parallelism", "flag", False, "an order of axes for expert parallelism",
          _FIT),
    _section("hybrid_engine", refused="switching between training and generation kernels",
             instead="Set hybrid_engine.enabled to false and generate with the uncompiled model.",
             asks="enabled"),
    *_inner("hybrid_engine", "flag", enabled=False, release_inference_cache=False, pin_parameters=True,
            enable_cuda_graph=False),
    *_inner("hybrid_engine", "count", max_out_tokens=512, inference_tp_size=1, tp_gather_partition_size=8),
    # --- activations
    _section("activation_checkpointing"),
    _deny("activation_checkpointing.partition_activations", "flag", False, "activations split over ranks",
          _FIT),
    _deny("activation_checkpointing.cpu_checkpointing", "flag", False, "activations kept on the host",
          "Set it to false; torch.utils.checkpoint in the model is honoured."),
    *(_skip(f"activation_checkpointing.{name}", kind, default,
            _NO_CHECKPOINTING)
      for name, kind, default in _CHECKPOINTING),
    _section("sparse_attention", refused="DeepSpeed's sparse attention kernels",
             instead="Remove it; torch's flex_attention compiles sparse masks.", asks="present"),
    *_inner("sparse_attention", "text", mode="fixed", attention="bidirectional"),
    *_inner("sparse_attention", "flag", different_layout_per_head=False, horizontal_global_attention=False),
    *_inner("sparse_attention", "count", block=16, num_local_blocks=4, num_global_blocks=1,
            num_random_blocks=0, num_different_global_patterns=1, num_sliding_window_blocks=3),
    *_inner("sparse_attention", "list", local_window_blocks=None, global_block_indices=None,
            global_block_end_indices=None),
    # --- compilation
    _section("compile"),
    _skip("compile.deepcompile", "flag", False,
          "compiling with collectives in the graph is what this backend does"),
    _deny("compile.passes", "list", None, "passes by DeepSpeed's names",
          "Remove it; dspass.passes adds, drops and reorders passes.", asks="present"),
    _act("compile.offload_activation", "offload_activation", "flag", None, "",
         "Whether saved activations may wait for the backward on the host. With a memory budget those that the planner picks: "
         "true also where the device's memory is the host's, absent where it is not. Without one true offloads all of 1 MB or "
         "more."),
    _deny("compile.offload_opt_states", "flag", False, "DeepCompile's own pass of that name",
          'Write "zero_optimization": {{"offload_optimizer": {{"device": "cpu"}}}}.'),
    _deny("compile.offload_parameters", "flag", False, "DeepCompile's own pass of that name",
          'Write "zero_optimization": {{"offload_param": {{"device": "cpu"}}}}.'),
    _skip("compile.offload_activation_pin_memory", "flag", True, "beside a GPU host memory is always pinned"),
    _skip("compile.debug_log", "flag", False, 'TORCH_LOGS="+dspass" prints the graphs'),
    _skip("compile.free_activation", "flag", False,
          "the compiled graph frees every value after its last use"),
    _skip("compile.free_activation_threshold", "count", 10_485_760,
          "the compiled graph frees every value after its last use"),
    *(_skip(f"compile.{name}", "flag", default, _NO_DEEPCOMPILE)
      for name, default in _DEEPCOMPILE),
    _skip("graph_harvesting", "flag", False, "fusing short kernels is Inductor's work"),
    # --- training techniques
    _section("progressive_layer_drop", refused="dropping layers during training",
             instead="Set progressive_layer_drop.enabled to false and drop layers in the model.",
             asks="enabled"),
    *_inner("progressive_layer_drop", "flag", enabled=False),
    *_inner("progressive_layer_drop", "number", theta=1.0, gamma=0.001),
    _section("eigenvalue", refused="eigenvalues of the curvature", instead="Set eigenvalue.enabled to false.",
             asks="enabled"),
    *_inner("eigenvalue", "flag", enabled=False, verbose=False),
    *_inner("eigenvalue", "number", max_iter=100, tol=0.01, stability=1e-6),
    *_inner("eigenvalue", "count", gas_boundary_resolution=1, layer_num=0),
    *_inner("eigenvalue", "text", layer_name="bert.encoder.layer"),
    _section("quantize_training", refused="quantised training by a key that DeepSpeed gave up",
             instead="Write compression_training.weight_quantization.", asks="enabled", open=True),
    _section("data_efficiency", refused="DeepSpeed's data sampling and token dropping",
             instead="Set every enabled in it to false and choose the data in your DataLoader.",
             asks="enabled", open=True),
    _section("curriculum_learning", refused="a curriculum over the data",
             instead="Set curriculum_learning.enabled to false and order the data in your DataLoader.",
             asks="enabled", open=True),
    _section("elasticity", refused="batch sizes that follow the number of ranks",
             instead="Set elasticity.enabled to false and write the batch sizes.", asks="enabled"),
    *_inner("elasticity", "flag", enabled=False, ignore_non_elastic_batch_info=False,
            prefer_larger_batch_size=True),
    *_inner("elasticity", "count", max_train_batch_size=2000, min_gpus=1, max_gpus=10000, min_time=0,
            num_gpus_per_node=1, model_parallel_size=1),
    *_inner("elasticity", "list", micro_batch_sizes=None), *_inner("elasticity", "any", version=0.2),
    _section("autotuning", refused="experiments that search for a configuration",
             instead="Set autotuning.enabled to false; dspass.explain predicts memory and time of a "
                     "configuration.", asks="enabled", open=True),
    *_inner("autotuning", "flag", enabled=False, overwrite=True, fast=True),
    # --- data, checkpoints
    _skip("dataloader_drop_last", "flag", False, "the DataLoader is built by the training script"),
    _skip("vocabulary_size", "count", None, "DeepSpeed only warns by it when it is not a multiple of 8"),
    _section("checkpoint", ignored=_NO_ENGINE_SAVE),
    *_inner("checkpoint", "text", tag_validation="Warn"),
    *_inner("checkpoint", "flag", load_universal=False, use_node_local_storage=False),
    *_inner("checkpoint", "object", parallel_write=None, writer=None),
    _section("nebula", refused="saving through Nebula",
             instead="Set nebula.enabled to false and save with torch.distributed.checkpoint.",
             asks="enabled"),
    *_inner("nebula", "flag", enabled=False, enable_nebula_load=True),
    *_inner("nebula", "text", persistent_storage_path=None, load_path=None),
    *_inner("nebula", "count", persistent_time_interval=100, num_of_version_in_retention=2),
    _section("datastates", refused="saving through DataStates",
             instead="Remove it and save with torch.distributed.checkpoint.", asks="present", open=True),
    _section("aio", ignored=_NO_DISK),
    *_inner("aio", "count", block_size=1_048_576, queue_depth=8, thread_count=1, intra_op_parallelism=1),
    *_inner("aio", "flag", single_submit=False, overlap_events=True, use_gds=False),
    # --- logging
    _skip("steps_per_print", "count", None, _OWN_LOOP),
    _skip("wall_clock_breakdown", "flag", False, _REPORT),
    _skip("memory_breakdown", "flag", False, _REPORT),
    _skip("dump_state", "flag", False, _REPORT),
    _skip("log_level", "text", None, 'TORCH_LOGS="dspass" or "+dspass" sets the level'),
    _skip("disable_python_gc", "flag", False, "the collector of Python is left as the script sets it"),
    _section("timers", ignored=_REPORT, open=True),
    _section("flops_profiler", ignored=_REPORT),
    *_inner("flops_profiler", "flag", enabled=False, detailed=True),
    *_inner("flops_profiler", "count", profile_step=1, module_depth=-1, top_modules=1),
    *_inner("flops_profiler", "text", output_file=None),
    *_inner("flops_profiler", "number", recompute_fwd_factor=0.0),
    _section("comms_logger", ignored="the report lists every collective with its bytes"),
    *_inner("comms_logger", "flag", enabled=False, verbose=False, prof_all=True, debug=False),
    *_inner("comms_logger", "list", prof_ops=None),
    _section("tensorboard", ignored=_OWN_LOOP),
    *_inner("tensorboard", "flag", enabled=False),
    *_inner("tensorboard", "text", output_path=None, job_name="DeepSpeedJobName"),
    _section("csv_monitor", ignored=_OWN_LOOP),
    *_inner("csv_monitor", "flag", enabled=False),
    *_inner("csv_monitor", "text", output_path=None, job_name="DeepSpeedJobName"),
    _section("wandb", ignored=_OWN_LOOP),
    *_inner("wandb", "flag", enabled=False),
    *_inner("wandb", "text", group=None, team=None, project="deepspeed"),
    _section("comet", ignored=_OWN_LOOP),
    *_inner("comet", "flag", enabled=False, online=None), *_inner("comet", "count", samples_log_interval=100),
    *_inner("comet", "text", workspace=None, project=None, experiment_name=None, api_key=None,
            experiment_key=None, mode=None),
    _section("trackio", ignored=_OWN_LOOP),
    *_inner("trackio", "flag", enabled=False), *_inner("trackio", "text", project="deepspeed"),
)  # fmt: skip

_BY_PATH = {key.path: key for key in KEYS}
_BY_SPELLING = _BY_PATH | {f"{key.section}.{key.also}".lstrip("."): key for key in KEYS if key.also}
#: The sections that have a class of their own, and the field of :class:`Config` that holds it.
_NESTED = {
    "zero_optimization": "zero",
    "dspass": "dspass",
    "expert_parallel": "expert_parallel",
    "pipeline": "pipeline",
    "dspass.experts": "experts",
    "dspass.quantise": "quantise",
    "dspass.quantise.layers": "own_layers",
    "weight_quantization.quantized_initialization": "quantized_initialization",
    _WEIGHTS: "rounded_weights",
    f"{_WEIGHTS}.shared_parameters": "rounded_weights",
    _ACTIVATIONS: "rounded_activations",
    f"{_ACTIVATIONS}.shared_parameters": "rounded_activations",
}
#: The key of each field, by the section of its class: "" for :class:`Config`, which also holds other sections' fields.
_INTO = {(key.section if key.section in _NESTED else "", key.field): key for key in KEYS if key.field}


@dataclass(frozen=True, kw_only=True)
class Ignored:
    """A key that was written and does nothing."""

    key: str
    """Dotted path."""
    value: object
    """What was written."""
    reason: str
    """Why it does nothing."""


@dataclass(frozen=True, kw_only=True)
class PassEntry:
    """One entry of ``dspass.passes``; the pass pipeline finds the pass that it names."""

    name: str
    """A pass's name, ``package.module:Class``, or ``...`` for the default list."""
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """The pass's options by name."""
    drop: bool = False
    """Take the pass out of the default list; an entry of the same name adds it back at its own place."""

    def to_json(self) -> str | dict[str, Any]:
        """The entry as it stands in a JSON file."""
        if self.options:
            return {"name": self.name, **self.options}
        return f"-{self.name}" if self.drop else self.name


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
        _check_fields(self, "zero_optimization")


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
        _check_fields(self, "dspass")


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
        _check_fields(self, "dspass.quantise")
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
        _check_fields(self, section)
        for name in ("modules", "exclude"):
            names = getattr(self, name)
            if names is not None:
                object.__setattr__(self, name, _names(f"{section}.{name}", names))
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
        _check_fields(self, "expert_parallel")


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
        _check_fields(self, "pipeline")
        if self.boundaries is not None:
            object.__setattr__(self, "boundaries", _names("pipeline.boundaries", self.boundaries))
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
        _check_fields(self, section)
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
        _check_fields(self, section)
        if self.num_bits not in (None, 4, 8):
            raise ConfigError(
                f"{section}.num_bits", f"there is no integer format of {self.num_bits} bits.", "Write 8 or 4."
            )
        if self.group_dim != 1:
            raise ConfigError(f"{section}.group_dim", "groups of rows cannot be.", "Write 1, groups of columns.")
        if not self.symmetric:
            raise ConfigError(f"{section}.symmetric", "values are rounded around zero only.", "Write true.")


@dataclass(frozen=True, kw_only=True)
class RoundedGroup:
    """One of ``different_groups``: layers whose weights, or inputs, are rounded alike while they train."""

    name: str
    """As it was written."""
    start_bits: int
    """Bits of the first rounding."""
    target_bits: int
    """Bits of the last one; of activations the same."""
    period: int = 1
    """Steps after which bits fall by one; then twice, four times as many."""
    modules: tuple[str, ...] = ("*",)
    """Regular expressions, found anywhere in a layer's name; ``"*"`` takes all."""

    def to_json(self, weights: bool) -> dict[str, Any]:
        """The group as it stands in a JSON file."""
        if not weights:
            return {"params": {"bits": self.target_bits}, "modules": list(self.modules)}
        params = {"start_bits": self.start_bits, "target_bits": self.target_bits, "quantization_period": self.period}
        return {"params": params, "modules": list(self.modules)}


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

    section: ClassVar[str] = _ACTIVATIONS
    """Where it stands."""

    def __post_init__(self) -> None:
        _check_fields(self, self.section)
        _check_fields(self, f"{self.section}.shared_parameters")
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

    section: ClassVar[str] = _WEIGHTS
    """Where it stands."""


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
        _check_fields(self, "")
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
            return cls._parse(_read(source, f"${ENVIRONMENT} names it. "))
        if isinstance(source, Mapping):
            return cls._parse(source)
        if isinstance(source, (str, os.PathLike)):
            return cls._parse(_read(source, ""))
        raise ConfigError("", f"The options are {_shown(source)}.", "Give a mapping or the path of a JSON file.")

    @classmethod
    def _parse(cls, options: Mapping[Any, Any]) -> Config:
        taken: dict[str, Any] = {"zero_optimization.stage": 0}
        ignored: list[Ignored] = []
        _walk(options, None, taken, ignored)
        held = {section: {key.field: taken[key.path] for key in KEYS if key.field and key.path in taken
                          and (key.section if key.section in _NESTED else "") == section}
                for section in ("", *_NESTED)}  # fmt: skip
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
                     rounded_weights=RoundedWeights(**held[_WEIGHTS], **held[f"{_WEIGHTS}.shared_parameters"]),
                     rounded_activations=RoundedActivations(
                         **held[_ACTIVATIONS], **held[f"{_ACTIVATIONS}.shared_parameters"]),
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
            reason=f"{_stages(key)}, and the stage is {stage}")
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
        keys = [_BY_PATH[f"zero_optimization.zeropp_loco_param.{name}"] for name in ("err_beta", "reset_T")]
        if self.quantise.error_feedback is not False:
            reason = "gradients are reduced whole; it acts with zero_optimization.zero_quantized_gradients"
            keys.append(_BY_PATH["dspass.quantise.error_feedback"])
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
        holder = getattr(self, _NESTED[key.section]) if key.section in _NESTED else self
        value = getattr(holder, key.field)
        if key.kind == "groups" and value is not None:
            return {group.name: group.to_json(key.section == _WEIGHTS) for group in value}
        return [entry.to_json() for entry in value] if key.kind == "passes" and value is not None else value

    def digest(self) -> str:
        """SHA-256, in hexadecimal, of what must be equal on all ranks."""
        text = json.dumps(dict(sorted(_flat(self.to_dict()))), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """What differs from another rank's ``to_dict()``, one line a key.

        Such as ``zero_optimization.stage: 3 here, 2 there``. Empty exactly when the digests are equal.
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
        elif path not in _BY_PATH or not _BY_PATH[path].local:
            yield path, value


def _said(flat: Mapping[str, Any], path: str) -> str:
    return "unset" if flat.get(path) is None else json.dumps(flat[path], sort_keys=True)


def _check_fields(instance: object, section: str) -> None:
    """Check every field of a dataclass that has a key, and bring its value into its one form."""
    for item in fields(instance):  # type: ignore[arg-type]
        key = _INTO.get((section, item.name))
        if key is not None:
            object.__setattr__(instance, item.name, _checked(key, getattr(instance, item.name)))


def _read(path: str | os.PathLike[str], who: str) -> Mapping[Any, Any]:
    """The top-level object of a JSON file."""
    name = os.fspath(path)

    def no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [key for key, _ in pairs]
            twin = next(key for key in names if names.count(key) > 1)
            raise ConfigError(name, f'"{twin}" is written twice in one section.', f"{who}Remove one of them.")
        return found

    def no_constant(text: str) -> None:
        raise ConfigError(name, f"{text} is not JSON.", f"{who}Write a finite number.")

    if name.lstrip().startswith("{"):
        raise ConfigError("", "The options are JSON text.", "Give a mapping (json.loads(...)) or the path of a file.")
    try:
        with open(name, encoding="utf-8-sig") as file:
            found = json.load(file, object_pairs_hook=no_twins, parse_constant=no_constant)
    except FileNotFoundError:
        raise ConfigError(name, "there is no such file.", f"{who}Looked from {os.getcwd()}.") from None
    except OSError as error:
        raise ConfigError(name, f"cannot be read: {error.strerror}.", f"{who}Give a JSON file.") from None
    except UnicodeDecodeError:
        raise ConfigError(name, "is not text in UTF-8.", f"{who}Give a JSON file.") from None
    except json.JSONDecodeError as error:
        raise ConfigError(
            name,
            f"is not JSON: line {error.lineno}, column {error.colno}: {error.msg}.",
            f"{who}JSON has no comments and no comma before a closing brace.",
        ) from None
    except RecursionError:
        raise ConfigError(name, "is nested too deeply.", f"{who}A configuration has three levels.") from None
    if not isinstance(found, dict):
        raise ConfigError(name, f"holds {_shown(found)}.", f"{who}Put the keys into one pair of braces.")
    return found


def _walk(options: Mapping[Any, Any], parent: Key | None, taken: dict[str, Any], ignored: list[Ignored]) -> None:
    """Sort what was written in one section into what acts and what is ignored; raise for the rest."""
    section = parent.path if parent else ""
    written: dict[str, str] = {}
    for name, value in options.items():
        if not isinstance(name, str):
            raise ConfigError(section, f"{_shown(name)} is not the name of a key.", "Names are text.")
        path = f"{section}.{name}" if section else name
        key = _BY_SPELLING.get(path)
        if key is None:
            if parent is None or not parent.open:
                raise _unknown(path, section, name)
            _no_auto(path, value)
            continue
        if key.path in written:
            raise ConfigError(path, f"is the same key as {written[key.path]}.", "Remove one of them.")
        written[key.path] = path
        if key.kind == "section":
            _walk_section(key, path, value, taken, ignored)
        elif key.field:
            taken[key.path] = value
        else:
            value = _checked(key, value)
            if key.refused and _asks(key, value):
                raise _refusal(key, value)
            if key.ignored or key.refused:
                ignored.append(Ignored(key=key.path, value=value, reason=key.ignored or _noted(key)))


def _walk_section(key: Key, path: str, value: Any, taken: dict[str, Any], ignored: list[Ignored]) -> None:
    if value is None:
        return
    if not isinstance(value, Mapping):
        hint = '{"stage": 1}' if path == "zero_optimization" else '{"enabled": ...}'
        raise ConfigError(path, f"{_shown(value)} is not a section.", f"Write a section in braces, such as {hint}.")
    _walk(value, key, taken, ignored)
    if key.refused and _asks(key, value):
        raise _refusal(key, value)
    if key.ignored or key.refused:
        shown = {name: "(hidden)" if name == "api_key" else inner for name, inner in value.items()}
        ignored.append(Ignored(key=key.path, value=shown, reason=key.ignored or _noted(key)))


def _asks(key: Key, value: object) -> bool:
    if key.asks == "present":
        return bool(value)
    if key.asks == "value":
        return not any(_same(value, off) for off in key.off)
    if isinstance(value, Mapping):
        return any((name == "enabled" and inner is True) or _asks(key, inner) for name, inner in value.items())
    return False


def _noted(key: Key) -> str:
    return f"off as written; {key.refused} is not in this version"


def _refusal(key: Key, value: object) -> ConfigError:
    path = f"{key.path}.enabled" if key.asks == "enabled" and f"{key.path}.enabled" in _BY_PATH else key.path
    shown = "" if isinstance(value, Mapping) else f"{json.dumps(value, default=repr)} "
    cause = f"{shown}asks for {key.refused}, which this version does not do."
    off = " or ".join(json.dumps(value) for value in key.off if value is not None)
    return ConfigError(path, cause, key.instead.format(off=off))


def _unknown(path: str, section: str, name: str) -> ConfigError:
    prefix = f"{section}." if section else ""
    names = [spelling[len(prefix):] for spelling in _BY_SPELLING if spelling.startswith(prefix)]  # fmt: skip
    near = difflib.get_close_matches(name, [other for other in names if "." not in other], n=1)
    elsewhere = [key.path for key in KEYS if name in (key.name, key.also) and key.section != section]
    best = difflib.get_close_matches(path, list(_BY_PATH), n=1)
    if name in _BY_PATH and section:
        hint = f"It stands at the top level, not in {section}."
    elif near:
        hint = f"Did you mean {prefix}{near[0]}?"
    elif elsewhere:
        hint = f"Did you mean {elsewhere[0]}?"
    elif best:
        hint = f"Did you mean {best[0]}?"
    else:
        hint = "Remove it."
    return ConfigError(path, "is not a known key.", hint)


def _names(path: str, names: Any) -> tuple[str, ...]:
    if not all(isinstance(n, str) for n in names):
        raise ConfigError(path, f"{_shown(list(names))} are not all names.", "Write texts.")
    return tuple(names)


def _no_auto(path: str, value: object) -> None:
    if value == "auto" and isinstance(value, str):
        raise ConfigError(path, '"auto" has no meaning here: nothing fills it in.',
                          "Write the value, or remove the key for the default.")  # fmt: skip
    if isinstance(value, Mapping):
        for name, inner in value.items():
            _no_auto(f"{path}.{name}", inner)
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            _no_auto(f"{path}[{index}]", inner)


def _same(one: object, other: object) -> bool:
    return type(one) is type(other) and one == other


def _shown(value: object) -> str:
    """A value as a person wrote it, with its kind."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"{str(value).lower()} (a flag)"
    if isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, str):
        return f"{json.dumps(value)} (text)"
    if isinstance(value, (list, tuple)):
        return "a list"
    return "a section" if isinstance(value, Mapping) else f"a {type(value).__name__}"


def _checked(key: Key, value: Any) -> Any:
    """The value in its one form, or an error that names the key."""
    if value == "auto" and isinstance(value, str) and "auto" not in key.off:
        if key.section == "" and key.field and key.unit in ("samples", "calls"):
            raise ConfigError(key.path, '"auto" has no meaning here: no trainer fills it in.',
                              "Write a number, or remove the key.")  # fmt: skip
        _no_auto(key.path, value)
    if value == "auto" and "auto" in key.off:
        return value
    if value is None and (key.default is None or None in key.off or key.field == "stage"):
        return None
    if key.field == "mics_shard_size" and _same(value, -1):
        return None
    return _KINDS[key.kind](key, value)


def _wrong(key: Key, value: object, way_out: str = "") -> ConfigError:
    return ConfigError(key.path, f"{_shown(value)} is not {_KIND_TEXT[key.kind]}{_range(key)}.", way_out)


def _range(key: Key) -> str:
    if key.low is not None and key.high is not None:
        return f" from {key.low} to {key.high}"
    return f" of at least {key.low}" if key.low is not None else ""


def _numeric(key: Key, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        try:
            number = "" if not isinstance(value, str) else f"{float(value):g}"
        except ValueError:
            number = ""
        raise _wrong(key, value, f"Write {number} without quotes." if number else "")
    if not math.isfinite(value):
        raise _wrong(key, value)
    if key.kind != "number" and isinstance(value, float):
        if key.kind == "integer" or not value.is_integer():
            near = f"Write {int(value)}." if value.is_integer() else ""
            raise _wrong(key, value, near)
        value = int(value)
    if (key.low is not None and value < key.low) or (key.high is not None and value > key.high):
        raise _wrong(key, value)
    return float(value) if key.kind == "number" and key.field else value


def _simple(*types: type) -> Callable[[Key, Any], Any]:
    def check(key: Key, value: Any) -> Any:
        if not isinstance(value, types):
            example = f"Write {value.lower()} without quotes." if str(value).lower() in ("true", "false") else ""
            raise _wrong(key, value, example if isinstance(value, str) and bool in types else "")
        _no_auto(key.path, value)
        return value

    return check


def _text(key: Key, value: Any) -> str:
    if not isinstance(value, str):
        raise _wrong(key, value)
    if key.any_case:
        value = value.lower()
    if key.choices and value not in key.choices:
        raise ConfigError(key.path, f"{_shown(value)} is not one of {', '.join(map(json.dumps, key.choices))}.",
                          "Nothing is offloaded to a disk." if value == "nvme" else "")  # fmt: skip
    if key.field == "plan" and not value.endswith(".json"):
        raise ConfigError(key.path, f"{_shown(value)} does not end in .json.", "Name a .json file.")
    if key.field == "report" and not value.endswith((".html", ".json")):
        raise ConfigError(key.path, f"{_shown(value)} ends neither in .html nor in .json.", "Choose one of them.")
    return value


def _bytes(key: Key, value: Any) -> int:
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
        if match is None or match[2] not in _UNITS:
            raise _wrong(key, value, f"The units are {', '.join(sorted(_UNITS, key=lambda unit: _UNITS[unit]))}.")
        size = float(match[1]) * _UNITS[match[2]] if "." in match[1] else int(match[1]) * _UNITS[match[2]]
        if size != int(size):
            raise _wrong(key, value)
        value = int(size)
    return _numeric(replace(key, kind="count"), value)


def _budget(key: Key, value: Any) -> int | str:
    if not isinstance(value, str):
        return _numeric(replace(key, kind="count"), value)
    if value.strip() == "auto":
        return "auto"
    share = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", value)
    if share is None:
        return _bytes(key, value)
    if not 0 < float(share[1]) <= 100:
        raise _wrong(key, value, "A share is above 0 and at most 100 %.")
    return f"{float(share[1]):g}%"


_PASS_NAME = re.compile(r"[A-Za-z_][\w-]*|[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def _passes(key: Key, value: Any) -> tuple[PassEntry, ...]:
    if not isinstance(value, (list, tuple)):
        raise _wrong(key, value, 'Write ["...", "name"] to add a pass to the default list.')
    entries = tuple(_pass(f"{key.path}[{index}]", item) for index, item in enumerate(value))
    defaults = [entry for entry in entries if entry.name == "..."]
    if len(defaults) > 1:
        raise ConfigError(key.path, '"..." is written twice.', "Keep one of them.")
    drops = [entry.name for entry in entries if entry.drop]
    if drops and not defaults:
        raise ConfigError(key.path, f'"-{drops[0]}" drops from the default list, which is not in the list.',
                          f'Write ["...", "-{drops[0]}"].')  # fmt: skip
    return entries


def _pass(path: str, item: Any) -> PassEntry:
    if isinstance(item, PassEntry):
        item = item.to_json()
    options: dict[str, Any] = {}
    if isinstance(item, Mapping):
        options = {name: inner for name, inner in item.items() if name != "name"}
        if "name" not in item:
            raise ConfigError(path, "has no name.", 'Write {"name": "...", "option": value}.')
        item = item["name"]
    if not isinstance(item, str):
        raise ConfigError(path, f"{_shown(item)} is not the name of a pass.", "Names are text.")
    drop = item.startswith("-")
    name = item.removeprefix("-")
    if (name == "..." and drop) or (name != "..." and not _PASS_NAME.fullmatch(name)):
        raise ConfigError(path, f"{_shown(item)} is not the name of a pass.",
                          'Write "name", "-name", "package.module:Class" or "...".')  # fmt: skip
    if options and (drop or name == "..."):
        raise ConfigError(path, f"{_shown(item)} takes no options.", "Give them to a pass that is named.")
    for option, inner in options.items():
        try:
            json.dumps(inner, allow_nan=False)
        except (TypeError, ValueError):
            raise ConfigError(f"{path}.{option}", f"{_shown(inner)} is not JSON.",
                              "Options are numbers, flags, text, lists and sections.") from None  # fmt: skip
        if not (isinstance(option, str) and option.isidentifier()):
            raise ConfigError(path, f"{_shown(option)} is not the name of an option.", "Use a Python name.")
    return PassEntry(name=name, options=options, drop=drop)


#: What ``params`` of a group holds, and what is taken where it is absent; None: it has to be there.
_PARAMS: dict[str, dict[str, int | None]] = {
    _WEIGHTS: {"start_bits": None, "target_bits": None, "quantization_period": 1},
    _ACTIVATIONS: {"bits": None},
}


def _groups(key: Key, value: Any) -> tuple[RoundedGroup, ...]:
    if isinstance(value, tuple) and all(isinstance(item, RoundedGroup) for item in value):
        value = {item.name: item.to_json(key.section == _WEIGHTS) for item in value}
    if not isinstance(value, Mapping):
        raise _wrong(key, value)
    return tuple(_group(f"{key.path}.{name}", name, item, _PARAMS[key.section]) for name, item in value.items())


def _group(path: str, name: Any, item: Any, wanted: Mapping[str, int | None]) -> RoundedGroup:
    example = f"Write {json.dumps({'params': dict.fromkeys(wanted, 8), 'modules': ['*']})}."
    if not isinstance(name, str) or not isinstance(item, Mapping):
        raise ConfigError(path, f"{_shown(item)} is not a group of layers.", example)
    _refuse_unknown(path, item, ("params", "modules", "related_modules"))
    params = item.get("params")
    if not isinstance(params, Mapping):
        raise ConfigError(f"{path}.params", f"{_shown(params)} is not a section.", example)
    _refuse_unknown(f"{path}.params", params, tuple(wanted))
    numbers = {}
    for of, default in wanted.items():
        range_ = (1, None) if of == "quantization_period" else (2, 16)
        inner = Key(path=f"{path}.params.{of}", kind="integer", low=range_[0], high=range_[1])
        if params.get(of, default) is None:
            raise ConfigError(inner.path, "is not written.", example)
        numbers[of] = _numeric(inner, params.get(of, default))
    if item.get("related_modules") is not None:
        raise ConfigError(
            f"{path}.related_modules", "only concerns pruning, which this version does not do.", "Remove it."
        )
    target = numbers["target_bits"] if "target_bits" in numbers else numbers["bits"]
    start = numbers.get("start_bits", target)
    if start < target:
        raise ConfigError(
            f"{path}.params.start_bits", f"{start} bits cannot fall to {target}.", f"Write {target} or more."
        )
    return RoundedGroup(name=name, start_bits=start, target_bits=target, period=numbers.get("quantization_period", 1),
                        modules=_patterns(f"{path}.modules", item.get("modules", ["*"])))  # fmt: skip


def _patterns(path: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(one, str) for one in value):
        raise ConfigError(path, f"{_shown(value)} is not a list of names.", 'Write ["*"] for all layers.')
    for one in value:
        try:
            re.compile("" if one == "*" else one)
        except re.error as error:
            raise ConfigError(
                path, f"{_shown(one)} is not a regular expression: {error}.", 'Only "*" alone takes all layers.'
            ) from None
    return tuple(value)


def _refuse_unknown(path: str, section: Mapping[Any, Any], known: tuple[str, ...]) -> None:
    for name in section:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            raise ConfigError(
                f"{path}.{name}", "is not a known key.", f"Did you mean {path}.{near[0]}?" if near else "Remove it."
            )


_KINDS: dict[Kind, Callable[[Key, Any], Any]] = {
    "section": _simple(Mapping),
    "flag": _simple(bool),
    "integer": _numeric,
    "count": _numeric,
    "number": _numeric,
    "text": _text,
    "list": _simple(list, tuple),
    "object": _simple(Mapping),
    "any": _simple(object),
    "bytes": _bytes,
    "budget": _budget,
    "passes": _passes,
    "groups": _groups,
}


def _stages(key: Key) -> str:
    *first, last = map(str, key.stages)
    return f"acts at stages {', '.join(first)} and {last}" if first else f"acts at stage {last}"


def _effect(key: Key) -> str:
    if key.field:
        return key.meaning + (f" ({_stages(key)}.)".replace("(acts", "(Acts") if len(key.stages) < 4 else "")
    if key.ignored:
        return f"ignored: {key.ignored}."
    if key.refused:
        when = {
            "value": "refused unless " + " or ".join(f"`{json.dumps(off)}`" for off in key.off),
            "present": "refused when it holds anything",
            "enabled": "refused when enabled",
        }[key.asks]
        off = " or ".join(json.dumps(value) for value in key.off if value is not None)
        return f"{when}: {key.refused}. {key.instead.format(off=off)}"
    return f"as `{key.section}`." if key.section and not _BY_PATH[key.section].field else ""


def markdown_table(which: Literal["acts", "ignored", "refused"]) -> str:
    """The rows of the keys that act, are ignored, or are refused, as Markdown, in the order of ``KEYS``."""
    rows = ["| key | value | unit | default | effect |", "|---|---|---|---|---|"]
    for key in KEYS:
        if _fate(key) == which:
            kind = "section" if key.kind in ("section", "object", "groups") else key.kind
            default = "absent" if key.default is None else f"`{json.dumps(key.default)}`"
            cells = [f"`{key.path}`", kind + _range(key), key.unit or "-", default, _effect(key)]
            rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(rows)


def _fate(key: Key) -> str:
    if key.field:
        return "acts"
    if key.ignored or key.refused:
        return "ignored" if key.ignored else "refused"
    parent = _BY_PATH.get(key.section)
    return _fate(parent) if parent is not None else "section"


def page() -> str:
    """The text of ``docs/config.md``."""
    return f"""# Configuration

`torch.compile(model, backend="deepspeed", options=...)` and `dspass.shard(model, config)` take the options as
a mapping or as the path of a JSON file. The keys are DeepSpeed's; ours stand under `dspass`. With no options,
`$DSPASS_CONFIG` names the file; where it is unset or empty, the stage is 3 in a process group and 0 without
one. Options without `zero_optimization.stage`, even `{{}}`, mean stage 0, as in DeepSpeed.

- A key that is not on this page is an error, which names the nearest known one.
- Types are strict: `true` is not 1, `"3"` is not 3. A *count* may be written as `5e8`, an *integer* may not.
- `null` means the same as absent where the default is absent, and for sections.
- `"auto"` is refused wherever it is written, because nothing fills it in: write the value or remove the key.
  The only exceptions are keys whose default below is `"auto"`.
- Keys that are ignored are listed in the report with the reason given here.
- A written size is an upper limit, in DeepSpeed's unit. An absent one is the planner's choice.
- All ranks must have the same configuration, except where a key says otherwise.
- `bfloat16` is another spelling of `bf16`; the `stage3_` keys that DeepSpeed takes without `stage3_` are
  taken so here.

This page is written by `python -P dspass/config.py > docs/config.md` from the table in that file; a
test compares the two.

## Keys that act

{markdown_table("acts")}

## Keys that are ignored

DeepSpeed's keys that have no meaning in a graph, or whose work is done elsewhere. Their names and types are
checked all the same.

{markdown_table("ignored")}

## Keys that are refused

Keys that would change what is trained or where it is held, in ways this version does not offer. Written
with a value that asks for nothing, they are accepted and noted as ignored.

{markdown_table("refused")}
"""


if __name__ == "__main__":
    print(page(), end="")
