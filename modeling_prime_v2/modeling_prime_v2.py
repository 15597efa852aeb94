"""MDM-Prime-v2 network in Transformers: a bidirectional Llama over sub-tokens, and its masked diffusion loss."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .code_table_prime_v2 import PrimeV2CodeTable, check_ids
from .configuration_prime_v2 import PrimeV2Config
from .diffusion_prime_v2 import RevealOrder, draw_noise, is_bound, stratified_levels
from .generation_prime_v2 import PrimeV2GenerationConfig, PrimeV2GenerationMixin
from .head_prime_v2 import HiddenTokens, hidden_nats
from .likelihood_prime_v2 import PrimeV2LogLikelihood, log_likelihood

NOT_SCORED = -100  # Transformers' label of a token that takes no part in the loss


@dataclass
class PrimeV2Output(ModelOutput):
    """Output of `PrimeV2ForMaskedDiffusion`.

    loss: scalar, nats per scored token over the noise drawn; None without labels.
    is_bound: whether the loss is an upper bound on -log p(x) per token in expectation over the noise.
    logits: (B, L, V) float, filtered by the visible digits (carry-over); None when labels are given.
    hidden_states, attentions: as in Transformers, on request.
    """

    loss: Tensor | None = None
    is_bound: bool | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class PrimeV2RMSNorm(nn.RMSNorm):
    """RMSNorm, PyTorch's own kernel: it keeps its input for the backward pass and nothing else."""


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, keeping the two inputs and nothing else for the backward pass."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return nn.functional.silu(gate) * up

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_up = grad * nn.functional.silu(gate)
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return grad_gate, grad_up


class PrimeV2MLP(nn.Module):
    """SwiGLU feed-forward network."""

    def __init__(self, config: PrimeV2Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(SwiGLU.apply(self.gate_proj(hidden_states), self.up_proj(hidden_states)))


class PrimeV2SubtokenEmbedding(nn.Module):
    """Embeds states (B, L, S) into (B, L, D): "sum", "concat" or "concat_shared" of one vector a digit.

    Rows of the table are ordered `j * (base + 1) + digit`, the masked digit being `base` ("concat_shared" has base + 1
    rows in all).
    """

    def __init__(self, config: PrimeV2Config):
        super().__init__()
        self.form, self.base, self.num_subtokens = config.subtoken_embedding, config.base, config.num_subtokens
        positions = 1 if self.form == "concat_shared" else self.num_subtokens
        width = config.hidden_size if self.form == "sum" else config.hidden_size // self.num_subtokens
        self.table = nn.Embedding(positions * (self.base + 1), width)

    def forward(self, subtoken_ids: Tensor) -> Tensor:
        rows = subtoken_ids
        if self.form != "concat_shared":
            rows = rows + (self.base + 1) * torch.arange(self.num_subtokens, device=rows.device)
        if self.form == "sum":
            flat = nn.functional.embedding_bag(rows.flatten(0, -2), self.table.weight, mode="sum")
            return flat.unflatten(0, rows.shape[:-1])
        return self.table(rows).flatten(-2)


class PrimeV2Attention(nn.Module):
    """Bidirectional attention with rotary positions, grouped queries and optional RMS-normalised queries and keys."""

    def __init__(self, config: PrimeV2Config, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        width, kv_width = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.attention_bias)
        self.q_norm = PrimeV2RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = PrimeV2RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs) -> tuple[Tensor, Tensor]:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(shape)).transpose(1, 2)  # (B, heads, L, head_dim)
        key = self.k_norm(self.k_proj(hidden_states).view(shape)).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.config.attention_dropout if self.training else 0.0
        output, weights = attention(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights


class PrimeV2Layer(GradientCheckpointingLayer):
    """Pre-norm Transformer block: attention, then SwiGLU."""

    def __init__(self, config: PrimeV2Config, layer_idx: int):
        super().__init__()
        self.self_attn = PrimeV2Attention(config, layer_idx)
        self.mlp = PrimeV2MLP(config)
        self.input_layernorm = PrimeV2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = PrimeV2RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0]
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class PrimeV2PreTrainedModel(PreTrainedModel):
    """Flags and initialisation that all PrimeV2 models share."""

    config: PrimeV2Config
    config_class = PrimeV2Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PrimeV2Layer"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": PrimeV2Layer, "attentions": PrimeV2Attention}

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, PrimeV2CodeTable):
            init.copy_(module.codes, module.build())

    def resize_token_embeddings(self, *args, **kwargs):
        raise ValueError(
            f"vocab_size={self.config.vocab_size} is fixed by the code table, which gives each token its digits; "
            f"build a tokenizer and a model with the vocabulary that you need (prime_v2.tokenization.build_tokenizer)"
        )


class PrimeV2Model(PrimeV2PreTrainedModel):
    """The network up to the last norm: states (B, L, S) to hidden states (B, L, D)."""

    def __init__(self, config: PrimeV2Config):
        super().__init__(config)
        self.embed_subtokens = PrimeV2SubtokenEmbedding(config)
        self.layers = nn.ModuleList([PrimeV2Layer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = PrimeV2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)  # type: ignore[arg-type]  # reads fields that both configs have
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_subtokens.table

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        subtoken_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutput:
        """subtoken_ids (B, L, S) int64 in [0, base], base = masked; attention_mask (B, L), 0 for padding."""
        check_states(subtoken_ids, attention_mask, self.config)
        hidden_states = self.embed_subtokens(subtoken_ids)
        if position_ids is None:
            position_ids = torch.arange(hidden_states.shape[1], device=hidden_states.device).unsqueeze(0)
        mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask
        )
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states, position_embeddings=position_embeddings, attention_mask=mask, **kwargs
            )
        return BaseModelOutput(last_hidden_state=self.norm(hidden_states))


class PrimeV2ForMaskedDiffusion(PrimeV2PreTrainedModel, PrimeV2GenerationMixin):
    """MDM-Prime-v2 with its head: logits, training loss, likelihood bounds and generation."""

    generation_config_class = PrimeV2GenerationConfig

    def __init__(self, config: PrimeV2Config):
        super().__init__(config)
        self.model = PrimeV2Model(config)
        self.code_table = PrimeV2CodeTable(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module | None:
        return getattr(self, "lm_head", None)

    def head_weight(self) -> Tensor:
        """The head (V, D); tied, it is the embedding of each token's code, so its rank is at most S b + 1."""
        if self.config.tie_word_embeddings:
            return self.model.embed_subtokens(self.code_table.codes[:-1].unsqueeze(0)).squeeze(0)
        return self.lm_head.weight

    def encode(self, ids: Tensor) -> Tensor:
        """Token ids (B, L) in [0, V], V = masked, to digits (B, L, S)."""
        return self.code_table.encode(ids)

    def decode(self, subtoken_ids: Tensor) -> Tensor:
        """Digits (B, L, S) to token ids (B, L); ValueError for a pattern that is no token."""
        return self.code_table.decode(subtoken_ids)

    @property
    def loss_is_bound(self) -> bool:
        """Whether the loss is an upper bound on -log p(x) per token, see `diffusion_prime_v2.is_bound`."""
        config, order = self.config, RevealOrder.from_config(self.config)
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
        Raises ValueError for ids out of range, over-long or empty input, rows of padding alone, nothing to score.
        """
        if (input_ids is None) == (subtoken_ids is None):
            raise ValueError("give exactly one of input_ids (B, L) and subtoken_ids (B, L, S)")
        if labels is None:
            states = self.code_table.encode(input_ids) if subtoken_ids is None else subtoken_ids
            outputs = self.model(states, attention_mask, position_ids, **kwargs)
            logits = self.filtered_logits(outputs.last_hidden_state, states)
            return PrimeV2Output(None, None, logits, outputs.hidden_states, outputs.attentions)
        if input_ids is None:
            raise ValueError("labels need input_ids, clean token ids (B, L): the noise is drawn inside the model")
        loss, outputs = self._loss(
            input_ids, attention_mask, position_ids, labels, noise_keys, noise_levels, num_items_in_batch, **kwargs
        )
        return PrimeV2Output(loss, self.loss_is_bound, None, outputs.hidden_states, outputs.attentions)

    def filtered_logits(self, hidden_states: Tensor, states: Tensor) -> Tensor:
        """Hidden states (..., D) and the states (..., S) they came from to logits (..., V), at least float32."""
        logits = nn.functional.linear(hidden_states, self.head_weight())
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.config.carry_over:
            logits = logits.masked_fill(~self.code_table.consistent(states), -torch.inf)
        return logits

    def _loss(
        self, input_ids, attention_mask, position_ids, labels, noise_keys, noise_levels, num_items_in_batch, **kwargs
    ):
        config, order = self.config, RevealOrder.from_config(self.config)
        check_shapes(input_ids, attention_mask, labels)
        scored = labels != NOT_SCORED
        if attention_mask is not None:
            scored = scored & attention_mask.bool()
        ids = torch.where(scored, labels, input_ids)
        check_labels(input_ids, ids, scored, config)
        if noise_keys is None:
            noise_keys = torch.randint(2**62, (len(ids),)).to(ids.device)
        if noise_levels is None:
            seed = int(torch.randint(2**62, ()))
            noise_levels = stratified_levels(torch.arange(len(ids), device=ids.device), len(ids), seed)
        noise = draw_noise(scored, order, noise_keys, noise_levels, config.noise_form, config.whole_token_above)
        digits = self.code_table.encode(ids)
        states = torch.where(noise.visible, digits, config.base)
        outputs = self.model(states, attention_mask, position_ids, **kwargs)
        weight = torch.ones_like(noise.weight) if config.loss_weight == "low_variance" else noise.weight
        total, _ = self.nats_of_hidden(outputs.last_hidden_state, ids, noise, order, config.objective, weight)
        if num_items_in_batch is None:
            num_items_in_batch = scored.sum()
        return total / num_items_in_batch, outputs

    def nats_of_hidden(self, hidden_states, ids, noise, order: RevealOrder, objective: str, weight: Tensor):
        """Weighted nats of the tokens that have a hidden unit (the others have none).

        Without carry-over the paper's loss has a term for each token, those with every digit visible included.

        hidden_states (B, L, D); ids (B, L) clean; weight (B,). Returns the weighted sum, differentiable, and the
        unweighted nats of each sequence (B,), float64, detached.
        """
        asked = noise.hidden_count > 0
        splits_tokens = self.config.num_subtokens > 1 and order.kind != "token"
        if objective == "token" and splits_tokens and not self.config.carry_over:
            asked = noise.maskable
        rows, columns = asked.nonzero(as_tuple=True)
        kind, multiplicity, goal = "token", torch.ones_like(rows), None
        if noise.goal is not None:
            kind, goal = "prefix", noise.goal[rows, columns]
        elif objective == "subtoken" and order.kind == "digit" and self.config.num_subtokens > 1:
            kind = "digits"
        elif objective == "subtoken" and order.kind == "nested":
            multiplicity = noise.hidden_count[rows, columns]
            kind, goal = "prefix", order.next_visible(multiplicity)
        tokens = HiddenTokens(ids[rows, columns], noise.visible[rows, columns], weight[rows] * multiplicity, goal)
        total, nats = hidden_nats(
            hidden_states[rows, columns], self.head_weight(), self.code_table, tokens, kind, self.config.carry_over
        )
        per_sequence = torch.zeros(len(ids), dtype=torch.double, device=ids.device)
        return total, per_sequence.index_add_(0, rows, nats.double() * multiplicity)

    def log_likelihood(self, input_ids, attention_mask=None, prompt_mask=None, method="subtoken", **kwargs):
        """Log-likelihood of each sequence, or its lower bound, in nats: see `likelihood_prime_v2.log_likelihood`."""
        return log_likelihood(self, input_ids, attention_mask, prompt_mask, method, **kwargs)


def check_states(subtoken_ids: Tensor, attention_mask: Tensor | None, config) -> None:
    """ValueError unless states (B, L, S) and their mask (B, L) can be fed to the network."""
    if torch.compiler.is_compiling():
        return
    if subtoken_ids.dim() != 3 or subtoken_ids.shape[-1] != config.num_subtokens:
        raise ValueError(
            f"the input has shape {tuple(subtoken_ids.shape)}, but states are (B, L, {config.num_subtokens}); "
            f"token ids are (B, L)"
        )
    batch, length = subtoken_ids.shape[:2]
    if batch == 0 or length == 0:
        raise ValueError(f"the batch has {batch} rows of {length} tokens; give at least one row of one token")
    if length > config.max_position_embeddings:
        raise ValueError(
            f"the input has {length} tokens, but max_position_embeddings={config.max_position_embeddings}; "
            f"cut it to {config.max_position_embeddings} tokens"
        )
    check_ids(subtoken_ids, config.base + 1, f"digits, {config.base} for masked")
    if attention_mask is not None and attention_mask.dim() == 2:
        if attention_mask.shape != (batch, length):
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, but the input has {(batch, length)}"
            )
        empty = (attention_mask != 0).sum(1) == 0
        if empty.any():
            raise ValueError(f"row {int(empty.nonzero()[0])} of attention_mask is padding alone; drop that row")


def check_shapes(input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor) -> None:
    """ValueError unless ids, mask and labels are (B, L) alike, with at least one row of one token."""
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; give (B, L) with at least one token")
    for name, tensor in (("labels", labels), ("attention_mask", attention_mask)):
        if tensor is not None and tensor.shape != input_ids.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but input_ids {tuple(input_ids.shape)}")


def check_labels(input_ids: Tensor, ids: Tensor, scored: Tensor, config) -> None:
    """ValueError unless the batch has a scored token, with labels equal to the input where it is not masked."""
    if torch.compiler.is_compiling():
        return
    if not scored.any():
        raise ValueError("no label to score: every one is -100 or padding; give clean token ids where to score")
    check_ids(ids[scored], config.vocab_size, "labels are predictable tokens")
    changed = scored & (ids != input_ids) & (input_ids != config.mask_token_id)
    if changed.any():
        row, column = (int(each) for each in changed.nonzero()[0])
        raise ValueError(
            f"labels[{row}, {column}]={int(ids[row, column])} differs from input_ids={int(input_ids[row, column])}; "
            f"labels are the clean input ids, not shifted, with -100 where nothing is scored"
        )


# So that save_pretrained copies these files into the folder; config.auto_map names the class for both auto classes.
PrimeV2ForMaskedDiffusion.register_for_auto_class("AutoModel")

__all__ = [
    "PrimeV2ForMaskedDiffusion",
    "PrimeV2LogLikelihood",
    "PrimeV2Model",
    "PrimeV2Output",
    "PrimeV2PreTrainedModel",
]
