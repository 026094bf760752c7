"""A model's modules and parameters, listed once and not anew in every step.

Trainer calls `model.train()` in each step, and `model.parameters()` to clip gradients and to zero them. Each goes
through all modules in Python: some two thousand of them where every projection has an adapter, several milliseconds
each, longer than a GPU needs for short texts. While a `Walks` is installed, both answer from its lists as long as
those are true, which takes a look at the modules' tables to see, made in C.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from operator import itemgetter
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from chronicals_trl.model.members import Members

__all__ = ["Walks"]

_WALKS = "_chronicals_walks"

# Whose `train`, on a model that is training already, changes nothing. (PreTrainedModel's acts on a change of mode.)
_TRAINS_ALIKE = {nn.Module.train, nn.parallel.DistributedDataParallel.train, PreTrainedModel.train}

_training = itemgetter("training")


class Walks:
    """The lists of one model.

    Args:
        model: as Trainer calls it, DDP's module included. None makes an empty one, as copies and pickles of a model
            have it: they are walked through as ever.

    Attributes:
        generation: how often the model has been listed.
        installed: whether they answer for the model.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self._model = model
        self.generation = 0
        self.installed = False
        if model is not None:
            self._list(model)

    def __reduce__(self) -> tuple[type[Walks], tuple[()]]:
        return Walks, ()

    def _list(self, model: nn.Module) -> None:
        self.generation += 1
        modules = list(model.modules())
        self._dicts = [module.__dict__ for module in modules]
        self._members = Members([table for m in modules for table in (m._modules, m._parameters)])
        self._parameters = list(type(model).parameters(model))
        self._trains_alike = all(map(_trains_alike, modules, [module is model for module in modules]))

    def refresh(self) -> None:
        """List the model anew if it is not as listed."""
        if self._model is not None and self._members.changed():
            self._list(self._model)

    def parameters(self) -> list[nn.Parameter]:
        """What `model.parameters()` gives, in its order."""
        self.refresh()
        return self._parameters

    def all_train(self) -> bool:
        """Whether `model.train()` would change nothing."""
        self.refresh()
        return self._trains_alike and all(map(_training, self._dicts))

    # -- on and off --------------------------------------------------------------------------------------------------

    def install(self) -> bool:
        """Answer for the model from now on; False, and nothing is done, if somebody else already does."""
        model = self._model
        if model is None or {"train", "parameters", _WALKS} & model.__dict__.keys():
            return False
        model.__dict__[_WALKS] = self
        for method in (train, parameters):
            model.__dict__[method.__name__] = types.MethodType(method, model)
        self.installed = True
        return True

    def remove(self) -> None:
        """Take back what `install` did."""
        model = self._model
        if model is None or model.__dict__.get(_WALKS) is not self:
            return
        del model.__dict__[_WALKS]
        self.installed = False
        for method in (train, parameters):
            if getattr(model.__dict__.get(method.__name__), "__func__", None) is method:
                del model.__dict__[method.__name__]


def _trains_alike(module: nn.Module, is_root: bool) -> bool:
    """Whether `train` changes nothing of a module whose `training`, in its dictionary, is true.

    torch.compile's module has that of what it compiles, and a scripted one in C++.
    """
    own = module.__dict__
    return type(module).train in _TRAINS_ALIKE and (is_root or "train" not in own) and "training" in own


def train(self: Any, mode: bool = True) -> Any:
    """The model's `train`, without a walk if it would change nothing."""
    walks = _walks_of(self)
    return self if mode is True and walks is not None and walks.all_train() else type(self).train(self, mode)


def parameters(self: Any, recurse: bool = True) -> Iterator[nn.Parameter]:
    """The model's `parameters`, from the list."""
    walks = _walks_of(self)
    found: Iterator[nn.Parameter] = (
        iter(walks.parameters()) if recurse is True and walks is not None else type(self).parameters(self, recurse)
    )
    return found


def _walks_of(model: Any) -> Walks | None:
    """Those that list this very object: a shallow copy has its original's."""
    walks: Walks | None = model.__dict__.get(_WALKS)
    return walks if walks is not None and walks._model is model else None
