"""Every varlen back end on a GPU, through the function that transformers calls.

flash-attn-4 compiles each combination of head dimension, window and grouping when it is first met, some seconds each.
What is marked slow are more of these; `-m "not slow"` leaves them out.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import replace

import pytest
import tiny_models
import torch
import torch.nn.functional as F
import waits
from torch import Tensor, nn
from trl.trainer.utils import add_fused_lm_head

from chronicals_trl import kernels, patch_model
from chronicals_trl.model import attention_choice, attention_fa4
from chronicals_trl.model.attention import FORWARDS, use_padding
from chronicals_trl.model.attention_backends import BACKENDS, unavailable
from chronicals_trl.model.attention_choice import verify_backend, verify_isolation, verify_padding
from chronicals_trl.model.attention_rows import block_diagonal_mask, cu_seqlens_of_padding

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

DEVICE = torch.device("cuda", 0)
KV_HEADS = 2
# Longer than any tile, shorter than any, of one token; two empty ones at the end.
LENGTHS = (300, 7, 1, 129, 75, 0, 0)
TOKENS = sum(LENGTHS)
MAX_SEQLEN = 512
EPS = torch.finfo(torch.bfloat16).eps


@pytest.fixture(params=[*BACKENDS])
def backend(request: pytest.FixtureRequest) -> str:
    require(request.param)
    return request.param


def require(name: str) -> None:
    reason = unavailable(BACKENDS[name], DEVICE)
    if reason is not None:
        pytest.skip(reason)


def offsets_of(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)


def qkv(
    head_dim: int, groups: int, *, batch: int = 1, length: int = TOKENS, seed: int = 0
) -> tuple[list[Tensor], Tensor]:
    """Leaves q, k, v (B, H, S, D) over (B, S, H, D), and the gradient of the output."""
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def normal(heads: int) -> Tensor:
        values = torch.randn(batch, length, heads, head_dim, generator=generator, device=DEVICE)
        return values.to(torch.bfloat16)

    leaves = [normal(heads).transpose(1, 2).requires_grad_() for heads in (groups * KV_HEADS, KV_HEADS, KV_HEADS)]
    return leaves, normal(groups * KV_HEADS)


def call(backend: str, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, **options) -> Tensor:
    mask = torch.empty(1, 1, 0, 0, dtype=torch.bool, device=DEVICE)
    return FORWARDS[backend](
        nn.Module(), q, k, v, mask, scaling=1.1 * q.shape[-1] ** -0.5, cu_seq_lens_q=offsets,
        max_length_q=MAX_SEQLEN, **options,
    )[0]  # fmt: skip


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Eager attention in the dtype of its inputs, its softmax in float32 at least, as transformers has it."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * (1.1 * q.shape[-1] ** -0.5)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))
    return (weights.to(q.dtype) @ v).transpose(1, 2)


def by_documents(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], window: int | None) -> Tensor:
    parts = []
    for q_1HSD, k_1HSD, v_1HSD in zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True):
        length = q_1HSD.shape[2]
        if length:
            i = torch.arange(length, device=DEVICE)
            distance = i[:, None] - i[None, :]
            mask = (distance >= 0) & (distance < (window or length))
            parts.append(plain(q_1HSD, k_1HSD, v_1HSD, mask))
    return torch.cat(parts, dim=1)


def evaluate(out: Tensor, leaves: list[Tensor], grad: Tensor) -> list[Tensor]:
    gradients = torch.autograd.grad(out, leaves, grad.to(out.dtype))
    return [x.detach().double() for x in (out, *gradients)]


def require_close(ours: list[Tensor], eager: list[Tensor], exact: list[Tensor]) -> None:
    """Within twice eager's own error, by norm and at the worst element."""
    for name, mine, theirs, reference in zip(("out", "dq", "dk", "dv"), ours, eager, exact, strict=True):
        assert mine.isfinite().all(), name
        for size in (torch.linalg.vector_norm, lambda x: x.abs().max()):
            error, allowed = size(mine - reference), 2 * size(theirs - reference) + EPS * size(reference)
            assert error <= allowed, f"{name}: {error:.3e} > {allowed:.3e}"


def references(leaves: list[Tensor], grad: Tensor, window: int | None) -> tuple[list[Tensor], list[Tensor]]:
    """Document by document: eager in bf16, and in fp64."""
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        own = [x.detach().to(dtype).requires_grad_() for x in leaves]
        found.append(evaluate(by_documents(*own, LENGTHS, window), own, grad))
    return found[0], found[1]


# -- exact -----------------------------------------------------------------------------------------------------------

# Each head dimension and each grouping at least once; the rest is slow.
QUICK = {(64, 7, None), (96, 1, None), (128, 4, None), (256, 4, None), (64, 7, 128), (128, 4, 128), (256, 4, 128)}
SHAPES = [
    pytest.param(head_dim, groups, window, marks=[] if (head_dim, groups, window) in QUICK else [pytest.mark.slow])
    for head_dim in (64, 96, 128, 256)
    for groups in (1, 4, 7)
    for window in (None, 128)
]


@pytest.mark.parametrize(("head_dim", "groups", "window"), SHAPES)
def test_outputs_and_gradients(backend: str, head_dim: int, groups: int, window: int | None) -> None:
    leaves, grad = qkv(head_dim, groups)
    eager, exact = references(leaves, grad, window)
    for _ in range(2):  # the second call of a kind goes to flash-attn-4's kernel by itself
        ours = call(backend, *leaves, offsets_of(LENGTHS), sliding_window=window)
        require_close(evaluate(ours, leaves, grad), eager, exact)


def test_flash_attn_4s_kernel_is_called_by_itself() -> None:
    """Its cache of compiled kernels is where it is looked for, and what it calls can be told."""
    require("fa4")
    leaves, _ = qkv(128, 4)
    with torch.no_grad():
        first = call("fa4", *leaves, offsets_of(LENGTHS))
        assert any(replay is not None for replay in attention_fa4._replays.values())
        assert torch.equal(call("fa4", *leaves, offsets_of(LENGTHS)), first)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(14, 2, 64), (32, 8, 128), (8, 2, 256)])
@pytest.mark.parametrize("window", [None, 128])
def test_verification_passes(backend: str, heads: int, kv_heads: int, head_dim: int, window: int | None) -> None:
    options = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "window": window, "device": DEVICE}
    assert verify_backend(backend, **options) is None


def test_the_comparison_sees_a_leak(backend: str) -> None:
    """An off-by-one in cu_seqlens, and no documents at all, are far outside of what passes above."""
    leaves, grad = qkv(128, 4)
    eager, exact = references(leaves, grad, None)
    wrong = offsets_of(LENGTHS)
    wrong[1] += 1
    for offsets in (wrong, wrong[[0, -1]]):
        ours = evaluate(
            FORWARDS[backend](
                nn.Module(), *leaves, torch.empty(1, 1, 0, 0, dtype=torch.bool, device=DEVICE),
                scaling=1.1 * 128**-0.5, cu_seq_lens_q=offsets, max_length_q=TOKENS,
            )[0], leaves, grad,
        )  # fmt: skip
        with pytest.raises(AssertionError):
            require_close(ours, eager, exact)


def test_softcap(backend: str) -> None:
    if not BACKENDS[backend].softcap:
        pytest.skip("has none")
    # Gemma 2's.
    reason = verify_backend(backend, heads=8, kv_heads=4, head_dim=256, window=None, device=DEVICE, softcap=50.0)
    if reason is not None:  # then the model's eager attention is kept, which is right, but is to be known
        pytest.xfail(reason)


@pytest.mark.parametrize("softcap", [False, True])
def test_verification_catches_a_planted_error(monkeypatch: pytest.MonkeyPatch, softcap: bool) -> None:
    require("varlen")
    right = BACKENDS["varlen"]

    def wrong(q, k, v, offsets, *rest):
        shifted = offsets.clone()
        shifted[1] += not softcap
        return right.call(q, k, v, shifted, *rest[:-1], 0.0)  # leaves the cap out too

    options = {"heads": 4, "kv_heads": 2, "head_dim": 64, "window": None, "device": DEVICE}
    monkeypatch.setattr(attention_choice, "_verified", {})
    assert verify_backend("varlen", **options) is None
    monkeypatch.setattr(attention_choice, "_verified", {})
    monkeypatch.setitem(BACKENDS, "varlen", replace(right, call=wrong))
    assert verify_backend("varlen", **options, softcap=30.0 if softcap else None) is not None


# -- padded rows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_rows(backend: str, side: str) -> None:
    lengths, length = (200, 131, 64, 0), 200
    mask = torch.zeros(4, length, dtype=torch.bool, device=DEVICE)
    for row, real in enumerate(lengths):
        mask[row, slice(real) if side == "right" else slice(length - real, None)] = True
    leaves, grad = qkv(128, 4, batch=4, length=length)
    grad = grad * mask[:, :, None, None]  # no loss on padding
    rows = cu_seqlens_of_padding(mask).view(-1, 1, 1, 1)
    out, _ = FORWARDS[backend](nn.Module(), *leaves, rows, scaling=1.1 * 128**-0.5)
    assert out.isfinite().all()
    ours = evaluate(out * mask[:, :, None, None], leaves, grad)

    dense = mask[:, None, None, :] & torch.ones(length, length, dtype=torch.bool, device=DEVICE).tril()
    dense = dense | torch.eye(length, dtype=torch.bool, device=DEVICE)  # a row of padding has to see something
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        own = [x.detach().to(dtype).requires_grad_() for x in leaves]
        found.append(evaluate(plain(*own, dense) * mask[:, :, None, None], own, grad))
    require_close(ours, *found)


# -- determinism, compile, capture, syncs ----------------------------------------------------------------------------


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def test_deterministic_gradients_twice(backend: str) -> None:
    # Several blocks of keys for each of queries, and heads in groups: what a sum in any order would show in.
    lengths = (2048, 1500, 548)
    leaves, grad = qkv(64, 7, length=sum(lengths))
    mask = torch.empty(1, 1, 0, 0, dtype=torch.bool, device=DEVICE)

    def once() -> list[Tensor]:
        out, _ = FORWARDS[backend](
            nn.Module(), *leaves, mask, cu_seq_lens_q=offsets_of(lengths), max_length_q=max(lengths)
        )
        return evaluate(out, leaves, grad)

    with deterministic():
        first = once()
        for _ in range(4):
            assert all(map(torch.equal, first, once()))


@pytest.mark.parametrize("name", ["fa4", "varlen"])
def test_compiled_without_a_break(name: str) -> None:
    require(name)
    torch._dynamo.reset()
    offsets = offsets_of(LENGTHS)
    generator = torch.Generator(DEVICE).manual_seed(0)
    weight = torch.randn((14 + 2 + 2) * 64, 14 * 64, generator=generator, device=DEVICE).to(torch.bfloat16) / 30

    def block(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        q, k, v = F.linear(x, weight).unflatten(-1, (18, 64)).transpose(1, 2).split((14, 2, 2), dim=1)
        out = call(name, q, k, v, offsets)
        return x + out.flatten(2)

    x = torch.randn(1, TOKENS, 14 * 64, generator=generator, device=DEVICE).to(torch.bfloat16)
    results = []
    for fn in (block, torch.compile(block, fullgraph=True, dynamic=False)):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        kernels.LAUNCHES.clear()
        out = fn(*leaves, offsets)
        results.append([out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)])
        assert sum(kernels.LAUNCHES.values()) == 2
    for eager, compiled in zip(*results, strict=True):
        error = (eager.double() - compiled.double()).norm() / eager.double().norm()
        assert error < 4 * EPS


def test_captured_and_replayed_with_other_documents(backend: str) -> None:
    """Same shapes, other lengths: forward and backward in one CUDA graph."""
    static, grad = qkv(128, 4)
    offsets = offsets_of(LENGTHS)

    def step() -> list[Tensor]:
        out = call(backend, *static, offsets)
        return [out, *torch.autograd.grad(out, static, grad)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        captured = step()
    for seed, lengths in ((1, (100, 200, 100, 50, 31, 31, 0)), (2, (1, 1, 510, 0, 0, 0, 0)), (3, LENGTHS)):
        fresh, _ = qkv(128, 4, seed=seed)
        with torch.no_grad():
            for mine, new in zip(static, fresh, strict=True):
                mine.copy_(new)
            offsets.copy_(offsets_of(lengths))
        graph.replay()
        torch.cuda.synchronize()
        own = [x.detach().double().requires_grad_() for x in fresh]
        exact = evaluate(by_documents(*own, lengths, None), own, grad)
        for mine, reference in zip(captured, exact, strict=True):
            assert (mine.double() - reference).norm() / reference.norm() < 4 * EPS


def test_a_call_waits_for_nothing(backend: str) -> None:
    leaves, grad = qkv(64, 7)
    offsets = offsets_of(LENGTHS)
    padded, padded_grad = qkv(64, 7, batch=3, length=160)
    mask = torch.arange(160, device=DEVICE)[None] < torch.tensor([[160], [70], [1]], device=DEVICE)

    def step() -> None:
        torch.autograd.grad(call(backend, *leaves, offsets), leaves, grad)
        rows = cu_seqlens_of_padding(mask).view(-1, 1, 1, 1)
        out, _ = FORWARDS[backend](nn.Module(), *padded, rows)
        torch.autograd.grad(out, padded, padded_grad)

    step()  # compiles
    with waits.refused():
        step()


# -- models ----------------------------------------------------------------------------------------------------------

HEADS = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}  # four heads of 64, two for keys and values


def prepared(family: str, dtype: torch.dtype, backend: str | None, **options) -> nn.Module:
    model = tiny_models.build(family, **HEADS, **options).to(DEVICE, dtype)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    if backend is not None:
        report = patch_model(model, {"attention_backend": BACKENDS[backend].label})
        assert report["attention"].state == "on", report.render()
    return model


def step(model: nn.Module, batch: dict, **options) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    outputs = model(**copy.copy(batch), fused_lm_head=True, use_cache=False, **options)
    (-outputs.log_probs.float().sum() / outputs.label_mask.sum()).backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def on_gpu(batch: dict) -> dict:
    return {key: value.to(DEVICE) if torch.is_tensor(value) else value for key, value in batch.items()}


def padded_batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, tiny_models.VOCAB_SIZE, (3, 150), generator=generator)
    mask = (torch.arange(150)[None] < torch.tensor([[150], [40], [131]])).long()
    return on_gpu({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})


@pytest.mark.parametrize("kind", ["packed", "padded", "checkpointed", "selective", "compiled"])
def test_a_model(kind: str) -> None:
    """Llama with a back end's kernel in every way that a model is trained in, against fp32 and bf16 stock."""
    name = next((name for name in BACKENDS if unavailable(BACKENDS[name], DEVICE) is None), None)
    if name is None:
        pytest.skip("no varlen kernel here")
    batch = padded_batch() if kind == "padded" else on_gpu(tiny_models.packed_batch((97, 61, 33, 5, 160)))
    exact = step(prepared("llama", torch.float32, None), batch)
    eager = step(prepared("llama", torch.bfloat16, None), batch)
    model = prepared("llama", torch.bfloat16, name)
    assert verify_isolation(model, DEVICE) is None
    if kind == "padded":
        assert use_padding(model) and verify_padding(model, DEVICE) is None
    elif kind == "checkpointed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    elif kind == "selective":
        from trl.models import enable_selective_activation_checkpointing

        enable_selective_activation_checkpointing(model)
        model.gradient_checkpointing_enable()
    elif kind == "compiled":
        torch._dynamo.reset()
        for layer in model.model.layers:
            layer.forward = torch.compile(layer.forward, fullgraph=True, backend="aot_eager")
    kernels.LAUNCHES.clear()
    ours = step(model, batch)
    op = {"fa4": "flash_attn_4", "varlen": "flash_attn_varlen"}.get(name)
    if op is not None:
        # What selective checkpointing saves is not computed again.
        assert kernels.LAUNCHES[op] == (4 if kind == "checkpointed" else 2)
        assert kernels.LAUNCHES[f"{op}_backward"] == 2
    for parameter, reference in exact.items():
        allowed = 2 * (eager[parameter] - reference).norm() + EPS * reference.norm()
        assert (ours[parameter] - reference).norm() <= allowed, parameter


@pytest.mark.parametrize("kind", ["packed", "padded"])
def test_a_forward_pass_of_a_model_waits_for_nothing(kind: str) -> None:
    """From the batch to the last layer; the head's own counts are another test's matter."""
    name = next((name for name in BACKENDS if unavailable(BACKENDS[name], DEVICE) is None), None)
    if name is None:
        pytest.skip("no varlen kernel here")
    model = prepared("llama", torch.bfloat16, name)
    batch = padded_batch() if kind == "padded" else on_gpu(tiny_models.packed_batch((97, 61, 33, 5, 160)))
    if kind == "padded":
        assert use_padding(model)
    del batch["labels"]

    def forward() -> None:
        model.model(**copy.copy(batch), use_cache=False).last_hidden_state.float().sum().backward()

    forward()
    with waits.refused():
        forward()


def test_the_mask_of_the_fallback_is_that_of_the_kernel() -> None:
    """fp32 rows take SDPA with a mask; the kernel on the same rows in bf16 gives the same."""
    require("varlen")
    leaves, _ = qkv(64, 4)
    offsets = offsets_of(LENGTHS)
    with torch.no_grad():
        kernel = call("varlen", *leaves, offsets, sliding_window=50)
        module = nn.Module()
        module.num_key_value_groups, module.is_causal = 4, True
        mask = block_diagonal_mask(offsets, TOKENS, 50)
        dense, _ = FORWARDS["blockwise"](module, *(x.float() for x in leaves), mask, scaling=1.1 * 64**-0.5)
    assert (kernel.float() - dense).norm() / dense.norm() < 4 * EPS
