"""What FSDP2 gathers and scatters in a step of a patched model; for fsdp_script.py."""

from __future__ import annotations

from unittest import mock

import tiny_models
import torch.distributed.fsdp._fully_shard._fsdp_param_group as groups
from torch.distributed.fsdp import fully_shard

from chronicals_trl import patch_model


def traffic(checkpointing: bool) -> dict[str, float]:
    """Elements gathered and scattered in the second step, over the parameters of the model."""
    model = tiny_models.build("llama", num_hidden_layers=6, tie_word_embeddings=False)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if checkpointing:
        model.gradient_checkpointing_enable()
    patch_model(model)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    moved = {"gathered": 0, "scattered": 0}
    gather, reduce = groups.foreach_all_gather, groups.foreach_reduce

    def counting_gather(params, *args, **kwargs):
        moved["gathered"] += sum(param._orig_size.numel() for param in params)
        return gather(params, *args, **kwargs)

    def counting_reduce(params, gradients, *args, **kwargs):
        moved["scattered"] += sum(gradient.numel() for gradient in gradients)
        return reduce(params, gradients, *args, **kwargs)

    batch = tiny_models.packed_batch()
    with (
        mock.patch.object(groups, "foreach_all_gather", counting_gather),
        mock.patch.object(groups, "foreach_reduce", counting_reduce),
    ):
        for _ in range(2):
            moved.update(gathered=0, scattered=0)
            model(**batch, use_cache=False, fused_lm_head=True).loss.backward()
    return {name: count / parameters for name, count in moved.items()}
