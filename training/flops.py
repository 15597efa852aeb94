"""Arithmetic of a training step: the 6 N D rule and a count of the products that really run."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

# Dense matrix rates of accelerators in bf16, FLOP/s, by what their names contain. From NVIDIA's data sheets, which
# give those of the H100 and H200 with sparsity: half of it here. "H100 80GB HBM3" is the SXM card; others are slower.
COUNTED_BATCHES = 8  # micro-batches: how many tokens the noise hides, and so what a head costs, varies with each
PEAK_BF16_FLOPS = {"A100": 312e12, "H100 80GB HBM3": 989e12, "H200": 989e12}


def count_parameters(model: PreTrainedModel) -> dict[str, int]:
    """{"total", "non_embedding"}: the second leaves out the input embedding and the head."""
    total = sum(parameter.numel() for parameter in model.parameters())
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    outside = {id(weight) for module in ends if module for weight in module.parameters()}
    head_nodes: Any = getattr(model, "head_nodes", None)
    if head_nodes is not None:
        outside.add(id(head_nodes.table.weight))
    non_embedding = sum(each.numel() for each in model.parameters() if id(each) not in outside)
    return {"total": total, "non_embedding": non_embedding}


def six_n_d(num_parameters: int, num_tokens: int) -> int:
    """FLOPs of training by the 6 N D rule (Kaplan et al., arXiv:2001.08361), N without embeddings."""
    return 6 * num_parameters * num_tokens


def measure_flops(step: Callable[[], torch.Tensor]) -> int:
    """FLOPs of one forward and backward pass as counted by PyTorch: only matrix products and attention."""
    with FlopCounterMode(display=False) as counter:
        step().backward()
    return counter.get_total_flops()


def flops_per_token(step: Callable[[dict[str, torch.Tensor]], torch.Tensor], batches: Iterable[dict]) -> float:
    """FLOPs a token of training, over some batches: step(batch) is the loss, batches have `input_ids` (B, L)."""
    flops, tokens = 0, 0
    for batch in batches:
        flops += measure_flops(partial(step, batch))
        tokens += batch["input_ids"].numel()
    return flops / tokens


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 rate where it is known, else None."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for key, rate in PEAK_BF16_FLOPS.items() if key in name), None)
