"""The lm-eval model over whole runs: its cache, repeated samples, edges of texts and contexts, files, wrong stops."""

import json
import logging
import math

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from networks import small_model
from saved_models import save_model

from prime_v2.commands.eval import parse_arguments
from prime_v2.eval.answers import Choice, Settings, score_questions
from prime_v2.eval.lm import PrimeV2LM
from prime_v2.eval.lm_settings import snapshot
from prime_v2.eval.perplexity import score_text

TEXTS = ["the quick brown fox jumps over the lazy dog", "which dog is lazy? the brown dog is", "a fox is no dog"]


def ask(context: str, *answers: str, task: str = "dogs") -> list[Instance]:
    return [Instance("loglikelihood", {}, (context, each), i, (task, 0, 1)) for i, each in enumerate(answers)]


def generate(lm, *contexts: str, **options) -> list[str]:
    options = {"until": [], "max_gen_toks": 6, **options}
    requests = [Instance("generate_until", {}, (each, options), 0, ("x", i, 1)) for i, each in enumerate(contexts)]
    return lm.generate_until(requests, disable_tqdm=True)


@pytest.fixture(scope="module", params=["without BOS", "with BOS"])
def folder(request, tmp_path_factory):
    fields = {"max_position_embeddings": 32, "pad_token_id": 0, "initializer_range": 0.3}
    path = tmp_path_factory.mktemp("runs") / "model"
    return str(save_model(path, TEXTS, adds_bos=request.param == "with BOS", **fields))


@pytest.fixture(scope="module")
def lm(folder):
    return PrimeV2LM(pretrained=folder)


def broken(folder) -> PrimeV2LM:
    lm = PrimeV2LM(pretrained=folder)
    with torch.no_grad():
        lm.model.model.norm.weight[0] = math.nan
    return lm


def test_a_cache_of_other_settings_or_weights_is_refused(folder, tmp_path):
    """lm-eval's keys are the texts alone, so chain's answers would pass for those of another method."""
    cache, requests = str(tmp_path / "cache.db"), ask(TEXTS[0], " dog", " fox")
    first = CachingLM(PrimeV2LM(pretrained=folder), cache).loglikelihood(requests)
    assert CachingLM(PrimeV2LM(pretrained=folder, tokens_per_pass=50), cache).loglikelihood(requests) == first
    for other in (PrimeV2LM(pretrained=folder, method="subtoken"), broken(folder)):
        with pytest.raises(ValueError, match="holds scores of another model or other settings; give another name"):
            CachingLM(other, cache)


def test_equal_requests_draw_different_samples_in_any_batch(folder):
    texts = [
        generate(PrimeV2LM(pretrained=folder, tokens_per_pass=size), *[TEXTS[0]] * 4, do_sample=True, temperature=1.0)
        for size in (1, 1000)
    ]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 4


def test_rolling_scores_the_text_and_no_bos(lm):
    text = " ".join(TEXTS)
    (value,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0, ("x", 0, 1))], True)
    score = score_text(lm.model, lm.tokenizer, [text], method="subtoken", num_samples=16)
    assert value == pytest.approx(-score["nats_per_token"] * score["num_tokens"], rel=1e-5)


def test_an_empty_context_generates_alone_as_beside_others(lm):
    alone = generate(lm, "", do_sample=False)
    assert generate(lm, "", "the lazy dog", do_sample=False)[:1] == alone


@pytest.mark.parametrize("context", ["", " ", "\n\n"])
def test_a_context_of_white_space_has_the_prefix_token(lm, context):
    questions = []
    scored = lm._scored
    lm._scored = lambda found, progress: questions.extend(found) or scored(found, progress)
    try:
        lm.loglikelihood(ask(context, "dog"), disable_tqdm=True)
    finally:
        del lm._scored
    (choice,) = questions[0].choices
    assert choice.ids[: choice.num_context] == (0,)


def test_the_published_settings_leave_nothing_to_choose(folder):
    with pytest.raises(ValueError, match="published=true takes num_samples from the published settings; leave one"):
        PrimeV2LM(pretrained=folder, published=True, num_samples=4)
    with pytest.raises(ValueError, match="published=true takes cfg from the published settings"):
        PrimeV2LM(pretrained=folder, published=True, cfg=0.1)
    lm = PrimeV2LM(pretrained=folder, published=True)
    assert lm.tok_encode("dog")[0] != 0, "as the published script, without BOS"


def test_one_draw_has_no_standard_error(folder, tmp_path):
    path = tmp_path / "scores.jsonl"
    lm = PrimeV2LM(pretrained=folder, method="subtoken", num_samples=1, scores=str(path))
    lm.loglikelihood(ask(TEXTS[0], " dog", " fox"), disable_tqdm=True)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["num_draws"], line["stderr"], line["lead_stderr"]) for line in lines] == [(1, None, None)] * 2
    assert {(line["method"], line["seed"]) for line in lines} == {("subtoken", 0)}
    with pytest.raises(ValueError, match="scores.jsonl exists; give another name, or delete it first"):
        PrimeV2LM(pretrained=folder, scores=str(path))
    with pytest.raises(ValueError, match="the folder .*nowhere does not exist; make it first"):
        PrimeV2LM(pretrained=folder, scores=str(tmp_path / "nowhere" / "scores.jsonl"))


def test_a_run_that_fails_leaves_no_scores(folder, tmp_path):
    lm = PrimeV2LM(pretrained=folder, scores=str(tmp_path / "scores.jsonl"))
    with torch.no_grad():
        lm.model.model.norm.weight[0] = math.nan
    with pytest.raises(ValueError, match=r"request \d+ \(task dogs, document 0\): .*not finite"):
        lm.loglikelihood(ask(TEXTS[0], " dog", " fox"), disable_tqdm=True)
    assert not any(tmp_path.iterdir())


def test_logits_that_are_not_finite_name_the_text_and_the_context(folder):
    lm = broken(folder)
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0, ("x", i, 1)) for i, text in enumerate(TEXTS)]
    with pytest.raises(ValueError, match=r"request 0 \(task x, document 0\): .*not finite"):
        lm.loglikelihood_rolling(requests, disable_tqdm=True)
    with pytest.raises(ValueError, match="the batch whose first context ends in 'a fox is no dog': .*not finite"):
        generate(lm, TEXTS[2], do_sample=False)
    with pytest.raises(ValueError, match=r"request 0 \(task sciq, document 0\): .*not finite"):
        published = PrimeV2LM(pretrained=lm.model, tokenizer=lm.tokenizer, published=True)
        published.loglikelihood(ask(TEXTS[0], " dog", " fox", task="sciq"), disable_tqdm=True)


def test_contexts_that_are_cut_are_counted_and_said(folder, caplog):
    lm = PrimeV2LM(pretrained=folder)
    with caplog.at_level(logging.WARNING):
        lm.loglikelihood(ask("the dog " * 40, " fox", " dog"), disable_tqdm=True)
        generate(lm, "the dog " * 40, "a fox", do_sample=False)
    assert "1 of 1 contexts lost their oldest tokens to fit into the 32 that the model takes" in caplog.text
    assert "2 of 3 contexts lost their oldest tokens" in caplog.text


def test_more_new_tokens_than_fit_are_refused(lm):
    with pytest.raises(
        ValueError, match=r"request 0 .* max_gen_toks=32 new tokens, but the model takes 32 .*; use 16"
    ):
        generate(lm, "a fox", max_gen_toks=32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 2.9}, "num_samples=2.9 must be an integer of at least 1; use 128"),
        ({"num_samples": "many"}, "num_samples='many' must be an integer"),
        ({"batch_size": 0}, "batch_size=0 must be an integer of at least 1; use 32"),
        ({"max_denoising_steps": 0}, "max_denoising_steps=0 must be an integer of at least 1"),
        ({"adaptive": "much"}, "adaptive='much' must be a number; use 3.0"),
        ({"method": "paper_loss", "cfg": "abc"}, "cfg='abc' must be a number; use 0.5"),
        ({"method": "nested"}, "nested reveal order needs a config with stage_digits"),
    ],
    ids=str,
)
def test_numbers_that_are_none_are_refused_by_name(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        PrimeV2LM(pretrained=folder, **arguments)


def test_adaptive_true_is_the_default_and_off_is_off(folder):
    z = [PrimeV2LM(pretrained=folder, adaptive=each).scoring.answers.adaptive for each in (True, "off", False, 2)]
    assert z == [3.0, None, None, 2.0]


def test_a_subfolder_of_a_repository_is_fetched(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, revision: calls.append((name, revision)) or str(tmp_path)
    )
    assert snapshot("some/model", "main", "") == "some/model"
    assert snapshot("some/model", "main", "checkpoint-2") == str(tmp_path / "checkpoint-2")
    assert snapshot("some/model", "v1", "") == str(tmp_path)
    assert calls == [("some/model", "main"), ("some/model", "v1")]


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--model_args", "seed=1,pretrained=x"], True),
        (["--model_args", "seed=1", "pretrained=x"], True),
        (["--model_args", '{"pretrained": "x"}'], True),
        (["-a=pretrained=x"], True),
        (["--output_path", "out/pretrained", "--model_args", "seed=1"], False),
        (["--model_args", "peft=pretrained"], False),
    ],
)
def test_the_model_is_looked_for_in_the_model_arguments_alone(arguments, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if names:
        with pytest.raises(ValueError, match="and pretrained= name a model each"):
            parse_arguments(["runs/tiny", "--tasks", "sciq", *arguments])
    else:
        assert "pretrained" in " ".join(parse_arguments(["runs/tiny", "--tasks", "sciq", *arguments]).rest)
        with pytest.raises(ValueError, match="no model was named"):
            parse_arguments(["--tasks", "sciq", *arguments])


def test_early_stops_seldom_choose_the_wrong_answer():
    """300 questions of two answers, against the sum over all masks: of the early stops at most 3% are wrong.

    A normal's 3 standard errors would be wrong in 0.1%; several looks at few heavy-tailed draws cost more, and plain
    standard errors without Student's t were wrong in some 6%.
    """
    model = small_model(seed=5, scale=0.6, vocab_size=11)
    ids = torch.randint(11, (300, 2, 4), generator=torch.Generator().manual_seed(0))
    questions = [
        [Choice((*question[0, :2].tolist(), *answer[2:].tolist()), 2) for answer in question] for question in ids
    ]
    exact = dict(score_questions(model, questions, Settings(num_samples=255)))
    found = dict(score_questions(model, questions, Settings(num_samples=128, adaptive=3.0)))
    early = wrong = 0
    for number in range(len(questions)):
        first, second = (choice.value for choice in found[number].choices)
        best, other = (choice.value for choice in exact[number].choices)
        if found[number].choices[0].num_draws < 128:
            early += 1
            wrong += (first > second) != (best > other)
    assert early > 30
    assert wrong <= 0.03 * early
