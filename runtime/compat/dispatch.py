"""torch's dispatcher: who serves an operator, and where a call goes on."""

from __future__ import annotations

from typing import Any

import torch


def has_kernel(operator: str, key: str) -> bool:
    """Whether something is registered for ``operator``, such as ``dspass::scale``, under a dispatch key of its own."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(operator, key)


def behind_versions(keyset: Any) -> Any:
    """What is left of a call's dispatch keys behind the one that counts versions of what is written to."""
    return keyset & torch._C._after_ADInplaceOrView_keyset
