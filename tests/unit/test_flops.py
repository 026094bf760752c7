"""Operations counted from modules: against the benchmark's formula, torch's own counter, and by hand."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import tiny_models
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from chronicals_trl.bench.sft import models as sft_models
from chronicals_trl.bench.sft.cases import LORA_RANK, SHAPES
from chronicals_trl.bench.sft.cases import training_flops as by_formula
from chronicals_trl.observe.flops import training_flops

TINY = SHAPES["tiny"]
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


def adapted(model: Any) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(r=LORA_RANK, target_modules="all-linear"))


def test_those_of_the_benchmarks_formula() -> None:
    for mode, make in (("full", lambda model: model), ("lora", adapted)):
        found = training_flops(make(sft_models.make_model(TINY, 0)))
        assert found is not None
        assert found.per_token * 100 + found.per_square * 3000 == by_formula(TINY, mode, 100, 3000)


def test_those_that_torch_counts() -> None:
    """One document a row. torch counts a causal attention's products in full: twice what is counted here."""
    model = sft_models.make_model(TINY, 0).float().train()
    ids = torch.randint(3, TINY.vocab, (2, 24))
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    found = training_flops(model)
    assert found is not None
    counted = counter.get_total_flops()
    assert counted == pytest.approx(found.per_token * 48 + 2 * found.per_square * 2 * 24**2, rel=1e-3)


def test_experts_count_by_the_share_that_a_token_visits() -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, **HEADS}
    config = transformers.MixtralConfig(
        **shape, intermediate_size=48, num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False
    )
    found = training_flops(transformers.MixtralForCausalLM(config))
    attention = 32 * 8 * (4 + 2 + 2 + 4)
    routers = 32 * 4
    weights = 2 * (attention + 2 * 3 * 32 * 48) + 32 * 64
    assert found is not None
    # The router may be a module of its own, which is not worth a rule.
    assert 6 * weights <= found.per_token <= 6 * (weights + 2 * routers)
    assert found.per_square == 6 * 2 * 4 * 8


def test_sliding_layers_have_no_squares() -> None:
    config = transformers.Qwen2Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, vocab_size=64, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["full_attention"] + ["sliding_attention"] * 3, use_sliding_window=True,
    )  # fmt: skip
    found = training_flops(transformers.Qwen2ForCausalLM(config))
    assert found is not None and found.per_square == 6 * 1 * 4 * 8


@pytest.mark.parametrize(("window", "layers"), [(None, 4), (128, 0)])
def test_a_window_of_all_layers_has_no_squares(window: int | None, layers: int) -> None:
    """Mistral's configuration has the window, and no list of layers."""
    config = transformers.MistralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, vocab_size=64, sliding_window=window,
        **{**HEADS, "head_dim": 16},
    )  # fmt: skip
    found = training_flops(transformers.MistralForCausalLM(config))
    assert found is not None and found.per_square == 6 * layers * 4 * 16


def test_experts_of_which_nothing_is_known() -> None:
    """All of them would be counted, and the figure would be several times the real one."""
    config = transformers.MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, vocab_size=64, num_local_experts=4, **HEADS
    )
    model = transformers.MixtralForCausalLM(config)
    model.config.num_experts_per_tok = 0
    assert training_flops(model) is None


def test_weights_that_are_elsewhere_count_by_their_shape() -> None:
    """ZeRO-3 leaves empty tensors where the model is loaded under it."""
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64))
    mixtral = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=1, vocab_size=64, num_local_experts=4, **HEADS
        )
    )
    for model in (gpt2, mixtral):
        expected = training_flops(model)
        for parameter in model.parameters():
            parameter.ds_shape = parameter.shape  # type: ignore[attr-defined]
            parameter.data = torch.empty(0)
        assert training_flops(model) == expected


def test_conv1d_and_copies_that_peft_trains() -> None:
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64)
    model = transformers.GPT2LMHeadModel(config)
    weights = 2 * (32 * 96 + 32 * 32 + 32 * 128 + 128 * 32)
    found = training_flops(model)
    assert found is not None and found.per_token == 6 * (weights + 32 * 64)
    trained = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["c_attn"], modules_to_save=["lm_head"]))
    found = training_flops(trained)
    assert found is not None and found.per_token == 4 * weights + 6 * (2 * 4 * (32 + 96) + 32 * 64)


def test_heads_that_differ_from_layer_to_layer() -> None:
    """Gemma 4's configuration refuses to say which they are, of the model as a whole."""
    model = tiny_models.build("gemma4")
    if not getattr(model.config, "is_heterogeneous", False):
        pytest.skip("this transformers has no configurations of single layers")
    found = training_flops(model)
    assert found is not None and found.per_square == 6.0 * 4 * 16


def test_models_of_more_than_text_are_left_out() -> None:
    model = sft_models.make_model(TINY, 0)
    for kind in ("vision_config", "audio_config"):
        setattr(model.config, kind, {})
        assert training_flops(model) is None
        delattr(model.config, kind)
    assert training_flops(torch.nn.Linear(2, 2)) is None
