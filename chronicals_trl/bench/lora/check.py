"""The gradients of a side against fp64, and how far off they may be: no farther than PEFT's in the same setting.

Three figures: the worst gradient of the A's, the worst of the B's, and that of x, each by the norm of its deviation
over its norm. A side may exceed PEFT's by WORSE: what rounds as PEFT does is at 1, a missing factor or summand is at
tens. fp64 knows no dropout, so with dropout the deviation of the adapters' gradients is that of the random masks,
about sqrt(p / (1 - p)); then one that is smaller by the same factor is wrong too: less is dropped, or nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

__all__ = ["WORSE", "deviations", "too_far"]

WORSE = 1.5
#: PEFT's own; beyond it the reference or the inputs are wrong, and nothing can be said of any side.
LARGEST, LARGEST_WITH_DROPOUT = 0.1, 1.0

Deviations = dict[str, float]


def deviations(found: Mapping[str, Tensor | None], exact: Mapping[str, Tensor]) -> Deviations:
    """Of kind "A", "B" and "x" the worst; infinity where a gradient is missing, not finite or of another shape.

    Args:
        found: Names as in `exact`; others are left alone.
        exact: In fp64, by name: "x", or an adapter's with `lora_A` or `lora_B` in it.
    """
    worst: Deviations = {}
    for name, reference in exact.items():
        gradient = found.get(name)
        off = math.inf
        if gradient is not None and gradient.shape == reference.shape:
            off = float((gradient.double() - reference).norm() / reference.norm())
        kind = _kind(name)
        worst[kind] = max(worst.get(kind, 0.0), off if math.isfinite(off) else math.inf)
    return worst


def too_far(found: Deviations, of_peft: Deviations, dropout: float) -> str | None:
    """Why these are wrong answers, or None."""
    largest = LARGEST_WITH_DROPOUT if dropout else LARGEST
    for kind, theirs in of_peft.items():
        ours = found.get(kind, math.inf)
        what = f"gradient of {kind} off from fp64 by {ours:.2g}"
        if not theirs <= largest:
            return f"PEFT's gradient of {kind} is off from fp64 by {theirs:.2g} (at most {largest:g}): no yardstick"
        if not ours <= WORSE * theirs:
            return f"{what}, PEFT's by {theirs:.2g}"
        if dropout and kind != "x" and ours < theirs / WORSE:
            return f"{what} with dropout {dropout:g}, PEFT's by {theirs:.2g}: less is dropped"
    return None


def _kind(name: str) -> str:
    return "A" if "lora_A" in name else "B" if "lora_B" in name else name
