import gc
import os
import sys
import tempfile

import pytest

gc.disable()  # while all is imported, of which nothing goes
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["DSPASS_DEVICES"] = tempfile.mkdtemp(
    prefix="dspass-no-calibration-"
)  # what was measured here must not matter


@pytest.fixture(autouse=True)
def _onednn_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process the pass works on any CPU that has oneDNN, fast or not, so that it is tested everywhere."""
    from dspass.runtime import compat, linear

    monkeypatch.setattr(linear, "pays", compat.has_onednn)


@pytest.fixture(autouse=True)
def _predicts_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prediction under a budget makes a second one without, for the report to show both, which takes as long. Those tests
    that look at it are marked ``unplanned_too``."""
    import dspass  # noqa: F401  (all of its modules)

    if request.node.get_closest_marker("unplanned_too") is None:
        for module in ("dspass.explain", "dspass.fit"):
            monkeypatch.setattr(sys.modules[module], "with_unplanned", lambda report, asked: report)


def pytest_collection_finish() -> None:
    from tests.ranks import RARE_COLLECTIONS

    gc.freeze()  # all that was imported
    gc.enable()
    gc.set_threshold(*RARE_COLLECTIONS)


def pytest_sessionfinish() -> None:
    from tests.ranks import close_all

    close_all()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden-update", action="store_true", help="rewrite tests/golden with what the passes make now")
    parser.addoption(
        "--whole-matrix",
        action="store_true",
        help="also run combinations that repeat what others show (tests/matrix.py)",
    )


#: The files that take longest, the longest first.
LONGEST = [
    "test_pipeline",
    "test_expert_parallel",
    "test_pipeline_edges",
    "test_kernel_libraries",
    "test_batch_parts",
    "test_numbers",
    "test_planner",
    "test_explain",
    "test_host_states",
    "test_offload_saved",
    "test_quantised_training",
    "test_planner_numbers",
    "test_stopped",
    "test_stages",
    "test_architectures",
    "test_pipeline_planner",
    "test_wishes",
    "test_cuda_src",
    "test_few_rows",
    "test_benchmarks",
    "test_calibration",
    "test_pipeline_sends",
    "test_zero",
    "test_passes",
    "test_weights",
    "test_report_pipeline",
    "test_integrations",
    "test_quantise",
    "test_expert_chunks",
]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "whole_matrix: runs with --whole-matrix alone")
    config.addinivalue_line("markers", "unplanned_too: its predictions under a budget make those without one, too")
    # pytest-xdist would hand out files with many tests first. Those that take minutes have few: one that begins last leaves
    # all other processes idle. Unordered, it takes them as they are collected.
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--whole-matrix"):
        runs: dict[bool, list[pytest.Item]] = {True: [], False: []}
        for item in items:
            runs[item.get_closest_marker("whole_matrix") is None].append(item)
        config.hook.pytest_deselected(items=runs[False])
        items[:] = runs[True]
    if config.getoption("numprocesses", None) or hasattr(config, "workerinput"):
        place = {name: i for i, name in enumerate(LONGEST)}
        items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))  # the others stay in their order


@pytest.fixture
def golden_update(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--golden-update"))
