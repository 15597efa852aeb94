"""Interpolating diffusion networks small enough to enumerate, and plain loops for what the package computes."""

import itertools
import math
from collections.abc import Iterator

import torch
from enumeration import OptimalDenoiser as Denoiser
from enumeration import all_sequences
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from prime_v2.configuration_interpolating_prime_v2 import PrimeV2InterpolatingConfig
from prime_v2.modeling_interpolating_prime_v2 import PrimeV2ForInterpolatingDiffusion


def small_config(**changes) -> PrimeV2InterpolatingConfig:
    """11 tokens, two layers of width 16."""
    fields = {
        "vocab_size": 11,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
    }
    return PrimeV2InterpolatingConfig(**fields | changes)


def small_model(seed: int = 0, scale: float = 0.4, **changes) -> PrimeV2ForInterpolatingDiffusion:
    """A random network, in evaluation mode; weights of this `scale` make its predictions far from uniform."""
    torch.manual_seed(seed)
    return PrimeV2ForInterpolatingDiffusion(small_config(initializer_range=scale, **changes)).eval()


class OptimalDenoiser(nn.Module):
    """Stands for the network: the "hidden state" of an input is log p(v at its place | the tokens that it sees).

    With a cache it keeps ids and places of inputs as keys, as a network keeps what it knows of them.
    """

    def __init__(self, law: Tensor, vocab_size: int, length: int):
        super().__init__()
        self.law, self.sequences = law, all_sequences(vocab_size, length)
        self.is_token = nn.functional.one_hot(self.sequences, vocab_size).double()  # (V**L, L, V)

    def forward(self, input_ids, position_ids, order_ids, visible_until, cache=None) -> BaseModelOutput:
        inputs = torch.stack([input_ids, position_ids], dim=-1).unsqueeze(1)  # (B, 1, E, 2)
        if cache is not None:
            inputs = cache.update(inputs, inputs, 0)[0]
        ids, places = inputs[:, 0, :, 0], inputs[:, 0, :, 1]  # (B, C + E)
        there = nn.functional.one_hot(places, self.sequences.shape[1]) * (ids + 1).unsqueeze(-1)  # (B, C + E, L)
        visible = (order_ids.unsqueeze(1) <= visible_until.unsqueeze(2)).long()
        state = torch.einsum("bek,bkl->bel", visible, there)  # id + 1, 0 where nothing is known
        fits = ((state.unsqueeze(2) == 0) | (state.unsqueeze(2) == self.sequences + 1)).all(-1)  # (B, E, V**L)
        posterior = fits * self.law
        marginals = torch.einsum("bex,xlv->belv", posterior / posterior.sum(-1, keepdim=True), self.is_token)
        own = position_ids[:, :, None, None].expand(-1, -1, 1, marginals.shape[-1])
        return BaseModelOutput(last_hidden_state=marginals.gather(2, own).squeeze(2).log().clamp(Denoiser.IMPOSSIBLE))


def optimal_model(law: Tensor, vocab_size: int, length: int, **fields) -> PrimeV2ForInterpolatingDiffusion:
    """The product's model with the optimal denoiser of `law` as its network and the identity as its head."""
    model = small_model(vocab_size=vocab_size, hidden_size=vocab_size, num_attention_heads=1, head_dim=2, **fields)
    model = model.double()
    model.model = OptimalDenoiser(law, vocab_size, length)
    model.lm_head.weight = nn.Parameter(torch.eye(vocab_size, dtype=torch.double), requires_grad=False)
    return model


def query_log_probabilities(model, known: list[tuple[int, int]], place: int) -> Tensor:
    """log p (V,) of the token at `place` given `known` tokens, (place, id) in the order in which they became known.

    The plain form of the attention: tokens in their order, the query behind them, and a lower triangle for a mask.
    """
    ids = torch.tensor([[*(each for _, each in known), model.config.mask_token_id]])
    places = torch.tensor([[*(each for each, _ in known), place]])
    embedded = model.model.embed_tokens(ids)
    triangle = torch.full((1, 1, ids.shape[1], ids.shape[1]), -torch.inf, dtype=embedded.dtype).triu(1)
    hidden_states = model.model.run_layers(embedded, places, triangle)[0, -1]
    return (hidden_states @ model.head().T).log_softmax(-1)


def decoding_orders(num_tokens: int, alpha_0: float) -> Iterator[tuple[float, tuple[int, ...], int]]:
    """(chance, order of all tokens, how many of them the diffusion reveals) of each way to decode; by plain loops."""
    for revealed in itertools.product([False, True], repeat=num_tokens):
        first = [i for i in range(num_tokens) if revealed[i]]
        rest = [i for i in range(num_tokens) if not revealed[i]]
        chance = alpha_0 ** len(first) * (1 - alpha_0) ** len(rest) / math.factorial(len(first))
        if chance:
            for order in itertools.permutations(first):
                yield chance, (*order, *rest), len(first)


def naive_log_likelihood(model, ids: list[int], scored: list[bool], order: tuple[int, ...]) -> Tensor:
    """log p of the scored tokens of ids (L,) revealed in `order`, numbers among the scored ones; differentiable."""
    places = [i for i, each in enumerate(scored) if each]
    known = [(i, each) for i, each in enumerate(ids) if not scored[i]]
    total = torch.zeros(())
    for place in (places[number] for number in order):
        total = total + query_log_probabilities(model, known, place)[ids[place]]
        known.append((place, ids[place]))
    return total


@torch.no_grad()
def naive_bound(model, ids: list[int], scored: list[bool] | None = None) -> tuple[float, float]:
    """(The bound, -log p) of a text, in nats: minus the mean of the logs and minus the log of the mean over orders."""
    scored = scored or [True] * len(ids)
    bound = mean = 0.0
    for chance, order, _ in decoding_orders(sum(scored), model.config.alpha_0):
        log_p = float(naive_log_likelihood(model, ids, scored, order))
        bound, mean = bound - chance * log_p, mean + chance * math.exp(log_p)
    return bound, -math.log(mean)
