"""Which rows of the network a likelihood needs: noise draws, every mask there is, left to right, random orders.

A *row* is a sequence under one state of the noise. The draws of a sequence are a pure function of its key (see
`sequence_key`), its number of scored tokens and the draw's number: equal keys are common random numbers.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .diffusion_prime_v2 import Noise, RevealOrder, draw_noise
from .random_prime_v2 import Stream, hash64, uniforms

ROWS_PER_PIECE = 256  # of one sequence, so that a long sequence's states do not fill the memory


@dataclass
class Rows:
    """Rows of one sequence: ids (R, L), their noise, the factor (R,) of each row's nats, and the sequence's number."""

    ids: Tensor
    noise: Noise
    factor: Tensor
    sequence: int

    def part(self, piece: slice) -> "Rows":
        return Rows(self.ids[piece], self.noise.rows(piece), self.factor[piece], self.sequence)


def sequence_key(ids: Tensor, scored: Tensor, seed: int) -> Tensor:
    """int64 key of a sequence: a hash of the seed, its ids (L,) and which of them are scored (L,)."""
    positions = torch.arange(len(ids), device=ids.device)
    return hash64(seed, Stream.SEQUENCE, hash64(positions, ids, scored.long()).sum())


def draw_levels(key: Tensor, num_samples: int, round_number: int = 0) -> Tensor:
    """Levels (K,) float64 of K = `num_samples` draws, rising; one in each of K equal strata of (0, 1).

    round_number r > 0: the r-th lot of draws after the first K / 2^(r-1), as many as there are before it. Each earlier
    draw lies in one half of its stratum, a new one is drawn in the other half, so that all 2 K together have one draw
    in each of 2 K strata (nested scrambling, Owen 1995, in one dimension).
    """
    before = num_samples if round_number == 0 else num_samples >> (round_number - 1)
    numbers = torch.arange(before, device=key.device)
    levels = (numbers + uniforms(hash64(key, numbers), Stream.DRAW)) / before
    for lot in range(1, round_number + 1):
        count = len(levels)
        numbers = torch.arange(count, device=key.device)
        upper = (levels * 2 * count).floor() - 2 * numbers  # 1 where the upper half is taken
        within = uniforms(hash64(key, Stream.ROUND, lot, numbers), Stream.DRAW)
        new = (2 * numbers + 1 - upper + within) / (2 * count)
        if lot == round_number:
            return new
        levels = torch.cat([levels, new]).sort().values
    return levels


def sampled_rows(
    ids: Tensor,
    scored: Tensor,
    sequence: int,
    order: RevealOrder,
    num_samples: int,
    key: Tensor,
    round_number: int = 0,
) -> Iterator[Rows]:
    """`num_samples` draws of the count form, the number of hidden units spread evenly over 1..n; factor n/k."""
    draws = torch.arange(num_samples, device=ids.device)
    keys = hash64(key, draws) if round_number == 0 else hash64(key, Stream.ROUND, round_number, draws)
    levels = draw_levels(key, num_samples, round_number)
    for start in range(0, num_samples, ROWS_PER_PIECE):
        piece = slice(start, start + ROWS_PER_PIECE)
        maskable = scored.expand(len(keys[piece]), -1)
        noise = draw_noise(maskable, order, keys[piece], levels[piece])
        yield Rows(ids.expand(len(maskable), -1), noise, noise.weight, sequence)


def num_masks(num_tokens: int, order: RevealOrder) -> int:
    """States of the noise in which something is hidden, for `num_tokens` scored tokens."""
    states = order.units_per_token + 1 if order.kind == "nested" else 2**order.units_per_token
    return states**num_tokens - 1


def all_mask_rows(ids: Tensor, scored: Tensor, sequence: int, order: RevealOrder) -> Iterator[Rows]:
    """Every state of `num_masks` once; the factors make the sum over rows the expectation of the count form.

    A state that hides k of n units has probability 1 / (n C(n, k)) and weight n / k. Of "nested", which sees only how
    many of a token's J stages are hidden, a state stands for the product of C(J, hidden) sets.
    """
    units, num_tokens = order.units_per_token, int(scored.sum())
    each: list[tuple[int, tuple[bool, ...]]] = [
        (1, tuple(bool(bits >> unit & 1) for unit in range(units))) for bits in range(2**units)
    ]
    if order.kind == "nested":
        each = [(math.comb(units, h), tuple(unit >= units - h for unit in range(units))) for h in range(units + 1)]
    states = itertools.islice(itertools.product(each, repeat=num_tokens), 1, None)  # the first hides nothing
    n = num_tokens * units
    while piece := list(itertools.islice(states, ROWS_PER_PIECE)):
        hidden = torch.zeros(len(piece), len(ids), units, dtype=torch.bool)
        hidden[:, scored.cpu()] = torch.tensor([[token for _, token in state] for state in piece])
        counts = hidden.sum((1, 2)).tolist()
        sets = [math.prod(count for count, _ in state) for state in piece]
        factors = [m / (k * math.comb(n, k)) for m, k in zip(sets, counts, strict=True)]
        hidden, factor = hidden.to(ids.device), torch.tensor(factors, dtype=torch.double, device=ids.device)
        maskable = scored.expand(len(piece), -1)
        noise = Noise(order.visible_digits(hidden), hidden.sum(-1), torch.ones_like(factor), maskable)
        yield Rows(ids.expand(len(piece), -1), noise, factor, sequence)


def chain_rows(ids: Tensor, scored: Tensor, sequence: int) -> Iterator[Rows]:
    """A row for each scored token, left to right: that token is predicted, it and the later ones are hidden."""
    positions = torch.arange(len(ids), device=ids.device)
    for targets in scored.nonzero().squeeze(1).split(ROWS_PER_PIECE):  # (R,)
        hidden = scored & (positions >= targets.unsqueeze(1))  # (R, L)
        is_target = positions == targets.unsqueeze(1)
        ones = torch.ones(len(targets), dtype=torch.double, device=ids.device)
        noise = Noise(~hidden.unsqueeze(-1), is_target.long(), ones, is_target)
        yield Rows(ids.expand(len(targets), -1), noise, ones, sequence)


def order_rows(
    ids: Tensor, scored: Tensor, sequence: int, order: RevealOrder, orders: Iterator[Tensor]
) -> Iterator[Rows]:
    """A row for each unit of each order: what comes later is hidden, and only that unit is predicted.

    orders: ranks (n,) of the n = scored tokens x units, 0 being revealed first.
    """
    units = order.units_per_token
    maskable = scored.repeat_interleave(units)  # (L * U,)
    num_units = int(maskable.sum())
    for some in orders:
        ranks = torch.full((len(maskable),), num_units, device=ids.device)
        ranks[maskable] = some.to(ids.device)
        for start in range(0, num_units, ROWS_PER_PIECE):
            steps = torch.arange(start, min(num_units, start + ROWS_PER_PIECE), device=ids.device).unsqueeze(1)
            hidden = (maskable & (ranks >= steps)).view(len(steps), -1, units)
            targets = (maskable & (ranks == steps)).view(len(steps), -1, units)
            target_digits = targets if order.kind == "digit" else order.next_visible(hidden.sum(-1))
            target_tokens, ones = targets.any(-1), torch.ones(len(steps), dtype=torch.double, device=ids.device)
            noise = Noise(order.visible_digits(hidden), target_tokens.long(), ones, target_tokens, target_digits)
            yield Rows(ids.expand(len(steps), -1), noise, ones, sequence)


def random_orders(num_units: int, num_orders: int, key: Tensor) -> Iterator[Tensor]:
    """Ranks (n,) of `num_orders` random orders."""
    numbers = torch.arange(num_units, device=key.device)
    for number in range(num_orders):
        yield uniforms(key, Stream.ORDER, number, numbers).argsort(stable=True).argsort()


def all_orders(num_units: int) -> Iterator[Tensor]:
    """Ranks (n,) of each of the n! orders."""
    for ranks in itertools.permutations(range(num_units)):
        yield torch.tensor(ranks)


__all__ = ["Rows", "draw_levels", "sequence_key"]
