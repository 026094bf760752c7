"""The command line of the benchmarks: `chronicals-trl bench ops`, `head`, `attention`, `lora` and `sft`.

Without the console script: `python3 -m chronicals_trl.bench ops`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from chronicals_trl.bench import report
from chronicals_trl.bench.attention import cases as attention
from chronicals_trl.bench.attention import report as attention_report
from chronicals_trl.bench.attention import run as attention_run
from chronicals_trl.bench.head import cases as head
from chronicals_trl.bench.head import report as head_report
from chronicals_trl.bench.head import run as head_run
from chronicals_trl.bench.lora import command as lora_command
from chronicals_trl.bench.lora import report as lora_report
from chronicals_trl.bench.ops import report as ops_report
from chronicals_trl.bench.ops.cases import OPS, SHAPES, SIDES
from chronicals_trl.bench.ops.run import Settings, run
from chronicals_trl.bench.sft import command as sft_command

__all__ = ["main"]

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
REPEATS, QUICK_REPEATS = 15, 5
HEAD_SAMPLES, QUICK_HEAD_SAMPLES = 5, 2  # in each round
DRY_RUN_TOKENS, DRY_RUN_HIDDEN, DRY_RUN_VOCAB = 32, 64, 1000
DRY_RUN_DOCUMENT_TOKENS, DRY_RUN_HEAD_DIM = 1024, 16  # more than one document

_OPS_DESCRIPTION = """\
Time the fused ops, forward and backward, against eager torch, torch.compile, Liger and quack on this GPU.

Every side is checked against float64 first. Times are CUDA-graph replays over buffers that together exceed the L2
cache; the copy bandwidth of the GPU is measured in the same run and is the yardstick. Writes bench_ops_GPU.json and
.png. Without a GPU this is a dry run on the CPU, for trying the command: its times mean nothing."""

_HEAD_DESCRIPTION = """\
Time the linear head with cross-entropy, forward and backward in bf16, with a trained and a frozen weight, against
TRL's fused head, Liger, Apple's Cut Cross-Entropy, quack, torch's own op, torch.compile and full logits.

Every side is checked against float64 on a sample; its memory is measured; the matrix multiplications alone are timed
in the same run and are the yardstick. Writes bench_head_GPU.json and .png. Without a GPU this is a dry run on the CPU
with tiny sizes, for trying the command: its times mean nothing."""

_ATTENTION_DESCRIPTION = """\
Time attention within packed documents, forward and backward in bf16: each back end through the function that
transformers calls, beside flash-attn-4 and torch's varlen attention called directly, SDPA with a mask, and
flex_attention; with a cu_seqlens that is exact, and with empty documents at its end.

Every side is checked against float64 first. Times are CUDA-graph replays over buffers that together exceed the L2
cache; the host's cost of a forward call is counted apart. Writes bench_attention_GPU.json and .png. Without a GPU
this is a dry run on the CPU with tiny sizes, for trying the command: its times mean nothing."""


def main(argv: Sequence[str] | None = None, prog: str = "chronicals-trl bench") -> int:
    """Run what `argv` says; returns the exit code: 1 when one of our own ops failed or was wrong."""
    parser = argparse.ArgumentParser(prog=prog, description="Benchmarks of chronicals-trl.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="{ops,head,attention,lora,sft}", required=True)
    ops = commands.add_parser(
        "ops", help="the fused ops against eager, torch.compile, Liger and quack", description=_OPS_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    ops.add_argument("--ops", nargs="+", metavar="OP", help=f"default all: {' '.join(OPS)}")
    ops.add_argument("--dtype", default="bfloat16", help=f"one of {' '.join(DTYPES)}; default bfloat16")
    _add_common(ops, SHAPES, SIDES, f"{QUICK_REPEATS} samples, not {REPEATS}; no host costs")
    heads = commands.add_parser(
        "head", help="the head with its cross-entropy against TRL, Liger, Apple's CCE, quack and torch",
        description=_HEAD_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    quick = f"{head_run.ROUNDS * QUICK_HEAD_SAMPLES} samples, not {head_run.ROUNDS * HEAD_SAMPLES}"
    _add_common(heads, head.SHAPES, head.SIDES, quick)
    attend = commands.add_parser(
        "attention", help="attention within packed documents against the kernels called directly",
        description=_ATTENTION_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    quick = f"{QUICK_REPEATS} samples, not {REPEATS}"
    _add_common(attend, attention.SHAPES, attention.SIDES, quick, DRY_RUN_DOCUMENT_TOKENS)
    lora = lora_command.add_parser(commands)
    sft = sft_command.add_parser(commands)
    options = parser.parse_args(argv)
    if options.command == "lora":
        return _finish(*lora_command.run(lora, options), lora_report)
    if options.command == "sft":
        return sft_command.run(sft, options)
    if options.command == "ops":
        return _ops(ops, options)
    return _head(heads, options) if options.command == "head" else _attention(attend, options)


def _add_common(
    parser: argparse.ArgumentParser,
    shapes: Iterable[str],
    sides: Iterable[str],
    quick: str,
    dry_run_tokens: int = DRY_RUN_TOKENS,
) -> None:
    shapes = list(shapes)
    parser.add_argument("--shapes", nargs="+", metavar="SHAPE", help=f"default all: {' '.join(shapes)}")
    parser.add_argument("--sides", nargs="+", metavar="SIDE", help=f"default all: {' '.join(sides)}")
    parser.add_argument(
        "--tokens", type=int, metavar="N", help=f"instead of the shapes' own ({dry_run_tokens} on a CPU)"
    )
    parser.add_argument("--quick", action="store_true", help=f"{quick}; only {shapes[0]} without --shapes")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder for the files; default docs/results if it exists, else ."
    )


def _ops(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    ops = _known(parser, "op", options.ops, OPS, list(OPS))
    shapes, sides = _shapes_and_sides(parser, options, SHAPES, SIDES)
    _known(parser, "dtype", [options.dtype], DTYPES, [])
    device, folder, tokens = _prepare(options)
    skipped: dict[str, str] = {}
    if device.type == "cpu":  # minutes of C++ compiling that would show nothing
        sides, skipped = _on_cpu(options, sides, ["compile"])
    result = run(
        Settings(
            ops=[OPS[name] for name in ops],
            shapes=[replace(SHAPES[name], tokens=tokens or SHAPES[name].tokens) for name in shapes],
            sides=sides,
            skipped=skipped,
            dtype=DTYPES[options.dtype],
            device=device,
            repeats=QUICK_REPEATS if options.quick else REPEATS,
            host=not options.quick,
        ),
        say=_say,
    )
    return _finish(result, folder / report.file_stem(result["gpu"]), ops_report)


def _head(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    names, sides = _shapes_and_sides(parser, options, head.SHAPES, head.SIDES)
    device, folder, tokens = _prepare(options)
    shapes = [replace(head.SHAPES[name], tokens=tokens or head.SHAPES[name].tokens) for name in names]
    skipped: dict[str, str] = {}
    if device.type == "cpu":
        shapes = [replace(shape, hidden=DRY_RUN_HIDDEN, vocab=DRY_RUN_VOCAB) for shape in shapes]
        sides, skipped = _on_cpu(options, sides, head.NOT_ON_CPU)
    path = folder / report.file_stem(None if device.type == "cpu" else torch.cuda.get_device_name(device), "head")
    result = head_run.run(
        head_run.Settings(
            shapes=shapes,
            sides=sides,
            skipped=skipped,
            dtype=torch.bfloat16,
            device=device,
            samples=QUICK_HEAD_SAMPLES if options.quick else HEAD_SAMPLES,
            keep=lambda so_far: report.write_json(so_far, path.with_suffix(".json")),
        ),
        say=_say,
    )
    return _finish(result, path, head_report)


def _attention(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    names, sides = _shapes_and_sides(parser, options, attention.SHAPES, attention.SIDES)
    device, folder, tokens = _prepare(options, DRY_RUN_DOCUMENT_TOKENS)
    shapes = [replace(attention.SHAPES[name], tokens=tokens or attention.SHAPES[name].tokens) for name in names]
    skipped: dict[str, str] = {}
    if device.type == "cpu":
        shapes = [replace(shape, head_dim=DRY_RUN_HEAD_DIM) for shape in shapes]
        sides, skipped = _on_cpu(options, sides, attention.NOT_ON_CPU)
    gpu = None if device.type == "cpu" else torch.cuda.get_device_name(device)
    path = folder / report.file_stem(gpu, "attention")
    result = attention_run.run(
        attention_run.Settings(
            shapes=shapes,
            sides=sides,
            skipped=skipped,
            dtype=torch.bfloat16,
            device=device,
            repeats=QUICK_REPEATS if options.quick else REPEATS,
            keep=lambda so_far: report.write_json(so_far, path.with_suffix(".json")),
        ),
        say=_say,
    )
    return _finish(result, path, attention_report)


def _on_cpu(
    options: argparse.Namespace, sides: list[str], left_out: Iterable[str]
) -> tuple[list[str], dict[str, str]]:
    """The sides of a dry run, and why others are not in it: what `--sides` names always is."""
    if options.sides is not None:
        return sides, {}
    skipped = dict.fromkeys(left_out, "on a CPU only if --sides names it")
    return [side for side in sides if side not in skipped], skipped


def _shapes_and_sides(
    parser: argparse.ArgumentParser, options: argparse.Namespace, shapes: Iterable[str], sides: Iterable[str]
) -> tuple[list[str], list[str]]:
    shapes, sides = list(shapes), list(sides)
    if options.tokens is not None and options.tokens < 1:
        parser.error(f"--tokens must be at least 1, not {options.tokens}")
    return (
        _known(parser, "shape", options.shapes, shapes, shapes[:1] if options.quick else shapes),
        _known(parser, "side", options.sides, sides, sides),
    )


def _prepare(
    options: argparse.Namespace, dry_run_tokens: int = DRY_RUN_TOKENS
) -> tuple[torch.device, Path, int | None]:
    """The device, the folder for the files, and the number of tokens, None for the shapes' own."""
    folder = options.output or (Path("docs/results") if Path("docs/results").is_dir() else Path())
    folder.mkdir(parents=True, exist_ok=True)
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device()), folder, options.tokens
    tokens = dry_run_tokens if options.tokens is None else options.tokens
    print(f"{report.DRY_RUN}. {tokens} tokens.")
    return torch.device("cpu"), folder, tokens


def _finish(result: dict[str, Any], path: Path, shown_by: Any) -> int:
    """Files and tables; `shown_by` is the module that makes the tables and the plot of this benchmark."""
    report.write_json(result, path.with_suffix(".json"))  # first: whatever the rest does, the figures are kept
    shown_by.print_tables(result)
    without_plot = shown_by.write_plot(result, path.with_suffix(".png"))
    print(f"{path.with_suffix('.json')}; {without_plot or path.with_suffix('.png')}; {result['seconds']} s in all")
    wrong = ("failed", "wrong answer")
    return int(any(row["side"].startswith("ours") and row["status"] in wrong for row in result["rows"]))


def _say(line: str) -> None:
    print(line, flush=True)


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
