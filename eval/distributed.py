"""A model whose weights lie on several processes, made whole for what is not a training step."""

from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from prime_v2.eval.families import FAMILY_OF_TYPE


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


__all__ = ["whole"]
