"""The house rules that can be read from the source: who imports whom, and what each pass has beside it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from dspass.passes.pipeline import DEFAULT

ROOT = Path(__file__).parent.parent

#: What each folder may import of ``dspass``; data goes one way.
LAYERS: dict[str, tuple[str, ...]] = {
    "runtime": ("dspass.runtime",),
    "passes": ("dspass.passes", "dspass.runtime"),
    "lowering": ("dspass.lowering", "dspass.passes", "dspass.runtime"),
    "planner": ("dspass.planner", "dspass.lowering", "dspass.passes", "dspass.runtime"),
}


def sources(*folders: str) -> list[Path]:
    # The links dspass/passes and so on show the same files again.
    return sorted(
        path
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        if not any(parent.is_symlink() for parent in path.parents)
    )


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of each import, in functions and under ``TYPE_CHECKING`` too."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("folder", LAYERS)
def test_layers_import_only_what_lies_below(folder: str) -> None:
    files = sources(folder)
    assert files
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files
        for line, name in imports(path)
        if within(name, ("dspass",)) and not within(name, LAYERS[folder])
    ]
    assert not wrong, "\n".join(wrong)


def test_every_module_has_one_name() -> None:
    """A module loaded as ``passes.x`` and as ``dspass.passes.x`` would register its operators twice;
    relative imports would hide which of the two it is."""
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sources("dspass", "passes", "lowering", "planner", "runtime", "tests", "benchmarks", "examples")
        for line, name in imports(path)
        if within(name, ("passes", "lowering", "planner", "runtime")) or name.startswith(".")
    ]
    assert not wrong, "\n".join(wrong)


def test_private_torch_stands_behind_one_door() -> None:
    """torch's private names are reached through ``dspass.runtime.compat`` only; what its documentation names is public."""
    public = r"ops\.|utils\._pytree|utils\._python_dispatch|Tensor\._make_wrapper_subclass|_dynamo(?!\._)|_ops|_check|_foreach"
    private = re.compile(rf"torch\.(?!{public})(\w+\.)*_(?!_)")
    of_tensors = {"_local_tensor", "_cdata"}
    wrong = []
    for path in sources("dspass", "passes", "lowering", "planner", "runtime"):
        if path.parent.name == "compat":
            continue
        nodes = list(ast.walk(ast.parse(path.read_text())))
        used = [(n.lineno, ast.unparse(n)) for n in nodes if isinstance(n, ast.Attribute)]
        wrong += [
            f"{path.relative_to(ROOT)}:{at} {name}" for at, name in (*used, *imports(path)) if private.match(name)
        ]
        attributes = [n for n in nodes if isinstance(n, ast.Attribute) and n.attr in of_tensors]
        wrong += [f"{path.relative_to(ROOT)}:{n.lineno} {n.attr}" for n in attributes]
    assert not wrong, "\n".join(wrong)
    assert private.match("torch._C._set_grad_enabled")
    assert private.match("torch.distributed.tensor._ops")
    assert private.match("torch._dynamo._x")
    assert not private.match("torch._dynamo.disable")


def rows() -> dict[str, list[str]]:
    """The table of docs/passes.md: a pass's name to the cells of its row."""
    found = {}
    for line in (ROOT / "docs" / "passes.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("| `"):
            found[cells[0].strip("`")] = cells
    return found


@pytest.mark.parametrize("cls", DEFAULT, ids=lambda cls: cls.name)
def test_each_pass_has_its_row(cls: type) -> None:
    assert cls.name in rows(), f"docs/passes.md has no row for {cls.name}"
    cells = rows()[cls.name]
    assert len(cells) == 5, f"the row of {cls.name} has {len(cells)} cells"
    assert all(cells)
    assert cells[4] == ("yes" if cls.keeps_numbers else "no")
    assert cells[1] == ", ".join(where for where in ("captured", "joint", "forward", "backward") if where in cls.where)


def test_no_row_is_left_of_a_pass_that_is_gone() -> None:
    assert list(rows()) == [cls.name for cls in DEFAULT], "the table has the passes in the order of the pipeline"


@pytest.mark.parametrize("cls", DEFAULT, ids=lambda cls: cls.name)
def test_each_pass_has_its_file_and_its_golden_text(cls: type) -> None:
    assert cls.__module__ == f"dspass.passes.{cls.name}", "one pass is one file of its name"
    assert (ROOT / "passes" / f"{cls.name}.py").exists()
    assert (ROOT / "tests" / "golden" / f"{cls.name}.txt").exists(), "run pytest tests/test_passes.py --golden-update"


def test_no_golden_text_is_left_of_a_pass_that_is_gone() -> None:
    assert {path.stem for path in (ROOT / "tests" / "golden").glob("*.txt")} == {cls.name for cls in DEFAULT}
