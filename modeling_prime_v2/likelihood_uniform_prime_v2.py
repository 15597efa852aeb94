"""The lower bound of a uniform-state model's log-likelihood, with its standard error (see diffusion_uniform_).

The draws of a sequence are a pure function of (seed, its ids, which of them are scored), or of the key that is given,
so a value does not depend on padding, on the other sequences of the batch or on their order.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .diffusion_uniform_prime_v2 import UniformNoise, draw_noise
from .likelihood_prime_v2 import (
    TOKENS_PER_PASS,
    PrimeV2LogLikelihood,
    batches,
    gather,
    scored_counts,
    stratified_degrees,
    stratified_stderr,
    unpadded,
)
from .likelihood_rows_prime_v2 import ROWS_PER_PIECE, draw_levels, sequence_key
from .random_prime_v2 import Stream, hash64

METHODS = ("uniform",)


@dataclass
class UniformRows:
    """Draws of one sequence: ids (L,) clean, scored (L,) bool, the noise of R draws, and the sequence's number."""

    clean: Tensor
    scored: Tensor
    noise: UniformNoise
    sequence: int

    @property
    def ids(self) -> Tensor:
        """(R, L), what `batches` counts."""
        return self.noise.ids

    def part(self, piece: slice) -> "UniformRows":
        noise = UniformNoise(self.noise.ids[piece], self.noise.times[piece], self.noise.weight[piece])
        return UniformRows(self.clean, self.scored, noise, self.sequence)


@torch.no_grad()
def log_likelihood(
    model,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    prompt_mask: Tensor | None = None,
    method: str = "uniform",
    num_samples: int = 128,
    seed: int = 0,
    keys: Tensor | None = None,
    exhaustive: bool = True,
    round_number: int = 0,
    return_samples: bool = False,
    tokens_per_pass: int = TOKENS_PER_PASS,
) -> PrimeV2LogLikelihood:
    """A lower bound of the log-likelihood of the tokens outside the prompt given the prompt, per sequence in nats.

    input_ids (B, L) clean ids; attention_mask (B, L), 0 for padding on any side; prompt_mask (B, L), 1 for tokens that
    are given, never noised and not scored.
    method: "uniform", the bound over all times from 0 to 1, both ends included; `num_samples` draws of (number of
        replaced tokens, time, replacements), stratified over that number.
    exhaustive: not used; the times are a continuum, which is drawn from always.
    keys (B,) int64: of the draws, instead of (seed, sequence); sequences with equal keys share their random numbers.
    round_number: r > 0 draws the r-th lot of further draws, as many as there were before (`draw_levels`).
    return_samples: keep the single draws, for `paired_difference`.
    tokens_per_pass: rows x tokens of one pass of the network; changes no value.
    Raises ValueError for an unknown method, num_samples < 1, ids out of range, rows without a scored token, and
    non-finite results (`NotFiniteError`).
    """
    _check_options(method, num_samples, round_number)
    sequences = list(unpadded(input_ids, attention_mask, prompt_mask, model.config))
    rows = []
    for i, ids, scored in sequences:
        key = (sequence_key(ids, scored, seed) if keys is None else keys[i]).to(ids.device)
        rows.append(sampled_rows(ids, scored, i, model.config.vocab_size, num_samples, key, round_number))
    draws = _score_rows(model, (part for each in rows for part in each), len(input_ids), tokens_per_pass)
    parts = [(each, each.mean(), stratified_stderr(each), stratified_degrees(each)) for each in draws]
    counts = scored_counts(sequences)
    return gather(parts, [num_samples] * len(draws), counts, True, return_samples)


def _check_options(method: str, num_samples: int, round_number: int) -> None:
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not one of {', '.join(METHODS)}")
    if round_number and num_samples % 2 ** (round_number - 1):
        raise ValueError(
            f"round_number={round_number} with num_samples={num_samples}: it takes a multiple of "
            f"{2 ** (round_number - 1)} draws"
        )


def sampled_rows(
    ids: Tensor, scored: Tensor, sequence: int, vocab_size: int, num_samples: int, key: Tensor, round_number: int = 0
) -> Iterator[UniformRows]:
    """`num_samples` draws of the noise of ids (L,), their levels stratified over (0, 1)."""
    draws = torch.arange(num_samples, device=ids.device)
    keys = hash64(key, draws) if round_number == 0 else hash64(key, Stream.UNIFORM_ROUND, round_number, draws)
    levels = draw_levels(key, num_samples, round_number)
    for start in range(0, num_samples, ROWS_PER_PIECE):
        piece = slice(start, start + ROWS_PER_PIECE)
        shape = (len(keys[piece]), -1)
        noise = draw_noise(ids.expand(shape), scored.expand(shape), keys[piece], levels[piece], vocab_size)
        yield UniformRows(ids, scored, noise, sequence)


def _score_rows(model, rows: Iterator[Any], num_sequences: int, tokens_per_pass: int) -> list[Tensor]:
    """Draws of the bound, -weight x nats, of each sequence in their order: tensors (K,) float64 on the CPU."""
    draws: list[list[Tensor]] = [[] for _ in range(num_sequences)]
    was_training = model.training
    model.eval()
    try:
        for batch in batches(rows, tokens_per_pass):
            for nats, part in zip(_score(model, batch), batch, strict=True):
                draws[part.sequence].append(-(nats * part.noise.weight.to(nats.device)).cpu())
    finally:
        model.train(was_training)
    return [torch.cat(each) for each in draws]


def _score(model, batch: list[Any]) -> tuple[Tensor, ...]:
    """Nats per unit of time of each row, in the batch's pieces; one forward pass, rows padded on the right."""
    length, device = max(part.ids.shape[1] for part in batch), model.device

    def join(tensors: list[Tensor]) -> Tensor:
        """(R_i, L_i) each, padded with 0."""
        return torch.cat([nn.functional.pad(each, (0, length - each.shape[1])) for each in tensors]).to(device)

    noise = UniformNoise(
        join([part.noise.ids for part in batch]),
        torch.cat([part.noise.times for part in batch]).to(device),
        torch.cat([part.noise.weight for part in batch]).to(device),
    )
    clean = join([part.clean.expand_as(part.ids) for part in batch])
    scored = join([part.scored.expand_as(part.ids) for part in batch])
    real = join([torch.ones_like(part.ids) for part in batch])
    mask = None if real.all() else real
    hidden_states = model.model(noise.ids, noise.times, mask).last_hidden_state
    _, nats = model.sequence_loss(hidden_states, clean, scored, noise)
    return nats.split([len(part.ids) for part in batch])


__all__ = ["METHODS", "PrimeV2LogLikelihood", "log_likelihood"]
