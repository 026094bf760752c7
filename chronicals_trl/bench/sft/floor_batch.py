"""The batch that the floor of `bench sft` is measured on: one step of our side, its documents where they lie."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from chronicals_trl.bench.sft.cases import Documents, Task
from chronicals_trl.config import ChronicalsConfig

__all__ = ["Batch", "make_batch"]

#: Steps that are drawn; the batch is the one in the middle by attention's work.
DRAWN = 65


@dataclass(frozen=True)
class Batch:
    """One step's tokens.

    Args:
        tokens: All positions computed, padding with them.
        real_tokens: Those of documents.
        squares: Sum of the squared lengths of the documents, padding left out: attention's necessary work.
        cu_seqlens: Where documents begin and end, padding as documents, empty ones at the end.
        max_seqlen: The static bound that attention is given.
    """

    tokens: int
    real_tokens: int
    squares: int
    cu_seqlens: tuple[int, ...]
    max_seqlen: int


def make_batch(task: Task) -> Batch:
    """The median of some steps of `task`, packed by our own planner, one behind the other or padded, as it says."""
    lengths = np.minimum(Documents.load(task.documents).lengths, task.row_tokens)
    rng = np.random.default_rng(task.seed)
    if task.packs:
        return _packed(task, lengths, rng)
    padded = task.chronicals.get("padding_free", ChronicalsConfig().padding_free) == "off"
    return _padded(task, lengths, rng) if padded else _unpadded(task, lengths, rng)


def _packed(task: Task, lengths: np.ndarray[tuple[int], np.dtype[np.int64]], rng: np.random.Generator) -> Batch:
    from chronicals_trl.packing import PackedCollator
    from chronicals_trl.packing.bfd import pack_lengths
    from chronicals_trl.packing.trainer import CU_SEQLENS_BUCKET

    plan = pack_lengths(lengths, task.row_tokens)
    bins = np.split(plan.lengths, plan.bin_offsets[1:-1])
    tails = task.row_tokens - plan.bin_tokens
    documents = np.diff(plan.bin_offsets)
    # As the trainer asks for it: as many documents as most rows hold, not as the fullest does.
    usual = min(int(documents.max()), math.ceil(len(plan.lengths) / len(bins)) + CU_SEQLENS_BUCKET // 2)
    collate = PackedCollator(
        pad_token_id=0, capacity=task.row_tokens, max_segment_length=int(max(plan.lengths.max(), tails.max())),
        max_docs_per_bin=usual, cu_seqlens_bucket=CU_SEQLENS_BUCKET,
    )  # fmt: skip
    steps = [rng.choice(len(bins), task.rows, replace=len(bins) < task.rows) for _ in range(DRAWN)]
    chosen = _middle([np.concatenate([bins[i] for i in step]) for step in steps])
    rows = [{"input_ids": [0] * int(bins[i].sum()), "seq_lengths": bins[i]} for i in steps[chosen]]
    made = collate(rows)
    inside = np.concatenate([bins[i] for i in steps[chosen]])
    return Batch(
        made["input_ids"].numel(), int(inside.sum()), int(np.square(inside).sum()),
        tuple(made["cu_seq_lens_q"].tolist()), int(made["max_length_q"]),
    )  # fmt: skip


def _padded(task: Task, lengths: np.ndarray[tuple[int], np.dtype[np.int64]], rng: np.random.Generator) -> Batch:
    """Rows as long as the longest document; in each the padding is attended to as a document of its own."""
    steps = [rng.choice(lengths, task.rows, replace=len(lengths) < task.rows) for _ in range(DRAWN)]
    step = steps[_middle(steps)]
    longest = int(step.max())
    parts = [part for length in step.tolist() for part in (length, longest - length) if part]
    return Batch(
        longest * task.rows, int(step.sum()), int(np.square(step).sum()), tuple(np.cumsum([0, *parts]).tolist()),
        longest,
    )  # fmt: skip


def _unpadded(task: Task, lengths: np.ndarray[tuple[int], np.dtype[np.int64]], rng: np.random.Generator) -> Batch:
    """One row of the documents alone; what graphs add to it, so that its length recurs, is not necessary."""
    steps = [rng.choice(lengths, task.rows, replace=len(lengths) < task.rows) for _ in range(DRAWN)]
    step = steps[_middle(steps)]
    tokens = int(step.sum())
    return Batch(tokens, tokens, int(np.square(step).sum()), (0, *np.cumsum(step).tolist()), int(step.max()))


def _middle(steps: Sequence[np.ndarray[tuple[int], np.dtype[np.int64]]]) -> int:
    squares = [int(np.square(step).sum()) for step in steps]
    return int(np.argsort(squares, kind="stable")[len(squares) // 2])
