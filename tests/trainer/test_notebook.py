"""examples/notebook.ipynb: valid, without outputs, and its code runs, at a tiny size and without jupyter."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_data
from safetensors.torch import load_file
from training_runs import saved_model

NOTEBOOK = Path(__file__).parents[2] / "examples" / "notebook.ipynb"
CELLS: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]


def test_it_is_a_notebook_with_nothing_of_a_run_in_it() -> None:
    """The schema of nbformat 4.5, as far as this notebook uses it."""
    notebook = json.loads(NOTEBOOK.read_text("utf-8"))
    assert set(notebook) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"] == {
        "display_name": "Python 3", "language": "python", "name": "python3"
    }  # fmt: skip
    ids = [cell["id"] for cell in CELLS]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name) for name in ids)
    for cell in CELLS:
        code = cell["cell_type"] == "code"
        expected = {"cell_type", "id", "metadata", "source"} | ({"execution_count", "outputs"} if code else set())
        assert set(cell) == expected and cell["metadata"] == {} and cell["cell_type"] in ("code", "markdown")
        assert all(line.endswith("\n") for line in cell["source"][:-1]) and not cell["source"][-1].endswith("\n")
        if code:
            assert cell["outputs"] == [] and cell["execution_count"] is None


def test_its_cells_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    data.mkdir()
    tiny_data.text(60).to_json(data / "train.jsonl")
    settings = {"NOTEBOOK_MODEL": saved_model(tmp_path / "model"), "NOTEBOOK_DATA": data, "NOTEBOOK_STEPS": 2}
    for name, value in settings.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.chdir(tmp_path)
    module = type(sys)("__main__")
    monkeypatch.setitem(sys.modules, "__main__", module)  # where a kernel's code lives
    for cell in CELLS:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), module.__dict__)
    adapter = load_file(tmp_path / "outputs" / "notebook" / "adapter_model.safetensors")
    assert all(value.abs().max() > 0 for name, value in adapter.items() if "lora_B" in name)
    printed = capsys.readouterr().out
    assert "It can run here." in printed and "tokens a second: " in printed
    assert re.search(r"^rms_norm +on ", printed, re.MULTILINE) and re.search(r"^lora_plus +on ", printed, re.MULTILINE)
    # The second run is stock TRL's.
    assert module.__dict__["stock"].chronicals_report["rms_norm"].state == "off"
