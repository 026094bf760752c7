"""Starts the ranks of a test's script, as torchrun does on one machine, without its imports: rank_server.py."""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent


@functools.cache
def _server() -> subprocess.Popen[str]:
    """One for each process of pytest."""
    path = os.pathsep.join([str(HERE.parent), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    server = subprocess.Popen(
        [sys.executable, str(HERE / "rank_server.py")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    atexit.register(server.kill)
    return server


def start_ranks(script: str, ranks: int, *arguments: object, timeout: float = 280) -> None:
    """Run a script of this folder on so many processes.

    Raises AssertionError with the end of what they printed when one fails or takes longer than `timeout` seconds.
    """
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        request = {
            "script": str(HERE / script), "ranks": ranks, "arguments": [str(word) for word in arguments],
            "output": f"{folder}/printed", "timeout": timeout,
        }  # fmt: skip
        print(json.dumps(request), file=server.stdin, flush=True)
        try:
            answer = server.stdout.readline()
        except BaseException:  # pytest's time-out: the answer to this request must not be taken for that to the next
            server.kill()
            _server.cache_clear()
            raise
        printed = Path(f"{folder}/printed").read_text(errors="replace") if answer else ""
    assert answer, f"rank_server.py has ended, with {server.wait()}"
    assert not any(json.loads(answer)), f"exit codes {answer.strip()}; {printed[-6000:]}"
