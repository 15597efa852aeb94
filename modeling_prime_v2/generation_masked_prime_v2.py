"""What all samplers of masked diffusion share: the states of the digits, their logits, and how a draw reveals them."""

from typing import Any, cast

import torch
from torch import Tensor

from .generation_cache_prime_v2 import CachedPasses
from .generation_config_prime_v2 import GenerationOptions
from .generation_draws_prime_v2 import draw_by_inverse_cdf, draw_from_logits
from .generation_process_prime_v2 import Blocks, Canvas, DenoisingProcess, row_keys
from .random_prime_v2 import Stream, uniforms


class MaskedProcess(DenoisingProcess):
    """The base class of samplers of masked diffusion; states (B, T, S) int64, base = masked."""

    def __init__(
        self, model: Any, options: GenerationOptions, canvas: Canvas, processors: Any, keys: Tensor | None = None
    ):
        """keys (B,) int64: the key of each row's draws, by default a hash of the seed and the row (`row_keys`)."""
        super().__init__(model, options, canvas, processors)
        self.states = model.encode(canvas.ids)
        self.keys = row_keys(canvas, options.seed) if keys is None else keys
        self.blocks = Blocks.make(canvas, options.block_length, options.max_denoising_steps)
        self.cached = None if options.cache == "none" else CachedPasses(options.cache, self)

    def hidden_states(self, picked: Tensor, target_mask: Tensor) -> Tensor:
        if self.cached is not None:
            return self.cached.hidden_states(picked, target_mask)
        return self.model.model(
            self.states[picked],
            attention_mask=self.padding_mask(picked),
            position_ids=self.canvas.position_ids[picked],
            target_mask=target_mask,
        ).last_hidden_state

    def shown(self, picked: Tensor) -> Tensor:
        """The tokens whose logits a streamer gets: all hidden ones, or those of the block where there is a cache."""
        return self.hidden()[picked] if self.cached is None else super().shown(picked)

    def digits(self) -> Tensor:
        return self.states if self.states.shape[2] > 1 else super().digits()

    def logits(self, hidden_states: Tensor, rows: Tensor, columns: Tensor, context: Tensor | None) -> Tensor:
        """Logits (M, V) after the carry-over filter and the processors, -inf for excluded tokens (see `generate`)."""
        states, table = self.states[rows, columns], self.model.code_table  # (M, S)
        logits = self.model.token_logits(hidden_states, states)
        self._tick("network")
        if context is None and self.model.config.carry_over:
            return logits
        consistent = table.consistent(states)
        logits = logits.masked_fill(~consistent, -torch.inf)
        if context is None:
            return logits
        scores = cast(Any, self.processors)(context, logits.clone()).masked_fill(~consistent, -torch.inf)
        overruled = (scores == -torch.inf).all(1) & (states != table.base).any(1)
        return torch.where(overruled.unsqueeze(1), logits, scores)

    def values(self, rows: Tensor, columns: Tensor, logits: Tensor, steps: Tensor, digits: Tensor) -> Tensor:
        """Token ids (M,) drawn at rows and columns (M,) in steps (M,); `digits` (M, S) are those to be revealed."""
        draws = uniforms(self.keys[rows], Stream.TOKEN, self.canvas.position_ids[rows, columns], steps)
        if self.options.top_p == 1 and self.options.temperature > torch.finfo(logits.dtype).tiny:
            return draw_from_logits(logits, draws, self.options.temperature)
        return draw_by_inverse_cdf(self.probabilities(logits), draws)

    def reveal(self, rows: Tensor, columns: Tensor, logits: Tensor, steps: Tensor, digits: Tensor) -> None:
        """Draw the tokens at rows and columns (M,) and reveal the hidden ones among `digits` (M, S)."""
        table, states = self.model.code_table, self.states[rows, columns]
        digits = digits & (states == table.base)
        ids = self.values(rows, columns, logits, steps, digits)
        self.states[rows, columns] = states = torch.where(digits, table.codes[ids], states)
        whole = (states != table.base).all(-1)
        self.canvas.ids[rows, columns] = torch.where(whole, ids, self.model.config.mask_token_id)
