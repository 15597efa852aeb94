"""Clusters of sequences, ratios over them and how often their intervals cover on simulated text: eval/intervals.py."""

import ast
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from prime_v2.eval.intervals import STRETCHES, cluster, half_width, mean_of, plus_minus, ratio, standard_errors_as_sure

LENGTH = 32  # tokens of a sequence
REPEATS = 2000  # simulated texts: a coverage of 95% varies by 0.5%


def simulated(rng: np.random.Generator, sequences: int, mean: float, spread: float) -> tuple[np.ndarray, np.ndarray]:
    """Nats of each token (T,), 5 in expectation, and which tokens end a document (T,).

    The tokens of a document share a normal effect of deviation 1, beside noise of their own of deviation 1.5. Lengths
    of documents are log-normal with this mean and this deviation of the logarithm.
    """
    total = sequences * LENGTH
    nats, ends, place = 5 + rng.normal(0, 1.5, total), np.zeros(total, dtype=bool), 0
    while place < total:
        length = max(1, int(rng.lognormal(np.log(mean) - spread**2 / 2, spread)))
        nats[place : place + length] += rng.normal()
        place += length
        if place <= total:
            ends[place - 1] = True
    return nats, ends


def holds(interval: list[float], value: float) -> bool:
    return interval[0] <= value <= interval[1]


@pytest.mark.parametrize(
    ("sequences", "mean", "spread", "naive_at_most"),
    [
        (64, 8, 0.0, 0.97),  # short documents of equal length: sequences are nearly independent
        (64, 8, 1.0, 0.92),
        (256, 32, 1.0, 0.75),
        (256, 128, 0.0, 0.70),
        (256, 320, 0.0, 0.52),
        (64, 32, 0.5, 0.90),
        (64, 128, 0.0, 0.70),
    ],
)
def test_clustered_intervals_cover_text_with_correlation_inside_documents(sequences, mean, spread, naive_at_most):
    """Between 93% and 97% of 2,000 hold the truth. A true coverage of 95% is outside with a chance of 4e-5; that of
    sequences taken as independent is given too. Windows cut documents at any place."""
    rng, covered, naive = np.random.default_rng(0), 0, 0
    for _ in range(REPEATS):
        nats, ends = simulated(rng, sequences, mean, spread)
        sums, lengths = nats.reshape(sequences, LENGTH).sum(1), np.full(sequences, LENGTH)
        clusters = cluster(lengths, ends)
        assert clusters.over == "documents"
        covered += holds(clusters.ratio(sums, lengths).interval(), 5)
        naive += holds(mean_of(sums / LENGTH).interval(), 5)
    assert 0.93 <= covered / REPEATS <= 0.97
    assert naive / REPEATS <= naive_at_most


def test_paired_differences_and_ratios_to_bytes_cover_too():
    """Two models share the effect of a document in part; bytes a token vary from document to document.

    As above, a false alarm has a chance of 4e-5 each.
    """
    rng, paired, per_byte = np.random.default_rng(1), 0, 0
    lengths = np.full(96, LENGTH)
    for _ in range(REPEATS):
        first, ends = simulated(rng, 96, 48, 0.3)
        document = np.cumsum(ends) - ends  # number of each token's document
        gap = rng.normal(0, 0.5, document[-1] + 1)[document] + rng.normal(0, 1, len(first))
        size = rng.uniform(2, 6, document[-1] + 1)[document]  # bytes of a token, 4 in expectation
        clusters = cluster(lengths, ends)
        sums = [each.reshape(96, LENGTH).sum(1) for each in (first, first + 0.2 + gap, size)]
        paired += holds(clusters.ratio(sums[1] - sums[0], lengths).interval(), 0.2)
        per_byte += holds(clusters.ratio(sums[0], sums[2]).interval(), 5 / 4)
    assert 0.93 <= paired / REPEATS <= 0.97
    assert 0.93 <= per_byte / REPEATS <= 0.97


def test_stretches_cover_one_long_text_whose_tokens_are_alike_nearby():
    """An autoregression over about two sequences; as independent sequences 66% cover. 93% to 97%: chance 4e-5."""
    rng, covered, naive, sequences = np.random.default_rng(2), 0, 0, 400
    persistence = np.exp(-1 / 2)
    for _ in range(REPEATS):
        noise = rng.normal(0, np.sqrt(1 - persistence**2), sequences)
        level = np.empty(sequences)
        level[0] = rng.normal()
        for i in range(1, sequences):
            level[i] = persistence * level[i - 1] + noise[i]
        sums, lengths = LENGTH * (5 + level), np.full(sequences, LENGTH)
        clusters = cluster(lengths, np.zeros(sequences * LENGTH, dtype=bool))
        assert (clusters.over, len(clusters)) == ("stretches", STRETCHES)
        covered += holds(clusters.ratio(sums, lengths).interval(), 5)
        naive += holds(mean_of(sums / LENGTH).interval(), 5)
    assert 0.93 <= covered / REPEATS <= 0.97
    assert naive / REPEATS < 0.75


def ends_at(total: int, *places: int) -> np.ndarray:
    ends = np.zeros(total, dtype=bool)
    ends[[place - 1 for place in places]] = True
    return ends


def test_a_cluster_holds_whole_documents_or_cuts_them_where_it_matters_little():
    lengths = [4, 4, 4, 4]
    assert cluster(lengths, ends_at(16, 4, 8, 12, 16)).sequences == [1, 1, 1, 1]
    assert cluster(lengths, ends_at(16, 8, 16)).sequences == [2, 2]
    assert cluster(lengths, ends_at(16, 6, 16)).over == "stretches", "6 + 10: a cut leaves too much on both sides"
    assert cluster([4] * 90, ends_at(360, 4, 356, 360)).sequences == [1, 88, 1]
    assert cluster([4] * 90, ends_at(360, 4, 360)).sequences == [1, 89], "the end of a document is no cluster"
    many = cluster([40] * 3, ends_at(120, *range(3, 121, 3)))
    assert (many.sequences, many.over) == ([1, 1, 1], "documents"), "cut documents of 3 tokens do not matter"
    assert many.squares == [13 * 9 + 1, 2**2 + 12 * 9 + 2**2, 1 + 13 * 9]


def test_sequences_of_unequal_length_and_a_last_document_without_end():
    clusters = cluster([5, 3, 4], ends_at(12, 5, 8))
    assert clusters.sequences == [1, 1, 1]
    assert clusters.squares == [25, 9, 16]
    assert clusters.sums([1.0, 2.0, 3.5]).tolist() == [1.0, 2.0, 3.5]
    assert cluster([5], ends_at(5, 2)).sequences == [1]
    assert cluster([5], ends_at(5, 2)).ratio([7.0], [5]).interval() is None


def test_the_ratio_of_equal_clusters_is_a_mean_with_students_interval():
    values = np.array([1.0, 4.0, 2.5, 7.0])
    found = mean_of(values)
    assert found.value == values.mean()
    assert found.stderr == pytest.approx(stats.sem(values))
    assert found.degrees == pytest.approx(3)
    assert found.interval() == pytest.approx([*stats.t.interval(0.95, 3, values.mean(), stats.sem(values))])


def test_the_error_is_the_jackknifes_to_first_order():
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 20, size=200).astype(float)
    nats = lengths * 3 + rng.normal(size=200) * lengths
    without = (nats.sum() - nats) / (lengths.sum() - lengths)
    jackknife = np.sqrt(199 / 200 * ((without - nats.sum() / lengths.sum()) ** 2).sum())
    assert ratio(nats, lengths, lengths**2).stderr == pytest.approx(jackknife)


def test_degrees_are_those_of_the_variance_of_normal_residuals():
    """Satterthwaite's 2 E^2 / Var of the squared error over 40,000 draws, whose ratio varies by some 2%."""
    rng, lengths = np.random.default_rng(0), np.array([1.0, 2, 2, 3, 8])
    errors = rng.normal(size=(40_000, 5)) * lengths
    squares = [ratio(each, lengths, lengths**2).stderr ** 2 for each in errors]
    expected = 2 * np.mean(squares) ** 2 / np.var(squares)
    assert ratio(errors[0], lengths, lengths**2).degrees == pytest.approx(expected, rel=0.08)


def test_all_that_lies_in_one_cluster_has_no_interval():
    assert ratio([3.0, 0.0], [2.0, 0.0], [4, 0]).interval() is None
    assert mean_of([3.0]).interval() is None


def test_the_half_width_is_students_or_without_degrees_the_normal():
    assert half_width(2.0) == pytest.approx(2 * 1.959964)
    assert half_width(2.0, 4) == pytest.approx(2 * stats.t.ppf(0.975, 4))
    assert half_width(None, 4) == 0
    assert standard_errors_as_sure(1.959964, 4) == pytest.approx(stats.t.ppf(0.975, 4))


def test_the_printed_half_is_that_of_the_interval_and_of_older_records_from_the_error():
    score = {"nats_per_token": 5.0, "stderr": 0.1, "nats_per_token_interval_95": [4.7, 5.3]}
    assert plus_minus(score) == " ± 0.300"
    assert plus_minus({"nats_per_token": 5.0, "stderr": 0.1}, 4, "+-") == " +- 0.1960"
    assert plus_minus({"nats_per_token": 5.0, "stderr": None, "nats_per_token_interval_95": None}) == ""


def test_no_other_file_has_a_97_5_percent_point_of_its_own():
    root, found = Path(__file__).parents[2], []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if name.parts[0] in ("tests", "build") or any(part.startswith(".") for part in name.parts):
            continue
        if str(name) == "eval/intervals.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            number = isinstance(node, ast.Constant) and isinstance(node.value, float) and 1.95 < node.value < 1.97
            quantile = isinstance(node, ast.Attribute) and node.attr == "ppf"
            if number or quantile:
                found.append(f"{name}:{node.lineno}")
    assert found == []
