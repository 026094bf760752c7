"""Which back end a model gets, and why it does not get another."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import fake_flash_attention as fake
import pytest
import tiny_models
import torch
import transformers
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from chronicals_trl import patch_model, unpatch_model
from chronicals_trl.model import attention_backends, attention_choice
from chronicals_trl.model.attention import capped_attention
from chronicals_trl.model.attention_backends import BACKENDS, unavailable
from chronicals_trl.model.attention_choice import Heads, choose_backend, heads_of

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


def fail_all_but(monkeypatch: pytest.MonkeyPatch, *right: str) -> list[str]:
    """Let every back end be there, and these alone be right; returns the list of those that are tried."""
    fake.install(monkeypatch)
    tried: list[str] = []

    def verify(backend: str, **options: object) -> str | None:
        if backend not in tried:
            tried.append(backend)
        return None if backend in right else "wrong"

    monkeypatch.setattr(attention_choice, "verify_backend", verify)
    return tried


def test_the_order_and_the_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = fail_all_but(monkeypatch, "blockwise")
    backend, reason = choose_backend(tiny_models.build("llama"), "auto", CPU)
    assert backend == "blockwise" and tried == ["fa4", "varlen", "fa3", "fa2", "blockwise"]
    assert reason == "flash_attn_4: wrong; varlen: wrong; flash_attn_3: wrong; flash_attn_2: wrong"
    fail_all_but(monkeypatch, "fa4", "varlen", "blockwise")
    assert choose_backend(tiny_models.build("llama"), "auto", CPU) == ("fa4", None)
    assert choose_backend(tiny_models.build("llama"), "sdpa", CPU) == ("blockwise", None)
    assert choose_backend(tiny_models.build("llama"), "flash_attn_2", CPU) == (None, "flash_attn_2: wrong")


def test_a_cap_asks_for_a_kernel_that_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = fail_all_but(monkeypatch, "varlen", "fa2", "blockwise")
    model = tiny_models.build("gemma2")
    assert choose_backend(model, "auto", CPU)[0] == "fa2" and tried == ["fa4", "fa3", "fa2"]
    for name in ("varlen", "sdpa"):
        backend, reason = choose_backend(model, name, CPU)
        assert backend is None and reason is not None and f"{name} has none" in reason
    fail_all_but(monkeypatch, "varlen", "blockwise")
    backend, reason = choose_backend(model, "auto", CPU)
    assert backend is None and reason is not None and reason.startswith("logit softcapping: the model's own eager")


def test_a_decoder_that_works_on_the_mask_gets_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Doge adds to it; what stands for a packed row's mask on a varlen back end is empty."""
    tried = fail_all_but(monkeypatch, "fa4", "blockwise")
    config = transformers.DogeConfig(
        vocab_size=tiny_models.VOCAB_SIZE, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    model = transformers.DogeForCausalLM(config)
    backend, reason = choose_backend(model, "auto", CPU)
    assert backend == "blockwise" and reason is not None and "works on the mask itself" in reason
    backend, reason = choose_backend(model, "flash_attn_4", CPU)
    assert backend is None and reason is not None and "works on the mask itself" in reason
    assert choose_backend(model, "sdpa", CPU) == ("blockwise", None) and tried == ["blockwise"]
    for family in tiny_models.FAMILIES:
        assert not attention_choice._works_on_masks(tiny_models.build(family)), family


def test_without_a_gpu_nothing_is_tried() -> None:
    assert choose_backend(tiny_models.build("llama"), "auto", CPU) == ("blockwise", "no varlen kernel on cpu")
    for label in ("flash_attn_4", "varlen", "flash_attn_3", "flash_attn_2"):
        backend, reason = choose_backend(tiny_models.build("llama"), label, CPU)
        assert backend is None and reason == f"{label} needs an NVIDIA GPU, the model is on cpu"


@pytest.mark.parametrize(
    ("name", "capability", "reason"),
    [
        ("fa4", (8, 6), "flash_attn_4 needs a Hopper GPU or newer"),
        ("varlen", (7, 5), "varlen needs an Ampere GPU or newer"),
        ("varlen", (8, 0), None),
        ("fa4", (9, 0), "flash_attn_4 is not installed"),
        ("fa3", (9, 0), "flash_attn_3 is not installed"),
        ("fa2", (8, 9), "flash_attn_2 is not installed"),
    ],
)
def test_what_a_gpu_lacks(
    monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int], reason: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert unavailable(BACKENDS[name], CUDA) == reason


def test_an_installed_flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Called with the arguments of its public function; a tuple, as flash-attn 3 gave once, is taken too."""
    seen = {}

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False,
        window_size=(-1, -1), softcap=0.0, deterministic=False,
    ):  # fmt: skip
        seen.update(window_size=window_size, deterministic=deterministic)
        left = window_size[0]
        out = fake.attend(q, k, v, cu_seqlens_q, softmax_scale, None if left < 0 else left + 1, softcap)
        return (out, None) if seen["as_tuple"] else out

    monkeypatch.setattr(attention_backends, "_package", lambda label: flash_attn_varlen_func)
    monkeypatch.setattr(attention_choice, "_verified", {})
    for name in ("fa2", "fa3"):
        fake.allow_fp32(monkeypatch, name)
        for options in ({"window": None}, {"window": 16}, {"window": None, "softcap": 20.0}):
            seen["as_tuple"] = name == "fa3"
            options = {"heads": 4, "kv_heads": 2, "head_dim": 16, "device": CPU, **options}
            assert attention_choice.verify_backend(name, **options) is None
            assert seen["window_size"] == ((-1, -1) if options["window"] is None else (15, 0))
    assert seen["deterministic"] is False


def test_heads_that_only_a_layers_own_configuration_knows() -> None:
    layers = [
        SimpleNamespace(num_attention_heads=heads, num_key_value_heads=2, head_dim=8, hidden_size=32)
        for heads in (4, 6)
    ]
    model: Any = torch.nn.ModuleList(torch.nn.Identity() for _ in layers)
    for index, block in enumerate(model):
        block.head_dim, block.layer_idx = 8, index
    config = SimpleNamespace(is_heterogeneous=True, per_layer_config=layers)
    model.config = SimpleNamespace(get_text_config=lambda: config)
    assert heads_of(model) == {Heads(4, 2, 8, None), Heads(6, 2, 8, None)}


def test_the_heads_of_the_layers() -> None:
    assert heads_of(tiny_models.build("llama")) == {Heads(4, 2, 8, None)}
    assert heads_of(tiny_models.build("mistral")) == {Heads(4, 2, 8, None), Heads(4, 2, 8, 8)}
    assert heads_of(tiny_models.build("gemma3")) == {Heads(4, 2, 16, None), Heads(4, 2, 16, 8)}
    assert heads_of(tiny_models.build("gemma4")) == {
        Heads(4, 2, 8, None), Heads(4, 2, 8, 8), Heads(4, 2, 16, None)
    }  # fmt: skip
    assert heads_of(tiny_models.build("gpt2")) == {Heads(4, 4, 8, None)}
    model = tiny_models.build("llama")
    layer = model.model.layers[1].self_attn
    layer.head_dim, layer.num_key_value_groups, layer.sliding_window = 32, 4, 5
    assert heads_of(model) == {Heads(4, 2, 8, None), Heads(4, 1, 32, None), Heads(4, 1, 32, 5)}


def test_each_kind_of_head_is_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    fake.install(monkeypatch)
    seen = set()

    def verify(backend: str, **options: object) -> str | None:
        seen.add(options["window"])
        return reasons.get(options["window"])

    reasons: dict[object, str] = {}
    monkeypatch.setattr(attention_choice, "verify_backend", verify)
    assert choose_backend(tiny_models.build("gemma3"), "flash_attn_4", CPU) == ("fa4", None) and seen == {None, 8}
    reasons[8] = "no windows here"
    backend, reason = choose_backend(tiny_models.build("gemma3"), "flash_attn_4", CPU)
    assert backend is None and reason == "flash_attn_4: no windows here"


# -- what is kept ----------------------------------------------------------------------------------------------------


def test_attention_sinks_are_kept() -> None:
    config = transformers.GptOssConfig(
        vocab_size=64, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=8,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM(config)
    report = patch_model(model)
    assert report["attention"].state == "off" and "attention sinks: no back end here" in report["attention"].reason
    # And its own lets documents attend to each other (transformers 5.23 makes its mask without the positions): the
    # trainer refuses to pack for it.
    assert attention_choice.verify_isolation(model, CPU) is not None


def test_an_attention_that_is_not_causal_is_kept() -> None:
    model = tiny_models.build("llama")
    model.config.is_causal = False
    report = patch_model(model)
    assert report["attention"].state == "off" and "bidirectional" in report["attention"].reason


def test_values_of_another_size_stay_on_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_choice, "verify_backend", lambda backend, **options: None)
    model = tiny_models.build("llama")
    layer = model.model.layers[0].self_attn
    layer.qk_head_dim, layer.v_head_dim = 12, 8
    backend, reason = choose_backend(model, "auto", CUDA)
    assert backend == "blockwise" and reason is not None and "differ in size" in reason


def test_attention_dropout_stays_on_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_choice, "verify_backend", lambda backend, **options: None)
    for family, kept in (("llama", "blockwise"), ("gemma2", None)):
        backend, reason = choose_backend(tiny_models.build(family, attention_dropout=0.1), "auto", CUDA)
        assert backend == kept and reason is not None and "attention_dropout=0.1" in reason


def test_gemma_2_comes_back_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    fake.install(monkeypatch)
    model = tiny_models.build("gemma2")
    assert patch_model(model, {"attention_backend": "flash_attn_4"})["attention"].state == "on"
    assert model.config._attn_implementation == "chronicals_fa4"
    unpatch_model(model)
    assert model.config._attn_implementation == "eager"


# -- the plain-torch attention with a cap ----------------------------------------------------------------------------


@pytest.mark.parametrize("queries", [1, 6])
@pytest.mark.parametrize("masked", [False, True])
def test_capped_attention_is_gemma_2s(queries: int, masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q = 5 * torch.randn(2, 4, queries, 8, generator=generator)
    k, v = (torch.randn(2, 2, 6, 8, generator=generator) for _ in range(2))
    module = torch.nn.Module()
    module.num_key_value_groups, module.training = 2, False
    causal = torch.ones(queries, 6, dtype=torch.bool).tril(6 - queries)[None, None].expand(2, 1, -1, -1)
    mask = causal.clone()
    if masked:
        mask[1, ..., :2] = False  # with 6 queries two rows see nothing
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    expected, _ = eager_attention_forward(module, q, k, v, additive, dropout=0.0, scaling=0.4, softcap=3.0)
    ours = capped_attention(q, k, v, mask if masked else None, scale=0.4, softcap=3.0)
    seen = mask.any(-1)[:, 0]  # a row that sees nothing has no answer, and must only be finite
    torch.testing.assert_close(ours[seen], expected[seen])
    assert ours.isfinite().all()
