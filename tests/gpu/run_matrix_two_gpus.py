"""Every layout on two GPUs against one: gradients, losses, tokens/s and memory, flag on and flag off.

    python3 tests/gpu/run_matrix_two_gpus.py --output $OUT                     the matrix
    python3 tests/gpu/run_matrix_two_gpus.py --output $OUT --layouts zero      "zero 1", "zero 2" and "zero 3" alone
    python3 tests/gpu/run_matrix_two_gpus.py --output $OUT --scaling           0.5B and 1.5B, one GPU and two
    python3 tests/gpu/run_matrix_two_gpus.py --output $OUT --zero3-7b          a 7B shape under ZeRO-3, 20 steps

{DDP, ZeRO-1, 2, 3, FSDP2} x {full, LoRA, QLoRA} x {accumulation 1, 2} x {on, off} with a small model (20 M parameters)
in bf16. The gradients of the first step, gathered, are compared with those of one GPU on both ranks' rows, flag off,
in float32 (QLoRA: in bf16); also for one GPU itself, so that a row's error is seen beside that of rounding alone. Flag
on, LoRA+ is off here, since its rates differ by intent.

Writes matrix.json, scaling.json or zero3_7b.json, anew after every cell. Each layout has its processes once, in a
process group of their own; after a failure or a cell past its time they are ended and new ones take the rest. A cell
that failed is a row with its error. Exits with 1 if a cell of ours is wrong, or failed where flag off did not.

Wall time on two H100s, estimated and not measured: 78 cells at 3 to 6 s and 6 starts at 25 s, so 6 to 10 minutes
(two calls, `--layouts ddp fsdp2` and `--layouts zero`, are the safe way below a limit of ten); --scaling 4 minutes;
--zero3-7b 6. What does not fit in --deadline is a row that says so.
`--tiny` is a dry run on two CPU processes; with DeepSpeed there set DS_ACCELERATOR=cpu.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "gpu")]

import torch  # noqa: E402
from matrix_cells import LAYOUTS, PARTS, Cell, gradient_cells, is_reference, scaling_cells, zero3_cells  # noqa: E402

from chronicals_trl._versions import installed  # noqa: E402

# Of the relative error in norm: a lost reduction comes to 0.5 and more, a wrong factor of 2 to 0.5 or 1.
BOUND, BF16_BOUND = 1e-4, 0.05
TARGET = 1.9
PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "accelerate",
    "peft",
    "deepspeed",
    "bitsandbytes",
    "triton",
    "flash-attn-4",
)


def write_small_model(folder: Path, tiny: bool) -> None:
    """Untied, so that head and embedding are told apart; weights away from their initial values."""
    import transformers

    from chronicals_trl.bench.sft.models import make_tokenizer

    shape = (
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 512}
        if tiny
        else {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "vocab_size": 8192}
    )
    config = transformers.LlamaConfig(
        **shape, num_attention_heads=4 if tiny else 8, num_key_value_heads=2, max_position_embeddings=2048,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(folder)
    make_tokenizer(shape["vocab_size"]).save_pretrained(folder)


class Results:
    """The rows so far, and the file that has them after every one."""

    def __init__(self, file: Path, options: argparse.Namespace) -> None:
        self.file = file
        self.start = time.monotonic()
        self.rows: dict[str, dict[str, Any]] = {}
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        self.head = {
            "gpus": names or None,
            "versions": {name: installed(name) for name in PACKAGES} | {"python": platform.python_version()},
            "options": {key: value for key, value in vars(options).items() if key != "output"},
            "bound": BF16_BOUND if names else BOUND,
        }

    def add(self, cell: Cell, row: dict[str, Any]) -> None:
        self.rows[cell.name] = asdict(cell) | row | {"name": cell.name}
        self.rows[cell.name]["outcome"] = self.outcome(cell)
        self.write({})
        print(line(self.rows[cell.name]), flush=True)

    def outcome(self, cell: Cell) -> str:
        row = self.rows[cell.name]
        if row.get("error") and "not_run" in row:
            return "not run"
        if row.get("error"):
            stock = self.rows.get(cell.name.replace(", on", ", off"), {})
            return "not possible" if cell.ours and stock.get("error") else "failed"
        if cell.shape is not None or is_reference(cell):
            return "ran"
        if row["gradient_error"] is None:
            return "not compared"
        # NaN is no smaller than a bound.
        return "exact" if row["gradient_error"] < self.head["bound"] and row["loss_error"] < 0.01 else "WRONG"

    def write(self, more: dict[str, Any]) -> None:
        seconds = round(time.monotonic() - self.start, 1)
        result = self.head | {"seconds": seconds} | more | {"cells": list(self.rows.values())}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.file.with_suffix(".tmp")
        temporary.write_text(json.dumps(result, indent=1) + "\n")
        temporary.replace(self.file)


def line(row: dict[str, Any]) -> str:
    if row.get("error"):
        return f"{row['name']:<50} {row['outcome']:<13} {row['error'][:110]}"
    error = row.get("gradient_error")
    shown = "" if error is None else f"gradients {error:.1e} (worst {row['worst_tensor_error']:.1e})"
    return (
        f"{row['name']:<50} {row['outcome']:<13} {shown:<36}{row['tokens_per_second']:>10,.0f} tokens/s"
        f"{row['peak_reserved_gib']:>7.2f} GiB{row['seconds']:>7.1f} s"
        + "".join(f"\n    the host waits for the GPU: {place}" for place in row.get("waits", ()))
    )


def run_group(cells: list[Cell], work: Path, small_model: Path, results: Results, options: argparse.Namespace) -> None:
    """The cells of one layout: by the same processes, until some fail or stop answering."""
    left = list(cells)
    if not installed("bitsandbytes"):
        for cell in (each for each in cells if each.part == "qlora"):
            results.add(cell, {"error": "bitsandbytes is not installed", "not_run": True})
            left.remove(cell)
    while left:
        room = options.deadline - (time.monotonic() - results.start)
        if room < options.cell_timeout / 4:
            for cell in left:
                results.add(cell, {"error": f"{options.deadline:.0f} s were over", "not_run": True})
            return
        number = len(list(work.glob("plan*")))
        plan, found, log = (work / f"{kind}{number}" for kind in ("plan", "found", "log"))
        plan.write_text(json.dumps([asdict(cell) for cell in left]))
        found.touch()
        worker = [str(ROOT / "tests" / "gpu" / "matrix_worker.py"), *map(str, (plan, small_model, work, found))]
        ranks = (
            [] if left[0].layout == "one" else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        )
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "4")}
        if not ranks:
            environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        with open(log, "w") as output:
            process = subprocess.Popen(
                [sys.executable, *ranks, *worker],
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,
            )
            error = collect(process, left, found, results, min(room, 1e9), options.cell_timeout)
        if left and error is not None:
            print("\n".join(log.read_text().splitlines()[-25:]), flush=True)
            results.add(left.pop(0), {"error": error})


def collect(
    process: subprocess.Popen[bytes], left: list[Cell], found: Path, results: Results, room: float, limit: float
) -> str | None:
    """Take the rows as they come, each cell off `left`; what went wrong with the next one if no row says so."""
    begin = last = time.monotonic()
    read = 0
    try:
        while True:
            ended = process.poll() is not None
            lines = found.read_text().splitlines(keepends=True)
            for text in (each for each in lines[read:] if each.endswith("\n")):
                read += 1
                row = json.loads(text)
                if left and row["name"] == left[0].name:  # a second rank may tell of the same failure
                    results.add(left.pop(0), row)
                    last = time.monotonic()
                    if row["error"]:
                        return None
            if ended:
                return f"the processes ended with {process.returncode}" if left else None
            if not left:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(20)
                return None
            now = time.monotonic()
            if now - last > limit or now - begin > room:
                return f"no result after {now - last:.0f} s"
            time.sleep(0.3)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the launcher; its ranks end with it
        process.wait()


def scaling(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Tokens/s of two GPUs over that of one, by shape."""
    rates = {(row["shape"], row["layout"]): row.get("tokens_per_second") for row in rows}
    shapes = sorted({row["shape"] for row in rows})
    found = {
        shape: rates[shape, "ddp"] / rates[shape, "one"] for shape in shapes
        if rates.get((shape, "ddp")) and rates.get((shape, "one"))
    }  # fmt: skip
    return {"scaling": found, "target": TARGET}


def seven_b(rows: list[dict[str, Any]]) -> dict[str, Any]:
    on, off = (
        next((row for row in rows if row["ours"] is ours and not row.get("error")), None) for ours in (True, False)
    )
    if on is None or off is None:
        return {}
    return {
        "faster": on["tokens_per_second"] / off["tokens_per_second"],
        "memory": on["peak_reserved_gib"] / off["peak_reserved_gib"] if off["peak_reserved_gib"] else None,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--layouts", nargs="+", default=["ddp", "zero", "fsdp2"], help="ddp zero1 zero2 zero3 zero fsdp2"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--zero3-7b", action="store_true")
    parser.add_argument("--cell-timeout", type=float, default=120, help="seconds; the start of the processes is in it")
    parser.add_argument("--deadline", type=float, default=570, help="seconds, after which no cell is begun")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *args: sys.exit(143))  # so that the group of the ranks is ended too
    layouts = [each for each in LAYOUTS for name in options.layouts if each.replace(" ", "").startswith(name)]
    unknown = [name for name in options.layouts if not any(each.replace(" ", "").startswith(name) for each in LAYOUTS)]
    if unknown:
        parser.error(f"no layout is called {', '.join(unknown)}")
    if options.scaling:
        name, cells, summary = "scaling", scaling_cells(options.tiny), scaling
    elif options.zero3_7b:
        name, cells, summary = "zero3_7b", zero3_cells(options.tiny), seven_b
        options.cell_timeout = max(options.cell_timeout, 280)
    else:
        name, cells, summary = "matrix", gradient_cells(layouts, options.parts, options.tiny), lambda rows: {}
    results = Results(options.output / f"{name}.json", options)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        small_model = work / "model"
        if name == "matrix":
            write_small_model(small_model, options.tiny)
        for layout in dict.fromkeys(cell.layout for cell in cells):
            run_group([cell for cell in cells if cell.layout == layout], work, small_model, results, options)
    rows = list(results.rows.values())
    told = summary(rows)
    results.write(told)
    print(told or "", f"{results.file}; {time.monotonic() - results.start:.0f} s", flush=True)
    bad = [row["name"] for row in rows if row["outcome"] == "WRONG" or (row["outcome"] == "failed" and row["ours"])]
    bad += [shape for shape, ratio in told.get("scaling", {}).items() if ratio < TARGET and not options.tiny]
    counts = Counter(row["outcome"] for row in rows)
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()), flush=True)
    print(f"bad: {'; '.join(bad) or 'none'}", flush=True)
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
