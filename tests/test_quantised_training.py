"""Training with buckets in few bits, on real ranks: the numbers are those of rounding by hand, and nothing else changes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

import dspass
from dspass.config import Config, ConfigError
from dspass.engines import engine_of
from dspass.quantising import relative
from dspass.runtime.axis import Axis
from examples.gpt import GPT, GPTConfig
from tests.matrix import WHOLE
from tests.models import MODELS
from tests.ranks import run
from tests.test_explain import gpt
from tests.training import call, close, train, whole, without_inductor, zero

BLOCK = 64


def few_bits(stage: int = 3, **quantise: Any) -> dict[str, Any]:
    """Both directions in few bits, blocks of 64, small buckets."""
    config = zero(stage, dspass={"quantise": {"block": BLOCK, **quantise}, "bucket_bytes": 20_000})
    config["zero_optimization"] |= {"zero_quantized_weights": True, "zero_quantized_gradients": True}
    return config


def rounded(tensor: torch.Tensor, format: str) -> torch.Tensor:
    """What all ranks have of ``tensor`` once each rank's rows have travelled as ``format``."""
    ranks = dist.get_world_size()
    size = -(-tensor.shape[0] // ranks) * tensor[:1].numel()
    codes, scales = torch.ops.dspass.quantise_bucket([tensor], [size], ranks, format, BLOCK)
    (parts,) = torch.ops.dspass.dequantise_bucket(codes, scales, [size], format, BLOCK, torch.float32)
    return parts.reshape(-1)[: tensor.numel()].view(tensor.shape)


@without_inductor
def _beside_rounding_by_hand(
    name: str, weights: str, gradients: str, node: int = 1, feedback: tuple[float, int] | None = None
) -> tuple[float, float, float]:
    """The largest relative differences of losses and of parameters, and what is said of this rank's first gradients' rounding
    over what it was. Where nodes have several ranks, their sum is rounded once more. With ``feedback``, LoCo's share and steps,
    errors are kept."""
    build, batches = MODELS[name]
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    reference = build()
    torch.manual_seed(0)
    model = build()
    config = few_bits(weights=weights, gradients=gradients)
    config["zero_optimization"]["zero_hpz_partition_size"] = node
    if feedback is not None:
        config["zero_optimization"]["zeropp_loco_param"] = {"err_beta": feedback[0], "reset_T": feedback[1]}
    dspass.shard(model, config)
    compiled = torch.compile(model, backend="deepspeed", options=config)
    ours, theirs = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, reference))
    divided = {n for n, p in model.named_parameters() if isinstance(p, DTensor) and p.placements[0].is_shard()}
    draw, loss_off = torch.Generator().manual_seed(1), 0.0
    errors: dict[tuple[int, str], torch.Tensor] = {}
    lost: dict[str, list[float]] = {}  # of this rank's first gradients: norms of what rounding changes, and of them

    def sent(rank: int, name: str, grad: torch.Tensor) -> torch.Tensor:
        if feedback is None:
            return rounded(grad, gradients)
        error = errors.get((rank, name), torch.zeros_like(grad))
        arrives = rounded(grad + error, gradients)
        errors[rank, name] = (feedback[0] * error + (1 - feedback[0]) * (grad + error - arrives)).bfloat16().float()
        return arrives

    for step in range(5):
        if feedback is not None and step % feedback[1] == 0:
            errors.clear()
        data = [batches(draw, r, 0) for r in range(ranks)]
        loss = call(compiled, data[rank])
        loss.backward()
        kept = {n: p.detach().clone() for n, p in reference.named_parameters()}
        with torch.no_grad():
            for n, p in reference.named_parameters():
                if n in divided:
                    p.copy_(rounded(p, weights))
        sums = {n: torch.zeros_like(p) for n, p in reference.named_parameters()}
        of_node = {n: torch.zeros_like(p) for n, p in reference.named_parameters()}
        for r in range(ranks):
            wanted = call(reference, data[r])
            wanted.backward()
            if r == rank:
                loss_off = max(loss_off, abs(loss.item() / wanted.item() - 1))
            for n, p in reference.named_parameters():
                if p.grad is None:
                    continue
                arrives = sent(r, n, p.grad) if n in divided else p.grad
                of_node[n] += arrives
                if r == rank and n in divided:
                    lost.setdefault(n, [(arrives - p.grad).norm().item(), p.grad.norm().item()])
                if (r + 1) % node == 0:
                    sums[n] += rounded(of_node[n], gradients) if n in divided and node > 1 else of_node[n]
                    of_node[n].zero_()
            theirs.zero_grad()
        with torch.no_grad():
            for n, p in reference.named_parameters():
                p.copy_(kept[n])
                p.grad = sums[n] / ranks
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    apart = [
        (whole(p.detach()) - q).norm().item() / q.norm().item()
        for p, q in zip(model.parameters(), reference.parameters(), strict=True)
    ]
    engine = engine_of(model)
    assert engine is not None
    found = {spec.name: engine.gradient_errors[spec.key] for spec in engine.specs.values() if spec.layout == "shard"}
    assert found.keys() == divided
    said = relative(torch.stack(list(found.values())).sum(0))
    true = math.hypot(*(off for off, _ in lost.values())) / math.hypot(*(size for _, size in lost.values()))
    return loss_off, max(apart), said / true


@pytest.mark.parametrize(
    ("ranks", "name", "weights", "gradients", "node", "feedback"),
    [
        (2, "gpt", "int8", "int8", 1, None),
        (2, "mlp", "int8", "int4", 1, None),
        (4, "mlp", "fp8_e4m3", "fp6_e3m2", 1, None),
        (4, "mlp", "int8", "int8", 2, None),
        (2, "mlp", "int4", "fp8_e5m2", 1, None),
        (2, "gpt", "int8", "int8", 1, (0.0, 1000)),
        (2, "mlp", "int8", "int4", 1, (0.0, 1000)),
        (2, "mlp", "int8", "int4", 1, (0.8, 2)),
        (4, "mlp", "int8", "int8", 2, (0.25, 3)),
    ],
)
def test_the_numbers_are_those_of_rounding_by_hand(
    ranks: int, name: str, weights: str, gradients: str, node: int, feedback: tuple[float, int] | None
) -> None:
    for loss, params, said in run(ranks, _beside_rounding_by_hand, name, weights, gradients, node, feedback):
        assert 0.7 < said < 1.5, "values lie about anywhere within half a step of their codes"
        assert loss < 1e-5
        assert params < 1e-4  # a value near the middle of two codes may be rounded to the other one


@without_inductor
def _trained(config: dict[str, Any], name: str = "gpt", poison: bool = False) -> dict[str, Any]:
    """Losses, the report, and which gradients have a NaN where rank 1's loss is infinite."""
    torch.manual_seed(0)
    build, batches = MODELS[name]
    model = build()
    compiled: Any = torch.compile(model, backend="deepspeed", options=config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    draw, losses, bad = torch.Generator().manual_seed(1), [], {}
    for step in range(4):
        data = [batches(draw, r, 0) for r in range(dist.get_world_size())]
        loss = call(compiled, data[dist.get_rank()])
        losses.append(loss.item())
        if poison and step == 3 and dist.get_rank() == 1:
            loss = loss * float("inf")
        loss.backward()
        if step == 3:
            bad = {n: not whole(p.grad).isfinite().all() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
    engine = engine_of(model)
    assert engine is not None
    report = dspass.explain(model)
    return {
        "losses": losses,
        "bad": bad,
        "said": [p.summary for p in report.passes if p.name.startswith("quantise_")],
        "quantised": [(t.kind, t.format, t.relative_error) for t in report.quantised],
        "errors": dict(engine.quantised_errors),
        "ignored": report.ignored,
        "text": str(report),
    }


def test_a_rank_s_infinite_gradient_is_seen_on_all() -> None:
    for one in run(2, _trained, few_bits(), poison=True):
        assert all(one["bad"].values())
        assert one["bad"]


@without_inductor
def _with_an_overflow() -> tuple[bool, bool, float, bool]:
    """Whether all gradients of a step are spoilt where rank 1's loss is infinite, and after it errors are zeros or finite ones
    and the next gradients finite."""
    torch.manual_seed(0)
    build, batches = MODELS["mlp"]
    model = build()
    compiled: Any = torch.compile(model, backend="deepspeed", options=few_bits(error_feedback=True))
    draw = torch.Generator().manual_seed(1)
    grads = []
    for step in range(4):
        data = [batches(draw, r, 0) for r in range(dist.get_world_size())]
        loss = call(compiled, data[dist.get_rank()])
        (loss * float("inf") if step == 2 and dist.get_rank() == 1 else loss).backward()
        engine = engine_of(model)
        assert engine is not None
        if step == 2:
            left = max(e.abs().max().item() for e in engine.kept_errors())
        grads.append([whole(p.grad) for p in model.parameters() if p.grad is not None])
        model.zero_grad()  # and no step, as after a GradScaler has found it
    spoilt, after = (all(g.isfinite().all() == good for g in grads[i]) for i, good in ((2, False), (3, True)))
    return spoilt, after, left, all(e.isfinite().all() for e in engine.kept_errors())


def test_an_overflow_is_seen_on_all_ranks_and_spoils_no_later_gradient() -> None:
    for rank, (spoilt, after, left, finite) in enumerate(run(2, _with_an_overflow)):
        assert spoilt
        assert after
        assert finite
        assert (left == 0) == (rank == 1)  # what the other rank sent was rounded as ever


@without_inductor
def _sum_of_gradients(config: dict[str, Any], calls: int = 24) -> list[torch.Tensor]:
    torch.manual_seed(0)
    build, batches = MODELS["mlp"]
    model = build()
    compiled: Any = torch.compile(model, backend="deepspeed", options=config)
    data = batches(torch.Generator().manual_seed(1), dist.get_rank(), 0)
    call(compiled, data)  # divides the model
    for _ in range(calls):
        call(compiled, data).backward()
    return [whole(p.grad) for p in model.parameters() if p.grad is not None]


def test_with_feedback_a_sum_of_many_gradients_is_off_by_one_rounding() -> None:
    """Without it a gradient that stays the same is off by the same each time."""
    off = {}
    (true, _) = run(2, _sum_of_gradients, zero(3))
    for feedback in (False, True):
        config = few_bits(gradients="int4", error_feedback=feedback)
        config["zero_optimization"]["zero_quantized_weights"] = False
        (found, _) = run(2, _sum_of_gradients, config)
        off[feedback] = max(((f - t).norm() / t.norm()).item() for f, t in zip(found, true, strict=True))
    assert off[False] > 0.03
    assert off[True] < off[False] / 10


def test_a_budget_of_no_error_leaves_gathers_whole() -> None:
    config = few_bits(max_relative_error=0.0)
    config["zero_optimization"]["zero_quantized_gradients"] = False
    (found, _), (plain, _) = run(2, _trained, config), run(2, _trained, zero(3, dspass={"bucket_bytes": 20_000}))
    assert found["losses"] == plain["losses"]
    assert all(format is None for _, format, _ in found["quantised"])
    assert max(error for kind, _, error in found["quantised"] if kind == "gather" and error is not None) > 0
    assert any("not: beyond max_relative_error" in said for said in found["said"])
    assert not plain["quantised"]
    assert not plain["errors"]


def test_errors_are_measured_alike_on_all_ranks_and_decide() -> None:
    every = run(2, _trained, few_bits(weights="int4"))
    errors = every[0]["errors"]
    assert errors == every[1]["errors"]
    most = 0.999 * max(errors.values())
    assert 0.01 < most < 0.2
    found = run(2, _trained, few_bits(weights="int4", max_relative_error=most))
    gathers = [one for one in found[0]["quantised"] if one[0] == "gather"]
    assert {format for _, format, _ in gathers} == {None, "int4"}
    assert all(error <= most for _, format, error in gathers if format == "int4" and error is not None)


def test_other_stages_travel_whole_and_say_so() -> None:
    (found, _) = run(2, _trained, few_bits(stage=2))
    assert "zero_optimization.zero_quantized_weights" in found["ignored"]
    assert any("not: ZeRO stage 2 keeps whole copies" in said for said in found["said"])


@without_inductor
def _of_doubles() -> tuple[float, list[str]]:
    torch.manual_seed(0)
    build, batches = MODELS["mlp"]
    model = build().double()
    x, y = batches(torch.Generator().manual_seed(1), 0, 0)
    compiled: Any = torch.compile(model, backend="deepspeed", options=few_bits())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        loss = compiled(x.double(), y.double() if y.is_floating_point() else y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    ours = ("quantise_gathers", "quantise_reductions")
    return loss.item(), [p.summary for p in dspass.explain(model).passes if p.name in ours]


def test_what_cannot_be_quantised_travels_whole_and_is_named() -> None:
    for loss, said in run(2, _of_doubles):
        assert loss == loss
        assert all("0 of" in one and "not: they are not all fp32, fp16 or bf16" in one for one in said)
        assert said


def test_gradients_that_are_summed_over_replicas_travel_whole() -> None:
    config = few_bits()
    config["zero_optimization"]["mics_shard_size"] = 2
    for one in run(4, _trained, config):
        assert {format for kind, format, _ in one["quantised"] if kind == "gather"} == {"int8"}
        assert any("not: they are summed over replicas as well" in said for said in one["said"])


@pytest.mark.parametrize(("calls", "feedback"), [(1, False), (3, False), (3, True)])
def test_accumulated_calls_train(calls: int, feedback: bool) -> None:
    """Eight bits each way: near the reference, and the same on all ranks."""
    config = few_bits(gradients="int8", error_feedback=feedback) | {"gradient_accumulation_steps": calls}
    results = run(2, train, *MODELS["gpt"], config, steps=4, calls=calls)
    close(results, within=0.02)
    counts = results[0]["counts"]
    assert counts["all-to-all"] % calls == 0
    assert "reduce-scatter" not in counts


def test_inductor_s_code_trains_to_the_same_numbers() -> None:
    """With errors, which its code replaces in place; gathers are quantised without."""
    config = few_bits(error_feedback=True)
    plain, compiled = (run(2, _trained, config, "mlp", inductor=inductor)[0]["losses"] for inductor in (False, True))
    torch.testing.assert_close(torch.tensor(compiled), torch.tensor(plain), rtol=1e-4, atol=0)


def small_gpt() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    tokens = torch.randint(0, 256, (8, 64), generator=torch.Generator().manual_seed(0))
    return GPT(GPTConfig(context=64, layers=1, heads=4, width=128)), (tokens, tokens)


def _measured(config: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(0)
    model, args = small_gpt()
    compiled: Any = torch.compile(model, backend="deepspeed", options=config)
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        compiled(*args).backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        step()
    with dspass.measure(model):
        step()
    report = dspass.explain(model)
    traffic = [(t.kind, t.direction, t.calls, t.bytes) for t in report.traffic]
    return {"peak": report.memory.peak_bytes, "traffic": traffic}


@pytest.mark.parametrize(
    ("budget", "feedback"),
    [
        pytest.param(None, False, marks=WHOLE),
        pytest.param(8_000_000, False, marks=WHOLE),
        (9_000_000, True),
    ],
)
def test_predicted_is_measured(budget: int | None, feedback: bool) -> None:
    """All three together, and under a budget. Two ranks are one node here."""
    zero = {"stage": 3, "zero_quantized_weights": True, "zero_quantized_gradients": True, "zero_hpz_partition_size": 2}
    own: dict[str, Any] = {"bucket_bytes": 200_000, "quantise": {"error_feedback": feedback}}
    own |= {"memory_budget": budget} if budget else {}
    config: dict[str, Any] = {"zero_optimization": zero, "dspass": own}
    model, args = small_gpt()
    predicted = dspass.explain(model, *args, config=config, world_size=2)
    torch._dynamo.reset()
    for one in run(2, _measured, config):
        assert abs(predicted.memory.peak_bytes / one["peak"] - 1) < 0.05
        assert [(t.kind, t.direction, t.calls, t.bytes) for t in predicted.traffic] == one["traffic"]
        assert {t.format for t in predicted.quantised} == {None, "int8", "int4"}  # None: from the second shard
        assert budget is None or one["peak"] <= budget


def test_a_prediction_for_a_gpu_leaves_hidden_buckets_whole() -> None:
    """Beside so little compute all is exposed; where one link carries nothing else, a GPU hides what comes early."""
    model, args, _ = gpt()
    reports = {}
    for buckets in ("exposed", "all"):
        config = {
            "zero_optimization": {"stage": 3, "zero_quantized_weights": True},
            "dspass": {"bucket_bytes": 400_000, "quantise": {"buckets": buckets}},
        }
        torch._dynamo.reset()
        reports[buckets] = dspass.explain(model, *args, config=config, world_size=8, device="h100")
    formats = {k: {t.format for t in r.quantised if t.kind == "gather"} for k, r in reports.items()}
    assert formats["all"] == {"int8"}
    assert "int8" in formats["exposed"]
    assert sum(t.bytes for t in reports["all"].traffic) <= sum(t.bytes for t in reports["exposed"].traffic)


def _in_node(size: int, weights: str | None) -> dict[str, Any]:
    config = few_bits(weights=weights) if weights else zero(3, dspass={"bucket_bytes": 20_000})
    config["zero_optimization"] |= {"zero_hpz_partition_size": size, "zero_quantized_gradients": False}
    return config


@without_inductor
def _with_a_second_shard(size: int, weights: str | None, calls: int = 2) -> dict[str, Any]:
    torch.manual_seed(0)
    build, batches = MODELS["gpt"]
    model = build()
    compiled: Any = torch.compile(model, backend="deepspeed", options=_in_node(size, weights))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    draw, losses = torch.Generator().manual_seed(1), []
    for _ in range(3):
        for _ in range(calls):
            data = [batches(draw, r, 0) for r in range(dist.get_world_size())]
            loss = call(compiled, data[dist.get_rank()])
            loss.backward()
            losses.append(loss.item())
        with torch.no_grad():
            losses.append(call(compiled, data[dist.get_rank()]).item())  # an evaluation in between
        optimizer.step()
        optimizer.zero_grad()
    engine = engine_of(model)
    assert engine is not None
    traffic = {(t.kind, t.direction, t.group): t.bytes for t in dspass.explain(model).traffic}
    return {"losses": losses, "traffic": traffic, "kept": sum(c.nbytes for c in engine.resident_copies())}


@pytest.mark.parametrize("weights", [None, "int8"])
def test_backwards_gather_in_the_node_and_numbers_stay(weights: str | None) -> None:
    """Bitwise: what is kept is what was gathered."""
    plain, kept = (run(4, _with_a_second_shard, size, weights) for size in (1, 2))
    for one, other in zip(plain, kept, strict=True):
        assert one["losses"] == other["losses"]
        assert other["kept"] == 0  # the optimiser's step has made it stale
        assert ("all-gather", "backward", "data") not in other["traffic"]
        sent, whole = (r["traffic"]["all-gather", "backward", g] for r, g in ((other, "node"), (one, "data")))
        if weights is None:  # half of a copy instead of three quarters; rows are filled up otherwise
            assert sent <= 1.1 * whole * 2 / 3


def test_a_node_that_does_not_divide_the_ranks_is_refused() -> None:
    model, args, _ = gpt()
    with pytest.raises(
        ConfigError, match=r"zero_hpz_partition_size: 3 does not divide the 4 ranks use one of \[1, 2, 4\]"
    ):
        dspass.explain(model, *args, config=_in_node(3, None), world_size=4)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"mics_shard_size": 2}, "mics_shard_size already shards"),
        ({"offload_param": {"device": "cpu"}}, "wait on the host"),
    ],
)
def test_a_second_shard_is_refused_where_it_has_no_use(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config.load({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2, **more}})


def test_a_collective_in_few_bits_is_charged_with_codes_and_scales() -> None:
    from dspass.runtime.params import ParamSpec
    from dspass.runtime.traffic import packed_gather_cost, packed_reduce_cost

    axis = Axis(name="data", group=None, size=4, rank=0, ranks=(0, 1, 2, 3), backend="none")  # type: ignore[arg-type]
    spec: Any = ParamSpec(
        key="k",
        name="w",
        shape=(8, 4),
        dtype=torch.float32,
        compute_dtype=torch.float32,
        reduce_dtype=torch.float32,
        layout="shard",
        shard_axis=axis,
        replicate_axis=None,
        trains=True,
        engine=nn.Module(),  # type: ignore[arg-type]
    )
    assert packed_gather_cost([spec], 100, "forward").bytes == 300
    assert packed_reduce_cost([spec], 100).bytes == 75
