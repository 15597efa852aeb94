"""`generate` of uniform-state diffusion: the ancestral reverse process, and a deterministic decode.

N steps lead from uniform noise at t = 1 to t = 0, step m from t = (N - m)/N to s = t - 1/N. Sampling draws every
token to be generated from q(z_s | z_t, p) (`reverse_step`); the last step, to s = 0, draws it from p(x | z_t), as what
the bound calls reconstruction does. Every token can change in every step, and again later. The network sees the time,
so a step that changes nothing needs a pass all the same: each row takes N passes.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .diffusion_uniform_prime_v2 import reverse_step
from .generation_config_prime_v2 import GenerationOptions
from .generation_prime_v2 import PrimeV2GenerationMixin
from .generation_process_prime_v2 import (
    Canvas,
    DenoisingProcess,
    DraftStream,
    content_keys,
    draw_by_inverse_cdf,
    make_canvas,
    row_keys,
)
from .greedy_matches_prime_v2 import most_confident
from .random_prime_v2 import Stream, uniforms


class PrimeV2UniformGenerationMixin(PrimeV2GenerationMixin):
    """`generate` of `PrimeV2ForUniformDiffusion`: as that of masked diffusion, but for this.

    temperature and top_p act on the network's estimate p.
    logits_processor: one row for each position that is generated, in every pass; `ids` is the position's sequence
        before the pass, tokens that are still noise included.
    stopping_criteria and streamer get the noised tokens of each step, never the mask.
    EOS ends no row early, since until the last pass any token can change.
    do_sample=False: see `GreedyUniformProcess`.
    """

    def denoising_process(self: Any, options: GenerationOptions, canvas: Canvas, processors: Any):
        """What `generate` runs."""
        kind = AncestralUniformProcess if options.do_sample else GreedyUniformProcess
        return kind(self, options, canvas, processors)

    def reveal_targets(self: Any, ids: Tensor, hidden: Tensor, real: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All targets, by running the decode, since a token can be revised until the last pass."""
        width = ids.shape[1]
        options = GenerationOptions(max_length=width, max_denoising_steps=width, do_sample=False)
        masked = ids.masked_fill(hidden, self.config.mask_token_id)
        process = GreedyUniformProcess(self, options, make_canvas(self, masked, real, None, options), [])
        process.run([], DraftStream(None, process.canvas))
        right = ((process.canvas.ids == ids) | ~hidden).all(1)
        return right, hidden, torch.tensor(process.num_forward)


class UniformProcess(DenoisingProcess):
    """Passes over a canvas of noised tokens; a subclass sets the start and the steps of each row."""

    def __init__(self, model: Any, options: GenerationOptions, canvas: Canvas, processors: Any):
        super().__init__(model, options, canvas, processors)
        self.num_steps: list[int] = []  # N of each row
        self.times = torch.zeros(0)  # (R,) of the pass

    def start(self, keys: Tensor, stream: int, num_steps: list[int]) -> None:
        """Fill the tokens to be generated with uniform noise, a function of row keys (B,) and position."""
        canvas, vocab_size = self.canvas, self.model.config.vocab_size
        draws = uniforms(keys.unsqueeze(1), stream, canvas.position_ids)
        noise = (draws * vocab_size).long().clamp(max=vocab_size - 1)
        canvas.ids = torch.where(canvas.fillable, noise, canvas.ids)
        self.num_steps, self.passes_left = num_steps, list(num_steps)

    def step_times(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Times t before and s after the next pass of each row, (R,) float64; s = 0 in a row's last pass."""
        steps = [(self.num_forward[row], self.num_steps[row], self.passes_left[row]) for row in rows]
        times = [(1 - m / n, 0.0 if left == 1 else 1 - (m + 1) / n) for m, n, left in steps]
        now, after = torch.tensor(times, dtype=torch.double, device=self.canvas.ids.device).unbind(1)
        return now, after

    def estimates(self, picked: Tensor, times: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """One pass over the rows `picked` (R,) at `times` (R,): the estimate p of every token to be generated.

        Yields, in pieces, (numbers within `picked` (M,), columns (M,), p (M, V) float64, which sums to 1).
        """
        self.times = times
        for at, columns, logits in self.scores(picked, self.canvas.fillable[picked]):
            probabilities = self.probabilities(logits)
            yield at, columns, probabilities / probabilities.sum(1, keepdim=True)

    def hidden_states(self, picked: Tensor, target_mask: Tensor) -> Tensor:
        hidden_states = self.model.model(
            self.canvas.ids[picked],
            self.times,
            attention_mask=self.padding_mask(picked),
            position_ids=self.canvas.position_ids[picked],
        ).last_hidden_state
        return hidden_states[target_mask]

    def _decided(self) -> Tensor:
        """No row: until its last pass every token can change, EOS included."""
        return torch.zeros(len(self.canvas.ids), dtype=torch.bool)


class AncestralUniformProcess(UniformProcess):
    """Sampling (`generate`): N = max_denoising_steps passes a row."""

    def __init__(self, model: Any, options: GenerationOptions, canvas: Canvas, processors: Any):
        super().__init__(model, options, canvas, processors)
        self.keys = row_keys(canvas, options.seed)
        num_steps = [options.max_denoising_steps if any_token else 0 for any_token in canvas.fillable.any(1).tolist()]
        self.start(self.keys, Stream.UNIFORM_START, num_steps)

    def run_pass(self, rows: list[int]) -> None:
        canvas, number = self.canvas, self.num_forward[rows[0]]  # the same for all rows that are not done
        picked, (now, after) = torch.tensor(rows, device=canvas.ids.device), self.step_times(rows)
        for at, columns, probabilities in self.estimates(picked, now):
            which = picked[at]
            weights = reverse_step(probabilities, canvas.ids[which, columns], 1 - now[at], 1 - after[at])
            draws = uniforms(self.keys[which], Stream.UNIFORM_TOKEN, canvas.position_ids[which, columns], number)
            canvas.ids[which, columns] = draw_by_inverse_cdf(weights, draws)


class GreedyUniformProcess(UniformProcess):
    """The deterministic decode: N = min(max_denoising_steps, n) passes for a row of n tokens to be generated.

    In each pass every token proposes its most probable clean id, argmax of p(x | z_t). After pass m of N the
    floor(n m / N) tokens with the most probable proposals hold them, as many as the forward process keeps at that
    time; the others hold the noise that they began with, a function of the row's ids and the position. So a token can
    be revised until the last pass, in which all of them take their proposals. (The most probable *step* would be no
    decode: for many steps it is to stay at the noise.) Confidence order as in `generation_prime_v2`.
    """

    def __init__(self, model: Any, options: GenerationOptions, canvas: Canvas, processors: Any):
        super().__init__(model, options, canvas, processors)
        self.num_tokens = canvas.fillable.sum(1).tolist()
        num_steps = [min(options.max_denoising_steps, count) for count in self.num_tokens]
        self.start(content_keys(canvas), Stream.GREEDY_START, num_steps)
        self.noise = canvas.ids.clone()

    def run_pass(self, rows: list[int]) -> None:
        canvas, device = self.canvas, self.canvas.ids.device
        picked, (now, _) = torch.tensor(rows, device=device), self.step_times(rows)
        proposed = canvas.ids[picked]
        confidence = torch.full(proposed.shape, -1.0, dtype=torch.double, device=device)
        for at, columns, probabilities in self.estimates(picked, now):
            own = canvas.ids[picked[at], columns]
            posterior = reverse_step(probabilities, own, 1 - now[at], torch.ones_like(now[at]))
            best = (posterior / posterior.sum(1, keepdim=True)).max(1)
            confidence[at, columns], proposed[at, columns] = best.values, best.indices
        clean = most_confident(confidence, torch.tensor([self._num_clean(row) for row in rows], device=device))
        canvas.ids[picked] = torch.where(clean, proposed, self.noise[picked])

    def _num_clean(self, row: int) -> int:
        """How many tokens hold their proposals after the row's next pass."""
        num_tokens = self.num_tokens[row]
        if self.passes_left[row] == 1:
            return num_tokens
        return num_tokens * (self.num_forward[row] + 1) // self.num_steps[row]
