"""What the emulator and the address sanitizer find: mistakes that were made on purpose, and nothing in our kernels."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch

from dspass.runtime import kernels
from tests.emulated import garbage, setting

SOURCES = Path(__file__).parent / "emulated_src"
THREADS = 128


@pytest.fixture(scope="module", params=(32, 64), ids="warp {}".format)
def wrong(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    target = kernels.TARGETS[f"emulator-{request.param}"]
    path = tmp_path_factory.mktemp("wrong") / "wrong.so"
    command = (kernels.compiler_of(target), *target.flags, f"-I{kernels.source_folder()}", "-shared")
    kernels.compile_to(path, command, [SOURCES / "wrong.cpp"])
    return ctypes.CDLL(str(path))


def run(library: ctypes.CDLL, name: str, seed: int | None = None) -> tuple[int, torch.Tensor]:
    out = garbage(THREADS, dtype=torch.int32)
    with setting(DSP_EMU_SHUFFLE=seed):
        return library.run(name.encode(), ctypes.c_void_p(out.data_ptr())), out


def test_a_missing_barrier_gives_a_wrong_result_in_random_order_only(wrong: ctypes.CDLL) -> None:
    right = torch.arange(THREADS, dtype=torch.int32) - 1
    for name, seed, is_right in (
        ("with barrier", None, True),
        ("with barrier", 1, True),
        ("without barrier", None, True),
        ("without barrier", 1, False),
        ("without barrier", 2, False),
    ):
        error, out = run(wrong, name, seed)
        assert error == 0
        assert torch.equal(out, right) == is_right, (name, seed)


def test_a_warp_that_gets_ahead_finds_a_missing_barrier(wrong: ctypes.CDLL) -> None:
    """All warps went in step in random order too: none was ever two exchanges before another one."""
    found = {
        name: [run(wrong, name, seed) for seed in range(8)] for name in ("ahead with barrier", "ahead without barrier")
    }
    assert all(error == 0 for runs in found.values() for error, _ in runs)
    others = {name: torch.stack([out[64:] for _, out in runs]) for name, runs in found.items()}  # not of the first warp
    assert (others["ahead with barrier"] == 1).all()
    assert (others["ahead without barrier"] == 2).any()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("some wait", "divergent barrier: thread 0 ({some}) waits at one, and 121 of 128 threads have left"),
        (
            "wait apart",
            "divergent barrier: thread 0 ({first half}) and thread 64 ({second half}) wait at different ones",
        ),
        ("lane has left", "waits for its warp, of which thread 3 has left the kernel"),
        ("lanes apart", "a warp's threads take part in different operations: thread"),
        ("lanes apart", "({even}), thread"),
        ("lanes apart", "({odd})"),
        ("beyond the warp", "which its warp does not have"),
    ],
)
def test_what_would_hang_is_reported(
    wrong: ctypes.CDLL, capfd: pytest.CaptureFixture[str], name: str, said: str
) -> None:
    for number, line in enumerate((SOURCES / "wrong.cpp").read_text().splitlines(), 1):
        said = said.replace(f"{{{line.partition('// line: ')[2]}}}", f"wrong.cpp:{number}")
    for seed in (None, 3):
        error, _ = run(wrong, name, seed)
        assert error == 719
        assert said in capfd.readouterr().err
    assert run(wrong, "with barrier")[0] == 0  # and the next launch is none the worse


@pytest.fixture(scope="module", params=(32, 64), ids="warp {}".format)
def bounds(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = kernels.build(f"emulator-{request.param}-sanitized")
    target = kernels.TARGETS[f"emulator-{request.param}-sanitized"]
    path = tmp_path_factory.mktemp("bounds") / "bounds"
    command = (kernels.compiler_of(target), *target.flags)
    link = ("-x", "none", str(library), f"-Wl,-rpath,{library.parent}")
    kernels.compile_to(path, command, [SOURCES / "bounds.cpp"], link)
    return path


def test_no_kernel_leaves_its_memory(bounds: Path) -> None:
    for seed in ("", "5"):
        done = subprocess.run([bounds], capture_output=True, text=True, env={"DSP_EMU_SHUFFLE": seed})
        assert done.returncode == 0, done.stderr
        assert done.stdout == "623 calls within bounds\n"


def test_a_buffer_that_is_short_is_reported_at_the_kernels_line(bounds: Path) -> None:
    done = subprocess.run([bounds, "1"], capture_output=True, text=True, env={})
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
    assert "quantise_kernel" in done.stderr
    assert "quantise.cuh:" in done.stderr


def test_an_address_that_is_not_aligned_is_reported_at_the_kernels_line(bounds: Path) -> None:
    done = subprocess.run([bounds, "0", "2"], capture_output=True, text=True, env={})
    assert done.returncode != 0
    assert "misaligned address" in done.stderr
    assert "linear.cuh:" in done.stderr
