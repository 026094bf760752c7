"""Linears with adapters that share their input, as one node: PEFT's order of operations one by one in fp64."""

from __future__ import annotations

import pytest
import torch
from kernels.test_lora_linear import _Allocations, assert_as_good_as_eager
from torch.utils.checkpoint import checkpoint

from chronicals_trl.kernels import LoraOperands, _lora_core, _wide_products, lora_linear_reference, lora_linears

SCALES = (0.7, 1.3, 0.45)


def make(
    ranks=(4, 4, 4),
    lead=(3, 7),
    width=24,
    outs=(40, 16, 16),
    dtype=torch.float64,
    adapter_dtype=None,
    dropout=0.0,
    bias=True,
):
    """x and the layers; a rank of 0 is a layer without an adapter."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size, std=1.0, dtype=dtype, grad=True):
        return (torch.randn(size, generator=generator, dtype=torch.float64) * std).to(dtype).requires_grad_(grad)

    dropouts = dropout if isinstance(dropout, tuple) else (dropout,) * len(ranks)
    layers = []
    for rank, n_out, scale, p in zip(ranks, outs, SCALES, dropouts, strict=False):
        weight = draw(n_out, width, std=width**-0.5, grad=False)
        a = b = None
        if rank:
            a = draw(rank, width, std=width**-0.5, dtype=adapter_dtype or dtype)
            b = draw(n_out, rank, std=rank**-0.5, dtype=adapter_dtype or dtype)
        options = {"dropout": p, "dropout_dtype": adapter_dtype or dtype} if rank else {}
        layers.append(LoraOperands(weight, draw(n_out) if bias else None, a, b, scale, **options))
    return draw(*lead, width), layers


def reference(x, layers):
    return tuple(
        torch.nn.functional.linear(x, layer.weight, layer.bias)
        if layer.a is None
        else lora_linear_reference(
            x, layer.weight, layer.a, layer.b, layer.scale, bias=layer.bias, dropout=layer.dropout
        )
        for layer in layers
    )


def leaves(x, layers):
    named = {"x": x}
    for i, layer in enumerate(layers):
        named |= {f"{n}{i}": getattr(layer, n) for n in ("bias", "a", "b") if getattr(layer, n) is not None}
    return {name: t for name, t in named.items() if t.requires_grad}


def run(function, x, layers, used=None):
    torch.manual_seed(3)
    outputs = function(x, layers)
    state = torch.get_rng_state()
    generator = torch.Generator().manual_seed(1)
    grads_y = [torch.randn(y.shape, generator=generator).bfloat16().to(y.dtype) for y in outputs]
    used = range(len(outputs)) if used is None else used
    wanted = leaves(x, layers)
    grads = torch.autograd.grad(
        [outputs[i] for i in used], list(wanted.values()), [grads_y[i] for i in used], allow_unused=True
    )
    named = {f"y{i}": y.detach() for i, y in enumerate(outputs)}
    return named | {f"grad_{n}": g for n, g in zip(wanted, grads, strict=True)}, state


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, ref in theirs.items():
        assert (ours[name] is None) == (ref is None), name
        if ref is not None:
            torch.testing.assert_close(ours[name], ref, rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dropout", [0.0, 0.3, (0.3, 0.0, 0.5)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("ranks", "lead", "width"),
    [
        ((4, 4, 4), (3, 7), 24),
        ((1, 256, 5), (2, 3), 31),  # rank above the width
        ((3, 0, 2), (9,), 17),
        ((0, 0, 4), (), 8),
        ((0, 0, 0), (5,), 8),
        ((64,), (2, 2), 40),
    ],
    ids=str,
)
def test_exact_in_fp64(ranks, lead, width, bias, dropout):
    x, layers = make(ranks, lead, width, dropout=dropout, bias=bias)
    (ours, our_state), (theirs, state) = run(lora_linears, x, layers), run(reference, x, layers)
    assert_same(ours, theirs)
    assert torch.equal(our_state, state)  # as much was drawn


@pytest.mark.parametrize("scales", [(1.5, 1.5), (2.0, 0.3)], ids=str)
@pytest.mark.parametrize(
    ("ranks", "lead", "outs", "taken"),
    [
        ((4, 3), (4, 10), (30, 25), True),
        ((4, 0), (36,), (36,) * 2, False),  # rows of 13
        ((7,), (41,), (40,), True),
        ((4, 3), (35,), (40,) * 2, False),  # too few tokens
        ((4, 3), (40,), (10,) * 2, False),  # narrow outputs
    ],
    ids=str,
)
def test_both_products_with_a_gradient_from_one_reading_of_it(monkeypatch, ranks, lead, outs, taken, scales):
    x, layers = make(ranks, lead, 9, outs)
    layers = [layer._replace(scale=scale) for layer, scale in zip(layers, scales, strict=False)]
    results = []
    original = _lora_core._in_one_pass
    monkeypatch.setattr(_lora_core, "_in_one_pass", lambda *a: results.append(original(*a)) or results[-1])
    assert_same(run(lora_linears, x, layers)[0], run(reference, x, layers)[0])
    assert [result is not None for result in results] == [taken]


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("lead", [(0,), (2, 0)], ids=str)
def test_empty_input(lead, dropout):
    x, layers = make(lead=lead, dropout=dropout)
    (ours, our_state), (theirs, state) = run(lora_linears, x, layers), run(reference, x, layers)
    assert_same(ours, theirs)
    assert torch.equal(our_state, state)


def test_strided_input_has_the_masks_of_its_own_layout():
    x, layers = make(dropout=0.4)
    strided = x.detach().transpose(0, 1).requires_grad_()
    assert_same(run(lora_linears, strided, layers)[0], run(reference, strided, layers)[0])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("used", [(0,), (1, 2), (2,)], ids=str)
def test_an_output_that_nobody_uses(used, dropout):
    x, layers = make(dropout=dropout)
    ours, theirs = run(lora_linears, x, layers, used)[0], run(reference, x, layers, used)[0]
    assert_same(ours, theirs)
    assert sum(g is None for g in theirs.values()) == 3 * (3 - len(used))


@pytest.mark.parametrize(
    "frozen", [("x",), ("a0",), ("b1",), ("a0", "a1", "a2"), ("x", "a0", "b0", "bias2")], ids=" ".join
)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_what_is_frozen_gets_no_gradient(frozen, dropout):
    x, layers = make(dropout=dropout)
    for name in frozen:
        leaves(x, layers)[name].requires_grad_(False)
    ours = run(lora_linears, x, layers)[0]
    assert not {f"grad_{name}" for name in frozen} & ours.keys()
    assert_same(ours, run(reference, x, layers)[0])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision(dtype, dropout):
    x, layers = make(dtype=dtype, dropout=dropout)
    ours, eager = run(lora_linears, x, layers)[0], run(reference, x, layers)[0]
    exact = run(reference, *in_fp64(x, layers))[0] if not dropout else with_masks_of(x, layers)
    assert_as_good_as_eager(ours, eager, exact, dtype)


def in_fp64(x, layers):
    def wide(t):
        return None if t is None else t.detach().double().requires_grad_(t.requires_grad)

    return wide(x), [
        layer._replace(weight=wide(layer.weight), bias=wide(layer.bias), a=wide(layer.a), b=wide(layer.b))
        for layer in layers
    ]


def with_masks_of(x, layers):
    """fp64 with the masks that `x` gets in its own dtype."""
    torch.manual_seed(3)
    masks = [torch.nn.functional.dropout(torch.ones_like(x), layer.dropout) != 0 for layer in layers]

    def function(x, layers):
        return tuple(
            torch.nn.functional.linear(x, layer.weight, layer.bias)
            + layer.scale * (x * mask / (1 - layer.dropout) @ layer.a.t() @ layer.b.t())
            for layer, mask in zip(layers, masks, strict=True)
        )

    return run(function, *in_fp64(x, layers))[0]


def assert_norms(ours, eager, exact):
    """By norm: where several sums are rounded in turn, single elements are by chance in favour of either."""
    for name, ref in exact.items():
        assert ours[name].dtype == eager[name].dtype, name
        error, eager_error = ((r[name].double() - ref).norm() for r in (ours, eager))
        assert error <= 1.2 * eager_error + 1e-3 * ref.norm(), name


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype, dropout):
    x, layers = make(dtype=dtype, adapter_dtype=torch.float32, dropout=dropout)
    with torch.autocast("cpu", torch.bfloat16):
        (ours, our_state), (eager, state) = run(lora_linears, x, layers), run(reference, x, layers)
    assert ours["y0"].dtype is torch.bfloat16 and ours["grad_a1"].dtype is torch.float32
    assert torch.equal(our_state, state)
    exact = run(reference, *in_fp64(x, layers))[0] if not dropout else with_masks_of(x.float(), layers)
    assert_norms(ours, eager, exact)


@pytest.mark.parametrize("way", ["whole", "rows", "pieces"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wide_adapters(dtype, dropout, way, monkeypatch):
    if way == "rows":
        monkeypatch.setattr(_wide_products, "WIDE_ELEMENTS", 100)
    if way == "pieces":  # what runs on a GPU, of bf16 alone
        if dtype != torch.bfloat16:
            return
        in_pieces(monkeypatch)
    x, layers = make((16, 16, 16), (4, 33), 96, dtype=dtype, adapter_dtype=torch.float32, dropout=dropout)
    ours, eager = run(lora_linears, x, layers)[0], run(reference, x, layers)[0]
    exact = run(reference, *in_fp64(x, layers))[0] if not dropout else with_masks_of(x.float(), layers)
    of_adapters = {name for name in exact if name.startswith(("grad_a", "grad_b"))} - {
        f"grad_bias{i}" for i in range(3)
    }
    if way == "pieces" and dropout:
        assert_norms(*({"grad_x": r.pop("grad_x")} for r in (ours, eager, exact)))
    for names, compute_dtype in ((exact.keys() - of_adapters, dtype), (of_adapters, torch.float32)):
        assert_as_good_as_eager(*({n: r[n] for n in names} for r in (ours, eager, exact)), compute_dtype)


def in_pieces(monkeypatch):
    monkeypatch.setattr(_wide_products, "_splits", lambda p, q: (p.dtype, q.dtype) == (torch.bfloat16, torch.float32))


def test_pieces_add_up():
    t = torch.randn(1000) * 10.0 ** torch.randint(-20, 20, (1000,))
    assert torch.equal(sum(p.double() for p in _wide_products._pieces(t, 3)).float(), t)
    assert ((sum(p.double() for p in _wide_products._pieces(t, 2)) - t).abs() <= 2.0**-16 * t.abs()).all()


def test_wide_copies_are_small(monkeypatch):
    monkeypatch.setattr(_wide_products, "WIDE_ELEMENTS", 64 * 8)
    x, layers = make((4,), (64,), 64, (64,), torch.bfloat16, torch.float32)
    with _Allocations() as seen:
        (y,) = lora_linears(x, layers)
        torch.autograd.grad(y, (x, layers[0].a, layers[0].b), torch.ones_like(y))
    full = [t for t in seen.kept if t.numel() >= 64 * 64]
    assert {t.dtype for t in full} == {torch.bfloat16}


def saved_sizes(function, layers):
    """Sizes and dtypes of what is kept besides the layers' own tensors, and what the function returned."""
    saved, own = {}, {t.data_ptr() for layer in layers for t in layer[:4] if t is not None}

    def pack(tensor):
        if tensor.data_ptr() not in own:
            saved[tensor.data_ptr()] = (tensor.numel(), tensor.dtype)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        keep = function()
    return sorted(saved.values(), key=str), keep


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_keeps_x_once_and_masks_of_a_byte(dropout):
    x, layers = make((4, 3, 0), (8, 16), 64, (96, 48, 48), torch.float32, dropout=dropout)
    sizes, _ = saved_sizes(lambda: lora_linears(x, layers), layers)
    n, kept = 128, [(128 * 64, torch.float32)]
    kept += [(n * 7, torch.float32)] if not dropout else [(n * 4, torch.float32), (n * 3, torch.float32)]
    kept += [(n * 64, torch.bool)] * (2 if dropout else 0)
    assert sizes == sorted(kept, key=str)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_full_size_allocations(dropout):
    """Results only; with dropout what the draw needs, and in the backward pass two temporaries for each mask."""
    x, layers = make((4, 4, 4), (128,), 64, (64, 64, 64), torch.float32, dropout=dropout, bias=False)
    with _Allocations() as forward:
        outputs = lora_linears(x, layers)
    full = [t for t in forward.kept if t.numel() >= 128 * 64]
    assert dropout or len(full) == 3
    grads = [torch.randn_like(y) for y in outputs]
    with _Allocations() as backward:
        torch.autograd.grad(outputs, list(leaves(x, layers).values()), grads)
    full = [n for n in backward.sizes if n >= 128 * 64]
    assert len(full) == (1 if not dropout else 1 + 3 + 3)  # of each mask: g A, and the dropped input once more


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_draws_the_same_masks_again(use_reentrant):
    x, layers = make(dropout=0.3)

    def checkpointed(x, layers):
        return checkpoint(lambda x: lora_linears(torch.tanh(x), layers), x, use_reentrant=use_reentrant)

    assert_same(
        run_backward(checkpointed, x, layers), run_backward(lambda x, ls: lora_linears(torch.tanh(x), ls), x, layers)
    )


def run_backward(function, x, layers):
    named = leaves(x, layers)
    for t in named.values():
        t.grad = None
    torch.manual_seed(3)
    sum(y.square().sum() for y in function(x, layers)).backward()
    return {name: t.grad.clone() for name, t in named.items()}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compiles_without_a_break(dropout):
    torch._dynamo.reset()
    x, layers = make(dtype=torch.float32, dropout=dropout)
    compiled = torch.compile(lora_linears, fullgraph=True, backend="aot_eager")
    ours, eager = run(compiled, x, layers)[0], run(lora_linears, x, layers)[0]
    for name, value in eager.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-5)


def test_a_packed_weight_is_unpacked_in_each_pass_and_not_kept():
    x, (layer,) = make((4,), dtype=torch.float32)
    calls = []

    def unpack(packed):
        calls.append(1)
        return packed.float() / 16

    packed = torch.randint(-8, 8, layer.weight.shape, dtype=torch.int8)
    plain = layer._replace(weight=packed.float() / 16)
    quantised = layer._replace(weight=packed, unpack=unpack)
    sizes, _ = saved_sizes(lambda: lora_linears(x, [quantised]), [quantised])
    assert not [s for s in sizes if s[0] == plain.weight.numel()] and len(calls) == 1
    ours, theirs = run(lora_linears, x, [quantised])[0], run(lora_linears, x, [plain])[0]
    assert len(calls) == 3
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=0)


def own_forwards(layers):
    """The layers with a forward of their own, which is not the product with the weight of their backward pass."""

    def give(layer):
        other = layer.weight * 1.5 + 0.1

        def call(x_NI):
            assert x_NI.dim() == 2 and not torch.is_grad_enabled()
            return own(x_NI)

        def own(x):
            bias = None if layer.bias is None else layer.bias.to(x.dtype)
            return torch.nn.functional.linear(x, other.to(x.dtype), bias)

        call.own = own
        return layer._replace(call=call, unpack=lambda weight: weight.clone())

    return [give(layer) for layer in layers]


def own_forward_reference(x, layers):
    """`reference` with the values of the layers' own forwards, and its derivatives."""
    return tuple(
        y + (layer.call.own(x) - torch.nn.functional.linear(x, layer.weight, layer.bias)).detach()
        for y, layer in zip(reference(x, layers), layers, strict=True)
    )


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(3, 7), (5,), (2, 0)], ids=str)
def test_a_layer_with_a_forward_of_its_own(lead, bias, dropout):
    x, layers = make((4, 0, 3), lead, bias=bias, dropout=dropout)
    layers = [*own_forwards(layers[:2]), layers[2]]  # and an ordinary one beside it

    def expected(x, layers):
        return *own_forward_reference(x, layers[:2]), *reference(x, layers[2:])

    assert_same(run(lora_linears, x, layers)[0], run(expected, x, layers)[0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dropout": 1.0}, ValueError, r"dropout is 1.0: it must be in \[0, 1\)"),
        ({"dropout": -0.1}, ValueError, r"dropout is -0.1"),
        ({"b": None}, ValueError, "a and b belong together"),
        ({"scale": True}, TypeError, "scale must be a number, got bool"),
        ({"weight": torch.zeros(40, 24, dtype=torch.int32)}, TypeError, "weight torch.int32"),
    ],
)
def test_bad_operands(change, error, message):
    x, layers = make()
    layers[0] = layers[0]._replace(**change)
    with pytest.raises(error, match=message):
        lora_linears(x, layers)


def test_adapters_of_two_dtypes_are_refused():
    x, layers = make(dtype=torch.bfloat16)
    layers[1] = make(dtype=torch.bfloat16, adapter_dtype=torch.float32)[1][1]
    with pytest.raises(TypeError, match=r"a torch.bfloat16.*a torch.float32"):
        lora_linears(x, layers)


def test_one_reading_of_the_gradient_is_not_for_adapters_of_a_wider_dtype():
    x, layers = make((8,), (4, 10), 8, (40,), dtype=torch.float16, adapter_dtype=torch.float32)
    ours, theirs = (run(function, x, layers)[0] for function in (lora_linears, reference))
    torch.testing.assert_close(ours["grad_x"], theirs["grad_x"], rtol=5e-3, atol=5e-3)
