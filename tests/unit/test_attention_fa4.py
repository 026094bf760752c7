"""flash-attn-4's forward kernel called again without the function that chose it: only where nothing can differ."""

from __future__ import annotations

import errno
import fcntl
import importlib.util
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import fake_flash_attention as fake
import pytest
import torch
from torch import Tensor

from chronicals_trl.model import attention_fa4
from chronicals_trl.model.attention_choice import verify_backend

CPU = torch.device("cpu")
OPTIONS = {"heads": 4, "kv_heads": 2, "head_dim": 16, "window": None, "device": CPU}


@pytest.fixture(autouse=True)
def fake_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    fake.install(monkeypatch)


def inputs(seed: int = 0, batch: int = 1, length: int = 12, *, shift: int = 0) -> list[Tensor]:
    """q, k, v (B, H, S, D), each `shift` elements into its memory."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for heads in (4, 2, 2):
        memory = torch.randn(batch * length * heads * 8 + shift, generator=generator)
        found.append(memory[shift:].view(batch, length, heads, 8).transpose(1, 2))
    return found


def check(tensors: list[Tensor], lengths: tuple[int, ...] = (5, 7), window: int | None = None, **options) -> int:
    """How often the package's function has been called by a call that gives what it should."""
    settings = {"max_seqlen": 12, "scale": 0.4, **options}
    q, k, v = tensors
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    before = fake.CALLS_OF_THE_FUNCTION["forward"]
    out, lse = attention_fa4.forward(q, k, v, cu_seqlens, settings["max_seqlen"], settings["scale"], window, 0.0)
    flat = (x.transpose(1, 2).flatten(0, 1) for x in tensors)
    expected = fake.attend(*flat, cu_seqlens, settings["scale"], window, 0.0)
    torch.testing.assert_close(out.flatten(0, 1), expected)
    assert out.shape == (q.shape[0], q.shape[2], 4, 8) and lse.shape == (4, q.shape[0] * q.shape[2])
    return fake.CALLS_OF_THE_FUNCTION["forward"] - before


def test_the_second_call_of_a_kind_goes_to_the_kernel() -> None:
    assert check(inputs(0)) == 1
    # Other values, other memory, other documents.
    for seed, lengths in ((1, (5, 7)), (2, (11, 1)), (3, (12, 0))):
        assert check(inputs(seed), lengths) == 0
    assert fake.CALLS["forward"] == 4


def test_whatever_could_change_the_choice_is_chosen_anew() -> None:
    calls = [
        lambda: check(inputs()),
        lambda: check(inputs(length=14), (7, 7), max_seqlen=14),
        lambda: check(inputs(batch=2), (12, 12)),
        lambda: check(inputs(), (4, 4, 4)),
        lambda: check(inputs(), window=3),
        lambda: check(inputs(), scale=0.5),
        lambda: check(inputs(), max_seqlen=13),
        lambda: check([x.contiguous() for x in inputs()]),  # heads outside
    ]
    assert [call() for call in calls] == [1] * len(calls)
    assert [call() for call in calls] == [0] * len(calls)


def test_offsets_that_lie_apart_are_another_kind() -> None:
    """A kernel reads them as they lie in memory; the package refuses what is not contiguous."""
    q, k, v = inputs()
    offsets = torch.tensor([0, 5, 12], dtype=torch.int32)
    attention_fa4.forward(q, k, v, offsets, 12, 0.4, None, 0.0)
    before = fake.CALLS_OF_THE_FUNCTION["forward"]
    for other in (torch.stack([offsets, offsets], dim=1)[:, 0], offsets.long()):
        with pytest.raises(AssertionError):
            attention_fa4.forward(q, k, v, other, 12, 0.4, None, 0.0)
    assert fake.CALLS_OF_THE_FUNCTION["forward"] == before


def test_what_is_not_aligned_is_left_to_the_package() -> None:
    assert check(inputs()) == 1
    for _ in range(2):
        check(inputs(shift=1))
    assert check(inputs()) == 0


def test_nothing_is_replayed_in_doubt() -> None:
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in inputs())
    cu_seqlens, out, lse = torch.tensor([0, 12]), torch.empty(12, 4, 8), torch.empty(4, 12)
    tensors = (q, k, v, cu_seqlens, out, lse)
    arguments = (q, k, v, out, lse, 0.4, cu_seqlens, cu_seqlens, None, (None, None))

    def replay(*arguments: object) -> object:
        return attention_fa4._replay_of([(print, arguments)], tensors)

    assert replay(*arguments) is not None
    assert replay(*arguments, cu_seqlens.clone()) is None  # a table made of it, as with more than 256 documents
    assert replay(q.clone(), *arguments[1:]) is None  # a copy, as of a layout that the kernel does not take
    assert replay(q[:6], *arguments[1:]) is None  # a part
    assert replay(*arguments, (cu_seqlens, None)) is None  # hidden in a tuple
    assert replay(q, q, *arguments[2:]) is None  # where is k?
    call = (print, arguments)
    assert attention_fa4._replay_of([call, call], tensors) is None  # split in two kernels
    assert attention_fa4._replay_of([], tensors) is None
    same = (q, k, k, cu_seqlens, out, lse)
    assert attention_fa4._replay_of([(print, (q, k, k, *arguments[3:]))], same) is None  # which is k, which v?


def test_a_package_without_such_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(*args, **kwargs):
        return fake.forward(*args, **kwargs)

    fake.install(monkeypatch, forward=other)
    assert [check(inputs(seed)) for seed in (0, 1)] == [1, 1]


def test_the_packages_cache_is_its_own_again(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = fake.forward.compile_cache
    check(inputs())
    assert fake.forward.compile_cache is kernels

    def broken(*arguments):
        raise RuntimeError("out of memory")

    fake.install(monkeypatch)
    monkeypatch.setattr(fake, "kernel", broken)
    monkeypatch.setattr(fake.forward, "compile_cache", own := {})
    with pytest.raises(RuntimeError, match="out of memory"):
        check(inputs())
    assert fake.forward.compile_cache is own and not attention_fa4._replays


def test_two_threads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second begins while the first one's kernel is looked up: it must not take the watch for the cache."""
    inside, go_on = threading.Event(), threading.Event()
    real = fake.kernel

    def slow(*arguments):
        inside.set()
        assert go_on.wait(10)
        return real(*arguments)

    monkeypatch.setattr(fake.forward, "compile_cache", own := {})
    monkeypatch.setattr(fake, "kernel", slow)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(check, inputs())
        assert inside.wait(10)
        second = pool.submit(check, inputs(length=14), (7, 7), max_seqlen=14)
        while not second.running():
            time.sleep(0.01)
        time.sleep(0.1)
        go_on.set()
        first.result(10), second.result(10)
    assert fake.forward.compile_cache is own
    assert [check(inputs()), check(inputs(length=14), (7, 7), max_seqlen=14)] == [0, 0]


def test_kinds_are_forgotten_before_they_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_fa4, "MAX_LAUNCHES", 2)
    for length in (12, 13, 14, 15):
        check(inputs(length=length), (5, length - 5), max_seqlen=20)
    assert len(attention_fa4._replays) <= 2


def test_verification_covers_the_second_way(monkeypatch: pytest.MonkeyPatch) -> None:
    assert verify_backend("fa4", **OPTIONS) is None
    assert fake.CALLS_OF_THE_FUNCTION["forward"] == 1 and fake.CALLS["forward"] == 2
    right = attention_fa4._replay_of

    def swapped(calls, tensors):
        replay = right(calls, tensors)
        places = {place: {1: 2, 2: 1}.get(tensor, tensor) for place, tensor in replay.places}  # k for v
        return replay._replace(places=tuple(places.items()))

    fake.install(monkeypatch)
    monkeypatch.setattr(attention_fa4, "_replay_of", swapped)
    reason = verify_backend("fa4", **OPTIONS)
    assert reason is not None and "output 0 differs" in reason


# -- compiled kernels on disk ----------------------------------------------------------------------------------------

ENABLED, FOLDER = attention_fa4._CACHE, attention_fa4._CACHE_FOLDER


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with the package, on which nothing has been set; where its caches are."""
    monkeypatch.setattr(os, "environ", {"XDG_CACHE_HOME": str(tmp_path)})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.delitem(sys.modules, "flash_attn.cute.cache_utils", raising=False)
    return tmp_path


def test_compiled_kernels_are_kept(environment: Path) -> None:
    """In a folder of the user's own, since what is in it is run, and of the kind of GPU."""
    attention_fa4._keep_compiled_kernels()
    folder = environment / "chronicals-trl" / "flash_attn_4" / "sm_90"
    assert (os.environ[ENABLED], os.environ[FOLDER]) == ("1", str(folder))
    assert folder.stat().st_mode & 0o777 == 0o700
    with open(folder / "lock", "w") as file:  # another rank, at the same time
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        del os.environ[ENABLED]
        attention_fa4._keep_compiled_kernels()
    assert os.environ[ENABLED] == "1"


def test_the_users_settings_of_the_cache_win(environment: Path) -> None:
    os.environ[ENABLED] = "0"
    attention_fa4._keep_compiled_kernels()
    assert os.environ[ENABLED] == "0" and FOLDER not in os.environ and not list(environment.iterdir())
    del os.environ[ENABLED]
    os.environ[FOLDER] = str(environment / "mine")
    attention_fa4._keep_compiled_kernels()
    assert os.environ[ENABLED] == "1" and os.environ[FOLDER] == str(environment / "mine")
    assert [each.name for each in environment.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    "obstacle",
    ["no package", "a package without a spec", "imported already", "no GPU", "no folder", "no locks", "no home"],
)
def test_no_cache_where_it_could_not_work(obstacle: str, environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    if obstacle == "no package":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    elif obstacle == "a package without a spec":
        monkeypatch.undo()
        monkeypatch.setattr(os, "environ", {"XDG_CACHE_HOME": str(environment)})
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
        monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    elif obstacle == "no GPU":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    elif obstacle == "imported already":
        monkeypatch.setitem(sys.modules, "flash_attn.cute.cache_utils", None)
    elif obstacle == "no folder":
        (environment / "chronicals-trl").write_text("a file")
    elif obstacle == "no locks":
        monkeypatch.setattr(fcntl, "flock", fail)
    else:
        del os.environ["XDG_CACHE_HOME"]
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    attention_fa4._keep_compiled_kernels()
    assert ENABLED not in os.environ and FOLDER not in os.environ
