"""The configuration: DeepSpeed's JSON keys, read strictly, into frozen dataclasses.

One table, :data:`KEYS`, drives everything. What is where, each built on those above it:

================ ================================================================================================
``errors.py``    the error that names the key, the cause, the way out
``keys.py``      the table: which keys are known, what they take, what each does, why one is ignored or refused
``entries.py``   what stands in lists: a pass, a group of layers, a key that is ignored
``values.py``    checks of single values
``sections.py``  a dataclass for each section
``reading.py``   from a file to values, or to a refusal
``config.py``    :class:`Config`: all sections, what holds between them, batch sizes, what ranks compare
``page.py``      ``docs/config.md``, which ``python -m dspass.config > docs/config.md`` refreshes
================ ================================================================================================

These modules import the standard library and each other alone, so that every other module can import them.
"""

from __future__ import annotations

from dspass.config.config import ENVIRONMENT, Config
from dspass.config.entries import Ignored, PassEntry, RoundedGroup
from dspass.config.errors import PAGE, ConfigError
from dspass.config.keys import FORMATS, KEYS, Key
from dspass.config.sections import (
    DspassConfig,
    ExpertParallelConfig,
    ExpertsConfig,
    LayersConfig,
    PipelineConfig,
    QuantiseConfig,
    QuantizedInitialization,
    RoundedActivations,
    RoundedWeights,
    ZeroConfig,
)

__all__ = [
    "ENVIRONMENT",
    "FORMATS",
    "KEYS",
    "PAGE",
    "Config",
    "ConfigError",
    "DspassConfig",
    "ExpertParallelConfig",
    "ExpertsConfig",
    "Ignored",
    "Key",
    "LayersConfig",
    "PassEntry",
    "PipelineConfig",
    "QuantiseConfig",
    "QuantizedInitialization",
    "RoundedActivations",
    "RoundedGroup",
    "RoundedWeights",
    "ZeroConfig",
]
