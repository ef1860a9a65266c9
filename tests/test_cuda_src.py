"""The kernels against their torch reference, to the last bit, on the CPU, by the emulator. Nothing here runs on a GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dspass.runtime import adamw, experts, kernels, quantise
from dspass.runtime.formats import FORMATS, format_of
from tests.emulated import Emulator, garbage, int64s, numbers, odd_blocks, pointers, same, setting
from tests.matrix import WHOLE

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LR = torch.tensor(1e-2, dtype=torch.float64)
BLOCKS = (16, 48, 64, 256, 1024, 2048, 4096)
EMULATORS = [Emulator(warp, order) for warp in (32, 64) for order in ("in order", "random")]

Tensors = list[torch.Tensor]

#: In order a kernel that needs a barrier and has none may be right by chance (``test_emulator.py``).
each_emulator = pytest.mark.parametrize(
    "emulator",
    [pytest.param(e, marks=() if e.order == "random" else WHOLE) for e in EMULATORS],
    ids=lambda e: f"{e.warp} {e.order}",
)
each_format = pytest.mark.parametrize("format", FORMATS)


@pytest.fixture(scope="session", autouse=True)
def _built() -> None:
    for warp in (32, 64):
        kernels.build(f"emulator-{warp}")


# -- one tensor ----------------------------------------------------------------------------------------------------------


@each_emulator
@each_format
@pytest.mark.parametrize("block", BLOCKS)
def test_a_tensor_there_and_back(emulator: Emulator, format: str, block: int) -> None:
    for dtype in DTYPES:
        odd = odd_blocks(block, dtype)
        for x in (odd, odd[:0], odd[-1:], odd[7 * block : 9 * block - 1]):
            codes, scales = quantise.quantise(x, format, block)
            found = emulator.quantise(x, format, block)
            assert same(found[0], codes), (dtype, x.numel())
            assert same(found[1], scales), (dtype, x.numel())
            back = emulator.dequantise(codes, scales, x.shape, format, dtype)
            assert same(back, quantise.dequantise(codes, scales, x.shape, format, dtype)), (dtype, x.numel())


@each_emulator
@each_format
def test_every_code_comes_back_in_every_dtype(emulator: Emulator, format: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(3, 3)  # also those that quantise never makes
    scales = torch.tensor([1.0, 3.1e-5, float("nan")])
    shape = (3, codes.shape[1] * 8 // format_of(format).bits)
    for dtype in DTYPES:
        back = emulator.dequantise(codes, scales, shape, format, dtype)
        assert same(back, quantise.dequantise(codes, scales, shape, format, dtype)), dtype


# -- buckets -------------------------------------------------------------------------------------------------------------


def check_bucket(
    emulator: Emulator,
    tensors: list[torch.Tensor],
    sizes: list[int],
    *,
    chunks: int,
    nodes: int,
    format: str,
    block: int,
    dtype: torch.dtype,
) -> None:
    codes, scales = quantise.quantise_bucket(tensors, sizes, chunks, format, block, nodes)
    found = emulator.quantise_bucket(tensors, sizes, chunks, format, block, nodes)
    assert same(found[0], codes)
    assert same(found[1], scales)
    for back, expected in zip(
        emulator.dequantise_bucket(codes, scales, sizes, format, block, dtype),
        quantise.dequantise_bucket(codes, scales, sizes, format, block, dtype),
        strict=True,
    ):
        assert same(back, expected)
    for total, expected in zip(
        emulator.dequantise_sum(codes, scales, sizes, format, block, 1 / 3, dtype),
        quantise.dequantise_sum(codes, scales, sizes, format, block, 1 / 3, dtype),
        strict=True,
    ):
        assert same(total, expected)


@each_emulator
@each_format
@pytest.mark.parametrize("block", [16, 64, 256, 1024, 2048])
def test_a_bucket(emulator: Emulator, format: str, block: int) -> None:
    """Chunks that begin at odd addresses, that end within a block, that are empty, and that no tensor reaches."""
    sizes = [1, 0, 2 * block + 3, block, 5, 3 * block]
    for dtype, (chunks, nodes) in zip(DTYPES, ((1, 1), (4, 2), (6, 3)), strict=True):
        lengths = [chunks, 0, chunks * sizes[2] - 7, chunks * block, 2, 0]
        tensors = [numbers(length, dtype, seed=i) for i, length in enumerate(lengths)]
        tensors[3][-1] = float("nan")
        check_bucket(emulator, tensors, sizes, chunks=chunks, nodes=nodes, format=format, block=block, dtype=dtype)


@each_emulator
def test_a_bucket_of_more_tensors_than_a_launch_takes_and_of_all_dtypes(emulator: Emulator) -> None:
    sizes = [1 + i * 7 % 40 for i in range(150)]
    tensors = [numbers(2 * size, DTYPES[i % 3], seed=i) for i, size in enumerate(sizes)]
    check_bucket(emulator, tensors, sizes, chunks=2, nodes=1, format="int4", block=16, dtype=torch.float32)


@each_format
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bucket_at_odd_addresses(format: str, dtype: torch.dtype) -> None:
    """Also of the codes, which are a part of a larger buffer somewhere."""
    emulator = Emulator(32)
    x = numbers(301, dtype)[1:]
    codes, scales = quantise.quantise(x, format, 48)
    for shift in (1, 2, 4):
        buffer = garbage(codes.numel() + shift, dtype=torch.uint8)
        found = buffer[shift:].view(codes.shape)
        args = (x.data_ptr(), x.numel(), kernels.DTYPE_CODES[dtype])
        made = torch.empty_like(scales)
        emulator.call("dsp_quantise", *args, found.data_ptr(), made.data_ptr(), 48, kernels.FORMAT_CODES[format])
        assert same(found, codes)
        assert same(made, scales)
        assert (buffer[:shift] == 0xA5).all()
        back = emulator.dequantise(found, scales, x.shape, format, dtype)
        assert same(back, quantise.dequantise(codes, scales, x.shape, format, dtype))


@pytest.mark.parametrize("grid", [1, 3])
def test_a_grid_that_has_to_be_cut(grid: int) -> None:
    sizes = [2000, 77, 1300]
    tensors = [numbers(4 * size, torch.bfloat16, seed=size) for size in sizes]
    with setting(DSP_EMU_GRID=grid):
        check_bucket(
            Emulator(32, "random"),
            tensors,
            sizes,
            chunks=4,
            nodes=2,
            format="fp6_e3m2",
            block=64,
            dtype=torch.bfloat16,
        )


def test_beyond_31_bits() -> None:
    """The last thread blocks over a tensor of more values than 31 bits count; of its memory only the end is ever touched."""
    emulator, block, format = Emulator(32), 256, "int4"
    count = 2**31 + 2**20 + 5
    end = 3 * block + 5
    whole = torch.empty(count, dtype=torch.bfloat16)
    whole[-end:] = numbers(end, torch.bfloat16)
    blocks = quantise.blocks_of(count, block)
    codes = torch.empty((blocks, block // 2), dtype=torch.uint8)
    scales = torch.empty(blocks)
    tiles = quantise.blocks_of(blocks, 32)  # of eight groups, four blocks each
    args = (codes.data_ptr(), scales.data_ptr(), block, kernels.FORMAT_CODES[format])
    with setting(DSP_EMU_FIRST=tiles - 2):
        emulator.call("dsp_quantise", whole.data_ptr(), count, kernels.DTYPE_CODES[whole.dtype], *args)
        expected = quantise.quantise(whole[-end:], format, block)
        assert same(codes[-4:], expected[0])
        assert same(scales[-4:], expected[1])
        whole[-end:] = 0
        back = (codes.data_ptr(), scales.data_ptr(), whole.data_ptr(), count, kernels.DTYPE_CODES[whole.dtype])
        emulator.call("dsp_dequantise", *back, block, kernels.FORMAT_CODES[format])
    assert same(whole[-end:], quantise.dequantise(*expected, (end,), format, whole.dtype))


@settings(max_examples=25, deadline=None)
@given(
    data=st.data(),
    emulator=st.sampled_from(EMULATORS),
    format=st.sampled_from(list(FORMATS)),
    block=st.integers(1, 40).map(lambda n: 16 * n),
    sizes=st.lists(st.integers(0, 700), min_size=1, max_size=5),
    devices=st.integers(1, 3),
    nodes=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
)
def test_any_bucket(
    data: st.DataObject,
    emulator: Emulator,
    format: str,
    block: int,
    sizes: list[int],
    devices: int,
    nodes: int,
    dtype: torch.dtype,
) -> None:
    chunks = devices * nodes
    tensors = [
        numbers(data.draw(st.integers(0, chunks * size), label="values"), data.draw(st.sampled_from(DTYPES)), seed=i)
        for i, size in enumerate(sizes)
    ]
    check_bucket(emulator, tensors, sizes, chunks=chunks, nodes=nodes, format=format, block=block, dtype=dtype)


@pytest.mark.parametrize(
    ("block", "format", "dtype", "chunks", "nodes"),
    [(24, 0, 0, 2, 1), (0, 0, 0, 2, 1), (16, 5, 0, 2, 1), (16, 0, 3, 2, 1), (16, 0, 0, 3, 2), (16, 0, 0, 2, 0)],
)
def test_what_no_kernel_can_be_launched_for(block: int, format: int, dtype: int, chunks: int, nodes: int) -> None:
    x, codes, scales = torch.zeros(64), garbage(128, dtype=torch.uint8), garbage(8)
    error = kernels.load("emulator-32").dsp_quantise_bucket(
        *(pointers([x]), int64s([64]), int64s([32]), (ctypes.c_int * 1)(dtype), 1, chunks, nodes),
        *(codes.data_ptr(), scales.data_ptr(), block, format, None),
    )
    assert error == 1
    assert (codes == 0xA5).all()


# -- copies --------------------------------------------------------------------------------------------------------------


def check_copy(emulator: Emulator, tensors: list[torch.Tensor], bytes: list[int], chunks: int) -> None:
    """Against slices; ``tensors`` are of bytes."""
    whole, row = [t.numel() for t in tensors], sum(bytes)
    buffer = garbage(chunks, row, dtype=torch.uint8)
    emulator.call(
        "dsp_copy_in", pointers(tensors), int64s(whole), int64s(bytes), len(tensors), chunks, buffer.data_ptr()
    )
    parts = [
        torch.nn.functional.pad(t, (0, chunks * each - t.numel())).view(chunks, each)
        for t, each in zip(tensors, bytes, strict=True)
    ]
    assert torch.equal(buffer, torch.cat([buffer[:, :0], *parts], dim=1))
    back = [garbage(t.numel(), dtype=torch.uint8) for t in tensors]
    emulator.call("dsp_copy_out", buffer.data_ptr(), pointers(back), int64s(whole), int64s(bytes), len(tensors), chunks)
    assert all(torch.equal(found, t) for found, t in zip(back, tensors, strict=True))


def some_bytes(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(count)).to(torch.uint8)


@each_emulator
@pytest.mark.parametrize("grid", [None, 2])
def test_copies(emulator: Emulator, grid: int | None) -> None:
    """Tiles that are full, parts at odd addresses, chunks that no tensor reaches, empty ones, more than a launch takes."""
    with setting(DSP_EMU_GRID=grid):
        check_copy(emulator, [some_bytes(3 * 16384 + 5)], [16384 + 16], 3)
        check_copy(emulator, [some_bytes(n) for n in (64, 0, 7, 999, 0)], [32, 0, 7, 333, 5], 3)
        check_copy(emulator, [some_bytes(2 * (i + 1)) for i in range(130)], [i + 1 for i in range(130)], 2)
        check_copy(emulator, [], [], 3)
        check_copy(emulator, [some_bytes(40)[1:]], [13], 3)


@settings(max_examples=25, deadline=None)
@given(
    emulator=st.sampled_from(EMULATORS),
    sizes=st.lists(st.tuples(st.integers(0, 2000), st.floats(0, 1)), max_size=6),
    chunks=st.integers(1, 5),
)
def test_any_copy(emulator: Emulator, sizes: list[tuple[int, float]], chunks: int) -> None:
    tensors = [some_bytes(round(share * chunks * each)) for each, share in sizes]
    check_copy(emulator, tensors, [each for each, _ in sizes], chunks)


# -- experts -------------------------------------------------------------------------------------------------------------


def some_routing(tokens: int, top_k: int, num_experts: int, *, seed: int = 0) -> torch.Tensor:
    """Half of it to few experts, so that a warp has many of one; some are none."""
    generator = torch.Generator().manual_seed(seed)
    any_of = torch.randint(-1, num_experts + 1, (tokens, top_k), generator=generator)
    few = torch.randint(0, min(2, num_experts), (tokens, top_k), generator=generator)
    return torch.where(torch.rand((tokens, top_k), generator=generator) < 0.5, any_of, few)


def check_experts(
    emulator: Emulator,
    routing: torch.Tensor,
    num_experts: int,
    hidden: int,
    dtype: torch.dtype,
    weights_dtype: torch.dtype | None,
) -> None:
    tokens, top_k = routing.shape
    x = numbers(tokens * hidden, dtype).view(tokens, hidden)
    rows, positions, ends = experts.permute_experts(x, routing, num_experts)
    found = emulator.sort_experts(routing, num_experts)
    assert same(found[0], positions)
    assert same(found[1], ends)
    assert same(emulator.spread_experts(x, positions), rows)
    weights = None if weights_dtype is None else numbers(tokens * top_k, weights_dtype, seed=1).view(tokens, top_k)
    assert same(emulator.spread_experts(x, positions, weights), experts.spread_experts(x, positions, weights))
    rows = numbers(rows.numel(), dtype, seed=2).view(rows.shape)
    if rows.numel():
        rows[0, 0] = float("nan")
    assert same(
        emulator.unpermute_experts(rows, positions, weights), experts.unpermute_experts(rows, positions, weights)
    )


@each_emulator
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_experts(emulator: Emulator, dtype: torch.dtype) -> None:
    """One expert and many, one token, none, tiles that are full and that are not, rows at odd addresses, wide rows."""
    for case, (tokens, top_k, num_experts, hidden) in enumerate(
        [
            (1, 1, 1, 8),
            (128, 1, 3, 16),
            (129, 3, 5, 7),
            (200, 2, 300, 24),
            (3, 8, 8, 2100),
            (0, 2, 4, 8),
            (4, 0, 2, 8),
            (5, 2, 2, 0),
        ]
    ):
        index = (torch.int32, torch.int64)[case % 2]
        weights_dtype = (None, *DTYPES)[(case + DTYPES.index(dtype)) % 4]
        routing = some_routing(tokens, top_k, num_experts).to(index)
        check_experts(emulator, routing, num_experts, hidden, dtype, weights_dtype)


@each_emulator
def test_experts_all_of_one_and_all_dropped(emulator: Emulator) -> None:
    for one in (0, 2, 3, -1, 2**40 + 1, -(2**40)):  # whose lower half would be an expert
        check_experts(emulator, torch.full((70, 4), one), 3, 9, torch.bfloat16, torch.float32)


def test_as_many_experts_as_there_may_be() -> None:
    """A thread block then is two warps, or, of 64 threads, one or two."""
    for warp in (32, 64):
        check_experts(Emulator(warp, "random"), some_routing(90, 2, 8192), 8192, 8, torch.float32, None)


@pytest.mark.parametrize("grid", [1, 3])
def test_experts_of_a_grid_that_has_to_be_cut(grid: int) -> None:
    with setting(DSP_EMU_GRID=grid):
        check_experts(Emulator(32, "random"), some_routing(300, 3, 6), 6, 40, torch.bfloat16, torch.bfloat16)


def test_rows_beyond_31_bits() -> None:
    """The last token of more values than 31 bits count; of its memory only the end is ever touched."""
    emulator, hidden = Emulator(32), 2048
    tokens = 2**20 + 2
    x, rows = (torch.empty((tokens, hidden), dtype=torch.bfloat16) for _ in range(2))
    positions = torch.arange(tokens, dtype=torch.int32)[:, None]
    x[-1] = numbers(hidden, torch.bfloat16)
    shape = (tokens, 1, hidden, kernels.DTYPE_CODES[x.dtype])
    with setting(DSP_EMU_FIRST=tokens - 1):
        emulator.call("dsp_spread_experts", x.data_ptr(), positions.data_ptr(), None, 0, rows.data_ptr(), *shape)
        assert same(rows[-1], x[-1])
        x[-1] = 0
        emulator.call("dsp_unpermute_experts", rows.data_ptr(), positions.data_ptr(), None, 0, x.data_ptr(), *shape)
    assert same(x[-1], rows[-1])


@settings(max_examples=25, deadline=None)
@given(
    emulator=st.sampled_from(EMULATORS),
    shape=st.tuples(st.integers(0, 150), st.integers(0, 5)),
    num_experts=st.integers(1, 70),
    hidden=st.integers(0, 50),
    dtype=st.sampled_from(DTYPES),
    weights_dtype=st.sampled_from([None, *DTYPES]),
    seed=st.integers(0, 2**16),
)
def test_any_experts(
    emulator: Emulator,
    shape: tuple[int, int],
    num_experts: int,
    hidden: int,
    dtype: torch.dtype,
    weights_dtype: torch.dtype | None,
    seed: int,
) -> None:
    check_experts(emulator, some_routing(*shape, num_experts, seed=seed), num_experts, hidden, dtype, weights_dtype)


@pytest.mark.parametrize(("count", "num_experts"), [(-1, 4), (2**31, 4), (4, 0), (4, 8193)])
def test_what_no_experts_can_be_sorted_for(count: int, num_experts: int) -> None:
    library, space, positions = kernels.load("emulator-32"), ctypes.c_int64(7), garbage(8, dtype=torch.int32)
    assert library.dsp_sort_experts_space(count, num_experts, ctypes.byref(space)) == 1
    address = positions.data_ptr()
    assert library.dsp_sort_experts(address, 0, count, num_experts, address, address, address, None) == 1
    assert library.dsp_spread_experts(address, address, None, 0, address, 1, -1, 1, 0, None) == 1
    assert library.dsp_spread_experts(address, address, address, 3, address, 1, 1, 1, 0, None) == 1
    assert library.dsp_unpermute_experts(address, address, None, 0, address, 1, 1, 1, 3, None) == 1
    assert space.value == 7
    assert (positions.view(torch.uint8) == 0xA5).all()


# -- AdamW ---------------------------------------------------------------------------------------------------------------


def check_adamw(
    emulator: Emulator,
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    *,
    seed: int | None,
    steps: tuple[int, ...] = (1, 2, 1000),
) -> None:
    """From the same states, of fp32 and of 8 bits, which the first step finds as zeros."""

    def stepped(step_of: Callable[..., None], states_of: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]) -> Tensors:
        own = [p.clone() for p in params]
        states = [list(one) for one in zip(*map(states_of, params), strict=True)]
        for step in steps:
            step_of(own, grads, *states, step, LR, 0.9, 0.99, 1e-8, 0.1, seed=seed)
        return [*own, *(t for state in states for t in state)]

    for name, states_of in (("adamw_", two_zeros), ("adamw_8bit_", adamw.states_of_8_bits)):
        found, expected = stepped(getattr(emulator, name), states_of), stepped(getattr(adamw, name), states_of)
        assert all(map(same, found, expected)), name


def two_zeros(param: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(param.shape), torch.zeros(param.shape)


@each_emulator
@pytest.mark.parametrize("seed", [None, 0, 2**62 + 5, -3])
def test_adamw(emulator: Emulator, seed: int | None) -> None:
    """Of both dtypes: tiles that are full and that are not, none, one value, odd addresses, what is not finite, ties."""
    pairs = [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)]
    sizes = [1, 0, 2048, 4100, 9]
    params = [numbers(n, pairs[i % 3][0], seed=i) for i, n in enumerate(sizes)]
    grads = [numbers(n, pairs[i % 3][1], seed=i + 9) for i, n in enumerate(sizes)]
    params[3][:4] = torch.tensor([float("nan"), float("inf"), -float("inf"), torch.finfo(torch.bfloat16).max])
    grads[3][4:8] = torch.tensor([float("nan"), float("inf"), 1e30, 1e-30])
    check_adamw(emulator, params, grads, seed=seed)
    if not seed:  # a second moment beside which others are less than half of the smallest code
        tiny = 10 ** -torch.linspace(0, 30, 512)
        check_adamw(emulator, [torch.ones(512)], [tiny * torch.tensor([1.0, -1.0]).repeat(256)], seed=seed)
    buffer = [numbers(100, dtype, seed=3) for dtype in (torch.bfloat16, torch.float32)]
    check_adamw(emulator, [t[1:] for t in buffer], [t[:-1] for t in reversed(buffer)], seed=seed)


@pytest.mark.parametrize("grid", [None, 2])
def test_adamw_of_more_tensors_than_a_launch_takes(grid: int | None) -> None:
    sizes = [1 + i * 7 % 40 for i in range(130)]
    params = [numbers(n, (torch.float32, torch.bfloat16)[i % 2], seed=i) for i, n in enumerate(sizes)]
    grads = [numbers(n, torch.float32, seed=i + 500) for i, n in enumerate(sizes)]
    with setting(DSP_EMU_GRID=grid):
        check_adamw(Emulator(32, "random"), params, grads, seed=11)


def test_adamw_beyond_32_bits() -> None:
    """The last values of more than 32 bits count, and their random bits. Only they are there: the rest is never touched."""
    count, end = 2**32 + 2053, 2048 + 5
    expected = [
        numbers(end, t, seed=i).abs() for i, t in enumerate((torch.bfloat16, torch.bfloat16, *[torch.float32] * 2))
    ]
    found = [t.clone() for t in expected]
    begin = [(ctypes.c_void_p * 1)(t.data_ptr() - (count - end) * t.itemsize) for t in found]
    code = (ctypes.c_int * 1)(kernels.DTYPE_CODES[torch.bfloat16])
    with setting(DSP_EMU_FIRST=count // 2048 - 1):
        Emulator(32).call("dsp_adamw", *begin, int64s([count]), code, code, 1, 3, 1e-2, 0.9, 0.99, 1e-8, 0.1, 1, 5)
    whole = expected[0].float()
    _, grad, first, second = expected
    adamw.adamw_([whole], [grad], [first], [second], 3, LR, 0.9, 0.99, 1e-8, 0.1)
    random = adamw.random_of(adamw.key_of(5, 3, 0), torch.arange(count - end, count))
    expected[0] = adamw.rounded(whole, random)
    assert all(same(*pair) for pair in zip(found, expected, strict=True))


def test_adamw_of_8_bits_beyond_32_bits() -> None:
    count, end = 2**32 + 2053, 2048 + 5
    param, grad = (numbers(end, torch.bfloat16, seed=i) for i in range(2))
    states = adamw.states_of_8_bits(param)
    whole, *moments = adamw._stepped(param, grad, *two_zeros(param), adamw._factors(3, LR, 0.9, 0.99, 1e-8, 0.1))
    random = adamw.random_of(adamw.key_of(5, 3, 0), torch.arange(count - end, count))
    expected = [adamw.rounded(whole, random), *adamw.stored(*moments, random)]
    tensors = (param, grad, *states)
    before = [(count - end) * t.itemsize // (1 if t.dim() == 2 or t.numel() == end else 256) for t in tensors]
    begin = [(ctypes.c_void_p * 1)(t.data_ptr() - b) for t, b in zip(tensors, before, strict=True)]
    code = (ctypes.c_int * 1)(kernels.DTYPE_CODES[torch.bfloat16])
    with setting(DSP_EMU_FIRST=count // 2048 - 1):
        Emulator(32).call("dsp_adamw_8bit", *begin, int64s([count]), code, code, 1, 3, 1e-2, 0.9, 0.99, 1e-8, 0.1, 1, 5)
    assert all(map(same, (param, *states), expected))


@pytest.mark.parametrize(("step", "param", "grad", "values"), [(0, 0, 0, 4), (1, 1, 0, 4), (1, 0, 3, 4), (1, 0, 0, -1)])
def test_what_no_adamw_can_be_launched_for(step: int, param: int, grad: int, values: int) -> None:
    one = garbage(4)
    at, codes = pointers([one]), (ctypes.c_int * 1)
    rest = (int64s([values]), codes(param), codes(grad), 1, step, 1e-3, 0.9, 0.99, 1e-8, 0.1, 0, 0, None)
    assert kernels.load("emulator-32").dsp_adamw(*[at] * 4, *rest) == 1
    assert kernels.load("emulator-32").dsp_adamw_8bit(*[at] * 6, *rest) == 1
    assert same(one, garbage(4))
