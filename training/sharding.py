"""A model whose weights lie on several processes: how FSDP2 shards it, and a whole copy of it for evaluation."""

from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from prime_v2.families import FAMILY_OF_TYPE


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


class _NameReadWeights(TrainerCallback):
    """ZeRO-3 gathers a module's weights for its call; the model's own forward also reads those outside its layers."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        import deepspeed

        in_layers = {id(weight) for weight in model.base_model.layers.parameters()}
        for weight in model.parameters():
            if id(weight) not in in_layers and hasattr(weight, "ds_id"):
                deepspeed.zero.register_external_parameter(model, weight)


def prepare_sharding(trainer: Any) -> None:
    """Tell FSDP2 or ZeRO-3, where a run uses one of them, what it must know of these models."""
    if trainer.is_deepspeed_enabled:
        trainer.add_callback(_NameReadWeights())
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
    """The model itself, or of one that FSDP2 or ZeRO-3 has sharded a copy with all weights; all processes call it.

    Likelihoods and `generate` call parts of a model and read weights outside any forward, for which nothing is
    gathered. And the passes of a whole model need no other process, so that each can score texts of its own.
    """
    by_zero = any(hasattr(weight, "ds_id") for weight in model.parameters())
    if not by_zero and not any(isinstance(module, FSDPModule) for module in model.modules()):
        return model
    with torch.random.fork_rng():
        copy = FAMILY_OF_TYPE[model.config.model_type].model_class(model.config)
    copy.load_state_dict(_gathered_by_zero(model) if by_zero else _gathered(model))
    copy.generation_config = model.generation_config
    return copy.to(model.device).eval()


def _gathered(model: Any) -> dict[str, torch.Tensor]:
    state = model.state_dict().items()
    return {key: each.full_tensor() if isinstance(each, DTensor) else each for key, each in state}


def _gathered_by_zero(model: Any) -> dict[str, torch.Tensor]:
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {key: each.detach().clone() for key, each in model.state_dict().items()}
