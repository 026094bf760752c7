"""A model on a varlen back end that is copied, wrapped, patched again or compiled: each copy isolates by itself."""

from __future__ import annotations

import copy

import fake_flash_attention as fake
import pytest
import tiny_models
import torch
from unit.test_attention_kernels import on_fa4
from unit.test_patch import prepared, require_same_gradients, step

from chronicals_trl import patch_model, unpatch_model
from chronicals_trl.model.attention import _mark_packed
from chronicals_trl.model.patch import is_patched


@pytest.fixture(autouse=True)
def fake_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    fake.install(monkeypatch)
    torch._dynamo.reset()


def hooks(model: torch.nn.Module) -> int:
    return sum(hook is _mark_packed for each in model.modules() for hook in each._forward_pre_hooks.values())


def test_a_deep_copy_outlives_the_original() -> None:
    batch = tiny_models.packed_batch()
    _, gradients = step(prepared("llama"), batch)
    model = on_fa4("llama")
    clone = copy.deepcopy(model)
    unpatch_model(model)
    assert (hooks(model), hooks(clone)) == (0, 1)
    require_same_gradients(step(clone, batch, use_cache=False)[1], gradients)
    assert fake.CALLS["forward"] == 2
    assert clone.config is clone.model.layers[0].self_attn.config is not model.config
    unpatch_model(clone)
    assert not hooks(clone) and clone.config._attn_implementation == "sdpa" and not is_patched(clone)


def test_patched_twice_is_patched_once() -> None:
    model = on_fa4("llama")
    patch_model(model, {"attention_backend": "flash_attn_4"})
    assert hooks(model) == 1
    unpatch_model(model)
    assert not hooks(model) and not is_patched(model)


def test_in_a_peft_wrapper_and_out_of_it() -> None:
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(on_fa4("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    wrapped(**tiny_models.packed_batch(), use_cache=False)
    assert fake.CALLS["forward"] == 2
    merged = wrapped.merge_and_unload()
    assert hooks(merged) == 1
    unpatch_model(merged)
    assert not hooks(merged) and not is_patched(merged)


def test_a_packed_batch_through_a_whole_compiled_model() -> None:
    batch = tiny_models.packed_batch()
    loss, _ = step(prepared("llama"), batch)
    compiled = torch.compile(on_fa4("llama"), backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(**batch, use_cache=False).loss, loss, rtol=1e-5)
    assert fake.CALLS["forward"] == 2
