"""When a GPU's memory runs out: in which part, and which setting to change, on the very error that torch raises.

The error keeps its type and its first words, by which `auto_find_batch_size` knows it; what is added comes behind.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from transformers import Trainer

from chronicals_trl.config import ChronicalsConfig
from chronicals_trl.report import ActivationReport

__all__ = ["OutOfMemoryMixin", "explain", "find_place"]

HEAD, ATTENTION, LORA = "the head and its loss", "attention", "LoRA"
LAYERS, GRAPHS, OPTIMIZER = "the decoder layers", "CUDA graphs", "the optimizer"
SHARDING, BACKWARD, ELSEWHERE = "sharding and the exchange of gradients", "the backward pass", "no part in particular"

# place -> how the modules begin whose frames are in it. The innermost frame that is anywhere decides.
_MODULES: dict[str, tuple[str, ...]] = {
    HEAD: (
        "chronicals_trl.kernels._linear_cross_entropy",
        "chronicals_trl.kernels._cross_entropy",
        "chronicals_trl.model.lm_head",
        "trl.kernels",
        "trl.trainer.utils",
        "transformers.loss",
    ),
    ATTENTION: (
        "chronicals_trl.model.attention",
        "transformers.integrations.sdpa",
        "transformers.integrations.flash",
        "transformers.modeling_flash",
        "transformers.masking_utils",
        "torch.nn.attention",
        "flash_attn",
    ),
    LORA: (
        "chronicals_trl.kernels._lora",
        "chronicals_trl.kernels._low_rank",
        "chronicals_trl.kernels._wide_products",
        "chronicals_trl.model.lora",
        "peft.tuners",
    ),
    GRAPHS: ("chronicals_trl.model.graph",),
    OPTIMIZER: (
        "chronicals_trl.kernels._adamw",
        "chronicals_trl.optim.adamw",
        "torch.optim",
        "bitsandbytes.optim",
        "torch.nn.utils.clip_grad",
        "accelerate.optimizer",
    ),
    LAYERS: (
        "chronicals_trl.kernels.",
        "chronicals_trl.model.decoder",
        "chronicals_trl.model.match",
        "chronicals_trl.model.rope",
        "transformers.models.",
    ),
    SHARDING: ("torch.distributed", "torch.nn.parallel", "deepspeed."),
    BACKWARD: ("torch.autograd", "torch._tensor"),
}

# A budget for logits below which nothing is won.
_SMALLEST_BUDGET_MIB = 64


def find_place(traceback: types.TracebackType | None) -> str:
    """Where in a step an error came from, by the modules of its frames."""
    frames = []
    while traceback is not None:
        frames.append(traceback.tb_frame)
        traceback = traceback.tb_next
    for frame in reversed(frames):
        module = frame.f_globals.get("__name__", "")
        place = next((name for name, begins in _MODULES.items() if module.startswith(begins)), None)
        if place == LAYERS and "For" in type(frame.f_locals.get("self")).__name__:  # LlamaForCausalLM: its own head
            place = HEAD
        if place is not None:
            return place
    return ELSEWHERE


class OutOfMemoryMixin(Trainer):
    """Training and evaluation of `SFTTrainer`, with a note on torch's error; the parent's with the flag off."""

    # Of the trainer that mixes this in.
    _chronicals: ChronicalsConfig | None
    chronicals_report: ActivationReport

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        with self._explained(evaluates=False):
            return super()._inner_training_loop(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        with self._explained(evaluates=True):
            return super().evaluation_loop(*args, **kwargs)

    @contextlib.contextmanager
    def _explained(self, *, evaluates: bool) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError as error:
            if self._chronicals is not None and not hasattr(error, "_chronicals_place"):
                place = find_place(error.__traceback__)
                settings = self._settings_to_change(self._chronicals, place, evaluates)
                explain(error, place, settings, evaluates=evaluates)
            raise

    def _settings_to_change(self, config: ChronicalsConfig, place: str, evaluates: bool) -> list[str]:
        """What makes room there, the cheapest first, each with its present value."""
        found = []
        if place in (HEAD, ELSEWHERE, BACKWARD):
            found += self._head_settings(config)
        if evaluates:
            size = self.args.per_device_eval_batch_size
            found += [f"per_device_eval_batch_size={size // 2} (now {size})"] if size > 1 else []
        elif place != OPTIMIZER:
            found += self._batch_settings(config)
        if self.chronicals_report["cuda_graphs"].state == "on":
            found.append("chronicals_config's cuda_graphs='off' (now on: graphs keep their memory)")
        if self.chronicals_report["recompute"].state == "on" and not evaluates:
            found.append("chronicals_config's recompute='off' (now on: not every layer is computed again)")
        if self.args.max_length is not None and place != OPTIMIZER:
            found.append(f"a smaller max_length (now {self.args.max_length:,}), which cuts long documents")
        return found + ([] if evaluates else self._model_settings())

    def _head_settings(self, config: ChronicalsConfig) -> list[str]:
        part, budget = self.chronicals_report["head"], config.logit_budget_mib
        if part.state == "off":
            return [f"the head part, which is off ({part.reason})"]
        if budget is not None and budget <= _SMALLEST_BUDGET_MIB:
            return []
        smaller = max(_SMALLEST_BUDGET_MIB, (budget or 1024) // 4)
        now = "None: at most 1,024" if budget is None else str(budget)
        return [f"chronicals_config's logit_budget_mib={smaller} (now {now}), slightly slower"]

    def _batch_settings(self, config: ChronicalsConfig) -> list[str]:
        args, found = self.args, []
        size, steps = max(1, self._train_batch_size // max(1, args.n_gpu)), args.gradient_accumulation_steps
        if size > 1:
            found.append(
                f"per_device_train_batch_size={size // 2} with gradient_accumulation_steps={steps * 2} (now {size} "
                f"with {steps}): the same optimizer steps" + ("" if size % 2 == 0 else ", nearly")
            )
        if self.chronicals_report["gated_mlp"].state == "on" and not config.recompute_mlp:
            found.append("chronicals_config's recompute_mlp=true (now false), slightly slower")
        if not args.gradient_checkpointing:
            found.append("gradient_checkpointing=True (now False), about a third slower")
        return found

    def _model_settings(self) -> list[str]:
        """For when weights, gradients and optimizer are too much."""
        found = []
        if getattr(self.model, "peft_config", None) is None:
            found.append("LoRA in place of all weights (peft_config; on the command line use_peft: "
                         "integrations/trl/lora.yaml, in 4 bits qlora.yaml)")  # fmt: skip
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            found.append("fsdp2_offload.yaml or zero3_offload.yaml of integrations/accelerate, much slower")
        else:
            ranks = self.args.world_size
            where = f"over the {ranks} ranks" if ranks > 1 else "over several GPUs"
            found.append(f"weights and optimizer sharded {where}: fsdp2.yaml or zero3.yaml of integrations/accelerate")
        return found


def explain(error: BaseException, place: str, settings: list[str], *, evaluates: bool = False) -> None:
    """Put the place and the settings behind the error's own words."""
    listed = "; ".join(f"({number}) {setting}" for number, setting in enumerate(settings, 1))
    note = (
        f"chronicals-trl: memory ran out in {'evaluation' if evaluates else 'training'}, in {place}. What makes room, "
        f"the cheapest first: {listed}."
    )
    error._chronicals_place = place  # type: ignore[attr-defined]
    if sys.version_info >= (3, 11):
        error.add_note(note)
    else:  # which shows no notes. `auto_find_batch_size` looks for words in the one argument
        error.args = (f"{error.args[0] if error.args else ''}\n{note}",)
