"""docs/theory: every page is in the manual, is on the index, and ends in commands that exist."""

from __future__ import annotations

import re
import shlex

import pytest
from theory import pages

PAGES = sorted(path.name for path in pages.FOLDER.glob("*.md") if path.name != "index.md")


def commands(name: str) -> list[str]:
    """Of the block that the page ends in, under its last heading but for what follows the block."""
    heading, _, rest = pages.text(name).rpartition("\n## ")
    assert heading and rest.startswith("Check it\n"), f"{name} has to end in how to check it"
    (block,) = re.findall(r"```bash\n(.*?)```", rest, re.DOTALL)
    return block.splitlines()


def files_of(command: str) -> list[str]:
    words = shlex.split(command, comments=True)
    words = [word for word in words if not re.fullmatch(r"[A-Z_]+=\w+", word)]
    assert words[0] == "python"
    return [word for word in words[1:] if word.endswith(".py")]


@pytest.mark.parametrize("name", PAGES)
def test_the_page_ends_in_commands_that_exist(name: str) -> None:
    found = [path for command in commands(name) for path in files_of(command)]
    assert all((pages.ROOT / path).is_file() for path in found)
    assert [path for path in found if path.startswith("tests/theory/test_")] == [found[0]]
    # The test is about this page.
    assert f"docs/theory/{name}" in (pages.ROOT / found[0]).read_text("utf-8").splitlines()[0]


def test_the_index_has_every_page_and_its_check() -> None:
    rows = pages.table("index.md", "claim")
    linked = {match[1]: row["check"] for row in rows if (match := re.search(r"\]\(([\w-]+\.md)\)", row["claim"]))}
    assert sorted(linked) == PAGES
    for name, check in linked.items():
        assert check.strip("`") == commands(name)[0]
    for row in rows:
        assert all((pages.ROOT / path).is_file() for path in files_of(row["check"].strip("`")))


def test_the_manual_has_every_page() -> None:
    nav = (pages.ROOT / "mkdocs.yml").read_text("utf-8")
    assert re.findall(r"theory/([\w-]+\.md)", nav)[0] == "index.md"
    assert sorted(re.findall(r"theory/([\w-]+\.md)", nav)[1:]) == PAGES


def test_every_test_belongs_to_a_page() -> None:
    named = {path for name in PAGES for command in commands(name) for path in files_of(command)}
    tests = {str(path.relative_to(pages.ROOT)) for path in (pages.ROOT / "tests" / "theory").glob("test_*.py")}
    assert tests - named == {"tests/theory/test_theory_pages.py"}
