"""LoRA+ on what PEFT offers: each kind of trainable parameter at the rate that the module's table gives it."""

from __future__ import annotations

import pytest
import tiny_models
from torch import nn

from chronicals_trl import patch_model
from chronicals_trl._inputs import lora_plus_of_model, require_trainable
from chronicals_trl.config import ChronicalsConfig
from chronicals_trl.optim import split_lora_plus_groups

peft = pytest.importorskip("peft")

LR, RATIO, EMBEDDING_LR = 1e-3, 8.0, 5e-6
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def rates(model: nn.Module, **options: float) -> dict[str, float]:
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    groups = split_lora_plus_groups(model, [{"params": list(trained.values()), "lr": LR}], ratio=RATIO, **options)
    found = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert len(found) == len(trained) == sum(len(group["params"]) for group in groups)
    return {name: found[id(parameter)] for name, parameter in trained.items()}


def is_b(name: str) -> bool:
    return ".lora_B." in name


def fast(found: dict[str, float]) -> set[str]:
    """The parameters at B's rate; all others must be at A's."""
    assert set(found.values()) == {LR, LR * RATIO}
    return {name for name, lr in found.items() if lr == LR * RATIO}


@pytest.mark.parametrize(
    ("options", "slow"),
    [
        ({"use_rslora": True}, "lora_A"),
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"bias": "all", "target_modules": ["q_proj", "k_proj"]}, "lora_A"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.modules_to_save"),
        ({"modules_to_save": ["norm", "embed_tokens"]}, "norm.modules_to_save"),
        ({"trainable_token_indices": [1, 5]}, "trainable_tokens_delta"),
        ({"rank_pattern": {"q_proj": 4}, "init_lora_weights": "olora"}, "lora_A"),
        ({"target_modules": None, "target_parameters": EXPERTS}, "experts.lora_A"),
        ({"target_modules": "all-linear", "use_rslora": True}, "lora_A"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_kinds_of_adapters(options: dict[str, object], slow: str) -> None:
    family = "qwen3_moe" if "target_parameters" in options else "llama"
    model = peft.get_peft_model(
        tiny_models.build(family), peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **options})
    )
    found = rates(model)
    assert fast(found) == {name for name in found if is_b(name)} != set()
    assert any(slow in name for name in found if not is_b(name)), sorted(found)


def test_one_dimensional_parameters_beside_an_adapter() -> None:
    """PEFT's own LoRA+ has all of these at B's rate."""
    model = peft.get_peft_model(
        tiny_models.build("llama"),
        peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, modules_to_save=["norm"]),
    )
    one_dimensional = {
        name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.ndim == 1
    }
    assert len(one_dimensional) > 2
    found = rates(model)
    assert {found[name] for name in one_dimensional} == {LR}


def test_experts_and_embeddings_together() -> None:
    model = peft.get_peft_model(
        tiny_models.build("qwen3_moe"),
        peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], target_parameters=EXPERTS),
    )
    found = rates(model, embedding_lr=EMBEDDING_LR)
    for name, lr in found.items():
        assert lr == (EMBEDDING_LR if "lora_embedding" in name else LR * RATIO if is_b(name) else LR), name
    assert set(found.values()) == {LR, LR * RATIO, EMBEDDING_LR}


def test_experts_b_is_the_one_that_starts_at_zero() -> None:
    """PEFT's wrapper of an expert stack has its factors the other way round in memory; by name is right here too."""
    model = peft.get_peft_model(
        tiny_models.build("qwen3_moe"), peft.LoraConfig(r=2, target_modules=None, target_parameters=EXPERTS)
    )
    values = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, lr in rates(model).items():
        assert (values[name].abs().max() == 0) == (lr == LR * RATIO), name


@pytest.mark.parametrize("active", [["default", "other"], ["other"]])
def test_adapters_that_are_active(active: list[str]) -> None:
    """Inactive adapters are frozen by PEFT and in no group; two that are trained both get the ratio."""
    model = peft.get_peft_model(tiny_models.build("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.add_adapter("other", peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], use_rslora=True))
    model.base_model.set_adapter(active)
    found = rates(model)
    assert {name.split(".")[-2] for name in found} == set(active)
    assert fast(found) == {name for name in found if is_b(name)}


def test_an_adapter_name_that_does_not_exist() -> None:
    """LoRA+ takes what is trainable and asks for no name. PEFT's model refuses a wrong one; its tuner does not."""
    model = peft.get_peft_model(tiny_models.build("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    before = rates(model)
    with pytest.raises(ValueError, match="missing"):
        model.set_adapter("missing")
    assert rates(model) == before
    model.base_model.set_adapter("missing")
    part = lora_plus_of_model(model, ChronicalsConfig())
    assert part.state == "off" and "no adapter is called 'missing', which is set as" in (part.reason or "")
    assert "there is 'default'. Choose one with model.set_adapter(name)" in (part.reason or "")
    with pytest.raises(ValueError, match="no adapter is called 'missing'"):
        require_trainable(model)
    assert "no active adapter (missing) is on the layer" in (patch_model(model)["lora"].reason or "")
    model.set_adapter("default")
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"nothing to train.*: all of its adapters are frozen.*is_trainable=True"):
        require_trainable(model)


def test_a_model_of_which_nothing_is_trained() -> None:
    model = tiny_models.build("llama").requires_grad_(False)
    with pytest.raises(ValueError, match=r"nothing to train.*pass peft_config"):
        require_trainable(model)
    next(model.parameters()).requires_grad_(True)
    require_trainable(model)


def test_adalora() -> None:
    """Its singular values learn at A's rate."""
    model = peft.get_peft_model(
        tiny_models.build("llama"), peft.AdaLoraConfig(init_r=2, target_modules=["q_proj"], total_step=10)
    )
    found = rates(model)
    assert fast(found) == {name for name in found if is_b(name)} != set()
    assert any("lora_E" in name for name in found)


def test_convolutions() -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU())
    found = rates(peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["0"])))
    assert fast(found) == {name for name in found if is_b(name)} != set()
