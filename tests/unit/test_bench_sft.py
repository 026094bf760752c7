"""`bench sft`: its arguments, its documents, what counts as a real token, operations, and the peer's attention."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from chronicals_trl import cli
from chronicals_trl.bench import process
from chronicals_trl.bench.sft import attention as sft_attention
from chronicals_trl.bench.sft import command as sft_command
from chronicals_trl.bench.sft import compile as sft_compile
from chronicals_trl.bench.sft import models as sft_models
from chronicals_trl.bench.sft import run as sft_run
from chronicals_trl.bench.sft.cases import (
    PROTOCOLS,
    SHAPES,
    SIDES,
    Documents,
    batch_rows,
    make_documents,
    training_flops,
)
from chronicals_trl.bench.sft.count import Counted, document_lengths

TINY = SHAPES["tiny"]


class Stop(Exception):
    """The settings are known."""


@pytest.fixture
def no_run(monkeypatch: pytest.MonkeyPatch) -> list[sft_run.Settings]:
    """The settings that the command came to, in place of a run."""
    seen: list[sft_run.Settings] = []

    def record(settings: sft_run.Settings, say: Any) -> Any:
        seen.append(settings)
        raise Stop

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sft_run, "run", record)
    return seen


def settings_of(seen: list[sft_run.Settings], folder: Path, *arguments: str) -> sft_run.Settings:
    with pytest.raises(Stop):
        cli.main(["bench", "sft", "--output", str(folder), *arguments])
    return seen[-1]


# -- the command ------------------------------------------------------------------------------------------------------


def test_defaults(no_run: list[sft_run.Settings], tmp_path: Path) -> None:
    got = settings_of(no_run, tmp_path / "new")
    assert (got.shape, got.mode, got.protocol, got.checkpointing) == ("tiny", "lora", "packed", "off")
    assert (got.warm_up, got.steps, got.repeats, got.fresh) == (10, 6, 3, False)
    assert got.chronicals == {"lora_plus": "off"} and got.learning_rate == 2e-4
    assert got.sides == ["chronicals", "trl-tuned", "trl-liger", "trl-cce", "unsloth-packing", "torch-compile"]
    assert (tmp_path / "new").is_dir()
    assert got.tokens_per_step % got.row_tokens == 0
    assert (got.master, got.floor) == ("bf16", False)


def test_what_is_given(no_run: list[sft_run.Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "packages").mkdir()
    (tmp_path / "python").symlink_to(sys.executable)
    monkeypatch.chdir(tmp_path)  # the sides run in other folders
    got = settings_of(
        no_run, tmp_path, "--shape", "qwen2.5-7b", "--mode", "full", "--row-tokens", "4096", "--tokens-per-step",
        "8192", "--sides", "trl", "unsloth", "trl", "--python", "unsloth=./python", "--pythonpath", "trl=packages",
        "--chronicals-config", '{"lora_plus": "auto", "rms_norm": "off"}', "--gradient-checkpointing", "default",
        "--master", "fp32", "--floor",
    )  # fmt: skip
    assert (got.row_tokens, got.tokens_per_step, got.learning_rate, got.steps) == (4096, 8192, 1e-4, 50)
    assert got.sides == ["trl", "unsloth"]
    assert (got.python, got.pythonpath) == (
        {"unsloth": str(tmp_path / "python")},
        {"trl": str(tmp_path / "packages")},
    )
    assert got.chronicals == {"lora_plus": "auto", "rms_norm": "off"} and got.checkpointing == "default"
    assert (got.master, got.floor) == ("fp32", True)


def test_short_protocol(no_run: list[sft_run.Settings], tmp_path: Path) -> None:
    full = settings_of(no_run, tmp_path, "--protocol", "short", "--mode", "full")
    assert full.documents_per_step == 16 and "chronicals-packing" in full.sides and "trl" in full.sides
    assert settings_of(no_run, tmp_path, "--protocol", "short").documents_per_step == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--tokens-per-step", "1000", "--row-tokens", "512"], "--tokens-per-step 1000 is no multiple of"),
        (["--sides", "axolotl"], "invalid choice: 'axolotl'"),
        (["--mode", "dora"], "invalid choice: 'dora'"),
        (["--steps", "0"], "must be at least 1, not 0"),
        (["--row-tokens", "1", "--tokens-per-step", "4"], "--row-tokens must be at least 2 and at most 32768, not 1"),
        (["--learning-rate", "0"], "--learning-rate must be above 0 and finite, not 0.0"),
        (["--row-tokens", "40000"], "at most 32768, not 40000"),
        (["--learning-rate", "inf"], "--learning-rate must be above 0 and finite, not inf"),
        (["--timeout", "0"], "--timeout must be above 0 and finite, not 0"),
        (["--timeout", "nan"], "--timeout must be above 0 and finite, not nan"),
        (["--seed", "-1"], "--seed must be at least 0, not -1"),
        (["--documents-per-step", "3"], "--documents-per-step is of --protocol short"),
        (["--protocol", "short", "--tokens-per-step", "512"], "--tokens-per-step is of --protocol packed"),
        (["--output", __file__], "cannot be made: File exists"),
        (["--pythonpath", "unsloth"], "must be SIDE=DIR, not 'unsloth'"),
        (["--pythonpath", "unsloth=/no/such"], "names no folder: '/no/such'"),
        (["--python", "unsloth=/no/such"], "names no program: '/no/such'"),
        (["--python", f"axolotl={sys.executable}"], "unknown side 'axolotl'"),
        (["--chronicals-config", '{"rms_nrom": "off"}'], "Did you mean 'rms_norm'?"),
        (["--chronicals-config", "[1]"], "must be a JSON object"),
        (["--chronicals-config", "{"], "is no JSON"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], told: str, no_run: list[sft_run.Settings], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main(["bench", "sft", "--output", str(tmp_path), *arguments])
    assert done.value.code == 2 and not no_run
    assert told in capsys.readouterr().err


def test_steps_of_a_dry_run(no_run: list[sft_run.Settings], tmp_path: Path) -> None:
    """Small unless told otherwise, and what is told counts."""
    for arguments, expected in (
        ([], (256, 512)),
        (["--tokens-per-step", "1024"], (256, 1024)),
        (["--row-tokens", "64"], (64, 128)),
        (["--shape", "qwen2.5-0.5b"], (2048, 16_384)),
    ):
        got = settings_of(no_run, tmp_path, *arguments)
        assert (got.row_tokens, got.tokens_per_step) == expected


@pytest.mark.parametrize("kept", [True, False])
def test_an_interrupted_run_says_what_is_left(
    kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(settings: sft_run.Settings, say: Any) -> Any:
        if kept:
            settings.keep({"rows": []})
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sft_run, "run", interrupted)
    assert cli.main(["bench", "sft", "--output", str(tmp_path)]) == 130
    file = tmp_path / "bench_sft_tiny_lora_packed256_cpu.json"
    assert file.exists() is kept
    assert (f"{file} has what was measured before" if kept else "nothing was measured") in capsys.readouterr().out


def test_every_side_has_its_place() -> None:
    every = {*sft_command.default_sides("packed"), *sft_command.default_sides("short")}
    plain = {name for name, side in SIDES.items() if side.parts is None}
    assert every == plain - {"chronicals-accumulation", "chronicals-offload"}  # to be named, as an ablation has


def test_the_worker_imports_no_trainer() -> None:
    """A peer's process may hold another TRL, and Unsloth has to be imported before it."""
    code = (
        "import sys, chronicals_trl.bench.sft.worker, chronicals_trl.bench.sft.sides\n"
        "print({'trl', 'transformers', 'datasets', 'peft'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=process.environment())
    assert done.stdout.strip() == "set()", done.stderr


# -- documents --------------------------------------------------------------------------------------------------------


def test_documents(tmp_path: Path) -> None:
    made = make_documents(PROTOCOLS["packed"], 512, 300, 20_000, 10, 3)
    assert made.lengths.sum() >= 20_000 and made.lengths[:-1].sum() < 20_000
    assert 2 <= made.lengths.min() and made.lengths.max() == 300
    assert 3 <= made.ids.min() and made.ids.max() < 512
    assert len(make_documents(PROTOCOLS["short"], 512, 512, 0, 40, 3).lengths) == 40
    made.save(str(tmp_path / "documents.npz"))
    again = Documents.load(str(tmp_path / "documents.npz"))
    assert again.lists() == made.lists() and [len(ids) for ids in made.lists()] == made.lengths.tolist()
    other = make_documents(PROTOCOLS["packed"], 512, 300, 20_000, 10, 4)
    assert not np.array_equal(other.ids[:100], made.ids[:100])
    with pytest.raises(ValueError, match="longest must be at least 2"):
        make_documents(PROTOCOLS["packed"], 512, 1, 10, 10, 0)


def test_text_gives_the_ids_back() -> None:
    made = make_documents(PROTOCOLS["short"], 512, 64, 500, 5, 0)
    tokenizer = sft_models.make_tokenizer(512)
    assert [tokenizer(text)["input_ids"] for text in made.texts()] == made.lists()
    assert len(tokenizer) == 512 and (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        0,
        1,
        2,
    )


def test_rows_of_a_side() -> None:
    packed, short = PROTOCOLS["packed"], PROTOCOLS["short"]
    assert batch_rows(SIDES["chronicals"], packed, 8, 2048, 400.0) == (8, True)
    assert batch_rows(SIDES["trl"], packed, 8, 2048, 400.0) == (8, False)
    assert batch_rows(SIDES["chronicals"], short, 16, 512, 190.0) == (16, False)
    assert batch_rows(SIDES["chronicals-packing"], short, 16, 512, 190.0) == (6, True)  # 16 * 190 / 512
    assert batch_rows(SIDES["unsloth-packing"], short, 2, 512, 190.0) == (1, True)


def test_model_is_as_its_numbers_say_and_the_same_each_time(tmp_path: Path) -> None:
    model = sft_models.make_model(TINY, 0)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    linears = {name: m.weight.numel() for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    head = linears.pop("lm_head")
    assert (sum(linears.values()), head) == (TINY.linear_weights, TINY.head_weights)
    again = sft_models.make_model(TINY, 0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    sft_models.write_model(TINY, 0, tmp_path)
    written = (tmp_path / "model.safetensors").stat().st_mtime_ns
    sft_models.write_model(TINY, 0, tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns == written  # kept
    sft_models.write_model(TINY, 1, tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns != written  # another seed


# -- operations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_operations_are_those_that_torch_counts(mode: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = sft_models.make_model(TINY, 0).float()
    model.set_attn_implementation("eager")
    length = 40
    expected = training_flops(TINY, mode, length, 2.0 * length**2)  # eager computes what causal attention leaves out
    if mode == "lora":
        peft = pytest.importorskip("peft")
        from chronicals_trl.bench.sft.sides import _lora

        model = peft.get_peft_model(model, _lora())
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == TINY.lora_weights
        # The frozen embedding needs no gradient: the first layer's q, k and v form none for their input.
        q, kv = TINY.heads * TINY.head_dim, TINY.kv_heads * TINY.head_dim
        expected -= 2 * length * TINY.hidden * (q + 2 * kv + 3 * 32)
    ids = torch.arange(3, 3 + length)[None]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    # RoPE's outer product of positions and frequencies is not the model's.
    assert counter.get_total_flops() == pytest.approx(expected, rel=2e-3)


# -- real tokens ------------------------------------------------------------------------------------------------------


def test_padding_is_not_counted() -> None:
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    examples = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}, {"input_ids": [5, 6], "labels": [5, 6]}]
    padded = DataCollatorForLanguageModeling(pad_token_id=2)(examples)
    assert padded["input_ids"].shape == (2, 4) and document_lengths(padded) == [4, 2]
    packed = [{**each, "seq_lengths": lengths} for each, lengths in zip(examples, ([3, 1], [2]), strict=True)]
    flat = DataCollatorForLanguageModeling(pad_token_id=2, padding_free=True)(packed)
    # A document of one token has no label, so it trains nothing.
    assert document_lengths(flat) == [3, 2]


def test_the_end_of_a_packed_row_is_not_counted() -> None:
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 8, 9, 2, 2, 2]]),
        "labels": torch.tensor([[-100, 6, 7, -100, 9, -100, -100, -100]]),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2]]),
    }
    assert document_lengths(batch) == [3, 2]
    del batch["position_ids"]
    assert document_lengths({**batch, "packed_seq_lengths": torch.tensor([3, 2, 3], dtype=torch.int32)}) == [3, 2]
    # Empty documents at the end make the shape static.
    bounds = torch.tensor([0, 3, 5, 8, 8, 8], dtype=torch.int32)
    assert document_lengths({**batch, "cu_seq_lens_q": bounds}) == [3, 2]
    mask = {"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]])}
    assert document_lengths({**batch, **mask}) == [5]
    # Nor where the padding has labels.
    starts = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2]])
    assert document_lengths({"input_ids": batch["input_ids"], "labels": batch["input_ids"], **mask,
                             "position_ids": starts}) == [3, 2]  # fmt: skip


def test_a_masked_prompt_counts() -> None:
    """It is computed; what has no label at all is not trained on."""
    batch = {"input_ids": torch.tensor([[5, 6, 7], [5, 6, 7]]), "labels": torch.tensor([[-100, -100, 7], [-100] * 3])}
    assert document_lengths(batch) == [3]
    assert document_lengths({"input_ids": batch["input_ids"]}) == [3, 3]


def test_batches_of_steps() -> None:
    collate = Counted(lambda n: {"input_ids": torch.ones(1, n, dtype=torch.int64), "other": None})
    for n in (2, 3, 4):
        assert collate(n)["input_ids"].shape == (1, n)
    assert list(collate.batches(1, 3)) == [([3], 3), ([4], 4)]


# -- the bare loop's rows ---------------------------------------------------------------------------------------------


def test_rows_hold_every_document_once_and_no_more_than_fits() -> None:
    lengths = make_documents(PROTOCOLS["packed"], 512, 256, 60_000, 10, 0).lengths
    rows = list(sft_compile.fill_rows(lengths, 256))
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    filled = [int(lengths[row].sum()) for row in rows]
    assert max(filled) <= 256 and sum(filled) / len(filled) > 0.95 * 256


def test_a_row_of_the_bare_loop() -> None:
    batch = sft_compile.collate([[[5, 6, 7], [8, 9]], [[10, 11]]], 6, 5)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 2, 10, 11, 2, 2, 2, 2]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9, -100, -100, 11, -100, -100, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 0, 1, 0, 1, 2, 3]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5, 6, 8, 12]
    assert document_lengths(batch) == [3, 2, 2]
    assert sft_compile.collate([[[5, 6, 7]]], 3, 3)["cu_seq_lens_q"].tolist() == [0, 3, 3, 3]
    with pytest.raises(ValueError, match="3 documents in a step, more than the 2"):
        sft_compile.collate([[[5, 6], [7, 8], [9]]], 5, 2)


# -- the peer's attention ---------------------------------------------------------------------------------------------


def reference(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, cu_k: Tensor, *_: int, scale: float, window_size: Any,
              enable_gqa: bool = True) -> Tensor:  # fmt: skip
    assert window_size == (-1, 0)  # causal
    bounds = cu.tolist()
    parts = [
        torch.nn.functional.scaled_dot_product_attention(
            *(x[a:b].transpose(0, 1)[None] for x in (q, k, v)), is_causal=True, scale=scale, enable_gqa=True
        )[0].transpose(0, 1)
        for a, b in pairwise(bounds)
        if b > a
    ]
    return torch.cat(parts)


def test_the_peers_attention_keeps_documents_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", reference)
    model = sft_models.make_model(TINY, 0).float()
    batch = sft_compile.collate([[[5, 6, 7], [8, 9, 10, 11]]], 8, 4)
    alone = [model(input_ids=batch["input_ids"][:, a:b]).logits for a, b in ((0, 3), (3, 7))]
    model.set_attn_implementation(sft_attention.register())
    packed = model(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], cu_seq_lens_q=batch["cu_seq_lens_q"],
        max_length_q=4,
    ).logits  # fmt: skip
    torch.testing.assert_close(packed[:, :7], torch.cat(alone, 1), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="takes one packed row"):
        model(input_ids=batch["input_ids"], attention_mask=torch.ones_like(batch["input_ids"]))
