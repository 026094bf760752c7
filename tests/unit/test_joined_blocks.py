"""What patching joins beyond single blocks: residual additions and norms, q/k/v, q/k norms, the MLP as one node."""

from __future__ import annotations

import copy
import functools
import pickle
import threading

import pytest
import tiny_models
import torch
import transformers
from torch import nn

from chronicals_trl import patch_model, unpatch_model
from chronicals_trl.kernels import _gated_mlp, _shared_linear, rms_norm_reference
from chronicals_trl.model import decoder, match, rope

RESIDUALS = "residual additions joined to the norms in 2 layers"
NORMS = "q/k norms done by the rotation in 2 layers"
SHARED = "q, k and v as one node in 2 layers"
JOINED = {
    "llama": {RESIDUALS, SHARED},
    "mistral": {RESIDUALS, SHARED},
    "qwen2": {RESIDUALS, SHARED},
    "smollm3": {RESIDUALS, SHARED},
    "gemma2": {RESIDUALS, SHARED},
    "qwen3": {RESIDUALS, NORMS, SHARED},
    "gemma3": {RESIDUALS, NORMS, SHARED},
    "qwen3_moe": {RESIDUALS, NORMS, SHARED},
    "phi3": {RESIDUALS},  # one projection already
    "granite": {SHARED},  # its residual branches are scaled
    "olmo2": {SHARED},  # norms behind the branches, and over all heads
    "gpt2": set(),
}


def gradients(model: nn.Module, **options) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    model(**tiny_models.packed_batch(), use_cache=False, **options).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def require_same(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_what_is_joined(family: str) -> None:
    model = tiny_models.build(family)
    bare = tiny_models.build(family)
    assert set(patch_model(model).notes) == JOINED[family]
    require_same(gradients(model), gradients(bare))


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "olmo2"])
def test_projections_are_one_node_also_where_the_norms_are_the_models_own(family: str) -> None:
    model = tiny_models.build(family)
    assert patch_model(model, {"rms_norm": "off"}).notes == [SHARED]
    require_same(gradients(model), gradients(tiny_models.build(family)))


def deferred_outputs(model: nn.Module, monkeypatch: pytest.MonkeyPatch, **options) -> int:
    """How many layers of one training pass hand their last addition on."""
    made = []
    original = decoder.Deferred.__init__

    def count(self, *args):
        made.append(self)
        original(self, *args)

    monkeypatch.setattr(decoder.Deferred, "__init__", count)
    gradients(model, **options)
    monkeypatch.undo()
    return len(made)


def patched(family: str = "llama", **options) -> nn.Module:
    model = tiny_models.build(family, **options)
    patch_model(model)
    return model.train()


def test_the_last_addition_travels(monkeypatch) -> None:
    assert deferred_outputs(patched(num_hidden_layers=3), monkeypatch) == 2  # the last layer gives a tensor


def test_the_addition_is_made_where_somebody_looks(monkeypatch) -> None:
    expected = gradients(tiny_models.build("llama"))
    model = patched()
    seen = []
    handle = model.model.layers[0].register_forward_hook(lambda module, args, output: seen.append(output))
    assert deferred_outputs(model, monkeypatch) == 0
    assert isinstance(seen[0], torch.Tensor)
    require_same(gradients(model), expected)
    handle.remove()
    assert deferred_outputs(model, monkeypatch) == 1


def test_a_hook_on_the_following_layer_sees_a_tensor(monkeypatch) -> None:
    model = patched()
    seen = []
    model.model.layers[1].register_forward_pre_hook(lambda module, args: seen.append(type(args[0])))
    assert deferred_outputs(model, monkeypatch) == 0
    assert seen == [torch.Tensor]


def test_a_layer_whose_forward_was_replaced_since_gets_a_tensor(monkeypatch) -> None:
    model = patched()
    layer, seen = model.model.layers[1], []
    inner = layer.forward
    layer.forward = lambda x, **kwargs: (seen.append(type(x)), inner(x, **kwargs))[1]
    assert deferred_outputs(model, monkeypatch) == 0
    assert seen == [torch.Tensor]


def test_layers_that_have_changed_places_hand_nothing_on(monkeypatch) -> None:
    """The last one would otherwise leave its addition to nobody."""
    model, bare = patched(num_hidden_layers=3), tiny_models.build("llama", num_hidden_layers=3).train()
    for m in (model, bare):
        m.model.layers = nn.ModuleList([m.model.layers[i] for i in (2, 1, 0)])
    require_same(gradients(model), gradients(bare))
    layers = model.model.layers
    decoder.link_layers(model)
    layers[0], layers[1] = layers[1], layers[0]
    assert [layer.__dict__[decoder.HANDS_ON].of(layer) for layer in layers[:2]] == [None, None]
    assert deferred_outputs(model, monkeypatch) == 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_keeps_one_tensor_a_layer(monkeypatch, reentrant: bool) -> None:
    model = patched()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert deferred_outputs(model, monkeypatch) == 0


def test_a_deferred_stream_behaves_as_its_sum() -> None:
    a, b = torch.randn(2, 3, 4), torch.randn(2, 3, 4)

    def look(x):
        return (x.shape, x + 1.0, 2 * x, x - b, b - x, x**2, abs(x), x[:, 0], torch.tanh(x), torch.cat([x, x]), len(x))

    for ours, theirs in zip(look(decoder.Deferred(a, b)), look(b + a), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_positional_call_gets_the_sum() -> None:
    """A model that hands its mask on by position has the layer's own code run, on a tensor."""
    model, bare = patched(), tiny_models.build("llama").train()
    stream = decoder.Deferred(torch.randn(1, 4, model.config.hidden_size), torch.randn(1, 4, model.config.hidden_size))
    tables = model.model.rotary_emb(stream.sum_up(), torch.arange(4)[None])
    ours = model.model.layers[1](stream, None, position_embeddings=tables)
    theirs = bare.model.layers[1](stream.sum_up(), None, position_embeddings=tables)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_goes_on(monkeypatch, reentrant: bool) -> None:
    expected = gradients(tiny_models.build("qwen3"))
    model = patched("qwen3")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    calls = []
    original = decoder._layer
    monkeypatch.setattr(decoder, "_layer", lambda *a, **k: (calls.append(1), original(*a, **k))[1])
    require_same(gradients(model), expected)
    assert len(calls) == 4  # two layers, each computed a second time in the backward pass


def need_checkpoints_in_the_forward(model: nn.Module) -> None:
    if not model.model.layers[0].__dict__[match.SPEC].checkpoints:
        pytest.skip("this transformers checkpoints around the layer's forward")


def results_not_needed(monkeypatch) -> list[bool]:
    """What each MLP's node is told; where its result is not needed, nobody may read it: it is NaN."""
    told = []
    original = match.gated_mlp

    def gated_mlp(*args, result_needed: bool, **kwargs):
        told.append(not result_needed)
        out = original(*args, **kwargs)
        if not result_needed:
            out.data.fill_(torch.nan)
        return out

    monkeypatch.setattr(match, "gated_mlp", gated_mlp)
    return told


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    ("family", "again"), [("llama", True), ("qwen3", True), ("phi3", True), ("gemma2", False)]
)  # Gemma's norm behind the MLP keeps its result
def test_a_layer_computed_again_leaves_the_last_product_out(
    monkeypatch, family: str, again: bool, reentrant: bool
) -> None:
    expected = gradients(tiny_models.build(family))
    model = patched(family)
    need_checkpoints_in_the_forward(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    told = results_not_needed(monkeypatch)
    for _ in range(2):
        told.clear()
        require_same(gradients(model), expected)
        # The first pass of a reentrant checkpoint is without gradients, and so without the node.
        assert told == [False] * (0 if reentrant else 2) + [again, again]


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_a_checkpoint_of_the_whole_model_the_layers_results_are_needed(monkeypatch, reentrant: bool) -> None:
    """Its recomputation runs each layer for its result, and each layer's own checkpoint once more."""
    expected = gradients(tiny_models.build("llama"))
    model = patched()
    need_checkpoints_in_the_forward(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    told = results_not_needed(monkeypatch)
    batch = tiny_models.packed_batch()
    embedded = model.get_input_embeddings()(batch.pop("input_ids"))
    run = functools.partial(model, **batch, use_cache=False)
    torch.utils.checkpoint.checkpoint(
        lambda x: run(inputs_embeds=x).loss, embedded, use_reentrant=reentrant
    ).backward()
    assert told == [False] * (0 if reentrant else 4) + [True] * 2
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    require_same(ours, expected)


def test_who_looks_at_an_mlp_sees_its_result_each_time(monkeypatch) -> None:
    model = patched()
    need_checkpoints_in_the_forward(model)
    # (The other kind stops before the hook, once it has what it needs.)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    told, seen = results_not_needed(monkeypatch), []
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: seen.append(out.isfinite().all().item()))
    gradients(model)
    assert seen == [True, True] and told == [True, False]


def test_hidden_states_are_those_of_the_stock_model() -> None:
    bare, model = tiny_models.build("llama").train(), patched()
    batch = tiny_models.packed_batch()
    ours, theirs = (m(**batch, output_hidden_states=True, use_cache=False).hidden_states for m in (model, bare))
    assert len(ours) == len(theirs) == 3
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_dropout_on_the_branches_is_not_lost() -> None:
    notes = patch_model(tiny_models.build("phi3", resid_pdrop=0.3)).notes
    assert RESIDUALS not in notes


@pytest.mark.parametrize("first", [1.0, 0.3])
def test_a_multiplier_is_judged_model_by_model(first: float) -> None:
    """Granite with a multiplier of 1 is Llama; with another it is not, whatever was judged before."""
    for multiplier in (first, 1.3 - first):
        model = tiny_models.build("granite", residual_multiplier=multiplier)
        assert (RESIDUALS in patch_model(model).notes) == (multiplier == 1.0)
        require_same(gradients(model), gradients(tiny_models.build("granite", residual_multiplier=multiplier)))


def test_a_setting_of_one_layer_is_judged_by_itself() -> None:
    """Two instances of one class may compute different things: the second is not taken for the first."""

    class Scaled(transformers.models.llama.modeling_llama.LlamaRMSNorm):
        scale = 1.0

        def forward(self, hidden_states):
            return super().forward(hidden_states) * self.scale

    model = tiny_models.build("llama")
    for layer, scale in zip(model.model.layers, (1.0, 3.0), strict=True):
        norm = Scaled(model.config.hidden_size)
        norm.scale = scale
        layer.input_layernorm = norm
    report = patch_model(model)
    assert report["rms_norm"].modules == 4
    assert "1 left out, Scaled" in report["rms_norm"].reason
    assert "forward" not in model.model.layers[1].input_layernorm.__dict__


def test_an_activation_function_is_judged_by_itself() -> None:
    model = tiny_models.build("llama")
    for layer, function in zip(model.model.layers, (nn.functional.silu, nn.functional.relu), strict=True):
        del layer.mlp.act_fn
        layer.mlp.act_fn = function
    report = patch_model(model)
    assert report["gated_mlp"].modules == 1
    assert "forward" not in model.model.layers[1].mlp.__dict__


# -- who has hooked, replaced or frozen something gets what they would have got ---------------------------------------


def nodes(monkeypatch, model: nn.Module) -> tuple[int, int]:
    """Calls of the MLP's node and of the shared projections in one training pass."""
    calls = {"mlp": 0, "shared": 0}

    def counted(key, original):
        def call(*args, **kwargs):
            calls[key] += 1
            return original(*args, **kwargs)

        return call

    monkeypatch.setattr(match, "gated_mlp", counted("mlp", _gated_mlp.gated_mlp))
    monkeypatch.setattr(rope, "shared_linear", counted("shared", _shared_linear.shared_linear))
    gradients(model)
    monkeypatch.undo()
    return calls["mlp"], calls["shared"]


def test_nodes_are_used(monkeypatch) -> None:
    assert nodes(monkeypatch, patched()) == (2, 2)
    assert nodes(monkeypatch, patched("phi3")) == (2, 0)


@pytest.mark.parametrize("where", ["mlp.up_proj", "self_attn.k_proj", "self_attn.q_norm", "post_attention_layernorm"])
def test_a_hooked_module_is_called(monkeypatch, where: str) -> None:
    """Hooks see their module's own input and output (DeepSpeed ZeRO-3 gathers weights in them)."""
    records = {}
    for name in ("bare", "ours"):
        model = tiny_models.build("qwen3").train() if name == "bare" else patched("qwen3")
        module = model.model.layers[0].get_submodule(where)
        seen = records[name] = []
        module.register_forward_hook(lambda m, args, out, seen=seen: seen.append((args[0].detach(), out.detach())))
        records[name + " gradients"] = gradients(model)
    require_same(records["ours gradients"], records["bare gradients"])
    assert len(records["ours"]) == 1
    for ours, theirs in zip(records["ours"][0], records["bare"][0], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_global_hooks_see_every_module() -> None:
    names = {}
    for name, model in (("bare", tiny_models.build("llama").train()), ("ours", patched())):
        seen = names[name] = []
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, args, out, seen=seen: seen.append(type(module).__name__)
        )
        gradients(model)
        handle.remove()
    # The activation inside an MLP is the op's from the start.
    assert names["ours"] == [name for name in names["bare"] if name != "SiLUActivation"]


def test_an_adapter_put_in_later_is_trained(monkeypatch) -> None:
    """PEFT replaces q_proj and down_proj after patching: nothing is handed past its layers."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    wrapped = {}
    for name in ("bare", "ours"):
        model = tiny_models.build("llama") if name == "bare" else patched()
        torch.manual_seed(1)
        wrapped[name] = peft.get_peft_model(model, config).train()
    require_same(gradients(wrapped["ours"]), gradients(wrapped["bare"]))
    assert nodes(monkeypatch, wrapped["ours"]) == (0, 0)


def test_frozen_projections_get_no_gradient() -> None:
    models = [tiny_models.build("llama").train(), patched()]
    for model in models:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not any(n in name for n in ("k_proj", "up_proj", "layers.1.mlp.down_proj")))
    ours, theirs = gradients(models[1]), gradients(models[0])
    assert not any("k_proj" in name for name in ours)
    require_same(ours, theirs)


def test_an_error_in_the_block_leaves_nothing_behind() -> None:
    model = patched("qwen3")
    block = model.model.layers[0].self_attn
    with pytest.raises(RuntimeError):
        model(input_ids=torch.zeros(1, 4, dtype=torch.long), attention_mask=torch.ones(1, 1, 3, 9), use_cache=False)
    assert not match.DEPUTIES.norms and not match.DEPUTIES.projections and match.DEPUTIES.rotation is None
    x = torch.randn(1, 3, block.head_dim)
    torch.testing.assert_close(block.q_norm(x), type(block.q_norm).forward(block.q_norm, x))


def test_an_error_between_handing_and_taking_leaves_nothing_behind() -> None:
    model = patched("qwen3")
    block = model.model.layers[0].self_attn

    def fail(*args):
        raise ValueError("between")

    # q_proj is called first; the hook makes q's norm an ordinary call, in front of k's and v's projections.
    block.q_norm.register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="between"):
        gradients(model)
    assert not match.DEPUTIES.norms and not match.DEPUTIES.projections and match.DEPUTIES.rotation is None


def test_biases_of_the_mlp_are_not_lost(monkeypatch) -> None:
    """The node has none: such an MLP calls its projections."""
    models = [tiny_models.build("llama", mlp_bias=True).train(), patched(mlp_bias=True)]
    found = []
    for model in models:
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data.fill_(0.3)
        found.append(gradients(model))
    require_same(found[1], found[0])
    assert nodes(monkeypatch, models[1]) == (0, 2)


def test_norms_of_two_epsilons_are_not_done_by_the_rotation() -> None:
    """It has one for q and k. A small difference would pass the comparison by number."""
    model = tiny_models.build("qwen3")
    for layer in model.model.layers:
        layer.self_attn.k_norm.variance_epsilon *= 1.5
    notes = patch_model(model).notes
    assert NORMS not in notes and SHARED in notes


def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
    return transformers.models.llama.modeling_llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)


def rotates_another_way(q, k, cos, sin):
    return apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)


def test_norms_that_have_let_pass_are_made_up_for_where_the_rotation_is_called_another_way(monkeypatch) -> None:
    torch.manual_seed(0)
    q, k = (torch.randn(1, 5, heads, 8) for heads in (4, 2))  # the heads behind the sequence
    weights, (cos, sin) = (torch.rand(8), torch.rand(8)), torch.randn(2, 1, 5, 8)
    asked = rope._Rotation((cos, sin), False, rope._Norms(*weights, 1e-6, 1.0))
    monkeypatch.setattr(match.DEPUTIES, "rotation", asked)
    ours = rope._copy_with_rope(rotates_another_way)(q, k, cos, sin)
    assert not asked.pending
    normed = (rms_norm_reference(x, w, 1e-6, 1.0) for x, w in zip((q, k), weights, strict=True))
    torch.testing.assert_close(ours, rotates_another_way(*normed, cos, sin))


def replaced(model: nn.Module, where: str) -> None:
    norm = model.model.layers[0].get_submodule(where)
    inner = norm.forward
    norm.forward = lambda x: inner(x) * 2


def subclassed(model: nn.Module, where: str) -> None:
    parent, _, name = where.rpartition(".")
    old = model.model.layers[0].get_submodule(where)

    class Doubled(type(old)):
        def forward(self, x):
            return super().forward(x) * 2

    new = Doubled(old.weight.shape[0])
    new.weight = old.weight
    setattr(model.model.layers[0].get_submodule(parent), name, new)


@pytest.mark.parametrize("how", [replaced, subclassed])
@pytest.mark.parametrize("where", ["self_attn.q_norm", "self_attn.k_norm", "post_attention_layernorm"])
def test_what_is_replaced_after_patching_counts(how, where: str) -> None:
    bare, model = tiny_models.build("qwen3").train(), patched("qwen3")
    for m in (bare, model):
        how(m, where)
    require_same(gradients(model), gradients(bare))


def test_norms_that_peft_copies_after_patching_are_applied_once() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["o_proj"], modules_to_save=["q_norm", "k_norm"])
    wrapped = []
    for model in (tiny_models.build("qwen3"), patched("qwen3")):
        torch.manual_seed(1)
        wrapped.append(peft.get_peft_model(model, config).train())
    require_same(gradients(wrapped[1]), gradients(wrapped[0]))


def test_a_hook_on_the_following_layer_may_write() -> None:
    models = [tiny_models.build("llama").train(), patched()]
    for model in models:
        model.model.layers[1].register_forward_pre_hook(lambda m, args: (args[0].mul_(2), None)[1])
    require_same(gradients(models[1]), gradients(models[0]))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_of_somebody_elses(reentrant: bool) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

    kind = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
    models = [tiny_models.build("llama", num_hidden_layers=3).train(), patched(num_hidden_layers=3)]
    found = []
    for model in models:
        for i, layer in enumerate(model.model.layers):
            model.model.layers[i] = checkpoint_wrapper(layer, checkpoint_impl=kind)
        model.enable_input_require_grads()
        found.append(gradients(model))
    require_same(found[1], found[0])


def test_threads_do_not_take_each_others_projections() -> None:
    model = patched("qwen3").eval()
    batches = [{"input_ids": torch.full((1, 24), 5 + i), "use_cache": False} for i in range(4)]
    expected = [model(**batch).logits.detach() for batch in batches]
    worst = [0.0] * len(batches)

    def work(i: int) -> None:
        for _ in range(20):
            worst[i] = max(worst[i], (model(**batches[i]).logits - expected[i]).abs().max().item())

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(worst) < 1e-6


def test_a_projection_shared_by_two_blocks_is_given_back() -> None:
    model = tiny_models.build("llama")
    model.model.layers[1].self_attn.q_proj = model.model.layers[0].self_attn.q_proj
    patch_model(model)
    unpatch_model(model)
    assert "forward" not in model.model.layers[0].self_attn.q_proj.__dict__


def test_copies_and_pickles_train_themselves() -> None:
    model = patched("qwen3")
    expected = gradients(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        model.zero_grad(set_to_none=True)
        require_same(gradients(twin), expected)
        assert all(p.grad is None for p in model.parameters())


def test_unpatching_takes_the_joins_away() -> None:
    model = patched("qwen3")
    unpatch_model(model)
    for module in model.modules():
        assert not [name for name in module.__dict__ if name.startswith("_chronicals")]
        assert "forward" not in module.__dict__


@pytest.mark.parametrize("recompute", [False, True])
def test_recompute_mlp_reaches_every_mlp(recompute: bool) -> None:
    model = tiny_models.build("llama")
    patch_model(model, {"recompute_mlp": recompute})
    assert [layer.mlp.__dict__[match.SPEC].recompute for layer in model.model.layers] == [recompute] * 2


def test_recompute_mlp_is_handed_to_the_node(monkeypatch) -> None:
    model = tiny_models.build("llama").train()
    patch_model(model, {"recompute_mlp": True})
    given = []
    original = match.gated_mlp
    monkeypatch.setattr(match, "gated_mlp", lambda *a, **k: (given.append(k["recompute"]), original(*a, **k))[1])
    gradients(model)
    assert given == [True, True]


# -- cos and sin -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
def test_the_tables_of_models_repeat(family: str) -> None:
    model = patched(family)
    assert all(layer.self_attn.__dict__[match.SPEC].repeats for layer in model.model.layers)


def test_the_tables_of_each_kind_of_layer_are_looked_at() -> None:
    model = tiny_models.build("gemma3", layer_types=["sliding_attention", "full_attention"])
    rotary = model.model.rotary_emb
    tables = rope._tables_of(rotary)
    assert len(tables) == 2 * len(set(rotary.config.layer_types)) == 4


def test_tables_that_do_not_repeat_are_read_whole() -> None:
    class Uneven(type(tiny_models.build("llama").model.rotary_emb)):
        def forward(self, x, position_ids):
            cos, sin = super().forward(x, position_ids)
            ramp = torch.linspace(0.5, 1.0, cos.shape[-1])
            return cos * ramp, sin * ramp

    models = []
    for _ in range(2):
        model = tiny_models.build("llama").train()
        model.model.rotary_emb = Uneven(model.config)
        models.append(model)
    patch_model(models[1])
    assert not models[1].model.layers[0].self_attn.__dict__[match.SPEC].repeats
    require_same(gradients(models[1]), gradients(models[0]))
