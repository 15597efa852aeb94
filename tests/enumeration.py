"""Exact answers for networks and distributions small enough to enumerate, by plain loops and sums."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from networks import START, small_interpolating, small_model, small_uniform
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from prime_v2.diffusion_prime_v2 import Noise, RevealOrder

# Laws


def all_sequences(vocab_size: int, length: int) -> Tensor:
    """Every sequence, (V**L, L)."""
    return torch.tensor(list(itertools.product(range(vocab_size), repeat=length)))


def correlated_law(vocab_size: int, length: int, seed: int = 0) -> Tensor:
    """A law on `all_sequences`, (V**L,) float64, positive; exp of normals, so tokens and digits are dependent."""
    weights = torch.randn(vocab_size**length, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    return (1.5 * weights).softmax(0)


def entropy(law: Tensor) -> float:
    return float(-(law * law.log()).sum())


class OptimalDenoiser(nn.Module):
    """Stands for the network: its "hidden states" are log q_i(v | y_t) of a law, by summing over all its sequences."""

    IMPOSSIBLE = -1e4  # instead of log 0, which times a zero of the head would be NaN; e**-10000 is 0 in float64

    def __init__(self, law: Tensor, codes: Tensor, length: int, base: int):
        super().__init__()
        self.law, self.base, self.vocab_size = law, base, len(codes)
        self.sequences = all_sequences(len(codes), length)
        self.digits = codes[self.sequences]  # (V**L, L, S)

    def forward(self, states: Tensor, *args, **kwargs) -> BaseModelOutput:
        fits = ((states[:, None] == self.base) | (states[:, None] == self.digits)).flatten(2).all(-1)
        posterior = fits * self.law
        posterior = posterior / posterior.sum(1, keepdim=True)  # (rows, V**L)
        is_token = nn.functional.one_hot(self.sequences, self.vocab_size).double()
        marginals = torch.einsum("rx,xlv->rlv", posterior, is_token)
        return BaseModelOutput(last_hidden_state=marginals.log().clamp(min=self.IMPOSSIBLE))


def optimal_model(law: Tensor, length: int, codes: Tensor | None = None, **fields) -> Any:
    """The product's model with the optimal denoiser of `law` as its network and the identity as its head."""
    vocab_size = fields["vocab_size"]
    model = small_model(hidden_size=vocab_size, num_attention_heads=1, head_dim=2, **fields).double()
    if codes is not None:
        model.code_table.codes[:-1] = codes
    model.model = OptimalDenoiser(law, model.code_table.codes[:-1], length, model.config.base)
    model.lm_head.weight = nn.Parameter(torch.eye(vocab_size, dtype=torch.double), requires_grad=False)
    return model


@torch.no_grad()
def nats_of_all_masks(model, ids: Tensor, order: RevealOrder, objective: str) -> tuple[Tensor, Tensor]:
    """Unweighted nats of each sequence under each set of hidden units, and the number of units hidden.

    ids (B, L). Returns (B, M) float64 and (M,) with M = 2**n - 1, n = L * units per token: all but "nothing hidden".
    """
    batch, length = ids.shape
    units = length * order.units_per_token
    masks = torch.tensor(list(itertools.product([False, True], repeat=units)))[1:]
    hidden = masks.view(-1, length, order.units_per_token)
    rows = ids.repeat_interleave(len(masks), dim=0)  # (B * M, L)
    weight = torch.ones(len(rows), dtype=torch.double)
    visible = order.visible_digits(hidden).repeat(batch, 1, 1)
    noise = Noise(visible, hidden.sum(-1).repeat(batch, 1), weight, torch.ones_like(rows, dtype=torch.bool))
    states = torch.where(visible, model.encode(rows), model.config.base)
    hidden_states = model.model(states).last_hidden_state
    _, nats = model.sequence_nll(hidden_states, rows, noise, order, objective, weight)
    return nats.view(batch, -1), masks.sum(1)


def count_form(nats: Tensor, counts: Tensor) -> Tensor:
    """(B, M) nats of all masks to (B,): mean over k of n/k times the mean over the masks that hide k."""
    units = int(counts.max())
    each = [units / k * nats[:, counts == k].mean(1) for k in range(1, units + 1)]
    return torch.stack(each).mean(0)


def time_form(nats: Tensor, counts: Tensor, num_points: int = 12) -> Tensor:
    """(B, M) nats of all masks to (B,): the integral over t of 1/t times the mean over the masks drawn at t.

    The integrand is a polynomial in t of degree n - 1; Gauss-Legendre with 12 points is exact to degree 23.
    """
    units = int(counts.max())
    points, weights = gauss_legendre(num_points)
    total = torch.zeros(len(nats), dtype=torch.double)
    for t, weight in zip(points, weights, strict=True):
        chance = t**counts * (1 - t) ** (units - counts)
        total += weight / t * (nats * chance).sum(1)
    return total


def gauss_legendre(num_points: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights on (0, 1), from the eigenvalues of the Jacobi matrix (Golub and Welsch, 1969)."""
    k = torch.arange(1, num_points, dtype=torch.double)
    off_diagonal = k / (4 * k**2 - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off_diagonal, 1) + torch.diag(off_diagonal, -1))
    return (nodes + 1) / 2, vectors[0] ** 2


class AnyOrder:
    """The law that a network defines when units are revealed one at a time in a random order, by recursion.

    A state is the tuple of each token's visible digits. Uses only the model's logits and plain sums: neither the
    chunked head nor `RevealOrder`'s methods.
    """

    def __init__(self, model, order: RevealOrder, ids: Tensor):
        """The logits of all sequences, ids (B, L), under all sets of visible digits, in one forward pass."""
        self.order, self.ids, self.codes = order, ids, model.code_table.codes[:-1]
        shape = (ids.shape[1], order.num_subtokens)
        sets = list(itertools.product([0, 1], repeat=shape[0] * shape[1]))
        visible = torch.tensor(sets, dtype=torch.bool).view(-1, 1, *shape)
        states = torch.where(visible, model.encode(ids), model.config.base)  # (2**(L * S), B, L, S)
        with torch.no_grad():
            logits = model(subtoken_ids=states.flatten(0, 1)).logits
        self.probabilities = logits.double().softmax(-1).unflatten(0, states.shape[:2])
        self.row_of = {each: row for row, each in enumerate(sets)}
        self.known = {}
        start = ((0,) * shape[1],) * shape[0]
        probability, self.bound = self._from(start)
        self.nats = -probability.log()  # (B,); bound (B,) is the mean over orders of -log p(x given the order)

    def _reveals(self, state: tuple) -> Iterator[tuple[int, tuple, float]]:
        """(token, its visible digits afterwards, chance) for each unit that may be revealed next."""
        found = []
        for i, visible in enumerate(state):
            if self.order.kind == "digit":
                for j in range(len(visible)):
                    if not visible[j]:
                        found.append((i, (*visible[:j], 1, *visible[j + 1 :]), 1))
            elif not all(visible):
                ends = self.order.stage_digits or (len(visible),)
                left = [end for end in ends if end > sum(visible)]
                after = (1,) * left[0] + (0,) * (len(visible) - left[0])
                found.append((i, after, len(left)))
        total = sum(count for _, _, count in found)
        for i, after, count in found:
            yield i, after, count / total

    def _from(self, state: tuple) -> tuple[Tensor, Tensor]:
        """(Mean over orders of the probability, of its -log) of revealing all that is hidden in `state`, (B,) each."""
        if all(map(all, state)):
            return torch.ones(len(self.ids), dtype=torch.double), torch.zeros(len(self.ids), dtype=torch.double)
        if state not in self.known:
            q = self.probabilities[self.row_of[sum(state, ())]]  # (B, L, V)
            probability = nats = 0.0
            for i, after, chance in self._reveals(state):
                # A digit from its own marginal, a stage as the whole prefix: the same where carry-over filters.
                new = [j for j in range(len(after)) if after[j] and not (state[i][j] and self.order.kind == "digit")]
                agrees = (self.codes[:, new] == self.codes[self.ids[:, i], None][..., new]).all(-1)  # (B, V)
                step = (q[:, i] * agrees).sum(1)
                rest = self._from((*state[:i], after, *state[i + 1 :]))
                probability = probability + chance * step * rest[0]
                nats = nats + chance * (rest[1] - step.log())
            self.known[state] = probability, nats
        return self.known[state]


def naive_nats(
    hidden_states, head, codes, ids, visible, kind: str, carry_over: bool = True, target_digits: Tensor | None = None
) -> Tensor:
    """Nats per token (N,) by loops and full logits, differentiable: the reference of the chunked head."""
    nats = []
    for n, logits in enumerate(hidden_states @ head.T):
        allowed = torch.ones(len(codes), dtype=torch.bool)
        if carry_over:
            for j in visible[n].nonzero().flatten().tolist():
                allowed &= codes[:, j] == codes[ids[n], j]
        log_q = logits.masked_fill(~allowed, -torch.inf).log_softmax(0)
        if kind == "token":
            nats.append(-log_q[ids[n]])
        elif kind == "digits":
            asked = (~visible[n]).nonzero().flatten().tolist()
            nats.append(-sum(log_q[codes[:, j] == codes[ids[n], j]].logsumexp(0) for j in asked))
        else:
            agrees = (codes[:, target_digits[n]] == codes[ids[n], target_digits[n]]).all(1)
            nats.append(-log_q[agrees].logsumexp(0))
    return torch.stack(nats)


# Autoregressive models


@torch.no_grad()
def causal_law(model, length: int, prompt: tuple[int, ...] = ()) -> dict[tuple, float]:
    """Probability of each continuation of `length` tokens, prompt included in the key; logits one prefix at a time."""
    vocab_size, known, total = model.config.vocab_size, {}, {}
    for new in itertools.product(range(vocab_size), repeat=length):
        probability = 1.0
        for i, token in enumerate(new):
            prefix = (START, *prompt, *new[:i])
            if prefix not in known:
                known[prefix] = model(torch.tensor([prefix])).logits[0, -1].double().softmax(-1).tolist()
            probability *= known[prefix][token]
        total[(*prompt, *new)] = probability
    return total


# Uniform-state diffusion


class OptimalUniformDenoiser(nn.Module):
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


def optimal_uniform(law: Tensor, vocab_size: int, length: int, own: bool = False) -> Any:
    """The product's model with the optimal denoiser of `law` as its network and the identity as its head."""
    model = small_uniform(vocab_size=vocab_size, hidden_size=vocab_size, num_attention_heads=1, head_dim=2).double()
    model.model = OptimalUniformDenoiser(law, vocab_size, length, own)
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


# Interpolating diffusion


class OptimalInterpolatingDenoiser(nn.Module):
    """Stands for the network: the "hidden state" of an input is log p(v at its place | the tokens that it sees).

    With a cache it keeps ids and places of inputs as keys, as a network keeps what it knows of them.
    """

    code_table = None  # tokens are whole

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
        return BaseModelOutput(
            last_hidden_state=marginals.gather(2, own).squeeze(2).log().clamp(OptimalDenoiser.IMPOSSIBLE)
        )


def optimal_interpolating(law: Tensor, vocab_size: int, length: int, **fields) -> Any:
    """The product's model with the optimal denoiser of `law` as its network and the identity as its head."""
    model = small_interpolating(
        vocab_size=vocab_size, hidden_size=vocab_size, num_attention_heads=1, head_dim=2, **fields
    )
    model = model.double()
    model.model = OptimalInterpolatingDenoiser(law, vocab_size, length)
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
