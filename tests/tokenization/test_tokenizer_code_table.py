"""Tokenizers whose code table is damaged, missing or of another vocabulary are refused when they are loaded."""

import json

import pytest
from small_tokenizers import small_base
from transformers import AutoTokenizer

from prime_v2.tokenization import PrimeV2Tokenizer


def test_a_table_for_another_vocabulary_is_refused(small, bpe):
    table = {"base": 2, "codes": small.code_table[:-1]}
    with pytest.raises(
        ValueError, match="the code table has 400 tokens, so the mask token must have the last id, 400"
    ):
        PrimeV2Tokenizer(tokenizer_object=small_base(bpe).backend_tokenizer, code_table=table)


def without_codes(content):
    del content["codes"]


def repeated_row(content):
    content["codes"][5] = content["codes"][4]


def wrong_digit(content):
    content["codes"][5][0] = 2


def negative_digit(content):
    content["codes"][5][0] = -1


def fraction(content):
    content["codes"][5][0] = 0.5


def short_row(content):
    content["codes"][5].pop()


def one_axis(content):
    content["codes"] = content["codes"][0]


def missing_row(content):
    content["codes"].pop()
    content["vocab_size"] -= 1
    del content["codes_sha256"]  # which would refuse it first


def other_size(content):
    content["num_subtokens"] = 10


def other_base(content):
    content["base"] = "2"


def too_many_digits(content):
    content["codes"] = [[0] * 41 + row for row in content["codes"]]


@pytest.mark.parametrize(
    "damage, message",
    [
        (without_codes, 'must be a mapping with "base" and "codes"'),
        (repeated_row, "401 tokens share 400 codes; every token needs a code of its own"),
        (wrong_digit, r"digits span \[0, 2\], but a digit of base 2 is in \[0, 1\]"),
        (negative_digit, r"digits span \[-1, 1\], but a digit of base 2 is in \[0, 1\]"),
        (fraction, "codes of the code table must be integers, not float64"),
        (short_row, "codes of the code table are nested lists of different lengths"),
        (one_axis, r"codes of shape \(9,\) must have the two axes \(vocab_size, num_subtokens\)"),
        (missing_row, "the code table has 400 tokens, so the mask token must have the last id, 400, but .* has 401"),
        (other_size, "num_subtokens=10, but the codes have num_subtokens=9"),
        (other_base, "base='2' must be an integer of at least 2"),
        (too_many_digits, "50 digits of base 2 do not fit in 63 bits"),
    ],
)
def test_a_damaged_code_table_is_refused(small, tmp_path, damage, message):
    small.save_pretrained(tmp_path)
    path = tmp_path / "code_table.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    damage(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        PrimeV2Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"base": 2, "codes": [[0,', "code_table.json is not JSON .*; save the tokenizer again"),
        (b"\xff\xfe\x00", "code_table.json is not JSON"),
        (b"[[0, 1]]", 'must be a mapping with "base" and "codes"'),
        (None, "code_table.json is missing beside the tokenizer"),
    ],
)
def test_a_file_that_is_no_code_table_is_refused(small, tmp_path, content, message):
    small.save_pretrained(tmp_path)
    path = tmp_path / "code_table.json"
    path.unlink() if content is None else path.write_bytes(content)
    for load in (PrimeV2Tokenizer.from_pretrained, AutoTokenizer.from_pretrained):
        with pytest.raises(ValueError, match=message):
            load(tmp_path, trust_remote_code=True)
