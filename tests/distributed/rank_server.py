"""A process that has imported the libraries, and forks the ranks of test scripts off itself; for start_ranks.py.

Reads requests, a line of JSON each, and answers with the exit codes of the ranks: torchrun on one machine, but for its
imports, which take a rank some 8 seconds of a core. This package is not among them: each rank imports it.
"""

from __future__ import annotations

import ctypes
import json
import os
import runpy
import signal
import socket
import sys
import time
import traceback
from pathlib import Path


def import_libraries() -> None:
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import trl.trainer.sft_trainer  # noqa: F401

    assert "chronicals_trl" not in sys.modules


def be_a_rank(rank: int, ranks: int, port: int, script: str, arguments: list[str], output: str) -> None:
    """The script in the place of this process; does not return."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nobody waits for a rank whose server is gone
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number, descriptor in enumerate((os.open(os.devnull, os.O_RDONLY), log, log)):
        os.dup2(descriptor, number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({name: str(number) for name, number in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"})
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    code = 1
    try:
        runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else end.code is not None
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(script: str, ranks: int, arguments: list[str], output: str, timeout: float) -> list[int | None]:
    """The ranks' exit codes, those of signals negative. When one fails, or time is up, the others are killed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running: dict[int, int] = {}
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            be_a_rank(rank, ranks, port, script, arguments, output)
        running[child] = rank
    codes: list[int | None] = [None] * ranks
    end = time.monotonic() + timeout
    while running:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            codes[running.pop(child)] = os.waitstatus_to_exitcode(status)
        if any(codes) or time.monotonic() > end:
            for left in running:
                os.kill(left, signal.SIGKILL)
        if not child:
            time.sleep(0.02)
    return codes


if __name__ == "__main__":
    import_libraries()
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), flush=True)
