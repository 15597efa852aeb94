"""Tokens drawn from logits by the inverse of the cumulative distribution, and the probabilities that they have."""

import torch
from torch import Tensor

DRAWN_ELEMENTS = 2**19  # of which tokens are drawn at once: 2 MiB
DRAW_BLOCK = 256  # tokens
NO_TOKEN = (
    "a position has no possible token: the network's logits are not finite, or the logits processors exclude every "
    "token; check the weights and the processors"
)


def to_probabilities(logits: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """Logits (M, V) to float64 probabilities (M, V): temperature, softmax, then the smallest set of mass >= top_p.

    What is left after top_p is not normalised again. ValueError where no token is possible.
    """
    logits = logits.double()
    # The largest first becomes 0, so that no temperature overflows.
    probabilities = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)
    if not probabilities.isfinite().all():
        raise ValueError(NO_TOKEN)
    if top_p < 1:
        ordered, index = probabilities.sort(dim=-1, descending=True, stable=True)
        dropped = ordered.cumsum(-1) - ordered >= top_p
        probabilities = probabilities.masked_fill(torch.zeros_like(dropped).scatter(-1, index, dropped), 0.0)
    return probabilities


def draw_from_logits(logits: Tensor, draws: Tensor, temperature: float) -> Tensor:
    """`draw_by_inverse_cdf` of logits (M, V), draws (M,), without top_p: the same tokens but for rounding.

    Weights are in the logits' type and added up in float64, over blocks of the vocabulary and then within the block
    that the draw falls into. A few rows at a time: what is computed of them then stays in a processor's cache.
    """
    rows = max(1, DRAWN_ELEMENTS // logits.shape[1])
    pieces = zip(logits.split(rows), draws.split(rows), strict=True)
    return torch.cat([_draw(*piece, temperature) for piece in pieces]) if len(logits) else draws.long()


def _draw(logits: Tensor, draws: Tensor, temperature: float) -> Tensor:
    if temperature != 1:
        logits = (logits - logits.amax(-1, keepdim=True)).div_(temperature)
    weights = logits.softmax(-1)  # `exp` takes many times longer where a result is 0 or nearly so
    whole = weights.shape[1] // DRAW_BLOCK * DRAW_BLOCK
    blocks = weights[:, :whole].unflatten(1, (-1, DRAW_BLOCK)).sum(-1)
    blocks = torch.cat([blocks, weights[:, whole:].sum(-1, keepdim=True)], dim=1).double()
    cumulative = blocks.cumsum(1)
    if not cumulative[:, -1].isfinite().all():
        raise ValueError(NO_TOKEN)
    target = draws.unsqueeze(1) * cumulative[:, -1:]
    block = torch.searchsorted(cumulative, target, right=True).clamp(max=blocks.shape[1] - 1)
    target = target - (cumulative - blocks).gather(1, block)
    columns = block * DRAW_BLOCK + torch.arange(DRAW_BLOCK, device=logits.device)
    inside = columns < weights.shape[1]
    columns = columns.clamp(max=weights.shape[1] - 1)
    within = weights.gather(1, columns).double().masked_fill(~inside, 0)
    place = torch.searchsorted(within.cumsum(1), target, right=True).clamp(max=DRAW_BLOCK - 1)
    ids = columns.gather(1, place)
    impossible = weights.gather(1, ids) == 0  # by rounding, at the end of a block
    if impossible.any():
        ids = torch.where(impossible, weights.argmax(1, keepdim=True), ids)
    return ids.squeeze(1)


def draw_by_inverse_cdf(probabilities: Tensor, draws: Tensor) -> Tensor:
    """Token ids (M,): the first whose cumulative probability exceeds draw x total.

    probabilities (M, V) float64, not necessarily normalised; draws (M,) float64 in (0, 1). Rounding of the cumulative
    sum, which on accelerators need not rise, can point at a token of probability 0: the likeliest replaces it.
    """
    cumulative = probabilities.cumsum(-1)
    ids = torch.searchsorted(cumulative, draws.unsqueeze(-1) * cumulative[:, -1:], right=True)
    ids = ids.clamp(max=probabilities.shape[-1] - 1)
    possible = probabilities.gather(-1, ids) > 0
    return torch.where(possible, ids, probabilities.argmax(-1, keepdim=True)).squeeze(-1)
