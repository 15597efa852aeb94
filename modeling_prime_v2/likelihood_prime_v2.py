"""Likelihoods of masked diffusion: which masks and orders a method runs (docs/derivation.md, "Bounds")."""

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from .diffusion_prime_v2 import STAGED, Noise, RevealOrder, draw_noise, is_bound
from .likelihood_frame_prime_v2 import Likelihood
from .likelihood_output_prime_v2 import jackknifed
from .likelihood_rows_prime_v2 import ROWS_PER_PIECE, Rows
from .random_prime_v2 import Stream, hash64, uniforms

# method: (reveal order of the noise, objective)
SAMPLED_METHODS = {
    "subtoken": ("digit", "marginal"),
    "token": ("token", "marginal"),
    **{kind: (kind, "marginal") for kind in STAGED},
    "paper_loss": ("digit", "joint"),
}
METHODS = (*SAMPLED_METHODS, "chain", "orders")
# The bound of the order in which a model reveals its units.
BOUND_OF_ORDER = {order: method for method, (order, objective) in SAMPLED_METHODS.items() if objective == "marginal"}


class PrimeV2Likelihood(Likelihood):
    """Rows of a sequence under its masks: drawn, all there are, left to right, or along orders of its units."""

    sampled_methods = tuple(SAMPLED_METHODS)
    padding = {"visible": True}

    def __init__(self, config: Any, method: str, num_samples: int, exhaustive: bool, round_number: int):
        kind, self.objective = {"chain": ("token", "joint"), **SAMPLED_METHODS}.get(method, (None, "marginal"))
        if method == "chain" and config.reveal_order == "coarse_first":  # in which no token is whole at first
            kind, self.objective = "coarse_first", "marginal"
        self.order = RevealOrder.from_config(config, kind)
        if method in METHODS and method not in self.methods_of(config):
            raise ValueError(
                f"method={method!r} hides digits in any order, but subtoken_embedding={config.subtoken_embedding!r} "
                f"has vectors for leading digits only; use one of {', '.join(self.methods_of(config))}"
            )
        super().__init__(config, method, num_samples, exhaustive, round_number)
        self.is_exact = method == "chain"
        self.is_bound = method in ("chain", "orders") or is_bound(
            self.objective, "elbo", config.num_subtokens, self.order, None
        )

    @classmethod
    def methods_of(cls, config: Any) -> tuple[str, ...]:
        """Stages only where there are some; digits in any order only if their states have vectors.

        The last, "sampler", runs no rows of this class: see `PrimeV2ForMaskedDiffusion.log_likelihood`.
        """
        missing = [] if config.stage_digits else list(STAGED)
        if not config.stage_windows:
            missing.append("windows")
        if config.subtoken_embedding == "ancestors":
            missing += [method for method, (order, _) in SAMPLED_METHODS.items() if order == "digit"]
        return (*(method for method in METHODS if method not in missing), "sampler")

    @classmethod
    def bound_of(cls, config: Any) -> str:
        """The bound of the order in which the model reveals its units."""
        return BOUND_OF_ORDER[config.reveal_order]

    def is_enumerated(self, num_tokens: int) -> bool:
        if self.is_exact or num_tokens * self.order.units_per_token > 62 or self.order.kind == "windows":
            return self.is_exact
        number = num_orders(num_tokens, self.order) if self.method == "orders" else num_masks(num_tokens, self.order)
        return number <= self.most_rows

    def rows(self, ids: Tensor, scored: Tensor, key: Tensor) -> Iterator[Rows]:
        for noise, factor in self._noise(scored, key):
            inputs = {
                "ids": ids.expand(len(factor), -1),
                "visible": noise.visible.expand(-1, -1, self.config.num_subtokens),
                "hidden_count": noise.hidden_count,
                "maskable": noise.maskable,
            }
            for name in ("target_digits", "eligible_count"):
                if getattr(noise, name) is not None:
                    inputs[name] = getattr(noise, name)
            yield Rows(inputs, factor)

    def _noise(self, scored: Tensor, key: Tensor) -> Iterator[tuple[Noise, Tensor]]:
        """(noise of R rows, factor (R,) float64 of their nats) of one sequence, scored (L,), in pieces."""
        num_tokens = int(scored.sum())
        if self.method == "chain":
            yield from chain_noise(scored, self.order)
        elif self.method == "orders":
            if self.is_enumerated(num_tokens):
                orders = all_orders(num_tokens, self.order)
            else:
                orders = random_orders(num_tokens, self.order, self.num_samples, key)
            yield from order_noise(scored, self.order, orders)
        elif self.is_enumerated(num_tokens):
            yield from all_mask_noise(scored, self.order)
        else:
            for keys, levels in self.samples(key):
                # The count form: the number of hidden units is spread evenly over 1..n; the factor is n/k.
                noise = draw_noise(scored.expand(len(keys), -1), self.order, keys, levels)
                yield noise, noise.weight

    def row_loss(self, model: Any, inputs: dict[str, Tensor], attention_mask: Tensor | None) -> Tensor:
        ids, visible = inputs["ids"], inputs["visible"]
        states = torch.where(visible, model.encode(ids), model.config.base)
        hidden_states = model.model(states, attention_mask).last_hidden_state
        weight = torch.ones(len(ids), dtype=torch.double, device=ids.device)
        some = (inputs.get(name) for name in ("target_digits", "eligible_count"))
        noise = Noise(visible, inputs["hidden_count"], weight, inputs["maskable"], *some)
        return model.sequence_nll(hidden_states, ids, noise, self.order, self.objective, weight)[1]

    def summarise(self, nats: Tensor, num_tokens: int) -> tuple[Tensor, Tensor, Tensor, float]:
        if self.method != "orders":
            return super().summarise(nats, num_tokens)
        log_p = -nats.view(-1, num_tokens * self.order.units_per_token).sum(1)  # (K,)
        if not self.is_enumerated(num_tokens):
            return jackknifed(log_p)
        value = log_p.logsumexp(0) - math.log(len(log_p))
        return value.unsqueeze(0), value, nats.new_zeros(()), math.inf


def num_masks(num_tokens: int, order: RevealOrder) -> int:
    """States of the noise in which something is hidden, for `num_tokens` scored tokens."""
    if order.kind == "coarse_first":
        return order.units_per_token * (2**num_tokens - 1)
    states = order.units_per_token + 1 if order.kind == "nested" else 2**order.units_per_token
    return states**num_tokens - 1


def all_mask_noise(scored: Tensor, order: RevealOrder) -> Iterator[tuple[Noise, Tensor]]:
    """Every state of `num_masks` once; the factors make the sum over rows the expectation of the count form.

    A state that hides k of n units has probability 1 / (n C(n, k)) and weight n / k. Of "nested", which sees only how
    many of a token's J stages are hidden, a state stands for the product of C(J, hidden) sets. Of "coarse_first" a
    state hides stage j of k of N tokens: probability 1 / (J N C(N, k)), weight J N / k.
    """
    units, num_tokens = order.units_per_token, int(scored.sum())
    states = coarse_first_states(units, num_tokens) if order.kind == "coarse_first" else free_states(order, num_tokens)
    while piece := list(itertools.islice(states, ROWS_PER_PIECE)):
        hidden = torch.zeros(len(piece), len(scored), units, dtype=torch.bool)
        hidden[:, scored.cpu()] = torch.tensor([state for state, _ in piece])
        hidden = hidden.to(scored.device)
        factor = torch.tensor([each for _, each in piece], dtype=torch.double, device=scored.device)
        maskable, hidden_count = scored.expand(len(piece), -1), hidden.sum(-1)
        noise = Noise(order.visible_digits(hidden), hidden_count, torch.ones_like(factor), maskable)
        if order.kind == "coarse_first":
            most = hidden_count.amax(1, keepdim=True)  # the tokens that lack the first stage that any lacks
            noise.eligible_count = (maskable & (hidden_count == most)).long()
        yield noise, factor


def free_states(order: RevealOrder, num_tokens: int) -> Iterator[tuple[tuple, float]]:
    """(hidden units of each token, factor) of every state of an order that has no phases."""
    units, n = order.units_per_token, num_tokens * order.units_per_token
    each: list[tuple[int, tuple[bool, ...]]] = [
        (1, tuple(bool(bits >> unit & 1) for unit in range(units))) for bits in range(2**units)
    ]
    if order.kind == "nested":
        each = [(math.comb(units, h), tuple(unit >= units - h for unit in range(units))) for h in range(units + 1)]
    for state in itertools.islice(itertools.product(each, repeat=num_tokens), 1, None):  # the first hides nothing
        hidden = tuple(token for _, token in state)
        k = sum(map(sum, hidden))
        yield hidden, math.prod(count for count, _ in state) / (k * math.comb(n, k))


def coarse_first_states(stages: int, num_tokens: int) -> Iterator[tuple[tuple, float]]:
    """(hidden stages of each token, factor) of every state of every phase."""
    for phase in range(stages):
        for subset in itertools.islice(itertools.product((False, True), repeat=num_tokens), 1, None):
            hidden = tuple(tuple(stage > phase - lacks for stage in range(stages)) for lacks in subset)
            k = sum(subset)
            yield hidden, 1 / (k * math.comb(num_tokens, k))


def chain_noise(scored: Tensor, order: RevealOrder) -> Iterator[tuple[Noise, Tensor]]:
    """A row for each scored token, left to right: that token is predicted, it and the later ones are hidden.

    Of "coarse_first" a row for each stage of each token: all first stages left to right, then all second ones, ...
    """
    if order.kind == "coarse_first":
        yield from order_noise(scored, order, [left_to_right(int(scored.sum()), order)])
        return
    positions = torch.arange(len(scored), device=scored.device)
    for targets in scored.nonzero().squeeze(1).split(ROWS_PER_PIECE):  # (R,)
        hidden = scored & (positions >= targets.unsqueeze(1))  # (R, L)
        is_target = positions == targets.unsqueeze(1)
        ones = torch.ones(len(targets), dtype=torch.double, device=scored.device)
        yield Noise(~hidden.unsqueeze(-1), is_target.long(), ones, is_target), ones


def left_to_right(num_tokens: int, order: RevealOrder) -> Tensor:
    """Ranks (n,) of the units from left to right; of "coarse_first" all first stages so, then all second ones, ..."""
    if order.kind != "coarse_first":
        return torch.arange(num_tokens * order.units_per_token)
    stages = torch.arange(order.units_per_token).unsqueeze(1)
    return (torch.arange(num_tokens) + num_tokens * stages).T.flatten()


def order_noise(scored: Tensor, order: RevealOrder, orders: Iterable[Tensor]) -> Iterator[tuple[Noise, Tensor]]:
    """A row for each unit of each order: what comes later is hidden, and only that unit is predicted.

    orders: ranks (n,) of the n = scored tokens x units, 0 being revealed first.
    """
    units = order.units_per_token
    maskable = scored.repeat_interleave(units)  # (L * U,)
    num_units = int(maskable.sum())
    for some in orders:
        ranks = torch.full((len(maskable),), num_units, device=scored.device)
        ranks[maskable] = some.to(scored.device)
        for start in range(0, num_units, ROWS_PER_PIECE):
            steps = torch.arange(start, min(num_units, start + ROWS_PER_PIECE), device=scored.device).unsqueeze(1)
            hidden = (maskable & (ranks >= steps)).view(len(steps), -1, units)
            targets = (maskable & (ranks == steps)).view(len(steps), -1, units)
            target_digits = targets if order.kind == "digit" else order.next_visible(hidden.sum(-1))
            target_tokens, ones = targets.any(-1), torch.ones(len(steps), dtype=torch.double, device=scored.device)
            visible = order.visible_digits(hidden)
            yield Noise(visible, target_tokens.long(), ones, target_tokens, target_digits), ones


def random_orders(num_tokens: int, order: RevealOrder, num_orders: int, key: Tensor) -> Iterator[Tensor]:
    """Ranks (n,) of `num_orders` random orders of the n = tokens x units, drawn as the reveal order has them."""
    numbers = torch.arange(num_tokens * order.units_per_token, device=key.device)
    for number in range(num_orders):
        times = uniforms(key, Stream.ORDER, number, numbers)
        if order.num_segments > 1:
            times = times + order.segments(hash64(key, Stream.ORDER, number), numbers)
        yield times.argsort(stable=True).argsort()


def num_orders(num_tokens: int, order: RevealOrder) -> int:
    """How many orders `all_orders` gives."""
    if order.kind == "coarse_first":
        return math.factorial(num_tokens) ** order.units_per_token
    return math.factorial(num_tokens * order.units_per_token)


def all_orders(num_tokens: int, order: RevealOrder) -> Iterator[Tensor]:
    """Ranks (n,) of each order of the units, the first one from left to right; not of "windows"."""
    units = order.units_per_token
    if order.kind != "coarse_first":
        yield from map(torch.tensor, itertools.permutations(range(num_tokens * units)))
        return
    for phases in itertools.product(itertools.permutations(range(num_tokens)), repeat=units):
        yield (torch.tensor(phases) + num_tokens * torch.arange(units).unsqueeze(1)).T.flatten()
