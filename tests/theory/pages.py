"""What the pages of docs/theory show, for the tests that compare it with what comes out now."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "theory"


def text(name: str) -> str:
    return (FOLDER / name).read_text("utf-8")


def table(name: str, first_column: str) -> list[dict[str, str]]:
    """The rows of the page's table whose first heading is `first_column`, by heading."""
    lines = text(name).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first_column} |"))
    headings = _cells(lines[start])
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append(dict(zip(headings, _cells(line), strict=True)))
    return rows


def _cells(line: str) -> list[str]:
    # A "|" inside of code or of a magnitude would be written as \|.
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]


def number(cell: str) -> float:
    """ "1,024" is 1024, and "3.57%" is 0.0357."""
    value = float(cell.replace(",", "").rstrip("%"))
    return value / 100 if cell.endswith("%") else value
