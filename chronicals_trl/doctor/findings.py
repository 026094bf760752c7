"""What an examination brings to light: problems with their remedies, and self-checks with their outcome."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Problem:
    """Something that stands in the way, or costs something.

    Args:
        what: One sentence, without its full stop.
        remedy: What to do about it, one sentence without its full stop.
        fatal: Whether chronicals cannot run as it should until it is remedied.
    """

    what: str
    remedy: str
    fatal: bool = False

    def __str__(self) -> str:
        return f"{self.what}. {self.remedy}."

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Check:
    """One op, or one way to attend, run on a small input and compared with plain torch by number.

    Args:
        name: Of the op, or of the attention back end.
        state: "failed" is a wrong number or an exception; "not available" was not run.
        backend: What ran: "triton", "torch", or the attention back end's own name.
        detail: Why it is not ok.
        seconds: Wall clock, compilation included.
    """

    name: str
    state: Literal["ok", "failed", "not available"]
    backend: str
    detail: str | None = None
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def first_line(error: BaseException) -> str:
    """The first line of an exception's message without its full stop; the exception's name where it has none."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(". ")
