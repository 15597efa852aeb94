"""MDM-Prime-v2 network in Transformers: a bidirectional Llama over sub-tokens, and its masked diffusion loss."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .backbone_prime_v2 import PrimeV2Backbone
from .chunked_loss_prime_v2 import HiddenTokens, hidden_nll
from .code_table_prime_v2 import PrimeV2CodeTable, check_ids
from .configuration_prime_v2 import PrimeV2Config
from .diffusion_prime_v2 import STAGED, RevealOrder, draw_noise, is_bound
from .generation_config_prime_v2 import PrimeV2GenerationConfig
from .generation_prime_v2 import PrimeV2GenerationMixin
from .head_prime_v2 import PrimeV2HeadModel
from .likelihood_output_prime_v2 import PrimeV2LogLikelihood
from .likelihood_prime_v2 import PrimeV2Likelihood
from .likelihood_sampler_prime_v2 import sampler_log_likelihood
from .linear_prime_v2 import HeadCall
from .loss_prime_v2 import PrimeV2Output, divisor, refuse_lost_labels, refuse_noise, sum_by_row, training_batch
from .stage_head_prime_v2 import LateGradient, StageHead
from .tree_embedding_prime_v2 import PrimeV2HeadNodes, make_embedding
from .validation_inputs_prime_v2 import as_tensor, check_length, scoring_inputs, token_inputs
from .validation_keywords_prime_v2 import forward_keywords, one_of


class PrimeV2Model(PrimeV2Backbone):
    """The network up to the last norm: states (B, L, S), or token ids (B, L), to hidden states (B, L, D)."""

    config: PrimeV2Config
    config_class = PrimeV2Config

    def __init__(self, config: PrimeV2Config, code_table: PrimeV2CodeTable | None = None):
        """code_table: that of a model with a head, which holds it; by itself the network has one of its own."""
        super().__init__(config, make_embedding(config))
        if code_table is None:
            self.code_table = PrimeV2CodeTable(config)
        else:
            self.__dict__["code_table"] = code_table  # no module of this one: it is saved with the head
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_subtokens

    def set_input_embeddings(self, value: nn.Module):
        self.embed_subtokens = value

    def all_embeddings(self) -> Tensor:
        """The vectors of all tokens, (V, D)."""
        return self.embed_subtokens.forward(self.code_table.codes[:-1].unsqueeze(0)).squeeze(0)  # see all_vectors

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        subtoken_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        target_mask: Tensor | None = None,
        input_ids: Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutput:
        """subtoken_ids (B, L, S) int64 in [0, base], base = masked; attention_mask (B, L), 0 for padding.

        input_ids (B, L): token ids in place of states, V = all digits masked.
        target_mask (B, L) bool: only the hidden states of these tokens are returned, (M, D) by rows, then columns.
        """
        kwargs = forward_keywords(self, kwargs)
        check_one_input(input_ids, subtoken_ids)
        if subtoken_ids is None:
            subtoken_ids = self.code_table.encode(input_ids)
        check_states(subtoken_ids, attention_mask, self.config)
        hidden_states = self.embed_subtokens(subtoken_ids)
        if position_ids is None:
            position_ids = torch.arange(hidden_states.shape[1], device=hidden_states.device).unsqueeze(0)
        mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask
        )
        hidden_states = self.run_layers(hidden_states, position_ids, mask, target_mask=target_mask, **kwargs)
        return BaseModelOutput(last_hidden_state=hidden_states)


class PrimeV2ForMaskedDiffusion(PrimeV2HeadModel, PrimeV2GenerationMixin):
    """MDM-Prime-v2 with its head: logits, training loss, likelihood bounds and generation."""

    config: PrimeV2Config
    config_class = PrimeV2Config
    generation_config_class = PrimeV2GenerationConfig
    backbone_class = PrimeV2Model
    likelihood_class = PrimeV2Likelihood
    why_fixed = (
        "fixed by the code table, which gives each token its digits; build a tokenizer and a model with the "
        "vocabulary that you need (prime_v2.tokenization.build_tokenizer)"
    )

    def __init__(self, config: PrimeV2Config):
        super().__init__(config)
        table = PrimeV2CodeTable(config)
        self.model = PrimeV2Model(config, table)
        self.code_table = table
        self.add_head()
        self.head_nodes = PrimeV2HeadNodes(config) if config.head_ancestors else None
        self.post_init()

    def head(self, shared: Tensor | None = None) -> Tensor | HeadCall | StageHead:
        """As of all families; tied, it is the embedding of each token's code, of rank <= S b + 1."""
        if self.head_nodes is not None:
            shared = self.head_nodes(self.code_table.codes[:-1])
        return super().head(shared)

    def encode(self, ids: Tensor) -> Tensor:
        """Token ids (B, L) in [0, V], V = masked, to digits (B, L, S)."""
        return self.code_table.encode(ids)

    def decode(self, subtoken_ids: Tensor) -> Tensor:
        """Digits (B, L, S) to token ids (B, L); ValueError for a pattern that is no token."""
        return self.code_table.decode(subtoken_ids)

    @property
    def loss_is_bound(self) -> bool:
        """Whether the loss is an upper bound on -log p(x) per token, see `diffusion_prime_v2.is_bound`."""
        config, order = self.config, RevealOrder.of_training(self.config)
        return is_bound(config.objective, config.loss_weight, config.num_subtokens, order, config.whole_token_above)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        subtoken_ids: Tensor | None = None,
        labels: Tensor | None = None,
        noise_keys: Tensor | None = None,
        noise_levels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs,
    ) -> PrimeV2Output:
        """Logits of masked tokens, or, with labels, the training loss on noise drawn here.

        input_ids (B, L): token ids, V = all digits masked; or subtoken_ids (B, L, S): states, base = masked.
        labels (B, L): clean ids; -100 is neither masked nor scored. With labels, input_ids must hold the same ids (or
            the mask) where labels are scored.
        noise_keys (B,) int64 and noise_levels (B,) float64 in (0, 1) fix the noise (see `draw_noise`); None draws
            both from torch's generator, the levels stratified over the batch.
        num_items_in_batch: scored tokens of the whole optimiser step, the loss's divisor; None counts this batch.
        Raises ValueError for ids out of range, over-long or empty input, rows of only padding, nothing to score.
        """
        kwargs = forward_keywords(self, kwargs)
        input_ids, attention_mask = token_inputs(self, input_ids, attention_mask)
        labels, subtoken_ids = as_tensor(self, "labels", labels), as_tensor(self, "subtoken_ids", subtoken_ids, 3)
        check_one_input(input_ids, subtoken_ids)
        if labels is None:
            refuse_noise(noise_keys, noise_levels)
            refuse_lost_labels(num_items_in_batch)
            states = self.code_table.encode(input_ids) if subtoken_ids is None else subtoken_ids
            outputs = self.model(states, attention_mask, position_ids, **kwargs)
            logits = self.token_logits(outputs.last_hidden_state, states)
            return PrimeV2Output(None, None, logits, outputs.hidden_states, outputs.attentions)
        if input_ids is None:
            raise ValueError("labels need input_ids, clean token ids (B, L): the noise is drawn inside the model")
        loss, each, outputs = self._loss(
            input_ids, attention_mask, position_ids, labels, noise_keys, noise_levels, num_items_in_batch, **kwargs
        )
        return PrimeV2Output(loss, self.loss_is_bound, None, outputs.hidden_states, outputs.attentions, each)

    def token_logits(self, hidden_states: Tensor, states: Tensor) -> Tensor:  # type: ignore[override]
        """Hidden states (..., D) and the states (..., S) they came from to logits (..., V), at least float32."""
        logits = super().token_logits(hidden_states)
        if self.config.carry_over:
            logits = logits.masked_fill(~self.code_table.consistent(states), -torch.inf)
        return logits

    def _loss(
        self, input_ids, attention_mask, position_ids, labels, noise_keys, noise_levels, num_items_in_batch, **kwargs
    ):
        config, order = self.config, RevealOrder.of_training(self.config)
        batch = training_batch(config, input_ids, attention_mask, labels, noise_keys, noise_levels)
        ids, scored = batch.ids, batch.scored
        keys, levels = batch.noise_keys, batch.noise_levels
        noise = draw_noise(scored, order, keys, levels, config.noise_form, config.whole_token_above)
        states = torch.where(noise.visible, self.code_table.encode(ids), config.base)
        late = LateGradient.of(self.lm_head) if self.is_staged else None
        outputs = self.model(states, attention_mask, position_ids, **kwargs)
        weight = noise.weight_of(config.objective)
        weight = torch.ones_like(weight) if config.loss_weight == "low_variance" else weight
        total, nats = self.sequence_nll(outputs.last_hidden_state, ids, noise, order, config.objective, weight, late)
        return total / divisor(num_items_in_batch, scored), nats * weight, outputs

    def sequence_nll(self, hidden_states, ids, noise, order: RevealOrder, objective: str, weight: Tensor, late=None):
        """Weighted nats of the tokens that have a hidden unit, for "marginal" an eligible one (the others have none).

        Without carry-over the paper's loss has a term for each token, those with every digit visible included.

        hidden_states (B, L, D); ids (B, L) clean; weight (B,); late: a LateGradient of a head in stages. Returns the
        weighted sum, differentiable, and the
        unweighted nats of each sequence (B,), float64, detached. ValueError for another objective than "joint" and
        "marginal".
        """
        one_of(f"objective={objective!r}", objective, ("joint", "marginal"))
        eligible = noise.hidden_count
        if objective == "marginal" and noise.eligible_count is not None:
            eligible = noise.eligible_count
        target_mask = eligible > 0
        splits_tokens = self.config.num_subtokens > 1 and order.kind != "token"
        if objective == "joint" and splits_tokens and not self.config.carry_over:
            target_mask = noise.maskable
        rows, columns = target_mask.nonzero(as_tuple=True)
        kind, multiplicity, target_digits = "token", torch.ones_like(rows), None
        if noise.target_digits is not None:
            kind, target_digits = "prefix", noise.target_digits[rows, columns]
        elif objective == "marginal" and order.kind == "digit" and self.config.num_subtokens > 1:
            kind = "digits"
        elif objective == "marginal" and order.kind in STAGED:
            multiplicity = eligible[rows, columns]
            kind, target_digits = "prefix", order.next_visible(noise.hidden_count[rows, columns])
        tokens = HiddenTokens(
            ids[rows, columns], noise.visible[rows, columns], weight[rows] * multiplicity, target_digits
        )
        head: Any = self.head()
        if late is not None:
            head.late = late
        if self.is_staged and order.kind == "digit":  # which may be visible in any order
            head = HeadCall(head.call, head.vocab_size)
        # A token that is hidden whole has no visible digit, so the filter would exclude nothing.
        carry_over = self.config.carry_over and splits_tokens
        total, nats = hidden_nll(hidden_states[rows, columns], head, self.code_table, tokens, kind, carry_over)
        return total, sum_by_row(nats.double() * multiplicity, rows, len(ids))

    def log_likelihood(
        self, input_ids, attention_mask=None, prompt_mask=None, method=None, generation_config=None, **kwargs
    ) -> PrimeV2LogLikelihood:
        """As of every family; method "sampler" is the law of `generate` with `generation_config`.

        See `sampler_log_likelihood`.
        """
        if method == "sampler":
            ids, mask, prompt, options = scoring_inputs(
                self, sampler_log_likelihood, kwargs, input_ids, attention_mask, prompt_mask=prompt_mask
            )
            return sampler_log_likelihood(self, ids, mask, prompt, generation_config, **options)
        if generation_config is not None:
            given = "" if method is None else f", not {method!r}"
            raise ValueError(f"generation_config belongs to method='sampler'{given}; leave it out")
        return super().log_likelihood(input_ids, attention_mask, prompt_mask, method, **kwargs)


def check_states(subtoken_ids: Tensor, attention_mask: Tensor | None, config) -> None:
    """ValueError unless states (B, L, S) and their mask (B, L) can be fed to the network."""
    if torch.compiler.is_compiling():
        return
    if subtoken_ids.dim() != 3 or subtoken_ids.shape[-1] != config.num_subtokens:
        raise ValueError(
            f"the input has shape {tuple(subtoken_ids.shape)}, but states are (B, L, {config.num_subtokens}); "
            f"token ids are (B, L)"
        )
    check_length(subtoken_ids, attention_mask, config)
    check_ids(subtoken_ids, config.base + 1, f"digits, {config.base} for masked")


# So that save_pretrained copies these files into the folder; config.auto_map names the class for both auto classes.
PrimeV2ForMaskedDiffusion.register_for_auto_class("AutoModel")


def check_one_input(input_ids: Tensor | None, subtoken_ids: Tensor | None) -> None:
    """ValueError unless either token ids or states are given."""
    if (input_ids is None) == (subtoken_ids is None):
        raise ValueError("give exactly one of input_ids (B, L) and subtoken_ids (B, L, S)")
