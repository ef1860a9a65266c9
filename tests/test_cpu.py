"""What is said of a processor."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from dspass.runtime import cpu


def test_the_first_core_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    table = "vendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel name\t: AMD EPYC: 9\n\nvendor_id\t: other\n"
    monkeypatch.setattr(Path, "exists", lambda _: True)
    monkeypatch.setattr(Path, "read_text", lambda _: table)
    monkeypatch.setattr(cpu, "facts", cpu.facts.__wrapped__)
    assert cpu.name() == "AMD EPYC: 9"
    assert cpu.halves_avx512()


def test_a_system_without_such_a_file_is_named_by_its_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "exists", lambda _: False)
    monkeypatch.setattr(cpu, "facts", cpu.facts.__wrapped__)
    assert cpu.name() == platform.machine()
    assert not cpu.halves_avx512()
