"""Answers scored by the law of a sampler: what `generate` writes after the prompt, by enumeration and by samples."""

import json
import logging
import math
import shutil

import pytest
import torch
from chi_square import ROWS, assert_follows
from enumeration import all_sequences
from lm_eval.api.instance import Instance
from networks import small_model
from saved_models import save_model

from prime_v2.eval.answers import Choice, Settings, score_questions
from prime_v2.eval.lm import PrimeV2LM
from prime_v2.eval.samplers import named_config

PROMPT = (2, 0, 3)
RULES = {
    "margin": {"sampler": "margin", "steps": 1},
    "digits in blocks": {"sampler": "entropy", "unit": "digit", "steps": 3, "block_length": 1, "cache": "prefix"},
    "threshold": {"sampler": "threshold", "threshold": 0.4, "temperature": 1.3, "top_p": 0.9},
}


def scores_of(model, answers, settings):
    choices = [Choice((*PROMPT, *each), len(PROMPT)) for each in answers]
    ((_, score),) = score_questions(model, [choices], settings)
    return score


@pytest.mark.parametrize("rule", RULES)
def test_scores_of_all_answers_are_the_law_of_what_is_written_after_the_prompt(rule):
    model = small_model(seed=5, vocab_size=4).double()
    config = named_config(model, **RULES[rule])
    answers = all_sequences(4, 2).tolist()
    score = scores_of(model, answers, Settings("sampler", generation_config=config))
    law = {tuple(each): math.exp(choice.value) for each, choice in zip(answers, score.choices, strict=True)}
    assert sum(law.values()) == pytest.approx(1, abs=1e-9)
    assert {(choice.stderr, choice.num_draws) for choice in score.choices} == {(0.0, 0)}
    ids = torch.tensor([PROMPT]).expand(ROWS, -1)
    samples = model.generate(ids, generation_config=config, max_new_tokens=2, seed=4, eos_token_id=None)
    assert_follows(samples[:, len(PROMPT) :], law)


def test_answers_share_the_paths_of_the_ancestral_sampler():
    """Those of equal answers cancel; of answers that differ in a token, they make the lead surer than others do."""
    model = small_model(seed=2)
    config = named_config(model, "ancestral", steps=4)
    answers = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 7]]
    score = scores_of(model, [answers[0], answers[0]], Settings("sampler", 8, generation_config=config))
    assert [choice.num_draws for choice in score.choices] == [8, 8]
    assert score.choices[0].stderr > 0
    assert (score.lead, score.lead_stderr) == pytest.approx((0, 0), abs=1e-6)  # float32 rows at other places of a pass
    variances = {
        common: sum(
            scores_of(
                model, answers, Settings("sampler", 64, seed, common_masks=common, generation_config=config)
            ).lead_stderr
            ** 2
            for seed in range(8)
        )
        for common in (True, False)
    }
    assert variances[True] < 0.7 * variances[False]


# lm-eval

CONTEXT, ANSWERS = "Question: which dog is lazy?\nAnswer:", [" the brown dog", " a fox", " 7"]
MARGIN = {"method": "sampler", "sampler": "margin", "steps": "2", "unit": "digit", "temperature": 1.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    fields = {"max_position_embeddings": 48, "pad_token_id": 0, "initializer_range": 0.3}
    return save_model(tmp_path_factory.mktemp("lm") / "model", [CONTEXT + each for each in ANSWERS], **fields)


def requests():
    return [
        Instance("loglikelihood", {}, (CONTEXT, answer), index, ("dogs", 0, 1)) for index, answer in enumerate(ANSWERS)
    ]


def test_lm_eval_scores_answers_and_texts_by_the_sampler_and_reports_it(folder, tmp_path):
    lm = PrimeV2LM(pretrained=str(folder), scores=str(tmp_path / "scores.jsonl"), **MARGIN)
    config = named_config(lm.model, "margin", steps=2, unit="digit", temperature=1.5)
    forwards = tokens = 0
    for request, (value, _) in zip(requests(), lm.loglikelihood(requests(), disable_tqdm=True), strict=True):
        ids, given = lm.tokenizer("".join(request.args))["input_ids"], len(lm.tokenizer(CONTEXT)["input_ids"])
        prompt = (torch.arange(len(ids)) < given).long().unsqueeze(0)
        output = lm.model.log_likelihood(
            torch.tensor([ids]), prompt_mask=prompt, method="sampler", generation_config=config
        )
        assert value == pytest.approx(float(output.value), abs=1e-4)  # float32 rows in batches of another shape
        forwards, tokens = forwards + int(output.num_forward), tokens + len(ids) - given
    report = lm.draws_report()
    expected = {"method": "sampler", "sampler": "margin", "unit": "digit", "steps": 2, "temperature": 1.5}
    expected |= {"is_exact": True, "is_likelihood_or_bound": True, "passes_per_token": forwards / tokens}
    assert {name: report[name] for name in expected} == expected
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert {(line["method"], line["num_draws"], line["stderr"]) for line in lines} == {("sampler", 0, 0.0)}

    text = CONTEXT + ANSWERS[0]
    (value,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0, ("t", 0, 1))])
    ids = torch.tensor([lm.tokenizer(text)["input_ids"]])
    output = lm.model.log_likelihood(ids, method="sampler", generation_config=config)
    assert value == pytest.approx(float(output.value), abs=1e-4)


def test_what_lm_eval_is_not_given_is_the_models_own(folder, tmp_path):
    """And what it is given wins over it."""
    shutil.copytree(folder, tmp_path / "model")
    place = tmp_path / "model" / "generation_config.json"
    own = {"temperature": 0.7, "top_p": 0.9, "max_denoising_steps": 3, "block_length": 4}
    place.write_text(json.dumps(json.loads(place.read_text()) | own))
    options = {"pretrained": str(tmp_path / "model"), "method": "sampler", "sampler": "margin"}
    expected = {"temperature": 0.7, "top_p": 0.9, "steps": 3, "block_length": 4}
    assert expected.items() <= PrimeV2LM(**options).draws_report().items()
    given = {"temperature": 1.2, "top_p": 0.8, "steps": 2, "block_length": 3}
    assert given.items() <= PrimeV2LM(**options, **given).draws_report().items()


def test_lm_eval_draws_texts_by_the_sampler_that_it_scores_by(folder):
    """One step writes all of the text in a pass; a task that asks for greedy text gets the deterministic decode."""
    lm = PrimeV2LM(pretrained=str(folder), method="sampler", sampler="margin", steps=1, temperature=1.5)

    def written(do_sample):
        options = {"until": ["#"], "max_gen_toks": 6, "do_sample": do_sample}
        return lm.generate_until([Instance("generate_until", {}, (CONTEXT, options), 0, ("t", 0, 1))])

    ids = lm.tokenizer(CONTEXT, return_tensors="pt")["input_ids"]
    config = named_config(lm.model, "margin", steps=1, temperature=1.5)
    out = lm.model.generate(ids, generation_config=config, max_new_tokens=6, seed=0)
    assert written(True) == [lm.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).split("#")[0]]
    out = lm.model.generate(ids, max_new_tokens=6, max_denoising_steps=6, do_sample=False)
    assert written(False) == [lm.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).split("#")[0]]


def test_answers_that_top_p_excludes_are_never_written_and_counted(folder, caplog):
    lm = PrimeV2LM(pretrained=str(folder), method="sampler", sampler="margin", top_p=0.01)
    with caplog.at_level(logging.WARNING):
        values = [value for value, _ in lm.loglikelihood(requests(), disable_tqdm=True)]
    excluded = values.count(-math.inf)
    assert 0 < excluded == lm.draws_report()["choices_never_written"]
    assert f"{excluded} of 3 choices have a token that top_p excludes" in caplog.text
    with pytest.raises(ValueError, match="request 0 .*top_p excludes a token of it, so the sampler never writes it"):
        lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (CONTEXT,), 0, ("t", 0, 1))])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "chain", "sampler": "margin"}, "sampler is an option of method=sampler; add that, or leave"),
        ({"steps": 4}, "steps is an option of method=sampler; add that, or leave steps out"),
        ({"method": "sampler", "sampler": "magin"}, "did you mean margin"),
        ({"method": "sampler", "sampler": "margin", "threshold": 0.5}, "is an option of the sampler threshold, but"),
        ({"method": "sampler", "sampler": "margin", "steps": 0}, "steps=0 must be an integer of at least 1; use 64"),
        ({"method": "sampler", "sampler": "threshold", "threshold": "much"}, "threshold='much' must be a number"),
        ({"method": "sampler", "sampler": "margin", "num_samples": 8}, "num_samples=8 is of draws, but margin is"),
        ({"method": "sampler", "sampler": "remasking"}, "has many paths under remasking"),
        ({"method": "sampler", "cfg": 0.5}, "cfg=0.5 changes only the published score"),
        ({"method": "sampler", "max_denoising_steps": 8}, "generates with its own steps; use steps=8"),
        ({"method": "sampler", "sampler": "margin", "temperature": 0}, "must be positive and finite"),
    ],
)
def test_arguments_without_a_law_are_refused(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        PrimeV2LM(pretrained=str(folder), **arguments)
