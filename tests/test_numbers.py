"""The numbers, one difficulty a test: N ranks train like one process that averages the gradients of the N batches."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from tests.matrix import matrix
from tests.models import MODELS, Mlp, points
from tests.ranks import run
from tests.training import adamw, close, sgd, train, whole, without_inductor, zero


def trained(ranks: int, name: str, config: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
    build, batches = MODELS[name]
    results = run(ranks, train, build, batches, config, **options)
    close(results, params=options.get("optimizer", sgd) is sgd)
    return results


EACH_TIME = [(1, 3), (2, 0), (2, 1), (2, 2), (2, 3), (3, 3), (4, 1)]


@pytest.mark.parametrize(("ranks", "stage"), matrix(EACH_TIME, (1, 2, 3, 4), range(4)))
def test_gpt_at_each_stage(ranks: int, stage: int) -> None:
    trained(ranks, "gpt", zero(stage), steps=20 if ranks == 2 else 4, clip=1.0)


@pytest.mark.parametrize("stage", [0, 3])
def test_gpt_through_inductor(stage: int) -> None:
    trained(2, "gpt", zero(stage), inductor=True, clip=1.0)


DIFFICULT = ["uneven", "frozen", "batchnorm", "broken", "twice", "checkpointed", "checkpointed_attention", "unused"]


@pytest.mark.parametrize(
    ("name", "stage"), matrix([(n, s) for i, n in enumerate(DIFFICULT) for s in (i % 3, 3)], DIFFICULT, range(4))
)
def test_difficult_models(name: str, stage: int) -> None:
    trained(3 if name in ("frozen", "twice") else 2, name, zero(stage), steps=5)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_dropout_with_a_seed_of_its_own_on_each_rank(stage: int) -> None:
    trained(2, "dropout", zero(stage, dspass={"fallback_random": True}), steps=5, random=True)


def test_dropout_through_inductor() -> None:
    trained(2, "dropout", zero(3, dspass={"fallback_random": True}), steps=5, random=True, inductor=True)


@pytest.mark.parametrize("stage", [0, 3])
def test_adamw(stage: int) -> None:
    trained(2, "gpt", zero(stage), optimizer=adamw)


@pytest.mark.parametrize(("stage", "calls"), [(0, 2), (1, 2), (1, 3), (2, 3), (3, 2)])
def test_accumulation(stage: int, calls: int) -> None:
    trained(2, "mlp", zero(stage, gradient_accumulation_steps=calls), calls=calls, steps=4, clip=1.0)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_parameter_used_only_in_an_early_call_of_the_step(stage: int) -> None:
    trained(2, "branches", zero(stage, gradient_accumulation_steps=2), calls=2, steps=4, clip=1.0)
    trained(2, "branches", zero(stage), calls=2, steps=4, no_sync=True)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_several_forwards_before_one_backward(stage: int) -> None:
    trained(2, "mlp", zero(stage), calls=2, losses_per_backward=2, steps=4)
    trained(
        2, "mlp", zero(stage, gradient_accumulation_steps=2), calls=4, losses_per_backward=2, steps=4
    )  # backwards are counted, not forwards


@pytest.mark.parametrize("stage", [0, 3])
def test_the_persons_loop_in_any_order(stage: int) -> None:
    config = zero(stage, gradient_clipping=0.5)
    trained(2, "mlp", config, steps=4, optimizer_when="before compile")
    trained(2, "mlp", config, steps=4, optimizer_when="after call")
    trained(2, "mlp", config, steps=4, how="method")
    trained(2, "mlp", config, steps=4, how="shard")


def momentum(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_an_optimizer_with_state_from_before_the_model_was_compiled(stage: int) -> None:
    build, batches = MODELS["mlp"]
    for optimizer in (momentum, adamw):
        results = run(
            2, train, build, batches, zero(stage), steps=4, eager_steps=3, optimizer=optimizer,
            optimizer_when="before compile",
        )  # fmt: skip
        close(results, params=optimizer is momentum)


def evaluate(model: Any, batch: Any) -> None:
    """What happens between steps: an evaluation in each of torch's ways of not training."""
    with torch.no_grad():
        first = model(*batch)
    with torch.inference_mode():
        second = model(*batch)
    model.eval()
    with torch.no_grad():
        third = model(*batch)
    model.train()
    assert first.item() == pytest.approx(second.item(), rel=1e-6) == pytest.approx(third.item(), rel=1e-6)


@pytest.mark.parametrize("stage", [1, 3])
def test_evaluation_between_steps_and_before_the_first(stage: int) -> None:
    trained(2, "mlp", zero(stage), steps=4, between=evaluate)


def inference_first(model: Any, batch: Any) -> None:
    model.eval()
    with torch.inference_mode():
        model(*batch)
    model.train()


@pytest.mark.parametrize("stage", [0, 3])
def test_the_first_call_in_inference_mode(stage: int) -> None:
    trained(2, "mlp", zero(stage), steps=3, between=inference_first)


bf16_autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_autocast(stage: int) -> None:
    # The graph's casts and sums stand in another order than eager code's, so bf16's own grain is what can be asked for.
    build, batches = MODELS["mlp"]
    results = run(2, train, build, batches, zero(stage), steps=5, inside=bf16_autocast)
    close(results, params=False, within=2e-3)
    assert all(result["params"] < 2e-2 for result in results)


def test_dynamic_sizes_on_ranks_that_differ() -> None:
    trained(3, "uneven", zero(3), steps=4, options={"dynamic": True})


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_hybrid_sharding(stage: int) -> None:
    config = zero(stage)
    config["zero_optimization"]["mics_shard_size"] = 2
    if stage == 3:
        trained(4, "gpt", config, steps=4, clip=1.0)
    trained(4, "mlp", {**config, "gradient_accumulation_steps": 2}, calls=2, steps=4)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_bitwise_equal_from_run_to_run(stage: int) -> None:
    first, second = (trained(3, "mlp", zero(stage), steps=3)[0]["digest"] for _ in range(2))
    assert first == second


@without_inductor
def _half_parameters(stage: int) -> tuple[float, set[str], list[str]]:
    """bf16 parameters, whose gradients are summed over ranks in fp32: exact where a bf16 sum would round."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = nn.Linear(4, 40, bias=False).to(torch.bfloat16)
    compiled = torch.compile(model, backend="deepspeed", options=zero(stage))
    values = [256.0, 1.0, 1.0]  # 256 + 1 is 256 in bf16; in fp32 the sum is 258
    for _ in range(2):  # the call that shards, and the graph
        model.weight.grad = None
        compiled(torch.full((1, 4), values[rank], dtype=torch.bfloat16)).sum().backward()
    grad = whole(model.weight.grad)
    expected = torch.tensor(sum(values[:ranks]) / ranks).to(torch.bfloat16)
    return (grad - expected).abs().max().item(), {str(grad.dtype)}, [str(model.weight.dtype)]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_half_precision_parameters_are_reduced_in_fp32(stage: int) -> None:
    for apart, grad, param in run(3, _half_parameters, stage):
        assert apart == 0
        assert [*grad] == param == ["torch.bfloat16"]


@without_inductor
def _half_compute(stage: int, kind: str) -> tuple[float, float, list[str]]:
    """Shards in fp32, the graph in half precision: against a reference that casts weights and inputs by hand."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    torch.manual_seed(0)
    master = Mlp()
    model = Mlp()
    model.load_state_dict(master.state_dict())
    ours, theirs = torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.SGD(master.parameters(), lr=0.1)
    compiled = torch.compile(model, backend="deepspeed", options=zero(stage, **{kind: {"enabled": True}}))
    scaler = torch.amp.GradScaler("cpu", enabled=kind == "fp16", init_scale=1024.0)
    draw = torch.Generator().manual_seed(1)
    worst, seen = 0.0, []
    for _ in range(6):
        batch = [points(draw, r, 0) for r in range(ranks)]
        loss = compiled(*batch[rank])
        seen.append(str(loss.dtype))
        scaler.scale(loss).backward()
        scaler.unscale_(ours)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for r, (x, y) in enumerate(batch):
            cast = {n: p.to(dtype) for n, p in master.named_parameters()}
            expected = torch.func.functional_call(master, cast, (x.to(dtype), y))
            (expected / ranks * (1024.0 if kind == "fp16" else 1.0)).backward()
            if r == rank:
                worst = max(worst, abs(loss.item() - expected.item()) / abs(expected.item()))
        if kind == "fp16":
            for p in master.parameters():
                assert p.grad is not None
                p.grad /= 1024.0
        torch.testing.assert_close(
            whole(norm), torch.nn.utils.clip_grad_norm_(master.parameters(), 1.0), rtol=2e-2, atol=0
        )
        scaler.step(ours)
        scaler.update()
        ours.zero_grad()
        theirs.step()
        theirs.zero_grad()
    apart = max(
        (whole(p.detach()) - q).norm().item() / q.norm().item()
        for p, q in zip(model.parameters(), master.parameters(), strict=True)
    )
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    return worst, apart, sorted(set(seen))


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_half_precision_compute(stage: int, kind: str) -> None:
    grain = 2**-8 if kind == "bf16" else 2**-11
    for worst, apart, dtypes in run(2, _half_compute, stage, kind):
        assert worst < 4 * grain
        assert apart < 8 * grain
        assert len(dtypes) == 1


@without_inductor
def _two_models(stage: int) -> list[float]:
    """A generator and a discriminator, compiled each, trained in turns as in a GAN, beside the same on one process."""
    rank, ranks = dist.get_rank(), dist.get_world_size()

    def make() -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(0)
        return (
            nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 10)),
            nn.Sequential(nn.Linear(10, 24), nn.Tanh(), nn.Linear(24, 1)),
        )

    def optimizers(pair: Any) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(m.parameters(), lr=0.1) for m in pair]

    plain, nets = make(), make()
    compiled = [torch.compile(m, backend="deepspeed", options=zero(stage)) for m in nets]
    ours, theirs = optimizers(compiled), optimizers(plain)
    draw = torch.Generator().manual_seed(1)
    worst = 0.0
    for _ in range(4):
        noise = [torch.randn(5, 6, generator=draw) for _ in range(ranks)]
        real = [torch.randn(5, 10, generator=draw) for _ in range(ranks)]
        for pair, opts, mine in ((compiled, ours, True), (plain, theirs, False)):
            make_fake, judge = pair
            said = []
            for turn in (1, 0):
                for r in [rank] if mine else range(ranks):
                    fake = make_fake(noise[r])
                    if turn == 1:
                        loss = F.softplus(-judge(real[r])).mean() + F.softplus(judge(fake.detach())).mean()
                    else:
                        loss = F.softplus(-judge(fake)).mean()
                    (loss if mine else loss / ranks).backward()
                    if r == rank:
                        said.append(loss.item())
                opts[turn].step()
                for opt in opts:
                    opt.zero_grad()
            if mine:
                expected = said
            else:
                worst = max(worst, *(abs(a - b) / abs(b) for a, b in zip(expected, said, strict=True)))
    apart = [
        (whole(p.detach()) - q).norm().item() / q.norm().item()
        for net, other in zip(nets, plain, strict=True)
        for p, q in zip(net.parameters(), other.parameters(), strict=True)
    ]
    return [worst, *apart]


@pytest.mark.parametrize("stage", [0, 3])
def test_a_second_compiled_model(stage: int) -> None:
    for differences in run(2, _two_models, stage):
        assert max(differences) <= 1e-5


@without_inductor
def _abandoned(stage: int) -> float:
    """A call is given up half-way through a step (its loss was bad): ``zero_grad`` begins the step anew."""
    torch.manual_seed(0)
    model = Mlp()
    twin = Mlp()
    twin.load_state_dict(model.state_dict())
    options = zero(stage, gradient_accumulation_steps=2)
    compiled = torch.compile(model, backend="deepspeed", options=options)
    draw = torch.Generator().manual_seed(dist.get_rank())
    batches = [points(draw, 0, 0) for _ in range(3)]
    compiled(*batches[0]).backward()
    model.zero_grad()
    for batch in batches[1:]:
        compiled(*batch).backward()
        twin(*batch).backward()
    worst = 0.0
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        dist.all_reduce(q.grad)
        q.grad /= dist.get_world_size()
        worst = max(worst, (whole(p.grad) - q.grad).norm().item() / q.grad.norm().item())
    return worst


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_step_that_is_begun_anew(stage: int) -> None:
    assert max(run(2, _abandoned, stage)) <= 1e-5


def _too_early(stage: int) -> str:
    model = Mlp()
    compiled = torch.compile(model, backend="deepspeed", options=zero(stage, gradient_accumulation_steps=2))
    optimizer = torch.optim.SGD(compiled.parameters(), lr=0.1)
    compiled(*points(torch.Generator().manual_seed(0), 0, 0)).backward()
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    return "nothing was said"


@pytest.mark.parametrize("stage", [0, 1])
def test_a_step_before_its_last_call_is_an_error(stage: int) -> None:
    for text in run(2, _too_early, stage):
        assert "gradient_accumulation_steps" in text
        assert "1 of 2" in text
