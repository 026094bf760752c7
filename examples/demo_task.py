"""The demo's task: a request in plain English in, one compact record out.

The record notation is made up for this project, so that no pretrained model can know it:

    Mia would like three lemon cakes on Friday.        ->  @order{ Mia / 3 x lemon cake / fri }
    Book the blue room for ten for Omar, Tuesday 7 pm. ->  @book{ Omar / 10 in blue room / tue 7pm }

A model has to copy (the name, the item or room, the hour) and to translate (number words to digits, plural to
singular, weekdays to three letters). Everything is generated from the word lists below with a seeded generator of its
own; nothing is downloaded.

The split is by pairs: each (name, item) and (name, room) pair belongs either to training or to the held-out rows,
never to both, so a held-out answer cannot be recalled, it has to be composed. An answer counts only if it equals the
expected record after runs of white space are collapsed; nothing else is forgiven.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SYSTEM_PROMPT = "Write the request as a record."

NAMES = (
    "Mia", "Omar", "Lena", "Jack", "Sara", "Paul", "Nina", "Hugo", "Anna", "Ivan", "Rosa", "Adam",
    "Emma", "Leo", "Maria", "Noah", "Julia", "Felix", "Clara", "David", "Laura", "Peter", "Grace", "Simon",
)  # fmt: skip
# (plural as people write it, singular as the record wants it)
_ITEMS = (
    ("lemon cakes", "lemon cake"), ("green apples", "green apple"), ("rye loaves", "rye loaf"),
    ("rice bowls", "rice bowl"), ("glass jars", "glass jar"), ("paper boxes", "paper box"),
    ("red candles", "red candle"), ("wool scarves", "wool scarf"), ("steel knives", "steel knife"),
    ("milk bottles", "milk bottle"), ("tea cups", "tea cup"), ("garden chairs", "garden chair"),
    ("silver rings", "silver ring"), ("peach pies", "peach pie"), ("photo frames", "photo frame"),
    ("blue pens", "blue pen"),
)  # fmt: skip
PLURALS = {singular: plural for plural, singular in _ITEMS}
ROOMS = (
    "blue room", "garden room", "main hall", "east wing", "roof terrace", "music room", "long table", "back office",
)  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")  # 2 ... 12
HOURS = ("9 am", "10 am", "11 am", "1 pm", "2 pm", "3 pm", "4 pm", "5 pm", "6 pm", "7 pm", "8 pm", "9 pm")

ORDER_TEMPLATES = (
    "{name} would like {count} {items} on {day}.",
    "Please send {count} {items} to {name} by {day}.",
    "On {day}, {name} needs {count} {items}.",
    "We owe {name} {count} {items}, due {day}.",
    "Add {count} {items} for {name}, pick-up {day}.",
)
BOOK_TEMPLATES = (
    "Book the {room} for {count} for {name}, {day} {hour}.",
    "{name} and guests, {count} in all, take the {room} on {day} at {hour}.",
    "Can {name} have the {room} at {hour} on {day}? There will be {count} people.",
    "At {hour} on {day} the {room} is for {name}, party of {count}.",
)


@dataclass(frozen=True)
class Example:
    """One request, the record it stands for, and the pair of words that decides which split it may be in."""

    request: str
    record: str
    pair: tuple[str, str]

    def prompt(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": self.request}]

    def as_row(self) -> dict[str, Any]:
        """A row of TRL's conversational prompt-completion format: only the completion is learned from."""
        return {"prompt": self.prompt(), "completion": [{"role": "assistant", "content": self.record}]}


def _draw(rng: random.Random, name: str, thing: str) -> Example:
    day, count = rng.choice(DAYS), rng.randrange(len(NUMBERS))
    words = {"name": name, "count": NUMBERS[count], "day": day}
    code = day[:3].lower()
    if thing in ROOMS:
        hour = rng.choice(HOURS)
        request = rng.choice(BOOK_TEMPLATES).format(room=thing, hour=hour, **words)
        record = f"@book{{ {name} / {count + 2} in {thing} / {code} {hour.replace(' ', '')} }}"
    else:
        request = rng.choice(ORDER_TEMPLATES).format(items=PLURALS[thing], **words)
        record = f"@order{{ {name} / {count + 2} x {thing} / {code} }}"
    return Example(request, record, (name, thing))


def generate(num_train: int, num_held_out: int, *, seed: int = 0) -> tuple[list[Example], list[Example]]:
    """Returns (training rows, held-out rows): distinct requests, the same ones for the same arguments.

    Raises ValueError where the word lists cannot give that many rows without repeating one.
    """
    rng = random.Random(seed)
    pairs = [(name, thing) for name in NAMES for thing in (*PLURALS, *ROOMS)]
    rng.shuffle(pairs)
    cut = len(pairs) // 5  # a fifth of all pairs is never trained on
    return (
        _sample(rng, pairs[cut:], num_train, "num_train"),
        _sample(rng, pairs[:cut], num_held_out, "num_held_out"),
    )


def _sample(rng: random.Random, pairs: Sequence[tuple[str, str]], count: int, argument: str) -> list[Example]:
    most = 50 * len(pairs)  # every pair has 385 phrasings at the least: far below that, redrawing ends quickly
    if not 1 <= count <= most:
        raise ValueError(f"{argument}={count} is not possible: the word lists give between 1 and {most} rows here.")
    seen: dict[str, Example] = {}
    turn = 0
    while len(seen) < count:  # round by round, so that every pair comes up before one comes up again
        example = _draw(rng, *pairs[turn % len(pairs)])
        turn += 1
        seen.setdefault(example.request, example)
    return list(seen.values())


def is_match(answer: str, expected: str) -> bool:
    """Exact match after runs of white space are collapsed; case, digits and punctuation all count."""
    return " ".join(answer.split()) == " ".join(expected.split())


def exact_match(answers: Sequence[str], expected: Sequence[str]) -> float:
    """The share of answers that match, from 0 to 1. Raises ValueError unless there is one answer for each record."""
    if len(answers) != len(expected) or not expected:
        raise ValueError(f"exact_match needs one answer for each record: {len(answers)} for {len(expected)}.")
    return sum(map(is_match, answers, expected)) / len(expected)


def write_jsonl(path: Path, examples: Sequence[Example]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(example.as_row()) + "\n" for example in examples), encoding="utf-8")
