"""Wrap a fast BPE tokenizer into a PrimeV2Tokenizer: choose the digits, draw the shuffle, store the table."""

import copy
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from prime_v2.code_table_prime_v2 import base_needed, build_code_table, digits_needed
from prime_v2.tokenization.tokenization_prime_v2 import PrimeV2Tokenizer
from prime_v2.validation_keywords_prime_v2 import arguments_of, refuse_unknown

# What a wrapped tokenizer keeps of the one it wraps, besides the vocabulary and the special tokens.
INHERITED = (
    "name_or_path",
    "model_max_length",
    "padding_side",
    "truncation_side",
    "clean_up_tokenization_spaces",
    "chat_template",
    "extra_special_tokens",
)
# Further names that Transformers' fast tokenizers read. They take them from **kwargs, so no signature lists them, and
# keep any other name without a word.
OF_A_TOKENIZER = (
    *INHERITED,
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "additional_special_tokens",
    "chat_control_tokens",
    "model_input_names",
    "model_specific_special_tokens",
    "pad_token_type_id",
    "post_processor",
    "response_template",
    "split_special_tokens",
    "verbose",
)


def build_tokenizer(
    base_tokenizer_or_name: str | os.PathLike[str] | PreTrainedTokenizerBase | Tokenizer,
    base: int | None = None,
    num_subtokens: int | None = None,
    shuffle_seed: int = 0,
    shuffle_ratio: float = 1.0,
    shuffle_domain: str = "codes",
    special_tokens: Mapping[str, str] | None = None,
    **kwargs: Any,
) -> PrimeV2Tokenizer:
    """A PrimeV2Tokenizer over any fast BPE tokenizer, with the same ids; its mask token gets the next id, V.

    Args:
        base_tokenizer_or_name: a Hub name or folder, a fast Transformers tokenizer, or a `tokenizers.Tokenizer`.
        base: digits run over 0..base-1; None means 2, or the smallest base that fits when `num_subtokens` is given.
        num_subtokens: S, digits a token; None means ceil(log_base V), 1 is plain MDM.
        shuffle_seed, shuffle_ratio, shuffle_domain: the index shuffle, see `build_code_table`.
        special_tokens: e.g. `{"eos_token": "<|endoftext|>"}`, over those of the base tokenizer; a token that is not
            in the vocabulary is added to it and counts towards V. Padding uses EOS where there is no `pad_token`.
        kwargs: passed to PrimeV2Tokenizer (`mask_token`, `chat_template`, `model_max_length`, ...): special tokens
            and the names of `OF_A_TOKENIZER`; ValueError for any other.
    """
    backend, special, inherited = _unwrap(base_tokenizer_or_name)
    names = PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES
    refuse_unknown("build_tokenizer", kwargs, [*arguments_of(build_tokenizer), *names, *OF_A_TOKENIZER])
    special.update(special_tokens or {})
    special.update({name: kwargs.pop(name) for name in names if name in kwargs and name != "mask_token"})
    unknown = [name for name in special if name not in names]
    if unknown:
        raise ValueError(f"special_tokens has {unknown[0]!r}, which is not one of {', '.join(names)}")
    if special.get("pad_token") is None and special.get("eos_token") is not None:
        special["pad_token"] = special["eos_token"]
    mask_token = kwargs.pop("mask_token", special.pop("mask_token", None)) or "<|mask|>"

    backend.add_special_tokens([token for token in special.values() if token is not None])
    vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if backend.token_to_id(str(mask_token)) is not None:
        raise ValueError(
            f"mask_token={str(mask_token)!r} is already the token {backend.token_to_id(str(mask_token))} of the base "
            f"tokenizer; use one outside its vocabulary, e.g. mask_token='<|prime_mask|>'"
        )
    table = _table(vocab_size, base, num_subtokens, shuffle_seed, shuffle_ratio, shuffle_domain)
    return PrimeV2Tokenizer(
        tokenizer_object=backend, code_table=table, mask_token=mask_token, **special, **{**inherited, **kwargs}
    )


def recode_tokenizer(
    tokenizer: PrimeV2Tokenizer,
    base: int | None = None,
    num_subtokens: int | None = None,
    shuffle_seed: int = 0,
    shuffle_ratio: float = 1.0,
    shuffle_domain: str = "codes",
    codes: np.ndarray | None = None,
) -> PrimeV2Tokenizer:
    """The same tokenizer, ids and mask token included, with other digits; arguments as of `build_tokenizer`.

    codes: a table C (V, S) instead of the shuffled one (`prime_v2.tokenization.codes`); the shuffle has no part then.
    """
    vocab_size = len(tokenizer.code_table)
    if codes is None:
        table = _table(vocab_size, base, num_subtokens, shuffle_seed, shuffle_ratio, shuffle_domain)
    else:
        table = {"base": base or 2, "num_subtokens": codes.shape[1], "code_source": "data", "codes": codes}
        table["vocab_size"] = vocab_size
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    # Not name_or_path, the folder that it was loaded from.
    inherited = {name: getattr(tokenizer, name) for name in INHERITED[1:]}
    return PrimeV2Tokenizer(
        tokenizer_object=backend, code_table=table, **{**dict(tokenizer.special_tokens_map), **inherited}
    )


def _table(
    vocab_size: int,
    base: int | None,
    num_subtokens: int | None,
    shuffle_seed: int,
    shuffle_ratio: float,
    shuffle_domain: str,
) -> dict[str, Any]:
    """The code table with what made it, as PrimeV2Tokenizer keeps it."""
    for name, value in {"base": base, "num_subtokens": num_subtokens, "shuffle_seed": shuffle_seed}.items():
        if isinstance(value, bool) or not isinstance(value, int | None):
            raise ValueError(f"{name}={value!r} must be an integer")
    if base is None:
        base = 2 if num_subtokens is None else base_needed(vocab_size, max(1, num_subtokens))
    if num_subtokens is None:
        num_subtokens = digits_needed(vocab_size, max(2, base))
    shuffle = {"shuffle_seed": shuffle_seed, "shuffle_ratio": shuffle_ratio, "shuffle_domain": shuffle_domain}
    codes = build_code_table(vocab_size, base, num_subtokens, shuffle_seed, shuffle_ratio, shuffle_domain)
    return {"vocab_size": vocab_size, "base": base, "num_subtokens": num_subtokens, **shuffle, "codes": codes}


def _unwrap(base_tokenizer: Any) -> tuple[Tokenizer, dict[str, Any], dict[str, Any]]:
    """A copy of the `tokenizers` object, the special tokens by name, and the inherited settings of a tokenizer."""
    if isinstance(base_tokenizer, str | os.PathLike):
        base_tokenizer = _load(base_tokenizer)
    special: dict[str, Any] = {}
    inherited: dict[str, Any] = {}
    if isinstance(base_tokenizer, PreTrainedTokenizerBase):
        special = {name: token for name, token in base_tokenizer.special_tokens_map.items() if name != "mask_token"}
        inherited = {name: getattr(base_tokenizer, name) for name in INHERITED}
    backend = getattr(base_tokenizer, "backend_tokenizer", base_tokenizer)
    if not isinstance(backend, Tokenizer):
        raise ValueError(f"{type(base_tokenizer).__name__} is not a fast tokenizer; use one that has a tokenizer.json")
    if hasattr(base_tokenizer, "encode_subtokens"):
        raise ValueError("the tokenizer is a PrimeV2Tokenizer already; pass the one that it was built from")
    backend = copy.deepcopy(backend)
    # A call with `truncation=True` leaves its length behind in the object.
    backend.no_truncation()
    backend.no_padding()
    return backend, special, inherited


def _load(name: str | os.PathLike[str]) -> Any:
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"no tokenizer could be loaded from {os.fspath(name)!r} ({reason}); use a Hub name or a folder with a "
            f"tokenizer.json"
        ) from error
