"""What was done to a model, what memory and traffic it costs, how long a step takes: data, and what is made of it.

A :class:`Report` is filled by :mod:`dspass.reporting`, saved, loaded elsewhere and compared. What is where:

==================== ============================================================================================
``records.py``       the data: a dataclass for each kind of thing that was done, measured or predicted
``report.py``        :class:`Report`: all of them for one model, and what it can be asked for
``text.py``          ``print(report)``
``changes.py``       ``report.diff(other)``
``files.py``         ``report.save(...)`` and ``Report.load(...)``: JSON, and files that are written whole or not at all
``trace.py``         ``report.trace(...)``, for Perfetto
``html.py``          ``report.to_html()``: the page, from ``report.html``, ``report.css`` and ``report.js``, with sections of
                     ``plan_html.py``, ``pipeline_html.py`` and ``experts_html.py``
``pipeline.py``      a pipeline's record, from what ranks know, and as text
``diff.py``          line diffs of graphs, fast where they have many thousand lines
``words.py``         how figures, counts and names are written
==================== ============================================================================================

Reading a report needs no torch. ``pipeline.py`` does, and the page through it: both are imported where they are asked for.
"""

from __future__ import annotations

from dspass.report.diff import opcodes, unified_diff
from dspass.report.files import VERSION
from dspass.report.records import (
    CATEGORIES,
    PHASES,
    CollectiveKind,
    Direction,
    ExpertLayer,
    GraphRecord,
    HostCopy,
    HostCopyKind,
    Kind,
    Memory,
    MemoryPoint,
    PassRecord,
    Phase,
    PipelineKind,
    PipelineMessage,
    PipelineRecord,
    PipelineSpan,
    PipelineTimeline,
    PlanPoint,
    PlanRecord,
    PlanTensors,
    QuantisedTensor,
    RoundedLayer,
    Stage,
    TimeUnit,
    Traffic,
)
from dspass.report.report import Report
from dspass.report.words import format_bytes, format_seconds

__all__ = [
    "CATEGORIES",
    "PHASES",
    "VERSION",
    "CollectiveKind",
    "Direction",
    "ExpertLayer",
    "GraphRecord",
    "HostCopy",
    "HostCopyKind",
    "Kind",
    "Memory",
    "MemoryPoint",
    "PassRecord",
    "Phase",
    "PipelineKind",
    "PipelineMessage",
    "PipelineRecord",
    "PipelineSpan",
    "PipelineTimeline",
    "PlanPoint",
    "PlanRecord",
    "PlanTensors",
    "QuantisedTensor",
    "Report",
    "RoundedLayer",
    "Stage",
    "TimeUnit",
    "Traffic",
    "format_bytes",
    "format_seconds",
    "opcodes",
    "unified_diff",
]
