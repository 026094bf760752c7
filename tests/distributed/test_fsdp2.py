"""FSDP2 on two gloo processes: joined blocks read weights that FSDP2 has gathered for their layer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_gradients_of_sharded_models(tmp_path) -> None:
    script = Path(__file__).with_name("fsdp_script.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run([*command, str(tmp_path / "found.json")], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found) == 8
    assert all(error < 1e-5 for error in found.values()), found
