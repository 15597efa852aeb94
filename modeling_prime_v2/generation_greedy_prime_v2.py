"""The deterministic decode, `generate(do_sample=False)`: the most confident tokens first, and whether it gives a text.

Each pass, every hidden token proposes its most probable id, and the proposals of highest probability are revealed, as
many as spread the hidden tokens evenly over the steps: confidence order of MaskGIT (arXiv:2202.04200, sec. 3.2,
without its noise and with equal steps), low-confidence remasking of LLaDA (arXiv:2502.09992, sec. 2.4, in one block).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backbone_prime_v2 import evaluating
from .code_table_prime_v2 import check_ids
from .generation_config_prime_v2 import PrimeV2GenerationConfig
from .generation_process_prime_v2 import DRAW_ELEMENTS, Canvas, DenoisingProcess, to_probabilities
from .likelihood_frame_prime_v2 import TOKENS_PER_PASS


class GreedyProcess(DenoisingProcess):
    """Deterministic decode of whole tokens, whatever the config's reveal_order, in N passes a row (`generate`).

    N = min(max_denoising_steps, hidden tokens of the row). With r hidden and p passes left, a pass reveals ceil(r/p).
    A logits processor is called for every hidden token in every pass; what it gives decides id and confidence.
    """

    def __init__(self, model: Any, options: PrimeV2GenerationConfig, canvas: Canvas, processors: Any):
        super().__init__(model, options, canvas, processors)
        self.passes_left = canvas.fillable.sum(1).clamp(max=int(options.max_denoising_steps or 1)).tolist()

    def run_pass(self, rows: list[int]) -> None:
        canvas = self.canvas
        picked = torch.tensor(rows, device=canvas.ids.device)
        hidden = self.hidden()[picked]  # (R, T)
        ids, confidence = torch.zeros_like(canvas.ids[picked]), torch.full_like(hidden, -1.0, dtype=torch.double)
        for at, columns, logits in self.scores(picked, hidden):
            ids[at, columns], confidence[at, columns] = proposals(logits)
        passes_left = torch.tensor([self.passes_left[row] for row in rows], device=ids.device)
        quota = (hidden.sum(1) + passes_left - 1) // passes_left
        revealed = most_confident(confidence, quota)
        canvas.ids[picked] = torch.where(revealed, ids, canvas.ids[picked])
        canvas.states[picked] = self.model.encode(canvas.ids[picked])
        self._tick("sampling")


def proposals(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (M, V) to the most probable ids (M,), the lowest of equals, and their probabilities (M,), float64.

    ValueError where no token is possible, or logits are not finite.
    """
    confidence, ids = to_probabilities(logits).max(-1)
    return ids, confidence


def most_confident(confidence: Tensor, count: Tensor) -> Tensor:
    """The `count` (R,) int64 most confident tokens of each row, (R, T) bool; of equals the leftmost.

    confidence (R, T) float64, negative for tokens that are not to be chosen, `count` or more others in each row.
    """
    ranks = confidence.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return ranks < count.unsqueeze(1)


class PrimeV2GreedyMatches(NamedTuple):
    """What `greedy_matches` returns: matches (B,) bool, num_forward (B,) int64, rows the network ran; on the CPU."""

    matches: Tensor
    num_forward: Tensor


@torch.no_grad()
def greedy_matches(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    target_mask: Tensor,
    tokens_per_pass: int = TOKENS_PER_PASS,
) -> PrimeV2GreedyMatches:
    """Whether the deterministic decode, one token a pass, fills hidden targets in with exactly the ids that they have.

    input_ids (B, L) int64 in [0, V); attention_mask (B, L), 0 for padding on any side, None for no padding;
    target_mask (B, L) bool, tokens that are hidden at the start (padding is none). The number of tokens is known, so
    EOS is a token like others. The same as `generate` with do_sample=False, mask tokens in place of the targets and
    no fewer steps than targets.

    Until a row reveals a wrong token its state is the targets themselves, partly hidden; then it is dropped. So a row
    costs one pass more than it has right tokens in order of confidence, and all its targets if it matches. A row
    without targets matches, at no cost. Rows of like length share a pass of up to `tokens_per_pass` tokens.

    Equal probabilities are decided by id and position alone, the same in every batch. Unequal ones that differ by
    less than the network's rounding, coarse in bfloat16, may be ordered otherwise in a batch of another shape: run
    equal batches where results are compared. Raises ValueError for bad shapes, ids out of range, logits not finite.
    """
    texts = Texts(model, input_ids, attention_mask, target_mask)
    num_forward, matches = torch.zeros(len(input_ids), dtype=torch.long), torch.ones(len(input_ids), dtype=torch.bool)
    with evaluating(model):
        going = texts.with_targets(texts.longest_first)
        while going:
            right = []
            for rows in texts.batches(going, tokens_per_pass):
                num_forward[rows] += 1
                matches[rows] = texts.reveal_one(rows)
                right += [row for row in rows if matches[row]]
            going = texts.with_targets(right)
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
        order = real.int().argsort(dim=1, descending=True, stable=True)
        self.model, self.lengths = model, real.sum(1).tolist()
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

    def reveal_one(self, rows: list[int]) -> Tensor:
        """One pass, revealing the most confident target of each row; whether it is right, (R,) bool on the CPU."""
        model, device = self.model, self.ids.device
        picked, width = torch.tensor(rows, device=device), self.lengths[rows[0]]
        lengths = torch.tensor([self.lengths[row] for row in rows], device=device)
        ids, hidden = self.ids[picked, :width], self.hidden[picked, :width]
        real = torch.arange(width, device=device) < lengths.unsqueeze(1)
        states = model.encode(ids.masked_fill(hidden, model.config.mask_token_id))
        mask = None if real.all() else real.long()
        hidden_states = model.model(states, attention_mask=mask).last_hidden_state
        at, columns = hidden.nonzero(as_tuple=True)
        proposed, confidence = torch.zeros_like(ids), torch.full_like(ids, -1.0, dtype=torch.double)
        chunk = max(1, DRAW_ELEMENTS // model.config.vocab_size)
        for where in zip(at.split(chunk), columns.split(chunk), strict=True):
            logits = model.token_logits(hidden_states[where], states[where])
            proposed[where], confidence[where] = proposals(logits)
        chosen = most_confident(confidence, torch.ones_like(lengths))
        self.hidden[picked, :width] = hidden & ~chosen
        return (ids == proposed)[chosen].cpu()


__all__ = ["GreedyProcess", "PrimeV2GreedyMatches", "greedy_matches"]
