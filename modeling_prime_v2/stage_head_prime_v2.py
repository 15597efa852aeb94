"""A head in stages of the code tree: a softmax over the next digits, from rows of the visible node's children only.

    p(token) = product over stages j of softmax over the children c of the token's node at the end of stage j - 1,
               of hidden state . row of c,  at the token's own child
Known as class-based or hierarchical softmax (Goodman, ICASSP 2001; Morin and Bengio, AISTATS 2005). The conditional
within a visible node is that of the full head after the carry-over filter; what is predicted of a hidden token costs
as many products as its node has children, not V.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .code_table_prime_v2 import num_nodes
from .linear_prime_v2 import add_product, linear, product, whole_weight

TAKEN = "the gradient of this loss was already taken; compute the loss again"


class CodeTree:
    """Where the rows of a head in stages are: level by level, whole tokens last, each level in the order of the codes.

    codes (V, S): the table C. ends: rising digit counts at which the stages end, the last S. A level before the last
    has base**d rows, those of nodes without tokens included; a node's children have neighbouring rows.
    """

    def __init__(self, codes: Tensor, base: int, ends: tuple[int, ...]):
        self.num_tokens, num_subtokens, self.ends = len(codes), codes.shape[1], ends
        widths = (base ** (end - start) for start, end in zip((0, *ends[:-1]), ends, strict=True))
        # Of a token's nodes, over the stages.
        self.most_children = sum(min(width, self.num_tokens) for width in widths)
        powers = base ** torch.arange(num_subtokens - 1, -1, -1, device=codes.device)
        value = (codes * powers).sum(1)  # (V,)
        self.order = value.argsort()  # (V,), token ids
        rank = torch.empty_like(self.order)
        rank[self.order] = torch.arange(len(rank), device=rank.device)
        self.levels, first = [], 0
        for start, end in zip((0, *ends[:-1]), ends, strict=True):
            parent = value // base ** (num_subtokens - start)
            if end < num_subtokens:
                node, width = value // base ** (num_subtokens - end), base ** (end - start)
                starts = torch.arange(base**start, device=codes.device) * width
                used = torch.zeros(base**end, dtype=torch.bool, device=codes.device)
                used[node] = True
                counts = torch.full_like(starts, width)
            else:
                node, used = rank, None
                counts = parent.bincount(minlength=base**start)
                starts = counts.cumsum(0) - counts
            self.levels.append(Level(first, parent, node, starts, counts, used))
            first += base**end if end < num_subtokens else self.num_tokens


@dataclass
class Level:
    """The rows of one stage, in the head from `first` on.

    parent (V,): a token's node at the end of the stage before; node (V,): its own row of this level; starts, counts
    (parents,): the rows of a parent's children; used (rows,) bool: which rows have tokens, None for all.
    """

    first: int
    parent: Tensor
    node: Tensor
    starts: Tensor
    counts: Tensor
    used: Tensor | None

    def log_softmax(self, scores: Tensor) -> Tensor:
        """Scores of the rows (..., rows) to log-probabilities of each token's node given its parent, (..., V)."""
        places = torch.arange(int(self.counts.max()), device=scores.device)
        present = places < self.counts.unsqueeze(1)  # (parents, children)
        rows = (self.starts.unsqueeze(1) + places).masked_fill(~present, 0)
        if self.used is not None:
            present = present & self.used[rows]
        present = present | ~present.any(1, keepdim=True)  # no token is below such a node; without NaN
        padded = scores[..., rows].masked_fill(~present, -torch.inf).log_softmax(-1).flatten(-2)
        return padded[..., self.parent * len(places) + self.node - self.starts[self.parent]]


def num_rows(base: int, ends: tuple[int, ...], vocab_size: int) -> int:
    """Rows of a head with these stages."""
    return num_nodes(base, ends[:-1]) + vocab_size


class StageHead:
    """A head in stages, used as a `linear_prime_v2.HeadCall`: log-probabilities of all tokens; and by `stage_nll`."""

    def __init__(self, layer: Any, table: Any, ends: tuple[int, ...]):
        """layer: linear, (..., D) to the rows of `CodeTree`; table: a PrimeV2CodeTable."""
        self.layer, self.vocab_size, self.num_subtokens = layer, table.vocab_size, table.num_subtokens
        self.tree = CodeTree(table.codes[:-1], table.base, ends)
        self.late: LateGradient | None = None  # of the next `stage_nll`

    @property
    def weight(self) -> Tensor | None:
        """The rows; None where something acts on the call of the layer, or it has a bias."""
        return whole_weight(self.layer)

    def call(self, hidden_states: Tensor) -> Tensor:
        """Hidden states (..., D) to log p(token) with nothing visible, (..., V), at least float32.

        Tokens below a visible node keep their proportions, so that the carry-over filter leaves p(token | node).
        """
        scores = linear(self.layer, hidden_states)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        total: Any = 0.0
        levels = self.tree.levels
        for level, after in zip(levels, [*levels[1:], None], strict=True):
            total = total + level.log_softmax(scores[..., level.first : after.first if after else None])
        return total


def stage_nll(hidden_states, head: StageHead, ids, first, last, weights, chunk: int) -> tuple[Tensor, Tensor]:
    """Weighted sum of nats (scalar, differentiable) and nats per token (N,), detached, from a head with a weight.

    hidden_states (N, D); ids (N,); first, last (N,) int64: digits visible now, and after what is predicted, both at
    ends of stages (or 0). weights (N,). chunk: elements of logits that are computed at once. Under autocast products
    run in its dtype; sums, softmax and the head's gradient are float32.
    """
    device_type, weight = hidden_states.device.type, head.weight
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else hidden_states.dtype
    late, head.late = head.late, None
    if late is not None and len(ids) * head.tree.most_children > weight.numel():
        late = None  # the gradients of the logits, which it keeps, take more than that of the head
    with torch.autocast(device_type, enabled=False):
        units = (ids, first, last, weights)
        rows = weight if late is None else weight.detach()
        parts = None if late is None else late.parts
        need = torch.is_grad_enabled()
        total, nats = _StageLoss.apply(hidden_states, rows, head.tree, units, dtype, need, chunk, parts)
        return total if late is None else total + late.zero, nats


class LateGradient:
    """Has the gradient of a head in stages formed after those of the network, whose activations are gone by then.

    Made before the network runs: autograd goes backward first through what was made last. `zero` is added to the loss;
    its gradient is the head's, formed from `parts`: (hidden states, what `_add_rows` takes) of each chunk.
    """

    def __init__(self, weight: Tensor):
        self.parts: list[tuple[Tensor, Tensor, Tensor, list]] = []
        self.zero = _LateRows.apply(weight, self.parts)

    @classmethod
    def of(cls, layer: Any) -> "LateGradient | None":
        """Of a linear layer that is its weight and is trained; else None."""
        weight = whole_weight(layer)
        if weight is None or not (weight.requires_grad and torch.is_grad_enabled()) or torch.compiler.is_compiling():
            return None
        return cls(weight)


class _LateRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, parts):
        ctx.parts, ctx.shape, ctx.dtype = parts, weight.shape, weight.dtype
        return weight.new_zeros((), dtype=torch.promote_types(weight.dtype, torch.float32))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        if ctx.parts is None:
            raise RuntimeError(TAKEN)
        parts, ctx.parts = ctx.parts, None
        total = grad_loss.new_zeros(ctx.shape)
        for inputs, tokens, gradient, blocks in parts:
            _add_rows(total, gradient, inputs[tokens], blocks)
        parts.clear()
        return total.mul_(grad_loss).to(ctx.dtype), None


class _StageLoss(torch.autograd.Function):
    """Forms the gradients in the forward pass, as `chunked_loss_prime_v2` does; late: where the head's parts go."""

    @staticmethod
    def forward(ctx, hidden_states, weight, tree, units, dtype, need_gradient, chunk, late):
        exact = torch.promote_types(dtype, torch.float32)
        ids, first, last, weights = units
        inputs, head, weights = hidden_states.to(dtype), weight.to(dtype), weights.to(exact)
        need_inputs, need_head = (need_gradient and each for each in ctx.needs_input_grad[:2])
        grad_inputs = torch.zeros_like(hidden_states, dtype=exact) if need_inputs else None
        grad_head = torch.zeros_like(weight, dtype=exact) if need_head else None
        nats = torch.zeros(len(inputs), dtype=exact, device=inputs.device)
        for level, start, end in zip(tree.levels, (0, *tree.ends[:-1]), tree.ends, strict=True):
            predicted = ((first <= start) & (last >= end)).nonzero().squeeze(1)
            predicted = predicted[level.parent[ids[predicted]].argsort(stable=True)]  # by node
            for blocks, part in _chunks(level, ids, predicted, chunk):
                tokens = predicted[part]
                logits = _logits(inputs[tokens], head, level, blocks, exact)
                if level.used is not None:
                    logits = _without_unused(logits, level, ids[tokens])
                child = (level.node[ids[tokens]] - level.starts[level.parent[ids[tokens]]]).unsqueeze(1)
                log_p = logits.log_softmax(1)
                nats.index_add_(0, tokens, -log_p.gather(1, child).squeeze(1))
                if not (need_inputs or need_head or late is not None):
                    continue
                gradient = log_p.exp_()
                gradient.scatter_add_(1, child, gradient.new_full((len(tokens), 1), -1.0))
                gradient = gradient.mul_(weights[tokens].unsqueeze(1)).to(dtype)
                if need_inputs:
                    grad_inputs.index_add_(0, tokens, _back(gradient, head, level, blocks).to(exact))
                if need_head:
                    _add_rows(grad_head, gradient, inputs[tokens], blocks)
                if late is not None:
                    late.append((inputs, tokens, gradient, blocks))
        ctx.gradients, ctx.dtypes = (grad_inputs, grad_head), (hidden_states.dtype, weight.dtype)
        ctx.mark_non_differentiable(nats)
        return (nats * weights).sum(), nats

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _):
        """Scales the gradients in place, so that they can be used once."""
        if ctx.gradients is None:
            raise RuntimeError(TAKEN)
        gradients, ctx.gradients = ctx.gradients, None
        scaled = (
            None if each is None else each.mul_(grad_loss).to(dtype)
            for each, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return (*scaled, None, None, None, None, None, None)


def _add_rows(total: Tensor, gradient: Tensor, inputs: Tensor, blocks) -> None:
    """Add a chunk's gradient of the rows to `total` (rows, D): gradient of its logits (C, ...), inputs (C, D)."""
    for rows, columns in blocks:
        add_product(total[columns], gradient[rows, : columns.stop - columns.start].T, inputs[rows])


def _chunks(level: Level, ids: Tensor, predicted: Tensor, chunk: int):
    """Blocks of tokens with one parent, some at a time: (blocks, slice of `predicted`).

    A block is (its tokens within the chunk, its rows of the head), two slices. The host reads how many tokens each
    parent has.
    """
    parents, sizes = level.parent[ids[predicted]].unique_consecutive(return_counts=True)
    groups = torch.stack([sizes, level.starts[parents] + level.first, level.counts[parents]], 1).tolist()
    most = max(1, chunk // max((count for _, _, count in groups), default=1))  # tokens
    blocks, begin, size = [], 0, 0
    for number, row, count in groups:
        columns = slice(row, row + count)
        while number:
            taken = min(number, most - size)
            blocks.append((slice(size, size + taken), columns))
            size, number = size + taken, number - taken
            if size == most:
                yield blocks, slice(begin, begin + size)
                blocks, begin, size = [], begin + size, 0
    if blocks:
        yield blocks, slice(begin, begin + size)


def _logits(inputs: Tensor, head: Tensor, level: Level, blocks, dtype: torch.dtype) -> Tensor:
    """The scores of the children of each token's parent, (C, most children), -inf behind those of fewer."""
    width = max(columns.stop - columns.start for _, columns in blocks)
    logits = inputs.new_full((len(inputs), width), -torch.inf, dtype=dtype)
    for rows, columns in blocks:
        logits[rows, : columns.stop - columns.start] = product(inputs[rows], head[columns]).to(dtype)
    return logits


def _without_unused(logits: Tensor, level: Level, ids: Tensor) -> Tensor:
    assert level.used is not None
    rows = level.starts[level.parent[ids]].unsqueeze(1) + torch.arange(logits.shape[1], device=logits.device)
    return logits.masked_fill_(~level.used[rows], -torch.inf)


def _back(gradient: Tensor, head: Tensor, level: Level, blocks) -> Tensor:
    result = gradient.new_empty(len(gradient), head.shape[1])
    for rows, columns in blocks:
        result[rows] = product(gradient[rows, : columns.stop - columns.start], head[columns].t())
    return result
