"""Checkpoints that a killed run has left half written: never resumed from, and never taken for the last one.

transformers writes a checkpoint's files one by one into the folder itself, `trainer_state.json` last, and takes the
folder with the highest step for the last checkpoint, whole or not. Loading it then fails with the words of whatever
reads the first broken file, or not at all.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from accelerate.utils import gather_object
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from chronicals_trl.config import ChronicalsConfig
from chronicals_trl.report import ActivationReport

__all__ = ["CheckpointsMixin", "last_complete", "what_is_missing"]

_STEP = re.compile(rf"^{PREFIX_CHECKPOINT_DIR}-(\d+)$")
_INDEX = ".index.json"


def what_is_missing(checkpoint: Path) -> str | None:
    """Why a checkpoint is not whole; None where it is.

    Reads the ends of the files and the heads of safetensors, no weights.
    """
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    except FileNotFoundError:
        return f"{TRAINER_STATE_NAME}, which is written last, is missing"
    except ValueError:
        return f"{TRAINER_STATE_NAME} is cut off"
    return next(_missing(checkpoint), None)


def _missing(checkpoint: Path) -> Iterator[str]:
    for path in sorted(checkpoint.rglob("*")):
        name = path.relative_to(checkpoint)
        if path.suffix in (".pt", ".pth", ".bin") and not _whole_pickle(path):
            yield f"{name} is cut off"
        elif path.suffix == ".safetensors" and not _whole_safetensors(path):
            yield f"{name} is cut off"
        elif path.name.endswith(_INDEX):
            shards = set(json.loads(path.read_text()).get("weight_map", {}).values())
            yield from (f"{shard} is missing" for shard in sorted(shards) if not (path.parent / shard).is_file())
        elif path.suffix == ".distcp" and not (path.parent / ".metadata").is_file():
            yield f"{name.parent / '.metadata'}, which is written last, is missing"
        elif path.is_dir() and path.name.startswith("global_step") and not (checkpoint / "latest").is_file():
            yield "latest, which DeepSpeed writes last, is missing"
    # One file without a number for a single process, else one a rank.
    states = [int(path.stem.rpartition("_")[2]) for path in checkpoint.glob("rng_state_*.pth")]
    if states:
        wanted = range(max(2, max(states) + 1))
        yield from (f"rng_state_{rank}.pth is missing" for rank in wanted if rank not in states)


def _whole_pickle(path: Path) -> bool:
    """Whether a file of `torch.save` has the directory that a zip archive ends with; older formats are let pass."""
    with open(path, "rb") as file:
        begin = file.read(2)
    return zipfile.is_zipfile(path) if begin == b"PK" else begin != b""


def _whole_safetensors(path: Path) -> bool:
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or size < 8 + length:
            return False
        head = json.loads(file.read(length))
    ends = [entry["data_offsets"][1] for name, entry in head.items() if name != "__metadata__"]
    return size == 8 + length + max(ends, default=0)


def last_complete(output_dir: str | Path) -> tuple[Path | None, dict[Path, str]]:
    """The whole checkpoint of the highest step, and the later ones that are not whole, each with the reason."""
    folder, broken = Path(output_dir), dict[Path, str]()
    found = [path for path in folder.iterdir() if path.is_dir() and _STEP.match(path.name)] if folder.is_dir() else []
    for path in sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        reason = what_is_missing(path)
        if reason is None:
            return path, broken
        broken[path] = reason
    return None, broken


class CheckpointsMixin(Trainer):
    """`SFTTrainer`'s way into a checkpoint and out to one; the parent's with the flag off."""

    # Of the trainer that mixes this in.
    _chronicals: ChronicalsConfig | None
    chronicals_report: ActivationReport
    _tell_once: Callable[..., None]

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if self._chronicals is not None and resume_from_checkpoint is not None and resume_from_checkpoint is not False:
            resume_from_checkpoint = self._whole_checkpoint(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _whole_checkpoint(self, asked: str | Literal[True]) -> str | bool:
        """The checkpoint to resume from, the same on all ranks; left to the parent where there is none to look at.

        Raises:
            ValueError: it is not whole, or the ranks see different ones; on every rank.
        """
        last, broken = last_complete(self.args.output_dir)
        chosen: str | bool = asked if last is None or asked is not True else str(last)
        failure = None
        if asked is True and last is None and broken:
            failure = f"{_told(broken)}, and there is no whole checkpoint in {self.args.output_dir} to go on from"
        elif asked is not True and Path(asked).is_dir() and (reason := what_is_missing(Path(asked))) is not None:
            remedy = f"the last whole one here is {last}" if last is not None else "there is no whole one here"
            failure = f"{_told({Path(asked): reason})}; {remedy}"
        seen = [(chosen, failure)]
        if self.args.world_size > 1:
            seen = gather_object(seen)
        failure = next((failure for _, failure in seen if failure is not None), None)
        if failure is not None:
            raise ValueError(
                f"Cannot resume: {failure}. A run that was killed while it saved leaves such a folder: remove it, and "
                "pass resume_from_checkpoint=True for the last whole one, or the path of one; without any, start anew."
            )
        other = next((rank for rank, one in enumerate(seen) if one != seen[0]), None)
        if other is not None:
            raise ValueError(
                f"Cannot resume: the last whole checkpoint is {seen[0][0]} on rank 0 and {seen[other][0]} on rank "
                f"{other}. output_dir has to be on a file system that all nodes see."
            )
        if asked is True and broken:
            self._tell_once(
                f"checkpoints: {_told(broken)}, left by a run that was killed; going on from {chosen}", warn=True
            )
        return chosen

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        if self._chronicals is not None and self.args.should_save:
            # A folder that a run resumed from before it is written to again: not whole until that is done.
            trial = kwargs.get("trial", args[1] if len(args) > 1 else None)
            folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        super()._save_checkpoint(*args, **kwargs)


def _told(broken: dict[Path, str]) -> str:
    return "; ".join(f"{path} is only half written ({reason})" for path, reason in broken.items())
