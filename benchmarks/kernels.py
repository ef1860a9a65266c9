"""The project's operators one by one: are they right, how near are they to what memory allows, and who is faster.

On a GPU a call is one of the compiled kernel, where one is built (``make kernels``); on a CPU of what Inductor makes of the
operator's reference when it stands in a graph of ours, or of what serves it there. Beside it: ``Inductor``, the reference under
plain ``torch.compile`` (Triton on a GPU), and torch's own operator for the same work where there is one. Each takes turns, in
an order drawn anew for each round, on arguments that were last used so many bytes ago that no cache holds them.

An operator is compared with its reference first, on the very arguments that are timed: to the last bit where its sums have one
order, and else by the largest difference beside the largest value, which a product may round differently by an ulp of fp32 sums
and of its result. One that is wrong is named and the command fails.

The limit of what moves memory is a copy, which reads and writes as many bytes, measured in the same turns. Bytes are those that
an operator cannot do without: every argument read once, every result written once. A product is held against torch's own.

Dropped: Triton's ``do_bench``, which flushes one cache and runs one contender after another: clocks drift in between.
"""

from __future__ import annotations

import argparse
import functools
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import page
from benchmarks.table import cpu
from dspass.lowering.segments import SegmentCompiler
from dspass.runtime import adamw, compat, cutlass, experts, fake_quantise, few_bits, grouped, kernels, quantise  # noqa: F401
from dspass.runtime.operators import OPERATORS

_OURS, _INDUCTOR, _COPY = "dspass", "Inductor", "copy"

#: Bytes between two uses of the same arguments: more than the last cache of a CPU, or the L2 of a GPU.
_APART = {"cpu": 2**27, "cuda": 2**28}

#: Values of a memory-bound operator, tokens of a routing and their width, rows and columns of a product's weight.
SIZES = {
    "tiny": (2**12, 32, 32, 64),
    "small": (2**21, 1024, 256, 1024),
    "full": (2**26, 16384, 2048, 8192),
}

#: A share of a measured copy that a kernel bound by memory is to reach on a GPU, and ratios of seconds to peers' there.
_OF_COPY = 0.85

Call = Callable[..., Any]


@dataclass(kw_only=True)
class Case:
    """One operator at one setting. ``make`` answers fresh arguments; what the call writes to is among them, so each contender
    has its own. ``goal`` is a peer and the most of its seconds that ours may take on a GPU. ``call`` is measured in place of
    the operator: a way to serve it that is not the first choice."""

    name: str
    operator: str
    make: Callable[[], tuple[Any, ...]]
    moved: int
    operations: float = 0.0
    is_exact: bool = True
    peers: dict[str, Call] = field(default_factory=dict)
    goal: tuple[str, float] | None = None
    call: Call | None = None


@dataclass
class Row:
    """What was found: seconds of calls by contender and round, ``wrong`` where the answer is not the reference's."""

    case: Case
    server: str
    agrees: str = ""
    wrong: str = ""
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def of(self, name: str) -> float:
        """Our seconds over theirs, paired by rounds."""
        return statistics.median(a / b for a, b in zip(self.seconds[_OURS], self.seconds[name], strict=True))


# -- what is measured ----------------------------------------------------------------------------------------------------


def cases(device: str, size: str) -> Iterator[Case]:
    """All of them, whose arguments are on ``device``."""
    values, tokens, width, columns = SIZES[size]
    yield from _rounded(device, values)
    yield from _buckets(device, values)
    yield from _routed(device, tokens, width)
    yield from _stepped(device, values)
    yield from _products(device, tokens, columns)


def _rounded(device: str, values: int) -> Iterator[Case]:
    """A tensor in bf16 to codes and back."""
    x = functools.partial(torch.randn, values, dtype=torch.bfloat16, device=device)
    block = 512
    for format in ("int8", "int4", "fp8_e4m3", "fp6_e3m2"):
        codes, scales = quantise.quantise(torch.zeros(block, dtype=torch.bfloat16, device=device), format, block)
        stored = values // block * (codes.nbytes + scales.nbytes)

        def packed(format: str = format) -> tuple[Any, ...]:
            return (*torch.ops.dspass.quantise(x(), format, block), [values], format, torch.bfloat16)

        yield Case(
            name=f"quantise {format}",
            operator="quantise",
            make=lambda format=format: (x(), format, block),
            moved=2 * values + stored,
        )
        yield Case(name=f"dequantise {format}", operator="dequantise", make=packed, moved=2 * values + stored)
    yield Case(
        name="fake_quantise rows of 512",
        operator="fake_quantise",
        make=lambda: (x().view(-1, block), torch.tensor(255.0, device=device), [1]),
        moved=4 * values,
    )


def _buckets(device: str, values: int, ranks: int = 4, block: int = 512) -> Iterator[Case]:
    """Four gradients in bf16, one of them larger than the others together, for four ranks of two nodes."""
    sizes = [values // ranks * share // 16 for share in (1, 2, 3, 10)]

    def gradients() -> list[torch.Tensor]:
        return [torch.randn(ranks * size, dtype=torch.bfloat16, device=device) for size in sizes]

    bucket = functools.partial(torch.ops.dspass.quantise_bucket, sizes=sizes, chunks=ranks, block=block)
    for format in ("int8", "int4"):
        codes, scales = bucket(gradients(), format=format)
        stored = codes.nbytes + scales.nbytes
        yield Case(
            name=f"quantise_bucket {format}, two nodes",
            operator="quantise_bucket",
            make=lambda format=format: (gradients(), sizes, ranks, format, block, 2),
            moved=2 * values + stored,
        )
        yield Case(
            name=f"dequantise_bucket {format}",
            operator="dequantise_bucket",
            make=lambda format=format: (*bucket(gradients(), format=format), sizes, format, block, torch.bfloat16),
            moved=2 * values + stored,
        )
        yield Case(
            name=f"dequantise_sum {format} of {ranks}",
            operator="dequantise_sum",
            make=lambda format=format: (
                *bucket(gradients(), format=format),
                sizes,
                format,
                block,
                0.25,
                torch.bfloat16,
            ),
            moved=2 * values // ranks + stored,
        )


def _routed(device: str, tokens: int, width: int, count: int = 64, top_k: int = 4) -> Iterator[Case]:
    def tokens_of(rows: int = tokens) -> torch.Tensor:
        return torch.randn(rows, width, dtype=torch.bfloat16, device=device)

    def routing() -> torch.Tensor:
        return torch.rand(tokens, count, device=device).topk(top_k).indices

    def positions() -> torch.Tensor:
        return torch.ops.dspass.permute_experts(tokens_of(), routing(), count)[1]

    weights = functools.partial(torch.rand, tokens, top_k, device=device)
    one, all_rows, assignments = 2 * tokens * width, 2 * tokens * width * top_k, tokens * top_k
    yield Case(
        name=f"permute_experts, {top_k} of {count}",
        operator="permute_experts",
        make=lambda: (tokens_of(), routing(), count),
        moved=one + all_rows + 12 * assignments,
    )
    yield Case(
        name="spread_experts",
        operator="spread_experts",
        make=lambda: (tokens_of(), positions()),
        moved=one + all_rows + 4 * assignments,
    )
    yield Case(
        name="unpermute_experts, weighted",
        operator="unpermute_experts",
        make=lambda: (tokens_of(tokens * top_k), positions(), weights()),
        moved=one + all_rows + 8 * assignments,
    )


def _stepped(device: str, values: int) -> Iterator[Case]:
    """Eight parameters of two sizes. ``torch._fused_adamw_`` is what ``torch.optim.AdamW(fused=True)`` calls."""
    shapes = [values * share // 32 for share in (1, 7) * 4]
    rate = torch.tensor(1e-3)
    numbers = (7, rate, 0.9, 0.999, 1e-8, 0.01)

    def tensors(dtype: torch.dtype, make: Callable[..., torch.Tensor] = torch.randn) -> list[torch.Tensor]:
        return [make(shape, dtype=dtype, device=device) for shape in shapes]

    def fused(params: Any, grads: Any, first: Any, second: Any, step: int, lr: Any, *more: Any) -> None:
        steps = [torch.full((), float(step - 1), device=device) for _ in params]
        beta1, beta2, eps, decay = more[:4]
        torch._foreach_add_(steps, 1.0)
        torch._fused_adamw_(
            params, grads, first, second, [], steps,
            lr=float(lr), beta1=beta1, beta2=beta2, weight_decay=decay, eps=eps, amsgrad=False, maximize=False,
        )  # fmt: skip

    def arguments(dtype: torch.dtype, seed: int | None) -> tuple[Any, ...]:
        lists = (
            tensors(dtype),
            tensors(dtype),
            tensors(torch.float32, torch.zeros),
            tensors(torch.float32, torch.zeros),
        )
        return (*lists, *numbers, seed)

    def of_8_bits(dtype: torch.dtype, seed: int | None) -> tuple[Any, ...]:
        params = tensors(dtype)
        states = [list(some) for some in zip(*map(adamw.states_of_8_bits, params), strict=True)]
        return (params, tensors(dtype), *states, *numbers, seed)

    for dtype, seed in ((torch.float32, None), (torch.bfloat16, 1)):
        name = "fp32" if seed is None else "bf16, stochastic"
        size = dtype.itemsize
        yield Case(
            name=f"adamw_ {name}",
            operator="adamw_",
            make=functools.partial(arguments, dtype, seed),
            moved=(3 * size + 16) * values,
            peers={"torch, fused": fused} if seed is None else {},
            goal=("torch, fused", 1.0) if seed is None else None,
        )
        yield Case(
            name=f"adamw_8bit_ {name}",
            operator="adamw_8bit_",
            make=functools.partial(of_8_bits, dtype, seed),
            moved=round((3 * size + 4 * (1 + 4 / adamw.BLOCK)) * values),
        )


def _products(device: str, tokens: int, columns: int, count: int = 16) -> Iterator[Case]:
    """Rows in bf16 times weights in few bits, and times the matrices of experts."""
    rows_of = functools.partial(torch.randn, dtype=torch.bfloat16, device=device)
    dense = rows_of(columns, columns)

    def mm(x: torch.Tensor, *_: Any) -> torch.Tensor:
        return x @ dense.t()

    for format, group, most in (("int8", None, 1 / 1.5), ("int4", 128 if columns >= 128 else None, 1 / 2.5)):
        codes, scales = few_bits.quantise_rows(rows_of(columns, columns), format, group)
        for rows in (1, 4, 16):
            yield Case(
                name=f"quantised_linear {format}, {rows} row{'s' * (rows > 1)}",
                operator="quantised_linear",
                make=lambda rows=rows, codes=codes, scales=scales, format=format: (
                    *(rows_of(rows, columns), codes.clone(), scales.clone(), None, columns, format),
                ),
                moved=codes.nbytes + scales.nbytes + 4 * rows * columns,
                operations=2.0 * rows * columns * columns,
                is_exact=False,
                peers={"torch.mm in bf16": mm},
                goal=("torch.mm in bf16", most),
            )
        for rows in (16, 512):
            yield Case(
                name=f"mixed_product {format}, {rows} rows",
                operator="mixed_product",
                make=lambda rows=rows, codes=codes, scales=scales, format=format: (
                    *(rows_of(rows, columns), codes.clone(), scales.clone(), format),
                ),
                moved=codes.nbytes + scales.nbytes + 4 * rows * columns,
                operations=2.0 * rows * columns * columns,
                is_exact=False,
                peers={"torch.mm in bf16": mm},
                goal=("torch.mm in bf16", most) if rows == 16 else None,
            )
    inner = max(columns // 4, 16)

    def grouped_arguments() -> tuple[Any, ...]:
        ends = torch.rand(tokens, count, device=device).argmax(1).bincount(minlength=count).cumsum(0).to(torch.int32)
        return rows_of(tokens, inner), rows_of(count, inner, inner), ends

    def theirs(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        return torch._grouped_mm(x, weight, offs=ends)

    for call in (None, *([cutlass.product] if kernels.cutlass() is not None and device == "cuda" else [])):
        yield Case(
            name=f"grouped_product, {count} experts{'' if call is None else ', by CUTLASS'}",
            operator="grouped_product",
            make=grouped_arguments,
            moved=2 * (2 * tokens * inner + count * inner * inner),
            operations=2.0 * tokens * inner * inner,
            is_exact=False,
            peers={"torch._grouped_mm": theirs},
            goal=("torch._grouped_mm", 1 / 0.9),
            call=call,
        )


# -- how -----------------------------------------------------------------------------------------------------------------


def as_served(case: Case, device: str) -> Call:
    """The operator as a graph of ours calls it: a kernel, or its reference as Inductor compiles it for a segment."""
    if case.call is not None:
        return case.call
    found = OPERATORS[case.operator]
    if found.server(device) == "kernel" or "!" in found.schema:
        return found.overload
    example = case.make()
    tensors, rebuilt = _flat(example)
    gm = compat.traced(lambda *t: found.overload(*rebuilt(t)), compat.as_fake(tensors)[1])
    compiled = SegmentCompiler(share=False)(_listed(gm), is_backward=False, is_inference=True)

    def call(*args: Any) -> Any:
        return compiled(list(_flat(args)[0]))

    return call


def _listed(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """With a tuple of tensors as its result, as segments have."""
    output = gm.graph.find_nodes(op="output")[0]
    (said,) = output.args
    output.args = (tuple(said) if isinstance(said, (list, tuple)) else (said,),)
    gm.recompile()
    return gm


def _flat(args: Sequence[Any]) -> tuple[list[torch.Tensor], Callable[[Sequence[torch.Tensor]], list[Any]]]:
    """The tensors of ``args``, in lists too, and a function that puts others in their places."""
    from torch.utils._pytree import tree_flatten, tree_unflatten

    leaves, spec = tree_flatten(list(args))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]

    def rebuilt(tensors: Sequence[torch.Tensor]) -> list[Any]:
        others = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            others[place] = tensor
        return list(tree_unflatten(others, spec))

    return [leaves[i] for i in places], rebuilt


def agreement(case: Case, ours: Call) -> tuple[str, str]:
    """How the answer, and what the call has written, compare with the reference's; and what is wrong with it."""
    torch.manual_seed(0)
    args = case.make()
    tensors, rebuilt = _flat(args)
    copies = [t.clone() for t in tensors]
    with torch.no_grad():
        wanted = _flat([OPERATORS[case.operator].reference(*rebuilt(copies)), copies])[0]
        found = _flat([ours(*args), tensors])[0]
    if len(found) != len(wanted) or any(
        a.shape != b.shape or a.dtype != b.dtype for a, b in zip(found, wanted, strict=True)
    ):
        return "", "its results have other shapes or dtypes than the reference's"
    unlike = [(a, b) for a, b in zip(found, wanted, strict=True) if not _same(a, b)]
    if not unlike:
        return "equal", ""
    share = max(
        float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-30)) for a, b in unlike
    )
    if case.is_exact or not share <= 2**-7:  # half a step of bf16 where sums were rounded, another where they differ
        return f"{share:.1e}", f"it differs from its reference by {share:.1e} of the largest value"
    return f"{share:.1e}", ""


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a, b) or (
        a.is_floating_point()
        and torch.equal(a.isnan(), b.isnan())
        and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
    )


def _seconds(call: Call, some: Sequence[tuple[Any, ...]], device: str) -> float:
    """Of one call, on the average of those with ``some`` arguments; on a GPU several keep it busy."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for args in some:
            call(*args)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / len(some)
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    began = clock()
    for args in some:
        call(*args)
    return (clock() - began) / len(some)


def _turning(make: Callable[[], tuple[Any, ...]], device: str) -> tuple[Iterator[tuple[Any, ...]], int]:
    """Arguments that were used a while ago, for ever, and how many sets there are."""
    first = make()
    size = sum(t.nbytes for t in _flat(first)[0])
    sets = [first, *(make() for _ in range(min(max(_APART[device] // max(size, 1), 1), 64)))]

    def turns() -> Iterator[tuple[Any, ...]]:
        while True:
            yield from sets

    return turns(), len(sets)


def measure(case: Case, device: str, rounds: int, tick: Callable[[], object] = lambda: None) -> Row:
    """Compare and time one case; three rounds before those that count."""
    row = Row(case, OPERATORS[case.operator].server(device))
    ours = as_served(case, device)
    row.agrees, row.wrong = agreement(case, ours)
    torch._dynamo.reset()
    contenders: dict[str, Call] = {_OURS: ours}
    contenders[_INDUCTOR] = torch.compile(OPERATORS[case.operator].reference, dynamic=False)
    contenders |= case.peers
    sets = {name: _turning(case.make, device) for name in contenders}
    half = max(case.moved // 2, 1)
    contenders[_COPY] = lambda to, source: to.copy_(source)
    sets[_COPY] = _turning(
        lambda: tuple(torch.empty(half, dtype=torch.uint8, device=device).fill_(i) for i in range(2)), device
    )
    with torch.no_grad():
        for number in range(-3, rounds):
            order = list(contenders)
            random.Random(number).shuffle(order)
            for name in order:
                turns, count = sets[name]
                some = [next(turns) for _ in range(min(count, 16) if device == "cuda" else 1)]
                took = _seconds(contenders[name], some, device)
                if number >= 0:
                    row.seconds.setdefault(name, []).append(took)
            tick()
    return row


# -- the page ------------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Row], device: str) -> str:
    """Markdown of what was found, goals met or missed."""
    lines = [
        "| operator | served by | reference | median | GB/s | of a copy | of Inductor's, paired | of torch's own |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        took = row.median(_OURS)
        theirs = [f"{row.of(name):.3f} ({name})" for name in row.case.peers]
        cells = [
            row.case.name,
            row.server if row.server == "kernel" or "!" in OPERATORS[row.case.operator].schema else "Inductor's code",
            f"wrong: {row.wrong}" if row.wrong else row.agrees,
            f"{took * 1e6:.0f} us",
            f"{row.case.moved / took / 1e9:.1f}",
            f"{row.median(_COPY) / took:.2f}",
            f"{row.of(_INDUCTOR):.3f}",
            ", ".join(theirs),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *_goals(rows, device)])


def _goals(rows: Sequence[Row], device: str) -> Iterator[str]:
    wrong = [row.case.name for row in rows if row.wrong]
    yield _said(not wrong, f"every operator answers as its reference: {', '.join(wrong) or 'all do'}")
    if device == "cpu":
        slow = {row.case.name: row.of(_INDUCTOR) for row in rows}
        name = max(slow, key=lambda n: slow[n])
        yield _said(
            slow[name] <= 1.0, f"as fast as Inductor makes the reference: at most {slow[name]:.3f} of it ({name})"
        )
        return
    bound = {row.case.name: row.median(_COPY) / row.median(_OURS) for row in rows if not row.case.operations}
    name = min(bound, key=lambda n: bound[n])
    yield _said(
        bound[name] >= _OF_COPY,
        f"what is bound by memory reaches {_OF_COPY} of a copy: {sum(v >= _OF_COPY for v in bound.values())} of "
        f"{len(bound)}, at least {bound[name]:.2f} ({name})",
    )
    for row in rows:
        if row.case.goal is not None:
            peer, most = row.case.goal
            yield _said(row.of(peer) <= most, f"{row.case.name}: at most {most:.2f} of {peer}: {row.of(peer):.3f}")


def _said(is_met: bool, text: str) -> str:
    return f"- {'met' if is_met else 'missed'}: {text}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where operators run")
    parser.add_argument("--size", choices=SIZES, help="of arguments (default: small on a CPU, full on a GPU)")
    parser.add_argument("--rounds", type=int, default=21, help="interleaved rounds")
    parser.add_argument("--threads", type=int, default=1, help="of the process, on a CPU")
    parser.add_argument("--only", default="", help="operators, with commas between")
    parser.add_argument("--out", default="benchmarks/results", help="where the table is written")


def run(options: argparse.Namespace) -> int:
    begin = time.time()
    device = options.device
    if device == "cuda" and not torch.cuda.is_available():
        print("python -m benchmarks kernels: torch sees no GPU here; leave --device cuda out to measure the CPU.")
        return 2
    options.size = options.size or ("small" if device == "cpu" else "full")
    torch.set_num_threads(options.threads)
    served = kernels.serve_once() if device == "cuda" else None
    wanted = set(filter(None, options.only.split(",")))
    if unknown := wanted - OPERATORS.keys():
        print(f"python -m benchmarks kernels: no operator is called {', '.join(sorted(unknown))}.")
        return 2
    chosen = [case for case in cases(device, options.size) if not wanted or case.operator in wanted]
    if not chosen:
        print(f"python -m benchmarks kernels: none of {', '.join(sorted(wanted))} is measured.")
        return 2
    rows = []
    with tqdm(total=(options.rounds + 3) * len(chosen), unit="round", ncols=90) as bar:
        for case in chosen:
            bar.set_description(case.name)
            rows.append(measure(case, device, options.rounds, bar.update))
    text = table(rows, device)
    print("\n" + text + "\n")
    where = torch.cuda.get_device_name() if device == "cuda" else f"{cpu()}, {options.threads} thread"
    page.write(
        options,
        f"kernels-{device}.md",
        title="The project's operators",
        benchmark="kernels",
        keys=("device", "size", "rounds", *(("threads",) if device == "cpu" else ())),
        facts=f"{where}, torch {torch.__version__}, Python {platform.python_version()}; kernels: "
        f"{'built' if served else 'none, Inductor serves'}; medians of {options.rounds} rounds; "
        f"{(time.time() - begin) / 60:.1f} minutes.",
        text=text,
    )
    return 1 if any(row.wrong for row in rows) else 0
