"""What a layer keeps for its backward pass, and what is made again there instead, without a matrix product.

Of a layer's activations the norms keep their input, SwiGLU its two. The outputs of both are functions of these by
elements, so what a linear layer would keep of its input is made again.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from .linear_prime_v2 import HOOKS


class PrimeV2RMSNorm(nn.RMSNorm):
    """RMSNorm that keeps its input for the backward pass and nothing else: PyTorch's own kernel, or on a CPU ours."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        weight: Any = self.weight
        composed = x.device.type == "cpu" and x.dtype == weight.dtype and x.dtype in (torch.float32, torch.float64)
        if not composed or type(x) is not Tensor or type(weight) not in (Tensor, nn.Parameter):
            return super().forward(x)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return super().forward(x)
        return _RMSNorm.apply(x, weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return nn.functional.rms_norm(x, x.shape[-1:], weight, eps)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        scale = (x.square().mean(-1, keepdim=True) + ctx.eps).rsqrt()
        normed = x * scale
        pulls = grad * normed
        share = (pulls @ weight).unsqueeze(-1) / -x.shape[-1]
        return torch.addcmul(grad * weight, normed, share).mul_(scale), pulls.sum_to_size(weight.shape), None


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, keeping the two inputs and nothing else for the backward pass.

    writes: whether the backward pass may write into the gradient that it is given, which nobody else has.
    """

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, writes: bool) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.writes = writes
        return nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        grad_up = nn.functional.silu(gate).mul_(grad)
        if ctx.writes and not torch.is_grad_enabled():  # gradients of gradients need it as it was
            return torch.ops.aten.silu_backward.grad_input(grad, gate, grad_input=grad).mul_(up), grad_up, None
        return torch.ops.aten.silu_backward(grad, gate).mul_(up), grad_up, None


class MadeAgain:
    """A tensor that autograd does not keep: `make()` gives it again in the backward pass.

    What is made stays until all that would have kept it have had it.
    """

    def __init__(self, tensor: Tensor, make: Callable[[], Tensor]):
        self.address, self.size, self.make = tensor.data_ptr(), tensor.numel(), make
        self.keepers, self.waiting = 0, 0
        self.made: Tensor | None = None

    def pack(self, kept: Tensor) -> Tensor | torch.Size:
        if kept.data_ptr() != self.address or kept.numel() != self.size or not kept.is_contiguous():
            return kept.detach()  # an output that knows the operation that keeps it would never be freed
        self.keepers += 1
        return kept.shape

    def unpack(self, kept: Tensor | torch.Size) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        if self.made is None:
            self.made, self.waiting = self.make(), self.keepers
        made, self.waiting = self.made, self.waiting - 1
        if self.waiting <= 0:
            self.made = None
        return made.view(kept)


def made_again(tensor: Tensor, make: Callable[[], Tensor], checkpointed: bool) -> AbstractContextManager[Any]:
    """Inside the block autograd has `MadeAgain` of a tensor, where that pays.

    It does not where no gradients are taken, a compiler decides itself, or the layer is checkpointed.
    """
    if checkpointed or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return nullcontext()
    again = MadeAgain(tensor, make)
    return saved_tensors_hooks(again.pack, again.unpack)


@contextmanager
def normed(norm: nn.Module, inputs: Tensor, checkpointed: bool) -> Iterator[Tensor]:
    """`norm(inputs)`, which autograd does not keep inside the block, unless something acts on the call of the norm."""
    outputs = norm(inputs)
    plain = type(norm) is PrimeV2RMSNorm and "forward" not in vars(norm)
    if not plain or any(getattr(norm, name) for name in HOOKS):
        yield outputs
        return
    with made_again(outputs, lambda: norm(inputs), checkpointed):
        yield outputs
