"""Interpolating diffusion in Transformers: the network with causal attention over a sorted order, and its loss."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .backbone_prime_v2 import NOT_SCORED, PrimeV2Backbone
from .chunked_loss_prime_v2 import token_nll
from .code_table_prime_v2 import PrimeV2CodeTable, check_ids
from .configuration_interpolating_prime_v2 import PrimeV2InterpolatingConfig
from .diffusion_interpolating_prime_v2 import (
    NEVER_SEEN,
    ScoredTexts,
    SortedInputs,
    draw_terms,
    is_bound,
    sequential_share,
)
from .generation_config_prime_v2 import PrimeV2GenerationConfig
from .generation_interpolating_prime_v2 import PrimeV2InterpolatingGenerationMixin
from .head_prime_v2 import PrimeV2HeadModel
from .likelihood_interpolating_prime_v2 import PrimeV2InterpolatingLikelihood
from .linear_prime_v2 import all_vectors
from .loss_prime_v2 import PrimeV2Output, divisor, refuse_lost_labels, refuse_noise, sum_by_row, training_batch
from .tree_embedding_prime_v2 import make_embedding
from .validation_inputs_prime_v2 import as_tensor, check_length, token_inputs
from .validation_keywords_prime_v2 import forward_keywords

MASKED_NOTE = "the mask token, the last of them, included"


class PrimeV2InterpolatingModel(PrimeV2Backbone):
    """The network up to the last norm: inputs (B, E) to hidden states (B, E, D), see diffusion_interpolating_.

    Its attention masks are dense and differ from row to row, which flash attention cannot take: "sdpa" or "eager".
    """

    config: PrimeV2InterpolatingConfig
    config_class = PrimeV2InterpolatingConfig
    _supports_flash_attn = False
    _supports_flex_attn = False

    def __init__(self, config: PrimeV2InterpolatingConfig):
        super().__init__(config)
        self.code_table = None if config.num_subtokens == 1 else PrimeV2CodeTable(config)
        if self.code_table is None:
            self.embed_tokens = nn.Embedding(config.vocab_size + 1, config.hidden_size)  # row V: a query
        else:
            self.embed_subtokens = make_embedding(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens if self.code_table is None else self.embed_subtokens

    def set_input_embeddings(self, value: Any):
        setattr(self, "embed_tokens" if self.code_table is None else "embed_subtokens", value)

    def all_embeddings(self) -> Tensor:
        """The vectors of all tokens, (V, D)."""
        if self.code_table is None:
            return all_vectors(self.embed_tokens, self.config.vocab_size)
        return self.embed_subtokens.forward(self.code_table.codes[:-1].unsqueeze(0)).squeeze(0)  # see all_vectors

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        order_ids: Tensor | None = None,
        visible_until: Tensor | None = None,
        cache=None,
        **kwargs,
    ) -> BaseModelOutput:
        """input_ids (B, E) int64 in [0, V], V = a query; position_ids (B or 1, E), None for 0..E-1.

        order_ids (B, C + E) and visible_until (B, E) int64 as of `SortedInputs`, C the inputs in `cache`; the caller
        has then checked ids and lengths. None: the known tokens became known from left to right, and each
        masked one is a query that sees them all; attention_mask (B, E), 0 for padding, is for this case only.
        """
        kwargs = forward_keywords(self, kwargs)
        if order_ids is None:
            check_length(input_ids, attention_mask, self.config)
            check_ids(input_ids, self.config.vocab_size + 1, MASKED_NOTE)
            order_ids, visible_until = left_to_right(input_ids, attention_mask, self.config.mask_token_id)
        if self.code_table is None:
            hidden_states = self.embed_tokens(input_ids)
        else:
            hidden_states = self.embed_subtokens(self.code_table.digits_of(input_ids))
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        mask = self._attention_mask(order_ids, visible_until, hidden_states.dtype)
        hidden_states = self.run_layers(hidden_states, position_ids, mask, cache=cache, **kwargs)
        return BaseModelOutput(last_hidden_state=hidden_states)

    def _attention_mask(self, order_ids: Tensor, visible_until: Tensor, dtype: torch.dtype) -> Tensor:
        """What each input attends to, (B, 1, E, C + E): bool for sdpa, for eager attention what is added."""
        num_inputs, num_keys = visible_until.shape[1], order_ids.shape[1]
        places = torch.arange(num_keys, device=order_ids.device)
        itself = places == places[num_keys - num_inputs :].unsqueeze(1)
        seen = ((order_ids.unsqueeze(1) <= visible_until.unsqueeze(2)) | itself).unsqueeze(1)
        if self.config._attn_implementation == "sdpa":
            return seen
        return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


class PrimeV2ForInterpolatingDiffusion(PrimeV2HeadModel, PrimeV2InterpolatingGenerationMixin):
    """Interpolating diffusion with its head: logits, training loss, likelihood bounds and generation."""

    config: PrimeV2InterpolatingConfig
    config_class = PrimeV2InterpolatingConfig
    generation_config_class = PrimeV2GenerationConfig
    backbone_class = PrimeV2InterpolatingModel
    likelihood_class = PrimeV2InterpolatingLikelihood
    why_fixed = "fixed, by the mask in the embedding and by the codes; make a model with the vocabulary that you need"
    _supports_flash_attn = False
    _supports_flex_attn = False

    def __init__(self, config: PrimeV2InterpolatingConfig):
        super().__init__(config)
        self.model = PrimeV2InterpolatingModel(config)
        self.add_head()
        self.post_init()

    @property
    def code_table(self) -> PrimeV2CodeTable | None:
        """The table that splits tokens into digits; None where they are whole (S = 1)."""
        return self.model.code_table

    @property
    def loss_is_bound(self) -> bool:
        """Whether the loss is an upper bound on -log p(x) per token, see diffusion_interpolating_."""
        return is_bound(self.config.alpha_0, self.config.loss_weight)

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
        **kwargs,
    ) -> PrimeV2Output:
        """Logits of masked tokens, or, with labels, the training loss on noise drawn here.

        input_ids (B, L): token ids, V = masked. Without labels the known tokens are taken to have become known from
            left to right; the logits (B, L, V) of a known token exclude all others.
        labels (B, L): clean ids; -100 is neither masked nor scored. With labels, input_ids must hold the same ids (or
            the mask) where labels are scored.
        noise_keys (B,) int64 and noise_levels (B,) float64 in (0, 1) fix the noise (see `draw_terms`; a level below
            the config's ar_share makes a left-to-right row); None draws both from torch's generator, the levels
            stratified over the batch.
        num_items_in_batch: scored tokens of the whole optimiser step, the loss's divisor; None counts this batch.
        Raises ValueError for ids out of range, over-long or empty input, rows of only padding, nothing to score.
        """
        kwargs = forward_keywords(self, kwargs)
        input_ids, attention_mask = token_inputs(self, input_ids, attention_mask)
        labels = as_tensor(self, "labels", labels)
        if labels is None:
            refuse_noise(noise_keys, noise_levels)
            refuse_lost_labels(num_items_in_batch)
            outputs = self.model(input_ids, attention_mask, position_ids, **kwargs)
            logits = self.token_logits(outputs.last_hidden_state)
            other = torch.arange(logits.shape[-1], device=logits.device) != input_ids.unsqueeze(-1)
            known = (input_ids != self.config.mask_token_id).unsqueeze(-1)
            logits = logits.masked_fill(known & other, -torch.inf)
            return PrimeV2Output(None, None, logits, outputs.hidden_states, outputs.attentions)
        for name in ("output_hidden_states", "output_attentions"):
            if kwargs.get(name):
                raise ValueError(f"{name}=True with labels: this loss takes two passes of other inputs; leave it out")
        loss, each = self._loss(
            input_ids, attention_mask, position_ids, labels, noise_keys, noise_levels, num_items_in_batch, **kwargs
        )
        return PrimeV2Output(loss, self.loss_is_bound, loss_per_sequence=each)

    def _loss(
        self, input_ids, attention_mask, position_ids, labels, noise_keys, noise_levels, num_items_in_batch, **kwargs
    ) -> tuple[Tensor, Tensor]:
        config = self.config
        batch = training_batch(config, input_ids, attention_mask, labels, noise_keys, noise_levels)
        ids, scored = batch.ids, batch.scored
        real = torch.ones_like(scored) if attention_mask is None else attention_mask.bool()
        check_ids(ids.masked_fill(~real, 0), config.vocab_size + 1, MASKED_NOTE)
        if position_ids is None:
            position_ids = torch.arange(ids.shape[1], device=ids.device)
        given = real & ~scored & (ids != config.mask_token_id)
        texts = ScoredTexts(ids, given, scored, position_ids.expand_as(ids), config.mask_token_id)
        share = sequential_share(config.alpha_0, config.ar_share)
        terms = draw_terms(texts, batch.noise_keys, batch.noise_levels, config.alpha_0, share, config.loss_weight)
        # A term without rows in this batch has a row of padding: every process makes the same calls of the network,
        # in which sharded weights are gathered.
        kept = [term for term, weight in zip(terms, (share, 1 - share), strict=True) if weight > 0]
        total, nats = self.sequence_nll([each.inputs for each in kept], [each.weights for each in kept], **kwargs)
        pieces = zip(kept, nats, strict=True)
        parts = [sum_by_row(each[: len(term.texts)] * term.weights, term.texts, len(ids)) for term, each in pieces]
        return total / divisor(num_items_in_batch, scored), torch.stack(parts).sum(0)

    def sequence_nll(self, parts: list[SortedInputs], weights: list[Tensor], **kwargs) -> tuple[Tensor, list[Tensor]]:
        """Weighted nats of all queries, differentiable, and the unweighted nats of each row, (R,) float64 a part.

        weights: (R,) of each part. One pass of the network a part, one of the head for all.
        """
        hidden_states, ids, each_weight, rows = [], [], [], []
        for part, weight in zip(parts, weights, strict=True):
            outputs = self.model(
                part.ids,
                position_ids=part.position_ids,
                order_ids=part.order_ids,
                visible_until=part.visible_until,
                **kwargs,
            )
            at, columns = (part.target_ids != NOT_SCORED).nonzero(as_tuple=True)
            hidden_states.append(outputs.last_hidden_state[at, columns])
            ids.append(part.target_ids[at, columns])
            each_weight.append(weight[at])
            rows.append(at)
        total, nats = token_nll(torch.cat(hidden_states), self.head(), torch.cat(ids), torch.cat(each_weight))
        pieces = zip(parts, rows, nats.split([len(each) for each in rows]), strict=True)
        return total, [sum_by_row(each, at, len(part.ids)) for part, at, each in pieces]


def left_to_right(input_ids: Tensor, attention_mask: Tensor | None, mask_id: int) -> tuple[Tensor, Tensor]:
    """(order_ids, visible_until) (B, L) when the tokens of input_ids (B, L) became known left to right.

    A token `mask_id` is a query.
    """
    known = input_ids != mask_id
    if attention_mask is not None:
        known = known & attention_mask.bool()
    order_ids = known.long().cumsum(1) - 1
    return order_ids.masked_fill(~known, NEVER_SEEN), torch.where(known, order_ids, known.sum(1, keepdim=True) - 1)


# So that save_pretrained copies these files into the folder; config.auto_map names the class for both auto classes.
PrimeV2ForInterpolatingDiffusion.register_for_auto_class("AutoModel")
