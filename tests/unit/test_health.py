"""The checks by themselves: figures, gradients and movement, and that nothing is read back on the way."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn

from chronicals_trl.observe.health import CHECKS, Finding, monitor, start
from chronicals_trl.observe.health.contention import Contention
from chronicals_trl.observe.health.gradients import Movement, have_gradients
from chronicals_trl.observe.health.series import LogChecks

CPU = torch.device("cpu")


def alone(flags: Tensor) -> Tensor:
    return flags


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def checks_of(entries: Iterable[dict[str, Any]], **settings: Any) -> list[tuple[int, str]]:
    """(entry, check) of all that is said; each entry lies one second behind the one before, or its "seconds"."""
    return [(number, finding.check) for number, finding in findings_of(entries, **settings)]


def findings_of(entries: Iterable[dict[str, Any]], **settings: Any) -> list[tuple[int, Finding]]:
    clock = Clock()
    checks = LogChecks(**{"flat_at": None, "clock": clock, "contention": Contention(dict), **settings})
    said = []
    for number, entry in enumerate(entries):
        clock.now += entry.pop("seconds", 1.0)
        given = {name: entry.pop(name) for name in ("full_rate", "disturbed", "labelled") if name in entry}
        said += [(number, finding) for finding in checks.look({"loss": 2.0, **entry}, **given)]
    return said


# -- logged figures --------------------------------------------------------------------------------------------------


def test_zero_norm_takes_two_entries_in_a_row() -> None:
    assert checks_of({"grad_norm": norm} for norm in (0.0, 1.0, 0.0, 1.0)) == []
    assert checks_of({"grad_norm": norm} for norm in (1.0, 0.0, 0.0)) == [(2, "zero_gradient_norm")]
    assert checks_of([{}, {}, {}]) == []  # nobody measured it


def test_steps_without_a_label_are_no_fault_while_there_are_others() -> None:
    empty = {"grad_norm": 0.0, "loss": 0.0, "labelled": False}
    some: list[dict[str, Any]] = [*[{"grad_norm": 1.0}] * 2, *[empty] * 3]
    assert checks_of(map(dict, some * 9), flat_at=0.0) == []  # nor is the loss of 2.0 a spike above 0
    assert checks_of(dict(empty) for _ in range(20)) == [(19, "zero_gradient_norm")]
    assert checks_of(map(dict, [empty, {"grad_norm": 0.0}, empty, {"grad_norm": 0.0}])) == [(3, "zero_gradient_norm")]


@pytest.mark.parametrize("wrong", [{"grad_norm": math.nan}, {"grad_norm": math.inf}, {"loss": math.nan}])
def test_not_finite(wrong: dict[str, float]) -> None:
    entries = [{}, wrong, {}, *[wrong] * 10]
    assert checks_of(map(dict, entries))[0] == (1, "not_finite")
    assert checks_of(map(dict, entries), overflows=True) == [(12, "not_finite")]


def test_flat_loss_means_guessing_at_full_rate() -> None:
    flat_at = math.log(1000)

    def said(losses: Iterable[float], **entry: Any) -> list[tuple[int, str]]:
        return checks_of(({"loss": loss, **entry} for loss in losses), flat_at=flat_at)

    assert said([flat_at * 1.005] * 10) == [(9, "flat_loss")]
    assert said([flat_at * 0.995] * 10) == [(9, "flat_loss")]
    assert said([flat_at * 1.02] * 20) == said([2.0] * 20) == []
    assert said([flat_at] * 9 + [flat_at * 0.98] + [flat_at] * 9) == []
    assert said([flat_at] * 20, full_rate=False) == []
    assert checks_of({"loss": flat_at} for _ in range(20)) == []  # no cross-entropy over V tokens


def test_a_spike_is_two_entries_far_above_the_median() -> None:
    usual = [{"loss": 2.0 + 0.1 * (number % 3)} for number in range(10)]

    def said(*losses: float) -> list[tuple[int, str]]:
        return checks_of([*map(dict, usual), *({"loss": loss} for loss in losses)])

    assert said(4.0, 4.0) == [(11, "loss_spike")]
    assert said(4.0, 2.0, 4.0, 2.0) == []
    assert said(3.0, 3.0, 3.0) == []  # less than half as much again, and less than one nat
    assert checks_of([{"loss": 1.0}] * 6 + [{"loss": 9.0}] * 3) == []  # too few to compare with
    assert checks_of([{"loss": 0.01}] * 10 + [{"loss": 0.9}] * 2) == []  # texts known by heart, and a new one
    assert checks_of([{"loss": 10.0}] * 10 + [{"loss": 12.0}] * 2) == []  # more than one nat, less than half as much
    # Single ones teach what is usual.
    assert checks_of([*map(dict, usual), *([{"loss": 4.0}, {"loss": 2.0}] * 16), *([{"loss": 4.0}] * 2)]) == []
    wild = [{"loss": loss} for loss in (1.0, 4.0, 2.0, 5.0, 1.5, 4.5, 3.0, 0.5)]
    assert checks_of([*wild, {"loss": 12.0}, {"loss": 12.0}]) == []


def test_noisy_healthy_runs_have_no_spike() -> None:
    rng = random.Random(0)
    for spread in (0.05, 0.2, 0.5):
        losses = [(0.5 + 2.5 * 0.99**step) * rng.lognormvariate(0.0, spread) for step in range(3000)]
        assert checks_of({"loss": loss, "grad_norm": 1.0} for loss in losses) == [], spread


def test_slow_is_half_the_runs_own_median_for_a_while() -> None:
    def said(speeds: Iterable[float], **entry: Any) -> list[tuple[int, str]]:
        return checks_of({"tokens_per_second": speed, "seconds": 6.0, **entry} for speed in speeds)

    usual = [1.0] + [100.0] * 9  # the first entry is compilation
    assert said([*usual, 40.0, 40.0, 40.0]) == [(12, "slow")]
    assert said([*usual, 40.0, 40.0, 100.0, 40.0, 40.0]) == said([*usual, *[60.0] * 9]) == []
    assert said([*usual[:8], 40.0, 40.0, 40.0]) == []
    assert said([*usual, *[40.0] * 9], disturbed=True) == []
    longer = [{"tokens_per_second": 100.0, "seconds": 30.0}] * 3  # as many tokens a second
    assert checks_of([*({"tokens_per_second": 100.0, "seconds": 6.0} for _ in range(10)), *map(dict, longer)]) == []
    short = [{"tokens_per_second": speed, "seconds": 0.5} for speed in [100.0] * 100 + [10.0, 10.0, 10.0] * 2]
    assert checks_of(short) == []  # three seconds of noise


def test_slow_names_others_on_the_cores_where_they_are_the_cause() -> None:
    def told(waiting: Iterable[int]) -> str:
        waited = iter([0, 0, *[0] * 8, *waiting])  # at the start, at the first entry, in 8 at the usual pace
        contention = Contention(lambda: {"1": next(waited)})
        next(waited)
        speeds = [1.0] + [100.0] * 8 + [40.0] * 3
        entries = ({"tokens_per_second": speed, "seconds": 6.0} for speed in speeds)
        ((_, finding),) = findings_of(entries, contention=contention)
        return str(finding)

    second = 10**9
    assert "waited for a core 25% of the time" in told([2 * second, 4 * second, 11 * second // 2])
    assert "waited for a core" not in told([2 * second, 3 * second, 5 * second])  # a second of six in one of the three


def test_contention_is_what_threads_waited_since_the_look_before() -> None:
    looks = iter([{"1": 5 * 10**9, "2": 7}, {"1": 6 * 10**9, "3": 2 * 10**9}, {"1": 6 * 10**9}])
    contention = Contention(lambda: next(looks))
    assert [contention.look(), contention.look()] == [3.0, 0.0]


def test_contention_on_this_machine() -> None:
    contention = Contention()
    assert contention.look() >= 0.0


# -- gradients -------------------------------------------------------------------------------------------------------


def with_grad(value: float | list[float] | None, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    parameter = nn.Parameter(torch.ones(3, dtype=dtype))
    if value is not None:
        parameter.grad = torch.tensor(value, dtype=dtype) * torch.ones(3, dtype=dtype)
    return parameter


def test_have_gradients() -> None:
    sparse = nn.Embedding(4, 2, sparse=True)
    sparse(torch.tensor([1])).sum().backward()
    empty = nn.Parameter(torch.zeros(0))
    empty.grad = torch.zeros(0)
    parameters = [
        with_grad(None), with_grad(0.0), with_grad([0.0, 0.0, -1e-30]), with_grad(math.nan), sparse.weight, empty,
        with_grad(1.0, torch.bfloat16), with_grad(6e-8, torch.float16), with_grad(0.0, torch.bfloat16),
    ]  # fmt: skip
    assert have_gradients(parameters, CPU, alone).tolist() == [0, 0, 1, 1, 1, 0, 1, 1, 0]
    assert have_gradients(parameters[:2], CPU, torch.ones_like).tolist() == [1, 1]  # another rank's


def test_movement_watches_what_has_a_gradient() -> None:
    table = nn.Parameter(torch.ones(1000, 2))
    table.grad = torch.zeros(1000, 2)
    table.grad[700, 1] = 1.0  # the one token that occurs
    still, none = with_grad(1.0), with_grad(0.0)
    movement = Movement([[table], [still], [none, with_grad(None)]], CPU, alone)
    movement.start()
    with torch.no_grad():
        table[700, 1] += 1e-3
    assert movement.finish().tolist() == [[1, 1, 0], [1, 0, 0]]
    with torch.no_grad():
        still += 1
    movement.start()
    with torch.no_grad():
        table[0, 0] *= 0.9  # weight decay, say, of an element without a gradient
    assert movement.finish().tolist() == [[1, 1, 0], [0, 0, 0]]


def test_movement_follows_a_gradient_of_either_sign_among_many_parameters() -> None:
    parameters = [with_grad(0.0) for _ in range(31)]
    parameters[29].grad = torch.tensor([0.0, -1.0, 0.0])  # its largest element is 0
    movement = Movement([parameters], CPU, alone)
    movement.start()
    assert movement.finish().tolist() == [[1], [0]]
    movement.start()
    with torch.no_grad():
        parameters[29][1] += 1
    assert movement.finish().tolist() == [[1], [1]]


def test_movement_passes_over_what_it_cannot_follow() -> None:
    sparse = nn.Embedding(4, 2, sparse=True)
    sparse(torch.tensor([1])).sum().backward()
    apart = SimpleNamespace(detach=lambda: torch.ones(6), grad=torch.ones(3))  # a gradient that is cut otherwise
    strided = nn.Parameter(torch.ones(4, 2).t())
    strided.grad = torch.ones(2, 4)
    movement = Movement([[sparse.weight, apart, strided, with_grad(1.0)]], CPU, alone)  # type: ignore[list-item]
    movement.start()
    assert len(movement._then) == 1 and movement.finish().tolist() == [[1], [0]]


def test_full_rate() -> None:
    def at(rate: Any, peak: float | None = 1.0) -> bool:
        return monitor.at_full_rate([{"lr": rate} | ({} if peak is None else {"initial_lr": peak})])

    assert at(1.0) and at(0.5) and at(torch.tensor(0.7)) and at(1e-3, None)
    assert not at(0.4) and not at(0.0) and not at(0.0, None) and not at(torch.tensor(0.1))
    assert at(None)  # the optimizer's own affair (Adafactor)
    assert monitor.at_full_rate([{"lr": 0.0}, {"lr": 1.0}]) and not monitor.at_full_rate([])


# -- a run -----------------------------------------------------------------------------------------------------------


class Run:
    """A model of two layers under a monitor, trained by a loop that can be told what to get wrong."""

    def __init__(self, model: nn.Module | None = None, **settings: Any) -> None:
        torch.manual_seed(0)
        self.model = model or nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.monitor = monitor.HealthMonitor(
            self.model, self.optimizer.param_groups, device=CPU, reduce=alone,
            series=LogChecks(flat_at=None), **settings,
        )  # fmt: skip
        self.said: list[tuple[int, str]] = []

    def steps(
        self, count: int, *, grade: Callable[[nn.Module], None] | None = None, labels: Any = 5, skipped: bool = False,
        log: bool = True,
    ) -> Run:  # fmt: skip
        for _ in range(count):
            self.optimizer.zero_grad()
            self.model(torch.randn(2, 4)).square().sum().backward()
            if grade is not None:
                grade(self.model)
            found = self.monitor.step(labels, skipped=skipped)
            if not skipped:
                self.optimizer.step()
            found += self.monitor.log({"loss": 1.0, "grad_norm": 1.0}) if log else []
            self.number = getattr(self, "number", 0) + 1
            self.said += [(self.number, finding.check) for finding in found]
        return self


def nothing(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None


def first_without(model: Any) -> None:
    model[0].weight.grad.zero_()


def test_a_healthy_run() -> None:
    assert Run().steps(250).said == []


def test_no_gradient_in_the_first_step_and_not_said_again() -> None:
    assert Run().steps(1, grade=nothing).steps(30).said == [(1, "no_gradient")]


def test_what_follows_from_a_finding_is_not_said() -> None:
    run = Run().steps(1, grade=nothing)
    silent = [run.monitor.log({"loss": 1.0, "grad_norm": 0.0}) for _ in range(4)]
    assert run.said == [(1, "no_gradient")] and silent == [[]] * 4


@pytest.mark.parametrize(("cause", "follows"), [
    ("no_labels", "zero_gradient_norm"), ("no_labels", "missing_gradients"), ("not_optimized", "flat_loss"),
    ("not_optimized", "still_weights"), ("not_finite", "loss_spike"), ("still_weights", "flat_loss"),
    ("zero_gradient_norm", "still_weights"),
])  # fmt: skip
def test_a_fault_is_told_by_its_cause(cause: str, follows: str) -> None:
    at_once, later = Run().monitor, Run().monitor
    first, second = (Finding(check, "a", "b", "c") for check in (cause, follows))
    assert at_once._new([first, second, first]) == [first]
    assert later._new([first]) == [first] and later._new([second]) == []
    assert later._new([Finding("slow", "a", "b", "c")]) != []


def test_the_resolution_is_the_cause_where_one_of_the_still_groups_is_in_16_bits() -> None:
    for dtypes, low in (((torch.bfloat16, torch.float32), True), ((torch.float32, torch.float32), False)):
        run = Run()
        run.monitor._watched_groups = [(0, [nn.Parameter(torch.ones(1, dtype=dtype))]) for dtype in dtypes]
        run.monitor._looked_at = [True, True]
        (finding,) = run.monitor._still([1, 1], [0, 0])
        assert ("below the resolution" in str(finding)) == low


def test_movement_is_looked_at_from_the_first_labels_on() -> None:
    run = Run().steps(3, grade=nothing, labels=0)
    with mock.patch.object(run.optimizer, "step"):
        assert run.steps(20).said == [(14, "still_weights")]


def test_steps_without_labels_say_nothing_about_the_model() -> None:
    count = torch.tensor(0)
    assert Run().steps(3, grade=nothing, labels=count).steps(30).said == []
    assert Run().steps(3, grade=nothing, labels=0).steps(1, grade=nothing).said == [(4, "no_gradient")]
    assert Run().steps(9, grade=nothing, labels=count).said == [(4, "no_labels")]
    assert Run().steps(1, grade=nothing, labels=None).said == [(1, "no_gradient")]


def test_a_gradient_may_come_later() -> None:
    assert Run().steps(7, grade=first_without).steps(20).said == []
    assert Run().steps(2, grade=first_without).steps(1).steps(20, grade=first_without).said == []
    assert Run().steps(20, grade=first_without).said == [(8, "missing_gradients")]


def test_steps_that_fp16_skips_do_not_count() -> None:
    run = Run().steps(1, grade=first_without).steps(20, grade=first_without, skipped=True)
    assert run.said == []
    assert run.steps(7, grade=first_without).said == [(28, "missing_gradients")]


def test_nor_do_those_without_a_learning_rate() -> None:
    run = Run()
    run.optimizer.param_groups[0]["lr"] = 0.0
    assert run.steps(40, grade=first_without).said == []
    # LoRA's B begins to move now, and A has a gradient from the next step on.
    run.optimizer.param_groups[0]["lr"] = 1e-2
    assert run.steps(1, grade=first_without).steps(20).said == []


def test_movement_waits_for_the_full_rate() -> None:
    run = Run()
    (group,) = run.optimizer.param_groups
    group |= {"initial_lr": 1e-2, "lr": 1e-3}
    with mock.patch.object(run.optimizer, "step"):
        assert run.steps(20).said == []
        group["lr"] = 1e-2
        assert run.steps(12).said == [(31, "still_weights")]


def test_a_group_that_is_meant_to_rest_is_no_fault() -> None:
    run = Run()
    (group,) = run.optimizer.param_groups
    run.optimizer.add_param_group({"params": [group["params"].pop()], "lr": 0.0})
    assert run.steps(30).said == []
    run = Run()
    (group,) = run.optimizer.param_groups
    run.optimizer.add_param_group({"params": [group["params"].pop()], "lr": 1e-12})
    assert run.steps(30).said == [(13, "some_still_weights")]


def test_a_step_without_a_label_has_no_gradient_norm_to_be_judged_by() -> None:
    def log(labels: Any) -> list[Finding]:
        run = Run().steps(1)
        run.monitor.step(labels)
        return [finding for _ in range(2) for finding in run.monitor.log({"loss": 0.0, "grad_norm": 0.0})]

    assert log(0) == log(torch.tensor(0)) == []
    assert [f.check for f in log(5)] == [f.check for f in log(None)] == ["zero_gradient_norm"]


def test_another_ranks_gradients_count() -> None:
    run = Run().steps(7, grade=first_without)
    run.monitor._reduce = torch.ones_like
    assert run.steps(20, grade=first_without).said == []


def test_another_ranks_labels_count() -> None:
    run = Run()
    run.monitor._reduce = lambda flags: torch.maximum(flags, torch.ones_like(flags)) if len(flags) == 1 else flags
    assert run.steps(1, grade=nothing, labels=0).said == [(1, "no_gradient")]


class Rarely(nn.Module):
    """Its parameters have gradients; the loop takes them away again."""

    def __init__(self, parameters: nn.ParameterDict) -> None:
        super().__init__()
        self.parameters_of = parameters

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :3] * sum(self.parameters_of.values())


def test_one_expert_of_many_may_go_without() -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
            self.shared = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.shared(self.experts[0](x))

    assert Run(Mixture()).steps(30).said == []
    rare = nn.ParameterDict({"trainable_tokens_delta": torch.zeros(3), "other": torch.zeros(3)})
    assert Run(Rarely(rare)).steps(30, grade=nothing).said == [(1, "no_gradient")]
    del rare["other"]
    assert Run(Rarely(rare)).steps(30, grade=nothing).said == []


def test_movement_is_looked_at_again_and_again() -> None:
    run = Run().steps(60)
    with mock.patch.object(run.optimizer, "step"):
        assert run.steps(20).said == []  # between two looks
        assert run.steps(60).said == [(113, "still_weights")]


def test_parameters_outside_of_the_optimizer() -> None:
    run = Run()
    run.model.append(nn.Linear(4, 4))
    assert run.steps(30).said == [(1, "not_optimized")]
    sharded = Run(sharded=True)
    sharded.model.append(nn.Linear(4, 4))
    assert sharded.steps(30).said == []


def test_nothing_is_done_where_gradients_cannot_be_seen() -> None:
    assert Run(gradients=False).steps(30, grade=nothing).said == []


def test_after_the_first_step_nothing_is_read_between_log_entries() -> None:
    run = Run().steps(1, grade=first_without, log=False)

    def refuse(*args: Any) -> Any:
        raise AssertionError("read back")

    names = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy")
    looked = run.monitor.step
    reads: dict[str, Any] = dict.fromkeys(names, refuse)

    def watched(*args: Any, **kwargs: Any) -> list[Finding]:
        with mock.patch.multiple(Tensor, **reads):
            return looked(*args, **kwargs)

    run.monitor.step = watched  # type: ignore[method-assign]
    run.steps(120, grade=first_without, labels=torch.tensor(5), log=False)
    assert run.said == [] and run.monitor._missing is not None and run.monitor._moved is not None
    run.monitor.step = looked  # type: ignore[method-assign]
    assert run.steps(1).said == [(122, "missing_gradients")]


# -- before the first step -------------------------------------------------------------------------------------------


def test_elements_of_packed_and_absent_parameters() -> None:
    packed = SimpleNamespace(quant_state=SimpleNamespace(shape=torch.Size([4, 6])), numel=lambda: 12)
    absent = SimpleNamespace(ds_numel=7, numel=lambda: 0)
    assert start.elements([packed, absent, nn.Parameter(torch.zeros(5))]) == 24 + 7 + 5


def test_groups_in_words() -> None:
    groups = [{"params": [nn.Parameter(torch.zeros(5))], "lr": None}, {"params": [], "lr": 0.5, "weight_decay": 0.1}]
    assert start.describe_groups(groups) == (
        "optimizer groups: 1 tensors of 5 numbers; 0 tensors of 0 numbers at learning rate 0.5, weight decay 0.1"
    )


def test_dropped_documents() -> None:
    assert start.dropped_documents(0, 0) is start.dropped_documents(10, 100) is None
    assert "11 of 100 training documents (11%)" in str(start.dropped_documents(11, 100))


@pytest.mark.parametrize(
    ("rows", "bos", "found"),
    [
        ([[7, 7, 1]] * 3 + [[7, 1, 7]], 7, True),
        ([[7, 7, 1], [7, 1, 7]], 7, False),  # half of them: as the texts come
        ([[7, 7, 7, 1]] * 4, 7, False),  # padding on the left
        ([[7, 7]] * 4, 7, True),
        ([[7, 7, 1]] * 4, None, False),
        ([[7], []], 7, False),
    ],
)
def test_duplicate_bos(rows: list[list[int]], bos: int | None, found: bool) -> None:
    finding = start.duplicate_bos(Dataset.from_dict({"input_ids": rows}), bos)
    assert (finding is not None) == found


def test_duplicate_bos_reads_a_sample_and_no_stream() -> None:
    data = Dataset.from_dict({"input_ids": [[7, 7, 1]] * 1000})
    assert "200 of 200 sampled" in str(start.duplicate_bos(data, 7))
    assert start.duplicate_bos(data.to_iterable_dataset(), 7) is None


def test_a_finding_names_one_of_the_checks() -> None:
    with pytest.raises(ValueError, match="'other'"):
        Finding("other", "", "", "")
    assert [Finding(check, "a", "b", "c").stops for check in CHECKS] == list(CHECKS.values())
