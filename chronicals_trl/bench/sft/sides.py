"""How each side trains. Everything is imported where it is used: a peer's process may hold another TRL.

A side is one function here, of its name with underscores, and one entry in `sft.SIDES`; all of ours have one. It is
given the task and the meter, trains, and returns what ran.
"""

from __future__ import annotations

import importlib.util
import inspect
from typing import Any

import torch

from chronicals_trl.bench.common import NotOffered
from chronicals_trl.bench.sft.cases import (
    LORA_ALPHA,
    LORA_RANK,
    LORA_TARGETS,
    SHAPES,
    SIDES,
    Documents,
    Task,
)
from chronicals_trl.bench.sft.meter import Meter
from chronicals_trl.bench.sft.models import make_tokenizer

__all__ = ["four_bit", "train"]


def train(task: Task, meter: Meter) -> dict[str, Any]:
    """Run the side; returns `logs` and what ran."""
    functions = {
        "trl": _trl,
        "trl-tuned": _trl_tuned,
        "trl-liger": _trl_liger,
        "trl-cce": _trl_cce,
        "unsloth": _unsloth,
        "unsloth-packing": _unsloth,
        "torch-compile": _torch_compile,
        "pypi-chronicals": _pypi_chronicals,
        "pypi-chronicals-bf16": _pypi_chronicals,
    }
    return functions.get(task.side, _chronicals)(task, meter)


# -- TRL, and ours ------------------------------------------------------------------------------------------------


def _chronicals(task: Task, meter: Meter) -> dict[str, Any]:
    from chronicals_trl import SFTConfig, SFTTrainer
    from chronicals_trl.config import PARTS

    parts = SIDES[task.side].parts
    off = {} if parts is None else {part: "off" for part in PARTS if part not in parts}
    extra = {"use_chronicals": parts != (), "chronicals_config": {**task.chronicals, **off}}
    if task.side == "chronicals-offload":
        if not torch.cuda.is_available():
            raise NotOffered("offloading needs a GPU to offload from")
        extra["activation_offloading"] = True
    if task.rows % task.micro_batches:
        raise NotOffered(f"the rows of a step, {task.rows}, do not divide into {task.micro_batches} micro-batches")
    trainer, ran = _run_trainer(task, meter, SFTTrainer, SFTConfig, _load(task), extra)
    return ran if parts == () else {**ran, "report": trainer.chronicals_report.to_dict()}


def _trl(task: Task, meter: Meter) -> dict[str, Any]:
    from trl import SFTConfig, SFTTrainer

    return _run_trainer(task, meter, SFTTrainer, SFTConfig, _load(task), {})[1]


def _trl_tuned(task: Task, meter: Meter) -> dict[str, Any]:
    from trl import SFTConfig, SFTTrainer

    attention = "flash_attention_2" if importlib.util.find_spec("flash_attn_2_cuda") else "sdpa"
    return _run_trainer(task, meter, SFTTrainer, SFTConfig, _load(task, attention), {})[1]


def _trl_liger(task: Task, meter: Meter) -> dict[str, Any]:
    from trl import SFTConfig, SFTTrainer

    from chronicals_trl.bench.sft.attention import register

    if importlib.util.find_spec("liger_kernel") is None:
        raise ModuleNotFoundError("No module named 'liger_kernel'")
    if not torch.cuda.is_available():
        raise NotOffered("Liger and torch's varlen attention need a GPU")
    return _run_trainer(task, meter, SFTTrainer, SFTConfig, _load(task, register()), {"use_liger_kernel": True})[1]


def _trl_cce(task: Task, meter: Meter) -> dict[str, Any]:
    from trl import SFTConfig, SFTTrainer

    from chronicals_trl.bench.sft import peers
    from chronicals_trl.bench.sft.attention import register

    trainer = peers.cce_trainer(SFTTrainer, peers.cce_function())
    extra: dict[str, Any] = {}
    if importlib.util.find_spec("liger_kernel") is not None:  # as Axolotl's plugins are used together
        kernels = {"fused_linear_cross_entropy": False, "cross_entropy": False}
        extra = {"use_liger_kernel": True, "liger_kernel_config": kernels}
    return _run_trainer(task, meter, trainer, SFTConfig, _load(task, register()), extra)[1]


def _load(task: Task, attention: str | None = None) -> Any:
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    if torch.cuda.is_available():
        options["device_map"] = {"": 0}
    if task.mode == "qlora":
        options["quantization_config"] = four_bit()
    dtype = torch.float32 if task.master == "fp32" else torch.bfloat16
    return AutoModelForCausalLM.from_pretrained(task.model, dtype=dtype, **options)


def four_bit() -> Any:
    """nf4 with quantised scales, computing in bf16: what Unsloth loads, so that all load it."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip


def _lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=LORA_RANK, lora_alpha=LORA_ALPHA, lora_dropout=0.0, target_modules=list(LORA_TARGETS), task_type="CAUSAL_LM"
    )


def _checkpointing(task: Task) -> bool | None:
    """None: as the framework comes."""
    if task.checkpointing == "default":
        return SIDES[task.side].checkpointing
    return task.checkpointing == "on"


def _arguments(task: Task) -> dict[str, Any]:
    """What every trainer is given; all else is as the framework comes."""
    given: dict[str, Any] = {
        "output_dir": "output",
        "max_length": task.row_tokens,
        "packing": task.packs,
        "max_steps": task.total_steps,
        "per_device_train_batch_size": task.rows // task.micro_batches,
        "gradient_accumulation_steps": task.micro_batches,
        "learning_rate": task.learning_rate,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "bf16": True,
        "logging_steps": task.log_every,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": task.seed,
    }
    checkpointing = _checkpointing(task)
    if checkpointing is not None:
        given["gradient_checkpointing"] = checkpointing
    if not torch.cuda.is_available():
        given["use_cpu"] = True
    return given


def _run_trainer(
    task: Task, meter: Meter, trainer_class: Any, config_class: Any, model: Any, extra: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The trainer after the training, and what ran."""
    from datasets import Dataset

    ids = Documents.load(task.documents).lists()
    trainer = trainer_class(
        model=model,
        args=config_class(**_arguments(task), **extra),
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        processing_class=make_tokenizer(SHAPES[task.shape].vocab),
        peft_config=None if task.mode == "full" else _lora(),
        callbacks=[meter.callback()],
    )
    return trainer, _watch(trainer, meter)


def _watch(trainer: Any, meter: Meter) -> dict[str, Any]:
    meter.count_batches_of(trainer)
    trainer.train()
    logs = [
        {"step": log["step"], "loss": log["loss"], "grad_norm": log.get("grad_norm")}
        for log in trainer.state.log_history
        if "loss" in log
    ]
    return {
        **_about(trainer.model),
        "logs": logs,
        "gradient_checkpointing": bool(trainer.args.gradient_checkpointing),
        "micro_batches": trainer.args.gradient_accumulation_steps,
        "collator": type(trainer.data_collator).__name__,
    }


def _about(model: Any) -> dict[str, Any]:
    """What a model ran with. Quantised weights are packed: two to a byte, so their number is twice what torch says."""
    trained: dict[str, int] = {}
    every = 0
    for parameter in model.parameters():
        packed = type(parameter).__name__ == "Params4bit"
        every += parameter.numel() * (2 if packed else 1)
        if parameter.requires_grad:
            dtype = str(parameter.dtype).removeprefix("torch.")
            trained[dtype] = trained.get(dtype, 0) + parameter.numel()
    return {
        "attention": getattr(model.config, "_attn_implementation", None),
        "trained_weights": trained,
        "trained_share": sum(trained.values()) / every,
    }


# -- Unsloth ------------------------------------------------------------------------------------------------------


def _unsloth(task: Task, meter: Meter) -> dict[str, Any]:
    """As its notebooks do it: its loader, its adapters, TRL's trainer as it patches it.

    It is given text, which it turns into the ids that the others are given: with ids it would take another collator,
    and packing would be lost.
    """
    import unsloth  # before transformers, peft and TRL, which it patches  # isort: split
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    loader = unsloth.FastLanguageModel.from_pretrained
    precision: dict[str, Any] = {}
    if task.master == "fp32":
        if "float32_mixed_precision" not in inspect.signature(loader).parameters:
            raise NotOffered("Unsloth of this version has no fp32 masters")
        precision["float32_mixed_precision"] = True
    wanted = _checkpointing(task)
    checkpointing: dict[str, Any] = (
        {} if wanted is None else {"use_gradient_checkpointing": "unsloth" if wanted else False}
    )
    model, _ = loader(
        model_name=task.model, max_seq_length=task.row_tokens, dtype=torch.bfloat16, load_in_4bit=task.mode == "qlora",
        full_finetuning=task.mode == "full", use_exact_model_name=True, **checkpointing, **precision,
    )  # fmt: skip
    if task.mode != "full":
        model = unsloth.FastLanguageModel.get_peft_model(
            model, r=LORA_RANK, lora_alpha=LORA_ALPHA, lora_dropout=0.0, bias="none",
            target_modules=list(LORA_TARGETS), random_state=task.seed, **checkpointing,
        )  # fmt: skip
    documents = Documents.load(task.documents)
    texts = documents.texts()
    # Its loader takes the tokenizer of the model's family, whatever the folder holds.
    tokenizer = make_tokenizer(SHAPES[task.shape].vocab)
    if tokenizer(texts[0])["input_ids"] != documents.lists()[0]:
        raise RuntimeError("the tokenizer does not give a document's ids back")
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**_arguments(task), dataset_text_field="text", dataset_num_proc=1),
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=tokenizer,
        callbacks=[meter.callback()],
    )
    return _watch(trainer, meter)


# -- a bare loop --------------------------------------------------------------------------------------------------


def _torch_compile(task: Task, meter: Meter) -> dict[str, Any]:
    from chronicals_trl.bench.sft import compile as sft_compile

    model = _load(task, sft_compile.attention())
    if task.mode != "full":
        from peft import get_peft_model

        model = get_peft_model(model, _lora())
    logs = sft_compile.loop(task, meter, model, checkpointing=bool(_checkpointing(task)))
    return {**_about(model), "logs": logs, "gradient_checkpointing": bool(_checkpointing(task))}


# -- the paper's own package --------------------------------------------------------------------------------------


def _pypi_chronicals(task: Task, meter: Meter) -> dict[str, Any]:
    """With PEFT's adapters: its own have names that its trainer does not look for."""
    from chronicals_trl.bench.sft import peers

    if importlib.util.find_spec("chronicals") is None:
        raise ModuleNotFoundError("No module named 'chronicals'")
    model = _load(task)
    if task.mode != "full":
        from peft import get_peft_model

        model = get_peft_model(model, _lora())
    trainer, logs = peers.pypi_trainer(task, meter, model)
    return {**_about(trainer.model), "logs": logs, "optimizations": str(trainer.get_active_optimizations())}
