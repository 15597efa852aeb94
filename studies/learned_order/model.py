"""MDM whose tokens, or stages of tokens, are revealed in an order that depends on the text, with a bound that holds.

Time runs backward, in log t. The forward process, which knows the text, reveals the next unit of token i at a rate p
of its own; the model reveals token (or node) v there at the rate r_v = m q(v), q its softmax. By Girsanov's theorem
    -log p(text) <= E_forward sum over reveals k of f(state) / Lambda,   Lambda = sum of p over tokens not yet known,
    f = sum over these of  p (-log q(x_i)) + p log(p / m) - p + m
with the sum over k written as n times its mean over k ~ U{1..n}. All rates 1 give the count form of MDM, rates (2, 1)
of two stages that of the nested order. m, for the three kinds of rates:
    "given"    numbers, the same for all tokens: m = p
    "node"     a number for each first stage of the code (GenMD4, arXiv:2406.04329, has one for each token): of first
               units r_v = p_v q(v), so p log(p / m) - p + m becomes sum_v p_v q(v) - p; of others m = p
    "context"  also of the first stages of both neighbours, so that the order knows the text and the model does not
               (LoMDM, arXiv:2602.02112, whose rates are a network's): m is read from the hidden state
The rates are learned from the bound itself: what it is a function of by the gradient, the order by the score function.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from prime_v2.chunked_loss_prime_v2 import chunk_elements
from prime_v2.diffusion_prime_v2 import hidden_counts_to_draw
from prime_v2.linear_prime_v2 import product
from prime_v2.loss_prime_v2 import divisor, training_batch
from prime_v2.modeling_prime_v2 import PrimeV2ForMaskedDiffusion
from prime_v2.random_prime_v2 import Stream, uniforms
from prime_v2.stage_head_prime_v2 import stage_nll

KINDS = ("given", "node", "context")
LOG_RANGE = 1.5  # rates lie within a factor of exp(1.5) of those that they begin with
QUIET = 1e-3  # of the rates' part of the loss, so that clipping follows the network's; Adam does not see it
BINS, MEMORY = 16, 0.95  # of the running mean that the score function is measured from


class Rates(nn.Module):
    """Rates of the J units of each token, (B, L, J), from the first stages (B, L) int64 of the tokens."""

    begin: Tensor

    def __init__(self, kind: str, begin: list[float], speed: float, num_nodes: int, width: int):
        """begin: J rates before anything is learned; speed: how much faster than a weight a learned number moves."""
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r} is not one of {', '.join(KINDS)}")
        self.kind, self.speed = kind, speed
        self.register_buffer("begin", torch.tensor(begin))
        if kind != "given":
            self.own = nn.Parameter(torch.zeros(num_nodes, len(begin)))
        if kind == "context":
            self.left = nn.Parameter(torch.zeros(num_nodes, len(begin)))
            self.right = nn.Parameter(torch.zeros(num_nodes, len(begin)))
            self.guess = nn.Linear(width, len(begin))
            nn.init.zeros_(self.guess.weight)
            nn.init.zeros_(self.guess.bias)

    def of_numbers(self, numbers: Tensor) -> Tensor:
        return self.begin * (LOG_RANGE * torch.tanh(self.speed * numbers)).exp()

    def forward(self, nodes: Tensor) -> Tensor:
        if self.kind == "given":
            return self.begin.expand(*nodes.shape, -1)
        numbers = self.own[nodes]
        if self.kind == "context":
            before, after = nn.functional.pad(nodes, (1, 0))[:, :-1], nn.functional.pad(nodes, (0, 1))[:, 1:]
            numbers = numbers + self.left[before] + self.right[after]
        return self.of_numbers(numbers)

    @torch.no_grad()
    def forget(self) -> None:
        """Back to the rates that were begun with."""
        for parameter in self.parameters():
            parameter.zero_()

    def guessed(self, hidden_states: Tensor) -> Tensor:
        """m of "context" (..., J) from hidden states (..., D)."""
        return self.begin * (LOG_RANGE * torch.tanh(self.guess(hidden_states))).exp()


@dataclass
class Draw:
    """revealed (B, L) int64: units of each token that are visible; total (B,): Lambda; log_chance (B,): of the reveals
    so far in their order; both differentiable in the rates."""

    revealed: Tensor
    total: Tensor
    log_chance: Tensor


def draw(rates: Tensor, counts: Tensor, draws: Tensor) -> Draw:
    """The state with so many hidden units, counts (B,), of a race: rates and uniform draws (B, L, J)."""
    batch, length, units = rates.shape
    # In the logarithm of time a unit waits for an exponential time after the unit before it.
    times = (-draws.log() / rates.detach()).cumsum(-1).flatten(1)
    order = times.argsort(dim=1, stable=True)
    ended = torch.cat([rates[..., 1:] - rates[..., :-1], -rates[..., -1:]], -1).flatten(1)  # what a reveal adds to it
    flat, begin = rates.flatten(1), rates[..., 0].sum(1, keepdim=True)
    totals = torch.cat([begin, begin + ended.gather(1, order).cumsum(1)[:, :-1]], 1)  # before each reveal
    number = length * units - counts
    past = torch.arange(length * units, device=rates.device) < number.unsqueeze(1)
    shares = torch.where(past, flat.gather(1, order) / totals.clamp(min=1e-30), 1.0)
    visible = torch.zeros_like(past).scatter(1, order, past)
    total = totals.gather(1, number.unsqueeze(1)).squeeze(1)
    return Draw(visible.view(batch, length, units).sum(-1), total, shares.log().sum(1))


class LearnedOrderModel(PrimeV2ForMaskedDiffusion):
    """MDM with a tree embedding and a head in stages, of the reveal order "token" or "nested"."""

    rates: Rates

    def add_rates(self, kind: str, begin: list[float], speed: float) -> None:
        config = self.config
        ends = [*config.stage_digits] if config.reveal_order == "nested" else [config.num_subtokens]
        if not self.is_staged or config.reveal_order not in ("token", "nested") or len(begin) != len(ends):
            raise ValueError(
                f"reveal_order={config.reveal_order}, head={config.head} and {len(begin)} rates; give token or "
                f"nested, stages and {len(ends)} rates"
            )
        if config.reveal_order == "nested" and [*config.head_ends] != ends:
            raise ValueError(f"head_digits={[*config.head_ends]} must be the stages {ends}")
        self.ends = torch.tensor([0, *ends])  # digits visible after so many units
        self.rates = Rates(kind, begin, speed, config.base ** config.head_ends[0], config.hidden_size)
        self.means, self.seen = torch.zeros(BINS), torch.zeros(BINS)

    def _loss(
        self, input_ids, attention_mask, position_ids, labels, noise_keys, noise_levels, num_items_in_batch, **kwargs
    ):
        batch = training_batch(self.config, input_ids, attention_mask, labels, noise_keys, noise_levels)
        if not batch.scored.all():
            raise ValueError("the learned order is for whole blocks; give labels without -100 and padding")
        network, bounds, learning = self.terms(batch.ids, batch.noise_keys, batch.noise_levels)
        return network / divisor(num_items_in_batch, batch.scored) + QUIET * learning, bounds, BaseModelOutput()

    def terms(self, ids: Tensor, keys: Tensor, levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(loss of the network, a sum; bounds (B,) of the rows, detached; loss of the rates), a draw for each row.

        The network's has each draw's weight k / Lambda in place of n / Lambda, as `loss_weight: low_variance` has 1.
        """
        head: Any = self.head()
        chunk = chunk_elements(ids.device)
        level, codes = head.tree.levels[0], self.code_table.encode(ids)
        nodes = level.node[ids]
        rates = self.rates(nodes)
        units = rates.shape[1] * rates.shape[2]
        counts = hidden_counts_to_draw(levels, torch.full_like(keys, units))
        numbers = torch.arange(1, units + 1, device=ids.device)
        draws = uniforms(keys.unsqueeze(1), Stream.UNITS, numbers).view(rates.shape).to(rates.dtype)
        drawn = draw(rates, counts, draws)
        first = self.ends.to(ids.device)[drawn.revealed]
        visible = torch.arange(codes.shape[-1], device=ids.device) < first.unsqueeze(-1)
        states = torch.where(visible, codes, self.config.base)
        hidden_states = self.model(states).last_hidden_state
        rows, columns = (drawn.revealed < rates.shape[2]).nonzero(as_tuple=True)
        inputs, unit = hidden_states[rows, columns], drawn.revealed[rows, columns]
        rate = rates[rows, columns, unit]
        last = self.ends.to(ids.device)[unit + 1]
        low = (counts / drawn.total).detach()[rows].float()
        total, nats = stage_nll(
            inputs,
            head,
            ids[rows, columns],
            first[rows, columns],
            last,
            rate.detach() * low,
            chunk,
        )
        mismatch = self._mismatch(inputs, unit, rate, head)
        network = total + (mismatch(for_rates=False) * low).sum()
        f = rate * nats + mismatch(for_rates=True)
        bounds = torch.zeros_like(drawn.total).index_add(0, rows, f) * units / drawn.total
        learning = network.new_zeros(())
        if self.training and self.rates.kind != "given":
            surplus = bounds.detach() - self._usual(levels, bounds.detach())
            learning = (bounds + surplus * drawn.log_chance).mean() / ids.shape[1]
        return network, bounds.detach().double(), learning

    def _mismatch(self, inputs: Tensor, unit: Tensor, rate: Tensor, head):
        """What f has beside p (-log q): differentiable in the network, or for_rates in what the rates are made of."""
        if self.rates.kind == "given":
            return lambda for_rates: torch.zeros_like(rate)
        if self.rates.kind == "context":
            guess = self.rates.guessed(inputs).gather(1, unit.unsqueeze(1)).squeeze(1)

            def between(for_rates: bool) -> Tensor:
                p, m = (rate, guess.detach()) if for_rates else (rate.detach(), guess)
                return p * (p / m).log() - p + m

            return between
        level = head.tree.levels[0]
        scores = product(inputs, head.weight[level.first : level.first + len(self.rates.own)])
        if level.used is not None:
            scores = scores.masked_fill(~level.used, -torch.inf)
        chances, of_nodes = scores.softmax(-1), self.rates.of_numbers(self.rates.own)[:, 0]

        def mean_less_own(for_rates: bool) -> Tensor:
            q, p, own = (
                (chances.detach(), of_nodes, rate) if for_rates else (chances, of_nodes.detach(), rate.detach())
            )
            return torch.where(unit == 0, q @ p - own, 0.0)

        return mean_less_own

    def _usual(self, levels: Tensor, bounds: Tensor) -> Tensor:
        """The running mean of the bounds at such levels, before these, (B,); these where there is none yet."""
        bins = (levels * BINS).long().clamp(max=BINS - 1).cpu()
        usual = torch.where(self.seen[bins] > 0, self.means[bins], bounds.cpu())
        for place, value in zip(bins.tolist(), bounds.tolist(), strict=True):
            keep = MEMORY if self.seen[place] else 0.0
            self.means[place] = keep * self.means[place] + (1 - keep) * value
            self.seen[place] = 1.0
        return usual.to(bounds)
