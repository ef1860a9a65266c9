"""CUTLASS's library: that nvcc takes its units, and all that stands before them, from the operators to the arrays that they
multiply by, with plain loops on the CPU in their place. No product of CUTLASS's has run."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dspass.runtime import compat, cutlass, few_bits, grouped, kernels
from dspass.runtime.kernels import DTYPE_CODES, KernelError
from tests.emulated import garbage, same, setting
from tests.test_grouped import check, ends_of, laid, looped, looped_outer, some

SOURCES = Path(__file__).parent / "emulated_src"
ROOT = Path(__file__).parent.parent
UNITS = kernels.sources_of(kernels.target_of("cutlass"))
HALVES = (torch.float16, torch.bfloat16)
CAPABILITIES = (8, 9)
#: Compiled each time: those that take half a minute at most, and of those with kernels of CUTLASS's one.
QUICK = ("grouped.cu", "grouped_sm80.cu", "mixed.cu")
#: A function that each unit has.
ENTRIES = {
    "grouped.cu": "dsp_grouped_product",
    "grouped_sm80.cu": "dsp::grouped::run_sm80(",
    "grouped_sm90.cu": "dsp::grouped::run_sm90(",
    "mixed.cu": "dsp_mixed_product",
    "mixed_sm80.cu": "dsp::mixed::run_sm80(",
    "mixed_sm90.cu": "dsp::mixed::run_sm90(",
}


def _lack() -> str | None:
    try:
        kernels.compiler_of(kernels.target_of("cutlass"))
        kernels.cutlass_headers()
    except KernelError as error:
        return str(error)
    return None


LACK = _lack()
needs_cutlass = pytest.mark.skipif(LACK is not None, reason=LACK or "")


# -- compilers -----------------------------------------------------------------------------------------------------------


def _is_quick(unit: Path) -> bool:
    return unit.name in QUICK or kernels.object_path("cutlass", unit, kernels.unit_flags("cutlass", unit)).is_file()


@needs_cutlass
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_nvcc_compiles(unit: Path, request: pytest.FixtureRequest) -> None:
    """Each time the quick ones; the others where ``make kernels`` has compiled them, or with ``--whole-matrix``."""
    if not _is_quick(unit) and not request.config.getoption("--whole-matrix"):
        pytest.skip("takes long, and up to 5 GB: --whole-matrix compiles it, and where make kernels has, this sees it")
    symbols = subprocess.run(
        ["nm", "-C", kernels.unit_of("cutlass", unit)], capture_output=True, text=True, check=True
    ).stdout
    assert " T " + ENTRIES[unit.name] in symbols


@needs_cutlass
def test_the_library_loads_without_a_driver(request: pytest.FixtureRequest) -> None:
    if not all(map(_is_quick, UNITS)) and not request.config.getoption("--whole-matrix"):
        pytest.skip("its units take minutes: --whole-matrix compiles them, and where make kernels has, this sees them")
    library = kernels.build("cutlass")
    symbols = subprocess.run(["nm", "-D", library], capture_output=True, text=True, check=True).stdout
    exported = {line.split()[-1] for line in symbols.splitlines() if " T " in line}
    assert exported == set(kernels.CUTLASS_SIGNATURES)
    assert "libtorch" not in symbols
    if not torch.cuda.is_available():
        assert kernels.load("cutlass").dsp_grouped_workspace(8, ctypes.byref(ctypes.c_int64())) not in (0, 1)


# -- products ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    kernels.build("cutlass-emulator")
    return kernels.load("cutlass-emulator")


@pytest.fixture
def emulated(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutlass, "library_for", lambda device: library)
    monkeypatch.setattr(compat, "multiplies_grouped", lambda *_: False)  # torch's own, which goes first


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    counts=st.lists(st.one_of(st.just(0), st.integers(1, 40)), min_size=1, max_size=6),
    behind=st.integers(0, 5),
    inner=st.sampled_from((8, 16, 24, 40)),
    columns=st.sampled_from((8, 16, 32)),
    dtype=st.sampled_from(HALVES),
    layout=st.sampled_from(("rows", "columns")),
    capability=st.sampled_from(CAPABILITIES),
    order=st.sampled_from((None, 3)),
)
def test_products_are_those_of_a_loop(
    emulated: None,
    counts: list[int],
    behind: int,
    inner: int,
    columns: int,
    dtype: torch.dtype,
    layout: str,
    capability: int,
    order: int | None,
) -> None:
    """Experts without rows among them, rows behind the last, threads in any order; of either unit."""
    rows = sum(counts) + behind
    x, weight, grad = some(rows, inner, columns, len(counts), dtype)
    weight, ends = laid(weight, layout), ends_of(counts)
    with setting(DSP_EMU_CAPABILITY=capability, DSP_EMU_SHUFFLE=order):
        product, outer = cutlass.product(x, weight, ends), cutlass.outer(x, grad, ends)
    if rows == 0:
        assert product is outer is None
        return
    assert product is not None
    assert outer is not None
    check(product, looped, x, weight, ends)
    check(outer, looped_outer, x, grad, ends)


def test_parts_of_larger_tensors_are_read_where_they_lie(emulated: None) -> None:
    """Rows with gaps between them, and every second matrix."""
    x, weight, grad = some(40, 48, 32, 6, torch.bfloat16)
    ends = ends_of((7, 0, 20))
    some_x, some_weight, some_grad = x[:, 8:32], weight[::2, 8:32, 16:], grad[:, 16:]
    product, outer = (
        cutlass.product(some_x, some_weight, ends),
        cutlass.outer(some_x, some_grad, ends),
    )
    assert product is not None
    assert outer is not None
    check(product, looped, some_x, some_weight, ends)
    check(outer, looped_outer, some_x, some_grad, ends)


_WEIGHT = torch.ones(2, 16, 8, dtype=torch.bfloat16)
_X, _ENDS = torch.ones(5, 16, dtype=torch.bfloat16), torch.tensor([2, 4], dtype=torch.int32)
_WIDE = torch.ones(5, 24, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (_X.float(), _WEIGHT.float()),
        (_X[:, :12].contiguous(), _WEIGHT[:, :12].contiguous()),  # rows of 24 bytes
        (_X, _WEIGHT[..., :4].contiguous()),
        (_WIDE[:, 1:17], _WEIGHT),  # begins at a multiple of 2
        (torch.ones(5, 20, dtype=torch.bfloat16)[:, :16], _WEIGHT),  # rows 40 bytes apart
        (laid(_X, "columns"), _WEIGHT),
        (laid(_X, "repeated"), _WEIGHT),
        (_X, laid(_WEIGHT, "gaps")),
        (_X[:0], _WEIGHT),
        (_X[:, :0], _WEIGHT[:, :0]),
        (_X, _WEIGHT[..., :0]),
    ],
    ids=[
        "fp32",
        "inner",
        "columns",
        "begin",
        "apart",
        "by columns",
        "repeated",
        "gaps",
        "no rows",
        "no inner",
        "no columns",
    ],
)
def test_what_does_not_fit_takes_another_path(emulated: None, x: torch.Tensor, weight: torch.Tensor) -> None:
    """And has its result there."""
    ends = _ENDS.clamp(max=x.shape[0])
    assert cutlass.product(x, weight, ends) is None
    check(grouped._product_on_cuda(x, weight, ends), looped, x, weight, ends)


@pytest.mark.parametrize(
    ("x", "grad"),
    [
        (_X.float(), _X.float()),
        (_X[:, :12].contiguous(), _X),
        (_X, _X[:, :12].contiguous()),
        (_WIDE[:, 1:17], _X),
        (_X, _WIDE[:, 1:17]),
        (laid(_X, "columns"), _X),
        (_X, laid(_X, "columns")),
        (_X, laid(_X, "repeated")),
        (_X[:0], _X[:0]),
        (_X[:, :0], _X),
        (_X, _X[:, :0]),
    ],
    ids=[
        "fp32",
        "inner",
        "columns",
        "begin of x",
        "of grad",
        "x by columns",
        "grad",
        "repeated",
        "no rows",
        "no x",
        "no grad",
    ],
)
def test_outer_products_that_do_not_fit_take_another_path(emulated: None, x: torch.Tensor, grad: torch.Tensor) -> None:
    ends = _ENDS.clamp(max=x.shape[0])
    assert cutlass.outer(x, grad, ends) is None
    check(grouped._outer_on_cuda(x, grad, ends), looped_outer, x, grad, ends)


def test_ends_with_gaps_and_devices_that_differ_take_another_path(emulated: None) -> None:
    gaps = torch.tensor([2, 9, 4, 9], dtype=torch.int32)[::2]
    assert cutlass.product(_X, _WEIGHT, gaps) is None
    assert cutlass.product(_X, _WEIGHT, _ENDS) is not None
    assert cutlass.product(_X, _WEIGHT.to("meta"), _ENDS) is None


@pytest.mark.parametrize("is_built", [False, True])
def test_tensors_on_a_cpu_are_not_given_to_a_gpus_library(is_built: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made = ctypes.CDLL(None) if is_built else None
    monkeypatch.setattr(kernels, "cutlass", lambda: made)
    assert cutlass.library_for(torch.device("cuda")) is made
    assert cutlass.product(_X, _WEIGHT, _ENDS) is None
    assert cutlass.outer(_X, _X, _ENDS) is None


def test_an_older_gpu_takes_another_path(emulated: None) -> None:
    with setting(DSP_EMU_CAPABILITY=7):
        assert cutlass.product(_X, _WEIGHT, _ENDS) is None
    with setting(DSP_EMU_CAPABILITY=12):
        assert cutlass.product(_X, _WEIGHT, _ENDS) is not None


def test_what_the_driver_refuses_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    refusing = SimpleNamespace(dsp_grouped_workspace=lambda *_: 35)
    monkeypatch.setattr(cutlass, "library_for", lambda device: refusing)
    with pytest.raises(RuntimeError, match="could not be launched: the driver answered 35"):
        cutlass.product(_X, _WEIGHT, _ENDS)


DISPATCHER = """
import os
import torch
from dspass.runtime import compat, grouped, cutlass, kernels
from tests.test_grouped import check, ends_of, looped, looped_outer, some

kernels.build("cutlass-emulator")
library = kernels.load("cutlass-emulator")
cutlass.library_for = lambda device: library
compat.multiplies_grouped = lambda *_: False
calls = []
for name in ("product", "outer"):
    def counted(*args, plain=getattr(cutlass, name), name=name):
        found = plain(*args)
        calls.append((name, found is not None))
        return found
    setattr(cutlass, name, counted)
over = torch.library.Library("dspass", "IMPL")
over.impl("grouped_product", grouped._product_on_cuda, "CPU", allow_override=True)
over.impl("grouped_outer", grouped._outer_on_cuda, "CPU", allow_override=True)

ops = torch.ops.dspass
ends = ends_of((9, 0, 14))
x, weight, grad = some(25, 24, 16, 3, torch.bfloat16)
for is_by_columns in (False, True):
    held = weight.transpose(1, 2).contiguous().transpose(1, 2) if is_by_columns else weight.clone()
    rows, held = x.clone().requires_grad_(), held.requires_grad_()
    for run in (ops.grouped_product, torch.compile(ops.grouped_product, fullgraph=True, backend="aot_eager")):
        found = run(rows, held, ends)
        to_x, to_weight = torch.autograd.grad(found, (rows, held), grad)
        check(found.detach(), looped, x, weight, ends)
        check(to_x, lambda g, w, e: looped(g, w.transpose(1, 2), e), grad, weight, ends)
        check(to_weight, looped_outer, x, grad, ends)
        assert to_weight.stride() == held.stride()
        assert sorted(calls) == [("outer", True), ("product", True), ("product", True)], calls
        calls.clear()
for name, args in (("grouped_product", (x, weight, ends)), ("grouped_outer", (x, grad, ends))):
    torch.library.opcheck(getattr(ops, name).default, args, test_utils=("test_schema", "test_faketensor"))
check(ops.grouped_product(x.float(), weight.float(), ends), looped, x.float(), weight.float(), ends)
assert calls[-1] == ("product", False)
print("done")
"""


def test_operators_and_their_gradients_reach_the_library() -> None:
    """In a process of its own, where what serves a GPU serves the CPU."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", DISPATCHER], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"


# -- the C interface -----------------------------------------------------------------------------------------------------


def _call(library: ctypes.CDLL, is_outer: bool = False, **changed: object) -> tuple[int, torch.Tensor]:
    """Of three experts, 24 values by 16; with other arguments in place of some. The answer, and the result over garbage."""
    ends = ends_of((5, 0, 9))
    x, weight, grad = some(17, 24, 16, 3, torch.bfloat16)
    out = garbage(*((3, 24, 16) if is_outer else (17, 16)), dtype=torch.bfloat16)
    bytes = ctypes.c_int64()
    assert library.dsp_grouped_workspace(3, ctypes.byref(bytes)) == 0
    guarded = garbage(bytes.value + 256, dtype=torch.uint8)
    begin = -guarded.data_ptr() % 64 + 64
    own: dict[str, object] = {"x": x.data_ptr(), "x_stride": 24}
    if is_outer:
        own |= {"grad": grad.data_ptr(), "grad_stride": 16}
    else:
        own |= {"weight": weight.data_ptr(), "matrix": 24 * 16, "row": 16, "column": 1}
    own |= {"ends": ends.data_ptr(), "out": out.data_ptr(), "rows": 17, "inner": 24, "columns": 16, "experts": 3}
    own |= {"dtype": 2, "workspace": guarded.data_ptr() + begin, "bytes": bytes.value, "stream": None}
    assert set(changed) <= set(own)
    name = "dsp_grouped_outer" if is_outer else "dsp_grouped_product"
    error = getattr(library, name)(*(own | changed).values())
    around = torch.cat([guarded[:begin], guarded[begin + bytes.value :]])
    assert (around == 0xA5).all()
    if error == 0:
        check(out, looped_outer if is_outer else looped, x, grad if is_outer else weight, ends)
    return error, out


@pytest.mark.parametrize("grid", [None, 1, 3])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_all_is_written_and_nothing_else(library: ctypes.CDLL, capability: int, grid: int | None) -> None:
    """Also by fewer thread blocks than there is work for."""
    with setting(DSP_EMU_CAPABILITY=capability, DSP_EMU_GRID=grid):
        error, product = _call(library)
        assert error == 0
        assert not product[14:].any()
        error, outer = _call(library, is_outer=True)
        assert error == 0
        assert not outer[1].any()


def test_matrices_without_rows_are_filled_in_parts(library: ctypes.CDLL, emulated: None) -> None:
    """Of more than one part, the last of which is not whole; and more experts than a thread block has threads."""
    x, _, grad = some(3, 72, 80, 4, torch.float16)
    counts = [0, 2, 0, 1]
    with setting(DSP_EMU_GRID=2):
        found = cutlass.outer(x, grad, ends_of(counts))
    assert found is not None
    check(found, looped_outer, x, grad, ends_of(counts))
    many = [e % 7 == 0 for e in range(300)]
    x, weight, _ = some(sum(many), 8, 8, 300, torch.float16)
    with setting(DSP_EMU_GRID=1):
        found = cutlass.product(x, weight, ends_of(many))
    assert found is not None
    check(found, looped, x, weight, ends_of(many))


_ODD = 0x10002  # an address that is no multiple of 16, and that nothing reads
REFUSED: list[dict[str, object]] = [
    *({"dtype": dtype} for dtype in (-1, DTYPE_CODES[torch.float32], 3)),
    *({"experts": experts} for experts in (-1, 0, 8193)),
    *({"rows": rows} for rows in (-1, 0, 2**31)),
    *({"inner": inner} for inner in (-8, 0, 12, 2**31)),
    *({"columns": columns} for columns in (-8, 0, 12, 2**31)),
    *({name: value} for name in ("x", "out", "workspace") for value in (None, _ODD)),
    {"ends": None},
    *({"x_stride": stride} for stride in (0, 16, 28, -24)),
    {"bytes": 63},
]
OF_PRODUCTS: list[dict[str, object]] = [
    *({"weight": value} for value in (None, _ODD)),
    *({"matrix": stride} for stride in (-8, 380)),
    *({"row": stride} for stride in (0, 8, 20)),
    {"column": 2},
    {"row": 1, "column": 16},  # columns of 24 values
    {"row": 1, "column": 28},
]
OF_OUTER: list[dict[str, object]] = [
    *({"grad": value} for value in (None, _ODD)),
    *({"grad_stride": stride} for stride in (0, 8, 20)),
]


@pytest.mark.parametrize("changed", [*REFUSED, *OF_PRODUCTS], ids=str)
def test_products_that_cannot_be_are_refused(library: ctypes.CDLL, changed: dict[str, object]) -> None:
    error, out = _call(library, **changed)
    assert error == 1
    assert same(out, garbage(17, 16, dtype=torch.bfloat16))


@pytest.mark.parametrize("changed", [*REFUSED, *OF_OUTER], ids=str)
def test_outer_products_that_cannot_be_are_refused(library: ctypes.CDLL, changed: dict[str, object]) -> None:
    error, out = _call(library, is_outer=True, **changed)
    assert error == 1
    assert same(out, garbage(3, 24, 16, dtype=torch.bfloat16))


def test_a_workspace_that_cannot_be_is_refused(library: ctypes.CDLL) -> None:
    found = ctypes.c_int64(-7)
    for experts in (-1, 0, 8193):
        assert library.dsp_grouped_workspace(experts, ctypes.byref(found)) == 1
    assert library.dsp_grouped_workspace(1, None) == 1
    with setting(DSP_EMU_CAPABILITY=7):
        assert library.dsp_grouped_workspace(1, ctypes.byref(found)) == 1
    assert found.value == -7
    sizes = []
    for capability in CAPABILITIES:
        with setting(DSP_EMU_CAPABILITY=capability):
            assert library.dsp_grouped_workspace(5, ctypes.byref(found)) == 0
        sizes.append(found.value)
    assert sizes[0] < sizes[1]  # that of sm_90 wants some of its own
    with setting(DSP_EMU_CAPABILITY=9):
        assert _call(library, bytes=sizes[0])[0] == 1


# -- products with few bits ----------------------------------------------------------------------------------------------


def _mixed(
    library: ctypes.CDLL,
    x: torch.Tensor,
    format: str,
    group: int | None,
    columns: int,
    changed: Mapping[str, object] | None = None,
) -> tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The answer, the product over garbage, what it should be in fp64, and how large its terms are."""
    generator = torch.Generator().manual_seed(columns)
    codes, scales = few_bits.quantise_rows(torch.randn((columns, x.shape[1]), generator=generator), format, group)
    whole = few_bits.group_of(x.shape[1], group)
    out, found = garbage(x.shape[0], columns, dtype=x.dtype), ctypes.c_int64()
    assert library.dsp_mixed_workspace(x.shape[1], columns, whole, ctypes.byref(found)) == 0
    assert found.value == (0 if scales.shape[1] == 1 else scales.numel() * 4)
    guarded = garbage(found.value + 128, dtype=torch.uint8)
    begin = -guarded.data_ptr() % 64
    own: dict[str, object] = {"x": x.data_ptr(), "x_stride": x.stride(0), "codes": codes.data_ptr()}
    own |= {"code_stride": codes.stride(0), "scales": scales.data_ptr(), "out": out.data_ptr(), "rows": x.shape[0]}
    own |= {"inner": x.shape[1], "columns": columns, "group": whole, "format": kernels.FORMAT_CODES[format]}
    own |= {
        "dtype": DTYPE_CODES[x.dtype],
        "workspace": guarded.data_ptr() + begin,
        "bytes": found.value,
        "stream": None,
    }
    own |= changed or {}
    error = library.dsp_mixed_product(*own.values())
    assert (guarded[:begin] == 0xA5).all()
    assert (guarded[begin + found.value :] == 0xA5).all()
    weight = few_bits.dequantise_rows(codes, scales, x.shape[1], format, torch.float32).double()
    return error, out, x.double() @ weight.t(), x.double().abs() @ weight.t().abs()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    ("capability", "format", "group"),
    [(8, "int8", None), (9, "int8", None), (9, "int4", None), (9, "int8", 64), (9, "int4", 128)],
)
@pytest.mark.parametrize(("rows", "inner", "columns"), [(1, 64, 8), (5, 320, 64), (33, 96, 16)])
def test_products_with_few_bits_are_those_of_the_weight(
    library: ctypes.CDLL,
    capability: int,
    format: str,
    group: int | None,
    dtype: torch.dtype,
    rows: int,
    inner: int,
    columns: int,
) -> None:
    """Codes as a checkpoint has them. A weight is rounded to the dtype where it is scaled before it is multiplied."""
    x = torch.randn((rows, inner + 8), generator=torch.Generator().manual_seed(rows)).to(dtype)[:, :inner]
    with setting(DSP_EMU_CAPABILITY=capability, DSP_EMU_GRID=1):
        error, out, exact, size = _mixed(library, x, format, group, columns)
    assert error == 0
    assert ((out.double() - exact).abs() <= 1.01 * torch.finfo(dtype).eps / 2 * (size + exact.abs()) + 1e-6).all()


@pytest.mark.parametrize(("format", "group"), [("int8", None), ("int4", 64), ("fp8_e4m3", None)])
def test_the_operator_of_few_bits_reaches_the_library_or_its_reference(
    emulated: None, format: str, group: int | None
) -> None:
    """Rows that are cut out of wider ones, and a weight whose last group is filled up."""
    x = torch.randn((5, 104), generator=torch.Generator().manual_seed(0)).bfloat16()[:, :96]
    codes, scales = few_bits.quantise_rows(torch.randn(16, 96), format, group)
    with setting(DSP_EMU_CAPABILITY=9):
        by_library = cutlass.mixed(x, codes, scales, format)
        found = few_bits._mixed_product_on_cuda(x, codes, scales, format)
    assert (by_library is None) == (format == "fp8_e4m3")
    assert torch.equal(found, few_bits.mixed_product(x, codes, scales, format) if by_library is None else by_library)
    wanted = x.double() @ few_bits.dequantise_rows(codes, scales, 96, format, x.dtype).double().t()
    assert torch.allclose(found.double(), wanted, rtol=2**-8, atol=1e-3)
    torch.library.opcheck(torch.ops.dspass.mixed_product.default, (x, codes, scales, format))


@pytest.mark.parametrize(
    "changed",
    [
        *({name: value} for name in ("x", "codes", "scales", "out") for value in (None, _ODD)),
        *({"x_stride": stride} for stride in (0, 120, 132)),
        *({"code_stride": stride} for stride in (0, 112, 136)),
        *({"rows": rows} for rows in (-1, 0, 2**31)),
        *({"inner": inner} for inner in (-16, 0, 120, 2**31)),
        *({"columns": columns} for columns in (-8, 0, 12, 2**31)),
        *({"group": group} for group in (-64, 0, 32, 96)),
        *({"format": format} for format in (-1, 2)),
        *({"dtype": dtype} for dtype in (-1, 0, 3)),
        {"workspace": None},
        {"workspace": _ODD},
        {"bytes": 63},
    ],
    ids=str,
)
def test_products_with_few_bits_that_cannot_be_are_refused(library: ctypes.CDLL, changed: dict[str, object]) -> None:
    x = torch.ones(3, 128, dtype=torch.bfloat16)
    with setting(DSP_EMU_CAPABILITY=9):
        assert _mixed(library, x, "int8", 64, 16)[0] == 0
        error, out, *_ = _mixed(library, x, "int8", 64, 16, changed)
    assert error == 1
    assert same(out, garbage(3, 16, dtype=torch.bfloat16))


def test_what_other_devices_do_not_multiply_is_refused(library: ctypes.CDLL) -> None:
    x = torch.ones(3, 128, dtype=torch.bfloat16)
    for capability, format, group, wanted in (
        *((8, "int8", None, 0), (8, "int4", None, 1), (8, "int8", 64, 1), (12, "int8", None, 0)),
        *((7, "int8", None, 1), (9, "int4", 64, 0)),
    ):
        with setting(DSP_EMU_CAPABILITY=capability):
            assert _mixed(library, x, format, group, 16)[0] == wanted, (capability, format, group)
    found = ctypes.c_int64()
    for inner, columns, group in ((0, 8, 64), (128, 12, 64), (128, 8, 32), (128, 8, 0), (2**31, 8, 64)):
        assert library.dsp_mixed_workspace(inner, columns, group, ctypes.byref(found)) == 1
    assert library.dsp_mixed_workspace(128, 8, 64, None) == 1


@pytest.fixture(scope="module")
def bounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bounds") / "bounds"
    target = kernels.target_of("cutlass-emulator")
    flags = ("-O1", "-fsanitize=address", "-fno-omit-frame-pointer")
    command = (kernels.compiler_of(target), *target.flags, *flags)
    kernels.compile_to(path, command, [*kernels.sources_of(target), SOURCES / "cutlass_bounds.cpp"])
    return path


def test_no_product_leaves_its_memory(bounds: Path) -> None:
    """Nor with ends that decrease or exceed the rows."""
    done = subprocess.run([bounds], capture_output=True, text=True, env={"DSP_EMU_SHUFFLE": "5"})
    assert done.returncode == 0, done.stderr
    assert done.stdout == "114 calls within bounds\n"


def test_a_workspace_that_is_short_is_reported(bounds: Path) -> None:
    done = subprocess.run([bounds, "64"], capture_output=True, text=True, env={})
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


# -- building ------------------------------------------------------------------------------------------------------------


def test_missing_headers_are_named_with_both_ways_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUTLASS_PATH", str(tmp_path))
    with pytest.raises(KernelError, match=rf"pip install nvidia-cutlass.*CUTLASS_PATH\. They are not in {tmp_path}\."):
        kernels.cutlass_headers()
    monkeypatch.delenv("CUTLASS_PATH")
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(KernelError, match=r"CUTLASS's headers are missing.*--no-deps, or name .* CUTLASS_PATH\.$"):
        kernels.cutlass_headers()
    package = tmp_path / "cutlass_library"
    _headers(package / "source")
    (package / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert kernels.cutlass_headers() == (package / "source/include", package / "source/tools/util/include")


def _headers(root: Path) -> None:
    (root / "include" / "cutlass").mkdir(parents=True)
    (root / "include" / "cutlass" / "version.h").write_text("4.2.0")


COMPILER = """#!/bin/bash
case "$*" in *--version*) echo "a test's compiler"; exit;; esac
while [ "$1" != -o ]; do all="$all $1"; shift; done
echo "$2" > "$2"
echo "$all | ${@:3}" >> "$COMPILER_LOG"
"""


@pytest.fixture
def nvcc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Compilers that only note what they are asked for, and sources to change; the notes."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("nvcc", "g++"):
        (folder / name).write_text(COMPILER)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("COMPILER_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("DSPASS_KERNEL_DIR", raising=False)
    _headers(tmp_path / "cutlass")
    monkeypatch.setenv("CUTLASS_PATH", str(tmp_path / "cutlass"))
    for name in ("cuda_src", "hip_src"):
        shutil.copytree(kernels.source_folder(name), tmp_path / "sources" / name)
    monkeypatch.setattr(kernels, "source_folder", lambda name="cuda_src": tmp_path / "sources" / name)
    return tmp_path / "log"


def test_each_unit_is_compiled_for_its_own_architecture(nvcc: Path) -> None:
    told: list[str] = []
    library = kernels.build("cutlass", told.append)
    *units, link = nvcc.read_text().splitlines()
    assert sorted(line.split(":")[0] for line in told) == [unit.name for unit in UNITS]
    assert told[-1].endswith(f"{len(UNITS)} of {len(UNITS)} units")
    by_name = {Path(line.split()[-1]).name: line for line in units}
    assert set(by_name) == {unit.name for unit in UNITS}
    for name, line in by_name.items():
        assert all(flag in line for flag in (" -DNDEBUG ", " --expt-relaxed-constexpr ", " -c ", "/cutlass/include "))
        assert ("sm_80" in line) == (not name.endswith("_sm90.cu"))
        assert ("sm_90a" in line) == (not name.endswith("_sm80.cu"))
    assert " -shared " in link
    assert link.count(".o") == len(UNITS)
    assert kernels.build("cutlass", told.append) == library
    assert len(told) == len(UNITS)


def test_a_change_compiles_what_it_is_of(nvcc: Path) -> None:
    """One unit where it is the unit's own, all where it is in a header of theirs, none where it is another kernel's."""
    folder = kernels.source_folder()

    def compiled_after(path: Path) -> set[str]:
        path.write_text(path.read_text() + "// changed\n")
        nvcc.unlink(missing_ok=True)
        kernels.build("cutlass")
        *units, _ = nvcc.read_text().splitlines() if nvcc.is_file() else [""]
        return {Path(line.split()[-1]).name for line in units}

    kernels.build("cutlass")
    others = kernels.library_path("cuda"), kernels.library_path("emulator-32")
    assert compiled_after(folder / "cutlass" / "grouped_sm80.cu") == {"grouped_sm80.cu"}
    every = {unit.name for unit in UNITS}
    assert compiled_after(folder / "cutlass" / "grouped.h") == every
    assert compiled_after(folder / "common" / "gpu.h") == every
    assert compiled_after(kernels.cutlass_headers()[0] / "cutlass" / "version.h") == every
    moved = kernels.library_path("cuda"), kernels.library_path("emulator-32")
    assert all(a != b for a, b in zip(others, moved, strict=True))  # gpu.h is theirs too
    assert compiled_after(folder / "portable" / "moe.cuh") == set()
    before = kernels.library_path("cuda"), kernels.library_path("cutlass-emulator")
    compiled_after(folder / "cutlass" / "groups.cuh")
    assert kernels.library_path("cuda") == before[0]
    assert kernels.library_path("cutlass-emulator") != before[1]


@pytest.mark.parametrize("asked", [False, True])
def test_the_command_builds_them_where_it_is_asked_to(
    nvcc: Path, asked: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dspass.__main__ import main

    assert main(["kernels", *(["--cutlass"] if asked else [])]) == 0
    said = capsys.readouterr().out
    assert ("dspass-cutlass-" in said) == asked
    assert sum(line.strip().split(":")[0] in {unit.name for unit in UNITS} for line in said.splitlines()) == (
        len(UNITS) if asked else 0
    )
    monkeypatch.setattr(torch.version, "hip", "6.0")
    if asked:
        assert main(["kernels", "--cutlass"]) == 2
        assert "NVIDIA's GPUs, and this torch is ROCm's: leave --cutlass out" in capsys.readouterr().err


def test_the_library_is_looked_for_once_and_can_be_left_out(nvcc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels.cutlass.cache_clear()
    assert kernels.cutlass() is None  # not built
    kernels.build("cutlass")
    assert kernels.cutlass() is None  # as it was
    kernels.cutlass.cache_clear()
    monkeypatch.setenv("DSPASS_KERNELS", "reference")
    assert kernels.cutlass() is None
    kernels.cutlass.cache_clear()
    monkeypatch.delenv("DSPASS_KERNELS")
    with pytest.raises(KernelError, match="cannot be loaded"):  # what the test's compiler makes is a text
        kernels.cutlass()
