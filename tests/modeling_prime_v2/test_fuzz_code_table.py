"""Any code table: injective, its digits invertible, the model's and the tokenizer's the same, or a refusal."""

import json

import numpy as np
import torch
from fuzzing import Refusal, attempt, cases
from hypothesis import given
from hypothesis import strategies as st

from prime_v2.code_table_prime_v2 import PrimeV2CodeTable, base_needed, build_code_table, digits_needed
from prime_v2.configuration_prime_v2 import PrimeV2Config
from prime_v2.tokenization.tokenization_prime_v2 import check_code_table, hash_codes
from prime_v2.validation_weights_prime_v2 import check_codes

ODD_SIZES = [0, -1, 2**16, 2**16 + 1, 2**31, 2**63, 10**400]
ODD_DIGITS = [0, -1, 1, 16, 31, 62, 63, 1000, 10**9, 10**400]


def mostly(usual, odd: list):
    """A value of `usual`, or one time in eight an odd one."""
    return st.integers(0, 7).flatmap(lambda number: usual if number else st.sampled_from(odd))


SHARE = mostly(st.floats(0, 1), [-0.1, 1.1, float("nan"), float("inf")])
MOST_CODES = 2**11  # that a table of a case may permute: the others, all right, only take longer


@st.composite
def tables(draw):
    """Fields of a code table."""
    return {
        "vocab_size": draw(mostly(st.integers(1, 600), ODD_SIZES)),
        "base": draw(mostly(st.one_of(st.none(), st.integers(2, 12)), ODD_DIGITS)),
        "num_subtokens": draw(mostly(st.one_of(st.none(), st.none(), st.integers(1, 12)), ODD_DIGITS)),
        "shuffle_seed": draw(st.integers(-(2**70), 2**70)),
        "shuffle_ratio": draw(SHARE),
        "shuffle_domain": draw(mostly(st.sampled_from(["codes", "vocab"]), ["words"])),
    }


def fits(vocab_size, base, num_subtokens, shuffle_ratio, shuffle_domain, **_) -> bool:
    """Whether there is such a table, as the definition says, for what is given in full."""
    return (
        1 <= vocab_size <= 2**24
        and 2 <= base <= 2**24
        and 1 <= num_subtokens <= 62
        and base**num_subtokens >= vocab_size
        and num_subtokens * (base + 1).bit_length() <= 62
        and 0 <= shuffle_ratio <= 1
        and shuffle_domain in ("codes", "vocab")
        and (shuffle_domain == "vocab" or shuffle_ratio * base**num_subtokens <= 2**24)
    )


@cases(200, 3000)
@given(tables())
def test_a_table_is_a_bijection_onto_its_codes_or_is_refused(given_fields):
    config = attempt("code table", lambda: PrimeV2Config(**given_fields, hidden_size=8, num_attention_heads=2))
    known = given_fields["base"] is not None and given_fields["num_subtokens"] is not None
    if isinstance(config, Refusal):
        assert not known or not fits(**given_fields)
        return
    made = {name: getattr(config, name) for name in given_fields}
    assert fits(**made)
    domain = config.base**config.num_subtokens if config.shuffle_domain == "codes" else config.vocab_size
    if max(domain, config.vocab_size) * config.shuffle_ratio > MOST_CODES or config.vocab_size > MOST_CODES:
        return
    table = PrimeV2CodeTable(config)
    table.codes.copy_(table.build())
    rows = [tuple(row) for row in table.codes.tolist()]
    assert len(set(rows)) == len(rows) == config.vocab_size + 1
    assert all(0 <= digit < config.base for row in rows[:-1] for digit in row)
    numbers = [sum(digit * config.base**j for j, digit in enumerate(reversed(row))) for row in rows[:-1]]
    shuffled = round(config.shuffle_ratio * domain)
    assert all(number < domain for number in numbers)
    # What is beyond the shuffled share keeps its place.
    assert all(number == token for token, number in enumerate(numbers) if token >= shuffled)
    ids = torch.arange(config.vocab_size + 1)
    assert torch.equal(table.decode(table.encode(ids)), ids)
    check_codes(table.codes, config.base)
    again = build_code_table(**made)
    assert torch.equal(again, table.codes[:-1])
    stored = {"base": config.base, "codes": table.codes[:-1].tolist(), "codes_sha256": hash_codes(again.numpy())}
    codes, parameters = check_code_table(json.loads(json.dumps(stored)))
    assert codes.tolist() == again.tolist()
    assert (parameters["vocab_size"], parameters["base"]) == (config.vocab_size, config.base)


@cases(150, 2000)
@given(st.integers(1, 2**24), st.integers(2, 300), st.integers(1, 40))
def test_digits_and_bases_needed_are_the_smallest(vocab_size, base, num_subtokens):
    digits = attempt("digits needed", lambda: digits_needed(vocab_size, base))
    assert base**digits >= vocab_size and (digits == 1 or base ** (digits - 1) < vocab_size)
    smallest = base_needed(vocab_size, num_subtokens)
    assert smallest**num_subtokens >= vocab_size and (smallest == 2 or (smallest - 1) ** num_subtokens < vocab_size)


ENTRY = mostly(st.integers(-1, 4), [2**63, -(2**63), 10**30, 0.0, 1.5, None, "1"])
ROWS = st.integers(2, 3).flatmap(
    lambda width: st.lists(st.lists(st.integers(0, 2), min_size=width, max_size=width), min_size=1, max_size=5)
)


@cases(200, 2000)
@given(
    st.one_of(ROWS, st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=3), min_size=1, max_size=3)),
    st.one_of(st.none(), st.none(), st.tuples(st.integers(0, 5), st.integers(0, 2), ENTRY)),
    mostly(st.integers(3, 4), [2, 0, -1, 2.0, "3", None, True, 2**62]),
)
def test_a_stored_table_is_taken_exactly_if_it_is_one(rows, poison, base):
    """The tokenizer's check and the model's, against the definition: whole digits below base, distinct rows."""
    if poison is not None:
        row, column, value = poison
        rows = [list(each) for each in rows]
        rows[row % len(rows)][column % len(rows[row % len(rows)])] = value
    found = attempt("stored table", lambda: check_code_table({"base": base, "codes": rows}))
    whole = isinstance(base, int) and not isinstance(base, bool) and base >= 2
    same = len({len(row) for row in rows}) == 1
    digits = all(type(digit) is int and whole and 0 <= digit < base for row in rows for digit in row)
    small = whole and (base + 1) ** len(rows[0]) < 2**63
    right = whole and same and digits and small and len({tuple(row) for row in rows}) == len(rows)
    assert isinstance(found, Refusal) != right, (found, rows, base)
    if whole and same and small and all(type(digit) is int and abs(digit) < 2**62 for row in rows for digit in row):
        codes = torch.tensor([*rows, [base] * len(rows[0])])
        assert isinstance(attempt(None, lambda: check_codes(codes, base)), Refusal) != right
    if right:
        assert found[0].dtype == np.int64 and found[0].tolist() == rows
