"""A rank that is killed ends the job with an error and in bounded time, and what it leaves can be gone on from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]

pytestmark = pytest.mark.slow

KILLED = ("step", "optimizer")


def launch(folder: Path, what: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(TESTS / "distributed" / "kill_script.py"), str(folder), what],
        env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    for what in KILLED:
        done = launch(folder, what)
        assert done.returncode != 0 and "SIGKILL" in done.stderr, done.stderr[-2000:]
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    """[rank][run]"""
    assert (folder / "step" / "checkpoint-3" / "trainer_state.json").is_file()
    assert not (folder / "step" / "checkpoint-6").exists()
    assert (folder / "optimizer" / "checkpoint-6" / "model.safetensors").is_file()
    done = launch(folder, "resume")
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"found{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", KILLED)
def test_the_last_whole_checkpoint_is_gone_on_from(found: list[dict[str, Any]], name: str) -> None:
    whole, resumed = found[0]["whole"]["losses"], found[0][name]["losses"]
    assert len(whole) == 7 and resumed == pytest.approx(whole, rel=1e-5)
    notes = [note for note in found[0][name]["notes"] if note.startswith("checkpoints:")]
    assert len(notes) == (name != "step")
    assert all("checkpoint-6 is only half written" in note and "checkpoint-3" in note for note in notes)


def test_a_half_written_one_is_refused_by_name(found: list[dict[str, Any]]) -> None:
    for rank in found:
        message = rank["half"]
        assert "checkpoint-6 is only half written (trainer_state.json, which is written last, is missing)" in message
        assert "the last whole one here is" in message and "checkpoint-3" in message and "remove it" in message
