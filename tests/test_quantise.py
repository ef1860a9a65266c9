"""The quantising operators: what each format makes of values, what they promise of odd input, and that what Inductor makes of
the reference is the reference, to the last bit."""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.fx as fx
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves

from dspass import config
from dspass.lowering.expand import expand
from dspass.lowering.segments import SegmentCompiler
from dspass.runtime import few_bits
from dspass.runtime import quantise as reference
from dspass.runtime.formats import FORMATS, Format
from dspass.runtime.operators import OPERATORS

ops = torch.ops.dspass
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EVERY_FORMAT = pytest.mark.parametrize("format", FORMATS.values(), ids=lambda f: f.name)


def round_trip(x: torch.Tensor, format: str, block: int = 64, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    codes, scales = ops.quantise(x, format, block)
    return ops.dequantise(codes, scales, x.shape, format, dtype)


def every_value(format: Format) -> torch.Tensor:
    """Of a format without a scale, each value once, by its definition."""
    if format.is_integer:
        return torch.arange(-format.largest, format.largest + 1, dtype=torch.float32)
    steps = 2**format.mantissa
    found = {
        (m + (steps if e else 0)) * 2.0 ** (max(e, 1) - format.bias - format.mantissa)
        for e in range(2**format.exponent)
        for m in range(steps)
    }
    positive = torch.tensor(sorted(v for v in found if v <= format.largest))
    return torch.cat([-positive.flip(0), positive[1:]])


@EVERY_FORMAT
def test_each_value_of_a_format_comes_back_as_it_is(format: Format) -> None:
    values = every_value(format)
    assert values.max() == format.largest
    x = values.repeat_interleave(64).view(-1, 64).clone()
    x[:, 0] = format.largest  # so that the scale of each block is one
    assert torch.equal(round_trip(x, format.name), x)


@EVERY_FORMAT
def test_a_value_becomes_the_nearest_one_and_a_tie_the_even_one(format: Format) -> None:
    values = every_value(format)
    low, high = values[:-1], values[1:]
    middle = (low + high) / 2
    for x, wanted in (
        (torch.lerp(low, high, 0.49), low),
        (torch.lerp(low, high, 0.51), high),
    ):
        assert torch.equal(_unscaled(x, format), wanted)
    ties = _unscaled(middle, format)
    codes = {value: i for i, value in enumerate(values.tolist())}
    zero = codes[0.0]
    assert all((codes[value] - zero) % 2 == 0 for value in ties.tolist())
    assert ((ties == low) | (ties == high)).all()


def _unscaled(values: torch.Tensor, format: Format) -> torch.Tensor:
    """What becomes of ``values`` in blocks whose scale is one."""
    blocks = torch.zeros(len(values), 16)
    blocks[:, 0], blocks[:, 1] = format.largest, values
    return round_trip(blocks, format.name, 16)[:, 1]


@pytest.mark.parametrize(("name", "dtype"), [("fp8_e4m3", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)])
def test_eight_bit_floats_are_torch_s(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(300, 64) * torch.logspace(-7, 1, 300)[:, None]
    x[:, 0] = FORMATS[name].largest
    codes, scales = ops.quantise(x, name, 64)
    assert (scales == 1).all()
    assert torch.equal(codes, x.to(dtype).view(torch.uint8))


@settings(max_examples=20, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 70), min_size=1, max_size=3),
    format=st.sampled_from(sorted(FORMATS)),
    block=st.sampled_from([16, 64, 256]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
def test_no_value_is_off_by_more_than_half_a_step_of_its_block(
    sizes: list[int], format: str, block: int, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    x = (torch.randn(sizes) * torch.randn(sizes).exp()).to(dtype)
    found = round_trip(x, format, block)
    assert found.shape == x.shape
    form = FORMATS[format]
    flat = torch.nn.functional.pad(x.reshape(-1).float(), (0, -x.numel() % block)).view(-1, block)
    most = flat.abs().amax(1) if flat.shape[0] else flat.new_empty(0)
    values = every_value(form)
    # The largest gap between neighbours that is under a value's magnitude bounds what it is rounded by.
    gap = (values[1:] - values[:-1]).max() if form.is_integer else None
    off = (found.reshape(-1) - x.reshape(-1).float()).abs()
    scales = (most / form.largest).repeat_interleave(block)[: x.numel()]
    step = gap if gap is not None else (x.reshape(-1).abs().float() / scales).clamp_min(2.0 ** (1 - form.bias))
    if not form.is_integer:
        step = 2.0 ** (torch.frexp(step).exponent - 1 - form.mantissa)
    assert (off <= 0.5 * step * scales * (1 + 1e-5) + 1e-30).all()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_spoils_its_block_and_no_other(name: str, bad: float) -> None:
    x = torch.randn(3, 64)
    plain = round_trip(x, name)
    x[1, 17] = bad
    found = round_trip(x, name)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], plain[[0, 2]])


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_and_the_smallest_come_back_as_zeros(name: str) -> None:
    assert (round_trip(torch.zeros(3, 64), name) == 0).all()
    assert (round_trip(torch.full((64,), 1e-43), name) == 0).all()
    assert not round_trip(torch.tensor([1e-43, 1.0]), name)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 15, 64, 65])
def test_sizes_that_fill_no_block(count: int, dtype: torch.dtype) -> None:
    x = torch.randn(count).to(dtype)
    codes, scales = ops.quantise(x, "int4", 64)
    assert codes.shape == (-(-count // 64), 32)
    assert scales.shape == (-(-count // 64),)
    assert round_trip(x, "int4", 64, dtype).dtype is dtype


@pytest.mark.parametrize("format", ["int8", "int4", "fp6_e3m2"])
@pytest.mark.parametrize("size", [130, 128, 30])
def test_what_is_sent_and_what_is_kept_is_all_there_was(format: str, size: int) -> None:
    """Errors in fp32, of which nothing is lost when they are kept: sums telescope."""
    torch.manual_seed(0)
    error, sent, total = torch.zeros(2, size), torch.zeros(2, size), torch.zeros(2, size)
    for _ in range(8):
        x = torch.randn(2, size)
        codes, scales = ops.compensated_bucket([x], [size], 2, format, 64, [error], 0.0)
        plain = ops.quantise_bucket([x + total - sent], [size], 2, format, 64)
        total += x
        sent += ops.dequantise_bucket(codes, scales, [size], format, 64, torch.float32)[0]
        assert (codes != plain[0]).float().mean() < 0.01  # of a value between two codes
    torch.testing.assert_close(sent + error, total, rtol=0, atol=1e-5)
    assert error.abs().max() > 1e-3


def test_what_is_not_finite_leaves_no_error_in_its_block() -> None:
    x, error = torch.randn(2, 128), torch.ones(2, 128, dtype=torch.bfloat16)
    x[1, 70] = float("inf")
    _, scales = ops.compensated_bucket([x], [128], 2, "int4", 64, [error], 0.9)
    assert scales.isfinite().tolist() == [[True, True], [True, False]]
    assert (error[1, 64:] == 0).all()
    assert (error[0] > 0.5).all()
    with pytest.raises(ValueError, match=r"an error of \[1, 128\] is none of 2 chunks of 128 values"):
        ops.compensated_bucket([x], [128], 2, "int4", 64, [error[:1]], 0.9)


def test_a_bucket_is_divided_among_ranks_and_comes_back() -> None:
    torch.manual_seed(0)
    tensors, sizes = [torch.randn(7, 5), torch.randn(130), torch.randn(2, 300)], [18, 65, 300]
    codes, scales = ops.quantise_bucket(tensors, sizes, 2, "int8", 64)
    whole = ops.dequantise_bucket(codes, scales, sizes, "int8", 64, torch.float32)
    for tensor, size, back in zip(tensors, sizes, whole, strict=True):
        flat = torch.nn.functional.pad(tensor.reshape(-1), (0, 2 * size - tensor.numel()))
        alone = torch.stack([round_trip(part, "int8") for part in flat.view(2, size)])
        assert torch.equal(back, alone)
    sums = ops.dequantise_sum(codes, scales, sizes, "int8", 64, 0.5, torch.float32)
    assert all(torch.equal(s, (back[0] + back[1]) * 0.5) for s, back in zip(sums, whole, strict=True))


def test_the_swizzle_is_the_exchange_inside_of_a_node_and_then_across() -> None:
    """Of 2 nodes of 3 ranks: what rank d of each node gets first stands together."""
    tensor = torch.arange(6.0).repeat_interleave(16) + 1
    plain, _ = ops.quantise_bucket([tensor], [16], 6, "fp8_e5m2", 16)
    _, scales = ops.quantise_bucket([tensor], [16], 6, "fp8_e5m2", 16, 2)
    wanted = torch.tensor([1.0, 4, 2, 5, 3, 6]) * (1 / FORMATS["fp8_e5m2"].largest)
    assert torch.equal(scales.view(-1), wanted)
    assert plain.shape == (6, 16)


def test_a_not_a_number_of_one_rank_is_seen_behind_the_sum() -> None:
    tensor = torch.randn(128)
    tensor[100] = float("inf")
    codes, scales = ops.quantise_bucket([tensor], [64], 2, "int4", 64)
    (total,) = ops.dequantise_sum(codes, scales, [64], "int4", 64, 0.5, torch.float32)
    assert total.isnan().all()


@pytest.mark.parametrize(
    ("x", "format", "block", "message"),
    [
        (torch.ones(4), "int7", 64, "there is no format 'int7'.*'int4'|'int8'"),
        (torch.ones(4), "fp8", 64, "there is no format 'fp8': take one of int8"),
        (torch.ones(4), "int8", 20, "a block of 20 values cannot be: take a multiple of 16"),
        (torch.ones(4), "int8", 0, "a block of 0 values"),
        (torch.ones(4, dtype=torch.int32), "int8", 64, "a tensor of int32 cannot be quantised: fp32, fp16 and bf16"),
        (torch.ones(4, dtype=torch.complex64), "int8", 64, "a tensor of complex64 cannot be quantised"),
    ],
)
def test_what_cannot_be_is_refused(x: torch.Tensor, format: str, block: int, message: str) -> None:
    for call in (
        lambda: ops.quantise(x, format, block),
        lambda: ops.quantise_bucket([x], [4], 1, format, block),
        lambda: _faked(ops.quantise, x, format, block),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_tensor_that_its_chunks_cannot_hold_is_refused() -> None:
    for call in (
        ops.quantise_bucket,
        lambda *args: _faked(lambda x, *rest: ops.quantise_bucket([x], *rest), args[0][0], *args[1:]),
    ):
        with pytest.raises(
            ValueError, match="a tensor of 130 values does not go into 2 chunks of 64: make them larger"
        ):
            call([torch.ones(130)], [64], 2, "int8", 16)


def _faked(op: Any, x: torch.Tensor, *rest: Any) -> Any:
    with FakeTensorMode() as mode:
        return op(mode.from_tensor(x), *rest)


def test_the_configuration_knows_the_formats() -> None:
    assert tuple(FORMATS) == config.FORMATS


# -- operators -----------------------------------------------------------------------------------------------------------


def cases(format: str) -> dict[str, tuple[Any, ...]]:
    torch.manual_seed(0)
    tensors, sizes = [torch.randn(7, 5), torch.randn(130), torch.randn(2, 300) * 100], [10, 33, 150]
    codes, scales = ops.quantise_bucket(tensors, sizes, 4, format, 32)
    one, scale = ops.quantise(tensors[1], format, 32)
    rows = few_bits.quantise_rows(torch.randn(6, 40), format, 32)
    x, bias = torch.randn(3, 40), torch.randn(6)
    return {
        "quantise": (tensors[1], format, 32),
        "dequantise": (one, scale, [130], format, torch.bfloat16),
        "quantise_bucket": (tensors, sizes, 4, format, 32, 2),
        "compensated_bucket": (tensors, sizes, 4, format, 32, [torch.randn(4, size) for size in sizes], 0.5, 2),
        "dequantise_bucket": (codes, scales, sizes, format, 32, torch.float32),
        "dequantise_sum": (codes, scales, sizes, format, 32, 0.25, torch.float32),
        "dequantise_rows": (*rows, 40, format, torch.bfloat16),
        "few_rows_linear": (x, *rows, bias, format),
        "quantised_linear": (x, *rows, bias, 40, format),
        "mixed_product": (x, *rows, format),
    }


@pytest.mark.parametrize("name", ["quantise", "dequantise", "quantise_bucket", "compensated_bucket",
                                  "dequantise_bucket", "dequantise_sum", "dequantise_rows", "few_rows_linear",
                                  "quantised_linear", "mixed_product"])  # fmt: skip
@pytest.mark.parametrize("format", ["int4", "fp6_e3m2"])
def test_opcheck(name: str, format: str) -> None:
    torch.library.opcheck(OPERATORS[name].overload, cases(format)[name])


def test_every_operator_is_checked_here() -> None:
    ours = {o.name for o in OPERATORS.values() if o.reference.__module__ in (reference.__name__, few_bits.__name__)}
    assert ours == set(cases("int8"))


@EVERY_FORMAT
def test_inductor_s_code_is_the_reference_to_the_last_bit(format: Format) -> None:
    """Sizes are no multiples of the block: a loop over 65 values that Inductor divides by 64 forgot the last one."""
    for name, args in cases(format.name).items():
        overload = OPERATORS[name].overload
        run, tensors = compiled(overload, args)
        others = copy.deepcopy(args)  # errors are replaced in place
        found, wanted = run(list(tensors)), overload(*others)
        wanted = [wanted] if isinstance(wanted, torch.Tensor) else list(wanted)
        found, wanted = [*found, *tree_leaves(args)], [*wanted, *tree_leaves(others)]
        found, wanted = ([v for v in values if isinstance(v, torch.Tensor)] for values in (found, wanted))
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            if name in ("few_rows_linear", "quantised_linear", "mixed_product"):
                torch.testing.assert_close(one, other)  # a product's sums are in no promised order
            else:
                assert torch.equal(one, other), name


@settings(max_examples=2, deadline=None)
@given(
    counts=st.lists(st.integers(1, 400), min_size=1, max_size=3),
    chunks=st.integers(1, 4),
    format=st.sampled_from(sorted(FORMATS)),
)
def test_inductor_s_code_is_the_reference_for_any_sizes(counts: list[int], chunks: int, format: str) -> None:
    torch.manual_seed(len(counts))
    tensors, sizes = [torch.randn(n) for n in counts], [-(-n // chunks) for n in counts]
    packed = ops.quantise_bucket(tensors, sizes, chunks, format, 64)
    for overload, args in (
        (ops.quantise_bucket.default, (tensors, sizes, chunks, format, 64)),
        (ops.dequantise_bucket.default, (*packed, sizes, format, 64, torch.float32)),
    ):
        run, given_tensors = compiled(overload, args)
        for one, other in zip(run(list(given_tensors)), overload(*args), strict=True):
            assert torch.equal(one, other)


def test_an_operator_stays_where_a_kernel_serves_it() -> None:
    gm, _ = traced(ops.quantise.default, cases("int8")["quantise"])
    (node,) = gm.graph.find_nodes(op="call_function", target=ops.quantise.default)
    elsewhere = fx.GraphModule(nn.Module(), gm.graph)
    library = torch.library.Library("dspass", "IMPL")
    library.impl("quantise", reference.quantise, "CPU")
    try:
        expand(elsewhere, {})
        assert node in elsewhere.graph.find_nodes(op="call_function", target=ops.quantise.default)
    finally:
        library._destroy()
    expand(elsewhere, {})
    assert not elsewhere.graph.find_nodes(op="call_function", target=ops.quantise.default)


def traced(overload: Any, args: Sequence[Any]) -> tuple[fx.GraphModule, list[torch.Tensor]]:
    """A graph of one call, and the tensors that it takes."""
    mode, graph, tensors = FakeTensorMode(), fx.Graph(), []

    def enter(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            node = graph.placeholder(f"input_{len(tensors)}")
            node.meta["val"] = mode.from_tensor(value)
            tensors.append(value)
            return node
        return [enter(v) for v in value] if isinstance(value, list) else value

    node = graph.call_function(overload, tuple(map(enter, args)))
    with mode:
        value = overload(*fx.map_arg(node.args, lambda n: n.meta["val"]))
    node.meta["val"] = value
    if isinstance(value, torch.Tensor):
        graph.output((node,))
    else:
        items = []
        for i, one in enumerate(value):
            item = graph.call_function(operator.getitem, (node, i))
            item.meta["val"] = one
            items.append(item)
        graph.output(tuple(items))
    return fx.GraphModule(nn.Module(), graph), tensors


def compiled(overload: Any, args: Sequence[Any]) -> tuple[Any, list[torch.Tensor]]:
    gm, tensors = traced(overload, args)
    return SegmentCompiler()(gm, is_backward=False, is_inference=False), tensors
