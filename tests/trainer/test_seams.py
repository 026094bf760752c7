"""What the trainer does between TRL's own steps: rates in the logs, the order of rows, what the meter measures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_data
import tiny_models
import torch
import trl
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import RandomSampler
from training_runs import SETTINGS, logged
from transformers import TrainerCallback

from chronicals_trl import ChronicalsConfig, SFTConfig, SFTTrainer, _inputs, _start
from chronicals_trl.packing import BalancedSampler, pack_dataset
from chronicals_trl.packing.arrays import ArrayRows
from chronicals_trl.packing.balance import attention_costs


def make(tmp_path: Path, *, data=None, model=None, trainer_class: type = SFTTrainer, peft_config=None, **options):
    evaluation = options.pop("eval_dataset", None)
    return trainer_class(
        model=tiny_models.build("llama") if model is None else model,
        args=SFTConfig(**{**SETTINGS, "output_dir": str(tmp_path / "out"), "use_chronicals": True, **options}),
        train_dataset=tiny_data.text() if data is None else data,
        eval_dataset=evaluation,
        processing_class=tiny_data.tokenizer(),
        peft_config=peft_config,
    )


# -- LoRA+ -----------------------------------------------------------------------------------------------------------


class Rates(TrainerCallback):
    """The rate of each named parameter in each optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        self.steps.append({n: rates[id(p)] for n, p in model.named_parameters() if id(p) in rates})


@pytest.mark.parametrize("frozen", [None, "lora_A"])
def test_logged_rates_are_those_of_the_step(tmp_path: Path, frozen: str | None) -> None:
    """Also with A frozen, where B's group is the first and the rate that Trainer logs is already B's."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_models.build("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        if frozen is not None and frozen in name:
            parameter.requires_grad = False
    trainer = make(tmp_path, model=model, warmup_steps=2, chronicals_config={"lora_plus_ratio": 8.0})
    rates = Rates()
    trainer.add_callback(rates)
    trainer.train()
    (b_name,) = {n for n in rates.steps[0] if "layers.0" in n and "lora_B" in n}
    b = [step[b_name] for step in rates.steps]
    assert logged(trainer, "learning_rate_lora_b") == pytest.approx(b)
    assert max(b) == pytest.approx(8 * SETTINGS["learning_rate"]) and len(set(b)) > 2
    expected = b if frozen else [step[b_name.replace("lora_B", "lora_A")] for step in rates.steps]
    assert logged(trainer, "learning_rate") == pytest.approx(expected)


def test_groups_are_split_once(tmp_path: Path) -> None:
    """`create_optimizer` is called again where an optimizer exists; its B matrices must not get the ratio squared."""
    peft = pytest.importorskip("peft")
    trainer = make(tmp_path, peft_config=peft.LoraConfig(r=2, target_modules=["q_proj"]))
    trainer.create_optimizer()
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    trainer.create_optimizer()
    assert [group["lr"] for group in trainer.optimizer.param_groups] == rates
    assert max(rates) == pytest.approx(16 * SETTINGS["learning_rate"])
    assert trainer.chronicals_report["lora_plus"].state == "on"


@pytest.mark.parametrize("section", ["optimizer", "scheduler"])
def test_a_deepspeed_section_that_undoes_lora_plus_is_refused(tmp_path: Path, section: str) -> None:
    peft = pytest.importorskip("peft")
    trainer = make(tmp_path, peft_config=peft.LoraConfig(r=2, target_modules=["q_proj"]))
    trainer.args.hf_deepspeed_config = SimpleNamespace(config={section: {}})
    with pytest.raises(ValueError, match=f"own '{section}'"):
        _inputs.lora_plus_part(trainer, ChronicalsConfig())


# -- packing ---------------------------------------------------------------------------------------------------------


def test_rows_are_shuffled_as_trl_does_before_and_after_packing(tmp_path: Path) -> None:
    """Once each: documents of equal length change places in the plan, and the rows change places after it."""
    trainer = make(tmp_path, packing=True, shuffle_dataset=True, seed=7)
    packed, _ = pack_dataset(tiny_data.tokenized().shuffle(seed=7), SETTINGS["max_length"])
    assert list(trainer.train_dataset["input_ids"]) == list(packed.shuffle(seed=7)["input_ids"])
    plain = make(tmp_path, packing=True, seed=7)
    assert set(map(tuple, plain.train_dataset["input_ids"])) != set(map(tuple, trainer.train_dataset["input_ids"]))


def test_packed_rows_reach_the_collator_as_arrays(tmp_path: Path) -> None:
    """And give the batches that lists give; a format of the user's own stays."""
    made = make(tmp_path, packing=True, eval_packing=True, eval_dataset=tiny_data.text(), bf16=False)
    loader = made.get_train_dataloader()
    assert loader.dataset.format["type"] == made.get_eval_dataloader().dataset.format["type"] == "numpy"
    assert type(loader.dataset) is ArrayRows
    assert made.train_dataset.format["type"] is None
    collate = made.data_collator
    batches = list(made.get_eval_dataloader())
    expected = collate(made.eval_dataset.to_list())
    for name in ("input_ids", "labels", "position_ids"):
        assert batches[0][name].dtype == torch.int64
        assert torch.equal(torch.cat([batch[name] for batch in batches], 1), expected[name])
    made.train_dataset = made.train_dataset.with_format("torch")
    assert made.get_train_dataloader().dataset.format["type"] == "torch"
    # Rows that are not packed, and collators of other kinds, know nothing of it.
    plain = make(tmp_path, packing=False)
    assert plain.get_train_dataloader().dataset.format["type"] is None
    made.train_dataset = made.train_dataset.with_format(None)
    made.data_collator = lambda rows: collate(rows)
    assert made.get_train_dataloader().dataset.format["type"] is None


def test_one_rank_keeps_the_stock_order(tmp_path: Path) -> None:
    trainer = make(tmp_path, packing=True, gradient_accumulation_steps=2)
    stock = SeedableRandomSampler(
        trainer.train_dataset, generator=torch.Generator(), data_seed=trainer.args.data_seed or trainer.args.seed
    )
    loader = trainer.get_train_dataloader()
    for epoch in (0, 1):
        stock.set_epoch(epoch)
        loader.set_epoch(epoch)
        assert list(loader.batch_sampler.sampler) == list(stock)
    assert not any(note.startswith("balance") for note in trainer.chronicals_report.notes)


def test_the_sampler_of_several_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SFTTrainer, "_data_ranks", lambda self: 2)
    settings = {"packing": True, "gradient_accumulation_steps": 3, "seed": 5}
    trainer = make(tmp_path, **settings)
    sampler = trainer._get_train_sampler()
    assert isinstance(sampler, BalancedSampler)
    assert (sampler.ranks, sampler.batch_size, sampler.accumulation, sampler.seed) == (2, 2, 3, 5)
    assert sampler.costs.tolist() == attention_costs(trainer.train_dataset, 96).tolist()
    assert any(note == f"balance: {sampler.describe()}" for note in trainer.chronicals_report.notes)
    assert make(tmp_path, **settings, data_seed=8)._get_train_sampler().seed == 8
    # A dataset that is handed over counts, not the trainer's own.
    assert len(trainer._get_train_sampler(trainer.train_dataset.select(range(4)))) == 4

    off = make(tmp_path, **settings, chronicals_config={"balance_ranks": False})
    shuffled = off._get_train_sampler()
    assert list(shuffled) == shuffled.shuffled(0).tolist()
    # Nothing is dealt, and nothing said, where the training set is not packed, or by TRL.
    for unpacked in ({"eval_packing": True, "packing": False}, {"chronicals_config": {"packing": "off"}}):
        other = make(tmp_path, **{**settings, **unpacked}, eval_dataset=tiny_data.text())
        assert type(other._get_train_sampler()) is RandomSampler
        assert not any(note.startswith("balance") for note in other.chronicals_report.notes)


class OwnLoader(SFTTrainer):
    def get_train_dataloader(self):
        return super().get_train_dataloader()


def test_a_loader_of_the_users_own_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SFTTrainer, "_data_ranks", lambda self: 2)
    trainer = make(tmp_path, packing=True, trainer_class=OwnLoader)
    assert "balance: off, OwnLoader overrides get_train_dataloader" in trainer.chronicals_report.notes
    assert type(trainer._get_train_sampler()) is RandomSampler
    assert isinstance(make(tmp_path, packing=True)._get_train_sampler(), BalancedSampler)
    swapped = make(tmp_path, packing=True)
    swapped.train_dataset = swapped.train_dataset.remove_columns("seq_lengths")
    assert type(swapped._get_train_sampler()) is RandomSampler


@pytest.mark.parametrize(("sizes", "ranks"), [(None, 8), ((1, 1), 8), ((2, 1), 4), ((2, 2), 2)])
def test_ranks_of_one_group_share_their_rows(sizes: tuple[int, int] | None, ranks: int) -> None:
    parallelism = None if sizes is None else SimpleNamespace(tp_size=sizes[0], cp_size=sizes[1])
    accelerator = SimpleNamespace(num_processes=8, parallelism_config=parallelism)
    assert SFTTrainer._data_ranks(SimpleNamespace(accelerator=accelerator)) == ranks


@pytest.mark.parametrize(
    ("device", "pinned", "non_blocking", "note"),
    [
        ("cpu", True, True, None),
        ("cuda", True, True, "copies to the GPU: pinned and non-blocking"),
        ("cuda", True, False, "copies to the GPU: each waits for the GPU (accelerator_config's non_blocking=False)"),
        ("cuda", False, True, "copies to the GPU: each waits for the GPU (dataloader_pin_memory=False)"),
    ],
)
def test_the_report_says_how_batches_are_copied(device: str, pinned: bool, non_blocking: bool, note: str) -> None:
    args = SimpleNamespace(
        device=torch.device(device),
        dataloader_pin_memory=pinned,
        accelerator_config=SimpleNamespace(non_blocking=non_blocking),
    )
    assert _inputs.copies_note(args) == note


def test_the_report_says_that_processes_do_not_know_of_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chronicals_trl.trainer.lone_note", lambda ranks: f"alone with {ranks}")
    options = {**SETTINGS, "use_chronicals": True, "output_dir": str(tmp_path)}
    trainer = SFTTrainer(
        model=tiny_models.build("llama"),
        args=SFTConfig(**options),
        train_dataset=tiny_data.text(8),
        processing_class=tiny_data.tokenizer(),
    )
    assert "alone with 1" in trainer.chronicals_report.notes


@pytest.mark.parametrize("layer_types", [None, ["linear_attention", "full_attention"]])
def test_hybrid_models_get_exact_cu_seqlens(tmp_path: Path, layer_types: list[str] | None) -> None:
    """An empty document would reset the state of a linear-attention layer, or be an error to its kernel."""
    model = tiny_models.build("llama")
    if layer_types is not None:
        model.config.layer_types = layer_types  # which Llama's own code does not read
    trainer = make(tmp_path, model=model, packing=True)
    row = trainer.train_dataset[0]
    offsets = trainer.data_collator([row])["cu_seq_lens_q"]
    if layer_types is None:
        assert len(offsets) % 32 == 0
    else:
        assert len(offsets) < 32 and (offsets.diff() > 0).all()


def test_rows_of_the_users_own_are_not_packed(tmp_path: Path) -> None:
    """skip_prepare_dataset: the rows and TRL's collator are used as they are, and the report says so."""
    rows, _ = pack_dataset(tiny_data.tokenized(), SETTINGS["max_length"])
    trainer = make(tmp_path, data=rows, packing=True, dataset_kwargs={"skip_prepare_dataset": True}, max_steps=1)
    part = trainer.chronicals_report["packing"]
    assert part.state == "off" and part.omitted and "skip_prepare_dataset" in part.reason
    assert isinstance(trainer.data_collator, trl.trainer.sft_trainer.DataCollatorForLanguageModeling)
    trainer.train()
    assert logged(trainer, "loss")[0] > 0


@pytest.mark.parametrize(("max_length", "message"), [(None, "packing=True needs max_length"), (1, "fewer than 2")])
def test_packing_for_evaluation_alone_needs_a_max_length(tmp_path: Path, max_length: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(tmp_path, eval_packing=True, eval_dataset=tiny_data.text(4), max_length=max_length)


# -- the report ------------------------------------------------------------------------------------------------------


def test_strict_counts_what_the_trainer_itself_leaves_out(tmp_path: Path) -> None:
    """patch_model cannot know of packing: its own check of `strict` has passed by then."""
    with pytest.raises(RuntimeError, match="packing is off"):
        make(tmp_path, packing=True, packing_strategy="wrapped", chronicals_config={"strict": True})


@pytest.mark.parametrize("kind", ["tp", "cp", "sp"])
def test_model_parts_are_off_under_unverified_parallelism(tmp_path: Path, kind: str) -> None:
    trainer = make(tmp_path)
    enabled = {f"{name}_enabled": name == kind for name in ("tp", "cp", "sp")}
    trainer.accelerator = SimpleNamespace(parallelism_config=SimpleNamespace(**enabled))
    left_out = _inputs.conflicts(trainer, SFTTrainer)
    assert left_out.keys() == {"rms_norm", "gated_mlp", "qk_rope", "attention", "head", "lora"}
    assert all(reason.startswith(f"{kind}_size > 1") for reason in left_out.values())


@pytest.mark.parametrize("setting", ["packing", "eval_packing"])
def test_packed_rows_are_refused_where_sequence_parallelism_would_cut_them(tmp_path: Path, setting: str) -> None:
    trainer = make(tmp_path)
    for sizes, packs, refused in (((2, True), True, True), ((1, False), True, False), ((2, True), False, False)):
        trainer.args.packing = trainer.args.eval_packing = False
        setattr(trainer.args, setting, packs)
        parallelism = SimpleNamespace(sp_size=sizes[0], sp_enabled=sizes[1])
        trainer.accelerator = SimpleNamespace(parallelism_config=parallelism)
        if refused:
            with pytest.raises(ValueError, match=f"{setting}=True with sp_size=2.* Set {setting}=False, or sp_size=1"):
                _start.refuse_shared_rows(trainer)
        else:
            _start.refuse_shared_rows(trainer)


def test_label_smoothing_takes_the_head_from_nll_alone(tmp_path: Path) -> None:
    """TRL smooths no DFT loss, so the head can serve it."""
    for loss_type, state in (("nll", "off"), ("dft", "on")):
        trainer = make(tmp_path, loss_type=loss_type, label_smoothing_factor=0.1)
        assert trainer.chronicals_report["head"].state == state


# -- the meter -------------------------------------------------------------------------------------------------------


def test_evaluation_and_saving_are_not_measured(tmp_path: Path) -> None:
    paused: dict[str, set[bool]] = {"train": set(), "eval": set(), "save": set()}

    class Watched(SFTTrainer):
        def training_step(self, *args, **kwargs):
            paused["train"].add(bool(self._meter._paused))
            return super().training_step(*args, **kwargs)

        def prediction_step(self, *args, **kwargs):
            paused["eval"].add(bool(self._meter._paused))
            return super().prediction_step(*args, **kwargs)

        def save_model(self, *args, **kwargs):
            paused["save"].add(bool(self._meter._paused))
            return super().save_model(*args, **kwargs)

    trainer = make(
        tmp_path, trainer_class=Watched, eval_dataset=tiny_data.text(4), eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, max_steps=2,
    )  # fmt: skip
    trainer.train()
    assert paused == {"train": {False}, "eval": {True}, "save": {True}}


def test_what_came_before_the_first_step_is_not_measured(tmp_path: Path) -> None:
    trainer = make(tmp_path, max_steps=1)
    trainer._meter.update(torch.tensor(10**9), 1)
    trainer.train()
    assert 0 < logged(trainer, "packing_fill")[0] <= 1


def test_padding_of_packed_rows_is_no_token_and_each_pass_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(tmp_path, max_steps=2, packing=True, gradient_accumulation_steps=2)
    looks, real, slots = list[int](), list[int](), list[int]()
    monkeypatch.setattr(trainer._meter, "look", lambda *, step: looks.append(step))
    collate = trainer.data_collator

    def collating(rows):
        batch = collate(rows)
        real.append(batch["num_real_tokens"])
        slots.append(batch["input_ids"].numel())
        return batch

    trainer.data_collator = collating
    trainer.train()
    assert logged(trainer, "num_tokens")[-1] == sum(real[:4]) < sum(slots[:4])
    assert logged(trainer, "packing_fill")[0] == pytest.approx(sum(real[:2]) / sum(slots[:2]))
    assert looks == [0] * 4 + [1] * 4  # before and behind each pass


def test_the_rate_is_that_of_all_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the tokens are those of all ranks."""
    from types import SimpleNamespace

    from chronicals_trl.config import ChronicalsConfig
    from chronicals_trl.observe.trainer import ThroughputMixin

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    for ranks, gpus, expected in ((1, 1, 989e12), (4, 1, 4 * 989e12), (1, 2, 2 * 989e12)):
        args = SimpleNamespace(device=torch.device("cuda"), world_size=ranks, n_gpu=gpus)
        trainer = SimpleNamespace(args=args, model=tiny_models.build("llama"), _chronicals=ChronicalsConfig())
        ThroughputMixin._start_meter(trainer)  # type: ignore[arg-type]
        assert trainer._meter.flop_rate == expected


@pytest.mark.parametrize("packing", [True, False])
def test_utilisation_goes_by_the_documents_of_a_step(tmp_path: Path, packing: bool) -> None:
    trainer = make(tmp_path, max_steps=3, packing=packing)
    trainer._meter.flop_rate = 1e9
    flops = trainer._meter.flops
    squares: list[int] = []
    collate = trainer.data_collator

    def collating(rows):
        batch = collate(rows)
        lengths = batch["cu_seq_lens_q"].diff() if packing else batch["attention_mask"].sum(-1)
        squares.append(int(lengths.long().square().sum()))
        return batch

    trainer.data_collator = collating
    trainer.train()
    tokens = [0.0, *logged(trainer, "num_tokens")]
    for step, (mfu, rate) in enumerate(zip(logged(trainer, "mfu"), logged(trainer, "tokens_per_second"), strict=True)):
        per_token = flops.per_token + flops.per_square * squares[step] / (tokens[step + 1] - tokens[step])
        assert mfu == pytest.approx(rate * per_token / 1e9)
    assert len(logged(trainer, "mfu")) == 3 and squares[0] > 0


def test_a_bin_of_many_short_documents_does_not_lengthen_every_batch() -> None:
    from chronicals_trl.packing.planning import PackStats
    from chronicals_trl.packing.trainer import _usual_docs_per_bin

    stats = PackStats(capacity=8192, strategy="bfd", documents=510, bins=100, max_docs_per_bin=300)
    assert _usual_docs_per_bin(stats) == 6 + 16
    assert _usual_docs_per_bin(replace(stats, max_docs_per_bin=9)) == 9
    assert _usual_docs_per_bin(PackStats(capacity=8192, strategy="bfd", window=100)) is None
