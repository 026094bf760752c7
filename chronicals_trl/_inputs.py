"""What the trainer is given, looked at before anything starts: bad input, settings that rule a part out.

Each check names the argument and the remedy, and runs before the model is loaded or a token is mapped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from datasets import Dataset, IterableDataset

from chronicals_trl.config import ChronicalsConfig
from chronicals_trl.report import PartReport

if TYPE_CHECKING:
    from chronicals_trl.trainer import SFTTrainer

# Packing strategies that keep documents apart; "wrapped" cuts them and lets them attend to each other.
STRATEGIES = ("bfd", "bfd_split")
_ELEMENTWISE = ("rms_norm", "gated_mlp", "qk_rope")


def check(args: Any, given: dict[str, Any]) -> None:
    """Raise ValueError for data or settings that cannot be trained on.

    Args:
        args: the SFTConfig.
        given: the trainer's arguments by name.
    """
    packs = args.packing or bool(args.eval_packing)
    if packs and args.max_length is None:
        raise ValueError(
            "packing=True needs max_length, the number of tokens of a packed row, but it is None. Set max_length."
        )
    if packs and args.max_length < 2:
        raise ValueError(
            f"max_length={args.max_length}: a packed row of fewer than 2 tokens has nothing to predict. Set "
            "max_length to the model's context length, such as 2048."
        )
    if (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
        return
    data_sets = {"train_dataset": given.get("train_dataset")}
    evaluation = given.get("eval_dataset")
    if isinstance(evaluation, dict):
        data_sets |= {f"eval_dataset[{key!r}]": value for key, value in evaluation.items()}
    else:
        data_sets["eval_dataset"] = evaluation
    for name, data in data_sets.items():
        if isinstance(data, (Dataset, IterableDataset)):  # TRL's own errors cover everything else
            _check_data(name, data, args, has_formatting=given.get("formatting_func") is not None)


def _check_data(name: str, data: Dataset | IterableDataset, args: Any, *, has_formatting: bool) -> None:
    example = next(iter(data), None)
    if example is None:
        raise ValueError(f"`{name}` is empty: there is nothing to train on. Check the split name and the filters.")
    columns = set(example)
    text = {args.dataset_text_field, "messages", "conversations", "input_ids", "image", "images"}
    if has_formatting or columns & text or {"prompt", "completion"} <= columns:
        return
    raise ValueError(
        f"`{name}` has no text: its columns are {sorted(columns)}. TRL reads {args.dataset_text_field!r} "
        "(dataset_text_field), 'messages', 'prompt' with 'completion', or 'input_ids'. Rename a column, set "
        "dataset_text_field, or pass formatting_func."
    )


def packing_part(args: Any, config: ChronicalsConfig) -> PartReport:
    """Whether this package packs, decided from the arguments alone: the data is prepared before the model is seen."""
    if not (args.packing or args.eval_packing):
        return PartReport("packing", "off", reason="packing=False: the data is used as it comes")
    if config.packing == "off":
        return PartReport("packing", "off", reason="packing='off' in the configuration: TRL packs")
    if args.packing_strategy not in STRATEGIES:
        return PartReport(
            "packing",
            "off",
            reason=f"packing_strategy={args.packing_strategy!r} lets documents attend to each other: TRL packs",
            omitted=True,
        )
    if (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
        return PartReport("packing", "off", reason="skip_prepare_dataset: the rows are the user's own", omitted=True)
    return PartReport("packing", "on", backend="best-fit decreasing")


def bins_per_round(args: Any, *, training: bool) -> int:
    """Rows to which a packed data set is filled up, with empty ones, so that no rank gets a row twice.

    Accelerate would repeat rows instead. A single process on a CPU keeps its short last batch: nothing is repeated
    there and an empty row costs real time; on a GPU every batch gets the same shape.

    Evaluation sets are not filled up. Trainer weights the loss of a batch by its number of rows and drops what
    Accelerate repeats, so an empty row would count as one of loss 0.
    """
    if not training or (args.world_size == 1 and args.device.type == "cpu"):
        return 1
    return args.world_size * args.train_batch_size


def conflicts(trainer: SFTTrainer, stock: type, own: type) -> dict[str, str]:
    """part -> reason, for what the trainer's settings rule out."""
    args, leave_out = trainer.args, dict[str, str]()
    if args.use_liger_kernel:
        leave_out |= dict.fromkeys(_ELEMENTWISE, "use_liger_kernel=True replaces the same blocks")
    if getattr(trainer.model, "use_kernels", False):
        leave_out |= dict.fromkeys(_ELEMENTWISE, "use_kernels=True replaces the same blocks with hub kernels")
    parallelism = trainer.accelerator.parallelism_config
    for kind in ("tp", "cp", "sp"):
        if parallelism is not None and getattr(parallelism, f"{kind}_enabled", False):
            reason = f"{kind}_size > 1: not verified under tensor, context or sequence parallelism"
            leave_out |= dict.fromkeys((*_ELEMENTWISE, "attention", "head", "lora"), reason)
    if type(trainer).compute_loss is not own.compute_loss:  # type: ignore[attr-defined]
        owner = next(base for base in type(trainer).__mro__ if "compute_loss" in vars(base))
        leave_out["head"] = f"{owner.__qualname__} overrides compute_loss: TRL's own head serves it"
    elif trainer.compute_loss_func is not None:
        leave_out["head"] = "compute_loss_func needs the logits"
    elif trainer.label_smoother is not None and args.loss_type == "nll":
        leave_out["head"] = "label_smoothing_factor needs the logits"
    return leave_out


def lora_plus_part(trainer: SFTTrainer, config: ChronicalsConfig) -> PartReport:
    """Whether the optimizer's groups will be split; refuses a DeepSpeed configuration that would undo it."""
    if config.lora_plus == "off":
        return PartReport("lora_plus", "off", reason="lora_plus='off' in the configuration")
    adapters = sum("lora_B" in name and p.requires_grad for name, p in trainer.model.named_parameters())
    if not adapters:
        return PartReport("lora_plus", "off", reason="the model has no trainable LoRA adapter")
    if trainer.optimizer is not None:
        return PartReport("lora_plus", "off", reason="the optimizer was passed in and is used as it is", omitted=True)
    deepspeed = getattr(trainer.args, "hf_deepspeed_config", None)
    for key in ("optimizer", "scheduler"):
        if deepspeed is not None and key in deepspeed.config:
            raise ValueError(
                f"The DeepSpeed configuration has its own {key!r}, which would lose LoRA+'s learning rates. Remove "
                "that section (optim and lr_scheduler_type of the arguments take its place), or set lora_plus='off'."
            )
    return PartReport("lora_plus", "on", modules=adapters, backend=f"ratio {config.lora_plus_ratio:g}")
