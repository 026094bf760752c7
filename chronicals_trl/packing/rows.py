"""The rows of a plan as Arrow batches, copied from the documents' columns a bounded piece at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from datasets import Features

from chronicals_trl.packing import columns as token_columns
from chronicals_trl.packing.bfd import PackPlan
from chronicals_trl.packing.columns import Integers, TokenColumns, token_blocks

__all__ = ["packed_batches", "packed_schema"]


def packed_schema(value_types: dict[str, pa.DataType]) -> pa.Schema:
    """The Arrow schema of packed rows, with what `datasets` writes into one."""
    lists = {name: pa.list_(value_type) for name, value_type in value_types.items()}
    plain = pa.schema({**lists, "seq_lengths": pa.list_(pa.int32())})
    return Features.from_arrow_schema(plain).arrow_schema


def packed_batches(
    columns: TokenColumns,
    plan: PackPlan,
    kept: Integers | None,
    schema: pa.Schema,
    *,
    empty_bins: int = 0,
    one_segment: bool = False,
) -> Iterator[pa.RecordBatch]:
    """The rows of the plan, at most `PIECE_TOKENS` tokens (or one bin) to a batch, then the empty ones.

    Args:
        columns: where the documents are.
        plan: which of them go where.
        kept: the documents that the plan's `doc_ids` count; None: all.
        schema: of `packed_schema`.
        empty_bins: rows without tokens.
        one_segment: a row is one segment, whatever it is made of.
    """
    names = [name for name in schema.names if name != "seq_lengths"]
    for bins in token_blocks(plan.bin_tokens, token_columns.PIECE_TOKENS):
        offsets = plan.bin_offsets[bins.start : bins.stop + 1]
        piece = slice(offsets[0], offsets[-1])
        documents = plan.doc_ids[piece] if kept is None else kept[plan.doc_ids[piece]]
        lengths = plan.lengths[piece]
        flat = columns.gather(documents, plan.starts[piece], lengths)
        tokens = plan.bin_tokens[bins]
        ends = np.concatenate([[0], np.cumsum(tokens)])
        lists = [_lists(ends, flat[name], schema.field(name).type) for name in names]
        if one_segment:
            offsets, lengths = np.arange(len(tokens) + 1), tokens
        lists.append(_lists(offsets - offsets[0], lengths, schema.field("seq_lengths").type))
        yield pa.RecordBatch.from_arrays(lists, schema=schema)
    if empty_bins:
        nothing = [pa.array([[]] * empty_bins, type=field.type) for field in schema]
        yield pa.RecordBatch.from_arrays(nothing, schema=schema)


def _lists(offsets: Integers, values: Integers, kind: pa.DataType) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets, type=pa.int32()), pa.array(values, type=kind.value_type))
