"""A packed data set holds what went in, once, in the rows that the plan says; caches and streams included."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, IterableDataset

from chronicals_trl.packing import PackedCollator, PackStats, pack_dataset, pack_lengths
from chronicals_trl.packing import dataset as dataset_module

Rows = list[dict[str, list[int]]]


def make_rows(lengths: list[int]) -> Rows:
    """Every token differs from every other, so that a document's content shows where it came from."""
    rows, token = [], 1
    for length in lengths:
        ids = list(range(token, token + length))
        rows.append({"input_ids": ids, "labels": [-100 if i % 3 == 0 else i for i in ids], "other": [0] * length})
        token += length
    return rows


def documents_of(packed: Any) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    documents = []
    for row in packed:
        assert len(row["input_ids"]) == len(row["labels"]) == sum(row["seq_lengths"])
        ends = np.cumsum(row["seq_lengths"])
        for end, length in zip(ends, row["seq_lengths"], strict=True):
            documents.append((tuple(row["input_ids"][end - length : end]), tuple(row["labels"][end - length : end])))
    return documents


def expected_documents(rows: Rows, capacity: int, *, split: bool = False) -> list[tuple[tuple[int, ...], ...]]:
    pieces = []
    for row in rows:
        stops = range(0, len(row["input_ids"]), capacity) if split else [0]
        pieces += [tuple(tuple(row[name][i : i + capacity]) for name in ("input_ids", "labels")) for i in stops]
    return [piece for piece in pieces if piece[0]]


LENGTHS = np.random.default_rng(1).integers(1, 33, 200).tolist()


@pytest.fixture
def on_disk(tmp_path: Path) -> Dataset:
    Dataset.from_list(make_rows(LENGTHS)).save_to_disk(tmp_path / "data", num_shards=3)
    return datasets.load_from_disk(str(tmp_path / "data"))


def cache_files(dataset: Dataset) -> list[Path]:
    return sorted(Path(dataset.cache_files[0]["filename"]).parent.glob("*packed*"))


def test_rows_are_those_of_the_plan() -> None:
    packed, stats = pack_dataset(Dataset.from_list(make_rows(LENGTHS)), 32)
    plan = pack_lengths(LENGTHS, 32)
    assert packed.column_names == ["input_ids", "labels", "seq_lengths"]
    planned = np.split(plan.lengths, plan.bin_offsets[1:-1])
    assert Counter(map(tuple, packed["seq_lengths"])) == Counter(tuple(row.tolist()) for row in planned)
    assert Counter(documents_of(packed)) == Counter(expected_documents(make_rows(LENGTHS), 32))
    assert stats == PackStats(
        capacity=32,
        strategy="bfd",
        documents=200,
        bins=plan.num_bins,
        empty_bins=0,
        tokens=sum(LENGTHS),
        fill=plan.fill,
        lower_bound=plan.lower_bound,
        truncated_documents=0,
        truncated_tokens=0,
        split_documents=0,
        dropped_empty=0,
        max_doc_length=max(LENGTHS),
        max_segment_length=max(LENGTHS),
        max_docs_per_bin=max(len(row) for row in packed["seq_lengths"]),
    )
    # The longest documents are not all in the first rows.
    first = [row[0] for row in packed["seq_lengths"]]
    assert first != sorted(first, reverse=True)


def test_truncates_and_drops_and_counts() -> None:
    rows = make_rows([10, 0, 3, 25, 0, 8])
    packed, stats = pack_dataset(Dataset.from_list(rows), 8)
    assert Counter(documents_of(packed)) == Counter(expected_documents(rows, 8))
    assert (stats.truncated_documents, stats.truncated_tokens) == (2, 2 + 17)
    assert (stats.dropped_empty, stats.documents, stats.max_doc_length) == (2, 4, 25)
    assert (stats.tokens, stats.bins, stats.split_documents) == (27, 4, 0)
    assert stats.max_segment_length == 8  # the bin with 3 has a tail of 5
    assert "2 truncated (19 tokens lost), 2 empty dropped" in stats.describe()


def test_splits_and_keeps_every_token() -> None:
    rows = make_rows([10, 0, 3, 25, 8])
    packed, stats = pack_dataset(Dataset.from_list(rows), 8, strategy="bfd_split")
    assert Counter(documents_of(packed)) == Counter(expected_documents(rows, 8, split=True))
    assert sorted(i for row in packed["input_ids"] for i in row) == list(range(1, 47))
    assert (stats.split_documents, stats.truncated_documents, stats.tokens) == (2, 0, 46)


def test_max_segment_length_counts_the_padding() -> None:
    _, stats = pack_dataset(Dataset.from_list(make_rows([3])), 8)
    assert (stats.max_doc_length, stats.max_segment_length) == (3, 5)


def test_empty_bins_fill_up_the_multiple() -> None:
    packed, stats = pack_dataset(Dataset.from_list(make_rows([8] * 5)), 8, pad_bins_to_multiple_of=4)
    assert len(packed) == 8 and (stats.bins, stats.empty_bins) == (5, 3)
    assert [row for row in packed if not row["input_ids"]] == [{"input_ids": [], "labels": [], "seq_lengths": []}] * 3
    assert stats.max_segment_length == 8 and stats.fill == 1.0
    packed, stats = pack_dataset(Dataset.from_list(make_rows([8] * 8)), 8, pad_bins_to_multiple_of=4)
    assert len(packed) == 8 and stats.empty_bins == 0


def test_pieces_join_up(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = pack_dataset(Dataset.from_list(make_rows(LENGTHS)), 32)
    for tokens in (1, 33, 1000):
        monkeypatch.setattr(dataset_module, "_PIECE_TOKENS", tokens)
        pieces, _ = pack_dataset(Dataset.from_list(make_rows(LENGTHS)), 32)
        assert pieces.data.table.column(0).num_chunks > whole.data.table.column(0).num_chunks
        assert pieces.to_list() == whole.to_list()


def test_follows_a_shuffled_and_filtered_data_set(on_disk: Dataset) -> None:
    for source in (Dataset.from_list(make_rows(LENGTHS)), on_disk):
        chosen = source.shuffle(seed=3).select(range(50)).with_format("torch", columns=["labels"])
        packed, stats = pack_dataset(chosen, 32)
        rows = chosen.with_format(None).to_list()
        assert stats.documents == 50
        assert Counter(documents_of(packed)) == Counter(expected_documents(rows, 32))


@pytest.mark.parametrize("kind", [pa.list_(pa.int32()), pa.large_list(pa.uint16()), pa.list_(pa.int64(), 4)])
def test_keeps_integer_types(kind: pa.DataType) -> None:
    ids = pa.array([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]], type=kind)
    source = Dataset(pa.table({"input_ids": ids, "labels": pa.array(ids.to_pylist(), type=pa.list_(pa.int16()))}))
    packed, _ = pack_dataset(source, 8)
    schema = packed.data.schema
    assert schema.field("input_ids").type.value_type == kind.value_type
    assert schema.field("labels").type.value_type == pa.int16()
    assert Counter(ids for ids, _ in documents_of(packed)) == Counter(map(tuple, ids.to_pylist()))


def test_sliced_table() -> None:
    table = pa.Table.from_pylist(make_rows(LENGTHS)).slice(20, 30)
    packed, _ = pack_dataset(Dataset(table), 32)
    assert Counter(documents_of(packed)) == Counter(expected_documents(make_rows(LENGTHS)[20:50], 32))


def test_labels_default_to_the_tokens() -> None:
    packed, _ = pack_dataset(Dataset.from_dict({"input_ids": [[1, 2], [3]]}), 4)
    assert packed["labels"][:] == packed["input_ids"][:] == [[1, 2, 3]]


def test_cache_is_written_once_and_used_again(on_disk: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    first, stats = pack_dataset(on_disk, 32, pad_bins_to_multiple_of=7)
    (path,) = cache_files(on_disk)
    assert first.cache_files == [{"filename": str(path)}]

    def planned_again(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("planned again")

    with monkeypatch.context() as patch:
        patch.setattr(dataset_module, "_plan", planned_again)
        second, stats_again = pack_dataset(on_disk, 32, pad_bins_to_multiple_of=7)
    assert stats_again == stats and second._fingerprint == first._fingerprint
    assert second.to_list() == first.to_list()
    assert Counter(documents_of(second)) == Counter(expected_documents(make_rows(LENGTHS), 32))

    # Other data, capacity, strategy or multiple: another file.
    for args in ((on_disk, 33), (on_disk.select(range(9, 99)), 32)):
        pack_dataset(*args)
    pack_dataset(on_disk, 32)
    pack_dataset(on_disk, 32, strategy="bfd_split")
    assert len(cache_files(on_disk)) == 5
    assert on_disk.cleanup_cache_files() == 5


def test_memory_and_file_give_the_same_rows(on_disk: Dataset) -> None:
    from_file, stats = pack_dataset(on_disk, 32)
    from_memory, stats_memory = pack_dataset(Dataset.from_list(make_rows(LENGTHS)), 32)
    assert not from_memory.cache_files
    assert from_file.to_list() == from_memory.to_list() and stats == stats_memory


def test_broken_cache_is_not_read(on_disk: Dataset) -> None:
    packed, stats = pack_dataset(on_disk, 32)
    rows = packed.to_list()
    (path,) = cache_files(on_disk)
    whole = path.read_bytes()
    for size in (0, 10, 600, len(whole) // 2, len(whole) - 100):
        path.unlink()  # not in place: `packed` has the file mapped
        path.write_bytes(whole[:size])
        again, stats_again = pack_dataset(on_disk, 32)
        assert again.to_list() == rows and stats_again == stats
        assert path.read_bytes() == whole


def test_cache_cut_between_batches_is_not_read(on_disk: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_module, "_PIECE_TOKENS", 500)
    packed, _ = pack_dataset(on_disk, 32)
    rows = packed.to_list()
    (path,) = cache_files(on_disk)
    with pa.memory_map(str(path)) as source:
        reader = pa.ipc.open_stream(source)
        schema, first = reader.schema, pa.RecordBatch.from_pylist(reader.read_next_batch().to_pylist(), reader.schema)
    path.unlink()
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(first)
    again, _ = pack_dataset(on_disk, 32)
    assert again.to_list() == rows


def test_interrupted_writing_leaves_nothing(on_disk: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Iterator[pa.RecordBatch]:
        yield pa.RecordBatch.from_pylist([], schema=args[2])
        raise KeyboardInterrupt

    monkeypatch.setattr(dataset_module._Documents, "batches", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pack_dataset(on_disk, 32)
    assert not [path for path in Path(on_disk.cache_files[0]["filename"]).parent.iterdir() if "packed" in path.name]


def test_unwritable_cache_folder_packs_in_memory(
    on_disk: Dataset, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # A folder that is not there fails as a read-only one does, for root too.
    monkeypatch.setattr(dataset_module, "_cache_path", lambda *args: Path("/nonexistent/packed.arrow"))
    packed, _ = pack_dataset(on_disk, 32)
    assert not packed.cache_files and "packing it in memory" in caplog.text
    assert Counter(documents_of(packed)) == Counter(expected_documents(make_rows(LENGTHS), 32))


def test_caching_disabled_leaves_the_folder_alone(on_disk: Dataset) -> None:
    datasets.disable_caching()
    try:
        packed, _ = pack_dataset(on_disk, 32)
    finally:
        datasets.enable_caching()
    assert cache_files(on_disk) == [] and packed.cache_files
    assert Counter(documents_of(packed)) == Counter(expected_documents(make_rows(LENGTHS), 32))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Dataset.from_dict({"input_ids": [], "labels": []}), "0 documents and not a single token"),
        (Dataset.from_dict({}), "data set is empty: it has 0 documents"),
        (Dataset.from_dict({"input_ids": [[], []], "labels": [[], []]}), "2 documents and not a single token"),
        (Dataset.from_dict({"text": ["a"]}), r"columns \['text'\] and no 'input_ids'; tokenise"),
        (Dataset.from_dict({"input_ids": [[1], [2, 3]], "labels": [[1], [2]]}), "Row 1 has 2 input_ids and 1 labels"),
        (Dataset.from_dict({"input_ids": [[1], None]}), "missing values"),
        (Dataset.from_dict({"input_ids": [[1], [2, None]]}), "missing values"),
    ],
)
def test_bad_data(source: Dataset, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_dataset(source, 8)


def test_bad_arguments() -> None:
    source = Dataset.from_dict({"input_ids": [[1, 2]]})
    for value in ([[1.0]], ["a b"], [[[1]]]):
        with pytest.raises(TypeError, match=r"'input_ids' has the Arrow type .*lists of integers"):
            pack_dataset(Dataset.from_dict({"input_ids": value}), 8)
    with pytest.raises(TypeError, match=r"DatasetDict; it must be .*pass one split"):
        pack_dataset(datasets.DatasetDict(train=source), 8)
    with pytest.raises(ValueError, match="capacity is 1; it must be from 2"):
        pack_dataset(source, 1)
    with pytest.raises(ValueError, match="TRL's own packer"):
        pack_dataset(source, 8, strategy="wrapped")
    for name in ("pad_bins_to_multiple_of", "window"):
        for bad in (0, 1.5, True):
            with pytest.raises(ValueError, match=f"{name} is {bad!r}; it must be an integer of at least 1"):
                pack_dataset(source, 8, **{name: bad})  # type: ignore[arg-type]


def generate() -> Iterator[dict[str, list[int]]]:
    yield from make_rows(LENGTHS)


def generate_nothing() -> Iterator[dict[str, list[int]]]:
    yield from ()


def stream(kind: str) -> IterableDataset:
    if kind == "generator":  # columns and types unknown
        return IterableDataset.from_generator(generate)
    return Dataset.from_list(make_rows(LENGTHS)).to_iterable_dataset(num_shards=2)


@pytest.mark.parametrize("kind", ["generator", "arrow"])
def test_stream_is_packed_in_windows(kind: str) -> None:
    packed, stats = pack_dataset(stream(kind), 32, window=50)
    assert stats == PackStats(capacity=32, strategy="bfd", window=50)
    assert "windows of 50 documents" in stats.describe()
    assert packed.column_names == ["input_ids", "labels", "seq_lengths"]
    rows = list(packed)
    assert Counter(documents_of(rows)) == Counter(expected_documents(make_rows(LENGTHS), 32))
    assert isinstance(rows[0]["input_ids"], list)
    windows = [pack_lengths(LENGTHS[i : i + 50], 32).num_bins for i in range(0, 200, 50)]
    assert len(rows) == sum(windows)
    # Each window by itself gives the same rows as a data set of its documents.
    alone, _ = pack_dataset(Dataset.from_list(make_rows(LENGTHS)[:50]), 32)
    assert rows[: windows[0]] == alone.to_list()


@pytest.mark.parametrize("kind", ["generator", "arrow"])
def test_stream_resumes_where_it_stopped(kind: str) -> None:
    full = list(pack_dataset(stream(kind), 32, window=50)[0])
    packed, _ = pack_dataset(stream(kind), 32, window=50)
    rows = []
    for row in packed:
        rows.append(row)
        if len(rows) == 60:
            state = packed.state_dict()
            break
    resumed, _ = pack_dataset(stream(kind), 32, window=50)
    resumed.load_state_dict(pickle.loads(pickle.dumps(state)))
    assert rows + list(resumed) == full


def test_stream_pickles_and_splits_long_documents() -> None:
    source = Dataset.from_list(make_rows([30, 0, 5, 0, 0, 0])).to_iterable_dataset()
    packed, _ = pack_dataset(source, 8, strategy="bfd_split", window=3)
    packed = pickle.loads(pickle.dumps(packed))
    # The second window has no token at all and gives no row.
    assert sorted(i for row in packed for i in row["input_ids"]) == list(range(1, 36))


def test_empty_stream_says_so() -> None:
    with pytest.raises(ValueError, match="data set is empty"):
        pack_dataset(IterableDataset.from_generator(generate_nothing), 8)


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
