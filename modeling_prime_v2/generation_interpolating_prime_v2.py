"""`generate` of interpolating diffusion, with an exact cache of keys and values, and its deterministic decode.

Sampling: each token to be generated falls to the diffusion with probability alpha_0, which reveals it in one of
`max_denoising_steps` steps (`draw_schedule`; steps that reveal nothing are skipped); the others follow one by one,
left to right. The order of all tokens, random within a step, is drawn before the first pass. A pass then needs only
the tokens that the last one revealed and a query for each that is due: keys and values of earlier tokens do not change
(`diffusion_interpolating_prime_v2`), those of queries are dropped.

The deterministic decode (do_sample=False) has no diffusion: every token left to right, the most probable id. It is the
order of the "chain" likelihood, so one pass with the targets in place tells what it would give (`greedy_matches`).
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from .diffusion_interpolating_prime_v2 import NEVER_SEEN, ScoredTexts, leading_columns, sequential_inputs
from .diffusion_prime_v2 import RevealOrder
from .generation_config_prime_v2 import GenerationOptions
from .generation_draws_prime_v2 import draw_by_inverse_cdf
from .generation_prime_v2 import PrimeV2GenerationMixin, draw_schedule
from .generation_process_prime_v2 import Blocks, Canvas, DenoisingProcess, row_keys
from .greedy_matches_prime_v2 import proposals, propose
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

    def denoising_process(self: Any, options: GenerationOptions, canvas: Canvas, processors: Any):
        """What `generate` runs."""
        return InterpolatingProcess(self, options, canvas, processors)

    def reveal_targets(self: Any, ids: Tensor, hidden: Tensor, real: Tensor) -> tuple[Tensor, Tensor, int]:
        """All targets in one pass: each is predicted with the targets before it in place, as the decode has them."""
        check_length(ids, None, self.config)
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        text = ScoredTexts(ids, real & ~hidden, hidden, positions, self.config.mask_token_id)
        inputs = sequential_inputs(text, hidden.cumsum(1) - 1, torch.zeros_like(ids[:, 0]))
        hidden_states = self.model(
            inputs.ids,
            position_ids=inputs.position_ids,
            order_ids=inputs.order_ids,
            visible_until=inputs.visible_until,
        ).last_hidden_state
        at, columns = (inputs.target_ids >= 0).nonzero(as_tuple=True)
        proposed, _ = propose(self, hidden_states[at, columns])
        right = torch.ones_like(real[:, 0])
        right[at[proposed != inputs.target_ids[at, columns]]] = False
        return right, hidden, 1


def draw_passes(keys: Tensor, canvas: Canvas, alpha_0: float, num_steps: int) -> tuple[Tensor, Tensor]:
    """(the pass that reveals each token, -1 for what is given; tokens' order ids), (B, T) int64.

    A pure function of the row keys (B,). Given tokens come first, left to right, and padding, never fed, last.
    """
    early = canvas.fillable & (uniforms(keys.unsqueeze(1), Stream.PHASE, canvas.position_ids) < alpha_0)
    first = replace(canvas, fillable=early)
    schedule = draw_schedule(keys, first, RevealOrder("token", 1), Blocks.make(first, None, num_steps))
    passes = schedule.passes.squeeze(2)
    late = canvas.fillable & ~early
    passes = torch.where(late, passes.amax(1, keepdim=True) + late.cumsum(1), passes)
    within = uniforms(keys.unsqueeze(1), Stream.WITHIN_STEP, canvas.position_ids).masked_fill(~early, 0.0)
    order = (passes + within).masked_fill(~canvas.real, torch.inf).argsort(dim=1, stable=True)
    return passes, order.argsort(dim=1)


class InterpolatingProcess(DenoisingProcess):
    """Pass m reveals the tokens that are due in it (`draw_passes`), from what earlier passes revealed."""

    def __init__(self, model: Any, options: GenerationOptions, canvas: Canvas, processors: Any):
        super().__init__(model, options, canvas, processors)
        if options.do_sample:
            self.keys = row_keys(canvas, options.seed)
            alpha_0, num_steps = model.config.alpha_0, options.max_denoising_steps
        else:
            self.keys, alpha_0, num_steps = torch.zeros_like(canvas.ids[:, 0]), 0.0, 1
        self.passes, self.order_ids = draw_passes(self.keys, canvas, alpha_0, num_steps)
        self.passes_left = (self.passes.amax(1) + 1).tolist()
        self.cache = KnownTokens() if options.use_cache else None

    def run_pass(self, rows: list[int]) -> None:
        canvas, options = self.canvas, self.options
        picked = torch.tensor(rows, device=canvas.ids.device)
        due = self.passes[picked] == self.num_forward[rows[0]]  # as many passes for all rows that are not done
        for at, columns, logits in self.scores(picked, due):
            if options.do_sample:
                places = canvas.position_ids[picked[at], columns]
                draws = uniforms(self.keys[picked[at]], Stream.INTERPOLATING_TOKEN, places)
                ids = draw_by_inverse_cdf(self.probabilities(logits), draws)
            else:
                ids = proposals(logits)[0]
            canvas.ids[picked[at], columns] = ids

    def finish_next(self, row: int) -> None:
        super().finish_next(row)
        self.passes[row].clamp_(max=self.num_forward[row])

    def hidden_states(self, picked: Tensor, target_mask: Tensor) -> Tensor:
        """Those of the queries for the targets, (M, D)."""
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
        return hidden_states[:, tokens.shape[1] :][is_query]


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
