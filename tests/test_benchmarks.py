"""The parts of the benchmarks that compute and that decide: comparisons, tables, plots, and who takes turns when. What they
measure is not timed here; one point runs on two real ranks."""

from __future__ import annotations

import argparse
import threading
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import (
    experts,
    grouped,
    kernels,
    offload,
    pipeline,
    pipeline_models,
    pipeline_predicted,
    prefetch,
    quantise,
    solver,
    weights,
)
from benchmarks.experts_rank import PRESETS
from benchmarks.experts_rank import build as mixture
from benchmarks.memory_bench import Bench
from benchmarks.memory_plot import plot, ticks
from benchmarks.memory_points import PLENTY, Point, Ranks, Started, normalise, peers
from benchmarks.memory_rank import build
from benchmarks.memory_table import compare, table
from benchmarks.workers import SubjectFailed
from benchmarks.zero import GIB
from dspass.passes.captured_cost import costs_of
from dspass.passes.devices import CPU
from dspass.planner.schedule_times import StageCost, simulate
from dspass.planner.schedules import make
from dspass.planner.stages import cut
from dspass.staging import stage_costs


def point(
    system: str, setting: str, peak: int, milliseconds: float, budget: int | None = None, predicted: float | None = None
) -> Point:
    made = Point(system, setting, budget=budget, peak=peak * 10**6, losses=[1.0, 0.5, 0.25])
    made.seconds = {0: [milliseconds / 1e3] * 3}
    if budget is not None:
        made.predicted, made.decision = made.peak, str(peak)
        made.predicted_seconds = (predicted or milliseconds) / 1e3
    return made


def points() -> list[Point]:
    return [
        point("dspass", "unplanned", 100, 10),
        point("dspass", "fastest", 90, 10, PLENTY),
        point("dspass", "60 MB", 60, 12, 60_000_000),
        point("inductor dp", "1.00", 100, 11),
        point("inductor dp", "0.00", 60, 16),
        point("inductor + checkpoint", "", 50, 15),
    ]


def sweep(count: int = 10) -> list[Point]:
    """Budgets from 10 MB on, each of a plan of its own, the larger the faster; and what has no budget."""
    found = [point("dspass", f"{10 + i} MB", 10 + i, 30 - i, (10 + i) * 10**6) for i in range(count)]
    return [point("dspass", "unplanned", 40, 15), point("dspass", "fastest", 40, 15, PLENTY), *found]


def test_peers_are_compared_with_the_best_at_no_more_memory_and_at_no_more_time() -> None:
    found = {c.peer.name: (c.time, c.memory) for c in compare(points())}
    assert found["inductor dp 1.00"] == (pytest.approx(10 / 11), 0.9)
    assert found["inductor dp 0.00"] == (pytest.approx(12 / 16), 1.0)
    assert found["inductor + checkpoint"] == (None, pytest.approx(60 / 50)), (
        "a point of the peer's that needs less memory is said"
    )


def test_the_table_says_what_was_missed() -> None:
    measured = points()
    text = table(measured)
    assert "- met: measured peak within the budget (1 % grace): 2 of 2, at most 1.000 of it" in text
    assert "1 peers' points take less memory than all of ours" in text
    assert "- missed: at equal time the median peak is at most 0.9 of the best peer's: 1.20 of 3" in text
    assert "- without a plan a step takes 0.91 of the fastest peer's, inductor dp 1.00" in text
    assert "| inductor + checkpoint | none | 1.200 |" in text
    assert "- met: every budget was measured: 2 of 2" in text
    text = table([*measured, Point("dspass", "1 MB", budget=10**6, error="refused: too small")])
    assert "- failed: dspass 1 MB: refused: too small" in text
    assert "- missed: every budget was measured: 2 of 3" in text
    measured[2].peak = 70_000_000
    measured[2].losses[1] = 0.4
    text = table(measured)
    assert "- missed: measured peak within the budget (1 % grace): 1 of 2, at most 1.167 of it" in text
    assert "- missed: losses bitwise those of the unplanned run: 1 of 2" in text
    assert "2.0e-01" in text
    measured[2].losses[1] = float("nan")
    assert "| not finite |" in table(measured)


def test_a_table_without_a_point_of_ours_says_so() -> None:
    measured = [p for p in points() if p.system != "dspass"]
    measured.append(Point("dspass", "fastest", budget=PLENTY, error="no luck"))
    text = table(measured)
    assert "- missed: no budget of dspass's was measured" in text
    assert "| inductor dp 1.00 | none | none |" in text
    assert "- missed: at equal peak no slower than the best peer: 0 of 0" in text
    assert "- missed: at equal time the median peak is at most 0.9 of the best peer's: none in common" in text


def test_a_sweep_that_meets_everything() -> None:
    text = table(sweep())
    assert "- met: predicted step time within 15 % of the measured: 11 of 11, worst ratio 1.000" in text
    assert "- met: predicted step time never rises as the budget grows: 55 pairs, worst 0.967" in text
    assert "- met: measured step time never rises by more than 5 % as the budget grows: 55 pairs, worst 0.967" in text
    assert "- met: at least 8 budgets strictly between the smallest and save-everything: 9" in text
    assert "- met: at least 6 distinct plans among these: 9" in text
    assert text.count("- missed") == 2, "no peer was measured"


def test_a_sweep_that_misses() -> None:
    measured = sweep(5)
    measured[-1].seconds = {0: [0.035]}  # 14 MB: predicted 26 ms
    measured[-2].predicted_seconds = 0.0285  # 13 MB: measured 27 ms
    measured[-2].decision = measured[-3].decision
    text = table([*measured, *(Point("dspass", f"{i} MB", budget=i * 10**6, error="no luck") for i in range(20, 24))])
    assert "- missed: predicted step time within 15 % of the measured: 5 of 6, worst ratio 0.743 (dspass 14 MB)" in text
    assert "worst 1.018, from dspass 12 MB (28.00 ms) to dspass 13 MB (28.50 ms)" in text
    assert "as the budget grows: 15 pairs, worst 1.296, from dspass 13 MB (27.00 ms) to dspass 14 MB (35.00 ms)" in text
    assert "- missed: at least 8 budgets strictly between the smallest and save-everything: 4" in text
    assert "- missed: at least 6 distinct plans among these: 3" in text


def test_few_budgets_are_no_sweep() -> None:
    text = table(sweep(4))
    assert "- no sweep: 5 budgets, where 8 strictly between need 10" in text
    assert "distinct plans" not in text


def test_one_factor_for_the_model_mends_predictions_that_are_off_alike() -> None:
    measured = sweep()
    for p in measured:
        p.predicted_seconds = p.predicted_seconds and p.predicted_seconds / 2
    text = table(measured)
    assert "- missed: predicted step time within 15 % of the measured: 0 of 11, worst ratio 0.500" in text
    assert "- with one factor for the model (1/0.500), as dspass keeps after eleven steps: 11 of 11" in text


def test_waves_are_made_one_by_what_runs_in_all_of_them() -> None:
    reference, early, late = Point("dspass", "fastest"), Point("eager"), Point("inductor dp", "0.50")
    reference.seconds = {0: [1.0, 1.0, 1.0], 1: [2.0, 2.0, 2.0, 2.0, 2.0]}
    early.seconds, late.seconds = {0: [3.0]}, {1: [3.0]}
    normalise([reference, early, late], reference)
    assert (reference.step, early.step, late.step) == (2.0, 6.0, 3.0)


def test_peers_of_one_and_of_two_ranks() -> None:
    assert [p.name for p in peers(1, 3, ["dp", "greedy"])] == [
        "inductor dp 1.00",
        "inductor dp 0.50",
        "inductor dp 0.00",
        "inductor greedy 0.50",
        "inductor + checkpoint",
        "eager",
        "eager + checkpoint",
    ]
    assert [p.name for p in peers(2, 3, ["dp"])] == [
        "FSDP2",
        "FSDP2 + checkpoint",
        "FSDP2 + compile",
        "FSDP2 + compile + checkpoint",
    ]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_plot_has_a_mark_for_every_point(ranks: int) -> None:
    others = [
        point(p.system, p.setting, 50 + i, 20 + i) for i, p in enumerate(peers(ranks, 3, ["dp", "greedy", "ilp"]))
    ]
    text = plot("gpt & more", [*points()[:3], *others, Point("eager", error="no luck")])
    root = ElementTree.fromstring(text)
    assert text.count("<title>") == 3 + len(others)
    assert "gpt &amp; more" in text
    labels = [e.text for e in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"measured peak of one rank (MB)", "step time, median (ms)", "dspass without a budget"} <= set(labels)
    looks = {(e.tag, e.get("fill"), e.get("stroke")) for e in root if len(e)}
    assert len(looks) == len({p.system for p in others}) + 2, "every system can be told from the others"
    (line,) = root.iter("{http://www.w3.org/2000/svg}polyline")
    assert len((line.get("points") or "").split()) == 2, "it joins what has a budget"


def test_a_plot_of_nothing() -> None:
    assert "no point was measured" in plot("gpt", [Point("eager", error="no luck")])


def test_ticks_are_round_and_neither_few_nor_many() -> None:
    assert ticks(18.3, 35.7) == [20, 22, 24, 26, 28, 30, 32, 34]
    assert ticks(1.86, 3.48) == [2.0, 2.2, 2.4, 2.6, 2.8, 3.0, 3.2, 3.4]
    assert all(3 <= len(ticks(7.0, 7.0 + 1.07**i)) <= 9 for i in range(100))


# -- turns ----------------------------------------------------------------------------------------------------------


class Fake:
    """A point's processes, which answer at once, or cause the ``trouble`` of a request."""

    def __init__(self, point: Point, log: list[str], size: int, trouble: dict[str, Callable[[], None]]) -> None:
        self.point, self.log, self.size, self.trouble, self.is_closed = point, log, size, trouble, False
        log.append(f"made {point.name}")

    def ask(self, request: str, *args: Any, timeout: float = 0.0) -> list[Any]:
        self.log.append(f"{request} {self.point.name}")
        self.trouble.get(f"{request} {self.point.name}", lambda: None)()
        if request == "steps":
            return [(0.010, [1.0]), (0.012, [3.0])]
        if request == "peak":
            return [100, 200]
        if self.point.budget == 1:
            return [Started([], smallest=10**6, why="too small")] * 2
        if self.point.budget is None:
            return [Started([1.0, 1.0, 1.0])] * 2
        return [Started([1.0] * 3, peak=10**7, seconds=0.01, optimizer_seconds=0.001, is_calibrated=True)] * 2

    def memory(self) -> tuple[int, int]:
        return self.size, self.size

    def close(self) -> None:
        assert not self.is_closed
        self.is_closed = True
        self.log.append(f"closed {self.point.name}")


def bench(
    gib: int = 20, size: int = GIB, jobs: int = 2, trouble: dict[str, Callable[[], None]] | None = None
) -> tuple[Bench, list[str]]:
    log: list[str] = []
    options = argparse.Namespace(memory_gib=gib, budgets=4, rounds=3, ranks=2, jobs=jobs, calibrate=True)
    made: Any = lambda p: Fake(p, log, size, trouble or {})  # noqa: E731
    found = Bench("gpt", options, made)
    found.limit = gib * GIB  # whatever else runs here
    return found, log


def test_all_points_take_turns_one_at_a_time() -> None:
    run, log = bench()
    measured = run.measure(peers(2, 2, []))
    assert run.waves == 1
    assert [p.name for p in measured if p.error] == []
    assert {p.name for p in measured if p.is_planned} == {
        f"dspass {s}" for s in ("fastest", "1.000 MB", "4.000 MB", "7.000 MB")
    }
    assert all(p.seconds == {0: [0.012] * 3} for p in measured), "the slowest rank's"
    assert all(p.peak == 200 for p in measured), "the largest rank's"
    assert measured[-1].losses == [1.0] * 3 + [2.0] * 3
    rounds = [line for line in log if line.startswith("steps")]
    each = len(measured)
    assert [sorted(rounds[i * each : (i + 1) * each]) for i in range(3)] == [sorted(set(rounds))] * 3
    assert rounds[:each] != rounds[each : 2 * each], "an order of its own"
    assert log.index(rounds[0]) > max(i for i, line in enumerate(log) if line.startswith("start"))
    assert sorted(line for line in log if line.startswith("closed")) == sorted(
        line.replace("made", "closed") for line in log if line.startswith("made")
    )


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_does_not_fit_runs_in_waves_beside_the_reference(jobs: int) -> None:
    run, log = bench(gib=4, jobs=jobs)
    measured = run.measure(peers(2, 2, []))
    assert run.waves > 1
    by_wave = [[p.name for p in measured if wave in p.seconds] for wave in range(run.waves)]
    assert all("dspass fastest" in names and len(names) <= 4 for names in by_wave), by_wave
    assert sorted({n for names in by_wave for n in names}) == sorted(p.name for p in measured)
    assert log.count("made dspass fastest") == 1, "it stays"
    alive = most = 0
    for line in log:
        alive += line.startswith("made") - line.startswith("closed")
        most = max(most, alive)
    assert most <= 4


def test_a_point_larger_than_the_memory_still_runs() -> None:
    run, _ = bench(gib=1, size=2 * GIB)
    measured = run.measure([Point("FSDP2")])
    assert all(p.seconds for p in measured)


def fails(name: str) -> Callable[[], None]:
    def work() -> None:
        raise SubjectFailed(f"{name}: rank 1 failed:\nTraceback ...\nValueError: bad luck")

    return work


def test_a_point_that_fails_is_said_and_the_others_go_on() -> None:
    failing = ("start FSDP2", "steps FSDP2 + compile", "peak dspass 4.000 MB")
    run, log = bench(trouble={name: fails(name) for name in failing})
    measured = run.measure(peers(2, 2, []))
    errors = {p.name: p.error for p in measured if p.error}
    assert errors == {name.partition(" ")[2]: f"{name}: rank 1 failed: ValueError: bad luck" for name in failing}
    assert all(len(p.seconds[0]) == 3 for p in measured if not p.error)
    assert "closed FSDP2" in log
    assert "- failed: FSDP2: start FSDP2: rank 1 failed: ValueError: bad luck" in table(measured)


def test_without_a_plan_the_peers_run_all_the_same() -> None:
    run, _ = bench(trouble={f"start dspass {s}": fails(s) for s in ("refused", "fastest")})
    measured = run.measure([Point("FSDP2")])
    assert {p.name for p in measured if not p.error} == {"dspass unplanned", "FSDP2"}
    assert {p.name for p in measured if p.error} == {"dspass refused", "dspass fastest"}


def test_stopping_while_points_start_or_step_ends_all_of_them() -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    run, log = bench(trouble={"steps FSDP2": stop})
    with pytest.raises(KeyboardInterrupt):
        run.measure([Point("FSDP2")])
    run.close()
    assert sum(line.startswith("made") for line in log) == sum(line.startswith("closed") for line in log)

    hanging, killed = threading.Event(), threading.Event()

    def hangs() -> None:
        hanging.set()
        assert killed.wait(20), "nobody has ended it"
        raise SubjectFailed("a rank died")

    def stop_then() -> None:
        assert hanging.wait(20)
        stop()

    run, log = bench(trouble={"start FSDP2": hangs, "start eager": stop_then})
    close = run.close

    def ends() -> None:
        close()
        killed.set()

    run.close = ends  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run.measure([Point("FSDP2"), Point("eager")])
    assert "closed FSDP2" in log


# -- models and processes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt", "llama", "vit"])
def test_models_answer_a_loss(name: str) -> None:
    model, args, kwargs = build(name, "tiny")
    answer = model(*args, **kwargs)
    loss = getattr(answer, "loss", answer)
    assert loss.dim() == 0
    blocks: Any = model.blocks
    assert len(blocks) == 2
    _, others, named = build(name, "tiny", rank=1)
    ours, theirs = next(iter((*args, *kwargs.values()))), next(iter((*others, *named.values())))
    assert (ours != theirs).any(), "each rank has its own batch"


def test_two_ranks_of_a_peer_step_and_a_point_that_fails_is_told(tmp_path: Path) -> None:
    environment = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    group = Ranks(Point("FSDP2 + checkpoint"), "llama", "tiny", 2, environment)
    try:
        first = group.ask("start", 2, timeout=120)
        assert [len(one.losses) for one in first] == [2, 2]
        assert first[0].losses != first[1].losses
        assert first[0].losses[0] > first[0].losses[1]
        assert all(peak > 10**6 for peak in group.ask("peak", timeout=60))
        assert all(size > 10**7 for size in group.memory())
        with pytest.raises(SubjectFailed, match="AttributeError"):
            group.ask("nonsense", timeout=60)
    finally:
        group.close()
    assert all(process.poll() is not None for process in group.processes)
    assert not group.folder.exists()


# -- offload, prefetch and solver -------------------------------------------------------------------------------------


def _row(name: str, peak: int, seconds: float, budget: int | None = None, **held: int) -> offload.Row:
    point = Point(name, "", budget=budget, peak=peak, losses=[1.0, 0.5])
    point.seconds = {0: [seconds, seconds + 0.1]}
    return offload.Row(point, whole=1000, **held)


def test_the_offload_table_says_what_the_copies_cost_and_what_they_must() -> None:
    rows = [
        _row("dspass", 2000, 1.0),
        _row("states", 1500, 1.5, states=400),
        _row("all", 600, 2.0, 500, parameters=200),
    ]
    text = offload.table(rows, link=1000.0)
    assert "| states |  | 0.0 MB | 0.0 MB | 1550 ms | 500 ms | 0.0 MB | 800.0 ms | equal |" in text
    assert rows[2].copied == 600
    assert "missed: the peak under a budget of 0.50 of what persists" in text
    rows[2].point.peak, rows[2].point.losses = 500, [1.0, 0.6]
    text = offload.table(rows, link=1000.0)
    assert "- met: the peak under a budget" in text
    assert "- missed: losses are bitwise" in text


def test_the_prefetch_table_compares_the_last_row_with_the_longest_and_the_shortest() -> None:
    def rows(waits: float, held: int) -> list[prefetch.Row]:
        lookaheads = dict.fromkeys(prefetch.LOOKAHEADS, (0.1, 5)) | {"as late as hides": (waits, held)}
        return [prefetch.Row(name, 1.0, 9, held, {"forward": waits}) for name, (waits, held) in lookaheads.items()]

    assert prefetch.table(rows(0.1, 5)).count("- met") == 2
    assert "- missed: as late as hides exposes no more" in prefetch.table(rows(0.2, 5))
    assert "- missed: and holds no more" in prefetch.table(rows(0.1, 6))


def test_a_lookahead_is_predicted() -> None:
    """On a small model; the pass that is put in the place of the usual one is found by its name."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        config = LlamaConfig(
            vocab_size=256, hidden_size=256, intermediate_size=512, num_hidden_layers=2, use_cache=False
        )
        model = LlamaForCausalLM(config)
    tokens = torch.zeros(1, 64, dtype=torch.long)
    found = prefetch.predict("as late as hides", model, tokens, 8, "h100")
    assert found.peak > found.gathered > 0
    assert found.seconds > 0


@pytest.mark.parametrize("graph", solver.GRAPHS)
def test_the_solvers_corners_are_those_by_networkxs_cuts(graph: str) -> None:
    turns: list[None] = []
    row = solver.measure(graph, 600, 12, 1, lambda: turns.append(None))
    assert row.values >= 600
    assert row.corners == 12
    assert row.is_equal
    assert len(turns) == 2


def test_the_solver_table_says_whether_the_largest_graphs_are_in_time() -> None:
    rows = [
        solver.Row("layers", 1000, 24, True, [30.0], [60.0]),
        solver.Row("random", 20_000, 24, False, [3.0, 5.0, 4.0], [20.0] * 3),
    ]
    text = solver.table(rows)
    assert "| random | 20,000 | 24 | 4.00 s | 20.00 s | 5.0 | differ |" in text
    assert "- met: a hull of 20,000 values within 20 s: at most 4.00 s (random)" in text
    rows[1].seconds = [21.0]
    assert "- missed: a hull of 20,000 values" in solver.table(rows)
    assert "met" not in solver.table(rows[:1])


def test_the_table_of_few_bits_holds_rows_against_the_plain_one() -> None:
    whole = {("all-gather", "data"): 2_000_000, ("reduce-scatter", "data"): 1_000_000}
    plain = quantise.Row("plain", "dspass-3", seconds=[0.1, 0.2, 0.3], losses=[3.0, 2.0], sent=whole)
    few = {("all-gather", "data"): 600_000, ("all-to-all", "data"): 150_000}
    both = quantise.Row("both", "dspass-3", "int8", "int4", 1, [0.2, 0.2, 0.2], [3.0, 2.0], few, 5e6)
    assert both.bound(plain.sent, 2) == pytest.approx(2e6 * (8 + 32 / 256) / 32 + 1e6 * (4 + 32 / 256) / 32)
    text = quantise.table([plain, both], 2, 10**6)
    assert "| both | int8 | int4 | 0.75 MB | 0.250 |" in text
    assert "| 200 ms | 1.000 | 5.0 MB | 2 | 2.0000 | +0.00% |" in text
    assert "- met: the loss after 2 steps is within 0.5 % of the plain row's: 1 of 1" in text
    assert "crosses" not in text
    both.losses[-1] = 2.02
    assert "- missed: the loss after 2 steps" in quantise.table([plain, both], 2, 10**6)
    # The plain one goes on with those that go on, and is held against each after as many steps as that one took.
    plain.losses.append(1.0)
    text = quantise.table(
        [plain, both, quantise.Row("on", "dspass-3", "int8", None, 1, [0.1] * 3, [3.0, 2.0, 1.001], few)], 2, 10**6
    )
    assert "| 2 | 2.0200 | +1.00% |" in text
    assert "- met: the loss after 3 steps is within 0.5 % of the plain row's: 1 of 1" in text
    assert "- missed: the loss after 2 steps is within 0.5 % of the plain row's: 0 of 1" in text


def test_what_crosses_nodes_is_counted_for_a_node() -> None:
    """On four ranks of two nodes, of a model of a million parameters in fp32."""
    plain = quantise.Row("plain", "dspass-3", seconds=[0.1], losses=[2.0], sent={("all-gather", "data"): 6_000_000})
    assert plain.across(4, 2) == 4_000_000  # two copies, half of each from the other node
    sent = {("all-gather", "data"): 750_000, ("all-gather", "node"): 2_000_000, ("all-to-all", "across"): 125_000}
    last = quantise.Row("last", "dspass-3", "int8", "int4", 2, [0.1], [2.0], sent)
    assert last.across(4, 2) == 500_000 + 250_000
    whole = {("all-gather", "data"): 6_000_000, ("reduce-scatter", "data"): 3_000_000}  # of 4 MB in three ways
    forward, backward, inside, across = 3e6 * 8.125 / 32, 2e6, 2e6 * 4.125 / 32, 1e6 * 4.125 / 32
    assert last.bound(whole, 4) == pytest.approx(forward + backward + inside + across)
    last.gathers = last.reductions = None
    assert last.bound(whole, 4) == 3e6 + 2e6 + 3e6
    last.gathers, last.reductions = "int8", "int4"
    text = quantise.table([plain, last], 4, 10**6)
    assert (
        "- met: last sends at most 0.26 of three times the parameters in bf16 from a node of 2 to the others: 0.250"
        in text
    )
    assert "| plain | 4.00 MB | 1.333 |" in text
    last.sent["all-to-all", "across"] *= 2
    assert "- missed: last sends" in quantise.table([plain, last], 4, 10**6)


def test_weights_in_few_bits_are_held_against_bf16() -> None:
    plain = weights.Row("bf16, Inductor", 2_000_000, 10.0, [0.2, 0.4], [2.0, 2.0])
    few = weights.Row("int8", 1_000_000, 10.5, [0.1, 0.3], [2.0, 4.0])
    text = weights.table([plain, few], 1e9)
    assert "| int8 | 1.0 MB | 0.500 | 200.0 ms | 0.625 | 200.00 | 3000 ms | 1.500 | 10.5000 | +5.00% |" in text
    assert "- met: a token with int8 weights takes at most 0.7 of bf16 by Inductor: 0.625" in text
    few.token = [0.2, 0.4]
    assert "- missed: a token" in weights.table([plain, few], 1e9)


def test_contenders_for_the_grouped_product_answer_one_thing_and_get_rows_of_all_tokens() -> None:
    ends = grouped.routed(40, 5, 2, "skewed", torch.Generator().manual_seed(0))
    counts = ends.diff(prepend=torch.zeros(1, dtype=torch.int32))
    assert ends[-1] == 80
    assert counts.max() <= 40  # no expert twice for a token
    assert counts[0] > counts[4]
    x, weight = torch.randn(80, 8), torch.randn(5, 8, 4)
    contenders = grouped.products()
    wanted = contenders["dspass"](x, weight, ends)
    for name in ("fallback", "torch._grouped_mm", "loop"):
        assert torch.allclose(contenders[name](x, weight, ends), wanted, rtol=1e-5, atol=1e-5)


def test_the_grouped_product_is_held_against_its_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(grouped.MODELS, "qwen3", (3, 8, 4, 2))
    turns: list[None] = []
    row = grouped.Row("qwen3", "fp32", "uniform", 0.0)
    grouped.measure(row, 5, 2, lambda: turns.append(None))
    assert len(turns) == 5
    assert row.operations == 2 * 10 * 8 * 8
    assert all(len(seconds) == 2 for by_name in (row.forward, row.both) for seconds in by_name.values())
    for name in row.forward:
        row.forward[name], row.both[name] = [2.0, 2.0], [8.0, 4.0]
    row.forward["dspass"], row.both["dspass"], row.operations = [1.0, 1.0], [2.0, 4.0], 4e9
    text = grouped.table([row])
    assert "| qwen3 | 3 | fp32 | uniform | forward | 1000.0 ms | 0.500 | 0.500 | 0.500 | 4 | 2 |" in text
    assert "| and backward | 3000.0 ms | 0.625 | 0.625 | 0.625 | 4 | 2 |" in text
    assert "- met: at most the time of the fallback: at most 0.625 of it" in text
    row.both["loop"] = [1.0, 1.0]
    assert "- missed: at most the time of the loop: at most 3.000 of it" in grouped.table([row])


def test_an_operator_is_compared_and_timed_and_a_wrong_one_is_named() -> None:
    cases = {case.name: case for case in kernels.cases("cpu", "tiny")}
    one = kernels.measure(cases["dequantise int8"], "cpu", rounds=2)
    assert (one.agrees, one.wrong, one.server) == ("equal", "", "torch reference")
    assert {name: len(seconds) for name, seconds in one.seconds.items()} == {"dspass": 2, "Inductor": 2, "copy": 2}
    product = cases["grouped_product, 16 experts"]
    assert product.goal == ("torch._grouped_mm", 1 / 0.9)
    right = kernels.as_served(product, "cpu")
    assert not kernels.agreement(product, right)[1]
    assert "it differs from its reference by" in kernels.agreement(product, lambda *args: right(*args) * 1.1)[1]
    assert "other shapes" in kernels.agreement(product, lambda *args: right(*args)[1:])[1]
    written = cases["adamw_ fp32"]
    assert "it differs" in kernels.agreement(written, lambda *args: None)[1], "what it should have written counts"


def test_the_table_of_operators_has_goals_of_its_device() -> None:
    def row(name: str, ours: float, **more: Any) -> kernels.Row:
        case = kernels.Case(name=name, operator="quantise", make=tuple, moved=10**9, **more)
        return kernels.Row(
            case, "kernel", "equal", seconds={"dspass": [ours], "Inductor": [1.0], "copy": [0.9], "x": [1.0]}
        )

    rows = [row("near", 1.0), row("product", 1.2, operations=1.0, peers={"x": print}, goal=("x", 1.25))]
    on_gpu = kernels.table(rows, "cuda")
    assert "| near | kernel | equal | 1000000 us | 1.0 | 0.90 | 1.000 |  |" in on_gpu
    assert "- met: what is bound by memory reaches 0.85 of a copy: 1 of 1, at least 0.90 (near)" in on_gpu
    assert "- met: product: at most 1.25 of x: 1.200" in on_gpu
    assert "- missed: as fast as Inductor makes the reference: at most 1.200 of it (product)" in kernels.table(
        rows, "cpu"
    )
    rows[0].wrong = "it differs"
    assert "- missed: every operator answers as its reference: near" in kernels.table(rows, "cuda")


def _rows_of_experts() -> list[experts.Row]:
    plain = experts.Row("dspass-3", [1.0, 1.0], [3.0, 2.0], {"all-gather": 3e6, "reduce-scatter": 1e6}, 10_000_000)
    ours = experts.Row(
        "dspass-3-experts", [0.8, 0.7], [3.0, 2.0], {"all-reduce": 5e5, "all-to-all": 65536.0}, 8_000_000
    )
    ours.rows = [[10, 20, 30, 4], [16, 16, 16, 16]]
    return [ours, plain, experts.Row("deepspeed-autoep", error="rank 0 failed in 'steps': no luck")]


def test_experts_are_held_against_zero_3_and_their_bound() -> None:
    shape = PRESETS["tiny"]
    assert experts.bound(shape, 32, 4) == 4 * (32 * 2 * 32 * 4) * 3 / 4
    rows = _rows_of_experts()
    text = experts.table(rows, shape, 64, 2)
    assert (
        "| dspass-3-experts | 750 ms | 0.750 | 8.0 MB | 0.800 | 0.6 MB | 0.141 | 3.00000 | 2.00000 | 0.0e+00 |" in text
    )
    assert "- met: a step takes at most 0.8 of ZeRO-3's: 0.750" in text
    assert "- met: the peak is at most 0.8 of ZeRO-3's: 0.800" in text
    assert "- met: losses of 2 steps agree to 1e-4" in text
    assert "- failed: deepspeed-autoep: rank 0 failed" in text
    assert "| dspass-3 | 3.00 MB | 1.00 MB | 0.00 MB | 0.00 MB |" in text
    assert "Rows to experts and back: 0.07 MB of a rank, 2.000 of the bound, 0.03 MB." in text
    assert "| 0 | 64 | 4 | 30 | 1.88 | 1.06 |" in text
    rows[0].seconds, rows[0].peak, rows[0].losses = [0.9, 0.9], 8_100_000, [3.0, 2.001]
    assert experts.table(rows, shape, 64, 2).count("- missed:") == 3
    rows[2].seconds, rows[2].losses = [2.0], [3.0, 2.5]  # it failed later
    text = experts.table(rows, shape, 64, 2)
    assert "| deepspeed-autoep | 2000 ms | 2.000 | - | - | - | - | 3.00000 | 2.50000 | 5.0e-01 |" in text
    assert "- failed: deepspeed-autoep" in text
    assert "- missed: there are no figures of dspass-3-experts" in experts.table(rows[1:], shape, 64, 2)


@pytest.mark.parametrize("preset", ["mixtral", "qwen3"])
def test_mixtures_have_the_size_that_is_said(preset: str) -> None:
    with torch.device("meta"):
        model = mixture(PRESETS[preset])
    assert 50e6 < sum(p.numel() for p in model.parameters()) < 200e6
    assert len(model.blocks) == PRESETS[preset].layers


def test_experts_are_measured_on_two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "RANK", "tests.plain_experts_rank")
    options = argparse.Namespace(preset="tiny", ranks=2, batch=2, context=16, rounds=1)
    (ours,) = experts.measure(["dspass-3-experts"], options)
    assert ours.error is None
    assert len(ours.losses) == 4
    assert len(ours.seconds) == 1
    assert ours.peak > 10**5
    (rows,) = ours.rows
    assert len(rows) == PRESETS["tiny"].experts
    assert sum(rows) == 2 * 2 * 16 * PRESETS["tiny"].top_k  # those of both ranks, and none lost
    assert 0 < ours.sent["all-to-all"] < 2.5 * experts.bound(PRESETS["tiny"], 32, 2)


def test_a_row_of_experts_that_fails_is_told_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []

    class Answers:
        def __init__(self, name: str, *_: Any, **__: Any) -> None:
            self.name = name

        def ask(self, request: str, *_: Any, **__: Any) -> list[Any]:
            if (self.name, request) == ("deepspeed-autoep", "watch"):
                raise SubjectFailed("deepspeed-autoep: a rank died in 'watch'\nno memory")
            found = {"peak": 7, "collectives": {"all-gather": (2, 5.0)}}
            return [(0.5, [2.0]), (0.75, [4.0])] if request == "steps" else [found, {"peak": 9, "collectives": {}}]

        def close(self) -> None:
            closed.append(self.name)

    monkeypatch.setattr(experts, "Group", Answers)
    options = argparse.Namespace(preset="tiny", ranks=2, batch=2, context=16, rounds=2)
    failed, plain = experts.measure(["deepspeed-autoep", "dspass-3"], options)
    assert failed.error == "deepspeed-autoep: a rank died in 'watch' no memory"
    assert failed.seconds == plain.seconds == [0.75, 0.75], "the slowest rank's"
    assert plain.losses == [3.0] * 5
    assert (plain.peak, plain.sent, plain.error) == (9, {"all-gather": 2.5}, None)
    assert set(closed) == {"deepspeed-autoep", "dspass-3"}


@pytest.mark.parametrize("kind", pipeline_models.MODELS)
def test_pieces_of_a_model_compute_what_it_does(kind: str) -> None:
    shape = pipeline_models.SHAPES["tiny"][kind]
    torch.manual_seed(0)
    model = pipeline_models.build(shape)
    x, y = torch.randint(0, 256, (2, 2, shape.context))
    whole = pipeline_models.loss_of(model(**pipeline_models.inputs(shape, x, y)))
    cut = pipeline_models.pieces(model)
    for parts in (cut.one_by_one(), *([cut.stage(s, stages) for s in range(stages)] for stages in (2, 3))):
        out = x
        for part in parts:
            out = part(out)
        torch.testing.assert_close(cut.loss(out, (x, y)[cut.target]), whole)
        assert {id(p) for part in parts for p in part.parameters()} == {id(p) for p in model.parameters()}
    layers = [sum(1 for _ in cut.stage(s, 3).modules()) for s in range(3)]
    assert layers[0] > layers[1], "of four layers the first stage has two"


@pytest.mark.parametrize("kind", pipeline_models.MODELS)
def test_models_for_stages_have_the_size_that_is_said(kind: str) -> None:
    with torch.device("meta"):
        model = pipeline_models.build(pipeline_models.SHAPES["full"][kind])
    count = sum(p.numel() for p in model.parameters())
    assert count / 1e6 == pytest.approx({"gpt": 85.5, "llama": 70.1, "uneven": 41.3}[kind], abs=0.06)


def pipeline_row(name: str, seconds: float, peak: int, loss: float = 3.0) -> pipeline.Row:
    made = pipeline.Row(name, seconds={0: seconds, 1: seconds}, alone=[seconds], losses=[4.0, loss])
    made.waits, made.peaks, made.parameters = [[0.1, 0.3], [0.2, 0.3]], [peak // 2, peak], [10**6, 2 * 10**6]
    return made


def test_pipelines_are_held_against_the_fastest_peer_and_the_smallest() -> None:
    ours = pipeline_row("dspass", 0.8, 8 * 10**6)
    schedule = make("1f1b", 2, 4)
    ours.predicted = simulate(schedule, [StageCost(1.0, 2.0)] * 2)
    ours.runs = [simulate(schedule, [StageCost(1.0, 2.0), StageCost(1.0, 2.1)])]
    rows = [ours, pipeline_row("torch-1f1b", 1.0, 10**7, 3.00002), pipeline_row("torch-zb", 2.0, 9 * 10**6)]
    rows[2].is_out, rows[2].seconds = True, {}
    text = pipeline.table(rows, cores=2)
    assert "| dspass | 800 ms | 0.800 | 8.0 MB | 0.800 | 150 ms, 300 ms | 1.0 M, 2.0 M | 4.00000 |" in text
    assert "| torch-zb | 2000 ms alone | - | 9.0 MB | 0.900 |" in text
    assert "- met: a step takes at most 0.85 of torch-1f1b's, the fastest peer: 0.800" in text
    assert "- met: the peak is at most 0.9 of torch-1f1b's: 0.800" in text
    assert "- met: the peak is at most 0.9 of torch-zb's, the smallest of a peer: 0.889" in text
    assert "- met: losses of 2 steps agree to 1e-4: at most 2.0e-05 apart" in text
    # Ranks of the peer wait for 0.15 and 0.3 seconds of one, and hold 1.5 M parameters on average, 16 bytes each.
    assert "a step takes 0.775 of its own" in text
    assert "divided evenly, are 2.400 of its peak" in text
    assert "20.0 % simulated from the cost model" in text
    assert "share" not in text
    assert "4 ranks share 2 cores" not in text
    assert "2 ranks share 1 cores" in pipeline.table(rows, cores=1)
    rows.append(pipeline_row("dspass-budget", 0.84, 89 * 10**5))
    rows[-1].budget = 9 * 10**6
    text = pipeline.table(rows)
    assert (
        "- met: dspass-budget keeps its budget, 9.0 MB, within 1 %: its peak is 0.890 of torch-1f1b's and 0.989 of the"
        in text
    )
    assert (
        "- met: both at once, a step of at most 0.85 and a peak of at most 0.9 of torch-1f1b's: dspass-budget has 0.840"
        in text
    )
    rows[-1].peaks = [91 * 10**5]
    assert (
        pipeline.table(rows).count("- missed: both at once")
        == pipeline.table(rows).count("- missed: dspass-budget")
        == 1
    )
    del rows[-1]
    rows.append(pipeline.Row("deepspeed-uniform", error="no luck"))
    ours.seconds, ours.peaks, ours.losses[1] = {0: 0.9, 1: 0.9}, [10**7], 3.1
    ours.predicted = simulate(schedule, [StageCost(1.0, 2.0), StageCost(2.0, 4.0)])
    text = pipeline.table(rows)
    assert text.count("- missed:") == 5
    assert "- failed: deepspeed-uniform: no luck" in text
    assert "- missed: there are no figures of dspass beside a peer" in pipeline.table(rows[1:])


def test_a_command_for_pipelines_that_cannot_be_is_refused() -> None:
    parser = argparse.ArgumentParser()
    pipeline.add_arguments(parser)

    def refused(*words: str) -> str | None:
        options = parser.parse_args([*words])
        return pipeline._refused(options, options.models.split(","), [n for n in options.only.split(",") if n])

    assert refused() is None
    assert refused("--ranks", "4", "--size", "tiny", "--micro-batches", "2") is None
    assert "no model 'gtp'" in (refused("--models", "gtp") or "")
    assert "no row 'torch'" in (refused("--only", "torch") or "")
    assert "does not divide the batch of gpt, 8" in (refused("--micro-batches", "3") or "")
    assert "gpt takes 128 at most" in (refused("--context", "129") or "")
    assert "use 2 to as many" in (refused("--ranks", "13") or "")


def test_peers_that_are_slower_alone_are_out_and_give_back_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []
    asked: dict[str, int] = {}
    seconds = {"dspass": 9.0, "torch-1f1b": 2.0, "torch-zb": 3.0, "torch-1f1b-compile": 1.0}

    class Answers:
        def __init__(self, name: str, *_: Any, **__: Any) -> None:
            self.name = name

        def ask(self, request: str, *_: Any, **__: Any) -> list[Any]:
            asked[self.name] = asked.get(self.name, 0) + (request == "step")
            if (self.name, asked[self.name]) == ("torch-1f1b", 8):
                raise SubjectFailed("torch-1f1b: a rank died in 'step'\nno memory")
            if request != "step":
                return [5, 7]
            return [{"seconds": seconds[self.name], "loss": loss, "waited": 0.5} for loss in (None, 3.0)]

        def close(self) -> None:
            closed.append(self.name)

    monkeypatch.setattr(pipeline, "Group", Answers)
    options = argparse.Namespace(
        ranks=2, size="tiny", batch=None, context=None, micro_batches=2, schedule="auto", rounds=2, finalists=2
    )
    ours, broken, out, best = pipeline.measure(list(seconds), "gpt", options)
    assert (ours.step, best.step, out.step) == (9.0, 1.0, 3.0)
    assert [row.is_out for row in (ours, broken, out, best)] == [False, False, True, False]
    assert broken.error == "torch-1f1b: a rank died in 'step' no memory"
    assert (len(broken.seconds), len(best.seconds), len(best.losses), len(best.waits)) == (1, 2, 8, 2)
    assert asked["torch-zb"] == 6
    assert closed.index("torch-zb") < closed.index("torch-1f1b")
    assert best.peaks == [5, 7]


def test_pipelines_are_measured_on_two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "RANK", "tests.plain_pipeline_rank")
    options = argparse.Namespace(
        ranks=2, size="tiny", batch=2, context=8, micro_batches=2, schedule="1f1b", rounds=1, finalists=1
    )
    ours, eager = rows = pipeline.measure(["dspass", "torch-1f1b"], "llama", options)
    assert [row.error for row in rows] == [None, None]
    assert ours.losses == pytest.approx(eager.losses, rel=1e-5)
    assert all(peak > 10**5 for row in rows for peak in row.peaks)
    assert all(sum(waits) > 0 for row in rows for waits in row.waits)
    whole = sum(p.numel() for p in pipeline_models.build(pipeline_models.SHAPES["tiny"]["llama"]).parameters())
    assert sum(ours.parameters) == sum(eager.parameters) == whole
    (run,) = ours.runs
    assert [len(spans) for spans in run.spans] == [4, 4]
    assert 0 < run.bubble < 1
    text = pipeline.table(rows)
    assert "**dspass** ran 1f1b, 2 stages on 2 ranks, 2 micro-batches" in text
    assert "measured: 1f1b" in text


def test_cuts_are_held_against_all_others() -> None:
    shape = pipeline_models.SHAPES["tiny"]["gpt"]
    tokens = torch.zeros(1, shape.context, dtype=torch.long)
    gm = pipeline_predicted.capture(pipeline_models.build(shape), pipeline_models.inputs(shape, tokens, tokens))
    rows = pipeline_predicted.compare_cuts("gpt", "gpt", shape.layers, gm, CPU, (2, 3), 4)
    assert [row.tried for row in rows] == [10, 45]
    assert all(row.ours <= pipeline_predicted.GOAL * row.best and row.best <= row.equal for row in rows)
    assert "- met: the automatic cut is within 3 %" in pipeline_predicted.cut_table(rows)
    costs = costs_of(gm, CPU)
    names = ["blocks.1", "blocks.1.norm2", "head"]
    intervals = pipeline_predicted._Intervals(gm, costs, CPU, 4, names)
    told = stage_costs(cut(gm, 4, costs, CPU, micro_batches=4, boundaries=names), CPU, 1.0, 1)
    assert (intervals.of([0, 1, 2])) == told, "stages put together of intervals are those of a cut at all of them"


def test_schedules_for_another_device_are_predicted() -> None:
    shape = pipeline_models.SHAPES["tiny"]["llama"]
    tokens = torch.zeros(1, shape.context, dtype=torch.long)
    gm = pipeline_predicted.capture(pipeline_models.build(shape), pipeline_models.inputs(shape, tokens, tokens))
    (found,) = pipeline_predicted.predict(gm, CPU, [2], 2, 1)
    text = pipeline_predicted.prediction_table([found], CPU)
    assert found.micro_batches == 4
    assert text.count("| 2 | 4 | 1f1b | 1 |") == 1
    assert "the fastest" in text
