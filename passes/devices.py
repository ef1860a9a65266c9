"""What devices can do: a table of datasheet figures, and the device that is here, as it was measured.

:class:`Device` holds rates that the cost model divides by: datasheet figures times :data:`ACHIEVED`, or, for the device that is
here, what ``python -m dspass calibrate`` stored of it (:mod:`dspass.passes.calibration`).

Every rank of a run must find the same figures where the place of a collective follows from them, and calibrations may differ
between machines. So what passes use is the table's (:func:`tabled`); a plan is made from measured ones, by rank 0 for all.
Dropped: rank 0's calibration for the passes too, through the store. A saved plan would then be of one calibration only.

Dropped: reading peak rates from the driver. NVML tells memory, clocks and links, but not what the tensor cores do; a table of
ten rows that a person can check against a datasheet says it better.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.fx as fx

from dspass.passes import calibration
from dspass.passes.calibration import Calibration, Curve
from dspass.runtime import cpu

log = logging.getLogger(__name__)

#: Share of a datasheet rate that large kernels and long messages reach. An assumption, until the device is calibrated.
ACHIEVED = 0.6

_GB = 10**9


@dataclass(frozen=True, kw_only=True)
class Device:
    """Rates of one device: operations a second by dtype, bytes a second of ``memory``, of the ``link`` between nodes and of
    the ``node_link`` to the other ``node_devices`` of its node, seconds of ``latency`` of a collective; ``memory_bytes`` in all
    and ``host_memory_bytes`` of its node's main memory, reached at ``host_link`` bytes a second (0: not known).

    Seconds an element of ``functions`` and reductions beyond moving it; a GPU's hide behind memory. Where it was calibrated:
    ``curves`` of seconds by kind and precision, ``fresh`` seconds a byte that a step holds from its forward to its backward,
    where the allocator gives memory back to the operating system after each step, and by model the ratio of measured to
    predicted ``steps``."""

    name: str
    rates: Mapping[torch.dtype, float]
    memory: float
    link: float
    latency: float
    overlaps: bool
    memory_bytes: int = 0
    node_link: float = 0.0
    node_devices: int = 1
    host_link: float = 0.0
    host_memory_bytes: int = 0
    source: str = ""
    curves: Mapping[str, Curve] = field(default_factory=dict)
    functions: Mapping[str, float] = field(default_factory=dict)
    fresh: float = 0.0
    steps: Mapping[str, float] = field(default_factory=dict)

    @property
    def has_own_memory(self) -> bool:
        """Whether what waits on the host is out of this device's memory."""
        return self.name != "cpu"

    def rate(self, dtype: torch.dtype) -> float:
        return self.rates.get(dtype, self.rates[torch.float32])

    def computing(self, kind: str, dtype: torch.dtype, operations: float) -> float:
        """Seconds of a ``"product"``, a ``"linear"`` one of :mod:`dspass.runtime.linear`, an ``"attention"`` or an ``"attention
        backward"`` of so many operations."""
        curve = self.curves.get(f"{kind} {text_of(dtype)}")
        return operations / self.rate(dtype) if curve is None else curve.seconds(operations)

    def moving(self, count: float) -> float:
        """Seconds of a generated kernel that reads and writes so many bytes."""
        curve = self.curves.get("generated")
        return count / self.memory if curve is None else curve.seconds(count)

    def link_of(self, ranks: int) -> float:
        """Bytes a second of one of ``ranks`` in a group: a ring that leaves the node is as fast as its slowest hop."""
        return self.node_link if 1 < ranks <= self.node_devices and self.node_link else self.link


def _gpu(
    name: str,
    *,
    half: float,
    single: float,
    memory: float,
    gigabytes: int,
    node_link: float,
    adapter: float,
    host_link: float,
    host_gigabytes: int,
    source: str,
) -> Device:
    return Device(
        name=name,
        rates={torch.float16: half * ACHIEVED, torch.bfloat16: half * ACHIEVED, torch.float32: single * ACHIEVED},
        memory=memory * ACHIEVED,
        link=adapter * ACHIEVED,
        latency=20e-6,
        overlaps=True,
        memory_bytes=gigabytes * _GB,
        node_link=node_link * ACHIEVED,
        node_devices=8,
        host_link=host_link * ACHIEVED,
        host_memory_bytes=host_gigabytes * _GB,
        source=source,
    )


#: Dense rates without sparsity, links in one direction. Between nodes each device has one network adapter: 200 Gb/s for the
#: A100 and MI250X generation, 400 Gb/s for the others. Main memory is an eighth of a common node's.
DEVICES = {
    d.name: d
    for d in (
        _gpu("a100", half=312e12, single=19.5e12, memory=2.039e12, gigabytes=80, node_link=300e9, adapter=25e9,
             host_link=32e9, host_gigabytes=256, source="NVIDIA A100 80GB SXM datasheet; DGX A100: 2 TB, HDR InfiniBand"),
        _gpu("h100", half=989e12, single=67e12, memory=3.35e12, gigabytes=80, node_link=450e9, adapter=50e9,
             host_link=64e9, host_gigabytes=256, source="NVIDIA H100 SXM datasheet; DGX H100: 2 TB, NDR InfiniBand"),
        _gpu("h200", half=989e12, single=67e12, memory=4.8e12, gigabytes=141, node_link=450e9, adapter=50e9,
             host_link=64e9, host_gigabytes=256, source="NVIDIA H200 SXM datasheet; DGX H200: 2 TB, NDR InfiniBand"),
        _gpu("b200", half=2250e12, single=75e12, memory=8.0e12, gigabytes=180, node_link=900e9, adapter=50e9,
             host_link=64e9, host_gigabytes=256, source="NVIDIA DGX B200 datasheet: 8 devices, 1.44 TB, 64 TB/s"),
        _gpu("mi250x", half=191.5e12, single=47.9e12, memory=1.638e12, gigabytes=64, node_link=50e9, adapter=25e9,
             host_link=36e9, host_gigabytes=64, source="AMD Instinct MI250X datasheet, one of two dies, as ROCm shows it"),
        _gpu("mi300x", half=1307e12, single=163.4e12, memory=5.3e12, gigabytes=192, node_link=448e9, adapter=50e9,
             host_link=64e9, host_gigabytes=256, source="AMD Instinct MI300X datasheet and platform data sheet"),
    )
}  # fmt: skip

#: Rough figures of a CPU core, where nothing was calibrated and ranks have to agree: ratios count.
CPU = Device(
    name="cpu",
    rates={torch.float32: 8e10},
    memory=8e9,
    link=1e9,
    latency=2e-4,
    overlaps=False,
    functions=dict.fromkeys(
        ("exp", "exp2", "expm1", "erf", "log", "log1p", "tanh", "sigmoid", "sin", "cos", "pow"), 5e-10
    ),
    source="rough figures of a CPU core",
)

#: The row for a GPU that has none and whose name holds none's: the slowest of its maker.
_LEAST = "a100" if torch.version.hip is None else "mi250x"

#: Kinds of device that nothing is known of, and that a model may be on all the same: passes take a CPU's figures.
_OTHERS = ("mps", "xpu")

#: Precisions whose products are measured.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

#: Share of a device's memory for ``"auto"``: the rest is left to the driver, communication buffers and fragmentation.
AUTO = 0.9


def device(name: str) -> Device:
    """The device called ``name``: ``"cpu"``, a row of the table, or ``"cuda"`` for the one that is here. Those that are here as
    they were calibrated. Raises ``ValueError`` with the known ones."""
    if name not in ("cpu", "cuda"):
        return tabled(name)
    found, reason = calibration.find(name, product_of(name))
    if found is None:
        row = _this_cpu() if name == "cpu" else _row_of(_product())
        return replace(row, source=f"{row.source}; {reason}")
    return calibrated(found, reason)


def planned_for(name: str) -> Device:
    """The device that a plan is made for: as it was calibrated, else the table's figures. What :func:`device` measures of a CPU
    on the way is too noisy for that: a plan would be another one in each run."""
    if name in ("cpu", "cuda"):
        found, reason = calibration.find(name, product_of(name))
        if found is not None:
            return calibrated(found, reason)
    return tabled(name)


def calibrated(found: Calibration, source: str) -> Device:
    """As it was measured; what a calibration does not hold is the table's."""
    row = CPU if found.kind == "cpu" else _row_of(found.product)
    products = {dtype: found.curves.get(f"product {text_of(dtype)}") for dtype in DTYPES}
    return replace(
        row,
        rates={dtype: curve.rate for dtype, curve in products.items() if curve is not None},
        memory=found.curves["generated"].rate,
        memory_bytes=row.memory_bytes or machine_memory(),
        latency=found.latency or row.latency,
        link=found.link if found.link and found.kind == "cpu" else row.link,
        node_link=found.link or row.node_link,
        node_devices=row.node_devices if found.kind != "cpu" else max(found.ranks, 1),
        host_link=found.host_link,
        source=source,
        curves=found.curves,
        functions={**row.functions, **found.functions},
        fresh=found.fresh,
        steps=found.steps,
    )


def tabled(name: str) -> Device:
    """The table's figures, equal on all ranks whatever was measured where. Raises ``ValueError`` with the known names."""
    if name in ("cpu", *_OTHERS):
        return CPU
    if name == "cuda":
        return _row_of(_product())
    if name.lower() in DEVICES:
        return DEVICES[name.lower()]
    raise ValueError(
        f"device={name!r} has no figures here; use 'cpu', 'cuda' for the one here, or one of {sorted(DEVICES)}."
    )


def of_graph(graph: fx.Graph, target: str | None) -> Device:
    """The table's device that a prediction for ``target`` is for, or that the graph's tensors are on."""
    values = (n.meta.get("val") for n in graph.nodes)
    kinds = {v.device.type for v in values if isinstance(v, torch.Tensor)}
    return tabled(target or ("cuda" if "cuda" in kinds else "cpu"))


def capacity(name: str, local_ranks: int | None = None) -> int:
    """Bytes that one rank can use on a device: those of its row, the real device's, or its share of this machine's memory.

    ``local_ranks`` are the processes that share a CPU (default: :func:`~dspass.passes.calibration.ranks_here`).
    """
    if name == "cuda":
        return int(_nvml()["memory"])
    if name != "cpu":
        known = device(name).memory_bytes
        if not known:
            raise ValueError(
                f'the memory of device {name!r} is not known here. Give memory_budget in bytes, such as "8GB".'
            )
        return known
    return machine_memory() // (local_ranks or calibration.ranks_here())


def share_of(budget: str, memory: int) -> int:
    """Bytes of ``"75%"`` or ``"auto"`` of so much memory."""
    return int(memory * (AUTO if budget == "auto" else float(budget.rstrip("%")) / 100))


def machine_memory(root: Path = Path("/")) -> int:
    """Bytes of main memory: the machine's, or what its control group allows where that is less."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for limit in ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = (root / limit).read_text().strip()
        except OSError:
            continue
        if text.isdecimal():  # "max" where there is none
            found.append(int(text))
    return min(found)


def text_of(dtype: torch.dtype) -> str:
    """``float32``."""
    return str(dtype).removeprefix("torch.")


def product_of(kind: str) -> str:
    """What is here, ``"cpu"`` or ``"cuda"``, by its maker's name."""
    return cpu.name() if kind == "cpu" else _product()


def _product() -> str:
    return str(_nvml()["name"])


def _row_of(product: str) -> Device:
    """The table's row of a product that is here, such as ``NVIDIA H100 80GB HBM3``, or one after the nearest."""
    words = product.lower().replace("-", " ").split()
    found = next((row for name, row in DEVICES.items() if name in words), None)
    return found or _after_nearest(product)


@functools.cache
def _after_nearest(product: str) -> Device:
    """A device without a row, as the row whose name its own holds (a GH200 holds an H200), or else as the slowest of its maker:
    who has it must be able to train. Of its own it has its memory; its node is taken to have no faster link than the host's,
    and main memory in equal parts."""
    near = next((row for name, row in DEVICES.items() if name in product.lower()), DEVICES[_LEAST])
    if not calibration.is_there("cuda", product):
        log.warning(
            "There are no figures for %s: those of the %s are taken. Its own are measured by: python -m dspass calibrate",
            product,
            near.name.upper(),
        )
    return replace(
        near,
        name=product,
        memory_bytes=capacity("cuda"),
        node_link=min(near.node_link, near.host_link),
        host_memory_bytes=machine_memory() // max(torch.cuda.device_count(), 1),
        source=f"those of the {near.name.upper()}, as there are none for {product}",
    )


def _nvml() -> dict[str, Any]:
    """Product name and bytes of memory of this process's device; by torch where there is no NVIDIA driver (ROCm)."""
    if not torch.cuda.is_available():
        raise ValueError("device='cuda': torch sees none here. Give the name of the one that you mean, such as 'h100'.")
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    if torch.version.hip is not None:
        return {"name": properties.name, "memory": properties.total_memory}
    import pynvml

    pynvml.nvmlInit()
    try:
        # By its identity: NVML numbers all devices, torch those in CUDA_VISIBLE_DEVICES.
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
        return {"name": pynvml.nvmlDeviceGetName(handle), "memory": pynvml.nvmlDeviceGetMemoryInfo(handle).total}
    finally:
        pynvml.nvmlShutdown()


@functools.cache
def _this_cpu() -> Device:
    """This machine's CPU as it is: a matrix product and a copy. gloo's links run on the same cores, so nothing overlaps."""
    a = torch.ones(512, 512)
    product = _best(lambda: a @ a)
    big = torch.ones(8_000_000)
    out = torch.empty_like(big)
    moved = _best(lambda: out.copy_(big))
    return Device(
        name="cpu",
        rates={torch.float32: 2 * 512**3 / product},
        memory=2 * 32e6 / moved,
        link=1e9,
        latency=200e-6,
        overlaps=False,
        memory_bytes=machine_memory(),
        source="measured here: a product of 512 x 512, a copy of 32 MB",
    )


def _best(work: Callable[[], object]) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)
