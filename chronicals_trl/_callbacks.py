"""What is known of a TrainerCallback without calling it."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

# The packages whose callbacks show a log entry, or pass it on, and never change a run by it.
_LIBRARIES = frozenset({"transformers", "trl", "peft", "accelerate", "chronicals_trl"})


def acts_on(callback: Any, event: str) -> bool:
    """Whether a callback does something at an event (`"on_log"`), on its class or on itself."""
    return getattr(getattr(callback, event), "__func__", None) is not getattr(TrainerCallback, event)


def is_a_librarys(callback: Any) -> bool:
    """Whether a callback is of one of the libraries that a run is made of, and nobody has changed it."""
    return type(callback).__module__.partition(".")[0] in _LIBRARIES and not vars(callback).keys() & _EVENT_NAMES


_EVENT_NAMES = frozenset(name for name in dir(TrainerCallback) if name.startswith("on_"))
