"""`generate` of uniform-state diffusion: samples (`generation_uniform_process_`), and a deterministic decode."""

from typing import Any

import torch
from torch import Tensor

from .diffusion_uniform_prime_v2 import reverse_step
from .generation_config_prime_v2 import GenerationOptions
from .generation_prime_v2 import PrimeV2GenerationMixin
from .generation_process_prime_v2 import Canvas, DraftStream, content_keys, make_canvas
from .generation_uniform_process_prime_v2 import SampledUniformProcess, UniformProcess, steps_from_noise
from .greedy_matches_prime_v2 import most_confident
from .random_prime_v2 import Stream


class PrimeV2UniformGenerationMixin(PrimeV2GenerationMixin):
    """`generate` of `PrimeV2ForUniformDiffusion`: the generate of masked diffusion, except for the following.

    temperature and top_p act on the network's estimate p.
    logits_processor: one row for each position that is generated, in every pass; `ids` is the position's sequence
        before the pass, tokens that are still noise included.
    stopping_criteria and streamer get the noised tokens of each step, never the mask.
    EOS ends no row early, since until the last pass any token can change.
    do_sample=False: see `GreedyUniformProcess`.
    """

    def denoising_process(self: Any, options: GenerationOptions, canvas: Canvas, processors: Any):
        """What `generate` runs."""
        kind = SampledUniformProcess if options.do_sample else GreedyUniformProcess
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
        plans = [steps_from_noise(min(options.max_denoising_steps, count)) for count in self.num_tokens]
        self.start(content_keys(canvas), Stream.GREEDY_START, plans)
        self.noise = canvas.ids.clone()

    def run_pass(self, rows: list[int]) -> None:
        canvas, device = self.canvas, self.canvas.ids.device
        picked, (now, _) = torch.tensor(rows, device=device), self.step_times(rows)
        proposed = canvas.ids[picked]
        confidence = torch.full(proposed.shape, -1.0, dtype=torch.double, device=device)
        for at, columns, probabilities in self.estimates(picked, now, canvas.fillable[picked]):
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
        return num_tokens * (self.num_forward[row] + 1) // len(self.plans[row])
