"""verify_isolation: the model is probed as training calls it, and a small leak is a leak."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny_models
import torch
from torch import nn

from chronicals_trl.model.attention_choice import verify_isolation

CPU = torch.device("cpu")
VOCABULARY = 53


class Leaking(nn.Module):
    """Each token's logits take a share of those of the row's first token, whose document it may not be."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.share = share
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=VOCABULARY))

    def forward(self, input_ids: torch.Tensor, **kwargs: object) -> SimpleNamespace:
        embedded = self.embedding(input_ids)
        return SimpleNamespace(logits=embedded + self.share * embedded[:, :1])


def test_the_size_of_a_leak() -> None:
    """Rounding is no leak; what passes through an attention weight of 1% is one."""
    assert verify_isolation(Leaking(0.0), CPU) is None
    assert verify_isolation(Leaking(1e-6), CPU) is None
    for share in (1e-3, 1e-2):
        reason = verify_isolation(Leaking(share), CPU)
        assert reason is not None and "logits change by a relative" in reason
    # The two roundings of a half-precision model differ by more.
    assert verify_isolation(Leaking(1e-3).to(torch.bfloat16), CPU) is None
    assert verify_isolation(Leaking(0.1).to(torch.bfloat16), CPU) is not None


@pytest.mark.parametrize(
    ("compute_dtype", "bound"), [(torch.bfloat16, 0.05), (None, 0.05), (torch.float16, 5e-3), (torch.float32, 5e-5)]
)
def test_a_quantised_layer_rounds_inside_of_a_float32_model(compute_dtype: torch.dtype | None, bound: float) -> None:
    """QLoRA: TRL loads float32, and the 4-bit layers compute in bf16; 8-bit ones name no dtype."""

    class Quantised(nn.Identity):
        __module__ = "bitsandbytes.nn.modules"

    for share, isolated in ((0.5 * bound, True), (2.5 * bound, False)):
        model = Leaking(share)
        model.layer = Quantised()
        model.layer.compute_dtype = compute_dtype
        assert (verify_isolation(model, CPU) is None) == isolated
        if bound > 1e-4:
            assert verify_isolation(Leaking(share), CPU) is not None  # one that has no such layer


def test_prompt_tuning_is_seen_through_its_wrapper() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        tiny_models.build("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    assert verify_isolation(model, CPU) is not None
    assert verify_isolation(model.get_base_model(), CPU) is None
    assert model.training


def test_layers_of_bitsandbytes_are_not_repacked_for_inference() -> None:
    """On a CPU its 4-bit layers do so in eval mode without gradients, for good, and then train on wrong gradients."""

    class Quantised(nn.Linear):
        __module__ = "bitsandbytes.nn.modules"
        modes: tuple[bool, ...] = ()

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            self.modes = (*self.modes, self.training)
            return super().forward(input)

    model = tiny_models.build("llama").train()
    layer = model.model.layers[0].self_attn.o_proj
    layer.__class__ = Quantised
    assert verify_isolation(model, CPU) is None
    assert layer.modes and all(layer.modes)
    model.eval()
    assert verify_isolation(model, CPU) is None
    assert not layer.training
