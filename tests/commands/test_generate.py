"""`prime-v2 generate`: samples, the text as it denoises, and its picture."""

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from command_options import PARAMETERS
from command_runs import DOCUMENTS, refused, run
from matplotlib.image import imread
from rich.console import Console

from prime_v2 import (
    ConfidenceSamplerConfig,
    PrimeV2ArmConfig,
    PrimeV2ForCausalLM,
    RemaskingSamplerConfig,
    build_tokenizer,
)
from prime_v2.commands.generate import PICTURES, DraftView
from prime_v2.eval.lm_settings import SAMPLER_ARGUMENTS
from prime_v2.eval.loading import load_model_and_tokenizer, load_tokenizer
from prime_v2.eval.samplers import NAMES, OPTIONS, options_of
from prime_v2.output.trace_picture import printable
from prime_v2.samplers_prime_v2 import SCORES
from prime_v2.tokenization.bpe import train_bpe


def test_generate_repeats_itself_for_a_seed_and_draws_several_samples(model_dir):
    arguments = ["generate", model_dir, "--prompt", "the", "--suffix", " dogs", "--max-new-tokens", 6, "--seed", 3]
    first, again = (json.loads(run(*arguments, "--num-samples", 3, "--json").stdout) for _ in range(2))
    assert first["samples"] == again["samples"]
    assert len({sample["text"] for sample in first["samples"]}) == 3
    for sample in first["samples"]:
        assert sample["text"] == "the" + sample["completion"] + " dogs"
        assert 1 <= sample["num_forward"] <= 6 * 9
    assert first["options"] == {"max_new_tokens": 6, "seed": 3}

    other = json.loads(run(*arguments[:-1], 4, "--json").stdout)
    assert other["samples"][0]["text"] != first["samples"][0]["text"]
    plain = run(*arguments).stdout
    assert plain == json.loads(run(*arguments, "--json").stdout)["samples"][0]["text"].translate(PICTURES) + "\n"


def test_generate_without_prompt_or_seed_reports_the_seed_it_drew(model_dir):
    options = ["--max-new-tokens", 4, "--max-denoising-steps", 3, "--temperature", 0.8, "--top-p", 0.9]
    drawn = json.loads(run("generate", model_dir, *options, "--num-samples", 2, "--json").stdout)
    assert all(sample["num_forward"] <= 3 for sample in drawn["samples"])
    seed = drawn["options"]["seed"]
    again = run("generate", model_dir, *options, "--num-samples", 2, "--json", "--seed", seed)
    assert json.loads(again.stdout)["samples"] == drawn["samples"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", 0], "--temperature 0.0 must be positive"),
        (["--temperature", "nan"], "--temperature nan must be positive"),
        (["--top-p", 1.5], "--top-p 1.5 is outside"),
        (["--max-new-tokens", 999], "max_position_embeddings=64"),
        (["--watch", "--json"], "--watch and --json exclude each other"),
        (["--watch", "--num-samples", 2], "--watch shows one sample"),
        (["--greedy", "--num-samples", 2], "--greedy has one result, not --num-samples 2"),
        (
            ["--greedy", "--top-p", 0.5, "--seed", 1],
            "--greedy, the deterministic decode, has no use for --top-p 0.5",
        ),
    ],
)
def test_generate_refuses_bad_options(model_dir, options, message):
    assert message in refused("generate", model_dir, *options)


def test_greedy_generates_without_a_seed_and_the_model_s_own_choice_can_be_overruled(broken):
    arguments = ["generate", broken, "--prompt", "the", "--max-new-tokens", 6, "--json"]
    greedy = json.loads(run(*arguments, "--greedy").stdout)
    assert greedy["options"] == {"max_new_tokens": 6, "do_sample": False}
    (broken / "generation_config.json").write_text('{"do_sample": false}')
    own = json.loads(run(*arguments).stdout)
    assert (own["options"], own["samples"]) == ({"max_new_tokens": 6}, greedy["samples"])
    sampled = json.loads(run(*arguments, "--sample", "--seed", 3).stdout)
    assert sampled["options"] == {"max_new_tokens": 6, "seed": 3, "do_sample": True}
    assert sampled["samples"][0]["text"] != greedy["samples"][0]["text"]


def test_watch_writes_no_control_codes_where_there_is_no_terminal(model_dir):
    result = run("generate", model_dir, "--max-new-tokens", 8, "--seed", 0, "--watch")
    assert result.exit_code == 0
    assert not any(ord(each) < 32 and each not in "\n\t" for each in result.stdout)
    assert "░" not in result.stdout
    assert "\x1b[31m\r".translate(PICTURES) == "␛[31m␍"


def test_draft_view_shades_tokens_by_their_known_digits(model_dir):
    tokenizer = load_tokenizer(model_dir)
    with open(os.devnull, "w") as nowhere:
        view = DraftView(tokenizer, 2, Console(file=nowhere), frame_seconds=0)
        prefix, known = (
            tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids for text in ("the", " fox")
        )
        view.put(prefix)
        hidden = torch.full((1, 3), tokenizer.mask_token_id)
        draft = torch.cat([known, hidden], dim=1)
        states = torch.full((1, prefix.shape[1] + draft.shape[1], 9), 2)
        states[0, -2, :4] = states[0, -1, :8] = 1
        view.put_states(torch.cat([prefix, draft], dim=1), states)
        view.put_draft(draft)
        view.put(draft)
        view.end()
    total = draft.shape[1]
    assert view.render(draft[0].tolist()).plain == f"the fox░▒▓\n\n{total - 3} of {total} tokens known"


def test_watch_on_a_terminal_shows_drafts_and_leaves_the_text(model_dir):
    pty = pytest.importorskip("pty", reason="needs a Unix terminal")
    arguments = ["generate", str(model_dir), "--prompt", "the", "--max-new-tokens", "3", "--seed", "0"]
    code = "from prime_v2.commands.main import app; app()"
    parent, child = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    command = [sys.executable, "-c", code, *arguments, "--watch"]
    with subprocess.Popen(command, stdout=child, stderr=subprocess.PIPE, env=environment) as process:
        os.close(child)
        shown = b""
        while True:
            try:
                part = os.read(parent, 65536)
            except OSError:  # how Linux says that the other end is closed
                break
            if not part:
                break
            shown += part
        errors = process.stderr.read()
    os.close(parent)
    assert (process.returncode, errors) == (0, b"")
    text = shown.decode()
    assert "░░░" in text
    assert "0 of 3 tokens known" in text
    # The last thing on the terminal is the text, as it is without a terminal.
    assert text.replace("\r\n", "\n").endswith(run(*arguments).stdout)


def test_the_picture_shows_the_text_that_is_printed_and_is_the_same_for_the_same_seed(model_dir, tmp_path):
    arguments = ["generate", model_dir, "--prompt", "the", "--max-new-tokens", 6, "--seed", 4]
    plain = run(*arguments).stdout
    pictures = []
    for name in ("a.svg", "b.svg"):
        assert run(*arguments, "--picture", tmp_path / name).stdout == plain
        pictures.append((tmp_path / name).read_text())
    assert pictures[0] == pictures[1]
    svg = "{http://www.w3.org/2000/svg}"
    picture = ElementTree.fromstring(pictures[0])
    (sample,) = json.loads(run(*arguments, "--json").stdout)["samples"]
    assert picture.find(f"{svg}desc").text == printable(sample["text"])
    assert "pass 0" in [each.text for each in picture.iter(f"{svg}text")]

    assert "exists; give another name" in refused(*arguments, "--picture", tmp_path / "a.svg")
    several = refused(*arguments, "--picture", tmp_path / "c.svg", "--num-samples", 2)
    assert several == "--picture shows one sample, not --num-samples 2; leave one of the two out"
    assert not (tmp_path / "c.svg").exists()


def test_the_picture_is_a_png_where_the_name_says_so_and_no_other_format(model_dir, tmp_path):
    arguments = ["generate", model_dir, "--prompt", "the", "--max-new-tokens", 3, "--seed", 4]
    run(*arguments, "--picture", tmp_path / "a.svg")
    run(*arguments, "--picture", tmp_path / "a.png")
    size = ElementTree.parse(tmp_path / "a.svg").getroot()
    rows, columns, _ = imread(tmp_path / "a.png").shape
    # To a dot, and the SVG's numbers have five digits.
    assert (columns, rows) == pytest.approx([2 * float(size.get(each)) for each in ("width", "height")], abs=1.1)
    sentence = refused(*arguments, "--picture", tmp_path / "a.gif")
    assert sentence == f"--picture {tmp_path / 'a.gif'} must end with .svg or .png; use e.g. out.svg"
    assert "exists; give another name" in refused(*arguments, "--picture", tmp_path / "a.png")


def test_a_greedy_picture_needs_no_seed(model_dir, tmp_path):
    arguments = ["generate", model_dir, "--max-new-tokens", 3, "--greedy", "--json"]
    result = run(*arguments, "--picture", tmp_path / "greedy.svg")
    assert json.loads(result.stdout)["samples"][0]["num_forward"] == 3
    assert (tmp_path / "greedy.svg").read_text().count(">pass ") == 4


def test_a_model_that_writes_left_to_right_has_no_picture(tmp_path):
    folder = tmp_path / "arm"
    tokenizer = build_tokenizer(
        train_bpe(DOCUMENTS, 280), num_subtokens=1, special_tokens={"eos_token": "<|endoftext|>"}
    )
    tokenizer.save_pretrained(folder)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    PrimeV2ForCausalLM(PrimeV2ArmConfig(vocab_size=280, eos_token_id=0, **shape)).save_pretrained(folder)
    found = json.loads(run("generate", folder, "--prompt", "the", "--max-new-tokens", 4, "--json").stdout)
    assert 1 <= found["samples"][0]["num_forward"] <= 4 and found["network_seconds"] > 0
    sentence = refused("generate", folder, "--suffix", "x")
    assert sentence == "an autoregressive model cannot fill in, so it has no use for --suffix; leave --suffix out"
    sentence = refused("generate", folder, "--prompt", "the", "--picture", tmp_path / "arm.svg")
    assert sentence.startswith("--picture shows hidden tokens as they become known, but this model writes from left")


def test_a_sampler_is_named_with_its_options_and_counts_in_the_result(model_dir):
    options = ["--max-new-tokens", 6, "--max-denoising-steps", 3, "--seed", 2, "--json"]
    rule = ["--sampler", "confidence", "--score", "margin", "--unit", "digit", "--block-length", 2, "--cache", "dual"]
    found = json.loads(run("generate", model_dir, *options, *rule).stdout)
    assert found["samples"][0]["num_forward"] == 3
    short = ["--sampler", "margin", *rule[4:]]
    assert json.loads(run("generate", model_dir, *options, *short).stdout)["samples"] == found["samples"]
    model, tokenizer = load_model_and_tokenizer(str(model_dir), None, None)
    config = ConfidenceSamplerConfig(score="margin", unit="digit")
    assert found["options"]["sampler_config"] == config.to_dict()
    same = {"max_new_tokens": 6, "max_denoising_steps": 3, "seed": 2, "block_length": 2, "cache": "dual"}
    ids = model.generate(torch.empty(1, 0, dtype=torch.long), sampler_config=config, **same)
    assert found["samples"][0]["text"] == tokenizer.decode(ids[0], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--sampler", "confidnce"], "--sampler confidnce is not one of ancestral, confidence, "),
        (
            ["--unit", "digit"],
            "--unit digit is an option of the sampler confidence, threshold, entropy-bound; name it",
        ),
        (
            ["--sampler", "confidence", "--threshold", 0.5],
            "--threshold 0.5 is an option of the sampler threshold, but",
        ),
        (["--sampler", "threshold", "--threshold", 1], r"1.0 is outside (0, 1); use 0.9"),
        (["--sampler", "confidence", "--unit", "stage"], "needs a model with stages"),
        (["--cache", "most"], "is not one of none, prefix, dual"),
        (
            ["--sampler", "remasking", "--greedy"],
            "--greedy draws nothing, but --sampler remasking acts at random; use --sampler confidence",
        ),
        (["--cache", "dual"], "--cache dual keeps keys and values"),
        (
            ["--sampler", "margin", "--eta", 0.1],
            "--eta 0.1 is an option of the sampler remasking, but margin takes --unit, --",
        ),
        (
            ["--sampler", "remasking", "--t-on", 0.1, "--t-off", 0.5],
            "--sampler remasking: --t-on 0.1 and --t-off 0.5 must",
        ),
        (["--sampler", "predictor-corrector"], "has no --sampler predictor-corrector: a token is hidden or final"),
        (["--sampler", "ancestral", "--stage-passes", "0.5"], "--sampler ancestral: --stage-passes"),
        (["--steps", 3, "--sampler", "margin", "--unit", "word"], "--unit word is not one of token, digit, stage"),
    ],
)
def test_a_sampler_or_option_that_cannot_be_is_refused_by_the_names_of_the_command_line(model_dir, given, sentence):
    found = refused("generate", model_dir, *given)
    assert sentence in found
    assert "Config" not in found


def test_every_option_of_a_sampler_is_an_option_of_generate_and_those_of_a_law_of_ppl():
    of = {name: {each.name for each in PARAMETERS if each.command == (name,)} for name in ("generate", "ppl")}
    assert set(OPTIONS) <= of["generate"]
    with_law = {option for name in ("ancestral", *SCORES, "confidence", "threshold", "entropy-bound")
                for option in options_of(name)}  # fmt: skip
    assert of["ppl"] & set(OPTIONS) == with_law == set(SAMPLER_ARGUMENTS) & set(OPTIONS)
    (sampler,) = (each for each in PARAMETERS if each.command == ("generate",) and each.name == "sampler")
    assert all(re.search(rf"\b{name}\b", sampler.info.help) for name in NAMES)


def test_a_cache_is_called_approximate_beside_the_text(model_dir):
    arguments = ["generate", model_dir, "--max-new-tokens", 4, "--seed", 1, "--block-length", 2]
    assert "cache prefix is approximate" in run(*arguments, "--cache", "prefix").stderr
    assert "approximate" not in run(*arguments).stderr


def test_the_window_of_remasking_reaches_the_sampler(model_dir):
    given = {"eta": 0.3, "t_on": 0.9, "t_off": 0.1}
    options = [each for name, value in given.items() for each in (f"--{name.replace('_', '-')}", value)]
    found = run(
        "generate", model_dir, "--max-new-tokens", 2, "--steps", 4, "--sampler", "remasking", *options, "--json"
    )
    assert json.loads(found.stdout)["options"]["sampler_config"] == RemaskingSamplerConfig(**given).to_dict()
