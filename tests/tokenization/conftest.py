"""Tokenizers that several files test."""

import pytest
from small_tokenizers import small_base, train_bpe
from tokenizers import Tokenizer

from prime_v2.tokenization import PrimeV2Tokenizer, build_tokenizer


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe()


@pytest.fixture(scope="module")
def small(bpe) -> PrimeV2Tokenizer:
    return build_tokenizer(small_base(bpe))
