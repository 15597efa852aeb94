"""The benchmark of corrector steps against the plain loops of tests/enumeration.py."""

import runpy
from pathlib import Path

import pytest
import torch
from enumeration import all_sequences, chain_law, correlated_law, optimal_uniform, reverse_chain

from prime_v2.generation_uniform_process_prime_v2 import steps_from_noise

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "corrector.py"


def test_its_first_law_and_ancestral_distance_are_those_of_the_loops():
    """To 1e-9: sums of 27 float64 terms, and a network's softmax of logs."""
    benchmark, states = runpy.run_path(str(FILE)), all_sequences(3, 3)
    law = correlated_law(3, 3, seed=2)
    assert torch.equal(benchmark["random_law"](states), law)
    start = torch.full((27,), 1 / 27, dtype=torch.double)
    naive = chain_law(reverse_chain(optimal_uniform(law, 3, 3), 5, 3), start)
    found = benchmark["distance"](law, states, steps_from_noise(5), 3, 0)
    assert found == pytest.approx(float((naive - law).abs().sum()) / 2, abs=1e-9)


def test_a_corrector_step_with_one_token_leaves_the_noised_chain_as_it_is_and_one_with_two_does_not():
    benchmark, states, t = runpy.run_path(str(FILE)), all_sequences(2, 5), 0.1
    law = benchmark["markov_chain"](states, 0.9)
    assert float(law.sum()) == pytest.approx(1)
    same = states[:, None] == states[None]
    noised = law @ ((1 - t) * same.double() + t / 2).prod(-1)
    moved = [
        float((noised @ benchmark["transition"](law, states, t, t, 2, each) - noised).abs().max()) for each in (1, 2)
    ]
    assert moved[0] < 1e-12 and moved[1] > 1e-3  # sums of 32 float64 terms
