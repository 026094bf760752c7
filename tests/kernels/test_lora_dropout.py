"""Adapters behind dropout by kernels. `test_interpreter.py` runs this file with the kernels interpreted."""

from __future__ import annotations

import pytest
import torch
from kernels.test_lora_linears import leaves, make, reference, run

from chronicals_trl import kernels
from chronicals_trl.kernels import _common, _lora_core, _lora_dropout, lora_linears

BY_KERNELS = _common.INTERPRET


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """So that there are several, and several shares of each sum."""
    for options in (_lora_dropout._READ, _lora_dropout._GRADIENTS):
        monkeypatch.setitem(options, "BLOCK_M", 16)
        monkeypatch.setitem(options, "BLOCK_N", 16)
    launches = _lora_dropout._read_launch, _lora_dropout._gradients_launch
    for launch in launches:
        launch.cache_clear()
    kernels.LAUNCHES.clear()
    yield
    for launch in launches:
        launch.cache_clear()


def check(x, layers, used=None):
    (ours, our_state), (theirs, state) = run(lora_linears, x, layers, used), run(reference, x, layers, used)
    assert torch.equal(our_state, state)  # as much was drawn
    assert ours.keys() == theirs.keys()
    for name, ref in theirs.items():
        assert (ours[name] is None) == (ref is None), name
        if ref is not None and ref.numel():
            assert ours[name].shape == ref.shape and ours[name].dtype == ref.dtype, name
            assert (ours[name] - ref).abs().max() <= 4e-6 * ref.abs().max().clamp_min(1e-3), name
    return ours


@pytest.mark.parametrize(
    ("dropout", "launched"),
    [(0.3, 1), ((0.3, 0.5, 0.1), 1), ((0.3, 0.0, 0.5), 1), ((0.0, 0.0, 0.4), 1), (0.0, 0)],
    ids=str,
)
@pytest.mark.parametrize(("ranks", "lead", "width"), [((4, 4, 4), (3, 17), 40), ((1, 64, 5), (50,), 33)], ids=str)
def test_against_peft(ranks, lead, width, dropout, launched):
    check(*make(ranks, lead, width, dropout=dropout, dtype=torch.float32))
    if BY_KERNELS:
        assert kernels.LAUNCHES["lora_dropout"] == kernels.LAUNCHES["lora_dropout_backward"] == launched


@pytest.mark.parametrize(("ranks", "launched"), [((8,), 1), ((3, 5), 1), ((4, 3, 2, 4, 4), 2)], ids=str)
def test_any_number_of_adapters(ranks, launched):
    x, layers = make(ranks[:3], (2, 21), 35, (12,) * 3, dropout=0.4, dtype=torch.float32)
    layers += make(ranks[3:], (2, 21), 35, (12,) * 3, dropout=0.2, dtype=torch.float32)[1]
    check(x, layers)
    if BY_KERNELS:
        assert kernels.LAUNCHES["lora_dropout"] == kernels.LAUNCHES["lora_dropout_backward"] == launched


def test_beyond_the_kernels_ranks():
    check(*make((65, 4), (2, 21), 35, (12, 12), dropout=0.4, dtype=torch.float32))
    assert not kernels.LAUNCHES["lora_dropout"]


@pytest.mark.parametrize("used", [(0,), (1, 2), (2,)], ids=str)
def test_an_output_that_nobody_uses(used):
    check(*make(lead=(3, 17), width=40, dropout=0.3, dtype=torch.float32), used)


@pytest.mark.parametrize("frozen", [("x",), ("a0",), ("b1",), ("a0", "a1", "a2"), ("x", "a1")], ids=" ".join)
def test_what_is_frozen_gets_no_gradient(frozen):
    x, layers = make(lead=(3, 17), width=40, dropout=0.3, dtype=torch.float32)
    for name in frozen:
        leaves(x, layers)[name].requires_grad_(False)
    assert not {f"grad_{name}" for name in frozen} & check(x, layers).keys()


@pytest.mark.parametrize("lead", [(0,), (1,), (5, 0)], ids=str)
def test_few_tokens(lead):
    check(*make(lead=lead, dropout=0.3, dtype=torch.float32))


def test_strided_input_has_the_masks_of_its_own_layout():
    x, layers = make(lead=(4, 9), width=40, dropout=0.4, dtype=torch.float32)
    check(x.detach().transpose(0, 1).requires_grad_(), layers)


@pytest.mark.parametrize("scales", [(1.5, 1.5), (2.0, 0.3)], ids=str)
def test_with_both_products_from_one_reading_of_a_gradient(monkeypatch, scales):
    x, layers = make((4, 3), (4, 10), 9, (30, 25), dropout=0.3, dtype=torch.float32)
    layers = [layer._replace(scale=scale) for layer, scale in zip(layers, scales, strict=True)]
    taken = []
    original = _lora_core._in_one_pass
    monkeypatch.setattr(_lora_core, "_in_one_pass", lambda *a: taken.append(original(*a)) or taken[-1])
    check(x, layers)
    assert taken[0] is not None


@pytest.mark.skipif(not BY_KERNELS, reason="the order of sums is that of the kernels")
def test_the_same_bits_in_every_run():
    x, layers = make(lead=(60, 5), width=40, dropout=0.3, dtype=torch.float32)
    first, second = (run(lora_linears, x, layers)[0] for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
