"""Tiny random models of every family that the project supports, built without a hub.

Each builder draws its weights from a seed of its own, so that two calls give equal models. The shapes are small but
not trivial: grouped-query attention, a head dimension that is not hidden/heads where the family allows it, norm
weights away from their initial value (all ones would hide a missing weight), and a vocabulary that is no power of two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCAB_SIZE = 131

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}

# family -> (configuration class, model class, what differs from _COMMON)
_FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 8}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 16}),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8},
    ),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {"head_dim": 16, "sliding_window": 8}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {}),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", {}),
    "granite": (
        "GraniteConfig",
        "GraniteForCausalLM",
        {"logits_scaling": 3.0, "residual_multiplier": 0.7, "embedding_multiplier": 2.0, "attention_multiplier": 0.2},
    ),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "mlp_only_layers": [0],
            "decoder_sparse_step": 1,
        },
    ),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {}),
}

FAMILIES = tuple(_FAMILIES)

_MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}

# Such as single tests are about: of which a part or another is not on.
_OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", _MLA),
    # An indexer selects the keys that a query sees: of up to 32, 6.
    "deepseek_v32": (
        "DeepseekV32Config",
        "DeepseekV32ForCausalLM",
        {**_MLA, "v_head_dim": 16, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 6},
    ),
    # Heads of full attention are wider than those of sliding attention.
    "gemma4": (
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        {
            "head_dim": 8,
            "global_head_dim": 16,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB_SIZE,
            "num_kv_shared_layers": 0,
        },
    ),
    # Positions count from the padding token's number on.
    "roberta": (
        "RobertaConfig",
        "RobertaForCausalLM",
        {"is_decoder": True, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    ),
}


def build(family: str, *, seed: int = 0, attn_implementation: str | None = None, **overrides: Any) -> PreTrainedModel:
    """A tiny random model of `family` in fp32, in training mode."""
    config_name, model_name, differs = (_FAMILIES | _OTHERS)[family]
    options = {**_COMMON, **differs, **overrides}
    if family == "gpt2":
        options = {
            "vocab_size": VOCAB_SIZE,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 512,
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
            **overrides,
        }
    config = getattr(transformers, config_name)(**options)
    if attn_implementation is not None:
        config._attn_implementation = attn_implementation
    model_class: Callable[..., PreTrainedModel] = getattr(transformers, model_name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
        with torch.no_grad():
            for parameter in model.parameters():
                # Larger than the usual 0.02, so that an error in any block reaches the loss.
                parameter.add_(torch.randn_like(parameter) * 0.08)
    return model.train()


def packed_batch(lengths: tuple[int, ...] = (13, 9, 5, 5), *, seed: int = 1) -> dict[str, torch.Tensor]:
    """One packed row with the keys of TRL's padding-free collator."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCAB_SIZE, (1, sum(lengths)), generator=generator)
    position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
    labels = input_ids.clone()
    labels[position_ids == 0] = -100
    labels[:, 3:6] = -100
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return {
        "input_ids": input_ids,
        "labels": labels,
        "position_ids": position_ids,
        "cu_seq_lens_q": offsets,
        "cu_seq_lens_k": offsets,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }
