"""patch_model on every family: same loss, same gradients, documents apart, nothing global, and back again."""

from __future__ import annotations

import copy
import pickle

import pytest
import tiny_models
import torch
import transformers
from torch import nn
from trl.trainer.utils import add_fused_lm_head

from chronicals_trl import ChronicalsConfig, patch_model, unpatch_model
from chronicals_trl.model import match
from chronicals_trl.model.patch import base_model

# What must be on, family by family, on the CPU; README's table is generated from this.
EXPECTED_OFF = {
    "gpt2": {"rms_norm", "gated_mlp", "qk_rope"},
    "gemma2": {"attention"},
}
MODEL_PARTS = ("rms_norm", "gated_mlp", "qk_rope", "attention", "head")


def prepared(family: str, **options):
    """A tiny model with TRL's fused head, as SFTTrainer has it when it hands over."""
    model = tiny_models.build(family, **options)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    return model


def step(model: nn.Module, batch: dict, **options) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients by name of one TRL step."""
    model.zero_grad(set_to_none=True)
    outputs = model(**copy.copy(batch), fused_lm_head=True, **options)
    loss = -outputs.log_probs.sum() / outputs.label_mask.sum()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def require_same_gradients(ours: dict, theirs: dict, tolerance: float = 1e-5) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        error = (ours[name] - gradient).norm() / gradient.norm().clamp_min(1e-12)
        assert error < tolerance, f"{name}: {error:.1e}"
        assert gradient.norm() > 0, f"{name} gets no gradient: this compares nothing"


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_parts_are_on(family: str) -> None:
    report = patch_model(tiny_models.build(family))
    off = {name for name in MODEL_PARTS if report[name].state == "off"}
    assert off == EXPECTED_OFF.get(family, set()), report.render()
    assert all(report[name].reason for name in off)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_gradients_equal_the_unpatched_models(family: str) -> None:
    """Every gradient, fp32, 1e-5 relative; through log_probs as TRL differentiates, and through the op's own loss."""
    batch = tiny_models.packed_batch()
    loss, gradients = step(prepared(family), batch)
    model = prepared(family)
    patch_model(model)
    patched_loss, patched = step(model, batch)
    assert torch.allclose(patched_loss, loss, rtol=1e-5)
    require_same_gradients(patched, gradients)

    model.zero_grad(set_to_none=True)
    outputs = model(**copy.copy(batch), fused_lm_head=True)
    router = getattr(model.config, "router_aux_loss_coef", 0.0) if outputs.aux_loss is not None else 0.0
    assert router == 0.0
    outputs.loss.backward()
    require_same_gradients({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, gradients)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_packed_equals_each_document_alone(family: str) -> None:
    model = prepared(family)
    patch_model(model)
    lengths = (13, 9, 5, 5)
    batch = tiny_models.packed_batch(lengths)
    with torch.no_grad():
        packed = model(**copy.copy(batch), fused_lm_head=True)
        start = 0
        for length in lengths:
            ids, labels = (batch[key][:, start : start + length] for key in ("input_ids", "labels"))
            alone = model(input_ids=ids, labels=labels, fused_lm_head=True)
            # The position before a document predicts its first token, which is ignored; log_probs are those of 1..n-1.
            window = slice(start, start + length - 1)
            assert torch.allclose(packed.log_probs[:, window], alone.log_probs, atol=1e-5)
            start += length
    assert packed.log_probs.abs().sum() > 1


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe"])
def test_a_leak_would_be_noticed(family: str) -> None:
    """The comparison above fails when the documents are not kept apart: an all-ones mask does that."""
    model = prepared(family)
    patch_model(model)
    batch = tiny_models.packed_batch((13, 9))
    with torch.no_grad():
        good = model(**copy.copy(batch), fused_lm_head=True).log_probs
        leaky = model(
            input_ids=batch["input_ids"], labels=batch["labels"], position_ids=batch["position_ids"],
            attention_mask=torch.ones_like(batch["input_ids"]), fused_lm_head=True,
        ).log_probs  # fmt: skip
    assert (good - leaky)[:, 13:].abs().max() > 1e-3


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3", "qwen3_moe", "gpt2"])
@pytest.mark.parametrize("padded", [False, True])
def test_logits_and_generation_are_unchanged(family: str, padded: bool) -> None:
    model, reference = tiny_models.build(family).eval(), tiny_models.build(family).eval()
    patch_model(model)
    ids = tiny_models.packed_batch((11,))["input_ids"].repeat(2, 1)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :4] = 0
    with torch.no_grad():
        ours = model(input_ids=ids, attention_mask=mask).logits
        theirs = reference(input_ids=ids, attention_mask=mask).logits
        assert torch.allclose(ours[mask.bool()], theirs[mask.bool()], atol=1e-5)
        options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask}
        assert torch.equal(model.generate(ids, **options), reference.generate(ids, **options))


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "qwen3_moe"])
def test_nothing_global(family: str) -> None:
    """A second model, even one built from the same configuration object, is bit-identical to before."""
    batch = tiny_models.packed_batch()
    first = prepared(family)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        second = type(first)(first.config).train()
    second.load_state_dict(first.state_dict())
    add_fused_lm_head(second, outputs=("log_probs", "entropy", "is_top1"))
    loss, gradients = step(second, batch)
    patch_model(first)
    step(first, batch)
    again, gradients_again = step(second, batch)
    assert torch.equal(loss, again)
    assert all(torch.equal(gradients[name], gradients_again[name]) for name in gradients)
    assert not any("_chronicals_patched" in module.__dict__ for module in second.modules())


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_unpatch_restores(family: str) -> None:
    batch = tiny_models.packed_batch()
    model = prepared(family)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    config = model.config
    loss, gradients = step(model, batch)
    patch_model(model)
    assert model.config is not config or family == "gemma2"
    unpatch_model(model)
    assert model.config is config
    for name, module in model.named_modules():
        after = vars(module)
        assert after.keys() == before[name].keys(), name
        assert after.get("forward") is before[name].get("forward")
    again, gradients_again = step(model, batch)
    assert torch.equal(loss, again)
    assert all(torch.equal(gradients[name], gradients_again[name]) for name in gradients)


def test_patching_twice_is_patching_once() -> None:
    model = prepared("llama")
    first = patch_model(model).to_dict()
    assert patch_model(model).to_dict() == first
    unpatch_model(model)
    assert not any("_chronicals_patched" in module.__dict__ for module in model.modules())


def test_probing_leaves_the_random_stream_alone() -> None:
    model = tiny_models.build("qwen3", seed=5, hidden_size=40)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    patch_model(model)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("switch", ["torch.backends.fp32_precision", "the legacy flag", "none"])
def test_a_probe_runs_without_tf32_and_leaves_the_setting_alone(switch: str) -> None:
    matmul, parent = torch.backends.cuda.matmul, torch.backends.fp32_precision
    try:
        if switch == "torch.backends.fp32_precision":
            torch.backends.fp32_precision = "tf32"
        elif switch == "the legacy flag":
            matmul.allow_tf32 = True
        before = matmul.fp32_precision
        assert before == ("none" if switch == "none" else "tf32")
        with match.probing(torch.device("cpu")):
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == before
        if switch == "torch.backends.fp32_precision":  # it still decides
            torch.backends.fp32_precision = "ieee"
            assert matmul.fp32_precision == "ieee"
    finally:
        torch.backends.fp32_precision = parent
        matmul.allow_tf32 = False
        matmul.fp32_precision = "none"


def test_deepcopy_is_bound_to_the_copy() -> None:
    model = prepared("llama")
    patch_model(model)
    clone = copy.deepcopy(model)
    with torch.no_grad():
        clone.model.norm.weight.mul_(3)
        clone.model.layers[0].input_layernorm.weight.mul_(2)
    batch = tiny_models.packed_batch()
    ours, theirs = step(clone, batch)[0], step(model, batch)[0]
    assert not torch.allclose(ours, theirs)
    assert clone.model.norm.forward.__self__ is clone.model.norm
    assert clone.model.layers[1].self_attn.forward.__self__ is clone.model.layers[1].self_attn


def test_a_pickled_block_comes_back_with_the_class_forward() -> None:
    model = tiny_models.build("llama")
    patch_model(model)
    layer = pickle.loads(pickle.dumps(model.model.layers[0].mlp))
    x = torch.randn(2, 3, 32)
    assert torch.allclose(layer(x), model.model.layers[0].mlp(x), atol=1e-6)


@pytest.mark.parametrize("kind", ["reentrant", "non_reentrant", "selective"])
def test_gradient_checkpointing(kind: str) -> None:
    batch = tiny_models.packed_batch()
    _, gradients = step(prepared("qwen3"), batch)
    model = prepared("qwen3")
    patch_model(model)
    if kind == "selective":
        from trl.models import enable_selective_activation_checkpointing

        enable_selective_activation_checkpointing(model)
        model.gradient_checkpointing_enable()
    else:
        model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
        if kind == "reentrant":
            model.enable_input_require_grads()
    require_same_gradients(step(model, batch)[1], gradients)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_torch_compile(family: str) -> None:
    batch = tiny_models.packed_batch()
    loss, gradients = step(prepared(family), batch)
    model = prepared(family)
    patch_model(model)
    model.model.forward = torch.compile(model.model.forward, backend="aot_eager")
    compiled_loss, compiled = step(model, batch)
    assert torch.allclose(compiled_loss, loss, rtol=1e-5)
    require_same_gradients(compiled, gradients)


def test_tied_head_and_embedding_share_one_gradient() -> None:
    model = prepared("qwen2")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    patch_model(model)
    _, gradients = step(model, tiny_models.packed_batch())
    assert "lm_head.weight" not in gradients and "model.embed_tokens.weight" in gradients


# -- PEFT ------------------------------------------------------------------------------------------------------------


def _lora(model, **options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "gate_proj", "down_proj"], **options
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = peft.get_peft_model(model, config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}, {"lora_dropout": 0.0, "use_rslora": True}])
def test_peft(order: str, options: dict) -> None:
    batch = tiny_models.packed_batch()
    _, gradients = step(_lora(prepared("llama"), **options), batch)
    model = prepared("llama")
    if order == "before":
        patch_model(model)
        model = _lora(model, **options)
    else:
        model = _lora(model, **options)
        report = patch_model(model)
        assert report["lora"].state == "on" and report["lora"].modules == 8, report.render()
        assert report["head"].state == "on"
    require_same_gradients(step(model, batch)[1], gradients)


# -- what does not fit -----------------------------------------------------------------------------------------------


def test_a_norm_that_computes_something_else_is_left_alone() -> None:
    model = tiny_models.build("llama")

    class Centred(type(model.model.norm)):
        def forward(self, hidden_states):
            return super().forward(hidden_states - hidden_states.mean(-1, keepdim=True))

    model.model.norm.__class__ = Centred
    report = patch_model(model)
    assert report["rms_norm"].modules == 4 and "Centred" in report["rms_norm"].reason
    assert "forward" not in model.model.norm.__dict__


def test_an_mlp_with_another_activation_is_left_alone() -> None:
    model = tiny_models.build("llama", hidden_act="gelu")  # the erf GELU, not the tanh approximation
    report = patch_model(model)
    assert report["gated_mlp"].state == "off" and "probe" in report["gated_mlp"].reason
    assert report["gated_mlp"].omitted


def test_interleaved_rotary_is_left_alone() -> None:
    model = tiny_models.build("llama")
    import transformers.models.cohere.modeling_cohere as cohere

    attention = cohere.CohereAttention(
        cohere.CohereConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2), layer_idx=0
    )
    model.model.layers[0].self_attn = attention
    report = patch_model(model)
    assert report["qk_rope"].modules == 1 and "CohereAttention" in report["qk_rope"].reason


def test_a_wrong_logit_scale_is_found_by_number() -> None:
    model = tiny_models.build("granite")
    model.config.logit_scale = 2.0  # takes precedence over logits_scaling when read, but Granite does not use it
    report = patch_model(model)
    assert report["head"].state == "off" and "differs" in report["head"].reason


def test_strict_and_on_raise_and_leave_the_model_as_it_was() -> None:
    for config in ({"strict": True}, {"rms_norm": "on"}):
        model = tiny_models.build("gpt2")
        with pytest.raises(RuntimeError, match="rms_norm is off"):
            patch_model(model, config)
        assert not any("_chronicals_patched" in module.__dict__ for module in model.modules())


def test_off_is_off() -> None:
    model = tiny_models.build("llama")
    report = patch_model(model, ChronicalsConfig(**dict.fromkeys(MODEL_PARTS, "off")))
    assert {part.state for part in report.parts} == {"off"}
    assert not any("_chronicals_patched" in module.__dict__ for module in model.modules())


def test_nan_weights_are_named() -> None:
    model = tiny_models.build("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        patch_model(model)


def test_infinite_weights_are_named_and_large_ones_are_not() -> None:
    model = tiny_models.build("llama")
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data.fill_(3e38)  # finite, though their sum is not
    patch_model(model)
    weight.data[3, 4] = -float("inf")
    with pytest.raises(ValueError, match=r"NaN or infinity .*first: model\.layers\.1\.mlp\.up_proj\.weight"):
        patch_model(model)


@pytest.mark.parametrize("part", ["packing", "lora_plus", "adamw", "cuda_graphs"])
def test_the_trainers_parts_are_refused_with_the_true_reason(part: str) -> None:
    with pytest.raises(RuntimeError, match=f"{part} is off: decided by the trainer, not by patch_model"):
        patch_model(tiny_models.build("llama"), {part: "on"})


def test_a_chosen_attention_implementation_is_kept() -> None:
    report = patch_model(tiny_models.build("llama", attn_implementation="eager"))
    assert report["attention"].state == "off" and "'eager'" in report["attention"].reason


def test_model_on_meta() -> None:
    """Verification draws parameters of its own: a model without values can be judged (ZeRO-3, `doctor`)."""
    config = tiny_models.build("llama").config
    with torch.device("meta"):
        import transformers

        model = transformers.LlamaForCausalLM(config)
    report = patch_model(model)
    assert all(report[name].state == "on" for name in MODEL_PARTS), report.render()


def test_base_model_of_a_wrapped_one() -> None:
    model = tiny_models.build("llama")
    assert base_model(_lora(model)) is model and base_model(model) is model


def test_a_module_of_no_known_kind() -> None:
    """A plain torch module: nothing fits, each part says why, nothing crashes."""
    report = patch_model(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))
    assert {part.state for part in report.parts} == {"off"}
    assert all(part.reason for part in report.parts)
    with pytest.raises(TypeError, match="must be a torch"):
        patch_model("Qwen/Qwen2.5-0.5B")


def test_parts_that_another_library_has_patched_are_left_alone() -> None:
    model = tiny_models.build("llama")
    norm = model.model.layers[0].input_layernorm
    norm.forward = lambda hidden_states: hidden_states
    report = patch_model(model)
    assert report["rms_norm"].modules == 4 and "another library" in report["rms_norm"].reason
    unpatch_model(model)
    assert norm.forward(1) == 1


def test_attention_outside_the_interface_is_kept() -> None:
    """Falcon asks for "sdpa" by name: under another name it would attend to the future."""
    config = transformers.FalconConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_hidden_size=48
    )
    torch.manual_seed(0)
    model = transformers.FalconForCausalLM(config).eval()
    ids = torch.arange(3, 15)[None]
    expected = model(input_ids=ids).logits
    report = patch_model(model)
    assert report["attention"].state == "off" and "interface" in report["attention"].reason
    torch.testing.assert_close(model(input_ids=ids).logits, expected)
