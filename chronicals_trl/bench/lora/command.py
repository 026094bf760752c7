"""The arguments of `chronicals-trl bench lora`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from chronicals_trl.bench import report
from chronicals_trl.bench.lora import run as lora_run
from chronicals_trl.bench.lora.cases import LAYERS, SETTINGS, SIDES, TINY
from chronicals_trl.bench.process import side_and_folder, side_and_python

__all__ = ["add_parser", "run"]

ROUNDS, SAMPLES = 3, 5
QUICK_SAMPLES = 5  # in one round
TIMEOUT = 400.0

_DESCRIPTION = """\
Time forward and backward of one decoder layer with LoRA (rank 32 on all seven linears), Qwen2.5-0.5B's at 16,384
tokens and 7B's at 8,192: PEFT, PEFT under torch.compile, Unsloth (in a process of its own), and ours. Adapters in fp32
under autocast, in bf16, and in fp32 without autocast, with dropout 0 and 0.05; and a 4-bit base.

Every side's gradients are compared with float64's first: no farther off than PEFT's, within a factor of 1.5. Two times
a side: the GPU's, with all launches queued behind a sleep, and a step's with the host in it. Writes
bench_lora_GPU.json and .png (with --layers: bench_lora_LAYER_GPU). Without a GPU this is a dry run on the CPU with
one tiny layer, for trying the command: its times mean nothing."""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "lora", help="one decoder layer with LoRA against PEFT, torch.compile and Unsloth", description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add("--layers", nargs="+", metavar="LAYER", choices=list(LAYERS), help=f"default all: {' '.join(LAYERS)}")
    add("--sides", nargs="+", metavar="SIDE", choices=list(SIDES), help=f"default all: {' '.join(SIDES)}")
    quick = f"{QUICK_SAMPLES} samples, not {ROUNDS * SAMPLES}; only `{next(iter(SETTINGS))}`"
    add("--quick", action="store_true", help=f"{quick}; only {next(iter(LAYERS))} without --layers")
    add("--python", action="append", type=side_and_python, default=[], metavar="SIDE=PATH",
        help="interpreter of unsloth's process")  # fmt: skip
    add("--pythonpath", action="append", type=side_and_folder, default=[], metavar="SIDE=DIR",
        help="folder put first on the path of unsloth's process")  # fmt: skip
    add("--timeout", type=float, default=TIMEOUT, metavar="S",
        help=f"seconds for unsloth's process of one layer; default {TIMEOUT:g}")  # fmt: skip
    add("--output", type=Path, metavar="DIR", help="folder for the files; default docs/results if it exists, else .")
    return parser


def run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> tuple[dict[str, Any], Path]:
    """The result, and where its files go, without the ending."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()  # one for each time that a layer is loaded, between the lines that tell the times
    for name, _ in [*options.python, *options.pythonpath]:
        if name != "unsloth":
            parser.error(f"only unsloth has a process of its own, not {name!r}")
    if not options.timeout > 0:
        parser.error(f"--timeout must be above 0, not {options.timeout:g}")
    cuda = torch.cuda.is_available()
    names = list(dict.fromkeys(options.layers or (list(LAYERS)[:1] if options.quick else LAYERS)))
    layers = [LAYERS[name] for name in names] if cuda else [TINY]
    sides = [side for side in SIDES if side in (options.sides or SIDES)]
    skipped: dict[str, str] = {}
    if not cuda:
        print(f"{report.DRY_RUN}. One tiny layer instead of {' and '.join(names)}.")
        if options.sides is None:
            skipped = dict.fromkeys(("peft-compiled", "unsloth"), "on a CPU only if --sides names it")
            sides = [side for side in sides if side not in skipped]
    folder = options.output or (Path("docs/results") if Path("docs/results").is_dir() else Path())
    folder.mkdir(parents=True, exist_ok=True)
    part = "" if len(names) == len(LAYERS) or not options.layers else "_" + "_".join(names)
    stem = report.file_stem(torch.cuda.get_device_name() if cuda else None, f"lora{part}".replace(".", ""))
    path = folder / stem.replace("-", "")
    result = lora_run.run(
        lora_run.Settings(
            layers=layers,
            settings=list(SETTINGS.values())[: 1 if options.quick else None],
            sides=sides,
            skipped=skipped,
            device=torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu"),
            rounds=1 if options.quick else ROUNDS,
            samples=QUICK_SAMPLES if options.quick else SAMPLES,
            timeout=options.timeout,
            logs=folder / f"{path.name}_logs",
            python=dict(options.python),
            pythonpath=dict(options.pythonpath),
            keep=lambda so_far: report.write_json(so_far, path.with_suffix(".json")),
        ),
        say=lambda line: print(line, flush=True),
    )
    return result, path
