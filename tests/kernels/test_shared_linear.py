"""Linear layers of one input as one autograd node. `test_interpreter.py` runs this file once more, interpreted."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kernels import kernel_checks as check
from torch.utils.checkpoint import checkpoint

from chronicals_trl import kernels
from chronicals_trl.kernels import _common
from chronicals_trl.kernels._shared_linear import column_sums

HALF = torch.float16 if _common.INTERPRET else torch.bfloat16
SHAPE, WIDTHS = (3, 5, 24), (16, 8, 8)


def given(dtype=torch.float32):
    torch.manual_seed(0)
    x, *weights = (torch.randn(*s, dtype=dtype, requires_grad=True) for s in (SHAPE, *((n, 24) for n in WIDTHS)))
    return x, weights, [torch.randn(16, dtype=dtype, requires_grad=True), None, None]


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("biases", [(), (0, 1, 2), (0, 2)], ids=str)
def test_values_and_gradients(dtype, biases):
    check.check_shared_linear("cpu", dtype, SHAPE, WIDTHS, biases=biases)


@pytest.mark.parametrize("outputs", [(0,), (1, 2), (2, 0)], ids=str)
def test_outputs_unused(outputs):
    check.check_shared_linear("cpu", torch.float32, SHAPE, WIDTHS, biases=(0, 1), outputs=outputs)


@pytest.mark.parametrize(
    "frozen",
    [("x",), ("w0", "b0"), ("w0", "w1", "w2"), ("w0", "w1", "w2", "b0", "b1"), ("x", "w1", "b0")],
    ids=" ".join,
)
def test_what_is_frozen_gets_no_gradient(frozen):
    check.check_shared_linear("cpu", torch.float32, SHAPE, WIDTHS, biases=(0, 1), frozen=frozen)


def test_autocast():
    check.check_shared_linear("cpu", torch.float32, SHAPE, WIDTHS, biases=(0, 2), autocast=HALF)


def test_autocast_leaves_float64_alone():
    with torch.autocast("cpu", HALF):
        out = kernels.shared_linear(*given(torch.float64))
    assert all(map(torch.equal, out, kernels.shared_linear(*given(torch.float64))))


def test_backward_inside_an_autocast_region_that_forward_was_not_in():
    x, weights, biases = given()
    out = torch.cat(kernels.shared_linear(x, weights, biases), -1)
    outside = torch.autograd.grad(out.sum(), [x, *weights], retain_graph=True)
    with torch.autocast("cpu", HALF):
        inside = torch.autograd.grad(out.sum(), [x, *weights])
    assert all(map(torch.equal, inside, outside))


def test_float64_gradients():
    x, weights, biases = given(torch.float64)

    def layers(x, bias, *weights):
        return kernels.shared_linear(x[0, :2], weights, [bias, None, None])

    assert torch.autograd.gradcheck(layers, (x, biases[0], *weights))


@pytest.mark.parametrize("lead", [(), (0,), (2, 0)], ids=str)
def test_one_row_and_none(lead):
    _, weights, biases = given()
    x = torch.randn(*lead, 24, requires_grad=True)
    out = kernels.shared_linear(x, weights, biases)
    assert [o.shape for o in out] == [(*lead, n) for n in WIDTHS]
    grads = torch.autograd.grad(sum(o.sum() for o in out), [x, *weights])
    assert [g.shape for g in grads] == [x.shape, *((n, 24) for n in WIDTHS)]


def test_keeps_the_input_and_the_weights_alone():
    x, weights, biases = given()
    kept = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.add(t.data_ptr()) or t, lambda t: t):
        kernels.shared_linear(x, weights, biases)
    assert kept == {t.data_ptr() for t in (x, *weights)}


def test_strided_input():
    x, weights, biases = given()
    strided = x.detach().transpose(0, 1).requires_grad_()
    out = kernels.shared_linear(strided, weights, biases)
    eager = [F.linear(strided, w, b) for w, b in zip(weights, biases, strict=True)]
    torch.testing.assert_close(out, tuple(eager))
    ours, theirs = (torch.autograd.grad(sum(o.square().sum() for o in r), strided) for r in (out, eager))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


def wrap(kind):
    if kind == "compiled":
        torch._dynamo.reset()
        return torch.compile(kernels.shared_linear, fullgraph=True, backend="aot_eager")
    if kind == "checkpointed":
        return lambda *args: checkpoint(kernels.shared_linear, *args, use_reentrant=False)
    return kernels.shared_linear


@pytest.mark.parametrize("kind", ["twice", "compiled", "checkpointed"])
def test_wrapped(kind):
    x, weights, biases = given()
    wanted = [x, *weights, biases[0]]
    loss, plain = (sum(o.square().sum() for o in op(x, weights, biases)) for op in (wrap(kind), kernels.shared_linear))
    first = torch.autograd.grad(loss, wanted, retain_graph=True)
    if kind == "twice":
        assert all(map(torch.equal, first, torch.autograd.grad(loss, wanted)))
    torch.testing.assert_close(first, torch.autograd.grad(plain, wanted), rtol=1e-5, atol=1e-5)


def test_a_second_derivative_is_refused():
    """The bias's part of it would be lost in silence: a kernel adds that gradient up."""
    x, weights, biases = given()
    (grad,) = torch.autograd.grad(kernels.shared_linear(x, weights, biases)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 130), (700, 40), (300, 257), (5, 600)], ids=str)
@pytest.mark.parametrize("layout", ["plain", "columns", "one row", "transposed"])
def test_column_sums(dtype, shape, layout):
    _common.LAUNCHES.clear()
    torch.manual_seed(0)
    x = torch.randn(shape[0], shape[1] + 3).to(dtype)
    x = {
        "plain": lambda: x.clone()[:, 3:].contiguous(),
        "columns": lambda: x[:, 3:],
        "one row": lambda: x[:1, 3:].expand(shape),
        "transposed": lambda: x[:, 3:].t().contiguous().t(),
    }[layout]()
    ours = column_sums(x)
    assert ours.dtype == dtype
    check.assert_as_accurate("column_sums", ours, x.sum(0), x.double().sum(0), dtype)
    by_kernel = _common.INTERPRET and x.stride(-1) == 1
    assert _common.LAUNCHES == ({"column_sums": 1} if by_kernel else {})


def test_meta_tensors():
    """What shape inference and meta-device loading run on; it has no autocast to ask about."""
    x, weights, biases = (
        [t if t is None else t.detach().to("meta") for t in ts] for ts in ([given()[0]], *given()[1:])
    )
    assert [o.shape for o in kernels.shared_linear(x[0], weights, biases)] == [(*SHAPE[:-1], n) for n in WIDTHS]


def test_as_many_biases_as_weights():
    x, weights, biases = given()
    with pytest.raises(ValueError, match="3 weights and 2 biases; give None"):
        kernels.shared_linear(x, weights, biases[:2])
