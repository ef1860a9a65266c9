"""ZeRO and friends as compiler passes of ``torch.compile``.

``torch.compile(model, backend="deepspeed", options={...})`` needs no import of this package once it is installed; from a
checkout, ``import dspass`` registers the backend.
"""

from __future__ import annotations

import torch._dynamo

from dspass.adamw import AdamW
from dspass.backend import deepspeed
from dspass.clipping import clip_grad_norm_
from dspass.config import Config, ConfigError
from dspass.engines import no_sync, resume_at
from dspass.explain import explain
from dspass.fit import Fit, fit
from dspass.full_states import full_state_dict
from dspass.measure import measure
from dspass.mixture import experts
from dspass.planner.record import BudgetError
from dspass.planner.saved import PlanError
from dspass.report import Report
from dspass.runtime import compat
from dspass.shard import shard
from dspass.weights import quantise
from dspass.wishes import keep, recompute, stage_boundary

if "deepspeed" not in torch._dynamo.list_backends(exclude_tags=()):
    torch._dynamo.register_backend(deepspeed, name="deepspeed")

compat.register_log("dspass", "dspass")  # TORCH_LOGS="+dspass", torch._logging.set_logs(modules={"dspass": level})

__all__ = [
    "AdamW",
    "BudgetError",
    "Config",
    "ConfigError",
    "Fit",
    "PlanError",
    "Report",
    "clip_grad_norm_",
    "deepspeed",
    "experts",
    "explain",
    "fit",
    "full_state_dict",
    "keep",
    "measure",
    "no_sync",
    "quantise",
    "recompute",
    "resume_at",
    "shard",
    "stage_boundary",
]
