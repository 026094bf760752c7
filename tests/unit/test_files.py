"""Small files that are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from chronicals_trl._files import write_text


def test_a_file_of_before_is_replaced_and_nothing_else_is_there(tmp_path: Path) -> None:
    for text in ("first, and longer", "second"):
        write_text(tmp_path / "report.json", text)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert (tmp_path / "report.json").read_text() == "second"


def test_it_is_as_public_as_other_files(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        write_text(tmp_path / "report.json", "text")
        (tmp_path / "other").write_text("text")
    finally:
        os.umask(umask)
    assert (tmp_path / "report.json").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_write_that_fails_leaves_the_file_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "report.json", "before")

    def full(descriptor: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)  # which comes before the renaming
    with pytest.raises(OSError, match="No space left"):
        write_text(tmp_path / "report.json", "after")
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert (tmp_path / "report.json").read_text() == "before"
