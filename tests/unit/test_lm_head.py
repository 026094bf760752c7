"""The patched forward of a causal language model hands on what is not its own."""

from __future__ import annotations

import types

import pytest
import tiny_models
import torch

from chronicals_trl import patch_model, unpatch_model


def test_a_forward_that_was_on_the_instance_still_serves_calls_for_logits() -> None:
    """Another library's wrapper around the model's own forward (TRL's fused head is one) gets all of the call."""
    model, calls = tiny_models.build("llama"), []
    original = type(model).forward

    def wrapper(self, *args, **kwargs):
        calls.append(set(kwargs))
        return original(self, *args, **kwargs)

    model.forward = types.MethodType(wrapper, model)
    assert patch_model(model)["head"].state == "on"
    batch = tiny_models.packed_batch()
    loss = model(**batch, use_cache=False).loss
    assert calls == [{*batch, "use_cache"}]
    fused = model(**batch, fused_lm_head=True).loss
    assert len(calls) == 1 and torch.allclose(fused, loss, rtol=1e-5)
    unpatch_model(model)
    model(**batch)
    assert len(calls) == 2


def test_lora_on_the_head_leaves_it_to_peft_and_says_so() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_models.build("llama"), peft.LoraConfig(r=2, target_modules=["lm_head"]))
    assert patch_model(model)["head"].reason == "LoRA on the head: its own forward is kept"
