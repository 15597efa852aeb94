"""The counter-based random stream, against SplitMix64 written in Python integers, and pinned for ever."""

import ast
import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prime_v2.random_prime_v2 import Stream, hash64, permutation, uniforms

U64 = 2**64 - 1
GOLDEN, MULTIPLIER_1, MULTIPLIER_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB

# Computed with the Python integers below, not with the code under test. A change breaks every stored shuffle.
PINNED_HASHES = [
    0xA706DD2F4D197E6F,
    0x5E41AB087439611E,
    0xA7F72697A2731486,
    0x882D1ACC8D6C3B48,
    0x2991C0753B45EFE8,
    0x5DC20AA7B2A27137,
]
PINNED_PERMUTATION_SEED_0 = [5, 3, 0, 4, 11, 7, 1, 10, 8, 9, 2, 6]
PINNED_PERMUTATION_KEYS_7_3 = [5, 4, 9, 11, 2, 7, 6, 10, 0, 1, 8, 3]


def mix(bits: int) -> int:
    bits = (bits + GOLDEN) & U64
    bits = ((bits ^ (bits >> 30)) * MULTIPLIER_1) & U64
    bits = ((bits ^ (bits >> 27)) * MULTIPLIER_2) & U64
    return bits ^ (bits >> 31)


def unmix(bits: int) -> int:
    """The inverse of `mix`: undo each shift by repeating it, each product by the inverse modulo 2**64."""
    bits ^= (bits >> 31) ^ (bits >> 62)
    bits = (bits * pow(MULTIPLIER_2, -1, 2**64)) & U64
    bits ^= (bits >> 27) ^ (bits >> 54)
    bits = (bits * pow(MULTIPLIER_1, -1, 2**64)) & U64
    bits ^= (bits >> 30) ^ (bits >> 60)
    return (bits - GOLDEN) & U64


def reference_hash(*keys: int) -> int:
    state = 0
    for key in keys:
        state = mix(state ^ mix(key & U64))
    return state


def signed(bits: int) -> int:
    return bits - 2**64 if bits >= 2**63 else bits


def key_with_hash(bits: int) -> int:
    """The one integer key that hashes to `bits`."""
    return unmix(unmix(bits))


def test_the_reference_is_splitmix64():
    """The first outputs of SplitMix64 with seed 0, as published with the generator; its n-th state is n * GOLDEN."""
    outputs = [mix(n * GOLDEN) for n in range(3)]
    assert outputs == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@given(st.lists(st.integers(-(2**65), 2**65), min_size=1, max_size=4))
def test_hash_equals_python_integers(keys):
    assert hash64(*keys).item() == signed(reference_hash(*keys))


@given(
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=4),
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=4),
    st.integers(0, 2**63 - 1),
)
def test_tensor_keys_broadcast_to_what_each_number_hashes_to(rows, columns, seed):
    table = hash64(seed, torch.tensor(rows).unsqueeze(-1), torch.tensor(columns))
    assert table.tolist() == [[signed(reference_hash(seed, row, column)) for column in columns] for row in rows]


def test_the_stream_is_pinned():
    assert [hash64(*keys).item() & U64 for keys in ([0], [1], [0, 0], [1, 2, 3], [3, 2, 1], [-1])] == PINNED_HASHES


def test_permutations_are_pinned():
    assert permutation(12, 0).tolist() == PINNED_PERMUTATION_SEED_0
    assert permutation(12, 7, 3).tolist() == PINNED_PERMUTATION_KEYS_7_3


@given(st.integers(0, 40), st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=3))
def test_a_permutation_sorts_by_the_signed_hash(num, keys):
    expected = sorted(range(num), key=lambda index: signed(reference_hash(*keys, index)))
    assert permutation(num, *keys).tolist() == expected


@given(st.integers(0, 2**63 - 1))
def test_uniforms_are_the_leading_bits_of_the_hash(key):
    """Within 2**-52: the hash has 64 bits, a float64 in [0.5, 1) keeps 53 of them and the draw adds half a step."""
    assert uniforms(key).item() == pytest.approx(reference_hash(key) / 2**64, abs=2**-52)
    assert uniforms(key).dtype == torch.float64


@pytest.mark.parametrize("bits", [0, 1, 2**63 - 1, 2**63, U64 - 1, U64])
def test_uniforms_never_reach_zero_or_one(bits):
    key = key_with_hash(bits)
    assert hash64(key).item() == signed(bits)
    assert 0.0 < uniforms(key).item() < 1.0


def test_uniforms_fill_the_interval_evenly():
    """Chi-square over 64 bins, 63 degrees of freedom: exceeded by chance with probability 1e-6."""
    draws = uniforms(11, torch.arange(64_000))
    counts = torch.histc(draws, bins=64, min=0, max=1)
    assert ((counts - 1000) ** 2 / 1000).sum() < 131.3


def test_permutations_of_four_are_equally_likely():
    """Chi-square over the 24 orders, 23 degrees of freedom: exceeded by chance with probability 1e-6."""
    counts = Counter(tuple(permutation(4, seed).tolist()) for seed in range(4800))
    statistic = sum((counts[order] - 200) ** 2 / 200 for order in itertools.permutations(range(4)))
    assert statistic < 70.5


# ------------------------------------------------------------------------------------------------- stream numbers

ROOT = Path(__file__).parents[2]
DRAWING = {"hash64", "uniforms", "permutation"}
PINNED_STREAMS = [
    *(1, 2, 3, 4, 5, 11, 12, 13, 14, 15, 21, 22, 23, 24, 31, 32, 41, 42, 43, 51, 61, 81, 82, 83, 85, 86, 87, 88),
    *(91, 92, 93, 94, 95),
    *(int.from_bytes(b"order"), int.from_bytes(b"length")),
]


def sources() -> Iterator[tuple[str, ast.Module]]:
    """(Path in the repository, its syntax) of every Python file that may draw, but for random_prime_v2 and tests."""
    for path in sorted(ROOT.rglob("*.py")):
        name = path.relative_to(ROOT)
        hidden = any(part.startswith(".") for part in name.parts)
        if not (hidden or name.parts[0] in ("tests", "build", "runs") or name.name == "random_prime_v2.py"):
            yield str(name), ast.parse(path.read_text(encoding="utf-8"))


def numbers_of(module: ast.Module) -> set[str]:
    """Names that a module gives an integer, or integers, of its own."""
    found = set()
    for statement in ast.walk(module):
        if isinstance(statement, ast.Assign):
            values = statement.value.elts if isinstance(statement.value, ast.Tuple) else [statement.value]
            if all(isinstance(each, ast.Constant) and isinstance(each.value, int) for each in values):
                found |= {each.id for each in ast.walk(statement) if isinstance(each, ast.Name)}
    return found


def foreign_keys(module: ast.Module) -> list[str]:
    """The keys of a module's draws that are integers written there, in place of a `Stream`."""
    own, found = numbers_of(module), []
    for call in ast.walk(module):
        if isinstance(call, ast.Call) and getattr(call.func, "id", getattr(call.func, "attr", None)) in DRAWING:
            keys = call.args[getattr(call.func, "id", "") == "permutation" :]
            found += [ast.unparse(key) for key in keys if isinstance(key, ast.Constant) or ast.unparse(key) in own]
    return found


def test_no_draw_has_a_stream_number_from_elsewhere():
    assert foreign_keys(ast.parse("_A, _B = 31, 32\nhash64(seed, _A, n)\nuniforms(7)")) == ["_A", "7"]  # it sees them
    found = {name: foreign_keys(module) for name, module in sources()}
    assert len(found) > 100
    assert {name: keys for name, keys in found.items() if keys} == {}


def test_a_stream_number_serves_one_file():
    """Two purposes with one number would share bits; the enumeration itself holds no number twice."""
    used: dict[str, set[str]] = {stream.name: set() for stream in Stream}
    for name, module in sources():
        for node in ast.walk(module):
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) == "Stream":
                used[node.attr].add(name)
    assert {stream: files for stream, files in used.items() if len(files) != 1} == {}
    assert len({int(stream) for stream in Stream.__members__.values()}) == len(Stream.__members__)


def test_stream_numbers_are_pinned():
    assert [int(stream) for stream in Stream] == PINNED_STREAMS
    assert hash64(5, Stream.TRAINING_NOISE, 2).item() == signed(reference_hash(5, 31, 2))
