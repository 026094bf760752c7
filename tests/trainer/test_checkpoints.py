"""Checkpoints that are not whole: seen as such whatever file is cut off, passed over, and refused by name."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import tiny_data
import tiny_models
import torch
from training_runs import SETTINGS

from chronicals_trl import SFTConfig, SFTTrainer, checkpoints
from chronicals_trl.checkpoints import last_complete, what_is_missing


def make(folder: Path, **options) -> SFTTrainer:
    settings = {**SETTINGS, "use_chronicals": True, "packing": True, "save_strategy": "steps", "save_steps": 2}
    return SFTTrainer(
        model=tiny_models.build("llama"),
        args=SFTConfig(**{**settings, "output_dir": str(folder), **options}),
        train_dataset=tiny_data.text(),
        processing_class=tiny_data.tokenizer(),
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    make(folder).train()
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """checkpoint-2 and checkpoint-4, whole."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    "name",
    ["trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"],
)
@pytest.mark.parametrize("left", ["half", "nothing", "20 bytes", "all but one byte"])
def test_a_file_that_is_cut_off_is_named(folder: Path, name: str, left: str) -> None:
    file = folder / "checkpoint-4" / name
    assert what_is_missing(folder / "checkpoint-4") is None
    size = file.stat().st_size
    os.truncate(file, {"half": size // 2, "nothing": 0, "20 bytes": 20, "all but one byte": size - 1}[left])
    if name == "trainer_state.json" and left == "all but one byte":  # which is a newline
        assert what_is_missing(folder / "checkpoint-4") is None
        return
    assert what_is_missing(folder / "checkpoint-4") == f"{name} is cut off"
    assert last_complete(folder) == (folder / "checkpoint-2", {folder / "checkpoint-4": f"{name} is cut off"})


def test_parts_of_sharded_and_distributed_checkpoints(folder: Path) -> None:
    checkpoint = folder / "checkpoint-4"
    (checkpoint / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}})
    )
    assert what_is_missing(checkpoint) == "model-2.safetensors is missing"
    (checkpoint / "model.safetensors.index.json").unlink()

    (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")  # several ranks, one of which was killed
    assert what_is_missing(checkpoint) == "rng_state_1.pth is missing"
    for rank in (1, 3):
        shutil.copy(checkpoint / "rng_state_0.pth", checkpoint / f"rng_state_{rank}.pth")
    assert what_is_missing(checkpoint) == "rng_state_2.pth is missing"
    shutil.copy(checkpoint / "rng_state_0.pth", checkpoint / "rng_state_2.pth")
    assert what_is_missing(checkpoint) is None

    shards = checkpoint / "pytorch_model_fsdp_0"
    shards.mkdir()
    (shards / "__0_0.distcp").write_bytes(b"shard")
    assert what_is_missing(checkpoint) == "pytorch_model_fsdp_0/.metadata, which is written last, is missing"
    (shards / ".metadata").write_bytes(b"all of them")

    (checkpoint / "global_step4").mkdir()
    assert what_is_missing(checkpoint) == "latest, which DeepSpeed writes last, is missing"
    (checkpoint / "latest").write_text("global_step4")
    assert what_is_missing(checkpoint) is None
    torch.save({}, checkpoint / "old.bin", _use_new_zipfile_serialization=False)
    assert what_is_missing(checkpoint) is None


def test_the_last_one_is_by_step_and_other_folders_do_not_count(folder: Path) -> None:
    shutil.copytree(folder / "checkpoint-4", folder / "checkpoint-10")
    (folder / "checkpoint-last").mkdir()
    (folder / "checkpoint-11").write_text("a file")
    assert last_complete(folder) == (folder / "checkpoint-10", {})
    assert last_complete(folder / "nowhere") == (None, {})


def test_resume_passes_over_a_half_written_one_and_says_so(folder: Path) -> None:
    (folder / "checkpoint-4" / "trainer_state.json").unlink()
    trainer = make(folder)
    seen = []
    training_step = trainer.training_step
    trainer.training_step = lambda *args: (seen.append(trainer.state.global_step), training_step(*args))[1]
    trainer.train(resume_from_checkpoint=True)
    assert seen == [2, 3]
    report = json.loads((folder / "chronicals_report.json").read_text())
    assert any("checkpoint-4 is only half written" in note and "checkpoint-2" in note for note in report["notes"])
    assert what_is_missing(folder / "checkpoint-4") is None  # written anew


def test_no_whole_one_and_a_half_written_one_by_name_are_errors(folder: Path) -> None:
    halve(folder / "checkpoint-4" / "optimizer.pt")
    with pytest.raises(ValueError, match=r"optimizer.pt is cut off\); the last whole one here is .*checkpoint-2"):
        make(folder).train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    halve(folder / "checkpoint-2" / "model.safetensors")
    with pytest.raises(ValueError, match=r"there is no whole checkpoint in .* to go on from"):
        make(folder).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="No valid checkpoint found"):  # transformers' own words
        make(folder / "empty").train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("of_another", "words"),
    [
        (("checkpoint-4", None), None),
        (("checkpoint-2", None), "is checkpoint-4 on rank 0 and checkpoint-2 on rank 1"),
        (("checkpoint-4", "checkpoint-4 is only half written"), "Cannot resume: checkpoint-4 is only half written"),
    ],
)
def test_ranks_go_on_from_one_checkpoint(
    folder: Path, monkeypatch: pytest.MonkeyPatch, of_another: tuple[str, str | None], words: str | None
) -> None:
    """On nodes with file systems of their own they would not."""
    trainer = make(folder)
    monkeypatch.setattr(SFTConfig, "world_size", property(lambda self: 2))

    def gather(seen: list[tuple[str, str | None]]) -> list[tuple[str, str | None]]:
        [(chosen, failure)] = seen
        return [(Path(chosen).name, failure), of_another]

    monkeypatch.setattr(checkpoints, "gather_object", gather)
    if words is None:
        assert trainer._whole_checkpoint(True) == str(folder / "checkpoint-4")
        return
    with pytest.raises(ValueError, match=words):
        trainer._whole_checkpoint(True)


def test_a_checkpoint_that_is_written_again_is_not_whole_meanwhile(folder: Path) -> None:
    """Its trainer_state.json of before would make a mixture look whole."""
    seen = []

    class Watched(SFTTrainer):
        def save_model(self, output_dir=None, *args, **kwargs):
            seen.append((Path(output_dir) / "trainer_state.json").exists())
            super().save_model(output_dir, *args, **kwargs)

    trainer = make(folder)
    trainer.__class__ = Watched
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert seen == [False] and what_is_missing(folder / "checkpoint-4") is None


def test_with_the_flag_off_the_parent_decides(folder: Path) -> None:
    (folder / "checkpoint-4" / "trainer_state.json").unlink()
    with pytest.raises(FileNotFoundError):
        make(folder, use_chronicals=False, packing=False).train(resume_from_checkpoint=True)
