"""Losses of micro-batches: rewritten graphs, run on each and summed, have the whole batch's loss and its gradients."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dspass.passes.combine_losses import Combination, CombinationError, combine_losses, loss_of
from dspass.passes.text import print_graph
from tests.models import MODELS
from tests.test_architectures import TOKENS, architecture

LENGTH, WIDTH, CLASSES = 3, 5, 7

Form = Callable[["Small", torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], Any]


class Small(nn.Module):
    """A layer on ``x[rows, LENGTH, WIDTH]`` and whatever loss is made of it, of labels and of a mask of ``[rows, LENGTH]``."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form = form
        self.layer, self.scale = nn.Linear(WIDTH, CLASSES), nn.Parameter(torch.tensor(0.3))
        self.register_buffer("classes", torch.rand(CLASSES) + 0.5)

    def forward(self, x: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor, items: torch.Tensor) -> Any:
        return self.form(self, torch.tanh(self.layer(x)), labels, mask, items)


@dataclass
class Split:
    """A model whose capture with a micro-batch is rewritten."""

    gm: fx.GraphModule
    combination: Combination
    sources: list[Any]  # of each placeholder: its place among the batch's values, or the tensor itself
    micro_batches: int

    def totals(self, batch: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return self.combination.values(self._inputs(batch))

    def losses(self, batch: Sequence[torch.Tensor], totals: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """One a micro-batch."""
        place = self.gm.graph.output_node().args[0].index(self.combination.loss)
        parts = zip(*(_chunks(value, self.micro_batches) for value in batch), strict=True)
        return [self.gm(*self._inputs([v.clone() for v in part]), *totals)[place] for part in parts]

    def _inputs(self, batch: Sequence[torch.Tensor]) -> list[Any]:
        return inputs_of(self.sources, batch)


def inputs_of(sources: Sequence[Any], batch: Sequence[torch.Tensor]) -> list[Any]:
    return [batch[source] if isinstance(source, int) else source for source in sources]


def _chunks(value: torch.Tensor, micro_batches: int) -> Sequence[torch.Tensor]:
    return value.chunk(micro_batches) if value.dim() else [value] * micro_batches


def captured(
    model: nn.Module, names: Sequence[str] | None, batch: Sequence[torch.Tensor]
) -> tuple[fx.GraphModule, list[Any]]:
    """The graph of a call, and of each placeholder its place in the batch, or the tensor that it was given."""
    found: list[tuple[fx.GraphModule, list[Any]]] = []

    def keep(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        found.append((gm, [next((i for i, v in enumerate(batch) if v is value), value) for value in inputs]))
        return gm.forward

    torch._dynamo.reset()
    ignored = {getattr(logging.Logger, name) for name in ("warning_once", "warning") if hasattr(logging.Logger, name)}
    model(*batch) if names is None else model(**dict(zip(names, batch, strict=True)))  # what it does once, it does here
    with torch._dynamo.config.patch(ignore_logger_methods=ignored):
        compiled = torch.compile(model, backend=keep, fullgraph=True, dynamic=False)
        compiled(*batch) if names is None else compiled(**dict(zip(names, batch, strict=True)))
    return found[0]


def split(model: nn.Module, names: Sequence[str] | None, batch: Sequence[torch.Tensor], micro_batches: int) -> Split:
    few = [_chunks(value, micro_batches)[0].clone() for value in batch]
    gm, sources = captured(model, names, few)
    whole, all_sources = captured(model, names, batch)
    assert [s if isinstance(s, int) else id(s) for s in sources] == [
        s if isinstance(s, int) else id(s) for s in all_sources
    ]
    loss = loss_of(gm.graph)
    shape, dtype = loss.meta["example_value"].shape, loss.meta["example_value"].dtype
    combination = combine_losses(gm.graph, loss, whole.graph, micro_batches)
    gm.graph.lint()
    gm.recompile()
    value = combination.loss.meta["example_value"]
    assert (value.shape, value.dtype) == (shape, dtype)
    assert all("example_value" in node.meta for node in gm.graph.find_nodes(op="placeholder"))
    return Split(gm, combination, sources, micro_batches)


def gradients(model: nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    params = list(model.parameters())
    found = torch.autograd.grad(loss, params, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(params, found, strict=True)]


def assert_equal(
    model: nn.Module, names: Sequence[str] | None, made: Split, batch: Sequence[torch.Tensor], within: float = 1e-6
) -> None:
    copies = [value.clone() for value in batch]  # models may write into their inputs
    answer = model(*copies) if names is None else model(**dict(zip(names, copies, strict=True)))
    whole = answer if isinstance(answer, torch.Tensor) else answer[0]
    copies = [value.clone() for value in batch]
    totals = made.totals(batch)
    assert all(torch.equal(value, copy) for value, copy in zip(batch, copies, strict=True))
    parts = sum(made.losses(batch, totals))
    assert isinstance(parts, torch.Tensor)
    torch.testing.assert_close(parts, whole, rtol=within, atol=within, equal_nan=True)
    for part, wanted in zip(gradients(model, parts), gradients(model, whole), strict=True):
        torch.testing.assert_close(part, wanted, rtol=within, atol=within, equal_nan=True)


def mean_of_rows(m: Small, h: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor, items: torch.Tensor) -> Any:
    return h.square().mean(-1).mean()


def counted(m: Small, h: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor, items: torch.Tensor) -> Any:
    return F.cross_entropy(h.view(-1, CLASSES), labels.view(-1))


def per_mask(m: Small, h: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor, items: torch.Tensor) -> Any:
    each = F.cross_entropy(h.transpose(1, 2), labels, reduction="none")
    return (each * mask).sum() / mask.sum().clamp(min=1)


def balance(m: Small, h: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor, items: torch.Tensor) -> Any:
    shares = F.one_hot(h.argmax(-1), CLASSES).float().mean((0, 1))
    return counted(m, h, labels, mask, items) + 0.1 * CLASSES * (shares * h.softmax(-1).mean((0, 1))).sum()


def in_place(m: Small, h: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor, items: torch.Tensor) -> Any:
    shifted = labels.new_full(labels.shape, -100)
    shifted[:, :-1] = labels[:, 1:]
    shifted[mask == 0] = -100
    loss = F.cross_entropy(h.flatten(0, 1), shifted.view(-1), label_smoothing=0.1)
    loss += 0.01 * m.layer.weight.square().sum()
    return loss


def _mask_written(m: Small, h: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor, items: torch.Tensor) -> Any:
    kept = mask.sum()
    kept.clamp_(min=2)
    return (h.square().mean(-1) * mask / kept).sum()


def _labels_written(m: Small, h: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor, items: torch.Tensor) -> Any:
    labels[mask == 0] = 1
    return (h.square().mean(-1) * labels).sum() / (labels.sum() + 300)


def _hidden(h: torch.Tensor) -> torch.Tensor:
    return h.flatten(0, 1)


#: Each a model's loss; micro-batches have other counts of labels and masks.
FORMS: dict[str, Form] = {
    "mean": mean_of_rows,
    "mean of rows first": lambda m, h, labels, mask, items: h.square().mean(0).sum(),
    "mse": lambda m, h, labels, mask, items: F.mse_loss(h, torch.ones_like(h)),
    "smooth l1, sum by the batch's size": lambda m, h, labels, mask, items: (
        F.smooth_l1_loss(h, h.detach() + 1, reduction="sum") / h.shape[0]
    ),
    "sum by a number of elements": lambda m, h, labels, mask, items: h.square().sum() * (1 / labels.numel()),
    "rows by the batch's size": lambda m, h, labels, mask, items: (h.square().mean(-1) / labels.numel()).sum(),
    "cross entropy": counted,
    "cross entropy of classes that weigh": lambda m, h, labels, mask, items: F.cross_entropy(
        _hidden(h), labels.flatten(), weight=m.classes
    ),
    "label smoothing": lambda m, h, labels, mask, items: F.cross_entropy(
        _hidden(h), labels.flatten(), label_smoothing=0.2
    ),
    "label smoothing of classes that weigh": lambda m, h, labels, mask, items: F.cross_entropy(
        _hidden(h), labels.flatten(), m.classes, None, -100, None, "mean", 0.2
    ),
    "class probabilities": lambda m, h, labels, mask, items: F.cross_entropy(
        _hidden(h), F.one_hot(labels.flatten().clamp(min=0), CLASSES).float()
    ),
    "nll": lambda m, h, labels, mask, items: F.nll_loss(h.log_softmax(-1).transpose(1, 2), labels, ignore_index=-100),
    "sum of cross entropies": lambda m, h, labels, mask, items: F.cross_entropy(
        _hidden(h), labels.flatten(), reduction="sum"
    ),
    "kl_div": lambda m, h, labels, mask, items: F.kl_div(
        h.log_softmax(-1), h.detach().softmax(-1), reduction="batchmean"
    ),
    "bce": lambda m, h, labels, mask, items: F.binary_cross_entropy_with_logits(
        h[..., 0], mask, pos_weight=m.classes[0]
    ),
    "mask": per_mask,
    "mask, rows divided": lambda m, h, labels, mask, items: (h.square().mean(-1) * mask / mask.sum()).sum(),
    "mask, clamped in place": _mask_written,
    "labels that are written": _labels_written,
    "mean of a mask": lambda m, h, labels, mask, items: (h.square().mean(-1) * mask).mean() / (mask.mean() + 1e-3),
    "rows of learned weight, divided": lambda m, h, labels, mask, items: (
        h.square().mean(-1) * mask / (mask.sum() + 1) * m.scale
    ).sum(),
    "a number by name": lambda m, h, labels, mask, items: torch.add(h.mean(), h.square().sum(), alpha=1 / h.shape[0]),
    "a number as a tensor": lambda m, h, labels, mask, items: h.square().sum() / torch.tensor(h.shape[0]),
    "a sum that begins with zeros": lambda m, h, labels, mask, items: (
        sum([F.cross_entropy(h[:, i], labels[:, i], reduction="sum") for i in range(LENGTH)], h.new_zeros(()))
        / (labels != -100).type_as(h).sum()
    ),
    "number of items": lambda m, h, labels, mask, items: h.square().sum() / items,
    "several": lambda m, h, labels, mask, items: (
        counted(m, h, labels, mask, items) + 0.5 * mean_of_rows(m, h, labels, mask, items) - h[..., 0].sum() + 1
    ),
    "a list of losses": lambda m, h, labels, mask, items: torch.stack(
        [counted(m, h, labels, mask, items), mean_of_rows(m, h, labels, mask, items).float()]
    ).mean(),
    "losses of learned weights": lambda m, h, labels, mask, items: (
        torch.exp(-m.scale) * counted(m, h, labels, mask, items) + m.scale
    ),
    "penalty": lambda m, h, labels, mask, items: sum(
        [per_mask(m, h, labels, mask, items), 0.1 * m.layer.weight.square().sum()]
    ),
    "in place": in_place,
    "where": lambda m, h, labels, mask, items: torch.where(
        mask.sum() > 2, per_mask(m, h, labels, mask, items), 0.5 * mean_of_rows(m, h, labels, mask, items)
    ),
    "labels from labels' mean": lambda m, h, labels, mask, items: (h[..., 0] - (mask - mask.mean())).square().mean(),
}

REFUSED: dict[str, tuple[Form, str]] = {
    "balance of experts": (balance, r"mul\(...\) .*softmax.* multiplies two values"),
    "logarithm": (
        lambda m, h, labels, mask, items: counted(m, h, labels, mask, items).exp(),
        r"= exp\(...\).*not linear",
    ),
    "contrastive": (
        lambda m, h, labels, mask, items: F.cross_entropy(h[:, 0] @ h[:, 1].t(), torch.arange(h.shape[0])),
        "rows",
    ),
    "softmax over the batch": (lambda m, h, labels, mask, items: h.softmax(0).square().mean(), "other rows"),
    "pairs that are broadcast": (
        lambda m, h, labels, mask, items: F.l1_loss(h[..., 0].mean(1), mask[:, :1], reduction="mean"),
        "other rows",
    ),
    "count of a parameter": (
        lambda m, h, labels, mask, items: h.sum() / (h > 0).sum(),
        "counts what depends on parameters",
    ),
    "random count": (
        lambda m, h, labels, mask, items: (h.square().mean(-1) * (kept := torch.rand_like(mask))).sum() / kept.sum(),
        "drawn at random",
    ),
    "variance over the batch": (lambda m, h, labels, mask, items: h.var(0).mean(), "= var"),
    "first row": (lambda m, h, labels, mask, items: h[0].mean(), "= getitem.*leaves others"),
    "clamped by the batch's size": (
        lambda m, h, labels, mask, items: (h.clamp(max=0.1 * h.shape[0])).mean(),
        "other rows",
    ),
    "centred": (lambda m, h, labels, mask, items: (h - h.mean(0)).square().mean(), "= mean.*parameters"),
}


def batch_of(seed: int, rows: int, kept: float) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (rows, LENGTH), generator=draw)
    mask = torch.rand(rows, LENGTH, generator=draw) < kept
    mask &= torch.rand(rows, 1, generator=draw) < 0.8  # some rows, so some micro-batches, count nothing
    return [
        torch.randn(rows, LENGTH, WIDTH, generator=draw),
        labels.masked_fill(~mask, -100),
        mask.float(),
        torch.tensor(17.0),
    ]


@functools.cache
def small(form: str) -> tuple[Small, Split]:
    """In turns with two rows a micro-batch, and with one."""
    torch.manual_seed(0)
    model, micro_batches = Small(FORMS[form]), 3 if list(FORMS).index(form) % 2 else 6
    return model, split(model, None, batch_of(0, 6, 0.5), micro_batches)


@pytest.mark.parametrize("form", FORMS)
def test_micro_batches_add_up(form: str) -> None:
    model, made = small(form)
    for seed in range(3):
        assert_equal(model, None, made, batch_of(seed, 6, 0.5))


@settings(max_examples=150, deadline=None)
@given(
    form=st.sampled_from(sorted(FORMS)),
    seed=st.integers(0, 10_000),
    kept=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
)
def test_micro_batches_add_up_whatever_they_count(form: str, seed: int, kept: float) -> None:
    model, made = small(form)
    assert_equal(model, None, made, batch_of(seed, 6, kept))


@pytest.mark.parametrize("form", ["cross entropy", "mask", "in place", "label smoothing of classes that weigh"])
def test_a_count_that_is_one_off_is_seen(form: str) -> None:
    model, made = small(form)
    batch = batch_of(1, 6, 1.0)
    batch[1][:2, :2], batch[2][:2, :2] = -100, 0.0
    totals = made.totals(batch)
    parts = sum(made.losses(batch, [totals[0] + 1, *totals[1:]]))
    assert not torch.isclose(parts, model(*batch), rtol=1e-4)
    mean = sum(model(*part) for part in zip(*(_chunks(v, 3) for v in batch), strict=True)) / 3
    assert not torch.isclose(mean, model(*batch), rtol=1e-4)


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_add_up_is_refused_unless_a_mean_is_asked_for(case: str) -> None:
    form, why = REFUSED[case]
    model, batch = Small(form), batch_of(0, 6, 1.0)
    few = [_chunks(value, 3)[0].clone() for value in batch]
    gm, sources = captured(model, None, few)
    whole, _ = captured(model, None, batch)
    before, loss = print_graph(gm.graph), loss_of(gm.graph)
    with pytest.raises(CombinationError, match=why) as refused:
        combine_losses(gm.graph, loss, whole.graph, 3)
    assert '"loss_reduction": "mean"' in str(refused.value)
    assert "test_combine_losses.py" in str(refused.value)
    assert print_graph(gm.graph) == before
    combination = combine_losses(gm.graph, loss, None, 3, "mean")
    gm.recompile()
    torch.manual_seed(3)
    (found,) = gm(*inputs_of(sources, few))
    torch.manual_seed(3)
    torch.testing.assert_close(found, model(*few) / 3)
    assert combination.totals == ()
    assert combination.values([]) == []


def test_one_micro_batch_and_a_model_that_branches_on_its_size() -> None:
    model, batch = Small(counted), batch_of(0, 4, 1.0)
    gm, _ = captured(model, None, batch)
    before = print_graph(gm.graph)
    assert combine_losses(gm.graph, loss_of(gm.graph), None, 1).loss is loss_of(gm.graph)
    assert print_graph(gm.graph) == before
    model = Small(lambda m, h, labels, mask, items: h.mean() if h.shape[0] > 2 else h.square().mean())
    few, _ = captured(model, None, [_chunks(v, 2)[0].clone() for v in batch])
    whole, _ = captured(model, None, batch)
    with pytest.raises(CombinationError, match="no branch depends on the batch's size"):
        combine_losses(few.graph, loss_of(few.graph), whole.graph, 2)


def test_a_model_that_broadcasts_to_its_batch_unless_that_is_one_row() -> None:
    """As models of ``transformers`` do with positions."""

    def form(m: Small, h: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor, items: torch.Tensor) -> Any:
        kept = (m.classes[None, :LENGTH] > m.classes.median()).float()
        weights = kept
        if kept.shape[0] != h.shape[0]:
            weights = weights.expand(h.shape[0], -1)
        each = h.square().mean(-1)
        return (each * weights).sum() / (weights.sum() + 1) + (each * kept).mean() / (kept.sum() + 1)

    torch.manual_seed(0)
    model, batch = Small(form), batch_of(0, 4, 0.5)
    made = split(model, None, batch, 4)
    assert_equal(model, None, made, batch_of(1, 4, 0.5))


def test_parts_that_are_answered_too_add_up_where_they_can() -> None:
    def form(m: Small, h: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor, items: torch.Tensor) -> Any:
        first, second = counted(m, h, labels, mask, items), h.square().mean()
        return first + second, first, second, (h > 0).sum(), h.detach().square().mean().log(), m.classes.sum()

    torch.manual_seed(0)
    model, batch = Small(form), batch_of(1, 4, 0.5)
    made = split(model, None, batch, 2)
    assert_equal(model, None, made, batch)
    totals = made.totals(batch)
    parts = [[v[i : i + 2] if v.dim() else v for v in batch] for i in (0, 2)]
    found = [made.gm(*made._inputs(part), *totals) for part in parts]
    answers = model(*batch)
    adds = [node in made.combination.adds for node in made.gm.graph.output_node().args[0]]
    assert adds == [True, True, True, True, False, True]
    for place in (0, 1, 2, 3, 5):
        torch.testing.assert_close(found[0][place] + found[1][place], answers[place])
        assert found[0][place].requires_grad == (place == 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_loss_keeps_its_precision_and_a_sum_of_many_is_not_too_large(dtype: torch.dtype) -> None:
    def form(m: Small, h: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor, items: torch.Tensor) -> Any:
        return F.cross_entropy(600 * _hidden(h).to(dtype), labels.flatten()) + h.to(dtype).mean()

    torch.manual_seed(0)
    model, batch = Small(form), batch_of(1, 200, 1.0)
    made = split(model, None, batch, 2)
    assert made.combination.loss.meta["example_value"].dtype == dtype
    assert made.combination.totals[0].meta["example_value"].dtype == torch.float32
    found = sum(made.losses(batch, made.totals(batch)))
    wanted = counted(model, 600 * model.layer(batch[0]).tanh(), *batch[1:]) + model.layer(batch[0]).tanh().mean()
    torch.testing.assert_close(found.float(), wanted, rtol=1e-2, atol=0)
    if dtype == torch.bfloat16:  # the fp16 mean of torch itself is infinite here
        assert_equal(model, None, made, batch, within=2e-2)


def test_the_loss_is_the_one_output_that_depends_on_parameters() -> None:
    def answers(form: Form) -> fx.GraphModule:
        return captured(Small(form), None, batch_of(0, 2, 1.0))[0]

    assert loss_of(answers(lambda m, h, labels, mask, items: (mask.mean(), h.mean(), h)).graph).name == "mean_1"
    with pytest.raises(CombinationError, match=r"has none: it answers %\w+ torch.float32 \[2, 3, 7\]"):
        loss_of(answers(lambda m, h, labels, mask, items: (h, mask.mean())).graph)
    with pytest.raises(CombinationError, match=r"has 2: it answers %mean torch.float32 \[\], %sum_1"):
        loss_of(answers(lambda m, h, labels, mask, items: (h.mean(), h.sum())).graph)


def ids(draw: torch.Generator, rows: int) -> torch.Tensor:
    return torch.randint(1, TOKENS, (rows, 12), generator=draw)


def shallow(model: nn.Module) -> nn.Module:
    """With its first layers only: what is captured is the loss's way."""
    for name, module in list(model.named_modules()):
        if name.endswith((".h", ".layers", ".block")):
            del module[1:]  # type: ignore[operator]
    return model


def language(draw: torch.Generator, rows: int) -> dict[str, torch.Tensor]:
    """Sequences of other lengths: padding is neither looked at nor counted."""
    tokens, lengths = ids(draw, rows), torch.randint(3, 12, (rows, 1), generator=draw)
    mask = torch.arange(12) < lengths
    return {"input_ids": tokens, "attention_mask": mask.long(), "labels": tokens.masked_fill(~mask, -100)}


def translation(draw: torch.Generator, rows: int) -> dict[str, torch.Tensor]:
    batch = language(draw, rows)
    return {"input_ids": ids(draw, rows), "labels": batch["labels"]}


def items(draw: torch.Generator, rows: int) -> dict[str, torch.Tensor]:
    """As ``transformers.Trainer`` calls a model whose gradients it accumulates."""
    return {**language(draw, rows), "num_items_in_batch": torch.tensor(41)}


def pictures(draw: torch.Generator, rows: int) -> dict[str, torch.Tensor]:
    labels = torch.randint(0, 5, (rows,), generator=draw)
    labels[0] = -100
    return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=draw), "labels": labels}


@pytest.mark.parametrize(
    ("name", "batches", "micro_batches"),
    [("gpt2", items, 2), ("llama", language, 4), ("t5", translation, 2), ("vit", pictures, 4)],
)
def test_models_of_transformers(
    name: str, batches: Callable[[torch.Generator, int], dict[str, torch.Tensor]], micro_batches: int
) -> None:
    torch.manual_seed(0)
    model = shallow(architecture(name)[0]())
    draw = torch.Generator().manual_seed(1)
    batch = batches(draw, 4)
    made = split(model, list(batch), list(batch.values()), micro_batches)
    for values in (batch, batches(draw, 4)):
        assert_equal(model, list(batch), made, list(values.values()))
    assert any("targets" in line or "sum over rows" in line for line in made.combination.said)
    totals = made.totals(list(batch.values()))
    if totals:
        shifted = batch["labels"][:, 1:] if name in ("gpt2", "llama") else batch["labels"]
        assert totals == [torch.tensor(float((shifted != -100).sum()))]


def mixtral(**more: Any) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=TOKENS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4, use_cache=False, **more,
        )
    )  # fmt: skip


def test_a_mixture_of_experts_adds_up_though_experts_look_at_other_rows() -> None:
    torch.manual_seed(0)
    batch = translation(torch.Generator().manual_seed(1), 4)
    model = shallow(mixtral())
    assert_equal(model, list(batch), split(model, list(batch), list(batch.values()), 2), list(batch.values()))


def test_layers_that_look_at_other_rows_are_the_models() -> None:
    torch.manual_seed(0)
    model = MODELS["batchnorm"][0]()
    batch = [torch.randn(6, 10), torch.tensor([0, 1, 2, -100, -100, 1])]
    made = split(model, None, batch, 3)
    assert made.totals(batch) == [torch.tensor(4.0)]
    parts = [loss * 4 for loss in made.losses(batch, made.totals(batch))]
    wanted = [
        F.cross_entropy(model.head(F.relu(model.norm(model.conv(x[:, None]))).flatten(1)), y, reduction="sum")
        for x, y in zip(*(v.chunk(3) for v in batch), strict=True)
    ]
    torch.testing.assert_close(parts, wanted)


def test_the_rewritten_loss_as_text() -> None:
    model, batch = Small(counted), batch_of(0, 4, 1.0)
    made = split(model, None, batch, 2)
    assert print_graph(made.gm.graph).splitlines()[4:] == [
        "%whole_batch_0 : f32[] = input",
        "%linear : f32[2,3,7] = linear(%l_x_, %l_self_modules_layer_parameters_weight_, "
        "%l_self_modules_layer_parameters_bias_)",
        "%tanh : f32[2,3,7] = tanh(%linear)",
        "%view : f32[6,7] = view(%tanh, -1, 7)",
        "%view_1 : i64[6] = view(%l_labels_, -1)",
        "%cross_entropy_1 : f32[6] = cross_entropy(%view, %view_1, ignore_index=-100, reduction='none', "
        "label_smoothing=0.0)",
        "%sum_1 : f32[] = sum(%cross_entropy_1, dtype=torch.float32)",
        "%truediv : f32[] = truediv(%sum_1, %whole_batch_0)",
        "return [%truediv]",
    ]
    assert made.combination.of_batch is not None
    assert print_graph(made.combination.of_batch.graph).splitlines()[4:] == [
        "%view_1 : i64[12] = view(%l_labels_, -1)",
        "%count_targets : ? = count_targets(%view_1, None, -100, torch.float32)",
        "return [%count_targets]",
    ]
    assert made.combination.said == ("%cross_entropy: a sum over the batch's count of targets",)
