"""Commands for several GPUs, run as they are on CPU processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
ON_CPUS = ROOT / "tests" / "distributed" / "cpu_ranks"
# Full precision: transformers refuses bf16 on a CPU that it was not told to use, and with use_cpu no layout is on.
FULL_PRECISION = ["--mixed_precision", "no", "--main_process_port", "0"]


def run(command: list[str], *, variables: Mapping[str, str] | None = None, timeout: int = 280) -> str:
    """Run Python with these arguments in the repository's root; returns what it printed.

    Raises AssertionError with the end of its errors when it fails.
    """
    path = os.pathsep.join([str(ON_CPUS), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env={**environment, **(variables or {})},
        capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout[-2000:], done.stderr[-4000:])
    return done.stdout
