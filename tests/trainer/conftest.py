"""What several tests of the trainer set up."""

from __future__ import annotations

import pytest
from graph_stand_in import StandIn


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """Training on the CPU as if it could capture: rows without padding get lengths that recur."""
    from chronicals_trl.model import graphs
    from chronicals_trl.model import trainer as graphs_trainer

    stand_in = StandIn()
    monkeypatch.setattr(graphs_trainer, "DEVICES", ("cpu",))
    monkeypatch.setattr(graphs, "CudaRecorder", lambda device: stand_in)
    return stand_in
