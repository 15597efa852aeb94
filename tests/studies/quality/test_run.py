"""Plans, cells and their numbers on small networks of every family; a stopped study that goes on."""

import contextlib
import dataclasses
import json

import numpy as np
import pytest
import torch
from networks import small_arm, small_config, small_interpolating, small_model, small_uniform

from prime_v2.eval.samplers import named_config
from prime_v2.studies.quality import run as study
from prime_v2.studies.quality.plan import (
    Cell,
    Plan,
    cells_of,
    check_samplers,
    identity,
    key_of,
    law_method,
    parsed,
    samplers_of,
    weights_sha256,
)
from prime_v2.studies.quality.run import Bench, reference, run_cell, run_model
from prime_v2.studies.quality.samples import law, write
from prime_v2.studies.quality.statistics import NgramIndex, entropy
from prime_v2.studies.quality.texts import HeldOut

PLAN = Plan(("ancestral", "margin"), (12, 3), 3, (0.5, 1.0), 12, 18, None, 2, 10, 5)
WINDOWS = torch.randint(0, 11, (18, 12), generator=torch.Generator().manual_seed(1))
TEXT = HeldOut(WINDOWS, np.repeat(np.arange(9), 2), "documents")
MODELS = {"prime": small_model, "arm": small_arm, "uniform": small_uniform, "interpolating": small_interpolating}


def nothing(*_: int) -> None:
    pass


class SmallJudge:
    """Judges by an ARM over the same 11 tokens."""

    re_encodes = False

    def __init__(self):
        self.arm = small_arm(seed=7)

    def read(self, ids, prompt):
        from prime_v2.studies.quality.judge import Judged

        mask = (torch.arange(ids.shape[1]) < prompt).long().expand_as(ids) if prompt else None
        nats = -self.arm.log_likelihood(ids, prompt_mask=mask, method="causal").value.numpy()
        return Judged(list(ids[:, prompt:].numpy()), nats, 0)


def bench(folder, plan=PLAN) -> Bench:
    judge = None if plan.law_only else SmallJudge()
    index = NgramIndex([WINDOWS.flatten().numpy()])
    show = contextlib.nullcontext(nothing)
    return Bench(plan, TEXT, judge, index, False, folder, {"judge": "small"}, lambda _: show, nothing)


@pytest.mark.parametrize("family", MODELS)
def test_a_set_is_what_generate_writes_with_the_cells_options(family):
    model, cell = MODELS[family](), Cell("margin" if family == "prime" else "ancestral", 3, 0.5)
    ids, costs = write(model, cell, PLAN, WINDOWS, nothing)
    assert ids.shape == (18, 12) and int(ids.max()) < 11, "every token is filled in, and no text is left out"
    assert len({tuple(row) for row in ids.tolist()}) == 18, "texts differ"
    assert torch.equal(write(model, cell, PLAN, WINDOWS, nothing)[0], ids), "seeded"
    assert 0 < costs["network_seconds"] < costs["seconds"]
    assert costs["tokens_per_second"] == pytest.approx(18 * 12 / costs["seconds"])
    if family == "prime":
        config = named_config(model, "margin", steps=3, temperature=0.5)
        rows = [model.generate(torch.zeros(count, 0, dtype=torch.long), generation_config=config, seed=seed,
                               max_new_tokens=12) for count, seed in ((10, 5), (8, 6))]  # fmt: skip
        assert torch.equal(torch.cat(rows), ids)
        assert costs["mean_passes"] == 3
    if family in ("arm", "uniform"):
        assert costs["mean_passes"] == (12 if family == "arm" else 3)


@pytest.mark.parametrize("family", MODELS)
def test_prompts_are_continued(family):
    model, cell = MODELS[family](), Cell("margin" if family == "prime" else "ancestral", 3, prompt=4)
    ids, costs = write(model, cell, PLAN, WINDOWS, nothing)
    assert torch.equal(ids[:, :4], WINDOWS[:, :4])
    assert not torch.equal(ids[:, 4:], WINDOWS[:, 4:])
    assert costs["tokens_per_second"] == pytest.approx(18 * 8 / costs["seconds"])


def test_a_set_of_a_small_vocabulary_follows_the_law_that_is_scored():
    """-log p of what is sampled, under the law of the sampler, is on average the entropy of the law of 121 texts."""
    model, plan = small_model(seed=3), dataclasses.replace(PLAN, length=2, samples=4000, batch=4000)
    cell = Cell("margin,unit=digit", 1)
    every = torch.cartesian_prod(torch.arange(11), torch.arange(11))
    nats = np.array(law(model, cell, plan, every, nothing)["nats_of_sequences"])
    assert np.exp(-nats).sum() == pytest.approx(1, abs=2e-3)  # nats are rounded to 1e-3
    ids, _ = write(model, cell, plan, torch.zeros(4000, 2, dtype=torch.long), nothing)
    found = nats[(ids[:, 0] * 11 + ids[:, 1]).numpy()]
    exact = float((np.exp(-nats) * nats).sum())
    assert abs(found.mean() - exact) < 4 * found.std() / 4000**0.5  # false alarm: 6e-5


def test_laws_are_exact_where_they_can_be_and_else_say_whose_bound_they_are():
    for family, name, method, exact in (
        ("prime", "margin", "sampler", True),
        ("prime", "ancestral", "sampler", False),
        ("prime", "remasking", "subtoken", False),
        ("arm", "left to right", "causal", True),
        ("uniform", "ancestral", "uniform", False),
        ("uniform", "predictor-corrector", "uniform", False),
        ("interpolating", "ancestral", "interpolating", False),
    ):
        model = MODELS[family]()
        assert law_method(model, name) == method
        found = law(model, Cell(name, 3), PLAN, WINDOWS[:4], nothing)
        assert (found["method"], found["is_exact"], found["draws"]) == (method, exact, 0 if exact else 2)
        assert found["mean_passes"] == (3 if method == "sampler" else None)
        options = {"generation_config": named_config(model, name, steps=3)} if method == "sampler" else {}
        output = model.log_likelihood(WINDOWS[:4], method=method, seed=5, num_samples=2, **options)
        np.testing.assert_allclose(found["nats_of_sequences"], -output.value, atol=5.01e-4)  # rounded


def test_the_law_of_a_sampler_has_its_blocks_cache_and_filters():
    """Options of the law, which are no fields of the sampler's config; top_p gives most texts probability 0."""
    model = small_model(seed=3).double()
    given = {"unit": "digit", "block_length": 4, "cache": "prefix", "temperature": 1.0}
    found = law(model, Cell("margin,unit=digit,block_length=4,cache=prefix", 6), PLAN, WINDOWS[:4], nothing)
    expected = model.log_likelihood(
        WINDOWS[:4], method="sampler", generation_config=named_config(model, "margin", steps=6, **given)
    )
    np.testing.assert_allclose(found["nats_of_sequences"], -expected.value, atol=5.01e-4)  # rounded
    assert Cell("margin,top_p=1.0", 6).has_law and not Cell("margin,top_p=0.5", 6).has_law
    model.generation_config.top_p = 0.1
    with pytest.raises(ValueError, match="margin, 6 passes never writes window 0 of the held-out text"):
        law(model, Cell("margin", 6), PLAN, WINDOWS[:4], nothing)


def test_a_family_has_its_own_samplers_and_says_which_of_those_asked_it_has_not():
    asked = ("margin", "margin,unit=stage")
    found, missing = samplers_of(small_model(), asked)
    assert found == ["margin"] and missing[0].startswith("margin,unit=stage: ")
    assert samplers_of(small_arm(), asked) == (["left to right"], [])
    found, missing = samplers_of(small_uniform(), asked)
    assert found == ["ancestral"] and "no token is hidden" in missing[0]
    check_samplers([small_config("prime"), small_config("arm")], ["margin"])
    with pytest.raises(ValueError, match=r"no model has the sampler margin,unit=stage: .*a model with stages"):
        check_samplers([small_config("prime"), small_config("arm")], asked)


def test_a_sampler_is_a_name_with_options():
    assert parsed("margin") == ("margin", {})
    assert parsed("threshold,threshold=0.8,unit=digit") == ("threshold", {"threshold": 0.8, "unit": "digit"})
    assert parsed("margin,block_length=4,cache=dual")[1] == {"block_length": 4, "cache": "dual"}
    for text, sentence in (
        ("margn", "did you mean margin"),
        ("margin,unit", "write NAME,OPTION=VALUE"),
        ("margin,steps=4", "which the study varies; leave it out"),
    ):
        with pytest.raises(ValueError, match=sentence):
            parsed(text)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"samples": 5}, "a bootstrap interval needs at least 8 samples, not 5; use 8"),
        ({"samples": 10}, "self-BLEU needs at least 17 samples, not 10"),
        ({"length": 7}, "length=7 leaves fewer than the 8 tokens that the 8-grams need"),
        ({"prompt": 5}, "length=12 less prompts=5 leaves fewer than the 8 tokens"),
        ({"passes": (13,)}, "passes=13 are more than the 12 tokens of a text; use 12"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_work(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        dataclasses.replace(PLAN, **changes).check()
    dataclasses.replace(PLAN, samples=10, law_only=True).check()


def test_a_law_alone_of_a_sampler_that_excludes_tokens_is_refused():
    with pytest.raises(ValueError, match="'margin,top_p=0.5' gives real text probability 0.*leave top_p out"):
        dataclasses.replace(PLAN, samplers=("margin,top_p=0.5",), law_only=True).check()


def test_the_cells_are_samplers_by_passes_and_a_temperature_sweep():
    model, plan = small_model(), dataclasses.replace(PLAN, prompt=4)
    cells = cells_of(plan, model, ["margin"])
    assert cells == [
        Cell("margin", 12),
        Cell("margin", 3),
        Cell("margin", 3, 0.5),
        Cell("margin", 12, prompt=4),
        Cell("margin", 3, prompt=4),
    ]
    assert [cell.has_law for cell in cells] == [True, True, False, True, True]
    lawful = cells_of(dataclasses.replace(PLAN, law_only=True), model, ["margin"])
    assert lawful == [Cell("margin", 12), Cell("margin", 3)]
    assert cells_of(PLAN, small_arm(), ["left to right"]) == [Cell("left to right", 12, each) for each in (1.0, 0.5)]


def test_the_name_of_a_cell_depends_on_all_that_its_numbers_do():
    cell, about = Cell("margin", 3), {"weights": "x"}
    names = {key_of(cell, PLAN, about), key_of(Cell("margin", 2), PLAN, about), key_of(cell, PLAN, {"weights": "y"})}
    names |= {key_of(cell, dataclasses.replace(PLAN, seed=6), about)}
    assert len(names) == 4
    assert key_of(cell, dataclasses.replace(PLAN, samplers=("margin",), passes=(1,)), about) in names, "other cells"
    assert weights_sha256(small_model()) != weights_sha256(small_model(seed=1))


def test_a_models_identity_is_its_weights_and_its_options():
    """Orders of one network and options of generate decide on the numbers, and are not in the weights."""
    model, seen = small_model(reveal_order="nested", stage_digits=[2, 4]), []
    for change in (
        lambda: None,
        lambda: setattr(model.config, "reveal_order", "coarse_first"),
        lambda: setattr(model.generation_config, "top_p", 0.9),
    ):
        change()
        seen.append(json.dumps(identity(model), sort_keys=True))
    assert len(set(seen)) == 3


def test_the_numbers_of_a_cell_are_those_of_its_texts(tmp_path):
    model, cell = small_model(), Cell("margin", 3)
    found = run_cell(bench(tmp_path), model, cell, nothing)
    ids, _ = write(model, cell, PLAN, WINDOWS, nothing)
    nats = -small_arm(seed=7).log_likelihood(ids, method="causal").value.numpy()
    samples = found["samples"]
    assert samples["generative_perplexity"]["value"] == pytest.approx(np.exp(nats.sum() / ids.numel()), rel=1e-6)
    assert samples["entropy"]["value"] == pytest.approx(np.mean([entropy(row) for row in ids.numpy()]))
    assert samples["tokens_of_samples"] == 12
    np.testing.assert_allclose(samples["nats_of_samples"], nats, atol=5.01e-3)
    expected = TEXT.clusters.ratio(found["law"]["nats_of_sequences"], np.full(18, 12))
    assert (found["law"]["nats_per_token"], found["law"]["interval_95"]) == (expected.value, expected.interval())
    real = reference(bench(tmp_path))["0"]
    assert real["copied"]["value"] == 1, "it is its own training text here"


def test_a_study_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    model, done = small_model(), []
    whole = run_model(bench(tmp_path / "whole"), model, "m")
    real = study.run_cell

    def stopped(bench, model, cell, progress):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(cell)
        return real(bench, model, cell, progress)

    monkeypatch.setattr(study, "run_cell", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_model(bench(tmp_path / "parts"), model, "m")
    assert len(list((tmp_path / "parts").iterdir())) == 2
    monkeypatch.setattr(study, "run_cell", lambda *given: done.append(given[2]) or real(*given))
    found = run_model(bench(tmp_path / "parts"), model, "m")
    assert len(done) == len(whole["cells"]) == 6, "nothing twice"
    assert [cell.passes for cell in done] == [3, 3, 3, 3, 12, 12], "those with the fewest passes first"
    assert [each["passes"] for each in found["cells"]] == [12, 3, 12, 3, 3, 3], "and as they were asked for"

    def untimed(cells):
        return [
            {k: v for k, v in each["samples"].items() if "second" not in k} | {"law": each["law"]} for each in cells
        ]

    assert json.dumps(untimed(found["cells"])) == json.dumps(untimed(whole["cells"]))


def test_a_study_of_laws_samples_nothing(tmp_path):
    plan = dataclasses.replace(PLAN, law_only=True)
    found = run_model(bench(tmp_path, plan), small_model(), "m")
    assert [each["samples"] for each in found["cells"]] == [None] * 4
    assert reference(bench(tmp_path, plan)) is None
