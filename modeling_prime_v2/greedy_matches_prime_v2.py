"""`greedy_matches`: whether the deterministic decode, `generate(do_sample=False)`, writes exactly the text."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backbone_prime_v2 import evaluating
from .code_table_prime_v2 import check_ids
from .generation_draws_prime_v2 import to_probabilities
from .generation_process_prime_v2 import DRAW_ELEMENTS
from .likelihood_frame_prime_v2 import TOKENS_PER_PASS
from .samplers_prime_v2 import best_first
from .validation_inputs_prime_v2 import scoring_inputs


def proposals(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (M, V) to the most probable ids (M,), the lowest of equals, and their probabilities (M,), float64.

    ValueError where no token is possible, or logits are not finite.
    """
    confidence, ids = to_probabilities(logits).max(-1)
    return ids, confidence


def propose(model: Any, hidden_states: Tensor, *states: Tensor) -> tuple[Tensor, Tensor]:
    """`proposals` of N tokens from their hidden states (N, D), in pieces; states: what `token_logits` takes too."""
    chunk = max(1, DRAW_ELEMENTS // model.config.vocab_size)
    pieces = zip(*(each.split(chunk) for each in (hidden_states, *states)), strict=True)
    ids, confidence = zip(*(proposals(model.token_logits(*piece)) for piece in pieces), strict=True)
    return torch.cat(ids), torch.cat(confidence)


def most_confident(confidence: Tensor, count: Tensor) -> Tensor:
    """The `count` (R,) int64 most confident tokens of each row, (R, T) bool; of equals (`best_first`) the leftmost.

    confidence (R, T) float64, negative for tokens that are not to be chosen, `count` or more others in each row.
    """
    ranks = best_first(confidence)[1].argsort(dim=1)
    return ranks < count.unsqueeze(1)


class PrimeV2GreedyMatches(NamedTuple):
    """What `greedy_matches` returns: matches (B,) bool, num_forward (B,) int64, rows the network ran; on the CPU."""

    matches: Tensor
    num_forward: Tensor


class PrimeV2GreedyMixin:
    """`greedy_matches` of a model of any family, which sets `reveal_targets`."""

    def greedy_matches(self: Any, input_ids, attention_mask, target_mask, **kwargs) -> PrimeV2GreedyMatches:
        """Whether the deterministic decode gives exactly the targets: see greedy_matches_prime_v2.py."""
        ids, mask, target, options = scoring_inputs(
            self, greedy_matches, kwargs, input_ids, attention_mask, target_mask=target_mask
        )
        return greedy_matches(self, ids, mask, target, **options)

    def reveal_targets(self, ids: Tensor, hidden: Tensor, real: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Decode some or all hidden targets of R rows of true ids; hidden and real, no padding, (R, L) bool.

        Returns whether those that were decoded are right, (R,) bool, which they are, (R, L) bool, and the rows of the
        network that it took for each, an int or (R,).
        """
        raise NotImplementedError

    def check_targets(self, real: Tensor, targets: Tensor) -> None:
        """ValueError for targets (B, L) bool that the decode cannot fill in; real (B, L) bool, no padding."""


@torch.no_grad()
def greedy_matches(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    target_mask: Tensor,
    tokens_per_pass: int = TOKENS_PER_PASS,
) -> PrimeV2GreedyMatches:
    """Whether the deterministic decode fills hidden targets in with exactly the ids that they have.

    input_ids (B, L) int64 in [0, V); attention_mask (B, L), 0 for padding on any side, None for no padding;
    target_mask (B, L) bool, tokens that are hidden at the start (padding is none). The number of tokens is known, so
    EOS is a token like others. The same as `generate` with do_sample=False, mask tokens in place of the targets and
    no fewer steps than targets; for an autoregressive model the targets are the last tokens of each row.

    A row without targets matches, at no cost. Masked diffusion: one target a pass; until a row reveals a wrong token
    its state is the targets themselves, partly hidden; then it is dropped. So a row costs one pass more than it has
    right tokens in order of confidence, and all its targets if it matches. Autoregressive and interpolating models:
    one pass, each target given those before it. Uniform-state diffusion, which revises tokens until its last pass:
    as many passes as targets. Rows of like length share a pass of up to `tokens_per_pass` tokens.

    Equal probabilities are decided by id and position only, the same in every batch. Ids of unequal ones that differ
    by less than the network's rounding may be ordered otherwise in a batch of another shape, positions too in
    bfloat16, whose rounding is coarser than that of `best_first`: run equal batches where results are compared.
    Raises ValueError for bad shapes, ids out of range, over-long texts, logits not finite.
    """
    texts = Texts(model, input_ids, attention_mask, target_mask)
    num_forward, matches = torch.zeros(len(input_ids), dtype=torch.long), torch.ones(len(input_ids), dtype=torch.bool)
    with evaluating(model):
        going = texts.with_targets(texts.longest_first)
        while going:
            for rows in texts.batches(going, tokens_per_pass):
                ids, hidden, real = texts.padded(rows)
                right, revealed, passes = model.reveal_targets(ids, hidden, real)
                texts.reveal(rows, revealed)
                num_forward[rows] += passes
                matches[rows] = right.cpu()
            going = texts.with_targets([row for row in going if matches[row]])
    return PrimeV2GreedyMatches(matches, num_forward)


class Texts:
    """Texts whose targets `greedy_matches` reveals: ids and hidden (B, L), padding moved behind the text.

    lengths: tokens of each text that are no padding.
    """

    def __init__(self, model: Any, input_ids: Tensor, attention_mask: Tensor | None, target_mask: Tensor):
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.device)
        real = real.bool()
        check_ids(input_ids[real], model.config.vocab_size, "and a text to compare with has no mask token")
        hidden = real & target_mask.to(real.device).bool()
        model.check_targets(real, hidden)
        order = real.int().argsort(dim=1, descending=True, stable=True)
        self.lengths = real.sum(1).tolist()
        self.ids = input_ids.masked_fill(~real, 0).long().gather(1, order).to(model.device)
        self.hidden = hidden.gather(1, order).to(model.device)
        self.longest_first = sorted(range(len(self.lengths)), key=lambda row: -self.lengths[row])

    def with_targets(self, rows: list[int]) -> list[int]:
        """Those of the rows that have hidden tokens left."""
        left = self.hidden.any(1).tolist()
        return [row for row in rows if left[row]]

    def batches(self, rows: list[int], tokens_per_pass: int) -> Iterator[list[int]]:
        """Groups of `rows`, longest first, such that rows x longest is within the limit, or a single row."""
        start = 0
        while start < len(rows):
            stop = start + max(1, tokens_per_pass // self.lengths[rows[start]])
            yield rows[start:stop]
            start = stop

    def padded(self, rows: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """(ids, hidden, real) of the rows, (R, L) each, L being the length of the first, the longest."""
        width = self.lengths[rows[0]]
        lengths = torch.tensor([self.lengths[row] for row in rows], device=self.ids.device)
        real = torch.arange(width, device=self.ids.device) < lengths.unsqueeze(1)
        return self.ids[rows, :width], self.hidden[rows, :width], real

    def reveal(self, rows: list[int], revealed: Tensor) -> None:
        """Take the targets `revealed` (R, L) bool for known."""
        self.hidden[rows, : revealed.shape[1]] &= ~revealed
