"""Uniform-state diffusion in Transformers: a bidirectional Llama over noised tokens and the time, and its loss."""

import math

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .backbone_prime_v2 import PrimeV2Backbone, PrimeV2Layer
from .code_table_prime_v2 import check_ids, reads_values
from .configuration_uniform_prime_v2 import PrimeV2UniformConfig
from .diffusion_uniform_prime_v2 import NoisedTokens, UniformNoise, draw_noise, uniform_loss
from .generation_config_prime_v2 import PrimeV2GenerationConfig
from .generation_uniform_prime_v2 import PrimeV2UniformGenerationMixin
from .head_prime_v2 import PrimeV2HeadModel
from .likelihood_uniform_prime_v2 import PrimeV2UniformLikelihood
from .linear_prime_v2 import all_vectors
from .loss_prime_v2 import PrimeV2Output, divisor, refuse_lost_labels, refuse_noise, sum_by_row, training_batch
from .validation_inputs_prime_v2 import as_tensor, check_length, token_inputs
from .validation_keywords_prime_v2 import forward_keywords

# Times are embedded by sines and cosines of TIME_SCALE * t and slower ones, down to TIME_SCALE / MAX_PERIOD_RATIO * t
# (DiT, arXiv:2212.09748, whose times are 0..1000).
TIME_SCALE, MAX_PERIOD_RATIO = 1000.0, 10_000.0


class PrimeV2TimeEmbedding(nn.Module):
    """Times (B,) in [0, 1] to (B, E), E = config.time_embedding_size: sinusoids, then two layers with SiLU."""

    def __init__(self, config: PrimeV2UniformConfig):
        super().__init__()
        self.size = config.time_embedding_size
        self.first = nn.Linear(self.size, self.size)
        self.second = nn.Linear(self.size, self.size)

    def forward(self, times: Tensor, dtype: torch.dtype) -> Tensor:
        """times (B,) float to (B, E) of `dtype`."""
        half = torch.arange(self.size // 2, dtype=torch.double, device=times.device) / (self.size // 2)
        angles = TIME_SCALE * times.double().unsqueeze(1) * torch.exp(-math.log(MAX_PERIOD_RATIO) * half)  # (B, E / 2)
        features = torch.cat([angles.sin(), angles.cos()], dim=1).to(dtype)
        return nn.functional.silu(self.second(nn.functional.silu(self.first(features))))


class PrimeV2TimeScale(nn.Linear):
    """The time's embedding (B, E) to factors (B, 1, N x D) of normed hidden states; its weights 0, at first all 1."""

    def forward(self, time_embedding: Tensor) -> Tensor:
        return 1 + super().forward(time_embedding).unsqueeze(1)


class PrimeV2UniformLayer(PrimeV2Layer):
    """The Transformer block with each norm's output scaled by the time, per channel (DiT's adaptive norm).

    A scale without DiT's shift and gate: norms and linear maps have no bias here either.
    """

    def __init__(self, config: PrimeV2UniformConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        if config.time_conditioning:
            self.time_scale = PrimeV2TimeScale(config.time_embedding_size, 2 * config.hidden_size)

    def forward(self, hidden_states: Tensor, time_embedding: Tensor | None = None, **kwargs) -> Tensor:
        if time_embedding is None:
            return super().forward(hidden_states, **kwargs)
        attention_scale, mlp_scale = self.time_scale(time_embedding).chunk(2, dim=-1)  # (B, 1, D)
        normed = self.input_layernorm(hidden_states) * attention_scale
        hidden_states = hidden_states + self.self_attn(normed, **kwargs)[0]
        checkpointed = self.gradient_checkpointing and self.training
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states) * mlp_scale, checkpointed)


class PrimeV2UniformModel(PrimeV2Backbone):
    """The network up to the last norm: noised tokens (B, L) and their times (B,) to hidden states (B, L, D)."""

    config: PrimeV2UniformConfig
    config_class = PrimeV2UniformConfig
    _no_split_modules = ["PrimeV2UniformLayer"]
    layer_class = PrimeV2UniformLayer

    def __init__(self, config: PrimeV2UniformConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.time_conditioning:
            self.time_embedding = PrimeV2TimeEmbedding(config)
            self.time_scale = PrimeV2TimeScale(config.time_embedding_size, config.hidden_size)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, PrimeV2TimeScale):
            init.zeros_(module.weight)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def all_embeddings(self) -> Tensor:
        """The vectors of all tokens, (V, D)."""
        return all_vectors(self.embed_tokens, self.config.vocab_size)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor,
        times: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutput:
        """input_ids (B, L) int64 in [0, V), noised; times (B,) in [0, 1]; attention_mask (B, L), 0 for padding.

        times: None means 0, clean tokens; they are not read where config.time_conditioning is False.
        """
        kwargs = forward_keywords(self, kwargs)
        if times is None and self.config.time_conditioning:
            times = torch.zeros(len(input_ids), dtype=torch.double, device=input_ids.device)
        check_noised(input_ids, times, attention_mask, self.config)
        hidden_states = self.embed_tokens(input_ids)
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask
        )
        if not self.config.time_conditioning:
            hidden_states = self.run_layers(hidden_states, position_ids, mask, **kwargs)
            return BaseModelOutput(last_hidden_state=hidden_states)
        time_embedding = self.time_embedding(times, hidden_states.dtype)
        hidden_states = self.run_layers(hidden_states, position_ids, mask, time_embedding, **kwargs)
        return BaseModelOutput(last_hidden_state=hidden_states * self.time_scale(time_embedding))


class PrimeV2ForUniformDiffusion(PrimeV2HeadModel, PrimeV2UniformGenerationMixin):
    """Uniform-state diffusion with its head: logits, training loss, likelihood bound and generation."""

    config: PrimeV2UniformConfig
    config_class = PrimeV2UniformConfig
    generation_config_class = PrimeV2GenerationConfig
    backbone_class = PrimeV2UniformModel
    likelihood_class = PrimeV2UniformLikelihood
    why_fixed = (
        "part of the noise, in which every token is as likely as another; train a model with the vocabulary that you "
        "need"
    )
    _no_split_modules = ["PrimeV2UniformLayer"]

    def __init__(self, config: PrimeV2UniformConfig):
        super().__init__(config)
        self.model = PrimeV2UniformModel(config)
        self.add_head()
        self.post_init()

    @property
    def loss_is_bound(self) -> bool:
        """Whether the loss is an upper bound on -log p(x) per token."""
        return self.config.loss_weight == "elbo"

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        noise_keys: Tensor | None = None,
        noise_levels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        times: Tensor | None = None,
        **kwargs,
    ) -> PrimeV2Output:
        """Logits of noised tokens at the given times, or, with labels, the training loss on noise drawn here.

        input_ids (B, L): noised tokens in [0, V) with their times (B,) in [0, 1]; with labels the clean ones.
        labels (B, L): clean ids; -100 is neither noised nor scored. With labels, input_ids must hold the same ids (or
            the mask) where labels are scored.
        noise_keys (B,) int64 and noise_levels (B,) float64 in (0, 1) fix the noise (see `draw_noise`); None draws
            both from torch's generator, the levels stratified over the batch.
        num_items_in_batch: scored tokens of the whole optimiser step, the loss's divisor; None counts this batch.
        Raises ValueError for ids and times out of range, over-long or empty input, rows of only padding, nothing to
        score, times missing where the network needs them, and times with labels.
        """
        kwargs = forward_keywords(self, kwargs)
        input_ids, attention_mask = token_inputs(self, input_ids, attention_mask)
        labels = as_tensor(self, "labels", labels)
        if labels is None:
            refuse_noise(noise_keys, noise_levels)
            refuse_lost_labels(num_items_in_batch)
            check_times(times, self.config)
            times = times if times is None else torch.as_tensor(times, device=input_ids.device)
            outputs = self.model(input_ids, times, attention_mask, position_ids, **kwargs)
            logits = self.token_logits(outputs.last_hidden_state)
            return PrimeV2Output(None, None, logits, outputs.hidden_states, outputs.attentions)
        if times is not None:
            raise ValueError("times were given with labels, whose noise is drawn here; leave times out")
        loss, each, outputs = self._loss(
            input_ids, attention_mask, position_ids, labels, noise_keys, noise_levels, num_items_in_batch, **kwargs
        )
        return PrimeV2Output(loss, self.loss_is_bound, None, outputs.hidden_states, outputs.attentions, each)

    def _loss(
        self, input_ids, attention_mask, position_ids, labels, noise_keys, noise_levels, num_items_in_batch, **kwargs
    ):
        config = self.config
        batch = training_batch(config, input_ids, attention_mask, labels, noise_keys, noise_levels)
        ids, scored = batch.ids, batch.scored
        noise = draw_noise(ids, scored, batch.noise_keys, batch.noise_levels, config.vocab_size)
        outputs = self.model(noise.ids, noise.times, attention_mask, position_ids, **kwargs)
        total, nats = self.sequence_loss(outputs.last_hidden_state, ids, scored, noise, config.loss_weight)
        weight = noise.weight if config.loss_weight == "elbo" else 1.0
        return total / divisor(num_items_in_batch, scored), nats * weight, outputs

    def sequence_loss(self, hidden_states, ids, scored, noise: UniformNoise, loss_weight: str = "elbo"):
        """Weighted nats of the scored tokens: `loss_weight` as in the config.

        hidden_states (B, L, D); ids (B, L) clean; scored (B, L) bool. Returns the weighted sum, differentiable, and
        the unweighted nats of each sequence (B,), float64, detached.
        """
        rows, columns = scored.nonzero(as_tuple=True)
        kind, weight = "elbo", noise.weight
        if loss_weight == "low_variance":
            kind, weight = "posterior", torch.ones_like(weight)
        tokens = NoisedTokens(ids[rows, columns], noise.ids[rows, columns], noise.times[rows], weight[rows])
        total, nats = uniform_loss(hidden_states[rows, columns], self.head(), tokens, kind)
        return total, sum_by_row(nats, rows, len(ids))


def check_noised(input_ids: Tensor, times: Tensor | None, attention_mask: Tensor | None, config) -> None:
    """ValueError unless noised ids (B, L), their times (B,) and mask (B, L) can be fed to the network."""
    if torch.compiler.is_compiling():
        return
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; give token ids (B, L)")
    check_length(input_ids, attention_mask, config)
    check_ids(input_ids, config.vocab_size, "the mask token is none of them: give noised tokens, and their times")
    shape = input_ids.shape[:1]
    if times is None or times.shape == shape and not reads_values(times):
        return
    if times.shape != shape or not bool(((times >= 0) & (times <= 1)).all()):
        raise ValueError(f"times={times.tolist()} must be {len(input_ids)} numbers in [0, 1], one a row; use 0.5")


def check_times(times: Tensor | None, config) -> None:
    """ValueError for logits of tokens whose noise level is not given, where they depend on it."""
    if times is None and config.time_conditioning:
        raise ValueError(
            "times=None, but what the network says depends on the noise level; give times (B,), 0 for clean tokens "
            "and 1 for nothing but noise"
        )


# So that save_pretrained copies these files into the folder; config.auto_map names the class for both auto classes.
PrimeV2ForUniformDiffusion.register_for_auto_class("AutoModel")
