"""Which versions of the libraries below us are needed, and which were tested.

The floors are those of DESIGN.md; `TESTED` is what `constraints.txt` pins. The names and versions come from the
packages' metadata, so nothing is imported to find them out.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata

from packaging.version import Version

from chronicals_trl import __version__

FLOORS: dict[str, str] = {
    "torch": "2.11",
    "transformers": "5.15",
    "trl": "1.15",
    "accelerate": "1.12",
    "peft": "0.18",
}
TESTED: dict[str, str] = {
    "torch": "2.13.0",
    "transformers": "5.24.0",
    "trl": "1.16.0",
    "accelerate": "1.15.0",
    "peft": "0.21.2",
}
# peft is optional: a version that is too old only costs the parts that need it.
REQUIRED = ("torch", "transformers", "trl", "accelerate")


def installed(name: str) -> str | None:
    """The version of an installed distribution, or None when there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """The installed version of this package and of each one that has a floor; None for what is not installed."""
    return {"chronicals-trl": __version__, **{name: installed(name) for name in FLOORS}}


def meets_floor(name: str, version: str) -> bool:
    """Whether `version` of `name` is at or above the floor.

    Only the release number counts: vendor builds such as `2.11.0a0+nv` are pre-releases by the letter, and have what
    the release has.
    """
    return Version(Version(version).base_version) >= Version(FLOORS[name])


def newer_than_tested(name: str, version: str) -> bool:
    """Whether `version` of `name` belongs to a later minor release than the newest tested one."""
    return Version(version).release[:2] > Version(TESTED[name]).release[:2]


def check_floors(names: Iterable[str] = REQUIRED) -> None:
    """Raise ImportError that names each package below its floor, what was found, and how to update."""
    found = {name: installed(name) for name in names}
    low = [name for name, version in found.items() if version is None or not meets_floor(name, version)]
    if not low:
        return
    problems = ", ".join(f"{name}>={FLOORS[name]} (found {found[name] or 'none'})" for name in low)
    remedy = " ".join(f"'{name}>={FLOORS[name]}'" for name in low)
    raise ImportError(
        f"use_chronicals=True needs {problems}. Update with `pip install -U {remedy}`, or set use_chronicals=False."
    )
