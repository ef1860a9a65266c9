"""The pipeline, read from top to bottom. Each line is one pass; the graphs it works on stand in its class."""

from __future__ import annotations

from dspass.passes.base import Pass
from dspass.passes.bucket_gathers import BucketGathers
from dspass.passes.bucket_reductions import BucketReductions
from dspass.passes.divide_experts import DivideExperts
from dspass.passes.exchange_rows import ExchangeRows
from dspass.passes.expose_parameters import ExposeParameters
from dspass.passes.gather_in_node import GatherInNode
from dspass.passes.global_aux_loss import GlobalAuxLoss
from dspass.passes.hide_exchanges import HideExchanges
from dspass.passes.honour_wishes import HonourWishes
from dspass.passes.offload_parameters import OffloadParameters
from dspass.passes.offload_saved import OffloadSaved
from dspass.passes.onednn_products import OnednnProducts
from dspass.passes.prefetch_gathers import PrefetchGathers
from dspass.passes.quantise_exchanges import QuantiseExchanges
from dspass.passes.quantise_gathers import QuantiseGathers
from dspass.passes.quantise_reductions import QuantiseReductions
from dspass.passes.quantise_saved import QuantiseSaved
from dspass.passes.quantised_products import QuantisedProducts
from dspass.passes.release_gathered import ReleaseGathered
from dspass.passes.share_roundings import ShareRoundings
from dspass.passes.split_batch import SplitBatch
from dspass.passes.zero_gather import ZeroGather
from dspass.passes.zero_reduce import ZeroReduce

DEFAULT: tuple[type[Pass], ...] = (
    SplitBatch,  # as captured: parts of the batch take turns around layers of experts, where a person says so
    DivideExperts,  # tokens go to the ranks that hold their experts
    GlobalAuxLoss,  # and their balance is that of all ranks, where a person says so
    ExposeParameters,  # joint: whole parameters become inputs
    HonourWishes,  # and what a person marked is tagged
    ShareRoundings,  # what is rounded while it trains is rounded once
    QuantisedProducts,  # weights that are stored in few bits are read so; then the partitioner splits the graph
    ExchangeRows,  # and what went to experts is started and waited for
    HideExchanges,  # with compute in between that does not wait for it
    ReleaseGathered,  # views of them are made where they are used, so that gathers come late and end early
    ZeroGather,  # gathers at first use
    BucketGathers,  # joined into buckets
    PrefetchGathers,  # and started early
    ZeroReduce,  # gradients averaged as they are complete
    BucketReductions,  # joined into buckets
    OffloadParameters,  # shards come from the host and gradients go there, where a person says so
    GatherInNode,  # backwards gather inside of the node, where a person says so
    QuantiseGathers,  # and what compute does not hide travels in few bits, where a person says so
    QuantiseReductions,
    QuantiseExchanges,
    QuantiseSaved,  # saved values wait in few bits, where a person allows it and the planner says so
    OffloadSaved,  # or on the host, where the planner says so
    OnednnProducts,  # the faster library on a CPU
)
