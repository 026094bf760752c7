"""The cache of packed rows: written once, whole or not there, and an error with a remedy where it cannot be."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from datasets import Dataset
from packing_data import LENGTHS, documents_of, expected_documents, make_rows

from chronicals_trl.packing import columns as columns_module
from chronicals_trl.packing import dataset as dataset_module
from chronicals_trl.packing import pack_dataset

posix = pytest.mark.skipif(os.name != "posix", reason="signals, locks and limits of POSIX")


@pytest.fixture
def on_disk(tmp_path: Path) -> Dataset:
    Dataset.from_list(make_rows(LENGTHS)).save_to_disk(tmp_path / "data", num_shards=3)
    return datasets.load_from_disk(str(tmp_path / "data"))


def files(dataset: Dataset) -> list[Path]:
    """What packing has put beside the data set, hidden files too."""
    folder = Path(dataset.cache_files[0]["filename"]).parent
    return sorted(path for path in folder.iterdir() if "packed" in path.name or path.name.startswith("."))


def test_written_once_and_used_again(on_disk: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    first, stats = pack_dataset(on_disk, 32, pad_bins_to_multiple_of=7)
    (path,) = files(on_disk)
    assert first.cache_files == [{"filename": str(path)}]

    def planned_again(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("planned again")

    with monkeypatch.context() as patch:
        patch.setattr(dataset_module, "plan_documents", planned_again)
        second, stats_again = pack_dataset(on_disk, 32, pad_bins_to_multiple_of=7)
    assert stats_again == stats and second._fingerprint == first._fingerprint
    assert second.to_list() == first.to_list()
    assert documents_of(second) == expected_documents(make_rows(LENGTHS), 32)

    # Other data, capacity, strategy or multiple: another file.
    for args in ((on_disk, 33), (on_disk.select(range(9, 99)), 32)):
        pack_dataset(*args)
    pack_dataset(on_disk, 32)
    pack_dataset(on_disk, 32, strategy="bfd_split")
    assert len(files(on_disk)) == 5
    assert on_disk.cleanup_cache_files() == 5


# What a cache file of each strategy holds, by the number of its format. A cache that an earlier version has written is
# used again as long as the number is the same: if this test fails, raise `_FORMAT` and put the new figures here.
CONTENT = {
    3: {"bfd": "03bccfc0e1d68d2d", "bfd_split": "8e425d77fd9897be", "wrapped": "7587674ddb7b7d4f"},
}


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_other_rows_or_figures_need_another_format(strategy: str) -> None:
    source = Dataset.from_list(make_rows(LENGTHS))
    packed, stats = pack_dataset(source, 24, strategy=strategy, pad_bins_to_multiple_of=4)
    content = json.dumps([packed.to_list(), sorted(stats.to_dict())])
    assert hashlib.sha256(content.encode()).hexdigest()[:16] == CONTENT[dataset_module._FORMAT][strategy]


def test_another_format_is_another_file(on_disk: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    pack_dataset(on_disk, 32)
    monkeypatch.setattr(dataset_module, "_FORMAT", dataset_module._FORMAT + 1)
    pack_dataset(on_disk, 32)
    assert len(files(on_disk)) == 2


def test_figures_come_back_from_the_cache(on_disk: Dataset) -> None:
    source = on_disk.add_column("text", ["a"] * len(on_disk)).select(range(190))
    first, second = (pack_dataset(source, 16)[1] for _ in range(2))
    assert first == second and second.dropped_columns == ("text",)


def test_memory_and_file_give_the_same_rows(on_disk: Dataset) -> None:
    from_file, stats = pack_dataset(on_disk, 32)
    from_memory, stats_memory = pack_dataset(Dataset.from_list(make_rows(LENGTHS)), 32)
    assert not from_memory.cache_files
    assert from_file.to_list() == from_memory.to_list() and stats == stats_memory


def test_broken_cache_is_not_read(on_disk: Dataset) -> None:
    packed, stats = pack_dataset(on_disk, 32)
    rows = packed.to_list()
    (path,) = files(on_disk)
    whole = path.read_bytes()
    for size in (0, 10, 600, len(whole) // 2, len(whole) - 100):
        path.unlink()  # not in place: `packed` has the file mapped
        path.write_bytes(whole[:size])
        again, stats_again = pack_dataset(on_disk, 32)
        assert again.to_list() == rows and stats_again == stats
        assert path.read_bytes() == whole


def test_cache_cut_between_batches_is_not_read(on_disk: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns_module, "PIECE_TOKENS", 500)
    packed, _ = pack_dataset(on_disk, 32)
    rows = packed.to_list()
    (path,) = files(on_disk)
    with pa.memory_map(str(path)) as source:
        reader = pa.ipc.open_stream(source)
        schema, first = reader.schema, pa.RecordBatch.from_pylist(reader.read_next_batch().to_pylist(), reader.schema)
    path.unlink()
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(first)
    again, _ = pack_dataset(on_disk, 32)
    assert again.to_list() == rows


def test_interrupted_writing_leaves_nothing(on_disk: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> Iterator[pa.RecordBatch]:
        yield pa.RecordBatch.from_pylist([], schema=args[3])
        raise KeyboardInterrupt

    monkeypatch.setattr(dataset_module, "packed_batches", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pack_dataset(on_disk, 32)
    assert files(on_disk) == []


def test_unwritable_folder_is_an_error_with_the_remedy(on_disk: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    # A folder that is not there fails as a read-only one does, for root too.
    monkeypatch.setattr(dataset_module, "cache_path", lambda *args: Path("/nonexistent/packed.arrow"))
    with pytest.raises(
        OSError, match=r"/nonexistent/packed\.arrow.*Make the folder writable.*disable_caching"
    ) as caught:
        pack_dataset(on_disk, 32)
    assert caught.value.errno == errno.ENOENT


def test_caching_disabled_leaves_the_folder_alone(on_disk: Dataset) -> None:
    datasets.disable_caching()
    try:
        packed, _ = pack_dataset(on_disk, 32)
    finally:
        datasets.enable_caching()
    assert files(on_disk) == [] and packed.cache_files
    assert documents_of(packed) == expected_documents(make_rows(LENGTHS), 32)


# Packs the data set in argv[1] a little at a time. `stop_in` names the function in which it says so and waits.
CHILD = """
import sys, time
import datasets
from chronicals_trl.packing import columns, dataset, pack_dataset, planning
folder, stop_in = sys.argv[1:]
columns.PIECE_TOKENS = 300
def wait():
    print("waiting", flush=True)
    time.sleep(60)
if stop_in == "planning":
    planning.pack_lengths = lambda *args, **kwargs: wait()
elif stop_in == "writing":
    batches = dataset.packed_batches
    def slow(*args, **kwargs):
        for number, batch in enumerate(batches(*args, **kwargs)):
            if number == 3:
                wait()
            yield batch
    dataset.packed_batches = slow
elif stop_in == "full":
    import resource, signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    pack_dataset(datasets.load_from_disk(folder), 32)
except OSError as error:
    print(f"{error.errno} {error}")
"""


def start(folder: str, stop_in: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", CHILD, folder, stop_in], stdout=subprocess.PIPE, text=True)


@posix
@pytest.mark.parametrize("stop_in", ["planning", "writing"])
def test_killed_run_leaves_nothing_that_is_read(on_disk: Dataset, tmp_path: Path, stop_in: str) -> None:
    child = start(str(tmp_path / "data"), stop_in)
    assert child.stdout is not None and child.stdout.readline() == "waiting\n"
    written = files(on_disk)
    if stop_in == "writing":
        # Another run does not take the file away from the one that is at it.
        (partial,) = written
        assert partial.name.startswith(".") and partial.stat().st_size > 3000
        packed, _ = pack_dataset(on_disk, 32)
        assert partial.exists()
        Path(packed.cache_files[0]["filename"]).unlink()
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    child.stdout.close()
    assert files(on_disk) == written
    packed, _ = pack_dataset(on_disk, 32)
    assert documents_of(packed) == expected_documents(make_rows(LENGTHS), 32)
    # What was left lying is gone.
    assert files(on_disk) == [Path(packed.cache_files[0]["filename"])]


@posix
def test_full_disk_is_an_error_with_the_remedy(on_disk: Dataset, tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk: the write fails in the middle."""
    output, _ = start(str(tmp_path / "data"), "full").communicate(timeout=60)
    assert output.startswith(f"{errno.EFBIG} ")
    assert f"No room to write the packed data set to {tmp_path}" in output
    assert "GiB free" in output and "Free some space, or" in output and "HF_DATASETS_CACHE" in output
    assert files(on_disk) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_no_space_is_told_from_no_right(on_disk: Dataset, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def full(*args: Any, **kwargs: Any) -> Iterator[pa.RecordBatch]:
        yield from ()
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(dataset_module, "packed_batches", full)
    with pytest.raises(OSError, match="No room to write") as caught:
        pack_dataset(on_disk, 32)
    assert caught.value.errno == number


def test_progress_is_shown_unless_the_bars_of_datasets_are_off(
    on_disk: Dataset, capfd: pytest.CaptureFixture[str]
) -> None:
    enabled = not datasets.are_progress_bars_disabled()
    datasets.enable_progress_bars()
    try:
        packed, _ = pack_dataset(on_disk, 32)
        shown = capfd.readouterr().err
        assert "Packing dataset: 100%" in shown and f"{len(packed)}/{len(packed)}" in shown
        datasets.disable_progress_bars()
        pack_dataset(on_disk, 33)
        assert "Packing" not in capfd.readouterr().err
    finally:
        (datasets.enable_progress_bars if enabled else datasets.disable_progress_bars)()
