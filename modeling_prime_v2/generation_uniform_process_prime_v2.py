"""Passes of uniform-state diffusion over noised tokens: predictor steps of the reverse process, and corrector steps.

P predictor steps lead from uniform noise at t = 1 to t = 0, step m from t = (P - m)/P to s = t - 1/P. Each draws every
token to be generated from q(z_s | z_t, p) (`reverse_step`); the last one, to s = 0, draws it from p(x | z_t), as what
the bound calls reconstruction does. Every token can change in every step, and again later. The network sees the time,
so a step that changes nothing needs a pass all the same.

A predictor step draws its tokens independently of each other, so its state has not quite the law q_s of noised texts.
A corrector step leads back towards it (arXiv:2205.14987, sec. 4.4; for leave-one-out denoisers arXiv:2605.22765): at a
fixed time t it draws some tokens, chosen at random, from alpha p + (1 - alpha)/V. Where p is the posterior of a clean
token given the noised ones elsewhere, which is what the bound trains, that is q_t(z_l | z elsewhere): a Gibbs step,
which leaves q_t as it is if it redraws one token. Redrawing several at once ignores what each tells of the others: the
law that stays is near q_t, the nearer the fewer there are (tests/modeling_prime_v2/test_corrector.py measures it).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .diffusion_uniform_prime_v2 import reverse_step
from .generation_config_prime_v2 import GenerationOptions
from .generation_draws_prime_v2 import draw_by_inverse_cdf
from .generation_process_prime_v2 import Canvas, DenoisingProcess, row_keys
from .greedy_matches_prime_v2 import most_confident
from .random_prime_v2 import Stream, uniforms
from .samplers_prime_v2 import PredictorCorrectorSamplerConfig

Plan = list[tuple[float, float]]  # the times (t, s) before and after each pass of a row; s = t in a corrector step


def steps_from_noise(num_steps: int) -> Plan:
    """Predictor steps from t = 1 to t = 0."""
    return [(1 - m / num_steps, 1 - (m + 1) / num_steps) for m in range(num_steps)]


def with_correctors(sampler: PredictorCorrectorSamplerConfig, num_passes: int) -> Plan:
    """As many predictor steps as `num_passes` passes have room for, with their corrector steps."""

    def plan(num_steps: int) -> Plan:
        passes = []
        for now, after in steps_from_noise(num_steps):
            corrected = after > 0 and sampler.t_off < after <= sampler.t_on
            passes += [(now, after), *[(after, after)] * (sampler.corrector_steps if corrected else 0)]
        return passes

    num_steps = num_passes
    while len(plan(num_steps)) > num_passes:
        num_steps -= 1
    return plan(num_steps)


class UniformProcess(DenoisingProcess):
    """Passes over a canvas of noised tokens; a subclass sets the start and the steps of each row."""

    def __init__(self, model: Any, options: GenerationOptions, canvas: Canvas, processors: Any):
        super().__init__(model, options, canvas, processors)
        self.plans: list[Plan] = []  # of each row
        self.times = torch.zeros(0)  # (R,) of the pass

    def start(self, keys: Tensor, stream: int, plans: list[Plan]) -> None:
        """Fill the tokens to be generated with uniform noise, a function of row keys (B,) and position."""
        canvas, vocab_size = self.canvas, self.model.config.vocab_size
        draws = uniforms(keys.unsqueeze(1), stream, canvas.position_ids)
        noise = (draws * vocab_size).long().clamp(max=vocab_size - 1)
        canvas.ids = torch.where(canvas.fillable, noise, canvas.ids)
        self.plans, self.passes_left = plans, list(map(len, plans))

    def step_times(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Times t before and s after the next pass of each row, (R,) float64; s = 0 in a row's last pass."""
        times = [self.plans[row][self.num_forward[row]] for row in rows]
        times = [(t, 0.0 if self.passes_left[row] == 1 else s) for row, (t, s) in zip(rows, times, strict=True)]
        now, after = torch.tensor(times, dtype=torch.double, device=self.canvas.ids.device).unbind(1)
        return now, after

    def estimates(self, picked: Tensor, times: Tensor, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """One pass over the rows `picked` (R,) at `times` (R,): the estimate p of each of `tokens` (R, T) bool.

        Yields, in pieces, (numbers within `picked` (M,), columns (M,), p (M, V) float64, which sums to 1).
        """
        self.times = times
        for at, columns, logits in self.scores(picked, tokens):
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


class SampledUniformProcess(UniformProcess):
    """Sampling (`generate`): at most max_denoising_steps passes a row, predictor and corrector steps together."""

    def __init__(self, model: Any, options: GenerationOptions, canvas: Canvas, processors: Any):
        super().__init__(model, options, canvas, processors)
        self.keys = row_keys(canvas, options.seed)
        if options.sampler_kind == "predictor-corrector":
            plan = with_correctors(options.sampler_config, options.max_denoising_steps)
        else:
            plan = steps_from_noise(options.max_denoising_steps)
        plans = [plan if any_token else [] for any_token in canvas.fillable.any(1).tolist()]
        self.start(self.keys, Stream.UNIFORM_START, plans)

    def run_pass(self, rows: list[int]) -> None:
        canvas, number = self.canvas, self.num_forward[rows[0]]  # the same for all rows that are not done
        picked, (now, after) = torch.tensor(rows, device=canvas.ids.device), self.step_times(rows)
        corrects = now == after
        tokens = canvas.fillable[picked]
        if corrects.any():
            tokens = tokens & (~corrects.unsqueeze(1) | self.redrawn(picked, number))
        # A token that is redrawn has no say in its new value: a step from pure noise, alpha = 0, to its own time.
        alpha_now, alpha_next = torch.where(corrects, 0.0, 1 - now), 1 - after
        for at, columns, probabilities in self.estimates(picked, now, tokens):
            which = picked[at]
            weights = reverse_step(probabilities, canvas.ids[which, columns], alpha_now[at], alpha_next[at])
            draws = uniforms(self.keys[which], Stream.UNIFORM_TOKEN, canvas.position_ids[which, columns], number)
            canvas.ids[which, columns] = draw_by_inverse_cdf(weights, draws)

    def redrawn(self, picked: Tensor, number: int) -> Tensor:
        """The tokens that a corrector step in pass `number` redraws, at random, (R, T) bool."""
        fillable, places = self.canvas.fillable[picked], self.canvas.position_ids[picked]
        draws = uniforms(self.keys[picked].unsqueeze(1), Stream.CORRECTED, places, number)
        count = (fillable.sum(1) * self.options.sampler_config.corrector_share).round().clamp(min=1)
        return most_confident(draws.masked_fill(~fillable, -1.0), count)
