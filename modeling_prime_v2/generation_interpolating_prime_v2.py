"""`generate` of interpolating diffusion, with an exact cache of keys and values, and its deterministic decode.

Sampling: each token to be generated falls to the diffusion with probability alpha_0, which reveals it in one of
`max_denoising_steps` steps (`draw_schedule`; steps that reveal nothing are skipped); the others follow one by one,
left to right. The order of all tokens, random within a step, is drawn before the first pass. A pass then needs only
the tokens that the last one revealed and a query for each that is due: keys and values of earlier tokens do not change
(`diffusion_interpolating_prime_v2`), those of queries are dropped.

The deterministic decode (do_sample=False) has no diffusion: every token left to right, the most probable id. It is the
order of the "chain" likelihood, so one pass with the targets in place tells what it would give (`greedy_matches`).
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from .backbone_prime_v2 import evaluating
from .diffusion_interpolating_prime_v2 import NEVER_SEEN, ScoredTexts, leading_columns, sequential_inputs
from .diffusion_prime_v2 import RevealOrder
from .generation_config_prime_v2 import PrimeV2GenerationConfig
from .generation_greedy_prime_v2 import PrimeV2GreedyMatches, Texts, proposals
from .generation_prime_v2 import PrimeV2GenerationMixin, draw_by_inverse_cdf, draw_schedule, row_keys
from .generation_process_prime_v2 import (
    DRAW_ELEMENTS,
    Canvas,
    DenoisingProcess,
    to_probabilities,
)
from .likelihood_frame_prime_v2 import TOKENS_PER_PASS
from .random_prime_v2 import Stream, uniforms
from .validation_inputs_prime_v2 import check_length


class PrimeV2InterpolatingGenerationMixin(PrimeV2GenerationMixin):
    """`generate` of `PrimeV2ForInterpolatingDiffusion`: as that of masked diffusion, but for this.

    max_denoising_steps: of the diffusion phase only; each token that is left to the second phase takes a pass.
    do_sample=False: left to right, the most probable id, one token a pass, whatever max_denoising_steps is.
    logits_processor: called for the tokens that are due in the pass, also with do_sample=False.
    use_cache: keep keys and values of known tokens (prompt and suffix are the first). False computes all of them
        in every pass: the same samples, up to the network's rounding, for more time and less memory.
    """

    def denoising_process(self: Any, options: PrimeV2GenerationConfig, canvas: Canvas, processors: Any):
        """What `generate` runs."""
        return InterpolatingProcess(self, options, canvas, processors)


def draw_passes(keys: Tensor, canvas: Canvas, alpha_0: float, num_steps: int) -> tuple[Tensor, Tensor]:
    """(the pass that reveals each token, -1 for what is given; tokens' order ids), (B, T) int64.

    A pure function of the row keys (B,). Given tokens come first, left to right, and padding, never fed, last.
    """
    early = canvas.fillable & (uniforms(keys.unsqueeze(1), Stream.PHASE, canvas.position_ids) < alpha_0)
    schedule = draw_schedule(keys, replace(canvas, fillable=early), RevealOrder("token", 1), num_steps)
    passes = schedule.passes.squeeze(2)
    late = canvas.fillable & ~early
    passes = torch.where(late, passes.amax(1, keepdim=True) + late.cumsum(1), passes)
    within = uniforms(keys.unsqueeze(1), Stream.WITHIN_STEP, canvas.position_ids).masked_fill(~early, 0.0)
    order = (passes + within).masked_fill(~canvas.real, torch.inf).argsort(dim=1, stable=True)
    return passes, order.argsort(dim=1)


class InterpolatingProcess(DenoisingProcess):
    """Pass m reveals the tokens that are due in it (`draw_passes`), from what earlier passes revealed."""

    def __init__(self, model: Any, options: PrimeV2GenerationConfig, canvas: Canvas, processors: Any):
        super().__init__(model, options, canvas, processors)
        if options.do_sample:
            self.keys = row_keys(canvas, int(options.seed or 0))
            alpha_0, num_steps = model.config.alpha_0, int(options.max_denoising_steps or 1)
        else:
            self.keys, alpha_0, num_steps = torch.zeros_like(canvas.ids[:, 0]), 0.0, 1
        self.passes, self.order_ids = draw_passes(self.keys, canvas, alpha_0, num_steps)
        self.passes_left = (self.passes.amax(1) + 1).tolist()
        self.cache = None if options.use_cache is False else KnownTokens()

    def run_pass(self, rows: list[int]) -> None:
        canvas, options = self.canvas, self.options
        picked = torch.tensor(rows, device=canvas.ids.device)
        due = self.passes[picked] == self.num_forward[rows[0]]  # as many passes for all rows that are not done
        for at, columns, logits in self.scores(picked, due):
            if options.do_sample:
                probabilities = to_probabilities(logits, options.temperature or 1.0, options.top_p or 1.0)
                places = canvas.position_ids[picked[at], columns]
                draws = uniforms(self.keys[picked[at]], Stream.INTERPOLATING_TOKEN, places)
                ids = draw_by_inverse_cdf(probabilities, draws)
            else:
                ids = proposals(logits)[0]
            canvas.ids[picked[at], columns] = ids

    def finish_next(self, row: int) -> None:
        super().finish_next(row)
        self.passes[row].clamp_(max=self.num_forward[row])

    def scores(self, picked: Tensor, target_mask: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """One pass over the rows `picked` (R,): logits (M, V) of the tokens of `target_mask` (R, T) bool, in pieces.

        Yields (numbers within `picked` (M,), columns (M,), logits after logits processors).
        """
        hidden_states = self.query_states(picked, target_mask)  # (M, D)
        at, columns = target_mask.nonzero(as_tuple=True)
        processors: Any = self.processors
        known = self._known_ids(picked) if processors else None
        chunk = max(1, DRAW_ELEMENTS // self.model.config.vocab_size)
        for start in range(0, len(at), chunk):
            part = slice(start, start + chunk)
            logits = self.model.token_logits(hidden_states[part])
            self._tick("network")
            if known is not None:
                logits = processors(known[at[part]], logits)
            yield at[part], columns[part], logits
            self._tick("sampling")

    def query_states(self, picked: Tensor, target_mask: Tensor) -> Tensor:
        """Hidden states (M, D) of queries for the tokens of `target_mask` (R, T) bool of the rows `picked` (R,)."""
        self._last = time.perf_counter()
        canvas, mask_id = self.canvas, self.model.config.mask_token_id
        passes, number = self.passes[picked], self.num_forward[int(picked[0])]
        known = canvas.real[picked] & (passes < number)
        tokens, is_token = leading_columns(known if self.cache is None else known & (passes == number - 1))
        queries, is_query = leading_columns(target_mask)
        columns = torch.cat([tokens, queries], dim=1)  # (R, E)
        ids = canvas.ids[picked].gather(1, columns)
        ids[:, tokens.shape[1] :] = mask_id
        order_ids = self.order_ids[picked].gather(1, tokens).masked_fill(~is_token, NEVER_SEEN)
        last = (known.sum(1, keepdim=True) - 1).expand(-1, queries.shape[1])
        visible_until = torch.cat([order_ids.masked_fill(~is_token, -1), last], dim=1)
        order_ids = torch.cat([order_ids, torch.full_like(queries, NEVER_SEEN)], dim=1)
        position_ids, layers = canvas.position_ids[picked].gather(1, columns), None
        if self.cache is not None:
            order_ids, layers = self.cache.extend(picked, order_ids)
        hidden_states = self.model.model(
            ids, position_ids=position_ids, order_ids=order_ids, visible_until=visible_until, cache=layers
        ).last_hidden_state
        hidden_states = hidden_states[:, tokens.shape[1] :][is_query]
        self._tick("network")
        return hidden_states


class KnownTokens:
    """Keys and values of the tokens that rows know. What a pass stores for queries is dropped before the next one."""

    def __init__(self):
        self.layers = DynamicCache()
        self.rows: Tensor | None = None  # (R,) of the last pass
        self.order_ids: Tensor | None = None  # (R, C) of what is stored, NEVER_SEEN for queries and holes

    def extend(self, rows: Tensor, order_ids: Tensor) -> tuple[Tensor, DynamicCache]:
        """Before a pass over `rows` (R,), some of the last pass's, with inputs of `order_ids` (R, E).

        Returns the order ids (R, C + E) of the C inputs that are stored and of the new ones, and the cache of them.
        """
        if self.rows is not None and self.order_ids is not None:
            index = torch.searchsorted(self.rows, rows)
            slots, is_token = leading_columns(self.order_ids[index] != NEVER_SEEN)  # (R, C)
            stored = self.order_ids[index].gather(1, slots).masked_fill(~is_token, NEVER_SEEN)
            order_ids = torch.cat([stored, order_ids], dim=1)
            layers: list[Any] = self.layers.layers
            for layer in layers:
                heads = torch.arange(layer.keys.shape[1], device=rows.device)
                at = index[:, None, None], heads[:, None], slots[:, None]
                layer.keys, layer.values = layer.keys[at], layer.values[at]  # (R, heads, C, head_dim)
        self.rows, self.order_ids = rows, order_ids
        return order_ids, self.layers


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
    EOS is a token like others. The same as `generate` with do_sample=False and mask tokens in place of the targets.

    One row of the network a text, none for a text without targets: each target is predicted with the targets before
    it in place, as the decode has them unless it was wrong before. Rows of like length share a pass of up to
    `tokens_per_pass` tokens. Equal probabilities fall to the lowest id; unequal ones that differ by less than the
    network's rounding may be ordered otherwise in a batch of another shape. Raises ValueError for bad shapes, ids out
    of range, over-long texts, logits not finite.
    """
    texts = Texts(model, input_ids, attention_mask, target_mask)
    num_forward, matches = torch.zeros(len(input_ids), dtype=torch.long), torch.ones(len(input_ids), dtype=torch.bool)
    with evaluating(model):
        for rows in texts.batches(texts.with_targets(texts.longest_first), tokens_per_pass):
            num_forward[rows] = 1
            matches[rows] = _rows_match(model, texts, rows)
    return PrimeV2GreedyMatches(matches, num_forward)


def _rows_match(model: Any, texts: Texts, rows: list[int]) -> Tensor:
    """Whether every target of the `rows` is the most probable id where it stands, (R,) bool on the CPU."""
    device, width = texts.ids.device, texts.lengths[rows[0]]
    picked = torch.tensor(rows, device=device)
    lengths = torch.tensor([texts.lengths[row] for row in rows], device=device)
    positions = torch.arange(width, device=device).expand(len(rows), -1)
    ids, hidden = texts.ids[picked, :width], texts.hidden[picked, :width]
    check_length(ids, None, model.config)
    given = (positions < lengths.unsqueeze(1)) & ~hidden
    text = ScoredTexts(ids, given, hidden, positions, model.config.mask_token_id)
    inputs = sequential_inputs(text, hidden.cumsum(1) - 1, torch.zeros_like(lengths))
    hidden_states = model.model(
        inputs.ids, position_ids=inputs.position_ids, order_ids=inputs.order_ids, visible_until=inputs.visible_until
    ).last_hidden_state
    at, columns = (inputs.target_ids >= 0).nonzero(as_tuple=True)
    right = torch.ones(len(rows), dtype=torch.bool, device=device)
    chunk = max(1, DRAW_ELEMENTS // model.config.vocab_size)
    for row, column in zip(at.split(chunk), columns.split(chunk), strict=True):
        proposed = proposals(model.token_logits(hidden_states[row, column]))[0]
        right[row[proposed != inputs.target_ids[row, column]]] = False
    return right.cpu()


__all__ = ["PrimeV2InterpolatingGenerationMixin", "greedy_matches"]
