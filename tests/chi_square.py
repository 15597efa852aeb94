"""Chi-square tests of samples against exact probabilities.

FALSE_ALARM is the probability that such a test fails for a fresh seed. With the fixed seeds of the tests their outcome
does not change from run to run.
"""

import torch
from scipy.stats import chisquare

FALSE_ALARM = 1e-6
ROWS = 20_000  # samples


def assert_follows(samples: torch.Tensor, exact: dict[tuple, float]) -> None:
    """Chi-square test of samples (N, T) against exact probabilities, outcomes expected less than 5 times pooled."""
    possible = {each: p for each, p in exact.items() if p > 0}
    counts = dict.fromkeys(possible, 0)
    for row in samples.tolist():
        assert tuple(row) in counts, f"{row} has probability 0"
        counts[tuple(row)] += 1
    cells = {}
    for each, p in possible.items():
        cell = each if p * len(samples) >= 5 else "rare"
        expected, seen = cells.get(cell, (0.0, 0))
        cells[cell] = expected + p * len(samples), seen + counts[each]
    expected, seen = zip(*cells.values(), strict=True)
    assert chisquare(seen, expected).pvalue > FALSE_ALARM


def distance(p: dict[tuple, float], q: dict[tuple, float]) -> float:
    """Total variation of two laws. A distance of d adds at least 4 ROWS d**2 to the statistic: 32 for 0.02."""
    return sum(abs(p[each] - q[each]) for each in p) / 2
