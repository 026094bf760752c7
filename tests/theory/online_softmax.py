"""The merge of docs/theory/online-softmax.md, as it stands there.

A state (peak, total) stands for the logits that were folded into it: their maximum, and the sum of base^(v - peak).
The base is e; with base 2 and integer logits every state is a fraction, and the laws can be checked exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple


class State(NamedTuple):
    peak: Any
    total: Any


EMPTY = State(-math.inf, 0)


def of_logit(v: Any) -> State:
    """One logit; minus infinity is nothing, so it is the empty state."""
    return EMPTY if v == -math.inf else State(v, 1)


def merge(a: State, b: State, power: Callable[[Any], Any] = math.exp) -> State:
    """`power` is the base to an exponent, which is never above zero here."""
    if a.peak == -math.inf:
        return b  # peak - peak would be NaN
    if b.peak == -math.inf:
        return a
    peak = max(a.peak, b.peak)
    return State(peak, a.total * power(a.peak - peak) + b.total * power(b.peak - peak))


def log_sum_exp(state: State) -> float:
    return state.peak + math.log(state.total) if state.total else -math.inf
