"""A tiny random Llama, a tokenizer trained on the spot and eight rows of text: what the scripts here train on."""

from __future__ import annotations

import hashlib
import json
import sys

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = "the quick brown fox jumps over a lazy dog while seven wizards brew strong ale".split()


def dataset() -> Dataset:
    return Dataset.from_dict({"text": [" ".join(WORDS[i % 5 : i % 5 + 3 + i]) for i in range(8)]})


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator(WORDS, trainers.WordLevelTrainer(special_tokens=["<unk>", "<pad>", "<eos>"]))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>")


def model(vocab_size: int = 32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            eos_token_id=2,
            pad_token_id=1,
        )
    )


def train(trainer_class: type, config: object, **extra: object) -> None:
    """Train, and write the facts that the tests look at to `facts_<rank>.json` in the output directory."""
    trainer = trainer_class(model=model(), args=config, train_dataset=dataset(), processing_class=tokenizer(), **extra)
    trainer.train()
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()  # the main process writes, each one reads
    weights = hashlib.sha256()
    for parameter in trainer.model.parameters():
        weights.update(parameter.detach().contiguous().numpy().tobytes())
    report = getattr(trainer, "chronicals_report", None)
    facts = {
        "trainer": f"{trainer_class.__module__}.{trainer_class.__qualname__}",
        "config": f"{type(config).__module__}.{type(config).__qualname__}",
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "weights": weights.hexdigest(),
        "on": sorted(part.name for part in report.parts if part.state == "on") if report else None,
        "world_size": trainer.args.world_size,
        "argv": sys.argv,
        "main_file": sys.modules["__main__"].__file__,
        "saved_args": torch.load(f"{trainer.args.output_dir}/training_args.bin", weights_only=False).to_dict()
        == trainer.args.to_dict(),
    }
    with open(f"{trainer.args.output_dir}/facts_{trainer.args.process_index}.json", "w") as file:
        json.dump(facts, file)
