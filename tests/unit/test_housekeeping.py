"""The files beside the code: they parse, and what they name is there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import chronicals_trl
from chronicals_trl import _versions

ROOT = Path(__file__).parents[2]
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text("utf-8")


def load(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text("utf-8"))


def test_the_citation() -> None:
    """What CFF 1.2.0 requires, and nothing that could be out of date."""
    cff = load("CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= set(cff)
    assert cff["cff-version"] == "1.2.0" and cff["type"] == "software"
    assert cff["authors"] and all(set(author) <= {"name", "family-names", "given-names"} for author in cff["authors"])
    assert cff["version"] == chronicals_trl.__version__
    assert f'license = "{cff["license"]}"' in (ROOT / "pyproject.toml").read_text("utf-8")
    allowed = {"cff-version", "message", "type", "title", "authors", "version", "license", "keywords", "abstract"}
    assert set(cff) <= allowed and "://" not in str(cff) and "@" not in str(cff)


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_issue_templates(name: str) -> None:
    """The schema of GitHub's issue forms, as far as they use it."""
    form = load(f".github/ISSUE_TEMPLATE/{name}.yml")
    assert set(form) == {"name", "description", "labels", "body"}
    ids = [field["id"] for field in form["body"] if field["type"] != "markdown"]
    assert len(set(ids)) == len(ids) and any(field.get("validations", {}).get("required") for field in form["body"])
    for field in form["body"]:
        assert field["type"] in {"markdown", "textarea", "dropdown"}
        if field["type"] == "markdown":
            assert set(field) == {"type", "attributes"} and set(field["attributes"]) == {"value"}
            continue
        assert set(field) <= {"type", "id", "attributes", "validations"} and re.fullmatch(r"[\w-]+", field["id"])
        assert field["attributes"]["label"]
        assert (field["type"] == "dropdown") == bool(field["attributes"].get("options"))
    assert "chronicals-trl doctor" in str(form)
    assert load(".github/ISSUE_TEMPLATE/config.yml") == {"blank_issues_enabled": True}


def test_contributing_names_what_is_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    assert set(re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[0].split()) <= targets
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", CONTRIBUTING, re.MULTILINE))
    assert named <= targets and {"setup", "lint", "test", "docs", "demo", "test-oldest"} <= named
    paths = re.findall(r"(?:tests|chronicals_trl|docs|\.ci)/[\w/.-]*\w", CONTRIBUTING)
    assert len(paths) > 10
    for path in paths:
        assert (ROOT / path).exists(), path
    for folder in (ROOT / "tests").iterdir():
        if folder.is_dir() and any(folder.glob("*.py")):
            assert f"`{folder.name}`" in CONTRIBUTING, folder.name


def test_the_oldest_versions_are_the_floors() -> None:
    code = re.search(r"^FLOORS = (.*)$", MAKEFILE, re.MULTILINE)
    assert code is not None
    printed: list[str] = []
    exec(code[1], {"print": lambda *items: printed.extend(items)})
    assert printed == [f"{name}=={floor}" for name, floor in _versions.FLOORS.items() if name != "torch"]


def test_every_example_is_in_the_index() -> None:
    index = (ROOT / "examples" / "README.md").read_text("utf-8")
    files = {path.name for path in (ROOT / "examples").iterdir() if path.is_file()} - {"README.md"}
    assert set(re.findall(r"\]\(([\w.]+)\)", index)) == files
    short = set(re.findall(r"^\| \[(\w+\.py)\]", index.partition("These print")[0], re.MULTILINE)) - {"sft.py"}
    for name in short - {"demo.py"}:
        assert len((ROOT / "examples" / name).read_text("utf-8").splitlines()) < 80, f"{name} is to be short"
