"""What is worked out of the cells: paired differences, saved passes, frontiers."""

import numpy as np
import pytest
import torch

from prime_v2.eval.intervals import Clusters
from prime_v2.studies.quality.findings import best_at_equal_passes, first_passes, frontiers, passes_of_digits
from prime_v2.studies.quality.texts import HeldOut

TEXT = HeldOut(torch.zeros(12, 10, dtype=torch.long), np.repeat(np.arange(6), 2), "documents")
NOISE = np.random.default_rng(0).normal(size=12)


def law_cell(sampler: str, passes: int, nats_per_token: float, is_exact: bool = True) -> dict:
    nats = 10 * nats_per_token + NOISE - NOISE.mean()
    law = {"is_exact": is_exact, "mean_passes": float(passes), "nats_per_token": nats_per_token}
    law["nats_of_sequences"] = nats.tolist()
    return {"model": "m", "sampler": sampler, "passes": passes, "prompt": 0, "temperature": 1.0, "law": law}


def test_the_best_sampler_has_the_lowest_nats_and_differences_are_paired_over_documents():
    cells = [law_cell("margin", 8, 2.5), law_cell("ancestral", 8, 2.75, is_exact=False), law_cell("margin", 4, 3)]
    cells[1]["law"]["nats_of_sequences"][0] += 1
    (row,) = best_at_equal_passes(cells, TEXT)
    assert (row["best"], row["sampler"], row["is_exact"]) == ("margin", "ancestral", False)
    assert row["difference"] == pytest.approx((2.5 * 12 + 1) / 120)
    clusters = Clusters([2] * 6, [400] * 6, "documents")
    expected = clusters.ratio(np.array([3.5] + [2.5] * 11), np.full(12, 10)).interval()
    assert row["interval_95"] == pytest.approx(expected), "what all windows share has dropped out"


def test_bounds_of_another_law_are_not_compared():
    own = law_cell("remasking", 8, 2.0)
    own["law"]["mean_passes"] = None
    assert best_at_equal_passes([own, law_cell("margin", 8, 2.5)], TEXT) == []


@pytest.mark.parametrize(("target", "expected"), [(5, 1), (4, 1), (3, 2), (2.5, 2 * 2**0.5), (2, 4), (1.9, np.inf)])
def test_the_passes_that_reach_a_target_are_read_off_lines_over_log_passes(target, expected):
    assert first_passes(np.array([4.0, 3.0, 2.0]), np.array([1.0, 2.0, 4.0]), target) == pytest.approx(expected)


def test_digits_that_are_as_good_in_half_the_passes_have_a_share_of_one_half():
    token = [law_cell("margin", passes, nats) for passes, nats in ((2, 4), (4, 3), (8, 2))]
    digit = [law_cell("margin,unit=digit", passes, nats) for passes, nats in ((1, 4), (2, 3), (4, 2))]
    rows = passes_of_digits([*token, *digit, law_cell("entropy", 8, 1)], TEXT)
    assert [(row["rule"], row["passes"], row["reached"]) for row in rows] == [
        ("margin", 2, "at once"),
        ("margin", 4, "yes"),
        ("margin", 8, "yes"),
    ]
    for row in rows:
        assert row["share"] == pytest.approx(0.5)
        assert row["interval_95"] == pytest.approx([0.5, 0.5], rel=0.05), "the noise is common to all"


def test_digits_that_never_get_there_say_so():
    cells = [law_cell("margin", 8, 2), law_cell("margin,unit=digit", 4, 4), law_cell("margin,unit=digit", 8, 3)]
    (row,) = passes_of_digits(cells, TEXT)
    assert (row["share"], row["reached"], row["interval_95"]) == (None, "no", [None, None])


def set_cell(temperature: float, entropy: float, nats: float, spread: float = 0.0) -> dict:
    noise = spread * np.random.default_rng(0).normal(size=40)
    samples = {
        "entropy": {"value": entropy},
        "generative_perplexity": {"value": float(np.exp(nats))},
        "nats_of_samples": (10 * nats + noise - noise.mean()).tolist(),
        "tokens_of_samples": 10,
        "entropy_of_samples": [entropy] * 40,
    }
    cell = {"model": "m", "sampler": "s", "passes": 4, "prompt": 0, "temperature": temperature}
    return {**cell, "law": None, "samples": samples}


def real_text(entropy: float, spread: float = 0.0) -> tuple[dict, np.ndarray]:
    """What `frontiers` reads of 40 real texts, and that each is of a document of its own."""
    noise = spread * np.random.default_rng(1).normal(size=40)
    texts = (entropy + noise - noise.mean()).tolist()
    return {"0": {"entropy": {"value": entropy}, "entropy_of_samples": texts}}, np.arange(40)


def test_a_frontier_is_read_at_the_entropy_of_real_text():
    cells = [set_cell(0.5, 2.0, 1.0), set_cell(1.0, 3.0, 2.0), set_cell(1.5, 4.0, 5.0)]
    (found,) = frontiers(cells, *real_text(3.5))
    assert found["temperatures"] == [0.5, 1.0, 1.5]
    assert found["at_real_entropy"] == pytest.approx(np.exp(3.5))
    assert found["interval_95"] == pytest.approx([np.exp(3.5)] * 2), "no spread"
    spread = [set_cell(0.5, 2.0, 1.0, 1.0), set_cell(1.0, 3.0, 2.0, 1.0)]
    low, high = frontiers(spread, *real_text(2.0))[0]["interval_95"]
    assert np.log([low, high]) == pytest.approx([1 - 0.1 * 1.96 / 40**0.5, 1 + 0.1 * 1.96 / 40**0.5], abs=0.008)


def test_the_interval_of_a_frontier_has_the_error_of_the_entropy_of_real_text():
    """The frontier rises by one nat a nat of entropy, so the interval is that of the mean entropy of the texts."""
    cells = [set_cell(0.5, 1.0, 1.0), set_cell(1.0, 5.0, 5.0)]
    low, high = frontiers(cells, *real_text(3.0, spread=1.0))[0]["interval_95"]
    assert np.log([low, high]) == pytest.approx([3 - 1.96 / 40**0.5, 3 + 1.96 / 40**0.5], abs=0.08)
    pairs = np.repeat(np.arange(20), 2)  # two texts of a document are resampled together
    texts, _ = real_text(3.0)
    texts["0"]["entropy_of_samples"] = (3 + np.where(pairs % 2, 1.0, -1.0)).tolist()
    low, high = frontiers(cells, texts, pairs)[0]["interval_95"]
    assert np.log([low, high]) == pytest.approx([3 - 1.96 / 20**0.5, 3 + 1.96 / 20**0.5], abs=0.08)


def test_a_frontier_that_ends_near_the_entropy_of_real_text_has_no_interval():
    """Half of the resamples lie beyond the largest entropy of the frontier."""
    (found,) = frontiers([set_cell(0.5, 1.0, 1.0), set_cell(1.0, 3.0, 3.0)], *real_text(3.0, spread=1.0))
    assert found["at_real_entropy"] == pytest.approx(np.exp(3)) and found["interval_95"] is None


def test_a_frontier_that_does_not_reach_the_entropy_of_real_text_has_no_number_there():
    (found,) = frontiers([set_cell(0.5, 2.0, 1.0), set_cell(1.0, 3.0, 2.0)], *real_text(3.5))
    assert (found["at_real_entropy"], found["interval_95"]) == (None, None)
    assert frontiers([set_cell(0.5, 2.0, 1.0)], None, np.arange(40)) == []
