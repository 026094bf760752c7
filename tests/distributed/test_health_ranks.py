"""Health checks on two ranks: each sees its shards alone, and both come to the same conclusion at the same step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]

# fault -> (the check that ends the run, optimizer steps until then)
EXPECTED: dict[str, tuple[list[str], int]] = {
    "none": ([], 16),
    "none, lora": ([], 16),
    "cut": (["no_gradient"], 0),
    "cut in the middle": (["missing_gradients"], 8),
    "optimizer does nothing": (["still_weights"], 13),
}


@pytest.mark.slow
def test_both_ranks_find_the_same(tmp_path: Path) -> None:
    script = str(TESTS / "distributed" / "health_script.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, str(tmp_path / "told.json")], capture_output=True, text=True, timeout=280,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    told: dict[str, Any] = json.loads((tmp_path / "told.json").read_text())
    assert len(told) == 9
    for name, ranks in told.items():
        expected = list(EXPECTED[name.split(", ", 1)[1]])
        assert ranks == [expected, expected], name
