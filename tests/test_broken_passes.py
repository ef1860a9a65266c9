"""The suite fails when a pass is broken: each mistake in :mod:`tests.broken` is caught by the check named."""

from __future__ import annotations

import pytest

from dspass.passes.base import Pass, PassError, check_order
from dspass.passes.pipeline import DEFAULT
from tests import broken
from tests.graphs import CheckError, Toy, capture, check_numbers, check_step, run_pipeline
from tests.test_passes import toy_of

#: The broken pass, the toy that it goes wrong on (and bytes of a bucket), and what catches it: the runner
#: (PassError) or a check of the suite.
MISTAKES: list[tuple[type[Pass], str, type[Exception], str]] = [
    (broken.LeftAsTheyArrive, "routed", CheckError, r"the (loss|gradient of \w+) on rank \d differs"),
    (broken.JoinedInAnotherOrder, "parts_routed", CheckError, r"the (loss|gradient of \w+) on rank \d differs"),
    (broken.OnePartTwice, "parts_routed", CheckError, r"the (loss|gradient of \w+) on rank \d differs"),
    (broken.NotSentBack, "routed", ValueError, r"do not go with positions"),
    (broken.ProbabilitiesAveraged, "balanced", CheckError, r"the (loss|gradient of [\w.]+) on rank \d differs"),
    (broken.WaitsTooSoon, "routed", PassError, r"'hide_exchanges' left a graph that does not lint"),
    (broken.RowsReadTooSoon, "routed", CheckError, r"is read before it has arrived"),
    (broken.OneUseForgotten, "tied", CheckError, r"the gradient of embed.weight on rank 0 differs"),
    (broken.KeysExchanged, "early_views", CheckError, r"differs|something else than its shards"),
    (broken.WishesForgotten, "wished", CheckError, r"(keep|recompute) of \w+ is not honoured"),
    (broken.WishesExchanged, "wished", CheckError, r"(keep|recompute) of \w+ is not honoured"),
    (broken.MarksLeft, "wished", CheckError, r"marks are left in the graph"),
    (broken.ViewsKept, "early_views/64", CheckError, r"buckets are gathered that are not used soon"),
    (
        broken.ViewSaved,
        "mlp",
        CheckError,
        r"permute\w* leaves the graph and keeps a gathered parameter alive",
    ),
    (broken.GatheredTooLate, "mlp", PassError, r"'zero_gather' left a graph that does not lint"),
    (broken.WaitMissing, "mlp", AssertionError, r"getitem\w* is read by %permute"),
    (broken.GatheredAtTheTop, "early_views/64", CheckError, r"buckets are gathered that are not used soon"),
    (broken.GatheredForEachUse, "tied", CheckError, r"gathered more than once"),
    (broken.ItemsExchanged, "early_views", CheckError, r"differs"),
    (broken.BucketLosesOne, "mlp", IndexError, r"list index out of range"),
    (broken.StartedTooLate, "mlp", CheckError, r"starts too late: nothing is computed until its wait"),
    (broken.StartedTooEarly, "mlp", CheckError, r"buckets are gathered that are not used soon"),
    (broken.StartedAfterItsWait, "mlp", PassError, r"'prefetch_gathers' left a graph that does not lint"),
    (broken.ReducedTwice, "mlp", CheckError, r"each gradient is reduced once, and these are not: .*: 2"),
    (broken.NotReduced, "mlp", CheckError, r"each gradient is reduced once, and these are not"),
    (
        broken.ValueForgotten,
        "mlp",
        PassError,
        r"'zero_reduce' left node 'reduce_wait\w*' without meta\['val'\]",
    ),
    (broken.SummedNotAveraged, "mlp", CheckError, r"the gradient of .* differs"),
    (broken.NeverWaitedFor, "mlp", CheckError, r"reduce_start\w* is waited for 0 times"),
    (broken.ReadBeforeItsWait, "mlp", CheckError, r"reduce_start\w* is read before it has arrived"),
    (broken.BucketStartsEarly, "mlp", PassError, r"'bucket_reductions' left a graph that does not lint"),
    (broken.ShardsExchanged, "hosted/100000", CheckError, r"differs"),
    (broken.KeptUnderAnotherName, "in_node", CheckError, r"is kept from something else than its whole"),
    (broken.PartsExchanged, "quantised_early", CheckError, r"differs"),
    (broken.CodesSummed, "quantised", CheckError, r"the gradient of .* differs"),
    (broken.CodesReadTooSoon, "quantised_routed", CheckError, r"is read before it has arrived"),
    (broken.CodesExchanged, "few_bits", CheckError, r"differs"),
    (broken.ErrorsExchanged, "quantised_fed_back", CheckError, r"the error of another gradient"),
    (broken.HostValuesExchanged, "offloaded", CheckError, r"differs"),
    (broken.WrongRowsLookedUp, "stored", CheckError, r"differs"),
    (broken.RoundingsMixed, "rounded", CheckError, r"differs"),
    (broken.BiasForgotten, "mlp", CheckError, r"differs"),
    (broken.NotTransposed, "early_views", CheckError, r"differs"),
    (broken.GradientsExchanged, "early_views", CheckError, r"the gradient of .* differs"),
]


def pipeline_with(toy: Toy, cls: type[Pass]) -> list[Pass]:
    """The toy's pipeline with ``cls`` in the place of the pass that it is a broken version of."""
    return [cls(**item.options()) if issubclass(cls, type(item)) else item for item in toy.passes]


@pytest.mark.parametrize(
    ("cls", "name", "error", "message"), MISTAKES, ids=lambda value: getattr(value, "__name__", None)
)
def test_a_broken_pass_is_caught(cls: type[Pass], name: str, error: type[Exception], message: str) -> None:
    toy_name, _, bucket_bytes = name.partition("/")
    toy = toy_of(toy_name, 2, int(bucket_bytes or 256))
    check_step(toy)  # the right pipeline passes
    passes = pipeline_with(toy, cls)
    if "captured" in cls.where:  # what comes behind it is made by AOTAutograd
        toy = capture(toy_name, config=toy.config, passes=passes)
    with pytest.raises(error, match=f"(?s){message}"):
        check_step(toy, passes)


def test_each_pass_has_a_broken_version() -> None:
    tried = {cls for cls, *_ in MISTAKES}
    assert tried == {v for v in vars(broken).values() if isinstance(v, type) and v.__module__ == broken.__name__}
    for cls in DEFAULT:
        assert any(issubclass(mistake, cls) for mistake in tried), f"no broken version of {cls.name}"


@pytest.mark.parametrize("cls", DEFAULT, ids=lambda cls: cls.name)
def test_a_pass_that_is_left_out_breaks_no_numbers_or_is_refused(cls: type[Pass]) -> None:
    """Dropping a pass may cost memory or time. Where it would cost the numbers the list is refused, or
    nothing runs."""
    toy = toy_of("tied")
    passes = [p for p in toy.passes if type(p) is not cls]
    try:
        check_order(passes)
    except PassError:
        return
    check_numbers(toy, run_pipeline(toy, passes))
