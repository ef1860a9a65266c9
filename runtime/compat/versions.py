"""Which versions of torch dspass works with, and the error that others are refused with."""

from __future__ import annotations

import torch

SUPPORTED = ((2, 11), (2, 13))


class UnsupportedTorchError(RuntimeError):
    """The installed torch lies outside the range that dspass was tried with."""


def check_torch(version: str = torch.__version__) -> None:
    """Raise :class:`UnsupportedTorchError` unless ``version`` is one that was tried."""
    major, minor = (int(part) for part in version.split("+")[0].split(".")[:2])
    if not SUPPORTED[0] <= (major, minor) <= SUPPORTED[1]:
        low, high = (".".join(map(str, v)) for v in SUPPORTED)
        raise UnsupportedTorchError(
            f"dspass works with torch {low} to {high}, and this is torch {version}: its passes stand on private "
            f"interfaces that other versions change. Install one of those, for instance pip install 'torch=={high}.*'."
        )
