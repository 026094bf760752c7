"""Settings that must be in force before torch or the hub's client are imported."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest

# Two xdist workers share two cores; more threads than cores make every small test slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# A developer's own settings would change what is tested.
for _name in [name for name in os.environ if name.startswith("CHRONICALS_")]:
    del os.environ[_name]


@pytest.fixture(autouse=True)
def no_false_alarm(request: pytest.FixtureRequest) -> Iterator[None]:
    """No run of the suite is told that it is unhealthy, but those that have a fault planted (`planted_fault`).

    That other processes hold the cores is true where they do, and no fault of the run.
    """
    if request.node.get_closest_marker("planted_fault") is not None:
        yield
        return
    alarms: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: alarms.append(record.getMessage())  # type: ignore[method-assign]
    health = logging.getLogger("chronicals_trl.observe.health.trainer")
    health.addHandler(handler)
    try:
        yield
    finally:
        health.removeHandler(handler)
    assert not [alarm for alarm in alarms if "waited for a core" not in alarm]
