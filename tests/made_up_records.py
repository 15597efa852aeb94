"""Records of training runs and comparisons of them, made up, for the tests of reports and tables."""

import numpy as np

from prime_v2.studies.compare.config import Comparison, Run
from prime_v2.studies.compare.report import summarise

SEQUENCES, LENGTH = 12, 8  # scored sequences and their tokens
CLUSTERS = [3, 3, 3, 3]  # sequences that share a document
TOKENS = np.array(CLUSTERS) * LENGTH
SIZES = {"": 1000, "16x1": 1000, "32x1": 4000, "64x1": 16000}
FAMILIES = {"MDM": ("MDM", False), "Prime": ("MDM-Prime-v2", False), "ARM": ("ARM", True)}


def record_of(run: Run, shift: float = 0.0) -> dict:
    """As train.py writes it. The nats depend on name, shape, seed and sequence; `shift` is added to each token's."""
    rng = np.random.default_rng([sum(map(ord, run.name + run.shape)), run.seed])
    nats = (4 + shift + np.arange(SEQUENCES) / 5 + rng.normal(0, 0.2, SEQUENCES)) * LENGTH
    family, exact = FAMILIES[run.name]
    mean = nats.sum() / SEQUENCES / LENGTH
    bound = {
        "method": "causal" if exact else "subtoken",
        "is_bound": True,
        "is_exact": exact,
        "nats_per_token": mean,
        "nats_per_token_interval_95": [mean - 0.3, mean + 0.3],
        "stderr": 0.1,
        "degrees": 3.0,
        "num_clusters": 4,
        "interval_over": "documents",
        "num_tokens": SEQUENCES * LENGTH,
        "num_sequences": SEQUENCES,
        "num_samples": 0 if exact else 2,
        "unigram_entropy": 5.5,
        "nats_of_sequences": nats.tolist(),
        "clusters": {
            "sequences": CLUSTERS,
            "squares": TOKENS.tolist(),
            "over": "documents",
            "tokens": TOKENS.tolist(),
        },
    }
    loss = {**bound, "method": "paper_loss", "is_bound": run.name == "MDM", "nats_per_token": mean / 2}
    size, tokens = SIZES[run.shape], 100 * SEQUENCES
    history = [
        {"eval_bound": mean + 20 / step, "eval_bound_stderr": 0.1, "eval_unigram_entropy": 5.4, "tokens": step * 10}
        for step in (1, 10, 100)
    ]
    training = {"parameters": size + 7, "parameters_non_embedding": size, "steps": 100, "tokens": tokens}
    training |= {"flops_6nd": 6 * size * tokens, "flops_measured": 9.0 * size * tokens, "seconds": 90, "device": "cpu"}
    return {
        "command": "train.py",
        "commit": "a" * 40,
        "uncommitted_changes": False,
        "time_utc": "2026-01-01T00:00:00Z",
        "machine": {"accelerator": None, "processor": "made up"},
        "versions": {"torch": "2.0"},
        "results": {
            "family": family,
            "config": {},
            "options": {"seed": run.seed, "block_size": LENGTH},
            "data": {
                "source": "docs",
                "train_tokens": 500,
                "fingerprints": {"train": "t", "dev": "d", "test": f"test{run.seed}"},
            },
            "training": training,
            "evaluation": {"bound": bound, **({} if exact else {"paper_loss": loss})},
            "history": [*history, {"loss": 1.0, "tokens": 5}],
        },
    }


def compared(names=("MDM", "Prime", "ARM"), shapes=("",), budgets=(1e9,), seeds=(0,), **shifts: float):
    """(comparison, runs with records) of all combinations."""
    runs = tuple(
        Run(name, shape, budget, seed, {})
        for budget in budgets
        for shape in shapes
        for seed in seeds
        for name in names
    )
    return Comparison("made_up", "6nd", "MDM", runs), [
        (run, record_of(run, shifts.get(run.name, 0.0))) for run in runs
    ]


def settings_compared():
    """Two settings of one size: a setting is at no edge of the sizes."""
    comparison, trained = compared(names=("MDM", "ARM"), shapes=("16x1", "32x1"))
    for run, record in trained:
        record["results"]["training"]["parameters_non_embedding"] = 1000
        record["results"]["history"][2]["eval_bound"] = 1.0 if (run.shape == "32x1") == (run.name == "ARM") else 2.0
    return summarise(comparison, trained)
