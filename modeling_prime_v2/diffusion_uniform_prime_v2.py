"""Uniform-state diffusion: noise, bound, reverse step (Duo, arXiv:2506.10892; UDLM, arXiv:2412.10193).

At time t a token x is kept with probability alpha = 1 - t, else replaced by one of the V tokens, drawn uniformly. With
a = V alpha / (1 - alpha) the noised token is i with probability q(i | x) = (1 - alpha)/V (1 + a [i = x]). The network
gives p, its estimate of the clean token from the *other* positions. What the noised token itself says is put in by the
formulas (leave-one-out denoiser, arXiv:2605.22765; the optimal p_l is the posterior of x_l given z without z_l):

    p(x | z) is proportional to p_x q(i | x), that is to p_x (1 + a [i = x]).

The bound. The reverse process jumps from i to j at the rate r_j / (V alpha), r_j = (1 + a [j = x]) / (1 + a [i = x]),
if x is known, and at the rate s_j / (V alpha), s_j = (1 + a p_j) / (1 + a p_i), in the model. Hence

    -log p(x) <= int_0^1 E_z sum over tokens of f dt,   f = 1/(V alpha) sum_j [ r_j log(r_j / s_j) - r_j + s_j ].

The ends cost nothing: at t = 1 the noised tokens are uniform whatever x, at t = 0 they are x. (The integral over
only [t0, t1] lacks E -log p(x | z_t0) and KL(q(z_t1 | x) || uniform), which for finite logits vanish as
t0 log(1/t0) and (1 - t1)^2.) With A_j = log(1 + a p_j), S = sum_j A_j, c = 1/(1 + a), phi(y) = log(1 + y) - y/(1 + y)
the sum over j is

    i != x:  (1 + a) log(1 + a) - S - a A_x + (V + a) phi(a p_i)
    i = x:   c [V (A_x - log(1 + a)) + log(1 + a) - S] + (V + a) a (1 - p_x) / ((1 + a) (1 + a p_x)),

in which nothing cancels that float32 would miss in S; the rest is float64.

Its estimate. Token l is replaced at a time u_l, uniform on (0, 1), so that n tokens have times t_1 < ... < t_n of
replacement. That k are replaced at t has the density C(n, k) t^k (1 - t)^(n - k) dt, t/k times the law of t_k, so

    int_0^1 E f dt = 1/(n + 1) [ E f(t_0) + sum_{k=1..n} (n + 1)/k E t_k f(t_k) ],

where t_0 is the least of n + 1 uniforms and nothing is replaced. A replaced token has f of order 1/t, which t_k/k
takes out: the count form of masked diffusion (`diffusion_prime_v2`) for a network that sees the time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from .chunked_loss_prime_v2 import chunked_loss
from .random_prime_v2 import Stream, uniforms

# Times are kept in [T_MIN, 1 - T_MIN], the resolution of the draws, which moves the bound by O(T_MIN log(1/T_MIN)).
T_MIN = 2.0**-53
KINDS = ("elbo", "posterior")


@dataclass
class UniformNoise:
    """One draw of the forward process for B sequences.

    ids (B, L) int64, the noised tokens; times (B,) float64 in [T_MIN, 1 - T_MIN]; weight (B,) float64, the factor of f
    that makes its mean over draws the integral over t.
    """

    ids: Tensor
    times: Tensor
    weight: Tensor


def draw_noise(ids: Tensor, scored: Tensor, keys: Tensor, levels: Tensor, vocab_size: int) -> UniformNoise:
    """Replace scored tokens: ids (B, L); scored (B, L) bool; keys (B,) int64; levels (B,) float64 in (0, 1).

    A level chooses the number k of replaced tokens, uniform over 0..n. The rest is a pure function of the key, of n
    and of a token's number among the scored ones, not of where padding and given tokens lie.
    """
    num_tokens, numbers = scored.sum(1), scored.cumsum(1)
    replaced_at = uniforms(keys.unsqueeze(1), Stream.REPLACED_AT, numbers).masked_fill(~scored, torch.inf)  # (B, L)
    replaced_by = (uniforms(keys.unsqueeze(1), Stream.REPLACED_BY, numbers) * vocab_size).long()
    replaced_by = replaced_by.clamp(max=vocab_size - 1)
    position = levels * (num_tokens + 1)
    count = position.floor().long().minimum(num_tokens)  # k
    ordered = replaced_at.sort(1).values
    kth = ordered.gather(1, (count - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
    least = -torch.expm1(torch.log1p(-position.clamp(max=1.0)) / (num_tokens + 1))  # by the inverse of its law
    times = torch.where(count > 0, kth, least).clamp(T_MIN, 1 - T_MIN)
    weight = torch.where(count > 0, (num_tokens + 1) * times / count.clamp(min=1), 1.0)
    replaced = (replaced_at <= times.unsqueeze(1)) & (count > 0).unsqueeze(1)
    return UniformNoise(torch.where(replaced, replaced_by, ids), times, weight)


def excess(times: Tensor, vocab_size: int) -> Tensor:
    """a = V alpha / (1 - alpha), float64: the true token is 1 + a times as likely among the noised ones as another."""
    return vocab_size * (1 - times.double()) / times.double()


def reverse_step(probabilities: Tensor, ids: Tensor, alpha_now: Tensor, alpha_next: Tensor) -> Tensor:
    """q(z_s | z_t, p) (M, V) of noised tokens ids (M,) int64, alpha_next = alpha(s) >= alpha_now = alpha(t), (M,).

    probabilities (M, V), normalised: the estimate p. The mean of q(z_s | z_t, x) over p(x | z_t), which is Duo's
    formula with p in place of x; for alpha_next = 1 it is p(x | z_t). A row's sum is not 1, but
    V alpha(t) p_i + 1 - alpha(t).
    """
    vocab_size = probabilities.shape[1]
    alpha_now, alpha_next = (each.to(probabilities.dtype).unsqueeze(1) for each in (alpha_now, alpha_next))
    ratio = alpha_now / alpha_next
    weights = (alpha_next - alpha_now) * probabilities + (1 - ratio) * (1 - alpha_next) / vocab_size
    own = ids.unsqueeze(1)
    stays = vocab_size * alpha_now * probabilities.gather(1, own) + ratio - alpha_now
    return weights.scatter_add_(1, own, stays)


@dataclass
class NoisedTokens:
    """N scored tokens: clean ids and noised ids (N,) int64, times and weights of their nats (N,) float64."""

    ids: Tensor
    noised: Tensor
    times: Tensor
    weights: Tensor

    def part(self, piece: slice) -> "NoisedTokens":
        return NoisedTokens(self.ids[piece], self.noised[piece], self.times[piece], self.weights[piece])


def uniform_loss(hidden_states, head, tokens: NoisedTokens, kind: str) -> tuple[Tensor, Tensor]:
    """Weighted sum of nats (scalar, differentiable) and nats per token (N,), detached, by `chunked_loss`.

    kind "elbo": f, nats per unit of time; "posterior": -log p(x | z), whose minimiser is the same p.
    hidden_states (N, D); head: a weight (V, D) or a HeadCall.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not one of {', '.join(KINDS)}")
    return chunked_loss(hidden_states, head, tokens, partial(_chunk, kind))


def _chunk(kind: str, need_gradient: bool, _) -> Callable:
    of_kind = _elbo if kind == "elbo" else _posterior
    return lambda logits, tokens, piece: of_kind(logits, tokens.part(piece), need_gradient)


def _elbo(logits: Tensor, tokens: NoisedTokens, need_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """f (C,) float64 and, where needed, the gradient of its weighted sum with respect to the logits (C, V).

    With b_j = a p_j / (1 + a p_j), p_j df/dp_j is, times V alpha, -b_j (i = x: -c b_j) and
        i != x:  at x -a b_x,                                at i (V + a) b_i^2
        i = x:   at x V c b_x - (V + a) b_x / (1 + a p_x);
    the softmax turns g_j = p_j df/dp_j into g_j - p_j sum(g).
    """
    vocab_size, a = logits.shape[1], excess(tokens.times, logits.shape[1])
    rate, c, log_a = 1 / (vocab_size * (1 - tokens.times)), 1 / (1 + a), torch.log1p(a)
    same, x, i = tokens.ids == tokens.noised, tokens.ids.unsqueeze(1), tokens.noised.unsqueeze(1)
    p = logits.softmax(-1)
    p_x, p_i = (p.gather(1, each).squeeze(1).double() for each in (x, i))
    ap = p * a.to(p.dtype).unsqueeze(1)
    total = ap.log1p().sum(1, dtype=torch.double)  # S
    replaced = (1 + a) * log_a - total - a * torch.log1p(a * p_x)
    replaced += (vocab_size + a) * (torch.log1p(a * p_i) - a * p_i / (1 + a * p_i))
    kept = c * (vocab_size * (torch.log1p(a * p_x) - log_a) + log_a - total)
    kept += (vocab_size + a) * a * (1 - p_x) * c / (1 + a * p_x)
    nats = rate * torch.where(same, kept, replaced)
    if not need_gradient:
        return nats, None
    b_x, b_i = (a * each / (1 + a * each) for each in (p_x, p_i))
    at_x = torch.where(same, vocab_size * c * b_x - (vocab_size + a) * b_x / (1 + a * p_x), -a * b_x)
    at_i = torch.where(same, 0.0, (vocab_size + a) * b_i.square())
    factor = tokens.weights.double() * rate
    g = ap.div_(1 + ap).mul_((-factor * torch.where(same, c, 1.0)).to(p.dtype).unsqueeze(1))
    g.scatter_add_(1, x, (factor * at_x).to(p.dtype).unsqueeze(1))
    g.scatter_add_(1, i, (factor * at_i).to(p.dtype).unsqueeze(1))
    sums = g.sum(1, dtype=torch.double).to(p.dtype).unsqueeze(1)
    return nats, g.addcmul_(p, sums, value=-1)


def _posterior(logits: Tensor, tokens: NoisedTokens, need_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """-log p(x | z) = -log p_x - log(1 + a [x = i]) + log(1 + a p_i) (C,) float64, and the gradient as of `_elbo`.

    d/dlogit_j = p_j - [j = x] + b_i ([j = i] - p_j), b_i = a p_i / (1 + a p_i).
    """
    a = excess(tokens.times, logits.shape[1])
    same, x, i = tokens.ids == tokens.noised, tokens.ids.unsqueeze(1), tokens.noised.unsqueeze(1)
    log_p = logits.log_softmax(-1)
    log_x, log_i = (log_p.gather(1, each).squeeze(1).double() for each in (x, i))
    log_ap = torch.log(a) + log_i
    nats = nn.functional.softplus(log_ap) - log_x - torch.where(same, torch.log1p(a), 0.0)
    if not need_gradient:
        return nats, None
    weights, b_i = tokens.weights.double(), torch.sigmoid(log_ap)
    gradient = log_p.exp_().mul_((weights * (1 - b_i)).to(log_p.dtype).unsqueeze(1))
    gradient.scatter_add_(1, x, -weights.to(log_p.dtype).unsqueeze(1))
    gradient.scatter_add_(1, i, (weights * b_i).to(log_p.dtype).unsqueeze(1))
    return nats, gradient
