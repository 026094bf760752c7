"""Patched models against PEFT's own code in fp64, over ranks and variants; what is not a linear is reported."""

from __future__ import annotations

import copy

import pytest
import tiny_models
import torch
from torch import nn

from chronicals_trl import patch_model
from chronicals_trl.kernels import _lora_linear

peft = pytest.importorskip("peft")

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj", "qkv_proj"]
VARIANTS = {
    "q/k/v and MLP": ("qwen2", {}),
    "joint projections": ("phi3", {}),
    "single layers": ("llama", {"target_modules": ["o_proj", "down_proj"]}),
    "rsLoRA": ("llama", {"use_rslora": True}),
    "bias": ("qwen2", {"bias": "all"}),
    "ranks of their own": ("llama", {"rank_pattern": {"q_proj": 3, "down_proj": 7}, "alpha_pattern": {"up_proj": 5}}),
    "dropout": ("llama", {"lora_dropout": 0.25}),
    "DoRA": ("llama", {"use_dora": True}),  # PEFT's own path, for every layer
}


def gradients(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    embeds = model.get_input_embeddings().weight.detach()[batch["input_ids"]].requires_grad_()
    model(inputs_embeds=embeds, position_ids=batch["position_ids"], use_cache=False).logits.square().mean().backward()
    return {"x": embeds.grad, **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("rank", [1, 3, 64, 256])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_pefts_in_fp64(variant: str, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the input, of every A and B, and of biases; on a batch of one row of odd length too."""
    family, options = VARIANTS[variant]
    torch.manual_seed(0)
    config = peft.LoraConfig(**{"r": rank, "lora_alpha": 2 * rank, "target_modules": LINEARS, **options,
                                "init_lora_weights": False})  # fmt: skip
    theirs = peft.get_peft_model(tiny_models.build(family), config).double().train()
    ours = copy.deepcopy(theirs)
    # Transformers' norms compute in fp32, whatever the model's dtype: ours do not.
    report = patch_model(ours, {"rms_norm": "off"})
    assert report["lora"].state == ("off" if variant == "DoRA" else "on"), report["lora"].reason
    nodes: list[int] = []
    original = _lora_linear._LoraLinears.apply
    monkeypatch.setattr(_lora_linear._LoraLinears, "apply", lambda *args: nodes.append(1) or original(*args))
    for rows, length in ((2, 16), (1, 7)):
        batch = {
            "input_ids": torch.randint(3, 100, (rows, length), generator=torch.Generator().manual_seed(1)),
            "position_ids": torch.arange(length).expand(rows, -1),
        }
        found, expected = gradients(ours, batch), gradients(theirs, batch)
        assert found.keys() == expected.keys() and len(expected) > 4
        for name, reference in expected.items():
            assert reference.norm() > 0, name
            assert (found[name] - reference).norm() <= 1e-11 * reference.norm(), name
    assert bool(nodes) is (variant != "DoRA")


def test_an_embedding_is_left_to_peft_and_reported() -> None:
    config = peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_models.build("llama"), config)
    part = patch_model(model)["lora"]
    assert part.state == "on" and "Embedding" in str(part.reason)


def test_experts_are_left_to_peft_and_reported() -> None:
    model = tiny_models.build("qwen3_moe")
    stacked = [n.split("layers.")[1].split(".", 1)[1] for n, p in model.named_parameters() if p.dim() == 3]
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], target_parameters=sorted(set(stacked))[:1])
    part = patch_model(peft.get_peft_model(model, config))["lora"]
    assert part.state == "on" and "Qwen3MoeExperts" in str(part.reason), part
