"""What a health check has to say."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CHECKS", "Finding"]

#: Every check, in the order of docs/health.md, and whether `health="stop"` ends the run on it. Those that do not are
#: about what a run costs, or about a share of the data or of the parameters that the user may mean to leave.
CHECKS = {
    "no_gradient": True,
    "missing_gradients": True,
    "not_optimized": True,
    "no_labels": True,
    "dropped_documents": False,
    "duplicate_bos": True,
    "zero_gradient_norm": True,
    "not_finite": True,
    "flat_loss": True,
    "still_weights": True,
    "some_still_weights": False,
    "loss_spike": True,
    "slow": False,
}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Args:
        check: one of `CHECKS`.
        seen: what was seen, with figures.
        causes: what most likely caused it, the likeliest first.
        remedy: what to do about it.
    """

    check: str
    seen: str
    causes: str
    remedy: str

    def __post_init__(self) -> None:
        if self.check not in CHECKS:
            raise ValueError(f"check must be one of {', '.join(CHECKS)}, got {self.check!r}.")

    @property
    def stops(self) -> bool:
        return CHECKS[self.check]

    def __str__(self) -> str:
        return f"{self.seen}. Likely cause: {self.causes}. Remedy: {self.remedy} [{self.check}]"
