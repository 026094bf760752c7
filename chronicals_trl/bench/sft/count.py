"""Real tokens of a batch, counted from the batch itself and alike for every side.

Frameworks count by rules of their own (with or without padding, with or without a document's first token, which has no
loss). Here a document is real if any of its tokens has a label, and then all its tokens count: the padding at the end
of a packed row, which some collators make a document of its own, has none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["Counted", "document_lengths"]

IGNORED = -100


def document_lengths(batch: Mapping[str, Any]) -> list[int]:
    """Lengths of the real documents in a batch, padding left out.

    Args:
        batch: `input_ids` (B, S); `labels` (B, S); and what tells documents and padding apart, the first that is
            there of `position_ids` (a document begins at 0), `packed_seq_lengths`, `cu_seq_lens_q`; without any, each
            row is one. `attention_mask` (B, S), where it is there, is 0 on padding.
    """
    ids: Tensor = batch["input_ids"]
    labels = batch.get("labels")
    mask = batch.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None or mask.ndim != 2 else mask.bool()
    labelled = real if labels is None else (labels != IGNORED) & real
    document = _starts(batch, ids).flatten().cumsum(0) - 1
    count = int(document[-1]) + 1
    sizes, with_label = (torch.zeros(count, dtype=torch.int64).index_add_(0, document, part.flatten().long())
                         for part in (real, labelled))  # fmt: skip
    lengths: list[int] = sizes[with_label > 0].tolist()
    return lengths


def _starts(batch: Mapping[str, Any], ids: Tensor) -> Tensor:
    """(B, S), True where a document begins; a row's first token always does."""
    positions = batch.get("position_ids")
    starts = torch.zeros_like(ids, dtype=torch.bool)
    if positions is not None:
        starts = (positions == 0).expand_as(ids).clone()
    else:
        lengths, offsets = batch.get("packed_seq_lengths"), batch.get("cu_seq_lens_q")
        if lengths is not None:
            offsets = lengths.flatten().long().cumsum(0)
        if offsets is not None:
            offsets = offsets.flatten().long()
            starts.view(-1)[offsets[offsets < ids.numel()]] = True
    starts[:, 0] = True
    return starts


class Counted:
    """A collator that keeps what it made, in the order of training; counted when the training is over.

    Args:
        collate: The framework's own.
    """

    _KEYS = ("input_ids", "labels", "attention_mask", "position_ids", "packed_seq_lengths", "cu_seq_lens_q")

    def __init__(self, collate: Callable[..., Any]) -> None:
        self._collate = collate
        self._batches: list[dict[str, Tensor]] = []

    def __call__(self, examples: Any) -> Any:
        batch = self._collate(examples)
        self._batches.append({key: batch[key] for key in self._KEYS if batch.get(key) is not None})
        return batch

    def batches(self, first: int, last: int) -> Iterable[tuple[list[int], int]]:
        """Of each batch from `first` to `last - 1`: lengths of the real documents, and all positions computed."""
        for batch in self._batches[first:last]:
            yield document_lengths(batch), batch["input_ids"].numel()
