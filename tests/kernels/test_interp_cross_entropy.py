"""The kernels of the linear cross-entropy through Triton's interpreter; `test_interpreter.py` starts this file."""

from __future__ import annotations

import pytest
import torch
from kernels import kernel_checks as check

from chronicals_trl.kernels import LAUNCHES, _common, linear_cross_entropy, linear_cross_entropy_reference
from chronicals_trl.kernels import _cross_entropy_chunks as chunks
from chronicals_trl.kernels import _cross_entropy_pass as kernel_pass

pytestmark = pytest.mark.skipif(not _common.INTERPRET, reason="needs TRITON_INTERPRET=1 from the start")

SHAPE = (5, 3, 101)
DTYPES = [torch.float32, torch.float16]
PASSES = {"chunks": ["softmax_pass"], "tiles": ["fold_pass", "gradient_pass"]}


@pytest.fixture(params=PASSES, autouse=True)
def cut(request, monkeypatch):
    """Chunks of four tokens, or tiles of 40 columns; and groups so few that a row has several tiles of its own."""
    tiles = request.param == "tiles"
    monkeypatch.setattr(
        chunks, "plan", lambda n, vocab, *_, **__: chunks.Plan(n, min(40, vocab)) if tiles else chunks.Plan(4, vocab)
    )
    # Of 32 columns in float16, 16 in float32: tiles to hold, tiles to read again, and one that the row ends in.
    monkeypatch.setattr(kernel_pass, "_SHORT_GROUPS", 4)
    monkeypatch.setattr(kernel_pass, "_SHORT_HELD", 2)
    for launch in (kernel_pass._softmax_launch, kernel_pass._fold_launch, kernel_pass._gradient_launch):
        launch.cache_clear()
    LAUNCHES.clear()
    yield request.param
    for name in PASSES[request.param]:
        assert LAUNCHES[name] > 0, f"{name} was not launched"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"scale": 1e-3},
        {"scale": 1e3},
        {"ignored": 1.0},
        {"huge": True},
        {"bias": True, "logit_scale": 0.25, "softcap": 3.0},
        {"weighting": "dft", "softcap": 2.0},
        {"weighting": "dft", "z_loss": 0.01},
        {"reduction": "none", "weighting": "dft", "z_loss": 0.01, "logit_scale": 2.0},
        {"parts": ["entropy"], "softcap": 3.0, "logit_scale": 2.0},
        {"parts": ["loss", "log_probs", "entropy"], "bias": True, "differentiate": "tokens"},
        {"differentiate": "loss", "num_items": torch.tensor(7)},
    ],
    ids=str,
)
def test_interp_options(dtype, options):
    check.check_linear_cross_entropy("cpu", dtype, SHAPE, **options)


@pytest.mark.parametrize("vocab", [41, 64, 99, 128, 130])
def test_interp_vocabularies(vocab):
    """Rows that end with a tile, in a tile, and before the tiles to hold."""
    check.check_linear_cross_entropy("cpu", torch.float16, (5, 3, vocab))


def test_interp_the_first_of_equal_maxima_is_top1():
    hidden, weight = torch.ones(4, 1).half().requires_grad_(), torch.ones(101, 1).half()
    out = linear_cross_entropy(hidden, weight, torch.tensor([0, 1, 77, -100]), differentiate="tokens")
    assert out.is_top1.tolist() == [True, False, False, False]
    weight[50], weight[90] = 2, 2
    assert linear_cross_entropy(hidden, weight, torch.tensor([0, 50, 90, 50])).is_top1.tolist() == [
        False, True, False, True,
    ]  # fmt: skip


def test_interp_what_is_ignored_is_not_read():
    hidden, weight, _, labels = check.ce_inputs("cpu", torch.float16, *SHAPE, ignored=0.0)
    labels[4] = -100
    with torch.no_grad():
        hidden[4] = float("nan")
    out = linear_cross_entropy(hidden, weight, labels)
    (grad,) = torch.autograd.grad(out.loss, hidden)
    assert out.loss.isfinite() and grad.isfinite().all()
    assert torch.equal(grad[4], torch.zeros(SHAPE[1]).half())
    assert out.log_probs[4] == out.entropy[4] == 0


def test_interp_a_label_beyond_the_vocabulary_is_nan_and_nothing_else():
    hidden, weight, _, labels = check.ce_inputs("cpu", torch.float16, *SHAPE, ignored=0.0)
    labels[3] = 101
    out = linear_cross_entropy(hidden, weight, labels)
    assert out.loss.isnan() and out.log_probs.isnan().tolist() == [i == 3 for i in range(5)]


def test_interp_backward_of_a_scaled_loss():
    hidden, weight, _, labels = check.ce_inputs("cpu", torch.float32, *SHAPE)
    for factor in (1.0, 3.0):
        ours, full = (
            torch.autograd.grad(op(hidden, weight, labels).loss * factor, (hidden, weight))
            for op in (linear_cross_entropy, linear_cross_entropy_reference)
        )
        torch.testing.assert_close(ours, full)
    assert LAUNCHES["scale_unless_one"] == 4


def test_interp_a_second_backward_pass_finds_nothing_scaled():
    """The first one scales the gradients in place and gives them away."""
    hidden, weight, _, labels = check.ce_inputs("cpu", torch.float32, *SHAPE)
    loss = linear_cross_entropy(hidden, weight, labels, z_loss=0.01).loss * 3
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    kept = [grad.clone() for grad in first]
    torch.testing.assert_close(torch.autograd.grad(loss, (hidden, weight)), first)
    assert all(torch.equal(grad, was) for grad, was in zip(first, kept, strict=True))


def test_interp_upstream_gradients_of_any_stride():
    """That of a sum is one number, expanded."""
    hidden, weight, _, labels = check.ce_inputs("cpu", torch.float32, *SHAPE)
    for part in ("log_probs", "entropy"):
        ours, full = (
            torch.autograd.grad(getattr(op(hidden, weight, labels), part).sum(), (hidden, weight))
            for op in (linear_cross_entropy, linear_cross_entropy_reference)
        )
        torch.testing.assert_close(ours, full)


def test_interp_autocast_with_float32_parameters():
    hidden, weight, _, labels = check.ce_inputs("cpu", torch.float32, *SHAPE)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = linear_cross_entropy(hidden, weight, labels).loss
    # A loss scale; the gradients are float32, and what float16 takes from them it takes before that.
    ours = torch.autograd.grad(loss * 2**16, (hidden, weight))
    full = torch.autograd.grad(linear_cross_entropy_reference(hidden, weight, labels).loss * 2**16, (hidden, weight))
    for grad, expected in zip(ours, full, strict=True):
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad, expected, rtol=0, atol=5e-3 * float(expected.abs().max()))
