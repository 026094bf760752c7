"""The file that the packed rows of a data set are kept in: whole or not there."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
from datasets import Dataset, is_caching_enabled
from datasets.fingerprint import get_temporary_cache_files_directory

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["cache_path", "load_cached", "write_cache"]

logger = logging.getLogger(__name__)

_META_KEY = b"chronicals_trl.pack_stats"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def cache_path(dataset: Dataset, fingerprint: str) -> Path | None:
    """Where the packed rows of a data set that lives in files go; None for one that lives in memory."""
    if not dataset.cache_files:
        return None
    folder = (
        Path(dataset.cache_files[0]["filename"]).parent
        if is_caching_enabled()
        else Path(get_temporary_cache_files_directory())
    )
    # The prefix is the one that Dataset.cleanup_cache_files() looks for.
    return folder / f"cache-packed-{fingerprint}.arrow"


def write_cache(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch], meta: dict[str, Any]) -> None:
    """Write the rows under a temporary name, then rename, so that no reader ever sees half a file.

    Raises:
        OSError: the folder cannot be written to, or is full; the message names the file and what to do. Nothing is
            left behind.
    """
    schema = schema.with_metadata({**(schema.metadata or {}), _META_KEY: json.dumps(meta).encode()})
    token = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
    fresh, partial = path.with_name(f".new-{token}"), path.with_name(f".{path.name}.{token}")
    try:
        _remove_leftovers(path)
        with open(fresh, "wb") as file:
            _lock(file)
            # Under this name `_remove_leftovers` of other processes may look at it: locked from its first moment.
            os.rename(fresh, partial)
            # pyarrow's own file: through Python's every buffer would be copied once more.
            with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
                for batch in batches:
                    writer.write_batch(batch)
            os.fsync(file.fileno())
            os.replace(partial, path)
    except OSError as error:
        raise OSError(error.errno, _cannot_write(path, error)) from error
    finally:
        for left in (fresh, partial):
            with contextlib.suppress(OSError):
                left.unlink(missing_ok=True)


def _cannot_write(path: Path, error: OSError) -> str:
    elsewhere = (
        "keep the data set in another folder (dataset.save_to_disk and load_from_disk; HF_DATASETS_CACHE for what is "
        "loaded anew), or call datasets.disable_caching() to use a temporary folder (TMPDIR)"
    )
    if error.errno in _FULL:
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(path.parent).free / 2**30
            return (
                f"No room to write the packed data set to {path} ({error}; {free:.1f} GiB free). It takes about as "
                f"much as the token columns of its source. Free some space, or {elsewhere}."
            )
    return f"Cannot write the packed data set to {path} ({error}). Make the folder writable, or {elsewhere}."


def _lock(file: BinaryIO) -> None:
    """Take a lock that ends with this process or with the file's closing, where the file system has locks."""
    if fcntl is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _remove_leftovers(path: Path) -> None:
    """Remove what runs that were killed while they wrote this file have left."""
    if fcntl is None:
        return
    for leftover in path.parent.glob(f".{path.name}.*"):
        with contextlib.suppress(OSError), open(leftover, "rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # an error while the process that writes it lives
            leftover.unlink()
            logger.info("Removed %s, which a run that was killed has left.", leftover)


def load_cached(path: Path, source: Dataset, fingerprint: str) -> tuple[Dataset, dict[str, Any]] | None:
    """The packed rows in the file and what was given as `meta`, or None where there is no whole one.

    `meta["rows"]` has to be the number of rows: a stream cut between two batches reads as a shorter one.
    """
    if not path.exists():
        return None
    try:
        # Read from the file: a Dataset keeps no metadata but its own.
        with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
            meta = json.loads((reader.schema.metadata or {})[_META_KEY])
        dataset = Dataset.from_file(str(path), split=source.split)
        rows = int(meta["rows"])
    except (pa.ArrowInvalid, OSError, KeyError, TypeError, ValueError) as error:
        logger.warning("Packing again: %s cannot be read (%s).", path, error)
        return None
    if len(dataset) != rows:
        logger.warning("Packing again: %s has %d rows instead of %d.", path, len(dataset), rows)
        return None
    dataset._fingerprint = fingerprint
    return dataset, meta
