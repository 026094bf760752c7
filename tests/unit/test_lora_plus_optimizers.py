"""LoRA+ with the optimizers and schedules of TrainingArguments: the rates that are set are those that are applied."""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.trainer_utils import SchedulerType

from chronicals_trl.optim import apply_lora_plus
from chronicals_trl.optim.lora_plus import scale_rate_bounds

peft = pytest.importorskip("peft")

LR, RATIO, DECAY = 1e-3, 8.0, 0.1


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.proj(x))


def model(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    options = {"r": 2, "target_modules": ["proj"], "init_lora_weights": False, "modules_to_save": ["norm"], **options}
    return peft.get_peft_model(Net(), peft.LoraConfig(**options))


def groups(net: nn.Module) -> list[dict[str, Any]]:
    """As Trainer makes them."""
    named = [(name, parameter) for name, parameter in net.named_parameters() if parameter.requires_grad]
    decayed = [parameter for name, parameter in named if "norm" not in name]
    rest = [parameter for name, parameter in named if "norm" in name]
    return [{"params": decayed, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}]


def split_by_hand(net: nn.Module) -> list[dict[str, Any]]:
    b = net.base_model.model.proj.lora_B["default"].weight
    decayed, rest = groups(net)
    others = [parameter for parameter in decayed["params"] if parameter is not b]
    return [{**decayed, "params": others}, {**decayed, "params": [b], "lr": LR * RATIO}, rest]


def train(net: nn.Module, optimizer: Optimizer, steps: int = 8) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    if hasattr(optimizer, "train"):  # schedule-free ones
        optimizer.train()
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(4, 8, generator=generator)).square().mul(torch.arange(8.0)).mean().backward()
        optimizer.step()
    return {name: p.detach().clone() for name, p in net.named_parameters() if p.requires_grad}


def maker(optim: str, tmp_path: Path) -> Callable[[list[dict[str, Any]]], Optimizer]:
    """What Trainer makes for this `optim`."""
    arguments = TrainingArguments(str(tmp_path), optim=optim, learning_rate=LR, use_cpu=True, report_to="none")
    optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    return lambda param_groups: optimizer_class(param_groups, **options)


def needs(optim: str, package: str) -> Any:
    missing = importlib.util.find_spec(package) is None
    return pytest.param(optim, marks=pytest.mark.skipif(missing, reason=f"{package} is not installed"))


OPTIMS = [
    "adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "rmsprop", "adagrad",
    *(needs(name, "bitsandbytes") for name in ("adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_32bit",
                                               "paged_lion_8bit", "ademamix", "rmsprop_bnb_8bit")),
    *(needs(name, "torchao") for name in ("adamw_torch_8bit", "adamw_torch_4bit")),
    *(needs(f"schedule_free_{name}", "schedulefree") for name in ("adamw", "radam", "sgd")),
    needs("grokadamw", "grokadamw"),
]  # fmt: skip


@pytest.mark.parametrize("optim", OPTIMS)
def test_as_if_made_with_the_groups(optim: str, tmp_path: Path) -> None:
    """Bit for bit the weights of the same optimizer over groups that were split by hand, weight decay and all."""
    make = maker(optim, tmp_path)
    ours, theirs, single = model(), model(), model()
    optimizer = make(groups(ours))
    apply_lora_plus(optimizer, ours, ratio=RATIO)
    found, expected = train(ours, optimizer), train(theirs, make(split_by_hand(theirs)))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)
    unsplit = train(single, make(groups(single)))
    b = "base_model.model.proj.lora_B.default.weight"
    assert not torch.equal(found[b], unsplit[b])
    assert [float(group["weight_decay"]) for group in optimizer.param_groups] == [DECAY, DECAY, 0.0]


def test_a_stepped_optimizer_is_refused_whatever_its_state_is_called() -> None:
    """SGD counts no steps; Adagrad has state from the start, and that is no step."""
    for optimizer_class, options in ((torch.optim.SGD, {"momentum": 0.9}), (torch.optim.Adagrad, {})):
        net = model()
        optimizer = optimizer_class(groups(net), lr=LR, **options)
        train(net, optimizer, steps=1)
        with pytest.raises(ValueError, match="holds state for 4 parameters"):
            apply_lora_plus(optimizer, net)
        assert len(optimizer.param_groups) == 2


def test_state_that_is_no_step() -> None:
    """APOLLO numbers its parameters when it is made."""
    net = model()
    optimizer = torch.optim.SGD(groups(net), lr=LR)
    for index, parameter in enumerate(optimizer.param_groups[0]["params"]):
        optimizer.state[parameter]["seed"] = index
    before = {parameter: dict(state) for parameter, state in optimizer.state.items()}
    apply_lora_plus(optimizer, net, ratio=RATIO)
    assert [group["lr"] for group in optimizer.param_groups] == [LR, LR * RATIO, LR]
    assert dict(optimizer.state) == before


# -- optimizers whose rates are not those of their groups ------------------------------------------------------------


def test_an_optimizer_that_steps_in_the_backward_pass_with_one_rate() -> None:
    """LOMO takes the one rate that Trainer passes; its groups' are never read."""

    class Lomo(torch.optim.SGD):
        def fused_backward(self, loss: torch.Tensor, lr: float) -> None: ...

    net = model()
    optimizer = Lomo(groups(net), lr=LR)
    with pytest.raises(ValueError, match=r"Lomo updates the weights during the backward pass.*lora_plus='off'"):
        apply_lora_plus(optimizer, net)
    assert len(optimizer.param_groups) == 2


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="a torch without Muon")
class TestMuon:
    @staticmethod
    def make(net: nn.Module, **options: Any) -> Optimizer:
        return torch.optim.Muon([p for p in net.parameters() if p.requires_grad], lr=LR, weight_decay=0.0, **options)

    @staticmethod
    def moved(net: nn.Module, optimizer: Optimizer) -> tuple[float, float]:
        """How far a step moves A and B, root mean square."""
        layer = net.base_model.model.proj
        weights = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        before = [weight.detach().clone() for weight in weights]
        train(net, optimizer, steps=1)
        a, b = ((w - v).square().mean().sqrt().item() for w, v in zip(weights, before, strict=True))
        return a, b

    @pytest.mark.parametrize("options", [{}, {"adjust_lr_fn": "original"}])
    def test_its_own_ratio_is_not_multiplied(self, options: dict[str, str]) -> None:
        net = model(modules_to_save=None)
        optimizer = self.make(net, **options)
        with pytest.raises(ValueError, match=r"Muon .* pass adjust_lr_fn='match_rms_adamw'.*lora_plus='off'"):
            apply_lora_plus(optimizer, net)
        assert [group["lr"] for group in optimizer.param_groups] == [LR]
        # Why it is refused: sqrt(width / rank). Newton and Schulz's iteration makes singular values of 0.7 to 1.2.
        a, b = self.moved(net, optimizer)
        assert b / a == pytest.approx(math.sqrt(8 / 2), rel=0.3)

    def test_with_updates_of_equal_size_the_ratio_is_the_ratio(self) -> None:
        net = model(modules_to_save=None)
        optimizer = self.make(net, adjust_lr_fn="match_rms_adamw")
        apply_lora_plus(optimizer, net, ratio=RATIO)
        a, b = self.moved(net, optimizer)
        assert b / a == pytest.approx(RATIO, rel=0.3)

    def test_it_refuses_what_is_no_matrix_before_lora_plus_comes(self) -> None:
        with pytest.raises(ValueError, match="2D"):
            self.make(model())


# -- schedules -------------------------------------------------------------------------------------------------------

STEPS = 12
# What the schedules need, or what puts them at their bounds within a few steps.
SCHEDULE_OPTIONS: dict[str, dict[str, Any]] = {
    "cosine_with_min_lr": {"min_lr": LR / 4},
    "cosine_warmup_with_min_lr": {"min_lr": LR / 4},
    "polynomial": {"lr_end": LR / 4},
    "warmup_stable_decay": {"num_decay_steps": 4, "min_lr_ratio": 0.25},
    "reduce_lr_on_plateau": {"factor": 0.5, "patience": 0, "min_lr": LR / 4},
    "greedy": {"factor": 0.5, "patience": 0, "min_lr": LR / 4, "max_lr": 3 * LR},
}


def rates_of_steps(name: str, split: bool) -> list[list[float]]:
    """The groups' rates at each step, with a metric that gets better for a while and then worse."""
    net = model()
    optimizer = torch.optim.SGD(groups(net), lr=LR)
    if split:
        apply_lora_plus(optimizer, net, ratio=RATIO)
    scheduler = get_scheduler(
        name, optimizer, num_warmup_steps=3, num_training_steps=STEPS,
        scheduler_specific_kwargs=copy.deepcopy(SCHEDULE_OPTIONS.get(name)),
    )  # fmt: skip
    if split:
        scale_rate_bounds(scheduler, optimizer, LR)
    found = []
    for step in range(STEPS):
        found.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        metric = [] if not hasattr(scheduler, "min_lrs") else [float(abs(step - 4))]
        scheduler.step(*metric)
    return found


@pytest.mark.parametrize("name", [schedule.value for schedule in SchedulerType])
def test_the_ratio_at_every_step(name: str) -> None:
    """And A learns at the rates that it has without LoRA+, at the bounds of the schedule too."""
    alone = [step[0] for step in rates_of_steps(name, split=False)]
    for (a, b, rest), expected in zip(rates_of_steps(name, split=True), alone, strict=True):
        assert a == rest == pytest.approx(expected, rel=1e-12)
        assert b == pytest.approx(RATIO * a, rel=1e-12)
    if name in ("reduce_lr_on_plateau", "greedy"):  # the bounds have been at work
        for bound in (SCHEDULE_OPTIONS[name].get(key) for key in ("min_lr", "max_lr")):
            assert bound is None or any(lr == pytest.approx(bound) for lr in alone), alone
    elif name != "constant":
        assert len(set(alone)) > 2, alone


def test_bounds_of_embeddings_and_of_a_rate_of_zero() -> None:
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": lr} for lr in (LR, 4 * LR, LR / 2)])
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, min_lr=LR / 10)
    scale_rate_bounds(scheduler, optimizer, 0.0)
    assert scheduler.min_lrs == [LR / 10] * 3
    scale_rate_bounds(scheduler, optimizer, LR)
    assert scheduler.min_lrs == pytest.approx([LR / 10, 4 * LR / 10, LR / 20])
