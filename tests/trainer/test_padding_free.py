"""padding_free: the losses, gradients and metrics of TRL's padded batches; where it is refused, and what is said."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_flash_attention as fake
import pytest
import tiny_data
import tiny_models
import torch
import transformers
import trl
from graph_stand_in import StandIn
from training_runs import SETTINGS, logged, run
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from chronicals_trl import SFTConfig, SFTTrainer
from chronicals_trl import trainer as trainer_module
from chronicals_trl.model import graphs
from chronicals_trl.model import trainer as graphs_trainer
from chronicals_trl.model.graph_layers import decoder_layers
from chronicals_trl.padding_free import PaddingFreeMixin

STEPS = 6
OPTIONS = {"per_device_train_batch_size": 4, "max_steps": STEPS}


def ours(tmp_path: Path, setting: str = "auto", options: Any = None, config: Any = None, **arguments: Any):
    config = {"padding_free": setting, "lora_plus": "off", **(config or {})}
    options = {**OPTIONS, "use_chronicals": True, "chronicals_config": config, **(options or {})}
    trainer_class = arguments.pop("trainer_class", SFTTrainer)
    return run(trainer_class, SFTConfig, tmp_path / "ours", options=options, **arguments)


def theirs(tmp_path: Path, options: Any = None, **arguments: Any):
    return run(trl.SFTTrainer, trl.SFTConfig, tmp_path / "theirs", options={**OPTIONS, **(options or {})}, **arguments)


def note(trainer: Any) -> str:
    (found,) = (each for each in trainer.chronicals_report.notes if each.startswith("padding-free"))
    return found


def batches(trainer: Any) -> list[dict[str, Any]]:
    return list(trainer.get_train_dataloader())


def require_same(mine: tuple[Any, Any], stock: tuple[Any, Any], steps: int = STEPS) -> None:
    (trainer, gradients), (reference, expected) = mine, stock
    assert len(logged(reference, "loss")) == steps
    for key in ("loss", "grad_norm", "entropy", "mean_token_accuracy", "aux_loss"):
        assert logged(trainer, key) == pytest.approx(logged(reference, key), rel=1e-5, abs=1e-6), key
    assert logged(trainer, "num_tokens") == logged(reference, "num_tokens")
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm().clamp_min(1e-6), name
    assert min(logged(trainer, "grad_norm")) > 0


# -- the same training -----------------------------------------------------------------------------------------------

SKIP = {"skip_prepare_dataset": True}


def split_rows() -> Any:
    """Rows with `seq_lengths`, of two documents each: TRL reads them for padding-free batches alone."""
    data = tiny_data.tokenized()
    return data.add_column("seq_lengths", [[3, len(ids) - 3] for ids in data["input_ids"]])


CASES: dict[str, dict[str, Any]] = {
    "text": {},
    "completion_only": {"data": tiny_data.prompt_completion},
    "prompt_completion_whole": {"data": tiny_data.prompt_completion, "options": {"completion_only_loss": False}},
    "assistant_only": {"data": tiny_data.chat, "options": {"assistant_only_loss": True}},
    "tokenized": {"data": tiny_data.tokenized},
    "accumulation": {"options": {"gradient_accumulation_steps": 2}},
    "the last batch has one document": {"data": lambda: tiny_data.text(9)},
    "documents are cut": {"options": {"max_length": 20}},
    "their ends are kept": {"options": {"max_length": 20, "truncation_mode": "keep_end"}},
    "in order": {"options": {"train_sampling_strategy": "sequential"}},
    "padding to multiples": {"options": {"pad_to_multiple_of": 24}},
    "dft": {"options": {"loss_type": "dft"}},
    "label smoothing": {"options": {"label_smoothing_factor": 0.1}},
    "TRL's head": {"config": {"head": "off"}},
    "experts": {"family": "qwen3_moe", "options": {"router_aux_loss_coef": 0.3, "gradient_accumulation_steps": 2}},
    "experts, TRL's head": {
        "family": "qwen3_moe", "options": {"router_aux_loss_coef": 0.3}, "config": {"head": "off"},
    },
    "sliding windows": {"family": "gemma3"},
    "learned positions": {"family": "gpt2", "options": {"padding_free": True, "max_length": None}},
    "checkpointing": {"options": {"gradient_checkpointing": True}},
    "TRL's own setting": {"options": {"padding_free": True, "max_length": None}},
    "rows that are not split": {"data": lambda: split_rows(), "options": {"dataset_kwargs": SKIP, "max_length": None}},
    "rows that TRL splits": {
        "data": lambda: split_rows(), "options": {"dataset_kwargs": SKIP, "max_length": None, "padding_free": True},
    },
    "a packed evaluation beside it": {"options": {"eval_packing": True}},
    "workers": {"options": {"dataloader_num_workers": 2}},  # persistent ones end 5 s late each, torch's own way
    "extra columns": {
        "data": lambda: tiny_data.text().map(lambda row, index: {"score": index}, with_indices=True),
        "options": {"remove_unused_columns": False},
    },
    "tensors": {"data": lambda: tiny_data.tokenized().with_format("torch"), "options": {"dataset_kwargs": SKIP}},
    "clipping": {"options": {"max_grad_norm": 0.01}},
    "compiled": {"options": {"torch_compile": True, "torch_compile_backend": "eager"}},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_same_training(tmp_path: Path, case: str) -> None:
    settings = dict(CASES[case])
    data, options, config = (
        settings.pop("data", tiny_data.text),
        settings.pop("options", {}),
        settings.pop("config", {}),
    )
    if case == "a packed evaluation beside it":
        settings["eval_dataset"] = tiny_data.text(9, seed=4)
    mine = ours(tmp_path, options=options, config=config, data=data(), **settings)
    require_same(mine, theirs(tmp_path, options=options, data=data(), **settings))
    assert note(mine[0]).startswith("padding-free: the documents of a batch are one row")
    batch = batches(mine[0])[0]
    assert batch["input_ids"].shape[0] == 1 and "attention_mask" not in batch and "num_real_tokens" in batch
    multiple = options.get("pad_to_multiple_of", 8)
    assert all(each["input_ids"].shape[1] % multiple == 0 for each in batches(mine[0]))
    assert mine[0].chronicals_report["head"].state == ("off" if config or case == "label smoothing" else "on")


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_side_of_the_padding(tmp_path: Path, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = copy.deepcopy(tiny_data.tokenizer())
    tokenizer.padding_side = side
    monkeypatch.setattr(tiny_data, "tokenizer", lambda: tokenizer)
    require_same(ours(tmp_path), theirs(tmp_path))


def test_lora(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def lora() -> Any:
        return peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=True)

    (mine, gradients), (stock, expected) = (
        ours(tmp_path, peft_config=lora()), theirs(tmp_path, peft_config=lora()),
    )  # fmt: skip
    trained = [name for name in expected if "lora_B" in name]  # B is 0 at first, so that A has no gradient
    require_same(
        (mine, {name: gradients[name] for name in trained}), (stock, {name: expected[name] for name in trained})
    )


@pytest.mark.parametrize("max_length", [96, 4000])
def test_a_stream(tmp_path: Path, recorder: StandIn, max_length: int) -> None:
    """Of which a limit is known, if not how far below it the documents are."""
    options = {"max_length": max_length}
    mine = ours(tmp_path, data=tiny_data.text().to_iterable_dataset(), options=options)
    stock = theirs(tmp_path, data=tiny_data.text().to_iterable_dataset(), options=options)
    require_same(mine, stock)
    assert f"rows of few lengths, of {4 * max_length:,} tokens at most" in note(mine[0])
    rows, padded = (
        [batch["input_ids"].numel() for batch in batches(trainer)] for trainer in (mine[0], stock[0])
    )  # fmt: skip
    assert all(row < max(padded[: index + 1]) + 8 for index, row in enumerate(rows)) and sum(rows) < sum(padded)


def test_documents_in_order_of_their_length(tmp_path: Path, recorder: StandIn) -> None:
    """Rows are fitted to the batches as they will come; if those have no padding to speak of, they stay."""
    options = {"train_sampling_strategy": "sequential"}
    data = tiny_data.text(120)
    mine, _ = ours(tmp_path, options=options, data=data)
    lengths = {batch["input_ids"].shape[1] for batch in batches(mine)}
    told = next(int(word) for word in note(mine).split() if word.isdigit())
    assert len(lengths) == told <= graphs.MAX_GRAPHS
    order = sorted(range(len(data)), key=lambda row: len(data[row]["text"]))
    options |= {"per_device_train_batch_size": 2}
    alike, _ = ours(tmp_path, options={**options, "max_steps": 1}, data=data.select(order))
    assert "its documents are of like length: about 9" in note(alike) and "attention_mask" in batches(alike)[0]
    mine = ours(tmp_path, "on", options=options, data=data.select(order))
    require_same(mine, theirs(tmp_path, options=options, data=data.select(order)))


def test_on_insists_where_nothing_is_won(tmp_path: Path) -> None:
    options = {"per_device_train_batch_size": 1}
    mine = ours(tmp_path, "on", options=options)
    require_same(mine, theirs(tmp_path, options=options))
    assert batches(mine[0])[0]["cu_seq_lens_q"].shape == (3,)


@pytest.mark.parametrize("metrics", [False, True])
def test_evaluation_is_trls(tmp_path: Path, metrics: bool) -> None:
    """Its collator and its figures, in the middle of training too; `compute_metrics` gets logits row by row."""
    options = {"eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 4}

    def accuracy(prediction: Any) -> dict[str, float]:
        right = prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]
        return {"rows": len(right), "accuracy": right[prediction.label_ids[:, 1:] != -100].mean()}

    arguments: dict[str, Any] = {"compute_metrics": accuracy} if metrics else {}
    (mine, _), (stock, _) = (
        each(tmp_path, options=options, eval_dataset=tiny_data.text(9, seed=4), **arguments) for each in (ours, theirs)
    )
    assert note(mine).startswith("padding-free: the documents")
    keys = ["eval_loss", "eval_entropy", "eval_mean_token_accuracy"] + ["eval_rows", "eval_accuracy"] * metrics
    for key in keys:
        assert logged(mine, key) == pytest.approx(logged(stock, key), rel=1e-5) and len(logged(mine, key)) == 2
    assert logged(mine, "loss") == pytest.approx(logged(stock, "loss"), rel=1e-5)
    assert type(mine.data_collator) is DataCollatorForLanguageModeling
    assert next(iter(mine.get_eval_dataloader()))["input_ids"].shape[0] == 4


@pytest.mark.parametrize("before", ["off", "auto"])
def test_a_run_that_is_resumed(tmp_path: Path, before: str) -> None:
    """In the middle of an epoch, from a checkpoint of padded batches too."""
    options = {"save_strategy": "steps", "save_steps": 7, "num_train_epochs": 2, "max_steps": -1}
    whole, _ = ours(tmp_path / "before", before, options=options)
    resumed, _ = ours(tmp_path, options=options)
    losses = logged(resumed, "loss")
    resumed.train(resume_from_checkpoint=str(tmp_path / "before" / "ours" / "out" / "checkpoint-7"))
    assert len(losses) == 20 and logged(resumed, "loss") == pytest.approx(losses, rel=1e-5)
    assert logged(whole, "loss") == pytest.approx(losses, rel=1e-5)


def test_the_same_documents_in_few_lengths(tmp_path: Path, recorder: StandIn) -> None:
    """Batch by batch those of TRL's padded run, over a hundred of them."""
    (mine, _), (stock, _) = ours(tmp_path), theirs(tmp_path)
    lengths, offsets = set(), set()
    seen = 0
    for seed in range(10):
        torch.manual_seed(seed)
        unpadded = batches(mine)
        torch.manual_seed(seed)
        for batch, padded in zip(unpadded, batches(stock), strict=True):
            real = batch["num_real_tokens"]
            documents = [
                row[mask.bool()] for row, mask in zip(padded["input_ids"], padded["attention_mask"], strict=True)
            ]
            assert torch.equal(batch["input_ids"][0, :real], torch.cat(documents))
            lengths.add(batch["input_ids"].shape[1])
            offsets.add((batch["cu_seq_lens_q"].shape, batch["max_length_q"]))
            seen += 1
    assert seen == 100 and 1 < len(lengths) <= graphs.MAX_GRAPHS
    assert len({shape for shape, _ in offsets}) == 1


def test_a_varlen_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.install(monkeypatch)
    mine = ours(tmp_path, config={"attention_backend": "flash_attn_4"})
    assert mine[0].chronicals_report["attention"].backend == "flash_attn_4"
    assert fake.CALLS["backward"] >= STEPS * 2
    assert not any(each.startswith("attention") for each in mine[0].chronicals_report.notes)
    require_same(mine, theirs(tmp_path))


# -- graphs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["auto", "on"])
def test_graphs_capture_the_rows(
    tmp_path: Path, setting: str, recorder: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    # By the estimate for padded rows these would be too large to pad any further. Filled up they are by less.
    monkeypatch.setattr(graphs_trainer, "HOST_SECONDS_PER_LAYER", 0.0)
    options = {"max_steps": 30}
    mine = ours(tmp_path, setting, options=options, data=tiny_data.text(120))
    assert recorder.replayed > 30 and mine[0].chronicals_report["cuda_graphs"].state == "on"
    assert not any("multiples of" in each for each in mine[0].chronicals_report.notes)
    require_same(mine, theirs(tmp_path, options=options, data=tiny_data.text(120)), steps=30)
    assert "rows of 8 lengths" in note(mine[0]) and "of them real (padded, " in note(mine[0])


def test_rows_that_keep_the_gpu_busy_are_not_filled_up(
    tmp_path: Path, recorder: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs_trainer, "FLOP_RATE", 1.0)
    mine, _ = ours(tmp_path)
    assert "filling them up to a few lengths would cost more" in mine.chronicals_report["cuda_graphs"].reason
    assert "rows are as long as their documents" in note(mine) and not recorder.recorded
    mine, _ = ours(tmp_path, config={"cuda_graphs": "on"})
    assert "rows of 8 lengths" in note(mine)
    layers = decoder_layers(mine.model)
    weights = sum(p.numel() for p in layers[0].parameters())
    lengths = [len(ids) for ids in mine.train_dataset["input_ids"]]
    usual = 4 * sum(lengths) / len(lengths)  # tokens of a batch, not those that there may be
    assert mine._seconds_per_layer(mine._usual_batch()) == pytest.approx(6 * weights * usual, rel=0.03)


def test_without_graphs_rows_are_as_long_as_their_documents(tmp_path: Path, recorder: StandIn) -> None:
    """Nothing would be won by lengths that recur."""
    mine, _ = ours(tmp_path, config={"cuda_graphs": "off"}, data=tiny_data.text(120))
    assert "rows are as long as their documents, up to a multiple of 8 tokens (padded, about " in note(mine)
    rows = batches(mine)
    assert all(0 <= row["input_ids"].shape[1] - row["num_real_tokens"] < 8 for row in rows)
    assert len({row["input_ids"].shape[1] for row in rows}) > graphs.MAX_GRAPHS
    own, _ = ours(tmp_path, options={"padding_free": True, "max_length": None})
    assert "real" in note(own) and "(padded" not in note(own)


# -- refused ---------------------------------------------------------------------------------------------------------


class OwnCollator(DataCollatorForLanguageModeling):
    pass


class OwnLoss(SFTTrainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs)


class OwnLoader(SFTTrainer):
    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        return super()._get_dataloader(*args, **kwargs)


def token_loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    flat = torch.nn.functional.cross_entropy(
        outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )
    return flat / num_items_in_batch


def stream() -> Any:
    return tiny_data.text().to_iterable_dataset()


def layers_of_another_kind() -> Any:
    model = tiny_models.build("llama")
    model.config.layer_types = ["linear_attention", "full_attention"]
    return model


SMALL = {"vocab_size": tiny_models.VOCAB_SIZE, "hidden_size": 32, "pad_token_id": 2}


def state_space() -> Any:
    config = transformers.MambaConfig(num_hidden_layers=2, state_size=8, **SMALL)
    return transformers.MambaForCausalLM(config)


def biases_by_the_mask() -> Any:
    """ALiBi: the distance is counted in the mask, and there is none in a row."""
    config = transformers.BloomConfig(n_layer=2, n_head=4, hidden_dropout=0.0, attention_dropout=0.0, **SMALL)
    return transformers.BloomForCausalLM(config)


class NeedsAMask(transformers.LlamaForCausalLM):
    """As a user's own model may."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        assert attention_mask.shape == input_ids.shape, "not what the mask is for"
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


def needs_a_mask() -> Any:
    model = tiny_models.build("llama")
    model.__class__ = NeedsAMask
    return model


class OwnCount(SFTTrainer):
    def _get_num_items_in_batch(self, batches: Any, device: Any) -> Any:
        return super()._get_num_items_in_batch(batches, device)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "collator": ({"data_collator": OwnCollator(pad_token_id=2)}, "those of OwnCollator, not of TRL's collator"),
    "compute_loss": ({"trainer_class": OwnLoss}, "OwnLoss overrides compute_loss"),
    "dataloader": ({"trainer_class": OwnLoader}, "OwnLoader overrides _get_dataloader"),
    "count": ({"trainer_class": OwnCount}, "OwnCount overrides _get_num_items_in_batch"),
    "tokens seen": (
        {"options": {"include_num_input_tokens_seen": "non_padding"}}, "counts by the mask of padded rows",
    ),
    "compute_loss_func": ({"compute_loss_func": token_loss}, "compute_loss_func may count"),
    "neftune": ({"options": {"neftune_noise_alpha": 5.0}}, "NEFTune's noise depends on the length"),
    "dispatch": ({"options": {"accelerator_config": {"dispatch_batches": True}}}, "dispatch_batches=True cuts"),
    "first tokens": ({"family": "gpt2"}, "counts each document's first token as a label"),
    "no limit": ({"options": {"max_length": None}, "data": stream}, "set max_length"),
    "layers": ({"model": layers_of_another_kind}, "layers (linear_attention) that go by a row"),
    "state space": ({"model": state_space}, "layers (linear_attention) that go by a row"),
    "biases": ({"model": biases_by_the_mask}, "documents of a row attend to each other (logits change by"),
    "mask": ({"model": needs_a_mask}, "could not be tried on it (AttributeError: 'NoneType' object has no"),
}  # fmt: skip


def refused(case: str) -> tuple[dict[str, Any], str]:
    arguments, reason = REFUSED[case]
    made = {name: arguments[name]() for name in ("model", "data") if name in arguments}
    return {**arguments, **made}, reason


@pytest.mark.parametrize("case", REFUSED)
def test_batches_stay_padded_where_the_result_could_differ(tmp_path: Path, case: str) -> None:
    arguments, reason = refused(case)
    trainer, _ = ours(tmp_path, options={"max_steps": 1, **arguments.pop("options", {})}, **arguments)
    assert note(trainer).startswith("padding-free: off, batches stay as they are: ") and reason in note(trainer)
    batch = batches(trainer)[0]
    assert batch["input_ids"].shape[0] == 4 and "attention_mask" in batch and "position_ids" not in batch
    arguments, _ = refused(case)
    with pytest.raises(
        ValueError, match=r"padding_free='on' in chronicals_config, but .*Set padding_free='auto'"
    ) as e:
        ours(tmp_path, "on", **arguments)
    assert reason in str(e.value)


@pytest.mark.parametrize("options", [{}, {"eval_packing": True}])
def test_a_collator_that_is_set_later_makes_the_batches(tmp_path: Path, options: dict[str, Any]) -> None:
    trainer, _ = ours(tmp_path, options={"max_steps": 1, **options}, eval_dataset=tiny_data.text(9))
    assert batches(trainer)[0]["input_ids"].shape[0] == 1
    trainer.data_collator = OwnCollator(pad_token_id=2)
    assert batches(trainer)[0]["input_ids"].shape[0] == 4
    assert batches(trainer)[0]["input_ids"].shape[0] == 4
    told = [each for each in trainer.chronicals_report.notes if "data_collator was replaced (by OwnCollator)" in each]
    assert len(told) == 1 and told[0] in (tmp_path / "ours" / "out" / "chronicals_report.json").read_text()


def test_a_model_that_leaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_module, "verify_isolation", lambda model, device: "logits change by 0.2 when packed")
    mine = ours(tmp_path)
    assert "documents of a row attend to each other (logits change by 0.2" in note(mine[0])
    require_same(mine, theirs(tmp_path))
    with pytest.raises(ValueError, match="attend to each other"):
        ours(tmp_path, "on")


def test_prompt_learning(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    trainer, _ = ours(tmp_path, peft_config=config)
    assert "PromptTuningConfig puts its virtual tokens before each row" in note(trainer)


def test_an_activated_lora(tmp_path: Path) -> None:
    """Which PEFT begins behind the last invocation in a row, whatever documents the row has."""
    peft = pytest.importorskip("peft")
    words = tiny_data.tokenizer()(tiny_data.text()[0]["text"])["input_ids"][:2]
    arguments = {
        "options": {"per_device_train_batch_size": 4, "max_steps": 2},
        "config": {"lora": "off"},
    }
    config = peft.LoraConfig(
        r=4, target_modules="all-linear", task_type="CAUSAL_LM", alora_invocation_tokens=words, init_lora_weights=False
    )
    mine, _ = ours(tmp_path, peft_config=config, **arguments)
    assert "an activated LoRA (alora_invocation_tokens) begins at one place in each row" in note(mine)


def test_several_gpus_in_one_process(tmp_path: Path) -> None:
    trainer, _ = ours(tmp_path, options={"max_steps": 1})
    assert trainer._padding_free_ruled_out() is None
    trainer.args._n_gpu = 2
    assert trainer._padding_free_ruled_out() == "several GPUs in one process get a share of each batch's rows"


def test_a_multimodal_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose text is one of several things in a row."""
    model = tiny_models.build("llama")
    text = copy.copy(model.config)
    monkeypatch.setattr(type(model.config), "get_text_config", lambda self, *args, **kwargs: text)
    assert PaddingFreeMixin._model_in_the_way(SimpleNamespace(model=model)) == "the model is multimodal"


def test_a_mask_of_a_long_row_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    longest = sorted(len(ids) for ids in tiny_data.tokenized()["input_ids"])[-4:]
    for limit in (sum(longest) - 8, sum(longest) + 8):
        monkeypatch.setattr("chronicals_trl.padding_free.LONGEST_DENSE_ROW", limit)
        trainer, _ = ours(tmp_path, options={"max_steps": 1}, data=tiny_data.tokenized())
        assert ("on a CPU its attention would need a mask of" in note(trainer)) == (limit < sum(longest))


def test_partitioned_weights_cannot_be_tried(tmp_path: Path) -> None:
    """Under ZeRO-3 no rank has a weight before the first step."""

    def partitioned() -> Any:
        model = tiny_models.build("llama")
        for parameter in model.parameters():
            parameter.ds_shape = parameter.shape
        return model

    trainer, _ = ours(tmp_path, model=partitioned())
    assert "the weights are partitioned (ZeRO-3)" in note(trainer) and "attention_mask" in batches(trainer)[0]
    require_same(ours(tmp_path, "on", model=partitioned()), theirs(tmp_path))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"per_device_train_batch_size": 1}, "a batch of one document has no padding"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy='group_by_length' puts"),
    ],
)
def test_auto_leaves_out_what_wins_nothing(tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    trainer, _ = ours(tmp_path, options={"max_steps": 1, **options})
    assert reason in note(trainer) and "attention_mask" in batches(trainer)[0]


def test_a_dense_mask_is_not_for_auto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chronicals_trl.padding_free.dense_mask", lambda model, device, half: f"dense, half={half}")
    trainer, _ = ours(tmp_path, options={"max_steps": 1})
    assert note(trainer).endswith("dense, half=False")
    trainer, _ = ours(tmp_path, options={"max_steps": 1, "bf16": True})
    assert note(trainer).endswith("dense, half=True")
    trainer, _ = ours(tmp_path, "on", options={"max_steps": 1})
    assert note(trainer).startswith("padding-free: the documents")


@pytest.mark.parametrize(("setting", "options"), [("off", {}), ("auto", {"packing": True}), ("on", {"packing": True})])
def test_nothing_is_said_where_nothing_is_padded_or_asked(
    tmp_path: Path, setting: str, options: dict[str, Any]
) -> None:
    trainer, _ = ours(tmp_path, setting, options={"max_steps": 1, **options})
    assert not any(each.startswith("padding-free") for each in trainer.chronicals_report.notes)
    assert ("attention_mask" in batches(trainer)[0]) == (setting == "off")


def test_it_is_on_where_it_can_be(tmp_path: Path) -> None:
    mine = run(
        SFTTrainer, SFTConfig, tmp_path / "ours", options={**OPTIONS, "use_chronicals": True}, data=tiny_data.text()
    )
    assert note(mine[0]).startswith("padding-free: the documents of a batch are one row")
    assert "attention_mask" not in batches(mine[0])[0]
    require_same(mine, theirs(tmp_path))


def test_a_flag_that_is_off_leaves_batches_as_they_are(tmp_path: Path) -> None:
    trainer, _ = run(SFTTrainer, SFTConfig, tmp_path, options={**OPTIONS, "max_steps": 1})
    assert "attention_mask" in batches(trainer)[0]


def test_the_report_is_written_with_the_note(tmp_path: Path) -> None:
    trainer, _ = ours(tmp_path, options={"max_steps": 1})
    written = json.loads((tmp_path / "ours" / "out" / "chronicals_report.json").read_text())
    assert note(trainer) in written["notes"]
    assert SETTINGS["max_length"] == 96 and "real" in note(trainer)
