"""The chunked linear cross-entropy against its definition on full logits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import kernel_checks as check

from chronicals_trl.kernels import _cross_entropy_chunks as chunks
from chronicals_trl.kernels import linear_cross_entropy, linear_cross_entropy_reference

SHAPE = (23, 17, 101)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=[5, 64], ids=["chunks", "one_chunk"], autouse=True)
def chunk(request, monkeypatch):
    """Small vocabularies fit any budget of a whole MiB, so that chunks have to be forced: 5 does not divide 23."""
    monkeypatch.setattr(chunks, "plan", lambda n, vocab, *_, **__: chunks.Plan(min(max(n, 1), request.param), vocab))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("ignored", [0.0, 0.2, 1.0])
def test_accuracy(dtype, scale, ignored):
    check.check_linear_cross_entropy("cpu", dtype, SHAPE, scale=scale, ignored=ignored)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"huge": True},
        {"bias": True},
        {"logit_scale": 0.25, "softcap": 3.0, "bias": True},
        {"weighting": "dft", "softcap": 2.0},
        {"reduction": "sum"},
        {"reduction": "none", "weighting": "dft"},
        {"num_items": 5},
        {"num_items": torch.tensor(7)},
        {"num_items": 0},
        {"z_loss": 0.01},
        {"z_loss": 0.01, "weighting": "dft", "softcap": 3.0, "reduction": "none"},
        {"parts": ["log_probs"]},
        {"parts": ["entropy"], "softcap": 3.0, "logit_scale": 2.0},
        {"parts": ["loss", "log_probs", "entropy"], "bias": True},
        {"parts": ["loss", "log_probs"], "weighting": "dft"},
        {"parts": ["loss", "entropy"], "reduction": "none"},
        {"differentiate": "loss", "weighting": "dft"},
        {"differentiate": "loss", "reduction": "none"},
        {"differentiate": "tokens", "weighting": "dft"},
        {"differentiate": "tokens", "parts": ["loss", "log_probs", "entropy"]},
    ],
    ids=str,
)
def test_options(dtype, options):
    check.check_linear_cross_entropy("cpu", dtype, SHAPE, **options)


@settings(max_examples=20, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 9), st.integers(2, 40)),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    softcap=st.sampled_from([None, 5.0]),
)
def test_any_shape(shape, ignored, scale, softcap):
    hidden, weight, bias, labels = check.ce_inputs("cpu", torch.float64, *shape, ignored=ignored, scale=scale)
    outs = [
        op(hidden, weight, labels, bias=bias, softcap=softcap)
        for op in (linear_cross_entropy, linear_cross_entropy_reference)
    ]
    for ours, full in zip(*outs, strict=True):
        torch.testing.assert_close(ours, full)
    for pick in (lambda out: out.loss, lambda out: out.loss + (out.log_probs * out.entropy).sum()):
        grads = [torch.autograd.grad(pick(out), (hidden, weight, bias), retain_graph=True) for out in outs]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("differentiate", ["all", "tokens"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_float64_gradients(differentiate, reduction):
    hidden, weight, bias, labels = check.ce_inputs("cpu", torch.float64, 7, 4, 6)

    def fn(h, w, b):
        return linear_cross_entropy(
            h, w, labels, bias=b, softcap=2.0, logit_scale=1.5, reduction=reduction, differentiate=differentiate
        )[:3]

    assert torch.autograd.gradcheck(fn, (hidden, weight, bias))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("all_labelled", [False, True])
def test_rows(reduction, all_labelled):
    hidden, weight, _, labels = check.ce_inputs("cpu", torch.float32, *SHAPE, ignored=0.0 if all_labelled else 0.4)
    labelled = (labels != -100).nonzero().flatten()
    padding = (
        torch.tensor([-1, -1]) if all_labelled else torch.cat([torch.tensor([-1]), (labels == -100).nonzero()[0]])
    )
    rows = torch.cat([labelled.flip(0), padding, padding])
    ours = linear_cross_entropy(hidden, weight, labels, rows=rows, reduction=reduction)
    full = linear_cross_entropy_reference(hidden, weight, labels, reduction=reduction)
    for o, f in zip(ours, full, strict=True):
        torch.testing.assert_close(o, f)
    for pick in (lambda out: out.loss.sum(), lambda out: (out.entropy * torch.arange(SHAPE[0])).sum()):
        grads = [torch.autograd.grad(pick(out), (hidden, weight), retain_graph=True) for out in (ours, full)]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("differentiate", ["all", "loss", "tokens"])
@pytest.mark.parametrize("n_rows", [0, 6])
def test_nothing_labelled_gives_zeros_not_none(differentiate, n_rows):
    hidden, weight = torch.randn(n_rows, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    out = linear_cross_entropy(hidden, weight, torch.full((n_rows,), -100), differentiate=differentiate)
    out.loss.backward()
    assert out.loss == 0
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_nan_in_an_ignored_row_stays_there():
    hidden, weight, _, labels = check.ce_inputs("cpu", torch.float32, *SHAPE, ignored=0.0)
    labels[4] = -100
    with torch.no_grad():
        hidden[4] = float("nan")
    out = linear_cross_entropy(hidden, weight, labels)
    (grad,) = torch.autograd.grad(out.loss, hidden)
    assert out.loss.isfinite()
    assert torch.equal(grad[4], torch.zeros(SHAPE[1]))
    assert grad.isfinite().all()
    assert out.log_probs[4] == out.entropy[4] == 0


def test_gradients_add_to_those_of_the_loss_and_may_be_asked_for_twice():
    hidden, weight, _, labels = check.ce_inputs("cpu", torch.float32, *SHAPE)
    out = linear_cross_entropy(hidden, weight, labels)
    loss = out.loss * 3 + (out.log_probs * torch.arange(SHAPE[0])).sum()
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    torch.testing.assert_close(first, torch.autograd.grad(loss, (hidden, weight)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weighting", ["none", "dft"])
def test_a_second_backward_pass_forms_the_gradients_anew(weighting):
    hidden, weight, _, labels = check.ce_inputs("cpu", torch.float32, *SHAPE)
    loss = linear_cross_entropy(hidden, weight, labels, weighting=weighting).loss * 3
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    torch.testing.assert_close(first, torch.autograd.grad(loss, (hidden, weight)))
    loss = linear_cross_entropy(hidden, weight, labels, differentiate="loss").loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiate='all'"):
        loss.backward()


@pytest.mark.parametrize("differentiate", ["all", "loss", "tokens"])
def test_a_second_derivative_is_an_error_not_a_part_of_one(differentiate):
    hidden, weight, _, labels = check.ce_inputs("cpu", torch.float32, *SHAPE)
    loss = linear_cross_entropy(hidden, weight, labels, differentiate=differentiate).loss
    (grad,) = torch.autograd.grad(loss.square(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


def test_num_items_of_any_dtype():
    hidden, weight, _, labels = check.ce_inputs("cpu", torch.float32, *SHAPE)
    for count in (5, torch.tensor(5), torch.tensor(5.0, dtype=torch.float64), torch.tensor(5.0, dtype=torch.bfloat16)):
        loss = linear_cross_entropy(hidden, weight, labels, num_items=count).loss
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, linear_cross_entropy(hidden, weight, labels, reduction="sum").loss / 5)


def test_the_weight_gradient_is_handed_over_not_copied():
    hidden, weight, _, labels = check.ce_inputs("cpu", torch.float32, *SHAPE)
    made = []
    hidden.register_hook(lambda grad: made.append(grad.data_ptr()))
    linear_cross_entropy(hidden, weight, labels).loss.backward()
    assert hidden.grad.data_ptr() == made[0]


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
@pytest.mark.parametrize("part", ["loss", "log_probs"])
def test_what_is_frozen_gets_and_costs_nothing(frozen, part, monkeypatch):
    hidden, weight, _, labels = check.ce_inputs("cpu", torch.float32, *SHAPE)
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    made = []
    init = chunks._Gradients.__init__

    def spy(self, *args, **kwargs):
        init(self, *args, **kwargs)
        made.append({"hidden": self.hidden_MH, "weight": self.weight})

    monkeypatch.setattr(chunks._Gradients, "__init__", spy)
    getattr(linear_cross_entropy(hidden, weight, labels), part).sum().backward()
    assert made
    assert all(sums[frozen] is None for sums in made)
    assert (weight if frozen == "hidden" else hidden).grad is not None


@pytest.mark.parametrize("how", ["no_grad", "inference", "nothing requires one"])
def test_evaluation_forms_no_gradients(how, monkeypatch):
    hidden, weight, _, labels = check.ce_inputs("cpu", torch.float32, *SHAPE)
    monkeypatch.setattr(chunks._Gradients, "add_rows", lambda *_: pytest.fail("a gradient was formed"))
    if how == "nothing requires one":
        out = linear_cross_entropy(hidden.detach(), weight.detach(), labels)
    else:
        with torch.no_grad() if how == "no_grad" else torch.inference_mode():
            out = linear_cross_entropy(hidden, weight, labels)
    assert not out.loss.requires_grad
    torch.testing.assert_close(out.loss, linear_cross_entropy_reference(hidden, weight, labels).loss.detach())


def test_differentiate_loss_detaches_the_rest():
    hidden, weight, _, labels = check.ce_inputs("cpu", torch.float32, *SHAPE)
    out = linear_cross_entropy(hidden, weight, labels, differentiate="loss")
    assert out.loss.requires_grad
    assert not out.log_probs.requires_grad
    assert not out.entropy.requires_grad


def test_autocast_with_float32_parameters():
    hidden, weight, bias, labels = check.ce_inputs("cpu", torch.float32, *SHAPE)
    low = [t.detach().bfloat16().requires_grad_() for t in (hidden, weight, bias)]
    for part in ("loss", "log_probs"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = getattr(linear_cross_entropy(hidden, weight, labels, bias=bias), part).sum()
        same = getattr(linear_cross_entropy(*low[:2], labels, bias=low[2]), part).sum()
        assert out.dtype == torch.float32
        assert torch.equal(out, same)
        for ours, rounded in zip(
            torch.autograd.grad(out, (hidden, weight, bias)), torch.autograd.grad(same, low), strict=True
        ):
            assert ours.dtype == torch.float32  # and not by way of bfloat16: the sums were float32
            torch.testing.assert_close(ours.bfloat16(), rounded, rtol=2**-7, atol=0)


def test_weight_gradient_is_summed_in_float32():
    """Ten chunks of one bfloat16 term each: a bfloat16 sum would stick at 256."""
    hidden = torch.ones(640, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    linear_cross_entropy(hidden, weight, torch.zeros(640, dtype=torch.long), reduction="sum").loss.backward()
    assert weight.grad.flatten().tolist() == [-320.0, 320.0]


@pytest.mark.parametrize("differentiate", ["all", "loss", "tokens"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(differentiate, dynamic):
    torch._dynamo.reset()
    hidden, weight, _, labels = check.ce_inputs("cpu", torch.float32, *SHAPE)

    def fn(op, h, w, y, **options):
        out = op(h * 2.0, w, y, **options)
        return out.loss + (0 if differentiate == "loss" else out.log_probs.square().sum()), out.entropy, out.is_top1

    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    ours = compiled(linear_cross_entropy, hidden, weight, labels, differentiate=differentiate)
    full = fn(linear_cross_entropy_reference, hidden, weight, labels)
    torch.testing.assert_close(ours, full)
    grads = [torch.autograd.grad(out[0], (hidden, weight)) for out in (ours, full)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_the_first_of_equal_maxima_is_top1():
    out = linear_cross_entropy(torch.ones(2, 1), torch.ones(3, 1), torch.tensor([0, 1]))
    assert out.is_top1.tolist() == [True, False]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.ones(1, 2, 3)}, r"hidden has shape \(1, 2, 3\)"),
        ({"labels": torch.zeros(3).long()}, r"labels has shape \(3,\).*\(2,\)"),
        ({"rows": torch.zeros(1, 2).long()}, r"rows has shape \(1, 2\)"),
        ({"bias": torch.ones(3)}, r"bias has shape \(3,\).*\(5,\)"),
        ({"softcap": 0.0}, "softcap is 0.0; it must be positive"),
        ({"logit_budget_mib": 0}, "logit_budget_mib is 0"),
        ({"logit_scale": 0.0}, "logit_scale is 0.0; it must be positive"),
        ({"z_loss": -1.0}, "z_loss is -1.0; it must be at least 0"),
        ({"reduction": "avg"}, "reduction is 'avg'.*'mean', 'sum', 'none'"),
        ({"weighting": "x"}, "weighting is 'x'.*'none', 'dft'"),
        ({"differentiate": "x"}, "differentiate is 'x'"),
        ({"reduction": "sum", "num_items": 3}, "num_items.*reduction='mean', not 'sum'"),
        ({"hidden": torch.ones(2, 3).half()}, r"float16.*float32.*autocast"),
    ],
)
def test_arguments_that_do_not_fit_are_named(changes, message):
    arguments = {"hidden": torch.ones(2, 3), "weight": torch.ones(5, 3), "labels": torch.zeros(2).long()}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{**arguments, **changes})


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("budget", [1, 135, 1024])
@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("trainable", [False, True])
def test_logits_stay_within_the_budget(compute, budget, kernels, trainable, monkeypatch):
    monkeypatch.undo()
    n_rows, vocab = 16_384, 151_936
    rows, columns = chunks.plan(n_rows, vocab, compute, budget, trainable=trainable, kernels=kernels)
    per_logit = compute.itemsize + (0 if kernels else 4 * max(4, compute.itemsize))
    assert 1 in (rows, columns) or rows * columns * per_logit <= budget * 2**20
    if columns == vocab:
        assert rows == 1 or (rows + 128) * vocab * per_logit > budget * 2**20
    else:  # tiles only where chunks would be short, and a float32 sum would be read and written for each
        assert kernels and trainable and rows == n_rows
        assert chunks.FEWEST_ROWS * vocab * per_logit > budget * 2**20
    assert chunks.plan(3, 10, compute, budget, trainable=trainable, kernels=kernels) == (3, 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_shorter_batch_has_a_longer_ones_memory(dtype, monkeypatch):
    """And its rows are cut as they are without a longer one. Another head or budget is another matter."""
    bytes_of_blocks, cuts, results = [], [], []
    empty, softmax_pass = torch.empty, chunks.softmax_pass

    def listed(*shape, **options):
        if options.get("dtype") == torch.uint8:
            bytes_of_blocks.append(shape[0])
        return empty(*shape, **options)

    def run(*lengths, width=17, budget=None):
        torch.manual_seed(0)
        weight = torch.randn(101, width, dtype=dtype, requires_grad=True)
        bytes_of_blocks.clear(), cuts.clear(), results.clear()
        for n in lengths:
            hidden = torch.randn(n, width, dtype=dtype)
            loss = linear_cross_entropy(hidden, weight, torch.arange(n), logit_budget_mib=budget).loss
            results.append((loss.detach(), *torch.autograd.grad(loss, weight)))

    monkeypatch.setattr(torch, "empty", listed)
    monkeypatch.setattr(chunks, "softmax_pass", lambda x, *rest: cuts.append(x.shape[0]) or softmax_pass(x, *rest))
    monkeypatch.setattr(chunks, "plan", lambda n, vocab, *_, **__: chunks.Plan(max(1, n // 2), vocab))
    monkeypatch.setattr(chunks, "MOST_BYTES", {})
    run(4, 16, 12)
    row = 128 * dtype.itemsize  # 101 columns, on to a multiple of 64
    beside = 0 if dtype == torch.float32 else 51 * 17 * 4
    blocks = [(-(-n * row // 512) * 512 if beside else n * row) + beside for n in (2, 8, 6)]
    assert bytes_of_blocks == [blocks[0], blocks[1], blocks[1]] and blocks[1] > blocks[2]
    assert cuts == [2, 2, 8, 8, 6, 6]
    after = results[-1]
    run(12, width=5)
    assert bytes_of_blocks[0] < blocks[2] or not beside
    run(12, budget=7)
    assert bytes_of_blocks == blocks[2:]
    monkeypatch.setattr(chunks, "MOST_BYTES", type("Forgetful", (dict,), {"get": lambda *_: 0})())
    run(4, 16, 12)
    assert bytes_of_blocks == blocks
    torch.testing.assert_close(results[-1], after, rtol=0, atol=0)


def _blocks_of(monkeypatch, room=None):
    """Bytes of the blocks that are asked for, of which larger ones than `room[0]` are not to be had."""
    asked, empty = [], torch.empty

    def listed(*shape, **options):
        if options.get("dtype") == torch.uint8:
            asked.append(shape[0])
            if room and shape[0] > room[0]:
                raise torch.OutOfMemoryError("CUDA out of memory.")
        return empty(*shape, **options)

    monkeypatch.setattr(torch, "empty", listed)
    monkeypatch.setattr(chunks, "plan", lambda n, vocab, *_, **__: chunks.Plan(n, vocab))
    monkeypatch.setattr(chunks, "MOST_BYTES", {})
    return asked


def _score(n, *, trains=True, vocab=128, dtype=torch.float32):
    weight = torch.ones(vocab, 3, dtype=dtype, requires_grad=True)
    with torch.set_grad_enabled(trains):
        return linear_cross_entropy(torch.ones(n, 3, dtype=dtype), weight, torch.zeros(n).long()).loss


def test_evaluation_has_blocks_of_its_own(monkeypatch):
    """Its batches may be larger, where there are no activations beside the head."""
    asked, row = _blocks_of(monkeypatch), 128 * 4
    for n, trains in ((64, False), (4, True), (4, False), (8, True), (4, True), (4, True), (4, False)):
        _score(n, trains=trains)
    assert asked == [n * row for n in (64, 4, 64, 8, 8, 8, 64)]


def test_memory_that_a_block_does_not_find(monkeypatch):
    room, row = [64 * 128 * 4], 128 * 4
    asked = _blocks_of(monkeypatch, room)
    with pytest.raises(torch.OutOfMemoryError):
        _score(65)
    _score(32)  # not as large as the one that there was no memory for
    _score(64)
    room[0] = 16 * row
    _score(16)  # as large as the longest, had there been memory; from now on there is not
    _score(8)
    with pytest.raises(torch.OutOfMemoryError):
        _score(17)
    assert asked == [n * row for n in (65, 32, 64, 64, 16, 16, 17)]


def test_another_vocabulary_or_dtype_has_blocks_of_its_own(monkeypatch):
    asked = _blocks_of(monkeypatch)
    _score(8)
    _score(8, vocab=64)
    _score(8, dtype=torch.bfloat16)
    assert asked == [8 * 128 * 4, 8 * 64 * 4, 8 * 128 * 2]
    assert all(torch.device("cpu") in key for key in chunks.MOST_BYTES)  # another one has its own


@pytest.mark.parametrize("vocab", [1, 3, 63, 64, 65, 101])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("width", [None, 5])
def test_the_parts_of_a_block_do_not_overlap(vocab, dtype, width, monkeypatch):
    """And the second begins as a block of its own would."""
    monkeypatch.setattr(chunks, "MOST_BYTES", {0: 4096})
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    shape = None if width is None else chunks._WeightSum.shape_beside(torch.Size([vocab, width]))
    block = chunks._Block(3, vocab, dtype, shape, wide, 0, torch.device("cpu"))
    logits = block.logits_RV
    assert logits.dtype == dtype and logits.shape[0] == 3 and logits.shape[1] >= vocab and logits.is_contiguous()
    assert logits.shape[1] % 64 == 0 or vocab < 64
    assert (block.beside is None) == (width is None)
    if block.beside is not None:
        assert block.beside.dtype == wide and block.beside.shape == shape and block.beside.is_contiguous()
        assert block.beside.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr()
        distance = block.beside.data_ptr() - logits.data_ptr()
        assert distance % 512 == 0 and distance >= logits.numel() * dtype.itemsize


def test_the_papers_case_is_cut_into_tiles(monkeypatch):
    monkeypatch.undo()
    rows, columns = chunks.plan(8192, 151_936, torch.bfloat16, 135, trainable=True, kernels=True)
    assert rows == 8192 and 130 * 2**20 < 2 * rows * columns <= 135 * 2**20


@pytest.mark.parametrize(
    "shape", [(16_384, 151_936, 896), (8192, 128_256, 4096), (100, 151_936, 896), (2000, 151_936, 896)]
)
@pytest.mark.parametrize("trainable", [False, True])
def test_the_automatic_budget_leaves_the_peak_at_trls(shape, trainable, monkeypatch):
    monkeypatch.undo()
    n_rows, vocab, width = shape
    budget = chunks.automatic_budget_mib(n_rows, vocab, width, torch.bfloat16, narrowed=trainable, kernels=True)
    one_chunk = chunks.plan(n_rows, vocab, torch.bfloat16, budget, trainable=trainable, kernels=True).rows == n_rows
    # In bytes, the gradients that are handed out included; TRL's as read in its code and measured (FACTS.md).
    weight_gradient = (2 if one_chunk else 4) * vocab * width if trainable else 0
    ours = budget * 2**20 + 2 * n_rows * width + weight_gradient
    trl = min(4096, n_rows) * 32_768 * 2 + 6 * n_rows * width + (6 * vocab * width if trainable else 0)
    assert ours <= trl
    assert one_chunk or budget == 1024 or ours + 2**20 > trl
    assert one_chunk == (trainable and n_rows <= 2000), "where nothing is summed there is room for more logits"


def test_a_weight_gradient_of_one_chunk_has_no_sum_beside_it(monkeypatch):
    sums = []
    add = chunks._WeightSum.add
    monkeypatch.setattr(
        chunks._WeightSum, "add", lambda self, *args: (sums.append(len(self.parts)), add(self, *args))[1]
    )
    hidden = torch.randn(64, 8, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(40, 8, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(40, (64,))
    gradients = []
    for tokens in (64, 16):
        monkeypatch.setattr(
            chunks, "plan", lambda n_rows, vocab, *args, _t=tokens, **kwargs: chunks.Plan(min(_t, n_rows), vocab)
        )
        loss = linear_cross_entropy(hidden, weight, labels).loss
        gradients.append(torch.autograd.grad(loss, weight)[0].float())
    assert sums == [1, 2, 2, 2, 2]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 7, 8, 13])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_weight_gradient_is_rounded_in_its_own_memory(rows, dtype):
    torch.manual_seed(rows)
    shape = torch.Size([rows, 6])
    total = chunks._WeightSum(shape, dtype, torch.device("cpu"), torch.empty(chunks._WeightSum.shape_beside(shape)))
    a, b = torch.randn(2, 5, rows).to(dtype), torch.randn(2, 5, 6).to(dtype)
    for i in range(2):
        total.add(a[i], b[i])
    assert sum(part.numel() for part in total.parts) == rows * 6
    assert rows < 2 or total.parts[0].data_ptr() == total.out.data_ptr()
    exact = sum(a[i].float().t() @ b[i].float() for i in range(2))
    torch.testing.assert_close(total.finish(), exact.to(dtype), rtol=0, atol=0)


def test_what_pads_rows_takes_nothing_from_the_row_that_it_names():
    hidden, weight = 5 * torch.eye(3), torch.eye(3)
    labels = torch.tensor([0, -100, 2])
    out = linear_cross_entropy(hidden, weight, labels, rows=torch.tensor([0, 2, -1, -1]))
    whole = linear_cross_entropy(hidden, weight, labels)
    assert out.is_top1.tolist() == [True, False, True]
    torch.testing.assert_close(out.log_probs, whole.log_probs)
    torch.testing.assert_close(out.entropy, whole.entropy)
