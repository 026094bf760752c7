"""A packed data set holds what went in, once, in the rows that the plan says, whatever Arrow makes of the source."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from packing_data import LENGTHS, Rows, documents_of, expected_documents, make_rows, masked

from chronicals_trl.packing import PackedCollator, PackStats, pack_dataset, pack_lengths
from chronicals_trl.packing import columns as columns_module
from chronicals_trl.packing.columns import ListColumn, TokenColumns

COLUMNS = ("input_ids", "labels", "completion_mask")


@pytest.fixture
def on_disk(tmp_path: Path) -> Dataset:
    Dataset.from_list(make_rows(LENGTHS)).save_to_disk(tmp_path / "data", num_shards=3)
    return datasets.load_from_disk(str(tmp_path / "data"))


def test_rows_are_those_of_the_plan() -> None:
    rows = make_rows(LENGTHS)
    packed, stats = pack_dataset(Dataset.from_list(rows), 32)
    kept = [len(row["input_ids"]) for row in rows if set(row["labels"]) != {-100}]
    plan = pack_lengths(kept, 32)
    assert packed.column_names == [*COLUMNS, "seq_lengths"]
    planned = np.split(plan.lengths, plan.bin_offsets[1:-1])
    assert Counter(map(tuple, packed["seq_lengths"])) == Counter(tuple(row.tolist()) for row in planned)
    assert documents_of(packed, *COLUMNS) == expected_documents(rows, 32, *COLUMNS)
    assert stats == PackStats(
        capacity=32,
        strategy="bfd",
        documents=len(kept),
        bins=plan.num_bins,
        empty_bins=0,
        tokens=sum(kept),
        fill=plan.fill,
        lower_bound=plan.lower_bound,
        truncated_documents=0,
        truncated_tokens=0,
        split_documents=0,
        masked_pieces=0,
        dropped_empty=0,
        dropped_masked=200 - len(kept),
        max_doc_length=max(kept),
        max_segment_length=max(kept),
        max_docs_per_bin=max(len(row) for row in packed["seq_lengths"]),
    )
    # The longest documents are not all in the first rows.
    first = [row[0] for row in packed["seq_lengths"]]
    assert first != sorted(first, reverse=True)


def test_truncates_and_drops_and_counts() -> None:
    rows = make_rows([10, 0, 3, 25, 0, 8])
    packed, stats = pack_dataset(Dataset.from_list(rows), 8)
    assert documents_of(packed) == expected_documents(rows, 8)
    assert (stats.truncated_documents, stats.truncated_tokens) == (2, 2 + 17)
    assert (stats.dropped_empty, stats.dropped_masked, stats.documents, stats.max_doc_length) == (2, 0, 4, 25)
    assert (stats.tokens, stats.bins, stats.split_documents) == (27, 4, 0)
    assert stats.max_segment_length == 8  # the bin with 3 has a tail of 5
    assert "2 truncated (19 tokens lost), 2 empty dropped" in stats.describe()


def test_one_is_no_plural() -> None:
    _, stats = pack_dataset(Dataset.from_dict({"input_ids": [[1, 2, 3]]}), 4)
    assert stats.describe().startswith("1 document in 1 bin of 4 tokens, fill 0.75000, at least 1 bin needed")


def test_splits_and_keeps_every_token() -> None:
    rows = make_rows([10, 0, 3, 25, 8])
    packed, stats = pack_dataset(Dataset.from_list(rows), 8, strategy="bfd_split")
    assert documents_of(packed, *COLUMNS) == expected_documents(rows, 8, *COLUMNS, split=True)
    assert sorted(i for row in packed["input_ids"] for i in row) == list(range(1, 47))
    assert (stats.split_documents, stats.truncated_documents, stats.tokens) == (2, 0, 46)


def test_documents_without_a_label_to_learn_are_left_out() -> None:
    """As TRL filters when it does not pack: by what truncation leaves. A cut document keeps all of its pieces."""
    labels = [[-100] * 6, [-100] * 4 + [5, 6], [-100, 2], [7], [-100]]
    ids = [list(range(10 * i, 10 * i + len(row))) for i, row in enumerate(labels)]
    source = Dataset.from_dict({"input_ids": ids, "labels": labels})
    packed, stats = pack_dataset(source, 4)
    assert sorted(i for row in packed["input_ids"] for i in row) == [20, 21, 30]
    assert (stats.documents, stats.dropped_masked, stats.truncated_documents) == (2, 3, 0)
    assert "3 without a label to learn dropped" in stats.describe()
    packed, stats = pack_dataset(source, 4, strategy="bfd_split")
    assert sorted(i for row in packed["input_ids"] for i in row) == [*ids[1], 20, 21, 30]
    assert (stats.documents, stats.dropped_masked, stats.split_documents) == (3, 2, 1)
    assert stats.masked_pieces == 1 and "1 split (1 piece without a label to learn)" in stats.describe()
    # A prompt of three rows, after a document that is dropped; the second and the third piece of four are labelled.
    labels = [[-100] * 3, [-100] * 13 + [1], [-100] * 5 + [2] + [-100] * 3 + [3] + [-100] * 5]
    source = Dataset.from_dict({"input_ids": [[7] * len(row) for row in labels], "labels": labels})
    assert pack_dataset(source, 4, strategy="bfd_split")[1].masked_pieces == 3 + 2
    assert pack_dataset(source.remove_columns("labels"), 4, strategy="bfd_split")[1].masked_pieces == 0


def test_labels_are_found_a_run_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns_module, "_RUN", 7)
    monkeypatch.setattr(columns_module, "PIECE_TOKENS", 20)
    rows = make_rows([*LENGTHS, 0, 0])
    found = TokenColumns.of_dataset(Dataset.from_list(rows)).have_labels(np.array([*LENGTHS, 0, 0]))
    assert found.tolist() == [any(label != -100 for label in row["labels"]) for row in rows]


def test_nothing_to_learn_says_so() -> None:
    source = Dataset.from_dict({"input_ids": [[1, 2, 3], [], [4]], "labels": [[-100, -100, 3], [], [-100]]})
    with pytest.raises(ValueError, match=r"nothing to learn: every label of its 2 documents .* the first 2\. Look"):
        pack_dataset(source, 2)


def test_wrapped_has_the_meaning_that_trl_gives_it() -> None:
    """Documents one after another in the order given, nothing left out, a row one segment; here over the whole set."""
    import trl

    rows = make_rows([10, 0, 3, 25, 8, 1, 9, 6])
    source = Dataset.from_list(rows)
    packed, stats = pack_dataset(source, 8, strategy="wrapped", pad_bins_to_multiple_of=5)
    theirs = trl.pack_dataset(source, 8, "wrapped")
    assert packed.remove_columns("seq_lengths").to_list()[: len(theirs)] == theirs.to_list()
    assert packed["seq_lengths"][:] == [[8]] * 7 + [[6]] + [[]] * 2
    assert (stats.bins, stats.empty_bins, stats.tokens, stats.documents) == (8, 2, 62, 7)
    # At 8, 16, ... 56 the four documents are cut, one of them often; at 56 one ends.
    assert (stats.split_documents, stats.dropped_masked, stats.max_docs_per_bin) == (4, 0, 1)
    assert stats.fill == 62 / 64 and stats.max_segment_length == 8
    assert "attend to each other" in stats.describe()


def test_max_segment_length_counts_the_padding() -> None:
    _, stats = pack_dataset(Dataset.from_list(make_rows([3])), 8)
    assert (stats.max_doc_length, stats.max_segment_length) == (3, 5)


def test_empty_bins_fill_up_the_multiple() -> None:
    packed, stats = pack_dataset(Dataset.from_list(make_rows([8] * 5)), 8, pad_bins_to_multiple_of=4)
    assert len(packed) == 8 and (stats.bins, stats.empty_bins) == (5, 3)
    assert packed["input_ids"][5:] == packed["seq_lengths"][5:] == packed["completion_mask"][5:] == [[], [], []]
    assert stats.max_segment_length == 8 and stats.fill == 1.0
    packed, stats = pack_dataset(Dataset.from_list(make_rows([8] * 4)), 8, pad_bins_to_multiple_of=4)
    assert len(packed) == 4 and stats.empty_bins == 0


def test_pieces_join_up(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = pack_dataset(Dataset.from_list(make_rows(LENGTHS)), 32)
    for tokens in (1, 33, 1000):
        monkeypatch.setattr(columns_module, "PIECE_TOKENS", tokens)
        pieces, _ = pack_dataset(Dataset.from_list(make_rows(LENGTHS)), 32)
        chunks = pieces.data.table.column(0).chunks
        assert len(chunks) > len(whole.data.table.column(0).chunks)
        assert all(len(chunk) == 1 or len(chunk.flatten()) <= tokens for chunk in chunks)
        assert pieces.to_list() == whole.to_list()


def test_runs_of_lengths_join_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns_module, "_RUN", 7)
    blocks = list(columns_module.token_blocks(np.array(LENGTHS), 60))
    assert [i for block in blocks for i in range(block.start, block.stop)] == list(range(200))
    sums = [sum(LENGTHS[block]) for block in blocks]
    assert all(total <= 60 for total in sums)
    # As full as can be, but for the ends of runs.
    full = [left + LENGTHS[right.start] > 60 for left, right in zip(sums, blocks[1:], strict=False)]
    assert all(is_full or right.start % 7 == 0 for is_full, right in zip(full, blocks[1:], strict=False))


# -- what Arrow makes of the source ----------------------------------------------------------------------------------


def test_follows_a_shuffled_and_filtered_data_set(on_disk: Dataset) -> None:
    for source in (Dataset.from_list(make_rows(LENGTHS)), on_disk):
        chosen = source.shuffle(seed=3).select(range(50)).with_format("torch", columns=["labels"])
        packed, stats = pack_dataset(chosen, 32)
        rows = chosen.with_format(None).to_list()
        assert stats.documents == 50 - masked(rows, 32)
        assert documents_of(packed, *COLUMNS) == expected_documents(rows, 32, *COLUMNS)


@pytest.mark.parametrize("kind", [pa.list_(pa.int32()), pa.large_list(pa.uint16()), pa.list_(pa.int64(), 4)])
def test_keeps_integer_types(kind: pa.DataType) -> None:
    ids = pa.array([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]], type=kind)
    source = Dataset(pa.table({"input_ids": ids, "labels": pa.array(ids.to_pylist(), type=pa.list_(pa.int16()))}))
    packed, _ = pack_dataset(source, 8)
    schema = packed.data.schema
    assert schema.field("input_ids").type == pa.list_(kind.value_type)
    assert schema.field("labels").type == pa.list_(pa.int16())
    assert sorted(ids for ((ids), _) in documents_of(packed)) == list(map(tuple, ids.to_pylist()))


def test_sliced_table() -> None:
    table = pa.Table.from_pylist(make_rows(LENGTHS)).slice(20, 30)
    packed, _ = pack_dataset(Dataset(table), 32)
    assert documents_of(packed) == expected_documents(make_rows(LENGTHS)[20:50], 32)


def test_columns_that_lie_in_other_chunks() -> None:
    rows = make_rows(LENGTHS)
    whole = pa.Table.from_pylist(rows)
    labels = pa.chunked_array(
        [whole.column("labels").combine_chunks().slice(i, 33) for i in range(0, 200, 33)], type=pa.list_(pa.int64())
    )
    large = whole.column("completion_mask").cast(pa.large_list(pa.int8()))
    table = pa.table({"input_ids": whole.column("input_ids"), "labels": labels, "completion_mask": large})
    packed, _ = pack_dataset(Dataset(table), 32)
    assert documents_of(packed, *COLUMNS) == expected_documents(rows, 32, *COLUMNS)


def test_other_columns() -> None:
    """One number a token is packed along, of any type; the rest is left out and named."""
    rows = make_rows([5, 6, 4, 8, 0, 3])
    ids = [row["input_ids"] for row in rows]
    weights = [[i / 2 for i in row] for row in ids]
    flags = [[i % 2 == 0 for i in row] for row in ids]
    source = Dataset.from_dict(
        {
            "text": ["a"] * 6,
            "completion_mask": [row["completion_mask"] for row in rows],
            "labels": [row["labels"] for row in rows],
            "weights": weights,
            "flags": flags,
            "score": [1.0] * 6,
            "tags": [[1, 2]] * 6,
            "words": [["x"] * len(row) for row in ids],
            "holes": [[None] * len(row) if len(row) == 8 else row for row in ids],
            "input_ids": ids,
        }
    )
    packed, stats = pack_dataset(source, 8)
    kept = ["input_ids", "labels", "completion_mask", "weights", "flags"]
    assert sorted(packed.column_names) == sorted([*kept, "seq_lengths"])
    assert stats.dropped_columns == ("text", "score", "tags", "words", "holes")
    assert "columns left out, not one value a token: text, score, tags, words, holes" in stats.describe()
    expected = [{**row, "weights": w, "flags": f} for row, w, f in zip(rows, weights, flags, strict=True)]
    assert documents_of(packed, *kept) == expected_documents(expected, 8, *kept)
    assert {packed.features[name].feature.dtype for name in ("weights", "flags")} == {"float64", "bool"}


def test_labels_default_to_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    # And need not be read to see whether there are any.
    monkeypatch.delattr(TokenColumns, "_labels")
    packed, _ = pack_dataset(Dataset.from_dict({"input_ids": [[1, 2], [3]]}), 4)
    assert packed["labels"][:] == packed["input_ids"][:] == [[1, 2, 3]]


def huge_column(kind: str) -> pa.ChunkedArray:
    """More than 2^31 tokens in virtual memory that nobody writes to, and a token at the end that somebody did."""
    count = 2**31 + 100
    values = np.zeros(count, dtype=np.int8)  # pages come as they are touched
    values[-7:] = range(1, 8)
    if kind == "large list":
        offsets = np.array([0, 5, 2**31 - 1, 2**31 + 93, count])
        return pa.chunked_array([pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values))])
    half = [values[: 2**30], values[2**30 : 2**31 - 1], values[2**31 - 1 :]]
    chunks = []
    for part in half:
        offsets = np.array([0, len(part) - 7, len(part)], dtype=np.int32)
        chunks.append(pa.ListArray.from_arrays(pa.array(offsets), pa.array(part)))
    return pa.chunked_array(chunks)


@pytest.mark.parametrize("kind", ["large list", "lists in chunks"])
def test_more_than_two_to_the_31_tokens(kind: str) -> None:
    column = huge_column(kind)
    columns = TokenColumns.of_table(pa.table({"input_ids": column}))
    lengths = columns.lengths()
    assert lengths.sum(dtype=np.int64) == 2**31 + 100
    last = len(lengths) - 1
    documents, starts, spans = np.array([last, 0, last]), np.array([3, 0, 0]), np.array([4, 2, 3])
    flat = columns.gather(documents, starts, spans, ["input_ids"])["input_ids"]
    assert flat.tolist() == [4, 5, 6, 7, 0, 0, 1, 2, 3]
    # And through the whole path: of the documents the first 7 tokens are kept.
    packed, stats = pack_dataset(Dataset(pa.table({"input_ids": column}), fingerprint=kind), 8)
    assert stats.truncated_tokens == 2**31 + 100 - stats.tokens
    assert [1, 2, 3, 4, 5, 6, 7] in [row[-7:] for row in packed["input_ids"]]


# -- any data set at all ---------------------------------------------------------------------------------------------


@st.composite
def data_sets(draw: st.DrawFn) -> tuple[Rows, Dataset]:
    """Documents in some chunks of some list type, and a selection of them in some order."""
    document = st.lists(st.tuples(st.integers(0, 90), st.booleans(), st.integers(0, 1)), max_size=12)
    rows: Rows = [
        {
            "input_ids": [token for token, _, _ in tokens],
            "labels": [token if learn else -100 for token, learn, _ in tokens],
            "completion_mask": [bit for _, _, bit in tokens],
        }
        for tokens in draw(st.lists(document, min_size=1, max_size=20))
    ]
    rows.append({"input_ids": [1], "labels": [1], "completion_mask": [1]})  # something to learn
    maker = draw(st.sampled_from([pa.list_, pa.large_list]))
    schema = pa.schema({name: maker(pa.int16()) for name in COLUMNS})
    table = pa.Table.from_pylist(rows, schema=schema)
    cut = draw(st.integers(0, len(rows)))
    table = pa.concat_tables([table.slice(0, cut), table.slice(cut)])
    order = draw(st.permutations(range(len(rows)))) if draw(st.booleans()) else range(len(rows))
    dataset = Dataset(table)
    return [rows[i] for i in order], dataset if isinstance(order, range) else dataset.select(order)


@given(data=data_sets(), capacity=st.integers(2, 15), multiple=st.integers(1, 4), piece=st.sampled_from([1, 9, 2**22]))
@settings(max_examples=150, deadline=None)
@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_every_token_once(data: tuple[Rows, Dataset], capacity: int, multiple: int, piece: int, strategy: str) -> None:
    rows, dataset = data
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns_module, "PIECE_TOKENS", piece)
        packed, stats = pack_dataset(dataset, capacity, strategy=strategy, pad_bins_to_multiple_of=multiple)
    assert len(packed) % multiple == 0 and len(packed) == stats.bins + stats.empty_bins
    assert all(len(ids) <= capacity for ids in packed["input_ids"])
    if strategy == "wrapped":
        for name in COLUMNS:
            flat = [token for row in rows for token in row[name]]
            assert [token for row in packed[name] for token in row] == flat
    else:
        expected = expected_documents(rows, capacity, *COLUMNS, split=strategy == "bfd_split")
        assert documents_of(packed, *COLUMNS) == expected
    assert stats.tokens == sum(map(len, packed["input_ids"]))
    assert stats.lower_bound <= stats.bins and stats.fill == stats.tokens / (stats.bins * capacity)


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Dataset.from_dict({"input_ids": [], "labels": []}), "0 documents and not a single token"),
        (Dataset.from_dict({}), "data set is empty: it has 0 documents"),
        (Dataset.from_dict({"input_ids": [[], []], "labels": [[], []]}), "2 documents and not a single token"),
        (Dataset.from_dict({"text": ["a"]}), r"columns \['text'\] and no 'input_ids'; tokenise"),
        (Dataset.from_dict({"input_ids": [[1], [2, 3]], "labels": [[1], [2]]}), "Row 1 has 2 input_ids and 1 labels"),
        (Dataset.from_dict({"input_ids": [[1], None]}), "missing values .* in 1 rows, first in row 1"),
        (Dataset.from_dict({"input_ids": [[1], [2, None]]}), "missing values .* first in row 1"),
        (Dataset.from_dict({"input_ids": [[1, 2]], "seq_lengths": [[1, 1]]}), "'seq_lengths', as packed rows have"),
    ],
)
def test_bad_data(source: Dataset, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_dataset(source, 8)


def test_missing_values_that_are_filtered_out_do_not_count() -> None:
    source = Dataset.from_dict({"input_ids": [[1], None, [2, None], [3, 4]], "labels": [[1], [9], None, [3, 4]]})
    packed, _ = pack_dataset(source.select([3, 0]), 8)
    assert packed["input_ids"][:] == packed["labels"][:] == [[3, 4, 1]]
    table = pa.table({"input_ids": [[None, 1], [1, 2], [3], [None]]}).slice(1, 2)
    assert sorted(pack_dataset(Dataset(table), 8)[0]["input_ids"][0]) == [1, 2, 3]
    with pytest.raises(ValueError, match=r"'input_ids' has missing values .* first in row 1"):
        pack_dataset(source.select([3, 2, 0]), 8)


def test_bad_arguments() -> None:
    source = Dataset.from_dict({"input_ids": [[1, 2]]})
    for value in ([[1.0]], ["a b"], [[[1]]]):
        with pytest.raises(TypeError, match=r"'input_ids' has the Arrow type .*lists of integers"):
            pack_dataset(Dataset.from_dict({"input_ids": value}), 8)
    with pytest.raises(TypeError, match=r"DatasetDict; it must be .*pass one split"):
        pack_dataset(datasets.DatasetDict(train=source), 8)
    with pytest.raises(ValueError, match="capacity is 1; it must be from 2"):
        pack_dataset(source, 1)
    with pytest.raises(ValueError, match="strategy is 'best'; it must be one of"):
        pack_dataset(source, 8, strategy="best")
    for name in ("pad_bins_to_multiple_of", "window"):
        for bad in (0, 1.5, True):
            with pytest.raises(ValueError, match=f"{name} is {bad!r}; it must be an integer of at least 1"):
                pack_dataset(source, 8, **{name: bad})  # type: ignore[arg-type]


def test_list_column_refuses_what_are_no_numbers() -> None:
    for values in ([["a"]], [{"a": 1}], [[[1]]]):
        column: Any = pa.chunked_array([pa.array(values)])
        with pytest.raises(TypeError, match="'x' has the Arrow type"):
            ListColumn("x", column)


@pytest.mark.parametrize("multiple", [1, 4])
def test_max_lengths_of_batches_are_those_of_the_data_set(multiple: int) -> None:
    """Static under both names, though most rows have shorter segments; with empty rows it is the capacity."""
    packed, stats = pack_dataset(Dataset.from_list(make_rows([7] * 4 + [4, 3])), 8, pad_bins_to_multiple_of=multiple)
    assert (stats.bins, stats.empty_bins) == (5, 3 if multiple == 4 else 0)
    assert stats.max_segment_length == (8 if multiple == 4 else 7)
    collate = PackedCollator(pad_token_id=0, capacity=8, max_segment_length=stats.max_segment_length)
    batches = [collate([row]) for row in packed]
    assert {batch["max_length_q"] for batch in batches} == {stats.max_segment_length}
    assert {batch["max_length_k"] for batch in batches} == {stats.max_segment_length}
    longest = {int(batch["cu_seq_lens_q"].diff().max()) for batch in batches}
    assert min(longest) < max(longest) == stats.max_segment_length
