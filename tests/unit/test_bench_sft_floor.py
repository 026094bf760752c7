"""`bench sft --floor`: its products, and their order, against those of the models themselves."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from chronicals_trl.bench.sft import floor
from chronicals_trl.bench.sft import models as sft_models
from chronicals_trl.bench.sft.cases import SHAPES, Shape, training_flops
from chronicals_trl.bench.sft.floor_head import head_ops
from chronicals_trl.bench.sft.floor_layer import Attention, Group, Linear
from chronicals_trl.bench.sft.floor_ops import ELEMENTWISE, GEMM, run
from chronicals_trl.bench.sft.floor_step import Step, make_step

TINY = SHAPES["tiny"]
UNTIED = Shape("untied", "llama", 64, 96, 3, 4, 2, 512, False)
#: Gate and up are so wide that the adapters' backward pass goes through [W B].
WIDE = Shape("wide", "qwen2", 32, 128, 2, 2, 1, 512, True)
TOKENS = 160
PRODUCTS = ("mm", "addmm", "addmm_")


def step(shape: Shape, mode: str, device: str = "meta", **changes: Any) -> Step:
    given: dict[str, Any] = {
        "master": "bf16", "tokens": TOKENS, "squares": TOKENS**2, "recompute": False, "attend": None, **changes,
    }  # fmt: skip
    return Step(shape, mode, device=torch.device(device), **given)


def flops(made: Step) -> dict[str, float]:
    return floor.tables(make_step(made))["flops"]


def counted(call: Any) -> float:
    """Operations of matrix products by torch's counter, attention's and RoPE's batched ones left out."""
    aten = torch.ops.aten

    def in_place(total: Any, a: Any, b: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return int(2 * a[0] * a[1] * b[1])

    with FlopCounterMode(display=False, custom_mapping={aten.addmm_: in_place}) as counter:
        call()
    found = counter.get_flop_counts()["Global"]
    return float(sum(found.get(getattr(aten, name), 0) for name in PRODUCTS))


def model_of(shape: Shape, mode: str, recompute: bool = False) -> Any:
    model = sft_models.make_model(shape, 0)
    if mode == "lora":
        peft = pytest.importorskip("peft")
        from chronicals_trl.bench.sft.sides import _lora

        model = peft.get_peft_model(model, _lora(), autocast_adapter_dtype=False)
    if recompute:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})  # as TRL does
    return model.train()


def train(model: Any) -> None:
    ids = torch.arange(3, 3 + TOKENS)[None] % 512
    model(input_ids=ids, labels=ids).loss.backward()


# -- products ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("shape", [TINY, UNTIED, WIDE], ids=lambda shape: shape.name)
def test_operations_are_those_of_the_model(shape: Shape, mode: str, recompute: bool) -> None:
    model = model_of(shape, mode, recompute)
    found = flops(step(shape, mode, recompute=recompute))
    expected = counted(lambda: train(model))
    if recompute and mode == "lora":  # PEFT makes down's product before it reads what A needs; ours need not
        expected -= shape.layers * 2.0 * TOKENS * shape.hidden * shape.intermediate
    if shape is WIDE and mode == "lora":  # [W 0 B] has columns that are zero: dx and dy B of gate and up are one
        expected += shape.layers * 2 * 2.0 * TOKENS * shape.intermediate * 32
    assert found[GEMM] + found[ELEMENTWISE] == expected


@pytest.mark.parametrize("name", ["qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-7b", "llama-3.1-8b"])
def test_operations_of_the_large_shapes(name: str) -> None:
    found = flops(step(SHAPES[name], "full", tokens=8192, squares=8192 * 700))
    assert sum(found.values()) == training_flops(SHAPES[name], "full", 8192, 8192 * 700.0)


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("shape", [TINY, WIDE], ids=lambda shape: shape.name)
def test_what_is_replayed_is_what_is_counted(shape: Shape, mode: str) -> None:
    ops = make_step(step(shape, mode, "cpu", recompute=mode == "full", attend=by_sdpa))
    products = [op for op in ops if op.kind == GEMM]
    expected = sum(op.flops for op in products)
    with torch.no_grad():
        assert counted(lambda: run(products)) == expected > 0  # alone, before attention has run
        assert counted(lambda: run(ops)) == expected


class Products(TorchDispatchMode):
    """Shapes (M, K, N) of the products that run, and whether either factor is transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in PRODUCTS:
            a, b = args[-2:] if name != "mm" else args[:2]
            laid = tuple("n" if x.stride(1) == 1 else "t" for x in (a, b))
            self.seen.append((a.shape[0], a.shape[1], b.shape[1], *laid))
        return func(*args, **(kwargs or {}))


def by_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).contiguous()


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("shape", [UNTIED, WIDE], ids=lambda shape: shape.name)
def test_shapes_and_layouts_are_those_of_our_patched_model(shape: Shape, mode: str) -> None:
    from chronicals_trl import patch_model

    model = model_of(shape, mode)
    report = patch_model(model)
    assert {report[part].state for part in ("qk_rope", "gated_mlp", "rms_norm")} == {"on"}
    assert report["lora"].state == ("on" if mode == "lora" else "off")
    with Products() as theirs:
        train(model)
    ops = make_step(step(shape, mode, "cpu", attend=by_sdpa))
    with torch.no_grad(), Products() as ours:
        run(op for op in ops if not op.name.startswith("logits"))  # whose chunks are those of the fused head
    seen = Counter(product for product in theirs.seen if shape.vocab not in product)
    n, i, rank = TOKENS, shape.intermediate, 32
    # On a GPU these are made inside of the activation's kernels: what is added to gate and up, the gradients of their
    # B, and of down's adapter h, its input gradient and A's.
    inside = Counter({
        (n, rank, i, "n", "t"): 2, (i, n, rank, "t", "n"): 2, (n, i, rank, "n", "t"): 1, (n, rank, i, "n", "n"): 1,
        (rank, n, i, "t", "n"): 1,
    })  # fmt: skip
    expected = seen - Counter({each: count * shape.layers for each, count in inside.items() if mode == "lora"})
    assert Counter(ours.seen) == expected


# -- order ------------------------------------------------------------------------------------------------------------


def test_checkpointing_is_the_layers_forward_once_more() -> None:
    plain, again = (make_step(step(UNTIED, "full", recompute=recompute)) for recompute in (False, True))
    head = next(at for at, op in enumerate(plain) if op.name == "logits")
    # Without the last norm; and of down nothing but what it reads is needed again.
    layers = [op for op in plain[: head - 1] if op.name not in ("embedding", "down")]
    assert Counter(op.name for op in again) - Counter(op.name for op in plain) == Counter(op.name for op in layers)
    assert sum(op.flops for op in again) - sum(op.flops for op in plain) == sum(op.flops for op in layers)
    names = [op.name for op in again]
    assert names.index("down dx") == names.index("last norm, backward") + 1 + len(layers) // 3


def test_the_order_of_a_step() -> None:
    names = [op.name for op in make_step(step(replace(TINY, layers=1), "full"))]
    assert names[:14] == [
        "embedding", "first norm", "q", "k", "v", "rope", "attention", "o", "norm", "gate", "up", "activation", "down",
        "norm",
    ]  # fmt: skip
    assert names[14:17] == ["logits", "logits dx", "logits dW"]
    assert names[names.index("last norm, backward") + 1 :] == [
        "down dx", "activation, backward", "down dW", "gate dx", "up dx", "gate dW", "up dW", "norm, backward", "o dx",
        "o dW", "attention, backward", "rope, backward", "q dx", "q dW", "k dx", "k dW", "v dx", "v dW", "biases",
        "first norm, backward", "embedding, backward", "gradient norm", "AdamW",
    ]  # fmt: skip


def test_attention_reads_and_feeds_the_products() -> None:
    q, k, v, grad = (torch.randn(6, width) for width in (8, 4, 4, 8))
    stand_ins = [torch.zeros(6, width) for width in (8, 8, 4, 4)]
    made = Attention(by_sdpa, 4, 36, (q, k, v), grad, stand_ins)
    assert made.out() is stand_ins[0] and made.grad_of(1)() is stand_ins[2]
    q.normal_()  # written after it was made
    leaves = [x.clone().view(1, 6, -1, 4).transpose(1, 2).requires_grad_() for x in (q, k, v)]
    expected = by_sdpa(*leaves)
    assert made.forward.run is not None and made.backward.run is not None
    with torch.no_grad():
        made.forward.run()
        torch.testing.assert_close(made.out(), expected.detach().view(6, 8))
        made.backward.run()
    grads = torch.autograd.grad(expected, leaves, grad.view(1, 6, 2, 4))
    for index, each in enumerate(grads):
        torch.testing.assert_close(made.grad_of(index)(), each.transpose(1, 2).reshape(6, -1))
    assert made.forward.flops == 2 * 2 * 4 * 36 and made.backward.flops == 2 * made.forward.flops


def test_a_group_computes_what_its_layers_do() -> None:
    """Adapters' factors lie ready, h among them: on both ways it stands for what has its shape."""
    x, d_x, h, a = (torch.randn(*size) for size in ((6, 8), (6, 8), (6, 64), (64, 8)))
    linears = [
        Linear(
            name, torch.randn(5, 8), torch.empty(6, 5), torch.randn(6, 5), torch.empty(5, 8), bias, torch.randn(5, 32)
        )
        for name, bias in (("one", torch.randn(5)), ("two", None))
    ]
    group = Group(x, d_x, linears, a, h)
    run(group.forward())
    for each, part in zip(linears, h.split(32, 1), strict=True):
        bias = 0.0 if each.bias is None else each.bias
        torch.testing.assert_close(each.out, x @ each.weight.t() + bias + 2 * part @ each.b.t())
    run(group.by_turns())
    expected = sum(each.grad @ each.weight for each in linears)
    torch.testing.assert_close(d_x, expected)
    for each in linears:
        torch.testing.assert_close(each.d_weight, each.grad.t() @ x)
    run(group.adapter_gradients(need_x=False))
    torch.testing.assert_close(d_x, expected)
    run(group.adapter_gradients(need_x=True))
    torch.testing.assert_close(d_x, expected + h @ a)


class Places(TorchDispatchMode):
    """Where results and right factors of products lie."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name == "aten::mm":
            self.seen.append((kwargs["out"].data_ptr(), args[1].data_ptr()))
        return func(*args, **(kwargs or {}))


def test_layers_have_their_own_weights_and_take_the_other_tensors_in_turn() -> None:
    ops = make_step(replace(step(replace(TINY, layers=4), "full", "cpu"), sets=2))
    with torch.no_grad(), Places() as places:
        run(op for op in ops if op.name == "gate")
    outs, weights = zip(*places.seen, strict=True)
    assert len(set(weights)) == 4 and outs[:2] == outs[2:] and outs[0] != outs[1]


@pytest.mark.parametrize(("mode", "master"), [("full", "bf16"), ("lora", "bf16"), ("full", "fp32")])
def test_chunks_of_the_head_are_those_of_our_head(mode: str, master: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real op, at the real size, without its memory: what it asks for is on meta."""
    from chronicals_trl.kernels import _cross_entropy_chunks as chunks

    shape, seen = SHAPES["qwen2.5-0.5b"], Counter[tuple[int, ...]]()
    monkeypatch.setattr(torch, "autocast", lambda *given, **more: nullcontext())  # knows no meta
    monkeypatch.setattr(chunks, "use_triton", lambda *tensors: True)
    monkeypatch.setattr(chunks, "softmax_pass", lambda logits, *rest: seen.update([tuple(logits.shape)]))
    dtype = torch.float32 if master == "fp32" else torch.bfloat16
    hidden = torch.empty(16_384, shape.hidden, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(shape.vocab, shape.hidden, dtype=dtype, device="meta")
    gradient = chunks.OfLoss(torch.ones(()), False, 0.0)
    chunks._run(
        hidden, weight, None, torch.zeros(16_384, device="meta"), chunks.Head(1.0, None), torch.bfloat16, None,
        gradient, [True, mode == "full", False], final=True,
    )  # fmt: skip
    made = head_ops(shape, mode, master, 16_384, torch.device("meta"))
    per_row = 2.0 * shape.hidden * shape.vocab
    assert Counter((int(op.flops / per_row), shape.vocab) for op in made if op.name == "logits") == seen
    names = Counter(op.name for op in made)
    assert names["logits dx"] == names["logits"] and names["logits dW"] == (names["logits"] if mode == "full" else 0)


@pytest.mark.parametrize(("master", "tokens", "parts"), [("bf16", 16_384, 2), ("bf16", 16, 1), ("fp32", 16_384, 1)])
def test_the_heads_floor_sums_as_the_head_does(
    master: str, tokens: int, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, half of it beside a bf16 gradient where there are several chunks."""
    from chronicals_trl.bench.sft import floor_head

    made: list[Any] = []

    class Noted(floor_head._WeightSum):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(floor_head, "_WeightSum", Noted)
    head_ops(SHAPES["qwen2.5-0.5b"], "full", master, tokens, torch.device("meta"))
    (total,) = made
    assert len(total.parts) == parts
    assert (total.out.dtype == torch.bfloat16) == (master == "bf16")
    assert parts == 1 or {part.dtype for part in total.parts} == {torch.float32}
