"""Whole tiny models on a GPU: every part on with its GPU back end, gradients in fp32 and bf16, documents apart."""

from __future__ import annotations

import copy

import pytest
import tiny_models
import torch
from trl.trainer.utils import add_fused_lm_head

from chronicals_trl import patch_model
from chronicals_trl.model.attention_choice import verify_isolation, verify_padding

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

DOCUMENTS = (97, 61, 33, 5, 60)
# Head dimensions that the varlen kernels take; the tiny models' default of 8 is one too, 16 for those with their own.
FAMILIES = [family for family in tiny_models.FAMILIES if family != "gpt2"]


def prepared(family: str, dtype: torch.dtype, *, patched: bool, **config):
    model = tiny_models.build(family).to("cuda", dtype)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    report = patch_model(model, config or None) if patched else None
    return model, report


def step(model, batch):
    model.zero_grad(set_to_none=True)
    outputs = model(**copy.copy(batch), fused_lm_head=True)
    loss = -outputs.log_probs.float().sum() / outputs.label_mask.sum()
    loss.backward()
    return loss.detach(), {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}


def cuda_batch(documents=DOCUMENTS):
    return {
        key: value.to("cuda") if torch.is_tensor(value) else value
        for key, value in tiny_models.packed_batch(documents).items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_gradients(family: str) -> None:
    batch = cuda_batch()
    loss, gradients = step(prepared(family, torch.float32, patched=False)[0], batch)
    model, report = prepared(family, torch.float32, patched=True)
    for name in ("rms_norm", "gated_mlp", "qk_rope"):
        assert report[name].backend == "triton", report.render()
    ours, patched = step(model, batch)
    assert torch.allclose(ours, loss, rtol=1e-5)
    for name, gradient in gradients.items():
        assert (patched[name] - gradient).norm() / gradient.norm() < 2e-5, name


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_gradients_within_twice_eagers_own_error(family: str) -> None:
    batch = cuda_batch()
    _, exact = step(prepared(family, torch.float32, patched=False)[0], batch)
    _, eager = step(prepared(family, torch.bfloat16, patched=False)[0], batch)
    model, report = prepared(family, torch.bfloat16, patched=True)
    if family != "gemma2":  # which needs a kernel that caps logits
        assert report["attention"].backend in ("varlen", "flash_attn_4"), report.render()
    _, ours = step(model, batch)
    for name, reference in exact.items():
        allowed = 2 * (eager[name] - reference).norm() + torch.finfo(torch.bfloat16).eps * reference.norm()
        assert (ours[name] - reference).norm() <= allowed, name


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_alone_in_bf16(family: str) -> None:
    model, _ = prepared(family, torch.bfloat16, patched=True)
    batch = cuda_batch()
    with torch.no_grad():
        packed = model(**copy.copy(batch), fused_lm_head=True).log_probs
        start = 0
        for length in DOCUMENTS:
            ids, labels = (batch[key][:, start : start + length] for key in ("input_ids", "labels"))
            alone = model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs
            error = (packed[:, start : start + length - 1] - alone).abs().max()
            assert error < 0.15, f"document of {length} at {start}: {error}"  # bf16 hidden states, logits of some 5
            start += length


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_patched_while_the_weights_are_on_the_cpu(family: str) -> None:
    """As under FSDP and DeepSpeed, which move them later: the kernels are those of the GPU, verified on it."""
    device = torch.device("cuda", 0)
    model = tiny_models.build(family).to(torch.bfloat16)
    report = patch_model(model, device=device)
    assert {part.name: part.backend for part in report.parts} == {
        part.name: part.backend for part in prepared(family, torch.bfloat16, patched=True)[1].parts
    }
    assert report["attention"].backend in ("varlen", "flash_attn_4"), report.render()
    assert verify_isolation(model, device) is None and verify_padding(model, device) is None  # on the CPU
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())
    model.to(device)
    assert verify_isolation(model, device) is None
