"""What the user can set: `ChronicalsConfig` (the parts) and `SFTConfig` (TRL's, with the flag).

A part is "auto" (on where it fits), "on" (the user insists: leaving it out is an error) or "off". Values come from
the explicit argument, then the environment (`CHRONICALS_<FIELD>`), then the defaults.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

from trl.trainer.sft_config import SFTConfig as TrlSFTConfig

from chronicals_trl._environment import ENV_FLAG, ENV_PREFIX, check_environment
from chronicals_trl._explicit import named_by_user
from chronicals_trl._versions import check_floors

PARTS = (
    "rms_norm",
    "gated_mlp",
    "qk_rope",
    "attention",
    "head",
    "packing",
    "lora",
    "lora_plus",
    "adamw",
    "cuda_graphs",
    "recompute",
)
PART_STATES = ("auto", "on", "off")
HEALTH = ("warn", "stop", "off")
ATTENTION_BACKENDS = ("auto", "flash_attn_4", "varlen", "flash_attn_3", "flash_attn_2", "sdpa")

_TRUE = ("true", "yes", "on", "1")
_FALSE = ("false", "no", "off", "0")


def _nearest(value: object, allowed: Iterable[str]) -> str:
    """ " Did you mean 'x'?" for the closest of `allowed`, or nothing when none is close."""
    close = difflib.get_close_matches(str(value).lower(), list(allowed), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def _choice(where: str, value: object, allowed: tuple[str, ...]) -> str:
    if not isinstance(value, str):
        raise TypeError(
            f"{where} must be one of {', '.join(map(repr, allowed))}, got {value!r} of type {type(value).__name__}."
        )
    if value.lower() not in allowed:
        hint = _nearest(value, allowed)
        if allowed is PART_STATES and value.lower() in ATTENTION_BACKENDS:
            hint = f" A back end is chosen with attention_backend={value.lower()!r}."
        raise ValueError(f"{where} must be one of {', '.join(map(repr, allowed))}, got {value!r}.{hint}")
    return value.lower()


def _part(where: str, value: object) -> str:
    # YAML 1.1 reads a bare `on` or `off` as a boolean, and so does transformers with "true" and "false" in JSON.
    if isinstance(value, bool):
        return "on" if value else "off"
    return _choice(where, value, PART_STATES)


def _health(where: str, value: object) -> str:
    # As with parts: YAML's bare `off` is False. There is no word that True could stand for.
    return _choice(where, "off" if value is False else value, HEALTH)


def _boolean(where: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{where} must be true or false, got {value!r} of type {type(value).__name__}.")
    return value


def _positive_int(where: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{where} must be an integer of at least 1, got {value!r} of type {type(value).__name__}.")
    if value < 1:
        raise ValueError(f"{where} must be an integer of at least 1, got {value!r}.")
    return value


def _positive_float(where: str, value: object) -> float:
    if isinstance(value, str):  # YAML reads 1e-4, which has no dot, as text; transformers takes that for its own rates
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{where} must be a finite number above 0, got {value!r} of type {type(value).__name__}.")
    try:
        number = float(value)
    except OverflowError:  # an integer beyond float's range
        number = math.inf
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{where} must be a finite number above 0, got {value!r}.")
    return number


def _optional_positive_float(where: str, value: object) -> float | None:
    return None if value is None else _positive_float(where, value)


_CHECKS: dict[str, Any] = {
    **dict.fromkeys(PARTS, _part),
    "strict": _boolean,
    "recompute_mlp": _boolean,
    "attention_backend": lambda where, value: _choice(where, value, ATTENTION_BACKENDS),
    "logit_budget_mib": lambda where, value: None if value is None else _positive_int(where, value),
    "packing_window": _positive_int,
    "profile_steps": lambda where, value: None if value is None else _positive_int(where, value),
    "balance_ranks": _boolean,
    "padding_free": _part,
    "health": _health,
    "lora_plus_ratio": _positive_float,
    "lora_plus_embedding_lr": _optional_positive_float,
}


def _check_all(values: Mapping[str, Any], label: str) -> dict[str, Any]:
    """`values`, each one checked and normalised; `label` is put before the key in an error."""
    return {key: _CHECKS[key](f"{label}{key}", value) for key, value in values.items()}


@dataclass(frozen=True)
class ChronicalsConfig:
    """The settings of chronicals-trl; `chronicals_config` on the arguments holds the ones that the user gave.

    Args:
        rms_norm, gated_mlp, qk_rope, attention, head, packing, lora, lora_plus, adamw, cuda_graphs, recompute: "auto"
            (on where it fits), "on" (leaving it out is an error) or "off". Booleans are taken as "on" and "off".
        strict: Every part that is left out of its own accord is an error.
        recompute_mlp: MLPs whose weights are trained keep gate and up alone and compute their product again in the
            backward pass: about a fifth less memory for some 1% of a step's time.
        attention_backend: "auto" takes the first that works of "flash_attn_4", "varlen", "flash_attn_3",
            "flash_attn_2" and "sdpa".
        logit_budget_mib: Memory for logits in the head, in MiB; at least 1. None: as much as leaves the head's peak no
            higher than that of TRL's fused head, at most 1,024.
        packing_window: Documents that are packed together when the data set is streamed; at least 1.
        profile_steps: Steps whose GPU time is sorted into a table (`chronicals_profile.txt` in the output directory);
            at least 1. None: none.
        balance_ranks: Packed rows are dealt so that the ranks have the same attention cost in a step. False: by the
            shuffle alone.
        padding_free: Without packing, a batch's documents are one row without padding between them: "auto" (where the
            result is the same and the row no slower), "on" (an error where the result would not be the same) or "off".
        health: What the trainer does when a run does not learn as it should: "warn" (once for each check), "stop"
            (an error that names the cause; a fall of throughput and the like still only warn) or "off" (nothing is
            checked).
        lora_plus_ratio: Learning rate of LoRA's B matrices over that of A; above 0.
        lora_plus_embedding_lr: Learning rate of LoRA's embedding matrices; None leaves the optimizer's.

    Raises:
        TypeError: A value is of the wrong type.
        ValueError: A value is impossible. Both name the key, the value, what is allowed, and the nearest match.
    """

    rms_norm: str = "auto"
    gated_mlp: str = "auto"
    qk_rope: str = "auto"
    attention: str = "auto"
    head: str = "auto"
    packing: str = "auto"
    lora: str = "auto"
    lora_plus: str = "auto"
    adamw: str = "auto"
    cuda_graphs: str = "auto"
    recompute: str = "auto"
    strict: bool = False
    recompute_mlp: bool = True
    attention_backend: str = "auto"
    logit_budget_mib: int | None = None
    packing_window: int = 10_000
    profile_steps: int | None = None
    balance_ranks: bool = True
    padding_free: str = "auto"
    health: str = "warn"
    lora_plus_ratio: float = 16.0
    lora_plus_embedding_lr: float | None = None

    def __post_init__(self) -> None:
        for key, value in _check_all(self.to_dict(), "").items():
            object.__setattr__(self, key, value)

    def to_dict(self) -> dict[str, Any]:
        """The settings as a flat dict that JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def resolve(
        cls,
        explicit: ChronicalsConfig | Mapping[str, Any] | str | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> ChronicalsConfig:
        """The configuration in force: `explicit` over `CHRONICALS_<FIELD>` variables over the defaults.

        Args:
            explicit: A dict, JSON text of one, a whole ChronicalsConfig (then the environment adds nothing), or None.
            environ: The environment to read; None for the process's own. `CHRONICALS_USE_CHRONICALS` belongs to
                `SFTConfig` and is left out.

        Raises:
            TypeError, ValueError: An unknown key, a wrong type or an impossible value, naming where it came from.
        """
        if isinstance(explicit, ChronicalsConfig):
            return explicit
        from_env = _read_environment(os.environ if environ is None else environ)
        return cls(**{**from_env, **_read_explicit(explicit)})


def without_trainer_parts(config: ChronicalsConfig) -> ChronicalsConfig:
    """`config` for `patch_model`, which cannot tell whether the parts that its caller sets afterwards will be on."""
    parts: dict[str, Any] = dict.fromkeys(("packing", "lora_plus", "adamw", "cuda_graphs", "recompute"), "auto")
    return dataclasses.replace(config, **parts)


_FIELDS = tuple(f.name for f in dataclasses.fields(ChronicalsConfig))


def _read_explicit(explicit: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """The keys that the user gave, checked; errors name `chronicals_config`."""
    if explicit is None:
        return {}
    if isinstance(explicit, str):
        try:
            explicit = json.loads(explicit)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"chronicals_config is not valid JSON ({error}): got {explicit!r}. Pass an object such as "
                '\'{"attention": "off"}\', in quotes on the command line.'
            ) from error
    if not isinstance(explicit, Mapping):
        raise TypeError(
            f"chronicals_config must be a dict or the JSON text of one, got {explicit!r} of type "
            f"{type(explicit).__name__}."
        )
    for key in explicit:
        if key not in _FIELDS:
            raise ValueError(
                f"chronicals_config has an unknown key {key!r}.{_nearest(key, _FIELDS)} Allowed: {', '.join(_FIELDS)}."
            )
    return _check_all(explicit, "chronicals_config: ")


def _read_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """The settings that the environment holds, checked; errors name the variable."""
    check_environment(environ)
    values = {}
    for variable, text in environ.items():
        if variable.startswith(ENV_PREFIX) and variable != ENV_FLAG:
            key = variable[len(ENV_PREFIX) :].lower()
            values[key] = _CHECKS[key](f"environment variable {variable}", _parse_text(key, text))
    return values


def _parse_text(key: str, text: str) -> object:
    """An environment variable's text as the type that its field has; text that does not fit is left for the check."""
    word = text.strip()
    if _CHECKS[key] in (_part, _boolean):
        # "on" and "off" are a part's own words; for a boolean they mean true and false.
        return True if word.lower() in _TRUE else False if word.lower() in _FALSE else word
    if key == "lora_plus_embedding_lr" and word.lower() in ("none", "null", ""):
        return None
    for number in (int, float):
        try:
            return number(word)
        except ValueError:
            continue
    return word


class _FromEnvironment:
    """Default of `use_chronicals`: "look at the environment when an instance is made".

    A default factory would be the natural way, but HfArgumentParser takes a boolean field with a factory for
    `False` and passes that on as if the user had given it. False in a boolean sense, so that arguments that stock TRL
    pickled (they have no such field of their own and fall back to the class) count as off.
    """

    def __bool__(self) -> bool:
        return False

    def __repr__(self) -> str:
        return f"${ENV_FLAG}, else False"


_FROM_ENVIRONMENT = cast(bool, _FromEnvironment())


def read_flag(value: object, *, default: bool = False) -> bool:
    """`use_chronicals` as a bool: from the environment where it was not given (the class's default, or None).

    Args:
        default: what counts where the environment says nothing either.

    Raises:
        TypeError, ValueError: neither a bool nor one of the words for it; "off" counted as true would train with the
            flag on.
    """
    if value is None or isinstance(value, _FromEnvironment):
        return _word("environment variable " + ENV_FLAG, os.environ.get(ENV_FLAG, "").strip() or default)
    return _word("use_chronicals", value)


def _word(where: str, value: object) -> bool:
    if isinstance(value, (bool, int, str)):
        word = str(value).strip().lower()
        if word in _TRUE + _FALSE:
            return word in _TRUE
        raise ValueError(f"{where} must be one of {', '.join(_TRUE + _FALSE)}, got {value!r}.")
    raise TypeError(
        f"{where} must be true or false, or one of {', '.join(_TRUE + _FALSE)}, got {value!r} of type "
        f"{type(value).__name__}."
    )


@dataclass
class SFTConfig(TrlSFTConfig):
    """TRL's SFTConfig with the flag and its settings; with the flag off it means what TRL's means.

    Args:
        use_chronicals: Whether training goes through chronicals-trl; a bool, or one of the words true, yes, on, 1,
            false, no, off, 0. Default (and None): the environment's `CHRONICALS_USE_CHRONICALS`, else False.
        chronicals_config: A dict, or JSON text on the command line, of `ChronicalsConfig`'s fields; kept as a plain
            dict of the keys that were given.
        accelerator_config: Transformers'; with the flag on, `non_blocking` is True unless it is given or
            `dataloader_pin_memory` is off.

    Raises:
        ImportError: The flag is on and trl, transformers, torch or accelerate is older than its floor.
        TypeError, ValueError: As `ChronicalsConfig.resolve` does.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*TrlSFTConfig._VALID_DICT_FIELDS, "chronicals_config"]

    use_chronicals: bool = field(
        default=_FROM_ENVIRONMENT,
        metadata={
            "help": "Whether to train through chronicals-trl: packed, fused, the same result. Each part that does not "
            "fit is left out and reported."
        },
    )
    chronicals_config: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": 'Settings of chronicals-trl as JSON, for example \'{"attention": "off", "strict": true}\'. '
            f"Keys: {', '.join(_FIELDS)}."
        },
    )

    def __new__(cls, *args: Any, **kwargs: Any) -> SFTConfig:
        # Of a subclass that has a setting of such a name we know nothing.
        ours = set(_FIELDS) - set(cls.__dataclass_fields__)
        misplaced = {key: value for key, value in kwargs.items() if key in ours}
        if misplaced and cls is SFTConfig:
            raise TypeError(
                f"SFTConfig has no argument {', '.join(map(repr, misplaced))}: a setting of chronicals-trl's own "
                f"belongs into chronicals_config. Write SFTConfig(..., chronicals_config={misplaced!r})."
            )
        made = super().__new__(cls)
        made.__dict__["_given"] = frozenset(kwargs)
        return made

    def was_given(self, name: str) -> bool:
        """Whether the user named the setting `name`, in a script, on the command line or in its YAML file."""
        fields = [field for field in dataclasses.fields(self) if field.init]
        return named_by_user(name, self.__dict__.get("_given", ()), len(fields))

    def __post_init__(self) -> None:
        # A misspelt CHRONICALS_USE_CHRONICALS leaves the flag off, and would pass unseen.
        check_environment()
        self.use_chronicals = read_flag(self.use_chronicals)
        if self.use_chronicals:
            # Before TRL's own checks: an old version below us could fail there with a less telling error.
            check_floors()
        given: Any = self.chronicals_config
        if isinstance(given, ChronicalsConfig):
            given = given.to_dict()
        if given is not None:
            self.chronicals_config = _read_explicit(given)
        if self.use_chronicals:
            # A wrong CHRONICALS_* variable has to show here, not after the model was loaded.
            ChronicalsConfig.resolve(self.chronicals_config)
        open_choice = self.use_chronicals and _leaves_copies_open(self.accelerator_config)
        super().__post_init__()
        if open_choice and self.dataloader_pin_memory:  # only from pinned memory does such a copy not wait
            cast(Any, self.accelerator_config).non_blocking = True


def _leaves_copies_open(accelerator_config: Any) -> bool:
    """Whether the user has not said if copies to the GPU block; a file or an AcceleratorConfig says it."""
    if isinstance(accelerator_config, str) and accelerator_config.lstrip().startswith("{"):
        try:
            accelerator_config = json.loads(accelerator_config)
        except json.JSONDecodeError:  # transformers says what is wrong with it
            return False
    if isinstance(accelerator_config, Mapping):
        return "non_blocking" not in accelerator_config
    return accelerator_config is None
