"""Packed rows in, one batch of static shape out.

The keys and their meaning are those of TRL's `DataCollatorForLanguageModeling(padding_free=True)` on packed rows.
What is added: each bin is padded to the capacity, so that every batch has the same shape. The padding of a bin, its
tail, is one segment of its own with labels of -100, which `cu_seqlens` covers: a row of queries that no segment covers
may hold NaN, and 0 · NaN in a weight gradient is NaN. Nobody reads the tail, but the model computes on it, so it holds
nothing that the documents do not hold:

- Its positions start again at the length of the batch's longest document. A larger one would change what dynamic and
  long RoPE make of the documents (they look at the largest position in the batch) and has no row in a table of learned
  positions.
- Its tokens are those of the batch's first document over and over. The padding token's embedding may be all zeros,
  where the gradient of a norm without an epsilon is NaN.

Legend: N bins in the batch, C the capacity, S = N · C tokens in the one row, G segments (documents and paddings).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from chronicals_trl.packing.bfd import check_capacity
from chronicals_trl.packing.label_rows import IGNORE_INDEX

__all__ = ["IGNORE_INDEX", "PackedCollator"]

Example = Mapping[str, Any]


@dataclass
class PackedCollator:
    """Collates rows of a packed data set (`pack_dataset`, or `trl.pack_dataset`) into one padding-free batch.

    Returns for N rows, on the CPU:
        input_ids, labels, position_ids: (1, S) int64. A document's first label is -100: the token has no predecessor
            in its document.
        cu_seq_lens_q, cu_seq_lens_k: (G + 1,) int32, or longer by the repeated last value (empty documents) where a
            bucket is set; one tensor under both names.
        max_length_q, max_length_k: int, `max_segment_length`; the capacity for a batch with a longer document.
        seq_idx: (1, S) int32, the segment that each token is in.
        num_real_tokens: int, tokens that are not padding. Not for the model: the trainer takes it out.
        token_mask: (1, S) bool, True where a token is not padding; only if asked for.

    Attributes:
        pad_token_id: what padding holds in a batch without any token, unless `filler_ids` are given.
        capacity: C, the tokens that a bin is padded to.
        max_segment_length: the longest segment of a training batch, padding included (PackStats.max_segment_length);
            the capacity when None. Static, because kernels are chosen by it.
        max_docs_per_bin: most documents in a bin (PackStats.max_docs_per_bin). With a bucket set it makes the length
            of `cu_seq_lens_*` the same for all batches of N bins, and longer for a batch with more documents.
        cu_seqlens_bucket: round the length of `cu_seq_lens_*` up to a multiple of this; None keeps it exact, which
            linear-attention models need.
        fallback: the collator for rows that are not packed (without "seq_lengths"); None makes them an error.
        emit_token_mask: add `token_mask`.
        filler_ids: real tokens for a batch without any (on one of several ranks all rows may be empty ones).

    Raises (when called):
        ValueError: rows that are not packed and no fallback; a row longer than the capacity, or whose `seq_lengths`
            do not add up to its tokens.
    """

    pad_token_id: int
    capacity: int
    max_segment_length: int | None = None
    max_docs_per_bin: int | None = None
    cu_seqlens_bucket: int | None = None
    fallback: Callable[[list[Any]], dict[str, Any]] | None = None
    emit_token_mask: bool = False
    filler_ids: Sequence[int] = ()

    def __post_init__(self) -> None:
        self.capacity = check_capacity(self.capacity)
        for name in ("max_segment_length", "max_docs_per_bin", "cu_seqlens_bucket"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value!r}; it must be None or at least 1.")

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        if not examples:
            raise ValueError("examples is empty; a batch needs at least one row.")
        if "seq_lengths" not in examples[0]:
            if self.fallback is None:
                raise ValueError(
                    f"The rows have the columns {sorted(examples[0])} and no 'seq_lengths': pack the data set with "
                    "chronicals_trl.packing.pack_dataset, or give PackedCollator a fallback for rows that are not."
                )
            return self.fallback(list(examples))

        rows = [np.asarray(example["seq_lengths"], dtype=np.int64) for example in examples]
        longest_document = max((int(row.max()) for row in rows if len(row)), default=1)
        filler = self._filler(examples)
        longest_padding = self.max_segment_length or self.capacity  # the bound holds for long tails too, in pieces

        size = len(examples) * self.capacity
        input_ids_S = np.empty(size, dtype=np.int64)
        labels_S = np.full(size, IGNORE_INDEX, dtype=np.int64)
        position_ids_S = np.empty(size, dtype=np.int64)
        segments: list[NDArray[np.int64]] = []
        for row, (example, seq_lengths) in enumerate(zip(examples, rows, strict=True)):
            num_tokens = len(example["input_ids"])
            self._check_row(row, seq_lengths, num_tokens)
            begin = row * self.capacity
            end, stop = begin + num_tokens, begin + self.capacity
            input_ids_S[begin:end] = example["input_ids"]
            labels_S[begin:end] = example.get("labels", example["input_ids"])
            starts = np.cumsum(seq_lengths) - seq_lengths
            labels_S[begin + starts] = IGNORE_INDEX
            position_ids_S[begin:end] = np.arange(num_tokens) - np.repeat(starts, seq_lengths)
            segments.append(seq_lengths)
            if end < stop:
                tail = np.arange(stop - end)
                input_ids_S[end:stop] = filler[tail % len(filler)]
                position_ids_S[end:stop] = tail % longest_padding % longest_document
                segments.append(np.bincount(tail // longest_padding))

        segments_G = np.concatenate(segments)
        seq_idx_S = np.repeat(np.arange(len(segments_G), dtype=np.int32), segments_G)
        cu_seqlens = np.full(self._padded_length(len(examples), len(segments_G) + 1), size, dtype=np.int32)
        cu_seqlens[0] = 0
        np.cumsum(segments_G, out=cu_seqlens[1 : len(segments_G) + 1])

        batch = {
            "input_ids": torch.from_numpy(input_ids_S)[None],
            "labels": torch.from_numpy(labels_S)[None],
            "position_ids": torch.from_numpy(position_ids_S)[None],
            "seq_idx": torch.from_numpy(seq_idx_S)[None],
            "num_real_tokens": sum(len(example["input_ids"]) for example in examples),
        }
        batch["cu_seq_lens_q"] = batch["cu_seq_lens_k"] = torch.from_numpy(cu_seqlens)
        batch["max_length_q"] = batch["max_length_k"] = self._max_length(int(segments_G.max()))
        if self.emit_token_mask:
            lengths_N = np.array([len(example["input_ids"]) for example in examples])
            batch["token_mask"] = torch.from_numpy(np.arange(self.capacity) < lengths_N[:, None]).view(1, size)
        return batch

    def _filler(self, examples: Sequence[Example]) -> NDArray[np.int64]:
        """What a tail holds, over and over: the first document of the batch."""
        for example in examples:
            if len(example["seq_lengths"]):
                return np.asarray(example["input_ids"][: int(example["seq_lengths"][0])], dtype=np.int64)
        return np.asarray(list(self.filler_ids) or [self.pad_token_id], dtype=np.int64)

    def _max_length(self, longest: int) -> int:
        """A bound on the batch's segments. A kernel that is told too small a maximum leaves queries out silently."""
        known = self.max_segment_length
        return self.capacity if known is None or longest > known else known

    def _check_row(self, row: int, seq_lengths: NDArray[np.int64], num_tokens: int) -> None:
        if num_tokens > self.capacity:
            raise ValueError(
                f"Row {row} of the batch has {num_tokens} tokens and the capacity is {self.capacity}: the data set "
                "was packed with another max_length than this collator was made for."
            )
        if seq_lengths.sum() != num_tokens or (seq_lengths < 1).any():
            raise ValueError(
                f"Row {row} of the batch has {num_tokens} input_ids and the seq_lengths {seq_lengths.tolist()}; they "
                "must be positive and add up to the tokens: pack the data set again."
            )

    def _padded_length(self, num_bins: int, exact: int) -> int:
        """The entries of cu_seqlens, the repeated ones among them."""
        if self.cu_seqlens_bucket is None:
            return exact
        # A bin has at most max_docs_per_bin documents and, as a rule, one padding.
        static = 0 if self.max_docs_per_bin is None else num_bins * (self.max_docs_per_bin + 1) + 1
        wanted = max(static, exact)
        return -(-wanted // self.cu_seqlens_bucket) * self.cu_seqlens_bucket
