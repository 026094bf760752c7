"""docs/choosing-settings.md has the script's tables, and the script agrees with what is known and measured."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "choosing-settings.md").read_text("utf-8")
GIB = 2**30


@pytest.fixture(scope="module")
def paper() -> SimpleNamespace:
    sys.path.insert(0, str(ROOT / "examples"))  # the script takes its arithmetic from the one beside it
    try:
        return SimpleNamespace(**runpy.run_path(str(ROOT / "examples" / "settings_arithmetic.py")))
    finally:
        sys.path.remove(str(ROOT / "examples"))
        sys.modules.pop("multi_gpu_arithmetic")


def test_the_page_has_the_script_s_tables(paper: SimpleNamespace) -> None:
    assert paper.base.filled(PAGE, paper.TABLES) == PAGE, "python examples/settings_arithmetic.py --write"
    assert len(re.findall(r"<!-- \w+:start -->\n\| ", PAGE)) == len(paper.TABLES) == 6


def test_parameters_are_the_published_ones(paper: SimpleNamespace) -> None:
    """The numbers of elements in the checkpoints on the Hub."""
    known = {
        "Qwen2.5-0.5B": 494_032_768, "Qwen2.5-1.5B": 1_543_714_304, "Qwen2.5-7B": 7_615_616_512,
        "Llama-3-8B": 8_030_261_248, "Qwen2.5-14B": 14_770_033_664, "Qwen2.5-32B": 32_763_876_352,
        "Llama-3-70B": 70_553_706_496,
    }  # fmt: skip
    assert {shape.name: shape.parameters for shape in paper.SHAPES} == known


def test_a_tied_shape_is_what_transformers_builds(paper: SimpleNamespace) -> None:
    import tiny_models

    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2,
             "intermediate_size": 80, "vocab_size": 101, "head_dim": 8, "tie_word_embeddings": True}  # fmt: skip
    shape = paper.Shape("tiny", 48, 3, 6, 2, 80, 101, qkv_bias=True, head_dim=8, tied=True)
    assert shape.parameters == sum(p.numel() for p in tiny_models.build("qwen2", **sizes).parameters())


def test_the_paper_s_figure(paper: SimpleNamespace) -> None:
    rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in paper.paper_table().splitlines()[2:]]
    sevens = [row[2] for row in rows]
    assert sevens[:4] == ["14.0", "14.0", "56.0", "84.0"]
    p, whole = paper.SEVEN.parameters, float(rows[-1][3])
    assert whole == pytest.approx(sum(float(row[3]) for row in rows[:3] + rows[4:-1]), abs=0.6)
    assert float(rows[3][3]) == pytest.approx(12 * p / 1e9, abs=0.05)
    # What the table adds up is what the other page counts for one GPU, but for the logits.
    counted = paper.base.memory(paper.SEVEN, "full", "ddp", False, 1) - paper.base.LOGIT_BUDGET
    assert whole == pytest.approx((counted + paper.base.full_logits(paper.SEVEN)) / 1e9, abs=0.5)


@pytest.mark.parametrize(
    ("file", "shape", "kind", "tokens"),
    [
        ("bench_sft_qwen2505b_full_packed2048_h200", 0, "full, bf16", 16_384),
        ("bench_sft_qwen257b_lora_packed4096_h200", 2, "LoRA", 8_192),
    ],
)
def test_memory_is_near_what_was_measured(
    paper: SimpleNamespace, file: str, shape: int, kind: str, tokens: int
) -> None:
    found = json.loads((ROOT / "docs" / "results" / f"{file}.json").read_text("utf-8"))
    settings = found["settings"]
    assert (settings["tokens_per_step"], settings["checkpointing"]) == (tokens, "off")
    assert kind != "full, bf16" or settings["master"] == "bf16"
    (measured,) = (row["peak_memory_gib"] for row in found["rows"] if row["side"] == "chronicals")
    on_paper = paper.memory(paper.SHAPES[shape], kind, False, tokens) / GIB
    assert on_paper == pytest.approx(measured, rel=0.03)
    assert f"| {on_paper:.1f} | {measured:.1f} |" in PAGE and f"results/{file}.json" in PAGE


def test_what_is_chosen_fits_and_nothing_better_does(paper: SimpleNamespace) -> None:
    for kind in paper.KINDS:
        for shape in paper.SHAPES:
            for mebibytes in (*paper.GPUS.values(), *range(4_000, 150_000, 500)):
                usable = paper.SHARE * mebibytes * 2**20
                fits = {
                    (tokens, checkpointing)
                    for tokens in paper.TOKENS
                    for checkpointing in (False, True)
                    if paper.memory(shape, kind, checkpointing, tokens) <= usable
                }
                chosen = paper.choose(shape, kind, mebibytes)
                if chosen is None:
                    assert not fits
                    continue
                assert (chosen.tokens, chosen.checkpointing) in fits
                assert not any(n > chosen.tokens for n, ckpt in fits if ckpt == chosen.checkpointing)
                if chosen.checkpointing:  # it buys something
                    assert not any(n >= paper.ENOUGH for n, ckpt in fits if not ckpt)
                    assert not any(n > chosen.tokens // 2 for n, ckpt in fits if not ckpt)


def test_gpus_that_are_needed(paper: SimpleNamespace) -> None:
    for kind in ("full", "LoRA", "QLoRA"):
        for shape in paper.SHAPES:
            for mebibytes in paper.GPUS.values():
                needed, usable = paper.fewest_gpus(shape, kind, mebibytes), paper.SHARE * mebibytes * 2**20
                fits = [paper.base.memory(shape, kind, "fsdp2", True, n, 4096) <= usable for n in paper.FSDP_GPUS]
                assert needed == (paper.FSDP_GPUS[fits.index(True)] if any(fits) else None)


def test_a_larger_gpu_never_gets_less(paper: SimpleNamespace) -> None:
    sizes = list(paper.GPUS.values())
    assert sizes == sorted(sizes)
    for kind in paper.KINDS:
        for shape in paper.SHAPES:
            chosen = [paper.choose(shape, kind, size) for size in sizes]
            kept = [(c is not None, c is not None and not c.checkpointing) for c in chosen]
            assert kept == sorted(kept), (kind, shape.name)


def test_the_command_line(paper: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    paper.main([])
    printed = capsys.readouterr().out
    assert all(table() in printed for table in paper.TABLES.values())
    with pytest.raises(SystemExit, match="--write"):
        paper.main(["--wrte"])
