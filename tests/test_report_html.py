"""The page of a report: escaping, what it embeds, and that a real browser draws it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from dspass.report import (
    CATEGORIES,
    ExpertLayer,
    GraphRecord,
    Memory,
    MemoryPoint,
    PassRecord,
    PipelineRecord,
    PipelineSpan,
    PipelineTimeline,
    PlanPoint,
    PlanRecord,
    Report,
    Traffic,
)
from dspass.report.html import MAX_POINTS, downsample, embed_json, paired

HOSTILE = "</script><script>document.documentElement.dataset.hacked='yes'</script><!--<img src=x onerror=alert(1)>&\"'"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def a_graph(layers: int, gathered: bool) -> str:
    lines = [f"%p{i} : f32[8,4] = input" for i in range(layers)]
    for i in range(layers):
        if gathered and i % 10 == 0:
            lines.append(f"%full{i} : f32[16,4] = dspass.gather(%p{i})")
        lines.append(f"%mm{i} : f32[4,16] = aten.mm(%x, %{'full' if gathered and i % 10 == 0 else 'p'}{i})")
    return "\n".join([*lines, f"return [%mm0]  # {HOSTILE}"])


def a_point(i: int, **changes: Any) -> MemoryPoint:
    phase = "forward" if i < 1000 else "backward" if i < 2500 else "optimizer"
    sizes = {"parameters": 1 << 24, "saved": (3000 - abs(i - 1500)) << 12, "temporary": i * 7919 % 1000 << 12}
    return dataclasses.replace(MemoryPoint(t=i, label=f"%op{i} {HOSTILE}", phase=phase, bytes=sizes), **changes)


def a_report() -> Report:
    before, after = a_graph(300, False), a_graph(300, True)
    record = PassRecord(
        name="zero_gather",
        stage="forward",
        summary=HOSTILE,
        changed=True,
        seconds=0.01,
        ops_before=300,
        ops_after=330,
        keeps_numbers=False,
        graph=HOSTILE,
        before=before,
        after=after,
    )
    idle = dataclasses.replace(record, name=HOSTILE, before=after, changed=False, stage="backward")
    bare = dataclasses.replace(record, name="no text", before="", after="")
    timeline = [a_point(i) for i in range(3000)]
    timeline[1777] = a_point(1777, bytes={"staging": 10**9})
    return Report(
        kind="measured",
        model=f"GPT {HOSTILE}",
        device=HOSTILE,
        world_size=2,
        passes=[idle, record, bare],
        graphs=[GraphRecord(name=HOSTILE, before=before, after=after)],
        memory=Memory(timeline=timeline),
        traffic=[
            Traffic(kind="all-gather", direction="forward", group=HOSTILE, group_size=2, calls=3, bytes=1 << 20),
            Traffic(
                kind="all-reduce", direction="step", group="g", group_size=2, calls=1, bytes=1, exposed_seconds=0.1
            ),
        ],
        config={HOSTILE: {"k" * 300: ["v" * 300, HOSTILE]}},
        ignored={HOSTILE: HOSTILE},
        pipeline=PipelineRecord(
            schedule=HOSTILE,
            rank_of=[0],
            rank=0,
            why=[HOSTILE],
            candidates=[HOSTILE],
            predicted=PipelineTimeline(
                micro_batches=1, spans=[[PipelineSpan(kind="forward", stage=0, micro_batch=0, start=0.0, end=1.0)]]
            ),
        ),
        experts=[ExpertLayer(name=HOSTILE, ranks=2, rows=[3, 0, 1, 4], dropped=1)],
        notes=[HOSTILE],
        versions={"torch": HOSTILE},
    )


EMPTY = Report(kind="predicted", model="m", device="h100", world_size=64)


class Reader(HTMLParser):
    """Tags, attributes, and the text of each element of one kind."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def embedded(page: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found is not None
    return json.loads(found[1])


@pytest.mark.parametrize("report", [a_report(), EMPTY], ids=["full", "empty"])
def test_the_page_fetches_nothing_and_runs_only_its_own_script(report: Report) -> None:
    page = report.to_html()
    tags = Reader(page).found
    assert [tag for tag, _ in tags].count("script") == 3
    assert "img" not in [tag for tag, _ in tags]
    links = [v for _, attributes in tags for k, v in attributes.items() if k in ("src", "href", "srcset", "action")]
    assert links == ["data:,"]
    assert not [k for _, attributes in tags for k in attributes if k.startswith("on")]
    assert not re.search(r"https?://|@import|url\(", page)
    assert re.search(r"\{\{\w+\}\}", page) is None


def test_every_string_is_escaped() -> None:
    page = a_report().to_html()
    assert HOSTILE not in page
    assert "<img src=x" not in page
    assert HOSTILE in embedded(page)["entries"][0]["title"]
    shown = a_report()._repr_html_()
    assert "<script" not in shown
    assert "<img" not in shown


def test_each_expert_has_a_bar_as_high_as_its_share() -> None:
    layer = ExpertLayer(name="e", ranks=2, rows=[3, 0, 1, 4], dropped=1)
    found = Reader(dataclasses.replace(EMPTY, experts=[layer]).to_html()).found
    bars = [attributes for tag, attributes in found if tag == "rect"]
    heights = [float(bar["height"] or 0) for bar in bars]
    assert [height / heights[3] for height in heights] == pytest.approx([0.75, 0, 0.25, 1], abs=1e-2)
    steps = [float(b["x"] or 0) - float(a["x"] or 0) for a, b in itertools.pairwise(bars)]
    assert steps[1] > steps[0] == pytest.approx(steps[2])
    assert "rect" not in [tag for tag, _ in Reader(EMPTY.to_html()).found]


def test_what_is_filled_in_is_not_searched_again() -> None:
    page = dataclasses.replace(EMPTY, model="{{data}}{{script}}", notes=["{{style}}"]).to_html()
    assert "<h1>{{data}}{{script}}</h1>" in page
    assert "<li>{{style}}</li>" in page


def test_embedded_json_cannot_end_its_element() -> None:
    value = {"a": "</script><!--<script>&\u2028\ud800"}
    text = embed_json(value)
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == value


def test_what_is_not_known_is_said() -> None:
    page = EMPTY.to_html()
    assert page.count('<dd class="absent">not predicted</dd>') == 3
    assert "No collective runs in a step." in page
    assert "not predicted" in EMPTY._repr_html_()
    assert '<td class="number">-</td>' in a_report().to_html()


def test_the_summary_for_notebooks_stands_alone() -> None:
    shown = a_report()._repr_html_()
    assert len(shown) < 20_000
    assert {tag for tag, _ in Reader(shown).found}.isdisjoint({"html", "head", "body", "style", "script", "link"})
    assert all(category in shown for category in CATEGORIES)


def test_downsampling_keeps_the_peak() -> None:
    timeline = [a_point(i) for i in range(20_000 % 2999 + 2999 * 6)]
    timeline[12_345] = a_point(12_345, bytes={"gathered": 1 << 40})
    kept = downsample(timeline)
    assert len(kept) <= MAX_POINTS
    assert timeline[12_345] in kept
    assert kept[0] == timeline[0]
    assert kept[-1] == timeline[-1]
    assert [p.t for p in kept] == sorted(p.t for p in kept)
    assert downsample(timeline[:100]) == timeline[:100]
    data = embedded(dataclasses.replace(EMPTY, memory=Memory(timeline=timeline)).to_html())
    assert data["pointCount"] == len(timeline)
    assert data["points"]["bytes"][CATEGORIES.index("gathered")][data["peak"]] == 1 << 40


def test_a_changed_line_stands_beside_the_same_node() -> None:
    before = ["%p = input", "%t = aten.t(%p)", "return [%t]"]
    after = ["%p = input", "%full = gather(%p)", "%t = aten.t(%full)", "return [%t]"]
    assert paired(before, after) == [(0, 0, 1, 0, 1), (2, 1, 1, 1, 2), (1, 1, 2, 2, 3), (0, 2, 3, 3, 4)]


def test_lines_are_embedded_once() -> None:
    report = dataclasses.replace(a_report(), memory=Memory())
    data = embedded(report.to_html())
    assert len(data["lines"]) == len(set(data["lines"]))
    assert len(data["texts"]) == 3
    graph = "\n".join(data["lines"][line] for line in data["texts"][0])
    assert graph == report.passes[0].before


# In a real browser

PROBE = """
<script>
(() => {
  const say = (key, value) => { document.documentElement.setAttribute("data-probe-" + key, value); };
  const svg = document.getElementById("svg");
  const press = (key) => svg?.dispatchEvent(new KeyboardEvent("keydown", { key, cancelable: true }));
  const fits = () => document.documentElement.scrollWidth <= innerWidth;
  say("width", innerWidth);
  say("fits", fits());
  say("passes", document.querySelectorAll("#pass-list [data-pass]").length);
  say("areas", document.querySelectorAll("#svg .area").length);
  say("points", svg?.dataset.points ?? "none");
  say("resources", performance.getEntriesByType("resource").length);
  const current = document.querySelector("#pass-list [aria-current]");
  say("current", current?.querySelector(".name").textContent ?? "none");
  const rows = () => document.querySelectorAll("table.diff tbody tr:not(.gap)").length;
  const marks = () => [...document.querySelectorAll("table.diff mark")].map((m) => m.textContent).join(" ");
  say("marks", marks().slice(0, 30));
  say("rows", rows());
  say("gaps", document.querySelectorAll(".gap").length);
  document.querySelector(".gap button")?.click();
  say("rows-opened", rows());
  const all = document.querySelector(".tools input");
  if (all) { all.click(); say("rows-all", rows()); }
  const [, next] = document.querySelectorAll(".tools button");
  next?.click();
  next?.click();
  say("position", document.querySelector(".position")?.textContent ?? "none");
  if (svg) {
    const box = svg.getBoundingClientRect();
    svg.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + box.width / 2, clientY: box.top + 50 }));
    const tooltip = document.getElementById("tooltip");
    say("hover", tooltip.hidden ? "hidden" : tooltip.querySelectorAll("dd").length);
    press("p");
    say("peak", tooltip.querySelector(".op").textContent.split(" ")[0]);
    say("peak-total", tooltip.querySelector("dd.total").textContent);
    press("End");
    say("end", tooltip.querySelector(".op").textContent.split(" ")[0]);
    say("tooltip-fits", tooltip.getBoundingClientRect().right <= innerWidth);
    document.querySelector("#legend button:last-child").click();
    say("areas-hidden", document.querySelectorAll("#svg .area").length);
  }
  for (const button of document.querySelectorAll("#pass-list button")) button.click();
  say("fits-after", fits());
  const seen = new Set();
  for (let i = 0; i < 3; i += 1) {
    seen.add(getComputedStyle(document.body).backgroundColor);
    document.getElementById("theme").click();
  }
  say("themes", seen.size);
})();
</script>
</body>"""


def browse(report: Report, folder: Path, width: int, probe: str = PROBE) -> dict[str, str | None]:
    """The attributes of the page's root after its script, and the probe, have run."""
    if BROWSER is None:
        pytest.skip("no chromium, chromium-browser or google-chrome is installed")
    page = report.to_html()
    assert page.count("</body>") == 1
    path = folder / "report.html"
    path.write_text(page.replace("</body>", probe), encoding="utf-8", errors="replace")
    quiet = (
        "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", "dump-dom",
    )  # fmt: skip
    command = [BROWSER, *(f"--{flag}" for flag in quiet), f"--user-data-dir={folder / 'profile'}"]
    done = subprocess.run(
        [*command, f"--window-size={width},1000", path.as_uri()], capture_output=True, timeout=60, check=True
    )
    dumped = done.stdout.decode("utf-8", errors="replace")
    return next(attributes for tag, attributes in Reader(dumped[: dumped.index("<body")]).found if tag == "html")


@pytest.mark.parametrize("width", [1400, 700])
def test_a_browser_draws_the_page(tmp_path: Path, width: int) -> None:
    root = browse(a_report(), tmp_path, width)
    assert root.get("data-error") is None
    assert root.get("data-hacked") is None
    assert root["data-ready"] == "yes"
    seen = {key.removeprefix("data-probe-"): value for key, value in root.items() if key.startswith("data-probe-")}
    assert seen["width"] == str(width)
    assert seen["fits"] == seen["fits-after"] == "true"
    assert seen["resources"] == "0"
    assert seen["passes"] == "3"
    assert seen["areas"] == "4"
    assert 1000 < int(seen["points"] or 0) <= MAX_POINTS
    assert seen["current"] == "zero_gather"
    assert (seen["marks"] or "").startswith("p full p full")
    # 30 changes of two rows each, three lines around: 30 gathers; the rest is behind buttons.
    rows, opened, everything = (int(seen[key] or 0) for key in ("rows", "rows-opened", "rows-all"))
    assert rows < opened < everything == 631
    assert int(seen["gaps"] or 0) >= 30
    assert seen["position"] == "change 2 of 30"
    assert seen["hover"] == "8"
    assert seen["peak"] == "%op1777"
    assert seen["peak-total"] == "1.00 GB"
    assert seen["end"] == "%op2999"
    assert seen["tooltip-fits"] == "true"
    assert seen["areas-hidden"] == "3"
    assert seen["themes"] == "2"


def a_planned_report(budget: int) -> Report:
    """Its step takes half of what it does without the plan, in two thirds of the events."""
    timeline = [a_point(i) for i in range(2000)]
    unplanned = [a_point(i, bytes={c: 2 * b for c, b in a_point(i).bytes.items()}) for i in range(3000)]
    point = PlanPoint(peak_bytes=budget, seconds=1.0, saved_bytes=0, is_measured=True)
    plan = PlanRecord(graph=HOSTILE, summary="", budget_bytes=budget, peak_bytes=budget, frontier=[point])
    return dataclasses.replace(a_report(), memory=Memory(timeline=timeline, unplanned=unplanned), plans=[plan])


TWO_CHARTS = """
<script>
(() => {
  const say = (key, value) => { document.documentElement.setAttribute("data-probe-" + key, value); };
  for (const id of ["svg", "svg-without"]) {
    const svg = document.getElementById(id);
    const of = (what) => [...svg.querySelectorAll(what)];
    const right = (area) => Math.max(...[...area.getAttribute("d").matchAll(/H([0-9.]+)/g)].map((m) => Number(m[1])));
    say(`${id}-areas`, of(".area").length);
    say(`${id}-budget`, of(".budget").map((line) => line.getAttribute("y1")).join(" "));
    say(`${id}-grid`, of(".grid").map((line) => line.getAttribute("y1")).join(" "));
    say(`${id}-peak`, of(".peak-dot")[0].getAttribute("cy"));
    say(`${id}-ends`, Math.round(right(of(".area")[0])));
    svg.dispatchEvent(new KeyboardEvent("keydown", { key: "p", cancelable: true }));
    say(`${id}-total`, svg.parentElement.querySelector("dd.total").textContent);
  }
  document.querySelector("#legend button").click();
  say("hidden", document.querySelectorAll("#svg-without .area").length);
  say("fits", document.documentElement.scrollWidth <= innerWidth);
})();
</script>
</body>"""


@pytest.mark.parametrize("width", [1600, 700])
def test_a_browser_draws_the_step_with_its_plan_and_without_on_the_same_axes(tmp_path: Path, width: int) -> None:
    root = browse(a_planned_report(40_000_000), tmp_path, width, TWO_CHARTS)
    assert root.get("data-error") is None
    seen = {
        key.removeprefix("data-probe-"): value or "" for key, value in root.items() if key.startswith("data-probe-")
    }
    assert seen["svg-areas"] == seen["svg-without-areas"] == "3"
    assert seen["svg-grid"] == seen["svg-without-grid"] != ""
    assert seen["svg-budget"] == seen["svg-without-budget"] != ""
    assert float(seen["svg-without-peak"]) < float(seen["svg-budget"]) < float(seen["svg-peak"]), "from the top"
    assert int(seen["svg-ends"]) == pytest.approx(2 / 3 * int(seen["svg-without-ends"]), abs=0.1 * width)
    assert seen["hidden"] == "2"
    assert seen["fits"] == "true"
    far = browse(a_planned_report(10**12), tmp_path, width, TWO_CHARTS)
    assert far["data-probe-svg-budget"] == "", "all that is held would be a line at the bottom"


def test_a_browser_draws_an_empty_report(tmp_path: Path) -> None:
    root = browse(EMPTY, tmp_path, 900)
    assert root.get("data-error") is None
    assert root["data-ready"] == "yes"
    assert root["data-probe-passes"] == "0"
    assert root["data-probe-fits"] == "true"
