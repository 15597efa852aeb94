"""The autoregressive model (ARM) in Transformers: the backbone of the other families with attention to the left."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .backbone_prime_v2 import PrimeV2Backbone, PrimeV2SubtokenEmbedding
from .cache_name_prime_v2 import CACHE_NAME, one_cache
from .chunked_loss_prime_v2 import token_nll
from .code_table_prime_v2 import PrimeV2CodeTable, check_ids
from .configuration_arm_prime_v2 import PrimeV2ArmConfig
from .generation_arm_prime_v2 import PrimeV2ArmGenerationMixin
from .head_prime_v2 import PrimeV2HeadModel
from .likelihood_arm_prime_v2 import PrimeV2ArmLikelihood, next_tokens, start_token_id
from .linear_prime_v2 import all_vectors, apply_head
from .loss_prime_v2 import divisor, refuse_lost_labels, scored_tokens
from .tree_embedding_prime_v2 import make_embedding
from .validation_inputs_prime_v2 import (
    as_tensor,
    check_embeds,
    check_length,
    check_mask,
    check_prepared_mask,
    token_inputs,
)
from .validation_keywords_prime_v2 import forward_keywords


@dataclass
class PrimeV2CausalLMOutput(CausalLMOutputWithPast):
    """Output of `PrimeV2ForCausalLM`: Transformers' own, and whether the loss is a bound on -log p(x) per token.

    loss: scalar, nats per scored token; logits None with labels. logits (B, L, V): at i for the token at i + 1.
    loss_per_sequence: (B,) float, detached, -log p of each row's scored tokens, whose sum is the loss times its
        divisor. What Transformers' Trainer gives as predictions where there are labels. None without labels.
    """

    is_bound: bool | None = None
    loss_per_sequence: Tensor | None = None


class PrimeV2ArmModel(PrimeV2Backbone):
    """The network up to the last norm: token ids (B, L) to hidden states (B, L, D)."""

    config: PrimeV2ArmConfig
    config_class = PrimeV2ArmConfig

    def __init__(self, config: PrimeV2ArmConfig):
        super().__init__(config)
        whole = config.num_subtokens == 1
        self.code_table = None if whole else PrimeV2CodeTable(config)
        if config.subtoken_embedding == "ancestors":
            self.embed_subtokens = make_embedding(config)
        else:
            self.embed_subtokens = PrimeV2SubtokenEmbedding(config, config.vocab_size if whole else config.base)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Whole tokens have the table itself, as Transformers' own methods want it (`resize_token_embeddings`)."""
        return self.embed_subtokens.table if self.code_table is None else self.embed_subtokens

    def set_input_embeddings(self, value: Any):
        self.embed_subtokens.table = value

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (...) in [0, V) to vectors (..., D)."""
        if self.code_table is None:
            return self.embed_subtokens.table(ids)
        return self.embed_subtokens(self.code_table.digits_of(ids))

    def all_embeddings(self) -> Tensor:
        """The vectors of all tokens, (V, D)."""
        if self.code_table is None:
            return all_vectors(self.embed_subtokens.table, self.config.vocab_size)
        return self.embed_subtokens.forward(self.code_table.codes[:-1].unsqueeze(0)).squeeze(0)  # see all_vectors

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache=None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values=None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """input_ids (B, L) in [0, V), or inputs_embeds (B, L, D); attention_mask (B, past + L), 0 for padding.

        cache, or by its older name past_key_values: keys and values of earlier tokens, to which those of these are
            added.
        position_ids (B or 1, L): given without mask and cache, those that do not rise by one begin another text, which
            does not see what precedes it, as in Transformers (packed texts).
        """
        kwargs = forward_keywords(self, kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids (B, L) and inputs_embeds (B, L, D)")
        cache = one_cache(cache, past_key_values)
        check_embeds(inputs_embeds, self.config)
        self._check_inputs(input_ids if inputs_embeds is None else inputs_embeds, attention_mask, cache)
        if inputs_embeds is None:
            # A single token after others comes from this model's own logits: no need to wait for its value.
            if cache is None or input_ids.shape[1] > 1:
                check_ids(input_ids, self.config.vocab_size, "and an autoregressive model has no mask token")
            inputs_embeds = self.embed(input_ids)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        # It looks for borders of packed texts in positions, so it gets only those that were given.
        mask = create_causal_mask(self.config, inputs_embeds, attention_mask, cache, position_ids)
        if position_ids is None:
            past = 0 if cache is None else cache.get_seq_length()
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past).unsqueeze(0)
        hidden_states = self.run_layers(inputs_embeds, position_ids, mask, cache=cache, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, **{CACHE_NAME: cache})

    def _check_inputs(self, inputs: Tensor, mask: Any, past: Any) -> None:
        """ValueError for inputs (B, L, ...) of another length, and what is no mask, nor one that Transformers made."""
        whole = mask is None or isinstance(mask, Tensor) and mask.dim() == 2
        if past is None:
            check_length(inputs, mask if whole else None, self.config)
        if not whole:
            check_prepared_mask(mask, self.config._attn_implementation)
        elif past is not None and mask is not None:
            # A single token after others: on an accelerator there is no wait for the values of an integer mask.
            is_step = inputs.shape[1] == 1 and mask.device.type != "cpu" and not mask.is_floating_point()
            check_mask("attention_mask", None if is_step else mask)


class PrimeV2ForCausalLM(PrimeV2HeadModel, PrimeV2ArmGenerationMixin):
    """The ARM with its head: logits, training loss, exact likelihood and Transformers' own generation."""

    config: PrimeV2ArmConfig
    config_class = PrimeV2ArmConfig
    backbone_class = PrimeV2ArmModel
    likelihood_class = PrimeV2ArmLikelihood
    why_fixed = (
        "fixed by the code table, which gives each token its digits; build a tokenizer and a model with the "
        "vocabulary that you need (prime_v2.tokenization.build_tokenizer)"
    )

    def __init__(self, config: PrimeV2ArmConfig):
        super().__init__(config)
        self.model = PrimeV2ArmModel(config)
        self.add_head()
        # By the class's name Transformers takes the loss for its own, which scores no first label: Trainer would then
        # leave the first ones out of num_items_in_batch.
        self.loss_type = None
        self.post_init()

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers for whole tokens; ValueError for S > 1, whose code table is fixed."""
        if self.code_table is not None:
            return super().resize_token_embeddings(*args, **kwargs)
        table = PreTrainedModel.resize_token_embeddings(self, *args, **kwargs)
        self.config.base = max(2, self.config.vocab_size)
        return table

    @property
    def code_table(self) -> PrimeV2CodeTable | None:
        """The table that splits input tokens into digits; None where they are whole (S = 1)."""
        return self.model.code_table

    def token_logits(self, hidden_states: Tensor) -> Tensor:
        """Hidden states (..., D) to logits (..., V) of the next token."""
        return apply_head(hidden_states, self.head())

    @property
    def loss_is_bound(self) -> bool:
        """True: the loss is -log p(x) per token itself."""
        return True

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache=None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        noise_keys: Tensor | None = None,
        noise_levels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        past_key_values=None,
        **kwargs,
    ) -> PrimeV2CausalLMOutput:
        """Logits of the next tokens, or, with labels, the training loss.

        input_ids (B, L); attention_mask (B, L) or with a cache (B, past + L), 0 for padding on any side. Without
            labels all arguments are Transformers' own, and logits at i are for the token at i + 1.
        cache: keys and values of earlier tokens; past_key_values is its older name in Transformers.
        labels (B, L): the clean ids, not shifted; -100 is given and not scored. Every other label is scored, the first
            token too: the network is fed the start token and then the text without its last token (`next_tokens`), so
            that L inputs predict L tokens. (Transformers' shift inside the loss predicts L - 1 of them and leaves the
            first one without a probability.) Padding is moved behind the text, so hidden states and attentions on
            request are those of the input thus made.
        noise_keys, noise_levels: of other families; nothing is drawn here.
        num_items_in_batch: scored tokens of the whole optimiser step, the loss's divisor; None counts this batch.
        Raises ValueError for ids out of range, over-long or empty input, rows of only padding, nothing to score.
        """
        kwargs = forward_keywords(self, kwargs)
        input_ids, attention_mask = token_inputs(self, input_ids, attention_mask)
        labels = as_tensor(self, "labels", labels)
        cache = one_cache(cache, past_key_values)
        if labels is None:
            refuse_lost_labels(num_items_in_batch)
            outputs = self.model(
                input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                cache=cache,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **kwargs,
            )
            logits = self.token_logits(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
            return PrimeV2CausalLMOutput(
                logits=logits,
                hidden_states=outputs.hidden_states,
                attentions=outputs.attentions,
                **{CACHE_NAME: outputs.get(CACHE_NAME)},
            )
        if input_ids is None or inputs_embeds is not None or cache is not None:
            raise ValueError("labels need input_ids, whole texts (B, L), without inputs_embeds or cache")
        loss, each, outputs = self._loss(input_ids, attention_mask, position_ids, labels, num_items_in_batch, **kwargs)
        return PrimeV2CausalLMOutput(
            loss,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            is_bound=self.loss_is_bound,
            loss_per_sequence=each,
        )

    def _loss(self, input_ids, attention_mask, position_ids, labels, num_items_in_batch, **kwargs):
        scored, ids = scored_tokens(input_ids, attention_mask, labels, self.config)
        check_length(ids, attention_mask, self.config)
        start, mask = start_token_id(self.config), None
        if attention_mask is not None:
            real = attention_mask.bool()
            order = real.int().argsort(dim=1, descending=True, stable=True)
            ids, scored = ids.masked_fill(~real, start).gather(1, order), scored.gather(1, order)
            if position_ids is not None:
                # With a mask, gaps between the positions are no borders of packed texts.
                position_ids, mask = position_ids.expand_as(order).gather(1, order), torch.ones_like(order)
        tokens = next_tokens(ids, scored, start)
        outputs = self.model(tokens.inputs, mask, position_ids, use_cache=False, **kwargs)
        hidden_states = outputs.last_hidden_state[tokens.rows, tokens.columns]  # (N, D)
        total, nats = token_nll(hidden_states, self.head(), tokens.ids, torch.ones_like(tokens.ids))
        per_sequence = nats.new_zeros(len(ids)).index_add_(0, tokens.rows, nats)  # not every accelerator has float64
        return total / divisor(num_items_in_batch, scored), per_sequence, outputs


# So that save_pretrained copies these files into the folder; config.auto_map names the class for both auto classes.
PrimeV2ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
