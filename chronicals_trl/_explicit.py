"""Whether a user named a setting, or left it at its default: the value alone does not say."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from pathlib import Path

import yaml

__all__ = ["named_by_user"]


def named_by_user(name: str, given: Collection[str], fields: int, argv: Sequence[str] | None = None) -> bool:
    """Whether `name` is the user's own word.

    Args:
        given: the keywords that the arguments were made with.
        fields: how many there are. A parser (TrlParser, HfArgumentParser) passes every one of them, the defaults too;
            then the command line is looked at, and the YAML file that its --config names.
        argv: None for this process's.
    """
    if name not in given:
        return False
    if len(given) < fields:
        return True
    words = list(sys.argv[1:] if argv is None else argv)
    for index, word in enumerate(words):
        option, _, value = word.partition("=")
        if option.replace("-", "_").lstrip("_") in (name, f"no_{name}") and option.startswith("--"):
            return True
        if option == "--config" and name in _keys(value or next(iter(words[index + 1 :]), "")):
            return True
    return False


def _keys(file: str) -> Collection[str]:
    try:
        content = yaml.safe_load(Path(file).read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError):  # the parser has said what is wrong with it
        return ()
    return content.keys() if isinstance(content, dict) else ()
