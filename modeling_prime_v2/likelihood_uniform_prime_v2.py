"""The likelihood bound of uniform-state diffusion (formulas: diffusion_uniform_prime_v2.py)."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .diffusion_uniform_prime_v2 import UniformNoise, draw_noise
from .likelihood_frame_prime_v2 import Likelihood
from .likelihood_rows_prime_v2 import Rows
from .random_prime_v2 import Stream


class PrimeV2UniformLikelihood(Likelihood):
    """Rows of a sequence under draws of the noise, their levels stratified over (0, 1)."""

    sampled_methods = ("uniform",)
    round_stream = Stream.UNIFORM_ROUND

    def rows(self, ids: Tensor, scored: Tensor, key: Tensor) -> Iterator[Rows]:
        for keys, levels in self.samples(key):
            clean, scored_rows = ids.expand(len(keys), -1), scored.expand(len(keys), -1)
            noise = draw_noise(clean, scored_rows, keys, levels, self.config.vocab_size)
            inputs = {"ids": noise.ids, "clean": clean, "scored": scored_rows, "times": noise.times}
            yield Rows(inputs, noise.weight)

    def row_loss(self, model: Any, inputs: dict[str, Tensor], attention_mask: Tensor | None) -> Tensor:
        noise = UniformNoise(inputs["ids"], inputs["times"], torch.ones_like(inputs["times"]))
        hidden_states = model.model(noise.ids, noise.times, attention_mask).last_hidden_state
        return model.sequence_loss(hidden_states, inputs["clean"], inputs["scored"], noise)[1]
