"""How a target is judged: the figures that it names, against its bound, whatever is measured."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["NOISE", "Judged", "beyond", "conclude"]

#: Two runs of one kernel differ by about this much: "no slower" allows for it, "ahead" has to exceed it.
NOISE = 0.02


@dataclass(frozen=True)
class Judged:
    """One target's outcome.

    Args:
        target: In words.
        outcome: "met", "missed", or "not measured" when nothing missed it but a figure that it needs is not there.
        figures: "op shape direction" to the figure that was compared, where there is one.
        missing: What there is no figure for, and why.
        at_least, at_most: What each figure has to reach, or may not exceed; one of the two is given.
    """

    target: str
    outcome: str
    figures: dict[str, float]
    missing: dict[str, str]
    at_least: float | None = None
    at_most: float | None = None


def beyond(figure: float, at_least: float | None, at_most: float | None) -> bool:
    """Whether a figure misses its bound."""
    return (at_least is not None and figure < at_least) or (at_most is not None and figure > at_most)


def conclude(
    text: str,
    figures: dict[str, float],
    missing: dict[str, str],
    broken: bool,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Judged:
    """The outcome of a target; `broken` if our own op failed, which is a miss whatever the figures."""
    if broken or any(beyond(figure, at_least, at_most) for figure in figures.values()):
        outcome = "missed"
    elif missing or not figures:
        outcome = "not measured"
    else:
        outcome = "met"
    return Judged(text, outcome, figures, missing, at_least, at_most)
