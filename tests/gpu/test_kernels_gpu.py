"""The Triton kernels on a GPU, by the checks that the CPU tests use, at model shapes and in every dtype."""

from __future__ import annotations

import gc
import math

import pytest
import torch
import waits
from kernels import kernel_checks as check

from chronicals_trl import kernels
from chronicals_trl.kernels import _cross_entropy_chunks as chunks
from chronicals_trl.kernels import _rms_norm

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
# Each shape and dtype costs Triton about a second; where the dtype changes nothing else, the widest and the usual do.
two_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
scales = pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])


@pytest.fixture(autouse=True)
def fresh_counts():
    kernels.LAUNCHES.clear()


def launched(*names: str) -> bool:
    return all(kernels.LAUNCHES[n] > 0 and kernels.LAUNCHES[n + "_backward"] > 0 for n in names)


# RMSNorm -------------------------------------------------------------------------------------------------------------


@dtypes
@scales
@pytest.mark.parametrize("options", [{}, {"offset": 1.0}, {"residual": True}], ids=str)
def test_rms_norm(dtype, scale, options):
    check.check_rms_norm("cuda", dtype, (3, 71, 896), scale=scale, **options)
    assert launched("rms_norm")


@two_dtypes
@pytest.mark.parametrize("width", [8, 37, 128, 1536, 4096, 8191, 14336, 20000, 32768])
def test_rms_norm_widths(dtype, width):
    check.check_rms_norm("cuda", dtype, (67, width), residual=width % 2 == 0)
    assert launched("rms_norm")


def test_rms_norm_too_wide_for_a_program():
    check.check_rms_norm("cuda", torch.float32, (5, _rms_norm.MAX_WIDTH + 1), residual=True)
    assert not kernels.LAUNCHES


@two_dtypes
@pytest.mark.parametrize(("rows", "width"), [(5001, 896), (1501, 4096), (40001, 64)], ids=str)
@pytest.mark.parametrize("residual", [False, True])
def test_rms_norm_several_tiles_a_program(dtype, rows, width, residual):
    check.check_rms_norm("cuda", dtype, (rows, width), residual=residual)


@two_dtypes
@pytest.mark.parametrize("layout", ["transposed", "columns", "heads of a slice"])
def test_rms_norm_of_strided_rows(dtype, layout):
    check.check_rms_norm("cuda", dtype, (2, 500, 14, 64), layout=layout)
    check.check_rms_norm("cuda", dtype, (2, 50, 14, 64), layout=layout, upstream="contiguous")


@pytest.mark.parametrize("upstream", ["one row", "one number"])
def test_rms_norm_expanded_gradient(upstream):
    check.check_rms_norm("cuda", torch.bfloat16, (3, 71, 896), upstream=upstream, residual=True)


@pytest.mark.parametrize("outputs", [(0,), (1,)], ids=["y", "sum"])
def test_rms_norm_one_output_unused(outputs):
    check.check_rms_norm("cuda", torch.bfloat16, (3, 71, 896), residual=True, outputs=outputs)


# Gated activations and the MLP ---------------------------------------------------------------------------------------


@dtypes
@scales
@pytest.mark.parametrize("gelu", [False, True], ids=["swiglu", "geglu"])
def test_gated_activation(dtype, scale, gelu):
    check.check_gated_activation("cuda", dtype, (3, 71, 4864), scale=scale, gelu=gelu)
    assert launched("gated_mlp")


@dtypes
@pytest.mark.parametrize("layout", ["halves", "joint"])
def test_gated_activation_in_one_tensor(dtype, layout):
    check.check_gated_activation("cuda", dtype, (3, 71, 4864), layout=layout, gelu=False)
    check.check_gated_activation("cuda", dtype, (3, 7, 2739), layout=layout, gelu=True)


@dtypes
@pytest.mark.parametrize("joint", [False, True], ids=["apart", "joint"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_gated_mlp(dtype, joint, recompute):
    check.check_gated_mlp("cuda", dtype, (2, 131, 896), 4864, joint=joint, recompute=recompute)
    check.check_gated_mlp("cuda", dtype, (2, 131, 896), 4864, joint=joint, recompute=recompute, gelu=True)
    assert launched("gated_mlp")


@pytest.mark.parametrize("frozen", [("x",), ("down",), ("gate", "up"), ("gate", "up", "down")], ids=" ".join)
def test_gated_mlp_frozen(frozen):
    check.check_gated_mlp("cuda", torch.bfloat16, (2, 131, 896), 4864, frozen=frozen, recompute=True)


@dtypes
@pytest.mark.parametrize("biases", [(), (0, 1, 2)], ids=str)
def test_shared_linear(dtype, biases):
    check.check_shared_linear("cuda", dtype, (2, 1031, 896), (896, 128, 128), biases=biases)
    check.check_shared_linear("cuda", dtype, (2, 131, 896), (896, 128, 128), biases=biases, outputs=(1, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype):
    check.check_gated_mlp("cuda", torch.float32, (2, 131, 896), 4864, autocast=dtype)
    check.check_gated_mlp("cuda", torch.float32, (2, 131, 896), 4864, autocast=dtype, joint=True, recompute=True)
    check.check_shared_linear("cuda", torch.float32, (2, 131, 896), (896, 128, 128), biases=(0, 2), autocast=dtype)


# QK-RoPE -------------------------------------------------------------------------------------------------------------

HEADS = [
    ((2, 14, 2, 51, 64), {}),
    ((2, 32, 8, 51, 128), {"table_batch": 2, "repeats": True}),
    ((2, 4, 4, 51, 96), {"rotary_dim": 72, "layout": "fused"}),
    ((1, 8, 4, 51, 256), {"uneven": True, "layout": "plain"}),
    ((1, 5, 1, 1301, 80), {"rotary_dim": 32, "repeats": True}),
]
heads = pytest.mark.parametrize(("shape", "options"), HEADS, ids=str)


@two_dtypes
@heads
def test_qk_rope(dtype, shape, options):
    check.check_qk_rope("cuda", dtype, shape, **options)
    assert launched("qk_rope")


@two_dtypes
@heads
def test_qk_norm_rope(dtype, shape, options):
    check.check_qk_rope("cuda", dtype, shape, norm=True, offset=float(shape[-1] == 256), **options)
    assert launched("qk_norm_rope")


@scales
@pytest.mark.parametrize("norm", [False, True])
def test_qk_rope_half(scale, norm):
    check.check_qk_rope("cuda", torch.float16, (2, 14, 2, 51, 64), norm=norm, scale=scale)


def test_qk_norm_rope_partly_used():
    shape = (2, 14, 2, 51, 64)
    check.check_qk_rope("cuda", torch.bfloat16, shape, norm=True, outputs=(1,))
    check.check_qk_rope("cuda", torch.bfloat16, shape, norm=True, frozen=("q_weight", "k_weight"))
    check.check_qk_rope("cuda", torch.bfloat16, shape, norm=True, frozen=("q", "k"))


# Linear cross-entropy ------------------------------------------------------------------------------------------------


@pytest.fixture(params=["chunks", "tiles"])
def way(request, monkeypatch):
    """Both ways to cut the logits, of whatever size."""
    tiles = request.param == "tiles"
    monkeypatch.setattr(
        chunks, "plan",
        lambda n, vocab, *_, **__: chunks.Plan(n, min(vocab, 512)) if tiles else chunks.Plan(min(n, 256), vocab),
    )  # fmt: skip
    kernels.LAUNCHES.clear()
    yield request.param
    assert kernels.LAUNCHES["gradient_pass" if tiles else "softmax_pass"] > 0


@dtypes
@pytest.mark.parametrize(
    "options",
    [
        {"bias": True}, {"ignored": 1.0}, {"weighting": "dft"}, {"huge": True}, {"scale": 1e-3}, {"scale": 1e3},
        {"softcap": 5.0, "logit_scale": 0.5, "z_loss": 1e-3}, {"reduction": "none", "z_loss": 1e-3},
        {"parts": ["loss", "log_probs", "entropy"]}, {"parts": ["entropy"], "differentiate": "tokens"},
    ],
    ids=str,
)  # fmt: skip
def test_linear_cross_entropy(way, dtype, options):
    check.check_linear_cross_entropy("cuda", dtype, (257, 896, 1531), **options)


@pytest.mark.parametrize(
    "shape", [(1, 896, 151_936), (7, 64, 50_257), (513, 128, 128_256), (300, 72, 151_933)], ids=str
)
def test_linear_cross_entropy_of_large_vocabularies(way, shape):
    check.check_linear_cross_entropy("cuda", torch.bfloat16, shape)


def test_equal_logits_and_ties():
    """All probabilities equal; the first token counts as the most likely one."""
    hidden = torch.zeros(300, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(151_936, 64, device="cuda", dtype=torch.bfloat16)
    labels = torch.arange(300, device="cuda")
    out = kernels.linear_cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(out.log_probs, torch.full_like(out.log_probs, -math.log(151_936)))
    torch.testing.assert_close(out.entropy, torch.full_like(out.entropy, math.log(151_936)))
    assert out.is_top1.nonzero().flatten().tolist() == [0]


@pytest.mark.parametrize("budget", [8192, 1024, 135, None])
def test_more_logits_than_32_bits_count(budget):
    """One chunk of all, chunks, tiles: statistics and gradients are those of the same rows alone."""
    n, h, v = 16_384, 64, 151_936
    hidden, weight, _, labels = check.ce_inputs("cuda", torch.bfloat16, n, h, v)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = kernels.linear_cross_entropy(hidden, weight, labels, reduction="sum", logit_budget_mib=budget)
    out.loss.backward()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    # Beside the logits: the float32 sums of weight and, with tiles, hidden gradient, and the gradients themselves.
    assert peak < (budget or 512) + (4 * v * h + 6 * n * h) / 2**20 + 16
    tail = slice(n - 64, n)
    few = hidden.detach()[tail].clone().requires_grad_()
    alone = kernels.linear_cross_entropy_reference(few.double(), weight.double(), labels[tail], reduction="sum")
    alone.loss.backward()
    torch.testing.assert_close(out.log_probs[tail].double(), alone.log_probs, rtol=0, atol=0.05)
    error = (hidden.grad[tail].double() - few.grad.double()).abs().max() / few.grad.double().abs().max()
    assert error < 2**-6


@pytest.mark.parametrize("way", ["chunks", "tiles"], indirect=True)
def test_the_loss_is_capturable_and_does_not_wait(way):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # what autograd has seen on the default stream cannot be captured
        hidden, weight, _, labels = check.ce_inputs("cuda", torch.bfloat16, 512, 128, 5000)
        items = torch.tensor(400, device="cuda")

        def step():
            out = kernels.linear_cross_entropy(hidden, weight, labels, num_items=items)
            return out.loss, *torch.autograd.grad(out.loss, (hidden, weight))

        expected = [t.clone() for t in step()]
        with waits.refused():
            step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step()
    for t in captured:
        t.zero_()
    graph.replay()
    torch.cuda.synchronize()
    for ours, eager in zip(captured, expected, strict=True):
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("differentiate", ["all", "loss", "tokens"])
def test_compiled_linear_cross_entropy(differentiate):
    torch._dynamo.reset()
    hidden, weight, _, labels = check.ce_inputs("cuda", torch.bfloat16, 300, 128, 5000)

    def fn(h, w):
        return kernels.linear_cross_entropy(h, w, labels, differentiate=differentiate).loss

    compiled = torch.compile(fn, fullgraph=True)
    ours, eager = (
        (f(hidden, weight), *torch.autograd.grad(f(hidden, weight), (hidden, weight))) for f in (compiled, fn)
    )
    for a, b in zip(ours, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-5)


# Every op, in other surroundings -------------------------------------------------------------------------------------


def tensors(*shapes, dtype=torch.bfloat16):
    torch.manual_seed(0)
    return [check.leaf(shape, dtype, "cuda", 0.5) for shape in shapes]


def attention_case():
    """q and k as the projections give them, norm weights, tables."""
    q, k, *weights = tensors((2, 65, 14, 64), (2, 65, 2, 64), (64,), (64,))
    return q, k, weights, [t.bfloat16() for t in check.rope_tables(1, 65, 64, "cuda")]


def cases():
    """Name -> (function that returns a tuple, its inputs)."""
    q, k, head_weights, tables = attention_case()
    x, r, w = tensors((2, 65, 896), (2, 65, 896), (896,))
    gate, up, joint = tensors((2, 65, 4864), (2, 65, 4864), (2, 65, 2 * 4864))
    mlp = tensors((2, 65, 896), (4864, 896), (4864, 896), (896, 4864))
    layers = tensors((2, 65, 896), (896, 896), (128, 896), (128, 896), (896,))
    return {
        "rms_norm": (lambda x, w: (kernels.rms_norm(x, w, 1e-6),), [x, w]),
        "rms_norm with residual": (lambda x, w, r: kernels.rms_norm(x, w, 1e-6, residual=r), [x, w, r]),
        "swiglu": (lambda *t: (kernels.swiglu(*t),), [gate, up]),
        "geglu, joint": (lambda *t: (kernels.geglu(*t),), [joint]),
        "gated_mlp": (lambda *t: (kernels.gated_mlp(*t),), mlp),
        "gated_mlp, recomputed": (lambda *t: (kernels.gated_mlp(*t, recompute=True),), mlp),
        "shared_linear": (lambda x, *t: kernels.shared_linear(x, t[:3], [t[3], None, None]), layers),
        "qk_rope": (lambda q, k: kernels.qk_rope(q.transpose(1, 2), k.transpose(1, 2), *tables), [q, k]),
        "qk_norm_rope": (
            lambda q, k, *w: kernels.qk_norm_rope(q.transpose(1, 2), k.transpose(1, 2), *w, 1e-6, *tables),
            [q, k, *head_weights],
        ),
    }


CASES = ("rms_norm", "rms_norm with residual", "swiglu", "geglu, joint", "gated_mlp", "gated_mlp, recomputed",
         "shared_linear", "qk_rope", "qk_norm_rope")  # fmt: skip
each_op = pytest.mark.parametrize("name", CASES)


def run(fn, inputs):
    outputs = fn(*inputs)
    return *outputs, *torch.autograd.grad(outputs, inputs, [torch.ones_like(o) for o in outputs])


def assert_close_overall(ours, expected):
    assert (ours - expected).double().norm() <= 0.01 * expected.double().norm()


@each_op
def test_cuda_graph(name):
    """A captured forward and backward pass, replayed on other values, gives what eager calls give for them."""
    fn, inputs = cases()[name]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run(fn, inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(fn, inputs)
    for t in inputs:
        t.data.normal_(std=0.3)
    graph.replay()
    replayed = [t.clone() for t in captured]
    assert all(map(torch.equal, replayed, run(fn, inputs)))


@each_op
def test_misaligned_tensors(name):
    """A kernel compiled for 16-byte aligned tensors and remembered must not be called for others."""
    fn, inputs = cases()[name]
    for _ in range(2):
        aligned = run(fn, inputs)
    shifted = []
    for t in inputs:
        room = torch.empty(t.numel() + 1, dtype=t.dtype, device="cuda")
        shifted.append(room[1:].view(t.shape).copy_(t.detach()).requires_grad_())
    for ours, expected in zip(run(fn, shifted), aligned, strict=True):
        if name.startswith(("gated_mlp", "shared_linear")):  # cuBLAS too picks by alignment
            assert_close_overall(ours, expected)
        else:
            assert torch.equal(ours, expected)
    assert all(map(torch.equal, run(fn, inputs), aligned))


@pytest.mark.parametrize("name", ["gated_mlp", "shared_linear"])
def test_compiled(name):
    """By inductor, in one graph; the other ops are in the block below."""
    torch._dynamo.reset()
    fn, inputs = cases()[name]
    for ours, eager in zip(run(torch.compile(fn, fullgraph=True), inputs), run(fn, inputs), strict=True):
        assert_close_overall(ours, eager)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_block(dynamic):
    torch._dynamo.reset()
    inputs = check.block_inputs("cuda", (2, 64, 896), 64)
    loss = torch.compile(check.block, fullgraph=True, dynamic=dynamic)(*inputs)
    expected = check.eager_block(*inputs)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-2)
    grads = torch.autograd.grad(loss, inputs[:4])
    for ours, eager in zip(grads, torch.autograd.grad(expected, inputs[:4]), strict=True):
        assert (ours - eager).norm() <= 1e-4 * eager.norm()
    assert launched("rms_norm", "gated_mlp", "qk_rope", "qk_norm_rope")


# More than 2^31 elements, where 32-bit offsets wrap ------------------------------------------------------------------


@pytest.fixture
def much_memory():
    gc.collect()
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    yield
    torch.cuda.empty_cache()


def large(*shape):
    return torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_().requires_grad_()


def assert_same_at_the_end(fn, inputs, ends, end_of):
    """`fn` of `inputs` ends as `fn` of their `ends` does; so do the gradients. `end_of` cuts a full-size result."""
    full = run(fn, inputs)
    for ours, expected in zip(full, run(fn, ends), strict=True):
        if ours.numel() > 2**20:  # not the gradient of a weight, which is a sum over all
            assert torch.equal(end_of(ours), expected)
        assert ours.view(-1)[-1000:].isfinite().all()


def cut(t, *index):
    return t.detach()[index].clone().requires_grad_()


def test_large_rms_norm(much_memory):
    x, w = large(2**19 + 3, 4096), large(4096)
    end = slice(-5, None)
    assert_same_at_the_end(lambda x, w: (kernels.rms_norm(x, w, 1e-6),), [x, w], [cut(x, end), w], lambda t: t[end])


@pytest.mark.parametrize("shape", [(2**19 + 3, 4096), (1, 2**31 - 8)], ids=str)
def test_large_swiglu(much_memory, shape):
    """The second is one row in 32 bits whose last block is not: no sum with the block size may wrap."""
    inputs = [large(*shape), large(*shape)]
    ends = [cut(t.view(-1), slice(-5000, None)) for t in inputs]
    assert_same_at_the_end(lambda *t: (kernels.swiglu(*t),), inputs, ends, lambda t: t.view(-1)[-5000:])


@pytest.mark.parametrize("norm", [False, True])
def test_large_qk_rope(much_memory, norm):
    seq_len = 2**18 + 3
    q, k = large(1, seq_len, 64, 128), large(1, seq_len, 1, 128)
    w = [large(128), large(128)] if norm else []
    tables = [t.bfloat16() for t in check.rope_tables(1, seq_len, 128, "cuda")]

    def rope(q, k, *w):
        arguments = (q.transpose(1, 2), k.transpose(1, 2), *w, *([1e-6] if norm else []))
        op = kernels.qk_norm_rope if norm else kernels.qk_rope
        return [t.transpose(1, 2) for t in op(*arguments, *(t[:, -q.shape[1] :] for t in tables))]

    end = (slice(None), slice(-5, None))
    assert_same_at_the_end(rope, [q, k, *w], [cut(q, *end), cut(k, *end), *w], lambda t: t[end])
