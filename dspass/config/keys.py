"""The table of all keys: the one place where a key is declared.

One row says what a key's value may be and what becomes of it. A key either *acts* (it fills a field of ``Config``), is
*ignored* (it has no meaning in a graph; the reason goes to ``Config.ignored`` and from there to the report), or is *refused* as
soon as its value asks for something this version does not do. Everything else reads the table: what is known and how it is
checked (:mod:`dspass.config.values`), why a file is refused (:mod:`dspass.config.reading`), and the page
(:mod:`dspass.config.page`). To add a key is one row here, and a field in :mod:`dspass.config.sections` where it acts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

#: As in :mod:`dspass.runtime.formats`, which is not imported: the configuration needs nothing of the other packages.
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


def range_text(key: Key) -> str:
    """The range of its numbers as the end of a sentence, '' where it has none."""
    if key.low is not None and key.high is not None:
        return f" from {key.low} to {key.high}"
    return f" of at least {key.low}" if key.low is not None else ""


def stages_text(key: Key) -> str:
    """``acts at stages 1, 2 and 3``."""
    *first, last = map(str, key.stages)
    return f"acts at stages {', '.join(first)} and {last}" if first else f"acts at stage {last}"


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


_OWN_BUCKETS = "Absent: as `dspass.bucket_bytes`, and under a memory budget what is faster of that which fits."
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
    ("pin_memory", "flag", True), ("buffer_count", "count", 5), ("buffer_size", "count", 100_000_000),
    ("max_in_cpu", "count", 1_000_000_000),
)  # fmt: skip
_OFFLOAD_OPTIMIZER: tuple[tuple[str, Kind, object], ...] = (
    ("pin_memory", "flag", True), ("buffer_count", "count", 4),
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
WEIGHTS = "compression_training.weight_quantization"
ACTIVATIONS = "compression_training.activation_quantization"

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
         f"Most elements in one reduction of gradients. {_OWN_BUCKETS}", low=1),
    _act("zero_optimization.allgather_bucket_size", "allgather_bucket_size", "count", None, "elements",
         f"Most elements in one all-gather of parameters. {_OWN_BUCKETS}", low=1, stages=(1, 2)),
    _act("zero_optimization.overlap_comm", "overlap_comm", "flag", None, "",
         "false: every collective is waited for where it starts. Absent or true: it overlaps with compute."),
    _act("zero_optimization.stage3_prefetch_bucket_size", "stage3_prefetch_bucket_size", "count", None,
         "elements", f"Most elements in one all-gather of parameters. {_OWN_BUCKETS}", low=0,
         also="prefetch_bucket_size", stages=(3,)),
    _act("zero_optimization.stage3_param_persistence_threshold", "stage3_param_persistence_threshold",
         "count", None, "elements",
         "Parameters with fewer elements stay whole on every rank (`Replicate`). Absent: 10,000.", low=0,
         also="param_persistence_threshold", stages=(3,)),
    _act("zero_optimization.stage3_max_live_parameters", "stage3_max_live_parameters", "count", None,
         "elements", "Most gathered elements held at one time. Absent: no limit.", low=1,
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
         "memory of its own. `\"nvme\"` is refused.", choices=("none", "cpu")),
    _act("zero_optimization.offload_optimizer.ratio", "offload_optimizer_ratio", "number", 1.0, "share",
         "Most of the parameters, by bytes, whose states may wait on the host.", low=0, high=1),
    _section("zero_optimization.offload_param"),
    _act("zero_optimization.offload_param.device", "offload_param", "text", None, "",
         '`"cpu"`: shards wait on the host, with their gradients and optimiser states, are copied to the device where they are '
         "gathered, and are stepped on the host; under `dspass.memory_budget` only as many as it asks for. "
         "Stage 3, ranks on CPUs: it has not run on a GPU and is refused there, as `\"nvme\"` is everywhere.",
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
         "Such as 60000000000, `\"60GB\"`, `\"75%\"` or `\"auto\"`: most bytes of tensors that one rank holds at any time of a "
         "training step. What is saved for the backward, what is computed again and which gathered copies are kept is planned "
         "for it, and a budget that cannot be met is refused with the smallest that can, one above a GPU with what it has. A "
         "share is of the device's memory (on a CPU the machine's, divided by its ranks: as many as `$LOCAL_WORLD_SIZE` says, "
         "else all, also those of a prediction), of the smallest one's where ranks differ, and `\"auto\"` is 90 % of it. "
         "Absent: Inductor's own choice.", low=1, off=("auto",)),
    _act("dspass.plan", "plan", "text", None, "path",
         "A .json file of plans: where it holds one for this model, its wishes, ranks and shapes it is used, where it does not "
         "one for the memory budget is added, and a plan of the same model for other ranks, another stage or device, other "
         "offload keys or passes, or another torch "
         "is refused with what differs. One for another budget is used where it fits, with a warning where a larger budget may "
         "buy a faster one. Each stage of a pipeline has a file of its own, `plan.stage0.json` and so on. May differ from rank "
         "to rank.", local=True),
    _act("dspass.fallback_random", "fallback_random", "flag", False, "",
         "Draw random numbers as eager torch does, so that dropout equals an uncompiled run's (slower). Not in a pipeline, "
         "whose ranks draw numbers of their own."),
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
    _section(WEIGHTS),
    _section(f"{WEIGHTS}.shared_parameters"),
    _act(f"{WEIGHTS}.shared_parameters.enabled", "enabled", "flag", False, "",
         "Quantisation-aware training: weights of layers among the groups are rounded to few bits wherever a graph reads them, "
         "and their gradient is that of the rounded ones. What the optimiser steps keeps its precision."),
    _act(f"{WEIGHTS}.shared_parameters.schedule_offset", "schedule_offset", "count", 0, "steps",
         "Optimiser steps before the first rounding, counted from the start of the process, or on from `dspass.resume_at`.",
         low=0),
    _act(f"{WEIGHTS}.shared_parameters.quantize_groups", "quantize_groups", "count", None, "groups",
         "Scales of a weight, which divide its values in their order; DeepSpeed's default is 1. Absent: one scale an output "
         "channel, as `dspass.quantise` stores it, and one a row of an embedding.", low=1),
    _act(f"{WEIGHTS}.shared_parameters.quantization_type", "quantization_type", "text", "symmetric", "",
         '`"symmetric"`: `2**bits - 1` values around zero, as `dspass.quantise` stores them. `"asymmetric"`: `2**bits` values '
         "from the smallest to the largest, zero among them.", choices=("symmetric", "asymmetric")),
    _deny(f"{WEIGHTS}.shared_parameters.rounding", "text", "nearest", "weights that are rounded at random",
          "Set it to {off}, which is what DeepSpeed does in the forward whatever is written."),
    _skip(f"{WEIGHTS}.shared_parameters.quantizer_kernel", "flag", False, "rounding is fused by the compiler"),
    _skip(f"{WEIGHTS}.shared_parameters.quantize_verbose", "flag", False, _REPORT),
    _skip(f"{WEIGHTS}.shared_parameters.quantize_weight_in_forward", "flag", False, _IN_GRAPH),
    _section(f"{WEIGHTS}.shared_parameters.fp16_mixed_quantize", refused="weights between whole and rounded",
             instead="Set its enabled to false; start_bits begins with little rounding.", asks="enabled"),
    *_inner(f"{WEIGHTS}.shared_parameters.fp16_mixed_quantize", "flag", enabled=False),
    *_inner(f"{WEIGHTS}.shared_parameters.fp16_mixed_quantize", "number", quantize_change_ratio=0.001),
    _act(f"{WEIGHTS}.different_groups", "groups", "groups", None, "",
         "Groups of layers by a name of their own. `params`: `start_bits`, `target_bits` (2 to 16) and `quantization_period` "
         "(steps, 1): bits fall by one when that many steps have passed since the offset, and again when twice, four times as "
         "many have, until they are `target_bits`. `modules`: regular expressions, found anywhere in the name of an "
         '`nn.Linear`, `Conv1D`, `nn.Embedding` or convolution; absent, or `"*"`: all.'),
    _section(ACTIVATIONS),
    _section(f"{ACTIVATIONS}.shared_parameters"),
    _act(f"{ACTIVATIONS}.shared_parameters.enabled", "enabled", "flag", False, "",
         "The same for what linear layers and convolutions are given: each row, or each sample of a convolution, is rounded by "
         "a scale of its own."),
    _act(f"{ACTIVATIONS}.shared_parameters.schedule_offset", "schedule_offset", "count", 1000, "steps",
         "Optimiser steps before the first rounding.", low=0),
    _act(f"{ACTIVATIONS}.shared_parameters.quantization_type", "quantization_type", "text", "symmetric", "",
         "As for weights.", choices=("symmetric", "asymmetric")),
    _deny(f"{ACTIVATIONS}.shared_parameters.range_calibration", "text", "dynamic", "ranges that are kept from step to step",
          "Set it to {off}: each row is rounded by its own largest value, as `dspass.quantise.layers.activations` does it."),
    _act(f"{ACTIVATIONS}.different_groups", "groups", "groups", None, "",
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
          "torch.optim's optimisers work on sharded parameters; LBFGS, Rprop, Adafactor and fused SGD say that they do not"),
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
    *(_skip(f"zero_optimization.{section}.nvme_path", "text", None, _NO_DISK)
      for section in ("offload_param", "offload_optimizer")),
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
    *(_skip(f"expert_parallel.{name}", kind, default, _OWN_ROUTING, off=("auto",) if default == "auto" else ())
      for name, kind, default in _EXPERT_PARALLEL),
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

BY_PATH = {key.path: key for key in KEYS}
BY_SPELLING = BY_PATH | {f"{key.section}.{key.also}".lstrip("."): key for key in KEYS if key.also}
#: The sections that have a class of their own, and the field of :class:`Config` that holds it.
NESTED = {
    "zero_optimization": "zero",
    "dspass": "dspass",
    "expert_parallel": "expert_parallel",
    "pipeline": "pipeline",
    "dspass.experts": "experts",
    "dspass.quantise": "quantise",
    "dspass.quantise.layers": "own_layers",
    "weight_quantization.quantized_initialization": "quantized_initialization",
    WEIGHTS: "rounded_weights",
    f"{WEIGHTS}.shared_parameters": "rounded_weights",
    ACTIVATIONS: "rounded_activations",
    f"{ACTIVATIONS}.shared_parameters": "rounded_activations",
}
#: The key of each field, by the section of its class: "" for :class:`Config`, which also holds other sections' fields.
INTO = {(key.section if key.section in NESTED else "", key.field): key for key in KEYS if key.field}
