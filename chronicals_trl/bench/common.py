"""What the benchmarks of the ops and of the head share: why a side has no figure, versions, numbers fit for JSON."""

from __future__ import annotations

import math
import platform

import torch

from chronicals_trl import __version__
from chronicals_trl._versions import installed

__all__ = ["NotOffered", "explain", "finite", "versions"]


class NotOffered(Exception):
    """The library of this side has no such op."""


def explain(error: Exception) -> tuple[str, str]:
    """Status and reason of a side that raised."""
    if isinstance(error, NotOffered):
        return "not offered", str(error)
    if isinstance(error, ModuleNotFoundError):
        return "not installed", str(error)
    told = _one_line(error)
    if error.__context__ is not None:  # a failed capture ends in a second error; the first is the one that tells
        told += f" (after {_one_line(error.__context__)})"
    return "failed", told


def finite(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None


def versions(*names: str) -> dict[str, str | None]:
    """The package's own version, those of the distributions `names` (None where not installed), CUDA and Python."""
    return {
        "chronicals-trl": __version__,
        **{name: installed(name) for name in names},
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:300]
