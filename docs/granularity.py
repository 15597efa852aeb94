"""Bound and paper's loss against the number of sub-tokens, of a record of `prime-v2 compare granularity`.

Figure 4 of the paper (arXiv:2603.16077) asks the same of its loss, which for S > 1 is no bound.
"""

import re
from pathlib import Path
from typing import Any

from prime_v2.output.figures import new_figure, save_figure

NAME = re.compile(r"S = (\d+)(, shuffled)?")
FORMS = {False: ("unshuffled", "tab:blue", "o"), True: ("shuffled", "tab:red", "s")}


def points(results: dict[str, Any], shuffled: bool) -> list[tuple[int, float, list[float], float]]:
    """(S, bound, its 95% interval, the paper's loss), nats per token, of the runs of one form; S = 1 belongs to both.

    Raises ValueError for a run whose name is not `NAME`.
    """
    found = []
    for each in results["best"]:
        match = NAME.fullmatch(each["name"])
        if not match:
            raise ValueError(f"the run {each['name']} is not named as in granularity, e.g. S = 4, shuffled")
        if int(match[1]) == 1 or bool(match[2]) == shuffled:
            bound = each["bound"]
            loss = each["paper_loss"]["nats_per_token"]
            found.append((int(match[1]), bound["nats_per_token"], bound["interval_95"], loss))
    return sorted(found)


def draw(results: dict[str, Any], path: str | Path) -> Path:
    """Save the figure: solid lines are bounds with 95% intervals, dashed ones the paper's loss."""
    figure = new_figure(6.4, 4.2, dpi=130)
    axes = figure.subplots()
    axes.axhline(
        results["best"][0]["unigram_entropy"], color="0.3", linestyle=":", label="unigram entropy of the text"
    )
    for shuffled, (form, color, marker) in FORMS.items():
        counts, bounds, intervals, losses = zip(*points(results, shuffled), strict=True)
        below = [bound - low for bound, (low, _) in zip(bounds, intervals, strict=True)]
        above = [high - bound for bound, (_, high) in zip(bounds, intervals, strict=True)]
        axes.errorbar(
            counts, bounds, [below, above], color=color, marker=marker, capsize=3, label=f"bound, digits {form}"
        )
        axes.plot(
            counts, losses, color=color, marker=marker, fillstyle="none", linestyle="--",
            label=f"paper's loss, {form} (no bound)",
        )  # fmt: skip
    axes.set(
        xlabel="digits a token, S (1: MDM)",
        ylabel="nats per token, test split",
        title="More digits: a lower loss, a higher bound",
    )
    axes.set_xticks(counts)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    return save_figure(figure, path)
