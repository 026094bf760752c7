"""A tokenizer trained in this process and small data sets in every form that TRL takes."""

from __future__ import annotations

import functools
import random
from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

NAMES = ("Ada", "Bo", "Cleo", "Dan", "Eva", "Finn")
THINGS = ("apples", "pens", "cups", "maps", "shoes", "books")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>{% endgeneration %}"
    "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def sentences(count: int, *, seed: int = 0) -> list[str]:
    """Sentences of 6 to about 60 words, deterministic in `seed`."""
    rng = random.Random(seed)
    return [
        " and ".join(
            f"{rng.choice(NAMES)} gives {rng.choice(NAMES)} {rng.randint(2, 99)} {rng.choice(THINGS)}"
            for _ in range(rng.choice((1, 1, 2, 3, 5, 9)))
        )
        for _ in range(count)
    ]


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most 131 tokens (tiny_models.VOCAB_SIZE) with a chat template."""
    special = ["<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>"]
    # Few base characters, so that the vocabulary stays below that of the tiny models.
    raw = Tokenizer(models.BPE(unk_token="<s>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    from tokenizers import decoders

    raw.decoder = decoders.Metaspace()
    raw.train_from_iterator(
        sentences(300), trainers.BpeTrainer(vocab_size=131, special_tokens=special, show_progress=False)
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def text(count: int = 40, *, seed: int = 0) -> Dataset:
    return Dataset.from_dict({"text": sentences(count, seed=seed)})


def prompt_completion(count: int = 40) -> Dataset:
    rows = sentences(count)
    return Dataset.from_dict({"prompt": [row[:14] for row in rows], "completion": [row[14:] for row in rows]})


def chat(count: int = 40) -> Dataset:
    rows = sentences(count)
    messages: list[list[dict[str, Any]]] = [
        [{"role": "user", "content": row[:14]}, {"role": "assistant", "content": row[14:]}] for row in rows
    ]
    return Dataset.from_dict({"messages": messages})


def tokenized(count: int = 40) -> Dataset:
    return Dataset.from_dict({"input_ids": [tokenizer()(row + "</s>")["input_ids"] for row in sentences(count)]})
