"""The lists of `model/walks.py` in the trainer: on inside `train`, for a model that no engine has taken over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from chronicals_trl.config import ChronicalsConfig
from chronicals_trl.model.walks import Walks


class WalksMixin(Trainer):
    """The methods of `SFTTrainer` in which a model would be walked through; the parent's with the flag off."""

    # Of the trainer that mixes this in.
    _chronicals: ChronicalsConfig | None
    _engine_in_the_way: Callable[[], str | None]

    _walks: Walks | None = None
    _counted: tuple[int, int] | None = None  # the lists' generation, and operations for a token

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        finally:
            if self._walks is not None:
                self._walks.remove()
                self._walks = None

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        if self._chronicals is not None and self._walks is None and self._engine_in_the_way() is None:
            # Here, and not before: by now the model is the one that is trained, DDP's module around it included.
            self._walks, self._counted = Walks(model), None
            self._walks.install()
        return super().training_step(model, *args, **kwargs)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        # Trainer's goes by the batch's tokens and the model's parameters, which it counts anew for each batch.
        walks, tokens = self._walks, inputs.get(getattr(self.model, "main_input_name", "input_ids"))
        if walks is None or not walks.installed or not isinstance(tokens, Tensor) or not tokens.numel():
            return super().floating_point_ops(inputs)
        if self._counted is None or self._counted[0] != walks.generation:
            self._counted = walks.generation, super().floating_point_ops(inputs) // tokens.numel()
        return self._counted[1] * tokens.numel()
