"""Learning rates per kind of parameter: LoRA+ on top of whatever optimizer the Trainer made."""

from __future__ import annotations

from chronicals_trl.optim.lora_plus import apply_lora_plus, scale_rate_bounds, split_lora_plus_groups

__all__ = ["apply_lora_plus", "scale_rate_bounds", "split_lora_plus_groups"]
