"""`prime-v2 ppl` of one model and one text; tables are in tests/eval/test_suites.py."""

import json
import math

import pytest
from command_runs import DOCUMENTS, refused, run

from prime_v2 import ConfidenceSamplerConfig, PrimeV2GenerationConfig
from prime_v2.commands.ppl import render_score
from prime_v2.data.splits import split_of
from prime_v2.eval.loading import load_model_and_tokenizer
from prime_v2.eval.perplexity import score_text
from prime_v2.output.paths import without_places
from prime_v2.output.records import read_record


def test_ppl_prints_and_records_the_score_of_the_text(model_dir, text_file, tmp_path):
    model, tokenizer = load_model_and_tokenizer(model_dir, "cpu")
    expected = score_text(model, tokenizer, DOCUMENTS, num_samples=4, seed=1, keep_sequences=True)
    output = tmp_path / "record.json"
    arguments = ["ppl", model_dir, text_file, "--num-samples", 4, "--seed", 1, "--device", "cpu"]
    result = run(*arguments, "--json", "--output", output)
    printed = json.loads(result.stdout)
    assert printed["evaluation"] == expected
    record = read_record(output)
    assert record["results"] == without_places(printed)
    assert (record["name"], record["seed"]) == ("ppl", 1)
    assert str(tmp_path) not in json.dumps(record["results"])
    assert "exists; give another name" in refused(*arguments, "--output", output)

    short = json.loads(run(*arguments, "--json").stdout)["evaluation"]
    assert short == {name: expected[name] for name in expected if name not in ("nats_of_sequences", "clusters")}
    plain = run(*arguments).stdout
    half = expected["nats_per_token_interval_95"][1] - expected["nats_per_token"]
    assert f"{expected['nats_per_token']:.4f} ± {half:.4f} nats/token (bound)" in plain
    assert f"≤ {expected['perplexity']:.2f}  (95% interval" in plain
    assert f"12 documents, {expected['num_tokens']:,} tokens" in plain


def test_ppl_of_what_is_no_bound_is_never_a_perplexity(model_dir, text_file):
    plain = run("ppl", model_dir, text_file, "--method", "paper_loss", "--max-documents", 2).stdout
    assert "nats/token (not a bound)" in plain
    assert "2 documents" in plain
    assert "perplexity" not in plain
    assert "bits" not in plain


def test_ppl_of_the_chain_is_exact(model_dir, text_file):
    plain = run("ppl", model_dir, text_file, "--method", "chain", "--max-documents", 1).stdout
    assert "nats/token (exact, left to right)" in plain
    assert "perplexity       = " in plain
    assert "draws" not in plain
    assert "1 document, " in plain


def test_ppl_takes_the_bound_of_the_order_that_the_model_was_trained_with(broken, text_file):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "reveal_order": "token"}))
    printed = json.loads(run("ppl", broken, text_file, "--max-documents", 2, "--json").stdout)
    assert printed["evaluation"]["method"] == "token"


def test_ppl_reads_the_documents_that_a_run_held_out(broken, text_file):
    shares = {"seed": 5, "dev_share": 0.2, "test_share": 0.5}
    (broken / "run.json").write_text(json.dumps({**shares, "learning_rate": 1.0}))
    held_out = [text for text in DOCUMENTS if split_of(text, **shares) == "test"]
    printed = json.loads(run("ppl", broken, text_file, "--split", "test", "--json", "--num-samples", 1).stdout)
    assert printed["evaluation"]["num_documents"] == len(held_out)
    assert printed["evaluation"]["text_bytes"] == sum(map(len, held_out))
    assert "must be one of train, dev, test" in refused("ppl", broken, text_file, "--split", "valid")
    for content in ("3", "[]", "x", "[" * 100_000):
        (broken / "run.json").write_text(content)
        assert "put a copy of it back, or move it away" in refused("ppl", broken, text_file, "--split", "test")
    (broken / "run.json").write_text('{"dev_share": "a"}')
    assert "which are no seed and shares" in refused("ppl", broken, text_file, "--split", "test")
    (broken / "run.json").unlink()
    assert "which says what" in refused("ppl", broken, text_file, "--split", "test")


def test_ppl_refuses_bad_text_and_methods(model_dir, text_file, tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    assert "is empty" in refused("ppl", model_dir, tmp_path / "empty.txt")
    assert "is not a UTF-8 text file" in refused("ppl", model_dir, tmp_path / "binary.txt")
    assert "does not exist" in refused("ppl", model_dir, tmp_path / "nothing.txt")
    assert "no field 'body'" in refused("ppl", model_dir, text_file, "--text-field", "body")
    assert "stage_digits" in refused("ppl", model_dir, text_file, "--method", "nested")
    nowhere = tmp_path / "nowhere" / "record.json"
    assert "does not exist; make it first" in refused("ppl", model_dir, text_file, "--output", nowhere)
    assert not nowhere.parent.exists()


def test_one_sequence_is_rendered_without_an_interval():
    score = {"method": "subtoken", "is_bound": True, "nats_per_token": math.log(8), "stderr": None, "num_samples": 1}
    score |= {"monte_carlo_stderr": None, "num_tokens": 3, "num_sequences": 1, "unigram_entropy": 1.0}
    score |= {"perplexity": 8.0, "perplexity_interval_95": None, "is_exact": False, "nats_per_token_interval_95": None}
    none = "intervals        none: a single sequence does not show how texts differ"
    lines = render_score(score).splitlines()
    assert lines[1:3] == ["subtoken         2.0794 nats/token (bound)", "perplexity       ≤ 8.00"]
    assert lines[-1] == none
    lines = render_score(score | {"num_samples": 8, "monte_carlo_stderr": 0.0123}).splitlines()
    assert lines[1] == "subtoken         2.0794 nats/token (bound; standard error of its draws 0.0123 nats/token)"
    assert lines[-2:] == ["draws            8 a sequence", none]


def test_a_table_gives_the_error_of_the_draws_where_a_text_has_no_interval(model_dir, broken, tmp_path):
    (tmp_path / "short.txt").write_text("the quick brown fox")
    arguments = ["ppl", model_dir, tmp_path / "short.txt", "--num-samples", 4]
    found = json.loads(run(*arguments, "--json").stdout)["evaluation"]
    assert found["nats_per_token_interval_95"] is None
    error = f"standard error of its draws {found['monte_carlo_stderr']:.4f}"
    assert f"nats/token (bound; {error} nats/token)" in run(*arguments).stdout
    table = run(*arguments, "--also", broken).stdout
    assert table.count(f"a single sequence does not show how texts differ; {error} nats/token") == 2


def test_ppl_of_a_sampler_is_exact_and_says_which_law_it_is_of(model_dir, broken, text_file, tmp_path):
    model, tokenizer = load_model_and_tokenizer(model_dir, "cpu")
    config = PrimeV2GenerationConfig(
        sampler_config=ConfidenceSamplerConfig(score="margin", unit="digit"),
        max_denoising_steps=8,
        block_length=16,
        temperature=1.5,
    )
    expected = score_text(model, tokenizer, DOCUMENTS[:3], method="sampler", generation_config=config, window=32)
    rule = ["--method", "sampler", "--sampler", "margin", "--steps", 8, "--unit", "digit", "--block-length", 16]
    arguments = ["ppl", model_dir, text_file, "--max-documents", 3, "--window", 32, *rule, "--temperature", 1.5]
    found = json.loads(run(*arguments, "--json", "--output", tmp_path / "record.json").stdout)["evaluation"]
    assert {name: found[name] for name in expected} == expected
    assert read_record(tmp_path / "record.json")["results"]["evaluation"] == found
    assert (found["is_exact"], found["sampler"], found["unit"], found["steps"]) == (True, "margin", "digit", 8)
    assert found["passes_per_token"] == found["num_forward"] / found["num_tokens"]
    assert (found["num_samples"], found["monte_carlo_stderr"]) == (0, 0)

    plain = run(*arguments).stdout
    assert "nats/token (exact, of this sampler)" in plain
    law = "margin, unit digit, 8 steps, block length 16, temperature 1.5"
    assert f"{law}; {found['passes_per_token']:.3f} passes a token" in plain
    assert f"perplexity       = {found['perplexity']:.2f}" in plain
    assert "draws" not in plain
    table = run(*arguments, "--also", broken).stdout
    assert table.count(f"sampler ({law}; ") == 2


def test_ppl_of_the_ancestral_sampler_is_a_bound(model_dir, text_file):
    rule = ["--method", "sampler", "--sampler", "ancestral", "--steps", 4, "--num-samples", 3]
    arguments = ["ppl", model_dir, text_file, "--max-documents", 2, "--window", 16, *rule]
    plain = run(*arguments).stdout
    assert "nats/token (bound)" in plain
    assert "perplexity       ≤ " in plain
    assert "ancestral, 4 steps" in plain
    assert "3 a sequence" in plain
    found = json.loads(run(*arguments, "--json").stdout)["evaluation"]
    assert found["passes_per_token"] == found["num_forward"] / found["num_tokens"] / 3 <= 4 / 8


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--sampler", "margin"], "--sampler is an option of --method sampler; add that, or leave --sampler out"),
        (["--method", "chain", "--top-p", 0.5], "--top-p is an option of --method sampler; add that, or leave"),
        (["--method", "sampler", "--sampler", "magin"], "did you mean margin?"),
        (["--method", "sampler", "--sampler", "margin", "--threshold", 0.5], "is an option of the sampler threshold"),
        (["--method", "sampler", "--sampler", "remasking"], "a text has many paths under remasking"),
        (["--method", "sampler", "--sampler", "margin", "--top-p", 0.1], "excludes a token: no perplexity is finite"),
        (["--method", "sampler", "--sampler", "margin", "--temperature", 0], "must be positive and finite"),
    ],
)
def test_ppl_refuses_samplers_and_options_without_a_law(model_dir, text_file, given, sentence):
    assert sentence in refused("ppl", model_dir, text_file, "--max-documents", 1, *given)
