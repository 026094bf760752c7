"""How long `pack_dataset` takes to plan and write a data set of a million documents, and what memory it needs.

    OMP_NUM_THREADS=2 .venv/bin/python tests/acceptance/apply_plan_speed.py --folder /tmp/apply_plan

Not collected by pytest: it writes some 12 GB to the folder and removes them. The data set is an Arrow file as
`datasets` writes it, `input_ids` int32 and `labels` int64 in chunks of 1,000 rows, lengths lognormal (sigma 0.95).
Every row is measured in a process of its own: wall and CPU seconds of `pack_dataset` from the source to the complete
cache file, and the largest anonymous memory beyond what the process had before (a file that is mapped is not counted:
the kernel takes its pages back when it needs them). "cold" drops the source from the page cache first. The rows of
30 tokens show what of the memory goes with tokens. Beside them TRL's packer on the same file (windows of 1,000
documents), with one process and with two. It writes docs/results/apply_plan_cpu.json and exits with 1 if a bound is
missed: 60 s for a million documents of 300 tokens, and 64 MiB more memory for ten times the tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

sys.path.insert(0, str(Path(__file__).parent))
from plan_speed import cpu_model, installed

RESULT = Path(__file__).parents[2] / "docs" / "results" / "apply_plan_cpu.json"
BOUND_S = 60.0
BOUND_GROWTH_MIB = 64.0
CAPACITY = 2048


def write_source(path: Path, documents: int, tokens: int) -> None:
    rng = np.random.default_rng(0)
    schema = pa.schema({"input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int64())})
    median = tokens / np.exp(0.95**2 / 2)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for low in range(0, documents, 1000):
            drawn = rng.lognormal(np.log(median), 0.95, min(1000, documents - low))
            lengths = np.clip(drawn.round().astype(np.int32), 1, CAPACITY)
            offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), type=pa.int32())
            ids = rng.integers(0, 150_000, offsets[-1].as_py(), dtype=np.int32)
            labels = ids.astype(np.int64)
            labels[offsets.to_numpy()[:-1]] = -100
            columns = [pa.ListArray.from_arrays(offsets, pa.array(values)) for values in (ids, labels)]
            writer.write_batch(pa.record_batch(columns, schema=schema))


class PeakMemory:
    """Samples this process's anonymous memory, which is what mapped files are not part of."""

    def __enter__(self) -> PeakMemory:
        self.before = self.peak = self._now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    @staticmethod
    def _now() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) * 1024

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            self.peak = max(self.peak, self._now())


def drop_from_page_cache(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(what: str, source: Path) -> dict[str, Any]:
    """One row, in this process."""
    from datasets import Dataset, disable_progress_bars
    from trl import pack_dataset as trl_pack_dataset

    from chronicals_trl.packing import pack_dataset

    disable_progress_bars()
    if "cold" in what:
        drop_from_page_cache(source)
    dataset = Dataset.from_file(str(source))
    pack_dataset(dataset.select(range(10)), CAPACITY)  # what the first call of all imports and starts
    load = os.getloadavg()[0]
    with PeakMemory() as memory:
        wall, cpu = time.perf_counter(), time.process_time()
        if what.startswith("trl"):
            processes = int(what.split()[1])
            packed = trl_pack_dataset(dataset, CAPACITY, "bfd", {"num_proc": processes if processes > 1 else None})
        else:
            packed, _ = pack_dataset(dataset, CAPACITY)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    tokens, packed_tokens = (
        int(pc.sum(pc.list_value_length(each.data.column("input_ids"))).as_py()) for each in (dataset, packed)
    )
    return {
        "documents": len(dataset),
        "tokens": tokens,
        "bins": len(packed),
        "fill": round(packed_tokens / (len(packed) * CAPACITY), 5),
        "wall_s": round(wall, 2),
        # Of this process alone: TRL's with two does its work in others.
        "cpu_s": round(cpu, 2),
        "peak_mib": round((memory.peak - memory.before) / 2**20, 1),
        "load_average_before": round(load, 2),
        "load_average_after": round(os.getloadavg()[0], 2),
    }


def missed_bounds(rows: list[dict[str, Any]]) -> list[str]:
    missed = [
        f"{row['what']}: {row['wall_s']} s is above {BOUND_S} s"
        for row in rows
        if row["what"].startswith("pack_dataset") and row["wall_s"] > BOUND_S * max(1, row["documents"] / 1e6)
    ]
    peaks = {row["tokens_a_document"]: row["peak_mib"] for row in rows if row["what"] == "pack_dataset"}
    growth = max(peaks.values()) - min(peaks.values())
    if growth > BOUND_GROWTH_MIB:
        missed.append(f"{growth:.0f} MiB more memory for more tokens is above {BOUND_GROWTH_MIB}")
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for the data sets; made, and removed at the end")
    parser.add_argument("--documents", type=float, default=1e6)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--row", help=argparse.SUPPRESS)  # a child's task
    args = parser.parse_args()
    if args.row:
        what, source = args.row.split(":", 1)
        print(json.dumps(measure(what, Path(source))))
        return 0

    rows = []
    for tokens in (300, 30):
        args.folder.mkdir(parents=True)
        source = args.folder / "source.arrow"
        write_source(source, int(args.documents), tokens)
        tasks = ["pack_dataset", "pack_dataset cold", "trl 1", "trl 2"] if tokens == 300 else ["pack_dataset"]
        for what in tasks:
            command = [sys.executable, __file__, "--folder", str(args.folder), "--row", f"{what}:{source}"]
            out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            rows.append({"what": what, "tokens_a_document": tokens, **json.loads(out.splitlines()[-1])})
            print(rows[-1], flush=True)
            for written in args.folder.glob("cache-*"):
                written.unlink()
        shutil.rmtree(args.folder)
    missed = missed_bounds(rows)
    result = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {"cpu": cpu_model(), "cores": os.cpu_count(), "system": platform.platform()},
        "versions": {"python": platform.python_version()}
        | {name: installed(name) for name in ("chronicals-trl", "numpy", "trl", "datasets", "pyarrow")},
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "capacity": CAPACITY,
        "rows": rows,
        "missed": missed,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"Wrote {args.out}", *missed, sep="\n")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
