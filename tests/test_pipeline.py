"""Pipelines from a plain training loop: they train as one process does, whatever the model, the schedule and the mesh."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

import dspass
from dspass.compilation import Compilation
from dspass.config import ConfigError
from dspass.engines import engine_of
from dspass.passes import devices
from dspass.pipeline_outputs import PipelineUseError
from dspass.pipeline_times import Measured
from dspass.pipelined import Pipelined
from dspass.runtime.schedule import Kind, Schedule
from tests.matrix import matrix
from tests.models import Block
from tests.ranks import run
from tests.test_expert_parallel import deepseek, mixtral
from tests.training import call, sgd, without_inductor, zero

Batch = dict[str, Any]


def _tokens(draw: torch.Generator, rows: int) -> Batch:
    ids = torch.randint(0, 61, (rows, 8), generator=draw)
    return {"input_ids": ids, "labels": ids}


def _ignored(draw: torch.Generator, rows: int) -> Batch:
    """Each row has another number of labels that count, some none."""
    batch = _tokens(draw, rows)
    labels = batch["labels"].clone()
    for row in range(rows):
        labels[row, : (3 * row) % 9] = -100
    return {**batch, "labels": labels}


def _images(draw: torch.Generator, rows: int) -> Batch:
    return {
        "pixel_values": torch.randn(rows, 3, 8, 8, generator=draw),
        "labels": torch.randint(0, 3, (rows,), generator=draw),
    }


def _pairs(draw: torch.Generator, rows: int) -> Batch:
    return {
        "input_ids": torch.randint(1, 61, (rows, 7), generator=draw),
        "labels": torch.randint(1, 61, (rows, 5), generator=draw),
    }


class Tied(nn.Module):
    """Blocks between an embedding and a head that share their weight; the loss's count is visible in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(61, 32), nn.Linear(32, 61, bias=False)
        nn.init.normal_(self.embed.weight, std=0.05)  # logits of a size at which rounding stays rounding
        self.head.weight = self.embed.weight
        self.blocks, self.norm = nn.ModuleList([Block(32) for _ in range(4)]), nn.LayerNorm(32)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        each = nn.functional.cross_entropy(self.head(self.norm(x)).transpose(1, 2), labels, reduction="none")
        mask = (labels >= 0).float()
        return (each * mask).sum() / mask.sum()


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 16, "vocab_size": 61}
    drops = dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(**sizes, **drops, use_cache=False))


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=61, use_cache=False,
        )
    )  # fmt: skip


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=61, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0, dropout_rate=0.0,
            use_cache=False,
        )
    )  # fmt: skip


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=8, patch_size=4,
            num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


SUBJECTS: dict[str, tuple[Callable[[], nn.Module], Callable[[torch.Generator, int], Batch]]] = {
    "gpt2": (_gpt2, _tokens),
    "llama": (_llama, _ignored),
    "t5": (_t5, _pairs),
    "vit": (_vit, _images),
    "tied": (Tied, _tokens),
}


@without_inductor
def _train(
    subject: str,
    options: dict[str, Any],
    *,
    steps: int = 20,
    rows: int = 8,
    calls: int = 1,
    how: str = "shard",
    scale: float = 1.0,
    optimizer: Callable[[Any], torch.optim.Optimizer] = sgd,
) -> dict[str, Any]:
    """Train beside one process that has all batches; answers the largest differences and what was seen."""
    build, batches = (SUBJECTS | MIXTURES)[subject]
    torch.manual_seed(0)
    reference = build()
    torch.manual_seed(dist.get_rank())  # rank 0's values are every rank's
    model = build()
    plain = sum(p.numel() for p in model.parameters())
    tied = sum(p.numel() for _, p in model.named_parameters(remove_duplicate=False)) - plain
    if dist.get_rank() == 0:
        model.load_state_dict(reference.state_dict())
    config = {"gradient_accumulation_steps": calls, **options}
    if how == "shard":
        dspass.shard(model, config)
    compiled: Any = torch.compile(model, backend="deepspeed", options=config)
    ours, theirs = optimizer(model.parameters()), optimizer(reference.parameters())
    stages = options["pipeline"]["stages"]
    data = dist.get_world_size() // stages
    place = dist.get_rank() % data
    draw, worst = torch.Generator().manual_seed(1), 0.0
    for _ in range(steps):
        for _ in range(calls):
            given = [batches(draw, rows) for _ in range(data)]
            loss = call(compiled, given[place])
            (loss * scale).backward()
            for i, batch in enumerate(given):
                expected = call(reference, batch)
                (expected * scale / data).backward()
                if i == place:
                    worst = max(worst, abs(loss.item() - expected.item()) / abs(expected.item()))
        if options.get("gradient_clipping"):
            torch.nn.utils.clip_grad_norm_(reference.parameters(), options["gradient_clipping"])
        for step in (ours, theirs):
            step.step()
            step.zero_grad()
    whole, expected_state = dspass.full_state_dict(model), reference.state_dict()
    apart = max(  # a bias of keys has no gradient but rounding, and stays near the zeros that it begins with
        ((whole[n] - p).norm() / p.norm().clamp(min=1e-3)).item()
        for n, p in expected_state.items()
        if p.is_floating_point()
    )
    with torch.no_grad():
        batch = batches(draw, rows)
        evaluated = abs(call(compiled, batch).item() - call(reference, batch).item())
    engine = engine_of(model)
    assert engine is not None
    return {
        "loss": worst,
        "params": apart,
        "evaluated": evaluated,
        "here": sum(p.numel() for p in model.parameters() if not p.is_meta) / plain,
        "tied": tied / plain,
        "exchanges": any("all-to-all" in kind for kind, *_ in engine.traffic.last),
        **_how_it_ran(model),
    }


#: A CPU between whose ranks messages take their bytes' time alone. With the real one's, beside which these models compute in no
#: time, it matters to nobody where they are cut, and nearly all of their layers would lie on one stage.
EVEN = replace(devices.CPU, latency=0.0)


@mock.patch.object(devices, "tabled", mock.Mock(return_value=EVEN))
def _train_evenly(*args: Any, **kwargs: Any) -> dict[str, Any]:
    return _train(*args, **kwargs)


def _how_it_ran(model: nn.Module) -> dict[str, Any]:
    """Of this rank, by stage, the programs that train and those that evaluate; of all ranks, when each did what."""
    runner = model.__dict__["forward"]
    assert isinstance(runner, Pipelined)
    trained, last, staging = runner.last_trained, runner.last, runner.staging
    assert trained is not None
    assert last is not None
    assert staging is not None
    assert runner.engine is not None
    programs = [dict(zip(built.executor.stages, built.compilations, strict=True)) for built in (trained, last)]
    return {
        "schedule": staging.schedule,
        "seconds": [cost.forward for cost in staging.costs],
        "compiled": len(runner.engine.compilations),
        "training": {stage: sorted(done.programs) for stage, done in programs[0].items()},
        "handed on": [stage for stage, done in programs[0].items() if _hands_on(done)],
        "evaluating": {stage: sorted(done.programs) for stage, done in programs[1].items()},
        "weights": [
            done.programs["weight"].clock.seconds for done in trained.compilations if "weight" in done.programs
        ],
        "measured": runner.measured,
    }


def _hands_on(done: Compilation) -> bool:
    """Whether the gradients of a stage's inputs are those of its outputs, as where it adds a parameter to a value."""
    halves = done.stage_backward.halves if done.stage_backward is not None else None
    return halves is not None and not halves.first and any(isinstance(name, str) for name in halves.given.values())


MIXTURES: dict[str, tuple[Callable[[], nn.Module], Callable[[torch.Generator, int], Batch]]] = {
    "mixtral": (mixtral, _tokens),
    "deepseek": (deepseek, _tokens),
}


def _close(results: list[dict[str, Any]], within: float = 1e-5) -> None:
    for result in results:
        assert result["loss"] <= within
        assert result["params"] <= within
        assert result["evaluated"] <= 1e-4


def _pipeline(
    stages: int, schedule: str = "1f1b", micro_batches: int = 4, stage: int = 0, **more: Any
) -> dict[str, Any]:
    section = {"stages": stages, "schedule": schedule, "micro_batches": micro_batches, **more}
    return zero(stage, pipeline=section)


SCHEDULES = ["1f1b", "gpipe", "interleaved1f1b", "loopedbfs", "zbh1", "interleavedzerobubble", "zbv", "dualpipev"]
#: Those of them whose backwards are in two parts.
SPLIT = {"zbh1", "interleavedzerobubble", "zbv", "dualpipev"}
#: What runs each time: each model, each number of stages and each schedule.
SOME = [
    ("llama", 2, "interleaved1f1b"),
    ("t5", 2, "loopedbfs"),
    ("vit", 2, "interleavedzerobubble"),
    ("tied", 3, "zbh1"),
    ("tied", 3, "1f1b"),
    ("tied", 4, "gpipe"),
    ("tied", 2, "dualpipev"),
    ("gpt2", 2, "zbv"),
]


@pytest.mark.parametrize(("subject", "stages", "schedule"), matrix(SOME, SUBJECTS, (2, 3, 4), SCHEDULES))
def test_models_train_as_on_one_process(subject: str, stages: int, schedule: str) -> None:
    results = run(stages, _train_evenly, subject, _pipeline(stages, schedule, 2 * stages), rows=4 * stages)
    _close(results)
    # Each byte lies on one rank, and that of a tied weight on those that read it: others' are freed.
    assert sum(r["here"] for r in results) <= 1 + (stages - 1) * results[0]["tied"] + 1e-6
    ran: Schedule = results[0]["schedule"]
    seconds = results[0]["seconds"]
    assert max(sum(seconds[s] for s in ran.stages_of(rank)) for rank in range(stages)) <= 0.8 * sum(seconds)
    assert ran.splits == (schedule in SPLIT)
    # Once to train, once to evaluate; ViT's loss writes its kind into the model's config, so that its second call is another.
    graphs = 3 if subject == "vit" else 2
    if schedule in SPLIT:
        assert any("input" in programs for result in results for programs in result["training"].values())
    for rank, result in enumerate(results):
        assert result["compiled"] == graphs * len(ran.stages_of(rank))
        _is_compiled(ran, rank, result)
        _is_measured(ran, result["measured"])


def _is_compiled(schedule: Schedule, rank: int, result: dict[str, Any]) -> None:
    """Each stage of the rank trains and evaluates with programs of its own, its backward in two where the schedule splits it.
    What makes no gradient of an input is in one all the same: the first stage, and one that hands on what has come."""
    mine = schedule.stages_of(rank)
    assert len(mine) == schedule.stages // schedule.ranks
    parts = {stage for stage, _ in schedule.split_backwards}
    one = {0, *result["handed on"]}
    halves = {stage: ["weight"] if stage in one else ["input", "weight"] for stage in parts}
    assert result["training"] == {s: sorted(["forward", *halves.get(s, ["backward"])]) for s in mine}
    assert result["evaluating"] == {s: ["forward"] for s in mine}
    assert len(result["weights"]) == len(parts & {*mine})
    assert all(seconds is not None and seconds > 0 for seconds in result["weights"])  # these ran, many times


def _is_measured(schedule: Schedule, measured: Measured) -> None:
    """Every rank did what the schedule has, and a half of a backward for weights began when that for inputs had ended."""
    timeline = measured.timeline
    assert timeline.schedule.actions == schedule.actions
    for row, spans in zip(schedule.actions, timeline.spans, strict=True):
        assert [span.action for span in spans] == [*row]
        assert all(span.end > span.start for span in spans)
        ended = {span.action: span.end for span in spans}
        for span in spans:
            if span.action.kind is Kind.WEIGHT:
                assert span.start >= ended[replace(span.action, kind=Kind.INPUT)]


ON_BOTH_AXES = [("llama", 0), ("llama", 3), ("tied", 1)]


@pytest.mark.parametrize(("subject", "stage"), matrix(ON_BOTH_AXES, ("llama", "tied"), range(4)))
def test_stages_on_one_axis_and_zero_on_the_other(subject: str, stage: int) -> None:
    """Stage 2 has its experts divided as well, and is called twice a step, below. A tied weight's gradient is summed over both
    axes."""
    _close(run(4, _train_evenly, subject, _pipeline(2, stage=stage), steps=4))


@pytest.mark.parametrize("stage", matrix([(2,), (3,)], range(4)))
def test_calls_add_up_on_both_axes(stage: int) -> None:
    _close(run(4, _train_evenly, "tied", _pipeline(2, stage=stage), steps=3, calls=2))


@pytest.mark.parametrize(
    ("subject", "stages", "size", "stage", "schedule"),
    [("mixtral", 2, 2, 2, "zbh1"), ("deepseek", 2, None, 3, "1f1b"), ("mixtral", 1, 2, 1, "1f1b")],
)
def test_experts_are_divided_over_the_ranks_of_a_stage(
    subject: str, stages: int, size: int | None, stage: int, schedule: str
) -> None:
    asked = {"enabled": True} | ({} if size is None else {"autoep_size": size})
    options = {**_pipeline(stages, schedule, stage=stage), "expert_parallel": asked, "gradient_clipping": 0.05}
    results = run(4, _train, subject, options, steps=4)
    _close(results)
    exchanging = [result["exchanges"] for result in results]
    assert exchanging == [
        subject == "mixtral",
        subject == "mixtral",
        True,
        True,
    ]  # the first layer of the other is dense


@without_inductor
def _gathered(gather: str) -> tuple[dict[str, int], list[float]]:
    """Bytes that a rank sends in a step on its data axis, by kind of collective, and losses."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    options = _pipeline(2, stage=3, gather=gather)
    model = dspass.shard(Tied(), options)
    compiled: Any = torch.compile(model, backend="deepspeed", options=options)
    optimizer = sgd(model.parameters())
    losses = []
    for _ in range(3):
        loss = compiled(**_tokens(torch.Generator().manual_seed(1), 8))
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    engine = engine_of(model)
    assert engine is not None
    assert not engine.resident_copies()
    assert not engine.waiting_gradients()
    sent: dict[str, int] = {}
    for (kind, _, group, _), (_, count, _) in engine.traffic.last.items():
        if group == "data":
            sent[kind] = sent.get(kind, 0) + count
    return sent, losses


def test_parameters_are_gathered_once_a_call_or_once_a_micro_batch() -> None:
    for (once, losses), (anew, same) in zip(run(4, _gathered, "call"), run(4, _gathered, "micro_batch"), strict=True):
        assert losses == pytest.approx(same, rel=1e-6)
        assert anew["reduce-scatter"] == 4 * once["reduce-scatter"]
        # Each micro-batch has a forward and a backward; its last gathers of the forward may serve the backward too.
        assert 4 * once["all-gather"] < anew["all-gather"] <= 8 * once["all-gather"]


def test_the_one_line_way() -> None:
    _close(run(2, _train, "tied", _pipeline(2), steps=3, how="compile"))


def test_inductor_compiles_stages() -> None:
    _close(run(2, _train, "gpt2", _pipeline(2, "zbh1"), steps=3, inductor=True))


def test_losses_are_scaled_and_calls_add_up() -> None:
    _close(run(2, _train, "tied", _pipeline(2), steps=4, calls=3, scale=0.25))


def test_clipping_is_of_all_stages() -> None:
    _close(run(2, _train, "tied", {**_pipeline(2), "gradient_clipping": 0.05}, steps=6))


def test_one_rank_splits_its_batch() -> None:
    _close(run(1, _train, "tied", _pipeline(1, micro_batches=2), steps=3))


def test_the_planner_chooses() -> None:
    config = {"pipeline": {"stages": 2}, "zero_optimization": {"stage": 1}}
    _close(run(2, _train, "tied", config, steps=3))


class Refused(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.first, self.second, self.norm = kind, nn.Linear(8, 8), nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.first(x)
        if self.kind == "break":
            torch._dynamo.graph_break()
        if self.kind == "norm":
            x = self.norm(x)
        x = self.second(x)
        return x if self.kind == "no loss" else (x.square().mean(), x)


#: By kind of model: the error, its cause and its way out.
REFUSED: list[tuple[str, type[Exception], str, str]] = [
    (
        "break",
        PipelineUseError,
        r"in one piece, which stages are cut from: Call to `torch\._dynamo\.graph_break\(\)`.*in forward; torch\._dynamo",
        r"Take that out of the forward\.$",
    ),
    (
        "norm",
        PipelineUseError,
        "^x_1 normalises over a batch and keeps its statistics: split into micro-batches it would compute something else",
        r"Call eval\(\) on the batch norms, use group or layer norm, or do without a pipeline\.$",
    ),
    (
        "no loss",
        PipelineUseError,
        "^A pipeline's model answers one loss, .* and this one has none: it answers %x_1 ",
        r"Call it with its labels, or compute the loss in its forward\.$",
    ),
]


def _refusals() -> None:
    torch.manual_seed(0)  # ranks have done other things before
    config = _pipeline(2)
    for kind, error, cause, way_out in REFUSED:
        model = dspass.shard(Refused(kind), config)
        with pytest.raises(error, match=f"{cause}.*{way_out}"):
            model(torch.randn(8, 8))
    model = dspass.shard(Refused(""), config)
    with pytest.raises(PipelineUseError, match=r"does not divide this call's batch of 6"):
        model(torch.randn(6, 8))
    with pytest.raises(PipelineUseError, match="wants a gradient"):
        model(torch.randn(4, 8, requires_grad=True))
    loss, logits = model(torch.randn(4, 8))
    assert logits.shape == (4, 8)
    with pytest.raises(PipelineUseError, match="answers the loss, and scalars"):
        logits.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(PipelineUseError, match="have been delivered"):
        loss.backward()
    with torch.no_grad():
        torch.testing.assert_close(model(torch.randn(4, 8))[1].shape, torch.Size([4, 8]))


def test_what_cannot_be_a_pipeline_says_why() -> None:
    run(2, _refusals)


def _three_on_two() -> None:
    model = dspass.shard(Tied(), _pipeline(3))
    with pytest.raises(ConfigError, match=r"pipeline.stages: 3 does not divide the 2 ranks"):
        model(**_tokens(torch.Generator(), 4))
    model = dspass.shard(Tied(), _pipeline(2, "dualpipev", micro_batches=2))
    with pytest.raises(ConfigError, match=r"pipeline.micro_batches: 2 is not possible.*at least 4.*micro_batches 4"):
        model(**_tokens(torch.Generator(), 4))


def test_numbers_that_cannot_be_are_refused_with_those_that_can() -> None:
    run(2, _three_on_two)


class Faint(nn.Module):
    """In fp16 the gradients of its first layer vanish, unless the loss is scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.second(self.first(x)).float() * 1e-6).mean()


@without_inductor
def _fp16() -> list[float]:
    torch.manual_seed(0)
    reference, model = Faint(), Faint()
    model.load_state_dict(reference.state_dict())
    options = {**_pipeline(2, boundaries=["second"]), "fp16": {"enabled": True}}
    compiled: Any = torch.compile(dspass.shard(model, options), backend="deepspeed", options=options)
    x = torch.randn(8, 8)
    reference(x).backward()
    expected = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    apart = []
    for scale in (2.0**14, 2.0**12, 2.0**12):  # as a GradScaler would, which has seen an overflow
        model.zero_grad()
        (compiled(x) * scale).backward()
        for name, param in model.named_parameters():
            found: Any = param.grad
            if found is not None:
                apart.append(((found.to_local() / scale - expected[name]).norm() / expected[name].norm()).item())
    return apart


def test_gradients_in_fp16_are_scaled_inside_of_the_call() -> None:
    for apart in run(2, _fp16):
        assert len(apart) == 6  # a weight and a bias, three times
        assert max(apart) < 0.02
