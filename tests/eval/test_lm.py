"""The lm-eval model `prime_v2`: likelihoods, `is_greedy`, rolling, generation, arguments, processes, bad requests."""

import json
import logging
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from saved_models import save_model

from prime_v2 import PrimeV2ForMaskedDiffusion
from prime_v2.eval.lm import PrimeV2LM
from prime_v2.eval.perplexity import score_text

CONTEXTS = ["Question: which dog is lazy?\nAnswer:", "the quick brown fox", "The fox jumps over"]
ANSWERS = [
    [" the brown dog", " a fox", " 7"],
    [" jumps", " jumps over the lazy dog"],
    [" the dog", " dogs", " it", " 3"],
]
DOCUMENTS = [f"{context}{answer}" for context, answers in zip(CONTEXTS, ANSWERS, strict=True) for answer in answers]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    fields = {"max_position_embeddings": 48, "pad_token_id": 0, "initializer_range": 0.3}
    return save_model(tmp_path_factory.mktemp("lm") / "model", DOCUMENTS, **fields)


@pytest.fixture(scope="module")
def lm(folder):
    return PrimeV2LM(pretrained=str(folder))


def ask(pairs, task="dogs") -> list[Instance]:
    """One document for each (context, its continuations)."""
    return [
        Instance("loglikelihood", {}, (context, answer), index, (task, number, 1))
        for number, (context, answers) in enumerate(pairs)
        for index, answer in enumerate(answers)
    ]


def quiet(lm, requests):
    return lm.loglikelihood(requests, disable_tqdm=True)


@pytest.fixture
def requests():
    return ask(zip(CONTEXTS, ANSWERS, strict=True))


def by_hand(lm, context: str, answer: str, **options):
    """`log_likelihood` of the answer's tokens, from the tokens of the whole text."""
    ids, given = lm.tokenizer(context + answer)["input_ids"], lm.tokenizer(context)["input_ids"]
    prompt = (torch.arange(len(ids)) < len(given)).long().unsqueeze(0)
    return lm.model.log_likelihood(torch.tensor([ids]), prompt_mask=prompt, **options)


# Likelihoods


def test_the_default_is_the_chain(lm, requests):
    answers = quiet(lm, requests)
    for request, (value, _) in zip(requests, answers, strict=True):
        expected = by_hand(lm, *request.args, method="chain").value.item()
        assert value == pytest.approx(expected, abs=1e-4)  # float32 rows in batches of another shape
    assert lm.draws_report()["is_likelihood_or_bound"]
    assert lm.draws_report()["draws_per_choice"] == 0


@pytest.mark.parametrize("method", ["subtoken", "token", "orders"])
def test_other_methods_agree_with_log_likelihood(folder, requests, method):
    lm = PrimeV2LM(pretrained=str(folder), method=method, num_samples=32, adaptive="off")
    for request, (value, _) in zip(requests, quiet(lm, requests), strict=True):
        alone = by_hand(lm, *request.args, method=method, num_samples=64)
        assert abs(value - alone.value.item()) < 8 * alone.stderr.item() + 1e-3  # two estimates, 32 and 64 draws


@pytest.mark.parametrize("settings", [{}, {"method": "subtoken", "num_samples": 16}, {"method": "paper_loss"}])
def test_scores_do_not_depend_on_order_batch_or_neighbours(folder, requests, settings):
    if settings.get("method") == "paper_loss":
        settings |= {"num_samples": 32, "cfg": 0.5, "mask_unit": "0.0_0.5/1_S", "temperature": 0.5}
    first = quiet(PrimeV2LM(pretrained=str(folder), **settings), requests)
    other = PrimeV2LM(pretrained=str(folder), batch_size=3, tokens_per_pass=70, **settings)
    backwards = quiet(other, requests[::-1])[::-1]
    one_document = quiet(other, [each for each in requests if each.doc_id == 1])
    for found, expected in ((backwards, first), (one_document, first[3:5])):
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        for (value, _), (reference, _) in zip(found, expected, strict=True):
            assert value == pytest.approx(reference, abs=1e-4)


def test_is_greedy_is_what_the_deterministic_decode_gives(lm):
    """The decode's own text is greedy, anything else is not."""
    context = CONTEXTS[0]
    ids = torch.tensor([lm.tokenizer(context)["input_ids"]])
    mask = lm.config.mask_token_id
    masked = torch.cat([ids, torch.full((1, 2), mask)], dim=1)
    out = lm.model.generate(
        masked, max_length=masked.shape[1], max_denoising_steps=2, do_sample=False, eos_token_id=[]
    )
    decoded, other = out[0, -2:].tolist(), [5, 7]
    pairs = [((context, "x"), ids[0].tolist(), each) for each in (decoded, other)]
    assert [greedy for _, greedy in lm._loglikelihood_tokens(pairs, disable_tqdm=True)] == [True, False]


def test_the_published_score_takes_the_settings_of_each_task(folder, caplog):
    with caplog.at_level(logging.WARNING):
        lm = PrimeV2LM(pretrained=str(folder), published=True)
    assert "tuned for each task on its test set" in caplog.text
    requests = ask([(CONTEXTS[1], ANSWERS[1])], task="anli_r2")
    values = [value for value, _ in quiet(lm, requests)]
    assert lm.draws_report()["draws_per_choice"] == 128
    assert not lm.draws_report()["is_likelihood_or_bound"]
    same = PrimeV2LM(
        pretrained=str(folder), method="paper_loss", num_samples=128, cfg=0.25, temperature=0.25, mask_unit="S"
    )
    assert [value for value, _ in quiet(same, requests)] == pytest.approx(values, abs=1e-6)
    with pytest.raises(ValueError, match="no settings were published for the task 'piqa'"):
        quiet(lm, ask([(CONTEXTS[1], ANSWERS[1])], task="piqa"))


def test_each_choice_is_written_with_its_error(folder, requests, tmp_path):
    lm = PrimeV2LM(pretrained=str(folder), method="subtoken", num_samples=16, scores=str(tmp_path / "scores.jsonl"))
    answers = quiet(lm, requests)
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert len(lines) == len(requests)
    found = {tuple(line["request"]): line for line in lines}
    for request, (value, greedy) in zip(requests, answers, strict=True):
        line = found[request.args]
        assert (line["value"], line["is_greedy"], line["task"]) == (value, greedy, "dogs")
        assert line["num_draws"] in (8, 16)
        assert line["stderr"] > 0 < line["lead_stderr"]


def test_answers_go_to_the_cache_and_come_from_it(folder, requests, tmp_path):
    lm = PrimeV2LM(pretrained=str(folder))
    cached = CachingLM(lm, str(tmp_path / "cache.db"))
    first = cached.loglikelihood(requests)
    before = lm.draws_report()["choices"]
    assert cached.loglikelihood(requests) == first
    assert lm.draws_report()["choices"] == before


# Texts


def test_rolling_likelihoods_are_those_of_ppl(lm):
    """Windows of 48 tokens; the same draws as `score_text` takes."""
    text = " ".join(DOCUMENTS)
    assert len(lm.tokenizer(text)["input_ids"]) > 48
    request = Instance("loglikelihood_rolling", {}, (text,), 0, ("texts", 0, 1))
    (value,) = lm.loglikelihood_rolling([request], disable_tqdm=True)
    score = score_text(lm.model, lm.tokenizer, [text], method="subtoken", num_samples=16)
    assert value == pytest.approx(-score["nats_per_token"] * score["num_tokens"], rel=1e-5)


def test_generation_is_batched_deterministic_and_cut_at_stop_strings(lm, folder):
    options = {"until": ["zzz"], "do_sample": False, "max_gen_toks": 6}
    requests = [Instance("generate_until", {}, (text, options), 0, ("x", i, 1)) for i, text in enumerate(CONTEXTS)]
    texts = lm.generate_until(requests, disable_tqdm=True)
    single = PrimeV2LM(pretrained=str(folder), tokens_per_pass=1)
    assert single.batch_size == 1
    assert single.generate_until(requests, disable_tqdm=True) == texts
    for context, text in zip(CONTEXTS, texts, strict=True):
        ids = lm.tokenizer(context, return_tensors="pt").input_ids
        out = lm.model.generate(ids, max_new_tokens=6, max_denoising_steps=6, do_sample=False)
        assert text == lm.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    stop = texts[0].strip()[:1]
    cut = [Instance("generate_until", {}, (CONTEXTS[0], options | {"until": [stop]}), 0, ("x", 0, 1))]
    assert stop not in lm.generate_until(cut, disable_tqdm=True)[0]


def test_sampling_is_seeded(folder):
    options = {"until": [], "do_sample": True, "temperature": 0.9, "max_gen_toks": 8}
    requests = [Instance("generate_until", {}, (CONTEXTS[0], options), 0, ("x", 0, 1))]
    texts = [
        PrimeV2LM(pretrained=str(folder), seed=seed).generate_until(requests, disable_tqdm=True) for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_a_chat_template_is_the_tokenizers(lm):
    lm.tokenizer.chat_template = "{% for message in messages %}[{{ message.content }}]{% endfor %}"
    try:
        assert lm.apply_chat_template([{"role": "user", "content": "a dog"}]) == "[a dog]"
    finally:
        lm.tokenizer.chat_template = None


# Requests at the edges


def test_a_long_context_loses_its_oldest_tokens_for_all_choices_alike(lm):
    words = "the quick brown fox jumps over the lazy dog " * 12
    answers = [" dog", " jumps over the lazy dog"]
    before = lm.draws_report()["contexts_truncated"]
    values = [value for value, _ in quiet(lm, ask([(words, answers)]))]
    assert lm.draws_report()["contexts_truncated"] == before + 1
    encoded = [lm._encode_pair(words, answer) for answer in answers]
    room = 48 - max(len(continuation) for _, continuation in encoded)
    for value, (context, continuation) in zip(values, encoded, strict=True):
        ids = torch.tensor([context[-room:] + continuation])
        prompt = (torch.arange(ids.shape[1]) < room).long().unsqueeze(0)
        expected = lm.model.log_likelihood(ids, prompt_mask=prompt, method="chain")
        assert value == pytest.approx(expected.value.item(), abs=1e-4)


def test_an_empty_context_is_the_end_of_a_text(lm):
    (value, _) = quiet(lm, ask([("", ["the dog"])]))[0]
    ids = torch.tensor([[0, *lm.tokenizer("the dog")["input_ids"]]])
    prompt = (torch.arange(ids.shape[1]) < 1).long().unsqueeze(0)
    assert value == pytest.approx(
        lm.model.log_likelihood(ids, prompt_mask=prompt, method="chain").value.item(), abs=1e-4
    )


@pytest.mark.parametrize(
    ("context", "answer", "message"),
    [
        ("a dog", "", r"request 0 \(task dogs, document 0\) has an empty continuation, which has no likelihood"),
        ("a dog", " dog" * 90, r"request 0 .* continuation of \d+ tokens, but the model takes 48; score it with"),
        ("a dog", " <|mask|>", r"request 0 .* spells the mask token '<\|mask\|>', which is no text"),
    ],
    ids=["empty", "long", "mask"],
)
def test_a_request_without_a_likelihood_is_refused_by_name(lm, context, answer, message):
    with pytest.raises(ValueError, match=message):
        quiet(lm, ask([(context, [answer])]))


def test_a_text_without_a_token_is_refused(lm):
    with pytest.raises(ValueError, match=r"request 0 \(task x, document 4\) is a text without a token"):
        lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("",), 0, ("x", 4, 1))], disable_tqdm=True)


def test_no_perplexity_comes_from_the_published_score(folder):
    lm = PrimeV2LM(pretrained=str(folder), method="paper_loss")
    with pytest.raises(
        ValueError,
        match="paper_loss is no likelihood of this model, so no perplexity",
    ):
        lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("a dog",), 0, ("x", 0, 1))])


@pytest.mark.parametrize("settings", [{}, {"method": "paper_loss", "num_samples": 8}])
def test_logits_that_are_not_finite_name_the_request(folder, requests, settings):
    lm = PrimeV2LM(pretrained=str(folder), **settings)
    with torch.no_grad():
        lm.model.model.norm.weight[0] = math.nan
    with pytest.raises(ValueError, match=r"task dogs.*network's logits are not finite"):
        quiet(lm, requests)


# Arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pretrained": None}, "no model was named; add --model_args pretrained=DIR"),
        ({"pretrained": "no/such/folder"}, "no/such/folder"),
        ({"method": "tokens"}, "method='tokens' is not one of subtoken, token.*; did you mean token?"),
        ({"num_sample": 3}, "num_sample=3 is no argument of the model prime_v2; did you mean num_samples"),
        ({"parallelize": True}, "parallelize=True is no argument of the model prime_v2"),
        ({"num_samples": 0}, "num_samples=0 must be an integer of at least 1; use 128"),
        ({"adaptive": -1}, "adaptive=-1.0 must be a positive number"),
        ({"cfg": 0.5}, "cfg=0.5 changes only the published score, and method=chain is a likelihood; leave it out"),
        ({"cfg": 0.5, "method": "subtoken"}, "cfg=0.5 changes .* method=subtoken is a likelihood"),
        ({"temperature": 0.5}, "temperature=0.5 changes only the published score"),
        ({"mask_unit": "S"}, "mask_unit=S changes only the published score"),
        ({"method": "paper_loss", "mask_unit": "x"}, "mask_unit='x' is not 1, S, a number of digits"),
        ({"published": True, "method": "chain"}, "published=true is method=paper_loss; leave method=chain out"),
        ({"max_length": 49}, r"max_length=49 must be an integer in \[2, 48\]; use 48"),
        *(
            ({name: value}, f"{name}={value!r} must be an integer")
            for name in ("seed", "num_samples", "max_length", "prefix_token_id", "tokens_per_pass", "batch_size")
            for value in (10.7, True, "1.5")
        ),
        ({"seed": 2**64}, "seed=18446744073709551616 must be an integer in"),
        ({"prefix_token_id": -1}, "prefix_token_id=-1 must be an integer in"),
        ({"prefix_token_id": 10**6}, "prefix_token_id=1000000 must be an integer in"),
        *(
            ({name: "false"}, f"{name}='false' must be True or False")
            for name in ("published", "add_bos_token", "truncation", "enable_thinking")
        ),
        ({"chat_template_args": "x"}, "chat_template_args='x' must be a mapping"),
        ({"device": "cuda:7"}, "device='cuda:7' cannot be used; here are cpu"),
        ({"dtype": "float31"}, "dtype='float31' is not a floating-point type"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(folder, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        PrimeV2LM(**{"pretrained": str(folder), **arguments})


def test_integers_may_be_text_as_a_command_line_has_them(folder):
    lm = PrimeV2LM(str(folder), seed="3", max_length="12", prefix_token_id="1", num_samples="4")
    assert (lm.seed, lm.max_length, lm.prefix_token_id, lm.scoring.answers.num_samples) == (3, 12, 1, 4)
    assert PrimeV2LM(str(folder), seed="3").scoring.answers.seed == 3


def test_lm_evals_own_defaults_mean_automatic_batches(folder):
    assert PrimeV2LM(pretrained=str(folder), batch_size=1).tokens_per_pass == 8192
    assert PrimeV2LM(pretrained=str(folder), batch_size="auto", max_batch_size=None).tokens_per_pass == 8192
    sized = PrimeV2LM(pretrained=str(folder), batch_size=4)
    assert (sized.tokens_per_pass, sized.batch_size) == (4 * 48, 4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device that lm-eval names")
def test_the_device_that_lm_eval_names_by_itself_falls_back_to_the_cpu(folder):
    assert PrimeV2LM(pretrained=str(folder), device="cuda:0").device.type == "cpu"


def test_a_model_object_and_a_peft_adapter(folder, requests, tmp_path):
    from peft import LoraConfig, get_peft_model

    plain = PrimeV2LM(pretrained=str(folder))
    given = PrimeV2LM(pretrained=plain.model, tokenizer=plain.tokenizer)
    assert quiet(given, requests) == quiet(plain, requests)
    with pytest.raises(ValueError, match="a model object needs its tokenizer"):
        PrimeV2LM(pretrained=plain.model)
    torch.manual_seed(1)
    base = PrimeV2ForMaskedDiffusion.from_pretrained(folder)
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    values = quiet(PrimeV2LM(pretrained=str(folder), peft=str(tmp_path / "adapter")), requests)
    reference = quiet(PrimeV2LM(pretrained=adapted.merge_and_unload(), tokenizer=plain.tokenizer), requests)
    assert [value for value, _ in values] == pytest.approx([value for value, _ in reference], abs=1e-4)
    assert values != quiet(plain, requests)


# Two processes

WORKER = """
import json, sys, lm_eval
from prime_v2.eval.plugin import register
register()
results = lm_eval.simple_evaluate("prime_v2", model_args=sys.argv[1], tasks=["dogs"], bootstrap_iters=0,
    task_manager=lm_eval.tasks.TaskManager(include_path=sys.argv[2], include_defaults=False), log_samples=True)
if results is not None:
    samples = sorted(results["samples"]["dogs"], key=lambda each: each["doc_id"])
    json.dump([[float(value) for value, _ in each["filtered_resps"]] for each in samples], open(sys.argv[3], "w"))
"""


@pytest.mark.slow
def test_two_processes_give_the_scores_of_one(folder, tmp_path):
    """Five questions, so that the second process pads; started as `accelerate launch` starts them."""
    rows = [{"context": CONTEXTS[i % 3] + f" {i}", "answers": ANSWERS[i % 3][:2], "gold": i % 2} for i in range(5)]
    (tmp_path / "dogs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "dogs.yaml").write_text(
        f"task: dogs\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'dogs.jsonl'}}}}}\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: '{{context}}'\ndoc_to_choice: '{{answers}}'\n"
        "doc_to_target: gold\nmetric_list: [{metric: acc}]\n"
    )
    arguments = f"pretrained={folder},method=subtoken,num_samples=16,device=cpu"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    values = {}
    for world_size in (1, 2):
        out = tmp_path / f"{world_size}.json"
        command = [sys.executable, "-c", WORKER, arguments, str(tmp_path / "tasks"), str(out)]
        shared = {**os.environ, "ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes = []
        for rank in range(world_size):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            environment = shared | (place if world_size == 2 else {})
            processes.append(
                subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            )
        for process in processes:
            output, _ = process.communicate(timeout=300)
            assert process.returncode == 0, output
        values[world_size] = json.loads(out.read_text())
    assert len(values[1]) == 5
    for one, two in zip(values[1], values[2], strict=True):
        assert two == pytest.approx(one, abs=1e-4)
