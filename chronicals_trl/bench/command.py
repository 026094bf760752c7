"""The command line of the benchmarks: `chronicals-trl bench ops`, or `python3 -m chronicals_trl.bench ops`."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from chronicals_trl.bench import report
from chronicals_trl.bench.ops import OPS, SHAPES, SIDES
from chronicals_trl.bench.run import Settings, run

__all__ = ["main"]

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
REPEATS, QUICK_REPEATS = 15, 5
DRY_RUN_TOKENS = 32

_OPS_DESCRIPTION = """\
Time the fused ops, forward and backward, against eager torch, torch.compile, Liger and quack on this GPU.

Every side is checked against float64 first. Times are CUDA-graph replays over buffers that together exceed the L2
cache; the copy bandwidth of the GPU is measured in the same run and is the yardstick. Writes bench_ops_GPU.json and
.png. Without a GPU this is a dry run on the CPU, for trying the command: its times mean nothing."""


def main(argv: Sequence[str] | None = None, prog: str = "chronicals-trl bench") -> int:
    """Run what `argv` says; returns the exit code: 1 when one of our own ops failed or was wrong."""
    parser = argparse.ArgumentParser(prog=prog, description="Benchmarks of chronicals-trl.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="{ops}", required=True)
    ops = commands.add_parser(
        "ops", help="the fused ops against eager, torch.compile, Liger and quack", description=_OPS_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    ops.add_argument("--ops", nargs="+", metavar="OP", help=f"default all: {' '.join(OPS)}")
    ops.add_argument("--shapes", nargs="+", metavar="SHAPE", help=f"default all: {' '.join(SHAPES)}")
    ops.add_argument("--sides", nargs="+", metavar="SIDE", help=f"default all: {' '.join(SIDES)}")
    ops.add_argument("--dtype", default="bfloat16", help=f"one of {' '.join(DTYPES)}; default bfloat16")
    ops.add_argument("--tokens", type=int, metavar="N", help=f"instead of the shapes' own ({DRY_RUN_TOKENS} on a CPU)")
    ops.add_argument(
        "--quick", action="store_true",
        help=f"{QUICK_REPEATS} samples, not {REPEATS}; no host costs; only {next(iter(SHAPES))} without --shapes",
    )  # fmt: skip
    ops.add_argument(
        "--output", type=Path, metavar="DIR", help="folder for the files; default docs/results if it exists, else ."
    )
    options = parser.parse_args(argv)
    return _ops(ops, options)


def _ops(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    default_shapes = list(SHAPES)[:1] if options.quick else list(SHAPES)
    ops = _known(parser, "op", options.ops, OPS, list(OPS))
    shapes = _known(parser, "shape", options.shapes, SHAPES, default_shapes)
    sides = _known(parser, "side", options.sides, SIDES, list(SIDES))
    _known(parser, "dtype", [options.dtype], DTYPES, [])
    if options.tokens is not None and options.tokens < 1:
        parser.error(f"--tokens must be at least 1, not {options.tokens}")
    folder = options.output or (Path("docs/results") if Path("docs/results").is_dir() else Path())
    folder.mkdir(parents=True, exist_ok=True)

    on_gpu = torch.cuda.is_available()
    tokens = options.tokens if options.tokens is not None or on_gpu else DRY_RUN_TOKENS
    skipped = {}
    if not on_gpu:
        print(f"{report.DRY_RUN}. {tokens} tokens.")
        if options.sides is None:  # minutes of C++ compiling that would show nothing
            sides = [side for side in sides if side != "compile"]
            skipped["compile"] = "on a CPU only if --sides names it"
    result = run(
        Settings(
            ops=[OPS[name] for name in ops],
            shapes=[replace(SHAPES[name], tokens=tokens or SHAPES[name].tokens) for name in shapes],
            sides=sides,
            skipped=skipped,
            dtype=DTYPES[options.dtype],
            device=torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu"),
            repeats=QUICK_REPEATS if options.quick else REPEATS,
            host=not options.quick,
        ),
        say=lambda line: print(line, flush=True),
    )
    path = folder / report.file_stem(result["gpu"])
    report.write_json(result, path.with_suffix(".json"))  # first: whatever the rest does, the figures are kept
    report.print_tables(result)
    without_plot = report.write_plot(result, path.with_suffix(".png"))
    print(f"{path.with_suffix('.json')}; {without_plot or path.with_suffix('.png')}; {result['seconds']} s in all")
    broken = [row for row in result["rows"] if row["side"] == "ours" and row["status"] != "ok"]
    return 1 if broken else 0


def _known(
    parser: argparse.ArgumentParser,
    kind: str,
    names: list[str] | None,
    allowed: Iterable[str],
    default: list[str],
) -> list[str]:
    """`names`, each once, or `default`; an unknown one ends the program with the names that there are."""
    for name in names or ():
        if name not in allowed:
            parser.error(f"unknown {kind} {name!r}; there are: {', '.join(allowed)}")
    return list(dict.fromkeys(names)) if names else default
