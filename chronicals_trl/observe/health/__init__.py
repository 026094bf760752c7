"""Is the model really training? Checks at the start and during the run, each with its likely cause and remedy."""

from __future__ import annotations

from chronicals_trl.observe.health.findings import CHECKS, Finding

__all__ = ["CHECKS", "Finding"]
