"""LoRA+ groups: which parameter learns at which rate, on bare groups and on live optimizers."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from chronicals_trl.optim import apply_lora_plus, split_lora_plus_groups

peft = pytest.importorskip("peft")

LR = 1e-3


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.q_proj = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11)

    def forward(self, ids):
        return self.head(self.norm(self.q_proj(self.embed(ids))))


def lora_net(**config):
    torch.manual_seed(0)
    config = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False, **config}
    return peft.get_peft_model(Net(), peft.LoraConfig(**config))


def trainable(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def rates(model, groups, key="lr"):
    """name of parameter -> rate; also that each trainable parameter is there once."""
    names = {id(p): n for n, p in model.named_parameters()}
    found = {}
    for group in groups:
        assert group["params"], "an empty group breaks DeepSpeed"
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert name not in found
            found[name] = group[key]
    assert found.keys() == trainable(model).keys()
    return found


def one_group(model, **options):
    return [{"params": list(trainable(model).values()), "lr": LR, **options}]


def test_b_learns_ratio_times_faster_and_a_does_not():
    model = lora_net()
    found = rates(model, split_lora_plus_groups(model, one_group(model), ratio=8))
    prefix = "base_model.model.q_proj"
    assert found == {f"{prefix}.lora_A.default.weight": LR, f"{prefix}.lora_B.default.weight": LR * 8}
    assert model.base_model.model.q_proj.lora_B["default"].weight.shape == (8, 4)


def test_default_ratio_is_16():
    model = lora_net()
    assert sorted(rates(model, split_lora_plus_groups(model, one_group(model))).values()) == [LR, LR * 16]


def test_modules_to_save_norms_biases_and_magnitudes_keep_the_rate():
    model = lora_net(modules_to_save=["head", "norm"], use_dora=True, bias="all")
    found = rates(model, split_lora_plus_groups(model, one_group(model)))
    fast = {name for name, lr in found.items() if lr == LR * 16}
    assert fast == {"base_model.model.q_proj.lora_B.default.weight"}
    slow = {name for name, lr in found.items() if lr == LR}
    assert fast | slow == found.keys()
    for part in ("head.modules_to_save", "norm.modules_to_save", "lora_magnitude_vector", "q_proj.base_layer.bias"):
        assert any(part in name for name in slow), part


def test_bias_of_b_learns_with_b():
    model = lora_net(lora_bias=True)
    found = rates(model, split_lora_plus_groups(model, one_group(model)))
    assert found["base_model.model.q_proj.lora_B.default.bias"] == LR * 16


def test_one_dimensional_shards_are_told_apart():
    """ZeRO-3 and FSDP1 leave flat parameters: the number of dimensions says nothing."""
    model = lora_net(modules_to_save=["norm"])
    for parameter in model.parameters():
        parameter.data = parameter.data.flatten()[:0]
    found = rates(model, split_lora_plus_groups(model, one_group(model)))
    assert {n for n, lr in found.items() if lr != LR} == {"base_model.model.q_proj.lora_B.default.weight"}


@pytest.mark.parametrize("names", [("one", "two"), ("lora_A", "lora_B")])
def test_several_adapters_whatever_their_names(names):
    model = lora_net()
    for name in names:
        model.add_adapter(name, peft.LoraConfig(r=2, target_modules=["q_proj"], use_rslora=True))
    model.base_model.set_adapter(["default", *names])
    found = rates(model, split_lora_plus_groups(model, one_group(model)))
    assert len(found) == 6
    for name, lr in found.items():
        assert lr == (LR * 16 if ".q_proj.lora_B." in name else LR), name


@pytest.mark.parametrize("embedding_lr", [None, 1e-6])
def test_embeddings(embedding_lr):
    model = lora_net(target_modules=["q_proj", "embed"])
    groups = split_lora_plus_groups(model, one_group(model), embedding_lr=embedding_lr)
    found = rates(model, groups)
    for part in ("lora_embedding_A", "lora_embedding_B"):
        assert found[f"base_model.model.embed.{part}.default"] == (LR if embedding_lr is None else 1e-6)
    assert len(groups) == (2 if embedding_lr is None else 3)


def test_every_option_and_the_order_are_kept():
    model = lora_net(modules_to_save=["head", "norm"])
    parameters = trainable(model)
    decay = [p for n, p in parameters.items() if "norm" not in n and "bias" not in n]
    no_decay = [p for n, p in parameters.items() if "norm" in n or "bias" in n]
    given = [
        {"params": decay, "lr": LR, "weight_decay": 0.1, "betas": (0.8, 0.9)},
        {"params": no_decay, "lr": LR, "weight_decay": 0.0, "betas": (0.7, 0.9)},
        {"params": [], "lr": LR, "weight_decay": 0.5},
    ]
    before = copy.copy(given[0])
    groups = split_lora_plus_groups(model, given)
    assert given[0] == before and given[0]["params"] is decay
    assert [g["weight_decay"] for g in groups] == [0.1, 0.1, 0.0]
    assert [g["betas"] for g in groups] == [(0.8, 0.9), (0.8, 0.9), (0.7, 0.9)]
    assert [g["lr"] for g in groups] == [LR, LR * 16, LR]
    fast = trainable(model)["base_model.model.q_proj.lora_B.default.weight"]
    assert [id(p) for p in groups[0]["params"]] == [id(p) for p in decay if p is not fast]
    assert [id(p) for p in groups[2]["params"]] == [id(p) for p in no_decay]


def test_groups_of_different_rates():
    model = lora_net()
    a, b = trainable(model).values()
    groups = split_lora_plus_groups(model, [{"params": [a], "lr": 1e-2}, {"params": b, "lr": 1e-4}], ratio=2)
    assert [g["lr"] for g in groups] == [1e-2, 2e-4]


def test_named_parameters_stay_with_their_tensors():
    model = lora_net(modules_to_save=["norm"])
    named = [(n, p) for n, p in trainable(model).items()]
    for groups in (
        split_lora_plus_groups(model, [{"params": iter(named), "lr": LR}]),
        split_lora_plus_groups(model, torch.optim.AdamW(named, lr=LR).param_groups),
    ):
        optimizer = torch.optim.AdamW(groups)
        pairs = [
            (n, p)
            for group in optimizer.param_groups
            for n, p in zip(group["param_names"], group["params"], strict=True)
        ]
        assert len(pairs) == len(named)
        assert {n: id(p) for n, p in pairs} == {n: id(p) for n, p in named}


def test_apply_on_a_live_optimizer_moves_b_further():
    model = lora_net()
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.zero_()
    optimizer = torch.optim.SGD(trainable(model).values(), lr=LR)
    groups_object = optimizer.param_groups
    summary = apply_lora_plus(optimizer, model, ratio=16)
    assert optimizer.param_groups is groups_object
    assert summary == {
        "ratio": 16.0,
        "embedding_lr": None,
        "tensors": {"A": 1, "B": 1, "embedding": 0, "other": 0},
        "groups": [{"lr": LR, "tensors": 1, "kind": "base"}, {"lr": LR * 16, "tensors": 1, "kind": "B"}],
    }
    for parameter in trainable(model).values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    layer = model.base_model.model.q_proj
    torch.testing.assert_close(layer.lora_A["default"].weight, torch.full((4, 8), -LR))
    torch.testing.assert_close(layer.lora_B["default"].weight, torch.full((8, 4), -LR * 16))


def test_same_steps_as_an_optimizer_built_with_the_groups():
    def train(optimizer_of):
        model = lora_net(modules_to_save=["norm"])
        optimizer = optimizer_of(model)
        for step in range(3):
            ids = torch.arange(step, step + 6)
            nn.functional.cross_entropy(model(ids), ids.flip(0)).backward()
            optimizer.step()
            optimizer.zero_grad()
        return trainable(model)

    def applied(model):
        optimizer = torch.optim.AdamW(trainable(model).values(), lr=LR, weight_decay=0.1)
        apply_lora_plus(optimizer, model)
        return optimizer

    def built(model):
        parameters = trainable(model)
        fast = [p for n, p in parameters.items() if "lora_B" in n]
        slow = [p for n, p in parameters.items() if "lora_B" not in n]
        return torch.optim.AdamW([{"params": slow}, {"params": fast, "lr": LR * 16}], lr=LR, weight_decay=0.1)

    ours, theirs = train(applied), train(built)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0)


def warm_up(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 4))


def test_the_ratio_survives_warm_up_and_a_checkpoint():
    def make():
        model = lora_net(modules_to_save=["norm"])
        optimizer = torch.optim.AdamW(trainable(model).values(), lr=LR)
        apply_lora_plus(optimizer, model, ratio=16)
        return model, optimizer, warm_up(optimizer)

    def step(model, optimizer, scheduler):
        ids = torch.arange(6)
        nn.functional.cross_entropy(model(ids), ids.flip(0)).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()

    model, optimizer, scheduler = make()
    for index in range(3):
        slow, fast = (g["lr"] for g in optimizer.param_groups)
        assert math.isclose(slow, LR * (index + 1) / 4) and math.isclose(fast, 16 * slow)
        assert scheduler.get_last_lr()[0] == slow  # what the Trainer logs
        step(model, optimizer, scheduler)

    resumed_model, resumed_optimizer, resumed_scheduler = make()
    resumed_model.load_state_dict(model.state_dict())
    resumed_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed_scheduler.load_state_dict(scheduler.state_dict())
    assert [g["lr"] for g in resumed_optimizer.param_groups] == [LR, LR * 16]
    step(model, optimizer, scheduler)
    step(resumed_model, resumed_optimizer, resumed_scheduler)
    for name, parameter in trainable(model).items():
        torch.testing.assert_close(trainable(resumed_model)[name], parameter, rtol=0, atol=0)


def test_initial_lr_is_scaled_with_lr():
    model = lora_net()
    groups = split_lora_plus_groups(model, one_group(model, initial_lr=1e-2))
    assert sorted(rates(model, groups, "initial_lr").values()) == [1e-2, 1e-2 * 16]


def test_tensor_rates_are_not_shared():
    model = lora_net()
    given = [{"params": list(trainable(model).values()), "lr": torch.tensor(LR)}]
    slow, fast = split_lora_plus_groups(model, given)
    fast["lr"].mul_(2)
    assert slow["lr"].item() == pytest.approx(LR) and fast["lr"].item() == pytest.approx(LR * 32)


def test_optimizers_that_override_add_param_group_see_each_group():
    class Counting(torch.optim.SGD):
        added = 0

        def add_param_group(self, param_group):
            self.added += 1
            super().add_param_group(param_group)

    model = lora_net()
    optimizer = Counting(trainable(model).values(), lr=LR)
    apply_lora_plus(optimizer, model)
    assert optimizer.added == 1 + 2


@pytest.mark.parametrize("name", ["ratio", "embedding_lr"])
@pytest.mark.parametrize("value", [0, 0.0, -1.0, math.inf, math.nan])
def test_values_out_of_range(name, value):
    model = lora_net()
    with pytest.raises(ValueError, match=f"{name} must be finite and above 0, got {value!r}"):
        split_lora_plus_groups(model, one_group(model), **{name: value})


@pytest.mark.parametrize("value", ["16", True])
def test_values_that_are_no_numbers(value):
    model = lora_net()
    with pytest.raises(TypeError, match="ratio must be a number"):
        split_lora_plus_groups(model, one_group(model), ratio=value)


def test_without_any_adapter():
    model = Net()
    with pytest.raises(ValueError, match=r"LoRA\+ without any adapter.*peft_config.*lora_plus='off'"):
        split_lora_plus_groups(model, [{"params": list(model.parameters()), "lr": LR}])


def test_adapters_that_the_optimizer_does_not_hold():
    model = lora_net()
    stranger = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match=r"the model has 2 trainable LoRA parameters, .* hold none of them"):
        split_lora_plus_groups(model, [{"params": [stranger], "lr": LR}])


def test_nothing_to_speed_up():
    model = lora_net()
    model.base_model.model.q_proj.lora_B["default"].requires_grad_(False)
    with pytest.raises(ValueError, match="no lora_B"):
        split_lora_plus_groups(model, one_group(model))
    model = lora_net(target_modules=["embed"])
    with pytest.raises(ValueError, match=r"embeddings alone.*lora_plus_embedding_lr"):
        split_lora_plus_groups(model, one_group(model))
    assert set(rates(model, split_lora_plus_groups(model, one_group(model), embedding_lr=1e-5)).values()) == {1e-5}


@pytest.mark.parametrize("group", [{}, {"lr": None}])
def test_a_group_without_a_rate(group):
    model = lora_net()
    with pytest.raises(ValueError, match=r"param_groups\[0\] has no lr.*lora_plus='off'"):
        split_lora_plus_groups(model, [{"params": list(trainable(model).values()), **group}])


def test_a_parameter_given_twice_and_a_set():
    model = lora_net()
    with pytest.raises(ValueError, match=r"param_groups\[1\].*once"):
        split_lora_plus_groups(model, one_group(model) + one_group(model))
    with pytest.raises(TypeError, match="set"):
        split_lora_plus_groups(model, [{"params": set(trainable(model).values()), "lr": LR}])


def test_an_optimizer_with_state_or_scheduler_is_refused_untouched():
    model = lora_net()
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=LR)
    warm_up(optimizer)
    with pytest.raises(ValueError, match="scheduler is attached"):
        apply_lora_plus(optimizer, model)

    optimizer = torch.optim.AdamW(trainable(model).values(), lr=LR)
    for parameter in trainable(model).values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with pytest.raises(ValueError, match="holds state for 2 parameters"):
        apply_lora_plus(optimizer, model)
    assert len(optimizer.param_groups) == 1 and len(optimizer.param_groups[0]["params"]) == 2


def test_an_optimizer_that_refuses_a_second_group_is_left_as_it_was():
    class OneGroup(torch.optim.SGD):
        def add_param_group(self, param_group):
            if self.param_groups:
                raise ValueError("one group only")
            super().add_param_group(param_group)

    model = lora_net()
    optimizer = OneGroup(trainable(model).values(), lr=LR)
    with pytest.raises(ValueError, match="one group only"):
        apply_lora_plus(optimizer, model)
    assert [len(g["params"]) for g in optimizer.param_groups] == [2]


def test_a_frozen_b_in_the_optimizer_is_no_b_to_speed_up():
    """An optimizer over all parameters holds frozen ones too: a ratio for those would be one without effect."""
    model = lora_net()
    model.base_model.model.q_proj.lora_B["default"].requires_grad_(False)
    groups = [{"params": list(model.parameters()), "lr": LR}]
    with pytest.raises(ValueError, match=r"trainable lora_A matrices but no lora_B .* make lora_B trainable"):
        split_lora_plus_groups(model, groups)
