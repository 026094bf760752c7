"""What the trainer is given, looked at before anything starts: bad input, settings that rule a part out.

Each check names the argument and the remedy, and runs before the model is loaded or a token is mapped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from numpy.typing import NDArray
from torch import nn

from chronicals_trl.config import ChronicalsConfig
from chronicals_trl.optim.lora_plus import trainable_kinds
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
    packs = packing_setting(args)
    if packs and args.max_length is None:
        raise ValueError(
            f"{packs}=True needs max_length, the number of tokens of a packed row, but it is None. Set max_length."
        )
    if packs and args.max_length < 2:
        raise ValueError(
            f"{packs}=True with max_length={args.max_length}: a packed row of fewer than 2 tokens has nothing to "
            "predict. Set max_length to the model's context length, such as 2048."
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


def came_packed(name: str, data: Dataset | IterableDataset, max_length: int) -> bool:
    """Whether the rows are packed already: by `trl.pack_dataset`, or ours that `evaluate` hands over again.

    Judged by what such rows are, `input_ids` with `seq_lengths` that add up to them, and not by the column's name
    alone: a user may have a column called "seq_lengths" of another meaning, and a selection of packed rows is packed.

    Raises:
        ValueError: `seq_lengths` that do not add up, or a row longer than `max_length`.
    """
    if isinstance(data, Dataset):
        if not {"input_ids", "seq_lengths"} <= set(data.column_names):
            return False
        kind = data.data.schema.field("seq_lengths").type
        if not (_is_list(kind) and pa.types.is_integer(kind.value_type)):
            return False  # one number a row, say: a column of the user's own, which TRL drops as well
        tokens, sums = list_lengths(data, "input_ids"), _list_sums(data, "seq_lengths")
    else:
        row = next(iter(data), None) or {}
        if not ("input_ids" in row and isinstance(row.get("seq_lengths"), (list, tuple))):
            return False
        # The collator checks the other rows of a stream as they come.
        tokens, sums = np.array([len(row["input_ids"])]), np.array([sum(row["seq_lengths"])])
    wrong = np.flatnonzero(tokens != sums)
    if len(wrong):
        raise ValueError(
            f"The {name} has a column 'seq_lengths', as packed rows have, but in row {wrong[0]} it adds up to "
            f"{sums[wrong[0]]} and there are {tokens[wrong[0]]} input_ids. If the rows are documents, remove the "
            "column (dataset.remove_columns('seq_lengths')); if they are packed rows, pack them again."
        )
    longest = int(tokens.max(initial=0))
    if longest > max_length:
        raise ValueError(
            f"The {name} came packed (it has 'seq_lengths') in rows of up to {longest} tokens, but "
            f"max_length={max_length}. Set max_length={longest}, or pass the documents in place of packed rows."
        )
    return True


def list_lengths(data: Dataset, column: str) -> NDArray[np.int64]:
    """The lengths of a list column's rows, without reading the values."""
    lengths = pc.list_value_length(data.data.column(column)).fill_null(0).to_numpy().astype(np.int64)
    return _selected(data, lengths)


def _list_sums(data: Dataset, column: str) -> NDArray[np.int64]:
    sums = []
    for chunk in data.data.column(column).chunks:
        offsets = chunk.offsets.to_numpy()
        running = np.concatenate([[0], np.cumsum(chunk.values.to_numpy(zero_copy_only=False), dtype=np.int64)])
        sums.append(running[offsets[1:]] - running[offsets[:-1]])
    return _selected(data, np.concatenate([np.zeros(0, dtype=np.int64), *sums]))


def _selected(data: Dataset, values: NDArray[Any]) -> NDArray[Any]:
    """One value a row of the table -> one a row of the data set, which a filter or a shuffle has reordered."""
    return values if data._indices is None else values[data._indices.column(0).to_numpy()]


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def packing_setting(args: Any) -> str | None:
    """The argument that asks for packing, to name in errors; None where nothing is packed."""
    return "packing" if args.packing else "eval_packing" if args.eval_packing else None


def packing_part(args: Any, config: ChronicalsConfig) -> PartReport:
    """Whether this package packs, decided from the arguments alone: the data is prepared before the model is seen."""
    if packing_setting(args) is None:
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
    """
    if args.world_size == 1 and args.device.type == "cpu":
        return 1
    return args.world_size * (args.train_batch_size if training else args.eval_batch_size)


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


def other_attention(model: Any) -> str:
    """The attention implementations that `model` supports beside its own, quoted, for a remedy; "" without any."""
    current = model.config.get_text_config()._attn_implementation
    names = []
    # A back end of ours stands in for "sdpa".
    if getattr(model, "_supports_sdpa", False) and current != "sdpa" and "chronicals" not in current:
        names.append("sdpa")
    if getattr(model, "_supports_flash_attn", False):
        flash = getattr(model, "_compatible_flash_implementations", None) or ["flash_attention_2"]
        names += [name for name in flash if name != current]
    return " or ".join(map(repr, names))


def lora_plus_part(trainer: SFTTrainer, config: ChronicalsConfig) -> PartReport:
    """Whether the optimizer's groups will be split; refuses a DeepSpeed configuration that would undo it."""
    part = lora_plus_of_model(trainer.model, config)
    if part.state == "off":
        return part
    if trainer.optimizer is not None:
        return PartReport("lora_plus", "off", reason="the optimizer was passed in and is used as it is", omitted=True)
    deepspeed = getattr(trainer.args, "hf_deepspeed_config", None)
    for key in ("optimizer", "scheduler"):
        if deepspeed is not None and key in deepspeed.config:
            raise ValueError(
                f"The DeepSpeed configuration has its own {key!r}, which would lose LoRA+'s learning rates. Remove "
                "that section (optim and lr_scheduler_type of the arguments take its place), or set lora_plus='off'."
            )
    return part


def lora_plus_of_model(model: nn.Module, config: ChronicalsConfig) -> PartReport:
    """Whether LoRA+ has something to do in `model`, and which rates it sets."""
    if config.lora_plus == "off":
        return PartReport("lora_plus", "off", reason="lora_plus='off' in the configuration")
    counts = trainable_kinds(model)
    if not any(counts.values()):
        return PartReport("lora_plus", "off", reason="the model has no trainable LoRA adapter")
    embeddings = counts["embedding"] if config.lora_plus_embedding_lr is not None else 0
    if not counts["B"] and not embeddings:
        reason = (
            "LoRA is on embeddings alone, which learn at the optimizer's rate: set lora_plus_embedding_lr"
            if counts["embedding"]
            else "no lora_B matrix is trainable"
        )
        return PartReport("lora_plus", "off", reason=reason)
    rates = [f"ratio {config.lora_plus_ratio:g}"] if counts["B"] else []
    rates += [f"embedding_lr {config.lora_plus_embedding_lr:g}"] if embeddings else []
    return PartReport("lora_plus", "on", modules=counts["B"] + embeddings, backend=", ".join(rates))
