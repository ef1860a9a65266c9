"""Schedules of pipelines: that each is complete and can be run, what it takes, which is chosen, and how it is drawn."""

from __future__ import annotations

import io
import itertools
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from rich.console import Console

from dspass.planner.schedule_times import Link, StageCost, peak_bytes, simulate
from dspass.planner.schedules import NAMES, choose, make
from dspass.runtime import compat
from dspass.runtime.schedule import (
    Action,
    Direction,
    Kind,
    Receive,
    Schedule,
    ScheduleError,
    Send,
    Span,
    Step,
    Timeline,
)
from dspass.timeline import show_timelines, timeline_html, timeline_svg, timeline_text

RANKS = (1, 2, 3, 4)
COUNTS = (1, 2, 3, 4, 6, 8, 9, 12)


def exists(name: str, ranks: int, count: int, virtual: int | None = None) -> Schedule | None:
    try:
        return make(name, ranks, count, virtual)
    except ScheduleError:
        return None


def virtuals(name: str) -> tuple[int, ...]:
    return (1, 2, 3) if name in ("interleaved1f1b", "loopedbfs", "interleavedzerobubble") else (exists_with(name),)


def exists_with(name: str) -> int:
    return make(name, 2, 4).virtual_stages


def schedules(name: str, ranks: int) -> Iterator[Schedule]:
    for count, virtual in itertools.product(COUNTS, virtuals(name)):
        if (schedule := exists(name, ranks, count, virtual)) is not None:
            yield schedule


def even(schedule: Schedule, forward: float = 1.0, backward: float = 2.0) -> list[StageCost]:
    """Equal stages, with so many seconds for all of a rank's."""
    parts = schedule.virtual_stages
    return [StageCost(forward / parts, backward / parts, backward / 2 / parts, backward / 2 / parts)] * schedule.stages


# Orders


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", NAMES)
def test_a_schedule_has_everything_once(name: str, ranks: int) -> None:
    seen = list(schedules(name, ranks))
    assert {s.micro_batches for s in seen} >= {8, 12}
    for schedule in seen:
        counts = Counter(action for row in schedule.actions for action in row)
        for stage, batch in itertools.product(range(schedule.stages), range(schedule.micro_batches)):
            forward, backward, of_input, of_weight = (counts.pop(Action(kind, stage, batch), 0) for kind in Kind)
            assert forward == 1
            assert (backward, of_input, of_weight) in ((1, 0, 0), (0, 1, 1))
        assert not counts
        for rank, row in enumerate(schedule.actions):
            assert {action.stage for action in row} == set(schedule.stages_of(rank))
        assert schedule.splits == ("zero" in name or name in ("zbh1", "dualpipev")) or ranks == 1


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", NAMES)
def test_no_rank_waits_in_a_circle_though_both_ends_of_a_transfer_block(name: str, ranks: int) -> None:
    for schedule in schedules(name, ranks):
        run_blocking(schedule)


def run_blocking(schedule: Schedule) -> None:
    """A send and its receive are done together, when both ranks are at them; compute finds what it needs on its own rank."""
    steps = [schedule.steps(rank) for rank in range(schedule.ranks)]
    for rank, row in enumerate(steps):
        assert tuple(step for step in row if isinstance(step, Action)) == schedule.actions[rank]
    at = [0] * schedule.ranks
    has: list[set[Action]] = [set() for _ in range(schedule.ranks)]
    transfers = 0

    def current(rank: int) -> Step | None:
        return steps[rank][at[rank]] if at[rank] < len(steps[rank]) else None

    moved = True
    while moved:
        moved = False
        for rank in range(schedule.ranks):
            step = current(rank)
            if isinstance(step, Action):
                assert has[rank].issuperset(schedule.needs(step)), f"rank {rank} lacks what {step} needs"
                has[rank].add(step)
            elif isinstance(step, Send):
                if current(step.peer) != Receive(step.direction, step.source, step.destination, step.micro_batch, rank):
                    continue
                assert schedule.rank_of[step.destination] == step.peer != rank
                kinds = (Kind.FORWARD,) if step.direction is Direction.FORWARD else (Kind.INPUT, Kind.BACKWARD)
                sent = {Action(kind, step.source, step.micro_batch) for kind in kinds} & has[rank]
                assert len(sent) == 1
                has[step.peer] |= sent
                at[step.peer] += 1
                transfers += 1
            else:
                continue
            at[rank] += 1
            moved = True
    assert [current(rank) for rank in range(schedule.ranks)] == [None] * schedule.ranks, "ranks wait in a circle"
    cuts = sum(a != b for a, b in itertools.pairwise(schedule.rank_of))
    assert transfers == 2 * cuts * schedule.micro_batches


@pytest.mark.parametrize("name", NAMES)
def test_what_torch_refuses_is_refused_with_what_is_near(name: str) -> None:
    torch_name = "InterleavedZeroBubble" if name == "zbh1" else name
    for ranks, count, virtual in itertools.product((1, 2, 3, 4), range(1, 14), virtuals(name)):
        try:
            compat.pipeline_order(torch_name, ranks, virtual, count)
            allowed = True
        except ValueError:
            allowed = False
        if not allowed:
            with pytest.raises(ScheduleError, match="Nearest that work: ") as caught:
                make(name, ranks, count, virtual)
            offers = re.findall(r"(micro_batches|stages|virtual_stages) (\d+)", str(caught.value).split("Nearest")[1])
            assert offers
            for setting, value in offers:
                key = {"micro_batches": "micro_batches", "stages": "ranks", "virtual_stages": "virtual_stages"}[setting]
                given_ = {"ranks": ranks, "micro_batches": count, "virtual_stages": virtual}
                make(name, **{**given_, key: int(value)})
        else:
            assert exists(name, ranks, count, virtual) is not None


def test_errors_say_what_is_at_fault_and_what_is_near() -> None:
    def message(*args: object) -> str:
        with pytest.raises(ScheduleError) as caught:
            make(*args)  # type: ignore[arg-type]
        assert str(caught.value).startswith(caught.value.setting + ": ")
        return str(caught.value)

    assert message("1f1b", 4, 3) == (
        "micro_batches: 3 is not possible: 1f1b needs at least 4 micro-batches for 4 ranks. Nearest that work: "
        "micro_batches 4, stages 3, schedule gpipe or interleaved1f1b or loopedbfs."
    )
    assert "runs 13 micro-batches on 4 ranks in 3 rounds" in message("interleaved", 4, 13)
    assert "micro_batches 12, micro_batches 15" in message("interleaved", 4, 13)
    assert "micro_batches 8, stages 3" in message("DualPipeV", 4, 7)
    assert message("zbv", 4, 8, 3).endswith(
        "zbvzerobubble has 2 stages on each rank. Nearest that work: virtual_stages 2."
    )
    assert message("zbh1", 4, 13, 2).endswith(
        "Nearest that work: virtual_stages 1 with micro_batches 12, virtual_stages 1 with micro_batches 15, "
        "virtual_stages 1 with stages 1, virtual_stages 1 with stages 7, schedule loopedbfs or zbvzerobubble or dualpipev."
    )
    assert message("1f2b", 4, 8) == "schedule: '1f2b' is none that is known. Did you mean '1f1b'?"
    assert "Known: 1f1b, gpipe" in message("xyz", 4, 8)
    assert message("gpipe", 0, 8) == "stages: a pipeline has at least one, not 0. Set 1 or more."
    assert message("gpipe", 2, 0).startswith("micro_batches: ")
    assert message("interleaved", 2, 2, 0).startswith("virtual_stages: ")


def test_names_are_taken_as_people_write_them() -> None:
    for written, name in {
        "1F1B": "1f1b",
        "GPipe": "gpipe",
        "Interleaved-1F1B": "interleaved1f1b",
        "looped_bfs": "loopedbfs",
        "ZB-H1": "zbh1",
        "InterleavedZeroBubble": "interleavedzerobubble",
        "ZBV": "zbvzerobubble",
        "DualPipeV": "dualpipev",
    }.items():
        assert make(written, 2, 4).name == name
    assert [make(name, 2, 4).virtual_stages for name in ("gpipe", "1f1b", "zbh1", "interleaved", "zbv")] == [
        1,
        1,
        1,
        2,
        2,
    ]


def test_stages_lie_in_a_loop_or_a_v() -> None:
    assert make("interleaved", 3, 3).rank_of == (0, 1, 2, 0, 1, 2)
    assert make("zbv", 3, 6).rank_of == (0, 1, 2, 2, 1, 0)
    turn = [s for s in make("zbv", 3, 6).steps(2) if isinstance(s, Send | Receive)]
    assert all({s.source, s.destination} != {2, 3} for s in turn)  # on one rank: nothing is sent


def test_the_last_rank_of_1f1b_begins_with_the_first_micro_batch() -> None:
    """torch 2.13 lists its forwards from 1 on."""
    assert [str(a) for a in make("1f1b", 2, 3).actions[1]] == [
        f"{kind}{batch} of stage 1" for batch in range(3) for kind in "FB"
    ]


def test_an_order_that_cannot_run_is_refused() -> None:
    good = make("1f1b", 2, 2)
    first, *rest = good.actions[0]
    swapped = replace(good, actions=((rest[-1], *rest[:-1], first), good.actions[1]))
    costs = even(good)
    with pytest.raises(ScheduleError, match=r"rank 0 of 1f1b waits for F1 of stage 0 in front of B1 of stage 0"):
        simulate(swapped, costs)
    with pytest.raises(ValueError, match="can't schedule"):
        swapped.steps(0)
    with pytest.raises(ValueError, match="2 stages and 1 cuts, and was given costs of 1 stages and 1 cuts"):
        simulate(good, costs[:1])


# Time and memory


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.parametrize("ranks", RANKS)
def test_the_bubble_of_equal_stages_is_the_known_one(name: str, ranks: int) -> None:
    for schedule in schedules(name, ranks):
        count = schedule.micro_batches
        timeline = simulate(schedule, even(schedule, 1.0, 1.7))
        assert timeline.bubble == pytest.approx((ranks - 1) / (count + ranks - 1))
        assert timeline.seconds == pytest.approx(2.7 * (count + ranks - 1))


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_other_schedules_have_smaller_bubbles(ranks: int) -> None:
    count = 4 * ranks
    bubbles = {n: simulate(s := make(n, ranks, count), even(s)).bubble for n in NAMES}
    assert bubbles["gpipe"] == pytest.approx(bubbles["1f1b"])
    for name in ("interleaved1f1b", "loopedbfs", "zbh1", "interleavedzerobubble", "zbvzerobubble", "dualpipev"):
        assert bubbles[name] < bubbles["1f1b"]
    assert bubbles["zbvzerobubble"] < bubbles["zbh1"] < bubbles["1f1b"]


@pytest.mark.parametrize("ranks", RANKS)
def test_1f1b_holds_no_more_than_what_is_on_its_way(ranks: int) -> None:
    for schedule in schedules("1f1b", ranks):
        timeline = simulate(schedule, [replace(cost, saved_bytes=10) for cost in even(schedule)])
        assert timeline.in_flight == tuple(range(ranks, 0, -1))
        assert timeline.peak_bytes == tuple(10 * n for n in timeline.in_flight)
    for schedule in schedules("gpipe", ranks):
        assert [schedule.in_flight(rank) for rank in range(ranks)] == [schedule.micro_batches] * ranks


def test_peaks_by_hand() -> None:
    schedule = make("1f1b", 2, 2)
    cost = StageCost(1, 2, saved_bytes=100, working_bytes=3, static_bytes=1000)
    # Rank 0, its second forward: two micro-batches, what it sends, what it works in.
    # Rank 1, its first backward: one micro-batch, the next one's input, the gradient that it sends, what it works in.
    assert peak_bytes(schedule, [cost] * 2, [Link(0, 0, 10, 7)]) == (1000 + 200 + 10 + 3, 1000 + 100 + 10 + 7 + 3)
    # Both stages of a V on one rank, at the last stage's backward: what both save, and the gradient for the other.
    bent = make("zbv", 1, 1)
    assert peak_bytes(bent, [StageCost(1, 2, saved_bytes=100, held_bytes=40)] * 2, [Link(0, 0, 10, 7)]) == (207,)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_held_is_counted_until_the_last_part_of_a_backward(name: str) -> None:
    """All that is taken is given back: were it not, peaks would grow with each micro-batch of a long run."""
    schedule, longer = make(name, 3, 12), make(name, 3, 120)
    cost, link = StageCost(1, 2, 1, 1, saved_bytes=100, held_bytes=100, static_bytes=1000), Link(0, 0, 10, 7)
    alone = peak_bytes(schedule, [cost] * schedule.stages)
    held = tuple(1000 * schedule.virtual_stages + 100 * schedule.in_flight(rank) for rank in range(3))
    assert alone == held
    less = peak_bytes(schedule, [replace(cost, held_bytes=30)] * schedule.stages)
    assert all(a <= b for a, b in zip(less, held, strict=True))
    if name in ("zbh1", "interleavedzerobubble"):  # of others, a weight's half follows at once
        assert less[-1] < held[-1]
    if name not in ("gpipe", "loopedbfs"):
        cuts = [link] * (schedule.stages - 1)
        peaks, others = (peak_bytes(s, [cost] * s.stages, cuts) for s in (schedule, longer))
        assert max(others) <= max(peaks) + 17 * 4


SECONDS = st.floats(0.01, 10)


@st.composite
def pipelines(draw: st.DrawFn) -> tuple[Schedule, list[StageCost], list[Link]]:
    name = draw(st.sampled_from(NAMES))
    schedule = exists(name, draw(st.integers(1, 4)), draw(st.integers(1, 12)), draw(st.sampled_from(virtuals(name))))
    assume(schedule is not None)
    assert schedule is not None
    stages = schedule.stages
    cost = st.builds(StageCost, SECONDS, SECONDS, SECONDS, SECONDS)
    link = st.builds(Link, st.floats(0, 5), st.floats(0, 5))
    costs = draw(st.lists(cost, min_size=stages, max_size=stages))
    return schedule, costs, draw(st.lists(link, min_size=stages - 1, max_size=stages - 1))


@settings(deadline=None, max_examples=150)
@given(pipelines(), st.booleans())
def test_every_action_waits_for_what_it_needs_and_for_nothing_else(
    drawn: tuple[Schedule, list[StageCost], list[Link]], overlaps: bool
) -> None:
    schedule, costs, links = drawn
    timeline = simulate(schedule, costs, links, overlaps=overlaps)
    assert tuple(tuple(s.action for s in row) for row in timeline.spans) == schedule.actions
    spans = {span.action: span for row in timeline.spans for span in row}
    for row in timeline.spans:
        assert all(a.end <= b.start + 1e-9 for a, b in itertools.pairwise(row))
    for action, span in spans.items():
        assert span.end - span.start == pytest.approx(costs[action.stage].seconds(action.kind))
        for need in schedule.needs(action):
            assert spans[need].end + lasts(schedule, links, need, action) <= span.start + 1e-9
    work = [sum(s.end - s.start for s in row) for row in timeline.spans]
    assert timeline.seconds >= max(work) - 1e-9
    assert timeline.bubble == pytest.approx(max(0, 1 - sum(work) / (schedule.ranks * timeline.seconds)), abs=1e-9)
    assert timeline.seconds >= longest_path(schedule, costs, links) - 1e-9
    if overlaps:
        assert simulate(schedule, costs, links, overlaps=False).seconds >= timeline.seconds - 1e-9
    if not any(link.forward or link.backward for link in links):
        assert timeline.seconds == pytest.approx(longest_path(schedule, costs, links))


def lasts(schedule: Schedule, links: Sequence[Link], need: Action, action: Action) -> float:
    if schedule.rank_of[need.stage] == schedule.rank_of[action.stage]:
        return 0.0
    link = links[min(need.stage, action.stage)]
    return link.forward if need.stage < action.stage else link.backward


def longest_path(schedule: Schedule, costs: Sequence[StageCost], links: Sequence[Link]) -> float:
    """Over what is needed and the order on each rank, messages not waiting for one another."""
    before = {b: a for row in schedule.actions for a, b in itertools.pairwise(row)}
    end: dict[Action, float] = {}
    left = [action for row in schedule.actions for action in row]
    while left:
        for action in list(left):
            needs = [*schedule.needs(action), *([before[action]] if action in before else [])]
            if all(need in end for need in needs):
                starts = [end[need] + lasts(schedule, links, need, action) for need in needs]
                end[action] = max(starts, default=0.0) + costs[action.stage].seconds(action.kind)
                left.remove(action)
    return max(end.values())


def test_messages_on_one_way_go_one_after_another() -> None:
    schedule = make("gpipe", 2, 3)
    spans = simulate(schedule, [StageCost(1, 1)] * 2, [Link(5, 0)]).spans[1]
    assert [span.start for span in spans[:3]] == [6, 11, 16]


def test_a_send_that_does_not_overlap_keeps_both_ranks_busy() -> None:
    schedule = make("gpipe", 2, 2)
    timeline = simulate(schedule, [StageCost(1, 1)] * 2, [Link(2, 3)], overlaps=False)
    starts = [[span.start for span in row] for row in timeline.spans]
    assert starts[0] == [0, 3, 11, 15]  # sends, 1 to 3 and 4 to 6; receives, 8 to 11 and 12 to 15
    assert starts[1] == [3, 6, 7, 11]  # receives, 1 to 3 and 4 to 6; sends, 8 to 11 and 12 to 15


# The choice


def model(rank_of: tuple[int, ...], micro_batches: int) -> tuple[list[StageCost], list[Link]]:
    """Uneven stages of a model of 12 blocks: a small micro-batch is less efficient, and a split backward costs more."""
    stages = len(rank_of)
    if stages > 12:
        raise ValueError(f"12 blocks cannot be {stages} stages")
    one = (1 / micro_batches + 0.02) / stages
    costs = [
        StageCost(
            u,
            2 * u,
            1.05 * u,
            1.05 * u,
            960 // micro_batches // stages,
            480 // micro_batches // stages,
            5,
            1200 // stages,
        )
        for u in (one * (1 + 0.3 * (stage == stages - 1)) for stage in range(stages))
    ]
    return costs, [Link(0.01 / micro_batches, 0.01 / micro_batches, 24 // micro_batches, 24 // micro_batches)] * (
        stages - 1
    )


@pytest.mark.parametrize("budget", [None, 1300, 900, 700])
@pytest.mark.parametrize("count", [None, 8])
def test_the_choice_is_the_best_of_all(count: int | None, budget: int | None) -> None:
    ranks, batch = 4, 24
    best: list[tuple[float, int, str, int, int]] = []
    everything = 0
    counts = [count] if count else [m for m in range(1, 25) if batch % m == 0]
    for name, micro, virtual in itertools.product(NAMES, counts, (1, 2, 3)):
        schedule = exists(name, ranks, micro, virtual)
        if virtual == 1 and name in ("interleaved1f1b", "loopedbfs", "interleavedzerobubble"):
            continue  # 1f1b, gpipe and zbh1 are those
        if schedule is None:
            continue
        everything += 1
        timeline = simulate(schedule, *model(schedule.rank_of, micro))
        if budget is None or max(timeline.peak_bytes) <= budget:
            best.append((timeline.seconds, max(timeline.peak_bytes), name, virtual, micro))
    if not best:
        with pytest.raises(ScheduleError, match="no schedule fits"):
            choose(ranks, model, batch=batch, micro_batches=count, budget_bytes=budget)
        return
    choice = choose(ranks, model, batch=batch, micro_batches=count, budget_bytes=budget)
    seconds, peak, *_ = min(best)
    assert choice.timeline.seconds == pytest.approx(seconds)
    assert max(choice.timeline.peak_bytes) == peak
    assert choice.schedule is choice.timeline.schedule
    simulated = [c for c in choice.candidates if c.timeline is not None]
    assert len(simulated) == everything
    assert simulated[0].timeline is choice.timeline
    over = [c for c in simulated if "over the budget" in c.why]
    assert len(simulated) - len(over) == len(best)
    assert all(c.why for c in choice.candidates)


def test_the_table_says_why_each_lost() -> None:
    choice = choose(4, model, batch=8, micro_batches=8, names=["1f1b", "gpipe", "interleaved", "zbv", "dualpipev"])
    lines = choice.table().splitlines()
    assert lines[0].split() == ["schedule", "stages", "a", "rank", "micro-batches", "time", "bubble", "peak"]
    assert lines[1].endswith("the fastest")
    assert all(re.search(r"% slower|as fast|cannot be|needs at least", line) for line in lines[2:])
    assert any("12 blocks cannot be 16 stages" in line for line in lines)
    smallest = min(max(c.timeline.peak_bytes) for c in choice.candidates if c.timeline)
    tight = choose(4, model, batch=8, micro_batches=8, budget_bytes=smallest, names=["1f1b", "gpipe", "zbv"])
    assert "over the budget on rank" in tight.table()
    assert "the only one that fits" in tight.table()


def test_costs_are_asked_once_and_simpler_ones_are_preferred() -> None:
    asked: list[tuple[tuple[int, ...], int]] = []

    def costs(rank_of: tuple[int, ...], count: int) -> tuple[list[StageCost], list[Link]]:
        asked.append((rank_of, count))
        return model(rank_of, count)

    choice = choose(1, costs, batch=4, micro_batches=4, names=["gpipe", "1f1b"])
    assert choice.schedule.name == "1f1b"  # as fast, and smaller
    assert asked == [((0,), 4)]
    asked.clear()
    choose(
        2, costs, batch=4, micro_batches=4, names=["1f1b", "gpipe", "interleaved", "zbv", "dualpipev"], virtual_stages=2
    )
    assert asked == [((0, 1, 0, 1), 4), ((0, 1, 1, 0), 4)], "what turns is placed in another way than what goes round"
    choice = choose(1, lambda *_: ([StageCost(1, 2)], []), batch=1, names=["1f1b", "gpipe"])
    assert [c.why for c in choice.candidates] == ["the fastest", "as fast and as small, less simple"]


def test_an_impossible_budget_names_the_smallest() -> None:
    with pytest.raises(ScheduleError) as caught:
        choose(4, model, batch=8, budget_bytes=10)
    found = re.search(r"\((\d+) bytes\)", str(caught.value))
    assert found is not None
    assert caught.value.setting == "memory"
    assert choose(4, model, batch=8, budget_bytes=int(found[1])).schedule is not None
    with pytest.raises(ScheduleError):
        choose(4, model, batch=8, budget_bytes=int(found[1]) - 1)
    with pytest.raises(ScheduleError, match=r"none can be made for 4 ranks: 1f1b needs at least 4 micro-batches"):
        choose(4, model, batch=2, names=["1f1b"])


# Pictures


def two() -> dict[str, Timeline]:
    schedule = make("1f1b", 2, 3)
    cost = StageCost(0.010, 0.020, saved_bytes=1000, static_bytes=2000)
    predicted = simulate(schedule, [cost] * 2)
    slower = tuple(tuple(Span(s.action, 5 + 1.25 * s.start, 5 + 1.25 * s.end) for s in row) for row in predicted.spans)
    return {"predicted": predicted, "measured": Timeline(schedule, slower)}


TEXT = """\
predicted: 1f1b, 2 stages on 2 ranks, 3 micro-batches: 120 ms, bubble 25.0 %
rank 0 |F0--F1--........B0------F2--B1------....B2------............|  bubble 25.0 %, peak 4.00 KB
rank 1 |....F0--B0------F1--B1------F2--B2------....................|  bubble 25.0 %, peak 3.00 KB

measured: 1f1b, 2 stages on 2 ranks, 3 micro-batches: 150 ms, bubble 25.0 %
rank 0 |F0---F1---..........B0--------F2---B1--------.....B2--------|  bubble 25.0 %
rank 1 |.....F0---B0--------F1---B1--------F2---B2--------..........|  bubble 25.0 %
F forward, B backward, . idle"""


def test_the_picture_in_text() -> None:
    assert timeline_text(two(), 60).plain == TEXT


@pytest.mark.parametrize("width", [120, 30])
def test_the_picture_fills_a_terminal(width: int) -> None:
    plain, colourful = (
        Console(
            file=io.StringIO(),
            width=width,
            force_terminal=is_terminal,
            color_system="truecolor" if is_terminal else None,
        )
        for is_terminal in (False, True)
    )
    for console in (plain, colourful):
        show_timelines(two(), console)
    assert isinstance(plain.file, io.StringIO)
    assert isinstance(colourful.file, io.StringIO)
    rows = [line for line in plain.file.getvalue().splitlines() if line.startswith("rank")]
    assert len(rows) == 4
    assert max(map(len, rows)) == (width if width > 100 else len(rows[0]))
    assert "\x1b[" not in plain.file.getvalue()
    assert re.sub(r"\x1b\[[\d;]*m", "", colourful.file.getvalue()) == plain.file.getvalue()
    assert "\x1b[34mF0" in colourful.file.getvalue()


def test_small_letters_are_later_stages() -> None:
    schedule = make("zbv", 2, 2)
    text = timeline_text({"here": simulate(schedule, even(schedule))}, 80).plain
    rank_0 = next(line for line in text.splitlines() if line.startswith("rank 0"))
    assert set("FfIiWw") <= set(rank_0)
    assert "small letters for later stages of a rank" in text
    assert "small letters" not in timeline_text(two()).plain


def test_the_picture_of_a_page_stands_alone() -> None:
    schedule = make("zbv", 2, 4)
    timelines = {"a < b & c": simulate(schedule, even(schedule)), **two()}
    svg = ElementTree.fromstring(timeline_svg(timelines))
    space = "{http://www.w3.org/2000/svg}"
    titles = [title.text or "" for title in svg.iter(f"{space}title")]
    assert len(titles) == sum(len(row) for timeline in timelines.values() for row in timeline.spans)
    assert titles[0] == "forward of micro-batch 0, stage 0: at 0.00 µs, 500 ms"
    boxes = [rect for rect in svg.iter(f"{space}rect") if len(rect)]
    assert all(float(box.get("x", "")) >= 0 and float(box.get("width", "")) > 0 for box in boxes)
    _, _, width, height = map(float, svg.get("viewBox", "").split())
    assert all(float(r.get("x", "")) + float(r.get("width", "")) <= width for r in svg.iter(f"{space}rect"))
    assert all(float(r.get("y", "")) + float(r.get("height", "")) <= height for r in svg.iter(f"{space}rect"))
    names = [text.text for text in svg.iter(f"{space}text") if text.get("class") == "name"]
    assert [name.split(":")[0] for name in names if name] == list(timelines)
    page = timeline_html(timelines, "Stages <0 to 3>")
    assert page.count("Stages &lt;0 to 3&gt;") == 2
    assert page.count("<script") == 0
    ElementTree.fromstring(page)


def test_there_is_no_picture_of_nothing() -> None:
    schedule = make("gpipe", 1, 1)
    for timelines in ({}, {"none": Timeline(schedule, ((),))}):
        with pytest.raises(ValueError, match="no timeline that lasts any time"):
            timeline_text(timelines)
