"""What a layout saves with the flag on is, file by file, the unpatched model's, and stock libraries read it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from start_ranks import start_ranks

TESTS = Path(__file__).parents[1]

pytestmark = pytest.mark.slow

CELLS = ["ddp+full+tied", "ddp+lora+untied", "fsdp2+full+tied", "fsdp2+lora+untied", "fsdp2 own unit+lora+untied"]
SHARDED = "fsdp2+full+untied+sharded"
ZERO = ["zero 1+full+tied", "zero 2+lora+untied", "zero 3+full+untied", "zero 3+lora+untied"]

# In a process that cannot import this package, as on another machine.
STOCK = """
import importlib.abc, json, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *args):
        if name.split(".")[0] == "chronicals_trl":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
import torch, transformers, peft
found = {}
for folder in sys.argv[1:]:
    base = transformers.AutoModelForCausalLM
    if "lora" in folder:
        model = peft.PeftModel.from_pretrained(base.from_pretrained(folder + "/../base"), folder)
    else:
        model = base.from_pretrained(folder)
    logits = model.eval()(input_ids=torch.arange(3, 40)[None]).logits
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    found[folder] = {"logits": logits.double().sum().item(), "class": type(model).__name__, "tied": tied}
assert not any(name.startswith("chronicals") for name in sys.modules)
print(json.dumps(found))
"""


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


def save(folder: Path, cells: list[str]) -> None:
    start_ranks("save_script.py", 2, folder, *cells)


def tensors(file: Path) -> tuple[dict[str, torch.Tensor], Any]:
    with safe_open(file, "pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()


def require_same_files(on: Path, off: Path) -> None:
    """Every file of the one is in the other; bit for bit, the pickled arguments apart."""
    names = sorted(path.name for path in on.iterdir())
    assert names == sorted(path.name for path in off.iterdir())
    assert any(name.endswith(".safetensors") for name in names)
    for name in names:
        if name.endswith(".safetensors"):
            ours, ours_told = tensors(on / name)
            theirs, theirs_told = tensors(off / name)
            assert list(ours) == list(theirs) and ours_told == theirs_told
            assert all(
                torch.equal(ours[key], value) and ours[key].dtype == value.dtype for key, value in theirs.items()
            )
        elif name != "training_args.bin":
            assert (on / name).read_bytes() == (off / name).read_bytes(), name
        if name.endswith(".json"):
            assert "chronicals" not in (on / name).read_text(), name


def require_readable(folder: Path, cells: list[str]) -> None:
    import tiny_models

    for cell in cells:
        if "lora" in cell:
            tiny_models.build("llama").save_pretrained(folder / cell / "base")
    folders = [str(folder / cell / state) for cell in cells for state in ("on", "off")]
    done = subprocess.run(
        [sys.executable, "-c", STOCK, *folders], capture_output=True, text=True, timeout=200, env=environment()
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for cell in cells:
        on, off = (found[str(folder / cell / state)] for state in ("on", "off"))
        assert on == off
        assert on["tied"] is cell.endswith("+tied")
    untrained = tiny_models.build("llama").eval()(input_ids=torch.arange(3, 40)[None]).logits.double().sum().item()
    assert all(abs(each["logits"] - untrained) > 1e-3 for each in found.values())


@pytest.mark.timeout(500)  # the starts of processes, on a busy machine
def test_ddp_and_fsdp2(tmp_path: Path) -> None:
    save(tmp_path, [*CELLS, SHARDED])
    for cell in CELLS:
        require_same_files(tmp_path / cell / "on", tmp_path / cell / "off")
    # accelerate's own way from shards to a file
    shards, merged = (
        [str(tmp_path / SHARDED / f"{kind}{state}") for state in ("on", "off")] for kind in ("", "merged ")
    )
    code = "import sys; from accelerate.utils import merge_fsdp_weights as m; [m(*sys.argv[i:i+2]) for i in (1, 3)]"
    pairs = [shards[0] + "/pytorch_model_fsdp_0", merged[0], shards[1] + "/pytorch_model_fsdp_0", merged[1]]
    subprocess.run([sys.executable, "-c", code, *pairs], check=True, env=environment())
    require_same_files(tmp_path / SHARDED / "merged on", tmp_path / SHARDED / "merged off")
    names = tensors(tmp_path / SHARDED / "merged on" / "model.safetensors")[0].keys()
    import tiny_models

    assert names == tiny_models.build("llama").state_dict().keys()
    require_readable(tmp_path, CELLS)


@pytest.mark.timeout(500)
def test_zero(tmp_path: Path) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    save(tmp_path, ZERO)
    for cell in ZERO:
        require_same_files(tmp_path / cell / "on", tmp_path / cell / "off")
    require_readable(tmp_path, ZERO)
