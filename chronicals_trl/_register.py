"""Make `from trl import SFTConfig, SFTTrainer` give ours, whatever the import order.

`register()` rebinds the two names in each place of trl that users import them from. When trl is not imported yet it
only leaves a hook for the moment when it is: importing trl reads the environment (`HF_HOME`, `HF_HUB_OFFLINE` ...) and
takes seconds, and a script that sets variables above its imports must find them working.

What cannot be reached: a name that was bound before, `from trl import SFTTrainer` having run already. Those are
stock TRL's, and its SFTConfig refuses `use_chronicals`, so it shows.
"""

from __future__ import annotations

import copyreg
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from chronicals_trl._versions import check_floors

# `trl.trainer.sft_trainer.SFTConfig` stays stock on purpose: the parent's __init__ tests `isinstance(args, SFTConfig)`
# with it, and would turn a stock SFTConfig into ours, dropping what a user's own subclass of it adds.
_PLACES = {
    "SFTConfig": ("trl", "trl.trainer", "trl.trainer.sft_config"),
    "SFTTrainer": ("trl", "trl.trainer", "trl.trainer.sft_trainer"),
}
_WATCHED = (
    "trl",
    "chronicals_trl.config",
    "chronicals_trl.optim.trainer",
    "chronicals_trl.packing.trainer",
    "chronicals_trl.trainer",
)

_stock: dict[str, type] = {}
_hook: _RegisterOnImport | None = None


def register() -> None:
    """Rebind trl's `SFTConfig` and `SFTTrainer` to ours, now or as soon as trl is imported. Idempotent."""
    global _hook
    if _stock or _hook is not None:
        return
    if "trl" in sys.modules:
        _rebind()
    else:
        _hook = _RegisterOnImport()
        sys.meta_path.insert(0, _hook)


def unregister() -> None:
    """Undo `register()`; names that were imported in between keep what they got."""
    _remove_hook()
    for name, stock in _stock.items():
        for place in _PLACES[name]:
            setattr(sys.modules[place], name, stock)
    if _stock:
        copyreg.dispatch_table.pop(_stock["SFTConfig"], None)
    _stock.clear()


def _rebind() -> None:
    try:
        ours = {
            "SFTConfig": importlib.import_module("chronicals_trl.config").SFTConfig,
            "SFTTrainer": importlib.import_module("chronicals_trl.trainer").SFTTrainer,
        }
    except ImportError:
        # A library below its floor may lack a name that we import: then say that instead.
        check_floors()
        raise
    for name, places in _PLACES.items():
        modules = [importlib.import_module(place) for place in places]
        _stock[name] = getattr(modules[-1], name)
        for module in modules:
            setattr(module, name, ours[name])
    # pickle finds a class by its address, and the stock config's address now leads to ours: without this a stock
    # SFTConfig made before register() could not be written to training_args.bin.
    copyreg.pickle(_stock["SFTConfig"], _reduce_stock_config)


def _reduce_stock_config(config: Any) -> tuple[Any, ...]:
    return _new_stock_config, (), config.__dict__


def _new_stock_config() -> Any:
    if "SFTConfig" in _stock:
        stock = _stock["SFTConfig"]
    else:
        stock = importlib.import_module("trl.trainer.sft_config").SFTConfig
    return object.__new__(stock)


def _remove_hook() -> None:
    global _hook
    if _hook is not None:
        sys.meta_path.remove(_hook)
        _hook = None


class _RegisterOnImport(importlib.abc.MetaPathFinder):
    """Lets trl be imported as ever, and rebinds right after.

    Our own modules import trl while they are being loaded, and cannot be rebound to then: loads of watched modules
    are counted, and the rebinding waits until none is under way.
    """

    def __init__(self) -> None:
        self.loading = 0

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _WATCHED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec

    def loaded(self) -> None:
        if self.loading == 0 and _hook is self and "trl" in sys.modules:
            _remove_hook()
            _rebind()


class _Loader(importlib.abc.Loader):
    """A module's own loader, with word to the hook before and after."""

    def __init__(self, inner: Any, hook: _RegisterOnImport) -> None:
        self._inner = inner
        self._hook = hook

    def __getattr__(self, name: str) -> Any:
        # get_source, get_data, is_package ...: linecache, inspect and importlib.resources ask the loader.
        return getattr(self._inner, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._hook.loading += 1
        try:
            self._inner.exec_module(module)
        finally:
            self._hook.loading -= 1
        # From here on the module is as if this class had never been: the spec outlives the hook.
        for holder, name in ((module.__spec__, "loader"), (module, "__loader__")):
            if holder is not None:
                setattr(holder, name, self._inner)
        self._hook.loaded()
