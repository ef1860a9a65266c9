"""Kernel libraries: compilers take the sources, arithmetic is rounded once, operators reach kernels, errors help."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dspass.runtime import kernels
from dspass.runtime.kernels import KernelError
from tests.matrix import WHOLE

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc here")
needs_hipcc = pytest.mark.skipif(shutil.which("hipcc") is None, reason="there is no hipcc here")

CUDA = sorted(path.name for path in (kernels.source_folder() / "portable").glob("*.cu"))
HIP = sorted(path.name for path in kernels.source_folder("hip_src").glob("*.hip"))
#: Those whose results are the reference's to the last bit.
BIT_EXACT = ("adamw.cu", "moe.cu", "quantise.cu")
#: Those of which some kernels spill a few bytes of registers, on sm_80 and sm_90a.
SPILLING = ("quantise.cu",)


# -- compilers -----------------------------------------------------------------------------------------------------------


@needs_nvcc
@pytest.mark.parametrize("name", CUDA)
def test_nvcc_compiles(name: str) -> None:
    """For all architectures, and no thread needs more registers than it has, but for those that are known to."""
    unit = kernels.unit_of("cuda", kernels.source_folder() / "portable" / name)
    assert unit.stat().st_size > 0
    said = unit.with_suffix(".log").read_text()
    assert ("Registers are spilled" in said) == (name in SPILLING), said


@needs_nvcc
@pytest.mark.parametrize("name", CUDA)
def test_ptx(name: str) -> None:
    """No operation of fp32 that a compiler may contract or round otherwise, and no table that is copied to local memory."""
    source = kernels.source_folder() / "portable" / name
    ptx = kernels.object_of(
        "cuda", source, ("-std=c++17", "-O3", "-fmad=false", "-ptx", "-arch=compute_80")
    ).read_text()
    assert ".local" not in ptx
    if name in BIT_EXACT:
        assert re.search(r"\bmul\.rn\.f32\b", ptx)
        assert _loose(ptx) == []


def test_what_the_check_of_ptx_finds() -> None:
    assert _loose("fma.rn.f32 %f1, %f2, %f3, %f4;") == ["fma.rn.f32"]
    assert _loose("mul.f32 %f1, %f2, %f3; mul.rn.f32 %f1, %f2, %f3; add.s64 %r1, %r2, %r3;") == ["mul.f32"]
    assert _loose("div.approx.f32 a; div.full.f32 a; div.rn.f32 a; rcp.approx.ftz.f32 a; add.rn.ftz.f32 a") == [
        *("div.approx.f32", "div.full.f32", "rcp.approx.ftz.f32", "add.rn.ftz.f32")
    ]


def _loose(ptx: str) -> list[str]:
    operations: list[str] = re.findall(r"\b(?:fma|mad|mul|add|sub|div|rcp|sqrt)(?:\.\w+)*\.f32\b", ptx)
    return [found for found in operations if not re.fullmatch(r"(?:mul|add|sub|div|rcp|sqrt)\.rn\.f32", found)]


HIP_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-c")


@needs_hipcc
@pytest.mark.parametrize("name", HIP)
def test_hipcc_compiles(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For what every ROCm knows."""
    monkeypatch.setenv("HIP_PLATFORM", "amd")
    source = kernels.source_folder("hip_src") / name
    assert kernels.object_of("hip", source, (*HIP_FLAGS, "--offload-arch=gfx90a")).stat().st_size > 0


def amd_clang() -> str | None:
    """LLVM's own compiler knows gfx942 from 17 on, ROCm's hipcc from 6 on, and Debian's is of 5."""
    named = [f"clang++-{version}" for version in range(22, 16, -1)] + ["/opt/rocm/llvm/bin/clang++"]
    return next((found for name in named if (found := shutil.which(name))), None)


@needs_hipcc
@pytest.mark.skipif(amd_clang() is None, reason="there is no clang 17 or later here (apt-get install clang-19 lld-19)")
@pytest.mark.parametrize(
    "architecture",  # hipcc compiles for the other one above
    [pytest.param(a, marks=() if a == "gfx942" else WHOLE) for a in kernels.HIP_ARCHITECTURES],
)
@pytest.mark.parametrize("name", HIP)
def test_clang_compiles_and_keeps_all_in_registers(name: str, architecture: str, tmp_path: Path) -> None:
    """hipcc brings headers and libraries. Those of ROCm 5 know gfx942 by what it was called before it was sold, gfx940."""
    (ocml, *_) = [*Path("/usr/lib").glob("*/amdgcn/bitcode/ocml.bc"), *Path("/opt/rocm").glob("amdgcn/bitcode/ocml.bc")]
    for library in ocml.parent.glob("*.bc"):
        (tmp_path / library.name).symlink_to(library)
    known = tmp_path / f"oclc_isa_version_{architecture.removeprefix('gfx')}.bc"
    if not known.exists():
        known.symlink_to(ocml.with_name("oclc_isa_version_940.bc"))
    source = kernels.source_folder("hip_src") / name
    compiler = [str(amd_clang()), "-x", "hip", *HIP_FLAGS, f"--offload-arch={architecture}", "--offload-device-only"]
    # fmt: off
    told = [f"--rocm-device-lib-path={tmp_path}", "-D__HIP_PLATFORM_AMD__", "-Rpass-analysis=kernel-resource-usage",
            str(source), "-o", str(tmp_path / "out.o")]
    # fmt: on
    done = subprocess.run([*compiler, *told], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    scratch = re.findall(r"Function Name: (\w+)|ScratchSize \[bytes/lane\]: (\d+)", done.stderr)
    names, sizes = [n for n, _ in scratch if n], [int(size) for _, size in scratch if size]
    assert len(names) == len(sizes) > 0
    assert [n for n, size in zip(names, sizes, strict=True) if size] == []


def test_every_kernel_is_there_for_hip_too() -> None:
    assert [Path(name).stem for name in HIP] == [Path(name).stem for name in CUDA]


@needs_nvcc
def test_the_library_for_cuda_loads_without_a_driver() -> None:
    kernels.build("cuda")
    assert kernels.load("cuda").dsp_quantise is not None
    symbols = subprocess.run(
        ["nm", "-D", kernels.library_path("cuda")], capture_output=True, text=True, check=True
    ).stdout
    assert set(re.findall(r" T (dsp_\w+)", symbols)) == set(kernels.SIGNATURES)
    assert "libtorch" not in symbols


# -- operators -----------------------------------------------------------------------------------------------------------

OPERATORS = """
import torch
from dspass.runtime import adamw, experts, fake_quantise, few_bits, kernels, quantise
from dspass.runtime.formats import FORMATS
from dspass.runtime.operators import OPERATORS
from tests.emulated import numbers, same

kernels.build("emulator-32"), kernels.build("binding-emulator")
assert OPERATORS["quantise"].server("cpu") == "torch reference"
kernels.bind("binding-emulator", "emulator-32")
without = {o.name for o in OPERATORS.values() if o.server("cpu") != "kernel"}
by_inductor = {"compensated_bucket", "quantised_linear", "fake_quantise", "mixed_product"}
by_inductor |= {"arrival_positions", "experts_of_rows", "pad_experts", "unpad_experts"}
by_transport = {"exchange_counts", "dispatch_rows", "combine_rows", "exchange_even", "mean_over_ranks"}
by_transport |= {"split_chunks", "join_chunks"}  # a rank's sizes are its own
assert without == by_inductor | by_transport, without

ops, count = torch.ops.dspass, 0
x, y = numbers(1000, torch.float32).view(20, 50).t(), numbers(77, torch.float16)
sizes = [260, 20]
for format in FORMATS:
    one = (x, format, 64)
    bucket = ([x, y], sizes, 4, format, 48, 2)
    codes, scales = quantise.quantise(*one)
    back = (codes, scales, [50, 20], format, torch.bfloat16)
    codes, scales = quantise.quantise_bucket(*bucket)
    whole = (codes, scales, sizes, format, 48, torch.float32)
    total = (codes, scales, sizes, format, 48, 0.3, torch.float16)
    for name, args in (("quantise", one), ("dequantise", back), ("quantise_bucket", bucket), ("dequantise_bucket", whole),
                       ("dequantise_sum", total)):
        found, expected = getattr(ops, name)(*args), getattr(quantise, name)(*args)
        if name == "dequantise":
            found, expected = [found], [expected]
        assert len(found) == len(expected)
        assert all(same(a, b) for a, b in zip(found, expected)), (name, format)
        torch.library.opcheck(getattr(ops, name).default, args, test_utils=("test_schema", "test_faketensor"))
        count += 1

with_odd_columns = (numbers(12 * 50, torch.float32).view(12, 50), None)
with_groups = (numbers(5 * 96, torch.bfloat16).view(5, 96), 32)
for format in FORMATS:
    for (matrix, group), dtype in ((with_odd_columns, torch.float16), (with_groups, torch.bfloat16)):
        width = matrix.shape[1]
        codes, scales = few_bits.quantise_rows(matrix, format, group)
        some = torch.tensor([[1, 0, 2], [3, 3, 4]])
        for name, args in (("dequantise_rows", (codes, scales, width, format, dtype)),
                           ("dequantise_rows", (codes[some], scales[some], width, format, torch.float32))):
            assert same(ops.dequantise_rows(*args), few_bits.dequantise_rows(*args)), (format, dtype)
            torch.library.opcheck(ops.dequantise_rows.default, args, test_utils=("test_schema", "test_faketensor"))
            count += 1
        x = numbers(16 * width, dtype).view(16, width)
        odd = numbers(3 * width + 1, dtype)[1:].view(3, width)  # at an address that 16 does not divide
        others = numbers(3 * width, dtype).view(width, 3).t()
        bias = numbers(2 * len(codes), dtype)[::2]
        for left, plus in ((x, bias), (odd, None), (others, bias), (x[:0], None)):
            found = ops.few_rows_linear(left, codes, scales, plus, format)
            weight = few_bits.dequantise_rows(codes, scales, width, format, dtype).double()
            exact = left.double() @ weight.t() + (0 if plus is None else plus.double())
            magnitudes = left.double().abs() @ weight.t().abs() + (0 if plus is None else plus.double().abs())
            limit = magnitudes * width * 2**-23 + exact.abs() * torch.finfo(dtype).eps + 1e-7
            assert ((found.double() - exact).abs() <= limit).all(), (format, dtype)
            assert found.dtype == dtype and found.shape == exact.shape
            called = ops.quantised_linear(left, codes, scales, plus, width, format)
            assert same(found, called), (format, dtype)
            torch.library.opcheck(ops.few_rows_linear.default, (left, codes, scales, plus, format),
                                  test_utils=("test_schema", "test_faketensor"))
            count += 1
        more = torch.cat([x, odd])
        called = ops.quantised_linear(more, codes, scales, None, width, format)
        assert torch.equal(called, more @ few_bits.dequantise_rows(codes, scales, width, format, dtype).t())
codes, scales = few_bits.quantise_rows(with_odd_columns[0], "int8")
x = numbers(200, torch.float32).view(4, 50)
called = ops.quantised_linear(x, codes, scales, None, 50, "int8", True)
assert torch.equal(called, few_bits._integer_product(x, codes, scales, None))

x = numbers(1000, torch.float32).view(20, 50).t()
routing = (torch.arange(60) % 7 - 1).view(3, 20).t()
weights = numbers(60, torch.bfloat16).view(20, 3)
for dtype in (torch.float32, torch.bfloat16):
    rows, positions, _ = experts.permute_experts(x.t().to(dtype)[:20], routing[:50], 5)
    for name, args in (("permute_experts", (x.t().to(dtype)[:20], routing[:50].int(), 5)),
                       ("permute_experts", (x.t().to(dtype), routing, 5)),
                       ("spread_experts", (x.t().to(dtype), positions, weights)),
                       ("unpermute_experts", (rows, positions)),
                       ("unpermute_experts", (rows, positions, weights))):
        found, expected = getattr(ops, name)(*args), getattr(experts, name)(*args)
        if name != "permute_experts":
            found, expected = [found], [expected]
        assert len(found) == len(expected)
        assert all(same(a, b) for a, b in zip(found, expected)), (name, dtype)
        torch.library.opcheck(getattr(ops, name).default, args, test_utils=("test_schema", "test_faketensor"))
        count += 1
tokens, by = x.t().clone().requires_grad_(), weights.float().requires_grad_()
rows, positions, _ = ops.permute_experts(tokens, routing, 5)
ops.unpermute_experts(rows, positions, by).sum().backward()
kept = ((routing >= 0) & (routing < 5))
assert torch.allclose(tokens.grad, (weights.float() * kept).sum(1)[:, None].expand(20, 50))
assert torch.allclose(by.grad, x.t().sum(1)[:, None] * kept, rtol=1e-5, atol=1e-3)  # of fifty values up to some hundred

def stepped(dtype):
    params = [numbers(1000, dtype).view(20, 50), numbers(77, torch.float32)]
    grads = [numbers(1000, torch.bfloat16, seed=1).view(50, 20).t(), numbers(77, torch.float32, seed=1)]
    return params, grads, *([torch.zeros(p.shape) for p in params] for _ in range(2))

def with_8_bits(dtype):
    params, grads, *_ = stepped(dtype)
    return params, grads, *map(list, zip(*map(adamw.states_of_8_bits, params)))

lr = torch.tensor(1e-2, dtype=torch.float64)
for dtype, seed in ((torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, -5)):
    one, other = stepped(dtype), stepped(dtype)
    numbers_of = (lr, 0.9, 0.99, 1e-8, 0.1, seed)
    for step in (1, 2):
        before = one[0][0]._version
        ops.adamw_(*one, step, *numbers_of), adamw.adamw_(*other, step, *numbers_of)
        assert one[0][0]._version > before
    assert all(same(a, b) for a, b in zip(sum(one, []), sum(other, []))), (dtype, seed)
    torch.library.opcheck(ops.adamw_.default, (*one, 3, *numbers_of), test_utils=("test_schema", "test_faketensor"))
    one, other = with_8_bits(dtype), with_8_bits(dtype)
    for step in (1, 2):
        before = one[2][0]._version
        ops.adamw_8bit_(*one, step, *numbers_of), adamw.adamw_8bit_(*other, step, *numbers_of)
        assert one[2][0]._version > before
    assert all(same(a, b) for a, b in zip(sum(one, []), sum(other, []))), (dtype, seed)
    torch.library.opcheck(ops.adamw_8bit_.default, (*one, 3, *numbers_of), test_utils=("test_schema", "test_faketensor"))
    count += 2

def refused(function, *args):
    try:
        function(*args)
    except RuntimeError as error:
        return str(error)
    raise AssertionError("not refused")

codes, scales = quantise.quantise(x, "int8", 64)
assert "no format 'int9'" in refused(ops.quantise, x, "int9", 64)
assert "a multiple of 16" in refused(ops.quantise, x, "int8", 24)
assert "fp32, fp16 and bf16 can" in refused(ops.quantise, x.double(), "int8", 64)
assert "more than the 16 blocks of 64" in refused(ops.dequantise, codes, scales, [1025], "int8", torch.float32)
assert "16 blocks have 1024 bytes" in refused(ops.dequantise, codes, scales[1:], [1000], "int8", torch.float32)
assert "2 nodes do not divide 3 chunks" in refused(ops.quantise_bucket, [x], [400], 3, "int8", 64, 2)
assert "a tensor of 1000 values does not go into 2 chunks of 400" in refused(ops.quantise_bucket, [x], [400], 2, "int8", 64)
assert "fp32, fp16 and bf16 do" in refused(ops.permute_experts, x.double(), routing, 5)
assert "tokens [tokens, hidden] have experts" in refused(ops.permute_experts, x.t(), routing[1:], 5)
assert "int32 or int64" in refused(ops.permute_experts, x.t(), routing.short(), 5)
assert "8193 experts cannot be" in refused(ops.permute_experts, x.t(), routing, 8193)
assert "those of permute_experts, int32" in refused(ops.spread_experts, x.t(), positions.long())
assert "there are 20 of them" in refused(ops.spread_experts, x.t()[1:], positions)
assert "for each of 60 positions" in refused(ops.unpermute_experts, rows[1:], positions)
assert "a weight for each position" in refused(ops.unpermute_experts, rows, positions, weights[1:])
one, plain = stepped(torch.float32), (lr, 0.9, 0.99, 1e-8, 0.1)
assert "a gradient and two states a parameter" in refused(ops.adamw_, one[0], one[1][1:], *one[2:], 1, *plain)
assert "step 0 cannot be" in refused(ops.adamw_, *one, 0, *plain)
assert "betas of 1" in refused(ops.adamw_, *one, 1, lr, 1.0, 0.99, 1e-8, 0.1)
assert "shapes differ" in refused(ops.adamw_, one[0], [g.t() for g in one[1]], *one[2:], 1, *plain)
assert "not contiguous" in refused(ops.adamw_, [t.t() for t in one[0]], *([u.t() for u in t] for t in one[1:]), 1, *plain)
assert "states are of fp32" in refused(ops.adamw_, *one[:2], [t.half() for t in one[2]], one[3], 1, *plain)
assert "take fp32 or bf16" in refused(ops.adamw_, [t.half() for t in one[0]], *one[1:], 1, *plain)
assert "lr cannot be: take one number" in refused(ops.adamw_, *one, 1, lr.half(), *plain[1:])
assert "lr cannot be: take one number" in refused(ops.adamw_, *one, 1, lr[None], *plain[1:])
one = with_8_bits(torch.float32)
assert "codes and scales of two states" in refused(ops.adamw_8bit_, *one[:5], one[5][1:], 1, *plain)
assert "uint8[blocks, 256]" in refused(ops.adamw_8bit_, *one[:2], one[2][::-1], *one[3:], 1, *plain)
assert "float32[blocks]" in refused(ops.adamw_8bit_, *one[:5], [t.half() for t in one[5]], 1, *plain)
assert "not contiguous" in refused(ops.adamw_8bit_, *one[:4], [t.t().contiguous().t() for t in one[4]], one[5], 1, *plain)
weight = few_bits.quantise_rows(with_groups[0], "int4", 32)
left, of_rows = numbers(3 * 96, torch.bfloat16).view(3, 96), (None, "int4")
assert "x of 17 rows is not for few_rows_linear" in refused(ops.few_rows_linear, left[:1].expand(17, 96), *weight, *of_rows)
assert "x of another dtype" in refused(ops.few_rows_linear, left.double(), *weight, *of_rows)
assert "a product is of two matrices" in refused(ops.few_rows_linear, left[0], *weight, *of_rows)
assert "a row of 64 columns has not 3 groups of 32" in refused(ops.few_rows_linear, left[:, :64], *weight, *of_rows)
assert "rows of codes and of scales go together" in refused(ops.few_rows_linear, left, weight[0], weight[1][1:], *of_rows)
assert "rows of codes and of scales go together" in refused(ops.few_rows_linear, left, weight[0], weight[1][0], *of_rows)
assert "a bias is of x's dtype" in refused(ops.few_rows_linear, left, *weight, torch.zeros(5), "int4")
assert "a bias is of x's dtype" in refused(ops.few_rows_linear, left, *weight, left[0, :4], "int4")
assert "no format 'int9'" in refused(ops.few_rows_linear, left, *weight, None, "int9")
assert "a row of 97 columns has not 3" in refused(ops.dequantise_rows, *weight, 97, "int4", torch.float32)
assert "has a scale at least" in refused(ops.dequantise_rows, weight[0], weight[1][:, :0], 97, "int4", torch.float32)
assert "codes are uint8" in refused(ops.dequantise_rows, weight[0].int(), weight[1], 96, "int4", torch.float32)
assert "a block of 24 values" in refused(ops.dequantise_rows, weight[0], torch.zeros(5, 4), 96, "int4", torch.float32)
codes, scales = quantise.quantise(x, "int8", 64)
assert "and these are 1024 and 16" in refused(ops.dequantise_sum, codes, scales, [65], "int8", 64, 1.0, torch.float32)

compiled = torch.compile(lambda x: ops.dequantise(*ops.quantise(x, "int8", 64), [50, 20], "int8", torch.float32),
                         fullgraph=True, backend="aot_eager")
assert same(compiled(x), quantise.dequantise(codes, scales, [50, 20], "int8", torch.float32))
print(count, "calls")
"""


def test_operators_reach_kernels_through_torchs_dispatcher() -> None:
    """In a process of its own, whose operators then are the emulator's."""
    done = subprocess.run(
        [sys.executable, "-c", OPERATORS], capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "101 calls\n"


def test_the_binding_for_gpus_loads_where_there_is_none() -> None:
    """And needs nothing of torch but its stable ABI, in C."""
    path = kernels.build("binding")
    torch.ops.load_library(str(path))
    symbols = subprocess.run(["nm", "-D", "--undefined-only", path], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r" U (\S+)", symbols))
    assert {name for name in needed if name.startswith(("aoti_torch_", "torch_"))}
    assert not {name for name in needed if re.match(r"_ZN?K?(2at|3c10|5torch)", name)}


# -- finding and building ------------------------------------------------------------------------------------------------


def test_a_missing_compiler_is_named_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(KernelError, match=r"nvcc is missing.*'cuda': install CUDA .* DSPASS_KERNEL_DIR"):
        kernels.build("cuda")
    assert not kernels.is_built("cuda")
    assert kernels.serve() is None


def test_a_target_that_is_none() -> None:
    with pytest.raises(KernelError, match="'emulator-16': take one of cuda, hip, binding"):
        kernels.build("emulator-16")


def test_what_is_not_built_is_not_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DSPASS_KERNEL_DIR", str(tmp_path))
    with pytest.raises(KernelError, match=r"'cuda' is not built.*make kernels"):
        kernels.load("cuda")
    assert kernels.serve() is None
    (tmp_path / "dspass-cuda.so").write_text("no library")
    with pytest.raises(KernelError, match=r"dspass-cuda.so cannot be loaded.*make kernels"):
        kernels.load("cuda")
    with pytest.raises(KernelError, match="'binding' is not built"):
        kernels.serve()
    monkeypatch.setenv("DSPASS_KERNELS", "reference")
    assert kernels.serve() is None


def test_what_a_compiler_refuses_leaves_nothing(tmp_path: Path) -> None:
    source = tmp_path / "wrong.cpp"
    source.write_text("int f() { return wrong; }")
    with pytest.raises(KernelError, match=r"out\.so could not be built.*answered 1:\n.*wrong\.cpp"):
        kernels.compile_to(tmp_path / "out.so", (shutil.which("g++") or "", "-shared", "-fPIC"), [source])
    assert list(tmp_path.iterdir()) == [source]


def test_the_cache_knows_a_change_of_flags(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DSPASS_KERNEL_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    paths = {kernels.library_path(f"emulator-{warp}") for warp in (32, 64)}
    assert len({path.stem.rpartition("-")[2] for path in paths}) == 2
    assert {path.parent for path in paths} == {tmp_path / "dspass" / "kernels"}
