"""What the trainer adds: packing, the report, throughput, LoRA+, errors, settings side by side."""

from __future__ import annotations

import itertools
import json
import logging
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny_data
import tiny_models
import torch
import transformers
import trl
from datasets import Dataset, IterableDataset
from training_runs import SETTINGS, logged, run
from transformers import TrainingArguments

from chronicals_trl import ChronicalsConfig, SFTConfig, SFTTrainer, _inputs
from chronicals_trl._data_sets import require_labels
from chronicals_trl.model.patch import is_patched


def make(
    tmp_path: Path,
    *,
    data=None,
    config_class: type = SFTConfig,
    trainer_class: type = SFTTrainer,
    family: str = "llama",
    **options,
):
    trainer_options = {key: options.pop(key) for key in list(options) if key in _TRAINER_ARGUMENTS}
    flag = {"use_chronicals": True} if config_class is SFTConfig else {}
    settings = {**SETTINGS, **flag, "output_dir": str(tmp_path / "out"), **options}
    return trainer_class(
        model=trainer_options.pop("model", None) or tiny_models.build(family),
        args=config_class(**settings),
        train_dataset=tiny_data.text() if data is None else data,
        processing_class=tiny_data.tokenizer(),
        **trainer_options,
    )


_TRAINER_ARGUMENTS = {
    "model", "eval_dataset", "peft_config", "compute_loss_func", "formatting_func", "optimizers", "data_collator",
}  # fmt: skip


def documents(rows) -> Counter:
    """The multiset of documents of packed rows."""
    found: Counter = Counter()
    for row in rows:
        start = 0
        for length in row["seq_lengths"]:
            found[tuple(row["input_ids"][start : start + length])] += 1
            start += length
    return found


# -- packing ---------------------------------------------------------------------------------------------------------


def test_every_document_once(tmp_path: Path) -> None:
    trainer = make(tmp_path, packing=True)
    source = Counter(tuple(ids) for ids in tiny_data.tokenized()["input_ids"])
    assert documents(trainer.train_dataset) == source
    assert trainer.chronicals_report["packing"].state == "on"


def test_bfd_split_keeps_every_token(tmp_path: Path) -> None:
    trainer = make(tmp_path, packing=True, packing_strategy="bfd_split", max_length=16)
    packed = Counter(token for row in trainer.train_dataset for token in row["input_ids"])
    assert packed == Counter(token for ids in tiny_data.tokenized()["input_ids"] for token in ids)
    assert all(len(row["input_ids"]) <= 16 for row in trainer.train_dataset)
    assert any("split" in note for note in trainer.chronicals_report.notes)


def test_bfd_truncates_and_counts(tmp_path: Path) -> None:
    trainer = make(tmp_path, packing=True, max_length=16)
    lengths = [len(ids) for ids in tiny_data.tokenized()["input_ids"]]
    lost = sum(max(0, length - 16) for length in lengths)
    count = sum(length > 16 for length in lengths)
    assert documents(trainer.train_dataset) == Counter(tuple(ids[:16]) for ids in tiny_data.tokenized()["input_ids"])
    assert any(f"{count:,} truncated ({lost:,} tokens lost)" in note for note in trainer.chronicals_report.notes)


def test_batches_have_one_shape_and_no_trainer_keys_reach_the_model(tmp_path: Path) -> None:
    trainer = make(tmp_path, packing=True, dataloader_drop_last=True)
    batches = list(trainer.get_train_dataloader())
    assert len(batches) > 3
    assert {batch["input_ids"].shape for batch in batches} == {(1, 2 * 96)}
    assert {batch["cu_seq_lens_q"].shape for batch in batches} == {batches[0]["cu_seq_lens_q"].shape}
    prepared = trainer._prepare_inputs(dict(batches[0]))
    assert set(prepared) == {
        "input_ids", "labels", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
        "seq_idx",
    }  # fmt: skip


@pytest.mark.parametrize(("packing", "eval_packing"), [(True, None), (True, False), (False, True)])
def test_eval_packing(tmp_path: Path, packing: bool, eval_packing: bool | None) -> None:
    """The loss over the evaluation set is that of each document alone, whichever side is packed."""
    data = tiny_data.text(12, seed=9)
    trainer = make(
        tmp_path, packing=packing, eval_packing=eval_packing, eval_dataset=data, per_device_eval_batch_size=64
    )
    alone = make(tmp_path, eval_dataset=data, per_device_eval_batch_size=64)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(alone.evaluate()["eval_loss"], rel=1e-5)
    # Handed over again, packed rows are not packed a second time.
    assert trainer.evaluate(trainer.eval_dataset)["eval_loss"] == pytest.approx(
        alone.evaluate(data)["eval_loss"], rel=1e-5
    )


def test_evaluation_of_longer_documents_than_training_had(tmp_path: Path) -> None:
    short = Dataset.from_dict({"text": [text[:20] for text in tiny_data.sentences(96)]})
    trainer = make(tmp_path, packing=True, data=short, per_device_eval_batch_size=64)
    assert trainer.data_collator.max_segment_length < 96
    data = Dataset.from_dict({"text": [" and ".join(tiny_data.sentences(3, seed=9))] * 2})
    alone = make(tmp_path, per_device_eval_batch_size=64).evaluate(data)
    assert trainer.evaluate(data)["eval_loss"] == pytest.approx(alone["eval_loss"], rel=1e-5)


def test_an_eval_data_set_called_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def bins_per_round(args, *, training):
        asked.append(training)
        return 1

    monkeypatch.setattr(_inputs, "bins_per_round", bins_per_round)
    trainer = make(tmp_path, packing=True, eval_dataset={"train": tiny_data.text(6, seed=9)})
    assert asked == [True, False]
    assert trainer._train_stats.documents == 40
    notes = [note for note in trainer.chronicals_report.notes if note.startswith("packing")]
    assert notes[0].startswith("packing train: 40 documents")
    assert notes[1].startswith("packing eval['train']: 6 documents")


def _trainers_own(trainer: SFTTrainer) -> tuple[int, int]:
    """Steps of an epoch and of the run, as Trainer counts them when it begins."""
    values = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    return values[1], values[-1]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 3},
        {"dataloader_drop_last": True, "num_train_epochs": 2.5},
        {"dataloader_drop_last": True, "gradient_accumulation_steps": 2},
        {"max_steps": 7},
        {"packing_strategy": "bfd_split", "max_length": 48},
        {"accelerator_config": {"split_batches": True}, "train_sampling_strategy": "sequential"},
    ],
)
def test_steps_are_as_trainer_counts_them(tmp_path: Path, options: dict[str, Any]) -> None:
    options = {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 3, **options}
    packed = make(tmp_path, packing=True, **options)
    unpacked = make(tmp_path, **{key: value for key, value in options.items() if key != "packing_strategy"})
    counts = packed._step_counts()
    assert counts is not None and counts.packed != counts.unpacked
    assert (counts.packed, counts.in_run(counts.packed)) == _trainers_own(packed)
    assert (counts.unpacked, counts.in_run(counts.unpacked)) == _trainers_own(unpacked)
    assert packed.chronicals_report.notes.count(counts.describe(1)) == 1
    assert not any(note.startswith(("a step:", "few steps:")) for note in unpacked.chronicals_report.notes)


def test_a_run_that_packing_leaves_few_steps(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What was said of it is in the report, and a warning; once."""
    options = {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 8}
    trainer = make(tmp_path, packing=True, data=tiny_data.text(80), **options)
    rows = len(trainer.train_dataset)
    steps = -(-rows // 8)
    (few,) = (note for note in trainer.chronicals_report.notes if note.startswith("few steps:"))
    assert f"leaves {steps} optimizer step{'s' if steps > 1 else ''} in the whole run, 10 without it" in few
    assert few in (tmp_path / "out" / "chronicals_report.json").read_text("utf-8")
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING and few in record.message]
    assert len(warnings) == 1
    trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps == steps
    caplog.clear()
    enough = make(tmp_path, packing=True, data=tiny_data.text(80), **{**options, "num_train_epochs": 10})
    assert not any(note.startswith("few steps:") for note in enough.chronicals_report.notes)
    assert "few steps" not in caplog.text


class _OwnLoader(SFTTrainer):
    def get_train_dataloader(self):
        return super().get_train_dataloader()


class _OwnSampler(SFTTrainer):
    def _get_train_sampler(self, train_dataset=None):
        return super()._get_train_sampler(train_dataset)


def test_steps_that_are_not_known_beforehand(tmp_path: Path) -> None:
    """Of a stream, of rows that came packed, of an evaluation set alone, and of what a subclass loads."""
    tokens = tiny_data.tokenized().map(lambda row: {"labels": row["input_ids"]})
    made = [
        make(tmp_path, packing=True, data=tiny_data.text().to_iterable_dataset()),
        make(tmp_path, packing=True, data=trl.pack_dataset(tokens, 96, "bfd")),
        make(tmp_path, eval_packing=True, eval_dataset=tiny_data.text(6, seed=9)),
        *(make(tmp_path, packing=True, trainer_class=own) for own in (_OwnLoader, _OwnSampler)),
        make(tmp_path, packing=True, train_sampling_strategy="batch_rebalance"),
    ]
    for trainer in made:
        assert not any(note.startswith(("a step:", "few steps:")) for note in trainer.chronicals_report.notes)


def test_a_users_column_called_seq_lengths(tmp_path: Path) -> None:
    source = Counter(tuple(ids) for ids in tiny_data.tokenized()["input_ids"])
    texts = tiny_data.text().map(lambda row: {"seq_lengths": [len(row["text"])]})
    assert documents(make(tmp_path, packing=True, data=texts).train_dataset) == source
    tokens = tiny_data.tokenized().map(lambda row: {"seq_lengths": len(row["input_ids"])})
    assert documents(make(tmp_path, packing=True, data=tokens).train_dataset) == source
    tokens = tiny_data.tokenized().map(lambda row: {"seq_lengths": [1, 1]})
    with pytest.raises(ValueError, match=r"train data set has a column 'seq_lengths'.*row 0 it adds up to 2"):
        make(tmp_path, packing=True, data=tokens)


@pytest.mark.parametrize("streams", [False, True])
def test_rows_that_trl_packed(tmp_path: Path, streams: bool) -> None:
    tokens = tiny_data.tokenized().map(lambda row: {"labels": row["input_ids"]})
    rows = trl.pack_dataset(tokens, 96, "bfd")
    assert len(rows) > 8
    data = rows.to_iterable_dataset() if streams else rows
    ours = make(tmp_path, packing=True, data=data)
    ours.train()
    # Stock TRL trains on packed rows as they are where its preparation is skipped.
    theirs = make(tmp_path, packing=True, data=data, use_chronicals=False,
                  dataset_kwargs={"skip_prepare_dataset": True})  # fmt: skip
    theirs.train()
    assert logged(ours, "loss") == pytest.approx(logged(theirs, "loss"), rel=1e-5)
    assert any("came packed" in note for note in ours.chronicals_report.notes)
    assert documents(make(tmp_path, packing=True, data=rows.select([3, 5])).train_dataset) == documents(
        rows.select([3, 5])
    )
    with pytest.raises(ValueError, match=r"rows of up to \d+ tokens, but max_length=64. Set max_length=\d+"):
        make(tmp_path, packing=True, data=data, max_length=64)


def test_truncation_is_counted_without_packing(tmp_path: Path) -> None:
    trainer = make(tmp_path, max_length=16, shuffle_dataset=True)
    reference = make(tmp_path, max_length=16, shuffle_dataset=True, use_chronicals=False)
    assert trainer.train_dataset["input_ids"] == reference.train_dataset["input_ids"]
    lengths = [len(ids) for ids in tiny_data.tokenized()["input_ids"]]
    count, lost = sum(n > 16 for n in lengths), sum(max(0, n - 16) for n in lengths)
    expected = f"train: {count} of 40 documents truncated to max_length=16 ({lost} tokens lost)"
    assert expected in trainer.chronicals_report.notes
    assert not any("truncated" in note for note in make(tmp_path, max_length=96).chronicals_report.notes)


def test_streaming_is_packed_in_windows_and_says_so(tmp_path: Path) -> None:
    stream = tiny_data.text().to_iterable_dataset()
    trainer = make(tmp_path, data=stream, packing=True, chronicals_config={"packing_window": 20})
    assert isinstance(trainer.train_dataset, IterableDataset)
    assert any("windows of 20 documents" in note for note in trainer.chronicals_report.notes)
    assert documents(trainer.train_dataset) == Counter(tuple(ids) for ids in tiny_data.tokenized()["input_ids"])
    trainer.train()
    assert len(logged(trainer, "loss")) == SETTINGS["max_steps"]


def test_a_step_without_a_label_is_a_finite_zero(tmp_path: Path) -> None:
    """Every label of a step ignored: loss 0 and gradients 0, not 0/0; the weights stay as they are."""
    ids = tiny_data.tokenized(8)["input_ids"]
    # A document's first label is ignored, but it keeps the document from being dropped as one without labels.
    labels = [ids[0], *([row[0], *[-100] * (len(row) - 1)] for row in ids[1:])]
    data = Dataset.from_dict({"input_ids": ids, "labels": labels})
    trainer = make(tmp_path, data=data, packing=True, max_steps=1)
    trainer.train_dataset = trainer.train_dataset.filter(
        lambda row: sum(label != -100 for label in row["labels"]) == len(row["seq_lengths"])
    )
    assert len(trainer.train_dataset)
    before = trainer.model.lm_head.weight.detach().clone()
    trainer.train()
    assert logged(trainer, "loss") == [0.0] and logged(trainer, "grad_norm") == [0.0]
    assert torch.equal(trainer.model.lm_head.weight, before)


def test_wrapped_is_left_to_trl(tmp_path: Path) -> None:
    trainer = make(tmp_path, packing=True, packing_strategy="wrapped")
    part = trainer.chronicals_report["packing"]
    assert part.state == "off" and part.omitted and "wrapped" in part.reason
    trainer.train()


def test_spawned_data_loader_workers(tmp_path: Path) -> None:
    trainer = make(
        tmp_path, packing=True, dataloader_num_workers=1, dataloader_multiprocessing_context="spawn", max_steps=2
    )
    reference = make(tmp_path, packing=True, max_steps=2)
    trainer.train()
    reference.train()
    assert logged(trainer, "loss") == logged(reference, "loss")


def test_resume_continues_the_same_curve(tmp_path: Path) -> None:
    options = {"packing": True, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = make(tmp_path, **options)
    whole.train()
    again = make(tmp_path, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert logged(again, "loss")[3:] == logged(whole, "loss")[3:]
    assert logged(again, "loss") == logged(whole, "loss")
    saved = torch.load(tmp_path / "out" / "checkpoint-3" / "training_args.bin", weights_only=False)
    assert type(saved) is SFTConfig and saved.use_chronicals


# -- the report and the logs -----------------------------------------------------------------------------------------


def test_report_is_shown_kept_and_written(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    trainer = make(tmp_path, packing=True)
    written = json.loads((tmp_path / "out" / "chronicals_report.json").read_text())
    assert written == trainer.chronicals_report.to_dict()
    assert [part["name"] for part in written["parts"]] == [
        "rms_norm", "gated_mlp", "qk_rope", "attention", "head", "packing", "lora", "lora_plus", "adamw",
        "cuda_graphs", "recompute",
    ]  # fmt: skip
    assert "rms_norm" in capsys.readouterr().out


@pytest.mark.parametrize("speaks", [True, False])
def test_a_note_while_the_run_goes_on_is_written_and_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, speaks: bool
) -> None:
    """By the process that logs."""
    trainer = make(tmp_path)
    monkeypatch.setattr(SFTConfig, "should_log", speaks)
    caplog.set_level(logging.INFO, "chronicals_trl")
    caplog.clear()
    for _ in range(2):
        trainer._tell_once("something came up")
        trainer._tell_once("something bad came up", warn=True)
    written = json.loads((tmp_path / "out" / "chronicals_report.json").read_text())
    assert written["notes"][-2:] == ["something came up", "something bad came up"]
    assert written == trainer.chronicals_report.to_dict()
    said = [(record.levelno, record.getMessage()) for record in caplog.records]
    expected = [
        (logging.INFO, "chronicals-trl: something came up"),
        (logging.WARNING, "chronicals-trl: something bad came up"),
    ]
    assert said == (expected if speaks else [])


def test_throughput_in_the_logs(tmp_path: Path) -> None:
    trainer = make(tmp_path, packing=True)
    trainer.train()
    rows = sum(len(ids) for ids in trainer.train_dataset["input_ids"])
    tokens = logged(trainer, "num_tokens")
    fills = logged(trainer, "packing_fill")
    assert len(fills) == len(logged(trainer, "tokens_per_second")) == SETTINGS["max_steps"]
    assert tokens[-1] <= rows
    counts = [tokens[0], *(b - a for a, b in itertools.pairwise(tokens))]
    assert fills == pytest.approx([count / (2 * 96) for count in counts])
    assert min(logged(trainer, "tokens_per_second")) > 0 and min(logged(trainer, "peak_memory_gib")) > 0


def test_a_plain_config_counts_as_off_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for config_class in (trl.SFTConfig, TrainingArguments):
        options = {key: value for key, value in SETTINGS.items() if key != "max_length"}
        trainer = SFTTrainer(
            model=tiny_models.build("llama"),
            args=config_class(**{**options, "output_dir": str(tmp_path)}),
            train_dataset=tiny_data.text(),
            processing_class=tiny_data.tokenizer(),
        )
        assert {part.state for part in trainer.chronicals_report.parts} == {"off"}
        assert config_class.__name__ in trainer.chronicals_report["head"].reason
    assert "chronicals-trl is off" in caplog.text


def test_without_arguments_the_environment_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # transformers' defaults, bf16 among them, refuse a machine without a GPU: nothing of that is tested here.
    monkeypatch.setattr(TrainingArguments, "_validate_args", lambda self: None, raising=False)
    model = tiny_models.build("llama").to(torch.float32)
    model.config._name_or_path = "somewhere/tiny"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for flag, state in (("0", "off"), ("1", "on")):
        monkeypatch.setenv("CHRONICALS_USE_CHRONICALS", flag)
        trainer = SFTTrainer(model, train_dataset=tiny_data.text(4), processing_class=tiny_data.tokenizer())
        assert type(trainer.args) is SFTConfig and trainer.args.output_dir == "tiny-SFT"
        assert trainer.chronicals_report["head"].state == state


def test_strict(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="rms_norm is off"):
        make(tmp_path, family="gpt2", chronicals_config={"strict": True})
    make(tmp_path, chronicals_config={"strict": True})  # nothing is omitted here


def test_on_for_the_trainers_own_parts(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = {"packing": "on", "lora_plus": "on", "lora": "on"}
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"])
    report = make(tmp_path, packing=True, peft_config=lora, chronicals_config=config).chronicals_report
    assert {report[name].state for name in config} == {"on"}
    for config, reason in (
        ({"lora_plus": "on"}, "lora_plus is off: the model has no trainable LoRA adapter"),
        ({"packing": "on"}, "packing is off: packing=False"),
    ):
        model = tiny_models.build("llama")
        with pytest.raises(RuntimeError, match=reason):
            make(tmp_path, model=model, chronicals_config=config)
        assert not is_patched(model)


def test_a_flag_off_run_leaves_nothing_of_an_earlier_one(tmp_path: Path) -> None:
    report = tmp_path / "out" / "chronicals_report.json"
    make(tmp_path, use_chronicals=False)
    assert not report.exists()
    model = make(tmp_path).model
    assert is_patched(model) and report.exists()
    trainer = make(tmp_path, model=model, use_chronicals=False)
    assert not is_patched(model) and model.config._attn_implementation == "sdpa"
    assert any("came patched" in note for note in trainer.chronicals_report.notes)
    assert {part["state"] for part in json.loads(report.read_text())["parts"]} == {"off"}


# -- LoRA+ -----------------------------------------------------------------------------------------------------------


def test_lora_plus_groups_through_training(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    trainer = make(
        tmp_path, packing=True, peft_config=peft.LoraConfig(r=4, target_modules="all-linear"), warmup_steps=2,
        weight_decay=0.1, chronicals_config={"lora_plus_ratio": 8.0},
    )  # fmt: skip
    assert trainer.chronicals_report["lora_plus"].state == "on"
    trainer.train()
    rates = {id(p): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    initial = {id(p): group["initial_lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    for name, parameter in trained.items():
        assert initial[id(parameter)] == pytest.approx(SETTINGS["learning_rate"] * (8 if "lora_B" in name else 1))
        assert id(parameter) in rates
    assert logged(trainer, "learning_rate_lora_b") == pytest.approx([8 * r for r in logged(trainer, "learning_rate")])
    assert any("8 times" in note for note in trainer.chronicals_report.notes)


@pytest.mark.parametrize("first", [True, False])
def test_lora_plus_does_not_resume_without_its_groups(tmp_path: Path, first: bool) -> None:
    peft = pytest.importorskip("peft")

    def trainer(flag: bool, **settings):
        return make(
            tmp_path, use_chronicals=flag, max_steps=2, save_strategy="steps", save_steps=1,
            peft_config=peft.LoraConfig(r=2, target_modules=["q_proj"]), **settings,
        )  # fmt: skip

    trainer(first).train()
    checkpoint = str(tmp_path / "out" / "checkpoint-1")
    written, remedy = ("on", "lora_plus='auto'") if first else ("off", "lora_plus='off'")
    with pytest.raises(ValueError, match=f"was written with LoRA\\+ {written}, and this run.*Resume with .*{remedy}"):
        trainer(not first).train(resume_from_checkpoint=checkpoint)
    trainer(True, chronicals_config={"lora_plus": "auto" if first else "off"}).train(resume_from_checkpoint=checkpoint)
    for name in ("optimizer.pt", "scheduler.pt"):
        (tmp_path / "out" / "checkpoint-1" / name).unlink()
    trainer(not first).train(resume_from_checkpoint=checkpoint)


def test_lora_plus_on_embeddings(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def trainer(targets: list[str], **config: float):
        lora = peft.LoraConfig(r=2, target_modules=targets)
        return make(tmp_path, peft_config=lora, chronicals_config=config)

    part = trainer(["embed_tokens"]).chronicals_report["lora_plus"]
    assert part.state == "off" and not part.omitted and "set lora_plus_embedding_lr" in part.reason
    alone = trainer(["embed_tokens"], lora_plus_embedding_lr=0.5)
    assert alone.chronicals_report["lora_plus"].backend == "embedding_lr 0.5"
    assert any("LoRA+: LoRA's embedding matrices at 0.5;" in note for note in alone.chronicals_report.notes)
    alone.train()
    assert [group["initial_lr"] for group in alone.optimizer.param_groups] == [0.5]
    assert not logged(alone, "learning_rate_lora_b")
    assert not any("to be divided" in note for note in alone.chronicals_report.notes)
    both = trainer(["embed_tokens", "q_proj"], lora_plus_embedding_lr=0.5).chronicals_report
    assert both["lora_plus"].backend == "ratio 16, embedding_lr 0.5"


@pytest.mark.parametrize(("ratio", "divisor"), [(16.0, "4"), (8.0, "2.8"), (1.0, None), (0.25, None)])
def test_the_report_says_what_becomes_of_a_tuned_rate(tmp_path: Path, ratio: float, divisor: str | None) -> None:
    """What docs/lora-plus.md says: divide it by the square root of the ratio."""
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"])
    notes = make(tmp_path, peft_config=lora, chronicals_config={"lora_plus_ratio": ratio}).chronicals_report.notes
    expected = f"LoRA+: B learns at {ratio:g} times the learning rate of A; lora_plus='off' restores one rate for all"
    if divisor is not None:
        expected += f"; a rate that was tuned without LoRA+ is to be divided by about {divisor}"
    assert expected in notes


def test_lora_plus_leaves_a_given_optimizer_alone(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_models.build("llama"), peft.LoraConfig(r=4, target_modules="all-linear"))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    trainer = make(tmp_path, model=model, optimizers=(optimizer, None))
    part = trainer.chronicals_report["lora_plus"]
    assert part.state == "off" and "passed in" in part.reason
    trainer.train()
    assert len(trainer.optimizer.param_groups) == 1


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": Dataset.from_dict({"text": []})}, "`train_dataset` is empty"),
        ({"data": Dataset.from_dict({"txt": ["a"], "id": [1]})}, r"no text: its columns are \['id', 'txt'\]"),
        ({"eval_dataset": Dataset.from_dict({"txt": ["a"]})}, "`eval_dataset` has no text"),
        ({"eval_dataset": {"a": Dataset.from_dict({"text": []})}}, r"`eval_dataset\['a'\]` is empty"),
        ({"eval_packing": True, "max_length": None}, "eval_packing=True needs max_length"),
        ({"packing": True, "max_length": 1}, "packing=True with max_length=1: a packed row of fewer than 2 tokens"),
        ({"packing": True, "max_length": None}, "packing=True needs max_length"),
        ({"chronicals_config": {"atention": "off"}}, "unknown key 'atention'.*'attention'"),
    ],
)
def test_bad_input(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **options)


_TEXT = "Ada gives Bo 3 cups"
_QUESTION = {"role": "user", "content": _TEXT}
_CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}],
}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": [_TEXT, None]}, "no value .None. in the column 'text' of 1 of 2 rows, first in row 1"),
        ({"text": [None, None]}, "'text' of 2 of 2 rows"),
        ({"text": [1, 2]}, "holds int64 in the column 'text'.*cast_column"),
        ({"prompt": ["a", "b"], "completion": ["c", None]}, "column 'completion' of 1 of 2 rows"),
        ({"input_ids": ["a b", "c"]}, "holds string in the column 'input_ids', where TRL reads lists of token ids"),
        ({"input_ids": [[5, 6], None]}, "column 'input_ids' of 1 of 2 rows"),
        ({"messages": [[{"role": "user", "content": "a"}], None]}, "column 'messages' of 1 of 2 rows"),
        (
            {"messages": [[{"role": "user", "content": "a"}], []]},
            "no messages .*'messages' of 1 of 2 rows, first in row 1",
        ),
        ({"conversations": [[{"role": "user", "content": "a"}]]}, "reads 'from' and 'value'.*rename_column"),
        ({"messages": ["hi"] * 4}, "has text in the column 'messages'.*json.loads.*'messages', 'text'"),
        (
            {"messages": [["hi"]]},
            "has lists of str in the column 'messages', where TRL reads messages with 'role' and",
        ),
        (
            {"messages": [[{"from": "user", "value": "x"}]] * 4},
            r"keys \['from', 'value'\] in the column 'messages'.*'role' and 'content'.*'messages', 'conversations'",
        ),
        # TRL would train on turns without a word in them, and so it would if there were a text beside them.
        ({"messages": [[{"role": "user", "text": "x"}]]}, r"keys \['role', 'text'\].*'content': \.\.\."),
        ({"messages": [[{"role": "user", "text": "x"}]], "text": ["a"]}, r"keys \['role', 'text'\]"),
        (
            {"prompt": [[{"from": "user", "value": "x"}]], "completion": [[{"role": "assistant", "content": "a"}]]},
            "in the column 'prompt', where TRL reads messages with",
        ),
        (
            {"prompt": [[{"role": "user", "content": "x"}]], "completion": [["a"]]},
            "lists of str in the column 'completion'",
        ),
    ],
)
def test_missing_and_wrong_values(tmp_path: Path, columns: dict, message: str) -> None:
    data = Dataset.from_dict(columns)
    with pytest.raises(ValueError, match=message):
        make(tmp_path, data=data)
    with pytest.raises(ValueError, match="`eval_dataset`.*" + message):
        make(tmp_path, eval_dataset=data)


def test_missing_values_in_rows_and_columns_that_are_not_read(tmp_path: Path) -> None:
    make(tmp_path, data=Dataset.from_dict({"text": [_TEXT, None, _TEXT]}).select([0, 2]))
    make(tmp_path, data=Dataset.from_dict({"text": [_TEXT] * 2, "source": [None, 1]}))
    ids = tiny_data.tokenized(2)["input_ids"]
    make(tmp_path, data=Dataset.from_dict({"input_ids": ids, "text": [None, None]}))
    turns = [{"role": "user", "content": "a"}]
    make(tmp_path, data=Dataset.from_dict({"messages": [turns, [], turns]}).select([0, 2]))
    make(tmp_path, data=Dataset.from_dict({"text": [_TEXT] * 2, "conversations": [turns, []]}))
    make(tmp_path, data=Dataset.from_dict({"conversations": [[{"from": "user", "value": "a"}]]}))
    stream = Dataset.from_dict({"text": [1, 2]}).to_iterable_dataset()
    with pytest.raises(ValueError, match="holds int in the column 'text'"):
        make(tmp_path, data=stream)


def test_messages_in_a_stream_are_looked_at_too(tmp_path: Path) -> None:
    for row in ("hi", [{"from": "user", "value": "x"}]):
        stream = Dataset.from_dict({"messages": [row] * 4}).to_iterable_dataset()
        with pytest.raises(ValueError, match="in the column 'messages', where TRL reads messages with 'role'"):
            make(tmp_path, data=stream)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    "columns",
    [
        {"messages": [[_CALL, _QUESTION]]},
        {"messages": [[{"role": "assistant", "tool_calls": _CALL["tool_calls"]}]]},
        {"messages": [[{"role": "user", "content": [{"type": "text", "text": "a b"}], "name": "x"}]]},
        {"messages": [[_QUESTION]], "tools": ["[]"], "chat_template_kwargs": [{"thinking": True}]},
        {"prompt": [[_QUESTION]], "completion": [[_CALL]]},
        {"prompt": ["a"], "completion": ["b"]},
        # TRL reads another column.
        {"messages": ["a"], "text": [_TEXT]},
        {"messages": [[{"from": "user", "value": "a"}]], "text": [_TEXT]},
        {"messages": ["a"], "input_ids": [[5, 6, 7]]},
        {"messages": ["a"], "conversations": [[{"from": "user", "value": _TEXT}]]},
        {
            "prompt": [[{"from": "user", "value": "a"}]],
            "completion": [[{"from": "assistant", "value": "b"}]],
            "conversations": [[{"from": "user", "value": "c"}]],
        },
    ],
)
def test_messages_of_every_kind_that_trl_reads(tmp_path: Path, columns: dict, streamed: bool) -> None:
    data = Dataset.from_dict({name: values * 4 for name, values in columns.items()})
    data = data.to_iterable_dataset() if streamed else data
    ours = make(tmp_path, data=data, max_steps=1).train_dataset
    theirs = make(tmp_path, data=data, max_steps=1, use_chronicals=False).train_dataset
    assert [row["input_ids"] for row in ours] == [row["input_ids"] for row in theirs]


def test_a_prepared_data_set_without_tokens() -> None:
    for columns, named in (({"source": ["web"]}, r"\['source'\]"), ({}, r"\[\]")):
        with pytest.raises(ValueError, match=f"neither input_ids nor labels .* its columns are {named}"):
            require_labels(Dataset.from_dict(columns), 8)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(
    ("columns", "options"),
    [
        ({"input_ids": [[5, 6, 7]] * 4, "labels": [[5, -100, -100]] * 4}, {}),
        ({"input_ids": [[5], [6]]}, {}),
        ({"text": [""] * 4}, {}),
        ({"input_ids": [[5] * 20] * 4, "labels": [[-100] * 10 + [5] * 10] * 4}, {"max_length": 8}),
        ({"text": [_TEXT] * 4}, {"max_length": 1, "packing": False}),
    ],
)
def test_nothing_to_learn(tmp_path: Path, packing: bool, columns: dict, options: dict) -> None:
    with pytest.raises(ValueError, match="`train_dataset` has nothing to learn: none of its"):
        make(tmp_path, data=Dataset.from_dict(columns), **{"packing": packing, **options})


def test_what_truncation_keeps_is_what_counts(tmp_path: Path) -> None:
    """`keep_end` leaves the labels that stand behind a long prompt; packing cuts off the end in any case, as TRL's."""
    answers = Dataset.from_dict({"input_ids": [[5] * 20] * 4, "labels": [[-100] * 19 + [5]] * 4})
    trainer = make(tmp_path, data=answers, max_length=8, packing=False, truncation_mode="keep_end")
    assert trainer.train_dataset["labels"][:] == [[-100] * 7 + [5]] * 4
    for rows, options in (
        (answers, {"packing": True}),
        (Dataset.from_dict({"input_ids": [[5] * 20], "labels": [[5] * 13 + [-100] * 7]}), {"packing": False}),
    ):
        with pytest.raises(ValueError, match="nothing to learn"):
            make(tmp_path, data=rows, max_length=8, truncation_mode="keep_end", **options)


def test_a_little_to_learn_is_enough(tmp_path: Path) -> None:
    masked = {"input_ids": [5] * 20, "labels": [-100] * 20}
    rows = [masked] * 1500 + [{"input_ids": [5] * 20, "labels": [-100] * 19 + [5]}]
    make(tmp_path, data=Dataset.from_list(rows), packing=True, max_length=20)
    make(tmp_path, data=Dataset.from_list(rows[-1:]), packing=True, max_length=8, packing_strategy="bfd_split")
    with pytest.raises(ValueError, match="nothing to learn"):
        make(tmp_path, data=Dataset.from_list(rows).select(range(1500)), packing=True)


def test_completion_only_loss_without_completions_is_noted(tmp_path: Path) -> None:
    """TRL learns every token then, without a word."""
    for data, noted in ((tiny_data.text(), True), (tiny_data.chat(), True), (tiny_data.prompt_completion(), False)):
        notes = make(tmp_path, data=data, packing=True, completion_only_loss=True).chronicals_report.notes
        assert any("every token is learned" in note for note in notes) is noted
    notes = make(tmp_path, packing=True).chronicals_report.notes
    assert not any("every token is learned" in note for note in notes)


def test_models_that_do_not_write_from_left_to_right(tmp_path: Path) -> None:
    llama = tiny_models.build("llama")
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=131, d_model=16, d_ff=16, num_layers=1, num_heads=1, d_kv=16)
    )
    for model, kind in ((t5, "an encoder-decoder"), (llama.model, "no causal language model")):
        with pytest.raises(ValueError, match=f"`model` is a {type(model).__name__}, {kind}.*AutoModelForCausalLM"):
            make(tmp_path, model=model)
    t5.save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match="an encoder-decoder"):
        make(tmp_path, model=str(tmp_path / "t5"), packing=True)


@pytest.mark.parametrize("packing", [True, False])
def test_tokens_that_the_model_does_not_know(tmp_path: Path, packing: bool) -> None:
    unknown = Dataset.from_dict({"input_ids": [[5, 6, 7], [5, 900, 6]]})
    with pytest.raises(ValueError, match=r"`train_dataset` has .* as large as 900, but the model's embedding has 131"):
        make(tmp_path, data=unknown, packing=packing)
    with pytest.raises(ValueError, match=r"`eval_dataset\['a'\]` has .* as large as 900"):
        make(tmp_path, packing=packing, eval_dataset={"a": unknown})
    with pytest.raises(ValueError, match="as small as -1"):
        make(tmp_path, data=Dataset.from_dict({"input_ids": [[5, 6, -1]]}), packing=packing)
    make(tmp_path, data=unknown.select([0]), packing=packing)
    make(tmp_path, data=Dataset.from_dict({"input_ids": [[5, 6, 130]]}), packing=packing)


@pytest.mark.parametrize("max_steps", [-1, 2])
def test_too_few_rows_for_a_batch(tmp_path: Path, max_steps: int) -> None:
    """Trainer would go through no batch, end with exit code 0 and save the model as it came."""
    options = {"per_device_train_batch_size": 64, "dataloader_drop_last": True, "max_steps": max_steps}
    packed = make(tmp_path, data=tiny_data.text(4), packing=True, **options)
    rows = len(packed.train_dataset)
    sizes = (
        r"a batch of all processes takes 64 .per_device_train_batch_size=64, processes: 1, dataloader_drop_last=True"
    )
    with pytest.raises(
        ValueError, match=rf"has {rows} rows?, and {sizes}.*packing=True makes fewer .*a smaller max_l"
    ):
        packed.train()
    with pytest.raises(ValueError, match=rf"has 4 rows, and {sizes}.\. Set dataloader_drop_last=False, or a smaller"):
        make(tmp_path, data=tiny_data.text(4), **options).train()
    assert packed.state.global_step == 0


def test_few_rows_that_are_enough_for_a_step(tmp_path: Path) -> None:
    options = {"per_device_train_batch_size": 64, "packing": True, "max_steps": 1}
    for data in (tiny_data.text(4), tiny_data.text(4).to_iterable_dataset()):
        trainer = make(tmp_path, data=data, **options)
        trainer.train()
        assert trainer.state.global_step == 1
    off = make(tmp_path, data=tiny_data.text(4), dataloader_drop_last=True, use_chronicals=False, **options)
    off.train()  # as stock TRL does it
    assert off.state.global_step == 0


def test_empty_stream(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`train_dataset` is empty"):
        make(tmp_path, data=IterableDataset.from_generator(lambda: iter(())))


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_weights_that_are_not_finite(tmp_path: Path, value: str) -> None:
    model = tiny_models.build("llama")
    model.lm_head.weight.data[0, 0] = float(value)
    with pytest.raises(ValueError, match=r"hold NaN or infinity before training, first: lm_head\.weight"):
        make(tmp_path, model=model)


def test_a_model_that_mixes_documents_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model with a mask of its own that knows no documents, as remote code may have."""
    model = tiny_models.build("llama", attn_implementation="eager")
    monkeypatch.setattr(
        "transformers.models.llama.modeling_llama.create_causal_mask",
        lambda *, inputs_embeds, **_: torch.full((1, 1, *[inputs_embeds.shape[1]] * 2), -1e9).triu(1),
    )
    with pytest.raises(RuntimeError, match=r"^packing=True.*attend to each other.*Set packing=False, or .*'sdpa'"):
        make(tmp_path, model=model, packing=True)
    assert not is_patched(model)
    # Only what the model supports is recommended, and only the argument that was set.
    monkeypatch.setattr(type(model), "_supports_sdpa", False)
    monkeypatch.setattr(type(model), "_supports_flash_attn", False)
    with pytest.raises(RuntimeError, match=r"^eval_packing=True.*Set eval_packing=False\.$"):
        make(tmp_path, model=model, eval_packing=True, eval_dataset=tiny_data.text(6))
    make(tmp_path, model=model, packing=False)


# -- side by side with other settings --------------------------------------------------------------------------------


def test_a_subclass_that_overrides_compute_loss(tmp_path: Path) -> None:
    class Mine(SFTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            return 2 * loss

    ours, gradients = run(Mine, SFTConfig, tmp_path, options={"use_chronicals": True})
    theirs, reference = run(SFTTrainer, SFTConfig, tmp_path)
    part = ours.chronicals_report["head"]
    assert part.state == "off" and "Mine overrides compute_loss" in part.reason
    assert logged(ours, "loss")[0] == pytest.approx(2 * logged(theirs, "loss")[0], rel=1e-5)
    for name, gradient in reference.items():
        assert torch.allclose(gradients[name], 2 * gradient, rtol=1e-4, atol=1e-7)
    assert logged(ours, "tokens_per_second")


def test_compute_loss_func(tmp_path: Path) -> None:
    def loss_func(outputs, labels, num_items_in_batch=None):
        logits = outputs.logits[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch

    trainer = make(tmp_path, compute_loss_func=loss_func)
    reference = make(tmp_path)
    assert trainer.chronicals_report["head"].reason == "compute_loss_func needs the logits"
    trainer.train()
    reference.train()
    assert logged(trainer, "loss") == pytest.approx(logged(reference, "loss"), rel=1e-4)


def test_use_liger_kernel_turns_the_same_blocks_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Liger itself needs a GPU driver: what is tested is that we step aside before it is applied.
    monkeypatch.setattr("transformers.training_args.is_liger_kernel_available", lambda *_: True, raising=False)
    trainer = make(tmp_path, use_liger_kernel=True)
    for name in ("rms_norm", "gated_mlp", "qk_rope"):
        part = trainer.chronicals_report[name]
        assert part.state == "off" and "use_liger_kernel" in part.reason
    assert trainer.chronicals_report["head"].state == "on"


def test_hub_kernels_turn_the_same_blocks_off(tmp_path: Path) -> None:
    model = tiny_models.build("llama")
    model._use_kernels = True  # what `use_kernels=True` leaves behind; the kernels themselves come from a hub
    report = make(tmp_path, model=model).chronicals_report
    assert {report[name].state for name in ("rms_norm", "gated_mlp", "qk_rope")} == {"off"}
    assert "hub kernels" in report["rms_norm"].reason and report["head"].state == "on"


def test_a_deepspeed_optimizer_section_is_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    trainer = make(tmp_path, peft_config=peft.LoraConfig(r=2, target_modules=["q_proj"]))
    trainer.args.hf_deepspeed_config = type("Config", (), {"config": {"optimizer": {"type": "AdamW"}}})()
    with pytest.raises(ValueError, match=r"own 'optimizer'.*lora_plus='off'"):
        _inputs.lora_plus_part(trainer, ChronicalsConfig())
    assert _inputs.lora_plus_part(trainer, ChronicalsConfig(lora_plus="off")).state == "off"


def test_auto_find_batch_size(tmp_path: Path) -> None:
    class OutOfMemoryOnce(SFTTrainer):
        failed = False

        def training_step(self, model, inputs, num_items_in_batch=None):
            if not OutOfMemoryOnce.failed:
                OutOfMemoryOnce.failed = True
                raise RuntimeError("CUDA out of memory. (planted)")
            return super().training_step(model, inputs, num_items_in_batch)

    settings = {**SETTINGS, "output_dir": str(tmp_path), "auto_find_batch_size": True, "packing": True}
    trainer = OutOfMemoryOnce(
        model=tiny_models.build("llama"),
        args=SFTConfig(**{**settings, "use_chronicals": True}),
        train_dataset=tiny_data.text(),
        processing_class=tiny_data.tokenizer(),
    )
    trainer.train()
    assert OutOfMemoryOnce.failed and len(logged(trainer, "loss")) == SETTINGS["max_steps"]
    assert any("auto_find_batch_size" in note for note in trainer.chronicals_report.notes)


def test_a_newer_trl_than_tested_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chronicals_trl.trainer.installed", lambda name: "99.0" if name == "trl" else "5.20.0")
    notes = make(tmp_path).chronicals_report.notes
    assert "trl 99.0 is newer than the newest tested release" in notes


def test_arguments_pickle(tmp_path: Path) -> None:
    args = SFTConfig(
        **{**SETTINGS, "output_dir": str(tmp_path), "use_chronicals": True}, chronicals_config={"head": "off"}
    )
    again = pickle.loads(pickle.dumps(args))
    assert again.use_chronicals and again.chronicals_config == {"head": "off"}
    assert ChronicalsConfig.resolve(again.chronicals_config).head == "off"


def test_saved_checkpoint_equals_an_unpatched_save(tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    trainer = make(tmp_path, packing=True)
    trainer.save_model(str(tmp_path / "ours"))
    tiny_models.build("llama").save_pretrained(tmp_path / "stock")
    ours, stock = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "stock"))
    assert ours.keys() == stock.keys() and all(torch.equal(ours[name], stock[name]) for name in stock)
    assert "chronicals" not in (tmp_path / "ours" / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "ours").config._attn_implementation == "sdpa"
