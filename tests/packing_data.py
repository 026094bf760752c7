"""Small tokenised data sets, and what packing has to make of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

Rows = list[dict[str, list[int]]]
Document = tuple[tuple[int, ...], ...]

LENGTHS: list[int] = np.random.default_rng(1).integers(1, 33, 200).tolist()


def make_rows(lengths: list[int]) -> Rows:
    """Every token differs from every other, so that a document's content shows where it came from.

    Every third label is -100, and every seventh document has no other labels.
    """
    rows, token = [], 1
    for number, length in enumerate(lengths):
        ids = list(range(token, token + length))
        labels = [-100 if i % 3 == 0 or number % 7 == 6 else i for i in ids]
        rows.append({"input_ids": ids, "labels": labels, "completion_mask": [int(i % 3 == 1) for i in ids]})
        token += length
    return rows


def documents_of(packed: Iterable[Any], *names: str) -> Counter[Document]:
    """The documents of packed rows: of each its pieces of the named columns (input_ids and labels)."""
    found: Counter[Document] = Counter()
    names = names or ("input_ids", "labels")
    for row in packed:
        assert {len(row[name]) for name in names} == {sum(row["seq_lengths"])}
        for end, length in zip(np.cumsum(row["seq_lengths"]), row["seq_lengths"], strict=True):
            found[tuple(tuple(row[name][end - length : end]) for name in names)] += 1
    return found


def expected_documents(rows: Rows, capacity: int, *names: str, split: bool = False) -> Counter[Document]:
    """The same, by hand: documents that have tokens, and a label in what is kept of them."""
    pieces: Counter[Document] = Counter()
    names = names or ("input_ids", "labels")
    for row in rows:
        length = len(row["input_ids"])
        learns = any(label != -100 for label in row["labels"][: length if split else capacity])
        for start in range(0, length, capacity) if split else [0]:
            if learns:
                pieces[tuple(tuple(row[name][start : start + capacity]) for name in names)] += 1
    return pieces


def masked(rows: Rows, capacity: int) -> int:
    """How many documents have tokens, and no label in the first `capacity`."""
    return sum(bool(row["labels"]) and set(row["labels"][:capacity]) == {-100} for row in rows)
