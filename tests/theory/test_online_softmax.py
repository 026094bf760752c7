"""docs/theory/online-softmax.md: the laws of the merge, and that the loss's own pass obeys them."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from theory.online_softmax import EMPTY, State, log_sum_exp, merge, of_logit

from chronicals_trl.kernels import _common, linear_cross_entropy
from chronicals_trl.kernels._cross_entropy_pass import Head, OfLoss, Statistics, softmax_pass

INF = math.inf
UNIT = 2.0**-53
MOST = 60  # logits in a row

LOGITS = st.one_of(
    st.floats(-1e-3, 1e-3),
    st.floats(-50, 50),
    st.floats(-1e4, 1e4),
    st.sampled_from([-1e300, 1e300, 709.8, -745.2, 0.0]),
    st.just(-INF),
)
ROWS = st.lists(LOGITS, min_size=1, max_size=MOST).filter(lambda row: max(row) > -INF)


def close(ours: float, exact: float, scale: float) -> bool:
    """Within 4 roundings a logit: MOST of them are merged at most, at magnitudes up to `scale`."""
    return abs(ours - exact) <= 4 * MOST * UNIT * (1 + abs(scale))


def in_any_order(parts: list[Any], join: Any, random: Random) -> Any:
    """Join any two of the parts until one is left: every order and every tree can come of it."""
    parts = list(parts)
    while len(parts) > 1:
        i, j = random.sample(range(len(parts)), 2)
        joined = join(parts[i], parts[j])
        parts = [part for k, part in enumerate(parts) if k not in (i, j)] + [joined]
    return parts[0]


# -- the laws, exactly ------------------------------------------------------------------------------------------------


def power_of_two(exponent: int) -> Fraction:
    assert exponent <= 0, "the merge must never raise the base to a positive power"
    return Fraction(2) ** exponent


def exact_merge(a: State, b: State) -> State:
    return merge(a, b, power_of_two)


@st.composite
def exact_states(draw: st.DrawFn) -> State:
    if draw(st.booleans()) and draw(st.booleans()):
        return EMPTY
    return State(draw(st.integers(-60, 60)), draw(st.fractions(1, 1000)))


@settings(max_examples=300, deadline=None)
@given(exact_states(), exact_states(), exact_states())
def test_states_are_a_commutative_monoid(a: State, b: State, c: State) -> None:
    assert exact_merge(exact_merge(a, b), c) == exact_merge(a, exact_merge(b, c))
    assert exact_merge(a, b) == exact_merge(b, a)
    assert exact_merge(a, EMPTY) == exact_merge(EMPTY, a) == a


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-60, 60) | st.just(-INF), min_size=1, max_size=20), st.randoms(use_true_random=False))
def test_every_tree_gives_the_sum_by_definition(row: list[Any], random: Random) -> None:
    state = in_any_order([of_logit(v) for v in row], exact_merge, random)
    finite = [v for v in row if v > -INF]
    if not finite:
        assert state == EMPTY
        return
    peak = max(finite)
    assert state == State(peak, sum(power_of_two(v - peak) for v in finite))
    assert 1 <= state.total <= len(finite)


# -- the pass of the loss ---------------------------------------------------------------------------------------------


def own_pass(row: list[float], label: int, dtype: torch.dtype = torch.float64) -> tuple[float, float, float, list]:
    """Log-sum-exp, log-probability of the label, entropy, and the loss's gradient: `linear_cross_entropy`'s."""
    logits = torch.tensor([row], dtype=dtype)
    wide = _common.math_dtype(dtype)
    out = Statistics.empty(1, wide, logits.device)
    scale = torch.ones((), dtype=wide)
    softmax_pass(logits, torch.tensor([label]), out, Head(1.0, None), OfLoss(scale, False, 0.0))
    return out.log_sum_exp.item(), out.log_prob.item(), out.entropy.item(), logits[0].tolist()


@settings(max_examples=200, deadline=None)
@given(ROWS, st.randoms(use_true_random=False))
def test_the_pass_is_the_merge_in_any_order(row: list[float], random: Random) -> None:
    label = random.choice([i for i, v in enumerate(row) if v > -INF])
    state = in_any_order([of_logit(v) for v in row], merge, random)
    lse, log_prob, entropy, gradient = own_pass(row, label)
    expected = log_sum_exp(state)
    assert close(lse, expected, state.peak)
    assert close(log_prob, row[label] - expected, max(abs(row[label]), abs(state.peak)))
    shifted = [(v - state.peak, math.exp(v - state.peak) / state.total) for v in row]
    if -INF in row:
        assert math.isnan(entropy)  # as the page says
    else:
        assert close(entropy, math.log(state.total) - sum(p * below for below, p in shifted), 1)
    for i, v in enumerate(row):
        # The state alone gives every probability; written so that what is common to v and the peak cancels first.
        assert close(gradient[i] + (i == label), math.exp(v - state.peak) / state.total, 1)


@settings(max_examples=200, deadline=None)
@given(ROWS, st.randoms(use_true_random=False))
def test_tiles_of_the_pass_join_to_the_pass_over_the_row(row: list[float], random: Random) -> None:
    """A tile's log-sum-exp L is the state (L, 1); its share of the row is the weight of its probabilities."""
    order = random.sample(range(len(row)), len(row))
    cuts = sorted(random.sample(range(1, len(row)), random.randint(0, min(5, len(row) - 1))))
    tiles = [order[a:b] for a, b in zip([0, *cuts], [*cuts, len(row)], strict=True)]
    tiles = [tile for tile in tiles if max(row[i] for i in tile) > -INF]  # an empty state has no softmax
    label = random.choice([i for i, v in enumerate(row) if v > -INF])
    whole, _, entropy, gradient = own_pass(row, label)

    found = []
    for tile in tiles:
        here = next(k for k, i in enumerate(tile) if row[i] > -INF)
        lse, _, tile_entropy, tile_gradient = own_pass([row[i] for i in tile], here)
        tile_gradient[here] += 1  # probabilities
        found.append((lse, tile_entropy, tile_gradient))
    joined = in_any_order([State(lse, 1.0) for lse, _, _ in found], merge, random)
    assert close(whole, log_sum_exp(joined), joined.peak)
    shares = [math.exp(lse - joined.peak) / joined.total for lse, _, _ in found]
    # An error of a tile's log-sum-exp is one of its share, unless that has underflowed.
    scale = max(abs(lse) for lse, _, _ in found if lse >= joined.peak - 800)
    for share, tile, (_, _, probabilities) in zip(shares, tiles, found, strict=True):
        for i, p in zip(tile, probabilities, strict=True):
            assert close(gradient[i] + (i == label), share * p, scale)
    if -INF not in row:
        parts = sum(s * (h - math.log(s)) for s, (_, h, _) in zip(shares, found, strict=True) if s)
        assert close(entropy, parts, scale)


@settings(max_examples=50, deadline=None)
@given(ROWS, st.randoms(use_true_random=False))
def test_the_public_op_says_the_same(row: list[float], random: Random) -> None:
    label = random.choice([i for i, v in enumerate(row) if v > -INF])
    hidden = torch.ones(1, 1, dtype=torch.float64)
    weight = torch.tensor(row, dtype=torch.float64)[:, None].requires_grad_()
    out = linear_cross_entropy(hidden, weight, torch.tensor([label]))
    (gradient,) = torch.autograd.grad(out.loss, weight)
    state = in_any_order([of_logit(v) for v in row], merge, random)
    scale = max(abs(row[label]), abs(state.peak))
    assert close(out.log_probs.item(), row[label] - log_sum_exp(state), scale)
    expected = [math.exp(v - state.peak) / state.total - (i == label) for i, v in enumerate(row)]
    assert all(close(g, e, 1) for g, e in zip(gradient[:, 0].tolist(), expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_nothing_overflows_at_the_largest_logits(dtype: torch.dtype) -> None:
    """exp of the largest logit is beyond every dtype; the shifted sum lies between 1 and the number of logits."""
    largest = torch.finfo(dtype).max
    lse, log_prob, _, gradient = own_pass([largest, -largest, largest, 0.0], 0, dtype)
    wide = torch.finfo(_common.math_dtype(dtype))
    assert lse == pytest.approx(largest + math.log(2), rel=4 * wide.eps) and math.isfinite(lse)
    assert log_prob == pytest.approx(-math.log(2), rel=4 * wide.eps)
    assert gradient == pytest.approx([-0.5, 0.0, 0.5, 0.0], abs=4 * torch.finfo(dtype).eps)


def test_where_the_plain_sum_overflows() -> None:
    """The page's thresholds: the last logit, in steps of 0.01, whose exponential is finite."""
    page = (Path(__file__).parents[2] / "docs" / "theory" / "online-softmax.md").read_text("utf-8")
    for dtype, threshold in [(torch.float16, 11.09), (torch.bfloat16, 88.72), (torch.float32, 88.72)]:
        name = str(dtype).removeprefix("torch.")
        assert f"{threshold} in {name}" in page
        # In float64, then rounded: bfloat16 itself cannot hold the threshold.
        steps = [torch.tensor(threshold + 0.01 * k, dtype=torch.float64).exp().to(dtype).isinf() for k in (0, 1)]
        assert not steps[0] and steps[1]


# -- the kernels ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not _common.HAS_TRITON, reason="triton is not installed")
@pytest.mark.skipif(_common.INTERPRET, reason="this process interprets the kernels already")
def test_the_kernels_fold_to_the_same_states() -> None:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("folded_rows.py"))],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["launches"]["fold_pass"] == 1 + 2 + 7 and found["launches"]["softmax_pass"] == 3
    for errors in found["errors"].values():
        assert errors["peak"] == 0  # a maximum is exact in any order
        assert errors["total"] < 64 * 2**-24
        assert errors["log_sum_exp"] < 4 * 2**-24 and errors["one_pass"] < 4 * 2**-24
