"""What the configurations of all families share: the shape of the network (`backbone_prime_v2`)."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

from .code_table_prime_v2 import MAX_SHUFFLED_CODES, base_needed, digits_needed

CODE_CHOICES = {
    "shuffle_domain": ("codes", "vocab"),
    "code_source": ("shuffle", "data"),
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
)


@strict
class PrimeV2BackboneConfig(PreTrainedConfig):
    """Shape of a Llama-like Transformer: the base of each family's configuration.

    Args:
        vocab_size: V, the number of tokens that can be predicted.
        qk_norm: RMS-normalise queries and keys per head.
        rope_parameters: as in Transformers; None means the default type with theta 10,000.
        The other fields mean what they mean for Llama in Transformers.

    Raises `StrictDataclassClassValidationError` (a ValueError's text inside) for impossible combinations.
    """

    causal: ClassVar[bool] = False  # whether attention looks back alone
    keys_to_ignore_at_inference = ["is_bound"]  # Trainer gathers outputs over the processes, tensors alone

    vocab_size: int = 50257
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
    auto_map: dict[str, str] | None = None

    def __post_init__(self, **kwargs):
        # A field of the families that have it; here mypy cannot see one.
        if self._has_mask_token() and self.mask_token_id is None:  # type: ignore[has-type]
            self.mask_token_id = self.vocab_size
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.num_attention_heads > 0:
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)

    def _has_mask_token(self) -> bool:
        """Whether this family declares mask_token_id, which is then V."""
        return "mask_token_id" in self.__dataclass_fields__

    def _check_mask_token(self):
        if self._has_mask_token() and self.mask_token_id != self.vocab_size:
            raise ValueError(
                f"mask_token_id={self.mask_token_id} must be vocab_size={self.vocab_size}, the first id outside the "
                f"vocabulary; leave it out"
            )

    def validate_token_ids(self):
        """Warn as Transformers does, except for the mask id, which is V here by design."""
        mask_token_id = self.__dict__.pop("mask_token_id", None)
        try:
            super().validate_token_ids()
        finally:
            if self._has_mask_token():
                self.__dict__["mask_token_id"] = mask_token_id

    def validate_architecture(self):
        """Part of `@strict` validation: refuse every impossible combination by name, value and a value that works."""
        self._check_sizes()
        self._check_mask_token()

    def _check_sizes(self):
        """Sizes that no network can have."""
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


@strict
class PrimeV2CodedConfig(PrimeV2BackboneConfig):
    """Shape of the network, and the code table that splits a token into S digits (`build_code_table`).

    Args:
        base: digits run over 0..base-1. None means 2, or the smallest base that fits when `num_subtokens` is given.
        num_subtokens: S, the digits of a token (the paper's l); None means ceil(log_base V). 1 leaves tokens whole.
        code_source: "shuffle", the table of `build_code_table`; or "data", a table that comes with the weights, made
            from text (`prime_v2.tokenization.codes`). A fresh model then holds the unshuffled table until
            `code_table.set_codes` is called.
        shuffle_seed, shuffle_ratio, shuffle_domain: the index shuffle, see `build_code_table`.
        subtoken_embedding: "sum" of S tables of width D, "concat" of S tables of width D / S, or "concat_shared", one
            table of width D / S used for every digit.
        The other fields are those of `PrimeV2BackboneConfig`.
    """

    embeddings: ClassVar[tuple[str, ...]] = ("sum", "concat", "concat_shared")  # values of subtoken_embedding

    base: int | None = None
    num_subtokens: int | None = None
    code_source: str = "shuffle"
    shuffle_seed: int = 0
    shuffle_ratio: int | float = 1.0
    shuffle_domain: str = "codes"
    subtoken_embedding: str = "sum"

    def __post_init__(self, **kwargs):
        if self.base is None:
            self.base = (
                2 if self.num_subtokens is None else base_needed(max(1, self.vocab_size), max(1, self.num_subtokens))
            )
        if self.num_subtokens is None:
            self.num_subtokens = digits_needed(self.vocab_size, max(2, self.base))
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Part of `@strict` validation, see `PrimeV2BackboneConfig`; also codes that do not exist."""
        self._check_sizes()
        self._check_codes()
        self._check_mask_token()

    def _check_codes(self):
        for name, choices in {**CODE_CHOICES, "subtoken_embedding": self.embeddings}.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(choices)}")
        if self.num_subtokens < 1:
            raise ValueError(f"num_subtokens={self.num_subtokens} must be at least 1")
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
        if self.subtoken_embedding.startswith("concat") and self.hidden_size % digits:
            raise ValueError(
                f"subtoken_embedding={self.subtoken_embedding!r} needs hidden_size={self.hidden_size} to be a "
                f"multiple of num_subtokens={digits}; "
                f"use hidden_size={-(-self.hidden_size // digits) * digits} or 'sum'"
            )


__all__ = ["PrimeV2BackboneConfig", "PrimeV2CodedConfig"]
