"""The code in docs/write-a-pass.md runs, and says what the page says; the logs it promises are there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "write-a-pass.md"


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)


def run(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), str(folder)])
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        text=True,
        capture_output=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the page."""
    path = tmp_path_factory.mktemp("pass")
    for block in blocks("python"):
        named = re.match(r"# file: (\S+)\n", block)
        assert named, f"a block of {PAGE} has no '# file:' line, so no test runs it"
        (path / named[1]).write_text(block)
    return path


@pytest.fixture(scope="module")
def trained(folder: Path) -> subprocess.CompletedProcess[str]:
    done = run(folder, "train.py", TORCH_LOGS="+dspass", TORCH_TRACE=str(folder / "trace"))
    assert done.returncode == 0, done.stderr
    return done


def test_the_page_prints_what_it_says(trained: subprocess.CompletedProcess[str]) -> None:
    assert trained.stdout == blocks("text")[0]


def test_the_pages_own_test_passes(folder: Path) -> None:
    done = run(folder, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_undo_transposes.py")
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout


def test_torch_logs_show_each_pass(trained: subprocess.CompletedProcess[str]) -> None:
    for line in (
        "graph 0 backward: undo_transposes (1 transposes undone",
        "graph 0 joint: expose_parameters",
        "graph 0 forward: zero_gather",
    ):
        assert line in trained.stderr


def test_torch_trace_keeps_the_graphs(folder: Path, trained: subprocess.CompletedProcess[str]) -> None:
    text = "".join(path.read_text() for path in (folder / "trace").glob("*.log"))
    assert '"name": "dspass_backward_undo_transposes"' in text
    assert "aten.mm" in text


def test_the_log_has_a_name_of_its_own() -> None:
    from torch._logging._internal import log_registry

    import dspass

    assert log_registry.log_alias_to_log_qnames["dspass"] == [dspass.__name__]


PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "benchmarks" / "README.md",
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "benchmarks" / "results").glob("*.md"),
    ]
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_what_a_page_links_to_is_there(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in link:
            continue
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if heading:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert heading in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}, link
