"""What the trainer is given, looked at before anything starts: bad input, settings that rule a part out.

Each check names the argument and the remedy, and runs before the model is loaded or a token is mapped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from datasets import Dataset, IterableDataset
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_utils import has_length

from chronicals_trl._data_sets import check_data
from chronicals_trl.config import ChronicalsConfig
from chronicals_trl.model.patch import base_model
from chronicals_trl.optim.lora_plus import has_adapter, trainable_kinds, why_frozen
from chronicals_trl.packing.bfd import STRATEGIES
from chronicals_trl.report import PartReport

if TYPE_CHECKING:
    from chronicals_trl.trainer import SFTTrainer

_ELEMENTWISE = ("rms_norm", "gated_mlp", "qk_rope")


def check(args: Any, given: dict[str, Any]) -> None:
    """Raise ValueError for data or settings that cannot be trained on.

    Args:
        args: the SFTConfig.
        given: the trainer's arguments by name.
    """
    if isinstance(given.get("model"), nn.Module):  # of one that is named, only TRL's loading tells
        require_causal(base_model(given["model"]))
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
            check_data(name, data, args, has_formatting=given.get("formatting_func") is not None)


def packing_setting(args: Any) -> str | None:
    """The argument that asks for packing, to name in errors; None where nothing is packed."""
    return "packing" if args.packing else "eval_packing" if args.eval_packing else None


def require_rows_of_one_document(args: Any, peft_config: Any) -> None:
    """Raise ValueError for an adapter that takes a row for one document, where a row has several.

    PEFT's activated LoRA looks for its invocation in each row, takes the last one that it finds, and adapts what comes
    behind it: of a row's documents, part of one. TRL trains so without a word.

    Args:
        args: the SFTConfig.
        peft_config: of the active adapter, or None.
    """
    setting = packing_setting(args) or ("padding_free" if args.padding_free else None)
    if setting is not None and getattr(peft_config, "alora_invocation_tokens", None):
        raise ValueError(
            f"{setting}=True with an activated LoRA (alora_invocation_tokens of {type(peft_config).__name__}): PEFT "
            "takes the last invocation of a row alone, so the adapter would be off in all documents of a row but the "
            f"last. Set {setting}=False, or leave alora_invocation_tokens out for a plain LoRA."
        )


def packing_part(args: Any, config: ChronicalsConfig) -> PartReport:
    """Whether this package packs, decided from the arguments alone: the data is prepared before the model is seen."""
    if packing_setting(args) is None:
        return PartReport("packing", "off", reason="packing=False: the data is used as it comes")
    if config.packing == "off":
        return PartReport("packing", "off", reason="packing='off' in the configuration: TRL packs")
    if args.packing_strategy not in STRATEGIES:  # those keep documents apart
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
    # With split_batches a batch is that of all ranks.
    return args.train_batch_size * (1 if args.accelerator_config.split_batches else args.world_size)


def balance_off(trainer: SFTTrainer, config: ChronicalsConfig, own: type) -> str | None:
    """Why several ranks get packed rows as the shuffle has them; None where the ranks' costs are balanced."""
    args = trainer.args
    if not config.balance_ranks:
        return "off, balance_ranks=False in the configuration"
    if not isinstance(trainer.train_dataset, Dataset):
        return "off, a streamed data set is dealt to the ranks as it comes"
    if "seq_lengths" not in trainer.train_dataset.column_names:
        return "off, the training rows have no seq_lengths"
    if args.train_sampling_strategy != "random":
        return f"off, train_sampling_strategy={args.train_sampling_strategy!r} decides on the order"
    for name in ("_get_train_sampler", "get_train_dataloader"):
        if getattr(type(trainer), name) is not getattr(own, name):
            owner = next(base for base in type(trainer).__mro__ if name in vars(base))
            return f"off, {owner.__qualname__} overrides {name}"
    return None


def copies_note(args: Any) -> str | None:
    """How batches get to the GPU; None on a CPU."""
    if args.device.type == "cpu":
        return None
    pinned, non_blocking = args.dataloader_pin_memory, args.accelerator_config.non_blocking
    if pinned and non_blocking:
        return "copies to the GPU: pinned and non-blocking"
    cause = "accelerator_config's non_blocking=False" if pinned else "dataloader_pin_memory=False"
    return f"copies to the GPU: each waits for the GPU ({cause})"


def keep_batches_whole(args: Any) -> dict[str, str]:
    """Have each rank collate its own packed rows; a note where the arguments say otherwise.

    Accelerate's dispatcher, its default for streams, joins the ranks' batches and gives each rank the first rows of
    every tensor, on one rank too: of `cu_seq_lens_q`, which has no rows, that is its first entry. The rows that a
    rank gets are others, their sum over the ranks is the same.
    """
    asked = args.accelerator_config.dispatch_batches
    args.accelerator_config.dispatch_batches = False
    if not asked:
        return {}
    return {"dispatch": "dispatch_batches=True cuts packed batches apart: off, each rank reads its own rows"}


def masking_notes(args: Any, data: Any) -> dict[str, str]:
    """A note where the answers alone are asked for and the training set, as it came, does not tell them apart."""
    if not (args.completion_only_loss and isinstance(data, Dataset)):
        return {}
    if {"completion", "completion_mask", "labels"} & set(data.column_names):
        return {}
    note = "completion_only_loss=True without a column 'completion': every token is learned"
    if {"messages", "conversations"} & set(data.column_names):
        note += " (of the assistant's turns alone: assistant_only_loss=True)"
    return {"completion_only_loss": note}


def conflicts(trainer: SFTTrainer, own: type) -> dict[str, str]:
    """part -> reason, for what the trainer's settings rule out."""
    args, leave_out = trainer.args, dict[str, str]()
    if args.use_liger_kernel:
        leave_out |= dict.fromkeys(_ELEMENTWISE, "use_liger_kernel=True replaces the same blocks")
    if getattr(trainer.model, "use_kernels", False):
        leave_out |= dict.fromkeys(_ELEMENTWISE, "use_kernels=True replaces the same blocks with hub kernels")
    leave_out |= model_parallelism(trainer.accelerator)
    if type(trainer).compute_loss is not own.compute_loss:  # type: ignore[attr-defined]
        owner = next(base for base in type(trainer).__mro__ if "compute_loss" in vars(base))
        leave_out["head"] = f"{owner.__qualname__} overrides compute_loss: TRL's own head serves it"
    elif trainer.compute_loss_func is not None:
        leave_out["head"] = "compute_loss_func needs the logits"
    elif trainer.label_smoother is not None and args.loss_type == "nll":
        leave_out["head"] = "label_smoothing_factor needs the logits"
    return leave_out


def model_parallelism(accelerator: Any) -> dict[str, str]:
    """part -> reason, for what is not verified where ranks share a model's layers or the tokens of a row."""
    parallelism = accelerator.parallelism_config
    leave_out = dict[str, str]()
    for kind in ("tp", "cp", "sp"):
        if parallelism is not None and getattr(parallelism, f"{kind}_enabled", False):
            reason = f"{kind}_size > 1: not verified under tensor, context or sequence parallelism"
            leave_out |= dict.fromkeys((*_ELEMENTWISE, "attention", "head", "lora"), reason)
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
    if deepspeed is not None:
        refuse_deepspeed_rates(deepspeed.config, "optim and lr_scheduler_type of the arguments take its place")
    return part


def refuse_deepspeed_rates(config: dict[str, Any], instead: str) -> None:
    """Raise ValueError for a DeepSpeed configuration that builds the optimizer or the schedule, and so sets the rates.

    Args:
        instead: what takes the section's place, for the message.
    """
    for key in ("optimizer", "scheduler"):
        if key in config:
            raise ValueError(
                f"The DeepSpeed configuration has its own {key!r}, which would lose LoRA+'s learning rates. Remove "
                f"that section ({instead}), or set lora_plus='off'."
            )


def require_causal(model: nn.Module) -> None:
    """Raise ValueError for a transformers model that does not write text from left to right, or has no head to."""
    if not isinstance(model, PreTrainedModel):
        return
    writes = hasattr(model, "generation_config")  # what TRL goes by, too, with an AttributeError
    if writes and not getattr(model.config, "is_encoder_decoder", False):
        return
    kind = "an encoder-decoder" if writes else "no causal language model"
    raise ValueError(
        f"`model` is a {type(model).__name__}, {kind}: supervised fine-tuning here is of causal language models. Pass "
        "one's name or folder, or what AutoModelForCausalLM.from_pretrained gives."
    )


def require_trainable(model: nn.Module) -> None:
    """Raise ValueError for a model of which nothing is trained; torch's words come later, and name no parameter."""
    if any(parameter.requires_grad for parameter in model.parameters()):
        return
    why = why_frozen(model) if has_adapter(model) else "unfreeze what is to be trained, or pass peft_config"
    raise ValueError(f"nothing to train, since no parameter of the model requires a gradient: {why}.")


def require_batches(trainer: SFTTrainer, dataloader: Any) -> None:
    """Raise ValueError for a training set that makes no batch: Trainer would end at step 0, as if it had trained.

    Args:
        trainer: with its arguments and the prepared training set.
        dataloader: of this process; one without a length, as a stream has, is not looked at.
    """
    if not has_length(dataloader) or len(dataloader) > 0:
        return
    args, data = trainer.args, trainer.train_dataset
    rows, size, ranks = len(data) if has_length(data) else 0, args.train_batch_size, args.world_size
    if not args.accelerator_config.split_batches:
        size *= ranks
    text = (
        f"no step to train: `train_dataset` has {rows:,} row{'s' * (rows != 1)}, and a batch of all processes takes "
        f"{size:,} (per_device_train_batch_size={args.per_device_train_batch_size}, processes: {ranks}, "
        f"dataloader_drop_last={args.dataloader_drop_last})."
    )
    if args.packing:
        text += f" packing=True makes fewer rows than there are documents: up to {args.max_length} tokens share a row."
    remedies = ["dataloader_drop_last=False"] if args.dataloader_drop_last else []
    remedies += ["a smaller per_device_train_batch_size"]
    remedies += ["a smaller max_length"] if args.packing else []
    raise ValueError(f"{text} Set {', or '.join(remedies)}, or pass more data.")


def lora_plus_of_model(model: nn.Module, config: ChronicalsConfig) -> PartReport:
    """Whether LoRA+ has something to do in `model`, and which rates it sets."""
    if config.lora_plus == "off":
        return PartReport("lora_plus", "off", reason="lora_plus='off' in the configuration")
    counts = trainable_kinds(model)
    if not any(counts.values()):
        reason = "the model has no trainable LoRA adapter"
        if has_adapter(model):
            reason += f": {why_frozen(model)}"
        return PartReport("lora_plus", "off", reason=reason)
    embeddings = counts["embedding"] if config.lora_plus_embedding_lr is not None else 0
    if not counts["B"] and not embeddings:
        reason = (
            "LoRA is on embeddings alone, which learn at the optimizer's rate: set lora_plus_embedding_lr"
            if counts["embedding"]
            else "no lora_B matrix is trainable: B is what LoRA+ gives a rate of its own"
        )
        return PartReport("lora_plus", "off", reason=reason)
    rates = [f"ratio {config.lora_plus_ratio:g}"] if counts["B"] else []
    rates += [f"embedding_lr {config.lora_plus_embedding_lr:g}"] if embeddings else []
    return PartReport("lora_plus", "on", modules=counts["B"] + embeddings, backend=", ".join(rates))
