"""A model whose weights lie on several processes: how FSDP2 shards it, and a whole copy of it for evaluation."""

from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from prime_v2.eval.families import FAMILY_OF_TYPE


class _KeepName(TrainerCallback):
    """FSDP2 makes a model an instance of a class of its own; by name and module it stays the one it was.

    Transformers copies the code of a model into its folder by the module of its class.
    """

    def __init__(self, model: Any):
        self.name, self.module = type(model).__name__, type(model).__module__

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if isinstance(model, FSDPModule):
            type(model).__name__ = type(model).__qualname__ = self.name
            type(model).__module__ = self.module


def prepare_sharding(trainer: Any) -> None:
    """Tell Accelerate's FSDP2, where a run uses it, what it must know of these models before it shards them."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return
    # It would shard embedding and head by themselves, to be gathered by calls of them; but their weights are read as
    # matrices. Unnamed, they belong to the whole model and are there while it runs.
    for name in ("get_input_embeddings", "get_output_embeddings"):
        setattr(trainer.model, name, lambda: None)
    trainer.add_callback(_KeepName(trainer.model))
    policy = plugin.mixed_precision_policy
    if policy is not None:  # the noise levels are inputs, and stay float64
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=policy.param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )


def whole(model: Any) -> Any:
    """The model itself, or of one that FSDP2 has sharded a copy with all weights; all processes call it together.

    Likelihoods and `generate` call parts of a model and read weights outside any forward, for which FSDP gathers
    nothing. And the passes of a whole model need no other process, so that each can score texts of its own.
    """
    if not any(isinstance(module, FSDPModule) for module in model.modules()):
        return model
    with torch.random.fork_rng():
        copy = FAMILY_OF_TYPE[model.config.model_type].model_class(model.config)
    state = model.state_dict().items()
    copy.load_state_dict({key: each.full_tensor() if isinstance(each, DTensor) else each for key, each in state})
    copy.generation_config = model.generation_config
    return copy.to(model.device).eval()


__all__ = ["prepare_sharding", "whole"]
