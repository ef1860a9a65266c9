"""Parts of the batch that take turns around layers of experts: the numbers of the whole batch, and how many parts there are."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import dspass
from dspass.batches import batch_size, divided
from dspass.config import Config
from dspass.passes import split_batch
from dspass.passes.base import PassContext
from dspass.passes.divide_experts import is_parameter
from dspass.passes.expert_parts import Turns, seconds
from dspass.passes.experts import find_experts
from dspass.passes.split_batch import SplitBatch
from dspass.report import Report
from dspass.runtime import compat
from tests.matrix import WHOLE, matrix
from tests.mixtures import VOCABULARY, WIDTH, Grouped, GShard
from tests.ranks import RankError, run
from tests.test_expert_parallel import AUXILIARY, ONE, deepseek, gpt_oss, mixtral, olmoe, qwen3, trained
from tests.test_expert_parallel import divided as on_ranks
from tests.test_expert_reports import Net, experts_on, tokens
from tests.training import Batch, close

# -- graphs, on one rank -------------------------------------------------------------------------------------------------


def captured(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> tuple[fx.GraphModule, list[Any]]:
    found: list[tuple[fx.GraphModule, list[Any]]] = []

    class StopError(Exception):
        pass

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        def stop(*real: Any) -> Any:
            found.append((gm, list(real)))
            raise StopError

        return stop

    torch._dynamo.reset()
    with compat.ignoring_logs(), pytest.raises(StopError):
        torch.compile(model, backend=backend, fullgraph=True, dynamic=False)(**batch)
    return found[0]


def split(model: nn.Module, batch: Mapping[str, torch.Tensor], parts: int) -> tuple[fx.GraphModule, list[Any], str]:
    """The graph in parts, as if the model's experts were divided over ranks, its inputs, and what the pass said."""
    part, _ = captured(model, divided(dict(batch), len(next(iter(batch.values()))), parts))
    gm, inputs = captured(model, batch)
    ctx = PassContext(where="captured")
    with mock.patch.object(split_batch, "divided_layers", lambda graph: find_experts(graph, is_parameter)[0]):
        SplitBatch(count=parts, part=part).run(gm.graph, ctx)
    gm.recompile()
    return gm, inputs, "; ".join(ctx.said)


def assert_same(model: nn.Module, batch: Mapping[str, torch.Tensor], parts: int) -> fx.GraphModule:
    """In parts the model answers, and its gradients are, what they are of the whole batch."""
    gm, inputs, said = split(model, batch, parts)
    assert f"{parts} parts of the batch take turns" in said
    plain, _ = captured(model, batch)
    params = [p for p in model.parameters() if p.requires_grad]
    answers = []
    for one in (gm, plain):
        outputs = one(*inputs)
        loss = next(t for t in outputs if t.dim() == 0)
        grads = torch.autograd.grad(loss, params, allow_unused=True)
        answers.append([*outputs, *(g for g in grads if g is not None)])
    torch.testing.assert_close(*answers, rtol=2e-5, atol=2e-6)
    return gm


def ids(rows: int, length: int) -> Batch:
    drawn = torch.randint(2, 61, (rows, length), generator=torch.Generator().manual_seed(3))
    return {"input_ids": drawn, "labels": drawn}


@pytest.mark.parametrize(
    ("build", "parts"),
    matrix(
        [(mixtral, 4), *((build, 2) for build in (mixtral, qwen3, olmoe, deepseek, gpt_oss))],
        [mixtral, qwen3, olmoe, deepseek, gpt_oss],
        [2, 4],
    ),
)
def test_each_mixture_is_what_it_is_of_the_whole_batch(build: Callable[..., nn.Module], parts: int) -> None:
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    model = build(**(AUXILIARY if build is not deepseek else {}))
    model(**ids(1, 3))  # hooks for router logits are set in the first call
    batch = ids(4, 7)
    batch["labels"] = batch["labels"].masked_fill(batch["labels"] < 30, -100)  # parts have other numbers of labels
    assert_same(model, batch, parts)


class Mixture(nn.Module):
    """Layers of experts under attention, which mixes the tokens of a sequence."""

    def __init__(self, experts: int, top_k: int, layers: int = 2, **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Grouped(experts, top_k, **options) for _ in range(layers))
        self.mixers = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(layers))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def mix(self, x: torch.Tensor, mixer: nn.Module) -> torch.Tensor:
        q, k, v = mixer(x).unsqueeze(1).chunk(3, -1)
        return x + F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)

    def layer(self, x: torch.Tensor, i: int) -> torch.Tensor:
        return x + self.layers[i](x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.embedding(x)
        for i, mixer in enumerate(self.mixers):
            y = self.layer(self.mix(y, mixer), i)
        return F.cross_entropy(self.head(y[:, :-1]).flatten(0, 1), x[:, 1:].flatten())


@settings(max_examples=12, deadline=None)
@given(
    st.integers(1, 3), st.sampled_from([2, 3, 4]), st.integers(2, 5), st.integers(1, 3), st.booleans(), st.floats(0, 20)
)
def test_any_batch_in_any_number_of_parts(
    rows: int, parts: int, length: int, top_k: int, biases: bool, lean: float
) -> None:
    torch.manual_seed(rows)
    model = Mixture(5, top_k, biases=biases, lean=lean)
    assert_same(model, {"x": torch.randint(VOCABULARY, (rows * parts, length))}, parts)


def test_turns_stand_one_behind_the_other() -> None:
    """In front of a layer of experts each part, then the experts of each: what an exchange has beside it."""
    gm = assert_same(Mixture(4, 2), {"x": torch.randint(VOCABULARY, (4, 3))}, 2)
    order = [n.target for n in gm.graph.nodes if n.target in (F.scaled_dot_product_attention, *PRODUCTS)]
    mix, (product,) = F.scaled_dot_product_attention, PRODUCTS
    assert order == [mix, mix, product, product, product, product] * 2
    rows = {tuple(n.meta["example_value"].shape) for n in gm.graph.nodes if n.target is F.cross_entropy}
    assert rows == {()}, "there is one loss, of the whole batch"


PRODUCTS = (torch.ops.dspass.grouped_product,)


class Checkpointed(Mixture):
    """What mixes tokens is computed again in the backward; its region has its sizes written into it."""

    def mix(self, x: torch.Tensor, mixer: nn.Module) -> torch.Tensor:
        return checkpoint(super().mix, x, mixer, use_reentrant=False)


class SequenceFirst(Mixture):
    """Tokens of all sequences one behind the other: the batch's rows are not in their order until the end."""

    def layer(self, x: torch.Tensor, i: int) -> torch.Tensor:
        flat = x.transpose(0, 1).flatten(0, 1)
        flat = flat + self.layers[i](flat)
        return flat.unflatten(0, (x.shape[1], x.shape[0])).transpose(0, 1)


class Noted(Mixture):
    """What routers say is read behind all layers, and so is something without gradients in between."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, shares = self.embedding(x), []
        for i, mixer in enumerate(self.mixers):
            y = self.mix(y, mixer)
            shares.append(self.layers[i].router(y.flatten(0, 1)).softmax(-1))
            y = self.layer(y, i)
            with torch.no_grad():
                y = y + 0 * y.detach().sign()
        balance = sum((share.mean(0) ** 2).sum() for share in shares)
        return F.cross_entropy(self.head(y[:, :-1]).flatten(0, 1), x[:, 1:].flatten()) + balance


class Shifted(Mixture):
    def layer(self, x: torch.Tensor, i: int) -> torch.Tensor:
        return super().layer(0.9 * x + 0.1 * x.roll(1, 1), i)


@pytest.mark.parametrize("build", [Checkpointed, SequenceFirst, Noted, Shifted])
def test_ways_to_write_a_model(build: Callable[..., nn.Module]) -> None:
    torch.manual_seed(1)
    assert_same(build(4, 2), {"x": torch.randint(VOCABULARY, (6, 3))}, 3)


# -- what cannot be split ------------------------------------------------------------------------------------------------


class Centred(Mixture):
    def layer(self, x: torch.Tensor, i: int) -> torch.Tensor:
        return super().layer(x - x.mean(0), i)


class Mixed(Mixture):
    def layer(self, x: torch.Tensor, i: int) -> torch.Tensor:
        return super().layer(0.9 * x + 0.1 * x.roll(1, 0), i)


class Scaled(Mixture):
    def layer(self, x: torch.Tensor, i: int) -> torch.Tensor:
        return super().layer(x / x.shape[0], i)


class Normed(Mixture):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.norm = nn.BatchNorm1d(WIDTH)

    def layer(self, x: torch.Tensor, i: int) -> torch.Tensor:
        return super().layer(self.norm(x.transpose(1, 2)).transpose(1, 2), i)


class Interleaved(Mixture):
    """From its layers to the loss, tokens stand in another order than sequences."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.embedding(x)
        y = self.mix(self.layer(self.mix(y, self.mixers[0]), 0), self.mixers[1]).transpose(0, 1).flatten(0, 1)
        return F.cross_entropy(self.head(y + self.layers[1](y)), x.t().flatten())


class Branching(Mixture):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if len(x) > 3 else super().forward(x) * 2 + 1


class Batched(Mixture):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.batched = GShard(4, 2, "bmm")

    def layer(self, x: torch.Tensor, i: int) -> torch.Tensor:
        return super().layer(x + self.batched(x.flatten(0, 1)).view_as(x), i)


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (Centred, r"%sub\w* \(sub\) is made of all|%mean\w* \(mean\) is made of all"),
        (Mixed, r"\(roll\) is made of all"),
        (Scaled, r"\(truediv\) is made of all of the batch's rows"),
        (Normed, r"is made of all of the batch's rows|is another one for each part"),
        (Interleaved, r"which is read behind the last layer of experts, has not the batch's rows in their order"),
        (Branching, r"the model computes otherwise with one part of it"),
    ],
)
def test_what_is_not_each_rows_own_is_refused(build: Callable[..., nn.Module], why: str) -> None:
    model, batch = build(4, 2), {"x": torch.randint(VOCABULARY, (6, 3))}
    gm, inputs, said = split(model, batch, 2)
    assert re.search(why, said)
    plain, _ = captured(model, batch)
    model.eval()
    torch.testing.assert_close(gm(*inputs)[0], plain(*inputs)[0])


def test_one_row_for_each_sequence_is_refused() -> None:
    _, _, said = split(Mixture(4, 1), {"x": torch.randint(VOCABULARY, (4, 1))}, 2)
    assert "one row for one expert" in said


# -- how many ------------------------------------------------------------------------------------------------------------


def turns(*forward: float, sends: float = 0.0, sums: float = 0.0) -> Turns:
    return Turns(forward=forward, backward=[0.0] * len(forward), sends=[sends] * (len(forward) - 1), sums=sums)


def test_parts_send_while_others_compute() -> None:
    assert seconds(turns(2.0, 2.0, 0.0, sends=2.0), 1) == 2 + 2 + 2 + 2
    assert seconds(turns(1.0, 1.0, 0.0, sends=1.0), 2) == 2 + 2 + 1, "all but the last exchange is hidden"
    assert seconds(turns(1.0, 0.0, 0.0, sends=4.0), 2) == 1 + 4 * 4, "the link is never free"
    both = Turns(forward=[1.0, 1.0, 0.0], backward=[2.0, 2.0, 0.0], sends=[1.0, 1.0], sums=5.0)
    assert seconds(both, 1) == (1 + 1 + 1 + 1) + (1 + 2 + 1 + 2)
    assert seconds(both, 2) == (2 + 2 + 1) + (1 + 2 + 2 + 2 + 2) + 5


SECONDS = st.floats(0.0, 10.0)


@settings(max_examples=100, deadline=None)
@given(st.lists(SECONDS, min_size=1, max_size=7), st.integers(1, 4), st.data())
def test_no_resource_is_used_twice_at_a_time(computing: list[float], parts: int, data: st.DataObject) -> None:
    size = len(computing)
    sends = data.draw(st.lists(SECONDS, min_size=size - 1, max_size=size - 1))
    found = seconds(Turns(forward=computing, backward=[0.0] * size, sends=sends, sums=0.0), parts)
    assert found >= parts * max(sum(computing), sum(sends)) * (1 - 1e-9)
    assert found <= parts * (sum(computing) + sum(sends)) * (1 + 1e-9)


def predicted(world: int, length: int, **experts: Any) -> tuple[Report, str]:
    torch._dynamo.reset()
    with torch.device("meta"):
        net = Net(2, 2048, 2816, 64)
    config = experts_on(3, None, experts=experts) | {"bf16": {"enabled": True}}
    report = dspass.explain(net, tokens(length), config=config, world_size=world, device="h100")
    return report, next(p.summary for p in report.passes if p.name == "split_batch")


@pytest.mark.parametrize("world", [8, 16])
def test_the_choice_is_about_as_fast_as_any(world: int) -> None:
    """The clock of the layers beside the cost model's of the whole step, with each number written down: within 2 %."""
    written = {n: predicted(world, 8192, batch_parts=n)[0].step_seconds for n in (1, 2, 4)}
    report, _ = predicted(world, 8192, batch_parts="auto")
    assert None not in written.values()
    assert report.step_seconds <= min(written.values()) * 1.02  # type: ignore[operator]


def test_one_part_where_nothing_overlaps_or_nothing_is_written() -> None:
    assert predicted(16, 64)[1] == "the batch is in one part"
    report = dspass.explain(
        Net(), tokens(64), config=experts_on(3, experts={"batch_parts": "auto"}), world_size=2, device="cpu"
    )
    said = next(p.summary for p in report.passes if p.name == "split_batch")
    assert said == "the batch is in one part: the device does not compute while it sends"
    assert "do not divide" in predicted(16, 63, batch_parts=2)[1]
    limited = predicted(16, 64, batch_parts=2, capacity_factor=1.0)[1]
    assert "which rows are beyond a capacity depends on all of it" in limited


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({}, "it acts with expert_parallel"),
        ({"pipeline": {"stages": 2}}, "it acts with expert_parallel"),
        ({"expert_parallel": {"enabled": True}, "pipeline": {"stages": 2}}, "micro-batches are parts"),
    ],
)
def test_a_number_that_acts_on_nothing_is_noted(more: dict[str, Any], reason: str) -> None:
    config = Config.load({"dspass": {"experts": {"batch_parts": 2}}, **more}).resolve_stage(True)
    (note,) = [n for n in config.ignored if n.key == "dspass.experts.batch_parts"]
    assert reason in note.reason
    config = Config.load({"dspass": {"experts": {"batch_parts": 2}}, "expert_parallel": {"enabled": True}})
    assert not config.resolve_stage(True).ignored


def test_containers_without_rows_stay_the_objects_that_they_are() -> None:
    collected: dict[str, Any] = {"logits": []}
    weight = nn.Parameter(torch.zeros(4, 2))
    given = ([torch.arange(4), collected], {"mask": torch.ones(4, 3), "weight": weight, "table": torch.ones(3)})
    (rows, same), named = divided(given, 4, 2)
    assert rows.tolist() == [0, 1]
    assert same is collected
    assert named["mask"].shape == (2, 3)
    assert named["weight"] is weight
    assert named["table"].shape == (3,)
    assert batch_size([torch.ones(4, 3), torch.arange(4), torch.ones(3), weight]) == 4
    assert batch_size([1, torch.tensor(2)]) is None


# -- on ranks ------------------------------------------------------------------------------------------------------------


def in_parts(number: int, stage: int = 3, size: int | None = None, **more: Any) -> dict[str, Any]:
    return on_ranks(stage, size, dspass={"experts": {"batch_parts": number}}, **more)


def batches(draw: torch.Generator, rank: int, call: int) -> Batch:
    """Each rank another number of tokens."""
    drawn = torch.randint(2, 61, (4, 5 + 2 * rank), generator=draw)
    return {"input_ids": drawn, "labels": drawn}


def smaller(draw: torch.Generator, rank: int, call: int) -> Batch:
    return {k: v[:3] if call == 1 else v for k, v in batches(draw, rank, call).items()}


def uneven(draw: torch.Generator, rank: int, call: int) -> Batch:
    return {k: v[: 4 - rank] for k, v in batches(draw, rank, call).items()}


@pytest.mark.parametrize(
    ("build", "ranks", "parts", "stage", "size"),
    [(functools.partial(qwen3, **AUXILIARY), 2, 2, 3, None), (deepseek, 4, 4, 2, 2)],
)
def test_trains_as_one_process(build: Any, ranks: int, parts: int, stage: int, size: int | None) -> None:
    results = run(ranks, trained, build, in_parts(parts, stage, size), batches=batches, steps=3, timeout=300)
    close(results)
    layers = 1 if build is deepseek else 2
    exchanges = {result["counts"]["all-to-all"] for result in results}
    assert exchanges == {layers * parts * 5}, (
        "of each layer and part counts, and rows there and back in both directions"
    )


@pytest.mark.parametrize(
    ("build", "ranks", "parts"), matrix([], [mixtral, qwen3, olmoe, deepseek, gpt_oss], [2, 4], [2])
)
def test_each_model_trains_as_one_process_for_twenty_steps(build: Any, ranks: int, parts: int) -> None:
    build = functools.partial(build, **(AUXILIARY if build is not deepseek else {}))
    close(run(ranks, trained, build, in_parts(parts), batches=batches, steps=20, timeout=400))


@pytest.mark.parametrize("inductor", [False, pytest.param(True, marks=WHOLE)])
def test_a_smaller_last_batch(inductor: bool) -> None:
    """One compilation for each size, and in one part where two do not divide it."""
    config = in_parts(2, gradient_accumulation_steps=2)
    results = run(
        2,
        trained,
        functools.partial(qwen3, **ONE),
        config,
        batches=smaller,
        steps=2,
        calls=2,
        inductor=inductor,
        timeout=300,
    )
    close(results)
    assert {result["graphs"] for result in results} == {2}


def test_ranks_with_other_numbers_of_parts_say_so() -> None:
    with pytest.raises(RankError, match=r"for 2 parts of the batch in 1 chunks, rank 1 for 1 in 1\. Give every rank"):
        run(2, trained, functools.partial(qwen3, **ONE), in_parts(2), batches=uneven, steps=2)
