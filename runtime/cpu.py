"""What the operating system says of this machine's processor."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from functools import cache
from pathlib import Path


@cache
def facts() -> Mapping[str, str]:
    """The first core's lines of ``/proc/cpuinfo``; none where there is no such file."""
    table = Path("/proc/cpuinfo")
    first = table.read_text().partition("\n\n")[0] if table.exists() else ""
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}


def name() -> str:
    """As its maker calls it, such as "AMD EPYC 9654"."""
    return facts().get("model name", platform.machine())


def halves_avx512() -> bool:
    """Whether it computes 512 bits as twice 256, as AMD's Zen 4 (family 25) does: with AVX-512 it is no faster at products than
    with AVX2, which is what MKL uses on AMD's."""
    return (facts().get("vendor_id"), facts().get("cpu family")) == ("AuthenticAMD", "25")
