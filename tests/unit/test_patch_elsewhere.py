"""Models whose weights are on the CPU, or on meta, until FSDP or DeepSpeed moves them to where training will run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fake_flash_attention as fake
import pytest
import tiny_data
import tiny_models
import torch
from training_runs import SETTINGS

from chronicals_trl import SFTConfig, SFTTrainer, patch_model, trainer
from chronicals_trl.model import attention_backends, attention_choice
from chronicals_trl.model.patch import placement

GPU = torch.device("cuda", 0)


def test_where_probes_run() -> None:
    """Where the model will be; a model that is on a GPU stays there."""
    model = tiny_models.build("llama")
    assert placement(model) == (torch.device("cpu"), torch.float32)
    assert placement(model, GPU)[0] == placement(model.to("meta"), GPU)[0] == GPU
    assert placement(model)[0] == torch.device("cpu")

    class There(torch.nn.Module):
        def parameters(self, recurse: bool = True) -> Any:
            yield torch.empty(2, 2, dtype=torch.bfloat16, device=torch.device("meta")).as_subclass(OnGpu)

    class OnGpu(torch.Tensor):
        device = torch.device("cuda", 1)

    assert placement(There(), GPU) == (torch.device("cuda", 1), torch.bfloat16)


def test_kernels_are_chosen_for_that_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(
        "chronicals_trl.model.patch.attention_choice.choose_backend",
        lambda model, requested, device: asked.append(device) or (None, "asked"),
    )
    patch_model(tiny_models.build("llama"), device=GPU)
    assert asked == [GPU]


@pytest.mark.parametrize("engine", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_the_trainer_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    made = SFTTrainer(
        model=tiny_models.build("llama"),
        args=SFTConfig(**{**SETTINGS, "output_dir": str(tmp_path), "use_chronicals": True}),
        train_dataset=tiny_data.text(),
        processing_class=tiny_data.tokenizer(),
    )
    asked: list[Any] = []
    monkeypatch.setattr(
        trainer, "patch_model", lambda *args, device, **kwargs: asked.append(device) or made.chronicals_report
    )
    for placed_later in (False, True):
        monkeypatch.setattr(made, engine, placed_later)
        made._patch(made._chronicals, {})
    made.model.hf_device_map = {"model": 0, "lm_head": 1}
    made._patch(made._chronicals, {})
    assert asked == [None, made.args.device, None]


def test_documents_are_checked_where_the_weights_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16, which the kernel takes: on CPU tensors torch's attention stands in for it, document by document."""
    fake.install(monkeypatch)
    model = tiny_models.build("llama").to(torch.bfloat16)
    report = patch_model(model)
    assert report["attention"].backend == "flash_attn_4"
    kernel = attention_backends.BACKENDS["fa4"]
    for name, value in (("device_type", "cuda"), ("dtypes", attention_backends.HALF)):
        object.__setattr__(kernel, name, value)
    fake.CALLS.clear()
    assert attention_choice.verify_isolation(model, GPU) is None
    assert attention_choice.verify_padding(model, GPU) is None
    assert not fake.CALLS
    leaky = tiny_models.build("llama", attn_implementation="eager")
    leaky.model.register_forward_pre_hook(forget_documents, with_kwargs=True)
    assert "logits change" in (attention_choice.verify_isolation(leaky, GPU) or "")


def forget_documents(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """As PEFT's prompt tuning does."""
    kept = {key: value for key, value in kwargs.items() if not key.startswith("cu_") and key != "position_ids"}
    return args, kept
