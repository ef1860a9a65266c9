"""A rank of the experts' benchmark whose segments run operator by operator, without Inductor's minutes of compiling."""

from __future__ import annotations

from unittest import mock

from benchmarks.experts_rank import ExpertsRank
from benchmarks.workers import serve
from tests.training import as_they_are

if __name__ == "__main__":
    with mock.patch("dspass.compilation.segment_compiler", return_value=as_they_are):
        serve(ExpertsRank)
