"""All combinations of some parameters, of which a part runs each time, and the rest with ``--whole-matrix``.

All of them together take longer than the twenty minutes that the suite is to take on two cores. What runs each time has every
value of every axis; what does not repeats them in other pairs."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable
from typing import Any

import pytest

#: Runs with ``--whole-matrix`` alone.
WHOLE = pytest.mark.whole_matrix


def matrix(each_time: Collection[tuple[Any, ...]], *axes: Iterable[Any]) -> list[Any]:
    """For ``parametrize``: the product of ``axes``; what is not among ``each_time`` is marked."""
    every = list(itertools.product(*axes))
    unknown = [values for values in each_time if values not in every]
    assert not unknown, f"no combinations: {unknown}"
    return [pytest.param(*values, marks=() if values in each_time else WHOLE) for values in every]
