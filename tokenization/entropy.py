"""Sub-token entropy of a corpus: the paper's Table 1 for any tokenizer and text (MDM-Prime-v2, arXiv:2603.16077).

For the unigram distribution p of a corpus, H_j is the entropy of digit j of a token drawn from p. The table shows the
mean of H_j over the S digits in units of log b, so 1 is the ceiling. The digits are dependent: the sum of their
entropies is at least their joint entropy, which is H(p) for every code table, because a table is injective. So
shuffling moves the mean, never the joint.
"""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from prime_v2.code_table_prime_v2 import base_needed, build_code_table, digits_needed
from prime_v2.output.tables import aligned
from prime_v2.tokenization.plain_text import in_batches, plain_ids

DESIGN_SPACE = (2, 3, 4, 6, 8)  # the paper's numbers of sub-tokens; the binary one depends on V and is added to them
SHUFFLE_RATIOS = {"unshuffled": 0.0, "shuffled": 1.0, "shuffled_25_percent": 0.25}


def count_tokens(documents: Iterable[str], tokenizer: Any) -> np.ndarray:
    """How often each token occurs in the documents, (V,) int64; special tokens are neither added nor read in the text.

    tokenizer: a PrimeV2Tokenizer or any fast Transformers tokenizer (V is then its length).
    """
    table = getattr(tokenizer, "code_table", None)
    vocab_size = len(tokenizer) if table is None else len(table)
    counts = np.zeros(vocab_size, dtype=np.int64)
    for batch in in_batches(documents):
        for ids in plain_ids(tokenizer, batch):
            counts += np.bincount(np.asarray(ids, dtype=np.int64), minlength=vocab_size)
    return counts


def subtoken_entropies(counts: Any, code_table: Any, base: int) -> np.ndarray:
    """Entropy of each digit in units of log b, (S,) float64 in [0, 1], of a token drawn in proportion to the counts.

    counts (V,), not negative; code_table (V, S) with digits in 0..base-1.
    """
    codes = np.asarray(code_table)
    probabilities = _probabilities(counts, len(codes))
    marginals = [np.bincount(digits, weights=probabilities, minlength=base) for digits in codes.T]
    return np.array([_entropy_nats(marginal) for marginal in marginals]) / math.log(base)


def entropy_table(
    counts: Any, vocab_size: int, shuffle_seed: int = 0, shuffle_domain: str = "codes"
) -> list[dict[str, float]]:
    """One row for each S of the design space with the smallest base that fits, the binary row last; JSON-ready.

    Keys: `num_subtokens`; `base`; `unshuffled`, `shuffled`, `shuffled_25_percent`, the mean entropy of a sub-token in
    units of log b; `joint_per_subtoken`, the joint entropy of a token's digits over S in the same unit, which no
    shuffle's mean can be below; `joint_nats`, the same joint entropy H(p) in nats.
    """
    joint_nats = _entropy_nats(_probabilities(counts, vocab_size))
    binary = digits_needed(vocab_size, 2)
    rows = []
    for num_subtokens in [*(size for size in DESIGN_SPACE if size < binary), binary]:
        base = base_needed(vocab_size, num_subtokens)
        row: dict[str, float] = {"num_subtokens": num_subtokens, "base": base}
        for name, ratio in SHUFFLE_RATIOS.items():
            codes = build_code_table(vocab_size, base, num_subtokens, shuffle_seed, ratio, shuffle_domain)
            row[name] = float(subtoken_entropies(counts, codes, base).mean())
        row["joint_per_subtoken"] = joint_nats / (num_subtokens * math.log(base))
        row["joint_nats"] = joint_nats
        rows.append(row)
    return rows


def render_table(rows: list[dict[str, float]]) -> str:
    """The rows of `entropy_table` as text."""
    table = [["S", "b", "unshuffled", "shuffled", "shuffled 25%", "joint / S"]]
    for row in rows:
        entropies = (row[name] for name in (*SHUFFLE_RATIOS, "joint_per_subtoken"))
        table.append([f"{row['num_subtokens']}", f"{row['base']}", *(f"{each:.4f}" for each in entropies)])
    return (
        f"Mean sub-token entropy in units of log b (1 is the ceiling)\n{aligned(table, right=True)}\n"
        f"Joint entropy of a token's digits: {rows[0]['joint_nats']:.4f} nats in every row and column"
    )


def _probabilities(counts: Any, vocab_size: int) -> np.ndarray:
    """Counts to a distribution (V,) float64."""
    values = np.asarray(counts, dtype=np.float64)
    if values.shape != (vocab_size,):
        raise ValueError(
            f"counts of shape {values.shape}, but the vocabulary has {vocab_size} tokens; give one count each"
        )
    if not (values >= 0).all() or not 0 < values.sum() < math.inf:
        raise ValueError("counts must be finite, not negative and not all zero; use a text with at least one token")
    return values / values.sum()


def _entropy_nats(probabilities: np.ndarray) -> float:
    positive = probabilities[probabilities > 0]
    return float(-(positive * np.log(positive)).sum())
