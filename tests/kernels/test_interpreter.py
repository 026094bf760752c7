"""Runs the kernels through Triton's interpreter, which has to be switched on before triton is first imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from chronicals_trl.kernels import _common

# The first is for the interpreter alone; the others hold for either path.
FILES = (
    "test_interp_kernels.py", "test_kernel_op.py", "test_gated_mlp.py", "test_shared_linear.py", "test_lora_mlp.py",
    "test_lora_dropout.py", "test_adamw_kernel.py", "test_embedding_rows.py",
    "test_interp_cross_entropy.py",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(_common.INTERPRET, reason="this process interprets the kernels already")
@pytest.mark.skipif(not _common.HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("name", FILES)
def test_kernels_run_interpreted(name):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name(name))],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert " skipped" not in done.stdout
