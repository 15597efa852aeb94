"""The paper's loss of a perfect model falls below the entropy; the bounds do not. Exact, by enumeration, in seconds.

    python docs/paper_loss.py                                                                       # print the table
    python docs/paper_loss.py --output results/paper_loss.json --figure docs/paper_loss.png         # as in the docs

Nothing is trained or sampled. The model is the optimal denoiser: its q is the true posterior of an enumerable law, so
the mean of -log q over data and states is a conditional entropy, and each loss is a sum of conditional entropies over
all sets of hidden units with the exact weights of the count form (docs/derivation.md, "Bounds"):
    P(k) = 1/n,  each k-subset 1/C(n, k),  weight n/k,  so a set of k hidden units counts 1/(k C(n, k)).
All numbers are nats per token. The paper's loss (arXiv:2603.16077) is no bound for S > 1 and is never exponentiated.
The script stops when a bound is not the entropy.
"""

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import entr
from torch import Tensor

from prime_v2.code_table_prime_v2 import build_code_table, digits_needed
from prime_v2.diffusion_prime_v2 import RevealOrder, is_bound
from prime_v2.likelihood_prime_v2 import SAMPLED_METHODS
from prime_v2.output.atomic import write_json
from prime_v2.output.figures import new_figure, save_figure
from prime_v2.output.records import code_version, make_record

PAPERS_LOSS = "paper_loss"
METHODS = ("subtoken", "token", "nested", "chain", PAPERS_LOSS)
VOCAB_SIZE, BASES = 4096, (4096, 64, 16, 8, 4, 2)  # 4096 is a power of each, so every code is used
SEQUENCE_VOCAB_SIZE, SEQUENCE_LENGTH, SEQUENCE_BASES = 16, 3, (16, 4, 2)
SHUFFLE_RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)
SHUFFLE_SEEDS = tuple(range(8))
TOLERANCE = 1e-9  # nats a token, between a bound and the entropy: float64 sums of under 100,000 terms of order 1

LAWS = {
    "two_tokens": "ids 0 and 2**k - 1 of 4,096, half each: unshuffled, their codes differ in the last k digits",
    "zipf": "one token of 4,096, p(id) proportional to 1 / (id + 1)",
    "sequences": "three tokens of 16, p(first) proportional to 1 / (id + 1), p(next | last) proportional to "
    "exp(-|next - last| / 2) / (next + 1)",
}


@dataclass(frozen=True)
class Case:
    """A law with a form of its digits. `differing_digits` is the k of "two_tokens", else None."""

    law: str
    base: int
    shuffle_ratio: float
    differing_digits: int | None = None

    @property
    def num_subtokens(self) -> int:
        return digits_needed(SEQUENCE_VOCAB_SIZE if self.law == "sequences" else VOCAB_SIZE, self.base)

    def probabilities(self) -> np.ndarray:
        """The law over token ids, (V,) * L float64."""
        if self.law == "two_tokens":
            return two_tokens_law(self.differing_digits)
        return zipf_law(VOCAB_SIZE) if self.law == "zipf" else sequence_law(SEQUENCE_VOCAB_SIZE, SEQUENCE_LENGTH)


def all_cases() -> Iterator[Case]:
    for k in range(1, digits_needed(VOCAB_SIZE, 2) + 1):
        yield Case("two_tokens", 2, 0.0, k)
    for base in BASES:
        for ratio in SHUFFLE_RATIOS if base == 2 else (0.0, 1.0):
            yield Case("zipf", base, ratio)
    for base in SEQUENCE_BASES:
        for ratio in (0.0, 1.0):
            yield Case("sequences", base, ratio)


def two_tokens_law(differing_digits: int) -> np.ndarray:
    law = np.zeros(VOCAB_SIZE)
    law[[0, 2**differing_digits - 1]] = 0.5
    return law


def zipf_law(vocab_size: int) -> np.ndarray:
    """p(id) = 1 / (id + 1), normalised: ids by frequency, as in a BPE vocabulary, roughly."""
    weights = 1 / np.arange(1, vocab_size + 1)
    return weights / weights.sum()


def sequence_law(vocab_size: int, length: int) -> np.ndarray:
    """A Markov chain whose next id is near the last: neighbouring tokens depend, and so do their digits."""
    first, ids = zipf_law(vocab_size), np.arange(vocab_size)
    following = first * np.exp(-np.abs(ids[:, None] - ids) / 2)  # (V, V), row: the last id
    following /= following.sum(1, keepdims=True)
    law = first
    for _ in range(length - 1):
        law = law[..., None] * following
    return law


def visible_entropies(law: np.ndarray, codes: Tensor, base: int) -> Tensor:
    """Entropy in nats of the visible digits, for every set of visible ones of the L * S digits.

    law (V,) * L; codes (V, S). Returns (2**n,) float64, n = L * S: entry `index_of(visible)`; the last is the entropy
    of the law, the first 0. Enumerates all (base + 1)**n states with their probabilities; `base` is the masked digit.
    """
    digits = codes.numpy()[np.indices(law.shape).reshape(law.ndim, -1)]  # (L, V**L, S)
    digits = np.moveaxis(digits, 1, -1).reshape(-1, law.size)  # (n, V**L)
    states = np.zeros((base,) * len(digits))
    states[tuple(digits)] = law.ravel()
    for axis in range(states.ndim):
        states = np.concatenate([states, states.sum(axis, keepdims=True)], axis)
    nats = entr(states)  # -p log p, 0 for p = 0
    for axis in range(nats.ndim):
        shown, masked = np.split(nats, [base], axis)
        nats = np.concatenate([masked, shown.sum(axis, keepdims=True)], axis)
    return torch.from_numpy(nats.ravel())


def index_of(visible: Tensor) -> Tensor:
    """Visible digits (..., L, S) bool to their place (...) in `visible_entropies`; the first digit counts most."""
    flat = visible.flatten(-2).long()
    return (flat << torch.arange(flat.shape[-1] - 1, -1, -1)).sum(-1)


def expected_nats(entropies: Tensor, order: RevealOrder, objective: str, length: int) -> float:
    """Expectation of a loss in nats per sequence, over the law and the noise, for the optimal denoiser.

    Per hidden unit the nats of `PrimeV2ForMaskedDiffusion.sequence_nll`, with H(asked | visible) =
    H(visible and asked) - H(visible) for the mean of -log q. entropies from `visible_entropies`.
    """
    units = order.units_per_token
    n = length * units
    hidden = ((torch.arange(1, 2**n).unsqueeze(1) >> torch.arange(n)) & 1).bool()  # (M, n), all but "nothing hidden"
    count_weight = torch.tensor([0.0, *(1 / (k * math.comb(n, k)) for k in range(1, n + 1))], dtype=torch.double)
    weight = count_weight[hidden.sum(1)]
    hidden = hidden.view(-1, length, units)
    visible = order.visible_digits(hidden)  # (M, L, S)
    before = entropies[index_of(visible)]
    nats = torch.zeros(len(hidden), dtype=torch.double)
    for i in range(length):
        hidden_count = hidden[:, i].sum(-1)
        if objective == "joint":  # the joint of the token's digits, once, however many are hidden
            asked = [(torch.ones(order.num_subtokens, dtype=torch.bool), hidden_count > 0)]
        elif order.kind == "digit":  # the marginal of each hidden digit
            asked = [(row, hidden[:, i, j]) for j, row in enumerate(torch.eye(order.num_subtokens, dtype=torch.bool))]
        else:  # what the next reveal shows, for each hidden unit
            asked = [(order.next_visible(hidden_count), hidden_count)]
        for digits, times in asked:
            after = visible.clone()
            after[:, i] |= digits
            nats += times * (entropies[index_of(after)] - before)
    return float(weight @ nats)


def chain_nats(entropies: Tensor, num_subtokens: int, length: int) -> float:
    """Tokens left to right, each from those before it, in nats per sequence."""
    visible = torch.ones(length + 1, length).tril(-1).bool().unsqueeze(-1).expand(-1, -1, num_subtokens)
    return float(entropies[index_of(visible)].diff().sum())


def measure(law: np.ndarray, codes: Tensor, base: int) -> dict[str, dict[str, Any]]:
    """Nats per token of each method, whether it is a bound, and the entropy; law (V,) * L, codes (V, S).

    Raises ArithmeticError when a bound is not the entropy, which for an optimal denoiser it must be.
    """
    length, num_subtokens = law.ndim, codes.shape[1]
    entropies = visible_entropies(law, codes, base)
    entropy = float(entropies[-1]) / length
    found = {}
    for method in METHODS:
        if method == "chain":
            nats, bound = chain_nats(entropies, num_subtokens, length), True
        else:
            kind, objective = SAMPLED_METHODS[method]
            stages = tuple(range(1, num_subtokens + 1)) if kind == "nested" else ()  # one digit a stage
            order = RevealOrder(kind, num_subtokens, stages)
            nats = expected_nats(entropies, order, objective, length)
            bound = is_bound(objective, "elbo", num_subtokens, order, None)
        if bound and abs(nats / length - entropy) > TOLERANCE:
            raise ArithmeticError(
                f"{method} is {nats / length} nats/token, but a bound here is the entropy, {entropy}"
            )
        found[method] = {"is_bound": bound, "nats_per_token": nats / length, "entropy": entropy}
    return found


def rows_of(case: Case) -> list[dict[str, Any]]:
    """A row for each method: the mean over the shuffles, the lowest and the highest, in nats per token."""
    law = case.probabilities()
    seeds = SHUFFLE_SEEDS if case.shuffle_ratio > 0 else SHUFFLE_SEEDS[:1]
    shuffles = []
    for seed in seeds:
        codes = build_code_table(len(law), case.base, case.num_subtokens, seed, case.shuffle_ratio)
        shuffles.append(measure(law, codes, case.base))
    rows = []
    for method in METHODS:
        nats = [each[method]["nats_per_token"] for each in shuffles]
        rows.append(
            {
                "law": case.law,
                "differing_digits": case.differing_digits,
                "base": case.base,
                "num_subtokens": case.num_subtokens,
                "shuffle_ratio": case.shuffle_ratio,
                "shuffles": len(seeds),
                "method": method,
                "is_bound": shuffles[0][method]["is_bound"],
                "nats_per_token": sum(nats) / len(nats),
                "lowest": min(nats),
                "highest": max(nats),
                "entropy": shuffles[0][method]["entropy"],
            }
        )
    return rows


def run() -> dict[str, Any]:
    """Every case: what the record holds."""
    started = time.perf_counter()
    rows = [row for case in all_cases() for row in rows_of(case)]
    return {
        "laws": LAWS,
        "unit": "nats per token",
        "seconds": time.perf_counter() - started,
        "largest_bound_minus_entropy": max(
            abs(row[end] - row["entropy"]) for row in rows if row["is_bound"] for end in ("lowest", "highest")
        ),
        "rows": rows,
    }


def select(rows: list[dict[str, Any]], **fields: Any) -> list[dict[str, Any]]:
    """The rows with these values, in order."""
    return [row for row in rows if all(row[key] == value for key, value in fields.items())]


def describe(results: dict[str, Any]) -> str:
    """The record as text: a line for each case."""
    lines = [
        "nats per token of the optimal denoiser, exact; the bounds are subtoken, token, nested and chain",
        f"{'law':12} {'k':>2} {'b':>5} {'S':>3} {'shuffled':>8} {'entropy':>8} {'bounds':>8} {'paper':>8} "
        f"{'lowest':>8} {'highest':>8}  paper's loss is",
    ]
    for row in select(results["rows"], method=PAPERS_LOSS):
        same = {key: row[key] for key in ("law", "differing_digits", "base", "shuffle_ratio")}
        bound = max(each["highest"] for each in select(results["rows"], **same) if each["method"] != PAPERS_LOSS)
        lines.append(
            f"{row['law']:12} {row['differing_digits'] or '':>2} {row['base']:>5} {row['num_subtokens']:>3} "
            f"{row['shuffle_ratio']:>8.0%} {row['entropy']:>8.4f} {bound:>8.4f} {row['nats_per_token']:>8.4f} "
            f"{row['lowest']:>8.4f} {row['highest']:>8.4f}  {'a bound' if row['is_bound'] else 'no bound'}"
        )
    lines.append(
        f"largest difference of a bound from the entropy: {results['largest_bound_minus_entropy']:.1e}; "
        f"{results['seconds']:.1f} s"
    )
    return "\n".join(lines)


# Vermillion and blue of Okabe and Ito's palette, distinct for the common colour blindnesses.
LOSS_COLOUR, BOUND_COLOUR, ENTROPY_COLOUR = "#D55E00", "#0072B2", "0.25"
# Hollow and nested, so that coinciding values stay visible: marker and size.
BOUND_MARKERS = {"subtoken": ("o", 4), "token": ("s", 8), "nested": ("D", 11)}


def draw(results: dict[str, Any], path: str | Path) -> Path:
    """Save the figure of the three effects: digits that differ, the share shuffled, the base."""
    figure = new_figure(13, 4.9, dpi=130)
    figure.suptitle("What each loss gives a perfect model")
    left, middle, right = figure.subplots(1, 3)
    rows = results["rows"]
    _draw_two_tokens(left, select(rows, law="two_tokens"))
    zipf = select(rows, law="zipf")
    _draw_ratios(middle, select(zipf, base=2))
    _draw_bases(right, zipf)
    for axes in (middle, right):
        axes.set_ylim(4.2, 6.4)
    for axes in (left, middle, right):
        axes.set_ylabel("nats per token")
        axes.grid(alpha=0.25)
    return save_figure(figure, path)


def _draw_bounds(axes, rows: list[dict[str, Any]], places: list[float]) -> None:
    axes.axhline(rows[0]["entropy"], color=ENTROPY_COLOUR, linestyle="--", linewidth=1.2)
    for method, (marker, size) in BOUND_MARKERS.items():
        nats = [row["nats_per_token"] for row in select(rows, method=method)]
        style = {"marker": marker, "markersize": size, "markerfacecolor": "none", "linestyle": "none"}
        axes.plot(places, nats, color=BOUND_COLOUR, label=f"{method} NELBO (bound)", **style)


def _write_values(axes, places: list[float], nats: list[float]) -> None:
    """Each value at the lower left of its point, where a falling line is not."""
    style = {"textcoords": "offset points", "ha": "right", "color": LOSS_COLOUR}
    for x, y in zip(places, nats, strict=True):
        axes.annotate(f"{y:.2f}", (x, y), (-1, -14), **style)


def _draw_two_tokens(axes, rows: list[dict[str, Any]]) -> None:
    loss = select(rows, method=PAPERS_LOSS)
    k = [row["differing_digits"] for row in loss]
    _draw_bounds(axes, rows, k)
    axes.plot(k, [row["nats_per_token"] for row in loss], color=LOSS_COLOUR, marker="o", markersize=4)
    axes.text(3.4, 0.25, "paper's loss: ln 2 / k", color=LOSS_COLOUR)
    axes.text(12.3, loss[0]["entropy"] + 0.025, "entropy: ln 2", ha="right", color=ENTROPY_COLOUR)
    axes.legend(loc="center right", bbox_to_anchor=(1, 0.66), frameon=False)
    axes.set(title="Two tokens, half each", xlabel="k, digits in which their codes differ", ylim=(0, 0.78), xticks=k)


def _draw_ratios(axes, rows: list[dict[str, Any]]) -> None:
    loss = select(rows, method=PAPERS_LOSS)
    percent = [100 * row["shuffle_ratio"] for row in loss]
    nats = [row["nats_per_token"] for row in loss]
    _draw_bounds(axes, rows, percent)
    axes.plot(percent, nats, color=LOSS_COLOUR, marker="o", markersize=4)
    lowest, highest = ([row[end] for row in loss] for end in ("lowest", "highest"))
    axes.fill_between(percent, lowest, highest, color=LOSS_COLOUR, alpha=0.25, linewidth=0)
    _write_values(axes, percent, nats)
    entropy = rows[0]["entropy"]
    axes.annotate("", (100, nats[-1]), (100, entropy), arrowprops={"arrowstyle": "<->", "color": ENTROPY_COLOUR})
    axes.text(97, 5.55, f"{entropy - nats[-1]:.2f} nats below", ha="right", color=ENTROPY_COLOUR)
    axes.text(38, 5.13, f"paper's loss, mean\nand range of {loss[-1]['shuffles']} shuffles", color=LOSS_COLOUR)
    axes.text(103, entropy + 0.1, f"entropy {entropy:.2f}", ha="right", color=ENTROPY_COLOUR)
    axes.set(title="Zipf law over 4,096 tokens, b = 2", xlabel="share of the ids shuffled (%)", xticks=percent)
    axes.set_xlim(-16, 108)


def _draw_bases(axes, rows: list[dict[str, Any]]) -> None:
    unshuffled, shuffled = (select(rows, shuffle_ratio=ratio) for ratio in (0.0, 1.0))
    places = list(range(len(BASES)))
    _draw_bounds(axes, shuffled, places)
    for part, line, marker, name in ((unshuffled, ":", "s", "unshuffled"), (shuffled, "-", "o", "shuffled")):
        nats = [row["nats_per_token"] for row in select(part, method=PAPERS_LOSS)]
        axes.plot(places, nats, color=LOSS_COLOUR, linestyle=line, marker=marker, markersize=4)
        _write_values(axes, places[1:], nats[1:])
        axes.text(places[-1] + 0.25, nats[-1] - 0.32, f"paper's loss, {name}", ha="right", color=LOSS_COLOUR)
    axes.text(-0.2, 6.22, "plain MDM: here the loss is a bound", color=ENTROPY_COLOUR)
    names = [f"{row['base']:,}\n{row['num_subtokens']}" for row in select(shuffled, method=PAPERS_LOSS)]
    axes.set_xticks(places, names)
    axes.set(title="Zipf law over 4,096 tokens", xlabel="base b, and below it digits a token S")
    axes.set_xlim(-0.4, len(BASES) - 0.6)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the record here (JSON)")
    parser.add_argument("--figure", type=Path, help="draw the figure here (PNG)")
    options = parser.parse_args(arguments)
    code = code_version()
    results = run()
    print(describe(results))
    if options.figure:
        print(f"figure: {draw(results, options.figure)}")
    if options.output:
        record = make_record("paper_loss", results, seed=SHUFFLE_SEEDS[0], code=code)
        print(f"record: {write_json(options.output, record)}")


if __name__ == "__main__":
    main()
