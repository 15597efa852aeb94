"""Distributions and networks small enough to enumerate, and plain-loop forms of what the package computes fast."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from prime_v2.configuration_prime_v2 import PrimeV2Config
from prime_v2.diffusion_prime_v2 import Noise, RevealOrder
from prime_v2.modeling_prime_v2 import PrimeV2ForMaskedDiffusion


def small_config(**changes) -> PrimeV2Config:
    """11 tokens in 4 binary digits, two layers of width 16."""
    fields = {
        "vocab_size": 11,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
    }
    return PrimeV2Config(**fields | changes)


def small_model(seed: int = 0, scale: float = 0.3, **changes) -> PrimeV2ForMaskedDiffusion:
    """A random network, in evaluation mode; weights of this `scale` make its predictions far from uniform."""
    torch.manual_seed(seed)
    return PrimeV2ForMaskedDiffusion(small_config(initializer_range=scale, **changes)).eval()


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


def optimal_model(law: Tensor, length: int, codes: Tensor | None = None, **fields) -> PrimeV2ForMaskedDiffusion:
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

    A state is the tuple of each token's visible digits. Uses the model's logits and plain sums alone: neither the
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
