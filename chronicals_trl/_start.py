"""How a trainer starts: what it was given is read and looked at, and held against what the other ranks were given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chronicals_trl import _data_sets, _inputs
from chronicals_trl._agreement import compare_starts, started_with
from chronicals_trl.config import ChronicalsConfig, read_flag
from chronicals_trl.model.patch import base_model
from chronicals_trl.packing.ranks import require_same_rows

if TYPE_CHECKING:
    from chronicals_trl.trainer import SFTTrainer


def start(arguments: Any, given: dict[str, Any]) -> ChronicalsConfig | None:
    """The configuration, None with the flag off; bad input and ranks that differ are refused here.

    Args:
        arguments: the trainer's; None where it was given none.
        given: all that it was given, by name.
    """
    # The class's default, "look at the environment", is what stock TRL's pickled arguments fall back to: off.
    flag = getattr(arguments, "use_chronicals", False)

    def read() -> tuple[ChronicalsConfig | None, dict[str, str]]:
        config = None
        if flag and read_flag(flag):
            config = ChronicalsConfig.resolve(arguments.chronicals_config)
            _inputs.check(arguments, given)
        return config, started_with(config, arguments)

    return compare_starts(read, 1 if arguments is None else arguments.world_size)


def check_data(trainer: SFTTrainer) -> None:
    """Raise ValueError for a model or prepared data that cannot be trained on, here or on several ranks."""
    _inputs.require_causal(base_model(trainer.model))
    refuse_shared_rows(trainer)
    evaluation = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"": trainer.eval_dataset}
    named: dict[str, Any] = {"train_dataset": trainer.train_dataset}
    named |= {f"eval_dataset[{key!r}]" if key else "eval_dataset": data for key, data in evaluation.items()}
    require_same_rows(named)
    embedding = base_model(trainer.model).get_input_embeddings()
    vocabulary = getattr(embedding, "num_embeddings", None)
    if vocabulary is None:  # PEFT's layer around one, perhaps
        inner = getattr(embedding, "base_layer", None) or getattr(embedding, "original_module", None)
        vocabulary = getattr(inner, "num_embeddings", None)
    if vocabulary is None:
        return
    for name, dataset in named.items():
        _data_sets.require_known_tokens(name, dataset, vocabulary)


def refuse_shared_rows(trainer: SFTTrainer) -> None:
    """Raise ValueError for packed rows of which each rank would get a part: documents have to be whole.

    TRL refuses context parallelism; sequence parallelism cuts `cu_seq_lens_q` and the rest of a packed batch along
    with the tokens.
    """
    setting, parallelism = _inputs.packing_setting(trainer.args), trainer.accelerator.parallelism_config
    if setting and parallelism is not None and getattr(parallelism, "sp_enabled", False):
        raise ValueError(
            f"{setting}=True with sp_size={parallelism.sp_size}: sequence parallelism cuts each row into one part a "
            f"rank, and the offsets of its documents with it. Set {setting}=False, or sp_size=1."
        )
