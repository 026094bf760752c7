"""How long `pack_lengths` takes for many documents and what memory it needs, beside TRL's packer and `seqpacker`.

    OMP_NUM_THREADS=1 .venv/bin/python tests/acceptance/plan_speed.py \\
        --lengths ../shared/data/lengths/gsm8k_train.npy:2048 ../shared/data/lengths/sharegpt_recovered.npy:8192

Not collected by pytest: 100M documents take some minutes and 4 GB. The lengths are drawn anew from each file, with
replacement, and cut at the capacity. Every row is measured in a process of its own: the first call of that process,
further calls for as long as they are short, and a call under tracemalloc, which counts numpy's arrays, for the peak
beyond the input array, the result included. It writes docs/results/plan_speed_cpu.json and exits with 1 if a bound is
missed: 0.3, 3 and 40 s (the best call) for 1M, 10M and 100M documents, 32 bytes a document.

TRL's packer moves the tokens too and has no call for a plan alone; its documents are given one byte a token, and it
is timed as its users call it (windows of 1,000 documents) and over the whole set at once.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
import tracemalloc
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chronicals_trl.packing import pack_lengths

RESULT = Path(__file__).parents[2] / "docs" / "results" / "plan_speed_cpu.json"
BOUNDS_S = {10**6: 0.3, 10**7: 3.0, 10**8: 40.0}
BOUND_BYTES = 32.0


def resample(path: Path, documents: int, capacity: int) -> NDArray[np.int64]:
    pool = np.minimum(np.load(path), capacity).astype(np.int64)
    rng = np.random.default_rng(0)
    lengths = np.empty(documents, dtype=np.int64)
    for low in range(0, documents, 2**20):
        piece = lengths[low : low + 2**20]
        piece[:] = rng.choice(pool, len(piece))
    return lengths


def timed(call: Any) -> tuple[Any, float, float]:
    """The result, wall seconds and this process's CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def ours(lengths: NDArray[np.int64], capacity: int) -> dict[str, Any]:
    plan, first, first_cpu = timed(lambda: pack_lengths(lengths, capacity))
    walls, cpus = [first], [first_cpu]
    while len(walls) < 7 and sum(walls) < 15:
        plan = None
        plan, wall, cpu = timed(lambda: pack_lengths(lengths, capacity))
        walls.append(wall)
        cpus.append(cpu)
    lower_bound, bound_wall, _ = timed(lambda: plan.lower_bound)
    row = {
        "first_s": round(first, 4),
        "best_s": round(min(walls), 4),
        "best_cpu_s": round(min(cpus), 4),
        "calls": len(walls),
        "lower_bound_s": round(bound_wall, 4),
        "bins": plan.num_bins,
        "lower_bound": lower_bound,
        "fill": round(plan.fill, 6),
    }
    plan = None
    tracemalloc.start()
    plan = pack_lengths(lengths, capacity)
    held, peak = tracemalloc.get_traced_memory()
    return row | {
        "peak_bytes_per_document": round(peak / len(lengths), 2),
        "result_bytes_per_document": round(held / len(lengths), 2),
    }


def trl_packer(lengths: NDArray[np.int64], capacity: int, whole: bool) -> dict[str, Any]:
    import pyarrow as pa
    from datasets import Dataset, disable_progress_bars
    from trl import pack_dataset

    disable_progress_bars()

    def dataset(doc_lengths: NDArray[np.int64]) -> Dataset:
        offsets = np.concatenate([[0], np.cumsum(doc_lengths)])
        tokens = pa.array(np.zeros(offsets[-1], dtype=np.int8))
        rows = pa.LargeListArray.from_arrays(pa.array(offsets), tokens).cast(pa.list_(pa.int8()))
        return Dataset(pa.table({"input_ids": rows}))

    pack_dataset(dataset(lengths[:100]), capacity, strategy="bfd")
    data = dataset(lengths)
    kwargs = {"batch_size": len(lengths)} if whole else None
    packed, wall, cpu = timed(lambda: pack_dataset(data, capacity, strategy="bfd", map_kwargs=kwargs))
    fill = int(lengths.sum()) / (len(packed) * capacity)
    return {"first_s": round(wall, 4), "best_cpu_s": round(cpu, 4), "bins": len(packed), "fill": round(fill, 6)}


def seqpacker(lengths: NDArray[np.int64], capacity: int) -> dict[str, Any]:
    if importlib.util.find_spec("seqpacker") is None:
        return {"left_out": "seqpacker is not installed"}
    import seqpacker as peer  # type: ignore[import-not-found, unused-ignore]

    packed, wall, cpu = timed(lambda: peer.pack_sequences(lengths, capacity=capacity, strategy="bfd"))
    bins = len(packed.bins)
    fill = int(lengths.sum()) / (bins * capacity)
    return {"first_s": round(wall, 4), "best_cpu_s": round(cpu, 4), "bins": bins, "fill": round(fill, 6)}


def measure(what: str, path: Path, capacity: int, documents: int) -> dict[str, Any]:
    """One row, in this process."""
    lengths = resample(path, documents, capacity)
    calls = {
        "pack_lengths": lambda: ours(lengths, capacity),
        "trl windows": lambda: trl_packer(lengths, capacity, whole=False),
        "trl whole": lambda: trl_packer(lengths, capacity, whole=True),
        "seqpacker": lambda: seqpacker(lengths, capacity),
    }
    load = os.getloadavg()[0]
    row = calls[what]()
    return {
        "what": what,
        "lengths": path.stem,
        "capacity": capacity,
        "documents": documents,
        **row,
        "load_average_before": round(load, 2),
        "load_average_after": round(os.getloadavg()[0], 2),
    }


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def missed_bounds(row: dict[str, Any]) -> list[str]:
    bound = BOUNDS_S.get(row["documents"])
    if row["what"] != "pack_lengths" or bound is None:
        return []
    missed = []
    if row["best_s"] > bound:
        missed.append(f"{row['best_s']} s is above {bound} s")
    if row["peak_bytes_per_document"] > BOUND_BYTES:
        missed.append(f"{row['peak_bytes_per_document']} bytes a document is above {BOUND_BYTES}")
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", required=True, metavar="FILE.npy:CAPACITY")
    parser.add_argument("--sizes", nargs="+", type=float, default=[1e6, 1e7, 1e8], metavar="DOCUMENTS")
    parser.add_argument("--peer-size", type=float, default=1e5, help="documents for TRL's packer")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--row", help=argparse.SUPPRESS)  # a child's task
    args = parser.parse_args()
    files = [(Path(path), int(capacity)) for path, capacity in (spec.rsplit(":", 1) for spec in args.lengths)]
    if args.row:
        print(json.dumps(measure(args.row, *files[0], int(args.sizes[0]))))
        return 0

    tasks = [(what, int(args.peer_size)) for what in ("pack_lengths", "trl windows", "trl whole", "seqpacker")]
    tasks += [("pack_lengths", int(size)) for size in args.sizes]
    rows = []
    for what, size in tasks:
        for path, capacity in files:
            command = [
                sys.executable,
                __file__,
                "--row",
                what,
                "--lengths",
                f"{path}:{capacity}",
                "--sizes",
                str(size),
            ]
            out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            row = json.loads(out.splitlines()[-1])
            if missed := missed_bounds(row):
                row["missed"] = missed
            print(row, flush=True)
            rows.append(row)
    result = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {"cpu": cpu_model(), "cores": os.cpu_count(), "system": platform.platform()},
        "versions": {"python": platform.python_version()}
        | {name: installed(name) for name in ("chronicals-trl", "numpy", "trl", "datasets", "pyarrow", "seqpacker")},
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"Wrote {args.out}")
    return int(any("missed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
