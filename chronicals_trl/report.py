"""What is on and what is off, and why: the one report that is shown at the start of training.

`ActivationReport` always lists every part, in the order of `config.PARTS`. It is shown as a table (rich when it is
installed), written to the log as a line, and saved as JSON.
"""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from chronicals_trl._files import write_text
from chronicals_trl._versions import versions
from chronicals_trl.config import PARTS, ChronicalsConfig

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_TITLE = "chronicals-trl"
_COLUMNS = ("part", "state", "modules", "backend", "reason")


@dataclass(frozen=True)
class PartReport:
    """One part's state.

    Args:
        name: One of `config.PARTS`.
        state: "on" or "off"; "-" where it was not looked at, as `doctor` has it of what only a run can tell.
        modules: How many modules of the model it is on for; 0 for parts that are not modules.
        backend: What does the work, for example "triton" or "varlen"; None when there is no choice.
        reason: Why it is off, or a remark on what is on.
        omitted: Off though the user did not ask for that and the part applies: what `strict` turns into an error.
    """

    name: str
    state: Literal["on", "off", "-"]
    modules: int = 0
    backend: str | None = None
    reason: str | None = None
    omitted: bool = False

    def __post_init__(self) -> None:
        if self.name not in PARTS:
            raise ValueError(f"name must be one of {', '.join(PARTS)}, got {self.name!r}.")
        if self.state not in ("on", "off", "-"):
            raise ValueError(f"state of {self.name} must be 'on', 'off' or '-', got {self.state!r}.")
        if self.omitted and self.state != "off":
            raise ValueError(f"{self.name} cannot be {self.state} and omitted at once; omitted goes with state='off'.")

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "state": self.state,
            "modules": self.modules,
            "backend": self.backend,
            "reason": self.reason,
        }


def _default_parts() -> list[PartReport]:
    return [PartReport(name, "off", reason="not set up") for name in PARTS]


@dataclass
class ActivationReport:
    """The state of every part, and remarks that belong to none.

    Args:
        parts: The parts to begin with, in any order; those not given are off, "not set up".
        notes: Remarks, one sentence each.

    Raises:
        ValueError: A part is given twice.
    """

    parts: list[PartReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        given = self.parts
        names = [part.name for part in given]
        if len(set(names)) != len(names):
            raise ValueError(f"parts names a part twice: {names}.")
        self.parts = _default_parts()
        for part in given:
            self.set(part)

    @classmethod
    def all_off(cls, reason: str) -> ActivationReport:
        """A report in which every part is off for the same reason."""
        return cls([PartReport(name, "off", reason=reason) for name in PARTS])

    def __getitem__(self, name: str) -> PartReport:
        if name not in PARTS:
            raise KeyError(f"{name!r} is no part; parts are {', '.join(PARTS)}.")
        return self.parts[PARTS.index(name)]

    def set(self, part: PartReport) -> None:
        """Put `part` in the place of the one that has its name."""
        self.parts[PARTS.index(part.name)] = part

    def to_dict(self) -> dict[str, Any]:
        """`{"parts": [{"name", "state", "modules", "backend", "reason"}], "notes": [...], "versions": {...}}`."""
        return {"parts": [part.to_dict() for part in self.parts], "notes": list(self.notes), "versions": versions()}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON to `path`, making its folder; a reader never sees half a file."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text(target, json.dumps(self.to_dict(), indent=2) + "\n")

    def raise_for_omissions(self, config: ChronicalsConfig) -> None:
        """Raise RuntimeError when a part was left out that the user wanted in.

        With `config.strict` that is each omitted part; in any case each part that is off while its setting is "on".
        """
        problems = []
        for part in self.parts:
            insisted = getattr(config, part.name) == "on"
            if part.state == "on" or not (insisted or (config.strict and part.omitted)):
                continue
            why = part.reason or "no reason recorded"
            cure = f'set {part.name}="auto"' if insisted and not config.strict else f'set {part.name}="off"'
            problems.append(f"{part.name} is off: {why} ({cure} to train without it)")
        if problems:
            cause = "strict=True" if config.strict else "a part that is set to 'on'"
            raise RuntimeError(
                f"chronicals_config asks for more than this run can have ({cause}): {'; '.join(problems)}."
            )

    def _rows(self) -> list[tuple[str, ...]]:
        return [
            (p.name, p.state, str(p.modules) if p.modules else "", p.backend or "", p.reason or "") for p in self.parts
        ]

    def table(self) -> Table:
        """The report as a `rich.table.Table`. Raises ImportError without rich; `render` does not need it."""
        from rich.table import Table
        from rich.text import Text

        # Text, not str: a reason or a note may hold square brackets, which rich would take for markup.
        notes = Text("\n".join(f"- {note}" for note in self.notes)) if self.notes else None
        table = Table(title=_TITLE, title_justify="left", caption=notes, caption_justify="left")
        for column in _COLUMNS:
            # A word that is longer than the column, such as gradient_checkpointing=False, goes on in the next line.
            table.add_column(
                column, justify="right" if column == "modules" else "left", no_wrap=column != "reason", overflow="fold"
            )
        for row in self._rows():
            style = "green" if row[1] == "on" else "yellow" if self[row[0]].omitted else "dim"
            table.add_row(*(Text(cell, style=style if index == 1 else "") for index, cell in enumerate(row)))
        return table

    def render(self, width: int | None = None) -> str:
        """The report as plain text of at most `width` columns (default 100); the reason is what gets wrapped."""
        rows = self._rows()
        widths = [max(len(title), *(len(row[i]) for row in rows)) for i, title in enumerate(_COLUMNS[:-1])]
        indent = sum(widths) + 2 * len(widths)
        room = max((width or 100) - indent, 20)

        def line(cells: Sequence[str]) -> list[str]:
            head = "  ".join(cells[i].rjust(w) if i == 2 else cells[i].ljust(w) for i, w in enumerate(widths))
            first, *more = textwrap.wrap(cells[-1], room, break_on_hyphens=False) or [""]
            return [f"{head}  {first}".rstrip(), *(" " * indent + text for text in more)]

        lines = [_TITLE, *line(_COLUMNS), "-" * min(indent + room, width or 100)]
        for row in rows:
            lines += line(row)
        for note in self.notes:
            lines += textwrap.wrap(note, width or 100, initial_indent="- ", subsequent_indent="  ")
        return "\n".join(lines)

    def log_line(self) -> str:
        """The report on one line, for a log."""
        on, off = [], []
        for part in self.parts:
            if part.state == "on":
                detail = " ".join(filter(None, [part.backend, f"x{part.modules}" if part.modules else None]))
                on.append(f"{part.name} ({detail})" if detail else part.name)
            else:
                off.append(f"{part.name} ({part.reason})" if part.reason else part.name)
        line = f"{_TITLE}: on: {', '.join(on) or 'nothing'}; off: {', '.join(off) or 'nothing'}"
        # A reason may quote an error of several lines.
        return " ".join("; ".join([line, *self.notes]).split())

    def print(self, console: Console | None = None) -> None:
        """Show the table: through rich when it is installed, else as plain text."""
        try:
            from rich.console import Console
        except ImportError:
            print(self.render())
            return
        (console or Console()).print(self.table())
