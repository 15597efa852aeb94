"""The documented reproduction: the paper's loss below the entropy, the bounds on it (docs/paper_loss.py)."""

import importlib.util
import itertools
import math
import sys
from pathlib import Path

import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest
import torch
from enumeration import all_sequences, correlated_law, count_form, entropy, nats_of_all_masks, optimal_model

from docs.tables import write as tables
from prime_v2.code_table_prime_v2 import build_code_table
from prime_v2.diffusion_prime_v2 import RevealOrder
from prime_v2.likelihood_prime_v2 import SAMPLED_METHODS
from prime_v2.output.records import read_record

ROOT = Path(__file__).resolve().parents[2]
# Sums of under 100,000 float64 terms of order 1: rounding stays far below.
CLOSE = 1e-10


@pytest.fixture(scope="module")
def script():
    """docs/paper_loss.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("paper_loss", ROOT / "docs" / "paper_loss.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["paper_loss"] = module  # where its dataclass looks itself up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["paper_loss"]


@pytest.fixture(scope="module")
def done(script, tmp_path_factory):
    """(record, figure) of the documented command."""
    folder = tmp_path_factory.mktemp("paper_loss")
    record, figure = folder / "new" / "record.json", folder / "new" / "figure.png"
    script.main(["--output", str(record), "--figure", str(figure)])
    return read_record(record), figure


@pytest.fixture(scope="module")
def rows(done):
    return done[0]["results"]["rows"]


def losses(rows, **fields) -> list[dict]:
    """Rows of the paper's loss."""
    return [row for row in rows if all(row[k] == v for k, v in (fields | {"method": "paper_loss"}).items())]


def falls(rows: list[dict]) -> bool:
    return all(after["nats_per_token"] < before["nats_per_token"] for before, after in itertools.pairwise(rows))


def test_two_tokens_that_differ_in_k_digits_have_log_2_over_k(rows):
    found = losses(rows, law="two_tokens")
    assert [row["differing_digits"] for row in found] == list(range(1, 13))
    for row in found:
        assert row["nats_per_token"] == pytest.approx(math.log(2) / row["differing_digits"], abs=CLOSE)
        assert row["entropy"] == pytest.approx(math.log(2), abs=CLOSE)


def test_independent_digits_lose_nothing(script):
    """A uniform law over all codes: the joint of k hidden digits is k log b, so the loss is n log b, the entropy."""
    for base, num_subtokens in ((2, 6), (3, 3)):
        vocab_size = base**num_subtokens
        codes = build_code_table(vocab_size, base, num_subtokens)
        found = script.measure(np.full(vocab_size, 1 / vocab_size), codes, base)["paper_loss"]
        assert found["nats_per_token"] == pytest.approx(num_subtokens * math.log(base), abs=CLOSE)
        assert not found["is_bound"]


@pytest.mark.parametrize("shuffle_ratio", [0.0, 1.0])
@pytest.mark.parametrize("form", [(5, 2, 2, 3), (4, 3, 2, 2), (7, 2, 3, 2), (5, 2, 5, 1)], ids=str)
def test_every_number_is_that_of_the_librarys_loss_with_the_optimal_denoiser(script, form, shuffle_ratio):
    """Another route: the model's head, filter and marginals on the posterior of each state, every mask in turn."""
    vocab_size, length, base, num_subtokens = form
    law, ids = correlated_law(vocab_size, length), all_sequences(vocab_size, length)
    model = optimal_model(
        law,
        length,
        vocab_size=vocab_size,
        base=base,
        num_subtokens=num_subtokens,
        shuffle_ratio=shuffle_ratio,
        reveal_order="nested",
        stage_digits=list(range(1, num_subtokens + 1)),
    )
    found = script.measure(law.view([vocab_size] * length).numpy(), model.code_table.codes[:-1], base)
    assert set(found) == {"subtoken", "token", "nested", "chain", "paper_loss"}
    for method in set(found) - {"chain"}:
        kind, objective = SAMPLED_METHODS[method]
        order = RevealOrder.from_config(model.config, kind)
        nats = count_form(*nats_of_all_masks(model, ids, order, objective))
        expected = float(law @ nats) / length
        assert found[method]["nats_per_token"] == pytest.approx(expected, abs=CLOSE), method
        assert found[method]["is_bound"] == model.log_likelihood(ids, method=method, num_samples=2).is_bound
    chain = model.log_likelihood(ids, method="chain")
    assert found["chain"]["nats_per_token"] == pytest.approx(-float(law @ chain.value) / length, abs=CLOSE)
    for each in found.values():
        assert each["entropy"] == pytest.approx(entropy(law) / length, abs=CLOSE)


def test_entropies_of_visible_digits_equal_sums_over_tokens_of_the_zipf_law(script):
    """At full size, for some of the 4,096 sets: group the tokens by what is visible of their codes."""
    law, codes = script.zipf_law(4096), build_code_table(4096, 2, 12, shuffle_seed=5)
    entropies = script.visible_entropies(law, codes, 2)
    generator = torch.Generator().manual_seed(0)
    for visible in torch.randint(0, 2, (20, 1, 12), generator=generator).bool():
        _, group = np.unique(codes[:, visible[0]].numpy(), axis=0, return_inverse=True)
        mass = np.bincount(group.ravel(), weights=law)
        assert float(entropies[script.index_of(visible)]) == pytest.approx(-(mass * np.log(mass)).sum(), abs=CLOSE)


def test_no_bound_leaves_the_entropy_and_the_papers_loss_is_called_one_only_for_one_digit(rows):
    for row in rows:
        assert row["is_bound"] == (row["method"] != "paper_loss" or row["num_subtokens"] == 1)
        assert row["lowest"] <= row["nats_per_token"] + CLOSE <= row["highest"] + 2 * CLOSE
        if row["is_bound"]:
            assert (row["lowest"], row["highest"]) == pytest.approx((row["entropy"], row["entropy"]), abs=CLOSE)
        elif row["differing_digits"] != 1:  # one digit alone shares nothing
            assert row["highest"] < row["entropy"] - 0.005


def test_shuffling_and_a_lower_base_lower_the_papers_loss(rows):
    shuffled = losses(rows, law="zipf", base=2)
    assert [row["shuffle_ratio"] for row in shuffled] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert falls(shuffled)
    for law in ("zipf", "sequences"):
        plain, mixed = losses(rows, law=law, shuffle_ratio=0.0), losses(rows, law=law, shuffle_ratio=1.0)
        for part in (plain, mixed):
            assert [row["base"] for row in part] == sorted((row["base"] for row in part), reverse=True)
            assert falls(part)
        for one, other in zip(plain[1:], mixed[1:], strict=True):  # the first has one digit a token
            assert other["highest"] < one["lowest"] - 0.05  # not for the mean alone: for each shuffle


def test_the_script_stops_when_a_bound_is_not_the_entropy(script, monkeypatch):
    monkeypatch.setattr(script, "is_bound", lambda *arguments: True)
    with pytest.raises(ArithmeticError, match=r"paper_loss is 0\.34\d+ nats/token, but a bound here is the ent"):
        script.rows_of(script.Case("two_tokens", 2, 0.0, 2))


def test_the_command_writes_record_and_figure_and_exponentiates_nothing(done, script, capsys):
    record, figure = done
    assert record["name"] == "paper_loss"
    pixels = matplotlib.image.imread(figure)[..., :3]
    for colour in (script.LOSS_COLOUR, script.BOUND_COLOUR):
        drawn = np.abs(pixels - matplotlib.colors.to_rgb(colour)).max(-1) < 0.02  # two levels of 255, and rounding
        assert drawn.sum() > 500
    text = script.describe(record["results"])
    assert "two_tokens" in text
    assert "perplexity" not in text + repr(record["results"])


def test_record_and_table_of_the_page_are_those_of_the_script(rows):
    stored = read_record(ROOT / "results" / "paper_loss.json")["results"]["rows"]
    assert len(stored) == len(rows)
    for old, new in zip(stored, rows, strict=True):
        numbers = ("nats_per_token", "lowest", "highest", "entropy")
        assert {k: v for k, v in old.items() if k not in numbers} == {k: v for k, v in new.items() if k not in numbers}
        assert [old[key] for key in numbers] == pytest.approx([new[key] for key in numbers], abs=CLOSE)
    page = ROOT / "docs" / "paper_loss.md"
    assert "<!-- table: paper_loss -->" in page.read_text()
    assert tables.main(["--check", "--results", str(ROOT / "results"), str(page)]) == 0
