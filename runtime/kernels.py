"""Compiled kernels: where their libraries are, how they are built from ``cuda_src/``, and how they come to serve operators.

A kernel library has a C interface and knows nothing of torch; one binding puts those of a GPU behind the operators of
:mod:`dspass.runtime.operators`. Nothing is compiled unless :func:`build` is called (``make kernels``), and nothing is looked
for unless :func:`serve` is, and :func:`cutlass` at the first grouped product on a GPU: where no library is, torch serves.

========================= ========== ===================================================================
target                    compiler   runs on
========================= ========== ===================================================================
``cuda``                  nvcc       NVIDIA GPUs: sm_80, sm_90a, sm_100 and later ones
``hip``                   hipcc      AMD GPUs: gfx90a, gfx942
``cutlass``               nvcc       NVIDIA GPUs: matrix products, each unit for one architecture (``cuda_src/cutlass``)
``binding``               g++        torch: the operators' CUDA and ROCm implementations
``emulator-32``, ``-64``  g++        the CPU, for tests: warps of so many threads
``…-sanitized``           g++        the same under the address sanitizer
``binding-emulator``      g++        torch on the CPU, for tests: the operators answered by an emulator
``cutlass-emulator``      g++        the CPU, for tests: all of ``cutlass`` but the products, which are plain loops
========================= ========== ===================================================================

``DSPASS_KERNEL_DIR`` names a folder with libraries that were built elsewhere, ``dspass-<target>.so`` each. Without it they are
in the user's cache, under a name that changes with the sources, the flags and the compiler, so that none is ever out of date.

Each source is a unit: units are compiled two at a time, kept as objects beside what the compiler said of them, and linked.

CUTLASS is headers: those of ``CUTLASS_PATH``, a checkout of it, or else of the installed package ``nvidia-cutlass``. Its units
take a minute and gigabytes each; a change of one compiles no other anew.

Dropped: ``torch.utils.cpp_extension``, which builds against one version of torch and takes minutes. Dropped: building when an
operator is first called: a training job would compile on every rank.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from dspass.runtime.formats import FORMATS
from dspass.runtime.quantise import DTYPES

#: As ``cuda_src/portable/formats.cuh`` numbers them.
FORMAT_CODES = {name: code for code, name in enumerate(FORMATS)}
DTYPE_CODES = {dtype: code for code, dtype in enumerate(DTYPES)}

#: What keeps arithmetic the same everywhere: no fused multiply-add that the source does not ask for.
_HOST = (
    "-std=c++17",
    "-g1",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-ffp-contract=off",
    "-fPIC",
    "-fvisibility=hidden",
)
#: Alignment too: a device refuses a load of 16 bytes at an address that they do not divide, and a CPU does not.
_SANITIZED = ("-O1", "-fsanitize=address,alignment", "-fno-sanitize-recover=alignment", "-fno-omit-frame-pointer")
_CUDA = ("-std=c++17", "-O3", "-fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "--warn-on-spills")
#: Without assertions, whose calls would have ptxas wait for each product of a warp group (sm_90a).
_CUTLASS = ("-std=c++17", "-O3", "--expt-relaxed-constexpr", "-DNDEBUG", "-Xcompiler", "-fPIC,-fvisibility=hidden")
_HIP = ("-std=c++17", "-O3", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden")
#: The oldest torch whose stable ABI the binding needs: 2.11.
_BINDING = (
    "-std=c++17",
    "-O2",
    "-Wall",
    "-fPIC",
    "-fvisibility=hidden",
    "-DTORCH_TARGET_VERSION=0x020b000000000000ULL",
)

#: Of ``nvcc``: what one compilation covers. The last also carries PTX, from which later devices compile their own.
CUDA_ARCHITECTURES = {
    "sm_80": "arch=compute_80,code=sm_80",
    "sm_90a": "arch=compute_90a,code=sm_90a",
    "sm_100": "arch=compute_100,code=[sm_100,compute_100]",
}
HIP_ARCHITECTURES = ("gfx90a", "gfx942")
#: Of CUTLASS's units, by the end of their names. Devices that are neither compile their own from sm_80's PTX.
UNIT_ARCHITECTURES = {"_sm80": "arch=compute_80,code=[sm_80,compute_80]", "_sm90": CUDA_ARCHITECTURES["sm_90a"]}
#: Compiled at once: each takes up to 5 GB.
UNITS_AT_ONCE = 2


class KernelError(ValueError):
    """A kernel library cannot be built or loaded; the message says why, and the way out."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """``flags`` are without sources and output; ``way_out`` is what to do where there is no ``compiler``."""

    name: str
    compiler: str
    flags: tuple[str, ...]
    way_out: str
    link: tuple[str, ...] = ()


_GXX = "install it (apt-get install g++)"
_NVCC = (
    "install CUDA 12.8 or later and put its bin folder into PATH, "
    "or build elsewhere and name the folder in DSPASS_KERNEL_DIR"
)
_HIPCC = "install ROCm (or apt-get install hipcc) and put its bin folder into PATH"
_gencode = tuple(part for code in CUDA_ARCHITECTURES.values() for part in ("-gencode", code))

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            name="cuda",
            compiler="nvcc",
            flags=(*_CUDA, *_gencode, "--compress-mode=size"),
            way_out=_NVCC,
        ),
        Target(
            name="hip",
            compiler="hipcc",
            flags=(*_HIP, *(f"--offload-arch={name}" for name in HIP_ARCHITECTURES)),
            way_out=_HIPCC,
        ),
        Target(name="binding", compiler="g++", flags=_BINDING, link=("-ltorch_cpu", "-ldl"), way_out=_GXX),
        Target(
            name="binding-emulator",
            compiler="g++",
            flags=(*_BINDING, "-DDSP_EMULATED"),
            link=("-ltorch_cpu", "-ldl"),
            way_out=_GXX,
        ),
        Target(name="cutlass", compiler="nvcc", flags=(*_CUTLASS, "--compress-mode=size"), way_out=_NVCC),
        Target(name="cutlass-emulator", compiler="g++", flags=(*_HOST, "-DDSP_EMU_WARP=32", "-O2"), way_out=_GXX),
        *(
            Target(
                name=f"emulator-{warp}{'-sanitized' if sanitized else ''}",
                compiler="g++",
                flags=(*_HOST, f"-DDSP_EMU_WARP={warp}", *(_SANITIZED if sanitized else ("-O2",))),
                way_out=_GXX,
            )
            for warp in (32, 64)
            for sanitized in (False, True)
        ),
    )
}


# -- where things are ----------------------------------------------------------------------------------------------------


def source_folder(name: str = "cuda_src") -> Path:
    """Of ``cuda_src`` or ``hip_src``; beside the package, in a checkout and where it is installed."""
    folder = Path(__file__).parent.parent / name
    if not folder.is_dir():
        raise KernelError(f"the kernels' sources are not at {folder}: install dspass again, or work in a checkout.")
    return folder.resolve()


def library_folder() -> Path:
    """Where libraries are looked for, and built to."""
    if given := os.environ.get("DSPASS_KERNEL_DIR"):
        return Path(given)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "dspass" / "kernels"


def library_path(target: str) -> Path:
    """Of the library for ``target``, built or not.

    Raises :class:`KernelError` where there is no such target, or no compiler or headers whose versions are part of the name.
    """
    found = target_of(target)
    if os.environ.get("DSPASS_KERNEL_DIR"):
        return library_folder() / f"dspass-{target}.so"
    units = (flag for source in sources_of(found) for flag in unit_flags(target, source))
    command = (*_command(found), *units, *found.link)
    return library_folder() / f"dspass-{target}-{_key(found, command)}.so"


def is_built(target: str) -> bool:
    """Whether there is a library for ``target``."""
    try:
        return library_path(target).is_file()
    except KernelError:
        return False


def target_of(name: str) -> Target:
    """Raises :class:`KernelError` where there is no such target."""
    if name not in TARGETS:
        raise KernelError(f"there is no kernel library for {name!r}: take one of {', '.join(TARGETS)}.")
    return TARGETS[name]


# -- building ------------------------------------------------------------------------------------------------------------


def compiler_of(target: Target) -> str:
    """Its path. Raises :class:`KernelError`, with the way out, where it is missing."""
    found = shutil.which(target.compiler)
    if found is None:
        raise KernelError(
            f"{target.compiler} is missing, which builds the kernel library {target.name!r}: {target.way_out}."
        )
    return found


def sources_of(target: Target) -> list[Path]:
    """What its library is compiled from, each a translation unit of its own."""
    if target.name.startswith("binding"):
        return [source_folder() / "torch" / "bind.cpp"]
    if target.name == "hip":
        return sorted(source_folder("hip_src").glob("*.hip"))
    if target.name == "cutlass":
        return sorted((source_folder() / "cutlass").glob("*.cu"))
    if target.name == "cutlass-emulator":
        units = source_folder() / "cutlass"
        interfaces = [path for path in sorted(units.glob("*.cu")) if not path.stem.endswith(tuple(UNIT_ARCHITECTURES))]
        return [source_folder() / "common" / "emu.cpp", *interfaces, units / "units_emu.cpp"]
    kernels = sorted((source_folder() / "portable").glob("*.cu"))
    return [source_folder() / "common" / "emu.cpp", *kernels] if target.name.startswith("emulator") else kernels


def build(target: str, tell: Callable[[str], None] = lambda line: None) -> Path:
    """Compile the library for ``target`` unless it is there; its path. ``tell`` is called for each unit.

    Raises :class:`KernelError` where the compiler is missing, or fails, and where CUTLASS's headers are.
    """
    found = target_of(target)
    path = library_path(target)
    if path.is_file() and not os.environ.get("DSPASS_KERNEL_DIR"):
        return path
    compile_to(path, (*_command(found), "-shared"), _units(found, tell), found.link)
    return path


def _units(target: Target, tell: Callable[[str], None]) -> list[Path]:
    """Their objects, :data:`UNITS_AT_ONCE` compiled at a time."""
    sources = sources_of(target)
    done: list[Path] = []

    def compiled(source: Path) -> Path:
        begin = time.monotonic()
        made = unit_of(target.name, source)
        done.append(source)
        tell(f"{source.name}: {time.monotonic() - begin:.0f} s, {len(done)} of {len(sources)} units")
        return made

    with ThreadPoolExecutor(UNITS_AT_ONCE) as pool:
        return list(pool.map(compiled, sources))


def unit_of(target: str, source: Path) -> Path:
    """The object of one of ``target``'s sources, compiled unless it is in the cache.

    Raises :class:`KernelError` as :func:`build` does.
    """
    return object_of(target, source, unit_flags(target, source))


def unit_flags(target: str, source: Path) -> tuple[str, ...]:
    """Of one unit. The names of CUTLASS's say which architecture each is for; that of the C interface is for all."""
    flags = (*_command(target_of(target))[1:], "-c")
    if target != "cutlass":
        return flags
    own = [("-gencode", code) for end, code in UNIT_ARCHITECTURES.items() if source.stem.endswith(end)]
    return (*flags, *(own[0] if own else _gencode))


def cutlass_headers() -> tuple[Path, ...]:
    """Folders of CUTLASS's headers. Raises :class:`KernelError`, with both ways out, where there are none."""
    named = os.environ.get("CUTLASS_PATH")
    package = None if named else importlib.util.find_spec("cutlass_library")
    root = Path(named) if named else Path(package.origin or "").parent / "source" if package else None
    if root is None or not (root / "include" / "cutlass" / "version.h").is_file():
        looked = "" if root is None else f" They are not in {root}."
        raise KernelError(
            f"CUTLASS's headers are missing, which the kernel library 'cutlass' is built from: pip install "
            f"nvidia-cutlass==4.2.0.0 --no-deps, or name a checkout of CUTLASS in CUTLASS_PATH.{looked}"
        )
    return root / "include", root / "tools" / "util" / "include"


def object_of(target: str, source: Path, flags: Sequence[str]) -> Path:
    """Of one source of ``target``, compiled with these flags instead of the target's own, from the cache if it is there."""
    path = object_path(target, source, flags)
    if not path.is_file():
        compile_to(path, (compiler_of(target_of(target)), *flags), [source])
    return path


def object_path(target: str, source: Path, flags: Sequence[str]) -> Path:
    """Where :func:`object_of` has it, compiled or not."""
    found = target_of(target)
    key = _key(found, (compiler_of(found), *flags, source.name), [source])
    return library_folder() / "objects" / f"{source.stem}-{key}.o"


def compile_to(path: Path, command: Sequence[str], sources: Iterable[Path], link: Sequence[str] = ()) -> None:
    """Run the compiler; ``path`` is there whole or not at all, whoever else builds the same, with what was said in a ``.log``
    beside it. ``sources`` may be objects."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    files = [str(source) for source in sources]
    is_linked = all(file.endswith(".o") for file in files)
    language = ("-x", "c++") if Path(command[0]).name == "g++" and not is_linked else ()
    try:
        whole = [*command, "-o", scratch, *language, *files, *link]
        done = subprocess.run(whole, capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr or done.stdout).strip()
            raise KernelError(f"{path.name} could not be built. {' '.join(whole)} answered {done.returncode}:\n{said}")
        path.with_suffix(".log").write_text(done.stderr)
        os.chmod(scratch, 0o755)
        os.replace(scratch, path)
    finally:
        Path(scratch).unlink(missing_ok=True)


def _command(target: Target) -> tuple[str, ...]:
    command = (compiler_of(target), *target.flags)
    if target.name.startswith("binding"):
        home = Path(torch.__file__).parent
        command = (*command, f"-isystem{home / 'include'}", f"-L{home / 'lib'}")
    if target.name == "cutlass":
        command = (*command, *(f"-I{folder}" for folder in cutlass_headers()))
    return command


def _key(target: Target, command: Sequence[str], sources: Sequence[Path] | None = None) -> str:
    """Changes with what the sources, or all of the target's, may read, the command and the compiler's version."""
    digest = hashlib.sha256("\0".join((*command, _version(command[0]))).encode())
    for path in _read_by(target, sources):
        digest.update(str(path.relative_to(path.parent.parent)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _read_by(target: Target, sources: Sequence[Path] | None) -> list[Path]:
    """Files that change what is compiled: of a unit of CUTLASS's, which takes a minute, no other unit and no other kernels,
    whose objects in turn CUTLASS does not change."""
    folder = source_folder()
    if target.name == "cutlass":
        headers = [path for path in (folder / "cutlass").iterdir() if path.suffix in (".h", ".cuh")]
        own = sources_of(target) if sources is None else sources
        version = cutlass_headers()[0] / "cutlass" / "version.h"
        return [*sorted(headers), folder / "common" / "gpu.h", *own, version]
    files = [path for one in (folder, source_folder("hip_src")) for path in sorted(one.rglob("*"))]
    kept = [path for path in files if path.suffix in (".cu", ".cuh", ".cpp", ".h", ".hip")]
    return [path for path in kept if path.parent.name != "cutlass" or target.name == "cutlass-emulator"]


@lru_cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout


# -- serving -------------------------------------------------------------------------------------------------------------

_I64, _INT, _FLOAT, _DOUBLE, _POINTER = ctypes.c_int64, ctypes.c_int, ctypes.c_float, ctypes.c_double, ctypes.c_void_p
_I64S, _INTS, _POINTERS = ctypes.POINTER(_I64), ctypes.POINTER(_INT), ctypes.POINTER(_POINTER)

#: Arguments of each function of a kernel library; all answer the driver's error code. Those of CUTLASS's are apart.
SIGNATURES: dict[str, tuple[type, ...]] = {
    "dsp_quantise": (_POINTER, _I64, _INT, _POINTER, _POINTER, _I64, _INT, _POINTER),
    "dsp_dequantise": (_POINTER, _POINTER, _POINTER, _I64, _INT, _I64, _INT, _POINTER),
    "dsp_quantise_bucket": (
        *(_POINTERS, _I64S, _I64S, _INTS, _I64, _I64, _I64),
        *(_POINTER, _POINTER, _I64, _INT, _POINTER),
    ),
    "dsp_dequantise_bucket": (_POINTER, _POINTER, _POINTERS, _I64S, _I64, _I64, _INT, _I64, _INT, _POINTER),
    "dsp_quantised_linear": (
        *(_POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _I64, _I64, _I64, _I64),
        *(_INT, _INT, _POINTER),
    ),
    "dsp_copy_in": (_POINTERS, _I64S, _I64S, _I64, _I64, _POINTER, _POINTER),
    "dsp_copy_out": (_POINTER, _POINTERS, _I64S, _I64S, _I64, _I64, _POINTER),
    "dsp_dequantise_sum": (_POINTER, _POINTER, _POINTERS, _I64S, _I64, _I64, _FLOAT, _INT, _I64, _INT, _POINTER),
    "dsp_adamw": (
        *(_POINTERS, _POINTERS, _POINTERS, _POINTERS, _I64S, _INTS, _INTS, _I64),
        *(_I64, _DOUBLE, _DOUBLE, _DOUBLE, _DOUBLE, _DOUBLE, _INT, _I64, _POINTER),
    ),
    "dsp_adamw_8bit": (
        *(_POINTERS, _POINTERS, _POINTERS, _POINTERS, _POINTERS, _POINTERS, _I64S, _INTS, _INTS, _I64),
        *(_I64, _DOUBLE, _DOUBLE, _DOUBLE, _DOUBLE, _DOUBLE, _INT, _I64, _POINTER),
    ),
    "dsp_sort_experts_space": (_I64, _I64, _I64S),
    "dsp_sort_experts": (_POINTER, _INT, _I64, _I64, _POINTER, _POINTER, _POINTER, _POINTER),
    "dsp_spread_experts": (_POINTER, _POINTER, _POINTER, _INT, _POINTER, _I64, _I64, _I64, _INT, _POINTER),
    "dsp_unpermute_experts": (_POINTER, _POINTER, _POINTER, _INT, _POINTER, _I64, _I64, _I64, _INT, _POINTER),
}

CUTLASS_SIGNATURES: dict[str, tuple[type, ...]] = {
    "dsp_grouped_workspace": (_I64, _I64S),
    "dsp_grouped_product": (
        *(_POINTER, _I64, _POINTER, _I64, _I64, _I64, _POINTER, _POINTER),
        *(_I64, _I64, _I64, _I64, _INT, _POINTER, _I64, _POINTER),
    ),
    "dsp_grouped_outer": (
        *(_POINTER, _I64, _POINTER, _I64, _POINTER, _POINTER),
        *(_I64, _I64, _I64, _I64, _INT, _POINTER, _I64, _POINTER),
    ),
    "dsp_mixed_workspace": (_I64, _I64, _I64, _I64S),
    "dsp_mixed_product": (
        *(_POINTER, _I64, _POINTER, _I64, _POINTER, _POINTER),
        *(_I64, _I64, _I64, _I64, _INT, _INT, _POINTER, _I64, _POINTER),
    ),
}


def load(target: str) -> ctypes.CDLL:
    """The library for ``target``, its functions declared.

    Raises :class:`KernelError` where it is not built, or is of other sources than these.
    """
    is_cutlass = target.startswith("cutlass")
    return _declared(_existing(target), is_cutlass)


@lru_cache
def cutlass() -> ctypes.CDLL | None:
    """CUTLASS's library, looked for at the first call in this process; None where it is not built, or kernels are left out.

    Raises :class:`KernelError` where it is there and will not load.
    """
    if os.environ.get("DSPASS_KERNELS") == "reference" or torch.version.hip or not is_built("cutlass"):
        return None
    return load("cutlass")


@lru_cache
def serve_once() -> str | None:
    """:func:`serve`, at its first call in this process."""
    return serve()


def serve() -> str | None:
    """Let the kernels of a GPU answer the operators from now on; the library's path, or None where nothing was built.

    ``DSPASS_KERNELS=reference`` leaves kernels out. Raises :class:`KernelError` where one of the library and its binding is
    there without the other, or will not load.
    """
    if os.environ.get("DSPASS_KERNELS") == "reference":
        return None
    kernels = "hip" if torch.version.hip else "cuda"
    if not is_built(kernels) and not is_built("binding"):
        return None
    return bind("binding", kernels)


def bind(binding: str, kernels: str) -> str:
    """Register the operators of ``binding`` over the library ``kernels``; the library's path."""
    library, binder = _existing(kernels), _existing(binding)
    torch.ops.load_library(str(binder))
    loaded = ctypes.CDLL(str(binder))
    loaded.dsp_bind.restype, loaded.dsp_bind.argtypes = ctypes.c_char_p, [ctypes.c_char_p]
    error = loaded.dsp_bind(os.fsencode(library))
    if error is not None:
        raise KernelError(f"{library} cannot serve: {error.decode()}. Build it again: make kernels.")
    return str(library)


def _existing(target: str) -> Path:
    path = library_path(target)
    if not path.is_file():
        raise KernelError(
            f"the kernel library {target!r} is not built, or from other sources, at {path}: make kernels."
        )
    return path


@lru_cache
def _declared(path: Path, is_cutlass: bool) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
        for name, arguments in (CUTLASS_SIGNATURES if is_cutlass else SIGNATURES).items():
            function = getattr(library, name)
            function.restype, function.argtypes = ctypes.c_int, arguments
    except (OSError, AttributeError) as error:
        raise KernelError(f"{path} cannot be loaded: {error}. Build it again: make kernels.") from error
    return library
