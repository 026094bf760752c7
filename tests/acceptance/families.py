"""Every text family of the installed transformers, tiny and random: one step of the flag against one of stock TRL.

    OMP_NUM_THREADS=1 .venv/bin/python tests/acceptance/families.py
    OMP_NUM_THREADS=1 .venv/bin/python tests/acceptance/families.py --families llama qwen3 --output /tmp/two.json

Not collected by pytest: it takes seven minutes on one core. Each family of transformers'
`MODEL_FOR_CAUSAL_LM_MAPPING_NAMES` is built with the settings of `family_settings.py` (a few layers of width 32, noise
on every weight, so that no norm weight is one and no bias nought) and trained in float32 on the CPU with the real
`SFTTrainer`, one step of two documents of unequal length: stock TRL, the flag with `padding_free="off"`, and the flag
as it is by default (`padding_free="auto"`). Both runs of the flag must have

- stock TRL's loss, to `LOSS_BOUND` of it;
- gradients of the same parameters, each to `GRADIENT_BOUND` of its largest entry. A parameter whose gradient is all
  but nought has no digits to compare: at least `LEAST_SCALE` of the model's largest entry counts as its scale.

`not built`, with the reason: the family's configuration holds those of other models (images, sound; the text model
inside has mostly a row of its own), it cannot be made from its own defaults, or the settings leave more than
`MOST_PARAMETERS` parameters.
`stock TRL fails`: nothing to compare with, and `ours` says whether the flag trains.

Writes the output after each family; `--resume` keeps the rows that an interrupted call, with the same versions, has
left in it. Exits with 1 if a family differs, or fails with the flag alone.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import math
import os
import platform
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as ARCHITECTURES

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import tiny_data  # noqa: E402
from family_settings import EXPERTS_SPELT_OTHERWISE, LAYERS, OF_A_FAMILY, TINY  # noqa: E402
from training_runs import logged, run  # noqa: E402

from chronicals_trl import SFTConfig, SFTTrainer  # noqa: E402
from chronicals_trl._versions import versions  # noqa: E402
from chronicals_trl.report import ActivationReport  # noqa: E402

RESULT = ROOT / "docs" / "results" / "families_cpu.json"
LOSS_BOUND, GRADIENT_BOUND, LEAST_SCALE = 1e-5, 2e-4, 1e-4
MOST_PARAMETERS = 100_000_000
SECONDS = 90  # for building, and for each run; a tiny model takes about one
OPTIONS: dict[str, Any] = {"per_device_train_batch_size": 2, "max_steps": 1, "learning_rate": 1e-3}
SETTINGS: dict[str, dict[str, Any]] = {
    "off": {"use_chronicals": True, "chronicals_config": {"padding_free": "off"}},
    "auto": {"use_chronicals": True},
}
HOLDS_ONE_MODEL = ("mpt", "dbrx")  # their sub-configurations are of the attention and the experts
# What names the number of layers, and what has as many entries without being a list of layers.
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "num_blocks")
NOT_BY_LAYER = ("attention_layers",)


class NotBuiltError(Exception):
    """The family is left out; the message says why."""


@dataclass
class Step:
    """Loss, gradients by parameter, and the report (None for stock TRL) of one step."""

    loss: float
    gradients: dict[str, torch.Tensor]
    report: ActivationReport | None

    def is_usable(self) -> bool:
        """Whether the flag can be compared with it: all finite, and some gradient not nought."""
        largest = [gradient.abs().max().item() for gradient in self.gradients.values()]
        return math.isfinite(self.loss) and all(map(math.isfinite, largest)) and max(largest, default=0.0) > 0


# -- tiny models -----------------------------------------------------------------------------------------------------


def shortened(entries: list[Any]) -> list[Any]:
    """`LAYERS` entries out of one for each layer of the family's default, with as many kinds as there is room for."""
    kinds: list[Any] = []
    for entry in entries:
        if entry not in kinds:
            kinds.append(entry)
    return (kinds * LAYERS)[:LAYERS]


def tiny_config(family: str) -> Any:
    default = CONFIG_MAPPING[family]().to_dict()
    settings = {name: value for name, value in TINY.items() if name in default}
    layers = next((default[name] for name in LAYER_COUNTS if name in default), None) or 0
    for name, value in default.items():
        if isinstance(value, list) and len(value) == layers > LAYERS and name not in NOT_BY_LAYER:
            settings[name] = shortened(value)
    if "sliding_window_pattern" in default or "_sliding_window_pattern" in default:
        settings["sliding_window_pattern"] = 2
    if "qk_rope_head_dim" in default and "kv_lora_rank" in default:  # latent attention: as many key heads as queries
        settings |= {"num_key_value_heads": TINY["num_attention_heads"], "head_dim": TINY["qk_rope_head_dim"]}
    if default.get("num_key_value_heads", 0) is None:
        settings.pop("num_key_value_heads", None)
    settings |= OF_A_FAMILY.get(family, {})
    by_default = [name for name in ("layer_types", "mlp_layer_types") if settings.get(name, ()) is None]
    config = CONFIG_MAPPING[family](**{name: value for name, value in settings.items() if name not in by_default})
    if family in EXPERTS_SPELT_OTHERWISE:
        config.num_experts = TINY["num_experts"]
    return config


def check_text_family(family: str) -> None:
    if CONFIG_MAPPING[family]().sub_configs and family not in HOLDS_ONE_MODEL:
        raise NotBuiltError("not one text model: its configuration holds those of other models")
    with torch.device("meta"):
        count = sum(weight.numel() for weight in model_class(family)(tiny_config(family)).parameters())
    if count > MOST_PARAMETERS:
        raise NotBuiltError(f"{count:,} parameters are left with these settings")


def model_class(family: str) -> Any:
    return getattr(transformers, ARCHITECTURES[family])


def build(family: str) -> Any:
    """The same float32 model at each call."""
    torch.manual_seed(0)
    model = model_class(family)(tiny_config(family))
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.is_floating_point():
                weight.add_(torch.randn(weight.shape, generator=noise) * 0.05)
    return model.float().train()


# -- one step --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in the body when it takes longer."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def step(family: str, trainer_class: type, config_class: type, options: dict[str, Any]) -> Step:
    with limited(SECONDS), tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        torch.manual_seed(5)
        arguments = {"options": OPTIONS | options, "model": build(family), "data": tiny_data.text(8)}
        trainer, gradients = run(trainer_class, config_class, Path(folder), **arguments)
    return Step(logged(trainer, "loss")[0], gradients, getattr(trainer, "chronicals_report", None))


def attempt(family: str, trainer_class: type, config_class: type, options: dict[str, Any]) -> Step | str:
    """The step, or the error in a line."""
    try:
        return step(family, trainer_class, config_class, options)
    except Exception as error:
        return in_a_line(error)


def in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


# -- comparison ------------------------------------------------------------------------------------------------------


def compare(ours: Step, stock: Step) -> dict[str, Any]:
    """Relative differences of the loss and of the parameter that differs most; `stock` is usable."""
    largest = {name: gradient.abs().max().item() for name, gradient in stock.gradients.items()}
    least = LEAST_SCALE * max(largest.values())
    differences = {
        name: finite((ours.gradients[name] - gradient).abs().max().item() / max(largest[name], least))
        for name, gradient in stock.gradients.items()
        if name in ours.gradients
    }
    worst = max(differences, key=differences.__getitem__, default=None)
    row = {
        "loss": finite(abs(ours.loss - stock.loss) / abs(stock.loss)),
        "gradient": 0.0 if worst is None else differences[worst],
        "worst_parameter": worst,
    }
    only_one_has = sorted(ours.gradients.keys() ^ stock.gradients.keys())
    return row | ({"gradient_on_one_side_only": only_one_has} if only_one_has else {})


def finite(difference: float) -> float:
    """A NaN counts as the largest difference there is; `max` would pass it over."""
    return math.inf if math.isnan(difference) else difference


def agrees(row: dict[str, Any]) -> bool:
    within = row["loss"] <= LOSS_BOUND and row["gradient"] <= GRADIENT_BOUND
    return bool(within and "gradient_on_one_side_only" not in row)


def reported(report: ActivationReport) -> dict[str, Any]:
    """What the flag says of the default setting: each part's state, and whether it trains without padding."""
    parts = {part.name: part.state if part.reason is None else f"{part.state}: {part.reason}" for part in report.parts}
    notes = [note for note in report.notes if note.startswith("padding-free")]
    return {"parts": parts, "padding_free": notes[0] if notes else None}


def row_of(family: str) -> dict[str, Any]:
    """Train and compare one family: `outcome`, and what led to it."""
    row: dict[str, Any] = {"family": family, "model": ARCHITECTURES[family]}
    try:
        with limited(SECONDS):
            check_text_family(family)
            build(family)
    except Exception as error:
        reason = str(error) if isinstance(error, NotBuiltError) else in_a_line(error)
        return row | {"outcome": "not built", "reason": reason}
    stock = attempt(family, trl.SFTTrainer, trl.SFTConfig, {})
    ours = {name: attempt(family, SFTTrainer, SFTConfig, options) for name, options in SETTINGS.items()}
    errors = {name: made for name, made in ours.items() if isinstance(made, str)}
    if isinstance(stock, str) or not stock.is_usable():
        reason = stock if isinstance(stock, str) else "its loss or gradients are not finite, or all gradients nought"
        return row | {"outcome": "stock TRL fails", "reason": reason, "ours": errors or "trains"}
    if errors:
        return row | {"outcome": "ours fails", "reason": errors}
    compared = {name: compare(made, stock) for name, made in ours.items() if isinstance(made, Step)}
    outcome = "agrees" if all(map(agrees, compared.values())) else "differs"
    return row | {"outcome": outcome, **compared, **reported(ours["auto"].report)}


# -- the file and the screen -----------------------------------------------------------------------------------------


def begun(file: Path, resume: bool) -> dict[str, Any]:
    """The result without rows, or with those that a call to be resumed has left."""
    result: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {"cores": os.cpu_count(), "system": platform.platform()},
        "versions": {"python": platform.python_version()} | versions(),
        "bounds": {"loss": LOSS_BOUND, "gradient": GRADIENT_BOUND, "least_scale": LEAST_SCALE},
        "counts": {},
        "rows": [],
    }
    left = json.loads(file.read_text()) if resume and file.exists() else {}
    return left if left and all(left[key] == result[key] for key in ("versions", "bounds")) else result


def write(file: Path, result: dict[str, Any]) -> None:
    result["rows"].sort(key=lambda row: row["family"])
    result["counts"] = dict(collections.Counter(row["outcome"] for row in result["rows"]))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")


def progress(row: dict[str, Any]) -> str:
    figures = [
        f"{name}: loss {row[name]['loss']:.1e} gradient {row[name]['gradient']:.1e}"
        for name in SETTINGS
        if name in row
    ]
    return f"{row['family']:28}{row['outcome']:17}{' | '.join(figures) or row['reason']}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", metavar="NAME", help="default: all of them")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--resume", action="store_true", help="keep the rows that the output has of these versions")
    options = parser.parse_args()
    unknown = sorted(set(options.families or ()) - set(ARCHITECTURES))
    if unknown:
        parser.error(f"transformers {transformers.__version__} has no family {', '.join(unknown)}")
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    result = begun(options.output, options.resume)
    done = {row["family"] for row in result["rows"]}
    for family in options.families or ARCHITECTURES:
        if family not in done:
            row = row_of(family)
            result["rows"].append(row)
            write(options.output, result)
            print(progress(row), flush=True)
    print(f"{len(result['rows'])} families: " + ", ".join(f"{n} {outcome}" for outcome, n in result["counts"].items()))
    return int(any(row["outcome"] in ("differs", "ours fails") for row in result["rows"]))


if __name__ == "__main__":
    sys.exit(main())
