"""Log-likelihood bounds of interpolating diffusion, drawn or enumerated, and its left-to-right chain.

A sample is one row, of one of the two terms of the bound (`draw_terms`). The levels of K samples lie in K equal strata
of (0, 1), rising: the first `sequential_share(alpha_0)` of them are left-to-right rows, the others diffusion rows, and
within a term they spread evenly over the number of masked tokens. The rows of a term carry one over its share as a
factor, so the mean of the K samples estimates the sum of the terms, and `stratified_stderr` and `stratified_degrees`
take both in. The share is that of the config's default, whatever the training used: near the share of the term in the
bound.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from .code_table_prime_v2 import check_ids
from .diffusion_interpolating_prime_v2 import (
    ScoredTexts,
    SortedInputs,
    diffusion_inputs,
    draw_terms,
    revealed_chances,
    sequential_inputs,
    sequential_share,
)
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
from .validation_inputs_prime_v2 import check_length

METHODS = ("interpolating", "chain")
MOST_ENUMERATED = 10  # scored tokens; eleven have 10**8 states


@dataclass
class InputRows:
    """Rows of one sequence: their inputs, the factor (R,) float64 of each row's nats, and the sequence's number."""

    inputs: SortedInputs
    factor: Tensor
    sequence: int

    @property
    def ids(self) -> Tensor:
        return self.inputs.ids

    def part(self, piece: slice) -> "InputRows":
        return InputRows(self.inputs.rows(piece), self.factor[piece], self.sequence)


@torch.no_grad()
def log_likelihood(
    model,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    prompt_mask: Tensor | None = None,
    method: str = "interpolating",
    num_samples: int = 128,
    seed: int = 0,
    keys: Tensor | None = None,
    exhaustive: bool = True,
    round_number: int = 0,
    return_samples: bool = False,
    tokens_per_pass: int = TOKENS_PER_PASS,
) -> PrimeV2LogLikelihood:
    """Log-likelihood of the tokens outside the prompt given the prompt, or a lower bound, per sequence in nats.

    input_ids (B, L) clean ids; attention_mask (B, L), 0 for padding on any side; prompt_mask (B, L), 1 for tokens that
    are given and not scored. Methods:
        "interpolating"  bound, both terms; `num_samples` stratified draws, a row of the network each. For alpha_0 = 0
                         it is "chain" and exact.
        "chain"          exact for decoding left to right from all masked; one row, nothing drawn.
    exhaustive: sum over all sets and orders of clean tokens, in both terms, instead of drawing where they are no more
        rows than `num_samples`: the expectation itself, with standard error 0.
    keys (B,) int64: of the draws, instead of (seed, sequence); sequences with equal keys share their random numbers.
    round_number: r > 0 draws the r-th lot of further draws, as many as there were before (`draw_levels`).
    return_samples: keep the single draws, for `paired_difference`.
    tokens_per_pass: rows x inputs of one pass of the network; changes no value.
    Raises ValueError for an unknown method, num_samples < 1, ids out of range, over-long sequences, rows without a
    scored token, and non-finite results (`NotFiniteError`).
    """
    plan = _Plan(model.config, method, num_samples, exhaustive, round_number)
    sequences = list(unpadded(input_ids, attention_mask, prompt_mask, model.config))
    key_of = {i: sequence_key(ids, scored, seed) if keys is None else keys[i] for i, ids, scored in sequences}
    rows = (row for i, ids, scored in sequences for row in plan.rows(ids, scored, i, key_of[i].to(ids.device)))
    nats = score_rows(model, rows, len(input_ids), tokens_per_pass)
    counts = scored_counts(sequences)
    parts = [plan.summarise(each, count) for each, count in zip(nats, counts, strict=True)]
    return gather(parts, [len(each) for each in nats], counts, True, return_samples, plan.is_chain)


class _Plan:
    """What a method runs for a sequence, and how its rows' nats become a likelihood."""

    def __init__(self, config, method: str, num_samples: int, exhaustive: bool, round_number: int):
        if method not in METHODS:
            raise ValueError(f"method={method!r} is not one of {', '.join(METHODS)}")
        if round_number and (method == "chain" or num_samples % 2 ** (round_number - 1)):
            raise ValueError(
                f"round_number={round_number} of method={method!r} with num_samples={num_samples}: a sampled method "
                f"takes it, with a multiple of {2 ** (round_number - 1)} draws"
            )
        self.config, self.num_samples, self.round_number = config, num_samples, round_number
        self.is_chain = method == "chain" or config.alpha_0 == 0
        # As many rows as the draws would be, those of earlier lots included.
        self.most_rows = 0 if not exhaustive else num_samples * 2 if round_number else num_samples

    def draws_nothing(self, num_tokens: int) -> bool:
        """Whether the rows of a sequence of `num_tokens` scored tokens are all that there are."""
        return self.is_chain or num_states(num_tokens, self.config.alpha_0) <= self.most_rows

    def rows(self, ids: Tensor, scored: Tensor, sequence: int, key: Tensor) -> Iterator[InputRows]:
        """ids, scored (L,) of a sequence without padding, its number and its key."""
        check_length(ids.unsqueeze(0), None, self.config)
        check_ids(ids, self.config.vocab_size, "and a likelihood is of clean tokens")
        positions = torch.arange(len(ids), device=ids.device)
        text = ScoredTexts(ids[None], ~scored[None], scored[None], positions[None], self.config.mask_token_id)
        if self.is_chain:
            nothing = torch.zeros_like(ids[:1])
            places = scored[None].cumsum(1) - 1
            yield InputRows(sequential_inputs(text, places, nothing), nothing.double() + 1, sequence)
        elif self.draws_nothing(int(scored.sum())):
            yield from all_rows(text, sequence, self.config.alpha_0)
        else:
            yield from self._drawn_rows(text, sequence, key)

    def _drawn_rows(self, text: ScoredTexts, sequence: int, key: Tensor) -> Iterator[InputRows]:
        numbers = torch.arange(self.num_samples, device=key.device)
        lot = () if self.round_number == 0 else (Stream.INTERPOLATING_ROUND, self.round_number)
        keys = hash64(key, *lot, numbers)
        levels = draw_levels(key, self.num_samples, self.round_number)
        share = sequential_share(self.config.alpha_0)
        for start in range(0, self.num_samples, ROWS_PER_PIECE):
            piece = slice(start, start + ROWS_PER_PIECE)
            texts = text.rows(torch.zeros_like(numbers[piece]))
            for term in draw_terms(texts, keys[piece], levels[piece], self.config.alpha_0, share):
                if len(term.texts):  # rising levels: the rows come in the order of the draws
                    yield InputRows(term.inputs, term.weights, sequence)

    def summarise(self, nats: Tensor, num_tokens: int) -> tuple[Tensor, Tensor, Tensor, float]:
        """Factor x nats (R,) of one sequence's rows to (draws (K,), value, standard error, degrees), float64."""
        if self.draws_nothing(num_tokens):
            value = -nats.sum()
            return value.unsqueeze(0), value, nats.new_zeros(()), math.inf
        return -nats, -nats.mean(), stratified_stderr(nats), stratified_degrees(nats)


def num_states(num_tokens: int, alpha_0: float) -> float:
    """Rows of `all_rows`: ordered sets of clean tokens that leave something masked, once or twice; may be infinite."""
    if num_tokens > MOST_ENUMERATED:
        return math.inf
    states = sum(math.perm(num_tokens, num_clean) for num_clean in range(num_tokens))
    return states if alpha_0 == 1 else 2 * states


def all_rows(text: ScoredTexts, sequence: int, alpha_0: float) -> Iterator[InputRows]:
    """Every ordered set of clean tokens of one text, in both terms; the factors make the sum over rows the bound.

    n - c of n tokens are masked in n! / (n - c)! ordered sets. Each has the chance P(|D| = c) over their number as z0,
    and the weight P(|D| > c) / (n - c) over their number in the diffusion term.
    """
    num_tokens = int(text.scored.sum())
    equal, beyond = (each[0].tolist() for each in revealed_chances(text.scored.sum(1), num_tokens, alpha_0))
    for num_clean in range(num_tokens):
        sets = itertools.permutations(range(num_tokens), num_clean)
        while piece := list(itertools.islice(sets, ROWS_PER_PIECE)):
            # The places of tokens behind the clean ones do not matter.
            order = torch.tensor([[*each, *sorted(set(range(num_tokens)) - set(each))] for each in piece])
            places = torch.zeros(len(piece), text.ids.shape[1], dtype=torch.long, device=text.ids.device)
            places[:, text.scored[0]] = order.argsort(1).to(places.device)
            texts, clean = text.rows(torch.zeros_like(places[:, 0])), torch.full_like(places[:, 0], num_clean)
            ones, number = torch.ones(len(piece), dtype=torch.double), math.perm(num_tokens, num_clean)
            if alpha_0 < 1:
                factor = ones * equal[num_clean] / number
                yield InputRows(sequential_inputs(texts, places, clean), factor, sequence)
            factor = ones * beyond[num_clean] / (num_tokens - num_clean) / number
            yield InputRows(diffusion_inputs(texts, places, clean), factor, sequence)


def score_rows(model, rows: Iterator[InputRows], num_sequences: int, tokens_per_pass: int) -> list[Tensor]:
    """Factor x nats of each sequence's rows, in their order: `num_sequences` tensors (R,) float64 on the CPU."""
    nats: list[list[Tensor]] = [[] for _ in range(num_sequences)]
    was_training = model.training
    model.eval()
    try:
        grouped: Iterator[Any] = batches(cast(Any, rows), tokens_per_pass)  # of any rows with `ids` and `part`
        for batch in grouped:
            inputs = SortedInputs.join([part.inputs for part in batch]).to(model.device)
            ones = torch.ones(len(inputs.ids), dtype=torch.double, device=model.device)
            row_nats = model.sequence_nll([inputs], [ones])[1][0].cpu()
            for each, part in zip(row_nats.split([len(part.ids) for part in batch]), batch, strict=True):
                nats[part.sequence].append(each * part.factor.cpu())
    finally:
        model.train(was_training)
    return [torch.cat(each) for each in nats]


__all__ = ["log_likelihood"]
