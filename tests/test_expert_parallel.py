"""Mixtures of experts from ``transformers``, unmodified, with their experts divided over ranks: the numbers of one process."""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.tensor import DTensor

import dspass
from dspass.config import ConfigError
from dspass.engines import engine_of
from dspass.passes.experts import find_experts
from dspass.passes.nodes import calls, gather_start, specs_of
from dspass.runtime.exchange import (
    COMBINE,
    COUNTS,
    DISPATCH,
    arrival_positions,
    experts_of_rows,
    join_chunks,
    split_chunks,
)
from dspass.runtime.traffic import even_parts
from tests.graphs import EXCHANGES, PerRank
from tests.matrix import WHOLE, matrix
from tests.ranks import RankError, run
from tests.training import Batch, close, train, whole, without_inductor, zero

BASE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "use_cache": False,
}
#: Of mixtures that are traced on four ranks, or by Inductor: what several layers do is seen on two.
ONE = {"num_hidden_layers": 1}
T = transformers


def mixtral(**more: Any) -> nn.Module:
    config = T.MixtralConfig(**BASE | more, intermediate_size=48, num_local_experts=4, num_experts_per_tok=2)
    return T.MixtralForCausalLM(config)


def qwen3(**more: Any) -> nn.Module:
    config: Any = BASE | {"num_experts": 8, "num_experts_per_tok": 3, "head_dim": 8, **more}
    return T.Qwen3MoeForCausalLM(T.Qwen3MoeConfig(intermediate_size=48, moe_intermediate_size=24, **config))


def olmoe(**more: Any) -> nn.Module:
    config: Any = {"num_experts": 8, "num_experts_per_tok": 8, "pad_token_id": 0, "eos_token_id": 1, **more}
    return T.OlmoeForCausalLM(T.OlmoeConfig(**BASE, intermediate_size=24, **config))


def deepseek(**more: Any) -> nn.Module:
    """One dense layer, then one of shared experts beside routed ones, whose groups are limited."""
    config = T.DeepseekV3Config(
        **BASE,
        intermediate_size=48,
        moe_intermediate_size=24,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=4,
        topk_group=2,
        n_shared_experts=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
        **more,
    )
    return T.DeepseekV3ForCausalLM(config)


def gpt_oss(**more: Any) -> nn.Module:
    """Experts with biases, weights that lie transposed."""
    config = T.GptOssConfig(
        **BASE,
        intermediate_size=24,
        num_local_experts=8,
        num_experts_per_tok=1,
        head_dim=8,
        layer_types=["full_attention", "sliding_attention"],
        sliding_window=8,
        **more,
    )
    return T.GptOssForCausalLM(config)


AUXILIARY = {"output_router_logits": True, "router_aux_loss_coef": 0.05}


def sentences(draw: torch.Generator, rank: int, call: int) -> Batch:
    """Each rank another number of tokens."""
    ids = torch.randint(2, 61, (2, 5 + 2 * rank), generator=draw)
    return {"input_ids": ids, "labels": ids}


def divided(stage: int = 3, size: int | None = None, **more: Any) -> dict[str, Any]:
    asked = {"enabled": True} | ({} if size is None else {"autoep_size": size})
    return zero(stage, expert_parallel=asked, **more)


def in_chunks(number: int) -> dict[str, Any]:
    return {"dspass": {"experts": {"chunks": number}}}


def trained(build: Any, config: dict[str, Any], *, batches: Any = sentences, **more: Any) -> dict[str, Any]:
    T.utils.logging.set_verbosity_error()
    held: set[int] = set()
    gathered: set[str] = set()

    def look(model: Any, batch: Any) -> None:
        """Experts of which a rank holds the weights, and parameters that graphs gather."""
        for name, param in model.named_parameters():
            if ".experts." in name and param.dim() == 3 and isinstance(param, DTensor):
                held.add(param.to_local().shape[0])
        for compilation in engine_of(model).compilations if engine_of(model) else ():  # type: ignore[union-attr]
            for graph in compilation.graphs.values():
                gathered.update(spec.name for start in calls(graph.graph, gather_start) for spec in specs_of(start))

    result = train(build, batches, config, between=look, **more)
    return result | {"held": held, "gathered": sorted(gathered)}


CASES = [
    # model, ranks, configuration, steps, experts whose weights a rank holds
    (mixtral, 2, divided(), 20, 2),
    (functools.partial(mixtral, **AUXILIARY, **ONE), 4, divided(), 3, 1),
    (functools.partial(qwen3, **AUXILIARY), 2, divided(2), 3, 4),
    (functools.partial(qwen3, **ONE), 4, divided(3, 2), 3, 2),  # two ranks with the same experts divide them further
    (olmoe, 2, divided(1), 3, 4),
    (deepseek, 2, divided(0), 3, 4),
    pytest.param(deepseek, 4, divided(2, 2), 3, 2, marks=WHOLE),
    (gpt_oss, 2, divided(), 3, 4),
    (gpt_oss, 2, divided(**in_chunks(3)), 3, 4),  # of 2, 1 and 1 experts, with biases
    (functools.partial(qwen3, **AUXILIARY, **ONE), 4, divided(3, 2, **in_chunks(4)), 3, 2),
    (gpt_oss, 4, divided(0, 2), 2, 4),  # at stage 0 they hold them both
]


@pytest.mark.parametrize(("build", "ranks", "config", "steps", "held"), CASES)
def test_trains_as_one_process(build: Any, ranks: int, config: dict[str, Any], steps: int, held: int) -> None:
    results = run(ranks, trained, build, config, steps=steps)
    close(results)
    for result in results:
        assert result["held"] == {held}
        assert result["counts"]["all-to-all"] >= 5
        if config["expert_parallel"].get("autoep_size", ranks) == ranks:
            assert not [name for name in result["gathered"] if ".experts." in name and "bias" not in name]


@pytest.mark.parametrize(
    ("build", "ranks", "chunks"), matrix([], [mixtral, qwen3, olmoe, deepseek, gpt_oss], [2, 4], [1, 2])
)
def test_each_model_trains_as_one_process_for_twenty_steps(build: Any, ranks: int, chunks: int) -> None:
    close(
        run(ranks, trained, functools.partial(build, **AUXILIARY), divided(**in_chunks(chunks)), steps=20, timeout=300)
    )


def test_by_inductor_and_in_bfloat16() -> None:
    """Rows arrive in other numbers each step: one compilation serves them all."""
    results = run(2, trained, gpt_oss, divided(3, bf16={"enabled": True}), steps=3, inductor=True)
    close(results, params=False, within=2e-2)
    assert {result["graphs"] for result in results} == {1}


def test_chunks_by_inductor() -> None:
    results = run(2, trained, functools.partial(qwen3, **ONE), divided(**in_chunks(2)), steps=3, inductor=True)
    close(results)
    assert {result["graphs"] for result in results} == {1}


# -- routings that are seldom --------------------------------------------------------------------------------------------


class Routed(nn.Module):
    """Experts whose tokens choose them: the batch says how."""

    def __init__(self, top_k: int = 1) -> None:
        super().__init__()
        self.into = nn.Linear(6, 10)
        self.up = nn.Parameter(torch.randn(4, 10, 7) / 3)
        self.down = nn.Parameter(torch.randn(4, 7, 10) / 3)

    def forward(self, x: torch.Tensor, scores: torch.Tensor, top_k: int, y: torch.Tensor) -> torch.Tensor:
        x = self.into(x)
        weights, chosen = torch.softmax(scores, -1).topk(top_k)
        rows, positions, ends = torch.ops.dspass.permute_experts(x, chosen, 4)
        rows = torch.tanh(torch.ops.dspass.grouped_product(rows, self.up, ends))
        rows = torch.ops.dspass.grouped_product(rows, self.down, ends)
        return (torch.ops.dspass.unpermute_experts(rows, positions, weights) - y).square().mean()


def seldom(draw: torch.Generator, rank: int, call: int, kind: str) -> Batch:
    tokens = {"one token": 1, "none here": 1 + 4 * rank}.get(kind, 5)
    scores = torch.randn(tokens, 4, generator=draw)
    if kind == "all on one":
        scores[:, 2] = 9.0
    if kind == "none on one":
        scores[:, 1] = -9.0
    if kind == "none here":  # of this rank's tokens none goes to its own experts
        scores[:, 2 * rank : 2 * rank + 2] = -9.0
    top_k = 4 if kind == "all" else 1
    return torch.randn(tokens, 6, generator=draw), scores, top_k, torch.randn(tokens, 10, generator=draw)


def _seldom(kind: str, chunks: int) -> dict[str, Any]:
    torch._dynamo.reset()
    return train(Routed, functools.partial(seldom, kind=kind), divided(**in_chunks(chunks)), steps=4)


@pytest.mark.parametrize(
    ("kind", "chunks"),
    [
        *((kind, 1) for kind in ("all on one", "none on one", "one token", "none here", "all")),
        *((kind, 2) for kind in ("none on one", "one token", "none here")),
    ],
)
def test_seldom_routings(kind: str, chunks: int) -> None:
    close(run(2, _seldom, kind, chunks))


# -- auxiliary losses over all ranks -------------------------------------------------------------------------------------


@without_inductor
def _global_aux(is_global: bool) -> list[float]:
    T.utils.logging.set_verbosity_error()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    build = functools.partial(mixtral, output_router_logits=True, router_aux_loss_coef=5.0)
    torch.manual_seed(0)
    reference = build()
    torch.manual_seed(0)
    model = build()
    config = divided(dspass={"experts": {"global_aux_loss": is_global}})
    compiled = torch.compile(model, backend="deepspeed", options=config)
    draw = torch.Generator().manual_seed(1)
    ours, theirs = (torch.optim.SGD(m.parameters(), lr=0.05) for m in (model, reference))
    for _ in range(3):
        ids = torch.randint(2, 61, (2 * ranks, 6), generator=draw)
        mine = ids[2 * rank : 2 * rank + 2]
        compiled(input_ids=mine, labels=mine).loss.backward()
        reference(input_ids=ids, labels=ids).loss.backward()
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    return [
        (whole(p.detach()) - q).norm().item() / q.norm().item()
        for p, q in zip(model.parameters(), reference.parameters(), strict=True)
    ]


def test_a_global_auxiliary_loss_is_that_of_the_whole_batch() -> None:
    for apart in run(2, _global_aux, True):
        assert max(apart) <= 1e-5
    for apart in run(2, _global_aux, False):
        assert max(apart) > 1e-4


# -- clipping ------------------------------------------------------------------------------------------------------------


@without_inductor
def _clipped(kind: str) -> list[float]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    reference = Routed()
    torch.manual_seed(0)
    model = Routed()
    config = divided(3, 2, **({"gradient_clipping": 0.02} if kind == "key" else {}))
    compiled: Any = torch.compile(model, backend="deepspeed", options=config)
    ours, theirs = (torch.optim.SGD(m.parameters(), lr=1.0) for m in (model, reference))
    draw = torch.Generator().manual_seed(1)
    apart = []
    for _ in range(3):
        batches = [seldom(draw, r, 0, "") for r in range(ranks)]
        compiled(*batches[rank]).backward()
        for batch in batches:
            (reference(*batch) / ranks).backward()
        expected = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.02)
        assert expected > 0.03  # otherwise nothing would be clipped
        if kind == "function":
            norm = dspass.clip_grad_norm_(model, 0.02)
            apart.append(abs(float(norm / expected) - 1))
        if kind == "torch":
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.02)
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    apart += [
        (whole(p.detach()) - q).norm().item() / q.norm().item()
        for p, q in zip(model.parameters(), reference.parameters(), strict=True)
    ]
    return apart


@pytest.mark.parametrize("kind", ["function", "key"])
def test_gradients_are_clipped_by_their_norm_over_all_meshes(kind: str) -> None:
    for apart in run(4, _clipped, kind):
        assert max(apart) <= 1e-5


def test_torchs_own_clipping_raises_and_never_takes_a_local_norm() -> None:
    with pytest.raises(RankError, match="must have the same mesh"):
        run(4, _clipped, "torch")


# -- bad input -----------------------------------------------------------------------------------------------------------


@without_inductor
def _refused(config: dict[str, Any]) -> str:
    batch = seldom(torch.Generator().manual_seed(dist.get_rank()), 0, 0, "")
    try:
        torch.compile(Routed(), backend="deepspeed", options=config)(*batch)
    except Exception as error:
        return str(error)
    return ""


def test_an_axis_that_divides_nothing_is_refused() -> None:
    assert set(run(2, _refused, divided(3, 3))) == {
        "expert_parallel.autoep_size: 3 does not divide the 2 ranks. Use one of [1, 2]. See docs/config.md."
    }
    assert set(run(3, _refused, divided(3, 3))) == {
        "expert_parallel.autoep_size: 3 does not divide the 4 experts of up. Use one of [1]. See docs/config.md."
    }
    with pytest.raises(ConfigError, match=r"mics_shard_size.*expert_parallel"):
        dspass.Config.load(
            {"zero_optimization": {"stage": 3, "mics_shard_size": 2}, "expert_parallel": {"enabled": True}}
        )


@without_inductor
def _nan() -> str:
    compiled: Any = torch.compile(Routed(), backend="deepspeed", options=divided())
    draw = torch.Generator().manual_seed(dist.get_rank())
    for bad in (False, False, True):
        x, scores, top_k, y = seldom(draw, 0, 0, "")
        if bad and dist.get_rank() == 1:
            scores[2, 1] = torch.nan
        try:
            compiled(x, scores, top_k, y).backward()
        except RuntimeError as error:
            assert bad
            return str(error)
    return ""


def test_a_router_that_answers_nan_is_named_on_every_rank() -> None:
    for said in run(2, _nan):
        assert "the router of up answers NaN on rank 1" in said
        assert "learning rate" in said


# -- recognition ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (lambda rows: torch.tanh(rows) * 2, None),
        (lambda rows: torch.softmax(rows, -1), None),
        (lambda rows: (rows.view(rows.shape[0], 2, -1) + 1).flatten(1), None),
        (lambda rows: torch.softmax(rows, 0), "_softmax works across rows"),
        (lambda rows: rows - rows.mean(0), "mean works across rows"),
        (lambda rows: rows.flip(0), "flip works across rows"),
        (lambda rows: rows.cumsum(0), "cumsum works across rows"),
        (lambda rows: rows * torch.arange(5)[:, None], r"int64[1] of each row, and only vectors"),
        (lambda rows: rows[torch.arange(rows.shape[0] - 1, -1, -1)], "int64[] of each row"),
    ],
)
def test_rows_have_to_be_computed_by_themselves(between: Any, reason: str | None) -> None:
    found: list[Any] = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        found.append(find_experts(gm.graph, lambda node: node.op == "placeholder"))
        return gm

    def layer(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        rows = between(torch.ops.dspass.grouped_product(x, up, ends))
        return torch.ops.dspass.grouped_product(rows, down, ends)

    torch._dynamo.reset()
    ends = torch.tensor([2, 5], dtype=torch.int32)
    torch.compile(layer, backend=backend)(torch.randn(5, 3), torch.randn(2, 3, 6), torch.randn(2, 6, 3), ends)
    ((layers, said),) = found
    if reason is None:
        assert len(layers) == 1
        assert not said
    else:
        assert not layers
        assert reason in said[0]


# -- properties ----------------------------------------------------------------------------------------------------------

ROUTINGS = st.integers(1, 4).flatmap(
    lambda ranks: st.integers(1, 3).flatmap(
        lambda here: st.lists(
            st.lists(st.integers(0, ranks * here - 1), max_size=9), min_size=ranks, max_size=ranks
        ).map(lambda choices: (ranks, here, choices))
    )
)


@settings(max_examples=60, deadline=None)
@given(ROUTINGS, st.integers(1, 3), st.integers(0, 2))
def test_chunks_are_taken_apart_and_put_together(
    drawn: tuple[int, int, list[list[int]]], chunks: int, dropped: int
) -> None:
    """Each row of a rank is in the chunk of its expert, in order, and comes back to its place; rows behind the last end, which
    are ``dropped``, are in none, and come back as zeros."""
    ranks, here, choices = drawn
    chunks = min(chunks, here)
    choices = [sorted(c) for c in choices]
    counts = torch.tensor([[c.count(e) for e in range(ranks * here)] for c in choices], dtype=torch.int32)
    splits = [p.sum(2, dtype=torch.int32) for p in counts.view(ranks, ranks, here).tensor_split(chunks, dim=2)]
    chunk_of = [i for i, size in enumerate(even_parts(here, chunks)) for _ in range(size)]
    for rank, mine in enumerate(choices):
        spec = mock.MagicMock()
        spec.divided_over.rank = rank
        rows = torch.arange(1.0, 1 + len(mine) + dropped)[:, None]
        with mock.patch("dspass.runtime.exchange.lookup", lambda key, spec=spec: spec):
            parts = split_chunks(rows, splits, None, "")
            whole = join_chunks(parts, splits, len(rows), "")
        spec.engine.routing.dispatched.assert_called_once_with(spec, dropped)
        for chunk, part in enumerate(parts):
            assert part.flatten().tolist() == [i + 1 for i, e in enumerate(mine) if chunk_of[e % here] == chunk]
        assert whole.flatten().tolist() == [*range(1, 1 + len(mine)), *[0] * dropped]


@settings(max_examples=60, deadline=None)
@given(ROUTINGS)
def test_no_token_is_lost_or_doubled(drawn: tuple[int, int, list[list[int]]]) -> None:
    """Rows of all ranks, sent by their ends, stand in the order of experts where positions say, and come back as they were."""
    ranks, here, choices = drawn
    choices = [sorted(c) for c in choices]
    counts = torch.tensor([[c.count(e) for e in range(ranks * here)] for c in choices], dtype=torch.int32)
    ends = PerRank(row.cumsum(0).int() for row in counts)
    rows = PerRank(torch.arange(len(c), dtype=torch.float32)[:, None] + 100.0 * r for r, c in enumerate(choices))
    arriving, splits = (
        PerRank(values) for values in zip(*EXCHANGES[COUNTS](ends, None, PerRank([1]), None), strict=True)
    )
    arrived = EXCHANGES[DISPATCH](rows, splits)
    for rank in range(ranks):
        size = int(arriving[rank].sum())
        assert arrived[rank].shape[0] == size  # what is sent is what was told
        positions = arrival_positions(arriving[rank], size)
        assert sorted(positions.flatten().tolist()) == list(range(size))
        lasts = arriving[rank].sum(0).cumsum(0).int()
        experts = experts_of_rows(lasts, size, rank * here).tolist()
        in_order = torch.ops.dspass.spread_experts(arrived[rank], positions).flatten().tolist()
        assert experts == [choices[int(v) // 100][int(v) % 100] for v in in_order]
        back = torch.ops.dspass.unpermute_experts(torch.tensor(in_order)[:, None], positions)
        assert back.flatten().tolist() == arrived[rank].flatten().tolist()
    sizes = PerRank(len(c) for c in choices)
    returned = EXCHANGES[COMBINE](arrived, splits, sizes, None)
    assert [r.flatten().tolist() for r in returned] == [r.flatten().tolist() for r in rows]
