"""docs/extending.md: its code runs, and what it says of it is so."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from chronicals_trl.kernels import _common

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text("utf-8")
MODEL, SAME, KERNEL, TEST = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    exec(MODEL, names)
    states = {part.name: part.state for part in names["report"].parts}
    assert [name for name in ("rms_norm", "gated_mlp", "qk_rope", "attention", "head") if states[name] == "off"] == [
        "gated_mlp"
    ]
    reason = names["report"]["gated_mlp"].reason
    assert f'off with the reason "{reason}"' in PAGE and reason in capsys.readouterr().out
    exec(SAME, names)
    assert torch.isfinite(names["patched"]).all()


def test_what_the_steps_name_is_there() -> None:
    for path in re.findall(r"`((?:tests|chronicals_trl)/[\w/.]+)`", PAGE):
        assert (ROOT / path).exists(), path
    assert "_FAMILIES" in (ROOT / "tests" / "tiny_models.py").read_text()
    assert "FAMILY_LABELS" in (ROOT / "tests" / "unit" / "test_readme.py").read_text()


def run(tmp_path: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "relu_squared.py"  # Triton reads a kernel's source from its file
    script.write_text(code)
    return subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not _common.HAS_TRITON, reason="triton is not installed")
def test_a_kernel(tmp_path: Path) -> None:
    done = run(tmp_path, KERNEL + TEST, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    # The test of the page is one: it notices a gradient that is wrong.
    done = run(tmp_path, KERNEL.replace("2.0 * x * gy", "x * gy") + TEST, TRITON_INTERPRET="1")
    assert done.returncode == 1 and "not close" in done.stderr


def test_the_kernel_s_reference(tmp_path: Path) -> None:
    """Without the interpreter the CPU takes it; and it can be differentiated in float64."""
    check = """
x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
assert torch.autograd.gradcheck(relu_squared, x)
assert torch.equal(relu_squared(x), torch.relu(x) ** 2) and not LAUNCHES
"""
    done = run(tmp_path, KERNEL + check, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
