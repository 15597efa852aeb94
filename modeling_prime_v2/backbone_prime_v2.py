"""The Transformer that all families share: Llama's, with attention to both sides, or only back (`config.causal`)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from .cache_name_prime_v2 import CACHE_NAME, one_cache
from .configuration_backbone_prime_v2 import PrimeV2BackboneConfig
from .kept_prime_v2 import PrimeV2RMSNorm, SwiGLU, made_again, normed
from .linear_prime_v2 import linear, plain_weight
from .validation_config_prime_v2 import readable_json
from .validation_weights_prime_v2 import check_codes, check_headers, refuse_pickles

NOT_SCORED = -100  # Transformers' label of a token that takes no part in the loss


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode (no dropout) inside the block, and in its former mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class PrimeV2MLP(nn.Module):
    """SwiGLU feed-forward network; of the wide activations, gate and up are kept, their product is made again."""

    def __init__(self, config: PrimeV2BackboneConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, hidden_states: Tensor, checkpointed: bool = False) -> Tensor:
        """(..., D) to (..., D); checkpointed: the layer keeps nothing anyway."""
        gate, up = linear(self.gate_proj, hidden_states), linear(self.up_proj, hidden_states)
        # The gradient of a plain layer's input is a new tensor; others may hand on one that they have from elsewhere.
        product = SwiGLU.apply(gate, up, plain_weight(self.down_proj) is not None)
        with made_again(product, lambda: nn.functional.silu(gate) * up, checkpointed):
            return linear(self.down_proj, product)


class PrimeV2SubtokenEmbedding(nn.Module):
    """Embeds states (B, L, S) into (B, L, D): "sum", "concat" or "concat_shared" of one vector a digit.

    A digit has `num_values` values: base + 1 where it can be masked (then the digit `base`), else base. Rows of the
    table are ordered `j * num_values + digit` ("concat_shared" has num_values rows in all).

    This module is a model's `get_input_embeddings()`: hooks on it (NEFTune, enable_input_require_grads) get embedded
    tokens. A tied head calls `forward` itself, see `linear_prime_v2.all_vectors`.
    """

    def __init__(self, config, num_values: int):
        super().__init__()
        self.form, self.num_values, self.num_subtokens = config.subtoken_embedding, num_values, config.num_subtokens
        positions = 1 if self.form == "concat_shared" else self.num_subtokens
        width = config.hidden_size if self.form == "sum" else config.hidden_size // self.num_subtokens
        bag = self.form == "sum" and self.num_subtokens > 1
        rows = positions * num_values
        self.table = nn.EmbeddingBag(rows, width, mode="sum") if bag else nn.Embedding(rows, width)

    @property
    def weight(self) -> Tensor:
        """The table's rows, of digits and not of tokens."""
        return self.table.weight

    def forward(self, subtoken_ids: Tensor) -> Tensor:
        rows = subtoken_ids
        if self.form != "concat_shared":
            rows = rows + self.num_values * torch.arange(self.num_subtokens, device=rows.device)
        if self.form == "sum" and self.num_subtokens > 1:
            return self.table(rows.flatten(0, -2)).unflatten(0, rows.shape[:-1])
        return self.table(rows).flatten(-2)


class PrimeV2Attention(nn.Module):
    """Attention with rotary positions, grouped queries and optional RMS-normalised queries and keys."""

    def __init__(self, config: PrimeV2BackboneConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = config.causal
        width, kv_width = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.attention_bias)
        self.q_norm = PrimeV2RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = PrimeV2RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self,
        hidden_states,
        position_embeddings=None,
        attention_mask=None,
        cache=None,
        past_key_values=None,
        **kwargs,
    ) -> tuple[Tensor, Tensor]:
        """The cache comes by the name that the installed Transformers looks for under activation checkpointing."""
        cache = one_cache(cache, past_key_values)
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_norm(linear(self.q_proj, hidden_states).view(shape)).transpose(1, 2)  # (B, heads, L, head_dim)
        key = self.k_norm(linear(self.k_proj, hidden_states).view(shape)).transpose(1, 2)
        value = linear(self.v_proj, hidden_states).view(shape).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.config.attention_dropout if self.training else 0.0
        output, weights = attention(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return linear(self.o_proj, output.reshape(*hidden_states.shape[:-1], -1)), weights


class PrimeV2Layer(GradientCheckpointingLayer):
    """Pre-norm Transformer block: attention, then SwiGLU."""

    def __init__(self, config: PrimeV2BackboneConfig, layer_idx: int):
        super().__init__()
        self.self_attn = PrimeV2Attention(config, layer_idx)
        self.mlp = PrimeV2MLP(config)
        self.input_layernorm = PrimeV2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = PrimeV2RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, *, target_mask: Tensor | None = None, **kwargs) -> Tensor:
        """(B, L, D) to (B, L, D), or to (M, D), the tokens of `target_mask` (B, L) bool."""
        checkpointed = self.gradient_checkpointing and self.training
        with normed(self.input_layernorm, hidden_states, checkpointed) as inputs:
            hidden_states = hidden_states + self.self_attn(inputs, **kwargs)[0]
        if target_mask is not None:
            hidden_states = hidden_states[target_mask]
        with normed(self.post_attention_layernorm, hidden_states, checkpointed) as inputs:
            return hidden_states + self.mlp(inputs, checkpointed)


class PrimeV2PreTrainedModel(PreTrainedModel):
    """Flags that the models of all families share."""

    config: PrimeV2BackboneConfig
    config_class = PrimeV2BackboneConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PrimeV2Layer"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": PrimeV2Layer, "attentions": PrimeV2Attention}
    backbone_class: Any = None  # of a model with a head

    @property
    def is_gradient_checkpointing(self) -> bool:
        """The former name of `is_activation_checkpointing`: peft 0.21 reads it, and Transformers' own warns of it."""
        return self.is_activation_checkpointing

    @classmethod
    def from_pretrained(cls, *args, use_safetensors: bool | None = None, **kwargs) -> Any:
        """As in Transformers, from safetensors only, and only what fits: see `validation_weights_prime_v2`.

        ignore_mismatched_sizes=True takes tensors that are missing or of another shape as freshly drawn ones.
        pipeline("feature-extraction") gets the model without its head, whose first output are hidden states.
        """
        if kwargs.get("_from_pipeline") == "feature-extraction" and cls.backbone_class is not None:
            return cls.backbone_class.from_pretrained(*args, use_safetensors=use_safetensors, **kwargs)
        place = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        with readable_json(place):
            loaded: Any = super().from_pretrained(*args, use_safetensors=refuse_pickles(use_safetensors), **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        table = getattr(model, "code_table", None)
        if table is not None:
            check_codes(table.codes, table.base)
        return loaded

    @classmethod
    def _load_pretrained_model(cls, model, state_dict, checkpoint_files, load_config, expected_keys=None) -> Any:
        """Called by `from_pretrained` with a model that takes no memory yet, and by `load_adapter` with expected_keys.

        ValueError for files whose tensors are not the model's, or lack some of the adapter's.
        """
        place, whole = str(load_config.pretrained_model_name_or_path), expected_keys is None
        if whole and checkpoint_files and load_config.hf_quantizer is None and not load_config.ignore_mismatched_sizes:
            check_headers(model, checkpoint_files, place)
        info, offloaded = super()._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, expected_keys
        )
        missing = [] if whole else sorted(set(expected_keys) & set(info.missing_keys))
        if missing:
            raise ValueError(
                f"the adapter of {place} lacks {len(missing)} of its {len(expected_keys)} tensors, the first being "
                f"{missing[0]}; save the adapter again"
            )
        return info, offloaded

    def get_submodule(self, target: str) -> nn.Module:
        """As in PyTorch; ValueError for the name by which peft's prompt learning, and nothing else, begins."""
        if target == "embeddings.word_embeddings":
            raise ValueError(
                "peft's prompt learning (prompt, prefix and P-tuning) puts vectors before a text, which neither the "
                "noise nor the likelihoods of this model know; train an adapter, e.g. LoraConfig(target_modules="
                "['q_proj', 'v_proj'])"
            )
        return super().get_submodule(target)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, nn.EmbeddingBag):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
        elif type(module).__name__ == "PrimeV2CodeTable":  # a sibling's class may be loaded twice
            init.copy_(module.codes, module.build())

    @property
    def device(self) -> torch.device:
        """Where inputs belong: the first parameter's device, or where an offloaded model is computed."""
        device = next(self.parameters()).device
        hooks = (getattr(each, "_hf_hook", None) for each in self.modules()) if device.type == "meta" else ()
        places = [each.execution_device for each in hooks if getattr(each, "execution_device", None) is not None]
        return torch.device(places[0]) if places else device


class PrimeV2Backbone(PrimeV2PreTrainedModel):
    """Layers and last norm: embedded tokens (B, L, D) to hidden states (B, L, D).

    A family adds its embedding; as `embed_subtokens` where it is given here, before the layers, which is the order in
    which weights are drawn.
    """

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\.", r"^head_nodes\."]  # in the folder of a model with a head
    layer_class: type[PrimeV2Layer] = PrimeV2Layer
    embed_subtokens: Any

    def __init__(self, config: PrimeV2BackboneConfig, embedding: nn.Module | None = None):
        super().__init__(config)
        if embedding is not None:
            self.embed_subtokens = embedding
        self.layers = nn.ModuleList([self.layer_class(config, i) for i in range(config.num_hidden_layers)])
        self.norm = PrimeV2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)  # type: ignore[arg-type]  # reads fields that both configs have

    def run_layers(
        self,
        hidden_states: Tensor,
        position_ids: Tensor,
        attention_mask,
        *inputs,
        target_mask=None,
        cache=None,
        **kwargs,
    ) -> Tensor:
        """Embedded tokens (B, L, D), their positions (B or 1, L) and a mask as the attention takes it.

        inputs: tensors that a family's layers take beside the hidden states, by position: activation checkpointing
        loses the gradients of what is passed by name. cache: keys and values of earlier tokens.
        target_mask (B, L) bool: the last layer computes the output of these tokens only.
        """
        kept = {} if cache is None else {CACHE_NAME: cache}
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        for number, layer in enumerate(self.layers, start=1):
            last = {} if target_mask is None or number < len(self.layers) else {"target_mask": target_mask}
            hidden_states = layer(
                hidden_states,
                *inputs,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                **last,
                **kept,
                **kwargs,
            )
        return self.norm(hidden_states)
