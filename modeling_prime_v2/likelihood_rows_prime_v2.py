"""Rows of the network that a likelihood needs, and the keys and levels of those that are drawn.

A *row* is a sequence under one state of the noise. The draws of a sequence are a pure function of its key (see
`sequence_key`), its number of scored tokens and the sample's number: equal keys are common random numbers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .random_prime_v2 import Stream, hash64, uniforms

FURTHER_SAMPLES = Stream.ROUND  # keys of later rounds
ROWS_PER_PIECE = 256  # of one sequence, so that a long sequence's states do not fill the memory


@dataclass
class Rows:
    """R rows of one sequence: `inputs` by name, (R, L, ...) or (R,); the factor (R,) float64 of each row's nats.

    What is padded to the longest row of a pass has more than one axis. sequence: the number of the sequence in its
    batch.
    """

    inputs: dict[str, Tensor]
    factor: Tensor
    sequence: int = -1

    def __len__(self) -> int:
        return len(self.factor)

    @property
    def length(self) -> int:
        """L."""
        return self.inputs["ids"].shape[1]

    def part(self, piece: slice) -> "Rows":
        return Rows({name: each[piece] for name, each in self.inputs.items()}, self.factor[piece], self.sequence)


def sequence_key(ids: Tensor, scored: Tensor, seed: int) -> Tensor:
    """int64 key of a sequence: a hash of the seed, its ids (L,) and which of them are scored (L,)."""
    positions = torch.arange(len(ids), device=ids.device)
    return hash64(seed, Stream.SEQUENCE, hash64(positions, ids, scored.long()).sum())


def sample_keys(key: Tensor, num_samples: int, round_number: int, stream: Stream) -> Tensor:
    """int64 keys (K,) of K = `num_samples` samples of a sequence; `stream` tells later rounds from the first."""
    numbers = torch.arange(num_samples, device=key.device)
    return hash64(key, numbers) if round_number == 0 else hash64(key, stream, round_number, numbers)


def draw_levels(key: Tensor, num_samples: int, round_number: int = 0) -> Tensor:
    """Levels (K,) float64 of K = `num_samples` samples, rising; one in each of K equal strata of (0, 1).

    round_number r > 0: the r-th round after the first K / 2^(r-1) samples, as many as there are before it. Each
    earlier level lies in one half of its stratum, a new one is drawn in the other half, so that all 2 K together have
    one level in each of 2 K strata (nested scrambling, Owen 1995, in one dimension).
    """
    before = num_samples if round_number == 0 else num_samples >> (round_number - 1)
    numbers = torch.arange(before, device=key.device)
    levels = (numbers + uniforms(hash64(key, numbers), Stream.DRAW)) / before
    for number in range(1, round_number + 1):
        count = len(levels)
        numbers = torch.arange(count, device=key.device)
        upper = (levels * 2 * count).floor() - 2 * numbers  # 1 where the upper half is taken
        within = uniforms(hash64(key, FURTHER_SAMPLES, number, numbers), Stream.DRAW)
        new = (2 * numbers + 1 - upper + within) / (2 * count)
        if number == round_number:
            return new
        levels = torch.cat([levels, new]).sort().values
    return levels
