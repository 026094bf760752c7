"""A batch's documents in one row, without padding between them: the rows of a run that is not packed.

TRL pads each document of a batch to the longest one. Here the same documents, in the same order, are laid end to end,
as those of a packed row are. Where CUDA graphs are captured, the row is filled up to one of a few lengths, so that
shapes recur.

Legend: T tokens of a batch's documents, S the length of its row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chronicals_trl.packing.collator import PackedCollator

__all__ = ["PaddingFreeCollator", "RowLengths", "fitted_row_lengths", "rounded_up", "spread_row_lengths"]

Integers = NDArray[np.int64]

# As many as there may be CUDA graphs (model/graphs.py, MAX_GRAPHS).
MOST_LENGTHS = 8
# Batches that are drawn to see how long they are: of those to come, one in so many is larger than all of them. Fewer
# where they have more than 1,024 documents each.
_DRAWN = 8192
_DRAWN_DOCUMENTS = 1024 * _DRAWN
_HARDLY_ANY = 0.005
# Lengths that are candidates: the time and memory of the search grow with their square.
_ENDS = 1024


@dataclass(frozen=True)
class RowLengths:
    """The lengths that rows are filled up to.

    Attributes:
        lengths: ascending; none where every row is as long as its documents.
        multiple: what rows that no length fits are rounded up to.
        longest: tokens of the longest document.
        smallest: tokens of a batch that hardly any is below.
        usual: tokens of a batch without padding, on average; a guess where nothing is known but a limit.
        largest: most tokens that a row may have, unless documents are longer, or come more often, than was said.
        fill, padded: share of a row's tokens that is real, by estimate, and the share of TRL's padded rows; None where
            nothing is known of the documents but a limit, and the lengths are a guess.
    """

    lengths: tuple[int, ...]
    multiple: int
    longest: int
    smallest: int
    usual: int
    largest: int
    fill: float | None = None
    padded: float | None = None

    def of(self, tokens: int) -> int:
        """S for a batch of T tokens."""
        index = int(np.searchsorted(self.lengths, tokens))
        return self.lengths[index] if index < len(self.lengths) else rounded_up(tokens, self.multiple)

    def longest_segment(self, capacity: int) -> int:
        """Of a row of so many tokens: the longest document or the longest padding, the same for all rows of a length.

        A kernel that is told too large a bound looks for queries where there are none.
        """
        index = int(np.searchsorted(self.lengths, capacity))
        if index >= len(self.lengths):
            return max(self.longest, self.multiple)
        return max(self.longest, self.lengths[index] - (self.lengths[index - 1] if index else self.smallest))

    def most_paddings(self, capacity: int) -> int:
        """Most segments of padding in a row of so many tokens: one, but for a few batches below `smallest`."""
        shortest = bool(self.lengths) and capacity <= self.lengths[0]
        return math.ceil(capacity / self.longest_segment(capacity)) if shortest else 1

    def exact(self) -> RowLengths:
        """Rows as long as their documents, for a run in which shapes need not recur."""
        return replace(self, lengths=(), fill=None)


def spread_row_lengths(documents: int, longest: int, *, multiple: int = 8) -> RowLengths:
    """Lengths in a constant ratio, for documents of which nothing is known but their number and a limit.

    The limit says little: documents are often far below it. Where the sums of batches lie is open, then, but not how
    far they spread: those of n documents, by some 0.8 / √n of themselves. The ratio is such that about eight lengths
    hold most of them, wherever they are.

    Args:
        documents: most documents in a batch; at least 1.
        longest: most tokens in one; at least 1.
        multiple: of which each length is one.
    """
    largest = rounded_up(documents * longest, multiple)
    ratio = math.exp(0.5 / math.sqrt(documents))
    count = math.ceil(math.log(largest / multiple) / math.log(ratio)) + 1
    lengths = {rounded_up(math.ceil(largest / ratio**step), multiple) for step in range(count)}
    return RowLengths(tuple(sorted(lengths)), multiple, longest, 0, largest // 2, largest)


def fitted_row_lengths(
    document_lengths: Integers, documents: int, *, multiple: int = 8, in_order: bool = False
) -> RowLengths:
    """The lengths with the least padding for batches that a shuffle makes, judged by batches drawn at random.

    The sums of batches lie close together: 16 Alpaca documents of at most 512 tokens are 8,192 at most and 3,000, give
    or take 500. Among the draws' sums the best ends of eight intervals are found exactly, by dynamic programming. A
    batch that is larger than all that were drawn is rare, and its row as long as its documents.

    Args:
        document_lengths: (N,) of all documents; at least one of them.
        documents: most documents in a batch.
        multiple: of which each length is one.
        in_order: whether batches are made of the documents as they stand, and need not be drawn.
    """
    documents = min(documents, len(document_lengths))
    longest = max(1, int(document_lengths.max()))
    largest = max(1, int(np.partition(document_lengths, -documents)[-documents:].sum()))
    if in_order:
        whole = document_lengths[: len(document_lengths) // documents * documents].reshape(-1, documents)
        batches = whole[:: math.ceil(len(whole) / _DRAWN)]
    else:
        # By a generator of its own: the user's stands where it stood, and all ranks draw the same.
        count = max(256, min(_DRAWN, _DRAWN_DOCUMENTS // documents))
        batches = np.random.default_rng(0).choice(document_lengths, size=(count, documents))
    drawn = np.minimum(batches.sum(axis=1), largest)
    grain = multiple * math.ceil(largest / (multiple * _ENDS))
    rounded = np.minimum(-(-np.maximum(drawn, 1) // grain) * grain, rounded_up(largest, multiple))
    ends, counts = np.unique(rounded, return_counts=True)
    lengths = ends[_least_padding(ends, counts)]
    rows = lengths[np.searchsorted(lengths, drawn)]
    return RowLengths(
        tuple(lengths.tolist()),
        multiple,
        longest,
        int(np.quantile(drawn, _HARDLY_ANY)),
        int(drawn.mean()),
        rounded_up(largest, multiple),
        fill=float(drawn.sum() / rows.sum()),
        padded=float(batches.sum() / max(1, documents * batches.max(axis=1).sum())),
    )


def rounded_up(tokens: int, multiple: int) -> int:
    """`tokens` as a multiple, and at least one."""
    return multiple * max(1, math.ceil(tokens / multiple))


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
        documents: most documents in a batch: all rows of a length have `cu_seq_lens_*` of the same length by it.
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
    _largest_padded: int = field(default=0, init=False, repr=False)  # of the batches up to here, of this process

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        tokens = [np.asarray(example["input_ids"], dtype=np.int64) for example in examples]
        labels = [np.asarray(example.get("labels", example["input_ids"]), dtype=np.int64) for example in examples]
        row = {
            "input_ids": np.concatenate(tokens),
            "labels": np.concatenate(labels),
            "seq_lengths": self._document_lengths(examples),
        }
        capacity = self._row_length(tokens)
        collate = PackedCollator(
            pad_token_id=self.pad_token_id,
            capacity=capacity,
            max_segment_length=self.row_lengths.longest_segment(capacity),
            max_docs_per_bin=self.documents + self.row_lengths.most_paddings(capacity) - 1,
            cu_seqlens_bucket=1,
            emit_token_mask=self.emit_token_mask,
            filler_ids=self.filler_ids,
        )
        return collate([row])

    def _row_length(self, tokens: Sequence[Integers]) -> int:
        lengths = [len(each) for each in tokens]
        capacity = self.row_lengths.of(sum(lengths))
        if self.row_lengths.fill is not None or not self.row_lengths.lengths:
            return capacity
        self._largest_padded = max(self._largest_padded, len(lengths) * max(lengths))
        return min(capacity, rounded_up(self._largest_padded, self.row_lengths.multiple))

    def _document_lengths(self, examples: Sequence[Mapping[str, Any]]) -> Integers:
        """Without those of empty documents, which have no row in a padded batch's loss either."""
        if self.splits_rows and "seq_lengths" in examples[0]:
            lengths = np.concatenate([np.asarray(example["seq_lengths"], dtype=np.int64) for example in examples])
        else:
            lengths = np.array([len(example["input_ids"]) for example in examples], dtype=np.int64)
        return lengths[lengths > 0]
