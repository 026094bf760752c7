"""docs/multi-gpu.md: under FSDP2 gradient checkpointing adds no gather."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cpu_launch import ROOT, run


@pytest.mark.slow
def test_checkpointing_gathers_nothing_more(tmp_path: Path) -> None:
    script = ROOT / "tests" / "distributed" / "traffic_script.py"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run([*launcher, str(script), str(tmp_path / "found.json")], variables={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"})
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["True"] == found["False"]
    # Twice, but for what the forward pass ends with and the backward pass begins with.
    assert 1.5 < found["True"]["gathered"] < 2 and found["True"]["scattered"] == 1
