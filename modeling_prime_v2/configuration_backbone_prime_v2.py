"""What the configurations of all families share: the shape of the network (`backbone_prime_v2`)."""

import math
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters

from .code_table_prime_v2 import MAX_DIGITS, MAX_SHUFFLED_CODES, base_needed, digits_needed, num_nodes
from .validation_config_prime_v2 import (
    VERSION,
    VERSION_FIELD,
    is_known,
    read_mapping,
    refuse_foreign_code,
    refuse_misspelt,
    refuse_unknown_fields,
)

CODE_CHOICES = {
    "shuffle_domain": ("codes", "vocab"),
    "code_source": ("shuffle", "data"),
    "head": ("full", "stages"),
}
MAX_STATES = 2**24  # nodes of the code tree that have vectors
# Sizes with the most that is taken: far more than any language model has, and little enough that a network of a
# damaged configuration is refused before anything is made for it.
MAX_VOCABULARY = 2**24
SIZES = {
    "vocab_size": MAX_VOCABULARY,
    "hidden_size": 2**18,
    "intermediate_size": 2**21,
    "num_hidden_layers": 2**12,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "head_dim": 2**14,
    "max_position_embeddings": 2**28,
}
MAX_WEIGHTS = 2**42


@strict
class PrimeV2BackboneConfig(PreTrainedConfig):
    """Shape of a Llama-like Transformer: the base of each family's configuration.

    Args:
        vocab_size: V, the number of tokens that can be predicted.
        qk_norm: RMS-normalise queries and keys per head.
        rope_parameters: as in Transformers; None means the default type with theta 10,000.
        The other fields mean what they mean for Llama in Transformers.

    The version of this package that made a configuration is recorded as `prime_v2_version`.
    Raises `StrictDataclassClassValidationError` (a ValueError's text inside) for impossible combinations, ValueError
    for fields that there are not.
    """

    causal: ClassVar[bool] = False  # whether attention looks only back
    keys_to_ignore_at_inference = ["is_bound"]  # Trainer gathers outputs over the processes: tensors only

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

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers; ValueError where pipeline("text-generation") would look for a causal model.

        The pipeline's task is passed on to the model's `from_pretrained`, which reads it; Transformers loses it here.
        """
        task = kwargs.get("_from_pipeline")
        if task == "text-generation" and not cls.causal:
            raise ValueError(
                "pipeline('text-generation') loads causal models, and this is a diffusion model; use "
                "AutoModel.from_pretrained(DIR, trust_remote_code=True).generate(...)"
            )
        loaded: Any = super().from_pretrained(*args, **kwargs)
        if task is not None and isinstance(loaded, tuple):  # (config, keywords left for the model)
            loaded[1]["_from_pipeline"] = task
        return loaded

    def __post_init__(self, **kwargs):
        refuse_unknown_fields(type(self), kwargs)
        kwargs[VERSION_FIELD] = VERSION
        if kwargs.get("num_labels", 0) is None:  # Transformers counts it
            del kwargs["num_labels"]
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

    def __setattr__(self, name: str, value: Any) -> None:
        """As always, but ValueError for a field's name misspelt."""
        if name not in self.__dict__:
            refuse_misspelt(type(self), [name])
        super().__setattr__(name, value)

    def to_diff_dict(self) -> dict[str, Any]:
        """What config.json holds: no attributes that others have set (pretraining_tp, ...)."""
        return {name: value for name, value in super().to_diff_dict().items() if is_known(type(self), name)}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> Any:
        """As in Transformers, of what config.json may hold, and with checked arguments and none misspelt."""
        refuse_foreign_code(config_dict)
        wants_unused = kwargs.pop("return_unused_kwargs", False)
        config, unused = super().from_dict(config_dict, return_unused_kwargs=True, **kwargs)
        if "use_cache" in unused:  # what training scripts set on every model, and only the ARM declares
            config.use_cache = unused.pop("use_cache")
        config.validate()
        if wants_unused:
            return config, unused
        refuse_misspelt(cls, unused)
        return config

    @classmethod
    def _dict_from_json_file(cls, json_file: Any) -> dict[str, Any]:
        return read_mapping(Path(json_file))

    @classmethod
    def from_json_file(cls, json_file: Any) -> Any:
        """As in Transformers, of what config.json may hold."""
        return cls.from_dict(cls._dict_from_json_file(json_file))

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

    def validate_rope(self):
        """Part of `@strict` validation: as in Transformers, whose warnings of wrong values are refusals here."""
        given: Any = self.rope_parameters or {}
        kinds = ("default", *ROPE_INIT_FUNCTIONS)
        if given.get("rope_type", "default") not in kinds:
            raise ValueError(f"rope_parameters has rope_type={given['rope_type']!r}, not one of {', '.join(kinds)}")
        for name, value in given.items():
            if name in ("rope_type", "type", "truncate") or value is None and name not in ("rope_theta", "factor"):
                continue
            is_list, pairs = name in ("short_factor", "long_factor"), self.head_dim // 2
            if is_list and (not isinstance(value, list) or len(value) != pairs):
                raise ValueError(
                    f"rope_parameters has {name}={value!r}, but it is a list of {pairs} numbers, one for each pair of "
                    f"a head's dimensions"
                )
            least = 1 if name == "factor" else 0
            numbers = value if is_list else [value]
            if not all(_is_number(each) and least <= each < math.inf and each > 0 for each in numbers):
                raise ValueError(
                    f"rope_parameters has {name}={value!r}, but it is a positive number"
                    f"{' of at least 1' if least else ''}; leave it out, or use e.g. rope_theta=10000.0"
                )
        if given.get("partial_rotary_factor") not in (None, 1):
            raise ValueError(
                f"rope_parameters has partial_rotary_factor={given['partial_rotary_factor']}, but whole heads are "
                f"rotated; leave it out"
            )
        if given.get("rope_type") == "dynamic" and self.head_dim <= 2:
            raise ValueError(
                f"rope_parameters has rope_type='dynamic', which needs a head of more than head_dim={self.head_dim}; "
                f"use head_dim=4, or rope_type='linear'"
            )
        try:
            super().validate_rope()
        except KeyError as error:
            raise ValueError(f"{error.args[0]}; leave rope_parameters out for the default") from None

    def _check_sizes(self):
        """Sizes that no network can have."""
        for name, most in SIZES.items():
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
            if getattr(self, name) > most:
                raise ValueError(f"{name}={getattr(self, name)} is more than {most}, the most that is supported")
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
        if not 0 < self.rms_norm_eps < math.inf:
            raise ValueError(f"rms_norm_eps={self.rms_norm_eps} must be positive and finite; use 1e-5")
        if not 0 < self.initializer_range < math.inf:
            raise ValueError(f"initializer_range={self.initializer_range} must be positive and finite; use 0.02")
        width = self.head_dim * (2 * heads + 2 * kv_heads) + 3 * self.intermediate_size
        weights = self.hidden_size * (self.num_hidden_layers * width + self.vocab_size)
        if weights > MAX_WEIGHTS:
            raise ValueError(
                f"hidden_size={self.hidden_size}, num_hidden_layers={self.num_hidden_layers}, intermediate_size="
                f"{self.intermediate_size} and vocab_size={self.vocab_size} make {weights:.1e} weights, more than "
                f"{MAX_WEIGHTS:.1e}, the most that is supported"
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


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
            table of width D / S used for every digit; or "ancestors", a vector for each node of the code tree at
            `tree_levels`, and of a token the sum of those from the root to it.
        tree_levels: digit counts, rising to S, at which "ancestors" has vectors; None is the ends of the reveal
            order's stages, by default only S: whole tokens.
        head: "full", a softmax over all tokens; or "stages", one over the next digits for each stage of leading
            digits (`stage_head_prime_v2`), of which a hidden token takes the children of its visible node.
        head_digits: digit counts, rising to S, at which the head's stages end; None is the ends of the reveal
            order's stages, by default half of the digits, then all.
        The other fields are those of `PrimeV2BackboneConfig`.
    """

    embeddings: ClassVar[tuple[str, ...]] = ("sum", "concat", "concat_shared", "ancestors")  # of subtoken_embedding

    base: int | None = None
    num_subtokens: int | None = None
    code_source: str = "shuffle"
    shuffle_seed: int = 0
    shuffle_ratio: int | float = 1.0
    shuffle_domain: str = "codes"
    subtoken_embedding: str = "sum"
    tree_levels: list[int] | None = None
    head: str = "full"
    head_digits: list[int] | None = None

    def __post_init__(self, **kwargs):
        vocab_size = min(max(1, self.vocab_size), MAX_VOCABULARY)  # what is outside is refused below
        if self.base is None:
            digits = self.num_subtokens
            self.base = 2 if digits is None else base_needed(vocab_size, min(max(1, digits), MAX_DIGITS))
        if self.num_subtokens is None:
            self.num_subtokens = digits_needed(vocab_size, max(2, self.base))
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Part of `@strict` validation, see `PrimeV2BackboneConfig`; also codes that do not exist."""
        self._check_sizes()
        self._check_codes()
        self._check_mask_token()

    @property
    def order_ends(self) -> tuple[int, ...]:
        """Digit counts at which the reveal order has its stages; none where it has no stages."""
        return ()

    @property
    def levels(self) -> tuple[int, ...]:
        """Digit counts, rising to S, at which nodes of the code tree have vectors."""
        return tuple(self.tree_levels or self.order_ends or (self.num_subtokens,))

    @property
    def head_ends(self) -> tuple[int, ...]:
        """Digit counts, rising to S, at which the stages of a head in stages end."""
        halves = sorted({(self.num_subtokens + 1) // 2, self.num_subtokens})
        return tuple(self.head_digits or self.order_ends or halves)

    def check_ends(self, name: str) -> None:
        """ValueError unless the digit counts of this field, if any, rise to S and hold the order's stages."""
        counts, ends = getattr(self, name), sorted(set(self.order_ends or [self.num_subtokens]))
        if counts is None:
            return
        rising = all(a < b for a, b in zip([0, *counts], counts, strict=False))
        if not rising or counts[-1:] != [self.num_subtokens] or not set(ends) <= set(counts):
            raise ValueError(
                f"{name}={counts} must rise from at least 1 to num_subtokens={self.num_subtokens} and hold the "
                f"stages' ends {ends}; use e.g. {ends}"
            )

    def check_nodes(self, what: str, ends: tuple[int, ...]) -> None:
        """ValueError where the code tree has too many nodes at these digit counts."""
        rows = num_nodes(self.base or 2, ends)
        if rows > MAX_STATES:
            raise ValueError(f"{what} would need {rows} rows, more than {MAX_STATES}; use fewer digits")

    def check_tree(self) -> None:
        """ValueError for a tree of codes in embedding or head that cannot be, of a family that has no reveal_order."""
        ancestors = self.subtoken_embedding == "ancestors"
        for name, given in (("head='stages'", self.head == "stages"), ("subtoken_embedding='ancestors'", ancestors)):
            if given and self.num_subtokens == 1:
                raise ValueError(
                    f"{name} needs codes, but num_subtokens=1 leaves tokens whole; use num_subtokens=None"
                )
        if self.tree_levels is not None and not ancestors:
            raise ValueError(f"tree_levels={self.tree_levels} is for subtoken_embedding='ancestors'; leave it out")
        self.check_ends("tree_levels")
        if ancestors:
            self.check_nodes("subtoken_embedding='ancestors'", (0, *self.levels))
        self.check_head()

    def check_head(self) -> None:
        """ValueError for a head in stages that cannot be, once the other fields are right."""
        if self.head == "full":
            if self.head_digits is not None:
                raise ValueError(f"head_digits={self.head_digits} is for head='stages', not 'full'; leave it out")
            return
        self.check_ends("head_digits")
        if self.tie_word_embeddings:
            raise ValueError(
                "head='stages' with tie_word_embeddings=True: the head has rows of nodes, not those of the "
                "embedding; use tie_word_embeddings=False"
            )
        self.check_nodes("head='stages'", self.head_ends)

    def _check_codes(self):
        for name, choices in {**CODE_CHOICES, "subtoken_embedding": self.embeddings}.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(choices)}")
        if self.num_subtokens < 1:
            raise ValueError(f"num_subtokens={self.num_subtokens} must be at least 1")
        if self.base < 2:
            raise ValueError(f"base={self.base} must be at least 2; use base=2")
        if self.base > MAX_VOCABULARY:
            raise ValueError(f"base={self.base} is more than {MAX_VOCABULARY}, the most that is supported; use base=2")
        digits = self.num_subtokens
        if digits * (self.base + 1).bit_length() > MAX_DIGITS:
            raise ValueError(
                f"num_subtokens={digits} digits of base {self.base} do not pack into {MAX_DIGITS} bits; "
                f"use num_subtokens={digits_needed(self.vocab_size, self.base)}"
            )
        if self.vocab_size > self.base**digits:
            raise ValueError(
                f"vocab_size={self.vocab_size} does not fit in num_subtokens={digits} digits of base {self.base} "
                f"({self.base**digits} codes); use num_subtokens={digits_needed(self.vocab_size, self.base)}, "
                f"or base={base_needed(self.vocab_size, digits)}"
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
