"""PrimeV2Tokenizer: a fast BPE tokenizer that also splits its tokens into base-b digits (arXiv:2603.16077).

The code table C (V, S) is data, stored beside the tokenizer in code_table.json, so encoding never depends on how a
random permutation is drawn. `prime_v2.tokenization.build_tokenizer` makes the table. This file imports nothing of the
package, since the Hub loads only this file.
"""

import hashlib
import json
import os
import reprlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from tokenizers import AddedToken
from transformers import TokenizersBackend

CODE_TABLE_FILE = "code_table.json"
# Digests in code_table.json of the table and of the vocabulary that it was made for; older files lack them.
CODES_HASH, VOCABULARY_HASH = "codes_sha256", "vocabulary_sha256"
# Read with a tokenizer, as far as they are there.
JSON_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    CODE_TABLE_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    "config.json",
)


class PrimeV2Tokenizer(TokenizersBackend):
    """Behaves as the BPE tokenizer it wraps, plus a mask token with the id V and the digits of every token.

    Args:
        code_table: `{"base": b, "codes": C, ...}` with C (V, S), integers in 0..b-1 whose rows differ. The other
            entries (shuffle_seed, ...) say how the table was made and are kept.
        code_table_file: path of a JSON file with the same content; what `from_pretrained` passes.
        mask_token: must get the id V, the first one outside the wrapped vocabulary.
        kwargs: as in TokenizersBackend.

    Attributes:
        code_table: (V, S) int64 numpy array, the table C.
        code_table_parameters: dict of vocab_size, base, num_subtokens and the entries that say how the table was made;
            `PrimeV2Config(**tokenizer.code_table_parameters)` is the configuration that has the same table.
    """

    vocab_files_names = {"tokenizer_file": "tokenizer.json", "code_table_file": CODE_TABLE_FILE}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(
        self,
        *,
        code_table: dict[str, Any] | None = None,
        code_table_file: str | os.PathLike[str] | None = None,
        mask_token: str | AddedToken = "<|mask|>",
        **kwargs: Any,
    ):
        if code_table is None:
            code_table = read_code_table(code_table_file)
        codes, parameters = check_code_table(code_table)
        super().__init__(mask_token=mask_token, **kwargs)
        vocab_size = len(codes)
        last_id = max(max(self.added_tokens_decoder), self.vocab_size - 1)
        if self.mask_token_id != vocab_size or last_id != vocab_size:
            raise ValueError(
                f"the code table has {vocab_size} tokens, so the mask token must have the last id, {vocab_size}, but "
                f"{self.mask_token!r} has {self.mask_token_id} and the last id is {last_id}; make the tokenizer with "
                f"build_tokenizer"
            )
        expected = code_table.get(VOCABULARY_HASH)
        if expected is not None and expected != hash_vocabulary(self.get_vocab()):
            raise ValueError(
                f"the vocabulary has {vocab_size} tokens as {CODE_TABLE_FILE} has, but they are not those that it was "
                f"made for; use the tokenizer.json that was saved beside it"
            )
        self.code_table_parameters = parameters
        self._codes_with_mask = np.vstack([codes, np.full_like(codes[:1], parameters["base"])])  # (V + 1, S)
        packed = _pack(self._codes_with_mask, parameters["base"])
        self._sorted_packed, self._sorted_ids = np.unique(packed, return_index=True)
        self.code_table = codes

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers; ValueError for a JSON file that holds no mapping, or one that is nested too deeply."""
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except (RecursionError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
            is_deep = isinstance(error, RecursionError)
            if is_deep and "JSON" not in str(error):
                raise
            place = str(pretrained_model_name_or_path)
            fault = _json_fault(place)
            if fault is None and is_deep:  # of the Hub's cache
                fault = f"a JSON file of {place} is nested too deeply to be read; save it again"
            if fault is None:
                raise
            raise ValueError(fault) from None

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Load tokenizer.json whole: the inherited method drops its pre-tokenizer and merges for a class like this."""
        return kwargs

    def encode_subtokens(self, ids: Any) -> Any:
        """Token ids (...) in [0, V] to digits (..., S) int64; the mask id V becomes S digits `base` (masked).

        ids: an integer, a (nested) list, a numpy array or a torch tensor. Returns a torch tensor on the same device
        for a tensor, otherwise a numpy array.
        """
        array = _integers(ids, "token ids")
        last = len(self.code_table)
        if array.size and (array.min() < 0 or array.max() > last):
            raise ValueError(
                f"token ids span [{array.min()}, {array.max()}], but this tokenizer's ids are in [0, {last}], "
                f"the mask token {last} included"
            )
        return _like(ids, self._codes_with_mask[array])

    def decode_subtokens(self, subtoken_ids: Any) -> Any:
        """Digits (..., S) in [0, base] to token ids (...) int64, the inverse of `encode_subtokens`.

        Raises ValueError for digits that are no token: an unused code, a partly masked token, a digit out of range.
        """
        array = _integers(subtoken_ids, "subtoken ids")
        base, num_subtokens = self.code_table_parameters["base"], self.code_table.shape[1]
        if not array.ndim or array.shape[-1] != num_subtokens:
            raise ValueError(
                f"subtoken ids of shape {array.shape} must have num_subtokens={num_subtokens} as last axis"
            )
        if array.size and (array.min() < 0 or array.max() > base):
            raise ValueError(
                f"subtoken ids span [{array.min()}, {array.max()}], but a digit of base {base} is in [0, {base - 1}], "
                f"or {base} when masked"
            )
        wanted = _pack(array, base)
        slot = np.searchsorted(self._sorted_packed, wanted).clip(max=len(self.code_table))
        unknown = self._sorted_packed[slot] != wanted
        if unknown.any():
            digits = array[unknown][0].tolist()
            raise ValueError(
                f"the digits {digits} are {'partly masked' if base in digits else 'a code that no token uses'}; only "
                f"the {len(self.code_table)} codes of the table and the fully masked token can be decoded"
            )
        return _like(subtoken_ids, self._sorted_ids[slot])

    def add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        """Refuse tokens without a code; tokens that exist already may be declared special."""
        self._refuse_new([new_tokens] if isinstance(new_tokens, str | AddedToken) else new_tokens)
        return super().add_tokens(new_tokens, special_tokens=special_tokens)

    def add_special_tokens(self, special_tokens_dict: dict[str, Any], *args: Any, **kwargs: Any) -> int:
        """As `add_tokens`; refused before a name is assigned, and where the mask token would be another."""
        for name, value in special_tokens_dict.items():
            self._check_special(name, value)
        return super().add_special_tokens(special_tokens_dict, *args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        """As always, but special tokens, by name or by id, are tokens that there are, and the mask token stays."""
        if "code_table" in self.__dict__:
            kind = name.removesuffix("_ids").removesuffix("_id")
            if kind in (*self.SPECIAL_TOKENS_ATTRIBUTES, "extra_special_tokens"):
                tokens = value
                if name != kind:
                    value = self._checked_ids(name, value)
                    tokens = None if value is None else self.convert_ids_to_tokens(value)
                self._check_special(kind, tokens)
        super().__setattr__(name, value)

    def _checked_ids(self, name: str, value: Any) -> Any:
        """An id, several, or None; ValueError for what is no id of this tokenizer."""
        last = len(self.code_table)
        ids = list(value) if isinstance(value, list | tuple) else [] if value is None else [value]
        for each in ids:
            if isinstance(each, bool) or not isinstance(each, int | np.integer) or not 0 <= each <= last:
                raise ValueError(f"{name}={each!r} is no token id; use one in [0, {last}]")
        ids = [int(each) for each in ids]
        return ids if isinstance(value, list | tuple) else ids[0] if ids else None

    def _check_special(self, name: str, value: Any) -> None:
        if name == "mask_token" and str(value) != self.mask_token:
            raise ValueError(
                f"mask_token={value!r} cannot take the place of {self.mask_token!r}, whose id {len(self.code_table)} "
                f"means that all digits are masked; give mask_token to build_tokenizer"
            )
        if value is not None:
            self._refuse_new([value] if isinstance(value, str | AddedToken) else value)

    def _refuse_new(self, tokens: Iterable[Any]) -> None:
        missing = [str(token) for token in tokens if self.backend_tokenizer.token_to_id(str(token)) is None]
        # While the tokenizer is being made, its mask token is new.
        if missing and "code_table" in self.__dict__:
            raise ValueError(
                f"cannot add {missing[0]!r}: the code table holds the {len(self.code_table)} tokens it was built for; "
                f"add tokens to the base tokenizer and call build_tokenizer again"
            )

    def _save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        file_names: tuple[str, ...],
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
    ) -> tuple[str, ...]:
        files = super()._save_pretrained(save_directory, file_names, legacy_format, filename_prefix)
        name = CODE_TABLE_FILE if filename_prefix is None else f"{filename_prefix}-{CODE_TABLE_FILE}"
        path = os.path.join(save_directory, name)
        hashes = {CODES_HASH: hash_codes(self.code_table), VOCABULARY_HASH: hash_vocabulary(self.get_vocab())}
        content = {**self.code_table_parameters, **hashes, "codes": self.code_table.tolist()}
        with open(path, "w", encoding="utf-8") as file:
            json.dump(content, file, separators=(",", ":"))
        return (*files, path)


def read_code_table(path: str | os.PathLike[str] | None) -> dict[str, Any]:
    """The content of a code_table.json, not yet checked."""
    if path is None:
        raise ValueError(f"{CODE_TABLE_FILE} is missing beside the tokenizer; make a tokenizer with build_tokenizer")
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise ValueError(f"{path} is not JSON ({error}); save the tokenizer again") from error
    if not isinstance(content, dict):
        raise ValueError(
            f'{path} holds {reprlib.repr(content)}; it must be a mapping with "base" and "codes": save the tokenizer '
            f"again"
        )
    return content


def _json_fault(place: str) -> str | None:
    """What is wrong with the first of a folder's JSON files that holds no mapping, as a sentence; None for nothing."""
    for path in (os.path.join(place, name) for name in JSON_FILES):
        try:
            with open(path, "rb") as file:
                content = json.loads(file.read())
        except RecursionError:
            return f"{path} is nested too deeply to be read; save it again"
        except ValueError as error:
            return f"{path} is not JSON ({error}); save it again"
        except OSError:  # not there
            continue
        if not isinstance(content, dict):
            return f"{path} holds {reprlib.repr(content)}, but must hold a mapping; save it again"
    return None


def check_code_table(content: Any) -> tuple[np.ndarray, dict[str, Any]]:
    """C (V, S) int64 and the parameters, from the content of code_table.json; ValueError unless C is injective."""
    if not isinstance(content, dict) or "base" not in content or "codes" not in content:
        raise ValueError('the code table must be a mapping with "base" and "codes"; use build_tokenizer to make one')
    base = content["base"]
    if isinstance(base, bool) or not isinstance(base, int) or base < 2:
        raise ValueError(f"code table: base={base!r} must be an integer of at least 2; use 2")
    codes = _integers(content["codes"], "codes of the code table")
    if codes.ndim != 2 or not codes.size:
        raise ValueError(
            f"code table: codes of shape {codes.shape} must have the two axes (vocab_size, num_subtokens)"
        )
    vocab_size, num_subtokens = codes.shape
    if (base + 1) ** num_subtokens >= 2**63:
        raise ValueError(f"code table: {num_subtokens} digits of base {base} do not fit in 63 bits; use fewer digits")
    sizes = {"vocab_size": vocab_size, "base": base, "num_subtokens": num_subtokens}
    for name, size in sizes.items():
        if content.get(name, size) != size:
            raise ValueError(f"code table: {name}={content[name]!r}, but the codes have {name}={size}")
    if codes.min() < 0 or codes.max() >= base:
        raise ValueError(
            f"code table: digits span [{codes.min()}, {codes.max()}], but a digit of base {base} is in [0, {base - 1}]"
        )
    distinct = len(np.unique(_pack(codes, base)))
    if distinct != vocab_size:
        raise ValueError(
            f"code table: {vocab_size} tokens share {distinct} codes; every token needs a code of its own"
        )
    if content.get(CODES_HASH, "") not in ("", hash_codes(codes)):
        raise ValueError(
            f"code table: the codes are not those of {CODES_HASH}={content[CODES_HASH]!r}, so the file was changed; "
            f"save the tokenizer again"
        )
    made_by = {name: each for name, each in content.items() if name not in ("codes", CODES_HASH, VOCABULARY_HASH)}
    return codes, {**sizes, **made_by}


def hash_codes(codes: np.ndarray) -> str:
    """SHA-256 of a code table (V, S): of its digits as little-endian int64, row by row, in hexadecimal."""
    return hashlib.sha256(codes.astype("<i8").tobytes()).hexdigest()


def hash_vocabulary(vocabulary: dict[str, int]) -> str:
    """SHA-256 of a vocabulary, added tokens included: of its tokens as a JSON list in the order of their ids."""
    tokens = sorted(vocabulary, key=lambda token: (vocabulary[token], token))
    return hashlib.sha256(json.dumps(tokens, separators=(",", ":")).encode()).hexdigest()


def _pack(digits: np.ndarray, base: int) -> np.ndarray:
    """Digits (..., S) in [0, base] to one int64 (...) each, injective with the masked digit included."""
    powers = [(base + 1) ** j for j in reversed(range(digits.shape[-1]))]
    return digits @ np.array(powers, dtype=np.int64)


def _integers(values: Any, name: str) -> np.ndarray:
    """Integers from a number, a (nested) list, a numpy array or a torch tensor, as an int64 array."""
    try:
        array = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
    except ValueError as error:
        raise ValueError(f"{name} are nested lists of different lengths; pad them to one length") from error
    if array.size and array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers, not {array.dtype}")
    return array.astype(np.int64)


def _like(values: Any, result: np.ndarray) -> Any:
    """`result` as a torch tensor on the device of `values` when that is one, else unchanged."""
    return values.long().new_tensor(result) if hasattr(values, "new_tensor") else result


# Copies this file beside a saved tokenizer and names it in tokenizer_config.json (`auto_map`).
PrimeV2Tokenizer.register_for_auto_class("AutoTokenizer")
