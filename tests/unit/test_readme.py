"""README and docs say what the code does: generated tables, settings, commands, code blocks and links.

`python tests/unit/test_readme.py --write` puts the table of models and parts into README.md anew.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
if __name__ == "__main__":  # pytest has both on its path
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tiny_models  # noqa: E402
import torch  # noqa: E402

import chronicals_trl  # noqa: E402
from chronicals_trl import ChronicalsConfig, SFTConfig, patch_model  # noqa: E402
from chronicals_trl.config import ATTENTION_BACKENDS, HEALTH, PART_STATES, PARTS  # noqa: E402
from chronicals_trl.model.attention_choice import verify_isolation  # noqa: E402
from chronicals_trl.observe import ThroughputMeter  # noqa: E402
from chronicals_trl.observe.flops import TrainingFlops  # noqa: E402

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]

FAMILY_LABELS = {
    "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2, Qwen2.5", "qwen3": "Qwen3", "gemma2": "Gemma 2",
    "gemma3": "Gemma 3 (text)", "phi3": "Phi-3", "smollm3": "SmolLM3", "granite": "Granite", "olmo2": "OLMo 2",
    "qwen3_moe": "Qwen3-MoE", "gpt2": "GPT-2",
}  # fmt: skip
# lora_plus is not in it: it follows the adapters, not the model.
TABLE_PARTS = ("rms_norm", "gated_mlp", "qk_rope", "attention", "head", "packing", "lora")


# -- the table of models and parts -----------------------------------------------------------------------------------


def part_states(family: str) -> tuple[dict[str, str], list[str]]:
    """What is on for a tiny model of `family` with a LoRA adapter on the CPU, and why the rest is not."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_models.build(family), peft.LoraConfig(r=2, target_modules="all-linear"))
    report = patch_model(model)
    states, reasons = {}, []
    for name in TABLE_PARTS:
        if name == "packing":  # the trainer packs for a model that passes this check, and refuses others
            leak = verify_isolation(model, torch.device("cpu"))
            states[name], remark = ("on", None) if leak is None else ("off", leak)
        else:
            part = report[name]
            remark = part.reason if part.state == "off" or "left out" in (part.reason or "") else None
            states[name] = "off" if part.state == "off" else "partly" if remark else "on"
        if remark:
            reasons.append(f"`{name}`: {remark}")
    return states, reasons


def models_table() -> str:
    """The table as Markdown: one row a family, one column a part, the reasons in the last column."""
    lines = [
        f"| model | {' | '.join(f'`{name}`' for name in TABLE_PARTS)} | why not |",
        "|---|" + ":-:|" * len(TABLE_PARTS) + "---|",
    ]
    for family in tiny_models.FAMILIES:
        states, reasons = part_states(family)
        lines.append(f"| {FAMILY_LABELS[family]} | {' | '.join(states.values())} | {'; '.join(reasons)} |")
    return "".join(f"{line}\n" for line in lines)


def marked(name: str) -> re.Match[str]:
    """The block of README.md between `<!-- name:start -->` and `<!-- name:end -->`."""
    found = re.search(rf"<!-- {name}:start -->\n(.*?)<!-- {name}:end -->", README.read_text("utf-8"), re.DOTALL)
    assert found is not None, f"README.md has no block {name}"
    return found


def test_models_table() -> None:
    assert marked("models").group(1) == models_table(), "python tests/unit/test_readme.py --write"


def test_results_have_their_files() -> None:
    rows = table_rows((ROOT / "docs" / "all-results.md").read_text("utf-8"))
    assert len(rows) > 20
    for row in rows:
        names = re.findall(r"`([^`]+)`", row[-1])
        assert names, row[0]
        for name in names:
            assert list((ROOT / "docs" / "results").glob(name)), name


# -- configuration ---------------------------------------------------------------------------------------------------


def table_rows(block: str) -> list[list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines() if line[:1] == "|"]
    return rows[2:]


def test_configuration_table() -> None:
    """Names, order, defaults and allowed values of the table are those of ChronicalsConfig."""
    rows = table_rows(marked("config").group(1))
    documented = [(key.strip("` "), row[1], row[2]) for row in rows for key in row[0].split(",")]
    fields = dataclasses.fields(ChronicalsConfig)
    assert [key for key, _, _ in documented] == [field.name for field in fields]
    choices = dict.fromkeys(PARTS, PART_STATES) | {"attention_backend": ATTENTION_BACKENDS}
    choices |= {"health": HEALTH, "padding_free": PART_STATES}
    choices |= dict.fromkeys(("strict", "recompute_mlp", "balance_ranks"), (False, True))
    for (key, default, allowed), field in zip(documented, fields, strict=True):
        assert ast.literal_eval(default.strip("`")) == field.default, key
        if key in choices:
            assert tuple(map(ast.literal_eval, re.findall(r"`([^`]+)`", allowed))) == choices[key], key
        else:
            with pytest.raises((TypeError, ValueError)):
                ChronicalsConfig.resolve({key: 0}, {})
            assert "above 0" in allowed or "at least 1" in allowed, key


def test_every_part_and_log_key_is_explained() -> None:
    parts, logs = ((ROOT / "docs" / name).read_text("utf-8") for name in ("parts.md", "report-and-logs.md"))
    assert re.findall(r"^## `(\w+)`", parts, re.MULTILINE) == list(PARTS)
    meter = ThroughputMeter("cpu", flops=TrainingFlops(1.0, 0.0), flop_rate=1.0)
    meter.update(3, 4)
    explained = re.findall(r"^\| `(\w+)` \|", logs, re.MULTILINE)
    others = {"learning_rate_lora_b", "learning_rate_lora_embedding", "num_tokens", "host_bound"}
    assert set(meter.read()) | others == set(explained)


# -- examples and commands -------------------------------------------------------------------------------------------


def code_blocks(language: str) -> list[Any]:
    blocks = []
    for page in PAGES:
        found = re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
        blocks += [pytest.param(block, id=f"{page.name}-{number}") for number, block in enumerate(found)]
    return blocks


@pytest.mark.parametrize("block", code_blocks("python"))
def test_python_blocks(block: str) -> None:
    """They parse, and each name and setting of ours in them exists."""
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("chronicals_trl"):
            module = importlib.import_module(str(node.module))
            assert all(hasattr(module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", None) == "SFTConfig":
            fields = {field.name for field in dataclasses.fields(SFTConfig)}
            assert {keyword.arg for keyword in node.keywords if keyword.arg} <= fields
        if isinstance(node, ast.keyword) and node.arg == "chronicals_config":
            ChronicalsConfig.resolve(ast.literal_eval(node.value), {})
        if isinstance(node, ast.keyword) and node.arg == "chronicals_plugin":
            ChronicalsConfig.resolve(ast.literal_eval(node.value), {})


@pytest.mark.parametrize("block", code_blocks("bash"))
def test_shell_blocks(block: str) -> None:
    """Arguments, environment variables, make targets, scripts and extras that the commands name exist."""
    words = shlex.split(block.replace("\\\n", " "), comments=True)
    fields = {field.name for field in dataclasses.fields(ChronicalsConfig)}
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == "--chronicals_config":
            ChronicalsConfig.resolve(json.loads(following), {})
        elif word.startswith("CHRONICALS_"):
            name, _, value = word.removeprefix("CHRONICALS_").partition("=")
            assert name == "USE_CHRONICALS" or name.lower() in fields
            if name != "USE_CHRONICALS":
                ChronicalsConfig.resolve(None, {word.partition("=")[0]: value})
        elif word == "make":
            assert re.search(rf"^{following}:", (ROOT / "Makefile").read_text(), re.MULTILINE), following
        elif word.startswith(("examples/", "integrations/", "tests/")):
            assert (ROOT / word).is_file(), word
        elif word.startswith(".["):
            for extra in word[2:-1].split(","):
                assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE), extra


def test_public_names_are_in_the_api_page() -> None:
    page = (ROOT / "docs" / "api.md").read_text("utf-8")
    documented = re.findall(r"^::: (chronicals_trl\.[\w.]+)$", page, re.MULTILINE)
    for path in documented:
        module, _, name = path.rpartition(".")
        assert hasattr(importlib.import_module(module), name), path
    public = {f"chronicals_trl.{chronicals_trl._HOME[name]}.{name}" for name in chronicals_trl._HOME}
    assert public <= set(documented)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text("utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_links_of_the_readme_lead_to_headings() -> None:
    """Those of the manual's pages are mkdocs's to check."""
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", README.read_text("utf-8")):
        headings = re.findall(r"^#+ (.+)$", (ROOT / (target or README.name)).read_text("utf-8"), re.MULTILINE)
        slugs = {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}
        assert anchor in slugs, f"{target}#{anchor}"


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        raise SystemExit("usage: python tests/unit/test_readme.py --write")
    block = marked("models")
    text = README.read_text("utf-8")
    README.write_text(text[: block.start(1)] + models_table() + text[block.end(1) :], "utf-8")
