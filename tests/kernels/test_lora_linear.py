"""lora_linear against fp64 and against PEFT's own order of operations; what it saves and what it allocates."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from chronicals_trl.kernels._lora_linear import lora_linear, lora_linear_reference, lora_linear_supported

SCALE = 0.7  # not a power of two: a misplaced rounding or a forgotten factor shows
SHAPES = {  # x's leading shape, in, out, rank
    "ragged": ((2, 37), 61, 45, 5),
    "vector": ((), 16, 24, 4),
    "rank above width": ((9,), 6, 5, 8),
}


def make(
    shape=((3, 7), 24, 40, 4), dtype=torch.float32, adapter_dtype=None, magnitude=1.0, bias=True, seed=0, device="cpu"
):
    """x, weight, a, b, bias: all but the weight require gradients."""
    lead, n_in, n_out, rank = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*size, dtype=dtype, std=1.0):
        return (torch.randn(size, generator=generator) * std).to(device, dtype)

    x = draw(*lead, n_in, std=magnitude).requires_grad_()
    weight = draw(n_out, n_in, std=n_in**-0.5)
    a = draw(rank, n_in, dtype=adapter_dtype or dtype, std=n_in**-0.5).requires_grad_()
    b = draw(n_out, rank, dtype=adapter_dtype or dtype, std=rank**-0.5).requires_grad_()
    return x, weight, a, b, draw(n_out).requires_grad_() if bias else None


def run(function, tensors, grad_y=None):
    """Output and gradients of x, a, b and bias, on leaves of their own. The drawn grad_y is exact in every dtype."""
    x, weight, a, b, bias = (None if t is None else t.detach().requires_grad_(t.requires_grad) for t in tensors)
    y = function(x, weight, a, b, SCALE, bias=bias)
    if grad_y is None:
        grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16().half().to(y.device)
    wanted = {n: t for n, t in zip(("x", "a", "b", "bias"), (x, a, b, bias), strict=True) if t is not None}
    grads = torch.autograd.grad(y, list(wanted.values()), grad_y.to(y.dtype))
    return {"y": y.detach(), **{f"grad_{n}": g for n, g in zip(wanted, grads, strict=True)}}


def fp64(tensors):
    return tuple(None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors)


def assert_as_good_as_eager(ours, eager, exact, compute_dtype):
    """DESIGN.md's criterion, elementwise: |ours - fp64| <= 2 |eager - fp64| + eps (|ref| + mean |ref|).

    In fp32 the error is the order of a GEMM's additions, of which eager's happens to hit zero for some elements: there
    its largest error over the tensor stands for each element's.
    """
    assert ours.keys() == eager.keys() == exact.keys()
    eps = torch.finfo(compute_dtype).eps
    for name, ref in exact.items():
        assert ours[name].dtype == eager[name].dtype, name
        error, eager_error = (ours[name].double() - ref).abs(), (eager[name].double() - ref).abs()
        if compute_dtype is torch.float32:
            eager_error = eager_error.max()
        allowed = 2 * eager_error + eps * (ref.abs() + ref.abs().mean())
        assert (error <= allowed).all(), f"{name}: {(error - allowed).max():.3e} above what is allowed"


@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_equal_dtypes(shape, bias, dtype, magnitude):
    tensors = make(shape, dtype, magnitude=magnitude, bias=bias)
    exact = run(lora_linear_reference, fp64(tensors))
    assert_as_good_as_eager(run(lora_linear, tensors), run(lora_linear_reference, tensors), exact, dtype)


def test_fp64_is_exact_and_each_factor_matters():
    tensors = make(dtype=torch.float64)
    ours, reference = run(lora_linear, tensors), run(lora_linear_reference, tensors)
    for name in reference:
        torch.testing.assert_close(ours[name], reference[name], rtol=1e-12, atol=1e-12)
    x, weight, _, _, bias = tensors
    assert not torch.allclose(ours["y"], x @ weight.T + bias, atol=1e-2)  # the adapter contributes


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype, adapter_dtype):
    tensors = make(dtype=dtype, adapter_dtype=adapter_dtype)
    exact = run(lora_linear_reference, fp64(tensors))
    with torch.autocast("cpu", torch.bfloat16):
        ours, eager = run(lora_linear, tensors), run(lora_linear_reference, tensors)
    assert ours["y"].dtype is torch.bfloat16
    assert ours["grad_a"].dtype is ours["grad_b"].dtype is adapter_dtype
    assert_as_good_as_eager(ours, eager, exact, torch.bfloat16)


def test_autocast_leaves_float64_alone():
    tensors = make(dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        ours = run(lora_linear, tensors)
    torch.testing.assert_close(ours["y"], run(lora_linear, tensors)["y"], rtol=0, atol=0)
    assert ours["y"].dtype is torch.float64


@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_adapters_on_a_half_precision_model(dtype, magnitude):
    """PEFT's default. The adapter runs in fp32, so that the gradients of A and B are good to fp32, not to bf16."""
    tensors = make(((4, 33), 96, 80, 16), dtype, torch.float32, magnitude)
    exact = run(lora_linear_reference, fp64(tensors))
    ours, eager = run(lora_linear, tensors), run(lora_linear_reference, tensors)
    for names, compute_dtype in ((("y", "grad_x", "grad_bias"), dtype), (("grad_a", "grad_b"), torch.float32)):
        assert_as_good_as_eager(*({n: r[n] for n in names} for r in (ours, eager, exact)), compute_dtype)
    assert ours["grad_a"].dtype is ours["grad_b"].dtype is torch.float32


def test_backward_inside_an_autocast_region_that_forward_was_not_in():
    x, weight, a, b, bias = make(dtype=torch.float32)
    y = lora_linear(x, weight, a, b, SCALE, bias=bias)
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(y.sum(), (x, a, b), retain_graph=True)
    outside = torch.autograd.grad(y.sum(), (x, a, b))
    for p, q in zip(inside, outside, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)


def test_gradcheck():
    x, weight, a, b, bias = make(((3,), 5, 4, 2), torch.float64)
    assert torch.autograd.gradcheck(
        lambda *t: lora_linear(t[0], weight, t[1], t[2], SCALE, bias=t[3]), (x, a, b, bias)
    )


def test_only_what_is_wanted_gets_a_gradient():
    x, weight, a, b, bias = make()
    a.requires_grad_(False)
    bias.requires_grad_(False)
    x = x.detach()
    lora_linear(x, weight, a, b, SCALE, bias=bias).sum().backward()
    assert b.grad is not None and b.grad.abs().sum() > 0
    assert a.grad is None and bias.grad is None and x.grad is None and weight.grad is None


def test_grad_disabled_saves_nothing():
    tensors = make()
    with torch.no_grad():
        y = lora_linear(*tensors[:4], SCALE, bias=tensors[4])
    assert not y.requires_grad and y.grad_fn is None
    torch.testing.assert_close(y, run(lora_linear, tensors)["y"], rtol=0, atol=0)


@pytest.mark.parametrize("lead", [(0,), (2, 0)])
def test_empty_input(lead):
    result = run(lora_linear, make((lead, 12, 10, 3)))
    assert result["y"].shape == (*lead, 10) and result["grad_x"].shape == (*lead, 12)
    for name in ("grad_a", "grad_b", "grad_bias"):
        assert (result[name] == 0).all(), name


def test_strided_input_and_expanded_gradient():
    x, weight, a, b, bias = make(((6, 5), 24, 40, 4), torch.float64)
    strided = x.detach().transpose(0, 1).requires_grad_()
    assert not strided.is_contiguous()
    grad_y = torch.ones(1, 1, 1, dtype=torch.float64).expand(5, 6, 40)  # what sum().backward() sends
    tensors = (strided, weight, a, b, bias)
    ours, reference = run(lora_linear, tensors, grad_y), run(lora_linear_reference, tensors, grad_y)
    for name in reference:
        torch.testing.assert_close(ours[name], reference[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant):
    x, weight, a, b, bias = make()
    grads = []
    for checkpointed in (False, True):

        def block(x):
            return lora_linear(torch.tanh(x), weight, a, b, SCALE, bias=bias).square()

        y = checkpoint(block, x, use_reentrant=use_reentrant) if checkpointed else block(x)
        for t in (x, a, b, bias):
            t.grad = None
        y.sum().backward()
        grads.append([t.grad.clone() for t in (x, a, b, bias)])
    for p, q in zip(*grads, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_without_a_break(autocast, dynamic):
    torch._dynamo.reset()
    tensors = make()
    compiled = torch.compile(lora_linear, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        eager, ours = run(lora_linear, tensors), run(compiled, tensors)
    for name in eager:
        # aot_eager runs the same GEMMs; under autocast it may keep a bf16 sum's fp32 intermediate
        tolerance = torch.finfo(torch.bfloat16).eps if autocast else 1e-6
        torch.testing.assert_close(ours[name], eager[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("dtype", "autocast", "saved_dtypes"),
    [
        (torch.float32, False, (torch.float32, torch.float32)),
        (torch.bfloat16, False, (torch.bfloat16, torch.float32)),  # fp32 adapters: PEFT keeps an fp32 copy of x
        (torch.float32, True, (torch.bfloat16, torch.bfloat16)),  # fp32 weights: eager keeps a bf16 copy of each
    ],
)
def test_saves_x_and_the_rank_sized_product_only(dtype, autocast, saved_dtypes):
    x, weight, a, b, bias = make(((8, 16), 64, 96, 4), dtype, torch.float32)
    parameters = {t.data_ptr() for t in (weight, a, b, bias)}
    saved = {}

    def pack(tensor):
        if tensor.data_ptr() not in parameters:
            saved[tensor.data_ptr()] = (tensor.numel(), tensor.dtype)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", enabled=autocast):
        y = lora_linear(x, weight, a, b, SCALE, bias=bias)
    assert y.requires_grad
    assert len(saved) == 2
    assert set(saved.values()) == {(128 * 64, saved_dtypes[0]), (128 * 4, saved_dtypes[1])}


class _Allocations(TorchDispatchMode):
    """Element counts of the tensors that operations return in storage of their own."""

    def __init__(self):
        super().__init__()
        self.sizes, self.kept = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in inputs:
            self.sizes.append(result.numel())
            self.kept.append(result)  # or its address would be given out again
        return result


def test_one_full_size_allocation_a_pass():
    x, weight, a, b, _ = make(((128,), 64, 96, 4), bias=False)
    full_size = 128 * 64  # the smaller of x and y
    with _Allocations() as forward:
        y = lora_linear(x, weight, a, b, SCALE)
    assert [n for n in forward.sizes if n >= full_size] == [128 * 96]
    grad_y = torch.randn_like(y)
    with _Allocations() as backward:
        torch.autograd.grad(y, (x, a, b), grad_y)
    assert [n for n in backward.sizes if n >= full_size] == [128 * 64]


def test_second_derivative_is_refused():
    x, weight, a, b, _ = make()
    (grad_a,) = torch.autograd.grad(lora_linear(x, weight, a, b, SCALE).square().sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad_a.sum().backward()


def test_trainable_weight_is_refused():
    x, weight, a, b, _ = make()
    weight.requires_grad_()
    assert not lora_linear_supported(x, weight, a, b)
    with pytest.raises(ValueError, match=r"weight requires a gradient.*requires_grad_\(False\)"):
        lora_linear(x, weight, a, b, SCALE)


def test_dtypes_that_would_change_the_numbers_are_refused():
    for dtype, adapter_dtype in [(torch.float16, torch.bfloat16), (torch.float32, torch.bfloat16)]:
        x, weight, a, b, _ = make(dtype=dtype, adapter_dtype=adapter_dtype)
        assert not lora_linear_supported(x, weight, a, b)
        with pytest.raises(TypeError, match=f"x is {dtype}.*a {adapter_dtype}.*autocast"):
            lora_linear(x, weight, a, b, SCALE)
        with torch.autocast("cpu", torch.bfloat16):
            assert lora_linear_supported(x, weight, a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.zeros(40, 4)}, r"a has shape \(40, 4\)"),
        ({"b": torch.zeros(4, 40)}, r"b has shape \(4, 40\).*need \(40, 4\)"),
        ({"bias": torch.zeros(24)}, r"bias has shape \(24,\).*need \(40,\)"),
        ({"x": torch.zeros(3, 40)}, r"x has shape \(3, 40\).*24"),
        ({"weight": torch.zeros(0)}, r"weight, a and b must be matrices.*gathered"),
    ],
)
def test_shapes_that_do_not_fit(change, message):
    arguments = dict(zip(("x", "weight", "a", "b", "bias"), make(), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        lora_linear(scale=SCALE, **arguments)


def test_scale_must_be_a_number():
    x, weight, a, b, _ = make()
    with pytest.raises(TypeError, match=r"scale must be a number, got Tensor"):
        lora_linear(x, weight, a, b, torch.tensor(1.0))
