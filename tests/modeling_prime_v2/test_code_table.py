"""The code table against brute force over Python integers: digits, shuffles, decoding, consistency and marginals."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prime_v2.code_table_prime_v2 import (
    MAX_SHUFFLED_CODES,
    PrimeV2CodeTable,
    base_needed,
    build_code_table,
    check_ids,
    digits_needed,
)
from prime_v2.random_prime_v2 import hash64

# Computed with Python integers, not with the code under test. A change breaks every stored model.
PINNED_TABLES = {
    (11, 2, 4, 0, 1.0, "codes"): "0101 0011 0000 1110 0100 1011 0111 1111 0001 1010 1000",
    (5, 3, 2, 7, 1.0, "vocab"): "01 00 10 11 02",
    (10, 3, 3, 3, 0.25, "codes"): "011 001 020 000 010 012 002 021 022 100",
}


def digits_of(code: int, base: int, num_subtokens: int) -> list[int]:
    digits = []
    for _ in range(num_subtokens):
        code, digit = divmod(code, base)
        digits.insert(0, digit)
    return digits


def reference_table(vocab_size, base, num_subtokens, seed, ratio, domain) -> list[list[int]]:
    size = base**num_subtokens if domain == "codes" else vocab_size
    shuffled = range(round(ratio * size))
    sigma = sorted(shuffled, key=lambda code: hash64(seed, code).item()) + list(range(len(shuffled), size))
    return [digits_of(code, base, num_subtokens) for code in sigma[:vocab_size]]


@st.composite
def specs(draw):
    """Arguments of `build_code_table`: few enough codes to enumerate, with and without a digit to spare."""
    base = draw(st.integers(2, 7))
    vocab_size = draw(st.integers(1, 40))
    spare = draw(st.integers(0, 1))
    ratio = draw(st.sampled_from([0.0, 0.25, 0.5, 1.0]))
    num_subtokens = digits_needed(vocab_size, base) + spare
    return (
        vocab_size,
        base,
        num_subtokens,
        draw(st.integers(0, 10**6)),
        ratio,
        draw(st.sampled_from(["codes", "vocab"])),
    )


def module(vocab_size, base, num_subtokens, seed=0, ratio=1.0, domain="codes", codes=None) -> PrimeV2CodeTable:
    """The module with its buffer filled, by its own `build` or with the given rows."""
    config = SimpleNamespace(
        code_source="shuffle",
        vocab_size=vocab_size,
        base=base,
        num_subtokens=num_subtokens,
        shuffle_seed=seed,
        shuffle_ratio=ratio,
        shuffle_domain=domain,
    )
    table = PrimeV2CodeTable(config)
    masked = torch.full((1, num_subtokens), base)
    table.codes.copy_(table.build() if codes is None else torch.cat([codes, masked]))
    return table


def states(table: PrimeV2CodeTable, count: int, seed: int) -> torch.Tensor:
    """`count` partly masked tokens and as many random digit patterns, (2 * count, S)."""
    generator = torch.Generator().manual_seed(seed)
    tokens = table.codes[torch.randint(table.vocab_size, (count,), generator=generator)]
    hidden = torch.rand(tokens.shape, generator=generator) < 0.5
    patterns = torch.randint(table.base + 1, tokens.shape, generator=generator)
    return torch.cat([torch.where(hidden, table.base, tokens), patterns])


def allows(state: list[int], code: list[int], base: int) -> bool:
    return all(seen in (base, digit) for seen, digit in zip(state, code, strict=True))


@given(st.integers(1, 5000), st.integers(2, 300))
def test_digits_needed_is_the_smallest_number_that_fits(vocab_size, base):
    expected = next(size for size in itertools.count(1) if base**size >= vocab_size)
    assert digits_needed(vocab_size, base) == expected


@given(st.integers(1, 5000), st.integers(1, 20))
def test_base_needed_is_the_smallest_base_that_fits(vocab_size, num_subtokens):
    expected = next(base for base in itertools.count(2) if base**num_subtokens >= vocab_size)
    assert base_needed(vocab_size, num_subtokens) == expected


@pytest.mark.parametrize("exact", [2**16, 3**10, 37**3, 2**31 - 1, 2**40])
def test_exact_powers_need_no_extra_digit_or_base(exact):
    """Where a logarithm or a root in floating point would round the wrong way."""
    assert digits_needed(2**16 + 1, 2) == 17 and digits_needed(2**16, 2) == 16
    for num_subtokens in (1, 2, 3, 10):
        base = base_needed(exact, num_subtokens)
        assert base**num_subtokens >= exact > (base - 1) ** num_subtokens


@pytest.mark.parametrize("spec", PINNED_TABLES, ids=str)
def test_tables_are_pinned(spec):
    rows = ["".join(map(str, row)) for row in build_code_table(*spec).tolist()]
    assert " ".join(rows) == PINNED_TABLES[spec]


@given(specs())
def test_a_table_is_the_digits_of_the_shuffled_ids(spec):
    table = build_code_table(*spec)
    assert table.dtype == torch.int64
    assert table.tolist() == reference_table(*spec)


@given(specs())
def test_a_table_is_injective_with_digits_below_the_base(spec):
    vocab_size, base, num_subtokens, *_ = spec
    rows = build_code_table(*spec).tolist()
    assert len({tuple(row) for row in rows}) == vocab_size
    assert all(len(row) == num_subtokens and 0 <= min(row) <= max(row) < base for row in rows)


@given(specs())
def test_a_partial_shuffle_moves_only_the_first_share(spec):
    vocab_size, base, num_subtokens, _, ratio, domain = spec
    powers = [base**j for j in reversed(range(num_subtokens))]
    sigma = [sum(d * p for d, p in zip(row, powers, strict=True)) for row in build_code_table(*spec).tolist()]
    num_shuffled = round(ratio * (base**num_subtokens if domain == "codes" else vocab_size))
    assert sigma[num_shuffled:] == list(range(num_shuffled, vocab_size))
    assert all(code < num_shuffled for code in sigma[:num_shuffled])


@given(specs())
def test_the_vocab_domain_leaves_the_codes_from_v_on_unused(spec):
    vocab_size, base, num_subtokens, seed, ratio, _ = spec
    used = sorted(build_code_table(vocab_size, base, num_subtokens, seed, ratio, "vocab").tolist())
    assert used == [digits_of(code, base, num_subtokens) for code in range(vocab_size)]


def test_seeds_give_different_shuffles_and_the_same_seed_the_same():
    tables = [build_code_table(50, 2, 6, seed).tolist() for seed in (0, 1, 2, 0)]
    assert tables[0] == tables[3]
    assert tables[0] != tables[1] != tables[2] != tables[0]


def test_one_subtoken_without_shuffle_is_plain_masked_diffusion():
    assert build_code_table(9, 9, 1, shuffle_ratio=0.0).tolist() == [[token] for token in range(9)]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"vocab_size": 17}, "vocab_size=17 does not fit in num_subtokens=4 digits of base 2 .16 codes.; use .*=5"),
        ({"vocab_size": 0}, "vocab_size=0, base=2, num_subtokens=4: these must be at least 1, 2 and 1"),
        ({"base": 1}, "base=1, num_subtokens=4: these must be at least 1, 2 and 1"),
        ({"num_subtokens": 0}, "num_subtokens=0: these must be at least 1, 2 and 1"),
        ({"shuffle_ratio": 1.5}, r"shuffle_ratio=1.5 is outside \[0, 1\]; use 1.0"),
        ({"shuffle_ratio": float("nan")}, r"shuffle_ratio=nan is outside \[0, 1\]"),
        ({"shuffle_domain": "ids"}, 'shuffle_domain=\'ids\' is not one of "codes", "vocab"'),
        (
            {"num_subtokens": 30},
            f'is more than {MAX_SHUFFLED_CODES}; use shuffle_domain="vocab", which permutes 9 ids',
        ),
    ],
)
def test_impossible_tables_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_code_table(**{"vocab_size": 9, "base": 2, "num_subtokens": 4, **arguments})


@given(specs())
def test_encoding_looks_up_and_decoding_inverts_it(spec):
    table = module(*spec)
    ids = torch.arange(table.vocab_size + 1).repeat(2).view(2, -1)
    digits = table.encode(ids)
    assert digits[0, :-1].tolist() == reference_table(*spec)
    assert digits[0, -1].tolist() == [table.base] * table.num_subtokens
    assert table.decode(digits).tolist() == ids.tolist()


@given(specs(), st.integers(0, 10**6))
def test_decoding_knows_exactly_the_codes_of_the_table(spec, seed):
    table = module(*spec)
    token_of = {tuple(row): token for token, row in enumerate(reference_table(*spec))}
    token_of[(table.base,) * table.num_subtokens] = table.vocab_size
    for state in states(table, count=4, seed=seed):
        pattern = tuple(state.tolist())
        if pattern in token_of:
            assert table.decode(state).item() == token_of[pattern]
        else:
            kind = "partly masked" if table.base in pattern else "a code that no token uses"
            with pytest.raises(ValueError, match=kind):
                table.decode(state)


def test_decoding_every_pattern_of_a_small_table():
    table = module(5, 2, 3)
    decoded = {}
    for pattern in itertools.product(range(3), repeat=3):
        try:
            decoded[pattern] = table.decode(torch.tensor(pattern)).item()
        except ValueError:
            continue
    rows = [tuple(row) for row in table.codes.tolist()]
    assert decoded == {row: token for token, row in enumerate(rows)}
    assert rows[-1] == (2, 2, 2)


def test_digits_that_are_out_of_range_or_too_few_are_refused():
    table = module(5, 2, 3)
    with pytest.raises(ValueError, match=r"span \[0, 3\], but a digit of base 2 is in \[0, 1\], or 2 when masked"):
        table.decode(torch.tensor([[0, 0, 3]]))
    with pytest.raises(ValueError, match=r"span \[-1, 0\]"):
        table.decode(torch.tensor([[0, 0, -1]]))
    with pytest.raises(ValueError, match="has 2 digits in its last axis, but a token of this model has 3"):
        table.decode(torch.zeros(4, 2, dtype=torch.long))


@pytest.mark.parametrize("ids", [[-1, 2], [3, 7]])
def test_ids_that_are_out_of_range_are_refused(ids):
    table = module(6, 2, 3)
    message = rf"span \[{ids[0]}, {ids[1]}\], but this model's ids are in \[0, 6\], the mask token 6 included"
    with pytest.raises(ValueError, match=message):
        table.encode(torch.tensor(ids))


@pytest.mark.parametrize("ids", [torch.tensor([1.0]), torch.tensor([True])])
def test_ids_that_are_no_integers_are_refused(ids):
    with pytest.raises(ValueError, match="token ids must be integers, not torch.(float32|bool); use ids.long"):
        check_ids(ids, 5, "")


def test_no_ids_encode_to_no_digits():
    table = module(6, 2, 3)
    assert table.encode(torch.empty(2, 0, dtype=torch.long)).shape == (2, 0, 3)
    assert table.decode(torch.empty(2, 0, 3, dtype=torch.long)).shape == (2, 0)


@given(specs(), st.integers(0, 10**6))
def test_consistency_equals_a_naive_loop(spec, seed):
    table = module(*spec)
    batch = states(table, count=6, seed=seed)
    expected = [[allows(state, code, table.base) for code in reference_table(*spec)] for state in batch.tolist()]
    assert table.consistent(batch).tolist() == expected


@pytest.mark.parametrize(
    "base, num_subtokens",
    [(2, 15), (2, 16), (2, 17), (2, 31), (2, 32), (2, 33), (16, 7), (16, 8), (17, 7), (60000, 3), (5000, 1)],
)
def test_consistency_on_both_sides_of_the_width_of_an_integer(base, num_subtokens):
    """Packed codes that fill an int16 or int32, their signs included, or are a bit more."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(base, (200, num_subtokens), generator=generator)
    codes[0], codes[1] = 0, base - 1
    table = module(200, base, num_subtokens, domain="vocab", ratio=0.0, codes=codes)
    batch = states(table, count=20, seed=1)
    expected = [[allows(state, code, base) for code in codes.tolist()] for state in batch.tolist()]
    assert table.consistent(batch).tolist() == expected
    width = table.bits * num_subtokens
    assert table.packed_codes().dtype == (torch.int16 if width <= 16 else torch.int32 if width <= 32 else torch.int64)


@given(specs(), st.integers(0, 10**6))
def test_digit_marginals_equal_brute_force_sums(spec, seed):
    """To 1e-12: float64 sums of at most 40 terms."""
    table = module(*spec)
    probabilities = torch.rand(3, table.vocab_size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = torch.zeros(3, table.num_subtokens, table.base, dtype=torch.float64)
    for token, digits in enumerate(reference_table(*spec)):
        for j, digit in enumerate(digits):
            expected[:, j, digit] += probabilities[:, token]
    found = (probabilities @ table.one_hot(torch.float64)).view_as(expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@given(specs())
def test_the_one_hot_code_of_a_token_holds_its_digits(spec):
    table = module(*spec)
    marginals = table.one_hot().unflatten(-1, (table.num_subtokens, table.base))
    assert marginals.argmax(-1).tolist() == reference_table(*spec)
    assert marginals.sum(-1).tolist() == [[1.0] * table.num_subtokens] * table.vocab_size
