"""docs/multi-gpu.md has the script's tables, and the script agrees with what is known."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "multi-gpu.md").read_text("utf-8")
GIB = 2**30


@pytest.fixture(scope="module")
def paper() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "multi_gpu_arithmetic", ROOT / "examples" / "multi_gpu_arithmetic.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_script_s_tables(paper: ModuleType) -> None:
    assert paper.filled(PAGE) == PAGE, "python examples/multi_gpu_arithmetic.py --write"
    assert len(re.findall(r"<!-- \w+:start -->\n\| ", PAGE)) == len(paper.TABLES)
    with pytest.raises(ValueError, match="no marks for the table"):
        paper.filled(PAGE.replace("<!-- traffic:end -->", ""))


def test_parameters_are_the_published_ones(paper: ModuleType) -> None:
    """The numbers of elements in the checkpoints on the Hub."""
    known = {"Qwen2.5-7B": 7_615_616_512, "Qwen2.5-32B": 32_763_876_352, "Llama-3-70B": 70_553_706_496}
    assert {shape.name: shape.parameters for shape in paper.SHAPES} == known
    assert paper.SHAPES[0].adapters == 80_740_352  # PEFT's count, LoraConfig(r=32, target_modules="all-linear")


def test_a_shape_is_what_transformers_and_peft_build(paper: ModuleType) -> None:
    import tiny_models

    peft = pytest.importorskip("peft")
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2,
             "intermediate_size": 80, "vocab_size": 101, "head_dim": 8, "tie_word_embeddings": False}  # fmt: skip
    for family in ("qwen2", "llama"):
        model = tiny_models.build(family, **sizes)
        shape = paper.Shape("tiny", 48, 3, 6, 2, 80, 101, qkv_bias=family == "qwen2", head_dim=8)
        assert shape.parameters == sum(p.numel() for p in model.parameters())
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=paper.RANK, target_modules="all-linear"))
        assert shape.adapters == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def test_memory_is_near_what_an_h100_measured(paper: ModuleType) -> None:
    """7B with LoRA at 8,192 tokens on one GPU, and what the page says of it."""
    measured = (ROOT / "docs" / "results" / "sft_tables_h100_interim.txt").read_text("utf-8")
    run = r"\] chronicals: .*?([\d.]+) GiB.*?qwen2.5-7b, (q?lora), packed, checkpointing (on|off)"
    found = re.findall(run, measured, re.DOTALL)
    assert len(found) == 3
    said = re.search(r"the sums are ([\d.]+) GiB without checkpointing, ([\d.]+) with, and ([\d.]+) with nf4", PAGE)
    assert said is not None
    claims = {("lora", "off"): said[1], ("lora", "on"): said[2], ("qlora", "on"): said[3]}
    for gib, mode, checkpointing in found:
        name = {"lora": "LoRA", "qlora": "QLoRA"}[mode]
        on_paper = paper.memory(paper.SHAPES[0], name, "ddp", checkpointing == "on", 1) / GIB
        assert on_paper == pytest.approx(float(gib), rel=0.05)
        assert f"{on_paper:.1f}" == claims[mode, checkpointing]
    assert "42.4, 19.0 and 9.5 measured" in PAGE


def test_the_rate_of_work_is_what_was_measured(paper: ModuleType) -> None:
    for tokens, checkpointing, said in ((18_481, False, "53% without"), (12_938, True, "54% with")):
        assert f"{tokens:,} tokens/s" in (ROOT / "docs" / "results" / "sft_tables_h100_interim.txt").read_text("utf-8")
        operations = paper.compute_seconds(paper.SHAPES[0], "LoRA", checkpointing) * paper.MFU * paper.PEAK_FLOPS
        share = operations / paper.TOKENS * tokens / paper.PEAK_FLOPS
        assert said.startswith(f"{share:.0%}") and said in PAGE


def test_formulas(paper: ModuleType) -> None:
    """By hand."""
    seven = paper.SHAPES[0]
    p = seven.parameters
    assert paper.states(seven, "full", "ddp", 8) == 16 * p
    assert paper.states(seven, "full", "zero1", 8) == 5.5 * p
    assert paper.states(seven, "full", "zero2", 8) == 3.75 * p
    assert paper.states(seven, "full", "fsdp2", 8) == 2 * p
    assert paper.traffic(seven, "full", "ddp", False, 8) == 7 * p
    assert paper.traffic(seven, "full", "zero2", False, 8) == 3.5 * p
    assert (
        paper.traffic(seven, "full", "fsdp2", True, 8) == paper.traffic(seven, "full", "fsdp2", False, 8) == 5.25 * p
    )
    assert paper.traffic(seven, "full", "zero3", True, 8) == 7 * p
    assert paper.traffic(seven, "LoRA", "ddp", True, 8) == 7 * seven.adapters
    assert paper.traffic(seven, "LoRA", "fsdp2", True, 8) == 7 * seven.adapters + 3.5 * p
    assert paper.bandwidth(8) == 0.8 * 450e9 and paper.bandwidth(16) == 0.8 * 400e9
    assert paper.full_logits(seven) == 12 * 8192 * 152_064
    assert "(65 GB for 32B)" in PAGE and 65 <= 2 * paper.SHAPES[1].parameters / 1e9 < 66


def test_what_is_recommended_fits_and_nothing_simpler_is_as_quick(paper: ModuleType) -> None:
    for shape in paper.SHAPES:
        for mode in paper.MODES:
            for gpus in paper.GPUS:
                found = paper.recommend(shape, mode, gpus)
                if found is None:
                    assert paper.memory(shape, mode, "fsdp2", True, gpus) > paper.USABLE
                    continue
                assert found.bytes <= paper.USABLE
                if mode != "full" and paper.memory(shape, mode, "ddp", found.checkpointing, gpus) <= paper.USABLE:
                    assert found.layout == "ddp"
                if found.checkpointing:
                    assert paper.memory(shape, mode, "fsdp2", False, gpus) > paper.USABLE


def test_transfers_can_be_hidden_as_the_page_says(paper: ModuleType) -> None:
    for row in paper.traffic_table().splitlines()[2:]:
        *cells, work = [cell.strip() for cell in row.strip("|").split("|")][3:]
        for cell in cells:
            assert float(cell.split("/")[1].replace(",", "")) < float(work.replace(",", ""))


def test_the_command_line(paper: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    paper.main([])
    printed = capsys.readouterr().out
    assert all(table() in printed for table in paper.TABLES.values())
    with pytest.raises(SystemExit, match="--write"):
        paper.main(["--wrte"])
