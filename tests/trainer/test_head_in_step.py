"""What the trainer adds around the head: rows without a label left out, a NaN filtered without reading the loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_data
import tiny_models
import torch
import transformers
import trl
from training_runs import logged, run

from chronicals_trl import SFTConfig, SFTTrainer
from chronicals_trl.kernels import _linear_cross_entropy as op
from chronicals_trl.packing.label_rows import label_rows


@pytest.fixture
def scored(monkeypatch) -> list[tuple[int, int]]:
    """(rows that the head computed, labels among them) of each call."""
    calls: list[tuple[int, int]] = []
    score = op.score

    def spy(hidden, weight, bias, labels, *rest):
        calls.append((len(hidden), int((labels >= 0).sum())))
        return score(hidden, weight, bias, labels, *rest)

    monkeypatch.setattr(op, "score", spy)
    return calls


@pytest.mark.parametrize("packing", [False, True])
def test_prompts_and_padding_are_left_out_of_the_head(tmp_path: Path, scored, packing: bool) -> None:
    options = {"use_chronicals": True, "packing": packing, "completion_only_loss": True}
    data = tiny_data.prompt_completion()
    ours, ours_first = run(SFTTrainer, SFTConfig, tmp_path, data=data, options=options)
    called = scored[-4:]
    everything = {**options, "chronicals_config": {}}
    scored.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("chronicals_trl.packing.label_rows.label_rows", lambda labels: None)
        full, full_first = run(SFTTrainer, SFTConfig, tmp_path, data=data, options=everything)
    # The same labels from fewer rows, the same losses and gradients.
    assert [labels for _, labels in called] == [labels for _, labels in scored[-4:]]
    assert all(few < all_rows for (few, _), (all_rows, _) in zip(called, scored[-4:], strict=True))
    for key in ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens"):
        assert logged(ours, key) == pytest.approx(logged(full, key), rel=1e-5)
    for name, gradient in full_first.items():
        torch.testing.assert_close(ours_first[name], gradient, rtol=1e-4, atol=1e-6)


def test_rows_agree_with_trl_where_nothing_is_packed(tmp_path: Path) -> None:
    data = tiny_data.prompt_completion()
    ours, _ = run(SFTTrainer, SFTConfig, tmp_path, data=data, options={"use_chronicals": True})
    theirs, _ = run(trl.SFTTrainer, trl.SFTConfig, tmp_path, data=data)
    for key in ("loss", "entropy", "mean_token_accuracy"):
        assert logged(ours, key) == pytest.approx(logged(theirs, key), rel=1e-4)


def test_rows_stay_out_of_batches_that_accelerate_cuts(tmp_path: Path) -> None:
    """Its dispatcher, the default for streams, takes the first rows of every tensor of a batch, on one rank too."""
    losses = []
    for trainer_class, config_class, flag in ((SFTTrainer, SFTConfig, True), (trl.SFTTrainer, trl.SFTConfig, None)):
        options = {
            "accelerator_config": {"dispatch_batches": True}, "completion_only_loss": True,
            **({"use_chronicals": flag} if flag else {}),
        }  # fmt: skip
        dispatched, _ = run(trainer_class, config_class, tmp_path, data=tiny_data.prompt_completion(), options=options)
        del options["accelerator_config"]
        stream = tiny_data.prompt_completion().to_iterable_dataset()
        evaluated, _ = run(
            trainer_class, config_class, tmp_path, data=tiny_data.prompt_completion(), options=options,
            eval_dataset=stream,
        )  # fmt: skip
        losses.append([*logged(dispatched, "loss"), evaluated.evaluate()["eval_loss"]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_virtual_tokens_move_no_rows(tmp_path: Path, kind: str) -> None:
    peft = pytest.importorskip("peft")
    losses = []
    for trainer_class, config_class, options in (
        (SFTTrainer, SFTConfig, {"use_chronicals": True}),
        (trl.SFTTrainer, trl.SFTConfig, {}),
    ):
        torch.manual_seed(0)
        trainer, _ = run(
            trainer_class, config_class, tmp_path, data=tiny_data.prompt_completion(),
            options={**options, "completion_only_loss": True, "learning_rate": 0.0},
            peft_config=getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4),
        )  # fmt: skip
        # Where the virtual tokens are drawn is not the same in both: the model they are drawn for has been probed.
        torch.manual_seed(0)
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                if "prompt" in name:
                    parameter.copy_(torch.randn(parameter.shape))
        losses.append(trainer.evaluate(trainer.train_dataset)["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_rows_of_another_batch_are_not_used(tmp_path: Path, scored) -> None:
    options = {"use_chronicals": True, "completion_only_loss": True}
    trainer, _ = run(SFTTrainer, SFTConfig, tmp_path, data=tiny_data.prompt_completion(), options=options)
    batch = next(iter(trainer.get_eval_dataloader(trainer.train_dataset.select(range(20, 22)))))
    del batch["label_rows"]
    scored.clear()
    with torch.no_grad():
        trainer.compute_loss(trainer.model, batch)
    assert scored == [(batch["labels"].numel(), int((batch["labels"][:, 1:] >= 0).sum()))]


def test_rows_of_a_batch_that_is_no_dict(tmp_path: Path, scored) -> None:
    """The collators of transformers return a BatchEncoding."""
    trainer, _ = run(
        SFTTrainer, SFTConfig, tmp_path, data=tiny_data.prompt_completion(),
        options={"use_chronicals": True, "completion_only_loss": True},
        data_collator=transformers.DataCollatorForSeq2Seq(tiny_data.tokenizer()),
    )  # fmt: skip
    batch = next(iter(trainer.get_train_dataloader()))
    assert not isinstance(batch, dict)
    assert "label_rows" in batch
    assert "label_rows" not in trainer._prepare_inputs(batch)
    assert all(rows < 1.2 * labels + 8 for rows, labels in scored)


def test_label_rows() -> None:
    labels = torch.full((2, 32), -100)
    assert label_rows(labels).tolist() == [-1] * 4  # nothing to score: one step of ignored rows
    labels[0, 5], labels[1, 0], labels[1, 31] = 7, 8, 9  # a first token is nobody's next
    assert label_rows(labels).tolist() == [4, 62, -1, -1]
    labels[:, 1:30] = 1
    assert len(label_rows(labels)) == 60  # 29 + 29 + 1, rounded up to sixteenths
    labels[:] = 1
    assert label_rows(labels) is None  # 62 of 64: not worth it
    assert label_rows(torch.full((1, 1), 3)) is None


class WithNan:
    """The loss of the third micro-batch is NaN, its gradient is not."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.calls = getattr(self, "calls", 0) + 1
        return loss + (float("nan") if self.calls == 3 else 0.0) * 1


@pytest.mark.planted_fault
@pytest.mark.parametrize("filtered", [True, False])
def test_a_nan_is_logged_as_trainer_logs_it(tmp_path: Path, monkeypatch, filtered: bool) -> None:
    tested = []
    isnan = torch.isnan
    monkeypatch.setattr(torch, "isnan", lambda x: tested.append(x.dim()) or isnan(x))
    options = {
        "max_steps": 3, "gradient_accumulation_steps": 2, "logging_steps": 3, "max_grad_norm": 0.0,
        "learning_rate": 0.0, "logging_nan_inf_filter": filtered,
    }  # fmt: skip
    ours, _ = run(
        type("Ours", (WithNan, SFTTrainer), {}), SFTConfig, tmp_path,
        options={**options, "use_chronicals": True, "chronicals_config": {"head": "off"}},
    )  # fmt: skip
    assert ours.args.logging_nan_inf_filter is filtered
    assert 0 not in tested  # no loss was tested on the host
    theirs, _ = run(type("Theirs", (WithNan, trl.SFTTrainer), {}), trl.SFTConfig, tmp_path, options=options)
    assert (0 in tested) is filtered
    assert logged(ours, "loss") == pytest.approx(logged(theirs, "loss"), rel=1e-5, nan_ok=True)
    assert (logged(ours, "loss")[0] == logged(ours, "loss")[0]) is filtered


def test_the_filter_is_there_whenever_something_is_written(tmp_path: Path) -> None:
    """Checkpoints keep the arguments: they have the user's."""
    trainer, _ = run(
        SFTTrainer, SFTConfig, tmp_path,
        options={"use_chronicals": True, "save_strategy": "steps", "save_steps": 2, "max_steps": 2},
    )  # fmt: skip
    saved = torch.load(Path(trainer.args.output_dir) / "checkpoint-2" / "training_args.bin", weights_only=False)
    assert saved.logging_nan_inf_filter is True


def test_the_filter_is_there_after_a_run_that_failed(tmp_path: Path) -> None:
    class Failing(SFTTrainer):
        def training_step(self, *args, **kwargs):
            super().training_step(*args, **kwargs)
            assert self.args.logging_nan_inf_filter is False  # the loss is filtered already
            raise KeyError("a step that fails")

    arguments = {
        "output_dir": str(tmp_path),
        "use_chronicals": True,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
    }
    trainer = Failing(
        model=tiny_models.build("llama"), args=SFTConfig(**arguments), train_dataset=tiny_data.text(4),
        processing_class=tiny_data.tokenizer(),
    )  # fmt: skip
    with pytest.raises(KeyError):
        trainer.train()
    assert trainer.args.logging_nan_inf_filter is True
