"""Everything around a varlen kernel, with flash-attn-4's functions in plain torch in its place."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from functools import partial
from types import ModuleType

import fake_flash_attention as fake
import pytest
import tiny_models
import torch
import transformers
from torch.utils.checkpoint import checkpoint
from unit.test_patch import prepared, require_same_gradients, step

from chronicals_trl import patch_model, unpatch_model
from chronicals_trl.model import attention_backends, attention_choice, attention_rows
from chronicals_trl.model.attention import FORWARDS, use_padding
from chronicals_trl.model.attention_choice import verify_backend, verify_padding

CPU = torch.device("cpu")
FA4 = {"attention_backend": "flash_attn_4"}


@pytest.fixture(autouse=True)
def fake_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    fake.install(monkeypatch)
    torch._dynamo.reset()


def on_fa4(family: str, **options):
    model = prepared(family, **options)
    report = patch_model(model, FA4)
    assert (report["attention"].state, report["attention"].backend) == ("on", "flash_attn_4"), report.render()
    fake.CALLS.clear()
    return model


# -- verification ----------------------------------------------------------------------------------------------------

HEADS = [(4, 4, 64), (4, 1, 96), (7, 1, 128), (2, 1, 256)]


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
@pytest.mark.parametrize("options", [{"window": None}, {"window": 16}, {"window": None, "softcap": 30.0}])
def test_a_right_kernel_passes(heads: int, kv_heads: int, head_dim: int, options: dict) -> None:
    options = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "device": CPU, **options}
    assert verify_backend("fa4", **options) is None
    if "softcap" not in options:
        assert verify_backend("blockwise", **options) is None


def off_by_one(cu_seqlens):
    wrong = cu_seqlens.clone()
    wrong[1] += 1
    return wrong


LEAKS = {
    "off by one": lambda k: {"cu_seqlens_q": off_by_one(k["cu_seqlens_q"])},
    "one document": lambda k: {"cu_seqlens_q": k["cu_seqlens_q"][[0, -1]], "max_seqlen_q": 9999, "max_seqlen_k": 9999},
    "last document lost": lambda k: {"cu_seqlens_q": k["cu_seqlens_q"].clamp(max=307)},
    "window": lambda k: {"window_size_left": k["window_size_left"] + 1},
    "no window": lambda k: {"window_size_left": None, "window_size_right": None},
    "scale": lambda k: {"softmax_scale": 0.25},
    "no softcap": lambda k: {"softcap": 0.0},
}


@pytest.mark.parametrize("leak", LEAKS)
def test_a_wrong_kernel_does_not(monkeypatch: pytest.MonkeyPatch, leak: str) -> None:
    def wrong(*args, **kwargs):
        return fake.forward(*args, **{**kwargs, **LEAKS[leak](kwargs)})

    fake.install(monkeypatch, forward=wrong)
    softcap = 30.0 if leak == "no softcap" else None
    reason = verify_backend("fa4", heads=4, kv_heads=2, head_dim=16, window=8, device=CPU, softcap=softcap)
    assert reason is not None and "output 0 differs" in reason


@pytest.mark.parametrize("softcap", [20.0, 50.0])
def test_a_missing_cap_shows_in_bf16(monkeypatch: pytest.MonkeyPatch, softcap: float) -> None:
    """Where rounding is coarse, logits that the cap hardly touches would not show it."""
    options = {"heads": 4, "kv_heads": 2, "head_dim": 64, "window": None, "device": CPU, "softcap": softcap}

    def without(*args, **kwargs):
        return fake.forward(*args, **{**kwargs, "softcap": 0.0})

    for forward, right in ((fake.forward, True), (without, False)):
        fake.install(monkeypatch, forward=forward)
        half = replace(attention_backends.BACKENDS["fa4"], dtypes=(torch.bfloat16,))
        monkeypatch.setitem(attention_backends.BACKENDS, "fa4", half)
        assert (verify_backend("fa4", **options) is None) == right


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_wrong_gradient_does_not(monkeypatch: pytest.MonkeyPatch, which: int) -> None:
    def wrong(*args, **kwargs):
        gradients = fake.backward(*args, **kwargs)
        gradients[which][306:308] *= 1.1  # across the boundary of two documents
        return gradients

    fake.install(monkeypatch, backward=wrong)
    reason = verify_backend("fa4", heads=4, kv_heads=2, head_dim=16, window=None, device=CPU)
    assert reason is not None and f"gradient {which} differs" in reason


def test_what_a_kernel_raises_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args, **kwargs):
        assert not kwargs["deterministic"], "no deterministic backward\non this GPU"
        return fake.backward(*args, **kwargs)

    fake.install(monkeypatch, backward=refuse)
    options = {"heads": 2, "kv_heads": 2, "head_dim": 16, "window": None, "device": CPU}
    assert verify_backend("fa4", **options) is None
    torch.use_deterministic_algorithms(True)
    try:
        assert verify_backend("fa4", **options) == "AssertionError: no deterministic backward"
    finally:
        torch.use_deterministic_algorithms(False)


def test_another_version_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("flash_attn.cute.interface")
    module._flash_attn_fwd = fake.forward
    module._flash_attn_bwd = lambda q, k, v, out, dout, lse, deterministic: None
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", module)
    find = fake.PACKAGE.__wrapped__  # not what an earlier test has found
    found = find()
    assert isinstance(found, str) and "takes no dk, dq, dv, softcap, window_size_left" in found
    module._flash_attn_bwd = fake.backward
    assert find() == (fake.forward, fake.backward)


# -- the op ----------------------------------------------------------------------------------------------------------


def qkv(batch: int = 1, length: int = 12, layout: str = "model"):
    """q, k, v (B, H, S, D) as leaves' views: rows of one projection, or one tensor a head."""
    generator = torch.Generator().manual_seed(3)
    if layout == "joined":  # slices of one buffer
        joined = torch.randn(batch, length, 4 * 8 + 2 * 2 * 8, generator=generator).requires_grad_()
        parts = joined.split((32, 16, 16), dim=-1)
        return (joined,), [x.unflatten(-1, (-1, 8)).transpose(1, 2) for x in parts]
    if layout == "heads first":
        leaves = [torch.randn(batch, h, length, 8, generator=generator).requires_grad_() for h in (4, 2, 2)]
        return leaves, leaves
    leaves = [torch.randn(batch, length, h, 8, generator=generator).requires_grad_() for h in (4, 2, 2)]
    return leaves, [x.transpose(1, 2) for x in leaves]


def ours(q, k, v, cu_seqlens, max_seqlen=12):
    return attention_backends.BACKENDS["fa4"].call(q, k, v, cu_seqlens, max_seqlen, 0.3, 5, 0.0)


@pytest.mark.parametrize("layout", ["model", "joined", "heads first"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("way", ["eager", "compiled", "compiled, dynamic", "checkpointed"])
def test_every_layout_every_way(layout: str, batch: int, way: str) -> None:
    cu_seqlens = torch.tensor([0, 4, 12, 12] if batch == 1 else [0, 12, 13, 24], dtype=torch.int32)
    leaves, (q, k, v) = qkv(batch, layout=layout)
    flat = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    expected = fake.attend(*flat, cu_seqlens, 0.3, 5, 0.0).unflatten(0, (batch, 12))
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(4))
    references = torch.autograd.grad(expected, leaves, upstream)

    fake.CALLS.clear()
    fn = {
        "eager": ours,
        "compiled": torch.compile(ours, fullgraph=True, backend="aot_eager"),
        "compiled, dynamic": torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=True),
        "checkpointed": partial(checkpoint, ours, use_reentrant=False),
    }[way]
    leaves, (q, k, v) = qkv(batch, layout=layout)
    out = fn(q, k, v, cu_seqlens)
    assert out.shape == (batch, 12, 4, 8) and out.is_contiguous()
    torch.testing.assert_close(out, expected)
    for gradient, reference in zip(torch.autograd.grad(out, leaves, upstream), references, strict=True):
        torch.testing.assert_close(gradient, reference)
    assert fake.CALLS == {"forward": 2 if way == "checkpointed" else 1, "backward": 1}


def test_the_fakes_have_the_layouts_of_the_op() -> None:
    for layout in ("model", "joined", "heads first"):
        _, tensors = qkv(2, layout=layout)
        arguments = (torch.tensor([0, 24], dtype=torch.int32), 24, 0.3, None, 0.0)
        torch.library.opcheck(torch.ops.chronicals_trl.flash_attn_4.default, (*tensors, *arguments))
        out, lse = torch.ops.chronicals_trl.flash_attn_4(*tensors, *arguments)
        backward = (torch.ones_like(out), *(t.detach() for t in tensors), out.detach(), lse.detach(), *arguments)
        torch.library.opcheck(torch.ops.chronicals_trl.flash_attn_4_backward.default, backward)


def test_torchs_op_is_called_with_arguments_that_it_has() -> None:
    """On meta, where the op of torch has shapes and no kernel: schemas, layouts and both ways of the call."""
    for layout in ("model", "joined", "heads first"):
        leaves, _ = qkv(2, layout=layout)
        on_meta = [x.detach().to("meta", torch.bfloat16).requires_grad_() for x in leaves]
        tensors = on_meta
        if layout == "joined":
            tensors = on_meta[0].split((32, 16, 16), dim=-1)
        if layout != "heads first":
            tensors = [x.reshape(2, 12, -1, 8).transpose(1, 2) for x in tensors]
        cu_seqlens = torch.empty(5, dtype=torch.int32, device="meta")
        call = attention_backends.BACKENDS["varlen"].call
        for fn in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
            out = fn(*tensors, cu_seqlens, 12, 0.3, 4, 0.0)
            assert out.shape == (2, 12, 4, 8) and out.is_contiguous()
            gradients = torch.autograd.grad(out.sum(), on_meta)
            assert [g.shape for g in gradients] == [x.shape for x in on_meta]
    assert attention_backends.BACKENDS["varlen"].missing() is None
    with pytest.raises(NotImplementedError, match="softcap"):
        call(*tensors, cu_seqlens, 12, 0.3, 4, 30.0)


def test_the_deterministic_mode_is_handed_on() -> None:
    for mode in (False, True):
        torch.use_deterministic_algorithms(mode)
        try:
            _, tensors = qkv()
            ours(*tensors, torch.tensor([0, 12], dtype=torch.int32)).sum().backward()
        finally:
            torch.use_deterministic_algorithms(False)
        assert fake.LAST["deterministic"] is mode


# -- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_packed_gradients_equal_the_stock_models(family: str) -> None:
    """Stock attention takes each document apart by a dense mask; Gemma 2 with its cap and its two kinds of layers."""
    batch = tiny_models.packed_batch()
    loss, gradients = step(prepared(family), batch)
    model = on_fa4(family)
    ours, patched = step(model, batch, use_cache=False)
    assert torch.allclose(ours, loss, rtol=1e-5)
    require_same_gradients(patched, gradients)
    assert fake.CALLS == {"forward": 2, "backward": 2}  # one a layer


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "qwen3_moe"])
@pytest.mark.parametrize("way", ["reentrant", "non_reentrant", "selective", "compiled"])
def test_packed_under_checkpointing_and_compile(family: str, way: str) -> None:
    batch = tiny_models.packed_batch()
    _, gradients = step(prepared(family), batch)
    model = on_fa4(family)
    if way == "selective":
        from trl.models import enable_selective_activation_checkpointing

        enable_selective_activation_checkpointing(model)
        model.gradient_checkpointing_enable()
    elif way == "compiled":
        for layer in model.model.layers:
            layer.forward = torch.compile(layer.forward, fullgraph=family != "qwen3_moe", backend="aot_eager")
    else:
        model.gradient_checkpointing_enable({"use_reentrant": way == "reentrant"})
        if way == "reentrant":
            model.enable_input_require_grads()
    require_same_gradients(step(model, batch, use_cache=False)[1], gradients)
    # TRL's selective checkpointing saves what flash attention gives.
    again = 4 if "reentrant" in way else 2
    assert fake.CALLS == {"forward": again, "backward": 2}


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_leak_in_the_kernel_shows_in_the_model(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    model = on_fa4(family)
    assert attention_choice.verify_isolation(model, CPU) is None

    def leaking(*args, **kwargs):
        return fake.forward(*args, **{**kwargs, "cu_seqlens_q": off_by_one(kwargs["cu_seqlens_q"])})

    fake.install(monkeypatch, forward=leaking)
    reason = attention_choice.verify_isolation(model, CPU)
    assert reason is not None and "when packed" in reason


def test_a_packed_batch_is_not_searched_for_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' search waits for the GPU; a batch that gives its documents need not be searched."""
    searched = []
    search = transformers.masking_utils.find_packed_sequence_indices
    monkeypatch.setattr(
        transformers.masking_utils, "find_packed_sequence_indices", lambda ids: searched.append(1) or search(ids)
    )
    batch = tiny_models.packed_batch()
    for family in ("llama", "gemma3"):
        model = on_fa4(family)
        step(model, batch, use_cache=False)
        assert not searched and fake.CALLS["forward"] == 2
        without = {key: value for key, value in batch.items() if "length" not in key and "cu_seq" not in key}
        loss, _ = step(model, without, use_cache=False)
        assert searched and torch.allclose(loss, step(prepared(family), batch)[0], rtol=1e-5)
        unpatch_model(model)
        assert not model.base_model._forward_pre_hooks and not model.base_model._forward_pre_hooks_with_kwargs
        searched.clear()


def test_a_mask_of_the_users_own_goes_before_documents_that_are_told() -> None:
    """A batch that says where its documents lie, and comes with a mask (1, 1, S, S) of another meaning."""
    batch = tiny_models.packed_batch()
    length = batch["input_ids"].shape[1]
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    mask[..., 2:, 1] = False  # nobody looks at the second token
    batch["attention_mask"] = mask
    loss, gradients = step(prepared("llama"), batch, use_cache=False)
    ours, patched = step(on_fa4("llama"), batch, use_cache=False)
    assert not fake.CALLS and torch.allclose(ours, loss, rtol=1e-5)
    require_same_gradients(patched, gradients)


def test_a_chunk_after_a_cache_is_no_packed_row_in_a_model() -> None:
    batch = padded_batch("right")["input_ids"][:1]
    offsets = torch.tensor([0, 5], dtype=torch.int32)
    for model in (prepared("llama").eval(), on_fa4("llama").eval()):
        with torch.no_grad():
            first = model(input_ids=batch[:, :6], use_cache=True)
            second = model(
                input_ids=batch[:, 6:], past_key_values=first.past_key_values, cu_seq_lens_q=offsets, max_length_q=5
            ).logits
            whole = model(input_ids=batch).logits[:, 6:]
        torch.testing.assert_close(second, whole, atol=1e-5, rtol=1e-5)


# -- rows and padded rows --------------------------------------------------------------------------------------------


def padded_batch(side: str):
    """Rows of 11, 4 and 8 tokens, padded to 11."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, tiny_models.VOCAB_SIZE, (3, 11), generator=generator)
    mask = torch.ones_like(ids)
    for row, padding in ((1, 7), (2, 3)):
        mask[row, slice(11 - padding, None) if side == "right" else slice(padding)] = 0
    labels = ids.masked_fill(mask == 0, -100)
    # What stands before a row's first token is padding, and has no output to compare.
    labels[[1, 2], [7, 3]] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3", "qwen3_moe", "gpt2"])
def test_padded_rows(family: str, side: str) -> None:
    batch = padded_batch(side)
    loss, gradients = step(prepared(family), batch)
    model = on_fa4(family)
    assert use_padding(model) and verify_padding(model, CPU) is None
    fake.CALLS.clear()
    ours, patched = step(model, batch)
    assert fake.CALLS == {"forward": 2, "backward": 2}
    assert torch.allclose(ours, loss, rtol=1e-5)
    require_same_gradients(patched, gradients)
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    assert logits.isfinite().all()


def test_padded_rows_of_unknown_masks_take_sdpa() -> None:
    """What looks like padding to us may have holes: without the word of who made it, the mask is read as a mask."""
    batch = padded_batch("right")
    batch["attention_mask"][0, 5] = 0
    batch["labels"][0, 5] = -100
    loss, gradients = step(prepared("llama"), batch)
    model = on_fa4("llama")
    ours, patched = step(model, batch)
    assert not fake.CALLS and torch.allclose(ours, loss, rtol=1e-5)
    require_same_gradients(patched, gradients)
    use_padding(model)
    step(model, padded_batch("right"))
    assert fake.CALLS["forward"] == 2
    assert use_padding(model, trusted=False)
    step(model, padded_batch("right"))
    assert fake.CALLS["forward"] == 2


def test_padding_needs_a_varlen_kernel() -> None:
    model = prepared("llama")
    assert not use_padding(model)
    patch_model(model, {"attention_backend": "sdpa"})
    assert not use_padding(model)


def test_a_kernel_that_mixes_rows_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = on_fa4("llama")
    use_padding(model)

    def mixing(*args, **kwargs):
        last = kwargs["cu_seqlens_q"].clone()
        last[1] = last[2] = last[1] - 1  # the first row's last token opens the second row
        return fake.forward(*args, **{**kwargs, "cu_seqlens_q": last})

    fake.install(monkeypatch, forward=mixing)
    reason = verify_padding(model, CPU)
    assert reason is not None and "when padded" in reason


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
def test_whole_rows(family: str) -> None:
    """Rows without a mask are documents of their own; with gradients, that is: generation keeps to SDPA."""
    ids = padded_batch("right")["input_ids"]
    batch = {"input_ids": ids, "labels": ids}
    _, gradients = step(prepared(family), batch)
    model = on_fa4(family)
    require_same_gradients(step(model, batch)[1], gradients)
    assert fake.CALLS == {"forward": 2, "backward": 2}
    with torch.no_grad():
        model(input_ids=ids)
    assert fake.CALLS["forward"] == 2


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
@pytest.mark.parametrize("padded", [False, True])
def test_generation_is_unchanged(family: str, padded: bool) -> None:
    batch = padded_batch("left")
    mask = batch["attention_mask"] if padded else torch.ones_like(batch["attention_mask"])
    model, reference = on_fa4(family).eval(), prepared(family).eval()
    use_padding(model)
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask}
    ours, theirs = (m.generate(batch["input_ids"], **options) for m in (model, reference))
    assert torch.equal(ours, theirs) and not fake.CALLS


def test_documents_that_are_told_go_before_rows() -> None:
    """With a cache transformers asks for the mask of a whole row; the batch says that there are documents in it."""
    batch = tiny_models.packed_batch()
    loss, _ = step(prepared("llama"), batch, use_cache=False)
    ours, _ = step(on_fa4("llama"), copy.copy(batch), use_cache=True)
    assert torch.allclose(ours, loss, rtol=1e-5) and fake.CALLS["forward"] == 2


def test_a_padding_mask_goes_before_documents_that_are_told() -> None:
    module = torch.nn.Module()
    _, tensors = qkv()
    told = torch.tensor([0, 12], dtype=torch.int32)
    padded, whole = (torch.tensor(x, dtype=torch.int32).view(-1, 1, 1, 1) for x in ([0, 7, 12], [0, 12]))
    plain, _ = FORWARDS["fa4"](module, *tensors, None, cu_seq_lens_q=told)
    masked, _ = FORWARDS["fa4"](module, *tensors, padded, cu_seq_lens_q=told)
    assert not torch.allclose(masked[:, 7:], plain[:, 7:])
    # A whole row says nothing: the documents do.
    apart, _ = FORWARDS["fa4"](module, *tensors, whole, cu_seq_lens_q=padded.view(-1))
    torch.testing.assert_close(apart, masked)


def test_attention_dropout_and_other_dtypes_take_a_mask_of_the_same_rows() -> None:
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 2, True
    _, tensors = qkv(2)
    rows = torch.tensor([0, 5, 12, 24], dtype=torch.int32).view(-1, 1, 1, 1)
    expected, _ = FORWARDS["fa4"](module, *tensors, rows, sliding_window=3)
    assert fake.CALLS["forward"] == 1
    doubled, _ = FORWARDS["fa4"](module, *(x.double() for x in tensors), rows, sliding_window=3)
    torch.testing.assert_close(doubled.float(), expected)
    dropped, _ = FORWARDS["fa4"](module, *tensors, rows, dropout=1e-9, sliding_window=3)
    torch.testing.assert_close(dropped, expected)
    assert fake.CALLS["forward"] == 1


def test_nothing_reads_the_device() -> None:
    """On meta there is nothing to read."""
    mask = torch.empty(3, 8, dtype=torch.bool, device="meta")
    assert attention_rows.cu_seqlens_of_padding(mask).shape == (7,)
    assert attention_rows.cu_seqlens_of_rows(3, 8, "meta").shape == (4,)
    offsets = torch.empty(5, dtype=torch.int32, device="meta")
    assert attention_rows.block_diagonal_mask(offsets, 8, 3, rows=3).shape == (3, 1, 8, 8)


def test_bf16_autocast_reaches_the_kernel() -> None:
    module = torch.nn.Module()
    _, tensors = qkv()
    offsets = torch.tensor([0, 4, 12])  # int64, as a user may pass them
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = FORWARDS["fa4"](module, *tensors, None, cu_seq_lens_q=offsets, max_length_q=8)
    assert out.dtype == torch.bfloat16 and fake.CALLS["forward"] == 1
