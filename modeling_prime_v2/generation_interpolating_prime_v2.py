"""`generate` of interpolating diffusion, with an exact cache of keys and values, and its deterministic decode.

Sampling: each token to be generated falls to the diffusion with probability alpha_0, which reveals it in one of
`max_denoising_steps` steps (`draw_schedule`; steps that reveal nothing are skipped); the others follow one by one,
left to right. The order of all tokens, random within a step, is drawn before the first pass. A pass then needs only
the tokens that the last one revealed and a query for each that is due: keys and values of earlier tokens do not change
(`diffusion_interpolating_prime_v2`), those of queries are dropped. Two stages: `StagesProcess`.

The deterministic decode (do_sample=False) has no diffusion: every token left to right, the most probable id. It is the
order of the "chain" likelihood, so one pass a stage with the targets in place tells what it would give
(`greedy_matches`).
"""

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache

from .diffusion_interpolating_prime_v2 import (
    NEVER_SEEN,
    ScoredTexts,
    SortedInputs,
    fine_inputs,
    first_stage,
    leading_columns,
    partial_ids,
    sequential_inputs,
)
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

    max_denoising_steps: of the diffusion phase only; each token that is left to the second phase takes a pass, and
        with `stage_digits` so does the second stage of each token.
    do_sample=False: left to right, the most probable id, one token a pass, whatever max_denoising_steps is.
    logits_processor: called for the tokens that are due in the pass, also with do_sample=False.
    use_cache: keep keys and values of known tokens (prompt and suffix are the first). False computes all of them
        in every pass: the same samples, up to the network's rounding, for more time and less memory.
    """

    def denoising_process(self: Any, options: GenerationOptions, canvas: Canvas, processors: Any):
        """What `generate` runs."""
        process: Any = InterpolatingProcess if self.config.stage_digits is None else StagesProcess
        return process(self, options, canvas, processors)

    def reveal_targets(self: Any, ids: Tensor, hidden: Tensor, real: Tensor) -> tuple[Tensor, Tensor, int]:
        """All targets, one pass a stage: each is predicted with those before it in place, as the decode has them."""
        check_length(ids, None, self.config)
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        text = ScoredTexts(ids, real & ~hidden, hidden, positions, self.config.mask_token_id)
        places, nothing = hidden.cumsum(1) - 1, torch.zeros_like(ids[:, 0])
        if self.config.stage_digits is None:
            parts = [sequential_inputs(text, places, nothing)]
        else:
            parts = [sequential_inputs(first_stage(text), places, nothing), fine_inputs(text)]
        right = torch.ones_like(real[:, 0])
        for inputs in parts:
            right[self._wrong_rows(inputs)] = False
        return right, hidden, len(parts)

    def _wrong_rows(self: Any, inputs: SortedInputs) -> Tensor:
        """The numbers of rows with a query whose most probable token has other digits than its target shows."""
        hidden_states = self.model(
            inputs.ids,
            position_ids=inputs.position_ids,
            order_ids=inputs.order_ids,
            visible_until=inputs.visible_until,
        ).last_hidden_state
        at, columns = (inputs.target_ids >= 0).nonzero(as_tuple=True)
        ids, targets, mask_id = inputs.ids[at, columns], inputs.target_ids[at, columns], self.config.mask_token_id
        found, _ = propose(self, hidden_states[at, columns], ids)
        if self.config.stage_digits is None:
            return at[found != targets]
        found = torch.where(targets > mask_id, partial_ids(found, mask_id), found)
        return at[(self.model.states(found) != self.model.states(targets)).any(-1)]


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


@dataclass
class Inputs:
    """W inputs that each of R rows feeds once they are known, and the queries of its T tokens.

    ids, position_ids, passes, order_ids (R, W) int64: passes is the number of the pass that reveals an input, -1 for
    what is given, NEVER_SEEN for padding; order_ids as of `SortedInputs`. queries (R, T) int64: their ids.
    """

    ids: Tensor
    position_ids: Tensor
    passes: Tensor
    order_ids: Tensor
    queries: Tensor


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
        picked = torch.tensor(rows, device=self.canvas.ids.device)
        # As many passes for all rows that are not done.
        self.reveal(picked, self.passes[picked] == self.num_forward[rows[0]])

    def reveal(self, picked: Tensor, due: Tensor) -> None:
        """Draw the tokens that are due, (R, T) bool, in the rows `picked` (R,)."""
        for at, columns, logits in self.scores(picked, due):
            if self.options.do_sample:
                draws = self.draws(picked[at], columns)
                ids = draw_by_inverse_cdf(self.probabilities(logits), draws)
            else:
                ids = proposals(logits)[0]
            self.take(picked[at], columns, ids)

    def draws(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Uniform numbers (M,) for the tokens at rows and columns (M,)."""
        return uniforms(self.keys[rows], Stream.INTERPOLATING_TOKEN, self.canvas.position_ids[rows, columns])

    def take(self, rows: Tensor, columns: Tensor, ids: Tensor) -> None:
        """Let what was drawn at rows and columns (M,) be known."""
        self.canvas.ids[rows, columns] = ids

    def inputs(self, picked: Tensor) -> "Inputs":
        """What the rows `picked` (R,) feed once it is known, and their queries."""
        canvas = self.canvas
        queries = torch.full_like(canvas.ids[picked], self.model.config.mask_token_id)
        places = canvas.position_ids[picked]
        passes = self.passes[picked].masked_fill(~canvas.real[picked], NEVER_SEEN)
        return Inputs(canvas.ids[picked], places, passes, self.order_ids[picked], queries)

    def finish_next(self, row: int) -> None:
        super().finish_next(row)
        self.passes[row].clamp_(max=self.num_forward[row])

    def hidden_states(self, picked: Tensor, target_mask: Tensor) -> Tensor:
        """Those of the queries for the targets, (M, D)."""
        inputs, number = self.inputs(picked), self.num_forward[int(picked[0])]
        known = inputs.passes < number
        tokens, is_token = leading_columns(known if self.cache is None else known & (inputs.passes == number - 1))
        queries, is_query = leading_columns(target_mask)
        ids = torch.cat([inputs.ids.gather(1, tokens), inputs.queries.gather(1, queries)], dim=1)  # (R, E)
        places = self.canvas.position_ids[picked].gather(1, queries)
        position_ids, layers = torch.cat([inputs.position_ids.gather(1, tokens), places], dim=1), None
        order_ids = inputs.order_ids.gather(1, tokens).masked_fill(~is_token, NEVER_SEEN)
        last = inputs.order_ids.masked_fill(~known, -1).amax(1, keepdim=True).expand(-1, queries.shape[1])
        visible_until = torch.cat([order_ids.masked_fill(~is_token, -1), last], dim=1)
        order_ids = torch.cat([order_ids, torch.full_like(queries, NEVER_SEEN)], dim=1)
        if self.cache is not None:
            order_ids, layers = self.cache.extend(picked, order_ids)
        hidden_states = self.model.model(
            ids, position_ids=position_ids, order_ids=order_ids, visible_until=visible_until, cache=layers
        ).last_hidden_state
        return hidden_states[:, tokens.shape[1] :][is_query]


class StagesProcess(InterpolatingProcess):
    """Two stages: `passes` reveal first ones, then `fine_passes`, a token a pass, second ones (cf. `fine_inputs`).

    partial (B, T) int64: partial ids, the mask id where the first stage is not known; fine_from (B,): the first pass
    of the second stage; stage: that of the rows which a pass is computing, 0 or 1, each with a cache of its own.
    """

    def __init__(self, model: Any, options: GenerationOptions, canvas: Canvas, processors: Any):
        super().__init__(model, options, canvas, processors)
        self.partial = torch.full_like(canvas.ids, model.config.mask_token_id)
        self.fine_from = self.passes.amax(1) + 1
        rank = canvas.fillable.cumsum(1)
        self.fine_passes = (self.fine_from.unsqueeze(1) + rank - 1).masked_fill(~canvas.fillable, -1)
        self.passes_left = (self.fine_passes.amax(1) + 1).tolist()
        self.stage, self.caches = 0, (self.cache, KnownTokens() if options.use_cache else None)

    def run_pass(self, rows: list[int]) -> None:
        number = self.num_forward[rows[0]]
        picked = torch.tensor(rows, device=self.canvas.ids.device)
        is_fine = self.fine_from[picked] <= number
        for stage, passes in enumerate((self.passes, self.fine_passes)):
            part = picked[is_fine == bool(stage)]
            if len(part):
                self.stage, self.cache = stage, self.caches[stage]
                self.reveal(part, passes[part] == number)

    def draws(self, rows: Tensor, columns: Tensor) -> Tensor:
        places = self.canvas.position_ids[rows, columns]
        return uniforms(self.keys[rows], Stream.INTERPOLATING_TOKEN, places, self.stage)

    def take(self, rows: Tensor, columns: Tensor, ids: Tensor) -> None:
        if self.stage:
            super().take(rows, columns, ids)
        else:
            self.partial[rows, columns] = partial_ids(ids, self.model.config.mask_token_id)

    def inputs(self, picked: Tensor) -> Inputs:
        inputs, fillable, partial = super().inputs(picked), self.canvas.fillable[picked], self.partial[picked]
        first = torch.where(fillable, partial, inputs.ids)
        if not self.stage:
            return replace(inputs, ids=first)
        known = self.canvas.real[picked] & (first != self.model.config.mask_token_id)
        begin = (self.fine_from[picked].unsqueeze(1) - 1).expand_as(first)
        tokens = self.fine_passes[picked].masked_fill(~fillable, NEVER_SEEN)
        return Inputs(
            torch.cat([first, inputs.ids], dim=1),
            torch.cat([inputs.position_ids] * 2, dim=1),
            torch.cat([begin.masked_fill(~known, NEVER_SEEN), tokens], dim=1),
            torch.cat([torch.zeros_like(first), fillable.cumsum(1)], dim=1),
            partial,
        )

    def finish_next(self, row: int) -> None:
        super().finish_next(row)
        self.fine_from[row].clamp_(max=self.num_forward[row])
        self.fine_passes[row].clamp_(max=self.num_forward[row])

    def digits(self) -> Tensor:
        return self.model.model.states(torch.where(self.hidden(), self.partial, self.canvas.ids))

    def logits(self, hidden_states: Tensor, rows: Tensor, columns: Tensor, context: Tensor | None) -> Tensor:
        """Of the second stage, of the tokens with the first digits alone, also after the processors."""
        known = self.partial[rows, columns]
        logits = self.model.token_logits(hidden_states, known)
        self._tick("network")
        if context is None:
            return logits
        states, table = self.model.model.states(known), self.model.code_table
        scores = cast(Any, self.processors)(context, logits.clone())
        scores = scores.masked_fill(~table.consistent(states), -torch.inf)
        overruled = (scores == -torch.inf).all(1) & (states != table.base).any(1)
        return torch.where(overruled.unsqueeze(1), logits, scores)


class KnownTokens:
    """Keys and values of the tokens that rows know. What a pass stores for queries is dropped before the next one."""

    def __init__(self):
        self.layers = DynamicCache()
        self.rows: Tensor | None = None  # (R,) of the last pass
        self.order_ids: Tensor | None = None  # (R, C) of what is stored, NEVER_SEEN for queries and holes

    def extend(self, rows: Tensor, order_ids: Tensor) -> tuple[Tensor, DynamicCache]:
        """Before a pass over `rows` (R,) with inputs of `order_ids` (R, E); nothing is stored for rows that are new.

        Returns the order ids (R, C + E) of the C inputs that are stored and of the new ones, and the cache of them.
        """
        if self.rows is not None and self.order_ids is not None:
            index = torch.searchsorted(self.rows, rows).clamp(max=len(self.rows) - 1)
            held = self.order_ids[index].masked_fill((self.rows[index] != rows).unsqueeze(1), NEVER_SEEN)
            slots, is_token = leading_columns(held != NEVER_SEEN)  # (R, C)
            stored = held.gather(1, slots).masked_fill(~is_token, NEVER_SEEN)
            order_ids = torch.cat([stored, order_ids], dim=1)
            layers: list[Any] = self.layers.layers
            for layer in layers:
                heads = torch.arange(layer.keys.shape[1], device=rows.device)
                at = index[:, None, None], heads[:, None], slots[:, None]
                layer.keys, layer.values = layer.keys[at], layer.values[at]  # (R, heads, C, head_dim)
        self.rows, self.order_ids = rows, order_ids
        return order_ids, self.layers
