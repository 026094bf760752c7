"""The fused AdamW as an optimizer: torch's in all but the kernel, and torch's own where that does not fit."""

from __future__ import annotations

import copy
import io
import types
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from chronicals_trl.kernels._adamw import AdamWUpdate
from chronicals_trl.optim import adamw
from chronicals_trl.optim.adamw import FusedAdamW, give_back, obstacle, take_over

STEPS = 5


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tensors of each update of ours."""
    made: list[int] = []

    class Counting(AdamWUpdate):
        def __call__(self, params: Any, *args: Any, **kwargs: Any) -> None:
            made.append(len(params))
            super().__call__(params, *args, **kwargs)

    monkeypatch.setattr(adamw, "AdamWUpdate", Counting)
    return made


def parameters(*shapes: Any, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes or [(4, 3), (5,)]]


def optimizer_of(params: list[nn.Parameter], **options: Any) -> AdamW:
    groups: list[dict[str, Any]] = [{"params": params[:1], "weight_decay": 0.1}, {"params": params[1:], "lr": 3e-3}]
    if "lr" in options:
        del groups[1]["lr"]
    return AdamW(groups, **{"lr": 1e-2, "fused": True, "weight_decay": 0.0, **options})


def made(fused: bool) -> tuple[list[nn.Parameter], AdamW]:
    params = parameters()
    optimizer = optimizer_of(params)
    return params, take_over(optimizer) if fused else optimizer


def require_same(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def give_gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def train(params: list[nn.Parameter], optimizer: AdamW, clip: float | None = None, steps: int = STEPS) -> None:
    for step in range(steps):
        give_gradients(params, step)
        if clip is not None and isinstance(optimizer, FusedAdamW):
            norm = torch.nn.utils.get_total_norm([p.grad for p in params])
            optimizer.clip((clip / (norm + 1e-6)).clamp(max=1.0))
        elif clip is not None:
            torch.nn.utils.clip_grad_norm_(params, clip)
        optimizer.step()


def both(clip: float | None = None, shapes: Any = (), **options: Any) -> tuple[list[nn.Parameter], AdamW]:
    """Parameters and optimizer of ours, after they were found to be torch's."""
    theirs, ours = parameters(*shapes), parameters(*shapes)
    stock, mine = optimizer_of(theirs, **options), optimizer_of(ours, **options)
    take_over(mine)
    train(theirs, stock, clip)
    train(ours, mine, clip)
    require_same(ours, theirs)
    return ours, mine


@pytest.mark.parametrize("clip", [None, 0.5, 1e6])
def test_it_trains_as_torchs_does(updates: list[int], clip: float | None) -> None:
    both(clip)
    assert updates == [1, 1] * (STEPS - 1)  # the first step makes the state, which is torch's to do


def test_a_clip_is_of_one_step(updates: list[int]) -> None:
    """One that somebody takes without clipping has nothing of the last one's."""
    params = parameters()
    optimizer = take_over(optimizer_of(params))
    train(params, optimizer, steps=2)
    reference = [p.detach().clone() for p in params]
    state = copy.deepcopy(optimizer.state_dict())
    train(params, optimizer, clip=1e-3, steps=1)
    with torch.no_grad():
        for p, r in zip(params, reference, strict=True):
            p.copy_(r)
    optimizer.load_state_dict(copy.deepcopy(state))
    train(params, optimizer, steps=1)
    after = [p.detach().clone() for p in params]
    other = parameters()
    train(other, optimizer_of(other), steps=2)
    stock = optimizer_of(other)
    stock.load_state_dict(copy.deepcopy(state))
    train(other, stock, steps=1)
    for a, b in zip(after, other, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-6, atol=1e-7)


def test_gradients_are_left_as_they_are() -> None:
    params = parameters()
    optimizer = take_over(optimizer_of(params))
    train(params, optimizer, steps=1)
    give_gradients(params, 7)
    before = [p.grad.clone() for p in params]
    optimizer.clip(torch.tensor(0.1))
    optimizer.step()
    assert all(torch.equal(p.grad, b) for p, b in zip(params, before, strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {"amsgrad": True},
        {"maximize": True},
        {"capturable": True},
        {"lr": torch.tensor(1e-2)},
        {"fused": False},
        {"fused": False, "foreach": True},
    ],
    ids=str,
)
def test_settings_that_the_kernel_has_not(updates: list[int], options: dict[str, Any]) -> None:
    optimizer = optimizer_of(parameters(), **options)
    assert obstacle(optimizer) is not None
    if "fused" not in options:  # set while it runs
        for clip in (None, 0.5):
            both(clip, **options)
    assert not updates


@pytest.mark.parametrize("name", ["decoupled_weight_decay", "fused"])
def test_settings_that_are_gone_in_mid_run(updates: list[int], name: str) -> None:
    def run(fused: bool) -> list[nn.Parameter]:
        params, optimizer = made(fused)
        train(params, optimizer, steps=2)
        optimizer.param_groups[0][name] = False
        train(params, optimizer, 0.5)
        return params

    require_same(run(True), run(False))
    assert updates == [1] * (2 + STEPS)
    optimizer = optimizer_of(parameters())
    optimizer.param_groups[1][name] = False
    assert obstacle(optimizer) is not None


def test_a_group_that_is_torchs_and_has_no_gradients() -> None:
    params = parameters()
    optimizer = take_over(optimizer_of(params))
    optimizer.param_groups[1]["maximize"] = True
    give_gradients(params[:1], 0)
    optimizer.clip(torch.tensor(0.5))
    optimizer.step()


def test_a_compiled_step(updates: list[int]) -> None:
    """torch.compile leaves out what collects a group's tensors, in ours as in torch's, and the rest finds nothing."""

    def run(fused: bool) -> list[nn.Parameter]:
        params, optimizer = made(fused)
        train(params, optimizer, steps=1)
        optimizer.step = torch.compile(optimizer.step, backend="eager")  # type: ignore[method-assign]
        assert not fused or optimizer.watched()
        train(params, optimizer)
        return params

    require_same(run(True), run(False))
    assert updates == [1, 1] * STEPS


@pytest.mark.parametrize(
    "optimizer",
    [SGD(parameters(), 0.1), Adam(parameters(), fused=True), AdamW(parameters(dtype=torch.float64), fused=True), None],
    ids=["SGD", "Adam", "float64", "none"],
)
def test_other_optimizers(optimizer: Any) -> None:
    assert obstacle(optimizer) is not None


def test_a_subclass_is_left_alone() -> None:
    class Mine(AdamW):
        pass

    assert "Mine" in (obstacle(Mine(parameters(), fused=True)) or "")
    assert obstacle(optimizer_of(parameters())) is None

    class Odd(nn.Parameter):
        pass

    assert "no plain tensors" in (obstacle(AdamW([Odd(torch.ones(2))], fused=True)) or "")


def test_what_fits() -> None:
    plain = [nn.Parameter(torch.ones(4, 3)), *(torch.ones(4, 3) for _ in range(3)), torch.ones(())]

    class Odd(Tensor):
        pass

    assert adamw._fits(*plain)
    others: list[Tensor] = [torch.ones(3, 4).t(), torch.ones(4, 3).bfloat16(), torch.ones(4, 2)]
    for place in (1, 2, 3):
        for other in [*others, torch.ones(4, 3).as_subclass(Odd)]:
            assert not adamw._fits(*plain[:place], other, *plain[place + 1 :])
    for other in (others[0], torch.ones(4, 3).double(), torch.ones(4, 3).as_subclass(Odd)):
        assert not adamw._fits(other, *plain[1:])
    assert not adamw._fits(*plain[:4], torch.ones((), dtype=torch.float64))


@pytest.mark.parametrize("what", ["parameter", "gradient"])
def test_what_lies_otherwise_in_mid_run_is_torchs(updates: list[int], what: str) -> None:
    params = parameters()
    optimizer = take_over(optimizer_of(params))
    train(params, optimizer, steps=3)
    assert updates == [1, 1] * 2
    give_gradients(params, 3)
    if what == "parameter":
        params[0].data = params[0].data.t().contiguous().t()
    else:
        params[0].grad = torch.ones(3, 4).t()
    optimizer.step()
    assert updates == [1, 1] * 2 + [1]


def test_a_parameter_that_joins_late() -> None:
    """Its state is made then, by torch, for its group."""

    def run(fused: bool) -> list[nn.Parameter]:
        params = parameters((4, 3), (5,), (6,))
        optimizer = optimizer_of(params)
        if fused:
            take_over(optimizer)
        train(params[:2], optimizer, 0.5, steps=2)
        train(params, optimizer, 0.5)
        return params

    require_same(run(True), run(False))


def test_a_parameter_that_lies_otherwise_is_torchs(updates: list[int]) -> None:
    """A transposed one: its group alone, and clipped all the same."""
    theirs, ours = ([nn.Parameter(torch.arange(12.0).view(4, 3).t()), nn.Parameter(torch.ones(5))] for _ in range(2))
    stock, mine = optimizer_of(theirs), take_over(optimizer_of(ours))
    train(theirs, stock, 0.5)
    train(ours, mine, 0.5)
    require_same(ours, theirs)
    assert len(updates) == STEPS - 1


def test_parameters_without_a_gradient_and_empty_ones(updates: list[int]) -> None:
    def run(fused: bool) -> list[nn.Parameter]:
        params = parameters((4, 3), (5,), (0, 3), (6,))
        optimizer = optimizer_of(params)
        if fused:
            take_over(optimizer)
        for step in range(6):
            give_gradients(params, step)
            if step % 2:
                params[3].grad = None
            optimizer.step()
        return params

    require_same(run(True), run(False))
    assert set(updates) == {1, 2}


def test_state_that_is_made_early(updates: list[int]) -> None:
    """It is what torch makes, and what torch goes on with in the first step."""
    theirs, ours = parameters(), parameters()
    stock, mine = optimizer_of(theirs), take_over(optimizer_of(ours))
    mine.make_state()
    assert all(p.grad is None for p in ours)
    early = {p: dict(mine.state[p]) for p in ours}
    train(theirs, stock, 0.5)
    train(ours, mine, 0.5)
    require_same(ours, theirs)
    assert updates == [1, 1] * (STEPS - 1)
    for p, q in zip(ours, theirs, strict=True):
        assert mine.state[p].keys() == stock.state[q].keys()
        assert all(mine.state[p][name] is tensor for name, tensor in early[p].items())
        for name, tensor in mine.state[p].items():
            assert (tensor.dtype, tensor.shape, tensor.stride()) == (
                stock.state[q][name].dtype, stock.state[q][name].shape, stock.state[q][name].stride(),
            )  # fmt: skip


def test_early_state_of_what_gets_no_gradient_goes(updates: list[int]) -> None:
    def run(fused: bool) -> tuple[list[nn.Parameter], AdamW]:
        params = parameters((4, 3), (5,), (6,), (3,))
        params[3].requires_grad_(False)
        optimizer = optimizer_of(params)
        if fused:
            take_over(optimizer).make_state()
            assert optimizer.state.keys() == set(params[:3])
        train(params[:2], optimizer, steps=2)
        assert optimizer.state.keys() == set(params[:2])
        train(params[:3], optimizer)
        return params, optimizer

    (ours, mine), (theirs, stock) = run(True), run(False)
    require_same(ours, theirs)
    assert mine.state_dict()["state"].keys() == stock.state_dict()["state"].keys() == {0, 1, 2}
    assert float(mine.state[ours[2]]["step"]) == STEPS


def test_early_state_where_there_is_no_step() -> None:
    _, optimizer = made(fused=True)
    optimizer.make_state()
    assert len(optimizer.state) == 2
    give_back(optimizer)
    assert not optimizer.state


def test_early_state_beside_a_runs_own() -> None:
    """State that is there, gradients that are, and state that is loaded stay as they are."""
    params, optimizer = made(fused=True)
    give_gradients(params[:1], 0)
    optimizer.step()
    params[1].grad = torch.ones(5)
    kept = dict(optimizer.state[params[0]])
    gradients = [p.grad for p in params]
    params[0].grad = None
    optimizer.make_state()
    assert params[0].grad is None and params[1].grad is gradients[1]
    assert all(optimizer.state[params[0]][name] is tensor for name, tensor in kept.items())

    _, fresh = made(fused=True)
    fresh.make_state()
    params, loaded = made(fused=True)
    loaded.make_state()
    train(params, optimizer_of(params), steps=1)
    saved = fresh.state_dict()
    loaded.load_state_dict(saved)
    params[0].grad = None
    loaded.step()
    assert loaded.state.keys() == set(params)


def test_state_that_is_loaded_is_a_runs_own(updates: list[int]) -> None:
    """What was made early is let go of at once, and the next step is not its first."""
    params, before = made(fused=False)
    train(params, before, steps=1)
    params, optimizer = made(fused=True)
    assert isinstance(optimizer, FusedAdamW)
    optimizer.make_state()
    early = weakref.ref(optimizer.state[params[0]]["exp_avg"])
    optimizer.load_state_dict(before.state_dict())
    assert early() is None
    train(params, optimizer, steps=1)
    assert updates == [1, 1]


def test_state_that_is_not_made_early_is_torchs() -> None:
    """Of a parameter with a gradient, which may be gone by the first step."""
    params, optimizer = made(fused=True)
    params[0].grad = torch.ones(4, 3)
    optimizer.make_state()
    assert optimizer.state.keys() == {params[1]}
    params[0].grad = None
    params[1].grad = torch.ones(5)
    optimizer.step()
    assert optimizer.state.keys() == {params[1]}


def test_early_state_that_somebody_has_put_other_state_for() -> None:
    for end in (AdamW.step, give_back):
        params, optimizer = made(fused=True)
        optimizer.make_state()
        other = {"step": torch.tensor(3.0), "exp_avg": torch.ones(4, 3), "exp_avg_sq": torch.ones(4, 3)}
        optimizer.state[params[0]] = other
        end(optimizer)
        assert optimizer.state == {params[0]: other}


def test_early_state_of_a_parameter_that_is_there_twice() -> None:
    for gradients in (True, False):
        p = nn.Parameter(torch.ones(3))
        with pytest.warns(UserWarning, match="duplicate parameters"):
            optimizer = take_over(AdamW([p, p], fused=True))
        optimizer.make_state()
        p.grad = torch.ones(3) if gradients else None
        optimizer.step()
        assert len(optimizer.state) == gradients


def test_a_compiled_first_step_with_early_state() -> None:
    def run(fused: bool) -> tuple[list[nn.Parameter], AdamW]:
        params, optimizer = made(fused)
        if isinstance(optimizer, FusedAdamW):
            optimizer.make_state()
        optimizer.step = torch.compile(optimizer.step, backend="eager")  # type: ignore[method-assign]
        train(params[:1], optimizer, steps=1)
        assert optimizer.state.keys() == {params[0]}
        train(params, optimizer)
        return params, optimizer

    (ours, mine), (theirs, stock) = run(True), run(False)
    require_same(ours, theirs)
    assert [float(mine.state[p]["step"]) for p in ours] == [float(stock.state[p]["step"]) for p in theirs]


@pytest.mark.parametrize("fails_at", [1, 2, 3, 4])
def test_memory_that_runs_out_in_the_midst_of_a_parameters_state(
    fails_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it stays: torch would go on with state that lacks a moment."""
    calls, zeros_like = [0], torch.zeros_like

    def failing(*args: Any, **kwargs: Any) -> Tensor:
        calls[0] += 1
        if calls[0] == fails_at:
            raise torch.OutOfMemoryError
        return zeros_like(*args, **kwargs)

    params, optimizer = made(fused=True)
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(torch, "zeros_like", failing)
        optimizer.make_state()
    assert not optimizer.state and not optimizer._early
    assert all(p.grad is None for p in params)
    optimizer.make_state()
    theirs, stock = made(fused=False)
    train(params, optimizer)
    train(theirs, stock)
    require_same(params, theirs)


@pytest.mark.parametrize("early", [False, True])
def test_a_group_of_several_dtypes(updates: list[int], early: bool) -> None:
    def run(fused: bool) -> list[nn.Parameter]:
        params = [*parameters(), *parameters(dtype=torch.bfloat16)]
        optimizer = AdamW(params, lr=1e-2, fused=True)
        if fused:
            take_over(optimizer)
            if early:
                optimizer.make_state()
        train(params, optimizer)
        return params

    for a, b in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(a, b)
    assert updates == [2, 2] * (STEPS - 1)


def test_a_schedulers_wrapper_around_step_stays(updates: list[int]) -> None:
    """It holds on to the step that the optimizer had before."""

    def run(fused: bool) -> list[nn.Parameter]:
        params = parameters()
        optimizer = optimizer_of(params)
        scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
        assert "step" in vars(optimizer)
        if fused:
            take_over(optimizer)
        for step in range(STEPS):
            give_gradients(params, step)
            optimizer.step()
            scheduler.step()
        return params

    require_same(run(True), run(False))
    assert updates


def test_hooks_run_once_a_step_and_are_seen() -> None:
    params = parameters()
    optimizer = take_over(optimizer_of(params))
    assert not optimizer.watched()
    calls: list[str] = []
    before = optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    assert optimizer.watched()
    before.remove()
    assert not optimizer.watched()
    after = optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    assert optimizer.watched()
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    train(params, optimizer, steps=2)
    assert calls == ["before", "after"] * 2
    after.remove()
    for register in (register_optimizer_step_pre_hook, register_optimizer_step_post_hook):
        other = take_over(optimizer_of(params))
        of_all = register(lambda *_: None)
        assert other.watched()
        of_all.remove()
        assert not other.watched()


def test_who_is_around_the_step_is_seen() -> None:
    """A scheduler counts steps; another one may look at gradients, whichever came first."""
    for later in (False, True):
        optimizer = take_over(optimizer_of(parameters()))
        if later:
            LambdaLR(optimizer, lambda step: 1.0)
        assert not optimizer.watched()
        step = optimizer.step
        optimizer.step = types.MethodType(lambda self, step=step: step(), optimizer)  # type: ignore[method-assign]
        if not later:
            LambdaLR(optimizer, lambda step: 1.0)
        assert optimizer.watched()


def test_it_is_torchs_again_afterwards(updates: list[int]) -> None:
    params, optimizer = both(0.5)
    assert isinstance(optimizer, FusedAdamW)
    done = len(updates)
    give_back(optimizer)
    assert type(optimizer) is AdamW
    assert vars(optimizer).keys() == vars(optimizer_of(params)).keys()
    assert not optimizer._optimizer_step_post_hooks
    train(params, optimizer, 0.5)
    assert len(updates) == done


@pytest.mark.parametrize("clone", ["deepcopy", "pickle"])
def test_copies_train_too(clone: str) -> None:
    params = parameters()
    optimizer = take_over(optimizer_of(params))
    train(params, optimizer, 0.5, steps=2)
    if clone == "deepcopy":
        other = copy.deepcopy(optimizer)
    else:
        file = io.BytesIO()
        torch.save(optimizer, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    copied = [p for group in other.param_groups for p in group["params"]]
    for which, each in ((params, optimizer), (copied, other)):
        give_gradients(which, 9)
        each.step()
    for a, b in zip(params, copied, strict=True):
        assert a is not b
        torch.testing.assert_close(a, b)


def test_a_checkpoint_holds_what_torchs_does() -> None:
    ours, theirs = parameters(), parameters()
    mine, stock = take_over(optimizer_of(ours)), optimizer_of(theirs)
    train(ours, mine, 0.5)
    train(theirs, stock, 0.5)
    saved, wanted = mine.state_dict(), stock.state_dict()
    assert saved["param_groups"] == wanted["param_groups"]
    assert saved["state"].keys() == wanted["state"].keys()
    for number, state in saved["state"].items():
        assert state.keys() == wanted["state"][number].keys()
        for name, value in state.items():
            torch.testing.assert_close(value, wanted["state"][number][name], rtol=1e-6, atol=1e-7)
    fresh = take_over(optimizer_of(ours))
    fresh.load_state_dict(saved)
    assert not fresh.watched()
    train(ours, fresh)
    stock.load_state_dict(wanted)
    train(theirs, stock)
    require_same(ours, theirs)


def test_a_float16_scaler_is_torchs(updates: list[int]) -> None:
    params = parameters()
    optimizer = take_over(optimizer_of(params))
    train(params, optimizer, steps=2)
    done = len(updates)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    train(params, optimizer, steps=1)
    assert len(updates) == done
