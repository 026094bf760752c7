"""Data sets, looked at before anything starts: what TRL cannot read, what there is to learn, how long documents are.

Each check names the argument and the remedy. Columns are read as Arrow holds them; of a stream the first row is known.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from numpy.typing import NDArray


def check_data(name: str, data: Dataset | IterableDataset, args: Any, *, has_formatting: bool) -> None:
    example = next(iter(data), None)
    if example is None:
        raise ValueError(f"`{name}` is empty: there is nothing to train on. Check the split name and the filters.")
    columns = set(example)
    text = {args.dataset_text_field, "messages", "conversations", "input_ids", "image", "images"}
    if has_formatting:
        return
    if columns & text or {"prompt", "completion"} <= columns:
        for column in _columns_read(columns, args.dataset_text_field):
            _check_column(name, data, example, column)
            # Some data sets keep the conversation that their text was made from.
            if column != "input_ids" and (column != "conversations" or args.dataset_text_field not in columns):
                _check_messages(name, data, example, column)
                if column in ("messages", "prompt", "completion"):
                    _check_keys(name, example, column, args.dataset_text_field)
        return
    raise ValueError(
        f"`{name}` has no text: its columns are {sorted(columns)}. TRL reads {args.dataset_text_field!r} "
        "(dataset_text_field), 'messages', 'prompt' with 'completion', or 'input_ids'. Rename a column, set "
        "dataset_text_field, or pass formatting_func."
    )


def _columns_read(columns: set[str], text_field: str) -> list[str]:
    """The columns that TRL will read, in its order of precedence."""
    for group in (["input_ids"], ["prompt", "completion"], ["messages"], ["conversations"], [text_field]):
        if set(group) <= columns:
            return group
    return []


def _check_column(name: str, data: Dataset | IterableDataset, example: Any, column: str) -> None:
    """Raise ValueError where a row of `column` is missing or is no text (or messages, or tokens)."""
    if isinstance(data, Dataset) and data.format["type"] != "custom":
        values = data.data.column(column)
        missing = _selected(data, values.is_null().to_numpy()) if values.null_count else np.zeros(0, dtype=bool)
        count, total, first = int(missing.sum()), f" of {len(data):,}", int(missing.argmax()) if len(missing) else 0
        kind: Any = values.type
        fits = pa.types.is_null(kind) or _is_nested(kind) or (_is_text(kind) and column != "input_ids")
    else:  # of a stream the first row is known; of a transform likewise
        count, total, first = int(example[column] is None), "", 0
        kind = type(example[column]).__name__
        fits = not isinstance(example[column], (bool, int, float))
    if count:
        raise ValueError(
            f"`{name}` has no value (None) in the column {column!r} of {count:,}{total} rows, first in row {first}. "
            f"Drop them: dataset.filter(lambda row: row[{column!r}] is not None)."
        )
    if not fits:
        raise ValueError(
            f"`{name}` holds {kind} in the column {column!r}, where TRL reads "
            + (
                "lists of token ids: rename the column, or tokenise it."
                if column == "input_ids"
                else "text. Name the text column with dataset_text_field, or convert this one: "
                f"dataset.cast_column({column!r}, datasets.Value('string'))."
            )
        )


def _check_messages(name: str, data: Dataset | IterableDataset, example: Any, column: str) -> None:
    """Raise ValueError where a conversation has no messages, or `conversations` holds what TRL does not read there."""
    if isinstance(data, Dataset) and data.format["type"] != "custom":
        if not _is_list(data.data.schema.field(column).type):
            return
        empty, total = list_lengths(data, column) == 0, f" of {len(data):,}"
    else:  # of a stream the first row is known; of a transform likewise
        empty, total = np.array([isinstance(example[column], list) and not example[column]]), ""
    if empty.any():
        raise ValueError(
            f"`{name}` has no messages (an empty list) in the column {column!r} of {int(empty.sum()):,}{total} rows, "
            f"first in row {int(empty.argmax())}. Drop them: dataset.filter(lambda row: len(row[{column!r}]) > 0)."
        )
    first = example[column][0] if isinstance(example[column], list) else None
    if column == "conversations" and isinstance(first, dict) and "from" not in first:
        raise ValueError(
            f"`{name}` has messages with the keys {sorted(first)} in the column 'conversations', where TRL reads "
            "'from' and 'value'. Name the column as TRL wants it: dataset.rename_column('conversations', 'messages')."
        )


def _check_keys(name: str, example: dict[str, Any], column: str, text_field: str) -> None:
    """Raise ValueError where the first row of `column` holds no messages that TRL can read: each a role and a content.

    TRL goes by the first message's role. Without one it passes over the column, and then finds nothing to tokenise.
    """
    row, turns = example[column], example.get("conversations")
    if isinstance(turns, list) and turns and isinstance(turns[0], dict) and {"from", "value"} <= set(turns[0]):
        return  # TRL converts these, and renames keys of the other columns along with them
    keys = set(row[0]) if isinstance(row, list) and isinstance(row[0], dict) else set()
    if column == "messages" != text_field and text_field in example and "role" not in keys:
        return  # the text is learned
    if isinstance(row, str) and column == "messages":
        found = "text"
        remedy = (
            "If it is JSON, parse it: dataset.map(lambda row: {'messages': json.loads(row['messages'])}). To learn it "
            "as it is: dataset.rename_column('messages', 'text'), with dataset_text_field='text'."
        )
    elif isinstance(row, list):
        messages = [message for message in row if isinstance(message, dict)]
        # What calls a tool may have no content.
        if "role" in keys and any({"content", "tool_calls"} & set(message) for message in messages):
            return
        found = f"messages with the keys {sorted(keys)}" if keys else f"lists of {type(row[0]).__name__}"
        remedy = (
            f"Make them: dataset.map(lambda row: {{{column!r}: [{{'role': ..., 'content': ...}} for message in "
            f"row[{column!r}]]}})."
        )
        if column == "messages" and {"from", "value"} <= keys:
            remedy = "Name the column as TRL wants it: dataset.rename_column('messages', 'conversations')."
    else:  # text, in a prompt or a completion; or an array, from a set in numpy's format
        return
    raise ValueError(
        f"`{name}` has {found} in the column {column!r}, where TRL reads messages with 'role' and 'content'. {remedy}"
    )


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or kind == pa.string_view())


def _is_nested(kind: pa.DataType) -> bool:
    return bool(_is_list(kind) or pa.types.is_nested(kind) or isinstance(kind, pa.BaseExtensionType))


def require_labels(data: Any, limit: int | None, *, keep_end: bool = False) -> None:
    """Raise ValueError when there are no tokens, or no document has one to learn; stops at the first that has one.

    The first token of a document has no predecessor to be predicted from.

    Args:
        data: the prepared training set; a stream is not looked at.
        limit: tokens that will be left of a longer document; None if it will not be cut.
        keep_end: whether those are its last ones.
    """
    if not isinstance(data, Dataset):
        return
    column = "labels" if "labels" in data.column_names else "input_ids"
    if column not in data.column_names:
        raise ValueError(
            f"`train_dataset` has neither input_ids nor labels after it was prepared: its columns are "
            f"{sorted(data.column_names)}, of which TRL took none for text or messages. Pass 'messages' (lists of "
            "messages with 'role' and 'content'), 'prompt' with 'completion', or text, named by dataset_text_field."
        )
    if not _is_list(data.data.schema.field(column).type):
        return
    for table in data.select_columns([column]).with_format("arrow").iter(batch_size=1000):
        for chunk in table.column(0).chunks:
            offsets = chunk.offsets.to_numpy()
            values = chunk.values.to_numpy(zero_copy_only=False)[offsets[0] : offsets[-1]]
            lengths = np.diff(offsets)
            positions = np.arange(len(values)) - np.repeat(offsets[:-1] - offsets[0], lengths)
            if limit is not None and keep_end:
                positions -= np.repeat(np.maximum(lengths - limit, 0), lengths)
            learnable = (values != -100) & (positions > 0)
            if limit is not None:
                learnable &= positions < limit
            if learnable.any():
                return
    raise ValueError(
        f"`train_dataset` has nothing to learn: none of its {len(data):,} documents has a labelled token after its "
        f"first one{'' if limit is None else f' within max_length={limit}'}. Look at the labels (all -100? then "
        "the prompts may fill max_length, or a mask be empty) and at the texts (empty, or of one token?)."
    )


def require_known_tokens(name: str, data: Any, vocabulary: int) -> None:
    """Raise ValueError when a token of `data` has no row in the embedding, which a GPU answers with a device assert.

    One pass of pyarrow over the columns; a stream is not looked at.
    """
    if not isinstance(data, Dataset):
        return
    for column in {"input_ids", "labels"} & set(data.column_names):
        kind = data.data.schema.field(column).type
        if not (_is_list(kind) and pa.types.is_integer(kind.value_type)):
            continue
        low, high = _extremes(data.data.column(column))
        outside = low < (0 if column == "input_ids" else -100) or high >= vocabulary
        if outside and data._indices is not None:  # the rows that are not selected count for nothing
            tables = data.select_columns([column]).with_format("arrow").iter(batch_size=1000)
            lows, highs = zip(*(_extremes(table.column(0)) for table in tables), strict=True)
            low, high = min(lows), max(highs)
        if low < (0 if column == "input_ids" else -100) or high >= vocabulary:
            wrong = f"as large as {high}" if high >= vocabulary else f"as small as {low}"
            raise ValueError(
                f"`{name}` has {column} {wrong}, but the model's embedding has {vocabulary} rows (0 to "
                f"{vocabulary - 1}): the data was made with another tokenizer, or the model needs "
                "model.resize_token_embeddings(len(tokenizer))."
            )


def _extremes(column: pa.ChunkedArray) -> tuple[int, int]:
    low, high = 0, 0
    for chunk in column.chunks:
        found = pc.min_max(chunk.flatten())
        if found["min"].is_valid:
            low, high = min(low, found["min"].as_py()), max(high, found["max"].as_py())
    return low, high


def came_packed(name: str, data: Dataset | IterableDataset, max_length: int) -> bool:
    """Whether the rows are packed already: by `trl.pack_dataset`, or ours that `evaluate` hands over again.

    Judged by what such rows are, `input_ids` with `seq_lengths` that add up to them, and not by the column's name
    alone: a user may have a column called "seq_lengths" of another meaning, and a selection of packed rows is packed.

    Raises:
        ValueError: `seq_lengths` that do not add up, or a row longer than `max_length`.
    """
    if isinstance(data, Dataset):
        if not {"input_ids", "seq_lengths"} <= set(data.column_names):
            return False
        kind = data.data.schema.field("seq_lengths").type
        if not (_is_list(kind) and pa.types.is_integer(kind.value_type)):
            return False  # one number a row, say: a column of the user's own, which TRL drops as well
        tokens, sums = list_lengths(data, "input_ids"), _list_sums(data, "seq_lengths")
    else:
        row = next(iter(data), None) or {}
        if not ("input_ids" in row and isinstance(row.get("seq_lengths"), (list, tuple))):
            return False
        # The collator checks the other rows of a stream as they come.
        tokens, sums = np.array([len(row["input_ids"])]), np.array([sum(row["seq_lengths"])])
    wrong = np.flatnonzero(tokens != sums)
    if len(wrong):
        raise ValueError(
            f"The {name} has a column 'seq_lengths', as packed rows have, but in row {wrong[0]} it adds up to "
            f"{sums[wrong[0]]} and there are {tokens[wrong[0]]} input_ids. If the rows are documents, remove the "
            "column (dataset.remove_columns('seq_lengths')); if they are packed rows, pack them again."
        )
    longest = int(tokens.max(initial=0))
    if longest > max_length:
        raise ValueError(
            f"The {name} came packed (it has 'seq_lengths') in rows of up to {longest} tokens, but "
            f"max_length={max_length}. Set max_length={longest}, or pass the documents in place of packed rows."
        )
    return True


def list_lengths(data: Dataset, column: str) -> NDArray[np.int64]:
    """The lengths of a list column's rows, without reading the values."""
    lengths = pc.list_value_length(data.data.column(column)).fill_null(0).to_numpy().astype(np.int64)
    return _selected(data, lengths)


def has_token_lists(data: Dataset) -> bool:
    """Whether the lengths of `data`'s documents can be told from its column `input_ids`, as it is stored."""
    if data.format["type"] == "custom" or "input_ids" not in data.column_names:
        return False
    return _is_list(data.data.schema.field("input_ids").type)


def _list_sums(data: Dataset, column: str) -> NDArray[np.int64]:
    sums = []
    for chunk in data.data.column(column).chunks:
        offsets = chunk.offsets.to_numpy()
        running = np.concatenate([[0], np.cumsum(chunk.values.to_numpy(zero_copy_only=False), dtype=np.int64)])
        sums.append(running[offsets[1:]] - running[offsets[:-1]])
    return _selected(data, np.concatenate([np.zeros(0, dtype=np.int64), *sums]))


def _selected(data: Dataset, values: NDArray[Any]) -> NDArray[Any]:
    """One value a row of the table -> one a row of the data set, which a filter or a shuffle has reordered."""
    return values if data._indices is None else values[data._indices.column(0).to_numpy()]


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))
