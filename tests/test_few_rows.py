"""Products of a few rows with weights in few bits: the kernel against its reference, by the emulator, and who is asked when."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
    StrictMinMaxConstraint,
)
from torch.utils._sympy.value_ranges import ValueRanges

from dspass.runtime import few_bits, kernels
from dspass.runtime.few_bits import MOST_ROWS, dequantise_rows, few_rows_linear, quantise_rows, quantised_linear
from dspass.runtime.formats import FORMATS, format_of
from tests.emulated import Emulator, garbage, numbers, same, setting
from tests.matrix import WHOLE

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROWS = (1, 2, 3, 4, 5, 8, 16)
EMULATORS = [Emulator(warp, order) for warp in (32, 64) for order in ("in order", "random")]

#: In order a kernel that needs a barrier and has none may be right by chance (``test_emulator.py``).
each_emulator = pytest.mark.parametrize(
    "emulator",
    [pytest.param(e, marks=() if e.order == "random" else WHOLE) for e in EMULATORS],
    ids=lambda e: f"{e.warp} {e.order}",
)
each_format = pytest.mark.parametrize("format", FORMATS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(scope="session", autouse=True)
def _built() -> None:
    for warp in (32, 64):
        kernels.build(f"emulator-{warp}")


def check(
    emulator: Emulator,
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    format: str,
) -> None:
    """That the kernel's products are the exact ones but for the rounding of its sums.

    Of ``n`` products each is rounded ``n`` times at most on its way into a sum, once more with the bias, to fp32: the bound of
    Higham, Accuracy and stability of numerical algorithms, 2002, chapter 3. The sum is then rounded to the dtype.
    """
    found = emulator.few_rows_linear(x, codes, scales, bias, format)
    assert found.dtype == x.dtype
    columns = x.shape[1]
    weight = dequantise_rows(codes, scales, columns, format, x.dtype).double()
    plus = torch.zeros(codes.shape[0], dtype=torch.double) if bias is None else bias.double()
    exact = x.double() @ weight.t() + plus
    wanted = exact.to(x.dtype)
    assert torch.equal(found.isnan(), wanted.isnan())
    is_finite = wanted.isfinite()
    assert torch.equal(found[~is_finite].nan_to_num(), wanted[~is_finite].nan_to_num())
    info = torch.finfo(x.dtype)
    magnitudes = x.double().abs() @ weight.abs().t() + plus.abs()
    bound = (columns + 1) * 1.01 * 2.0**-24 * magnitudes
    bound += (exact.abs() + bound) * (info.eps / 2 if x.dtype != torch.float32 else 0)
    bound += info.smallest_normal * info.eps  # what is rounded below the smallest normal number
    error = (found.double() - exact).abs()
    assert (error <= bound)[is_finite].all(), float((error / bound)[is_finite].max())


def weight_of(outputs: int, columns: int, format: str, group: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    return quantise_rows(numbers(outputs * columns, torch.float32, seed=7).view(outputs, columns), format, group)


# -- numbers -------------------------------------------------------------------------------------------------------------


@each_emulator
@each_format
@each_dtype
def test_any_number_of_rows(emulator: Emulator, format: str, dtype: torch.dtype) -> None:
    """Outputs are no multiple of a block's, columns none of a group's."""
    codes, scales = weight_of(7, 150, format, 32)
    bias = numbers(7, dtype)
    for rows in ROWS:
        check(emulator, numbers(rows * 150, dtype).view(rows, 150), codes, scales, bias if rows % 2 else None, format)


@each_emulator
@each_format
@pytest.mark.parametrize(
    ("outputs", "columns", "group"),
    [
        (1, 1, None),
        (4, 16, 16),
        (3, 33, 16),
        (5, 100, 48),
        (6, 1025, None),
        (2, 1100, 64),
        (9, 2100, 96),
        (1, 4200, 32),
    ],
)
def test_any_weight(emulator: Emulator, format: str, outputs: int, columns: int, group: int | None) -> None:
    """One column; groups of one piece, of an odd number, of a whole row; threads without a piece, with one, with two."""
    codes, scales = weight_of(outputs, columns, format, group)
    for rows, dtype in zip((1, 3, 4), DTYPES, strict=True):
        check(emulator, numbers(rows * columns, dtype).view(rows, columns), codes, scales, None, format)


@each_emulator
@each_format
@each_dtype
def test_weights_are_the_reference_s_to_the_last_bit(emulator: Emulator, format: str, dtype: torch.dtype) -> None:
    """Each code, also those that quantise never makes, times a row of an identity matrix: its value, rounded to the dtype."""
    rows = torch.arange(256, dtype=torch.uint8).repeat(3).view(-1, format_of(format).code_bytes(16))
    scales = torch.tensor([1.0, 3.1e-5, 1e-40, 700.3])[torch.arange(len(rows)) % 4, None]
    found = emulator.few_rows_linear(torch.eye(16, dtype=dtype), rows, scales, None, format)
    wanted = dequantise_rows(rows, scales, 16, format, dtype)
    finite = wanted.isfinite().all(1)  # zeros times an infinity are no numbers
    assert finite.sum() > len(rows) // 2
    assert torch.equal(found.t()[finite], wanted[finite])


@each_emulator
@each_format
@each_dtype
def test_what_is_not_finite(emulator: Emulator, format: str, dtype: torch.dtype) -> None:
    """In x, in scales, in a bias; in the scale of a last group, where zeros that fill up x would make NaNs of it."""
    codes, scales = weight_of(8, 40, format, 16)
    codes[2:5] = 0x11  # no zeros, which an infinite scale makes NaNs
    scales[0, 0], scales[1, 1] = float("nan"), float("inf")
    scales[2, 2], scales[3, 2] = float("inf"), -float("inf")
    scales[4, 2] = float("nan")
    x = numbers(5 * 40, dtype).view(5, 40).abs() + 1
    check(emulator, x, codes, scales, None, format)
    found = emulator.few_rows_linear(x, codes, scales, None, format)
    assert (found[:, 2] == float("inf")).all()
    assert (found[:, 3] == -float("inf")).all()
    assert found[:, (0, 4)].isnan().all()
    x[1, 3], x[2, 39], x[3, 17], x[3, 18] = float("nan"), float("inf"), float("inf"), -float("inf")
    bias = numbers(8, dtype)
    bias[5], bias[6] = float("inf"), float("nan")
    check(emulator, x, codes, scales, bias, format)


@pytest.mark.parametrize("grid", [1, 2])
def test_a_grid_that_has_to_be_cut(grid: int) -> None:
    codes, scales = weight_of(23, 300, "int4", 32)
    with setting(DSP_EMU_GRID=grid):
        for emulator in EMULATORS:
            check(emulator, numbers(16 * 300, torch.bfloat16).view(16, 300), codes, scales, None, "int4")


def test_the_same_arguments_give_the_same_result() -> None:
    """Sums are in one order, whatever threads do first."""
    codes, scales = weight_of(9, 2500, "int8", None)
    x = numbers(5 * 2500, torch.float32).view(5, 2500)
    for warp in (32, 64):
        one, other = (Emulator(warp, order).few_rows_linear(x, codes, scales, None, "int8") for order in ("", "random"))
        assert same(one, other)


@each_format
def test_codes_beyond_31_bits(format: str) -> None:
    """The last outputs of a weight of more bytes than 31 bits count; of its memory only the end is ever touched."""
    columns, of_row = 2048, format_of(format).code_bytes(2048)
    outputs = 4 * (2**31 // of_row // 4 + 2)
    codes = torch.empty((outputs, of_row), dtype=torch.uint8)
    scales = torch.empty((outputs, columns // 64))
    codes[-4:], scales[-4:] = weight_of(4, columns, format, 64)
    x, out = numbers(columns, torch.bfloat16)[None], torch.empty((1, outputs), dtype=torch.bfloat16)
    emulator = Emulator(32)
    with setting(DSP_EMU_FIRST=outputs // 4 - 1):
        emulator.call(
            "dsp_quantised_linear",
            *(x.data_ptr(), codes.data_ptr(), scales.data_ptr(), None, out.data_ptr(), 1, outputs, columns, 64),
            *(kernels.DTYPE_CODES[x.dtype], kernels.FORMAT_CODES[format]),
        )
    wanted = emulator.few_rows_linear(x, codes[-4:].clone(), scales[-4:].clone(), None, format)
    assert same(out[:, -4:], wanted)


@settings(max_examples=60, deadline=None)
@given(
    emulator=st.sampled_from(EMULATORS),
    rows=st.integers(1, MOST_ROWS),
    outputs=st.integers(1, 13),
    columns=st.integers(1, 400) | st.integers(1, 2600),
    group=st.sampled_from([None, 16, 32, 48, 64, 80, 128]),
    format=st.sampled_from(sorted(FORMATS)),
    dtype=st.sampled_from(DTYPES),
    has_bias=st.booleans(),
)
def test_any_shape(
    emulator: Emulator,
    rows: int,
    outputs: int,
    columns: int,
    group: int | None,
    format: str,
    dtype: torch.dtype,
    has_bias: bool,
) -> None:
    codes, scales = weight_of(outputs, columns, format, group)
    x = numbers(rows * columns, dtype, seed=1).view(rows, columns)
    check(emulator, x, codes, scales, numbers(outputs, dtype, seed=2) if has_bias else None, format)


@pytest.mark.parametrize(
    ("rows", "outputs", "columns", "group", "dtype", "format"),
    [
        (0, 4, 16, 16, 0, 0),
        (17, 4, 16, 16, 0, 0),
        (1, -1, 16, 16, 0, 0),
        (1, 4, 0, 16, 0, 0),
        (1, 4, 2**30 + 1, 16, 0, 0),
        (1, 4, 16, 8, 0, 0),
        (1, 4, 16, 24, 0, 0),
        (1, 4, 16, 16, 3, 0),
        (1, 4, 16, 16, 0, 5),
    ],
)
def test_what_no_product_can_be_launched_for(
    rows: int, outputs: int, columns: int, group: int, dtype: int, format: int
) -> None:
    library, buffer = kernels.load("emulator-32"), garbage(256)
    at = buffer.data_ptr()
    assert library.dsp_quantised_linear(at, at, at, None, at, rows, outputs, columns, group, dtype, format, None) == 1
    assert same(buffer, garbage(256))


def test_addresses_that_cannot_be_read_from() -> None:
    library, buffer = kernels.load("emulator-32"), garbage(256)
    at, shape = buffer.data_ptr(), (1, 1, 16, 16, 0, 0, None)
    assert library.dsp_quantised_linear(at + 4, at, at, None, at, *shape) == 1
    assert library.dsp_quantised_linear(at, at + 8, at, None, at, *shape) == 1
    assert same(buffer, garbage(256))
    assert library.dsp_quantised_linear(at, at, at, None, at, 1, 0, *shape[2:]) == 0
    assert same(buffer, garbage(256))


# -- rows written out ----------------------------------------------------------------------------------------------------


@each_emulator
@each_format
@pytest.mark.parametrize(("columns", "group"), [(1, None), (40, 16), (64, 64), (150, 48), (200, None)])
def test_rows_that_are_written_out(emulator: Emulator, format: str, columns: int, group: int | None) -> None:
    codes, scales = weight_of(6, columns, format, group)
    scales[1, 0], scales[2, -1] = float("nan"), float("inf")
    for dtype in DTYPES:
        found = emulator.dequantise_rows(codes, scales, columns, format, dtype)
        assert same(found, dequantise_rows(codes, scales, columns, format, dtype)), dtype


# -- who multiplies ------------------------------------------------------------------------------------------------------


@pytest.fixture
def served() -> Iterator[None]:
    """As if a kernel of this device were registered."""
    library = torch.library.Library("dspass", "IMPL")
    library.impl("few_rows_linear", few_rows_linear, "CPU")
    yield
    library._destroy()


def some_rows(least: int, most: int) -> torch.Tensor:
    """A fake tensor of a number of rows of which only bounds are known."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    bounds = StrictMinMaxConstraint(vr=ValueRanges(least, most), warn_only=False)
    context: StatelessSymbolicContext = StatelessSymbolicContext(
        dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC], constraint_sizes=[bounds, None]
    )
    return mode.from_tensor(torch.randn(max(least, 2), 40), symbolic_context=context)


def reads_codes(x: torch.Tensor) -> bool:
    return few_bits.reads_codes(x, torch.ones(24, 2), "cpu", "int4")


@pytest.mark.usefixtures("served")
def test_a_kernel_is_asked_for_few_rows_alone() -> None:
    assert reads_codes(torch.empty(MOST_ROWS, 40))
    assert not reads_codes(torch.empty(MOST_ROWS + 1, 40))
    assert not reads_codes(torch.empty(1, 40, dtype=torch.float64))


def test_without_a_kernel_weights_are_written_out() -> None:
    assert not reads_codes(torch.empty(1, 40))


@pytest.mark.usefixtures("served")
def test_a_number_of_rows_that_is_not_known_adds_no_guard() -> None:
    for least, most, is_few in ((2, MOST_ROWS, True), (2, MOST_ROWS + 1, False), (2, 4096, False), (17, 4096, False)):
        x = some_rows(least, most)
        assert isinstance(x.shape[0], torch.SymInt)
        environment = x.shape[0].node.shape_env
        assert environment is not None
        assert reads_codes(x) == is_few, (least, most)
        assert not environment.guards


def test_more_rows_are_refused() -> None:
    weight = weight_of(6, 40, "int4", None)
    for call in (few_rows_linear, lambda *args: _faked(torch.ops.dspass.few_rows_linear, *args)):
        with pytest.raises(ValueError, match="x of 17 rows is not for few_rows_linear, which takes 16"):
            call(torch.randn(17, 40), *weight, None, "int4")


def _faked(op: Callable[..., torch.Tensor], *args: object) -> torch.Tensor:
    with FakeTensorMode() as mode:
        return op(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args))


@pytest.mark.usefixtures("served")
def test_the_product_is_the_same_whoever_computes_it() -> None:
    codes, scales = weight_of(6, 40, "int4", 16)
    for rows in (MOST_ROWS, MOST_ROWS + 1):
        x, bias = torch.randn(rows, 40), torch.randn(6)
        wanted = torch.addmm(bias, x, dequantise_rows(codes, scales, 40, "int4", torch.float32).t())
        assert torch.equal(quantised_linear(x, codes, scales, bias, 40, "int4"), wanted)


COMPILED = """
import copy, torch
import dspass
from torch.profiler import ProfilerActivity, profile
from dspass.engines import engine_of
from dspass.passes.nodes import calls
from dspass.runtime import kernels
from dspass.runtime.few_bits import DEQUANTISE_ROWS, QUANTISED_LINEAR
from tests.test_weights import compiled, layers, small

kernels.build("emulator-32"), kernels.build("binding-emulator")
kernels.bind("binding-emulator", "emulator-32")
options = layers(format="int4", group_size=16)
for shapes, most in ((((2, 7), (4, 9), (1, 5)), None), (((3, 4), (2, 4)), 4)):
    model = dspass.quantise(small(), options)
    eager = copy.deepcopy(model)
    run = compiled(model, options)
    for shape in shapes:
        ids = torch.randint(50, shape)
        if most is not None:
            torch._dynamo.mark_dynamic(ids, 0, min=2, max=most)
        with torch.no_grad():
            run(ids)
            with profile(activities=[ProfilerActivity.CPU]) as profiled:
                found = run(ids)
            torch.testing.assert_close(found, eager(ids))
        count = sum(e.count for e in profiled.key_averages() if e.key == "dspass::few_rows_linear")
        engine = engine_of(model)
        graph = engine.compilations[-1].graphs["forward"].graph
        print(shape, len(calls(graph, QUANTISED_LINEAR)), len(calls(graph, DEQUANTISE_ROWS)), count, len(engine.compilations))
"""


def test_a_compiled_model_multiplies_few_rows_by_the_kernel() -> None:
    """Products, rows that are written out, calls of the kernel and compilations: with 14 rows; with 36, of which, and of those
    of shapes that are met later, the compiler knows no bound; and with 16 at most. The embedding reads some rows, always."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "(2, 7) 3 1 3 1",
        "(4, 9) 0 4 0 2",
        "(1, 5) 0 4 0 3",
        "(3, 4) 3 1 3 1",
        "(2, 4) 3 1 3 1",
    ]
