"""A byte-level BPE trained on the spot, for the sources that bring no tokenizer."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# The 256 bytes, the end-of-text token and one merge.
MIN_VOCAB_SIZE = 258


def train_bpe(documents: Iterable[str], vocab_size: int, eos_token: str = "<|endoftext|>") -> "Tokenizer":
    """A byte-level BPE (as GPT-2's, without a leading space) of exactly `vocab_size` tokens, deterministic.

    vocab_size includes the 256 bytes and `eos_token`, whose id is 0. Decoding an encoded text gives the text back, any
    Unicode included: text that spells `eos_token` is encoded as text, not as the token.
    Raises ValueError for a vocab_size below 258, or above what the merges of these documents can fill.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size={vocab_size} leaves no room for merges beside 256 bytes and {eos_token!r}; "
            f"use at least {MIN_VOCAB_SIZE}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[eos_token],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.encode_special_tokens = True
    if tokenizer.get_vocab_size() < vocab_size:
        most = tokenizer.get_vocab_size()
        raise ValueError(
            f"the documents have merges for {most} tokens, fewer than the {vocab_size} of the vocabulary; use more "
            f"text, or a vocabulary of {most} (of train.py: --bpe_vocab_size {most})"
        )
    return tokenizer
