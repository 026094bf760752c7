"""Settings that must be in force before torch or the hub's client are imported."""

from __future__ import annotations

import gc
import logging
import os
import sys
import warnings
from collections.abc import Iterator

import pytest

# Two xdist workers share two cores; more threads than cores make every small test slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# A developer's own settings would change what is tested.
for _name in [name for name in os.environ if name.startswith("CHRONICALS_")]:
    del os.environ[_name]


def pytest_collection_finish() -> None:
    """What the imports have made is not looked through again by each collection of garbage, some of them asked for."""
    gc.collect()
    gc.freeze()


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


@pytest.fixture(autouse=True)
def trl_as_it_comes(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that leaves names of trl rebound (`register`) is told of in a warning, and no other test sees it."""
    yield
    trl, home = sys.modules.get("trl"), sys.modules.get("trl.trainer.sft_config")
    if trl is None or home is None:
        return
    if {vars(each).get("SFTConfig", home.SFTConfig).__module__ for each in (trl, home)} != {home.__name__}:
        from chronicals_trl import _register
        from chronicals_trl.config import SFTConfig
        from chronicals_trl.trainer import SFTTrainer

        warnings.warn(f"{request.node.nodeid} has left trl rebound", stacklevel=1)
        _register.unregister()
        for ours in (SFTConfig, SFTTrainer):
            stock = next(c for c in ours.__mro__ if c.__name__ == ours.__name__ and c.__module__.startswith("trl."))
            for place in _register._PLACES[ours.__name__]:
                setattr(sys.modules[place], ours.__name__, stock)
