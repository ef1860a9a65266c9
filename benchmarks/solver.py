"""How long the solver takes to find what could be saved: hulls of synthetic graphs, beside the same by networkx's cuts.

``layers`` is a pre-norm transformer as the planner sees it: norms, products, attention, chains of pointwise operators, views.
``random`` has values of random sizes and times, each of which reads up to three of the thirty before it: far fewer are decided
without a cut. The reference makes the cuts of the same contracted graphs by networkx; a row says whether its corners are equal.
Seconds are those of the process on one core.
"""

from __future__ import annotations

import argparse
import math
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from unittest import mock

import networkx as nx
import torch
from tqdm import tqdm

from benchmarks import page
from benchmarks.table import cpu
from dspass.planner import mincut
from dspass.planner.mincut import Choice, Value, hull
from dspass.planner.values import EARLY

#: CPU seconds that a hull of so many values may take.
_GOAL_VALUES, _GOAL_SECONDS = 20_000, 20.0

_MIB = 1 << 20
_BYTES_A_SECOND = 2e12


def layers(count: int) -> list[Value]:
    """The fewest layers that have ``count`` values."""
    values = [Value(bytes=0, seconds=0.0, recomputable=False)]

    def add(mib: float, seconds: float, *inputs: int, needed: bool = False) -> int:
        size = int(mib * _MIB)
        values.append(
            Value(bytes=size, seconds=seconds, save_seconds=size / _BYTES_A_SECOND, inputs=inputs, needed=needed)
        )
        return len(values) - 1

    def view(of: int) -> int:
        values.append(Value(bytes=values[of].bytes, seconds=0.0, inputs=(of,), savable=False))
        return len(values) - 1

    def norm(of: int, weight: int) -> int:
        wide = add(32, 4e-5, of)
        scale = add(1 / 256, 2e-5, wide, needed=True)
        return add(16, 5e-5, add(32, 5e-5, wide, scale), weight)

    stream = 0
    while len(values) < count:
        values.append(Value(bytes=0, seconds=0.0, recomputable=False, needed=True))
        weight = len(values) - 1
        heads = view(add(16, 1.5e-3, view(norm(stream, weight)), weight, needed=True))
        attention = add(16, 2e-3, view(heads), heads, needed=True)
        middle = add(16, 5e-5, stream, add(16, 1e-3, view(attention), weight))
        inner = norm(middle, weight)
        gate = add(64, 4e-3, inner, needed=True)
        activated = add(64, 1e-4, add(128, 1e-4, add(128, 1e-4, gate)))
        product = add(64, 1e-4, activated, add(64, 4e-3, inner, needed=True), needed=True)
        stream = add(16, 5e-5, middle, add(16, 4e-3, product))
    return _weighted(values)


def scattered(count: int) -> list[Value]:
    draw = random.Random(0)
    values = []
    for i in range(count):
        inputs = tuple(sorted({max(0, i - draw.randint(1, 30)) for _ in range(draw.randint(1, 3))})) if i else ()
        savable = not inputs or draw.random() > 0.2
        values.append(
            Value(
                bytes=draw.randint(1, 16 * _MIB),
                seconds=draw.random() * 1e-3,
                save_seconds=draw.random() * 1e-5,
                inputs=inputs,
                needed=i == count - 1 or draw.random() < 0.3,
                savable=savable,
                recomputable=bool(inputs) and (not savable or draw.random() > 0.02),
            )
        )
    return _weighted(values)


def _weighted(values: Sequence[Value]) -> list[Value]:
    """As :func:`dspass.planner.values.values_of` weighs them: an early value is dearer to save than a late one."""
    return [replace(value, weight=1 + EARLY * (1 - i / len(values))) for i, value in enumerate(values)]


GRAPHS: dict[str, Callable[[int], list[Value]]] = {"layers": layers, "random": scattered}


class Reference:
    """What :class:`dspass.planner.flow.Network` does, by networkx."""

    def __init__(self, nodes: int) -> None:
        self._graph = nx.DiGraph()
        self._graph.add_nodes_from(range(nodes))

    def add_edge(self, tail: int, head: int, capacity: float) -> None:
        # Without a capacity an edge cannot be cut.
        self._graph.add_edge(tail, head, **({} if capacity == math.inf else {"capacity": capacity}))

    def minimum_cut(self, source: int, sink: int) -> set[int]:
        algorithm = nx.algorithms.flow.boykov_kolmogorov
        return nx.minimum_cut(self._graph, source, sink, flow_func=algorithm)[1][1]


@dataclass
class Row:
    """One graph: its number of values, its corners, and seconds of each round, by the solver and by networkx's cuts."""

    graph: str
    values: int
    corners: int = 0
    is_equal: bool = True
    seconds: list[float] = field(default_factory=list)
    reference: list[float] = field(default_factory=list)


def measure(graph: str, count: int, most: int, rounds: int, step: Callable[[], object]) -> Row:
    values = GRAPHS[graph](count)
    row = Row(graph, len(values))
    for _ in range(rounds):
        found, seconds = _timed(values, most)
        row.seconds.append(seconds)
        step()
        with mock.patch.object(mincut, "Network", Reference):
            reference, seconds = _timed(values, most)
        row.reference.append(seconds)
        step()
        row.corners, row.is_equal = len(found), row.is_equal and found == reference
    return row


def _timed(values: Sequence[Value], most: int) -> tuple[list[Choice], float]:
    begin = time.process_time()
    found = hull(values, most)
    return found, time.process_time() - begin


def table(rows: Sequence[Row]) -> str:
    """Markdown, and whether the largest graphs take no longer than they may."""
    lines = [
        "| graph | values | corners | the solver | with networkx's cuts | ratio | corners of both |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ours, theirs = statistics.median(row.seconds), statistics.median(row.reference)
        equal = "equal" if row.is_equal else "differ"
        lines.append(
            f"| {row.graph} | {row.values:,} | {row.corners} | {ours:.2f} s | {theirs:.2f} s | {theirs / ours:.1f} | {equal} |"
        )
    large = [row for row in rows if row.values >= _GOAL_VALUES]
    if large:
        worst = max(large, key=lambda row: statistics.median(row.seconds))
        seconds = statistics.median(worst.seconds)
        verdict = "met" if seconds <= _GOAL_SECONDS else "missed"
        lines += [
            "",
            f"- {verdict}: a hull of {_GOAL_VALUES:,} values within {_GOAL_SECONDS:.0f} s: at most {seconds:.2f} s "
            f"({worst.graph})",
        ]
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", default="1000,5000,20000", help="numbers of values, with commas between")
    parser.add_argument("--corners", type=int, default=24, help="how many are asked for")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median is taken")
    parser.add_argument("--out", default="benchmarks/results", help="where the table is written")


def run(options: argparse.Namespace) -> int:
    begin = time.time()
    sizes = [int(size) for size in options.sizes.split(",")]
    rows = []
    with tqdm(total=2 * options.rounds * len(GRAPHS) * len(sizes), unit="hull", ncols=90) as bar:
        for graph in GRAPHS:
            for size in sizes:
                bar.set_description(f"{graph} {size:,}")
                rows.append(measure(graph, size, options.corners, options.rounds, bar.update))
    text = table(rows)
    print("\n" + text + "\n")
    page.write(
        options,
        "solver-cpu.md",
        title="How long the solver takes",
        benchmark="solver",
        keys=("sizes", "corners", "rounds"),
        facts=f"{cpu()}, of which one is used; Python {platform.python_version()}, networkx {nx.__version__}, torch "
        f"{torch.__version__}; CPU seconds, median of {options.rounds} rounds; {time.time() - begin:.0f} s in all.",
        text=text,
    )
    return 0
