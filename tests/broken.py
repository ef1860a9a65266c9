"""Deliberately broken versions of every pass, each with one mistake that somebody could make.

``tests/test_broken_passes.py`` puts each in the place of the right one and shows that
:func:`tests.graphs.check_step`, which the suite runs on the right pipeline, then fails, and by which of its
checks.
"""

from __future__ import annotations

import itertools
import operator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.fx as fx

from dspass.passes.base import PassContext
from dspass.passes.bucket_gathers import BucketGathers
from dspass.passes.bucket_reductions import BucketReductions
from dspass.passes.divide_experts import DivideExperts
from dspass.passes.exchange_rows import ExchangeRows
from dspass.passes.expose_parameters import ExposeParameters
from dspass.passes.gather_in_node import GatherInNode
from dspass.passes.global_aux_loss import GlobalAuxLoss
from dspass.passes.hide_exchanges import HideExchanges
from dspass.passes.honour_wishes import HonourWishes
from dspass.passes.nodes import (
    REDUCE_GRAD,
    calls,
    exchange_wait,
    first_user,
    gather_start,
    gather_wait,
    insert_pair,
    items_of,
    keep_in_node,
    positions,
    reduce_start,
    reduce_wait,
    rounding_errors,
    wait_of,
)
from dspass.passes.offload_parameters import OffloadParameters
from dspass.passes.offload_saved import OffloadSaved
from dspass.passes.onednn_products import OnednnProducts
from dspass.passes.packed import DEQUANTISE, SUM
from dspass.passes.prefetch_gathers import PrefetchGathers
from dspass.passes.quantise_exchanges import QuantiseExchanges
from dspass.passes.quantise_gathers import QuantiseGathers
from dspass.passes.quantise_reductions import QuantiseReductions
from dspass.passes.quantise_saved import QUANTISE as QUANTISE_SAVED
from dspass.passes.quantise_saved import QuantiseSaved
from dspass.passes.quantised_products import QuantisedProducts
from dspass.passes.release_gathered import ReleaseGathered
from dspass.passes.share_roundings import ShareRoundings
from dspass.passes.split_batch import SplitBatch
from dspass.passes.zero_gather import ZeroGather
from dspass.passes.zero_reduce import ZeroReduce
from dspass.runtime.fake_quantise import FAKE_QUANTISE
from dspass.runtime.host import offload_wait
from dspass.runtime.linear import LINEAR
from dspass.runtime.wish import KEEP, RECOMPUTE, WISH


@dataclass(frozen=True, kw_only=True)
class LeftAsTheyArrive(DivideExperts):
    """Rows are computed in the order that they arrive in, by rank and not by expert."""

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        graph = super().run(graph, ctx)
        for places in calls(graph, torch.ops.dspass.arrival_positions):
            count = places.args[1]
            with graph.inserting_before(places):
                numbers = graph.call_function(torch.arange, (count,), {"dtype": torch.int32})
                same = graph.call_method("view", (numbers, -1, 1))
            places.replace_all_uses_with(same)
        return graph


@dataclass(frozen=True, kw_only=True)
class JoinedInAnotherOrder(SplitBatch):
    """The parts are joined in another order than the batch has them in."""

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        graph = super().run(graph, ctx)
        joined = calls(graph, torch.cat)[0]
        parts, dim = joined.args
        joined.args = (list(reversed(cast(Any, parts))), dim)
        return graph


@dataclass(frozen=True, kw_only=True)
class OnePartTwice(SplitBatch):
    """Each part is the batch's first."""

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        graph = super().run(graph, ctx)
        for node in graph.find_nodes(op="call_method", target="narrow"):
            node.update_arg(2, 0)
        return graph


@dataclass(frozen=True, kw_only=True)
class NotSentBack(DivideExperts):
    """What comes out of the experts goes on to other ranks, as if it had yet to go in."""

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        graph = super().run(graph, ctx)
        for back in calls(graph, torch.ops.dspass.combine_rows):
            rows, splits, size, key = back.args
            with graph.inserting_before(back):
                sent = graph.call_function(torch.ops.dspass.dispatch_rows, (rows, splits, size, key))
            back.replace_all_uses_with(sent)
            graph.erase_node(back)
        return graph


@dataclass(frozen=True, kw_only=True)
class ProbabilitiesAveraged(GlobalAuxLoss):
    """What shares are multiplied with is averaged in their place: it has a gradient, and each rank its own."""

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        graph = super().run(graph, ctx)
        for mean in calls(graph, torch.ops.dspass.mean_over_ranks):
            share, key = mean.args
            (product,) = mean.users
            (other,) = (n for n in product.all_input_nodes if n is not mean)
            with graph.inserting_before(product):
                wrong = graph.call_function(torch.ops.dspass.mean_over_ranks, (other, key))
            product.replace_input_with(other, wrong)
            product.replace_input_with(mean, share)
            graph.erase_node(mean)
        return graph


@dataclass(frozen=True, kw_only=True)
class WaitsTooSoon(HideExchanges):
    """What is behind a wait is moved before it, whatever it needs."""

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        for wait in calls(graph, exchange_wait):
            item = min(wait.users)
            reader = next(iter(item.users))
            if reader.op != "output":
                wait.prepend(reader)
        return super().run(graph, ctx)


@dataclass(frozen=True, kw_only=True)
class RowsReadTooSoon(ExchangeRows):
    """What was sent is taken before it has arrived."""

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        graph = super().run(graph, ctx)
        for wait in calls(graph, exchange_wait):
            start = wait.args[0]
            wait.replace_all_uses_with(start)
            graph.erase_node(wait)
        return graph


@dataclass(frozen=True, kw_only=True)
class OneUseForgotten(ExposeParameters):
    """A parameter with two uses keeps the gradient of one of them."""

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        for node in calls(graph, torch.ops.aten.add.Tensor):
            if all(isinstance(a, fx.Node) and a.target is REDUCE_GRAD for a in node.args):
                node.replace_all_uses_with(node.args[0])
        return super().run(graph, ctx)


@dataclass(frozen=True, kw_only=True)
class KeysExchanged(ExposeParameters):
    """Two parameters of one shape are taken for each other."""

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        graph = super().run(graph, ctx)
        exposed: dict[tuple[int, ...], fx.Node] = {}
        for node in graph.find_nodes(op="placeholder"):
            if "dspass_gathered" in node.meta:
                other = exposed.setdefault(tuple(node.meta["val"].shape), node)
                if other is not node:
                    first, second = other.meta["dspass_gathered"], node.meta["dspass_gathered"]
                    other.meta["dspass_gathered"], node.meta["dspass_gathered"] = second, first
        return graph


@dataclass(frozen=True, kw_only=True)
class WishesForgotten(HonourWishes):
    """Marks are taken out, and that is all."""

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        for mark in calls(graph, WISH):
            graph.erase_node(mark)
        return graph


@dataclass(frozen=True, kw_only=True)
class WishesExchanged(HonourWishes):
    """What is to be kept is computed again, and the other way round."""

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        for mark in calls(graph, WISH):
            mark.args = (mark.args[0], RECOMPUTE if mark.args[1] == KEEP else KEEP)
        return super().run(graph, ctx)


@dataclass(frozen=True, kw_only=True)
class MarksLeft(HonourWishes):
    """Values are tagged, and marks stay in the graph."""

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        marks = [mark.args for mark in calls(graph, WISH)]
        graph = super().run(graph, ctx)
        for value, kind in marks:
            with graph.inserting_after(value):
                graph.call_function(WISH, (value, kind))
        return graph


@dataclass(frozen=True, kw_only=True)
class ViewsKept(ReleaseGathered):
    """Views stay where they were made, and with them whole parameters."""

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        return graph


@dataclass(frozen=True, kw_only=True)
class ViewSaved(ReleaseGathered):
    """A view of a whole parameter is handed on to the backward graph, where it lives past its release."""

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        graph = super().run(graph, ctx)
        views = calls(graph, torch.ops.aten.permute.default)
        if ctx.where == "forward" and views:
            output = graph.find_nodes(op="output")[0]
            output.args = ((*output.args[0], views[0]),)
        return graph


@dataclass(frozen=True, kw_only=True)
class GatheredTooLate(ZeroGather):
    """The wait stands behind the first use."""

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        graph = super().run(graph, ctx)
        for wait in calls(graph, gather_wait)[:1]:
            first_user(items_of(wait)[0], positions(graph)).append(wait)
        return graph


@dataclass(frozen=True, kw_only=True)
class WaitMissing(ZeroGather):
    """What is being gathered is read before it has arrived."""

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        graph = super().run(graph, ctx)
        for wait in calls(graph, gather_wait)[:1]:
            wait.replace_all_uses_with(wait.args[0])
            graph.erase_node(wait)
        return graph


@dataclass(frozen=True, kw_only=True)
class GatheredAtTheTop(ZeroGather):
    """Every parameter is gathered before anything is computed."""

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        graph = super().run(graph, ctx)
        last = [n for n in graph.nodes if n.op == "placeholder"][-1]
        for start in calls(graph, gather_start):
            for node in (start, wait_of(start), *wait_of(start).users):
                last.append(node)
                last = node
        return graph


@dataclass(frozen=True, kw_only=True)
class GatheredForEachUse(ZeroGather):
    """A parameter with two uses is sent twice."""

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        graph = super().run(graph, ctx)
        for start in calls(graph, gather_start):
            (item,) = wait_of(start).users
            for user in list(item.users)[1:]:
                with graph.inserting_before(user):
                    _, _, (again,) = insert_pair(graph, gather_start, gather_wait, *start.args, start.meta["val"])
                user.replace_input_with(item, again)
        return graph


@dataclass(frozen=True, kw_only=True)
class ItemsExchanged(BucketGathers):
    """Somebody reads another parameter's place in the bucket."""

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        graph = super().run(graph, ctx)
        for wait in calls(graph, gather_wait):
            by_shape: dict[tuple[int, ...], fx.Node] = {}
            for item in list(wait.users):
                other = by_shape.setdefault(tuple(item.meta["val"].shape), item)
                if other is not item:
                    other.args, item.args = item.args, other.args
        return graph


@dataclass(frozen=True, kw_only=True)
class BucketLosesOne(BucketGathers):
    """A bucket forgets its last parameter, and its item with it."""

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        graph = super().run(graph, ctx)
        for start in calls(graph, gather_start):
            shards, keys = start.args
            if len(keys) > 1:
                start.args = (shards[:-1], keys[:-1])
        return graph


@dataclass(frozen=True, kw_only=True)
class StartedTooLate(PrefetchGathers):
    """Each gather starts where it is waited for: nothing hides it."""

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        return graph


@dataclass(frozen=True, kw_only=True)
class StartedTooEarly(PrefetchGathers):
    """All gathers start at the top, and all parameters are whole at once."""

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        top = next(n for n in graph.nodes if n.op != "placeholder")
        for start in calls(graph, gather_start):
            if start is not top:
                top.prepend(start)
        return graph


@dataclass(frozen=True, kw_only=True)
class StartedAfterItsWait(PrefetchGathers):
    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        for start in calls(graph, gather_start)[:1]:
            wait_of(start).append(start)
        return graph


@dataclass(frozen=True, kw_only=True)
class ReducedTwice(ZeroReduce):
    """A gradient is sent twice and half of the sum kept: right numbers, twice the bytes."""

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        graph = super().run(graph, ctx)
        start = calls(graph, reduce_start)[0]
        wait = wait_of(start)
        (item,) = wait.users
        with graph.inserting_after(item):
            half = graph.call_function(torch.ops.aten.div.Tensor, (item, 2.0))
        half.meta["val"] = item.meta["val"]
        with graph.inserting_before(half):
            _, _, (again,) = insert_pair(graph, reduce_start, reduce_wait, *start.args, start.meta["val"])
            total = graph.call_function(torch.ops.aten.add.Tensor, (item, again))
        total.meta["val"] = item.meta["val"]
        item.replace_all_uses_with(half, delete_user_cb=lambda user: user not in (half, total))
        half.args = (total, 2.0)
        return graph


@dataclass(frozen=True, kw_only=True)
class NotReduced(ZeroReduce):
    """One rank keeps its own rows of a gradient that was never averaged."""

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        marker = calls(graph, REDUCE_GRAD)[0]
        grad = marker.args[0]
        with graph.inserting_before(marker):
            own = graph.call_function(torch.ops.aten.narrow.default, (grad, 0, 0, marker.meta["val"].shape[0]))
        own.meta["val"] = marker.meta["val"]
        marker.replace_all_uses_with(own)
        graph.erase_node(marker)
        return super().run(graph, ctx)


@dataclass(frozen=True, kw_only=True)
class ValueForgotten(ZeroReduce):
    """A new node carries no ``meta["val"]``."""

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        graph = super().run(graph, ctx)
        for wait in calls(graph, reduce_wait)[:1]:
            del wait.meta["val"]
        return graph


@dataclass(frozen=True, kw_only=True)
class SummedNotAveraged(ZeroReduce):
    """The mean over ranks becomes a sum."""

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        graph = super().run(graph, ctx)
        for wait in calls(graph, reduce_wait):
            (item,) = wait.users
            with graph.inserting_after(item):
                total = graph.call_function(torch.ops.aten.mul.Tensor, (item, 2.0))
            total.meta["val"] = item.meta["val"]
            item.replace_all_uses_with(total, delete_user_cb=lambda user, total=total: user is not total)
        return graph


@dataclass(frozen=True, kw_only=True)
class NeverWaitedFor(BucketReductions):
    """A bucket of gradients is started, and what autograd gets was never reduced."""

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        graph = super().run(graph, ctx)
        wait = calls(graph, reduce_wait)[0]
        start = wait.args[0]
        for item in list(wait.users):
            with graph.inserting_before(item):
                zeros = graph.call_function(torch.ops.aten.zeros.default, (list(item.meta["val"].shape),))
            zeros.meta["val"] = item.meta["val"]
            item.replace_all_uses_with(zeros)
            graph.erase_node(item)
        graph.erase_node(wait)
        assert not start.users
        return graph


@dataclass(frozen=True, kw_only=True)
class ReadBeforeItsWait(BucketReductions):
    """Gradients are read from the reduction that is still under way."""

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        graph = super().run(graph, ctx)
        wait = calls(graph, reduce_wait)[0]
        wait.replace_all_uses_with(wait.args[0])
        graph.erase_node(wait)
        return graph


@dataclass(frozen=True, kw_only=True)
class BucketStartsEarly(BucketReductions):
    """A bucket starts with its first gradient, before the others of it are complete."""

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        graph = super().run(graph, ctx)
        for start in calls(graph, reduce_start):
            if len(start.args[0]) > 1:
                min(start.args[0]).append(start)
        return graph


@dataclass(frozen=True, kw_only=True)
class GradientsExchanged(BucketReductions):
    """Gradients of one shape reach each other's parameters."""

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        graph = super().run(graph, ctx)
        by_shape: dict[tuple[int, ...], fx.Node] = {}
        for item in calls(graph, operator.getitem):
            if item.args[0].target is reduce_wait:
                other = by_shape.setdefault(tuple(item.meta["val"].shape), item)
                if other is not item:
                    place = graph.find_nodes(op="output")[0]
                    place.args = ([other if a is item else item if a is other else a for a in place.args[0]],)
                    return graph
        return graph


@dataclass(frozen=True, kw_only=True)
class ShardsExchanged(OffloadParameters):
    """Two shards of one shape come from the host in each other's place."""

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        graph = super().run(graph, ctx)
        for start in calls(graph, gather_start):
            items = [n for n in start.args[0] if n.target is operator.getitem]
            for one, other in itertools.combinations(items, 2):
                if one.meta["val"].shape == other.meta["val"].shape:
                    shards = [other if n is one else one if n is other else n for n in start.args[0]]
                    start.args = (shards, *start.args[1:])
                    return graph
        return graph


@dataclass(frozen=True, kw_only=True)
class KeptUnderAnotherName(GatherInNode):
    """Rows of two parameters of one shape are kept under each other's keys."""

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        graph = super().run(graph, ctx)
        for kept in calls(graph, keep_in_node):
            kept.args = (kept.args[0], list(reversed(kept.args[1])))
        return graph


@dataclass(frozen=True, kw_only=True)
class PartsExchanged(QuantiseGathers):
    """Two parameters of one shape are made of each other's codes."""

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        graph = super().run(graph, ctx)
        for whole in calls(graph, DEQUANTISE):
            for one, other in itertools.combinations(whole.users, 2):
                if one.meta["val"].shape == other.meta["val"].shape:
                    one.args, other.args = other.args, one.args
                    return graph
        return graph


@dataclass(frozen=True, kw_only=True)
class CodesSummed(QuantiseReductions):
    """Gradients are summed over ranks, and their number is forgotten."""

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        graph = super().run(graph, ctx)
        for mean in calls(graph, SUM):
            mean.args = (*mean.args[:5], 1.0, mean.args[6])
        return graph


@dataclass(frozen=True, kw_only=True)
class CodesReadTooSoon(QuantiseExchanges):
    """Rows are made of codes that are still on their way."""

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        graph = super().run(graph, ctx)
        for whole in calls(graph, DEQUANTISE):
            codes = whole.args[0]
            codes.replace_input_with(codes.args[0], codes.args[0].args[0])
        return graph


@dataclass(frozen=True, kw_only=True)
class CodesExchanged(QuantiseSaved):
    """The codes of one saved value go to the backward in the place of another's of the same shape."""

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        graph = super().run(graph, ctx)
        by_shape: dict[tuple[int, ...], fx.Node] = {}
        for both in calls(graph, QUANTISE_SAVED):
            codes = min(both.users)
            other = by_shape.setdefault(tuple(both.args[0].meta["val"].shape), codes)
            if other is not codes:
                place = graph.find_nodes(op="output")[0]
                place.args = ([other if a is codes else codes if a is other else a for a in place.args[0]],)
                return graph
        return graph


@dataclass(frozen=True, kw_only=True)
class ErrorsExchanged(QuantiseReductions):
    """What rounding a gradient has lost is added to another one."""

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        graph = super().run(graph, ctx)
        for errors in calls(graph, rounding_errors):
            errors.args = ([], list(reversed(errors.args[1])), *errors.args[2:])
        return graph


@dataclass(frozen=True, kw_only=True)
class HostValuesExchanged(OffloadSaved):
    """Two values of one shape wait in each other's place."""

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        graph = super().run(graph, ctx)
        by_shape: dict[tuple[int, ...], fx.Node] = {}
        for item in calls(graph, operator.getitem):
            if item.args[0].target is offload_wait:
                other = by_shape.setdefault(tuple(item.meta["val"].shape), item)
                if other is not item:
                    place = graph.find_nodes(op="output")[0]
                    place.args = ([other if a is item else item if a is other else a for a in place.args[0]],)
                    return graph
        return graph


@dataclass(frozen=True, kw_only=True)
class WrongRowsLookedUp(QuantisedProducts):
    """Rows of codes are found by the tokens, and their scales in the order of the table."""

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        graph = super().run(graph, ctx)
        for rows in calls(graph, torch.ops.aten.index.Tensor):
            if rows.meta["val"].dtype == torch.float32:
                with graph.inserting_before(rows):
                    first = graph.call_function(torch.ops.aten.slice.Tensor, (rows.args[0], 0, 0, 3))
                first.meta["val"] = rows.meta["val"]
                rows.replace_all_uses_with(first)
                graph.erase_node(rows)
        return graph


@dataclass(frozen=True, kw_only=True)
class RoundingsMixed(ShareRoundings):
    """What one layer reads in fewer bits another one reads so too."""

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        graph = super().run(graph, ctx)
        seen: dict[Any, fx.Node] = {}
        for rounding in sorted(calls(graph, FAKE_QUANTISE)):
            first = seen.setdefault(rounding.args[0], rounding)
            if first is not rounding:
                rounding.replace_all_uses_with(first)
                graph.erase_node(rounding)
        return graph


@dataclass(frozen=True, kw_only=True)
class BiasForgotten(OnednnProducts):
    """A product with a bias becomes one without."""

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        graph = super().run(graph, ctx)
        for node in calls(graph, LINEAR):
            node.args = (*node.args[:2], None)
        return graph


@dataclass(frozen=True, kw_only=True)
class NotTransposed(OnednnProducts):
    """A square matrix goes in as it is, where the operator wants it transposed."""

    def run(self, graph: fx.Graph, ctx: PassContext) -> fx.Graph:
        graph = super().run(graph, ctx)
        for node in calls(graph, LINEAR):
            x, weight, bias = node.args
            if weight.meta["val"].shape[0] == weight.meta["val"].shape[1]:
                with graph.inserting_before(node):
                    turned = graph.call_function(torch.ops.aten.permute.default, (weight, [1, 0]))
                turned.meta["val"] = weight.meta["val"].t()
                node.args = (x, turned, bias)
        return graph
