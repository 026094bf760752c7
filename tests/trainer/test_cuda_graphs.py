"""CUDA graphs in the trainer: when they are on, the same training with them, and nothing left of them; on the CPU."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import tiny_data
import tiny_models
import torch
from graph_stand_in import StandIn
from torch import nn
from training_runs import SETTINGS, logged, run
from transformers import TrainerCallback

from chronicals_trl import SFTConfig, SFTTrainer
from chronicals_trl.model import graphs
from chronicals_trl.model import trainer as graphs_trainer
from chronicals_trl.model.graph_layers import PLACE, UNGRAPHED, graphed_forward

PACKED = {"use_chronicals": True, "packing": True, "max_steps": 8}
PADDED = {"packing": False, "chronicals_config": {"padding_free": "off"}}


def make(tmp_path: Path, **options: Any) -> SFTTrainer:
    arguments = {name: options.pop(name) for name in ("model", "peft_config", "eval_dataset") if name in options}
    return SFTTrainer(
        model=arguments.pop("model", None) or tiny_models.build("llama"),
        args=SFTConfig(**{**SETTINGS, **PACKED, "output_dir": str(tmp_path / "out"), **options}),
        train_dataset=tiny_data.text(120),
        processing_class=tiny_data.tokenizer(),
        **arguments,
    )


def trained(tmp_path: Path, setting: str, **options: Any):
    arguments = {name: options.pop(name) for name in ("peft_config", "eval_dataset", "callbacks") if name in options}
    config = {"cuda_graphs": setting, "lora_plus": "off", "padding_free": "off"}
    options = {**PACKED, "chronicals_config": config, **options}
    return run(SFTTrainer, SFTConfig, tmp_path / setting, data=tiny_data.text(120), options=options, **arguments)


def require_nothing_left(trainer: Any) -> None:
    for module in trainer.model.modules():
        assert not {PLACE, UNGRAPHED} & set(module.__dict__)
        assert getattr(module.__dict__.get("forward"), "__func__", None) is not graphed_forward
    assert trainer._graphs is None


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_same_training(tmp_path: Path, recorder: StandIn, lora: bool, accumulation: int) -> None:
    options: dict[str, Any] = {"gradient_accumulation_steps": accumulation, "max_grad_norm": 0.5}
    if lora:
        options["peft_config"] = pytest.importorskip("peft").LoraConfig(r=2, target_modules="all-linear")
    ours, _ = trained(tmp_path, "on", **options)
    assert recorder.replayed > 0
    replayed = recorder.replayed
    theirs, _ = trained(tmp_path, "off", **options)
    assert recorder.replayed == replayed
    assert ours.chronicals_report["cuda_graphs"].modules == 2
    for key in ("loss", "grad_norm", "entropy", "num_tokens"):
        assert logged(ours, key) == logged(theirs, key)
    pairs = zip(ours.model.parameters(), theirs.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    require_nothing_left(ours)
    assert recorder.released


def test_the_report_says_what_was_replayed(tmp_path: Path, recorder: StandIn) -> None:
    trainer, _ = trained(tmp_path, "auto")
    (note,) = (note for note in trainer.chronicals_report.notes if note.startswith("CUDA graphs"))
    assert "of 8 batches replayed" in note and not note.startswith("CUDA graphs: 0")
    written = json.loads((tmp_path / "auto" / "out" / "chronicals_report.json").read_text())
    assert note in written["notes"]
    assert written == trainer.chronicals_report.to_dict()


def test_a_run_too_short_to_capture_says_so(tmp_path: Path, recorder: StandIn) -> None:
    trainer, _ = trained(tmp_path, "auto", max_steps=2)
    part = trainer.chronicals_report["cuda_graphs"]
    assert part.state == "off" and "no more than 3 batches" in str(part.reason)


def test_evaluation_runs_eagerly_and_gets_the_memory(tmp_path: Path, recorder: StandIn) -> None:
    """In the middle of training, in whole and after it."""
    seen: list[tuple[int, int]] = []

    class Look(TrainerCallback):
        def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
            seen.append((recorder.replayed, recorder.released))

        def on_step_begin(self, args: Any, state: Any, *_: Any, **kwargs: Any) -> None:
            if state.global_step == 6:
                seen.append((recorder.replayed, recorder.released))

    options = {
        "eval_strategy": "steps", "eval_steps": 6, "eval_dataset": tiny_data.text(12), "eval_packing": True,
    }  # fmt: skip
    ours, _ = trained(tmp_path, "on", callbacks=[Look()], **options)
    assert seen[0][0] == seen[1][0] > 0  # no replay in the evaluation
    assert seen[0][1] == 1
    assert recorder.replayed > seen[0][0]
    theirs, _ = trained(tmp_path, "off", **options)
    assert logged(ours, "eval_loss") == logged(theirs, "eval_loss")
    assert logged(ours, "loss") == logged(theirs, "loss")


def test_a_failing_capture_is_told_and_harms_nothing(
    tmp_path: Path, recorder: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    recorder.fails_at = 2
    with caplog.at_level(logging.WARNING, "chronicals_trl"):
        ours, _ = trained(tmp_path, "auto")
    assert "cuda_graphs is off: the layers cannot be captured" in caplog.text
    part = ours.chronicals_report["cuda_graphs"]
    assert part.state == "off" and part.omitted and "stream is capturing" in str(part.reason)
    written = json.loads((tmp_path / "auto" / "out" / "chronicals_report.json").read_text())
    assert {each["name"]: each["reason"] for each in written["parts"]}["cuda_graphs"] == part.reason
    theirs, _ = trained(tmp_path, "off")
    assert logged(ours, "loss") == logged(theirs, "loss")
    require_nothing_left(ours)


def test_a_failing_capture_is_an_error_where_it_is_insisted(tmp_path: Path, recorder: StandIn) -> None:
    recorder.fails_at = 1
    trainer = make(tmp_path, chronicals_config={"cuda_graphs": "on"})
    with pytest.raises(RuntimeError, match="cuda_graphs is off: the layers cannot be captured"):
        trainer.train()
    require_nothing_left(trainer)


def test_nothing_is_left_after_an_error(tmp_path: Path, recorder: StandIn) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, *_: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                raise KeyboardInterrupt

    trainer = make(tmp_path)
    trainer.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert recorder.replayed and recorder.released
    require_nothing_left(trainer)


def test_a_hook_from_outside_is_told(tmp_path: Path, recorder: StandIn, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make(tmp_path, max_steps=graphs_trainer.PATIENCE)
    trainer.model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    with caplog.at_level(logging.WARNING, "chronicals_trl"):
        trainer.train()
    assert "no CUDA graph after 16 batches: there are hooks" in caplog.text
    assert "hooks" in str(trainer.chronicals_report["cuda_graphs"].reason)


# -- when they are on ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, reason, omitted",
    [
        ({"chronicals_config": {"cuda_graphs": "off"}}, "in the configuration", False),
        ({**PADDED, "max_length": None}, "max_length=None leaves their lengths open", False),
        ({**PADDED, "pad_to_multiple_of": 2}, "pad_to_multiple_of=2 gives them more than 8", False),
        ({**PADDED, "padding_free": True, "max_length": None}, "not TRL's collator", False),
        ({"chronicals_config": {"packing": "off"}}, "not TRL's collator", False),  # but its packing
        ({**PADDED, "per_device_train_batch_size": 10**9}, "too large for more padding", False),
        ({"gradient_checkpointing": True}, "gradient_checkpointing=True", False),
        ({"chronicals_config": {"rms_norm": "off"}}, "not patched", True),
        ({"torch_compile": True}, "torch_compile=True", True),
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True", True),
    ],
)
def test_off_and_why(tmp_path: Path, recorder: StandIn, options: dict[str, Any], reason: str, omitted: bool) -> None:
    part = make(tmp_path, **options).chronicals_report["cuda_graphs"]
    assert part.state == "off" and part.omitted is omitted and reason in str(part.reason)


def test_padded_rows_get_lengths_that_recur(tmp_path: Path, recorder: StandIn) -> None:
    """And the same training, up to the order of sums that the longer padding changes."""
    options = {"packing": False, "max_steps": 16, "max_length": 64, "per_device_train_batch_size": 3}
    ours, theirs = (trained(tmp_path, setting, **options)[0] for setting in ("auto", "off"))
    assert recorder.replayed > 0
    assert "CUDA graphs: rows are padded to multiples of 8 tokens, so that their shapes recur" in (
        ours.chronicals_report.notes
    )
    for key in ("loss", "grad_norm", "num_tokens"):
        assert logged(ours, key) == pytest.approx(logged(theirs, key), rel=1e-4), key
    lengths = {batch["input_ids"].shape[1] for batch in ours.get_train_dataloader()}
    assert all(length % 8 == 0 for length in lengths)
    assert any(batch["input_ids"].shape[1] % 8 for batch in theirs.get_train_dataloader())


def test_padded_rows_beside_a_packed_evaluation(tmp_path: Path, recorder: StandIn) -> None:
    """Packed and padded rows share a collator then, of which training's are rounded up."""
    options = {**PADDED, "eval_packing": True, "max_length": 64, "per_device_train_batch_size": 3}
    trainer = make(tmp_path, eval_dataset=tiny_data.text(9), **options)
    assert any("padded to multiples of 8 tokens" in note for note in trainer.chronicals_report.notes)
    assert all(batch["input_ids"].shape[1] % 8 == 0 for batch in trainer.get_train_dataloader())
    assert trainer._recurring_sizes() == [3 * n for n in range(8, 65, 8)]
    assert next(iter(trainer.get_eval_dataloader()))["input_ids"].shape[0] == 1


def test_the_users_own_multiple_and_insistence_count(tmp_path: Path, recorder: StandIn) -> None:
    huge = {**PADDED, "per_device_train_batch_size": 10**9}
    for options in (
        {"pad_to_multiple_of": 32}, {"chronicals_config": {"cuda_graphs": "on", "padding_free": "off"}},
    ):  # fmt: skip
        trainer = make(tmp_path, **{**huge, **options})
        assert trainer.chronicals_report["cuda_graphs"].state == "on"
        assert trainer.data_collator.pad_to_multiple_of == (
            options.get("pad_to_multiple_of") or 16
        )  # 96 / 8, up to 16


def test_off_without_a_gpu(tmp_path: Path) -> None:
    part = make(tmp_path).chronicals_report["cuda_graphs"]
    assert part.state == "off" and not part.omitted and "no CUDA GPU" in str(part.reason)
    with pytest.raises(RuntimeError, match="cuda_graphs is off: no CUDA GPU"):
        make(tmp_path, chronicals_config={"cuda_graphs": "on"})


def test_on(tmp_path: Path, recorder: StandIn) -> None:
    for setting in ("auto", "on"):
        part = make(tmp_path, chronicals_config={"cuda_graphs": setting, "strict": True}).chronicals_report[
            "cuda_graphs"
        ]
        assert (part.state, part.modules, part.backend) == ("on", 2, "captured after 3 batches")


@pytest.mark.parametrize(
    ("ranks", "layers", "kib", "expected"),
    [
        (1, 8, 64, 1),  # nobody waits for them
        (2, 8, 64, 5),  # 256 KiB in all, and the first layer by itself
        (2, 8, 130, 1),
        (2, 8, 300, 1),
        (2, 2, 16, 2),
        (2, 8, 1, 7),  # the most that there are
    ],
)
def test_segments_of_the_backward_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int, layers: int, kib: int, expected: int
) -> None:
    """So many bytes of gradients each."""
    trainer = make(tmp_path)
    monkeypatch.setattr(graphs_trainer, "SEGMENT_BYTES", kib * 1024)
    monkeypatch.setattr(SFTConfig, "world_size", property(lambda self: ranks))
    stack = [nn.Linear(128, 128, bias=False, dtype=torch.bfloat16) for _ in range(layers)]  # 32 KiB of gradients each
    for layer in stack:
        layer.register_parameter("frozen", nn.Parameter(torch.zeros(1000, 1000), requires_grad=False))
    assert trainer._graph_segments(stack) == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [4 * 64]),
        (PADDED, [4 * n for n in range(8, 65, 8)]),
        ({**PADDED, "max_length": 60}, [4 * n for n in range(8, 65, 8)]),  # the last ones' rows are rounded up
        ({**PADDED, "pad_to_multiple_of": 32}, [4 * 32, 4 * 64]),
    ],
    ids=["packed", "padded", "up to a multiple", "by the user"],
)
def test_batches_that_will_come_again(
    tmp_path: Path, recorder: StandIn, options: dict[str, Any], expected: list[int]
) -> None:
    """Each of them has one of these sizes, and is captured when it first comes, once another one has been."""
    trainer = make(tmp_path, **{"per_device_train_batch_size": 4, "max_length": 64, "max_steps": 20, **options})
    assert trainer._recurring_sizes() == expected
    sizes = {batch["input_ids"].numel() for batch in trainer.get_train_dataloader()}
    assert sizes <= set(expected) and (len(expected) <= 2 or len(sizes) > 1)
    require_no_eager_pass_after_the_first_capture(trainer)


def test_of_a_collator_that_was_put_in_later_nothing_is_known(tmp_path: Path, recorder: StandIn) -> None:
    trainer = make(tmp_path, **PADDED)
    collator = trainer.data_collator
    trainer.data_collator = lambda examples: collator(examples)
    trainer.train()
    assert recorder.replayed and trainer._recurring_sizes() == []


def test_of_a_split_batch_a_rank_gets_its_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"per_device_train_batch_size": 4, "max_length": 64, "accelerator_config": {"split_batches": True}}
    trainer = make(tmp_path, **options)
    monkeypatch.setattr(trainer, "_data_ranks", lambda: 2)
    assert trainer._recurring_sizes() == [2 * 64]


def require_no_eager_pass_after_the_first_capture(trainer: Any) -> None:
    replays: list[int] = []

    class Look(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            replays.append(trainer._graphs.replays)

    trainer.add_callback(Look())
    trainer.train()
    first = replays.index(1)
    assert first < len(replays) - 2 and replays[first:] == list(range(1, len(replays) - first + 1))


def test_rows_of_documents_will_come_again_if_their_lengths_are_known(tmp_path: Path, recorder: StandIn) -> None:
    options = {"packing": False, "max_length": 64, "max_steps": 20, "per_device_train_batch_size": 4}
    trainer = make(tmp_path, **options)
    rows = trainer._row_lengths(trainer.train_dataset, 4)
    assert trainer._recurring_sizes() == rows.lengths and 1 < len(rows.lengths) <= graphs.MAX_GRAPHS
    require_no_eager_pass_after_the_first_capture(trainer)
    # Where documents of like length come together, nobody knows how long a batch's row will be.
    config = {"padding_free": "on"}
    grouped = make(tmp_path, train_sampling_strategy="group_by_length", chronicals_config=config, **options)
    assert grouped._unpadded is not None and grouped._recurring_sizes() == ()


def test_a_step_outside_of_train_is_eager(tmp_path: Path, recorder: StandIn) -> None:
    trainer = make(tmp_path, logging_nan_inf_filter=False)
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1  # as `train` does
    batch = next(iter(trainer.get_train_dataloader()))
    for _ in range(5):
        trainer.training_step(trainer.model, dict(batch))
    assert recorder.recorded == 0
    require_nothing_left(trainer)
