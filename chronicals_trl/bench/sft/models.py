"""The model that every side loads: random bf16 weights of one seed, with a tokenizer, in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from chronicals_trl.bench.sft.cases import BOS, EOS, LONGEST, PAD, Shape

__all__ = ["gemm_tflops", "make_model", "make_tokenizer", "write_model"]

_DONE = "bench.json"


def make_model(shape: Shape, seed: int) -> Any:
    """A transformers model in bf16, made on the GPU where there is one."""
    import transformers

    names = {"qwen2": ("Qwen2Config", "Qwen2ForCausalLM"), "llama": ("LlamaConfig", "LlamaForCausalLM")}
    config_class, model_class = (getattr(transformers, name) for name in names[shape.family])
    config = config_class(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        max_position_embeddings=LONGEST, tie_word_embeddings=shape.tied, rms_norm_eps=shape.eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta}, use_cache=False,
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, dtype=torch.bfloat16,
    )  # fmt: skip
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            return model_class(config)
    finally:
        torch.set_default_dtype(before)


def make_tokenizer(vocab: int) -> Any:
    """Words to ids, and every id is a word: text made of ids comes back as these ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {BOS: "<s>", EOS: "</s>", PAD: "<pad>"}
    words = {special.get(index, str(index)): index for index in range(vocab)}
    raw = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.decoder = decoders.WordPiece("")
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<s>", pad_token="<pad>",
        padding_side="right", model_max_length=LONGEST,
    )  # fmt: skip


def write_model(shape: Shape, seed: int, folder: Path) -> None:
    """Write model and tokenizer into `folder`, unless a whole one of this shape and seed is there.

    transformers loads a tokenizer of the family's class from it, which splits words otherwise: who needs this one
    makes it. A folder without any is one that Unsloth does not load.
    """
    made = {"shape": shape.name, "seed": seed}
    mark = folder / _DONE
    if mark.exists() and json.loads(mark.read_text()) == made:
        return
    mark.unlink(missing_ok=True)
    make_model(shape, seed).save_pretrained(folder)
    make_tokenizer(shape.vocab).save_pretrained(folder)
    mark.write_text(json.dumps(made))  # last: a folder without it was not finished


def gemm_tflops(size: int = 8192, seconds: float = 1.5) -> float | None:
    """1e12 operations a second of a square bf16 product, the median of samples after a warm-up; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    from chronicals_trl.bench.timing import quantile, sample_ms

    device = torch.device("cuda")
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    samples: list[float] = []
    while sum(samples) < seconds * 1e3:
        samples.append(sample_ms(lambda: torch.mm(a, b, out=out), device))
    return 2 * size**3 / quantile(samples[len(samples) // 3 :], 0.5) / 1e9
