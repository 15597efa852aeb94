"""Linear layers, heads and tables of vectors, as they act with all that others have attached to them.

A layer that is PyTorch's own, with nothing attached, may be computed from its weight: `plain_weight`. Any other is
called: adapters (peft), quantised layers (torch.ao, torchao), offloading (accelerate), hooks and sharding act on the
*call* of a module, and what reads `module.weight` past it gets another layer's numbers, or memory that is not filled.

From their weights float32 products on a CPU run in oneDNN. PyTorch gives them to MKL and keeps oneDNN for lower
precisions; for the matrices of a Transformer oneDNN is the faster of the two on AMD's processors
(`benchmarks/products.py`). PyTorch's own product is there again after `torch.backends.mkldnn.set_flags(False)`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry, register_flop_formula

# Multiplications below which the call costs more than it gains.
FEWEST_MULTIPLICATIONS = 2**24
# Hooks of a module. Those on all modules of a process (profilers, FLOP counters) watch and do not count.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_ONEDNN: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def product(inputs: Tensor, weight: Tensor) -> Tensor:
    """inputs (..., K) @ weight (N, K).T, differentiable: `nn.functional.linear`, by the faster library."""
    if not _onednn_pays(inputs, weight):
        return nn.functional.linear(inputs, weight)
    return _Product.apply(inputs, weight) if torch.is_grad_enabled() else _by_onednn(inputs, weight)


class CalledHead(Protocol):
    """What a head that is no weight has: a call, hidden states (..., D) to logits (..., V), and V."""

    def call(self, hidden_states: Tensor, /) -> Tensor: ...

    @property
    def vocab_size(self) -> int: ...


class HeadCall(NamedTuple):
    """A head that has to be called: hidden states (..., D) to logits (..., V)."""

    call: Callable[[Tensor], Tensor]
    vocab_size: int


def plain_weight(layer: Any) -> Tensor | None:
    """The weight of a linear layer or a table of vectors whose call is PyTorch's own; None where something acts on it.

    None: another class in its place, hooks, a `forward` of its own (accelerate's offloading), a weight of another
    class (quantised, sharded).
    """
    own = type(layer) in (nn.Linear, nn.Embedding) and "forward" not in vars(layer)
    if not own or any(getattr(layer, name) for name in HOOKS) or type(layer.weight) not in (Tensor, nn.Parameter):
        return None
    return layer.weight


def whole_weight(layer: Any) -> Tensor | None:
    """`plain_weight` of a linear layer that is nothing but its weight: None with a bias, too."""
    return None if getattr(layer, "bias", None) is not None else plain_weight(layer)


def linear(layer: Any, inputs: Tensor) -> Tensor:
    """`layer(inputs)`, inputs (..., K) to (..., N), with `product` where it pays."""
    weight = None if torch.compiler.is_compiling() else plain_weight(layer)
    if weight is None or not _onednn_pays(inputs, weight):
        return layer(inputs)
    result = product(inputs, weight)
    return result if layer.bias is None else result + layer.bias


def head_of(layer: Any, vocab_size: int, shared: Tensor | None = None) -> Tensor | HeadCall:
    """The head that a linear layer is, its weight (V, D) where that is all of it; `shared` (V, D) adds to its rows."""
    weight = whole_weight(layer)
    if weight is not None:
        return weight if shared is None else weight + shared
    if shared is None:
        return HeadCall(layer, vocab_size)
    return HeadCall(lambda hidden_states: layer(hidden_states) + product(hidden_states, shared), vocab_size)


def apply_head(hidden_states: Tensor, head: Tensor | CalledHead) -> Tensor:
    """Hidden states (..., D) to logits (..., V) by a weight (V, D) or a call."""
    return product(hidden_states, head) if isinstance(head, Tensor) else head.call(hidden_states)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, without a second tensor of its size where the dtypes allow it."""
    if left.dtype == total.dtype:
        torch.addmm(total, left, right, out=total)  # not addmm_, which the FLOP counter does not see
    else:
        total.add_(left @ right)


def all_vectors(table: Any, count: int) -> Tensor:
    """The first `count` vectors of a table, (count, D), differentiable: what ties a head to its embedding.

    `forward` is called and not the module: hooks on an embedding are for embedded texts (NEFTune adds noise), while
    adapters and offloading are in `forward` itself.
    """
    weight = plain_weight(table)
    if weight is not None:
        return weight[:count]
    device = table.weight.device  # a device to compute on, unless the weight is offloaded, which moves its inputs
    return table.forward(torch.arange(count, device="cpu" if device.type == "meta" else device))


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
        grad_weight = _weight_gradient(grad, inputs) if need_weight else None
        del inputs  # which may have been made again for this (kept_prime_v2.py): not there beside their gradient
        return product(grad, weight.t()) if need_inputs else None, grad_weight


def _weight_gradient(grad: Tensor, inputs: Tensor) -> Tensor:
    """Gradient of `product` (..., N) and its inputs (..., K) to the weight's gradient (N, K).

    oneDNN is at its best where its result has more columns than rows, so that of a tall weight is computed transposed.
    """
    outer, inner = grad.reshape(-1, grad.shape[-1]).t(), inputs.reshape(-1, inputs.shape[-1]).t()
    return product(outer, inner) if len(outer) <= len(inner) else product(inner, outer).t()


def _count_flops(inputs_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    """2 * multiplications, as PyTorch's counter has it for its own products."""
    return 2 * inputs_shape.numel() * weight_shape[0]


# A model's folder brings a copy of this file.
if _ONEDNN is not None and _ONEDNN not in flop_registry:
    register_flop_formula(_ONEDNN)(_count_flops)
