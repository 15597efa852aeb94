"""Likelihood bounds of interpolating diffusion, drawn or enumerated, and its left-to-right chain.

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
from typing import Any

import torch
from torch import Tensor

from .diffusion_interpolating_prime_v2 import (
    PADDING,
    ScoredTexts,
    SortedInputs,
    diffusion_inputs,
    draw_terms,
    revealed_chances,
    sequential_inputs,
    sequential_share,
)
from .likelihood_frame_prime_v2 import Likelihood
from .likelihood_rows_prime_v2 import ROWS_PER_PIECE, Rows
from .random_prime_v2 import Stream

MOST_ENUMERATED = 10  # scored tokens; eleven have 10**8 states


class PrimeV2InterpolatingLikelihood(Likelihood):
    """Rows of both terms of a sequence's bound, or its left-to-right chain, which for alpha_0 = 0 is the bound."""

    methods = ("interpolating", "chain")
    sampled_methods = ("interpolating",)
    round_stream = Stream.INTERPOLATING_ROUND
    padding = PADDING

    def __init__(self, config: Any, method: str, num_samples: int, exhaustive: bool, round_number: int):
        super().__init__(config, method, num_samples, exhaustive, round_number)
        self.is_exact = method == "chain" or config.alpha_0 == 0

    def is_enumerated(self, num_tokens: int) -> bool:
        return self.is_exact or num_states(num_tokens, self.config.alpha_0) <= self.most_rows

    def rows(self, ids: Tensor, scored: Tensor, key: Tensor) -> Iterator[Rows]:
        positions = torch.arange(len(ids), device=ids.device)
        text = ScoredTexts(ids[None], ~scored[None], scored[None], positions[None], self.config.mask_token_id)
        if self.is_exact:
            nothing = torch.zeros_like(ids[:1])
            places = scored[None].cumsum(1) - 1
            yield Rows(vars(sequential_inputs(text, places, nothing)), nothing.double() + 1)
        elif self.is_enumerated(int(scored.sum())):
            yield from all_rows(text, self.config.alpha_0)
        else:
            share = sequential_share(self.config.alpha_0)
            for keys, levels in self.samples(key):
                texts = text.rows(torch.zeros_like(keys))
                for term in draw_terms(texts, keys, levels, self.config.alpha_0, share):
                    if len(term.texts):  # rising levels: the rows come in the order of the samples
                        yield Rows(vars(term.inputs), term.weights)

    def row_loss(self, model: Any, inputs: dict[str, Tensor], attention_mask: Tensor | None) -> Tensor:
        ones = torch.ones(len(inputs["ids"]), dtype=torch.double, device=inputs["ids"].device)
        return model.sequence_nll([SortedInputs(**inputs)], [ones])[1][0]


def num_states(num_tokens: int, alpha_0: float) -> float:
    """Rows of `all_rows`: ordered sets of clean tokens that leave something masked, once or twice; may be infinite."""
    if num_tokens > MOST_ENUMERATED:
        return math.inf
    states = sum(math.perm(num_tokens, num_clean) for num_clean in range(num_tokens))
    return states if alpha_0 == 1 else 2 * states


def all_rows(text: ScoredTexts, alpha_0: float) -> Iterator[Rows]:
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
                yield Rows(vars(sequential_inputs(texts, places, clean)), factor)
            factor = ones * beyond[num_clean] / (num_tokens - num_clean) / number
            yield Rows(vars(diffusion_inputs(texts, places, clean)), factor)
