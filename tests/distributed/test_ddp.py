"""Two processes on gloo against one on the joined batch: same losses, same gradients, every token once."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent.parent


def _run(output: Path, processes: int, batch_size: int, family: str) -> tuple[dict, dict[str, torch.Tensor]]:
    output.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(port),
        str(TESTS / "distributed" / "ddp_script.py"), str(output), str(batch_size), family, "96",
    ]  # fmt: skip
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((output / "figures.json").read_text()), torch.load(output / "gradients.pt")


@pytest.mark.slow
def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    two, gradients = _run(tmp_path / "two", 2, 1, "llama")
    one, reference = _run(tmp_path / "one", 1, 2, "llama")
    assert (two["world_size"], one["world_size"]) == (2, 1)
    # 21 documents make an odd number of bins: the second rank's last one is empty, and nothing is trained on twice.
    assert two["real_tokens_of_all_ranks"] == one["real_tokens_of_all_ranks"] == two["tokens_in_the_data"]
    assert len(two["log"]) == len(one["log"]) >= 3
    assert any("empty bins appended" in note for note in two["report"]["notes"])
    for key in ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens"):
        assert [e[key] for e in two["log"]] == pytest.approx([e[key] for e in one["log"]], rel=1e-5), key
    for name, gradient in reference.items():
        assert (gradients[name] - gradient).norm() / gradient.norm() < 1e-5, name
    assert two["report"]["parts"] == one["report"]["parts"]
