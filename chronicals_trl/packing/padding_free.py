"""A batch's documents in one row, without padding between them: the rows of a run that is not packed.

TRL pads each document of a batch to the longest one. Here the same documents, in the same order, are laid end to end,
as those of a packed row are, and the row is filled up to one of a few lengths, so that shapes recur.

Legend: T tokens of a batch's documents, S the length of its row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chronicals_trl.packing.collator import PackedCollator

__all__ = ["PaddingFreeCollator", "RowLengths", "even_row_lengths", "fitted_row_lengths"]

Integers = NDArray[np.int64]

# As many as there may be CUDA graphs (model/graphs.py, MAX_GRAPHS).
MOST_LENGTHS = 8
# Batches that are drawn to see how long they are.
_DRAWN = 1024


@dataclass(frozen=True)
class RowLengths:
    """The lengths that rows are filled up to.

    Attributes:
        lengths: ascending; no batch has more tokens than the last one, unless its documents are longer than promised.
        max_segment: tokens of the longest document, or of the padding at the end of a usual row, if that is longer.
        fill: share of a row's tokens that is real, by estimate; None where the documents' lengths are not known.
    """

    lengths: tuple[int, ...]
    max_segment: int
    fill: float | None = None

    def of(self, tokens: int) -> int:
        """S for a batch of T tokens."""
        index = int(np.searchsorted(self.lengths, tokens))
        if index < len(self.lengths):
            return self.lengths[index]
        return self.lengths[-1] * math.ceil(tokens / self.lengths[-1])


def even_row_lengths(documents: int, longest: int, *, multiple: int = 8) -> RowLengths:
    """Lengths at equal distances, for documents of which nothing is known but their number and a limit.

    Args:
        documents: most documents in a batch; at least 1.
        longest: most tokens in one; at least 1.
        multiple: of which each length is one.
    """
    step = multiple * math.ceil(documents * longest / (MOST_LENGTHS * multiple))
    count = math.ceil(documents * longest / step)
    return RowLengths(tuple(step * (index + 1) for index in range(count)), max(longest, step))


def fitted_row_lengths(document_lengths: Integers, documents: int, *, multiple: int = 8) -> RowLengths:
    """The lengths with the least padding for batches that a shuffle makes, judged by batches drawn at random.

    The sums of batches lie close together: 16 Alpaca documents of at most 512 tokens are 8,192 at most and 3,000, give
    or take 500. Among the draws' sums the best ends of seven intervals are found exactly, by dynamic programming; the
    eighth length is that of the largest batch that there can be.

    Args:
        document_lengths: (N,) of all documents; at least one of them.
        documents: most documents in a batch.
        multiple: of which each length is one.
    """
    documents = min(documents, len(document_lengths))
    longest = max(1, int(document_lengths.max()))
    largest = max(1, int(np.sort(document_lengths)[-documents:].sum()))
    # Of a generator of its own: the user's stands where it stood, and all ranks draw the same.
    drawn = np.random.default_rng(0).choice(document_lengths, size=(_DRAWN, documents)).sum(axis=1)
    drawn = np.minimum(drawn, largest)
    rounded = np.append(-(-np.maximum(drawn, 1) // multiple), -(-largest // multiple)) * multiple
    ends, counts = np.unique(rounded, return_counts=True)
    lengths = ends[_least_padding(ends, counts)]
    rows = lengths[np.searchsorted(lengths, drawn)]
    # The last length is there for what is rare, and so are the long tails of its rows.
    usual = rows < lengths[-1] if len(lengths) > 1 else np.ones(_DRAWN, dtype=bool)
    tail = int((rows - drawn)[usual].max(initial=0))
    return RowLengths(tuple(lengths.tolist()), max(longest, tail), float(drawn.sum() / rows.sum()))


def _least_padding(ends: Integers, counts: Integers) -> list[int]:
    """Indices of at most `MOST_LENGTHS` of `ends`, the last one among them, up to which all are rounded up cheapest.

    Args:
        ends: (M,) ascending.
        counts: (M,) how often each occurs.
    """
    below = np.concatenate([[0], np.cumsum(counts)])
    # [i, j]: what rounding the ends i..j up to the end j comes to.
    cost = np.where(np.tri(len(ends)).T > 0, (below[None, 1:] - below[:-1, None]) * ends.astype(float), np.inf)
    best, choices = cost[0], []
    for _ in range(min(MOST_LENGTHS, len(ends)) - 1):
        ways = best[:-1, None] + cost[1:]  # one interval ends at i, the next one begins behind it
        choices.append(ways.argmin(axis=0))
        best = ways.min(axis=0)
    chosen = [len(ends) - 1]
    for choice in reversed(choices):
        chosen.append(int(choice[chosen[-1]]))
    return chosen[::-1]


@dataclass
class PaddingFreeCollator:
    """Collates the documents of a batch, as TRL's collator gets them, into one row; batches as `PackedCollator`'s.

    Attributes:
        row_lengths: what rows are filled up to.
        documents: most documents in a batch: all batches have `cu_seq_lens_*` of the same length by it.
        pad_token_id, filler_ids, emit_token_mask: as `PackedCollator` has them.
        splits_rows: an example with `seq_lengths` is so many documents, as it is for TRL's padding-free collator; for
            its padding one it is one document.
    """

    row_lengths: RowLengths
    documents: int
    pad_token_id: int
    filler_ids: Sequence[int] = ()
    emit_token_mask: bool = False
    splits_rows: bool = False

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        tokens = [np.asarray(example["input_ids"], dtype=np.int64) for example in examples]
        labels = [np.asarray(example.get("labels", example["input_ids"]), dtype=np.int64) for example in examples]
        row = {
            "input_ids": np.concatenate(tokens),
            "labels": np.concatenate(labels),
            "seq_lengths": self._document_lengths(examples),
        }
        collate = PackedCollator(
            pad_token_id=self.pad_token_id,
            capacity=self.row_lengths.of(len(row["input_ids"])),
            max_segment_length=self.row_lengths.max_segment,
            max_docs_per_bin=self.documents,
            cu_seqlens_bucket=1,
            emit_token_mask=self.emit_token_mask,
            filler_ids=self.filler_ids,
        )
        return collate([row])

    def _document_lengths(self, examples: Sequence[Mapping[str, Any]]) -> Integers:
        """Without those of empty documents, which have no row in a padded batch's loss either."""
        if self.splits_rows and "seq_lengths" in examples[0]:
            lengths = np.concatenate([np.asarray(example["seq_lengths"], dtype=np.int64) for example in examples])
        else:
            lengths = np.array([len(example["input_ids"]) for example in examples], dtype=np.int64)
        return lengths[lengths > 0]
