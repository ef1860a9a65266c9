"""Products by CUTLASS, on a GPU whose library of them is built (``cuda_src/cutlass``, ``make kernels``).

The library takes bf16 and fp16 where rows begin at multiples of 16 bytes, and refuses everything else, so that what it takes is
written down once, there; :mod:`dspass.runtime.grouped` and :mod:`dspass.runtime.few_bits` then go on to what serves without it.
``ends`` stay on the device: sizes, pointers and strides of all products are made there, and a call can be captured in a CUDA
graph. Nothing of this has run on a GPU; the library is tested with plain loops on the CPU in CUTLASS's place.

Dropped: operators in the stable-ABI binding, as those of the other kernels: what follows a refusal is Python, and C++ would
have to call back into it; to be called by ctypes costs some 3 µs more. Dropped: operators of their own below, for the same:
they would have to answer that they refused.
"""

from __future__ import annotations

import ctypes
from contextlib import AbstractContextManager, nullcontext

import torch

from dspass.runtime import kernels
from dspass.runtime.formats import format_of
from dspass.runtime.quantise import DTYPES

#: Of the library: what it does not take. The driver has the same for a launch that cannot be, which another path serves too.
_REFUSED = 1


def product(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor | None:
    """As :func:`dspass.runtime.grouped.grouped_product`; None where there is no library, or it refuses.

    Raises ``RuntimeError`` where the driver does not launch.
    """
    (rows, inner), columns = x.shape, weight.shape[2]
    given = (x.data_ptr(), x.stride(0), weight.data_ptr(), *weight.stride())
    return _answered("dsp_grouped_product", x, weight, given, ends, (rows, columns), (rows, inner, columns))


def outer(x: torch.Tensor, grad: torch.Tensor, ends: torch.Tensor) -> torch.Tensor | None:
    """As :func:`dspass.runtime.grouped.grouped_outer`; otherwise as :func:`product`."""
    (rows, inner), columns = x.shape, grad.shape[1]
    if grad.stride(1) != 1:
        return None
    given = (x.data_ptr(), x.stride(0), grad.data_ptr(), grad.stride(0))
    shape = (ends.shape[0], inner, columns)
    return _answered("dsp_grouped_outer", x, grad, given, ends, shape, (rows, inner, columns))


def mixed(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, format: str) -> torch.Tensor | None:
    """As :func:`dspass.runtime.few_bits.mixed_product`; otherwise as :func:`product`."""
    library = library_for(x.device)
    lies_well = x.stride(1) == 1 and codes.stride(1) == 1 and scales.is_contiguous()
    if library is None or not lies_well or not x.device == codes.device == scales.device:
        return None
    (rows, inner), columns = x.shape, codes.shape[0]
    group = codes.shape[1] * 8 // format_of(format).bits // max(scales.shape[1], 1)
    workspace_bytes = ctypes.c_int64()
    with _on(x.device):
        if _refuses(library.dsp_mixed_workspace(inner, columns, group, ctypes.byref(workspace_bytes))):
            return None
        out = x.new_empty((rows, columns))
        workspace = x.new_empty(workspace_bytes.value, dtype=torch.uint8)
        given = (x.data_ptr(), x.stride(0), codes.data_ptr(), codes.stride(0), scales.data_ptr(), out.data_ptr())
        sizes = (rows, inner, columns, group, kernels.FORMAT_CODES[format], DTYPES.index(x.dtype))
        rest = (workspace.data_ptr(), workspace_bytes.value, _stream(x.device))
        return None if _refuses(library.dsp_mixed_product(*given, *sizes, *rest)) else out


def library_for(device: torch.device) -> ctypes.CDLL | None:
    """The one that takes tensors on ``device``, or None. Tests have another one take those on the CPU."""
    return kernels.cutlass() if device.type == "cuda" else None


def _answered(
    name: str,
    x: torch.Tensor,
    other: torch.Tensor,
    given: tuple[int, ...],
    ends: torch.Tensor,
    shape: tuple[int, ...],
    sizes: tuple[int, int, int],
) -> torch.Tensor | None:
    library = library_for(x.device)
    if library is None or x.stride(1) != 1 or not ends.is_contiguous() or not x.device == other.device == ends.device:
        return None
    experts, workspace_bytes = ends.shape[0], ctypes.c_int64()
    with _on(x.device):
        if _refuses(library.dsp_grouped_workspace(experts, ctypes.byref(workspace_bytes))):
            return None
        out = x.new_empty(shape)
        workspace = x.new_empty(workspace_bytes.value, dtype=torch.uint8)
        pointers = (*given, ends.data_ptr(), out.data_ptr())
        rest = (*sizes, experts, DTYPES.index(x.dtype), workspace.data_ptr(), workspace_bytes.value)
        return None if _refuses(getattr(library, name)(*pointers, *rest, _stream(x.device))) else out


def _refuses(error: int) -> bool:
    if error not in (0, _REFUSED):
        raise RuntimeError(f"a product of CUTLASS could not be launched: the driver answered {error}.")
    return error == _REFUSED


def _on(device: torch.device) -> AbstractContextManager[object]:
    """The device is the current one: the library asks that one what it is."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _stream(device: torch.device) -> int | None:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
