"""Attention that gives cos and sin to others than our rotation: to a second function, to a part of its own."""

from __future__ import annotations

import pytest
import tiny_models
import torch
import transformers
from torch import nn
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

from chronicals_trl import patch_model
from chronicals_trl.model import match, rope

NORMS = "q/k norms done by the rotation in 2 layers"


def step(model: nn.Module) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = model(**tiny_models.packed_batch(), use_cache=False).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def require_same(ours: nn.Module, theirs: nn.Module) -> None:
    (loss, gradients), (expected, reference) = step(ours), step(theirs)
    assert loss == pytest.approx(expected, rel=1e-6) and gradients.keys() == reference.keys()
    for name, gradient in reference.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def counted(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each call of our two ops from now on: whether it took the tables' second half for granted."""
    calls: list[bool] = []

    def count(op):
        def counting(*args, **kwargs):
            calls.append(kwargs["repeats"])
            return op(*args, **kwargs)

        return counting

    for name in ("qk_rope", "qk_norm_rope"):
        monkeypatch.setattr(rope, name, count(getattr(rope, name)))
    return calls


# -- families of transformers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("interleave", [True, False])
def test_deepseek_v3(interleave: bool) -> None:
    """Its attention chooses between the usual rotation and another; by default it is the other."""
    models = [tiny_models.build("deepseek_v3", rope_interleave=interleave) for _ in range(2)]
    report = patch_model(models[0])
    part = report["qk_rope"]
    assert part.state == "off" and part.omitted
    assert part.reason == (
        "2 left out, DeepseekV3Attention: it may rotate by another function instead (apply_rotary_pos_emb_interleave)"
    )
    assert all(report[name].state == "on" for name in ("rms_norm", "gated_mlp", "head"))
    require_same(*models)


def test_deepseek_v32() -> None:
    """Its indexer rotates too, and is taken; under a name of ours for the implementation its choice would be lost."""
    models = [tiny_models.build("deepseek_v32") for _ in range(2)]
    report = patch_model(models[0])
    assert report["attention"].state == "off"
    assert "DeepseekV32Attention asks for 'sdpa' by name" in report["attention"].reason
    require_same(*models)
    models[1].config.index_topk = 64
    everything = tiny_models.build("deepseek_v32", index_topk=64)
    assert step(everything)[0] != pytest.approx(step(models[0])[0], rel=1e-4)  # its choice matters here


def test_gemma4(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its configuration has another head dimension for each kind of layer, and refuses to name one."""
    models = [tiny_models.build("gemma4") for _ in range(2)]
    report = patch_model(models[0])
    assert "cannot be judged" not in str([part.reason for part in report.parts])
    require_same(*models)


# -- somebody else ---------------------------------------------------------------------------------------------------


class Reader(nn.Module):
    """A part of an attention block that is given cos and sin, and takes them for what they are."""

    def forward(self, x: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        cos, sin = tables
        assert isinstance(cos, torch.Tensor) and cos.shape == sin.shape
        size = cos.shape[-1]
        return torch.cat([x[..., :size] * cos + sin.square(), x[..., size:]], -1)


class Rotating(nn.Module):
    """Another, with a rotation of its own, by the usual function."""

    def forward(self, x: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        cos, sin = position_embeddings
        q, _ = apply_rotary_pos_emb(x[:, None, :, : cos.shape[-1]], x[:, None, :, -cos.shape[-1] :], cos, sin)
        return torch.cat([q[:, 0], x[..., cos.shape[-1] :]], -1)


class ByNames(Rotating):
    """As before, but its function is called in another way (Qwen4-Exp's with the queries alone)."""

    def forward(self, x: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        cos, sin = position_embeddings
        size = cos.shape[-1]
        q, _ = apply_rotary_pos_emb(x[:, None, :, :size], x[:, None, :, -size:], cos=cos, sin=sin)
        return torch.cat([q[:, 0], x[..., size:]], -1)


class Attention(modeling_qwen3.Qwen3Attention):
    """Qwen 3's, with such parts in front."""

    skips = False
    part: type[nn.Module] = Rotating

    def __init__(self, config, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.reader, self.rotating = Reader(), self.part()

    def forward(self, hidden_states, position_embeddings, attention_mask=None, **kwargs):
        hidden_states = self.reader(hidden_states, position_embeddings)
        hidden_states = self.rotating(hidden_states, position_embeddings=position_embeddings)
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(shape)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden_states).view(shape)).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        cos, sin = position_embeddings
        if not self.skips:
            query, key = apply_rotary_pos_emb(query, key, cos, sin)
        interface = transformers.AttentionInterface().get_interface(self.config._attn_implementation, eager)
        kwargs = {name: kwargs.get(name) for name in ("cu_seq_lens_q", "max_length_q")}
        out, _ = interface(self, query, key, value, attention_mask, scaling=self.scaling, **kwargs)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), None


eager = modeling_qwen3.eager_attention_forward


class AroundByNames(Attention):
    part = ByNames


class Scaled(Attention):
    """One that rotates by tables of its own making, whose halves differ."""

    def forward(self, hidden_states, position_embeddings, attention_mask=None, **kwargs):
        cos, sin = position_embeddings
        ramp = torch.linspace(0.5, 1.5, cos.shape[-1])
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(shape)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden_states).view(shape)).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, cos * ramp, sin * ramp)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        interface = transformers.AttentionInterface().get_interface(self.config._attn_implementation, eager)
        kwargs = {name: kwargs.get(name) for name in ("cu_seq_lens_q", "max_length_q")}
        out, _ = interface(self, query, key, value, attention_mask, scaling=self.scaling, **kwargs)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), None


def with_attention(kind: type[nn.Module]) -> nn.Module:
    model = tiny_models.build("qwen3")
    for layer in model.model.layers:
        own = layer.self_attn
        layer.self_attn = kind(own.config, own.layer_idx)
        layer.self_attn.load_state_dict(own.state_dict())
    return model.train()


def test_parts_of_a_block_get_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """One reads cos, one is a block with a rotation of its own, which knows nothing of the norms around it."""
    models = [with_attention(Attention) for _ in range(2)]
    report = patch_model(models[0])
    assert report["qk_rope"].modules == 4 and NORMS in report.notes
    calls = counted(monkeypatch)
    require_same(*models)
    assert calls == [False, True] * 2 and match.DEPUTIES.rotation is None


def test_a_rotation_called_in_another_way_is_the_models_own(monkeypatch: pytest.MonkeyPatch) -> None:
    models = [with_attention(AroundByNames) for _ in range(2)]
    assert patch_model(models[0])["qk_rope"].modules == 4
    calls = counted(monkeypatch)
    require_same(*models)
    assert calls == [True] * 2


def test_tables_that_the_block_makes_are_read_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    models = [with_attention(Scaled) for _ in range(2)]
    assert NORMS in patch_model(models[0]).notes
    calls = counted(monkeypatch)
    require_same(*models)
    assert calls == [False] * 2


def test_norms_without_a_weight_are_the_models_own() -> None:
    """Dory's."""

    class L2Norm(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.normalize(x, dim=-1)

    models = [tiny_models.build("qwen3") for _ in range(2)]
    for model in models:
        for layer in model.model.layers:
            layer.self_attn.q_norm, layer.self_attn.k_norm = L2Norm(), L2Norm()
    report = patch_model(models[0])
    assert report["qk_rope"].modules == 2 and NORMS not in report.notes
    require_same(*models)


def test_a_block_that_stops_to_rotate_is_an_error() -> None:
    """Its norms have let their input pass: it would go on without them."""
    model = with_attention(Attention)
    patch_model(model)
    for layer in model.model.layers:
        layer.self_attn.skips = True
    with pytest.raises(RuntimeError, match=r"Attention has not called apply_rotary_pos_emb.*'qk_rope': 'off'"):
        step(model)
    assert not match.DEPUTIES.norms and match.DEPUTIES.rotation is None


def test_a_block_called_with_positions_alone_is_not_taken_for_the_one_around_it() -> None:
    """As blocks are that call theirs so; what is noted for the outer block is not for the inner one."""
    model = with_attention(Attention)
    patch_model(model)
    block = model.model.layers[0].self_attn
    seen: list[object] = []
    inner = block.rotating

    def call(x, tables):
        seen.append(match.DEPUTIES.rotation)
        out = rope.attention_forward(inner, x, tables)
        seen.append(match.DEPUTIES.rotation)
        return out

    inner.forward = lambda x, position_embeddings: call(x, position_embeddings)
    theirs = with_attention(Attention)
    require_same(model, theirs)
    assert seen[0] is seen[1] is not None
