"""Peers that have no trainer of TRL's make: Apple's Cut Cross-Entropy as Axolotl puts it in, and PyPI's `chronicals`.

Everything of theirs is imported where it is used.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from chronicals_trl.bench.common import NotOffered
from chronicals_trl.bench.sft.cases import PAD, Documents, Task
from chronicals_trl.bench.sft.count import IGNORED, Counted
from chronicals_trl.bench.sft.meter import Meter

__all__ = ["Watched", "cce_trainer", "pad", "pypi_trainer"]


# -- Cut Cross-Entropy ------------------------------------------------------------------------------------------------


def cce_trainer(trainer_class: type, linear_cross_entropy: Callable[..., Tensor]) -> type:
    """`trainer_class` whose loss is Apple's function of the decoder's output and the head's weight.

    The package has a function, no patch for models; Axolotl's plugin writes each model's forward anew around it. This
    does the same for any model with a `model` and an `lm_head`.
    """

    class CutCrossEntropyTrainer(trainer_class):
        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            unwrapped = self.accelerator.unwrap_model(model)
            base = unwrapped.get_base_model() if hasattr(unwrapped, "get_base_model") else unwrapped
            given = {key: value for key, value in inputs.items() if key != "labels"}
            # Accelerate puts autocast around the model's own forward alone. Without it fp32 adapters would be
            # multiplied in fp32, and so would fp32 masters.
            with self.accelerator.autocast():
                hidden = base.model(**given, use_cache=False).last_hidden_state
                device = hidden.device.type
                dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
                loss = linear_cross_entropy(
                    hidden.to(dtype), base.lm_head.weight.to(dtype), inputs["labels"], shift=True,
                    reduction="mean" if num_items_in_batch is None else "sum",
                )  # fmt: skip
            loss = loss if num_items_in_batch is None else loss / num_items_in_batch
            return (loss, {}) if return_outputs else loss

    return CutCrossEntropyTrainer


def cce_function() -> Callable[..., Tensor]:
    """Apple's function.

    Raises:
        ModuleNotFoundError: The package is not there.
        NotOffered: There is no GPU.
    """
    if importlib.util.find_spec("cut_cross_entropy") is None:
        raise ModuleNotFoundError("No module named 'cut_cross_entropy'")
    if not torch.cuda.is_available():
        raise NotOffered("Apple's kernels and torch's varlen attention need a GPU")
    from cut_cross_entropy import linear_cross_entropy

    function: Callable[..., Tensor] = linear_cross_entropy
    return function


# -- PyPI's chronicals ------------------------------------------------------------------------------------------------


def pad(documents: list[list[int]], length: int | None = None) -> dict[str, Tensor]:
    """(B, S), padded on the right to the longest or to `length`, labels ignored there."""
    rows = [torch.tensor(each) for each in documents]
    longest = length or max(map(len, rows))
    batch = {
        "input_ids": torch.full((len(rows), longest), PAD),
        "labels": torch.full((len(rows), longest), IGNORED),
        "attention_mask": torch.zeros(len(rows), longest, dtype=torch.int64),
    }
    for number, row in enumerate(rows):
        batch["input_ids"][number, : len(row)] = batch["labels"][number, : len(row)] = row
        batch["attention_mask"][number, : len(row)] = 1
    return batch


class Watched:
    """A loader of padded batches that tells the meter when a step begins and ends: when the next one is asked for.

    Each pass over it (a trainer may look at some batches to compile by) begins with the first step.
    """

    def __init__(self, task: Task, meter: Meter) -> None:
        self._task, self._meter = task, meter
        self._documents = Documents.load(task.documents).lists()

    def __len__(self) -> int:
        return self._task.total_steps + 1

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        rows, meter = self._task.rows, self._meter
        meter.restart()
        meter.counted = counted = Counted(pad)
        for done in range(len(self)):
            if done:
                meter.end(done)
            if done < self._task.total_steps:
                meter.begin(done)
            yield counted(self._documents[done * rows : (done + 1) * rows])


def pypi_trainer(task: Task, meter: Meter, model: Any) -> tuple[Any, list[dict[str, Any]]]:
    """Train with the trainer of PyPI's `chronicals`, as it comes but for what all sides are given alike.

    Of its quick start `ChronicalsConfig` does not take what the text passes, and `ChronicalsTrainer` takes a
    `TrainingConfig` and a loader of batches: those are what its code has.
    """
    from chronicals.config import TrainingConfig
    from chronicals.training import ChronicalsTrainer

    given: dict[str, Any] = {
        "output_dir": "output",
        "num_train_epochs": 1,
        "max_steps": task.total_steps + 1,  # so that it asks for what follows the last timed step
        "per_device_train_batch_size": task.rows,
        "gradient_accumulation_steps": 1,
        "max_seq_length": task.row_tokens,
        "learning_rate": task.learning_rate,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0.0,
        "logging_steps": task.log_every,
        "save_steps": 0,
        "visual_reporting": False,
        "use_sequence_packing": False,  # it would drop the mask of batches that are padded
        "seed": task.seed,
    }
    if task.side.endswith("-bf16"):
        given["fp8"] = False
    if task.checkpointing != "default":
        given["use_gradient_checkpointing"] = task.checkpointing == "on"
    trainer = ChronicalsTrainer(model, TrainingConfig(**given), Watched(task, meter))
    norms = _watch_norms(trainer)
    trainer.save_checkpoint = lambda name: None
    state = trainer.train()
    logs = [
        {"step": log["step"], "loss": float(log["loss"]), "grad_norm": float(norms[log["step"] - 1])}
        for log in state.log_history
    ]
    return trainer, logs


def _watch_norms(trainer: Any) -> list[Tensor]:
    """The norm of the gradients that each of the optimizer's steps is given; restarts with the trainer's steps."""
    norms: list[Tensor] = []
    plain = trainer.optimizer.step

    def step(*args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == 0:  # what it warmed up with
            norms.clear()
        grads = [p.grad for group in trainer.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.nn.utils.get_total_norm(grads).detach() if grads else torch.zeros(()))
        return plain(*args, **kwargs)

    trainer.optimizer.step = step
    return norms
