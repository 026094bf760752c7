"""A weight that embedding and head share: one gradient of it where all fits, torch's two where anything does not."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutputWithPast

from chronicals_trl import patch_model, unpatch_model
from chronicals_trl.kernels import _embedding_rows
from chronicals_trl.model import apart, tied_weight
from chronicals_trl.model.lm_head import HeadCall

PADDING = 2  # of tiny models; qwen2's embedding has it as padding_idx


def batch(seed: int = 1) -> dict[str, Any]:
    packed = tiny_models.packed_batch(seed=seed)
    packed["input_ids"][0, 4:9] = PADDING
    packed["input_ids"][0, 12:20] = 77
    return packed


def build(family: str = "qwen2", **options: Any) -> Any:
    model = tiny_models.build(family, tie_word_embeddings=True, **options)
    assert patch_model(model)["head"].state == "on"
    return model


def plain(model: Any) -> Any:
    """A copy whose embedding has torch's gradient; all else as in `model`."""
    model = copy.deepcopy(model)
    del model.get_input_embeddings().__dict__["forward"]
    return model


def forward(model: Any, inputs: dict[str, Any] | None = None, **options: Any) -> Any:
    return model(**(batch() if inputs is None else inputs), fused_lm_head=True, **options)


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def step(model: Any, inputs: dict[str, Any] | None = None, **options: Any) -> dict[str, Tensor]:
    torch.manual_seed(3)
    model.zero_grad()
    forward(model, inputs, **options).loss.backward()
    return gradients(model)


def require_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """To the bit: on the CPU the same additions are made, in another place."""
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert torch.equal(ours[name], gradient), name
        assert gradient.abs().max() > 0, name


def edges(loss: Tensor, weight: Tensor) -> int:
    """How many gradients of `weight` a backward pass from `loss` adds up."""
    seen, waiting, found = set(), [loss.grad_fn], 0
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        for following, _ in node.next_functions:
            if getattr(following, "variable", None) is weight:
                found += 1
            elif following is not None:
                waiting.append(following)
    return found


def shared(model: Any, **options: Any) -> bool:
    """Whether the shared weight gets one gradient in a forward pass as it is now."""
    loss = forward(model, **options).loss
    count = edges(loss, model.lm_head.weight)
    assert count in (1, 2)
    return count == 1


# -- the gradient ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2", "llama", "gpt2", "granite", "qwen3_moe"])
def test_gradients_equal_the_unpatched_models(family: str) -> None:
    inputs = {name: batch()[name] for name in ("input_ids", "labels")}
    model = tiny_models.build(family, tie_word_embeddings=True)
    model(**inputs, use_cache=False).loss.backward()
    theirs = {name: g.clone() for name, g in gradients(model).items()}
    report = patch_model(model)
    assert report["head"].reason == tied_weight.TOGETHER
    assert shared(model)
    ours = step(model, inputs)
    weight = next(name for name, p in model.named_parameters() if p is model.lm_head.weight)
    assert (ours[weight] - theirs[weight]).norm() < 2e-6 * theirs[weight].norm()
    assert (ours[weight] - theirs[weight]).abs().max() < 5e-6 * theirs[weight].abs().max()
    require_equal({n: g.clone() for n, g in ours.items()}, step(plain(model), inputs))


def test_padding_gets_no_gradient_from_the_lookup() -> None:
    model = build()
    assert model.model.embed_tokens.padding_idx == PADDING
    of_padding = step(model)[tied_name(model)][PADDING].clone()
    require_equal(gradients(model), step(plain(model)))
    model.model.embed_tokens.padding_idx = None
    assert not torch.equal(step(model)[tied_name(model)][PADDING], of_padding)


def tied_name(model: Any) -> str:
    return next(name for name, p in model.named_parameters() if p is model.lm_head.weight)


def test_bfloat16_is_no_farther_from_float64_than_torch() -> None:
    model = tiny_models.build("qwen2")
    right = step_of_torch(copy.deepcopy(model).double())
    model = model.to(torch.bfloat16)
    theirs = step_of_torch(copy.deepcopy(model))
    assert patch_model(model)["head"].reason == tied_weight.TOGETHER
    assert shared(model)
    name = tied_name(model)
    found = [(g[name].double() - right[name]).norm().item() for g in (step(model), theirs)]
    assert found[0] <= 1.02 * found[1], found


def step_of_torch(model: Any) -> dict[str, Tensor]:
    model(**batch(), use_cache=False).loss.backward()
    return gradients(model)


@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
def test_autocast_and_a_loss_scale(scale: float, autocast: torch.dtype | None) -> None:
    """float32 weights; the head's products, and its own gradient on the way, in another dtype."""
    model = build()
    found = []
    for each in (model, plain(model)):
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            loss = forward(each).loss
        assert edges(loss, each.lm_head.weight) == (1 if each is model else 2)
        (loss * scale).backward()
        found.append(gradients(each))
    assert found[0][tied_name(model)].dtype == torch.float32
    require_equal(*found)


def late(outputs: Any) -> Tensor:
    return -outputs.log_probs.sum() + 0.1 * outputs.entropy.sum()


@pytest.mark.parametrize(
    "loss_of", [late, lambda outputs: outputs.loss + late(outputs)], ids=["recomputed", "recomputed and not"]
)
def test_gradients_that_the_head_makes_in_the_backward_pass(loss_of: Callable[[Any], Tensor]) -> None:
    model = build()
    found = []
    for each in (model, plain(model)):
        loss = loss_of(forward(each))
        assert edges(loss, each.lm_head.weight) == (1 if each is model else 2)
        loss.backward()
        found.append(gradients(each))
    require_equal(*found)


@pytest.mark.parametrize("call", [HeadCall(weighting="dft"), HeadCall(rows=torch.tensor([1, 9, 12, -1]))], ids=str)
def test_calls_of_other_kinds(call: HeadCall) -> None:
    model = build()
    assert shared(model, head_call=call)
    require_equal(step(model, head_call=call), step(plain(model), head_call=call))


def test_a_head_with_a_bias() -> None:
    model = tiny_models.build("llama", tie_word_embeddings=True)
    model.lm_head.bias = nn.Parameter(torch.randn(tiny_models.VOCAB_SIZE))
    assert patch_model(model)["head"].reason == tied_weight.TOGETHER
    assert shared(model)
    ours = step(model)
    assert "lm_head.bias" in ours
    require_equal(ours, step(plain(model)))


# -- backward passes -------------------------------------------------------------------------------------------------


def both(function: Callable[[Any], Any]) -> None:
    """The gradients that `function` leaves in a model, with one of the shared weight's and with two."""
    model = build()
    other = plain(model)
    function(model)
    function(other)
    require_equal(gradients(model), gradients(other))


def test_accumulation() -> None:
    def in_turn(model: Any) -> None:
        for seed in (1, 2, 3):
            forward(model, batch(seed)).loss.backward()

    def at_once(model: Any) -> None:
        sum(forward(model, batch(seed)).loss for seed in (1, 2, 3)).backward()

    def crossed(model: Any) -> None:
        first, second = (forward(model, batch(seed)).loss for seed in (1, 2))
        second.backward()
        first.backward()

    for function in (in_turn, crossed):
        both(function)
    model = build()
    other = plain(model)
    at_once(model)
    at_once(other)
    for name, gradient in gradients(other).items():  # added in another order
        torch.testing.assert_close(gradients(model)[name], gradient, rtol=1e-5, atol=1e-6)


def test_a_second_backward_pass() -> None:
    def twice(model: Any) -> None:
        loss = forward(model).loss
        loss.backward(retain_graph=True)
        loss.backward()

    both(twice)


def test_after_a_backward_pass_that_failed() -> None:
    def again(model: Any) -> None:
        loss = forward(model).loss
        handle = model.model.norm.weight.register_hook(lambda grad: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loss.backward(retain_graph=True)
        handle.remove()
        model.zero_grad()
        loss.backward()

    both(again)


def test_a_hook_of_the_weight_sees_the_whole() -> None:
    model, seen = build(), []
    model.lm_head.weight.register_hook(lambda grad: seen.append(grad.clone()))
    model.lm_head.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    ours = step(model)[tied_name(model)]
    assert len(seen) == 2 and all(torch.equal(each, ours) for each in seen)


def test_a_part_of_the_graph() -> None:
    model = build()
    hidden: list[Tensor] = []
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: hidden.append(output))
    found = []
    for each in (model, plain(model)):
        loss = forward(each).loss
        found.append(torch.autograd.grad(loss, [hidden.pop()], retain_graph=True)[0])
        found.append(torch.autograd.grad(loss, [each.lm_head.weight], retain_graph=True)[0])
        found.append(torch.autograd.grad(loss, [each.model.norm.weight], retain_graph=True)[0])
        assert each.lm_head.weight.grad is None
        loss.backward(inputs=[each.lm_head.weight])
        found.append(each.lm_head.weight.grad)
    assert all(map(torch.equal, found[:4], found[4:]))


def detach(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output.detach()


def neftune(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output + torch.zeros_like(output).uniform_(-0.1, 0.1)


def scaled_in_place(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output.mul_(1.5)


def asks_for_a_gradient(module: nn.Module, args: Any, output: Tensor) -> None:
    output.requires_grad_(True)


@pytest.mark.parametrize("hook", [detach, neftune, scaled_in_place, asks_for_a_gradient])
def test_hooks_of_the_embedding(hook: Any) -> None:
    model = build()
    model.model.embed_tokens.register_forward_hook(hook)
    require_equal(step(model), step(plain(model)))


def test_a_lookup_before_the_models_own() -> None:
    """The first one leaves the view; the other has torch's gradient."""
    model = build()

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        model_of[module].extra = module.embed_tokens(torch.tensor([[5, 77]])).square().sum()

    found = []
    model_of: dict[Any, Any] = {}
    for each in (model, plain(model)):
        model_of[each.model] = each
        each.model.register_forward_pre_hook(before, with_kwargs=True)
        nodes: list[str] = []
        each.model.embed_tokens.register_forward_hook(
            lambda module, args, output, nodes=nodes: nodes.append(type(output.grad_fn).__name__)
        )
        (forward(each).loss + each.extra).backward()
        assert nodes == ["_TiedEmbeddingBackward" if each is model else "EmbeddingBackward0", "EmbeddingBackward0"]
        found.append(gradients(each))
    for name, gradient in found[1].items():  # added in another order
        torch.testing.assert_close(found[0][name], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_layers(use_reentrant: bool) -> None:
    model = build()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    assert shared(model)
    require_equal(step(model), step(plain(model)))


class Checkpointed(nn.Module):
    """An embedding, or a backbone, that is computed a second time in the backward pass."""

    def __init__(self, inner: nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.inner, self.use_reentrant = inner, use_reentrant

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        def tensor(dummy: Tensor, input_ids: Tensor) -> Tensor:
            out = self.inner(input_ids, **kwargs)
            return out if isinstance(out, Tensor) else out.last_hidden_state

        dummy = torch.zeros((), requires_grad=True)  # or a reentrant one has no gradient
        out = checkpoint(tensor, dummy, input_ids, use_reentrant=self.use_reentrant)
        return BaseModelOutputWithPast(last_hidden_state=out) if kwargs else out


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("what", ["embedding", "backbone"])
def test_a_lookup_that_is_computed_again(what: str, use_reentrant: bool) -> None:
    """The second time there is no head to leave anything for; of a reentrant one, the first time no gradient."""
    model = build()

    def changed(model: Any) -> Any:
        embedding = model.model.embed_tokens
        model.get_input_embeddings = lambda: embedding
        if what == "embedding":
            model.model.embed_tokens = Checkpointed(embedding, use_reentrant)
        else:
            model.model = Checkpointed(model.model, use_reentrant)
        return model

    other = changed(plain(model))
    model = changed(model)
    if not use_reentrant:
        assert shared(model)
    require_equal(step(model), step(other))
    assert tied_weight._current.get() is None


# -- what does not fit -----------------------------------------------------------------------------------------------


class Scaled(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 2


def another_weight(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


def frozen(model: Any) -> None:
    model.lm_head.weight.requires_grad_(False)


def another_kind_of_embedding(model: Any) -> None:
    model.model.embed_tokens.__class__ = Scaled


def wrapped(model: Any) -> None:
    """As accelerate's offloading does it."""
    inner = model.model.embed_tokens.forward
    model.model.embed_tokens.forward = lambda ids: inner(ids)


def partitioned(model: Any) -> None:
    model.lm_head.weight.ds_id = 3


def another_kind_of_parameter(model: Any) -> None:
    class Kind(nn.Parameter):
        pass

    model.lm_head.weight = model.model.embed_tokens.weight = Kind(model.lm_head.weight.detach().clone())


def setting(name: str, value: Any) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        setattr(model.model.embed_tokens, name, value)

    change.__name__ = name
    return change


CHANGES = [
    another_weight, another_kind_of_embedding, wrapped, partitioned, another_kind_of_parameter,
    setting("max_norm", 100.0), setting("scale_grad_by_freq", True), setting("sparse", True),
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_is_changed_later_is_noticed(change: Callable[[Any], None]) -> None:
    model = build()
    assert shared(model)
    change(model)
    weights = {id(model.lm_head.weight): model.lm_head.weight, id(model.model.embed_tokens.weight): None}
    loss = forward(model).loss
    assert edges(loss, model.lm_head.weight) == 3 - len(weights)
    if change.__name__ != "sparse":
        reference = copy.deepcopy(model)
        if change is wrapped:
            del reference.model.embed_tokens.forward
        unpatch_embedding(reference)
        require_equal(step(model), step(reference))


def unpatch_embedding(model: Any) -> None:
    model.model.embed_tokens.__dict__.pop("forward", None)


@pytest.mark.parametrize("change", CHANGES[1:], ids=lambda change: change.__name__)
def test_what_does_not_fit_is_in_the_report(change: Callable[[Any], None]) -> None:
    model = tiny_models.build("qwen2")
    change(model)
    head = patch_model(model)["head"]
    assert head.state == "on" and head.reason.startswith(tied_weight.APART + ": ")
    loss = forward(model).loss
    assert edges(loss, model.lm_head.weight) == 2


def test_a_frozen_weight() -> None:
    model = build()
    frozen(model)
    loss = forward(model).loss
    assert edges(loss, model.lm_head.weight) == 0
    loss.backward()
    assert model.lm_head.weight.grad is None and model.model.norm.weight.grad is not None
    model = tiny_models.build("qwen2")
    frozen(model)
    assert patch_model(model)["head"].reason is None
    model.lm_head.weight.requires_grad_(True)
    assert not shared(model)
    require_equal(step(model), step(plain(build())))


def test_untied_models_and_other_embeddings() -> None:
    model = tiny_models.build("llama")
    assert patch_model(model)["head"].reason is None
    assert "forward" not in model.model.embed_tokens.__dict__
    reason = patch_model(tiny_models.build("gemma3"))["head"].reason
    assert reason == f"{tied_weight.APART}: it is a Gemma3TextScaledWordEmbedding"


def test_a_kernel_that_gives_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    lookup = tied_weight.tied_embedding
    monkeypatch.setattr(tied_weight, "tied_embedding", lambda ids, weight, padding_idx: lookup(ids, weight, 5))
    model = tiny_models.build("qwen2")
    report = patch_model(model)
    assert report["head"].state == "on"
    assert report["head"].reason.startswith(f"{tied_weight.APART}: gradient 1 differs")
    assert "forward" not in model.model.embed_tokens.__dict__


# -- no other pass finds what was left -------------------------------------------------------------------------------


def test_embeddings_that_are_given() -> None:
    model = build()
    inputs = batch()
    given = torch.randn(*inputs.pop("input_ids").shape, 32)
    assert shared(model, inputs={**inputs, "inputs_embeds": given})  # by nobody: the gradient is the head's
    require_equal(
        step(model, {**inputs, "inputs_embeds": given}), step(plain(model), {**inputs, "inputs_embeds": given})
    )
    assert shared(model)


def test_passes_without_the_heads_loss() -> None:
    model = build()
    inputs = batch()
    for call in (
        lambda: model(input_ids=inputs["input_ids"]),
        lambda: model.model(input_ids=inputs["input_ids"]),
        lambda: model.model.embed_tokens(inputs["input_ids"]),
    ):
        call()
        assert tied_weight._current.get() is None
        require_equal(step(model), step(plain(model)))
    rows = model.model.embed_tokens(inputs["input_ids"])
    assert type(rows.grad_fn).__name__ == "EmbeddingBackward0"
    logits = model(**inputs, use_cache=False)
    assert edges(logits.loss, model.lm_head.weight) == 2


def test_without_gradients() -> None:
    model = build()
    loss = forward(model).loss
    with torch.no_grad():
        assert forward(model).loss == loss
    with torch.inference_mode():
        assert forward(model).loss == loss
    loss.backward()
    require_equal(gradients(model), step(plain(model)))


def test_a_pass_that_failed() -> None:
    model = build()
    handle = model.model.norm.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        forward(model)
    handle.remove()
    assert tied_weight._current.get() is None
    require_equal(step(model), step(plain(model)))


def test_a_pass_within_a_pass() -> None:
    """Before the embedding's lookup another model is called, and this one's embedding in a thread of its own."""
    model, other = build(), build(seed=7)
    theirs: list[Any] = []

    def nested(module: nn.Module, args: Any) -> None:
        if theirs:
            return
        theirs.append(forward(other).loss)
        thread = threading.Thread(target=lambda: theirs.append(module(args[0])))
        thread.start()
        thread.join()

    handle = model.model.embed_tokens.register_forward_pre_hook(nested)
    loss = forward(model).loss
    handle.remove()
    assert edges(loss, model.lm_head.weight) == 1
    assert edges(theirs[0], other.lm_head.weight) == 1
    assert type(theirs[1].grad_fn).__name__ == "EmbeddingBackward0"
    loss.backward()
    theirs[0].backward()
    require_equal(gradients(model), step(plain(model)))
    require_equal(gradients(other), step(plain(other)))


def test_what_a_pass_awaits() -> None:
    """One lookup by that embedding, and one call of its head."""
    model, other = build(), nn.Embedding(tiny_models.VOCAB_SIZE, 32)
    embedding, ids = model.model.embed_tokens, batch()["input_ids"]
    other.weight = embedding.weight
    with tied_weight.handover(model, model.lm_head) as current:
        assert current.awaits(embedding, ids) and not current.awaits(other, ids)
        embedding(ids)
        assert not current.awaits(embedding, ids)
    view = current.weight_for(model.lm_head)
    assert view is not model.lm_head.weight and view.data_ptr() == model.lm_head.weight.data_ptr()
    assert current.weight_for(model.lm_head) is model.lm_head.weight
    with tied_weight.handover(model, model.lm_head) as current:
        embedding(ids)
        another_weight(model)
        assert current.weight_for(model.lm_head) is model.lm_head.weight


def test_a_model_that_does_not_tell_its_embedding() -> None:
    def get_input_embeddings() -> None:
        raise NotImplementedError

    model = tiny_models.build("qwen2")
    model.get_input_embeddings = get_input_embeddings
    model.get_output_embeddings = lambda: model.lm_head
    head = patch_model(model)["head"]
    assert (head.state, head.reason) == ("on", None)
    loss = forward(model).loss
    assert edges(loss, model.lm_head.weight) == 2


def test_a_compiled_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    theirs = step(plain(model))
    lookups, lookup = [], tied_weight.tied_embedding
    monkeypatch.setattr(tied_weight, "tied_embedding", lambda *args: lookups.append(args) or lookup(*args))
    for compiled in ("model.model", "model"):
        ours = build()
        lookups.clear()
        counters.clear()
        whole = ours if compiled == "model" else ours.model
        whole.forward = torch.compile(whole.forward, backend="aot_eager")
        for name, gradient in step(ours).items():
            torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-5)
        assert lookups == []
        assert all("torch.compiler.disable" in why for why in counters["graph_break"])  # the head's own


def test_a_compiled_embedding() -> None:
    model = build()
    model.model.embed_tokens.compile(backend="aot_eager", fullgraph=True)
    assert not shared(model)
    require_equal(step(model), step(plain(build())))


# -- copies, and back ------------------------------------------------------------------------------------------------


def test_copies_share_by_themselves() -> None:
    model = build()
    other = copy.deepcopy(model)
    assert other.lm_head.weight is other.model.embed_tokens.weight is not model.lm_head.weight
    assert shared(other)
    ours = step(other)
    assert not gradients(model)
    require_equal(ours, step(plain(model)))


def test_pickles_come_back_as_their_class_has_them() -> None:
    other = pickle.loads(pickle.dumps(build()))
    assert "EmbeddingBackward0" in repr(other.model.embed_tokens(batch()["input_ids"]).grad_fn)
    other(**batch(), use_cache=False).loss.backward()
    patch_model(other)
    assert shared(other)


def test_unpatching() -> None:
    model = build()
    before = step(model)
    unpatch_model(model)
    assert "forward" not in model.model.embed_tokens.__dict__
    assert patch_model(model, {"head": "off"})["head"].state == "off"
    assert "forward" not in model.model.embed_tokens.__dict__
    patch_model(model)
    assert shared(model)
    require_equal(step(model), before)


# -- the report after sharding ---------------------------------------------------------------------------------------


def test_the_report_is_set_right() -> None:
    model = tiny_models.build("qwen2")
    report = patch_model(model)
    assert apart.amend(report, model) == []
    assert report["head"].reason == tied_weight.TOGETHER
    partitioned(model)
    said = f"{tied_weight.APART}: its weight is sharded, or no plain parameter"
    assert apart.amend(report, model) == [f"head: {said}"]
    assert report["head"].reason == said and report["head"].state == "on"
    assert apart.amend(report, model) == []
    model = tiny_models.build("qwen2")
    report = patch_model(model)
    frozen(model)
    assert apart.amend(report, model) == []
    assert report["head"].reason is None


def test_the_gradient_is_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head's memory becomes `.grad`: a copy of it would be as dear as the addition that is saved."""
    where = []
    add = _embedding_rows.add_embedding_rows

    def watching(total_VH: Tensor, *arguments: Any) -> Tensor:
        where.append(total_VH.data_ptr())
        return add(total_VH, *arguments)

    model = build()
    monkeypatch.setattr(_embedding_rows, "add_embedding_rows", watching)
    step(model)
    assert where == [model.lm_head.weight.grad.data_ptr()]
