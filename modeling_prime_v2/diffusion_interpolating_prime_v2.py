"""Interpolating diffusion: what is hidden, in which order tokens become known, and with which weight.

Eso-LM (arXiv:2506.01928): each of the n scored tokens is revealed by masked diffusion with probability alpha_0, in
random order; then the others follow from left to right. alpha_0 = 1 is masked diffusion, alpha_0 = 0 autoregression.

**The network.** Causal attention over a *sorted order* with two streams (as in XLNet, arXiv:1906.08237). Its inputs
are tokens and queries: a *token* holds an id, a *query* the mask in place of the token that it asks for; both carry
the rotary position of their place in the text. Tokens have a place in the sorted order: given ones (prompt, label
-100) first, left to right; then what the diffusion revealed, in the order of its reveal; then the rest, left to right.
A token attends to the tokens up to its own place in that order, a query to the tokens that are known before it and to
itself. None attends to another's query, so what a token stores for later ones never changes: keys and values can be
cached, exactly.

**The bound.** Let D be the set that the diffusion reveals and s its order, uniform given D. The model of a text is
p(x) = E_{D,s} p(x | D, s), where p(x | D, s) is the product of the conditionals along the sorted order, a law on texts
for each (D, s). Because attention follows the order, a conditional may depend on the order of the tokens before it;
this changes nothing: -log p(x) <= E_{D,s} -log p(x | D, s), since the log of a mean is at least the mean of the logs.
The right-hand side splits, token by token, into what the diffusion reveals and what follows:

    E_{z0} sum over the masked l of z0, left to right, of -log p(x_l | z0 with the masked tokens before l filled in)
    + int_0^1 E_{z_t} (-alpha'/(1 - alpha)) sum over the masked l of -log p(x_l | z_t) dt,   alpha(t) = alpha_0 (1 - t)

with clean tokens in uniformly random order in both. With m = 1 - alpha the second term is the integral over m from
1 - alpha_0 to 1 of 1/m times the expectation at masked share m. Both are computed by the number k of masked tokens.
The diffusion sees k of them if and only if it reveals more than n - k tokens, |D| ~ Binomial(n, alpha_0), so with f(M)
the nats of the masked tokens M, all given the clean ones, and g(M) their nats from left to right,

    first term  = sum over k = 1..n of P(|D| = n - k) E_{|M| = k} g(M)     = E_k (1 - alpha_0) n/k E_{|M| = k} g(M),
    second term = sum over k = 1..n of P(|D| > n - k) / k E_{|M| = k} f(M) = E_k alpha_0 n/k E_{|M| = k} f(M),

where k - 1 ~ Binomial(n - 1, 1 - alpha_0) in the first (one token is surely left) and P(k) = P(|D| > n - k) /
(n alpha_0) in the second. So a row has the weight n/k and its weighted nats hardly depend on k. No weight has a pole,
and nothing is clamped where m comes near 0; for alpha_0 = 1 it is the count form of `diffusion_prime_v2`.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .backbone_prime_v2 import NOT_SCORED
from .random_prime_v2 import Stream, uniforms

LEAST_SHARE = 0.05  # of the rows, for a term that has any weight
NEVER_SEEN = 2**31  # the order id of queries and of padding, above every place in an order


@dataclass
class ScoredTexts:
    """B texts of L places.

    ids (B, L) int64, clean; given and scored (B, L) bool, disjoint: what is neither is padding; position_ids (B, L)
    int64; mask_id V, the id of a query.
    """

    ids: Tensor
    given: Tensor
    scored: Tensor
    position_ids: Tensor
    mask_id: int

    def rows(self, part: slice | Tensor) -> "ScoredTexts":
        """Some of the texts."""
        return ScoredTexts(self.ids[part], self.given[part], self.scored[part], self.position_ids[part], self.mask_id)


@dataclass
class SortedInputs:
    """What the network is fed: R rows of E tokens and queries, in any arrangement, since attention goes by order ids.

    ids (R, E) int64, the mask id V for a query; position_ids (R, E) int64, places in the text; order_ids (R, E) int64,
    places in the sorted order, NEVER_SEEN for queries and padding; visible_until (R, E) int64: an input attends to
    those with order_ids <= visible_until and to itself; target_ids (R, E) int64: the token that a query predicts,
    NOT_SCORED elsewhere.
    """

    ids: Tensor
    position_ids: Tensor
    order_ids: Tensor
    visible_until: Tensor
    target_ids: Tensor

    @classmethod
    def blank(cls, device: torch.device) -> "SortedInputs":
        """One row of one input that is padding."""
        return cls(**{name: torch.full((1, 1), PADDING.get(name, 0), device=device) for name in FIELDS})


FIELDS = tuple(each.name for each in fields(SortedInputs))
PADDING = {"order_ids": NEVER_SEEN, "visible_until": -1, "target_ids": NOT_SCORED}  # 0 for the other fields


@dataclass
class Term:
    """Rows of one term of the bound: of which texts (R,), their inputs, the factor (R,) float64 of their nats."""

    texts: Tensor
    inputs: SortedInputs
    weights: Tensor


def is_bound(alpha_0: float, loss_weight: str) -> bool:
    """Whether the loss is an upper bound on -log p(x) in expectation over the noise: not without the weights n/k.

    For alpha_0 = 0 every token is masked, so that they are 1.
    """
    return loss_weight == "elbo" or alpha_0 == 0


def sequential_share(alpha_0: float, ar_share: float | None = None) -> float:
    """Share of the rows for the left-to-right term: `ar_share`, or 1 - alpha_0 with LEAST_SHARE for either term."""
    if ar_share is not None:
        return float(ar_share)
    if alpha_0 in (0, 1):
        return float(1 - alpha_0)
    return min(max(1 - alpha_0, LEAST_SHARE), 1 - LEAST_SHARE)


# -- How many tokens are hidden --------------------------------------------------------------------------------------


def revealed_chances(num_tokens: Tensor, most: int, alpha_0: float) -> tuple[Tensor, Tensor]:
    """(P(|D| = c), P(|D| > c)) for c = 0..most, float64 (B, most + 1); |D| ~ Binomial(n, alpha_0), n (B,) <= most.

    The second is the chance that the diffusion sees c clean tokens and reveals another; its sum is n alpha_0.
    """
    counts = torch.arange(most + 1, dtype=torch.double, device=num_tokens.device)
    n = num_tokens.double().unsqueeze(1)
    rest = (n - counts).clamp(min=0)
    p = torch.tensor(float(alpha_0), dtype=torch.double, device=n.device)
    log_choices = (n + 1).lgamma() - (counts + 1).lgamma() - (rest + 1).lgamma()
    log_chances = log_choices + torch.xlogy(counts, p) + torch.special.xlog1py(rest, -p)
    equal = log_chances.masked_fill(counts > n, -torch.inf).exp()
    return equal, torch.nn.functional.pad(_suffix_sums(equal)[:, 1:], (0, 1))


def sequential_counts(levels: Tensor, num_tokens: Tensor, most: int, alpha_0: float) -> Tensor:
    """Masked tokens k (B,) of the left-to-right term: 1 + Binomial(n - 1, 1 - alpha_0), rising with levels (B,).

    0 for a row without tokens.
    """
    others = (num_tokens - 1).clamp(min=0)
    suffix = _suffix_sums(revealed_chances(others, most, alpha_0)[0])  # at c: all k <= n - c
    possible = torch.arange(most + 1, device=levels.device) <= others.unsqueeze(1)
    below = possible & (suffix < levels.unsqueeze(1) * suffix[:, :1])
    return (below.sum(1) + 1).minimum(num_tokens)


def diffusion_counts(levels: Tensor, num_tokens: Tensor, most: int, alpha_0: float) -> Tensor:
    """Masked tokens k (B,) of the diffusion term in proportion to P(|D| > n - k), k = 1..n, rising with levels (B,).

    For alpha_0 = 1 they are `diffusion_prime_v2.hidden_counts_to_draw`. 0 for a row without tokens.
    """
    suffix = _suffix_sums(revealed_chances(num_tokens, most, alpha_0)[1])  # at c: all k <= n - c
    possible = torch.arange(most + 1, device=levels.device) < num_tokens.unsqueeze(1)
    below = possible & (suffix < levels.unsqueeze(1) * suffix[:, :1])
    return (below.sum(1) + 1).minimum(num_tokens)


def _suffix_sums(chances: Tensor) -> Tensor:
    return chances.flip(1).cumsum(1).flip(1)


# -- In which order tokens become known ------------------------------------------------------------------------------


def random_places(scored: Tensor, keys: Tensor) -> Tensor:
    """Places (B, L) of the scored tokens, 0..n-1, in a uniformly random order: a pure function of keys (B,) and n."""
    draws = uniforms(keys.unsqueeze(1), Stream.INTERPOLATING_ORDER, scored.cumsum(1))
    return torch.where(scored, draws, 2.0).argsort(dim=1, stable=True).argsort(dim=1)


def sorted_order(texts: ScoredTexts, places: Tensor, num_clean: Tensor) -> tuple[Tensor, Tensor]:
    """(order ids (B, L) int64, hidden (B, L) bool) when the first `num_clean` (B,) places are known.

    places (B, L) of the scored tokens. Hidden ones come last, left to right; padding has NEVER_SEEN.
    """
    given, scored, num_clean = texts.given, texts.scored, num_clean.unsqueeze(1)
    hidden = scored & (places >= num_clean)
    places = torch.where(hidden, num_clean + hidden.cumsum(1) - 1, places)
    order_ids = torch.where(given, given.cumsum(1) - 1, given.sum(1, keepdim=True) + places)
    return order_ids.masked_fill(~(given | scored), NEVER_SEEN), hidden


# -- Rows of the network ---------------------------------------------------------------------------------------------


def diffusion_inputs(texts: ScoredTexts, places: Tensor, num_clean: Tensor) -> SortedInputs:
    """L inputs a row: the clean tokens, and in place of each hidden one a query that sees all of them.

    places, num_clean as of `sorted_order`.
    """
    order_ids, hidden = sorted_order(texts, places, num_clean)
    clean = (texts.given | texts.scored) & ~hidden
    return SortedInputs(
        torch.where(clean, texts.ids, texts.mask_id),
        texts.position_ids,
        torch.where(clean, order_ids, NEVER_SEEN),
        torch.where(clean, order_ids, clean.sum(1, keepdim=True) - 1),
        torch.where(hidden, texts.ids, NOT_SCORED),
    )


def sequential_inputs(texts: ScoredTexts, places: Tensor, num_clean: Tensor) -> SortedInputs:
    """L + H inputs a row: all tokens, then queries for up to H hidden ones, each of which sees the tokens before it.

    places, num_clean as of `sorted_order`.
    """
    order_ids, hidden = sorted_order(texts, places, num_clean)
    columns, is_query = leading_columns(hidden)
    queries = SortedInputs(
        torch.full_like(columns, texts.mask_id),
        texts.position_ids.gather(1, columns),
        torch.full_like(columns, NEVER_SEEN),
        torch.where(is_query, order_ids.gather(1, columns) - 1, -1),
        torch.where(is_query, texts.ids.gather(1, columns), NOT_SCORED),
    )
    tokens = texts.given | texts.scored
    text = SortedInputs(
        torch.where(tokens, texts.ids, texts.mask_id),
        texts.position_ids,
        order_ids,
        torch.where(tokens, order_ids, -1),
        torch.full_like(texts.ids, NOT_SCORED),
    )
    return SortedInputs(*(torch.cat([getattr(text, name), getattr(queries, name)], dim=1) for name in FIELDS))


def leading_columns(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The True columns of chosen (B, L), left to right, (B, H), H the most of a row; and which of them are, bool."""
    columns = chosen.int().argsort(dim=1, descending=True, stable=True)[:, : int(chosen.sum(1).max())]
    return columns, chosen.gather(1, columns)


def draw_terms(
    texts: ScoredTexts, keys: Tensor, levels: Tensor, alpha_0: float, share: float, loss_weight: str = "elbo"
) -> tuple[Term, Term]:
    """One draw of the bound for each text: (left-to-right rows, diffusion rows).

    keys (B,) int64; levels (B,) float64 in (0, 1). Levels below `share` are left-to-right rows, of weight
    (1 - alpha_0) / share * n/k, the others diffusion rows, of weight alpha_0 / (1 - share) * n/k; "low_variance"
    leaves n/k out. Where the level lies within its term decides k, the number of hidden tokens, the key which ones and
    the order of the others. In expectation over uniform levels and keys the weighted nats of a row are the bound. A
    pure function of its arguments; a row's draws do not depend on where padding and given tokens lie.
    """
    places, num_tokens, most = random_places(texts.scored, keys), texts.scored.sum(1), texts.ids.shape[1]

    rows = (levels < share).nonzero().squeeze(1)
    k = sequential_counts(levels[rows] / share, num_tokens[rows], most, alpha_0)
    factor = (1 - alpha_0) / share if share > 0 else 0.0
    sequential = _term(sequential_inputs, texts, places, rows, k, factor, loss_weight)

    rows = (levels >= share).nonzero().squeeze(1)
    k = diffusion_counts((levels[rows] - share) / (1 - share), num_tokens[rows], most, alpha_0)
    factor = alpha_0 / (1 - share) if share < 1 else 0.0
    return sequential, _term(diffusion_inputs, texts, places, rows, k, factor, loss_weight)


def _term(make_inputs, texts: ScoredTexts, places: Tensor, rows: Tensor, k: Tensor, factor, loss_weight: str) -> Term:
    texts, num_tokens = texts.rows(rows), texts.scored[rows].sum(1)
    weights = torch.full_like(k, factor, dtype=torch.double)
    if loss_weight == "elbo":
        weights = weights * num_tokens / k.clamp(min=1)
    inputs = make_inputs(texts, places[rows], num_tokens - k) if len(rows) else SortedInputs.blank(k.device)
    return Term(rows, inputs, weights)
