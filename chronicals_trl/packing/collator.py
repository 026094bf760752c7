"""Packed rows in, one batch of static shape out.

The keys and their meaning are those of TRL's `DataCollatorForLanguageModeling(padding_free=True)` on packed rows.
What is added: each bin is padded to the capacity, so that every batch has the same shape. The padding of a bin is one
document of its own, with positions from 0 and labels of -100, which `cu_seqlens` covers: a row of queries that no
segment covers may hold NaN, and 0 · NaN in a weight gradient is NaN.

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

__all__ = ["IGNORE_INDEX", "PackedCollator"]

IGNORE_INDEX = -100

Example = Mapping[str, Any]


@dataclass
class PackedCollator:
    """Collates rows of a packed data set (`pack_dataset`, or `trl.pack_dataset`) into one padding-free batch.

    Returns for N rows, on the CPU:
        input_ids, labels, position_ids: (1, S) int64. A document's first label is -100: the token has no predecessor
            in its document.
        cu_seq_lens_q, cu_seq_lens_k: (G + 1,) int32, or longer by the repeated last value (empty documents) where a
            bucket is set; one tensor under both names.
        max_length_q, max_length_k: int, `max_segment_length`.
        seq_idx: (1, S) int32, the segment that each token is in.
        num_real_tokens: int, tokens that are not padding. Not for the model: the trainer takes it out.
        token_mask: (1, S) bool, True where a token is not padding; only if asked for.

    Attributes:
        pad_token_id: what padding holds.
        capacity: C, the tokens that a bin is padded to.
        max_segment_length: the longest segment of any batch, padding included (PackStats.max_segment_length); the
            capacity when None. Static, because kernels are chosen by it.
        max_docs_per_bin: most documents in a bin (PackStats.max_docs_per_bin). With a bucket set it makes the length
            of `cu_seq_lens_*` the same for all batches of N bins.
        cu_seqlens_bucket: round the length of `cu_seq_lens_*` up to a multiple of this; None keeps it exact, which
            linear-attention models need.
        fallback: the collator for rows that are not packed (without "seq_lengths"); None makes them an error.
        emit_token_mask: add `token_mask`.

    Raises (when called):
        ValueError: rows that are not packed and no fallback; a row longer than the capacity, or whose `seq_lengths`
            do not add up to its tokens; a segment longer than `max_segment_length`.
    """

    pad_token_id: int
    capacity: int
    max_segment_length: int | None = None
    max_docs_per_bin: int | None = None
    cu_seqlens_bucket: int | None = None
    fallback: Callable[[list[Any]], dict[str, Any]] | None = None
    emit_token_mask: bool = False

    def __post_init__(self) -> None:
        self.capacity = check_capacity(self.capacity)
        if self.max_segment_length is None:
            self.max_segment_length = self.capacity
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

        size = len(examples) * self.capacity
        input_ids_S = np.full(size, self.pad_token_id, dtype=np.int64)
        labels_S = np.full(size, IGNORE_INDEX, dtype=np.int64)
        real_S = np.zeros(size, dtype=bool)
        segments: list[NDArray[np.int64]] = []
        for row, example in enumerate(examples):
            seq_lengths = np.asarray(example["seq_lengths"], dtype=np.int64)
            num_tokens = len(example["input_ids"])
            self._check_row(row, seq_lengths, num_tokens)
            bin_ = slice(row * self.capacity, row * self.capacity + num_tokens)
            input_ids_S[bin_] = example["input_ids"]
            labels_S[bin_] = example.get("labels", example["input_ids"])
            real_S[bin_] = True
            segments.append(seq_lengths)
            if num_tokens < self.capacity:
                segments.append(np.array([self.capacity - num_tokens], dtype=np.int64))

        segments_G = np.concatenate(segments)
        longest = int(segments_G.max())
        if self.max_segment_length is None or longest > self.max_segment_length:
            raise ValueError(
                f"A document, or the padding of a bin, has {longest} tokens; max_segment_length is "
                f"{self.max_segment_length} and must be at least that: take the largest over the data sets that this "
                "collator serves, or None for the capacity."
            )
        cu_seqlens = np.concatenate([[0], np.cumsum(segments_G)])
        starts_G = cu_seqlens[:-1]
        labels_S[starts_G] = IGNORE_INDEX
        position_ids_S = np.arange(size, dtype=np.int64) - np.repeat(starts_G, segments_G)
        seq_idx_S = np.repeat(np.arange(len(segments_G), dtype=np.int32), segments_G)
        cu_seqlens = np.pad(cu_seqlens, (0, self._padded_length(len(examples), len(cu_seqlens))), mode="edge")

        batch: dict[str, Any] = {
            "input_ids": torch.from_numpy(input_ids_S)[None],
            "labels": torch.from_numpy(labels_S)[None],
            "position_ids": torch.from_numpy(position_ids_S)[None],
            "seq_idx": torch.from_numpy(seq_idx_S)[None],
            "num_real_tokens": int(real_S.sum()),
        }
        batch["cu_seq_lens_q"] = batch["cu_seq_lens_k"] = torch.from_numpy(cu_seqlens.astype(np.int32))
        batch["max_length_q"] = batch["max_length_k"] = self.max_segment_length
        if self.emit_token_mask:
            batch["token_mask"] = torch.from_numpy(real_S)[None]
        return batch

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
        """How many times the last value of cu_seqlens is repeated."""
        if self.cu_seqlens_bucket is None:
            return 0
        # A bin has at most max_docs_per_bin documents and one padding.
        static = 0 if self.max_docs_per_bin is None else num_bins * (self.max_docs_per_bin + 1) + 1
        wanted = max(static, exact)
        return -(-wanted // self.cu_seqlens_bucket) * self.cu_seqlens_bucket - exact
