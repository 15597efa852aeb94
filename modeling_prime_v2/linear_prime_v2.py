"""Products with a weight matrix; in float32 on a CPU they run in oneDNN.

PyTorch gives float32 products to MKL and keeps oneDNN for lower precisions. For the matrices of a Transformer oneDNN
is the faster of the two on AMD's processors (`benchmarks/products.py`). PyTorch's own product is there again after
`torch.backends.mkldnn.set_flags(False)`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry, register_flop_formula

# Multiplications below which the call costs more than it gains.
FEWEST_MULTIPLICATIONS = 2**24
_ONEDNN: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def product(inputs: Tensor, weight: Tensor) -> Tensor:
    """inputs (..., K) @ weight (N, K).T, differentiable: `nn.functional.linear`, by the faster library."""
    if not _onednn_pays(inputs, weight):
        return nn.functional.linear(inputs, weight)
    return _Product.apply(inputs, weight) if torch.is_grad_enabled() else _by_onednn(inputs, weight)


class PrimeV2Linear(nn.Linear):
    """nn.Linear with `product`."""

    def forward(self, inputs: Tensor) -> Tensor:
        result = product(inputs, self.weight)
        return result if self.bias is None else result + self.bias


def _onednn_pays(inputs: Tensor, weight: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and inputs.device.type == "cpu"
        and inputs.dtype == weight.dtype == torch.float32
        and inputs.numel() * len(weight) >= FEWEST_MULTIPLICATIONS
        and type(inputs) is Tensor  # subclasses (sharded, quantized, fake) have products of their own
        and type(weight) in (Tensor, nn.Parameter)
        and _ONEDNN is not None
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
    )


def _by_onednn(inputs: Tensor, weight: Tensor) -> Tensor:
    return _ONEDNN(inputs, weight, None, "none", [], "")


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs, weight):
        ctx.save_for_backward(inputs, weight)
        return _by_onednn(inputs, weight)

    @staticmethod
    def backward(ctx, grad):
        inputs, weight = ctx.saved_tensors
        need_inputs, need_weight = ctx.needs_input_grad
        grad_inputs = product(grad, weight.t()) if need_inputs else None
        grad_weight = grad.reshape(-1, len(weight)).t() @ inputs.reshape(-1, weight.shape[1]) if need_weight else None
        return grad_inputs, grad_weight


def _count_flops(inputs_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    """2 * multiplications, as PyTorch's counter has it for its own products."""
    return 2 * inputs_shape.numel() * weight_shape[0]


# A model's folder brings a copy of this file.
if _ONEDNN is not None and _ONEDNN not in flop_registry:
    register_flop_formula(_ONEDNN)(_count_flops)

__all__ = ["PrimeV2Linear", "product"]
