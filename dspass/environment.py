"""What this machine offers: versions, devices, process-group back ends, and whether torch.compile finds the backend."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, entry_points, version

import torch
import torch.distributed as dist

from dspass.passes import calibration
from dspass.runtime import adamw, compat, cpu, experts, grouped, kernels, quantise  # noqa: F401  (declares operators)
from dspass.runtime.operators import OPERATORS


def describe() -> list[tuple[str, list[tuple[str, str]]]]:
    """Sections of name and value, in the order in which they are printed."""
    low, high = (".".join(map(str, v)) for v in compat.SUPPORTED)
    versions = [("python", platform.python_version()), ("torch", f"{torch.__version__} (tried: {low} to {high})")]
    versions += [(name, _version(name)) for name in ("dspass", "transformers", "accelerate", "triton", "deepspeed")]
    backends = [
        (name, "yes" if check() else "no")
        for name, check in (
            ("gloo", dist.is_gloo_available),
            ("nccl", dist.is_nccl_available),
            ("mpi", dist.is_mpi_available),
        )
    ]
    _, calibrated = calibration.find("cpu", cpu.name())
    devices = [("cpu", f"{torch.get_num_threads()} threads, {platform.machine()}; {calibrated}")]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        devices += [
            (f"{kind}:{i}", torch.cuda.get_device_name(i) if torch.cuda.is_available() else "present")
            for i in range(torch.accelerator.device_count())
        ]
    else:
        devices.append(("accelerator", "none"))
    found = [e.value for e in entry_points(group="torch_dynamo_backends") if e.name == "deepspeed"]
    registered = "deepspeed" in torch._dynamo.list_backends(exclude_tags=())
    backend = [
        ("entry point", found[0] if found else "none: a checkout, which needs `import dspass` in the script"),
        ("registered", "yes" if registered else "no"),
    ]
    if torch.cuda.is_available():
        kernels.serve_once()
    here = torch.accelerator.current_accelerator() or torch.device("cpu")
    operators = [(f"dspass::{one.name}", f"{one.server(here.type)} on {here.type}") for one in OPERATORS.values()]
    return [
        ("versions", versions),
        ("devices", devices),
        ("process groups", backends),
        ("backend 'deepspeed'", backend),
        ("operators, and who serves them", operators),
    ]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "checkout" if name == "dspass" else "not installed"
