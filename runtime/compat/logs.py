"""Logs: ``TORCH_LOGS``, ``TORCH_TRACE``, and calls of loggers in what Dynamo captures."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any


def register_log(name: str, qualified: str) -> None:
    """Let ``TORCH_LOGS="+dspass"`` reach our loggers."""
    from torch._logging._internal import log_registry, register_log

    if name not in log_registry.log_alias_to_log_qnames:
        register_log(name, qualified)


def trace_artifact(name: str, text: Callable[[], str]) -> None:
    """Hand a text to ``TORCH_TRACE`` (read by tlparse); free when no trace is written."""
    from torch._logging import trace_structured

    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=text)


def ignoring_logs() -> contextlib.AbstractContextManager[Any]:
    """Have Dynamo leave out calls of loggers while it captures: each would break the graph."""
    from torch._dynamo import config

    methods = vars(logging.Logger).values()  # those that other libraries have added are among them
    return config.patch(ignore_logger_methods={m for m in methods if callable(m)})
