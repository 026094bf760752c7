"""The arguments of `chronicals-trl bench sft`."""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path
from typing import Any

from chronicals_trl.bench import report
from chronicals_trl.bench.process import side_and_folder, side_and_python
from chronicals_trl.bench.sft import report as sft_report
from chronicals_trl.bench.sft import run as sft_run
from chronicals_trl.bench.sft.ablation import ablation_sides
from chronicals_trl.bench.sft.cases import LIGHTER, LONGEST, MASTERS, MODES, PROTOCOLS, SHAPES, SIDES

__all__ = ["add_parser", "default_sides", "run"]

STEPS, DRY_STEPS, WARM_UP, REPEATS = 50, 6, 10, 3
TIMEOUT = 900.0
INTERRUPTED = 130  # as shells have it
LEARNING_RATES = {"full": 1e-4, "lora": 2e-4, "qlora": 2e-4}
TOKENS_PER_STEP = 16_384
DRY_ROW_TOKENS, DRY_ROWS = 256, 2

_DESCRIPTION = """\
Train the same documents with us and with every peer in turn, each in a process of its own, with its real trainer:
stock TRL (as it comes, tuned), TRL + Liger with torch's varlen attention, the same with Apple's Cut Cross-Entropy,
Unsloth (as it comes, packing), a bare torch.compile loop, and the package `chronicals` of PyPI.

Random bf16 weights of one seed; AdamW, constant rate, no weight decay, gradients clipped at 1. Real tokens are counted
from the batches, alike for all. A side that packs sees other rows of the same documents. A row whose gradient is zero
or whose loss does not fall as the reference's does is invalid, whoever's it is. A side that fails or hangs is a row
that says so; what it printed is in bench_sft_..._logs. Without a GPU this is a dry run on the CPU with the shape
`tiny`, for trying the command: its times mean nothing."""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "sft", help="whole training runs against TRL, Liger, Unsloth and torch.compile", description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    plain = [name for name, side in SIDES.items() if side.parts is None]
    add("--shape", choices=list(SHAPES), help="default qwen2.5-0.5b, and tiny without a GPU")
    add("--mode", choices=MODES, default="lora", help="all weights, adapters of rank 32, or those on 4-bit weights")
    add("--protocol", choices=list(PROTOCOLS), default="packed", help="packed rows, or the paper's short padded texts")
    add("--sides", nargs="+", metavar="SIDE", choices=list(SIDES),
        help=f"of {' '.join(plain)}; default by protocol, never {' nor '.join(LIGHTER)}")  # fmt: skip
    add("--row-tokens", type=_positive, metavar="N", help="longest row; default 2048 packed, 512 short")
    add("--tokens-per-step", type=_positive, metavar="N",
        help=f"packed: a multiple of --row-tokens; default {TOKENS_PER_STEP:,}")  # fmt: skip
    add("--documents-per-step", type=_positive, metavar="N", help="short: default 16, or 2 with adapters")
    add("--gradient-checkpointing", choices=("on", "off", "default"), default="off",
        help="the same for all, or as each framework comes")  # fmt: skip
    add("--steps", type=_positive, metavar="N", help=f"of a timed window; default {STEPS}, {DRY_STEPS} in a dry run")
    add("--warmup-steps", type=_positive, default=WARM_UP, metavar="N", help=f"not timed; default {WARM_UP}")
    add("--repeats", type=_positive, default=REPEATS, metavar="N", help=f"timed windows; default {REPEATS}")
    add("--fresh-processes", action="store_true", help="each repeat in a process of its own, interleaved")
    add("--learning-rate", type=float, metavar="X", help="default 1e-4, or 2e-4 with adapters")
    add("--seed", type=int, default=0, metavar="N", help="of weights, documents and trainers")
    add("--timeout", type=float, default=TIMEOUT, metavar="S", help=f"seconds for one process; default {TIMEOUT:g}")
    add("--python", action="append", type=side_and_python, default=[], metavar="SIDE=PATH",
        help="interpreter of a side; `unsloth=...` holds for unsloth-packing too")  # fmt: skip
    add("--pythonpath", action="append", type=side_and_folder, default=[], metavar="SIDE=DIR",
        help="folder put first on the path of a side")  # fmt: skip
    add("--chronicals-config", type=_json, default={}, metavar="JSON",
        help="of our sides, as in a script; LoRA+ is off unless named here, so that all train alike")  # fmt: skip
    add("--master", choices=MASTERS, default="bf16",
        help="weights loaded in bf16 and trained so, or fp32 ones, whose products autocast makes bf16")  # fmt: skip
    add("--ablation", action="store_true", help="our parts one after the other, and of --sides only what is named")
    add("--floor", action="store_true", help="measure as well what our side's step takes at the least")
    add("--models", type=Path, metavar="DIR", help="keep the model's folder here for the next run")
    add("--output", type=Path, metavar="DIR", help="folder for the files; default docs/results if it exists, else .")
    return parser


def default_sides(protocol: str) -> list[str]:
    """In the short protocol our strict row and one that packs; in the packed one they would be the same."""
    left_out = {
        "packed": ("chronicals-packing", "trl", "unsloth", "pypi-chronicals", "pypi-chronicals-bf16"),
        "short": ("trl-tuned", "trl-cce", "torch-compile"),
    }[protocol]
    return [name for name, side in SIDES.items() if name not in (*left_out, *LIGHTER) and side.parts is None]


def _sides(options: argparse.Namespace) -> list[str]:
    """Each once: what is named, else the default; an ablation alone ends with all of ours."""
    steps = ablation_sides(options.mode, PROTOCOLS[options.protocol].packs) if options.ablation else []
    named = options.sides or (["chronicals"] if options.ablation else default_sides(options.protocol))
    return list(dict.fromkeys([*steps, *named]))


def run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    """Returns the exit code: 1 when one of our own sides failed or was invalid."""
    import torch

    cuda = torch.cuda.is_available()
    shape = options.shape or ("qwen2.5-0.5b" if cuda else "tiny")
    dry = not cuda and shape == "tiny"
    protocol = PROTOCOLS[options.protocol]
    row_tokens = options.row_tokens or (DRY_ROW_TOKENS if dry else protocol.row_tokens)
    tokens = options.tokens_per_step or (DRY_ROWS * row_tokens if dry else TOKENS_PER_STEP)
    rate = LEARNING_RATES[options.mode] if options.learning_rate is None else options.learning_rate
    folder = options.output or (Path("docs/results") if Path("docs/results").is_dir() else Path())
    told = _wrong(options, row_tokens, tokens, rate) or _made(folder)
    if told is not None:
        parser.error(told)
    gpu = torch.cuda.get_device_name(0) if cuda else None
    checkpointing = {"on": "_ckpt", "off": "", "default": "_default"}[options.gradient_checkpointing]
    master = "" if options.master == "bf16" else f"_{options.master}"
    case = f"sft_{shape}_{options.mode}_{options.protocol}{row_tokens}{checkpointing}{master}"
    case += "_ablation" if options.ablation else ""
    case = case.replace(".", "").replace("-", "")
    path = folder / report.file_stem(gpu, case)
    if not cuda:
        print(f"{report.DRY_RUN}. {shape}, {options.mode}, {options.protocol}.")
    kept: list[Path] = []

    def keep(so_far: dict[str, Any]) -> None:
        report.write_json(so_far, path.with_suffix(".json"))
        kept[:] = [path.with_suffix(".json")]

    settings = sft_run.Settings(
        sides=_sides(options),
        mode=options.mode,
        shape=shape,
        protocol=options.protocol,
        checkpointing=options.gradient_checkpointing,
        row_tokens=row_tokens,
        tokens_per_step=tokens,
        documents_per_step=options.documents_per_step or (16 if options.mode == "full" else 2),
        warm_up=options.warmup_steps,
        steps=options.steps or (DRY_STEPS if dry else STEPS),
        repeats=options.repeats,
        fresh=options.fresh_processes,
        learning_rate=rate,
        seed=options.seed,
        timeout=options.timeout,
        models=options.models,
        logs=folder / f"{path.name}_logs",
        python=dict(options.python),
        pythonpath=dict(options.pythonpath),
        chronicals={"lora_plus": "off", **options.chronicals_config},
        master=options.master,
        floor=options.floor,
        keep=keep,
    )
    try:
        result = sft_run.run(settings, say=lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        print(
            f"Interrupted. {kept[0]} has what was measured before." if kept else "Interrupted; nothing was measured."
        )
        return INTERRUPTED
    report.write_json(result, path.with_suffix(".json"))
    sft_report.print_tables(result)
    without_plot = sft_report.write_plot(result, path.with_suffix(".png"))
    print(f"{path.with_suffix('.json')}; {without_plot or path.with_suffix('.png')}; {result['seconds']} s in all")
    wrong = ("failed", "invalid", "not run")
    return int(any(SIDES[row["side"]].ours and row["status"] in wrong for row in result["rows"]))


def _wrong(options: argparse.Namespace, row_tokens: int, tokens: int, rate: float) -> str | None:
    """What is wrong with the arguments taken together, or None."""
    packs = PROTOCOLS[options.protocol].packs
    if packs and options.documents_per_step is not None:
        return "--documents-per-step is of --protocol short; packed rows are told by --tokens-per-step"
    if not packs and options.tokens_per_step is not None:
        return "--tokens-per-step is of --protocol packed; short documents are told by --documents-per-step"
    if packs and tokens % row_tokens:
        return f"--tokens-per-step {tokens} is no multiple of --row-tokens {row_tokens}"
    if not 2 <= row_tokens <= LONGEST:
        return f"--row-tokens must be at least 2 and at most {LONGEST}, not {row_tokens}"
    if not 0 < rate < math.inf:
        return f"--learning-rate must be above 0 and finite, not {rate}"
    if not 0 < options.timeout < math.inf:
        return f"--timeout must be above 0 and finite, not {options.timeout:g}"
    if options.seed < 0:
        return f"--seed must be at least 0, not {options.seed}"
    for name, _ in [*options.python, *options.pythonpath]:
        if name not in {*SIDES, *(side.split("-")[0] for side in SIDES)}:
            return f"unknown side {name!r}; there are: {', '.join(SIDES)}"
    if options.chronicals_config:
        from chronicals_trl.config import ChronicalsConfig

        try:
            ChronicalsConfig.resolve(options.chronicals_config)
        except (TypeError, ValueError) as error:
            return f"--chronicals-config: {error}"
    return None


def _made(folder: Path) -> str | None:
    """Make the folder; why nothing can be written there, or None."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"--output: {folder} cannot be made: {error.strerror}"
    return None if os.access(folder, os.W_OK) else f"--output: {folder} cannot be written to"


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def _json(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, not {text}")
    return value
