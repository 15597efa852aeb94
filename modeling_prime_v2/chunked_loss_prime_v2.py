"""Nats of the hidden units from hidden states, in chunks: the (N, V) logits of a training step never exist.

Head product, carry-over filter, log-softmax, digit marginals, loss and gradient are computed for a chunk of tokens at
a time; the gradient with respect to hidden states and head is formed in the forward pass, since the weight of each
token is known there (no recomputation, three matrix products in all, as for full logits). A head that is no plain
weight (`linear_prime_v2`) is called for each chunk, and called again for it in the backward pass.

With q the filtered softmax of one token, x its id, w its weight, and m_j = sum of q(v) over C[v, j] = C[x, j]:
    "token"   nats = -log q(x)
              d/dz_v = w (q_v - [v = x])
    "digits"  nats = -sum over hidden j of log m_j
              d/dz_v = q_v (w #hidden - sum_j (w / m_j) [C[v, j] = C[x, j]])
    "prefix"  nats = -log m, m = q(tokens sharing x's digits that are visible after the next reveal)
              d/dz_v = q_v (w - (w / m) [v shares them])
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from .linear_prime_v2 import CalledHead, add_product, product
from .stage_head_prime_v2 import stage_nll

# Elements of a chunk's logits: 24 MiB of float32 on a CPU (near its caches; allocators keep blocks below 32 MiB).
CHUNK_ELEMENTS_CPU = 3 * 2**21
# On an accelerator, one for so many bytes of memory; a chunk takes some 20 bytes an element, so 1/32 of the memory.
BYTES_PER_CHUNK_ELEMENT = 640
# A marginal below this is recomputed from logarithms: its terms come near 1e-38, where a float32 softmax underflows.
RARE_MARGINAL = 1e-25


@dataclass
class HiddenTokens:
    """The N tokens that have a hidden unit, and what is predicted of each.

    ids (N,) int64; visible (N, S) bool (None without a code table); weights (N,) float, the factor of a token's nats;
    target_digits (N, S) bool for "prefix", the digits visible after the next reveal.
    """

    ids: Tensor
    visible: Tensor | None
    weights: Tensor
    target_digits: Tensor | None = None


def hidden_nll(hidden_states, head, table, tokens: HiddenTokens, kind: str, carry_over: bool = True):
    """Weighted sum of nats (scalar, differentiable) and nats per token (N,), detached.

    hidden_states (N, D); head: a weight (V, D), a HeadCall or a StageHead; table a PrimeV2CodeTable; kind "token",
    "digits" or "prefix". Of a StageHead only the stages that are predicted are computed: what is visible, and what is
    after a "prefix", must end where its stages do; those of "digits" need all tokens' probabilities.
    Under autocast the products run in its dtype; sums, softmax and the head's gradient are float32.
    """
    if kind not in ("token", "digits", "prefix"):
        raise ValueError(f'kind={kind!r} is not one of "token", "digits", "prefix"')
    if kind != "digits" and getattr(head, "tree", None) is not None and head.weight is not None:
        first = torch.zeros_like(tokens.ids) if tokens.visible is None else tokens.visible.sum(-1)
        last = torch.full_like(tokens.ids, head.num_subtokens)
        if kind == "prefix":
            last = tokens.target_digits.sum(-1)
        chunk = chunk_elements(hidden_states.device)
        return stage_nll(hidden_states, head, tokens.ids, first, last, tokens.weights, chunk)
    return chunked_loss(hidden_states, head, tokens, partial(_Chunk, table, kind, carry_over))


def chunked_loss(hidden_states, head: Tensor | CalledHead, tokens, make_chunk: Callable) -> tuple[Tensor, Tensor]:
    """Weighted sum of nats (scalar, differentiable) and nats per token (N,), detached, of any loss of single tokens.

    hidden_states (N, D); head: a weight (V, D) or a HeadCall; tokens: anything with `weights` (N,).
    make_chunk(need_gradient, dtype) gives a function of (logits (C, V), tokens, which of them: a slice) that returns
    nats (C,) and, where needed, the gradient of the weighted nats (C, V), else None. It may write into the logits.
    """
    device_type = hidden_states.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else hidden_states.dtype
    # Asked here: inside `forward` of an autograd function gradients are always off, and needs_input_grad ignores it.
    need_gradient = torch.is_grad_enabled()
    if not isinstance(head, Tensor):
        return _loss_by_calls(
            hidden_states, head, tokens, make_chunk(need_gradient, torch.promote_types(dtype, torch.float32))
        )
    with torch.autocast(device_type, enabled=False):
        return _ChunkedLoss.apply(hidden_states, head, tokens, make_chunk, dtype, need_gradient)


def _loss_by_calls(hidden_states, head: CalledHead, tokens, chunk: Callable) -> tuple[Tensor, Tensor]:
    """`chunked_loss` of a head that is called; autocast acts on the call as on any other."""

    def of_part(inputs: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        return _LossOfLogits.apply(head.call(inputs), tokens, part, chunk)

    rows = max(1, chunk_elements(hidden_states.device) // head.vocab_size)
    total, nats = hidden_states.new_zeros((), dtype=torch.promote_types(hidden_states.dtype, torch.float32)), []
    for start in range(0, len(hidden_states), rows):
        part = slice(start, start + rows)
        if torch.is_grad_enabled():
            part_total, part_nats = checkpoint(of_part, hidden_states[part], part, use_reentrant=False)
        else:
            part_total, part_nats = of_part(hidden_states[part], part)
        total = total + part_total
        nats.append(part_nats)
    return total, torch.cat(nats) if nats else total.new_zeros(0)


class _LossOfLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, tokens, part, chunk):
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)  # `chunk` may write into it
        with torch.autocast(logits.device.type, enabled=False):
            nats, gradient = chunk(exact, tokens, part)
            nats = nats.to(exact.dtype)
        ctx.gradient, ctx.dtype = gradient, logits.dtype
        ctx.mark_non_differentiable(nats)
        return (nats * tokens.weights[part].to(nats.dtype)).sum(), nats

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _):
        return (ctx.gradient * grad_loss).to(ctx.dtype), None, None, None


def token_nll(hidden_states, head, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """`hidden_nll` of whole tokens without a code table: -log softmax at ids (N,), weighted by weights (N,)."""
    return hidden_nll(hidden_states, head, None, HiddenTokens(ids, None, weights), "token", carry_over=False)


def chunk_elements(device: torch.device) -> int:
    """How many logits are computed at once; from the memory that a device has, not from what is free.

    Sums depend on the size of the chunks in their last digits, and a run that is resumed must not.
    """
    if device.type == "cpu":
        return CHUNK_ELEMENTS_CPU
    _, total = torch.accelerator.get_memory_info(device)
    return total // BYTES_PER_CHUNK_ELEMENT


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states, head_weight, tokens, make_chunk, dtype, need_gradient):
        exact = torch.promote_types(dtype, torch.float32)
        inputs, head = hidden_states.to(dtype), head_weight.to(dtype)
        need_inputs, need_head = (need_gradient and each for each in ctx.needs_input_grad[:2])
        grad_inputs = torch.empty_like(hidden_states) if need_inputs else None
        grad_head = torch.zeros_like(head_weight, dtype=exact) if need_head else None
        nats = torch.empty(len(inputs), dtype=exact, device=inputs.device)
        chunk = make_chunk(need_inputs or need_head, exact)
        rows = max(1, chunk_elements(inputs.device) // head.shape[0])
        for start in range(0, len(inputs), rows):
            part = slice(start, start + rows)
            logits = product(inputs[part], head).to(exact)
            nats[part], gradient = chunk(logits, tokens, part)
            if gradient is None:
                continue
            gradient = gradient.to(dtype)
            if need_inputs:
                grad_inputs[part] = product(gradient, head.t())
            if need_head:
                add_product(grad_head, gradient.T, inputs[part])
        ctx.gradients, ctx.head_dtype = (grad_inputs, grad_head), head_weight.dtype
        ctx.mark_non_differentiable(nats)
        return (nats * tokens.weights.to(exact)).sum(), nats

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _):
        """Scales the gradients in place (the head's is as large as the head), so that they can be used once."""
        if ctx.gradients is None:
            raise RuntimeError("the gradient of this loss was already taken; compute the loss again")
        (grad_inputs, grad_head), ctx.gradients = ctx.gradients, None
        if grad_inputs is not None:
            grad_inputs.mul_(grad_loss.to(grad_inputs.dtype))
        if grad_head is not None:
            grad_head = grad_head.mul_(grad_loss).to(ctx.head_dtype)
        return grad_inputs, grad_head, None, None, None, None


class _Chunk:
    """Turns a chunk's logits (C, V) into nats (C,) and the gradient of the weighted nats (C, V) where it is needed."""

    def __init__(self, table, kind: str, carry_over: bool, need_gradient: bool, dtype: torch.dtype):
        self.table, self.kind, self.carry_over, self.need_gradient = table, kind, carry_over, need_gradient
        if table is None:
            return
        self.packed = table.packed_codes()  # (V,)
        self.columns = table.codes[:-1] + table.base * torch.arange(table.num_subtokens, device=self.packed.device)
        self.one_hot = table.one_hot(dtype) if kind == "digits" else None

    def __call__(self, logits: Tensor, tokens: HiddenTokens, part: slice) -> tuple[Tensor, Tensor | None]:
        ids, weights = tokens.ids[part], tokens.weights[part].to(logits.dtype)
        if self.kind == "token" and not self.carry_over:
            return self._token(logits, ids, weights)
        visible = tokens.visible[part]
        if self.carry_over:
            logits.masked_fill_(self._sharing(ids, visible).logical_not_(), -torch.inf)
        if self.kind == "token":
            return self._token(logits, ids, weights)
        if self.kind == "digits":
            columns, hidden = self.columns[ids], ~visible
            nats, gradient, rare = self._digits(logits, weights, columns, hidden)
            groups = ((self.one_hot.T[columns[rare, j]] > 0, hidden[rare, j]) for j in range(columns.shape[1]))
        else:
            shared = self._sharing(ids, tokens.target_digits[part])
            nats, gradient, rare = self._prefix(logits.softmax(-1), weights, shared)
            groups = ((shared[rare], rare[rare]) for _ in range(1))
        if rare is not None:
            nats[rare], exact = self._from_logarithms(logits[rare], weights[rare], groups)
            if gradient is not None:
                gradient[rare] = exact
        return nats, gradient

    def _sharing(self, ids: Tensor, digits: Tensor) -> Tensor:
        """Which tokens have the digits of `ids` (C,) where `digits` (C, S) bool is True: (C, V) bool."""
        fields = self.table.pack_visible(digits).unsqueeze(1)
        return (self.packed & fields) == (self.packed[ids].unsqueeze(1) & fields)

    def _from_logarithms(self, logits: Tensor, weights: Tensor, groups) -> tuple[Tensor, Tensor | None]:
        """Nats and gradient of any size. groups: (the tokens that share the target (C, V), whether it is one (C,))."""
        log_total, probabilities = logits.logsumexp(-1), logits.softmax(-1)
        nats, gradient = torch.zeros_like(log_total), torch.zeros_like(logits) if self.need_gradient else None
        for shared, is_target in groups:
            within = logits.masked_fill(~shared, -torch.inf)
            nats += torch.where(is_target, log_total - within.logsumexp(-1), 0.0)
            if gradient is not None:
                gradient += torch.where(is_target, weights, 0.0).unsqueeze(1) * (probabilities - within.softmax(-1))
        return nats, gradient

    def _token(self, logits: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor | None]:
        # The largest logit has probability 1 / sum exp(l - largest): one pass of exponentials serves both results.
        gradient = logits.softmax(-1)
        log_total = logits.amax(-1) - gradient.amax(-1).log()
        nats = log_total - logits.gather(1, ids.unsqueeze(1)).squeeze(1)
        if not self.need_gradient:
            return nats, None
        gradient.scatter_add_(1, ids.unsqueeze(1), gradient.new_full((len(ids), 1), -1.0))
        return nats, gradient.mul_(weights.unsqueeze(1))

    def _digits(self, logits, weights, columns, hidden) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(nats, gradient, rare tokens (C,) or None); writes into the logits, unless rare tokens need them."""
        probabilities, one_hot = logits.softmax(-1), self.one_hot.to(logits.dtype)
        marginals = (probabilities @ one_hot).gather(1, columns)  # (C, S), of the token's own digits
        rare = _if_any(((marginals < RARE_MARGINAL) & hidden).any(1))
        marginals = marginals.clamp(min=RARE_MARGINAL)
        nats = -torch.where(hidden, marginals.log(), 0.0).sum(1)
        if not self.need_gradient:
            return nats, None, rare
        pull = torch.where(hidden, weights.unsqueeze(1) / marginals, 0.0)  # (C, S)
        pull = marginals.new_zeros(len(weights), one_hot.shape[1]).scatter_(1, columns, pull)
        push = (weights * hidden.sum(1)).unsqueeze(1)
        factors = torch.addmm(push, pull, one_hot.T, alpha=-1.0, out=logits if rare is None else None)
        return nats, probabilities.mul_(factors), rare

    def _prefix(self, probabilities, weights, shared) -> tuple[Tensor, Tensor | None, Tensor | None]:
        mass = (probabilities * shared).sum(1)
        rare = _if_any(mass < RARE_MARGINAL)
        mass = mass.clamp(min=RARE_MARGINAL)
        if not self.need_gradient:
            return -mass.log(), None, rare
        pull = (weights / mass).unsqueeze(1)
        return -mass.log(), probabilities.mul_(weights.unsqueeze(1) - pull * shared), rare


def _if_any(rare: Tensor) -> Tensor | None:
    """None where nothing is rare, nearly always: the one value of a chunk that the host reads."""
    return rare if rare.any() else None
