"""Settings that make every text family of transformers tiny: what `families.py` gives to the configurations.

A configuration takes those of `SIZES` that it has; `OF_A_FAMILY` has what one family needs besides, or otherwise.
"""

from __future__ import annotations

from typing import Any

import tiny_models

LAYERS = 4  # two of each kind, where a family has two

# value -> names of settings that get it. Dropout is off: two runs draw it in another order.
SIZES: list[tuple[Any, str]] = [
    (False, "use_mamba_kernels output_router_logits"),
    (True, "is_decoder"),
    (
        0.0,
        "hidden_dropout attention_dropout embd_pdrop attn_pdrop resid_pdrop hidden_dropout_prob "
        "attention_probs_dropout_prob dropout activation_dropout summary_first_dropout embedding_dropout "
        "embed_dropout resid_dropout classifier_dropout layerdrop decoder_layerdrop",
    ),
    (0, "bos_token_id num_kv_shared_layers"),
    (
        1,
        "eos_token_id topk_group n_group first_k_dense_replace mamba_n_groups moe_num_shared_experts n_groups "
        "num_expert_group n_input_layers n_output_layers loop_layer_index_start split_ngram_parts attn_layer_offset "
        "expert_layer_offset num_dense_layers num_shared_experts n_shared_experts",
    ),
    (
        2,
        "num_key_value_heads pad_token_id num_experts_per_tok decoder_layers encoder_layers n_layer index_n_heads "
        "linear_num_key_heads n_layers num_layers swa_num_key_value_heads moe_topk num_experts_per_token "
        "layer_group_size o_groups moe_k num_kv_heads num_layers_per_stack n_recurrent_layers zero_expert_num "
        "index_topk_blocks num_encoder_layers num_decoder_layers num_blocks loop_layer_index_end loop_num_passes "
        "n_layers_per_attn_res_block global_attn_every_n_layers heads_per_ngram attn_layer_period expert_layer_period "
        "max_window_layers",
    ),
    (3, "moe_layer_end_index"),
    (
        4,
        "num_attention_heads num_experts n_routed_experts num_local_experts decoder_attention_heads "
        "encoder_attention_heads n_head linear_conv_kernel_dim linear_num_value_heads rotary_dim n_heads "
        "time_step_rank num_heads swa_num_attention_heads conv_kernel_size moe_num_experts linear_num_heads "
        "mamba_dt_rank gated_norm_rank mamba_num_heads num_encoder_attention_heads num_decoder_attention_heads "
        "attention_heads",
    ),
    (LAYERS, "num_hidden_layers"),
    (
        8,
        "head_dim sliding_window qk_rope_head_dim v_head_dim qk_nope_head_dim mamba_d_state linear_key_head_dim "
        "linear_value_head_dim mamba_n_heads mamba_d_head mamba_chunk_size state_size query_pre_attn_scalar "
        "swa_head_dim sliding_window_size d_rel linear_head_dim hidden_size_per_layer_input kv_channels chunk_size "
        "laurel_rank mamba_head_dim ssm_state_size mamba_headdim n_mamba_heads adapter_rank index_block_size d_head "
        "block_multiple_of loop_gate_rank hc_lowrank ple_embed_dim make_ngram_vocab_size_divisible_by dim_head",
    ),
    (
        16,
        "moe_intermediate_size kv_lora_rank qk_head_dim q_lora_rank shared_expert_intermediate_size index_head_dim "
        "index_topk shared_intermediate_size o_lora_rank shared_experts_intermediate_size router_hidden_size "
        "moe_shared_expert_intermediate_size expert_ffn_hidden_size attention_chunk_size local_attention "
        "attention_window_size rel_extent attention_head_dim window_size",
    ),
    (
        32,
        "hidden_size d_model n_embd attention_hidden_size embedding_size dim_model_base word_embed_proj_dim lru_width "
        "emb_dim embedding_dim input_embedding_size output_embedding_size",
    ),
    (
        56,
        "intermediate_size decoder_ffn_dim encoder_ffn_dim ffn_dim ffn_hidden_size dense_intermediate_size "
        "intermediate_size_mlp d_inner dff dim_ff",
    ),
    (64, "mamba_d_ssm keep_window_size"),
    (97, "ngram_vocab_size_base"),
    (tiny_models.VOCAB_SIZE, "vocab_size vocab_size_per_layer_input"),
    (512, "max_position_embeddings n_positions max_seq_len max_target_positions context_length model_max_length"),
]
TINY: dict[str, Any] = {name: value for value, names in SIZES for name in names.split()}

SLIDING_AND_FULL = ["sliding_attention", "full_attention"]
OF_A_FAMILY: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]} for kind in SLIDING_AND_FULL
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 56, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "doge": {"is_moe": False},
    "dory": {
        "num_hidden_layers": 6, "n_input_layers": 2, "n_recurrent_layers": 2, "n_output_layers": 2,
        "layer_types": SLIDING_AND_FULL * 3,
    },
    "gemma3n_text": {"intermediate_size": 56},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "inkling2_loop_text": {
        "n_layers_per_attn_res_block": 2, "loop_layer_index_start": 2, "loop_layer_index_end": 4,
        "num_hidden_layers": 6, "layer_types": None, "mlp_layer_types": None,
        "unpadded_vocab_size": tiny_models.VOCAB_SIZE,
    },
    "inkling2_text": {"unpadded_vocab_size": tiny_models.VOCAB_SIZE},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "phimoe": {"router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "reformer": {
        "axial_pos_embds_dim": (16, 16), "axial_pos_shape": (16, 32), "attention_head_size": 8,
        "num_hidden_layers": 2, "attn_layers": ["local", "local"], "feed_forward_size": 56,
        "local_attn_chunk_length": 8, "num_buckets": 4,
    },
    "roc_bert": {
        "shape_vocab_size": tiny_models.VOCAB_SIZE, "pronunciation_vocab_size": tiny_models.VOCAB_SIZE,
        "shape_embed_dim": 8, "pronunciation_embed_dim": 8,
    },
    "seed_oss": {"residual_dropout": 0.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_head_dim": 16, "attention_hidden_size": 64},
    "zamba2": {"attention_head_dim": 16, "attention_hidden_size": 64},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip

# Stock TRL asks for `num_experts` by this name alone, which these configurations spell otherwise.
EXPERTS_SPELT_OTHERWISE = (
    "deepseek_v4", "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "phimoe",
)  # fmt: skip
