"""Families of which a part or another is off: the flag on, off, and stock TRL learn the same from the same batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import trl
from training_runs import logged, run

from chronicals_trl import SFTConfig, SFTTrainer


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v32", "gemma4"])
def test_the_flag_changes_nothing(tmp_path: Path, family: str, packing: bool) -> None:
    """Packed by TRL in each, so that the batches are the same."""
    options = {"packing": packing, "max_steps": 2}
    on = {"use_chronicals": True, "chronicals_config": {"packing": "off"}}
    runs = [
        run(trainer, config, tmp_path / str(index), model=tiny_models.build(family), options={**options, **flags})
        for index, (trainer, config, flags) in enumerate(
            [(SFTTrainer, SFTConfig, on), (SFTTrainer, SFTConfig, {}), (trl.SFTTrainer, trl.SFTConfig, {})]
        )
    ]
    (mine, gradients), *others = runs
    assert mine.chronicals_report["rms_norm"].state == "on"
    for other, reference in others:
        assert logged(mine, "loss") == pytest.approx(logged(other, "loss"), rel=1e-5)
        assert gradients.keys() == reference.keys()
        for name, gradient in reference.items():
            # Experts that few tokens go to have gradients that are small beside their own rounding.
            assert (gradients[name] - gradient).norm() <= 2e-5 * gradient.norm() + 1e-9, name


@pytest.mark.parametrize("family", ["deepseek_v3", "gemma4"])
def test_packed_rows_train(tmp_path: Path, family: str) -> None:
    options = {"packing": True, "max_steps": 1, "use_chronicals": True}
    trainer, _ = run(SFTTrainer, SFTConfig, tmp_path, model=tiny_models.build(family), options=options)
    assert trainer.chronicals_report["packing"].state == "on" and logged(trainer, "loss")[0] > 0


def test_positions_that_are_not_counted_from_0_keep_their_padding(tmp_path: Path) -> None:
    options = {"per_device_train_batch_size": 4, "max_steps": 2}
    mine, gradients = run(
        SFTTrainer, SFTConfig, tmp_path / "ours", model=tiny_models.build("roberta"),
        options={**options, "use_chronicals": True},
    )  # fmt: skip
    theirs, reference = run(
        trl.SFTTrainer, trl.SFTConfig, tmp_path / "theirs", model=tiny_models.build("roberta"), options=options
    )
    (note,) = (note for note in mine.chronicals_report.notes if note.startswith("padding-free"))
    assert "numbers the tokens of a padded row otherwise" in note
    assert logged(mine, "loss") == pytest.approx(logged(theirs, "loss"), rel=1e-5)
    for name, gradient in reference.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name
