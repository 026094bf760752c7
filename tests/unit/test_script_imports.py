"""The scripts that no test starts (for GPUs, for long runs) import what there is."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
SCRIPTS = sorted(
    path for folder in ("tests/gpu", "tests/acceptance", "examples") for path in (ROOT / folder).glob("*.py")
)
# Where they find each other: these are on their paths.
LOCAL = (TESTS, TESTS / "distributed", TESTS / "gpu", TESTS / "acceptance", ROOT / "examples")


def imported(path: Path) -> Iterator[tuple[str, str | None]]:
    """(module, name or None), of functions too: those are seen only when they are called."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.module, alias.name) for alias in node.names)


def defined(path: Path) -> set[str]:
    """The names at a file's top level, without running it."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        else:
            found |= {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
    return found


def missing(module: str, name: str | None) -> str | None:
    """Why an import of ours fails; None if it does not, or is another project's."""
    if module.split(".")[0] == "chronicals_trl":
        try:
            held = importlib.import_module(module)
        except ModuleNotFoundError as error:
            return str(error)
        found = name is None or hasattr(held, name) or importlib.util.find_spec(f"{module}.{name}") is not None
        return None if found else f"{module} has no {name}"
    files = [folder / f"{module}.py" for folder in LOCAL if (folder / f"{module}.py").exists()]
    if not files or name is None or any(name in defined(file) for file in files):
        return None
    return f"{files[0].name} has no {name}"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_lead_somewhere(path: Path) -> None:
    assert [reason for each in imported(path) if (reason := missing(*each))] == []
