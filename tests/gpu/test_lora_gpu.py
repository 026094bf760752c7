"""LoRA on a GPU: PEFT's masks to the bit, its numbers, and products in bf16 pieces on the tensor cores."""

from __future__ import annotations

import pytest
import torch
from kernels import test_lora_linears as cases
from kernels.kernel_checks import assert_as_accurate

from chronicals_trl import kernels
from chronicals_trl.kernels import LoraOperands, _lora_core, _wide_products, lora_gated_mlp, lora_linears

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def to_gpu(x, layers):
    def move(t):
        return None if t is None else t.detach().cuda().requires_grad_(t.requires_grad)

    return move(x), [LoraOperands(*map(move, layer[:4]), *layer[4:]) for layer in layers]


def run(function, x, layers):
    torch.cuda.manual_seed(3)
    outputs = function(x, layers)
    wanted = cases.leaves(x, layers)
    grads = torch.autograd.grad([y.square().sum() for y in outputs], list(wanted.values()))
    return {**{f"y{i}": y.detach() for i, y in enumerate(outputs)}, **dict(zip(wanted, grads, strict=True))}


@pytest.mark.parametrize("drawn_in", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(2, 1024, 896), (3, 7, 61), (5, 3, 130), (1, 1)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_the_mask_and_the_generator_are_those_of_nn_dropout(drawn_in, shape, transposed):
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    x = x.transpose(0, 1) if transposed else x
    layer = LoraOperands(x, dropout=0.3, dropout_dtype=drawn_in)
    torch.cuda.manual_seed(5)
    expected = torch.nn.functional.dropout(x.to(drawn_in), 0.3)
    state = torch.cuda.get_rng_state()
    torch.cuda.manual_seed(5)
    dropped, mask, missing = _lora_core._drop(x, x.reshape(-1, shape[-1]), layer)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert torch.equal(mask, (expected != 0).reshape(mask.shape))
    torch.testing.assert_close((dropped.float() * missing).to(x.dtype), expected.to(x.dtype).reshape(mask.shape))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("ranks", [(4, 4, 4), (1, 256, 5), (3, 0, 2)], ids=str)
def test_exact_in_fp64(ranks, dropout):
    x, layers = to_gpu(*cases.make(ranks, (3, 70), 61, dropout=dropout))
    ours, theirs = run(lora_linears, x, layers), run(cases.reference, x, layers)
    for name, ref in theirs.items():
        torch.testing.assert_close(ours[name], ref, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16])
def test_as_good_as_peft_in_bf16(adapters, autocast, dropout):
    """fp32 adapters without autocast are multiplied in pieces: their gradients stay good to about fp32."""
    shapes = ((32, 32, 16), (4, 512), 896, (896, 128, 128))
    x, layers = to_gpu(*cases.make(*shapes, torch.bfloat16, adapters, dropout=dropout))
    # Both from the same upstream gradients, and fp64 from the same masks.
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        ours, eager = run_fixed(lora_linears, x, layers), run_fixed(cases.reference, x, layers)
    masks = draw_masks(x, layers)
    exact = run_fixed(masked(masks), *cases.in_fp64(x, layers))
    pieces = adapters == torch.float32 and not autocast
    assert _wide_products._splits(x, layers[0].a) == (adapters == torch.float32)
    for name, ref in exact.items():
        error, eager_error = (((r[name].double() - ref).norm() / ref.norm()).item() for r in (ours, eager))
        floor = 3e-6 if pieces and name[0] in "ab" and name[1:].isdigit() else 1e-3
        assert error <= 1.2 * eager_error + floor, f"{name}: {error:.1e}, PEFT {eager_error:.1e}"


def draw_masks(x, layers):
    torch.cuda.manual_seed(3)
    return [torch.nn.functional.dropout(x.to(layer.dropout_dtype), layer.dropout) != 0 for layer in layers]


def masked(masks):
    def function(x, layers):
        return tuple(
            torch.nn.functional.linear(x, layer.weight, layer.bias)
            + layer.scale * ((x * mask / (1 - layer.dropout) if layer.dropout else x) @ layer.a.t() @ layer.b.t())
            for layer, mask in zip(layers, masks, strict=True)
        )

    return function


def run_fixed(function, x, layers):
    torch.cuda.manual_seed(3)
    outputs = function(x, layers)
    generator = torch.Generator().manual_seed(1)
    grads_y = [torch.randn(y.shape, generator=generator).bfloat16().to(y) for y in outputs]
    wanted = cases.leaves(x, layers)
    grads = torch.autograd.grad(outputs, list(wanted.values()), grads_y)
    return {**{f"y{i}": y.detach() for i, y in enumerate(outputs)}, **dict(zip(wanted, grads, strict=True))}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("ranks", [(32, 32, 32), (8, 64, 1), (96, 16, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_mlp(ranks, dropout, dtype):
    """Against fp64 from the same masks, by eager's own error; rank 96 goes by GEMMs, the others inside the kernels."""
    options = {"dtype": dtype, "dropout": dropout, "bias": False}
    x, inner = to_gpu(*cases.make(ranks[:2], (3, 333), 896, (1000, 1000), **options))
    _, (down,) = to_gpu(*cases.make(ranks[2:], (1,), 1000, (896,), **options))
    layers = [*inner, down]

    def ours(x, layers):
        return (lora_gated_mlp(x, layers[:-1], layers[-1]),)

    def separate(x, layers, linears=cases.reference):
        gate, up = linears(x, layers[:-1])
        return linears(torch.nn.functional.silu(gate) * up, layers[-1:])

    kernels.LAUNCHES.clear()
    actual = run_fixed(ours, x, layers)
    assert kernels.LAUNCHES["lora_gated_backward"] == (max(ranks) <= 64)
    eager = run_fixed(separate, x, layers)
    masks = iter(draw_mlp_masks(x, layers))
    exact = run_fixed(
        lambda x, ls: separate(x, ls, lambda x, part: masked([next(masks) for _ in part])(x, part)),
        *cases.in_fp64(x, layers),
    )
    for name, ref in exact.items():
        assert_as_accurate(name, actual[name], eager[name], ref, dtype, summed=True)


def draw_mlp_masks(x, layers):
    torch.cuda.manual_seed(3)
    wide = x.new_empty(*x.shape[:-1], layers[-1].weight.shape[1])
    return [
        torch.nn.functional.dropout(torch.ones_like(read, dtype=layer.dropout_dtype), layer.dropout) != 0
        for read, layer in zip((x, x, wide), layers, strict=True)
    ]
