"""Padding-free batches on two ranks: each step as stock TRL trains it, from padded batches, on two ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from start_ranks import start_ranks

pytestmark = pytest.mark.slow


def test_two_ranks(tmp_path: Path) -> None:
    start_ranks("padding_free_script.py", 2, tmp_path)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert len(figures) == 5
    for case, found in figures.items():
        assert len(found["ours"]) == len(found["theirs"]) == 5
        leaks = case == "one rank sees a leak"
        assert found["rows"] == ([3, 3] if leaks else [1, 1]), case
        assert found["offsets"] == (0 if leaks else 3 + 2), case  # three documents a rank, and the padding
        if leaks:
            assert "attend to each other" in found["notes"][0] and "off on another rank" in found["notes"][1]
        for key in ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens"):
            ours, theirs = ([entry[key] for entry in found[side]] for side in ("ours", "theirs"))
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6), (case, key)
