"""What a run tells about itself: throughput, fill and memory, beside TRL's own metrics."""

from __future__ import annotations

from chronicals_trl.observe.throughput import ThroughputMeter

__all__ = ["ThroughputMeter"]
