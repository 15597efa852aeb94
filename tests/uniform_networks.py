"""Uniform-state networks small enough to enumerate, and plain forms of what the package computes fast."""

import itertools
from collections.abc import Callable

import torch
from enumeration import all_sequences, gauss_legendre
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from prime_v2.configuration_uniform_prime_v2 import PrimeV2UniformConfig
from prime_v2.modeling_uniform_prime_v2 import PrimeV2ForUniformDiffusion, PrimeV2TimeEmbedding, PrimeV2TimeScale


def small_config(**changes) -> PrimeV2UniformConfig:
    """11 tokens, two layers of width 16."""
    fields = {
        "vocab_size": 11,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
        "time_embedding_size": 8,
    }
    return PrimeV2UniformConfig(**fields | changes)


def small_model(seed: int = 0, scale: float = 0.4, **changes) -> PrimeV2ForUniformDiffusion:
    """A random network, in evaluation mode, whose predictions are far from uniform and depend on the time.

    It does not read sin and cos of 1000 t and 100 t: integrals over t then need few points.
    """
    torch.manual_seed(seed)
    model = PrimeV2ForUniformDiffusion(small_config(initializer_range=scale, **changes)).eval()
    for module in model.modules():
        if isinstance(module, PrimeV2TimeScale):  # at first they are 0
            nn.init.normal_(module.weight, std=1.0)
        elif isinstance(module, PrimeV2TimeEmbedding):
            module.first.weight.data[:, [0, 1, 4, 5]] = 0
    return model


class OptimalDenoiser(nn.Module):
    """Stands for the network: its "hidden states" are log p of a law, by summing over all its sequences.

    p_l is the posterior of token l given the noised tokens at the other positions; `own` adds the one at l itself.
    """

    def __init__(self, law: Tensor, vocab_size: int, length: int, own: bool = False):
        super().__init__()
        self.law, self.own, self.vocab_size = law, own, vocab_size
        self.sequences = all_sequences(vocab_size, length)  # (V**L, L)
        self.is_token = nn.functional.one_hot(self.sequences, vocab_size).double()  # (V**L, L, V)

    def forward(self, input_ids, times, attention_mask=None, position_ids=None) -> BaseModelOutput:
        alpha = (1 - times.double())[:, None, None]
        same = input_ids[:, None] == self.sequences
        log_chance = (alpha * same + (1 - alpha) / self.vocab_size).log()  # (B, V**L, L) of each noised token
        joint = self.law.log()[:, None] + log_chance.sum(-1, keepdim=True)
        if not self.own:
            joint = joint - log_chance
        posterior = joint.softmax(1)
        return BaseModelOutput(last_hidden_state=torch.einsum("bxl,xlv->blv", posterior, self.is_token).log())


def optimal_model(law: Tensor, vocab_size: int, length: int, own: bool = False) -> PrimeV2ForUniformDiffusion:
    """The product's model with the optimal denoiser of `law` as its network and the identity as its head."""
    model = small_model(vocab_size=vocab_size, hidden_size=vocab_size, num_attention_heads=1, head_dim=2).double()
    model.model = OptimalDenoiser(law, vocab_size, length, own)
    model.lm_head.weight = nn.Parameter(torch.eye(vocab_size, dtype=torch.double), requires_grad=False)
    return model


def forward_chances(x: Tensor, z: Tensor, alpha: Tensor | float, vocab_size: int) -> Tensor:
    """q(z | x) of single tokens, broadcast."""
    return alpha * (z == x).double() + (1 - alpha) / vocab_size


def naive_integrand(probabilities: Tensor, x: Tensor, i: Tensor, times: Tensor) -> Tensor:
    """f (...) as a plain sum over j: probabilities (..., V), clean x, noised i and times (...)."""
    vocab_size, alpha = probabilities.shape[-1], (1 - times).unsqueeze(-1)
    x_bar = vocab_size * alpha * nn.functional.one_hot(x, vocab_size) + 1 - alpha
    p_bar = vocab_size * alpha * probabilities + 1 - alpha
    r, s = (each / each.gather(-1, i.unsqueeze(-1)) for each in (x_bar, p_bar))
    return (r * (r / s).log() - r + s).sum(-1) / (vocab_size * alpha.squeeze(-1))


def naive_posterior(probabilities: Tensor, i: Tensor, times: Tensor) -> Tensor:
    """p(x | z_t) (..., V) by Bayes' rule from p (..., V), noised i and times (...)."""
    clean = torch.arange(probabilities.shape[-1])
    joint = probabilities * forward_chances(clean, i.unsqueeze(-1), (1 - times).unsqueeze(-1), probabilities.shape[-1])
    return joint / joint.sum(-1, keepdim=True)


@torch.no_grad()
def estimates(model, z: Tensor, times: Tensor) -> Tensor:
    """p (B, L, V) float64 of noised tokens z (B, L) at times (B,)."""
    return model.token_logits(model.model(z, times).last_hidden_state).double().softmax(-1)


def time_nodes(num_points: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the integral over t in (0, 1) of what is smooth but for logarithms at both ends."""
    u, weights = gauss_legendre(num_points)
    return u**2 * (3 - 2 * u), 6 * u * (1 - u) * weights


@torch.no_grad()
def exact_bound(model, ids: Tensor, scored: Tensor | None = None, num_points: int = 200) -> Tensor:
    """The bound (B,) of each sequence (B, L): quadrature over t, the sum over all noised tokens."""
    nodes, weights = time_nodes(num_points)
    values = expected_integrand(model, ids, nodes, scored)
    return (weights * values).sum(-1)


@torch.no_grad()
def expected_integrand(model, ids: Tensor, times: Tensor, scored: Tensor | None = None) -> Tensor:
    """E_z sum over tokens of f at times (Q,) for each sequence of ids (B, L), (B, Q)."""
    values = []
    for x in ids:
        where = torch.ones_like(x, dtype=torch.bool) if scored is None else scored
        vocab_size = model.config.vocab_size
        replacements = torch.tensor(list(itertools.product(range(vocab_size), repeat=int(where.sum()))))
        z = x.repeat(len(replacements), 1)
        z[:, where] = replacements  # (Z, L)
        total = []
        for some in times.split(max(1, 4096 // len(z))):
            rows, t = z.repeat(len(some), 1), some.repeat_interleave(len(z))
            p = estimates(model, rows, t)
            chance = forward_chances(x, rows, 1 - t[:, None], vocab_size)[:, where].prod(1)
            nats = naive_integrand(p, x.expand_as(rows), rows, t[:, None].expand_as(rows))[:, where].sum(1)
            total.append((chance * nats).view(len(some), -1).sum(1))
        values.append(torch.cat(total))
    return torch.stack(values)


def naive_reverse_step(p: Tensor, i: int, t: float, s: float) -> Tensor:
    """q(z_s | z_t = i) (V,): clean x from Bayes' rule, then z_s from x and i by the forward kernels; loops."""
    vocab_size, alpha_t, alpha_s = len(p), 1 - t, 1 - s
    tokens, noised = torch.arange(vocab_size), torch.tensor(i)
    clean = naive_posterior(p, noised, torch.tensor(t, dtype=torch.double))
    total = torch.zeros(vocab_size, dtype=torch.double)
    for x in range(vocab_size):
        between = forward_chances(tokens, noised, alpha_t / alpha_s, vocab_size)  # q(z_t = i | z_s)
        joint = forward_chances(torch.tensor(x), tokens, alpha_s, vocab_size) * between
        total += clean[x] * joint / joint.sum()
    return total


@torch.no_grad()
def reverse_chain(
    model, num_steps: int, length: int, given: Tensor | None = None, change: Callable[[Tensor], Tensor] = lambda p: p
) -> list[Tensor]:
    """Transition matrices (Z, Z) over `all_sequences` of the sampler's N steps, from t = 1 to 0; naive.

    given (L,): ids of tokens that are given, -1 for those to be generated; states that differ from them stay put.
    change: what is done to the estimates (Z, L, V).
    """
    vocab_size, states = model.config.vocab_size, all_sequences(model.config.vocab_size, length)
    given = torch.full((length,), -1) if given is None else given
    matrices = []
    for step in range(num_steps):
        t, s = 1 - step / num_steps, 1 - (step + 1) / num_steps
        p = change(estimates(model, states, torch.full((len(states),), t, dtype=torch.double)))
        matrix = torch.ones(len(states), len(states), dtype=torch.double)
        for z in range(len(states)):
            for column in range(length):
                if given[column] >= 0:
                    matrix[z] *= states[:, column] == states[z, column]
                else:
                    matrix[z] *= naive_reverse_step(p[z, column], int(states[z, column]), t, s)[states[:, column]]
        matrices.append(matrix)
    assert vocab_size**length == len(states)
    return matrices


def chain_law(matrices: list[Tensor], start: Tensor) -> Tensor:
    """Law (Z,) of the last state from that of the first, (Z,)."""
    for matrix in matrices:
        start = start @ matrix
    return start
