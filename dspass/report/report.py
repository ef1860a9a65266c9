"""The report itself: all records of one model, and what can be asked of them.

Each way to show or to keep it is a module of its own; here are their names. The page and a notebook's summary are imported when
they are asked for: the pictures of pipelines in them need torch, which reading a report does not.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from dspass.report.changes import differences
from dspass.report.files import decode_report, dumps, encode_report, is_page, json_value, write
from dspass.report.records import (
    ExpertLayer,
    GraphRecord,
    HostCopy,
    Kind,
    Memory,
    PassRecord,
    PipelineRecord,
    PlanRecord,
    QuantisedTensor,
    RoundedLayer,
    Traffic,
)
from dspass.report.text import report_text
from dspass.report.trace import trace_of


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything ``dspass.explain`` knows of a model.

    ``config`` holds JSON values only (tuples become lists).

    Raises:
        ValueError: where ``config`` holds something that JSON cannot.
    """

    kind: Kind
    model: str
    device: str
    world_size: int
    passes: list[PassRecord] = field(default_factory=list)
    graphs: list[GraphRecord] = field(default_factory=list)
    memory: Memory = field(default_factory=Memory)
    traffic: list[Traffic] = field(default_factory=list)
    """One rank's, in one optimiser step."""
    host_copies: list[HostCopy] = field(default_factory=list)
    """One rank's, in one optimiser step; empty where nothing waits on the host."""
    quantised: list[QuantisedTensor] = field(default_factory=list)
    """Of one call of the model; empty where all travel whole."""
    rounded: list[RoundedLayer] = field(default_factory=list)
    """What is rounded while it trains."""
    experts: list[ExpertLayer] = field(default_factory=list)
    """In one optimiser step; empty where no experts are divided over ranks, or nothing was measured."""
    step_seconds: float | None = None
    plans: list[PlanRecord] = field(default_factory=list)
    """What a memory budget decided, one a graph."""
    pipeline: PipelineRecord | None = None
    """None where the model's layers are not divided over ranks, nor its batch into micro-batches."""
    config: dict[str, Any] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    """Dotted keys of the configuration that do nothing here, each with the reason."""
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "config", json_value(self.config, "config"))

    @property
    def traffic_bytes(self) -> int:
        """Bytes that one rank sends in one optimiser step."""
        return sum(t.bytes for t in self.traffic)

    @property
    def missing(self) -> str:
        """What stands in place of a figure that is not known."""
        return f"not {self.kind}"

    def __str__(self) -> str:
        return report_text(self)

    def _repr_html_(self) -> str:
        from dspass.report.html import render_summary

        return render_summary(self)

    def to_html(self) -> str:
        """One self-contained page."""
        from dspass.report.html import render_page

        return render_page(self)

    def to_dict(self) -> dict[str, Any]:
        """JSON values. Each different graph text stands once, in ``texts``, and records hold its index."""
        return encode_report(self)

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """The report that :meth:`to_dict` was called on.

        Raises:
            ValueError: where ``data`` is no report, is of another format version, or a value is missing,
                unknown or of the wrong type; the message names where it stands.
        """
        return decode_report(cls, data)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a page (``.html``) or data for :meth:`load` (``.json``), whole or not at all.

        Raises:
            ValueError: for another suffix, or a figure that JSON cannot hold (NaN, infinity).
        """
        suffix = Path(path).suffix.lower()
        if suffix == ".html":
            write(path, self.to_html())
        elif suffix == ".json":
            write(path, dumps(self.to_dict()))
        else:
            name = os.fspath(path)
            raise ValueError(f"cannot save a report as {name!r}: the name must end in .html or .json")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what :meth:`save` wrote as ``.json``.

        Raises:
            ValueError: where the file is no report; OSError where it cannot be read.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except RecursionError:
            raise ValueError(f"{os.fspath(path)}: nested too deeply for a report") from None
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
            hint = "; a report is loaded from the .json file, not from the page" if is_page(path) else ""
            raise ValueError(f"{os.fspath(path)}: {error}{hint}") from error

    def trace(self, path: str | os.PathLike[str]) -> None:
        """Write a trace for https://ui.perfetto.dev: memory by category, the nodes, the phases, the passes.

        One microsecond stands for one event where the timeline counts events.

        Raises:
            ValueError: where the name does not end in ``.json``.
        """
        if Path(path).suffix.lower() != ".json":
            raise ValueError(f"cannot save a trace as {os.fspath(path)!r}: the name must end in .json")
        write(path, dumps(trace_of(self)))

    def diff(self, other: Report) -> str:
        """What differs from this report to ``other``, as text: ``this → other``."""
        nothing = "The same passes, graphs, memory at the peak, traffic, step time and configuration."
        return "\n".join(differences(self, other)) or nothing
