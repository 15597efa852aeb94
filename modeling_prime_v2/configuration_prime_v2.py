"""Configuration of an MDM-Prime-v2 network."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

from .code_table_prime_v2 import MAX_SHUFFLED_CODES, base_needed, digits_needed

MODEL_CLASS = "modeling_prime_v2.PrimeV2ForMaskedDiffusion"
CHOICES = {
    "shuffle_domain": ("codes", "vocab"),
    "subtoken_embedding": ("sum", "concat", "concat_shared"),
    "objective": ("token", "subtoken"),
    "loss_weight": ("elbo", "low_variance"),
    "noise_form": ("count", "time"),
    "reveal_order": ("digit", "token", "nested"),
}

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "num_subtokens",
)


@strict
class PrimeV2Config(PreTrainedConfig):
    """Shape, code table and objective of an MDM-Prime-v2 network (arXiv:2603.16077).

    Args:
        vocab_size: V, the number of tokens that can be predicted. The mask token has the id V.
        base: digits run over 0..base-1. None means 2, or the smallest base that fits when `num_subtokens` is given.
        num_subtokens: S, the digits of a token (the paper's l); None means ceil(log_base V). 1 is plain MDM.
        shuffle_seed, shuffle_ratio, shuffle_domain: the index shuffle, see `build_code_table`.
        carry_over: filter the tokens that contradict a visible digit out of the softmax.
        subtoken_embedding: "sum" of S tables of width D, "concat" of S tables of width D / S, or "concat_shared", one
            table of base + 1 rows of width D / S used for every digit.
        objective: "token", the paper's loss -log q(x_i) (no bound on the likelihood for S > 1), or "subtoken", the
            negative evidence lower bound of `reveal_order` from the marginals of the digits.
        loss_weight: "elbo" or "low_variance" (weight 1, no bound).
        noise_form: "count" (hide k of n units, k uniform) or "time" (hide each unit with probability t, t uniform).
        reveal_order: the unit that is hidden and revealed: each "digit" (published), the whole "token", or "nested",
            stages of leading digits that end at the counts in `stage_digits`, e.g. [6, 11].
        whole_token_above: hide whole tokens when the masked share exceeds this (the published 1.1B recipe uses 0.5).
        qk_norm: RMS-normalise queries and keys per head.
        rope_parameters: as in Transformers; None means the default type with theta 10,000.
        mask_token_id: always `vocab_size`.
        The other fields mean what they mean for Llama in Transformers.

    Raises `StrictDataclassClassValidationError` (a ValueError's text inside) for impossible combinations.
    """

    model_type = "prime_v2"
    keys_to_ignore_at_inference = ["is_bound"]  # Trainer gathers outputs over the processes, tensors alone

    vocab_size: int = 50257
    base: int | None = None
    num_subtokens: int | None = None
    shuffle_seed: int = 0
    shuffle_ratio: int | float = 1.0
    shuffle_domain: str = "codes"
    carry_over: bool = True
    subtoken_embedding: str = "sum"
    objective: str = "token"
    loss_weight: str = "elbo"
    noise_form: str = "count"
    reveal_order: str = "digit"
    stage_digits: list[int] | None = None
    whole_token_above: int | float | None = None
    hidden_size: int = 512
    intermediate_size: int | None = None
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    qk_norm: bool = False
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    attention_bias: bool = False
    attention_dropout: int | float = 0.0
    mlp_bias: bool = False
    rope_parameters: RopeParameters | dict | None = None
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    mask_token_id: int | None = None
    auto_map: dict[str, str] | None = None

    def __post_init__(self, **kwargs):
        if self.base is None:
            self.base = (
                2 if self.num_subtokens is None else base_needed(max(1, self.vocab_size), max(1, self.num_subtokens))
            )
        if self.num_subtokens is None:
            self.num_subtokens = digits_needed(self.vocab_size, max(2, self.base))
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.num_attention_heads > 0:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.mask_token_id is None:
            self.mask_token_id = self.vocab_size
        if self.auto_map is None:
            self.auto_map = {
                "AutoConfig": "configuration_prime_v2.PrimeV2Config",
                "AutoModel": MODEL_CLASS,
                "AutoModelForMaskedLM": MODEL_CLASS,
            }
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Part of `@strict` validation: refuse every impossible combination by name, value and a value that works."""
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(choices)}")
        self._validate_sizes()
        self._validate_codes()
        self._validate_objective()

    def _validate_sizes(self):
        for name in SIZES:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if self.hidden_size % heads and self.head_dim == self.hidden_size // heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={heads}; "
                f"use hidden_size={-(-self.hidden_size // heads) * heads}"
            )
        if heads % kv_heads:
            raise ValueError(
                f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}; "
                f"use num_key_value_heads={heads} or 1"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even for rotary positions; use {self.head_dim + 1}")
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(f"attention_dropout={self.attention_dropout} is outside [0, 1); use 0.0")
        if not self.rms_norm_eps > 0:
            raise ValueError(f"rms_norm_eps={self.rms_norm_eps} must be positive; use 1e-5")
        if not self.initializer_range > 0:
            raise ValueError(f"initializer_range={self.initializer_range} must be positive; use 0.02")

    def _validate_codes(self):
        if self.base < 2:
            raise ValueError(f"base={self.base} must be at least 2; use base=2")
        digits = self.num_subtokens
        if self.vocab_size > self.base**digits:
            raise ValueError(
                f"vocab_size={self.vocab_size} does not fit in num_subtokens={digits} digits of base {self.base} "
                f"({self.base**digits} codes); use num_subtokens={digits_needed(self.vocab_size, self.base)}, "
                f"or base={base_needed(self.vocab_size, digits)}"
            )
        if digits * (self.base + 1).bit_length() > 62:
            raise ValueError(
                f"num_subtokens={digits} digits of base {self.base} do not pack into 62 bits; "
                f"use num_subtokens={digits_needed(self.vocab_size, self.base)}"
            )
        if not 0 <= self.shuffle_ratio <= 1:
            raise ValueError(f"shuffle_ratio={self.shuffle_ratio} is outside [0, 1]; use 1.0 to shuffle everything")
        if self.shuffle_domain == "codes" and self.shuffle_ratio * self.base**digits > MAX_SHUFFLED_CODES:
            raise ValueError(
                f"shuffle_domain='codes' would permute {self.base**digits} codes, more than {MAX_SHUFFLED_CODES}; "
                f"use num_subtokens={digits_needed(self.vocab_size, self.base)} or shuffle_domain='vocab'"
            )
        if self.subtoken_embedding != "sum" and self.hidden_size % digits:
            raise ValueError(
                f"subtoken_embedding={self.subtoken_embedding!r} needs hidden_size={self.hidden_size} to be a "
                f"multiple of num_subtokens={digits}; "
                f"use hidden_size={-(-self.hidden_size // digits) * digits} or 'sum'"
            )
        if self.mask_token_id != self.vocab_size:
            raise ValueError(
                f"mask_token_id={self.mask_token_id} must be vocab_size={self.vocab_size}, the first id outside the "
                f"vocabulary; leave it out"
            )

    def _validate_objective(self):
        if (self.reveal_order == "nested") != (self.stage_digits is not None):
            raise ValueError(
                f"reveal_order={self.reveal_order!r} with stage_digits={self.stage_digits}: 'nested' needs the digit "
                f"counts at which its stages end, the others take none; use e.g. reveal_order='nested' and "
                f"stage_digits=[{(self.num_subtokens + 1) // 2}, {self.num_subtokens}]"
            )
        if self.stage_digits is not None:
            stages = [0, *self.stage_digits]
            rising = all(a < b for a, b in zip(stages, stages[1:], strict=False))
            if not rising or stages[-1] != self.num_subtokens:
                raise ValueError(
                    f"stage_digits={self.stage_digits} must rise from at least 1 to num_subtokens="
                    f"{self.num_subtokens}; use e.g. [{self.num_subtokens}]"
                )
        if self.whole_token_above is not None:
            if not 0 <= self.whole_token_above <= 1:
                raise ValueError(f"whole_token_above={self.whole_token_above} is outside [0, 1]; use 0.5 or None")
            if self.reveal_order != "digit":
                raise ValueError(
                    f"whole_token_above={self.whole_token_above} needs reveal_order='digit', "
                    f"not {self.reveal_order!r}; leave it out"
                )

    def validate_token_ids(self):
        """Warn as Transformers does, except for the mask id, which is V here by design."""
        mask_token_id = self.__dict__.pop("mask_token_id", None)
        try:
            super().validate_token_ids()
        finally:
            self.__dict__["mask_token_id"] = mask_token_id


# So that save_pretrained copies this file and those it imports into the folder.
PrimeV2Config.register_for_auto_class()

__all__ = ["PrimeV2Config"]
